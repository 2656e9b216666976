"""The tokenizer: a SentencePiece model, trained on the stories, or one that is there already."""

import io
from pathlib import Path

import sentencepiece

from errors import UserError
from instructions import CONTROL, NAMES
from stories.read import LONGEST


def load_tokenizer(model: bytes, name: str | Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model from its bytes. Raises UserError naming `name` when it cannot serve."""
    try:
        loaded = sentencepiece.SentencePieceProcessor(model_proto=model or b"empty")
    except (RuntimeError, ValueError):
        raise UserError(f"{name}: not a SentencePiece model") from None
    try:
        loaded.decode([[i] for i in range(loaded.vocab_size())])
        loaded.encode("从前 once")
    except (RuntimeError, ValueError, IndexError) as e:
        raise UserError(f"{name}: not a SentencePiece model that works ({str(e).splitlines()[0]})") from None
    if not 0 < loaded.vocab_size() <= 65536:
        raise UserError(f"{name}: {loaded.vocab_size():,} pieces; the uint16 token files hold at most 65,536")
    if loaded.eos_id() < 0 or not loaded.is_control(loaded.eos_id()):
        raise UserError(f"{name}: has no control token for the end of a text (eos)")
    return loaded


def train_tokenizer(texts, vocab_size: int) -> bytes:
    """Train a byte-fallback BPE (Sennrich et al. 2016, arXiv:1508.07909) and return the model's bytes."""
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
            required_chars="\u2581：" + "".join(NAMES),  # the space and instructions' labels, in no story perhaps
            # These four keep every character, so that decode(encode(story)) == story.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=LONGEST,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=CONTROL,
            minloglevel=2,
        )
    except RuntimeError as e:
        reason = str(e).rsplit("] ", 1)[-1].split(". ")[0]
        raise UserError(f"--vocab_size {vocab_size}: {reason}") from None
    return model.getvalue()
