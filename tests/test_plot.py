"""`python -m tools.plot`: the curves of runs, from their metrics.jsonl.

A panel for each metric that a run has, a colour for each run: a pale line of what was measured, a strong one
of its average, a point for each validation. The order: the picture, the lines it is made of, mistakes.
"""

import html
import re
import sys
from collections import Counter

import pytest
from helpers import assert_refused, run_here, run_script

from tools import plot

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # for a character that no font has
BLUE, ORANGE = plot.COLOURS[:2]
LINE = '{"step": 1, "tokens": 10000, "loss": 2.0}'


def write_run(folder, *lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", LINE)


def drawn(*args):
    """The texts of a picture, and how many lines and points of each colour it has."""
    out = args[0].parent / "curves.svg"
    run_here(plot, *args, "--out", out)
    svg = out.read_text(encoding="utf-8")
    texts = [html.unescape(text) for text in re.findall("<text[^>]*>([^<]*)<", svg)]
    lines = re.findall("clip-path=[^>]*stroke: (#[0-9a-f]+)", svg)
    points = re.findall("<use [^>]*fill: (#[0-9a-f]+)", svg)
    return texts, Counter(lines), Counter(points)


# ---- The picture -----------------------------------------------------------------------------------


def test_the_command(run):
    """As a user types it: a picture beside the metrics, for a README two columns wide."""
    done = run_script("-m", "tools.plot", run)
    assert done.stdout == f"wrote {run / 'curves.png'}\n"
    picture = (run / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and int.from_bytes(picture[16:20], "big") == 1200
    assert {path.name for path in run.iterdir()} == {"curves.png", "metrics.jsonl"}


def test_several_runs(pretrained, tmp_path):
    """What only one has is drawn too; what none has is no panel. The learning rate needs no average."""
    lines = ['{"step": 1, "tokens": 10000, "val_loss": 2.0}']
    lines += ['{"step": 9, "tokens": 20000, "loss": 0.7, "accuracy": 0.5, "val_accuracy": 0.4}'] * 9
    dpo = write_run(tmp_path / "dpo", *lines)
    texts, lines, points = drawn(pretrained.parent, dpo, "--x", "tokens", "--smooth", 0.2)
    panels = ["loss (points: validation)", "learning rate", "gradient norm", "tokens a second"]
    panels.append("accuracy on pairs (points: validation)")
    assert [text for text in texts if text in panels] == panels
    assert texts.count("tokens") == 5 and {str(pretrained.parent), str(dpo)} <= set(texts)
    assert lines[BLUE] == 4 + 3 and lines[ORANGE] == 2 + 2
    assert points[BLUE] == 2 and points[ORANGE] == 1 + 9


def test_a_high_start_does_not_flatten_the_rest(tmp_path):
    """Nor is a formula made of a name."""
    name = "a$b$c_d^e & <f>"
    if len(plot.fonts()) > 1:  # one with Chinese characters is installed here
        name += "小兔"
    lines = [LINE.replace("2.0", loss) for loss in ("9", "4", "2", "1", "0.5", "0.3")]
    run = write_run(tmp_path / name, *lines)
    texts, *_ = drawn(run)
    assert {str(run), "5", "2", "1", "0.5"} <= set(texts)


def test_a_single_value_is_a_point(run):
    _, _, points = drawn(run)
    assert points[BLUE] == 1


# ---- The lines it is made of -----------------------------------------------------------------------


def test_the_points_of_a_line():
    """Of the lines that have the metric, over steps or tokens."""
    lines = [{"step": 1, "tokens": 9, "loss": 2.5}, {"step": 2, "tokens": 18}]
    assert plot.points_of(lines, "tokens", "loss") == ([9], [2.5])


def test_an_average_has_as_many_neighbours_on_either_side():
    assert plot.smoothed([0, 3, 0, 6, 12], 1) == [0, 1, 3, 6, 12]
    assert plot.smoothed([0, 3, 0, 7, 15], 9) == [0, 1, 5, 22 / 3, 15]


def test_a_run_that_is_still_writing(tmp_path):
    """The gradient of a step overflowed, and the last line is not whole yet."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "tokens": 9, "grad_norm": null}\n{"step": 2, "tok')
    assert plot.read_metrics(path) == [{"step": 1, "tokens": 9}]


@pytest.mark.parametrize("damage", ["no JSON", "[1]", '{"step": 1}', ""])
def test_damaged_metrics(damage, tmp_path):
    run = write_run(tmp_path / "run", LINE, damage, LINE)
    assert_refused(plot, [run], "metrics.jsonl:2: not a line of metrics; remove it")


# ---- Mistakes of the user --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        "--out=a.gif",
        "--out=none/a.png",
        "--smooth=-0.1",
        "--smooth=1.5",
        "--x=loss",
    ],
)
def test_bad_options(option, run):
    assert_refused(plot, [run, option], option.split("=")[1])


def test_what_is_not_there(run, tmp_path, monkeypatch):
    assert_refused(plot, [], "--help")
    assert_refused(plot, [tmp_path], "metrics.jsonl")
    assert_refused(plot, [run, write_run(tmp_path / "empty")], tmp_path / "empty", "no line")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert_refused(plot, [run], "pip install matplotlib")
