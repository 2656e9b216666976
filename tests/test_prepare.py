"""prepare.py: from stories to token files, read back the way nanoGPT reads them.

    promises     every story is there once, cleaned, as it was written, and always on the same side
    cleaning     what is stripped, what is dropped and counted
    tokenizer    what a new one has, and which given ones are refused
    the folder   it appears whole or not at all, whatever stops a run
    around       links, worker processes, bad options, errors

Which files are read, and how, is tested in test_read.py; --task sft in test_instructions.py.
"""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from helpers import (
    ROOT,
    assert_one_line_error,
    assert_refused,
    meta_of,
    options,
    run_here,
    run_script,
    start_script,
)
from test_read import ONE_LINE, as_tar, jsonl, write
from test_read import STORIES as SOME
from unseen import reference_strip

import prepare
import stories.read
from common.files import UserError, atomic_write, load_tokenizer, report_errors, user_path
from stories.constraints import clean
from stories.generate import write_corpus
from stories.records import text_digest

MADE = ["meta.json", "tokenizer.model", "train.bin", "val.bin"]
WHOLE = ["out", *(f"out/{name}" for name in MADE)]  # what lies where a run has ended
STORIES = SOME + [f"第{i}天，小狗捡到了{i * 7}个苹果。" for i in range(60)]


def command(out, *inputs, **more):
    """The arguments of prepare.py for a small vocabulary."""
    return [*inputs, *options({"out_dir": out, "val_fraction": 0.2, "vocab_size": 600} | more)]


def make(out, *inputs, **more):
    return run_here(prepare, *command(out, *inputs, **more))


def read_folder(folder):
    """{split: its stories}: uint16 cut at the end token and decoded."""
    meta = meta_of(folder)
    tokenizer = load_tokenizer((folder / "tokenizer.model").read_bytes(), folder)
    found = {}
    for split in ("train", "val"):
        ids = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r")
        assert ids[-1] == meta["end_token"] == tokenizer.eos_id() and ids.max() < meta["vocab_size"]
        ends = np.flatnonzero(ids == meta["end_token"])
        assert sum(map(tokenizer.is_control, ids.tolist())) == len(ends)
        parts = np.split(ids, ends)[:-1]
        found[split] = [tokenizer.decode(part.tolist()) for part in parts]
    return found


def assert_holds(folder, expected):
    """The folder holds exactly these stories, each once, in this order within either split."""
    found = read_folder(folder)
    assert len(found["train"]) + len(found["val"]) == len(expected)
    for side in found.values():
        assert side == [story for story in expected if story in set(side)]


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in MADE}


