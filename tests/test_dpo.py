"""Preference tuning: tools/dpo.py makes the better of two stories more probable than the worse.

What is promised, in the order of this file:

    the loss    is that of the paper: against a slow loop in float64, and against TRL where it is installed
    rewards     say by rules which of two stories is better; the corpus's own story is never the worse
    making      the model's own stories become pairs; interrupted, it goes on where it stopped
    reading     pairs come in the forms other people use; what cannot be used is counted and said
    runs        begin at log 2 and learn; resumed they have the same bits; two processes train as one
    mistakes    end with one line that says what to do
"""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    as_transformers,
    as_two_processes,
    assert_refused,
    lines_of,
    metrics_of,
    run_here,
    same,
    same_state,
    small_model,
    start_script,
    tuning,
)
from test_sft import ANSWER, END, USER, examples_in, open_rows, tell, tokenizer_of

from common import run
from common.checkpoint import find_checkpoints, read_checkpoint
from common.files import UserError
from model import IGNORE
from stories.constraints import TEMPLATE, read_constraints
from stories.read import LeftOut
from stories.rewards import reward, score
from tools import dpo
from tools.dpo import PreferenceDataset, Settings, choose_pair, log_probs, pair_of, preference_loss

METRICS = {"loss", "accuracy", "margin", "chosen_log_p", "rejected_log_p", "kl"}

# ---- The loss --------------------------------------------------------------------------------------


