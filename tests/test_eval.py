"""The figures of tools/eval.py: each by hand or against a slow reference, and the whole command."""

import functools
import json
import math
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import assert_one_line_error, reseal, run_script, script_here
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sft import examples_in, length_of, strong

import stories.rewards
from common.checkpoint import build_model, find_checkpoints, read_checkpoint
from model import ModelConfig
from tools import eval as tool

# ---- The parts -------------------------------------------------------------------------------------


def by_recursion(a, b):
    """The longest common subsequence as it is defined."""

    @functools.cache
    def longest(i, j):
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


few = st.text("兔熊ab", max_size=14)


@settings(max_examples=500, deadline=None)
@given(few, few)
def test_common_subsequence(a, b):
    assert (
        stories.rewards.common_subsequence(a, b)
        == stories.rewards.common_subsequence(b, a)
        == by_recursion(a, b)
    )


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("兔兔兔", 0),
        ("兔兔兔兔", 0),  # one 4-gram
        ("兔兔兔兔兔", 1 / 2),
        ("兔" * 13, 9 / 10),
        ("从前有一只小兔子", 0),
        ("小兔说话小兔说话", 1 / 5),  # the last of five is the first again
        ("abcdeabcde", 2 / 7),
        ("🐰🐻🐰🐻🐰🐻", 1 / 3),  # characters, not bytes
    ],
)
def test_repeated_4grams(text, share):
    assert stories.rewards.repeated_4grams(text) == pytest.approx(share)


STORY = "小兔捡到一把铲子。“这是谁的？”它问小熊。小熊摇摇头，和它一起去找。"


def test_score_without_constraints():
    for asked in (None, {}):
        assert stories.rewards.score(asked, STORY) == {"length": len(STORY), "repeat_4gram": 0.0}
    assert stories.rewards.score(None, "") == {"length": 0, "repeat_4gram": 0.0}


@pytest.mark.parametrize(
    ("asked", "words", "words_all"),
    [
        ("铲子", 1.0, 1.0),
        ("铲子，小熊", 1.0, 1.0),
        ("铲子,草地、小熊", 2 / 3, 0.0),
        ("草地", 0.0, 0.0),
        ("铲 子", 0.0, 0.0),
    ],
)
def test_score_of_words(asked, words, words_all):
    found = stories.rewards.score({"词汇": asked}, STORY)
    assert found == {
        "length": len(STORY),
        "repeat_4gram": 0.0,
        "words": pytest.approx(words),
        "words_all": words_all,
    }


@pytest.mark.parametrize(
    ("asked", "exact", "near"),
    [
        ("小兔捡到一把铲子。", 1, 1),
        ("小熊摇摇头，和它一起去找。", 1, 1),
        ("“这是谁的？”它问小熊。", 1, 1),  # more than one of the story's sentences
        ("小兔捡到了一把铲子。", 0, 1),  # 8 of 9 in order
        ("小兔捡到一把小铲子！", 0, 1),
        ("小兔和我捡到一把铲子。", 0, 0),  # 8 of 10 in order is not above 80%
        ("子铲把一到捡兔小。", 0, 0),  # the same characters, in another order
        ("大象飞走了。", 0, 0),
        ("一", 1, 1),
    ],
)
def test_score_of_a_sentence(asked, exact, near):
    found = stories.rewards.score({"随机句子": asked}, STORY)
    assert (found["sentence_exact"], found["sentence_lcs80"]) == (exact, near)
    assert set(found) == {"length", "repeat_4gram", "sentence_exact", "sentence_lcs80"}


@pytest.mark.parametrize(
    ("asked", "story", "expected"),
    [
        ("对话", STORY, 1.0),
        ("转折，对话", STORY, 1.0),
        ("對話", "小兔說：「你好。」", 1.0),
        ("Dialogue, Twist", 'He said "no".', 1.0),
        ("对话", "小兔说你好。", 0.0),
        ("转折", STORY, None),  # not asked for
        ("没有对话", STORY, None),
    ],
)
def test_score_of_dialogue(asked, story, expected):
    assert stories.rewards.score({"特点": asked}, story).get("dialogue") == expected


