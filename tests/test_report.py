"""The report of a pipeline: its parts, and what is refused."""

import importlib.util
import json

import pytest
from conftest import assert_one_line_error, metrics_of, script_here

import tools.report


def report(*args):
    return script_here(tools.report.main, "report", *args)


@pytest.fixture
def times(tmp_path):
    """The seconds of stages; fine-tune was stopped and resumed."""
    path = tmp_path / "times.tsv"
    path.write_text("pretrain\t61\nfine-tune\t30\nfine-tune\t40\n", encoding="utf-8")
    return path


def test_a_report(pretrained, tuned, times, tmp_path):
    out = tmp_path / "new" / "report.md"
    done = report(pretrained.parent, tuned, "--times", times, "--words", "太阳", "--out", out)
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    for part in (
        "## Hardware",
        "| PyTorch | ",
        "| pretrain | 1 min 1 s |",
        "| fine-tune | 1 min 10 s |",
        "词汇：太阳",
    ):
        assert part in text, part
    assert "| all | 2 min 11 s |" in text
    assert "## Evaluation" not in text  # no run has an eval.json
    lines = metrics_of(tuned)
    losses = [lines[0]["loss"], lines[-1]["loss"], lines[-1]["val_loss"]]
    cells = " | ".join(f"{loss:.3f}" for loss in losses)
    assert f"| out | 60 | {lines[-1]['tokens']:,} | {cells} |" in text
    assert cells in done.stdout
    if importlib.util.find_spec("matplotlib"):
        assert "![curves](report.png)" in text
        assert (tmp_path / "new" / "report.png").stat().st_size > 10_000


def test_older_runs_and_evaluations(pretrained, tmp_path):
    """metrics.jsonl had mfu; an eval.json is shown."""
    run = tmp_path / "old"
    run.mkdir()
    (run / pretrained.name).symlink_to(pretrained)
    lines = [line | {"mfu": 0.5, "peak_memory": 3 << 30} for line in metrics_of(pretrained.parent)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "eval.json").write_text(json.dumps({"examples": 1, "bits_per_char": 1.25}))
    done = report(run, "--out", tmp_path / "report.md")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| 3.00 GiB |" in text and "1.25" in text and "mfu" not in text


def test_reports_that_cannot_be(pretrained, tmp_path):
    out = tmp_path / "report.md"
    assert_one_line_error(report(tmp_path, "--out", out), tmp_path, "metrics.jsonl")
    (tmp_path / "metrics.jsonl").touch()
    assert_one_line_error(report(tmp_path, "--out", out), tmp_path, "no loss")
    (tmp_path / "times.tsv").write_text("pretrain\t1\npretrain 2\n")
    done = report(pretrained.parent, "--times", tmp_path / "times.tsv", "--out", out)
    assert_one_line_error(done, "times.tsv:2")
    assert not out.exists()
