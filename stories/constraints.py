"""The text of instructions: clean Unicode; constraints, in the words of TinyStoriesChinese; and the template around it.

One constraint a line, in any order and any number:

    词汇：铲子，草地
    特点：转折，对话
    摘要：……
    随机句子：……
"""

import re
import unicodedata

from common.files import UserError

NAMES = {"词汇": "words", "特点": "features", "摘要": "summary", "随机句子": "sentence"}  # and sample.py's options
SYNONYMS = dict.fromkeys(("关键词", "单词", "词语"), "词汇")  # other translations of the original's labels
SYNONYMS |= dict.fromkeys(("特征", "故事特点"), "特点")
SYNONYMS |= dict.fromkeys(("总结", "概要"), "摘要")
SYNONYMS |= dict.fromkeys(("随机句", "随机的句子"), "随机句子")


# What nobody sees: white space, control characters, and what Unicode calls default ignorable (UAX #44).
# Selectors change the character before them, as in many emoji: they may end a text, but not begin it.
UNSEEN = "\xad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180e\u2800\u3000\u3164\ufeff\uffa0"
UNSEEN += "".join(map(chr, [*range(0x21), *range(0x7F, 0xA1), *range(0x2000, 0x2010), *range(0x2028, 0x2030)]))
UNSEEN += "".join(map(chr, [*range(0x205F, 0x2070), *range(0xFFF0, 0xFFFC), *range(0x1D173, 0x1D17B)]))
SELECTORS = "".join(map(chr, [*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0000, 0xE01F0)]))


def strip(text: str) -> str:
    """The text without what nobody sees at its ends."""
    return text.lstrip(UNSEEN + SELECTORS).rstrip(UNSEEN)


def clean(text: str) -> str:
    """Unicode NFC, line ends as \\n, nothing unseen around. Raises UnicodeEncodeError for a lone surrogate."""
    text = strip(unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")))
    text.encode()  # JSON can spell half of a surrogate pair, which no file can store
    return text


def split_list(value: str) -> list[str]:
    """The words of 词汇, or the features of 特点."""
    return [strip(" ".join(word.split())) for word in re.split("[，,、；;]", value) if strip(word)]


def write_constraints(constraints: dict[str, str]) -> str:
    """The text of an instruction: one line for each constraint that is not empty, in the order given."""
    lines = []
    for name, value in constraints.items():
        value = "，".join(split_list(value)) if name in ("词汇", "特点") else strip(" ".join(value.split()))
        lines += [f"{name}：{value}"] if value else []
    return "\n".join(lines)


def read_constraints(text: str) -> dict[str, str] | None:
    """The constraints of an instruction, with normalised names; None if it holds anything else."""
    constraints = {}
    for line in strip(text).splitlines():
        name, *rest = map(strip, re.split("[：:]", line, maxsplit=1))
        value = "".join(rest)
        name = SYNONYMS.get(name, name)
        if name not in NAMES or not value or name in constraints:
            return None
        constraints[name] = value
    return constraints or None


# Control tokens frame the two parts. Text never becomes one of them, so no instruction can forge a response.
CONTROL_TOKENS = ["<|user|>", "<|assistant|>"]
TEMPLATE = "<|user|>{instruction}<|assistant|>{response}"


def template_tokens(template: str, tokenizer) -> tuple[list[int], list[int]]:
    """The control tokens of a template: those before the instruction, and the one before the response.

    Raises UserError.
    """
    parts = re.fullmatch(r"(.*)\{instruction\}(.+)\{response\}", str(template))
    ids = [tokenizer.piece_to_id(piece) for piece in parts.groups() if piece] if parts else []
    if not ids or not all(map(tokenizer.is_control, ids)):
        raise UserError(f"the template {template!r} does not fit the tokenizer: …{{instruction}}…{{response}} expected")
    return ids[:-1], ids[-1:]
