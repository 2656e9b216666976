"""Telling stories: the same seed, whole characters, prompts of every kind, and bad input."""

import fcntl
import functools
import os
import pickle
import shutil
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from conftest import ROOT, assert_one_line_error, run_script, script_here, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from common.checkpoint import build_model, find_checkpoints, read_checkpoint
from common.files import load_tokenizer
from model import GPT, ModelConfig
from sample import sample_stories
from stories.constraints import encode_prompt, split_list, write_constraints
from stories.rewards import reward, score


@pytest.fixture(scope="module")
def ckpt(tiny_data, tmp_path_factory):
    """A folder with the checkpoints of a short run, as train.py leaves it."""
    out = tmp_path_factory.mktemp("sample") / "out"
    run_script("train.py", *tiny(data_dir=tiny_data, out_dir=out, block_size=128, learning_rate=0.01, max_iters=30,
                                 save_interval=15))  # fmt: skip
    assert len(find_checkpoints(out)) == 2
    return out


@pytest.fixture(scope="module")
def loaded(ckpt):
    checkpoint = read_checkpoint(ckpt)
    return build_model(checkpoint, ckpt), sentencepiece.SentencePieceProcessor(
        model_proto=checkpoint["tokenizer"]
    )


sample_here = functools.partial(script_here, sample.main, "sample.py")


