"""`python -m tools.eval`: how well a model follows held-out instructions.

- It prints a line for each metric and a column for each checkpoint, and writes the last column as JSON.
- Every metric is the mean over the instructions that ask for it, of stories sampled in batches of any size,
  or of the best of several stories.
- bits_per_char is what the references cost, summed a token at a time.

The order: the command, the scores of stories/rewards.py that it averages, mistakes of the user.
"""

import json
import math
import shutil

import pytest
import sentencepiece
import torch
from helpers import assert_refused, meta_of, reseal, run_here, run_script
from test_sft import examples_in, length_of

from common.checkpoint import build_model, read_checkpoint
from stories.constraints import read_constraints
from stories.rewards import average, can_choose, common_subsequence, findings, repeated_4grams, reward, score
from tools import eval as tool


def metrics_of(tmp_path, *args):
    """What tools.eval writes for these arguments."""
    path = tmp_path / "metrics.json"
    run_here(tool, "--dtype=float32", *args, "--json", path)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def held_out(tiny_sft):
    """The held-out examples that the model can read: a prompt and a response each, as tokens."""
    return [example for example in examples_in(tiny_sft, "val") if length_of(example) <= 256]


# ---- The command -----------------------------------------------------------------------------------


def test_the_command(tuned, tiny_sft, held_out, tmp_path):
    """As a user types it: a line for each metric, stories to read, and the metrics as a file."""
    path = tmp_path / "new" / "metrics.json"
    args = ("--data", tiny_sft, "--num", 12, "--show", 3, "--json", path)
    done = run_script("-m", "tools.eval", "--ckpt", tuned, *args)
    metrics = json.loads(path.read_text())
    stories, table = done.stdout.split("12 held-out instructions of")
    assert stories.count("\n---\n") == 2
    for label in tool.LABELS.values():
        assert label in table
    assert f"{metrics['bits_per_char']:.2f}" in table and f"{metrics['repeat_4gram']:.1%}" in table
    assert metrics["examples"] == 12
    assert metrics["too_long"] == meta_of(tiny_sft)["val"]["stories"] - len(held_out) > 0


def likeliest_story(model, prompt, limit):
    """The likeliest token again and again, without cache or batch; and whether it came to its end."""
    ids = []
    while len(ids) < limit:
        token = model(torch.tensor([prompt + ids]))[0, -1].argmax().item()
        if token == 2:
            return ids, True
        ids.append(token)
    return ids, False


@pytest.fixture(scope="module")
@torch.no_grad()
def by_hand(tuned, tiny_sft, held_out):
    """The metrics of four examples, one example and one token at a time."""
    model = build_model(read_checkpoint(tuned), tuned)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tiny_sft / "tokenizer.model"))
    room = 256 - max(len(prompt) for prompt, _ in held_out[:4])
    scores = []
    references = []
    nats = 0.0
    for prompt, response in held_out[:4]:
        constraints = read_constraints(tokenizer.decode(prompt))
        ids, finished = likeliest_story(model, prompt, room)
        scores.append(score(constraints, tokenizer.decode(ids)) | {"finished": finished})
        references.append(score(None, tokenizer.decode(response)))
        log_p = model(torch.tensor([prompt + response[:-1]]))[0].double().log_softmax(-1)
        for i, token in enumerate(response, start=len(prompt) - 1):
            nats -= log_p[i, token].item()
    metrics = average(scores) | {"examples": 4}
    for name, value in average(references).items():
        metrics[f"reference_{name}"] = value
    metrics["bits_per_char"] = nats / math.log(2) / (4 * metrics["reference_length"])
    return metrics


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_metrics_by_hand(batch_size, by_hand, tuned, tmp_path):
    """However many stories are told at once, by default of the data that the checkpoint was tuned on."""
    args = ("--num", 4, "--temperature", 0, "--batch_size", batch_size)
    metrics = metrics_of(tmp_path, "--ckpt", tuned, *args)
    assert metrics["reference_consistent"] == 1
    for name in ("too_long", "consistent", "reference_consistent"):
        metrics.pop(name, None)
    assert metrics == pytest.approx(by_hand, rel=1e-4)


