"""A web page that generates stories with a checkpoint.

    python -m tools.serve --ckpt out/demo_sft
    python -m tools.serve --ckpt out/demo --host 0.0.0.0 --port 8080       # for others in your network, too

The page (serve.html) loads nothing from elsewhere. It sends POST /tell, which also works by hand:

    curl -N http://127.0.0.1:8000/tell -H "Content-Type: application/json" -d '{"words": "铲子，草地", "seed": 7}'

The answer is JSON lines, sent as the story is generated: {"seed": 7}, {"ahead": how many requests wait before this
one}, {"text": a piece}, and {"end": "end", or "full" at the model's longest sequence}. With "best_of": 8 eight stories
are generated, with this seed and the seven after it; the best is sent when all are done, and before its end
{"met": what it has of what was asked for, "seed": its own}. A refusal is one object, with a sentence in Chinese ("zh")
and in English ("en").

One thread runs the model. It generates all stories as one batch, which a story joins and leaves at any token. Each
story has its own generator: a seed gives the same story as `sample.py --num 1`, whatever else is in the batch (except
for rounding, which differs between batch sizes).
"""

import base64
import collections
import contextlib
import hashlib
import ipaddress
import json
import math
import os
import queue
import random
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import build_model, choose_device, choose_dtype, read_checkpoint
from common.files import Parser, UserError, load_tokenizer, report_errors
from sample import CACHE_STEP, encode_prompt, prefill, random_noise, sample_token, story_start
from stories.constraints import NAMES, read_constraints, template_tokens, write_constraints
from stories.rewards import can_choose, findings, reward, score

PATHS = {"/": ("GET", "HEAD"), "/tell": ("POST",)}
TEXTS = (*NAMES.values(), "prompt")
# The seed as large as JavaScript can count
NUMBERS = {"temperature": (0, 2), "top_p": (0.01, 1), "seed": (0, 2**53), "best_of": (1, 8)}
TOP_K = 50
LONGEST = 1024  # tokens of an instruction and its story
LARGEST = 16 << 10  # bytes of a request
WAITING = 32  # stories in the queue
CONNECTIONS = 64  # open at once
PATIENCE = 10  # seconds for a request to arrive, or for a piece of the story to be taken


class Refusal(Exception):
    """What a visitor cannot have: the status, a sentence in Chinese and in English, perhaps a header."""

    def __init__(self, status: int, zh: str, en: str, **headers):
        self.status, self.sentence, self.headers = status, {"zh": zh, "en": en}, headers


@dataclass(eq=False)
class Story:
    """A requested story. `tokens` receives its tokens as they are generated, each with whether it is the last."""

    prompt: list[int]
    beginning: list[int]  # the end of the prompt that is part of the story
    temperature: float
    top_p: float
    seed: int
    instruction: str
    stopped: bool = False  # its visitor has gone
    tokens: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)


