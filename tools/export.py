"""Take a checkpoint to Hugging Face's format, or bring one back. Needs safetensors (pip install safetensors).

    python -m tools.export --ckpt out/microstories --out_dir hf/microstories
    python -m tools.export --from_hf hf/microstories --out_dir out/back

The folder holds config.json, model.safetensors, the tokenizer with its chat template, generation_config.json and
a model card; transformers loads it as Qwen3 (with QK-norm) or Llama (without), and computes the same.
docs/export.md says how to load it there.
"""

import contextlib
import itertools
import json
import math
import os
import tempfile
from pathlib import Path

import torch

from common.checkpoint import build_model, read_checkpoint
from common.files import Parser, UserError, atomic_write, load_tokenizer, report_errors, sync_folder
from model import GPT, ModelConfig
from stories.constraints import template_tokens
from tools.plot import read_metrics

# Ours to theirs, replaced one after the other.
NAMES = {
    "embedding.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    "attention_norm.": "input_layernorm.",
    "mlp_norm.": "post_attention_layernorm.",
    "attention.": "self_attn.",
}
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
# What their configs may say, and the only values this program has; the first is written.
FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}
METADATA = {"settings": dict, "step": int, "template": str}  # of a checkpoint, in config.json, for the way back


def their_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return f"model.{name}" if name == "norm.weight" else name