def pairs_for(model):
    """Five made-up pairs of different lengths, and made-up log-probabilities of a reference."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(5):
        texts = [rng.integers(1, model.config.vocab_size, rng.integers(2, 8)).tolist() for _ in range(3)]
        pairs.append(texts)
    data = PreferenceDataset(Path("made up"), pairs, 24, 0, seed=0)
    data.reference_log_p = rng.normal(-20, 5, (5, 2)).astype(np.float32)
    return data


def log_p_by_hand(model, prompt, answer):
    """A token after the other."""
    total = 0.0
    seen = list(prompt)
    for token in answer:
        logits = model(torch.tensor([seen]))[0, -1]
        total = total + logits[token] - logits.logsumexp(0)
        seen.append(token)
    return total


@pytest.mark.parametrize("changes", [{}, {"beta": 0.5, "nll_weight": 0.7}])
def test_loss_metrics_and_gradients_equal_a_slow_loop_in_float64(changes):
    s = Settings(**changes)
    beta = changes.get("beta", 0.1)
    nll_weight = changes.get("nll_weight", 0.0)
    model = small_model()
    data = pairs_for(model)
    metrics = preference_loss(model, data.sequences(range(5)), s)
    metrics["loss"].backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}

    model = model.double()
    model.zero_grad()
    expected = dict.fromkeys(METRICS, 0.0)
    for (prompt, chosen, rejected), reference in zip(data.pairs, data.reference_log_p, strict=True):
        chosen_log_p = log_p_by_hand(model, prompt, chosen)
        rejected_log_p = log_p_by_hand(model, prompt, rejected)
        chosen_gain = chosen_log_p - float(reference[0])
        rejected_gain = rejected_log_p - float(reference[1])
        margin = beta * (chosen_gain - rejected_gain)
        dpo_loss = -torch.log(1 / (1 + torch.exp(-margin)))
        expected["loss"] += dpo_loss - nll_weight * chosen_log_p / len(chosen)
        expected["accuracy"] += margin > 0
        expected["margin"] += margin
        expected["chosen_log_p"] += chosen_log_p
        expected["rejected_log_p"] += rejected_log_p
        expected["kl"] += (chosen_gain**2 + rejected_gain**2) / 4
    assert metrics.keys() == METRICS
    for name in METRICS:
        assert metrics[name].item() == pytest.approx(float(expected[name]), rel=1e-5)
    expected["loss"].backward()
    for name, p in model.named_parameters():
        largest = p.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-5 * largest)


def test_loss_equals_that_of_trl(tmp_path):
    """DPOTrainer's own, on the same weights in transformers, with another model as the reference."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = small_model()
    other = small_model()
    for p in other.parameters():
        p.data.mul_(0.9)
    data = pairs_for(model)
    with torch.no_grad():
        data.reference_log_p = log_probs(other, data.sequences(range(5))).numpy()
    ours = preference_loss(model, data.sequences(range(5)), Settings(beta=0.7))["loss"] / 5

    vocabulary = {f"t{i}": i for i in range(97)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t0")
    args = trl.DPOConfig(
        str(tmp_path),
        beta=0.7,
        loss_type="sigmoid",
        per_device_train_batch_size=5,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = trl.DPOTrainer(
        as_transformers(model),
        as_transformers(other),
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": "t1", "chosen": "t2", "rejected": "t3"}]),
        processing_class=tokenizer,
    )
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in data.pairs]
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_rows_by_hand():
    """Neither the prompt nor what fills a row is learned, nor a row that fills a batch."""
    pairs = [([1, 2, 3], [4, 5], [6]), ([7, 8], [9], [4, 4, 4])]
    data = PreferenceDataset(Path("x"), pairs, 6, 0, seed=1)
    batch = data.sequences([0, 1])
    no = IGNORE
    assert batch["tokens"].tolist() == [
        [[1, 2, 3, 4, 0, 0], [1, 2, 3, 0, 0, 0]],
        [[7, 8, 0, 0, 0, 0], [7, 8, 4, 4, 0, 0]],
    ]
    assert batch["targets"].tolist() == [
        [[no, no, 4, 5, no, no], [no, no, 6, no, no, no]],
        [[no, 9, no, no, no, no], [no, 4, 4, 4, no, no]],
    ]
    assert data.tokens_per_sequence == 12
    assert data.loss_denominator(batch) == 2
    batch["targets"][1:] = IGNORE
    assert data.loss_denominator(batch) == 1
    model = small_model()
    both = preference_loss(model, batch, Settings(nll_weight=1.0))
    alone = preference_loss(model, data.sequences([0]), Settings(nll_weight=1.0))
    for name in METRICS:
        torch.testing.assert_close(both[name], alone[name])


# ---- Rewards ---------------------------------------------------------------------------------------


def test_rewards_by_hand():
    asked = {"词汇": "铲子，草地", "随机句子": "小兔笑了起来，大家都很高兴。"}

    def scored(story, finished=1.0, constraints=asked):
        return score(constraints, story) | {"finished": finished}

    best = scored("小兔拿着铲子来到草地上。小兔笑了起来，大家都很高兴。")
    assert reward(best, best) == 4 + 1 + 2  # what was asked for; it ends; its length, and no repetition
    one_word = scored("小兔拿着铲子回家了。后来小兔笑了起来，大家都很高兴。")
    assert reward(one_word, best) == 0.5 + 2 + 1 + 2
    cut_off = scored("铲子，铲子，铲子，铲子，铲子，铲子，铲子", finished=0.0)
    assert reward(cut_off, best) == 0.5 + 1  # it is long enough, but repeats itself
    too_short = scored("小兔", constraints=None)
    assert reward(too_short, best) == 1 + 1
    assert reward(too_short) == 1 + 2  # nothing to compare its length with


HATS = {"词汇": "帽子"}
WITH = "小兔戴着帽子去森林里玩。"
WITHOUT = "小兔和小熊去森林里玩了。"
BROKEN = "小兔戴着帽\ufffd子去森林里玩。"


@pytest.mark.parametrize(
    ("samples", "of_corpus", "reference_chosen", "expected"),
    [
        ([WITHOUT, WITH], WITHOUT, True, (WITH, WITHOUT)),
        ([WITHOUT, WITHOUT], WITH, True, (WITH, WITHOUT)),  # the corpus has the better one
        ([WITHOUT, WITHOUT], WITH, False, None),
        ([WITH, WITH], WITHOUT, True, None),  # the corpus's story is never rejected
        ([WITHOUT, BROKEN, WITH], WITH, True, (WITH, WITHOUT)),  # bytes that spell no text
        ([WITHOUT], BROKEN, True, None),
        ([BROKEN], WITH, True, None),
        ([], WITH, True, None),
    ],
)
def test_the_best_and_the_worst_are_a_pair(samples, of_corpus, reference_chosen, expected):
    candidates = [(story, score(HATS, story) | {"finished": 1.0}) for story in [of_corpus, *samples]]
    pair = choose_pair(candidates[1:], candidates[0], reference_chosen)
    if expected is None:
        assert pair is None
    else:
        assert (pair["chosen"], pair["rejected"]) == expected
        assert pair["chosen_scores"]["words"] == 1 and pair["rejected_scores"]["words"] == 0


# ---- Making pairs ----------------------------------------------------------------------------------

MAKING = Settings(samples=8, instructions=28, seed=3)  # four batches, the last of four instructions
DATA = SimpleNamespace(packed=np.arange(100), path="train.bin")


class Sampler:
    """Stands for sample_pairs: made-up pairs, none of every fifth example, until `most` batches are made."""

    def __init__(self, most=99):
        self.most = most
        self.seeds = []
        self.examples = []

    def __call__(self, model, tokenizer, data, indices, seed, s):
        if len(self.seeds) == self.most:
            raise KeyboardInterrupt
        self.seeds.append(seed)
        for i in indices.tolist():
            self.examples.append(i)
            yield {"prompt": str(i), "seed": seed} if i % 5 else None, [{"length": 1.0}]


def make_pairs(monkeypatch, path, sampler, digest="digest", data=DATA, s=MAKING):
    monkeypatch.setattr(dpo, "sample_pairs", sampler)
    dpo.make_pairs(path, None, None, data, digest, s)


def pairs_in(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def test_interrupted_pairs_go_on_where_they_stopped(tmp_path, monkeypatch):
    """Each batch is on the disk before the next; a line that was cut off is made again."""
    path = tmp_path / "pairs.jsonl"
    whole = Sampler()
    make_pairs(monkeypatch, path, whole)
    assert len(set(whole.examples)) == 28 and whole.examples != sorted(whole.examples)
    assert whole.seeds == [3, 4, 5, 6]
    expected = pairs_in(tmp_path)
    assert [int(pair["prompt"]) for pair in expected] == [i for i in whole.examples if i % 5]

    path.unlink()
    begun = Sampler(most=2)
    with pytest.raises(KeyboardInterrupt):
        make_pairs(monkeypatch, path, begun)
    (part,) = tmp_path.iterdir()
    with open(part, "ab") as f:
        f.write('[{"prompt": "兔'.encode()[:-1])
    on_disk = []
    going_on = Sampler()

    def watched(*args):
        on_disk.append(part.read_bytes().count(b"\n"))
        yield from going_on(*args)

    make_pairs(monkeypatch, path, watched)
    assert on_disk == [2, 3] and going_on.seeds == [5, 6]
    assert pairs_in(tmp_path) == expected
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "of another model"},
        {"data": SimpleNamespace(packed=DATA.packed, path="other.bin")},
        {"s": Settings(samples=7, instructions=28, seed=3)},
        {"s": Settings(samples=8, instructions=28, seed=4)},
        {"s": Settings(samples=8, instructions=28, seed=3, temperature=0.5)},
        {"s": Settings(samples=8, instructions=28, seed=3, reference_chosen=False)},
    ],
)
def test_pairs_made_otherwise_are_not_gone_on_with(changes, tmp_path, monkeypatch):
    """Of another model, other data or settings: what is begun of them stays as it is."""
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        make_pairs(monkeypatch, path, Sampler(most=1), **changes)
    (other,) = tmp_path.iterdir()
    before = other.read_bytes()
    sampler = Sampler()
    make_pairs(monkeypatch, path, sampler)
    assert sampler.seeds == [3, 4, 5, 6]
    assert other.read_bytes() == before


