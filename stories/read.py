"""Read stories from files: .jsonl, .json, .txt, .csv and .parquet, packed as .gz or .zst, or in .tar archives.

Everything is streamed, so that memory does not grow with the input. A file is read whole, or named as not read.
"""

import codecs
import contextlib
import csv
import gzip
import importlib.util
import io
import itertools
import json
import re
import sys
import tarfile
import zlib
from glob import glob
from pathlib import Path

from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from common.settings import UserError

SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".parquet")
PACKED = (".gz", ".zst")
KNOWN = f"{', '.join(SUFFIXES)}, .tar, each also with .gz or .zst"
DOCUMENT_END = "<|endoftext|>"  # separates stories in .txt files; in a story of other files it is plain text
MARKER = DOCUMENT_END.encode()
BOM = "\ufeff"  # begins some UTF-8 files
BLOCK = 1 << 20  # bytes of input in a block
HEADERS = b"xgXLK"  # types of archive members that describe other members
LONGEST = 1 << 24  # bytes of the longest line or record that is read into memory
# Written beside data by `datasets` and by prepare.py: no stories.
METADATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "meta.json"}


def find_inputs(inputs: list[str]) -> list[Path]:
    """The files of files, folders and globs, in a fixed order. Raises UserError.

    What a folder or a glob has beside them is named on stderr.
    """
    files, not_read = [], []
    for name in inputs:
        path = Path(name)
        hidden = set[Path]()
        if path.is_dir():
            present = [p for p in sorted(path.rglob("*")) if p.is_file()]
            # macOS writes ._ files; tools keep .cache folders
            hidden = {p for p in present if any(part.startswith(".") for part in p.relative_to(path).parts)}
        elif path.exists():
            present = [path]
        else:
            present = [p for p in map(Path, sorted(glob(name, recursive=True))) if p.is_file()]
        found = [p for p in present if (p not in hidden and is_story_file(p)) or (p == path and is_readable(p.name))]
        if not found and path.is_file():
            raise UserError(f"{name}: unknown kind of file; known are {KNOWN}")
        if not found and path.exists():
            there = f"; it holds {shortened(p.name for p in present)}" if present else ""
            raise UserError(f"{name}: no file in this folder can be read as stories ({KNOWN}){there}")
        if not found:
            raise UserError(f"{name}: no such file or folder")
        files += found
        not_read += [p for p in present if p not in set(found)]
    if not_read:
        print(f"not read, because hidden, metadata or of an unknown kind: {shortened(not_read)}", file=sys.stderr)
    for path in files:
        check_packages(path)
    return files


def shortened(names, most: int = 8) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def suffixes_of(name: str) -> tuple[str, str]:
    """The kind of a file and how it is packed, as (".jsonl", ".gz"), (".csv", ""); .tgz counts as .tar.gz."""
    name = re.sub(r"\.tgz$", ".tar.gz", name.lower())
    packing = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
    return Path(name.removesuffix(packing)).suffix, packing


def is_readable(name: str) -> bool:
    kind, _ = suffixes_of(name)
    return kind in (*SUFFIXES, ".tar")


def is_story_file(path: Path) -> bool:
    """Whether a file may hold stories: not so metadata, and what is in a folder that prepare.py has written."""
    prepared = (path.parent / "meta.json").exists() and (path.parent / "train.bin").exists()
    return is_readable(path.name) and not prepared and path.name not in METADATA


def check_packages(path: Path) -> None:
    """Raise a UserError that names the package that reading this file needs, if it is not installed."""
    kind, packing = suffixes_of(path.name)
    if kind == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise UserError(f"{path}: reading .parquet needs a package; try: pip install pyarrow")
    if kind == ".parquet" and packing:
        raise UserError(f"{path}: a packed .parquet cannot be read; unpack it first")
    standard = sys.version_info >= (3, 14)  # whose library has compression.zstd
    if packing == ".zst" and not standard and not importlib.util.find_spec("zstandard"):
        raise UserError(f"{path}: reading .zst needs a package; try: pip install zstandard")


