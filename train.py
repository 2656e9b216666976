"""Pretrain a language model on prepared stories: settings, the training loop, and what the loop calls.

    python train.py config/demo.py
    python train.py config/demo.py --learning_rate=0.005 --out_dir=out/trial
    python train.py config/demo.py --resume=True                              continue after a stop
    python train.py config/demo.py --minutes=5                                not repeatable bit for bit
    torchrun --standalone --nproc_per_node=2 train.py config/microstories.py  on two GPUs

sft.py and tools/dpo.py call `train` with other data or another loss. What keeps a run in order, and a first
reader may skip, is in common/run.py: the processes of torchrun, signals, logs, checks.
"""

import collections
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import run
from common.checkpoint import choose_device, find_checkpoints, read_checkpoint, try_compile
from common.files import UserError, atomic_write, load_tokenizer, report_errors
from common.settings import load_settings, setting
from model import GPT, IGNORE, ModelConfig

# ---- Settings --------------------------------------------------------------------------------------


@dataclass
class LoopSettings:
    """The settings of the training loop. Each script adds its own."""

    data_dir: str = setting("data/demo", path=True)
    out_dir: str = setting("out/demo", path=True)
    resume: bool = False  # continue from the newest checkpoint in out_dir
    # A step: gradient_accumulation_steps micro-batches of batch_size sequences of block_size tokens
    block_size: int = setting(256, at_least=1, fixed=True)
    batch_size: int = setting(32, at_least=1, fixed=True)
    gradient_accumulation_steps: int = setting(1, at_least=1, fixed=True)  # over all processes together
    max_iters: int = setting(1000, at_least=1)
    epochs: float = 0.0  # above 0: this many passes over the data, instead of max_iters
    minutes: float = 0.0  # above 0: end after this time; not repeatable bit for bit
    # The optimizer
    optimizer: str = setting("muon", choices=("muon", "adamw"), fixed=True)
    learning_rate: float = 0.003
    min_lr: float = 0.0
    warmup_iters: int = 20  # with `minutes`: the same share of the time
    schedule: str = setting("wsd", choices=("wsd", "cosine"))  # wsd: warm-up, stable, decay
    decay_fraction: float = setting(0.5, below=1.001)  # of the run after the warm-up: the decay of wsd
    weight_decay: float = setting(0.1, fixed=True)
    momentum: float = setting(0.95, below=1, fixed=True)  # Muon's
    beta1: float = setting(0.9, below=1, fixed=True)  # AdamW's
    beta2: float = setting(0.95, below=1, fixed=True)
    grad_clip: float = 1.0  # 0: no clipping
    # Intervals, in steps
    log_interval: int = setting(10, at_least=1)
    eval_interval: int = setting(100, at_least=1)
    eval_sequences: int = setting(64, at_least=1)  # always the same random ones
    sample_interval: int = 0  # print a sample story; 0: never
    save_interval: int = setting(100, at_least=1)
    logger: str = setting("", choices=("", "tensorboard", "wandb"))  # shows metrics.jsonl as curves
    # The hardware
    device: str = "auto"  # auto | cuda | cuda:1 | mps | cpu
    dtype: str = setting("auto", choices=("auto", "bfloat16", "float16", "float32"))
    compile: bool = True
    deterministic: bool = True  # the same bits every time; costs nothing measurable on a CPU
    seed: int = setting(1337, fixed=True)


@dataclass
class Settings(LoopSettings):
    """The loop's settings, those of the data, and the shape of the model (see ModelConfig)."""

    document_mask: bool = setting(False, fixed=True)  # a token attends only to its own story
    n_layer: int = setting(6, at_least=1)
    n_head: int = setting(6, at_least=1)
    n_kv_head: int = setting(6, at_least=1)
    head_dim: int = setting(64, at_least=1)
    n_embd: int = setting(384, at_least=1)
    intermediate_size: int = setting(1024, at_least=1)
    rope_theta: float = 10000.0
    qk_norm: bool = True


# ---- The loop --------------------------------------------------------------------------------------


