"""Turn stories into tokens: read, clean, drop duplicates, train a tokenizer, write token files.

    python prepare.py                                                      the embedded corpus -> data/demo
    python prepare.py stories.jsonl more/ --out_dir data/mine
    python prepare.py --download tinystories-zh --out_dir data/microstories
    python prepare.py --task sft --tokenizer data/demo/tokenizer.model     instructions -> data/demo_sft

Writes into out_dir, which appears complete or not at all:
    train.bin, val.bin   little-endian uint16 token ids, each story followed by the end token; for --task sft
                         each story preceded by its instruction, both after their control tokens
    tokenizer.model      the SentencePiece tokenizer
    meta.json            counts, checksums and settings

Token ids are uint16 because a vocabulary has at most 65,536 pieces: half the disk and memory of int32.
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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from common.files import (
    Parser,
    UserError,
    atomic_write,
    load_tokenizer,
    locked,
    report_errors,
    resolve_folder,
    sync_folder,
    usable_cores,
)
from stories.constraints import CONTROL_TOKENS, NAMES, TEMPLATE, template_tokens
from stories.download import DATASETS, download
from stories.generate import write_corpus
from stories.read import LONGEST, Block, LeftOut, describe_texts, find_inputs, read_blocks, records_of
from stories.records import clean_texts, examples_of, story_of, text_digest

SAMPLE = 8_000_000  # characters to train the tokenizer on, at most
MADE = {"train.bin", "val.bin", "tokenizer.model", "meta.json"}
DIGESTS = 2**64  # text_digest is below this
WORKER_ENDED = "a worker process ended abruptly; the system's log (dmesg) may say why"
# What frames texts for other models. In a story it stays text, and is probably a mistake of the data.
CONTROL_LIKE = re.compile(
    r"[<\[]("  # one set of first characters is found fast
    r"\|[^<>|\s]{1,40}\|>|｜[^<>｜\s]{1,40}｜>"  # <|endoftext|>, <|im_end|>
    r"|/?(s|bos|eos|pad|unk|mask|sep|cls|sop|eop|start_of_turn|end_of_turn)>"
    r"|/?(INST|s?gMASK|sMASK|MASK|CLS|SEP|PAD|UNK|BOS|EOS)\]"
    r"|</?SYS>>)"
)


def prepare(files: list[Path], out_dir: Path, args: argparse.Namespace) -> dict:
    """Write out_dir from the files. Returns what meta.json holds. Raises UserError."""
    with replace_folder(out_dir) as folder:
        model = make_tokenizer(files, args)
        tokenizer = load_tokenizer(model, args.tokenizer or "the new tokenizer")
        if not args.tokenizer and tokenizer.vocab_size() < args.vocab_size:
            found = f"{tokenizer.vocab_size():,} of the {args.vocab_size:,} pieces asked for"
            print(f"the corpus fills only {found}")
        template = None
        prefixes: tuple[list[int], ...] = ([],)  # the control tokens before each part of a text
        if args.task == "sft":
            template = template_for(tokenizer)
            prefixes = template_tokens(template, tokenizer)
        counts = write_bins(files, folder, model, prefixes, args)
        check_counts(counts, files, args)
        meta = counts | {
            "vocab_size": tokenizer.vocab_size(),
            "end_token": tokenizer.eos_id(),
            "template": template,
            "tokenizer_sha256": hashlib.sha256(model).hexdigest(),
            "settings": vars(args),
        }
        write_file(folder / "tokenizer.model", model)
        write_file(folder / "meta.json", json.dumps(meta, indent=2, default=str).encode())
    return meta


# ---- A folder that appears complete or not at all --------------------------------------------------


@contextlib.contextmanager
def replace_folder(folder: Path):
    """A new folder beside `folder` that takes its name when the body ends, or vanishes if the body fails.

    Raises UserError if one of the folders holds other files than those that prepare.py writes.
    """
    new = Path(f"{folder}.tmp")
    old = Path(f"{folder}.old")
    for present in (folder, new, old):
        check_made_here(present)
    if old.exists() and not folder.exists():  # a run was killed between the two renames
        os.replace(old, folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_made_here(folder: Path) -> None:
    """Raise a UserError if a folder holds files that prepare.py did not write."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.name.removesuffix(".tmp") not in MADE:
            message = f"holds {path.name}, which prepare.py did not make; choose another --out_dir"
            raise UserError(f"{folder}: {message}")