def test_average_is_over_the_stories_a_figure_applies_to():
    scores = [{"length": 10, "words": 1.0}, {"length": 20}, {"length": 60, "words": 0.5}, {"dialogue": 0.0}]
    assert stories.rewards.average(scores) == {"length": 30, "words": 0.75, "dialogue": 0.0}


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_bits_of_the_references(batch_size, tiny_sft, pretrained):
    """However they are batched: the sum of each example's own, a target at a time in float64."""
    config = ModelConfig(**read_checkpoint(pretrained)["model_config"])
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tiny_sft / "tokenizer.model"))
    examples = [e for e in examples_in(tiny_sft, "val") if length_of(e) <= 256][:11]
    model, nats, characters = strong(config).double(), 0.0, 0
    for prompt, response in examples:
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + response[:-1]]))[0].log_softmax(-1)
        for i, token in enumerate(response):
            nats -= log_p[len(prompt) - 1 + i, token].item()
        characters += len(tokenizer.decode(response))
    found = tool.reference_bits(strong(config), tokenizer, examples, batch_size)
    assert found == pytest.approx(nats / math.log(2) / characters, rel=1e-5)


# ---- The command -----------------------------------------------------------------------------------


def eval_here(*args):
    return script_here(tool.main, "eval.py", *args)


def figures_of(path, *args):
    done = eval_here(*args, "--json", path)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.fixture
def spoilt(tiny_sft, tmp_path):
    """A copy of the data to change."""
    shutil.copytree(tiny_sft, tmp_path / "data")
    return tmp_path / "data"


def test_the_whole_command(tuned, pretrained, tiny_sft, tmp_path):
    """In a process of its own: one flat object of numbers, the shares between 0 and 1, and a line for each
    figure.
    """
    args = ("--ckpt", tuned, "--data", tiny_sft, "--num", 12, "--json", tmp_path / "figures.json")
    done = run_script("-m", "tools.eval", *args)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(type(value) in (int, float) and math.isfinite(value) for value in figures.values())
    shares = {
        "words_all",
        "finished",
        "repeat_4gram",
        "sentence_lcs80",
        "words",
        "sentence_exact",
        "dialogue",
    }
    assert shares | {"bits_per_char", "length"} <= set(figures)
    assert all(0 <= figures[name] <= 1 for name in shares) and figures["bits_per_char"] > 0
    too_long = sum(length_of(e) > 256 for e in examples_in(tiny_sft, "val"))
    assert too_long and (figures["examples"], figures["too_long"]) == (12, too_long)
    for text in ("12 held-out", "stories with all their words", f"{figures['bits_per_char']:.2f}",
                 f"{figures['finished']:.1%}"):  # fmt: skip
        assert text in done.stdout
    other = figures_of(
        tmp_path / "a" / "b" / "other.json", "--ckpt", pretrained, "--data", tiny_sft, "--num", 12
    )
    assert figures["bits_per_char"] < other["bits_per_char"] - 0.3  # the tuned model has learned something


def greedy(model, prompt, limit):
    """The likeliest token again and again, without cache or batch; whether it came to its end."""
    ids = []
    with torch.no_grad():
        while len(ids) < limit and len(prompt) + len(ids) < model.config.block_size:
            ids.append(model(torch.tensor([prompt + ids]))[0, -1].argmax().item())
            if ids[-1] == 2:
                return ids[:-1], 1.0
    return ids, 0.0


