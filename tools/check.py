"""Check every byte of a prepared folder or a checkpoint, before you trust a file that somebody gave you.

    python -m tools.check data/demo
    python -m tools.check out/demo              its newest checkpoint

It prints one line: "ok: ...", or "error: ..." with what is damaged and where (exit status 2). It runs no code from it.
"""

import hashlib
import json
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch

from common.checkpoint import find_checkpoints, read_checkpoint
from common.files import Parser, UserError, load_tokenizer, report_errors
from model import GPT, ModelConfig
from sft import add_lora
from stories.constraints import template_tokens
from train import LoopSettings, Muon, make_optimizers, open_tokens, read_meta

PIECE = 1 << 24  # tokens of a .bin file that are read at a time


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_types(where: Path | str, values, kinds: dict) -> None:
    """Raise a UserError that names the first entry that is missing or of another type."""
    for name, kind in kinds.items():
        fits = isinstance(values, dict) and type(values.get(name)) is kind
        require(fits, f"{where}: the entry {name!r} is missing or is not of type {kind.__name__}")


def check_tokenizer(model: bytes, vocab_size: int, template, where: Path | str) -> tuple[int, int | None]:
    """Does it load and decode its vocab_size pieces? Returns its end token, and the template's response token."""
    tokenizer = load_tokenizer(model, where)
    n = tokenizer.vocab_size()
    require(n == vocab_size, f"{where}: {n:,} pieces in the tokenizer; expected {vocab_size:,}")
    tokenizer.decode([[i] for i in range(n)])
    return tokenizer.eos_id(), None if template is None else template_tokens(template, tokenizer)[1][0]


def check_tokens(path: Path, meta: dict, response_token: int | None) -> None:
    """Compare a .bin file with meta.json. With response_token, instructions and responses must alternate."""
    tokens, end_token = open_tokens(path, meta), meta["end_token"]
    checksum, marks, stories = hashlib.sha256(), 0, 0
    for start in range(0, len(tokens), PIECE):
        part = tokens[start : start + PIECE]
        for i in np.flatnonzero(part >= meta["vocab_size"])[:1]:
            raise UserError(f"{path}: token number {start + i:,} is {part[i]}; the vocabulary is {meta['vocab_size']}")
        checksum.update(part.data)
        stories += int((part == end_token).sum())
        if response_token is not None:  # it and the end token must take turns
            at = np.flatnonzero((part == response_token) | (part == end_token))
            in_turn = np.where((np.arange(len(at)) + marks) % 2, end_token, response_token)
            for i in at[part[at] != in_turn][:1]:
                raise UserError(f"{path}: token number {start + i:,}: instructions and responses do not alternate")
            marks += len(at)
    expected = meta[path.stem]
    require(checksum.hexdigest() == expected["sha256"], f"{path}: its SHA-256 differs from meta.json's")
    require(tokens[-1] == end_token, f"{path}: the last story has no end token")
    require(stories == expected["stories"], f"{path}: {stories:,} stories; meta.json says {expected['stories']:,}")


def check_folder(folder: Path) -> str:
    path, (meta, model) = folder / "meta.json", read_meta(folder)
    check_types(path, meta, {"vocab_size": int, "end_token": int, "tokenizer_sha256": str, "train": dict, "val": dict})
    for split in (meta["train"], meta["val"]):
        check_types(path, split, {"stories": int, "tokens": int, "sha256": str})
    written = meta.pop("checksum", None)  # only older versions of prepare.py wrote one
    computed = hashlib.sha256(json.dumps(meta).encode()).hexdigest()
    require(written in (None, computed), f"{path}: its checksum differs")
    where, same = folder / "tokenizer.model", hashlib.sha256(model).hexdigest() == meta["tokenizer_sha256"]
    require(same, f"{where}: its SHA-256 differs from meta.json's")
    end_token, response_token = check_tokenizer(model, meta["vocab_size"], meta.get("template"), where)
    require(end_token == meta["end_token"], f"{path}: end_token is not that of tokenizer.model")
    for split in ("train", "val"):
        check_tokens(folder / f"{split}.bin", meta, response_token)
    return f"{folder}: {meta['train']['stories']:,} and {meta['val']['stories']:,} stories, {meta['vocab_size']} pieces"


