"""How fast, how small, how soon: this program beside its peers, in one run.

    python -m tools.bench                          everything
    python -m tools.bench train decode             parts of it: train, memory, decode, prepare, recipe
    python -m tools.bench --json bench.json
    python -m tools.bench recipe --stories FILE    the recipe on other stories than the embedded ones
    python -m tools.bench --estimate config/microstories.py --gpu 3090    what a config will cost (tools/estimate.py)

The peers are transformers and litgpt, where they are installed, and two classic recipes written out below.
Each implementation is a process of its own; they take turns, so that a slow minute of the hardware affects all, and
the median of each counts.
"""

import contextlib
import functools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common.device import choose_device, compile_model, keep_freed_memory, matmul_flops, peak_memory
from common.files import atomic_write
from common.settings import Parser, UserError, run
from model import GPT, ModelConfig
from sample import generate
from stories.generate import stories
from tools.estimate import GPUS, print_estimates

SHAPE = dict[str, Any](n_layer=6, n_head=8, n_kv_head=8, head_dim=64, n_embd=512, intermediate_size=1408)
LENGTH = 512  # tokens in a sequence
SMALL, LARGE = 8_192, 65_024  # vocabularies
NEW_TOKENS = 128
TOKENS_A_STEP = 16 * 256  # of config/demo.py, by which the recipe is measured

# ---------------------------------------------------------------------------------------------------
# The implementations: functions that build a model and return (model, loss of it on tokens)


def our_model(vocab_size: int) -> GPT:
    return GPT(ModelConfig(vocab_size=vocab_size, block_size=LENGTH, **SHAPE))


def ours(vocab_size: int):
    return our_model(vocab_size), lambda model, tokens: model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()


def full_logits(vocab_size: int):
    """Our model with the textbook's loss: all logits in float32, then their cross entropy."""
    cross_entropy = torch.compiler.disable(F.cross_entropy)  # compiled with the rest, the logits would stay bfloat16

    def loss(model, tokens):
        return cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())

    return our_model(vocab_size), loss


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


def llama_of_litgpt(vocab_size: int):
    from litgpt import GPT as LitGPT
    from litgpt import Config

    config = Config(
        name="bench",
        block_size=LENGTH,
        padded_vocab_size=vocab_size,
        n_layer=SHAPE["n_layer"],
        n_head=SHAPE["n_head"],
        n_embd=SHAPE["n_embd"],
        intermediate_size=SHAPE["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = LitGPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    return model, lambda m, tokens: F.cross_entropy(m(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class ClassicBlock(nn.Module):
    """GPT-2's layer: LayerNorm, biases, GELU."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv, self.out = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.out(y.transpose(1, 2).flatten(2))  # (B, T, C)
        return x + self.mlp(self.norm2(x))  # (B, T, C)


class ClassicGPT(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, the output matrix tied to the embedding, full logits."""

    def __init__(self, vocab_size: int):
        super().__init__()
        n_embd = SHAPE["n_embd"]
        self.tokens, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(LENGTH, n_embd)
        self.blocks = nn.Sequential(*(ClassicBlock(n_embd, SHAPE["n_head"]) for _ in range(SHAPE["n_layer"])))
        self.norm = nn.LayerNorm(n_embd)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.size(1)]  # (B, T, C)
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)  # (B, T, V)


def classic_gpt2(vocab_size: int):
    def loss(model, tokens):
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return ClassicGPT(vocab_size), loss


def training_step(make, vocab_size: int, batch: int):
    """A function that takes one step: forward, backward, AdamW, as a trainer would."""
    if make is ours:
        keep_freed_memory()  # train.py does so
    device, dtype = choose_device("auto")
    model, loss_of = make(vocab_size)
    model.to(device)
    loss_of = compile_model(functools.partial(loss_of, model), device)
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
    device, _ = choose_device("auto")
    model, _ = make(SMALL)
    model = model.to(device, dtype).eval()
    prompts = torch.randint(1, SMALL - 1, (batch, 16), device=device)

    def by_us():
        steps = generate(model, prompts.tolist(), NEW_TOKENS, 0, temperature, top_k=50, top_p=1.0, compile=fast)
        n_tokens = len(list(steps))
        assert n_tokens == NEW_TOKENS, f"ended after {n_tokens}"

    def by_transformers():
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {"do_sample": False}
        tokens = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW_TOKENS, eos_token_id=None, **sampling
        )
        assert tokens.size(1) == 16 + NEW_TOKENS

    @torch.inference_mode()
    def without_cache():
        tokens = prompts
        for _ in range(NEW_TOKENS):
            tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
        tokens[0, -1].item()  # waits for a GPU

    return {ours: by_us, llama_of_transformers: by_transformers, classic_gpt2: without_cache}[make]


