"""Train a model: the settings, the data, the optimizer, the checkpoints, and the loop that uses them.

    python train.py config/demo.py
    python train.py config/demo.py --learning_rate=0.005 --out_dir=out/trial
    python train.py config/demo.py --resume=True                    go on after a stop
    torchrun --nproc_per_node=2 train.py config/microstories.py     on two GPUs

The loop is `train`, at the end; other scripts call it with other data or another loss.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from config import load_settings
from model import GPT, IGNORE, ModelConfig, find_checkpoints, read_checkpoint
from prepare import UserError, load_tokenizer, run
from sample import tell

# ---------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Settings:
    """Everything that can be set, in a config file or as --key=value. Lengths and sizes are in tokens."""

    data_dir: str = "data/demo"
    out_dir: str = "out/demo"
    resume: bool = False  # go on from the newest checkpoint in out_dir
    # The model (see ModelConfig)
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 6
    head_dim: int = 64
    n_embd: int = 384
    intermediate_size: int = 1024
    document_mask: bool = False  # a token looks only at its own story, not at the one before it in the row
    rope_theta: float = 10000.0
    qk_norm: bool = True
    # A step: gradient_accumulation_steps micro-batches of batch_size sequences of block_size tokens
    batch_size: int = 32
    gradient_accumulation_steps: int = 1  # over all processes together
    max_iters: int = 1000
    # The optimizer
    optimizer: str = "muon"  # muon | adamw
    learning_rate: float = 0.003
    min_lr: float = 0.0
    warmup_iters: int = 20
    schedule: str = "linear"  # linear: hold, then fall over the last cooldown of the run | cosine
    cooldown: float = 0.5
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # 0: none
    # Every so many steps
    log_interval: int = 10
    eval_interval: int = 100
    eval_blocks: int = 64  # validation sequences, always the same
    sample_interval: int = 0  # tell a story; 0: never
    save_interval: int = 100
    # The machine
    device: str = "auto"  # auto | cuda | cuda:1 | mps | cpu
    dtype: str = "auto"  # auto | bfloat16 | float16 | float32
    compile: bool = True
    deterministic: bool = True  # the same bits every time; costs nothing measurable on a CPU
    seed: int = 1337

    def __post_init__(self):
        """Check the ranges. Raises UserError naming the key."""
        at_least = dict.fromkeys(("min_lr", "warmup_iters", "cooldown", "weight_decay", "beta1", "beta2"), 0)
        at_least |= dict.fromkeys(("grad_clip", "sample_interval", "seed"), 0)
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), at_least.get(field.name)
            if field.type is int and least is None:
                least = 1
            if field.type in (int, float) and not (least or 0) <= value < 2**63:
                raise UserError(f"{field.name} = {value}: must be at least {least or 0} and below 2**63")
        if self.cooldown > 1 or self.beta1 >= 1 or self.beta2 >= 1 or self.rope_theta <= 0:
            raise UserError("cooldown must be at most 1, beta1 and beta2 below 1, rope_theta above 0")
        choices = {"optimizer": ("muon", "adamw"), "schedule": ("linear", "cosine")}
        choices["dtype"] = ("auto", "bfloat16", "float16", "float32")
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(known)}")


# ---------------------------------------------------------------------------------------------------
# Data


class TokenFile:
    """A .bin file cut into sequences, walked in a new seeded order each epoch, without replacement.

    The n-th sequence of a run depends on n and the seed alone: a run that resumes at step s goes on with
    exactly the sequences it would have had, and every sequence comes once before any comes again.
    """

    def __init__(self, path: Path, block_size: int, vocab_size: int, seed: int, end_token: int | None = None):
        size = path.stat().st_size
        if size % 2 or size < 2 * (block_size + 1):
            raise UserError(f"{path}: {size:,} bytes do not hold one sequence of block_size {block_size} + 1 tokens")
        self.tokens = np.memmap(path, dtype="<u2", mode="r")
        for start in range(0, len(self.tokens), 1 << 24):
            if (largest := self.tokens[start : start + (1 << 24)].max()) >= vocab_size:
                raise UserError(f"{path}: holds token {largest}, but the vocabulary ends at {vocab_size - 1}")
        self.block_size, self.seed, self.end_token, self.epoch = block_size, seed, end_token, None

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.block_size

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Sequences number first to first + count - 1 of the run: tokens and targets, (count, T) each."""
        rows = []
        for n in range(first, first + count):
            epoch, index = divmod(n, len(self))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self))
            start = self.order[index] * self.block_size
            rows.append(self.tokens[start : start + self.block_size + 1])
        rows = torch.from_numpy(np.stack(rows).astype(np.int64))  # (count, T + 1)
        batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
        if self.end_token is not None:  # the end of a story begins the next, as it does in sampling
            batch["documents"] = (batch["tokens"] == self.end_token).cumsum(dim=1)  # (count, T)
        return batch


