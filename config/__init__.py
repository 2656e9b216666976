"""Read settings: files of plain assignments, and --key=value. Parsed and checked, never executed."""

import ast
import dataclasses
import difflib
import operator
import sys
from pathlib import Path

from stories.read import UserError


def read_config(path: str) -> dict:
    """The assignments of a config file: names to literals or simple arithmetic. Nothing is executed."""
    arithmetic = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
    arithmetic[ast.FloorDiv] = operator.floordiv

    def value_of(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str)):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value_of(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in arithmetic:
            left, right = value_of(node.left), value_of(node.right)
            if not isinstance(left, str) and not isinstance(right, str):
                return arithmetic[type(node.op)](left, right)
        raise ValueError

    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise UserError(f"{path}:{getattr(e, 'lineno', 1)}: cannot be read ({e})") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the text at the top
        try:
            (target,) = node.targets
            values[target.id] = value_of(node.value)
        except (AttributeError, ValueError, ArithmeticError, TypeError, RecursionError):
            raise UserError(
                f"{path}:{node.lineno}: only `name = value` may stand here, with numbers, text, True or False"
            ) from None
    return values


def load_settings(arguments: list[str], cls: type, usage: str):
    """Settings from a command line: config files, then --key=value, each overriding what came before."""
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    values = {}

    def put(key, value, where):
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
            raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if types[key] is float and type(value) is int and abs(value) < 1 << 1000:
            value = float(value)
        if type(value) is not types[key]:
            raise UserError(f"{where}: {key} must be of type {types[key].__name__}, not {value!r}")
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
