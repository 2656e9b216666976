"""Files: one writer to a folder, and files that are either complete or not there."""

import contextlib
import errno
import hashlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def take_lock(file) -> None:
    """Lock an open file without waiting.

    Raises BlockingIOError if another process holds the lock; another OSError if there are no locks here.
    """
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    try:
        import msvcrt
    except ImportError:
        raise OSError("no locks on this system") from None
    file.seek(1 << 30)  # a byte beyond the text, which others must be able to read
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as e:
        raise BlockingIOError from e


@contextlib.contextmanager
def locked(path: Path, what: Path):
    """Hold the lock file `path`, which protects `what`, while the body runs.

    Raises BlockingIOError, with `what` and the process that holds the lock. The lock is the kernel's and ends with
    its process, however that ends: a lock file left by a killed process is taken over.
    """
    new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as it is locked)
        try:
            take_lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise BlockingIOError(errno.EAGAIN, f"in use by {holder}; wait for it, or stop it", str(what)) from None
        except OSError:
            pass  # no locks here: continue without one
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # the holder has just removed this file: a lock on it protects nothing
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}: {' '.join(sys.argv)}")
            file.flush()
        yield
    finally:
        with contextlib.suppress(PermissionError):  # Windows removes no open file: the unlocked lock file stays
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):  # remove the folder again if it stayed empty
            if new:
                path.parent.rmdir()


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
        if isinstance(e, OSError):
            e.filename = e.filename or str(path)  # the error of a full disk has no file name
        raise


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that the renames in it survive a power cut. Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def json_checksum(value) -> str:
    """SHA-256 of a value written as JSON: meta.json carries that of its other entries."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
