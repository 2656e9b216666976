"""python -m tools.serve: the stories of sample.py for a browser, and for programs that speak the OpenAI API.

What it promises:
- a seed gives the story of `sample.py --num 1`, alone or in company, whole or as a stream;
- the stories of all visitors are one batch; whoever leaves makes room at once;
- n, best_of, stop, max_tokens and chats are as OpenAI describes them;
- what is not supported is refused by its name, in OpenAI's form, before any work is done;
- no visitor can read a file, use more than his share, or stop the server;
- pages of other sites may use it only where --allow_origin says so;
- the page shows what it is told as text, and asks nobody but its own server.

Order: a server and its visitors; stories; answers; many visitors; refusals; HTTP; the command; the page.
"""

import contextlib
import copy
import http.client
import importlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace
from urllib.request import Request, urlopen

import pytest
import torch
from helpers import assert_refused, start_script

import sample
from common.checkpoint import read_checkpoint
from common.sampling import open_model
from model import GPT, ModelConfig
from stories.constraints import encode_prompt, story_start
from stories.generate import FEATURES
from tools.serving.scheduler import Scheduler, Story

for package in ("openai", "fastapi", "uvicorn"):
    if not find_spec(package):
        pytest.skip(f"pip install {package}", allow_module_level=True)

JSON = {"Content-Type": "application/json"}
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
END = 2  # the token of the end of a story

# ---- A server, and its visitors --------------------------------------------------------------------


@contextlib.contextmanager
def serving(ckpt, *args, end=signal.SIGINT):
    """A server process, which must have nothing to complain of, and end well when told to."""
    import openai

    options = ["--ckpt", ckpt, "--port", 0, "--device", "cpu", "--dtype", "float32"]
    with start_script("-m", "tools.serve", *options, *args) as process:
        try:
            said = process.stdout.readline()
            found = re.fullmatch(r"serving stories at http://[\d.]+:(\d+)/ \(Ctrl-C ends it\)\n", said)
            assert found, process.communicate()
            url = f"http://127.0.0.1:{found[1]}/v1"
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30)
            yield SimpleNamespace(port=int(found[1]), client=client)
            process.send_signal(end)
            _, errors = process.communicate(timeout=10)
            assert process.returncode == 0 and errors == ""
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tuned):
    """A server of a model that follows instructions; it reads up to 256 tokens."""
    with serving(tuned, "--per_minute", 9999) as server:
        yield server


@pytest.fixture(scope="module")
def slow_server(pretrained, tmp_path_factory):
    """A model that only continues, two stories at once: they never end, but with 1,024 tokens, after seconds.

    It is told to end in the middle of one.
    """
    checkpoint = read_checkpoint(pretrained)
    checkpoint["model_config"] |= {"n_layer": 60, "block_size": 1024}
    torch.manual_seed(1)
    model = GPT(ModelConfig(**checkpoint["model_config"]))
    model.embedding.weight.data[END] = 0  # its logit is 0: others are likelier
    checkpoint["model"] = model.state_dict()
    path = tmp_path_factory.mktemp("slow") / "ckpt_000001.pt"
    torch.save(checkpoint, path)
    with serving(path, "--per_minute", 9999, "--batch", 2, end=signal.SIGTERM) as server:
        yield server
        assert Visitor(server).choice()


@pytest.fixture(scope="module")
def opened(tuned):
    """The model, tokenizer and template that `server` has."""
    model, tokenizer, checkpoint = open_model(tuned, "cpu", "float32")
    return model, tokenizer, checkpoint["template"]


@pytest.fixture
def tokenizer(opened):
    return opened[1]


def complete(server, stream=False, **asked):
    """The answer to OpenAI's client; extra_body takes every key, also those that are not OpenAI's."""
    return server.client.completions.create(model="any", prompt="", stream=stream, extra_body=asked)


def story_of(server, **asked):
    (choice,) = complete(server, **asked).choices
    return choice.text


def joined(chunks):
    """The text of each choice of a stream, and its last piece."""
    texts = {}
    ends = {}
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in ends
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                ends[choice.index] = choice
    return texts, ends


def request(server, method="POST", path=COMPLETIONS, body=None, headers=JSON):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.body = answer.read()
        return answer


