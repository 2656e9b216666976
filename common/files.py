"""Files written whole, one writer to a folder, the user's errors, the cores, the tokenizer."""

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import sentencepiece

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(argparse.ArgumentTypeError):  # of which argparse shows the message as it is
    """Something the user can fix. The message names the file or key, what was found, and what to do."""


def user_path(text: str, name: str = "") -> Path:
    """A path as typed, with ~ for the home folder. Raises UserError."""
    if not text.strip() or min(text) < " ":
        raise UserError(f"{name}{text!r}: empty, or has a control character; write / or \\\\ for a backslash")
    return Path(os.path.expanduser(text))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a UserError, and whose paths come from `user_path`."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register("type", Path, user_path)

    def error(self, message: str) -> NoReturn:
        hint = " (--option=VALUE if it begins with -)" if "expected one argument" in message else ""
        raise UserError(f"{message}{hint}; see --help")


def report_errors(main) -> None:
    """Call main(). A UserError, or an error of the system, is printed in one line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, or pythonw
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the program)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show Chinese prints \u5c0f instead
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        return main()
    except BrokenPipeError:  # | head has ended: end as SIGPIPE would
        os._exit(141)
    except UserError as e:
        message = str(e)
    except OSError as e:
        message = f"{e.filename}: {e.strerror}" if e.filename else str(e)
    except KeyboardInterrupt:
        message = "interrupted"
    except (RuntimeError, MemoryError) as e:
        name = type(e).__name__
        if isinstance(e, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(e):
            # A NumPy array too large; PyTorch's error on a GPU; its message on a CPU.
            reason = (str(e) or "none left").splitlines()[0]
            message = f"out of memory ({reason}); try a smaller batch_size or --num"
        elif name in ("InductorError", "BackendCompilerFailed"):  # torch.compile, later than try_compile
            message = f"torch.compile has failed ({compiler_error(e)}); leave it out, or give --compile=False"
        else:
            raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def compiler_error(error: Exception) -> str:
    """The line of a compiler's long output that says what is wrong."""
    lines = str(error).splitlines() or [type(error).__name__]
    for line in lines:
        if "error:" in line or ": cannot find" in line:
            return line[:150]
    return lines[0][:150]


@contextlib.contextmanager
def locked(path: Path, what: Path):
    """Hold the lock file `path`, which protects `what`, while the body runs. Raises UserError if it is held.

    The lock is the kernel's and ends with its process; the file stays. Windows has no such lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{what}: in use by another process; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield


@contextlib.contextmanager
def atomic_write(path: Path):
    """A binary file that becomes `path` when the body ends: written beside, flushed to the disk, renamed.

    At every moment `path` is complete: its old content, or its new one.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except BaseException as e:
        beside.unlink(missing_ok=True)
        # torch.save raises a RuntimeError for a full disk; the OSError before it has no file name.
        error = e.__context__ if isinstance(e, RuntimeError) else e
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
            raise error from None
        raise


def resolve_folder(path: Path) -> Path:
    """The folder that a path of --out_dir names, with links followed, there or not yet. Raises UserError."""
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            target = os.readlink(part)
            raise UserError(
                f"{part}: a link to {target}, which is not there; create that folder, or remove the link"
            )
        if part.exists() and not part.is_dir():
            raise UserError(f"{part}: not a folder; choose another --out_dir")
    return path.resolve()


def sync_folder(folder: Path) -> None:
    """Flush the renames in a folder to the disk. Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def usable_cores() -> int:
    """The number of cores this process may use, which taskset and containers limit."""
    if not hasattr(os, "sched_getaffinity"):
        return min(os.cpu_count() or 1, 61)  # Windows allows 61 worker processes
    cores = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")  # of a container: CPU time and the period it is for, in µs
    if limit.exists():
        cpu_time, period = limit.read_text(encoding="ascii").split()
        if cpu_time != "max":
            cores = min(cores, max(1, int(cpu_time) // int(period)))
    return cores


def load_tokenizer(model: bytes, name: str | Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model from its bytes. Raises UserError naming `name` if it cannot be used."""
    try:
        loaded = sentencepiece.SentencePieceProcessor(model_proto=model or b"empty")
    except (RuntimeError, ValueError):
        raise UserError(f"{name}: not a SentencePiece model") from None
    if not 0 < loaded.vocab_size() <= 65536:
        raise UserError(f"{name}: {loaded.vocab_size():,} pieces; the uint16 token files hold at most 65,536")
    if loaded.eos_id() < 0 or not loaded.is_control(loaded.eos_id()):
        raise UserError(f"{name}: has no control token for the end of a text (eos)")
    return loaded
