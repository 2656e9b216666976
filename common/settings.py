"""Settings: dataclass fields filled from config files and --key=value. Parsed, never executed."""

import ast
import dataclasses
import difflib
import sys
import typing
from pathlib import Path
from typing import Any

from common.files import UserError, user_path

RENAMED = {"cooldown": "decay_fraction", "eval_blocks": "eval_sequences"}  # old name -> new name
# Settings that only some scripts have: who meets one elsewhere has given the config of another script.
SCRIPTS = {
    "n_layer": "train.py",
    "document_mask": "train.py",
    "init_from": "sft.py or tools.dpo",
    "instructions": "tools.dpo",
    "pairs": "tools.dpo",
}


def setting(
    default, at_least: float = 0, below=2**63, choices: tuple[str, ...] = (), path=False, fixed=False
) -> Any:
    """A dataclass field with its range: at_least <= value < below for numbers, one of `choices` or a `path`
    for text.

    A `fixed` setting cannot change when a run is resumed.
    """
    metadata = {"at_least": at_least, "below": below, "choices": choices, "path": path, "fixed": fixed}
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(settings) -> None:
    """Raise a UserError that names the first setting outside its range."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        limits = field.metadata or setting(None).metadata
        least = limits["at_least"]
        end = limits["below"]
        if field.type in (int, float) and not least <= value < end:
            raise UserError(f"{field.name} = {value}: must be at least {least} and below {end}")
        if limits["choices"] and value not in limits["choices"]:
            raise UserError(
                f"{field.name} = {value!r}: must be one of {', '.join(map(repr, limits['choices']))}"
            )


def expand_paths(settings) -> None:
    """Replace ~ by the home folder in the settings that are paths. Raises UserError."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata and field.metadata["path"] and value != field.default:
            setattr(settings, field.name, str(user_path(value, f"{field.name} = ")))


def read_config(path: str) -> dict:
    """The assignments of a config file, which is parsed and not executed. Raises UserError."""
    try:
        if Path(path).stat().st_size > 1 << 20:  # parsing takes hundreds of times its size
            raise ValueError("over a megabyte: not a config file")
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        line = getattr(e, "lineno", None) or 1
        reason = str(e) or type(e).__name__
        if "unicodeescape" in reason:
            reason += "; write / for a backslash"
        raise UserError(f"{path}:{line}: cannot be read ({reason})") from None
    values: dict[str, Any] = {}
    for node in tree.body:
        try:
            match node:
                case ast.Expr(ast.Constant()):
                    pass  # the text at the top
                case ast.Assign([ast.Name(name)], value) if name not in values:
                    values[name] = ast.literal_eval(value)
                case _:
                    raise ValueError
        except (ValueError, TypeError, RecursionError, MemoryError):
            allowed = (
                "only `name = value` may stand here, each name once, with a number, a text, True or False"
            )
            raise UserError(f"{path}:{node.lineno}: {allowed}") from None
    return values


def load_settings(arguments: list[str], cls: type, usage: str):
    """An instance of the dataclass `cls` from config files and --key=value; later ones win.

    Raises UserError.
    """
    types = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for argument in arguments:
        if argument in ("-h", "--help"):
            print_help(cls, usage)
            sys.exit()
        elif argument.startswith("--") and "=" in argument:
            key, text = argument[2:].split("=", 1)
            given = {key: text if types.get(key) is str else read_value(text)}
        elif argument.startswith("-"):
            raise UserError(f"{argument}: settings are given as --key=value")
        else:
            given = read_config(argument)
        for key, value in given.items():
            check_key(key, types, argument)
            if key == "max_iters":
                values.pop("epochs", None)  # both say how long to train: the later one wins
            values[key] = convert(key, value, types[key], argument)
    settings = cls(**values)
    check_ranges(settings)
    expand_paths(settings)
    return settings


def print_help(cls: type, usage: str) -> None:
    print(usage + "\nSettings and their defaults:")
    for field in dataclasses.fields(cls):
        print(f"    --{field.name}={field.default}")


def read_value(text: str):
    """The number, True or False that a text spells; else the text, which is then of the wrong type."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def check_key(key: str, types: dict, where: str) -> None:
    """Raise a UserError that names the closest setting if `key` is none."""
    if key in types:
        return
    closest = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
    if key in RENAMED:
        closest = [RENAMED[key]]
    hint = ""
    if key in SCRIPTS:
        hint = f"; it is a setting of {SCRIPTS[key]}"
    elif closest:
        hint = f"; did you mean {closest[0]!r}?"
    raise UserError(f"{where}: unknown key {key!r}{hint}")


def convert(key: str, value, wanted: type, where: str):
    """The value as a setting of type `wanted`. Only an int becomes a float. Raises UserError."""
    if wanted is float and type(value) is int and abs(value) < 1 << 1000:
        return float(value)
    if type(value) is not wanted:
        raise UserError(f"{where}: {key} must be of type {wanted.__name__}, not {value!r}")
    return value
