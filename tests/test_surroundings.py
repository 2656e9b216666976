"""What is promised where the machine is not as expected.

In the order of this file:

    torch.compile    no compiler, an old one, one behind a launcher: it says so and works without it
    errors           of the memory, the disk, the compiler: one line
    environment      variables that another job left over
    streams          closed ones, a full disk, a console without Chinese
    the terminal     closes: the run is saved; nohup: it goes on
    cores            as many threads as a container may use

tests/test_train.py and tests/test_prepare.py have full disks and locks.
"""

import io
import os
import pty
import shutil
import subprocess
import sys
import types

import pytest
import torch
from helpers import ROOT, assert_one_line_error, run_here, run_script, tiny, wait_for_step

import sample
import sft
import train
from common import files, run
from common.checkpoint import choose_compiler, read_checkpoint
from common.files import report_errors

# ---- torch.compile ---------------------------------------------------------------------------------


def assert_continues_uncompiled(done, problem):
    """It says so in one line."""
    (line,) = done.stderr.splitlines()
    assert problem in line
    assert "torch.compile does not work here" in line
    assert "continuing without it" in line


def test_without_a_compiler_it_trains_and_samples_uncompiled(tiny_data, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("No working C++ compiler found\ng++: error: no such option\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    done = run_here(train, *tiny(data_dir=tiny_data, out_dir=tmp_path, max_iters=1, compile=True))
    assert_continues_uncompiled(done, "(g++: error: no such option)")
    story = ("--ckpt", tmp_path, "--device=cpu", "--dtype=float32", "--num=1", "--max_new_tokens=5")
    done = run_here(sample, *story, "--compile")
    assert_continues_uncompiled(done, "(g++: error: no such option)")
    assert done.stdout == run_here(sample, *story).stdout


@pytest.mark.parametrize(
    ("name", "taken"),
    [("sh", None), ("ccache g++", (None, "g++")), ("no-such-g++ -m64", (None, "no-such-g++"))],
)
def test_the_compiler_is_found_behind_a_launcher(name, taken, monkeypatch):
    """PyTorch takes CXX for the name of one program."""
    from torch._inductor import config

    monkeypatch.setenv("CXX", name)
    with config.patch({"cpp.cxx": None}):
        choose_compiler()
        assert config.cpp.cxx == taken


VERSION = '[ "$1" = --version ] && echo "g++ 4.8.5" && exit'


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
@pytest.mark.parametrize(
    ("program", "text", "cache", "problem"),
    [
        ("g++", f"{VERSION}; echo g++: error: -std=c++20 >&2; exit 1", "cache", "g++: error: -std=c++20"),
        ("ccache", 'exec "$@"', "cache", None),
        ("ccache", 'exec "$@"', "my cache", "error"),
    ],
)
def test_compilers_old_and_hidden(program, text, cache, problem, tiny_data, tmp_path):
    """And a folder whose name has a space."""
    path = tmp_path / program
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    settings = tiny(data_dir=tiny_data, out_dir=tmp_path / "out", max_iters=1, compile=True)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CXX": "ccache g++"}
    done = run_script("train.py", *settings, **env, TORCHINDUCTOR_CACHE_DIR=f"{tmp_path}/{cache}")
    if problem:
        assert_continues_uncompiled(done, problem)
    else:
        assert done.stderr == ""


def test_a_cache_that_cannot_be_written(tiny_data, tmp_path):
    """PyTorch then cannot even be loaded: one line says which folder to change."""
    (tmp_path / "file").touch()
    settings = tiny(data_dir=tiny_data, out_dir=tmp_path / "out")
    done = run_script("train.py", *settings, check=False, TORCHINDUCTOR_CACHE_DIR=f"{tmp_path}/file/cache")
    assert_one_line_error(done, tmp_path / "file" / "cache", "TORCHINDUCTOR_CACHE_DIR")


# ---- Errors of the machine -------------------------------------------------------------------------

InductorError = type("InductorError", (RuntimeError,), {})
OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InductorError("a.cpp: note\nfatal error: Killed\nmore"), "(fatal error: Killed); leave it out"),
        (OutOfMemoryError("2 GB\nmore"), "out of memory (2 GB); try a smaller batch_size"),
        (RuntimeError("can't allocate memory"), "out of memory (can't allocate memory)"),
        (MemoryError(), "out of memory (none left)"),
        (KeyboardInterrupt(), "interrupted"),
        (FileNotFoundError(2, "No such file", "a.txt"), "a.txt: No such file"),
    ],
)
def test_an_error_of_the_machine_is_one_line(error, line):
    def fail():
        raise error

    done = run_here(types.SimpleNamespace(__file__="a.py", main=fail), check=False)
    assert_one_line_error(done, line)


