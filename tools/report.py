"""A report of a pipeline: machine, versions, times, losses, evaluation, stories, curves. Written as Markdown.

    python -m tools.report out/microstories out/microstories_sft out/microstories_dpo --out out/report.md
    python -m tools.report out/demo out/demo_sft --times out/demo.times.tsv --out out/report.md

Each argument is the folder of a run, in the order of the stages. A file eval.json in it, from `python -m tools.eval
--json`, is shown too. MFU is the share of the matrix products that were measured on the same hardware before the run,
not of the vendor's peak.
"""

import collections
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path

import torch

from common.checkpoint import build_model, choose_device, choose_dtype, read_checkpoint
from common.files import Parser, UserError, atomic_write, load_tokenizer, report_errors
from sample import encode_prompt, generate_text
from tools.eval import LABELS, shown
from tools.plot import read_metrics


def table(titles: list[str], rows: list[list]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def machine() -> str:
    """The hardware and the versions that made the runs, as far as this process sees them."""
    processor, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists() and (name := re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8"))):
        processor = name[1]
    rows = [["CPU", f"{processor}, {os.cpu_count()} cores"]]
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        rows.append(["GPU", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"])
    rows.append(["number type", str(choose_dtype("auto", choose_device("auto")))])
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "sentencepiece")]
    rows.append(["versions", ", ".join(versions)])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if commit.returncode == 0:
        rows.append(["commit", commit.stdout.strip()])
    return table(["", ""], rows)


def times_of(path: Path) -> str:
    """The seconds of each stage; a stage that was resumed has several lines, which are added up."""
    seconds = collections.Counter[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        name, _, value = line.partition("\t")
        if not value.isdigit():
            raise UserError(f"{path}:{number}: expected a name, a tab and seconds")
        seconds[name] += int(value)
    rows = [[name, f"{n // 60} min {n % 60} s"] for name, n in seconds.items()]
    return table(["stage", "time"], [*rows, ["all", f"{seconds.total() // 60} min {seconds.total() % 60} s"]])


def training_row(folder: Path) -> list[str]:
    """Steps, tokens, losses, speed and memory of a run. Raises UserError."""
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder}: no run here (metrics.jsonl is missing)")
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if "tokens_per_second" in line]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    if not steps or not losses:
        raise UserError(f"{folder / 'metrics.jsonl'}: has no losses yet; has the training begun?")
    bits = [line["val_bits_per_character"] for line in lines if "val_bits_per_character" in line]
    speed = statistics.median(line["tokens_per_second"] for line in steps)
    mfu = statistics.median(line["mfu"] for line in steps)
    memory = max((line.get("peak_memory", 0) for line in steps), default=0)
    return [
        folder.name,
        f"{lines[-1]['step']:,}",
        f"{lines[-1]['tokens']:,}",
        f"{steps[-1]['loss']:.3f}",
        f"{losses[-1]:.3f}",
        f"{bits[-1]:.3f}" if bits else "",
        f"{speed:,.0f}",
        f"{mfu:.0%}",
        f"{memory / 2**30:.2f} GiB",
    ]


def evaluation(folders: list[Path]) -> str:
    """The metrics of tools/eval.py, a column for each run that has them; empty if none has."""
    files = {folder.name: folder / "eval.json" for folder in folders if (folder / "eval.json").exists()}
    found = {name: json.loads(file.read_text(encoding="utf-8-sig")) for name, file in files.items()}
    rows = [[label, *(shown(name, scores.get(name)) for scores in found.values())] for name, label in LABELS.items()]
    return table(["held-out instructions", *found], rows) if found else ""


def stories_of(folder: Path, words: str) -> str:
    """Two stories of the newest checkpoint, for an instruction if the model follows them."""
    checkpoint = read_checkpoint(folder)
    model, tokenizer = build_model(checkpoint, folder).eval(), load_tokenizer(checkpoint["tokenizer"], folder)
    template = checkpoint.get("template", "")
    instruction = f"词汇：{words}" if template else ""
    prompt = encode_prompt(tokenizer, template, instruction, "")
    stories = generate_text(model, tokenizer, prompt, 2, max_new_tokens=model.config.block_size, seed=1)
    title = f"`{folder.name}`" + (f", {instruction}" if instruction else "") + ", temperature 0.8, unedited:\n\n"
    return title + ">\n".join("".join(f"> {line}\n" for line in story.splitlines()) for story in stories)


def main() -> None:
    parser = Parser(description="Write a report of a pipeline.", allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, in the order of the stages")
    parser.add_argument("--times", type=Path, help="a file of lines: a stage, a tab, its seconds")
    parser.add_argument("--words", default="帽子，消防员", help="what the sample stories must have")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    args = parser.parse_args()
    titles = ["run", "steps", "tokens", "last loss", "validation loss", "bits a character", "tokens/s (median)"]
    titles += ["MFU (median)", "peak memory"]
    parts = ["# Report\n", "## Machine\n", machine()]
    if args.times:
        parts += ["## Time\n", times_of(args.times)]
    parts += ["## Training\n", table(titles, [training_row(folder) for folder in args.runs])]
    if found := evaluation(args.runs):
        parts += ["## Evaluation\n", found]
    parts += ["## Stories\n", *(stories_of(folder, args.words) for folder in args.runs)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as f:
        f.write("\n".join(parts).encode())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    report_errors(main)
