"""What prepare.py wrote, read back: checked against its checksums, and cut into the rows of a batch."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from errors import UserError
from model import IGNORE
from prepare import checksum
from tokenizer import load_tokenizer


class TokenFile:
    """A .bin file cut into sequences, walked in a new seeded order each epoch, without replacement.

    The n-th sequence of a run depends on n and the seed alone: a run that resumes at step s goes on with
    exactly the sequences it would have had, and every sequence comes once before any comes again.
    """

    def __init__(self, path: Path, meta: dict, block_size: int, seed: int, end_token: int | None = None):
        size, seen, vocab_size = path.stat().st_size, hashlib.sha256(), meta["vocab_size"]
        if size % 2 or not size:
            raise UserError(f"{path}: {size:,} bytes are no token ids of two bytes each; run prepare.py again")
        self.tokens = np.memmap(path, dtype="<u2", mode="r")
        for start in range(0, len(self.tokens), 1 << 24):
            part = self.tokens[start : start + (1 << 24)]
            seen.update(part.data)
            if (largest := part.max()) >= vocab_size:
                raise UserError(f"{path}: holds token {largest}, but the vocabulary ends at {vocab_size - 1}")
        if seen.hexdigest() != meta[path.stem]["sha256"]:
            raise UserError(f"{path}: damaged: not what prepare.py wrote (its checksum differs); run it again")
        self.path, self.block_size, self.seed, self.end_token, self.epoch = path, block_size, seed, end_token, -1

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.block_size

    def count(self, batch: dict) -> int:
        """How many targets a batch has to learn from: its summed loss is averaged over so many."""
        return int((batch["targets"] != IGNORE).sum())

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Sequences number first to first + count - 1 of the run, as arguments of GPT.forward."""
        chosen = []
        for n in range(first, first + count):
            epoch, index = divmod(n, len(self))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self))
            chosen.append(self.order[index])
        return self.rows(chosen)

    def rows(self, chosen: list[int]) -> dict[str, torch.Tensor]:
        """The sequences of these numbers in the file: tokens and targets, (count, T) each."""
        starts = [i * self.block_size for i in chosen]
        rows = np.stack([self.tokens[start : start + self.block_size + 1] for start in starts])
        tokens = torch.from_numpy(rows.astype(np.int64))  # (count, T + 1)
        # Contiguous, or pinning them would gain nothing.
        batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
        if self.end_token is not None:  # the end of a story begins the next, as it does in sampling
            batch["documents"] = (batch["tokens"] == self.end_token).cumsum(dim=1)  # (count, T)
        return batch


def read_meta(folder: Path) -> tuple[dict, bytes]:
    """What meta.json of a prepared folder holds, and the bytes of the tokenizer. Raises UserError."""
    if not (folder / "meta.json").exists():
        raise UserError(f"{folder}: no prepared data here (meta.json is missing); run prepare.py --out_dir {folder}")
    try:
        with open(folder / "meta.json", "rb") as f:
            meta = json.loads(f.read(1 << 20))  # it has some hundred bytes
        if meta.pop("checksum") != checksum(meta):
            raise ValueError("its checksum differs")
        meta["train"]["sha256"], meta["val"]["sha256"], meta["tokenizer_sha256"]  # are there
        if type(meta["vocab_size"]) is not int or type(meta["end_token"]) is not int:
            raise TypeError("no number")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{folder / 'meta.json'}: damaged ({e!r}); run prepare.py again") from None
    path = folder / "tokenizer.model"
    model = path.read_bytes()
    same = hashlib.sha256(model).hexdigest() == meta["tokenizer_sha256"]
    if not same or load_tokenizer(model, path).vocab_size() != meta["vocab_size"]:
        raise UserError(f"{path}: not the tokenizer these token files were made with")
    return meta, model
