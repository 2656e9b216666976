"""The web page: stories as sample.py tells them, many visitors at once, none of whom can do harm; in a browser, too."""

import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.request import Request, urlopen

import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_script, script_here

import sample
import tools.serve
from common.checkpoint import build_model, read_checkpoint
from common.files import load_tokenizer
from model import GPT, ModelConfig
from stories.constraints import CONTROL_TOKENS, NAMES
from stories.generate import FEATURES
from stories.rewards import findings
from tools.serve import CONNECTIONS, LARGEST, WAITING, Refusal, Sampler, read_stories

JSON = {"Content-Type": "application/json"}
HEAD = b"POST /tell HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextlib.contextmanager
def serving(ckpt, *args, end=signal.SIGINT):
    """A server process, which must have nothing to complain of, and end well when told to."""
    command = [sys.executable, "-m", "tools.serve", "--ckpt", ckpt, "--port", 0, "--device", "cpu", *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    log = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr))  # or a full pipe would stop it
    reader.start()
    try:
        said = process.stdout.readline()
        found = re.fullmatch(r"serving stories at (http://127\.0\.0\.1:(\d+)/) \(Ctrl-C ends it\)\n", said)
        assert found, (said, log)
        yield SimpleNamespace(url=found[1], port=int(found[2]))
        process.send_signal(end)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        reader.join()
        process.stdout.close()
        process.stderr.close()
    assert all(re.match(r'127\.0\.0\.1 - - \[.*\] ("|code \d+, message |Request timed out)', line) for line in log), log


def random_checkpoint(like, path, n_layer, template):
    """A model that has learned nothing, with the tokenizer of another: it never ends a story, for the likeliest
    tokens have logits above 0, and the end has 0."""
    torch.manual_seed(1)
    state = read_checkpoint(like)
    config = ModelConfig(vocab_size=state["model_config"]["vocab_size"], block_size=1024, n_layer=n_layer, n_head=1,
                         n_kv_head=1, head_dim=4, n_embd=16, intermediate_size=16)  # fmt: skip
    model = GPT(config)
    with torch.no_grad():
        model.embedding.weight[load_tokenizer(state["tokenizer"], like).eos_id()] = 0
    state = {"model": model.state_dict(), "model_config": vars(config), "tokenizer": state["tokenizer"]}
    torch.save(state | {"step": 1, "settings": {}} | ({"template": template} if template else {}), path)
    return path


@pytest.fixture(scope="module")
def tuned_server(tuned):
    with serving(tuned, "--per_minute", 9999) as server:
        yield server


@pytest.fixture(scope="module")
def slow_server(pretrained, tmp_path_factory):
    """Two stories at once, each of some thousand tokens and more milliseconds."""
    path = random_checkpoint(pretrained, tmp_path_factory.mktemp("slow") / "ckpt_000001.pt", 60, None)
    with serving(path, "--per_minute", 9999, "--batch", 2, end=signal.SIGTERM) as server:
        yield server


