"""The model against independent references: transformers' Llama and Qwen3, and counts by hand."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.checkpoint import build_model
from model import GPT, IGNORE, ChunkedCrossEntropy, ModelConfig, attend_on_cpu
from sample import draw_noise, generate, prefill, sample_token
from sft import add_lora
from tools.estimate import flops_per_token

SHAPE = {
    "vocab_size": 97,
    "block_size": 40,
    "n_layer": 3,
    "n_head": 6,
    "n_kv_head": 2,
    "head_dim": 10,
    "n_embd": 36,
}
SHAPE |= {"intermediate_size": 44, "rope_theta": 5000.0}


def small(**changes):
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SHAPE | changes))
    for p in model.parameters():  # gains other than 1, weights large enough to matter
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.15)
    return model


def as_transformers(ours):
    """The same weights in the model of transformers that computes the same."""
    transformers = pytest.importorskip("transformers")
    c = ours.config
    kind = "Qwen3" if c.qk_norm else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim, max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, rope_theta=c.rope_theta,
        tie_word_embeddings=True, attention_bias=False,
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    state = {}
    for name, weight in ours.state_dict().items():
        for a, b in (("blocks.", "model.layers."), ("attention_norm", "input_layernorm"), ("attention.", "self_attn."),
                     ("mlp_norm", "post_attention_layernorm")):  # fmt: skip
            name = name.replace(a, b) if name not in names else name
        state[names.get(name, name)] = weight
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs


@pytest.mark.parametrize("qk_norm", [False, True])
def test_logits_equal_transformers(qk_norm):
    ours = small(qk_norm=qk_norm)
    tokens = torch.randint(0, ours.config.vocab_size, (3, ours.config.block_size))
    torch.testing.assert_close(ours(tokens), as_transformers(ours)(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("T", "S", "kind"), [(1, 1, None), (7, 7, None), (30, 30, "texts"), (1, 9, "cache"), (6, 9, "cache")]
)
def test_attention_equals_a_slow_loop_in_float64(T, S, kind):
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, 3, n, 8).requires_grad_() for n in (T, S, S))
    mask = None
    if kind == "texts":
        texts = torch.tensor([[0] * 4 + [1] * 20 + [2] * 6, [0] * 29 + [1]])
        mask = (texts[:, :, None] == texts[:, None]).tril()[:, None]
    elif kind == "cache":
        mask = torch.arange(S) <= torch.tensor([3, 5])[:, None, None, None] + torch.arange(T)[:, None]
    upstream = torch.randn(2, 3, T, 8)
    got = attend_on_cpu(q, k, v, mask)
    grads = torch.autograd.grad(got, (q, k, v), upstream)
    ref = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = torch.zeros(2, 3, T, 8, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for t in range(T):
                seen = [s for s in range(S) if (s <= t if mask is None else mask[b, 0, t, s])]
                weights = torch.stack([(ref[0][b, h, t] @ ref[1][b, h, s] / 8**0.5).exp() for s in seen])
                expected[b, h, t] = sum(
                    w / weights.sum() * ref[2][b, h, s] for w, s in zip(weights, seen, strict=True)
                )
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)
    for a, b in zip(grads, torch.autograd.grad(expected, ref, upstream.double()), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_counts_by_hand():
    model = small()
    embedding = 97 * 36
    layer = 36 * 60 + 2 * 36 * 20 + 60 * 36 + 3 * 36 * 44  # q, k and v, o, SwiGLU
    gains = 3 * (2 * 36 + 2 * 10) + 36
    assert model.count_parameters() == embedding + 3 * layer + gains
    # Per token: 2 operations a weight forward, 4 backward; queries and values each meet 40 / 2 positions.
    assert flops_per_token(model, 40) == 6 * (embedding + 3 * layer) + 3 * 3 * 2 * 2 * 20 * 60


def test_initial_scale():
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SHAPE | {"n_embd": 256, "intermediate_size": 512}))
    assert abs(model.blocks[0].mlp.up_proj.weight.std() - 0.02) < 5e-4
    assert abs(model.blocks[0].mlp.down_proj.weight.std() - 0.02 / 6**0.5) < 2e-4


def test_loss_and_gradients_equal_float64_reference():
    torch.manual_seed(0)
    x, weight = torch.randn(5000, 16), torch.randn(211, 16)  # more rows than one chunk
    targets = torch.randint(0, 211, (5000,))
    targets[::3] = IGNORE
    ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = ChunkedCrossEntropy.apply(*ours, targets) * 0.5
    loss.backward()
    ref = [x.double().requires_grad_(), weight.double().requires_grad_()]
    log_p = torch.log(torch.exp(ref[0] @ ref[1].T) / torch.exp(ref[0] @ ref[1].T).sum(1, keepdim=True))
    expected = -sum(log_p[i, t] for i, t in enumerate(targets.tolist()) if t != IGNORE) * 0.5
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for a, b in zip(ours, ref, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_compiled_gradients_equal_the_plain_ones():
    """In PyTorch 2.11 a sum made in place inside an autograd.Function, compiled, silently made them all 0."""
    ours, compiled = small(n_layer=1), small(n_layer=1)
    tokens, targets = torch.randint(0, 97, (2, 30, 40))  # more rows than one chunk
    losses = ours.loss(tokens, targets), torch.compile(compiled.loss, backend="aot_eager")(tokens, targets)
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for a, b in zip(compiled.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max().item())


def test_summed_loss_and_its_gradients():
    """Beside the library's in float64; what IGNORE leaves out stays out."""
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(1500, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, 50, (1500,), generator=generator)
    targets[::7] = IGNORE
    ours, theirs = (
        [t.clone().to(dtype).requires_grad_() for t in (x, weight)] for dtype in (torch.float32, torch.double)
    )
    loss = ChunkedCrossEntropy.apply(*ours, targets)
    expected = F.cross_entropy(theirs[0] @ theirs[1].T, targets, ignore_index=IGNORE, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


def test_loss_is_float32_under_autocast():
    model, (tokens, targets) = small(), torch.randint(0, 97, (2, 100, 40))
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    for train in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
            loss = model.loss(tokens, targets)
        assert loss.dtype == torch.float32
        assert abs(loss - expected) / expected < 5e-3


class Watch(TorchDispatchMode):
    """Notes the size of the largest tensor made inside, and how many matrix products there were."""

    largest, products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.largest = max(self.largest, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_loss_never_holds_all_the_logits():
    """The largest tensor made on the way is far below N x V."""
    n, v = 8192, 1000
    x, weight = torch.randn(n, 8, requires_grad=True), torch.randn(v, 8, requires_grad=True)
    with Watch() as watch:
        ChunkedCrossEntropy.apply(x, weight, torch.randint(0, v, (n,))).backward()
    assert watch.largest <= n * v / 4


def test_loss_without_gradients_computes_none():
    """The same loss as with them and as F.cross_entropy, for one matrix product a chunk instead of three."""
    model, (tokens, targets) = small(), torch.randint(0, 97, (2, 60, 40))
    targets[:, ::3] = IGNORE
    logits = model(tokens).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    losses, products = [], []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), Watch() as watch:
            losses.append(model.loss(tokens, targets))
        products.append(watch.products)
    assert losses[0].requires_grad and not losses[1].requires_grad
    assert losses[1].dtype == torch.float32 and losses[1].shape == ()
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[1], expected)
    assert products[0] - products[1] == 2 * 2  # two chunks: the 1,560 rows that have a target
    assert model.loss(tokens, torch.full_like(targets, IGNORE)).item() == 0
    with torch.no_grad():
        assert model.loss(tokens, torch.full_like(targets, IGNORE)).item() == 0