def stories(*args, **kwargs):
    done = sample_here(*args, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- What comes out --------------------------------------------------------------------------------


def test_the_same_seed_tells_the_same_story(ckpt):
    """In another process too; another seed tells another one."""
    args = ("--ckpt", ckpt, "--num", 2, "--max_new_tokens", 60)
    first = run_script("sample.py", *args, "--seed", 7).stdout
    assert first == run_script("sample.py", *args, "--seed", 7).stdout
    one, again, other = (stories(*args, "--seed", seed) for seed in (7, 7, 8))
    assert one == again != other
    two = one.rstrip("\n").split("\n---\n")
    assert len(two) == 2 and two[0] != two[1]  # the stories of one call differ among themselves


@pytest.mark.parametrize("num", [1, 2, 5])
def test_num(num, ckpt):
    told = stories("--ckpt", ckpt, "--num", num, "--max_new_tokens", 20, "--prompt", "从前")
    told = told.removesuffix("\n").split("\n---\n")
    assert len(told) == num and all(story.startswith("从前") for story in told)


def test_three_by_default_and_at_most_max_new_tokens(ckpt, loaded):
    model, tokenizer = loaded
    assert len(stories("--ckpt", ckpt, "--max_new_tokens", 5).split("\n---\n")) == 3
    for limit in (1, 5):
        ((story, _),) = sample_stories(
            model, tokenizer, [[tokenizer.eos_id()]], max_new_tokens=limit, temperature=0
        )
        assert story == greedy(model, tokenizer, "", limit)


def greedy(model, tokenizer, prompt, limit):
    """The likeliest token again and again, without cache or batch."""
    ids = [tokenizer.eos_id(), *tokenizer.encode(prompt)]
    story = ids[1:]
    with torch.no_grad():
        for _ in range(limit):
            if len(ids) >= model.config.block_size:
                break
            token = model(torch.tensor([ids]))[0, -1].argmax().item()
            if token == tokenizer.eos_id():
                break
            ids.append(token)
            story.append(token)
    return tokenizer.decode(story)


@pytest.mark.parametrize("temperature", [1e-6, 1e-7, 1e-20, 1e-37, 1e-38, 1e-45, 1e-320])
def test_temperatures_near_0_are_greedy(temperature, ckpt, loaded):
    """Dividing by them would give infinities, and of these the first token, whatever it is."""
    args = ("--ckpt", ckpt, "--num", 1, "--max_new_tokens", 40, "--top_k", 0)
    assert stories(*args, "--temperature", temperature) == greedy(*loaded, "", 40) + "\n"


@pytest.mark.parametrize("prompt", ["", "从前", "小兔子说：“你好！”\n"])
def test_top_k_1_and_temperature_0_are_the_likeliest(prompt, ckpt, loaded):
    args = ("--ckpt", ckpt, "--num", 1, "--max_new_tokens", 40, "--prompt", prompt, "--dtype", "float32")
    expected = greedy(*loaded, prompt.strip(), 40) + "\n"
    assert stories(*args, "--temperature", 0) == expected
    assert stories(*args, "--top_k", 1, "--temperature", 1.3, "--seed", 5) == expected
    assert stories(*args, "--top_p", 1e-9, "--seed", 5) == expected


def test_compile_and_bfloat16(ckpt):
    args = ("--ckpt", ckpt, "--temperature", 0, "--num", 1, "--max_new_tokens", 40)
    plain = stories(*args)
    assert stories(*args, "--compile") == plain
    done = run_script("sample.py", *args, "--dtype", "bfloat16")
    assert done.stdout[:5] == plain[:5] and not done.stderr


def test_stops_where_the_model_is_full(ckpt, loaded):
    """Asked for more than block_size holds, a story fills it and no more."""
    model, tokenizer = loaded
    args = ("--max_new_tokens", 100_000, "--temperature", 0, "--dtype", "float32")
    told = stories("--ckpt", ckpt, "--num", 1, *args)
    assert told == greedy(model, tokenizer, "", 100_000) + "\n"


def test_a_folder_means_its_newest_checkpoint(ckpt, tmp_path):
    new, old = find_checkpoints(ckpt)
    args = ("--max_new_tokens", 60, "--num", 1, "--temperature", 1.0)
    assert stories("--ckpt", ckpt, *args) == stories("--ckpt", new, *args) != stories("--ckpt", old, *args)


def test_one_file_is_enough(ckpt, tmp_path):
    """Copied to a folder of its own, it tells the same story."""
    alone = tmp_path / "a copy.pt"
    shutil.copy(find_checkpoints(ckpt)[0], alone)
    args = ("--num", 1, "--max_new_tokens", 20)
    assert stories("--ckpt", alone, *args) == stories("--ckpt", ckpt, *args)


@pytest.mark.parametrize(
    "prompt", ["<s>", "</s>", "<pad>", "<unk>", "<|user|>你好<|assistant|>", "<0x0A>", "<|endoftext|>"]
)
def test_spellings_of_control_tokens_stay_text(prompt, ckpt, loaded):
    _, tokenizer = loaded
    assert not any(tokenizer.is_control(i) or tokenizer.is_unknown(i) for i in tokenizer.encode(prompt))
    assert stories("--ckpt", ckpt, "--prompt", prompt, "--num", 1, "--max_new_tokens", 5).startswith(prompt)


def test_prompts_are_cleaned_as_stories_are(ckpt):
    args = ("--ckpt", ckpt, "--num", 1, "--max_new_tokens", 20)
    assert stories(*args, "--prompt", " 从前\r\n有e\u0301 ") == stories(*args, "--prompt", "从前\n有é")
    assert stories(*args, "--prompt", "\ufeff从前\u200b") == stories(*args, "--prompt", "从前")


@pytest.mark.parametrize(
    "words", ["森林\u200b,小鸟", "\ufeff森林；小鸟\u2060", "森林;小鸟", "森林、\u3000小鸟", " 森林 ,小鸟\n"]
)
def test_words_as_people_paste_them(words, tuned):
    """Each separator, and what nobody sees at the ends of words: the same story, found to have the same
    words.
    """
    args = ("--ckpt", tuned, "--best_of", 4, "--max_new_tokens", 60)
    plain, done = sample_here(*args, "--words", "森林,小鸟"), sample_here(*args, "--words", words)
    assert (done.returncode, done.stdout, done.stderr) == (0, plain.stdout, plain.stderr)


def test_separators_are_named():
    assert split_list("ice cream, 太阳 镜；铲子;草地") == ["ice cream", "太阳 镜", "铲子", "草地"]
    assert " separated by , ， 、 ; or ； (not by spaces)" in " ".join(sample_here("--help").stdout.split())


def test_best_of(tuned):
    """The best of the batch by the rules of the evaluation, said on stderr; again the same with the same
    seed.
    """
    args = ("--ckpt", tuned, "--words", "森林,小鸟", "--features", "对话", "--best_of", 6, "--seed", 3)
    args += ("--dtype", "float32")
    done = sample_here(*args)
    checkpoint = read_checkpoint(tuned)
    model, tokenizer = build_model(checkpoint, tuned).eval(), load_tokenizer(checkpoint["tokenizer"], tuned)
    asked = {"词汇": "森林，小鸟", "特点": "对话"}
    prompt = encode_prompt(tokenizer, checkpoint["template"], write_constraints(asked), "")
    stories_ = sample_stories(model, tokenizer, [prompt] * 6, seed=3, max_new_tokens=300)
    rewards = [reward(score(asked, story) | {"finished": float(finished)}) for story, finished in stories_]
    assert done.stdout.removesuffix("\n") == stories_[rewards.index(max(rewards))][0] and min(rewards) < max(
        rewards
    )
    assert done.stderr.startswith("(best of 6: ")
    words = [w for w in ("森林", "小鸟") if w not in done.stdout]
    assert ("all words" if not words else f"words missing: {'，'.join(words)}") in done.stderr
    assert sample_here(*args).stdout == done.stdout
    two = sample_here(*args, "--num", 2)
    assert two.stdout.startswith(done.stdout + "---\n") and two.stderr.count("best of 6") == 2


def test_best_of_keeps_the_beginning(tuned):
    done = sample_here("--ckpt", tuned, "--words", "森林", "--prompt", "从前，森林里", "--best_of", 3)
    assert done.stdout.startswith("从前，森林里") and "all words" in done.stderr


def test_best_of_ranks_by_the_words_asked_for(tuned):
    """The beginning of the story is no part of the instruction, though both are tokens of one prompt."""
    saved = read_checkpoint(tuned)
    model, tokenizer = build_model(saved, tuned).eval(), load_tokenizer(saved["tokenizer"], tuned)
    n_told_apart = 0
    for word in "小我说是大看来":
        prompt = encode_prompt(tokenizer, saved["template"], f"词汇：{word}", "从前")
        candidates = sample_stories(model, tokenizer, [prompt] * 12, seed=3, max_new_tokens=60)

        def best(words, candidates=candidates):
            def worth(candidate):
                story, finished = candidate
                return reward(score({"词汇": words}, story) | {"finished": float(finished)})

            return max(candidates, key=worth)[0]

        args = ("--words", word, "--prompt", "从前", "--best_of", 12, "--seed", 3, "--max_new_tokens", 60)
        done = sample_here("--ckpt", tuned, *args, "--dtype", "float32")
        assert done.stdout == best(word) + "\n"
        n_told_apart += best(word) != best(f"{word}从前")  # what both together decode to
    assert n_told_apart > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--words", "森林", "--best_of", 0), ["--best_of 0", "at least 1"]),
        (("--summary", "小猴捞月亮。", "--best_of", 4), ["nothing to choose by"]),
        (("--instruction", "讲个故事", "--best_of", 4), ["nothing to choose by"]),
        (("--words", "森林" * 400, "--best_of", 4), ["tokens", "at most"]),
    ],
)
def test_best_of_that_cannot_be(options, words, tuned):
    assert_one_line_error(sample_here("--ckpt", tuned, *options), *words)


