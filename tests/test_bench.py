"""The benchmark itself: fair contenders, turns taken, rows as promised, mistakes in one line."""

import json
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_script

from tools import bench
from tools.estimate import estimate


def test_contenders_are_of_one_size():
    pytest.importorskip("transformers")
    makers = (bench.ours, bench.full_logits, bench.llama_of_transformers, bench.classic_gpt2)
    sizes = [sum(p.numel() for p in make(1000)[0].parameters()) for make in makers]
    assert max(sizes) < 1.03 * min(sizes)


def test_our_two_losses_are_one():
    """Chunked and full logits differ in memory alone."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 300, (2, 40))
    (model, chunked), (_, full) = bench.ours(300), bench.full_logits(300)
    torch.testing.assert_close(chunked(model, tokens), full(model, tokens))


def test_the_classic_model_is_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = bench.ClassicGPT(300)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=bench.LENGTH, n_embd=512, n_layer=6, n_head=8, activation_function="gelu"
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    state = {"wte.weight": ours.tokens.weight, "wpe.weight": ours.positions.weight}
    parts = {"norm1": "ln_1", "norm2": "ln_2", "qkv": "attn.c_attn", "out": "attn.c_proj", "mlp.0": "mlp.c_fc"}
    for name, weight in ours.state_dict().items():
        if name.startswith("blocks."):
            _, layer, part = name.split(".", 2)
            part, kind = part.rsplit(".", 1)
            turned = weight.T if weight.dim() == 2 else weight  # GPT-2 stores its matrices the other way round
            state[f"h.{layer}.{(parts | {'mlp.2': 'mlp.c_proj'})[part]}.{kind}"] = turned
        elif name.startswith("norm."):
            state[name.replace("norm", "ln_f")] = weight
    theirs.transformer.load_state_dict(state)
    tokens = torch.randint(0, 300, (2, 50))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def waiting(seconds: float, log: str):
    def wait():
        with open(log, "a") as f:
            f.write(f"{seconds} ")
        time.sleep(seconds)

    return wait


def not_here():
    raise ImportError("no", name="nowhere")


def too_large():
    return lambda: bytes(1 << 60)


def test_contenders_take_turns(tmp_path, capsys):
    log = str(tmp_path / "log")
    contenders = {
        "slow": (waiting, 0.2, log),
        "absent": (not_here,),
        "large": (too_large,),
        "fast": (waiting, 0.01, log),
    }
    result = bench.benchmark(contenders, rounds=3)
    printed = capsys.readouterr().out
    assert list(result) == ["slow", "fast"] and "nowhere" in printed and "large: out of memory; left out" in printed
    assert result["slow"][0] >= 0.2 and result["fast"][0] >= 0.01 and result["fast"][1] > 1e6
    assert (tmp_path / "log").read_text().split() == ["0.2", "0.01"] * 4  # once to warm up, then in turn


def test_rows(tmp_path):
    done = run_script(
        "-m", "tools.bench", "prepare", "--megabytes", 1, "--rounds", 1, "--json", tmp_path / "bench.json"
    )
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert {tuple(r) for r in rows} == {("name", "value", "unit", "peer", "ratio", "bar", "holds")}
    first = rows[0]
    assert first["name"] == "prepare, 1 MB" and first["bar"] == 8 and first["holds"] == (first["value"] >= 8)
    assert "prepare, 1 MB" in done.stdout


@pytest.mark.parametrize("args", [["trian"], ["train", "--rounds", "0"], ["prepare", "--megabytes", "0"]])
def test_mistakes(args):
    assert_one_line_error(run_script("-m", "tools.bench", *args, check=False), args[-2] if len(args) > 1 else args[0])


# ---------------------------------------------------------------------------------------------------
# The estimate of a config's cost


def test_the_estimate_equals_what_an_h200_did():
    """docs/benchmarks.md: 927,000 tokens/s were 34% of the 776 TFLOP/s measured there, with 9,596 MiB of memory."""
    e = estimate(ROOT / "config" / "microstories.py", 8192, 0)
    assert 0.34 * 776e12 / e.flops_per_token == pytest.approx(927_000, rel=0.02)
    assert e.memory / 2**20 == pytest.approx(9_596, rel=0.1)
    assert e.steps * e.tokens_per_step == 10_000 * 64 * 4 * 512


def test_flops_by_hand():
    """Of a config with every number written out: 6 for each weight of a matrix, and attention to half the sequence."""
    e = estimate(ROOT / "config" / "microstories_chatglm.py", 64_789, 0)
    layer = 512 * 6 * 48 * 4 + 3 * 512 * 768
    assert e.parameters == 64_789 * 512 + 6 * layer + (2 * 6 + 1) * 512
    assert e.flops_per_token == 6 * (64_789 * 512 + 6 * layer) + 6 * 6 * 512 * 6 * 48


def test_estimates_of_every_config(tmp_path):
    """All configs but the base have one; the steps of tuning come from the epochs; more time at a smaller share."""
    paths = [p for p in sorted((ROOT / "config").glob("*.py")) if p.name != "one_gpu.py"]
    done = run_script(
        "-m", "tools.bench", "--estimate", *paths, "--json", tmp_path / "rows.json", "--sequences", 12_800
    )
    rows = {Path(row["config"]).name: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows.keys() == {p.name for p in paths} and all(p.name in done.stdout for p in paths)
    assert all(row["hours"][0] > row["hours"][1] > 0 and row["memory"] < 24e9 for row in rows.values())
    assert rows["microstories_sft.py"]["steps"] == 3 * 12_800 // 128
    assert rows["microstories_dpo.py"]["tokens_per_step"] == 8 * 4 * 512 * 2


def test_estimates_that_cannot_be(tmp_path):
    done = run_script("-m", "tools.bench", "--estimate", "config/microstories.py", "--gpu", "abacus", check=False)
    assert_one_line_error(done, "abacus", "3090")
    (tmp_path / "mine.py").write_text('init_from = "out/other"\n')
    done = run_script("-m", "tools.bench", "--estimate", tmp_path / "mine.py", check=False)
    assert_one_line_error(done, "mine.py", "other.py")
