"""Try to hurt the program, and count what is lost.

    python tests/torture.py                      everything, as often as docs/reliability.md tells
    python tests/torture.py --short kill disk    some of it, a few times

Every part raises AssertionError, showing what happened, at the first thing lost. The program is run in real
processes (forked from this one, which spares each the seconds PyTorch takes to load) on real files.
"""

import argparse
import builtins
import contextlib
import dataclasses
import datetime
import functools
import gzip
import hashlib
import io
import json
import math
import os
import pickle
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
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # every training loads it: here once, for all that are forked
from conftest import meta_of, metrics_of, reference_strip, reseal, run_script, script_here, tiny, tuning
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train import lines_of, same, same_state

import prepare
import sample
import sft
import tools.eval
import train
from common.checkpoint import build_model, find_checkpoints, read_checkpoint
from common.files import UserError, load_tokenizer, report_errors
from stories.constraints import clean
from stories.generate import write_corpus
from tools import check

MAINS = {"prepare.py": prepare.main, "train.py": train.main, "sft.py": sft.main, "sample.py": sample.main}
MAINS |= {"tools/eval.py": tools.eval.main, "tools/check.py": check.main}
OFTEN = {"max_iters": 60, "save_interval": 3, "eval_interval": 7, "eval_sequences": 4}
QUICK = {"max_iters": 24, "save_interval": 2, "eval_interval": 5, "eval_sequences": 4, "block_size": 256}


class Process:
    """`python ARGS` in a process of its own, forked from this one. `prelude` runs in it first."""

    def __init__(self, *args, prelude=None, **env):
        self.args = [str(a) for a in args]
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 (open as long as it runs)
        sys.stdout.flush()
        self.pid, self.status = os.fork(), None
        if self.pid == 0:
            code = 1
            try:
                for number, file in enumerate(self.files, 1):
                    os.dup2(file.fileno(), number)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                sys.stdin = open(os.devnull)  # noqa: SIM115
                os.environ.update(env)
                sys.argv = self.args
                if prelude:
                    prelude()
                report_errors(MAINS[self.args[0]])
                code = 0
            except SystemExit as e:
                code = e.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)

    def running(self):
        if self.status is None:
            pid, status, self.usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def kill(self, number=signal.SIGKILL):
        if self.running():
            os.kill(self.pid, number)
        return self

    def wait(self, seconds=300):
        """Until it has ended; returns its exit status."""
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"{self.args} still ran after {seconds} s: {self.output}")
            time.sleep(0.002)
        return self.status

    @property
    def output(self):
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
        return texts

    def succeeds(self):
        assert self.wait() == 0, (self.args, self.output)
        return self

    def refused(self, *words):
        """Exit status 2, one line, no traceback, these words in it."""
        self.wait()
        lines = self.output[1].strip().splitlines()
        assert self.status == 2, (self.args, self.status, self.output)
        assert len(lines) == 1 and lines[0].startswith("error: "), (self.args, lines)
        for word in words:
            assert str(word) in lines[0], (word, lines[0])
        return self


def training(data, out, **changes):
    return Process("train.py", f"--data_dir={data}", f"--out_dir={out}", *tiny(**changes))


def until(process, condition):
    """Wait, as long as the process runs, for something to be there."""
    while not condition():
        assert process.running(), (process.args, process.output)
        time.sleep(0.002)


def logged(out, step):
    """Whether metrics.jsonl has a line of this step or a later one."""
    path = out / "metrics.jsonl"
    return path.exists() and any(json.loads(x)["step"] >= step for x in path.read_text().split("\n")[:-1])


def leftovers(folder):
    """Half-written files. A lock file stays: it is the system's lock on it that ends with its process."""
    return [p.name for p in Path(folder).rglob("*") if p.suffix == ".tmp"]


def files_in(folder):
    """All files but the locks, which stay."""
    return {p for p in Path(folder).rglob("*") if p.is_file() and p.name != "lock" and p.suffix != ".lock"}


class Ground:
    """What all parts stand on: prepared data, and runs that nothing disturbed."""

    def __init__(self, folder):
        self.folder = folder
        self.stories = folder / "stories.jsonl"
        write_corpus(self.stories, 400)
        self.data, self.sft_data = folder / "data", folder / "sft_data"
        numbers = ("--vocab_size", 2000, "--val_fraction", 0.1)
        Process("prepare.py", self.stories, "--out_dir", self.data, *numbers).succeeds()
        self.tokenizer = self.data / "tokenizer.model"
        Process("prepare.py", self.stories, "--task", "sft", "--out_dir", self.sft_data, "--tokenizer", self.tokenizer,
                "--val_fraction", 0.1).succeeds()  # fmt: skip
        self.out, self.base, self.tuned = folder / "out", folder / "base", folder / "tuned"
        training(self.data, self.out, **OFTEN).succeeds()
        training(self.data, self.base, block_size=256, max_iters=20, save_interval=20).succeeds()
        Process(*tuning(self.base, self.sft_data, self.tuned, **QUICK)).succeeds()
        self.count = 0

    def new(self, name):
        self.count += 1
        path = self.folder / f"{name}{self.count}"
        shutil.rmtree(path, ignore_errors=True)
        return path


def rng_of(part):
    return random.Random(f"torture {part}")


# ---- Kill ------------------------------------------------------------------------------------------


def killed(ground, rng, times, command, whole, last):
    """kill -9 at random moments of runs that are resumed again and again; returns how many fell into a
    save.
    """
    kills = saving = 0
    while kills < times:
        out, begun = ground.new("killed"), time.monotonic()
        while True:
            process = command(out, resume=True)
            span = time.monotonic() + rng.random() * command.seconds
            # Half of the kills at any moment, half while a save is on its way.
            moment = rng.random() < 0.5
            while process.running() and (
                time.monotonic() < span or (moment and not list(out.glob("*.pt.tmp")) and process.running())
            ):
                time.sleep(0.0005)
            if kills < times and process.running():
                process.kill().wait()
                kills += 1
                saving += bool(list(out.glob("*.tmp")))
            if process.wait() == 0:
                break
            assert process.status == -signal.SIGKILL, process.output
            for path in find_checkpoints(out):
                read_checkpoint(path)
        command.seconds = max(0.2, min(command.seconds, time.monotonic() - begun))
        same_state(out / last, whole / last)
        assert lines_of(out) == lines_of(whole), (lines_of(out), lines_of(whole))
        assert not leftovers(out), leftovers(out)
        shutil.rmtree(out)
    return saving


