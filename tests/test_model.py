"""The model: it computes what Llama and Qwen3 compute, and its fast paths compute what the slow ones do.

Its promises, in the order of this file:

    the whole       logits and gradients of transformers; parameters counted by hand; how weights begin
    attention       that of a slow loop in float64; the texts of a batch do not mix
    decoding        a KV cache, batches and compiling tell what the whole sequence tells
    the loss        that of all logits, without all of them in memory

tests/test_cuda.py repeats the main ones on a GPU.
"""

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import as_transformers, small_model

import model as model_py
from model import GPT, IGNORE, ChunkedCrossEntropy, attend_on_cpu
from sample import generate, sample_token
from tools.estimate import flops_per_token


def random_tokens(*shape):
    return torch.randint(0, 97, shape)


def assert_near(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours.double(), theirs.double(), atol=tolerance, rtol=tolerance)


def some_targets(*shape):
    targets = random_tokens(*shape)
    targets[..., ::3] = IGNORE
    return targets


def all_logits_loss(logits, targets):
    logits = logits.flatten(0, -2)
    targets = targets.flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


# ---- The whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_logits_and_gradients_equal_those_of_transformers(qk_norm):
    ours = small_model(qk_norm=qk_norm, norm_eps=0.01)
    theirs = as_transformers(ours)
    tokens = random_tokens(3, 40)
    targets = random_tokens(3, 40)
    logits = theirs(tokens).logits
    assert_near(ours(tokens), logits, 1e-4)
    ours.loss(tokens, targets).backward()
    all_logits_loss(logits, targets).backward()
    our_weight = ours.blocks[0].attention.k_proj.weight
    their_weight = theirs.model.layers[0].self_attn.k_proj.weight
    assert_near(our_weight.grad, their_weight.grad, 1e-3)


def test_parameters_and_operations_are_those_counted_by_hand():
    model = small_model()
    embedding = 97 * 36
    queries = 36 * 60
    keys = 36 * 20
    swiglu = 3 * 36 * 44
    layer = 2 * queries + 2 * keys + swiglu  # o is as large as q, v as k
    gains = 3 * (2 * 36 + 2 * 10) + 36
    assert model.count_parameters() == embedding + 3 * layer + gains
    # Per token: 2 operations a weight forward, 4 backward; queries and values each meet 40 / 2 positions.
    weights = embedding + 3 * layer
    attention = 3 * 60 * 20 * 2
    assert flops_per_token(model, 40) == 6 * weights + 6 * attention


def test_weights_begin_small_and_smaller_where_they_add_to_the_residual_stream():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(small_model().config, n_embd=256))
    block = model.blocks[0]
    for linear in (model.embedding, block.attention.q_proj, block.mlp.up_proj):
        std = linear.weight.std().item()
        assert std == pytest.approx(0.02, rel=0.05)
    for linear in (block.attention.o_proj, block.mlp.down_proj):
        std = linear.weight.std().item()
        assert std == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert model.norm.weight.eq(1).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_kv_head": 4},
        {"head_dim": 7},
        {"rope_theta": 0},
        {"block_size": 0},
        {"block_size": 2**20 + 1},
    ],
)
def test_shapes_that_cannot_be_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        small_model(**wrong)


def test_bfloat16_is_near():
    model = small_model()
    tokens = random_tokens(2, 20)
    exact = model(tokens)
    near = model.bfloat16()(tokens)
    assert near.dtype == torch.bfloat16
    assert (near - exact).abs().max() < 0.05 * exact.abs().max()


# ---- Attention -------------------------------------------------------------------------------------


