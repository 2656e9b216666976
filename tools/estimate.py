"""What a config will cost on a GPU, by counting: time, memory, and bytes moved. Nothing is run.

    python -m tools.bench --estimate config/microstories.py config/microstories_sft.py --gpu 3090

Three numbers of a GPU come from its data sheet: dense bfloat16 products with float32 accumulation, memory bandwidth,
and memory. The share of the products that training reaches (MFU) is not known before it runs: the time is given for
35% and for 45%.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common.device import estimate_memory
from common.settings import UserError, load_settings, read_config
from dpo import Settings as DpoSettings
from model import GPT, ModelConfig
from sft import Settings as SftSettings
from train import Settings

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
    steps: int
    bytes_per_step: float
    memory: int

    def hours(self, gpu: str, share: float) -> float:
        """Limited by the products, or by the memory if that takes longer."""
        tflops, bandwidth, _ = GPUS[gpu]
        products = self.tokens_per_step * self.flops_per_token / (share * tflops * 1e12)
        return self.steps * max(products, self.bytes_per_step / (bandwidth * 1e9)) / 3600


def shape_of(path: Path) -> Settings | SftSettings:
    """The settings of the config that makes a config's model: its own, or those of the run it starts from."""
    values = read_config(str(path))
    if not values.get("init_from"):
        return load_settings([str(path)], SftSettings if "init_from" in values else Settings, "")
    source = path.with_name(Path(values["init_from"]).name + ".py")
    if not source.exists():
        raise UserError(f"{path}: starts from {values['init_from']}, but {source} is not there to tell its shape")
    return shape_of(source)


def estimate(path: Path, vocab_size: int, sequences: int) -> Estimate:
    """vocab_size and the sequences of an epoch count if data_dir is not there to be read. Raises UserError."""
    values, shape = read_config(str(path)), shape_of(path)
    kind = Settings if "init_from" not in values else DpoSettings if "instructions" in values else SftSettings
    s = load_settings([str(path)], kind, "")
    meta = Path(s.data_dir, "meta.json")
    if meta.exists():
        read = json.loads(meta.read_text(encoding="utf-8"))
        vocab_size = read["vocab_size"]
        sequences = read["train"]["tokens"] // s.block_size
    names = ("n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "intermediate_size", "rope_theta", "qk_norm")
    fields = {name: getattr(shape, name) for name in names}
    with torch.device("meta"):  # the shape alone, no memory
        model = GPT(ModelConfig(vocab_size=vocab_size, block_size=shape.block_size, **fields))
    stories = 2 if kind is DpoSettings else 1  # a pair is two sequences
    per_step = s.batch_size * s.gradient_accumulation_steps
    if kind is DpoSettings:
        sequences = s.instructions
    steps = math.ceil(s.epochs * sequences / per_step) if s.epochs else s.max_iters
    memory = estimate_memory(model, s, torch.bfloat16, torch.device("cuda"))
    return Estimate(
        parameters=model.count_parameters(),
        tokens_per_step=per_step * s.block_size * stories,
        flops_per_token=model.flops_per_token(s.block_size),
        steps=steps,
        bytes_per_step=bytes_moved(model, s, memory),
        memory=memory,
    )


def bytes_moved(model: GPT, s, memory: int) -> float:
    """Bytes that a step reads and writes at least.

    The optimizer: weights, moments and gradients, in float32. Each micro-batch: the weights cast and read forward and
    backward, the gradients added, and what is stored for the backward pass written once and read once.
    """
    n = model.count_parameters()
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2) if s.optimizer == "muon" else 0
    optimizer = 28 * (n - matrices) + 20 * matrices  # AdamW: p, m, v read and written, g read; Muon has one moment
    state = 16 * n - 4 * matrices
    micro_batch = (4 + 2 + 2 * 2 + 8) * n + 2 * (memory - state)
    return optimizer + s.gradient_accumulation_steps * micro_batch


def print_estimates(paths: list[Path], gpu: str, vocab_size: int, sequences: int) -> list[dict]:
    """A table with a row for each config. Raises UserError."""
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu!r}: must be one of {', '.join(GPUS)}")
    tflops, bandwidth, gigabytes = GPUS[gpu]
    print(
        f"{gpu}: {tflops} TFLOP/s in bfloat16, {bandwidth} GB/s, {gigabytes} GB. Estimated by counting, not measured."
    )
    titles = ("parameters", "tokens/step", "MFLOP/token", "steps", "tokens", "GB moved/step", "memory")
    print(
        f"{'config':28}" + "".join(f"{t:>14}" for t in titles) + "".join(f"{f'hours at {x:.0%}':>14}" for x in SHARES)
    )
    rows = []
    for path in paths:
        e = estimate(path, vocab_size, sequences)
        cells = [
            f"{e.parameters / 1e6:.1f} M",
            f"{e.tokens_per_step:,}",
            f"{e.flops_per_token / 1e6:.0f}",
            f"{e.steps:,}",
        ]
        cells += [
            f"{e.steps * e.tokens_per_step / 1e9:.2f} G",
            f"{e.bytes_per_step / 1e9:.0f}",
            f"{e.memory / 2**30:.1f} GiB",
        ]
        hours = [e.hours(gpu, share) for share in SHARES]
        print(f"{path.name:28}" + "".join(f"{c:>14}" for c in cells) + "".join(f"{h:>14.2f}" for h in hours))
        if e.memory > gigabytes * 1e9:
            print(f"{path}: does not fit into {gigabytes} GB; halve batch_size, double gradient_accumulation_steps")
        rows.append(vars(e) | {"config": str(path), "gpu": gpu, "hours": hours})
    return rows
