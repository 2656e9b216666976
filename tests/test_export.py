"""To Hugging Face's format and back: transformers computes the same, tokenizes the same, tells the same."""

import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from conftest import assert_one_line_error, script_here
from test_model import small
from test_train import same

import sample
import tools.export
from common.checkpoint import build_model, find_checkpoints, read_checkpoint
from prepare import train_tokenizer
from sft import add_lora
from stories.constraints import TEMPLATE, encode_prompt
from stories.generate import stories

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
SIZE = 1500  # pieces


def export_here(*args):
    return script_here(tools.export.main, "tools/export.py", *args)


def refused(tmp_path, *words, ckpt=None, hf=None):
    """The tool answers in one line that has these words, and writes nothing."""
    before = set(tmp_path.rglob("*"))
    source = ("--ckpt", ckpt) if ckpt else ("--from_hf", hf)
    assert_one_line_error(export_here(*source, "--out_dir", tmp_path / "none" / "out"), *words)
    assert set(tmp_path.rglob("*")) == before


def saved(folder, model, tokenizer, **more):
    """A checkpoint of this model, the file."""
    state = {"model": model.state_dict(), "model_config": vars(model.config), "settings": {}, "step": 3}
    torch.save(state | {"tokenizer": tokenizer} | more, folder / "ckpt_000003.pt")
    return folder / "ckpt_000003.pt"


@pytest.fixture(scope="module")
def proto():
    """A tokenizer of few stories."""
    return train_tokenizer([story["story_zh"] for story in stories(100)], SIZE)


@pytest.fixture(scope="module")
def plain(proto, tmp_path_factory):
    """A checkpoint of a model without QK-norm, a Llama."""
    model = small(qk_norm=False, vocab_size=SIZE, head_dim=12, n_head=4)
    return saved(tmp_path_factory.mktemp("llama"), model, proto)


@pytest.fixture(scope="module")
def folders(tuned, plain, tmp_path_factory):
    """What export makes of a run of sft.py and of the Llama."""
    found = {}
    for kind, ckpt in (("qwen3", tuned), ("llama", plain)):
        found[kind] = tmp_path_factory.mktemp("hf") / "deep" / kind
        done = export_here("--ckpt", ckpt, "--out_dir", found[kind])
        assert done.returncode == 0, done.stderr
        assert [p.name for p in found[kind].parent.iterdir()] == [kind]
    return found


@pytest.fixture(scope="module")
def folder(folders):
    return folders["qwen3"]


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@pytest.fixture(scope="module")
def their_tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def our_tokenizer(tuned):
    return sentencepiece.SentencePieceProcessor(model_proto=read_checkpoint(tuned)["tokenizer"])


def assert_same_logits(ours, theirs):
    tokens = torch.randint(0, ours.config.vocab_size, (3, ours.config.block_size))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_the_same_logits(theirs, tuned):
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and theirs.dtype == torch.float32
    assert_same_logits(build_model(read_checkpoint(tuned), tuned), theirs)


def test_the_same_logits_as_llama(folders, plain):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"], local_files_only=True)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert_same_logits(build_model(read_checkpoint(plain), plain), theirs)


