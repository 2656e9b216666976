"""Preference tuning: of two stories for one instruction, raise the probability of the better one.

    python -m tools.dpo config/demo_dpo.py                      pairs of the model's own stories, then the training
    python -m tools.dpo config/demo_dpo.py --make_pairs=True    only the pairs, into out_dir/pairs.jsonl
    python -m tools.dpo config/demo_dpo.py --pairs=mine.jsonl   pairs of your own

The loop is `train.train`. New here: the pairs, which the model samples itself or a file holds, and the loss. That is
the sum of two, and both are optimised:

    -log sigmoid(beta h)    DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7), where
                            h = log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)
    nll_weight times        the chosen story's own loss per token. DPO alone lowers the probability of both stories,
                            of the rejected one more. The configs have nll_weight = 1.
"""

import collections
import copy
import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.checkpoint import build_model, choose_device, find_checkpoints, read_checkpoint
from common.files import UserError, atomic_write, load_tokenizer, report_errors
from common.settings import load_settings, setting
from model import GPT, IGNORE
from sample import BATCH, sample_and_score
from sft import PackedSFTDataset, add_lora, open_examples
from stories import records
from stories.constraints import read_constraints, template_tokens
from stories.read import LeftOut, find_inputs, read_blocks, records_of
from stories.rewards import average, reward, score
from train import RANK, WORLD_SIZE, LoopSettings, ShuffledDataset, process_group, settle_dtype, train


@dataclass
class Settings(LoopSettings):
    """The loop's settings, where pairs come from, and the loss."""

    init_from: str = setting("out/demo_sft", path=True)  # the checkpoint to start from; it is also the reference
    # The pairs: from a file, or the model's own stories for instructions of data_dir, scored by stories/rewards.py
    pairs: str = setting("", path=True)  # a .jsonl or .json file of prompt, chosen and rejected; empty: make them
    make_pairs: bool = False  # make the pairs and stop
    instructions: int = setting(400, at_least=1)
    samples: int = setting(4, at_least=1)  # stories for each instruction; the best and the worst are a pair
    temperature: float = setting(1.0, at_least=1e-6)
    reference_chosen: bool = True  # the story of data_dir may be chosen too, if it is better than all samples
    # The loss
    beta: float = setting(0.1, at_least=1e-6, fixed=True)  # smaller: the model may move further from the reference
    nll_weight: float = setting(0.0, fixed=True)  # adds the chosen story's own loss, so that its probability stays
    lora_rank: int = setting(0, fixed=True)  # 0: train every weight; else only adapters of this rank
    lora_alpha: float = setting(16.0, fixed=True)  # adapters are scaled by alpha / rank


# ---- Making pairs ----------------------------------------------------------------------------------


def rank_samples(tokenizer, instruction: list[int], response: list[int], samples: list[tuple], s: Settings):
    """The best and the worst of the sampled stories of one instruction, as a record; None if they are equally good.

    instruction and response are tokens of a reference example; samples are (story, scores).
    """
    story = tokenizer.decode(response)
    reference = score(read_constraints(tokenizer.decode(instruction)), story) | {"finished": 1.0}
    # The reference comes last: of equals a sample of the model is chosen.
    candidates = samples + [(story, reference)] * s.reference_chosen
    candidates = [candidate for candidate in candidates if "\ufffd" not in candidate[0]]  # tokens that spell no text
    ranked = sorted(candidates, key=lambda candidate: -reward(candidate[1], reference))
    if not ranked or reward(ranked[0][1], reference) == reward(ranked[-1][1], reference):
        return None
    (chosen, high), (rejected, low) = ranked[0], ranked[-1]
    record = {"prompt": tokenizer.decode(instruction), "chosen": chosen, "rejected": rejected}
    return record | {"chosen_scores": high, "rejected_scores": low}


def digest(parts: Iterable) -> str:
    """The SHA-256 of bytes or arrays, one after the other."""
    return hashlib.sha256(b"".join(map(bytes, parts))).hexdigest()


