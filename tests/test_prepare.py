"""From inputs to token files, read back the way nanoGPT reads them; and every input that must be refused."""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT, assert_one_line_error, reference_strip, run_script, script_here
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare
import stories.read
from common.files import UserError, load_tokenizer
from stories.constraints import clean
from stories.read import find_inputs, read_blocks, records_of
from stories.records import story_of

END = "<|endoftext|>"
MADE = ["meta.json", "tokenizer.model", "train.bin", "val.bin"]
STORIES = [
    "猫睡了。",
    "从前，有一只小兔子叫白白。她喜欢吃胡萝卜😀，也喜欢唱歌。",
    "Once upon a time, a fox said: “你好！” and ran away.",
    '小熊第一行。\n小熊第二行。\n\n最后一行，有“引号”,逗号,和"英文引号"。',
    "café 𠮷野家 👩‍👩‍👧 שלום مرحبا",
    "</s> 不是结束，<|user|> 也不是，<0x41> <unk> <pad> 都只是字。",
    *(f"第{i}天，小狗{'汪' * (i % 5 + 1)}捡到了{i * 7}个苹果，分给{i % 4}位朋友。" for i in range(60)),
]
ONE_LINE = [s for s in STORIES if "\n" not in s]


def reference_clean(text):
    """The promise of the cleaning, said a second time."""
    return reference_strip(unicodedata.normalize("NFC", re.sub("\r\n?", "\n", text)))


def jsonl(stories, **dumps):
    return "".join(json.dumps({"story_zh": s}, **dumps) + "\n" for s in stories).encode()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read_folder(folder):
    """{split: its stories}: uint16 read by memmap as nanoGPT does, cut at the end token, decoded."""
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    found = {}
    for split in ("train", "val"):
        ids = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r")
        assert ids[-1] == meta["end_token"] == tokenizer.eos_id() and ids.max() < meta["vocab_size"]
        found[split] = [[]]
        for i in ids.tolist():
            if i == meta["end_token"]:
                found[split].append([])
            else:
                assert not tokenizer.is_control(i) and not tokenizer.is_unknown(i)
                found[split][-1].append(i)
        found[split] = [tokenizer.decode(story) for story in found[split][:-1]]
    return found


def assert_holds(folder, stories):
    """The folder holds exactly these stories, each once, in this order within either split."""
    found = read_folder(folder)
    assert len(found["train"]) + len(found["val"]) == len(stories)
    for split in found:
        assert found[split] == [s for s in stories if s in set(found[split])]
    assert set(found["train"]) | set(found["val"]) == set(stories)
    return found


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in MADE}