def test_adapters_are_merged(proto, tmp_path):
    model = small(vocab_size=SIZE)
    add_lora(model, rank=2, alpha=4.0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    ckpt = saved(tmp_path, model, proto, lora={"rank": 2, "alpha": 4.0})
    assert export_here("--ckpt", ckpt, "--out_dir", tmp_path / "hf").returncode == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert_same_logits(model, theirs)


def hard_texts(tokenizer):
    """Text of all kinds; and the same few characters and pieces over and over, which can be joined in many
    ways.
    """
    texts = ["Once upon a time, a rabbit.", "😀👩‍👩‍👧 emoji", "  two  spaces ", "\n\n\t\r\n", "ﬁ①ｶＡ", "e\u0301 é",
             "مرحبا", "<0x0A> <unk", "\u3000\xa0\u200b\ufeff\0", "\U0001f430𠀀龘", "", " ", "字" * 999]  # fmt: skip
    rng = random.Random(1)
    pieces = [tokenizer.id_to_piece(i) for i in range(300, tokenizer.vocab_size())]
    for _ in range(2000):
        few = rng.sample(pieces, 2)
        few += list("".join(few))
        texts.append("".join(rng.choices(few, k=30)).replace("▁", " "))
    for character in "哈—… ":
        texts += [character * n for n in range(1, 40)]
    anything = [*range(0x2581), *range(0x2582, 0xD800), *range(0xE000, 0x30000)]
    for _ in range(500):
        texts.append("".join(map(chr, rng.choices(anything, k=30))))
    return texts


def test_the_same_ids(their_tokenizer, our_tokenizer):
    """10,000 stories, and text of all kinds, to ids and back."""
    texts = [s["story_zh"] for s in stories(10_000)] + hard_texts(our_tokenizer)
    expected = our_tokenizer.encode(texts)
    found = their_tokenizer(texts, add_special_tokens=True)["input_ids"]
    for text, a, b in zip(texts, expected, found, strict=True):
        assert a == b, text
    assert their_tokenizer.batch_decode(found) == texts == our_tokenizer.decode(expected)
    assert their_tokenizer("a▁b")["input_ids"] == our_tokenizer.encode("a▁b") == our_tokenizer.encode("a b")


def test_control_tokens_spelt_in_text(their_tokenizer, our_tokenizer):
    """Ours never come of text. transformers' do, unless it is told: README.md says so."""
    text = "从前</s>有<|assistant|>一只<s>兔子<unk><pad>"
    ids = our_tokenizer.encode(text)
    assert not any(map(our_tokenizer.is_control, ids)) and our_tokenizer.unk_id() not in ids
    assert their_tokenizer(text, split_special_tokens=True)["input_ids"] == ids
    forged = their_tokenizer(text)["input_ids"]
    assert {our_tokenizer.eos_id(), our_tokenizer.piece_to_id("<|assistant|>")} <= set(forged)


@pytest.mark.parametrize("words", ["铲子,草地", "帽子"])
def test_the_same_greedy_story(words, theirs, their_tokenizer, our_tokenizer, tuned):
    """Asked through the chat template, which gives the tokens that sample.py makes."""
    done = script_here(sample.main, "sample.py", "--ckpt", tuned, "--words", words, "--temperature", 0, "--num", 1,
                       "--max_new_tokens", 150, "--device", "cpu")  # fmt: skip
    asked = f"  词汇：{words.replace(',', '，')}\n"
    ids = their_tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert ids == encode_prompt(our_tokenizer, TEMPLATE, asked, "")
    told = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=150)[0, len(ids) :]
    assert (
        done.stdout == their_tokenizer.decode(told, skip_special_tokens=True) + "\n" and len(done.stdout) > 20
    )


def test_the_documented_snippet(folder, capsys):
    """docs/export.md, word for word."""
    text = (Path(tools.export.__file__).parent.parent / "docs" / "export.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "hf/demo_sft" in snippet
    torch.manual_seed(1)  # it samples
    found = {}
    exec(snippet.replace("hf/demo_sft", str(folder)), found)
    told = capsys.readouterr().out.removesuffix("\n")
    assert told == found["tokenizer"].decode(found["story"], skip_special_tokens=True)
    assert 20 < len(found["story"]) <= 256 - found["asked"]["input_ids"].size(1)


def test_a_conversation(their_tokenizer, our_tokenizer):
    """Each answer ends as a text does; what training has never seen is refused."""
    chat = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
    ]
    told = their_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert told == "</s><|user|>一<|assistant|>二</s><|user|>三<|assistant|>"
    with pytest.raises(Exception, match="no system"):
        their_tokenizer.apply_chat_template([{"role": "system", "content": "一"}])