def train(s, model: GPT, train_data, val_data, metadata: dict, loss_fn=None, prompt=None) -> None:
    """Train `model` in place; write checkpoints and metrics.jsonl to out_dir. Raises UserError.

    loss_fn(model, batch) returns sums over a batch: "loss", and other metrics to log (default:
    next_token_loss). `metadata` goes into every checkpoint: the tokenizer's bytes and what else sampling
    needs. `prompt`, tokens, begins the sample stories.
    """
    started_at = time.perf_counter()
    is_main_process = run.rank() == 0
    run.check_data(s, train_data, val_data)
    s.max_iters = number_of_steps(s, train_data)

    # A run that was stopped continues from its newest checkpoint.
    checkpoints = find_checkpoints(Path(s.out_dir))
    saved = read_checkpoint(checkpoints[0]) if checkpoints else {}

    # Matrix products are computed in dtype, weights and their updates stay in float32.
    device = choose_device(s.device)
    s.dtype = run.agree_on_dtype(s.dtype, device, saved)
    dtype = getattr(torch, s.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    model.to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(model, s, dtype)
    # float16 gradients are scaled, or the small ones would become 0. Otherwise the scaler does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step = 0  # steps that are done
    seconds_before = 0.0  # that earlier processes of this run took
    if saved:
        run.check_same_run(saved, s, model, metadata)
        step, seconds_before = restore(saved, model, optimizers, scaler)

    loss_fn = loss_fn or next_token_loss
    compiled_loss = try_compile(loss_fn, device) if s.compile else loss_fn
    tokenizer = load_tokenizer(metadata["tokenizer"], f"{s.data_dir}/tokenizer.model")
    prompt = prompt or [tokenizer.eos_id()]  # a story begins where another one has ended
    tokens_per_step = s.batch_size * s.gradient_accumulation_steps * train_data.tokens_per_sequence
    run.print_settings(s, model, train_data, step)
    log = run.start_log(s, step)
    stop_requested = run.catch_signals()
    bar = tqdm(total=s.max_iters, initial=step, unit="step", disable=None if is_main_process else True)

    if step == 0 and is_main_process:
        # A new model takes all tokens for about equally likely: its loss is near ln(vocab_size).
        val_metrics = evaluate(compiled_loss, model, val_data, tokenizer, s, autocast)
        log({"step": 0, "tokens": 0, **val_metrics})
        print_validation(0, val_metrics)

    progress = progress_of(step, seconds_before, s)  # the share of the run that is done
    stopping = False
    recent = []  # metrics of the steps since the last line of the log, still on the device
    logged_at = time.perf_counter()
    next_batch = get_batch(train_data, step, s, device)
    while progress < 1 and not stopping:
        # Forward and backward. A loss is a sum over tokens; it is divided once, by all targets of the step.
        micro_batches, denominator = next_batch
        sums: dict[str, torch.Tensor] = {}  # of each metric, over the micro-batches
        for batch in micro_batches:
            with autocast:
                batch_sums = compiled_loss(model, batch)
            scaler.scale(batch_sums["loss"] / denominator).backward()
            for name, value in batch_sums.items():
                sums[name] = sums.get(name, 0) + value.detach()  # ()
        next_batch = get_batch(train_data, step + 1, s, device)  # while the device still computes
        # One transfer after all micro-batches, and no DistributedDataParallel: that gives the same sums, and
        # hides the transfer behind the backward pass, but wraps the model.
        gradients = [p.grad for p in trainable if p.grad is not None]
        run.all_reduce(*sums.values(), *gradients)

        # Clip and step
        learning_rate = learning_rate_at(progress, s)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, s.grad_clip or math.inf)  # (), before clipping
        overflowed = scaler.is_enabled() and not grad_norm.isfinite()  # float16: then no optimizer steps
        for optimizer in optimizers:
            if not overflowed:
                scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        recent.append({name: total / denominator for name, total in sums.items()})
        step += 1
        bar.update()

        # At intervals, and at the end: log, evaluate, save, sample
        elapsed = time.perf_counter() - started_at
        stopping, seconds = run.agree_on_end(stop_requested.is_set(), seconds_before + elapsed)
        progress = progress_of(step, seconds, s)
        finished = progress >= 1
        should_eval = finished or step % s.eval_interval == 0
        should_save = finished or stopping or step % s.save_interval == 0
        should_sample = s.sample_interval > 0 and (finished or step % s.sample_interval == 0)
        should_log = should_eval or should_save or should_sample or step % s.log_interval == 0
        if should_log:
            means = mean_of_each(recent)  # waits for the device
            speed = len(recent) * tokens_per_step / (time.perf_counter() - logged_at)
            run.check_convergence(step, means["loss"], grad_norm.item(), scaler, s)
            line = {"step": step, "tokens": step * tokens_per_step, **means}
            line["grad_norm"] = None if overflowed else grad_norm.item()
            line["learning_rate"] = learning_rate
            line["tokens_per_second"] = speed
            if device.type == "cuda":
                line["peak_memory"] = torch.cuda.max_memory_allocated()  # bytes
            bar.set_postfix(loss=f"{means['loss']:.3f}", tokens_s=f"{speed:,.0f}")
            if should_eval and is_main_process:
                val_metrics = evaluate(compiled_loss, model, val_data, tokenizer, s, autocast)
                line.update(val_metrics)
                print_validation(step, val_metrics)
            log(line)
        if should_save:
            run.check_weights(trainable, step)
            if is_main_process:
                save(s, model, optimizers, scaler, step, seconds, metadata, prompt)
        if should_sample and is_main_process:
            print_sample(model, tokenizer, prompt, s.seed)
        if should_log:
            recent = []
            logged_at = time.perf_counter()  # only training counts for the speed

    bar.close()
    run.print_end(step, finished=progress >= 1)


