"""Try to hurt the program, and count what is lost.

    PYTHONPATH=.:tests python tests/torture.py                      everything: half an hour
    PYTHONPATH=.:tests python tests/torture.py --short kill disk    some of it, a few times

| part     | what is done                                  | what must hold                                 |
| -------- | --------------------------------------------- | ---------------------------------------------- |
| kill     | kill -9 at random moments of train, sft,      | Run again, they end with the bits of a run     |
|          | prepare and export, half of them while a file | that nothing disturbed; the log has each step  |
|          | is written                                    | once; a folder is whole or not there           |
| power    | the power fails before and after every flush, | A checkpoint that has its name is whole; what  |
|          | renaming and removal of a run; what was not   | was saved is there, and the log up to it       |
|          | flushed is lost, torn or kept                 |                                                |
| disk     | a disk is full in train or prepare            | It is said in one line, nothing is half        |
|          |                                               | written; with room again it goes on            |
| two      | a second train, sft or prepare in a folder in | It is refused in one line, the first goes on   |
|          | use                                           |                                                |
| damage   | bytes are cut, zeroed, turned or swapped      | The file is refused in one line, or            |
|          | anywhere in checkpoints and prepared folders  | tools.check finds it, or it loads the same     |
| hostile  | checkpoints and story files made to fill the  | Each is refused in one line, in less than 400  |
|          | memory                                        | MB                                             |
| numbers  | learning rates up to 1e18; gradients that     | No weight in a checkpoint is infinite or NaN;  |
|          | overflow in float16                           | float16 skips the step, but not for ever       |
| parallel | one of several processes is killed, or hangs  | The others end in one line; another number of  |
|          |                                               | processes goes on with the same curve          |
| long     | 20,000 steps                                  | Neither memory nor open files grow             |

Every part raises AssertionError, showing what happened, at the first thing lost. A command runs in a process
of its own only where it is the process that is hurt.
"""

import argparse
import contextlib
import gzip
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from io import BytesIO
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from helpers import (
    assert_one_line_error,
    assert_refused,
    lines_of,
    metrics_of,
    run_here,
    same,
    same_state,
    start_script,
    tiny,
    tuning,
    wait_for_step,
)

import prepare
import sft
import train
from common.checkpoint import find_checkpoints, read_checkpoint
from common.files import UserError
from stories.generate import write_corpus
from tools import check, export

# ---- What all parts stand on -----------------------------------------------------------------------

OFTEN = {"max_iters": 60, "save_interval": 3, "eval_interval": 7, "eval_sequences": 4}
QUICK = {"max_iters": 24, "save_interval": 2, "eval_interval": 5, "eval_sequences": 4}


class Ground:
    """Prepared data, and runs that nothing disturbed."""

    def __init__(self, folder):
        self.folder = folder
        self.count = 0
        self.stories = folder / "stories.jsonl"
        self.data = folder / "data"
        self.tokenizer = self.data / "tokenizer.model"
        self.sft_data = folder / "sft_data"
        self.out = folder / "out"
        self.base = folder / "base"
        self.tuned = folder / "tuned"
        write_corpus(self.stories, 400)
        split = "--val_fraction=0.1"
        run_here(prepare, self.stories, f"--out_dir={self.data}", "--vocab_size=2000", split)
        run_here(prepare, *self.preparing(self.sft_data), "--task=sft", split)
        run_here(train, *self.pretraining(self.out))
        run_here(train, *self.pretraining(self.base, block_size=256, max_iters=20, save_interval=20))
        run_here(sft, *self.tuning(self.tuned))

    def new(self, name):
        """A path where nothing is."""
        self.count += 1
        return self.folder / f"{name}{self.count}"

    def preparing(self, out):
        return [self.stories, f"--out_dir={out}", f"--tokenizer={self.tokenizer}"]

    def pretraining(self, out, **changes):
        return tiny(data_dir=self.data, out_dir=out, **OFTEN | changes)

    def tuning(self, out, **changes):
        return tuning(self.base, self.sft_data, out, **QUICK | changes)