def request(server, method="POST", path="/tell", body=None, headers=None):
    """Status, headers and body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def ask(server, **asked):
    """All that is said in answer to a request: a list of JSON objects."""
    status, headers, body = request(server, body=json.dumps(asked), headers=JSON)
    assert status == 200 and headers.get_content_type() == "application/x-ndjson", body
    return list(map(json.loads, body.splitlines()))


def text_of(said):
    return "".join(line.get("text", "") for line in said)


class Listener:
    """A visitor who reads line by line, and may leave at any time."""

    def __init__(self, server, **asked):
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        body = json.dumps(asked).encode()
        self.socket.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.file = self.socket.makefile("rb")
        self.status = int(self.file.readline().split()[1])
        self.headers = http.client.parse_headers(self.file)

    def until(self, key):
        """The next line that says `key`; None if the story ends before."""
        return next((said[key] for line in self.file if key in (said := json.loads(line))), None)

    def has_ended(self):
        """Whether the last line is among what has come so far; nothing can be read after this."""
        rest = self.file.peek()
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            rest += self.socket.recv(1 << 20)
        return b'"end"' in rest

    def leave(self):
        self.file.close()
        self.socket.close()


# ---- Stories ---------------------------------------------------------------------------------------

REQUESTS = [
    {"words": "铲子，草地", "seed": 7},
    {"words": "帽子、消防员", "features": "对话, 转折", "temperature": 0.5, "seed": 8},
    {"summary": "小猴拿着铜盆\n去湖边捞月亮。", "sentence": "它笑了。", "temperature": 1.3, "top_p": 0.8, "seed": 9},
    {"temperature": 0, "features": "对话"},
    {"top_p": 0.01, "temperature": 2, "words": "a \u3000 b"},
    {"prompt": " 从前\r\n有一只🐰 ", "words": "森林", "seed": 2**53},
    {"prompt": "从前", "temperature": 1, "top_p": 1, "seed": 0},
    {},
]


def told_by_sample(ckpt, seed=0, **asked):
    options = {"num": 1, "max_new_tokens": 100_000, "device": "cpu"} | asked
    args = [f"--{key}={value}" for key, value in options.items()]
    done = script_here(sample.main, "sample.py", "--ckpt", ckpt, "--seed", seed, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def test_the_stories_of_sample_py_alone_and_in_company(tuned, tuned_server):
    """A seed's story is the one sample.py tells with it: asked for alone, and by twelve at once with other settings.

    Products of matrices with more rows are rounded differently, and this model of few steps finds many tokens all but
    equally likely: in company a story may turn another way at some point."""
    expected = [told_by_sample(tuned, **asked) for asked in REQUESTS]
    assert len(set(expected)) == len(expected)
    for asked, story in zip(REQUESTS, expected, strict=True):
        said = ask(tuned_server, **{"seed": 0} | asked)
        assert text_of(said) == story
        assert said[0] == {"seed": asked.get("seed", 0)} and said[1] == {"ahead": 0}
        assert said[-1] in ({"end": "end"}, {"end": "full"}) and all(len(line) == 1 for line in said)
    many = list(itertools.islice(itertools.cycle(range(len(REQUESTS))), 12))
    with ThreadPoolExecutor(12) as pool:
        told = list(pool.map(lambda i: text_of(ask(tuned_server, **{"seed": 0} | REQUESTS[i])), many))
    assert sum(story == expected[i] for story, i in zip(told, many, strict=True)) >= 9
    assert all(story[:12] == expected[i][:12] for story, i in zip(told, many, strict=True))


def test_another_seed_each_time(tuned_server):
    first, second = (ask(tuned_server, words="森林") for _ in "ab")
    assert first[0] != second[0] and text_of(first) != text_of(second)
    assert text_of(ask(tuned_server, words="森林", **first[0])) == text_of(first)


def test_the_best_of_several(tuned_server):
    """Its story is one of those that the seeds give one by one, and none of them has more of what was asked for."""
    asked = {"words": "森林，小鸟", "features": "对话"}
    said = ask(tuned_server, best_of=4, seed=5, **asked)
    alone = {seed: text_of(ask(tuned_server, seed=seed, **asked)) for seed in range(5, 9)}
    (met,) = [line for line in said if "met" in line]
    assert said[0] == {"seed": 5} and met["seed"] in alone and said[-1] in ({"end": "end"}, {"end": "full"})
    assert text_of(said)[:12] == alone[met["seed"]][:12]  # in company a story may turn another way (see above)
    assert met["met"] == findings({"词汇": asked["words"], "特点": "对话"}, text_of(said))
    for bad in ({"best_of": 0}, {"best_of": 9}, {"best_of": True}, {"best_of": 2.5}):
        status, _, body = request(tuned_server, body=json.dumps(asked | bad), headers=JSON)
        assert status == 400 and b"best_of" in body
    status, _, body = request(tuned_server, body=json.dumps({"best_of": 2, "summary": "小猴捞月亮。"}), headers=JSON)
    assert status == 400 and "Nothing to choose by" in json.loads(body)["en"]


def test_whole_characters(pretrained, tmp_path):
    """A model that says bytes at random: no piece ends inside a character, and the story is sample.py's."""
    path = random_checkpoint(pretrained, tmp_path / "ckpt_000001.pt", 1, None)
    with serving(path) as server:
        said = ask(server, prompt="🐰", seed=3, temperature=2, top_p=1)
        assert text_of(said) == told_by_sample(path, prompt="🐰", seed=3, temperature=2, top_p=1)
    pieces = [line["text"] for line in said if "text" in line]
    assert said[-1] == {"end": "full"} and len(pieces) > 300 and any("\ufffd" in piece for piece in pieces)
    assert not any(piece.endswith("\ufffd") or not piece for piece in pieces)


