"""Instruction tuning: teach a pretrained model, or a new one, to write the story it is asked for.

    python prepare.py --task sft --tokenizer data/demo/tokenizer.model
    python sft.py config/demo_sft.py                                          from the pretrained out/demo
    python sft.py config/first.py                                             from a new model
    python sft.py config/demo_sft.py --out_dir=out/trial --lora_rank=8        only adapters
    python sft.py config/demo_sft.py --out_dir=out/trial --merge=True         merge them

The loop is `train.train`. New here: LoRA, and the data. Several examples are packed into a sequence, none of which
attends to another, and only the tokens of the responses count in the loss.
"""

import bisect
import collections
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.utils.parametrize as parametrize

from common.checkpoint import build_model, newest_checkpoint, read_checkpoint, save_checkpoint
from common.device import process_rank, processes
from common.settings import UserError, load_settings, run, setting
from common.tokenizer import load_tokenizer, template_tokens
from model import GPT, IGNORE
from stories.constraints import read_constraints, split_list
from train import LoopSettings, ShapeSettings, ShuffledDataset, new_model, open_tokens, read_meta, train


@dataclass
class Settings(ShapeSettings, LoopSettings):
    """The loop's settings, where the weights come from, and what counts. The shape is for a new model only."""

    init_from: str = "out/demo"  # the pretrained checkpoint, or a run's folder for its newest; empty: a new model
    word_weight: float = setting(1.0, fixed=True)  # the loss counts this often where a required word is first named
    plain_share: float = setting(0.0, below=1, fixed=True)  # of the examples: trained without their instructions
    lora_rank: int = setting(0, fixed=True)  # 0: train every weight; else only adapters of this rank
    lora_alpha: float = setting(16.0, fixed=True)  # adapters are scaled by alpha / rank
    merge: bool = False  # no training: write out_dir/merged.pt, the newest checkpoint with its adapters merged

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank and not self.init_from:
            raise UserError(f"lora_rank = {self.lora_rank}: adapters need a pretrained model; set init_from")


# ---------------------------------------------------------------------------------------------------
# LoRA


class LowRank(nn.Module):
    """A frozen matrix W becomes W + (alpha / rank) B A, of which only A and B are trained.

    LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3). B starts at zero, so the model starts unchanged.
    """

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float):
        super().__init__()
        self.scale = alpha / rank
        start = torch.randn(rank, weight.size(1)) / math.sqrt(rank)  # drawn on the CPU: the same on every device
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


# ---------------------------------------------------------------------------------------------------
# Data


