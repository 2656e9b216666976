"""Training against independent references, and real runs stopped, killed, resumed and fed with bad input."""

import ast
import copy
import functools
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from helpers import (
    ROOT,
    SHAPE,
    TINY,
    as_two_processes,
    assert_one_line_error,
    lines_of,
    meta_of,
    metrics_of,
    reseal,
    run_here,
    run_script,
    same_state,
    start_script,
    tiny,
    wait_for_step,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
import train
from common.checkpoint import build_model, find_checkpoints, read_checkpoint
from common.files import UserError, load_tokenizer
from model import GPT, IGNORE, ModelConfig
from train import Muon, Settings, TokenDataset, learning_rate_at, orthogonalize

attempt = functools.partial(run_here, check=False)


def arguments(data_dir, out_dir, **changes):
    return tiny(data_dir=data_dir, out_dir=out_dir, **changes)


def config_of(data_dir):
    return ModelConfig(vocab_size=meta_of(data_dir)["vocab_size"], block_size=32, **SHAPE)


def meta_for(path):
    """What a .bin file is opened with."""
    return {path.stem: {"tokens": path.stat().st_size // 2}}


# ---- The arithmetic of a step ----------------------------------------------------------------------


class Rows(train.ShuffledDataset):
    """Random sequences, with targets that are to be ignored: fewer in some rows than in others."""

    def __init__(self, vocab_size, length):
        super().__init__(Path("rows"), 50, 3, length)
        self.vocab_size = vocab_size

    def row(self, n):
        rng = np.random.default_rng(n)
        tokens = rng.integers(0, self.vocab_size, self.tokens_per_sequence + 1)
        targets = tokens[1:].copy()
        targets[rng.random(self.tokens_per_sequence) < (n % 5) / 5] = IGNORE
        return tokens[:-1], targets

    def sequences(self, indices):
        tokens, targets = zip(*map(self.row, indices), strict=True)
        return {"tokens": torch.tensor(np.stack(tokens)), "targets": torch.tensor(np.stack(targets))}


def train_here(tiny_data, out_dir, data=None, model=None, loss_fn=train.next_token_loss, **changes):
    """Call the loop itself. Returns the model, the gradients of the last step and the micro-batches it was
    fed.
    """
    s = Settings(**TINY | {"data_dir": str(tiny_data), "out_dir": str(out_dir), "dtype": "float32"} | changes)
    train_data, val_data, _, metadata = train.open_data(s)
    if model is None:
        torch.manual_seed(5)
        model = GPT(config_of(tiny_data))
    Path(out_dir).mkdir(exist_ok=True)  # as `run.training` does
    newest, calls = {}, []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: newest.__setitem__(name, p.grad.clone()))

    def watched(model, batch):
        if torch.is_grad_enabled():  # training, not evaluation
            calls.append(batch)
        return loss_fn(model, batch)

    train.train(s, model, data or train_data, val_data, metadata, watched)
    return SimpleNamespace(model=model, gradients=newest, batches=calls)


def mean_loss(model, data, first, count):
    """The mean over all targets that count, one sequence and one target at a time."""
    total, targets = 0.0, 0
    for n in range(first, first + count):
        row = data.batch(n, 1)
        logits = F.linear(model.hidden(row["tokens"]), model.embedding.weight)[0]
        for position, target in enumerate(row["targets"][0].tolist()):
            if target != IGNORE:
                total = total + logits[position].logsumexp(0) - logits[position, target]
                targets += 1
    return total / targets


@pytest.mark.parametrize("masked", [False, True])
def test_accumulated_gradients_equal_one_big_batch(masked, tiny_data, tmp_path):
    """4 micro-batches of 2 give the loss and the gradients of 1 of 8, and both those of a slow float64 loop,
    also where the micro-batches differ in how many targets count."""
    config = config_of(tiny_data)
    data = Rows(config.vocab_size, config.block_size) if masked else None
    found = {}
    for size, accumulated in ((8, 1), (2, 4)):
        out = tmp_path / f"{size}"
        run_ = train_here(
            tiny_data,
            out,
            data,
            batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_iters=1,
            log_interval=1,
            grad_clip=0.0,
            optimizer="adamw",
            learning_rate=1e-12,
        )
        assert [len(b["tokens"]) for b in run_.batches] == [size] * accumulated
        found[size] = run_.gradients, metrics_of(out)[0]
    torch.manual_seed(5)
    reference = GPT(config).double()
    data = data or TokenDataset(tiny_data / "train.bin", meta_of(tiny_data), config.block_size, Settings.seed)
    loss = mean_loss(reference, data, 0, 8)
    loss.backward()
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in reference.parameters()))
    for gradients, line in found.values():
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
        for name, p in reference.named_parameters():
            torch.testing.assert_close(gradients[name].double(), p.grad, rtol=1e-4, atol=1e-6)
    for name in found[8][0]:
        torch.testing.assert_close(found[8][0][name], found[2][0][name], rtol=1e-4, atol=1e-7)


def test_document_mask_hides_the_story_before(tiny_data, tmp_path):
    """With document_mask the loss is that of every story, and every piece of one, read alone in float64."""
    config = config_of(tiny_data)
    end = meta_of(tiny_data)["end_token"]
    data = TokenDataset(tiny_data / "train.bin", meta_of(tiny_data), config.block_size, Settings.seed)
    torch.manual_seed(5)
    model = GPT(config)
    for p in model.parameters():  # attention that matters
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
    reference, total, pieces = GPT(config).double(), 0.0, 0
    reference.load_state_dict(model.state_dict())
    for n in range(40):
        row = data.batch(n, 1)
        starts = (
            [0] + [i for i, t in enumerate(row["tokens"][0].tolist()) if t == end and i] + [config.block_size]
        )
        for a, b in itertools.pairwise(starts):  # the end of a story stands at the head of the next
            logits = reference(row["tokens"][:, a:b])[0]
            total += F.cross_entropy(logits, row["targets"][0, a:b], reduction="sum").item()
            pieces += 1
    assert pieces > 40
    s = {"batch_size": 40, "max_iters": 1, "log_interval": 1}
    for mask in (True, False):
        copy = GPT(config)
        copy.load_state_dict(model.state_dict())
        train_here(tiny_data, tmp_path / f"{mask}", model=copy, document_mask=mask, **s)
    with_mask, without = (metrics_of(tmp_path / f"{mask}")[0]["loss"] for mask in (True, False))
    assert with_mask == pytest.approx(total / (40 * config.block_size), rel=1e-6)
    assert without != pytest.approx(with_mask, rel=1e-4)


