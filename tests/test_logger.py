"""`logger`: what TensorBoard and wandb are given is what metrics.jsonl holds."""

import json
import os
import signal
import struct
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from helpers import ROOT, assert_one_line_error, metrics_of, run_here, run_script, tiny

import train
from common.checkpoint import find_checkpoints

needs_tensorboard = pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
needs_wandb = pytest.mark.skipif(not find_spec("wandb"), reason="wandb is not installed")


def arguments(data_dir, out_dir, logger, **changes):
    return tiny(data_dir=data_dir, out_dir=out_dir, logger=logger, **changes)


def scalars(folder):
    """What TensorBoard shows of a run: [(name, step, value)], sorted."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return sorted((name, e.step, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name))


def figures(folder):
    """The same of metrics.jsonl, in the float32 that TensorBoard keeps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sorted(
        (name, line["step"], np.float32(x)) for line in lines for name, x in line.items() if name != "step"
    )


@needs_tensorboard
def test_tensorboard_shows_metrics(tiny_data, tmp_path):
    done = run_here(train, *arguments(tiny_data, tmp_path / "out", "tensorboard"))
    assert done.returncode == 0, done.stderr
    shown = scalars(tmp_path / "out")
    assert shown == figures(tmp_path / "out")
    assert {("loss", 2), ("val_loss", 6), ("learning_rate", 12)} <= {(name, step) for name, step, _ in shown}


@needs_tensorboard
def test_tensorboard_after_a_kill(tiny_data, tmp_path):
    """Killed past its last checkpoint, the run goes on from that one: the steps between are shown once."""
    out = tmp_path / "out"
    options = arguments(tiny_data, out, "tensorboard", max_iters=20, log_interval=1, save_interval=8)
    code = "import os, signal, train\nstart = train.run.start_log\n"
    code += "def killed(s, step):\n    log = start(s, step)\n"
    code += "    return lambda line: (log(line), line['step'] < 13 or os.kill(os.getpid(), signal.SIGKILL))\n"
    code += "train.run.start_log = killed\ntrain.report_errors(train.main)"
    done = run_script("-c", code, *options, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (
        max(step for _, step, _ in scalars(out)) == 13 and find_checkpoints(out)[0].name == "ckpt_000008.pt"
    )
    assert scalars(out) == figures(out)  # the kill took nothing
    run_script(
        "train.py", *options, "--resume=True"
    )  # in a later second, by which TensorBoard orders its files
    assert scalars(out) == figures(out)
    assert [step for name, step, _ in scalars(out) if name == "loss"] == list(range(1, 21))


@needs_tensorboard
def test_only_the_first_process_logs(tiny_data, tmp_path):
    options = arguments(tiny_data, tmp_path / "out", "tensorboard", gradient_accumulation_steps=2)
    run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *options)
    assert scalars(tmp_path / "out") == figures(tmp_path / "out")


@needs_tensorboard
def test_the_logger_may_change(tiny_data, tmp_path):
    out = tmp_path / "out"
    for last, logger in ((4, ""), (8, "tensorboard"), (12, "")):
        done = run_here(train, *arguments(tiny_data, out, logger, max_iters=last), "--resume=True")
        assert done.returncode == 0, done.stderr
    assert scalars(out) == [figure for figure in figures(out) if 4 < figure[1] <= 8]


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_without_the_package(logger, tiny_data, tmp_path):
    code = f"import sys; sys.modules[{logger!r}] = None\nimport train; train.report_errors(train.main)"
    options = arguments(tiny_data, tmp_path / "out", logger)
    assert_one_line_error(run_script("-c", code, *options, check=False), "logger", logger)
    assert not metrics_of(tmp_path / "out") and not find_checkpoints(tmp_path / "out")


def test_unknown_logger(tmp_path):
    done = run_here(train, "--logger=tensorbord", f"--out_dir={tmp_path / 'out'}", check=False)
    assert_one_line_error(done, "logger", "'tensorboard'", "'wandb'")


# ---------------------------------------------------------------------------------------------------
# wandb, offline: a run is a file of records in blocks of 32 KiB, in the format of LevelDB's log


def history(path):
    """The lines logged to one run file of wandb, by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, lines = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if (room := -at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a record in one piece, or its last piece
            record, whole = Record.FromString(whole), b""
            if record.HasField("history"):
                line = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                lines[line["_step"]] = {name: value for name, value in line.items() if name[0] != "_"}
    return lines


@needs_wandb
def test_wandb_offline(tiny_data, tmp_path):
    """Two runs, the second of which resumes the first: under one id, all lines of metrics.jsonl."""
    out = tmp_path / "out"
    for last in (8, 12):
        options = arguments(tiny_data, out, "wandb", max_iters=last)
        run_script("train.py", *options, "--resume=True", WANDB_MODE="offline")
    first, second = sorted(out.glob("wandb/offline-run-*/run-*.wandb"))
    assert first.name == second.name == f"run-{(out / 'wandb_id').read_text()}.wandb"
    expected = {}
    for line in metrics_of(out):
        expected.setdefault(line["step"], {}).update(line)
    one, other = history(first), history(second)
    assert max(one) == 8 and min(other) == 10
    assert one | other == expected


@needs_wandb
def test_wandb_that_cannot_start(tiny_data, tmp_path):
    """Nobody is logged in, nobody is there to ask: one line says so before the first step."""
    home = {name: str(tmp_path) for name in ("HOME", "WANDB_CONFIG_DIR", "NETRC")}
    home |= {"WANDB_MODE": "online", "WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "train.py", *arguments(tiny_data, tmp_path / "out", "wandb")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert_one_line_error(done, "logger", "wandb login")
