"""Sampling stories: sample.py as a user types it, and the functions that generate and write tokens.

Its promises, in the order of this file:

    what comes out          the same stories for a seed, written as they are generated; as many as asked for
    how tokens are chosen   as often as they are likely; a story that has ended disturbs no other
    whole characters        a story may be cut anywhere: half a character is never written
    prompts, instructions   how a story begins, what it shall have, and the best of several
    questions and answers   --interactive
    mistakes                each ends in one line; a checkpoint runs no code

tests/test_model.py compares the batches of `generate` with the plain model.
"""

import functools
import io
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_refused, run_here, small_model, start_script

import sample
from common.checkpoint import read_checkpoint
from common.files import UserError
from common.sampling import open_model
from sample import draw_noise, generate, sample_stories, sample_token

sample_here = functools.partial(run_here, sample, "--device=cpu", "--dtype=float32")


@pytest.fixture
def tell(pretrained):
    """The stories that sample.py prints with these options."""

    def tell(*options):
        return sample_here("--ckpt", pretrained, *options).stdout

    return tell


@pytest.fixture(scope="module")
def loaded(pretrained):
    """Model and tokenizer."""
    model, tokenizer, _ = open_model(pretrained, "cpu", "float32")
    return model, tokenizer


# ---- What comes out --------------------------------------------------------------------------------


def test_a_story_is_written_as_it_is_generated_and_the_seed_decides_it(pretrained, tell):
    """In a process of its own, whose output is a pipe."""
    options = ("--num=1", "--max_new_tokens=60")
    arguments = ("--ckpt", pretrained, "--dtype=float32", "--device=cpu", "--seed=7")
    with start_script("sample.py", *arguments, *options) as process:
        pieces = list(iter(process.stdout.buffer.read1, b""))
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert len(pieces) > 1
    told = b"".join(pieces).decode()
    assert told.endswith("\n")
    assert told == tell(*options, "--seed=7")
    assert told != tell(*options, "--seed=8")


@pytest.mark.parametrize(("options", "num"), [([], 3), (["--num=1"], 1), (["--num=5"], 5)])
def test_there_are_as_many_stories_as_asked_for(options, num, tell):
    told = tell("--max_new_tokens=15", "--prompt=从前", *options)
    stories = told.removesuffix("\n").split("\n---\n")
    assert len(stories) == num
    assert len(set(stories)) == num
    assert all(story.startswith("从前") for story in stories)


def greedy(model, tokenizer, prompt, limit):
    """The likeliest token again and again, without cache or batch."""
    story = tokenizer.encode(prompt)
    for _ in range(limit):
        tokens = torch.tensor([[tokenizer.eos_id(), *story]])
        token = model(tokens)[0, -1].argmax().item()
        if token == tokenizer.eos_id():
            break
        story.append(token)
    return tokenizer.decode(story)


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature=0"],
        ["--temperature=1e-7", "--top_k=0"],  # dividing by it would give infinities
        ["--temperature=1e-320", "--top_k=0"],
        ["--temperature=1.3", "--top_k=1"],
        ["--temperature=1.3", "--top_p=1e-9"],
    ],
)
def test_where_there_is_no_choice_the_likeliest_story_is_told(options, loaded, tell):
    told = tell("--num=1", "--max_new_tokens=40", "--prompt=小兔说：", *options)
    assert told == greedy(*loaded, "小兔说：", 40) + "\n"


def test_a_repetition_penalty_avoids_what_has_occurred(tell):
    told = tell("--num=1", "--temperature=0", "--prompt=。。。", "--repetition_penalty=100")
    assert "。" not in told.removeprefix("。。。")


@pytest.mark.parametrize(("asked", "told"), [(1, 1), (5, 5), (100, 37)])
def test_a_token_costs_one_forward_pass_and_the_model_ends_when_it_is_full(asked, told):
    model = small_model()  # of 40 positions
    passes = []
    model.register_forward_pre_hook(lambda *args: passes.append(1))
    tokens = list(generate(model, [[1, 2, 3]], asked, end_token=-1))
    assert len(tokens) == len(passes) == told


