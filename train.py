"""Pretrain a language model on prepared stories: settings, data, optimizers, and the training loop.

    python train.py config/demo.py
    python train.py config/demo.py --learning_rate=0.005 --out_dir=out/trial
    python train.py config/demo.py --resume=True                              continue after a stop
    torchrun --standalone --nproc_per_node=2 train.py config/microstories.py  on two GPUs

The loop is `train`, at the end. sft.py and dpo.py call it with other data or another loss.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common.checkpoint import checkpoint_to_resume, find_checkpoints, save_checkpoint
from common.device import (
    all_reduce,
    all_reduce_together,
    choose_device,
    compile_model,
    estimate_memory,
    keep_freed_memory,
    process_rank,
    processes,
    world_size,
)
from common.files import json_checksum
from common.metrics import MetricsLog, StepMetrics, after_failure, check_logger
from common.settings import UserError, check_ranges, load_settings, run, setting
from common.tokenizer import load_tokenizer
from model import GPT, IGNORE, ModelConfig
from sample import generate_text

# ---------------------------------------------------------------------------------------------------
# Settings


@dataclass
class LoopSettings:
    """The settings of the training loop. Each script adds its own."""

    data_dir: str = "data/demo"
    out_dir: str = "out/demo"
    resume: bool = False  # continue from the newest checkpoint in out_dir
    # A step: gradient_accumulation_steps micro-batches of batch_size sequences of block_size tokens
    block_size: int = setting(256, at_least=1, fixed=True)
    batch_size: int = setting(32, at_least=1, fixed=True)
    gradient_accumulation_steps: int = setting(1, at_least=1, fixed=True)  # over all processes together
    max_iters: int = setting(1000, at_least=1)
    epochs: float = 0.0  # above 0: this many passes over the data, instead of max_iters
    minutes: float = 0.0  # above 0: as many steps as fit; the warm-up is timed, and then max_iters is set
    # The optimizer
    optimizer: str = setting("muon", choices=("muon", "adamw"), fixed=True)
    learning_rate: float = 0.003
    min_lr: float = 0.0
    warmup_iters: int = 20
    schedule: str = setting("linear", choices=("linear", "cosine"))  # linear: constant, then down over the cooldown
    cooldown: float = 0.5  # a share of the steps after the warm-up
    weight_decay: float = setting(0.1, fixed=True)
    momentum: float = setting(0.95, below=1, fixed=True)  # Muon's
    beta1: float = setting(0.9, below=1, fixed=True)  # AdamW's
    beta2: float = setting(0.95, below=1, fixed=True)
    grad_clip: float = 1.0  # 0: no clipping
    # Intervals, in steps
    log_interval: int = setting(10, at_least=1)
    eval_interval: int = setting(100, at_least=1)
    eval_blocks: int = setting(64, at_least=1)  # validation sequences, always the same
    sample_interval: int = 0  # print a sample story; 0: never
    save_interval: int = setting(100, at_least=1)
    logger: str = setting("", choices=("", "tensorboard", "wandb"))  # shows metrics.jsonl as curves
    # The hardware
    device: str = "auto"  # auto | cuda | cuda:1 | mps | cpu
    dtype: str = setting("auto", choices=("auto", "bfloat16", "float16", "float32"))
    compile: bool = True
    deterministic: bool = True  # the same bits every time; costs nothing measurable on a CPU
    seed: int = setting(1337, fixed=True)

    def __post_init__(self):
        check_ranges(self)
        if self.minutes and (self.epochs or self.warmup_iters < 2 * self.log_interval):
            needed = "epochs = 0 and warmup_iters of two log_intervals or more, of which the last is timed"
            raise UserError(f"minutes = {self.minutes}: needs {needed}")
        if self.cooldown > 1:
            raise UserError(f"cooldown = {self.cooldown}: must be at most 1")
        check_logger(self.logger)


@dataclass
class ShapeSettings:
    """The shape of a new model (see ModelConfig)."""

    n_layer: int = setting(6, at_least=1)
    n_head: int = setting(6, at_least=1)
    n_kv_head: int = setting(6, at_least=1)
    head_dim: int = setting(64, at_least=1)
    n_embd: int = setting(384, at_least=1)
    intermediate_size: int = setting(1024, at_least=1)
    rope_theta: float = 10000.0
    qk_norm: bool = True


@dataclass
class Settings(ShapeSettings, LoopSettings):
    """The loop's settings and the model's shape."""

    document_mask: bool = setting(False, fixed=True)  # a token attends only to its own story


def new_model(s, vocab_size: int) -> GPT:
    """A model with random weights, of the shape that the settings give. Raises UserError."""
    names = {field.name for field in dataclasses.fields(ModelConfig)} & set(vars(s))
    try:
        return GPT(ModelConfig(vocab_size=vocab_size, **{name: getattr(s, name) for name in names}))
    except ValueError as e:
        raise UserError(str(e)) from None


# ---------------------------------------------------------------------------------------------------
# Data


class ShuffledDataset:
    """Sequences in a new seeded order each epoch, without replacement.

    Which sequence is the n-th of a run depends on n and the seed alone. So a resumed run continues with exactly the
    sequences it would have had, and every sequence occurs once before any occurs again.
    A subclass has a length and `sequences(indices)`, a dict of CPU tensors with one row for each index.
    """

    def __init__(self, path: Path, seed: int):
        self.path, self.seed, self.epoch = path, seed, -1

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Sequences number first to first + count - 1 of the run."""
        indices = []
        for n in range(first, first + count):
            epoch, i = divmod(n, len(self))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self))
            indices.append(self.order[i])
        return self.sequences(indices)

    def __len__(self) -> int:
        raise NotImplementedError

    def sequences(self, indices: list[int]) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def count_targets(self, batch: dict) -> float:
        """What the summed loss of a batch is divided by."""
        return int((batch["targets"] != IGNORE).sum())