def unpack_zst(stream):
    """The content of a .zst stream, as a stream."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdFile(stream)
    import zstandard

    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True), BLOCK)


# A block is (kind, name, number of its first line, data). Parsing JSON lines is slow, so `items_of` does it, in worker
# processes: such blocks are bytes. The blocks of JSON lists and CSV are lists of what `extract` returned.


def read_blocks(files: list[Path], extract, title: str):
    """Stream the blocks of all files with one progress bar, which counts bytes on the disk.

    extract(record, where) returns a list of items of one record; `where` names the record in messages.
    """
    total = sum(f.stat().st_size for f in files)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for path in files:
            kind, packing = suffixes_of(path.name)
            with open(path, "rb") as disk:
                stream, name = CallbackIOWrapper(bar.update, disk, "read"), str(path)
                if packing:
                    stream = gzip.GzipFile(fileobj=stream) if packing == ".gz" else unpack_zst(stream)
                try:
                    if kind == ".tar":
                        yield from read_archive(stream, name, extract)
                    else:
                        yield from read_stream(stream, name, extract)
                except UnicodeDecodeError as e:
                    raise UserError(f"{name}: not UTF-8 ({e.reason}); {encoding_advice(path)}") from None
                except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as e:
                    raise UserError(f"{name}: damaged or cut off ({e}); fetch it again") from None
                except Exception as e:
                    if type(e).__name__ not in ("ZstdError", "ArrowInvalid"):  # of packages that may be missing
                        raise
                    raise UserError(f"{name}: damaged or cut off ({str(e).splitlines()[0]}); fetch it again") from None


def encoding_advice(path: Path | str) -> str:
    """How to convert a file that is not UTF-8: to what its first bytes look like."""
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as f:
        head = f.read(BLOCK)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return f"it is UTF-16: iconv -f UTF-16 -t UTF-8 {path}"
        head.rpartition(b"\n")[0].decode("gb18030")
        return f"it may be GBK: iconv -f GB18030 -t UTF-8 {path}"
    return "convert the file first"


def check_content(head: bytes, kind: str, name: str) -> None:
    """Raise a UserError if a file begins as something else than its name says."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:64].lower()
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{name}: a pointer of Git LFS and not the file itself; fetch that with git lfs pull")
    if start.startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{name}: a web page and not the file itself; fetch it again")
    if kind == ".txt" and re.match(rb'\[?\s*\{\s*"[^"\n]*"\s*:', start):
        raise UserError(f"{name}: holds JSON; name it .jsonl (an object a line) or .json (one list)")
    if kind == ".jsonl" and re.match(rb"\[\s*(\{|$)", start):
        raise UserError(f"{name}: holds one JSON list; name it .json")


def read_archive(stream, name: str, extract):
    # "r|" reads the archive once, front to back; nothing is ever unpacked to disk.
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=Member) as archive:
        # Python 3.11 forgets to define this.
        archive.fileobj.seekable = lambda: False  # type: ignore[attr-defined]
        for member in archive:
            kind, packing = suffixes_of(member.name)
            hidden = Path(member.name).name.startswith(".")
            if not member.isfile() or hidden or kind not in SUFFIXES or Path(member.name).name in METADATA:
                continue
            if packing or kind == ".parquet":
                raise UserError(f"{name}/{member.name}: cannot be read inside an archive; unpack the archive first")
            yield from read_stream(archive.extractfile(member), f"{name}/{member.name}", extract)