def test_parts_of_a_message(their_tokenizer):
    parts = [{"type": "text", "text": " 一"}, {"type": "text", "text": "二 "}]
    told = their_tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert told == "</s><|user|>一二"
    with pytest.raises(Exception, match="no image"):
        their_tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_the_mask_of_what_is_trained(their_tokenizer):
    """The responses with their end tokens, as in sft.py; also where a character takes several tokens."""
    chat = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二 🐰龘"},
        {"role": "user", "content": "三"},
        {"role": "assistant", "content": "四"},
    ]
    found = their_tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(found["input_ids"], found["assistant_masks"], strict=True) if mark]
    assert their_tokenizer.decode(marked) == "二 🐰龘</s>四</s>"


def test_no_warnings_about_the_length(folder, their_tokenizer, theirs, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    asked = their_tokenizer("</s>从前", return_tensors="pt")
    story = theirs.generate(**asked, max_new_tokens=5)[0]
    assert story.size(0) == asked["input_ids"].size(1) + 5
    logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert "max_length" not in json.loads((folder / "generation_config.json").read_text())


def test_round_trip(folders, tuned, plain, tmp_path):
    """Back to a checkpoint: bit for bit what was exported, without what only training needs."""
    for kind, ckpt in (("qwen3", tuned), ("llama", plain)):
        done = export_here("--from_hf", folders[kind], "--out_dir", tmp_path / kind)
        assert done.returncode == 0, done.stderr
        before, after = read_checkpoint(ckpt), read_checkpoint(tmp_path / kind)
        for name in ("model", "model_config", "tokenizer", "settings", "step"):
            kind_of = dict if name == "model" else lambda value: value  # the order of its weights may differ
            same(kind_of(after[name]), kind_of(before[name]))
        assert after.get("template") == before.get("template")
        newest = find_checkpoints(ckpt)[0] if ckpt.is_dir() else ckpt
        assert [p.name for p in (tmp_path / kind).iterdir()] == [newest.name]


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_of_transformers_comes_in(kind, dtype, proto, tmp_path):
    """Of three types, with a head of its own that equals the embedding, and ready to tell stories."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=SIZE, hidden_size=40, intermediate_size=60, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=dtype != torch.float16,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    theirs.lm_head.weight.data.copy_(theirs.model.embed_tokens.weight.data)
    theirs.to(dtype).save_pretrained(tmp_path / "hf")
    names = safetensors.load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (dtype == torch.float16)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(proto)
    done = export_here("--from_hf", tmp_path / "hf", "--out_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert_same_logits(build_model(read_checkpoint(tmp_path / "out"), tmp_path), theirs)
    assert script_here(sample.main, "sample.py", "--ckpt", tmp_path / "out", "--num", 1).returncode == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "too large"),
        ({"rope_parameters": 3}, "config.json"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": 36}, "weight"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "n_kv_head"),
        ({"head_dim": "x"}, "head_dim"),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"vocab_size": 2048.0}, "vocab_size"),
        ({"vocab_size": 3000}, "3,000"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_configs_that_cannot_come_in(change, word, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "hf", word, hf=tmp_path / "hf")


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "head_dim", "vocab_size"])
def test_missing_keys(key, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "hf", key, hf=tmp_path / "hf")


def test_only_what_is_known_is_kept(folder, tmp_path):
    """A config cannot smuggle adapters, or anything else, into a checkpoint."""
    shutil.copytree(folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["microstories"] |= {"lora": {"rank": 10**9, "alpha": 1.0}, "optimizers": []}
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps(config), encoding="utf-8-sig"
    )  # as Notepad saves it
    assert export_here("--from_hf", tmp_path / "hf", "--out_dir", tmp_path / "out").returncode == 0
    assert not {"lora", "optimizers"} & read_checkpoint(tmp_path / "out").keys()


def drop(w):
    del w["model.norm.weight"]


def add(w):
    w["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)


def rename(w):
    w["blocks.0.mlp_norm.weight"] = w.pop("model.layers.0.post_attention_layernorm.weight")


def reshape(w):
    w["model.norm.weight"] = w["model.norm.weight"][:-1].clone()


def integers(w):
    w["model.norm.weight"] = w["model.norm.weight"].to(torch.int8)


def doubles(w):
    w["model.norm.weight"] = w["model.norm.weight"].double()


def untie(w):
    w["lm_head.weight"] = w["model.embed_tokens.weight"] + 1


def shrink(w):
    w["lm_head.weight"] = torch.zeros(3)


def no_embedding(w):
    del w["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (drop, "norm.weight"),
        (add, "bias"),
        (rename, "post_attention_layernorm"),
        (reshape, "norm.weight"),
        (integers, "int8"),
        (doubles, "float64"),
        (untie, "embedding"),
        (shrink, "embedding"),
        (no_embedding, "embed_tokens"),
        (dict.clear, "embed_tokens"),
    ],
)
def test_weights_that_cannot_come_in(change, word, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hf")
    weights = safetensors.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.save_file(weights, tmp_path / "hf" / "model.safetensors")
    refused(tmp_path, "hf", word, hf=tmp_path / "hf")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors"])
def test_damaged_folders(name, folder, tmp_path):
    whole = (folder / name).read_bytes()
    shutil.copytree(folder, tmp_path / "hf")
    for content in (whole[:100], whole[: len(whole) // 2], b"", b"[" * 100_000, b"\xff" * 1000, b"3"):
        (tmp_path / "hf" / name).write_bytes(content)
        refused(tmp_path, "hf", hf=tmp_path / "hf")
    (tmp_path / "hf" / name).unlink()  # tokenizer.json alone is not enough
    refused(tmp_path, name, hf=tmp_path / "hf")


def test_weights_in_several_files(folder, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    shutil.copy(folder / "tokenizer.model", tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    refused(tmp_path, "several files", hf=tmp_path / "hf")


def test_what_is_there_already_and_what_is_not(tuned, folder, tmp_path):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for source in (("--ckpt", tuned), ("--from_hf", folder)):
        assert_one_line_error(export_here(*source, "--out_dir", folder), folder)
        assert_one_line_error(export_here(*source, "--out_dir", folder / "config.json"), "config.json")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    refused(tmp_path, tmp_path / "missing", ckpt=tmp_path / "missing")
    refused(tmp_path, tmp_path / "missing", hf=tmp_path / "missing")
    assert_one_line_error(export_here("--out_dir", tmp_path / "out"), "--ckpt", "--from_hf")
    (tmp_path / "empty").mkdir()  # nothing is lost here
    assert export_here("--from_hf", folder, "--out_dir", tmp_path / "empty").returncode == 0
    assert find_checkpoints(tmp_path / "empty")


def test_an_out_dir_that_is_a_link(folder, tmp_path):
    """The link stays; what it points to is filled."""
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/deep")
    assert export_here("--from_hf", folder, "--out_dir", tmp_path / "link").returncode == 0
    assert (tmp_path / "link").is_symlink() and find_checkpoints(tmp_path / "disk" / "deep")
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["deep"]


def test_an_out_dir_that_cannot_be_used(tuned, tmp_path):
    """One line that names it, before the checkpoint is read: what is damaged there is not even looked at."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "ckpt_1.pt").write_text("damaged")
    file = tmp_path / "file"
    dangling = tmp_path / "dangling"
    for out_dir, named in ((file, file), (file / "in", file), (dangling, dangling), ("/proc", "/proc")):
        done = export_here("--ckpt", tmp_path / "ckpt_1.pt", "--out_dir", out_dir)
        assert_one_line_error(done, named)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "dangling", "ckpt_1.pt"}


