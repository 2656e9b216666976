"""Read stories from files: .jsonl, .json, .txt, .csv and .parquet, packed as .gz or .zst, or in .tar
archives.

Everything is streamed, so that memory does not grow with the input. What is in the input is read, or refused
by file and place, or named as not read.
"""

import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
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
NOT_UTF8 = (
    "convert it first: iconv -f GB18030 -t UTF-8 if it is GBK, iconv -f UTF-16 -t UTF-8 if it is UTF-16"
)
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)  # errors that a damaged file raises,
DAMAGE_BY_NAME = ("ZstdError", "ArrowInvalid")  # and those of packages that may be missing
# Written beside data by `datasets` and by prepare.py: no stories.
METADATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "meta.json"}


class LeftOut(Exception):
    """A record that cannot be used. The message is the reason, for the report."""


@dataclass
class Block:
    """A part of an input: about BLOCK bytes of text, or records that are parsed already.

    Parsing JSON lines is slow, so `records_of` does it, in a worker process.
    """

    name: str  # of the file, for messages
    line: int = 1  # number of the first line of `text`
    text: bytes = b""
    separator: str = ""  # what stands between stories; empty for JSON lines
    records: list = field(default_factory=list)  # (where, record), of a JSON list, CSV or Parquet


# ---- Which files -----------------------------------------------------------------------------------


def find_inputs(inputs: list[Path]) -> list[Path]:
    """The files of files, folders and globs, in a fixed order, each once, without hidden ones.

    Raises UserError.

    What a folder or a glob has beside them is named on stderr.
    """
    files: list[Path] = []
    not_read: list[Path] = []
    for path in inputs:
        present = files_at(path)
        readable = [file for file in present if is_story_file(file, named=file == path)]
        if not present:
            raise UserError(f"{path}: no such file, or an empty folder")
        if not readable:
            raise UserError(
                f"{path}: nothing here can be read as stories ({KNOWN}); it holds {shortened(present)}"
            )
        files += readable
        not_read += sorted(set(present) - set(readable))
    name_not_read(not_read)
    return each_once(files)


def files_at(path: Path) -> list[Path]:
    """What an input names: a file, all files of a folder, or those that a glob matches."""
    if path.is_dir():
        return sorted(files_below(path, set()))
    if path.exists():  # also a pipe, or a name with a bracket
        return [path]
    files = []
    for match in map(Path, glob.glob(str(path), recursive=True)):
        if match.is_dir():
            files += files_below(match, set())
        else:
            files.append(match)
    return sorted(set(files))


def files_below(folder: Path, visited: set[str]) -> list[Path]:
    """The files of a folder and of the folders in it. Links are followed, but no folder is visited twice."""
    real = os.path.realpath(folder)
    if real in visited:
        return []
    visited.add(real)
    files = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            files += files_below(path, visited)
        else:
            files.append(path)
    return files


def each_once(files: list[Path]) -> list[Path]:
    """The files without those that are another one by a link or another spelling."""
    by_real_path: dict[str, Path] = {}
    for file in files:
        by_real_path.setdefault(os.path.realpath(file), file)
    return list(by_real_path.values())


def is_story_file(path: Path, named: bool) -> bool:
    """Whether to read a file; metadata and files of prepare.py are read only if they are named."""
    kind, packing = suffixes_of(path.name)
    if kind not in (*SUFFIXES, ".tar") or (kind == ".parquet" and packing):
        return False
    if named:
        return True
    prepared = (path.parent / "meta.json").exists() and (path.parent / "train.bin").exists()
    return path.is_file() and path.name not in METADATA and not prepared


def suffixes_of(name: str) -> tuple[str, str]:
    """The kind of a file and how it is packed, as (".jsonl", ".gz"), (".csv", ""); .tgz counts as .tar.gz."""
    name = re.sub(r"\.tgz$", ".tar.gz", name.lower())
    for packing in PACKED:
        if name.endswith(packing):
            return Path(name.removesuffix(packing)).suffix, packing
    return Path(name).suffix, ""


def name_not_read(paths: list) -> None:
    if paths:
        reason = "metadata, a link in an archive, a broken link, or an unknown kind"
        print(f"not read, because {reason}: {shortened(paths)}", file=sys.stderr)