class TokenFile(ShuffledDataset):
    """A .bin file cut into sequences of block_size tokens, wherever the cut falls."""

    def __init__(self, path: Path, meta: dict, block_size: int, seed: int, end_token: int | None = None):
        """With end_token, batches say which story a token belongs to. Raises UserError as `open_tokens` does."""
        super().__init__(path, seed)
        self.tokens, self.block_size, self.end_token = open_tokens(path, meta), block_size, end_token

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.block_size

    def sequences(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """tokens, targets (the tokens one place further) and perhaps documents, (B, T) each."""
        starts = [i * self.block_size for i in indices]
        windows = np.stack([self.tokens[start : start + self.block_size + 1] for start in starts])
        both = torch.from_numpy(windows.astype(np.int64))  # (B, T + 1)
        # Contiguous: only then does pinning help the copy to a GPU.
        batch = {"tokens": both[:, :-1].contiguous(), "targets": both[:, 1:].contiguous()}
        if self.end_token is not None:  # an end token belongs to the story after it, as in sampling
            batch["documents"] = (batch["tokens"] == self.end_token).cumsum(dim=1)
        return batch


def open_tokens(path: Path, meta: dict) -> np.ndarray:
    """The tokens of a .bin file, memory-mapped. Raises UserError if the file is not the one prepare.py wrote."""
    size, checksum, vocab_size = path.stat().st_size, hashlib.sha256(), meta["vocab_size"]
    if size % 2 or not size:
        raise UserError(f"{path}: {size:,} bytes are not token ids of two bytes each; run prepare.py again")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    for start in range(0, len(tokens), 1 << 24):
        part = tokens[start : start + (1 << 24)]
        checksum.update(part.data)
        if (largest := part.max()) >= vocab_size:
            raise UserError(f"{path}: holds token {largest}, but the vocabulary ends at {vocab_size - 1}")
    if checksum.hexdigest() != meta[path.stem]["sha256"]:
        raise UserError(f"{path}: damaged: not what prepare.py wrote (its checksum differs); run it again")
    return tokens


def read_meta(folder: Path) -> tuple[dict, bytes]:
    """meta.json of a prepared folder, and the bytes of its tokenizer. Raises UserError."""
    if not (folder / "meta.json").exists():
        raise UserError(f"{folder}: no prepared data here (meta.json is missing); run prepare.py --out_dir {folder}")
    try:
        with open(folder / "meta.json", "rb") as f:
            meta = json.loads(f.read(1 << 20))  # prepare.py writes some hundred bytes
        if meta.pop("checksum") != json_checksum(meta):
            raise ValueError("its checksum differs")
        meta["train"]["sha256"], meta["val"]["sha256"], meta["tokenizer_sha256"]  # raises KeyError
        if type(meta["vocab_size"]) is not int or type(meta["end_token"]) is not int:
            raise TypeError("vocab_size or end_token is not a number")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{folder / 'meta.json'}: damaged ({e!r}); run prepare.py again") from None
    path = folder / "tokenizer.model"
    model = path.read_bytes()
    same = hashlib.sha256(model).hexdigest() == meta["tokenizer_sha256"]
    if not same or load_tokenizer(model, path).vocab_size() != meta["vocab_size"]:
        raise UserError(f"{path}: not the tokenizer these token files were made with")
    return meta, model


def open_data(s: Settings) -> tuple[TokenFile, TokenFile, dict]:
    """The training and validation data of s.data_dir, and the metadata for every checkpoint."""
    folder = Path(s.data_dir)
    meta, tokenizer = read_meta(folder)
    end_token = meta["end_token"] if s.document_mask else None
    train_data = TokenFile(folder / "train.bin", meta, s.block_size, s.seed, end_token)
    val_data = TokenFile(folder / "val.bin", meta, s.block_size, 0, end_token)  # the same for every seed
    return train_data, val_data, {"tokenizer": tokenizer, "data": meta["train"]}


def get_batch(data, step: int, s: LoopSettings, device: torch.device) -> tuple[list[dict], float]:
    """This process's micro-batches of a step, on the device, and the number (or weight) of the whole step's targets."""
    micro_batches, n_targets = [], 0.0
    for i in range(s.gradient_accumulation_steps):
        batch = data.batch((step * s.gradient_accumulation_steps + i) * s.batch_size, s.batch_size)
        n_targets += data.count_targets(batch)
        if i % world_size() == process_rank():
            if device.type == "cuda":  # from pinned memory the copy is asynchronous
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            micro_batches.append({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
    return micro_batches, n_targets


# ---------------------------------------------------------------------------------------------------
# Learning rate and optimizers


def learning_rate_at(step: int, s: LoopSettings) -> float:
    """Linear warm-up, then a half cosine to min_lr, or constant and then linear to min_lr over the last `cooldown`."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    left = (s.max_iters - step) / max(1, s.max_iters - s.warmup_iters)  # 1 after the warm-up, 0 at the end
    if s.schedule == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * left)
    else:
        share = min(1.0, left / s.cooldown) if s.cooldown else 1.0
    return s.min_lr + (s.learning_rate - s.min_lr) * share


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Matrices near x, (N, rows, columns), with all singular values near 1.

    Five Newton-Schulz iterations: each maps every singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5, which moves
    values between 0.01 and 1 to somewhere between 0.7 and 1.2.
    """
    wide = x.mT if x.size(1) > x.size(2) else x  # the products below are then of the shorter side
    y = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), y, beta=3.4445)
    return y.mT if x.size(1) > x.size(2) else y


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose updates are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    A gradient is large in few directions; an orthogonal update moves the weights equally in all. Scaled as in Liu et
    al. 2025, arXiv:2502.16982, equation 4, it takes AdamW's learning rate and weight decay.

    Unlike `torch.optim.Muon` it orthogonalizes all matrices of one shape together, and in `dtype`: without bfloat16
    instructions a CPU needs 30 times as long for a bfloat16 product.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], weight_decay: float, momentum: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure
        for group in self.param_groups:
            by_shape = collections.defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for shape, weights in by_shape.items():
                updates = []
                for p in weights:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    mean = self.state[p]["momentum_buffer"]
                    mean.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(mean, group["momentum"]).to(self.dtype))
                for p, update in zip(weights, orthogonalize(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])


