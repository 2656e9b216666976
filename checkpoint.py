"""Checkpoints: one file holds the weights, the shape and the tokenizer, and so samples anywhere.

With the optimizer, the step and the settings beside them it also resumes. Nothing here trusts a file.
"""

import dataclasses
import json
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch

from config import LoopSettings
from disk import replacing
from errors import UserError
from lora import add_lora, merge_lora
from model import GPT, ModelConfig
from muon import Muon


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first. Their names are ckpt_ and the step."""
    numbered = [(int(m[1]), p) for p in folder.glob("ckpt_*.pt") if (m := re.fullmatch(r"ckpt_(\d+)\.pt", p.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def read_checkpoint(path: Path) -> dict:
    """Load a checkpoint onto the CPU; only tensors and plain values are let in, never code.

    `path` is a file, or a folder whose newest checkpoint is meant. Raises UserError.
    """
    if path.is_dir():
        found = find_checkpoints(path)
        if not found:
            raise UserError(f"{path}: no checkpoint (ckpt_*.pt) in this folder; has the training saved one?")
        path = found[0]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            members = archive.infolist()
            if any(m.compress_type for m in members) or sum(m.file_size for m in members) > path.stat().st_size:
                raise ValueError("compressed parts, or parts that overlap")  # a small file that fills the memory
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: not a checkpoint, or one that would run code when loaded") from None
    except Exception as e:  # what a damaged file makes of the unpickler cannot be foreseen
        reason = str(e).split("\n")[0]
        raise UserError(f"{path}: not a checkpoint, or damaged ({reason}); use an older one") from None
    parts = {"model": dict, "model_config": dict, "settings": dict, "tokenizer": bytes, "step": int}
    for name, kind in parts.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), kind):
            raise UserError(f"{path}: not a checkpoint of this program ({name!r} is missing or no {kind.__name__})")
    settings, template = checkpoint["settings"], checkpoint.get("template", "")
    if not all(type(value) in (bool, int, float, str) for value in (*settings.values(), template)):
        raise UserError(f"{path}: not a checkpoint of this program (settings or template are no text and numbers)")
    if checkpoint["step"] < 0:
        raise UserError(f"{path}: not a checkpoint of this program (step {checkpoint['step']})")
    return checkpoint


def build_model(checkpoint: dict, path: Path) -> GPT:
    """The model a checkpoint holds, adapters merged, in float32 on the CPU. Raises UserError naming `path`."""
    try:
        config = ModelConfig(**checkpoint["model_config"])
        layers = {name.split(".")[1] for name in checkpoint["model"] if name.startswith("blocks.")}
        if len(layers) != config.n_layer:
            raise ValueError(f"{config.n_layer} layers are told of, but {len(layers)} are there")
        lora = checkpoint.get("lora")
        # First without memory ("meta"): the shape told of may be too large for any machine, the weights are not.
        for device in ("meta", "cpu"):
            with torch.device(device):
                model = GPT(config)
                if lora:
                    add_lora(model, lora["rank"], lora["alpha"])
            for name, weight in model.state_dict().items():
                there = checkpoint["model"][name]
                if there.shape != weight.shape or there.dtype != torch.float32 or not there.is_contiguous():
                    raise ValueError(f"{name} is no float32 tensor of {tuple(weight.shape)}")
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, ArithmeticError) as e:
        raise UserError(f"{path}: weights and shape do not fit ({str(e).splitlines()[0]})") from None
    if lora:
        merge_lora(model)
    return model.requires_grad_(True)


def newest_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint of a run; a damaged one is told of and passed over. None: there are none."""
    found = find_checkpoints(folder)
    for path in found:
        try:
            return path, read_checkpoint(path)
        except UserError as e:
            if path == found[-1]:
                raise
            print(f"{e}\ntaking the one before", file=sys.stderr)
    return None


def state_to_resume(s: LoopSettings, model: GPT, parts: dict) -> dict | None:
    """The newest whole checkpoint in out_dir, checked to be of this run; None where there is none."""
    out_dir = Path(s.out_dir)
    if not s.resume and (found := find_checkpoints(out_dir)):
        raise UserError(f"{out_dir}: holds a run ({found[0].name}); add --resume=True or choose another out_dir")
    path, state = newest_checkpoint(out_dir) or (None, None)
    if not state:
        return None
    fixed = ["block_size", "batch_size", "gradient_accumulation_steps", "seed", "document_mask"]
    fixed += ["optimizer", "weight_decay", "beta1", "beta2", "lora_rank", "lora_alpha"]
    fixed += ["loss", "beta", "label_smoothing", "simpo_gamma", "nll_weight"]
    for key in fixed:
        now, then = getattr(s, key, None), state["settings"].get(key)
        if now != then:
            raise UserError(f"{key} = {now!r}: {path} has {then!r}; keep that")
    if state["model_config"] != dataclasses.asdict(model.config):
        raise UserError(f"{path}: the model there has another shape or vocabulary; choose another out_dir")
    for name, part in parts.items():
        if state.get(name) != part:
            raise UserError(f"{path}: that run used another {name} than {s.data_dir}; choose another out_dir")
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Give an optimizer the moments of a checkpoint, but nothing else that its file tells. Raises ValueError."""
    own = optimizer.state_dict()["param_groups"]
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    names = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
    for i, p in enumerate(learned if saved["state"] else ()):  # float16 may have skipped all steps so far
        moments = saved["state"].get(i)
        if not isinstance(moments, dict) or moments.keys() != names:
            raise ValueError(f"no moments of weight {i}")
        for name, value in moments.items():
            if value.shape != (() if name == "step" else p.shape):
                raise ValueError(f"{name} of weight {i} has another shape")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint; at every moment a complete one exists. Raises UserError."""
    try:
        with replacing(path) as f:
            torch.save(state, f)
    except (OSError, RuntimeError) as e:
        reason = getattr(e, "strerror", None) or getattr(e.__context__, "strerror", None) or str(e).splitlines()[0]
        raise UserError(f"{path}: not saved ({reason}); older ones are whole, go on with --resume=True") from e


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, so that the curve of a resumed run never doubles back, and what is no line."""

    def belongs(line: bytes) -> bool:
        try:
            return line.endswith(b"}\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        with replacing(path) as f:
            f.writelines(filter(belongs, lines))
