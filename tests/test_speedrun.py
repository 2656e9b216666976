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
from conftest import ROOT


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the files that git would track, so that nothing is written into the tree that is tested."""
    folder = tmp_path_factory.mktemp("speedrun") / "project"
    ignore = shutil.ignore_patterns("__pycache__", ".*", "data", "out", "hf", "tests")
    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


def start(project, log):
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["bash", "runs/speedrun.sh", "--quick"]
    return subprocess.Popen(command, cwd=project, env=env, stdout=log, stderr=log, start_new_session=True)


def test_killed_and_run_again(project):
    pytest.importorskip("safetensors")
    with open(project / "log", "w+") as log:
        process = start(project, log)
        while process.poll() is None and not list((project / "out" / "quick_sft").glob("ckpt_*.pt")):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert list((project / "out" / "quick_sft").glob("ckpt_*.pt")), (project / "log").read_text()[-1000:]
        again = start(project, log)
        assert again.wait(timeout=600) == 0, (project / "log").read_text()[-1000:]
        log.seek(0)
        said = log.read()
    assert "Traceback" not in said and "resuming at step 24" in said
    assert said.count("== prepare\n") == 1 and said.count("== evaluate out/quick\n") == 1  # done is done
    report = (project / "out" / "quick_report.md").read_text(encoding="utf-8")
    for part in (
        "## Hardware",
        "| pretrain |",
        "| quick_sft | 24 |",
        "| quick_dpo | 24 |",
        "词汇：帽子，消防员",
    ):
        assert part in report, part
    for name in ("quick", "quick_sft", "quick_dpo"):
        metrics = json.loads((project / "out" / name / "eval.json").read_text())
        assert metrics["examples"] == 20 and f"{metrics['bits_per_char']:.2f}" in report
    assert (project / "hf" / "quick" / "model.safetensors").exists()
