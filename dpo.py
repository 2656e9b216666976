"""Preference tuning: of two stories for one instruction, raise the probability of the better one.

    python dpo.py config/demo_dpo.py                         pairs of the model's own stories, then the training
    python dpo.py config/demo_dpo.py --make_pairs=True       only the pairs, into out_dir/pairs.jsonl
    python dpo.py config/demo_dpo.py --pairs=mine.jsonl      pairs of your own
    python dpo.py config/demo_dpo.py --rounds=2              again, with pairs of the better model

The loop is `train.train`. New here: pairs of a better and a worse story, which the model samples itself or a file
holds, and a loss that compares them (DPO, Rafailov et al. 2023, arXiv:2305.18290).
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.checkpoint import build_model, newest_checkpoint, read_checkpoint
from common.device import choose_device, process_rank, processes
from common.files import atomic_write
from common.settings import UserError, load_settings, run, setting
from common.tokenizer import clean, load_tokenizer, template_tokens, text_digest
from model import GPT, IGNORE
from sample import sample_and_score
from sft import ExampleFile, add_lora, open_examples
from stories.constraints import read_constraints
from stories.read import find_inputs, items_of, read_blocks
from stories.records import (
    CONVERSATIONS,
    PROMPTS,
    LeftOut,
    keys_of,
    prompt_of,
    question_and_answer,
    refuse_extras,
    text_of,
    turns_of,
)
from stories.rewards import average, reward, score
from train import LoopSettings, ShuffledDataset, train

SAMPLING_BATCH = 64  # stories in a batch when pairs are made


@dataclass
class Settings(LoopSettings):
    """The loop's settings, where pairs come from, and the loss."""

    init_from: str = "out/demo_sft"  # the checkpoint to start from; it is also the reference
    # The pairs: from a file, or the model's own stories for instructions of data_dir, scored by stories/rewards.py
    pairs: str = ""  # a .jsonl or .json file of prompt, chosen and rejected; empty: make them
    make_pairs: bool = False  # make the pairs and stop
    instructions: int = setting(400, at_least=1)
    samples: int = setting(4, at_least=1)  # stories for each instruction; the best and the worst are a pair
    temperature: float = 1.0
    reference_chosen: bool = True  # the story of data_dir may be chosen too, if it is better than all samples
    rounds: int = setting(1, at_least=1)  # sample, score and train this often, each time from the last model
    # The loss
    loss: str = setting("sigmoid", choices=("sigmoid", "ipo", "simpo"), fixed=True)  # sigmoid is DPO's
    beta: float = setting(0.1, fixed=True)  # how close the model stays to the reference: smaller is further away
    label_smoothing: float = setting(0.0, below=0.5, fixed=True)  # the share of pairs that may be the wrong way round
    simpo_gamma: float = setting(1.0, fixed=True)  # simpo: the margin by which the chosen story must win
    nll_weight: float = setting(0.0, fixed=True)  # adds the chosen story's own loss, so that its probability stays
    lora_rank: int = setting(0, fixed=True)  # 0: train every weight; else only adapters of this rank
    lora_alpha: float = setting(16.0, fixed=True)  # adapters are scaled by alpha / rank

    def __post_init__(self):
        super().__post_init__()
        if not self.beta > 0 or not self.temperature > 0:
            raise UserError(f"beta = {self.beta}, temperature = {self.temperature}: both must be above 0")


# ---------------------------------------------------------------------------------------------------
# Making pairs


def rank_samples(tokenizer, instruction: list[int], response: list[int], samples: list[tuple], s: Settings):
    """The best and the worst of the sampled stories of one instruction, as a record; None if they are equally good.

    instruction and response are tokens of a reference example; samples are (story, scores).
    """
    story = tokenizer.decode(response)
    reference = score(read_constraints(tokenizer.decode(instruction)), story) | {"finished": 1.0}
    # The reference comes last: of equals a sample of the model is chosen.
    candidates = samples + [(story, reference)] * s.reference_chosen
    ranked = sorted(candidates, key=lambda candidate: -reward(candidate[1], reference))
    (chosen, high), (rejected, low) = ranked[0], ranked[-1]
    if reward(high, reference) <= reward(low, reference):
        return None
    record = {"prompt": tokenizer.decode(instruction), "chosen": chosen, "rejected": rejected}
    return record | {"chosen_scores": high, "rejected_scores": low}