# ---- Data ------------------------------------------------------------------------------------------


def open_data(s: Settings) -> tuple["TokenDataset", "TokenDataset", dict, dict]:
    """Training and validation data, meta.json, and the metadata for checkpoints. Raises UserError."""
    folder = Path(s.data_dir)
    meta, tokenizer = read_meta(folder)
    end_token = meta["end_token"] if s.document_mask else None
    train_data = TokenDataset(folder / "train.bin", meta, s.block_size, s.seed, end_token)
    val_data = TokenDataset(folder / "val.bin", meta, s.block_size, 0, end_token)  # the same for every seed
    metadata = {"tokenizer": tokenizer, "data": meta["train"]}
    return train_data, val_data, meta, metadata


def read_meta(folder: Path) -> tuple[dict, bytes]:
    """meta.json of a prepared folder, and the bytes of its tokenizer. Raises UserError."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8-sig"))
        tokenizer = (folder / "tokenizer.model").read_bytes()
    except OSError as e:
        found = f"no prepared data ({e.filename}: {e.strerror})"
        raise UserError(f"{folder}: {found}; {run.how_to_prepare(folder)}") from None
    except ValueError as e:
        raise UserError(f"{folder}/meta.json: {e}; {run.how_to_prepare(folder)}") from None
    if not isinstance(meta, dict) or not {"train", "val", "vocab_size", "end_token"} <= meta.keys():
        raise UserError(f"{folder}/meta.json: not written by prepare.py; {run.how_to_prepare(folder)}")
    return meta, tokenizer


def open_tokens(path: Path, meta: dict) -> np.ndarray:
    """The tokens of a .bin file, memory-mapped: read from the disk where needed. Raises UserError."""
    size = path.stat().st_size
    expected = 2 * meta[path.stem]["tokens"]  # uint16: two bytes each
    if size != expected or size == 0:
        raise UserError(f"{path}: has {size:,} bytes, meta.json says {expected:,}; run prepare.py again")
    return np.memmap(path, dtype="<u2", mode="r")


class ShuffledDataset:
    """Sequences in a new seeded order each epoch, without replacement.

    Which sequence is the n-th of a run depends on n and the seed alone. So a resumed run continues exactly.
    A subclass has `sequences(indices)`, a dict of CPU tensors with one row each.
    """

    def __init__(self, path: Path, length: int, seed: int, tokens_per_sequence: int):
        self.path = path
        self.length = length
        self.seed = seed
        self.tokens_per_sequence = tokens_per_sequence
        self.epoch = -1  # of self.order

    def __len__(self) -> int:
        return self.length

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Sequences number first to first + count - 1 of the run."""
        indices = []
        for n in range(first, first + count):
            epoch, i = divmod(n, self.length)
            if epoch != self.epoch:
                self.epoch = epoch
                self.order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            indices.append(self.order[i])
        return self.sequences(indices)

    def sequences(self, indices: list[int]) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def loss_denominator(self, batch: dict) -> float:
        """What the summed loss of a batch is divided by: here the number of its targets."""
        return float((batch["targets"] != IGNORE).sum())


