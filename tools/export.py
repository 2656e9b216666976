"""Take a checkpoint to Hugging Face's format, or bring one back. Needs safetensors (pip install safetensors).

    python -m tools.export --ckpt out/microstories --out_dir hf/microstories
    python -m tools.export --from_hf hf/microstories --out_dir out/back

The folder holds config.json, model.safetensors, the tokenizer with its chat template, generation_config.json
and a model card; transformers loads it as Qwen3 (with QK-norm) or Llama (without), and computes the same.
docs/export.md says how to load it there.
"""

import contextlib
import itertools
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import build_model, read_checkpoint
from common.files import (
    Parser,
    UserError,
    atomic_write,
    load_tokenizer,
    report_errors,
    resolve_folder,
    sync_folder,
)
from model import GPT, ModelConfig
from tools.plot import read_metrics

# The arguments of ModelConfig, and the keys of config.json.
SHAPE = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_embd": "hidden_size",
    "intermediate_size": "intermediate_size",
}
# Parts of a weight's name, here and there. All names there begin with "model.".
NAMES = {
    "embedding.": "embed_tokens.",
    "blocks.": "layers.",
    "attention_norm.": "input_layernorm.",
    "mlp_norm.": "post_attention_layernorm.",
    "attention.": "self_attn.",
}
METADATA = ("settings", "step", "template")  # of a checkpoint, in config.json for the way back
LARGEST = 1 << 20  # of the numbers in SHAPE
# The metrics that the model card shows, where a run has them.
METRICS = [
    "tokens",
    "loss",
    "val_loss",
    "val_perplexity",
    "val_bits_per_character",
    "val_accuracy",
    "val_margin",
]


# ---- To Hugging Face -------------------------------------------------------------------------------


def export(path: Path, out_dir: Path) -> None:
    """Write a folder for transformers, whole or not at all. Raises UserError."""
    from safetensors.torch import save

    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint, path)
    tokenizer = load_tokenizer(checkpoint["tokenizer"], f"{path} (tokenizer)")
    template = checkpoint.get("template", "")
    weights = {their_name(name): weight for name, weight in model.state_dict().items()}
    files = {
        "config.json": as_json(model_settings(model.config, tokenizer, checkpoint)),
        "generation_config.json": as_json(generation_settings(model.config, tokenizer)),
        "tokenizer.json": as_json(tokenizer_json(tokenizer, path), ensure_ascii=False),  # for people to read
        "tokenizer_config.json": as_json(tokenizer_settings(model.config, tokenizer, template)),
        "tokenizer.model": checkpoint["tokenizer"],
        "model.safetensors": save(weights, {"format": "pt"}),
        "README.md": model_card(path, checkpoint, model.count_parameters()).encode(),
    }
    with new_folder(out_dir) as folder:
        for name, content in files.items():
            with atomic_write(folder / name) as f:
                f.write(content)


