"""What the test files share: commands in this process and in one of their own, small models, comparisons."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.checkpoint import read_checkpoint
from common.files import report_errors
from model import GPT, ModelConfig

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

# ---- Commands --------------------------------------------------------------------------------------


def run_here(module, *args, check=True):
    """What `python MODULE.py ARGS` does, in this process: that spares the seconds in which PyTorch is loaded.

    Returns returncode, stdout and stderr, as of a finished process.
    """
    out = io.StringIO()
    err = io.StringIO()
    argv_before = sys.argv
    sys.argv = [module.__file__, *map(str, args)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            report_errors(module.main)
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = argv_before
    done = SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
    assert not check or code == 0, done.stderr + done.stdout
    return done


def start_script(*args, **env):
    """Start `python ARGS` in the repository's root, and go on at once."""
    command = [sys.executable, *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def run_script(*args, check=True, timeout=300, text=True, **env):
    """`python ARGS` in a process of its own, where the process is what is tested: signals, the environment,
    streams. Elsewhere run_here is quicker."""
    command = [sys.executable, *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=text, timeout=timeout, env=env)
    assert not check or done.returncode == 0, done.stderr + done.stdout
    return done


def start_bash(project, *args):
    """Start `bash ARGS` in a copy of the program. There `python` is its bin/python, or else this one."""
    path = f"{project}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["bash", *args], cwd=project, env=env, start_new_session=True, **pipes)


def assert_one_line_error(done, *words):
    """The promise about every mistake of a user: exit status 2, one line, no traceback, these words in it."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.strip().splitlines() if "it/s" not in line and "B/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def assert_refused(module, args, *words):
    """`python MODULE.py ARGS` ends with one line that has these words."""
    assert_one_line_error(run_here(module, *args, check=False), *words)


def as_two_processes(*args):
    """`python ARGS` as two processes that train together: what torchrun does, without its time to start.

    Returns what both print.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [start_script(*args, **env, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    printed = ""
    for process in processes:
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        printed += stdout
    return printed


def wait_for_step(process, out_dir, step):
    """Until metrics.jsonl has a line of this step or a later one."""
    path = Path(out_dir) / "metrics.jsonl"
    while True:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


# ---- Settings of small runs ------------------------------------------------------------------------

SHAPE = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "head_dim": 12, "n_embd": 32, "intermediate_size": 48}
LOOP = {
    "block_size": 32,
    "batch_size": 4,
    "max_iters": 12,
    "warmup_iters": 2,
    "eval_interval": 6,
    "eval_sequences": 6,
    "log_interval": 2,
    "save_interval": 4,
    "compile": False,
    "device": "cpu",
    "dtype": "float32",  # "auto" would be measured anew in every run
}
TINY = SHAPE | LOOP
TUNING = LOOP | {
    "block_size": 256,
    "learning_rate": 0.01,
    "max_iters": 60,
    "eval_interval": 20,
    "save_interval": 20,
}


def options(settings):
    """Settings as they are written on a command line."""
    return [f"--{key}={value}" for key, value in settings.items()]


def tiny(**changes):
    """The arguments of a small run of train.py."""
    return options(TINY | changes)


def tuning(init_from, data_dir, out_dir, **changes):
    """The arguments of a small run of sft.py."""
    return options(TUNING | {"init_from": init_from, "data_dir": data_dir, "out_dir": out_dir} | changes)


# ---- Prepared folders, and what a run leaves -------------------------------------------------------


def meta_of(folder):
    return json.loads((Path(folder) / "meta.json").read_text())


def reseal(folder, **changes):
    """Make a prepared folder whose files were changed one that prepare.py might have written."""
    meta = meta_of(folder) | changes
    for split in ("train", "val"):
        data = (folder / f"{split}.bin").read_bytes()
        meta[split] |= {"sha256": hashlib.sha256(data).hexdigest(), "tokens": len(data) // 2}
    meta["tokenizer_sha256"] = hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))


def metrics_of(folder):
    """The lines of metrics.jsonl, without the evaluation before the first step."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > 0]


def lines_of(folder):
    """The lines of `metrics_of` without what differs from run to run."""
    measured = ("tokens_per_second", "peak_memory")
    return [{k: v for k, v in line.items() if k not in measured} for line in metrics_of(folder)]


def copy_files(folder, new, *names):
    """Some files of a run in a new folder, as a kill would have left them."""
    new.mkdir()
    for name in names:
        shutil.copy(folder / name, new)
    return new


def same(a, b):
    """Assert that two values are equal bit for bit, whatever lies inside what."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


def same_state(one, other):
    """Assert that two checkpoints hold the same weights, optimizers and step."""
    one = read_checkpoint(one)
    other = read_checkpoint(other)
    for key in one.keys() - {"settings", "seconds"}:
        same(one[key], other[key])


# ---- Models ----------------------------------------------------------------------------------------


def strong_model(config, seed=5):
    """A model whose attention matters: large weights, and gains other than 1."""
    torch.manual_seed(seed)
    model = GPT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
    return model


def small_model(**changes):
    """A strong model of odd sizes, no two of them equal: what is mixed up has a wrong shape."""
    shape = {"vocab_size": 97, "block_size": 40, "n_layer": 3, "n_head": 6, "n_kv_head": 2, "head_dim": 10}
    shape |= {"n_embd": 36, "intermediate_size": 44, "rope_theta": 5000.0}
    return strong_model(ModelConfig(**shape | changes), seed=0)


def as_transformers(ours):
    """The same weights in the model of transformers that computes the same."""
    transformers = pytest.importorskip("transformers")
    c = ours.config
    kind = "Qwen3" if c.qk_norm else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=c.vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim,
        max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rope_theta=c.rope_theta,
        tie_word_embeddings=True,
        attention_bias=False,
    )
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    names = {
        "embedding.": "model.embed_tokens.",
        "blocks.": "model.layers.",
        "attention_norm": "input_layernorm",
        "attention.": "self_attn.",
        "mlp_norm": "post_attention_layernorm",
    }
    state = {}
    for name, weight in ours.state_dict().items():
        for our_name, their_name in names.items():
            name = name.replace(our_name, their_name)
        if name == "norm.weight":
            name = "model.norm.weight"
        state[name] = weight
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs
