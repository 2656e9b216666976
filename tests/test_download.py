"""--download against real HTTP servers on loopback that break, redirect, forget and change."""

import contextlib
import gzip
import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT, assert_one_line_error

ARCHIVE = "TinyStories_all_data_zh.tar.gz"
PATH = f"/datasets/adam89/TinyStoriesChinese/resolve/main/{ARCHIVE}"
STORIES = [f"第{i}天，小兔子{'找到' if i % 3 else '送出'}了{i * 7}根胡萝卜。" for i in range(300)]


def pack(files):
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|") as archive,
    ):
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def chinese(seed):
    """An archive as the hub has it, with 3 MB beside the stories that gzip cannot shrink; differs by seed."""
    rows = [json.dumps({"story": "x", "story_zh": s}, ensure_ascii=False) + "\n" for s in STORIES]
    files = {f"./data{i:02}_zh.jsonl": "".join(rows[i::3]).encode() for i in range(3)}
    return pack({"noise.bin": random.Random(seed).randbytes(3_000_000)} | files)


DATA, CHANGED = chinese(1), chinese(2)


class Hub(ThreadingHTTPServer):
    """Serves `files` (path: bytes). What goes wrong is listed by request, in `breaks` and `answers`."""

    daemon_threads = True

    def __init__(
        self, files, ranges=True, breaks=(), answers=(), redirects=None, hang_at=None, chunked=False
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.ranges, self.redirects = dict(files), ranges, redirects or {}
        self.breaks = list(breaks)  # of the next replies with content: bytes after which each breaks, and how
        self.answers = list(answers)  # status codes of the next requests
        self.hang_at, self.chunked, self.released = hang_at, chunked, threading.Event()
        self.after_break = None  # called once a reply was broken off
        self.requests, self.sent = [], 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, code, **headers):
        self.send_response(code)
        for name, value in ({"Content_Length": 0, "Connection": "close"} | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.close_connection = True

    def do_GET(self):
        hub = self.server
        hub.requests.append((self.path, self.headers["Range"]))
        if hub.answers:
            return self.reply(hub.answers.pop(0))
        if self.path in hub.redirects:
            return self.reply(302, Location=hub.redirects[self.path])
        if self.path not in hub.files:
            return self.reply(404)
        data = hub.files[self.path]
        tag = f'"{hash(data):x}"'
        start = 0
        if hub.ranges and self.headers["Range"] and self.headers["If-Range"] in (None, tag):
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if start >= len(data):
                return self.reply(416, Content_Range=f"bytes */{len(data)}")
        headers = {
            "Content_Length": len(data) - start,
            "ETag": tag,
            "Accept_Ranges": "bytes" if hub.ranges else "none",
        }
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if hub.chunked:
            headers |= {"Content_Length": None, "Transfer_Encoding": "chunked"}
            data = b"%x\r\n" % len(data) + data + b"\r\n0\r\n\r\n"
        self.reply(206 if start else 200, **headers)
        stop, reset = hub.breaks.pop(0) if hub.breaks else (len(data), False)
        hang_at, hub.hang_at = hub.hang_at, None
        with contextlib.suppress(ConnectionError):
            for at in range(start, min(start + stop, len(data)), 50_000):
                if hang_at is not None and at >= hang_at:
                    hub.released.wait()
                    return None
                piece = data[at : min(at + 50_000, start + stop)]
                self.wfile.write(piece)
                hub.sent += len(piece)
            if reset:  # closed with a reset instead of in order
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()
                self.wfile.close()
                self.connection.close()
        if stop < len(data) - start and hub.after_break:
            hub.after_break()
            hub.after_break = None


@pytest.fixture
def serve():
    hubs = []

    def start(files=None, **options):
        hubs.append(Hub(files or {PATH: DATA}, **options))
        threading.Thread(target=hubs[-1].serve_forever, args=(0.01,), daemon=True).start()
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.released.set()
        hub.shutdown()
        hub.server_close()


def command(endpoint, dataset="tinystories-zh"):
    args = [
        sys.executable,
        ROOT / "prepare.py",
        "--download",
        dataset,
        "--vocab_size",
        "500",
        "--val_fraction",
        "0.2",
    ]
    return list(map(str, args)), os.environ | {"HF_ENDPOINT": endpoint, "no_proxy": "*"}


def fetch(folder, endpoint, dataset="tinystories-zh", check=True):
    args, env = command(endpoint, dataset)
    done = subprocess.run(args, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def assert_fetched(folder, data=DATA, dataset="tinystories-zh", archive=ARCHIVE):
    """The original bytes lie in data/downloads and nothing beside them, and every story is prepared."""
    downloads = folder / "data" / "downloads"
    assert (downloads / archive).read_bytes() == data
    assert os.listdir(downloads) == [archive]
    out = folder / "data" / dataset
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    texts = []
    for split in ("train", "val"):
        ids = np.fromfile(out / f"{split}.bin", dtype="<u2")
        ends = np.flatnonzero(ids == tokenizer.eos_id())
        texts += [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1) if len(part)]
    assert sorted(texts) == sorted(STORIES)


def test_plain_and_kept(serve, tmp_path):
    """Fetched once; a second run finds the archive and asks for nothing."""
    hub = serve()
    fetch(tmp_path, hub.url + "/")  # a slash at the end does no harm
    assert_fetched(tmp_path)
    assert hub.requests == [(PATH, None)] and hub.sent == len(DATA)
    fetch(tmp_path, hub.url)
    assert_fetched(tmp_path)
    assert len(hub.requests) == 1


def test_english_original(serve, tmp_path):
    """The other dataset: lists in .json files, the story under another key."""
    archive = "TinyStories_all_data.tar.gz"
    rows = [{"story": s, "summary": "x"} for s in STORIES]
    data = pack({f"data{i:02}.json": json.dumps(rows[i::2]).encode() for i in range(2)})
    hub = serve({f"/datasets/roneneldan/TinyStories/resolve/main/{archive}": data})
    fetch(tmp_path, hub.url, "tinystories")
    assert_fetched(tmp_path, data, "tinystories", archive)


def test_broken_connections_are_resumed(serve, tmp_path):
    """Three breaks, the last of them by a reset: each try goes on where the last ended, and says so in a
    line.
    """
    hub = serve(breaks=[(1_100_000, False), (70, False), (1_200_000, True)])
    done = fetch(tmp_path, hub.url)
    assert_fetched(tmp_path)
    asked = [int(r[6:-1]) if r else 0 for _, r in hub.requests]
    assert len(asked) == 4 and asked[:3] == [0, 1_100_000, 1_100_070]
    assert asked == sorted(asked) and asked[3] < asked[2] + 1_200_001
    assert (
        len([line for line in done.stderr.splitlines() if hub.url in line]) == 3
        and "Traceback" not in done.stderr
    )


def test_server_without_ranges(serve, tmp_path):
    """A server that sends the whole file whatever was asked: begun again, never appended."""
    hub = serve(ranges=False, breaks=[(1_500_000, False), (2_500_000, False)])
    fetch(tmp_path, hub.url)
    assert_fetched(tmp_path)
    assert len(hub.requests) == 3


def test_file_that_changes_between_tries(serve, tmp_path):
    """The halves of two versions are never put together."""
    hub = serve(breaks=[(1_500_000, False)])
    hub.after_break = lambda: hub.files.update({PATH: CHANGED})
    fetch(tmp_path, hub.url)
    assert_fetched(tmp_path, CHANGED)
    assert [r for _, r in hub.requests] == [None, "bytes=1500000-"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_redirect(serve, tmp_path, elsewhere):
    """The hub sends to another path or another host; a resumed try keeps its range on the way."""
    cdn = serve({"/cdn/blob": DATA}, breaks=[(1_500_000, False)])
    location = f"{cdn.url if elsewhere else ''}/cdn/blob"
    hub = serve(redirects={PATH: location}) if elsewhere else cdn
    hub.redirects = {PATH: location}
    fetch(tmp_path, hub.url)
    assert_fetched(tmp_path)
    blobs = [r for path, r in cdn.requests if path == "/cdn/blob"]
    assert blobs == [None, "bytes=1500000-"] and cdn.sent == len(DATA)


def test_killed_and_started_again(serve, tmp_path):
    """kill -9 in mid-transfer loses only what was on its way; nothing is prepared from a part."""
    hub = serve(hang_at=2_500_000)
    args, env = command(hub.url)
    process = subprocess.Popen(args, cwd=tmp_path, env=env, stderr=subprocess.PIPE)
    part = tmp_path / "data" / "downloads" / f"{ARCHIVE}.part"
    while not (part.exists() and part.stat().st_size >= 1_000_000):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.kill()
    process.wait()
    process.stderr.close()
    assert not (tmp_path / "data" / "tinystories-zh").exists() and not part.with_suffix("").exists()
    kept = part.stat().st_size
    fetch(tmp_path, hub.url)
    assert_fetched(tmp_path)
    assert hub.requests[1:] == [(PATH, f"bytes={kept}-")]


@pytest.mark.parametrize("extra", [0, 5000])
def test_part_as_long_as_the_file_or_longer(serve, tmp_path, extra):
    """Stopped just before the rename, or a part that is no part of this file (416 from the server)."""
    hub = serve()
    downloads = tmp_path / "data" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / f"{ARCHIVE}.part").write_bytes(DATA + bytes(extra))
    (downloads / f"{ARCHIVE}.etag").write_text(f'"{hash(DATA):x}"')
    fetch(tmp_path, hub.url)
    assert_fetched(tmp_path)


def test_part_of_unknown_origin(serve, tmp_path):
    """A part beside which no tag lies is not trusted."""
    hub = serve()
    downloads = tmp_path / "data" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / f"{ARCHIVE}.part").write_bytes(bytes(1000))
    fetch(tmp_path, hub.url)
    assert_fetched(tmp_path)


