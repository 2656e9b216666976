"""Speed and memory of this program beside transformers, for models of the same size.

    python -m tools.bench                          everything
    python -m tools.bench train decode             parts of it: train, memory, decode
    python -m tools.bench --json bench.json

Each implementation is a process of its own. They take turns, so that a slow minute of the hardware affects
all of them, and the median of each counts. A baseline that is not installed, or finds no memory, is left out.
"""

import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from common.checkpoint import choose_device, choose_dtype, matmul_flops, try_compile
from common.files import Parser, UserError, atomic_write, report_errors
from model import GPT, ModelConfig
from sample import generate
from tools.estimate import flops_per_token

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
    dtype = choose_dtype("auto", device, show=True)  # one choice for all implementations
    rows = []
    for vocab_size in (SMALL_VOCABULARY, LARGE_VOCABULARY):
        implementations: dict[str, Callable] = {}
        for name in ("this", "transformers", "transformers' GPT-2"):
            implementations[name] = functools.partial(prepare_training, name, vocab_size, batch_size, dtype)
        seconds, _ = benchmark(implementations, rounds)
        speeds = {name: batch_size * LENGTH / seconds[name] for name in seconds}
        rows += compare(f"training, vocabulary {vocab_size:,}", "tokens a second", speeds)
        if vocab_size == SMALL_VOCABULARY:
            size = 8192 if device.type == "cuda" else 512
            product_rates = [matmul_flops(device, dtype, size) for _ in range(5)]
            product_rate = max(product_rates)  # a busy moment only makes it lower
            flops = flops_per_token(build_model("this", vocab_size), LENGTH)
            share = speeds["this"] * flops / product_rate
            rows += compare("matrix products", "TFLOP/s, measured", {"this": product_rate / 1e12})
            rows += compare("share of it in training", "", {"this": share})
    return rows


def bench_memory(rounds: int) -> list[dict]:
    """Peak memory of training with a large vocabulary. One after the other: two at once might not fit."""
    batch_size = 32
    dtype = choose_dtype("auto", choose_device("auto"))
    gigabytes: dict[str, float] = {}
    for name in ("this", "transformers"):
        prepare = functools.partial(prepare_training, name, LARGE_VOCABULARY, batch_size, dtype)
        _, peaks = benchmark({name: prepare}, rounds=1)
        if name in peaks:
            gigabytes[name] = peaks[name] / 2**30
    title = f"peak memory, vocabulary {LARGE_VOCABULARY:,}, batch {batch_size} x {LENGTH}"
    return compare(title, "GiB", gigabytes, best=min)


def bench_decode(rounds: int) -> list[dict]:
    """Generation after short prompts, greedy and sampled, one story and several at a time."""
    rows = []
    for batch_size, temperature in ((1, 0.0), (1, 0.8), (16, 0.8), (64, 0.8)):
        for dtype in (torch.float32, torch.bfloat16):
            kind = (batch_size, temperature, dtype)
            implementations: dict[str, Callable] = {
                "this": functools.partial(prepare_generation, "this", kind),
                "this, --compile": functools.partial(prepare_generation, "this", kind, compile=True),
                "transformers": functools.partial(prepare_generation, "transformers", kind),
            }
            seconds, _ = benchmark(implementations, rounds)
            speeds = {name: batch_size * NEW_TOKENS / seconds[name] for name in seconds}
            title = f"generation, batch {batch_size}, temperature {temperature}, {dtype}"
            rows += compare(title, "tokens a second", speeds)
    return rows


# ---- Measuring -------------------------------------------------------------------------------------


def benchmark(implementations: dict[str, Callable], rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """Run each implementation once in each round, in turn.

    implementations: for each name a function that prepares it and returns the function to be timed.
    Returns for each name its seconds, the median of the rounds, and its peak memory in bytes.
    """
    # All processes keep freed memory, as a training does (common/run.py): glibc reads this when they start.
    os.environ["MALLOC_MMAP_MAX_"] = "0"
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "-1"
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, prepare in tqdm(implementations.items(), desc="preparing", leave=False, disable=None):
        worker = ProcessPoolExecutor(max_workers=1, mp_context=context)
        try:
            worker.submit(start, prepare).result()
            workers[name] = worker
        except (ImportError, MemoryError, RuntimeError) as e:  # no memory is a RuntimeError in PyTorch
            worker.shutdown()
            if is_ours(name):
                raise
            tqdm.write(f"{name}: {type(e).__name__} {e}; left out")

    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in tqdm(range(rounds), desc="measuring", unit="round", leave=False, disable=None):
        for name, worker in workers.items():
            times[name].append(worker.submit(timed_run).result())

    seconds = {}
    peaks = {}
    for name, worker in workers.items():
        seconds[name] = statistics.median(times[name])
        peaks[name] = worker.submit(peak_memory).result()
        worker.shutdown()
    return seconds, peaks


prepared: Callable  # what is timed; each process has its own


def start(prepare: Callable) -> None:
    """Prepare an implementation in its process and run it once, which compiles it and fills caches."""
    global prepared
    torch.manual_seed(1)
    prepared = prepare()
    prepared()


def timed_run() -> float:
    """Seconds that the implementation of this process takes."""
    begin = time.perf_counter()
    prepared()
    return time.perf_counter() - begin


def peak_memory() -> int:
    """The most bytes this process has held, on the GPU if there is one; 0 where that is not known."""
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


def compare(title: str, unit: str, values: dict[str, float], best=max) -> list[dict]:
    """A row for each implementation. Ours have their ratio to the best baseline, if one was measured."""
    baselines = [name for name in values if not is_ours(name)]
    rows = []
    for name, value in values.items():
        row = {"name": f"{title}, {name}", "value": value, "unit": unit}
        if baselines and is_ours(name):
            baseline = best(baselines, key=values.__getitem__)
            row["baseline"] = baseline
            row["ratio"] = value / values[baseline]
        print_row(row)
        rows.append(row)
    return rows


def print_row(row: dict) -> None:
    number = f"{row['value']:.3g}"
    if row["value"] >= 100:
        number = f"{row['value']:,.0f}"
    line = f"{row['name']:64}{number:>12} {row['unit']:24}"
    if "ratio" in row:
        line += f"  {row['ratio']:.2f}x {row['baseline']}"
    tqdm.write(line)


# ---- The implementations ---------------------------------------------------------------------------


def prepare_training(name: str, vocab_size: int, batch_size: int, dtype: torch.dtype) -> Callable:
    """A function that takes one step as a trainer would: forward, backward, AdamW."""
    device = choose_device("auto")
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


def prepare_generation(name: str, kind: tuple[int, float, torch.dtype], compile: bool = False) -> Callable:
    """A function that continues random prompts by NEW_TOKENS tokens, with a KV cache.

    kind: how many prompts, the temperature, the type of the weights.
    """
    batch_size, temperature, dtype = kind
    device = choose_device("auto")
    model = build_model(name, SMALL_VOCABULARY).to(device, dtype).eval()
    prompts = torch.randint(1, SMALL_VOCABULARY - 1, (batch_size, PROMPT_TOKENS), device=device)  # (B, T)

    def continue_with_ours() -> None:
        no_end = -1  # no token: none of the sequences ends early
        options: dict = {"temperature": temperature, "top_k": 50, "top_p": 1.0, "compile": compile}
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
