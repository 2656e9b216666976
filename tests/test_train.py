"""train.py: what a run leaves, how it continues after a stop, and its steps beside plain references.

The promises:
- a run leaves its two newest checkpoints and a log, and prints its settings;
- Ctrl-C, SIGTERM, a kill or a full disk lose nothing: with --resume=True the run ends with the same bits;
- a step is that of a slow loop in float64, however it is cut into micro-batches, on two processes too;
- every sequence comes once an epoch, in an order that depends on the seed and the epoch alone;
- a run that diverges ends, and its last good checkpoint stays;
- a mistake is one line that says what to do, and changes no file.

The order: a whole run, stopped and resumed, steps, learning rates, data, evaluation, losses that are not
finite, two processes, types and compilation, files, bad input.
"""

import ast
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SHAPE,
    TINY,
    as_two_processes,
    assert_one_line_error,
    assert_refused,
    copy_files,
    lines_of,
    meta_of,
    metrics_of,
    reseal,
    run_here,
    run_script,
    same,
    same_state,
    start_script,
    strong_model,
    tiny,
    wait_for_step,
)

import train
from common import checkpoint, run
from common.checkpoint import build_model, find_checkpoints, read_checkpoint, try_compile
from common.files import UserError, atomic_write, load_tokenizer, locked
from model import GPT, IGNORE, ModelConfig
from train import Settings, TokenDataset

CPU = torch.device("cpu")


@pytest.fixture
def arguments(tiny_data, tmp_path):
    """The arguments of a small run in tmp_path, with changes."""

    def arguments(**changes):
        return tiny(data_dir=tiny_data, out_dir=tmp_path, **changes)

    return arguments