def names_in(folder):
    """Everything in a folder but the lock files, which stay."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """STORIES, prepared by the command as a user types it; what it printed is in printed.txt beside."""
    folder = tmp_path_factory.mktemp("base")
    write(folder / "in" / "0.jsonl", b"\n\n")
    write(folder / "in" / "1.jsonl", jsonl(STORIES, ensure_ascii=False))
    write(folder / "in" / "2.txt", b"")
    done = run_script("prepare.py", *command(folder / "data", folder / "in"))
    write(folder / "printed.txt", done.stdout.encode())
    return folder / "data"


@pytest.fixture(scope="module")
def printed(base):
    return (base.parent / "printed.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def given(base):
    """A tokenizer: to train one takes longer than all else."""
    return base / "tokenizer.model"


@pytest.fixture
def one_line(tmp_path):
    return write(tmp_path / "one_line.jsonl", jsonl(ONE_LINE))


# ---- Promises --------------------------------------------------------------------------------------


def test_every_story_is_there_once_and_as_it_was_written(base):
    assert sorted(os.listdir(base)) == MADE
    assert_holds(base, STORIES)


def test_the_report_shows_how_the_first_story_stands_in_the_file(base, given, printed):
    """Its pieces, their ids, and the text."""
    story = read_folder(base)["train"][0]
    ids = load_tokenizer(given.read_bytes(), given).encode(story)
    *_, begins, pieces, decoded = printed.splitlines()
    assert f"begins with {len(ids)} tokens, then the end token 2" in begins
    assert re.findall(r" (\d+)(?: \||$)", pieces) == [str(token) for token in ids]
    assert decoded.strip() == f"decoded: {story}"


def test_meta_json_has_counts_checksums_and_settings(base, given):
    meta = meta_of(base)
    for split, texts in read_folder(base).items():
        data = (base / f"{split}.bin").read_bytes()
        assert meta[split] == {
            "stories": len(texts),
            "tokens": len(data) // 2,
            "characters": len("".join(texts)),
            "bytes": len("".join(texts).encode()),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    assert meta["tokenizer_sha256"] == hashlib.sha256(given.read_bytes()).hexdigest()
    assert (meta["vocab_size"], meta["end_token"], meta["template"]) == (600, 2, None)


def test_the_tokenizer_is_trained_without_the_stories_held_out(base, printed):
    assert f"training a tokenizer on {meta_of(base)['train']['characters']:,} characters" in printed


def test_blocks_and_workers_do_not_change_a_bit(base, tmp_path, monkeypatch):
    monkeypatch.setattr(stories.read, "BLOCK", 500)
    for workers in (1, 3):
        make(tmp_path / "out", base.parent / "in" / "1.jsonl", workers=workers)
        for name in ("train.bin", "val.bin", "tokenizer.model"):
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_a_story_never_changes_sides(base, tmp_path):
    """Whatever the order, the company, the line ends, the format, the key and the tokenizer."""
    assert text_digest("猫睡了。") == 5455512068551196544  # which decides, in every version
    more = [f"另一个故事，第{i}个。" for i in range(200)]
    rows = [{"story": f" {story}\r\n", "story_zh": "x"} for story in [*more, *STORIES]]
    random.Random(7).shuffle(rows)
    file = write(tmp_path / "a.json", json.dumps(rows).encode())
    make(tmp_path / "out", file, vocab_size=500, text_key="story")
    found = read_folder(tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == sorted(STORIES + more)
    for split, texts in read_folder(base).items():
        assert set(found[split]) & set(STORIES) == set(texts)


def test_the_share_held_out_is_the_one_asked_for(given, tmp_path):
    """To 5 standard deviations."""
    file = write(tmp_path / "a.jsonl", jsonl(f"第{i}个故事" for i in range(2000)))
    make(tmp_path / "out", file, val_fraction=0.05, tokenizer=given)
    assert abs(meta_of(tmp_path / "out")["val"]["stories"] - 100) < 49


def test_no_argument_means_the_embedded_corpus_and_data_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "write_corpus", lambda path: write_corpus(path, 300))
    run_here(prepare)
    rows = Path("data/stories.jsonl").read_text(encoding="utf-8").splitlines()
    assert_holds(Path("data/demo"), [json.loads(row)["story_zh"] for row in rows])
    expected = {"val_fraction": 0.01, "vocab_size": 8192, "text_key": "story_zh", "task": "pretrain"}
    assert expected.items() <= meta_of("data/demo")["settings"].items()


def test_a_large_corpus_is_sampled_alike_in_any_order(tmp_path, monkeypatch):
    """Its tokenizer is trained on as much as fits, the same for any order and any number of workers."""
    monkeypatch.setattr(stories.read, "BLOCK", 600)
    monkeypatch.setattr(prepare, "SAMPLE", 2000)
    args = SimpleNamespace(task="pretrain", text_key="story_zh", val_fraction=0.2)
    texts = [f"第{i}天，小狗走了{i * 31 % 97}次。" for i in range(600)]
    samples = []
    for number in (1, 2):
        random.Random(number).shuffle(texts)
        file = write(tmp_path / "a.jsonl", jsonl(texts))
        with prepare.worker_processes(number) as workers:
            samples.append(prepare.sample_stories(workers, [file], args))
    assert samples[0] == samples[1]
    assert 500 < len("".join(samples[0])) <= 2000


def test_only_a_block_for_each_worker_is_read_ahead():
    """So that memory does not grow with the input."""
    blocks = iter(range(10_000))
    with prepare.worker_processes(2) as workers:
        results = prepare.in_order(workers, pow, blocks, 2)
        assert [next(results), next(results), next(results)] == [0, 1, 4]
        assert next(blocks) == 5


def test_a_worker_that_is_killed_while_it_sends_is_noticed():
    with prepare.worker_processes(2) as workers:
        prepare.send_call(workers[0], bytes, 1 << 24)  # more than a pipe holds
        assert workers[0].poll(60)
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        with pytest.raises(UserError, match="ended abruptly"):
            prepare.receive_result(workers[0])
        with pytest.raises(UserError, match="ended abruptly"):
            prepare.send_call(workers[1], pow, 1, 2)


# ---- Cleaning --------------------------------------------------------------------------------------

SPELT = "</s> <s> <unk> <pad> <|user|> <|assistant|> <|endoftext|> <0x41> <0x00> שלום مرحبا 😀 👩‍👩‍👧 🇨🇳"
ODD = "\u2585 \u2047 \ufffd \ufeff \u200b \u202e \ufe0f e\u0301 ﬁ Ａ ① 猫 \U0010ffff \x1b[0m \\n %s \0 \u3000"
TRICKY = [*SPELT.split(), *ODD.split(" "), " ", "  ", "\n", "\r", "\r\n", "\t"]


def reference_clean(text):
    """The promise of the cleaning, said a second time."""
    return reference_strip(unicodedata.normalize("NFC", re.sub("\r\n?", "\n", text)))


def test_what_nobody_sees_is_stripped_and_all_else_stays():
    """Every character of Unicode that is one, at the begin, in the middle and at the end."""
    for code in (*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE0200)):
        odd = chr(code)
        text = f"{odd}猫{odd}猫{odd}"
        assert clean(text) == reference_clean(text), hex(code)


def test_tokens_give_any_text_back(given):
    """And make no control token."""
    tokenizer = load_tokenizer(given.read_bytes(), given)
    draw = random.Random(0)
    for length in range(1000):
        text = "".join(draw.choices(TRICKY, k=length % 12))
        cleaned = clean(text)
        assert cleaned == reference_clean(text) == clean(cleaned)
        ids = tokenizer.encode(cleaned)
        assert tokenizer.decode(ids) == cleaned
        assert not any(map(tokenizer.is_control, ids))


def test_what_is_dropped_is_counted(given, tmp_path):
    kept = ["猫和狗。", "caf\u00e9 第一", "一\n二\n三\n四", "双  空格\t和\t制表", "有记号", "爱❤\ufe0f"]
    kept += ["旗🏴\U000e0067\U000e007f", "零\u200b宽", *STORIES]
    duplicates = ["  猫和狗。 \n", "cafe\u0301 第一", "一\r\n二\r三\n四", "\ufeff有记号\u200b"]
    empty = ["", "   ", "\r\n\t ", "\u3000", "\u200b", "\ufeff \u200d\ufe0f", "\0\x1b", "\u3164\u2800", None]
    empty.append(float("nan"))  # how pandas writes null
    damaged = ["下划▁线", "▁", "零\0字节", "换\v行", "红\x1b[31m字", "删\x7f除", "下\x85行"]
    halves = ["\ud800 半个", "半个 \udc00", "\udc00\ud800"]
    twice = b'{"story_zh": "one", "story_zh": "two"}\n'
    file = write(tmp_path / "a.jsonl", jsonl([*kept, *duplicates, *empty, *damaged, *halves]) + twice)
    done = make(tmp_path / "out", file, tokenizer=given)
    assert_holds(tmp_path / "out", kept)
    dropped = {"duplicate": 4, "empty": 10, "not_unicode": 3, "unencodable": 7, "duplicate_key": 1}
    assert meta_of(tmp_path / "out")["dropped"] == dropped
    assert "dropped: 4 duplicate, 10 empty, 3 not_unicode, 7 unencodable, 1 duplicate_key" in done.stdout


SPELLINGS = "<s> </s> <|endoftext|> <|im_end|> <|user|> <pad> <unk> [gMASK] [/INST] <</SYS>> <bos> <｜User｜>"


def test_control_tokens_that_are_spelt_stay_text_and_are_counted(tmp_path):
    """However often a corpus spells them, no token of its stories is one."""
    spelt = [f"小狗走了。{spelling * 99}" for spelling in SPELLINGS.split()]
    plain = [story for story in ONE_LINE if "<" not in story] + ["小狗<走>了 [笑]，1<2。<br>"]
    file = write(tmp_path / "a.jsonl", jsonl(spelt + plain))
    done = make(tmp_path / "out", file)
    assert_holds(tmp_path / "out", spelt + plain)
    assert "\n12 texts spell a control token, which stays text: '<s>'" in done.stdout


# ---- The tokenizer ---------------------------------------------------------------------------------


def test_pieces_that_every_tokenizer_has(given):
    """Control tokens; a piece for every byte; no prefix before a text."""
    tokenizer = load_tokenizer(given.read_bytes(), given)
    for token, piece in enumerate(["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]):
        assert tokenizer.id_to_piece(token) == piece
        assert tokenizer.is_control(token) == (token > 0)
    assert sum(map(tokenizer.is_byte, range(600))) == 256
    assert "".join(tokenizer.encode("小狗捡到了苹果", out_type=str)) == "小狗捡到了苹果"


def test_a_story_as_long_as_a_novel_is_learnt_from():
    """SentencePiece would leave out a line of over 4,192 bytes."""
    model = prepare.train_tokenizer(["胡萝卜和苹果" * 2000], 500)
    assert load_tokenizer(model, "new").encode("胡萝卜和苹果", out_type=str) == ["胡萝卜和苹果"]


def test_a_small_corpus_says_how_many_pieces_it_fills(one_line, tmp_path, printed):
    done = make(tmp_path / "out", one_line, vocab_size=30000)
    size = meta_of(tmp_path / "out")["vocab_size"]
    assert f"fills only {size:,} of the 30,000 pieces" in done.stdout and "fills" not in printed


def test_too_small_a_vocabulary_says_what_is_needed(one_line, tmp_path):
    """The number in the message works."""
    out = tmp_path / "out"
    done = run_here(prepare, *command(out, one_line, vocab_size=270), check=False)
    assert_one_line_error(done, "--vocab_size 270", "at least")
    needed = int(re.search(r"at least (\d+)", done.stderr)[1])
    assert_refused(prepare, command(out, one_line, vocab_size=needed - 1), f"at least {needed}")
    make(out, one_line, vocab_size=needed)


def test_a_tokenizer_of_another_model_is_taken_as_it_is(shared, tmp_path):
    model = shared / "chatglm_tokenizer.model"
    make(tmp_path / "out", shared / "zh_stories.jsonl", tokenizer=model)
    rows = (shared / "zh_stories.jsonl").read_text(encoding="utf-8").splitlines()
    cleaned = [reference_clean(json.loads(row)["story_zh"]) for row in rows]
    kept = [text for text in cleaned if text and "▁" not in text]
    assert_holds(tmp_path / "out", list(dict.fromkeys(kept)))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()


def test_a_vocabulary_has_as_many_pieces_as_uint16_can_count(given, monkeypatch):
    large = SimpleNamespace(encode=lambda text: [258, 65535], eos_id=lambda: 2)
    assert prepare.encode(("text",), large, ([],), check=False).tokens == b"\2\1\xff\xff\2\0"
    sizes = iter([65536, 65537, 65537])
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "vocab_size", lambda self: next(sizes))
    load_tokenizer(given.read_bytes(), "fits")
    with pytest.raises(UserError, match="over: 65,537 pieces"):
        load_tokenizer(given.read_bytes(), "over")


def foreign_tokenizer(path, texts, **more):
    """A tokenizer with SentencePiece's own settings, as many are: it normalizes, and has no bytes."""
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, hard_vocab_limit=False, minloglevel=2, **more
        )
    return path


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    texts = [f"第{i}天，小狗走了。小猫、小熊和小鸟也走了！" for i in range(50)]
    return foreign_tokenizer(tmp_path_factory.mktemp("lossy") / "lossy.model", texts)


