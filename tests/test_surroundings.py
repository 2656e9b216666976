"""What is promised where the machine is not as expected: no compiler, another terminal, leftover variables."""

import fcntl
import os
import pty
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import ROOT, assert_one_line_error, metrics_of, run_script, tiny

from common.checkpoint import read_checkpoint

FOREVER = {"max_iters": 100_000, "save_interval": 100_000, "eval_interval": 100_000, "log_interval": 1}


def program(path, text):
    """A shell script that can be run."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ---- torch.compile ---------------------------------------------------------------------------------


def assert_continues_uncompiled(done, *words):
    """One line on standard error, with these words, and the work is done."""
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("torch.compile does not work here"), line
    for word in (*words, "continuing without it", "g++", "TORCHINDUCTOR_CACHE_DIR"):
        assert word in line, (word, line)


def train_compiled(data, out, python=sys.executable, **env):
    command = [python, "train.py", *tiny(data_dir=data, out_dir=out, max_iters=1, compile=True)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.fixture
def old_compiler(tmp_path):
    """A PATH whose g++ does not know what PyTorch asks for."""
    refusal = "g++: error: unrecognized command line option '-std=c++20'"
    version = '[ "$1" = --version ] && echo "g++ 4.8.5" && exit'
    program(tmp_path / "bin" / "g++", f'{version}\necho "{refusal}" >&2\nexit 1')
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }


def test_an_old_compiler(old_compiler, tiny_data, tmp_path):
    done = train_compiled(tiny_data, tmp_path / "out", **old_compiler)
    assert_continues_uncompiled(done, "unrecognized command line option")
    assert read_checkpoint(tmp_path / "out")["step"] == 1


def test_an_old_compiler_in_sampling(old_compiler, pretrained):
    """The story on standard output is not mixed with the message."""
    args = ("sample.py", "--ckpt", pretrained, "--device", "cpu", "--num", 1, "--max_new_tokens", 5)
    done = run_script(*args, "--compile", **old_compiler)
    assert_continues_uncompiled(done, "unrecognized command line option")
    assert done.stdout == run_script(*args).stdout


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_spaces_in_a_path(tiny_data, tmp_path):
    """Of PyTorch's cache, and of the virtual environment."""
    done = train_compiled(tiny_data, tmp_path / "a", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "my cache"))
    assert_continues_uncompiled(done, "error", "spaces")
    environment = tmp_path / "My Projects" / ".venv"
    environment.parent.mkdir()
    environment.symlink_to(sys.prefix)
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = train_compiled(tiny_data, tmp_path / "b", environment / "bin" / "python", **cache)
    assert_continues_uncompiled(done, "spaces")


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_a_compiler_behind_a_launcher(tmp_path):
    """CXX="ccache g++" is a compiler, for PyTorch too, which takes CXX for one name."""
    program(tmp_path / "bin" / "ccache", 'exec "$@"')
    code = "import torch; from common.checkpoint import *; print(try_compile(double, torch.device('cpu')) is double)"
    env = {"CXX": "ccache g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_script("-c", code, **env, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.stdout == "False\n" and done.stderr == ""


def test_a_cache_that_cannot_be_written(tiny_data, tmp_path):
    """PyTorch then cannot even be loaded: one line says which folder to change."""
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    fresh = {"PYTHONUTF8": "1"}  # a process that has not loaded PyTorch already
    done = train_compiled(tiny_data, tmp_path / "out", TORCHINDUCTOR_CACHE_DIR=str(cache), **fresh)
    assert_one_line_error(done, cache, "TORCHINDUCTOR_CACHE_DIR")


def test_a_compiler_that_breaks_later():
    """After the trial: one line, from every program."""
    code = """
from common.files import report_errors
from torch._inductor.exc import CppCompileError, InductorError
def main():
    raise InductorError(CppCompileError(["g++"], "a.cpp: note\\ncc1plus: fatal error: Killed\\nmore"), None)
report_errors(main)"""
    done = run_script("-c", code, check=False)
    assert_one_line_error(done, "torch.compile", "fatal error: Killed", "--compile=False")


# ---- Variables of another job ----------------------------------------------------------------------

JOB = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}