def names_in(folder):
    """Everything in a folder but the lock files, which stay."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix != ".lock")


def make(out, *inputs, vocab_size=600, val_fraction=0.2, constants="", **more):
    """Run prepare.py; `constants` are assignments to its bounds made first, such as "stories.read.BLOCK =
    7".
    """
    options = {"out_dir": out, "val_fraction": val_fraction, "vocab_size": vocab_size, **more}
    args = [*inputs, *(f"--{key}={value}" for key, value in options.items())]
    if not constants:
        done = script_here(prepare.main, "prepare.py", *args)
        assert done.returncode == 0, done.stderr
        return done
    return run_script(
        "-c", f"import prepare, stories.read; {constants}; prepare.report_errors(prepare.main)", *args
    )


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """STORIES as one .jsonl file, prepared: what the other inputs are held against."""
    folder = tmp_path_factory.mktemp("base")
    write(folder / "stories.jsonl", jsonl(STORIES, ensure_ascii=False))
    make(folder / "data", folder / "stories.jsonl")
    return folder / "data"


@pytest.fixture(scope="session")
def tokenizer(base):
    return load_tokenizer((base / "tokenizer.model").read_bytes(), "base")


@pytest.fixture(scope="session")
def chatglm(shared):
    return load_tokenizer((shared / "chatglm_tokenizer.model").read_bytes(), "ChatGLM")


# ---- Every input format ----------------------------------------------------------------------------


def as_csv(stories):
    out = io.StringIO()
    rows = csv.writer(out)
    rows.writerow(["number", "story_zh"])
    rows.writerows(enumerate(stories))
    return out.getvalue().encode()


def as_tar(files, mode="w"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


FORMATS = {
    "a.jsonl": lambda s: jsonl(s),
    "strings.jsonl": lambda s: "".join(json.dumps(t) + "\n" for t in s).encode(),
    "blank_lines_no_end.jsonl": lambda s: b"\n" + jsonl(s).replace(b"\n", b"\n \n\n").rstrip(),
    "bom_crlf.jsonl": lambda s: b"\xef\xbb\xbf" + jsonl(s, ensure_ascii=False).replace(b"\n", b"\r\n"),
    "a.json": lambda s: json.dumps([{"id": 1, "story_zh": t} for t in s]).encode(),
    "strings.json": lambda s: json.dumps(s, ensure_ascii=False).encode(),
    "bom_crlf_pretty.json": lambda s: (
        b"\xef\xbb\xbf\r\n"
        + json.dumps([{"story_zh": t} for t in s], ensure_ascii=False, indent=2)
        .replace("\n", "\r\n")
        .encode()
        + b"\r\n"
    ),
    "marked.txt": lambda s: END.join(s).encode(),
    "marked_lines_bom_crlf.txt": lambda s: (
        b"\xef\xbb\xbf" + "".join(f"{t}\n{END}\n" for t in s).replace("\n", "\r\n").encode()
    ),
    "a.csv": as_csv,
    "bom.csv": lambda s: b"\xef\xbb\xbf" + as_csv(s),
}


@pytest.mark.parametrize(
    "name", [*FORMATS, *(f"{name}.gz" for name in FORMATS if "bom" not in name or "csv" in name)]
)
def test_formats_give_the_bins_of_jsonl(base, tmp_path, name):
    data = FORMATS[name.removesuffix(".gz")](STORIES)
    write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    make(tmp_path / "out", tmp_path / name)
    ours, expected = files_of(tmp_path / "out"), files_of(base)
    for file in ("train.bin", "val.bin", "tokenizer.model"):
        assert ours[file] == expected[file], file


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_text_one_a_line(tmp_path, tokenizer, start, ends):
    file = write(tmp_path / "a.txt", start + ends.join(ONE_LINE).encode())
    make(tmp_path / "out", file)
    assert_holds(tmp_path / "out", ONE_LINE)


def as_parquet(stories):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    table = pyarrow.table({"number": list(range(len(stories))), "story_zh": list(stories)})
    parquet.write_table(table, out, row_group_size=7)
    return out.getvalue()


def as_zst(data):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    half = len(data) // 2  # two frames: the end of the first is not the end of the file
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))


@pytest.mark.parametrize("name", ["a.parquet", "A.PARQUET", "a.jsonl.zst", "marked.txt.zst", "a.csv.ZST", "A.JSONL.GZ",
                                  "a.Json", "all.tar.zst", "all.TGZ"])  # fmt: skip
def test_packages_and_suffixes_in_any_case(base, tmp_path, name):
    """Parquet, zst, and suffixes in capitals give the bins of the .jsonl file."""
    kind = name.lower()
    data = (
        as_parquet(STORIES) if ".parquet" in kind else FORMATS.get(kind.partition(".zst")[0], jsonl)(STORIES)
    )
    if "json" in kind and "jsonl" not in kind:
        data = FORMATS["a.json"](STORIES)
    if kind.startswith("all"):
        data = as_tar({"x/A.JSONL": data, "x/._A.JSONL": b"\0\5\x16\7"})
    data = (
        as_zst(data)
        if kind.endswith(".zst")
        else gzip.compress(data)
        if kind.endswith(("gz", "tgz"))
        else data
    )
    write(tmp_path / name, data)
    make(tmp_path / "out", tmp_path / name)
    for file in ("train.bin", "val.bin", "tokenizer.model"):
        assert files_of(tmp_path / "out")[file] == files_of(base)[file], file


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst", "all.tar.zst"])
@pytest.mark.parametrize("how", ["cut", "other"])
def test_damaged_packages(base, tmp_path, name, how):
    data = as_parquet(STORIES) if "parquet" in name else as_zst(jsonl(STORIES))
    write(tmp_path / name, data[: len(data) * 2 // 3] if how == "cut" else b"no such format at all" * 9)
    done = script_here(
        prepare.main, "prepare.py", tmp_path / name, "--out_dir", tmp_path / "out", "--vocab_size", 600
    )
    assert_one_line_error(done, tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_damaged_pages_of_parquet(tmp_path):
    """The footer is whole, the stories are not."""
    data = as_parquet(STORIES)
    middle = len(data) // 3
    file = write(tmp_path / "a.parquet", data[:40] + bytes(middle) + data[40 + middle :])
    done = script_here(prepare.main, "prepare.py", file, "--out_dir", tmp_path / "out")
    assert_one_line_error(done, file, "damaged")


def test_columns_of_parquet(base, tmp_path):
    """A date that Python does not have is no obstacle; two columns of one name are."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    dates = pyarrow.array([2**50] * len(STORIES), pyarrow.timestamp("ms"))
    parquet.write_table(pyarrow.table({"date": dates, "story_zh": list(STORIES)}), tmp_path / "a.parquet")
    make(tmp_path / "out", tmp_path / "a.parquet", tokenizer=base / "tokenizer.model")
    assert_holds(tmp_path / "out", STORIES)
    twice = pyarrow.table([STORIES, STORIES], names=["story_zh", "story_zh"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    done = script_here(prepare.main, "prepare.py", tmp_path / "b.parquet", "--out_dir", tmp_path / "no")
    assert_one_line_error(done, tmp_path / "b.parquet", "two columns have one name", "story_zh")


def test_a_missing_package_is_named(tmp_path):
    """Without pyarrow and zstandard their files are refused by name, not skipped; also beside others."""
    write(tmp_path / "in" / "ok.jsonl", jsonl(STORIES))
    code = "import sys; sys.modules.update(pyarrow=None, zstandard=None); " \
           "import importlib.util as u; find = u.find_spec; " \
           "u.find_spec = lambda name: None if name in ('pyarrow', 'zstandard') else find(name); " \
           "import prepare; prepare.report_errors(prepare.main)"  # fmt: skip
    for name, package in (("more.parquet", "pyarrow"), ("more.jsonl.zst", "zstandard")):
        if package == "zstandard" and sys.version_info >= (3, 14):
            continue
        write(tmp_path / "in" / name, b"anything")
        done = run_script("-c", code, tmp_path / "in", "--out_dir", tmp_path / "out", check=False)
        assert_one_line_error(done, name, f"pip install {package}")
        (tmp_path / "in" / name).unlink()


def test_what_is_not_read_is_named(base, tmp_path):
    """Metadata, folders of prepare.py and unknown kinds are skipped, and named; hidden files are not looked
    at.
    """
    write(tmp_path / "in" / "ok.JSONL", jsonl(STORIES))
    for name in ("._ok.jsonl", ".DS_Store", "dataset_infos.json", "notes.md", ".cache/deep/x.jsonl"):
        write(tmp_path / "in" / name, b"\0\1\2")
    shutil.copytree(base, tmp_path / "in" / "prepared")
    for i, way in enumerate((tmp_path / "in", f"{tmp_path}/in/**", f"{tmp_path}/in/*")):
        done = make(tmp_path / f"out{i}", way)
        assert_holds(tmp_path / f"out{i}", STORIES)
        named = ("notes.md", "dataset_infos.json") + ("prepared/meta.json",) * (i < 2)
        for name in named:
            assert name in done.stderr, done.stderr
        assert "._ok" not in done.stderr and ".cache" not in done.stderr
    (tmp_path / "in" / "ok.JSONL").unlink()
    done = script_here(prepare.main, "prepare.py", tmp_path / "in", "--out_dir", tmp_path / "no")
    assert_one_line_error(done, tmp_path / "in", "notes.md")


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_text_of_several_lines(base, tmp_path, ends, start):
    """Stories of one to four lines with empty lines between: as many as there are; the report shows how it
    was cut.
    """
    texts = [ends.join(f"第{i}天，第{k}行。" for k in range(1 + i % 4)) for i in range(40)]
    file = write(tmp_path / "a.txt", start + (ends * 2).join(texts).encode())
    done = make(tmp_path / "out", file, tokenizer=base / "tokenizer.model")
    assert_holds(tmp_path / "out", list(map(reference_clean, texts)))
    assert "separated by empty lines" in done.stdout and "第0天，第0行。" in done.stdout


TWO_LINES = [f"第{i}天，小狗出门。\n它捡到了{i}个苹果。" for i in range(40)]
UNIX, WINDOWS, OLD_MAC = "\n", "\r\n", "\r"


@pytest.mark.parametrize("name, between, texts", [
    ("lines.txt", "\n", ONE_LINE),
    ("empty_lines.txt", "\n\n", TWO_LINES),
    ("marked.txt", f"\n{END}\n", TWO_LINES),
    ("lines.jsonl", "\n", [json.dumps({"story_zh": text}, ensure_ascii=False) for text in TWO_LINES]),
])  # fmt: skip
@pytest.mark.parametrize(
    "first, second", [(WINDOWS, UNIX), (UNIX, WINDOWS), (OLD_MAC, UNIX), (OLD_MAC, OLD_MAC)]
)
def test_mixed_line_ends(tmp_path, monkeypatch, name, between, texts, first, second):
    """Files of several systems joined, wherever a block ends: every story is one."""
    half = len(texts) // 2
    data = (between.join(texts[:half]) + between).replace("\n", first) + between.join(texts[half:]).replace(
        "\n", second
    )
    file = write(tmp_path / name, data.encode())
    expected = TWO_LINES
    if texts == ONE_LINE:
        expected = ONE_LINE
    for block in (500, 501, 502, 503, 1 << 20):
        monkeypatch.setattr(stories.read, "BLOCK", block)
        assert [text for text in map(reference_clean, read_texts(file)) if text] == expected, block


def test_one_line_of_another_system(tmp_path):
    """One line that ends as on Windows does not change how the others are cut."""
    text = "\n\n".join(TWO_LINES).replace("\n", "\r\n", 1)
    file = write(tmp_path / "a.txt", text.encode())
    assert [text for text in map(reference_clean, read_texts(file)) if text] == TWO_LINES


@pytest.mark.parametrize("name", ["a.txt", "marked.txt", "a.jsonl"])
def test_joined_files_with_a_bom_inside(base, tmp_path, name):
    """cat a.txt b.txt, both with a byte order mark: it becomes no part of a story."""
    mark, half = b"\xef\xbb\xbf", len(ONE_LINE) // 2
    form = {"a.txt": lambda s: "".join(f"{t}\n" for t in s),
            "marked.txt": lambda s: "".join(f"{t}\n{END}\n" for t in s),
            "a.jsonl": lambda s: jsonl(s, ensure_ascii=False).decode()}[name]  # fmt: skip
    data = b"".join(mark + form(part).encode() for part in (ONE_LINE[:half], ONE_LINE[half:]))
    make(tmp_path / "out", write(tmp_path / name, data), tokenizer=base / "tokenizer.model")
    assert_holds(tmp_path / "out", ONE_LINE)


LISTED = [{"story_zh": s} for s in ONE_LINE]
NOT_WHAT_THEY_SEEM = {  # name: (bytes, words of the message)
    "utf16.txt": ("\n".join(ONE_LINE).encode("utf-16"), ["UTF-16", "iconv"]),
    "gbk.txt": ("\n".join(f"第{i}天，小狗走了。" for i in range(9)).encode("gbk"), ["GBK", "iconv -f GB18030"]),
    "gbk.json": (json.dumps(["第一天，小狗走了。"], ensure_ascii=False).encode("gbk"), ["GBK"]),
    "gbk.csv": ("story_zh\n第一天，小狗走了。".encode("gbk"), ["GBK"]),
    "list.txt": (json.dumps(LISTED, indent=1).encode(), ["holds JSON", ".json"]),
    "lines.txt": (jsonl(ONE_LINE), ["holds JSON", ".jsonl"]),
    "list.jsonl": (json.dumps(LISTED, indent=1).encode(), ["one JSON list", ".json"]),
    "list_in_a_line.jsonl": (json.dumps(LISTED).encode(), ["one JSON list", ".json"]),
    "lines.json": (jsonl(ONE_LINE), ["expected a JSON list", ".jsonl"]),
    "wrapped.json": (json.dumps({"data": LISTED}).encode(), ["expected a JSON list", "under a key"]),
    "page.txt": (b"<!DOCTYPE html>\n<html><body>404</body></html>", ["a web page"]),
    "page.jsonl": (b"<html><body>404</body></html>", ["a web page"]),
    "arrow/data-00000-of-00001.arrow": (b"ARROW1", ["can be read", "data-00000-of-00001.arrow"]),
}  # fmt: skip
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
NOT_WHAT_THEY_SEEM |= {
    f"pointer.{kind}": (POINTER, ["git lfs pull"]) for kind in ("jsonl", "json", "txt", "csv")
}


@pytest.mark.parametrize("name", NOT_WHAT_THEY_SEEM)
def test_files_that_are_not_what_they_seem(tmp_path, name):
    """Other encodings, JSON under another name, pointers and web pages: refused with what to do, never read
    as text.
    """
    data, words = NOT_WHAT_THEY_SEEM[name]
    path = write(tmp_path / name, data)
    path = path if path.parent == tmp_path else path.parent
    done = script_here(prepare.main, "prepare.py", path, "--out_dir", tmp_path / "out", "--vocab_size", 600)
    assert_one_line_error(done, path, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("delimiter", ["\t", ";"])
def test_other_delimiters_of_csv(base, tmp_path, delimiter):
    out = io.StringIO()
    rows = csv.writer(out, delimiter=delimiter)
    rows.writerow(["number", "story_zh"])
    rows.writerows(enumerate(STORIES))
    make(tmp_path / "out", write(tmp_path / "a.csv", out.getvalue().encode()))
    for file in ("train.bin", "val.bin", "tokenizer.model"):
        assert files_of(tmp_path / "out")[file] == files_of(base)[file], file


def test_null_stories_are_empty(base, tmp_path):
    """Null and pandas' NaN are counted as empty."""
    data = jsonl(STORIES) + b'{"story_zh": null}\n{"story_zh": NaN}\n'
    make(tmp_path / "out", write(tmp_path / "a.jsonl", data), tokenizer=base / "tokenizer.model")
    assert_holds(tmp_path / "out", STORIES)
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["dropped"]["empty"] == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_twice_in_a_record(name, base, tmp_path):
    """No value of the two is taken: the record is left out and counted, wherever in it the object is."""
    rows = [json.dumps({"story_zh": text}) for text in STORIES]
    rows += ['{"story_zh": "一。", "story_zh": "二。"}', '{"story_zh": "三。", "a": {"b": {"c": 1, "c": 1}}}']
    data = "\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]"
    make(tmp_path / "out", write(tmp_path / name, data.encode()), tokenizer=base / "tokenizer.model")
    assert_holds(tmp_path / "out", STORIES)
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["dropped"]["duplicate_key"] == 2


def test_two_columns_of_one_name(tmp_path):
    """Of a CSV the last one would be read, unseen."""
    file = write(tmp_path / "a.csv", "story_zh,id,story_zh\n一。,1,二。\n".encode())
    done = run_script("prepare.py", file, "--out_dir", tmp_path / "out", check=False)
    assert_one_line_error(done, f"{file}:1", "two columns have one name", "story_zh")


def fields(*rows):
    return "".join(f"{row}\n" for row in rows).encode()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("rows, line", [
    (["id,story_zh", "1,一。", "2,二, 三。"], 3),  # the text is the last column
    (["story_zh,id", "一。,1", "二, 三。,2"], 3),  # or another one
    (["story_zh", "一。", "二, 三。"], 3),
    (["id,story_zh,note", "1,一。,", "2,二, 三。,"], 3),  # what is too much may be empty
    (["id,story_zh,,", "1,一。,,", "2,二, 三。,"], 3),  # or stand under no name
    (["id,story_zh,,", '1,"一,\n一。",,', "2,二, 三。,,"], 4),
])  # fmt: skip
def test_more_fields_than_columns(tmp_path, delimiter, rows, line):
    """A delimiter that is not quoted: the text is not cut there, the row is refused."""
    if delimiter != "," and rows[0] == "story_zh":
        return  # a header without a delimiter: the comma is taken
    file = write(tmp_path / "a.csv", fields(*rows).decode().replace(",", delimiter).encode())
    with pytest.raises(UserError, match=re.escape(f"{file}:{line}: has more columns")):
        read_texts(file)


@pytest.mark.parametrize("rows", [
    ["id,story_zh,,", "1,一。,,", "2,二。,,", ",,,"],
    ["id,story_zh,,", "1,一。", "2,二。,"],  # shorter, but every name has its field
    [",story_zh,,", "1,一。,, ", "2,二。,,"],  # pandas writes its index under an empty name
    ["id,,,story_zh", "1,x,y,一。", "2,x,y,二。"],
    ["id;story_zh;;", "1;一。;;", "2;二。;;"],
])  # fmt: skip
def test_empty_fields_at_the_end(tmp_path, rows):
    file = write(tmp_path / "a.csv", fields(*rows))
    assert [text for text in read_texts(file) if text] == ["一。", "二。"]


def test_each_file_is_read_once(tmp_path):
    """Links to the folder itself, to one above it, to each other and to files; and files named twice."""
    folder = tmp_path / "in"
    file = write(folder / "a" / "stories.jsonl", jsonl(ONE_LINE))
    write(folder / "b" / "more.jsonl", jsonl(["又一个。"]))
    for name, target in {"a/again": ".", "a/too": ".", "a/up": "..", "a/to_b": "../b", "b/to_a": "../a",
                         "b/same.jsonl": "../a/stories.jsonl"}.items():  # fmt: skip
        (folder / name).symlink_to(target)
    real = [os.path.realpath(path) for path in find_inputs([folder])]
    assert sorted(real) == [str(file), str(folder / "b" / "more.jsonl")]
    for inputs in ([folder, file, folder / "b"], [file, f"{folder}/*"], [file, file, folder / "a" / "again"]):
        found = find_inputs(list(map(Path, inputs)))
        assert len(found) == len({os.path.realpath(path) for path in found})


def test_a_linked_folder_is_read(tmp_path):
    """A link to data that lies elsewhere is followed; one that leads nowhere is named."""
    write(tmp_path / "disk" / "deep" / "a.jsonl", jsonl(ONE_LINE))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "in" / "gone.jsonl").symlink_to("nowhere")
    done = make(tmp_path / "out", tmp_path / "in", vocab_size=500)
    assert_holds(tmp_path / "out", ONE_LINE)
    assert "gone.jsonl" in done.stderr


def test_a_glob_that_matches_a_folder(tmp_path):
    """As in a shell, where data/* names the folders in data too."""
    write(tmp_path / "data" / "a.jsonl", jsonl(ONE_LINE))
    write(tmp_path / "data" / "sub" / "b.jsonl", jsonl(ONE_LINE))
    assert len(find_inputs([Path(f"{tmp_path}/data/*")])) == 2


def test_one_very_long_story(base, tmp_path):
    """A novel in one record: 200,000 characters without a line end go through the tokenizer's training."""
    novel = "".join(random.Random(1).choice("小狗猫兔熊走跑跳飞了到在的一天山水") for _ in range(200_000))
    make(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl([*STORIES, novel])))
    assert_holds(tmp_path / "out", [*STORIES, novel])


def test_a_marker_that_comes_late(tmp_path, monkeypatch):
    """After a MiB without one, a marker means two kinds of files in one: refused, with its line."""
    monkeypatch.setattr(stories.read, "BLOCK", 64)
    file = write(tmp_path / "a.txt", b"one\n" * 40 + b"two\nlines\n<|endoftext|>\nthree")
    with pytest.raises(UserError, match=re.escape(f"{file}:43: the first {END}")):
        read_texts(file)


def test_every_way_to_name_inputs(base, tmp_path):
    """Archives, folders, globs and mixes of them give the stories of the one file."""
    parts = [STORIES[i::4] for i in range(4)]
    writers = {"0.jsonl": jsonl, "1.json": FORMATS["a.json"], "2.txt": FORMATS["marked.txt"], "3.csv": as_csv}
    files = {name: form(part) for (name, form), part in zip(writers.items(), parts, strict=True)}
    ordered = [s for part in parts for s in part]
    for name, data in files.items():
        write(tmp_path / "flat" / name, data)
        write(tmp_path / "zipped" / "deep" / f"{name}.gz", gzip.compress(data))
    write(tmp_path / "flat" / "notes.md", b"not a story")
    noise = {"README.md": b"no story", "sub/": b"", "sub/x.bin": b"\xff\x00"}
    nested = {f"./sub/{name}": data for name, data in files.items()}
    write(tmp_path / "all.tar.gz", as_tar(noise | nested, "w:gz"))
    write(tmp_path / "all.tar", as_tar(nested))
    flat, deep = tmp_path / "flat", tmp_path / "zipped" / "deep"
    ways = {
        "folder": [flat],
        "nested folder of .gz": [tmp_path / "zipped"],
        ".tar.gz": [tmp_path / "all.tar.gz"],
        ".tar": [tmp_path / "all.tar"],
        "glob": [f"{flat}/*"],
        "glob of any depth": [f"{tmp_path}/zipped/**/*.gz"],
        "mix": [flat / "0.jsonl", f"{flat}/[12].*", deep / "3.csv.gz"],
        "overlapping": [flat, tmp_path / "zipped", tmp_path / "all.tar.gz"],
    }
    sides = read_folder(base)
    for i, (way, inputs) in enumerate(ways.items()):
        make(tmp_path / f"out{i}", *inputs)
        found = assert_holds(tmp_path / f"out{i}", ordered)
        assert {k: set(v) for k, v in found.items()} == {k: set(v) for k, v in sides.items()}, way
        duplicates = json.loads((tmp_path / f"out{i}" / "meta.json").read_text())["dropped"]["duplicate"]
        assert duplicates == (2 * len(STORIES) if way == "overlapping" else 0), way


def test_text_key(tmp_path):
    rows = [{"story": s, "story_zh": "x"} for s in STORIES]
    file = write(tmp_path / "a.json", json.dumps(rows).encode())
    make(tmp_path / "out", file, text_key="story")
    assert_holds(tmp_path / "out", STORIES)


def read_texts(path, text_key="story_zh"):
    records = (found for block in read_blocks([path], "") for found in records_of(block))
    return [story_of(record, where, text_key) for where, record in records]


@pytest.mark.parametrize("name", [name for name in FORMATS if "strings" not in name])
@pytest.mark.parametrize("packing", ["", ".gz", ".tar.gz"])
def test_block_borders(tmp_path, monkeypatch, name, packing):
    """Wherever a block ends, in a character, a marker or a record, the stories stay whole."""
    data = FORMATS[name](STORIES[:9])
    path = write(tmp_path / (name + packing), data)
    if packing == ".gz":
        path.write_bytes(gzip.compress(data))
    elif packing:
        path.write_bytes(as_tar({name: data}, "w:gz"))
    # A text's first block must show the marker that it is split at.
    smallest = data.find(END.encode()) + len(END) if name.endswith(".txt") else 3
    for block in [*range(smallest, 60), 97, 256, 1021]:
        monkeypatch.setattr(stories.read, "BLOCK", block)
        texts = [t for t in map(reference_clean, read_texts(path)) if t]
        assert texts == STORIES[:9], block


def test_block_borders_end_to_end(base, tmp_path):
    """Blocks of 500 bytes, by one process and by three, give the bytes of one block."""
    file = write(tmp_path / "a.jsonl", jsonl(STORIES, ensure_ascii=False))
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        make(out, file, constants="stories.read.BLOCK = 500", workers=workers)
        for name in ("train.bin", "val.bin", "tokenizer.model"):
            assert files_of(out)[name] == files_of(base)[name]
        ours, expected = (json.loads((f / "meta.json").read_text()) for f in (out, base))
        for meta in (ours, expected):
            del meta["settings"]
        assert ours == expected


@pytest.mark.parametrize("name, rows", [
    ("a.jsonl", [b'{"story_zh": "\xe7\x8c\xab"}', b'{"story_zh": "\xe7\x8c}']),
    ("a.jsonl", [b'{"story_zh": "\xe7\x8c\xab"}', b'{"story_zh": "dog}']),
    ("a.jsonl", [b'{"story_zh": "\xe7\x8c\xab"}', b'{"story_zh": 3}']),
    ("a.jsonl", [b'{"story_zh": "\xe7\x8c\xab"}', b'{"story": "dog"}']),
    ("a.txt", [b"\xe7\x8c\xab", b"\xe7\x8c"]),
    ("b.txt", [b"a <|endoftext|>", b"\xe7\x8c <|endoftext|>"]),
])  # fmt: skip
def test_error_lines_across_blocks(tmp_path, monkeypatch, name, rows):
    """The line named is the line of the file, whichever block it falls into."""
    for bad in (1, 2, 7, 30):
        path = write(tmp_path / name, b"\n".join([rows[0]] * (bad - 1) + [rows[1]] + [rows[0]] * 9))
        for block in (20, 33, 64, 1000, 1 << 20):
            monkeypatch.setattr(stories.read, "BLOCK", block)
            with pytest.raises(UserError, match=re.escape(f"{path}:{bad}:")):
                read_texts(path)


# ---- Cleaning and counting -------------------------------------------------------------------------


def test_cleaning_and_counts(tmp_path):
    raw = [
        "  猫和狗。 \n", "猫和狗。",  # equal once cleaned
        "cafe\u0301 第一", "café 第一", "caf\u00e9 第一\r\n",  # NFD and NFC
        "一\r\n二\r三\n四", "一\n二\n三\n四",
        "", "   ", "\r\n\t ", "\u3000", "\u200b", "\ufeff \u200d\ufe0f", "\0\x1b", "\u3164\u2800",
        "\u202e\xad\n",  # until here empty
        "下划▁线", "▁", "零\0字节", "换\v行", "红\x1b[31m字", "删\x7f除", "下\x85行",  # control
        "双  空格\t和\t制表", "\ufeff有记号\u200b", "😀👨‍👩‍👧", "爱❤\ufe0f", "旗🏴\U000e0067\U000e007f", "零\u200b宽",
        *STORIES,
    ]  # fmt: skip
    halves = [
        '{"story_zh": "\\ud800 半个"}\n',
        '{"story_zh": "半个 \\udc00"}\n',
        '{"story_zh": "\\udc00\\ud800"}\n',
    ]
    whole = '{"story_zh": "\\ud83d\\ude00 两半成一个"}\n'
    file = write(tmp_path / "a.jsonl", jsonl(raw) + "".join([*halves, whole]).encode())
    make(tmp_path / "out", file)

    cleaned = [reference_clean(t) for t in [*raw, "😀 两半成一个"]]
    kept = [t for t in cleaned if t and not re.search("[\\0-\\x08\\x0b-\\x1f\\x7f-\\x9f▁]", t)]
    unique = list(dict.fromkeys(kept))
    found = assert_holds(tmp_path / "out", unique)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["dropped"] == {
        "duplicate": len(kept) - len(unique),
        "empty": 9,
        "not_unicode": 3,
        "unencodable": 7,
    }
    assert {"有记号", "爱❤\ufe0f", "旗🏴\U000e0067\U000e007f", "零\u200b宽", "😀👨‍👩‍👧"} <= set(unique)
    for split, texts in found.items():
        assert meta[split] == {
            "stories": len(texts),
            "tokens": (tmp_path / "out" / f"{split}.bin").stat().st_size // 2,
            "characters": sum(map(len, texts)),
            "bytes": sum(len(t.encode()) for t in texts),
            "sha256": hashlib.sha256((tmp_path / "out" / f"{split}.bin").read_bytes()).hexdigest(),
        }
    model = (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert meta["tokenizer_sha256"] == hashlib.sha256(model).hexdigest()
    loaded = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert (meta["vocab_size"], meta["end_token"]) == (loaded.vocab_size(), loaded.eos_id())
    expected = {"val_fraction": 0.2, "vocab_size": 600, "text_key": "story_zh", "inputs": [str(file)]}
    assert expected.items() <= meta["settings"].items()


def test_blocks_without_stories(tmp_path):
    """Files and blocks in which nothing is left are no reason to stop."""
    write(tmp_path / "in" / "0.jsonl", b"\n\n\n")
    write(tmp_path / "in" / "1.jsonl", jsonl(STORIES))
    write(tmp_path / "in" / "2.jsonl", jsonl(["", " "]))
    write(tmp_path / "in" / "3.txt", b"")
    write(tmp_path / "in" / "4.json", b"[]")
    write(tmp_path / "in" / "5.txt", b"\r\n\r\n")
    make(tmp_path / "out", tmp_path / "in")
    assert_holds(tmp_path / "out", STORIES)


SPELLINGS = ["<s>", "</s>", "<|endoftext|>", "<|im_end|>", "<|user|>", "<pad>", "<unk>", "[gMASK]", "[/INST]",
             "<</SYS>>", "<end_of_turn>", "<｜User｜>"]  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_spelt_control_tokens_are_counted(base, tmp_path, name):
    """They stay text; the report counts the stories that hold one, and shows it."""
    texts = [f"小狗{i}走了。{spelling}" for i, spelling in enumerate(SPELLINGS)]
    form = {
        "a.jsonl": jsonl,
        "a.json": FORMATS["a.json"],
        "a.csv": as_csv,
        "a.txt": lambda s: "\n".join(s).encode(),
    }
    if name == "a.txt":
        texts.remove(f"小狗2走了。{END}")  # which is a separator there
    plain = [text for text in ONE_LINE if "<" not in text] + ["小狗<走>了 [笑]，1<2。<br>"]
    file = write(tmp_path / name, form[name](texts + plain))
    done = make(tmp_path / "out", file, tokenizer=base / "tokenizer.model")
    assert_holds(tmp_path / "out", texts + plain)
    assert f"{len(texts)} texts spell a control token, which stays text: '<s>'" in done.stdout
    done = make(
        tmp_path / "out", write(tmp_path / name, form[name](plain)), tokenizer=base / "tokenizer.model"
    )
    assert "control token" not in done.stdout


def test_what_separates_is_no_story(base, tmp_path):
    """The separator behind the last story does not count as an empty one."""
    for name, data in {
        "a.txt": "\n".join(ONE_LINE) + "\n",
        "b.txt": f"\n{END}\n".join(STORIES) + END,
    }.items():
        make(tmp_path / "out", write(tmp_path / name, data.encode()), tokenizer=base / "tokenizer.model")
        assert json.loads((tmp_path / "out" / "meta.json").read_text())["dropped"]["empty"] == 0


def test_the_first_story_is_shown(tmp_path):
    """With its pieces, ids and text, as a reader of train.bin finds them."""
    file = write(tmp_path / "a.jsonl", jsonl(STORIES))
    *_, begins, pieces, decoded = make(tmp_path / "out", file).stdout.splitlines()
    story = read_folder(tmp_path / "out")["train"][0]
    tokenizer = load_tokenizer((tmp_path / "out" / "tokenizer.model").read_bytes(), "out")
    ids = tokenizer.encode(story)
    assert f"begins with {len(ids)} tokens, then the end token 2" in begins
    for token in ids[:20]:
        assert f"{tokenizer.id_to_piece(token)} {token}" in pieces
    assert decoded.strip() == f"decoded: {story}"
    assert prepare.first_story(tmp_path / "out", 2) == ids


# ---- The split -------------------------------------------------------------------------------------


def test_a_story_never_changes_sides(base, tmp_path):
    """Whatever the order of files, the company, the workers, the format and the tokenizer."""
    sides = {k: set(v) for k, v in read_folder(base).items()}
    more = [f"另一个故事，第{i}个。" for i in range(200)]
    shuffled = random.Random(7).sample(STORIES + more, len(STORIES) + len(more))
    write(tmp_path / "more.jsonl", jsonl(more))
    write(tmp_path / "reversed.jsonl", jsonl(STORIES[::-1]))
    write(tmp_path / "shuffled.json", json.dumps([f" {s}\r\n" for s in shuffled]).encode())
    more, reverse, shuffled = (tmp_path / name for name in ("more.jsonl", "reversed.jsonl", "shuffled.json"))
    runs = {
        "before": ([reverse, more], {"workers": 1}),
        "after": ([more, reverse], {"workers": 4, "vocab_size": 500}),
        "among": ([shuffled], {"constants": "stories.read.BLOCK = 300"}),
        "tokenizer": ([reverse, shuffled, more], {"tokenizer": base / "tokenizer.model"}),
    }
    for name, (inputs, options) in runs.items():
        make(tmp_path / name, *inputs, **options)
        found = read_folder(tmp_path / name)
        assert len(found["train"]) + len(found["val"]) == len(STORIES) + 200
        assert not set(found["train"]) & set(found["val"])
        for split in found:
            assert set(found[split]) & set(STORIES) == sides[split], (name, split)


def test_split_is_as_large_as_asked(tmp_path, base):
    """Of 4,000 stories the share that --val_fraction names falls to validation, to 5 standard deviations."""
    file = write(tmp_path / "a.jsonl", jsonl(f"第{i}个故事" for i in range(4000)))
    for fraction in (0.05, 0.5):
        make(tmp_path / f"{fraction}", file, val_fraction=fraction, tokenizer=base / "tokenizer.model")
        found = read_folder(tmp_path / f"{fraction}")
        assert len(found["train"]) + len(found["val"]) == 4000
        assert abs(len(found["val"]) - 4000 * fraction) < 5 * (4000 * fraction * (1 - fraction)) ** 0.5


# ---- The tokenizer ---------------------------------------------------------------------------------

TRICKY = [
    "</s>", "<s>", "<unk>", "<pad>", "<|user|>", "<|assistant|>", END, "<0x41>", "<0x00>", "<0xE2>", "\0", "\t", " ",
    "  ", "\n", "\u2585", "\u2047", "\ufffd", "\ufeff", "\u200b", "\u202e", "שלום", "مرحبا", "😀", "👩‍👩‍👧", "🇨🇳",
    "e\u0301", "ﬁ", "Ａ", "①", "猫", "hello", "\U0010ffff", "\x1b[0m", "\\n", "%s",
]  # fmt: skip
any_text = st.one_of(
    st.text(), st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=3))).map("".join)
)


