"""Records: what one JSON object, CSV row or text of the input holds, as a story or as an instruction and a
response.

A record is read whole or refused. One that the template cannot hold (earlier turns) is left out and counted.
"""

import hashlib
import itertools
import random
import re

from common.files import UserError
from stories.constraints import clean, read_constraints, split_list, strip, write_constraints
from stories.read import LeftOut

# The keys of a prompt, of which a record has one; what stands at "input" follows it.
PROMPTS = ("instruction", "prompt", "query", "question", "input")
RESPONSES = ("output", "completion", "response", "answer")
CONVERSATIONS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # ShareGPT's names
# Control characters, a sign of damage; and what SentencePiece writes for a space.
UNENCODABLE = re.compile("[\0-\b\v-\x1f\x7f-\x9f\u2581]")


def story_of(record, where: str, text_key: str) -> str:
    """The story of a record. Raises UserError, and LeftOut for a record that is one."""
    if isinstance(record, LeftOut):
        raise record
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object or a string, found {type(record).__name__}")
    if text_key not in record:
        raise UserError(
            f"{where}: no key {text_key!r}; the keys here are {keys_of(record)}; choose with --text_key"
        )
    return text_of(record, text_key, where)


def text_of(record: dict, key: str, where: str) -> str:
    """The text at a key. Null, NaN (pandas' null), blanks, and a missing key are "". Raises UserError."""
    value = record.get(key)
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is a {type(value).__name__}, not text")
    if not strip(value):
        return ""
    return value


def keys_of(record: dict) -> str:
    return ", ".join(sorted(str(key) for key in record)) or "none"


# ---- Instructions ----------------------------------------------------------------------------------


def examples_of(record, where: str, text_key: str, augment: int) -> list[tuple[str, str]]:
    """The examples of a record: (instruction, response) each. Raises UserError, and LeftOut.

    A prompt is taken as it is. If it is a list of constraints, up to `augment` different lists are made of
    it: the given one first, then other orders and subsets. So too for TinyStories' labels, of which no list
    is given.
    """
    key = response_key(record, text_key, where)
    if key:
        prompt, response = prompt_and_response(record, key, where)
        constraints = read_constraints(text_of(record, "input", where) or prompt)
        if constraints is None:
            return [(prompt, response)]
        lists = [tuple(constraints)]
        rng = random.Random(response.encode(errors="surrogatepass"))
    else:
        response = story_of(record, where, text_key)
        rng = random.Random(response.encode(errors="surrogatepass"))
        constraints = labels_of(record, response, text_key, rng)
        if not constraints:
            raise UserError(f"{where}: holds no instruction, words, features, summary or sentence")
        lists = []
    others: list[tuple[str, ...]] = []
    for n in range(len(constraints)):
        others += itertools.permutations(constraints, n + 1)
    others.sort(key=lambda names: rng.random())
    lists = list(dict.fromkeys(lists + others))  # each once, in this order
    return [
        (write_constraints({name: constraints[name] for name in names}), response)
        for names in lists[:augment]
    ]


def response_key(record, text_key: str, where: str) -> str | None:
    """The key of the response of a record with a prompt; None for a story with its labels.

    Raises UserError if the record could be read in two ways.
    """
    if not isinstance(record, dict):
        return None
    prompts = [key for key in PROMPTS if isinstance(record.get(key), str) and strip(record[key])]
    responses = [key for key in (*RESPONSES, *CONVERSATIONS) if key in record]
    if prompts and text_key in record and text_key not in responses:
        responses.append(text_key)  # a story beside a prompt is the response to it
    if len(responses) > 1:
        both = " and ".join(repr(key) for key in responses)
        problem = f"holds {both}; which is the response? rename or remove the other"
        raise UserError(f"{where}: {problem}; the keys here are {keys_of(record)}")
    if responses:
        return responses[0]
    if prompts:
        problem = f"holds the prompt {prompts[0]!r}, but no response ({', '.join(RESPONSES)})"
        raise UserError(f"{where}: {problem}; the keys here are {keys_of(record)}")
    return None


def labels_of(record, story: str, text_key: str, rng: random.Random) -> dict[str, str]:
    """All constraints of a TinyStories record; a record without a sentence gets one of its story's."""
    if not isinstance(record, dict):
        return {}
    found: dict[str, object] = {}
    labels = record.get("instruction")
    if isinstance(labels, dict):
        for name, key in (("词汇", "words"), ("特点", "features")):
            if isinstance(labels.get(key), list):
                words = split_list("，".join(str(word) for word in labels[key]))
                found[name] = "，".join(words)
    if "story" in text_key:  # story_zh has summary_zh beside it, story has summary
        found["摘要"] = record.get(text_key.replace("story", "summary"))
        found["随机句子"] = record.get(text_key.replace("story", "sentence"))
    if not found.get("随机句子"):
        sentences = re.findall(r"[^。！？.!?“”\"]+[。！？.!?]", story)
        sentences = [sentence for sentence in sentences if len(sentence.strip()) >= 8]
        if sentences:
            found["随机句子"] = sentences[int(rng.random() * len(sentences))]
    constraints = {}
    for name, value in found.items():
        if isinstance(value, str) and strip(value):
            constraints[name] = value
    return constraints


