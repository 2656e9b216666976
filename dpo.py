"""Preference tuning: of two stories for one instruction, make the better one likelier.

    python dpo.py config/demo_dpo.py                         pairs made by the model itself, then the training
    python dpo.py config/demo_dpo.py --make_pairs=True       the pairs alone, into out_dir/pairs.jsonl
    python dpo.py config/demo_dpo.py --pairs=mine.jsonl      pairs of your own
    python dpo.py config/demo_dpo.py --rounds=2              once more, with pairs the better model makes

The loop is `train.train`. New here: a loss that compares (Rafailov et al. 2023, arXiv:2305.18290). Where
pairs come from stands in pairs.py.
"""

import dataclasses
import functools
import hashlib
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
from dataset import read_meta
from device import choose_device, processes
from disk import replacing
from errors import UserError, run
from instructions import markers
from lora import add_lora
from model import GPT, IGNORE
from pairs import PairFile, read_pairs, write_pairs
from sft import ExampleFile
from stories.read import find_inputs
from tokenizer import load_tokenizer
from train import train


@dataclass
class Settings(LoopSettings):
    """What the loop is told, where pairs come from, and how they are compared."""

    init_from: str = "out/demo_sft"  # the checkpoint to start from, which is the reference as well
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
# The loss


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


def tune(s: Settings) -> bool:
    """Make the pairs unless they are there, note what the reference thinks of them, and call the loop.

    Returns whether another round may follow. Raises UserError.
    """
    out_dir, folder, source = Path(s.out_dir), Path(s.data_dir), Path(s.init_from)
    rank = int(os.environ.get("RANK", 0))
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
        device, dtype = choose_device(s.device, s.dtype)
        teller = build_model(checkpoint, source).to(device, dtype).eval()  # `model` itself stays in float32
        write_pairs(
            pairs, teller, tokenizer, examples, s.instructions, s.samples, s.temperature, s.reference_chosen, s.seed
        )
        del teller
    elif not s.pairs and rank == 0:
        print(f"{pairs}: there already, and used as it is; remove it to have pairs made anew")
    if s.make_pairs:
        return False
    files = find_inputs([s.pairs]) if s.pairs else [pairs]
    train_data, val_data = read_pairs(files, template, tokenizer, s)
    # The reference is asked once, before anything is learned: no second model stays in memory.
    known = hashlib.sha256(repr((s.block_size, s.dtype)).encode())
    for part in (*(file.read_bytes() for file in files), *(w.numpy() for w in checkpoint["model"].values())):
        known.update(part)
    for split, data in (("train", train_data), ("val", val_data)):
        path = out_dir / f"reference_{split}_{known.hexdigest()[:16]}.npy"
        if len(data) and path.exists():
            data.reference = np.load(path, mmap_mode="r")
        elif len(data):
            data.reference = reference_log_probs(model, data, s)
            if rank == 0:
                with replacing(path) as f:
                    np.save(f, data.reference)
    parts = {"tokenizer": checkpoint["tokenizer"], "template": template, "preferences": known.hexdigest()}
    if s.resume and (newest := newest_checkpoint(out_dir)):
        source, checkpoint = newest
        model = build_model(checkpoint, source)
    if s.lora_rank:
        add_lora(model, s.lora_rank, s.lora_alpha)
        parts["lora"] = {"rank": s.lora_rank, "alpha": s.lora_alpha}
    ready = val_data.pairs or train_data.pairs
    prompt = ready[0][0] if ready else None
    return train(s, model, train_data, val_data, parts, functools.partial(preference_loss, s=s), prompt)


def main() -> None:
    s = load_settings(sys.argv[1:], Settings, __doc__)
    with processes(s):
        init_from, seed = s.init_from, s.seed
        for number in range(1, s.rounds + 1):
            last = number == s.rounds  # leaves its checkpoints in out_dir itself, those before in folders of it
            out_dir = s.out_dir if last else f"{s.out_dir}/round_{number}"
            if not tune(dataclasses.replace(s, out_dir=out_dir, init_from=init_from, seed=seed + 1000 * (number - 1))):
                break
            init_from = out_dir


if __name__ == "__main__":
    run(main)
