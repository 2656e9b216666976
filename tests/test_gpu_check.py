"""The script of GPU checks, as far as a CPU goes: its commands run, and a check that fails does not stop the
others.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture
def project(tmp_path):
    """A copy of the project, without the tests that only a GPU can run."""
    folder = tmp_path / "project"
    ignore = shutil.ignore_patterns("__pycache__", ".*", "data", "out", "hf", "tests")
    shutil.copytree(ROOT, folder, ignore=ignore)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_cuda.py").write_text("def test_nothing(): pass\n")
    return folder


def gpu_check(project, *args):
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["bash", "runs/gpu_check.sh", *args]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=600)


def test_on_a_cpu(project):
    done = gpu_check(project, "--device=cpu", "--quick")
    assert done.returncode == 0, done.stderr
    assert "1 passed" in done.stdout
    assert "resuming at step" in done.stdout  # the killed run
    report = (project / "out" / "gpu_check" / "report.md").read_text(encoding="utf-8")
    for row in ("| compiled | 4 |", "| eager | 4 |", "| resumed | 40 |", "| sft | 10 |", "| dpo | 10 |"):
        assert row in report and row in done.stdout, row


def test_the_other_checks_go_on(project):
    """Without its config no training begins; the CUDA tests were run, and the last line names what failed."""
    (project / "config" / "microstories.py").unlink()
    done = gpu_check(project, "--device=cpu", "--quick")
    assert done.returncode == 1
    assert "1 passed" in done.stdout
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("failed: [speed, compiled]")
    assert "[a run killed]" in last_line and "[CUDA tests]" not in last_line


def test_an_unknown_option(project):
    done = gpu_check(project, "--quik")
    assert done.returncode == 2 and "--quik" in done.stderr
    assert not (project / "out").exists()
