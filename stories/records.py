"""Records: what one JSON object, CSV row or text of the input holds, as a story or as an instruction and a response.

A record is read whole or refused. One that the template cannot hold (earlier turns) is left out and counted.
"""

import hashlib
import itertools
import random
import re

from common.files import UserError
from stories.constraints import clean, read_constraints, split_list, strip, write_constraints
from stories.read import LeftOut

# The keys of a response, and the keys that may hold its prompt.
PAIRS = {
    "output": ("instruction",),
    "completion": ("prompt",),
    "response": ("instruction", "prompt", "query", "question"),
    "answer": ("query", "question"),
}
PROMPTS = ("instruction", "prompt", "query", "question", "input")  # beside a response, none of these is ignored
CONVERSATIONS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # ShareGPT's names
EXTRAS = {"history": "history", "system": "system prompt"}  # what the template has no place for
# Control characters, a sign of damage; and what SentencePiece writes for a space.
UNENCODABLE = re.compile("[\0-\b\v-\x1f\x7f-\x9f\u2581]")


def text_digest(*texts: str) -> int:
    """A number below 2**64 that is as if random but always the same for the same texts.

    It finds duplicates and decides which split a text belongs to. (That any two of 4 million texts share one has a
    probability of 1 in 2 million.)
    """
    lengths = [str(len(text)) for text in texts[:-1]]  # where one text ends and the next begins
    hashed = hashlib.blake2b("".join([*lengths, *texts]).encode(), digest_size=16, key=b"split 1337").digest()
    return int.from_bytes(hashed[:8], "big")


