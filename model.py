"""The model: a decoder-only transformer with RMSNorm, RoPE, grouped-query attention and SwiGLU.

`GPT` is the whole; its parts stand above it, the fast paths below. Without `qk_norm` it computes exactly what
Llama computes, with `qk_norm` what Qwen3 computes.

Letters in the shape comments: B sequences in a batch, T tokens in a sequence, C = n_embd,
H = n_head, K = n_kv_head, D = head_dim, V = vocab_size, S positions in a KV cache.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE = -100  # targets with this value do not count in the loss
# Tokens whose logits are in memory at once: few fit a CPU's cache; on a GPU fewer chunks compile faster.
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
    exponent = -torch.arange(0, config.head_dim, 2).float() / config.head_dim  # (D/2,)
    frequency = config.rope_theta**exponent  # (D/2,)
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
        # Norm and rotation in the dtype of the angles: float32 under autocast, else that of the model.
        q = self.q_norm(q.to(cos.dtype))  # (B, H, T, D)
        k = self.k_norm(k.to(cos.dtype))  # (B, K, T, D)
        q = rotate(q, cos, sin).to(v.dtype)  # (B, H, T, D)
        k = rotate(k, cos, sin).to(v.dtype)  # (B, K, T, D)
        if cache is not None:
            keys, values = cache  # (B, K, S, D) each
            sequence = torch.arange(B, device=x.device)[:, None]  # (B, 1)
            keys[sequence, :, positions] = k.transpose(1, 2)  # (B, T, K, D)
            values[sequence, :, positions] = v.transpose(1, 2)  # (B, T, K, D)
            k = keys  # attend to the whole cache
            v = values
        if x.is_cpu:
            y = attend_on_cpu(q, k, v, mask)  # (B, H, T, D), the same, faster
        else:
            if cache is None and (mask is not None or v.dtype == torch.float32):
                k = repeat_heads(k, q)  # (B, H, T, D); CUDA's fused kernels lack GQA for these
                v = repeat_heads(v, q)  # (B, H, T, D)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
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

        A token attends to itself and all tokens before it; with documents, (B, T), ids of texts, only to
        those of its own text. positions, (B, T), default to 0, 1, 2, …
        cache comes from `new_cache`. It needs positions: where the keys and values of the tokens are written,
        and how far each token sees; positions after it may hold nothing yet, or padding.
        """
        assert cache is None or (positions is not None and documents is None)
        if positions is None:
            cos = self.cos[: tokens.size(1)]  # (T, D)
            sin = self.sin[: tokens.size(1)]  # (T, D)
        else:
            cos = self.cos[positions][:, None]  # (B, 1, T, D)
            sin = self.sin[positions][:, None]  # (B, 1, T, D)
        mask = None  # causal
        if documents is not None:
            same_document = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
            mask = same_document.tril()[:, None]  # (B, 1, T, T)
        if cache is not None:
            first_keys, _ = cache[0]  # (B, K, S, D)
            cached = torch.arange(first_keys.size(2), device=tokens.device)  # (S,)
            mask = (cached <= positions[:, :, None])[:, None]  # (B, 1, T, S)
        x = self.embedding(tokens)  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            layer_cache = cache[layer] if cache is not None else None
            x = block(x, cos, sin, mask, layer_cache, positions)  # (B, T, C)
        return self.norm(x)  # (B, T, C)

    def forward(self, tokens, documents=None, positions=None, cache=None, last=None):
        """Logits of the next token, (B, T, V); with last, (B,), only at these positions, (B, 1, V)."""
        x = self.hidden(tokens, documents, positions, cache)  # (B, T, C)
        if last is not None:
            sequence = torch.arange(tokens.size(0), device=tokens.device)  # (B,)
            x = x[sequence, last][:, None]  # (B, 1, C)
        return F.linear(x, self.embedding.weight)  # (B, T, V)

    def loss(self, tokens, targets, documents=None, positions=None):
        """The cross entropy in nats: the sum, float32, over all targets, (B, T), that are not IGNORE.

        It equals F.cross_entropy of all logits with reduction="sum", without all logits in memory. A sum, so
        that the caller divides once, by all targets of a step: then each token weighs the same in whichever
        micro-batch it is.
        """
        x = self.hidden(tokens, documents, positions).flatten(0, 1)  # (B * T, C)
        targets = targets.flatten()  # (B * T,)
        weight = self.embedding.weight  # (V, C)
        if x.is_cpu and not torch.compiler.is_compiling():  # elsewhere it costs more than it saves
            counted = targets != IGNORE  # (B * T,)
            x = x[counted]  # (N, C)
            targets = targets[counted]  # (N,)
        if torch.is_autocast_enabled(x.device.type):  # it casts for PyTorch's own functions only
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            weight = weight.to(dtype)
        if torch.is_grad_enabled():
            return ChunkedCrossEntropy.apply(x, weight, targets)
        total = x.new_zeros((), dtype=torch.float32)
        for x_chunk, targets_chunk in split_into_chunks(x, targets):
            log_p = log_probabilities(x_chunk, weight)  # (R, V)
            total = total + sum_of_losses(log_p, targets_chunk)
        return total

    def new_cache(self, batch_size: int, length: int, dtype=torch.float32) -> list:
        """An empty KV cache of `length` positions: for each layer two tensors, (B, K, S, D)."""
        shape = (batch_size, self.config.n_kv_head, length, self.config.head_dim)
        device = self.embedding.weight.device
        cache = []
        for _ in self.blocks:
            keys = torch.zeros(shape, dtype=dtype, device=device)
            values = torch.zeros(shape, dtype=dtype, device=device)
            cache.append([keys, values])
        return cache

    def count_parameters(self) -> int:
        """The number of parameters; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())


# ---- The fast paths: attention on a CPU, and the loss without all logits in memory ------------------


def repeat_heads(kv, q):
    """Each key or value head, (B, K, S, D), once for every query head that shares it, (B, H, S, D)."""
    return kv.repeat_interleave(q.size(1) // kv.size(1), dim=1)


def attend_on_cpu(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v, where mask, (B, 1, T, S), is True; without a mask, causal.

    q: (B, H, T, D), k and v: (B, K, S, D). Returns (B, H, T, D).
    On a CPU the backward pass of `F.scaled_dot_product_attention` takes three times as long.
    Queries are taken in four blocks, each with the keys up to its end: less of the masked half is computed.
    """
    T = q.size(2)
    S = k.size(2)
    k = repeat_heads(k, q)  # (B, H, S, D)
    v = repeat_heads(v, q)  # (B, H, S, D)
    q = q * q.size(3) ** -0.5  # (B, H, T, D)
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()  # (T, T)
    outputs = []
    size = math.ceil(T / 4)
    with torch.autocast(q.device.type, enabled=False):  # it would store the probabilities in float32
        for start in range(0, T, size):
            end = start + size
            visible = end if S == T else S  # with a cache only the mask knows what is visible
            scores = q[:, :, start:end] @ k[:, :, :visible].mT  # (B, H, size, visible)
            scores = scores.masked_fill(~mask[..., start:end, :visible], -torch.inf)  # (B, H, size, visible)
            outputs.append(scores.softmax(dim=-1) @ v[:, :, :visible])  # (B, H, size, D)
    return torch.cat(outputs, dim=2)  # (B, H, T, D)