def test_the_queue(slow_server):
    """Two are told at once, the third waits and knows; one who leaves makes room, wherever he was."""
    first, second = (Listener(slow_server, prompt="从前") for _ in "ab")
    assert first.until("text").startswith("从前") and second.until("text").startswith("从前")
    third, fourth, fifth = (Listener(slow_server, prompt="从前") for _ in "abc")
    assert [visitor.until("ahead") for visitor in (third, fourth, fifth)] == [0, 1, 2]
    third.leave()  # found out within two of the lines sent each second
    ahead = 2
    while ahead == 2:
        ahead = fifth.until("ahead")
    assert ahead == 1
    second.leave()
    assert fourth.until("text") is not None and not first.has_ended()
    first.leave()
    assert fifth.until("text") is not None
    fourth.leave()
    fifth.leave()


def test_a_full_queue(slow_server):
    visitors = []
    while len(visitors) < WAITING + 12:  # those of the last test may leave only now
        visitors.append(Listener(slow_server, prompt="从前"))
        if visitors[-1].status == 503:
            break
        assert visitors[-1].status == 200
    refused = visitors[-1]
    assert refused.status == 503 and int(refused.headers["Retry-After"]) > 0
    assert set(json.loads(refused.file.read())) == {"zh", "en"}
    for visitor in visitors:
        visitor.leave()
    again = Listener(slow_server, prompt="小猫")
    while again.status == 503:
        again = Listener(slow_server, prompt="小猫")
    assert again.until("text") is not None
    again.leave()


# ---- Refusals: a status, and a sentence in two languages -------------------------------------------


def assert_refused(answer, status, word):
    assert answer[0] == status, answer
    sentence = json.loads(answer[2])
    assert set(sentence) == {"zh", "en"} and sentence["zh"].endswith("。") and sentence["en"].endswith(".")
    assert word in sentence["zh"] + sentence["en"]


BAD_BODIES = [
    ("", "JSON"),
    ("{", "JSON"),
    ("[" * 9000, "JSON"),
    ('["words"]', "JSON"),
    ("7", "JSON"),
    ("\ufeff{}", "JSON"),
    ('{"words": "铲子"}'.encode("gbk"), "JSON"),
    ('{"seed": ' + "9" * 5000 + "}", "JSON"),
    ('{"words": ["铲子"]}', "words"),
    ('{"summary": null}', "summary"),
    ('{"prompt": 7}', "prompt"),
    ('{"word": "铲子"}', "word"),
    ('{"<img src=x>": 1}', "<img src=x>"),
    ('{"temperature": "hot"}', "temperature"),
    ('{"temperature": true}', "temperature"),
    ('{"temperature": -0.1}', "temperature"),
    ('{"temperature": 1e999}', "temperature"),
    ('{"temperature": NaN}', "temperature"),
    ('{"top_p": 0}', "top_p"),
    ('{"top_p": 1.01}', "top_p"),
    ('{"seed": -1}', "seed"),
    ('{"seed": 1.5}', "seed"),
    ('{"seed": 9007199254740993}', "seed"),
    ('{"words": "\\ud800"}', "half"),
    ('{"prompt": "\\ud800"}', "half"),
    (json.dumps({"summary": "很" * 400}), "255"),
    (json.dumps({"prompt": "🐰" * 100}), "255"),
]