# ---------------------------------------------------------------------------------------------------
# Benchmarking


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
    pipe.send(peak_memory(choose_device("auto")[0]))


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


def row(name, value, unit, peer="", ratio=None, bar=None, holds=None) -> dict:
    """One line of the table; printed as soon as it is known."""
    number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    beside = f"  {ratio:.2f}x {peer}" if ratio is not None else ""
    verdict = "" if bar is None else f"  (bar {bar:g}: {'holds' if holds else 'does not hold'})"
    tqdm.write(f"{name:64}{number:>12} {unit:24}{beside}{verdict}")
    return {"name": name, "value": value, "unit": unit, "peer": peer, "ratio": ratio, "bar": bar, "holds": holds}


def against_peers(name: str, unit: str, rates: dict[str, float], bar: float) -> list[dict]:
    """A row for each implementation; "this" is compared with the fastest of the others."""
    peers = {peer: rate for peer, rate in rates.items() if peer != "this"}
    rows = [row(f"{name}, {peer}", rate, unit) for peer, rate in peers.items()]
    best = max(peers, key=lambda peer: peers[peer])
    ratio = rates["this"] / peers[best]
    return [*rows, row(name, rates["this"], unit, best, ratio, bar, ratio >= bar)]


# ---------------------------------------------------------------------------------------------------
# The parts


def bench_train(args, folder: Path) -> list[dict]:
    rows, batch = [], 8
    makers = {"transformers": llama_of_transformers, "litgpt": llama_of_litgpt, "classic GPT-2": classic_gpt2}
    for vocab_size, bar in ((SMALL, 1.25), (LARGE, 1.5)):
        implementations = {
            name: (training_step, make, vocab_size, batch) for name, make in {"this": ours, **makers}.items()
        }
        times = benchmark(implementations, args.rounds)
        rates = {name: batch * LENGTH / seconds for name, (seconds, _) in times.items()}
        rows += against_peers(f"training, vocabulary {vocab_size:,}", "tokens a second", rates, bar)
        if vocab_size == SMALL:
            device, dtype = choose_device("auto")
            peak = max(matmul_flops(device, dtype) for _ in range(5))
            used = rates["this"] * our_model(vocab_size).flops_per_token(LENGTH) / peak
            rows += [
                row("matrix products", peak / 1e12, "TFLOP/s"),
                row("MFU", used, "of that", bar=0.45, holds=used >= 0.45),
            ]
    for _ in range(2):  # the first fills the compiler's cache
        seconds = time_to_first_step(folder / "first")
    return [*rows, row("python train.py to its first step, cached", seconds, "seconds", bar=10, holds=seconds <= 10)]