def slow_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v where mask, (B, 1, T, S), is True: one query after another."""
    B, H, T, D = q.shape
    queries_per_key = H // k.size(1)
    outputs = []
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        visible = mask[b, 0, t]
        keys = k[b, h // queries_per_key, visible]
        values = v[b, h // queries_per_key, visible]
        weights = (keys @ q[b, h, t] / D**0.5).exp()
        outputs.append(weights @ values / weights.sum())
    return torch.stack(outputs).view(B, H, T, D)


def mask_of(kind, T, S):
    """(2, 1, T, S): what a token sees in a text, in one of several texts, or after those in a cache."""
    if kind == "texts":
        texts = torch.zeros(2, T)
        texts[0, 4:24] = 1
        texts[1, 29:] = 1
        same_text = texts[:, :, None] == texts[:, None]
        return same_text.tril()[:, None]
    first = torch.zeros(2, 1)
    if kind == "cache":
        first = torch.tensor([[1], [3]])
    position = first + torch.arange(T)  # (2, T)
    return (torch.arange(S) <= position[:, :, None])[:, None]


@pytest.mark.parametrize(
    ("T", "S", "kind"),
    [
        (1, 1, "causal"),
        (7, 7, "causal"),
        (30, 30, "texts"),
        (1, 9, "cache"),
        (6, 9, "cache"),
    ],
)
def test_attention_equals_a_slow_loop_in_float64(T, S, kind):
    torch.manual_seed(T)
    q = torch.randn(2, 4, T, 8, requires_grad=True)
    k = torch.randn(2, 2, S, 8, requires_grad=True)
    v = torch.randn(2, 2, S, 8, requires_grad=True)
    ours = [q, k, v]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    mask = mask_of(kind, T, S)
    given_mask = mask
    if kind == "causal":
        given_mask = None
    output = attend_on_cpu(*ours, given_mask)
    expected = slow_attention(*theirs, mask)
    assert_near(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    for our, their in zip(ours, theirs, strict=True):
        assert_near(our.grad, their.grad)


class Elsewhere(torch.Tensor):
    """A tensor that says it is not on a CPU."""

    is_cpu = False


@pytest.mark.parametrize("kind", ["causal", "texts", "cache"])
def test_attention_of_other_devices_equals_that_of_a_cpu(kind):
    model = small_model()
    attention = model.blocks[0].attention
    x = torch.randn(2, 30, 36)
    results = []
    for kind_of_tensor in (torch.Tensor, Elsewhere):
        options = {}
        if kind == "texts":
            options["mask"] = mask_of("texts", 30, 30)
        if kind == "cache":
            options["mask"] = mask_of("causal", 30, 34)
            options["positions"] = torch.arange(30).expand(2, 30)
            options["cache"] = model.new_cache(2, 34)[0]
        y = attention(x.as_subclass(kind_of_tensor), model.cos[:30], model.sin[:30], **options)
        results.append(y.as_subclass(torch.Tensor))
    assert_near(*results)


def test_a_text_is_read_as_if_it_were_alone():
    """With `documents`, and with positions that begin anew or go on."""
    model = small_model()
    tokens = random_tokens(1, 12)
    targets = random_tokens(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    first = model(tokens[:, :5])
    second = model(tokens[:, 5:])
    alone = torch.cat((first, second), dim=1)
    assert_near(model(tokens, documents), alone)
    assert_near(model(tokens, documents, positions), alone)
    loss = model.loss(tokens, targets, documents, positions)
    assert_near(loss, all_logits_loss(alone, targets))


# ---- Decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_cache_tells_what_the_whole_sequence_tells(qk_norm):
    """Prompts of 5, 9 and 12 tokens, padded to 12; then one token at a time, which overwrites the padding."""
    model = small_model(qk_norm=qk_norm)
    tokens = random_tokens(3, 30)
    expected = model(tokens)
    row = torch.arange(3)
    length = torch.tensor([5, 9, 12])
    padded = tokens[:, :12].clone()
    padded[0, 5:] = 1
    padded[1, 9:] = 1
    cache = model.new_cache(3, 35)
    positions = torch.arange(12).expand(3, 12)
    logits = model(padded, positions=positions, cache=cache, last=length - 1)
    assert_near(logits[:, 0], expected[row, length - 1])
    for _ in range(15):
        token = tokens[row, length][:, None]
        logits = model(token, positions=length[:, None], cache=cache)
        assert_near(logits[:, 0], expected[row, length])
        length += 1


def test_a_cache_with_documents_or_without_positions_is_refused():
    """It has a mask of its own, which would silently replace that of the documents."""
    model = small_model()
    tokens = random_tokens(1, 4)
    cache = model.new_cache(1, 8)
    with pytest.raises(AssertionError):
        model(tokens, cache=cache)
    with pytest.raises(AssertionError):
        model(tokens, tokens, positions=tokens, cache=cache)


def test_a_batch_tells_what_each_sequence_tells_alone():
    """Prompts of several lengths, a repetition penalty, a cache that grows twice; the last sequence ends."""
    model = small_model(block_size=256)
    prompts = [[3, 4, 5], [7], [8, 9, 10, 11, 12]]
    steps = list(generate(model, prompts, 140, end_token=20, temperature=0, repetition_penalty=1.2))
    assert steps[139].eq(20).tolist() == [False, False, True]
    for prompt, told in zip(prompts, torch.stack(steps).T.tolist(), strict=True):
        text = list(prompt)
        for token in told:
            logits = model(torch.tensor([text]))[:, -1]
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[0, text] = True
            assert token == sample_token(logits, seen, 0, 1.0, 1.2, None).item()
            text.append(token)
            if token == 20:
                break


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("prompts", [[[3, 4, 5], [7]], [[3, 4, 5]]])
def test_compiled_decoding_tells_the_same(prompts, temperature):
    model = small_model(block_size=256)
    options = {"max_new_tokens": 150, "end_token": 0, "temperature": temperature}  # the cache grows twice
    plain = list(generate(model, prompts, **options))
    compiled = list(generate(model, prompts, **options, compile=True))
    assert torch.equal(torch.stack(plain), torch.stack(compiled))
    assert len(plain) == 150


@pytest.mark.long
def test_compiled_decoding_is_compiled_once():
    """Prompts and stories of other lengths ask for no other program, though the cache grows."""
    torch.compiler.reset()
    model = small_model(block_size=256)
    decode = functools.partial(generate, model, end_token=96, temperature=0, compile=True)
    list(decode([[7] * 2], 24))
    with torch.compiler.set_stance("fail_on_recompile"):
        for length, new in ((3, 40), (9, 60), (30, 200), (100, 5), (130, 100)):
            steps = list(decode([[7] * length], new))
            assert len(steps) == new


# ---- The loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_and_its_gradients_equal_those_of_all_logits_in_float64(frozen):
    """Also with a frozen embedding, as under LoRA, whose gradient is not even computed."""
    torch.manual_seed(0)
    x = torch.randn(2500, 16, requires_grad=True)  # two whole chunks and a part
    weight = torch.randn(97, 16, requires_grad=not frozen)
    targets = some_targets(2500)
    loss = ChunkedCrossEntropy.apply(x, weight, targets)
    x64 = x.detach().double().requires_grad_()
    weight64 = weight.detach().double().requires_grad_()
    expected = all_logits_loss(x64 @ weight64.T, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    _, grad_weight = loss.grad_fn.saved_tensors
    assert (grad_weight is None) == frozen
    (loss * 0.5).backward()
    (expected * 0.5).backward()
    assert_near(x.grad, x64.grad)
    if not frozen:
        assert_near(weight.grad, weight64.grad, 1e-4)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_loss_is_that_of_the_targets_that_count(gradients, monkeypatch):
    """Without gradients none are computed."""
    model = small_model()
    tokens = random_tokens(60, 40)
    targets = some_targets(60, 40)
    expected = all_logits_loss(model(tokens), targets)
    if not gradients:
        monkeypatch.setattr(ChunkedCrossEntropy, "apply", None)
    with torch.set_grad_enabled(gradients):
        loss = model.loss(tokens, targets)
        nothing = model.loss(tokens, torch.full_like(targets, IGNORE))
        with torch.autocast("cpu", torch.bfloat16):
            near = model.loss(tokens, targets)
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad == gradients
    assert nothing.item() == 0
    assert near.dtype == torch.float32
    assert near.item() == pytest.approx(expected.item(), rel=5e-3)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_logits_of_one_chunk_are_in_memory_at_a_time(gradients, monkeypatch):
    sizes = []
    log_probabilities = model_py.log_probabilities

    def noted(x, weight):
        sizes.append(len(x))
        return log_probabilities(x, weight)

    monkeypatch.setattr(model_py, "log_probabilities", noted)
    with torch.set_grad_enabled(gradients):
        small_model().loss(random_tokens(60, 40), random_tokens(60, 40))
    assert sizes == [1024, 1024, 352]


def test_every_tensor_is_made_on_the_device_of_the_model():
    """One that is made without naming a device would be on the default one, here another."""
    model = small_model()
    tokens = random_tokens(2, 8)
    targets = some_targets(2, 8)

    def results():
        loss = model.loss(tokens, targets, documents=tokens)
        with torch.no_grad():
            same_loss = model.loss(tokens, targets, documents=tokens)
        steps = generate(model, [[1, 2, 3], [4]], 9, end_token=0, repetition_penalty=1.1)
        return [loss, same_loss, *steps]

    expected = results()
    with torch.device("meta"):
        found = results()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.long
def test_compiled_gradients_equal_the_plain_ones():
    """In PyTorch 2.11 a sum made in place inside an autograd.Function, compiled, silently made them all 0."""
    plain = small_model(n_layer=1)
    compiled = small_model(n_layer=1)
    tokens = random_tokens(30, 40)  # more than one chunk
    targets = random_tokens(30, 40)
    expected = plain.loss(tokens, targets)
    loss = torch.compile(compiled.loss, backend="aot_eager")(tokens, targets)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    loss.backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        largest = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * largest)