class TokenDataset(ShuffledDataset):
    """A .bin file cut into sequences of block_size tokens, wherever the cut falls.

    A sequence of five tokens (E: the end token; letters: tokens of stories):

        train.bin    ... c d E f g h i E ...
        tokens           c d E f g
        targets          d E f g h      (the tokens one place further)
        documents        0 0 1 1 1      (an end token belongs to the story after it, as in sampling)
    """

    def __init__(self, path: Path, meta: dict, block_size: int, seed: int, end_token: int | None = None):
        """With end_token, batches say which story a token belongs to. Raises UserError."""
        self.tokens = open_tokens(path, meta)
        self.end_token = end_token
        length = (len(self.tokens) - 1) // block_size  # the last target is one token further
        super().__init__(path, length, seed, block_size)

    def sequences(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """tokens, targets and perhaps documents, (B, T) each."""
        T = self.tokens_per_sequence
        windows = np.stack([self.tokens[i * T : i * T + T + 1] for i in indices])  # (B, T + 1)
        both = torch.from_numpy(windows.astype(np.int64))  # (B, T + 1)
        tokens = both[:, :-1].contiguous()  # only then does pinning help the copy to a GPU
        targets = both[:, 1:].contiguous()
        batch = {"tokens": tokens, "targets": targets}
        if self.end_token is not None:
            batch["documents"] = (tokens == self.end_token).cumsum(dim=1)
        return batch


def get_batch(data: ShuffledDataset, step: int, s: LoopSettings, device) -> tuple[list[dict], float]:
    """This process's micro-batches of a step, and the denominator of the whole step's loss.

    Processes take turns. With gradient_accumulation_steps = 4, batch_size = 2 and two processes:

        step 0    process 0    micro-batches 0, 2    sequences 0 1, 4 5
                  process 1    micro-batches 1, 3    sequences 2 3, 6 7
        step 1    process 0    micro-batches 4, 6    sequences 8 9, 12 13
                  process 1    micro-batches 5, 7    sequences 10 11, 14 15

    One process alone would take all four, and the sum of the gradients would be the same.
    """
    micro_batches = []
    denominator = torch.zeros((), dtype=torch.float64)
    for i in range(run.rank(), s.gradient_accumulation_steps, run.world_size()):
        micro_step = step * s.gradient_accumulation_steps + i
        first_sequence = micro_step * s.batch_size
        batch = data.batch(first_sequence, s.batch_size)
        denominator += data.loss_denominator(batch)
        micro_batches.append(move(batch, device))
    run.all_reduce(denominator)
    return micro_batches, denominator.item()


def move(batch: dict[str, torch.Tensor], device) -> dict[str, torch.Tensor]:
    """The batch on the device. To a GPU the copy is asynchronous, which it is from pinned memory only."""
    moved = {}
    for name, tensor in batch.items():
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        moved[name] = tensor.to(device, non_blocking=True)
    return moved


# ---- How long, and how fast ------------------------------------------------------------------------


def number_of_steps(s: LoopSettings, data: ShuffledDataset) -> int:
    """max_iters, or the steps that `epochs` passes over the data take."""
    if s.epochs == 0:
        return s.max_iters
    sequences_per_step = s.batch_size * s.gradient_accumulation_steps
    return math.ceil(s.epochs * len(data) / sequences_per_step)


def progress_of(step: int, seconds: float, s: LoopSettings) -> float:
    """The share of a run that is done, by its steps or by its time, whichever is more; 1 is the end."""
    progress = step / s.max_iters
    if s.minutes > 0:
        progress = max(progress, seconds / (60 * s.minutes))
    return progress


def learning_rate_at(progress: float, s: LoopSettings) -> float:
    """Linear warm-up; then half a cosine, or constant and then linear (wsd, arXiv:2404.06395).

    `progress`, from 0 to 1, is the share of the run that is done. The warm-up is a share of the run too.
    """
    warmup = s.warmup_iters / s.max_iters
    if progress < warmup:
        one_step = 1 / s.max_iters  # so that the first rate is not 0
        return s.learning_rate * min(1.0, (progress + one_step) / warmup)
    remaining = (1 - progress) / (1 - warmup)  # 1 after the warm-up, 0 at the end
    remaining = max(0.0, remaining)
    if s.schedule == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * remaining)
    elif s.decay_fraction > 0:
        share = min(1.0, remaining / s.decay_fraction)
    else:
        share = 1.0
    return s.min_lr + (s.learning_rate - s.min_lr) * share


# ---- The optimizers --------------------------------------------------------------------------------