def test_samples_go_with_their_instruction(tiny_sft, monkeypatch):
    """Three stories for each of two instructions: what the model is asked, and whose they are."""
    data = open_rows(tiny_sft)
    examples = examples_in(tiny_sft, "train")
    prompts = [examples[0][0], examples[5][0]]
    told = [("第一个", True), ("第一个故事", False), ("第一个", True)]
    told += [("第二个", True), ("第二个故事", False), ("第二个", True)]
    asked = []

    def sample_stories(model, tokenizer, prompts, **options):
        asked.append((prompts, options))
        return told

    monkeypatch.setattr(dpo, "sample_stories", sample_stories)
    model = SimpleNamespace(config=SimpleNamespace(block_size=256))
    s = Settings(samples=3, temperature=0.7, reference_chosen=False)
    (first, _), (second, scores) = dpo.sample_pairs(model, tokenizer_of(tiny_sft), data, [0, 5], 9, s)
    room = 256 - max(len(prompt) for prompt in prompts)
    options = {"temperature": 0.7, "seed": 9, "max_new_tokens": room}
    assert asked == [([prompts[0]] * 3 + [prompts[1]] * 3, options)]
    assert first["prompt"] == tokenizer_of(tiny_sft).decode(prompts[0])
    assert (first["chosen"], first["rejected"]) == ("第一个", "第一个故事")
    assert (second["chosen"], second["rejected"]) == ("第二个", "第二个故事")
    assert [one["finished"] for one in scores] == [1, 0, 1]


