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
    code = f"import os, sys; os.chdir({str(there)!r}); import tools.gpu_check as g; g.run(g.main)"
    return run_script("-c", code, "--device=cpu", "--quick", *args, check=False, PYTHONPATH=str(ROOT))


def test_checks_on_a_cpu(there):
    pytest.importorskip("transformers")
    done = check(there, "--only", "memory,pipeline,export")
    assert done.returncode == 0, done.stderr
    found = json.loads((there / "out" / "gpu_check.json").read_text())
    assert found["device"] == "cpu" and found["memory"]["batch 4 estimated_memory"] > 0
    assert found["pipeline"]["killed at step"] >= 10  # and it went on from there
    assert found["pipeline"]["run last loss"] < found["pipeline"]["run first loss"]
    assert (there / "out" / "gpu_check" / "run" / "ckpt_000020.pt").exists()
    assert found["export"]["largest difference of logits"] < 1e-4


def test_a_check_that_fails_is_recorded(there):
    """The export without the run it needs: its error is in the file, the other check is run, the exit status is 2."""
    done = check(there, "--only", "export,memory")
    assert_one_line_error(done, "1 of 2 checks failed", "export")
    found = json.loads((there / "out" / "gpu_check.json").read_text())
    assert "pipeline" in found["export"]["error"] and found["memory"]["batch 2 estimated_memory"] > 0


def test_mistakes(there):
    assert_one_line_error(check(there, "--only", "speed"), "speed", "train")
