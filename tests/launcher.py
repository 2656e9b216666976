"""Processes that start at once: `Popen` is subprocess.Popen, for `python ARGS` forked from one that has
loaded PyTorch.

Starting Python with PyTorch takes seconds, and the tests start hundreds of programs. The launcher, one for
each process of pytest, has imported the packages, none of the project's modules, and has run nothing. What it
forks is a process like every other: with a number, arguments, environment, streams, signals and exit status
of its own.
"""

import ctypes
import functools
import gc
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
import threading

PR_SET_CHILD_SUBREAPER = 36
# What Python and its packages read only as they start: with other values a process is started, not forked.
AT_START = ("OMP_NUM_THREADS", "PYTHON", "LC_", "LANG")
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
WITHOUT_PYTORCH = {"prepare.py", "stories.generate"}  # start at once anyway
LOCK = threading.Lock()


@functools.cache
def launcher() -> socket.socket:
    """The connection to the launcher, which ends with this process."""
    here, there = socket.socketpair()
    command = [sys.executable, __file__, str(there.fileno())]
    # Pipes: Python remembers of its streams whether they can seek.
    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[there.fileno()])
    there.close()
    return here


def at_start(env) -> dict:
    return {name: value for name, value in env.items() if name.startswith(AT_START)}


STARTED = at_start(os.environ)


def can_fork(a: dict) -> bool:
    """Whether a new process is `python ARGS`, with nothing to do between fork and exec, and this is Linux
    (prctl).
    """
    if (
        sys.platform != "linux"
        or a["preexec_fn"]
        or a["pass_fds"]
        or not isinstance(a["args"], list)
        or a["args"][0] != sys.executable
    ):
        return False
    first, *rest = map(str, a["args"][1:])
    return (first in ("-c", "-m") or first[0] != "-") and not WITHOUT_PYTORCH & {first, *rest[:1]}


class Popen(subprocess.Popen):
    """Forked where that makes no difference; else started."""

    def _execute_child(self, *args):
        a = inspect.signature(super()._execute_child).bind(*args).arguments
        streams = (a["p2cread"], a["c2pwrite"], a["errwrite"])
        fds = [number if fd == -1 else fd for number, fd in enumerate(streams)]
        env = a["env"] or dict(os.environ)
        if not can_fork(a) or at_start(env) != STARTED or any(map(os.isatty, fds)):
            return super()._execute_child(*args)
        _, *command = map(os.fspath, a["args"])
        cwd = os.path.abspath(a["cwd"] or ".")
        request = json.dumps([command, cwd, env, a["start_new_session"]]).encode()
        with LOCK:
            # The new process becomes a child of this one, so that it can be waited for.
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
            socket.send_fds(launcher(), [len(request).to_bytes(8, "big")], fds)
            launcher().sendall(request)
            self.pid = int.from_bytes(launcher().recv(8), "big")
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)
        assert self.pid, "the launcher has ended"
        self._child_created = True
        self._close_pipe_fds(*(a[name] for name in PIPES))


def serve(connection: socket.socket) -> list:
    """Fork for each request. Returns in the forked process, with what it is asked for."""
    while True:
        head, fds, _, _ = socket.recv_fds(connection, 8, 3)
        if not head:
            os._exit(0)
        size, request = int.from_bytes(head, "big"), b""
        while len(request) < size:
            request += connection.recv(size - len(request))
        told, tell = os.pipe()
        middle = os.fork()
        if middle == 0:
            pid = os.fork()
            if pid:
                os.write(tell, pid.to_bytes(8, "big"))
                os._exit(0)
            os.close(told)
            os.close(tell)
            connection.close()
            for number, fd in enumerate(fds):
                os.dup2(fd, number)
                os.close(fd)
            return json.loads(request)
        os.waitpid(middle, 0)  # from here on the process is a child of pytest's
        connection.sendall(os.read(told, 8))
        for fd in (*fds, told, tell):
            os.close(fd)


if __name__ == "__main__":
    import numpy  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch._dynamo  # noqa: F401 (every training loads it)
    import tqdm  # noqa: F401

    gc.freeze()
    (first, *rest), folder, environment, new_session = serve(socket.socket(fileno=int(sys.argv[1])))
    if new_session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    del sys.modules["__main__"].__file__
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    elif first == "-m":
        sys.argv, sys.path[0] = rest, folder
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")
