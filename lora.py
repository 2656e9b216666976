"""LoRA: small adapters that learn beside frozen matrices."""

import math

import torch
import torch.nn as nn
import torch.nn.utils.parametrize as parametrize

from model import GPT


class LowRank(nn.Module):
    """A frozen matrix W stands as W + (alpha / rank) B A, of which only B and A learn.

    LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3). B begins as zero, and so W as it was.
    """

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float):
        super().__init__()
        self.scale = alpha / rank
        start = torch.randn(rank, weight.size(1)) / math.sqrt(rank)  # drawn on the CPU: the same on every device
        self.A = nn.Parameter(start.to(weight))
        self.B = nn.Parameter(weight.new_zeros(weight.size(0), rank))

    def forward(self, weight):
        return weight + self.scale * (self.B @ self.A)  # (out, in)


def matrices_of(model: GPT) -> list[nn.Linear]:
    """The matrices of attention and SwiGLU, which LoRA adapts."""
    return [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]


def add_lora(model: GPT, rank: int, alpha: float) -> None:
    """Freeze the model and give each matrix of its blocks an adapter of this rank."""
    model.requires_grad_(False)
    for linear in matrices_of(model):
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank, alpha))


def merge_lora(model: GPT) -> None:
    """Add the adapters into the matrices they adapt: the model is then an ordinary one again."""
    for linear in matrices_of(model):
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
