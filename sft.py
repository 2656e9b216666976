"""Instruction tuning: teach a pretrained model to write the story it is asked for.

    python prepare.py --task sft --tokenizer data/demo/tokenizer.model
    python sft.py config/demo_sft.py
    python sft.py config/demo_sft.py --init_from=out/demo --out_dir=out/trial --lora_rank=8
    python sft.py config/demo_sft.py --out_dir=out/trial --merge=True

The loop is `train.train`. What is new here is the data: several examples packed into a row, none of which
sees another, and a loss on the tokens of the response alone.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from checkpoint import build_model, newest_checkpoint, read_checkpoint, save_checkpoint
from config import LoopSettings, load_settings
from dataset import TokenFile, read_meta
from device import processes
from errors import UserError, run
from instructions import markers
from lora import add_lora
from model import IGNORE
from tokenizer import load_tokenizer
from train import train


@dataclass
class Settings(LoopSettings):
    """What the loop is told, and what of the model is to learn. The shape is that of the checkpoint."""

    init_from: str = "out/demo"  # the pretrained checkpoint, or a run's folder for its newest
    lora_rank: int = 0  # 0: every weight learns; else only adapters of this rank do
    lora_alpha: float = 16.0  # adapters count alpha / rank times
    merge: bool = False  # train nothing: write out_dir/merged.pt, the newest checkpoint with its adapters merged


def pack(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Put examples into rows, each, the longest first, into the fullest row with room for it (best fit).

    Returns the examples' indices, row after row, and where in them each row begins (and the last ends).
    """
    row_of = np.zeros(len(lengths), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # the rows with so many free places
    rooms, rows = 0, 0  # bit n of rooms: there are rows with n free places
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the least that suffices
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row, rows = row_length, rows, rows + 1
        row_of[i] = row
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return np.argsort(row_of, kind="stable"), np.searchsorted(np.sort(row_of), np.arange(rows + 1))


class ExampleFile(TokenFile):
    """A .bin file of instructions and responses, packed into rows, in a new seeded order each epoch."""

    end_token: int  # there is always one here

    def __init__(self, path: Path, s: LoopSettings, meta: dict, answer: int, longest: int, seed: int = 0):
        super().__init__(path, meta, s.block_size, seed)
        self.end_token = meta["end_token"]
        self.ends = np.flatnonzero(self.tokens == self.end_token) + 1
        self.starts = np.append(0, self.ends[:-1])
        self.answers = np.flatnonzero(self.tokens == answer) + 1  # where the responses begin
        whole = len(self.answers) == len(self.ends) > 0 and self.ends[-1] == len(self.tokens)
        if not whole or not ((self.starts < self.answers) & (self.answers < self.ends)).all():
            raise UserError(f"{path}: not instructions and responses in turn; run prepare.py --task sft again")
        lengths = self.ends - self.starts
        fitting = np.flatnonzero(lengths <= min(s.block_size, longest))
        if not len(fitting):
            raise UserError(f"{path}: no example fits into {min(s.block_size, longest)} tokens")
        self.left_out = len(lengths) - len(fitting)
        order, self.row_starts = pack(lengths[fitting], s.block_size)
        self.order_in_rows = fitting[order]
        self.fill = lengths[fitting].sum() / (len(self) * s.block_size)

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The instruction's tokens, with all control tokens around them, and the response's with its end."""
        start, answer, end = self.starts[i], self.answers[i], self.ends[i]
        # An example follows the end of another, as a story does in pretraining and in sampling.
        instruction = np.append(self.end_token, self.tokens[start:answer]).astype(np.int64)
        return instruction, self.tokens[answer:end].astype(np.int64)

    def rows(self, chosen: list[int]) -> dict[str, torch.Tensor]:
        """tokens, targets, documents (which example a token belongs to) and positions in it, (count, T) each."""
        shape = (len(chosen), self.block_size)
        batch = {"tokens": np.full(shape, self.end_token), "targets": np.full(shape, IGNORE)}
        batch |= {"documents": np.full(shape, -1), "positions": np.zeros(shape, dtype=np.int64)}
        for row, number in enumerate(chosen):
            at = 0
            for i in self.order_in_rows[self.row_starts[number] : self.row_starts[number + 1]]:
                instruction, response = self.example(i)
                here = slice(at, at + len(instruction) + len(response) - 1)
                batch["tokens"][row, here] = np.append(instruction, response[:-1])
                batch["targets"][row, here.stop - len(response) : here.stop] = response
                batch["documents"][row, here] = i
                batch["positions"][row, here] = np.arange(here.stop - at)
                at = here.stop
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def tune(s: Settings) -> None:
    """Load the model and the examples, and call the loop; or only merge. Raises UserError."""
    out_dir, folder = Path(s.out_dir), Path(s.data_dir)
    if s.resume and (newest := newest_checkpoint(out_dir)):  # all that a resumed run needs: init_from may be gone
        source, checkpoint = newest
    else:
        source = out_dir if s.merge else Path(s.init_from)
        checkpoint = read_checkpoint(source)
    model = build_model(checkpoint, source)
    if s.merge:
        names = ("model_config", "tokenizer", "template", "settings", "step")
        kept = {name: checkpoint[name] for name in names if name in checkpoint}
        save_checkpoint(out_dir / "merged.pt", kept | {"model": model.state_dict()})
        print(f"wrote {out_dir / 'merged.pt'}")
        return

    meta, tokenizer = read_meta(folder)
    if not isinstance(template := meta.get("template"), str):
        raise UserError(f"{folder}: holds stories, not instructions; run prepare.py --task sft --out_dir {folder}")
    if tokenizer != checkpoint["tokenizer"]:
        raise UserError(f"{folder}: prepared with another tokenizer than {source}'s; prepare it again with that one")
    _, (answer,) = markers(template, load_tokenizer(tokenizer, folder))
    limit = min(s.block_size, model.config.block_size)
    train_data, val_data = (
        ExampleFile(folder / f"{split}.bin", s, meta, answer, model.config.block_size, seed)
        for split, seed in (("train", s.seed), ("val", 0))
    )
    for data in (train_data, val_data) if os.environ.get("RANK", "0") == "0" else ():
        print(
            f"{data.path}: {len(data.ends):,} examples, {data.left_out:,} of them left out (longer than {limit} "
            f"tokens); {data.fill:.1%} of the rows are real tokens"
        )
    parts = {"tokenizer": tokenizer, "template": template, "data": meta["train"]}
    if s.lora_rank:
        add_lora(model, s.lora_rank, s.lora_alpha)
        parts["lora"] = {"rank": s.lora_rank, "alpha": s.lora_alpha}
    prompt, _ = val_data.example(val_data.order_in_rows[0])
    train(s, model, train_data, val_data, parts, prompt=prompt.tolist())


def main() -> None:
    s = load_settings(sys.argv[1:], Settings, __doc__)
    with processes(s):
        tune(s)


if __name__ == "__main__":
    run(main)
