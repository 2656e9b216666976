"""Records: what one JSON object, CSV row or text of the input holds, as a story or as an instruction and a response."""

import itertools
import random
import re

from common.settings import UserError
from stories.constraints import read_constraints, split_list, write_constraints


def story_of(record, where: str, text_key: str) -> str:
    """The story of a record. Raises UserError."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object or a string, found {type(record).__name__}")
    if text_key not in record:
        keys = ", ".join(sorted(map(str, record))) or "none"
        raise UserError(f"{where}: no key {text_key!r}; the keys here are {keys}; choose with --text_key")
    if not isinstance(record[text_key], str):
        raise UserError(f"{where}: {text_key!r} is a {type(record[text_key]).__name__}, not text")
    return record[text_key]


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
    return {name: value for name, value in constraints.items() if isinstance(value, str) and value.strip()}


def examples_of(record, where: str, text_key: str, augment: int) -> list[tuple[str, str]]:
    """(instruction, response) of a record: up to `augment` different lists of its constraints. Raises UserError.

    Alpaca's keys (instruction, input, output) are taken as they are. If they hold a list of constraints, that list
    comes first, and other orders and subsets of it follow.
    """
    if isinstance(record, dict) and "output" in record:
        for key in ("instruction", "input", "output"):
            if not isinstance(record.get(key, ""), str):
                raise UserError(f"{where}: {key!r} is a {type(record[key]).__name__}, not text")
        response, extra = record["output"], record.get("input", "")
        instruction = "\n".join(text for text in (record.get("instruction", ""), extra) if text.strip())
        constraints = read_constraints(extra if extra.strip() else instruction)
        if constraints is None:
            return [(instruction, response)]
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
    selected = list(dict.fromkeys(first + orders))[:augment]
    return [(write_constraints({name: constraints[name] for name in order}), response) for order in selected]