def test_a_cache_with_documents_is_refused():
    """A cache has its own mask, which would silently replace that of the documents."""
    model, tokens = small(), torch.zeros(1, 4, dtype=torch.long)
    cache, positions = model.new_cache(1, 8), torch.arange(4)[None]
    model(tokens, positions=positions, cache=cache)
    for wrong in ({"documents": tokens, "positions": positions}, {}):
        with pytest.raises(AssertionError):
            model(tokens, cache=cache, **wrong)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cached_logits_equal_uncached(qk_norm):
    model = small(qk_norm=qk_norm)
    tokens = torch.randint(0, 97, (3, 30))
    expected = model(tokens)
    cache = model.new_cache(3, 35)
    # Rows of different lengths: prefill 5 (filled up), 9 and 12 tokens, then one at a time.
    lengths = torch.tensor([5, 9, 12])
    positions = torch.arange(12).expand(3, 12)
    filled = tokens[:, :12].clone()
    filled[0, 5:], filled[1, 9:] = 1, 1
    first = model(filled, positions=positions, cache=cache)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(first[row, n - 1], expected[row, n - 1], atol=1e-5, rtol=1e-5)
    for step in range(15):
        at = lengths + step
        one = model(tokens[torch.arange(3), at][:, None], positions=at[:, None], cache=cache)
        torch.testing.assert_close(one[:, 0], expected[torch.arange(3), at], atol=1e-5, rtol=1e-5)


