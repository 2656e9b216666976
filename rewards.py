"""What makes a story good, in rules: what was asked for is there, it comes to its end, it does not repeat itself.

The evaluation counts these things, and preference tuning teaches what they prefer.
"""

import collections
import re

from instructions import read_constraints, split_list
from sample import generate


def common_subsequence(a: str, b: str) -> int:
    """The length of the longest common subsequence, by the textbook's table (Cormen et al., 14.4)."""
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
    """What can be said of one story, given what was asked of it; only what applies is in the result."""
    constraints = constraints or {}
    found = {"length": len(story), "repeat_4gram": repeated_4grams(story)}
    if words := split_list(constraints.get("词汇", "")):
        found["words"] = sum(word in story for word in words) / len(words)
        found["words_all"] = float(found["words"] == 1)
    if sentence := constraints.get("随机句子"):
        found["sentence_exact"] = float(sentence in story)
        asked = "".join(sentences_of(sentence))
        nearest = max((common_subsequence(asked, s) for s in sentences_of(story)), default=0)
        found["sentence_lcs80"] = float(sentence in story or nearest > 0.8 * len(asked))
    if {"对话", "對話", "Dialogue"} & set(split_list(constraints.get("特点", ""))):
        found["dialogue"] = float(any(quote in story for quote in '“「『"'))
    return found


def average(scores: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the stories it applies to."""
    sums = collections.defaultdict(list)
    for found in scores:
        for name, value in found.items():
            sums[name].append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def tell_and_score(model, tokenizer, prompts: list[list[int]], **options) -> list[tuple[str, dict[str, float]]]:
    """A story for each instruction, all told as one batch, and its scores. Prompts are tokens, see `generate`."""
    end, found = options["end_token"], []
    told = zip(*(token.tolist() for token in generate(model, prompts, **options)), strict=True)  # a row each
    for prompt, tokens in zip(prompts, told, strict=True):
        finished = end in tokens
        story = tokenizer.decode(list(tokens[: tokens.index(end)] if finished else tokens))
        constraints = read_constraints(tokenizer.decode(prompt))
        found.append((story, score(constraints, story) | {"finished": float(finished)}))
    return found


def reward(scores: dict[str, float], reference: dict[str, float]) -> float:
    """One number for a story's scores: the sum of what was asked for and is there (a share of the words counts as
    that share), and a point each for reaching the end, for repeating itself hardly more than the reference does,
    and for being half to twice as long."""
    names = ("words", "words_all", "sentence_exact", "sentence_lcs80", "dialogue", "finished")
    fitting = 0.5 <= scores["length"] / max(1, reference["length"]) <= 2
    steady = scores["repeat_4gram"] <= reference["repeat_4gram"] + 0.05
    return sum(scores.get(name, 0.0) for name in names) + fitting + steady
