"""tools/check.py looks for damage that the other programs do not look for.

It answers "ok: " for what prepare.py, train.py and sft.py have written, and else says in one line which file
is damaged, and where. It runs no code from the file, and no claim in a file makes it fill the memory. First
whole files, then damage to prepared folders, then to checkpoints.
"""

import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from helpers import assert_refused, meta_of, reseal, run_here, run_script, tuning

import prepare
import sft
from tools import check


def flip(path, at):
    """Change one bit of the byte at this place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def data(tiny_data, tmp_path):
    """A prepared folder to be damaged."""
    return shutil.copytree(tiny_data, tmp_path / "data")


@pytest.fixture
def file(pretrained, tmp_path):
    """A checkpoint to be damaged."""
    return shutil.copy(pretrained, tmp_path / "ckpt_000020.pt")


@pytest.fixture
def refused(pretrained, tmp_path):
    """A function that changes what a checkpoint holds, and asserts that it is refused with these words."""

    def save_and_check(change, *words):
        checkpoint = torch.load(pretrained, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "a.pt")
        assert_refused(check, [tmp_path / "a.pt"], *words)

    return save_and_check


# ---- Whole files -----------------------------------------------------------------------------------


def test_the_command(tiny_data):
    done = run_script("-m", "tools.check", tiny_data)
    assert done.stdout.startswith(f"ok: {tiny_data}: ") and done.stdout.endswith("stories, 2000 pieces\n")


def test_whole_files(tiny_sft, pretrained, tuned):
    assert run_here(check, tiny_sft).stdout.startswith("ok: ")
    assert run_here(check, pretrained).stdout.startswith(f"ok: {pretrained}: step 20, ")
    assert "ckpt_000060.pt: step 60" in run_here(check, tuned).stdout  # the newest of the run


def test_adapters(pretrained, tiny_sft, tmp_path):
    run_here(sft, *tuning(pretrained, tiny_sft, tmp_path, lora_rank=2, max_iters=1))
    assert "ok: " in run_here(check, tmp_path).stdout


def test_what_is_neither(tmp_path):
    assert_refused(check, [tmp_path / "none"], "none", "No such file")
    assert_refused(check, [tmp_path], tmp_path, "no prepared data")


# ---- Prepared folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.model"])
def test_a_flipped_bit(name, data):
    flip(data / name, 1234)
    assert_refused(check, [data], name, "SHA-256")


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.model", "train.bin", "val.bin"])
def test_a_missing_file(name, data):
    (data / name).unlink()
    assert_refused(check, [data], name)


def test_a_truncated_file(data):
    os.truncate(data / "train.bin", 1000)
    assert_refused(check, [data], "train.bin: has 1,000 bytes, meta.json says")


def test_a_token_beyond_the_vocabulary(data):
    tokens = np.fromfile(data / "val.bin", dtype="<u2")
    tokens[77:99] = 2000
    tokens.tofile(data / "val.bin")
    reseal(data)
    assert_refused(check, [data], "val.bin", "token number 77 is 2000")


@pytest.mark.parametrize("example", [2, -1])
def test_a_response_without_its_end(example, tiny_sft, tmp_path):
    folder = shutil.copytree(tiny_sft, tmp_path / "sft")
    tokens = np.fromfile(folder / "train.bin", dtype="<u2")
    ends = np.flatnonzero(tokens == meta_of(folder)["end_token"])
    tokens[ends[example]] = 500
    tokens.tofile(folder / "train.bin")
    reseal(folder)
    assert_refused(check, [folder], "train.bin", "do not alternate")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"vocab_size": 1999}, "another vocab_size"),
        ({"end_token": 1}, "another vocab_size or end_token"),
        ({"train": 3}, "damaged"),
        ({"template": "{instruction}"}, "the template"),
    ],
)
def test_a_wrong_entry_of_meta(change, found, data):
    meta = meta_of(data) | change
    (data / "meta.json").write_text(json.dumps(meta))
    assert_refused(check, [data], found)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_a_meta_that_is_none(content, data):
    (data / "meta.json").write_bytes(content)
    assert_refused(check, [data], data)


# ---- The file of a checkpoint ----------------------------------------------------------------------


@pytest.mark.parametrize("at", [200, 100_000])
def test_a_flipped_bit_in_a_checkpoint(at, file):
    """In the entry with the names of the weights, and in a weight."""
    flip(file, at)
    assert_refused(check, [file], f"{file}: wrong CRC of its entry")


@pytest.mark.parametrize("size", [100_000, 100, 0])
def test_a_truncated_checkpoint(size, file):
    os.truncate(file, size)
    assert_refused(check, [file], file, "zip")


def test_a_zip_bomb(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    assert_refused(check, [path], path, "fill the memory")


class Malicious:
    """Its pickle makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_code_is_not_run(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda c: c.update(extra=Malicious()), "a.pt")
    assert not (tmp_path / "hacked").exists()


# ---- What a checkpoint holds -----------------------------------------------------------------------

WEIGHT = "blocks.1.mlp.up_proj.weight"
ONE_NAN = torch.zeros(48, 32)
ONE_NAN[3, 4] = torch.nan
ENDLESS = "x"
for _ in range(60):
    ENDLESS = [ENDLESS, ENDLESS]  # 2**60 strings, if they are ever written out


@pytest.mark.parametrize(
    ("part", "key", "value", "found"),
    [
        ("model", WEIGHT, ONE_NAN, "not finite"),
        ("model", WEIGHT, torch.zeros(48, 32).half(), "is not a float32 tensor of (48, 32)"),
        ("model", WEIGHT, torch.zeros(32, 48), "is not a float32 tensor of (48, 32)"),
        ("model", "head.weight", torch.zeros(1), "head.weight is missing, or not one"),
        ("model", WEIGHT, torch.zeros(1).expand(10**9), "share what they store"),
        ("model_config", "n_layer", 10**12, "1000000000000 layers, not 2"),
        ("model_config", "intermediate_size", 10**12, "1000000000000"),
        ("settings", "seed", ENDLESS, "'seed' is not text or a number"),
        ("", "template", ENDLESS, "'template' is not text or a number"),
        ("", "template", "{response}", "the template '{response}'"),
        ("", "step", "20", "damaged"),
        ("", "tokenizer", b"none", "(tokenizer): not a SentencePiece model"),
    ],
)
def test_a_wrong_entry(part, key, value, found, refused):
    refused(lambda c: c.get(part, c).update({key: value}), found)


def test_a_missing_weight(refused):
    refused(lambda c: c["model"].pop(WEIGHT), f"{WEIGHT} is missing")


def test_the_tokenizer_of_another_model(refused):
    smaller = prepare.train_tokenizer(["一只小兔"] * 9, 300)
    refused(lambda c: c.update(tokenizer=smaller), "pieces, the model 2,000")