def test_the_best_story_of_each_instruction_counts(tuned, tmp_path, monkeypatch):
    """Of each four stories only the last has what was asked for; every batch has a seed of its own."""
    batches = {}

    def tell(model, tokenizer, prompts, **options):
        batches[options["seed"]] = len(prompts)
        stories = []
        for i, prompt in enumerate(prompts):
            good = i % 4 == 3
            stories.append((tokenizer.decode(prompt) * good, good))
        return stories

    monkeypatch.setattr(tool, "sample_stories", tell)
    args = ("--ckpt", tuned, "--num", 7, "--best_of", 4, "--batch_size", 13)
    metrics = metrics_of(tmp_path, *args)
    for name in ("words", "words_all", "sentence_exact", "finished"):
        assert metrics[name] == 1
    assert batches == {1337: 12, 1340: 12, 1343: 4}
    assert ", best of 4\n" in run_here(tool, *args).stdout


def test_checkpoints_side_by_side(pretrained, tuned, tiny_sft, tmp_path):
    """A column each, in the order given, by default on the data of the last, whose metrics the file has."""
    one = metrics_of(tmp_path, "--ckpt", pretrained, "--data", tiny_sft, "--num", 5)
    two = metrics_of(tmp_path, "--ckpt", tuned, "--num", 5)
    args = ("--dtype=float32", "--ckpt", pretrained, "--ckpt", tuned, "--num", 5)
    done = run_here(tool, *args, "--json", tmp_path / "both.json")
    assert json.loads((tmp_path / "both.json").read_text()) == two != one
    table = [line.split() for line in done.stdout.splitlines()]
    assert [pretrained.name, tuned.name, "references"] in table
    lengths = [f"{length:.2f}" for length in (one["length"], two["length"], one["reference_length"])]
    assert ["characters", "in", "a", "story", *lengths] in table


# ---- The scores ------------------------------------------------------------------------------------

STORY = "小兔捡到一把铲子。“这是谁的？”它问小熊。小熊摇摇头，和它一起去找。"


@pytest.mark.parametrize(
    ("words", "share", "all_present"),
    [("铲子；小熊", 1, 1), ("铲子,草地、小熊", 2 / 3, 0), ("铲 子", 0, 0)],
)
def test_score_of_words(words, share, all_present):
    scores = score({"词汇": words}, STORY)
    assert scores == {"length": 34, "repeat_4gram": 0, "words": share, "words_all": all_present}


@pytest.mark.parametrize(
    ("sentence", "exact", "near"),
    [
        ("“这是谁的？”它问小熊。", 1, 1),
        ("小兔捡到了一把铲子。", 0, 1),  # 8 characters of 9 in their order
        ("小兔和我捡到一把铲子。", 0, 0),  # 8 of 10, which is not above 80%
        ("子铲把一到捡兔小。", 0, 0),
    ],
)
def test_score_of_a_sentence(sentence, exact, near):
    scores = score({"随机句子": sentence}, STORY)
    assert scores == {"length": 34, "repeat_4gram": 0, "sentence_exact": exact, "sentence_lcs80": near}


@pytest.mark.parametrize("asked", [None, {"特点": "没有对话", "摘要": "小兔"}])
def test_what_is_not_asked_for_has_no_score(asked):
    assert score(asked, STORY) == {"length": 34, "repeat_4gram": 0}
    assert not can_choose(asked)
    assert can_choose({"特点": "转折，对话"})


@pytest.mark.parametrize("feature", ["对话", "對話", "Dialogue"])
@pytest.mark.parametrize("quoted", ["小兔说：“你好。”", "小兔說：「你好。」", "『你好。』", 'He said "no".'])
def test_dialogue_in_every_kind_of_quotes(feature, quoted):
    assert score({"特点": feature}, quoted)["dialogue"] == 1
    assert score({"特点": feature}, "小兔说你好。")["dialogue"] == 0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("兔兔兔", 0),
        ("兔兔兔兔", 0),  # one 4-gram
        ("兔兔兔兔兔", 1 / 2),
        ("小兔说话小兔说话", 1 / 5),  # the last of five is the first again
        ("🐰🐻🐰🐻🐰🐻", 1 / 3),  # characters, not bytes
    ],
)
def test_repeated_4grams(text, share):
    assert repeated_4grams(text) == pytest.approx(share)


