"""The embedded corpus: its size, its schema, the agreement it promises, the same bytes every time."""

import collections
import hashlib
import json
import random
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


def mistakes_in(plots, tries):
    """Return the mistakes in the plots, one line each."""
    names, animals = generate.read_cast()
    groups, found = {"孩子", *animals}, []
    for plot in plots:
        columns = {c for cs, _ in plot.slots for c in cs}
        rows = {value for _, rows in plot.slots for row in rows for value in row}
        kinds = {a["种类"] for group in animals.values() for a in group} | groups | {"男孩", "女孩"}
        facts = rows | {letter + kind for letter in plot.cast for kind in kinds}
        used = {
            letter for letter in plot.cast for beat in plot.beats for t in beat if f"{{{letter}" in t.text
        }
        found += [f"{plot.name}: unknown group {g}" for gs in plot.cast.values() for g in set(gs) - groups]
        found += [f"{plot.name}: {letter} is cast but never named" for letter in set(plot.cast) - used]
        found += [f"{plot.name}: unknown feature {f}" for f in set(plot.features) - set(generate.FEATURES)]
        if len(plot.beats) < 5 or not plot.summaries or len(set(plot.words)) < 10:
            found.append(f"{plot.name}: needs at least 5 beats, a summary and 10 words")
        for variant in [*plot.summaries, *(t for beat in plot.beats for t in beat)]:
            bad = [f"guard <{g}> never holds" for g in variant.guards if g.lstrip("!") not in facts]
            bad += [
                f"unknown slot {{{a}}}"
                for a, _ in generate.SLOT.findall(variant.text)
                if a not in columns | set(plot.cast)
            ]
            bad += [f"unknown feature #{f}" for f in variant.features if f not in generate.FEATURES]
            bad += [
                c
                for c in "[]{}<>"
                if variant.text.count(c) != variant.text.count({"[": "]", "{": "}"}.get(c, c))
            ]
            if re.search(r"[,!?:;\"']|\.(?![^{}]*\})", variant.text):
                bad.append("Western punctuation")
            if variant.text.count("“") != variant.text.count("”"):
                bad.append("quotes do not match")
            found += [f"{plot.name}: {b} in {variant.text!r}" for b in bad]
        if any(f.startswith(f"{plot.name}") for f in found):
            continue
        rng = random.Random(1)
        drawn = [
            generate.make_story(rng, plot, names, animals, skew=1.0) for _ in range(tries)
        ]  # rare variants too
        good = [
            s
            for s in drawn
            if generate.MIN_CHARS <= len(s["story_zh"]) <= generate.MAX_CHARS
            and len(s["instruction"]["words"]) == 3
        ]
        text = "".join(s["story_zh"] for s in drawn)
        if len(good) < 0.9 * tries:
            short = sum(len(s["story_zh"]) < generate.MIN_CHARS for s in drawn)
            long = sum(len(s["story_zh"]) > generate.MAX_CHARS for s in drawn)
            found.append(
                f"{plot.name}: of {tries} stories {short} are under {generate.MIN_CHARS} characters, "
                f"{long} over {generate.MAX_CHARS}, {tries - len(good) - short - long} lack three words"
            )
        found += [f"{plot.name}: the word {w} occurs in no story" for w in plot.words if w not in text]
        for pattern in (
            "。。",
            "，，",
            "，。",
            "。，",
            "！。",
            "。！",
            "？。",
            "：。",
            "的的",
            "了了",
            "{",
            "[",
            "]",
        ):
            if pattern in text:
                found.append(f"{plot.name}: {pattern!r} in a story")
        if any(not s["summary_zh"] or not s["sentence_zh"] for s in drawn):
            found.append(f"{plot.name}: a story without a summary or a sentence")
        variants = [len(b) for b in plot.beats if len(b) < 3]
        if variants:
            found.append(f"{plot.name}: {len(variants)} beats have fewer than 3 variants")
    return found


def test_plots_have_no_mistakes():
    assert mistakes_in(generate.read_plots(), tries=60) == []


def test_size_of_the_material(corpus):
    _, stories = corpus
    names, animals = generate.read_cast()
    assert len(generate.read_plots()) >= 80
    assert (
        len({n for ns in names.values() for n in ns} | {a["种类"] for g in animals.values() for a in g}) >= 60
    )
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
    subprocess.run(
        command, cwd=ROOT, check=True, env={"PYTHONHASHSEED": "7", "LANG": "C", "PATH": "/usr/bin"}
    )
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (corpus[0], tmp_path / "again.jsonl")]
    assert digests[0] == digests[1]


def test_plots_come_in_equal_parts(corpus):
    counts = collections.Counter(s["source"] for s in corpus[1])
    mean = len(corpus[1]) / len(counts)
    assert min(counts.values()) > 0.5 * mean and max(counts.values()) < 1.5 * mean


def test_drawn_together_stays_together():
    """Rows of a table, guards and a character's columns agree, checked on a plot made for it."""
    plot = generate.Plot("试", cast={"A": ["飞鸟", "孩子"]})
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
    rng = random.Random(0)
    for _ in range(200):
        text = generate.make_story(rng, plot, names, animals)["story_zh"]
        match = re.fullmatch(r"(.+)有一(把伞。打伞|匹马。骑马)。(它飞走|他走|她走)。", text)
        assert match and match[3] == ("它飞走" if match[1] in birds else pronoun[match[1]] + "走"), text
