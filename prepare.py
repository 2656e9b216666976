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
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from common.files import Parser, UserError, atomic_write, load_tokenizer, locked, report_errors, sync_folder
from stories.constraints import CONTROL_TOKENS, NAMES, TEMPLATE, template_tokens
from stories.download import DATASETS, download
from stories.generate import write_corpus
from stories.read import LONGEST, LeftOut, describe_texts, find_inputs, read_blocks, records_of
from stories.records import clean_texts, examples_of, story_of, text_digest

SAMPLE = 8_000_000  # characters to train the tokenizer on, at most
CORES = min(os.cpu_count() or 1, 61)  # Windows allows 61 worker processes
NEEDED = "0.2.3"  # an older sentencepiece aborts while it trains some tokenizers


# ---- Cleaning and encoding, in worker processes, a block of input at a time ------------------------


def read_texts(block: tuple, args: argparse.Namespace) -> tuple[list[tuple[str, ...]], Counter[str]]:
    """The cleaned texts of a block: a story each; for --task sft, an instruction and a story.

    The second result counts the records that are left out, by reason.
    """
    found, dropped = list[tuple[str, ...]](), Counter[str]()
    for where, record in records_of(block):
        try:
            if args.task == "sft":
                examples = examples_of(record, where, args.text_key, args.augment)
                found += [clean_texts(texts) for texts in examples]
            else:
                found.append(clean_texts((story_of(record, where, args.text_key),)))
        except LeftOut as reason:
            dropped[str(reason)] += 1
    return found, dropped


def sample_block(block: tuple, args: argparse.Namespace, limit: int) -> dict[int, str]:
    """{digest: story} of the stories of a block whose digest is at least the limit."""
    texts, _ = read_texts(block, args)
    return {digest: story for *_, story in texts if (digest := text_digest(story)) >= limit}


class EncodedText(NamedTuple):
    """A story, or an instruction and its story, as it stands in a token file."""

    digest: int
    story_digest: int  # of the story alone
    tokens: bytes  # uint16
    characters: int
    utf8_bytes: int
    change: str  # what the tokenizer does to the text, which should be nothing


def change_in(text: str, decoded: str) -> str:
    """Where a text and what its tokens decode to differ first; "" if they do not."""
    if text == decoded:
        return ""
    at = next((i for i in range(len(decoded)) if text[i : i + 1] != decoded[i]), len(decoded))
    around = slice(max(0, at - 4), at + 8)
    return f"{text[around]!r} becomes {decoded[around]!r}"


cached_tokenizer = functools.cache(load_tokenizer)  # a worker gets the same bytes with every block


def encode_block(block: tuple, args, model: bytes, frames) -> tuple[list[EncodedText], Counter[str]]:
    """Clean and encode the texts of a block. `frames` holds the control tokens before each part of a text."""
    tokenizer, encoded = cached_tokenizer(model, "tokenizer"), []
    found, dropped = read_texts(block, args)
    for texts in found:
        ids, change = list[int](), ""
        for frame, text in zip(frames, texts, strict=True):
            part = tokenizer.encode(text)
            ids += [*frame, *part]
            if args.tokenizer:  # a new tokenizer is one that changes nothing (see train_tokenizer)
                change = change or change_in(text, tokenizer.decode(part))
        tokens = np.array([*ids, tokenizer.eos_id()], "<u2").tobytes()
        size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
        encoded.append(EncodedText(text_digest(*texts), text_digest(texts[-1]), tokens, *size, change))
    return encoded, dropped


def exit_with(parent) -> None:
    """Wait until the parent process ends, then end this one."""
    parent.join()
    os._exit(1)


