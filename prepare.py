"""Turn stories into tokens: read, clean, drop duplicates, train a tokenizer, write token files.

    python prepare.py                                       the embedded corpus, into data/demo
    python prepare.py stories.jsonl more/ --out_dir data/mine
    python prepare.py --download tinystories-zh --out_dir data/microstories
    python prepare.py --task sft --tokenizer data/demo/tokenizer.model          instructions, into data/demo_sft

Writes into out_dir, which appears complete or not at all:
    train.bin, val.bin   little-endian uint16 token ids, each story followed by the end token; for --task sft
                         each story preceded by its instruction, both after their control tokens
    tokenizer.model      the SentencePiece tokenizer
    meta.json            counts, checksums and settings
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from common.files import atomic_write, json_checksum, locked, sync_folder
from common.settings import Parser, UserError, run
from common.tokenizer import CONTROL_TOKENS, clean, load_tokenizer, template_for, template_tokens, text_digest
from stories.constraints import NAMES
from stories.download import DATASETS, download
from stories.generate import write_corpus
from stories.read import LONGEST, describe_texts, find_inputs, items_of, read_blocks
from stories.records import LeftOut, examples_of, story_of

SAMPLE = 8_000_000  # characters to train the tokenizer on, at most
CORES = min(os.cpu_count() or 1, 61)  # Windows allows 61 worker processes


# ---------------------------------------------------------------------------------------------------
# Cleaning and encoding, in worker processes, a block of input at a time


def items_of_record(record, where: str, args: argparse.Namespace) -> list[tuple[str, tuple[str, ...]]]:
    """(form, texts) of a record: its story; for --task sft, an instruction and a story, perhaps several times.

    The form names the keys that were read. A record that is left out has the reason instead, and no texts.
    """
    if args.task != "sft":
        return [("text" if isinstance(record, str) else args.text_key, (story_of(record, where, args.text_key),))]
    try:
        form, examples = examples_of(record, where, args.text_key, args.augment)
    except LeftOut as reason:
        return [(str(reason), ())]
    return [(form, example) for example in examples]


def clean_block(block: tuple, extract) -> tuple[list[tuple[str, ...]], collections.Counter, collections.Counter]:
    """The cleaned texts of a block, the story last in each; how many were dropped for which reason; and how many
    had which form."""
    cleaned, dropped, forms = [], collections.Counter[str](), collections.Counter[str]()
    for form, texts in items_of(block, extract):
        if not texts:
            dropped[form] += 1
            continue
        forms[form] += 1
        try:
            texts = tuple(map(clean, texts))
        except UnicodeEncodeError:
            dropped["not_unicode"] += 1
            continue
        if not all(texts):
            dropped["empty"] += 1
        elif any("\u2581" in text for text in texts):  # SentencePiece writes a space as this character, and would
            dropped["unencodable"] += 1  # decode it to a space
        else:
            cleaned.append(texts)
    return cleaned, dropped, forms


def sample_block(block_and_limit: tuple, extract) -> dict[int, str]:
    """{digest: story} of the stories of a block whose digest is at least the limit."""
    block, limit = block_and_limit
    return {n: story for *_, story in clean_block(block, extract)[0] if (n := text_digest(story)) >= limit}


tokenizer: sentencepiece.SentencePieceProcessor  # start_worker sets these two in each worker process
frames: Sequence[list[int]]


@dataclass
class LossyTokens:
    """What a tokenizer loses: texts that come back changed, and an example."""

    texts: int = 0
    changed: int = 0
    unknown: int = 0  # tokens
    example: str = ""

    def add(self, texts: Sequence[str], encoded: list[list[int]]) -> None:
        """Compare texts with what their tokens decode to."""
        unknown = tokenizer.unk_id()
        for text, ids, decoded in zip(texts, encoded, tokenizer.decode(encoded), strict=True):
            self.texts += 1
            self.unknown += ids.count(unknown)
            if decoded != text:
                self.changed += 1
                at = max(0, next((i for i, (a, b) in enumerate(zip(text, decoded)) if a != b), len(decoded)) - 4)  # noqa: B905
                self.example = self.example or f"{text[at : at + 12]!r} becomes {decoded[at : at + 12]!r}"

    def merge(self, other: "LossyTokens") -> None:
        self.texts, self.changed = self.texts + other.texts, self.changed + other.changed
        self.unknown, self.example = self.unknown + other.unknown, self.example or other.example

    def __str__(self) -> str:
        share = self.changed / max(1, self.texts)
        return (
            f"changes {self.changed:,} of {self.texts:,} texts ({share:.2%}): {self.example}; {self.unknown:,} unknown "
            "tokens"
        )


@dataclass
class EncodedBlock:
    """The N texts of a block as tokens."""

    digests: np.ndarray  # (N,) of the texts
    story_digests: np.ndarray  # (N,) of their stories alone
    lengths: np.ndarray  # (N, 3): tokens, characters, bytes
    tokens: np.ndarray  # of all texts, one after the other
    dropped: collections.Counter
    forms: collections.Counter
    losses: LossyTokens


def encode_block(block: tuple, extract, check: bool = True) -> EncodedBlock:
    """Clean and encode a block. With `check` its texts are compared with what their tokens decode to."""
    texts, dropped, forms = clean_block(block, extract)
    parts = list(zip(*texts, strict=True))  # all instructions, then all stories
    encoded = [tokenizer.encode(list(part)) for part in parts]
    losses = LossyTokens()
    for part, ids_of_part in zip(parts, encoded, strict=True) if check else ():
        losses.add(part, ids_of_part)
    flat, ids = itertools.chain.from_iterable, []
    for ids_of_text in zip(*encoded, strict=True):
        ids.append([*flat(flat(zip(frames, ids_of_text, strict=True))), tokenizer.eos_id()])
    lengths = [
        (len(i), sum(map(len, t)), sum(len(part.encode()) for part in t)) for i, t in zip(ids, texts, strict=True)
    ]
    return EncodedBlock(
        np.array([text_digest(*t) for t in texts], dtype=np.uint64),
        np.array([text_digest(t[-1]) for t in texts], dtype=np.uint64),
        np.array(lengths, dtype=np.int64).reshape(-1, 3),
        np.fromiter(flat(ids), dtype=np.uint16),
        dropped,
        forms,
        losses,
    )


def exit_with(parent) -> None:
    """Wait until the parent process ends, then end this one."""
    parent.join()
    os._exit(1)


def start_worker(model: bytes = b"", before: Sequence[list[int]] = ()) -> None:
    """Initialise a worker process: it ends with its parent, leaves Ctrl-C to it, and gets the tokenizer and the
    control tokens that stand before each part of a text."""
    global tokenizer, frames
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    if model:
        tokenizer, frames = sentencepiece.SentencePieceProcessor(model_proto=model), before


def in_order(workers: concurrent.futures.Executor, function, blocks, *args):
    """Like workers.map, but reads only a few blocks ahead, so that memory does not grow with the input."""
    waiting = collections.deque[concurrent.futures.Future]()
    for block in blocks:
        waiting.append(workers.submit(function, block, *args))
        if len(waiting) > 2 * (os.cpu_count() or 1):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ---------------------------------------------------------------------------------------------------
# The tokenizer


def train_tokenizer(texts, vocab_size: int) -> bytes:
    """Train a byte-fallback BPE (Sennrich et al. 2016, arXiv:1508.07909). Returns the model file. Raises UserError."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a small corpus gets as many pieces as it can fill
            character_coverage=0.9995,  # the rarest characters are spelt in bytes
            byte_fallback=True,
            required_chars="\u2581：" + "".join(NAMES),  # the space and the labels of instructions
            # These four leave every character as it is, so that decode(encode(story)) == story.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=LONGEST,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=CONTROL_TOKENS,
            minloglevel=2,
        )
    except RuntimeError as e:
        reason = str(e).rsplit("] ", 1)[-1].split(". ")[0]
        if too_small := re.search(r"required_chars\. \d+ vs (\d+)", str(e)):
            reason = f"too small for the characters of these stories; at least {too_small[1]} is needed"
        raise UserError(f"--vocab_size {vocab_size}: {reason}") from None
    return model.getvalue()


