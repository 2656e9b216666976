"""Does a model follow instructions? Metrics on held-out instructions, for one checkpoint or several.

    python -m tools.eval --ckpt out/demo_sft
    python -m tools.eval --ckpt out/demo --ckpt out/demo_sft --data data/demo_sft --json metrics.json
    python -m tools.eval --ckpt out/demo_sft --best_of 8                       the best of eight stories each

Stories are sampled in batches and scored by the rules of stories/rewards.py; LABELS says what a score counts.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

from common.checkpoint import read_checkpoint
from common.files import Parser, UserError, atomic_write, report_errors
from common.sampling import add_device_options, add_sampling_options, open_model, sampling_options
from model import IGNORE
from sample import sample_stories
from sft import PackedSFTDataset, open_examples
from stories.consistency import consistent
from stories.constraints import read_constraints
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


def evaluate(path: Path, folder: Path, args: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """All metrics of one checkpoint, and the stories it generated. Raises UserError."""
    model, tokenizer, checkpoint = open_model(path, args.device, args.dtype)
    meta, _, response_token = open_examples(folder, path, checkpoint)
    block_size = model.config.block_size
    data = PackedSFTDataset(folder / "val.bin", meta, response_token, block_size, block_size)
    examples = []  # an instruction and its reference response each, as tokens
    for i in sorted(data.packed)[: args.num]:
        instruction, response = data.example(i)
        examples.append((instruction.tolist(), response.tolist()))

    instructions = [instruction for instruction, _ in examples]
    samples = sample_all(model, tokenizer, instructions, args, title=str(path))

    stories = []
    scores = []
    reference_scores = []
    for i, (instruction, response) in enumerate(examples):
        constraints = read_constraints(tokenizer.decode(instruction))
        candidates = samples[i * args.best_of : (i + 1) * args.best_of]
        story, story_scores = best_scored(constraints, candidates)
        stories.append(story)
        scores.append(story_scores)
        reference_scores.append(score_story(None, tokenizer.decode(response)))

    metrics = average(scores)
    metrics["bits_per_char"] = reference_bits(model, tokenizer, examples, args.batch_size)
    metrics["examples"] = len(examples)
    metrics["too_long"] = data.left_out
    for name, value in average(reference_scores).items():
        metrics[f"reference_{name}"] = value
    return metrics, stories


def sample_all(model, tokenizer, instructions: list[list[int]], args, title: str) -> list[tuple[str, bool]]:
    """args.best_of stories for each instruction, in order, and whether each has reached its end."""
    options = sampling_options(args)
    # The same for every batch, or the metrics would depend on the batch size.
    options["max_new_tokens"] = model.config.block_size - max(map(len, instructions))
    batch_size = max(1, args.batch_size // args.best_of)
    samples = []
    for first in tqdm(range(0, len(instructions), batch_size), desc=title, unit="batch", disable=None):
        prompts = []
        for instruction in instructions[first : first + batch_size]:
            prompts += [instruction] * args.best_of
        options["seed"] = args.seed + first  # another seed for each batch
        samples += sample_stories(model, tokenizer, prompts, **options)
    return samples


def best_scored(constraints: dict[str, str] | None, candidates: list[tuple[str, bool]]) -> tuple[str, dict]:
    """The candidate of the highest reward, and its scores."""
    scored = []
    for story, finished in candidates:
        scores = score_story(constraints, story)
        scores["finished"] = float(finished)
        scored.append((story, scores))
    return max(scored, key=lambda candidate: reward(candidate[1]))


def score_story(constraints: dict[str, str] | None, story: str) -> dict[str, float]:
    """The scores of stories/rewards.py; for a story of the embedded corpus, of stories/consistency.py too."""
    scores = score(constraints, story)
    same = consistent(story)
    if same is not None:
        scores["consistent"] = float(same)
    return scores


@torch.inference_mode()
def reference_bits(model, tokenizer, examples, batch_size: int) -> float:
    """Bits a character of the reference responses, given their instructions."""
    device = model.embedding.weight.device
    nats = 0.0
    characters = 0
    for first in range(0, len(examples), batch_size):
        batch = examples[first : first + batch_size]
        longest = max(len(instruction) + len(response) for instruction, response in batch) - 1
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, T)
        targets = torch.full_like(tokens, IGNORE)  # (B, T)
        for b, (instruction, response) in enumerate(batch):
            both = torch.tensor(instruction + response)
            end = len(both) - 1  # the last token is only a target
            tokens[b, :end] = both[:-1]
            targets[b, end - len(response) : end] = both[-len(response) :]
            characters += len(tokenizer.decode(response))
        nats += model.loss(tokens.to(device), targets.to(device)).item()
    return nats / math.log(2) / characters


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Measure how well a model follows instructions.", allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, action="append", required=True, help="several are compared")
    parser.add_argument("--data", type=Path, help="prepared instructions (default: those of the last --ckpt)")
    parser.add_argument("--num", type=int, default=200, help="held-out instructions")
    parser.add_argument("--batch_size", type=int, default=50, help="stories in a batch")
    parser.add_argument("--best_of", type=int, default=1, help="stories for each; the best counts")
    add_sampling_options(parser)
    add_device_options(parser)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N stories of each")
    parser.add_argument("--json", type=Path, help="write the metrics of the last checkpoint to this file")
    args = parser.parse_args()
    for key in ("num", "batch_size", "best_of"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    return args


def print_table(paths: list[Path], columns: list[dict[str, float]]) -> None:
    """A line for each metric, a column for each checkpoint, and one for the references."""
    print(f"{'':32}" + "".join(f"{path.name:>16}" for path in paths) + f"{'references':>16}")
    for name, label in LABELS.items():
        line = f"{label:32}"
        for metrics in columns:
            line += f"{shown(name, metrics.get(name)):>16}"
        print(line + f"{shown(name, columns[0].get(f'reference_{name}')):>16}")


def shown(name: str, value: float | None) -> str:
    """A score as the tables have it; empty if it does not apply."""
    if value is None:
        return ""
    if name in ("length", "bits_per_char"):
        return f"{value:.2f}"
    return f"{value:.1%}"


def main() -> None:
    args = parse_arguments()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour
    folder = args.data
    if not folder:
        settings = read_checkpoint(args.ckpt[-1])["settings"]
        folder = Path(settings.get("data_dir", ""))
    columns = []
    for path in args.ckpt:
        metrics, stories = evaluate(path, folder, args)
        columns.append(metrics)
        if args.show:
            print("\n---\n".join(stories[: args.show]))

    title = f"{columns[0]['examples']} held-out instructions of {folder}, temperature {args.temperature}"
    if args.best_of > 1:
        title += f", best of {args.best_of}"
    print(title)
    print_table(args.ckpt, columns)
    if args.json:
        with atomic_write(args.json) as f:
            f.write(json.dumps(columns[-1], indent=2).encode() + b"\n")


if __name__ == "__main__":
    report_errors(main)
