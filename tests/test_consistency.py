"""stories/consistency.py: a hero or an object that changes in a story is found, by the rules of its plot.

First a plot made for the test, then the corpus, which has no such fault, and texts that are not judged.
"""

import itertools
import json

import pytest

from stories import consistency
from stories.consistency import consistent
from stories.generate import Plot, Variant, stories


@pytest.mark.parametrize(
    ("beginning", "expected"),
    [
        ("小兔找红帽子", True),
        ("小兔和兔妈妈找太阳镜", True),  # two names of one hero
        ("小鹿角虫和虫妈妈找太阳镜", True),  # there is no 小鹿
        ("小兔和小鹿找红帽子", False),
        ("小兔找红帽子和太阳镜", False),
    ],
)
def test_one_hero_and_one_object(beginning, expected, monkeypatch):
    """小猫 stands in the plot's own text, and so in every story of it."""
    plot = Plot("找", cast={"A": ["走兽"]}, slots=[(["物"], [["红帽子"], ["太阳镜"]])])
    plot.beats = [[Variant([], "{A}找{物}，在[家里|树下]到处找，小猫也来一起找。", [])]]
    heroes = {"小兔": "兔", "兔妈妈": "兔", "小鹿": "鹿", "小鹿角虫": "虫", "虫妈妈": "虫"}
    heroes["小猫"] = "猫"
    rules = [consistency.rules_of(plot, heroes)]
    monkeypatch.setattr(consistency, "all_rules", lambda: rules)
    assert consistent(f"{beginning}，在家里到处找，小猫也来一起找。") is expected


@pytest.fixture(scope="module")
def corpus():
    """About five stories of every plot, one behind the other."""
    return sorted(stories(500), key=lambda story: story["source"])


def test_the_corpus_is_consistent(corpus):
    found = [consistent(story["story_zh"]) for story in corpus]
    assert None not in found and found.count(True) >= 0.99 * len(found)


def test_a_parent_is_a_hero_too():
    assert {rules.heroes["兔妈妈"] for rules in consistency.all_rules()} == {"小兔"}


def test_halves_of_two_stories_are_not(corpus):
    """Of one plot: there is nearly always another hero or object in the second half."""
    found = []
    for one, two in itertools.pairwise(corpus):
        if one["source"] == two["source"]:
            found.append(consistent(one["story_zh"][:80] + two["story_zh"][80:]))
    assert found.count(False) > 0.8 * len(found)


@pytest.mark.parametrize("text", ["", "好", "Once upon a time.", "这是另外一种文字，讲的是别的事情。" * 5])
def test_other_texts_are_not_judged(text):
    assert consistent(text) is None


def test_other_stories_are_not_judged(shared):
    for line in (shared / "zh_stories.jsonl").read_text(encoding="utf-8").splitlines()[:200]:
        assert consistent(json.loads(line)["story_zh"]) is None
