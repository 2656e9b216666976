"""How fast, how small, how soon: this program beside its peers, in one run.

    python -m tools.bench                          everything
    python -m tools.bench train decode             parts of it: train, memory, decode
    python -m tools.bench --json bench.json
    python -m tools.bench --estimate config/microstories.py --gpu 3090    what a config will cost (tools/estimate.py)

The peer is transformers, where it is installed. Each implementation is a process of its own. They take turns, so that a
slow minute of the hardware affects both, and the median of each counts.
"""

import functools
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.checkpoint import choose_device, choose_dtype, matmul_flops, try_compile
from common.files import Parser, UserError, atomic_write, report_errors
from model import GPT, ModelConfig
from sample import generate
from tools.estimate import GPUS, print_estimates
from train import Settings, configure_pytorch

resource: Any
try:
    import resource
except ImportError:  # Windows
    resource = None

SHAPE = dict[str, Any](n_layer=6, n_head=8, n_kv_head=8, head_dim=64, n_embd=512, intermediate_size=1408)
LENGTH = 512  # tokens in a sequence
SMALL, LARGE = 8_192, 65_024  # vocabularies
NEW_TOKENS = 128

# ---------------------------------------------------------------------------------------------------
# The implementations: functions that build a model and return (model, loss of it on tokens)


