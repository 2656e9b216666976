"""Does a model follow instructions? Figures on held-out ones, for one checkpoint or several side by side.

    python -m tools.eval --ckpt out/demo_sft
    python -m tools.eval --ckpt out/demo --ckpt out/demo_sft --data data/demo_sft --json figures.json

The stories are told in batches and scored by the rules of rewards.py; LABELS says in words what they count.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import build_model, read_checkpoint
from dataset import read_meta
from device import choose_device
from disk import replacing
from errors import Parser, UserError, run
from instructions import markers
from model import IGNORE
from rewards import average, score, tell_and_score
from sample import add_sampling_options, sampling_options
from sft import ExampleFile, Settings
from tokenizer import load_tokenizer

LABELS = {
    "words": "required words present",
    "words_all": "stories with all their words",
    "sentence_exact": "required sentence present",
    "sentence_lcs80": "the same, 80% of it in order",
    "dialogue": "dialogue where asked for",
    "finished": "stories that reach their end",
    "repeat_4gram": "repeated 4-grams in a story",
    "length": "characters in a story",
    "bits_per_char": "bits a character of references",
}


@torch.inference_mode()
def reference_bits(model, tokenizer, examples, batch_size: int, device) -> float:
    """Bits a character of the reference answers, given their instructions."""
    nats = 0.0
    for first in range(0, len(examples), batch_size):
        batch = examples[first : first + batch_size]
        longest = max(len(a) + len(b) for a, b in batch) - 1
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, T)
        targets = torch.full_like(tokens, IGNORE)  # (B, T)
        for row, (asked, answer) in enumerate(batch):
            both = torch.tensor(asked + answer)
            tokens[row, : len(both) - 1] = both[:-1]
            targets[row, len(asked) - 1 : len(both) - 1] = both[len(asked) :]
        nats += model(tokens.to(device), targets.to(device)).item()
    return nats / math.log(2) / sum(len(tokenizer.decode(answer)) for _, answer in examples)


def evaluate(path: Path, folder: Path, args: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """All figures of one checkpoint, and the stories it told. Raises UserError."""
    device, _ = choose_device(args.device)
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint, path).to(device, getattr(torch, args.dtype)).eval()
    tokenizer = load_tokenizer(checkpoint["tokenizer"], path)
    meta, prepared_with = read_meta(folder)
    if not isinstance(template := meta.get("template"), str):
        raise UserError(f"{folder}: holds no instructions; name a folder of prepare.py --task sft with --data")
    if prepared_with != checkpoint["tokenizer"]:
        raise UserError(f"{folder}: prepared with another tokenizer than {path}'s")
    (_, (answer,)), end = markers(template, tokenizer), tokenizer.eos_id()
    block = model.config.block_size
    data = ExampleFile(folder / "val.bin", Settings(block_size=block), meta, answer, block)
    examples = [tuple(map(np.ndarray.tolist, data.example(i))) for i in sorted(data.order_in_rows)[: args.num]]
    stories, scores = [], []
    # The same for every batch, or the figures would depend on its size.
    room = block - max(len(asked) for asked, _ in examples)
    options = sampling_options(args) | {"max_new_tokens": room, "end_token": end}
    batches = range(0, len(examples), args.batch_size)
    for first in tqdm(batches, desc=str(path), unit="batch", disable=None):
        asked = [a for a, _ in examples[first : first + args.batch_size]]
        options["seed"] = args.seed + first  # other chances for other instructions
        for story, scored in tell_and_score(model, tokenizer, asked, **options):
            stories.append(story)
            scores.append(scored)
    bits = reference_bits(model, tokenizer, examples, args.batch_size, device)
    references = average([score(None, tokenizer.decode(b)) for _, b in examples])
    figures = average(scores) | {"bits_per_char": bits, "examples": len(examples), "too_long": data.left_out}
    return figures | {f"reference_{name}": value for name, value in references.items()}, stories


def main() -> None:
    parser = Parser(description="Measure how well a model follows instructions.", allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, action="append", required=True, help="give it twice to compare two")
    parser.add_argument("--data", type=Path, help="prepared instructions (default: those of the last --ckpt)")
    parser.add_argument("--num", type=int, default=200, help="held-out instructions")
    parser.add_argument("--batch_size", type=int, default=50, help="stories told at once")
    add_sampling_options(parser)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N stories of each")
    parser.add_argument("--json", type=Path, help="write the figures of the last checkpoint to this file")
    args = parser.parse_args()
    for key in ("num", "batch_size"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    folder = args.data or Path(read_checkpoint(args.ckpt[-1])["settings"].get("data_dir", ""))
    columns = []
    for path in args.ckpt:
        figures, stories = evaluate(path, folder, args)
        columns.append(figures)
        print(*stories[: args.show], sep="\n---\n", end="\n" if args.show else "")
    print(f"{columns[0]['examples']} held-out instructions of {folder}, temperature {args.temperature}")
    print(" " * 32 + "".join(f"{path.name:>16}" for path in args.ckpt) + f"{'references':>16}")
    for name, label in LABELS.items():
        values = [c.get(name) for c in columns] + [columns[0].get(f"reference_{name}")]
        shown = ["" if v is None else f"{v:.2f}" if name in ("length", "bits_per_char") else f"{v:.1%}" for v in values]
        print(f"{label:32}" + "".join(f"{text:>16}" for text in shown))
    if args.json:
        with replacing(args.json) as f:
            f.write(json.dumps(columns[-1], indent=2).encode() + b"\n")


if __name__ == "__main__":
    run(main)
