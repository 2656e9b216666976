"""tools.bench measures this program beside transformers; tools.estimate counts what a config will take.

Of the benchmark: models of one size, the same work for each, turns, medians, ratios to the best baseline. Of
the estimate: it equals what an H200 measured, and counts what a config says.
"""

import functools
import json
import math
import time

import pytest
import torch
from helpers import ROOT, assert_refused, meta_of, run_here, small_model

from tools import bench
from tools import estimate as estimate_tool
from tools.dpo import Settings as DpoSettings
from tools.dpo import log_probs
from tools.estimate import estimate, estimate_memory
from train import Settings, new_model

CONFIGS = ROOT / "config"

# ---- What is measured ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["this", "transformers", "transformers' GPT-2"])
def test_models_of_one_size_with_the_same_loss(name):
    """The mean over all targets: before training near the logarithm of the vocabulary."""
    pytest.importorskip("transformers")
    model = bench.build_model(name, 1000)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(19.8e6, rel=0.02)
    loss = bench.mean_loss(model, torch.randint(1000, (2, 40)))
    assert loss.item() == pytest.approx(math.log(1000), rel=0.05)


@pytest.fixture
def model(monkeypatch):
    """A small model in the place of the one that is measured."""
    small = small_model(vocab_size=8, block_size=bench.LENGTH)
    monkeypatch.setattr(bench, "build_model", lambda name, vocab_size: small)
    monkeypatch.setattr(bench, "try_compile", lambda function, device: function)
    monkeypatch.setattr(bench, "SMALL_VOCABULARY", 8)
    return small


def test_a_step_trains_all_weights(model):
    before = [p.clone() for p in model.parameters()]
    bench.prepare_training("this", 8, 2, torch.float32)()
    for old, new in zip(before, model.parameters(), strict=True):
        assert not old.equal(new) and new.grad is None


def test_generation_does_not_end_early(model):
    """Although each of the eight tokens is likely."""
    steps = []
    model.register_forward_hook(lambda *args: steps.append(1))
    bench.prepare_generation("this", (3, 5.0, torch.float32))()
    assert len(steps) == bench.NEW_TOKENS


# ---- Turns, medians, rows --------------------------------------------------------------------------


def waiting(name, log):
    """An implementation that logs its turns, of which the second takes long."""

    def wait():
        with open(log, "a") as f:
            f.write(name)
        if log.read_text().count(name) == 2:
            time.sleep(1.5)

    return wait


def cannot_run():
    raise ImportError("no such thing")


def test_implementations_take_turns(tmp_path, capsys):
    """In processes of their own; one that cannot run is left out."""
    log = tmp_path / "log"
    implementations = {name: functools.partial(waiting, name, log) for name in "ab"}
    seconds, peaks = bench.benchmark({"other": cannot_run, **implementations}, rounds=3)
    assert log.read_text() == "abababab"  # once to warm up, then in turn
    assert seconds.keys() == peaks.keys() == {"a", "b"}
    assert max(seconds.values()) < 0.45  # the median; the mean is 0.5
    assert min(peaks.values()) > 1e7
    assert "other: ImportError no such thing; left out" in capsys.readouterr().out


def test_this_program_must_run():
    with pytest.raises(ImportError):
        bench.benchmark({"this, --compile": cannot_run}, rounds=1)


def test_ratios_are_to_the_best_baseline(capsys):
    values = {"this": 30.0, "transformers": 20.0, "slow": 10.0}
    ours, theirs, _ = bench.compare("speed", "tokens a second", values)
    assert ours == theirs | {
        "name": "speed, this",
        "value": 30.0,
        "baseline": "transformers",
        "ratio": 1.5,
    }
    assert "1.50x transformers" in capsys.readouterr().out
    ours, _, _ = bench.compare("memory", "GiB", values, best=min)
    assert ours["baseline"] == "slow"


def test_rows_are_written(tmp_path, monkeypatch):
    parts = {"a": lambda rounds: [rounds], "b": lambda rounds: [10 + rounds]}
    monkeypatch.setattr(bench, "PARTS", parts)
    path = tmp_path / "rows.json"
    run_here(bench, "--json", path)
    assert json.loads(path.read_text()) == [3, 13]
    run_here(bench, "b", "--rounds=1", "--json", path)
    assert json.loads(path.read_text()) == [11]