class Visitor:
    """Somebody who reads a story as it is told, and may leave at any time."""

    def __init__(self, server, **asked):
        asked = {"prompt": "从前", "stream": True} | asked
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        self.connection.request("POST", COMPLETIONS, json.dumps(asked), JSON)
        if asked["stream"]:
            self.answer = self.connection.getresponse()

    def next_line(self, start):
        for line in self.answer:
            if line.startswith(start):
                return json.loads(line.removeprefix(start))

    def choice(self):
        """The next piece of a story, and whose it is."""
        return self.next_line(b"data: ")["choices"][0]

    def ahead(self):
        """How many wait before this one, by the next comment."""
        return self.next_line(b": ")["ahead"]

    def leave(self):
        self.connection.close()


# ---- Stories ---------------------------------------------------------------------------------------


def sampled(opened, instruction, beginning="", **options):
    """What sample.py has for an instruction, behind the beginning, and whether it reaches its end."""
    model, tokenizer, template = opened
    prompt = encode_prompt(tokenizer, template, instruction, beginning)
    opening = tokenizer.decode(prompt[story_start(tokenizer, prompt) :])
    ((story, finished),) = sample.sample_stories(model, tokenizer, [prompt], max_new_tokens=1024, **options)
    return story.removeprefix(opening), finished


SEEDS = [
    ({"words": "铲子, 草地"}, {"seed": 0, "temperature": 0}, "词汇：铲子，草地"),
    (
        {"features": ["对话", "转折"], "words": ["帽子", "消防员"]},
        {"seed": 8, "temperature": 0.5},
        "词汇：帽子，消防员\n特点：对话，转折",
    ),
    (
        {"summary": "小猴拿着铜盆\n去捞月亮。", "sentence": "它笑了。"},
        {"seed": 2**53, "temperature": 1.3, "top_p": 0.8},
        "摘要：小猴拿着铜盆 去捞月亮。\n随机句子：它笑了。",
    ),
    ({"prompt": " 从前\r\n有🐰 "}, {"seed": 2**63 - 1}, ""),
]


@pytest.mark.parametrize("asked, options, instruction", SEEDS)
def test_a_seed_gives_the_story_of_sample_py(asked, options, instruction, opened, server):
    """Also as a stream, in pieces."""
    story, finished = sampled(opened, instruction, asked.get("prompt", ""), **options)
    (choice,) = complete(server, **asked, **options).choices
    assert choice.text == story and choice.seed == options["seed"]
    assert (choice.finish_reason == "stop") == finished
    texts, ends = joined(complete(server, stream=True, **asked, **options))
    assert texts == {0: story} and ends[0].finish_reason == choice.finish_reason


TEXT = "小猫看见了一只小鸟。它笑了，小鸟也笑了。"


class Idle(Exception):
    pass


class UntilIdle(Scheduler):
    """A scheduler that ends when there is nothing to do; it notes how many stories each step has."""

    def __init__(self, model, batch_size):
        super().__init__(model, batch_size)
        self.sizes = []

    def next_stories(self, active):
        if not active and not self.waiting:
            raise Idle
        joining = super().next_stories(active)
        self.sizes.append(len(active) + len(joining))
        return joining


def test_a_story_in_company_is_the_one_told_alone(opened):
    """Three places for seven stories: each joins as soon as another one has ended.

    In float64: a larger batch rounds its sums in another order.
    """
    model, tokenizer, _ = opened
    model = copy.deepcopy(model).double()
    stories = []
    expected = []
    for seed in range(7):
        prompt = [END, *tokenizer.encode(TEXT[:seed])]
        limit = 1 + 40 * seed
        stories.append(Story(tokenizer, prompt, seed, max_new_tokens=limit))
        expected += sample.sample_stories(model, tokenizer, [prompt], max_new_tokens=limit, seed=seed)
    scheduler = UntilIdle(model, 3)
    scheduler.submit(stories)
    with pytest.raises(Idle):
        scheduler.run()
    for story, (text, finished) in zip(stories, expected, strict=True):
        assert story.beginning + story.text == text
        assert (story.finish_reason == "stop") == finished
    assert scheduler.sizes[0] == 3 and scheduler.sizes == sorted(scheduler.sizes, reverse=True)


def told(tokenizer, text, **options):
    """A story that gets the tokens of a text, and what it says after each of them."""
    story = Story(tokenizer, [END], seed=0, **options)
    texts = []
    for token in [*tokenizer.encode(text), END]:
        if not story.finish_reason:
            story.add(token)
            texts.append(story.text)
    return story, texts


STOPS = [
    (["小鸟"], "小猫看见了一只"),
    (["它笑", "一只小"], "小猫看见了"),
    (["小"], ""),
    (["鸟。它", "㍿"], "小猫看见了一只小"),
    (["小鸟们", "。。"], TEXT),
    (["", "㍿"], TEXT),
]