def shortened(paths: list, most: int = 8) -> str:
    text = ", ".join(str(path) for path in paths[:most])
    if len(paths) > most:
        text += f" and {len(paths) - most:,} more"
    return text


def describe_texts(files: list[Path], most: int = 3) -> Iterator[str]:
    """A line for each of the first .txt files: how it is cut into stories."""
    how = {MARKER: f"separated by {DOCUMENT_END}", b"\n\n": "separated by empty lines", b"\n": "one a line"}
    texts = [file for file in files if suffixes_of(file.name) == (".txt", "")]
    for path in texts[:most]:
        with open(path, "rb") as f:
            head = next(text_blocks(f), b"")
        yield f"{path}: stories {how[separator_of(head)]}"


# ---- From files to blocks --------------------------------------------------------------------------


def read_blocks(files: list[Path], title: str, name_unread: bool = True) -> Iterator[Block]:
    """Stream the blocks of all files with one progress bar, which counts bytes on the disk. Raises UserError.

    In the end the members of archives that were not read are named on stderr; not in the first of two passes.
    """
    unread: list[str] = []
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for path in files:
            with open(path, "rb") as disk:
                try:
                    yield from read_file(CallbackIOWrapper(bar.update, disk, "read"), str(path), unread)
                except UnicodeDecodeError as e:
                    raise UserError(f"{path}: not UTF-8 ({e.reason}); {NOT_UTF8}") from None
                except ImportError as e:
                    package = str(e.name).split(".")[0]
                    raise UserError(
                        f"{path}: reading it needs a package; try: pip install {package}"
                    ) from None
                except Exception as e:
                    unnamed = isinstance(e, OSError) and not e.filename  # of pyarrow, or of a broken disk
                    if not unnamed and not isinstance(e, DAMAGE) and type(e).__name__ not in DAMAGE_BY_NAME:
                        raise
                    reason = str(e).partition("\n")[0]
                    raise UserError(f"{path}: damaged or cut off ({reason}); fetch it again") from None
    if name_unread:
        name_not_read(unread)


def read_file(stream, name: str, unread: list[str]) -> Iterator[Block]:
    kind, packing = suffixes_of(Path(name).name)
    if packing == ".gz":
        stream = gzip.GzipFile(fileobj=stream)
    elif packing == ".zst":
        import zstandard

        decompressor = zstandard.ZstdDecompressor()
        stream = io.BufferedReader(decompressor.stream_reader(stream, read_across_frames=True), BLOCK)
    if kind == ".tar":
        yield from read_archive(stream, name, unread)
    else:
        yield from read_stream(stream, name)


def read_archive(stream, name: str, unread: list[str]) -> Iterator[Block]:
    """The blocks of an archive's files. `unread` gets the names of the others, without hidden ones."""
    # "r|" reads the archive once, front to back; nothing is ever unpacked to disk.
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=Member) as archive:
        # Python 3.11 forgets to define this.
        archive.fileobj.seekable = lambda: False  # type: ignore[attr-defined]
        for member in archive:
            path = Path(member.name)
            kind, packing = suffixes_of(path.name)
            hidden = any(part.startswith(".") and part != ".." for part in path.parts)
            if hidden or member.isdir():
                continue
            if not member.isfile() or kind not in SUFFIXES or path.name in METADATA:
                unread.append(f"{name}/{member.name}")
                continue
            if packing or kind == ".parquet":
                raise UserError(
                    f"{name}/{member.name}: cannot be read inside an archive; unpack the archive first"
                )
            yield from read_stream(archive.extractfile(member), f"{name}/{member.name}")