def test_figures_by_hand(spoilt, tuned, tmp_path):
    """One example after another: the likeliest story of a slow reference, scored by hand from what was
    asked.
    """
    path = find_checkpoints(tuned)[0]
    model = build_model(read_checkpoint(path), path)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(spoilt / "tokenizer.model"))
    examples = [e for e in examples_in(spoilt, "val") if length_of(e) <= 256][:6]
    scored = set()
    for prompt, response in examples:
        ids, finished = greedy(model, prompt, 256)
        story, answer = tokenizer.decode(ids), tokenizer.decode(response)
        asked = dict(line.split("：", 1) for line in tokenizer.decode(prompt).split("\n"))
        grams = [story[i : i + 4] for i in range(len(story) - 3)]
        expected = {
            "length": len(story),
            "finished": finished,
            "repeat_4gram": 1 - len({*grams}) / len(grams),
        }
        expected |= {"reference_length": len(answer), "examples": 1, "too_long": 0}
        if "词汇" in asked:
            present = [word in story for word in asked["词汇"].split("，")]
            expected |= {"words": sum(present) / len(present), "words_all": float(all(present))}
        if "随机句子" in asked:
            expected["sentence_exact"] = float(asked["随机句子"] in story)
        if "对话" in asked.get("特点", "").split("，"):
            expected["dialogue"] = float("“" in story)
        np.array(prompt[1:] + response, dtype="<u2").tofile(spoilt / "val.bin")
        reseal(spoilt)
        figures = figures_of(tmp_path / "figures.json", "--ckpt", path, "--data", spoilt, "--temperature", 0)
        assert {name: figures.get(name) for name in expected} == pytest.approx(expected)
        others = {
            "bits_per_char",
            "sentence_lcs80",
            "reference_repeat_4gram",
            "consistent",
            "reference_consistent",
        }
        assert figures.keys() - expected.keys() <= others
        scored |= expected.keys()
    assert {"words_all", "sentence_exact", "dialogue"} <= scored


def test_figures_do_not_depend_on_how_many_stories_are_told_at_once(tuned, tiny_sft, tmp_path):
    """A long instruction beside a short one must not cut the other's story."""
    args = ("--ckpt", tuned, "--data", tiny_sft, "--num", 9, "--temperature", 0)
    one, three, all_ = (figures_of(tmp_path / "a.json", *args, "--batch_size", size) for size in (1, 3, 50))
    assert one["examples"] > 4
    assert three == pytest.approx(one) and all_ == pytest.approx(one)


def test_the_best_of_several(tuned, tiny_sft, tmp_path):
    """Of the same samples the best has at least as many words as a single one; the heading says how many."""
    args = ("--ckpt", tuned, "--data", tiny_sft, "--num", 20)
    one, best = (
        figures_of(tmp_path / "a.json", *args, "--best_of", n, "--batch_size", 8 * n) for n in (1, 8)
    )
    assert best["words"] > one["words"] and best["words_all"] >= one["words_all"] and best["examples"] == 20
    assert "best of 8" in eval_here(*args, "--num", 2, "--best_of", 8).stdout
    assert_one_line_error(eval_here(*args, "--best_of", 0), "--best_of 0")


def test_two_checkpoints_side_by_side(tuned, tiny_sft, tmp_path):
    """A column each, in the order given; the file has the figures of the last."""
    new, old = find_checkpoints(tuned)
    args = ("--data", tiny_sft, "--num", 5)
    columns = [figures_of(tmp_path / "one.json", "--ckpt", path, *args) for path in (old, new)]
    done = eval_here("--ckpt", old, "--ckpt", new, *args, "--json", tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two.json").read_text()) == columns[1] != columns[0]
    (head,) = [line for line in done.stdout.splitlines() if old.name in line]
    assert head.split() == [old.name, new.name, "references"]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("characters in a story")]
    expected = [columns[0]["length"], columns[1]["length"], columns[0]["reference_length"]]
    assert line.split()[-3:] == [f"{value:.2f}" for value in expected]


def test_the_same_seed_gives_the_same_figures(tuned, tmp_path):
    """Without --data, that of the checkpoint; another seed tells other stories of the same references."""
    args = ("--ckpt", tuned, "--num", 6)
    one, again, other = (figures_of(tmp_path / "a.json", *args, "--seed", seed) for seed in (7, 7, 8))
    assert one == again and one["length"] != other["length"]
    assert (
        one["bits_per_char"] == other["bits_per_char"]
        and one["reference_length"] == other["reference_length"]
    )