@pytest.mark.parametrize("stop, expected", STOPS)
def test_a_story_ends_before_a_stop_string(stop, expected, tokenizer):
    """Which may lie across tokens. What may be its beginning is held back, and told when it is none."""
    story, texts = told(tokenizer, TEXT, stop=stop)
    _, all_texts = told(tokenizer, TEXT)
    assert story.text == expected and story.finish_reason == "stop"
    assert (len(texts) < len(all_texts)) == (expected != TEXT)
    for text, whole in zip(texts, all_texts, strict=False):
        assert expected.startswith(text)
        assert len(text) >= min(len(expected), len(whole) - max(map(len, stop)) + 1)


def test_a_piece_never_ends_inside_a_character(tokenizer):
    """🐰 has four tokens, one for each byte."""
    _, texts = told(tokenizer, "a🐰🐰")
    assert texts == ["a"] * 4 + ["a🐰"] * 4 + ["a🐰🐰"] * 2
    story, _ = told(tokenizer, "a🐰🐰", max_new_tokens=8)
    assert (story.text, story.finish_reason) == ("a🐰", "length")


# ---- Answers ---------------------------------------------------------------------------------------


def test_each_choice_of_each_prompt_has_the_next_seed(tokenizer, server):
    """They are numbered through."""
    prompts = ["从前", "小猫", "小狗"]
    asked = {"prompt": prompts, "n": 2, "seed": 5, "max_tokens": 4}
    answer = complete(server, **asked)
    assert (answer.object, answer.model) == ("text_completion", "out")
    *chunks, last = complete(server, stream=True, stream_options={"include_usage": True}, **asked)
    texts, ends = joined(chunks)
    for i, choice in enumerate(answer.choices):
        assert (choice.index, choice.seed, ends[i].seed) == (i, 5 + i, 5 + i)
        alone = story_of(server, prompt=prompts[i // 2], seed=5 + i, max_tokens=4)
        assert choice.text == texts[i] == alone
    prompt_tokens = 3 + sum(map(len, tokenizer.encode(prompts)))
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.total_tokens == prompt_tokens + answer.usage.completion_tokens == prompt_tokens + 24
    assert last.usage == answer.usage and not last.choices


def test_choices_come_in_order_whichever_ends_first(server):
    choices = complete(server, words="铲子", n=8, seed=1).choices
    assert [choice.index for choice in choices] == list(range(8))


def test_a_stream_ends_as_clients_expect(server):
    answer = request(server, body=b'{"words": "x", "max_tokens": 1, "stream": true}')
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")


def test_without_a_seed_each_story_is_another(server):
    first, second = (complete(server, words="森林").choices[0] for _ in range(2))
    assert first.seed != second.seed and first.text != second.text


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 + 5, 10**30])
def test_any_integer_is_a_seed(seed, server):
    (choice,) = complete(server, words="铲子", seed=seed, max_tokens=9).choices
    assert choice.seed == seed
    assert choice.text == story_of(server, words="铲子", seed=seed, max_tokens=9)


@pytest.mark.parametrize("one, other", [(5, 9), (2**53, 5)])
def test_the_smaller_of_two_limits_holds(one, other, server):
    answer = complete(server, words="铲子", seed=7, max_tokens=one, max_completion_tokens=other)
    assert answer.usage.completion_tokens == 5 and answer.choices[0].finish_reason == "length"


def test_stop_strings_of_a_request(server):
    asked = {"words": "铲子", "seed": 7}
    story = story_of(server, **asked)
    stop = story[9:12]
    texts, ends = joined(complete(server, stream=True, stop=stop, **asked))
    assert texts[0] == story_of(server, stop=[stop, "㍿"], **asked) == story.split(stop)[0]
    assert ends[0].finish_reason == "stop"


def test_the_best_has_most_of_what_was_asked_for_and_ends(tokenizer):
    """Of two times three stories, written here. Those with 。 at the end have an end."""
    import tools.serve
    from tools.serving.requests import StoryRequest

    asked = StoryRequest(words=["森林", "小鸟"], features="对话", best_of=3, n=2, seed=40)
    prompt = [END, *tokenizer.encode("从前，森林里")]
    first, second = tools.serve.make_choices(asked, asked.instruction(), [prompt], tokenizer)
    texts = [
        "森林说：“你好”。",
        "有一只小鸟说：“你好”。",
        "小鸟。",
        "下雨了。",
        "小猫说：“你好",
        "小猫说：“你好。",
    ]
    for story, text in zip(first.stories + second.stories, texts, strict=True):
        for token in tokenizer.encode(text):
            story.add(token)
        if text.endswith("。"):
            story.add(END)
    assert first.ended() and not second.ended()
    parts = [tools.serve.part_of(asked, choice, choice.new_text(), None) for choice in (first, second)]
    assert [part["seed"] for part in parts] == [41, 45]
    assert [part["text"] for part in parts] == [texts[1], texts[5]]
    assert parts[0]["met"] == {"missing": [], "dialogue": True}
    assert parts[1]["met"] == {"missing": ["小鸟"], "dialogue": True}