def test_weights_may_be_bfloat16(pretrained):
    model, _, _ = open_model(pretrained, "cpu", "bfloat16")
    assert model.embedding.weight.dtype == torch.bfloat16
    assert run_here(sample, "--ckpt", pretrained, "--dtype=bfloat16", "--max_new_tokens=9").stdout


def test_many_stories_come_in_batches_with_seeds_of_their_own(tell, monkeypatch):
    monkeypatch.setattr(sample, "BATCH", 2)
    first = tell("--num=2", "--max_new_tokens=9", "--seed=5")
    rest = tell("--num=1", "--max_new_tokens=9", "--seed=6")
    assert tell("--num=3", "--max_new_tokens=9", "--seed=5") == f"{first}---\n{rest}"


def test_a_folder_means_its_newest_checkpoint_and_one_file_is_enough(pretrained, tell, tmp_path):
    state = read_checkpoint(pretrained)
    shutil.copy(pretrained, tmp_path / "ckpt_1000000.pt")
    state["model"]["embedding.weight"].neg_()
    torch.save(state, tmp_path / "ckpt_999999.pt")
    torch.save(state, tmp_path / "ckpt_2000000 copy.pt")
    options = ("--num=1", "--max_new_tokens=15")
    assert tell(f"--ckpt={tmp_path}", *options) == tell(*options)


def test_no_checkpoint_means_the_newest_run(pretrained, tell, tmp_path, monkeypatch):
    options = ("--num=1", "--max_new_tokens=9")
    monkeypatch.chdir(tmp_path)
    assert_refused(sample, (), "out: no run here", "python train.py")
    for name, saved_at in (("a_new", 2000), ("z_old", 1000)):
        copy = tmp_path / "out" / name / "ckpt_000020.pt"
        copy.parent.mkdir(parents=True)
        shutil.copy(pretrained, copy)
        os.utime(copy, (saved_at, saved_at))
    for arguments in ((), ("--ckpt",)):
        done = sample_here(*options, *arguments)
        assert (done.stdout, done.stderr) == (tell(*options), "the newest run is out/a_new\n")


def test_a_reader_that_has_gone_ends_it_without_a_word(pretrained):
    """| head"""
    options = ("--num=100000", "--max_new_tokens=2")
    with start_script("sample.py", "--ckpt", pretrained, "--device=cpu", *options) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


