"""A web page of stories, and the OpenAI API for other programs (docs/usage.md).

    python -m tools.serve --ckpt out/demo_sft
    python -m tools.serve --ckpt out/demo --host 0.0.0.0 --port 8080

One thread runs the model, all else an event loop. Stories join and leave the batch at any token.
Except for rounding, a seed gives the story of `sample.py --num 1`.
"""

import asyncio
import base64
import collections
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

import torch

from common.files import Parser, UserError, report_errors
from sample import (
    add_device_options,
    encode_prompt,
    open_model,
    prefill,
    random_noise,
    round_up,
    sample_token,
    story_start,
)
from stories.constraints import NAMES, read_constraints, write_constraints
from stories.rewards import can_choose, findings, reward, score

TOP_K = 50
LONGEST = 1024  # tokens of a prompt and its story
MOST = 8  # stories for a request
LARGEST = 16 << 10  # bytes of a request
WAITING = 32  # stories in the queue
CONNECTIONS = 64  # open at once
PATIENCE = 10  # seconds to send a request, or to take a piece of the answer
HUGE = 2**53  # as large as JavaScript can count
PATHS = {"/": "GET", "/v1/models": "GET", "/v1/completions": "POST", "/v1/chat/completions": "POST"}
# The most texts in a list; the limits of a number
TEXTS = {"prompt": 1, "words": 99, "features": 99, "summary": 1, "sentence": 1, "stop": 4, "model": 1, "user": 1}
NUMBERS = {"temperature": (0.0, 2.0), "top_p": (0.01, 1.0), "seed": (0, HUGE), "n": (1, MOST), "best_of": (1, MOST)}
NUMBERS |= {"max_tokens": (1, HUGE), "max_completion_tokens": (1, HUGE)}
NUMBERS |= {"stream": (False, True), "stream_options.include_usage": (False, True)}
# What clients send unasked, and what changes nothing
NEUTRAL = {"echo": False, "suffix": "", "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "tools": []}
to_json = json.JSONEncoder(ensure_ascii=False).encode


class Refusal(Exception):
    """What a visitor cannot have: the status, the reason, the key at fault, headers."""

    def __init__(self, status: int, message: str, param: str | None = None, **headers):
        kind = "invalid_request_error" if status < 429 else HTTPStatus(status).name.lower()
        self.error = {"message": message, "type": kind, "param": param, "code": None}
        self.status, self.headers = status, headers


def check(key: str, value):
    """The value of a key, if it is supported; of a text, a list. Raises Refusal."""
    fits, must = value == NEUTRAL.get(key), "is not supported here"
    if key in TEXTS:
        value = [value] if isinstance(value, str) else value
        fits = isinstance(value, list) and {*map(type, value)} <= {str} and len(value) <= TEXTS[key]
        must = f"must be a string, or a list of at most {TEXTS[key]}"
    if key in NUMBERS:
        least, most = NUMBERS[key]
        kinds = (int, float) if type(least) is float else (type(least),)
        fits = type(value) in kinds and least <= value <= most
        must = f"must be of type {kinds[-1].__name__}, from {least} to {most}"
    if not fits:
        raise Refusal(400, f"{key[:40]!r} {must}.", key[:40])
    return value


def read_message(messages) -> str:
    """The text of the only message of a chat. Raises Refusal."""
    with contextlib.suppress(TypeError, KeyError, ValueError):
        [message] = messages
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message["role"] == "user" and all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
    raise Refusal(400, "Give one text of the user: no earlier turns, no system prompt.", "messages")


class Request:
    """What is asked for. `choices` receives those of the answer. Raises Refusal."""

    def __init__(self, body: bytes, chat: bool, server: "Server"):
        try:
            asked = json.loads(body)
            to_json(asked).encode()  # fails for half a character
            options = asked.pop("stream_options", None) or {}
            asked |= {f"stream_options.{key}": value for key, value in options.items()}
        except (ValueError, RecursionError, AttributeError, TypeError):
            raise Refusal(400, "The body and stream_options must be JSON objects.") from None
        message = read_message(asked.pop("messages", None)) if chat else ""
        asked = {key: check(key, value) for key, value in asked.items() if value is not None}
        constraints = {name: "，".join(asked.get(key, [])) for name, key in NAMES.items()}
        instruction = f"{message}\n{write_constraints(constraints)}".strip()
        if (chat or instruction) and not server.template:
            raise Refusal(400, "This model only continues a prompt.")
        self.server = server
        texts = server.template, instruction, "".join(asked.get("prompt", []))
        self.prompt = encode_prompt(server.tokenizer, *texts)
        if len(self.prompt) >= server.length:
            raise Refusal(400, f"Too long: {server.length - 1} tokens fit.", "prompt")
        self.n, self.best_of = asked.get("n", 1), asked.get("best_of", 1)
        if self.n * self.best_of > MOST:
            raise Refusal(400, f"n x best_of must be at most {MOST}.", "n")
        self.constraints = read_constraints(instruction)
        if self.best_of > 1 and not can_choose(self.constraints):
            raise Refusal(400, "best_of chooses by words, a sentence, 对话.", "best_of")
        self.chat, self.stream = chat, asked.get("stream", False)
        self.include_usage = asked.get("stream_options.include_usage", False)
        self.temperature, self.top_p = asked.get("temperature", 0.8), asked.get("top_p", 0.95)
        self.stop = [text for text in asked.get("stop", []) if text]
        new = min(asked.get(key, HUGE) for key in ("max_tokens", "max_completion_tokens"))
        self.length = min(len(self.prompt) + new, server.length)  # with the prompt
        self.start = story_start(server.tokenizer, self.prompt)
        self.opening = server.tokenizer.decode(self.prompt[self.start :])
        seed, total = asked.get("seed", random.randrange(1 << 31)), self.n * self.best_of
        self.stories = [Story(self, i // self.best_of, seed + i) for i in range(total)]
        self.choices = asyncio.Queue[dict]()


class Story:
    """A story as far as it is generated: all tokens, the text after the prompt."""

    def __init__(self, request: Request, index: int, seed: int):
        self.request, self.index, self.seed = request, index, seed
        self.generator = torch.Generator(request.server.device).manual_seed(seed)
        self.tokens, self.text = [*request.prompt], ""
        self.finish_reason: str | None = None

    def add(self, token: int) -> None:
        """Add a token. What can be sent now becomes a choice, or a piece of one."""
        request, known = self.request, len(self.text)
        tokenizer = request.server.tokenizer
        self.tokens.append(token)
        if token == tokenizer.eos_id():
            self.finish_reason = "stop"
        elif len(self.tokens) == request.length:
            self.finish_reason = "length"
        # All is decoded anew, as in sample.py. Half a character is held back,
        text = tokenizer.decode(self.tokens[request.start :])
        text = text[len(request.opening) :].rstrip("\ufffd")
        if found := [text.index(stop) for stop in request.stop if stop in text]:
            text, self.finish_reason = text[: min(found)], "stop"
        elif not self.finish_reason:  # and what may begin a stop string
            rests = [text[i:] for i in range(known, len(text))]
            held = (rest for rest in rests if any(stop.startswith(rest) for stop in request.stop))
            text = text.removesuffix(next(held, ""))
        self.text = text
        rivals = [story for story in request.stories if story.index == self.index]
        if request.stream and request.best_of == 1:
            if text[known:] or self.finish_reason:
                request.choices.put_nowait(self.choice(text[known:]))
        elif all(story.finish_reason for story in rivals):
            best = max(rivals, key=Story.worth)
            request.choices.put_nowait(best.choice(best.text))

    def worth(self) -> float:
        scores = score(self.request.constraints, self.request.opening + self.text)
        return reward(scores | {"finished": float(self.finish_reason == "stop")})

    def choice(self, text: str) -> dict:
        """A choice in OpenAI's form; `seed` and `met` are additions."""
        request = self.request
        choice: dict = {"index": self.index, "seed": self.seed, "logprobs": None}
        choice["finish_reason"] = self.finish_reason
        if request.best_of > 1:
            choice["met"] = findings(request.constraints, request.opening + text)
        if not request.chat:
            return choice | {"text": text}
        role = {"role": "assistant"} if text == self.text else {}
        return choice | {"delta" if request.stream else "message": role | {"content": text}}


class Server:
    """The model, the waiting stories, the visitors."""

    def __init__(self, model, tokenizer, template: str, args):
        self.model, self.tokenizer, self.template, self.args = model, tokenizer, template, args
        self.length = min(model.config.block_size, LONGEST)
        self.device = model.embedding.weight.device
        self.waiting, self.arrived = list[Story](), asyncio.Event()
        self.connections, self.recent = 0, collections.Counter[str]()
        self.names, self.name = set[str](), args.ckpt.resolve().name
        page = Path(__file__).with_name("serve.html").read_text(encoding="utf-8")
        page = page.replace("{{tuned}}", "yes" if template else "no")
        page = page.replace("{{parameters}}", str(model.count_parameters()))
        self.policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'"
        self.policy += "; form-action 'none'; frame-ancestors 'none'"
        for tag in ("style", "script"):  # only what is in the page may run
            inside = page.partition(f"<{tag}>")[2].rpartition(f"</{tag}>")[0]
            digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
            self.policy += f"; {tag}-src 'sha256-{digest}'"
        self.page = page

    async def serve(self) -> None:
        host, port = self.args.host, self.args.port
        try:
            listener = await asyncio.start_server(self.visit, host, port)
        except OSError as e:
            raise UserError(f"--host {host} --port {port}: {e.strerror}; choose another") from None
        address, port, *_ = listener.sockets[0].getsockname()
        if address in ("127.0.0.1", "::1"):  # against DNS rebinding
            self.names = {"localhost", "127.0.0.1", "[::1]", host}
        name = f"[{host}]" if ":" in host else host
        print(f"serving stories at http://{name}:{port}/ (Ctrl-C ends it)", flush=True)
        await self.work()

    async def visit(self, reader, writer) -> None:
        """Answer one request, then close (HTTP/1.0)."""
        writer.transport.set_write_buffer_limits(0)  # drain() waits for all
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.TimeoutError, EOFError):  # gone
            try:
                await self.answer(reader, writer)
            except Refusal as e:
                await send(writer, to_json({"error": e.error}), e.status, **e.headers)
                # Closed with bytes unread, it would be reset, and the answer lost.
                writer.write_eof()
                if self.connections <= CONNECTIONS:
                    await asyncio.wait_for(reader.readexactly(1 << 20), PATIENCE)
            finally:
                self.connections -= 1
                writer.transport.abort()

    async def answer(self, reader, writer) -> None:
        """Raises Refusal, before anything is sent."""
        if self.connections > CONNECTIONS:
            raise Refusal(503, "Too many connections.", retry_after=10)
        address, *_ = writer.get_extra_info("peername") or ("",)
        try:
            path, body = await asyncio.wait_for(self.read(reader, address), PATIENCE)
        except (asyncio.TimeoutError, EOFError):
            raise Refusal(408, "The request did not arrive whole.") from None
        if path == "/":
            return await send(writer, self.page, 200, "text/html", content_security_policy=self.policy)
        if path == "/v1/models":
            model = {"id": self.name, "object": "model", "created": 0, "owned_by": ""}
            return await send(writer, to_json({"object": "list", "data": [model]}), 200)
        request = Request(body, "chat" in path, self)
        if len(self.waiting) + len(request.stories) > WAITING:
            raise Refusal(503, "Too many are waiting.", retry_after=10)
        self.waiting += request.stories
        self.arrived.set()
        try:
            await self.tell(request, reader, writer)
        finally:
            for story in request.stories:
                story.finish_reason = story.finish_reason or "dropped"

    async def read(self, reader, address: str) -> tuple[str, bytes]:
        """The path and the body of a request. Raises Refusal."""
        try:
            line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, target, _ = line.split(" ")
        except (asyncio.LimitOverrunError, ValueError):
            raise Refusal(400, "This is no HTTP request.") from None
        fields = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        path = target.partition("?")[0]
        if self.names and re.sub(r":\d*$", "", headers.get("host", "")).lower() not in self.names:
            raise Refusal(403, "Open this page as localhost.")
        if path not in PATHS:
            raise Refusal(404, "There is no such page.")
        if method != PATHS[path]:
            raise Refusal(405, f"Only {PATHS[path]} here.", allow=PATHS[path])
        if method == "GET":
            return path, b""
        if self.recent[address] >= self.args.per_minute:
            raise Refusal(429, "Too many requests: wait a minute.", retry_after=60)
        self.recent[address] += 1
        asyncio.get_running_loop().call_later(60, self.recent.subtract, [address])
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # no other site's page can send it unasked
            raise Refusal(415, "Content-Type must be application/json.")
        length = headers.get("content-length", "")
        if not re.fullmatch("[0-9]+", length):
            raise Refusal(411, "Content-Length is missing.")
        if len(length) > 9 or int(length) > LARGEST:
            raise Refusal(413, f"Too large: at most {LARGEST} bytes.")
        return path, await reader.readexactly(int(length))

    async def tell(self, request: Request, reader, writer) -> None:
        """Send the choices as they come, or all in the end."""
        kind = "chat.completion" + ".chunk" * request.stream if request.chat else "text_completion"
        head = {"id": f"cmpl-{os.urandom(12).hex()}", "object": kind}
        head |= {"created": int(time.time()), "model": self.name}
        if request.stream:
            await send(writer, "", 200, "text/event-stream; charset=utf-8")
        choices = list[dict]()
        while sum(bool(choice["finish_reason"]) for choice in choices) < request.n:
            try:
                choices.append(await asyncio.wait_for(request.choices.get(), 1))
                event = f"data: {to_json(head | {'choices': choices[-1:]})}\n\n"
            except asyncio.TimeoutError:  # programs ignore a comment
                ahead = [i for i, story in enumerate(self.waiting) if story in request.stories]
                event = f': {{"ahead": {min(ahead, default=0)}}}\n\n'
            if reader.at_eof():
                raise ConnectionAbortedError
            await send(writer, event if request.stream else "")
        old = len(request.prompt)
        new = sum(len(story.tokens) - old for story in request.stories)
        usage = {"prompt_tokens": old, "completion_tokens": new, "total_tokens": old + new}
        if not request.stream:
            choices.sort(key=lambda choice: choice["index"])
            return await send(writer, to_json(head | {"choices": choices, "usage": usage}), 200)
        if request.include_usage:
            last = to_json(head | {"choices": [], "usage": usage})
            await send(writer, f"data: {last}\n\n")
        await send(writer, "data: [DONE]\n\n")

    async def work(self) -> None:
        """Generate forever, a token of each story at a time."""
        loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(1)
        steps, active = self.steps(), list[Story]()
        next(steps)
        while True:
            await self.arrived.wait()
            waiting = [story for story in self.waiting if not story.finish_reason]
            new = waiting[: self.args.batch - len(active)]
            self.waiting = waiting[len(new) :]
            for story, token in await loop.run_in_executor(pool, steps.send, new):
                if not story.finish_reason:
                    story.add(token)
            active = [story for story in active + new if not story.finish_reason]
            if not active and not self.waiting:
                self.arrived.clear()

    @torch.inference_mode()
    def steps(self):
        """Receive the stories that join; yield every story with its next token."""
        active = list[Story]()
        cache = self.model.new_cache(0, self.length, self.model.embedding.weight.dtype)
        new = yield []
        while True:
            stay = [i for i, story in enumerate(active) if not story.finish_reason]
            if len(stay) < len(active):
                active = [active[i] for i in stay]
                for layer in cache:
                    layer[:] = [kv[stay] for kv in layer]  # (B, K, S, D) each
            logits = []
            if active:
                rows = [(story.tokens[-1], len(story.tokens) - 1) for story in active]
                tokens, positions = torch.tensor(rows, device=self.device).split(1, dim=1)  # (B, 1)
                # Attention pays for empty positions; in sample.py's steps, as sums round by size
                size = round_up(max(len(story.tokens) for story in active))
                filled = [[kv[:, :, :size] for kv in layer] for layer in cache]
                logits += self.model(tokens, positions=positions, cache=filled)  # (1, V) each
            if new:
                joined = prefill(self.model, [story.tokens for story in new], self.length)
                logits += joined[0][:, None]  # (1, V) each
                for layer, more in zip(cache, joined[3], strict=True):
                    layer[:] = map(torch.cat, zip(layer, more, strict=True))
                active += new
            drawn = [torch.empty(0, dtype=torch.long, device=self.device)]
            for row, story in zip(logits, active, strict=True):
                noise = random_noise(1, TOP_K, row.size(1), story.generator)
                options = story.request.temperature, story.request.top_p, 1.0
                drawn.append(sample_token(row, None, *options, noise))  # (1,)
            new = yield list(zip(active, torch.cat(drawn).tolist(), strict=True))


async def send(writer, text, status=0, kind="application/json", **headers) -> None:
    """Send a part of an answer; the first part has a status."""
    if status:
        headers |= {"content_type": kind, "cache_control": "no-store", "x_content_type_options": "nosniff"}
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        first = f"HTTP/1.0 {status} {HTTPStatus(status).phrase}"
        text = "\r\n".join((first, *lines, "", text))
    writer.write(text.encode())
    await asyncio.wait_for(writer.drain(), PATIENCE)


def main() -> None:
    parser = Parser(description="Serve stories.", allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint, or a run's folder for its newest")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for others in your network")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--batch", type=int, default=8, help="stories at a time")
    parser.add_argument("--per_minute", type=int, default=30, help="requests of an address")
    add_device_options(parser)
    args = parser.parse_args()
    for key, least, most in (("port", 0, 65535), ("batch", 1, 256), ("per_minute", 1, 9999)):
        if not least <= getattr(args, key) <= most:
            raise UserError(f"--{key} {getattr(args, key)}: must lie between {least} and {most}")
    server = Server(*open_model(args.ckpt, args), args)
    for number in (signal.SIGINT, signal.SIGTERM):  # a slow end may abort in PyTorch
        signal.signal(number, lambda *_: os._exit(0))
    asyncio.run(server.serve())


if __name__ == "__main__":
    report_errors(main)