def write_file(path: Path, data: bytes) -> None:
    with atomic_write(path) as f:
        f.write(data)


# ---- The tokenizer ---------------------------------------------------------------------------------


def make_tokenizer(files: list[Path], args: argparse.Namespace) -> bytes:
    """The file given with --tokenizer, or a new tokenizer trained on the stories. Raises UserError."""
    if args.tokenizer:
        return args.tokenizer.read_bytes()
    with worker_processes(args.workers) as workers:
        texts = sample_stories(workers, files, args)
        characters = sum(len(text) for text in texts)
        print(f"training a tokenizer on {characters:,} characters", flush=True)
        # In a worker process, whose memory is free again when it ends.
        send_call(workers[0], train_tokenizer, texts, args.vocab_size)
        return receive_result(workers[0])


def sample_stories(workers: list, files: list[Path], args: argparse.Namespace) -> list[str]:
    """About SAMPLE characters of training stories, a fair sample of all files whatever their order and size.

    The sample is the stories whose digest is at least a limit, at first all that are not held out. Whenever
    they are too many, the range above the limit is halved. Raises UserError if there are none.
    """
    limit = int(args.val_fraction * DIGESTS)
    sample: dict[int, str] = {}
    blocks = read_blocks(files, "reading", name_unread=False)
    for stories in in_order(workers, stories_by_digest, blocks, args):
        for digest, story in stories.items():
            if digest >= limit:
                sample[digest] = story
        while sum(map(len, sample.values())) > SAMPLE:
            limit += (DIGESTS - limit) // 2
            sample = {digest: story for digest, story in sample.items() if digest >= limit}
    if not sample:
        raise UserError(f"{files[0]}: no stories found, or --val_fraction leaves none to train on")
    return [sample[digest] for digest in sorted(sample)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-fallback BPE (Sennrich et al. 2016, arXiv:1508.07909). Returns the model file.

    Raises UserError.
    """
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
            minloglevel=2,  # errors only
        )
    except RuntimeError as e:
        message = str(e)
        reason = message.rpartition("] ")[2]
        too_small = re.search(r"required_chars\. \d+ vs (\d+)", message)
        if too_small:
            reason = f"too small for the characters of these stories; at least {too_small[1]} is needed"
        raise UserError(f"--vocab_size {vocab_size}: {reason}") from None
    return model.getvalue()


def template_for(tokenizer) -> str:
    """TEMPLATE; for a tokenizer without our control tokens, a template with its own begin token.

    Raises UserError.
    """
    if all(tokenizer.is_control(tokenizer.piece_to_id(piece)) for piece in CONTROL_TOKENS):
        return TEMPLATE
    if tokenizer.bos_id() < 0 or not tokenizer.is_control(tokenizer.bos_id()):
        raise UserError("this tokenizer has no control token that could mark where an instruction ends")
    return "{instruction}" + tokenizer.id_to_piece(tokenizer.bos_id()) + "{response}"


# ---- The token files -------------------------------------------------------------------------------


def write_bins(
    files: list[Path], folder: Path, model: bytes, prefixes: tuple, args: argparse.Namespace
) -> dict:
    """Write the texts of the files to train.bin and val.bin, each text once. Returns what was counted.

    The digest of its story decides a text's split, whatever the order of files.
    """
    border = int(args.val_fraction * DIGESTS)
    seen: set[int] = set()  # digests of the texts written
    dropped = Counter(duplicate=0, empty=0, not_unicode=0, unencodable=0)
    counts = {split: Counter(stories=0, tokens=0, characters=0, bytes=0) for split in ("train", "val")}
    checksums = {split: hashlib.sha256() for split in counts}
    remarks: Counter[str] = Counter()  # how many texts each remark is made of
    examples: dict[str, str] = {}  # the first example of each remark
    total = 0
    with (
        worker_processes(args.workers) as workers,
        atomic_write(folder / "train.bin") as train_file,
        atomic_write(folder / "val.bin") as val_file,
    ):
        outputs = {"train": train_file, "val": val_file}
        blocks = read_blocks(files, "encoding")
        for texts, left_out in in_order(workers, encode_block, blocks, model, prefixes, args):
            dropped.update(left_out)
            for text in texts:
                total += 1
                for remark, example in text.remarks.items():
                    remarks[remark] += 1
                    examples.setdefault(remark, example)
                if text.digest in seen:
                    dropped["duplicate"] += 1
                    continue
                seen.add(text.digest)
                split = "train"
                if text.story_digest < border:
                    split = "val"
                outputs[split].write(text.tokens)
                checksums[split].update(text.tokens)
                counts[split]["stories"] += 1
                counts[split]["tokens"] += len(text.tokens) // 2
                counts[split]["characters"] += text.characters
                counts[split]["bytes"] += text.utf8_bytes
    if remarks["control"]:
        print(
            f"{remarks['control']:,} texts spell a control token, which stays text: {examples['control']!r}"
        )
    changes = ""
    if remarks["changed"]:
        share = remarks["changed"] / total
        changes = f"{args.tokenizer}: changes {remarks['changed']:,} of {total:,} texts ({share:.2%})"
        changes += f": {examples['changed']}"
    # Only now: a share of the first texts would depend on their order.
    if remarks["changed"] > 10 + 0.01 * total and not args.allow_lossy_tokenizer:
        raise UserError(f"{changes}; use another tokenizer, or accept this with --allow_lossy_tokenizer")
    found = {split: dict(counts[split], sha256=checksums[split].hexdigest()) for split in counts}
    return found | {"dropped": dropped, "tokenizer_changes": changes}


def check_counts(counts: dict, files: list[Path], args: argparse.Namespace) -> None:
    """Raise a UserError if there is nothing to write, or if most instructions had to be left out."""
    written = counts["train"]["stories"] + counts["val"]["stories"]
    duplicates = counts["dropped"]["duplicate"]
    left_out = {reason: n for reason, n in counts["dropped"].items() if n and reason != "duplicate"}
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
    if not written:
        raise UserError(f"{files[0]}: no stories found ({reasons or 'the input is empty'})")
    if args.task == "sft" and sum(left_out.values()) > written + duplicates:
        raise UserError(f"{files[0]}: more than half of the records cannot be used ({reasons})")
    for split in ("train", "val"):
        if not counts[split]["stories"]:
            problem = f"leaves no story for the {split} split; change it, or add stories"
            raise UserError(f"--val_fraction {args.val_fraction}: {problem}")


# ---- How a story is read back ----------------------------------------------------------------------


def first_story(folder: Path, end_token: int) -> list[int]:
    """The token ids of the first story of train.bin, up to its end token.

    np.memmap reads only what is used, so that a file may be larger than memory. The next story begins behind
    the end token; train.py cuts the file into sequences of block_size without looking at these borders.
    """
    tokens = np.memmap(folder / "train.bin", dtype="<u2", mode="r")
    story = []
    for token in tokens:
        if token == end_token:
            break
        story.append(int(token))
    return story


def show_first_story(folder: Path) -> None:
    """Print how the first story stands in train.bin, and what it decodes to."""
    tokenizer = load_tokenizer((folder / "tokenizer.model").read_bytes(), folder)
    end_token = tokenizer.eos_id()
    story = first_story(folder, end_token)
    pieces = [f"{tokenizer.id_to_piece(token)} {token}" for token in story[:20]]
    print(f"train.bin begins with {len(story):,} tokens, then the end token {end_token}")
    print(f"  first pieces and their ids: {' | '.join(pieces)}")
    print(f"  decoded: {decode_with_control_tokens(tokenizer, story)[:500]}")


def decode_with_control_tokens(tokenizer, tokens: list[int]) -> str:
    """The text of tokens, with the control tokens, which tokenizer.decode leaves out."""
    text = ""
    run: list[int] = []  # tokens since the last control token
    for token in tokens:
        if tokenizer.is_control(token):
            text += tokenizer.decode(run) + tokenizer.id_to_piece(token)
            run = []
        else:
            run.append(token)
    return text + tokenizer.decode(run)


# ---- Worker processes: a block of input at a time --------------------------------------------------


@contextlib.contextmanager
def worker_processes(number: int):
    """Start processes that call the functions they are sent. Yields the pipe to each.

    No two share a pipe: if one is killed, its pipe ends, and none of the others waits for it.
    """
    processes = []
    pipes = []
    try:
        for _ in range(number):
            pipe, end_of_worker = multiprocessing.Pipe()
            process = multiprocessing.Process(target=work, args=(end_of_worker,))
            process.start()
            end_of_worker.close()  # from here on only the worker has it
            processes.append(process)
            pipes.append(pipe)
        yield pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def work(pipe) -> None:
    """In a worker process: call each function that is sent, and send back what it returns or raises."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=exit_with_parent, daemon=True).start()
    while True:
        function, arguments = pipe.recv()
        try:
            result = function(*arguments)
        except (UserError, MemoryError) as e:
            result = e
        pipe.send(result)


def exit_with_parent() -> None:
    """Wait until the parent process ends, also if it is killed, then end this one."""
    parent = multiprocessing.parent_process()
    assert parent  # this is a worker
    parent.join()
    os._exit(1)


def send_call(pipe, function, *arguments) -> None:
    """Let the worker at the other end call function(*arguments). Raises UserError."""
    try:
        pipe.send((function, arguments))
    except OSError:
        raise UserError(WORKER_ENDED) from None


def receive_result(pipe):
    """What the function that was sent last returns; raises what it raises, or a UserError."""
    try:
        result = pipe.recv()
    except (EOFError, OSError):
        raise UserError(WORKER_ENDED) from None
    if isinstance(result, Exception):
        raise result
    return result


def in_order(workers: list, function, blocks, *arguments):
    """The results of function(block, *arguments) for each block, in order: the workers take turns.

    A worker has one block at a time, so that memory does not grow with the input.
    """
    busy: deque = deque()  # the workers that compute, the one with the oldest block first
    for block in blocks:
        if len(busy) < len(workers):
            worker = workers[len(busy)]
        else:
            worker = busy.popleft()
            yield receive_result(worker)
        send_call(worker, function, block, *arguments)
        busy.append(worker)
    for worker in busy:
        yield receive_result(worker)


def stories_by_digest(block: Block, args: argparse.Namespace) -> dict[int, str]:
    """The stories of a block."""
    texts, _ = read_texts(block, args)
    stories = {}
    for text in texts:
        story = text[-1]
        stories[text_digest(story)] = story
    return stories


def read_texts(block: Block, args: argparse.Namespace) -> tuple[list[tuple[str, ...]], Counter[str]]:
    """The cleaned texts of a block: a story each; for --task sft, an instruction and a story.

    The second result counts the records that are left out, by reason.
    """
    texts: list[tuple[str, ...]] = []
    left_out: Counter[str] = Counter()
    for where, record in records_of(block):
        try:
            if args.task == "sft":
                examples = examples_of(record, where, args.text_key, args.augment)
                texts += [clean_texts(example) for example in examples]
            else:
                story = story_of(record, where, args.text_key)
                texts.append(clean_texts((story,)))
        except LeftOut as reason:
            left_out[str(reason)] += 1
    return texts, left_out


@dataclass
class EncodedText:
    """A story, or an instruction and its story, as it stands in a token file."""

    digest: int
    story_digest: int  # of the story alone
    tokens: bytes  # uint16
    characters: int
    utf8_bytes: int
    remarks: dict[str, str]  # what the report should count, with an example


cached_tokenizer = functools.cache(load_tokenizer)  # a worker gets the same bytes with every block


def encode_block(
    block: Block, model: bytes, prefixes: tuple[list[int], ...], args: argparse.Namespace
) -> tuple[list[EncodedText], Counter[str]]:
    """Clean and encode the texts of a block. Also counts the records that are left out, by reason."""
    tokenizer = cached_tokenizer(model, "tokenizer")
    texts, left_out = read_texts(block, args)
    # Only a given tokenizer is checked: a new one changes nothing (see train_tokenizer).
    encoded = [encode(text, tokenizer, prefixes, check=bool(args.tokenizer)) for text in texts]
    return encoded, left_out


def encode(text: tuple[str, ...], tokenizer, prefixes: tuple[list[int], ...], check: bool) -> EncodedText:
    """Encode the parts of a text, each after its control tokens, and the end token."""
    tokens: list[int] = []
    remarks = {}
    for prefix, part in zip(prefixes, text, strict=True):
        part_tokens = tokenizer.encode(part)
        tokens += prefix
        tokens += part_tokens
        control = CONTROL_LIKE.search(part)
        if control:
            remarks["control"] = control[0]
        if check and "changed" not in remarks:
            decoded = tokenizer.decode(part_tokens)
            if decoded != part:
                remarks["changed"] = difference(part, decoded)
    tokens.append(tokenizer.eos_id())
    return EncodedText(
        digest=text_digest(*text),
        story_digest=text_digest(text[-1]),
        tokens=np.array(tokens, "<u2").tobytes(),
        characters=sum(len(part) for part in text),
        utf8_bytes=sum(len(part.encode()) for part in text),
        remarks=remarks,
    )


def difference(text: str, decoded: str) -> str:
    """Where a text and what its tokens decode to differ first, which they must somewhere."""
    same = 0
    while text[same : same + 1] == decoded[same : same + 1]:
        same += 1
    around = slice(max(0, same - 4), same + 8)
    return f"{text[around]!r} becomes {decoded[around]!r}"


# ---- The command -----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Turn stories into tokens.", allow_abbrev=False)
    parser.add_argument(
        "inputs", type=Path, nargs="*", metavar="INPUT", help="files, folders, globs (default: ours)"
    )
    parser.add_argument(
        "--task", choices=("pretrain", "sft"), default="pretrain", help="stories, or instructions"
    )
    parser.add_argument(
        "--augment", type=int, default=1, help="sft: differently ordered instructions for a story"
    )
    parser.add_argument("--download", choices=DATASETS, help="fetch this dataset and prepare it")
    parser.add_argument("--out_dir", type=Path, help="default: data/demo, or data/ and the dataset's name")
    parser.add_argument(
        "--vocab_size", type=int, default=8192, help="pieces of the tokenizer (at most 65536)"
    )
    parser.add_argument("--tokenizer", type=Path, help="use this SentencePiece model instead of training one")
    parser.add_argument(
        "--allow_lossy_tokenizer", action="store_true", help="even if it changes over 1%% of the texts"
    )
    parser.add_argument("--val_fraction", type=float, default=0.01, help="share of the stories held out")
    parser.add_argument("--text_key", help="where a record has its story (default: story_zh)")
    parser.add_argument(
        "--workers", type=int, default=usable_cores(), help="processes (default: one for each core)"
    )
    args = parser.parse_args()
    if not 263 <= args.vocab_size <= 65536:
        raise UserError(
            f"--vocab_size {args.vocab_size}: must lie between 263 (every byte) and 65536 (uint16)"
        )
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction}: must lie between 0 and 1")
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    if args.augment < 1:
        raise UserError(f"--augment {args.augment}: must be at least 1")
    if args.task == "sft" and not args.tokenizer:
        missing = "--tokenizer is missing: instructions need the one of the model to be tuned"
        raise UserError(f"{missing}; for the demo --tokenizer data/demo/tokenizer.model")
    if args.inputs and not args.out_dir and not args.download:
        raise UserError("--out_dir is missing: where should the token files go? (for example data/mine)")
    if not args.out_dir:
        name = args.download or "demo"
        if args.task == "sft":
            name += "_sft"
        args.out_dir = Path("data", name)
    if not args.text_key:
        args.text_key = "story_zh"
        if args.download:
            args.text_key = DATASETS[args.download][2]
    return args