def sample_stories(workers, files: list[Path], extract, val_fraction: float) -> list[str]:
    """About SAMPLE characters of training stories, a fair sample of all files whatever their order and size.

    The sample is the stories whose digest is at least a limit, at first all that are not held out. Whenever they
    are too many, the range above the limit is halved. Raises UserError if there are none.
    """
    sample, limit = dict[int, str](), int(val_fraction * 2**64)
    blocks = ((block, limit) for block in read_blocks(files, extract, "reading"))
    for found in in_order(workers, sample_block, blocks, extract):
        sample |= {n: story for n, story in found.items() if n >= limit}
        while sum(map(len, sample.values())) > SAMPLE:
            limit += (2**64 - limit) // 2
            sample = {n: story for n, story in sample.items() if n >= limit}
    if not sample:
        raise UserError(f"{files[0]}: no stories found, or --val_fraction leaves none to train on")
    return [sample[n] for n in sorted(sample)]


def make_tokenizer(files: list[Path], extract, args: argparse.Namespace) -> bytes:
    """The file given with --tokenizer, or a new tokenizer trained on the stories. Raises UserError."""
    if args.tokenizer:
        model = args.tokenizer.read_bytes()
        load_tokenizer(model, args.tokenizer)
        return model
    with concurrent.futures.ProcessPoolExecutor(args.workers, None, start_worker) as workers:
        texts = sample_stories(workers, files, extract, args.val_fraction)
        print(f"training a tokenizer on {sum(map(len, texts)):,} characters", flush=True)
        # In a worker process, whose memory is free again when it ends.
        model = workers.submit(train_tokenizer, texts, args.vocab_size).result()
    if (size := load_tokenizer(model, "the new tokenizer").vocab_size()) < args.vocab_size:
        print(f"the corpus fills only {size:,} of the {args.vocab_size:,} pieces asked for")
    return model


