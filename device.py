"""The machine: which device and number type to use, whether to compile, how fast and how full it is."""

import contextlib
import ctypes
import datetime
import math
import os
import resource
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from config import LoopSettings
from disk import locked
from errors import UserError
from model import GPT, LOSS_ROWS

PATIENCE = datetime.timedelta(minutes=10)  # how long a process waits for the others


def choose_device(name: str, dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """The device and the type of the matrix products, as asked for or the best there is. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":  # torchrun gives each of its processes a card by this number
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"device = {name!r}: must be auto, cuda, mps or cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available() or device.index >= torch.cuda.device_count():
            raise UserError(f"device = {name!r}: PyTorch finds no such CUDA device here; try --device=cpu")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device = 'mps': not available here; try --device=cpu")
    if dtype != "auto":
        return device, getattr(torch, dtype)
    if device.type == "cuda":
        return device, torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Without instructions for it, a CPU's bfloat16 is emulated, and slow.
    able = torch.cpu.get_capabilities()
    fast = device.type == "cpu" and (able.get("avx512_bf16") or able.get("amx_bf16"))
    return device, torch.bfloat16 if fast else torch.float32


def keep_memory() -> None:
    """Have freed memory kept by the process, where its allocator is glibc's.

    By default a large tensor's memory goes back to the system when it is freed, and comes anew, page by page,
    for the next: a fifth of a training step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no memory outside the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The floating point operations a second that large matrix products reach here, measured."""
    n = 8192 if device.type == "cuda" else 512
    chance = torch.Generator(device)  # leaves the run's own be
    a = torch.randn(n, n, device=device, dtype=dtype, generator=chance)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a number back waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_memory(device: torch.device) -> int:
    """The most bytes held at once so far: on the GPU where there is one, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compile_model(model: Callable, device: torch.device, mode: str | None = None):
    """The model through torch.compile, in one of its modes, where that works; it shares its weights with `model`."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    header = Path(sysconfig.get_path("include"), "Python.h")  # compiled kernels are Python extensions
    if device.type != "mps" and not (shutil.which(compiler) and header.exists()):
        print(
            "no C++ compiler found, or Python's headers are missing: going on without torch.compile, which is slower "
            "(try: apt install g++ python3-dev)"
        )
        return model
    if device.type == "cpu":
        from torch._inductor import config as compiler_config  # only now: it takes as long to load as PyTorch itself

        # One row times a matrix is bound by reading the matrix: a plain fused loop reads it up to three times as
        # fast as a matrix library does.
        limit = {"cpu_max_other_dimension_decomposition": 1 << 20}
        compiler_config.post_grad_fusion_options["decompose_mm_pass"] = limit
    return model if device.type == "mps" else torch.compile(model, mode=mode)


def expected_memory(model: GPT, settings: LoopSettings, dtype: torch.dtype) -> int:
    """Bytes of weights, gradients, optimizer state, and of what a micro-batch keeps for its backward pass."""
    c, size = model.config, dtype.itemsize
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.requires_grad and p.dim() == 2)
    state = 4 * model.count_parameters() + 12 * learned
    state -= 4 * matrices if settings.optimizer == "muon" else 0  # Muon keeps one moment
    heads = (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim
    token = c.n_layer * (8 * c.n_embd + size * (2 * c.n_embd + 2 * heads + 3 * c.intermediate_size))
    if model.embedding.weight.is_cpu:  # what `attend` keeps: five eighths of all the attention weights
        token += c.n_layer * c.n_head * settings.block_size * size * 5 // 8
    loss = LOSS_ROWS[model.embedding.weight.device.type] * c.vocab_size * (8 + size) + 8 * c.vocab_size * c.n_embd
    return state + settings.batch_size * settings.block_size * token + loss


@contextlib.contextmanager
def processes(s: LoopSettings):
    """Run the body as one of the processes that torchrun started, or as the only one: with out_dir to itself."""
    if "RANK" in os.environ:
        device, _ = choose_device(s.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    torch.manual_seed(s.seed)
    out_dir, first = Path(s.out_dir), os.environ.get("RANK", "0") == "0"
    with locked(out_dir / "lock", out_dir) if first else contextlib.nullcontext():
        yield
        if dist.is_initialized():
            dist.destroy_process_group()


def all_reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> None:
    """dist.all_reduce, in place. Raises UserError when one of the other processes has ended, or hangs."""
    try:
        dist.all_reduce(tensor, op)
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"another process of this run has ended or hangs ({reason}); go on with --resume=True"
        ) from None