def test_a_tokenizer_that_changes_the_text(lossy, tmp_path):
    """Refused with a share and an example; with a flag accepted, and the report still says it."""
    file = write(tmp_path / "a.jsonl", jsonl(f"第{i}天，小狗走了。" for i in range(60)))
    arguments = command(tmp_path / "out", file, tokenizer=lossy)
    example = "'第0天，小狗走了。' becomes '第0天,小狗走了。'"
    assert_refused(prepare, arguments, lossy, "60 of 60", example, "(100.00%)", "--allow_lossy_tokenizer")
    done = run_here(prepare, *arguments, "--allow_lossy_tokenizer")
    assert f"{lossy}: changes 60 of 60 texts" in done.stdout


def test_a_few_changed_texts_are_reported_and_accepted(lossy, tmp_path, monkeypatch):
    """Up to 10, and 1%, judged at the end: here all changed ones come first."""
    monkeypatch.setattr(stories.read, "BLOCK", 200)
    texts = [f"小狗饕走了{i}。" for i in range(12)] + [f"第{i}天小狗走了。" for i in range(200)]
    enough = write(tmp_path / "enough.jsonl", jsonl(texts))
    done = make(tmp_path / "out", enough, tokenizer=lossy)
    assert "changes 12 of 212 texts (5.66%)" in done.stdout
    fewer = write(tmp_path / "fewer.jsonl", jsonl(texts[:190]))
    arguments = command(tmp_path / "out", fewer, tokenizer=lossy)
    assert_refused(prepare, arguments, "changes 12 of 190 texts", "饕")


