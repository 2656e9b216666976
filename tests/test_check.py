"""tools/check.py finds what the programs do not look for: real damage in prepared folders and in
checkpoints.
"""

import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, reseal, run_script, script_here, tuning

import tools.check


def check(path):
    return script_here(tools.check.main, "tools/check.py", path)


def flip(path, at):
    """Change one bit of the byte at this place; a place below 0 counts from the end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def data(tiny_data, tmp_path):
    return shutil.copytree(tiny_data, tmp_path / "data")


@pytest.fixture
def sft_data(tiny_sft, tmp_path):
    return shutil.copytree(tiny_sft, tmp_path / "sft")


@pytest.fixture
def damaged(pretrained, tmp_path):
    """A function that saves the checkpoint as `change` left it."""

    def save(change):
        checkpoint = torch.load(pretrained, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "ckpt_000001.pt")
        return tmp_path / "ckpt_000001.pt"

    return save


def test_the_command(tiny_data):
    assert run_script("-m", "tools.check", tiny_data).stdout.startswith(f"ok: {tiny_data}: ")


def test_whole_files(tiny_sft, pretrained, tuned):
    assert check(tiny_sft).stdout.startswith("ok: ")
    assert check(pretrained).stdout.startswith(f"ok: {pretrained}: step 20, ")
    assert "step 60" in check(tuned).stdout  # the newest of the run


def test_adapters_and_a_merged_model(pretrained, tiny_sft, tmp_path):
    run_script(*tuning(pretrained, tiny_sft, tmp_path, lora_rank=2, max_iters=2, save_interval=2))
    assert "ok: " in check(tmp_path).stdout
    run_script("sft.py", f"--out_dir={tmp_path}", "--merge=True")
    assert "ok: " in check(tmp_path / "merged.pt").stdout
    checkpoint = torch.load(tmp_path / "ckpt_000002.pt", weights_only=True)
    checkpoint["lora"]["rank"] = 3
    torch.save(checkpoint, tmp_path / "other.pt")
    assert_one_line_error(check(tmp_path / "other.pt"), "other.pt", "parametrizations", "(3, ")


# ---- Prepared folders ------------------------------------------------------------------------------


def test_a_flipped_bit(data):
    flip(data / "train.bin", 2 * 1234)
    assert_one_line_error(check(data), "train.bin", "SHA-256")


def test_a_token_beyond_the_vocabulary(data):
    tokens = np.fromfile(data / "val.bin", dtype="<u2")
    tokens[[77, 99]] = 2000, 65535
    tokens.tofile(data / "val.bin")
    reseal(data)
    meta = json.loads((data / "meta.json").read_text())
    assert_one_line_error(check(data), "val.bin", "token number 77 is 2000", meta["vocab_size"])


def test_a_truncated_file(data):
    for cut in (1, 2):  # an odd length, and an even one
        os.truncate(data / "train.bin", (data / "train.bin").stat().st_size - cut)
        assert_one_line_error(check(data), "train.bin", "meta.json says")


def test_an_instruction_without_a_response(sft_data):
    tokens = np.fromfile(sft_data / "train.bin", dtype="<u2")
    at = np.flatnonzero(tokens == 2)[2]  # the end of the third example
    tokens[at] = tokens[at - 1]
    tokens.tofile(sft_data / "train.bin")
    reseal(sft_data)
    assert_one_line_error(check(sft_data), "train.bin", "do not alternate")


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": "2000"}, {"train": 3}, {"end_token": None}, {"vocab_size": 1999},
     {"tokenizer_sha256": "0" * 64}, {"end_token": 1}, {"template": "{instruction}"}],
)  # fmt: skip
def test_meta(change, data):
    meta = json.loads((data / "meta.json").read_text()) | change
    (data / "meta.json").write_text(json.dumps(meta))
    assert_one_line_error(check(data), "")


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"train": {"tokens": 1}}'])
def test_meta_that_is_none(content, data):
    (data / "meta.json").write_bytes(content)
    assert_one_line_error(check(data), data)


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.model", "train.bin", "val.bin"])
def test_a_missing_file(name, data):
    (data / name).unlink()
    assert_one_line_error(check(data), name)


def test_a_damaged_tokenizer(data):
    for at in (10, 1000, -10):
        flip(data / "tokenizer.model", at)
        assert_one_line_error(check(data), "tokenizer.model")
        reseal(data)  # now only the tokenizer itself can tell
        assert check(data).returncode in (0, 2)


# ---- Checkpoints -----------------------------------------------------------------------------------


def test_flipped_bits(pretrained, tmp_path):
    """Inside a weight the CRC finds it, and so it does in the pickle."""
    path = shutil.copy(pretrained, tmp_path / "ckpt_000020.pt")
    with zipfile.ZipFile(path) as archive:
        places = {
            e.filename: e.header_offset + 200
            for e in archive.infolist()
            if e.filename.endswith(("pkl", "/3"))
        }
    for name, at in places.items():
        flip(path, at)
        assert_one_line_error(check(path), path, name)
        flip(path, at)
    assert check(tmp_path).returncode == 0


def test_a_truncated_checkpoint(pretrained, tmp_path):
    path = shutil.copy(pretrained, tmp_path / "ckpt_000020.pt")
    for size in (path.stat().st_size // 2, 100, 0):
        os.truncate(path, size)
        assert_one_line_error(check(path), path, "zip")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_is_not_run(damaged, tmp_path):
    path = damaged(lambda c: c.update(extra=Malicious(str(tmp_path / "hacked"))))
    assert_one_line_error(check(path), path)
    assert not (tmp_path / "hacked").exists()


def test_a_zip_bomb(pretrained, tmp_path):
    with (
        zipfile.ZipFile(pretrained) as old,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, bytes(1 << 24) if name.endswith("/0") else old.read(name))
    assert_one_line_error(check(tmp_path / "a.pt"), "a.pt", "fill the memory")


WEIGHT = "blocks.1.mlp.up_proj.weight"


def not_finite(c):
    c["model"][WEIGHT][3, 4] = float("nan")


def missing_weight(c):
    del c["model"][WEIGHT]


def half(c):
    c["model"][WEIGHT] = c["model"][WEIGHT].half()


def expanded(c):
    c["model"]["embedding.weight"] = torch.zeros(1, 1).expand(10**6, 32)


def many_layers_of_one(c):
    layer = {name: weight for name, weight in c["model"].items() if name.startswith("blocks.1.")}
    for i in range(2, 200):
        c["model"] |= {name.replace("1", str(i), 1): weight for name, weight in layer.items()}
    c["model_config"]["n_layer"] = 200


def other_shape(c):
    c["model_config"]["intermediate_size"] = 10**12


def many_layers(c):
    c["model_config"]["n_layer"] = 10**12


def endless_setting(c):
    value = "x"
    for _ in range(60):
        value = [value, value]  # 2**60 strings, if they are ever written out
    c["settings"]["seed"] = value


def no_step(c):
    c["step"] = "20"


def smaller_model(c):
    c["model"]["embedding.weight"] = c["model"]["embedding.weight"][:1999].clone()
    c["model_config"]["vocab_size"] = 1999


def other_tokenizer(c):
    c["tokenizer"] = c["tokenizer"][:1000]


def no_template(c):
    c["template"] = "{response}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (not_finite, [WEIGHT, "finite"]),
        (missing_weight, [WEIGHT, "missing"]),
        (half, [WEIGHT, "float32"]),
        (expanded, ["share"]),
        (many_layers_of_one, ["share"]),
        (other_shape, ["weight", "1000000000000"]),
        (many_layers, ["1000000000000 layers, not 2"]),
        (endless_setting, ["seed"]),
        (no_step, ["damaged"]),
        (smaller_model, ["tokenizer", "pieces", "1,999"]),
        (other_tokenizer, ["tokenizer"]),
        (no_template, ["template"]),
    ],
)
def test_damaged_entries(change, words, damaged):
    assert_one_line_error(check(damaged(change)), *words)


def test_mistakes_of_the_user(tmp_path):
    assert_one_line_error(check(tmp_path / "none"), "none", "No such file")
    assert_one_line_error(check(tmp_path), tmp_path, "no prepared data")
    (tmp_path / "text").write_text("no checkpoint")
    assert_one_line_error(check(tmp_path / "text"), "text", "zip")
