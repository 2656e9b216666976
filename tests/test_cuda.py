"""What only an NVIDIA GPU shows: the numbers of a CPU, training to the bit, memory, and the later stages.

docs/benchmarks.md names the card these last passed on.
"""

import dataclasses

import pytest
import torch
from helpers import metrics_of, run_script, same_state, small_model, tiny, tuning
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


# ---- The same numbers as on a CPU ------------------------------------------------------------------


def batch_of(masked):
    """Tokens and targets, some of them left out; if masked, also which text each token is of."""
    torch.manual_seed(1)
    tokens, targets = torch.randint(0, 97, (2, 3, 40))
    targets[:, ::3] = IGNORE
    if not masked:
        return [tokens, targets]
    places = torch.arange(40)
    documents = torch.stack([places // 40, places // 15, places // 7])
    return [tokens, targets, documents]


def loss_and_gradients(batch, device, compiled=False):
    model = small_model().to(device)
    loss_fn = model.loss
    if compiled:
        loss_fn = try_compile(loss_fn, torch.device(device))
    loss = loss_fn(*[tensor.to(device) for tensor in batch])
    loss.backward()
    return loss.item(), [p.grad.cpu() for p in model.parameters()]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradients_equal_the_cpus(masked, compiled):
    batch = batch_of(masked)
    expected_loss, expected_gradients = loss_and_gradients(batch, "cpu")
    loss, gradients = loss_and_gradients(batch, "cuda", compiled)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-3, rtol=1e-3)


FUSED = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]
ONE_LAYER = ModelConfig(
    vocab_size=97,
    block_size=64,
    n_layer=1,
    n_head=4,
    n_kv_head=4,
    head_dim=64,
    n_embd=32,
    intermediate_size=48,
)


@pytest.mark.parametrize("n_kv_head", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_attends_with_fused_kernels(dtype, masked, n_kv_head):
    """Forbidden the plain one, which holds all attention weights, PyTorch raises where it finds no other."""
    model = GPT(dataclasses.replace(ONE_LAYER, n_kv_head=n_kv_head)).cuda()
    batch = [tensor.cuda() for tensor in batch_of(masked)]
    autocast = torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16)
    with sdpa_kernel(FUSED), autocast:
        model.loss(*batch).backward()


def told(model, **how):
    """What the model tells after three beginnings."""
    prompts = [[3, 4, 5], [7], [8, 9, 10, 11, 12]]
    tokens = generate(model, prompts, 20, end_token=0, **how)
    return torch.stack(list(tokens)).tolist()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("n_kv_head", [2, 6])
def test_greedy_stories_equal_the_cpus(n_kv_head, compiled):
    model = small_model(n_kv_head=n_kv_head)
    expected = told(model, temperature=0)
    assert told(model.cuda(), temperature=0, compile=compiled) == expected


def test_the_same_seed_draws_the_same_story():
    model = small_model().cuda()
    first = told(model, temperature=1.5, seed=1)
    assert told(model, temperature=1.5, seed=1) == first
    assert told(model, temperature=1.5, seed=2) != first


# ---- Training --------------------------------------------------------------------------------------


ON_CUDA = {"device": "cuda", "dtype": "auto"}


def train_on_cuda(data, out, **changes):
    """The arguments of a small run on the GPU."""
    return ["train.py", *tiny(data_dir=data, out_dir=out, **ON_CUDA | changes)]


@pytest.mark.parametrize("changes", [{"compile": False}, {"compile": True}, {"document_mask": True}])
def test_a_resumed_run_has_the_same_bits(tiny_data, tmp_path, changes):
    out = tmp_path / "out"
    run = train_on_cuda(tiny_data, out, sample_interval=6, **changes)
    run_script(*run)
    whole = (out / "ckpt_000012.pt").rename(tmp_path / "whole.pt")
    first, *_, last = metrics_of(out)
    assert last["val_loss"] < first["loss"]
    assert "resuming at step 8" in run_script(*run, "--resume=True").stdout
    same_state(out, whole)


def test_float16_learns_with_scaled_gradients(tiny_data, tmp_path):
    run = train_on_cuda(
        tiny_data,
        tmp_path,
        dtype="float16",
        max_iters=20,
        eval_interval=20,
        learning_rate=0.02,
    )
    run_script(*run)
    assert read_checkpoint(tmp_path)["scaler"]["scale"] > 1
    first, *_, last = metrics_of(tmp_path)
    assert last["val_loss"] < first["loss"] - 0.5


def test_torchrun_brings_up_nccl(tiny_data, tmp_path):
    run_script("-m", "torch.distributed.run", "--nproc_per_node=1", *train_on_cuda(tiny_data, tmp_path))
    assert (tmp_path / "ckpt_000012.pt").exists()


def test_expected_memory_is_near_what_is_taken(tiny_data, tmp_path):
    run = train_on_cuda(
        tiny_data,
        tmp_path,
        n_layer=3,
        n_embd=512,
        n_head=8,
        n_kv_head=4,
        head_dim=64,
        intermediate_size=1536,
        block_size=256,
        batch_size=64,
        max_iters=4,
        compile=True,
        dtype="bfloat16",
    )
    run_script(*run)
    model = build_model(read_checkpoint(tmp_path), tmp_path)
    settings = load_settings(run[1:], Settings, "")
    expected = estimate_memory(model, settings)
    taken = metrics_of(tmp_path)[-1]["peak_memory"]
    assert 0.7 < taken / expected < 1.3


# ---- Tuning, evaluating, sampling ------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned_on_cuda(pretrained, tiny_sft, tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda") / "sft"
    settings = tuning(pretrained, tiny_sft, out, **ON_CUDA, max_iters=20)
    run_script("sft.py", *settings)
    return out


def test_tuning(tuned_on_cuda):
    first, *_, last = metrics_of(tuned_on_cuda)
    assert last["val_loss"] < first["loss"]


def test_tuning_compiled(pretrained, tiny_sft, tmp_path):
    settings = tuning(pretrained, tiny_sft, tmp_path, **ON_CUDA, compile=True, max_iters=2)
    run_script("sft.py", *settings)


def test_preferring(tuned_on_cuda, tiny_sft, tmp_path):
    """Pairs of the model's own stories, and adapters. Not compiled: the test above shows that that works."""
    settings = tuning(
        tuned_on_cuda,
        tiny_sft,
        tmp_path,
        **ON_CUDA,
        max_iters=4,
        instructions=16,
        samples=2,
        reference_chosen=True,
        lora_rank=4,
    )
    run_script("-m", "tools.dpo", *settings)
    run_script("sample.py", "--ckpt", tmp_path, "--words=太阳", "--num=1", "--device=cuda")


def test_evaluating_and_sampling(tuned_on_cuda):
    model = ["--ckpt", tuned_on_cuda, "--device=cuda"]
    run_script("-m", "tools.eval", *model, "--num=4", "--best_of=2")
    run_script("sample.py", *model, "--words=太阳", "--best_of=2")
    run_script("sample.py", *model, "--words=太阳", "--dtype=bfloat16", "--num=1", "--compile")
