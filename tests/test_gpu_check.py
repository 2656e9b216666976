"""The script of GPU checks, as far as a CPU goes: it runs, records, and goes on after a failure."""

import json

import pytest
from conftest import ROOT, assert_one_line_error, script_here

from tools import gpu_check


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with the parts of the project that the checks read, so that they write nothing into the tree."""
    for name in ("common", "config", "stories", "tools", "tests", *(p.name for p in ROOT.glob("*.py"))):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(*args):
    return script_here(gpu_check.main, "gpu_check", "--device=cpu", "--quick", *args)


def test_checks_on_a_cpu(there):
    done = check("--only", "pipeline,train")
    assert done.returncode == 0, done.stderr
    found = json.loads((there / "out" / "gpu_check.json").read_text())
    assert found["device"] == "cpu" and found["train"]["compiled tokens_per_second"] > 0
    assert found["train"]["eager estimated_memory"] > 0 and found["train"]["eager mfu"] > 0
    assert found["pipeline"]["killed at step"] >= 10  # and it went on from there
    assert found["pipeline"]["run last loss"] < found["pipeline"]["run first loss"]
    assert (there / "out" / "gpu_check" / "run" / "ckpt_000020.pt").exists()
    assert (there / "out" / "gpu_check" / "run_dpo" / "ckpt_000005.pt").exists()


def test_a_check_that_fails_is_recorded(there):
    """Pretraining without its config: its error is in the file, the other check is run, the exit status is 2."""
    (there / "config").unlink()
    (there / "config").mkdir()
    done = check("--only", "pipeline,tests")
    assert_one_line_error(done, "1 of 2 checks failed", "pipeline")
    found = json.loads((there / "out" / "gpu_check.json").read_text())
    assert "microstories.py" in found["pipeline"]["error"] and "skipped" in found["tests"]["tests"]


def test_mistakes(there):
    assert_one_line_error(check("--only", "speed"), "speed", "train")