def test_without_safetensors(tuned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as if it were not installed
    refused(tmp_path, "pip install safetensors", ckpt=tuned)


def trained_otherwise(folder, **changes):
    """A tokenizer made with prepare.py's options, but for these changes."""
    options = {"vocab_size": SIZE, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False,
               "normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False,
               "required_chars": "▁", "minloglevel": 2}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(story["story_zh"] for story in stories(100)), model_prefix=str(folder / "t"),
        **options | changes,
    )  # fmt: skip
    return (folder / "t.model").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "unigram"}, {"normalization_rule_name": "nfkc"}, {"normalization_rule_name": "nmt_nfkc_cf"},
     {"add_dummy_prefix": True}, {"remove_extra_whitespaces": True}, {"user_defined_symbols": ["小兔子"]},
     {"byte_fallback": False}],
    ids=str,
)  # fmt: skip
def test_tokenizers_of_another_kind(changes, tmp_path):
    """Better none than a wrong one."""
    proto = trained_otherwise(tmp_path, **changes)
    size = sentencepiece.SentencePieceProcessor(model_proto=proto).vocab_size()
    refused(tmp_path, "tokenizer", ckpt=saved(tmp_path, small(vocab_size=size), proto))


@pytest.mark.parametrize(
    "changes", [{}, {"required_chars": ""}, {"vocab_size": 4000}, {"treat_whitespace_as_suffix": True}]
)
def test_tokenizers_like_ours(changes, tmp_path):
    """The options of the test above make tokenizers that can be exported: ids and text are those of
    SentencePiece.
    """
    ours = sentencepiece.SentencePieceProcessor(model_proto=trained_otherwise(tmp_path, **changes))
    content = json.dumps(tools.export.tokenizer_json(ours, tmp_path))
    theirs = tokenizers.Tokenizer.from_str(content)
    for text in hard_texts(ours):
        ids = ours.encode(text)
        assert theirs.encode(text).ids == ids, text
        assert theirs.decode(ids) == ours.decode(ids)


