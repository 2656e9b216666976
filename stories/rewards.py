"""What makes a story good, as rules: what was asked for is there, it reaches its end, it does not repeat
itself.

The evaluation reports these scores, and preference tuning rewards them.
"""

import re

from stories.constraints import split_list

# Scores of what was asked for.
REQUIRED = (
    "words",
    "words_all",
    "sentence_exact",
    "sentence_lcs80",
    "dialogue",
)
DIALOGUE = {"对话", "對話", "Dialogue"}


def score(constraints: dict[str, str] | None, story: str) -> dict[str, float]:
    """The scores of a story for the constraints it was asked for, without those that do not apply."""
    if constraints is None:
        constraints = {}
    scores: dict[str, float] = {"length": len(story), "repeat_4gram": repeated_4grams(story)}
    words = split_list(constraints.get("词汇", ""))
    if words:
        present = [word for word in words if word in story]
        scores["words"] = len(present) / len(words)
        scores["words_all"] = float(len(present) == len(words))
    sentence = constraints.get("随机句子")
    if sentence:
        exact = sentence in story
        scores["sentence_exact"] = float(exact)
        required = "".join(sentences_of(sentence))
        nearest = 0  # characters that the sentence has in common with the one most like it
        for other in sentences_of(story):
            nearest = max(nearest, common_subsequence(required, other))
        scores["sentence_lcs80"] = float(exact or nearest > 0.8 * len(required))
    features = split_list(constraints.get("特点", ""))
    if DIALOGUE.intersection(features):
        scores["dialogue"] = float(re.search('[“「『"]', story) is not None)
    return scores


def repeated_4grams(text: str) -> float:
    """The share of a text's 4-grams of characters that have occurred in it before."""
    grams = [text[i : i + 4] for i in range(len(text) - 3)]
    if not grams:
        return 0.0
    return 1 - len(set(grams)) / len(grams)


def sentences_of(text: str) -> list[str]:
    parts = re.split(r"[。！？.!?“”\"\n]+", text)
    return [part for part in parts if part.strip()]


def common_subsequence(a: str, b: str) -> int:
    """The length of the longest common subsequence, by dynamic programming (Cormen et al., section 14.4)."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            if x == y:
                row.append(above[j] + 1)
            else:
                row.append(max(above[j + 1], row[j]))
    return row[-1]


def average(scores: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each score over the stories it applies to."""
    columns: dict[str, list[float]] = {}
    for one in scores:
        for name, value in one.items():
            columns.setdefault(name, []).append(value)
    return {name: sum(column) / len(column) for name, column in columns.items()}


def reward(scores: dict[str, float], reference: dict[str, float] | None = None) -> float:
    """One number for a story's scores: the sum of what was asked for and is there (words as the share
    present), and one point each for reaching the end and for repeating itself hardly more than the reference,
    or than 5% if there is none; and with a reference one for being half to twice as long."""
    total = sum(scores.get(name, 0.0) for name in (*REQUIRED, "finished"))
    repeated = 0.05  # of the 4-grams, which is hardly more than none
    right_length = True
    if reference:
        repeated += reference["repeat_4gram"]
        right_length = 0.5 <= scores["length"] / max(1, reference["length"]) <= 2
    if right_length:
        total += 1
    if scores["repeat_4gram"] <= repeated:
        total += 1
    return total


def can_choose(constraints: dict[str, str] | None) -> bool:
    """Whether an instruction asks for something that these rules can find in a story."""
    return not score(constraints, "").keys().isdisjoint(REQUIRED)


def findings(constraints: dict[str, str] | None, story: str) -> dict:
    """What a story has of what was asked for: "missing" words, the "sentence" (exact, nearly, missing),
    "dialogue".
    """
    scores = score(constraints, story)
    found: dict[str, object] = {}
    if constraints and "words" in scores:
        found["missing"] = [word for word in split_list(constraints["词汇"]) if word not in story]
    if "sentence_exact" in scores:
        found["sentence"] = "missing"
        if scores["sentence_lcs80"]:
            found["sentence"] = "nearly"
        if scores["sentence_exact"]:
            found["sentence"] = "exact"
    if "dialogue" in scores:
        found["dialogue"] = bool(scores["dialogue"])
    return found