def by_hand(model, data, s, names):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with clipping by norm, in float64, on the named
    parameters.
    """
    model = model.double()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(s["max_iters"]):
        model.zero_grad()
        mean_loss(model, data, step * s["batch_size"], s["batch_size"]).backward()
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
        share = min(1.0, s["grad_clip"] / norm)
        rate = s["learning_rate"] * (step + 1) / s["warmup_iters"]
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name not in names:
                    continue
                m, v = moments[name]
                m.mul_(s["beta1"]).add_(p.grad * share * (1 - s["beta1"]))
                v.mul_(s["beta2"]).add_((p.grad * share) ** 2 * (1 - s["beta2"]))
                if p.dim() >= 2:
                    p.mul_(1 - rate * s["weight_decay"])
                rooted = (v / (1 - s["beta2"] ** (step + 1))).sqrt() + 1e-8
                p.sub_(rate * (m / (1 - s["beta1"] ** (step + 1))) / rooted)
    return model


def test_adamw_steps_by_hand(tiny_data, tmp_path):
    """Warm-up, clipping, both moments, and weight decay on matrices only: the weights after four steps."""
    s = {"max_iters": 4, "batch_size": 2, "warmup_iters": 4, "learning_rate": 1e-3, "weight_decay": 3.0}
    s |= {"beta1": 0.8, "beta2": 0.9, "grad_clip": 0.05}
    ours = train_here(tiny_data, tmp_path / "out", optimizer="adamw", **s).model
    torch.manual_seed(5)
    start_, config = GPT(ours.config), ours.config
    data = TokenDataset(tiny_data / "train.bin", meta_of(tiny_data), config.block_size, Settings.seed)
    before = {name: p.clone() for name, p in start_.named_parameters()}
    reference = by_hand(start_, data, s, set(before))
    for name, p in reference.named_parameters():
        moved, expected = ours.get_parameter(name).double() - before[name].double(), p - before[name].double()
        assert expected.abs().max() > 1e-3
        assert (moved - expected).norm() < 2e-3 * expected.norm(), name


def test_muon_takes_the_matrices_of_the_blocks_only(tiny_data, tmp_path):
    """One step: each matrix inside the blocks moves by a nearly orthogonal matrix of the scale
    0.2 * sqrt(longer side) * learning rate; everything else moves as AdamW by hand has it."""
    s = {"max_iters": 1, "batch_size": 4, "warmup_iters": 1, "learning_rate": 1e-3, "weight_decay": 0.0}
    s |= {"beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0}
    ours = train_here(tiny_data, tmp_path / "out", optimizer="muon", **s).model
    torch.manual_seed(5)
    start_, config = GPT(ours.config), ours.config
    before = {name: p.detach().double().clone() for name, p in start_.named_parameters()}
    data = TokenDataset(tiny_data / "train.bin", meta_of(tiny_data), config.block_size, Settings.seed)
    inside = {name for name, p in before.items() if name.startswith("blocks.") and p.dim() == 2}
    assert len(inside) == 7 * config.n_layer
    reference = by_hand(start_, data, s, before.keys() - inside)
    for name in before:
        moved = ours.get_parameter(name).detach().double() - before[name]
        if name in inside:
            scale = s["learning_rate"] * 0.2 * math.sqrt(max(moved.shape))
            singular = torch.linalg.svdvals(moved) / scale
            assert singular.min() > 0.3 and singular.max() < 1.4, (name, singular)
        else:
            expected = reference.get_parameter(name).detach() - before[name]
            assert (moved - expected).norm() < 2e-3 * expected.norm(), name


@pytest.mark.parametrize("momentum", [0.95, 0.8])
@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.02), (torch.float32, 0.05)])
def test_muon_moves_as_the_library_has_it(dtype, close, momentum):
    """Five steps beside torch.optim.Muon, which computes in bfloat16: what float32 differs by is rounding."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(16, 16), (16, 40), (40, 16), (16, 16), (48, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    mine = Muon(ours, 0.1, momentum, dtype)
    reference = torch.optim.Muon(theirs, 0.02, 0.1, momentum, adjust_lr_fn="match_rms_adamw")
    mine.param_groups[0]["lr"] = 0.02
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        assert (a - b).norm() < close * (b - start).norm()


def test_orthogonalized_keeps_the_directions_and_evens_their_lengths():
    x = torch.randn(3, 24, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalize(x)
    inner = u.mT @ found @ v.mT  # (3, 10, 10), diagonal if no direction was turned
    lengths = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(lengths)).abs().max() < 1e-9
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):  # the polynomial of each singular value by itself
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    assert torch.allclose(lengths, s, atol=1e-9) and s.min() > 0.6 and s.max() < 1.3


def rates(s, steps):
    """The learning rates of a run whose time does not matter."""
    return [learning_rate_at(train.progress_of(step, 0.0, s), s) for step in range(steps)]


