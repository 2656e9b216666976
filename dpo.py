"""Preference tuning: of two stories for one instruction, make the better one likelier.

    python dpo.py config/demo_dpo.py                         pairs made by the model itself, then the training
    python dpo.py config/demo_dpo.py --make_pairs=True       the pairs alone, into out_dir/pairs.jsonl
    python dpo.py config/demo_dpo.py --pairs=mine.jsonl      pairs of your own
    python dpo.py config/demo_dpo.py --rounds=2              once more, with pairs the better model makes

The loop is `train.train`. New here: where pairs come from, and a loss that compares (Rafailov et al. 2023,
arXiv:2305.18290).
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import build_model, newest_checkpoint, read_checkpoint
from config import LoopSettings, load_settings
from device import choose_device, processes
from disk import replacing
from instructions import markers, read_constraints
from lora import add_lora
from model import GPT, IGNORE
from prepare import UserError, clean, digest, load_tokenizer, run
from rewards import average, reward, score, tell_and_score
from sft import ExampleFile
from stories.read import find_inputs, items_of, read_blocks
from train import TokenFile, read_meta, train

TOLD_AT_ONCE = 64  # stories, when making pairs


@dataclass
class Settings(LoopSettings):
    """What the loop is told, where pairs come from, and how they are compared."""

    init_from: str = "out/demo_sft"  # the checkpoint to start from, which is the reference as well
    epochs: float = 0.0  # above 0: max_iters becomes the steps that so many passes over the pairs take
    # The pairs: ready ones, or stories the model tells for instructions of data_dir, scored by rewards.py
    pairs: str = ""  # a .jsonl or .json file of prompt, chosen and rejected; empty: make them
    make_pairs: bool = False  # make the pairs and stop there
    instructions: int = 400
    samples: int = 4  # stories for each; the best and the worst become a pair
    temperature: float = 1.0
    reference_chosen: bool = True  # the story of data_dir may be chosen too, where it is better than all told
    rounds: int = 1  # tell, score and train so many times, each from where the last one ended
    # The loss
    loss: str = "sigmoid"  # sigmoid (DPO) | ipo | simpo
    beta: float = 0.1  # how far the model may go from the reference: the smaller, the farther
    label_smoothing: float = 0.0  # the share of pairs that may be the wrong way round
    simpo_gamma: float = 1.0  # simpo: by how much the chosen one must win
    nll_weight: float = 0.0  # adds the chosen story's own loss, which keeps a small model from falling apart
    lora_rank: int = 0  # 0: every weight learns; else only adapters of this rank do
    lora_alpha: float = 16.0  # adapters count alpha / rank times

    def __post_init__(self):
        super().__post_init__()
        if self.loss not in ("sigmoid", "ipo", "simpo"):
            raise UserError(f"loss = {self.loss!r}: must be one of sigmoid, ipo, simpo")
        if not self.beta > 0 or self.label_smoothing >= 0.5 or not self.temperature > 0:
            raise UserError("beta and temperature must be above 0, label_smoothing below 0.5")


# ---------------------------------------------------------------------------------------------------
# Pairs


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


def write_pairs(path: Path, model: GPT, tokenizer, data: ExampleFile, s: Settings) -> None:
    """Let the model tell `samples` stories for each of `instructions` examples, score them, and write the best
    and the worst of each to `path`, where they differ. Stopped and called again, it goes on where it was."""
    device, dtype = choose_device(s.device, s.dtype)
    model.to(device, dtype).eval()
    order = np.random.default_rng(s.seed).permutation(sorted(data.order_in_rows))[: s.instructions]
    at_once = max(1, TOLD_AT_ONCE // s.samples)
    batches = [order[i : i + at_once] for i in range(0, len(order), at_once)]
    unfinished, kept = path.with_name(path.name + ".part"), []
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
            options |= {"temperature": s.temperature, "seed": s.seed + number}
            prompts = [asked for asked, _ in examples for _ in range(s.samples)]
            stories = tell_and_score(model, tokenizer, prompts, **options)
            for i, (asked, answer) in enumerate(examples):
                here = stories[i * s.samples : (i + 1) * s.samples]
                told += [scores for _, scores in here]
                story = tokenizer.decode(answer)
                # The reference is scored by the rules too, and comes last: of equals the model's own is chosen.
                best = score(read_constraints(tokenizer.decode(asked)), story) | {"finished": 1.0}
                ranked = sorted(here + [(story, best)] * s.reference_chosen, key=lambda x: -reward(x[1], best))
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


def read_pairs(files: list[Path], template: str, tokenizer, s: Settings) -> tuple[PairFile, PairFile]:
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


@torch.no_grad()
def reference_log_probs(model: GPT, data: PairFile, s: Settings) -> np.ndarray:
    """The log-probabilities of all stories, (pairs, 2), as the model gives them before it is trained."""
    device, dtype = choose_device(s.device, s.dtype)
    model.to(device)
    found = []
    for first in tqdm(range(0, len(data), s.batch_size), desc="reference", unit="batch", disable=None):
        batch = data.rows(list(range(first, min(first + s.batch_size, len(data)))))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tokens, targets = (batch[name].flatten(0, 1).to(device) for name in ("tokens", "targets"))  # (2P, T)
            found.append(-model(tokens, targets, rows=True).view(-1, 2).float().cpu().numpy())  # (P, 2)
    return np.concatenate(found)


# ---------------------------------------------------------------------------------------------------
# The loss


def preference_loss(model, batch: dict, s: Settings) -> dict[str, torch.Tensor]:
    """Sums over the pairs of a batch of the loss, and of what tells how the training goes.

    With h = log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected):
    sigmoid  -log sigmoid(beta h) (Rafailov et al. 2023, equation 7), smoothed as in Mitchell 2023, equation 3
    ipo      (h - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, equation 17), each logarithm divided by its
             story's tokens, as its authors computed it
    simpo    -log sigmoid(beta h - gamma), each logarithm divided so too, and without p_ref (Meng et al. 2024,
             arXiv:2405.14734, equation 6)
    """
    tokens, targets = (batch[name].flatten(0, 1) for name in ("tokens", "targets"))  # (2P, T)
    log_p = -model(tokens, targets, rows=True).view(-1, 2)  # (P, 2)
    lengths = (batch["targets"] != IGNORE).sum(dim=-1)  # (P, 2)
    gained = log_p - batch["reference"]  # (P, 2)
    per_token = log_p / lengths.clamp(min=1)  # (P, 2)
    compared = {"sigmoid": gained, "ipo": gained / lengths.clamp(min=1), "simpo": per_token}[s.loss]  # (P, 2)
    h = compared[:, 0] - compared[:, 1]  # (P,)
    margin = s.beta * h  # (P,)
    if s.loss == "ipo":
        losses = (h - 1 / (2 * s.beta)) ** 2
    else:
        x = margin - s.simpo_gamma if s.loss == "simpo" else margin
        losses = -(1 - s.label_smoothing) * F.logsigmoid(x) - s.label_smoothing * F.logsigmoid(-x)
    figures = {"loss": losses - s.nll_weight * per_token[:, 0], "accuracy": (h > 0).float(), "margin": margin}
    figures |= {"chosen_log_p": log_p[:, 0], "rejected_log_p": log_p[:, 1]}
    figures |= {"kl": gained.square().mean(dim=1) / 2}  # from the reference (Schulman 2020, k2)
    real = lengths[:, 0] > 0  # a last batch of validation is filled up
    return {name: (values * real).sum() for name, values in figures.items()}


# ---------------------------------------------------------------------------------------------------
# A round


def tune(s: Settings) -> None:
    """Make the pairs unless they are there, note what the reference thinks of them, and call the loop."""
    out_dir, folder, source = Path(s.out_dir), Path(s.data_dir), Path(s.init_from)
    checkpoint = read_checkpoint(source)
    tokenizer, template = load_tokenizer(checkpoint["tokenizer"], source), checkpoint.get("template")
    if not template:
        raise UserError(f"{source}: has not learned to follow instructions; give a checkpoint of sft.py")
    model = build_model(checkpoint, source)
    if s.block_size > model.config.block_size:
        raise UserError(f"block_size = {s.block_size}: {source} reads at most {model.config.block_size} tokens")
    out_dir.mkdir(parents=True, exist_ok=True)
    pairs = out_dir / "pairs.jsonl"
    if not s.pairs and not pairs.exists():
        if "RANK" in os.environ:
            raise UserError(f"{pairs}: not there; make the pairs first, in one process, with --make_pairs=True")
        meta, prepared_with = read_meta(folder)
        if meta.get("template") != template or prepared_with != checkpoint["tokenizer"]:
            raise UserError(f"{folder}: not instructions prepared for {source}; run prepare.py --task sft again")
        _, (answer,) = markers(template, tokenizer)
        block = model.config.block_size
        examples = ExampleFile(folder / "train.bin", dataclasses.replace(s, block_size=block), meta, answer, block)
        write_pairs(pairs, build_model(checkpoint, source), tokenizer, examples, s)
    if s.make_pairs:
        return
    files = find_inputs([s.pairs]) if s.pairs else [pairs]
    train_data, val_data = read_pairs(files, template, tokenizer, s)
    if s.epochs:
        s.max_iters = math.ceil(s.epochs * len(train_data) / (s.batch_size * s.gradient_accumulation_steps))
    # The reference is asked once, before anything is learned: no second model stays in memory.
    known = hashlib.sha256(repr((s.block_size, s.dtype)).encode())
    for part in (*(file.read_bytes() for file in files), *(w.numpy() for w in checkpoint["model"].values())):
        known.update(part)
    for split, data in (("train", train_data), ("val", val_data)):
        path = out_dir / f"reference_{split}_{known.hexdigest()[:16]}.npy"
        if len(data) and not path.exists():
            found = reference_log_probs(model, data, s)
            with replacing(path) as f:
                np.save(f, found)
        if len(data):
            data.reference = np.load(path, mmap_mode="r")
    parts = {"tokenizer": checkpoint["tokenizer"], "template": template, "preferences": known.hexdigest()}
    if s.resume and (newest := newest_checkpoint(out_dir)):
        source, checkpoint = newest
        model = build_model(checkpoint, source)
    if s.lora_rank:
        add_lora(model, s.lora_rank, s.lora_alpha)
        parts["lora"] = {"rank": s.lora_rank, "alpha": s.lora_alpha}
    ready = val_data.pairs or train_data.pairs
    prompt = ready[0][0] if ready else None
    train(s, model, train_data, val_data, parts, functools.partial(preference_loss, s=s), prompt)


def main() -> None:
    s = load_settings(sys.argv[1:], Settings, __doc__)
    with processes(s):
        init_from, seed = s.init_from, s.seed
        for number in range(1, s.rounds + 1):
            last = number == s.rounds  # leaves its checkpoints in out_dir itself, those before in folders of it
            out_dir = s.out_dir if last else f"{s.out_dir}/round_{number}"
            tune(dataclasses.replace(s, out_dir=out_dir, init_from=init_from, seed=seed + 1000 * (number - 1)))
            init_from = out_dir
            if s.make_pairs:
                break


if __name__ == "__main__":
    run(main)