# ---- How tokens are chosen -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "shares"),
    [
        (1.0, 0, 1.0, [2, 4, 1, 3]),
        (1.0, 50, 1.0, [2, 4, 1, 3]),
        (0.5, 0, 1.0, [4, 16, 1, 9]),
        (1.0, 2, 1.0, [0, 4, 0, 3]),
        (1.0, 0, 0.69, [0, 4, 0, 3]),
        (1.0, 0, 0.71, [2, 4, 0, 3]),
        (1.0, 3, 0.75, [0, 4, 0, 3]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_k, top_p, shares):
    """top_p counts the shares of those that top_k has left."""
    logits = torch.tensor([0.2, 0.4, 0.1, 0.3]).log()
    noise = draw_noise(200_000, top_k, 4, torch.Generator().manual_seed(0))
    drawn = sample_token(logits.expand(200_000, 4), None, temperature, top_p, 1.0, noise)
    found = torch.bincount(drawn, minlength=4) / 200_000
    expected = torch.tensor(shares) / sum(shares)
    torch.testing.assert_close(found, expected, atol=0.005, rtol=0)
    assert torch.equal(found > 0, expected > 0)


def test_a_repetition_penalty_makes_what_has_occurred_less_likely():
    """A positive logit is divided by it, a negative one multiplied."""
    seen = torch.tensor([[True, False]])
    for logits in ([2.0, 1.9], [-1.0, -1.1]):
        logits = torch.tensor([logits])
        assert sample_token(logits, seen, 0, 1.0, 1.0, None).item() == 0
        assert sample_token(logits, seen, 0, 1.0, 1.3, None).item() == 1


def test_a_repetition_penalty_counts_what_the_story_itself_has_said():
    tokens = generate(small_model(), [[1, 2, 3]], 30, 1, temperature=0, repetition_penalty=100)
    story = [token.item() for token in tokens]
    assert len({1, 2, 3, *story}) == 3 + 30


def test_sequences_that_have_ended_change_nothing_in_the_others():
    """They are computed no more, once they are a quarter."""
    model = small_model(block_size=80)
    prompts = [[3, 4, 5], [7], *([i, i + 1] for i in range(20, 31))]
    endless = torch.stack(list(generate(model, prompts, 70, end_token=-1)))  # (70, 13)
    end = endless.flatten().mode().values.item()  # a frequent token, so that many end early
    widths = []
    model.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    told = torch.stack(list(generate(model, prompts, 70, end)))
    has_ended = (endless == end).cumsum(0) > 0
    expected = endless.masked_fill(has_ended, end)
    assert torch.equal(told, expected[: len(told)])
    assert len(told) == 70 or has_ended[len(told) - 1].all()
    assert min(widths) < 7


# ---- Whole characters ------------------------------------------------------------------------------


class Script:
    """In the model's place: says the given tokens one after another, whatever it is asked."""

    def __init__(self, tokens, vocab_size):
        self.tokens = iter(tokens)
        self.config = SimpleNamespace(block_size=1000, vocab_size=vocab_size)
        self.embedding = SimpleNamespace(weight=torch.zeros(1))

    def new_cache(self, batch, length, dtype):
        return []

    def __call__(self, tokens, **options):
        logits = torch.full((len(tokens), 1, self.config.vocab_size), 0.9)
        logits[:, :, next(self.tokens)] = 1.0
        return logits


def written(tokenizer, tokens, **options):
    """The story of two sequences that both say these tokens, and the pieces in which it is written."""
    pieces = []
    model = Script(tokens, tokenizer.vocab_size())
    prompts = [[tokenizer.eos_id()]] * 2
    options |= {"max_new_tokens": len(tokens), "temperature": 0}
    one, two = sample_stories(model, tokenizer, prompts, pieces.append, **options)
    assert one == two
    assert "".join(pieces) == one[0]
    return *one, [piece for piece in pieces if piece]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [("🐰从🌸", ["🐰", "从", "🌸"]), ("👩\u200d🚀", ["👩", "\u200d", "🚀"]), ("𠮷ẞ\n", ["𠮷", "ẞ", "\n"])],
)
def test_a_character_of_several_tokens_is_written_when_it_is_complete(text, pieces, loaded):
    _, tokenizer = loaded
    tokens = [token for character in text for token in tokenizer.encode(character)]
    assert len(tokens) > len(text)
    assert written(tokenizer, [*tokens, tokenizer.eos_id()]) == (text, True, pieces)


@pytest.mark.parametrize("n_bytes", [1, 2, 3])
def test_half_a_character_at_the_end_is_not_written(n_bytes, loaded):
    _, tokenizer = loaded
    beginning = tokenizer.encode("从前")
    rabbit = tokenizer.encode("🐰")
    story, finished, _ = written(tokenizer, [*beginning, *rabbit[-4 : len(rabbit) - 4 + n_bytes]])
    assert (story, finished) == ("从前", False)


def test_bytes_that_are_no_character_do_not_stop_a_story(loaded):
    _, tokenizer = loaded
    broken = [tokenizer.piece_to_id("<0xF0>"), tokenizer.piece_to_id("<0x9F>")]
    story, _, _ = written(tokenizer, [*broken, *tokenizer.encode("从前"), tokenizer.eos_id()])
    assert story.startswith("\ufffd") and story.strip("\ufffd") == "从前"


