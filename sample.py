"""Tell stories from a checkpoint.

    python sample.py --ckpt out/demo
    python sample.py --ckpt out/demo --prompt 从前 --num 5 --temperature 1.0
    python sample.py --ckpt out/demo_sft --words 铲子,草地 --features 转折
    python sample.py --ckpt out/demo_sft --interactive

All stories are decoded as one batch with a key-value cache; the first streams to the terminal.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import build_model, read_checkpoint
from device import choose_device, compile_model
from errors import Parser, UserError, run
from instructions import NAMES, markers, write_constraints
from model import GPT
from prepare import clean
from tokenizer import load_tokenizer

SLOTS = 64  # the cache grows by this many: it is copied seldom, and little of it is empty


def choose(logits, seen, temperature, top_k, top_p, repetition_penalty, generator) -> torch.Tensor:
    """Draw the next token of every row, (B,), from logits, (B, V). `seen`, (B, V): what has occurred.

    Only the top_k likeliest tokens (0: all) stay, and of these the fewest that hold top_p of the probability
    (Holtzman et al. 2020, arXiv:1904.09751).
    """
    if repetition_penalty != 1.0:  # Keskar et al. 2019, arXiv:1909.05858, section 4.1
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalized, logits)  # (B, V)
    if temperature == 0:
        return logits.argmax(dim=-1)  # (B,)
    k = min(top_k, logits.size(1)) or logits.size(1)
    values, tokens = (logits.float() / temperature).topk(k)  # (B, k), (B, k), the likeliest first
    p = values.softmax(dim=-1)  # (B, k)
    p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0)  # what stands before such a token holds top_p already
    # The largest of p / e, with e drawn from Exponential(1), is token i with probability p[i].
    noise = torch.empty_like(p).exponential_(generator=generator)  # (B, k)
    return tokens.gather(1, (p / noise).argmax(dim=-1, keepdim=True))[:, 0]  # (B,)


def prefill(model: GPT, prompts: list[list[int]], slots: int) -> tuple:
    """Read all prompts at once. Returns the last logits of each, (B, V), where these stand, (B,), which
    tokens have occurred, (B, V), and the cache, of `slots` positions."""
    device = model.embedding.weight.device
    # Shorter prompts are filled up on the right. The filling is never seen: a token looks only at
    # positions up to its own, and by then the row's own tokens have been written over it.
    longest = max(map(len, prompts))
    tokens = torch.tensor(
        [prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts], device=device
    )  # (B, T)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)  # (B,)
    positions = torch.arange(longest, device=device).expand_as(tokens)  # (B, T)
    cache = model.new_cache(len(prompts), slots, model.embedding.weight.dtype)
    logits = model(tokens, positions=positions, cache=cache, last=last)[:, 0]  # (B, V)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)  # (B, V)
    return logits, last, seen.scatter_(1, tokens, True), cache


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    end_token: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
    repetition_penalty: float = 1.0,
    seed: int = 1337,
    compile: bool = False,
):
    """Continue every prompt, all as one batch. Yields the next token of each row, (B,), step by step.

    Prompts may differ in length but none may be empty. A row goes on as end_token once it has ended.
    Stops when all have ended, after max_new_tokens, or when the longest row fills block_size.
    Compiling takes ten seconds first, on a GPU 25; a single row then takes a third of the time, on a GPU an eighth.
    """
    longest = max(map(len, prompts))
    end = min(longest + max_new_tokens, model.config.block_size)
    # A token is so little work for a GPU that starting its kernels takes longer than they do: "reduce-overhead"
    # records them once, as a CUDA graph, and starts them all together. A graph knows its tensors by address and
    # size: its cache has all its slots from the start. Else it grows, for empty slots take as long as filled ones.
    graph = compile and model.embedding.weight.is_cuda
    slots = math.ceil((end if graph else longest) / SLOTS) * SLOTS
    logits, last, seen, cache = prefill(model, prompts, slots)
    decode = model
    if compile:
        decode = compile_model(model, logits.device, "reduce-overhead" if graph else None)
        for keys_or_values in itertools.chain(*cache):
            if graph:
                torch._dynamo.mark_static_address(keys_or_values)
            else:
                torch._dynamo.mark_dynamic(keys_or_values, 2)  # one program for any number of slots
    seen[:, end_token] = False  # it begins every prompt; a story must be free to end
    generator = torch.Generator(logits.device).manual_seed(seed)
    ended = torch.zeros_like(last, dtype=torch.bool)  # (B,)
    for length in range(longest, end):
        token = choose(logits, seen, temperature, top_k, top_p, repetition_penalty, generator)  # (B,)
        token = torch.where(ended, end_token, token)  # (B,)
        yield token
        ended |= token == end_token
        if ended.all():
            return
        seen.scatter_(1, token[:, None], True)
        last = last + 1
        if length == slots:  # the cache is full
            slots += SLOTS
            for layer in cache:
                layer[:] = [F.pad(kv, (0, 0, 0, SLOTS)) for kv in layer]  # (B, K, S, D) each
        # Decode: one token a row, the cache standing for all before it.
        logits = decode(token[:, None], positions=last[:, None], cache=cache)[:, 0]  # (B, V)


def tell(model, tokenizer, prompt: list[int], num: int, write=None, **options) -> list[str]:
    """`num` stories that follow the tokens of `prompt`; what stands behind its last control token is their
    beginning. The first story is passed to `write` piece by piece, as it is made. Raises UserError."""
    if len(prompt) >= model.config.block_size:
        raise UserError(
            f"the prompt has {len(prompt):,} tokens, the model reads at most {model.config.block_size - 1:,}"
        )
    end = tokenizer.eos_id()
    begin = 1 + max(i for i, token in enumerate(prompt) if tokenizer.is_control(token))
    stories = [prompt[begin:] for _ in range(num)]
    written = 0
    for token in generate(model, [prompt] * num, end_token=end, **options):
        for story, t in zip(stories, token.tolist(), strict=True):
            if t != end:
                story.append(t)
        text = tokenizer.decode(stories[0])
        if write and not text.endswith("\ufffd"):  # the last token may be only a part of a character
            write(text[written:])
            written = len(text)
    texts = [tokenizer.decode(story).rstrip("\ufffd") for story in stories]  # the end may be half a character
    if write:
        write(texts[0][written:])
    return texts


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options that `generate` takes, for every program that tells stories."""
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="draw from the k likeliest tokens; 0: from all")
    parser.add_argument("--top_p", type=float, default=0.95, help="draw from the likeliest that hold this share")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1.0: avoid what has occurred")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed tells the same stories")
    parser.add_argument("--compile", action="store_true", help="compile first: one story at a time is then faster")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: faster, less exact"
    )