def test_the_best_of_several_by_http(server):
    """Nothing is told before the best is known."""
    asked = {"words": "森林，小鸟", "seed": 5, "best_of": 4, "n": 2}
    first, second = complete(server, **asked).choices
    assert 5 <= first.seed < 9 <= second.seed < 13
    chunks = list(complete(server, stream=True, **asked))
    texts, ends = joined(chunks)
    assert (texts[1], ends[1].met) == (second.text, second.met)
    assert len(chunks) == 4  # of each choice the text and the end


PARTS = [{"type": "text", "text": "词汇：铲子"}, {"type": "text", "text": "\n特点：对话"}]
CHATS = [
    ([{"role": "user", "content": "词汇：铲子\n特点：对话"}], {}),
    ([{"role": "user", "content": PARTS, "name": "someone"}], {}),
    ([{"role": "system", "content": None}, {"role": "user", "content": "词汇：铲子"}], {"features": "对话"}),
]


@pytest.mark.parametrize("messages, more", CHATS)
def test_a_chat_has_one_message_the_instruction(messages, more, server):
    """As text or in parts; the other keys are those of completions. An empty system message is none."""
    expected = complete(server, words="铲子", features="对话", seed=7, max_tokens=60)
    asked = {"model": "any", "messages": messages, "seed": 7, "max_completion_tokens": 60, "extra_body": more}
    answer = server.client.chat.completions.create(**asked)
    (choice,) = answer.choices
    assert answer.object == "chat.completion" and answer.usage == expected.usage
    assert (choice.message.role, choice.message.content) == ("assistant", expected.choices[0].text)
    chunks = list(server.client.chat.completions.create(stream=True, **asked))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content for delta in deltas) == choice.message.content


def test_langchain(server):
    langchain_openai = pytest.importorskip("langchain_openai")
    url = f"http://127.0.0.1:{server.port}/v1"
    model = langchain_openai.ChatOpenAI(base_url=url, api_key="none", model="any", seed=7, max_tokens=9)
    message = model.invoke("词汇：铲子")
    assert message.content == story_of(server, words="铲子", seed=7, max_tokens=9)


# ---- Many visitors ---------------------------------------------------------------------------------


def test_two_are_told_at_once_and_the_others_know_their_place(slow_server):
    """Whoever leaves makes room, wherever he is."""
    first = Visitor(slow_server)
    second = Visitor(slow_server)
    assert first.choice() and second.choice()
    third = Visitor(slow_server)
    fourth = Visitor(slow_server)
    fifth = Visitor(slow_server)
    assert (third.ahead(), fourth.ahead(), fifth.ahead()) == (0, 1, 2)
    third.leave()
    assert fifth.ahead() == 1
    second.leave()
    assert fourth.choice() and first.choice()
    for visitor in (first, fourth, fifth):
        visitor.leave()


def test_32_stories_may_wait(slow_server):
    """Four visitors have eight each: two are told. When all have left, the next one need not wait."""
    visitors = [Visitor(slow_server, n=8)]
    while visitors[-1].answer.status == 200:
        visitors.append(Visitor(slow_server, n=8))
    assert len(visitors) == 5
    while visitors[0].choice()["index"] == 0:
        pass  # until the second of his eight is told too
    visitors.append(Visitor(slow_server, n=2))
    assert visitors[-1].answer.status == 200
    full = refused(slow_server, '{"prompt": "从前"}', "Too many stories are waiting", status=503)
    assert full.headers["Retry-After"] == "5"
    for visitor in visitors:
        visitor.leave()
    next_one = Visitor(slow_server)
    while next_one.answer.status == 503:
        next_one = Visitor(slow_server)
    assert next_one.choice()
    next_one.leave()


