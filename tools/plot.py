"""The curves of one run or several, from their metrics.jsonl. Needs matplotlib (pip install matplotlib).

    python -m tools.plot out/demo
    python -m tools.plot out/demo out/trial --x tokens --out curves.svg

A pale line is what was measured, the strong one over it its average, a point the validation.
"""

import json
import math
from pathlib import Path

from common.files import Parser, UserError, atomic_write, report_errors

# What there is to see, where a run has it; the validation's figure of the same name (val_loss) goes with it.
PANELS = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
    "accuracy": "accuracy on pairs",  # of tools/dpo.py
    "margin": "reward margin",
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # safe for colour-blind readers
DASHES = ("-", "--", "-.", ":")  # and on a printer without colours
CJK = {"Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "PingFang SC", "Microsoft YaHei", "SimHei"}


def read_metrics(path: Path) -> list[dict]:
    """The numbers in each line of a metrics.jsonl; a last line still being written is left out. Raises UserError."""
    found = []
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            line = json.loads(text)
            line = {k: v for k, v in line.items() if type(v) in (int, float) and math.isfinite(v)}
            if not {"step", "tokens"} <= line.keys():
                raise ValueError
            found.append(line)
        except (ValueError, AttributeError, OverflowError, RecursionError):
            if text.endswith(b"\n"):
                raise UserError(f"{path}:{number}: no line of metrics; remove it") from None
    return found


def smoothed(values: list[float], reach: int) -> list[float]:
    """Each value's mean with up to `reach` neighbours on either side, as many on the one as on the other."""
    reaches = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reaches)]


def draw(runs: dict[str, list[dict]], x: str, smooth: float, file, kind: str) -> None:
    """A panel for each figure, a colour and a dash for each run; under a smoothed curve the raw one, paler."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import findfont, fontManager, get_font
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator

    fonts = ["DejaVu Sans", *sorted(CJK & {font.name for font in fontManager.ttflist}, reverse=True)]
    drawable = set().union(*(get_font(findfont(font)).get_charmap() for font in fonts))
    names = [name if drawable.issuperset(map(ord, name)) else f"run {i}" for i, name in enumerate(runs, 1)]
    looks: list[dict] = [{"color": COLOURS[i % 6], "linestyle": DASHES[i % 4]} for i in range(len(runs))]
    there = {key for lines in runs.values() for line in lines for key in line}
    panels = [key for key in PANELS if {key, f"val_{key}"} & there]
    rows = math.ceil(len(panels) / 2)
    with matplotlib.rc_context({"font.family": fonts, "font.size": 9, "svg.fonttype": "none"}):  # text stays text
        figure = Figure(figsize=(8, 2.2 * rows + 0.6), layout="constrained")
        axes = figure.subplots(rows, 2, squeeze=False).flatten()
        for axis in axes[len(panels) :]:
            axis.remove()
        for key, axis in zip(panels, axes, strict=False):
            for lines, look in zip(runs.values(), looks, strict=True):
                at, values = ([line[name] for line in lines if key in line] for name in (x, key))
                if (reach := int(smooth * len(values))) and key != "learning_rate":
                    axis.plot(at, values, color=look["color"], linewidth=0.8, alpha=0.35)
                    values = smoothed(values, reach)
                axis.plot(at, values, **look, marker="s" if len(values) == 1 else None)
                at, values = ([line[name] for line in lines if f"val_{key}" in line] for name in (x, f"val_{key}"))
                axis.plot(at, values, "o", color=look["color"], markersize=5, markeredgecolor="white")
            low, high = axis.dataLim.intervaly
            if key in ("loss", "grad_norm") and 0 < 10 * low < high:  # a high start would flatten all the rest
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_minor_formatter("")
            axis.yaxis.set_major_formatter(EngFormatter(sep="") if key == "tokens_per_second" else "{x:.4g}")
            if x == "tokens":
                axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2M
            axis.set_xlabel("tokens" if x == "tokens" else "steps")
            axis.set_title(PANELS[key] + " (points: validation)" * (f"val_{key}" in there), loc="left", fontsize=9)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        handles = [Line2D([], [], **look) for look in looks]
        columns = 3 if max(map(len, names)) < 30 else 1
        legend = figure.legend(handles, ["run"] * len(names), loc="outside upper center", ncols=columns, frameon=False)
        for text, name in zip(legend.get_texts(), names, strict=True):  # so neither a first _ nor a $ is special
            text.set(text=name, parse_math=False)
        figure.savefig(file, format=kind, dpi=150)


def main() -> None:
    parser = Parser(description="Plot the curves of runs.", allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="OUT_DIR", help="a run's folder, or its metrics.jsonl")
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="what stands on the x axis")
    parser.add_argument("--smooth", type=float, default=0.04, help="share of a run on either side to average; 0: none")
    parser.add_argument("--out", type=Path, help="a .png or .svg file (default: curves.png in the first run's folder)")
    args = parser.parse_args()
    if not 0 <= args.smooth <= 1:
        raise UserError(f"--smooth {args.smooth}: must lie between 0 and 1")
    first = args.runs[0]
    out = args.out or (first if first.is_dir() else first.parent) / "curves.png"
    if out.suffix not in (".png", ".svg"):
        raise UserError(f"--out {out}: must end in .png or .svg")
    runs = {str(path): read_metrics(path / "metrics.jsonl" if path.is_dir() else path) for path in args.runs}
    for path, lines in runs.items():
        if not PANELS.keys() & {key.removeprefix("val_") for line in lines for key in line}:
            raise UserError(f"{path}: its metrics.jsonl holds no line yet; wait for the first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("matplotlib is missing: pip install matplotlib") from None
    with atomic_write(out) as f:
        draw(runs, args.x, args.smooth, f, out.suffix[1:])
    print(f"wrote {out}")


if __name__ == "__main__":
    report_errors(main)
