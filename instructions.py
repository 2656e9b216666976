"""Instructions: how they are spelt in tokens, and how a story's record becomes one.

The constraints are TinyStoriesChinese's, one a line, in any order and any number:

    词汇：铲子，草地
    特点：转折，对话
    摘要：……
    随机句子：……
"""

import itertools
import random
import re

from errors import UserError
from stories.read import story_of

# Control tokens frame the two parts. Text never becomes one of them, so no instruction can forge an answer.
CONTROL = ["<|user|>", "<|assistant|>"]
TEMPLATE = "<|user|>{instruction}<|assistant|>{response}"
NAMES = {"词汇": "words", "特点": "features", "摘要": "summary", "随机句子": "sentence"}  # and sample.py's options
SYNONYMS = dict.fromkeys(("关键词", "单词", "词语"), "词汇")  # as the translations of the original spell them
SYNONYMS |= dict.fromkeys(("特征", "故事特点"), "特点")
SYNONYMS |= dict.fromkeys(("总结", "概要"), "摘要")
SYNONYMS |= dict.fromkeys(("随机句", "随机的句子"), "随机句子")


def template_for(tokenizer) -> str:
    """TEMPLATE; or, for a tokenizer without our control tokens, one with its own begin token."""
    if all(tokenizer.is_control(tokenizer.piece_to_id(piece)) for piece in CONTROL):
        return TEMPLATE
    if tokenizer.bos_id() < 0 or not tokenizer.is_control(tokenizer.bos_id()):
        raise UserError("this tokenizer has no control token that could mark where an instruction ends")
    return "{instruction}" + tokenizer.id_to_piece(tokenizer.bos_id()) + "{response}"


def markers(template: str, tokenizer) -> tuple[list[int], list[int]]:
    """The control tokens of a template: those before the instruction, and those before the response."""
    parts = re.fullmatch(r"(.*)\{instruction\}(.+)\{response\}", str(template))
    if not parts:
        raise UserError(f"the template {template!r} is none: expected …{{instruction}}…{{response}}")
    ids = [tokenizer.piece_to_id(piece) for piece in parts.groups() if piece]
    if not all(map(tokenizer.is_control, ids)):
        raise UserError(f"the template {template!r} names control tokens that its tokenizer does not have")
    return ids[:-1], ids[-1:]


def write_constraints(constraints: dict[str, str]) -> str:
    """The text of an instruction: a line for each constraint that says something, in the order given."""
    lines = []
    for name, value in constraints.items():
        value = "，".join(split_list(value)) if name in ("词汇", "特点") else " ".join(value.split())
        lines += [f"{name}：{value}"] if value else []
    return "\n".join(lines)


def read_constraints(text: str) -> dict[str, str] | None:
    """The constraints an instruction consists of, their names normalised; None if it holds anything else."""
    constraints = {}
    for line in text.strip().splitlines():
        name, *rest = (part.strip() for part in re.split("[：:]", line, maxsplit=1))
        value = "".join(rest)
        name = SYNONYMS.get(name, name)
        if name not in NAMES or not value or name in constraints:
            return None
        constraints[name] = value
    return constraints or None


def split_list(value: str) -> list[str]:
    """The words of 词汇, or the features of 特点."""
    return [" ".join(word.split()) for word in re.split("[，,、]", value) if word.strip()]


def constraints_of(record: dict, story: str, text_key: str, rng: random.Random) -> dict[str, str]:
    """All constraints a TinyStories record offers; a record without a sentence gets one of its story's."""
    labels = record.get("instruction")
    labels = labels if isinstance(labels, dict) else {}
    found: dict[str, object] = {}
    for name, key in (("词汇", "words"), ("特点", "features")):
        if isinstance(labels.get(key), list):
            found[name] = "，".join(split_list("，".join(map(str, labels[key]))))
    if "story" in text_key:  # story_zh has summary_zh beside it, story has summary
        found["摘要"] = record.get(text_key.replace("story", "summary"))
        found["随机句子"] = record.get(text_key.replace("story", "sentence"))
    if not found.get("随机句子"):
        sentences = [s for s in re.findall(r"[^。！？.!?“”\"]+[。！？.!?]", story) if len(s.strip()) >= 8]
        found["随机句子"] = sentences[int(rng.random() * len(sentences))] if sentences else ""
    return {name: value for name, value in found.items() if isinstance(value, str) and value.strip()}


def examples_of(record, where: str, text_key: str, augment: int) -> list[tuple[str, str]]:
    """(instruction, response) of a record: up to `augment` different lists of its constraints.

    Alpaca's keys (instruction, input, output) are taken as they are, unless what they hold is a list of
    constraints: then it comes first, and other orders and subsets of it after it. Raises UserError.
    """
    if isinstance(record, dict) and "output" in record:
        for key in ("instruction", "input", "output"):
            if not isinstance(record.get(key, ""), str):
                raise UserError(f"{where}: {key!r} is a {type(record[key]).__name__}, not text")
        response, extra = record["output"], record.get("input", "")
        asked = "\n".join(text for text in (record.get("instruction", ""), extra) if text.strip())
        constraints = read_constraints(extra if extra.strip() else asked)
        if constraints is None:
            return [(asked, response)]
        first = [tuple(constraints)]
        rng = random.Random(response.encode(errors="surrogatepass"))
    else:
        response = story_of(record, where, text_key)
        rng, first = random.Random(response.encode(errors="surrogatepass")), []
        constraints = constraints_of(record, response, text_key, rng) if isinstance(record, dict) else {}
        if not constraints:
            raise UserError(f"{where}: holds no instruction, words, features, summary or sentence")
    orders = [order for n in range(len(constraints)) for order in itertools.permutations(constraints, n + 1)]
    orders.sort(key=lambda order: rng.random())
    chosen = list(dict.fromkeys(first + orders))[:augment]
    return [(write_constraints({name: constraints[name] for name in order}), response) for order in chosen]
