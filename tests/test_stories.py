"""The embedded corpus: its size, its schema, the agreement it promises, the same bytes every time."""

import collections
import hashlib
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from stories import generate


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "stories.jsonl"
    generate.write_corpus(path)
    return path, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_plots_have_no_mistakes():
    assert generate.check(generate.read_plots(), tries=60) == []


def test_size_of_the_material(corpus):
    _, stories = corpus
    names, animals = generate.read_cast()
    assert len(generate.read_plots()) >= 80
    assert len({n for ns in names.values() for n in ns} | {a["种类"] for g in animals.values() for a in g}) >= 60
    assert len({word for s in stories for word in s["instruction"]["words"]}) >= 600
    assert len({s["story_zh"] for s in stories}) == len(stories) >= 20_000


def test_schema(corpus):
    for story in corpus[1]:
        text = story["story_zh"]
        assert 120 <= len(text) <= 300
        assert len(set(story["instruction"]["words"])) == 3
        assert all(word in text for word in story["instruction"]["words"])
        assert set(story["instruction"]["features"]) <= set(generate.FEATURES)
        assert story["summary_zh"] and story["sentence_zh"] in text
        assert not re.search(r"[A-Za-z{}\[\]<>#|]", text + story["summary_zh"])
        assert ("对话" in story["instruction"]["features"]) == ("“" in text)


def test_quotes_pair_and_sentences_end(corpus):
    for story in corpus[1]:
        depth = 0
        for char in story["story_zh"]:
            depth += (char == "“") - (char == "”")
            assert depth in (0, 1), story["story_zh"]
        assert depth == 0 and re.search(r"[。！？…]”?$", story["story_zh"]), story["story_zh"]


def test_same_bytes_in_another_process(corpus, tmp_path):
    command = [sys.executable, "-m", "stories.generate", "--out", str(tmp_path / "again.jsonl")]
    subprocess.run(command, cwd=ROOT, check=True, env={"PYTHONHASHSEED": "7", "LANG": "C", "PATH": "/usr/bin"})
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (corpus[0], tmp_path / "again.jsonl")]
    assert digests[0] == digests[1]


def test_plots_come_in_equal_parts(corpus):
    counts = collections.Counter(s["source"] for s in corpus[1])
    mean = len(corpus[1]) / len(counts)
    assert min(counts.values()) > 0.5 * mean and max(counts.values()) < 1.5 * mean


def test_drawn_together_stays_together():
    """Rows of a table, guards and a character's columns agree, checked on a plot made for it."""
    plot = generate.Plot("试", "test", cast={"A": ["飞鸟", "孩子"]})
    plot.slots = [(["物", "量"], [["伞", "把"], ["马", "匹"]])]
    plot.words = ["伞", "马", "有"]
    telling = generate.Variant
    plot.beats = [
        [telling([], "{A}有一{量}{物}。", [])],
        [telling(["伞"], "打伞。", []), telling(["!伞"], "骑马。", [])],
    ]
    plot.beats += [[telling(["A飞鸟"], "{A.他}{A.走}走。", []), telling(["A孩子"], "{A.他}走。", [])]]
    plot.summaries = [telling([], "{A}的{物}。", [])]
    names, animals = generate.read_cast()
    birds = {a["种类"] for a in animals["飞鸟"]} | set(names["小名"])
    pronoun = dict.fromkeys(names["男孩"], "他") | dict.fromkeys(names["女孩"], "她")
    rng = generate.random.Random(0)
    for _ in range(200):
        text = generate.make_story(rng, plot, names, animals)["story_zh"]
        match = re.fullmatch(r"(.+)有一(把伞。打伞|匹马。骑马)。(它飞走|他走|她走)。", text)
        assert match and match[3] == ("它飞走" if match[1] in birds else pronoun[match[1]] + "走"), text