def pack(lengths: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit packing: each example, longest first, goes into the fullest sequence that has space for it.

    Returns the indices of the examples, sequence after sequence, and where each sequence begins among them (with the
    end of the last).
    """
    sequence_of = np.zeros(len(lengths), dtype=np.int64)
    n_sequences, spaces = 0, list[int]()  # spaces: the amounts of free space that some sequence has, sorted
    with_space = collections.defaultdict[int, list[int]](list)  # free space -> the sequences that have it
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        at = bisect.bisect_left(spaces, length)  # the smallest space that suffices
        if at < len(spaces):
            space = spaces[at]
            sequence = with_space[space].pop()
            if not with_space[space]:
                del spaces[at]
        else:
            space, sequence, n_sequences = block_size, n_sequences, n_sequences + 1
        sequence_of[i] = sequence
        if not with_space[space - length]:
            bisect.insort(spaces, space - length)
        with_space[space - length].append(sequence)
    starts = np.searchsorted(np.sort(sequence_of), np.arange(n_sequences + 1))
    return np.argsort(sequence_of, kind="stable"), starts


class ExampleFile(ShuffledDataset):
    """A .bin file of instructions and responses, packed into sequences of block_size tokens.

    Two examples in one sequence (E: end token, U and A: the control tokens of the template, a b c d e f: text):

        tokens      E U a b A c d  E U e A f  E E     (each example begins with the end of another, as in sampling)
        targets     - - - - c d E  - - - f E  - -     (-: IGNORE)
        documents   7 7 7 7 7 7 7  2 2 2 2 2 -1 -1    (the index of the example: attention stays inside it)
        positions   0 1 2 3 4 5 6  0 1 2 3 4  0 0
    """

    def __init__(
        self,
        path: Path,
        meta: dict,
        response_token: int,
        block_size: int,
        max_length: int,
        seed: int = 0,
        plain_share: float = 0.0,
        word_weight: float = 1.0,
        tokenizer=None,
    ):
        """max_length: the most tokens of an example that the model can read. plain_share: the share of the examples
        that lose their instructions, so that the model also learns to tell a story unasked. word_weight: the weight of
        required words in the loss; other than 1 it needs the tokenizer. Raises UserError."""
        super().__init__(path, seed)
        self.word_weight, self.tokenizer = word_weight, tokenizer
        if word_weight != 1:
            ids = range(tokenizer.vocab_size())
            self.pieces = [
                "\ufffd" if tokenizer.is_byte(i) else tokenizer.id_to_piece(i).replace("▁", " ") for i in ids
            ]
        self.tokens, self.end_token, self.block_size = open_tokens(path, meta), meta["end_token"], block_size
        self.example_ends = np.flatnonzero(self.tokens == self.end_token) + 1
        self.example_starts = np.append(0, self.example_ends[:-1])
        self.response_starts = np.flatnonzero(self.tokens == response_token) + 1
        whole = len(self.response_starts) == len(self.example_ends) > 0 and self.example_ends[-1] == len(self.tokens)
        if (
            not whole
            or not ((self.example_starts < self.response_starts) & (self.response_starts < self.example_ends)).all()
        ):
            raise UserError(f"{path}: not instructions and responses in turn; run prepare.py --task sft again")
        plain = np.random.default_rng((seed, 1)).random(len(self.example_ends)) < plain_share
        self.example_starts = np.where(plain, self.response_starts, self.example_starts)
        lengths = self.example_ends - self.example_starts
        self.max_length = min(block_size, max_length)
        fitting = np.flatnonzero(lengths <= self.max_length)
        if not len(fitting):
            raise UserError(f"{path}: no example fits into {self.max_length} tokens")
        self.left_out = len(lengths) - len(fitting)
        packed, self.sequence_starts = pack(lengths[fitting], block_size)
        self.packed = fitting[packed]  # the indices of the examples, sequence after sequence
        self.efficiency = lengths[fitting].sum() / (len(self) * block_size)

    def __len__(self) -> int:
        return len(self.sequence_starts) - 1

    def __str__(self) -> str:
        return (
            f"{self.path}: {len(self.example_ends):,} examples, {self.left_out:,} left out (longer than "
            f"{self.max_length} tokens), packing efficiency {self.efficiency:.1%}"
        )

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The instruction with all control tokens, and the response with its end token."""
        start, response, end = self.example_starts[i], self.response_starts[i], self.example_ends[i]
        instruction = np.append(self.end_token, self.tokens[start:response]).astype(np.int64)
        return instruction, self.tokens[response:end].astype(np.int64)

    def loss_weights(self, instruction: np.ndarray, response: np.ndarray) -> np.ndarray:
        """The weight of each token of the response: word_weight where it first names a required word, else 1.

        Which word comes next the model mostly learns from the words before it. That some words stand in the
        instruction it learns from few tokens, so these may count more.
        """
        weights = np.ones(len(response), dtype=np.float32)
        constraints = read_constraints(self.tokenizer.decode(instruction.tolist())) or {}
        pieces = [self.pieces[i] for i in response]
        story, token_of = "".join(pieces), np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        for word in split_list(constraints.get("词汇", "")):
            if (at := story.find(word)) >= 0:
                weights[token_of[at : at + len(word)]] = self.word_weight
        return weights

    def count_targets(self, batch: dict) -> float:
        """With loss weights the loss is a weighted mean."""
        return float(batch["loss_weights"].sum()) if "loss_weights" in batch else super().count_targets(batch)

    def sequences(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """tokens, targets, documents, positions, and with a word_weight loss_weights, (B, T) each."""
        shape = (len(indices), self.block_size)
        batch = {"tokens": np.full(shape, self.end_token), "targets": np.full(shape, IGNORE)}
        batch |= {"documents": np.full(shape, -1), "positions": np.zeros(shape, dtype=np.int64)}
        if self.word_weight != 1:
            batch["loss_weights"] = np.zeros(shape, dtype=np.float32)
        for b, index in enumerate(indices):
            start = 0
            for i in self.packed[self.sequence_starts[index] : self.sequence_starts[index + 1]]:
                instruction, response = self.example(i)
                end = start + len(instruction) + len(response) - 1
                batch["tokens"][b, start:end] = np.append(instruction, response[:-1])
                batch["targets"][b, end - len(response) : end] = response
                batch["documents"][b, start:end] = i
                batch["positions"][b, start:end] = np.arange(end - start)
                if self.word_weight != 1:
                    batch["loss_weights"][b, end - len(response) : end] = self.loss_weights(instruction, response)
                start = end
        return {name: torch.from_numpy(values) for name, values in batch.items()}


# ---------------------------------------------------------------------------------------------------
# The run


def open_examples(folder: Path, source: Path, checkpoint: dict | None) -> tuple[dict, str, int, bytes]:
    """meta.json of prepared instructions, their template, its token before a response, and the tokenizer's bytes.

    Raises UserError if the folder was not prepared for the model of `checkpoint`, which was read from `source`. A new
    model has no checkpoint, and takes the tokenizer of the folder.
    """
    meta, tokenizer = read_meta(folder)
    if not isinstance(template := meta.get("template"), str):
        raise UserError(f"{folder}: holds stories, not instructions; run prepare.py --task sft --out_dir {folder}")
    if checkpoint and tokenizer != checkpoint["tokenizer"]:
        raise UserError(f"{folder}: prepared with another tokenizer than {source}'s; prepare it again with that one")
    _, (response_token,) = template_tokens(template, load_tokenizer(tokenizer, folder))
    return meta, template, response_token, tokenizer


def merge(out_dir: Path) -> None:
    """Write out_dir/merged.pt: the newest checkpoint as an ordinary model, its adapters merged. Raises UserError."""
    checkpoint = read_checkpoint(out_dir)
    names = ("model_config", "tokenizer", "template", "settings", "step")
    merged = {name: checkpoint[name] for name in names if name in checkpoint}
    save_checkpoint(out_dir / "merged.pt", merged | {"model": build_model(checkpoint, out_dir).state_dict()})
    print(f"wrote {out_dir / 'merged.pt'}")


def tune(s: Settings) -> None:
    """Load the model, or make one, and the examples, and train. Raises UserError."""
    out_dir, folder = Path(s.out_dir), Path(s.data_dir)
    source, checkpoint = (newest_checkpoint(out_dir) if s.resume else None) or (Path(s.init_from), None)
    if s.init_from:
        checkpoint = checkpoint or read_checkpoint(source)  # a resumed run does not need init_from
    meta, template, response_token, tokenizer_model = open_examples(folder, source, checkpoint)
    tokenizer = load_tokenizer(tokenizer_model, folder)
    model = build_model(checkpoint, source) if checkpoint else new_model(s, tokenizer.vocab_size())
    for field in dataclasses.fields(ShapeSettings):
        given, found = getattr(s, field.name), getattr(model.config, field.name)
        if given not in (field.default, found) and process_rank() == 0:
            print(f"{field.name} = {given}: only a new model takes that; {source} keeps {found}")
        setattr(s, field.name, found)  # printed and stored as it is
    sizes = (meta, response_token, s.block_size, model.config.block_size)
    train_data = ExampleFile(folder / "train.bin", *sizes, s.seed, s.plain_share, s.word_weight, tokenizer)
    val_data = ExampleFile(folder / "val.bin", *sizes)  # the same for every seed, and without weights
    if process_rank() == 0:
        print(train_data, val_data, sep="\n")
    metadata = {"tokenizer": tokenizer_model, "template": template, "data": meta["train"]}
    if s.lora_rank:
        add_lora(model, s.lora_rank, s.lora_alpha)
        metadata["lora"] = {"rank": s.lora_rank, "alpha": s.lora_alpha}
    prompt, _ = val_data.example(val_data.packed[len(val_data.packed) // 2])  # the first ones are the longest
    train(s, model, train_data, val_data, metadata, prompt=prompt.tolist())


def main() -> None:
    s = load_settings(sys.argv[1:], Settings, __doc__)
    with processes(s):
        if s.merge:
            merge(Path(s.out_dir))
        else:
            tune(s)


if __name__ == "__main__":
    run(main)
