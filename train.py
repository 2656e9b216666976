"""Train a model: the settings, the data, the optimizer, the checkpoints, and the loop that uses them.

    python train.py config/demo.py
    python train.py config/demo.py --learning_rate=0.005 --out_dir=out/trial
    python train.py config/demo.py --resume=True                    go on after a stop
    torchrun --nproc_per_node=2 train.py config/microstories.py     on two GPUs

The loop is `train`, at the end; other scripts call it with other data or another loss.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import cut_metrics, find_checkpoints, load_optimizer, save_checkpoint, state_to_resume
from config import LoopSettings, load_settings
from dataset import TokenFile, read_meta
from device import (
    all_reduce,
    choose_device,
    compile_model,
    expected_memory,
    keep_memory,
    matmul_rate,
    peak_memory,
    processes,
)
from errors import UserError, run
from logger import open_logger
from model import GPT, IGNORE, ModelConfig
from muon import Muon
from sample import tell
from tokenizer import load_tokenizer

# ---------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Settings(LoopSettings):
    """What the loop is told, and the shape of the model (see ModelConfig)."""

    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 6
    head_dim: int = 64
    n_embd: int = 384
    intermediate_size: int = 1024
    rope_theta: float = 10000.0
    qk_norm: bool = True
    document_mask: bool = False  # a token looks only at its own story, not at the one before it in the row


# ---------------------------------------------------------------------------------------------------
# Data, optimizer and evaluation


def open_data(s: Settings) -> tuple[TokenFile, TokenFile, dict]:
    """The training and validation data, and what of it goes into every checkpoint."""
    folder = Path(s.data_dir)
    meta, tokenizer = read_meta(folder)
    end = meta["end_token"] if s.document_mask else None
    train_data, val_data = (
        TokenFile(folder / f"{split}.bin", meta, s.block_size, seed, end)
        for split, seed in (("train", s.seed), ("val", 0))  # validation is the same whatever the seed
    )
    return train_data, val_data, {"tokenizer": tokenizer, "data": meta["train"]}


def make_optimizers(model: GPT, settings: LoopSettings) -> list[torch.optim.Optimizer]:
    """AdamW for all; or Muon for the matrices inside the blocks and AdamW for the rest."""
    learned = [p for p in model.parameters() if p.requires_grad]
    hidden = set(model.blocks.parameters()) if settings.optimizer == "muon" else set()
    matrices = [p for p in learned if p in hidden and p.dim() == 2]
    rest = [p for p in learned if p not in hidden or p.dim() < 2]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},  # the gains of RMSNorm
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True))
    if matrices:
        _, fast = choose_device(str(model.embedding.weight.device))
        dtype = torch.bfloat16 if fast == torch.bfloat16 else torch.float32
        optimizers.append(Muon(matrices, settings.weight_decay, dtype))
    return optimizers


def learning_rate_at(step: int, s: LoopSettings) -> float:
    """Linear warm-up, then half a cosine down to min_lr, or a hold and a line down over the last `cooldown`."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    left = (s.max_iters - step) / max(1, s.max_iters - s.warmup_iters)  # 1 after the warm-up, 0 at the end
    if s.schedule == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * left)
    else:
        share = min(1.0, left / s.cooldown) if s.cooldown else 1.0
    return s.min_lr + (s.learning_rate - s.min_lr) * share


def next_token_loss(model, batch: dict) -> dict[str, torch.Tensor]:
    """The summed loss of a batch; the loop divides by the number of targets in the whole step."""
    return {"loss": model(**batch)}


@torch.no_grad()
def evaluate(model, batches: list[dict], loss_fn, device: torch.device, autocast, rank: int, world: int) -> dict:
    """What loss_fn gives, summed over the batches, the work shared between the processes."""
    names, sums = ["loss"], torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        if i % world == rank or i == 0:  # every process sees the first: it tells the names
            with autocast():
                figures = loss_fn(model, {k: v.to(device) for k, v in batch.items()})
            names = list(figures)
            sums = sums + torch.stack(list(figures.values())) * (i % world == rank)  # (figures,)
    if world > 1:
        all_reduce(sums)
    return dict(zip(names, sums.tolist(), strict=True))