def test_greedy_generation_equals_a_loop_without_cache():
    model = small()
    prompts = [[3, 4, 5], [7], [8, 9, 10, 11, 12]]
    made = torch.stack(list(generate(model, prompts, 20, end_token=0, temperature=0))).T.tolist()
    for prompt, row in zip(prompts, made, strict=True):
        tokens = list(prompt)
        for token in row:
            if 0 in tokens[len(prompt) :]:
                assert token == 0  # ended rows stay ended
                continue
            assert token == model(torch.tensor([tokens]))[0, -1].argmax().item()
            tokens.append(token)


def sampled_to_the_end(model, prompts, count, end, temperature, seed):
    """What `generate` gives, computed for every sequence at every step without a cache."""
    texts, generator = [list(prompt) for prompt in prompts], torch.Generator().manual_seed(seed)
    ended, steps = [False] * len(texts), []
    for _ in range(count):
        logits = torch.stack([model(torch.tensor([text]))[0, -1] for text in texts])
        noise = draw_noise(len(texts), 50, logits.size(1), generator) if temperature else None
        tokens = sample_token(logits, None, temperature, 0.95, 1.0, noise).tolist()
        tokens = [end if done else token for token, done in zip(tokens, ended, strict=True)]
        steps.append(tokens)
        ended = [token == end for token in tokens]
        if all(ended):
            break
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
    return steps


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_ended_sequences_change_nothing(temperature):
    """Those that have ended are computed no more; the others, of a seed, stay what they were."""
    model = small()
    prompts, widths = [[3, 4, 5], [7], [8, 9, 10, 11, 12], *([i, i + 1] for i in range(20, 30))], []
    free = torch.stack(list(generate(model, prompts, 25, 0, temperature)))
    end = (
        free.flatten().bincount()[1:].argmax().item() + 1
    )  # a frequent token as the end: some sequences end early
    model.register_forward_pre_hook(lambda module, args: widths.append(args[0].size(0)))
    for seed in range(2):
        made = [step.tolist() for step in generate(model, prompts, 25, end, temperature, top_k=50, seed=seed)]
        assert made == sampled_to_the_end(model, prompts, 25, end, temperature, seed)
    assert min(widths) < len(prompts) / 2


