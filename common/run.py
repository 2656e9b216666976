"""What keeps a training run in order: processes of torchrun, the lock, signals, logs, checks.

train.py, sft.py and tools/dpo.py use it. A reader who wants to know what is learned may skip this file.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from common.checkpoint import choose_device, choose_dtype, find_checkpoints
from common.files import UserError, atomic_write, locked, usable_cores

# The commands at the top of the configs, by the folder they make
PREPARE_COMMANDS = {
    "data/demo": "python prepare.py",
    "data/demo_sft": "python prepare.py --task sft --tokenizer data/demo/tokenizer.model",
    "data/microstories": "python prepare.py --download tinystories-zh --out_dir data/microstories",
    "data/microstories_sft": "python prepare.py --task sft --download tinystories-zh "
    "--tokenizer data/microstories/tokenizer.model --out_dir data/microstories_sft",
    "data/microstories_chatglm": "python prepare.py --download tinystories-zh "
    "--tokenizer chatglm_tokenizer.model --out_dir data/microstories_chatglm",
}


@contextlib.contextmanager
def training(s):
    """Configure PyTorch, join torchrun's processes, seed, and lock out_dir; then run the body.

    Raises UserError if out_dir is in use, or holds a run and s.resume is False.
    """
    configure_pytorch(s.deterministic)
    join_processes(s.device)
    torch.manual_seed(s.seed)
    out_dir = Path(s.out_dir)
    lock = locked(out_dir / "lock", out_dir) if rank() == 0 else contextlib.nullcontext()
    with lock:
        checkpoints = find_checkpoints(out_dir)
        if checkpoints and not s.resume:
            found = f"holds a run ({checkpoints[0].name})"
            raise UserError(f"{out_dir}: {found}; add --resume=True or choose another out_dir")
        yield
        all_reduce(torch.zeros(1))  # the others wait until the first has saved
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- Processes -------------------------------------------------------------------------------------


def join_processes(device: str) -> None:
    """Join the other processes that torchrun has started, if it has. Raises UserError."""
    given = [name for name in ("RANK", "WORLD_SIZE") if os.environ.get(name)]
    if not given:
        return
    advice = f"start with torchrun, or unset {' '.join(given)}"
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name)
        if not value:
            raise UserError(f"environment: {given[0]} is set, but {name} is not; {advice}")
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise UserError(f"environment: {name} = {value!r} is not a number; {advice}")
    variables = f"RANK = {os.environ['RANK']}, WORLD_SIZE = {os.environ['WORLD_SIZE']}"
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise UserError(f"environment: {variables}: ranks count from 0; {advice}")
    backend = "gloo"
    if choose_device(device).type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as e:
        where = f"MASTER_ADDR = {os.environ['MASTER_ADDR']}, MASTER_PORT = {os.environ['MASTER_PORT']}"
        reason = str(e).splitlines()[0]
        raise UserError(f"environment: {variables}, {where}: {reason}; {advice}") from None


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(*tensors: torch.Tensor, op=dist.ReduceOp.SUM) -> None:
    """Sum each tensor over all processes, in place, in one transfer. Raises UserError."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    try:
        dist.all_reduce(flat, op)
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        problem = f"another process has ended or hangs ({reason})"
        raise UserError(f"{problem}; continue with --resume=True") from None
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, total in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(total.view_as(tensor))


def agree_on_end(stop_requested: bool, seconds: float) -> tuple[bool, float]:
    """Whether one process has to stop, and the longest of their times: all stop after the same step."""
    both = torch.tensor([float(stop_requested), seconds], dtype=torch.float64)
    all_reduce(both, op=dist.ReduceOp.MAX)
    any_requested, longest = both.tolist()
    return any_requested > 0, longest


def agree_on_dtype(name: str, device: torch.device, saved: dict) -> str:
    """The type of the matrix products: that of the first process, for all. "auto" is the fastest.

    On a CPU "auto" is measured, and differs from time to time. A run that continues from `saved` keeps it.
    """
    saved_name = saved.get("settings", {}).get("dtype")
    if name == "auto" and device.type == "cpu" and saved_name in ("float32", "bfloat16"):
        name = saved_name
    dtype = choose_dtype(name, device, show=rank() == 0)
    chosen = [str(dtype).removeprefix("torch.")]
    if world_size() > 1:
        dist.broadcast_object_list(chosen)
    return chosen[0]


