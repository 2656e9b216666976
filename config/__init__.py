"""Settings: what there is to set, read from files of plain assignments and from --key=value.

Parsed and checked, never executed.
"""

import ast
import dataclasses
import difflib
import importlib.util
import operator
import sys
import typing
from dataclasses import dataclass

from errors import UserError


@dataclass
class LoopSettings:
    """What the training loop is told, in a config file or as --key=value. Each script adds its own keys."""

    data_dir: str = "data/demo"
    out_dir: str = "out/demo"
    resume: bool = False  # go on from the newest checkpoint in out_dir
    # A step: gradient_accumulation_steps micro-batches of batch_size sequences of block_size tokens
    block_size: int = 256
    batch_size: int = 32
    gradient_accumulation_steps: int = 1  # over all processes together
    max_iters: int = 1000
    epochs: float = 0.0  # above 0: train for so many passes over the data, in place of max_iters
    # The optimizer
    optimizer: str = "muon"  # muon | adamw
    learning_rate: float = 0.003
    min_lr: float = 0.0
    warmup_iters: int = 20
    schedule: str = "linear"  # linear: hold, then fall over the cooldown | cosine
    cooldown: float = 0.5  # a share of the steps after the warm-up
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # 0: none
    # Every so many steps
    log_interval: int = 10
    eval_interval: int = 100
    eval_blocks: int = 64  # validation sequences, always the same
    sample_interval: int = 0  # tell a story; 0: never
    save_interval: int = 100
    logger: str = ""  # tensorboard | wandb: shows the lines of metrics.jsonl as curves; empty: none
    # The machine
    device: str = "auto"  # auto | cuda | cuda:1 | mps | cpu
    dtype: str = "auto"  # auto | bfloat16 | float16 | float32
    compile: bool = True
    deterministic: bool = True  # the same bits every time; costs nothing measurable on a CPU
    seed: int = 1337

    def __post_init__(self):
        """Check the ranges. Raises UserError naming the key."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 1 if field.type is int and field.default and field.name not in ("warmup_iters", "seed") else 0
            if field.type in (int, float) and not least <= value < 2**63:
                raise UserError(f"{field.name} = {value}: must be at least {least} and below 2**63")
        if self.cooldown > 1 or self.beta1 >= 1 or self.beta2 >= 1:
            raise UserError("cooldown must be at most 1, beta1 and beta2 below 1")
        choices: dict[str, tuple[str, ...]] = {"optimizer": ("muon", "adamw"), "schedule": ("linear", "cosine")}
        choices |= {"dtype": ("auto", "bfloat16", "float16", "float32"), "logger": ("", "tensorboard", "wandb")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(map(repr, known))}")
        if self.logger and not importlib.util.find_spec(self.logger):
            raise UserError(f"logger = {self.logger!r}: not installed; try: pip install {self.logger}")


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
        with open(path, "rb") as f:
            text = f.read((1 << 20) + 1)
        if len(text) > 1 << 20:
            raise ValueError("over a megabyte: no settings")
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
                    values[name] = value_of(value)
                case _:
                    raise ValueError
        except (ValueError, ArithmeticError, TypeError, RecursionError):
            raise UserError(
                f"{path}:{node.lineno}: only `name = value` may stand here, with numbers, text, True or False"
            ) from None
    return values


def load_settings(arguments: list[str], cls: type, usage: str):
    """Settings from a command line: config files, then --key=value, each overriding what came before."""
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
            values.pop("epochs", None)  # of the two that say how long to train the later holds
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
