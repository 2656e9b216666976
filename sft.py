"""Instruction tuning: teach a pretrained model to write the story it is asked for.

    python prepare.py --task sft --tokenizer data/demo/tokenizer.model
    python sft.py config/demo_sft.py                                          from the pretrained out/demo
    python sft.py config/demo_sft.py --out_dir=out/trial --lora_rank=8        only adapters
    python sft.py config/demo_sft.py --out_dir=out/trial --merge=True         merge them

The loop is `train.train`. New here: LoRA, and the data. Several examples are packed into a sequence, none of
which attends to another, and only the tokens of the responses count in the loss.
"""

import bisect
import collections
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.utils.parametrize as parametrize

from common import run
from common.checkpoint import build_model, find_checkpoints, read_checkpoint
from common.files import UserError, atomic_write, load_tokenizer, locked, report_errors
from common.settings import load_settings, setting
from model import GPT, IGNORE
from stories.constraints import template_tokens
from train import LoopSettings, ShuffledDataset, open_tokens, read_meta, train


@dataclass
class Settings(LoopSettings):
    """The loop's settings, where the weights come from, and what is trained."""

    init_from: str = setting("out/demo", path=True)  # the pretrained checkpoint, or the folder of its run
    lora_rank: int = setting(0, fixed=True)  # 0: train every weight; else only adapters of this rank
    lora_alpha: float = setting(16.0, fixed=True)  # adapters are scaled by alpha / rank
    merge: bool = False  # only write out_dir/merged.pt, the adapters merged


# ---- The run ---------------------------------------------------------------------------------------


def tune(s: Settings) -> None:
    """Load the model and the examples, and train. Raises UserError."""
    folder = Path(s.data_dir)
    source = Path(s.init_from)
    checkpoints = find_checkpoints(Path(s.out_dir))
    if checkpoints:  # a run that is resumed does not need init_from
        source = checkpoints[0]
    checkpoint = read_checkpoint(source)
    model = build_model(checkpoint, source)

    meta, template, response_token = open_examples(folder, source, checkpoint)
    longest = model.config.block_size
    train_data = PackedSFTDataset(folder / "train.bin", meta, response_token, s.block_size, longest, s.seed)
    val_data = PackedSFTDataset(folder / "val.bin", meta, response_token, s.block_size, longest)
    if run.rank() == 0:
        print(train_data.describe())
        print(val_data.describe())

    metadata = {"tokenizer": checkpoint["tokenizer"], "template": template, "data": meta["train"]}
    if s.lora_rank > 0:
        add_lora(model, s.lora_rank, s.lora_alpha)
        metadata["lora"] = {"rank": s.lora_rank, "alpha": s.lora_alpha}
    first = val_data.packed.min()  # of the examples that fit; it begins the sample stories
    instruction, _ = val_data.example(first)
    train(s, model, train_data, val_data, metadata, prompt=instruction.tolist())


def open_examples(folder: Path, source: Path, checkpoint: dict) -> tuple[dict, str, int]:
    """meta.json of prepared instructions, their template, and its token before a response.

    Raises UserError if the folder was not prepared for the model of `checkpoint`, read from `source`.
    """
    meta, tokenizer = read_meta(folder)
    template = meta.get("template")
    if not isinstance(template, str):
        found = "holds stories, not instructions"
        raise UserError(f"{folder}: {found}; run prepare.py --task sft --out_dir {folder}")
    if tokenizer != checkpoint["tokenizer"]:
        found = f"prepared with another tokenizer than {source}'s"
        raise UserError(f"{folder}: {found}; prepare it again with that one")
    _, after_instruction = template_tokens(template, load_tokenizer(tokenizer, folder))
    return meta, template, after_instruction[0]


# ---- Data ------------------------------------------------------------------------------------------