def files_of(folder):
    """The files of a folder and what they hold, but for the lock."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files.pop("lock", None)
    return files


def first_line(folder):
    """That of the evaluation before the first step."""
    with open(folder / "metrics.jsonl") as f:
        return json.loads(f.readline())


# ---- A whole run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """A run of 12 steps, in a folder where a killed one has left lines and half a checkpoint."""
    out = tmp_path_factory.mktemp("whole") / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 0, "val_loss": 9.0}\n{"step": 2, "lo')
    (out / "ckpt_000003.pt.tmp").write_bytes(b"half")
    settings = TINY | {"data_dir": str(tiny_data), "log_interval": 5}
    done = run_here(train, *tiny(out_dir=out, **settings))
    return SimpleNamespace(out=out, settings=settings, stdout=done.stdout)


def test_a_run_prints_its_settings_and_what_follows(whole, tiny_data):
    printed = {}
    for line in whole.stdout.splitlines():
        key, _, value = line.partition(" = ")
        if key in Settings.__dataclass_fields__:
            printed[key] = ast.literal_eval(value)
    assert printed == dataclasses.asdict(Settings(out_dir=str(whole.out), **whole.settings))
    saved = read_checkpoint(whole.out)
    assert saved["settings"] == printed
    parameters = sum(weight.numel() for weight in saved["model"].values())
    sequences = (meta_of(tiny_data)["train"]["tokens"] - 1) // 32
    for line in (
        f"{parameters:,} parameters, cpu, float32, 128 tokens a step",
        f"12 steps are {12 * 4 / sequences:.1f} epochs of {sequences:,} sequences",
        "starting from the beginning",
        "finished and saved at step 12",
    ):
        assert line in whole.stdout.splitlines()
    assert "step 12: validation loss" in whole.stdout
    assert "warm-up" not in whole.stdout


def test_a_run_leaves_its_two_newest_checkpoints_and_a_log(whole, tiny_data):
    names = ["ckpt_000008.pt", "ckpt_000012.pt", "lock", "metrics.jsonl"]
    assert sorted(path.name for path in whole.out.iterdir()) == names
    tokenizer = (tiny_data / "tokenizer.model").read_bytes()
    for step in (8, 12):
        saved = torch.load(whole.out / f"ckpt_{step:06d}.pt", weights_only=True)
        assert saved["step"] == step
        assert saved["tokenizer"] == tokenizer
        assert saved["data"] == meta_of(tiny_data)["train"]
        assert saved["prompt"] == [load_tokenizer(tokenizer, "").eos_id()]


def test_the_log_begins_anew_and_has_a_line_for_every_interval(whole, tiny_data):
    first = first_line(whole.out)
    assert first["step"] == first["tokens"] == 0
    vocab_size = meta_of(tiny_data)["vocab_size"]
    assert first["val_loss"] == pytest.approx(math.log(vocab_size), rel=0.02)
    lines = metrics_of(whole.out)
    # every 5 steps, and where it evaluates (every 6) or saves (every 4)
    assert [line["step"] for line in lines] == [4, 5, 6, 8, 10, 12]
    for line in lines:
        names = {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
        if line["step"] % 6 == 0:
            names |= {"val_loss", "val_perplexity", "val_bits_per_character"}
        assert line.keys() == names
        assert min(line.values()) > 0
        assert line["tokens"] == line["step"] * 4 * 32
    # Warm-up over 2 steps, a hold, then from step 8 of 12 down in a line.
    rates = [line["learning_rate"] / 0.003 for line in lines]
    assert rates == pytest.approx([1, 1, 1, 1, 3 / 5, 1 / 5])


def test_a_model_learns_what_follows_what(arguments, tiny_data, tmp_path):
    """The validation loss falls well below the entropy of single tokens, in less than an epoch."""
    settings = {"epochs": 0.9, "batch_size": 16, "learning_rate": 0.02}
    run_here(train, *arguments(**settings, eval_interval=1000, save_interval=1000))
    tokens = np.fromfile(tiny_data / "val.bin", dtype="<u2")
    _, counts = np.unique(tokens, return_counts=True)
    share = counts / len(tokens)
    entropy = -(share * np.log(share)).sum()
    last = metrics_of(tmp_path)[-1]
    assert last["val_loss"] < entropy - 0.4
    assert last["tokens"] == pytest.approx(0.9 * meta_of(tiny_data)["train"]["tokens"], rel=0.02)


def test_the_speed_is_that_of_training_alone(tiny_data, tmp_path, monkeypatch):
    """By a clock that the loss of each batch moves by a second, in evaluation too."""
    batches = []

    def loss_fn(model, batch):
        batches.append(batch)
        return train.next_token_loss(model, batch)

    monkeypatch.setattr(train.time, "perf_counter", lambda: len(batches))
    train_here(settings_for(tiny_data, tmp_path), loss_fn)
    assert [line["tokens_per_second"] for line in metrics_of(tmp_path)] == [128] * 6
    assert read_checkpoint(tmp_path)["seconds"] == 12 + 2 * 2


@pytest.mark.parametrize(("warmup", "reached"), [(5, "20%"), (1, "100%")])
def test_a_run_that_is_all_warm_up_says_so(arguments, warmup, reached):
    done = run_here(train, *arguments(warmup_iters=warmup, max_iters=1))
    assert f"warmup_iters = {warmup}: all steps are warm-up, up to {reached} of learning_rate" in done.stdout


def test_the_seed_decides_the_first_weights(whole, arguments, tmp_path):
    run_here(train, *arguments(dtype="float32", max_iters=1, seed=7, deterministic=False))
    assert first_line(tmp_path) != first_line(whole.out)
    assert not torch.are_deterministic_algorithms_enabled()


# ---- Stopped and resumed ---------------------------------------------------------------------------


@pytest.fixture
def stopped(whole, tmp_path):
    """The folder of `whole` as a kill after step 8 would have left it, and how to continue in it."""
    out = copy_files(whole.out, tmp_path / "out", "ckpt_000008.pt", "metrics.jsonl")

    def arguments(**changes):
        return tiny(**whole.settings | {"out_dir": out, "resume": True} | changes)

    def change(**parts):
        path = out / "ckpt_000008.pt"
        torch.save(read_checkpoint(path) | parts, path)

    return SimpleNamespace(out=out, arguments=arguments, change=change)


def test_a_resumed_run_has_the_same_bits(whole, stopped):
    """Though lines past the checkpoint, half a line and half a checkpoint lie there, and telling stories on
    the way draws numbers at random."""
    with open(stopped.out / "metrics.jsonl", "a") as f:
        f.write('{"step": 8, "tok')
    (stopped.out / "ckpt_000012.pt.tmp").write_bytes(b"half")
    done = run_here(train, *stopped.arguments(sample_interval=5))
    assert torch.are_deterministic_algorithms_enabled()
    assert "resuming at step 8" in done.stdout
    same_state(stopped.out / "ckpt_000012.pt", whole.out / "ckpt_000012.pt")
    assert lines_of(stopped.out) == lines_of(whole.out)
    assert files_of(stopped.out).keys() == files_of(whole.out).keys()
    told = done.stdout.split("step 12: validation loss")[1]
    _, story, _ = told.split("\n", 2)
    assert len(story) > 10


@pytest.mark.parametrize("max_iters", [12, 4])
def test_a_finished_run_that_is_resumed_changes_nothing(max_iters, whole, stopped):
    before = files_of(whole.out)
    run_here(train, *stopped.arguments(out_dir=whole.out, max_iters=max_iters))
    assert files_of(whole.out) == before


def test_ctrl_c_saves_and_tells_how_to_continue(tiny_data, tmp_path):
    """The step is finished and saved, the exit status is 0, and resumed the run ends as if left alone."""
    out = tmp_path / "我的 模型"
    settings = {"data_dir": tiny_data, "max_iters": 60, "log_interval": 1}
    settings |= {"save_interval": 1000, "eval_interval": 1000}
    process = start_script("train.py", *tiny(out_dir=out, **settings))
    wait_for_step(process, out, 5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert not stderr.strip(), stderr
    step = metrics_of(out)[-1]["step"]
    assert 5 <= step < 60
    assert files_of(out).keys() == {f"ckpt_{step:06d}.pt", "metrics.jsonl"}
    assert stdout.strip().endswith(
        f"stopped and saved at step {step}; to continue, give the same command with --resume=True"
    )
    run_here(train, *tiny(out_dir=out, resume=True, **settings))
    run_here(train, *tiny(out_dir=tmp_path / "alone", **settings))
    same_state(out, tmp_path / "alone")
    assert lines_of(out) == lines_of(tmp_path / "alone")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_for_the_end_and_a_second_one_ends_at_once(number, monkeypatch):
    monkeypatch.setattr(os, "isatty", lambda fd: False)
    signal.signal(number, signal.SIG_DFL)
    requested = run.catch_signals()
    assert not requested.is_set()
    signal.raise_signal(number)
    assert requested.is_set()
    assert signal.getsignal(number) == signal.SIG_DFL


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run.catch_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_folder_that_holds_a_run_is_refused_without_resume(stopped):
    before = files_of(stopped.out)
    assert_refused(train, stopped.arguments(resume=False), stopped.out, "--resume=True")
    assert files_of(stopped.out) == before


NEVER = {"max_iters": 10**7, "save_interval": 10**7, "eval_interval": 10**7}


def test_minutes_end_a_run_in_time(arguments, tmp_path):
    """max_iters is far away: the time decides, and the learning rate comes down with it."""
    run_here(train, *arguments(minutes=0.02, log_interval=1, **NEVER))
    saved = read_checkpoint(tmp_path)
    lines = metrics_of(tmp_path)
    assert 1.2 <= saved["seconds"] < 20
    assert lines[-1]["step"] == saved["step"]
    assert "val_loss" in lines[-1]
    rates = [line["learning_rate"] for line in lines[2:]]  # after the warm-up
    assert rates == sorted(rates, reverse=True)
    assert 0.003 >= rates[0] > 2 * rates[-1]


def test_the_time_of_a_resumed_run_continues(stopped):
    """Of 100 minutes a tenth of a second is left, less than 2,000 steps take."""
    stopped.change(seconds=5999.9)
    run_here(train, *stopped.arguments(**NEVER | {"minutes": 100, "max_iters": 2000}))
    saved = read_checkpoint(stopped.out)
    assert 8 < saved["step"] < 2000
    assert 6000 <= saved["seconds"] < 6020


def test_more_steps_at_a_resume(stopped):
    """The learning rate is that of the new settings from the next step on."""
    run_here(train, *stopped.arguments(max_iters=16, log_interval=1, schedule="cosine"))
    line = metrics_of(stopped.out)[-8]
    assert line["step"] == 9
    remaining = (16 - 8) / (16 - 2)
    share = 0.5 - 0.5 * math.cos(math.pi * remaining)
    assert line["learning_rate"] == pytest.approx(0.003 * share)
    assert read_checkpoint(stopped.out)["step"] == 16


def test_an_older_checkpoint_is_resumed_to_the_same_bits(whole, stopped):
    """One of the time before some settings, and the seconds."""
    path = stopped.out / "ckpt_000008.pt"
    saved = read_checkpoint(path)
    for name in ("decay_fraction", "beta1"):
        del saved["settings"][name]
    del saved["seconds"]
    torch.save(saved, path)
    run_here(train, *stopped.arguments())
    same_state(stopped.out / "ckpt_000012.pt", whole.out / "ckpt_000012.pt")


def test_which_settings_a_resume_may_not_change():
    fixed = {field.name for field in dataclasses.fields(Settings) if field.metadata.get("fixed")}
    step = {"block_size", "batch_size", "gradient_accumulation_steps", "document_mask", "seed"}
    assert fixed == step | {"optimizer", "weight_decay", "momentum", "beta1", "beta2"}


OTHER_RUNS = [
    ({"batch_size": 2}, "batch_size"),
    ({"seed": 1}, "seed"),
    ({"qk_norm": False}, "model_config"),
]


@pytest.mark.parametrize(("changes", "word"), OTHER_RUNS)
def test_a_resume_with_other_settings_is_refused(changes, word, stopped):
    before = files_of(stopped.out)
    assert_refused(train, stopped.arguments(**changes), stopped.out, word)
    assert files_of(stopped.out) == before


@pytest.mark.parametrize("part", ["tokenizer", "data"])
def test_a_resume_with_other_data_is_refused(part, stopped):
    stopped.change(**{part: "another"})
    assert_refused(train, stopped.arguments(), stopped.out, part)


def test_a_resume_needs_optimizers(stopped):
    saved = read_checkpoint(stopped.out)
    del saved["optimizers"]
    torch.save(saved, stopped.out / "ckpt_000008.pt")
    assert_refused(train, stopped.arguments(), stopped.out, "no optimizers")


def test_a_resume_from_half_a_checkpoint_is_refused(whole, stopped):
    """As the line advises, the older one serves."""
    good = (whole.out / "ckpt_000012.pt").read_bytes()
    half = stopped.out / "ckpt_000012.pt"
    half.write_bytes(good[: len(good) // 2])
    before = files_of(stopped.out)
    assert_refused(train, stopped.arguments(), half, "older")
    assert files_of(stopped.out) == before
    half.unlink()
    run_here(train, *stopped.arguments())
    same_state(half, whole.out / "ckpt_000012.pt")


# ---- Steps -----------------------------------------------------------------------------------------


def settings_for(data_dir, out_dir, **changes):
    return Settings(**TINY | {"data_dir": str(data_dir), "out_dir": str(out_dir)} | changes)


def fresh_model(data_dir):
    """The same random weights every time."""
    torch.manual_seed(5)
    return GPT(ModelConfig(vocab_size=meta_of(data_dir)["vocab_size"], block_size=32, **SHAPE))


def train_here(s, loss_fn=None, data=None):
    """The loop itself, on a fresh model. Returns the model."""
    train_data, val_data, _, metadata = train.open_data(s)
    Path(s.out_dir).mkdir(exist_ok=True)
    model = fresh_model(s.data_dir)
    train.train(s, model, data or train_data, val_data, metadata, loss_fn)
    return model


class Masked(TokenDataset):
    """Sequences in which some targets do not count: more of them in some than in others."""

    def sequences(self, indices):
        batch = super().sequences(indices)
        targets = batch["targets"].clone()
        for row, index in enumerate(indices):
            targets[row, : index % 20] = IGNORE
        return batch | {"targets": targets}


def mean_loss(model, data, first, count):
    """The mean over all targets that count, one sequence at a time."""
    total = 0.0
    n_targets = 0
    for n in range(first, first + count):
        row = data.batch(n, 1)
        logits = model(row["tokens"])[0]
        targets = row["targets"][0]
        total += F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        n_targets += (targets != IGNORE).sum()
    return total / n_targets


def plain_training(model, data, s):
    """The same steps by PyTorch's optimizers, one sequence at a time. Yields loss and gradient norm."""
    decayed = [model.embedding.weight]
    inner = [p for p in model.blocks.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizers = []
    if s.optimizer == "muon":
        decay = {"weight_decay": s.weight_decay, "momentum": s.momentum}
        optimizers.append(torch.optim.Muon(inner, **decay, adjust_lr_fn="match_rms_adamw"))
    else:
        decayed += inner
    groups = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers.append(torch.optim.AdamW(groups, betas=(s.beta1, s.beta2)))
    sequences_per_step = s.batch_size * s.gradient_accumulation_steps
    for step in range(s.max_iters):
        loss = mean_loss(model, data, step * sequences_per_step, sequences_per_step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = s.learning_rate * (step + 1) / s.warmup_iters
            optimizer.step()
            optimizer.zero_grad()
        yield loss.item(), norm.item()


STEPS = [
    ("adamw", 8, 1, 0.0, 5e-4),
    ("adamw", 2, 4, 0.05, 5e-4),
    ("muon", 2, 4, 1.0, 0.03),
]


@pytest.mark.parametrize(("optimizer", "batch_size", "accumulated", "grad_clip", "close"), STEPS)
def test_four_steps_are_those_of_a_plain_loop(
    optimizer, batch_size, accumulated, grad_clip, close, tiny_data, tmp_path
):
    """Micro-batches, warm-up, clipping, both optimizers and weight decay: loss, gradient norm and weights.
    (torch.optim.Muon computes in bfloat16: hence less close.)"""
    rates = {"learning_rate": 1e-3, "warmup_iters": 4, "weight_decay": 3.0, "momentum": 0.8}
    rates |= {"beta1": 0.8, "beta2": 0.9, "grad_clip": grad_clip}
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulated, "max_iters": 4}
    s = settings_for(tiny_data, tmp_path, optimizer=optimizer, **rates, **sizes)
    data = Masked(tiny_data / "train.bin", meta_of(tiny_data), 32, s.seed)
    ours = train_here(s, data=data)
    before = fresh_model(tiny_data).double()
    reference = fresh_model(tiny_data).double()
    losses, norms = zip(*plain_training(reference, data, s), strict=True)
    two, four = metrics_of(tmp_path)  # a line every two steps: the mean loss of both, the norm of the last
    assert two["loss"] == pytest.approx(sum(losses[:2]) / 2, rel=1e-6)
    assert four["loss"] == pytest.approx(sum(losses[2:]) / 2, rel=1e-6)
    assert two["grad_norm"] == pytest.approx(norms[1], rel=1e-4)
    assert four["grad_norm"] == pytest.approx(norms[3], rel=1e-4)
    for name, start in before.named_parameters():
        moved = ours.get_parameter(name) - start
        expected = reference.get_parameter(name) - start
        assert (moved - expected).norm() < close * expected.norm(), name


def test_muon_multiplies_in_bfloat16_only_where_all_products_do(tiny_data):
    for products in (torch.bfloat16, torch.float16, torch.float32):
        _, muon = train.make_optimizers(fresh_model(tiny_data), Settings(), products)
        assert (muon.dtype == torch.bfloat16) == (products == torch.bfloat16)


@pytest.mark.parametrize("shape", [(3, 24, 10), (3, 10, 24)])
def test_orthogonalized_matrices_keep_their_directions(shape):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ train.orthogonalize(x) @ v.mT  # (3, 10, 10), diagonal if no direction was turned
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):  # the polynomial of each length by itself
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(inner, torch.diag_embed(s), rtol=0, atol=1e-9)