def test_a_visitor_who_leaves_before_his_answer_makes_room(slow_server):
    """Told to their end, his stories would take longer than the next one is ready to wait."""
    visitor = Visitor(slow_server, n=8, stream=False)
    next_one = Visitor(slow_server)
    assert next_one.ahead() > 2
    visitor.leave()
    Visitor(slow_server, n=8, stream=False).leave()  # at once
    assert next_one.choice()
    next_one.leave()


def test_256_connections_are_too_many(server):
    """Those that say nothing count, too; when they are gone all is as before."""
    with contextlib.ExitStack() as stack:
        for _ in range(256):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        assert request(server, "GET", "/").status == 503
    while request(server, "GET", "/").status != 200:
        pass


def test_after_a_silence_all_requests_of_a_minute_may_come_at_once(tuned, opened, monkeypatch):
    """Then one in three seconds, if there are 20; each address has its own. Retry-After is not too short."""
    from fastapi.testclient import TestClient

    import tools.serve

    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(tools.serve, "time", SimpleNamespace(monotonic=lambda: clock.now))
    model, tokenizer, template = opened
    args = SimpleNamespace(ckpt=tuned, per_minute=20, allow_origin=None)
    app = tools.serve.make_app(Scheduler(model, 1), tokenizer, template, [], args)

    def accepted(address):
        """How many requests are let through, bad ones; and how long to wait for the next."""
        for number in range(99):
            answer = TestClient(app, client=(address, 1)).post(COMPLETIONS)
            if answer.status_code == 429:
                return number, answer.headers["Retry-After"]

    assert accepted("10.0.0.1") == (20, "3")
    clock.now += 2.5
    assert accepted("10.0.0.1") == (0, "1")
    clock.now += 1
    assert accepted("10.0.0.1") == (1, "3")
    assert accepted("10.0.0.2") == (20, "3")
    clock.now += 1000
    assert accepted("10.0.0.1") == (20, "3")


# ---- Refusals: a status, and an error in OpenAI's form ---------------------------------------------


def refused(server, body, word="", param="", status=400, path=COMPLETIONS):
    """Assert that a body is refused in OpenAI's form; returns the answer."""
    if isinstance(body, str):
        body = body.encode()
    answer = request(server, path=path, body=body)
    error = assert_error(answer, status, word)
    assert param in (error["param"] or "")
    return answer