def check_archive(path: Path) -> None:
    """Compare every entry of the file with its CRC, before PyTorch reads it."""
    with ZipFile(path) as archive:
        entries = archive.infolist()
        require(not any(entry.compress_type for entry in entries), f"{path}: compressed entries: could fill the memory")
        fits = sum(entry.file_size for entry in entries) <= path.stat().st_size
        require(fits, f"{path}: overlapping entries: could fill the memory")
        damaged = archive.testzip()
        require(damaged is None, f"{path}: wrong CRC of its entry {damaged}")


def check_tensor(where: str, value, shape: tuple[int, ...]) -> None:
    fits = value.dtype == torch.float32 and value.shape == shape
    require(fits, f"{where} is not a float32 tensor of {tuple(shape)}")
    require(bool(value.isfinite().all()), f"{where} holds a number that is not finite")


def check_optimizers(path: Path, checkpoint: dict, model: GPT) -> None:
    """Compare the moments with the parameters of `model`."""
    check_types(path, checkpoint, {"optimizers": list, "scaler": dict})
    settings = LoopSettings(optimizer=checkpoint["settings"]["optimizer"])
    optimizers = make_optimizers(model, settings, torch.float32)
    for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
        kind = type(optimizer).__name__
        names = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(parameters if saved["state"] else ()):  # float16 may have skipped all steps so far
            moments = saved["state"].get(i, {})
            require(moments.keys() == names, f"{path}: {kind} lacks a moment of parameter {i}")
            for name in names:
                where, shape = f"{path}: {name} of {kind}'s parameter {i}", () if name == "step" else p.shape
                check_tensor(where, moments[name], shape)


def check_checkpoint(path: Path) -> str:
    check_archive(path)
    checkpoint = read_checkpoint(path)
    check_types(path, checkpoint, {"model_config": dict, "settings": dict, "tokenizer": bytes, "step": int})
    for name, value in checkpoint["settings"].items():
        require(type(value) in (bool, int, float, str), f"{path}: the setting {name!r} is not text or a number")
    weights, config = checkpoint["model"], checkpoint["model_config"]
    stored = sum(weight.nbytes for weight in weights.values()) <= path.stat().st_size
    require(stored, f"{path}: its weights share what they store: loaded, they could fill the memory")
    n_layer = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    # Before a model is made: a claim of a billion layers would take for ever.
    require(config.get("n_layer") == n_layer, f"{path}: model_config has {config.get('n_layer')} layers, not {n_layer}")
    with torch.device("meta"):  # shapes without memory, whatever the file claims
        model = GPT(ModelConfig(**config))
        if "lora" in checkpoint:
            add_lora(model, checkpoint["lora"]["rank"], checkpoint["lora"]["alpha"])
    for name in weights.keys() ^ model.state_dict().keys():
        raise UserError(f"{path}: the weight {name} is missing, or not one of this model")
    for name, weight in model.state_dict().items():
        check_tensor(f"{path}: the weight {name}", weights[name], weight.shape)
    check_tokenizer(checkpoint["tokenizer"], config["vocab_size"], checkpoint.get("template"), f"{path} (tokenizer)")
    if "optimizers" in checkpoint:  # an exported or merged model has none
        check_optimizers(path, checkpoint, model)
    return f"{path}: step {checkpoint['step']:,}, {model.count_parameters():,} parameters"


def main() -> None:
    parser = Parser(description="Check a prepared folder or a checkpoint for damage.", allow_abbrev=False)
    parser.add_argument("path", type=Path, help="a prepared folder, a checkpoint, or a run's folder for its newest")
    path = parser.parse_args().path
    checkpoints = find_checkpoints(path) if path.is_dir() else [path]
    try:
        print(f"ok: {check_checkpoint(checkpoints[0]) if checkpoints else check_folder(path)}")
    except Exception as e:  # a damaged file can raise anything in what reads it
        if isinstance(e, UserError | OSError | MemoryError):
            raise
        raise UserError(f"{path}: damaged ({type(e).__name__}: {(str(e) or 'no reason').splitlines()[0]})") from None


if __name__ == "__main__":
    report_errors(main)