def test_what_is_no_tokenizer_is_refused(given, one_line, tmp_path):
    foreign_tokenizer(tmp_path / "no_end.model", ["小狗走了。"] * 9, eos_id=-1)
    write(tmp_path / "empty.model", b"")
    write(tmp_path / "cut.model", given.read_bytes()[:3000])
    (tmp_path / "folder.model").mkdir()
    for name in ("no_end", "empty", "cut", "folder", "missing"):
        path = tmp_path / f"{name}.model"
        assert_refused(prepare, command(tmp_path / "out", one_line, tokenizer=path), path)
    assert not (tmp_path / "out").exists()


# ---- The folder appears whole or not at all --------------------------------------------------------


@pytest.fixture
def out(base, tmp_path):
    """An older folder, in a folder of its own."""
    return Path(shutil.copytree(base, tmp_path / "work" / "out"))


@contextlib.contextmanager
def encoding(given, out):
    """prepare.py in a group of processes: it has begun the token files, and waits for more on its stdin."""
    stdin = out.parent.parent / "stdin.jsonl"
    stdin.symlink_to("/dev/stdin")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    arguments = command(out, stdin, tokenizer=given, workers=2)
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(
        [sys.executable, "prepare.py", *arguments], cwd=ROOT, text=True, start_new_session=True, **streams
    )
    begun = Path(f"{out}.tmp", "train.bin.tmp")
    chunk = jsonl(f"第{i}个故事。" for i in range(20000)).decode()
    try:
        while not begun.exists() or not begun.stat().st_size:
            process.stdin.write(chunk)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_kill_9_leaves_the_older_folder_and_no_process(base, given, one_line, out):
    """A second run is refused before; the next one goes through and tidies up."""
    with encoding(given, out) as process:
        assert_refused(prepare, command(out, one_line), out, "in use by another process")
        process.kill()
        process.communicate(timeout=60)  # the output ends when the workers have ended
    assert files_of(out) == files_of(base)
    make(out, one_line, tokenizer=given)
    assert_holds(out, ONE_LINE)
    assert names_in(out.parent) == WHOLE