def assert_error(answer, status, word):
    assert answer.status == status
    error = json.loads(answer.body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert word in error["message"] and error["message"].endswith(".")
    kinds = {429: "rate_limit_error", 503: "server_error"}
    assert error["type"] == kinds.get(status, "invalid_request_error")
    return error


def first_key(body):
    return re.search('"(.*?)"', body)[1]


NOT_SUPPORTED = [
    '{"logprobs": 3}',
    '{"logprobs": true}',
    '{"top_logprobs": 2}',
    '{"echo": true}',
    '{"suffix": "x"}',
    '{"logit_bias": {"5": 1}}',
    '{"presence_penalty": 0.5}',
    '{"frequency_penalty": -1}',
    '{"tools": [{}]}',
    '{"tool_choice": "required"}',
    '{"response_format": {"type": "json_object"}}',
    '{"stream_options": {"other": true}}',
    '{"top_k": 5}',
    '{"word": "铲子"}',
    '{"messages": []}',
    '{"<img src=x>": 1}',
]


@pytest.mark.parametrize("body", NOT_SUPPORTED)
def test_what_is_not_supported_is_refused_by_name(body, server):
    refused(server, body, "is not supported here", first_key(body))


UNASKED = [
    '{"response_format": {"type": "text"}, "logprobs": false, "tools": [], "tool_choice": "none"}',
    '{"logprobs": 0, "top_logprobs": 0, "metadata": {"a": "b"}, "service_tier": "auto", "user": "someone"}',
    '{"parallel_tool_calls": true, "echo": false, "suffix": "", "presence_penalty": 0, "store": true}',
    '{"frequency_penalty": 0.0, "logit_bias": {}, "stream_options": {"include_usage": null}, "best_of": 1}',
    '{"prompt": null, "features": null, "top_p": null, "stop": null, "n": null, "stream_options": null}',
]


@pytest.mark.parametrize("body", UNASKED)
def test_what_clients_send_unasked_changes_nothing(body, server):
    """And null is as good as nothing."""
    asked = {"words": "铲子", "seed": 7, "max_tokens": 9}
    assert story_of(server, **json.loads(body), **asked) == story_of(server, **asked)


NO_OBJECT = [
    "",
    "{",
    "[" * 9000,
    '["words"]',
    "null",
    '{"seed": ' + "9" * 5000 + "}",
    '{"words": "\\ud800"}',
]


@pytest.mark.parametrize("body", NO_OBJECT, ids=lambda body: body[:9])
def test_a_body_must_be_a_json_object(body, server):
    refused(server, body, "must be a JSON object")


WRONG = [
    '{"stream_options": 7}',
    '{"stream_options": {"include_usage": "yes"}}',
    '{"words": {"a": "铲子"}}',
    '{"words": ["铲子", 7]}',
    '{"prompt": 7}',
    '{"prompt": []}',
    '{"prompt": [7, 8]}',
    '{"stop": ["1", "2", "3", "4", "5"]}',
    '{"model": 7}',
    '{"stream": 1}',
    '{"temperature": true}',
    '{"temperature": -0.1}',
    '{"temperature": 2.1}',
    '{"temperature": NaN}',
    '{"top_p": 0}',
    '{"top_p": 1.01}',
    '{"seed": 1.5}',
    '{"max_tokens": 0}',
    '{"max_completion_tokens": 0}',
    '{"n": 9}',
    '{"n": 0}',
    '{"best_of": 9}',
    '{"best_of": 2, "summary": "小猴捞月亮。"}',
    '{"n": 8, "best_of": 5, "words": "铲子"}',
]


@pytest.mark.parametrize("body", WRONG)
def test_a_wrong_value_is_refused_by_its_key(body, server):
    refused(server, body, param=first_key(body))


@pytest.mark.parametrize("body", ["{}", '{"prompt": ""}', '{"words": " ，"}', '{"prompt": null}'])
def test_a_tuned_model_must_be_asked_for_something(body, server):
    refused(server, body, "Ask for something", "words")


def test_a_model_that_was_not_tuned_only_continues(slow_server):
    refused(slow_server, '{"words": "铲子"}', "only continues")
    refused(slow_server, '{"messages": [{"role": "user"}]}', "only continues", path=CHAT)


USER = '{"role": "user", "content": "词汇：铲子"}'
SYSTEM = '{"role": "system", "content": "a"}'
OTHER_CHATS = [
    "null",
    "[]",
    USER,
    f"[{USER}, {USER}]",
    f"[{SYSTEM}, {USER}]",
    f"[{SYSTEM}]",
    '[{"role": "user", "content": [{"type": "image_url"}]}]',
    '[{"role": "user", "content": [{"type": "text", "text": 7}]}]',
    '["a"]',
]


@pytest.mark.parametrize("messages", OTHER_CHATS)
def test_other_chats_are_refused(messages, server):
    refused(server, f'{{"messages": {messages}}}', param="messages", path=CHAT)


def test_a_refusal_is_an_error_of_the_client_of_openai(server):
    import openai

    with pytest.raises(openai.BadRequestError, match="logprobs") as refusal:
        complete(server, logprobs=1)
    assert (refusal.value.param, refusal.value.type) == ("logprobs", "invalid_request_error")


def test_a_prompt_may_have_one_token_less_than_the_model_reads(server):
    """🐰 has four tokens, ㍿ three, and before them is one."""
    fits = "🐰" * 62 + "㍿" * 2
    answer = complete(server, prompt=fits)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (255, 1)
    refused(server, json.dumps({"prompt": ["从前", "㍿" * 85]}), "255 tokens fit", "prompt")


# ---- HTTP ------------------------------------------------------------------------------------------

HEADS = [
    ("GET", "/etc/passwd", {}, 404, "GET /etc/passwd"),
    ("GET", "/docs", {}, 404, "/docs"),
    ("GET", "/v1/models/other", {}, 404, "only the model out"),
    ("OPTIONS", COMPLETIONS, {"Origin": "http://evil.example"}, 405, "OPTIONS"),
    ("GET", "/", {"Host": "evil.example"}, 403, "--host 0.0.0.0"),
    ("POST", COMPLETIONS, {**JSON, "Host": "localhost.evil.example:8000"}, 403, "localhost"),
    ("POST", COMPLETIONS, {"Content-Type": "text/plain"}, 415, "application/json"),
]


@pytest.mark.parametrize("method, path, headers, status, word", HEADS)
def test_what_is_refused_by_its_head(method, path, headers, status, word, server):
    answer = request(server, method, path, None, headers)
    assert_error(answer, status, word)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in answer.headers and "Server" not in answer.headers


READABLE = ["/", "/?any", "/health", "/v1/models", "/v1/models/", "/v1/models/out"]


@pytest.mark.parametrize("path", READABLE)
def test_what_can_be_read(path, server):
    assert request(server, "GET", path).status == 200
    head = request(server, "HEAD", path)
    assert (head.status, head.body) == (200, b"")


@pytest.mark.parametrize("host", ["LOCALHOST:8000", "127.0.0.1", "[::1]:80"])
def test_this_machine_may_be_called_by_any_of_its_names(host, server):
    answer = request(server, "GET", "/health", headers={"Host": host})
    assert (answer.status, answer.body) == (200, b'{"status":"ok"}')


def test_there_is_one_model(server):
    (model,) = server.client.models.list()
    assert (model.id, model.object) == ("out", "model")


BODY = '{"words": "铲子", "seed": 7, "max_tokens": 9}'.encode()
BODIES = [BODY, b"\xef\xbb\xbf" + BODY, BODY.ljust(16384), [BODY[:9], BODY[9:]]]


@pytest.mark.parametrize("body", BODIES, ids=["plain", "byte order mark", "largest", "chunked"])
def test_how_a_body_may_be_written(body, server):
    answer = request(server, body=body, headers={"content-TYPE": "Application/JSON; charset=utf-8"})
    assert answer.status == 200
    (choice,) = json.loads(answer.body)["choices"]
    assert choice["text"] == story_of(server, **json.loads(BODY))


def test_large_bodies_are_refused(server):
    """Also one that does not say how large it is, and one that is still being sent."""
    for body in (b" " * 16385, b" " * 900_000, [b" " * 4096] * 5):
        refused(server, body, "16384", status=413)


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "latin-1"])
def test_other_encodings_are_refused(encoding, server):
    refused(server, '{"words": "é"}'.encode(encoding), "not UTF-8: see byte")


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BROKEN = [b"FLY / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\r\n\r\n", HEAD + b"Content-Length: 9\r\n\r\n{"]


