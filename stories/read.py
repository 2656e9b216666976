"""Read stories from files: .jsonl, .json, .txt and .csv, each also as .gz, and .tar.gz archives of them.

Everything is streamed, so that memory does not grow with the input.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import tarfile
import zlib
from glob import glob
from pathlib import Path

from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from common.settings import UserError

SUFFIXES = (".jsonl", ".json", ".txt", ".csv")
DOCUMENT_END = "<|endoftext|>"  # separates stories in .txt files; in a story it is plain text
BLOCK = 1 << 20  # bytes of input in a block
HEADERS = b"xgXLK"  # types of archive members that describe other members
LONGEST = 1 << 24  # bytes of the longest line or record that is read into memory


def find_inputs(inputs: list[str]) -> list[Path]:
    """The files of files, folders and globs, in a fixed order."""
    files = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.is_file() and is_readable(p.name)]
            if not found:
                raise UserError(f"{name}: no {', '.join(SUFFIXES)}, .gz or .tar.gz file in this folder")
        elif path.exists():
            if not is_readable(name):
                raise UserError(f"{name}: unknown kind of file; known are {', '.join(SUFFIXES)}, .gz, .tar.gz")
            found = [path]
        else:
            found = [Path(p) for p in sorted(glob(name, recursive=True)) if is_readable(p)]
            if not found:
                raise UserError(f"{name}: no such file or folder")
        files += found
    return files


def is_readable(name: str) -> bool:
    return name.removesuffix(".gz").endswith((*SUFFIXES, ".tar"))


# A block is (kind, name, number of its first line, data). Parsing JSON lines is slow, so `items_of` does it, in worker
# processes: such blocks are bytes. The blocks of JSON lists and CSV are lists of what `extract` returned.


def read_blocks(files: list[Path], extract, title: str):
    """Stream the blocks of all files with one progress bar, which counts bytes on the disk.

    extract(record, where) returns a list of items of one record; `where` names the record in messages.
    """
    total = sum(f.stat().st_size for f in files)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for path in files:
            with open(path, "rb") as disk:
                stream, name = CallbackIOWrapper(bar.update, disk, "read"), str(path)
                if name.endswith(".gz"):
                    stream = gzip.GzipFile(fileobj=stream)
                try:
                    if name.removesuffix(".gz").endswith(".tar"):
                        # "r|" reads the archive once, front to back; nothing is ever unpacked to disk.
                        with tarfile.open(fileobj=stream, mode="r|", tarinfo=Member) as archive:
                            # Python 3.11 forgets to define this.
                            archive.fileobj.seekable = lambda: False  # type: ignore[attr-defined]
                            for member in archive:
                                if member.isfile() and member.name.endswith(SUFFIXES):
                                    content = archive.extractfile(member)
                                    yield from read_stream(content, f"{name}/{member.name}", extract)
                    else:
                        yield from read_stream(stream, name, extract)
                except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as e:
                    raise UserError(f"{name}: damaged or cut off ({e}); fetch it again") from None
                except UnicodeDecodeError as e:
                    raise UserError(f"{name}: not UTF-8 ({e.reason}); convert the file first") from None


class Member(tarfile.TarInfo):
    """A member of an archive. tarfile reads headers into memory whatever their size: this class refuses large ones."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.type == tarfile.GNUTYPE_SPARSE or (member.type in HEADERS and member.size > BLOCK):
            raise tarfile.ReadError(f"a sparse file, or a header of {member.size:,} bytes")
        return member


def read_stream(stream, name: str, extract):
    kind = name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "jsonl":
        for line, data in split_stream(stream, b"\n", name):
            yield "jsonl", name, line, data
    elif kind == "txt":
        head = stream.read(BLOCK)  # if stories have several lines, the first MiB has an end marker
        separator = DOCUMENT_END.encode() if DOCUMENT_END.encode() in head else b"\n"
        for line, data in split_stream(stream, separator, name, head):
            yield separator.decode(), name, line, data
    else:
        records = read_json(stream, name) if kind == "json" else read_csv(stream, name)
        found = (item for where, record in records for item in extract(record, where))
        while block := list(itertools.islice(found, 1000)):
            yield "found", name, 0, block


def split_stream(stream, separator: bytes, name: str, head: bytes = b""):
    """Yield (number of the first line, bytes) of about BLOCK bytes, each ending in `separator`."""
    line, rest = 1, head.removeprefix(codecs.BOM_UTF8)
    while data := stream.read(BLOCK):
        if line == 1 and not rest:
            data = data.removeprefix(codecs.BOM_UTF8)
        rest += data
        cut = rest.rfind(separator) + len(separator)
        if cut >= len(separator):
            yield line, rest[:cut]
            line += rest.count(b"\n", 0, cut)
            rest = rest[cut:]
        elif len(rest) > LONGEST:
            raise UserError(f"{name}:{line}: over {LONGEST:,} bytes without an end; is this the right file?")
    if rest:
        yield line, rest


def read_json(stream, name: str):
    """Stream the elements of one JSON list, so that the file can be larger than memory."""
    reader, decode = codecs.getreader("utf-8-sig")(stream), json.JSONDecoder().raw_decode
    text, line, number = reader.read(BLOCK), 1, 0
    if not text.lstrip().startswith("["):
        raise UserError(f"{name}: expected a JSON list, found {text[:20]!r}; JSON lines belong in a .jsonl file")
    at = text.index("[") + 1
    between = re.compile(r"\s*(]|)\s*"), re.compile(r"\s*(,|])\s*")  # before the first element, and later
    while True:
        start = re.compile(r"\s*").match(text, at).end()  # type: ignore[union-attr]  # no space matches too
        try:
            if not (found := between[number > 0].match(text, at)):
                raise ValueError("a comma is missing")
            start = found.end()
            if found[1] == "]":
                break
            record, end = decode(text, start)
        except (ValueError, RecursionError) as e:  # broken, or only not all read yet
            more = reader.read(BLOCK) if len(text) - at < LONGEST else ""
            if not more:
                line += text.count("\n", 0, start)
                raise UserError(f"{name}:{line}: malformed JSON ({e})") from None
            line += text.count("\n", 0, at)
            text, at = text[at:] + more, 0
        else:
            at, number = end, number + 1
            yield f"{name}, element {number}", record
    rest = text[start:]
    while not rest or rest.isspace():
        if not (rest := reader.read(BLOCK)):
            return
    raise UserError(f"{name}: malformed JSON (something follows the list)")


def read_csv(stream, name: str):
    csv.field_size_limit(LONGEST)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    # A line that is too long is cut in two, so that csv refuses it.
    rows = csv.DictReader(iter(lambda: text.readline(LONGEST + 1), ""), strict=True)
    try:
        for row in rows:
            yield f"{name}:{rows.line_num}", row
    except csv.Error as e:
        raise UserError(f"{name}:{rows.reader.line_num}: malformed CSV ({e})") from None


def items_of(block: tuple, extract) -> list:
    """The items that `extract` returns for the records of one block."""
    kind, name, line, data = block
    if kind == "found":
        return data
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        line += data.count(b"\n", 0, e.start)
        raise UserError(f"{name}:{line}: not UTF-8 (byte 0x{data[e.start]:02x}); convert the file first") from None
    if kind != "jsonl":
        return [item for story in text.split(kind) for item in extract(story, f"{name}:{line}")]
    items = []
    for number, row in enumerate(text.split("\n"), line):
        if row and not row.isspace():
            try:
                record = json.loads(row)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{name}:{number}: malformed JSON ({e})") from None
            items += extract(record, f"{name}:{number}")
    return items
