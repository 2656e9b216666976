"""Read stories from files: .jsonl, .json, .txt, .csv and .parquet, packed as .gz or .zst, or in .tar archives.

Everything is streamed, so that memory does not grow with the input. A file is read whole, or named as not read.
"""

import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import re
import sys
import tarfile
import zlib
from pathlib import Path

from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from common.files import UserError

SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".parquet")
PACKED = (".gz", ".zst")
KNOWN = f"{', '.join(SUFFIXES)}, .tar; all but .parquet also with .gz or .zst"
DOCUMENT_END = "<|endoftext|>"  # separates stories in .txt files; in a story of other files it is plain text
MARKER = DOCUMENT_END.encode()
BOM = "\ufeff"  # begins some UTF-8 files
BLOCK = 1 << 20  # bytes of input in a block
HEADERS = b"xgXLK"  # types of archive members that describe other members
LONGEST = 1 << 24  # bytes of the longest line or record that is read into memory
NOT_UTF8 = "convert it first: iconv -f GB18030 -t UTF-8 if it is GBK, iconv -f UTF-16 -t UTF-8 if it is UTF-16"
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)  # errors that a damaged file raises,
DAMAGE_BY_NAME = ("ZstdError", "ArrowInvalid")  # and those of packages that may be missing
# Written beside data by `datasets` and by prepare.py: no stories.
METADATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "meta.json"}


class LeftOut(Exception):
    """A record that cannot be used. The message is the reason, for the report."""


def object_of(pairs: list[tuple]):
    """A JSON object as a dict; a LeftOut if a key stands twice in it, or in an object in it."""
    found = dict(pairs)
    twice = len(found) < len(pairs) or LeftOut in map(type, found.values())
    return LeftOut("duplicate_key") if twice else found


def find_inputs(inputs: list[Path]) -> list[Path]:
    """The files of files, folders and globs, in a fixed order, without hidden ones. Raises UserError.

    What a folder or a glob has beside them is named on stderr.
    """
    files, not_read = [], []
    for path in inputs:
        pattern = f"{glob.escape(str(path))}/**" if path.is_dir() else str(path)
        present = [p for p in sorted(map(Path, glob.glob(pattern, recursive=True))) if p.is_file()]
        if path.exists() and not path.is_dir():  # a name may hold a bracket; a pipe may be named
            present = [path]
        found = [p for p in present if is_story_file(p, named=p == path)]
        if not present:
            raise UserError(f"{path}: no such file, or an empty folder")
        if not found:
            raise UserError(f"{path}: nothing here can be read as stories ({KNOWN}); it holds {shortened(present)}")
        files += found
        not_read += [p for p in present if p not in set(found)]
    if not_read:
        print(f"not read, because metadata or of an unknown kind: {shortened(not_read)}", file=sys.stderr)
    return files


def shortened(paths: list[Path], most: int = 8) -> str:
    return ", ".join(map(str, paths[:most])) + (f" and {len(paths) - most:,} more" if len(paths) > most else "")


def suffixes_of(name: str) -> tuple[str, str]:
    """The kind of a file and how it is packed, as (".jsonl", ".gz"), (".csv", ""); .tgz counts as .tar.gz."""
    name = re.sub(r"\.tgz$", ".tar.gz", name.lower())
    packing = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
    return Path(name.removesuffix(packing)).suffix, packing


def is_story_file(path: Path, named: bool) -> bool:
    """Whether to read a file; metadata, and what is in a folder that prepare.py has written, only if it is named."""
    kind, packing = suffixes_of(path.name)
    prepared = (path.parent / "meta.json").exists() and (path.parent / "train.bin").exists()
    known = kind in (*SUFFIXES, ".tar") and not (kind == ".parquet" and packing)
    return known and (named or not (prepared or path.name in METADATA))


# A block is (kind, name, number of its first line, data). Parsing JSON lines is slow, so `records_of` does it, in a
# worker process: such a block is bytes. A block of a JSON list, CSV or Parquet is a list of (where, record).