def make_pairs(path: Path, model: GPT, tokenizer, data: PackedSFTDataset, reference: str, s: Settings) -> None:
    """Sample stories for instructions of `data` and write the best and the worst of each to `path`, as JSON lines.

    Interrupted and called again with the same settings and model, of which `reference` is the digest, it continues
    where it stopped.
    """
    order = np.random.default_rng(s.seed).permutation(sorted(data.packed))[: s.instructions]
    per_batch = max(1, BATCH // s.samples)
    batches = [order[i : i + per_batch] for i in range(0, len(order), per_batch)]
    made_with = repr((reference, str(data.path), s.samples, s.temperature, s.reference_chosen, s.seed))
    part = path.with_name(f"{path.name}.{digest([made_with.encode()])[:8]}.part")  # a line: the pairs of a batch
    lines = part.read_bytes().split(b"\n")[:-1] if part.exists() else []  # without one that was cut off
    pairs, scores = [pair for line in lines for pair in json.loads(line)], []
    with open(part, "ab") as f:
        f.truncate(sum(len(line) + 1 for line in lines))
        for number in tqdm(range(len(lines), len(batches)), desc="sampling pairs", unit="batch", disable=None):
            examples = [tuple(map(np.ndarray.tolist, data.example(i))) for i in batches[number]]
            prompts = [instruction for instruction, _ in examples for _ in range(s.samples)]
            most = model.config.block_size - max(map(len, prompts))
            options = {"temperature": s.temperature, "seed": s.seed + number, "max_new_tokens": most}
            stories = sample_and_score(model, tokenizer, prompts, **options)
            scores += [story_scores for _, story_scores in stories]
            of_each = (stories[i : i + s.samples] for i in range(0, len(stories), s.samples))
            ranked = (rank_samples(tokenizer, asked, told, next(of_each), s) for asked, told in examples)
            found = [record for record in ranked if record]
            f.write(json.dumps(found, ensure_ascii=False).encode() + b"\n")
            f.flush()
            pairs += found
    with atomic_write(path) as f:
        f.writelines(json.dumps(pair, ensure_ascii=False).encode() + b"\n" for pair in pairs)
    part.unlink()
    means = ", ".join(f"{name} {value:.3g}" for name, value in average(scores).items())
    print(f"{path}: {len(pairs):,} pairs of {len(order):,} instructions; mean scores of the samples: {means}")


# ---- Reading pairs ---------------------------------------------------------------------------------


def pair_of(record, where: str) -> tuple[str, tuple[str, bool], tuple[str, bool]]:
    """(prompt, (chosen, whether it ended), (rejected, whether it ended)) of a record. Raises UserError and LeftOut.

    The prompt and both responses are texts or conversations, as TRL, minimind, UltraFeedback and LLaMA-Factory write
    them.
    """
    if isinstance(record, LeftOut):
        raise record
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        found = f"; the keys here are {records.keys_of(record)}" if isinstance(record, dict) else ""
        raise UserError(f"{where}: expected an object with prompt, chosen and rejected{found}")
    prompt, chosen = records.prompt_and_response(record, "chosen", where)
    other, rejected = records.prompt_and_response(record, "rejected", where)
    prompt, other, chosen, rejected = records.clean_texts((prompt, other, chosen, rejected))
    if prompt != other:
        raise UserError(f"{where}: chosen and rejected answer different prompts")
    if chosen == rejected:
        raise LeftOut("chosen and rejected are the same")
    scores = [record.get(f"{key}_scores") for key in ("chosen", "rejected")]  # written by make_pairs
    ended = [not isinstance(found, dict) or found.get("finished") != 0 for found in scores]
    return prompt, (chosen, ended[0]), (rejected, ended[1])


class PreferenceDataset(ShuffledDataset):
    """Pairs of a chosen and a rejected story: (prompt, chosen, rejected), tokens each. A pair is two sequences."""

    def __init__(self, path: Path, pairs: list[tuple], block_size: int, end_token: int, seed: int):
        super().__init__(path, len(pairs), seed, 2 * block_size)
        self.pairs, self.block_size, self.end_token = pairs, block_size, end_token
        self.reference = np.zeros((len(pairs), 2), dtype=np.float32)  # the reference's log-probabilities

    def loss_denominator(self, batch: dict) -> float:
        """The number of pairs: the loss is a mean over pairs, not over tokens."""
        return float((batch["targets"][:, 0] != IGNORE).any(dim=-1).sum())

    def sequences(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """tokens and targets, (P, 2, T), and the reference's log-probabilities, (P, 2)."""
        shape = (len(indices), 2, self.block_size)
        tokens, targets = np.full(shape, self.end_token), np.full(shape, IGNORE)
        for p, index in enumerate(indices):
            prompt, *responses = self.pairs[index]
            for side, response in enumerate(responses):
                both = np.array([*prompt, *response], dtype=np.int64)
                tokens[p, side, : len(both) - 1] = both[:-1]
                targets[p, side, len(prompt) - 1 : len(both) - 1] = response
        batch = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        return batch | {"reference": torch.from_numpy(self.reference[indices])}


def read_pairs(files: list[Path], template: str, tokenizer, s: Settings) -> tuple[PreferenceDataset, PreferenceDataset]:
    """The pairs to train on and, of a twentieth of the prompts, those to validate with. Raises UserError."""
    end, (before, after) = tokenizer.eos_id(), template_tokens(template, tokenizer)
    pairs, left_out = [], collections.Counter[str]()
    for block in read_blocks(files, "reading pairs"):
        for where, record in records_of(block):
            try:
                pairs.append(pair_of(record, where))
            except LeftOut as reason:
                left_out[str(reason)] += 1
    mostly_left_out = left_out.total() > len(pairs)
    digests = {prompt: records.text_digest(prompt) for prompt, *_ in pairs}
    held_out = set(sorted(digests.values())[: max(1, len(digests) // 20)])
    splits: dict[str, list[tuple]] = {"train": [], "val": []}
    for prompt, *stories in pairs:
        instruction = [end, *before, *tokenizer.encode(prompt), *after]
        responses = [tokenizer.encode(story) + [end] * ended for story, ended in stories]
        if len(instruction) + max(map(len, responses)) - 1 > s.block_size:
            left_out[f"longer than block_size = {s.block_size}"] += 1
        else:
            splits["val" if digests[prompt] in held_out else "train"].append((instruction, *responses))
    summary = f"{files[0]}: {len(splits['train']):,} train, {len(splits['val']):,} val pairs"
    summary += "".join(f", {n:,} left out ({reason})" for reason, n in left_out.items())
    if not splits["train"] or not splits["val"] or mostly_left_out:
        raise UserError(f"{summary}; training needs pairs of two prompts or more, and most must be usable")
    if RANK == 0:
        print(summary)
    train_data = PreferenceDataset(files[0], splits["train"], s.block_size, end, s.seed)
    return train_data, PreferenceDataset(files[0], splits["val"], s.block_size, end, 0)  # the same for every seed


# ---- The loss --------------------------------------------------------------------------------------


def log_probs(model, batch: dict) -> torch.Tensor:
    """The log-probabilities of the chosen and the rejected stories of a batch, (P, 2)."""
    tokens, targets = (batch[name].flatten(0, 1) for name in ("tokens", "targets"))  # (2P, T)
    logits = model(tokens).flatten(0, 1).float()  # (2P * T, V)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")  # (2P * T,)
    return -losses.view_as(tokens).sum(dim=1).view(-1, 2)  # (P, 2)


def preference_loss(model, batch: dict, s: Settings) -> dict[str, torch.Tensor]:
    """The loss and other metrics, each summed over the pairs of a batch."""
    log_p = log_probs(model, batch)  # (P, 2)
    gain = log_p - batch["reference"]  # (P, 2)
    margin = s.beta * (gain[:, 0] - gain[:, 1])  # (P,)
    lengths = (batch["targets"][:, 0] != IGNORE).sum(dim=-1)  # (P,), tokens of the chosen stories
    losses = -F.logsigmoid(margin) - s.nll_weight * log_p[:, 0] / lengths.clamp(min=1)  # (P,)
    metrics = {"loss": losses, "accuracy": (margin > 0).float(), "margin": margin}
    metrics |= {"chosen_log_p": log_p[:, 0], "rejected_log_p": log_p[:, 1]}
    metrics |= {"kl": gain.square().mean(dim=1) / 2}  # from the reference (Schulman 2020, estimator k2)
    real = lengths > 0  # the last batch of validation may be padded
    return {name: (values * real).sum() for name, values in metrics.items()}


@torch.no_grad()
def add_reference(data: PreferenceDataset, model: GPT, device: torch.device, dtype: torch.dtype, s: Settings) -> None:
    """Fill data.reference, with the model before it is trained."""
    model.to(device)
    for first in tqdm(range(0, len(data), s.batch_size), desc="reference", unit="batch", disable=None):
        here = range(first, min(first + s.batch_size, len(data)))
        batch = {name: tensor.to(device) for name, tensor in data.sequences(list(here)).items()}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            data.reference[here] = log_probs(model, batch).cpu().numpy()


# ---- The run ---------------------------------------------------------------------------------------


def tune(s: Settings) -> None:
    """Get pairs, compute the reference's log-probabilities once, and train. Raises UserError."""
    out_dir, source, folder = Path(s.out_dir), Path(s.init_from), Path(s.data_dir)
    checkpoint = read_checkpoint(source)
    tokenizer, template = load_tokenizer(checkpoint["tokenizer"], source), checkpoint.get("template")
    if not template:
        raise UserError(f"{source}: has not learned to follow instructions; give a checkpoint of sft.py")
    model = build_model(checkpoint, source)
    block_size = model.config.block_size
    if s.block_size > block_size:
        raise UserError(f"block_size = {s.block_size}: {source} reads at most {block_size} tokens")
    device = choose_device(s.device)
    checkpoints = find_checkpoints(out_dir)
    dtype = settle_dtype(s, device, read_checkpoint(checkpoints[0]) if checkpoints else {})
    reference = digest(weight.numpy() for weight in model.state_dict().values())

    # The pairs: the user's, those of an earlier run in out_dir, or new ones
    if s.pairs and s.make_pairs:
        raise UserError(f"make_pairs = True: pairs = {s.pairs!r} are there already; leave one of them out")
    path = out_dir / "pairs.jsonl"
    if path.exists() and not s.pairs and RANK == 0:
        print(f"{path}: exists and is used as it is; remove it to make new pairs")
    elif not path.exists() and not s.pairs:
        if WORLD_SIZE > 1:
            raise UserError(f"{path}: not there; make the pairs first, in one process, with --make_pairs=True")
        meta, _, response_token = open_examples(folder, source, checkpoint)
        examples = PackedSFTDataset(folder / "train.bin", meta, response_token, block_size, block_size)
        make_pairs(path, copy.deepcopy(model).to(device, dtype), tokenizer, examples, reference, s)
    if s.make_pairs:
        return

    files = find_inputs([Path(s.pairs)]) if s.pairs else [path]
    train_data, val_data = read_pairs(files, template, tokenizer, s)
    for data in (train_data, val_data):  # now, so that no second model stays in memory
        add_reference(data, model, device, dtype, s)
    metadata = {"tokenizer": checkpoint["tokenizer"], "template": template}
    metadata |= {"pairs": digest(file.read_bytes() for file in files), "reference": reference}
    if s.lora_rank:
        add_lora(model, s.lora_rank, s.lora_alpha)
        metadata["lora"] = {"rank": s.lora_rank, "alpha": s.lora_alpha}
    prompt, *_ = val_data.pairs[0]
    train(s, model, train_data, val_data, metadata, lambda model, batch: preference_loss(model, batch, s), prompt)


def main() -> None:
    s = load_settings(sys.argv[1:], Settings, __doc__)
    with process_group(s):
        tune(s)


if __name__ == "__main__":
    report_errors(main)