def make_optimizers(model: GPT, s: LoopSettings) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the matrices inside the blocks and AdamW for the rest."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    in_blocks = set(model.blocks.parameters()) if s.optimizer == "muon" else set()
    matrices = [p for p in trainable if p in in_blocks and p.dim() == 2]
    rest = [p for p in trainable if p not in in_blocks or p.dim() < 2]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},  # the weights of RMSNorm
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        optimizers.append(torch.optim.AdamW(groups, betas=(s.beta1, s.beta2), fused=True))
    if matrices:
        _, fast = choose_device(str(model.embedding.weight.device))
        dtype = torch.bfloat16 if fast == torch.bfloat16 else torch.float32
        optimizers.append(Muon(matrices, s.weight_decay, s.momentum, dtype))
    return optimizers


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore the moments of a checkpoint, and nothing else from its file. Raises ValueError."""
    own = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
    for i, p in enumerate(parameters if saved["state"] else ()):  # float16 may have skipped all steps so far
        moments = saved["state"].get(i)
        if not isinstance(moments, dict) or moments.keys() != names:
            raise ValueError(f"no moments of weight {i}")
        for name, value in moments.items():
            if value.shape != (() if name == "step" else p.shape):
                raise ValueError(f"{name} of weight {i} has another shape")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


# ---------------------------------------------------------------------------------------------------
# Loss and evaluation


def next_token_loss(model, batch: dict) -> dict[str, torch.Tensor]:
    """The summed loss of a batch; the loop divides by the number of targets of the whole step."""
    return {"loss": model(**batch)}


@dataclass
class ValidationSet:
    batches: list[dict]  # of one shape each; sequences beyond the set have only IGNORE as targets
    n_targets: float
    n_characters: int  # of the text of all targets


def validation_set(data, tokenizer, s: LoopSettings) -> ValidationSet:
    """The first eval_blocks sequences of the validation data."""
    n, batches = min(s.eval_blocks, len(data)), []
    for first in range(0, n, s.batch_size):
        batch = data.batch(first, s.batch_size)
        batch["targets"] = batch["targets"].clone()
        batch["targets"][n - first :] = IGNORE
        batches.append(batch)
    texts = tokenizer.decode([t[t != IGNORE].tolist() for batch in batches for t in batch["targets"]])
    return ValidationSet(batches, sum(map(data.count_targets, batches)), sum(map(len, texts)))


@torch.no_grad()
def evaluate(model, val: ValidationSet, loss_fn, device: torch.device, autocast) -> dict[str, float]:
    """The metrics of the validation set, val_loss first. The processes share the batches."""
    names, totals = ["loss"], torch.zeros((), device=device)
    for i, batch in enumerate(val.batches):
        mine = i % world_size() == process_rank()
        if mine or i == 0:  # every process computes the first batch, for the names of the metrics
            with autocast():
                metrics = loss_fn(model, {name: tensor.to(device) for name, tensor in batch.items()})
            names = list(metrics)
            totals = totals + torch.stack(list(metrics.values())) * mine  # (metrics,)
    all_reduce(totals)
    means = {f"val_{name}": total / val.n_targets for name, total in zip(names, totals.tolist(), strict=True)}
    if names == ["loss"]:  # then it is the loss of the text itself
        means["val_perplexity"] = math.exp(min(means["val_loss"], 700))
        means["val_bits_per_character"] = means["val_loss"] * val.n_targets / val.n_characters / math.log(2)
    return means


# ---------------------------------------------------------------------------------------------------
# Parts of the loop


class TrainState:
    """Everything that a training step changes. Saved and restored, the run continues with the same bits."""

    def __init__(self, model: GPT, s: LoopSettings, device: torch.device, dtype: torch.dtype):
        self.model, self.step = model, 0
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(model, s)
        # float16 gradients are scaled, or they would underflow; for other types the scaler does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def set_learning_rate(self, learning_rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

    def update(self, grad_clip: float) -> torch.Tensor:
        """Clip the gradients, take an optimizer step, clear the gradients. Returns the norm before clipping, ()."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, grad_clip or math.inf)
        if not self.scaler.is_enabled() or norm.isfinite():  # after a float16 overflow no optimizer takes the step
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.step += 1
        return norm

    def state_dict(self, s: LoopSettings) -> dict:
        return {
            "model": self.model.state_dict(),
            "model_config": dataclasses.asdict(self.model.config),
            "settings": dataclasses.asdict(s),
            "step": self.step,
            "sequences": self.step * s.batch_size * s.gradient_accumulation_steps,  # the position in the data
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "random_state": torch.get_rng_state(),
        }

    def load_state_dict(self, saved: dict, out_dir: Path) -> None:
        """Raises UserError if the checkpoint lacks what resuming needs."""
        try:
            self.model.load_state_dict(saved["model"])
            for optimizer, moments in zip(self.optimizers, saved["optimizers"], strict=True):
                load_optimizer(optimizer, moments)
            self.scaler.load_state_dict(saved["scaler"])
            torch.set_rng_state(saved["random_state"])
            self.step = saved["step"]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            reason = str(e).split("\n")[0]
            raise UserError(f"{out_dir}: the newest checkpoint lacks what resuming needs ({reason})") from None