def make_optimizers(model: GPT, s: LoopSettings, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the matrices inside the blocks and AdamW for the rest.

    Muon orthogonalizes the updates of matrices that multiply activations. The embedding is a look-up table,
    so AdamW updates it; the output matrix is the same tensor. With LoRA (sft.py) Muon updates the matrices A
    and B. `dtype` is that of the matrix products.
    """
    muon_matrices = []
    other_matrices = []
    vectors = []  # the weights of RMSNorm, without weight decay
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            vectors.append(p)
        elif s.optimizer == "muon" and name.startswith("blocks."):
            muon_matrices.append(p)
        else:
            other_matrices.append(p)
    optimizers: list[torch.optim.Optimizer] = []
    if other_matrices or vectors:
        groups = [
            {"params": other_matrices, "weight_decay": s.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizers.append(torch.optim.AdamW(groups, betas=(s.beta1, s.beta2), fused=True))
    if muon_matrices:
        muon_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizers.append(Muon(muon_matrices, s.weight_decay, s.momentum, muon_dtype))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonal updates (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    A gradient is large in few directions; an orthogonal update moves the weights equally in all. For a matrix
    W with gradient G, momentum mu, learning rate lr and weight decay wd:

        buffer    = mu * buffer + (1 - mu) * G
        direction = orthogonalize(mu * buffer + (1 - mu) * G)          Nesterov: one step of momentum ahead
        W         = (1 - lr * wd) * W - lr * scale * direction         scale = 0.2 * sqrt(max(rows, columns))

    With this scale (Liu et al. 2025, arXiv:2502.16982, equation 4) it takes AdamW's learning rate and weight
    decay. Unlike `torch.optim.Muon` it takes all matrices of a shape together, and in `dtype`: bfloat16 is
    slow on many CPUs.
    """

    def __init__(self, matrices: list, weight_decay: float, momentum: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure
        for group in self.param_groups:
            matrices_of_shape = collections.defaultdict(list)
            for p in group["params"]:
                matrices_of_shape[p.shape].append(p)
            for shape, matrices in matrices_of_shape.items():
                lookaheads = [self.update_buffer(p, group["momentum"]) for p in matrices]
                stacked = torch.stack(lookaheads).to(self.dtype)  # (N, rows, columns)
                directions = orthogonalize(stacked).to(matrices[0].dtype)  # (N, rows, columns)
                scale = 0.2 * math.sqrt(max(shape))
                for p, direction in zip(matrices, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(direction, alpha=-group["lr"] * scale)

    def update_buffer(self, p, momentum: float) -> torch.Tensor:
        """Add the gradient to the momentum of a matrix. Returns mu * buffer + (1 - mu) * G."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"]
        gradient = p.grad
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Matrices near x, (N, rows, columns), with all singular values near 1.

    Five Newton-Schulz iterations: each maps every singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5,
    which moves values between 0.01 and 1 to somewhere between 0.68 and 1.13.
    """
    is_tall = x.size(1) > x.size(2)
    if is_tall:
        x = x.mT  # the products below are then of the shorter side
    y = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = y @ y.mT
        # With singular values: polynomial is -4.775 s^2 + 2.0315 s^4, y becomes 3.4445 s + polynomial * s.
        polynomial = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
        y = torch.baddbmm(y, polynomial, y, beta=3.4445)
    return y.mT if is_tall else y


# ---- Loss, metrics, evaluation ---------------------------------------------------------------------


def next_token_loss(model: GPT, batch: dict) -> dict[str, torch.Tensor]:
    """The summed loss of a batch. With a mean, a token's weight would depend on its micro-batch."""
    return {"loss": model.loss(**batch)}


def mean_of_each(recent: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The mean of each metric over some steps. Reading it waits for the device."""
    means = {}
    for name in recent[0]:
        values = torch.stack([metrics[name] for metrics in recent])  # (steps,)
        means[name] = values.mean().item()
    return means


@torch.no_grad()
def evaluate(loss_fn, model: GPT, data: ShuffledDataset, tokenizer, s, autocast) -> dict[str, float]:
    """The means of the metrics on s.eval_sequences of the validation data, with val_ before their names.

    The loss of text is also given as perplexity, and in bits per character.
    """
    device = model.embedding.weight.device
    n_sequences = min(s.eval_sequences, len(data))
    totals: dict[str, float] = collections.defaultdict(float)
    denominator = 0.0
    n_characters = 0
    for first in range(0, n_sequences, s.batch_size):
        batch = data.batch(first, s.batch_size)
        batch["targets"][n_sequences - first :] = IGNORE  # the shape stays: nothing is compiled anew
        with autocast:
            metrics = loss_fn(model, move(batch, device))
        for name, value in metrics.items():
            totals[name] += value.item()
        denominator += data.loss_denominator(batch)
        for targets in batch["targets"].flatten(0, -2):  # (T,)
            n_characters += len(tokenizer.decode(targets[targets != IGNORE].tolist()))
    means = {f"val_{name}": total / denominator for name, total in totals.items()}
    if list(totals) == ["loss"]:  # the loss of preferences (tools/dpo.py) has other metrics beside it
        nats_per_character = totals["loss"] / max(1, n_characters)
        means["val_perplexity"] = math.exp(min(means["val_loss"], 700))  # a float ends at e^709
        means["val_bits_per_character"] = nats_per_character / math.log(2)
    return means


def print_validation(step: int, metrics: dict[str, float]) -> None:
    shown = [f"{name.removeprefix('val_').replace('_', ' ')} {value:.4f}" for name, value in metrics.items()]
    tqdm.write(f"step {step:,}: validation {', '.join(shown)}")


@torch.no_grad()
def print_sample(model: GPT, tokenizer, prompt: list[int], seed: int) -> None:
    """Print a story, sampled at temperature 0.8 from the 50 most likely tokens (sample.py is faster)."""
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    story: list[int] = []
    while len(prompt) + len(story) < model.config.block_size:
        tokens = torch.tensor([prompt + story], device=device)  # (1, T)
        last_position = torch.tensor([tokens.size(1) - 1], device=device)  # (1,)
        logits = model(tokens, last=last_position)[0, 0]  # (V,)
        values, likely = (logits / 0.8).topk(min(50, logits.size(0)))  # (50,) each
        index = torch.multinomial(values.softmax(dim=-1), 1, generator=generator)  # (1,)
        token = likely[index].item()
        if token == tokenizer.eos_id():
            break
        story.append(token)
    instruction = " | ".join(tokenizer.decode(prompt).splitlines())  # empty in pretraining
    if instruction:
        tqdm.write(f"[{instruction}]")
    tqdm.write(tokenizer.decode(story).rstrip("\ufffd") + "\n")  # the last character may be cut


# ---- Saving and restoring --------------------------------------------------------------------------


def save(s, model: GPT, optimizers: list, scaler, step: int, seconds: float, metadata: dict, prompt) -> None:
    """Write a checkpoint to out_dir: it is there whole, or not at all. Remove all but the two newest.

    It depends neither on the device nor on the number of processes: a run may continue on two GPUs.
    """
    checkpoint = {
        "model": model.state_dict(),
        "model_config": dataclasses.asdict(model.config),
        "settings": dataclasses.asdict(s),
        "step": step,  # says which sequence is next, see ShuffledDataset
        "seconds": seconds,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "scaler": scaler.state_dict(),
        "prompt": prompt,  # an example, with which sample.py begins if it is asked for nothing
        **metadata,
    }
    out_dir = Path(s.out_dir)
    with atomic_write(out_dir / f"ckpt_{step:06d}.pt") as f:
        torch.save(checkpoint, f)
    for old in find_checkpoints(out_dir)[2:]:
        old.unlink()
    for unfinished in out_dir.glob("ckpt_*.pt.tmp"):  # of a process that was killed
        unfinished.unlink()


def restore(checkpoint: dict, model: GPT, optimizers: list, scaler) -> tuple[int, float]:
    """Load what `save` has written into model, optimizers and scaler. Returns the steps and seconds done."""
    model.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    if checkpoint["scaler"]:  # empty if that run was not in float16
        scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["step"], checkpoint.get("seconds", 0.0)


# ---- The command -----------------------------------------------------------------------------------


def new_model(s: Settings, vocab_size: int) -> GPT:
    """A model with random weights, of the shape that the settings give. Raises UserError."""
    shape: dict = {"vocab_size": vocab_size}
    for field in dataclasses.fields(ModelConfig):
        if hasattr(s, field.name):
            shape[field.name] = getattr(s, field.name)
    try:
        return GPT(ModelConfig(**shape))
    except ValueError as e:
        raise UserError(str(e)) from None


def main() -> None:
    s = load_settings(sys.argv[1:], Settings, __doc__)
    with run.training(s):
        train_data, val_data, meta, metadata = open_data(s)
        model = new_model(s, meta["vocab_size"])
        train(s, model, train_data, val_data, metadata)


if __name__ == "__main__":
    report_errors(main)