def subsequences(text):
    """What is left of a text if any of its characters are struck out."""
    found = {""}
    for character in text:
        found |= {beginning + character for beginning in found}
    return found


@pytest.mark.parametrize("b", ["", "兔", "abab", "baab", "兔ab熊ba", "ba熊兔ab", "aaabbb", "熊bab兔a"])
@pytest.mark.parametrize("a", ["", "abba", "兔ba熊ab", "bbbaaa", "ab兔熊ab"])
def test_common_subsequence(a, b):
    common = subsequences(a) & subsequences(b)
    assert common_subsequence(a, b) == max(map(len, common))


def test_a_mean_is_over_the_stories_a_score_applies_to():
    scores = [{"length": 10, "words": 1.0}, {"length": 20}, {"length": 60, "words": 0.5}, {"dialogue": 0.0}]
    assert average(scores) == {"length": 30, "words": 0.75, "dialogue": 0}


@pytest.mark.parametrize(
    ("name", "value", "points"),
    [
        ("words", 0.5, 2.5),
        ("words_all", 1, 3),
        ("sentence_exact", 1, 3),
        ("sentence_lcs80", 1, 3),
        ("dialogue", 1, 3),
        ("finished", 1, 3),
        ("repeat_4gram", 0.14, 2),  # 5% more than the reference's are allowed
        ("repeat_4gram", 0.16, 1),
        ("length", 50, 2),  # half to twice the reference's
        ("length", 200, 2),
        ("length", 49, 1),
        ("length", 201, 1),
    ],
)
def test_reward(name, value, points):
    scores = {"length": 100, "repeat_4gram": 0} | {name: value}
    assert reward(scores, {"length": 100, "repeat_4gram": 0.1}) == points


def test_reward_without_a_reference():
    assert reward({"length": 7, "repeat_4gram": 0.05}) == 2
    assert reward({"length": 7, "repeat_4gram": 0.06}) == 1


def test_findings():
    asked = {"词汇": "铲子，草地", "随机句子": "小兔捡到了一把铲子。", "特点": "对话"}
    assert findings(asked, STORY) == {"missing": ["草地"], "sentence": "nearly", "dialogue": True}
    assert findings(asked, "草地。") == {"missing": ["铲子"], "sentence": "missing", "dialogue": False}
    assert findings({"随机句子": "它问小熊。"}, STORY) == {"sentence": "exact"}
    assert findings(None, STORY) == {}


# ---- Mistakes of the user --------------------------------------------------------------------------


def test_what_is_not_there(tuned, tiny_data, tmp_path):
    none = tmp_path / "none"
    (tmp_path / "file").touch()
    assert_refused(tool, [], "--ckpt")
    assert_refused(tool, ["--ckpt", none], none)
    assert_refused(tool, ["--ckpt", tmp_path], tmp_path, "ckpt_*.pt")
    assert_refused(tool, ["--ckpt", tuned, "--data", none], none, "prepare.py")
    assert_refused(tool, ["--ckpt", tuned, "--data", tiny_data], tiny_data, "--task sft")
    # At once, before the checkpoint is read.
    assert_refused(tool, ["--ckpt", none, "--json", tmp_path / "file" / "a.json"], tmp_path / "file")


@pytest.mark.parametrize(
    "option",
    [
        "--num=0",
        "--batch_size=0",
        "--best_of=0",
        "--top_p=0",
        "--device=banana",
    ],
)
def test_bad_values(option, tuned):
    assert_refused(tool, ["--ckpt", tuned, "--num=1", option], option.split("=")[1])


def test_damaged_data(tuned, tiny_sft, tmp_path):
    """Every kind of damage is in test_sft.py."""
    data = shutil.copytree(tiny_sft, tmp_path / "data")
    (data / "val.bin").write_bytes(b"")
    reseal(data)
    assert_refused(tool, ["--ckpt", tuned, "--data", data], "val.bin")
    (data / "tokenizer.model").write_bytes(b"none")
    assert_refused(tool, ["--ckpt", tuned, "--data", data], data, "tokenizer")
