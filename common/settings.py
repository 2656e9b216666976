"""Settings: dataclass fields filled from config files and from --key=value. Parsed and checked, never executed.

Errors of the user live here too: `UserError`, and `run`, which prints it in one line.
"""

import argparse
import ast
import concurrent.futures.process
import dataclasses
import difflib
import io
import operator
import sys
import typing
from pathlib import Path
from typing import Any, NoReturn

# ---------------------------------------------------------------------------------------------------
# Errors of the user: one line, exit status 2, no traceback. A bug of ours shows its traceback.


class UserError(Exception):
    """Something the user can fix. The message names the file or key, what was found, and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run(main) -> None:
    """Call main(). A UserError, or an error of the system (full disk, no permission), is printed in one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show Chinese prints \u5c0f instead
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
        message = "a worker process was killed, perhaps because memory ran out; try --workers 1"
    except (RuntimeError, MemoryError) as e:
        out_of_memory = type(e).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(e)  # on GPU, on CPU
        if isinstance(e, RuntimeError) and not out_of_memory:
            raise
        message = f"out of memory ({str(e).splitlines()[0] if str(e) else 'none left'}); try a smaller batch_size"
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------
# Fields


def setting(default, at_least: float = 0, below: float = 2**63, choices: tuple[str, ...] = (), fixed=False) -> Any:
    """A dataclass field with its range: at_least <= value < below for numbers, one of `choices` for text.

    A `fixed` setting cannot change when a run is resumed.
    """
    metadata = {"at_least": at_least, "below": below, "choices": choices, "fixed": fixed}
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(settings) -> None:
    """Raise a UserError that names the first setting outside its range."""
    for field in dataclasses.fields(settings):
        value, limits = getattr(settings, field.name), setting(None).metadata | field.metadata
        if field.type in (int, float) and not limits["at_least"] <= value < limits["below"]:
            below = "2**63" if limits["below"] == 2**63 else limits["below"]
            raise UserError(f"{field.name} = {value}: must be at least {limits['at_least']} and below {below}")
        if limits["choices"] and value not in limits["choices"]:
            raise UserError(f"{field.name} = {value!r}: must be one of {', '.join(map(repr, limits['choices']))}")


# ---------------------------------------------------------------------------------------------------
# Files and the command line

ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def literal(node: ast.expr):
    """The value of a number, a text, True or False, or of arithmetic with numbers. Raises ValueError."""
    match node:
        case ast.Constant(bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(ast.USub(), operand):
            return -literal(operand)
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            a, b = literal(left), literal(right)
            if not isinstance(a, str) and not isinstance(b, str):
                return ARITHMETIC[type(op)](a, b)
    raise ValueError


def read_config(path: str, with_base: bool = True) -> dict:
    """The assignments of a config file, which is parsed and not executed. Raises UserError.

    `base = "other.py"` takes the settings of another file in the same folder first.
    """
    try:
        with open(path, "rb") as f:
            text = f.read((1 << 20) + 1)
        if len(text) > 1 << 20:
            raise ValueError("over a megabyte: not a config file")
        tree = ast.parse(text.decode())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        line, reason = getattr(e, "lineno", None) or 1, str(e) or type(e).__name__
        raise UserError(f"{path}:{line}: cannot be read ({reason})") from None
    values = {}
    for node in tree.body:
        try:
            match node:
                case ast.Expr(ast.Constant()):
                    pass  # the text at the top
                case ast.Assign([ast.Name(name)], value):
                    values[name] = literal(value)
                case _:
                    raise ValueError
        except (ValueError, ArithmeticError, TypeError, RecursionError):
            raise UserError(
                f"{path}:{node.lineno}: only `name = value` may stand here, with numbers, text, True or False"
            ) from None
    if "base" in values and with_base:
        beside = Path(path).with_name(Path(str(values.pop("base"))).name or "?")
        values = read_config(str(beside), with_base=False) | values
    elif "base" in values:
        raise UserError(f"{path}: has a base, but is one itself; write its settings out")
    return values


def load_settings(arguments: list[str], cls: type, usage: str):
    """An instance of the dataclass `cls` from a command line: config files and --key=value, later ones win.

    Raises UserError for an unknown key (it names the closest real one), a wrong type, or a value out of range.
    """
    types = typing.get_type_hints(cls)
    values: dict = {}

    def put(key, value, where):
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
            raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if types[key] is float and type(value) is int and abs(value) < 1 << 1000:
            value = float(value)
        if type(value) is not types[key]:
            raise UserError(f"{where}: {key} must be of type {types[key].__name__}, not {value!r}")
        if key == "max_iters":
            values.pop("epochs", None)  # both say how long to train: the later one wins
        values[key] = value

    for argument in arguments:
        if argument in ("-h", "--help"):
            print(usage + "\nSettings and their defaults:")
            for field in dataclasses.fields(cls):
                print(f"    --{field.name}={field.default}")
            sys.exit()
        elif argument.startswith("--") and "=" in argument:
            key, text = argument[2:].split("=", 1)
            try:
                value = text if types.get(key) is str else ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                value = text
            put(key, value, argument)
        elif argument.startswith("-"):
            raise UserError(f"{argument}: settings are given as --key=value")
        else:
            for key, value in read_config(argument).items():
                put(key, value, argument)
    return cls(**values)
