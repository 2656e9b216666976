"""Preference tuning: tools/dpo.py makes the better of two stories more probable than the worse.

What is promised, in the order of this file:

    the loss    is that of the paper: against float64, one story at a time
    rewards     say by rules which of two stories is better; the corpus's own story is never the worse
    making      the model's own stories become pairs; interrupted, it goes on where it stopped
    reading     pairs come in the forms other people use; what cannot be used is counted and said
    runs        begin at log 2 and learn; resumed they have the same bits; two processes train as one
    mistakes    end with one line that says what to do
"""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    as_two_processes,
    assert_refused,
    copy_files,
    lines_of,
    metrics_of,
    run_here,
    same_state,
    small_model,
    tuning,
)
from test_sft import (
    ANSWER,
    END,
    USER,
    nats_of,
    open_rows,
    tell,
    tokenizer_of,
)

from common.checkpoint import build_model, find_checkpoints, read_checkpoint
from common.files import UserError
from stories.constraints import TEMPLATE, read_constraints
from stories.read import LeftOut
from stories.rewards import reward, score
from tools import dpo
from tools.dpo import (
    PreferenceDataset,
    Settings,
    choose_pair,
    pair_of,
    preference_loss,
)

# ---- The loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "nll_weight"), [(0.1, 0.0), (0.5, 0.7)])
def test_loss_metrics_and_gradients_equal_float64_one_story_at_a_time(beta, nll_weight):
    """Equation 7 of the paper, for three pairs and made-up log-probabilities of a reference."""
    rng = np.random.default_rng(0)
    pairs = []
    for length in (1, 3, 4):
        tokens = rng.integers(1, 97, 9).tolist()
        pairs.append((tokens[:2], tokens[-length:], tokens[2:5]))
    data = PreferenceDataset(Path("made up"), pairs, 24, 0, seed=0)
    data.reference_log_p = rng.normal(-15, 5, (3, 2)).astype(np.float32)
    model = small_model()
    metrics = preference_loss(model, data.sequences(range(3)), Settings(beta=beta, nll_weight=nll_weight))
    metrics["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}

    model = model.double()
    model.zero_grad()
    chosen = -torch.stack([nats_of(model, prompt, story) for prompt, story, _ in pairs])
    rejected = -torch.stack([nats_of(model, prompt, story) for prompt, _, story in pairs])
    chosen_gain = chosen - torch.tensor(data.reference_log_p[:, 0])
    rejected_gain = rejected - torch.tensor(data.reference_log_p[:, 1])
    margin = beta * (chosen_gain - rejected_gain)
    of_pairs = {
        "loss": torch.log(1 + torch.exp(-margin)) - nll_weight * chosen / torch.tensor([1, 3, 4]),
        "accuracy": (margin > 0).float(),
        "margin": margin,
        "chosen_log_p": chosen,
        "rejected_log_p": rejected,
        "kl": (chosen_gain**2 + rejected_gain**2) / 4,
    }
    expected = {name: values.sum() for name, values in of_pairs.items()}
    torch.testing.assert_close(metrics, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    expected["loss"].backward()
    exact = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(gradients, exact, rtol=1e-5, atol=1e-3, check_dtype=False)


# ---- Rewards ---------------------------------------------------------------------------------------


def test_rewards_by_hand():
    asked = {"词汇": "铲子，草地", "特点": "对话", "随机句子": "小兔笑了起来，大家都很高兴。"}

    def scored(story, finished=1.0, constraints=asked):
        return score(constraints, story) | {"finished": finished}

    best = scored("小兔说：“铲子在草地上。”小兔笑了起来，大家都很高兴。")
    assert reward(best, best) == 5 + 1 + 2  # what was asked for; it ends; its length, and no repetition
    one_word = scored("小兔拿着铲子回家了。后来小兔笑了起来，大家都很高兴。")
    assert reward(one_word, best) == 0.5 + 2 + 1 + 2
    cut_off = scored("铲子，铲子，铲子，铲子，铲子，铲子，铲子", finished=0.0)
    assert reward(cut_off, best) == 0.5 + 1  # it is long enough, but repeats itself
    assert reward(cut_off, cut_off) == 0.5 + 2  # no more than this reference does
    too_short = scored("小兔", constraints=None)
    assert reward(too_short, best) == 1 + 1
    assert reward(too_short) == 1 + 2  # nothing to compare its length with


HATS = {"词汇": "帽子"}
WITH = "小兔戴着帽子去森林里玩。"
ALSO_WITH = "小熊戴着帽子去森林里玩。"
WITHOUT = "小兔和小熊去森林里玩了。"
BROKEN = "小兔戴着帽子去森林里\ufffd玩。"


@pytest.mark.parametrize(
    ("samples", "of_corpus", "reference_chosen", "expected"),
    [
        ([WITHOUT, WITH], WITHOUT, True, (WITH, WITHOUT)),
        ([WITHOUT, WITHOUT], WITH, True, (WITH, WITHOUT)),  # the corpus has the better one
        ([WITHOUT, WITHOUT], WITH, False, None),
        ([WITH, WITH], WITHOUT, True, None),  # the corpus's story is never rejected
        ([WITHOUT, BROKEN, WITH], ALSO_WITH, True, (WITH, WITHOUT)),  # bytes that spell no text
        (["帽子", WITH], WITHOUT, True, (WITH, "帽子")),  # too short beside that of the corpus
        ([WITHOUT], BROKEN, True, None),
        ([BROKEN], WITH, True, None),
    ],
)
def test_the_best_and_the_worst_are_a_pair(samples, of_corpus, reference_chosen, expected):
    candidates = [(story, score(HATS, story) | {"finished": 1.0}) for story in [of_corpus, *samples]]
    pair = choose_pair(candidates[1:], candidates[0], reference_chosen)
    assert expected == (pair and (pair["chosen"], pair["rejected"]))


# ---- Making pairs ----------------------------------------------------------------------------------

MAKING = Settings(samples=8, instructions=28, seed=3)  # four batches, the last of four instructions


def sampler(seeds, most=99):
    """Stands for sample_pairs: a pair for each instruction, and an instruction without one in each batch."""

    def sample_pairs(model, tokenizer, data, indices, seed, s):
        if len(seeds) == most:
            raise KeyboardInterrupt
        seeds.append(seed)
        yield None, []
        for i in indices.tolist():
            yield {"prompt": i}, [{"length": 1.0}]

    return sample_pairs


@pytest.fixture
def make_pairs(tmp_path, monkeypatch):
    """Make pairs with such a sampler, in an empty folder. Returns what the file holds."""

    def make(sample_pairs, model_digest="a model's", data_path="train.bin", **changes):
        monkeypatch.setattr(dpo, "sample_pairs", sample_pairs)
        data = SimpleNamespace(packed=np.arange(100), path=data_path)
        s = dataclasses.replace(MAKING, **changes)
        dpo.make_pairs(tmp_path / "pairs.jsonl", None, None, data, model_digest, s)
        return pairs_in(tmp_path)

    return make


def pairs_in(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def test_interrupted_pairs_go_on_where_they_stopped(make_pairs, tmp_path):
    """Each batch is on the disk before the next; a line that was cut off is made again."""
    seeds = []
    whole = make_pairs(sampler(seeds))
    assert len(whole) == 28 and seeds == [3, 4, 5, 6]  # eight instructions a batch
    (path,) = tmp_path.iterdir()
    path.unlink()

    with pytest.raises(KeyboardInterrupt):
        make_pairs(sampler([], most=2))
    (part,) = tmp_path.iterdir()
    with open(part, "ab") as f:
        f.write('[{"prompt": "兔'.encode()[:-1])
    on_disk = []
    rest = sampler([])

    def watched(*args):
        on_disk.append([json.loads(line) for line in part.read_bytes().splitlines()])
        return rest(*args)

    assert make_pairs(watched) == whole
    assert [len(batches) for batches in on_disk] == [2, 3]
    assert list(tmp_path.iterdir()) == [path]


OTHERWISE = [
    {"model_digest": "another"},
    {"data_path": "other.bin"},
    {"samples": 100},  # an instruction a batch
    {"seed": 4},
    {"temperature": 0.5},
    {"reference_chosen": False},
]


@pytest.mark.parametrize("changes", OTHERWISE)
def test_pairs_made_otherwise_are_not_gone_on_with(changes, make_pairs):
    with pytest.raises(KeyboardInterrupt):
        make_pairs(sampler([], most=1), **changes)
    seeds = []
    make_pairs(sampler(seeds))
    assert len(seeds) == 4


def test_samples_stay_with_their_instruction(tiny_sft, monkeypatch):
    """Three for each of two instructions: what the model is asked, and whose the stories are."""
    data = open_rows(tiny_sft)
    tokenizer = tokenizer_of(tiny_sft)
    first, response = data.example(0)
    second, _ = data.example(5)
    model = SimpleNamespace(config=SimpleNamespace(block_size=256))

    def sample_stories(_, tokenizer, prompts, **options):
        assert prompts == [first.tolist()] * 3 + [second.tolist()] * 3
        longest = max(len(first), len(second))
        assert options == {"temperature": 0.7, "seed": 9, "max_new_tokens": 256 - longest}
        return [(str(i), i % 3 != 1) for i in range(6)]  # the second of each does not end

    monkeypatch.setattr(dpo, "sample_stories", sample_stories)
    s = Settings(samples=3, temperature=0.7)
    (pair, scores), (other, _) = dpo.sample_pairs(model, tokenizer, data, [0, 5], 9, s)
    assert pair["prompt"] == tokenizer.decode(first.tolist())
    assert pair["chosen"] == tokenizer.decode(response.tolist())  # the corpus's own is better
    assert (pair["rejected"], other["rejected"]) == ("1", "4")
    assert [one["finished"] for one in scores] == [1, 0, 1]


# ---- Reading pairs ---------------------------------------------------------------------------------

PAIR = {"prompt": "问", "chosen": "好", "rejected": "坏"}
ASK = {"role": "user", "content": "问"}
GOOD = {"role": "assistant", "content": "好"}
BAD = {"role": "assistant", "content": "坏"}
OTHER = {"role": "user", "content": "别的"}


@pytest.mark.parametrize(
    "record",
    [
        PAIR | {"rejected": " 坏\r\n", "system": ""},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        # UltraFeedback: the conversations repeat the prompt
        {"prompt": "问", "messages": [ASK, GOOD], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        # LLaMA-Factory: a turn, not a list, for each side; and Alpaca's keys
        {"conversations": [ASK], "chosen": GOOD, "rejected": BAD},
        {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏"},
    ],
)
def test_every_form_of_a_pair_is_read(record):
    assert pair_of(record, "x:1") == ("问", ("好", True), ("坏", True))


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ([], UserError, "x:7: expected an object"),
        ({"prompt": "问", "chosen": "好"}, UserError, "x:7: .* the keys here are chosen, prompt"),
        ({"chosen": [ASK, GOOD], "rejected": [OTHER, BAD]}, UserError, "x:7: .* different prompts"),
        (PAIR | {"rejected": "好 "}, LeftOut, "the same"),
        (PAIR | {"chosen": "\u200b\ufeff"}, LeftOut, "empty"),
        ({"prompt": [ASK, GOOD, ASK], "chosen": [GOOD], "rejected": [BAD]}, LeftOut, "several turns"),
    ],
)
def test_what_is_no_pair_is_refused_and_what_cannot_be_used_left_out(record, error, message):
    with pytest.raises(error, match=message):
        pair_of(record, "x:7")


@pytest.fixture
def read(tiny_sft, tmp_path):
    """Read pairs from a file: (what is to be trained on, what is held out)."""
    tokenizer = tokenizer_of(tiny_sft)

    def read_records(records, block_size=64, **changes):
        file = tmp_path / "pairs.json"
        file.write_text(json.dumps(records))
        return dpo.read_pairs([file], TEMPLATE, tokenizer, Settings(block_size=block_size, **changes))

    return read_records


def numbered(count, **changes):
    """Pairs of different prompts."""
    return [PAIR | {"prompt": f"问{i}"} | changes for i in range(count)]


def test_pairs_become_tokens_in_the_template(read, tiny_sft):
    """A row need not hold the last token, which is only a target."""
    tokenizer = tokenizer_of(tiny_sft)
    prompts = [[END, USER, *tokenizer.encode(f"问{i}"), ANSWER] for i in range(2)]
    good = [*tokenizer.encode("好"), END]
    bad = tokenizer.encode("坏")
    records = numbered(2, rejected_scores={"finished": 0.0})
    longest = len(prompts[0]) + len(good) - 1
    train_data, val_data = read(records, block_size=longest)
    expected = [(prompt, good, bad) for prompt in prompts]
    assert sorted(train_data.pairs + val_data.pairs) == expected
    with pytest.raises(UserError, match=rf"2 left out \(longer than block_size = {longest - 1}\)"):
        read(records, block_size=longest - 1)


def test_a_twentieth_of_the_prompts_is_held_out(read):
    """Each prompt is on one side, whatever the order, and validation does not depend on the seed."""
    records = numbered(200) + numbered(200, chosen="很好")
    train_data, val_data = read(records, seed=1)
    assert len(val_data) == 20
    prompts = [prompt for prompt, _, _ in val_data.pairs]
    assert not any(prompt in prompts for prompt, _, _ in train_data.pairs)
    _, other_val_data = read(records, seed=2)
    assert val_data.batch(0, 9)["tokens"].equal(other_val_data.batch(0, 9)["tokens"])
    _, reversed_data = read(records[::-1])
    assert reversed_data.pairs[0][0] == prompts[-1]


def test_what_is_left_out_is_counted(read, capsys):
    """Most of the pairs must be usable, some to learn from and some to validate with."""
    read([*numbered(8), *numbered(2, chosen="")])
    told = "7 train, 1 val pairs, 2 left out (empty)\n"
    assert capsys.readouterr().out.endswith(told)
    with pytest.raises(UserError, match=r"3 left out \(empty\)"):
        read([*numbered(2), *numbered(3, chosen="")])
    for i in range(2):
        records = numbered(2)
        records[i]["chosen"] = "好" * 999
        with pytest.raises(UserError, match="pairs of two prompts or more"):
            read(records)


# ---- Runs ------------------------------------------------------------------------------------------

PREFERRING = {
    "max_iters": 12,
    "save_interval": 4,
    "eval_interval": 6,
    "log_interval": 1,
    "batch_size": 4,
    "learning_rate": 0.001,
    "instructions": 24,
    "samples": 3,
}


def preferring(*paths, **changes):
    """The arguments of a small run of tools.dpo."""
    return tuning(*paths, **PREFERRING | changes)


def prefer(*paths, **changes):
    """What `python -m tools.dpo` prints."""
    return run_here(dpo, *preferring(*paths, **changes)).stdout


@pytest.fixture(scope="module")
def preferred(tuned, tiny_sft, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("preferred") / "out"
    prefer(tuned, tiny_sft, out)
    return out


@pytest.fixture
def stopped(preferred, tmp_path):
    """The same run as a kill before its last checkpoint would have left it."""
    return copy_files(preferred, tmp_path / "out", "pairs.jsonl", "ckpt_000008.pt", "metrics.jsonl")


def test_a_run_begins_as_its_reference_and_learns(preferred):
    """Loss log 2, no margin, no divergence, in training as in validation; sample.py reads what it leaves."""
    lines = metrics_of(preferred)
    first = lines[0]
    before = json.loads((preferred / "metrics.jsonl").read_text().splitlines()[0])
    for name, value in (("loss", math.log(2)), ("margin", 0), ("kl", 0)):
        assert first[name] == pytest.approx(value, abs=1e-4)
        assert before[f"val_{name}"] == pytest.approx(value, abs=1e-4)
    assert first["tokens"] == 4 * 2 * 256  # both stories of four pairs
    assert lines[-1]["loss"] < first["loss"] - 0.01
    assert tell(preferred, words="小兔")


def test_pairs_alone_are_made_if_asked_for(tuned, tiny_sft, preferred, tmp_path):
    """Most instructions give one, with the scores of both stories; the same ones every time."""
    out = tmp_path / "out"
    prefer(tuned, tiny_sft, out, make_pairs=True)
    assert not find_checkpoints(out)
    pairs = pairs_in(out)
    assert pairs == pairs_in(preferred)
    assert len(pairs) > 10
    for pair in pairs:
        asked = read_constraints(pair["prompt"])
        for side in ("chosen", "rejected"):
            scores = pair[f"{side}_scores"]
            assert scores.pop("finished") in (0, 1)
            assert scores == score(asked, pair[side])


def test_sampling_in_bfloat16_leaves_the_weights_in_float32(tuned, tiny_sft, tmp_path):
    prefer(tuned, tiny_sft, tmp_path, dtype="bfloat16", max_iters=1)
    assert read_checkpoint(tmp_path)["model"]["norm.weight"].dtype == torch.float32


def test_a_resumed_run_has_the_same_bits(preferred, stopped, tuned, tiny_sft):
    printed = prefer(tuned, tiny_sft, stopped, resume=True)
    assert "resuming at step 8" in printed
    same_state(stopped / "ckpt_000012.pt", preferred / "ckpt_000012.pt")
    assert lines_of(stopped) == lines_of(preferred)


def test_another_run_is_not_continued(stopped, tuned, tiny_sft):
    """Another model to begin with, another loss, or other pairs: the message says which."""
    earlier = find_checkpoints(tuned)[1]
    assert_refused(dpo, preferring(earlier, tiny_sft, stopped, resume=True), "another reference")
    assert_refused(dpo, preferring(tuned, tiny_sft, stopped, resume=True, beta=0.2), "beta")
    with open(stopped / "pairs.jsonl", "a") as f:
        f.write("\n")
    assert_refused(dpo, preferring(tuned, tiny_sft, stopped, resume=True), "another pairs")


def test_adapters_learn_from_ready_pairs(tuned, tmp_path):
    """Neither data is needed then, nor are the other weights changed."""
    file = tmp_path / "mine.json"
    out = tmp_path / "out"
    file.write_text(json.dumps(numbered(40)))
    printed = prefer(tuned, "no data", out, pairs=file, lora_rank=2, lora_alpha=6.0, max_iters=2)
    assert f"{file}: 38 train, 2 val pairs\n" in printed
    state = read_checkpoint(out)
    assert state["lora"] == {"rank": 2, "alpha": 6.0}
    before = read_checkpoint(tuned)["model"]
    for name, weight in build_model(state, out).state_dict().items():
        assert weight.equal(before[name]) != name.endswith("_proj.weight")


def test_two_processes_prefer_as_one(preferred, tuned, tmp_path):
    changes = {
        "pairs": preferred / "pairs.jsonl",
        "gradient_accumulation_steps": 2,
        "batch_size": 2,
        "optimizer": "adamw",
        "max_iters": 4,
    }
    one = tmp_path / "one"
    two = tmp_path / "two"
    as_two_processes("-m", "tools.dpo", *preferring(tuned, "no data", two, **changes))
    prefer(tuned, "no data", one, **changes)
    for line, other in zip(lines_of(one), lines_of(two), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-4)


# ---- Mistakes --------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named(tuned, pretrained, tiny_data, tiny_sft, tmp_path):
    out = tmp_path / "out"
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([PAIR, []]))
    assert_refused(dpo, preferring(pretrained, tiny_sft, out), pretrained, "sft.py")
    assert_refused(dpo, preferring(tuned, tiny_data, out), tiny_data, "--task sft")
    assert_refused(dpo, preferring(tuned, tiny_sft, out, block_size=257), tuned, "at most 256")
    assert_refused(dpo, preferring(tuned, tiny_sft, out, beta=0.0), "beta")
    assert_refused(dpo, preferring(tuned, tiny_sft, out, pairs=file), f"{file}, element 2")
    assert_refused(dpo, preferring(tuned, tiny_sft, out, pairs=file, make_pairs=True), "make_pairs")
