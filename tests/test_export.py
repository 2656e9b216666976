"""tools/export.py takes a checkpoint to Hugging Face's format, and brings one back.

transformers computes the same there: logits, ids, the greedy story, the chat template of docs/export.md. The
way back restores every bit. First the way there, then back, then what cannot be used: configs, weights,
damaged folders, an --out_dir, tokenizers of another kind. A folder is written whole, or not at all.
"""

import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from helpers import ROOT, assert_refused, metrics_of, run_here, run_script, same, small_model

import sample
from common.checkpoint import build_model, find_checkpoints, read_checkpoint
from prepare import train_tokenizer
from stories.generate import stories
from tools import export

SIZE = 1500  # pieces of a tokenizer


def saved(folder, model, tokenizer):
    """A checkpoint of this model, the file."""
    state = {"model": model.state_dict(), "model_config": vars(model.config), "tokenizer": tokenizer}
    path = folder / "ckpt_000003.pt"
    torch.save(state | {"settings": {}, "step": 3}, path)
    return path


def bring_back(folder, out_dir):
    """What comes back, as a checkpoint."""
    run_here(export, "--from_hf", folder, "--out_dir", out_dir)
    return read_checkpoint(out_dir)


def refused(tmp_path, source, path, *words):
    """`--ckpt` or `--from_hf` with this path ends with one line that has these words, and writes nothing."""
    before = set(tmp_path.rglob("*"))
    assert_refused(export, [source, path, "--out_dir", tmp_path / "none" / "out"], *words)
    assert set(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def few_stories():
    return [story["story_zh"] for story in stories(100)]


@pytest.fixture(scope="module")
def tokenizer_model(few_stories):
    return train_tokenizer(few_stories, SIZE)


@pytest.fixture(scope="module")
def checkpoints(tuned, tokenizer_model, tmp_path_factory):
    """A run of sft.py, which becomes a Qwen3; and a model without QK-norm, a Llama."""
    model = small_model(qk_norm=False, vocab_size=SIZE, head_dim=12, n_head=4)
    return {"Qwen3": tuned, "Llama": saved(tmp_path_factory.mktemp("llama"), model, tokenizer_model)}


@pytest.fixture(scope="module")
def folders(checkpoints, transformers, tmp_path_factory):
    """What export makes of them."""
    found = {}
    for kind, path in checkpoints.items():
        found[kind] = tmp_path_factory.mktemp("hf") / "deep" / kind
        run_here(export, "--ckpt", path, "--out_dir", found[kind])
        assert os.listdir(found[kind].parent) == [kind]
    return found


@pytest.fixture(scope="module")
def folder(folders):
    return folders["Qwen3"]


@pytest.fixture
def copied(folder, tmp_path):
    """A folder to be changed."""
    return shutil.copytree(folder, tmp_path / "hf")


@pytest.fixture(scope="module")
def load(transformers):
    """A function that opens a folder as the docs say."""
    return transformers.AutoModelForCausalLM.from_pretrained


@pytest.fixture(scope="module")
def theirs(load, folder):
    return load(folder)


@pytest.fixture(scope="module")
def their_tokenizer(transformers, folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def our_tokenizer(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


# ---- The same model --------------------------------------------------------------------------------


def assert_same_logits(ours, theirs):
    tokens = torch.randint(0, ours.config.vocab_size, (3, ours.config.block_size))
    with torch.no_grad():
        expected = theirs(tokens).logits
        largest = expected.abs().max().item()
        torch.testing.assert_close(ours(tokens), expected, atol=1e-5 * largest, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_the_same_logits(kind, checkpoints, folders, load):
    theirs = load(folders[kind])
    assert type(theirs).__name__ == f"{kind}ForCausalLM"
    path = checkpoints[kind]
    assert_same_logits(build_model(read_checkpoint(path), path), theirs)


def test_the_same_greedy_story(theirs, their_tokenizer, tuned):
    """Asked through the chat template, which gives the tokens that sample.py makes."""
    greedy = ("--temperature=0", "--num=1", "--max_new_tokens=150", "--dtype=float32")
    done = run_here(sample, "--ckpt", tuned, "--words=铲子,草地", *greedy)
    chat = [{"role": "user", "content": "  词汇：铲子，草地\n"}]
    asked = their_tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    n_asked = asked["input_ids"].size(1)
    told = theirs.generate(**asked, do_sample=False, max_new_tokens=150)[0, n_asked:]
    assert done.stdout == their_tokenizer.decode(told, skip_special_tokens=True) + "\n"
    assert len(done.stdout) > 20


def test_the_documented_snippet(folder, capsys):
    """docs/export.md, word for word. It samples, within the limits of generation_config.json."""
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "hf/demo_sft" in snippet
    found = {}
    exec(snippet.replace("hf/demo_sft", str(folder)), found)
    told = capsys.readouterr().out.removesuffix("\n")
    assert told == found["tokenizer"].decode(found["story"], skip_special_tokens=True)


def test_how_transformers_samples(theirs, their_tokenizer):
    config = theirs.generation_config
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.8, 50, 0.95)
    assert config.max_new_tokens == theirs.config.max_position_embeddings == 256
    end = their_tokenizer.eos_token_id
    assert config.eos_token_id == config.bos_token_id == config.pad_token_id == end
    assert their_tokenizer.padding_side == "left"  # or a story would begin after padding


def test_the_files_and_the_card(folder, tuned):
    names = "README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer.model"
    assert set(os.listdir(folder)) == {*names.split(), "tokenizer_config.json"}
    card = (folder / "README.md").read_text()
    *_, last = metrics_of(tuned)
    assert "| steps | 60 |" in card and f"| val_loss | {round(last['val_loss'], 4)} |" in card
    assert f"| tokens | {last['tokens']:,} |" in card and "    learning_rate = 0.01\n" in card
    assert "put the end token first" not in card  # as it must be in a model without a template


# ---- The same tokens -------------------------------------------------------------------------------


def hard_texts(tokenizer):
    """Text of all kinds; and a few pieces over and over, which can be joined in many ways."""
    texts = ["Once upon a time, a rabbit.", "😀👩‍👩‍👧 emoji", "  two  spaces ", "\n\n\t\r\n", "ﬁ①ｶＡ"]
    texts += ["e\u0301 é", "مرحبا", "<0x0A> <unk", "\u3000\xa0\u200b\ufeff\0", "\U0001f430𠀀龘", "", " "]
    rng = random.Random(1)
    pieces = [tokenizer.id_to_piece(i) for i in range(300, tokenizer.vocab_size())]
    for _ in range(2000):
        few = rng.sample(pieces, 2)
        few += list("".join(few))
        texts.append("".join(rng.choices(few, k=30)).replace("▁", " "))
    for character in "哈—… ":
        texts += [character * n for n in range(1, 40)]
    return texts


def test_the_same_ids(their_tokenizer, our_tokenizer):
    """10,000 stories, and text of all kinds, to ids and back."""
    texts = [story["story_zh"] for story in stories(10_000)] + hard_texts(our_tokenizer)
    expected = our_tokenizer.encode(texts)
    found = their_tokenizer(texts)["input_ids"]
    for text, ours, theirs in zip(texts, expected, found, strict=True):
        assert ours == theirs, text
    assert their_tokenizer.batch_decode(found) == texts
    assert their_tokenizer("a▁b")["input_ids"] == our_tokenizer.encode("a▁b")


def test_control_tokens_spelt_in_text(their_tokenizer, our_tokenizer):
    """Ours never come of text. transformers' do, unless it is told: docs/export.md says so."""
    text = "从前</s>有<|assistant|>一只<s>兔子<unk><pad>"
    ids = our_tokenizer.encode(text)
    assert their_tokenizer(text, split_special_tokens=True)["input_ids"] == ids
    assert not any(our_tokenizer.is_control(token) for token in ids)
    assert our_tokenizer.eos_id() in their_tokenizer(text)["input_ids"]


def test_the_chat_template(their_tokenizer):
    """Each answer ends as a text does. The mask is of what sft.py trains, in whichever tokens it comes."""
    parts = [{"type": "text", "text": " 一"}, {"type": "text", "text": "二 "}]
    chat = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "三 🐰龘"},
        {"role": "user", "content": "四"},
        {"role": "assistant", "content": "五"},
    ]
    apply = their_tokenizer.apply_chat_template
    found = apply(chat, return_dict=True, return_assistant_tokens_mask=True)
    text = "</s><|user|>一二<|assistant|>三 🐰龘</s><|user|>四<|assistant|>五</s>"
    assert their_tokenizer.decode(found["input_ids"]) == text
    ids = torch.tensor(found["input_ids"])
    marked = ids[torch.tensor(found["assistant_masks"]) == 1]
    assert their_tokenizer.decode(marked) == "三 🐰龘</s>五</s>"
    assert apply(chat[:1], add_generation_prompt=True, tokenize=False) == "</s><|user|>一二<|assistant|>"


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"role": "system", "content": "一"}, "no system"),
        ({"role": "user", "content": [{"type": "image"}]}, "no image"),
    ],
)
def test_messages_that_training_has_never_seen(message, found, their_tokenizer):
    with pytest.raises(Exception, match=found):
        their_tokenizer.apply_chat_template([message])