def start_worker() -> None:
    """Initialise a worker process: it ends with its parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def in_order(workers: ProcessPoolExecutor, function, calls):
    """The results of function(*arguments) for each of `calls`, in order. Raises UserError if a worker dies.

    Only a few calls are read ahead, so that memory does not grow with the input.
    """
    waiting, processes = deque[Future](), set()
    try:
        for arguments in calls:
            waiting.append(workers.submit(function, *arguments))
            processes.update(multiprocessing.active_children())
            if len(waiting) > 2 * CORES:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        workers.shutdown()  # which sends SIGTERM to those that still live, and waits
        raise UserError(dead_worker([process.exitcode for process in processes])) from None


def dead_worker(exit_codes: list[int | None]) -> str:
    """What is known of a worker process that ended without an error of its own, given the exit codes of all."""
    message, version = "a worker process ended abruptly", sentencepiece.__version__
    for code in exit_codes:
        if code and code != -signal.SIGTERM:
            message += f", by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f", with exit status {code}"
            break
    if [*map(int, re.findall(r"\d+", version)[:3])] < [*map(int, NEEDED.split("."))]:
        message += f"; sentencepiece is {version}: pip install 'sentencepiece>={NEEDED}'"
    return message


# ---- The tokenizer ---------------------------------------------------------------------------------


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


def sample_stories(workers: ProcessPoolExecutor, files: list[Path], args: argparse.Namespace) -> list[str]:
    """About SAMPLE characters of training stories, a fair sample of all files whatever their order and size.

    The sample is the stories whose digest is at least a limit, at first all that are not held out. Whenever they
    are too many, the range above the limit is halved. Raises UserError if there are none.
    """
    sample, limit = dict[int, str](), int(args.val_fraction * 2**64)
    calls = ((block, args, limit) for block in read_blocks(files, "reading"))
    for found in in_order(workers, sample_block, calls):
        sample |= {n: story for n, story in found.items() if n >= limit}
        while sum(map(len, sample.values())) > SAMPLE:
            limit += (2**64 - limit) // 2
            sample = {n: story for n, story in sample.items() if n >= limit}
    if not sample:
        raise UserError(f"{files[0]}: no stories found, or --val_fraction leaves none to train on")
    return [sample[n] for n in sorted(sample)]


def make_tokenizer(files: list[Path], args: argparse.Namespace) -> bytes:
    """The file given with --tokenizer, or a new tokenizer trained on the stories. Raises UserError."""
    if args.tokenizer:
        return args.tokenizer.read_bytes()
    with ProcessPoolExecutor(args.workers, None, start_worker) as workers:
        texts = sample_stories(workers, files, args)
        print(f"training a tokenizer on {sum(map(len, texts)):,} characters", flush=True)
        # In a worker process, whose memory is free again when it ends.
        (model,) = in_order(workers, train_tokenizer, [(texts, args.vocab_size)])
    return model


# ---- From inputs to a folder -----------------------------------------------------------------------


def write_bins(blocks, folder: Path, args: argparse.Namespace) -> dict:
    """Write the texts of encoded blocks to train.bin and val.bin, each text once. Returns what was counted.

    The digest of its story decides a text's split, whatever the order of files. Raises UserError.
    """
    border, seen = int(args.val_fraction * 2**64), set[int]()
    dropped = Counter(duplicate=0, empty=0, not_unicode=0, unencodable=0)
    counts = {split: dict.fromkeys(("stories", "tokens", "characters", "bytes"), 0) for split in ("train", "val")}
    checksums = {split: hashlib.sha256() for split in counts}
    total, changed, example, changes = 0, 0, "", ""
    with atomic_write(folder / "train.bin") as train, atomic_write(folder / "val.bin") as val:
        for texts, dropped_of_block in blocks:
            dropped.update(dropped_of_block)
            for text in texts:
                total += 1
                changed += bool(text.change)
                example = example or text.change
                if text.digest in seen:
                    dropped["duplicate"] += 1
                    continue
                seen.add(text.digest)
                split = "val" if text.story_digest < border else "train"
                (val if split == "val" else train).write(text.tokens)
                checksums[split].update(text.tokens)
                count = counts[split]
                count["stories"] += 1
                count["tokens"] += len(text.tokens) // 2
                count["characters"] += text.characters
                count["bytes"] += text.utf8_bytes
            if changed:
                changes = f"{args.tokenizer}: changes {changed:,} of {total:,} texts ({changed / total:.2%}): {example}"
            if changed > 10 + 0.01 * total and not args.allow_lossy_tokenizer:
                raise UserError(f"{changes}; use another tokenizer, or accept this with --allow_lossy_tokenizer")
    splits = {split: counts[split] | {"sha256": checksums[split].hexdigest()} for split in counts}
    return splits | {"dropped": dropped, "tokenizer_changes": changes}


def check_counts(counts: dict, files: list[Path], args: argparse.Namespace) -> None:
    """Raise a UserError if there is nothing to write, or if most instructions had to be left out."""
    kept, dropped = counts["train"]["stories"] + counts["val"]["stories"], counts["dropped"]
    reasons = {reason: n for reason, n in dropped.items() if n and reason != "duplicate"}
    listed = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items())
    if not kept:
        raise UserError(f"{files[0]}: no stories found" + (f" ({listed})" if listed else ""))
    if args.task == "sft" and sum(reasons.values()) > kept + dropped["duplicate"]:
        raise UserError(f"{files[0]}: more than half of the records cannot be used ({listed})")
    for split in ("train", "val"):
        if not counts[split]["stories"]:
            left = f"leaves no story for the {split} split"
            raise UserError(f"--val_fraction {args.val_fraction}: {left}; change it, or add stories")


@contextlib.contextmanager
def replace_folder(folder: Path):
    """A new folder beside `folder` that takes its name when the body ends, or vanishes if the body fails.

    Raises UserError if one of the folders holds other files than those that prepare.py writes.
    """
    made = {"train.bin", "val.bin", "tokenizer.model", "meta.json"}
    final = Path(os.path.abspath(folder))
    new, old = (final.parent / f"{final.name}.{end}" for end in ("tmp", "old"))
    for present in (folder, new, old):
        if present.exists() and not {p.name.removesuffix(".tmp") for p in present.iterdir()} <= made:
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
    finally:
        shutil.rmtree(new, ignore_errors=True)


def template_for(tokenizer) -> str:
    """TEMPLATE; for a tokenizer without our control tokens, a template with its own begin token. Raises UserError."""
    if all(tokenizer.is_control(tokenizer.piece_to_id(piece)) for piece in CONTROL_TOKENS):
        return TEMPLATE
    if tokenizer.bos_id() < 0 or not tokenizer.is_control(tokenizer.bos_id()):
        raise UserError("this tokenizer has no control token that could mark where an instruction ends")
    return "{instruction}" + tokenizer.id_to_piece(tokenizer.bos_id()) + "{response}"


def prepare(files: list[Path], args: argparse.Namespace) -> dict:
    """Write args.out_dir from the files. Returns what meta.json holds. Raises UserError."""
    with replace_folder(args.out_dir) as folder:
        model = make_tokenizer(files, args)
        tokenizer = load_tokenizer(model, args.tokenizer or "the new tokenizer")
        if not args.tokenizer and tokenizer.vocab_size() < args.vocab_size:
            print(f"the corpus fills only {tokenizer.vocab_size():,} of the {args.vocab_size:,} pieces asked for")
        template = template_for(tokenizer) if args.task == "sft" else None
        frames = template_tokens(template, tokenizer) if template else ([],)
        with ProcessPoolExecutor(args.workers, None, start_worker) as workers:
            calls = ((block, args, model, frames) for block in read_blocks(files, "encoding"))
            counts = write_bins(in_order(workers, encode_block, calls), folder, args)
        check_counts(counts, files, args)
        meta = counts | {
            "vocab_size": tokenizer.vocab_size(),
            "end_token": tokenizer.eos_id(),
            "template": template,
            "tokenizer_sha256": hashlib.sha256(model).hexdigest(),
            "settings": vars(args),
        }
        for name, data in (("tokenizer.model", model), ("meta.json", json.dumps(meta, indent=2, default=str).encode())):
            with atomic_write(folder / name) as f:
                f.write(data)
    return meta


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Turn stories into tokens.", allow_abbrev=False)
    parser.add_argument("inputs", type=Path, nargs="*", metavar="INPUT", help="files, folders, globs (default: ours)")
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
    suffix = "_sft" if args.task == "sft" else ""
    args.out_dir = args.out_dir or Path("data", (args.download or "demo") + suffix)
    args.text_key = args.text_key or (DATASETS[args.download][2] if args.download else "story_zh")
    return args


def get_files(args: argparse.Namespace) -> list[Path]:
    """The input files: those named, after a downloaded dataset; or the embedded corpus. Raises UserError."""
    files = [download(args.download, Path("data/downloads"))] if args.download else []
    if not args.inputs and not args.download:
        files = [Path("data/stories.jsonl")]
        print(f"writing the embedded corpus to {files[0]}", flush=True)
        with locked(Path(f"{files[0]}.lock"), files[0]):
            write_corpus(files[0])
    return files + find_inputs(args.inputs)


def main() -> None:
    args, start = parse_arguments(), time.perf_counter()
    files = get_files(args)
    for line in describe_texts(files):
        print(line)
    with locked(Path(f"{os.path.abspath(args.out_dir)}.lock"), args.out_dir):
        meta = prepare(files, args)
    for split in ("train", "val"):
        c, unit = meta[split], "examples" if args.task == "sft" else "stories"
        print(
            f"{args.out_dir}/{split}.bin: {c['stories']:,} {unit}, {c['characters']:,} characters, {c['tokens']:,} "
            f"tokens ({c['characters'] / c['tokens']:.2f} characters a token)"
        )
    if meta["tokenizer_changes"]:
        print(meta["tokenizer_changes"])
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in meta["dropped"].items())
    print(f"dropped: {reasons}; {time.perf_counter() - start:.1f} s in all")


if __name__ == "__main__":
    report_errors(main)