@contextlib.contextmanager
def stop_on_signal():
    """Ctrl-C and SIGTERM end the run after the current step. Yields a function: has any process been signalled?"""
    signalled = torch.zeros(1)

    def on_signal(number, frame):
        signalled.fill_(1)
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once

    def should_stop() -> bool:
        anywhere = signalled.clone()
        all_reduce(anywhere, dist.ReduceOp.MAX)  # all processes must stop after the same step
        return bool(anywhere)

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield should_stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def save(state: TrainState, s: LoopSettings, metadata: dict) -> None:
    """Write a checkpoint and remove all but the two newest. Raises UserError, also if weights are not finite."""
    if not all(p.isfinite().all() for p in state.trainable):
        raise UserError(f"step {state.step}: weights are no longer finite; stopped; {after_failure(s)}")
    save_checkpoint(Path(s.out_dir, f"ckpt_{state.step:06d}.pt"), state.state_dict(s) | metadata)
    for old in find_checkpoints(Path(s.out_dir))[2:]:
        old.unlink()


def print_sample(model: GPT, tokenizer, prompt: list[int], s: LoopSettings) -> None:
    torch.use_deterministic_algorithms(False)  # older PyTorch has no deterministic cumsum for CUDA
    story = generate_text(model, tokenizer, prompt, 1, max_new_tokens=s.block_size, seed=s.seed)[0]
    asked = " | ".join(tokenizer.decode(prompt).splitlines())  # empty without an instruction: the end token has no text
    tqdm.write((f"[{asked}]\n" if asked else "") + story + "\n")
    torch.use_deterministic_algorithms(s.deterministic)