def time_to_first_step(out_dir: Path) -> float:
    prepare_demo()
    start, metrics = time.perf_counter(), out_dir / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    options = ["--max_iters=1", "--log_interval=1", "--eval_blocks=1", "--sample_interval=0", "--save_interval=1000"]
    command = [sys.executable, "train.py", "config/demo.py", f"--out_dir={out_dir}", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.wait():
        raise UserError(f"{' '.join(command)}: failed")
    for checkpoint in out_dir.glob("*.pt"):
        checkpoint.unlink()
    return seconds


def bench_memory(args, folder: Path) -> list[dict]:
    """Peak memory of a step with a large vocabulary. One after the other: both at once might not fit."""
    peaks: dict[str, float] = {}
    peer = "full float32 logits"
    for name, make in (("this", ours), (peer, full_logits)):
        peaks |= {n: peak / 2**30 for n, (_, peak) in benchmark({name: (training_step, make, LARGE, 32)}, 1).items()}
    title = f"peak memory, vocabulary {LARGE:,}, batch 32 x {LENGTH}"
    if peer not in peaks:
        return [row(title, peaks["this"], "GiB")]
    rows, ratio = [row(f"{title}, {peer}", peaks[peer], "GiB")], peaks["this"] / peaks[peer]
    return [*rows, row(title, peaks["this"], "GiB", peer, ratio, 0.4, ratio <= 0.4)]


def bench_decode(args, folder: Path) -> list[dict]:
    numbers = torch.randn(1 << 28, device=choose_device("auto")[0])  # 1 GiB
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum().item()
        best = min(best, time.perf_counter() - start)
    reading = numbers.numel() * 4 / best
    rows = [row("reading memory", reading / 1e9, "GB/s")]
    del numbers
    size = our_model(SMALL).count_parameters() * 4
    for batch, temperature in ((1, 0.0), (1, 0.8), (16, 0.8), (64, 0.8)):
        setting = (batch, temperature)
        implementations = {
            "this": (generating, ours, *setting, torch.float32),
            "this, --compile": (generating, ours, *setting, torch.float32, True),
            "transformers": (generating, llama_of_transformers, *setting, torch.float32),
        }
        if temperature == 0:
            implementations["classic GPT-2 without a cache"] = (generating, classic_gpt2, *setting, torch.float32)
        else:
            implementations["this, --compile --dtype bfloat16"] = (generating, ours, *setting, torch.bfloat16, True)
            implementations["transformers, bfloat16"] = (generating, llama_of_transformers, *setting, torch.bfloat16)
        times = benchmark(implementations, args.rounds)
        rates = {name: batch * NEW_TOKENS / seconds for name, (seconds, _) in times.items()}
        title = f"generation, batch {batch}, {'sampled' if temperature else 'greedy'}"
        for name, rate in rates.items():
            peer = "transformers, bfloat16" if "bfloat16" in name else "transformers"
            if not name.startswith("this") or peer not in rates:
                rows.append(row(f"{title}, {name}", rate, "tokens a second"))
                continue
            ratio, bar = rate / rates[peer], 3 if "--compile" in name else None
            rows.append(row(f"{title}, {name}", rate, "tokens a second", peer, ratio, bar, bar and ratio >= bar))
        if batch == 1:
            share = rates["this, --compile"] * size / reading
            rows.append(row(f"{title}, --compile: of the memory limit", share, "", bar=0.6, holds=share >= 0.6))
    return rows


def write_stories(path: Path, size: int) -> int:
    """Distinct stories until the file has `size` bytes, each as a line with story_zh. Returns the characters."""
    characters, texts = 0, [story["story_zh"] for story in stories(24_000)]
    with open(path, "w", encoding="utf-8") as f:
        number = 0
        while f.tell() < size:
            for text in texts:
                half = text.index("。") + 1
                changed = f"{text[:half]}那是第{number}天。{text[half:]}"
                characters += len(changed)
                f.write(json.dumps({"story_zh": changed}, ensure_ascii=False) + "\n")
                number += 1
    return characters


def memory_of_all(process: subprocess.Popen) -> int:
    """The most bytes that a process and its children held at once (proportional set size), as it ran; on Linux."""
    most = 0
    while process.poll() is None:
        parents, family, total = {}, {process.pid}, 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        while children := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= children
        for pid in family:
            with contextlib.suppress(OSError, IndexError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += int(rollup.split("\nPss:")[1].split()[0]) * 1024
        most = max(most, total)
        time.sleep(0.05)
    return most


def bench_prepare(args, folder: Path) -> list[dict]:
    prepare_demo()
    rows, peaks, command = [], [], [sys.executable, "prepare.py", "--tokenizer", "data/demo/tokenizer.model"]
    for megabytes in args.megabytes:
        characters = write_stories(folder / "stories.jsonl", megabytes * 1_000_000)
        times = []
        for i in range(3 if megabytes <= 200 else 1):
            start = time.perf_counter()
            paths = [f"{folder}/stories.jsonl", "--out_dir", f"{folder}/prepared{megabytes}_{i}"]
            process = subprocess.Popen([*command, *paths], stdout=subprocess.DEVNULL)
            peak = memory_of_all(process)
            if process.wait():
                raise UserError(f"{' '.join([*command, *paths])}: failed")
            times.append(time.perf_counter() - start)
        speed = characters / statistics.median(times) / 1e6
        title = f"prepare, {megabytes:,} MB"
        rows.append(row(title, speed, "M characters a second", bar=8, holds=speed >= 8))
        peaks.append(peak / 2**30)
        rows.append(row(f"{title}, memory of all processes", peaks[-1], "GiB", "the first", peaks[-1] / peaks[0]))
    if args.megabytes[0] <= 200 and (theirs := speed_of_tokenizers()):
        rows.append(row("encoding alone, the tokenizers package", theirs, "M characters a second"))
    return rows


def speed_of_tokenizers() -> float | None:
    """M characters a second of Hugging Face's BPE on all cores, the text in memory already."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        return None
    texts = [story["story_zh"] for story in stories(24_000)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Punctuation()  # without it each story is one long word
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=SMALL, show_progress=False))
    start = time.perf_counter()
    tokenizer.encode_batch(texts)
    return sum(map(len, texts)) / (time.perf_counter() - start) / 1e6


def bench_recipe(args, folder: Path) -> list[dict]:
    """How few of its tokens our recipe needs to end where another ends. Each run has its own full schedule."""
    data = "data/demo"
    if args.stories:
        data = str(folder / "data")
        options = ["--out_dir", data, "--vocab_size", "4096", "--val_fraction", "0.05"]
        subprocess.run([sys.executable, "prepare.py", *map(str, args.stories), *options], check=True)
    else:
        prepare_demo()

    @functools.cache
    def ends_on(share: float, *options: str) -> float:
        """The validation loss of a run with this share of the steps."""
        out_dir = folder / f"recipe_{share}_{len(list(folder.iterdir()))}"
        steps = round(args.steps * share)
        command = [sys.executable, "train.py", "config/demo.py", f"--data_dir={data}", f"--out_dir={out_dir}"]
        command += [f"--max_iters={steps}", "--eval_interval=100000", "--sample_interval=0", "--save_interval=100000"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        lines = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
        loss = [line["val_loss"] for line in lines if "val_loss" in line][-1]
        tqdm.write(f"  {steps} steps, {' '.join(options) or 'ours'}: validation loss {loss:.3f}")
        return loss

    adamw = ["--optimizer=adamw", "--weight_decay=0.1", "--beta2=0.95", "--schedule=cosine"]
    adamw += [f"--warmup_iters={args.steps // 10}"]
    rates = ("0.0005", "0.003", "0.01")
    losses = {rate: ends_on(1.0, *adamw, f"--learning_rate={rate}") for rate in rates}
    best, rows = min(losses, key=lambda rate: losses[rate]), []
    for rate, bar in ((rates[0], 0.2), (best, 0.4)):
        shares = (share for share in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0) if ends_on(share) <= losses[rate])
        share = next(shares, 1.0)  # or not even then, which no bar allows
        title = f"tokens to AdamW's validation loss, {Path(data).name}"
        rows.append(row(title, share * args.steps * TOKENS_A_STEP, "tokens", f"AdamW {rate}", share, bar, share <= bar))
    return rows


def prepare_demo() -> None:
    """data/demo, which several parts use."""
    if not Path("data/demo/meta.json").exists():
        subprocess.run([sys.executable, "prepare.py"], check=True, stdout=subprocess.DEVNULL)


PARTS = {
    "train": bench_train,
    "memory": bench_memory,
    "decode": bench_decode,
    "prepare": bench_prepare,
    "recipe": bench_recipe,
}


def main() -> None:
    parser = Parser(description="Measure this program beside its peers.", allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none: all")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each implementation")
    parser.add_argument("--steps", type=int, default=200, help="steps of the runs that the recipe is compared with")
    parser.add_argument("--stories", type=Path, nargs="+", help="story files for the recipe in place of the corpus")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 400], help="sizes of prepare's input")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--estimate", type=Path, nargs="+", metavar="CONFIG", help="estimate these and measure nothing")
    parser.add_argument("--gpu", default="3090", help=f"for --estimate: {', '.join(GPUS)}")
    parser.add_argument("--vocab_size", type=int, default=8192, help="for --estimate, where the data is not prepared")
    parser.add_argument("--sequences", type=int, default=2_000_000, help="for --estimate: of an epoch, likewise")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        raise UserError(f"{unknown.pop()!r}: no part; the parts are {', '.join(PARTS)}")
    if args.rounds < 1 or args.steps < 20 or min(args.megabytes) < 1:
        raise UserError("--rounds and --megabytes must be at least 1, --steps at least 20")
    rows = []
    if args.estimate:
        rows = print_estimates(args.estimate, args.gpu, args.vocab_size, args.sequences)
        if args.json:
            with atomic_write(args.json) as f:
                f.write(json.dumps(rows, indent=2).encode() + b"\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts or PARTS:
            rows += PARTS[name](args, Path(folder))
            if args.json:
                with atomic_write(args.json) as f:
                    f.write(json.dumps(rows, indent=2, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    run(main)