def test_with_document_mask_a_story_does_not_see_the_one_before(tiny_data):
    """The loss is that of every story, and every piece of one, read alone in float64."""
    s = settings_for(tiny_data, "", document_mask=True)
    data, val_data, meta, _ = train.open_data(s)
    assert "documents" in val_data.batch(0, 1)
    model = strong_model(fresh_model(tiny_data).config).double()
    batch = data.batch(0, 40)
    found = train.next_token_loss(model, batch)["loss"]
    total = 0.0
    pieces = 0
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        ends = (tokens == meta["end_token"]).nonzero().flatten().tolist()
        for begin, end in itertools.pairwise(sorted({0, *ends, len(tokens)})):
            logits = model(tokens[None, begin:end])[0]
            total += F.cross_entropy(logits, targets[begin:end], reduction="sum")
            pieces += 1
    assert pieces > 40
    alone = pytest.approx(total.item(), rel=1e-6)
    assert found.item() == alone
    del batch["documents"]
    unmasked = train.next_token_loss(model, batch)["loss"]
    assert unmasked.item() != alone


# ---- Learning rates, and the end of a run ----------------------------------------------------------

RATES = [
    (
        {"warmup_iters": 4, "max_iters": 12, "schedule": "wsd", "decay_fraction": 0.5},
        [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4],
    ),
    (
        {"warmup_iters": 2, "max_iters": 6, "schedule": "cosine", "min_lr": 0.2},
        [0.5, 1, 1, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5)],
    ),
    ({"warmup_iters": 0, "max_iters": 4, "decay_fraction": 1, "min_lr": 0.5}, [1, 0.875, 0.75, 0.625]),
    ({"warmup_iters": 0, "max_iters": 3, "decay_fraction": 0}, [1, 1, 1]),
    ({"warmup_iters": 10, "max_iters": 3}, [0.1, 0.2, 0.3]),
]


