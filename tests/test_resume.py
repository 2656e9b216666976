"""The promise that nothing is lost: a run that was stopped, killed or split ends as the one that was not."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, metrics_of, run_script, tiny

from model import find_checkpoints, read_checkpoint


def same(a, b):
    """Whether two checkpoints' contents are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(out_a, out_b):
    """Weights, optimizers, step and random state are equal, and so is every measured line but its times."""
    a, b = read_checkpoint(out_a), read_checkpoint(out_b)
    for key in ("model", "optimizers", "scaler", "step", "sequences", "random_state", "tokenizer"):
        assert same(a[key], b[key]), key
    clock = {"tokens_per_second", "mfu", "peak_memory"}
    lines = [[{k: v for k, v in line.items() if k not in clock} for line in metrics_of(out)] for out in (out_a, out_b)]
    assert lines[0] == lines[1]


def start(data, out, **changes):
    command = [sys.executable, "train.py", *tiny(data_dir=data, out_dir=out, resume=True, **changes)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("changes", [
    {"optimizer": "adamw", "dtype": "float32", "schedule": "cosine"},
    {"optimizer": "muon", "dtype": "bfloat16", "gradient_accumulation_steps": 2, "document_mask": True},
    {"optimizer": "muon", "dtype": "float16"},
])  # fmt: skip
def test_resume_is_exact(tiny_data, tmp_path, changes):
    """Stopped after step 8 of 12 (the two newest checkpoints then), damaged, resumed: the same bits."""
    run_script("train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path / "whole", **changes))
    run_script("train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path / "again", **changes))
    assert_same_run(tmp_path / "whole", tmp_path / "again")
    newest = find_checkpoints(tmp_path / "again")[0]
    assert newest.name == "ckpt_000012.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    done = run_script("train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path / "again", resume=True, **changes))
    assert "taking the one before" in done.stderr and "resuming at step 8" in done.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "again")


def test_resume_is_exact_when_compiled(tiny_data, tmp_path):
    """Two threads and torch.compile add in any order, unless deterministic."""
    changes = {"compile": True, "deterministic": True, "max_iters": 8, "eval_interval": 8}
    for out in ("whole", "again"):
        args = tiny(data_dir=tiny_data, out_dir=tmp_path / out, **changes)
        run_script("train.py", *args, OMP_NUM_THREADS="2")
    find_checkpoints(tmp_path / "again")[0].unlink()
    args = tiny(data_dir=tiny_data, out_dir=tmp_path / "again", resume=True, **changes)
    assert "resuming at step 4" in run_script("train.py", *args, OMP_NUM_THREADS="2").stdout
    assert_same_run(tmp_path / "whole", tmp_path / "again")


def test_kill_at_any_moment(tiny_data, tmp_path):
    """kill -9 again and again, most often while it saves; the run that gets through is the unhurt one."""
    changes = {"save_interval": 1, "log_interval": 1, "eval_interval": 20, "max_iters": 40}
    run_script("train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path / "whole", **changes))
    rng, kills = random.Random(0), 0
    for _ in range(12):
        process = start(tiny_data, tmp_path / "hurt", **changes)
        seen = len(find_checkpoints(tmp_path / "hurt")) and find_checkpoints(tmp_path / "hurt")[0].name
        while process.poll() is None:  # wait until it has saved something new, then a random moment more
            newest = find_checkpoints(tmp_path / "hurt")
            if newest and newest[0].name != seen:
                time.sleep(rng.random() * 0.15)
                process.kill()
                break
            time.sleep(0.01)
        kills += process.wait() == -signal.SIGKILL
    run_script("train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path / "hurt", resume=True, **changes))
    assert kills >= 3
    assert_same_run(tmp_path / "whole", tmp_path / "hurt")
    assert {p.name for p in (tmp_path / "hurt").iterdir()} == {"ckpt_000039.pt", "ckpt_000040.pt", "metrics.jsonl"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(tiny_data, tmp_path, number):
    changes = {"max_iters": 3000, "eval_interval": 5000, "save_interval": 5000, "log_interval": 1}
    process = start(tiny_data, tmp_path / "out", **changes)
    deadline = time.time() + 120
    while time.time() < deadline:
        if (tmp_path / "out" / "metrics.jsonl").exists() and len(metrics_of(tmp_path / "out")) > 3:
            break
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    step = read_checkpoint(tmp_path / "out")["step"]
    assert 3 < step < 3000 and f"saved at step {step}" in output and "--resume=True" in output
    args = tiny(data_dir=tiny_data, out_dir=tmp_path / "out", resume=True, **changes | {"max_iters": step + 5})
    run_script("train.py", *args)
    run_script(
        "train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path / "whole", cooldown=0, **changes | {"max_iters": 3})
    )
    steps = [line["step"] for line in metrics_of(tmp_path / "out") if "loss" in line]
    assert steps == list(range(1, step + 6))


def test_two_processes_train_as_one(tiny_data, tmp_path):
    """torchrun with two processes has the loss curve of one, to rounding, and resumes as one."""
    changes = {"gradient_accumulation_steps": 2, "dtype": "float32"}
    run_script("train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path / "one", **changes))
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29511", "train.py")
    run_script(*torchrun, *tiny(data_dir=tiny_data, out_dir=tmp_path / "two", **changes))
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        for key in {"loss", "grad_norm", "val_loss", "val_bits_per_character"} & set(a):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (key, a, b)
    find_checkpoints(tmp_path / "two")[0].unlink()
    run_script("train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path / "two", resume=True, **changes))
    a, b = (read_checkpoint(tmp_path / out)["model"] for out in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