@pytest.mark.parametrize(
    "env, words",
    [
        ({"RANK": "0"}, ("RANK is set", "WORLD_SIZE is not", "unset RANK")),
        ({"WORLD_SIZE": "2"}, ("WORLD_SIZE is set", "RANK is not", "unset WORLD_SIZE")),
        ({"RANK": "node-a"}, ("RANK = 'node-a'", "not a number", "unset RANK")),
        (JOB | {"MASTER_ADDR": ""}, ("MASTER_ADDR is not", "unset RANK WORLD_SIZE")),
        (JOB | {"MASTER_PORT": "http"}, ("MASTER_PORT = 'http'", "not a number")),
        (JOB | {"MASTER_PORT": "99999"}, ("MASTER_PORT = 99999", "65535")),
        (JOB | {"RANK": "2"}, ("RANK = 2", "WORLD_SIZE = 2", "from 0")),
    ],
)
def test_variables_left_over_from_a_cluster(env, words, tiny_data, tmp_path):
    done = run_script("train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path), check=False, **env)
    assert_one_line_error(done, "environment", *words)


@pytest.mark.parametrize("script", [["train.py"], ["sft.py"], ["-m", "tools.dpo"]])
def test_help_needs_no_variables(script, tmp_path):
    assert "--out_dir=" in run_script(*script, "--help", RANK="node-a").stdout
    done = run_script(*script, f"--out_dir={tmp_path}", check=False, RANK="node-a")
    assert_one_line_error(done, "RANK = 'node-a'")


def test_a_port_of_another_job(tiny_data, tmp_path):
    with socket.create_server(("localhost", 0)) as other:
        env = JOB | {"WORLD_SIZE": "1", "MASTER_PORT": str(other.getsockname()[1])}
        done = run_script("train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path), check=False, **env)
    assert_one_line_error(done, "MASTER_PORT", "in use")


# ---- Standard streams and the terminal -------------------------------------------------------------

CLOSED = ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
def test_closed_streams(closed, tiny_data, pretrained, tmp_path):
    """prepare.py, train.py and sample.py do their work; what has no place to go is not written."""
    stories = tiny_data.parent / "stories.jsonl"
    prepare = ["prepare.py", stories, "--out_dir", tmp_path / "data", "--vocab_size", 2000]
    train = ["train.py", *tiny(data_dir=tiny_data, out_dir=tmp_path / "out")]
    sample = ["sample.py", "--ckpt", pretrained, "--device", "cpu", "--num", 1, "--max_new_tokens", 2]
    for command in (prepare, train, sample):
        words = " ".join(map(str, command))
        done = subprocess.run(f"{sys.executable} {words} {closed}", shell=True, cwd=ROOT, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
        assert bool(done.stdout) == (closed == "2>&-")
    assert (tmp_path / "data" / "train.bin").stat().st_size > 10_000
    assert read_checkpoint(tmp_path / "out")["step"] == 12


def test_streams_that_are_none(tiny_data, tmp_path):
    """As pythonw starts programs."""
    code = "import sys; sys.stdout = sys.stderr = None; import train; train.report_errors(train.main)"
    run_script("-c", code, *tiny(data_dir=tiny_data, out_dir=tmp_path))
    assert read_checkpoint(tmp_path)["step"] == 12


def in_a_terminal(*command):
    """Start a command in a terminal of its own. Returns the process's number, and the terminal's other end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execvp(command[0], list(map(str, command)))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    return pid, terminal


def wait_for_steps(out, steps):
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or len(metrics_of(out)) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def exit_status(pid):
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def test_a_terminal_that_closes(tiny_data, tmp_path):
    """The run is saved, as after Ctrl-C, although its bar writes to the terminal all the time."""
    out = tmp_path / "out"
    settings = tiny(data_dir=tiny_data, out_dir=out, **FOREVER)
    pid, terminal = in_a_terminal(sys.executable, "train.py", *settings)
    wait_for_steps(out, 4)
    assert b"step/s" in os.read(terminal, 65536)
    os.close(terminal)
    assert exit_status(pid) == 0
    assert read_checkpoint(out)["step"] == metrics_of(out)[-1]["step"] >= 4


def test_nohup_trains_on(tiny_data, tmp_path):
    out = tmp_path / "out"
    settings = tiny(data_dir=tiny_data, out_dir=out, **FOREVER)
    command = f'exec nohup "$@" >{tmp_path}/log 2>&1'
    pid, terminal = in_a_terminal("sh", "-c", command, "sh", sys.executable, "train.py", *settings)
    wait_for_steps(out, 4)
    os.close(terminal)
    wait_for_steps(out, len(metrics_of(out)) + 5)
    os.kill(pid, signal.SIGTERM)
    assert exit_status(pid) == 0
    assert "stopped and saved at step" in (tmp_path / "log").read_text()


# ---- Cores -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("taskset"), reason="no taskset here")
def test_one_core_of_several():
    """One worker process, and one thread of PyTorch."""
    code = "import prepare, torch; print(prepare.usable_cores(), torch.get_num_threads())"
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    core = min(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(core), sys.executable, "-c", code]
    assert subprocess.check_output(command, cwd=ROOT, env=env, text=True).split() == ["1", "1"]


LIMIT = """mount -t tmpfs none /sys/fs/cgroup && echo "100000 100000" >/sys/fs/cgroup/cpu.max && exec "$@" """


@pytest.mark.skipif(not shutil.which("unshare"), reason="no unshare here")
def test_a_container_of_one_core():
    """docker --cpus=1 shows all cores, and gives the time of one."""
    code = """if True:
        import torch, prepare
        from common.run import configure_pytorch
        torch.set_num_threads(2)
        configure_pytorch(True)
        print(prepare.usable_cores(), torch.get_num_threads())"""
    command = ["unshare", "-Urm", "sh", "-c", LIMIT, "sh", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "mount" in done.stderr:
        pytest.skip("this machine does not let us mount")
    assert done.stdout.split() == ["1", "1"], done.stderr