def assert_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not any(tokenizer.is_control(i) or tokenizer.is_unknown(i) for i in ids)
    assert all(0 <= i < tokenizer.vocab_size() for i in ids)


@settings(max_examples=1500, deadline=None)
@given(any_text)
@example("".join(TRICKY))
def test_round_trip_of_any_text(tokenizer, text):
    """Whatever is in a text: once cleaned it comes back as it was, and made no control token."""
    cleaned = clean(text)
    assert cleaned == reference_clean(text) == clean(cleaned)
    if "▁" not in cleaned:
        assert_round_trip(tokenizer, cleaned)


@settings(max_examples=300, deadline=None)
@given(any_text)
@example("".join(TRICKY))
def test_round_trip_with_chatglm(chatglm, text):
    cleaned = clean(text)
    if "▁" not in cleaned:
        assert_round_trip(chatglm, cleaned)


def test_pieces_that_every_tokenizer_has(tokenizer):
    """Tokens for begin, end, padding and unknown, all distinct; a piece for every byte; no dummy prefix."""
    special = [tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()]
    special += [tokenizer.piece_to_id(piece) for piece in ("<|user|>", "<|assistant|>")]
    assert len(set(special)) == 6 and min(special) >= 0
    assert all(tokenizer.is_control(i) for i in special[1:])
    assert sum(tokenizer.is_byte(i) for i in range(tokenizer.vocab_size())) == 256
    assert "".join(tokenizer.encode("小狗捡到了苹果", out_type=str)) == "小狗捡到了苹果"