def split_into_chunks(x, targets):
    """Pairs of (R, C) and (R,): LOGITS_PER_CHUNK tokens of x, (N, C), and their targets."""
    size = LOGITS_PER_CHUNK[x.device.type]
    return zip(x.split(size), targets.split(size), strict=True)


def log_probabilities(x, weight):
    """log softmax(x weight^T), (R, V), in float32."""
    return F.linear(x, weight).float().log_softmax(dim=-1)


def sum_of_losses(log_p, targets):
    """The cross entropy of targets, (R,), that are not IGNORE."""
    return F.nll_loss(log_p, targets, ignore_index=IGNORE, reduction="sum")


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross entropy of x @ weight.T, (N, V), and targets, (N,).

    The logits would be the largest tensor of a training step. Their gradient is known as soon as they are:
    softmax minus one at the target. So forward turns each chunk of logits into gradients of x and weight, and
    drops it. `F.linear_cross_entropy` does so too, but returns the sum in the dtype of x: too coarse in
    bfloat16.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        total = x.new_zeros((), dtype=torch.float32)
        grads_x = []
        grad_weight = None
        if ctx.needs_input_grad[1]:  # with LoRA the embedding is frozen
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        vocabulary = torch.arange(weight.size(0), device=x.device)  # (V,)
        for x_chunk, targets_chunk in split_into_chunks(x, targets):
            log_p = log_probabilities(x_chunk, weight)  # (R, V)
            # Not in place: PyTorch 2.11 compiled that to gradients that are all 0.
            total = total + sum_of_losses(log_p, targets_chunk)
            one_hot = (vocabulary == targets_chunk[:, None]).float()  # (R, V)
            counted = (targets_chunk != IGNORE)[:, None]  # (R, 1)
            grad_logits = ((log_p.exp() - one_hot) * counted).to(x.dtype)  # (R, V)
            grads_x.append(grad_logits @ weight)  # (R, C)
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ x_chunk  # (V, C)
        ctx.save_for_backward(torch.cat(grads_x), grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_x, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = grad_weight * grad_output
        return grad_x * grad_output, grad_weight, None
