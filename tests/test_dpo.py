"""Preference tuning: the loss against float64 and TRL, the pairs by hand, and real runs stopped and
resumed.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TUNING, assert_one_line_error, metrics_of, run_script, script_here
from test_model import as_transformers, small
from test_train import as_two, lines_of, same, same_state

import sample
from common.checkpoint import build_model, find_checkpoints, read_checkpoint
from common.files import load_tokenizer
from model import IGNORE
from stories.constraints import read_constraints
from stories.rewards import reward, score
from tools import dpo
from tools.dpo import PreferenceDataset, Settings, log_probs, pair_of, preference_loss

METRICS = {"loss", "accuracy", "margin", "chosen_log_p", "rejected_log_p", "kl"}


# ---- The loss --------------------------------------------------------------------------------------


def pairs_for(model, count=5, length=24, seed=0):
    """Made-up pairs of different lengths, and made-up log-probabilities of a reference."""
    rng, v = np.random.default_rng(seed), model.config.vocab_size
    pairs = [[rng.integers(1, v, rng.integers(2, 8)).tolist() for _ in range(3)] for _ in range(count)]
    data = PreferenceDataset(Path("made up"), pairs, length, 0, seed)
    data.reference_log_p = rng.normal(-20, 5, (count, 2)).astype(np.float32)
    return data


def log_p_by_hand(model, prompt, answer):
    """A token after the other, in float64."""
    total, seen = 0.0, list(prompt)
    for token in answer:
        logits = model(torch.tensor([seen]))[0, -1]
        total = total + logits[token] - logits.logsumexp(0)
        seen.append(token)
    return total


def loss_by_hand(s, log_p, reference, lengths):
    (pw, pl), (rw, rl), (nw, _) = log_p, reference, lengths
    x = s.beta * ((pw - rw) - (pl - rl))
    return -torch.log(1 / (1 + torch.exp(-x))) - s.nll_weight * pw / nw


@pytest.mark.parametrize("changes", [{}, {"beta": 0.5}, {"nll_weight": 0.7}])
def test_loss_and_gradients_equal_float64_reference(changes):
    model, s = small(), Settings(**changes)
    data = pairs_for(model)
    metrics = preference_loss(model, data.sequences(range(5)), s)
    assert metrics.keys() == METRICS
    metrics["loss"].backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    model = model.double()
    model.zero_grad()
    total, expected = 0.0, dict.fromkeys(METRICS, 0.0)
    for (prompt, *answers), reference in zip(data.pairs, data.reference_log_p.astype(float), strict=True):
        log_p = [log_p_by_hand(model, prompt, answer) for answer in answers]
        total = total + loss_by_hand(s, log_p, reference, list(map(len, answers)))
        gained = [p.item() - r for p, r in zip(log_p, reference, strict=True)]
        expected["chosen_log_p"] += log_p[0].item()
        expected["rejected_log_p"] += log_p[1].item()
        expected["kl"] += (gained[0] ** 2 + gained[1] ** 2) / 4
        expected["margin"] += s.beta * (gained[0] - gained[1])
        expected["accuracy"] += gained[0] > gained[1]
    assert metrics["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    for name in METRICS - {"loss"}:
        assert metrics[name].item() == pytest.approx(expected[name], rel=1e-5)
    total.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-5 * p.grad.abs().max().item())


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_equals_trl(beta, tmp_path):
    """DPOTrainer's own, on the same weights in transformers' Qwen3, with another model as the reference."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    model, other = small(), small()
    for p in other.parameters():
        p.data.mul_(0.9)
    data = pairs_for(model)
    with torch.no_grad():
        data.reference_log_p = log_probs(other, data.sequences(range(5))).numpy()
    ours = preference_loss(model, data.sequences(range(5)), Settings(beta=beta))["loss"] / 5
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in data.pairs]
    vocabulary = {f"t{i}": i for i in range(97)}
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t0")
    args = trl.DPOConfig(str(tmp_path), beta=beta, loss_type="sigmoid", per_device_train_batch_size=5, report_to=[],
                         use_cpu=True, bf16=False, gradient_checkpointing=False)  # fmt: skip
    texts = datasets.Dataset.from_list([{"prompt": "t1", "chosen": "t2", "rejected": "t3"}])
    trainer = trl.DPOTrainer(as_transformers(model), as_transformers(other), args=args, train_dataset=texts,
                             processing_class=tokenizer)  # fmt: skip
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_rows_by_hand():
    """What stands where: the prompt is not learned from, what fills a row up neither, nor a row that fills a
    batch.
    """
    data = PreferenceDataset(Path("x"), [([1, 2, 3], [4, 5], [6]), ([7, 8], [9], [4, 4, 4])], 6, 0, seed=1)
    batch, no = data.sequences([0, 1]), IGNORE
    assert batch["tokens"].tolist() == [
        [[1, 2, 3, 4, 0, 0], [1, 2, 3, 0, 0, 0]],
        [[7, 8, 0, 0, 0, 0], [7, 8, 4, 4, 0, 0]],
    ]
    assert batch["targets"].tolist() == [
        [[no, no, 4, 5, no, no], [no, no, 6, no, no, no]],
        [[no, 9, no, no, no, no], [no, 4, 4, 4, no, no]],
    ]
    assert data.loss_denominator(batch) == 2
    assert data.tokens_per_sequence == batch["tokens"][0].numel() == 12
    batch["targets"][1:] = IGNORE
    assert data.loss_denominator(batch) == 1
    model = small()
    both, one = (preference_loss(model, b, Settings()) for b in (batch, {k: v[:1] for k, v in batch.items()}))
    for name in METRICS:
        torch.testing.assert_close(both[name], one[name])


