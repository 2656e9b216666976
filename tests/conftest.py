"""What the tests share: the repository, real data where it is at hand, and a run of real commands."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launcher import Popen

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

from common.files import report_errors  # noqa: E402 (the path to it is set above)

subprocess.Popen = Popen  # type: ignore[misc]  # for subprocess.run too, and wherever a test starts Python


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


def run_script(*args, check=True, timeout=300, text=True, **env):
    """Run `python ARGS` in the repository's root as a user would; return the finished process."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=text, timeout=timeout, env=env)
    if check:
        assert done.returncode == 0, done.stderr + done.stdout
    return done


def assert_one_line_error(done, *words):
    """The promise about every mistake of a user: exit status 2, one line, no traceback, these words in it."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.strip().splitlines() if "it/s" not in line and "B/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


@pytest.fixture(autouse=True)
def as_it_was():
    """Training sets signal handlers, the type of algorithms and the random state: put them back.

    One thread is enough for models this small, and many on a busy machine wait for each other."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    torch.set_rng_state(state)


def script_here(main, *args, stdin=""):
    """`python ARGS` in this process, which spares the seconds that PyTorch takes to start."""
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, sys.stdin)
    sys.argv, sys.stdin, code = [str(a) for a in args], io.StringIO(stdin), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            report_errors(main)
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv, sys.stdin = before
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


# Format characters (Cf) that are seen, of Arabic, Syriac, Kaithi and Egyptian; and shorthand, which is not
# stripped
SEEN = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440)}
SEEN |= set(range(0x1BCA0, 0x1BCA4))
FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u2065\u2800\u3164\uffa0" + "".join(map(chr, range(0xFFF0, 0xFFFC)))


def changes_the_one_before(character):
    """A variation selector or a tag."""
    return "VARIATION SELECTOR" in unicodedata.name(character, "") or 0xE0000 <= ord(character) < 0xE01F0


def unseen(character):
    """By Unicode's categories, where the program has a list."""
    hidden = unicodedata.category(character) in ("Cc", "Cf") and ord(character) not in SEEN
    return character.isspace() or character in FILLERS or (hidden and not changes_the_one_before(character))


def reference_strip(text):
    """The promise about text that nobody sees at the ends, said a second time."""
    while text and (unseen(text[0]) or changes_the_one_before(text[0])):
        text = text[1:]
    while text and unseen(text[-1]):
        text = text[:-1]
    return text


TINY = {
    "block_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "head_dim": 12,
    "n_embd": 32,
    "intermediate_size": 48,
    "batch_size": 4,
    "max_iters": 12,
    "warmup_iters": 2,
    "eval_interval": 6,
    "eval_sequences": 6,
    "log_interval": 2,
    "save_interval": 4,
    "compile": False,
    "device": "cpu",
}


def tiny(**changes):
    """TINY with changes, as command line arguments."""
    return [f"--{key}={value}" for key, value in (TINY | changes).items()]


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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A small prepared folder of the embedded corpus's own stories."""
    from stories.generate import write_corpus

    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "stories.jsonl", 400)
    run_script("prepare.py", folder / "stories.jsonl", "--out_dir", folder / "data", "--vocab_size", 2000,
               "--val_fraction", 0.1)  # fmt: skip
    return folder / "data"


# ---------------------------------------------------------------------------------------------------
# Instruction tuning: a pretrained model, instructions for it, and what sft.py makes of both

SHAPE = {"n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "intermediate_size"}  # the checkpoint's own
TUNING = {key: value for key, value in TINY.items() if key not in SHAPE}
TUNING |= {
    "block_size": 256,
    "learning_rate": 0.01,
    "max_iters": 60,
    "eval_interval": 20,
    "save_interval": 20,
}


def tuning(init_from, data_dir, out_dir, **changes):
    """The command line of sft.py: TUNING with changes."""
    paths = {"init_from": init_from, "data_dir": data_dir, "out_dir": out_dir}
    return ["sft.py", *(f"--{key}={value}" for key, value in (TUNING | paths | changes).items())]


@pytest.fixture(scope="session")
def tiny_sft(tiny_data):
    """The stories of tiny_data as instructions and responses, for a model of its tokenizer."""
    folder = tiny_data.parent / "sft"
    run_script("prepare.py", tiny_data.parent / "stories.jsonl", "--task", "sft", "--out_dir", folder,
               "--tokenizer", tiny_data / "tokenizer.model", "--val_fraction", 0.1)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def pretrained(tiny_data, tmp_path_factory):
    """A checkpoint of train.py that reads up to 256 tokens."""
    out = tmp_path_factory.mktemp("pretrained") / "out"
    run_script("train.py", *tiny(data_dir=tiny_data, out_dir=out, block_size=256, max_iters=20, save_interval=20,
                                 learning_rate=0.01, eval_interval=20))  # fmt: skip
    return out / "ckpt_000020.pt"


@pytest.fixture(scope="session")
def tuned(pretrained, tiny_sft, tmp_path_factory):
    """The folder of a run of sft.py that nothing disturbed, and what it printed in printed.txt beside it."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    (out.parent / "printed.txt").write_text(run_script(*tuning(pretrained, tiny_sft, out)).stdout)
    return out
