"""Heroes and objects that change in a story are found; the corpus itself has none."""

import random

import pytest

from stories.consistency import consistent
from stories.generate import make_story, read_cast, read_plots


@pytest.fixture(scope="module")
def drawn():
    """Four stories of every plot: {name: texts}."""
    (names, animals), rng = read_cast(), random.Random(5)
    return {p.name: [make_story(rng, p, names, animals)["story_zh"] for _ in range(4)] for p in read_plots()}


def test_the_corpus_is_consistent(drawn):
    found = [consistent(text) for texts in drawn.values() for text in texts]
    assert None not in found and sum(found) >= 0.99 * len(found)


def test_halves_of_two_stories_are_not(drawn):
    """The first half of one story and the second of another of its plot: nearly always another hero or
    object.
    """
    found = []
    for one, two, *_ in drawn.values():
        found.append(consistent(one[: len(one) // 2] + two[len(two) // 2 :]))
    assert sum(same is False for same in found) > 0.8 * len(found)


def test_a_hero_and_an_object_that_change(drawn):
    story = next(
        t for t in drawn["找不到了"] if "红帽子" in t or "花围巾" in t or "小汽车" in t or "跳绳" in t
    )
    value = next(v for v in ("红帽子", "花围巾", "小汽车", "跳绳") if v in story)
    assert consistent(story)
    at = story.rindex(value)
    assert consistent(story[:at] + "太阳镜" + story[at + len(value) :]) is False
    assert consistent(story + "小长颈鹿笑了。小海龟和小蚂蚁、小蜜蜂也笑了。") is False


@pytest.mark.parametrize(
    "text", ["", "好", "Once upon a time there was a fox.", "这是另外一种文字，讲的是别的事情。" * 5]
)
def test_other_stories_are_not_judged(text):
    assert consistent(text) is None


def test_real_stories_are_not_judged(shared):
    import json

    lines = (shared / "zh_stories.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    assert not any(consistent(json.loads(line)["story_zh"]) is not None for line in lines)
