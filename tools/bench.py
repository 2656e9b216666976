"""Speed and memory of this program beside transformers, for models of the same size.

    python -m tools.bench                          everything
    python -m tools.bench train decode             parts of it: train, memory, decode
    python -m tools.bench --json bench.json

Each implementation is a process of its own. They take turns, so that a slow minute of the hardware affects all of
them, and the median of each counts. A baseline that is not installed, or finds no memory, is left out.
"""

import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tqdm import tqdm

from common.checkpoint import choose_device, choose_dtype, matmul_flops, try_compile
from common.files import Parser, UserError, atomic_write, report_errors
from model import GPT, ModelConfig
from sample import generate

LENGTH = 512  # tokens in a sequence
SMALL_VOCABULARY = 8_192
LARGE_VOCABULARY = 65_024
PROMPT_TOKENS = 16
NEW_TOKENS = 128

# ---- The parts -------------------------------------------------------------------------------------


def bench_train(rounds: int) -> list[dict]:
    """Steps of training, and the share of the measured speed of matrix products that ours reaches."""
    batch_size = 8
    device = choose_device("auto")
    dtype = choose_dtype("auto", device, show=True)  # each implementation makes the same choice
    rows = []
    for vocab_size in (SMALL_VOCABULARY, LARGE_VOCABULARY):
        implementations = {}
        for name in ("this", "transformers", "transformers' GPT-2"):
            implementations[name] = functools.partial(prepare_training, name, vocab_size, batch_size)
        speeds = {}
        for name, measured in benchmark(implementations, rounds).items():
            speeds[name] = batch_size * LENGTH / measured.seconds
        rows += compare(f"training, vocabulary {vocab_size:,}", "tokens a second", speeds)
        if vocab_size == SMALL_VOCABULARY:
            product_rates = [matmul_flops(device, dtype) for _ in range(5)]
            product_rate = max(product_rates)  # a busy moment only makes it lower
            flops_per_token = build_model("this", vocab_size).flops_per_token(LENGTH)
            share = speeds["this"] * flops_per_token / product_rate
            rows.append(print_row("matrix products", product_rate / 1e12, "TFLOP/s, measured"))
            rows.append(print_row("share of it in training, this", share, ""))
    return rows


def bench_memory(rounds: int) -> list[dict]:
    """Peak memory of training with a large vocabulary. One after the other: two at once might not fit."""
    batch_size = 32
    peaks = {}
    for name in ("this", "transformers"):
        prepare = functools.partial(prepare_training, name, LARGE_VOCABULARY, batch_size)
        for measured in benchmark({name: prepare}, rounds=1).values():
            peaks[name] = measured.peak_memory / 2**30
    return compare(f"peak memory, vocabulary {LARGE_VOCABULARY:,}, batch 32 x {LENGTH}", "GiB", peaks)


def bench_decode(rounds: int) -> list[dict]:
    """Generation after short prompts, greedy and sampled, one story and several at a time."""
    rows = []
    for batch_size, temperature in ((1, 0.0), (1, 0.8), (16, 0.8), (64, 0.8)):
        for dtype in (torch.float32, torch.bfloat16):
            options = {"batch_size": batch_size, "temperature": temperature, "dtype": dtype}
            implementations = {
                "this": functools.partial(prepare_generation, "this", **options),
                "this, --compile": functools.partial(prepare_generation, "this", compile=True, **options),
                "transformers": functools.partial(prepare_generation, "transformers", **options),
            }
            speeds = {}
            for name, measured in benchmark(implementations, rounds).items():
                speeds[name] = batch_size * NEW_TOKENS / measured.seconds
            title = f"generation, batch {batch_size}, temperature {temperature}, {dtype}"
            rows += compare(title, "tokens a second", speeds)
    return rows


# ---- Measuring -------------------------------------------------------------------------------------


@dataclass
class Measured:
    seconds: float  # the median of the rounds
    peak_memory: int  # bytes


def benchmark(implementations: dict[str, Callable], rounds: int) -> dict[str, Measured]:
    """Run each implementation once in each round, in turn. {name: function that returns what is to be timed}."""
    context = multiprocessing.get_context("spawn")
    processes = {}
    pipes = {}
    for name, prepare in tqdm(implementations.items(), desc="preparing", leave=False, disable=None):
        pipe, other_end = context.Pipe()
        process = context.Process(target=run_implementation, args=(prepare, other_end), daemon=True)
        process.start()
        other_end.close()
        try:
            problem = pipe.recv()
        except EOFError:
            problem = "ended by the system, probably for its memory"
        if not problem:
            processes[name] = process
            pipes[name] = pipe
        elif is_ours(name):
            raise UserError(f"{name}: {problem}")
        else:
            tqdm.write(f"{name}: {problem}; left out")

    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in tqdm(range(rounds), desc="measuring", unit="round", leave=False, disable=None):
        for name, pipe in pipes.items():
            pipe.send("run")
            seconds[name].append(pipe.recv())

    results = {}
    for name, pipe in pipes.items():
        pipe.send("end")
        results[name] = Measured(statistics.median(seconds[name]), pipe.recv())
        processes[name].join()
    return results