@pytest.mark.parametrize(("changes", "expected"), RATES)
def test_learning_rates_by_hand(changes, expected):
    s = Settings(learning_rate=1.0, **changes)
    rates = [train.learning_rate_at(step / s.max_iters, s) for step in range(s.max_iters)]
    assert rates == pytest.approx(expected)


def test_a_warm_up_that_ends_within_a_step_goes_no_higher():
    """As with `minutes`, where a step is any share of the run."""
    s = Settings(learning_rate=1.0, warmup_iters=20, max_iters=100)
    assert train.learning_rate_at(0.195, s) == 1


@pytest.mark.parametrize(
    ("step", "seconds", "progress"),
    [
        (50, 30, 0.5),
        (50, 90, 0.75),
    ],
)
def test_progress_is_that_of_the_steps_or_of_the_time_whichever_is_further(step, seconds, progress):
    assert train.progress_of(step, seconds, Settings(max_iters=100, minutes=2.0)) == progress


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [
        (0, 7),
        (0.5, 2),
        (2, 7),
    ],
)
def test_epochs_become_steps(epochs, steps):
    """Of 50 sequences, 16 in a step; a part of a step that is left over is one more."""
    s = Settings(epochs=epochs, max_iters=7, batch_size=8, gradient_accumulation_steps=2)
    assert train.number_of_steps(s, range(50)) == steps


