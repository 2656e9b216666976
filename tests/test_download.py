"""prepare.py --download: the datasets of the README, from the Hugging Face hub or a mirror of it.

What stories/download.py promises:
- an archive is fetched once, to the byte, and has its name only when it is whole and on the disk;
- what has arrived is kept: after a broken connection, or a kill -9, it goes on from there;
- two versions of a file are never put together;
- what cannot be fetched ends in one line that says what to do.

Order: a server that can go wrong; what is fetched; connections that break; parts of earlier calls; refusals.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import ROOT, assert_refused, meta_of, run_here

import prepare
from common.files import UserError
from stories import download as downloads

ARCHIVE = "TinyStories_all_data_zh.tar.gz"
PATH = f"/datasets/adam89/TinyStoriesChinese/resolve/main/{ARCHIVE}"
DATA = random.Random(1).randbytes(1_000_000)
CHANGED = DATA[::-1]

# ---- A server that can go wrong --------------------------------------------------------------------


def tag_of(data):
    return f'"{hash(data)}"'


class Hub(ThreadingHTTPServer):
    """Serves files, and goes on inside one where it is asked to. A test says what goes wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {PATH: DATA}
        self.redirects = {}  # from a path to an address
        self.refusals = []  # status codes of the next requests
        self.breaks = []  # after how many bytes the next replies end
        self.hangs = False  # instead of ending
        self.ranges = True
        self.says_length = True
        self.requests = []  # path, range


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        hub = self.server
        hub.requests.append((self.path, self.headers["Range"]))
        if hub.refusals:
            self.send_error(hub.refusals.pop(0))
        elif self.path in hub.redirects:
            self.send_response(302)
            self.send_header("Location", hub.redirects[self.path])
            self.end_headers()
        else:
            self.send_file(hub, hub.files[self.path])

    def send_file(self, hub, data):
        status = 200
        tag = tag_of(data)
        same_version = self.headers["If-Range"] in (None, tag)
        if self.headers["Range"] and hub.ranges and same_version:
            status = 206
            start = self.headers["Range"].removeprefix("bytes=").removesuffix("-")
            data = data[int(start) :]
        if not data:
            status = 416
        self.send_response(status)
        self.send_header("ETag", tag)
        if hub.says_length:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if hub.breaks:
            data = data[: hub.breaks.pop(0)]
        self.wfile.write(data)
        if hub.hangs:
            self.rfile.read(1)  # until nobody listens


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("no_proxy", "*")
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds between two tries: nobody waits for them here."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def assert_fetched(folder, data=DATA):
    """The archive is there, to the byte, and nothing beside it."""
    path = downloads.download("tinystories-zh", folder)
    assert path == folder / ARCHIVE and path.read_bytes() == data
    assert os.listdir(folder) == [ARCHIVE]


def assert_fails(folder, message):
    with pytest.raises(UserError, match=message):
        downloads.download("tinystories-zh", folder)


# ---- What is fetched -------------------------------------------------------------------------------


DATASETS = [
    ("tinystories-zh", PATH, "story_zh"),
    ("tinystories", "/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz", "story"),
]