def read_unfinished(path: Path) -> list[dict]:
    """The records of all complete batches of an interrupted `make_pairs`. Raises UserError."""
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        return [line for line in lines if line["batch"] < lines[-1]["batch"]]  # the last batch may be incomplete
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: damaged; remove it to start again") from None


def make_pairs(path: Path, model: GPT, tokenizer, data: ExampleFile, s: Settings) -> None:
    """Sample stories for instructions of `data` and write the best and the worst of each to `path`, as JSON lines.

    Interrupted and called again with the same model and settings, it continues where it stopped.
    """
    order = np.random.default_rng(s.seed).permutation(sorted(data.packed))[: s.instructions]
    per_batch = max(1, SAMPLING_BATCH // s.samples)
    batches = [order[i : i + per_batch] for i in range(0, len(order), per_batch)]
    identity = hashlib.sha256(repr((s.samples, s.temperature, s.reference_chosen, s.seed)).encode())
    for weight in model.state_dict().values():
        identity.update(weight.float().cpu().numpy())
    unfinished = path.with_name(f"{path.name}.{identity.hexdigest()[:8]}.part")
    done = read_unfinished(unfinished)
    first_batch, written, scores = done[-1]["batch"] + 1 if done else 0, len(done), []
    with atomic_write(unfinished) as f:
        f.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in done)
    with open(unfinished, "ab") as f:
        for number in tqdm(range(first_batch, len(batches)), desc="sampling pairs", unit="batch", disable=None):
            examples = [tuple(map(np.ndarray.tolist, data.example(i))) for i in batches[number]]
            longest = max(len(instruction) for instruction, _ in examples)
            prompts = [instruction for instruction, _ in examples for _ in range(s.samples)]
            options = {"temperature": s.temperature, "seed": s.seed + number}
            options |= {"max_new_tokens": model.config.block_size - longest}
            stories = sample_and_score(model, tokenizer, prompts, **options)
            scores += [story_scores for _, story_scores in stories]
            for i, (instruction, response) in enumerate(examples):
                samples = stories[i * s.samples : (i + 1) * s.samples]
                if record := rank_samples(tokenizer, instruction, response, samples, s):
                    f.write(json.dumps(record | {"batch": number}, ensure_ascii=False).encode() + b"\n")
                    written += 1
            f.flush()
        os.fsync(f.fileno())
    os.replace(unfinished, path)
    means = ", ".join(f"{name} {value:.3g}" for name, value in average(scores).items())
    print(f"{path}: {written:,} pairs of {len(order):,} instructions; mean scores of the samples: {means}")


# ---------------------------------------------------------------------------------------------------
# Reading pairs


def prompt_and_response(record: dict, key: str, where: str) -> tuple[str, str]:
    """The texts of the prompt and of the response at `key`. Raises UserError and LeftOut.

    The prompt is a text or a conversation of its own, or stands in front of the response.
    """
    if isinstance(record[key], (list, dict)):
        response = turns_of(record[key], key, where)
    else:
        response = [("assistant", text_of(record, key, where))]
    before = [name for name in ("prompt", *CONVERSATIONS) if isinstance(record.get(name), list)]
    # UltraFeedback has the prompt as a text, and beside it `messages`, which repeat the chosen conversation.
    if not any(isinstance(record.get(name), str) for name in PROMPTS):
        turns = turns_of(record[before[0]], before[0], where) if before else []
        return question_and_answer(turns + response, key, where)
    prompt = prompt_of(record, ("prompt", "instruction", "query", "question"), where)
    repeated = [text for role, text in response if role == "user"]
    if repeated and repeated[0].strip() != prompt.strip():
        raise UserError(f"{where}: {key!r} answers another prompt than that of the record")
    return question_and_answer([("user", prompt), *(turn for turn in response if turn[0] != "user")], key, where)