@contextlib.contextmanager
def new_folder(path: Path):
    """A folder to fill, which becomes `path` when the body ends: whole, or not at all."""
    final = Path(os.path.abspath(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{final.name}.", dir=final.parent) as beside:
        folder = Path(beside, final.name)
        folder.mkdir()
        yield folder
        os.replace(folder, final)  # the system refuses it if something has come to lie there
        sync_folder(final.parent)


# ---- Out -------------------------------------------------------------------------------------------


def last_merge(piece: str, scores: dict[str, float]) -> list[str] | None:
    """The two pieces that BPE joins last to make this one; None if it never makes it.

    It joins the two neighbours whose union has the best score, the leftmost of equals. Where a piece arises inside
    a longer text nothing reached across its ends, so what it was joined from is the same in every text.
    """
    parts = list(piece)
    while len(parts) > 2:
        unions = [a + b for a, b in itertools.pairwise(parts)]
        best = max(range(len(unions)), key=lambda i: scores.get(unions[i], -math.inf))
        if unions[best] not in scores:
            return None
        parts[best : best + 2] = [unions[best]]
    return parts


def tokenizer_json(tokenizer, path: Path) -> dict:
    """A byte-fallback BPE of SentencePiece as the `tokenizers` package writes it. Raises UserError.

    SentencePiece goes by the score of what two neighbours become, tokenizers by the place of the pair in a list.
    """
    ids = range(tokenizer.vocab_size())
    pieces = [tokenizer.id_to_piece(i) for i in ids]
    special = [i for i in ids if tokenizer.is_control(i) or tokenizer.is_unknown(i)]
    rest = set(ids).difference(special, filter(tokenizer.is_byte, ids))
    scores = {pieces[i]: tokenizer.get_score(i) for i in rest}
    ranked = sorted(scores, key=lambda piece: -scores[piece])
    # BPE numbers its pieces; a piece the user defined, or another algorithm, has other scores.
    ours = [scores[piece] for piece in ranked] == [-i for i in range(len(rest))]
    ours &= set("".join(ranked)) <= scores.keys() - {" "}  # each of its characters is one too
    # All characters but the one that stands for a space, two that have a composed form, and spaces in odd places.
    text = "".join(map(chr, [*range(0x2581), *range(0x2582, 0xD800), *range(0xE000, 0x30000)]))
    text = f"  {text}e\u0301  \n "
    ours &= tokenizer.decode(tokenizer.encode(text)) == text
    ours &= "▁" not in "".join(tokenizer.encode("从", out_type=str))
    if not ours or any(map(tokenizer.is_unused, ids)):
        raise UserError(f"{path}: cannot be exported: its tokenizer is not a byte-fallback BPE that is lossless")
    merges = [merge for piece in ranked if len(piece) > 1 and (merge := last_merge(piece, scores))]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spaces = [{"type": "Replace", "pattern": {"String": a}, "content": b} for a, b in ((" ", "▁"), ("▁", " "))]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i], **plain} for i in special],
        "normalizer": spaces[0],
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [spaces[1], {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "unk_token": pieces[tokenizer.unk_id()],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def chat_template(template: str, tokenizer) -> str:
    """Jinja for what a checkpoint's template says: a text begins where another has ended."""
    end = tokenizer.id_to_piece(tokenizer.eos_id())
    before, after = ("".join(map(tokenizer.id_to_piece, ids)) for ids in template_tokens(template, tokenizer))
    return (
        f"{end}{{%- for message in messages -%}}{{%- if message['role'] not in ('user', 'assistant') -%}}"
        f"{{{{- raise_exception('there are only user and assistant, no ' + message['role']) -}}}}{{%- endif -%}}"
        f"{{%- set content = message['content'] -%}}{{%- if content is not string -%}}{{%- for part in content -%}}"
        f"{{%- if part['type'] != 'text' -%}}{{{{- raise_exception('only text, no ' + part['type']) -}}}}"
        f"{{%- endif -%}}{{%- endfor -%}}{{%- set content = content | map(attribute='text') | join -%}}{{%- endif -%}}"
        f"{{%- if message['role'] == 'user' -%}}{before}{{{{- content | trim -}}}}"
        f"{{%- else -%}}{after}{{{{- content | trim -}}}}{end}{{%- endif -%}}"
        f"{{%- endfor -%}}{{%- if add_generation_prompt -%}}{after}{{%- endif -%}}"
    )


def model_card(path: Path, checkpoint: dict, parameters: int) -> str:
    """Facts about a checkpoint: its size, its settings, and the last metrics of its run."""
    metrics = (path if path.is_dir() else path.parent) / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.exists() else []
    last = {k: v for line in lines if line["step"] <= checkpoint["step"] for k, v in line.items()}
    rows = {"parameters": parameters, "steps": checkpoint["step"]}
    names = ("tokens", "loss", "val_loss", "val_perplexity", "val_bits_per_character", "val_accuracy", "val_margin")
    rows |= {name: last[name] for name in names if last.get(name) is not None}
    table = "\n".join(f"| {k} | {f'{v:,}' if isinstance(v, int) else f'{v:.4f}'} |" for k, v in rows.items())
    settings = "\n".join(f"    {name} = {value!r}" for name, value in checkpoint["settings"].items())
    usage = "" if checkpoint.get("template") else "A story begins where another has ended: put the end token first.\n\n"
    return (
        "---\nlanguage: zh\npipeline_tag: text-generation\nlibrary_name: transformers\n---\n\n# A model of Chinese "
        f"micro-stories\n\n{usage}| | |\n| --- | --- |\n{table}\n\nThe settings it was trained with:\n\n{settings}\n"
    )


def export(path: Path, out_dir: Path) -> None:
    """Write the folder, whole or not at all. Raises UserError."""
    from safetensors.torch import save

    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint, path)
    tokenizer, c = load_tokenizer(checkpoint["tokenizer"], f"{path} (tokenizer)"), model.config
    if tokenizer.vocab_size() != c.vocab_size:
        raise UserError(f"{path}: {tokenizer.vocab_size():,} pieces in the tokenizer, {c.vocab_size:,} in the model")
    end, kind = tokenizer.eos_id(), "Qwen3" if c.qk_norm else "Llama"
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        **{theirs: getattr(c, ours) for ours, theirs in SHAPE.items()},
        **{name: values[0] for name, values in FIXED.items()},
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,  # once here, and once where transformers 5 looks
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": True,
        "dtype": "float32",
        **ids,
        "microstories": {name: checkpoint[name] for name in METADATA if name in checkpoint},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.block_size}
    settings |= {"clean_up_tokenization_spaces": False, "add_prefix_space": False}
    settings |= {"padding_side": "left"}  # or a story would begin after the padding of a shorter prompt
    names = {"bos_token": end, "eos_token": end, "pad_token": end, "unk_token": tokenizer.unk_id()}
    settings |= {name: tokenizer.id_to_piece(i) for name, i in names.items()}
    if checkpoint.get("template"):
        settings["chat_template"] = chat_template(checkpoint["template"], tokenizer)
    how = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "max_length": c.block_size}
    files: dict[str, dict | bytes] = {
        "config.json": config,
        "generation_config.json": ids | how,
        "tokenizer.json": tokenizer_json(tokenizer, path),
        "tokenizer_config.json": settings,
        "README.md": model_card(path, checkpoint, model.count_parameters()).encode(),
        "tokenizer.model": checkpoint["tokenizer"],
        "model.safetensors": save({their_name(n): w for n, w in model.state_dict().items()}, {"format": "pt"}),
    }
    with new_folder(out_dir) as folder:
        for name, content in files.items():
            if isinstance(content, dict):  # pieces can be read; a path among the settings need not be UTF-8
                content = json.dumps(content, indent=2, ensure_ascii=name != "tokenizer.json").encode() + b"\n"
            with atomic_write(folder / name) as f:
                f.write(content)


# ---- Back ------------------------------------------------------------------------------------------