def test_chatglm(shared, tmp_path):
    model = small(vocab_size=64789)
    proto = (shared / "chatglm_tokenizer.model").read_bytes()
    refused(tmp_path, "tokenizer", ckpt=saved(tmp_path, model, proto))


def test_the_card(folder, tuned):
    card, last = (folder / "README.md").read_text(), {}
    for line in (tuned / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    assert "| steps | 60 |" in card and f"| val_loss | {round(last['val_loss'], 4)} |" in card
    assert f"| tokens | {last['tokens']:,} |" in card and "learning_rate = 0.01" in card
    assert {p.name for p in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json"}  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_gguf(kind, folders, tmp_path):
    """llama.cpp's own converter reads the folder; weights, tokenizer and template arrive."""
    gguf = pytest.importorskip("gguf")
    converter = Path(os.environ.get("LLAMA_CPP", "llama.cpp"), "convert_hf_to_gguf.py")
    if not converter.exists():
        pytest.skip("LLAMA_CPP names no folder of llama.cpp's source")
    done = subprocess.run(
        [sys.executable, converter, folders[kind], "--outfile", tmp_path / "m.gguf", "--outtype", "f32"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    weights = safetensors.load_file(folders[kind] / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], 4)
    expected = {names.get_name(name, try_suffixes=(".weight",)): weight for name, weight in weights.items()}
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    if (
        kind == "llama"
    ):  # its format turns neighbours, ours the two halves of a head: rows are in another order
        assert "rope_freqs.weight" not in found
        config = json.loads((folders[kind] / "config.json").read_text())
        for name, weight in expected.items():
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(
                name.split(".")[-2]
            )
            if heads:
                rows = weight.view(config[heads], 2, -1, weight.size(1)).transpose(1, 2)
                expected[name] = rows.reshape(weight.shape)
    same(dict(sorted(found.items())), dict(sorted(expected.items())))

    def field(name):
        return reader.get_field(f"tokenizer.ggml.{name}").contents()

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folders[kind] / "tokenizer.model"))
    ids = range(tokenizer.vocab_size())
    assert field("model") == "llama"  # a tokenizer of SentencePiece
    assert field("tokens") == [tokenizer.id_to_piece(i) for i in ids]
    assert field("scores") == [tokenizer.get_score(i) for i in ids]
    assert [t == 3 for t in field("token_type")] == list(map(tokenizer.is_control, ids))
    assert [t == 6 for t in field("token_type")] == list(map(tokenizer.is_byte, ids))
    assert field("eos_token_id") == field("bos_token_id") == tokenizer.eos_id()
    if kind == "qwen3":
        config = json.loads((folders[kind] / "tokenizer_config.json").read_text())
        assert reader.get_field("tokenizer.chat_template").contents() == config["chat_template"]
        assert not reader.get_field("tokenizer.ggml.add_space_prefix")  # docs/export.md: it must be set
    else:
        assert field("add_space_prefix") is False
