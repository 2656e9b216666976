"""Muon, the optimizer of the matrices inside the blocks (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

import collections
import math

import torch


def orthogonalized(x: torch.Tensor) -> torch.Tensor:
    """Matrices near x, (N, rows, columns), with all singular values near 1.

    Five Newton-Schulz steps of the fifth order: each applies 3.4445 s - 4.775 s^3 + 2.0315 s^5 to every singular
    value s, which draws what lies between 0.01 and 1 to somewhere between 0.7 and 1.2.
    """
    wide = x.mT if x.size(1) > x.size(2) else x  # the products below are of the shorter side
    y = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), y, beta=3.4445)
    return y.mT if x.size(1) > x.size(2) else y


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal: an update moves the weights alike in all directions, not most in those
    that most gradients share. Scaled as in Liu et al. 2025, arXiv:2502.16982, equation 4, it takes AdamW's learning
    rate and weight decay.

    Unlike `torch.optim.Muon` it takes matrices of one shape together, and computes in `dtype`: a processor without
    instructions for bfloat16 takes 30 times as long for a product in it.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], weight_decay: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure
        for group in self.param_groups:
            alike = collections.defaultdict(list)
            for p in group["params"]:
                alike[p.shape].append(p)
            for shape, weights in alike.items():
                updates = []
                for p in weights:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    mean = self.state[p]["momentum_buffer"]
                    mean.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(mean, group["momentum"]).to(self.dtype))
                for p, update in zip(weights, orthogonalized(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])