def test_server_that_is_busy_for_a_moment(serve, tmp_path):
    hub = serve(answers=[503])
    fetch(tmp_path, hub.url)
    assert_fetched(tmp_path)
    assert len(hub.requests) == 2


@pytest.mark.parametrize("code", [401, 403, 404])
def test_refusals(serve, tmp_path, code):
    """One line with the address and the code, at once, and no folder."""
    hub = serve(answers=[code] * 9)
    assert_one_line_error(fetch(tmp_path, hub.url, check=False), hub.url + PATH, code)
    assert len(hub.requests) == 1 and not (tmp_path / "data" / "tinystories-zh").exists()
    assert os.listdir(tmp_path / "data" / "downloads") == []


def test_redirect_in_circles(serve, tmp_path):
    hub = serve(redirects={PATH: "/round", "/round": PATH})
    assert_one_line_error(fetch(tmp_path, hub.url, check=False), hub.url)


@pytest.mark.parametrize("endpoint", ["hf-mirror.invalid", "127.0.0.1:9/x", "http://", "https://[oops"])
def test_endpoint_that_is_no_address(tmp_path, endpoint):
    """Such as a mirror's name without https:// before it."""
    assert_one_line_error(fetch(tmp_path, endpoint, check=False), "HF_ENDPOINT")


def test_reply_of_unknown_length(serve, tmp_path):
    """Some mirrors compress or pass on in chunks and do not say how long the file is."""
    hub = serve(chunked=True)
    fetch(tmp_path, hub.url)
    assert_fetched(tmp_path)


def test_archive_that_is_damaged(serve, tmp_path):
    """What the server has is broken: said in one line that names the file."""
    hub = serve({PATH: DATA[:-5000]})
    done = fetch(tmp_path, hub.url, check=False)
    assert_one_line_error(done, ARCHIVE, "damaged or cut off")
    assert not (tmp_path / "data" / "tinystories-zh").exists()


def test_page_instead_of_the_archive(serve, tmp_path):
    """Some networks answer everything with a page to log in."""
    hub = serve({PATH: b"<html>please log in</html>"})
    assert_one_line_error(fetch(tmp_path, hub.url, check=False), ARCHIVE)