def test_a_mistake_of_the_program_is_not_hidden():
    with pytest.raises(RuntimeError):
        report_errors(lambda: torch.ones(2) @ torch.ones(3))


# ---- Variables of another job ----------------------------------------------------------------------

JOB = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE is not; start with torchrun, or unset RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK is not; start with torchrun, or unset WORLD_SIZE"),
        ({"RANK": "node-a"}, "RANK = 'node-a' is not a number"),
        (
            JOB | {"MASTER_ADDR": ""},
            "RANK is set, but MASTER_ADDR is not; start with torchrun, or unset RANK WORLD_SIZE",
        ),
        (JOB | {"MASTER_PORT": "http"}, "MASTER_PORT = 'http' is not a number"),
        (
            JOB | {"MASTER_PORT": "99999"},
            "RANK = 0, WORLD_SIZE = 2, MASTER_ADDR = localhost, MASTER_PORT = 99999",
        ),
        (JOB | {"RANK": "2"}, "RANK = 2, WORLD_SIZE = 2: ranks count from 0"),
    ],
)
def test_variables_left_over_from_a_cluster(variables, words, tiny_data, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = run_here(train, *tiny(data_dir=tiny_data, out_dir=tmp_path), check=False)
    assert_one_line_error(done, f"environment: {words}")
    assert "--out_dir=" in run_here(sft, "--help").stdout


# ---- Streams and the terminal ----------------------------------------------------------------------


def in_shell(*command):
    words = " ".join(map(str, [sys.executable, *command]))
    return subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True)


def test_with_all_streams_closed_the_work_is_done(tiny_data, pretrained, tmp_path):
    stories = tiny_data.parent / "stories.jsonl"
    for command in (
        ["prepare.py", stories, "--out_dir", tmp_path / "data", "--vocab_size", 2000],
        ["train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path / "out")],
        ["sample.py", "--ckpt", pretrained, "--max_new_tokens=2"],
    ):
        assert in_shell(*command, "<&- >&- 2>&-").returncode == 0
    assert (tmp_path / "data" / "train.bin").stat().st_size > 10_000
    assert read_checkpoint(tmp_path / "out")["step"] == 12


def test_output_that_cannot_be_written(pretrained):
    done = in_shell("sample.py", "--ckpt", pretrained, "--max_new_tokens=2", ">/dev/full")
    assert_one_line_error(done, "No space left")


def test_streams_that_are_none(monkeypatch):
    """As pythonw starts programs."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    report_errors(lambda: print("nobody sees it", file=sys.stderr))


def test_a_console_without_chinese_shows_codes(monkeypatch):
    console = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding="gbk"))
    report_errors(lambda: print("猫😀"))
    assert console.getvalue().decode("gbk") == "猫\\U0001f600\n"


@pytest.mark.skipif(not shutil.which("setsid"), reason="no setsid here")
@pytest.mark.parametrize("nohup", [[], ["nohup"]])
def test_a_run_whose_terminal_closes_is_saved_and_ends(nohup, tiny_data, tmp_path):
    """As after Ctrl-C, although its bar writes to the terminal all the time. Under nohup it goes on."""
    forever = {"max_iters": 100_000, "save_interval": 100_000, "eval_interval": 100_000, "log_interval": 1}
    settings = tiny(data_dir=tiny_data, out_dir=tmp_path, **forever)
    terminal, inside = pty.openpty()
    command = ["setsid", "--ctty", *nohup, sys.executable, ROOT / "train.py", *settings]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=inside, stdout=inside, stderr=inside)
    os.close(inside)
    wait_for_step(process, tmp_path, 4)
    os.close(terminal)
    if nohup:
        wait_for_step(process, tmp_path, 30)
        process.terminate()
    assert process.wait(timeout=60) == 0
    assert read_checkpoint(tmp_path)["step"] >= 4


# ---- Cores -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "cores"), [("max", 4), ("100000", 1), ("250000", 2), ("50000", 1)])
def test_a_container_may_use_fewer_cores_than_it_sees(limit, cores, tmp_path, monkeypatch):
    """docker --cpus=1 shows all cores, and gives the time of one."""
    file = tmp_path / "cpu.max"
    file.write_text(f"{limit} 100000\n")
    monkeypatch.setattr(files, "Path", lambda path: file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    assert files.usable_cores() == cores
    torch.set_num_threads(3)
    run.configure_pytorch(True)
    assert torch.get_num_threads() == min(3, cores)
