"""What only a GPU shows: the CUDA tests, speed, memory, resuming and tuning, as a table and a JSON file.

    python -m tools.gpu_check
    python -m tools.gpu_check --only pipeline,train
    python -m tools.gpu_check --device=cpu --quick       the same with a tiny model, to try the script itself

Speed and memory are those that train.py writes to metrics.jsonl, of runs on the demo's stories. A check that fails is
recorded with its error, and the others go on.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.checkpoint import choose_device, choose_dtype, matmul_flops
from common.files import Parser, UserError, atomic_write, report_errors
from common.settings import load_settings
from tools.estimate import estimate_memory
from tools.plot import read_metrics
from train import Settings, new_model

VOCAB_SIZE = 8192
FOLDER = Path("out/gpu_check")
TINY = ["--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=64", "--intermediate_size=128", "--block_size=256"]
TINY += ["--batch_size=2", "--gradient_accumulation_steps=1"]


def script(*command: str, kill_at: Path | None = None) -> None:
    """Run a script; with kill_at kill it (-9) as soon as that file is there. Raises RuntimeError with its error."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while kill_at and process.poll() is None:
        if kill_at.exists():
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.02)
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(error.decode(errors="replace").strip().splitlines()[-1])


def prepare(args) -> Path:
    """The demo's stories, prepared for train.py; for sft.py in a folder with _sft in its name."""
    data, stories = FOLDER / "data", FOLDER / "stories.jsonl"
    if not data.exists():
        count = "1000" if args.quick else "20000"
        script("-m", "stories.generate", "--out", str(stories), "--count", count)
        script("prepare.py", str(stories), "--out_dir", str(data), "--val_fraction", "0.05")
    return data


# ---- The checks: each returns {name: number or text} -----------------------------------------------


def check_tests(args) -> dict:
    """The CUDA tests. Without a device they are skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "tests/test_cuda.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode not in (0, 5):
        raise RuntimeError(done.stdout.strip().splitlines()[-1])
    return {"tests": done.stdout.strip().splitlines()[-1].strip("= ")}


def check_train(args) -> dict:
    """Tokens/s, MFU and memory of microstories.py, compiled and not; compiled in float16."""
    kinds = {"eager": ["--compile=False"], "compiled": []}
    if args.device != "cpu":
        kinds["compiled float16"] = ["--dtype=float16"]
    out_dir, found = FOLDER / "short", dict[str, float]()
    for name, options in kinds.items():
        settings = ["config/microstories.py", f"--data_dir={prepare(args)}", f"--out_dir={out_dir}", *options]
        settings += [f"--device={args.device}", "--eval_sequences=1", "--sample_interval=0"]
        settings += (
            [*TINY, "--max_iters=4", "--log_interval=2"] if args.quick else ["--max_iters=12", "--log_interval=4"]
        )
        shutil.rmtree(out_dir, ignore_errors=True)
        script("train.py", *settings)
        line = [line for line in read_metrics(out_dir / "metrics.jsonl") if "loss" in line][-1]
        measured = ("tokens_per_second", "mfu", "peak_memory")
        found |= {f"{name} {key}": line[key] for key in measured if key in line}
        s = load_settings(settings, Settings, "")
        device = choose_device(s.device)
        dtype = choose_dtype(s.dtype, device)
        with torch.device("meta"):
            found[f"{name} estimated_memory"] = estimate_memory(new_model(s, VOCAB_SIZE), s, dtype, device)
    return found


def check_pipeline(args) -> dict:
    """200 steps of train.py, killed (-9) at a checkpoint and resumed; 50 of sft.py and tools/dpo.py."""
    data, n = prepare(args), 20 if args.quick else 200
    tokenizer = ["--tokenizer", str(data / "tokenizer.model"), "--val_fraction", "0.05"]
    instructions = ["--task", "sft", "--out_dir", f"{data}_sft", *tokenizer]
    script("prepare.py", str(FOLDER / "stories.jsonl"), *instructions)
    loop = ["--log_interval=5", "--eval_interval=1000", "--sample_interval=0", f"--save_interval={n // 4}"]
    loop += [f"--device={args.device}", "--compile=False", "--gradient_accumulation_steps=1"]
    tune = [f"--data_dir={data}_sft", f"--max_iters={n // 4}", "--epochs=0", *loop]
    tune += ["--batch_size=2", "--block_size=256"] if args.quick else []
    pretrain = ["train.py", "config/microstories.py", f"--data_dir={data}", f"--out_dir={FOLDER}/run", *loop]
    pretrain += ["--warmup_iters=10", f"--max_iters={n}", *(TINY if args.quick else [])]
    script(*pretrain, kill_at=FOLDER / "run" / f"ckpt_{n // 2:06d}.pt")
    found: dict = {"killed at step": read_metrics(FOLDER / "run" / "metrics.jsonl")[-1]["step"]}
    script(*pretrain, "--resume=True")
    sft = ["sft.py", "config/microstories_sft.py", f"--init_from={FOLDER}/run", f"--out_dir={FOLDER}/run_sft"]
    script(*sft, *tune)
    dpo = ["-m", "tools.dpo", "config/microstories_dpo.py", f"--init_from={FOLDER}/run_sft"]
    script(*dpo, f"--out_dir={FOLDER}/run_dpo", f"--instructions={n}", "--samples=2", *tune)
    for name in ("run", "run_sft", "run_dpo"):
        losses = [line["loss"] for line in read_metrics(FOLDER / name / "metrics.jsonl") if "loss" in line]
        found |= {f"{name} first loss": losses[0], f"{name} last loss": losses[-1]}
    if not found["run last loss"] < found["run first loss"]:
        raise RuntimeError(f"the loss did not fall: {found}")
    return found


CHECKS = {"tests": check_tests, "train": check_train, "pipeline": check_pipeline}


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
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
    flops = matmul_flops(device, dtype)
    result: dict = {"torch": torch.__version__, "device": name, "matmul_flops": flops}
    print(f"{name}, torch {torch.__version__}, {flops / 1e12:.1f} TFLOP/s measured in {dtype}; mfu is a share of that")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for name in names:
        start = time.perf_counter()
        try:
            found = CHECKS[name](args)
            bad = [key for key, value in found.items() if isinstance(value, float) and not math.isfinite(value)]
            found |= {"error": f"not finite: {', '.join(bad)}"} if bad else {}
        except (RuntimeError, subprocess.SubprocessError, UserError) as e:  # recorded; go on
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
    report_errors(main)