def pair_of(record, where: str) -> list[tuple[str, tuple]]:
    """[("", (prompt, (chosen, whether it ended), (rejected, whether it ended)))] of a record. Raises UserError.

    The prompt and both responses are texts or conversations, as TRL, minimind, UltraFeedback and LLaMA-Factory write
    them. A pair that is left out has the reason, and nothing else: [(reason, ())].
    """
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        found = f"; the keys here are {keys_of(record)}" if isinstance(record, dict) else ""
        raise UserError(f"{where}: expected an object with prompt, chosen and rejected{found}")
    try:
        refuse_extras(record)
        (prompt, chosen), (other, rejected) = (prompt_and_response(record, k, where) for k in ("chosen", "rejected"))
        prompt, other, chosen, rejected = map(clean, (prompt, other, chosen, rejected))
    except LeftOut as reason:
        return [(str(reason), ())]
    except UnicodeEncodeError:
        raise UserError(f"{where}: half of a surrogate pair, which is not text") from None
    if prompt != other:
        raise UserError(f"{where}: chosen and rejected answer different prompts")
    if not chosen or not rejected:
        return [("empty", ())]
    if chosen == rejected:
        return [("chosen and rejected are the same", ())]
    scores = [record.get(f"{key}_scores") for key in ("chosen", "rejected")]  # written by make_pairs
    ended = [not isinstance(found, dict) or found.get("finished") != 0 for found in scores]
    return [("", (prompt, (chosen, ended[0]), (rejected, ended[1])))]


class PairFile(ShuffledDataset):
    """Pairs of a chosen and a rejected story: (prompt, chosen, rejected), tokens each."""

    def __init__(self, path: Path, pairs: list[tuple], block_size: int, end_token: int, seed: int):
        super().__init__(path, seed)
        self.pairs, self.block_size, self.end_token = pairs, block_size, end_token
        self.reference = np.zeros((len(pairs), 2), dtype=np.float32)  # the reference's log-probabilities

    def __len__(self) -> int:
        return len(self.pairs)

    def count_targets(self, batch: dict) -> int:
        """The number of pairs: the loss is a mean over pairs, not over tokens."""
        return int((batch["targets"][:, 0] != IGNORE).any(dim=-1).sum())

    def sequences(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """tokens and targets, (P, 2, T), and the reference's log-probabilities, (P, 2)."""
        shape = (len(indices), 2, self.block_size)
        tokens, targets = np.full(shape, self.end_token), np.full(shape, IGNORE)
        for p, index in enumerate(indices):
            prompt, *responses = self.pairs[index]
            for side, response in enumerate(responses):
                both = np.array([*prompt, *response], dtype=np.int64)
                tokens[p, side, : len(both) - 1] = both[:-1]
                targets[p, side, len(prompt) - 1 : len(both) - 1] = response
        batch = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        return batch | {"reference": torch.from_numpy(self.reference[indices])}


def read_pairs(files: list[Path], template: str, tokenizer, s: LoopSettings) -> tuple[PairFile, PairFile]:
    """The pairs to train on and, of a twentieth of the prompts, those to validate with. Raises UserError."""
    end, (before, after) = tokenizer.eos_id(), template_tokens(template, tokenizer)
    blocks = read_blocks(files, pair_of, "reading pairs")
    items = [item for block in blocks for item in items_of(block, pair_of)]
    left_out = collections.Counter(reason for reason, pair in items if not pair)
    pairs = [pair for _, pair in items if pair]
    digests = {prompt: text_digest(prompt) for prompt, *_ in pairs}
    held_out = set(sorted(digests.values())[: max(1, len(digests) // 20)])
    splits: dict[str, list[tuple]] = {"train": [], "val": []}
    too_long = 0
    for prompt, *stories in pairs:
        instruction = [end, *before, *tokenizer.encode(prompt), *after]
        responses = [tokenizer.encode(story) + [end] * ended for story, ended in stories]
        if len(instruction) + max(map(len, responses)) - 1 > s.block_size:
            too_long += 1
        else:
            splits["val" if digests[prompt] in held_out else "train"].append((instruction, *responses))
    counts = ", ".join(f"{len(found):,} {split}" for split, found in splits.items())
    reasons = "".join(f", {n:,} left out ({reason})" for reason, n in left_out.items())
    if process_rank() == 0:
        print(f"{files[0]}: {counts} pairs, {too_long:,} left out (longer than {s.block_size} tokens){reasons}")
    mostly_left_out = left_out.total() > len(pairs)
    if not splits["train"] or not splits["val"] or mostly_left_out:
        why = f"{len(pairs):,} pairs{reasons}"
        if too_long and not mostly_left_out:
            why = f"{too_long:,} of {len(pairs):,} pairs are longer than {s.block_size} tokens; raise block_size"
        elif len(digests) == 1 and not mostly_left_out:
            why = f"all {len(pairs):,} pairs have the same prompt{reasons}; validation needs pairs of another one"
        raise UserError(f"{files[0]}: cannot be trained on: {why}")
    train_data, val_data = (PairFile(files[0], found, s.block_size, end, s.seed) for found in splits.values())
    return train_data, val_data


# ---------------------------------------------------------------------------------------------------
# The loss


def preference_loss(model, batch: dict, s: Settings) -> dict[str, torch.Tensor]:
    """The loss and other metrics, each summed over the pairs of a batch.

    With h = log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected):
    sigmoid  -log sigmoid(beta h) (Rafailov et al. 2023, equation 7), smoothed as in Mitchell 2023, equation 3
    ipo      (h - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, equation 17), each logarithm divided by the
             number of its story's tokens, as in its authors' code
    simpo    -log sigmoid(beta h - gamma), each logarithm divided in the same way, and without p_ref (Meng et al.
             2024, arXiv:2405.14734, equation 6)
    """
    tokens, targets = (batch[name].flatten(0, 1) for name in ("tokens", "targets"))  # (2P, T)
    log_p = -model(tokens, targets, reduction="per_sequence").view(-1, 2)  # (P, 2)
    lengths = (batch["targets"] != IGNORE).sum(dim=-1)  # (P, 2)
    gain = log_p - batch["reference"]  # (P, 2)
    per_token = log_p / lengths.clamp(min=1)  # (P, 2)
    compared = {"sigmoid": gain, "ipo": gain / lengths.clamp(min=1), "simpo": per_token}[s.loss]  # (P, 2)
    h = compared[:, 0] - compared[:, 1]  # (P,)
    margin = s.beta * h  # (P,)
    if s.loss == "ipo":
        losses = (h - 1 / (2 * s.beta)) ** 2  # (P,)
    else:
        x = margin - s.simpo_gamma if s.loss == "simpo" else margin
        losses = -(1 - s.label_smoothing) * F.logsigmoid(x) - s.label_smoothing * F.logsigmoid(-x)  # (P,)
    metrics = {"loss": losses - s.nll_weight * per_token[:, 0], "accuracy": (h > 0).float(), "margin": margin}
    metrics |= {"chosen_log_p": log_p[:, 0], "rejected_log_p": log_p[:, 1]}
    metrics |= {"kl": gain.square().mean(dim=1) / 2}  # from the reference (Schulman 2020, estimator k2)
    real = lengths[:, 0] > 0  # the last batch of validation may be padded
    return {name: (values * real).sum() for name, values in metrics.items()}


@torch.no_grad()
def reference_log_probs(model: GPT, data: PairFile, s: Settings) -> np.ndarray:
    """The log-probabilities of all stories, (pairs, 2), under the model before it is trained."""
    device, dtype = choose_device(s.device, s.dtype)
    model.to(device)
    log_probs = []
    for first in tqdm(range(0, len(data), s.batch_size), desc="reference", unit="batch", disable=None):
        batch = data.sequences(list(range(first, min(first + s.batch_size, len(data)))))
        tokens, targets = (batch[name].flatten(0, 1).to(device) for name in ("tokens", "targets"))  # (2P, T)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = model(tokens, targets, reduction="per_sequence")  # (2P,)
        log_probs.append(-losses.view(-1, 2).float().cpu().numpy())  # (P, 2)
    return np.concatenate(log_probs)


# ---------------------------------------------------------------------------------------------------
# A round


def pair_files(s: Settings, checkpoint: dict, tokenizer, out_dir: Path) -> list[Path]:
    """The files of pairs: the user's, those of an earlier run in out_dir, or new ones. Raises UserError."""
    if s.pairs:
        return find_inputs([s.pairs])
    path, source, folder = out_dir / "pairs.jsonl", Path(s.init_from), Path(s.data_dir)
    if path.exists():
        if process_rank() == 0:
            print(f"{path}: exists and is used as it is; remove it to make new pairs")
        return [path]
    if "RANK" in os.environ:
        raise UserError(f"{path}: not there; make the pairs first, in one process, with --make_pairs=True")
    meta, template, response_token, _ = open_examples(folder, source, checkpoint)
    if template != checkpoint["template"]:
        raise UserError(f"{folder}: prepared with another template than {source}'s; run prepare.py --task sft again")
    device, dtype = choose_device(s.device, s.dtype)
    policy = build_model(checkpoint, source).to(device, dtype).eval()
    block_size = policy.config.block_size
    examples = ExampleFile(folder / "train.bin", meta, response_token, block_size, block_size)
    make_pairs(path, policy, tokenizer, examples, s)
    return [path]


def add_reference(data: PairFile, model: GPT, path: Path, s: Settings) -> None:
    """Fill data.reference, from the file `path` if an earlier run has left it."""
    if len(data) and path.exists():
        data.reference = np.load(path, mmap_mode="r")
    elif len(data):
        data.reference = reference_log_probs(model, data, s)
        if process_rank() == 0:
            with atomic_write(path) as f:
                np.save(f, data.reference)


def tune(s: Settings) -> bool:
    """One round: get pairs, compute the reference's log-probabilities once, and train.

    Returns whether another round may follow. Raises UserError.
    """
    out_dir, source = Path(s.out_dir), Path(s.init_from)
    checkpoint = read_checkpoint(source)
    tokenizer, template = load_tokenizer(checkpoint["tokenizer"], source), checkpoint.get("template")
    if not template:
        raise UserError(f"{source}: has not learned to follow instructions; give a checkpoint of sft.py")
    model = build_model(checkpoint, source)
    if s.block_size > model.config.block_size:
        raise UserError(f"block_size = {s.block_size}: {source} reads at most {model.config.block_size} tokens")
    out_dir.mkdir(parents=True, exist_ok=True)
    files = pair_files(s, checkpoint, tokenizer, out_dir)
    if s.make_pairs:
        return False
    train_data, val_data = read_pairs(files, template, tokenizer, s)
    # The reference is asked before training begins: no second model stays in memory.
    identity = hashlib.sha256(repr((s.block_size, s.dtype)).encode())
    for part in (*(file.read_bytes() for file in files), *(w.numpy() for w in checkpoint["model"].values())):
        identity.update(part)
    for split, data in (("train", train_data), ("val", val_data)):
        add_reference(data, model, out_dir / f"reference_{split}_{identity.hexdigest()[:16]}.npy", s)
    metadata = {"tokenizer": checkpoint["tokenizer"], "template": template, "preferences": identity.hexdigest()}
    if s.resume and (newest := newest_checkpoint(out_dir)):
        model = build_model(newest[1], newest[0])
    if s.lora_rank:
        add_lora(model, s.lora_rank, s.lora_alpha)
        metadata["lora"] = {"rank": s.lora_rank, "alpha": s.lora_alpha}
    pairs = val_data.pairs or train_data.pairs
    prompt = pairs[0][0] if pairs else None
    return train(s, model, train_data, val_data, metadata, functools.partial(preference_loss, s=s), prompt)


def main() -> None:
    s = load_settings(sys.argv[1:], Settings, __doc__)
    with processes(s):
        init_from, seed = s.init_from, s.seed
        for number in range(1, s.rounds + 1):
            last = number == s.rounds  # it writes to out_dir itself, the rounds before to folders in it
            out_dir = s.out_dir if last else f"{s.out_dir}/round_{number}"
            settings = {"out_dir": out_dir, "init_from": init_from, "seed": seed + 1000 * (number - 1)}
            if not tune(dataclasses.replace(s, **settings)):
                break
            init_from = out_dir


if __name__ == "__main__":
    run(main)