def test_ctrl_c_ends_in_one_line_and_leaves_nothing(given, tmp_path):
    """It reaches every process of the terminal."""
    with encoding(given, tmp_path / "work" / "out") as process:
        process.stdin.flush()
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate("\n" * 10_000_000, timeout=60)
    assert (process.returncode, stderr) == (2, "error: interrupted\n")
    assert names_in(tmp_path / "work") == []


def test_a_closed_pipe_ends_a_run_as_it_ends_other_programs(one_line, tmp_path):
    """prepare.py | head: no traceback, and nothing left."""
    process = start_script("prepare.py", *command(tmp_path / "out", one_line))
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""
    assert names_in(tmp_path) == [one_line.name]


def dies(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def has_no_room(*arguments, **more):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    "broken, replacement, words",
    [
        ("stories.read.BLOCK", 2000, "one_line.jsonl:301: malformed"),
        ("prepare.encode_block", dies, "a worker process ended abruptly"),
        ("os.fsync", has_no_room, "val.bin: No space left on device"),
    ],
)
def test_a_run_that_fails_leaves_what_was_there(
    base, given, out, one_line, monkeypatch, older, broken, replacement, words
):
    """A mistake on the last line, long after the first stories were written; workers; the disk."""
    monkeypatch.setattr(broken, replacement)
    if broken == "stories.read.BLOCK":
        write(one_line, jsonl(f"第{i}个故事。" for i in range(300)) + b"{")
    if not older:
        shutil.rmtree(out)
    assert_refused(prepare, command(out, one_line, tokenizer=given), words)
    assert names_in(out.parent) == WHOLE * older
    assert not older or files_of(out) == files_of(base)


