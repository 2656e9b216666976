"""The model: a decoder-only transformer with RMSNorm, RoPE, grouped-query attention and SwiGLU.

`GPT`, at the end, is the whole; its parts stand above it. Without `qk_norm` it computes exactly what Llama
computes, with `qk_norm` what Qwen3 computes.

Letters in the shape comments: B sequences in a batch, T tokens in a sequence, C = n_embd,
H = n_head, K = n_kv_head, D = head_dim, V = vocab_size, S positions in a KV cache.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE = -100  # targets with this value do not count in the loss
# Tokens whose logits are in memory at once: few fit a CPU's caches; on a GPU fewer chunks compile faster.
LOGITS_PER_CHUNK = {"cpu": 1024, "cuda": 4096, "mps": 4096}


@dataclass
class ModelConfig:
    """The shape of a model. It is stored in every checkpoint."""

    vocab_size: int
    block_size: int  # the longest sequence, in tokens
    n_layer: int
    n_head: int
    n_kv_head: int  # GQA: n_head / n_kv_head query heads share one key and value head
    head_dim: int  # need not be n_embd / n_head
    n_embd: int
    intermediate_size: int  # the width inside SwiGLU
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qk_norm: bool = True

    def __post_init__(self):
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs of numbers")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta ({self.rope_theta}) must be above 0")
        if not 0 < self.block_size <= 1 << 20:
            raise ValueError(f"block_size ({self.block_size}) must be above 0 and at most {1 << 20}")


def rope_table(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of RoPE, each (block_size, D) (Su et al. 2021, arXiv:2104.09864, equation 15).

    Position t rotates the pair (i, i + D/2) of every query and key by the angle t * theta^(-2i/D).
    The product of a rotated query and a rotated key depends only on the distance of their positions.
    """
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)  # (D/2,)
    angle = torch.outer(torch.arange(config.block_size).float(), frequency)  # (block_size, D/2)
    angle = torch.cat((angle, angle), dim=-1)  # (block_size, D)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x, (B, heads, T, D), by the angles of cos and sin, each (T, D) or (B, 1, T, D)."""
    left, right = x.chunk(2, dim=-1)  # (B, heads, T, D/2) each
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), with optional QK-norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=False)
        # QK-norm bounds the attention scores, so that a high learning rate stays stable.
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask=None, cache=None, positions=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        # Norm and rotation in the dtype of the angles: float32 under autocast, bfloat16 if the whole model is.
        q = rotate(self.q_norm(q.to(cos.dtype)), cos, sin).to(v.dtype)  # (B, H, T, D)
        k = rotate(self.k_norm(k.to(cos.dtype)), cos, sin).to(v.dtype)  # (B, K, T, D)
        if cache is not None:  # write the new keys and values at their positions; attend to the whole cache
            index = torch.arange(B, device=x.device)[:, None]  # (B, 1)
            cache[0][index, :, positions] = k.transpose(1, 2)  # (B, T, K, D)
            cache[1][index, :, positions] = v.transpose(1, 2)  # (B, T, K, D)
            k, v = cache  # (B, K, S, D) each
        if x.is_cpu:
            y = attend_on_cpu(q, k, v, mask)  # (B, H, T, D), the same, faster
        else:
            if cache is None and (mask is not None or v.dtype == torch.float32):  # CUDA's fused kernels lack GQA here
                k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))  # (B, H, S, D)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202, equation 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Attention mixes tokens, SwiGLU transforms each; both are added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin, mask=None, cache=None, positions=None):
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache, positions)  # (B, T, C)
        return x + self.mlp(self.mlp_norm(x))  # (B, T, C)