# ---- Setting up ------------------------------------------------------------------------------------


def configure_pytorch(deterministic: bool) -> None:
    """Choose deterministic algorithms, and keep freed memory."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.use_deterministic_algorithms(deterministic)
    except OSError as e:
        problem = "PyTorch writes what it compiles there"
        advice = "choose another folder with TORCHINDUCTOR_CACHE_DIR"
        raise UserError(f"{e.filename}: {e.strerror}; {problem}; {advice}") from None
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # more would wait for each other
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # takes time
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the system: getting it again takes a fifth of a CPU's step.

    Its environment variables would do the same, but it reads them before Python begins.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: allocate on the heap only
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def catch_signals() -> threading.Event:
    """Let Ctrl-C, SIGTERM and a closed terminal set the event: the run saves and ends.

    A second one of the same kind ends it at once.
    """
    requested = threading.Event()
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def on_signal(number, frame):
        requested.set()
        signal.signal(number, signal.SIG_DFL)
        if number not in (signal.SIGINT, signal.SIGTERM):  # the terminal is gone: writing to it would fail
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for fd in terminals:
                os.dup2(nowhere, fd)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup sets
        signal.signal(signal.SIGHUP, on_signal)
    return requested


def print_settings(s, model, train_data, step: int) -> None:
    """Print the settings and what follows from them, in the first process."""
    if rank() > 0:
        return
    for key, value in dataclasses.asdict(s).items():
        print(f"{key} = {value!r}")
    sequences_per_step = s.batch_size * s.gradient_accumulation_steps
    tokens_per_step = sequences_per_step * train_data.tokens_per_sequence
    epochs = s.max_iters * sequences_per_step / len(train_data)
    device = model.embedding.weight.device
    print(f"{model.count_parameters():,} parameters, {device}, {s.dtype}, {tokens_per_step:,} tokens a step")
    print(f"{s.max_iters:,} steps are {epochs:.1f} epochs of {len(train_data):,} sequences")
    if s.warmup_iters >= s.max_iters:
        share = s.max_iters / s.warmup_iters
        problem = f"all steps are warm-up, up to {share:.0%} of learning_rate"
        print(f"warmup_iters = {s.warmup_iters}: {problem}; lower it")
    print(f"resuming at step {step:,}" if step else "starting from the beginning", flush=True)


def print_end(step: int, finished: bool) -> None:
    """Say how the run ended, in the first process."""
    if rank() > 0:
        return
    if finished:
        print(f"finished and saved at step {step:,}")
    else:
        print(f"stopped and saved at step {step:,}; to continue, give the same command with --resume=True")


def how_to_prepare(folder: Path) -> str:
    """What to do where prepared data is missing: the command at the top of the config, for its data."""
    command = PREPARE_COMMANDS.get(folder.as_posix())
    if not command:
        return f"run python prepare.py YOUR_FILES --out_dir {folder}"
    advice = f"run {command}"
    if folder.name == "microstories":
        advice += "; or, for a try, add --data_dir=data/demo"
    return advice


# ---- Checks, which only raise ----------------------------------------------------------------------


def check_data(s, train_data, val_data) -> None:
    """Raise a UserError if settings, data and processes do not fit."""
    n = s.gradient_accumulation_steps
    if n % world_size():
        problem = f"not a multiple of {world_size()} processes"
        remedy = f"set it to {world_size()}, and lower batch_size to keep the size of a step"
        raise UserError(f"gradient_accumulation_steps = {n}: {problem}; {remedy}")
    for data, advice in ((train_data, "add stories"), (val_data, "prepare with a larger --val_fraction")):
        if len(data) == 0:
            missing = f"holds no sequence of {s.block_size} tokens and one more"
            raise UserError(f"{data.path}: {missing}; lower block_size, or {advice}")


def check_same_run(saved: dict, s, model, metadata: dict) -> None:
    """Raise a UserError if the checkpoint is of another model or data, or has another `fixed` setting."""
    if "optimizers" not in saved:
        found = "its checkpoint holds a model, but no optimizers"
        raise UserError(f"{s.out_dir}: {found}; choose another out_dir")
    for field in dataclasses.fields(s):
        # A setting newer than the checkpoint: its default is how training was before.
        then = saved["settings"].get(field.name, field.default)
        now = getattr(s, field.name)
        if field.metadata.get("fixed") and now != then:
            raise UserError(f"{field.name} = {now!r}: the run in {s.out_dir} has {then!r}; use that")
    expected = {"model_config": dataclasses.asdict(model.config), **metadata}
    for name, value in expected.items():
        if saved.get(name) != value:
            raise UserError(f"{s.out_dir}: its run had another {name} than this one; choose another out_dir")


def check_convergence(step: int, loss: float, grad_norm: float, scaler, s) -> None:
    """Raise a UserError if the loss or the gradients are not finite."""
    diverged = not math.isfinite(loss)
    if scaler.is_enabled():
        diverged = diverged or scaler.get_scale() < 1  # it is halved after each overflow of float16
    else:
        diverged = diverged or not math.isfinite(grad_norm)
    if diverged:
        found = f"loss {loss}, gradient norm {grad_norm}; training diverged"
        raise UserError(f"step {step}: {found}; try a learning_rate below {s.learning_rate}")


def check_weights(trainable: list[torch.nn.Parameter], step: int) -> None:
    """Raise a UserError if weights are not finite or differ between the processes."""
    sums = torch.stack([p.detach().float().sum() for p in trainable]).cpu()  # (parameters,)
    largest = sums.clone()
    smallest = sums.clone()
    all_reduce(largest, op=dist.ReduceOp.MAX)
    all_reduce(smallest, op=dist.ReduceOp.MIN)
    if not largest.equal(smallest) or not sums.isfinite().all():
        wrong = "weights are not finite or differ between processes"
        raise UserError(f"step {step}: {wrong}; not saved; go back to the last checkpoint with --resume=True")


# ---- Logs ------------------------------------------------------------------------------------------


def start_log(s, step: int):
    """A function that appends a line to metrics.jsonl and shows it in s.logger; only the first process logs.

    Lines after `step` are removed first: the curve of a resumed run never goes back. Raises UserError.
    """
    if rank() > 0:
        return lambda line: None
    path = Path(s.out_dir, "metrics.jsonl")
    remove_lines_after(step, path)
    file = open(path, "ab")  # noqa: SIM115 (open as long as the run)
    show = None
    try:
        if s.logger == "tensorboard":
            show = start_tensorboard(s, step)
        elif s.logger == "wandb":
            show = start_wandb(s, step)
    except Exception as e:  # not installed, not logged in, no network
        raise UserError(f"logger = {s.logger!r}: {e}") from None

    def log(line: dict) -> None:
        try:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())  # the lines of a checkpoint are on the disk before it is
        except OSError as e:  # the error of a full disk has no file name
            raise UserError(f"{path}: {e.strerror}") from None
        if show:
            show(line)

    return log


def remove_lines_after(step: int, path: Path) -> None:
    """Remove the lines of later steps from metrics.jsonl, and an incomplete one; at step 0 all lines."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    with atomic_write(path) as f:
        for line in lines:
            if step > 0 and line.endswith(b"\n") and json.loads(line)["step"] <= step:
                f.write(line)


def start_tensorboard(s, step: int):
    from torch.utils.tensorboard import SummaryWriter

    # Hides what a killed run logged after its checkpoint.
    writer = SummaryWriter(s.out_dir, purge_step=step + 1 if step else 0)

    def show(line: dict) -> None:
        for name, value in line.items():
            if value is not None and name != "step":
                writer.add_scalar(name, value, line["step"])
        writer.flush()  # a killed run loses nothing

    return show


def start_wandb(s, step: int):
    import wandb

    id_file = Path(s.out_dir, "wandb_id")  # a resumed run continues its curves
    run_id = id_file.read_text() if step and id_file.exists() else None
    run = wandb.init(id=run_id, resume="allow", name=s.out_dir, dir=s.out_dir, config=dataclasses.asdict(s))
    id_file.write_text(run.id)
    return lambda line: run.log(line, step=line["step"])