def part_kill(ground, short):
    rng, rows = rng_of("kill"), []

    def pretraining(out, **more):
        return training(ground.data, out, **OFTEN, **more)

    def tuning_(out, **more):
        return Process(*tuning(ground.base, ground.sft_data, out, **QUICK, **more))

    every = ground.folder / "every"
    training(ground.data, every, **OFTEN | {"save_interval": 1}).succeeds()

    def saving_(out, **more):
        return training(ground.data, out, **OFTEN | {"save_interval": 1}, **more)

    for name, command, whole, last, times in (
        ("pretraining, a save every 3 steps", pretraining, ground.out, "ckpt_000060.pt", 3 if short else 80),
        ("SFT, a save every 2 steps", tuning_, ground.tuned, "ckpt_000024.pt", 2 if short else 60),
        ("pretraining, a save at every step", saving_, every, "ckpt_000060.pt", 3 if short else 60),
    ):
        command.seconds = 1.0
        saving = killed(ground, rng, times, command, whole, last)
        rows.append((f"kill -9: {name}", times, f"{saving} while a file was half written"))
    return rows


# ---- Power -----------------------------------------------------------------------------------------


class Disk:
    """A test double of the disk: what the program does runs as usual and is written down; then `after` gives
    the folder as a power cut after any of these operations might leave it."""

    def __init__(self, folder):
        self.folder, self.log = folder, []

    @contextlib.contextmanager
    def watching(self):
        double, real = (
            self,
            {"open": builtins.open, "fsync": os.fsync, "replace": os.replace, "unlink": os.unlink},
        )

        class Written(io.FileIO):
            def write(self, data):
                data = bytes(data)
                at = self.seek(0, 2) if "a" in self.mode or self.mode == "ab" else self.tell()
                double.log.append(("write", self.name, at, data))
                return super().write(data)

        def open_(path, mode="r", *args, **kwargs):
            name = os.fspath(path)
            if not any(m in mode for m in "wa") or not str(name).startswith(str(double.folder)):
                return real["open"](path, mode, *args, **kwargs)
            if mode[0] == "w" or not os.path.exists(name):
                double.log.append(("create", name))
            raw = io.BufferedWriter(Written(name, mode[0]))
            return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")

        def fsync(handle):
            double.log.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
            real["fsync"](handle)

        def replace(a, b):
            real["replace"](a, b)
            double.log.append(("rename", os.fspath(a), os.fspath(b)))

        def unlink(path, **kwargs):
            real["unlink"](path, **kwargs)
            double.log.append(("unlink", os.fspath(path)))

        builtins.open, os.fsync, os.replace, os.unlink = open_, fsync, replace, unlink
        try:
            yield
        finally:
            builtins.open, os.fsync, os.replace, os.unlink = real.values()

    def after(self, count, how, rng):
        """{name: bytes} after `count` operations. `how`: "kill" keeps all that was done, "strict" only what
        was flushed, "names" the names but no unflushed data, "data" the data but no unflushed names, "torn"
        some of each: data a part or as zeros, names up to some point."""
        content, durable, names, steps = {}, {}, {}, []  # by inode; by inode; name -> inode; name changes
        kept = {}  # the names as they were at the last flush of the folder
        inode = 0
        for kind, *rest in self.log[:count]:
            if kind == "create":
                inode += 1
                names[rest[0]], content[inode], durable[inode] = inode, b"", b""
            elif kind == "write":
                name, at, data = rest
                i = names[name]
                content[i] = content[i][:at] + data + content[i][at + len(data) :]
                continue
            elif kind == "rename":
                names[rest[1]] = names.pop(rest[0])
            elif kind == "unlink":
                del names[rest[0]]
            elif rest[0] == str(self.folder):
                kept, steps = dict(names), []
                continue
            else:
                durable[names[rest[0]]] = content[names[rest[0]]]
                continue
            steps.append(dict(names))
        if how in ("kill", "names"):
            kept = names
        elif how == "torn" and steps:
            kept = rng.choice([kept, *steps])
        state = {}
        for name, i in kept.items():
            whole, safe = content[i], durable[i]
            if how in ("kill", "data"):
                state[name] = whole
            elif how == "torn" and whole != safe:
                cut = rng.randrange(len(whole) + 1)
                state[name] = whole[:cut] + (bytes(len(whole) - cut) if rng.random() < 0.5 else b"")
                # What was flushed stays, whatever became of what came after it.
                state[name] = safe + state[name][len(safe) :] if whole.startswith(safe) else state[name]
            else:
                state[name] = safe
        return state


def part_power(ground, short):
    rng, out, scene = rng_of("power"), ground.new("power"), ground.new("scene")
    out.mkdir()
    double = Disk(out)
    s = {"max_iters": 3 if short else 6, "save_interval": 1, "log_interval": 1, "eval_interval": 2}
    with double.watching():
        for more in ({"max_iters": 2}, {"resume": True}):  # resuming cuts metrics.jsonl
            folders = f"--data_dir={ground.data}", f"--out_dir={out}"
            done = script_here(train.main, "train.py", *folders, *tiny(**s | more))
            assert done.returncode == 0, done.stderr
    safe, saved = 0, {}  # the newest step whose save was over after so many operations
    for i, (kind, *rest) in enumerate(double.log):
        saved[i] = safe
        if kind == "sync" and rest[0] == str(out):
            renamed = [re.search(r"ckpt_(\d+)\.pt$", r[-1]) for k, *r in double.log[:i] if k == "rename"]
            safe = max((int(m[1]) for m in renamed if m), default=0)
    saved[len(double.log)] = safe
    tried, whole_files, metrics = 0, {}, metrics_of(out)
    for count in range(0, len(double.log) + 1, 7 if short else 1):
        for how in ("kill", "strict", "names", "data", "torn"):
            state = double.after(count, how, rng)
            newest = [n for n in state if re.fullmatch(r".*/ckpt_\d+\.pt", n)]
            for name in newest:
                key = hashlib.sha256(state[name]).digest()
                if key not in whole_files:
                    scene.write_bytes(state[name])
                    whole_files[key] = read_checkpoint(scene)["step"]  # every one that has its name is whole
            steps = [whole_files[hashlib.sha256(state[n]).digest()] for n in newest]
            assert max(steps, default=0) >= saved[count], (count, how, steps, saved[count])
            # The curve up to the newest checkpoint is there too.
            lines = state.get(str(out / "metrics.jsonl"), b"")
            found = [json.loads(x) for x in lines.split(b"\n")[:-1] if x.endswith(b"}") and b'"loss"' in x]
            found = [x["step"] for x in found if x["step"] <= max(steps, default=0)]
            expected = [x["step"] for x in metrics if "loss" in x and x["step"] <= max(steps, default=0)]
            assert found == expected, (count, how, found, expected)
            tried += 1
    kinds = [kind for kind, *_ in double.log]
    stops = f"{kinds.count('write')} writes, {kinds.count('sync')} flushes, {kinds.count('rename')} renames"
    return [(f"power cut after each of {stops}, as five kinds of disk leave it", tried, "")]