def test_learning_rates_by_hand():
    wsd = Settings(
        learning_rate=1.0, min_lr=0.0, warmup_iters=4, max_iters=20, schedule="wsd", decay_fraction=0.5
    )
    expected = [0.25, 0.5, 0.75, 1.0] + [1.0] * 9 + [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert rates(wsd, 20) == pytest.approx(expected)
    cosine = Settings(learning_rate=2.0, min_lr=0.2, warmup_iters=2, max_iters=10, schedule="cosine")
    expected = [1.0, 2.0] + [1.1 + 0.9 * math.cos(math.pi * i / 8) for i in range(8)]
    assert rates(cosine, 10) == pytest.approx(expected)
    constant = Settings(learning_rate=1.0, warmup_iters=0, max_iters=5, decay_fraction=0.0)
    assert rates(constant, 5) == [1.0] * 5
    fall = Settings(learning_rate=1.0, min_lr=0.5, warmup_iters=0, max_iters=4, decay_fraction=1.0)
    assert rates(fall, 4) == pytest.approx([1.0, 0.875, 0.75, 0.625])
    short = Settings(learning_rate=1.0, warmup_iters=10, max_iters=3)  # ends within the warm-up
    assert rates(short, 3) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(("warmup", "reached"), [(50, "10%"), (5, "100%"), (4, "")])
def test_a_run_that_is_all_warm_up_says_so(warmup, reached, tiny_data, tmp_path):
    done = attempt(train, *arguments(tiny_data, tmp_path / "out", warmup_iters=warmup, max_iters=5))
    found = [line for line in done.stdout.splitlines() if line.startswith(f"warmup_iters = {warmup}: ")]
    said = f"warmup_iters = {warmup}: all steps are warm-up, up to {reached} of learning_rate; lower it"
    assert (done.returncode, found) == (0, [said] if reached else [])
    rate = TINY.get("learning_rate", 0.003)
    assert metrics_of(tmp_path / "out")[-1]["learning_rate"] <= rate * min(1, 5 / warmup) + 1e-12


def test_a_first_save_that_fails(tiny_data, tmp_path):
    """The error names the file, and promises nothing of older checkpoints: there are none."""
    code = "import resource, signal, train; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1)); "
    code += "train.report_errors(train.main)"
    done = run_script("-c", code, *arguments(tiny_data, tmp_path / "out"), check=False)
    assert_one_line_error(done, tmp_path / "out" / "ckpt_000004.pt", "File too large")
    assert "resume" not in done.stderr.splitlines()[-1] and not list((tmp_path / "out").glob("ckpt*"))


def test_progress_is_that_of_the_steps_or_of_the_time():
    """Whichever is further decides how far the learning rate has come down."""
    s = Settings(learning_rate=1.0, warmup_iters=0, max_iters=100, minutes=2.0, decay_fraction=0.5)
    for step, seconds, progress in ((50, 30.0, 0.5), (50, 90.0, 0.75), (10, 120.0, 1.0), (100, 0.0, 1.0)):
        assert train.progress_of(step, seconds, s) == progress
        assert learning_rate_at(progress, s) == pytest.approx(min(1.0, 2 * (1 - progress)))


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("seconds_per_step", [0.1, 1.5, 7.0])
def test_the_learning_rate_never_jumps(schedule, seconds_per_step):
    """However slow the hardware: no step changes it by more than the steps of the warm-up do."""
    s = Settings(learning_rate=1.0, warmup_iters=20, max_iters=100, minutes=1.0, schedule=schedule)
    rates = []
    progress = 0.0
    while progress < 1:
        rates.append(learning_rate_at(progress, s))
        progress = train.progress_of(len(rates), len(rates) * seconds_per_step, s)
    share_of_a_step = max(1 / 100, seconds_per_step / 60)
    changes = [abs(b - a) for a, b in itertools.pairwise(rates)]
    assert max(changes) <= share_of_a_step / (20 / 100) + 1e-9  # the slope of the warm-up is the steepest
    assert max(rates) > 0.85 and rates[-1] < 0.4


# ---- Data ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(10, 80),
    st.integers(0, 5),
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
)
def test_every_block_once_an_epoch(tmp_path_factory, block, length, seed, sizes):
    """However the batches are cut: the blocks of the file, each once before any comes again."""
    path = tmp_path_factory.getbasetemp() / "blocks.bin"
    tokens = np.random.default_rng(length).permutation(1000)[
        :length
    ]  # no token twice: it tells where it stood
    tokens.astype("<u2").tofile(path)
    blocks = [tokens[i * block : (i + 1) * block + 1].tolist() for i in range((length - 1) // block)]
    data, rows = TokenDataset(path, meta_for(path), block, seed), []
    assert len(data) == len(blocks)
    for size in sizes:
        batch = data.batch(len(rows), size)
        assert batch["tokens"].shape == batch["targets"].shape == (size, block)
        for row, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
            assert row[1:] == targets[:-1]
            rows.append(row + targets[-1:])
    for epoch in range(0, len(rows), len(blocks)):
        here = sorted(rows[epoch : epoch + len(blocks)])
        assert here == sorted(blocks) if len(here) == len(blocks) else len(here) == len(set(map(tuple, here)))
    again = TokenDataset(path, meta_for(path), block, seed)  # from anywhere, in any order
    for n in reversed(range(len(rows))):
        assert again.batch(n, 1)["tokens"][0].tolist() == rows[n][:-1]


def test_order_depends_on_epoch_and_seed(tmp_path):
    np.arange(3001, dtype="<u2").tofile(tmp_path / "a.bin")

    def epochs(seed, count=3):
        data = TokenDataset(tmp_path / "a.bin", meta_for(tmp_path / "a.bin"), 10, seed)
        firsts = data.batch(0, 300 * count)["tokens"][:, 0]
        return [tuple(epoch.tolist()) for epoch in firsts.split(300)]

    orders = epochs(1) + epochs(2) + epochs(3)
    assert len(set(orders)) == 9  # no two alike, and none as it stands in the file
    assert tuple(range(0, 3000, 10)) not in orders
    assert epochs(1) == orders[:3]


def test_epochs_become_steps(tiny_data, tmp_path):
    """Half a pass over the data, and the part of a step that this leaves over."""
    data, *_ = train.open_data(Settings(**TINY | {"data_dir": str(tiny_data)}))
    done = train_here(tiny_data, tmp_path / "out", epochs=0.5, batch_size=16, gradient_accumulation_steps=2)
    assert len(done.batches) == 2 * -(-len(data) // 64)
    assert find_checkpoints(tmp_path / "out")[0].name == f"ckpt_{len(done.batches) // 2:06}.pt"


def test_the_loop_takes_every_sequence_in_its_turn(tiny_data, tmp_path):
    """Two epochs of a small file, micro-batch by micro-batch, the second after a resume."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    tokens = np.fromfile(folder / "train.bin", dtype="<u2")[: 24 * 32 + 5]
    tokens.tofile(folder / "train.bin")
    reseal(folder)
    taken = []

    changes = {"batch_size": 3, "gradient_accumulation_steps": 2, "save_interval": 4}
    for more in (
        {"max_iters": 4},
        {"max_iters": 8, "resume": True},
    ):  # 4 steps of 6 sequences: an epoch of 24
        for batch in train_here(folder, tmp_path / "out", **changes, **more).batches:
            assert len(batch["tokens"]) == 3
            taken.extend(map(tuple, torch.cat([batch["tokens"], batch["targets"][:, -1:]], 1).tolist()))
    expected = sorted(tuple(tokens[i * 32 : (i + 1) * 32 + 1].tolist()) for i in range(24))
    assert len(set(expected)) == 24
    assert sorted(taken[:24]) == sorted(taken[24:]) == expected
    assert taken[:24] != taken[24:]


# ---- A whole run, and what it leaves ---------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tiny_data, tmp_path_factory):
    """Runs of 12 steps that nothing stopped, one for each optimizer."""
    made = {}

    def run_of(optimizer):
        if optimizer not in made:
            out, changes = (
                tmp_path_factory.mktemp("whole") / "out",
                {"optimizer": optimizer, "eval_interval": 4},
            )
            done = run_script("train.py", *arguments(tiny_data, out, **changes))
            made[optimizer] = SimpleNamespace(out=out, changes=changes, stdout=done.stdout, data=tiny_data)
        return made[optimizer]

    return run_of


@pytest.fixture(params=["adamw", "muon"])
def whole(request, whole_run):
    return whole_run(request.param)


@pytest.fixture
def adamw(whole_run):
    return whole_run("adamw")


def test_what_a_run_prints(whole):
    printed = {}
    for line in whole.stdout.splitlines():
        if m := re.fullmatch(r"(\w+) = (.+)", line):
            printed[m[1]] = ast.literal_eval(m[2])
    expected = TINY | whole.changes | {"data_dir": str(whole.data), "out_dir": str(whole.out)}
    assert set(printed) == set(Settings.__dataclass_fields__)
    assert {key: printed[key] for key in expected} == expected
    weights = read_checkpoint(whole.out)["model"]
    assert f"{sum(w.numel() for w in weights.values()):,} parameters, cpu, " in whole.stdout
    assert f" {4 * 32:,} tokens a step" in whole.stdout and "starting from the beginning" in whole.stdout


def test_what_a_run_leaves(whole):
    """The two newest checkpoints, each complete in itself, and nothing beside."""
    names = ["ckpt_000008.pt", "ckpt_000012.pt", "lock", "metrics.jsonl"]
    assert sorted(p.name for p in whole.out.iterdir()) == names
    assert [p.name for p in find_checkpoints(whole.out)] == ["ckpt_000012.pt", "ckpt_000008.pt"]
    for path, step in zip(find_checkpoints(whole.out), (12, 8), strict=True):
        state = torch.load(path, weights_only=True)
        assert state["step"] == step and state["tokenizer"] == (whole.data / "tokenizer.model").read_bytes()
        assert state["settings"]["optimizer"] == whole.changes["optimizer"]
        assert state["model"]["embedding.weight"].shape == (config_of(whole.data).vocab_size, SHAPE["n_embd"])
    assert read_checkpoint(whole.out)["step"] == 12


def test_an_unfinished_checkpoint_is_removed(tiny_data, tmp_path):
    """What a killed process has left beside its checkpoints goes with the next save."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "ckpt_000003.pt.tmp").write_bytes(b"half")
    assert attempt(train, *arguments(tiny_data, out)).returncode == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "ckpt_000008.pt",
        "ckpt_000012.pt",
        "lock",
        "metrics.jsonl",
    ]


def test_a_run_that_begins_again_begins_its_log_again(tiny_data, tmp_path):
    """One that ended before its first checkpoint: nothing of its log remains, and ln V comes first, once."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text(
        '{"step": 0, "tokens": 0, "val_loss": 9.0}\n{"step": 2, "loss": 1.0}\n'
    )
    assert attempt(train, *arguments(tiny_data, out)).returncode == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8, 10, 12]
    assert lines[0]["val_loss"] == pytest.approx(math.log(config_of(tiny_data).vocab_size), rel=0.02)


def test_metrics_of_a_run(whole):
    lines = metrics_of(whole.out)
    assert [x["step"] for x in lines] == [2, 4, 6, 8, 10, 12]
    names = {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
    evaluation = {"val_loss", "val_perplexity", "val_bits_per_character"}
    for line in lines:
        assert set(line) == (names if line["step"] % 4 else names | evaluation)
        assert all(math.isfinite(value) and value > 0 for value in line.values())
        assert line["tokens"] == line["step"] * 4 * 32
    # Warm-up over 2 steps, a hold, then from step 7 of 12 down in a line: the rates of steps 2, 4, ..., 12.
    rates = [0.003 * share for share in (1, 1, 1, 1, 3 / 5, 1 / 5)]
    assert [x["learning_rate"] for x in lines] == pytest.approx(rates)
    assert lines[0]["loss"] == pytest.approx(math.log(config_of(whole.data).vocab_size), rel=0.02)


def test_evaluation_by_hand(whole, tmp_path):
    """The loss of each checkpoint over the first blocks of val.bin in their seeded order, from NumPy and
    float64, and bits per character from the decoded text; the same blocks every time."""
    # The runs of `whole` multiply in bfloat16: the same weights evaluated in float32 serve for the
    # comparison.
    out = tmp_path / "out"
    s = {"dtype": "float32", "eval_interval": 4, "optimizer": whole.changes["optimizer"]}
    train_here(whole.data, out, **s)
    tokens = np.fromfile(whole.data / "val.bin", dtype="<u2").astype(np.int64)
    order = np.random.default_rng((0, 0)).permutation((len(tokens) - 1) // 32)[: TINY["eval_sequences"]]
    rows = torch.from_numpy(np.stack([tokens[i * 32 : i * 32 + 33] for i in order]))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(whole.data / "tokenizer.model"))
    characters = sum(len(tokenizer.decode(row[1:].tolist())) for row in rows)
    lines = {x["step"]: x for x in metrics_of(out) if "val_loss" in x}

    def nats_of(path):
        with torch.no_grad():
            log_p = build_model(read_checkpoint(path), path).double()(rows[:, :-1]).log_softmax(-1)
        return -sum(log_p[i, t, rows[i, t + 1]].item() for i in range(len(rows)) for t in range(32))

    for path, step in zip(find_checkpoints(out), (12, 8), strict=True):
        nats, line = nats_of(path), lines[step]
        assert line["val_loss"] == pytest.approx(nats / (len(rows) * 32), rel=1e-6)
        assert line["val_perplexity"] == pytest.approx(math.exp(nats / (len(rows) * 32)), rel=1e-5)
        assert line["val_bits_per_character"] == pytest.approx(nats / math.log(2) / characters, rel=1e-6)
    # The process that multiplied in bfloat16 saw the same blocks.
    coarse = {x["step"]: x["val_loss"] for x in metrics_of(whole.out) if "val_loss" in x}
    assert coarse[12] == pytest.approx(nats_of(whole.out / "ckpt_000012.pt") / (len(rows) * 32), rel=2e-3)


def test_real_stories_are_learned(shared, tmp_path):
    """Validation loss well below the entropy of single tokens: the model has learned what follows what."""
    run_script(
        "prepare.py",
        shared / "zh_stories.jsonl",
        "--out_dir",
        tmp_path / "data",
        "--vocab_size",
        4000,
        "--val_fraction",
        0.05,
    )
    shape = {"n_embd": 96, "head_dim": 24, "intermediate_size": 192, "block_size": 64, "batch_size": 16}
    often = {
        "max_iters": 100,
        "learning_rate": 0.01,
        "eval_interval": 100,
        "save_interval": 100,
        "eval_sequences": 100,
    }
    run_script("train.py", *tiny(data_dir=tmp_path / "data", out_dir=tmp_path / "out", **shape, **often))
    tokens = np.fromfile(tmp_path / "data" / "val.bin", dtype="<u2")
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    entropy = -(share * np.log(share)).sum()
    assert metrics_of(tmp_path / "out")[-1]["val_loss"] < entropy - 0.5


def test_evaluation_of_fewer_blocks_than_asked_for(tiny_data, tmp_path):
    """eval_sequences past the end of the data means all of them, each once."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    tokens = np.fromfile(folder / "val.bin", dtype="<u2")[: 5 * 32 + 9]
    tokens.tofile(folder / "val.bin")
    reseal(folder)
    s = {"max_iters": 1, "eval_sequences": 1000, "batch_size": 3}
    model = train_here(folder, tmp_path / "out", **s).model.double()
    rows = torch.from_numpy(np.stack([tokens[i * 32 : i * 32 + 33] for i in range(5)]).astype(np.int64))
    with torch.no_grad():
        expected = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    line = next(x for x in metrics_of(tmp_path / "out") if "val_loss" in x)
    assert line["val_loss"] == pytest.approx(expected.item(), rel=1e-6)


# ---- Stopped and resumed ---------------------------------------------------------------------------


def stopped_at(whole_out, out, step):
    """A folder as a kill right before the next checkpoint would have left it."""
    out.mkdir()
    shutil.copy(whole_out / f"ckpt_{step:06d}.pt", out)
    shutil.copy(whole_out / "metrics.jsonl", out)  # lines past the checkpoint too


def files_of(folder):
    """The files of a folder and what they hold, but for the lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}


def test_resume_is_exact(whole, tmp_path):
    """From step 8 to the end: weights, optimizer state and metrics bit for bit as if nothing had stopped it,
    though lines past the checkpoint, half a line and half a checkpoint lie there; telling stories on the way
    (which draws numbers at random) changes nothing either."""
    out = tmp_path / "out"
    stopped_at(whole.out, out, 8)
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 8, "tok')
    (out / "ckpt_000012.pt.tmp").write_bytes((out / "ckpt_000008.pt").read_bytes()[:1000])
    (out / "lock").write_text("process 1")
    done = run_script(
        "train.py", *arguments(whole.data, out, **whole.changes, resume=True, sample_interval=2)
    )
    assert "resuming at step 8" in done.stdout
    same_state(out / "ckpt_000012.pt", whole.out / "ckpt_000012.pt")
    assert lines_of(out) == lines_of(whole.out)
    assert {p.name for p in out.iterdir()} == {"ckpt_000008.pt", "ckpt_000012.pt", "lock", "metrics.jsonl"}
    told = done.stdout.split("step 12: validation loss")[1].split("\n", 1)[1].strip()
    assert len(told) > 10 and "validation loss" not in told  # the story that was told at the end


def test_finished_run_resumed_changes_nothing(adamw, tmp_path):
    out = tmp_path / "out"
    stopped_at(adamw.out, out, 12)
    before = (out / "ckpt_000012.pt").read_bytes()
    attempt(train, *arguments(adamw.data, out, **adamw.changes, resume=True))
    assert (out / "ckpt_000012.pt").read_bytes() == before and lines_of(out) == lines_of(adamw.out)


@pytest.mark.parametrize("length", [0, 11, 0.5], ids=["empty", "short", "cut"])
def test_resume_refuses_a_damaged_checkpoint(length, adamw, tmp_path):
    """Cut off anywhere: one line names it, and nothing is touched. (What is inside is left to
    tools.check.)
    """
    good = (adamw.out / "ckpt_000012.pt").read_bytes()
    out = tmp_path / "out"
    stopped_at(adamw.out, out, 8)
    (out / "ckpt_000012.pt").write_bytes(good[: int(length * len(good) if length < 1 else length)])
    before = files_of(out)
    done = attempt(train, *arguments(adamw.data, out, **adamw.changes, resume=True))
    assert_one_line_error(done, "ckpt_000012.pt", "older")
    assert files_of(out) == before
    (out / "ckpt_000012.pt").unlink()  # as the line advises
    assert attempt(train, *arguments(adamw.data, out, **adamw.changes, resume=True)).returncode == 0
    same_state(out / "ckpt_000012.pt", adamw.out / "ckpt_000012.pt")


LONGER = {"max_iters": 60, "save_interval": 3, "eval_interval": 7, "eval_sequences": 4}


@pytest.fixture(scope="module")
def alone(tiny_data, tmp_path_factory):
    """A longer run that nothing stopped, to compare those with that were."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run_script("train.py", *arguments(tiny_data, out, **LONGER))
    return out


@pytest.mark.parametrize(("number", "folder"), [(signal.SIGINT, "out"), (signal.SIGTERM, "我的 模型")])
def test_signal_saves_and_tells_how_to_resume(number, folder, alone, tiny_data, tmp_path):
    """The step is finished and saved, the exit status is 0, and the same command with --resume=True ends
    where a run left alone ends."""
    out, changes = (
        tmp_path / folder,
        LONGER | {"save_interval": 1000, "eval_interval": 1000, "log_interval": 1},
    )
    process = start_script("train.py", *arguments(tiny_data, out, **changes))
    wait_for_step(process, out, 5)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and not stderr.strip(), stderr
    (path,) = find_checkpoints(out)
    step = read_checkpoint(path)["step"]
    assert 5 <= step < 60 and path.name == f"ckpt_{step:06d}.pt"
    assert metrics_of(out)[-1]["step"] == step
    last = stdout.strip().splitlines()[-1]
    assert f"step {step}" in last and "--resume=True" in last
    run_script("train.py", *arguments(tiny_data, out, **changes, resume=True))
    same_state(out / "ckpt_000060.pt", alone / "ckpt_000060.pt")
    assert [x["step"] for x in metrics_of(out) if "loss" in x] == list(range(1, 61))


def test_out_dir_that_holds_a_run(adamw):
    done = attempt(train, *arguments(adamw.data, adamw.out, **adamw.changes))
    assert_one_line_error(done, adamw.out, "--resume=True")
    assert read_checkpoint(adamw.out)["step"] == 12


def test_resume_with_nothing_to_resume(tiny_data, tmp_path):
    done = attempt(train, *arguments(tiny_data, tmp_path / "out", max_iters=1, resume=True))
    assert done.returncode == 0 and "starting from the beginning" in done.stdout
    assert read_checkpoint(tmp_path / "out")["step"] == 1


def test_minutes_end_a_run_in_time(tiny_data, tmp_path):
    """max_iters far away: the time decides, and the learning rate comes down with it."""
    start = time.perf_counter()
    options = {
        "minutes": 0.05,
        "max_iters": 10**7,
        "save_interval": 10**7,
        "eval_interval": 10**7,
        "log_interval": 1,
    }
    done = attempt(train, *arguments(tiny_data, tmp_path / "out", **options))
    assert done.returncode == 0, done.stderr
    last, lines = read_checkpoint(tmp_path / "out"), [x for x in metrics_of(tmp_path / "out") if "loss" in x]
    assert 3 <= last["seconds"] < time.perf_counter() - start < 30
    assert last["step"] == lines[-1]["step"] and "val_loss" in metrics_of(tmp_path / "out")[-1]
    learning_rates = [x["learning_rate"] for x in lines[TINY["warmup_iters"] :]]
    assert learning_rates == sorted(learning_rates, reverse=True)
    assert 0.003 >= learning_rates[0] > 2 * learning_rates[-1]


def test_the_time_of_a_run_continues_when_it_is_resumed(adamw, tmp_path):
    """Of 100 minutes all but half a second have passed; max_iters is a cap on the steps."""
    out, options = tmp_path / "out", adamw.changes | {"minutes": 100, "resume": True, "save_interval": 10**7}
    stopped_at(adamw.out, out, 8)
    state = read_checkpoint(out / "ckpt_000008.pt")
    assert 0 < state["seconds"] < read_checkpoint(out / "ckpt_000008.pt").get("seconds") + 1
    torch.save(state | {"seconds": 5999.5}, out / "ckpt_000008.pt")
    assert attempt(train, *arguments(adamw.data, out, **options, max_iters=9)).returncode == 0
    capped = read_checkpoint(out)
    assert capped["step"] == 9 and capped["seconds"] > 5999.5
    assert attempt(train, *arguments(adamw.data, out, **options, max_iters=10**7)).returncode == 0
    assert 9 < read_checkpoint(out)["step"] < 10**6 and 6000 <= read_checkpoint(out)["seconds"] < 6030


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_more_steps_at_a_resume(schedule, adamw, tmp_path):
    """The learning rate is that of the new settings from the next step on; fewer steps than done change
    nothing.
    """
    out = tmp_path / "out"
    stopped_at(adamw.out, out, 8)
    changes = adamw.changes | {"max_iters": 40, "schedule": schedule, "log_interval": 1, "resume": True}
    assert attempt(train, *arguments(adamw.data, out, **changes)).returncode == 0
    s = train.Settings(**read_checkpoint(out)["settings"])
    (line,) = [x for x in metrics_of(out) if x["step"] == 9 and "learning_rate" in x]
    assert line["learning_rate"] == learning_rate_at(8 / 40, s) and read_checkpoint(out)["step"] == 40
    before = files_of(out)
    assert attempt(train, *arguments(adamw.data, out, **changes | {"max_iters": 4})).returncode == 0
    assert files_of(out).keys() == before.keys()


def test_an_older_checkpoint_resumes_and_samples(whole, tmp_path):
    """One of the time before settings were renamed and seconds stored: it ends with the same bits."""
    out = tmp_path / "out"
    stopped_at(whole.out, out, 8)
    state = read_checkpoint(out / "ckpt_000008.pt")
    settings_ = state["settings"] | {"schedule": "linear", "cooldown": 0.5, "eval_blocks": 6}
    for name in ("decay_fraction", "eval_sequences"):
        del settings_[name]
    del state["seconds"]
    state |= {"settings": settings_, "sequences": 8 * 4, "random_state": torch.get_rng_state()}
    torch.save(state, out / "ckpt_000008.pt")
    stories = [attempt(sample, "--ckpt", path / "ckpt_000008.pt") for path in (out, whole.out)]
    assert stories[0].returncode == 0 and stories[0].stdout == stories[1].stdout
    assert attempt(train, *arguments(whole.data, out, **whole.changes, resume=True)).returncode == 0
    same_state(out / "ckpt_000012.pt", whole.out / "ckpt_000012.pt")


@pytest.mark.parametrize(
    ("before", "after"), [("float32", "float16"), ("bfloat16", "float16"), ("float16", "float32")]
)
def test_resume_in_another_dtype(before, after, tiny_data, tmp_path):
    """A checkpoint of one card goes on at another: only float16 has a scale, and it begins anew."""
    train_here(tiny_data, tmp_path / "out", dtype=before, max_iters=4)
    assert bool(read_checkpoint(tmp_path / "out")["scaler"]) == (before == "float16")
    train_here(tiny_data, tmp_path / "out", dtype=after, max_iters=8, resume=True)
    state = read_checkpoint(tmp_path / "out")
    assert state["step"] == 8 and bool(state["scaler"]) == (after == "float16")
    assert all(w.isfinite().all() for w in state["model"].values())


@pytest.mark.parametrize(
    ("key", "value"),
    {
        "block_size": 16,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": "muon",
        "seed": 1,
        "n_layer": 1,
        "head_dim": 8,
        "qk_norm": False,
    }.items(),
)
def test_resume_with_other_settings(key, value, adamw, tmp_path):
    """What would make it another run is refused by name, or by the word for it, and nothing is touched."""
    out = tmp_path / "out"
    stopped_at(adamw.out, out, 8)
    before = files_of(out)
    done = attempt(train, *arguments(adamw.data, out, **adamw.changes | {key: value}, resume=True))
    assert_one_line_error(done, out, "model_config" if key in ("n_layer", "head_dim", "qk_norm") else key)
    assert files_of(out) == before


def test_resume_with_another_tokenizer(adamw, tmp_path):
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(adamw.data, folder)
    model = (folder / "tokenizer.model").read_bytes() + b"\x3a\x00"  # another empty field: the same pieces
    (folder / "tokenizer.model").write_bytes(model)
    reseal(folder)
    stopped_at(adamw.out, out, 8)
    done = attempt(train, *arguments(folder, out, **adamw.changes, resume=True))
    assert_one_line_error(done, out, "tokenizer")


# ---- Losses that are not finite --------------------------------------------------------------------


def test_nan_weights_stop_the_run(adamw, tmp_path):
    """A checkpoint whose weights are not numbers: noticed at the next log, and no bad one is saved."""
    out = tmp_path / "out"
    stopped_at(adamw.out, out, 8)
    state = read_checkpoint(out / "ckpt_000008.pt")
    state["model"]["embedding.weight"][:] = math.nan
    torch.save(state, out / "ckpt_000008.pt")
    done = attempt(train, *arguments(adamw.data, out, **adamw.changes, resume=True))
    assert_one_line_error(done, "step 10:", "nan", "learning_rate")
    assert [p.name for p in find_checkpoints(out)] == ["ckpt_000008.pt"]


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize(("at", "noticed"), [(5, 6), (7, 8), (8, 8)])
def test_a_run_that_diverges_keeps_the_last_good_checkpoint(bad, at, noticed, tiny_data, tmp_path):
    """Noticed at the next log, and before the checkpoint that is due at step 8."""
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += torch.is_grad_enabled()
        value = train.next_token_loss(model, batch)["loss"]
        if calls == at:
            value = value * math.inf if bad == "loss" else value + (value - value).sqrt()
        return {"loss": value}

    with pytest.raises(UserError) as e:
        train_here(tiny_data, tmp_path / "out", loss_fn=loss, log_interval=3)
    assert len(str(e.value).splitlines()) == 1
    assert str(e.value).startswith(f"step {noticed}:") and "learning_rate" in str(e.value)
    (path,) = find_checkpoints(tmp_path / "out")
    state = read_checkpoint(path)
    assert state["step"] == 4 and all(w.isfinite().all() for w in state["model"].values())
    assert all(x["step"] < at for x in metrics_of(tmp_path / "out"))


def test_learning_rate_far_too_high(tiny_data, tmp_path):
    done = attempt(
        train,
        *arguments(
            tiny_data,
            tmp_path / "out",
            learning_rate=1e18,
            optimizer="adamw",
            warmup_iters=0,
            dtype="float32",
        ),
    )
    assert_one_line_error(done, "step 2:", "learning_rate")


# ---- Two processes ---------------------------------------------------------------------------------


RECORD = """
original = train.train
def loss(model, batch):
    with open(f"{folder}/seen{{train.run.rank()}}", "a") as f:
        for row in batch["tokens"].tolist() if torch.is_grad_enabled() else ():
            f.write(json.dumps(row) + "\\n")
    return train.next_token_loss(model, batch)
train.train = lambda *args: original(*args, loss_fn=loss)
"""
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--nproc_per_node=2",
    "--master_addr=127.0.0.1",
    "--master_port={port}",
]


def torchrun():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return [a.format(port=s.getsockname()[1]) for a in TORCHRUN]


HEAD = f"import json, os, signal, sys, time, torch\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
RUN = "\ntrain.report_errors(train.main)\n"


def test_two_processes_train_as_one(tiny_data, tmp_path):
    """The same sequences, shared out; the loss, the gradient norm, the evaluation and the weights to
    rounding.
    """
    changes = {"gradient_accumulation_steps": 2, "dtype": "float32", "optimizer": "adamw", "eval_interval": 3}
    as_two_processes(
        "-c",
        HEAD + RECORD.format(folder=tmp_path) + RUN,
        *arguments(tiny_data, tmp_path / "two", **changes),
    )
    one = []

    def loss(model, batch):
        one.extend(batch["tokens"].tolist() if torch.is_grad_enabled() else ())
        return train.next_token_loss(model, batch)

    s = Settings(**TINY | changes | {"data_dir": str(tiny_data), "out_dir": str(tmp_path / "one")})
    with train.run.training(s):
        train_data, val_data, _, metadata = train.open_data(s)
        train.train(s, GPT(config_of(tiny_data)), train_data, val_data, metadata, loss)
    seen = [[json.loads(x) for x in (tmp_path / f"seen{rank}").read_text().splitlines()] for rank in (0, 1)]
    assert len(one) == 12 * 8 and [len(rows) for rows in seen] == [48, 48]
    expected = [
        rows[i : i + 4] for i in range(0, 48, 4) for rows in seen
    ]  # first one's micro-batch, then the other's
    assert [row for batch in expected for row in batch] == one
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    a, b = (read_checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_two_processes_stop_together_and_resume(tiny_data, tmp_path):
    """SIGTERM to torchrun: one checkpoint, of a step both have finished; resumed by one process, the run has
    the loss curve of one that never stopped."""
    changes = {"gradient_accumulation_steps": 2, "dtype": "float32", "optimizer": "adamw", "max_iters": 40}
    changes |= {"save_interval": 1000, "eval_interval": 1000, "log_interval": 1}
    out = tmp_path / "two"
    process = start_script(*torchrun(), "train.py", *arguments(tiny_data, out, **changes))
    wait_for_step(process, out, 3)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    (path,) = find_checkpoints(out)
    step = read_checkpoint(path)["step"]
    assert 3 <= step < 40 and f"step {step}" in stdout and "--resume=True" in stdout, stdout + stderr
    assert attempt(train, *arguments(tiny_data, out, **changes, resume=True)).returncode == 0
    assert attempt(train, *arguments(tiny_data, tmp_path / "one", **changes)).returncode == 0
    lines = [[x for x in lines_of(tmp_path / name) if "loss" in x] for name in ("one", "two")]
    assert [x["step"] for x in lines[1]] == list(range(1, 41))
    for a, b in zip(*lines, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_steps_that_two_processes_cannot_share(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(train.run, "world_size", lambda: 2)
    done = attempt(train, *arguments(tiny_data, tmp_path / "out", gradient_accumulation_steps=3))
    assert_one_line_error(done, "gradient_accumulation_steps", "multiple", "2")


def test_each_process_builds_its_own_micro_batches_only(monkeypatch):
    """Of a step of 4 micro-batches of 2 sequences; the denominator is the sum over the processes."""
    data, s = Rows(100, 8), Settings(batch_size=2, gradient_accumulation_steps=4)
    built, batch = [], data.batch
    monkeypatch.setattr(
        data, "batch", lambda first, count: built.append((first, count)) or batch(first, count)
    )
    monkeypatch.setattr(train.run, "world_size", lambda: 2)
    monkeypatch.setattr(train.run, "all_reduce", lambda tensor: None)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(train.run, "rank", lambda rank=rank: rank)
        found.append(train.get_batch(data, 3, s, torch.device("cpu")))
        assert [len(x["tokens"]) for x in found[-1][0]] == [2, 2]
    assert built == [(24, 2), (28, 2), (26, 2), (30, 2)]
    assert sum(denominator for _, denominator in found) == (batch(24, 8)["targets"] != IGNORE).sum()


DRIFT = """
step = train.Muon.step
def drifting(self):
    step(self)
    with torch.no_grad():
        self.param_groups[0]["params"][0][0, 0] += train.run.rank() / 100
train.Muon.step = drifting
"""


def test_weights_that_differ_between_processes_are_noticed(tiny_data, tmp_path):
    """One weight of the second process drifts: no checkpoint is saved."""
    options = arguments(tiny_data, tmp_path / "out", gradient_accumulation_steps=2, optimizer="muon")
    (tmp_path / "drift.py").write_text(HEAD + DRIFT + RUN)
    done = run_script(*torchrun(), tmp_path / "drift.py", *options, check=False)
    errors = {line for line in done.stderr.splitlines() if line.startswith("error: ")}  # one or both say it
    assert len(errors) == 1 and "step 4: weights" in str(errors) and "differ between processes" in str(errors)
    assert (
        "exitcode: 2" in done.stderr and "train.py" not in done.stderr
    )  # of torchrun alone there is a traceback
    assert done.returncode and not find_checkpoints(tmp_path / "out")


STARTS_LATE = """
open_data = train.open_data
def slow(s):
    time.sleep(3 * (1 - train.run.rank()))
    return open_data(s)
train.open_data = slow
"""
ONE_IS_STOPPED = """
calls, original = [], train.train
def loss(model, batch):
    calls.append(batch)
    if train.run.rank() == 1 and len(calls) == 3:
        signal.raise_signal(signal.SIGINT)
    return train.next_token_loss(model, batch)
train.train = lambda *args: original(*args, loss_fn=loss)
"""


@pytest.mark.parametrize("code", [STARTS_LATE, ONE_IS_STOPPED], ids=["time", "signal"])
def test_two_processes_end_after_the_same_step(code, tiny_data, tmp_path):
    """Though the clock of one runs three seconds ahead of the other's, or only one is signalled."""
    options = {
        "gradient_accumulation_steps": 2,
        "max_iters": 10**6,
        "save_interval": 10**7,
        "eval_interval": 10**7,
    }
    options |= {"minutes": 0.1} if code == STARTS_LATE else {}
    printed = as_two_processes("-c", HEAD + code + RUN, *arguments(tiny_data, tmp_path / "out", **options))
    state = read_checkpoint(tmp_path / "out")
    if code == STARTS_LATE:
        assert state["seconds"] >= 6
    else:
        assert state["step"] == 3 and "stopped and saved at step 3" in printed


# ---- Types and compilation -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_types_of_the_products(dtype, tiny_data, tmp_path):
    """The matrix products are of the type asked for, the loss falls, and the weights stay float32."""
    seen = set()
    torch.manual_seed(5)
    model = GPT(config_of(tiny_data))
    model.blocks[0].mlp.up_proj.register_forward_hook(lambda module, args, y: seen.add(y.dtype))
    train_here(
        tiny_data, tmp_path / "out", model=model, dtype=dtype, max_iters=15, learning_rate=0.02, grad_clip=0.0
    )
    assert seen == {getattr(torch, dtype)}
    losses = [x["loss"] for x in metrics_of(tmp_path / "out") if "loss" in x]
    assert losses[-1] < losses[0] - 0.5
    state = read_checkpoint(tmp_path / "out")
    assert {w.dtype for w in state["model"].values()} == {torch.float32}
    assert bool(state["scaler"]) == (dtype == "float16")


def test_auto_takes_the_faster_type_and_a_resume_keeps_it(tiny_data, tmp_path):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is something better here")
    out, options = tmp_path / "out", {"device": "auto", "dtype": "auto"}
    done = attempt(train, *arguments(tiny_data, out, **options, max_iters=1))
    speeds = re.search(r"(\d+) GFLOP/s in float32, (\d+) in bfloat16", done.stdout)
    faster, other = ("float32", "bfloat16") if int(speeds[1]) > int(speeds[2]) else ("bfloat16", "float32")
    state = read_checkpoint(out)
    if abs(int(speeds[1]) - int(speeds[2])) > 0.3 * int(speeds[1]):  # else float32, which is more exact
        assert f"cpu, {faster}," in done.stdout and state["settings"]["dtype"] == faster
    state["settings"]["dtype"] = other  # the run of a machine where that was faster
    torch.save(state, out / "ckpt_000001.pt")
    done = attempt(train, *arguments(tiny_data, out, **options, max_iters=2, resume=True))
    assert f"cpu, {other}," in done.stdout and read_checkpoint(out)["settings"]["dtype"] == other


def test_a_terminal_without_chinese(tiny_data, tmp_path):
    """Shows the numbers of the characters, from which they could be had back, and trains on."""
    options = tiny(data_dir=tiny_data, out_dir=tmp_path, max_iters=4, sample_interval=2)
    done = run_script("train.py", *options, PYTHONIOENCODING="ascii")
    assert re.search(r"\\u[4-9][0-9a-f]{3}", done.stdout) and (tmp_path / "ckpt_000004.pt").exists()


@pytest.mark.parametrize("there", [[], ["clang++"]])
def test_without_a_cpp_compiler(there, tiny_data, tmp_path, monkeypatch):
    """One line says so, and it trains on, uncompiled; a compiler that PyTorch would not call is none."""
    (tmp_path / "bin").mkdir()
    for name in there:
        (tmp_path / "bin" / name).symlink_to(shutil.which("c++") or pytest.skip("no compiler here at all"))
    monkeypatch.delenv("CXX", raising=False)
    changes = {"max_iters": 2, "compile": True, "eval_interval": 1000}
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_script(
        "train.py",
        *arguments(tiny_data, tmp_path / "out", **changes),
        check=False,
        PATH=str(tmp_path / "bin"),
        **cache,
    )
    assert done.returncode == 0, done.stderr[-500:]
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("torch.compile does not work here")
    assert "C++ compiler" in line and "apt install g++" in line
    assert read_checkpoint(tmp_path / "out")["step"] == 2


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_compiled_runs_continue_with_the_same_bits(tiny_data, tmp_path):
    """With deterministic=True, on two threads."""
    changes = {"compile": True, "deterministic": True, "n_layer": 1}
    whole = tmp_path / "whole"
    run_script("train.py", *arguments(tiny_data, whole, **changes), OMP_NUM_THREADS="2")
    stopped_at(whole, tmp_path / "out", 8)
    run_script(
        "train.py", *arguments(tiny_data, tmp_path / "out", **changes, resume=True), OMP_NUM_THREADS="2"
    )
    same_state(tmp_path / "out" / "ckpt_000012.pt", whole / "ckpt_000012.pt")
    assert lines_of(tmp_path / "out") == lines_of(whole)


# ---- Bad input -------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(tiny_data, tmp_path):
    """A copy of the data to spoil, and a run on it that must end with one line and leave nothing."""
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(tiny_data, folder)

    def refused(*words, **changes):
        done = attempt(train, *arguments(folder, out, **changes))
        assert_one_line_error(done, *words)
        assert not out.exists() or [p.name for p in out.iterdir()] == ["lock"]

    refused.folder, refused.out = folder, out
    return refused


def test_missing_data(spoilt, tmp_path):
    shutil.rmtree(spoilt.folder)
    spoilt(spoilt.folder, "prepare.py")
    spoilt.folder.write_text("a file")
    spoilt(spoilt.folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.model", "meta.json"])
def test_missing_and_empty_files(name, spoilt):
    (spoilt.folder / name).write_bytes(b"")
    spoilt(name)
    (spoilt.folder / name).unlink()
    spoilt(name)
    (spoilt.folder / name).mkdir()
    spoilt(name)


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[]",
        b"{}",
        b"null",
        b"3",
        b'"x"',
        b"\xff\xfe",
        b'{"vocab_size": 2000}',
        b"\0" * 100,
        b'{"vocab_size": "x", "tokenizer_sha256": 3}',
    ],
    ids=range(10),
)
def test_damaged_meta(text, spoilt):
    (spoilt.folder / "meta.json").write_bytes(text)
    spoilt(spoilt.folder)


def test_truncated_meta(spoilt):
    whole = (spoilt.folder / "meta.json").read_bytes()
    for length in range(0, whole.rindex(b"tokenizer_sha256"), 40):
        (spoilt.folder / "meta.json").write_bytes(whole[:length])
        spoilt("meta.json", "prepare.py")


def test_a_tokenizer_that_is_none(spoilt):
    path = spoilt.folder / "tokenizer.model"
    for garbage in (b"no tokenizer", b"\0" * 1000, path.read_bytes()[:1000]):
        path.write_bytes(garbage)
        spoilt("tokenizer.model", "SentencePiece")


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_bins_of_a_wrong_size(name, spoilt):
    path = spoilt.folder / name
    good = np.fromfile(path, dtype="<u2")
    path.write_bytes(good.tobytes() + b"\0")
    spoilt(name, "bytes")
    good[:32].tofile(path)  # one token short of a block and its last target
    spoilt(name, "64 bytes", "prepare.py")
    reseal(spoilt.folder)
    spoilt(name, "block_size", 32)
    good[:33].tofile(path)
    reseal(spoilt.folder)
    assert attempt(train, *arguments(spoilt.folder, spoilt.out, max_iters=1)).returncode == 0


def test_block_size_longer_than_the_data(spoilt):
    spoilt(".bin", "block_size", "1000000", block_size=1_000_000)


def test_a_validation_split_too_short_for_a_sequence(tiny_data, tmp_path):
    """The advice names what changes it: the share held out, not only block_size."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    np.fromfile(folder / "val.bin", dtype="<u2")[:20].tofile(folder / "val.bin")
    reseal(folder)
    assert_one_line_error(
        attempt(train, *arguments(folder, tmp_path / "out")), "val.bin", "block_size", "--val_fraction"
    )


def test_shapes_that_cannot_be(spoilt):
    spoilt("head_dim", head_dim=7)
    spoilt("n_kv_head", n_kv_head=3)
    spoilt("rope_theta", rope_theta=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_asked_for_and_absent(spoilt):
    spoilt("cuda", "cpu", device="cuda")
    spoilt("cuda:1", device="cuda:1")


def test_out_dir_that_cannot_be_written(tiny_data, tmp_path):
    (tmp_path / "file").write_text("a file")
    for out, word in (
        (tmp_path / "file",) * 2,
        (tmp_path / "file" / "out",) * 2,
        ("/proc/none/out", "/proc/none"),
    ):
        assert_one_line_error(attempt(train, *arguments(tiny_data, out)), word)
    assert (tmp_path / "file").read_text() == "a file"
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert_one_line_error(attempt(train, *arguments(tiny_data, tmp_path / "closed" / "out")), "closed")


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_malicious_checkpoints_are_not_run(adamw, tmp_path):
    """As PyTorch saves them and as plain pickles, inside an otherwise good one too."""
    mark = tmp_path / "mark"
    good = read_checkpoint(adamw.out / "ckpt_000008.pt")
    for i, evil in enumerate((Evil(mark), good | {"model": Evil(mark)}, good | {"extra": [Evil(mark)]})):
        for save in (torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))):
            out = tmp_path / f"out{i}"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            save(evil, out / "ckpt_000008.pt")
            done = attempt(train, *arguments(adamw.data, out, **adamw.changes, resume=True))
            assert_one_line_error(done, "ckpt_000008.pt")
            assert not mark.exists()


FOREIGN = [{"a": 1}, [1, 2], None, 7, "text", torch.zeros(3), {"model": {}}, {1: 2}]


@pytest.mark.parametrize("what", FOREIGN, ids=range(8))
def test_foreign_checkpoints(what, adamw, tmp_path):
    torch.save(what, tmp_path / "ckpt_000008.pt")
    done = attempt(train, *arguments(adamw.data, tmp_path, **adamw.changes, resume=True))
    assert_one_line_error(done, "ckpt_000008.pt")
    assert files_of(tmp_path).keys() == {"ckpt_000008.pt"}


@pytest.mark.parametrize("key", ["model", "model_config", "tokenizer", "step", "optimizers"])
def test_checkpoints_with_a_part_missing(key, adamw, tmp_path):
    state = read_checkpoint(adamw.out / "ckpt_000008.pt")
    del state[key]
    torch.save(state, tmp_path / "ckpt_000008.pt")
    done = attempt(train, *arguments(adamw.data, tmp_path, **adamw.changes, resume=True))
    assert_one_line_error(done, tmp_path)


def test_checkpoints_that_lack_a_weight(adamw, tmp_path):
    state = read_checkpoint(adamw.out / "ckpt_000008.pt")
    del state["model"]["norm.weight"]
    torch.save(state, tmp_path / "ckpt_000008.pt")
    assert_one_line_error(attempt(sample, "--ckpt", tmp_path), tmp_path)


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=80)
    | st.binary(max_size=40).map(lambda b: b"\x80\x02" + b)
    | st.tuples(st.integers(0, 90), st.integers(0, 255)).map(
        lambda t: (
            (b := bytearray(pickle.dumps({"model": {"a": 1.5}, "step": [3, "x"]}, 2))).__setitem__(
                t[0] % len(b), t[1]
            )
            or bytes(b)
        )
    )
)
@pytest.mark.filterwarnings("ignore")
def test_no_bytes_at_all_make_a_traceback(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.pt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"fuzz\.pt: "):
        read_checkpoint(path)


def test_freed_memory_is_kept():
    """A large tensor made again and again gets its pages from the system once, not each time."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc's allocator is told to keep memory")
    code = """
import resource, sys, torch, train
if sys.argv[1] == "keep":
    train.run.keep_freed_memory()
for _ in range(20):
    torch.zeros(1 << 24).add_(1)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    kept, returned = (int(run_script("-c", code, how).stdout) for how in ("keep", "return"))
    assert returned - kept > 10 * (1 << 26) / 4096  # of 19 times, in pages of 4 KiB


def test_the_sample_story_is_that_of_a_slow_loop(pretrained, capsys):
    """The same random numbers give the same story."""
    saved = read_checkpoint(pretrained)
    model, tokenizer = build_model(saved, pretrained), load_tokenizer(saved["tokenizer"], pretrained)
    ids, generator = [tokenizer.eos_id(), *tokenizer.encode("一只小")], torch.Generator().manual_seed(7)
    train.print_sample(model, tokenizer, ids, 7)
    story = list(ids)
    while len(story) < model.config.block_size:
        with torch.no_grad():
            values, likely = (model(torch.tensor([story]))[0, -1] / 0.8).topk(50)
        new = likely[torch.multinomial(values.softmax(dim=-1), 1, generator=generator)].item()
        if new == tokenizer.eos_id():
            break
        story.append(new)
    told = tokenizer.decode(story[len(ids) :]).rstrip("\ufffd")
    assert len(told) > 20 and capsys.readouterr().out == f"[一只小]\n{told}\n\n"