class Member(tarfile.TarInfo):
    """A member of an archive. tarfile reads headers of any size into memory; this refuses large ones."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.type == tarfile.GNUTYPE_SPARSE or (member.type in HEADERS and member.size > BLOCK):
            raise tarfile.ReadError(f"a sparse file, or a header of {member.size:,} bytes")
        return member


def read_stream(stream, name: str) -> Iterator[Block]:
    kind, _ = suffixes_of(name)
    if kind in (".jsonl", ".txt"):
        yield from read_text(stream, kind, name)
        return
    readers = {".json": read_json, ".csv": read_csv, ".parquet": read_parquet}
    records = readers[kind](stream, name)
    while True:
        some = list(itertools.islice(records, 1000))
        if not some:
            return
        yield Block(name, records=some)


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


# ---- Text and JSON lines ---------------------------------------------------------------------------


def read_text(stream, kind: str, name: str) -> Iterator[Block]:
    """The blocks of a .txt or .jsonl file, each of whole stories or lines. Raises UserError."""
    blocks = text_blocks(stream)
    head = next(blocks, b"")
    check_content(head, kind, name)
    separator = b"\n"
    if kind == ".txt":
        separator = separator_of(head)
    rest = b""  # what follows the last separator
    line = 1
    for block in itertools.chain([head], blocks):
        whole, found, rest = (rest + block).rpartition(separator)
        text = whole + found
        if not text and len(rest) > LONGEST:
            raise UserError(f"{name}:{line}: over {LONGEST:,} bytes without an end; is this the right file?")
        if text:
            yield text_block(text, separator, kind, name, line)
            line += text.count(b"\n")
    if rest:
        yield text_block(rest, separator, kind, name, line)


def text_block(text: bytes, separator: bytes, kind: str, name: str, line: int) -> Block:
    """Raises UserError for a marker in a file whose first MiB has none."""
    if kind == ".jsonl":
        return Block(name, line, text)
    if separator != MARKER and MARKER in text:
        line += text.count(b"\n", 0, text.index(MARKER))
        raise UserError(
            f"{name}:{line}: the first {DOCUMENT_END} of this file; put one into its first MiB too"
        )
    return Block(name, line, text, separator.decode())


def text_blocks(stream) -> Iterator[bytes]:
    """The bytes of a text, about BLOCK at a time, with line ends as \\n whatever system they come from."""
    held = b""  # a carriage return at the end of a block: a line feed may follow
    while True:
        data = stream.read(BLOCK)
        if not data:
            break
        data = held + data
        held = b""
        if data.endswith(b"\r"):
            held = b"\r"
            data = data[:-1]
        yield data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if held:
        yield b"\n"


def separator_of(head: bytes) -> bytes:
    """What separates the stories of a text file, judging by its first MiB.

    It is end markers; else empty lines, if a quarter of what these separate has two to twenty lines; else
    line ends.
    """
    if MARKER in head:
        return MARKER
    parts = [part.strip() for part in head.split(b"\n\n") if part.strip()]
    several = [part for part in parts if 1 <= part.count(b"\n") < 20]
    if len(parts) > 1 and len(several) >= len(parts) / 4:
        return b"\n\n"
    return b"\n"


def records_of(block: Block) -> Iterator[tuple[str, object]]:
    """The records of one block: (where, record), of which `where` names the record in messages.

    Raises UserError.
    """
    if block.records:
        yield from block.records
        return
    try:
        text = block.text.decode()
    except UnicodeDecodeError as e:
        line = block.line + block.text.count(b"\n", 0, e.start)
        found = block.text[e.start]
        raise UserError(f"{block.name}:{line}: not UTF-8 (byte 0x{found:02x}); {NOT_UTF8}") from None
    text = text.removeprefix(BOM).replace(f"\n{BOM}", "\n")  # files that were joined have one inside
    if block.separator:
        for story in text.removesuffix(block.separator).split(block.separator):
            yield f"{block.name}:{block.line}", story
        return
    for number, row in enumerate(text.split("\n"), block.line):
        if not row or row.isspace():
            continue
        where = f"{block.name}:{number}"
        try:
            record = json.loads(row, object_pairs_hook=object_of)
        except (ValueError, RecursionError) as e:
            advice = "a .jsonl file has one object a line, and no commas between"
            raise UserError(f"{where}: malformed JSON ({e}); {advice}") from None
        yield where, record


def object_of(pairs: list[tuple]):
    """A JSON object as a dict; a LeftOut if a key stands twice in it, or in an object in it."""
    found = dict(pairs)
    if len(found) < len(pairs):
        return LeftOut("duplicate_key")
    for value in found.values():
        if isinstance(value, LeftOut):
            return value
    return found


# ---- Files whose records are parsed here -----------------------------------------------------------


def read_json(stream, name: str):
    """Stream the elements of one JSON list, so that the file can be larger than memory."""
    reader = codecs.getreader("utf-8-sig")(stream)
    decoder = json.JSONDecoder(object_pairs_hook=object_of)
    text = reader.read(BLOCK)
    check_content(text[:64].encode(), ".json", name)
    if not text.lstrip().startswith("["):
        advice = "JSON lines belong in a .jsonl file, a list under a key in one of its own"
        raise UserError(f"{name}: expected a JSON list, found {text[:20]!r}; {advice}")
    at = text.index("[") + 1  # text[:at] has been parsed
    line = 1  # where text[0] stands
    number = 0  # of the elements parsed
    while True:
        start = skip_space(text, at)
        if text[start : start + 1] == "]":
            break
        try:
            if number:
                if text[start : start + 1] != ",":
                    raise ValueError("a comma is missing")
                start = skip_space(text, start + 1)
            record, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as e:  # broken, or not all of it is read yet
            more = ""
            if len(text) - at < LONGEST:
                more = reader.read(BLOCK)
            if not more:
                line += text.count("\n", 0, start)
                raise UserError(f"{name}:{line}: malformed JSON ({e})") from None
            line += text.count("\n", 0, at)
            text = text[at:] + more
            at = 0
            continue
        at = end
        number += 1
        yield f"{name}, element {number}", record
    rest = text[start + 1 :]
    while rest.isspace() or not rest:
        rest = reader.read(BLOCK)
        if not rest:
            return
    raise UserError(f"{name}: malformed JSON (something follows the list)")


def skip_space(text: str, at: int) -> int:
    """The place of the first character at `at` or behind it that is not white space."""
    space = re.compile(r"\s*").match(text, at)
    assert space  # it can match nothing at all
    return space.end()


def read_csv(stream, name: str):
    csv.field_size_limit(LONGEST)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    header = text.readline(LONGEST + 1)
    check_content(header[:64].encode(), ".csv", name)
    delimiter = max(",\t;", key=header.count)  # a spreadsheet may write another than the comma
    rows = csv.reader(csv_lines(header, text), delimiter=delimiter, strict=True)
    try:
        titles = next(rows, [])
        names = column_names(titles, name)
        for row in rows:
            if not row:
                continue
            where = f"{name}:{rows.line_num}"
            if len(row) < len(names):
                raise UserError(f"{where}: has fewer columns than the first line")
            nameless = row[len(names) :]
            if len(row) > len(titles) or any(value.strip() for value in nameless):
                problem = "has more columns than the first line names"
                raise UserError(f"{where}: {problem}; a text that holds {delimiter!r} needs quotes")
            yield where, dict(zip(names, row, strict=False))
    except csv.Error as e:
        raise UserError(f"{name}:{rows.line_num}: malformed CSV ({e})") from None


def csv_lines(header: str, text) -> Iterator[str]:
    """The lines of a CSV file. One that is too long is cut in two, so that csv refuses it."""
    line = header
    while line:
        yield line
        line = text.readline(LONGEST + 1)


def column_names(titles: list[str], name: str) -> list[str]:
    """The names of the columns, without the empty ones that a spreadsheet writes at the end.

    Raises UserError.
    """
    names = list(titles)
    while names and not names[-1].strip():
        names.pop()
    given = [title for title in names if title.strip()]
    if len(set(given)) < len(given):
        raise UserError(f"{name}:1: two columns have one name: {', '.join(given)}")
    return names


def read_parquet(stream, name: str):
    import pyarrow.parquet

    check_content(stream.read(64), ".parquet", name)
    file = pyarrow.parquet.ParquetFile(stream)
    columns = []
    for column in file.schema_arrow:
        if column.name in columns:
            raise UserError(f"{name}: two columns have one name: {column.name}")
        if not pyarrow.types.is_temporal(column.type):  # a date may be none that Python has
            columns.append(column.name)
    number = 0
    for batch in file.iter_batches(1000):
        for record in batch.select(columns).to_pylist():
            number += 1
            yield f"{name}, row {number}", record