# ---- Data ------------------------------------------------------------------------------------------


def numbered(folder, length=101, seed=1):
    """Sequences of ten of the numbers 0, 1, 2, …"""
    np.arange(length, dtype="<u2").tofile(folder / "train.bin")
    return TokenDataset(folder / "train.bin", {"train": {"tokens": length}}, 10, seed)


def test_every_sequence_comes_once_an_epoch_in_a_new_order(tmp_path):
    batch = numbered(tmp_path).batch(0, 30)
    firsts = batch["tokens"][:, 0]
    assert batch["tokens"].equal(firsts[:, None] + torch.arange(10))
    assert batch["targets"].equal(batch["tokens"] + 1)
    epochs = [epoch.tolist() for epoch in firsts.split(10)]
    of_another_seed = numbered(tmp_path, seed=2).batch(0, 10)
    epochs.append(of_another_seed["tokens"][:, 0].tolist())
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 100, 10)) != epoch
        assert epochs.count(epoch) == 1


def test_the_order_does_not_depend_on_how_it_is_read(tmp_path):
    data = numbered(tmp_path)
    whole = data.batch(0, 30)["tokens"]
    for first, count in ((7, 6), (25, 5), (0, 1), (12, 15)):
        assert data.batch(first, count)["tokens"].equal(whole[first : first + count])


@pytest.mark.parametrize(
    ("length", "sequences"),
    [
        (10, 0),
        (11, 1),
        (21, 2),
    ],
)
def test_a_sequence_needs_one_token_more_for_its_last_target(length, sequences, tmp_path):
    assert len(numbered(tmp_path, length)) == sequences


# ---- Evaluation and samples ------------------------------------------------------------------------