# ---- Full disk -------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(ground, kilobytes):
    folder = ground.new("disk")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        raise NotHere("no small disk can be mounted here (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class NotHere(Exception):
    """What this machine does not let us try."""


def grow(folder):
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)


def part_disk(ground, short):
    rng, rows = rng_of("disk"), []
    times = 3 if short else 40
    full = 0
    for _ in range(times):  # somewhere in a run: mostly in the middle of a save
        with small_disk(ground, rng.randrange(300, 3000)) as folder:
            out = folder / "out"
            process = training(ground.data, out, **OFTEN, optimizer="adamw")
            if process.wait() != 0:
                full += 1
                process.refused("No space left", folder)
            assert not leftovers(out), leftovers(out)
            for path in find_checkpoints(out):
                read_checkpoint(path)
            before = len(find_checkpoints(out))
            grow(folder)
            process = training(ground.data, out, **OFTEN, optimizer="adamw", resume=True).succeeds()
            assert ("resuming at step" in process.output[0]) == bool(before), process.output
            if not (ground.folder / "adamw").exists():
                training(ground.data, ground.folder / "adamw", **OFTEN, optimizer="adamw").succeeds()
            same_state(out / "ckpt_000060.pt", ground.folder / "adamw" / "ckpt_000060.pt")
            assert lines_of(out) == lines_of(ground.folder / "adamw")
    rows.append(
        ("disk full in a run, then room again and --resume", times, f"{full} of them ran out of room")
    )

    times = 2 if short else 20
    for _ in range(times):
        with small_disk(ground, 1000) as folder:
            ballast = 1000 - 4 * rng.randrange(4, 12)
            (folder / "ballast").write_bytes(bytes(ballast * 1024))
            process = training(ground.data, folder / "out", **OFTEN | {"max_iters": 2000, "save_interval": 2000},
                               log_interval=1)  # fmt: skip
            process.refused("metrics.jsonl", "No space left")
            assert not leftovers(folder / "out")
            for line in (folder / "out/metrics.jsonl").read_text().splitlines()[:-1]:
                assert "step" in json.loads(line)
    rows.append(("disk full in metrics.jsonl", times, ""))

    times = 2 if short else 20
    for _ in range(times):
        with small_disk(ground, rng.randrange(20, 180)) as folder:
            old = rng.random() < 0.5
            args = (
                "prepare.py",
                ground.stories,
                "--out_dir",
                folder / "data",
                "--tokenizer",
                ground.tokenizer,
            )
            Process(*args).refused("No space left", folder / "data")
            assert [p.name for p in folder.iterdir()] == ["data.lock"], list(folder.iterdir())
            grow(folder)
            Process(*args).succeeds()
            before = {p.name: p.read_bytes() for p in (folder / "data").iterdir()}
            if old:  # the folder that was there before stays what it was
                used = sum(len(b) for b in before.values()) // 1024
                subprocess.run(
                    ["mount", "-o", f"remount,size={used + rng.randrange(30, 150)}k", folder], check=True
                )
                Process(*args).refused("No space left", folder / "data")
                assert {p.name: p.read_bytes() for p in (folder / "data").iterdir()} == before
                assert sorted(p.name for p in folder.iterdir()) == ["data", "data.lock"]
    rows.append(("disk full in prepare.py", times, ""))
    return rows


# ---- Two runs --------------------------------------------------------------------------------------


def part_two(ground, short):
    times = 1 if short else 10
    for _ in range(times):
        out = ground.new("two")
        first = training(ground.data, out, **OFTEN | {"max_iters": 4000, "save_interval": 500})
        until(first, lambda out=out: (out / "metrics.jsonl").exists())
        before = sorted(p.name for p in out.iterdir())
        for resume in (False, True):
            training(ground.data, out, **OFTEN, resume=resume).refused(out, "in use by another process")
        Process(*tuning(ground.base, ground.sft_data, out, merge=True)).refused(
            out, "in use by another process"
        )
        assert set(before) <= {p.name for p in out.iterdir()} and first.running()
        first.kill().wait()
        assert (out / "lock").exists()  # of one that was killed: no hindrance
        training(ground.data, out, **OFTEN, resume=True).succeeds()
        same_state(out / "ckpt_000060.pt", ground.out / "ckpt_000060.pt")
        data = ground.new("two_data")
        both = [
            Process("prepare.py", ground.stories, "--out_dir", data, "--tokenizer", ground.tokenizer)
            for _ in "ab"
        ]
        codes = sorted(p.wait() for p in both)
        assert codes in ([0, 0], [0, 2]), [p.output for p in both]
        train.open_data(train.Settings(data_dir=str(data), block_size=32))
        assert not leftovers(data.parent), leftovers(data.parent)
    return [("a second train.py, sft.py or prepare.py in a folder in use", 5 * times, "refused")]


# ---- Damage ----------------------------------------------------------------------------------------


