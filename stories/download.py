"""Fetch the datasets of the README from the Hugging Face hub, or from a mirror of it."""

import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from common.files import UserError
from stories.read import BLOCK

DATASETS = {  # name: (repository, file, the key of the story)
    "tinystories-zh": ("adam89/TinyStoriesChinese", "TinyStories_all_data_zh.tar.gz", "story_zh"),
    "tinystories": ("roneneldan/TinyStories", "TinyStories_all_data.tar.gz", "story"),
}
MOST_FAILURES = 5  # one after the other, without a byte between them


def download(dataset: str, folder: Path) -> Path:
    """Fetch a dataset's archive from the Hugging Face hub, or from the mirror HF_ENDPOINT names.

    Raises UserError.

    What has arrived stays in a .part file; a later call (or retry) continues from there.
    """
    repository, file, _ = DATASETS[dataset]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/.*)?", endpoint):
        raise UserError(f"HF_ENDPOINT={endpoint}: expected an address such as https://hf-mirror.com")
    url = f"{endpoint}/datasets/{repository}/resolve/main/{file}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    part = folder / f"{file}.part"
    failures = 0
    while not path.exists():
        size = size_of(part)
        try:
            fetch(url, path, part)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
            if size_of(part) > size:
                failures = 0
            failures += 1
            status = getattr(e, "code", 0)
            reason = str(getattr(e, "reason", e)).partition("\n")[0]
            if status == 416:  # the part is longer than the file: begin again
                part.unlink()
            elif 300 <= status < 500:
                raise UserError(f"{url}: {status} {reason}; set HF_ENDPOINT to use a mirror") from None
            if failures > MOST_FAILURES:
                advice = "run again to continue, or set HF_ENDPOINT to a mirror"
                raise UserError(f"{url}: {failures} tries failed; {advice}") from None
            print(f"{url}: {reason}; trying again", file=sys.stderr)
            time.sleep(2**failures - 1)
    return path


def size_of(path: Path) -> int:
    if path.exists():
        return path.stat().st_size
    return 0


def fetch(url: str, path: Path, part: Path) -> None:
    """Download into `part`, behind what it holds already, and rename it to `path` when it is complete."""
    tag = part.with_suffix(".etag")  # which version of the file the part is of
    request = urllib.request.Request(url)
    done = size_of(part)
    if done and tag.exists():
        request.add_header("Range", f"bytes={done}-")
        request.add_header("If-Range", tag.read_text())  # a file changed since then comes whole
    with urllib.request.urlopen(request, timeout=60) as reply:
        mode = "ab"
        if reply.status != http.client.PARTIAL_CONTENT:
            mode = "wb"
            done = 0
        total = None
        if reply.headers["Content-Length"]:
            total = done + int(reply.headers["Content-Length"])
        bar = tqdm(total=total, initial=done, desc=path.name, unit="B", unit_scale=True, disable=None)
        with open(part, mode) as f, bar:
            tag.write_text(reply.headers.get("ETag", ""))  # after the part of an older file was overwritten
            data = reply.read1(BLOCK)
            while data:
                f.write(data)
                bar.update(len(data))
                data = reply.read1(BLOCK)
            f.flush()
            os.fsync(f.fileno())
    if total and size_of(part) < total:
        raise ConnectionError("the connection broke")
    os.replace(part, path)
    tag.unlink()
