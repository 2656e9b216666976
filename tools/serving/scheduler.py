"""Continuous batching: the stories of all visitors are one batch, which they join and leave at any token.

    scheduler = Scheduler(model, batch_size=8)
    scheduler.submit([Story(tokenizer, prompt, seed=7)])  # from any thread; its text grows
    scheduler.run()                                       # generates forever

A batch that waits for its longest story leaves places empty, and whoever comes late waits for all of it. Here
another story takes the place as soon as one has ended: iteration-level scheduling (Yu et al. 2022, Orca).
"""

import threading
from collections.abc import Sequence

import torch

from model import GPT
from sample import draw_noise, prefill, round_up, sample_token
from stories.constraints import story_start

TOP_K = 50
MAX_LENGTH = 1024  # tokens of a prompt and its story


class Scheduler:
    """Generates stories. `run` takes a thread of its own; the other methods may be called from any."""

    def __init__(self, model: GPT, batch_size: int):
        self.model = model
        self.batch_size = batch_size
        self.max_length = min(model.config.block_size, MAX_LENGTH)
        self.device = model.embedding.weight.device
        self.waiting: list[Story] = []
        self.changed = threading.Condition()  # guards `waiting`

    @torch.inference_mode()
    def run(self) -> None:
        """Generate forever: a step gives every active story a token; between steps some leave and join."""
        active: list[Story] = []  # A stories
        dtype = self.model.embedding.weight.dtype
        cache = self.model.new_cache(0, self.max_length, dtype)  # (A, K, S, D) each
        while True:
            # Leave: those that have ended.
            rows = [row for row, story in enumerate(active) if not story.finish_reason]
            if len(rows) < len(active):
                active = [active[row] for row in rows]
                cache = [[keys[rows], values[rows]] for keys, values in cache]  # (A, K, S, D) each
            # Join: those that wait, as far as there are places.
            joining = self.next_stories(active)  # J stories
            logits: list[torch.Tensor] = []  # of the next token, (1, V) for each story
            if active:
                logits.extend(self.decode(active, cache))
            if joining:
                prompts = [story.tokens for story in joining]
                prompt_logits, _, _, prompt_cache = prefill(self.model, prompts, self.max_length)  # (J, V), …
                logits.extend(prompt_logits.split(1))
                active = active + joining
                for layer, prompt_layer in zip(cache, prompt_cache, strict=True):
                    for i in range(2):  # keys, values
                        layer[i] = torch.cat((layer[i], prompt_layer[i]))  # (A + J, K, S, D)
            tokens = []
            for story, row in zip(active, logits, strict=True):
                noise = draw_noise(1, TOP_K, row.size(1), story.generator)  # (1, k)
                tokens.append(sample_token(row, None, story.temperature, story.top_p, 1.0, noise))  # (1,)
            for story, token in zip(active, torch.cat(tokens).tolist(), strict=True):
                story.add(token)

    def next_stories(self, active: list["Story"]) -> list["Story"]:
        """The waiting stories that find a place. Blocks while there is nothing at all to do."""
        with self.changed:
            while not active and not self.waiting:
                self.changed.wait()
            free = self.batch_size - len(active)
            joining = self.waiting[:free]
            self.waiting = self.waiting[free:]
        for story in joining:
            story.join(self.device, self.max_length)
        return joining

    def decode(self, active: list["Story"], cache: list) -> torch.Tensor:
        """The logits after the last token of each story, (A, 1, V)."""
        last = [story.tokens[-1] for story in active]
        lengths = [len(story.tokens) for story in active]
        tokens = torch.tensor(last, device=self.device)[:, None]  # (A, 1)
        positions = torch.tensor(lengths, device=self.device)[:, None] - 1  # (A, 1)
        # Attention pays for empty positions too. The sizes are sample.py's, as sums round by size.
        size = round_up(max(lengths))
        filled = [[keys[:, :, :size], values[:, :, :size]] for keys, values in cache]  # (A, K, size, D) each
        return self.model(tokens, positions=positions, cache=filled)  # (A, 1, V)

    def submit(self, stories: list["Story"]) -> None:
        """Put stories at the end of the queue."""
        with self.changed:
            self.waiting = self.waiting + stories
            self.changed.notify()

    def cancel(self, stories: list["Story"]) -> None:
        """Give up those that have not ended."""
        with self.changed:
            self.waiting = [story for story in self.waiting if story not in stories]
        for story in stories:
            story.finish_reason = story.finish_reason or "cancelled"

    def ahead_of(self, story: "Story") -> int | None:
        """How many wait before a story that waits."""
        waiting = self.waiting
        if story in waiting:
            return waiting.index(story)
        return None


class Story:
    """A story as far as it is generated: its tokens with the prompt, its text after the prompt.

    When finish_reason is set ("stop", "length"), the text is complete.
    """

    generator: torch.Generator

    def __init__(
        self,
        tokenizer,
        prompt: list[int],
        seed: int,
        temperature: float = 0.8,
        top_p: float = 0.95,
        stop: Sequence[str] = (),
        max_new_tokens: int = MAX_LENGTH,
    ):
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.seed = seed
        self.temperature = temperature
        self.top_p = top_p
        self.stop = [text for text in stop if text]
        self.max_length = len(prompt) + max_new_tokens
        self.start = story_start(tokenizer, prompt)
        self.beginning = tokenizer.decode(prompt[self.start :])
        self.tokens = list(prompt)
        self.text = ""
        self.finish_reason: str | None = None

    def join(self, device: torch.device, max_length: int) -> None:
        """Prepare for generation."""
        self.max_length = min(self.max_length, max_length)
        # The random numbers of sample.py for this seed; PyTorch takes no negative one.
        self.generator = torch.Generator(device).manual_seed(self.seed % 2**63)

    def add(self, token: int) -> None:
        """Add the next token, and the text that is certain by now."""
        self.tokens.append(token)
        finish_reason = None
        if token == self.tokenizer.eos_id():
            finish_reason = "stop"
        elif len(self.tokens) == self.max_length:
            finish_reason = "length"
        # All is decoded anew, as in sample.py: a token alone can have another text than inside a story.
        text = self.tokenizer.decode(self.tokens[self.start :])
        text = text[len(self.beginning) :].rstrip("\ufffd")  # without a character that is not complete
        before_stop = min((text.split(stop)[0] for stop in self.stop), key=len, default=text)
        if len(before_stop) < len(text):
            text = before_stop
            finish_reason = "stop"
        elif self.stop and not finish_reason:  # what may be the start of a stop string is held back
            held_back = max(map(len, self.stop)) - 1
            text = text[: max(0, len(text) - held_back)]
        self.text = text
        self.finish_reason = finish_reason or self.finish_reason
