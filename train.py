"""Pretrain a language model on prepared stories: settings, data, optimizers, and the training loop.

    python train.py config/demo.py
    python train.py config/demo.py --learning_rate=0.005 --out_dir=out/trial
    python train.py config/demo.py --resume=True                              continue after a stop
    python train.py config/demo.py --minutes=5                                not repeatable bit for bit
    torchrun --standalone --nproc_per_node=2 train.py config/microstories.py  on two GPUs

The loop is `train`, near the end. sft.py and tools/dpo.py call it with other data or another loss.
"""

import collections
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common.checkpoint import choose_device, choose_dtype, find_checkpoints, matmul_flops, read_checkpoint, try_compile
from common.files import UserError, atomic_write, load_tokenizer, locked, report_errors
from common.settings import load_settings, setting
from model import GPT, IGNORE, ModelConfig

# torchrun starts several processes and gives each these numbers.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

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
    warmup_iters: int = 20
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
    """The loop's settings and the shape of the model (see ModelConfig)."""

    n_layer: int = setting(6, at_least=1)
    n_head: int = setting(6, at_least=1)
    n_kv_head: int = setting(6, at_least=1)
    head_dim: int = setting(64, at_least=1)
    n_embd: int = setting(384, at_least=1)
    intermediate_size: int = setting(1024, at_least=1)
    rope_theta: float = 10000.0
    qk_norm: bool = True
    document_mask: bool = setting(False, fixed=True)  # a token attends only to its own story


def new_model(s: Settings, vocab_size: int) -> GPT:
    """A model with random weights, of the shape that the settings give. Raises UserError."""
    names = {field.name for field in dataclasses.fields(ModelConfig)} & set(vars(s))
    try:
        return GPT(ModelConfig(vocab_size=vocab_size, **{name: getattr(s, name) for name in names}))
    except ValueError as e:
        raise UserError(str(e)) from None


# ---- Data ------------------------------------------------------------------------------------------


class ShuffledDataset:
    """Sequences in a new seeded order each epoch, without replacement.

    Which sequence is the n-th of a run depends on n and the seed alone. So a resumed run continues exactly.
    A subclass has `sequences(indices)`, a dict of CPU tensors with one row each.
    """

    def __init__(self, path: Path, length: int, seed: int, tokens_per_sequence: int):
        self.path, self.length, self.seed, self.tokens_per_sequence = path, length, seed, tokens_per_sequence
        self.epoch = -1

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
        return self.length

    def sequences(self, indices: list[int]) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def loss_denominator(self, batch: dict) -> float:
        """What the summed loss of a batch is divided by: here the number of its targets."""
        return float((batch["targets"] != IGNORE).sum())


