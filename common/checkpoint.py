"""Checkpoints: one file holds the weights, the model's shape and the tokenizer, and so samples anywhere.

With the optimizers, the step and the settings beside them it also resumes. No file is trusted.
"""

import dataclasses
import math
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch

from common.files import atomic_write
from common.settings import UserError
from model import GPT, ModelConfig

# ---------------------------------------------------------------------------------------------------
# Find and read


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first. Their names are ckpt_ and the step."""
    numbered = [(int(m[1]), p) for p in folder.glob("ckpt_*.pt") if (m := re.fullmatch(r"ckpt_(\d+)\.pt", p.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def read_checkpoint(path: Path) -> dict:
    """Load a checkpoint onto the CPU; only tensors and plain values are accepted, never code.

    `path` is a file, or a folder, of which the newest checkpoint is read. Raises UserError.
    """
    if path.is_dir():
        checkpoints = find_checkpoints(path)
        if not checkpoints:
            raise UserError(f"{path}: no checkpoint (ckpt_*.pt) in this folder; has the training saved one?")
        path = checkpoints[0]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check the checksums
            members = archive.infolist()
            if any(m.compress_type for m in members) or sum(m.file_size for m in members) > path.stat().st_size:
                raise ValueError("compressed or overlapping entries")  # a small file could fill the memory
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: not a checkpoint, or one that would run code when loaded") from None
    except Exception as e:  # a damaged file can raise anything in the unpickler
        reason = str(e).split("\n")[0]
        raise UserError(f"{path}: not a checkpoint, or damaged ({reason}); use an older one") from None
    entries = {"model": dict, "model_config": dict, "settings": dict, "tokenizer": bytes, "step": int}
    for name, kind in entries.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), kind):
            raise UserError(f"{path}: not a checkpoint of this program ({name!r} is missing or not {kind.__name__})")
    settings, template = checkpoint["settings"], checkpoint.get("template", "")
    if not all(type(value) in (bool, int, float, str) for value in (*settings.values(), template)):
        raise UserError(f"{path}: not a checkpoint of this program (settings or template are not text and numbers)")
    if checkpoint["step"] < 0:
        raise UserError(f"{path}: not a checkpoint of this program (step {checkpoint['step']})")
    return checkpoint


def newest_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest complete checkpoint of a run; a damaged one is reported and skipped. None if there is none."""
    paths = find_checkpoints(folder)
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except UserError as e:
            if path == paths[-1]:
                raise
            print(f"{e}\nusing the one before", file=sys.stderr)
    return None


# ---------------------------------------------------------------------------------------------------
# The model


def merged_weights(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint; those with a LoRA adapter as W + (alpha / rank) B A.

    Raises KeyError, TypeError or ValueError for adapters that do not fit.
    """
    weights = dict(checkpoint["model"])
    if lora := checkpoint.get("lora"):
        scale = lora["alpha"] / lora["rank"]
        adapted = [name for name in weights if name.endswith(".parametrizations.weight.original")]
        if not adapted:
            raise ValueError("there are no adapters")
        for name in adapted:
            prefix = name.removesuffix("original")
            w, a, b = (weights.pop(prefix + part) for part in ("original", "0.A", "0.B"))
            if (a.shape, b.shape) != ((lora["rank"], w.size(1)), (w.size(0), lora["rank"])):
                raise ValueError(f"{prefix}: the adapter does not have rank {lora['rank']}")
            weights[prefix.removesuffix("parametrizations.weight.") + "weight"] = w + scale * (b @ a)  # (out, in)
    return weights


def build_model(checkpoint: dict, path: Path) -> GPT:
    """The model of a checkpoint, adapters merged, in float32 on the CPU. Raises UserError naming `path`."""
    try:
        config, weights = ModelConfig(**checkpoint["model_config"]), merged_weights(checkpoint)
        layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
        if len(layers) != config.n_layer:
            raise ValueError(f"the shape has {config.n_layer} layers, the weights {len(layers)}")
        # Before memory is allocated for a model: the config could claim a shape that no memory can hold.
        block = "blocks.0."
        shapes = {
            "embedding.weight": (config.vocab_size, config.n_embd),
            f"{block}attention.q_proj.weight": (config.n_head * config.head_dim, config.n_embd),
            f"{block}attention.k_proj.weight": (config.n_kv_head * config.head_dim, config.n_embd),
            f"{block}mlp.gate_proj.weight": (config.intermediate_size, config.n_embd),
        }
        for name, shape in shapes.items():
            if weights[name].shape != shape or weights[name].untyped_storage().nbytes() < 4 * math.prod(shape):
                raise ValueError(f"{name} is not a float32 tensor of {shape}")
        model = GPT(config)
        for name, weight in model.state_dict().items():
            saved = weights[name]
            if saved.shape != weight.shape or saved.dtype != torch.float32 or not saved.is_contiguous():
                raise ValueError(f"{name} is not a float32 tensor of {tuple(weight.shape)}")
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, ArithmeticError) as e:
        raise UserError(f"{path}: weights and shape do not fit ({str(e).splitlines()[0]})") from None
    return model


# ---------------------------------------------------------------------------------------------------
# Save and resume


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint atomically. Raises UserError."""
    try:
        with atomic_write(path) as f:
            torch.save(state, f)
    except (OSError, RuntimeError) as e:
        reason = getattr(e, "strerror", None) or getattr(e.__context__, "strerror", None) or str(e).splitlines()[0]
        raise UserError(f"{path}: not saved ({reason}); older ones are intact, continue with --resume=True") from e


def checkpoint_to_resume(s, model: GPT, metadata: dict) -> dict | None:
    """The newest complete checkpoint in s.out_dir, checked to be of this run; None if there is none.

    Raises UserError for a folder with a run when s.resume is False, and for a run with another shape, other data
    or another value of a `fixed` setting.
    """
    out_dir = Path(s.out_dir)
    if not s.resume and (checkpoints := find_checkpoints(out_dir)):
        raise UserError(f"{out_dir}: holds a run ({checkpoints[0].name}); add --resume=True or choose another out_dir")
    path, state = newest_checkpoint(out_dir) or (None, None)
    if not state:
        return None
    for field in dataclasses.fields(s):
        # A setting newer than the checkpoint: its default is how training was before.
        now, then = getattr(s, field.name), state["settings"].get(field.name, field.default)
        if field.metadata.get("fixed") and now != then:
            raise UserError(f"{field.name} = {now!r}: {path} has {then!r}; use that")
    if state["model_config"] != dataclasses.asdict(model.config):
        raise UserError(f"{path}: the model there has another shape or vocabulary; choose another out_dir")
    for name, value in metadata.items():
        if state.get(name) != value:
            raise UserError(f"{path}: that run used another {name} than {s.data_dir}; choose another out_dir")
    return state
