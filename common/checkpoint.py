"""Reading a checkpoint and choosing the hardware: what training, sampling and the tools share.

A checkpoint is one file: weights, the model's shape and the tokenizer, so that it samples anywhere; and the
optimizers, the step and the settings, so that training continues from it. `train.save` writes it.
"""

import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from common.files import UserError, compiler_error
from model import GPT, ModelConfig


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first. Their names are ckpt_ and the step."""
    step_of = {}
    for path in folder.glob("ckpt_*.pt"):
        step = path.stem.removeprefix("ckpt_")
        if step.isdecimal():
            step_of[path] = int(step)
    return sorted(step_of, key=step_of.__getitem__, reverse=True)


def read_checkpoint(path: Path) -> dict:
    """Load a checkpoint onto the CPU; only tensors and plain values are accepted, never code.

    `path` is a file, or a folder for its newest one. Raises UserError. tools/check.py looks for damage.
    """
    if path.is_dir():
        checkpoints = find_checkpoints(path)
        if not checkpoints:
            raise UserError(f"{path}: no checkpoint (ckpt_*.pt) in this folder; has the training saved one?")
        path = checkpoints[0]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {how_to_train(path)}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"model", "model_config", "tokenizer", "step"} - checkpoint.keys()
    except Exception as e:  # the unpickler of a damaged file can raise anything
        # Without its message, as PyTorch's advice is to run the file's code.
        found = f"not a checkpoint that can be read ({type(e).__name__}: damaged, foreign, or holds code)"
        raise UserError(f"{path}: {found}; is there an older one?") from None
    if missing:
        raise UserError(f"{path}: not a checkpoint of this program ({min(missing)!r} is missing)")
    return checkpoint


def how_to_train(run: Path) -> str:
    """What to do where a run is missing: the command that makes it, if a config has its name."""
    config = Path("config", f"{run.name}.py")
    if not config.exists():
        return "give a checkpoint, or the folder of a run such as out/demo"
    script = "python train.py"
    if run.name.endswith("_sft"):
        script = "python sft.py"
    elif run.name.endswith("_dpo"):
        script = "python -m tools.dpo"
    return f"train it first: {script} {config.as_posix()}"


def newest_run(folder: Path) -> Path:
    """The run in a folder of runs whose checkpoint was written last. Raises UserError."""
    checkpoints = []
    for run in folder.glob("*"):
        checkpoints += find_checkpoints(run)[:1]
    if not checkpoints:
        raise UserError(f"{folder}: no run here; train one first: python train.py config/demo.py")
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime)
    return newest.parent


def build_model(checkpoint: dict, path: Path) -> GPT:
    """The model of a checkpoint, in float32 on the CPU. Raises UserError naming `path`."""
    try:
        model = GPT(ModelConfig(**checkpoint["model_config"]))
        model.load_state_dict(merge_lora(checkpoint))
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, ArithmeticError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"{path}: weights and shape do not fit ({reason})") from None
    return model


def merge_lora(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint. Each W with an adapter (sft.py) becomes W + (alpha / rank) B A."""
    weights = {}
    adapter_key = "parametrizations.weight."
    for name, weight in checkpoint["model"].items():
        prefix, separator, part = name.partition(adapter_key)
        if not separator:
            weights[name] = weight
        elif part == "original":  # 0.A and 0.B are merged with it
            a = checkpoint["model"][f"{prefix}{adapter_key}0.A"]  # (rank, in)
            b = checkpoint["model"][f"{prefix}{adapter_key}0.B"]  # (out, rank)
            scale = checkpoint["lora"]["alpha"] / a.size(0)
            weights[f"{prefix}weight"] = weight + scale * (b @ a)  # (out, in)
    return weights


# ---- The hardware ----------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """Choose a device, as asked for or the best there is, and make it the current one. Raises UserError.

    On CUDA float32 products become TF32, which is faster and less exact.
    """
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":  # torchrun gives each of its processes a card by this number
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # raises if there is no such device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device = {name!r}: PyTorch finds no such device here; try --device=cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    return device


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
    float32 = matmul_flops(device, torch.float32, 256)
    bfloat16 = matmul_flops(device, torch.bfloat16, 256)
    if show:
        print(f"matrix products: {float32 / 1e9:.0f} GFLOP/s in float32, {bfloat16 / 1e9:.0f} in bfloat16")
    return torch.bfloat16 if bfloat16 > 1.15 * float32 else torch.float32


def matmul_flops(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """The FLOP/s of a product of n x n matrices, the best of a few tries."""
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a number waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def try_compile(function, device: torch.device, mode: str | None = None):
    """torch.compile(function). Where compiling fails, it says so, and returns `function` itself.

    It is tried on a small function, which shows whether the C++ compiler is there, and can use its folders.
    """
    if device.type == "mps":
        return function
    choose_compiler()
    try:
        torch.compile(double)(torch.ones(8, device=device))
    except Exception as e:  # whatever the compiler raises
        found = f"torch.compile does not work here ({compiler_error(e)})"
        needed = "a C++ compiler (apt install g++ python3-dev), and paths without spaces"
        advice = f"it needs {needed}; TORCHINDUCTOR_CACHE_DIR=FOLDER chooses where it writes"
        print(f"{found}; continuing without it, which is slower; {advice}", file=sys.stderr)
        return function
    return torch.compile(function, mode=mode)


def choose_compiler() -> None:
    """Let PyTorch use CXX="ccache g++" or CXX="g++ -m64": it takes CXX for the name of one program."""
    name = os.environ.get("CXX", "")
    words = [word for word in name.split() if not word.startswith("-")]
    if words and not shutil.which(name):
        from torch._inductor import config  # takes as long to import as PyTorch, and is needed anyway

        config.cpp.cxx = (None, words[-1])


def double(x: torch.Tensor) -> torch.Tensor:
    return x + x