def their_name(name: str) -> str:
    """The name of a weight in model.safetensors."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return f"model.{name}"


def as_json(content: dict, ensure_ascii: bool = True) -> bytes:
    """ASCII as a rule: a path among the settings need not be UTF-8."""
    return json.dumps(content, indent=2, ensure_ascii=ensure_ascii).encode() + b"\n"


def special_tokens(tokenizer) -> dict:
    """One token begins a text, where another has ended, ends it, and is the padding."""
    end = tokenizer.eos_id()
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


def model_settings(config: ModelConfig, tokenizer, checkpoint: dict) -> dict:
    """config.json; "microstories" holds what `bring_back` needs besides."""
    kind = "Llama"
    if config.qk_norm:
        kind = "Qwen3"
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        **{theirs: getattr(config, ours) for ours, theirs in SHAPE.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # where transformers 4 looks
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # and transformers 5
        "dtype": "float32",
        **special_tokens(tokenizer),
        "microstories": {name: checkpoint[name] for name in METADATA if name in checkpoint},
    }


def generation_settings(config: ModelConfig, tokenizer) -> dict:
    """generation_config.json: how transformers samples if it is not told otherwise."""
    return {
        **special_tokens(tokenizer),
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
        "max_new_tokens": config.block_size,  # a story ends before; by default transformers stops after 20
    }


def tokenizer_json(tokenizer, path: Path) -> dict:
    """A byte-fallback BPE of SentencePiece in the form of the `tokenizers` package.

    SentencePiece joins the neighbours whose union has the best rank; tokenizers joins the pair listed first.
    Raises UserError for a tokenizer that this form cannot express.
    """
    refusal = f"{path}: cannot be exported: its tokenizer"
    sample = "  Two  spaces, e\u0301 Ａ①ﬁ\u200b\t\r\n "  # what SentencePiece's normalisations change
    if tokenizer.normalize(sample) != sample.replace(" ", "▁"):
        raise UserError(f"{refusal} normalises text, or changes its spaces")
    if not tokenizer.is_byte(tokenizer.piece_to_id("<0x00>")):
        raise UserError(f"{refusal} has no bytes for unknown characters (byte_fallback)")

    vocabulary = {}
    special = []
    ranks: dict[str, int] = {}  # of the pieces of BPE; 0 is the best
    for i in range(tokenizer.vocab_size()):
        piece = tokenizer.id_to_piece(i)
        vocabulary[piece] = i
        if tokenizer.is_control(i) or tokenizer.is_unknown(i):
            special.append(
                {
                    "id": i,
                    "content": piece,
                    "special": True,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                }
            )
        elif not tokenizer.is_byte(i):
            if tokenizer.get_score(i) != -len(ranks):
                raise UserError(f"{refusal} is not a BPE, or has a piece that BPE did not make ({piece!r})")
            ranks[piece] = len(ranks)
    merges = [last_merge(piece, ranks) for piece in ranks if len(piece) > 1]

    to_spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {"type": "Sequence", "decoders": [to_spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [merge for merge in merges if merge is not None],
        },
    }


def last_merge(piece: str, ranks: dict[str, int]) -> list[str] | None:
    """The two pieces that BPE joins last to make this one; None if it never makes it.

    It joins the two neighbours whose union has the best rank, the leftmost of equals. Where a piece arises
    inside a longer text nothing reached across its ends, so it is joined from the same two in every text.
    """
    parts = list(piece)
    while len(parts) > 2:
        unions = [left + right for left, right in itertools.pairwise(parts)]
        best = min(unions, key=lambda union: ranks.get(union, math.inf))
        if best not in ranks:
            return None
        at = unions.index(best)
        parts[at : at + 2] = [best]
    return parts


def tokenizer_settings(config: ModelConfig, tokenizer, template: str) -> dict:
    """tokenizer_config.json, with a chat template if the model follows instructions."""
    end = tokenizer.id_to_piece(tokenizer.eos_id())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "padding_side": "left",  # or a story would begin after the padding of a shorter prompt
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "unk_token": tokenizer.id_to_piece(tokenizer.unk_id()),
    }
    if template:
        settings["chat_template"] = chat_template(template, end)
    return settings


def chat_template(template: str, end: str) -> str:
    """chat_template.jinja with the control tokens of a checkpoint's template."""
    before_instruction, rest = template.split("{instruction}")
    before_response = rest.removesuffix("{response}")
    jinja = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    jinja = jinja.replace("END_OF_TEXT", end)
    jinja = jinja.replace("BEFORE_INSTRUCTION", before_instruction)
    return jinja.replace("BEFORE_RESPONSE", before_response)


def model_card(path: Path, checkpoint: dict, parameters: int) -> str:
    """README.md: the model's size, the last metrics of its run, the settings it was trained with."""
    folder = path
    if not path.is_dir():
        folder = path.parent
    metrics = {}
    if (folder / "metrics.jsonl").exists():
        for line in read_metrics(folder / "metrics.jsonl"):
            if line["step"] <= checkpoint["step"]:
                metrics.update(line)

    facts = f"| parameters | {parameters:,} |\n| steps | {checkpoint['step']} |\n"
    for name in METRICS:
        if name in metrics:
            facts += f"| {name} | {round(metrics[name], 4):,} |\n"
    settings = ""
    for name, value in checkpoint["settings"].items():
        settings += f"    {name} = {value!r}\n"
    usage = ""
    if not checkpoint.get("template"):
        usage = "A story begins where another has ended: put the end token first.\n\n"
    return f"""\
---
language: zh
pipeline_tag: text-generation
library_name: transformers
---

# A model of Chinese micro-stories

{usage}| | |
| --- | --- |
{facts}
The settings it was trained with:

{settings}"""


# ---- From Hugging Face -----------------------------------------------------------------------------


def bring_back(folder: Path, out_dir: Path) -> None:
    """Write a checkpoint made of a Hugging Face folder of a Qwen3 or a Llama. Raises UserError."""
    shape, metadata = read_config(folder / "config.json")
    tokenizer_model = (folder / "tokenizer.model").read_bytes()
    n_pieces = load_tokenizer(tokenizer_model, folder / "tokenizer.model").vocab_size()
    vocab_size = shape["vocab_size"]
    if n_pieces != vocab_size:
        raise UserError(f"{folder}: {n_pieces:,} pieces in tokenizer.model, but vocab_size {vocab_size:,}")
    weights = read_weights(folder / "model.safetensors", ModelConfig(**shape))
    state = {"model": weights, "model_config": shape, "tokenizer": tokenizer_model} | metadata
    with new_folder(out_dir) as new, atomic_write(new / f"ckpt_{metadata['step']:06d}.pt") as f:
        torch.save(state, f)


