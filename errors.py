"""Mistakes of the user: told in one line, with exit status 2 and no traceback. A bug of ours shows its own."""

import argparse
import concurrent.futures.process
import io
import sys
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend. The message names the file or key, what was found, what to do."""


class Parser(argparse.ArgumentParser):
    """Answers a wrong option in one line, like any other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run(main) -> None:
    """Call main(); print a UserError, or the system's refusal (full disk, no permission), in one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without Chinese shows \u5c0f, as errors do there
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as e:
        message = str(e)
    except OSError as e:
        message = f"{e.filename}: {e.strerror}" if e.filename else str(e)
    except KeyboardInterrupt:
        message = "interrupted"
    except concurrent.futures.process.BrokenProcessPool:
        message = "a worker process was killed, perhaps for want of memory; try --workers 1"
    except (RuntimeError, MemoryError) as e:
        known = type(e).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(e)  # PyTorch's, on GPU and CPU
        if not known and isinstance(e, RuntimeError):
            raise
        message = f"out of memory ({str(e).splitlines()[0] if str(e) else 'none left'}); try a smaller batch_size"
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