class Sampler:
    """The model and the queue of stories. `work` runs in one thread; the other methods may be called from any."""

    def __init__(self, model, tokenizer, template: str | None, batch: int):
        self.model, self.tokenizer, self.template, self.batch = model, tokenizer, template, batch
        self.length = min(model.config.block_size, LONGEST)
        self.waiting, self.closed = list[Story](), False
        self.changed = threading.Condition()  # guards these two

    def add(self, stories: list[Story]) -> None:
        with self.changed:
            if len(self.waiting) + len(stories) > WAITING:
                full = "等着听故事的人太多了，请过一会儿再来。", "Too many are waiting; please come back later."
                raise Refusal(503, *full, retry_after=10)
            self.waiting += stories
            self.changed.notify()

    def ahead(self, story: Story) -> int:
        with self.changed:
            return self.waiting.index(story) if story in self.waiting else 0

    def drop(self, story: Story) -> None:
        with self.changed:
            story.stopped = True
            if story in self.waiting:
                self.waiting.remove(story)

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()

    @torch.inference_mode()
    def work(self) -> None:
        """Generate until closed, one token of each story at a time. Between two tokens stories join and leave."""
        end, weight = self.tokenizer.eos_id(), self.model.embedding.weight
        active, generators = list[Story](), []  # B stories and their generators
        last = torch.empty(0, dtype=torch.long, device=weight.device)  # (B,), the position of each story's last token
        logits = weight.new_empty(0, weight.size(0))  # (B, V)
        cache = self.model.new_cache(0, self.length, weight.dtype)
        while True:
            with self.changed:
                while not (active or self.waiting or self.closed):
                    self.changed.wait()
                if self.closed:
                    return
                free = self.batch - len(active)
                new, self.waiting = self.waiting[:free], self.waiting[free:]
            if new:
                more_logits, more_last, _, more_cache = prefill(
                    self.model, [story.prompt for story in new], self.length
                )
                logits, last = torch.cat((logits, more_logits)), torch.cat((last, more_last))  # (B, V), (B,)
                for layer, more in zip(cache, more_cache, strict=True):
                    layer[:] = map(torch.cat, zip(layer, more, strict=True))  # (B, K, S, D) each
                active += new
                generators += [torch.Generator(weight.device).manual_seed(story.seed) for story in new]
            drawn = [  # one by one: each story has its own settings and generator
                sample_token(  # (1,)
                    row[None], None, story.temperature, story.top_p, 1.0, random_noise(1, TOP_K, len(row), generator)
                )
                for row, story, generator in zip(logits, active, generators, strict=True)
            ]
            token, last, stay = torch.cat(drawn), last + 1, []  # (B,), (B,)
            for i, (story, t, place) in enumerate(zip(active, token.tolist(), last.tolist(), strict=True)):
                done = t == end or place == self.length - 1
                story.tokens.put((t, done))
                if not done and not story.stopped:
                    stay.append(i)
            if len(stay) < len(active):
                active, generators = [active[i] for i in stay], [generators[i] for i in stay]
                token, last, logits = token[stay], last[stay], logits[stay]  # (B,), (B,), (B, V)
                for layer in cache:
                    layer[:] = [kv[stay] for kv in layer]  # (B, K, S, D) each
            if active:
                # Attention pays for empty positions too, so leave them out; in the steps of sample.py, because with
                # another size sums round differently, and a seed could give another story.
                size = math.ceil((int(last.max()) + 1) / CACHE_STEP) * CACHE_STEP
                filled = [[kv[:, :, :size] for kv in layer] for layer in cache]  # (B, K, S, D) each
                logits = self.model(token[:, None], positions=last[:, None], cache=filled)[:, 0]  # (B, V)


def read_stories(body: bytes, sampler: Sampler) -> list[Story]:
    """The story that a request asks for, or those of which the best is to be chosen. Raises Refusal naming the key."""
    try:
        asked = json.loads(body.decode())
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise Refusal(400, "请求须是一个 JSON 对象。", "The request must be a JSON object.")
    usual: dict[str, Any] = dict.fromkeys(TEXTS, "")
    usual |= {"temperature": 0.8, "top_p": 0.95, "seed": random.randrange(1 << 31), "best_of": 1}
    asked = usual | asked
    for key, value in asked.items():
        least, most = NUMBERS.get(key, (0, 0))
        if key not in usual:
            raise Refusal(400, f"没有 {key[:40]!r} 这一项。", f"There is no key {key[:40]!r}.")
        if key in TEXTS and not isinstance(value, str):
            raise Refusal(400, f"{key} 须是文字。", f"{key} must be text.")
        kinds = (int,) if key in ("seed", "best_of") else (int, float)
        if key in NUMBERS and not (type(value) in kinds and least <= value <= most):
            raise Refusal(400, f"{key} 须在 {least} 与 {most} 之间。", f"{key} must lie between {least} and {most}.")
    instruction = write_constraints({name: asked[key] for name, key in NAMES.items()})
    if instruction.strip() and not sampler.template:
        raise Refusal(400, "这个模型只会续写：请给 prompt。", "This model only continues text: give a prompt.")
    try:
        prompt = encode_prompt(sampler.tokenizer, sampler.template or "", instruction, asked["prompt"])
    except UserError:
        raise Refusal(400, "文字里有半个字符。", "The text holds half a character.") from None
    if (n := len(prompt)) >= sampler.length:
        most = sampler.length - 1
        raise Refusal(400, f"太长了：{n} 个词元，最多 {most} 个。", f"Too long: {n} tokens, at most {most} fit.")
    n, beginning = asked["best_of"], prompt[story_start(sampler.tokenizer, prompt) :]
    if n > 1 and not can_choose(read_constraints(instruction)):
        by = "没有可以挑选的依据：请填词汇、随机句子，或选“对话”。"
        raise Refusal(400, by, "Nothing to choose by: give words, a sentence, or the feature 对话 (dialogue).")
    seeds = range(asked["seed"], asked["seed"] + n)
    return [Story(prompt, beginning, asked["temperature"], asked["top_p"], seed, instruction) for seed in seeds]