def ours(vocab_size: int):
    def loss_of(model, tokens):
        return model.loss(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()

    return GPT(ModelConfig(vocab_size=vocab_size, block_size=LENGTH, **SHAPE)), loss_of


def llama_of_transformers(vocab_size: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=SHAPE["n_embd"],
        intermediate_size=SHAPE["intermediate_size"],
        num_hidden_layers=SHAPE["n_layer"],
        num_attention_heads=SHAPE["n_head"],
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    # It moves the labels by one itself.
    return LlamaForCausalLM(config), lambda model, tokens: model(tokens[:, :-1], labels=tokens[:, :-1]).loss


def gpt2_of_transformers(vocab_size: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = {"n_embd": SHAPE["n_embd"], "n_layer": SHAPE["n_layer"], "n_head": SHAPE["n_head"]}
    no_dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=vocab_size, n_positions=LENGTH, **shape, **no_dropout)
    return GPT2LMHeadModel(config), lambda model, tokens: model(tokens[:, :-1], labels=tokens[:, :-1]).loss


def peak_memory(device: torch.device) -> int:
    """Peak memory so far, in bytes: of the GPU if there is one, else of the process; 0 where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0


def training_step(make, vocab_size: int, batch: int):
    """A function that takes one step: forward, backward, AdamW, as a trainer would."""
    if make is ours:
        configure_pytorch(Settings(deterministic=False))  # keeps freed memory, as in train.py
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    model, loss_of = make(vocab_size)
    model.to(device)
    loss_of = try_compile(functools.partial(loss_of, model), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(vocab_size, (batch, LENGTH + 1), device=device)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for a GPU

    return step


def generating(make, batch: int, temperature: float, dtype: torch.dtype, fast: bool = False):
    """A function that continues `batch` prompts of 16 tokens by NEW_TOKENS."""
    device = choose_device("auto")
    model, _ = make(SMALL)
    model = model.to(device, dtype).eval()
    prompts = torch.randint(1, SMALL - 1, (batch, 16), device=device)

    def by_us():
        steps = generate(model, prompts.tolist(), NEW_TOKENS, 0, temperature, top_k=50, top_p=1.0, compile=fast)
        n_tokens = len(list(steps))
        assert n_tokens == NEW_TOKENS, f"ended after {n_tokens}"

    def by_transformers():
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {"do_sample": False}
        mask = torch.ones_like(prompts)
        model.generate(prompts, attention_mask=mask, max_new_tokens=NEW_TOKENS, eos_token_id=None, **sampling)

    return by_us if make is ours else by_transformers


# ---- Benchmarking ----------------------------------------------------------------------------------


def implementation_process(pipe, prepare, args) -> None:
    """A process: builds what `prepare(*args)` gives, runs it once, then once for each message; sends the seconds."""
    torch.manual_seed(1)
    try:
        function = prepare(*args)
        function()
    except ImportError as e:
        return pipe.send(f"not installed ({e.name})")
    except (torch.OutOfMemoryError, MemoryError):
        return pipe.send("out of memory")
    pipe.send("")
    while pipe.recv():
        start = time.perf_counter()
        function()
        pipe.send(time.perf_counter() - start)
    pipe.send(peak_memory(choose_device("auto")))


def benchmark(implementations: dict[str, tuple], rounds: int) -> dict[str, tuple[float, int]]:
    """Seconds (the median over the rounds) and peak memory in bytes of each, {name: (prepare, *args)}."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    seconds: dict[str, list[float]] = {}
    bar = tqdm(implementations.items(), desc="preparing", unit="implementation", leave=False, disable=None)
    for name, (prepare, *args) in bar:
        bar.set_postfix_str(name)
        pipe, end = context.Pipe()
        processes.append(context.Process(target=implementation_process, args=(end, prepare, args), daemon=True))
        processes[-1].start()
        end.close()
        if reason := pipe.recv():
            if name.startswith("this"):
                raise UserError(f"{name}: {reason}")
            tqdm.write(f"{name}: {reason}; left out")
        else:
            pipes[name], seconds[name] = pipe, []
    for _ in tqdm(range(rounds), desc="benchmarking", unit="round", leave=False, disable=None):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    result = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        result[name] = (statistics.median(seconds[name]), pipe.recv())
    for process in processes:
        process.join()
    return result


def row(name, value, unit, peer="", ratio=None) -> dict:
    """One line of the table; printed as soon as it is known."""
    number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    tqdm.write(f"{name:64}{number:>12} {unit:24}" + (f"  {ratio:.2f}x {peer}" if peer else ""))
    return {"name": name, "value": value, "unit": unit, "peer": peer, "ratio": ratio}


def against_peers(name: str, unit: str, values: dict[str, float]) -> list[dict]:
    """A row for each implementation; ours are compared with the best peer, where one is installed."""
    peers = [found for found in values if not found.startswith("this")]
    best = (min if unit == "GiB" else max)(peers, key=values.__getitem__, default="")
    rows = []
    for implementation, value in values.items():
        peer = "" if implementation in peers else best
        rows.append(row(f"{name}, {implementation}", value, unit, peer, value / values[peer] if peer else None))
    return rows


# ---- The parts -------------------------------------------------------------------------------------


def bench_train(args) -> list[dict]:
    rows, batch = [], 8
    makers = {"this": ours, "transformers": llama_of_transformers, "transformers' GPT-2": gpt2_of_transformers}
    device = choose_device("auto")
    dtype = choose_dtype("auto", device, show=True)  # all sides train in it
    for vocab_size in (SMALL, LARGE):
        implementations = {name: (training_step, make, vocab_size, batch) for name, make in makers.items()}
        times = benchmark(implementations, args.rounds)
        rates = {name: batch * LENGTH / seconds for name, (seconds, _) in times.items()}
        rows += against_peers(f"training, vocabulary {vocab_size:,}", "tokens a second", rates)
        if vocab_size == SMALL:
            peak = max(matmul_flops(device, dtype) for _ in range(5))
            used = rates["this"] * ours(vocab_size)[0].flops_per_token(LENGTH) / peak
            rows += [row("matrix products", peak / 1e12, "TFLOP/s, measured"), row("MFU", used, "of that")]
    return rows


def bench_memory(args) -> list[dict]:
    """Peak memory of a step with a large vocabulary. One after the other: both at once might not fit."""
    peaks: dict[str, float] = {}
    for name, make in (("this", ours), ("transformers", llama_of_transformers)):
        peaks |= {n: peak / 2**30 for n, (_, peak) in benchmark({name: (training_step, make, LARGE, 32)}, 1).items()}
    return against_peers(f"peak memory, vocabulary {LARGE:,}, batch 32 x {LENGTH}", "GiB", peaks)


def bench_decode(args) -> list[dict]:
    rows = []
    for batch, temperature in ((1, 0.0), (1, 0.8), (16, 0.8), (64, 0.8)):
        for dtype in (torch.float32, torch.bfloat16):
            implementations = {
                "this": (generating, ours, batch, temperature, dtype),
                "this, --compile": (generating, ours, batch, temperature, dtype, True),
                "transformers": (generating, llama_of_transformers, batch, temperature, dtype),
            }
            times = benchmark(implementations, args.rounds)
            rates = {name: batch * NEW_TOKENS / seconds for name, (seconds, _) in times.items()}
            kind = f"{'sampled' if temperature else 'greedy'}, {str(dtype).removeprefix('torch.')}"
            rows += against_peers(f"generation, batch {batch}, {kind}", "tokens a second", rates)
    return rows


PARTS = {"train": bench_train, "memory": bench_memory, "decode": bench_decode}


def main() -> None:
    parser = Parser(description="Measure this program beside its peers.", allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none: all")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each implementation")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--estimate", type=Path, nargs="+", metavar="CONFIG", help="estimate these and measure nothing")
    parser.add_argument("--gpu", default="3090", help=f"for --estimate: {', '.join(GPUS)}")
    parser.add_argument("--vocab_size", type=int, default=8192, help="for --estimate, where the data is not prepared")
    parser.add_argument("--sequences", type=int, default=2_000_000, help="for --estimate: of an epoch, likewise")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        raise UserError(f"{unknown.pop()!r}: no part; the parts are {', '.join(PARTS)}")
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: must be at least 1")
    if args.estimate:
        rows = print_estimates(args.estimate, args.gpu, args.vocab_size, args.sequences)
    else:
        rows = [line for name in args.parts or PARTS for line in PARTS[name](args)]
    if args.json:
        with atomic_write(args.json) as f:
            f.write(json.dumps(rows, indent=2).encode() + b"\n")


if __name__ == "__main__":
    report_errors(main)