def test_a_repetition_penalty_does_not_keep_a_story_from_ending(loaded):
    """Every prompt begins with the end token, which has thus occurred."""
    _, tokenizer = loaded
    tokens = [*tokenizer.encode("从前"), tokenizer.eos_id()]
    story, finished, _ = written(tokenizer, tokens, repetition_penalty=1.3)
    assert (story, finished) == ("从前", True)


# ---- Prompts and instructions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "beginning"),
    [
        (" 从前\r\n有e\u0301 ", "从前\n有é"),
        ("\ufeff从前\u200b", "从前"),
        ("-从前", "-从前"),
        ("</s><pad><unk><0x0A>", "</s><pad><unk><0x0A>"),
        ("<|user|>你好<|assistant|>", "<|user|>你好<|assistant|>"),
    ],
)
def test_a_prompt_is_cleaned_and_stays_text(prompt, beginning, tell):
    """It is cleaned as stories are, and never becomes a control token."""
    told = tell(f"--prompt={prompt}", "--num=1", "--max_new_tokens=5")
    assert told.startswith(beginning)


def test_a_prompt_may_come_from_a_file(tell, tmp_path):
    file = tmp_path / "prompt.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text("从前，有一只🐰。\n它说：\n", encoding=encoding)
        told = tell(f"--prompt_file={file}", "--max_new_tokens=9")
        assert told == tell("--prompt=从前，有一只🐰。\n它说：", "--max_new_tokens=9")


def test_the_longest_prompt_leaves_room_for_one_token(loaded):
    model, tokenizer = loaded
    prompt = [tokenizer.eos_id()] * 255
    assert len(sample_stories(model, tokenizer, [prompt], max_new_tokens=9)) == 1
    with pytest.raises(UserError, match="256 tokens, the model reads at most 255"):
        sample_stories(model, tokenizer, [[*prompt, 5]], max_new_tokens=9)


def test_a_tuned_model_that_is_asked_for_nothing_shows_its_example(tuned, tmp_path):
    state = read_checkpoint(tuned)
    _, tokenizer, _ = open_model(tuned, "cpu", "float32")
    example = tokenizer.decode(state["prompt"])
    done = sample_here("--ckpt", tuned, "--num=1")
    assert done.stdout == sample_here("--ckpt", tuned, "--num=1", "--instruction", example).stdout
    assert done.stderr.startswith("asked for: ") and "--words" in done.stderr
    assert sample_here("--ckpt", tuned, "--prompt=从前").stderr == ""
    del state["prompt"]
    torch.save(state, tmp_path / "old.pt")
    assert_refused(sample, ["--ckpt", tmp_path / "old.pt"], "old.pt", "--words")


def test_the_best_is_one_of_the_stories_of_its_seed(tuned):
    """Of a prompt only the beginning of the story is printed."""
    options = ("--ckpt", tuned, "--words=森林", "--prompt=从前", "--seed=3", "--max_new_tokens=60")
    several = sample_here(*options, "--num=4").stdout.strip().split("\n---\n")
    assert all(story.startswith("从前") for story in several)
    best = sample_here(*options, "--best_of=4").stdout.strip()
    assert best in several


