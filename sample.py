"""Sample stories from a checkpoint.

    python sample.py --ckpt out/demo
    python sample.py --ckpt out/demo --prompt 从前 --num 5 --temperature 1.0
    python sample.py --ckpt out/demo_sft --words 铲子,草地 --features 转折
    python sample.py --ckpt out/demo_sft --words 铲子,草地 --best_of 8          of eight stories the best
    python sample.py --ckpt out/demo_sft --interactive

Stories are decoded in batches with a KV cache; the first one streams to the terminal.
"""

import argparse
import functools
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.checkpoint import build_model, choose_device, choose_dtype, read_checkpoint, try_compile
from common.files import Parser, UserError, load_tokenizer, report_errors
from model import GPT
from stories.constraints import NAMES, clean, read_constraints, template_tokens, write_constraints
from stories.rewards import can_choose, findings, reward, score

BATCH = 64  # stories that are generated together
CACHE_STEP = 64  # the KV cache grows by this many positions

# ---- Sampling --------------------------------------------------------------------------------------


def random_noise(batch_size: int, top_k: int, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """Draws of Exponential(1) for `sample_token`, (B, k)."""
    shape = (batch_size, min(top_k, vocab_size) or vocab_size)
    return torch.empty(shape, device=generator.device).exponential_(generator=generator)


def sample_token(logits, seen, temperature: float, top_p: float, repetition_penalty: float, noise) -> torch.Tensor:
    """The next token of each sequence, (B,), from logits, (B, V). seen, (B, V): which tokens have occurred.

    noise, (B, k): only the k most likely tokens remain, and of these the fewest that hold top_p of the probability
    (Holtzman et al. 2020, arXiv:1904.09751). At temperature 0, or near it, the most likely token.
    """
    if repetition_penalty != 1.0:  # Keskar et al. 2019, arXiv:1909.05858, section 4.1
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalized, logits)  # (B, V)
    if temperature < 1e-6:  # by less the logits could overflow
        return logits.argmax(dim=-1)  # (B,)
    values, tokens = (logits.float() / temperature).topk(noise.size(1))  # (B, k), (B, k), the most likely first
    p = values.softmax(dim=-1)  # (B, k)
    p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0)  # the tokens before these already hold top_p
    # The largest of p / e, e from Exponential(1), is token i with probability p[i]. torch.multinomial would wait.
    return tokens.gather(1, (p / noise).argmax(dim=-1, keepdim=True))[:, 0]  # (B,)


def prefill(model: GPT, prompts: list[list[int]], cache_size: int) -> tuple:
    """Process all prompts in one forward pass. Returns the logits after each, (B, V), the position of its last
    token, (B,), which tokens have occurred, (B, V), and the KV cache."""
    device = model.embedding.weight.device
    # Shorter prompts are padded on the right. No token attends to the padding: it attends only to positions up to
    # its own, and by then generated tokens have overwritten it.
    longest = max(map(len, prompts))
    padded = [prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts]
    tokens = torch.tensor(padded, device=device)  # (B, T)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)  # (B,)
    positions = torch.arange(longest, device=device).expand_as(tokens)  # (B, T)
    cache = model.new_cache(len(prompts), cache_size, model.embedding.weight.dtype)
    logits = model(tokens, positions=positions, cache=cache, last=last)[:, 0]  # (B, V)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)  # (B, V)
    return logits, last, seen.scatter_(1, tokens, True), cache


def round_up(length: int) -> int:
    """The size of a KV cache for so many positions."""
    return math.ceil(length / CACHE_STEP) * CACHE_STEP


