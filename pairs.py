"""Pairs of a better and a worse story for one instruction: ready ones read, or the model's own stories compared."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import LoopSettings
from dataset import TokenFile
from disk import replacing
from errors import UserError
from instructions import markers, read_constraints
from model import GPT, IGNORE
from prepare import clean, digest
from rewards import average, reward, score, tell_and_score
from sft import ExampleFile
from stories.read import items_of, read_blocks

TOLD_AT_ONCE = 64  # stories, when making pairs


def pair_of(record, where: str) -> list[tuple]:
    """[(prompt, (chosen, whether it ended), (rejected, whether it ended))] of a record: three texts, or chosen and
    rejected as conversations of a user and an assistant, with the prompt as one or in front of each, as TRL and
    minimind write them. Raises UserError."""
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        raise UserError(f"{where}: expected an object with prompt, chosen and rejected")
    texts: dict[str, str] = {}
    for key in ("chosen", "rejected"):
        prompt, answer = record.get("prompt", []), record[key]
        if isinstance(prompt, list) and isinstance(answer, list):
            turns = [(m.get("role"), m.get("content")) for m in prompt + answer if isinstance(m, dict)]
            if len(turns) != len(prompt + answer) or [role for role, _ in turns] != ["user", "assistant"]:
                raise UserError(f"{where}: {key!r} is no conversation of one question and one answer")
            prompt, answer = (text for _, text in turns)
        for name, text in (("prompt", prompt), (key, answer)):
            if not isinstance(text, str):
                raise UserError(f"{where}: {name!r} is a {type(text).__name__}, not text")
            if texts.setdefault(name, text) != text:
                raise UserError(f"{where}: chosen and rejected answer different prompts")
    try:
        prompt, *answers = (clean(texts[name]) for name in ("prompt", "chosen", "rejected"))
    except UnicodeEncodeError:
        raise UserError(f"{where}: half a character, which is no text") from None
    scores = [record.get(f"{key}_scores") for key in ("chosen", "rejected")]  # where we told the stories
    ended = [not isinstance(found, dict) or found.get("finished") != 0 for found in scores]
    return [(prompt, *zip(answers, ended, strict=True))]


def write_pairs(
    path: Path,
    model: GPT,
    tokenizer,
    data: ExampleFile,
    instructions: int,
    samples: int,
    temperature: float,
    reference_chosen: bool,
    seed: int,
) -> None:
    """Let the model tell `samples` stories for each of `instructions` examples, score them, and write the best
    and the worst of each to `path`, where they differ. Stopped and called again with the same model and
    settings, it goes on where it was."""
    order = np.random.default_rng(seed).permutation(sorted(data.order_in_rows))[:instructions]
    at_once = max(1, TOLD_AT_ONCE // samples)
    batches = [order[i : i + at_once] for i in range(0, len(order), at_once)]
    made_with = hashlib.sha256(repr((samples, temperature, reference_chosen, seed)).encode())
    for weight in model.state_dict().values():
        made_with.update(weight.float().cpu().numpy())
    unfinished, kept = path.with_name(f"{path.name}.{made_with.hexdigest()[:8]}.part"), []
    if unfinished.exists():  # the last batch in it may be a part of one
        try:
            lines = [json.loads(line) for line in unfinished.read_text(encoding="utf-8").split("\n")[:-1]]
            kept = [line for line in lines if line["batch"] < lines[-1]["batch"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{unfinished}: damaged; remove it, to begin again") from None
    begin = kept[-1]["batch"] + 1 if kept else 0
    with replacing(unfinished) as f:
        f.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in kept)
    told, written = [], len(kept)
    with open(unfinished, "ab") as f:
        for number in tqdm(range(begin, len(batches)), desc="telling stories", unit="batch", disable=None):
            examples = [tuple(map(np.ndarray.tolist, data.example(i))) for i in batches[number]]
            longest = max(len(asked) for asked, _ in examples)
            options = {"max_new_tokens": model.config.block_size - longest, "end_token": tokenizer.eos_id()}
            options |= {"temperature": temperature, "seed": seed + number}
            prompts = [asked for asked, _ in examples for _ in range(samples)]
            stories = tell_and_score(model, tokenizer, prompts, **options)
            for i, (asked, answer) in enumerate(examples):
                here = stories[i * samples : (i + 1) * samples]
                told += [scores for _, scores in here]
                story = tokenizer.decode(answer)
                # The reference is scored by the rules too, and comes last: of equals the model's own is chosen.
                best = score(read_constraints(tokenizer.decode(asked)), story) | {"finished": 1.0}
                ranked = sorted(here + [(story, best)] * reference_chosen, key=lambda x: -reward(x[1], best))
                (chosen, high), (rejected, low) = ranked[0], ranked[-1]
                if reward(high, best) > reward(low, best):
                    line = {"prompt": tokenizer.decode(asked), "chosen": chosen, "rejected": rejected}
                    line |= {"chosen_scores": high, "rejected_scores": low, "batch": number}
                    f.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                    written += 1
            f.flush()
        os.fsync(f.fileno())
    os.replace(unfinished, path)
    means = ", ".join(f"{name} {value:.3g}" for name, value in average(told).items())
    print(f"{path}: {written:,} pairs of {len(order):,} instructions; stories told: {means}")


class PairFile(TokenFile):
    """Pairs as rows of tokens, the chosen story's and the rejected one's, in a new seeded order each epoch."""

    def __init__(self, path: Path, pairs: list[tuple], block_size: int, end_token: int, seed: int):
        self.path, self.pairs, self.block_size, self.seed, self.epoch = path, pairs, block_size, seed, -1
        self.end_token, self.reference = end_token, np.zeros((len(pairs), 2), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.pairs)

    def count(self, batch: dict) -> int:
        """The pairs of a batch that are not only there to fill it."""
        return int((batch["targets"][:, 0] != IGNORE).any(dim=-1).sum())

    def rows(self, chosen: list[int]) -> dict[str, torch.Tensor]:
        """tokens and targets, (count, 2, T), and the reference's log-probabilities, (count, 2)."""
        shape = (len(chosen), 2, self.block_size)
        tokens, targets = np.full(shape, self.end_token), np.full(shape, IGNORE)
        for row, number in enumerate(chosen):
            prompt, *answers = self.pairs[number]
            for side, answer in enumerate(answers):
                both = np.array([*prompt, *answer], dtype=np.int64)
                tokens[row, side, : len(both) - 1] = both[:-1]
                targets[row, side, len(prompt) - 1 : len(both) - 1] = answer
        batch = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        return batch | {"reference": torch.from_numpy(self.reference[chosen])}