def test_show(tuned):
    """The first stories of each checkpoint, and no more."""
    for show in (0, 1, 3):
        done = eval_here("--ckpt", tuned, "--num", 6, "--show", show)
        assert done.stdout.split("held-out")[0].count("\n---\n") == max(show - 1, 0)


# ---- Bad input -------------------------------------------------------------------------------------


def test_what_is_not_there(tuned, tiny_data, tmp_path):
    assert_one_line_error(eval_here("--ckpt", tmp_path / "none"), tmp_path / "none")
    assert_one_line_error(eval_here("--ckpt", tmp_path), tmp_path, "ckpt_*.pt")
    assert_one_line_error(
        eval_here("--ckpt", tuned, "--data", tmp_path / "none"), tmp_path / "none", "prepare.py"
    )
    assert_one_line_error(
        eval_here("--ckpt", tuned, "--data", tiny_data), tiny_data, "instructions", "--task sft"
    )
    assert_one_line_error(eval_here(), "--ckpt")
    assert_one_line_error(
        run_script("-m", "tools.eval", "--ckpt", tmp_path / "none", check=False), tmp_path / "none"
    )
    (tmp_path / "file").write_text("a file")
    done = eval_here("--ckpt", tmp_path / "none", "--json", tmp_path / "file" / "a.json")
    assert_one_line_error(done, tmp_path / "file")  # at once, before anything is evaluated


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("num", ["0", "-1", "x"]),
        ("batch_size", ["0", "1.5"]),
        ("temperature", ["-1", "nan", "hot"]),
        ("top_k", ["-1"]),
        ("top_p", ["0", "-1", "1.5", "nan"]),
        ("seed", ["-1", str(2**64), "x"]),
        ("device", ["banana"]),
    ],
)
def test_bad_values(key, values, tuned):
    """As sample.py refuses them."""
    for value in values:
        assert_one_line_error(eval_here("--ckpt", tuned, "--num", 1, f"--{key}={value}"), key)


def test_data_of_another_tokenizer(spoilt, tuned, pretrained, tmp_path):
    state = read_checkpoint(pretrained)
    torch.save(state | {"tokenizer": state["tokenizer"] + b"\x3a\x00"}, tmp_path / "other.pt")
    assert_one_line_error(eval_here("--ckpt", tmp_path / "other.pt", "--data", spoilt), spoilt, "tokenizer")
    (spoilt / "tokenizer.model").write_bytes(b"none")
    assert_one_line_error(eval_here("--ckpt", tuned, "--data", spoilt), spoilt, "tokenizer")


def test_no_example_fits(spoilt, tuned):
    np.array([4, *[300] * 400, 5, 300, 2], dtype="<u2").tofile(spoilt / "val.bin")
    reseal(spoilt)
    assert_one_line_error(eval_here("--ckpt", tuned, "--data", spoilt), "val.bin", "256")


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "stories", "no end", "odd"])
def test_damaged_examples(kind, spoilt, tuned):
    """A token beyond the vocabulary is found by tools.check (test_check.py)."""
    path = spoilt / "val.bin"
    ids = np.fromfile(path, dtype="<u2")
    damaged = {
        "empty": ids[:0],
        "cut": ids[:-2],
        "stories": ids[ids != 5],
        "no end": ids[ids != 2],
        "odd": ids,
    }
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[kind].astype("<u2").tobytes() + b"\0" * (kind == "odd"))
        reseal(spoilt)
    assert_one_line_error(eval_here("--ckpt", tuned, "--data", spoilt), "val.bin")


def test_token_file_that_is_cut_to_one_example(spoilt, tuned, tmp_path):
    """Few are no mistake."""
    ids = np.fromfile(spoilt / "val.bin", dtype="<u2").tolist()
    ends = [i + 1 for i, token in enumerate(ids) if token == 2]
    short = next((a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True) if b - a <= 256)
    np.array(ids[slice(*short)], dtype="<u2").tofile(spoilt / "val.bin")
    reseal(spoilt)
    figures = figures_of(tmp_path / "a.json", "--ckpt", tuned, "--data", spoilt)
    assert figures["examples"] == 1 and figures["too_long"] == 0