def compile_decode(model: GPT, cache: list, cuda_graph: bool):
    """The model compiled for decoding. On a CPU one program serves every size of the cache."""
    for keys_or_values in itertools.chain(*cache):
        if cuda_graph:
            torch._dynamo.mark_static_address(keys_or_values)
        else:
            torch._dynamo.mark_dynamic(keys_or_values, 2)
    if model.embedding.weight.is_cpu:
        from torch._inductor import config as compiler_config  # imported here: it takes as long as PyTorch itself

        # A vector times a matrix is bound by reading the matrix: a fused loop does it up to three times as fast.
        limit = {"cpu_max_other_dimension_decomposition": 1 << 20}
        compiler_config.post_grad_fusion_options["decompose_mm_pass"] = limit
    return try_compile(model, model.embedding.weight.device, "reduce-overhead" if cuda_graph else None)


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
    """Continue every prompt, all as one batch. Yields the next token of each sequence, (B,), step by step.

    Prompts may differ in length; none may be empty. A sequence that has ended yields end_token. Stops when all have
    ended, after max_new_tokens, or when the longest sequence reaches block_size. Compiling takes ten seconds first,
    on a GPU 25; a single sequence then takes a third of the time, on a GPU an eighth.
    """
    longest = max(map(len, prompts))
    end = min(longest + max_new_tokens, model.config.block_size)
    # Decoding one token is so little work for a GPU that launching its kernels takes longer than running them. A
    # CUDA graph ("reduce-overhead") launches them all at once. It needs tensors of fixed address and size, so its
    # cache has full size from the start. Elsewhere the cache grows: attention pays for empty positions too.
    cuda_graph = compile and model.embedding.weight.is_cuda
    cache_size = round_up(end if cuda_graph else longest)
    logits, last, seen, cache = prefill(model, prompts, cache_size)
    decode = compile_decode(model, cache, cuda_graph) if compile else model
    seen[:, end_token] = False  # every prompt begins with it; a story must be free to end
    generator = torch.Generator(logits.device).manual_seed(seed)
    active = torch.arange(len(prompts), device=logits.device)  # (A,), those still computed
    tokens = torch.full_like(active, end_token)  # (B,)
    ended = torch.zeros_like(active, dtype=torch.bool)  # (A,)
    for length in range(longest, end):
        # Noise for all sequences, so that a seed gives the same stories however many have ended.
        noise = random_noise(len(prompts), top_k, logits.size(1), generator)[active] if temperature else None  # (A, k)
        token = sample_token(logits, seen, temperature, top_p, repetition_penalty, noise)  # (A,)
        token = torch.where(ended, end_token, token)  # (A,)
        yield tokens.scatter(0, active, token)
        ended |= token == end_token
        n_ended = int(ended.sum())
        if n_ended == len(active):
            return
        if n_ended > len(active) // 4 and not compile:  # compute only the others from now on
            left = (~ended).nonzero()[:, 0]  # (A,)
            active, token, last, seen, ended = active[left], token[left], last[left], seen[left], ended[left]
            cache = [[kv[left] for kv in layer] for layer in cache]  # (A, K, S, D) each
        seen.scatter_(1, token[:, None], True)
        last = last + 1  # (A,)
        if length == cache_size:  # the cache is full
            cache_size += CACHE_STEP
            cache = [[F.pad(kv, (0, 0, 0, CACHE_STEP)) for kv in layer] for layer in cache]  # (A, K, S, D) each
        # Decode: one new token a sequence; the cache holds the keys and values of all tokens before it.
        logits = decode(token[:, None], positions=last[:, None], cache=cache)[:, 0]  # (A, V)


# ---- Text ------------------------------------------------------------------------------------------


def encode_prompt(tokenizer, template: str, instruction: str, beginning: str) -> list[int]:
    """The tokens of a prompt: an instruction in its template, and the beginning of the story.

    Raises UserError for text that is not Unicode.
    """
    try:
        instruction, beginning = clean(instruction), clean(beginning)
    except UnicodeEncodeError:
        raise UserError("the prompt is not UTF-8 text") from None
    tokens = [tokenizer.eos_id()]  # a story begins where another one has ended
    if instruction:
        before, after = template_tokens(template, tokenizer)
        tokens += before + tokenizer.encode(instruction) + after
    return tokens + tokenizer.encode(beginning)


def story_start(tokenizer, prompt: list[int]) -> int:
    """Where the beginning of the story is in a prompt: after the last control token."""
    return 1 + max(i for i, token in enumerate(prompt) if tokenizer.is_control(token))


def check_length(model: GPT, prompt: list[int]) -> None:
    if len(prompt) >= model.config.block_size:
        most = model.config.block_size - 1
        raise UserError(f"the prompt has {len(prompt):,} tokens, the model reads at most {most:,}")


