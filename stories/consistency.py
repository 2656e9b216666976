"""Do the heroes and objects of a story stay the same? Rules for stories of the embedded corpus.

A small model changes them on the way: a giraffe becomes an elephant, sunglasses become a red hat. The plots
of stories/plots say which heroes a story has and which objects exclude each other, so a program can find this
fault.
"""

import functools
import re
from dataclasses import dataclass

from stories.generate import CHOICE, SLOT, Plot, read_cast, read_plots

SIZE = 4  # characters of the n-grams by which a story's plot is found
KNOWN = 0.2  # a story of the corpus shares at least this much of its n-grams with the texts of its plot


@dataclass
class Rules:
    """What a story of one plot may mention."""

    grams: set[str]  # the n-grams of the plot's own texts
    n_heroes: int
    heroes: dict[str, str]  # a word that names a hero, as 小兔, 兔妈妈 or 朵朵 -> the kind or the name
    slots: list[dict[str, int]]  # for each slot: a value -> its row; a story has one row


def consistent(story: str) -> bool | None:
    """Whether a story names no more heroes than its plot, and one row of each slot; None without a plot."""
    grams = n_grams(story)
    rules = max(all_rules(), key=lambda rules: len(grams & rules.grams))
    if not grams or len(grams & rules.grams) < KNOWN * len(grams):
        return None
    for slot in rules.slots:
        if len(mentioned(slot, story)) > 1:
            return False
    return len(mentioned(rules.heroes, story)) <= rules.n_heroes


def n_grams(text: str) -> set[str]:
    return {text[i : i + SIZE] for i in range(len(text) - SIZE + 1)}


@functools.cache
def all_rules() -> list[Rules]:
    names, animals = read_cast()
    heroes = {}
    for name in names["男孩"] + names["女孩"]:
        heroes[name] = name
    for group in animals.values():
        for animal in group:
            for column in ("种类", "妈", "爸"):
                heroes[animal[column]] = animal["种类"]
    return [rules_of(plot, heroes) for plot in read_plots()]


def rules_of(plot: Plot, heroes: dict[str, str]) -> Rules:
    """The rules of a plot. Words that stand in the plot's own texts say nothing, and are left out."""
    texts = "\n".join(variant.text for beat in plot.beats for variant in beat)
    # The choices, one a line.
    own = CHOICE.sub(lambda match: "\n" + match[1].replace("|", "\n") + "\n", texts)
    own = SLOT.sub("\n", own)
    values = [values_in(rows) for _, rows in plot.slots]
    slots = []
    for number, (columns, rows) in enumerate(plot.slots):
        elsewhere = "\n".join([own, *values[:number], *values[number + 1 :]])
        slots.append(rows_of_values(columns, rows, texts, elsewhere))
    constant = "\n".join([own, *values])
    grams = set()
    for line in own.split("\n"):
        grams |= n_grams(line)
    strange = {word: hero for word, hero in heroes.items() if word not in constant}
    return Rules(grams, len(plot.cast), strange, slots)


def values_in(rows: list[list[str]]) -> str:
    """All values of a slot, one a line."""
    return "\n".join(value for row in rows for value in row)


def rows_of_values(columns: list[str], rows: list[list[str]], texts: str, elsewhere: str) -> dict[str, int]:
    """For each value that only one row of a slot has: the number of the row. `elsewhere` is other text."""
    found: dict[str, int] = {}
    ambiguous = set()
    for number, row in enumerate(rows):
        for column, value in zip(columns, row, strict=True):
            if len(value) == 1 or value in elsewhere or f"{{{column}}}" not in texts:
                continue
            if found.setdefault(value, number) != number:
                ambiguous.add(value)
    return {value: number for value, number in found.items() if value not in ambiguous}


def mentioned(words: dict, text: str) -> set:
    """What the words that occur in a text stand for; of overlapping words the longest counts."""
    if not words:
        return set()
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join(re.escape(word) for word in longest_first)
    return {words[word] for word in re.findall(pattern, text)}