def test_a_run_that_was_killed_between_its_renames(base, one_line, out):
    """The older folder is put back before anything else."""
    out.rename(f"{out}.old")
    assert_refused(prepare, command(out, one_line, tokenizer=one_line), "not a SentencePiece model")
    assert files_of(out) == files_of(base)
    assert names_in(out.parent) == WHOLE


def test_a_run_that_was_killed_while_it_removed_the_older_folder(given, one_line, out):
    for name in ("out.old", "out.tmp"):
        shutil.copytree(out, out.with_name(name))
    (out.parent / "out.old" / "train.bin").unlink()
    make(out, one_line, tokenizer=given)
    assert_holds(out, ONE_LINE)
    assert names_in(out.parent) == WHOLE


def test_what_is_renamed_is_on_the_disk_before(out, monkeypatch):
    """A power cut at any moment leaves the older folder or the new one, with whole files."""
    done = []
    rename = os.replace
    old = out.with_name("out.old")

    def fsync(handle):
        status = os.fstat(handle)
        done.append((status.st_ino, status.st_size == 4, old.exists()))

    def replace(path, new):
        rename(path, new)
        done.append(Path(new).name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with prepare.replace_folder(out) as folder:
        prepare.write_file(folder / "meta.json", b"data")
    file, new, parent = [path.stat().st_ino for path in (out / "meta.json", out, out.parent)]
    first = [(file, True, False), "meta.json", (new, False, False)]
    assert done == [*first, "out.old", "out", (parent, False, True)]


def test_a_write_that_fails_keeps_the_file_and_names_it(tmp_path):
    """Also if PyTorch hides the system's error behind its own."""
    path = write(tmp_path / "a", b"old")
    full = OSError(errno.ENOSPC, "No space left on device")
    hidden = RuntimeError("PytorchStreamWriter failed")
    hidden.__context__ = full
    for error, raised in ((full, OSError), (hidden, OSError), (KeyError("another"), KeyError)):
        with pytest.raises(raised), atomic_write(path) as file:
            file.write(b"new")
            raise error
        assert path.read_bytes() == b"old" and names_in(tmp_path) == ["a"]
    assert full.filename == str(path)


@pytest.mark.parametrize("name", ["out", "out.tmp", "out.old"])
def test_a_foreign_folder_is_never_touched(one_line, out, name):
    """Neither the folder named, nor one that happens to lie beside it."""
    foreign = out.with_name(name)
    write(foreign / "thesis.tex", b"years of work")
    before = names_in(out.parent)
    assert_refused(prepare, command(out, one_line), foreign, "thesis.tex", "--out_dir")
    assert names_in(out.parent) == before


def test_an_archive_is_only_read(tmp_path):
    """No member is written to where its name leads; what is not read is named once, hidden ones never."""
    members = {"../up.jsonl": jsonl(STORIES[:9]), "./sub/a.jsonl": jsonl(STORIES[9:])}
    members |= {name: jsonl(["不可见。"]) for name in (".hidden/b.jsonl", "sub/._a.jsonl")}
    unread = ["inner.tar.gz", "b.tsv", "state.json"]
    members |= dict.fromkeys(unread, b"")
    file = write(tmp_path / "in.tar", as_tar(members, link="link.jsonl"))
    done = make(tmp_path / "out", file, vocab_size=500)
    assert names_in(tmp_path) == ["in.tar", *WHOLE] and not (tmp_path.parent / "up.jsonl").exists()
    assert_holds(tmp_path / "out", STORIES)
    for name in [*unread, "link.jsonl"]:
        assert done.stderr.count(f"in.tar/{name}") == 1
    assert done.stderr.count("in.tar/") == 4


# ---- Around a run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "/", "/new/mine"])
def test_out_dir_may_be_a_link_or_lie_behind_one(given, one_line, tmp_path, end):
    """The link stays and its target is written, the first time and again."""
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "mine").symlink_to("disk/big")
    for _ in range(2):
        make(f"{tmp_path}/mine{end}", one_line, tokenizer=given)
        assert (tmp_path / "mine").is_symlink()
        assert_holds(Path(f"{tmp_path}/disk/big{end}"), ONE_LINE)