# ---- Prompts and responses -------------------------------------------------------------------------


def prompt_and_response(record: dict, key: str, where: str) -> tuple[str, str]:
    """The prompt of a record, and the response at `key`: a text, a turn, or a conversation of both.

    This reads Alpaca's, TRL's and ShareGPT's forms, for instructions and for pairs of responses
    (tools/dpo.py). Raises UserError, and LeftOut for what the template has no place for.
    """
    if record.get("label") is False:
        raise LeftOut("labelled as false")  # KTO's data
    for extra, reason in (("history", "history"), ("system", "system prompt")):
        value = record.get(extra)
        if isinstance(value, str):
            value = strip(value)
        if value and value == value:  # not pandas' NaN
            raise LeftOut(reason)
    prompt = prompt_turns(record, key, where)
    response = turns_of(record, key, "assistant", where)
    asked = [text for role, text in response if role == "user"]
    if prompt and asked:  # UltraFeedback's conversations repeat the prompt that stands beside them
        question = prompt[-1][1].strip()
        if question and question != asked[0].strip():
            raise UserError(f"{where}: {key!r} answers another prompt than that of the record")
        prompt.pop()
    turns = prompt + response
    roles = [role for role, _ in turns]
    for role in roles:
        if role not in ("user", "assistant"):
            raise LeftOut(f"turn of {role!r}")
    if "user" not in roles or "assistant" not in roles:
        problem = (
            f"{key!r} is not a prompt and its response: expected user, assistant; found {', '.join(roles)}"
        )
        raise UserError(f"{where}: {problem}; the keys here are {keys_of(record)}")
    if roles != ["user", "assistant"]:
        raise LeftOut("several turns")
    return turns[0][1], turns[1][1]


def prompt_turns(record: dict, key: str, where: str) -> list[tuple[str, str]]:
    """The turns before the response at `key`: a prompt that is a text, or a conversation.

    Raises UserError.
    """
    conversations = []
    for name in ("prompt", *CONVERSATIONS):
        if name != key and isinstance(record.get(name), list):
            conversations.append(name)
    names = [name for name in PROMPTS if name in record and name not in conversations]
    filled = [name for name in names if text_of(record, name, where)]
    prompts = [name for name in filled if name != "input"]
    if filled and "prompt" in conversations:
        prompts.append("prompt")
    if len(prompts) > 1:
        both = " and ".join(repr(name) for name in prompts)
        raise UserError(f"{where}: holds {both}; which is the prompt? the keys here are {keys_of(record)}")
    if filled:
        texts = [text_of(record, name, where) for name in filled]
        return [("user", "\n".join(texts))]
    if conversations:
        return turns_of(record, conversations[0], "user", where)
    if names:
        return [("user", "")]
    return []


def turns_of(record: dict, key: str, role: str, where: str) -> list[tuple[str, str]]:
    """(role, text) of each turn at a key, where a text (one turn of `role`), a turn or a conversation stands.

    Turns have role and content, or from and value. Raises UserError, and LeftOut for a system prompt.
    """
    value = record.get(key)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return [(role, text_of(record, key, where))]
    turns = []
    for turn in value:
        if isinstance(turn, LeftOut):
            raise turn
        role_key = "role"
        text_key = "content"
        if isinstance(turn, dict) and "from" in turn:
            role_key = "from"
            text_key = "value"
        if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str) or text_key not in turn:
            raise UserError(
                f"{where}: {key!r} is not a list of turns, each with role and content (or from and value)"
            )
        name = turn[role_key].lower()
        text = text_of(turn, text_key, where)
        if name != "system":
            turns.append((ROLES.get(name, name), text))
        elif text:
            raise LeftOut("system prompt")
    return turns


# ---- What becomes of texts ---------------------------------------------------------------------------


def clean_texts(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The texts of an example, cleaned. Raises LeftOut."""
    try:
        cleaned = tuple(clean(text) for text in texts)
    except UnicodeEncodeError:
        raise LeftOut("not_unicode") from None
    for text in cleaned:
        if not text:
            raise LeftOut("empty")
    for text in cleaned:
        if UNENCODABLE.search(text):
            raise LeftOut("unencodable")
    return cleaned


def text_digest(*texts: str) -> int:
    """A number below 2**64 that is as if random but always the same for the same texts.

    It finds duplicates and decides which split a text belongs to. (That any two of 4 million texts share one
    has a probability of 1 in 2 million.)
    """
    lengths = [str(len(text)) for text in texts[:-1]]  # where one text ends and the next begins
    hashed = hashlib.blake2b("".join([*lengths, *texts]).encode(), digest_size=16, key=b"split 1337").digest()
    return int.from_bytes(hashed[:8], "big")
