"""runs/gpu_check.sh, as far as a CPU goes: its commands run; a check that fails does not stop the others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

# What stands for Python where only the order of the commands is tested: it notes them; pretraining fails.
FAKE_PYTHON = """#!/bin/sh
echo "$@" >> commands.txt
case "$*" in train.py*) exit 1;; esac
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the project, without the tests that only a GPU can run."""
    ignore = shutil.ignore_patterns("__pycache__", ".*", "data", "out", "hf", "tests")
    folder = shutil.copytree(ROOT, tmp_path / "project", ignore=ignore)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_cuda.py").write_text("def test_nothing(): pass\n")
    return folder


@pytest.fixture
def fake_python(project):
    path = project / "bin" / "python"
    path.parent.mkdir()
    path.write_text(FAKE_PYTHON)
    path.chmod(0o755)


def gpu_check(project, *args):
    path = f"{project}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["bash", "runs/gpu_check.sh", *args]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.long
def test_its_commands_run_on_a_cpu(project):
    done = gpu_check(project, "--device=cpu", "--quick")
    assert done.returncode == 0, done.stderr
    assert "1 passed" in done.stdout
    assert "resuming at step" in done.stdout  # the killed run
    for row in ("| compiled | 4 |", "| eager | 4 |", "| resumed | 40 |", "| sft | 10 |", "| dpo | 10 |"):
        assert row in done.stdout
    assert (project / "out" / "gpu_check" / "report.md").exists()


def test_a_check_that_fails_is_named_and_the_others_go_on(project, fake_python):
    done = gpu_check(project, "--device=cpu", "--quick")
    assert done.returncode == 1
    failed = "failed: [speed, compiled] [speed, not compiled] [a run killed] [and resumed]"
    assert done.stderr.splitlines()[-1] == failed
    commands = (project / "commands.txt").read_text()
    assert "-m pytest tests/test_cuda.py\n" in commands
    assert "-m tools.report" in commands.splitlines()[-1]


def test_an_unknown_option(project, fake_python):
    done = gpu_check(project, "--quik")
    assert done.returncode == 2 and "--quik" in done.stderr
    assert not (project / "out").exists()