class Server(ThreadingHTTPServer):
    """A thread for each connection; the number of connections and the requests of an address are limited."""

    request_queue_size = CONNECTIONS

    def __init__(self, host: str, port: int, sampler: Sampler, per_minute: int):
        self.sampler, self.per_minute, self.lock = sampler, per_minute, threading.Lock()
        self.recent = collections.deque[tuple[float, str]](maxlen=10_000)  # times and addresses, of the last minute
        self.deadlines: dict[socket.socket, float] = {}  # of every connection: when its request must have arrived
        self.address_family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        super().__init__((str(address[0]), port), Visit)
        # Another site could point its name to this address (DNS rebinding): on loopback only these names are answered.
        loopback = ipaddress.ip_address(str(address[0])).is_loopback
        self.names = {"localhost", "127.0.0.1", "[::1]", host} if loopback else None
        page = Path(__file__).with_name("serve.html").read_text(encoding="utf-8")
        page = page.replace("{{tuned}}", "yes" if sampler.template else "no")
        page = page.replace("{{parameters}}", str(sampler.model.count_parameters()))
        self.policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        self.policy += "frame-ancestors 'none'"
        for tag in ("style", "script"):  # only what is in the page may run
            inside = page.partition(f"<{tag}>")[2].rpartition(f"</{tag}>")[0]
            digest = hashlib.sha256(inside.encode()).digest()
            self.policy += f"; {tag}-src 'sha256-{base64.b64encode(digest).decode()}'"
        self.page = page.encode()

    def count(self, address: str) -> None:
        """Record a request. Raises Refusal if the address has reached its limit for this minute."""
        with self.lock:
            now = time.monotonic()
            times = [then for then, who in self.recent if who == address and then > now - 60]
            if len(times) >= self.per_minute:
                wait = math.ceil(times[0] + 60 - now)
                sentences = f"问得太勤了，请等 {wait} 秒。", f"Too many requests; please wait {wait} seconds."
                raise Refusal(429, *sentences, retry_after=wait)
            self.recent.append((now, address))

    def verify_request(self, request, client_address) -> bool:
        if len(self.deadlines) < CONNECTIONS:
            self.deadlines[request] = time.monotonic() + PATIENCE
            return True
        with contextlib.suppress(OSError):
            request.send(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 10\r\n\r\n")
        return False

    def service_actions(self) -> None:
        """Called twice a second or more often: a byte now and then does not keep a connection open."""
        for request, deadline in list(self.deadlines.items()):
            if deadline < time.monotonic():
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RD)  # its thread reads the end

    def shutdown_request(self, request) -> None:
        self.deadlines.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a visitor who goes away is no error
            super().handle_error(request, client_address)