class NotHere(Exception):
    """What this machine does not let us try."""


def random_of(part):
    return random.Random(f"torture {part}")


def ended(process):
    """A started process once it has ended, with what it printed."""
    try:
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def half_written(folder):
    return [path for path in folder.rglob("*") if path.suffix == ".tmp"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_as_undisturbed(out, whole):
    """Same bits in the newest checkpoint, same lines in the log, nothing left over."""
    last = f"ckpt_{lines_of(whole)[-1]['step']:06d}.pt"
    same_state(out / last, whole / last)
    assert lines_of(out) == lines_of(whole)
    assert not half_written(out)


# ---- Kill ------------------------------------------------------------------------------------------


def kill_somewhere(process, rng, seconds, something_begun):
    """kill -9 after a random part of some seconds; every other time once something is begun then."""
    patient = rng.random() < 0.5
    time.sleep(rng.random() * seconds)
    while patient and process.poll() is None and not something_begun():
        time.sleep(0.0005)
    process.kill()


def kill_runs(ground, rng, times, script, arguments, whole):
    """Kill runs and resume them until they end; returns how many kills left a file half written."""
    kills = 0
    left = 0
    while kills < times:
        out = ground.new("killed")
        done = None
        while not done or done.returncode != 0:
            process = start_script(script, *arguments(out, resume=True))
            for line in process.stdout:
                if line.startswith(("starting", "resuming")):  # PyTorch is loaded, and training begins
                    break
            if kills < times:
                kill_somewhere(process, rng, 1.0, lambda: half_written(out))  # noqa: B023 (called at once)
            done = ended(process)
            if done.returncode != 0:
                assert done.returncode == -signal.SIGKILL, done
                kills += 1
                left += bool(half_written(out))
            for path in find_checkpoints(out):
                read_checkpoint(path)
        assert_as_undisturbed(out, whole)
        shutil.rmtree(out)
    return left


def kill_writing(ground, rng, times, module, arguments, seconds):
    """Kill a command that writes a folder, and give it again; returns how many kills left it half written."""
    work = ground.new("work")
    out = work / "out"

    def begun():
        return list(work.glob("*/**/*"))  # anything in a folder

    run_here(module, *arguments(out))
    whole = contents(out)
    left = 0
    for _ in range(times):
        shutil.rmtree(work)
        process = start_script("-m", module.__name__, *arguments(out))
        kill_somewhere(process, rng, seconds, begun)
        ended(process)  # and the processes that it has started
        if not out.exists():
            left += bool(begun())
            run_here(module, *arguments(out))
        assert contents(out) == whole
    return left


def part_kill(ground, short):
    rng = random_of("kill")
    every_step = ground.new("every")

    def saving_always(out, **changes):
        return ground.pretraining(out, save_interval=1, **changes)

    def exporting(out):
        return ["--ckpt", ground.tuned, "--out_dir", out]

    run_here(train, *saving_always(every_step))
    rows = []
    for name, often, seldom, script, arguments, whole in (
        ("train.py, a save every 3 steps", 40, 2, "train.py", ground.pretraining, ground.out),
        ("train.py, a save at every step", 20, 0, "train.py", saving_always, every_step),
        ("sft.py, a save every 2 steps", 20, 1, "sft.py", ground.tuning, ground.tuned),
    ):
        times = seldom if short else often
        left = kill_runs(ground, rng, times, script, arguments, whole)
        rows.append((f"kill -9: {name}", times, f"{left} while a file was half written"))
    for name, often, seldom, module, arguments, seconds in (
        ("prepare.py", 60, 3, prepare, ground.preparing, 0.25),
        ("tools.export", 20, 2, export, exporting, 2.0),
    ):
        times = seldom if short else often
        left = kill_writing(ground, rng, times, module, arguments, seconds)
        rows.append((f"kill -9: {name}", times, f"{left} while a folder was half written"))
    return rows


# ---- Power -----------------------------------------------------------------------------------------

# What a disk may keep of that which was not flushed: all, nothing, the names, the data; or some of each, with
# data torn off or replaced by zeros, tried three times.
DISKS = ("all", "nothing", "names", "data", "torn", "torn", "torn")


class Disk:
    """A double of the disk below a folder. Before and after each flush, renaming and removal there it calls
    examine(kind, {name: bytes}) with what each kind of disk would hold if the power failed now.
    """

    def __init__(self, folder, removed, rng, examine):
        self.folder = folder
        self.removed = removed  # a folder of links to removed files, whose inodes are so not used again
        self.rng = rng
        self.examine = examine
        self.counts = Counter()
        self.content = {}  # of each inode, flushed or not
        self.flushed = {}  # the content of each inode at its last flush
        self.kept = {}  # the inode of each name at the last flush of the folder
        self.changes = []  # the inode of each name after each change since then
        self.real = {"fsync": os.fsync, "replace": os.replace, "unlink": os.unlink}

    def watching(self):
        return mock.patch.multiple(os, fsync=self.fsync, replace=self.replace, unlink=self.unlink)

    def fsync(self, handle):
        self.power_fails()
        self.real["fsync"](handle)
        self.counts["flushes"] += 1
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path == self.folder:
            self.kept = self.names()
            self.changes = []
        else:
            self.flushed[path.stat().st_ino] = path.read_bytes()
        self.power_fails()

    def replace(self, source, target):
        self.power_fails()
        self.keep_inode(target)
        self.real["replace"](source, target)
        self.changed("renamings")

    def unlink(self, path, **options):
        self.power_fails()
        self.keep_inode(path)
        self.real["unlink"](path, **options)
        self.changed("removals")

    def changed(self, kind):
        self.counts[kind] += 1
        self.changes.append(self.names())
        self.power_fails()

    def keep_inode(self, path):
        if os.path.exists(path):
            os.link(path, self.removed / str(self.counts.total()))

    def names(self):
        return {path.name: path.stat().st_ino for path in self.folder.iterdir()}

    def power_fails(self):
        for path in self.folder.iterdir():
            self.content[path.stat().st_ino] = path.read_bytes()
        for kind in DISKS:
            names = self.kept
            if kind in ("all", "names"):
                names = self.names()
            elif kind == "torn":
                names = self.rng.choice([self.kept, *self.changes, self.names()])
            left = {name: self.left_of(inode, kind) for name, inode in names.items()}
            self.counts["failures"] += 1
            self.examine(kind, left)

    def left_of(self, inode, kind):
        whole = self.content[inode]
        flushed = self.flushed.get(inode, b"")
        if kind in ("all", "data") or whole == flushed:
            return whole
        if kind != "torn":
            return flushed
        at = self.rng.randrange(len(whole) + 1)
        torn = whole[:at]
        if self.rng.random() < 0.5:
            torn += bytes(len(whole) - at)
        if whole.startswith(flushed):  # appended to: what was flushed stays
            torn = flushed + torn[len(flushed) :]
        return torn


def part_power(ground, short):
    out = ground.new("power")
    removed = ground.new("removed")
    out.mkdir()
    removed.mkdir()
    saved = 0  # the newest step whose save is over
    steps_of = {}  # of what was read before

    def examine(kind, left):
        steps = [0]
        for name, data in left.items():
            if re.fullmatch(r"ckpt_\d+\.pt", name):
                key = hash(data)
                if key not in steps_of:
                    # It is whole, or this raises.
                    steps_of[key] = torch.load(BytesIO(data), weights_only=True)["step"]
                steps.append(steps_of[key])
        newest = max(steps)
        assert newest >= saved, (kind, newest, saved)
        if newest:
            lines = left["metrics.jsonl"].split(b"\n")[:-1]
            logged = [json.loads(line)["step"] for line in lines if line.endswith(b"}")]
            assert [step for step in logged if step <= newest] == list(range(newest + 1)), (kind, logged)

    real_save = train.save

    def save(s, model, optimizers, scaler, step, *more):
        nonlocal saved
        real_save(s, model, optimizers, scaler, step, *more)
        saved = step

    disk = Disk(out, removed, random_of("power"), examine)
    often = {"save_interval": 1, "log_interval": 1, "eval_interval": 2}
    rounds = [2, 3] if short else [2, 6, 12, 20]  # each resumes the one before, and so cuts the log
    with mock.patch.object(train, "save", save), disk.watching():
        for max_iters in rounds:
            run_here(train, *ground.pretraining(out, **often, max_iters=max_iters, resume=True))
            with open(out / "metrics.jsonl", "ab") as log:
                log.write(b'{"step": 99}\n{"st')  # as of a run that was killed later
                log.flush()
                os.fsync(log.fileno())
    assert saved == rounds[-1]
    failures = disk.counts.pop("failures")
    stops = ", ".join(f"{count} {kind}" for kind, count in disk.counts.items())
    return [(f"power cut before and after {stops}, as five kinds of disk leave it", failures, "")]


# ---- Full disk -------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(ground, kilobytes):
    folder = ground.new("disk")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        raise NotHere("no small disk can be mounted here (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def resize(folder, kilobytes):
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", folder], check=True)


def full_in_a_run(ground, rng):
    with small_disk(ground, rng.randrange(300, 3000)) as folder:
        out = folder / "out"
        assert_refused(train, ground.pretraining(out), "No space left", folder)
        assert not half_written(out)
        before = find_checkpoints(out)
        for path in before:
            read_checkpoint(path)
        resize(folder, 64_000)
        done = run_here(train, *ground.pretraining(out, resume=True))
        assert ("resuming at step" in done.stdout) == bool(before)
        assert_as_undisturbed(out, ground.out)


def full_in_the_log(ground, rng):
    with small_disk(ground, 1000) as folder:
        room = 4 * rng.randrange(4, 12)
        (folder / "ballast").write_bytes(bytes((1000 - room) * 1024))
        out = folder / "out"
        changes = {"max_iters": 2000, "save_interval": 2000, "log_interval": 1}
        assert_refused(train, ground.pretraining(out, **changes), "metrics.jsonl", "No space left")
        assert not half_written(out)
        for line in (out / "metrics.jsonl").read_text().splitlines()[:-1]:
            assert "step" in json.loads(line)


def full_in_prepare(ground, rng):
    with small_disk(ground, rng.randrange(20, 180)) as folder:
        out = folder / "data"
        arguments = ground.preparing(out)
        assert_refused(prepare, arguments, "No space left", out)
        assert [path.name for path in folder.iterdir()] == ["data.lock"]
        resize(folder, 64_000)
        run_here(prepare, *arguments)
        before = contents(out)
        used = sum(len(data) for data in before.values()) // 1024
        resize(folder, used + rng.randrange(30, 150))
        assert_refused(prepare, arguments, "No space left", out)
        assert contents(out) == before  # the folder that was there stays
        assert sorted(path.name for path in folder.iterdir()) == ["data", "data.lock"]


def part_disk(ground, short):
    rng = random_of("disk")
    rows = []
    for name, times, fill in (
        ("disk full in a run, then room again and --resume", 20, full_in_a_run),
        ("disk full in metrics.jsonl", 20, full_in_the_log),
        ("disk full in prepare.py, also where a folder was before", 20, full_in_prepare),
    ):
        if short:
            times = 2
        for _ in range(times):
            fill(ground, rng)
        rows.append((name, times, ""))
    return rows


# ---- Two runs --------------------------------------------------------------------------------------


def part_two(ground, short):
    times = 1 if short else 10
    in_use = "in use by another process"
    for _ in range(times):
        out = ground.new("two")
        first = start_script("train.py", *ground.pretraining(out, max_iters=4000, save_interval=4000))
        wait_for_step(first, out, 0)
        for resume in (False, True):
            assert_refused(train, ground.pretraining(out, resume=resume), out, in_use)
        assert_refused(sft, ground.tuning(out, merge=True), out, in_use)
        assert first.poll() is None
        first.kill()
        ended(first)
        run_here(train, *ground.pretraining(out, resume=True))  # the lock has ended with its process
        assert_as_undisturbed(out, ground.out)

        data = ground.new("two_data")
        both = [start_script("prepare.py", *ground.preparing(data)) for _ in "ab"]
        codes = sorted(ended(process).returncode for process in both)
        assert codes in ([0, 0], [0, 2])  # the second waits for nothing: it is refused, or comes later
        run_here(check, data)
        assert not half_written(data.parent)
    return [("a second train.py, sft.py or prepare.py in a folder in use", 5 * times, "refused in one line")]


# ---- Damage ----------------------------------------------------------------------------------------


def damaged(data, rng):
    """The bytes cut, 64 of them zeroed, a bit turned over, or two sectors swapped, anywhere."""
    kind = rng.choice(["cut", "zero", "turn", "swap"])
    at = rng.randrange(len(data))
    if kind == "cut":
        return data[:at]
    changed = bytearray(data)
    if kind == "zero":
        end = min(at + 64, len(data))
        changed[at:end] = bytes(end - at)
    elif kind == "turn":
        changed[at] ^= 1 << rng.randrange(8)
    else:
        size = min(512, len(data) // 4)
        a = rng.randrange(len(data) - size)
        b = rng.randrange(len(data) - size)
        changed[a : a + size] = data[b : b + size]
        changed[b : b + size] = data[a : a + size]
    return bytes(changed)


def damage(path, what_is_checked, load, times, rng):
    """Damage a file again and again: load() refuses it, or tools.check finds it, or it loads the same."""
    data = path.read_bytes()
    expected = load()
    ways = Counter()
    for _ in range(times):
        path.write_bytes(damaged(data, rng))
        try:
            loaded = load()
        except UserError as e:
            assert str(what_is_checked) in str(e) and "\n" not in str(e)
            ways["refused"] += 1
            continue
        done = run_here(check, what_is_checked, check=False)
        if done.returncode == 0:
            same(loaded, expected)
            ways["the same"] += 1
        else:
            assert_one_line_error(done, what_is_checked)
            ways["found by tools.check"] += 1
    path.write_bytes(data)
    return ways


def part_damage(ground, short):
    rng = random_of("damage")
    rows = []
    for name, run in (("pretraining", ground.out), ("SFT", ground.tuned)):
        path = ground.new("damaged").with_suffix(".pt")
        shutil.copy(find_checkpoints(run)[0], path)
        ways = damage(path, path, lambda path=path: read_checkpoint(path), 40 if short else 2000, rng)
        rows.append((f"damage to a checkpoint of {name}", ways))

    folder = ground.new("data")
    shutil.copytree(ground.data, folder)

    def load():
        s = train.Settings(data_dir=str(folder), block_size=32)
        train_data, val_data, meta, metadata = train.open_data(s)
        used = [meta["vocab_size"], meta["end_token"], meta.get("template"), metadata["tokenizer"]]
        return [train_data.tokens.tobytes(), val_data.tokens.tobytes(), *used]

    ways = Counter()
    for name in ("train.bin", "val.bin", "meta.json", "tokenizer.model"):
        ways += damage(folder / name, folder, load, 20 if short else 500, rng)
    rows.append(("damage to .bin, meta.json and tokenizer", ways))

    table = []
    for name, ways in rows:
        note = ", ".join(f"{count:,} {way}" for way, count in ways.items())
        table.append((name, ways.total(), note))
    return table


# ---- Hostile files ---------------------------------------------------------------------------------


def copy_archive(source, target, compression=zipfile.ZIP_STORED, extra=b""):
    """A checkpoint's archive written anew, with one part more."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
        if extra:
            new.writestr("archive/data/bomb", extra)


def repeat_first_entry(path, size):
    """Repeat the first entry in the list of an archive: it unpacks to `size` bytes."""
    data = path.read_bytes()
    start = data.index(b"PK\1\2")  # the list of entries, and what follows it
    end = data.index(b"PK\5\6")
    lengths = data[start + 28 : start + 32]
    name_length = int.from_bytes(lengths[:2], "little")
    extra_length = int.from_bytes(lengths[2:], "little")
    entry = data[start : start + 46 + name_length + extra_length]
    count = min(size // len(data), 60_000)
    tail = bytearray(data[end:])
    tail[8:10] = tail[10:12] = count.to_bytes(2, "little")
    tail[12:16] = (count * len(entry)).to_bytes(4, "little")
    path.write_bytes(data[:start] + count * entry + tail)


def hostile_checkpoints(ground, path):
    """Write checkpoints made to fill the memory to `path`, one after the other; yields what each is."""
    good = find_checkpoints(ground.tuned)[0]
    copy_archive(good, path, zipfile.ZIP_DEFLATED, bytes(1 << 28))
    yield "a compressed part of 256 MB"
    copy_archive(good, path)
    repeat_first_entry(path, 1 << 32)
    yield "parts that overlap"
    state = read_checkpoint(good)
    for key, value in (
        ("block_size", 10**12),
        ("n_layer", 10**9),
        ("vocab_size", 10**10),
        ("n_embd", 10**7),
        ("intermediate_size", 10**9),
        ("head_dim", 10**8),
    ):
        torch.save(state | {"model_config": state["model_config"] | {key: value}}, path)
        yield f"{key} of {value}"
    torch.save(state | {"lora": {"rank": 10**9, "alpha": 1.0}}, path)
    yield "adapters of rank 10**9"


def hostile_stories(folder, size):
    """Paths of story files made to fill the memory, with `size` bytes in a small file."""
    megabyte = 1 << 20
    many = size // megabyte

    def packed(name, *pieces):
        with gzip.open(folder / name, "wb", compresslevel=1) as f:
            for piece in pieces:
                f.write(piece)
        return folder / name

    for kind in ("jsonl", "txt", "csv"):
        yield packed(f"endless_line.{kind}.gz", *[b"x" * megabyte] * many)
    for kind in ("json", "jsonl"):
        yield packed(f"deep.{kind}.gz", *[b"[" * megabyte] * many)
        yield packed(f"less_deep.{kind}.gz", b"[" * 10_000_000, b"]" * 10_000_000)
        yield packed(f"deep_objects.{kind}.gz", b'{"a":' * 1_000_000)
    yield packed("endless_string.json.gz", b'["', *[b"x" * megabyte] * many)
    yield packed("digits.json.gz", b"[" + b"9" * 1_000_000 + b"]")
    yield packed("nul.jsonl.gz", *[bytes(megabyte)] * many)
    headers = {"pax": tarfile.XHDTYPE, "global": tarfile.XGLTYPE, "long_name": tarfile.GNUTYPE_LONGNAME}
    for name, kind in headers.items():
        member = tarfile.TarInfo("x.jsonl")
        member.type = kind
        member.size = size
        yield packed(f"{name}_header.tar.gz", member.tobuf(tarfile.GNU_FORMAT), *[b"9" * megabyte] * many)
    with tarfile.open(folder / "sparse.tar", "w") as archive:
        member = tarfile.TarInfo("x.jsonl")
        member.size = 1 << 50  # which it only claims
        archive.addfile(member)
    yield folder / "sparse.tar"


def peak_memory():
    """The largest that this process or one that it waited for has been, in MB."""
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(peaks) / 1000


def part_hostile(ground, short):
    folder = ground.new("hostile")
    folder.mkdir()
    before = peak_memory()
    path = folder / "bad.pt"
    checkpoints = 0
    for name in hostile_checkpoints(ground, path):
        assert_refused(check, [path], path)
        assert peak_memory() < before + 400, name
        checkpoints += 1
    path.unlink()
    files = 0
    for path in hostile_stories(folder, 1 << (25 if short else 30)):
        out = folder / "none"
        arguments = [path, f"--out_dir={out}", f"--tokenizer={ground.tokenizer}", "--workers=1"]
        assert_refused(prepare, arguments, path.name)
        assert peak_memory() < before + 400, path.name
        path.unlink()
        assert [left.name for left in folder.iterdir()] == ["none.lock"]
        files += 1
    note = f"at most {peak_memory() - before:.0f} MB more"
    return [
        ("checkpoints that unpack to much, overlap or claim to be huge", checkpoints, note),
        ("story files of endless lines, depth, headers, sizes", files, note),
    ]


# ---- Numbers ---------------------------------------------------------------------------------------


def overflow_where(condition):
    """Patch the loss of training: its value stays, but where condition(step) a gradient is NaN."""
    original = train.next_token_loss
    step = 0

    def loss(model, batch):
        nonlocal step
        value = original(model, batch)["loss"]
        if torch.is_grad_enabled():
            step += 1
            if condition(step):
                weight = model.norm.weight
                value = value + (weight - weight).sqrt().sum()
        return {"loss": value}

    return mock.patch.object(train, "next_token_loss", loss)


def assert_finite(out):
    for path in find_checkpoints(out):
        for weight in read_checkpoint(path)["model"].values():
            assert weight.isfinite().all(), path


def part_numbers(ground, short):
    rates = [1e3, 1e18] if short else [1e3, 1e6, 1e12, 1e18]
    for rate in rates:
        for optimizer in ("muon", "adamw"):
            out = ground.new("rate")
            changes = {"save_interval": 1, "warmup_iters": 0, "learning_rate": rate, "optimizer": optimizer}
            done = run_here(train, *ground.pretraining(out, **changes), check=False)
            if done.returncode != 0:
                assert_one_line_error(done, "step ", "learning_rate below")
            assert_finite(out)
    note = "no weight in a checkpoint is infinite or NaN"
    rows = [("a learning rate of 1e3 to 1e18, saving at every step", 2 * len(rates), note)]

    # float16: a step whose gradients overflow is skipped, and half the scale is tried; but not for ever.
    twice = ground.new("twice")
    with overflow_where(lambda step: step in (10, 31)):
        run_here(train, *ground.pretraining(twice, dtype="float16"))
    assert read_checkpoint(twice)["scaler"]["scale"] == 65536 / 4
    skipped = [line["step"] for line in metrics_of(twice) if line.get("grad_norm", 0) is None]
    assert skipped == [10]  # 31 is not logged
    all_skipped = ground.new("all_skipped")
    with overflow_where(lambda step: True):
        run_here(train, *ground.pretraining(all_skipped, dtype="float16", max_iters=3, save_interval=1))
    last, before = [read_checkpoint(path)["model"] for path in find_checkpoints(all_skipped)]
    same(last, before)  # no optimizer has moved a weight
    always = ground.new("always")
    with overflow_where(lambda step: step > 30):
        assert_refused(train, ground.pretraining(always, dtype="float16"), "step ", "learning_rate")
    assert_finite(always)
    assert find_checkpoints(always)[0].name == "ckpt_000045.pt"  # 65536 halved 15 times is still above 1
    rows.append(("float16: gradients that overflow twice, and always", 3, "two steps skipped; stopped"))
    return rows


# ---- Data-parallel ---------------------------------------------------------------------------------

# train.py, but 8 seconds instead of half an hour until it gives up a process that hangs.
IMPATIENT = """
import datetime, functools
import torch.distributed as dist
import train
from common.files import report_errors
limit = datetime.timedelta(seconds=8)
dist.init_process_group = functools.partial(dist.init_process_group, timeout=limit)
report_errors(train.main)
"""


def start_team(world, arguments):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = map(str, range(world))
    return [start_script("-c", IMPATIENT, *arguments, **env, RANK=rank, LOCAL_RANK=rank) for rank in ranks]


def lose_one(team, out, step, rng):
    """Kill or stop a process of a team at a step; returns the seconds until the others have given up."""
    wait_for_step(team[0], out, step)
    victim = rng.choice(team)
    victim.send_signal(rng.choice([signal.SIGKILL, signal.SIGSTOP]))
    start = time.monotonic()
    for process in team:
        if process is not victim:
            assert_one_line_error(ended(process), "another process", "--resume=True")
    seconds = time.monotonic() - start
    victim.kill()
    ended(victim)
    return seconds


def assert_same_curve(out, alone):
    for line, expected in zip(lines_of(out), lines_of(alone), strict=True):
        assert line.keys() == expected.keys()
        for key in line.keys() - {"grad_norm"}:  # which is the first to show what rounding does
            assert math.isclose(line[key], expected[key], rel_tol=1e-3), (line, expected)


def part_parallel(ground, short):
    rng = random_of("parallel")
    changes = {"gradient_accumulation_steps": 4, "optimizer": "adamw", "batch_size": 2}
    alone = ground.new("alone")
    run_here(train, *ground.pretraining(alone, **changes))
    times = 1 if short else 5
    waits = []
    for _ in range(times):
        out = ground.new("parallel")
        arguments = ground.pretraining(out, **changes, resume=True)
        step = 0
        for world in [2] if short else rng.choice([(2, 4), (2, 2), (4, 2)]):
            step += rng.randrange(5, 20)
            waits.append(lose_one(start_team(world, arguments), out, step, rng))
        last_world = 1 if short else rng.choice([1, 2])
        for process in start_team(last_world, arguments):
            done = ended(process)
            assert done.returncode == 0, done
        assert_same_curve(out, alone)
    what = "data-parallel: one process killed or stopped, resumed with another number"
    return [(what, len(waits), f"the others end within {max(waits):.1f} s; the same curve")]


# ---- Long runs -------------------------------------------------------------------------------------


def slope(points):
    """How much the second number of each point grows with the first."""
    xs, ys = zip(*points, strict=True)
    return float(np.polyfit(xs, ys, 1)[0])


def part_long(ground, short):
    steps = 400 if short else 20_000
    out = ground.new("long")
    often = {"log_interval": 20, "save_interval": 100, "eval_interval": 200, "sample_interval": 500}
    process = start_script("train.py", *ground.pretraining(out, **often, max_iters=steps))
    proc = Path("/proc", str(process.pid))
    memory = []
    files = []
    while process.poll() is None:
        time.sleep(0.2)
        try:
            pages = int((proc / "statm").read_text().split()[1])
            open_files = len(os.listdir(proc / "fd"))
            step = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        except (OSError, IndexError, ValueError):
            continue  # it has logged nothing yet
        if steps // 4 < step < steps:  # everything has been done once, and it is not over
            memory.append((step, pages * os.sysconf("SC_PAGE_SIZE")))
            files.append(open_files)
    done = ended(process)
    assert done.returncode == 0, done
    assert len(find_checkpoints(out)) == 2 and not half_written(out)
    assert max(files) - min(files) <= 2, files
    growth = slope(memory)
    if not short:
        assert growth * 10_000 < 4 * 2**20, f"{growth:.0f} bytes a step"
    speeds = [(line["step"], line["tokens_per_second"]) for line in metrics_of(out)]
    faster = slope(speeds) * 1000 / np.median([speed for _, speed in speeds])
    note = f"memory {growth:+.0f} bytes a step, {min(files)} to {max(files)} open files, "
    note += f"speed {faster:+.2%} per 1,000 steps"
    return [("a long run", f"{steps:,} steps", note)]


# ---- The command -----------------------------------------------------------------------------------

PARTS = {
    "kill": part_kill,
    "power": part_power,
    "disk": part_disk,
    "two": part_two,
    "damage": part_damage,
    "hostile": part_hostile,
    "numbers": part_numbers,
    "parallel": part_parallel,
    "long": part_long,
}


def main():
    parser = argparse.ArgumentParser(description="Try to hurt the program, and count what is lost.")
    parser.add_argument("--short", action="store_true", help="each thing a few times")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none: all")
    args = parser.parse_args()
    unknown = set(args.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        for name in args.parts or PARTS:
            begun = time.monotonic()
            try:
                rows += PARTS[name](ground, args.short)
            except NotHere as e:
                rows.append((name, 0, f"not run: {e}"))
            print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    print("| what was tried | how often | lost | |\n| --- | --- | --- | --- |")
    for what, often, note in rows:
        if isinstance(often, int):
            often = f"{often:,}"
        print(f"| {what} | {often} | nothing | {note} |")


if __name__ == "__main__":
    main()
