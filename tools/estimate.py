"""What a config will cost on a GPU, by counting: time and memory. Nothing is run.

    python -m tools.bench --estimate config/microstories.py config/microstories_sft.py --gpu 3090

Three numbers of a GPU come from its data sheet: dense bfloat16 products with float32 accumulation, the speed of its
memory, and its size. The share of the products that training reaches is not known before it runs: the time is given for
35% and for 45% of the data sheet's. (`mfu` in metrics.jsonl is a share of what products reach when measured, which is
less.) Beside it stands the floor: all products at that speed, and what lies between them at the speed of the memory.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import UserError
from common.settings import load_settings, read_config
from model import GPT, LOGITS_PER_CHUNK, ModelConfig
from sft import Settings as SftSettings
from tools.dpo import Settings as DpoSettings
from train import Settings, new_model

GPUS = {  # TFLOP/s, GB/s, GB
    "3090": (71, 936, 24),
    "4090": (165, 1008, 24),
    "a100": (312, 2039, 80),
    "h100": (989, 3350, 80),
    "h200": (989, 4800, 141),
}
SHARES = (0.35, 0.45)


@dataclass
class Estimate:
    parameters: int
    tokens_per_step: int
    flops_per_token: int
    bytes_per_token: int
    steps: int
    memory: int

    def hours(self, gpu: str, share: float) -> float:
        tflops, *_ = GPUS[gpu]
        return self.steps * self.tokens_per_step * self.flops_per_token / (share * tflops * 1e12) / 3600

    def floor(self, tflops: float, gigabytes: float) -> float:
        """Seconds of a step in which products and memory are at their fastest, one after the other."""
        return self.tokens_per_step * (self.flops_per_token / tflops / 1e12 + self.bytes_per_token / gigabytes / 1e9)


def shape_of(path: Path) -> Settings:
    """The settings of the config that makes a config's model: its own, or those of the run it starts from."""
    values = read_config(str(path))
    if "init_from" not in values:
        return load_settings([str(path)], Settings, "")
    source = path.with_name(Path(values["init_from"]).name + ".py")
    if not source.exists():
        raise UserError(f"{path}: starts from {values['init_from']}, but {source} is not there to tell its shape")
    return shape_of(source)


def moved_per_token(c: ModelConfig) -> int:
    """Bytes that a token moves between the products, forward and backward, where the compiler fuses neighbours.

    The residual stream takes 4 bytes, all else 2. Products and attention are bound by arithmetic.
    """
    swiglu = 18 * c.intermediate_size  # forward 2 read, 1 written; backward 3 read, 3 written
    residual = 56 * c.n_embd  # two sums and their norms: 12 bytes forward, 16 backward
    heads = 10 * (c.n_head + c.n_kv_head) * c.head_dim  # QK-norm and rotation: 2 forward, 3 backward
    return c.n_layer * (swiglu + residual + heads) + 16 * c.vocab_size  # the softmax of the logits


def estimate_memory(model: GPT, s, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of weights, gradients, optimizer state, and of what a micro-batch stores for its backward pass."""
    c, size = model.config, dtype.itemsize
    pairs = isinstance(s, DpoSettings)  # each is two sequences
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = 4 * model.count_parameters() + 12 * trainable
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.requires_grad and p.dim() == 2)
    state -= 4 * matrices if s.optimizer == "muon" else 0  # Muon has one moment
    heads = (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim
    per_token = c.n_layer * (8 * c.n_embd + size * (2 * c.n_embd + 2 * heads + 3 * c.intermediate_size))
    if device.type == "cpu":  # attend_on_cpu stores five eighths of all attention weights
        per_token += c.n_layer * c.n_head * s.block_size * size * 5 // 8
    tokens = s.batch_size * s.block_size * (2 if pairs else 1)
    # GPT.loss has the logits of one chunk at a time and float32 gradients of the output matrix; DPO has all logits.
    logits = (tokens if pairs else LOGITS_PER_CHUNK[device.type]) * c.vocab_size * (8 + size)
    return state + tokens * per_token + logits + (0 if pairs else 8 * c.vocab_size * c.n_embd)


def estimate(path: Path, vocab_size: int, sequences: int) -> Estimate:
    """vocab_size and the sequences of an epoch count if data_dir is not there to be read. Raises UserError."""
    values = read_config(str(path))
    kind: type = SftSettings if "init_from" in values else Settings
    if {"instructions", "pairs"} & values.keys():
        kind = DpoSettings
    s = load_settings([str(path)], kind, "")
    meta = Path(s.data_dir, "meta.json")
    if meta.exists():
        read = json.loads(meta.read_text(encoding="utf-8-sig"))
        vocab_size = read["vocab_size"]
        sequences = read["train"]["tokens"] // s.block_size
    with torch.device("meta"):  # the shape alone, no memory
        model = new_model(shape_of(path), vocab_size)
    pairs = isinstance(s, DpoSettings)
    per_step = s.batch_size * s.gradient_accumulation_steps
    in_epoch = s.instructions if pairs else sequences
    return Estimate(
        parameters=model.count_parameters(),
        tokens_per_step=per_step * s.block_size * (2 if pairs else 1),
        flops_per_token=model.flops_per_token(s.block_size),
        bytes_per_token=moved_per_token(model.config),
        steps=math.ceil(s.epochs * in_epoch / per_step) if s.epochs else s.max_iters,
        memory=estimate_memory(model, s, torch.bfloat16, torch.device("cuda")),
    )


def print_estimates(paths: list[Path], gpu: str, vocab_size: int, sequences: int) -> list[dict]:
    """A table with a row for each config. Raises UserError."""
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu!r}: must be one of {', '.join(GPUS)}")
    tflops, speed, gigabytes = GPUS[gpu]
    print(f"{gpu}: {tflops} TFLOP/s in bfloat16, {speed} GB/s, {gigabytes} GB. Estimated by counting, not measured.")
    titles = ["parameters", "tokens/step", "MFLOP/token", "steps", "tokens", "memory"]
    titles += [f"hours at {share:.0%}" for share in SHARES] + ["floor, hours"]
    print(f"{'config':28}" + "".join(f"{title:>14}" for title in titles))
    rows = []
    for path in paths:
        e = estimate(path, vocab_size, sequences)
        hours = [*(e.hours(gpu, share) for share in SHARES), e.steps * e.floor(tflops, speed) / 3600]
        cells = [f"{e.parameters / 1e6:.1f} M", f"{e.tokens_per_step:,}", f"{e.flops_per_token / 1e6:.0f}"]
        cells += [f"{e.steps:,}", f"{e.steps * e.tokens_per_step / 1e9:.2f} G", f"{e.memory / 2**30:.1f} GiB"]
        cells += [f"{h:.2f}" for h in hours]
        print(f"{path.name:28}" + "".join(f"{cell:>14}" for cell in cells))
        if e.memory > gigabytes * 1e9:
            print(f"{path}: does not fit into {gigabytes} GB; halve batch_size, double gradient_accumulation_steps")
        rows.append(vars(e) | {"config": str(path), "gpu": gpu, "hours": hours})
    return rows