# ---- The way back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_the_way_back_restores_every_bit(kind, checkpoints, folders, tmp_path):
    """But for what only training needs."""
    before = read_checkpoint(checkpoints[kind])
    after = bring_back(folders[kind], tmp_path / "back")
    same(dict(after["model"]), dict(before["model"]))  # the order of its weights may differ
    for name in ("model_config", "tokenizer", "settings", "step"):
        same(after[name], before[name])
    assert after.get("template") == before.get("template")
    assert os.listdir(tmp_path / "back") == [f"ckpt_{before['step']:06d}.pt"]


@pytest.mark.parametrize(("kind", "dtype"), [("Qwen3", torch.bfloat16), ("Llama", torch.float16)])
def test_a_folder_of_transformers_comes_in(kind, dtype, folders, load, tmp_path):
    """Of other types, with an output matrix of its own that equals the embedding."""
    from safetensors.torch import load_file, save_file

    hf = tmp_path / "hf"
    load(folders[kind]).to(dtype).save_pretrained(hf)
    shutil.copy(folders[kind] / "tokenizer.model", hf)
    weights = load_file(hf / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    ours = build_model(bring_back(hf, tmp_path / "out"), hf)
    assert_same_logits(ours, load(hf, dtype=torch.float32))


def test_a_config_of_the_first_llamas():
    """Which had no key and value heads of another number, and the angle at the top."""
    config = {"model_type": "llama", "vocab_size": 9, "max_position_embeddings": 8, "hidden_size": 12}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 6, "rope_theta": 50}
    shape = export.read_shape(config)
    found = [shape[name] for name in ("n_kv_head", "head_dim", "rope_theta", "norm_eps", "qk_norm")]
    assert found == [3, 4, 50.0, 1e-6, False]


