"""The curves of runs: what is drawn, under which names, and what is refused."""

import json
import shutil
import struct
import sys
import warnings
import xml.etree.ElementTree as ET

import pytest
from conftest import assert_one_line_error, metrics_of, run_script, script_here

import tools.plot

pytest.importorskip("matplotlib")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def story_run(pretrained, tmp_path):
    """A copy of a run of train.py: its metrics, as train.py wrote them."""
    (tmp_path / "story").mkdir()
    return shutil.copy(pretrained.parent / "metrics.jsonl", tmp_path / "story") and tmp_path / "story"


def plot(*args):
    """Run the tool here; what matplotlib warns of, a character no font has above all, fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return script_here(tools.plot.main, "tools/plot.py", *args)


def drawn(*args):
    """The SVG of these arguments: its texts, and how many lines and points there are of each colour."""
    out = args[0].parent / "curves.svg"
    done = plot(*args, "--out", out)
    assert done.returncode == 0 and done.stdout == f"wrote {out}\n", done.stderr
    root = ET.parse(out).getroot()
    texts = ["".join(text.itertext()).strip() for text in root.iter(f"{SVG}text")]
    lines = [path.get("style", "") for path in root.iter(f"{SVG}path") if path.get("clip-path")]
    points = [use.get("style", "") for use in root.iter(f"{SVG}use")]
    return (
        texts,
        [sum(f"stroke: {colour}" in style for style in lines) for colour in tools.plot.COLOURS],
        [sum(f"fill: {colour}" in style for style in points) for colour in tools.plot.COLOURS],
    )


def write_metrics(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(step, **figures):
    return {"step": step, "tokens": step * 4096} | figures


def test_the_command(story_run):
    """As a user runs it: a picture beside the metrics, for a README two columns wide."""
    done = run_script("-m", "tools.plot", story_run)
    assert done.stdout == f"wrote {story_run / 'curves.png'}\n"
    picture = (story_run / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", picture[16:24]) == (1200, 750)
    assert sorted(p.name for p in story_run.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_what_is_drawn(story_run):
    """Four panels; raw and smoothed lines, a point for each validation."""
    texts, lines, points = drawn(story_run, "--smooth", 0.2)
    for title in ("loss (points: validation)", "learning rate", "gradient norm", "tokens a second", "step"):
        assert title in texts
    assert texts.count("step") == 4 and texts.count(str(story_run)) == 1
    assert lines == [4 + 3, 0, 0, 0, 0, 0]  # the learning rate needs no smoothing
    n_validations = 1 + sum(
        "val_loss" in line for line in metrics_of(story_run)
    )  # and one before the first step
    assert points == [n_validations, 0, 0, 0, 0, 0] and n_validations > 1
    assert drawn(story_run, "--smooth", 0)[1] == [4, 0, 0, 0, 0, 0]


def test_several_runs(story_run, tuned):
    texts, lines, points = drawn(story_run, tuned, "--x", "tokens", "--smooth", 0.2)
    assert texts.count("tokens") == 4 and {str(story_run), str(tuned)} <= set(texts)
    assert lines == [7, 7, 0, 0, 0, 0] and points[1] == 4
    assert any(text.endswith("k") for text in texts)  # 20k tokens


def test_other_figures(tmp_path, story_run):
    """A run of dpo.py has panels of its own; what no run has, no panel."""
    dpo = write_metrics(tmp_path / "dpo", *(line(n, loss=0.7, accuracy=0.5, margin=-0.1 * n) for n in range(9)),
                        line(9, loss=0.7, val_loss=0.7, val_accuracy=0.5))  # fmt: skip
    texts, lines, points = drawn(dpo, "--smooth", 0)
    assert {"accuracy on pairs (points: validation)", "reward margin (points: validation)"} <= set(texts)
    assert lines[0] == 3 and points[0] == 2 and "learning rate" not in texts
    texts, lines, _ = drawn(story_run, dpo, "--smooth", 0)
    assert {"reward margin (points: validation)", "learning rate"} <= set(texts) and lines[:2] == [4, 3]


def test_few_points(tmp_path):
    """One point is seen."""
    texts, _, points = drawn(write_metrics(tmp_path / "one", line(10, loss=2.0)))
    assert "loss (points: validation)" in texts and points[0] == 1


def test_a_high_start_does_not_flatten_the_rest(tmp_path):
    texts, *_ = drawn(write_metrics(tmp_path / "a", *(line(n, loss=9 / n) for n in range(1, 31))))
    assert {"5", "2", "1", "0.5"} <= set(texts)


@pytest.mark.parametrize("name", ["a$b$c", "小兔", "a_b^c", "a & <b>"])
def test_names_are_literal(name, tmp_path):
    """None is a formula. A Chinese one needs a font that is installed here."""
    if not name.isascii() and len(tools.plot.fonts()) == 1:
        pytest.skip("no Chinese font here")
    folder = write_metrics(tmp_path / name, line(1, loss=2.0), line(2, loss=1.0))
    assert str(folder) in drawn(folder)[0]
    assert plot(folder).returncode == 0


def test_a_run_that_is_still_writing(story_run):
    """The last line is not whole yet, and the gradient of a step overflowed."""
    before = drawn(story_run)
    with open(story_run / "metrics.jsonl", "a") as f:
        f.write(json.dumps(line(21, grad_norm=None)) + '\n{"step": 22, "tok')
    assert drawn(story_run)[1:] == before[1:]


def test_files_of_older_versions(tmp_path):
    """They have mfu, which is no longer drawn."""
    texts, lines, _ = drawn(
        write_metrics(tmp_path / "old", line(1, loss=2.0, mfu=0.5), line(2, loss=1.0, mfu=0.5))
    )
    assert "loss (points: validation)" in texts and lines[0] == 1


@pytest.mark.parametrize("damage", ["no JSON\n", "[1]\n", '{"step": 1}\n', "\n"])
def test_damaged_metrics(damage, story_run):
    metrics = story_run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + damage + whole)
    number = whole.count("\n") + 1
    assert_one_line_error(plot(story_run), f"{metrics}:{number}")
    assert not (story_run / "curves.png").exists()


def test_what_is_refused(story_run, tmp_path, monkeypatch):
    empty = write_metrics(tmp_path / "empty")
    assert_one_line_error(plot(story_run, empty), empty, "no line")
    assert_one_line_error(plot(tmp_path / "none"), "none")
    assert_one_line_error(plot(tmp_path), "metrics.jsonl")
    assert_one_line_error(plot(story_run, "--out", tmp_path / "a.gif"), "a.gif", ".svg")
    assert_one_line_error(plot(story_run, "--out", tmp_path / "none" / "a.png"), "none")
    for smooth in ("-0.1", "1.5", "nan", "x"):
        assert_one_line_error(plot(story_run, f"--smooth={smooth}"), "--smooth")
    assert_one_line_error(plot(), "--help")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert_one_line_error(plot(story_run), "pip install matplotlib")
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == []
