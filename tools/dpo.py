"""Preference tuning: of two stories for one instruction, make the better one more probable than the worse.

    python -m tools.dpo config/demo_dpo.py                     pairs of its own stories, then training
    python -m tools.dpo config/demo_dpo.py --make_pairs=True   only the pairs, into out_dir/pairs.jsonl
    python -m tools.dpo config/demo_dpo.py --pairs=mine.jsonl  pairs of your own

The loop is `train.train`. New here: the pairs, which the model samples itself or a file holds, and the loss:

    -log sigmoid(beta h)    DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7), where
                            h = log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)
    + nll_weight times      the chosen story's mean loss per token. DPO alone lowers the probability of both
                            stories; the configs set nll_weight = 1 against this (the default is 0).
"""

import collections
import copy
import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import run
from common.checkpoint import build_model, choose_device, find_checkpoints, read_checkpoint
from common.files import UserError, atomic_write, load_tokenizer, report_errors
from common.settings import load_settings, setting
from model import GPT, IGNORE
from sample import BATCH, sample_stories
from sft import PackedSFTDataset, add_lora, open_examples
from stories import records
from stories.constraints import read_constraints, template_tokens
from stories.read import LeftOut, find_inputs, read_blocks, records_of
from stories.rewards import average, reward, score
from train import LoopSettings, ShuffledDataset, train


@dataclass
class Settings(LoopSettings):
    """The loop's settings, where pairs come from, and the loss."""

    init_from: str = setting("out/demo_sft", path=True)  # where training starts; also the reference
    # The pairs: from a file, or of the model's own stories for instructions of data_dir (stories/rewards.py)
    pairs: str = setting("", path=True)  # a file of prompt, chosen and rejected; empty: make them
    make_pairs: bool = False  # make the pairs and stop
    instructions: int = setting(400, at_least=1)
    samples: int = setting(4, at_least=1)  # stories for each instruction; the best and the worst are a pair
    temperature: float = setting(1.0, at_least=1e-6)
    reference_chosen: bool = True  # the story of data_dir may be chosen too, if it is better than all samples
    # The loss
    beta: float = setting(0.1, at_least=1e-6, fixed=True)  # smaller: the model may move further away
    nll_weight: float = setting(0.0, fixed=True)  # of the chosen story's own loss: its probability stays
    lora_rank: int = setting(0, fixed=True)  # 0: train every weight; else only adapters of this rank
    lora_alpha: float = setting(16.0, fixed=True)  # adapters are scaled by alpha / rank


# ---- The run ---------------------------------------------------------------------------------------


def tune(s: Settings) -> None:
    """Get pairs, compute the reference's log-probabilities once, and train. Raises UserError."""
    if s.pairs and s.make_pairs:
        raise UserError(f"make_pairs = True: pairs = {s.pairs!r} are there already; leave one of them out")
    source = Path(s.init_from)
    checkpoint = read_checkpoint(source)
    tokenizer = load_tokenizer(checkpoint["tokenizer"], source)
    template = checkpoint.get("template")
    if not template:
        raise UserError(f"{source}: has not learned to follow instructions; give a checkpoint of sft.py")
    model = build_model(checkpoint, source)
    if s.block_size > model.config.block_size:
        most = model.config.block_size
        raise UserError(f"block_size = {s.block_size}: {source} reads at most {most} tokens")
    model_digest = digest(weight.numpy() for weight in model.state_dict().values())
    device = choose_device(s.device)
    checkpoints = find_checkpoints(Path(s.out_dir))
    saved = read_checkpoint(checkpoints[0]) if checkpoints else {}
    s.dtype = run.agree_on_dtype(s.dtype, device, saved)
    dtype = getattr(torch, s.dtype)

    if s.pairs:
        files = find_inputs([Path(s.pairs)])
    else:
        files = [Path(s.out_dir, "pairs.jsonl")]
        if files[0].exists():
            if run.rank() == 0:
                print(f"{files[0]}: exists and is used as it is; remove it to make new pairs")
        elif run.world_size() > 1:
            advice = "make the pairs first, in one process, with --make_pairs=True"
            raise UserError(f"{files[0]}: not there; {advice}")
        else:
            meta, _, response_token = open_examples(Path(s.data_dir), source, checkpoint)
            n = model.config.block_size
            examples = PackedSFTDataset(Path(s.data_dir, "train.bin"), meta, response_token, n, n)
            sampler = copy.deepcopy(model).to(device, dtype)
            make_pairs(files[0], sampler, tokenizer, examples, model_digest, s)
    if s.make_pairs:
        return

    train_data, val_data = read_pairs(files, template, tokenizer, s)
    for data in (train_data, val_data):  # now, so that no second model stays in memory
        compute_reference(data, model, device, dtype, s.batch_size)
    metadata = {"tokenizer": checkpoint["tokenizer"], "template": template, "reference": model_digest}
    metadata["pairs"] = digest(file.read_bytes() for file in files)
    if s.lora_rank > 0:
        add_lora(model, s.lora_rank, s.lora_alpha)
        metadata["lora"] = {"rank": s.lora_rank, "alpha": s.lora_alpha}
    prompt, _, _ = val_data.pairs[0]

    def loss_fn(model, batch):
        return preference_loss(model, batch, s)

    train(s, model, train_data, val_data, metadata, loss_fn, prompt)


def digest(parts: Iterable) -> str:
    """The SHA-256 of bytes or arrays, one after the other."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    return sha256.hexdigest()


# ---- Making pairs ----------------------------------------------------------------------------------


def make_pairs(
    path: Path, model: GPT, tokenizer, data: PackedSFTDataset, model_digest: str, s: Settings
) -> None:
    """Sample stories for instructions of `data`. Write the best and the worst of each to `path`, as JSON.

    Interrupted and called again with the same settings and model, of which `model_digest` is the SHA-256, it
    continues where it stopped: a .part file beside `path` has a line for each batch, the list of its pairs.
    """
    order = np.random.default_rng(s.seed).permutation(sorted(data.packed))[: s.instructions]
    batch_size = max(1, BATCH // s.samples)  # instructions
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    made_with = repr((model_digest, str(data.path), s.samples, s.temperature, s.reference_chosen, s.seed))
    part = path.with_name(f"{path.name}.{digest([made_with.encode()])[:8]}.part")
    lines = part.read_bytes().splitlines(keepends=True) if part.exists() else []
    if lines and not lines[-1].endswith(b"\n"):  # cut off
        lines.pop()
    pairs = []
    for line in lines:
        pairs += json.loads(line)
    all_scores: list[dict] = []
    with open(part, "ab") as f:
        f.truncate(sum(len(line) for line in lines))
        todo = range(len(lines), len(batches))
        for number in tqdm(todo, desc="sampling pairs", unit="batch", disable=None):
            pairs_of_batch = []
            for pair, scores in sample_pairs(model, tokenizer, data, batches[number], s.seed + number, s):
                all_scores += scores
                if pair:
                    pairs_of_batch.append(pair)
            f.write(to_line(pairs_of_batch))
            f.flush()
            pairs += pairs_of_batch
    with atomic_write(path) as f:
        for pair in pairs:
            f.write(to_line(pair))
    part.unlink()
    print(f"{path}: {len(pairs):,} pairs of {len(order):,} instructions")
    if all_scores:  # else an earlier process has sampled all
        means = ", ".join(f"{name} {value:.3g}" for name, value in average(all_scores).items())
        print(f"mean scores of the {len(all_scores):,} stories sampled now: {means}")


def to_line(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def sample_pairs(model: GPT, tokenizer, data: PackedSFTDataset, indices, seed: int, s: Settings):
    """For each example of `indices`: its pair, or None, and the scores of its samples. All are one batch."""
    examples = [data.example(i) for i in indices]
    prompts = []
    for instruction, _ in examples:
        prompts += [instruction.tolist()] * s.samples
    longest = max(len(prompt) for prompt in prompts)
    options = {
        "temperature": s.temperature,
        "seed": seed,
        "max_new_tokens": model.config.block_size - longest,
    }
    stories = sample_stories(model, tokenizer, prompts, **options)
    for number, (instruction, response) in enumerate(examples):
        prompt = tokenizer.decode(instruction.tolist())
        constraints = read_constraints(prompt)
        candidates = []
        for story, finished in stories[number * s.samples : (number + 1) * s.samples]:
            scores = score(constraints, story)
            scores["finished"] = float(finished)
            candidates.append((story, scores))
        corpus_story = tokenizer.decode(response.tolist())
        corpus_scores = score(constraints, corpus_story)
        corpus_scores["finished"] = 1.0
        pair = choose_pair(candidates, (corpus_story, corpus_scores), s.reference_chosen)
        if pair:
            pair = {"prompt": prompt, **pair}
        yield pair, [scores for _, scores in candidates]


def choose_pair(samples: list[tuple], of_corpus: tuple, reference_chosen: bool) -> dict | None:
    """The best and the worst of the samples of one instruction; None if they are equally good.

    samples and of_corpus are (story, scores). The story of the corpus can only be chosen: if
    reference_chosen, and if it is better than all samples.
    """
    corpus_story, corpus_scores = of_corpus

    def worth(candidate) -> float:
        return reward(candidate[1], corpus_scores)

    samples = [sample for sample in samples if "\ufffd" not in sample[0]]  # tokens that spell no text
    if not samples:
        return None
    chosen = max(samples, key=worth)
    rejected = min(samples, key=worth)
    if reference_chosen and "\ufffd" not in corpus_story and worth(of_corpus) > worth(chosen):
        chosen = of_corpus
    if worth(chosen) == worth(rejected):
        return None
    return {
        "chosen": chosen[0],
        "rejected": rejected[0],
        "chosen_scores": chosen[1],
        "rejected_scores": rejected[1],
    }


# ---- Reading pairs ---------------------------------------------------------------------------------


def pair_of(record, where: str) -> tuple[str, tuple[str, bool], tuple[str, bool]]:
    """(prompt, (chosen, whether it ended), (rejected, whether it ended)) of a record.

    The prompt and both responses are texts or conversations, as TRL, minimind, UltraFeedback and
    LLaMA-Factory write them. Raises UserError and LeftOut.
    """
    if isinstance(record, LeftOut):
        raise record
    expected = "expected an object with prompt, chosen and rejected"
    if not isinstance(record, dict):
        raise UserError(f"{where}: {expected}")
    if "chosen" not in record or "rejected" not in record:
        raise UserError(f"{where}: {expected}; the keys here are {records.keys_of(record)}")
    prompt, chosen = records.prompt_and_response(record, "chosen", where)
    other, rejected = records.prompt_and_response(record, "rejected", where)
    prompt, other, chosen, rejected = records.clean_texts((prompt, other, chosen, rejected))
    if prompt != other:
        raise UserError(f"{where}: chosen and rejected answer different prompts")
    if chosen == rejected:
        raise LeftOut("chosen and rejected are the same")
    chosen_ended = has_ended(record.get("chosen_scores"))
    rejected_ended = has_ended(record.get("rejected_scores"))
    return prompt, (chosen, chosen_ended), (rejected, rejected_ended)


def has_ended(scores) -> bool:
    """Whether a story has reached its end, by its scores of make_pairs; without scores: yes."""
    return not isinstance(scores, dict) or scores.get("finished") != 0


def read_pairs(
    files: list[Path], template: str, tokenizer, s: Settings
) -> tuple["PreferenceDataset", "PreferenceDataset"]:
    """The pairs to train on and, of a twentieth of the prompts, those to validate with. Raises UserError."""
    pairs = []
    left_out = collections.Counter[str]()
    for block in read_blocks(files, "reading pairs"):
        for where, record in records_of(block):
            try:
                pairs.append(pair_of(record, where))
            except LeftOut as reason:
                left_out[str(reason)] += 1

    # The prompts with the smallest digests are held out, whatever their order.
    digests = {prompt: records.text_digest(prompt) for prompt, _, _ in pairs}
    n_held_out = max(1, len(digests) // 20)
    held_out = set(sorted(digests.values())[:n_held_out])
    before, after = template_tokens(template, tokenizer)
    end_token = tokenizer.eos_id()
    train_pairs = []
    val_pairs = []
    for prompt, *stories in pairs:
        instruction = [end_token, *before, *tokenizer.encode(prompt), *after]
        responses = []
        for story, ended in stories:
            response = tokenizer.encode(story)
            if ended:
                response.append(end_token)
            responses.append(response)
        longest = max(len(response) for response in responses)
        if len(instruction) + longest - 1 > s.block_size:
            left_out[f"longer than block_size = {s.block_size}"] += 1
        elif digests[prompt] in held_out:
            val_pairs.append((instruction, *responses))
        else:
            train_pairs.append((instruction, *responses))
    summary = f"{files[0]}: {len(train_pairs):,} train, {len(val_pairs):,} val pairs"
    for cause, n in left_out.items():
        summary += f", {n:,} left out ({cause})"
    mostly_left_out = left_out.total() > len(train_pairs) + len(val_pairs)
    if not train_pairs or not val_pairs or mostly_left_out:
        raise UserError(f"{summary}; training needs pairs of two prompts or more, and most must be usable")
    if run.rank() == 0:
        print(summary)
    train_data = PreferenceDataset(files[0], train_pairs, s.block_size, end_token, s.seed)
    val_data = PreferenceDataset(files[0], val_pairs, s.block_size, end_token, 0)  # the same for every seed
    return train_data, val_data


class PreferenceDataset(ShuffledDataset):
    """Pairs of stories: (prompt, chosen, rejected), tokens each. A pair is two sequences."""

    def __init__(self, path: Path, pairs: list[tuple], block_size: int, end_token: int, seed: int):
        super().__init__(path, len(pairs), seed, 2 * block_size)
        self.pairs = pairs
        self.block_size = block_size
        self.end_token = end_token
        self.reference_log_p = np.zeros((len(pairs), 2), dtype=np.float32)  # see compute_reference

    def loss_denominator(self, batch: dict) -> float:
        """The number of pairs: the loss is a mean over pairs, not over tokens."""
        is_target = batch["targets"][:, 0] != IGNORE  # (P, T)
        return float(is_target.any(dim=-1).sum())

    def sequences(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """tokens and targets, (P, 2, T), and the reference's log-probabilities, (P, 2)."""
        shape = (len(indices), 2, self.block_size)
        tokens = np.full(shape, self.end_token)
        targets = np.full(shape, IGNORE)
        for p, index in enumerate(indices):
            prompt, *responses = self.pairs[index]
            for side, response in enumerate(responses):
                end = len(prompt) + len(response) - 1
                tokens[p, side, :end] = (prompt + response)[:-1]
                targets[p, side, len(prompt) - 1 : end] = response
        return {
            "tokens": torch.from_numpy(tokens),
            "targets": torch.from_numpy(targets),
            "reference_log_p": torch.from_numpy(self.reference_log_p[indices]),
        }