# ---- Reading pairs ---------------------------------------------------------------------------------

PAIR = {"prompt": "问", "chosen": "好", "rejected": "坏"}
ASK = {"role": "user", "content": "问"}
GOOD = {"role": "assistant", "content": "好"}
BAD = {"role": "assistant", "content": "坏"}
SHAREGPT = {"chosen": {"from": "gpt", "value": "好"}, "rejected": {"from": "gpt", "value": "坏"}}


@pytest.mark.parametrize(
    "record",
    [
        PAIR | {"rejected": " 坏\r\n"},
        PAIR | {"input": None, "system": "", "history": []},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        # UltraFeedback: the conversations repeat the prompt
        {"prompt": "问", "messages": [ASK, GOOD], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        # LLaMA-Factory: Alpaca's keys, and ShareGPT's
        {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏"},
        {"conversations": [{"from": "human", "value": "问"}]} | SHAREGPT,
    ],
)
def test_every_form_of_a_pair_is_read(record):
    assert pair_of(record, "x:1") == ("问", ("好", True), ("坏", True))


def test_a_story_that_did_not_end_has_no_end():
    _, chosen, rejected = pair_of(PAIR | {"rejected_scores": {"finished": 0.0}}, "x:1")
    assert (chosen, rejected) == (("好", True), ("坏", False))


@pytest.mark.parametrize(
    "record",
    [
        [],
        "问",
        {"prompt": "问", "chosen": "好"},
        {"chosen": "好", "rejected": "坏"},
        PAIR | {"chosen": 3},
        PAIR | {"prompt": 3},
        PAIR | {"query": "别的"},
        {"prompt": "别的", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": [ASK, GOOD], "rejected": [{"role": "user", "content": "别的"}, BAD]},
        {"chosen": [GOOD], "rejected": [ASK, BAD]},
        {"chosen": ["问", "好"], "rejected": [ASK, BAD]},
        {"chosen": [ASK, {"role": "assistant"}], "rejected": [ASK, BAD]},
    ],
)
def test_what_is_no_pair_is_refused(record):
    with pytest.raises(UserError, match=r"^x:7: "):
        pair_of(record, "x:7")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (PAIR | {"chosen": " \n"}, "empty"),
        (PAIR | {"chosen": "\u200b\ufeff"}, "empty"),
        (PAIR | {"rejected": "好 "}, "the same"),
        (PAIR | {"prompt": "\ud83d"}, "not_unicode"),
        (PAIR | {"chosen": "好\0的"}, "unencodable"),
        (PAIR | {"system": "你是猫"}, "system prompt"),
        (PAIR | {"history": [["早", "好"]]}, "history"),
        ({"chosen": [GOOD, ASK], "rejected": [ASK, BAD]}, "several turns"),
        ({"prompt": [ASK, GOOD, ASK], "chosen": [GOOD], "rejected": [BAD]}, "several turns"),
    ],
)
def test_what_cannot_be_used_is_left_out(record, reason):
    with pytest.raises(LeftOut, match=reason):
        pair_of(record, "x:1")


@pytest.fixture
def read(tiny_sft, tmp_path):
    """Read pairs from a file: (what is to be trained on, what is held out)."""
    tokenizer = tokenizer_of(tiny_sft)

    def read_records(records, **changes):
        file = tmp_path / "pairs.json"
        file.write_text(json.dumps(records))
        return dpo.read_pairs([file], TEMPLATE, tokenizer, Settings(**{"block_size": 64} | changes))

    return read_records


def numbered(count, **changes):
    """Pairs of different prompts."""
    return [PAIR | {"prompt": f"问{i}"} | changes for i in range(count)]


def test_pairs_become_tokens_in_the_template(read, tiny_sft):
    tokenizer = tokenizer_of(tiny_sft)
    good = tokenizer.encode("好")
    bad = tokenizer.encode("坏")
    train_data, val_data = read(numbered(2, rejected_scores={"finished": 0.0}))
    prompts = []
    for prompt, chosen, rejected in train_data.pairs + val_data.pairs:
        prompts.append(prompt)
        assert chosen == [*good, END] and rejected == bad
    assert sorted(prompts) == sorted([END, USER, *tokenizer.encode(f"问{i}"), ANSWER] for i in range(2))


def test_a_twentieth_of_the_prompts_is_held_out(read):
    """Each prompt is on one side, whatever the order, and validation does not depend on the seed."""
    records = numbered(200) + numbered(200, chosen="很好")
    train_data, val_data = read(records, seed=1)
    assert (len(train_data), len(val_data)) == (380, 20)
    trained = {tuple(prompt) for prompt, _, _ in train_data.pairs}
    held_out = {tuple(prompt) for prompt, _, _ in val_data.pairs}
    assert len(held_out) == 10 and not trained & held_out
    other_train_data, other_val_data = read(records, seed=2)
    assert val_data.batch(0, 9)["tokens"].equal(other_val_data.batch(0, 9)["tokens"])
    assert not train_data.batch(0, 9)["tokens"].equal(other_train_data.batch(0, 9)["tokens"])
    _, val_data = read(records[::-1])
    assert {tuple(prompt) for prompt, _, _ in val_data.pairs} == held_out


def test_what_is_left_out_is_counted_and_said(read, capsys):
    read([*numbered(8), PAIR | {"chosen": ""}, PAIR | {"chosen": ""}, PAIR | {"rejected": "好"}])
    told = "7 train, 1 val pairs, 2 left out (empty), 1 left out (chosen and rejected are the same)\n"
    assert capsys.readouterr().out.endswith(told)


def test_too_few_pairs_are_refused(read):
    """Most are left out; or there is one prompt, and nothing to hold out."""
    with pytest.raises(UserError, match=r"3 left out \(empty\)"):
        read([*numbered(2), *numbered(3, chosen="")])
    with pytest.raises(UserError, match="pairs of two prompts or more"):
        read([PAIR, PAIR])


def test_a_row_holds_a_pair_to_its_last_token(read, tiny_sft):
    """The end token behind a story is only a target."""
    length = 3 + len(tokenizer_of(tiny_sft).encode("问0")) + len(tokenizer_of(tiny_sft).encode("好"))
    train_data, _ = read(numbered(8), block_size=length)
    assert len(train_data) == 7
    too_long = rf"8 left out \(longer than block_size = {length - 1}\)"
    with pytest.raises(UserError, match=too_long):
        read(numbered(8), block_size=length - 1)


# ---- Runs ------------------------------------------------------------------------------------------

PREFERRING = {"max_iters": 12, "save_interval": 4, "eval_interval": 6, "log_interval": 1, "batch_size": 4}
PREFERRING |= {"learning_rate": 0.001, "dtype": "float32", "instructions": 24, "samples": 3}


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
def copy_of(preferred, tmp_path):
    """A folder with some files of that run."""

    def copy(name, *files):
        folder = tmp_path / name
        folder.mkdir()
        for file in files:
            (folder / file).write_bytes((preferred / file).read_bytes())
        return folder

    return copy


def test_a_run_makes_pairs_of_its_own_stories(preferred, tiny_sft):
    """The better and the worse by the rules, each with its scores, at most one pair an instruction."""
    tokenizer = tokenizer_of(tiny_sft)
    of_corpus = {}
    for prompt, response in examples_in(tiny_sft, "train"):
        of_corpus[tokenizer.decode(prompt)] = tokenizer.decode(response)
    pairs = pairs_in(preferred)
    prompts = {pair["prompt"] for pair in pairs}
    assert 10 < len(pairs) == len(prompts) <= 24
    for pair in pairs:
        asked = read_constraints(pair["prompt"])
        best = score(asked, of_corpus[pair["prompt"]]) | {"finished": 1.0}
        for side in ("chosen", "rejected"):
            scores = pair[f"{side}_scores"]
            assert scores == score(asked, pair[side]) | {"finished": scores["finished"]}
        chosen_reward = reward(pair["chosen_scores"], best)
        assert chosen_reward > reward(pair["rejected_scores"], best)
        assert pair["chosen"] == of_corpus[pair["prompt"]] or chosen_reward >= reward(best, best)


def test_a_run_begins_as_its_reference_and_learns(preferred, tuned):
    """Loss log 2, no margin, no divergence, in training as in validation; and it can be sampled from."""
    first = json.loads((preferred / "metrics.jsonl").read_text().splitlines()[0])
    lines = metrics_of(preferred)
    validation = {name.removeprefix("val_"): value for name, value in first.items()}
    for metrics in (lines[0], validation):
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert metrics["margin"] == pytest.approx(0, abs=1e-4)
        assert metrics["kl"] == pytest.approx(0, abs=1e-4)
        assert metrics["chosen_log_p"] < -1 and metrics["rejected_log_p"] < -1
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.01 and lines[-1]["margin"] > 0.01
    for line in lines:
        assert line.keys() >= METRICS and line["tokens"] == line["step"] * 4 * 2 * 256
    assert lines[5].keys() >= {f"val_{name}" for name in METRICS}
    assert read_checkpoint(preferred)["template"] == read_checkpoint(tuned)["template"]
    assert tell(preferred, words="小兔")


def test_pairs_go_on_after_kill_9(tuned, tiny_sft, preferred, tmp_path):
    """Killed while it samples, the same command makes the same file in the end, and trains nothing."""
    out = tmp_path / "out"
    command = preferring(tuned, tiny_sft, out, make_pairs=True)
    process = start_script("-m", "tools.dpo", *command)
    while not any(part.stat().st_size for part in out.glob("*.part")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (out / "pairs.jsonl").exists()
    run_here(dpo, *command)
    assert pairs_in(out) == pairs_in(preferred)
    assert {path.name for path in out.iterdir()} == {"pairs.jsonl", "lock"}


def test_a_resumed_run_has_the_same_bits(preferred, copy_of, tuned, tiny_sft):
    out = copy_of("out", "pairs.jsonl", "ckpt_000008.pt", "metrics.jsonl")
    printed = prefer(tuned, tiny_sft, out, resume=True)
    assert "resuming at step 8" in printed and "pairs.jsonl: exists and is used as it is" in printed
    same_state(out / "ckpt_000012.pt", preferred / "ckpt_000012.pt")
    assert lines_of(out) == lines_of(preferred)


def test_another_run_is_not_continued(copy_of, tuned, tiny_sft):
    """Another model to begin with, another loss, or other pairs: the message says which."""
    out = copy_of("out", "pairs.jsonl", "ckpt_000008.pt")
    earlier = find_checkpoints(tuned)[1]
    assert_refused(dpo, preferring(earlier, tiny_sft, out, resume=True), "another reference")
    assert_refused(dpo, preferring(tuned, tiny_sft, out, resume=True, beta=0.2), "beta", "0.1")
    lines = (out / "pairs.jsonl").read_text().splitlines(keepends=True)
    (out / "pairs.jsonl").write_text("".join(lines[1:]))
    assert_refused(dpo, preferring(tuned, tiny_sft, out, resume=True), "another pairs")


def test_ready_pairs_need_no_data(tuned, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in numbered(40)))
    printed = prefer(tuned, tmp_path / "no data", tmp_path / "out", pairs=file, epochs=1.0)
    assert f"{file}: 38 train, 2 val pairs\n" in printed
    assert read_checkpoint(tmp_path / "out")["step"] == 10  # of 38 pairs, four at a time


def test_only_the_adapters_learn(copy_of, tuned, tiny_sft):
    out = copy_of("out", "pairs.jsonl")
    prefer(tuned, tiny_sft, out, lora_rank=2, lora_alpha=6.0, max_iters=2)
    state = read_checkpoint(out)
    weights = state["model"]
    for name, weight in read_checkpoint(tuned)["model"].items():
        inside = name.replace(".weight", ".parametrizations.weight.original")
        same(weights.pop(inside if inside in weights else name), weight)
    assert state["lora"] == {"rank": 2, "alpha": 6.0}
    for name, weight in weights.items():
        assert weight.shape[name.endswith(".B")] == 2 and weight.abs().max() > 0


def test_two_processes_prefer_as_one(copy_of, tuned, tiny_sft):
    changes = {"gradient_accumulation_steps": 2, "batch_size": 2, "optimizer": "adamw", "max_iters": 4}
    one = copy_of("one", "pairs.jsonl")
    two = copy_of("two", "pairs.jsonl")
    printed = as_two_processes("-m", "tools.dpo", *preferring(tuned, tiny_sft, two, **changes))
    assert printed.count("val pairs") == 1
    prefer(tuned, tiny_sft, one, **changes)
    for line, other in zip(lines_of(one), lines_of(two), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-4)


# ---- Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss", "ipo"),
        ("beta", 0.0),
        ("beta", -1.0),
        ("nll_weight", -1.0),
        ("temperature", 0.0),
        ("samples", 0),
        ("instructions", 0),
    ],
)
def test_a_bad_setting_is_named(key, value, tuned, tiny_sft, tmp_path):
    assert_refused(dpo, preferring(tuned, tiny_sft, tmp_path / "out", **{key: value}), key)
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_fit_are_refused(tuned, tiny_sft, tmp_path):
    out = tmp_path / "out"
    assert_refused(dpo, preferring(tuned, tiny_sft, out, block_size=257), tuned, "at most 256")
    both = preferring(tuned, tiny_sft, out, pairs="mine.jsonl", make_pairs=True)
    assert_refused(dpo, both, "make_pairs", "mine.jsonl")


def test_what_is_not_there_is_named(tuned, pretrained, tiny_data, tiny_sft, tmp_path):
    out = tmp_path / "out"
    none = tmp_path / "none"
    assert_refused(dpo, preferring(none, tiny_sft, out), none)
    assert_refused(dpo, preferring(pretrained, tiny_sft, out), pretrained, "sft.py")
    assert_refused(dpo, preferring(tuned, tiny_data, out), tiny_data, "--task sft")
    assert_refused(dpo, preferring(tuned, tiny_sft, out, pairs=none), none)


def test_a_bad_pair_is_named_with_its_place(tuned, tmp_path):
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([PAIR, []]))
    args = preferring(tuned, "no data", tmp_path / "out", pairs=file)
    assert_refused(dpo, args, f"{file}, element 2")


def test_several_processes_make_no_pairs(tuned, tiny_sft, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "world_size", lambda: 2)
    monkeypatch.setattr(run, "all_reduce", lambda *tensors, **options: None)
    monkeypatch.setattr(run, "agree_on_dtype", lambda name, device, saved: name)
    args = preferring(tuned, tiny_sft, tmp_path / "out")
    assert_refused(dpo, args, "pairs.jsonl: not there", "--make_pairs=True")
