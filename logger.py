"""Loggers: the lines of metrics.jsonl once more, as curves in TensorBoard or Weights & Biases.

A logger is there to look at. Whatever fails in it, the network or a full disk, is told once; training goes on.
"""

import dataclasses
import sys
from pathlib import Path

from tqdm import tqdm

from config import LoopSettings


def to_nobody(line: dict) -> None:
    """Where lines go without a logger, and after one has failed."""


def to_tensorboard(s: LoopSettings, step: int):
    """Event files in out_dir, for `tensorboard --logdir`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(s.out_dir, purge_step=step + 1)  # a killed run may have logged steps that come again

    def send(line: dict) -> None:
        for name, value in line.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, line["step"])
        writer.flush()  # so that no kill loses it

    return send


def to_wandb(s: LoopSettings, step: int):
    """A run of wandb, whose id out_dir keeps for when it is resumed."""
    import wandb

    kept = Path(s.out_dir, "wandb_id")
    known = kept.read_text() if step and kept.exists() else None
    run = wandb.init(
        id=known,
        resume="allow",
        reinit="create_new",  # each round of dpo.py is a run
        name=s.out_dir,
        dir=s.out_dir,
        config=dataclasses.asdict(s),
        settings={"console": "off"},  # what is printed stays here
    )
    kept.write_text(run.id)
    return lambda line: run.log(line, step=line["step"])


def open_logger(s: LoopSettings, step: int):
    """A function that passes a line of metrics.jsonl on to s.logger; a run resumed at `step` goes on there."""

    def failed(e: Exception):
        told = f"logger = {s.logger!r}: {e!r}; going on without it, metrics.jsonl has the figures"
        tqdm.write(told, file=sys.stderr)
        return to_nobody

    try:
        send = {"tensorboard": to_tensorboard, "wandb": to_wandb}[s.logger](s, step) if s.logger else to_nobody
    except Exception as e:
        send = failed(e)

    def log(line: dict) -> None:
        nonlocal send
        try:
            send(line)
        except Exception as e:
            send = failed(e)

    return log