@pytest.mark.parametrize("eval_sequences", [6, 1000])
def test_evaluation_by_hand(eval_sequences, tiny_data, tmp_path):
    """The same random sequences before the first step and after the last, whatever the seed; all of them
    where fewer are there than asked for. Bits per character are of the decoded text."""
    s = settings_for(tiny_data, tmp_path, max_iters=1, eval_sequences=eval_sequences, seed=9)
    trained = train_here(s)
    tokenizer = load_tokenizer((tiny_data / "tokenizer.model").read_bytes(), "")
    tokens = np.fromfile(tiny_data / "val.bin", dtype="<u2").astype(np.int64)
    order = np.random.default_rng((0, 0)).permutation((len(tokens) - 1) // 32)
    rows = [tokens[i * 32 : i * 32 + 33] for i in order[:eval_sequences]]
    characters = sum(len(tokenizer.decode(row[1:].tolist())) for row in rows)
    windows = torch.from_numpy(np.stack(rows))
    targets = windows[:, 1:].flatten()
    untrained = fresh_model(tiny_data)
    for line, model in ((first_line(tmp_path), untrained), (metrics_of(tmp_path)[-1], trained)):
        with torch.no_grad():
            logits = model(windows[:, :-1]).double().flatten(0, 1)
        nats = F.cross_entropy(logits, targets, reduction="sum").item()
        mean = nats / len(targets)
        assert line["val_loss"] == pytest.approx(mean, rel=1e-6)
        assert line["val_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        assert line["val_bits_per_character"] == pytest.approx(nats / math.log(2) / characters, rel=1e-6)


def test_a_sample_story_is_that_of_a_slow_loop(pretrained, capsys):
    """The same random numbers give the same story."""
    saved = read_checkpoint(pretrained)
    model = build_model(saved, pretrained)
    tokenizer = load_tokenizer(saved["tokenizer"], pretrained)
    prompt = [tokenizer.eos_id(), *tokenizer.encode("一只小")]
    train.print_sample(model, tokenizer, prompt, 7)
    generator = torch.Generator().manual_seed(7)
    story = list(prompt)
    while len(story) < model.config.block_size:
        with torch.no_grad():
            logits = model(torch.tensor([story]))[0, -1]
        values, likely = (logits / 0.8).topk(50)
        index = torch.multinomial(values.softmax(dim=-1), 1, generator=generator)
        new = likely[index].item()
        if new == tokenizer.eos_id():
            break
        story.append(new)
    told = tokenizer.decode(story[len(prompt) :]).rstrip("\ufffd")
    assert len(told) > 20
    assert capsys.readouterr().out == f"[一只小]\n{told}\n\n"


# ---- Losses that are not finite --------------------------------------------------------------------


def spoilt_loss(at, spoil):
    """The loss of training, spoilt in the steps for which at(step) is true."""
    steps = []

    def loss_fn(model, batch):
        value = train.next_token_loss(model, batch)["loss"]
        if torch.is_grad_enabled():  # training, not evaluation
            steps.append(value)
            if at(len(steps)):
                value = spoil(value)
        return {"loss": value}

    return loss_fn


def infinite(value):
    return value * math.inf


def no_gradient(value):
    """The value is right, its gradient is not a number."""
    return value + (value - value).sqrt()


@pytest.mark.parametrize(
    ("spoil", "at", "noticed"),
    [
        (infinite, 5, 6),
        (no_gradient, 6, 6),
        (infinite, 7, 8),
        (no_gradient, 8, 8),
    ],
)
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(spoil, at, noticed, tiny_data, tmp_path):
    """Noticed at the next line of the log, and before the checkpoint that is due at step 8."""
    s = settings_for(tiny_data, tmp_path, log_interval=3)
    with pytest.raises(UserError, match=f"^step {noticed}: .*learning_rate"):
        train_here(s, spoilt_loss(lambda step: step == at, spoil))
    assert files_of(tmp_path).keys() == {"ckpt_000004.pt", "metrics.jsonl"}
    assert metrics_of(tmp_path)[-1]["step"] < at


def test_a_learning_rate_far_too_high_is_one_line(arguments):
    wild = {"learning_rate": 1e18, "optimizer": "adamw", "warmup_iters": 0}
    assert_refused(train, arguments(**wild), "step 2:", "learning_rate")


def test_weights_that_are_not_finite_are_not_saved():
    with pytest.raises(UserError, match=r"^step 3: .*--resume=True"):
        run.check_weights([torch.nn.Parameter(torch.tensor([1.0, math.nan]))], 3)


def much_too_large(value):
    return value * 1e30


def test_a_step_whose_float16_gradients_overflow_is_left_out(tiny_data, tmp_path):
    s = settings_for(tiny_data, tmp_path, dtype="float16", max_iters=2, log_interval=1, save_interval=1)
    train_here(s, spoilt_loss(lambda step: step == 2, much_too_large))
    assert metrics_of(tmp_path)[-1]["grad_norm"] is None
    after, before = [read_checkpoint(path) for path in find_checkpoints(tmp_path)]
    same(after["model"], before["model"])
    assert after["scaler"]["scale"] == before["scaler"]["scale"] / 2


def test_float16_gradients_that_always_overflow_end_the_run(tiny_data, tmp_path):
    s = settings_for(tiny_data, tmp_path, dtype="float16", max_iters=30, log_interval=1)
    with pytest.raises(UserError, match=r"^step 17: .*learning_rate"):  # the scale, 2^16, is halved each time
        train_here(s, spoilt_loss(lambda step: True, much_too_large))


# ---- Two processes ---------------------------------------------------------------------------------

SHARED_STEPS = {"gradient_accumulation_steps": 2, "optimizer": "adamw"}


def assert_same_curve(one, other):
    """The same lines, to rounding."""
    for a, b in zip(lines_of(one), lines_of(other), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_torchrun_trains_as_one_process(tiny_data, tmp_path):
    """Loss, gradient norm and evaluation, to rounding; only the first process prints and logs."""
    settings = SHARED_STEPS | {"data_dir": tiny_data}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_script(*torchrun, "train.py", *tiny(out_dir=tmp_path / "two", **settings))
    assert done.stdout.count("finished and saved at step 12") == 1
    assert done.stdout.count("seed = 1337") == 1
    run_here(train, *tiny(out_dir=tmp_path / "one", **settings))
    assert_same_curve(tmp_path / "one", tmp_path / "two")


ONE_IS_STOPPED = """
import signal, train
original = train.next_token_loss
calls = []
def loss(model, batch):
    calls.append(batch)
    if train.run.rank() == 1 and len(calls) == 3:
        signal.raise_signal(signal.SIGTERM)
    return original(model, batch)
train.next_token_loss = loss
train.report_errors(train.main)
"""


def test_two_processes_stop_together_and_one_continues(tiny_data, tmp_path):
    """Though only the second is signalled: one checkpoint, of a step that both have finished."""
    settings = SHARED_STEPS | {"data_dir": tiny_data, "log_interval": 1}
    out = tmp_path / "two"
    printed = as_two_processes("-c", ONE_IS_STOPPED, *tiny(out_dir=out, **settings))
    assert printed.count("stopped and saved at step 3") == 1
    assert files_of(out).keys() == {"ckpt_000003.pt", "metrics.jsonl"}
    run_here(train, *tiny(out_dir=out, resume=True, **settings))
    run_here(train, *tiny(out_dir=tmp_path / "one", **settings))
    assert_same_curve(tmp_path / "one", out)


def test_processes_take_turns_at_the_micro_batches(tmp_path, monkeypatch):
    """Step 1 of the table in get_batch, of the second process; the denominator is that of all."""
    monkeypatch.setattr(run, "world_size", lambda: 2)
    monkeypatch.setattr(run, "rank", lambda: 1)
    monkeypatch.setattr(run, "all_reduce", lambda tensor: tensor.add_(100))
    data = numbered(tmp_path)
    s = Settings(batch_size=2, gradient_accumulation_steps=4)
    batches, denominator = train.get_batch(data, 1, s, CPU)
    first, second = batches
    same(first, data.batch(10, 2))
    same(second, data.batch(14, 2))
    assert denominator == 2 * 2 * 10 + 100


def test_steps_that_two_processes_cannot_share_are_refused(arguments, monkeypatch):
    monkeypatch.setattr(run, "world_size", lambda: 2)
    uneven = arguments(gradient_accumulation_steps=3)
    assert_refused(train, uneven, "gradient_accumulation_steps", "multiple of 2")


def reduce_with(other):
    """all_reduce with another process that has only the value `other`."""

    def all_reduce(tensor, op):
        if op == torch.distributed.ReduceOp.MAX:
            tensor.clamp_(min=other)
        elif op == torch.distributed.ReduceOp.MIN:
            tensor.clamp_(max=other)

    return all_reduce


@pytest.mark.parametrize("other", [2.9, 3.1])
def test_weights_that_differ_between_processes_are_not_saved(other, monkeypatch):
    monkeypatch.setattr(run, "all_reduce", reduce_with(other))
    with pytest.raises(UserError, match=r"step 4: weights .*differ between processes"):
        run.check_weights([torch.nn.Parameter(torch.ones(3))], 4)


def test_processes_agree_on_the_end(monkeypatch):
    """Though one is slower, or alone is signalled: all end after the same step."""
    assert run.agree_on_end(False, 2.0) == (False, 2.0)
    monkeypatch.setattr(run, "all_reduce", reduce_with(9.0))
    assert run.agree_on_end(False, 2.0) == (True, 9.0)


# ---- Types and compilation -------------------------------------------------------------------------


def test_every_type_of_the_products_and_a_resume_in_another(tiny_data, tmp_path):
    """The products are of the type asked for, gradients are unscaled, the weights stay float32. Only float16
    has a scale, which begins anew after another type."""
    products = set()

    def loss_fn(model, batch):
        hook = model.blocks[0].mlp.up_proj.register_forward_hook(
            lambda module, args, y: products.add(y.dtype)
        )
        result = train.next_token_loss(model, batch)
        hook.remove()
        return result

    norms = []
    for steps, dtype in ((2, "float32"), (4, "float16"), (6, "bfloat16"), (8, "float16")):
        products.clear()
        s = settings_for(tiny_data, tmp_path, dtype=dtype, max_iters=steps, resume=True, grad_clip=0.1)
        train_here(s, loss_fn)
        assert products == {getattr(torch, dtype)}
        saved = read_checkpoint(tmp_path)
        assert bool(saved["scaler"]) == (dtype == "float16")
        assert all(w.dtype == torch.float32 and w.isfinite().all() for w in saved["model"].values())
        norms.append(metrics_of(tmp_path)[-1]["grad_norm"])
    assert max(norms) < 2 * min(norms)


@pytest.mark.parametrize(("faster", "chosen"), [(1.14, "float32"), (1.16, "bfloat16")])
def test_auto_takes_bfloat16_where_it_is_clearly_faster(faster, chosen, monkeypatch, capsys):
    speeds = {torch.float32: 100e9, torch.bfloat16: faster * 100e9}
    monkeypatch.setattr(checkpoint, "matmul_flops", lambda device, dtype, n: speeds[dtype])
    assert run.agree_on_dtype("auto", CPU, {}) == chosen
    assert f"100 GFLOP/s in float32, {faster * 100:.0f} in bfloat16" in capsys.readouterr().out


def test_a_resume_keeps_the_type_that_auto_chose():
    for dtype in ("float32", "bfloat16"):
        saved = {"settings": {"dtype": dtype}}
        assert run.agree_on_dtype("auto", CPU, saved) == dtype
        assert run.agree_on_dtype("float16", CPU, saved) == "float16"


def test_all_processes_take_the_type_of_the_first(monkeypatch):
    monkeypatch.setattr(run, "world_size", lambda: 2)
    broadcast = "torch.distributed.broadcast_object_list"
    monkeypatch.setattr(broadcast, lambda chosen: chosen.__setitem__(0, "bfloat16"))
    assert run.agree_on_dtype("float32", CPU, {}) == "bfloat16"


def test_speed_is_that_of_the_product():
    assert 1e7 < checkpoint.matmul_flops(CPU, torch.float32, 64) < 1e14


def test_a_terminal_without_chinese(arguments, tmp_path):
    """Shows the numbers of the characters, from which they could be had back, and trains on."""
    settings = {"max_iters": 2, "sample_interval": 2, "device": "auto", "dtype": "auto"}
    done = run_script("train.py", *arguments(**settings), PYTHONIOENCODING="ascii")
    assert re.search(r"\\u[4-9][0-9a-f]{3}", done.stdout)
    assert (tmp_path / "ckpt_000002.pt").exists()


def test_where_compiling_fails_it_says_so_and_goes_on(monkeypatch, capsys):
    def fails(*args, **options):
        raise RuntimeError("g++ says\na.cpp:1: error: no such thing\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    assert try_compile(len, CPU) is len
    (line,) = capsys.readouterr().err.splitlines()
    for words in ("torch.compile does not work here", "error: no such thing", "continuing without it", "g++"):
        assert words in line
    monkeypatch.setattr(torch, "compile", lambda function, mode=None: lambda x: (function, mode))
    assert try_compile(len, CPU, "default")("x") == (len, "default")


def test_the_loss_is_compiled_where_the_settings_say_so(arguments, monkeypatch):
    compiled = []

    def note(loss_fn, device):
        compiled.append(loss_fn)
        return loss_fn

    monkeypatch.setattr(train, "try_compile", note)
    run_here(train, *arguments(max_iters=1, compile=True))
    assert compiled == [train.next_token_loss]


@pytest.mark.long
@pytest.mark.parametrize("name", ["none", "clang++"])
def test_without_a_cpp_compiler_it_trains_on(name, arguments, tmp_path):
    """A compiler that PyTorch would not call is none."""
    (tmp_path / name).symlink_to("/usr/bin/true")
    env = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": ""}
    done = run_script("train.py", *arguments(max_iters=2, compile=True), **env)
    assert done.stderr.startswith("torch.compile does not work here")
    assert "apt install g++" in done.stderr
    assert read_checkpoint(tmp_path)["step"] == 2


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_a_compiled_run_is_resumed_to_the_same_bits(tiny_data, tmp_path):
    """On two threads."""
    whole = tmp_path / "whole"
    out = tmp_path / "out"
    settings = {"data_dir": tiny_data, "compile": True, "n_layer": 1}
    run_script("train.py", *tiny(out_dir=whole, **settings), OMP_NUM_THREADS="2")
    copy_files(whole, out, "ckpt_000008.pt", "metrics.jsonl")
    run_script("train.py", *tiny(out_dir=out, resume=True, **settings), OMP_NUM_THREADS="2")
    same_state(out, whole)
    assert lines_of(out) == lines_of(whole)


def test_freed_memory_is_kept():
    """A large tensor made again and again gets its pages from the system once, not each time."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc's allocator is told to keep memory")
    code = """
import resource, sys, torch
from common import run
if sys.argv[1] == "keep":
    run.configure_pytorch(True)
for _ in range(20):
    torch.zeros(1 << 24).add_(1)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    kept = int(run_script("-c", code, "keep").stdout)
    returned = int(run_script("-c", code, "return").stdout)
    assert returned - kept > 10 * (1 << 26) / 4096  # of 19 times, in pages of 4 KiB


# ---- Files -----------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as f:
        f.write(b"half")
        raise ZeroDivisionError
    assert files_of(tmp_path) == {"a": b"old"}
    with atomic_write(path) as f:
        f.write(b"new")
        assert path.read_text() == "old"
    assert files_of(tmp_path) == {"a": b"new"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/fd")
def test_a_checkpoint_gets_its_name_when_it_is_on_the_disk(arguments, tmp_path, monkeypatch):
    """The log first, then the whole checkpoint, then its name, then the folder that holds the name."""
    path = tmp_path / "ckpt_000001.pt"
    flushed = []

    def note(handle):
        file = Path(os.readlink(f"/proc/self/fd/{handle}"))
        flushed.append((file.name, file.stat().st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    run_here(train, *arguments(max_iters=1))
    log = tmp_path / "metrics.jsonl"
    assert flushed[-3:] == [
        (log.name, log.stat().st_size, False),
        (path.name + ".tmp", path.stat().st_size, False),
        (tmp_path.name, tmp_path.stat().st_size, True),
    ]


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_locks(*args):
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_first_save_that_fails_names_the_file(arguments, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        done = run_here(train, *arguments(), check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_line_error(done, tmp_path / "ckpt_000004.pt", "File too large")
    assert files_of(tmp_path).keys() == {"metrics.jsonl"}


def test_a_full_disk_names_the_log(tmp_path, monkeypatch):
    log = run.start_log(Settings(out_dir=str(tmp_path)), 0)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left"):
        log({"step": 1})


def test_a_folder_in_use_is_refused(arguments, tmp_path):
    with locked(tmp_path / "lock", tmp_path):
        assert_refused(train, arguments(), tmp_path, "in use")
    run_here(train, *arguments(max_iters=1))


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    monkeypatch.setattr("common.files.fcntl.flock", no_locks)
    with locked(tmp_path / "lock", tmp_path):
        pass


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    for name in ("ckpt_000002.pt", "ckpt_999999.pt", "ckpt_1000000.pt", "ckpt_best.pt", "ckpt_000005.pt.tmp"):
        (tmp_path / name).touch()
    names = [path.name for path in find_checkpoints(tmp_path)]
    assert names == ["ckpt_1000000.pt", "ckpt_999999.pt", "ckpt_000002.pt"]


class Evil:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("mark",)


def as_saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


NOT_CHECKPOINTS = {
    "empty": b"",
    "cut": b"PK\x03\x04 and no more",
    "pickled code": pickle.dumps(Evil(), 2),
    "list": as_saved([1, 2]),
    "no shape": as_saved({"model": {}}),
    "code": as_saved(Evil()),
    "code inside": as_saved({"model": Evil()}),
}


@pytest.mark.parametrize("content", NOT_CHECKPOINTS.values(), ids=NOT_CHECKPOINTS)
def test_what_is_not_a_checkpoint_is_refused_and_not_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt_000008.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"ckpt_000008\.pt: not a checkpoint"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_a_checkpoint_that_lacks_a_weight_is_refused(whole):
    saved = read_checkpoint(whole.out)
    del saved["model"]["norm.weight"]
    with pytest.raises(UserError, match=r"a\.pt: weights and shape do not fit"):
        build_model(saved, Path("a.pt"))


# ---- Bad input -------------------------------------------------------------------------------------


@pytest.fixture
def refused(tiny_data, tmp_path):
    """A copy of the data to spoil, and a run on it that must end with one line and leave nothing."""
    folder = tmp_path / "data"
    out = tmp_path / "out"
    shutil.copytree(tiny_data, folder)

    def refused(*words, **changes):
        assert_refused(train, tiny(data_dir=folder, out_dir=out, **changes), *words)
        assert not files_of(out)

    refused.folder = folder
    return refused


SPOILT = [
    ("meta.json", b"{", "meta.json"),
    ("meta.json", b"null", "meta.json"),
    ("meta.json", b"\xff\xfe", "meta.json"),
    ("meta.json", b'{"vocab_size": 2000}', "meta.json"),
    ("tokenizer.model", b"no tokenizer", "SentencePiece"),
    ("tokenizer.model", b"", "SentencePiece"),
    ("train.bin", b"abc", "3 bytes"),
    ("val.bin", b"", "0 bytes"),
]


@pytest.mark.parametrize(("name", "content", "word"), SPOILT)
def test_spoilt_data_is_refused(name, content, word, refused):
    (refused.folder / name).write_bytes(content)
    refused(name, word)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.model", "meta.json"])
def test_data_that_lacks_a_file_is_refused(name, refused):
    (refused.folder / name).unlink()
    refused(name)


def test_without_data_it_says_how_to_prepare(refused):
    shutil.rmtree(refused.folder)
    refused(refused.folder, "prepare.py")


@pytest.mark.parametrize(("name", "advice"), [("train.bin", "add stories"), ("val.bin", "--val_fraction")])
def test_data_too_short_for_a_sequence_is_refused(name, advice, refused):
    np.zeros(32, dtype="<u2").tofile(refused.folder / name)
    reseal(refused.folder)
    refused(name, "block_size", advice)


IMPOSSIBLE = [
    ("head_dim", 7, "head_dim"),
    ("n_kv_head", 3, "n_kv_head"),
    ("device", "cuda:77", "--device=cpu"),
    ("logger", "wandbb", "'wandb'"),
]


@pytest.mark.parametrize(("key", "value", "word"), IMPOSSIBLE)
def test_settings_that_cannot_be_are_refused(key, value, word, arguments, tmp_path):
    assert_refused(train, arguments(**{key: value}), key, word)
    assert not files_of(tmp_path)


@pytest.mark.parametrize("inside", ["", "out"])
def test_an_out_dir_that_cannot_be_is_refused(inside, tiny_data, tmp_path):
    file = tmp_path / "file"
    file.write_text("a file")
    assert_refused(train, tiny(data_dir=tiny_data, out_dir=file / inside), file)
    assert file.read_text() == "a file"
