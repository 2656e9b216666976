"""Sample stories from a checkpoint.

    python sample.py --ckpt out/demo
    python sample.py --ckpt out/demo --prompt 从前 --num 5 --temperature 1.0
    python sample.py --ckpt out/demo_sft --words 铲子,草地 --features 转折
    python sample.py --ckpt out/demo_sft --words 铲子,草地 --best_of 8          the best of eight
    python sample.py --ckpt out/demo_sft --interactive

Stories are decoded in batches with a KV cache; the first one streams to the terminal.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.checkpoint import newest_run, try_compile
from common.files import Parser, UserError, report_errors
from common.sampling import add_device_options, add_sampling_options, open_model, sampling_options
from model import GPT
from stories.constraints import NAMES, encode_prompt, read_constraints, story_start, write_constraints
from stories.rewards import can_choose, findings, reward, score

BATCH = 64  # stories that are generated together
CACHE_STEP = 64  # the KV cache grows by this many positions

# ---- Sampling --------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    end_token: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
    repetition_penalty: float = 1.0,
    seed: int = 1337,
    compile: bool = False,
):
    """Continue every prompt, all as one batch. Yields the next token of each sequence, (B,), step by step.

    In the shapes, B sequences were begun and A of them are active. Prompts may differ in length; none may be
    empty. A sequence that has ended yields end_token. Stops when all have ended, after max_new_tokens, or
    when the longest sequence reaches block_size. Compiling takes ten seconds first, on a GPU 25; a single
    sequence then takes a third of the time, on a GPU an eighth.
    """
    longest = max(len(prompt) for prompt in prompts)
    end = min(longest + max_new_tokens, model.config.block_size)
    # Decoding one token is so little work for a GPU that launching its kernels takes longer than running
    # them. A CUDA graph launches them all at once. It needs tensors of fixed address and size, so its cache
    # has full size from the start. Elsewhere the cache grows: attention pays for empty positions too.
    use_cuda_graph = compile and model.embedding.weight.is_cuda
    cache_size = round_up(end if use_cuda_graph else longest)
    logits, last, seen, cache = prefill(model, prompts, cache_size)
    decode = compile_decode(model, cache, use_cuda_graph) if compile else model
    seen[:, end_token] = False  # every prompt begins with it; a story must be free to end
    generator = torch.Generator(logits.device).manual_seed(seed)
    tokens = torch.full_like(last, end_token)  # (B,)
    active = torch.arange(len(prompts), device=logits.device)  # (A,), the sequences that are still computed
    ended = torch.zeros_like(active, dtype=torch.bool)  # (A,)
    for length in range(longest, end):
        # Noise for all sequences, so that a seed gives the same stories however many have ended.
        noise = draw_noise(len(prompts), top_k, logits.size(1), generator)[active]  # (A, k)
        token = sample_token(logits, seen, temperature, top_p, repetition_penalty, noise)  # (A,)
        token = torch.where(ended, end_token, token)  # (A,)
        yield tokens.scatter(0, active, token)

        ended |= token == end_token
        n_ended = int(ended.sum())
        if n_ended == len(active) or length == end - 1:
            return
        if n_ended > len(active) // 4 and not compile:  # compute only the others from now on
            left = (~ended).nonzero()[:, 0]  # (A,)
            active = active[left]
            token = token[left]
            last = last[left]
            seen = seen[left]
            ended = ended[left]
            cache = [[keys[left], values[left]] for keys, values in cache]  # (A, K, S, D) each
        if length == cache_size:
            cache_size += CACHE_STEP
            cache = grow(cache)

        # Decode: one new token a sequence; the cache holds the keys and values of all tokens before it.
        seen.scatter_(1, token[:, None], True)
        last = last + 1  # (A,)
        logits = decode(token[:, None], positions=last[:, None], cache=cache)[:, 0]  # (A, V)


def prefill(model: GPT, prompts: list[list[int]], cache_size: int) -> tuple:
    """Process all prompts in one forward pass. Returns the logits after each, (B, V), the position of its
    last token, (B,), which tokens have occurred, (B, V), and the KV cache.

    Shorter prompts are padded on the right. The cache for prompts of 3 and 5 tokens (p: padding, .: empty, 1
    and 2: new tokens):

        position             0 1 2 3 4 5 6
        after prefill        a b c p p . .    last 2
                             d e f g h . .    last 4
        after two steps      a b c 1 2 . .    last 4
                             d e f g h 1 2    last 6

    A token attends only to positions up to its own. New tokens overwrite padding before any token sees it.
    """
    device = model.embedding.weight.device
    longest = max(len(prompt) for prompt in prompts)
    padded = [prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts]
    tokens = torch.tensor(padded, device=device)  # (B, T)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)  # (B,)
    positions = torch.arange(longest, device=device).expand_as(tokens)  # (B, T)
    cache = model.new_cache(len(prompts), cache_size, model.embedding.weight.dtype)
    logits = model(tokens, positions=positions, cache=cache, last=last)[:, 0]  # (B, V)
    seen = torch.zeros_like(logits, dtype=torch.bool)  # (B, V)
    seen.scatter_(1, tokens, True)
    return logits, last, seen, cache


def draw_noise(batch_size: int, top_k: int, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """Draws of Exponential(1) for `sample_token`, (B, k); k is the whole vocabulary if top_k is 0."""
    k = min(top_k, vocab_size) if top_k > 0 else vocab_size
    return torch.empty(batch_size, k, device=generator.device).exponential_(generator=generator)


def sample_token(
    logits, seen, temperature: float, top_p: float, repetition_penalty: float, noise
) -> torch.Tensor:
    """The next token of each sequence, (B,), from logits, (B, V). seen, (B, V): which tokens have occurred.

    noise, (B, k): only the k most likely tokens remain, and of these the fewest that hold top_p of the
    probability (Holtzman et al. 2020, arXiv:1904.09751). At temperature 0, or near it, the most likely token.
    """
    if repetition_penalty != 1.0:  # Keskar et al. 2019, arXiv:1909.05858, section 4.1
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalized, logits)  # (B, V)
    if temperature < 1e-6:  # by less the logits could overflow
        return logits.argmax(dim=-1)  # (B,)
    values, tokens = (logits.float() / temperature).topk(noise.size(1))  # (B, k) each, the most likely first
    p = values.softmax(dim=-1)  # (B, k)
    held_before = p.cumsum(dim=-1) - p  # (B, k), the probability of the tokens that are more likely
    p = p.masked_fill(held_before >= top_p, 0)
    # The largest of p / e, e from Exponential(1), is token i with probability p[i]. Unlike torch.multinomial
    # this takes noise that was drawn for all sequences, see generate.
    index = (p / noise).argmax(dim=-1, keepdim=True)  # (B, 1)
    return tokens.gather(1, index)[:, 0]  # (B,)


def round_up(length: int) -> int:
    """The size of a KV cache for so many positions."""
    return math.ceil(length / CACHE_STEP) * CACHE_STEP


def grow(cache: list) -> list:
    """The KV cache with CACHE_STEP more positions."""
    padding = (0, 0, 0, CACHE_STEP)  # none on D, CACHE_STEP after the last of S
    return [[F.pad(keys, padding), F.pad(values, padding)] for keys, values in cache]  # (B, K, S, D) each


def compile_decode(model: GPT, cache: list, use_cuda_graph: bool):
    """The model compiled for decoding. On a CPU one program serves every size of the cache."""
    for keys, values in cache:
        for tensor in (keys, values):
            if use_cuda_graph:
                torch._dynamo.mark_static_address(tensor)
            else:
                torch._dynamo.mark_dynamic(tensor, 2)
    device = model.embedding.weight.device
    if device.type == "cpu":
        from torch._inductor import config as compiler_config  # here, as it takes long

        # A vector times a matrix is bound by reading the matrix: a fused loop is up to three times as fast.
        limit = {"cpu_max_other_dimension_decomposition": 1 << 20}
        compiler_config.post_grad_fusion_options["decompose_mm_pass"] = limit
    return try_compile(model, device, "reduce-overhead" if use_cuda_graph else None)


# ---- Text ------------------------------------------------------------------------------------------


def sample_stories(
    model, tokenizer, prompts: list[list[int]], write=None, **options
) -> list[tuple[str, bool]]:
    """A story for each prompt, with the beginning that the prompt gives, and whether it has reached its end.

    All are one batch. The first story is passed to `write` in pieces as it is generated. Raises UserError.
    """
    for prompt in prompts:
        if len(prompt) >= model.config.block_size:
            most = model.config.block_size - 1
            raise UserError(f"the prompt has {len(prompt):,} tokens, the model reads at most {most:,}")
    end_token = tokenizer.eos_id()
    stories = [prompt[story_start(tokenizer, prompt) :] for prompt in prompts]
    finished = [False] * len(prompts)
    n_written = 0
    for tokens in generate(model, prompts, end_token=end_token, **options):
        for i, token in enumerate(tokens.tolist()):
            if token == end_token:
                finished[i] = True
            else:
                stories[i].append(token)
        if write:
            # The whole story is decoded anew and its new characters are written: the text of a token alone
            # can differ from its text inside a story, and a rare character takes several tokens.
            text = tokenizer.decode(stories[0])
            if not text.endswith("\ufffd"):  # an incomplete character
                write(text[n_written:])
                n_written = len(text)
    # max_new_tokens may cut a character: what is left of it decodes to U+FFFD.
    texts = [tokenizer.decode(story).rstrip("\ufffd") for story in stories]
    if write:
        write(texts[0][n_written:])
    return list(zip(texts, finished, strict=True))


# ---- The command -----------------------------------------------------------------------------------


def main() -> None:
    args = parse_arguments()
    options = sampling_options(args)
    options["max_new_tokens"] = args.max_new_tokens
    if args.ckpt is None:
        args.ckpt = newest_run(Path("out"))
        print(f"the newest run is {args.ckpt}", file=sys.stderr)
    model, tokenizer, checkpoint = open_model(args.ckpt, args.device, args.dtype)
    template = checkpoint.get("template", "")
    if args.instruction and not template:
        raise UserError(f"{args.ckpt}: has not learned to follow instructions; give a checkpoint of sft.py")

    def respond(instruction: str, beginning: str) -> None:
        if template and not instruction and not beginning:
            instruction = example_instruction(tokenizer, checkpoint, args.ckpt)
        prompt = encode_prompt(tokenizer, template, instruction, beginning)
        if args.best_of > 1:
            constraints = read_constraints(instruction)
            print_best_stories(model, tokenizer, prompt, constraints, args.num, args.best_of, options)
        else:
            print_stories(model, tokenizer, prompt, args.num, options)

    if not args.interactive:
        respond(args.instruction, args.prompt)
        return
    for typed in ask(list(NAMES) if template else ["prompt"]):
        try:
            respond(write_constraints(typed) if template else "", typed.get("prompt", ""))
        except UserError as e:  # a prompt that is too long is no reason to stop asking
            if not sys.stdin.isatty():
                raise
            print(f"error: {e}", file=sys.stderr)


def example_instruction(tokenizer, checkpoint: dict, path: Path) -> str:
    """The example that a tuned checkpoint carries, for a user who asked for nothing. Raises UserError."""
    instruction = tokenizer.decode(checkpoint.get("prompt", []))
    if not instruction:
        raise UserError(f"{path}: follows instructions; give one, for example --words 帽子,消防员")
    shown = " | ".join(instruction.splitlines())
    print(f"asked for: {shown} (an example; ask for another with --words 帽子,消防员)", file=sys.stderr)
    return instruction


def print_stories(model, tokenizer, prompt: list[int], num: int, options: dict) -> None:
    """Print `num` stories, the first one as it is generated. Raises UserError."""
    for number, size in enumerate(batch_sizes(num)):
        batch_options = {**options, "seed": options["seed"] + number}
        write = write_now if number == 0 else None
        stories = sample_stories(model, tokenizer, [prompt] * size, write, **batch_options)
        if number == 0:
            write_now("\n")
            stories = stories[1:]  # the first is written
        with tqdm.external_write_mode():
            for story, _ in stories:
                print(f"---\n{story}", flush=True)


def write_now(text: str) -> None:
    print(text, end="", flush=True)


def print_best_stories(model, tokenizer, prompt, constraints, num: int, best_of: int, options: dict) -> None:
    """Print `num` stories, each the best of `best_of`, by the rules of stories/rewards.py.

    Raises UserError.
    """
    if not can_choose(constraints):
        known = "--words, --sentence or --features 对话"
        raise UserError(f"--best_of {best_of}: nothing to choose by; it counts what {known} ask for")
    seed = options["seed"]
    for i in range(num):
        best = ""
        best_reward = -math.inf
        for size in batch_sizes(best_of):
            batch_options = {**options, "seed": seed}
            seed += 1
            for story, finished in sample_stories(model, tokenizer, [prompt] * size, **batch_options):
                scores = score(constraints, story)
                scores["finished"] = float(finished)
                if reward(scores) > best_reward:
                    best = story
                    best_reward = reward(scores)
        if i > 0:
            print("---")
        print(best, flush=True)
        print(f"(best of {best_of}: {describe(findings(constraints, best))})", file=sys.stderr)


def batch_sizes(total: int) -> tqdm:
    """The sizes of batches for `total` stories that fit in memory, with a bar if they are several."""
    sizes = [min(BATCH, total - first) for first in range(0, total, BATCH)]
    return tqdm(sizes, unit="batch", delay=1e-3, leave=False, disable=None if len(sizes) > 1 else True)


def describe(found: dict) -> str:
    """The findings of a story in a line."""
    parts = []
    if found.get("missing"):
        parts.append(f"words missing: {'，'.join(found['missing'])}")
    elif "missing" in found:
        parts.append("all words")
    if "sentence" in found:
        names = {"exact": "the sentence", "nearly": "nearly the sentence", "missing": "no sentence"}
        parts.append(names[found["sentence"]])
    if "dialogue" in found:
        parts.append("dialogue" if found["dialogue"] else "no dialogue")
    return ", ".join(parts)


def ask(names: list[str]):
    """Yield what the user types for each name, as a dict, until the input ends. Raises UserError."""
    if sys.stdin is None:
        raise UserError("--interactive: standard input is closed")
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]  # a TextIOWrapper
    ended = False
    while not ended:
        answers = dict.fromkeys(names, "")
        for name in names:
            if sys.stdin.isatty():
                print(f"{name}: ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if line == "":
                ended = True
                break
            answers[name] = line.rstrip("\n")
        if not ended or any(answers.values()):
            yield answers


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Sample stories from a checkpoint.", allow_abbrev=False)
    ckpt_help = "a checkpoint, or a run's folder for its newest (default: the newest run in out/)"
    parser.add_argument("--ckpt", type=Path, nargs="?", help=ckpt_help)
    beginning = parser.add_mutually_exclusive_group()
    beginning.add_argument("--prompt", default="", help="how the stories begin")
    beginning.add_argument("--prompt_file", type=Path, help="read the prompt from this UTF-8 file")
    for name, key in NAMES.items():
        how = f"what the story must have (a model of sft.py): {name}"
        if key in ("words", "features"):
            how += ", separated by , ， 、 ; or ； (not by spaces)"
        parser.add_argument(f"--{key}", default="", help=how)
    parser.add_argument("--instruction", default="", help="one in your own words, instead of these")
    parser.add_argument("--num", type=int, help="stories to sample (default: 3; with --best_of 1)")
    parser.add_argument("--best_of", type=int, default=1, metavar="N", help="sample N, show the best")
    parser.add_argument("--max_new_tokens", type=int, default=300)
    add_sampling_options(parser)
    add_device_options(parser)
    parser.add_argument("--interactive", action="store_true", help="ask for more; Enter skips, Ctrl-D ends")
    args = parser.parse_args()
    if args.num is None:
        args.num = 3 if args.best_of == 1 else 1
    for key in ("num", "best_of", "max_new_tokens"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    if not args.instruction:
        args.instruction = write_constraints({name: getattr(args, key) for name, key in NAMES.items()})
    if args.interactive and (args.instruction or args.prompt or args.prompt_file):
        raise UserError("--interactive asks for prompt and instruction; leave those options out")
    if args.prompt_file:
        try:
            args.prompt = args.prompt_file.read_text(encoding="utf-8-sig").rstrip("\n")
        except UnicodeDecodeError as e:
            raise UserError(f"{args.prompt_file}: not UTF-8 at byte {e.start}") from None
    return args


if __name__ == "__main__":
    report_errors(main)