# ---- Pairs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "问", "chosen": "好", "rejected": " 坏\r\n"},
        {"prompt": "问", "input": None, "system": "", "history": [], "chosen": "好", "rejected": "坏"},
        {"prompt": [{"role": "user", "content": "问"}], "chosen": [{"role": "assistant", "content": "好"}],
         "rejected": [{"role": "assistant", "content": "坏"}]},
        {"chosen": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "好"}],
         "rejected": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "坏"}]},
        # UltraFeedback: the conversations repeat the prompt
        {"prompt": "问", "prompt_id": "x", "score_chosen": 8.5,
         "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "好"}],
         "chosen": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "好"}],
         "rejected": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "坏"}]},
        # LLaMA-Factory: Alpaca's keys, and ShareGPT's
        {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏"},
        {"conversations": [{"from": "human", "value": "问"}], "chosen": {"from": "gpt", "value": "好"},
         "rejected": {"from": "gpt", "value": "坏"}},
        {"conversations": [{"from": "system", "value": " "}, {"from": "human", "value": "问"}],
         "chosen": {"from": "gpt", "value": "好"}, "rejected": {"from": "gpt", "value": "坏"}},
    ],
)  # fmt: skip
def test_every_form_of_a_pair(record):
    assert pair_of(record, "x:1") == ("问", ("好", True), ("坏", True))


def test_instruction_and_input_of_a_pair():
    record = {"instruction": "写一个故事", "input": "词汇：猫", "chosen": "好", "rejected": "坏"}
    assert pair_of(record, "x:1") == ("写一个故事\n词汇：猫", ("好", True), ("坏", True))


def test_a_story_that_did_not_end():
    record = {"prompt": "问", "chosen": "好", "rejected": "坏", "rejected_scores": {"finished": 0.0}}
    assert pair_of(record, "x:1") == ("问", ("好", True), ("坏", False))


ASK = {"role": "user", "content": "问"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in "好坏")


@pytest.mark.parametrize(
    "record",
    [
        [],
        "问",
        {"prompt": "问", "chosen": "好"},
        {"chosen": "好", "rejected": "坏"},
        {"prompt": "问", "chosen": 3, "rejected": "坏"},
        {"prompt": "别的", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "问", "query": "别的", "chosen": "好", "rejected": "坏"},
        {"prompt": 3, "chosen": "好", "rejected": "坏"},
        {"chosen": [ASK, GOOD], "rejected": [{"role": "user", "content": "别的"}, BAD]},
        {"chosen": [GOOD], "rejected": [ASK, BAD]},
        {"chosen": ["问", "好"], "rejected": [ASK, BAD]},
        {"chosen": [ASK, {"role": "assistant"}], "rejected": [ASK, BAD]},
    ],
)
def test_what_is_no_pair(record, tmp_path, tuned, tiny_sft):
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([{"prompt": "问", "chosen": "好", "rejected": "坏"}, record]))
    done = preferring_here(tuned, tiny_sft, tmp_path / "out", pairs=file)
    assert_one_line_error(done, f"{file}, element 2")