class PackedSFTDataset(ShuffledDataset):
    """A .bin file of instructions and responses, packed into sequences of block_size tokens.

    Two examples in one sequence (E: end token; U, A: control tokens of the template; a to f: text):

        tokens      E U a b A c d  E U e A f  E E     (each begins with an end token, as in sampling)
        targets     - - - - c d E  - - - f E  - -     (-: IGNORE)
        documents   7 7 7 7 7 7 7  2 2 2 2 2 -1 -1    (the index of the example: attention stays inside)
        positions   0 1 2 3 4 5 6  0 1 2 3 4  0 0

    The prompt is no target: the user writes it. The model is trained on responses only.
    """

    def __init__(
        self, path: Path, meta: dict, response_token: int, block_size: int, max_length: int, seed: int = 0
    ):
        """max_length: the most tokens of an example that the model can read. Raises UserError."""
        self.tokens = open_tokens(path, meta)
        self.end_token = meta["end_token"]
        self.example_ends = np.flatnonzero(self.tokens == self.end_token) + 1
        self.example_starts = np.append(0, self.example_ends[:-1])
        self.response_starts = np.flatnonzero(self.tokens == response_token) + 1
        if not len(self.response_starts) == len(self.example_ends) > 0:
            found = "not instructions and responses in turn"
            raise UserError(f"{path}: {found}; run prepare.py --task sft again")
        lengths = self.example_ends - self.example_starts
        self.max_length = min(block_size, max_length)
        fitting = np.flatnonzero(lengths <= self.max_length)
        if len(fitting) == 0:
            raise UserError(f"{path}: no example fits into {self.max_length} tokens")
        self.left_out = len(lengths) - len(fitting)
        order, self.sequence_starts = pack(lengths[fitting], block_size)
        self.packed = fitting[order]  # the indices of the examples, sequence after sequence
        n_sequences = len(self.sequence_starts) - 1
        self.efficiency = lengths[fitting].sum() / (n_sequences * block_size)
        super().__init__(path, n_sequences, seed, block_size)

    def describe(self) -> str:
        examples = f"{len(self.example_ends):,} examples"
        left_out = f"{self.left_out:,} left out (longer than {self.max_length} tokens)"
        return f"{self.path}: {examples}, {left_out}, packing efficiency {self.efficiency:.1%}"

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The instruction with all control tokens, and the response with its end token."""
        before_response = self.tokens[self.example_starts[i] : self.response_starts[i]]
        response = self.tokens[self.response_starts[i] : self.example_ends[i]]
        instruction = np.append(self.end_token, before_response)
        return instruction.astype(np.int64), response.astype(np.int64)

    def sequences(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """tokens, targets, documents and positions, (B, T) each."""
        shape = (len(indices), self.tokens_per_sequence)
        tokens = np.full(shape, self.end_token)
        targets = np.full(shape, IGNORE)
        documents = np.full(shape, -1)
        positions = np.zeros(shape, dtype=np.int64)
        for b, index in enumerate(indices):
            start = 0
            for i in self.packed[self.sequence_starts[index] : self.sequence_starts[index + 1]]:
                instruction, response = self.example(i)
                end = start + len(instruction) + len(response) - 1
                tokens[b, start:end] = np.append(instruction, response[:-1])
                targets[b, end - len(response) : end] = response
                documents[b, start:end] = i
                positions[b, start:end] = np.arange(end - start)
                start = end
        return {
            "tokens": torch.from_numpy(tokens),
            "targets": torch.from_numpy(targets),
            "documents": torch.from_numpy(documents),
            "positions": torch.from_numpy(positions),
        }


def pack(lengths: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit packing: each example, longest first, goes into the fullest sequence that has space for it.

    Returns the indices of the examples, sequence after sequence, and where each sequence begins, and the end.
    """
    sequence_of = np.zeros(len(lengths), dtype=np.int64)  # for each example
    n_sequences = 0
    sequences_with = collections.defaultdict[int, list[int]](list)  # free space -> the sequences that have it
    spaces: list[int] = []  # the keys of sequences_with that some sequence has, sorted
    longest_first = np.argsort(-lengths, kind="stable")
    for i in longest_first:
        length = int(lengths[i])
        smallest = bisect.bisect_left(spaces, length)  # where the smallest space that suffices is
        if smallest < len(spaces):
            space = spaces[smallest]
            sequence = sequences_with[space].pop()
            if not sequences_with[space]:
                del spaces[smallest]
        else:
            space = block_size
            sequence = n_sequences
            n_sequences += 1
        sequence_of[i] = sequence
        left = space - length
        if not sequences_with[left]:
            bisect.insort(spaces, left)
        sequences_with[left].append(sequence)
    order = np.argsort(sequence_of, kind="stable")
    starts = np.searchsorted(sequence_of[order], np.arange(n_sequences + 1))
    return order, starts


# ---- LoRA ------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A frozen matrix W becomes W + (alpha / rank) B A, of which only A and B are trained.

    LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3). B starts at zero, so the model starts unchanged.
    """

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float):
        super().__init__()
        self.scale = alpha / rank
        start = torch.randn(rank, weight.size(1)) / math.sqrt(rank)  # (rank, in), the same on every device
        self.A = nn.Parameter(start.to(weight))
        self.B = nn.Parameter(weight.new_zeros(weight.size(0), rank))

    def forward(self, weight):
        return weight + self.scale * (self.B @ self.A)  # (out, in)


def add_lora(model: GPT, rank: int, alpha: float) -> None:
    """Freeze the model and give each matrix of attention and SwiGLU an adapter."""
    model.requires_grad_(False)
    for module in list(model.blocks.modules()):
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, alpha))


# ---- The command -----------------------------------------------------------------------------------


def merge(out_dir: Path) -> None:
    """Write out_dir/merged.pt: the newest checkpoint, its adapters merged. Raises UserError."""
    checkpoint = read_checkpoint(out_dir)
    merged = {"model": build_model(checkpoint, out_dir).state_dict()}
    for name in ("model_config", "tokenizer", "template", "prompt", "settings", "step"):
        if name in checkpoint:
            merged[name] = checkpoint[name]
    with atomic_write(out_dir / "merged.pt") as f:
        torch.save(merged, f)
    print(f"wrote {out_dir / 'merged.pt'}")


def main() -> None:
    s = load_settings(sys.argv[1:], Settings, __doc__)
    if s.merge:
        out_dir = Path(s.out_dir)
        with locked(out_dir / "lock", out_dir):
            merge(out_dir)
        return
    with run.training(s):
        tune(s)


if __name__ == "__main__":
    report_errors(main)