@pytest.mark.parametrize("sent", BROKEN)
def test_what_is_no_request_or_only_half_of_one(sent, server):
    """The server goes on, and does not complain: see `serving`."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
    assert request(server, "GET", "/").status == 200


# ---- The command -----------------------------------------------------------------------------------


def test_a_server_for_others(tuned):
    """--host 0.0.0.0: by any name. --per_minute: whatever address a visitor claims to have. --allow_origin:
    with the headers of the OpenAI client for JavaScript."""
    site = {"Origin": "http://localhost:3000", "Host": "my.computer:8000"}
    wanted = "authorization, content-type, x-stainless-os"
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
    options = ["--host", "0.0.0.0", "--per_minute", 2, "--allow_origin", site["Origin"]]
    with serving(tuned, *options, end=signal.SIGTERM) as server:
        answer = request(server, "OPTIONS", headers=site | preflight)
        assert answer.status == 200 and answer.headers["Access-Control-Allow-Headers"] == wanted
        for address, status in (("10.0.0.1", 400), ("10.0.0.2", 400), ("10.0.0.3", 429)):
            answer = request(server, body=b"{", headers=JSON | site | {"X-Forwarded-For": address})
            assert answer.headers["Access-Control-Allow-Origin"] == site["Origin"]
            assert_error(answer, status, "")
        assert answer.headers["Retry-After"] == "30"


MISTAKES = [
    "--port=70000",
    "--port=x",
    "--batch=0",
    "--per_minute=0",
    "--device=banana",
    "--prot=1",
    "--allow_origin=localhost:3000",
    "--allow_origin=http://localhost/a",
    "--host=no.such.host.invalid",
    "--ckpt=no/such/folder",
]


@pytest.mark.parametrize("option", MISTAKES)
def test_a_mistake_is_named(option, tuned):
    import tools.serve

    args = ["--ckpt", tuned, "--device", "cpu", option]
    assert_refused(tools.serve, args, option.partition("=")[2])


def test_a_port_that_is_taken(tuned, server):
    import tools.serve

    assert_refused(
        tools.serve, ["--ckpt", tuned, "--port", server.port], f"--port {server.port}", "choose another"
    )


def test_a_package_that_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "tools.serve", raising=False)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("tools.serve")
    assert ended.value.code == 2
    assert re.fullmatch(r"error: .*fastapi.*pip install -U fastapi uvicorn\n", capsys.readouterr().err)


# ---- The page --------------------------------------------------------------------------------------


def test_the_page_is_self_contained(server):
    """Only what is marked with a number that is new each time may run."""
    answer = request(server, "GET", "/")
    page = answer.body.decode()
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "*" not in policy
    assert request(server, "GET", "/").headers["Content-Security-Policy"] != policy
    (nonce,) = set(re.findall("'nonce-(.*?)'", policy))
    assert len(nonce) > 20 and re.findall("<(?:script|style)(.*?)>", page) == [f' nonce="{nonce}"'] * 2
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(.*)""", page)
    assert "{{" not in page and [link[:5] for link in links] == ["data:"]
    assert re.findall('name="features" value="(.*?)"', page) == list(FEATURES)


