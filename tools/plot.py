"""The curves of one run or several, from their metrics.jsonl. Needs matplotlib (pip install matplotlib).

    python -m tools.plot out/demo
    python -m tools.plot out/demo out/trial --x tokens --out curves.svg

A pale line is what was measured, the strong one over it its average, a point the validation.
"""

import json
from pathlib import Path

from common.files import Parser, UserError, atomic_write, report_errors

PANELS = {  # metric: title; a panel is drawn if a run has the metric
    "loss": "loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
    "accuracy": "accuracy on pairs",  # of tools/dpo.py
    "margin": "reward margin",
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # safe for colour-blind readers
CHINESE_FONTS = ("Noto Sans CJK SC", "WenQuanYi Micro Hei", "PingFang SC", "Microsoft YaHei", "SimHei")


def plot(runs: list[Path], out: Path, x: str = "step", smooth: float = 0.04) -> None:
    """Write the curves of the runs, given by their folders, to a .png or .svg file.

    x: step or tokens. smooth: the share of a run that is averaged on either side. Raises UserError.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing: pip install matplotlib") from None

    metrics = {run: read_metrics(run / "metrics.jsonl") for run in runs}
    panels = panels_of(metrics)
    n_rows = (len(panels) + 1) // 2
    with matplotlib.rc_context({"font.family": fonts(), "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(8, 2.2 * n_rows + 0.6), layout="constrained")
        for number, metric in enumerate(panels, start=1):
            axis = figure.add_subplot(n_rows, 2, number)
            for i, run in enumerate(runs):
                draw_curve(axis, metrics[run], metric, x, smooth, str(run), COLOURS[i % len(COLOURS)])
            finish_panel(axis, metric, x)
        handles, names = axis.get_legend_handles_labels()  # every panel has the same
        figure.legend(handles, names, loc="outside upper center", frameon=False)
        with atomic_write(out) as f:
            figure.savefig(f, format=out.suffix[1:], dpi=150)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl. Raises UserError.

    A last line that is still being written is left out, and so is a null: the gradient norm of a step
    that overflowed in float16.
    """
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and "step" in line and "tokens" in line:
            lines.append({name: value for name, value in line.items() if value is not None})
        elif text.endswith("\n"):
            raise UserError(f"{path}:{number}: not a line of metrics; remove it")
    return lines


def panels_of(metrics: dict[Path, list[dict]]) -> list[str]:
    """The metrics that a run has. Raises UserError if a run has none."""
    found: set[str] = set()
    for run, lines in metrics.items():
        if not lines:
            raise UserError(f"{run}: its metrics.jsonl holds no line yet; wait for the first")
        for line in lines:
            found.update(line)
    return [metric for metric in PANELS if metric in found]


def fonts() -> list[str]:
    """matplotlib's own font, then those installed here that have Chinese characters."""
    from matplotlib import font_manager

    installed = font_manager.get_font_names()
    return ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in installed)]


def draw_curve(axis, lines: list[dict], metric: str, x: str, smooth: float, name: str, colour: str) -> None:
    """One run's curve of one metric, and points for its validation."""
    positions, values = points_of(lines, x, metric)
    reach = int(smooth * len(values))
    if reach > 0 and metric != "learning_rate":  # the learning rate has no noise
        axis.plot(positions, values, color=colour, linewidth=0.8, alpha=0.35)
        values = smoothed(values, reach)
    axis.plot(positions, values, color=colour, label=name)
    if len(values) == 1:
        axis.plot(positions, values, "s", color=colour)  # a line of one point cannot be seen
    positions, values = points_of(lines, x, f"val_{metric}")
    axis.plot(positions, values, "o", color=colour, markersize=5, markeredgecolor="white")


def points_of(lines: list[dict], x: str, metric: str) -> tuple[list[float], list[float]]:
    positions = []
    values = []
    for line in lines:
        if metric in line:
            positions.append(line[x])
            values.append(line[metric])
    return positions, values


def smoothed(values: list[float], reach: int) -> list[float]:
    """Each value's mean with up to `reach` neighbours on either side, as many on the left as on the right."""
    means = []
    for i in range(len(values)):
        side = min(reach, i, len(values) - 1 - i)
        window = values[i - side : i + side + 1]
        means.append(sum(window) / len(window))
    return means


def finish_panel(axis, metric: str, x: str) -> None:
    """Scales, labels and title."""
    from matplotlib.ticker import EngFormatter, LogLocator

    low, high = axis.dataLim.intervaly
    if metric in ("loss", "grad_norm") and 0 < 10 * low < high:  # a high start would flatten the rest
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter("")
    thousands = EngFormatter(sep="")  # 20k, 2M
    if metric == "tokens_per_second":
        axis.yaxis.set_major_formatter(thousands)
    else:
        axis.yaxis.set_major_formatter("{x:.4g}")
    if x == "tokens":
        axis.xaxis.set_major_formatter(thousands)
    axis.set_xlabel(x)
    title = PANELS[metric]
    if metric in ("loss", "accuracy", "margin"):
        title += " (points: validation)"
    axis.set_title(title, loc="left", fontsize=9)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = Parser(description="Plot the curves of runs.", allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="OUT_DIR", help="the folder of a run")
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="what stands on the x axis")
    parser.add_argument("--smooth", type=float, default=0.04, help="share of a run to average on either side")
    parser.add_argument("--out", type=Path, help="a .png or .svg file; default: curves.png in the first run")
    args = parser.parse_args()
    if not 0 <= args.smooth <= 1:
        raise UserError(f"--smooth {args.smooth}: must lie between 0 and 1")
    out = args.out or args.runs[0] / "curves.png"
    if out.suffix not in (".png", ".svg"):
        raise UserError(f"--out {out}: must end in .png or .svg")
    plot(args.runs, out, args.x, args.smooth)
    print(f"wrote {out}")


if __name__ == "__main__":
    report_errors(main)
