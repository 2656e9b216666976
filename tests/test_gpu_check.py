"""The script of GPU checks, as far as a CPU goes: it runs, records, and goes on after a failure."""

import json

import pytest
from conftest import ROOT, assert_one_line_error, run_script


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with the parts of the project that the checks read, so that they write nothing into the tree."""
    for name in ("common", "config", "stories", "tools", "tests", *(p.name for p in ROOT.glob("*.py"))):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def check(there, *args):
    code = f"import os; os.chdir({str(there)!r}); import tools.gpu_check as g; g.report_errors(g.main)"
    return run_script("-c", code, "--device=cpu", "--quick", *args, check=False, PYTHONPATH=str(ROOT))


def test_checks_on_a_cpu(there):
    done = check(there, "--only", "pipeline,train")
    assert done.returncode == 0, done.stderr
    found = json.loads((there / "out" / "gpu_check.json").read_text())
    assert found["device"] == "cpu" and found["train"]["compiled tokens_per_second"] > 0
    assert found["train"]["eager estimated_memory"] > 0 and found["train"]["eager mfu"] > 0
    assert found["pipeline"]["killed at step"] >= 10  # and it went on from there
    assert found["pipeline"]["run last loss"] < found["pipeline"]["run first loss"]
    assert (there / "out" / "gpu_check" / "run" / "ckpt_000020.pt").exists()
    assert (there / "out" / "gpu_check" / "run_dpo" / "ckpt_000005.pt").exists()


def test_a_check_that_fails_is_recorded(there):
    """The tuning without its config: its error is in the file, the other check is run, the exit status is 2."""
    (there / "config").unlink()
    (there / "config").mkdir()
    (there / "config" / "microstories.py").symlink_to(ROOT / "config" / "microstories.py")
    done = check(there, "--only", "pipeline,train")
    assert_one_line_error(done, "1 of 2 checks failed", "pipeline")
    found = json.loads((there / "out" / "gpu_check.json").read_text())
    assert "microstories_sft.py" in found["pipeline"]["error"] and found["train"]["eager estimated_memory"] > 0


def test_mistakes(there):
    assert_one_line_error(check(there, "--only", "speed"), "speed", "train")