def open_data(settings: Settings):
    """The training and validation data and the tokenizer's bytes, checked against each other."""
    folder = Path(settings.data_dir)
    if not (folder / "meta.json").exists():
        raise UserError(f"{folder}: no prepared data here (meta.json is missing); run prepare.py --out_dir {folder}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        vocab_size, sha256 = meta["vocab_size"], meta["tokenizer_sha256"]
        end_token = meta["end_token"] if settings.document_mask else None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{folder / 'meta.json'}: damaged ({e!r}); run prepare.py again") from None
    model = (folder / "tokenizer.model").read_bytes()
    if (
        hashlib.sha256(model).hexdigest() != sha256
        or load_tokenizer(model, folder / "tokenizer.model").vocab_size() != vocab_size
    ):
        raise UserError(f"{folder / 'tokenizer.model'}: not the tokenizer these token files were made with")
    train, val = (
        TokenFile(folder / f"{split}.bin", settings.block_size, vocab_size, settings.seed, end_token)
        for split in ("train", "val")
    )
    return train, val, model


# ---------------------------------------------------------------------------------------------------
# The machine


def choose_device(settings: Settings) -> tuple[torch.device, torch.dtype]:
    """The device and the type of the matrix products, as asked for or the best there is."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"device = {name!r}: must be auto, cuda, mps or cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"device = {name!r}: PyTorch finds no such CUDA device here; try --device=cpu")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device = 'mps': not available here; try --device=cpu")
    if settings.dtype != "auto":
        return device, getattr(torch, settings.dtype)
    if device.type == "cuda":
        return device, torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return device, torch.bfloat16 if device.type == "cpu" else torch.float32


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The floating point operations a second that large matrix products reach here, measured."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(
        n, n, device=device, dtype=dtype, generator=torch.Generator(device)
    )  # leaves the run's own chance be
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a number back waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def expected_memory(model: GPT, settings: Settings, dtype: torch.dtype) -> int:
    """Bytes of weights, gradients, optimizer state, and of what a micro-batch keeps for its backward pass."""
    c, size = model.config, dtype.itemsize
    weights = model.count_parameters()
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    state = 16 * weights - (4 * matrices if settings.optimizer == "muon" else 0)  # Muon keeps one moment
    heads = (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim
    token = c.n_layer * (8 * c.n_embd + size * (2 * c.n_embd + 2 * heads + 3 * c.intermediate_size))
    loss = 2048 * c.vocab_size * (8 + size) + 8 * c.vocab_size * c.n_embd
    return state + settings.batch_size * settings.block_size * token + loss


def peak_memory(device: torch.device) -> int:
    """The most bytes held at once so far: on the GPU where there is one, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------
# Optimizer, evaluation, checkpoints


def make_optimizers(model: GPT, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW for all; or Muon for the matrices inside the blocks and AdamW for the rest.

    Muon (Jordan et al. 2024) makes each update of a matrix orthogonal. Scaled as in Liu et al. 2025,
    arXiv:2502.16982, equation 4, it takes AdamW's learning rate and weight decay.
    """
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2] if settings.optimizer == "muon" else []
    taken = set(map(id, matrices))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},  # the gains of RMSNorm
    ]
    optimizers = [torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True)]
    if matrices:
        muon = torch.optim.Muon(matrices, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def learning_rate_at(step: int, s: Settings) -> float:
    """Linear warm-up, then half a cosine down to min_lr, or a hold and a line down over the last `cooldown`."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    left = (s.max_iters - step) / max(1, s.max_iters - s.warmup_iters)  # 1 after the warm-up, 0 at the end
    if s.schedule == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * left)
    else:
        share = min(1.0, left / s.cooldown) if s.cooldown else 1.0
    return s.min_lr + (s.learning_rate - s.min_lr) * share


def next_token_loss(model, batch: dict) -> torch.Tensor:
    """The summed loss of a batch; the loop divides by the number of targets in the whole step."""
    return model(**batch)


@torch.no_grad()
def evaluate(model, batches: list[dict], loss_fn, device: torch.device, autocast, rank: int, world: int) -> float:
    """The summed loss over the batches, the work shared between the processes."""
    total = torch.zeros((), device=device)
    for batch in batches[rank::world]:
        with autocast():
            total += loss_fn(model, {k: v.to(device) for k, v in batch.items()})
    if world > 1:
        dist.all_reduce(total)
    return total.item()


def validation_batches(data, settings: Settings) -> list[dict]:
    """The first eval_blocks validation sequences, in batches of one shape (what fills up is not counted)."""
    n, size = min(settings.eval_blocks, len(data)), settings.batch_size
    batches = []
    for first in range(0, n, size):
        batch = data.batch(first, size)
        batch["targets"] = batch["targets"].clone()
        batch["targets"][n - first :] = IGNORE
        batches.append(batch)
    return batches


def save_checkpoint(folder: Path, step: int, state: dict) -> None:
    """Write beside, flush to the disk, rename: at every moment a complete checkpoint exists. Keep two."""
    path, beside = folder / f"ckpt_{step:06d}.pt", folder / "ckpt.tmp"
    try:
        with open(beside, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
        sync_folder(folder)
    except (OSError, RuntimeError) as e:
        beside.unlink(missing_ok=True)
        reason = getattr(e, "strerror", None) or getattr(e.__context__, "strerror", None) or str(e).splitlines()[0]
        raise UserError(f"{path}: not saved ({reason}); older checkpoints are whole, go on with --resume=True") from e
    for old in find_checkpoints(folder)[2:]:
        old.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, so that the curve of a resumed run never doubles back."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(whole), encoding="utf-8")
        os.replace(beside, path)


# ---------------------------------------------------------------------------------------------------
# The loop


def find_state(settings: Settings, model: GPT, tokenizer_model: bytes) -> dict | None:
    """The newest whole checkpoint in out_dir, checked to be of this run; None where there is none."""
    s, out_dir = settings, Path(settings.out_dir)
    found = find_checkpoints(out_dir)
    if found and not s.resume:
        raise UserError(f"{out_dir}: holds a run ({found[0].name}); add --resume=True or choose another out_dir")
    for path in found:
        try:
            state = read_checkpoint(path)
        except UserError as e:
            if path == found[-1]:
                raise
            print(f"{e}\ntaking the one before", file=sys.stderr)
            continue
        for key in ("block_size", "batch_size", "gradient_accumulation_steps", "document_mask", "optimizer", "seed"):
            if state["settings"].get(key) != getattr(s, key):
                raise UserError(f"{key} = {getattr(s, key)!r}: {path} has {state['settings'].get(key)!r}; keep that")
        if state["model_config"] != dataclasses.asdict(model.config):
            raise UserError(f"{path}: the model there has another shape or vocabulary; choose another out_dir")
        if state["tokenizer"] != tokenizer_model:
            raise UserError(f"{path}: that run used another tokenizer than {s.data_dir}; choose another out_dir")
        return state
    return None


def compile_model(model: GPT, settings: Settings, device: torch.device):
    """The model through torch.compile where that works; it shares its weights with `model`."""
    if not settings.compile or device.type == "mps":
        return model
    if device.type == "cpu" and not shutil.which(
        os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    ):
        print("no C++ compiler found: training without torch.compile, which is slower (try: apt install g++)")
        return model
    return torch.compile(model)


def train(settings: Settings, model: GPT, train_data, val_data, tokenizer_model: bytes, loss_fn=next_token_loss):
    """Train `model` in place and leave its checkpoints and metrics.jsonl in settings.out_dir.

    train_data and val_data give `batch(first, count)`, a dict of CPU tensors with count rows each, among
    them "targets"; loss_fn(model, batch) gives a batch's summed loss. Raises UserError.
    """
    s, out_dir = settings, Path(settings.out_dir)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these
    if s.gradient_accumulation_steps % world:
        raise UserError(
            f"gradient_accumulation_steps = {s.gradient_accumulation_steps}: not a multiple of {world} processes"
        )
    device, dtype = choose_device(s)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # float16 needs its gradients scaled
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(s.deterministic)

    state = find_state(s, model, tokenizer_model)
    model.to(device)
    compiled, optimizers = compile_model(model, s, device), make_optimizers(model, s)
    if state:
        try:
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["random_state"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            reason = str(e).split("\n")[0]
            raise UserError(f"{out_dir}: the newest checkpoint lacks what resuming needs ({reason})") from None
    step = state["step"] if state else 0
    del state

    tokenizer = load_tokenizer(tokenizer_model, s.data_dir)
    sequences = s.batch_size * s.gradient_accumulation_steps  # in a step, over all processes
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
        cut_metrics(out_dir / "metrics.jsonl", step)
        metrics = open(out_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (open as long as we run)
    val_batches = validation_batches(val_data, s)
    val_targets = [row[row != IGNORE].tolist() for batch in val_batches for row in batch["targets"]]
    val_tokens, val_characters = sum(map(len, val_targets)), sum(map(len, tokenizer.decode(val_targets)))

    def batches_of(step: int):
        """This process's micro-batches of a step, on their way to the device, and all its targets' number."""
        mine, count = [], 0
        for i in range(s.gradient_accumulation_steps):
            batch = train_data.batch(step * sequences + i * s.batch_size, s.batch_size)
            count += int((batch["targets"] != IGNORE).sum())
            if i % world == rank:
                if device.type == "cuda":  # pinned memory is copied while the GPU works
                    batch = {k: v.pin_memory() for k, v in batch.items()}
                mine.append({k: v.to(device, non_blocking=True) for k, v in batch.items()})
        return mine, count

    def record(line: dict) -> None:
        metrics.write(json.dumps(line) + "\n")
        metrics.flush()

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "model_config": dataclasses.asdict(model.config),
            "tokenizer": tokenizer_model,
            "settings": dataclasses.asdict(s),
            "step": step,
            "sequences": step * sequences,  # the data position
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
            "random_state": torch.get_rng_state(),
        }
        save_checkpoint(out_dir, step, state)

    signalled, stopping = torch.zeros(1), False

    def on_signal(number, frame):
        signalled.fill_(1)
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    recent, saved_at, clock = [], step, time.perf_counter()  # recent: loss and gradient norm of each step
    upcoming = batches_of(step)
    bar = tqdm(total=s.max_iters, initial=step, unit="step", disable=None if rank == 0 else True)
    while step < s.max_iters and not stopping:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, s)
        (micro_batches, count), loss_sum = upcoming, torch.zeros((), device=device)
        for batch in micro_batches:
            with autocast():
                loss = loss_fn(compiled, batch)
            scaler.scale(loss / count).backward()
            loss_sum += loss.detach()
        upcoming = batches_of(step + 1)  # on the way while the device still works on this step
        if world > 1:
            flat = torch.cat([loss_sum.view(1), *(p.grad.view(-1) for p in model.parameters())])
            dist.all_reduce(flat)
            parts = flat.split([1, *(p.numel() for p in model.parameters())])
            loss_sum = parts[0][0]
            for p, part in zip(model.parameters(), parts[1:], strict=True):
                p.grad.copy_(part.view_as(p))
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        recent.append((loss_sum / count, norm))
        step += 1
        bar.update()

        stop = signalled.clone()
        if world > 1:  # the signal may have reached only some: all must stop after the same step
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        stopping = bool(stop)
        last = step == s.max_iters or stopping
        if step % s.log_interval == 0 or step % s.save_interval == 0 or last:
            # Only here is a number read back, which makes the CPU wait for the device.
            losses, norms = torch.stack([torch.stack(pair) for pair in recent]).t().tolist()
            for i, (a, b) in enumerate(zip(losses, norms, strict=True)):
                if not math.isfinite(a) or not (math.isfinite(b) or scaler.is_enabled()):
                    at = step - len(recent) + i + 1
                    kept = f"the checkpoint of step {saved_at} is" if saved_at else "no checkpoint is"
                    raise UserError(
                        f"step {at}: loss {a}, gradient norm {b}; stopped; {kept} kept from before; "
                        f"try a learning_rate below {s.learning_rate}"
                    )
            seconds = time.perf_counter() - clock
            if rank == 0:
                speed = len(recent) * tokens_a_step / seconds
                line = {"step": step, "tokens": step * tokens_a_step, "loss": sum(losses) / len(losses)}
                line |= {
                    "learning_rate": learning_rate_at(step - 1, s),
                    "grad_norm": norms[-1] if math.isfinite(norms[-1]) else None,
                }
                line |= {"tokens_per_second": speed, "mfu": speed * flops_a_step / tokens_a_step / rate}
                record(line | {"peak_memory": peak_memory(device)})
                bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_s=f"{speed:,.0f}")
            recent, clock = [], time.perf_counter()
        if step % s.eval_interval == 0 or last:
            nats = evaluate(compiled, val_batches, loss_fn, device, autocast, rank, world)
            if rank == 0:
                loss, bits = nats / val_tokens, nats / val_characters / math.log(2)
                line = {"step": step, "tokens": step * tokens_a_step, "val_loss": loss}
                record(line | {"val_perplexity": math.exp(min(loss, 700)), "val_bits_per_character": bits})
                tqdm.write(f"step {step:,}: validation loss {loss:.4f}, {bits:.3f} bits a character")
        if rank == 0 and s.sample_interval and (step % s.sample_interval == 0 or last):
            tqdm.write(tell(model, tokenizer, "", 1, max_new_tokens=s.block_size, seed=s.seed)[0] + "\n")
        if rank == 0 and (step % s.save_interval == 0 or last):
            save()
            saved_at = step
        if not recent:
            clock = time.perf_counter()  # evaluating and saving do not count as training
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if rank == 0 and stopping and step < s.max_iters:
        print(f"stopped and saved at step {step}; to go on: {shlex.join(['python', *sys.argv, '--resume=True'])}")


def main() -> None:
    settings = load_settings(sys.argv[1:], Settings, __doc__)
    if "RANK" in os.environ:
        device, _ = choose_device(settings)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(settings.seed)
    train_data, val_data, tokenizer = open_data(settings)
    vocab_size = load_tokenizer(tokenizer, settings.data_dir).vocab_size()
    names = {field.name for field in dataclasses.fields(ModelConfig)} & set(vars(settings))
    try:
        config = ModelConfig(vocab_size=vocab_size, **{name: getattr(settings, name) for name in names})
    except ValueError as e:
        raise UserError(str(e)) from None
    train(settings, GPT(config), train_data, val_data, tokenizer)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