@pytest.mark.parametrize("name, path, key", DATASETS)
def test_a_dataset_is_fetched_once_and_prepared(name, path, key, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/mirror/")  # a slash at the end does no harm
    stories = [{"story": "x", "story_zh": "x", key: f"第{i}只兔子"} for i in range(300)]
    source = tmp_path / "source"
    source.mkdir()
    (source / "data00.json").write_text(json.dumps(stories))
    archive = shutil.make_archive(source, "gztar", source)
    hub.files = {f"/mirror{path}": Path(archive).read_bytes()}
    for _ in range(2):
        run_here(prepare, f"--download={name}", "--vocab_size=300", "--val_fraction=0.2")
        meta = meta_of(f"data/{name}")
        assert meta["train"]["stories"] + meta["val"]["stories"] == 300
    assert hub.requests == [(f"/mirror{path}", None)]


def test_without_a_mirror_the_hub_is_asked(tmp_path, monkeypatch):
    def fetch(url, path, part):
        raise UserError(url)

    monkeypatch.setattr(downloads, "fetch", fetch)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert_fails(tmp_path, f"https://huggingface.co{PATH}")


def test_an_archive_is_on_the_disk_before_it_has_its_name(hub, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    hub.files = {PATH: b"short"}
    assert_fetched(tmp_path, b"short")
    assert synced == [5]


def test_a_reply_that_does_not_say_its_length(hub, tmp_path):
    """Some mirrors compress on the way."""
    hub.says_length = False
    assert_fetched(tmp_path)


# ---- Connections that break ------------------------------------------------------------------------


def test_each_try_goes_on_where_the_last_has_ended(hub, tmp_path, waits, capsys):
    """As long as something arrives there is no end to the tries."""
    hub.breaks = [600_000, 70, 70, 70, 70, 70, 70]
    assert_fetched(tmp_path)
    assert hub.requests[1:] == [(PATH, f"bytes={600_000 + 70 * i}-") for i in range(7)]
    assert waits == [1] * 7
    assert capsys.readouterr().err.count("trying again") == 7


def test_six_failures_without_a_byte_are_enough(hub, tmp_path, waits):
    """It waits longer each time. The next call goes on with what has arrived."""
    hub.breaks = [400_000, 0, 0, 0, 0, 0]
    assert_fails(tmp_path, "6 tries failed; run again")
    assert waits == [1, 3, 7, 15, 31]
    assert_fetched(tmp_path)
    assert hub.requests[-1] == (PATH, "bytes=400000-")


def test_a_server_that_cannot_go_on_sends_all_again(hub, tmp_path):
    hub.ranges = False
    hub.breaks = [400_000, 800_000]
    assert_fetched(tmp_path)


def test_a_file_that_changes_between_two_tries_comes_whole(hub, tmp_path, monkeypatch):
    hub.breaks = [400_000, 300_000, 200_000]
    monkeypatch.setattr(time, "sleep", lambda seconds: hub.files.update({PATH: CHANGED}))
    assert_fetched(tmp_path, CHANGED)
    starts = [requested for _, requested in hub.requests]
    assert starts == [None, "bytes=400000-", "bytes=300000-", "bytes=500000-"]


def test_a_redirect_to_another_host_keeps_the_range(hub, tmp_path):
    hub.redirects = {PATH: f"http://localhost:{hub.server_port}/blob"}
    hub.files = {"/blob": DATA}
    hub.breaks = [400_000]
    assert_fetched(tmp_path)
    assert hub.requests[1::2] == [("/blob", None), ("/blob", "bytes=400000-")]


def test_a_server_that_is_busy_is_asked_again(hub, tmp_path):
    hub.refusals = [503]
    assert_fetched(tmp_path)


# ---- Parts of earlier calls ------------------------------------------------------------------------


def test_a_kill_loses_only_what_is_on_its_way(hub, tmp_path):
    """kill -9 in the middle: nothing is prepared from a part."""
    hub.breaks = [400_000]
    hub.hangs = True
    command = [sys.executable, ROOT / "prepare.py", "--download=tinystories-zh"]
    process = subprocess.Popen(command, cwd=tmp_path)
    folder = tmp_path / "data" / "downloads"
    part = folder / f"{ARCHIVE}.part"
    while downloads.size_of(part) < 300_000:
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (tmp_path / "data" / "tinystories-zh").exists()
    kept = part.stat().st_size
    hub.hangs = False
    assert_fetched(folder)
    assert hub.requests[1:] == [(PATH, f"bytes={kept}-")]


@pytest.mark.parametrize("more", [b"", b"more"])
def test_a_part_that_lacks_nothing_or_has_too_much(hub, tmp_path, more):
    """Killed just before the rename, or of another file. The server answers 416."""
    (tmp_path / f"{ARCHIVE}.part").write_bytes(DATA + more)
    (tmp_path / f"{ARCHIVE}.etag").write_text(tag_of(DATA))
    assert_fetched(tmp_path)


def test_a_part_of_an_unknown_version_is_not_trusted(hub, tmp_path):
    (tmp_path / f"{ARCHIVE}.part").write_bytes(bytes(1000))
    assert_fetched(tmp_path)


# ---- Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_ends_at_once(hub, tmp_path, status):
    hub.refusals = [status]
    assert_fails(tmp_path, f"{hub.url}{PATH}: {status} .*HF_ENDPOINT")
    assert len(hub.requests) == 1 and not os.listdir(tmp_path)


def test_a_redirect_in_circles(hub, tmp_path):
    hub.redirects = {PATH: "/round", "/round": PATH}
    assert_fails(tmp_path, f"{hub.url}{PATH}: 302")


@pytest.mark.parametrize("endpoint", ["hf-mirror.invalid", "127.0.0.1:9/x", "http://", "https://[oops"])
def test_a_mirror_that_is_no_address(tmp_path, monkeypatch, endpoint):
    """Such as a name without https:// before it."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert_fails(tmp_path, "expected an address")


def test_a_page_instead_of_the_archive(hub, tmp_path, monkeypatch):
    """Some networks answer everything with a page to log in."""
    monkeypatch.chdir(tmp_path)
    hub.files = {PATH: b"<html>please log in</html>"}
    assert_refused(prepare, ["--download=tinystories-zh"], ARCHIVE)
    assert not (tmp_path / "data" / "tinystories-zh").exists()