def sampling_options(args: argparse.Namespace) -> dict:
    """What was given of them, checked. Raises UserError."""
    for key in ("temperature", "top_k", "seed"):
        if not 0 <= getattr(args, key) < 2**63:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 0 and below 2**63")
    if not 0 < args.top_p <= 1 or not args.repetition_penalty > 0:
        raise UserError("--top_p must lie in (0, 1], --repetition_penalty above 0")
    return {
        name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "compile")
    }


def cleaned(prompt: str) -> str:
    """A prompt, cleaned as stories are. Raises UserError."""
    try:
        return clean(prompt)
    except UnicodeEncodeError:
        raise UserError("the prompt is not UTF-8 text") from None


def main() -> None:
    parser = Parser(description="Tell stories from a checkpoint.", allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint, or a run's folder for its newest")
    beginning = parser.add_mutually_exclusive_group()
    beginning.add_argument("--prompt", default="", help="how the stories begin")
    beginning.add_argument("--prompt_file", type=Path, help="read the prompt from this UTF-8 file")
    for name, key in NAMES.items():
        parser.add_argument(f"--{key}", default="", help=f"what the story must have (a model of sft.py): {name}")
    parser.add_argument("--instruction", default="", help="an instruction in words of your own, in place of these")
    parser.add_argument("--num", type=int, default=3, help="stories to tell")
    parser.add_argument("--max_new_tokens", type=int, default=300)
    add_sampling_options(parser)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--interactive", action="store_true", help="keep asking; Enter leaves one out, Ctrl-D ends")
    args = parser.parse_args()
    for key in ("num", "max_new_tokens"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    options = sampling_options(args) | {"max_new_tokens": args.max_new_tokens}
    device, _ = choose_device(args.device)
    checkpoint = read_checkpoint(args.ckpt)
    model = build_model(checkpoint, args.ckpt).to(device, getattr(torch, args.dtype)).eval()
    tokenizer = load_tokenizer(checkpoint["tokenizer"], f"{args.ckpt} (tokenizer)")
    if tokenizer.vocab_size() > model.config.vocab_size:
        raise UserError(f"{args.ckpt}: the tokenizer in it has more pieces than the model")
    template = checkpoint.get("template", "")

    def show(prompt: str, constraints: dict[str, str]) -> None:
        ids = [tokenizer.eos_id()]  # a story begins where another has ended
        if instruction := args.instruction or write_constraints(constraints):
            before, answer = markers(template, tokenizer)
            ids += before + tokenizer.encode(cleaned(instruction)) + answer
        ids += tokenizer.encode(cleaned(prompt))
        stories = tell(model, tokenizer, ids, args.num, lambda text: print(text, end="", flush=True), **options)
        for story in stories[1:]:
            print(f"\n---\n{story}", end="")
        print(flush=True)

    constraints = {name: getattr(args, key) for name, key in NAMES.items()}
    asked = args.instruction or write_constraints(constraints)
    if args.interactive and (asked or args.prompt or args.prompt_file):
        raise UserError("--interactive asks for the prompt and for what a story must have; leave those options out")
    if asked and not template:
        raise UserError(f"{args.ckpt}: has not learned to follow instructions; give a checkpoint of sft.py")
    if args.prompt_file:
        try:
            args.prompt = args.prompt_file.read_text(encoding="utf-8").rstrip("\n")
        except UnicodeDecodeError as e:
            raise UserError(f"{args.prompt_file}: not UTF-8 at byte {e.start}") from None
    if not args.interactive:
        return show(args.prompt, constraints)
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]  # a TextIOWrapper
    while True:
        answers = {}
        for name in list(NAMES) if template else ["prompt"]:
            if sys.stdin.isatty():
                print(f"{name}: ", end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline()):
                return  # Ctrl-D
            answers[name] = line.rstrip("\n")
        try:
            show(answers.pop("prompt", ""), answers)
        except UserError as e:  # a prompt too long is no reason to stop asking
            if not sys.stdin.isatty():
                raise
            print(f"error: {e}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
