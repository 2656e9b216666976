"""Time and memory that a config will take on a GPU, by counting. Nothing is run.

    python -m tools.estimate config/microstories.py
    python -m tools.estimate config/microstories.py config/microstories_sft.py --gpu 4090

The speed of a GPU is that of its data sheet: dense bfloat16 products with float32 accumulation. What share of
it a training reaches is not known before it runs, so the time is given for 35% and for 45%.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import Parser, UserError, report_errors
from common.settings import load_settings, read_config
from model import GPT, LOGITS_PER_CHUNK
from sft import Settings as SftSettings
from tools.dpo import Settings as DpoSettings
from train import Settings, new_model

TFLOPS = {"3090": 71, "4090": 165, "a100": 312, "h100": 989, "h200": 989}
GIGABYTES = {"3090": 24, "4090": 24, "a100": 80, "h100": 80, "h200": 141}
ROW = "{:28}{:>12}{:>13}{:>13}{:>9}{:>10}{:>11}{:>14}{:>14}"


@dataclass
class Estimate:
    parameters: int
    tokens_per_step: int
    flops_per_token: int
    steps: int
    memory: int  # bytes


def print_estimates(configs: list[Path], gpu: str, vocab_size: int, sequences: int) -> None:
    """A table with a row for each config. Raises UserError."""
    print(f"{gpu}: {TFLOPS[gpu]} TFLOP/s in bfloat16, {GIGABYTES[gpu]} GB. Estimated, not measured.")
    titles = (
        "parameters",
        "tokens/step",
        "MFLOP/token",
        "steps",
        "tokens",
        "memory",
        "hours at 35%",
        "hours at 45%",
    )
    print(ROW.format("config", *titles))
    for config in configs:
        e = estimate(config, vocab_size, sequences)
        tokens = e.steps * e.tokens_per_step
        hours_at_full_speed = tokens * e.flops_per_token / (TFLOPS[gpu] * 1e12) / 3600
        print(
            ROW.format(
                config.name,
                f"{e.parameters / 1e6:.1f} M",
                f"{e.tokens_per_step:,}",
                f"{e.flops_per_token / 1e6:.0f}",
                f"{e.steps:,}",
                f"{tokens / 1e6:,.0f} M",
                f"{e.memory / 2**30:.1f} GiB",
                f"{hours_at_full_speed / 0.35:.2f}",
                f"{hours_at_full_speed / 0.45:.2f}",
            )
        )
        if e.memory > GIGABYTES[gpu] * 1e9:
            print(f"{config}: does not fit; halve batch_size and double gradient_accumulation_steps")


def estimate(config: Path, vocab_size: int, sequences: int) -> Estimate:
    """The estimate of one config. Raises UserError.

    vocab_size, and how many sequences an epoch has, are used if the config's data_dir is not prepared yet.
    """
    s = settings_of(config)
    meta_file = Path(s.data_dir, "meta.json")
    if meta_file.exists():
        meta = json.loads(meta_file.read_text(encoding="utf-8-sig"))
        vocab_size = meta["vocab_size"]
        sequences = meta["train"]["tokens"] // s.block_size
    with torch.device("meta"):  # the shape alone takes no memory
        model = new_model(shape_of(config), vocab_size)

    per_step = s.batch_size * s.gradient_accumulation_steps
    tokens_per_step = per_step * s.block_size
    in_epoch = sequences
    if isinstance(s, DpoSettings):
        tokens_per_step *= 2  # of the chosen and of the rejected story
        in_epoch = s.instructions  # a pair of each
    steps = s.max_iters
    if s.epochs:
        steps = math.ceil(s.epochs * in_epoch / per_step)
    return Estimate(
        parameters=model.count_parameters(),
        tokens_per_step=tokens_per_step,
        flops_per_token=flops_per_token(model, s.block_size),
        steps=steps,
        memory=estimate_memory(model, s),
    )


def flops_per_token(model: GPT, length: int) -> int:
    """Floating point operations of training on one token of a sequence of `length` tokens.

    Each weight of a matrix takes 2 forward and 4 backward (Kaplan et al. 2020, arXiv:2001.08361, section
    2.1). A token attends to length / 2 others on average: 6 * length * H * D for each layer.
    """
    c = model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    return 6 * weights + 6 * c.n_layer * length * c.n_head * c.head_dim


def settings_of(config: Path):
    """The settings in a config of train.py, sft.py or tools/dpo.py. Raises UserError."""
    names = read_config(str(config)).keys()
    kind: type = Settings
    if "init_from" in names:
        kind = SftSettings
    if "instructions" in names or "pairs" in names:
        kind = DpoSettings
    return load_settings([str(config)], kind, "")


def shape_of(config: Path) -> Settings:
    """The settings that give the model its shape: the config's own, or those of the run it starts from."""
    values = read_config(str(config))
    if "init_from" not in values:
        return load_settings([str(config)], Settings, "")
    run = Path(values["init_from"])
    its_config = config.with_name(f"{run.name}.py")
    if not its_config.exists():
        raise UserError(f"{config}: starts from {run}, but {its_config} is not there to tell its shape")
    return shape_of(its_config)


def estimate_memory(model: GPT, s, number_size: int = 2) -> int:
    """Bytes of GPU memory of a training that computes in numbers of number_size bytes; by default bfloat16.

    Weights, gradients and the optimizer's moments are float32. Activations are what a micro-batch stores for
    its backward pass.
    """
    c = model.config
    n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = 4 * model.count_parameters()
    gradients = 4 * n_trainable
    moments = 8 * n_trainable  # AdamW has two for each parameter
    if s.optimizer == "muon":  # it has one for each parameter of the blocks' matrices
        matrices = [p for p in model.blocks.parameters() if p.requires_grad and p.dim() == 2]
        moments -= 4 * sum(p.numel() for p in matrices)

    tokens = s.batch_size * s.block_size
    if isinstance(s, DpoSettings):
        tokens *= 2
    # For each token a layer stores its input and the sum after attention in float32, both after their norm,
    # queries, keys and values before and after the rotation, and three tensors inside SwiGLU.
    heads = (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim
    numbers = 2 * c.n_embd + 2 * heads + 3 * c.intermediate_size
    activations = tokens * c.n_layer * (8 * c.n_embd + number_size * numbers)

    # GPT.loss has the logits of one chunk at a time, and two float32 gradients of the output matrix.
    # DPO has all logits.
    logits_per_token = c.vocab_size * (8 + number_size)
    if isinstance(s, DpoSettings):
        logits = tokens * logits_per_token
    else:
        logits = LOGITS_PER_CHUNK["cuda"] * logits_per_token + 8 * c.vocab_size * c.n_embd
    return weights + gradients + moments + activations + logits


def main() -> None:
    parser = Parser(description="Estimate the time and memory of a training.", allow_abbrev=False)
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG")
    parser.add_argument("--gpu", choices=list(TFLOPS), default="3090")
    parser.add_argument("--vocab_size", type=int, default=8192, help="where the data is not prepared")
    parser.add_argument("--sequences", type=int, default=2_000_000, help="of an epoch, likewise")
    args = parser.parse_args()
    print_estimates(args.configs, args.gpu, args.vocab_size, args.sequences)


if __name__ == "__main__":
    report_errors(main)