def test_sampling_follows_the_distribution():
    """Frequencies of many draws against top-k, top-p and temperature worked out in plain Python."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -3.0])
    temperature, top_k, top_p, n = 0.7, 4, 0.9, 200_000
    weights = [torch.exp(v / temperature).item() for v in logits[:top_k]]
    share, kept = 0.0, []
    for w in weights:
        if share >= top_p:
            break
        kept.append(w)
        share += w / sum(weights)
    expected = [w / sum(kept) for w in kept] + [0.0] * (len(logits) - len(kept))
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(n, 6, dtype=torch.bool)
    noise = draw_noise(n, top_k, 6, generator)
    drawn = sample_token(logits.expand(n, 6), seen, temperature, top_p, 1.0, noise)
    found = torch.bincount(drawn, minlength=6) / n
    torch.testing.assert_close(found, torch.tensor(expected), atol=0.005, rtol=0)
    assert found[len(kept) :].sum() == 0


def test_repetition_penalty():
    logits, seen = torch.tensor([[2.0, 1.9, -1.0, -1.1]]), torch.tensor([[True, False, True, False]])
    assert sample_token(logits, seen, 0, 1.0, 1.3, None).item() == 1  # 2.0 / 1.3 < 1.9
    assert sample_token(logits[:, 2:], seen[:, 2:], 0, 1.0, 1.3, None).item() == 1  # -1.0 * 1.3 < -1.1


@pytest.fixture
def fake_cuda(tmp_path):
    """FakeTensorMode knows CUDA tensors, but a PyTorch built without CUDA has no guard to switch devices.

    Four lines of C++ register one that does nothing.
    """
    if not torch.backends.cuda.is_built():
        if not shutil.which("c++"):
            pytest.skip("no C++ compiler to stand in for CUDA")
        folder, home = tmp_path, Path(torch.__file__).parent
        (folder / "guard.cpp").write_text(
            "#include <c10/core/impl/DeviceGuardImplInterface.h>\n"
            "namespace c10::impl { using Guard = NoOpDeviceGuardImpl<DeviceType::CUDA>;\n"
            "C10_REGISTER_GUARD_IMPL(CUDA, Guard) }\n"
        )
        command = [
            "c++",
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{home}/include",
            f"-L{home}/lib",
            "guard.cpp",
            "-lc10",
        ]
        subprocess.run([*command, "-o", "guard.so"], cwd=folder, check=True)
        torch.ops.load_library(folder / "guard.so")
    with FakeTensorMode():
        yield


def test_every_tensor_is_made_on_the_models_device(fake_cuda):
    """Loss, cache and sampling on fake CUDA tensors: one made on the CPU would raise."""
    with torch.device("cuda:0"):
        model = GPT(ModelConfig(**SHAPE))
    tokens = torch.zeros(2, 8, dtype=torch.long, device="cuda:0")
    assert model(tokens).device.type == "cuda"
    assert model.loss(tokens, tokens).device.type == "cuda"  # makes the gradients of the output matrix too
    logits, last, seen, cache = prefill(model, [[1, 2, 3], [4]], 16)
    noise = torch.ones(2, 50, device="cuda:0")
    token = sample_token(logits, seen, 0.8, 0.95, 1.1, noise)
    logits = model(token[:, None], positions=last[:, None] + 1, cache=cache)
    assert token.device.type == logits.device.type == "cuda"
    add_lora(model, 2, 4.0)
    assert model.loss(tokens, tokens).device.type == "cuda"
    with torch.no_grad():
        assert model.loss(tokens, tokens).device.type == "cuda"


def test_bad_shapes_are_refused():
    for wrong in ({"n_kv_head": 4}, {"head_dim": 7}, {"rope_theta": 0}, {"block_size": 1 << 21}):
        with pytest.raises(ValueError):
            ModelConfig(**SHAPE | wrong)


def test_build_model_restores(tmp_path):
    model = small()
    again = build_model({"model": model.state_dict(), "model_config": vars(model.config)}, tmp_path)
    tokens = torch.randint(0, 97, (1, 8))
    assert torch.equal(model(tokens), again(tokens))


def test_a_cache_that_grows_tells_the_same():
    """As without a cache: of 150 tokens, which it grows for twice, each is the likeliest after those before
    it.
    """
    model, tokens = small(block_size=256), [3, 4, 5]
    told = [token.item() for token in generate(model, [tokens], 150, end_token=0, temperature=0)]
    for token in told:
        assert token == model(torch.tensor([tokens]))[0, -1].argmax()
        tokens = [*tokens, token]
    assert len(set(told)) > 5, told  # not one word again and again


def test_compiled_decoding_tells_the_same():
    model = small(block_size=256)
    prompts = [[3, 4, 5], [7]]
    for options in ({"temperature": 0}, {"temperature": 0.8, "top_k": 20, "seed": 3}):
        options |= {"max_new_tokens": 150, "end_token": 0}  # the cache grows twice
        for rows in (prompts, prompts[:1]):
            eager, compiled = (
                torch.stack(list(generate(model, rows, compile=c, **options))) for c in (False, True)
            )
            assert torch.equal(eager, compiled) and len(eager) == 150


def test_compiled_decoding_is_compiled_once():
    """Prompts and stories of other lengths ask for no other program, though the cache grows."""
    torch._dynamo.reset()  # what the tests before it compiled would do for any size
    model, graphs = small(block_size=256), []
    for length, new in ((2, 24), (3, 40), (9, 60), (30, 200), (100, 5), (130, 100)):
        told = list(generate(model, [[7] * length], new, end_token=96, temperature=0, compile=True))
        assert len(told) == new
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1], graphs


def test_bfloat16_is_near():
    model = small()
    tokens = torch.randint(0, 97, (2, 20))
    exact = model(tokens)
    cache = model.bfloat16().new_cache(2, 20, torch.bfloat16)
    near = model(tokens, positions=torch.arange(20).expand(2, 20), cache=cache)
    assert near.dtype == torch.bfloat16
    assert (near - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_frozen_embedding_costs_no_gradient():
    """With LoRA it is frozen: the loss computes the gradient of the hidden states alone, and that stays right."""
    model = small()
    tokens = torch.randint(1, model.config.vocab_size, (2, 9))
    targets = torch.randint(1, model.config.vocab_size, (2, 9))
    model.loss(tokens, targets).backward()
    expected = model.norm.weight.grad.clone()
    model.zero_grad()
    model.embedding.requires_grad_(False)
    loss = model.loss(tokens, targets)
    _, grad_weight = loss.grad_fn.saved_tensors
    assert grad_weight is None
    loss.backward()
    torch.testing.assert_close(model.norm.weight.grad, expected)
