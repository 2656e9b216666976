"""Turn stories into tokens: read, clean, drop duplicates, train a tokenizer, write token files.

    python prepare.py                                       the embedded corpus, into data/demo
    python prepare.py stories.jsonl more/ --out_dir data/mine
    python prepare.py --download tinystories-zh --out_dir data/microstories
    python prepare.py --task sft --tokenizer data/demo/tokenizer.model          instructions, into data/demo_sft

Writes into out_dir, which appears whole or not at all:
    train.bin, val.bin   little-endian uint16 token ids, each story followed by the end token; for --task sft
                         each story preceded by its instruction, both framed by control tokens
    tokenizer.model      the SentencePiece tokenizer
    meta.json            what was counted, and the settings
"""

import argparse
import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from disk import locked, replacing, sync_folder
from errors import Parser, UserError, run
from instructions import examples_of, markers, template_for
from stories.download import DATASETS, download
from stories.generate import write_corpus
from stories.read import find_inputs, items_of, read_blocks, story_of
from tokenizer import load_tokenizer, train_tokenizer

SAMPLE = 8_000_000  # characters the tokenizer is trained on at most


# ---------------------------------------------------------------------------------------------------
# Cleaning. This and the encoding run in worker processes, a block at a time.


def clean(text: str) -> str:
    """Unicode NFC, line ends as \\n, no space around. Raises UnicodeEncodeError for half a character."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    text.encode()  # JSON can spell half of a surrogate pair, which is no text
    return text


def texts_of(record, where: str, args: argparse.Namespace) -> Sequence[tuple[str, ...]]:
    """What of a record becomes tokens: its story; or, for --task sft, pairs of an instruction and a story."""
    if args.task == "sft":
        return examples_of(record, where, args.text_key, args.augment)
    return [(story_of(record, where, args.text_key),)]


def clean_block(block: tuple, extract) -> tuple[list[tuple[str, ...]], collections.Counter]:
    """The cleaned texts of a block, the story last in each, and how many were dropped for which reason."""
    kept, dropped = [], collections.Counter[str]()
    for texts in items_of(block, extract):
        try:
            texts = tuple(map(clean, texts))
        except UnicodeEncodeError:
            dropped["not_unicode"] += 1
            continue
        if not all(texts):
            dropped["empty"] += 1
        elif any("\u2581" in text for text in texts):  # SentencePiece writes a space as this character: it
            dropped["unencodable"] += 1  # would come back as one
        else:
            kept.append(texts)
    return kept, dropped


def digest(*texts: str) -> int:
    """A number below 2**64, as if drawn at random, that never changes for a text, or a pair: it tells duplicates,
    and decides the split. (That any two of 4 million texts share one has a chance of 1 in 2 million.)"""
    lengths = [str(len(text)) for text in texts[:-1]]  # where one ends and the next begins
    hashed = hashlib.blake2b("".join([*lengths, *texts]).encode(), digest_size=16, key=b"split 1337").digest()
    return int.from_bytes(hashed[:8], "big")


def sample_block(block_and_limit: tuple, extract) -> dict[int, str]:
    """The stories of a block whose digest lies at the limit or above it, by digest."""
    block, limit = block_and_limit
    return {n: story for *_, story in clean_block(block, extract)[0] if (n := digest(story)) >= limit}


tokenizer: sentencepiece.SentencePieceProcessor  # start_worker sets these two, in each worker process
frames: Sequence[list[int]]


def encode_block(block: tuple, extract) -> tuple:
    """Returns digests, places, lengths in tokens, characters and bytes, all tokens, and what was dropped."""
    texts, dropped = clean_block(block, extract)
    encoded = [tokenizer.encode(list(part)) for part in zip(*texts, strict=True)]  # instructions and stories
    flat, ids = itertools.chain.from_iterable, []
    for parts in zip(*encoded, strict=True):
        ids.append([*flat(flat(zip(frames, parts, strict=True))), tokenizer.eos_id()])
    lengths = [
        (len(i), sum(map(len, t)), sum(len(part.encode()) for part in t)) for i, t in zip(ids, texts, strict=True)
    ]
    return (
        np.array([digest(*t) for t in texts], dtype=np.uint64),
        np.array([digest(t[-1]) for t in texts], dtype=np.uint64),
        np.array(lengths, dtype=np.int64).reshape(-1, 3),
        np.fromiter(flat(ids), dtype=np.uint16),
        dropped,
    )


def end_with(parent) -> None:
    """Wait for another process to end, and end this one then."""
    parent.join()
    os._exit(1)


def start_worker(model: bytes = b"", before: Sequence[list[int]] = ()) -> None:
    """In each worker process, once: end with the parent, leave Ctrl-C to it, take the tokenizer and the
    control tokens that stand before each part of a text."""
    global tokenizer, frames
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    if model:
        tokenizer, frames = sentencepiece.SentencePieceProcessor(model_proto=model), before


def in_order(workers: concurrent.futures.Executor, function, blocks, *args):
    """Like workers.map, but reads only a few blocks ahead, so that memory stays flat."""
    waiting = collections.deque[concurrent.futures.Future]()
    for block in blocks:
        waiting.append(workers.submit(function, block, *args))
        if len(waiting) > 2 * (os.cpu_count() or 1):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ---------------------------------------------------------------------------------------------------
# From inputs to a folder


def checksum(meta: dict) -> str:
    """Of what meta.json holds beside this checksum."""
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def write_bins(results, folder: Path, val_fraction: float) -> dict:
    """Write the encoded stories to train.bin and val.bin, each story once; return the counts."""
    border = np.uint64(val_fraction * 2**64)
    counts = {split: np.zeros(4, int) for split in ("train", "val")}
    sums = {split: hashlib.sha256() for split in ("train", "val")}
    dropped = collections.Counter[str]()
    seen: list[np.ndarray] = []  # the digests so far, in sorted arrays: a set would take 15 times as much
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for digests, places, sizes, tokens, block_dropped in results:
            dropped += block_dropped
            found, first = np.unique(digests, return_index=True)
            known = np.zeros(len(found), dtype=bool)
            for past in seen:
                known |= past[np.searchsorted(past, found).clip(max=len(past) - 1)] == found
            new = np.zeros(len(digests), dtype=bool)
            new[first[~known]] = True
            seen += [found[~known]] if new.any() else []
            while len(seen) > 1 and len(seen[-2]) < 2 * len(seen[-1]):  # so there are never many of them
                seen.append(np.sort(np.concatenate((seen.pop(), seen.pop()))))
            dropped["duplicate"] += int((~new).sum())
            in_val = places < border
            for split, file, chosen in (("train", train, new & ~in_val), ("val", val, new & in_val)):
                data = tokens[np.repeat(chosen, sizes[:, 0])].astype("<u2").tobytes()
                file.write(data)
                sums[split].update(data)
                counts[split] += (chosen.sum(), *sizes[chosen].sum(axis=0))
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())
    names = ("stories", "tokens", "characters", "bytes")
    result = {
        split: dict(zip(names, map(int, counts[split]), strict=True)) | {"sha256": sums[split].hexdigest()}
        for split in counts
    }
    return result | {"dropped": {k: dropped[k] for k in ("duplicate", "empty", "not_unicode", "unencodable")}}


def prepare(files: list[Path], out_dir: Path, args: argparse.Namespace) -> dict:
    """Do all the work into a folder beside out_dir and rename it. Returns what meta.json holds."""
    extract = functools.partial(texts_of, args=args)
    made = {"train.bin", "val.bin", "tokenizer.model", "meta.json"}
    final = Path(os.path.abspath(out_dir))
    beside, old = (final.parent / f"{final.name}.{end}" for end in ("tmp", "old"))
    for folder in (out_dir, beside, old):
        if folder.exists() and not {p.name for p in folder.iterdir()} <= made:
            raise UserError(f"{folder}: holds files that prepare.py did not make; choose another --out_dir")
    if old.exists() and not final.exists():  # stopped between the two renames
        os.replace(old, final)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        if args.tokenizer:
            model = args.tokenizer.read_bytes()
            load_tokenizer(model, args.tokenizer)
        else:
            with concurrent.futures.ProcessPoolExecutor(args.workers, None, start_worker) as workers:
                # The sample is the stories whose digest lies above a limit: at first all that are not held
                # out. Halving the room above it whenever they grow too many leaves a fair draw from all
                # files, whatever their order and size.
                sample, limit = dict[int, str](), int(args.val_fraction * 2**64)
                blocks = ((block, limit) for block in read_blocks(files, extract, "reading"))
                for found in in_order(workers, sample_block, blocks, extract):
                    sample |= {n: story for n, story in found.items() if n >= limit}
                    while sum(map(len, sample.values())) > SAMPLE:
                        limit += (2**64 - limit) // 2
                        sample = {n: story for n, story in sample.items() if n >= limit}
                if not sample:
                    raise UserError(f"{files[0]}: no stories found, or --val_fraction leaves none to train on")
                print(f"training a tokenizer on {sum(map(len, sample.values())):,} characters", flush=True)
                # In a worker, so that the memory it takes is given back.
                texts = [sample[n] for n in sorted(sample)]
                model = workers.submit(train_tokenizer, texts, args.vocab_size).result()
            del sample, texts
        trained = load_tokenizer(model, args.tokenizer or "the new tokenizer")
        if not args.tokenizer and trained.vocab_size() < args.vocab_size:
            print(f"the corpus fills only {trained.vocab_size():,} of the {args.vocab_size:,} pieces asked for")
        template = template_for(trained) if args.task == "sft" else None
        before = markers(template, trained) if template else ([],)
        with concurrent.futures.ProcessPoolExecutor(args.workers, None, start_worker, (model, before)) as workers:
            blocks = read_blocks(files, extract, "encoding")
            meta = write_bins(in_order(workers, encode_block, blocks, extract), beside, args.val_fraction)
        if not meta["train"]["stories"] + meta["val"]["stories"]:
            raise UserError(f"{files[0]}: no stories found")
        for split in ("train", "val"):
            if not meta[split]["stories"]:
                raise UserError(f"--val_fraction {args.val_fraction}: leaves no story for the {split} split")
        meta |= {"vocab_size": trained.vocab_size(), "end_token": trained.eos_id(), "template": template}
        meta |= {"tokenizer_sha256": hashlib.sha256(model).hexdigest()}
        meta |= {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}
        meta |= {"checksum": checksum(meta)}
        for name, data in (("tokenizer.model", model), ("meta.json", json.dumps(meta, indent=2).encode())):
            with replacing(beside / name) as f:
                f.write(data)
        if out_dir.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(beside, final)
        sync_folder(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        e.filename = e.filename or str(out_dir)  # a full disk does not say where
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return meta


def main() -> None:
    parser = Parser(description="Turn stories into tokens.", allow_abbrev=False)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="files, folders or globs (default: our own stories)")
    parser.add_argument("--task", choices=("pretrain", "sft"), default="pretrain", help="stories, or instructions")
    parser.add_argument("--augment", type=int, default=1, help="sft: differently ordered instructions for a story")
    parser.add_argument("--download", choices=DATASETS, help="fetch this dataset and prepare it")
    parser.add_argument("--out_dir", type=Path, help="default: data/demo, or data/ and the dataset's name")
    parser.add_argument("--vocab_size", type=int, default=8192, help="pieces of the tokenizer (at most 65536)")
    parser.add_argument("--tokenizer", type=Path, help="use this SentencePiece model instead of training one")
    parser.add_argument("--val_fraction", type=float, default=0.01, help="share of the stories held out")
    parser.add_argument("--text_key", help="where a record has its story (default: story_zh)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
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
    start = time.perf_counter()
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
    args.text_key = args.text_key or "story_zh"
    if args.inputs and not args.out_dir and not args.download:
        raise UserError("--out_dir is missing: where should the token files go? (for example data/mine)")
    suffix = "_sft" if args.task == "sft" else ""
    out_dir = args.out_dir or Path("data", (args.download or "demo") + suffix)
    with locked(Path(f"{os.path.abspath(out_dir)}.lock"), out_dir):
        meta = prepare(files, out_dir, args)
    for split in ("train", "val"):
        c, things = meta[split], "examples" if args.task == "sft" else "stories"
        print(
            f"{out_dir}/{split}.bin: {c['stories']:,} {things}, {c['characters']:,} characters, {c['tokens']:,} tokens "
            f"({c['characters'] / c['tokens']:.2f} characters a token)"
        )
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in meta["dropped"].items())
    print(f"dropped: {reasons}; {time.perf_counter() - start:.1f} s in all")


if __name__ == "__main__":
    run(main)