def get_files(args: argparse.Namespace) -> list[Path]:
    """The input files: those named, after a downloaded dataset; or the embedded corpus. Raises UserError."""
    if not args.inputs and not args.download:
        corpus = Path("data/stories.jsonl")
        print(f"writing the embedded corpus to {corpus}", flush=True)
        with locked(Path(f"{corpus}.lock"), corpus):
            write_corpus(corpus)
        return [corpus]
    files = []
    if args.download:
        files.append(download(args.download, Path("data/downloads")))
    return files + find_inputs(args.inputs)


def main() -> None:
    started = time.perf_counter()
    args = parse_arguments()
    out_dir = resolve_folder(args.out_dir)
    with locked(Path(f"{out_dir}.lock"), args.out_dir):
        files = get_files(args)
        for line in describe_texts(files):
            print(line)
        meta = prepare(files, out_dir, args)
        for split in ("train", "val"):
            count = meta[split]
            unit = "examples" if args.task == "sft" else "stories"
            size = (
                f"{count['stories']:,} {unit}, {count['characters']:,} characters, {count['tokens']:,} tokens"
            )
            ratio = count["characters"] / count["tokens"]
            print(f"{args.out_dir}/{split}.bin: {size} ({ratio:.2f} characters a token)")
        if meta["tokenizer_changes"]:
            print(meta["tokenizer_changes"])
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in meta["dropped"].items())
        print(f"dropped: {reasons}; {time.perf_counter() - started:.1f} s in all")
        show_first_story(out_dir)


if __name__ == "__main__":
    report_errors(main)