def test_many_stories_come_in_batches(ckpt):
    """The second batch has the next seed."""
    many, first = (stories("--ckpt", ckpt, "--num", n, "--max_new_tokens", 3, "--seed", 5) for n in (70, 64))
    rest = stories("--ckpt", ckpt, "--num", 6, "--max_new_tokens", 3, "--seed", 6)
    assert many == first + "---\n" + rest and many.count("---\n") == 69


def test_many_to_choose_from_come_in_batches(tuned):
    """The best of 70 is the best of 64 and of 6 with the next seed, scored one by one."""
    done = sample_here(
        "--ckpt", tuned, "--words", "森林", "--max_new_tokens", 9, "--best_of", 70, "--dtype", "float32"
    )
    saved = read_checkpoint(tuned)
    model, tokenizer = build_model(saved, tuned).eval(), load_tokenizer(saved["tokenizer"], tuned)
    prompt = encode_prompt(tokenizer, saved["template"], "词汇：森林", "")
    options, candidates = {"max_new_tokens": 9}, []
    for size, seed in ((64, 1337), (6, 1338)):
        candidates += sample_stories(model, tokenizer, [prompt] * size, seed=seed, **options)

    def worth(candidate):
        story, finished = candidate
        return reward(score({"词汇": "森林"}, story) | {"finished": float(finished)})

    assert done.stdout == max(candidates, key=worth)[0] + "\n"


