"""`python -m tools.report`: a pipeline of runs as one page of Markdown.

Hardware, the time of each stage, losses and speed, curves, the metrics of tools.eval where a run has them,
and two stories of each run.
"""

import importlib.util

import pytest
from helpers import assert_refused, run_here

from tools import report


@pytest.fixture
def times(tmp_path):
    """The seconds of stages; fine-tune was stopped and resumed."""
    path = tmp_path / "times.tsv"
    path.write_text("pretrain\t61\nfine-tune\t30\nfine-tune\t40\n")
    return path


def test_a_report(pretrained, tuned, times, tmp_path):
    out = tmp_path / "new" / "report.md"
    runs = [pretrained.parent, tuned]
    done = run_here(report, *runs, "--times", times, "--words", "太阳", "--out", out)
    text = out.read_text(encoding="utf-8")
    for part in ("| PyTorch | ", "| fine-tune | 1 min 10 s |", "| all | 2 min 11 s |", "`out` 词汇：太阳 ("):
        assert part in text
    assert report.training_table(runs) in text and report.training_table(runs) in done.stdout
    assert text.count("\n\n> ") == 4  # two stories each
    assert "## Evaluation" not in text  # no run has an eval.json
    if importlib.util.find_spec("matplotlib"):
        assert "![curves](report.png)" in text and out.with_suffix(".png").exists()


METRICS = """\
{"step": 1, "tokens": 1000, "loss": 9.5, "tokens_per_second": 2000, "peak_memory": 3221225472, "mfu": 0.5}
{"step": 2, "tokens": 2000, "loss": 8.5, "tokens_per_second": 4000, "peak_memory": 1073741824, "mfu": 0.5}
{"step": 2, "tokens": 2000, "val_loss": 8.25, "val_bits_per_character": 4.75}
{"step": 3, "tokens": 3000, "loss": 7.5, "tokens_per_second": 9000, "peak_memory": 1073741824, "mfu": 0.5}
"""


def test_the_lines_of_a_run(pretrained, tmp_path):
    """The last losses, the median of the speed, the most memory, and eval.json; mfu is of older versions."""
    (tmp_path / pretrained.name).symlink_to(pretrained)
    (tmp_path / "metrics.jsonl").write_text(METRICS)
    (tmp_path / "eval.json").write_text('{"examples": 1, "words": 0.5, "bits_per_char": 1.25}')
    run_here(report, tmp_path, "--out", tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| 3 | 3,000 | 9.500 | 7.500 | 8.250 | 4.750 | 4,000 | 3.00 GiB |" in text
    assert "| required words present | 50.0% |" in text and "of references | 1.25 |" in text


def test_reports_that_cannot_be(pretrained, times, tmp_path):
    out = ["--out", tmp_path / "report.md"]
    assert_refused(report, [tmp_path, *out], tmp_path, "metrics.jsonl")
    (tmp_path / "metrics.jsonl").touch()
    assert_refused(report, [tmp_path, *out], tmp_path, "no loss")
    times.write_text("pretrain\t1\npretrain 2\n")
    assert_refused(report, [pretrained.parent, "--times", times, *out], "times.tsv:2")
    assert not (tmp_path / "report.md").exists()