def read_config(path: Path) -> tuple[dict, dict, bool]:
    """Of a config.json: the model's shape, the metadata of its checkpoint, whether its output matrix is its embedding.
    Raises UserError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        for name, values in (FIXED | {"model_type": ("qwen3", "llama")}).items():
            if config.get(name) not in values:
                raise ValueError(f"{name} = {config.get(name)!r}: this program has only {values[0]!r}")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.keys() - {"rope_type", "rope_theta"} or rope.get("rope_type", "default") != "default":
            raise ValueError("rope_type or a scaling of it: this program has only 'default'")
        if config["model_type"] == "llama":  # the first ones did without these
            config.setdefault("num_key_value_heads", config["num_attention_heads"])
            config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        shape = {ours: config[theirs] for ours, theirs in SHAPE.items()}
        for name, value in shape.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{SHAPE[name]} = {value!r}: must be a whole number above 0")
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        shape |= {"norm_eps": float(config["rms_norm_eps"]), "rope_theta": float(theta)}
        shape |= {"qk_norm": config["model_type"] == "qwen3"}
        ModelConfig(**shape)  # raises ValueError for a shape that no model has
        metadata = {"settings": {}, "step": 0}
        metadata |= {name: value for name, value in config.get("microstories", {}).items() if name in METADATA}
        for name, value in metadata.items():
            if type(value) is not METADATA[name]:
                raise ValueError(f"microstories: {name} = {value!r}: must be of type {METADATA[name].__name__}")
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
        reason = f"{e} is missing" if isinstance(e, KeyError) else str(e).splitlines()[0]
        raise UserError(f"{path}: not a model that can be read ({reason})") from None
    return shape, metadata, config.get("tie_word_embeddings") is True


def bring_back(folder: Path, out_dir: Path) -> None:
    """Write a checkpoint made of a Hugging Face folder of a Qwen3 or a Llama. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    shape, metadata, tied = read_config(folder / "config.json")
    file, tokenizer_file = folder / "model.safetensors", folder / "tokenizer.model"
    for path in (file, tokenizer_file):
        if not path.exists():
            raise UserError(f"{path}: is missing; this program needs it (weights in several files cannot be read)")
    tokenizer = load_tokenizer(proto := tokenizer_file.read_bytes(), tokenizer_file)
    if tokenizer.vocab_size() != shape["vocab_size"]:
        both = f"{tokenizer.vocab_size():,} pieces in the tokenizer, {shape['vocab_size']:,} in the model"
        raise UserError(f"{folder}: {both}; this program needs as many")
    try:
        if "template" in metadata:
            template_tokens(metadata["template"], tokenizer)
        weights = load_file(file)
    except (UserError, SafetensorError, ValueError, RuntimeError) as e:
        raise UserError(f"{folder}: cannot be read ({str(e).splitlines()[0]})") from None
    head, embedding = weights.pop("lm_head.weight", None), weights.get("model.embed_tokens.weight")
    if embedding is None or not (tied if head is None else torch.equal(head, embedding)):
        raise UserError(f"{file}: the output matrix is not the embedding; this program has one for both")
    if f"model.layers.{shape['n_layer'] - 1}.mlp.up_proj.weight" not in weights:  # before so many layers are made
        raise UserError(f"{file}: has not the {shape['n_layer']} layers that config.json says")
    try:
        with torch.device("meta"):  # shapes without memory, whatever the file claims
            expected = GPT(ModelConfig(**shape)).state_dict()
    except (RuntimeError, TypeError) as e:
        raise UserError(f"{folder}: weights and config.json do not fit ({str(e).splitlines()[0]})") from None
    sizes = {their_name(name): weight.shape for name, weight in expected.items()}
    for name, size in sorted(sizes.items() ^ {name: weight.shape for name, weight in weights.items()}.items()):
        raise UserError(f"{file}: {name} of shape {tuple(size)} is missing, or is none of this model's weights")
    for name, weight in weights.items():
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{file}: {name} is {weight.dtype}; float32, bfloat16 and float16 can be read")
    state = {"model": {name: weights[their_name(name)].float() for name in expected}, "model_config": shape}
    with new_folder(out_dir) as new, atomic_write(new / f"ckpt_{metadata['step']:06d}.pt") as f:
        torch.save(state | metadata | {"tokenizer": proto}, f)


def main() -> None:
    parser = Parser(description="To Hugging Face's format and back.", allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, help="a checkpoint, or a run's folder for its newest")
    parser.add_argument("--from_hf", type=Path, metavar="DIR", help="a Hugging Face folder to bring back")
    parser.add_argument("--out_dir", type=Path, required=True, help="a folder that is not there yet")
    args = parser.parse_args()
    if bool(args.ckpt) == bool(args.from_hf):
        raise UserError("give either --ckpt or --from_hf")
    if args.out_dir.exists() and (not args.out_dir.is_dir() or any(args.out_dir.iterdir())):
        raise UserError(f"{args.out_dir}: is there already; choose another --out_dir")
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise UserError("safetensors is missing: pip install safetensors") from None
    if args.ckpt:
        export(args.ckpt, args.out_dir)
    else:
        bring_back(args.from_hf, args.out_dir)
    print(f"wrote {args.out_dir}")


if __name__ == "__main__":
    report_errors(main)
