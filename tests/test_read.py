"""stories/read.py: what is in the input is read, or refused by file and place, or named as not read.

    formats     the stories are the same from every format and packing, wherever a block of bytes ends
    texts       how a .txt file is cut into stories
    columns     CSV and Parquet
    inputs      which files of folders, globs and links are read
    refusals    damaged files, other encodings, mistakes in JSON and CSV: one line names file and place

What prepare.py makes of the stories is tested in test_prepare.py.
"""

import csv
import gzip
import io
import json
import random
import re
import sys
import tarfile

import pytest

import stories.read
from common.files import UserError
from stories.constraints import clean
from stories.read import (
    LeftOut,
    describe_texts,
    find_inputs,
    read_blocks,
    records_of,
    shortened,
)
from stories.records import story_of

END = "<|endoftext|>"
BOM = b"\xef\xbb\xbf"
STORIES = [
    "猫睡了。",
    "从前，有一只小兔子叫白白。她喜欢吃胡萝卜😀，也喜欢唱歌。",
    "Once upon a time, a fox said: “你好！” and ran away.",
    '小熊第一行。\n小熊第二行。\n\n最后一行，有“引号”,逗号,和"英文引号"。',
    "café 𠮷野家 👩‍👩‍👧 שלום مرحبا",
    "</s> 不是结束，<|user|> 也不是，<0x41> <unk> <pad> 都只是字。",
    "小狗汪汪，捡到了7个苹果，分给3位朋友。",
]
ONE_LINE = [story for story in STORIES if "\n" not in story]
TWO_LINES = [f"第{i}天，小狗出门。\n它捡到了{i}个苹果。" for i in range(40)]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read_texts(path):
    """The texts of a file, as they stand there."""
    texts = []
    for block in read_blocks([path], ""):
        texts += [story_of(record, where, "story_zh") for where, record in records_of(block)]
    return texts


def stories_in(path):
    """The texts of a file, cleaned, without the empty ones."""
    cleaned = [clean(text) for text in read_texts(path)]
    return [text for text in cleaned if text]


# ---- Formats ---------------------------------------------------------------------------------------


def jsonl(texts, **dumps):
    lines = [json.dumps({"story_zh": text}, **dumps) + "\n" for text in texts]
    return "".join(lines).encode()


def as_csv(texts, delimiter=","):
    out = io.StringIO()
    rows = csv.writer(out, delimiter=delimiter)
    rows.writerow(["number", "story_zh"])
    rows.writerows(enumerate(texts))
    return out.getvalue().encode()


def as_parquet(*columns):
    """Columns of names and values."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    names, values = zip(*columns, strict=True)
    parquet.write_table(pyarrow.table(list(values), names=names), out, row_group_size=7)
    return out.getvalue()


def as_tar(files, link=""):
    """An archive of files, and of a link to nothing."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        if link:
            member = tarfile.TarInfo(link)
            member.type = tarfile.SYMTYPE
            archive.addfile(member)
    return out.getvalue()


def as_zst(data):
    """Two frames: the end of the first is not the end of the file."""
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    half = len(data) // 2
    compress = zstandard.ZstdCompressor().compress
    return compress(data[:half]) + compress(data[half:])


def packed(name, data, packing):
    """What a file holds whose name is name + packing."""
    if packing.startswith(".tar"):
        data = as_tar({name: data})
    if packing.endswith(".gz"):
        return gzip.compress(data)
    if packing.endswith(".zst"):
        return as_zst(data)
    return data


OBJECTS = [{"id": 1, "story_zh": story} for story in STORIES]
PRETTY = json.dumps(OBJECTS, ensure_ascii=False, indent=2).encode()
MARKED_LINES = "".join(f"{story}\n{END}\n" for story in STORIES).encode()
FORMATS = {
    "objects.jsonl": jsonl(STORIES),
    "blank_lines_no_end.jsonl": b"\n" + jsonl(STORIES).replace(b"\n", b"\n \n\n").rstrip(),
    "windows.jsonl": BOM + jsonl(STORIES, ensure_ascii=False).replace(b"\n", b"\r\n"),
    "objects.json": json.dumps(OBJECTS).encode(),
    "strings.json": json.dumps(STORIES, ensure_ascii=False).encode(),
    "windows.json": BOM + b"\r\n" + PRETTY.replace(b"\n", b"\r\n") + b"\r\n",
    "marked.txt": END.join(STORIES).encode(),
    "windows.txt": BOM + MARKED_LINES.replace(b"\n", b"\r\n"),
    "a.csv": as_csv(STORIES),
    "windows.csv": BOM + as_csv(STORIES),
    "tabs.csv": as_csv(STORIES, "\t"),
    "semicolons.csv": as_csv(STORIES, ";"),
}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst", ".tar", ".tar.gz", ".tar.zst"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_stories_are_the_same_wherever_a_block_ends(tmp_path, monkeypatch, name, packing):
    """In a character, in a marker or in a record: each story stays whole."""
    data = FORMATS[name]
    path = write(tmp_path / (name + packing), packed(name, data, packing))
    smallest = 3
    if name.endswith(".txt"):  # the first block must show the marker
        smallest = data.find(END.encode()) + len(END)
    for block in (*range(smallest, 60), 97, 256, 1 << 20):
        monkeypatch.setattr(stories.read, "BLOCK", block)
        assert stories_in(path) == STORIES, block