def validation_batches(data, settings: LoopSettings) -> list[dict]:
    """The first eval_blocks validation sequences, in batches of one shape (what fills up is not counted)."""
    n, size = min(settings.eval_blocks, len(data)), settings.batch_size
    batches = []
    for first in range(0, n, size):
        batch = data.batch(first, size)
        batch["targets"] = batch["targets"].clone()
        batch["targets"][n - first :] = IGNORE
        batches.append(batch)
    return batches


# ---------------------------------------------------------------------------------------------------
# The loop


def train(s: LoopSettings, model: GPT, train_data, val_data, parts: dict, loss_fn=next_token_loss, prompt=None) -> bool:
    """Train `model` in place and leave its checkpoints and metrics.jsonl in out_dir.

    train_data and val_data have a length and give `batch(first, count)`, a dict of CPU tensors with count
    rows each, among them "targets"; loss_fn(model, batch) gives sums over a batch: its "loss", and what else is
    to be logged; they are averaged over data.count(batch). `parts` go into every checkpoint, so that it can be
    used alone: the tokenizer's bytes and whatever else sampling needs. `prompt`, tokens, is what the sample
    stories follow. Returns False if it was told to stop. Raises UserError.
    """
    out_dir = Path(s.out_dir)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these
    if s.gradient_accumulation_steps % world:
        raise UserError(
            f"gradient_accumulation_steps = {s.gradient_accumulation_steps}: not a multiple of {world} processes"
        )
    for data in (train_data, val_data):
        if not len(data):
            raise UserError(f"{data.path}: holds no sequence of {s.block_size} tokens and one more; lower block_size")
    device, dtype = choose_device(s.device, s.dtype)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # float16 needs its gradients scaled
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(s.deterministic)
    keep_memory()
    # A help in finding errors, which takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    state = state_to_resume(s, model, parts)
    model.to(device)
    compiled = compile_model(model, device) if s.compile else model
    optimizers = make_optimizers(model, s)
    learned = [p for p in model.parameters() if p.requires_grad]
    if state:
        try:
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                load_optimizer(optimizer, saved)
            scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["random_state"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            reason = str(e).split("\n")[0]
            raise UserError(f"{out_dir}: the newest checkpoint lacks what resuming needs ({reason})") from None
    step = state["step"] if state else 0
    del state

    tokenizer = load_tokenizer(parts["tokenizer"], s.data_dir)
    prompt = prompt or [tokenizer.eos_id()]
    sequences = s.batch_size * s.gradient_accumulation_steps  # in a step, over all processes
    if s.epochs:
        s.max_iters = math.ceil(s.epochs * len(train_data) / sequences)
    tokens_a_step = sequences * s.block_size
    flops_a_step = model.flops_per_token(s.block_size) * tokens_a_step
    rate = matmul_rate(device, dtype) * world
    if rank == 0:
        print("\n".join(f"{key} = {value!r}" for key, value in dataclasses.asdict(s).items()))
        print(
            f"{model.count_parameters():,} parameters; {tokens_a_step:,} tokens a step; {s.max_iters:,} steps are "
            f"{s.max_iters * sequences / len(train_data):.1f} epochs of {len(train_data):,} sequences\n"
            f"{device}, {dtype}, {rate / 1e12:.2f} TFLOP/s in matrix products: at 40% of that about "
            f"{(s.max_iters - step) * flops_a_step / rate / 0.4 / 60:.0f} minutes; "
            f"about {expected_memory(model, s, dtype) / 2**20:,.0f} MiB beside PyTorch itself"
        )
        print(f"resuming at step {step:,}" if step else "starting from the beginning", flush=True)
        out_dir.mkdir(parents=True, exist_ok=True)
        for cut_off in out_dir.glob("ckpt_*.pt.tmp"):
            cut_off.unlink()
        cut_metrics(out_dir / "metrics.jsonl", step)
        metrics = open(out_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (open as long as we run)
        log = open_logger(s, step)
    val_batches = validation_batches(val_data, s)
    val_count = sum(map(val_data.count, val_batches))
    val_targets = [row[row != IGNORE].tolist() for batch in val_batches for row in batch["targets"]]
    val_characters = sum(map(len, tokenizer.decode(val_targets)))

    def batches_of(step: int):
        """This process's micro-batches of a step, on their way to the device, and what its loss is averaged over."""
        mine, count = [], 0
        for i in range(s.gradient_accumulation_steps):
            batch = train_data.batch(step * sequences + i * s.batch_size, s.batch_size)
            count += train_data.count(batch)
            if i % world == rank:
                if device.type == "cuda":  # from pinned memory the copy does not keep the CPU waiting
                    batch = {k: v.pin_memory() for k, v in batch.items()}
                mine.append({k: v.to(device, non_blocking=True) for k, v in batch.items()})
        return mine, count

    def record(line: dict) -> None:
        try:
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            if due["save"]:  # a checkpoint's lines are on the disk before it is
                os.fsync(metrics.fileno())
        except OSError as e:
            with contextlib.suppress(OSError):
                metrics.close()  # or Python would try again at its end
            raise UserError(f"{metrics.name}: not written ({e.strerror}); go on with --resume=True") from None
        log(line)

    def kept() -> str:
        which = f"the checkpoint of step {saved_at} is" if saved_at else "no checkpoint is"
        return f"{which} kept from before; try a learning_rate below {s.learning_rate}"

    def save() -> None:
        if not all(p.isfinite().all() for p in learned):
            raise UserError(f"step {step}: weights are no longer finite; stopped; {kept()}")
        state = {
            "model": model.state_dict(),
            "model_config": dataclasses.asdict(model.config),
            **parts,
            "settings": dataclasses.asdict(s),
            "step": step,
            "sequences": step * sequences,  # the data position
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
            "random_state": torch.get_rng_state(),
        }
        save_checkpoint(out_dir / f"ckpt_{step:06d}.pt", state)
        for old in find_checkpoints(out_dir)[2:]:
            old.unlink()

    signalled, stopping = torch.zeros(1), False

    def on_signal(number, frame):
        signalled.fill_(1)
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    recent, saved_at, clock = [], step, time.perf_counter()  # recent: figures and gradient norm of each step
    upcoming = batches_of(step)
    bar = tqdm(total=s.max_iters, initial=step, unit="step", disable=None if rank == 0 else True)
    while step < s.max_iters and not stopping:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, s)
        (micro_batches, count), sums = upcoming, torch.zeros((), device=device)
        for batch in micro_batches:
            with autocast():
                figures = loss_fn(compiled, batch)
            scaler.scale(figures["loss"] / count).backward()
            sums = sums + torch.stack(list(figures.values())).detach()  # (figures,)
        upcoming = batches_of(step + 1)  # on the way while the device still works on this step
        if world > 1:
            gradients = [p.grad for p in learned if p.grad is not None]
            flat = torch.cat([sums, *(grad.view(-1) for grad in gradients)])
            all_reduce(flat)
            sums, *totals = flat.split([len(sums), *(grad.numel() for grad in gradients)])
            for grad, total in zip(gradients, totals, strict=True):
                grad.copy_(total.view_as(grad))
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(learned, s.grad_clip or math.inf)
        if not scaler.is_enabled() or norm.isfinite():  # float16 overflowed: no optimizer takes this step
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        recent.append(torch.cat([sums / count, norm.view(1)]))
        step += 1
        bar.update()

        stop = signalled.clone()
        if world > 1:  # the signal may have reached only some: all must stop after the same step
            all_reduce(stop, dist.ReduceOp.MAX)
        stopping = bool(stop)
        done = step == s.max_iters
        due = {name: step % getattr(s, f"{name}_interval") == 0 or done for name in ("log", "eval", "save")}
        due["sample"] = s.sample_interval and (step % s.sample_interval == 0 or done)
        due["save"] |= stopping
        due["log"] |= due["save"]  # a run that resumes there goes on with figures of the same steps
        if any(due.values()):
            # Only here is a number read back, which makes the CPU wait for the device (float16 asks at each step).
            *columns, norms = torch.stack(recent).t().tolist()
            for i, (a, b) in enumerate(zip(columns[0], norms, strict=True)):
                if not math.isfinite(a) or not (math.isfinite(b) or scaler.is_enabled()):
                    at = step - len(recent) + i + 1
                    raise UserError(f"step {at}: loss {a}, gradient norm {b}; stopped; {kept()}")
            if scaler.is_enabled() and scaler.get_scale() < 1:  # from 65,536, halved at each overflow
                raise UserError(f"step {step}: float16 overflows at every step; stopped; {kept()}; or use float32")
        if due["log"]:
            if rank == 0:
                means = {name: sum(column) / len(column) for name, column in zip(figures, columns, strict=True)}
                speed = len(recent) * tokens_a_step / (time.perf_counter() - clock)
                line = {"step": step, "tokens": step * tokens_a_step, **means}
                line |= {"learning_rate": learning_rate_at(step - 1, s)}
                line |= {"grad_norm": norms[-1] if math.isfinite(norms[-1]) else None, "tokens_per_second": speed}
                line |= {"mfu": speed * flops_a_step / tokens_a_step / rate, "peak_memory": peak_memory(device)}
                record(line)
                bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_s=f"{speed:,.0f}")
            recent, clock = [], time.perf_counter()
        paused = time.perf_counter()
        if due["eval"]:
            found = evaluate(compiled, val_batches, loss_fn, device, autocast, rank, world)
            if rank == 0:
                line = {f"val_{name}": total / val_count for name, total in found.items()}
                if len(found) == 1:  # the loss is that of the text itself
                    line["val_perplexity"] = math.exp(min(line["val_loss"], 700))
                    line["val_bits_per_character"] = found["loss"] / val_characters / math.log(2)
                record({"step": step, "tokens": step * tokens_a_step, **line})
                told = ", ".join(f"{name[4:].replace('_', ' ')} {value:.4f}" for name, value in line.items())
                tqdm.write(f"step {step:,}: validation {told}")
        if rank == 0 and due["save"]:
            save()
            saved_at = step
        if rank == 0 and due["sample"]:
            torch.use_deterministic_algorithms(False)  # older PyTorch has no such cumsum for CUDA
            tqdm.write(tell(model, tokenizer, prompt, 1, max_new_tokens=s.block_size, seed=s.seed)[0] + "\n")
            torch.use_deterministic_algorithms(s.deterministic)
        clock += time.perf_counter() - paused  # evaluating, telling and saving do not count as training
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if rank == 0 and stopping and step < s.max_iters:
        python = ["python"] if world == 1 else ["torchrun", f"--nproc_per_node={world}"]
        print(f"stopped and saved at step {step}; to go on: {shlex.join([*python, *sys.argv, '--resume=True'])}")
    if world > 1:
        all_reduce(torch.zeros(1))  # nobody goes on while the first still saves
    return not stopping


def main() -> None:
    s = load_settings(sys.argv[1:], Settings, __doc__)
    with processes(s):
        train_data, val_data, parts = open_data(s)
        vocab_size = load_tokenizer(parts["tokenizer"], s.data_dir).vocab_size()
        names = {field.name for field in dataclasses.fields(ModelConfig)} & set(vars(s))
        try:
            config = ModelConfig(vocab_size=vocab_size, **{name: getattr(s, name) for name in names})
        except ValueError as e:
            raise UserError(str(e)) from None
        train(s, GPT(config), train_data, val_data, parts)


if __name__ == "__main__":
    run(main)
