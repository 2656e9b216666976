"""A web page of stories, and the OpenAI API for other programs (docs/usage.md). Needs fastapi and uvicorn.

    python -m tools.serve --ckpt out/demo_sft
    python -m tools.serve --ckpt out/demo --host 0.0.0.0 --port 8080

One thread runs the model (serving/scheduler.py). Another one speaks HTTP; what can be asked for is declared
in serving/requests.py. Except for rounding, a seed gives the story of `sample.py --num 1`.
"""

import asyncio
import ipaddress
import json
import math
import os
import random
import re
import secrets
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.files import Parser, UserError, report_errors
from common.sampling import add_device_options, open_model
from stories.constraints import encode_prompt, read_constraints
from stories.rewards import can_choose, findings, reward, score
from tools.serving.scheduler import Scheduler, Story

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
    from pydantic import ValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from tools.serving.requests import ChatRequest, Refusal, StoryRequest, refusal_of
except ImportError as e:
    print(f"error: {e}; the server needs two more packages: pip install -U fastapi uvicorn", file=sys.stderr)
    sys.exit(2)

MAX_BODY = 16384  # bytes of a request
QUEUE = 32  # stories that wait; and the most of a request
CONNECTIONS = 256  # open at once; browsers hold some that they do not use
KEEP_ALIVE = 30  # seconds; longer than clients keep a connection, or they send into one that is being closed
POLL = 0.02  # seconds between two looks at what is new of a story
READ = ["GET", "HEAD"]
# The browser runs only what is marked with the nonce of this answer, and speaks to this server alone.
POLICY = (
    "default-src 'none'; script-src 'nonce-NONCE'; style-src 'nonce-NONCE'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def serve(args) -> None:
    """Serve the stories of a checkpoint until a signal ends the process. Raises UserError."""
    model, tokenizer, checkpoint = open_model(args.ckpt, args.device, args.dtype)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        listener = socket.create_server((args.host, args.port), family=family)
    except (OSError, OverflowError, UnicodeError) as e:
        raise UserError(f"--host {args.host} --port {args.port}: {e}; choose another") from None
    address, port = listener.getsockname()[:2]
    hosts = []  # any
    if ipaddress.ip_address(address).is_loopback:
        hosts = ["localhost", "127.0.0.1", "[::1]", args.host]
    scheduler = Scheduler(model, args.batch)
    config = uvicorn.Config(
        make_app(scheduler, tokenizer, checkpoint.get("template", ""), hosts, args),
        http="h11",
        ws="none",
        log_level="error",
        server_header=False,
        proxy_headers=False,  # in which a visitor can name any address
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE,
        headers=[("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")],
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # at once: a slow end may abort in PyTorch
        signal.signal(number, lambda *_: os._exit(0))
    threading.Thread(target=uvicorn.Server(config).run, args=([listener],), daemon=True).start()
    name = f"[{args.host}]" if ":" in args.host else args.host
    print(f"serving stories at http://{name}:{port}/ (Ctrl-C ends it)", flush=True)
    # Not in the main thread: there OpenMP's threads spin while they wait for each other, and on a busy
    # machine a step takes up to 20 times as long. An error of the model is raised here.
    ThreadPoolExecutor(1).submit(scheduler.run).result()


def make_app(scheduler: Scheduler, tokenizer, template: str, hosts: list[str], args) -> FastAPI:
    """What can be asked for by HTTP, and by whom."""
    model = {"id": args.ckpt.resolve().name, "object": "model", "created": 0, "owned_by": ""}
    restored: dict[str, float] = {}  # for each address: when it may send all requests of a minute again

    async def check_host(http: Request) -> None:
        """Refuse the page of another site whose name was made to lead here (DNS rebinding)."""
        host = re.sub(r":\d*$", "", http.headers.get("host", ""))
        if hosts and host.lower() not in hosts:
            raise Refusal(403, "Open this as localhost; for other names start it with --host 0.0.0.0.")

    def count_request(address: str) -> None:
        """Refuse more requests than --per_minute. After silence, all of a minute may come at once."""
        now = time.monotonic()
        then = max(now, restored.get(address, now)) + 60 / args.per_minute
        wait = math.ceil(then - now - 60)
        if wait > 0:
            raise Refusal(429, f"Too many requests: wait {wait} s.", headers={"Retry-After": str(wait)})
        restored[address] = then

    # No openapi_url: the pages that show it load scripts from another site.
    app = FastAPI(
        openapi_url=None,
        dependencies=[Depends(check_host)],
        exception_handlers={HTTPException: send_error, ValidationError: send_validation_error},
    )
    if args.allow_origin:
        cors = {"allow_origins": args.allow_origin, "allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, **cors)

    @app.post("/v1/completions")
    async def complete(http: Request):
        return await answer(http, StoryRequest)

    @app.post("/v1/chat/completions")
    async def chat(http: Request):
        return await answer(http, ChatRequest)

    async def answer(http: Request, kind: type[StoryRequest]):
        count_request(http.scope["client"][0])
        asked = kind.model_validate_json(await read_body(http))
        instruction = read_instruction(asked, template)
        prompts = [encode_prompt(tokenizer, template, instruction, beginning) for beginning in asked.prompt]
        if max(map(len, prompts)) >= scheduler.max_length:
            raise Refusal(400, f"Too long: {scheduler.max_length - 1} tokens fit.", "prompt")
        choices = make_choices(asked, instruction, prompts, tokenizer)
        if len(choices) * asked.best_of > QUEUE:
            raise Refusal(400, f"At most {QUEUE} stories: prompts x n x best_of.", "n")
        if len(choices) * asked.best_of + len(scheduler.waiting) > QUEUE:
            raise Refusal(503, "Too many stories are waiting.", headers={"Retry-After": "5"})
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model["id"]}
        head["object"] = "text_completion"
        if kind is ChatRequest:
            head["object"] = "chat.completion.chunk" if asked.stream else "chat.completion"
        if asked.stream:
            events = stream(asked, head, choices, scheduler, http)
            return StreamingResponse(events, media_type="text/event-stream")
        parts = [part async for part in generate(asked, choices, scheduler, http) if part]
        parts.sort(key=lambda part: part["index"])
        return head | {"choices": parts, "usage": usage(asked, choices)}

    @app.api_route("/v1/models", methods=READ)
    @app.api_route("/v1/models/", methods=READ)
    async def models():
        return {"object": "list", "data": [model]}

    @app.api_route("/v1/models/{name}", methods=READ)
    async def model_of_name(name: str):
        if name != model["id"]:
            raise Refusal(404, f"There is only the model {model['id']}.", "model")
        return model

    @app.api_route("/health", methods=READ)
    async def health():
        return {"status": "ok"}

    @app.api_route("/", methods=READ)
    async def page():
        nonce = secrets.token_urlsafe()
        text = Path(__file__).with_name("serve.html").read_text(encoding="utf-8")
        text = text.replace("{{nonce}}", nonce).replace("{{tuned}}", "yes" if template else "no")
        text = text.replace("{{parameters}}", str(scheduler.model.count_parameters()))
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY.replace("NONCE", nonce)})

    return app