def set_up(s: LoopSettings, train_data, val_data) -> tuple[torch.device, torch.dtype]:
    """Check that the data can be trained on; prepare PyTorch and out_dir. Raises UserError."""
    if s.gradient_accumulation_steps % world_size():
        n = s.gradient_accumulation_steps
        raise UserError(f"gradient_accumulation_steps = {n}: not a multiple of {world_size()} processes")
    for data, advice in ((train_data, "add stories"), (val_data, "prepare with a larger --val_fraction")):
        if not len(data):
            missing = f"holds no sequence of {s.block_size} tokens and one more"
            raise UserError(f"{data.path}: {missing}; lower block_size, or {advice}")
    device, dtype = choose_device(s.device, s.dtype)
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(s.deterministic)
    # By default deterministic algorithms also fill new memory, to find errors; that takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_freed_memory()
    if s.epochs:
        s.max_iters = math.ceil(s.epochs * len(train_data) / (s.batch_size * s.gradient_accumulation_steps))
    if s.minutes:
        s.max_iters = max(s.max_iters, s.warmup_iters + 1)  # until fit_into_minutes sets it
    return device, dtype


def restore(s: LoopSettings, state: TrainState, metadata: dict) -> None:
    """Continue from the newest checkpoint in out_dir, if there is one. Raises UserError."""
    out_dir, main_process = Path(s.out_dir), process_rank() == 0
    for unfinished in out_dir.glob("ckpt_*.pt.tmp") if main_process else ():
        unfinished.unlink()
    if saved := checkpoint_to_resume(s, state.model, metadata):
        state.load_state_dict(saved, out_dir)
        if s.minutes and state.step >= s.warmup_iters:  # set by the run that is resumed
            s.max_iters = saved["settings"]["max_iters"]
        if main_process:
            print_changes(s, saved)
    elif s.resume and main_process:
        runs = [str(p) for p in sorted(out_dir.absolute().parent.glob("*")) if p != out_dir and find_checkpoints(p)]
        nearby = f"; runs beside it: {', '.join(os.path.relpath(p) for p in runs[:8])}" if runs else ""
        print(f"resume = True, but {out_dir} holds no run: this starts a new one{nearby}")


