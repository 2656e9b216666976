"""The whole real pipeline, quick: every command of runs/speedrun.sh, killed in the middle and run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT


@pytest.fixture
def project(tmp_path):
    """A copy of the project, so that nothing is written into the tree that is tested."""
    ignore = shutil.ignore_patterns("__pycache__", ".*", "data", "out", "hf", "tests")
    return shutil.copytree(ROOT, tmp_path / "project", ignore=ignore)


def start(project, log):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["bash", "runs/speedrun.sh", "--quick"]
    return subprocess.Popen(command, cwd=project, env=env, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.long
def test_it_goes_on_where_it_was_killed(project):
    pytest.importorskip("safetensors")
    out = project / "out"
    with open(project / "log", "w") as log:
        process = start(project, log)
        while process.poll() is None and not list(out.glob("quick_sft/ckpt_*.pt")):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        exit_status = start(project, log).wait(timeout=600)
    said = (project / "log").read_text(encoding="utf-8")
    assert exit_status == 0, said[-1000:]
    assert "Traceback" not in said
    assert "resuming at step 24" in said  # pretraining was over
    assert said.count("== prepare\n") == 1 and said.count("== evaluate out/quick\n") == 1

    report = (out / "quick_report.md").read_text(encoding="utf-8")
    rows = ("## Hardware", "| pretrain |", "| quick_sft | 24 |", "| quick_dpo | 24 |", "词汇：帽子，消防员")
    for row in rows:
        assert row in report
    for name in ("quick", "quick_sft", "quick_dpo"):
        metrics = json.loads((out / name / "eval.json").read_text())
        assert metrics["examples"] == 20
        assert f"{metrics['bits_per_char']:.2f}" in report
    assert (project / "hf" / "quick" / "model.safetensors").exists()