@pytest.mark.parametrize(
    ("options", "best", "found"),
    [
        (["--words=小兔,太阳"], "太阳和小兔。", "all words"),
        (["--words=小兔，月亮 "], "小兔睡了。", "words missing: 月亮"),
        (["--features=对话"], "“早！”", "dialogue"),
        (["--sentence=小兔睡了"], "小兔睡了。", "the sentence"),
        (["--sentence=小猫睡着觉", "--words=小兔"], "小兔睡了。", "all words, no sentence"),
    ],
)
def test_the_best_has_most_of_what_was_asked_for(options, best, found, tuned, monkeypatch):
    """The beginning of the story is no part of that. Batches have seeds of their own."""
    batches = [
        [("小兔看太阳", False), ("小兔睡了。", True)],  # the first has not reached its end
        [("太阳和小兔。", True), ("小兔和太阳从前。", True)],
        [("“早！”", True)],
    ]
    asked = []

    def sample_stories(model, tokenizer, prompts, **options):
        batch = batches[len(asked) % 3]
        asked.append((len(prompts), options["seed"]))
        return batch

    monkeypatch.setattr(sample, "BATCH", 2)
    monkeypatch.setattr(sample, "sample_stories", sample_stories)
    done = sample_here("--ckpt", tuned, *options, "--prompt=从前", "--best_of=5", "--num=2")
    assert done.stdout == f"{best}\n---\n{best}\n"
    assert done.stderr == f"(best of 5: {found})\n" * 2
    assert asked == [(2, 1337), (2, 1338), (1, 1339), (2, 1340), (2, 1341), (1, 1342)]


# ---- Questions and answers -------------------------------------------------------------------------


def test_an_answer_comes_before_the_next_question(pretrained, tell):
    options = ("--num=2", "--max_new_tokens=9", "--temperature=0")
    arguments = ("--ckpt", pretrained, "--dtype=float32", "--device=cpu")
    with start_script("sample.py", *arguments, "--interactive", *options) as process:
        for prompt in ("小猫", "大狗🐶", ""):
            expected = tell(*options, f"--prompt={prompt}")
            process.stdin.write(prompt + "\n")
            process.stdin.flush()
            assert process.stdout.read(len(expected)) == expected
    assert process.returncode == 0


@pytest.fixture
def type_in(monkeypatch):
    """Makes bytes what is on standard input."""

    def type_in(typed):
        stdin = io.TextIOWrapper(io.BytesIO(typed), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", stdin)

    return type_in


@pytest.mark.parametrize(
    ("typed", "answers"),
    [
        ("", []),
        ("小猫\n\n", [("小猫", "")]),
        ("小猫\n对话\n小狗", [("小猫", "对话"), ("小狗", "")]),
        ("\n\n", [("", "")]),
    ],
)
def test_questions_left_at_the_end_are_skipped(typed, answers, type_in):
    type_in(typed.encode())
    assert [tuple(answer.values()) for answer in sample.ask(["词汇", "特点"])] == answers


def test_what_is_typed_is_what_the_options_say(tuned, type_in, monkeypatch, capsys):
    """A byte order mark is no part of an answer."""
    options = ("--ckpt", str(tuned), "--device=cpu", "--dtype=float32", "--max_new_tokens=30")
    expected = run_here(sample, *options, "--words=帽子,消防员").stdout
    monkeypatch.setattr(sys, "argv", ["sample.py", *options, "--interactive"])
    type_in("\ufeff帽子；消防员\u200b\r\n".encode())
    sample.main()
    assert capsys.readouterr().out == expected
    type_in(b"\xb4\xd3\n")
    with pytest.raises(UserError, match="not UTF-8"):
        sample.main()


def test_no_input_to_read_answers_from(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="--interactive: standard input"):
        list(sample.ask(["prompt"]))


# ---- Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--num=0", "--num 0: must be at least 1"),
        ("--best_of=0", "--best_of 0"),
        ("--max_new_tokens=0", "--max_new_tokens 0"),
        ("--temperature=-0.1", "--temperature"),
        ("--temperature=nan", "--temperature"),
        ("--top_k=-1", "--top_k"),
        ("--top_p=0", "--top_p 0"),
        ("--top_p=1.01", "--top_p 1.01"),
        ("--repetition_penalty=0", "--repetition_penalty"),
        ("--repetition_penalty=inf", "--repetition_penalty"),
        ("--seed=-1", "--seed"),
        (f"--seed={2**63}", "--seed"),
        ("--device=banana", "device = 'banana'"),
        ("--device=meta", "device = 'meta'"),
        ("--num=x", "--num"),
        ("--nmu=3", "--nmu=3"),
        ("--prompt -从前", "--option=VALUE"),
        ("--prompt=从前 --prompt_file=x", "--prompt_file"),
        ("--prompt=\udcb4", "not UTF-8"),
        ("--prompt_file=none.txt", "none.txt"),
        ("--prompt_file=.", ".: Is a directory"),
        ("--ckpt=", "--ckpt: '': empty"),
        ("--ckpt=~/none", os.path.expanduser("~/none")),
        ("--prompt_file=out\new", "write / or \\\\"),
        ("--interactive --prompt=从前", "--interactive"),
        ("--interactive --prompt_file=x", "--interactive"),
        ("--interactive --words=猫", "--interactive"),
        ("--words=猫", "has not learned to follow instructions"),
        ("--best_of=4", "nothing to choose by"),
        (f"--prompt={'🐰' * 500}", "the model reads at most 255"),
    ],
)
def test_a_mistake_ends_in_one_line(options, words, pretrained):
    assert_refused(sample, ["--ckpt", pretrained, *options.split(" ")], words)


