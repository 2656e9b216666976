"""Does a model follow instructions? Metrics on held-out instructions, for one checkpoint or several side by side.

    python -m tools.eval --ckpt out/demo_sft
    python -m tools.eval --ckpt out/demo --ckpt out/demo_sft --data data/demo_sft --json metrics.json
    python -m tools.eval --ckpt out/demo_sft --best_of 8                          of each eight stories the best

Stories are sampled in batches and scored by the rules of stories/rewards.py; LABELS says what each score counts.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.checkpoint import build_model, choose_device, choose_dtype, read_checkpoint
from common.files import Parser, UserError, atomic_write, load_tokenizer, report_errors
from model import IGNORE
from sample import add_device_options, add_sampling_options, sample_and_score, sampling_options
from sft import PackedSFTDataset, open_examples
from stories.consistency import consistent
from stories.rewards import average, reward, score

LABELS = {
    "words": "required words present",
    "words_all": "stories with all their words",
    "sentence_exact": "required sentence present",
    "sentence_lcs80": "the same, 80% of it in order",
    "dialogue": "dialogue where asked for",
    "finished": "stories that reach their end",
    "consistent": "the same heroes and objects",
    "repeat_4gram": "repeated 4-grams in a story",
    "length": "characters in a story",
    "bits_per_char": "bits a character of references",
}


def consistency_of(story: str) -> dict[str, float]:
    """The score of stories/consistency.py, for a story of the embedded corpus; for others none."""
    same = consistent(story)
    return {} if same is None else {"consistent": float(same)}


@torch.inference_mode()
def reference_bits(model, tokenizer, examples, batch_size: int, device) -> float:
    """Bits a character of the reference responses, given their instructions."""
    nats = 0.0
    for first in range(0, len(examples), batch_size):
        batch = examples[first : first + batch_size]
        longest = max(len(instruction) + len(response) for instruction, response in batch) - 1
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, T)
        targets = torch.full_like(tokens, IGNORE)  # (B, T)
        for b, (instruction, response) in enumerate(batch):
            both = torch.tensor(instruction + response)
            tokens[b, : len(both) - 1] = both[:-1]
            targets[b, len(instruction) - 1 : len(both) - 1] = both[len(instruction) :]
        nats += model.loss(tokens.to(device), targets.to(device)).item()
    return nats / math.log(2) / sum(len(tokenizer.decode(response)) for _, response in examples)


def shown(name: str, value: float | None) -> str:
    """A score as the tables have it; empty if it does not apply."""
    if value is None:
        return ""
    return f"{value:.2f}" if name in ("length", "bits_per_char") else f"{value:.1%}"


def evaluate(path: Path, folder: Path, args: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """All metrics of one checkpoint, and the stories it generated. Raises UserError."""
    device = choose_device(args.device)
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint, path).to(device, choose_dtype(args.dtype, device)).eval()
    tokenizer = load_tokenizer(checkpoint["tokenizer"], path)
    meta, _, response_token = open_examples(folder, path, checkpoint)
    block_size = model.config.block_size
    data = PackedSFTDataset(folder / "val.bin", meta, response_token, block_size, block_size)
    examples = [tuple(map(np.ndarray.tolist, data.example(i))) for i in sorted(data.packed)[: args.num]]
    stories, scores = [], []
    # The same for every batch, or the metrics would depend on the batch size.
    max_new_tokens = block_size - max(len(instruction) for instruction, _ in examples)
    options = sampling_options(args) | {"max_new_tokens": max_new_tokens}
    per_batch = max(1, args.batch_size // args.best_of)
    for first in tqdm(range(0, len(examples), per_batch), desc=str(path), unit="batch", disable=None):
        prompts = [instruction for instruction, _ in examples[first : first + per_batch] for _ in range(args.best_of)]
        options["seed"] = args.seed + first  # another seed for each batch
        samples = sample_and_score(model, tokenizer, prompts, **options)
        for i in range(0, len(samples), args.best_of):
            story, story_scores = max(samples[i : i + args.best_of], key=lambda sample: reward(sample[1]))
            stories.append(story)
            scores.append(story_scores | consistency_of(story))
    bits = reference_bits(model, tokenizer, examples, args.batch_size, device)
    texts = [tokenizer.decode(response) for _, response in examples]
    references = average([score(None, text) | consistency_of(text) for text in texts])
    metrics = average(scores) | {"bits_per_char": bits, "examples": len(examples), "too_long": data.left_out}
    return metrics | {f"reference_{name}": value for name, value in references.items()}, stories


def main() -> None:
    parser = Parser(description="Measure how well a model follows instructions.", allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, action="append", required=True, help="give it twice to compare two")
    parser.add_argument("--data", type=Path, help="prepared instructions (default: those of the last --ckpt)")
    parser.add_argument("--num", type=int, default=200, help="held-out instructions")
    parser.add_argument("--batch_size", type=int, default=50, help="stories in a batch")
    parser.add_argument("--best_of", type=int, default=1, help="stories for each instruction, of which the best counts")
    add_sampling_options(parser)
    add_device_options(parser)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N stories of each")
    parser.add_argument("--json", type=Path, help="write the metrics of the last checkpoint to this file")
    args = parser.parse_args()
    for key in ("num", "batch_size", "best_of"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour
    folder = args.data or Path(read_checkpoint(args.ckpt[-1])["settings"].get("data_dir", ""))
    columns = []
    for path in args.ckpt:
        metrics, stories = evaluate(path, folder, args)
        columns.append(metrics)
        print(*stories[: args.show], sep="\n---\n", end="\n" if args.show else "")
    best = f", best of {args.best_of}" if args.best_of > 1 else ""
    print(f"{columns[0]['examples']} held-out instructions of {folder}, temperature {args.temperature}{best}")
    print(" " * 32 + "".join(f"{path.name:>16}" for path in args.ckpt) + f"{'references':>16}")
    for name, label in LABELS.items():
        values = [c.get(name) for c in columns] + [columns[0].get(f"reference_{name}")]
        print(f"{label:32}" + "".join(f"{shown(name, value):>16}" for value in values))
    if args.json:
        with atomic_write(args.json) as f:
            f.write(json.dumps(columns[-1], indent=2).encode() + b"\n")


if __name__ == "__main__":
    report_errors(main)