def test_reward_by_hand():
    asked = {"词汇": "铲子，草地", "随机句子": "小兔笑了起来，大家都很高兴。"}
    best = score(asked, "小兔拿着铲子来到草地上。小兔笑了起来，大家都很高兴。") | {"finished": 1.0}
    assert reward(best, best) == 4 + 1 + 2
    one_word = score(asked, "小兔拿着铲子回家了。后来小兔笑了起来，大家都很高兴。") | {"finished": 1.0}
    assert reward(one_word, best) == 0.5 + 2 + 1 + 2
    cut_off = score(asked, "铲子，铲子，铲子，铲子，铲子，铲子，铲子") | {"finished": 0.0}
    assert reward(cut_off, best) == 0.5 + 1  # it is long enough, but repeats itself
    assert (
        reward(score(None, "小兔") | {"finished": 1.0}, best) == 1 + 1
    )  # it does not repeat itself, but is too short


# ---- Runs ------------------------------------------------------------------------------------------

PREFERRING = TUNING | {"max_iters": 12, "save_interval": 4, "eval_interval": 6, "learning_rate": 0.001}
PREFERRING |= {"instructions": 24, "samples": 3, "batch_size": 4}


def preferring(init_from, data_dir, out_dir, **changes):
    paths = {"init_from": init_from, "data_dir": data_dir, "out_dir": out_dir}
    return ["-m", "tools.dpo", *(f"--{key}={value}" for key, value in (PREFERRING | paths | changes).items())]


def preferring_here(*paths, **changes):
    return script_here(dpo.main, *preferring(*paths, **changes)[1:])