def test_more_records_than_fit_into_a_block(tmp_path):
    """And beside them a date that Python does not have."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    texts = [f"第{i}个故事。" for i in range(2500)]
    dates = pyarrow.array([2**50] * 2500, pyarrow.timestamp("ms"))
    assert read_texts(write(tmp_path / "a.json", json.dumps(texts).encode())) == texts
    data = as_parquet(("date", dates), ("story_zh", texts))
    assert read_texts(write(tmp_path / "a.parquet", data)) == texts


@pytest.mark.parametrize("name, module", [("a.parquet", "pyarrow.parquet"), ("a.jsonl.zst", "zstandard")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{name}: .*pip install {module.split('.')[0]}$"):
        read_texts(write(tmp_path / name, b"anything"))


# ---- Texts -----------------------------------------------------------------------------------------

UNIX, WINDOWS, OLD_MAC = "\n", "\r\n", "\r"


@pytest.mark.parametrize(
    "name, between, texts",
    [
        ("lines.txt", "\n", ONE_LINE),
        ("empty_lines.txt", "\n\n", TWO_LINES),
        ("marked.txt", f"\n{END}\n", TWO_LINES),
    ],
)
@pytest.mark.parametrize("first", [UNIX, WINDOWS, OLD_MAC])
@pytest.mark.parametrize("second", [UNIX, WINDOWS, OLD_MAC])
def test_files_of_several_systems_joined(tmp_path, monkeypatch, name, between, texts, first, second):
    """Each with its line ends, and with a byte order mark that becomes no part of a story."""
    half = len(texts) // 2
    one = between.join([*texts[:half], ""]).replace("\n", first)
    other = between.join(texts[half:]).replace("\n", second)
    file = write(tmp_path / name, BOM + one.encode() + BOM + other.encode())
    for block in (500, 501, 502, 503, 1 << 20):
        monkeypatch.setattr(stories.read, "BLOCK", block)
        assert stories_in(file) == texts, block


@pytest.mark.parametrize(
    "head, how",
    [
        ("one\n\ntwo\n\nthree", "one a line"),
        ("one\nline\n\ntwo\n\nthree\n\nfour", "separated by empty lines"),  # a quarter has several lines
        ("one\nline\n\ntwo\n\nthree\n\nfour\n\nfive", "one a line"),
        ("line\n" * 20 + "\ntwo", "separated by empty lines"),
        ("line\n" * 21 + "\ntwo", "one a line"),  # a block of so many lines is no story
        ("one\ntwo\nthree\n\n", "one a line"),
        ("one\nline\n\ntwo<|endoftext|>", "separated by <|endoftext|>"),
    ],
)
def test_what_separates_the_stories_of_a_text(tmp_path, head, how):
    """End markers, else empty lines between stories of several lines, else line ends."""
    file = write(tmp_path / "a.txt", head.encode())
    assert list(describe_texts([tmp_path / "b.csv", file])) == [f"{file}: stories {how}"]


def test_a_separator_at_the_end_begins_no_story(tmp_path):
    for data, count in ((b"one\ntwo\n", 2), (b"one\nline\n\ntwo\n\n", 2), (MARKED_LINES.rstrip(), 7)):
        assert len(read_texts(write(tmp_path / "a.txt", data))) == count


def test_a_marker_that_comes_late(tmp_path, monkeypatch):
    """After a MiB without one, a marker means two kinds of files in one: refused, with its line."""
    monkeypatch.setattr(stories.read, "BLOCK", 64)
    file = write(tmp_path / "a.txt", b"one\n" * 40 + b"two\nlines\n<|endoftext|>\nthree")
    with pytest.raises(UserError, match=re.escape(f"{file}:43: the first {END}")):
        read_texts(file)


# ---- Records and columns ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", '{"story_zh": "一", "story_zh": "二"}'),
        ("a.json", '[{"story_zh": "一", "a": {"b": {"c": 1, "c": 1}}}]'),
    ],
)
def test_a_key_twice_in_a_record_leaves_it_out(tmp_path, name, data):
    """Neither value is taken, wherever in the record the object is."""
    with pytest.raises(LeftOut, match="duplicate_key"):
        read_texts(write(tmp_path / name, data.encode()))


@pytest.mark.parametrize(
    "rows, line",
    [
        ("id,story_zh 1,一。 2,二,三。", 3),
        ("story_zh,id 一。,1 二,三。,2", 3),
        ("story_zh 一。 二,三。", 3),
        ("id;story_zh 1;一。 2;二;三。", 3),
        ("id,story_zh,note 1,一。, 2,二,三。,", 3),  # what is too much may be empty
        ("id,story_zh,, 1,一。,, 2,二,三。,", 3),  # or stand under no name
    ],
)
def test_a_delimiter_that_is_not_quoted(tmp_path, rows, line):
    """The text is not cut there: the row is refused."""
    file = write(tmp_path / "a.csv", rows.replace(" ", "\n").encode())
    with pytest.raises(UserError, match=re.escape(f"{file}:{line}: has more columns")):
        read_texts(file)


@pytest.mark.parametrize(
    "rows",
    [
        "id,story_zh,,/1,一。,,/2,二。,,/,,,",
        "id,story_zh,,/1,一。//2,二。,",  # shorter, but every name has its field
        ",story_zh,,/1,一。,, /2,二。,,",  # pandas writes its index under an empty name
        "id,,,story_zh/1,x,y,一。/2,x,y,二。",
        "id;story_zh;;/1;一。;;/2;二。;;",
    ],
)
def test_empty_fields_of_a_spreadsheet(tmp_path, rows):
    file = write(tmp_path / "a.csv", rows.replace("/", "\n").encode())
    assert stories_in(file) == ["一。", "二。"]


# ---- Which files -----------------------------------------------------------------------------------

FILES = "in/10.csv in/2.txt in/a/b.JSONL.gz in/notes.md in/.x.jsonl in/.cache/x.jsonl in/state.json"
PREPARED = "made/meta.json made/train.bin made/a.txt made/a.parquet.gz z.TGZ"


@pytest.fixture
def tree(tmp_path):
    for name in f"{FILES} {PREPARED}".split():
        write(tmp_path / name, b"")
    return tmp_path


@pytest.mark.parametrize(
    "inputs, expected",
    [
        ("in", "in/10.csv in/2.txt in/a/b.JSONL.gz"),
        ("in/*", "in/10.csv in/2.txt in/a/b.JSONL.gz"),
        ("in/[12].*", "in/2.txt"),
        ("**/*.gz", "in/a/b.JSONL.gz"),
        (".", "in/10.csv in/2.txt in/a/b.JSONL.gz z.TGZ"),  # without what prepare.py made
        (
            "z.TGZ in/2.txt in in/a",
            "z.TGZ in/2.txt in/10.csv in/a/b.JSONL.gz",
        ),  # each once, where it is first
        ("in/state.json in/.x.jsonl made/a.txt", "in/state.json in/.x.jsonl made/a.txt"),  # they are named
    ],
)
def test_files_of_folders_and_globs(tree, inputs, expected):
    found = find_inputs([tree / name for name in inputs.split()])
    assert [str(path.relative_to(tree)) for path in found] == expected.split()


def test_what_is_not_read_is_named(tree, capsys):
    """Metadata, unknown kinds, prepared folders and broken links; hidden files are not looked at."""
    (tree / "in" / "gone.jsonl").symlink_to("nowhere")
    find_inputs([tree])
    named = capsys.readouterr().err
    for name in ("notes.md", "state.json", "gone.jsonl", "made/a.txt", "made/meta.json"):
        assert name in named
    assert ".x.jsonl" not in named and ".cache" not in named and "2.txt" not in named
    assert shortened(list("abcdefghij")) == "a, b, c, d, e, f, g, h and 2 more"


def test_links_are_followed_and_each_file_is_read_once(tmp_path):
    """Links to the folder itself, to one above it, to each other, to a disk elsewhere and to files."""
    for name in ("in/a/stories.jsonl", "in/b/more.jsonl", "disk/deep/c.jsonl"):
        write(tmp_path / name, b"")
    links = {"a/again": ".", "a/up": "..", "a/to_b": "../b", "b/to_a": "../a", "b/disk": "../../disk"}
    links["b/same.jsonl"] = "../a/stories.jsonl"
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    found = find_inputs([tmp_path / "in", tmp_path / "in" / "b" / "same.jsonl"])
    assert sorted(path.resolve().name for path in found) == ["c.jsonl", "more.jsonl", "stories.jsonl"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("no.jsonl", r"/no\.jsonl: no such file"),
        ("*.jsonl", r"/\*\.jsonl: no such file"),
        ("bare", r"/bare: nothing here .* holds .*a\.png"),
        ("bare/a.png", r"a\.png: nothing here .*\.jsonl, \.json, \.txt, \.csv"),
    ],
)
def test_inputs_without_stories(tmp_path, name, message):
    write(tmp_path / "bare" / "a.png", b"")
    with pytest.raises(UserError, match=message):
        find_inputs([tmp_path / name])


# ---- Refusals: the file, the line, what is wrong ---------------------------------------------------

GOOD = jsonl(STORIES)
LINE = b'{"story_zh": "one"}\n'
GBK = "三只猫".encode("gbk")
ZIPPED = gzip.compress(random.Random(0).randbytes(3000).hex().encode())
DAMAGED = ZIPPED[:900] + b"?" * 100 + ZIPPED[1000:]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
PAGE = b"<!DOCTYPE html>\n<html><body>404</body></html>"

BAD_FILES = [  # its name, its bytes, words of the message
    # damaged or cut off
    ("cut.jsonl.gz", ZIPPED[:-60], "cut off"),
    ("damaged.jsonl.gz", DAMAGED, "damaged"),
    ("checksum.jsonl.gz", gzip.compress(GOOD)[:-8] + bytes(8), "damaged"),
    ("not_gzip.jsonl.gz", GOOD, "damaged"),
    ("not_zst.jsonl.zst", GOOD, "damaged"),
    ("cut.tar", as_tar({"a.jsonl": GOOD})[:1000], "cut off"),
    ("cut.tar.gz", gzip.compress(as_tar({"a.jsonl": GOOD}))[:-200], "cut off"),
    ("not_tar.tar.gz", ZIPPED, "damaged"),
    ("long_header.tar", as_tar({"n" * (1 << 21) + ".jsonl": LINE}), "header of"),
    ("packed_inside.tar", as_tar({"a.jsonl.gz": ZIPPED}), "/a.jsonl.gz: unpack"),
    ("not.parquet", GOOD, "damaged"),
    # other encodings
    ("gbk.jsonl", LINE * 4 + GBK + b"\n" + LINE, ":5: UTF-8 GBK iconv"),
    ("utf16.jsonl", GOOD.decode().encode("utf-16"), ":1: UTF-8 UTF-16"),
    ("gbk.txt", b"one\ntwo\n" + GBK, ":3: UTF-8 iconv"),
    ("marked_gbk.txt", b"one\n<|endoftext|>\n" + GBK, ":3: UTF-8"),
    ("gbk.tar.gz", gzip.compress(as_tar({"sub/b.jsonl": LINE * 3 + GBK})), "/sub/b.jsonl:4: UTF-8"),
    ("gbk.json", b'["' + GBK + b'"]', "UTF-8 iconv"),
    ("gbk.csv", b"story_zh\n" + GBK, "UTF-8 iconv"),
    # files that are not what they seem
    *((f"pointer.{kind}", POINTER, "git lfs pull") for kind in ("jsonl", "json", "txt", "csv", "parquet")),
    ("page.txt", PAGE, "web page"),
    ("list.txt", PRETTY, "JSON .json"),
    ("lines.txt", LINE * 2, "JSON .jsonl"),
    ("list.jsonl", PRETTY, "list .json"),
    ("lines.json", LINE * 2, "JSON list .jsonl"),
    ("wrapped.json", b'{"data": ["one"]}', "JSON list under a key"),
    # mistakes in JSON
    ("cut.jsonl", LINE * 4 + LINE[:-5], ":5: JSON"),
    ("malformed.jsonl", LINE * 2 + b'{"story_zh": "cat"\n' + LINE, ":3: JSON"),
    ("two_on_a_line.jsonl", LINE + LINE.strip() + LINE, ":2: JSON"),
    ("indented.jsonl", json.dumps(OBJECTS[0], indent=2).encode(), ":1: one object a line"),
    ("deep.jsonl", LINE + b"[" * 200_000, ":2: JSON"),
    ("member.tar", as_tar({"a.jsonl": LINE, "b.jsonl": LINE + b"{\n"}), "/b.jsonl:2: JSON"),
    ("cut.json", PRETTY[:-9], "JSON"),
    ("cut_between.json", b'["one",\n"two",', ":2: JSON"),
    ("malformed.json", b'\n[\n{"story_zh": "one"},\n{"story_zh": x}]', ":4: JSON"),
    ("no_comma.json", b'["one"\n"two"]', ":2: JSON comma"),
    ("after_the_list.json", b'["one"]\n["two"]', "JSON follows"),
    ("deep.json", b'["one",\n' + b"[" * 200_000, ":2: JSON"),
    # records
    ("wrong_key.jsonl", LINE + b'{"text": "a", "title": "b"}', ":2: story_zh text, title --text_key"),
    ("wrong_key.json", b'[{"story_zh": "a"}, {"text": "a"}]', "element 2: story_zh text --text_key"),
    ("wrong_key.csv", b"text,title\na,b\n", ":2: story_zh text, title"),
    ("no_key.jsonl", b"{}", ":1: story_zh none"),
    ("number.jsonl", LINE + b'{"story_zh": 3}', ":2: story_zh int"),
    ("number.json", b'["a", 17]', "element 2: object string int"),
    # columns
    ("short_row.csv", b"title,story_zh\na,one\nb\n", ":3: fewer columns"),
    ("quotes.csv", b'story_zh\none\n"two" or three\n', ":3: CSV"),
    ("open_quote.csv", b'story_zh\none\n"two\n', "CSV"),
    ("two_columns.csv", b"story_zh,id,story_zh\na,1,b", ":1: two columns story_zh"),
]


def assert_unreadable(path, words):
    with pytest.raises(UserError) as refused:
        stories_in(path)
    message = str(refused.value)
    assert message.startswith(str(path)) and "\n" not in message
    for word in words.split():
        assert word in message.removeprefix(str(path)), message


@pytest.mark.parametrize("name, data, words", BAD_FILES, ids=[name for name, *_ in BAD_FILES])
def test_a_bad_file_is_refused(tmp_path, name, data, words):
    assert_unreadable(write(tmp_path / name, data), words)


def test_a_bad_parquet_file_is_refused(tmp_path):
    """With a footer that is whole and stories that are not; with two columns of one name."""
    data = as_parquet(("story_zh", STORIES * 9))
    third = len(data) // 3
    assert_unreadable(
        write(tmp_path / "pages.parquet", data[:40] + bytes(third) + data[40 + third :]), "damaged"
    )
    twice = as_parquet(("story_zh", STORIES), ("story_zh", STORIES))
    assert_unreadable(write(tmp_path / "twice.parquet", twice), "two columns story_zh")


@pytest.mark.parametrize(
    "name, form",
    [
        ("a.jsonl", '"X"\n"two"'),
        ("a.txt", "X\ntwo"),
        ("a.json", '["X", "two"]'),
        ("a.csv", "story_zh\nX\ntwo"),
    ],
)
def test_a_record_that_never_ends(tmp_path, monkeypatch, name, form):
    """One that is longer than what is read into memory at once is refused."""
    monkeypatch.setattr(stories.read, "LONGEST", 1000)
    monkeypatch.setattr(stories.read, "BLOCK", 100)
    long = "a" * 990
    assert read_texts(write(tmp_path / name, form.replace("X", long).encode())) == [long, "two"]
    assert_unreadable(write(tmp_path / name, form.replace("X", 2 * long).encode()), "")


@pytest.mark.parametrize(
    "name, begin, good, bad",
    [
        ("a.jsonl", b"", b'{"story_zh": "\xe7\x8c\xab"}', b'{"story_zh": "\xe7\x8c}'),
        ("a.jsonl", b"", b'{"story_zh": "\xe7\x8c\xab"}', b'{"story_zh": "dog}'),
        ("a.json", b"[", b'"\xe7\x8c\xab",', b"dog,"),
        ("b.txt", b"", b"a <|endoftext|>", b"\xe7\x8c <|endoftext|>"),
    ],
)
def test_the_line_named_is_the_line_of_the_file(tmp_path, monkeypatch, name, begin, good, bad):
    """Whichever block it falls into."""
    for line in (1, 2, 7, 30):
        rows = [good] * (line - 1) + [bad] + [good] * 9
        path = write(tmp_path / name, begin + b"\n".join(rows))
        for block in (20, 33, 64, 1000, 1 << 20):
            monkeypatch.setattr(stories.read, "BLOCK", block)
            with pytest.raises(UserError, match=re.escape(f"{path}:{line}:")):
                read_texts(path)