class TokenDataset(ShuffledDataset):
    """A .bin file cut into sequences of block_size tokens, wherever the cut falls."""

    def __init__(self, path: Path, meta: dict, block_size: int, seed: int, end_token: int | None = None):
        """With end_token, batches say which story a token belongs to. Raises UserError."""
        self.tokens, self.end_token = open_tokens(path, meta), end_token
        super().__init__(path, (len(self.tokens) - 1) // block_size, seed, block_size)

    def sequences(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """tokens, targets (the tokens one place further) and perhaps documents, (B, T) each."""
        T = self.tokens_per_sequence
        windows = np.stack([self.tokens[i * T : i * T + T + 1] for i in indices])
        both = torch.from_numpy(windows.astype(np.int64))  # (B, T + 1)
        # Contiguous: only then does pinning help the copy to a GPU.
        batch = {"tokens": both[:, :-1].contiguous(), "targets": both[:, 1:].contiguous()}
        if self.end_token is not None:  # an end token belongs to the story after it, as in sampling
            batch["documents"] = (batch["tokens"] == self.end_token).cumsum(dim=1)
        return batch


def read_meta(folder: Path) -> tuple[dict, bytes]:
    """meta.json of a prepared folder, and the bytes of its tokenizer. Raises UserError."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8-sig"))
        meta["train"]["tokens"], meta["val"]["tokens"], meta["vocab_size"], meta["end_token"]  # raises KeyError
        return meta, (folder / "tokenizer.model").read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as e:
        reason = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) else f"meta.json: {e!r}"
        raise UserError(f"{folder}: no prepared data ({reason}); run prepare.py --out_dir {folder}") from None


def open_tokens(path: Path, meta: dict) -> np.ndarray:
    """The tokens of a .bin file, memory-mapped. Raises UserError if its size is not that of meta.json."""
    size, expected = path.stat().st_size, 2 * meta[path.stem]["tokens"]
    if size != expected or not size:
        raise UserError(f"{path}: has {size:,} bytes, meta.json says {expected:,}; run prepare.py again")
    return np.memmap(path, dtype="<u2", mode="r")


def open_data(s: Settings) -> tuple[TokenDataset, TokenDataset, dict, dict]:
    """Training and validation data, meta.json, and the metadata for checkpoints. Raises UserError."""
    folder = Path(s.data_dir)
    meta, tokenizer = read_meta(folder)
    end_token = meta["end_token"] if s.document_mask else None
    train_data = TokenDataset(folder / "train.bin", meta, s.block_size, s.seed, end_token)
    val_data = TokenDataset(folder / "val.bin", meta, s.block_size, 0, end_token)  # the same for every seed
    return train_data, val_data, meta, {"tokenizer": tokenizer, "data": meta["train"]}


def get_batch(data: ShuffledDataset, step: int, s: LoopSettings, device) -> tuple[list[dict], float]:
    """This process's micro-batches of a step, and the denominator of the whole step's loss."""
    micro_batches, denominator = [], torch.zeros((), dtype=torch.float64)
    for i in range(RANK, s.gradient_accumulation_steps, WORLD_SIZE):
        batch = data.batch((step * s.gradient_accumulation_steps + i) * s.batch_size, s.batch_size)
        denominator += data.loss_denominator(batch)
        if device.type == "cuda":  # from pinned memory the copy is asynchronous
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        micro_batches.append({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
    all_reduce(denominator)
    return micro_batches, denominator.item()


# ---- Several processes, each with its share of the micro-batches -----------------------------------


@contextlib.contextmanager
def process_group(s: LoopSettings):
    """Run the body as one of torchrun's processes, or alone. The first process locks s.out_dir."""
    configure_pytorch(s)
    if "RANK" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if choose_device(s.device).type == "cuda" else "gloo"
        dist.init_process_group(backend)
    torch.manual_seed(s.seed)
    out_dir = Path(s.out_dir)
    with locked(out_dir / "lock", out_dir) if RANK == 0 else contextlib.nullcontext():
        yield
        all_reduce(torch.zeros(1))  # the others wait until the first has saved
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(*tensors: torch.Tensor, op=dist.ReduceOp.SUM) -> None:
    """Sum each tensor over all processes, in place, in one transfer. Raises UserError if one has ended or hangs."""
    if WORLD_SIZE > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        try:
            dist.all_reduce(flat, op)
        except RuntimeError as e:
            reason = str(e).splitlines()[0]
            raise UserError(f"another process has ended or hangs ({reason}); continue with --resume=True") from None
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


# ---- Learning rate and optimizers ------------------------------------------------------------------


def progress_of(step: int, seconds: float, s: LoopSettings) -> float:
    """Which share of a run is done, by its steps or by its time; 1 is the end."""
    return max(step / s.max_iters, seconds / (60 * s.minutes) if s.minutes else 0.0)


def learning_rate_at(step: int, progress: float, s: LoopSettings) -> float:
    """Linear warm-up by steps; then, by progress, half a cosine, or constant and linear (wsd, arXiv:2404.06395)."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    warmup = min(s.warmup_iters / s.max_iters, progress)
    left = max(0.0, 1 - progress) / max(1e-9, 1 - warmup)  # 1 after the warm-up, 0 at the end
    if s.schedule == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * left)
    else:
        share = min(1.0, left / s.decay_fraction) if s.decay_fraction else 1.0
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

    Unlike `torch.optim.Muon` it takes all matrices of a shape together, and in `dtype`: bfloat16 is slow on many CPUs.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], weight_decay: float, momentum: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype, self.orthogonalize = dtype, orthogonalize

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure
        for group in self.param_groups:
            by_shape = collections.defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for shape, weights in by_shape.items():
                for p in weights:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads, means = [p.grad for p in weights], [self.state[p]["momentum_buffer"] for p in weights]
                torch._foreach_lerp_(means, grads, 1 - group["momentum"])
                nesterov = torch.stack(torch._foreach_lerp(grads, means, group["momentum"]))  # (N, rows, columns)
                updates = self.orthogonalize(nesterov.to(self.dtype)).to(nesterov.dtype)  # (N, rows, columns)
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, updates.unbind(), alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])


def make_optimizers(model: GPT, s: LoopSettings, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the matrices inside the blocks and AdamW for the rest.

    The embedding is a table whose rows are looked up, not a map from vectors to vectors, so it is not Muon's.
    `dtype` is that of the matrix products.
    """
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
        muon_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizers.append(muon := Muon(matrices, s.weight_decay, s.momentum, muon_dtype))
        if s.compile and matrices[0].is_cuda:  # there the small products take less time than their launches
            muon.orthogonalize = try_compile(orthogonalize, matrices[0].device)
    return optimizers


# ---- Loss, evaluation, logging ---------------------------------------------------------------------


def next_token_loss(model: GPT, batch: dict) -> dict[str, torch.Tensor]:
    """The summed loss of a batch."""
    return {"loss": model.loss(**batch)}


@torch.no_grad()
def evaluate(loss_fn, model: GPT, data: ShuffledDataset, tokenizer, names: list[str], s, autocast) -> dict:
    """The means of the metrics `names` on s.eval_sequences of the validation data."""
    totals = torch.zeros(len(names) + 2, dtype=torch.float64)  # and the denominator, and characters
    n, device = min(s.eval_sequences, len(data)), model.embedding.weight.device
    for first in range(RANK * s.batch_size, n, WORLD_SIZE * s.batch_size):
        batch = data.batch(first, s.batch_size)
        batch["targets"][n - first :] = IGNORE  # beyond the sample; the shape stays
        texts = tokenizer.decode([t[t != IGNORE].tolist() for t in batch["targets"]])
        with autocast:
            metrics = loss_fn(model, {name: tensor.to(device) for name, tensor in batch.items()})
        sums = [*map(float, metrics.values()), data.loss_denominator(batch), sum(map(len, texts))]
        totals += torch.tensor(sums, dtype=torch.float64)
    all_reduce(totals)
    *sums, denominator, characters = totals.tolist()
    means = {f"val_{name}": total / denominator for name, total in zip(names, sums, strict=True)}
    if names == ["loss"]:  # then it is the loss of the text itself
        means["val_perplexity"] = math.exp(min(means["val_loss"], 700))
        means["val_bits_per_character"] = sums[0] / max(1, characters) / math.log(2)
    return means


def open_log(s: LoopSettings, step: int):
    """A function that appends a line to metrics.jsonl and shows it in s.logger. Raises UserError.

    Lines after `step` are removed: the curve of a resumed run never goes back.
    """
    path = Path(s.out_dir, "metrics.jsonl")
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    with atomic_write(path) as f:
        f.writelines(line for line in lines if line.endswith(b"}\n") and json.loads(line)["step"] <= step)
    file = open(path, "ab")  # noqa: SIM115 (open as long as the run)
    try:
        show = {"tensorboard": to_tensorboard, "wandb": to_wandb}[s.logger](s, step) if s.logger else lambda line: None
    except Exception as e:  # not installed, not logged in, no network
        raise UserError(f"logger = {s.logger!r}: {e}") from None

    def log(line: dict) -> None:
        try:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())  # the lines of a checkpoint are on the disk before it is
        except OSError as e:  # the error of a full disk has no file name
            raise UserError(f"{path}: {e.strerror}") from None
        show(line)

    return log


def to_tensorboard(s: LoopSettings, step: int):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(s.out_dir, purge_step=step + 1)  # hides what a killed run logged after its checkpoint

    def show(line: dict) -> None:
        for name, value in line.items():
            if value is not None and name != "step":
                writer.add_scalar(name, value, line["step"])
        writer.flush()  # a killed run loses nothing

    return show


def to_wandb(s: LoopSettings, step: int):
    import wandb

    id_file = Path(s.out_dir, "wandb_id")  # a resumed run continues its curves
    run_id = id_file.read_text() if step and id_file.exists() else None
    run = wandb.init(id=run_id, resume="allow", name=s.out_dir, dir=s.out_dir, config=dataclasses.asdict(s))
    id_file.write_text(run.id)
    return lambda line: run.log(line, step=line["step"])


# ---- The loop --------------------------------------------------------------------------------------


def check_run(s: LoopSettings, train_data: ShuffledDataset, val_data: ShuffledDataset) -> None:
    """Raise a UserError if settings, data and processes do not fit. Set max_iters from epochs."""
    if (n := s.gradient_accumulation_steps) % WORLD_SIZE:
        raise UserError(f"gradient_accumulation_steps = {n}: not a multiple of {WORLD_SIZE} processes")
    for data, advice in ((train_data, "add stories"), (val_data, "prepare with a larger --val_fraction")):
        if not len(data):
            missing = f"holds no sequence of {s.block_size} tokens and one more"
            raise UserError(f"{data.path}: {missing}; lower block_size, or {advice}")
    if s.epochs:
        s.max_iters = math.ceil(s.epochs * len(train_data) / (s.batch_size * s.gradient_accumulation_steps))
    if s.warmup_iters >= s.max_iters and RANK == 0:
        share = s.max_iters / s.warmup_iters
        print(f"warmup_iters = {s.warmup_iters}: all steps are warm-up, up to {share:.0%} of learning_rate; lower it")


def check_same_run(saved: dict, path: Path, s: LoopSettings, model: GPT, metadata: dict) -> None:
    """Raise a UserError if the checkpoint is of another model, other data, or has another `fixed` setting."""
    for field in dataclasses.fields(s):
        # A setting newer than the checkpoint: its default is how training was before.
        now, then = getattr(s, field.name), saved.get("settings", {}).get(field.name, field.default)
        if field.metadata.get("fixed") and now != then:
            raise UserError(f"{field.name} = {now!r}: {path} has {then!r}; use that")
    for name, value in ({"model_config": dataclasses.asdict(model.config)} | metadata).items():
        if saved.get(name) != value:
            raise UserError(f"{path}: that run had another {name} than this one; choose another out_dir")


def settle_dtype(s: LoopSettings, device: torch.device, saved: dict) -> torch.dtype:
    """The type of the matrix products in all processes; s.dtype becomes it. On a CPU a resumed run keeps its type."""
    kept = saved.get("settings", {}).get("dtype")
    if s.dtype == "auto" and device.type == "cpu" and kept in ("float32", "bfloat16"):
        s.dtype = kept
    chosen = [choose_dtype(s.dtype, device, show=RANK == 0)]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(chosen)
    s.dtype = str(chosen[0]).removeprefix("torch.")
    return chosen[0]


def configure_pytorch(s: LoopSettings) -> None:
    """Deterministic algorithms, if asked for; and glibc keeps freed memory: giving it back to the system and getting
    it again takes a fifth of a CPU's training step."""
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(s.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds bugs, takes time
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: allocate on the heap only
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def catch_signals() -> threading.Event:
    """Ctrl-C and SIGTERM set the event, which ends the run after the step; a second one ends it at once."""
    requested = threading.Event()

    def on_signal(number, frame):
        requested.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return requested


def read_metrics(recent: list[torch.Tensor], names: list[str], step: int, scaler, s: LoopSettings) -> dict:
    """The means of the last steps' metrics, and the last gradient norm. Reading them waits for the device.

    recent: for each step its metrics and gradient norm, (metrics + 1,). Raises UserError if one is not finite.
    """
    *columns, norms = torch.stack(recent).T.tolist()
    means = {name: sum(column) / len(column) for name, column in zip(names, columns, strict=True)}
    finite = math.isfinite(means["loss"]) and (scaler.is_enabled() or all(map(math.isfinite, norms)))
    if not finite or (scaler.is_enabled() and scaler.get_scale() < 1):  # it halves at each overflow of float16
        found = f"loss {means['loss']}, gradient norm {norms[-1]}"
        raise UserError(f"step {step}: {found}; training diverged; try a learning_rate below {s.learning_rate}")
    return means | {"grad_norm": norms[-1] if math.isfinite(norms[-1]) else None}


def check_weights(trainable: list[torch.nn.Parameter], step: int) -> None:
    """Raise a UserError if weights are not finite or differ between the processes."""
    sums = torch.stack([p.detach().float().sum() for p in trainable]).cpu()  # (parameters,)
    both = torch.stack([sums, -sums])  # (2, parameters): their maxima are the largest sums and the smallest
    most = both.clone()
    all_reduce(most, op=dist.ReduceOp.MAX)
    if not most.equal(both) or not sums.isfinite().all():
        wrong = "weights are not finite or differ between processes"
        raise UserError(f"step {step}: {wrong}; not saved; go back to the last checkpoint with --resume=True")


@torch.no_grad()
def print_sample(model: GPT, tokenizer, prompt: list[int], s: LoopSettings) -> None:
    """Print a story, sampled at temperature 0.8 from the 50 most likely tokens; sample.py has more options."""
    device, story = model.embedding.weight.device, list(prompt)
    cache, generator = model.new_cache(1, model.config.block_size), torch.Generator(device).manual_seed(s.seed)
    for position in range(model.config.block_size - 1):
        token, at = (torch.tensor([[n]], device=device) for n in (story[position], position))  # (1, 1) each
        logits = model(token, positions=at, cache=cache)[0, 0]  # (V,)
        if position == len(story) - 1:  # the prompt is read
            values, likely = (logits / 0.8).topk(min(50, logits.numel()))  # (50,) each
            new = likely[torch.multinomial(values.softmax(dim=-1), 1, generator=generator)].item()
            if new == tokenizer.eos_id():
                break
            story.append(new)
    instruction = " | ".join(tokenizer.decode(prompt).splitlines())  # empty for a plain story
    text = tokenizer.decode(story[len(prompt) :]).rstrip("\ufffd")  # the last character may be cut
    tqdm.write((f"[{instruction}]\n" if instruction else "") + text + "\n")


def train(s, model: GPT, train_data, val_data, metadata: dict, loss_fn=next_token_loss, prompt=None) -> None:
    """Train `model` in place; write checkpoints and metrics.jsonl to out_dir. Raises UserError.

    loss_fn(model, batch) returns sums over a batch: "loss", and other metrics to log. `metadata` goes into every
    checkpoint: the tokenizer's bytes and what else sampling needs. `prompt`, tokens, begins the sample stories.
    """
    start, out_dir = time.perf_counter(), Path(s.out_dir)
    check_run(s, train_data, val_data)
    device, checkpoints = choose_device(s.device), find_checkpoints(out_dir)
    if checkpoints and not s.resume:
        raise UserError(f"{out_dir}: holds a run ({checkpoints[0].name}); add --resume=True or choose another out_dir")
    saved = read_checkpoint(checkpoints[0]) if checkpoints else {}
    dtype = settle_dtype(s, device, saved)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # Model and optimizers. float16 gradients are scaled, or they would underflow; else the scaler does nothing.
    model.to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(model, s, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Resume from the newest checkpoint in out_dir
    step, seconds_before = saved.get("step", 0), saved.get("seconds", 0.0)
    if saved:
        check_same_run(saved, checkpoints[0], s, model, metadata)
        try:
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            if saved["scaler"]:  # empty if that run was not in float16
                scaler.load_state_dict(saved["scaler"])
        except (KeyError, ValueError, RuntimeError) as e:
            raise UserError(f"{checkpoints[0]}: training cannot continue from it ({e!r}); remove it") from None

    compiled_loss = try_compile(loss_fn, device) if s.compile else loss_fn
    tokenizer = load_tokenizer(metadata["tokenizer"], f"{s.data_dir}/tokenizer.model")
    tokens_per_step = s.batch_size * s.gradient_accumulation_steps * train_data.tokens_per_sequence
    if RANK == 0:
        epochs = s.max_iters * s.batch_size * s.gradient_accumulation_steps / len(train_data)
        print("\n".join(f"{key} = {value!r}" for key, value in dataclasses.asdict(s).items()))
        print(f"{model.count_parameters():,} parameters, {device}, {dtype}, {tokens_per_step:,} tokens a step")
        print(f"{s.max_iters:,} steps are {epochs:.1f} epochs of {len(train_data):,} sequences")
        print(f"resuming at step {step:,}" if step else "starting from the beginning", flush=True)
    peak_flops = matmul_flops(device, dtype) * WORLD_SIZE
    log = open_log(s, step) if RANK == 0 else lambda line: None
    stop_requested = catch_signals()
    recent, stopping, seconds, clock = list[torch.Tensor](), False, seconds_before, time.perf_counter()
    bar = tqdm(total=s.max_iters, initial=step, unit="step", disable=None if RANK == 0 else True)
    next_batch = get_batch(train_data, step, s, device)
    progress = progress_of(step, seconds, s)
    while progress < 1 and not stopping:
        # Forward and backward. The summed loss is divided once, by all targets of the step (why: GPT.loss).
        micro_batches, denominator = next_batch
        sums = []  # of the metrics, for each micro-batch
        for batch in micro_batches:
            with autocast:
                metrics = compiled_loss(model, batch)
            scaler.scale(metrics["loss"] / denominator).backward()
            sums.append(torch.stack(list(metrics.values())).detach())  # (metrics,)
        next_batch = get_batch(train_data, step + 1, s, device)  # while the device still computes
        means = torch.stack(sums).sum(dim=0) / denominator  # (metrics,)
        all_reduce(means, *(p.grad for p in trainable if p.grad is not None))

        # Clip and step
        learning_rate = learning_rate_at(step, progress, s)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, s.grad_clip or math.inf)  # (), before clipping
        for optimizer in optimizers:
            if not scaler.is_enabled() or grad_norm.isfinite():  # after a float16 overflow none takes the step
                scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        recent.append(torch.cat([means, grad_norm.view(1)]))  # (metrics + 1,)
        bar.update()

        # What all processes must know alike: does one have to stop, and how long has this run taken?
        step += 1
        elapsed = time.perf_counter() - start
        shared = torch.tensor([stop_requested.is_set(), seconds_before + elapsed], dtype=torch.float64)
        all_reduce(shared, op=dist.ReduceOp.MAX)
        stopping, seconds = bool(shared[0]), shared[1].item()
        progress = progress_of(step, seconds, s)
        last = progress >= 1
        should_save = last or stopping or step % s.save_interval == 0
        should_eval = last or step % s.eval_interval == 0
        should_sample = s.sample_interval > 0 and (last or step % s.sample_interval == 0)
        if should_save or should_eval or should_sample or step % s.log_interval == 0:
            line = {"step": step, "tokens": step * tokens_per_step}
            line |= read_metrics(recent, list(metrics), step, scaler, s)
            speed = len(recent) * tokens_per_step / (time.perf_counter() - clock)  # tokens a second
            line |= {"learning_rate": learning_rate, "tokens_per_second": speed}
            line |= {"mfu": speed * model.flops_per_token(s.block_size) / peak_flops}
            line |= {"peak_memory": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}
            if should_eval:
                line |= evaluate(compiled_loss, model, val_data, tokenizer, list(metrics), s, autocast)
            log(line)
            recent = []
            bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_s=f"{speed:,.0f}")
        if should_eval and RANK == 0:
            shown = (f"{name[4:].replace('_', ' ')} {value:.4f}" for name, value in line.items() if "val_" in name)
            tqdm.write(f"step {step:,}: validation {', '.join(shown)}")
        if should_save:
            check_weights(trainable, step)
            if RANK == 0:
                checkpoint = {
                    "model": model.state_dict(),
                    "model_config": dataclasses.asdict(model.config),
                    "settings": dataclasses.asdict(s),
                    "step": step,
                    "seconds": seconds,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "scaler": scaler.state_dict(),
                    **metadata,
                }
                with atomic_write(out_dir / f"ckpt_{step:06d}.pt") as f:
                    torch.save(checkpoint, f)
                for old in find_checkpoints(out_dir)[2:]:
                    old.unlink()
        if should_sample and RANK == 0:
            print_sample(model, tokenizer, prompt or [tokenizer.eos_id()], s)
        if not recent:
            clock = time.perf_counter()  # only training counts for the speed

    bar.close()
    if RANK == 0:
        advice = "" if progress >= 1 else "; to continue, give the same command with --resume=True"
        print(f"{'stopped' if advice else 'finished'} and saved at step {step}{advice}")


def main() -> None:
    s = load_settings(sys.argv[1:], Settings, __doc__)
    with process_group(s):
        train_data, val_data, meta, metadata = open_data(s)
        train(s, new_model(s, meta["vocab_size"]), train_data, val_data, metadata)


if __name__ == "__main__":
    report_errors(main)