def read_blocks(files: list[Path], title: str):
    """Stream the blocks of all files with one progress bar, which counts bytes on the disk."""
    total = sum(f.stat().st_size for f in files)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for path in files:
            with open(path, "rb") as disk:
                try:
                    yield from read_file(CallbackIOWrapper(bar.update, disk, "read"), str(path))
                except UnicodeDecodeError as e:
                    raise UserError(f"{path}: not UTF-8 ({e.reason}); {NOT_UTF8}") from None
                except ImportError as e:
                    package = str(e.name).split(".")[0]
                    raise UserError(f"{path}: reading it needs a package; try: pip install {package}") from None
                except Exception as e:
                    if not isinstance(e, DAMAGE) and type(e).__name__ not in DAMAGE_BY_NAME:
                        raise
                    reason = str(e).partition("\n")[0]
                    raise UserError(f"{path}: damaged or cut off ({reason}); fetch it again") from None


def read_file(stream, name: str):
    kind, packing = suffixes_of(Path(name).name)
    if packing == ".gz":
        stream = gzip.GzipFile(fileobj=stream)
    elif packing == ".zst":
        import zstandard

        decompressor = zstandard.ZstdDecompressor()
        stream = io.BufferedReader(decompressor.stream_reader(stream, read_across_frames=True), BLOCK)
    yield from read_archive(stream, name) if kind == ".tar" else read_stream(stream, name)


def check_content(head: bytes, kind: str, name: str) -> None:
    """Raise a UserError if a file begins as something else than its name says."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:64].lower()
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{name}: a pointer of Git LFS and not the file itself; fetch that with git lfs pull")
    if start.startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{name}: a web page and not the file itself; fetch it again")
    if kind in (".txt", ".jsonl") and b"\r" in head[:-1] and b"\n" not in head:
        raise UserError(f"{name}: its lines end in a carriage return alone: tr '\\r' '\\n' converts them")
    if kind == ".txt" and re.match(rb'\[?\s*\{\s*"[^"\n]*"\s*:', start):
        raise UserError(f"{name}: holds JSON; name it .jsonl (an object a line) or .json (one list)")
    if kind == ".jsonl" and re.match(rb"\[\s*(\{|$)", start):
        raise UserError(f"{name}: holds one JSON list; name it .json")


def read_archive(stream, name: str):
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
            yield from read_stream(archive.extractfile(member), f"{name}/{member.name}")


class Member(tarfile.TarInfo):
    """A member of an archive. tarfile reads headers into memory whatever their size: this class refuses large ones."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.type == tarfile.GNUTYPE_SPARSE or (member.type in HEADERS and member.size > BLOCK):
            raise tarfile.ReadError(f"a sparse file, or a header of {member.size:,} bytes")
        return member


def read_stream(stream, name: str):
    kind, _ = suffixes_of(name)
    if kind in (".jsonl", ".txt"):
        head = stream.read(BLOCK)
        check_content(head, kind, name)
        separator = b"\n" if kind == ".jsonl" else separator_of(head)
        for line, data in split_stream(stream, separator, name, head):
            if kind == ".txt" and separator != MARKER and MARKER in data:
                line += data.count(b"\n", 0, data.index(MARKER))
                raise UserError(f"{name}:{line}: the first {DOCUMENT_END} of this file; put one into its first MiB too")
            yield "jsonl" if kind == ".jsonl" else separator.decode(), name, line, data
    else:
        readers = {".json": read_json, ".csv": read_csv, ".parquet": read_parquet}
        records = readers[kind](stream, name)
        while block := list(itertools.islice(records, 1000)):
            yield "records", name, 0, block


def separator_of(head: bytes) -> bytes:
    """What separates the stories of a text file, judging by its first MiB.

    It is end markers; else empty lines, if a quarter of what these separate has two to twenty lines; else line ends.
    """
    if MARKER in head:
        return MARKER
    empty_line = b"\r\n\r\n" if b"\r\n" in head else b"\n\n"
    counts = [part.strip().count(b"\n") + 1 for part in head.split(empty_line) if part.strip()]
    several = sum(2 <= n <= 20 for n in counts)
    return empty_line if len(counts) > 1 and several >= len(counts) / 4 else b"\n"