def run_implementation(prepare: Callable, pipe: Connection) -> None:
    """The process of one implementation. Sends its problem or "", then seconds for each "run", at last its memory."""
    torch.manual_seed(1)
    try:
        function = prepare()
        function()  # compiles, fills caches
    except (ImportError, RuntimeError, MemoryError) as e:  # PyTorch's error of no memory is a RuntimeError
        reason = str(e).partition("\n")[0]
        pipe.send(f"{type(e).__name__} {reason}")
        return
    pipe.send("")
    while pipe.recv() == "run":
        start = time.perf_counter()
        function()
        pipe.send(time.perf_counter() - start)
    pipe.send(peak_memory())


def peak_memory() -> int:
    """Bytes of memory that this process has taken at most, on the GPU if there is one; 0 where it is not known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    return peak * 1024


def is_ours(name: str) -> bool:
    return name.startswith("this")


def compare(name: str, unit: str, values: dict[str, float]) -> list[dict]:
    """A row for each implementation. Ours are compared with the best baseline, if one was measured."""
    baselines = {other: value for other, value in values.items() if not is_ours(other)}
    best = None
    if baselines and unit == "GiB":
        best = min(baselines, key=baselines.__getitem__)
    elif baselines:
        best = max(baselines, key=baselines.__getitem__)
    rows = []
    for implementation, value in values.items():
        if best and is_ours(implementation):
            rows.append(print_row(f"{name}, {implementation}", value, unit, best, value / baselines[best]))
        else:
            rows.append(print_row(f"{name}, {implementation}", value, unit))
    return rows


def print_row(name: str, value: float, unit: str, baseline: str = "", ratio: float | None = None) -> dict:
    """Print a line of the table. Returns it as --json has it."""
    number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    line = f"{name:64}{number:>12} {unit:24}"
    if baseline:
        line += f"  {ratio:.2f}x {baseline}"
    tqdm.write(line)
    return {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio}


# ---- The implementations ---------------------------------------------------------------------------


def prepare_training(name: str, vocab_size: int, batch_size: int) -> Callable:
    """A function that takes one step as a trainer would: forward, backward, AdamW."""
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    model = build_model(name, vocab_size).to(device)
    loss_fn = try_compile(mean_loss, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(vocab_size, (batch_size, LENGTH + 1), device=device)  # (B, T + 1)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_fn(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for a GPU

    return step


def prepare_generation(
    name: str, batch_size: int, temperature: float, dtype: torch.dtype, compile: bool = False
) -> Callable:
    """A function that continues random prompts by NEW_TOKENS tokens, with a KV cache."""
    device = choose_device("auto")
    model = build_model(name, SMALL_VOCABULARY).to(device, dtype).eval()
    prompts = torch.randint(1, SMALL_VOCABULARY - 1, (batch_size, PROMPT_TOKENS), device=device)  # (B, T)

    def continue_with_ours() -> None:
        no_end = -1  # no token: none of the sequences ends early
        options = {"temperature": temperature, "top_k": 50, "top_p": 1.0, "compile": compile}
        for _ in generate(model, prompts.tolist(), NEW_TOKENS, no_end, **options):
            pass

    def continue_with_transformers() -> None:
        options: dict = {"do_sample": False}
        if temperature:
            options = {"do_sample": True, "temperature": temperature, "top_k": 50}
        mask = torch.ones_like(prompts)
        model.generate(prompts, attention_mask=mask, max_new_tokens=NEW_TOKENS, eos_token_id=None, **options)

    if is_ours(name):
        return continue_with_ours
    return continue_with_transformers


def build_model(name: str, vocab_size: int):
    """An untrained model of 6 layers and 8 heads, 23.5 million parameters with the small vocabulary."""
    if name == "this":
        return GPT(
            ModelConfig(
                vocab_size=vocab_size,
                block_size=LENGTH,
                n_layer=6,
                n_head=8,
                n_kv_head=8,
                head_dim=64,
                n_embd=512,
                intermediate_size=1408,
            )
        )
    import transformers  # optional

    if name == "transformers":
        llama = transformers.LlamaConfig(
            vocab_size=vocab_size,
            max_position_embeddings=LENGTH,
            num_hidden_layers=6,
            num_attention_heads=8,
            hidden_size=512,
            intermediate_size=1408,
            tie_word_embeddings=True,
        )
        return transformers.LlamaForCausalLM(llama)
    gpt2 = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=LENGTH,
        n_layer=6,
        n_head=8,
        n_embd=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(gpt2)


def mean_loss(model, tokens: torch.Tensor) -> torch.Tensor:
    """The mean loss on tokens, (B, T + 1)."""
    inputs = tokens[:, :-1]  # (B, T)
    if isinstance(model, GPT):
        targets = tokens[:, 1:]  # (B, T)
        return model.loss(inputs, targets) / targets.numel()
    return model(inputs, labels=inputs).loss  # transformers moves the labels by one itself


PARTS = {"train": bench_train, "memory": bench_memory, "decode": bench_decode}


def main() -> None:
    parser = Parser(description="Measure this program beside transformers.", allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none: all")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each implementation")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    names = args.parts or list(PARTS)
    for name in names:
        if name not in PARTS:
            raise UserError(f"{name!r}: no part; the parts are {', '.join(PARTS)}")
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: must be at least 1")
    rows = []
    for name in names:
        rows += PARTS[name](args.rounds)
    if args.json:
        with atomic_write(args.json) as f:
            f.write(json.dumps(rows, indent=2).encode() + b"\n")


if __name__ == "__main__":
    report_errors(main)