def damaged(data, rng):
    """The bytes cut, 64 of them zeroed, or a bit turned over, anywhere."""
    at, kind = rng.randrange(len(data)), rng.choice(["cut", "zero", "flip", "swap"])
    changed = bytearray(data[:at] if kind == "cut" else data)
    if kind == "zero":
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    elif kind == "flip":
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == "swap":  # two sectors in each other's place
        size = min(512, len(data) // 4)
        a, b = rng.randrange(len(data) - size), rng.randrange(len(data) - size)
        changed[a : a + size], changed[b : b + size] = data[b : b + size], data[a : a + size]
    return bytes(changed), f"{kind} at {at}"


def refused_by_check(path):
    """Whether tools.check finds damage in a file or a folder; in one line, whatever the damage is."""
    done = script_here(check.main, "tools/check.py", path)
    assert done.returncode in (0, 2), done.stderr
    assert done.returncode == 0 or len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.returncode == 2


def part_damage(ground, short):
    """Damage is refused by what reads the file, or found by tools.check, or it changes nothing."""
    rng, rows = rng_of("damage"), []
    path = ground.new("damaged.pt")
    for name, good in (("pretraining", ground.out), ("SFT", ground.tuned)):
        file = find_checkpoints(good)[0]
        data, state, refused, checked = file.read_bytes(), read_checkpoint(file), 0, 0
        times = 60 if short else 2000
        for _ in range(times):
            changed, what = damaged(data, rng)
            path.write_bytes(changed)
            try:
                found = read_checkpoint(path)
            except UserError as e:
                assert str(path) in str(e) and len(str(e).splitlines()) == 1, (what, e)
                refused += 1
            else:
                if refused_by_check(path):
                    checked += 1
                else:
                    same(found, state)
        note = f"{refused} refused, {checked} more found by tools.check, the others load the same"
        rows.append((f"damage to a checkpoint of {name}", times, note))
    path.unlink()

    s = train.Settings(data_dir=str(ground.new("data")), block_size=32)
    folder = Path(s.data_dir)
    shutil.copytree(ground.data, folder)
    train_data, val_data, meta, parts = train.open_data(s)
    good_tokens, refused, checked, tried = [np.array(d.tokens) for d in (train_data, val_data)], 0, 0, 0
    for name in ("train.bin", "val.bin", "meta.json", "tokenizer.model"):
        data = (folder / name).read_bytes()
        for _ in range(30 if short else 500):
            changed, what = damaged(data, rng)
            (folder / name).write_bytes(changed)
            tried += 1
            try:
                a, b, found, found_parts = train.open_data(s)
            except UserError as e:
                assert str(folder) in str(e) and len(str(e).splitlines()) == 1, (name, what, e)
                refused += 1
            else:
                if refused_by_check(folder):
                    checked += 1
                else:
                    used = ("train", "val", "vocab_size", "end_token", "template")
                    assert found_parts["tokenizer"] == parts["tokenizer"], (name, what)
                    assert all(found[key]["tokens"] == meta[key]["tokens"] for key in used[:2]), (name, what)
                    assert all(found.get(key) == meta.get(key) for key in used[2:]), (name, what)
                    assert all(
                        np.array_equal(x.tokens, y) for x, y in zip((a, b), good_tokens, strict=True)
                    ), what
        (folder / name).write_bytes(data)
    note = f"{refused} refused, {checked} more found by tools.check, the others load the same"
    rows.append(("damage to .bin, meta.json and tokenizer", tried, note))

    times = 2 if short else 30
    for _ in range(times):  # from the outside: the newest checkpoint is cut; without it the run continues
        out = ground.new("resumed")
        shutil.copytree(ground.out, out)
        newest = out / "ckpt_000060.pt"
        newest.write_bytes(newest.read_bytes()[: rng.randrange(newest.stat().st_size)])
        training(ground.data, out, **OFTEN, resume=True).refused(newest)
        newest.unlink()
        training(ground.data, out, **OFTEN, resume=True).succeeds()
        same_state(newest, ground.out / "ckpt_000060.pt")
        assert lines_of(out) == lines_of(ground.out)
        shutil.rmtree(out)
    rows.append(("newest checkpoint cut: named; removed, the run continues from the one before", times, ""))
    return rows


# ---- Hostile files ---------------------------------------------------------------------------------


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def rezipped(source, target, change, compression=zipfile.ZIP_STORED, extra=()):
    """A checkpoint's archive written anew, each part through `change(name, data)`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for part in old.infolist():
            new.writestr(part.filename, change(part.filename, old.read(part)))
        for name, data in extra:
            new.writestr(name, data)


def overlapping(path, size):
    """An archive whose parts all are the same bytes of it: `size` of them out of a small file."""
    rezipped(path, path.with_name("one.pt"), lambda name, data: data)
    data = path.with_name("one.pt").read_bytes()
    at, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entries = data[at:end]
    count = size // len(data)
    tail = bytearray(data[end:])
    tail[8:10] = tail[10:12] = (min(count, 60000)).to_bytes(2, "little")
    one = entries[: 46 + int.from_bytes(entries[28:30], "little") + int.from_bytes(entries[30:32], "little")]
    tail[12:16] = (len(one) * min(count, 60000)).to_bytes(4, "little")
    return data[:at] + one * min(count, 60000) + bytes(tail)


def hostile_checkpoints(ground, folder):
    """(name, file) of checkpoints made to do harm."""
    good = find_checkpoints(ground.tuned)[0]
    state, mark = read_checkpoint(good), folder / "mark"
    for name, value in (
        ("code alone", Evil(mark)),
        ("code in the weights", state | {"model": Evil(mark)}),
        ("code in a weight", state | {"model": state["model"] | {"norm.weight": Evil(mark)}}),
        ("code in an extra part", state | {"extra": [Evil(mark)]}),
    ):
        torch.save(value, folder / f"{name}.pt")
        yield name, folder / f"{name}.pt"
        (folder / f"{name} old.pt").write_bytes(pickle.dumps(value, protocol=2))
        yield f"{name}, a plain pickle", folder / f"{name} old.pt"
        torch.save(value, folder / f"{name} tar.pt", _use_new_zipfile_serialization=False)
        yield f"{name}, the old format", folder / f"{name} tar.pt"
    path = folder / "bomb.pt"
    rezipped(
        good, path, lambda name, data: data, zipfile.ZIP_DEFLATED, [("archive/data/bomb", bytes(1 << 28))]
    )
    yield "a compressed part of 256 MB", path
    path = folder / "overlap.pt"
    path.write_bytes(overlapping(good, 1 << 32))
    yield "parts that overlap", path
    config = state["model_config"]
    for key, value in (
        ("block_size", 10**12),
        ("block_size", 10**9),
        ("n_layer", 10**9),
        ("vocab_size", 10**10),
        ("n_embd", 10**7),
        ("intermediate_size", 10**9),
        ("head_dim", 10**8),
        ("head_dim", "x" * 100),
        ("rope_theta", math.nan),
        ("n_layer", -1),
        ("vocab_size", True),
    ):
        path = folder / f"{key}{value}.pt"
        torch.save(state | {"model_config": config | {key: value}}, path)
        yield f"{key} of {value}", path
    path = folder / "lora.pt"
    torch.save(state | {"lora": {"rank": 10**9, "alpha": 1.0}}, path)
    yield "adapters of rank 10**9", path
    path = folder / "stride.pt"
    wide = config | {"n_embd": 10**6}
    one = torch.zeros(1)
    grown = {
        k: one.expand([10**6 if n == config["n_embd"] else n for n in v.shape])
        for k, v in state["model"].items()
    }
    torch.save(state | {"model": grown, "model_config": wide}, path)
    yield "weights of one number that claim to be many", path
    for name, model in (
        ("noise", random.Random(1).randbytes(10_000)),
        ("none", b""),
        ("lengths beyond the end", b"\x0a\xff\xff\xff\xff\x0f" * 100),
        ("pieces without end", ground.tokenizer.read_bytes() * 400),
        ("a pickle", pickle.dumps(Evil(mark))),
    ):
        path = folder / f"tokenizer {name}.pt"
        torch.save(state | {"tokenizer": model}, path)
        yield f"a tokenizer that is none: {name}", path
    nested = "x"
    for _ in range(60):
        nested = [nested] * 2  # 2**60 strings, if anyone writes them all out
    path = folder / "nested.pt"
    torch.save(state | {"template": nested, "settings": {"seed": nested, "data_dir": nested}}, path)
    yield "a list of 2**60 parts", path


def hostile_stories(ground, folder, size):
    """(name, file) of story files made to do harm; `size` bytes of bomb in each that is one."""

    def packed(name, pieces):
        with gzip.open(folder / name, "wb", compresslevel=1) as f:
            for piece in pieces:
                f.write(piece)
        return folder / name

    many = size // (1 << 20)
    for kind in ("jsonl", "txt", "csv"):
        yield f"a line of {size:,} bytes in .{kind}", packed(f"line.{kind}.gz", [b"x" * (1 << 20)] * many)
    for kind in ("json", "jsonl"):
        yield f"JSON {size:,} deep in .{kind}", packed(f"deep.{kind}.gz", [b"[" * (1 << 20)] * many)
        yield (
            f"JSON 10,000,000 deep in .{kind}",
            packed(f"less.{kind}.gz", [b"[" * 10_000_000, b"]" * 10_000_000]),
        )
        yield f"objects 1,000,000 deep in .{kind}", packed(f"objects.{kind}.gz", [b'{"a":' * 1_000_000])
    yield "a string without end in .json", packed("string.json.gz", [b'["', *[b"x" * (1 << 20)] * many])
    yield "a number of 1,000,000 digits", packed("digits.json.gz", [b"[" + b"9" * 1_000_000 + b"]"])
    yield "NULs", packed("nul.jsonl.gz", [bytes(1 << 20)] * many)
    kinds = {"pax": tarfile.XHDTYPE, "global pax": tarfile.XGLTYPE, "long name": tarfile.GNUTYPE_LONGNAME}
    for kind, flag in kinds.items():
        member = tarfile.TarInfo("x.jsonl")
        member.type, member.size = flag, size
        head = member.tobuf(tarfile.GNU_FORMAT)
        path = packed(f"{kind}.tar.gz", [head, *[b"9" * (1 << 20)] * many])
        yield f"an archive with a {kind} header of {size:,} bytes", path
    with tarfile.open(folder / "sparse.tar", "w") as archive:
        member = tarfile.TarInfo("x.jsonl")
        member.size = 1 << 50
        archive.addfile(member)
    yield "a member that claims 2**50 bytes", folder / "sparse.tar"


def part_hostile(ground, short):
    rows, folder = [], ground.new("hostile")
    folder.mkdir()
    mark = folder / "mark"
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried = 0

    def harmless(process, *words):
        process.wait(120)
        text = process.output[1]
        assert process.status == 2, (process.args, process.status, text[-2000:])
        one_line = len(text.strip().splitlines()) == 1 and len(text) < 2000
        assert one_line and text.startswith("error: "), (process.args, text)
        assert all(str(word) in text for word in words), (process.args, text)
        grown = process.usage.ru_maxrss - baseline
        assert grown < 400_000, (process.args, f"{grown:,} kB of memory")
        assert not mark.exists(), (process.args, "code was run")

    for name, path in hostile_checkpoints(ground, folder):
        run_ = ground.new("run")
        run_.mkdir()
        shutil.copy(path, run_ / "ckpt_000024.pt")
        before = files_in(folder.parent)
        harmless(Process("tools/check.py", path), path)
        tried += 1
        if name.startswith("code"):
            harmless(
                Process("sample.py", "--ckpt", path, "--num", 1, "--max_new_tokens", 5, "--words", "小兔"),
                path,
            )
            harmless(Process("tools/eval.py", "--ckpt", path, "--data", ground.sft_data, "--num", 2), path)
            harmless(Process(*tuning(path, ground.sft_data, ground.new("none"))))
            harmless(Process(*tuning(ground.base, ground.sft_data, run_, **QUICK, resume=True)), run_)
            harmless(Process(*tuning(ground.base, ground.sft_data, run_, merge=True)), run_)
            tried += 5
        assert files_in(folder.parent) == before, (name, files_in(folder.parent) ^ before)
        shutil.rmtree(run_)
    rows.append(
        ("hostile checkpoints: code, bombs, impossible shapes and tokenizers", tried, "none did harm")
    )

    tried = 0
    for name, path in hostile_stories(ground, folder, 1 << (25 if short else 30)):
        before = files_in(folder.parent)
        into = ("--out_dir", folder / "none", "--workers", 1)
        harmless(Process("prepare.py", path, *into, "--tokenizer", ground.tokenizer), path.name)
        assert files_in(folder.parent) == before, name
        path.unlink()
        tried += 1
    rows.append(("hostile story files: endless lines, depth, headers, sizes", tried, "none did harm"))

    tried = 0
    for text in (
        "import os\nos.mkdir(MARK)",
        "x = __import__('os').mkdir(MARK)",
        "max_iters = [os.mkdir(MARK)][0]",
        "max_iters = (lambda: open(MARK, 'w'))()",
        "f'{open(MARK, chr(119))}'",
        "class A:\n  open(MARK, 'w')",
        "max_iters = 1 if open(MARK, 'w') else 2",
        "@open(MARK, 'w')\ndef f(): pass",
        "max_iters: open(MARK, 'w') = 1",
        "(max_iters := open(MARK, 'w'))",
        "max_iters = 9**9**9",
        "max_iters = " + "(" * 10**5,
        "a = " + "-" * 10**6,
        "max_iters = " + "1+" * 10**5 + "1",
        "x = 1\n" * 10**6,
        "data_dir = 'x' * 10**10",
        "\0",
    ):
        path = folder / "config.py"
        path.write_text(text.replace("MARK", repr(str(mark))))
        harmless(Process("train.py", path, f"--data_dir={ground.data}", f"--out_dir={folder / 'none'}"), path)
        tried += 1
    harmless(Process("train.py", folder, f"--out_dir={folder / 'none'}"), folder)
    for data in (b"", bytes(1000), random.Random(2).randbytes(1000), b"\x0a\xff\xff\xff\xff\x0f" * 100):
        (folder / "t.model").write_bytes(data)
        harmless(Process("prepare.py", ground.stories, *into, "--tokenizer", folder / "t.model"), "t.model")
    rows.append(("hostile settings files and tokenizers", tried + 5, "none was executed"))
    return rows


# ---- Text ------------------------------------------------------------------------------------------


def reference_clean(text):
    """What prepare.py's documentation promises, said once more."""
    text = reference_strip(unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")))
    kinds = {unicodedata.category(c) for c in text if c not in "\n\t"}
    return None if not text or "\u2581" in text or kinds & {"Cc", "Cs"} else text


NASTY = [
    "<|user|>",
    "<|assistant|>",
    "<|endoftext|>",
    "</s>",
    "<s>",
    "<pad>",
    "<0x0A>",
    "<unk>",
    "{instruction}",
    "{response}",
    "词汇：",
    "摘要：",
]
NASTY += [
    "\0",
    "\ufeff",
    "\ud83d",
    "\ude00",
    "\u202e",
    "\u200f",
    "\u2581",
    "\x85",
    "\u2028",
    "\x1a",
    "\ufffd",
]
NASTY += [" ", "\r", "\n", "\r\n", "مرحبا", "שלום", "e\u0301", "가", "👩‍👩‍👧", "字" * 3000, "w" * 100_000]
PIECES = (
    st.sampled_from(NASTY)
    | st.text(max_size=20)
    | st.characters()
    | st.text("从前有一只兔子。，", max_size=20)
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)


def part_text(ground, short):
    times, count = (4, 40) if short else (60, 100)
    folder = ground.new("text")
    folder.mkdir()
    told = [0, 0, 0]

    @settings(max_examples=times, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(TEXTS, min_size=count, max_size=count), st.booleans(), st.sampled_from(["", "\ufeff"]))
    def whole_way(texts, escaped, bom):
        file, out, runs = folder / "a.jsonl", folder / "data", folder / "out"
        shutil.rmtree(runs, ignore_errors=True)
        rows = [
            json.dumps({"story_zh": t}, ensure_ascii=escaped or "\ud83d" in t or "\ude00" in t) for t in texts
        ]
        ordinary = [json.dumps({"story_zh": f"从前有一只兔子，它住在森林里第{i}号。"}) for i in range(60)]
        data = (bom + "\n".join(rows + ordinary) + "\n").encode(errors="surrogatepass")
        file.write_bytes(data)
        try:
            data.decode()
        except UnicodeDecodeError:  # a surrogate spelt out in the file, which is then no UTF-8
            Process("prepare.py", file, "--out_dir", out, "--tokenizer", ground.tokenizer).refused(
                file, "UTF-8"
            )
            return
        Process("prepare.py", file, "--out_dir", out, "--tokenizer", ground.tokenizer, "--val_fraction", 0.2,
                "--workers", 1).succeeds()  # fmt: skip
        tokenizer = load_tokenizer(ground.tokenizer.read_bytes(), "tokenizer")
        end, meta = tokenizer.eos_id(), meta_of(out)
        found = []
        for split in ("train", "val"):
            ids = np.fromfile(out / f"{split}.bin", dtype="<u2").tolist()
            while ids:
                at = ids.index(end)
                assert not any(map(tokenizer.is_control, ids[:at])), ids[:at]
                found.append(tokenizer.decode(ids[:at]))
                ids = ids[at + 1 :]
        cleaned = [reference_clean(t) for t in texts]
        kept = [c for c in cleaned if c is not None]
        expected = set(kept) | {json.loads(r)["story_zh"] for r in ordinary}
        assert sorted(found) == sorted(expected), set(found) ^ expected
        dropped = dict(meta["dropped"])
        assert dropped.pop("duplicate") == len(kept) - len(set(kept))
        assert sum(dropped.values()) == cleaned.count(None), (dropped, cleaned.count(None))
        told[0] += len(texts)
        told[1] += cleaned.count(None)
        if not (folder / "model").exists():
            training(
                out, folder / "model", max_iters=2, block_size=32, eval_sequences=1, batch_size=1
            ).succeeds()
        training(
            out, runs, max_iters=1, block_size=16, eval_sequences=1, batch_size=1, sample_interval=1
        ).succeeds()
        checkpoint = read_checkpoint(folder / "model")
        model = build_model(checkpoint, folder).eval()
        for text in texts[:10]:
            try:
                prompt = clean(text)
            except UnicodeEncodeError:
                continue
            ids = tokenizer.encode(prompt)
            assert not any(map(tokenizer.is_control, ids)), prompt
            if "\u2581" not in prompt:
                assert tokenizer.decode(ids) == prompt, prompt
            if len(ids) < 30:
                ((story, _),) = sample.sample_stories(model, tokenizer, [[end, *ids]], max_new_tokens=3)
                assert story.startswith(prompt.rstrip("\ufffd")) or "\u2581" in prompt, (prompt, story)
                told[2] += 1

    whole_way()
    note = f"{told[1]:,} dropped and counted, {told[2]} as prompts"
    return [("any Unicode through prepare, train and sample", told[0], note)]


# ---- Settings --------------------------------------------------------------------------------------


def part_settings(ground, short):
    tried = 0
    for script, cls, main in (("train.py", train.Settings, train.main), ("sft.py", sft.Settings, sft.main)):
        for field in dataclasses.fields(cls):
            wrong = {
                int: ["x", "1.5", "-1", "True", "[1]", ""],
                float: ["x", "-1", "True", "nan", "1e999", ""],
            }
            wrong |= {bool: ["1", "yes", "true", ""], str: []}
            spelt = [
                f"--{field.name}s=1",
                f"--{field.name[:-1]}=1",
                f"--{field.name.upper()}=1",
                f"--{field.name}",
            ]
            for argument in [*spelt, *(f"--{field.name}={value}" for value in wrong[field.type])]:
                done = script_here(main, script, argument)
                assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, (argument, done.stderr)
                assert argument.split("=")[0] in done.stderr or field.name in done.stderr, (
                    argument,
                    done.stderr,
                )
                tried += 1
    for script, main, needed in (("sample.py", sample.main, ["--ckpt", ground.out]),
                                 ("prepare.py", prepare.main, [ground.stories, "--out_dir", ground.folder / "none"]),
                                 ("tools/eval.py", tools.eval.main, ["--ckpt", ground.tuned])):  # fmt: skip
        options = re.findall(r"--(\w+)(?: ([A-Z_]+))?", script_help(main, script))
        for name, value in dict(options).items():
            for argument in [[f"--{name}s", "1"], [f"--{name.upper()}", "1"]] + (
                [[f"--{name}"]] if value else []
            ):
                done = script_here(main, script, *needed, *argument)
                assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, (argument, done.stderr)
                assert argument[0] in done.stderr, (argument, done.stderr)
                tried += 1
    return [("settings of a wrong type, out of range or misspelt", tried, "each is named in one line")]


def script_help(main, script):
    done = script_here(main, script, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- Long runs -------------------------------------------------------------------------------------


def slope(xs, ys):
    return float(np.polyfit(xs, ys, 1)[0])


def part_long(ground, short):
    steps, out = (400 if short else 20_000), ground.new("long")
    often = {"log_interval": 20, "save_interval": 100, "eval_interval": 200, "sample_interval": 500}
    process = training(ground.data, out, **often, eval_sequences=4, max_iters=steps)
    seen, path = [], out / "metrics.jsonl"
    while process.running():
        time.sleep(0.2)
        try:
            size = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            step = json.loads(path.read_text().splitlines()[-1])["step"]
        except (OSError, IndexError, ValueError):
            continue
        if size:  # it has not just ended
            seen.append((step, size, files))
    process.succeeds()
    seen = [x for x in seen if x[0] > steps // 4]  # once everything has been done once
    memory, files = slope(*zip(*((a, b) for a, b, _ in seen), strict=True)), {c for *_, c in seen}
    logs = [(x["step"], 128 / x["tokens_per_second"]) for x in metrics_of(out) if "tokens_per_second" in x]
    logs = [x for x in logs if x[0] > steps // 4]
    middle = float(np.median([t for _, t in logs]))
    time_slope = slope(*zip(*logs, strict=True)) * 1000 / middle
    grown = (seen[-1][1] - seen[0][1]) / 2**20
    if not short:
        assert memory * 10_000 < 4 * 2**20, f"{memory:.0f} bytes a step"
    assert len(find_checkpoints(out)) == 2 and not leftovers(out) and max(files) - min(files) <= 2, files
    rows = [("a long run", f"{steps:,} steps", f"memory {memory:+.0f} bytes a step ({grown:+.1f} MiB in all), "
             f"{min(files)} to {max(files)} open files, a step's time {time_slope:+.2%} per 1,000 steps")]  # fmt: skip
    if not short:
        shares = overhead(ground)
        rows.append(("the loop beside its own forward, backward and optimizer's steps", f"{len(shares)} times 20 steps",
                     f"{np.median(shares):+.1%} (median; from {min(shares):+.1%} to {max(shares):+.1%})"))  # fmt: skip
    return rows


# Both are timed in the same steps: on a machine that others use too, a step now and a step later differ by
# far more.
COST = """
import json, sys, time
import torch
import train
from common.settings import load_settings
from model import GPT, ModelConfig

turns, turn = 15, 20
s = load_settings(sys.argv[1:], train.Settings, "")
train_data, val_data, meta, parts = train.open_data(s)
names = ModelConfig.__dataclass_fields__.keys() & vars(s)
model = GPT(ModelConfig(vocab_size=8192, **{name: getattr(s, name) for name in names}))
calls, bare, clock, found = 0, 0.0, 0.0, []

def timing(function):
    def timed(*args, **options):
        global bare
        begun = time.perf_counter()
        result = function(*args, **options)
        bare += time.perf_counter() - begun
        return result
    return timed

def forward(model, batch):
    # Called once in each of the loop's steps, as the first thing in it.
    global calls, bare, clock
    if torch.is_grad_enabled() and calls % turn == 0:
        now = time.perf_counter()
        if calls > turn:  # the first turn compiles
            found.append((now - clock, bare))
        if len(found) == turns:
            print(json.dumps(found))
            raise SystemExit
        clock, bare = now, 0.0
    calls += torch.is_grad_enabled()
    return timed_loss(model, batch)

timed_loss = timing(train.next_token_loss)
torch.Tensor.backward = timing(torch.Tensor.backward)
for optimizer in (torch.optim.AdamW, train.Muon):
    optimizer.step, optimizer.zero_grad = timing(optimizer.step), timing(optimizer.zero_grad)
train.train(s, model, train_data, val_data, parts, forward)
"""


def overhead(ground):
    """What the loop takes beside its forward, backward and optimizer's steps, with the demo's model and data:
    a share of these, for each turn of 20 steps, two of which are logged."""
    data = ground.new("demo")
    write_corpus(data.with_suffix(".jsonl"))
    Process("prepare.py", data.with_suffix(".jsonl"), "--out_dir", data).succeeds()
    often = [
        "--max_iters=1000000",
        "--eval_interval=1000000",
        "--sample_interval=0",
        "--save_interval=1000000",
    ]
    arguments = ["config/demo.py", f"--data_dir={data}", f"--out_dir={ground.new('cost')}", *often]
    done = run_script("-c", COST, *arguments, timeout=3600, OMP_NUM_THREADS=str(os.cpu_count()))
    return [whole / bare - 1 for whole, bare in json.loads(done.stdout.splitlines()[-1])]


# ---- Numbers ---------------------------------------------------------------------------------------


def with_loss(change):
    """A prelude: the loop's loss is change(step, loss)."""

    def prelude():
        original, calls = train.next_token_loss, 0

        def loss(model, batch):
            nonlocal calls
            calls += torch.is_grad_enabled()
            value = original(model, batch)["loss"]
            return {"loss": change(calls, value) if torch.is_grad_enabled() else value}

        train.train.__defaults__ = (loss, *train.train.__defaults__[1:])

    return prelude


def no_gradient(loss):
    """The same value, but its gradient is none, as if it had overflowed."""
    return loss + (loss - loss).sqrt()


def part_numbers(ground, short):
    rng, rows, times = rng_of("numbers"), [], 1 if short else 20
    for _ in range(times):
        out, at = ground.new("nan"), rng.randrange(2, 60)
        s = f"--data_dir={ground.data}", f"--out_dir={out}", *tiny(**OFTEN)
        poison = with_loss(lambda step, loss, at=at: loss * math.nan if step == at else loss)
        process = Process("train.py", *s, prelude=poison).refused("nan", "learning_rate")
        assert at <= int(re.search(r"step (\d+):", process.output[1])[1]) < at + 2, (at, process.output)
        assert all(x["step"] < at for x in metrics_of(out))
        for path in find_checkpoints(out):
            assert all(w.isfinite().all() for w in read_checkpoint(path)["model"].values())
        training(ground.data, out, **OFTEN, resume=True).succeeds()
        same_state(out / "ckpt_000060.pt", ground.out / "ckpt_000060.pt")
    rows.append(("a batch whose loss is NaN", times, "stopped when it is logged; resumed, the same bits"))

    rates = [1e3, 1e18] if short else [1e3, 1e6, 1e12, 1e18]
    for rate in rates:
        for optimizer in ("muon", "adamw"):
            out = ground.new("rate")
            changes = {"save_interval": 1, "warmup_iters": 0, "learning_rate": rate, "optimizer": optimizer}
            process = training(ground.data, out, **OFTEN | changes)
            process.wait()
            assert process.status == 0 or process.refused("step ", "learning_rate below"), process.output
            for path in find_checkpoints(out):
                assert all(w.isfinite().all() for w in read_checkpoint(path)["model"].values()), (rate, path)
    note = "no weight in a checkpoint is infinite or NaN"
    rows.append(("a learning rate of 1e3 to 1e18, saving at every step", 2 * len(rates), note))

    # float16: a step whose gradients overflow is skipped, and half the scale is tried; but not for ever.
    s = f"--data_dir={ground.data}", *tiny(**OFTEN, dtype="float16")
    out, worse = ground.new("half"), ground.new("overflow")
    twice = with_loss(lambda step, loss: no_gradient(loss) if step in (10, 31) else loss)
    Process("train.py", *s, f"--out_dir={out}", prelude=twice).succeeds()
    assert read_checkpoint(out)["scaler"]["scale"] == 65536 / 4
    assert [x["step"] for x in metrics_of(out) if x.get("grad_norm", 0) is None] == [10]  # 31 is not logged
    always = with_loss(lambda step, loss: no_gradient(loss) if step > 30 else loss)
    Process("train.py", *s, f"--out_dir={worse}", prelude=always).refused("step ", "learning_rate")
    assert find_checkpoints(worse)[0].name == "ckpt_000045.pt", find_checkpoints(worse)
    rows.append(("float16: gradients that overflow twice, and always", 2, "two steps skipped; stopped"))
    return rows


# ---- Data-parallel ---------------------------------------------------------------------------------


def parallel(data, out, world, prelude=None, **changes):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    settings_ = "train.py", f"--data_dir={data}", f"--out_dir={out}", *tiny(**changes)
    env = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        Process(*settings_, prelude=prelude, RANK=str(rank), LOCAL_RANK=str(rank), **env)
        for rank in range(world)
    ]


def noting(folder):
    """A prelude: the loop's loss notes the sequences it is given, a file for each process."""

    def prelude():
        start, timeout = torch.distributed.init_process_group, datetime.timedelta(seconds=8)
        torch.distributed.init_process_group = functools.partial(start, timeout=timeout)
        original, calls = train.next_token_loss, 0
        notes = open(folder / f"{time.monotonic_ns()}", "w")  # noqa: SIM115 (open as long as it runs)

        def loss(model, batch):
            nonlocal calls
            if torch.is_grad_enabled():
                notes.writelines(json.dumps([calls, row]) + "\n" for row in batch["tokens"].tolist())
                notes.flush()
                calls += 1
            return original(model, batch)

        train.train.__defaults__ = (loss, *train.train.__defaults__[1:])

    return prelude


def noted(folder, begun, calls_a_step):
    """{step: its sequences} of what the processes of a run that began at this step have noted."""
    found = {}
    for file in folder.iterdir():
        for line in file.read_text().split("\n")[:-1]:
            call, row = json.loads(line)
            found.setdefault(begun + call // calls_a_step, []).append(row)
        file.unlink()
    return found


def part_parallel(ground, short):
    rng, times, ends = rng_of("parallel"), 1 if short else 10, []
    changes = OFTEN | {
        "gradient_accumulation_steps": 4,
        "dtype": "float32",
        "optimizer": "adamw",
        "batch_size": 2,
    }
    folder = ground.new("data")  # a small file: 60 steps of 8 sequences are ten epochs of 48
    shutil.copytree(ground.data, folder)
    tokens = np.fromfile(folder / "train.bin", dtype="<u2")[: 48 * 32 + 1]
    tokens.tofile(folder / "train.bin")
    reseal(folder)
    alone = ground.new("alone")
    training(folder, alone, **changes).succeeds()
    expected = sorted(tokens[i * 32 : i * 32 + 32].tolist() for i in range(48))
    for _ in range(times):
        out, notes = ground.new("parallel"), ground.new("notes")
        notes.mkdir()
        begun, seen = 0, {}
        for world, lost in rng.choice(
            [((2, 1), (4, 1), (1, 0)), ((2, 1), (2, 1), (1, 0)), ((4, 1), (2, 1), (2, 0))]
        ):
            team = parallel(folder, out, world, noting(notes), **changes, resume=True)
            if lost:
                victim = team[rng.randrange(world)]
                until(team[0], functools.partial(logged, out, begun + rng.randrange(5, 20)))
                victim.kill(rng.choice([signal.SIGKILL, signal.SIGSTOP]))
                start = time.monotonic()
                for process in team:
                    if process is not victim:
                        process.refused("another process", "--resume=True")
                ends.append(time.monotonic() - start)
                victim.kill()
            else:
                for process in team:
                    process.succeeds()
            seen |= noted(notes, begun, 4 // world)
            begun = max((read_checkpoint(p)["step"] for p in find_checkpoints(out)), default=0)
            seen = {
                step: rows for step, rows in seen.items() if step < begun
            }  # what comes after is done again
        assert sorted(seen) == list(range(60)), sorted(seen)
        for epoch in range(10):
            assert (
                sorted(row for step in range(epoch * 6, epoch * 6 + 6) for row in seen[step]) == expected
            ), epoch
        for line, other in zip(lines_of(out), lines_of(alone), strict=True):
            assert line.keys() == other.keys()
            for key in line.keys() - {"grad_norm"}:  # which is the first to show what rounding does
                assert math.isclose(line[key], other[key], rel_tol=1e-3), (line, other)
    what = "data-parallel: one process killed or stopped, resumed with another number"
    return [(what, len(ends), f"the others end within {max(ends):.1f} s; every sequence once an epoch")]


PARTS = {name.removeprefix("part_"): f for name, f in list(globals().items()) if name.startswith("part_")}


def main():
    parser = argparse.ArgumentParser(description="Try to hurt the program, and count what is lost.")
    parser.add_argument("--short", action="store_true", help="each thing a few times, as on every change")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none: all")
    args = parser.parse_args()
    torch.set_num_threads(1)  # and so no threads, which a fork would lose
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
        print(f"| {what} | {often if isinstance(often, str) else f'{often:,}'} | nothing | {note} |")


if __name__ == "__main__":
    main()