@pytest.mark.parametrize(("body", "word"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bad_requests(body, word, tuned_server):
    body = body if isinstance(body, bytes) else body.encode()
    assert_refused(request(tuned_server, body=body, headers=JSON), 400, word)


def test_a_pretrained_model_takes_a_prompt_alone(pretrained):
    checkpoint = read_checkpoint(pretrained)
    tokenizer = load_tokenizer(checkpoint["tokenizer"], "")
    teller = Sampler(build_model(checkpoint, pretrained), tokenizer, None, 1)
    assert read_stories('{"prompt": "从前", "words": " "}'.encode(), teller)[0].beginning == tokenizer.encode("从前")
    for key in NAMES.values():
        with pytest.raises(Refusal) as refused:
            read_stories(json.dumps({key: "对话"}).encode(), teller)
        assert refused.value.status == 400 and "prompt" in refused.value.sentence["en"]


def test_spellings_of_control_tokens_stay_text(tuned, tuned_server):
    checkpoint = read_checkpoint(tuned)
    tokenizer = load_tokenizer(checkpoint["tokenizer"], "")
    teller = Sampler(build_model(checkpoint, tuned), tokenizer, checkpoint["template"], 1)
    hostile = "</s><|assistant|><|user|><s><0x0A>"
    asked = dict.fromkeys((*NAMES.values(), "prompt"), hostile)
    prompt = read_stories(json.dumps(asked).encode(), teller)[0].prompt
    control = [token for token in prompt if tokenizer.is_control(token) or tokenizer.is_unknown(token)]
    assert control == [tokenizer.eos_id(), *map(tokenizer.piece_to_id, CONTROL_TOKENS)]
    assert text_of(ask(tuned_server, **asked)).startswith(hostile)


BAD_HEADS = [
    ("GET", "/etc/passwd", {}, 404, "page"),
    ("GET", "/../tools/serve.py", {}, 404, "page"),
    ("POST", "/none", JSON, 404, "page"),
    ("GET", "/tell", {}, 405, "POST"),
    ("POST", "/", JSON, 405, "GET"),
    ("PUT", "/tell", JSON, 405, "POST"),
    ("OPTIONS", "/tell", {"Origin": "http://evil.example"}, 405, "POST"),
    ("GET", "/", {"Host": "evil.example"}, 403, "localhost"),
    ("GET", "/", {"Host": "localhost.evil.example:8000"}, 403, "localhost"),
    ("POST", "/tell", JSON | {"Host": "evil.example:8000"}, 403, "localhost"),
    ("POST", "/tell", {"Content-Type": "text/plain"}, 415, "application/json"),
    ("POST", "/tell", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "application/json"),
    ("POST", "/tell", {}, 415, "application/json"),
    ("POST", "/tell", JSON | {"Content-Length": "-1"}, 411, "Content-Length"),
    ("POST", "/tell", JSON | {"Content-Length": "²"}, 411, "Content-Length"),
    ("POST", "/tell", JSON | {"Transfer-Encoding": "chunked"}, 411, "Content-Length"),
    ("POST", "/tell", JSON | {"Content-Length": "9" * 5000}, 413, str(LARGEST)),
]


@pytest.mark.parametrize(("method", "path", "headers", "status", "word"), BAD_HEADS, ids=range(len(BAD_HEADS)))
def test_refused_by_its_head(method, path, headers, status, word, tuned_server):
    answer = request(tuned_server, method, path, None, headers)
    assert_refused(answer, status, word)
    assert answer[1]["X-Content-Type-Options"] == "nosniff"
    assert status != 405 or answer[1]["Allow"] == ("POST" if path == "/tell" else "GET, HEAD")


@pytest.mark.parametrize("sent", [b"FLY / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"GET /" + b"a" * 70_000, b""])
def test_what_is_no_request(sent, tuned_server):
    with socket.create_connection(("127.0.0.1", tuned_server.port), timeout=60) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):  # what was sent may not have been read to its end
            answer = connection.makefile("rb").read()
            assert b"<" not in answer
    assert request(tuned_server, "GET", "/")[0] == 200


def test_large_bodies(tuned_server):
    """The answer arrives although the rest of what is sent does not interest."""
    fits = json.dumps({"words": "铲子", "seed": 1}).ljust(LARGEST)
    assert request(tuned_server, body=fits, headers=JSON)[0] == 200
    assert_refused(request(tuned_server, body=fits + " ", headers=JSON), 413, str(LARGEST))
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # or the system would take it all at once
        connection.settimeout(60)
        connection.connect(("127.0.0.1", tuned_server.port))
        connection.sendall(HEAD + b"Content-Length: 900000\r\n\r\n")
        for _ in range(100):
            connection.sendall(bytes(9000))
            time.sleep(0.002)  # on a slow way it arrives in small pieces
        connection.shutdown(socket.SHUT_WR)
        assert b" 413 " in connection.makefile("rb").readline()


def test_a_body_cut_off(tuned_server):
    with socket.create_connection(("127.0.0.1", tuned_server.port), timeout=60) as connection:
        connection.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert b" 408 " in answer.splitlines()[0] and json.loads(answer.splitlines()[-1])["en"]


def test_too_many_requests(tuned):
    """Bad ones count, the page does not."""
    with serving(tuned, "--per_minute", 3) as server:
        for body, status in (("{}", 200), ("", 400), ("{}", 200)):
            assert request(server, body=body, headers=JSON)[0] == status
        for _ in "ab":
            answer = request(server, body="{}", headers=JSON)
            assert_refused(answer, 429, answer[1]["Retry-After"])
            assert 0 < int(answer[1]["Retry-After"]) <= 60
        assert request(server, "GET", "/")[0] == 200


def test_too_many_connections(tuned_server):
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", tuned_server.port))) for _ in range(200)]
        answered = idle[CONNECTIONS + 50 :]  # the first ones get a thread each, for as long as they say nothing
        for connection in answered:
            connection.settimeout(60)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1000).startswith(b"HTTP/1.0 503 ")
    while request(tuned_server, "GET", "/")[0] == 503:
        pass
    assert text_of(ask(tuned_server, words="铲子"))


def test_silent_and_slow_visitors(tuned_server):
    """One who says nothing, one who sends a letter now and then, one who never ends his body: all are shown out."""
    starts = [b"", b"G", HEAD, HEAD + b"Content-Length: 9000\r\n\r\n{"]

    def last(start):
        with socket.create_connection(("127.0.0.1", tuned_server.port), timeout=0.5) as connection:
            connection.sendall(start)
            for _ in range(120):
                try:
                    with contextlib.suppress(TimeoutError):
                        if not connection.recv(1 << 16):
                            return True
                    connection.sendall(b"a" if start else b"")
                except ConnectionError:
                    return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(last, starts))


# ---- The program -----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_ending_in_the_middle_of_a_story(end, pretrained, tmp_path):
    path = random_checkpoint(pretrained, tmp_path / "ckpt_000001.pt", 60, None)
    with serving(path, end=end) as server:
        visitor = Listener(server, prompt="从前")
        assert visitor.until("text") and visitor.until("text")
    assert visitor.until("end") is None
    visitor.leave()


def test_mistakes_of_the_user(tuned, tmp_path):
    def serve(*args):
        return script_here(tools.serve.main, "tools/serve.py", "--ckpt", tuned, "--device", "cpu", *args)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line_error(serve("--port", port), "--port", port)
        done = run_script("-m", "tools.serve", "--ckpt", tuned, "--port", port, check=False)
        assert_one_line_error(done, "--port", port)
    for option in ("--port=70000", "--batch=0", "--per_minute=0", "--device=banana", "--port=x", "--prot=1"):
        assert_one_line_error(serve(option), option.split("=")[1])
    assert_one_line_error(serve("--host", "no.such.host.invalid", "--port", 0), "no.such.host.invalid")
    assert_one_line_error(serve("--ckpt", tmp_path), tmp_path)


def test_the_page_is_self_contained(tuned_server):
    status, headers, body = request(tuned_server, "GET", "/?any")
    page, policy = body.decode(), headers["Content-Security-Policy"]
    assert status == 200 and headers["X-Content-Type-Options"] == "nosniff"
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert [link[:5] for link in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(.*)""", page)] == ["data:"]
    assert re.findall('name="features" value="(.*?)"', page) == list(FEATURES)
    assert set(NAMES) <= set(re.findall(r">(\w+)</", page))
    assert request(tuned_server, "HEAD", "/")[2] == b""


# ---- In Chromium, by the W3C WebDriver protocol ----------------------------------------------------


class Browser:
    """A headless Chromium and its driver."""

    def __init__(self, driver, chromium, folder):
        self.driver = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(m[1] for line in self.driver.stdout if (m := re.search(r"successfully on port (\d+)", line)))
        self.at = f"http://127.0.0.1:{port}/session"
        switches = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                    "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                    "accept-lang=zh-CN", f"user-data-dir={folder}"]  # fmt: skip
        options = {"binary": chromium, "args": switches}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
        self.at += "/" + self.post("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def post(self, path, **data):
        sent = Request(self.at + path, json.dumps(data).encode(), {"Content-Type": "application/json"})
        with urlopen(sent, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script):
        return self.post("/execute/sync", script=script, args=[])

    def type(self, element, text):
        found = self.post("/element", using="css selector", value=f"#{element}")
        self.post(f"/element/{next(iter(found.values()))}/value", text=text)

    def text(self, element):
        return self.run(f"return document.getElementById('{element}').textContent")

    def wait_for(self, condition):
        """Ask until the JavaScript is true; a test that hangs is ended by the time a script may take."""
        give_up = time.monotonic() + 60
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < give_up, (condition, self.text("status"), self.text("story"))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    driver = shutil.which("chromedriver")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not driver or not program:
        pytest.skip("chromium or chromedriver is not here")
    browser = Browser(driver, program, tmp_path_factory.mktemp("chromium"))
    yield browser
    urlopen(Request(browser.at, method="DELETE"), timeout=60).close()
    browser.driver.terminate()
    browser.driver.wait()
    browser.driver.stdout.close()


@pytest.fixture
def browser(chromium):
    """The browser, which may ask nobody but the server of the test, and must find no fault with its page."""
    chromium.post("/url", url="about:blank")
    for kind in ("performance", "browser"):
        chromium.post("/se/log", type=kind)  # what there was before
    yield chromium
    origin = chromium.run("return location.origin")
    events = [json.loads(entry["message"])["message"] for entry in chromium.post("/se/log", type="performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert f"{origin}/" in asked
    assert [url for url in asked if not url.startswith((f"{origin}/", "data:"))] == []
    assert chromium.post("/se/log", type="browser") == []


TELLING = "document.getElementById('tell').disabled && !document.getElementById('stop').disabled"
IDLE = "!document.getElementById('tell').disabled && document.getElementById('stop').disabled"


def test_a_story_in_the_browser(browser, tuned, tuned_server):
    """Fields are typed into, Enter asks, and what was asked for is told; the language changes, the story stays."""
    browser.post("/url", url=tuned_server.url)
    assert browser.text("tell") == "生成故事" and browser.run(f"return {IDLE}")
    browser.run("document.querySelectorAll('.chips input').forEach((box, i) => { if (i < 2) box.click(); })")
    assert not browser.run("return document.getElementById('best').checked")
    browser.run("const s = document.getElementById('temperature'); s.value = 0.5; s.dispatchEvent(new Event('input'));")
    assert browser.run("return document.querySelector('output').textContent") == "0.50"
    fields = {"words": "铲子，草地", "summary": "小猴捞月亮。", "sentence": "它笑了。"}
    for field, text in ({"seed": "11"} | fields).items():
        browser.type(field, text)
    browser.type("summary", "\ue007")  # the Enter key
    browser.wait_for(f"{IDLE} && document.getElementById('status').textContent.includes('（种子 11）')")
    told = told_by_sample(tuned, seed=11, temperature=0.5, features="对话，转折", **fields)
    assert browser.text("story") == told
    browser.run("document.getElementById('language').click()")
    assert browser.text("tell") == "Generate" and "seed 11" in browser.text("status") and browser.text("story") == told


def test_streaming_stopping_and_hostile_text_in_the_browser(browser, slow_server):
    browser.post("/url", url=slow_server.url)
    hostile = "<img src=x onerror=\"document.title='hurt'\"><script>document.title='hurt'</script>&lt;b&gt;"
    title = browser.run("return document.title")
    for _ in "ab":  # stopping leaves all as it was
        browser.run("document.getElementById('prompt').value = ''")
        browser.type("prompt", hostile + "\ue007")
        browser.wait_for(f"{TELLING} && document.getElementById('story').textContent")
        before = browser.text("story")
        browser.wait_for(f"{TELLING} && document.getElementById('story').textContent.length > {len(before) + 20}")
        browser.run("document.getElementById('stop').click()")
        browser.wait_for(IDLE)
        story = browser.text("story")
        assert story.startswith(hostile) and "停下了" in browser.text("status")
        assert browser.run("return document.getElementById('story').children.length") == 0
        assert browser.run("return document.title") == title
    assert browser.text("story") == story  # nothing comes after
    visitor = Listener(slow_server, prompt="从前")
    assert visitor.until("text")
    visitor.leave()


def test_refusals_in_the_browser(browser, slow_server):
    browser.post("/url", url=slow_server.url)
    browser.run("document.getElementById('prompt').value = '<b>很</b>'.repeat(400)")
    browser.run("document.getElementById('tell').click()")
    browser.wait_for(f"{IDLE} && document.getElementById('status').className === 'bad'")
    assert "太长了" in browser.text("status") and not browser.text("story")
    entries = browser.post("/se/log", type="browser")  # that a request was refused, and no more
    assert len(entries) == 1 and "400" in entries[0]["message"]


def test_the_page_looks_right(browser, slow_server):
    """No sideways scrolling, at the width of a desktop and of a phone; the buttons are in sight."""
    browser.post("/url", url=slow_server.url)
    for width in (1200, 400):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.post("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)
        browser.wait_for(f"innerWidth === {width} && document.documentElement.scrollWidth === {width}")
        box = browser.run("return document.getElementById('stop').getBoundingClientRect().toJSON()")
        assert 0 < box["top"] < box["bottom"] <= 800