def print_changes(s: LoopSettings, saved: dict) -> None:
    """Say which settings of the learning rate differ from those of the resumed checkpoint, and what that does."""
    names = ("max_iters", "learning_rate", "min_lr", "warmup_iters", "schedule", "cooldown")
    then = {name: saved["settings"].get(name, getattr(s, name)) for name in names}
    changed = [f"{name} from {then[name]} to {getattr(s, name)}" for name in names if then[name] != getattr(s, name)]
    step = saved["step"]
    if changed and step < s.max_iters:
        before = learning_rate_at(step, dataclasses.replace(s, **then))
        now = learning_rate_at(step, s)
        print(f"changed {', '.join(changed)}: the learning rate of the next step is {now:.2g} instead of {before:.2g}")
    if step >= s.max_iters:
        print(f"max_iters = {s.max_iters:,}: this run is at step {step:,} already; there is nothing left to train")


def fit_into_minutes(s: LoopSettings, step: int, start: float, step_seconds: float) -> None:
    """Set max_iters, after the warm-up, to what fits into s.minutes since `start`.

    Until then nothing has depended on max_iters, so giving the number repeats the run exactly.
    """
    slowest = torch.tensor(step_seconds, dtype=torch.float64)
    all_reduce(slowest, dist.ReduceOp.MAX)  # all processes must choose the same number
    left = torch.tensor(60 * s.minutes - (time.perf_counter() - start), dtype=torch.float64)
    all_reduce(left, dist.ReduceOp.MIN)
    s.max_iters = step + max(1, int(0.95 * left / slowest))  # a twentieth for evaluating and saving
    if process_rank() == 0:
        again = f"--minutes=0 --max_iters={s.max_iters} repeats this run"
        tqdm.write(f"minutes = {s.minutes:g}: {slowest:.2f} s a step; max_iters = {s.max_iters:,} ({again})")


def print_plan(s: LoopSettings, state: TrainState, n_sequences: int, device, dtype) -> None:
    per_step = s.batch_size * s.gradient_accumulation_steps
    print("\n".join(f"{key} = {value!r}" for key, value in dataclasses.asdict(s).items()))
    print(
        f"{state.model.count_parameters():,} parameters; {per_step * s.block_size:,} tokens a step; {s.max_iters:,} "
        f"steps are {s.max_iters * per_step / n_sequences:.1f} epochs of {n_sequences:,} sequences\n{device}, {dtype}; "
        f"estimated memory {estimate_memory(state.model, s, dtype, device) / 2**20:,.0f} MiB beside PyTorch itself"
    )
    print(f"resuming at step {state.step:,}" if state.step else "starting from the beginning", flush=True)


# ---------------------------------------------------------------------------------------------------
# The loop