def generate_text(model, tokenizer, prompt: list[int], num: int, write=None, **options) -> list[str]:
    """`num` stories that continue `prompt`, with the beginning that it gives them. Raises UserError.

    The first story is passed to `write` piece by piece as it is generated.
    """
    check_length(model, prompt)
    stories = [prompt[story_start(tokenizer, prompt) :] for _ in range(num)]
    written = 0
    for tokens in generate(model, [prompt] * num, end_token=tokenizer.eos_id(), **options):
        for story, token in zip(stories, tokens.tolist(), strict=True):
            if token != tokenizer.eos_id():
                story.append(token)
        # The whole story is decoded anew and its new characters are written: the text of a token alone can differ
        # from its text inside a story, and a rare character takes several tokens.
        text = tokenizer.decode(stories[0])
        if write and not text.endswith("\ufffd"):  # an incomplete character
            write(text[written:])
            written = len(text)
    texts = [tokenizer.decode(story).rstrip("\ufffd") for story in stories]  # max_new_tokens may cut a character
    if write:
        write(texts[0][written:])
    return texts


def sample_and_score(model, tokenizer, prompts: list[list[int]], **options) -> list[tuple[str, dict]]:
    """One story for each prompt, with its scores (stories/rewards.py). All are one batch."""
    end, scored = tokenizer.eos_id(), []
    steps = (tokens.tolist() for tokens in generate(model, prompts, end_token=end, **options))
    for prompt, tokens in zip(prompts, zip(*steps, strict=True), strict=True):
        finished = end in tokens
        new = list(tokens[: tokens.index(end)] if finished else tokens)
        story = tokenizer.decode(prompt[story_start(tokenizer, prompt) :] + new).rstrip("\ufffd")  # a cut character
        constraints = read_constraints(tokenizer.decode(prompt))
        scored.append((story, score(constraints, story) | {"finished": float(finished)}))
    return scored