def test_a_prompt_file_that_is_not_utf8(pretrained, tmp_path):
    file = tmp_path / "gbk.txt"
    file.write_bytes("从前".encode("gbk"))
    assert_refused(sample, ["--ckpt", pretrained, "--prompt_file", file], "gbk.txt: not UTF-8 at byte 0")


@pytest.mark.parametrize(
    ("run", "advice"),
    [
        ("demo", "python train.py config/demo.py"),
        ("demo_sft", "python sft.py config/demo_sft.py"),
        ("demo_dpo", "python -m tools.dpo config/demo_dpo.py"),
        ("mine", "give a checkpoint"),
        ("", "no checkpoint (ckpt_*.pt) in this folder"),
    ],
)
def test_a_checkpoint_that_is_missing(run, advice, tmp_path):
    assert_refused(sample, ["--ckpt", tmp_path / run], tmp_path / run, advice)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_code_in_a_checkpoint_is_not_run(pretrained, tmp_path):
    mark = tmp_path / "mark"
    path = tmp_path / "model.pt"
    for evil in (Evil(mark), read_checkpoint(pretrained) | {"extra": Evil(mark)}):
        torch.save(evil, path)
        assert_refused(sample, ["--ckpt", path], path, "not a checkpoint that can be read")
        assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have been


@pytest.mark.parametrize("kept", [0, 11, 20_000])
def test_a_checkpoint_that_is_cut(kept, pretrained, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(pretrained.read_bytes()[:kept])
    assert_refused(sample, ["--ckpt", path], path, "is there an older one?")


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("step", None, "'step' is missing"),
        ("tokenizer", b"none", "not a SentencePiece model"),
        ("model", {}, "weights and shape do not fit"),
        ("model_config", {"n_layer": 3}, "weights and shape do not fit"),
        ("model_config", {"block_size": 0}, "weights and shape do not fit"),
        ("model_config", {"head_dim": "x"}, "weights and shape do not fit"),
        ("model_config", {"unknown": 1}, "weights and shape do not fit"),
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit(part, value, words, pretrained, tmp_path):
    state = read_checkpoint(pretrained)
    if part == "step":
        del state["step"]
    elif part == "model_config":
        state[part] |= value
    else:
        state[part] = value
    torch.save(state, tmp_path / "model.pt")
    assert_refused(sample, ["--ckpt", tmp_path / "model.pt"], "model.pt", words)


def test_a_tokenizer_of_more_pieces_than_the_model_has(pretrained, tmp_path):
    state = read_checkpoint(pretrained)
    state["model"]["embedding.weight"] = state["model"]["embedding.weight"][:500].clone()
    state["model_config"]["vocab_size"] = 500
    torch.save(state, tmp_path / "model.pt")
    assert_refused(sample, ["--ckpt", tmp_path / "model.pt"], "model.pt", "not as many pieces")
