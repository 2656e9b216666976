"""The text of instructions: clean Unicode; constraints, in the words of TinyStoriesChinese; and the template
around it.

One constraint a line, in any order and any number:

    词汇：铲子，草地
    特点：转折，对话
    摘要：……
    随机句子：……
"""

import re
import unicodedata

from common.files import UserError

NAMES = {
    "词汇": "words",
    "特点": "features",
    "摘要": "summary",
    "随机句子": "sentence",
}  # and sample.py's options
SYNONYMS = {  # other translations of the original's labels
    "关键词": "词汇",
    "单词": "词汇",
    "词语": "词汇",
    "特征": "特点",
    "故事特点": "特点",
    "总结": "摘要",
    "概要": "摘要",
    "随机句": "随机句子",
    "随机的句子": "随机句子",
}


# What nobody sees: white space, control characters, and what Unicode calls default ignorable (UAX #44).
# Selectors change the character before them, as in many emoji: they may end a text, but not begin it.
UNSEEN_RANGES = [
    (0, 0x20),
    (0x7F, 0xA0),
    (0x2000, 0x200F),
    (0x2028, 0x202F),
    (0x205F, 0x206F),
    (0xFFF0, 0xFFFB),
]
UNSEEN_RANGES += [(0x1D173, 0x1D17A)]
UNSEEN = "\xad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180e\u2800\u3000\u3164\ufeff\uffa0"
SELECTOR_RANGES = [(0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0000, 0xE01EF)]
SELECTORS = ""
for first, last in UNSEEN_RANGES:
    UNSEEN += "".join(map(chr, range(first, last + 1)))
for first, last in SELECTOR_RANGES:
    SELECTORS += "".join(map(chr, range(first, last + 1)))


def strip(text: str) -> str:
    """The text without what nobody sees at its ends."""
    return text.lstrip(UNSEEN + SELECTORS).rstrip(UNSEEN)


def clean(text: str) -> str:
    """Unicode NFC, line ends as \\n, nothing unseen around. Raises UnicodeEncodeError."""
    text = strip(unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")))
    text.encode()  # JSON can spell half of a surrogate pair, which no file can store
    return text


def split_list(value: str) -> list[str]:
    """The words of 词汇, or the features of 特点."""
    words = re.split("[，,、；;]", value)
    return [strip(" ".join(word.split())) for word in words if strip(word)]


def write_constraints(constraints: dict[str, str]) -> str:
    """The text of an instruction: one line for each constraint that is not empty, in the order given."""
    lines = []
    for name, value in constraints.items():
        if name in ("词汇", "特点"):
            value = "，".join(split_list(value))
        else:
            value = strip(" ".join(value.split()))
        if value:
            lines.append(f"{name}：{value}")
    return "\n".join(lines)


def read_constraints(text: str) -> dict[str, str] | None:
    """The constraints of an instruction, with normalised names; None if it holds anything else."""
    constraints = {}
    for line in strip(text).splitlines():
        label, *rest = re.split("[：:]", line, maxsplit=1)
        value = strip("".join(rest))
        name = SYNONYMS.get(strip(label), strip(label))
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
    ids = []
    if parts:
        ids = [tokenizer.piece_to_id(piece) for piece in parts.groups() if piece]
    if not ids or not all(tokenizer.is_control(token) for token in ids):
        raise UserError(
            f"the template {template!r} does not fit the tokenizer: …{{instruction}}…{{response}} expected"
        )
    return ids[:-1], ids[-1:]


def encode_prompt(tokenizer, template: str, instruction: str, beginning: str) -> list[int]:
    """The tokens of a prompt: an instruction in its template, and the beginning of the story.

    Raises UserError for text that is not Unicode.
    """
    try:
        instruction = clean(instruction)
        beginning = clean(beginning)
    except UnicodeEncodeError:
        raise UserError("the prompt is not UTF-8 text") from None
    tokens = [tokenizer.eos_id()]  # a story begins where another one has ended
    if instruction:
        before, after = template_tokens(template, tokenizer)
        tokens += before + tokenizer.encode(instruction) + after
    return tokens + tokenizer.encode(beginning)


def story_start(tokenizer, prompt: list[int]) -> int:
    """Where the beginning of the story is in a prompt: after the last control token."""
    control_positions = [i for i, token in enumerate(prompt) if tokenizer.is_control(token)]
    return control_positions[-1] + 1