def describe_texts(files: list[Path], most: int = 3):
    """A line for each of the first .txt files: how it is cut into stories, and how the first two begin."""
    for path in [p for p in files if suffixes_of(p.name) == (".txt", "")][:most]:
        with open(path, "rb") as f:
            head = f.read(BLOCK)
        separator = separator_of(head)
        how = {MARKER: f"separated by {DOCUMENT_END}", b"\n": "one a line"}.get(separator, "separated by empty lines")
        texts = map(str.strip, head.decode("utf-8-sig", errors="replace").split(separator.decode()))
        first = ", ".join(f"{text[:12]!r}…" for text in itertools.islice(filter(None, texts), 2))
        yield f"{path}: stories {how}: {first}"


def split_stream(stream, separator: bytes, name: str, rest: bytes):
    """Yield (number of the first line, bytes) of about BLOCK bytes, each ending in `separator`. `rest` comes first."""
    line = 1
    while data := stream.read(BLOCK):
        whole, found, tail = (rest + data).rpartition(separator)
        rest = tail
        if found:
            yield line, whole + found
            line += (whole + found).count(b"\n")
        elif len(rest) > LONGEST:
            raise UserError(f"{name}:{line}: over {LONGEST:,} bytes without an end; is this the right file?")
    if rest:
        yield line, rest


def read_json(stream, name: str):
    """Stream the elements of one JSON list, so that the file can be larger than memory."""
    reader = codecs.getreader("utf-8-sig")(stream)
    decode = json.JSONDecoder(object_pairs_hook=object_of).raw_decode
    text, at, line, number = reader.read(BLOCK), 0, 1, 0
    check_content(text[:64].encode(), ".json", name)
    if not text.lstrip().startswith("["):
        advice = "JSON lines belong in a .jsonl file, a list under a key in one of its own"
        raise UserError(f"{name}: expected a JSON list, found {text[:20]!r}; {advice}")
    before = re.compile(r"\s*\[\s*(]|)")  # what stands before an element, or the end of the list
    while True:
        found = before.match(text, at)
        assert found  # it can match nothing at all
        start = found.end()
        if found[1] == "]":
            break
        try:
            if number and not found[1]:
                raise ValueError("a comma is missing")
            record, end = decode(text, start)
        except (ValueError, RecursionError) as e:  # broken, or only not all read yet
            more = reader.read(BLOCK) if len(text) - at < LONGEST else ""
            if not more:
                line += text.count("\n", 0, start)
                raise UserError(f"{name}:{line}: malformed JSON ({e})") from None
            line += text.count("\n", 0, at)
            text, at = text[at:] + more, 0
        else:
            at, number, before = end, number + 1, re.compile(r"\s*(,\s*|]|)")
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
        if len(set(titles := rows.fieldnames or [])) < len(titles):
            raise UserError(f"{name}:1: two columns have one name: {', '.join(titles)}")
        for row in rows:
            if None in row.values():
                raise UserError(f"{name}:{rows.line_num}: has fewer columns than the first line")
            yield f"{name}:{rows.line_num}", row
    except csv.Error as e:
        raise UserError(f"{name}:{rows.reader.line_num}: malformed CSV ({e})") from None


def read_parquet(stream, name: str):
    import pyarrow.parquet

    check_content(stream.read(64), ".parquet", name)
    batches = pyarrow.parquet.ParquetFile(stream).iter_batches(1000)
    for number, record in enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1):
        yield f"{name}, row {number}", record


def records_of(block: tuple):
    """The records of one block: (where, record), of which `where` names the record in messages. Raises UserError."""
    kind, name, line, data = block
    if kind == "records":
        yield from data
        return
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        line += data.count(b"\n", 0, e.start)
        raise UserError(f"{name}:{line}: not UTF-8 (byte 0x{data[e.start]:02x}); {NOT_UTF8}") from None
    text = text.removeprefix(BOM).replace(f"\n{BOM}", "\n")  # files that were joined have one inside
    if kind != "jsonl":
        for story in text.split(kind):
            yield f"{name}:{line}", story
        return
    for number, row in enumerate(text.split("\n"), line):
        if row and not row.isspace():
            try:
                record = json.loads(row, object_pairs_hook=object_of)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{name}:{number}: malformed JSON ({e})") from None
            yield f"{name}:{number}", record
