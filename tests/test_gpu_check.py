"""runs/gpu_check.sh, as far as a CPU goes: its commands run; a check that fails does not stop the others."""

import pytest
from helpers import start_bash

# What stands for Python where only the order of the commands is tested: it notes them; pretraining fails.
FAKE_PYTHON = """#!/bin/sh
echo "$@" >> commands.txt
case "$*" in train.py*) exit 1;; esac
"""


@pytest.fixture(autouse=True)
def no_tests_for_a_gpu(project):
    path = project / "tests" / "test_cuda.py"
    path.parent.mkdir()
    path.write_text("def test_nothing(): pass\n")


@pytest.fixture
def fake_python(project):
    path = project / "bin" / "python"
    path.parent.mkdir()
    path.write_text(FAKE_PYTHON)
    path.chmod(0o755)


def gpu_check(project, *args):
    """Exit status, standard output and standard error."""
    process = start_bash(project, "runs/gpu_check.sh", *args)
    stdout, stderr = process.communicate(timeout=600)
    return process.returncode, stdout, stderr


@pytest.mark.long
def test_its_commands_run_on_a_cpu(project):
    status, stdout, stderr = gpu_check(project, "--device=cpu", "--quick")
    assert status == 0, stderr
    assert "1 passed" in stdout
    assert "resuming at step" in stdout  # the killed run
    for row in ("| compiled | 4 |", "| eager | 4 |", "| resumed | 40 |", "| sft | 10 |", "| dpo | 10 |"):
        assert row in stdout
    assert (project / "out" / "gpu_check" / "report.md").exists()


def test_a_check_that_fails_is_named_and_the_others_go_on(project, fake_python):
    status, _, stderr = gpu_check(project, "--device=cpu", "--quick")
    assert status == 1
    failed = "failed: [speed, compiled] [speed, not compiled] [a run killed] [and resumed]"
    assert stderr.splitlines()[-1] == failed
    commands = (project / "commands.txt").read_text()
    assert "-m pytest tests/test_cuda.py\n" in commands
    assert "-m tools.report" in commands.splitlines()[-1]


def test_an_unknown_option(project, fake_python):
    status, _, stderr = gpu_check(project, "--quik")
    assert status == 2 and "--quik" in stderr
    assert not (project / "out").exists()
