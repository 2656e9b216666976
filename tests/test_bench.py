"""The benchmark itself: fair contenders, turns taken, rows as promised, mistakes in one line."""

import json
import time

import pytest
import torch
from conftest import assert_one_line_error, run_script

from tools import bench


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