async def read_body(http: Request) -> str:
    """The text of a request. Raises Refusal."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # The page of another site cannot send this type without a preflight.
        raise Refusal(415, "Content-Type must be application/json.")
    body = b""
    try:
        async for chunk in http.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise Refusal(413, f"Too large: at most {MAX_BODY} bytes.")
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise Refusal(400, f"The body is not UTF-8: see byte {e.start}.") from None
    except ClientDisconnect:
        raise Refusal(400, "The request did not arrive whole.") from None


def read_instruction(asked: StoryRequest, template: str) -> str:
    """The instruction, or "" if there is none. Raises Refusal if it does not fit the model."""
    instruction = asked.instruction()
    if not template and (instruction or isinstance(asked, ChatRequest)):
        raise Refusal(400, "This model only continues a prompt: it has not learned to follow instructions.")
    if template and not instruction and not any(asked.prompt):
        message = "Ask for something: words, features, a summary, a sentence, or give a prompt."
        raise Refusal(400, message, "words")
    if asked.best_of > 1 and not can_choose(read_constraints(instruction)):
        raise Refusal(400, "best_of chooses by words, a sentence, 对话: ask for one of these.", "best_of")
    return instruction


async def send_error(http: Request, error: HTTPException):
    """An error in OpenAI's form."""
    kind = "invalid_request_error"
    if error.status_code >= 429:
        kind = "rate_limit_error" if error.status_code == 429 else "server_error"
    message = error.detail
    if not isinstance(error, Refusal):  # FastAPI's own, as there is no such page
        message = f"{http.method} {http.url.path}: {message}."
    content = {"message": message, "type": kind, "param": getattr(error, "param", None), "code": None}
    return JSONResponse({"error": content}, error.status_code, error.headers)


async def send_validation_error(http: Request, error: ValidationError):
    return await send_error(http, refusal_of(error))


# ---- Answers, in OpenAI's form ---------------------------------------------------------------------


class Choice:
    """One of the answers to a request: the best of several stories, or the only one."""

    def __init__(self, index: int, stories: list[Story], constraints: dict[str, str] | None):
        self.index = index
        self.stories = stories
        self.constraints = constraints
        self.sent = 0  # characters

    def ended(self) -> bool:
        return all(story.finish_reason for story in self.stories)

    def best(self) -> Story:
        if len(self.stories) == 1:
            return self.stories[0]
        return max(self.stories, key=self.reward)

    def reward(self, story: Story) -> float:
        scores = score(self.constraints, story.beginning + story.text)
        scores["finished"] = float(story.finish_reason == "stop")
        return reward(scores)

    def new_text(self) -> str:
        """The text that has not been sent."""
        new = self.best().text[self.sent :]
        self.sent += len(new)
        return new


