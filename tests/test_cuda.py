"""What only an NVIDIA GPU shows. docs/benchmarks.md names the card these last passed on."""

import pytest
import torch
from conftest import TINY, metrics_of, run_script, tiny, tuning
from test_model import small
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.checkpoint import build_model, read_checkpoint, try_compile
from common.settings import load_settings
from model import GPT, IGNORE, ModelConfig
from sample import generate
from tools.estimate import estimate_memory
from train import Settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(autouse=True)
def exact():
    """No TF32, which rounds to 10 bits."""
    torch.set_float32_matmul_precision("highest")


def rows():
    """Tokens of three rows, which texts they are of, and targets, some of them left out."""
    torch.manual_seed(1)
    tokens, targets = torch.randint(0, 97, (2, 3, 40))
    documents = torch.tensor([[0] * 40, [0] * 7 + [1] * 33, [0] * 20 + [1] * 10 + [2] * 10])
    targets[:, ::3] = IGNORE
    return tokens, targets, documents


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradients_equal_the_cpus(masked, compiled):
    tokens, targets, documents = rows()
    documents = documents if masked else None
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        model = small().to(device)
        call = try_compile(model.loss, torch.device(device)) if compiled and device == "cuda" else model.loss
        loss = call(
            tokens.to(device), targets.to(device), None if documents is None else documents.to(device)
        )
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.cpu() for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("n_kv_head", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_training_attends_with_fused_kernels(masked, n_kv_head):
    """Forbidden the plain one, which holds all attention weights, PyTorch raises where it finds no other."""
    shape = {"vocab_size": 97, "block_size": 64, "n_layer": 1, "n_head": 4, "head_dim": 64, "n_embd": 32}
    model = GPT(ModelConfig(**shape, n_kv_head=n_kv_head, intermediate_size=48)).cuda()
    tokens = torch.randint(0, 97, (2, 64), device="cuda")
    documents = (torch.arange(64, device="cuda") // 20).expand(2, 64) if masked else None
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    for dtype in (torch.bfloat16, torch.float32):
        with sdpa_kernel(fused), torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
            model.loss(tokens, tokens, documents).backward()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("n_kv_head", [2, 6])
def test_greedy_stories_equal_the_cpus(n_kv_head, compiled):
    prompts = [[3, 4, 5], [7], [8, 9, 10, 11, 12]]
    model = small(n_kv_head=n_kv_head)
    expected = torch.stack(list(generate(model, prompts, 20, end_token=0, temperature=0)))
    told = list(generate(model.cuda(), prompts, 20, end_token=0, temperature=0, compile=compiled))
    assert torch.equal(torch.stack(told).cpu(), expected)


def test_the_same_seed_draws_the_same_story():
    model = small().cuda()
    first, again, other = (
        torch.stack(list(generate(model, [[3], [4, 5]], 30, end_token=0, temperature=1.5, seed=seed)))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("options", [{"compile": False}, {"compile": True}, {"document_mask": True}])
def test_a_resumed_run_ends_with_the_same_bits(tiny_data, tmp_path, options):
    run = [
        "train.py",
        *tiny(data_dir=tiny_data, out_dir=tmp_path / "out", device="cuda", sample_interval=6, **options),
    ]
    run_script(*run)
    last = tmp_path / "out" / "ckpt_000012.pt"
    whole = torch.load(last, weights_only=True)["model"]
    assert metrics_of(tmp_path / "out")[0]["loss"] > metrics_of(tmp_path / "out")[-1]["val_loss"]
    last.unlink()
    assert "resuming at step 8" in run_script(*run, "--resume=True").stdout
    again = torch.load(last, weights_only=True)["model"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_float16_learns_with_scaled_gradients(tiny_data, tmp_path):
    options = {
        "device": "cuda",
        "dtype": "float16",
        "learning_rate": 0.02,
        "max_iters": 20,
        "eval_interval": 20,
    }
    run_script("train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path, **options))
    assert torch.load(tmp_path / "ckpt_000020.pt", weights_only=True)["scaler"]["scale"] > 1
    assert metrics_of(tmp_path)[-1]["val_loss"] < metrics_of(tmp_path)[0]["loss"] - 0.5


def test_torchrun_brings_up_nccl(tiny_data, tmp_path):
    options = tiny(data_dir=tiny_data, out_dir=tmp_path, device="cuda")
    run_script("-m", "torch.distributed.run", "--nproc_per_node=1", "train.py", *options)
    assert (tmp_path / "ckpt_000012.pt").exists()


def test_expected_memory_is_near_what_is_taken(tiny_data, tmp_path):
    shape = {
        "n_layer": 3,
        "n_embd": 512,
        "n_head": 8,
        "n_kv_head": 4,
        "head_dim": 64,
        "intermediate_size": 1536,
    }
    shape |= {"block_size": 256, "batch_size": 64, "max_iters": 4, "compile": True, "device": "cuda"}
    run_script("train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path, dtype="bfloat16", **shape))
    model = build_model(read_checkpoint(tmp_path), tmp_path)
    s = load_settings(tiny(**shape), Settings, "")
    expected = estimate_memory(model, s)
    taken = [line["peak_memory"] for line in metrics_of(tmp_path) if "peak_memory" in line][-1]
    assert 0.7 < taken / expected < 1.3, (taken / 2**20, expected / 2**20)


@pytest.fixture(scope="module")
def tuned_on_cuda(pretrained, tiny_sft, tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda") / "sft"
    run_script(*tuning(pretrained, tiny_sft, out, device="cuda", compile=False, max_iters=20))
    return out


def test_tuning(tuned_on_cuda):
    assert metrics_of(tuned_on_cuda)[-1]["val_loss"] < metrics_of(tuned_on_cuda)[0]["loss"]


def test_tuning_compiled(pretrained, tiny_sft, tmp_path):
    run_script(*tuning(pretrained, tiny_sft, tmp_path, device="cuda", compile=True, max_iters=2))


def test_preferring(tuned_on_cuda, tiny_sft, tmp_path):
    """Pairs of the model's own stories, and adapters. Not compiled: the two tests above show that that
    works.
    """
    options = {
        "init_from": tuned_on_cuda,
        "data_dir": tiny_sft,
        "out_dir": tmp_path / "dpo",
        "device": "cuda",
    }
    options |= {
        "block_size": TINY["block_size"] * 8,
        "batch_size": 4,
        "max_iters": 4,
        "instructions": 16,
        "samples": 2,
    }
    options |= {"lora_rank": 4, "compile": False, "reference_chosen": True}
    run_script("-m", "tools.dpo", *(f"--{key}={value}" for key, value in options.items()))
    run_script("sample.py", "--ckpt", tmp_path / "dpo", "--words", "太阳", "--num", 1, "--device", "cuda")


def test_evaluating_and_sampling(tuned_on_cuda):
    run_script("-m", "tools.eval", "--ckpt", tuned_on_cuda, "--num", 4, "--best_of", 2, "--device", "cuda")
    run_script("sample.py", "--ckpt", tuned_on_cuda, "--words", "太阳", "--best_of", 2, "--device", "cuda")
    run_script("sample.py", "--ckpt", tuned_on_cuda, "--words", "太阳", "--device", "cuda", "--dtype", "bfloat16",
               "--num", 1, "--compile")  # fmt: skip
