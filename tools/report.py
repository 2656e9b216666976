"""A report of a pipeline in Markdown: hardware, times, losses, speed, memory, curves, evaluation, stories.

    python -m tools.report out/demo out/demo_sft --out out/report.md
    python -m tools.report out/demo out/demo_sft --out out/report.md --times out/demo.times.tsv

Each argument is the folder of a run, in the order of the stages. A file eval.json in it, from `python -m
tools.eval --json`, is shown too; the curves only if matplotlib is installed.
"""

import collections
import importlib.util
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path

import torch

from common.files import Parser, UserError, atomic_write, report_errors
from common.sampling import open_model
from sample import sample_stories
from stories.constraints import encode_prompt
from tools.eval import LABELS, shown
from tools.plot import plot, read_metrics


def write_report(runs: list[Path], times: Path | None, words: str, out: Path) -> None:
    """Write the report to `out`, and its curves beside it. Raises UserError."""
    training = training_table(runs)
    sections = ["# Report", "## Hardware", hardware_table()]
    if times:
        sections += ["## Time", time_table(times)]
    sections += ["## Training", training]
    out.parent.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib"):
        curves = out.with_suffix(".png")
        plot(runs, curves, x="tokens")
        sections.append(f"![curves]({curves.name})\n")
    evaluated = [run for run in runs if (run / "eval.json").exists()]
    if evaluated:
        sections += ["## Evaluation", evaluation_table(evaluated)]
    sections.append("## Stories")
    for run in runs:
        sections.append(stories_of(run, words))
    with atomic_write(out) as f:
        f.write("\n".join(sections).encode())
    print(training)


def training_table(runs: list[Path]) -> str:
    titles = ["run", "steps", "tokens", "first loss", "last loss", "validation loss", "bits a character"]
    titles += ["tokens/s (median)", "GPU memory"]
    return table(titles, [training_row(run) for run in runs])


def training_row(run: Path) -> list[str]:
    """Steps, tokens, losses, speed and memory of a run. Raises UserError."""
    if not (run / "metrics.jsonl").exists():
        raise UserError(f"{run}: no run here (metrics.jsonl is missing)")
    values = collections.defaultdict(list)  # of each metric; not every line has every one
    for line in read_metrics(run / "metrics.jsonl"):
        for name, value in line.items():
            values[name].append(value)
    if not values["loss"]:
        raise UserError(f"{run / 'metrics.jsonl'}: has no loss yet; wait for the first")
    return [
        run.name,
        f"{values['step'][-1]:,}",
        f"{values['tokens'][-1]:,}",
        f"{values['loss'][0]:.3f}",
        last(values["loss"]),
        last(values["val_loss"]),
        last(values["val_bits_per_character"]),
        f"{statistics.median(values['tokens_per_second']):,.0f}",
        f"{max(values['peak_memory'], default=0) / 2**30:.2f} GiB",  # 0 on a CPU
    ]


def last(values: list[float]) -> str:
    if not values:
        return ""
    return f"{values[-1]:.3f}"


def table(titles: list[str], rows: list[list[str]]) -> str:
    text = ""
    for cells in (titles, ["---"] * len(titles), *rows):
        text += "| " + " | ".join(cells) + " |\n"
    return text


def hardware_table() -> str:
    """The hardware and the versions here."""
    rows = [["CPU", f"{processor()}, {os.cpu_count()} cores"]]
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        rows.append(["GPU", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"])
    rows.append(["Python", platform.python_version()])
    rows.append(["PyTorch", torch.__version__])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if commit.returncode == 0:
        rows.append(["commit", commit.stdout.strip()])
    return table(["", ""], rows)


def processor() -> str:
    """The name of the CPU. Python does not know it on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor()


def time_table(path: Path) -> str:
    """Each line of the file: a stage, a tab, seconds. Those of a resumed stage are added up."""
    seconds: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        stage, _, value = line.partition("\t")
        if not value.isdigit():
            raise UserError(f"{path}:{number}: expected a stage, a tab and seconds")
        seconds[stage] = seconds.get(stage, 0) + int(value)
    seconds["all"] = sum(seconds.values())
    rows = [[stage, f"{n // 60} min {n % 60} s"] for stage, n in seconds.items()]
    return table(["stage", "time"], rows)


def evaluation_table(runs: list[Path]) -> str:
    """The metrics of tools/eval.py, a column for each run."""
    columns = [json.loads((run / "eval.json").read_text(encoding="utf-8")) for run in runs]
    rows = []
    for name, label in LABELS.items():
        row = [label]
        for scores in columns:
            row.append(shown(name, scores.get(name)))
        rows.append(row)
    return table(["held-out instructions"] + [run.name for run in runs], rows)


def stories_of(run: Path, words: str) -> str:
    """Two stories of the newest checkpoint, for an instruction if the model follows them.

    Raises UserError.
    """
    model, tokenizer, checkpoint = open_model(run, "auto", "auto")
    template = checkpoint.get("template", "")
    instruction = ""
    if template:
        instruction = f"词汇：{words}"
    prompt = encode_prompt(tokenizer, template, instruction, "")
    stories = sample_stories(model, tokenizer, [prompt] * 2, max_new_tokens=model.config.block_size, seed=1)
    text = f"`{run.name}` {instruction} (temperature 0.8, unedited)\n"
    for story, _ in stories:
        quoted = story.replace("\n", "\n> ")
        text += f"\n> {quoted}\n"
    return text


def main() -> None:
    parser = Parser(description="Write a report of a pipeline.", allow_abbrev=False)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders, in the order of the stages"
    )
    parser.add_argument("--times", type=Path, help="a file of lines: a stage, a tab, its seconds")
    parser.add_argument("--words", default="帽子，消防员", help="what the sample stories must have")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    args = parser.parse_args()
    write_report(args.runs, args.times, args.words, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    report_errors(main)
