"""The disk: one writer to a folder, and files that are either whole or not there."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from errors import UserError


@contextlib.contextmanager
def locked(path: Path, what: Path):
    """Hold the lock file `path`, which guards `what`, while the body runs. Raises UserError naming who holds it.

    The lock is the kernel's (flock) and ends with the process, however that ends: a file left by one that was
    killed is taken over.
    """
    new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as it is locked)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{what}: in use by {file.read() or 'another process'}; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks: better without one than not at all
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # who held it has just taken the file away: a lock on it keeps nobody out
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds, though it says nothing
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}: {' '.join(sys.argv)}")
            file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):  # nothing came of it
            if new:
                path.parent.rmdir()


@contextlib.contextmanager
def replacing(path: Path):
    """A file to write bytes to, which becomes `path` when the body ends: written beside, flushed to the disk,
    renamed. At every moment `path` is whole: what it was, or what it is to be."""
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
            e.filename = e.filename or str(path)  # a full disk does not say where
        raise


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
