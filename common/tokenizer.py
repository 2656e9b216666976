"""Text to tokens: cleaning, the SentencePiece tokenizer, and the template that frames an instruction."""

import hashlib
import re
import unicodedata
from pathlib import Path

import sentencepiece

from common.settings import UserError

# Control tokens frame the two parts. Text never becomes one of them, so no instruction can forge a response.
CONTROL_TOKENS = ["<|user|>", "<|assistant|>"]
TEMPLATE = "<|user|>{instruction}<|assistant|>{response}"


def clean(text: str) -> str:
    """Unicode NFC, line ends as \\n, no white space around. Raises UnicodeEncodeError for a lone surrogate."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    text.encode()  # JSON can spell half of a surrogate pair, which no file can store
    return text


def text_digest(*texts: str) -> int:
    """A number below 2**64 that is as if random but always the same for the same texts.

    It finds duplicates and decides which split a text belongs to. (That any two of 4 million texts share one has a
    probability of 1 in 2 million.)
    """
    lengths = [str(len(text)) for text in texts[:-1]]  # where one text ends and the next begins
    hashed = hashlib.blake2b("".join([*lengths, *texts]).encode(), digest_size=16, key=b"split 1337").digest()
    return int.from_bytes(hashed[:8], "big")


def load_tokenizer(model: bytes, name: str | Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model from its bytes. Raises UserError naming `name` if it cannot be used."""
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


def template_for(tokenizer) -> str:
    """TEMPLATE; for a tokenizer without our control tokens, a template with its own begin token."""
    if all(tokenizer.is_control(tokenizer.piece_to_id(piece)) for piece in CONTROL_TOKENS):
        return TEMPLATE
    if tokenizer.bos_id() < 0 or not tokenizer.is_control(tokenizer.bos_id()):
        raise UserError("this tokenizer has no control token that could mark where an instruction ends")
    return "{instruction}" + tokenizer.id_to_piece(tokenizer.bos_id()) + "{response}"


def template_tokens(template: str, tokenizer) -> tuple[list[int], list[int]]:
    """The control tokens of a template: those before the instruction, and the one before the response."""
    parts = re.fullmatch(r"(.*)\{instruction\}(.+)\{response\}", str(template))
    if not parts:
        raise UserError(f"the template {template!r} is not one: expected …{{instruction}}…{{response}}")
    ids = [tokenizer.piece_to_id(piece) for piece in parts.groups() if piece]
    if not all(map(tokenizer.is_control, ids)):
        raise UserError(f"the template {template!r} names control tokens that its tokenizer does not have")
    return ids[:-1], ids[-1:]
