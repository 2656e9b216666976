"""Metrics: of training steps, the lines of metrics.jsonl, and curves in TensorBoard or Weights & Biases.

metrics.jsonl must be complete. A logger is there to look at: if it fails (network, full disk), that is reported once
and training continues.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.checkpoint import find_checkpoints
from common.device import matmul_flops, peak_memory, process_rank, world_size
from common.files import atomic_write
from common.settings import UserError
from model import GPT


class StepMetrics:
    """The metrics of the steps since the last log line. They stay on the device until then: reading a number makes
    the CPU wait for the device."""

    def __init__(self, s, model: GPT, step: int, device: torch.device, dtype: torch.dtype):
        self.s, self.device, self.step, self.lines = s, device, step, 0
        self.tokens_per_step = s.batch_size * s.gradient_accumulation_steps * s.block_size
        self.flops_per_token = model.flops_per_token(s.block_size)
        self.peak_flops = matmul_flops(device, dtype) * world_size()
        self.values, self.start = list[torch.Tensor](), time.perf_counter()

    def add(self, names: list[str], means: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """The metrics of one step: the means over its targets, (metrics,), and the norm of its gradient, ()."""
        self.names = [*names, "grad_norm"]
        self.values.append(torch.cat([means, grad_norm.view(1)]))  # (metrics + 1,)
        self.step += 1

    def read(self, scaler) -> dict[str, list[float]]:
        """The values of each metric, one for each step. Raises UserError if a loss or a gradient is not finite."""
        columns = dict(zip(self.names, torch.stack(self.values).t().tolist(), strict=True))
        pairs = zip(columns["loss"], columns["grad_norm"], strict=True)
        for step, (loss, norm) in enumerate(pairs, self.step - len(self.values) + 1):
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                raise UserError(f"step {step}: loss {loss}, gradient norm {norm}; stopped; {after_failure(self.s)}")
        if scaler.is_enabled() and scaler.get_scale() < 1:  # starts at 65,536 and halves at each overflow
            advice = f"{after_failure(self.s)}; or use float32"
            raise UserError(f"step {self.step}: float16 overflows at every step; stopped; {advice}")
        return columns

    def next_line(self, scaler, learning_rate: float) -> dict:
        """The line of metrics.jsonl for the steps since the last line, which it then forgets."""
        columns, seconds = self.read(scaler), time.perf_counter() - self.start
        speed = len(self.values) * self.tokens_per_step / seconds
        norm = columns.pop("grad_norm")[-1]
        line: dict[str, float | None] = {"step": self.step, "tokens": self.step * self.tokens_per_step}
        line |= {name: sum(values) / len(values) for name, values in columns.items()}
        line |= {"learning_rate": learning_rate}
        line |= {"grad_norm": norm if math.isfinite(norm) else None, "tokens_per_second": speed}
        line |= {"mfu": speed * self.flops_per_token / self.peak_flops, "peak_memory": peak_memory(self.device)}
        self.lines += 1
        # The first line includes compiling.
        if self.lines == 2 and self.step < self.s.max_iters and process_rank() == 0:
            minutes = (self.s.max_iters - self.step) * self.tokens_per_step / speed / 60
            tqdm.write(f"step {self.step:,}: {speed:,.0f} tokens a second, about {minutes:.0f} minutes to go")
        self.values, self.start = [], time.perf_counter()
        return line


def after_failure(s) -> str:
    """What an error message says about a run that diverged."""
    checkpoints = find_checkpoints(Path(s.out_dir))
    left = f"{checkpoints[0].name} is intact" if checkpoints else "no checkpoint was saved"
    return f"{left}; try a learning_rate below {s.learning_rate}"


def check_logger(name: str) -> None:
    """Raise a UserError if the package of this logger is missing; an empty name means no logger."""
    if name and not importlib.util.find_spec(name):
        raise UserError(f"logger = {name!r}: not installed; try: pip install {name}")


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines after `step` and incomplete lines, so that the curve of a resumed run never goes back."""

    def belongs(line: bytes) -> bool:
        try:
            return line.endswith(b"}\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        with atomic_write(path) as f:
            f.writelines(filter(belongs, lines))


class MetricsLog:
    """metrics.jsonl of a run, open for appending, and the logger of its settings."""

    def __init__(self, s, step: int):
        path = Path(s.out_dir, "metrics.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_lines_after(path, step)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self.logger, self.send = s.logger, None
        try:
            if s.logger:
                self.send = {"tensorboard": to_tensorboard, "wandb": to_wandb}[s.logger](s, step)
        except Exception as e:
            self.drop_logger(e)

    def write(self, line: dict) -> None:
        """Append one line. Raises UserError if the disk refuses it."""
        with self.errors_for_user():
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        try:
            if self.send:
                self.send(line)
        except Exception as e:
            self.drop_logger(e)

    def sync(self) -> None:
        """Flush all lines to the disk. Raises UserError."""
        with self.errors_for_user():
            os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def errors_for_user(self):
        try:
            yield
        except OSError as e:
            with contextlib.suppress(OSError):
                self.file.close()  # or Python would try to write again at exit
            raise UserError(f"{self.file.name}: not written ({e.strerror}); continue with --resume=True") from None

    def drop_logger(self, e: Exception) -> None:
        tqdm.write(f"logger = {self.logger!r}: {e!r}; continuing without it, metrics.jsonl has all metrics", sys.stderr)
        self.send = None


def to_tensorboard(s, step: int):
    """A function that writes a line to event files in out_dir, for `tensorboard --logdir`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(s.out_dir, purge_step=step + 1)  # hides steps that a killed run logged and that come again

    def send(line: dict) -> None:
        for name, value in line.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, line["step"])
        writer.flush()  # a killed run loses nothing

    return send


def to_wandb(s, step: int):
    """A function that sends a line to a run of wandb, whose id is stored in out_dir for resuming."""
    import wandb

    id_file = Path(s.out_dir, "wandb_id")
    run = wandb.init(
        id=id_file.read_text() if step and id_file.exists() else None,
        resume="allow",
        reinit="create_new",  # each round of dpo.py is a run
        name=s.out_dir,
        dir=s.out_dir,
        config=dataclasses.asdict(s),
        settings={"console": "off"},  # do not send what is printed
    )
    id_file.write_text(run.id)
    return lambda line: run.log(line, step=line["step"])