def clean_texts(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The texts of an example, cleaned. Raises LeftOut."""
    try:
        texts = tuple(map(clean, texts))
    except UnicodeEncodeError:
        raise LeftOut("not_unicode") from None
    if not all(texts):
        raise LeftOut("empty")
    if any(map(UNENCODABLE.search, texts)):
        raise LeftOut("unencodable")
    return texts


def keys_of(record: dict) -> str:
    return ", ".join(sorted(map(str, record))) or "none"


def text_of(record: dict, key: str, where: str) -> str:
    """The text at a key. Null, NaN (pandas' null), what nobody sees, and a missing key are "". Raises UserError."""
    value = record.get(key)
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is a {type(value).__name__}, not text")
    return value if strip(value) else ""


def story_of(record, where: str, text_key: str) -> str:
    """The story of a record. Raises UserError."""
    if isinstance(record, LeftOut):
        raise record
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object or a string, found {type(record).__name__}")
    if text_key not in record:
        raise UserError(f"{where}: no key {text_key!r}; the keys here are {keys_of(record)}; choose with --text_key")
    return text_of(record, text_key, where)


# ---- Prompts and responses -------------------------------------------------------------------------


def turns_of(value, key: str, where: str) -> list[tuple[str, str]]:
    """(role, text) of each turn of a conversation, written with role and content or with from and value.

    Raises UserError.
    """
    turns = []
    for turn in value if isinstance(value, list) else [value]:
        role_key, text_key = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
        if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str) or text_key not in turn:
            raise UserError(f"{where}: {key!r} is not a list of turns, each with role and content (or from and value)")
        role = turn[role_key].lower()
        turns.append((ROLES.get(role, role), text_of(turn, text_key, where)))
    return turns


def question_and_answer(turns: list[tuple[str, str]], key: str, where: str) -> tuple[str, str]:
    """The texts of a conversation of one question and one answer. Raises UserError, and LeftOut for a longer one."""
    if any(role == "system" and text.strip() for role, text in turns):
        raise LeftOut("system prompt")
    turns = [turn for turn in turns if turn[0] != "system"]
    roles = [role for role, _ in turns]
    if unknown := set(roles) - {"user", "assistant"}:
        raise LeftOut(f"turn of {sorted(unknown)[0]!r}")
    if "user" not in roles or "assistant" not in roles:
        found = ", ".join(roles) or "nothing"
        raise UserError(f"{where}: {key!r} is not a question and its answer: expected user, assistant; found {found}")
    if roles != ["user", "assistant"]:
        raise LeftOut("several turns")
    return turns[0][1], turns[1][1]


def refuse_extras(record: dict) -> None:
    """Raise LeftOut if a record has earlier turns or a system prompt, or is labelled as bad (KTO's data)."""
    if record.get("label") is False:
        raise LeftOut("labelled as false")
    for key, reason in EXTRAS.items():
        value = record.get(key)
        if strip(value) if isinstance(value, str) else value:
            raise LeftOut(reason)


def prompt_of(record: dict, keys: tuple[str, ...], where: str) -> str:
    """The prompt of a record that has it at one of `keys`, followed by that at "input". Raises UserError."""
    present = [key for key in (*keys, "input") if key in record]
    ignored = [key for key in PROMPTS if key not in present and text_of(record, key, where).strip()]
    if not present or ignored or len(present) > 1 + ("input" in present):
        expected = " or ".join(map(repr, keys))
        raise UserError(f"{where}: expected the prompt at {expected}; the keys here are {keys_of(record)}")
    return "\n".join(text for key in present if (text := text_of(record, key, where)).strip())


def response_key(record, text_key: str, where: str) -> str | None:
    """The key of the response of a record with a prompt; None for a story with its labels.

    Raises UserError if the record could be read in two ways.
    """
    if not isinstance(record, dict):
        return None
    present = [key for key in (*PAIRS, *CONVERSATIONS) if key in record]
    if len(present) > 1:
        both = " and ".join(map(repr, present))
        raise UserError(f"{where}: holds {both}; which is the response? rename or remove the other")
    if present:
        return present[0]
    prompts = [key for key in PROMPTS if isinstance(record.get(key), str) and strip(record[key])]
    if prompts and text_key not in record:
        missing = f"holds the prompt {prompts[0]!r}, but no response ({', '.join(PAIRS)})"
        raise UserError(f"{where}: {missing}; the keys here are {keys_of(record)}")
    return text_key if prompts else None  # the story beside a prompt is the response to it


# ---- Instructions ----------------------------------------------------------------------------------


def constraints_of(record: dict, story: str, text_key: str, rng: random.Random) -> dict[str, str]:
    """All constraints of a TinyStories record; a record without a sentence gets one of its story's."""
    labels = record.get("instruction")
    labels = labels if isinstance(labels, dict) else {}
    constraints: dict[str, object] = {}
    for name, key in (("词汇", "words"), ("特点", "features")):
        if isinstance(labels.get(key), list):
            constraints[name] = "，".join(split_list("，".join(map(str, labels[key]))))
    if "story" in text_key:  # story_zh has summary_zh beside it, story has summary
        constraints["摘要"] = record.get(text_key.replace("story", "summary"))
        constraints["随机句子"] = record.get(text_key.replace("story", "sentence"))
    if not constraints.get("随机句子"):
        sentences = [s for s in re.findall(r"[^。！？.!?“”\"]+[。！？.!?]", story) if len(s.strip()) >= 8]
        constraints["随机句子"] = sentences[int(rng.random() * len(sentences))] if sentences else ""
    return {name: value for name, value in constraints.items() if isinstance(value, str) and strip(value)}


def examples_of(record, where: str, text_key: str, augment: int) -> list[tuple[str, str]]:
    """The examples of a record: (instruction, response) each. Raises UserError, and LeftOut.

    A prompt is taken as it is. If it is a list of constraints, up to `augment` different lists are made of it: the
    given one first, then other orders and subsets. So too for TinyStories' labels, of which no list is given.
    """
    first: list[tuple[str, ...]] = []
    if key := response_key(record, text_key, where):
        refuse_extras(record)
        if key in CONVERSATIONS:
            instruction, response = question_and_answer(turns_of(record[key], key, where), key, where)
        else:
            response = story_of(record, where, key)
            instruction = prompt_of(record, PAIRS.get(key, PROMPTS[:-1]), where)
        extra = text_of(record, "input", where)
        constraints = read_constraints(extra if extra.strip() else instruction)
        if constraints is None:
            return [(instruction, response)]
        first = [tuple(constraints)]
        rng = random.Random(response.encode(errors="surrogatepass"))
    else:
        response = story_of(record, where, text_key)
        rng = random.Random(response.encode(errors="surrogatepass"))
        constraints = constraints_of(record, response, text_key, rng) if isinstance(record, dict) else {}
        if not constraints:
            raise UserError(f"{where}: holds no instruction, words, features, summary or sentence")
    orders = [order for n in range(len(constraints)) for order in itertools.permutations(constraints, n + 1)]
    orders.sort(key=lambda order: rng.random())
    selected = list(dict.fromkeys(first + orders))[:augment]
    return [(write_constraints({name: constraints[name] for name in order}), response) for order in selected]
