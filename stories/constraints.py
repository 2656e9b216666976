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


def clean(text: str) -> str:
    """Unicode NFC, line ends as \\n, no white space around. Raises UnicodeEncodeError for a lone surrogate."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    text.encode()  # JSON can spell half of a surrogate pair, which no file can store
    return text


def split_list(value: str) -> list[str]:
    """The words of 词汇, or the features of 特点."""
    return [" ".join(word.split()) for word in re.split("[，,、]", value) if word.strip()]


def write_constraints(constraints: dict[str, str]) -> str:
    """The text of an instruction: one line for each constraint that is not empty, in the order given."""
    lines = []
    for name, value in constraints.items():
        value = "，".join(split_list(value)) if name in ("词汇", "特点") else " ".join(value.split())
        lines += [f"{name}：{value}"] if value else []
    return "\n".join(lines)


def read_constraints(text: str) -> dict[str, str] | None:
    """The constraints of an instruction, with normalised names; None if it holds anything else."""
    constraints = {}
    for line in text.strip().splitlines():
        name, *rest = (part.strip() for part in re.split("[：:]", line, maxsplit=1))
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
