"""tools.bench: fair implementations that take turns, rows as promised. tools.estimate: against runs and by
hand.
"""

import functools
import json
import math
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_script, script_here

from model import GPT, ModelConfig
from sample import generate
from tools import bench
from tools import estimate as estimate_tool
from tools.dpo import PreferenceDataset, preference_loss
from tools.dpo import Settings as DpoSettings
from tools.estimate import estimate, estimate_memory
from train import Settings, new_model

NAMES = ("this", "transformers", "transformers' GPT-2")


def test_implementations_are_of_one_size():
    pytest.importorskip("transformers")
    sizes = [sum(p.numel() for p in bench.build_model(name, 1000).parameters()) for name in NAMES]
    assert max(sizes) < 1.03 * min(sizes)


def test_losses_are_means_over_the_same_targets():
    """Of untrained models: near the logarithm of the vocabulary."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens = torch.randint(0, 300, (2, 40))
    for name in NAMES:
        loss = bench.mean_loss(bench.build_model(name, 300), tokens)
        assert loss.item() == pytest.approx(math.log(300), rel=0.05)


def test_generation_does_not_end_early():
    """With -1 as the end token, as in the benchmark, every sequence takes all steps; here all 8 tokens
    occur.
    """
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 1, "n_kv_head": 1, "head_dim": 8, "n_embd": 8, "intermediate_size": 8}
    model = GPT(ModelConfig(vocab_size=8, block_size=200, **shape))
    tokens = torch.stack(list(generate(model, [[1], [2, 3]], 150, -1, temperature=1.0)))
    assert tokens.shape == (150, 2)
    assert set(tokens.flatten().tolist()) == set(range(8))


def waiting(seconds, log):
    def wait():
        with open(log, "a") as f:
            f.write(f"{seconds} ")
        time.sleep(seconds)

    return wait


def not_installed():
    raise ImportError("No module named 'nowhere'")


def too_large():
    return lambda: bytes(1 << 60)


def test_implementations_take_turns(tmp_path, capsys):
    log = str(tmp_path / "log")
    implementations = {
        "slow": functools.partial(waiting, 0.2, log),
        "absent": not_installed,
        "large": too_large,
        "fast": functools.partial(waiting, 0.01, log),
    }
    seconds, peaks = bench.benchmark(implementations, rounds=3)
    printed = capsys.readouterr().out
    assert list(seconds) == list(peaks) == ["slow", "fast"]
    assert "nowhere" in printed and "large: MemoryError" in printed
    assert seconds["slow"] >= 0.2 > seconds["fast"] >= 0.01
    assert peaks["fast"] > 1e6
    assert (tmp_path / "log").read_text().split() == ["0.2", "0.01"] * 4  # once to warm up, then in turn


def test_ours_must_run():
    with pytest.raises(MemoryError):
        bench.benchmark({"this": too_large}, rounds=1)


def test_ratios_are_to_the_best_baseline(capsys):
    values = {"this": 30.0, "this, --compile": 60.0, "transformers": 20.0, "slow": 10.0}
    rows = [
        (row.get("baseline"), row.get("ratio")) for row in bench.compare("speed", "tokens a second", values)
    ]
    assert rows == [("transformers", 1.5), ("transformers", 3.0), (None, None), (None, None)]
    assert "1.50x transformers" in capsys.readouterr().out
    assert bench.compare("memory", "GiB", values, best=min)[0]["baseline"] == "slow"
    assert "ratio" not in bench.compare("speed", "tokens a second", {"this": 30.0})[0]


def test_rows_are_written(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.PARTS, "train", lambda rounds: bench.compare("a", "unit", {"this": rounds}))
    done = script_here(bench.main, "bench", "train", "--rounds", "2", "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows == [{"name": "a, this", "value": 2, "unit": "unit"}]


def test_mistakes():
    assert_one_line_error(script_here(bench.main, "bench", "trian"), "trian", "train")
    assert_one_line_error(script_here(bench.main, "bench", "train", "--rounds", "0"), "--rounds")


# ---- The estimate ----------------------------------------------------------------------------------


def test_the_estimate_equals_what_an_h200_did():
    """docs/benchmarks.md: 927,000 tokens/s were 34% of the 776 TFLOP/s measured there, with 9,596 MiB of
    memory.
    """
    e = estimate(ROOT / "config" / "microstories.py", 8192, 0)
    assert 0.34 * 776e12 / e.flops_per_token == pytest.approx(927_000, rel=0.02)
    assert e.memory / 2**20 == pytest.approx(9_596, rel=0.1)
    assert e.steps * e.tokens_per_step == 10_000 * 64 * 4 * 512


def test_flops_by_hand():
    """Of a config with every number written out: 6 for each weight of a matrix, and attention to half the
    sequence.
    """
    e = estimate(ROOT / "config" / "microstories_chatglm.py", 64_789, 0)
    layer = 512 * 6 * 48 * 4 + 3 * 512 * 768
    assert e.parameters == 64_789 * 512 + 6 * layer + (2 * 6 + 1) * 512
    assert e.flops_per_token == 6 * (64_789 * 512 + 6 * layer) + 6 * 6 * 512 * 6 * 48


def test_a_row_for_every_config():
    configs = sorted((ROOT / "config").glob("*.py"))
    done = run_script("-m", "tools.estimate", *configs, "--gpu", "4090")
    header, titles, *rows = done.stdout.splitlines()
    assert header.startswith("4090: 165 TFLOP/s") and titles.endswith("hours at 45%")
    assert [row.split()[0] for row in rows] == [config.name for config in configs]


def test_hours(capsys):
    """All products at the speed of the data sheet, divided by the share that is reached."""
    config = ROOT / "config" / "microstories.py"
    estimate_tool.print_estimates([config], "3090", 8192, 0)
    *_, at_35, at_45 = capsys.readouterr().out.splitlines()[-1].split()
    e = estimate(config, 8192, 0)
    seconds = e.steps * e.tokens_per_step * e.flops_per_token / 71e12
    assert float(at_35) == pytest.approx(seconds / 3600 / 0.35, abs=0.01)
    assert float(at_45) == pytest.approx(seconds / 3600 / 0.45, abs=0.01)


def test_steps_of_tuning():
    """They come from the epochs; of preferences each pair has two sequences."""
    e = estimate(ROOT / "config" / "microstories_sft.py", 8192, 12_800)
    assert e.steps == 3 * 12_800 // 128
    e = estimate(ROOT / "config" / "microstories_dpo.py", 8192, 0)
    assert e.steps == 20_000 // 32 and e.tokens_per_step == 8 * 4 * 512 * 2


def test_the_prepared_data_counts(tmp_path, tiny_data):
    config = tmp_path / "mine.py"
    config.write_text(
        f'data_dir = "{tiny_data.as_posix()}"\nblock_size = 100\nbatch_size = 1\nepochs = 1.0\n'
    )
    meta = json.loads((tiny_data / "meta.json").read_text())
    e = estimate(config, 8192, 0)
    assert e.steps == meta["train"]["tokens"] // 100
    assert e.parameters == new_model(Settings(), meta["vocab_size"]).count_parameters()


def test_estimates_that_cannot_be(tmp_path):
    main = estimate_tool.main
    assert_one_line_error(
        script_here(main, "estimate", "config/microstories.py", "--gpu", "abacus"), "abacus", "3090"
    )
    (tmp_path / "mine.py").write_text('init_from = "out/other"\n')
    assert_one_line_error(script_here(main, "estimate", tmp_path / "mine.py"), "mine.py", "other.py")


def test_memory_of_pairs_is_near_what_autograd_keeps():
    """Of both stories of each pair, with the logits of every token and, backward, two gradients of them."""
    shape = {
        "n_layer": 4,
        "n_head": 4,
        "n_kv_head": 4,
        "head_dim": 64,
        "n_embd": 256,
        "intermediate_size": 768,
    }
    model = GPT(ModelConfig(vocab_size=8000, block_size=256, **shape))
    data = PreferenceDataset(Path("made up"), [([5] * 20, [6] * 200, [7] * 150)] * 4, 256, 0, 0)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    s = DpoSettings(block_size=256, batch_size=4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        preference_loss(model, data.sequences(range(4)), s)
    activations = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
    # Muon has one float32 for each weight of a block's matrices, AdamW two for the rest; weights and
    # gradients.
    muons = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    state = 12 * muons + 16 * (sum(p.numel() for p in model.parameters()) - muons)
    expected = state + activations + 2 * 4 * (4 * 2 * 256) * 8000
    assert estimate_memory(model, s, number_size=4) == pytest.approx(expected, rel=0.2)
