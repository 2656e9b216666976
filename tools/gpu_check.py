"""What only a GPU shows, in about 12 minutes: one JSON file and a table. See runs/gpu_check.sh.

    python -m tools.gpu_check
    python -m tools.gpu_check --only train,decode
    python -m tools.gpu_check --device=cpu --quick       the same with a tiny model, to try the script itself

A check that fails is recorded with its error, and the others go on. The process may use 24 GB of GPU memory and no
more, so that what runs here runs on an RTX 3090.
"""

import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.checkpoint import build_model, read_checkpoint
from common.device import choose_device, compile_model, estimate_memory, matmul_flops
from common.files import atomic_write
from common.settings import Parser, UserError, load_settings, run
from model import GPT, ModelConfig
from sample import generate
from tools.plot import read_metrics
from train import Settings, make_optimizers

CARD = 24e9  # bytes of an RTX 3090
FOLDER = Path("out/gpu_check")
TINY = ["--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=64", "--intermediate_size=128", "--block_size=64"]
TINY += ["--batch_size=2", "--gradient_accumulation_steps=1"]


class Check:
    """The settings of all checks."""

    def __init__(self, args):
        self.quick, self.device = args.quick, choose_device(args.device)[0]
        self.s = load_settings(["config/microstories.py", *(TINY if args.quick else [])], Settings, "")
        self.flops = {d: matmul_flops(self.device, d) for d in (torch.bfloat16, torch.float16)}

    def model(self, batch_size: int | None = None):
        """A new model of the config's shape, and a random batch."""
        s = self.s
        names = ("n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "intermediate_size", "block_size", "qk_norm")
        model = GPT(ModelConfig(vocab_size=8192, **{name: getattr(s, name) for name in names})).to(self.device)
        tokens = torch.randint(8192, (batch_size or s.batch_size, s.block_size + 1), device=self.device)
        return model, tokens

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def steps(check: Check, dtype: torch.dtype, compiled: bool, batch_size: int, n: int) -> dict:
    """n training steps of one micro-batch each: median tokens/s, MFU, and peak memory beside the estimate."""
    if check.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, tokens = check.model(batch_size)
    call = compile_model(model, check.device) if compiled else model
    optimizers, seconds = make_optimizers(model, check.s), []
    scaler = torch.amp.GradScaler(check.device.type, enabled=dtype == torch.float16)
    for _ in range(n):
        check.synchronize()
        start = time.perf_counter()
        with torch.autocast(check.device.type, dtype):
            loss = call(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-3
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        check.synchronize()
        seconds.append(time.perf_counter() - start)
    speed = tokens[:, 1:].numel() / statistics.median(seconds[n // 2 :])
    check.s.batch_size, size = batch_size, check.s.batch_size
    expected = estimate_memory(model, check.s, dtype, check.device)
    check.s.batch_size = size
    peak = torch.cuda.max_memory_allocated() if check.device.type == "cuda" else 0
    mfu = speed * model.flops_per_token(check.s.block_size) / check.flops[dtype]
    return {"tokens_per_second": speed, "mfu": mfu, "peak_memory": peak, "estimated_memory": expected}


# ---------------------------------------------------------------------------------------------------
# The checks: each returns {name: number or text}


def check_tests(check: Check) -> dict:
    """The CUDA tests. Without a device they are skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "tests/test_cuda.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode not in (0, 5):
        raise RuntimeError(done.stdout.strip().splitlines()[-1])
    return {"tests": done.stdout.strip().splitlines()[-1].strip("= ")}


def check_train(check: Check) -> dict:
    """Tokens/s and MFU of microstories.py, compiled and not, in bfloat16; compiled in float16."""
    found = dict[str, float]()
    n = 4 if check.quick else 24
    kinds = [("eager", torch.bfloat16, False), ("compiled", torch.bfloat16, True)]
    if check.device.type == "cuda":
        kinds.append(("compiled float16", torch.float16, True))
    for name, dtype, compiled in kinds:
        found |= {f"{name} {key}": value for key, value in steps(check, dtype, compiled, check.s.batch_size, n).items()}
    return found


def check_memory(check: Check) -> dict:
    """Peak memory beside the estimate at growing batch sizes, as far as a card of 24 GB goes."""
    found: dict = {}
    for batch_size in (2, 4) if check.quick else (16, 32, 64, 96, 128, 160):
        try:
            one = steps(check, torch.bfloat16, False, batch_size, 3)
        except torch.OutOfMemoryError:
            return found | {f"batch {batch_size}": "does not fit into 24 GB"}
        found[f"batch {batch_size} peak_memory"] = one["peak_memory"]
        found[f"batch {batch_size} estimated_memory"] = one["estimated_memory"]
    return found


def check_peer(check: Check) -> dict:
    """transformers' Llama of a similar shape in the same minutes, compiled, as tools.bench trains it."""
    if not importlib.util.find_spec("transformers"):
        return {"transformers": "not installed"}
    from tools import bench

    found = dict[str, float]()
    for name, make in (("this program", bench.ours), ("transformers", bench.llama_of_transformers)):
        model, loss = make(bench.SMALL)
        model, call = model.to(check.device), torch.compile(loss)
        batch, length, n = (1, 32, 3) if check.quick else (32, bench.LENGTH, 20)
        tokens = torch.randint(bench.SMALL, (batch, length + 1), device=check.device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        seconds = []
        for _ in range(n):
            check.synchronize()
            start = time.perf_counter()
            with torch.autocast(check.device.type, torch.bfloat16):
                value = call(model, tokens)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            check.synchronize()
            seconds.append(time.perf_counter() - start)
        found[f"{name} tokens_per_second"] = batch * length / statistics.median(seconds[n // 2 :])
    return found | {"ratio": found["this program tokens_per_second"] / found["transformers tokens_per_second"]}


def script(check: Check, *command: str, kill_at: Path | None = None) -> None:
    """Run a script; with kill_at kill it (-9) as soon as that file is there. Raises RuntimeError with its error."""
    device = check.device.type
    options = [] if command[0] in ("prepare.py", "-m") else [f"--device={device}", "--compile=False"]
    process = subprocess.Popen([sys.executable, *command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while kill_at and process.poll() is None:
        if kill_at.exists():
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.02)
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(error.decode(errors="replace").strip().splitlines()[-1])


def check_pipeline(check: Check) -> dict:
    """200 steps of train.py on the demo's stories, killed (-9) at a checkpoint and resumed; 50 of sft.py and dpo.py."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    data, n = FOLDER / "data", 20 if check.quick else 200
    stories = FOLDER / "stories.jsonl"
    script(check, "-m", "stories.generate", "--out", str(stories), "--count", "1000" if check.quick else "20000")
    script(check, "prepare.py", str(stories), "--out_dir", str(data), "--val_fraction", "0.05")
    tokenizer = ["--task", "sft", "--tokenizer", str(data / "tokenizer.model"), "--val_fraction", "0.05"]
    script(check, "prepare.py", str(stories), "--out_dir", f"{data}_sft", *tokenizer)
    loop = ["--log_interval=5", "--eval_interval=1000", "--sample_interval=0", f"--save_interval={n // 4}"]
    tune = ["--gradient_accumulation_steps=1", f"--max_iters={n // 4}", "--epochs=0"]
    tune += ["--batch_size=2", "--block_size=256"] if check.quick else []
    shape = [*TINY, "--block_size=256"] if check.quick else ["--gradient_accumulation_steps=1"]
    pretrain = [
        "train.py",
        "config/microstories.py",
        f"--data_dir={data}",
        f"--out_dir={FOLDER}/run",
        "--warmup_iters=10",
    ]
    pretrain += [f"--max_iters={n}", *shape, *loop]
    script(check, *pretrain, kill_at=FOLDER / "run" / f"ckpt_{n // 2:06d}.pt")
    killed = read_metrics(FOLDER / "run" / "metrics.jsonl")[-1]["step"]
    script(check, *pretrain, "--resume=True")
    sft = ["sft.py", "config/microstories_sft.py", f"--init_from={FOLDER}/run", f"--data_dir={data}_sft"]
    script(check, *sft, f"--out_dir={FOLDER}/run_sft", *tune, *loop)
    dpo = ["dpo.py", "config/microstories_dpo.py", f"--init_from={FOLDER}/run_sft", f"--data_dir={data}_sft"]
    few = [f"--instructions={n}", "--samples=2", "--reference_chosen=True"]
    script(check, *dpo, f"--out_dir={FOLDER}/run_dpo", *tune, *loop, *few)
    found: dict = {"killed at step": killed}
    for name in ("run", "run_sft", "run_dpo"):
        losses = [line["loss"] for line in read_metrics(FOLDER / name / "metrics.jsonl") if "loss" in line]
        found |= {f"{name} first loss": losses[0], f"{name} last loss": losses[-1]}
    if not found["run last loss"] < found["run first loss"]:
        raise RuntimeError(f"the loss did not fall: {found}")
    return found


@torch.inference_mode()
def check_decode(check: Check) -> dict:
    """Tokens/s of generation at batch 1, 16 and 64, compiled, in bfloat16, with a prompt of 16 tokens."""
    model, _ = check.model(1)
    model, found, new = model.to(torch.bfloat16).eval(), {}, 8 if check.quick else 200
    for batch in (1, 4) if check.quick else (1, 16, 64):
        for compiled in (False, True):
            seconds = []
            for seed in range(3):  # the first one compiles
                check.synchronize()
                start = time.perf_counter()
                n = sum(
                    1 for _ in generate(model, [[5] * 16] * batch, new, end_token=8191, seed=seed, compile=compiled)
                )
                check.synchronize()
                seconds.append((time.perf_counter() - start) / n)
            found[f"batch {batch}{' compiled' if compiled else ''} tokens_per_second"] = batch / min(seconds[1:])
    return found


@torch.inference_mode()
def check_export(check: Check) -> dict:
    """The largest difference between our logits and those of transformers on the exported model, in float32."""
    missing = [name for name in ("transformers", "safetensors") if not importlib.util.find_spec(name)]
    if missing:
        return {"export": f"{missing[0]} is not installed"}
    source, folder = FOLDER / "run", FOLDER / "hf"
    if not source.exists():
        raise RuntimeError("needs the check 'pipeline' before it")
    shutil.rmtree(folder, ignore_errors=True)
    script(check, "-m", "tools.export", "--ckpt", str(source), "--out_dir", str(folder))
    from transformers import AutoModelForCausalLM

    torch.set_float32_matmul_precision("highest")
    ours = build_model(read_checkpoint(source), source).to(check.device)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.to(str(check.device))  # type: ignore[arg-type]  # transformers' annotation takes no device
    tokens = torch.randint(ours.config.vocab_size, (2, 64), device=check.device)
    return {"largest difference of logits": (ours(tokens) - theirs(tokens).logits).abs().max().item()}


CHECKS = {
    "tests": check_tests,
    "train": check_train,
    "memory": check_memory,
    "peer": check_peer,
    "pipeline": check_pipeline,
    "decode": check_decode,
    "export": check_export,
}


def shown(name: str, value) -> str:
    if not isinstance(value, float | int):
        return str(value)
    if name.endswith("memory"):
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:.1%}" if name.endswith("mfu") else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = Parser(description="Check what only a GPU shows.", allow_abbrev=False)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script itself")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--only", default=",".join(CHECKS), help=f"checks to run: {','.join(CHECKS)}")
    parser.add_argument("--out", type=Path, default=Path("out/gpu_check.json"))
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(CHECKS):
        raise UserError(f"--only {unknown.pop()}: no check; the checks are {', '.join(CHECKS)}")
    check = Check(args)
    result: dict = {"torch": torch.__version__, "device": str(check.device)}
    if check.device.type == "cuda":
        properties = torch.cuda.get_device_properties(check.device)
        result |= {"device": properties.name, "memory": properties.total_memory}
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / properties.total_memory))
    result["matmul_flops"] = check.flops[torch.bfloat16]
    print(f"{result['device']}, torch {torch.__version__}, {result['matmul_flops'] / 1e12:.1f} TFLOP/s in bfloat16")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        start = time.perf_counter()
        try:
            found = CHECKS[name](check)
            bad = [key for key, value in found.items() if isinstance(value, float) and not math.isfinite(value)]
            found |= {"error": f"not finite: {', '.join(bad)}"} if bad else {}
        except (RuntimeError, subprocess.SubprocessError, UserError, AssertionError) as e:  # recorded; go on
            found = {"error": str(e).splitlines()[0] if str(e) else type(e).__name__}
        result[name] = found | {"seconds": time.perf_counter() - start}
        print(f"\n{name}")
        for key, value in result[name].items():
            print(f"  {key:44}{shown(key, value):>24}", flush=True)
        with atomic_write(args.out) as f:
            f.write(json.dumps(result, indent=2).encode() + b"\n")
    failed = [name for name in names if "error" in result[name]]
    print(f"\nwrote {args.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    if failed:
        raise UserError(f"{len(failed)} of {len(names)} checks failed: {', '.join(failed)}")


if __name__ == "__main__":
    run(main)