class GPT(nn.Module):
    """Tokens in, logits of the next token out. The embedding is tied to the output matrix."""

    cos: torch.Tensor  # buffers, declared for the type checker
    sin: torch.Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)  # recomputed, not stored in checkpoints
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        """Normal(0, 0.02); projections into the residual stream less, by depth (GPT-2, section 2.3)."""
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue  # RMSNorm's weights start at 1
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(weight, std=std)

    def hidden(self, tokens, documents=None, positions=None, cache=None):
        """The final hidden states, (B, T, C), of tokens, (B, T).

        A token attends to itself and all tokens before it; with documents, (B, T), ids of texts, only to those of its
        own text. positions, (B, T), default to 0, 1, 2, …
        cache comes from `new_cache`. It needs positions: where the keys and values of the tokens are written, and how
        far each token sees; positions after it may hold nothing yet, or padding.
        """
        assert cache is None or (positions is not None and documents is None)
        mask = None
        if positions is None:
            cos, sin = self.cos[: tokens.size(1)], self.sin[: tokens.size(1)]  # (T, D)
        else:
            cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, T, D)
        if documents is not None:
            same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
            mask = same.tril()[:, None]  # (B, 1, T, T)
        if cache is not None:
            cached = torch.arange(cache[0][0].size(2), device=tokens.device)  # (S,)
            mask = (cached <= positions[:, :, None])[:, None]  # (B, 1, T, S)
        x = self.embedding(tokens)  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, mask, None if cache is None else cache[layer], positions)  # (B, T, C)
        return self.norm(x)  # (B, T, C)

    def forward(self, tokens, documents=None, positions=None, cache=None, last=None):
        """Logits of the next token, (B, T, V); with last, (B,), only at these positions, (B, 1, V)."""
        x = self.hidden(tokens, documents, positions, cache)  # (B, T, C)
        if last is not None:
            x = x.gather(1, last[:, None, None].expand(-1, 1, x.size(2)))  # (B, 1, C)
        return F.linear(x, self.embedding.weight)  # (B, T, V)

    def loss(self, tokens, targets, documents=None, positions=None):
        """The cross entropy in nats, summed over all targets, (B, T), that are not IGNORE. Returns (), float32.

        F.cross_entropy(self(tokens), targets, ignore_index=IGNORE, reduction="sum"), without all logits in memory.
        A sum, so that the caller divides once, by all targets of a step: then each token weighs the same in whichever
        micro-batch it is.
        """
        x = self.hidden(tokens, documents, positions).flatten(0, 1)  # (B * T, C)
        weight, targets = self.embedding.weight, targets.flatten()  # (V, C), (B * T,)
        if x.is_cpu and not torch.compiler.is_compiling():  # elsewhere it costs more than it saves
            here = targets != IGNORE  # (B * T,)
            x, targets = x[here], targets[here]  # (N, C), (N,)
        if torch.is_autocast_enabled(x.device.type):  # matrices multiplied by hand must be cast by hand
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        if torch.is_grad_enabled():
            return ChunkedCrossEntropy.apply(x, weight, targets)
        return sum(loss for *_, loss in chunked_cross_entropy(x, weight, targets))

    def new_cache(self, batch_size: int, length: int, dtype=torch.float32) -> list:
        """An empty KV cache of `length` positions: for each layer two tensors, (B, K, S, D)."""
        shape = (batch_size, self.config.n_kv_head, length, self.config.head_dim)
        device = self.embedding.weight.device
        return [[torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"] for _ in self.blocks]

    def count_parameters(self) -> int:
        """The number of parameters; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int) -> int:
        """Floating point operations of training on one token of a sequence of `length` tokens.

        Each weight of a matrix takes 2 forward and 4 backward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
        A token attends to length / 2 others on average: 6 * length * H * D for each layer.
        """
        c = self.config
        weights = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        return 6 * weights + 6 * c.n_layer * length * c.n_head * c.head_dim


# ---------------------------------------------------------------------------------------------------
# The fast paths: what they compute is written in `Attention.forward` and `GPT.loss`


def attend_on_cpu(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v, where mask, (B, 1, T, S), is True; without a mask, causal.

    q: (B, H, T, D), k and v: (B, K, S, D). Returns (B, H, T, D).
    On a CPU the backward pass of `F.scaled_dot_product_attention` takes three times as long.
    Queries are taken in four blocks, each with the keys up to its end: less of the masked half is computed.
    """
    T, S = q.size(2), k.size(2)
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))  # (B, H, S, D)
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()  # (T, T)
    blocks, size = [], math.ceil(T / 4)
    with torch.autocast(q.device.type, enabled=False):  # autocast would store the probabilities in float32
        for start in range(0, T, size):
            here = slice(start, start + size)
            end = start + size if S == T else S  # with a cache only the mask knows what is visible
            scores = (q[:, :, here] * q.size(3) ** -0.5) @ k[:, :, :end].transpose(2, 3)  # (B, H, size, end)
            scores = scores.masked_fill(~mask[..., here, :end], -torch.inf)  # (B, H, size, end)
            blocks.append(scores.softmax(dim=-1) @ v[:, :, :end])  # (B, H, size, D)
    return torch.cat(blocks, dim=2)  # (B, H, T, D)


def chunked_cross_entropy(x, weight, targets):
    """For LOGITS_PER_CHUNK tokens at a time: their slice, log-probabilities, and summed loss."""
    size = LOGITS_PER_CHUNK[x.device.type]
    for start in range(0, max(1, x.size(0)), size):  # one at least, perhaps empty
        here = slice(start, start + size)
        log_p = F.linear(x[here], weight).float().log_softmax(dim=-1)  # (R, V)
        yield here, log_p, F.nll_loss(log_p, targets[here], ignore_index=IGNORE, reduction="sum")


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross entropy of x @ weight.T, (N, V), and targets, (N,).

    The logits would be the largest tensor of a training step. Their gradient is known as soon as they are: softmax
    minus one at the target. So forward turns each chunk of logits into gradients of x and weight, and drops it.
    `F.linear_cross_entropy` does so too, but returns the sum in the dtype of x: too coarse in bfloat16.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        total = x.new_zeros((), dtype=torch.float32)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for here, log_p, loss in chunked_cross_entropy(x, weight, targets):
            total = total + loss  # not in place: PyTorch 2.11 compiled that to gradients that are all 0
            target = targets[here, None]  # (R, 1)
            one_hot = (torch.arange(weight.size(0), device=x.device) == target).float()  # (R, V)
            grad = ((log_p.exp() - one_hot) * (target != IGNORE)).to(x.dtype)  # (R, V)
            grad_x[here] = grad @ weight
            grad_weight += grad.t() @ x[here]
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_output, grad_weight * grad_output, None