def read_config(path: Path) -> tuple[dict, dict]:
    """The arguments of ModelConfig, and metadata of the checkpoint that was exported. Raises UserError."""
    content = path.read_bytes()
    try:
        config = json.loads(content)
        shape = read_shape(config)
        ModelConfig(**shape)  # raises ValueError for a shape that no model has
        saved = config.get("microstories", {})
        metadata = {"settings": {}, "step": 0}
        for name in METADATA:
            if name in saved:
                metadata[name] = saved[name]
    except Exception as e:  # what another program wrote can raise anything here
        raise UserError(f"{path}: not a model that can be read ({type(e).__name__}: {e})") from None
    return shape, metadata


def read_shape(config: dict) -> dict:
    """The arguments of ModelConfig. Raises ValueError for what this program does not compute."""
    kind = config.get("model_type")
    if kind not in ("qwen3", "llama"):
        raise ValueError(f"model_type = {kind!r}: this program has 'qwen3' and 'llama'")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act = {activation!r}: this program has only 'silu'")
    if config.get("use_sliding_window"):
        raise ValueError("use_sliding_window: this program attends to the whole text")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default" or not rope.keys() <= {"rope_type", "rope_theta"}:
        raise ValueError("rope_type, or a scaling of it: this program has only 'default'")
    if kind == "llama":  # the first ones did without these
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    shape: dict[str, Any] = {}
    for ours, theirs in SHAPE.items():
        value = config.get(theirs)
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise ValueError(f"{theirs} = {value!r}: must be a whole number from 1 to {LARGEST:,}")
        shape[ours] = value
    shape["norm_eps"] = float(config.get("rms_norm_eps", 1e-6))
    shape["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    shape["qk_norm"] = kind == "qwen3"
    return shape


def read_weights(path: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """All weights of the model by our names, in float32. Raises UserError if they are not of this shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise UserError(f"{path}: is missing (weights in several files cannot be read)")
    try:
        found = load_file(path)
    except SafetensorError as e:
        raise UserError(f"{path}: cannot be read ({e})") from None
    with torch.device("meta"):  # shapes without memory
        expected = GPT(config).state_dict()

    weights = {}
    for name, empty in expected.items():
        theirs = their_name(name)
        if theirs not in found or found[theirs].shape != empty.shape:
            raise UserError(f"{path}: {theirs} is missing, or has not the shape {tuple(empty.shape)}")
        weight = found.pop(theirs)
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{path}: {theirs} is {weight.dtype}; float32, bfloat16 and float16 can be read")
        weights[name] = weight.float()
    embedding = weights["embedding.weight"]
    head = found.pop("lm_head.weight", embedding)
    if not torch.equal(head.float(), embedding):
        raise UserError(f"{path}: the output matrix is not the embedding; this program has one for both")
    if found:
        raise UserError(f"{path}: {min(found)} is none of this model's weights")
    return weights


# ---- The folder ------------------------------------------------------------------------------------


def resolve_out_dir(path: Path) -> Path:
    """Where a new folder of this name will be, through links. Raises UserError if it cannot be."""
    final = resolve_folder(path)
    if final.exists():
        if any(final.iterdir()):
            raise UserError(f"{path}: is there already; choose another --out_dir")
        if os.path.ismount(final):
            raise UserError(f"{path}: is the root of a disk; choose a folder in it")
    parent = final.parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"{path}: {parent} is not a folder to write into; choose another --out_dir")
    return final


@contextlib.contextmanager
def new_folder(final: Path):
    """A folder to fill, which becomes `final` when the body ends: whole, or not at all."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{final.name}.", dir=final.parent) as beside:
        folder = Path(beside, final.name)
        folder.mkdir()
        yield folder
        os.replace(folder, final)  # the system refuses it if something has come to lie there
        sync_folder(final.parent)


# ---- The command -----------------------------------------------------------------------------------


def main() -> None:
    parser = Parser(description="To Hugging Face's format and back.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", type=Path, help="a checkpoint, or a run's folder for its newest")
    source.add_argument("--from_hf", type=Path, metavar="DIR", help="a Hugging Face folder to bring back")
    parser.add_argument("--out_dir", type=Path, required=True, help="a folder that is not there yet")
    args = parser.parse_args()
    out_dir = resolve_out_dir(args.out_dir)
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise UserError("safetensors is missing: pip install safetensors") from None
    if args.ckpt:
        export(args.ckpt, out_dir)
    else:
        bring_back(args.from_hf, out_dir)
    print(f"wrote {args.out_dir}")


if __name__ == "__main__":
    report_errors(main)
