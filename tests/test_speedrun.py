"""The whole real pipeline, quick: every command of runs/speedrun.sh, killed in the middle and run again."""

import json
import os
import signal
import time

import pytest
from helpers import start_bash


@pytest.mark.long
def test_it_goes_on_where_it_was_killed(project):
    pytest.importorskip("safetensors")
    out = project / "out"
    command = ("runs/speedrun.sh", "--quick")
    killed = start_bash(project, *command)
    said = ""
    for line in killed.stdout:
        said += line
        if line == "== fine-tune\n":
            break
    while killed.poll() is None and not list(out.glob("quick_sft/ckpt_*.pt")):
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = start_bash(project, *command)
    stdout, stderr = again.communicate(timeout=600)
    assert again.returncode == 0, stderr[-1000:]
    said += stdout
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