@pytest.mark.parametrize("target", ["nowhere", "link", "file"])
@pytest.mark.parametrize("below", ["", "/mine"])
def test_out_dir_that_cannot_be_a_folder(tmp_path, target, below):
    """A link to nothing, to itself, to a file: one line names it, before the input is looked at."""
    write(tmp_path / "file", b"precious")
    (tmp_path / "link").symlink_to(target)
    assert_refused(prepare, command(f"{tmp_path}/link{below}", "no.jsonl"), tmp_path / "link")
    assert names_in(tmp_path) == ["file", "link"]


@pytest.mark.parametrize("tokenizer", [False, True])
@pytest.mark.parametrize(
    "texts, words",
    [(["", " "], "a.jsonl: no stor"), (["one"], "--val_fraction 0.2: leaves no")],
)
def test_too_few_stories(given, tmp_path, tokenizer, texts, words):
    """None at all, or none for one of the splits."""
    arguments = command(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl(texts)))
    if tokenizer:
        arguments.append(f"--tokenizer={given}")
    assert_refused(prepare, arguments, words)
    assert names_in(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize(
    "option, values, reason",
    [
        ("val_fraction", "0 1 -0.1 1.5 nan inf", "between 0 and 1"),
        ("val_fraction", "few", "invalid float"),
        ("vocab_size", "0 -1 262 65537", "between 263"),
        ("workers", "0 -2", "at least 1"),
        ("augment", "0", "at least 1"),
        ("tokenizer", "a\tb", "control character"),
        ("out_dir", "", "empty"),
    ],
)
def test_bad_options(one_line, tmp_path, option, values, reason):
    for value in values.split(" "):
        arguments = command(tmp_path / "out", one_line, **{option: value})
        assert_refused(prepare, arguments, f"--{option}", reason)
    assert names_in(tmp_path) == [one_line.name]


def test_options_that_are_missing(one_line):
    assert_refused(prepare, [one_line], "--out_dir is missing")
    assert_refused(prepare, ["--task=sft"], "--tokenizer is missing")
    assert_refused(prepare, ["--out_dir", "--workers=1"], "--out_dir", "--option=VALUE")
    assert user_path("~/a") == Path.home() / "a"


@pytest.mark.parametrize(
    "error, raised, line",
    [
        (OSError("a broken disk"), SystemExit, "error: a broken disk\n"),
        (MemoryError(), SystemExit, "error: out of memory (none left); try a smaller batch_size or --num\n"),
        (
            RuntimeError("can't allocate memory\nat"),
            SystemExit,
            "out of memory (can't allocate memory);",
        ),
        (RuntimeError("a mistake of ours"), RuntimeError, ""),
    ],
)
def test_an_error_of_the_system_is_one_line(capsys, error, raised, line):
    """An error of the program keeps its traceback."""

    def main():
        raise error

    with pytest.raises(raised):
        report_errors(main)
    assert line in capsys.readouterr().err
