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


def download(dataset: str, folder: Path) -> Path:
    """Fetch a dataset's archive from the Hugging Face hub, or from the mirror HF_ENDPOINT names.

    What has arrived stays in a .part file; a later call (or retry) continues from there.
    """
    repository, file, _ = DATASETS[dataset]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/.*)?", endpoint):
        raise UserError(f"HF_ENDPOINT={endpoint}: expected an address such as https://hf-mirror.com")
    url = f"{endpoint}/datasets/{repository}/resolve/main/{file}"
    path, part, tag = folder / file, folder / f"{file}.part", folder / f"{file}.etag"
    folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    while not path.exists():
        done = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url)
        if done and tag.exists():
            request.add_header("Range", f"bytes={done}-")
            request.add_header("If-Range", tag.read_text())  # a file changed since then comes whole
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                done = done if reply.status == 206 else 0
                length = reply.headers["Content-Length"]
                total = done + int(length) if length else None
                with (
                    open(part, "ab" if done else "wb") as f,
                    tqdm(total=total, initial=done, desc=file, unit="B", unit_scale=True, disable=None) as bar,
                ):
                    tag.write_text(reply.headers.get("ETag", ""))  # after the part of an older file was overwritten
                    while chunk := reply.read1(BLOCK):
                        f.write(chunk)
                        bar.update(len(chunk))
                        failures = 0
                    f.flush()
                    os.fsync(f.fileno())
            if total and part.stat().st_size < total:
                raise ConnectionError("the connection broke")
            os.replace(part, path)
            tag.unlink()
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
            code, reason = getattr(e, "code", 0), str(getattr(e, "reason", e)).partition("\n")[0]
            if code == 416:  # the part is longer than the file: begin again
                part.unlink()
            elif 300 <= code < 500:
                raise UserError(f"{url}: {code} {reason}; set HF_ENDPOINT to use a mirror") from None
            failures += 1
            print(f"{url}: {reason}; trying again", file=sys.stderr)
        if failures > 5:
            raise UserError(f"{url}: {failures} tries failed; run again to continue, or set HF_ENDPOINT to a mirror")
        time.sleep(2**failures - 1)
    return path
