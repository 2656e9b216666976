"""Reading a checkpoint and choosing the hardware: what training, sampling and the tools share.

A checkpoint is one file: weights, the model's shape and the tokenizer, so that it samples anywhere; and the optimizers,
the step and the settings, so that training continues from it. `train.train` writes it.
"""

import math
import os
import re
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import torch

from common.files import UserError
from model import GPT, ModelConfig


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first. Their names are ckpt_ and the step."""
    numbered = [(int(m[1]), p) for p in folder.glob("ckpt_*.pt") if (m := re.fullmatch(r"ckpt_(\d+)\.pt", p.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def read_checkpoint(path: Path) -> dict:
    """Load a checkpoint onto the CPU; only tensors and plain values are accepted, never code.

    `path` is a file, or a folder for its newest one. Raises UserError. Damage is left to `python -m tools.check`.
    """
    if path.is_dir():
        if not (checkpoints := find_checkpoints(path)):
            raise UserError(f"{path}: no checkpoint (ckpt_*.pt) in this folder; has the training saved one?")
        path = checkpoints[0]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model"], checkpoint["model_config"], checkpoint["tokenizer"], checkpoint["step"]  # raises KeyError
    except Exception as e:  # the unpickler of a damaged file can raise anything; PyTorch's advice is to run its code
        reason = f"{type(e).__name__}: it is damaged, of another program, or holds code"
        raise UserError(f"{path}: not a checkpoint that can be read ({reason}); is there an older one?") from None
    return checkpoint


def build_model(checkpoint: dict, path: Path) -> GPT:
    """The model of a checkpoint, in float32 on the CPU. Raises UserError naming `path`.

    A weight with a LoRA adapter (sft.py) becomes W + (alpha / rank) B A.
    """
    try:
        weights = dict(checkpoint["model"])
        for name in [name for name in weights if name.endswith(".parametrizations.weight.original")]:
            prefix = name.removesuffix("original")
            w, a, b = (weights.pop(prefix + part) for part in ("original", "0.A", "0.B"))
            merged = w + checkpoint["lora"]["alpha"] / a.size(0) * (b @ a)  # a: (rank, in)
            weights[prefix.replace("parametrizations.weight.", "weight")] = merged
        model = GPT(ModelConfig(**checkpoint["model_config"]))
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, ArithmeticError) as e:
        raise UserError(f"{path}: weights and shape do not fit ({str(e).splitlines()[0]})") from None
    return model


# ---- The hardware ----------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device, as asked for or the best there is. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":  # torchrun gives each of its processes a card by this number
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # raises if there is no such device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device = {name!r}: PyTorch finds no such device here; try --device=cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    return device


def matmul_flops(device: torch.device, dtype: torch.dtype, n: int = 0) -> float:
    """The FLOP/s of a product of n x n matrices, the best of a few tries; by default of large ones."""
    n = n or (8192 if device.type == "cuda" else 512)
    a, best = torch.ones(n, n, device=device, dtype=dtype), math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a number waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def choose_dtype(name: str, device: torch.device, show: bool = False) -> torch.dtype:
    """The type of the matrix products, as asked for or the fastest.

    On a CPU "auto" measures, in milliseconds: some that list instructions for bfloat16 are slower with them.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float32
    float32, bfloat16 = (matmul_flops(device, dtype, 256) / 1e9 for dtype in (torch.float32, torch.bfloat16))
    if show:
        print(f"matrix products: {float32:.0f} GFLOP/s in float32, {bfloat16:.0f} in bfloat16")
    return torch.bfloat16 if bfloat16 > 1.15 * float32 else torch.float32


def try_compile(function, device: torch.device, mode: str | None = None):
    """torch.compile(function); where that cannot work, `function` itself."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    header = Path(sysconfig.get_path("include"), "Python.h")  # compiled kernels are Python extensions
    if device.type == "mps":
        return function
    if not (shutil.which(compiler) and header.exists()):
        print("no compiler here (try: apt install g++ python3-dev): continuing without torch.compile, which is slower")
        return function
    return torch.compile(function, mode=mode)