class Member(tarfile.TarInfo):
    """A member of an archive. tarfile reads headers into memory whatever their size: this class refuses large ones."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.type == tarfile.GNUTYPE_SPARSE or (member.type in HEADERS and member.size > BLOCK):
            raise tarfile.ReadError(f"a sparse file, or a header of {member.size:,} bytes")
        return member


def read_stream(stream, name: str, extract):
    kind, _ = suffixes_of(name)
    if kind in (".jsonl", ".txt"):
        head = stream.read(BLOCK)
        check_content(head, kind, name)
        newline, separator = separators(head)
        cut = newline if kind == ".jsonl" else separator
        for line, data in split_stream(stream, cut, newline, name, head):
            if kind == ".txt" and cut != MARKER and MARKER in data:
                line += data.count(newline, 0, data.index(MARKER))
                raise UserError(f"{name}:{line}: the first {DOCUMENT_END} of this file; put one into its first MiB too")
            if newline == b"\r":
                data, cut = data.replace(b"\r", b"\n"), cut.replace(b"\r", b"\n")
            yield "jsonl" if kind == ".jsonl" else cut.decode(), name, line, data
    else:
        readers = {".json": read_json, ".csv": read_csv, ".parquet": read_parquet}
        found = (item for where, record in readers[kind](stream, name) for item in extract(record, where))
        while block := list(itertools.islice(found, 1000)):
            yield "found", name, 0, block


def separators(head: bytes) -> tuple[bytes, bytes]:
    """What ends a line, and what separates the stories of a text file, judging by its first MiB.

    Stories are separated by end markers, or by empty lines where a quarter of what these separate has two to twenty
    lines; else a line is a story.
    """
    newline = b"\r" if b"\r" in head and b"\n" not in head else b"\n"
    if MARKER in head:
        return newline, MARKER
    empty_line = b"\r\n\r\n" if b"\r\n" in head else newline * 2
    counts = [part.strip().count(newline) + 1 for part in head.split(empty_line) if part.strip()]
    several = sum(2 <= n <= 20 for n in counts)
    return newline, empty_line if len(counts) > 1 and several >= len(counts) / 4 else newline


def describe_texts(files: list[Path], most: int = 3) -> list[str]:
    """A line for each of the first .txt files: how it is cut into stories, and how the first two begin."""
    lines = list[str]()
    for path in files:
        kind, packing = suffixes_of(path.name)
        if kind != ".txt" or packing or len(lines) == most:
            continue
        with open(path, "rb") as f:
            head = f.read(BLOCK)
        _, separator = separators(head)
        how = {MARKER: f"separated by {DOCUMENT_END}", b"\n": "one a line", b"\r": "one a line"}
        stories = [
            text.strip()
            for text in head.decode("utf-8-sig", errors="replace").split(separator.decode())
            if text.strip()
        ]
        first = ", ".join(repr(text[:12] + "…" * (len(text) > 12)) for text in stories[:2])
        lines.append(f"{path}: stories {how.get(separator, 'separated by empty lines')}: {first}, …")
    return lines


def split_stream(stream, separator: bytes, newline: bytes, name: str, head: bytes):
    """Yield (number of the first line, bytes) of about BLOCK bytes, each ending in `separator`."""
    line, rest = 1, head
    while True:
        data = stream.read(BLOCK)
        rest += data
        cut = rest.rfind(separator) + len(separator)
        if not data:
            break
        if cut >= len(separator):
            yield line, rest[:cut]
            line += rest.count(newline, 0, cut)
            rest = rest[cut:]
        elif len(rest) > LONGEST:
            raise UserError(f"{name}:{line}: over {LONGEST:,} bytes without an end; is this the right file?")
    if rest:
        yield line, rest


def read_json(stream, name: str):
    """Stream the elements of one JSON list, so that the file can be larger than memory."""
    reader, decode = codecs.getreader("utf-8-sig")(stream), json.JSONDecoder().raw_decode
    text, line, number = reader.read(BLOCK), 1, 0
    check_content(text[:64].encode(), ".json", name)
    if not text.lstrip().startswith("["):
        advice = "JSON lines belong in a .jsonl file, a list under a key in one of its own"
        raise UserError(f"{name}: expected a JSON list, found {text[:20]!r}; {advice}")
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
    header = text.readline(LONGEST + 1)
    check_content(header[:64].encode(), ".csv", name)
    delimiter = max(",\t;", key=header.count)  # a spreadsheet may write another than the comma
    lines = itertools.chain([header], iter(lambda: text.readline(LONGEST + 1), ""))
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for row in rows:
            if None in row.values():
                raise UserError(f"{name}:{rows.line_num}: has fewer columns than the first line")
            yield f"{name}:{rows.line_num}", row
    except csv.Error as e:
        raise UserError(f"{name}:{rows.reader.line_num}: malformed CSV ({e})") from None


def read_parquet(stream, name: str):
    import pyarrow.parquet

    check_content(stream.read(64), ".parquet", name)
    number = 0
    for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(1000):
        for record in batch.to_pylist():
            number += 1
            yield f"{name}, row {number}", record


def items_of(block: tuple, extract) -> list:
    """The items that `extract` returns for the records of one block."""
    kind, name, line, data = block
    if kind == "found":
        return data
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        line += data.count(b"\n", 0, e.start)
        raise UserError(f"{name}:{line}: not UTF-8 (byte 0x{data[e.start]:02x}); {encoding_advice(name)}") from None
    if kind != "jsonl":
        text = text.removeprefix(BOM).replace(f"\n{BOM}", "\n")  # files that were joined have one inside
        return [item for story in text.split(kind) for item in extract(story, f"{name}:{line}")]
    items = []
    for number, row in enumerate(text.split("\n"), line):
        row = row.removeprefix(BOM)
        if row and not row.isspace():
            try:
                record = json.loads(row)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{name}:{number}: malformed JSON ({e})") from None
            items += extract(record, f"{name}:{number}")
    return items
