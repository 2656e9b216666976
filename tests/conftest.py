"""Fixtures of several test files: real data where it is at hand, and what real commands made of stories.

The functions they use are in helpers.py.
"""

import os
import shutil
import signal
from unittest import mock

import pytest
import torch
from helpers import ROOT, SHARED, run_here, tiny, tuning

import prepare
import sft
import train
from stories.generate import write_corpus


@pytest.fixture(scope="session")
def shared():
    """The folder of real data."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


@pytest.fixture
def project(tmp_path):
    """A copy of the program, for scripts that write into the folder they are in."""
    ignore = shutil.ignore_patterns("__pycache__", ".*", "data", "out", "hf", "tests")
    return shutil.copytree(ROOT, tmp_path / "project", ignore=ignore)


@pytest.fixture(autouse=True)
def as_it_was():
    """A command sets signal handlers, PyTorch's options and environment variables: put them back.

    One thread is enough for models this small, and many on a busy machine wait for each other."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    random_state = torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)
    torch.set_rng_state(random_state)
    if torch.are_deterministic_algorithms_enabled():  # else the call would load the compiler
        torch.use_deterministic_algorithms(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- From stories to a tuned model -----------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A small prepared folder of the embedded corpus's own stories, and stories.jsonl beside it."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "stories.jsonl", 400)
    run_here(
        prepare,
        folder / "stories.jsonl",
        f"--out_dir={folder}/data",
        "--vocab_size=2000",
        "--val_fraction=0.1",
    )
    return folder / "data"


@pytest.fixture(scope="session")
def tiny_sft(tiny_data):
    """The stories of tiny_data as instructions and responses, for a model of its tokenizer."""
    folder = tiny_data.parent / "sft"
    tokenizer = tiny_data / "tokenizer.model"
    stories = tiny_data.parent / "stories.jsonl"
    run_here(
        prepare,
        stories,
        "--task=sft",
        f"--out_dir={folder}",
        f"--tokenizer={tokenizer}",
        "--val_fraction=0.1",
    )
    return folder


@pytest.fixture(scope="session")
def pretrained(tiny_data, tmp_path_factory):
    """A checkpoint of train.py that reads up to 256 tokens."""
    out = tmp_path_factory.mktemp("pretrained") / "out"
    steps = {"max_iters": 20, "save_interval": 20, "eval_interval": 20, "learning_rate": 0.01}
    run_here(train, *tiny(data_dir=tiny_data, out_dir=out, block_size=256, **steps))
    return out / "ckpt_000020.pt"


@pytest.fixture(scope="session")
def tuned(pretrained, tiny_sft, tmp_path_factory):
    """The folder of a run of sft.py that nothing disturbed, and what it printed in printed.txt beside it."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    done = run_here(sft, *tuning(pretrained, tiny_sft, out))
    (out.parent / "printed.txt").write_text(done.stdout, encoding="utf-8")
    return out