def test_corpus_full_of_control_spellings(tmp_path):
    """A corpus may spell the control tokens as often as it likes: training goes through, none comes out."""
    texts = [f"</s><s> <unk><pad>{END} <|user|>猫{i}<|assistant|><0x41><0xE7> </s></s>" for i in range(300)]
    file = write(tmp_path / "a.jsonl", jsonl(texts))
    make(tmp_path / "out", file)
    assert_holds(tmp_path / "out", texts)


def test_small_corpus_says_what_it_fills(tmp_path):
    file = write(tmp_path / "a.jsonl", jsonl(STORIES))
    done = make(tmp_path / "out", file, vocab_size=30000)
    size = json.loads((tmp_path / "out" / "meta.json").read_text())["vocab_size"]
    assert 300 < size < 30000
    (line,) = [line for line in done.stdout.splitlines() if "30,000" in line]
    assert f"{size:,}" in line
    assert_holds(tmp_path / "out", STORIES)
    done = make(tmp_path / "out", file, vocab_size=500)
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["vocab_size"] == 500
    assert "fill" not in done.stdout


def test_chatglm_tokenizer(shared, tmp_path):
    done = make(tmp_path / "out", shared / "zh_stories.jsonl", tokenizer=shared / "chatglm_tokenizer.model")
    raw = [
        json.loads(line)["story_zh"] for line in (shared / "zh_stories.jsonl").read_text("utf-8").splitlines()
    ]
    kept = [t for t in map(reference_clean, raw) if t and "▁" not in t]
    assert_holds(tmp_path / "out", list(dict.fromkeys(kept)))  # which holds ids against vocab_size, too
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["vocab_size"] == 64789
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (
        shared / "chatglm_tokenizer.model"
    ).read_bytes()
    assert "training" not in done.stdout


