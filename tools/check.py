"""Check a prepared folder or a checkpoint fully, before you trust a file that somebody gave you.

    python -m tools.check data/demo
    python -m tools.check out/demo              its newest checkpoint

It prints one line: "ok: ...", or "error: ..." with what is damaged and where (exit status 2). It runs no code
from the file.
"""

import hashlib
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch

from common.checkpoint import find_checkpoints, read_checkpoint
from common.files import Parser, UserError, load_tokenizer, report_errors
from model import GPT, ModelConfig
from sft import add_lora
from stories.constraints import template_tokens
from train import open_tokens, read_meta


def check(path: Path) -> str:
    """Returns what the folder or file holds. Raises UserError, or what damage raises where it is read."""
    if path.is_dir():
        checkpoints = find_checkpoints(path)
        if not checkpoints:
            return check_data(path)
        path = checkpoints[0]
    return check_checkpoint(path)


# ---- Prepared data ---------------------------------------------------------------------------------


def check_data(folder: Path) -> str:
    meta, tokenizer_model = read_meta(folder)
    where = folder / "tokenizer.model"
    if hashlib.sha256(tokenizer_model).hexdigest() != meta["tokenizer_sha256"]:
        raise UserError(f"{where}: its SHA-256 differs from meta.json's")
    tokenizer = load_tokenizer(tokenizer_model, where)
    if (tokenizer.vocab_size(), tokenizer.eos_id()) != (meta["vocab_size"], meta["end_token"]):
        raise UserError(f"{where}: meta.json has another vocab_size or end_token")
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        tokens = open_tokens(path, meta)
        check_tokens(path, tokens, meta)
        if meta.get("template") is not None:
            check_order(path, tokens, meta["template"], tokenizer)
    stories = f"{meta['train']['stories']:,} and {meta['val']['stories']:,} stories"
    return f"{folder}: {stories}, {meta['vocab_size']} pieces"


def check_tokens(path: Path, tokens: np.ndarray, meta: dict) -> None:
    """Compare the tokens of a .bin file with meta.json."""
    if tokens.max() >= meta["vocab_size"]:
        i = int(np.argmax(tokens >= meta["vocab_size"]))  # the first
        raise UserError(f"{path}: token number {i:,} is {tokens[i]}; the vocabulary is {meta['vocab_size']}")
    if hashlib.sha256(tokens.data).hexdigest() != meta[path.stem]["sha256"]:
        raise UserError(f"{path}: its SHA-256 differs from meta.json's")


def check_order(path: Path, tokens: np.ndarray, template: str, tokenizer) -> None:
    """The token before a response and the end token must take turns, and the last is an end token."""
    _, (response_token,) = template_tokens(template, tokenizer)
    marks = tokens[(tokens == response_token) | (tokens == tokenizer.eos_id())]
    out_of_turn = (marks[0::2] != response_token).any() or (marks[1::2] == response_token).any()
    if out_of_turn or len(marks) % 2 == 1:
        raise UserError(f"{path}: instructions and responses do not alternate")


# ---- Checkpoints -----------------------------------------------------------------------------------


def check_checkpoint(path: Path) -> str:
    check_archive(path)
    checkpoint = read_checkpoint(path)
    template = checkpoint.get("template", "")
    for name, value in {**checkpoint["settings"], "template": template}.items():
        if not isinstance(value, str | int | float):  # nested lists can be endless
            raise UserError(f"{path}: the entry {name!r} is not text or a number")
    model = model_without_weights(path, checkpoint)
    check_weights(path, checkpoint["model"], model.state_dict())
    tokenizer = load_tokenizer(checkpoint["tokenizer"], f"{path} (tokenizer)")
    if tokenizer.vocab_size() != model.config.vocab_size:
        both = f"{tokenizer.vocab_size():,} pieces, the model {model.config.vocab_size:,}"
        raise UserError(f"{path}: the tokenizer has {both}")
    if template:
        template_tokens(template, tokenizer)  # raises UserError
    return f"{path}: step {checkpoint['step']:,}, {model.count_parameters():,} parameters"


def check_archive(path: Path) -> None:
    """Compare every entry of the file with its CRC, before PyTorch reads it."""
    with ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:  # compressed, or overlapping
            raise UserError(f"{path}: its entries are larger than the file: they could fill the memory")
        damaged = archive.testzip()
    if damaged is not None:
        raise UserError(f"{path}: wrong CRC of its entry {damaged}")


def model_without_weights(path: Path, checkpoint: dict) -> GPT:
    """The model that a checkpoint describes, on the device "meta": shapes without memory."""
    config = checkpoint["model_config"]
    layers = {name.split(".")[1] for name in checkpoint["model"] if name.startswith("blocks.")}
    if len(layers) != config["n_layer"]:  # a claim of a billion layers would take for ever
        raise UserError(f"{path}: model_config has {config['n_layer']} layers, not {len(layers)}")
    with torch.device("meta"):
        model = GPT(ModelConfig(**config))
        if "lora" in checkpoint:
            add_lora(model, **checkpoint["lora"])
    return model


def check_weights(path: Path, weights: dict, expected: dict) -> None:
    """Compare names, types and shapes with those of a model; all numbers must be finite."""
    if sum(weight.nbytes for weight in weights.values()) > path.stat().st_size:
        raise UserError(f"{path}: its weights share what they store: loaded, they could fill the memory")
    different = weights.keys() ^ expected.keys()
    if different:
        raise UserError(f"{path}: the weight {min(different)} is missing, or not one of this model")
    for name, weight in weights.items():
        where = f"{path}: the weight {name}"
        if weight.dtype != torch.float32 or weight.shape != expected[name].shape:
            raise UserError(f"{where} is not a float32 tensor of {tuple(expected[name].shape)}")
        if not weight.isfinite().all():
            raise UserError(f"{where} holds a number that is not finite")


def main() -> None:
    parser = Parser(description="Check a prepared folder or a checkpoint for damage.", allow_abbrev=False)
    parser.add_argument("path", type=Path, help="a prepared folder, a checkpoint, or a run's folder")
    path = parser.parse_args().path
    try:
        print(f"ok: {check(path)}")
    except (UserError, OSError, MemoryError):
        raise
    except Exception as e:  # a damaged file can raise anything in what reads it
        reason = str(e).split("\n")[0]
        raise UserError(f"{path}: damaged ({type(e).__name__}: {reason})") from None


if __name__ == "__main__":
    report_errors(main)