@pytest.fixture(scope="module")
def preferred(tuned, tiny_sft, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("preferred") / "out"
    run_script(*preferring(tuned, tiny_sft, out))
    return out


def pairs_in(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def test_pairs_of_a_run(preferred, tiny_sft):
    """Of each instruction the best and the worst, with scores that the rules give again; ties are not
    there.
    """
    tokenizer = load_tokenizer((tiny_sft / "tokenizer.model").read_bytes(), tiny_sft)
    found = pairs_in(preferred)
    assert 10 < len(found) <= 24 and len({line["prompt"] for line in found}) == len(found)
    references = dict(texts_of(tiny_sft, tokenizer))
    for line in found:
        asked = read_constraints(line["prompt"])
        best = score(asked, references[line["prompt"]]) | {"finished": 1.0}
        for side in ("chosen", "rejected"):
            assert line[f"{side}_scores"] == score(asked, line[side]) | {
                "finished": line[f"{side}_scores"]["finished"]
            }
        high, low = (reward(line[f"{side}_scores"], best) for side in ("chosen", "rejected"))
        assert high > low
        assert line["chosen"] == references[line["prompt"]] or high >= reward(best, best)


def texts_of(folder, tokenizer):
    from test_sft import examples_in

    for prompt, response in examples_in(folder, "train"):
        yield tokenizer.decode(prompt), tokenizer.decode(response)


def test_metrics_of_a_run(preferred, tuned):
    """It begins at log 2, with no margin; it ends with one. Validation has the same metrics."""
    lines = metrics_of(preferred)
    logs, checks = [x for x in lines if "loss" in x], [x for x in lines if "val_loss" in x]
    assert logs[0]["step"] == 2 and all(x.keys() >= METRICS for x in logs)
    assert all({f"val_{name}" for name in METRICS} <= x.keys() for x in checks)
    assert all(x["tokens"] == x["step"] * 4 * 2 * 256 for x in lines)  # both stories of four pairs
    assert logs[-1]["margin"] > logs[0]["margin"] and logs[-1]["loss"] < logs[0]["loss"]
    assert read_checkpoint(preferred)["template"] == read_checkpoint(tuned)["template"]
    told = script_here(
        sample.main, "sample.py", "--ckpt", preferred, "--words", "小兔", "--num", 1, "--max_new_tokens", 9
    )
    assert told.returncode == 0, told.stderr


def test_before_the_first_step_the_model_is_the_reference(tuned, tiny_sft, preferred, tmp_path):
    """Loss log 2, no margin, no divergence."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pairs.jsonl").write_bytes((preferred / "pairs.jsonl").read_bytes())
    done = preferring_here(
        tuned, tiny_sft, tmp_path / "out", max_iters=1, learning_rate=1e-12, dtype="float32"
    )
    assert done.returncode == 0, done.stderr
    first = metrics_of(tmp_path / "out")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-4) and first["kl"] == pytest.approx(0, abs=1e-4)
    assert first["chosen_log_p"] < -1


def test_pairs_go_on_after_kill_9(tuned, tiny_sft, preferred, tmp_path):
    """Killed in the middle of telling: the same file in the end, as if nothing had happened."""
    out = tmp_path / "out"
    command = [sys.executable, *preferring(tuned, tiny_sft, out, make_pairs=True, samples=8, instructions=28)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE)
    while not (
        (parts := list(out.glob("*.part"))) and parts[0].read_bytes().count(b"\n") >= 2
    ):  # of four batches
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.kill()
    process.wait()
    (part,) = parts
    with open(part, "ab") as f:
        f.write('[{"prompt": "兔'.encode()[:-1])
    for folder in (out, tmp_path / "whole"):
        done = preferring_here(tuned, tiny_sft, folder, make_pairs=True, samples=8, instructions=28)
        assert done.returncode == 0, done.stderr
    assert pairs_in(out) == pairs_in(tmp_path / "whole")
    assert {p.name for p in out.iterdir()} == {"pairs.jsonl", "lock"}


def test_pairs_of_other_settings_are_not_gone_on_with(tuned, tiny_sft, preferred, tmp_path):
    """A part of a file made with other samples, or by another model, is left alone."""
    out = tmp_path / "out"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for source, changes in ((tuned, {"samples": 8}), (find_checkpoints(tuned)[1], {})):
        before = set(out.glob("*.part"))
        command = [sys.executable, *preferring(source, tiny_sft, out, make_pairs=True, **changes)]
        process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE)
        while not any(part.stat().st_size for part in set(out.glob("*.part")) - before):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert preferring_here(tuned, tiny_sft, out, make_pairs=True).returncode == 0
    assert pairs_in(out) == pairs_in(preferred)
    assert len(list(out.glob("*.part"))) == 2


def test_resume_is_exact(preferred, tuned, tiny_sft, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("pairs.jsonl", "ckpt_000008.pt", "metrics.jsonl"):
        (out / name).write_bytes((preferred / name).read_bytes())
    done = run_script(*preferring(tuned, tiny_sft, out, resume=True))
    assert "resuming at step 8" in done.stdout
    same_state(out / "ckpt_000012.pt", preferred / "ckpt_000012.pt")
    assert lines_of(out) == lines_of(preferred)


def test_resume_of_another_run(preferred, tuned, tiny_sft, tmp_path):
    """Other pairs, another model to begin with, or another loss: the message says which."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("pairs.jsonl", "ckpt_000008.pt"):
        (out / name).write_bytes((preferred / name).read_bytes())
    done = preferring_here(find_checkpoints(tuned)[1], tiny_sft, out, resume=True)
    assert_one_line_error(done, "another reference")
    done = preferring_here(tuned, tiny_sft, out, resume=True, beta=0.2)
    assert_one_line_error(done, "beta", "0.1")
    lines = (out / "pairs.jsonl").read_text().splitlines(keepends=True)
    (out / "pairs.jsonl").write_text("".join(lines[1:]))
    assert_one_line_error(preferring_here(tuned, tiny_sft, out, resume=True), "another pairs")


def test_ready_pairs(tuned, tiny_sft, tmp_path):
    """As others write them; a prompt is on one side of the split, and what is too long is left out and
    said.
    """
    rows = [
        {"prompt": f"词汇：小兔，第{i % 40}个", "chosen": f"小兔来了{i}次。", "rejected": "坏"}
        for i in range(100)
    ]
    rows += [{"prompt": "词汇：长", "chosen": "长" * 3000, "rejected": "短"}] * 2
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = preferring_here(tuned, tmp_path / "no data needed", tmp_path / "out", pairs=file, epochs=1.0)
    assert done.returncode == 0, done.stderr
    counted = re.search(r"(\d+) train, (\d+) val pairs, (\d+) left out \(longer", done.stdout)
    train_pairs, val_pairs, left_out = map(int, counted.groups())
    assert train_pairs + val_pairs == 100 and left_out == 2 and val_pairs >= 2
    assert read_checkpoint(tmp_path / "out")["step"] == math.ceil(train_pairs / 4)


def test_adapters(preferred, tuned, tiny_sft, tmp_path):
    """Only the adapters learn; sft.py merges them."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pairs.jsonl").write_bytes((preferred / "pairs.jsonl").read_bytes())
    done = preferring_here(tuned, tiny_sft, tmp_path / "out", lora_rank=2, max_iters=4)
    assert done.returncode == 0, done.stderr
    base, state = read_checkpoint(tuned)["model"], read_checkpoint(tmp_path / "out")["model"]
    for name, weight in base.items():
        same(
            state[name if name in state else name.replace(".weight", ".parametrizations.weight.original")],
            weight,
        )
    assert any(w.abs().max() > 0 for name, w in state.items() if name.endswith(".B"))


def test_two_processes_prefer_as_one(preferred, tuned, tiny_sft, tmp_path):
    changes = {"gradient_accumulation_steps": 2, "batch_size": 2, "dtype": "float32", "optimizer": "adamw"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pairs.jsonl").write_bytes((preferred / "pairs.jsonl").read_bytes())
    as_two(*preferring(tuned, tiny_sft, tmp_path / "two", **changes))
    assert preferring_here(tuned, tiny_sft, tmp_path / "one", **changes).returncode == 0
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


UNUSABLE = {
    "empty": {"prompt": "问", "chosen": " \n", "rejected": "坏"},
    "the same": {"prompt": "问", "chosen": "好 ", "rejected": "好"},
    "not_unicode": {"prompt": "\ud83d", "chosen": "好", "rejected": "坏"},
    "unencodable": {"prompt": "问", "chosen": "好\0的", "rejected": "坏"},
    "empty ": {"prompt": "问", "chosen": "\u200b\ufeff", "rejected": "坏"},
    "system prompt": {"prompt": "问", "system": "你是猫", "chosen": "好", "rejected": "坏"},
    "history": {"prompt": "问", "history": [["早", "好"]], "chosen": "好", "rejected": "坏"},
    "several turns ": {"chosen": [GOOD, ASK], "rejected": [ASK, BAD]},
    "several turns": {"prompt": [ASK, GOOD, ASK], "chosen": [GOOD], "rejected": [BAD]},
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_unusable_pairs_are_left_out_and_counted(reason, tuned, tiny_sft, tmp_path):
    """A few among good ones are counted in the report; alone they are refused, and nothing is trained."""
    file = tmp_path / "pairs.json"
    good = [{"prompt": f"问{i}", "chosen": "好", "rejected": "坏"} for i in range(8)]
    file.write_text(json.dumps([*good, UNUSABLE[reason], UNUSABLE[reason]]))
    done = preferring_here(tuned, tiny_sft, tmp_path / "some", pairs=file, max_iters=1)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "train, " in line]
    assert "7 train, 1 val pairs" in line and "2 left out (" in line and reason.strip() in line
    file.write_text(json.dumps([UNUSABLE[reason]] * 3))
    done = preferring_here(tuned, tiny_sft, tmp_path / "none", pairs=file)
    assert_one_line_error(done, file, "0 train, 0 val pairs", "3 left out", reason.strip())
    assert not list((tmp_path / "none").glob("ckpt*"))


def test_advice_names_what_helps(tuned, tiny_sft, tmp_path):
    """Too long: block_size. One prompt: more of them."""
    file = tmp_path / "pairs.json"
    file.write_text(
        json.dumps([{"prompt": f"问{i}", "chosen": "好" * 30, "rejected": "坏"} for i in range(8)])
    )
    done = preferring_here(tuned, tiny_sft, tmp_path / "out", pairs=file, block_size=8)
    assert_one_line_error(done, file, "8 left out (longer than block_size = 8)")
    file.write_text(json.dumps([{"prompt": "问", "chosen": f"好{i}", "rejected": "坏"} for i in range(8)]))
    assert_one_line_error(
        preferring_here(tuned, tiny_sft, tmp_path / "out", pairs=file), file, "two prompts or more"
    )


def test_pairs_have_no_cut_characters(tuned):
    """max_new_tokens may cut a character of several bytes: what is left of it is no text."""
    checkpoint = read_checkpoint(tuned)
    tokenizer = load_tokenizer(checkpoint["tokenizer"], tuned)
    model, prompts = build_model(checkpoint, tuned), [[tokenizer.eos_id()]] * 512
    options = {
        "temperature": 100.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": 5,
    }  # all tokens, also those of bytes
    steps = [
        tokens.tolist() for tokens in sample.generate(model, prompts, end_token=tokenizer.eos_id(), **options)
    ]
    texts = [tokenizer.decode(list(tokens)) for tokens in zip(*steps, strict=True)]
    cut = [i for i, text in enumerate(texts) if text.endswith("\ufffd")]
    assert len(cut) > 3
    stories = sample.sample_stories(model, tokenizer, prompts, **options)
    for i in cut:
        assert stories[i][0] == texts[i].rstrip("\ufffd")


@pytest.mark.parametrize("reference_chosen", [True, False])
def test_pairs_have_no_broken_characters(reference_chosen):
    """A sample whose bytes spell no text in the middle is neither chosen nor rejected."""
    reference = scored("小兔和小熊在森林里玩。", "小兔")
    stories = ["小兔和小\ufffd熊在森林里玩", "小熊在森林里玩", "小兔\ufffd和小熊小兔在森林里玩"]
    samples = [
        (text, score({"词汇": "小兔"}, text) | {"finished": float(i != 2)}) for i, text in enumerate(stories)
    ]
    pair = dpo.choose_pair(samples, reference, reference_chosen)
    if reference_chosen:
        assert (pair["chosen"], pair["rejected"]) == ("小兔和小熊在森林里玩。", "小熊在森林里玩")
    else:
        assert pair is None  # only one is left
        assert dpo.choose_pair(samples[:1], reference, reference_chosen) is None


def scored(story, words, finished=True):
    return story, score({"词汇": words}, story) | {"finished": float(finished)}


def test_the_reference_is_never_rejected():
    """It is the corpus's own story: where a sample is better, the pair is of samples alone."""
    with_word = scored("小兔戴着帽子去森林里玩。", "帽子")
    without = scored("小兔和小熊去森林里玩了。", "帽子")
    reference = scored("小猫和小狗去河边玩了呢。", "帽子")
    pair = dpo.choose_pair([with_word, without], reference, True)
    assert (pair["chosen"], pair["rejected"]) == (with_word[0], without[0])
    assert dpo.choose_pair([with_word, with_word], reference, True) is None
    pair = dpo.choose_pair([without], with_word, True)
    assert (pair["chosen"], pair["rejected"]) == (with_word[0], without[0])
    assert dpo.choose_pair([without, without], with_word, False) is None


def test_validation_does_not_depend_on_the_seed(tuned, tmp_path):
    checkpoint = read_checkpoint(tuned)
    tokenizer, file, drawn = load_tokenizer(checkpoint["tokenizer"], tuned), tmp_path / "pairs.json", []
    file.write_text(json.dumps([{"prompt": f"问{i}", "chosen": "好", "rejected": "坏"} for i in range(400)]))
    for seed in (1, 2):
        s = Settings(block_size=256, seed=seed)
        splits = dpo.read_pairs([file], checkpoint["template"], tokenizer, s)
        drawn.append([split.batch(0, 10)["tokens"].tolist() for split in splits])
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] == drawn[1][1]


# ---- Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss", "ipo"),
        ("rounds", 2),
        ("beta", 0.0),
        ("beta", -1.0),
        ("nll_weight", -1.0),
        ("temperature", 0.0),
        ("samples", 0),
    ],
)
def test_bad_values(key, value, tuned, tiny_sft, tmp_path):
    assert_one_line_error(preferring_here(tuned, tiny_sft, tmp_path / "out", **{key: value}), key)
    assert not (tmp_path / "out").exists()


def test_what_is_not_there(tuned, pretrained, tiny_data, tiny_sft, tmp_path):
    assert_one_line_error(preferring_here(tmp_path / "none", tiny_sft, tmp_path / "out"), tmp_path / "none")
    assert_one_line_error(preferring_here(pretrained, tiny_sft, tmp_path / "out"), pretrained, "sft.py")
    assert_one_line_error(preferring_here(tuned, tiny_data, tmp_path / "out"), tiny_data, "--task sft")
    assert_one_line_error(
        preferring_here(tuned, tiny_sft, tmp_path / "out", pairs=tmp_path / "no.jsonl"), "no.jsonl"
    )
