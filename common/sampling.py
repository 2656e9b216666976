"""What sample.py and the tools share: opening a model, and the options of sampling."""

import argparse
from pathlib import Path
from typing import Any

from common.checkpoint import build_model, choose_device, choose_dtype, read_checkpoint
from common.files import UserError, load_tokenizer
from model import GPT


def open_model(path: Path, device_name: str, dtype_name: str) -> tuple[GPT, Any, dict]:
    """The model of a checkpoint on the device asked for, its tokenizer, and the whole checkpoint.

    Raises UserError.
    """
    device = choose_device(device_name)
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint, path).to(device, choose_dtype(dtype_name, device)).eval()
    tokenizer = load_tokenizer(checkpoint["tokenizer"], f"{path} (tokenizer)")
    if tokenizer.vocab_size() != model.config.vocab_size:
        raise UserError(f"{path}: the tokenizer in it has not as many pieces as the model")
    return model, tokenizer, checkpoint


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    types = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=types, help="of the weights; auto: the fastest")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options that `sample.generate` takes, for every program that samples."""
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token")
    parser.add_argument(
        "--top_k", type=int, default=50, help="sample from the k most likely tokens; 0: from all"
    )
    parser.add_argument(
        "--top_p", type=float, default=0.95, help="sample from the most likely that hold this share"
    )
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1.0: avoid what has occurred"
    )
    parser.add_argument("--seed", type=int, default=1337, help="the same seed gives the same stories")
    parser.add_argument(
        "--compile", action="store_true", help="compile first: then one story at a time is faster"
    )


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of these options, checked, as arguments of `sample.generate`. Raises UserError."""
    for name in ("temperature", "top_k", "seed"):
        value = getattr(args, name)
        if not 0 <= value < 2**63:
            raise UserError(f"--{name} {value}: must be at least 0 and below 2**63")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p}: must lie above 0 and be at most 1")
    if not 0.01 <= args.repetition_penalty <= 100:
        raise UserError(f"--repetition_penalty {args.repetition_penalty}: must lie between 0.01 and 100")
    return {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "compile": args.compile,
    }