def test_asked_for_nothing(tuned, tmp_path):
    """A tuned model shows the example of its checkpoint; an older one, without an example, says how to ask."""
    done = sample_here("--ckpt", tuned, "--num", 1)
    assert len(done.stdout) > 10 and done.stdout == stories(
        "--ckpt", tuned, "--num", 1, "--instruction", example_of(tuned)
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("asked for: ") and "--words" in line
    state = read_checkpoint(tuned)
    del state["prompt"]
    torch.save(state, tmp_path / "old.pt")
    assert_one_line_error(sample_here("--ckpt", tmp_path / "old.pt"), "old.pt", "--words")


def example_of(run):
    checkpoint = read_checkpoint(run)
    return load_tokenizer(checkpoint["tokenizer"], run).decode(checkpoint["prompt"])


def test_no_checkpoint_means_the_newest_run(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(sample_here(), "out: no run here", "python train.py")
    for age, name in ((100, "a_new"), (200, "z_old")):
        shutil.copytree(ckpt, tmp_path / "out" / name)
        for path in find_checkpoints(tmp_path / "out" / name):
            os.utime(path, (time.time() - age, time.time() - age))
    expected = stories("--ckpt", "out/a_new", "--num", 1, "--max_new_tokens", 9)
    for args in ((), ("--ckpt",)):
        done = sample_here("--num", 1, "--max_new_tokens", 9, *args)
        assert (done.stdout, done.stderr) == (expected, "the newest run is out/a_new\n")


def test_prompt_file(ckpt, tmp_path):
    args = ("--ckpt", ckpt, "--num", 2, "--max_new_tokens", 20)
    (tmp_path / "prompt.txt").write_text("从前，有一只🐰。\n它说：\n", encoding="utf-8")
    told = stories(*args, "--prompt_file", tmp_path / "prompt.txt")
    assert told == stories(*args, "--prompt", "从前，有一只🐰。\n它说：")
    assert told.startswith("从前，有一只🐰。\n它说：")
    (tmp_path / "bom.txt").write_text("从前，有一只🐰。\n它说：\n", encoding="utf-8-sig")
    assert stories(*args, "--prompt_file", tmp_path / "bom.txt") == told


def test_interactive(ckpt):
    """Each line that comes through the pipe is answered before the next is read."""
    command = [
        sys.executable,
        "sample.py",
        "--ckpt",
        ckpt,
        "--interactive",
        "--num",
        "2",
        "--max_new_tokens",
        "9",
    ]
    process = subprocess.Popen(
        [*map(str, command), "--temperature", "0"], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for prompt in ("小猫", "大狗🐶", ""):
        expected = stories(
            "--ckpt", ckpt, "--num", 2, "--max_new_tokens", 9, "--temperature", 0, "--prompt", prompt
        )
        process.stdin.write(f"{prompt}\n".encode())
        process.stdin.flush()
        assert process.stdout.read(len(expected.encode())).decode() == expected
    rest, _ = process.communicate()
    assert not rest and process.returncode == 0


@pytest.mark.parametrize(
    "stdin", ["帽子,消防员\n", "帽子,消防员", "\ufeff帽子，消防员\n", "帽子;消防员\u200b\r\n"]
)
def test_answers_that_end_early(stdin, tuned):
    """At the end of the input the questions left are skipped. A byte order mark is no part of an answer."""
    args = ("--num", 2, "--max_new_tokens", 30, "--temperature", 1.0)
    done = run_script_with(stdin, "sample.py", "--ckpt", tuned, "--interactive", *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == stories("--ckpt", tuned, *args, "--words", "帽子，消防员") and len(done.stdout) > 10


def run_script_with(stdin, *args):
    command = [sys.executable, *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, input=stdin.encode(), capture_output=True)
    return SimpleNamespace(
        returncode=done.returncode, stdout=done.stdout.decode(), stderr=done.stderr.decode()
    )


def test_no_input_to_read_answers_from(ckpt):
    """Closed, as some schedulers start programs: one line. Empty: nothing to tell."""
    command = f"{sys.executable} sample.py --ckpt {ckpt} --interactive"
    done = subprocess.run(f"{command} <&-", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert_one_line_error(done, "--interactive", "standard input")
    done = run_script_with("", "sample.py", "--ckpt", ckpt, "--interactive")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "script", ["--num 100000 --max_new_tokens 2 | head -n 1", "--num 1 | head -c 1", "--help | head -n 1"]
)
def test_a_reader_that_has_gone(script, ckpt):
    """| head: it ends soon, without a word."""
    command = f"{sys.executable} sample.py --ckpt {ckpt} --device cpu {script}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=60)
    assert done.stdout and done.stderr == b"" and done.stdout.count(b"\n") <= 1


def test_output_that_cannot_be_written(ckpt):
    command = f"{sys.executable} sample.py --ckpt {ckpt} --num 1 --max_new_tokens 2"
    done = subprocess.run(f"{command} > /dev/full", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert_one_line_error(done, "No space left")
    done = subprocess.run(f"{command} >&-", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_bar_for_several_batches(ckpt):
    """On a terminal, from the end of the first batch on; a pipe gets the stories alone, the same ones."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    args = ("--ckpt", ckpt, "--num", 130, "--max_new_tokens", 60)
    command = [sys.executable, "sample.py", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=slave) as process:
        out = process.stdout.read().decode()
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "1/3" in shown and "2/3" in shown
    assert out == stories(*args) and out.count("---\n") == 129


def test_options_that_answer_the_same_question(ckpt, tmp_path):
    """Neither of two would be passed over in silence."""
    (tmp_path / "prompt.txt").write_text("从前")
    prompt, file = ("--prompt", "从前"), ("--prompt_file", tmp_path / "prompt.txt")
    assert_one_line_error(sample_here("--ckpt", ckpt, *prompt, *file), "--prompt_file")
    for options in (prompt, file, ("--words", "猫"), ("--instruction", "讲个故事")):
        assert_one_line_error(sample_here("--ckpt", ckpt, "--interactive", *options), "--interactive")


# ---- Whole characters ------------------------------------------------------------------------------


class Script:
    """In the model's place: says the given tokens one after another, whatever it is asked."""

    def __init__(self, tokens, vocab_size):
        self.tokens, self.at = tokens, 0
        self.config = SimpleNamespace(block_size=10_000, vocab_size=vocab_size)
        self.embedding = SimpleNamespace(weight=torch.zeros(1))

    def new_cache(self, batch, slots, dtype=None):
        return []

    def __call__(self, tokens, positions=None, cache=None, last=None):
        logits = torch.zeros(len(tokens), 1, self.config.vocab_size)
        logits[:, -1, self.tokens[min(self.at, len(self.tokens) - 1)]] = 1.0
        self.at += 1
        return logits


def pieces_of(tokenizer, tokens, prompt="", **options):
    pieces = []
    options = {"max_new_tokens": len(tokens), "temperature": 0} | options
    ids = [tokenizer.eos_id(), *tokenizer.encode(prompt)]
    model = Script(tokens, tokenizer.vocab_size())
    stories_ = sample_stories(model, tokenizer, [ids, ids], pieces.append, **options)
    return [story for story, _ in stories_], pieces


@settings(max_examples=60, deadline=None)
@given(
    st.text(
        st.sampled_from("从前有一只兔子，🐰🌸👩‍🚀é𠮷ẞ \n") | st.characters(exclude_categories=["Cs"]),
        max_size=30,
    )
)
def test_streaming_writes_whole_characters(loaded, text):
    """Characters that are spelt in bytes come out whole, none is lost, none twice."""
    _, tokenizer = loaded
    text = text.replace("\u2581", "").replace("\ufffd", "")
    told, pieces = pieces_of(tokenizer, [*tokenizer.encode(text), tokenizer.eos_id()])
    assert told == [text, text] and "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_is_not_held_back(loaded):
    """A piece is written as soon as its last byte is there, not at the end of the story."""
    _, tokenizer = loaded
    tokens = tokenizer.encode("🐰从🌸")
    assert sum(tokenizer.is_byte(t) for t in tokens) == 8
    _, pieces = pieces_of(tokenizer, [*tokens, tokenizer.eos_id()])
    assert [piece for piece in pieces if piece] == ["🐰", *(tokenizer.decode(t) for t in tokens[4:-4]), "🌸"]


def test_bytes_that_are_no_character(loaded):
    """A model may say bytes that spell nothing: they show as the replacement character and the story goes
    on.
    """
    _, tokenizer = loaded
    broken = [tokenizer.piece_to_id("<0xF0>"), tokenizer.piece_to_id("<0x9F>")]
    tokens = [*broken, *tokenizer.encode("从前"), tokenizer.eos_id()]
    told, pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == told[0] and told[0].strip("\ufffd") == "从前" and told[0].startswith("\ufffd")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_cut_off_inside_a_character(length, loaded):
    """max_new_tokens may end a story inside a character: half of one is not printed."""
    _, tokenizer = loaded
    tokens = [*tokenizer.encode("从前"), *tokenizer.encode("🐰")[:length]]
    told, pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == "从前" and told == ["从前", "从前"]


@pytest.fixture
def rabbits(loaded, tmp_path):
    """A checkpoint of a real model that says one rabbit after another, each in four bytes.

    The embeddings are unit vectors, and SwiGLU leads from the one of a byte to that of the next.
    """
    _, tokenizer = loaded
    ring = [tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in "🐰".encode()]
    config = ModelConfig(vocab_size=tokenizer.vocab_size(), block_size=400, n_layer=1, n_head=1, n_kv_head=1,
                         head_dim=2, n_embd=8, intermediate_size=8)  # fmt: skip
    model = GPT(config)
    for p in model.parameters():
        torch.nn.init.constant_(p, float(p.dim() == 1))
    mlp = model.blocks[0].mlp
    with torch.no_grad():
        for i, (token, after) in enumerate(zip([tokenizer.eos_id(), *ring], [1, 2, 3, 4, 1], strict=True)):
            model.embedding.weight[token, i] = 1.0
            mlp.gate_proj.weight[i, i] = mlp.up_proj.weight[i, i] = mlp.down_proj.weight[after, i] = 5.0
    state = {
        "model": model.state_dict(),
        "model_config": vars(config),
        "tokenizer": tokenizer.serialized_model_proto(),
    }
    torch.save(state | {"step": 1, "settings": {}}, tmp_path / "ckpt_000001.pt")
    return tmp_path


def test_streaming_through_a_pipe(rabbits):
    """What a terminal receives: every piece that arrives is whole characters, and they come one after
    another.
    """
    command = [sys.executable, "sample.py", "--ckpt", str(rabbits), "--num", "1", "--temperature", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--max_new_tokens", "399"], cwd=ROOT, env=env, stdout=subprocess.PIPE
    )
    received = []
    while piece := os.read(process.stdout.fileno(), 1 << 16):
        received.append(piece)
    assert process.wait() == 0
    assert [set(piece.decode()) <= {"🐰", "\n"} for piece in received] == [True] * len(received)
    assert b"".join(received).decode() == "🐰" * 99 + "\n"  # 399 tokens: the hundredth lacks a byte
    assert len(received) > 1


# ---- Bad input -------------------------------------------------------------------------------------


def test_prompt_too_long(ckpt, loaded):
    done = sample_here("--ckpt", ckpt, "--prompt", "很" * 500)
    assert_one_line_error(done, "prompt", "127")
    assert not done.stdout
    model, tokenizer = loaded
    size = model.config.block_size
    fits = next(p for n in range(size, 0, -1) if len(tokenizer.encode(p := "🐰" * n)) < size - 1)
    assert stories("--ckpt", ckpt, "--prompt", fits, "--num", 1).startswith(fits)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("num", ["0", "-1"]),
        ("max_new_tokens", ["0", "-5"]),
        ("temperature", ["-0.1", "nan"]),
        ("top_k", ["-1"]),
        ("top_p", ["0", "-0.5", "1.01", "nan"]),
        ("repetition_penalty", ["0", "-1", "nan", "inf", "1e-40"]),
        ("seed", ["-1", str(2**64), "9" * 30]),
        ("device", ["banana", "meta", "cuda:x"]),
    ],
)
def test_bad_values(key, values, ckpt):
    for value in values:
        assert_one_line_error(sample_here("--ckpt", ckpt, "--max_new_tokens", 2, f"--{key}={value}"), key)


@pytest.mark.parametrize(
    "args",
    [["--num=x"], ["--temperature=hot"], ["--nmu=3"], ["--ckpt"], ["--seed=1.5"], ["stray"], ["--num"]],
)
def test_what_is_no_option(args, ckpt):
    """Left to argparse: its usage and one line, status 2."""
    done = sample_here("--ckpt", ckpt, *args)
    assert done.returncode == 2 and "error: " in done.stderr.strip().splitlines()[-1]
    assert sample_here(*args).returncode == 2


def test_a_prompt_that_begins_with_a_dash(ckpt):
    assert_one_line_error(sample_here("--ckpt", ckpt, "--prompt", "-从前"), "--prompt", "--option=VALUE")
    assert stories("--ckpt", ckpt, "--prompt=-从前", "--num", 1, "--max_new_tokens", 2).startswith("-从前")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_asked_for_and_absent(ckpt):
    assert_one_line_error(sample_here("--ckpt", ckpt, "--device", "cuda"), "cuda")


@pytest.mark.parametrize("path", ["", " ", "out\new", "a\tb"])
def test_paths_that_cannot_be(path):
    assert_one_line_error(sample_here("--ckpt", path), "--ckpt", repr(path))
    assert_one_line_error(sample_here("--ckpt", "x", "--prompt_file", path), "--prompt_file", repr(path))


def test_home_folder(ckpt, monkeypatch):
    """Also where no shell expands it, as in --ckpt=~/model.pt."""
    args = ("--num", 1, "--max_new_tokens", 5)
    monkeypatch.setenv("HOME", str(ckpt.parent))
    assert stories(f"--ckpt=~/{ckpt.name}", *args) == stories("--ckpt", ckpt, *args)


def test_missing_checkpoint(tmp_path):
    assert_one_line_error(sample_here("--ckpt", tmp_path / "none"), tmp_path / "none")
    assert_one_line_error(sample_here("--ckpt", tmp_path), tmp_path, "ckpt_*.pt")
    assert_one_line_error(run_script("sample.py", "--ckpt", tmp_path, check=False), tmp_path)


def test_prompt_files_that_cannot_be_read(ckpt, tmp_path):
    (tmp_path / "gbk.txt").write_bytes("从前".encode("gbk"))
    for name, word in (("none.txt", "none.txt"), ("gbk.txt", "UTF-8"), (".", tmp_path)):
        assert_one_line_error(sample_here("--ckpt", ckpt, "--prompt_file", tmp_path / name), word)


def test_text_that_is_not_utf8(ckpt):
    """On the command line and through the pipe of --interactive."""
    command = [sys.executable.encode(), b"sample.py", b"--ckpt", os.fsencode(ckpt)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for extra, stdin in (([b"--prompt", b"\xb4\xd3"], b""), ([b"--interactive"], b"\xb4\xd3\xc7\xb0\n")):
        done = subprocess.run([*command, *extra], cwd=ROOT, env=env, input=stdin, capture_output=True)
        lines = done.stderr.decode().removeprefix("Type how a story begins, then Enter; Ctrl-D ends.\n")
        assert_one_line_error(SimpleNamespace(returncode=done.returncode, stderr=lines), "UTF-8")


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_malicious_checkpoints_are_not_run(ckpt, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "model.pt"
    for evil in (Evil(mark), read_checkpoint(ckpt) | {"extra": Evil(mark)}):
        torch.save(evil, path)
        assert_one_line_error(sample_here("--ckpt", path), path)
        path.write_bytes(pickle.dumps(evil))
        assert_one_line_error(sample_here("--ckpt", path), path)
        assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # it would have been


@pytest.mark.parametrize("kind", ["empty", "cut", "short", "text", "foreign", "no_tokenizer", "no_model"])
def test_checkpoints_that_cannot_serve(kind, ckpt, tmp_path):
    good, path = find_checkpoints(ckpt)[0].read_bytes(), tmp_path / "model.pt"
    half = len(good) // 2
    files = {"empty": b"", "cut": good[:half], "short": good[:11], "text": "从前有一只兔子。\n".encode()}
    parts = {"foreign": {"weights": torch.zeros(3)}}
    parts["no_tokenizer"] = read_checkpoint(ckpt) | {"tokenizer": None}
    parts["no_model"] = read_checkpoint(ckpt) | {"model": {}}
    if kind in files:
        path.write_bytes(files[kind])
    else:
        torch.save(parts[kind], path)
    assert_one_line_error(sample_here("--ckpt", path), path)


@pytest.mark.parametrize(
    "change",
    [{"n_layer": 3}, {"n_embd": 16}, {"vocab_size": 7}, {"block_size": 0}, {"head_dim": "x"}, {"unknown": 1}],
)
def test_weights_and_shape_that_do_not_fit(change, ckpt, tmp_path):
    state = read_checkpoint(ckpt)
    torch.save(state | {"model_config": state["model_config"] | change}, tmp_path / "model.pt")
    assert_one_line_error(sample_here("--ckpt", tmp_path / "model.pt"), "model.pt")


def test_tokenizer_that_does_not_fit_the_model(ckpt, tmp_path):
    """The tokenizer inside has more pieces than the model has rows."""
    state = read_checkpoint(ckpt)
    fewer = state["model"]["embedding.weight"][:500].clone()
    state["model"]["embedding.weight"] = fewer
    state["model_config"]["vocab_size"] = 500
    torch.save(state, tmp_path / "model.pt")
    assert_one_line_error(
        sample_here("--ckpt", tmp_path / "model.pt", "--prompt", "小兔子和小猫在森林里"), "model.pt"
    )


def test_output_is_utf8_text(ckpt):
    """Whole output, as bytes from the process, is text and ends its last line."""
    command = [sys.executable, "sample.py", "--ckpt", str(ckpt), "--num", "2", "--max_new_tokens", "30"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True)
    assert done.stdout.decode().endswith("\n") and not done.stderr


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_token_costs_one_forward_pass(n, loaded):
    model, tokenizer = loaded
    calls = []
    hook = model.register_forward_pre_hook(lambda *args: calls.append(1))
    prompt = [tokenizer.eos_id(), *tokenizer.encode("从前")]
    tokens = list(sample.generate(model, [prompt], n, end_token=-1))
    hook.remove()
    assert len(tokens) == len(calls) == n