def change_config(folder, changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8-sig")  # as Notepad saves it


def test_only_what_is_known_is_kept(copied, tmp_path):
    """A config cannot smuggle adapters, or anything else, into a checkpoint."""
    change_config(copied, {"microstories": {"step": 7, "lora": {"rank": 10**9, "alpha": 1.0}}})
    checkpoint = bring_back(copied, tmp_path / "out")
    assert checkpoint["step"] == 7 and "lora" not in checkpoint


# ---- What cannot come in ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("model_type", "gpt2", "model_type"),
        ("model_type", None, "model_type"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "rope_type"),
        ("rope_parameters", {"rope_theta": 1e4, "factor": 2.0}, "a scaling of it"),
        ("rope_parameters", {"rope_theta": float("nan")}, "rope_theta"),
        ("rope_parameters", 3, "config.json"),
        ("hidden_act", "gelu", "hidden_act"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("hidden_size", 36, "has not the shape"),
        ("hidden_size", 2**20 + 1, "hidden_size = 1048577: must be a whole number from 1 to 1,048,576"),
        ("num_hidden_layers", True, "num_hidden_layers"),
        ("num_attention_heads", 0, "num_attention_heads"),
        ("num_key_value_heads", 3, "n_kv_head"),
        ("max_position_embeddings", None, "max_position_embeddings"),
        ("vocab_size", 2000.0, "vocab_size"),
        ("vocab_size", 3000, "3,000"),
    ],
)
def test_configs_that_cannot_come_in(key, value, found, copied, tmp_path):
    change_config(copied, {key: value})
    refused(tmp_path, "--from_hf", copied, "hf", found)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("model.norm.weight", None, "model.norm.weight is missing"),
        ("model.embed_tokens.weight", None, "embed_tokens"),
        ("model.norm.weight", torch.ones(31), "has not the shape (32,)"),
        ("model.norm.weight", torch.ones(32, dtype=torch.int8), "int8"),
        ("model.norm.weight", torch.ones(32).double(), "float64"),
        ("model.norm.bias", torch.zeros(32), "model.norm.bias is none of"),
        ("lm_head.weight", torch.zeros(2000, 32), "not the embedding"),
        ("lm_head.weight", torch.zeros(3), "not the embedding"),
    ],
)
def test_weights_that_cannot_come_in(name, value, found, copied, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(copied / "model.safetensors") | {name: value}
    if value is None:
        del weights[name]
    safetensors.save_file(weights, copied / "model.safetensors")
    refused(tmp_path, "--from_hf", copied, "model.safetensors", found)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors"])
def test_damaged_folders(name, copied, tmp_path):
    whole = (copied / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"[" * 100_000, b"3"):
        (copied / name).write_bytes(content)
        refused(tmp_path, "--from_hf", copied, copied)
    (copied / name).unlink()
    refused(tmp_path, "--from_hf", copied, name)


# ---- Where it is written ---------------------------------------------------------------------------


def test_nothing_that_is_there_is_replaced(tuned, copied):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    assert_refused(export, ["--ckpt", tuned, "--out_dir", copied], copied, "is there already")
    assert_refused(export, ["--from_hf", copied, "--out_dir", copied / "config.json"], "config.json")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_a_link_to_an_empty_folder_is_followed(folder, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to("disk")
    bring_back(folder, link)
    assert link.is_symlink() and find_checkpoints(tmp_path / "disk")


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def save(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    assert_refused(export, ["--from_hf", folder, "--out_dir", tmp_path / "out"], "No space left")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("out_dir", ["file", "file/in", "dangling", "/proc"])
def test_an_out_dir_that_cannot_be_used(out_dir, tmp_path):
    """Is told before the checkpoint is read: what is damaged there is not even looked at."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "ckpt_1.pt").write_text("damaged")
    named = tmp_path / out_dir.removesuffix("/in")
    assert_refused(export, ["--ckpt", tmp_path / "ckpt_1.pt", "--out_dir", tmp_path / out_dir], f"{named}: ")
    assert len(os.listdir(tmp_path)) == 3


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert_refused(export, ["--ckpt", tmp_path, "--out_dir", tmp_path / "a" / "b"], f"b: {tmp_path} is not")


def test_mistakes(tuned, tmp_path, monkeypatch):
    refused(tmp_path, "--ckpt", tmp_path / "missing", "missing")
    refused(tmp_path, "--from_hf", tmp_path / "missing", "missing")
    assert_refused(export, ["--out_dir", tmp_path / "out"], "--ckpt", "--from_hf")
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as if it were not installed
    refused(tmp_path, "--ckpt", tuned, "pip install safetensors")


# ---- Other tokenizers ------------------------------------------------------------------------------


def trained_otherwise(folder, texts, **changes):
    """A tokenizer made with prepare.py's options, but for these changes."""
    options = {
        "model_type": "bpe",
        "vocab_size": SIZE,
        "byte_fallback": True,
        "hard_vocab_limit": False,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "required_chars": "▁",
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "t"), **options | changes
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "t.model"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_type", "unigram"),
        ("normalization_rule_name", "nfkc"),
        ("normalization_rule_name", "nmt_nfkc_cf"),
        ("add_dummy_prefix", True),
        ("remove_extra_whitespaces", True),
        ("user_defined_symbols", ["小兔子"]),
        ("byte_fallback", False),
    ],
)
def test_tokenizers_of_another_kind(option, value, few_stories, tmp_path):
    """Better none than a wrong one."""
    tokenizer = trained_otherwise(tmp_path, few_stories, **{option: value})
    model = small_model(vocab_size=tokenizer.vocab_size())
    path = saved(tmp_path, model, tokenizer.serialized_model_proto())
    refused(tmp_path, "--ckpt", path, path, "tokenizer")


@pytest.mark.parametrize(
    ("option", "value"),
    [("required_chars", ""), ("vocab_size", 4000), ("treat_whitespace_as_suffix", True)],
)
def test_tokenizers_like_ours(option, value, few_stories, tmp_path):
    """Made with other options, but a byte-fallback BPE that does not normalise: the same ids and text."""
    from tokenizers import Tokenizer

    ours = trained_otherwise(tmp_path, few_stories, **{option: value})
    theirs = Tokenizer.from_str(json.dumps(export.tokenizer_json(ours, tmp_path)))
    for text in hard_texts(ours):
        ids = ours.encode(text)
        assert theirs.encode(text).ids == ids, text
        assert theirs.decode(ids) == ours.decode(ids)


# ---- llama.cpp -------------------------------------------------------------------------------------


def test_gguf(folder, our_tokenizer, tmp_path):
    """llama.cpp's own converter reads the folder; weights, tokenizer and template arrive."""
    from safetensors.torch import load_file

    gguf = pytest.importorskip("gguf")
    converter = Path(os.environ.get("LLAMA_CPP", "llama.cpp"), "convert_hf_to_gguf.py")
    if not converter.exists():
        pytest.skip("LLAMA_CPP names no folder of llama.cpp's source")
    run_script(converter, folder, "--outfile", tmp_path / "m.gguf", "--outtype", "f32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    for name, weight in load_file(folder / "model.safetensors").items():
        same(found.pop(names.get_name(name, try_suffixes=(".weight",))), weight)
    assert not found

    def field(name):
        return reader.get_field(f"tokenizer.{name}").contents()

    ids = range(our_tokenizer.vocab_size())
    assert field("ggml.model") == "llama"  # a tokenizer of SentencePiece
    assert field("ggml.tokens") == [our_tokenizer.id_to_piece(i) for i in ids]
    assert field("ggml.scores") == [our_tokenizer.get_score(i) for i in ids]
    assert field("ggml.eos_token_id") == field("ggml.bos_token_id") == our_tokenizer.eos_id()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert field("chat_template") == settings["chat_template"]
    assert not reader.get_field("tokenizer.ggml.add_space_prefix")  # docs/export.md: it must be set
