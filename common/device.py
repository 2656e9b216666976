"""The hardware: device and number type, torch.compile, memory, and the processes of a data-parallel run."""

import contextlib
import ctypes
import datetime
import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.files import locked
from common.settings import UserError
from model import GPT, LOGITS_PER_CHUNK

resource: Any
try:
    import resource
except ImportError:  # Windows
    resource = None

TIMEOUT = datetime.timedelta(minutes=10)  # a process waits this long for the others


def choose_device(name: str, dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """The device and the type of the matrix products, as asked for or the best there is. Raises UserError."""
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        raise UserError(
            f"PyTorch {torch.__version__}: too old; 2.13 is tested, 2.11 was seen to work: see requirements.txt"
        )
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


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep freed memory in the process.

    By default the memory of a freed large tensor goes back to the system, and the next tensor gets new memory page by
    page: a fifth of a training step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: allocate on the heap only
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s that large matrix products reach here, measured: MFU is a share of it."""
    n = 8192 if device.type == "cuda" else 512
    generator = torch.Generator(device)  # does not advance the generator of the run
    a = torch.randn(n, n, device=device, dtype=dtype, generator=generator)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a number waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_memory(device: torch.device) -> int | None:
    """Peak memory so far, in bytes: of the GPU if there is one, else of the process; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compile_model(model: Callable, device: torch.device, mode: str | None = None):
    """torch.compile(model), which shares its weights with `model`; where that cannot work, `model` itself."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    header = Path(sysconfig.get_path("include"), "Python.h")  # compiled kernels are Python extensions
    if device.type != "mps" and not (shutil.which(compiler) and header.exists()):
        print(
            "no C++ compiler found, or Python's headers are missing: continuing without torch.compile, which is slower "
            "(try: apt install g++ python3-dev)"
        )
        return model
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        print("this GPU is too old for torch.compile (compute capability below 7.0): continuing without it")
        return model
    if device.type == "cpu":
        from torch._inductor import config as compiler_config  # imported here: it takes as long as PyTorch itself

        # A vector times a matrix is bound by reading the matrix. A fused loop reads it up to three times as fast as
        # the matrix library does.
        limit = {"cpu_max_other_dimension_decomposition": 1 << 20}
        compiler_config.post_grad_fusion_options["decompose_mm_pass"] = limit
    return model if device.type == "mps" else torch.compile(model, mode=mode)


def estimate_memory(model: GPT, s, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of weights, gradients, optimizer state, and of what a micro-batch stores for its backward pass."""
    c, size = model.config, dtype.itemsize
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.requires_grad and p.dim() == 2)
    state = 4 * model.count_parameters() + 12 * trainable
    state -= 4 * matrices if s.optimizer == "muon" else 0  # Muon has one moment
    heads = (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim
    token = c.n_layer * (8 * c.n_embd + size * (2 * c.n_embd + 2 * heads + 3 * c.intermediate_size))
    if device.type == "cpu":  # `attend` stores five eighths of all attention weights
        token += c.n_layer * c.n_head * s.block_size * size * 5 // 8
    loss = LOGITS_PER_CHUNK[device.type] * c.vocab_size * (8 + size) + 8 * c.vocab_size * c.n_embd
    return state + s.batch_size * s.block_size * token + loss


# ---------------------------------------------------------------------------------------------------
# Data-parallel processes. torchrun sets RANK, WORLD_SIZE and LOCAL_RANK in their environments.


def process_rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def processes(s):
    """Run the body as one of torchrun's processes, or as the only one. The first one locks s.out_dir."""
    if "RANK" in os.environ:
        device, _ = choose_device(s.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    torch.manual_seed(s.seed)
    out_dir = Path(s.out_dir)
    with locked(out_dir / "lock", out_dir) if process_rank() == 0 else contextlib.nullcontext():
        yield
        if dist.is_initialized():
            dist.destroy_process_group()


def all_reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> None:
    """dist.all_reduce, in place; with one process, nothing. Raises UserError if another process has ended or hangs."""
    if world_size() == 1:
        return
    try:
        dist.all_reduce(tensor, op)
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"another process of this run has ended or hangs ({reason}); continue with --resume=True"
        ) from None


def all_reduce_together(tensors: list[torch.Tensor]) -> None:
    """Sum each tensor over all processes, in place, in one transfer."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
