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


def reward(scores: dict[str, float], reference: dict[str, float]) -> float:
    """One number for a story's scores: the sum of what was asked for and is there (words as the share present), and
    one point each for reaching the end, for repeating itself hardly more than the reference, and for being half to
    twice as long as the reference."""
    names = ("words", "words_all", "sentence_exact", "sentence_lcs80", "dialogue", "finished")
    fitting = 0.5 <= scores["length"] / max(1, reference["length"]) <= 2
    steady = scores["repeat_4gram"] <= reference["repeat_4gram"] + 0.05
    return sum(scores.get(name, 0.0) for name in names) + fitting + steady
