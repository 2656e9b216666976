"""What makes a story good, as rules: what was asked for is there, it reaches its end, it does not repeat itself.

The evaluation reports these scores, and preference tuning rewards them.
"""

import collections
import re

from stories.constraints import split_list


def common_subsequence(a: str, b: str) -> int:
    """The length of the longest common subsequence, by dynamic programming (Cormen et al., section 14.4)."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


def sentences_of(text: str) -> list[str]:
    return [s for s in re.split(r"[。！？.!?“”\"\n]+", text) if s.strip()]


def repeated_4grams(text: str) -> float:
    """The share of a text's 4-grams of characters that have occurred in it before."""
    grams = [text[i : i + 4] for i in range(len(text) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def score(constraints: dict[str, str] | None, story: str) -> dict[str, float]:
    """The scores of one story, given the constraints it was asked for; a score that does not apply is left out."""
    constraints = constraints or {}
    scores = {"length": len(story), "repeat_4gram": repeated_4grams(story)}
    if words := split_list(constraints.get("词汇", "")):
        scores["words"] = sum(word in story for word in words) / len(words)
        scores["words_all"] = float(scores["words"] == 1)
    if sentence := constraints.get("随机句子"):
        scores["sentence_exact"] = float(sentence in story)
        required = "".join(sentences_of(sentence))
        nearest = max((common_subsequence(required, s) for s in sentences_of(story)), default=0)
        scores["sentence_lcs80"] = float(sentence in story or nearest > 0.8 * len(required))
    if {"对话", "對話", "Dialogue"} & set(split_list(constraints.get("特点", ""))):
        scores["dialogue"] = float(any(quote in story for quote in '“「『"'))
    return scores


def average(scores: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each score over the stories it applies to."""
    values = collections.defaultdict(list)
    for one in scores:
        for name, value in one.items():
            values[name].append(value)
    return {name: sum(column) / len(column) for name, column in values.items()}


REQUIRED = ("words", "words_all", "sentence_exact", "sentence_lcs80", "dialogue")  # scores of what was asked for


def reward(scores: dict[str, float], reference: dict[str, float] | None = None) -> float:
    """One number for a story's scores: the sum of what was asked for and is there (words as the share present), and
    one point each for reaching the end and for repeating itself hardly more than the reference, or than 5% if there
    is none; and with a reference one for being half to twice as long."""
    fitting = reference is None or 0.5 <= scores["length"] / max(1, reference["length"]) <= 2
    steady = scores["repeat_4gram"] <= (reference["repeat_4gram"] if reference else 0) + 0.05
    return sum(scores.get(name, 0.0) for name in (*REQUIRED, "finished")) + fitting + steady


def can_choose(constraints: dict[str, str] | None) -> bool:
    """Whether an instruction asks for something that these rules can find in a story."""
    return any(name in score(constraints, "") for name in REQUIRED)


def findings(constraints: dict[str, str] | None, story: str) -> dict:
    """What a story has of what was asked for: "missing" words, the "sentence" (exact, nearly, missing), "dialogue"."""
    scores, found = score(constraints, story), dict[str, object]()
    if words := split_list((constraints or {}).get("词汇", "")):
        found["missing"] = [word for word in words if word not in story]
    if "sentence_exact" in scores:
        found["sentence"] = "exact" if scores["sentence_exact"] else "nearly" if scores["sentence_lcs80"] else "missing"
    if "dialogue" in scores:
        found["dialogue"] = bool(scores["dialogue"])
    return found