@pytest.fixture(scope="session")
def nmt_tokenizer(tmp_path_factory):
    """A tokenizer with SentencePiece's own settings, as many are: it normalizes (nmt_nfkc) and has no
    bytes.
    """
    path = tmp_path_factory.mktemp("nmt") / "nmt.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"第{i}天，小狗走了。小猫、小熊和小鸟也走了！" for i in range(50)]),
        model_prefix=str(path.with_suffix("")), vocab_size=80, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_a_tokenizer_that_changes_the_text(nmt_tokenizer, tmp_path, task):
    """Refused with a share and an example; with a flag accepted, and the report still says it."""
    texts = [f"第{i}天，小狗走了。" for i in range(60)]
    records = [{"story_zh": t, "summary_zh": "小狗走了"} for t in texts]
    file = write(tmp_path / "a.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())
    command = ["prepare.py", file, "--out_dir", tmp_path / "out", "--tokenizer", nmt_tokenizer, "--val_fraction", 0.2,
               "--task", task]  # fmt: skip
    done = run_script(*command, check=False)
    example = (
        "'第0天，小狗走了。' becomes '第0天,小狗走了。'" if task == "pretrain" else "'摘要：小狗走了' becomes"
    )
    assert_one_line_error(done, nmt_tokenizer, example, "(100.00%)", "--allow_lossy_tokenizer")
    assert not (tmp_path / "out").exists()
    done = run_script(*command, "--allow_lossy_tokenizer")
    assert f"{nmt_tokenizer}: changes 60 of 60 texts" in done.stdout


def test_a_few_changed_texts_are_reported(nmt_tokenizer, tmp_path):
    """Up to 1% pass: one of 200 texts with a character that the tokenizer does not know."""
    texts = [f"第{i}天小狗走了。" for i in range(199)] + ["小狗饕走了。"]
    file = write(tmp_path / "a.jsonl", jsonl(texts))
    done = run_script("prepare.py", file, "--out_dir", tmp_path / "out", "--tokenizer", nmt_tokenizer,
                      "--val_fraction", 0.1)  # fmt: skip
    assert "changes 1 of 200 texts (0.50%)" in done.stdout and "饕" in done.stdout


def test_changed_texts_are_judged_at_the_end(nmt_tokenizer, tmp_path):
    """30 changed texts before 9,000 unchanged ones, or behind them: 0.33% in all, accepted in either
    order.
    """
    changed = [f"小狗饕走了{i}。" for i in range(30)]
    unchanged = [f"第{i}天小狗走了。" for i in range(9000)]
    for name, texts in (("first", changed + unchanged), ("last", unchanged + changed)):
        file = write(tmp_path / f"{name}.jsonl", jsonl(texts))
        done = make(tmp_path / name, file, tokenizer=nmt_tokenizer, constants="stories.read.BLOCK = 20_000")
        assert "changes 30 of 9,030 texts (0.33%)" in done.stdout


def test_too_small_a_vocabulary_says_what_is_needed(tmp_path):
    """The number in the message works."""
    file = write(tmp_path / "a.jsonl", jsonl(STORIES))
    command = ["prepare.py", file, "--out_dir", tmp_path / "out", "--val_fraction", 0.2, "--vocab_size"]
    done = run_script(*command, 270, check=False)
    assert_one_line_error(done, "--vocab_size 270", "at least")
    needed = re.search(r"at least (\d+)", done.stderr)[1]
    assert_one_line_error(run_script(*command, int(needed) - 1, check=False), "at least")
    run_script(*command, needed)


def with_pieces(model, total):
    """A SentencePiece model grown to `total` pieces: protobuf appends to a repeated field by
    concatenation.
    """
    pieces = []
    for i in range(total - sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()):
        piece = f"\U000f0000{i}".encode()
        record = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + np.float32(-1e6).tobytes()
        pieces.append(b"\x0a" + bytes([len(record)]) + record)
    return model + b"".join(pieces)


def test_the_largest_vocabulary(base, tmp_path):
    """65,536 pieces are what uint16 holds; one more is refused."""
    model = (base / "tokenizer.model").read_bytes()
    write(tmp_path / "fits.model", with_pieces(model, 65536))
    write(tmp_path / "over.model", with_pieces(model, 65537))
    texts = [*STORIES, *(f"\U000f0000{65535 - 600 - i}" for i in range(30))]
    file = write(tmp_path / "a.jsonl", jsonl(texts))
    make(tmp_path / "out", file, tokenizer=tmp_path / "fits.model")
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["vocab_size"] == 65536
    assert_holds(tmp_path / "out", texts)
    done = run_script("prepare.py", file, "--out_dir", tmp_path / "no", "--tokenizer", tmp_path / "over.model",
                      check=False)  # fmt: skip
    assert_one_line_error(done, tmp_path / "over.model", "65,537", "65,536")
    assert not (tmp_path / "no").exists()


def test_bounded_sample(tmp_path):
    """A corpus beyond the bound: the same tokenizer for any order of stories and files and any workers."""
    texts = [
        f"第{i}天，{'猫狗兔熊鸟鱼'[i % 6]}{'去来跑跳飞游'[i % 5]}了{i * 31 % 97}次。" * (1 + i % 3)
        for i in range(400)
    ]
    bound = 2000
    assert sum(map(len, texts)) > 4 * bound
    models = []
    for seed, workers in ((1, 1), (2, 3), (3, 2)):
        order = random.Random(seed).sample(texts, len(texts))
        files = [write(tmp_path / f"{seed}{i}.jsonl", jsonl(order[i::3])) for i in range(3)]
        constants = f"stories.read.BLOCK = 600; prepare.SAMPLE = {bound}"
        done = make(tmp_path / f"out{seed}", *files, constants=constants, workers=workers, vocab_size=450)
        drawn = int(re.search(r"tokenizer on ([\d,]+) characters", done.stdout)[1].replace(",", ""))
        assert bound // 4 < drawn <= bound
        models.append((tmp_path / f"out{seed}" / "tokenizer.model").read_bytes())
        assert {
            *read_folder(tmp_path / f"out{seed}")["train"],
            *read_folder(tmp_path / f"out{seed}")["val"],
        } == {*texts}
    assert models[0] == models[1] == models[2]


# ---- The folder appears whole or not at all --------------------------------------------------------


def start_in_the_middle(base, out, pipe, **more):
    """prepare.py, encoding: it has begun the token files and waits for more input from a named pipe."""
    os.mkfifo(pipe)
    command = [sys.executable, "prepare.py", pipe, "--out_dir", out, "--tokenizer", base / "tokenizer.model"]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **more,
    )  # fmt: skip (a shell's background job, as these tests may be one, ignores Ctrl-C, and so would what it starts)
    feed = open(pipe, "wb")  # noqa: SIM115
    chunk = jsonl(f"第{i}个故事。" for i in range(20000))
    while not any(p.stat().st_size for p in out.parent.glob("*/train.bin.tmp") if p.parent != out):
        feed.write(chunk)
    return process, feed