def read_pairs(files: list[Path], template: str, tokenizer, s: LoopSettings) -> tuple[PairFile, PairFile]:
    """The pairs to train on and, of a twentieth of the prompts, to validate with. Raises UserError."""
    end, (before, answer) = tokenizer.eos_id(), markers(template, tokenizer)
    splits: dict[str, list[tuple]] = {"train": [], "val": []}
    too_long = 0
    blocks = read_blocks(files, pair_of, "reading pairs")
    pairs = [pair for block in blocks for pair in items_of(block, pair_of)]
    prompts = sorted({digest(prompt) for prompt, *_ in pairs})
    held_out = set(prompts[: max(1, len(prompts) // 20)])
    for prompt, *stories in pairs:
        asked = [end, *before, *tokenizer.encode(prompt), *answer]
        told = [tokenizer.encode(story) + [end] * ended for story, ended in stories]
        if len(asked) + max(map(len, told)) - 1 > s.block_size:
            too_long += 1
        else:
            splits["val" if digest(prompt) in held_out else "train"].append((asked, *told))
    counts = ", ".join(f"{len(found):,} {split}" for split, found in splits.items())
    print(f"{files[0]}: {counts} pairs, {too_long:,} left out (longer than {s.block_size} tokens)")
    train_data, val_data = (PairFile(files[0], found, s.block_size, end, s.seed) for found in splits.values())
    return train_data, val_data