def train(
    s: LoopSettings, model: GPT, train_data, val_data, metadata: dict, loss_fn=next_token_loss, prompt=None
) -> bool:
    """Train `model` in place; write checkpoints and metrics.jsonl to out_dir. Raises UserError.

    train_data and val_data are ShuffledDatasets. loss_fn(model, batch) returns sums over a batch: "loss", and other
    metrics to log. `metadata` goes into every checkpoint: the tokenizer's bytes and whatever else sampling needs.
    `prompt`, a list of tokens, begins the sample stories. Returns False if a signal stopped the run.
    """
    start = time.perf_counter()
    device, dtype = set_up(s, train_data, val_data)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    state = TrainState(model.to(device), s, device, dtype)
    restore(s, state, metadata)
    compiled = compile_model(model, device) if s.compile else model
    tokenizer = load_tokenizer(metadata["tokenizer"], s.data_dir)
    val = validation_set(val_data, tokenizer, s)
    if main_process := process_rank() == 0:
        print_plan(s, state, len(train_data), device, dtype)
        log = MetricsLog(s, state.step)
    recent = StepMetrics(s, model, state.step, device, dtype)
    progress = tqdm(total=s.max_iters, initial=state.step, unit="step", disable=None if main_process else True)

    stopping = False
    with stop_on_signal() as should_stop, progress as bar:
        upcoming = get_batch(train_data, state.step, s, device)
        while state.step < s.max_iters and not stopping:
            # One step: forward, backward, update.
            state.set_learning_rate(learning_rate_at(state.step, s))
            (micro_batches, n_targets), sums = upcoming, torch.zeros((), device=device)
            for batch in micro_batches:
                with autocast():
                    metrics = loss_fn(compiled, batch)
                state.scaler.scale(metrics["loss"] / n_targets).backward()
                sums = sums + torch.stack(list(metrics.values())).detach()  # (metrics,)
            upcoming = get_batch(train_data, state.step + 1, s, device)  # while the device still computes
            all_reduce_together([sums, *(p.grad for p in state.trainable if p.grad is not None)])
            grad_norm = state.update(s.grad_clip)
            recent.add(list(metrics), sums / n_targets, grad_norm)
            bar.update()

            # At intervals: log, evaluate, save, sample. Only here is a number read from the device.
            step, last, stopping = state.step, state.step == s.max_iters, should_stop()
            should_save = last or stopping or step % s.save_interval == 0
            choose_length = s.minutes > 0 and step == s.warmup_iters
            should_log = should_save or choose_length or step % s.log_interval == 0  # a resumed run logs the same steps
            should_eval = last or step % s.eval_interval == 0
            should_sample = s.sample_interval > 0 and (last or step % s.sample_interval == 0)
            if should_eval or should_sample:
                recent.read(state.scaler)  # never evaluate a model that has diverged
            if should_log:
                line = recent.next_line(state.scaler, learning_rate_at(step - 1, s))
                if main_process:
                    log.write(line)
                    bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_s=f"{line['tokens_per_second']:,.0f}")
            if choose_length:
                fit_into_minutes(s, step, start, recent.tokens_per_step / line["tokens_per_second"])
                bar.total = s.max_iters
            pause = time.perf_counter()
            if should_eval:
                means = evaluate(compiled, val, loss_fn, device, autocast)
                if main_process:
                    log.write({"step": step, "tokens": step * recent.tokens_per_step, **means})
                    shown = ", ".join(f"{name[4:].replace('_', ' ')} {value:.4f}" for name, value in means.items())
                    tqdm.write(f"step {step:,}: validation {shown}")
            if should_save and main_process:
                log.sync()  # the lines of a checkpoint are on the disk before it is
                save(state, s, metadata)
            if should_sample and main_process:
                print_sample(model, tokenizer, prompt or [tokenizer.eos_id()], s)
            recent.start += time.perf_counter() - pause  # only training counts for the speed

    if main_process and stopping and state.step < s.max_iters:
        python = ["python"] if world_size() == 1 else ["torchrun", "--standalone", f"--nproc_per_node={world_size()}"]
        command = shlex.join([*python, *sys.argv, "--resume=True"])
        print(f"stopped and saved at step {state.step}; to continue: {command}")
    all_reduce(torch.zeros(1))  # the other processes wait until the first has saved
    return not stopping


def main() -> None:
    s = load_settings(sys.argv[1:], Settings, __doc__)
    with processes(s):
        train_data, val_data, metadata = open_data(s)
        vocab_size = load_tokenizer(metadata["tokenizer"], s.data_dir).vocab_size()
        train(s, new_model(s, vocab_size), train_data, val_data, metadata)


if __name__ == "__main__":
    run(main)
