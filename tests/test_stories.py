"""The embedded corpus: 24,000 stories that stories/generate.py makes of the plots in stories/plots.

- A plot names only what exists, and its stories have no mistake that a program can find. Whoever writes a
  plot runs `python -m pytest tests/test_stories.py`, which shows the plot and what is wrong with it.
- What is drawn together in a story stays together: an object and its measure word, a hero and its pronoun.
- The whole corpus has its size and its schema, and is the same on every computer.
"""

import collections
import itertools
import json
import random
import re

import pytest
from helpers import run_script

from stories import generate

NAMES, ANIMALS = generate.read_cast()
PLOTS = generate.read_plots()
KINDS = {"男孩", "女孩", "孩子", *ANIMALS}  # of heroes, as guards name them
for group in ANIMALS.values():
    KINDS.update(animal["种类"] for animal in group)

# ---- The plots -------------------------------------------------------------------------------------

every_plot = pytest.mark.parametrize("plot", PLOTS)


@every_plot
def test_a_plot_names_only_what_exists(plot):
    assert len(plot.beats) >= 5 and min(map(len, plot.beats)) >= 3
    assert plot.summaries and len(set(plot.words)) >= 10
    slots = set(plot.cast)
    facts = set()
    for columns, rows in plot.slots:
        slots.update(columns)
        facts.update(*rows)
    for letter, groups in plot.cast.items():
        assert set(groups) <= {"孩子", *ANIMALS}
        facts.update(letter + kind for kind in KINDS)
    used = set()
    features = set(plot.features)
    for variant in itertools.chain(plot.summaries, *plot.beats):
        used.update(slot for slot, _ in generate.SLOT.findall(variant.text))
        features.update(variant.features)
        assert facts.issuperset(guard.removeprefix("!") for guard in variant.guards), variant
    assert plot.cast.keys() <= used <= slots
    assert features <= set(generate.FEATURES)


MISTAKE = re.compile(r"[,!?:;\"'.\[\]{}<>|#A-Za-z]|[，。：][，。]|。！|[！？]。|的的|了了")


@every_plot
def test_the_stories_of_a_plot_have_no_mistake(plot):
    """Of 60 that have the rare variants too, nine in ten are long enough and have three words."""
    rng = random.Random(1)
    stories = [generate.make_story(rng, plot, NAMES, ANIMALS, skew=1.0) for _ in range(60)]
    text = "".join(story["story_zh"] + story["summary_zh"] for story in stories)
    assert MISTAKE.findall(text) == []
    assert [word for word in plot.words if word not in text] == []
    complete = 0
    for story in stories:
        assert story["summary_zh"] and story["sentence_zh"]
        has_words = len(story["instruction"]["words"]) == 3
        complete += has_words and 120 <= len(story["story_zh"]) <= 300
    assert complete >= 54


# ---- From a plot to a story ------------------------------------------------------------------------


def test_a_line_of_a_plot_is_read():
    variant = generate.read_variant("- <A孩子 !雨> {A}[慢慢|]笑了。 #对话 #转折")
    assert variant == generate.Variant(["A孩子", "!雨"], "{A}[慢慢|]笑了。", ["对话", "转折"])


def test_what_is_drawn_together_stays_together():
    """The columns of a slot, guards, the columns of a hero and the features, in a plot made for it."""
    plot = generate.Plot("试", cast={"A": ["飞鸟", "孩子"]})
    plot.slots = [(["物", "量"], [["伞", "把"], ["马", "匹"]])]
    plot.words = ["伞", "马", "有", "一", "走", "雨"]
    beats = [
        ["- {A}有一{量}{物}。雨、雨、雨。"],
        ["- <伞> 打伞。", "- <!伞> 骑马。 #转折"],
        ["- <A飞鸟> {A.他}{A.走}走。", "- <A男孩> {A.他}走。", "- <A女孩> {A.他}走。"],
    ]
    plot.beats = [list(map(generate.read_variant, lines)) for lines in beats]
    plot.summaries = [generate.read_variant("- {A}的{物}。")]
    walks = dict.fromkeys(NAMES["男孩"], "他走") | dict.fromkeys(NAMES["女孩"], "她走")
    rng = random.Random(0)
    words = collections.Counter()
    for _ in range(200):
        story = generate.make_story(rng, plot, NAMES, ANIMALS)
        name = story["story_zh"].split("有")[0]
        walk = walks.get(name, "它飞走")
        told = {
            f"{name}有一把伞。雨、雨、雨。打伞。{walk}。": (f"{name}的伞。", []),
            f"{name}有一匹马。雨、雨、雨。骑马。{walk}。": (f"{name}的马。", ["转折"]),
        }
        summary, features = told[story["story_zh"]]
        assert story["summary_zh"] == summary
        assert story["instruction"]["features"] == features
        words.update(story["instruction"]["words"])
    assert words["雨"] > 190 > words["走"]  # what occurs often is what a story is about


def test_no_two_heroes_share_a_name_or_a_kind():
    rng = random.Random(0)
    for _ in range(20):
        taken = set()
        heroes = [generate.draw_hero(rng, ["两栖"], NAMES, ANIMALS, taken) for _ in ANIMALS["两栖"]]
        for column in ("名", "种类"):
            assert len({hero[column] for hero in heroes}) == len(heroes)


def test_the_first_variants_are_common():
    """Of four the first is drawn 8 times in 10."""
    rng = random.Random(0)
    drawn = [generate.pick(rng, "甲乙丙丁", generate.SKEW) for _ in range(1000)]
    assert 750 < drawn.count("甲") < 850 and drawn.count("丁") > 0


# ---- The whole corpus ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "stories.jsonl"
    generate.write_corpus(path)
    return path.read_text(encoding="utf-8").splitlines()


def test_every_story_has_the_schema(lines):
    """And there are 24,000, all different, in equal parts of every plot."""
    texts = set()
    words = set()
    plots = collections.Counter()
    for line in lines:
        story = json.loads(line)
        text = story["story_zh"]
        instruction = story["instruction"]
        texts.add(text)
        words.update(instruction["words"])
        plots[story["source"]] += 1
        assert 120 <= len(text) <= 300 and story["summary_zh"]
        assert len(set(instruction["words"])) == 3
        assert all(word in text for word in instruction["words"])
        assert story["sentence_zh"] in text and 8 <= len(story["sentence_zh"]) <= 40
        assert ("对话" in instruction["features"]) == ("“" in text)
        assert re.search("[。！？…]”?$", text), text
        assert re.sub("[^“”]", "", text).replace("“”", "") == "", text
    assert len(lines) == len(texts) == 24_000
    assert len(words) >= 600 and len(PLOTS) >= 80
    assert len(plots) == len(PLOTS) and max(plots.values()) < 2 * min(plots.values())


def test_the_same_bytes_in_another_process(lines, tmp_path):
    """As a user runs it, with other hashes of strings and another locale."""
    out = tmp_path / "again.jsonl"
    run_script("-m", "stories.generate", "--out", out, "--count", 300, PYTHONHASHSEED="7", LC_ALL="C")
    assert out.read_bytes() == "".join(line + "\n" for line in lines[:300]).encode()