# ---- The loss --------------------------------------------------------------------------------------


def preference_loss(model, batch: dict, s: Settings) -> dict[str, torch.Tensor]:
    """The loss and other metrics, each summed over the pairs of a batch."""
    log_p = log_probs(model, batch)  # (P, 2)
    gain = log_p - batch["reference_log_p"]  # (P, 2)
    margin = s.beta * (gain[:, 0] - gain[:, 1])  # (P,)
    is_target = batch["targets"][:, 0] != IGNORE  # (P, T), of the chosen stories
    lengths = is_target.sum(dim=-1)  # (P,)
    nll = -log_p[:, 0] / lengths.clamp(min=1)  # (P,), of a token
    metrics = {
        "loss": -F.logsigmoid(margin) + s.nll_weight * nll,
        "accuracy": (margin > 0).float(),
        "margin": margin,
        "chosen_log_p": log_p[:, 0],
        "rejected_log_p": log_p[:, 1],
        "kl": gain.square().mean(dim=1) / 2,  # rough: estimator k2 (Schulman 2020) on the pairs
    }
    is_pair = lengths > 0  # the last batch of validation may be padded
    return {name: (values * is_pair).sum() for name, values in metrics.items()}


def log_probs(model, batch: dict) -> torch.Tensor:
    """The log-probabilities of the chosen and the rejected stories of a batch, (P, 2)."""
    tokens = batch["tokens"].flatten(0, 1)  # (2P, T)
    targets = batch["targets"].flatten(0, 1)  # (2P, T)
    logits = model(tokens).flatten(0, 1).float()  # (2P * T, V)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")  # (2P * T,)
    return -losses.view_as(tokens).sum(dim=1).view(-1, 2)  # (P, 2)


@torch.no_grad()
def compute_reference(
    data: PreferenceDataset, model: GPT, device, dtype: torch.dtype, batch_size: int
) -> None:
    """Fill data.reference_log_p, with the model before it is trained."""
    model.to(device)
    for first in tqdm(range(0, len(data), batch_size), desc="reference", unit="batch", disable=None):
        end = min(first + batch_size, len(data))
        batch = data.sequences(list(range(first, end)))
        on_device = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            data.reference_log_p[first:end] = log_probs(model, on_device).cpu().numpy()


# ---- The command -----------------------------------------------------------------------------------


def main() -> None:
    s = load_settings(sys.argv[1:], Settings, __doc__)
    with run.training(s):
        tune(s)


if __name__ == "__main__":
    report_errors(main)