def test_mistakes():
    assert_refused(bench, ["trian"], "trian", "train")
    assert_refused(bench, ["train", "--rounds=0"], "--rounds")


# ---- The estimate ----------------------------------------------------------------------------------


def test_the_estimate_equals_what_an_h200_did():
    """docs/benchmarks.md: 927,000 tokens/s were 34% of the 776 TFLOP/s measured there, with 9,596 MiB of
    memory.
    """
    e = estimate(CONFIGS / "microstories.py", 8192, 0)
    assert 0.34 * 776e12 / e.flops_per_token == pytest.approx(927_000, rel=0.02)
    assert e.memory / 2**20 == pytest.approx(9_596, rel=0.1)
    assert e.steps * e.tokens_per_step == 10_000 * 64 * 4 * 512


def test_a_row_for_every_config():
    """Its hours: all products at the speed of the data sheet, divided by the share of it that is reached."""
    configs = sorted(CONFIGS.glob("micro*.py"))
    header, _, *rows = run_here(estimate_tool, *configs, "--gpu=4090").stdout.splitlines()
    assert header.startswith("4090: 165 TFLOP/s")
    assert [row.split()[0] for row in rows] == [config.name for config in configs]
    e = estimate(configs[0], 8192, 0)
    flops = e.steps * e.tokens_per_step * e.flops_per_token
    hours = flops / 165e12 / 3600
    *_, at_35, at_45 = rows[0].split()
    assert at_35 == f"{hours / 0.35:.2f}"
    assert at_45 == f"{hours / 0.45:.2f}"


def test_a_config_that_does_not_fit(tmp_path):
    (tmp_path / "large.py").write_text("batch_size = 1000\n")
    assert "large.py: does not fit" in run_here(estimate_tool, tmp_path / "large.py").stdout


def test_steps_of_tuning():
    """They come from the epochs; of preferences each pair has two sequences."""
    assert estimate(CONFIGS / "microstories_sft.py", 8192, 12_801).steps == 301
    e = estimate(CONFIGS / "microstories_dpo.py", 8192, 0)
    assert e.steps == 20_000 // 32 and e.tokens_per_step == 8 * 4 * 512 * 2


def test_the_prepared_data_counts(tmp_path, tiny_data):
    config = tmp_path / "mine.py"
    config.write_text(f"data_dir = '{tiny_data}'\nblock_size = 100\nbatch_size = 1\nepochs = 1.0\n")
    e = estimate(config, 8192, 0)
    assert e.steps == meta_of(tiny_data)["train"]["tokens"] // 100
    assert e.parameters == new_model(Settings(), 2000).count_parameters()


def test_estimates_that_cannot_be(tmp_path):
    assert_refused(estimate_tool, ["config/microstories.py", "--gpu=abacus"], "abacus", "3090")
    (tmp_path / "mine.py").write_text('init_from = "out/other"\n')
    assert_refused(estimate_tool, [tmp_path / "mine.py"], "mine.py", "other.py")


def test_memory_of_pairs_is_near_what_autograd_keeps():
    """Of both stories of each pair, with the logits of every token and, backward, two gradients of them."""
    model = small_model(
        vocab_size=8000,
        block_size=64,
        n_layer=4,
        head_dim=32,
        n_embd=256,
        intermediate_size=768,
    )
    tokens = torch.randint(8000, (4, 2, 64))
    kept = {}  # by their addresses

    def keep(tensor):
        return kept.setdefault(tensor.data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        log_probs(model, {"tokens": tokens, "targets": tokens})
    for p in model.parameters():
        kept.pop(p.data_ptr(), None)
    activations = sum(tensor.nbytes for tensor in kept.values())
    gradients_of_logits = 2 * 4 * tokens.numel() * 8000
    # Weights and gradients, one moment of Muon's for the blocks' matrices, two of AdamW's for the rest.
    muons = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    state = 16 * model.count_parameters() - 4 * muons
    s = DpoSettings(block_size=64, batch_size=4)
    found = estimate_memory(model, s, number_size=4)
    assert found - state == pytest.approx(activations + gradients_of_logits, rel=0.2)
    s.optimizer = "adamw"
    assert estimate_memory(model, s, number_size=4) == found + 4 * muons