class Visit(BaseHTTPRequestHandler):
    """A connection. It is closed after one answer (HTTP/1.0), so that a story needs no framing."""

    server: Server
    timeout = PATIENCE  # of each read and write
    disable_nagle_algorithm = True  # a piece of the story does not wait for the next
    server_version, sys_version = "microstories", ""
    error_message_format, error_content_type = "%(code)d %(message)s\n", "text/plain; charset=utf-8"

    def do_GET(self) -> None:
        try:
            stories = self.answer()
        except Refusal as e:
            self.send(e.status, "application/json", json.dumps(e.sentence, ensure_ascii=False).encode(), **e.headers)
            # Closed while bytes are unread, the connection would be reset, and the answer lost on its way.
            self.connection.shutdown(socket.SHUT_WR)
            left = 1 << 20
            while left > 0 and (part := self.rfile.read1(1 << 16)):
                left -= len(part)
            return
        if stories:
            try:
                self.send_story(stories[0]) if len(stories) == 1 else self.send_best(stories)
            finally:
                for story in stories:
                    self.server.sampler.drop(story)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET

    def send(self, status: int, kind: str, body: bytes = b"", **headers) -> None:
        self.send_response(status)
        headers |= {"content_type": kind, "cache_control": "no-store", "x_content_type_options": "nosniff"}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self) -> list[Story]:
        """Send the page, or queue the stories asked for. Raises Refusal."""
        host = re.sub(r":\d*$", "", self.headers.get("Host", "")).lower()
        if self.server.names and host not in self.server.names:
            raise Refusal(403, "请用 localhost 打开。", "Open this page as localhost.")
        methods = PATHS.get(self.path.partition("?")[0])
        if not methods:
            raise Refusal(404, "没有这一页。", "There is no such page.")
        if self.command not in methods:
            raise Refusal(405, "这一页不能这样请求。", f"Only {' and '.join(methods)} here.", allow=", ".join(methods))
        if self.command != "POST":
            more = {"content_security_policy": self.server.policy, "referrer_policy": "no-referrer"}
            self.send(200, "text/html; charset=utf-8", self.server.page, **more)
            return []
        self.server.count(self.client_address[0])
        if self.headers.get_content_type() != "application/json":  # which no other site's page can send unasked
            raise Refusal(415, "Content-Type 须是 application/json。", "Content-Type must be application/json.")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]+", length):
            raise Refusal(411, "缺少 Content-Length。", "Content-Length is missing.")
        if len(length) > 9 or int(length) > LARGEST:
            raise Refusal(413, f"请求太大，最多 {LARGEST} 字节。", f"Too large: at most {LARGEST} bytes.")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refusal(408, "请求没有发完。", "The request did not arrive whole.")
        self.server.deadlines[self.connection] = math.inf
        stories = read_stories(body, self.server.sampler)
        self.server.sampler.add(stories)
        return stories

    def tokens_of(self, story: Story):
        """Yield a story's tokens as they are generated. Meanwhile its visitor hears how many are before it."""
        done = False
        while not done:
            try:
                token, done = story.tokens.get(timeout=1)
                yield token, done
            except queue.Empty:
                self.line(ahead=self.server.sampler.ahead(story))

    def send_story(self, story: Story) -> None:
        """Send the story as it is generated. Sending fails when the visitor has gone."""
        sampler, tokens, written = self.server.sampler, list(story.beginning), 0
        self.send(200, "application/x-ndjson")
        self.line(seed=story.seed)
        self.line(ahead=sampler.ahead(story))
        for token, done in self.tokens_of(story):
            ended = token == sampler.tokenizer.eos_id()
            tokens += [] if ended else [token]
            text = sampler.tokenizer.decode(tokens)
            text = text.rstrip("\ufffd") if done else text  # an incomplete character
            if text[written:] and not text.endswith("\ufffd"):
                self.line(text=text[written:])
                written = len(text)
        self.line(end="end" if ended else "full")

    def send_best(self, stories: list[Story]) -> None:
        """Wait for all stories, then send the best. Sending fails when the visitor has gone."""
        tokenizer, constraints = self.server.sampler.tokenizer, read_constraints(stories[0].instruction)
        self.send(200, "application/x-ndjson")
        self.line(seed=stories[0].seed)
        found = []
        for story in stories:
            tokens = [*story.beginning, *(token for token, _ in self.tokens_of(story))]
            ended = tokens[-1] == tokenizer.eos_id()
            text = tokenizer.decode(tokens[:-1] if ended else tokens).rstrip("\ufffd")
            found.append((reward(score(constraints, text) | {"finished": float(ended)}), text, ended, story.seed))
        _, text, ended, seed = max(found, key=lambda one: one[0])
        self.line(text=text)
        self.line(met=findings(constraints, text), seed=seed)
        self.line(end="end" if ended else "full")

    def line(self, **said) -> None:
        self.wfile.write(json.dumps(said, ensure_ascii=False).encode() + b"\n")


def main() -> None:
    parser = Parser(description="Generate stories on a web page.", allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint, or a run's folder for its newest")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0: for others, too")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--batch", type=int, default=8, help="stories in a batch; further ones wait")
    parser.add_argument("--per_minute", type=int, default=30, help="stories an address may ask for in a minute")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    types = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=types, help="of the weights; auto: the fastest")
    args = parser.parse_args()
    for key, least, most in (("port", 0, 65535), ("batch", 1, 256), ("per_minute", 1, 9999)):
        if not least <= getattr(args, key) <= most:
            raise UserError(f"--{key} {getattr(args, key)}: must lie between {least} and {most}")
    device = choose_device(args.device)
    checkpoint = read_checkpoint(args.ckpt)
    model = build_model(checkpoint, args.ckpt).to(device, choose_dtype(args.dtype, device)).eval()
    tokenizer = load_tokenizer(checkpoint["tokenizer"], f"{args.ckpt} (tokenizer)")
    if tokenizer.vocab_size() != model.config.vocab_size:
        raise UserError(f"{args.ckpt}: the tokenizer in it has not as many pieces as the model")
    if template := checkpoint.get("template"):
        template_tokens(template, tokenizer)  # raises UserError
    sampler = Sampler(model, tokenizer, template, args.batch)
    try:
        server = Server(args.host, args.port, sampler, args.per_minute)
    except OSError as e:
        raise UserError(f"--host {args.host} --port {args.port}: {e.strerror}; choose another") from None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with server, ThreadPoolExecutor(1) as pool:
        worker = pool.submit(sampler.work)
        worker.add_done_callback(lambda done: server.shutdown() if done.exception() else None)
        try:
            name = f"[{args.host}]" if ":" in args.host else args.host
            print(f"serving stories at http://{name}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            sampler.close()
    worker.result()  # raises what ended it, if anything did


if __name__ == "__main__":
    report_errors(main)
    # All is closed. On a busy machine a thread of PyTorch has been seen to abort the process while it is taken down.
    sys.stdout.flush()
    os._exit(0)