def end_group(process, feed):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(ValueError):  # closed already
        process.stdout.read()  # at its end all have ended, and no worker holds the lock
    process.stdout.close()
    process.stderr.close()
    with contextlib.suppress(BrokenPipeError):
        feed.close()


@pytest.mark.parametrize("old", [False, True])
def test_kill_9_in_the_middle(base, tmp_path, old):
    """Nothing appears, an older folder stays as it was, and the next run goes through and tidies up."""
    out, before = tmp_path / "work" / "out", None
    out.parent.mkdir()
    if old:
        shutil.copytree(base, out)
        before = files_of(out)
    process, feed = start_in_the_middle(base, out, tmp_path / "pipe.jsonl")
    process.kill()
    process.wait()
    end_group(process, feed)
    if old:
        assert files_of(out) == before and sorted(p.name for p in out.iterdir()) == MADE
    else:
        assert not out.exists()
    make(out, write(tmp_path / "a.jsonl", jsonl(ONE_LINE)))
    assert_holds(out, ONE_LINE)
    assert names_in(out.parent) == ["out", *(f"out/{name}" for name in MADE)]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to see a process's children")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_leaves_no_process(base, tmp_path, how):
    """The workers of a killed run end as well."""
    process, feed = start_in_the_middle(base, tmp_path / "work" / "out", tmp_path / "pipe.jsonl")
    try:
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert workers
        process.send_signal(how)
        process.wait()

        def alive(pid):
            try:
                return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            except FileNotFoundError:
                return False

        for _ in range(200):
            if not any(map(alive, workers)):
                break
            time.sleep(0.05)
        assert not any(map(alive, workers))
    finally:
        end_group(process, feed)


def test_ctrl_c(base, tmp_path):
    """Ctrl-C, which reaches every process of the terminal, ends in one line and leaves nothing."""
    process, feed = start_in_the_middle(base, tmp_path / "work" / "out", tmp_path / "pipe.jsonl")
    try:
        time.sleep(1)  # so that the workers have nothing to do: a busy one is interrupted elsewhere
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(BrokenPipeError):
            while True:
                feed.write(b"\n" * 1000)
        stdout, stderr = process.communicate(timeout=60)
        assert_one_line_error(
            subprocess.CompletedProcess([], process.returncode, stdout, stderr), "interrupted"
        )
        assert names_in(tmp_path / "work") == []
    finally:
        end_group(process, feed)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to see a process's children")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGTERM])
def test_a_worker_that_is_killed(base, tmp_path, number):
    """Said in one line; nothing is left, neither files nor processes."""
    process, feed = start_in_the_middle(base, tmp_path / "work" / "out", tmp_path / "pipe.jsonl")
    try:
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[-1]), number)
        with contextlib.suppress(BrokenPipeError):
            while True:
                feed.write(jsonl(f"第{i}个故事。" for i in range(20000)))
        stdout, stderr = process.communicate(timeout=60)
        done = subprocess.CompletedProcess([], process.returncode, stdout, stderr)
        assert_one_line_error(done, "a worker process ended abruptly")
        assert names_in(tmp_path / "work") == []
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    finally:
        end_group(process, feed)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("tokenizer_given", [False, True])
def test_failing_run_leaves_nothing(base, tmp_path, old, tokenizer_given):
    """A mistake on the very last line, megabytes after the first stories were written."""
    bad = jsonl(f"第{i}个故事。" for i in range(60000)) + b'{"story_zh": '
    file = write(tmp_path / "in" / "a.jsonl", bad)
    out, before = tmp_path / "work" / "out", {}
    out.parent.mkdir()
    if old:
        shutil.copytree(base, out)
        before = files_of(out)
    more = ["--tokenizer", base / "tokenizer.model"] if tokenizer_given else ["--vocab_size", 400]
    done = script_here(prepare.main, "prepare.py", file, "--out_dir", out, *more)
    assert_one_line_error(done, f"{file}:60001")
    assert names_in(out.parent) == (["out", *(f"out/{name}" for name in MADE)] if old else [])
    assert not old or files_of(out) == before


def test_prepared_again(base, tmp_path):
    """A folder that prepare.py made is replaced by the next run, and nothing stays beside it."""
    out = tmp_path / "work" / "out"
    shutil.copytree(base, out)
    make(out, write(tmp_path / "a.jsonl", jsonl(ONE_LINE)))
    assert_holds(out, ONE_LINE)
    assert names_in(out.parent) == ["out", *(f"out/{name}" for name in MADE)]


def test_leftovers_of_a_killed_run(base, tmp_path):
    """Killed while it replaced an old folder: both stood beside each other, and the next run copes."""
    out = tmp_path / "work" / "out"
    for name in ("out", "out.old", "out.tmp"):
        shutil.copytree(base, out.with_name(name))
    (out.parent / "out.old" / "train.bin").unlink()  # the removal had begun
    make(out, write(tmp_path / "a.jsonl", jsonl(ONE_LINE)))
    assert_holds(out, ONE_LINE)


@pytest.mark.parametrize("name", ["out", "out.tmp", "out.old"])
def test_foreign_folder_is_never_touched(base, tmp_path, name):
    """Neither the folder named, nor one that happens to lie beside it."""
    out = tmp_path / "work" / "out"
    if name != "out":
        shutil.copytree(base, out)
    for file in ("train.bin", "thesis.tex"):
        write(out.with_name(name) / file, b"years of work")
    file = write(tmp_path / "a.jsonl", jsonl(ONE_LINE))
    done = script_here(
        prepare.main, "prepare.py", file, "--out_dir", out, "--vocab_size", 500, "--val_fraction", 0.2
    )
    for theirs in ("train.bin", "thesis.tex"):
        assert (out.with_name(name) / theirs).read_bytes() == b"years of work"
    if name == "out":
        assert_one_line_error(done, out)


NAMESPACE = ["unshare", "-Urm"]


