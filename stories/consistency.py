"""Do the heroes and objects of a story stay the same? Rules for stories of the embedded corpus.

A small model changes them on the way: a giraffe becomes an elephant, sunglasses become a red hat. The plots of
stories/plots say which heroes a story has and which objects exclude each other, so a program can find this fault.
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


def n_grams(text: str) -> set[str]:
    return {text[i : i + SIZE] for i in range(len(text) - SIZE + 1)}


def rules_of(plot: Plot, heroes: dict[str, str]) -> Rules:
    """The rules of a plot. Words that stand in the plot's own texts say nothing, and are left out."""
    texts = [variant.text for beat in plot.beats for variant in beat]
    own = "\n".join(SLOT.sub("\n", CHOICE.sub(lambda match: f"\n{match[1]}\n".replace("|", "\n"), t)) for t in texts)
    slots: list[dict[str, int]] = []
    for columns, rows in plot.slots:
        elsewhere = own + "".join(f"\n{v}" for other, rs in plot.slots if other != columns for row in rs for v in row)
        values: dict[str, set[int]] = {}
        for number, row in enumerate(rows):
            for column, value in zip(columns, row, strict=True):
                if len(value) > 1 and value not in elsewhere and any(f"{{{column}}}" in text for text in texts):
                    values.setdefault(value, set()).add(number)
        slots.append({value: min(numbers) for value, numbers in values.items() if len(numbers) == 1})
    constant = own + "".join(f"\n{value}" for _, rows in plot.slots for row in rows for value in row)
    grams = set().union(*(n_grams(line) for line in own.split("\n")))
    return Rules(grams, len(plot.cast), {w: h for w, h in heroes.items() if w not in constant}, slots)


@functools.cache
def all_rules() -> list[Rules]:
    names, animals = read_cast()
    heroes = {name: name for sex in ("男孩", "女孩") for name in names[sex]}
    for group in animals.values():
        for animal in group:
            heroes |= {animal[column]: animal["种类"] for column in ("种类", "妈", "爸")}
    return [rules_of(plot, heroes) for plot in read_plots()]


def mentioned(words: dict, text: str) -> set:
    """What the words that occur in a text stand for; of overlapping words the longest counts."""
    if not words:
        return set()
    pattern = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    return {words[word] for word in re.findall(pattern, text)}


def consistent(story: str) -> bool | None:
    """Whether a story names no more heroes than its plot has, and of each slot one row; None for an unknown plot."""
    grams = n_grams(story)
    rules = max(all_rules(), key=lambda rules: len(grams & rules.grams))
    if not grams or len(grams & rules.grams) < KNOWN * len(grams):
        return None
    one_row = all(len(mentioned(slot, story)) <= 1 for slot in rules.slots)
    return one_row and len(mentioned(rules.heroes, story)) <= rules.n_heroes