# ---------------------------------------------------------------------------------------------------
# Duplicates and token files


class SeenDigests:
    """The digests so far, in a few sorted arrays: 8 bytes each, a fifteenth of what a set takes."""

    def __init__(self):
        self.arrays: list[np.ndarray] = []

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests, (N,). Returns which of them occur here for the first time, (N,) bool."""
        distinct, first = np.unique(digests, return_index=True)
        known = np.zeros(len(distinct), dtype=bool)
        for array in self.arrays:
            known |= array[np.searchsorted(array, distinct).clip(max=len(array) - 1)] == distinct
        new = np.zeros(len(digests), dtype=bool)
        new[first[~known]] = True
        if new.any():
            self.arrays.append(distinct[~known])
        # Merging similar sizes keeps the arrays few.
        while len(self.arrays) > 1 and len(self.arrays[-2]) < 2 * len(self.arrays[-1]):
            self.arrays.append(np.sort(np.concatenate((self.arrays.pop(), self.arrays.pop()))))
        return new


def write_bins(blocks, folder: Path, args: argparse.Namespace) -> dict:
    """Write the texts of encoded blocks to train.bin and val.bin, each text once. Returns counts and checksums.

    The digest of its story decides a text's split, so it never depends on file names or order. Raises UserError if
    the tokenizer loses too much.
    """
    border, seen, losses = np.uint64(args.val_fraction * 2**64), SeenDigests(), LossyTokens()
    counts = {split: np.zeros(4, int) for split in ("train", "val")}
    checksums = {split: hashlib.sha256() for split in ("train", "val")}
    dropped, forms = collections.Counter[str](), collections.Counter[str]()
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for block in blocks:
            dropped += block.dropped
            forms += block.forms
            losses.merge(block.losses)
            if losses.texts >= 10_000:  # do not wait for the end of millions
                check_losses(losses, args)
            new = seen.add(block.digests)
            dropped["duplicate"] += int((~new).sum())
            in_val = block.story_digests < border
            for split, file, selected in (("train", train, new & ~in_val), ("val", val, new & in_val)):
                data = block.tokens[np.repeat(selected, block.lengths[:, 0])].astype("<u2").tobytes()
                file.write(data)
                checksums[split].update(data)
                counts[split] += (selected.sum(), *block.lengths[selected].sum(axis=0))
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())
    check_losses(losses, args)
    meta: dict = {}
    for split in ("train", "val"):
        meta[split] = dict(zip(("stories", "tokens", "characters", "bytes"), map(int, counts[split]), strict=True))
        meta[split]["sha256"] = checksums[split].hexdigest()
    always = ("duplicate", "empty", "not_unicode", "unencodable")
    meta["dropped"] = {reason: dropped[reason] for reason in (*always, *sorted(dropped.keys() - set(always)))}
    return meta | {"forms": dict(forms), "tokenizer_losses": dataclasses.asdict(losses)}


def check_losses(losses: LossyTokens, args: argparse.Namespace) -> None:
    """Raise a UserError if a tokenizer changes more than 1% of the texts, unless that is allowed."""
    if losses.changed > 0.01 * losses.texts and not args.allow_lossy_tokenizer:
        advice = "use another tokenizer, or accept this with --allow_lossy_tokenizer"
        raise UserError(f"{args.tokenizer}: {losses}; {advice}")


# ---------------------------------------------------------------------------------------------------
# From inputs to a folder


@contextlib.contextmanager
def replace_folder(folder: Path, made: set[str]):
    """A new folder beside `folder` that takes its name when the body ends, or vanishes if the body fails.

    Raises UserError if one of the folders holds other files than `made`.
    """
    final = Path(os.path.abspath(folder))
    new, old = (final.parent / f"{final.name}.{end}" for end in ("tmp", "old"))
    for present in (folder, new, old):
        if present.exists() and not {p.name for p in present.iterdir()} <= made:
            raise UserError(f"{present}: holds files that prepare.py did not make; choose another --out_dir")
    if old.exists() and not final.exists():  # a run was killed between the two renames
        os.replace(old, final)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(new, final)
        sync_folder(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        e.filename = e.filename or str(folder)  # the error of a full disk has no file name
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_dropped(meta: dict, files: list[Path], args: argparse.Namespace) -> None:
    """Raise a UserError if there is nothing to write, or if most instructions had to be left out."""
    kept = meta["train"]["stories"] + meta["val"]["stories"]
    reasons = {reason: n for reason, n in meta["dropped"].items() if n and reason != "duplicate"}
    listed = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items())
    if not kept:
        raise UserError(f"{files[0]}: no stories found" + (f" ({listed})" if listed else ""))
    if args.task == "sft" and sum(reasons.values()) > kept + meta["dropped"]["duplicate"]:
        raise UserError(f"{files[0]}: more than half of the records cannot be used ({listed})")


def prepare(files: list[Path], out_dir: Path, args: argparse.Namespace) -> dict:
    """Write out_dir from the files. Returns what meta.json holds. Raises UserError."""
    extract = functools.partial(items_of_record, args=args)
    with replace_folder(out_dir, {"train.bin", "val.bin", "tokenizer.model", "meta.json"}) as folder:
        model = make_tokenizer(files, extract, args)
        trained = load_tokenizer(model, args.tokenizer or "the new tokenizer")
        template = template_for(trained) if args.task == "sft" else None
        before = template_tokens(template, trained) if template else ([],)
        with concurrent.futures.ProcessPoolExecutor(args.workers, None, start_worker, (model, before)) as workers:
            blocks = read_blocks(files, extract, "encoding")
            # A new tokenizer is one that changes nothing (see train_tokenizer).
            encoded = in_order(workers, encode_block, blocks, extract, bool(args.tokenizer))
            meta = write_bins(encoded, folder, args)
        check_dropped(meta, files, args)
        for split in ("train", "val"):
            if not meta[split]["stories"]:
                advice = "raise it" if split == "val" else "lower it"
                left = f"leaves no story for the {split} split"
                raise UserError(f"--val_fraction {args.val_fraction}: {left}; {advice}, or add stories")
        meta |= {"vocab_size": trained.vocab_size(), "end_token": trained.eos_id(), "template": template}
        meta |= {"tokenizer_sha256": hashlib.sha256(model).hexdigest()}
        meta |= {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}
        meta |= {"checksum": json_checksum(meta)}
        for name, data in (("tokenizer.model", model), ("meta.json", json.dumps(meta, indent=2).encode())):
            with atomic_write(folder / name) as f:
                f.write(data)
    return meta


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Turn stories into tokens.", allow_abbrev=False)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="files, folders or globs (default: our own stories)")
    parser.add_argument("--task", choices=("pretrain", "sft"), default="pretrain", help="stories, or instructions")
    parser.add_argument("--augment", type=int, default=1, help="sft: differently ordered instructions for a story")
    parser.add_argument("--download", choices=DATASETS, help="fetch this dataset and prepare it")
    parser.add_argument("--out_dir", type=Path, help="default: data/demo, or data/ and the dataset's name")
    parser.add_argument("--vocab_size", type=int, default=8192, help="pieces of the tokenizer (at most 65536)")
    parser.add_argument("--tokenizer", type=Path, help="use this SentencePiece model instead of training one")
    parser.add_argument("--allow_lossy_tokenizer", action="store_true", help="even if it changes over 1%% of the texts")
    parser.add_argument("--val_fraction", type=float, default=0.01, help="share of the stories held out")
    parser.add_argument("--text_key", help="where a record has its story (default: story_zh)")
    parser.add_argument("--workers", type=int, default=CORES, help="processes (default: one for each core)")
    args = parser.parse_args()
    if not 263 <= args.vocab_size <= 65536:
        raise UserError(f"--vocab_size {args.vocab_size}: must lie between 263 (every byte) and 65536 (uint16)")
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction}: must lie between 0 and 1")
    for key in ("workers", "augment"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    if args.task == "sft" and not args.tokenizer:
        raise UserError("--tokenizer is missing: instructions need the one of the model to be tuned")
    if args.inputs and not args.out_dir and not args.download:
        raise UserError("--out_dir is missing: where should the token files go? (for example data/mine)")
    return args


def get_files(args: argparse.Namespace) -> list[Path]:
    """The input files: those named, after a downloaded dataset; or the embedded corpus. Raises UserError."""
    if args.download:
        files = [download(args.download, Path("data/downloads"))]
        args.text_key = args.text_key or DATASETS[args.download][2]
    elif not args.inputs:
        files = [Path("data/stories.jsonl")]
        print(f"writing the embedded corpus to {files[0]}", flush=True)
        with locked(Path(f"{files[0]}.lock"), files[0]):
            write_corpus(files[0])
    else:
        files = []
    files += find_inputs(args.inputs)
    for line in describe_texts(files):
        print(line)
    return files


def main() -> None:
    args, start = parse_arguments(), time.perf_counter()
    files = get_files(args)
    args.text_key = args.text_key or "story_zh"
    suffix = "_sft" if args.task == "sft" else ""
    out_dir = args.out_dir or Path("data", (args.download or "demo") + suffix)
    with locked(Path(f"{os.path.abspath(out_dir)}.lock"), out_dir):
        meta = prepare(files, out_dir, args)
    for split in ("train", "val"):
        c, unit = meta[split], "examples" if args.task == "sft" else "stories"
        print(
            f"{out_dir}/{split}.bin: {c['stories']:,} {unit}, {c['characters']:,} characters, {c['tokens']:,} tokens "
            f"({c['characters'] / c['tokens']:.2f} characters a token)"
        )
    print("read: " + ", ".join(f"{n:,} of {form}" for form, n in meta["forms"].items()))
    if meta["tokenizer_losses"]["changed"]:
        print(f"{args.tokenizer}: {LossyTokens(**meta['tokenizer_losses'])}")
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in meta["dropped"].items())
    print(f"dropped: {reasons}; {time.perf_counter() - start:.1f} s in all")


if __name__ == "__main__":
    run(main)