def in_namespace(script, *args):
    """Run a shell script where it may mount; its mounts end with it."""
    return subprocess.run(
        [*NAMESPACE, "sh", "-c", script, "sh", *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="session")
def mounting():
    if not shutil.which("unshare") or in_namespace("mount -t tmpfs none /mnt").returncode:
        pytest.skip("this machine does not let us mount a small disk")


@pytest.mark.parametrize("options, where", [("size=200k", "space"), ("ro", "ead-only")])
def test_full_and_unwritable_disk(mounting, base, tmp_path, options, where):
    """A disk that fills up in the middle, and one that cannot be written at all: one line, nothing left."""
    file = write(tmp_path / "a.jsonl", jsonl(f"第{i}个故事。" for i in range(60000)))
    (tmp_path / "disk").mkdir()
    script = """mount -t tmpfs -o $4 none "$1/disk"; "$2" prepare.py "$1/a.jsonl" --out_dir "$1/disk/out" \\
        --tokenizer "$3"; code=$?; ls -A -I out.lock "$1/disk" >"$1/left"; exit $code"""
    done = in_namespace(script, tmp_path, sys.executable, base / "tokenizer.model", options)
    assert file.exists() and (tmp_path / "left").read_text() == ""
    assert_one_line_error(done, where, tmp_path / "disk")


def test_archive_writes_nothing_outside(base, tmp_path):
    """Members named ../ or /absolute are only read; links, pipes and devices are not followed."""
    secret = write(tmp_path / "secret.jsonl", jsonl(["这是秘密，不可泄露。"]))
    good = jsonl(STORIES)
    with tarfile.open(tmp_path / "in.tar.gz", "w:gz") as archive:

        def add(name, kind=tarfile.REGTYPE, link="", data=b""):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, len(data)
            archive.addfile(member, io.BytesIO(data))

        add("good.jsonl", data=good)
        add("../escaped.jsonl", data=jsonl(["爬出来的故事。"]))
        add(str(tmp_path / "absolute.jsonl"), data=jsonl(["绝对路径的故事。"]))
        add("link.jsonl", tarfile.SYMTYPE, str(secret))
        add("hard.jsonl", tarfile.LNKTYPE, "../secret.jsonl")
        add("pipe.jsonl", tarfile.FIFOTYPE)
        add("null.jsonl", tarfile.CHRTYPE)
        add("folder.jsonl", tarfile.DIRTYPE)
    before = names_in(tmp_path)
    make(tmp_path / "out", tmp_path / "in.tar.gz")
    assert names_in(tmp_path) == sorted([*before, "out", *(f"out/{name}" for name in MADE)])
    assert not any((folder / "escaped.jsonl").exists() for folder in (ROOT, ROOT.parent, tmp_path.parent))
    found = read_folder(tmp_path / "out")
    texts = {*found["train"], *found["val"]}
    assert set(STORIES) <= texts <= {*STORIES, "爬出来的故事。", "绝对路径的故事。"}


def test_archive_members_that_are_not_read(tmp_path):
    """Links, archives, unknown kinds, pipes and metadata are named once; hidden ones are skipped, as in a
    folder.
    """
    with tarfile.open(tmp_path / "in.tar", "w") as archive:

        def add(name, data=b"", kind=tarfile.REGTYPE, target=""):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, len(data)
            archive.addfile(member, io.BytesIO(data))

        add("./sub", kind=tarfile.DIRTYPE)
        add("./sub/a.jsonl", jsonl(STORIES))
        for name in (".hidden/b.jsonl", "./sub/.cache/b.jsonl", "sub/._a.jsonl"):
            add(name, jsonl(["不可见的故事。"]))
        add("hard.jsonl", kind=tarfile.LNKTYPE, target="./sub/a.jsonl")
        add("soft.jsonl", kind=tarfile.SYMTYPE, target="sub/a.jsonl")
        add("blob", jsonl(["没有后缀的故事。"]))
        add("b.tsv", b"story_zh\n")
        add("inner.tar.gz", as_tar({"c.jsonl": jsonl(["里面的故事。"])}, "w:gz"))
        add("pipe.jsonl", kind=tarfile.FIFOTYPE)
        add("dataset_info.json", b"{}")
    done = make(tmp_path / "out", tmp_path / "in.tar")
    assert_holds(tmp_path / "out", STORIES)
    for name in (
        "hard.jsonl",
        "soft.jsonl",
        "blob",
        "b.tsv",
        "inner.tar.gz",
        "pipe.jsonl",
        "dataset_info.json",
    ):
        assert done.stderr.count(f"in.tar/{name}") == 1, done.stderr
    for name in (".hidden", ".cache", "._a", "sub/a.jsonl"):
        assert name not in done.stderr


# ---- What stands around a run ----------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "/"])
def test_out_dir_is_a_link(base, tmp_path, end):
    """The link stays, and its target is written, the first time and again; nothing stays beside either."""
    write(tmp_path / "disk" / "big" / "train.bin", b"")
    (tmp_path / "data").mkdir()
    link = tmp_path / "data" / "mine"
    link.symlink_to("../disk/big")
    file = write(tmp_path / "a.jsonl", jsonl(STORIES))
    for _ in range(2):
        make(f"{link}{end}", file, tokenizer=base / "tokenizer.model")
        assert link.is_symlink() and not (tmp_path / "disk" / "big").is_symlink()
        assert_holds(link, STORIES)
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine"]
        assert names_in(tmp_path / "disk") == ["big", *(f"big/{name}" for name in MADE)]


def test_out_dir_in_a_linked_folder(base, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to("disk")
    make(tmp_path / "data" / "new" / "mine", write(tmp_path / "a.jsonl", jsonl(STORIES)))
    assert_holds(tmp_path / "disk" / "new" / "mine", STORIES)


@pytest.mark.parametrize("target", ["nowhere", "/nowhere/at/all", "link", "file"])
@pytest.mark.parametrize("below", ["", "/mine"])
def test_out_dir_is_a_link_that_cannot_be_used(tmp_path, target, below):
    """To nothing, to itself, to a file: one line that names it, before the input is looked at."""
    write(tmp_path / "file", b"precious")
    link = tmp_path / "link"
    link.symlink_to(target)
    done = script_here(prepare.main, "prepare.py", tmp_path / "no.jsonl", "--out_dir", f"{link}{below}")
    assert_one_line_error(done, link)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_worker_processes_without_shared_memory(mounting, tmp_path):
    """/dev/shm that cannot be written: one line that names it and says what to do."""
    file = write(tmp_path / "a.jsonl", jsonl(STORIES))
    script = 'mount -t tmpfs -o ro none /dev/shm; "$1" prepare.py "$2" --out_dir "$3"'
    done = in_namespace(script, sys.executable, file, tmp_path / "out")
    assert_one_line_error(done, "write to /dev/shm", "Read-only", "mount")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------
# Bad input: one line that names file and line, exit status 2, nothing written

GOOD = jsonl(STORIES[:20])
LINES = GOOD.splitlines(keepends=True)
DEEP = b"[" * 200_000
PRETTY = json.dumps([{"story_zh": s} for s in ONE_LINE[:5]], indent=1, ensure_ascii=False).encode()
ZIPPED = gzip.compress(random.Random(0).randbytes(3000).hex().encode() + b"\n" + GOOD)
DAMAGED = ZIPPED[:900] + bytes(255 - b for b in ZIPPED[900:1000]) + ZIPPED[1000:]

# name of the file: (its bytes, words of the message after the file's path)
BAD_FILES = {
    "empty.jsonl": (b"", ["no stor"]),
    "empty.json": (b"", []),
    "empty.txt": (b"", ["no stor"]),
    "empty.csv": (b"", ["no stor"]),
    "empty.txt.gz": (b"", []),
    "empty_inside.jsonl.gz": (gzip.compress(b""), ["no stor"]),
    "empty.tar.gz": (b"", []),
    "no_stories.tar.gz": (as_tar({"README.md": b"x"}, "w:gz"), ["no stor"]),
    "only_blank.jsonl": (jsonl(["", " ", "\n"]), ["no stor"]),
    "only_blank.json": (b"[]", ["no stor"]),
    "cut.jsonl": (GOOD[:-9], [":20:", "JSON"]),
    "cut.json": (PRETTY[: PRETTY.rindex(b"}") - 4], ["JSON"]),
    "cut_between.json": (PRETTY[: PRETTY.rindex(b"{")], ["JSON"]),
    "cut.jsonl.gz": (gzip.compress(GOOD)[:-60], ["cut off"]),
    "cut_header.txt.gz": (gzip.compress(GOOD)[:6], []),
    "cut.tar.gz": (as_tar({"a.jsonl": ZIPPED.hex().encode()}, "w:gz")[:-900], ["cut off"]),
    "cut.tar": (as_tar({"a.jsonl": GOOD})[:1000], ["cut off"]),
    "damaged.jsonl.gz": (DAMAGED, ["damaged"]),
    "checksum.jsonl.gz": (gzip.compress(GOOD)[:-8] + bytes(8), ["damaged"]),
    "not_gzip.jsonl.gz": (GOOD, ["damaged"]),
    "not_tar.tar.gz": (gzip.compress(GOOD), ["damaged"]),
    "gbk.jsonl": (b"".join(LINES[:4]) + '{"story_zh": "三只猫"}\n'.encode("gbk") + LINES[5], [":5:", "UTF-8"]),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), [":1:", "UTF-8"]),
    "gbk.txt": (b"one\ntwo\n" + "三只猫".encode("gbk"), [":3:", "UTF-8"]),
    "marked_gbk.txt": (f"one\n{END}\n".encode() + "三只猫".encode("gbk"), [":3:", "UTF-8"]),
    "gbk.txt.gz": (gzip.compress(b"one\ntwo\n" + "三只猫".encode("gbk")), [":3:", "UTF-8"]),
    "gbk.tar.gz": (as_tar({"sub/b.jsonl": b"".join(LINES[:3]) + b"\xff\n"}, "w:gz"), ["/sub/b.jsonl:4:", "UTF-8"]),
    "gbk.json": (PRETTY.decode().encode("gbk", "ignore"), ["UTF-8"]),
    "late_gbk.json": (PRETTY[:-1].rstrip() + ',\n"三只猫"]'.encode("gbk"), ["UTF-8"]),
    "cut_character.json": (PRETTY[: PRETTY.rindex("。".encode()) + 1], []),
    "gbk.csv": (as_csv(ONE_LINE[:5]).decode().encode("gbk", "ignore"), ["UTF-8"]),
    "malformed.jsonl": (b"".join(LINES[:6]) + b'{"story_zh": "cat"\n' + LINES[7], [":7:", "JSON"]),
    "text.jsonl": (b"once upon a time\n", [":1:", "JSON"]),
    "two_on_a_line.jsonl": (LINES[0] + LINES[1].strip() + LINES[2], [":2:", "JSON"]),
    "malformed.tar.gz": (as_tar({"a.jsonl": GOOD, "b.jsonl": LINES[0] + b"{\n"}, "w:gz"), ["/b.jsonl:2:", "JSON"]),
    "malformed.json": (b'[\n{"story_zh": "one"},\n{"story_zh": "two"},\n{"story_zh": x},\n"four"]', [":4:", "JSON"]),
    "blank_first.json": (b'\n\n[\n{"story_zh": "one"},\n{"story_zh": two}]', [":5:", "JSON"]),
    "after_the_list.json": (PRETTY + PRETTY, ["JSON"]),
    "no_comma.json": (b'["one"\n"two"\n"three"]', [":2:", "JSON"]),
    "object.json": (b'{"stories": []}', ["list"]),
    "lines.json": (GOOD, ["list"]),
    "deep.jsonl": (LINES[0] + DEEP + b"\n", [":2:"]),
    "deep.json": (b'["one",\n' + DEEP, [":2:"]),
    "wrong_key.jsonl": (LINES[0] + b'{"text": "a", "title": "b"}\n', [":2:", "story_zh", "text", "title"]),
    "wrong_key.json": (b'[{"story_zh": "a"}, {"text": "a", "title": "b"}]', ["2", "story_zh", "text", "title"]),
    "wrong_key.csv": (b"text,title\na,b\n", ["story_zh", "text", "title"]),
    "no_key.jsonl": (b"{}\n", [":1:", "story_zh"]),
    "number.jsonl": (LINES[0] + b'{"story_zh": 3}\n', [":2:", "story_zh"]),
    "list.json": (b'[{"story_zh": ["a"]}]', ["1", "story_zh"]),
    "short_row.csv": (b"title,story_zh\na,one\nb\n", [":3", "fewer columns"]),
    "no_record.jsonl": (LINES[0] + b"[1]\n", [":2:"]),
    "no_record.json": (b'["a", 17]', ["2"]),
    "quotes.csv": (b'story_zh\none\n"two" or three\n', [":3:", "CSV"]),
    "open_quote.csv": (b'story_zh\none\n"two\n', ["CSV"]),
    "endless.jsonl": (b"a" * (3 * stories.read.LONGEST // 2), [":1:"]),
    "story.docx": (b"PK", [".jsonl"]),
    "one_story.jsonl": (LINES[0], []),
    "indented.jsonl": (json.dumps({"story_zh": "a"}, indent=2).encode(), [":1:", "one object a line"]),
}  # fmt: skip


def assert_refused(tmp_path, *args, words=()):
    """One line with these words, and no folder, whole or begun."""
    before = names_in(tmp_path)
    options = [] if "--out_dir" in args else ["--out_dir", tmp_path / "out"]
    done = script_here(prepare.main, "prepare.py", *args, *options)
    assert_one_line_error(done, *words)
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path, name):
    data, words = BAD_FILES[name]
    path = write(tmp_path / name, data)
    file = [path] if name != "one_story.jsonl" else []
    assert_refused(tmp_path, path, "--vocab_size", 600, words=[*file, *words])


@pytest.mark.parametrize(
    "name", ["empty.jsonl", "only_blank.jsonl", "gbk.json", "malformed.jsonl", "wrong_key.json"]
)
def test_bad_file_with_a_tokenizer_given(base, tmp_path, name):
    data, words = BAD_FILES[name]
    path = write(tmp_path / name, data)
    assert_refused(tmp_path, path, "--tokenizer", base / "tokenizer.model", words=[path, *words])


def test_missing_inputs(tmp_path):
    write(tmp_path / "bare" / "picture.png", b"")
    for name in ("no.jsonl", "no/folder", "*.jsonl", "bare", "bare/*"):
        assert_refused(tmp_path, tmp_path / name, words=[tmp_path / name])


def test_out_dir_must_be_named(tmp_path):
    done = script_here(prepare.main, "prepare.py", write(tmp_path / "a.jsonl", GOOD))
    assert_one_line_error(done, "--out_dir")


@pytest.mark.parametrize("option, value", [
    *(("--val_fraction", v) for v in ("0", "1", "-0.1", "1.5", "nan", "inf", "few")),
    *(("--vocab_size", v) for v in ("0", "-1", "65537", "1", "7", "many")),
    *(("--workers", v) for v in ("0", "-2", "all")),
])  # fmt: skip
def test_bad_numbers(tmp_path, option, value):
    """The message names the option and the value, and says more than these."""
    path = write(tmp_path / "a.jsonl", GOOD)
    assert_refused(tmp_path, path, option, value, words=[option, value])
    done = script_here(prepare.main, "prepare.py", path, "--out_dir", tmp_path / "out", option, value)
    reason = done.stderr.replace(option, "").replace("error", "")
    assert len(re.findall("[a-z]{2,}", reason)) >= 3, "no reason is given"


def test_bad_tokenizers(tmp_path, base):
    path = write(tmp_path / "a.jsonl", GOOD)
    model = (base / "tokenizer.model").read_bytes()
    endless = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORIES), model_writer=endless, vocab_size=500, byte_fallback=True, model_type="bpe",
        eos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    write(tmp_path / "text.model", GOOD)
    write(tmp_path / "empty.model", b"")
    write(tmp_path / "cut.model", model[: len(model) // 2 + 1])
    write(tmp_path / "no_end.model", endless.getvalue())
    (tmp_path / "folder.model").mkdir()
    for name in ("text", "empty", "cut", "no_end", "folder", "missing"):
        file = tmp_path / f"{name}.model"
        assert_refused(tmp_path, path, "--tokenizer", file, words=[file])


def test_unwritable_out_dir(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    file = write(tmp_path / "file", b"precious")
    for out in (file, file / "out"):
        assert_refused(tmp_path, path, "--out_dir", out, "--vocab_size", 300, words=[file])
    assert file.read_bytes() == b"precious"


@pytest.mark.parametrize("out", [".", ".."])
def test_out_dir_without_a_name(tmp_path, out):
    """Such a folder is hard to put in place by a rename: it works, or is refused in one line."""
    path = write(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "above" / "here").mkdir(parents=True)
    command = [
        sys.executable,
        ROOT / "prepare.py",
        path,
        "--out_dir",
        out,
        "--vocab_size",
        "400",
        "--val_fraction=.3",
    ]
    done = subprocess.run(command, cwd=tmp_path / "above" / "here", capture_output=True, text=True)
    if done.returncode == 0:
        assert_holds(Path(os.path.abspath(tmp_path / "above" / "here" / out)), STORIES[:20])
    else:
        assert_one_line_error(done, tmp_path / "above")
        assert names_in(tmp_path / "above") == ["here"]


def test_no_input_means_the_embedded_corpus(tmp_path):
    """In an empty folder, without any argument: data/demo, of at least 20,000 distinct stories."""
    command = [sys.executable, ROOT / "prepare.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "data" / "demo" / "meta.json").read_text())
    lines = (tmp_path / "data" / "stories.jsonl").read_text("utf-8").splitlines()
    stories = [json.loads(line)["story_zh"] for line in lines]
    assert meta["train"]["stories"] + meta["val"]["stories"] == len(set(stories)) >= 20_000
    assert meta["vocab_size"] == 8192 and abs(meta["val"]["stories"] / len(stories) - 0.01) < 0.005
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "data" / "demo" / "tokenizer.model")
    )
    ids = np.fromfile(tmp_path / "data" / "demo" / "train.bin", dtype=np.uint16)
    assert model.decode(ids[: int(np.argmax(ids == meta["end_token"]))].tolist()) in set(stories)


def test_find_inputs_in_a_fixed_order(tmp_path):
    for name in ("b/2.txt", "a/1.csv", "c.jsonl", "b/10.txt.gz", "z.tar.gz", "b/no.md"):
        write(tmp_path / name, b"")
    found = [str(p.relative_to(tmp_path)) for p in find_inputs([tmp_path])]
    assert found == ["a/1.csv", "b/10.txt.gz", "b/2.txt", "c.jsonl", "z.tar.gz"]