# ---- The command -----------------------------------------------------------------------------------


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options that `generate` takes, for every program that samples."""
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token")
    parser.add_argument("--top_k", type=int, default=50, help="sample from the k most likely tokens; 0: from all")
    parser.add_argument("--top_p", type=float, default=0.95, help="sample from the most likely that hold this share")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1.0: avoid what has occurred")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed gives the same stories")
    parser.add_argument("--compile", action="store_true", help="compile first: then one story at a time is faster")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    types = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=types, help="of the weights; auto: the fastest")


def open_model(path: Path, args: argparse.Namespace) -> tuple[GPT, Any, str]:
    """The model of a checkpoint on the device asked for, its tokenizer, its template (or ""). Raises UserError."""
    device = choose_device(args.device)
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint, path).to(device, choose_dtype(args.dtype, device)).eval()
    tokenizer = load_tokenizer(checkpoint["tokenizer"], f"{path} (tokenizer)")
    if tokenizer.vocab_size() != model.config.vocab_size:
        raise UserError(f"{path}: the tokenizer in it has not as many pieces as the model")
    if template := checkpoint.get("template", ""):
        template_tokens(template, tokenizer)  # raises UserError
    return model, tokenizer, template


def sampling_options(args: argparse.Namespace) -> dict:
    """The values of these options, checked, as arguments of `generate`. Raises UserError."""
    for key in ("temperature", "top_k", "seed"):
        if not 0 <= getattr(args, key) < 2**63:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 0 and below 2**63")
    if not 0 < args.top_p <= 1 or not 0.01 <= args.repetition_penalty <= 100:
        raise UserError("--top_p must lie in (0, 1], --repetition_penalty between 0.01 and 100")
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "compile")
    return {name: getattr(args, name) for name in names}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Sample stories from a checkpoint.", allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint, or a run's folder for its newest")
    beginning = parser.add_mutually_exclusive_group()
    beginning.add_argument("--prompt", default="", help="how the stories begin")
    beginning.add_argument("--prompt_file", type=Path, help="read the prompt from this UTF-8 file")
    for name, key in NAMES.items():
        how = ", separated by , ， 、 ; or ； (not by spaces)" if key in ("words", "features") else ""
        parser.add_argument(f"--{key}", default="", help=f"what the story must have (a model of sft.py): {name}{how}")
    parser.add_argument("--instruction", default="", help="an instruction in your own words, instead of these")
    parser.add_argument("--num", type=int, help="stories to sample (default: 3; with --best_of 1)")
    parser.add_argument("--best_of", type=int, default=1, metavar="N", help="sample N for each story, show the best")
    parser.add_argument("--max_new_tokens", type=int, default=300)
    add_sampling_options(parser)
    add_device_options(parser)
    parser.add_argument("--interactive", action="store_true", help="ask again and again; Enter skips, Ctrl-D ends")
    args = parser.parse_args()
    args.num = args.num if args.num is not None else 3 if args.best_of == 1 else 1
    for key in ("num", "best_of", "max_new_tokens"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    args.instruction = args.instruction or write_constraints({name: getattr(args, key) for name, key in NAMES.items()})
    if args.interactive and (args.instruction or args.prompt or args.prompt_file):
        raise UserError("--interactive asks for the prompt and for what a story must have; leave those options out")
    if args.prompt_file:
        try:
            args.prompt = args.prompt_file.read_text(encoding="utf-8-sig").rstrip("\n")
        except UnicodeDecodeError as e:
            raise UserError(f"{args.prompt_file}: not UTF-8 at byte {e.start}") from None
    return args


def batches(total: int) -> tqdm:
    """The sizes of batches for `total` stories, so that they fit in memory; with a bar if they are several."""
    sizes = [min(BATCH, total - first) for first in range(0, total, BATCH)]
    return tqdm(sizes, unit="batch", delay=1e-3, leave=False, disable=None if len(sizes) > 1 else True)


def described(found: dict) -> str:
    """The findings of a story in a line."""
    parts = []
    if "missing" in found:
        parts.append(f"words missing: {'，'.join(found['missing'])}" if found["missing"] else "all words")
    if "sentence" in found:
        parts.append({"exact": "the sentence", "nearly": "nearly the sentence"}.get(found["sentence"], "no sentence"))
    if "dialogue" in found:
        parts.append("dialogue" if found["dialogue"] else "no dialogue")
    return ", ".join(parts)


def ask(names: list[str]):
    """Yield what the user types for each name, as a dict, until the input ends, and what is open then is empty."""
    if sys.stdin is None:
        raise UserError("--interactive: standard input is closed")
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]  # a TextIOWrapper
    line = "\n"
    while line:
        answers = {}
        for name in names:
            if line and sys.stdin.isatty():
                print(f"{name}: ", end="", file=sys.stderr, flush=True)
            line = line and sys.stdin.readline()  # empty at the end
            answers[name] = line.rstrip("\n")
        if line or any(answers.values()):
            yield answers


def main() -> None:
    args = parse_arguments()
    options = sampling_options(args) | {"max_new_tokens": args.max_new_tokens}
    model, tokenizer, template = open_model(args.ckpt, args)
    if args.instruction and not template:
        raise UserError(f"{args.ckpt}: has not learned to follow instructions; give a checkpoint of sft.py")

    def print_best(instruction: str, prompt: list[int]) -> None:
        check_length(model, prompt)
        constraints = read_constraints(instruction)
        if not can_choose(constraints):
            known = "--words, --sentence or --features 对话"
            raise UserError(f"--best_of {args.best_of}: nothing to choose by; it counts what {known} ask for")
        for i in range(args.num):
            best, sizes = list[tuple](), batches(args.best_of)
            for n, size in enumerate(sizes):
                seeded = options | {"seed": options["seed"] + i * len(sizes) + n}
                candidates = best + sample_and_score(model, tokenizer, [prompt] * size, **seeded)
                best = [max(candidates, key=lambda candidate: reward(candidate[1]))]
            story, _ = best[0]
            print(("---\n" if i else "") + story, flush=True)
            print(f"(best of {args.best_of}: {described(findings(constraints, story))})", file=sys.stderr)

    def print_stories(instruction: str, beginning: str) -> None:
        prompt = encode_prompt(tokenizer, template, instruction, beginning)
        if args.best_of > 1:
            return print_best(instruction, prompt)
        write = functools.partial(print, end="", flush=True)
        for n, size in enumerate(batches(args.num)):
            seeded = options | {"seed": options["seed"] + n}
            stories = generate_text(model, tokenizer, prompt, size, None if n else write, **seeded)
            if n == 0:
                write("\n")  # after the first story, which is written
            with tqdm.external_write_mode():
                write("".join(f"---\n{story}\n" for story in stories[0 if n else 1 :]))

    if not args.interactive:
        return print_stories(args.instruction, args.prompt)
    for answers in ask(list(NAMES) if template else ["prompt"]):
        try:
            print_stories(write_constraints(answers) if template else "", answers.get("prompt", ""))
        except UserError as e:  # a prompt that is too long is no reason to stop asking
            if not sys.stdin.isatty():
                raise
            print(f"error: {e}", file=sys.stderr)


if __name__ == "__main__":
    report_errors(main)