def make_choices(asked: StoryRequest, instruction: str, prompts: list[list[int]], tokenizer) -> list[Choice]:
    """n choices for each prompt, of best_of stories each; every story has the next seed."""
    seed = random.randrange(2**31) if asked.seed is None else asked.seed
    max_new_tokens = min(asked.max_tokens, asked.max_completion_tokens)
    options = (asked.temperature, asked.top_p, asked.stop, max_new_tokens)
    choices: list[Choice] = []
    for prompt in prompts:
        for _ in range(asked.n):
            stories = [Story(tokenizer, prompt, seed + i, *options) for i in range(asked.best_of)]
            choices.append(Choice(len(choices), stories, read_constraints(instruction)))
            seed += asked.best_of
    return choices


async def generate(asked: StoryRequest, choices: list[Choice], scheduler: Scheduler, http: Request):
    """Have the stories generated by the other thread, and look again and again at what is new.

    Yields choices as they end, in a stream their pieces, and None after each look. Ends when all have ended,
    or when the visitor has left.
    """
    stories = [story for choice in choices for story in choice.stories]
    scheduler.submit(stories)
    unfinished = list(choices)
    try:
        while unfinished and not await http.is_disconnected():
            for choice in list(unfinished):
                ended = choice.ended()  # asked before the text is read: then that is complete
                if not ended and (asked.best_of > 1 or not asked.stream):
                    continue
                text = choice.new_text()
                if text and asked.stream:
                    yield part_of(asked, choice, text, None)
                    text = ""
                if ended:
                    unfinished.remove(choice)
                    yield part_of(asked, choice, text, choice.best().finish_reason)
            yield None
            await asyncio.sleep(POLL)
    finally:
        scheduler.cancel(stories)


def part_of(asked: StoryRequest, choice: Choice, text: str, finish_reason: str | None) -> dict:
    """A choice, or a piece of one. `seed` and `met` are additions to OpenAI's form."""
    story = choice.best()
    part: dict = {"index": choice.index, "logprobs": None, "finish_reason": finish_reason}
    part["seed"] = story.seed
    if asked.best_of > 1:
        part["met"] = findings(choice.constraints, story.beginning + story.text)
    message = {"content": text}
    if choice.sent == len(text):  # the first piece
        message["role"] = "assistant"
    if not isinstance(asked, ChatRequest):
        part["text"] = text
    elif asked.stream:
        part["delta"] = message
    else:
        part["message"] = message
    return part


async def stream(asked: StoryRequest, head: dict, choices: list[Choice], scheduler: Scheduler, http: Request):
    """An answer as server-sent events. Comments, which programs ignore, say how many stories are ahead."""
    first = choices[0].stories[0]
    ahead = None
    async for part in generate(asked, choices, scheduler, http):
        if part:
            yield event(head | {"choices": [part]})
        elif scheduler.ahead_of(first) not in (None, ahead):
            ahead = scheduler.ahead_of(first)
            yield f': {{"ahead": {ahead}}}\n\n'
    if asked.stream_options.include_usage:
        yield event(head | {"choices": [], "usage": usage(asked, choices)})
    yield "data: [DONE]\n\n"


def event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def usage(asked: StoryRequest, choices: list[Choice]) -> dict:
    """The tokens of all prompts and stories."""
    prompts = sum(len(choice.stories[0].prompt) for choice in choices[:: asked.n])
    stories = 0
    for choice in choices:
        stories += sum(len(story.tokens) - len(story.prompt) for story in choice.stories)
    return {"prompt_tokens": prompts, "completion_tokens": stories, "total_tokens": prompts + stories}


# ---- The command -----------------------------------------------------------------------------------


def main() -> None:
    parser = Parser(description="Serve stories.", allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint, or the folder of a run")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for others in your network")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--batch", type=int, default=8, help="stories at a time")
    parser.add_argument("--per_minute", type=int, default=60, help="requests of an address")
    parser.add_argument("--allow_origin", action="append", help="a site whose pages may use it; *: any")
    add_device_options(parser)
    args = parser.parse_args()
    for key, least, most in (("batch", 1, 256), ("per_minute", 1, 9999)):
        if not least <= getattr(args, key) <= most:
            raise UserError(f"--{key} {getattr(args, key)}: must lie between {least} and {most}")
    for origin in args.allow_origin or []:
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/]+", origin):
            raise UserError(f"--allow_origin {origin}: must be like http://localhost:3000, without a path")
    serve(args)


if __name__ == "__main__":
    report_errors(main)