# ---- The page in Chromium, by the W3C WebDriver protocol -------------------------------------------


class Browser:
    def __init__(self, port, program, folder):
        self.url = f"http://127.0.0.1:{port}/session"
        switches = ["headless", "no-sandbox", "disable-dev-shm-usage", "accept-lang=zh-CN"]
        switches.append(f"user-data-dir={folder}")
        wanted = {
            "goog:chromeOptions": {"binary": program, "args": switches},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self.url += "/" + self.ask("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def ask(self, path, method="POST", **data):
        sent = Request(self.url + path, json.dumps(data).encode(), JSON, method=method)
        with urlopen(sent, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, server):
        self.ask("/url", url=f"http://127.0.0.1:{server.port}/")

    def run(self, script):
        """What JavaScript returns; at(id) is an element."""
        at = "const at = (id) => document.getElementById(id);"
        return self.ask("/execute/sync", script=f"{at} return {script}", args=[])

    def text(self, element):
        return self.run(f"at('{element}').textContent")

    def type(self, element, text):
        found = self.ask("/element", using="css selector", value=f"#{element}")
        (key,) = found.values()
        self.ask(f"/element/{key}/value", text=text)

    def wait_for(self, condition):
        give_up = time.monotonic() + 60
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < give_up, condition


@pytest.fixture
def browser(tmp_path):
    """Chromium, which must find no fault with the page, such as a thing that its policy forbids."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("chromium or chromedriver is not here")
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        found = None
        while not found:
            found = re.search(r"successfully on port (\d+)", process.stdout.readline())
        browser = Browser(found[1], program, tmp_path)
        yield browser
        assert browser.ask("/se/log", type="browser") == []
        browser.ask("", method="DELETE")
        process.terminate()


TELLING = "at('tell').disabled && !at('stop').disabled"
IDLE = "!at('tell').disabled && at('stop').disabled"
ENTER = "\ue007"


def test_the_page_tells_what_is_asked_for(browser, opened, server):
    """Another language changes the page; the story stays."""
    browser.open(server)
    browser.run("document.querySelector('.chips input').click()")
    browser.run("at('temperature').value = 0.5")
    fields = {"seed": "11", "words": "铲子，草地", "sentence": "它笑了。", "summary": "捞月亮。" + ENTER}
    for field, text in fields.items():
        browser.type(field, text)
    browser.wait_for(f"{IDLE} && at('status').textContent.includes('（种子 11）')")
    instruction = "词汇：铲子，草地\n特点：对话\n摘要：捞月亮。\n随机句子：它笑了。"
    story, _ = sampled(opened, instruction, seed=11, temperature=0.5)
    assert (browser.text("story"), browser.text("tell")) == (story, "生成故事")
    browser.run("at('language').click()")
    assert (browser.text("story"), browser.text("tell")) == (story, "Generate")
    assert "seed 11" in browser.text("status")


def test_the_page_shows_text_as_text_and_stops_where_it_is_told_to(browser, slow_server):
    browser.open(slow_server)
    hostile = "<img src=x onerror=alert(1)><script>alert(1)</script>&lt;b&gt;"
    for _ in range(2):
        browser.run("at('prompt').value = ''")
        browser.type("prompt", hostile + ENTER)
        browser.wait_for(f"{TELLING} && at('story').textContent.length > {len(hostile) + 20}")
        browser.run("at('stop').click()")
        browser.wait_for(IDLE)
        story = browser.text("story")
        assert story.startswith(hostile) and browser.run("at('story').children.length") == 0
        assert "停下了" in browser.text("status")
    assert browser.text("story") == story


def test_the_page_says_why_it_is_refused(browser, slow_server):
    browser.open(slow_server)
    browser.run("at('prompt').value = '<b>很</b>'.repeat(400)")
    browser.run("at('tell').click()")
    browser.wait_for(f"{IDLE} && at('status').className === 'bad'")
    assert "太长了" in browser.text("status") and not browser.text("story")
    (entry,) = browser.ask("/se/log", type="browser")  # that a request was refused
    assert "400" in entry["message"]
