"""Write the embedded corpus: expand the hand-written plots of stories/plots into micro-stories.

    python -m stories.generate --out data/stories.jsonl

stories/README.md explains the format of a plot. The same plots give the same bytes on every computer: the
only source of randomness is `random.Random.random`, whose sequence Python guarantees.
"""

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from common.files import Parser, atomic_write, report_errors

HERE = Path(__file__).parent
MIN_CHARS, MAX_CHARS = 120, 300
SKEW = 6.0  # of four variants the first is drawn 8 times in 10: some are common, some rare, as in real text
FEATURES = ("对话", "转折", "坏结局", "寓意", "伏笔", "冲突")
CHOICE = re.compile(r"\[([^\[\]]*)\]")  # [快|慢]: the innermost brackets
SLOT = re.compile(r"\{([^{}.]+)(?:\.([^{}]+))?\}")  # {A}, {A.家}, {物}
GUARD = re.compile(r"<([^<>]*)>\s*")
TAG = re.compile(r"\s*#(\S+)")


@dataclass
class Variant:
    """One text of a beat: when it may be used, what it says, which features it adds."""

    guards: list[str]
    text: str
    features: list[str]


@dataclass
class Plot:
    name: str
    cast: dict[str, list[str]] = field(default_factory=dict)  # hero letter -> groups to draw from
    slots: list[tuple[list[str], list[list[str]]]] = field(default_factory=list)  # columns, rows
    features: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    summaries: list[Variant] = field(default_factory=list)
    beats: list[list[Variant]] = field(default_factory=list)


def write_corpus(path: Path, count: int = 24_000) -> None:
    """Write the corpus as JSON lines. The file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as f:
        for story in stories(count):
            f.write(json.dumps(story, ensure_ascii=False).encode() + b"\n")


def stories(count: int, seed: int = 0):
    """Yield `count` distinct stories of MIN_CHARS to MAX_CHARS characters, all plots in equal parts."""
    names, animals = read_cast()
    plots = read_plots()
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        story = make_story(rng, pick(rng, plots), names, animals)
        text = story["story_zh"]
        complete = MIN_CHARS <= len(text) <= MAX_CHARS and len(story["instruction"]["words"]) == 3
        if complete and text not in seen:
            seen.add(text)
            yield story


def pick(rng: random.Random, options: list, skew: float = 1.0):
    """Draw one of the options: each as likely as the others, or with skew > 1 the first ones more likely."""
    # Not rng.choice: Python guarantees only the sequence of random().
    return options[int(rng.random() ** skew * len(options))]


# ---- From a plot to a story ------------------------------------------------------------------------


def make_story(rng: random.Random, plot: Plot, names: dict, animals: dict, skew: float = SKEW) -> dict:
    """Expand one plot into one story, a record in TinyStoriesChinese's schema."""
    taken: set[str] = set()  # names and kinds of the heroes
    values: dict = {}  # what stands in a slot: a text, or a hero
    facts: set[str] = set()  # what guards ask for
    for letter, groups in plot.cast.items():
        hero = draw_hero(rng, groups, names, animals, taken)
        values[letter] = hero
        facts.add(letter + hero["类别"])
        facts.add(letter + hero["种类"])
    for columns, rows in plot.slots:
        row = pick(rng, rows)
        values.update(zip(columns, row, strict=True))
        facts.update(row)

    features = set(plot.features)
    story = ""
    for beat in plot.beats:
        story += expand(rng, beat, values, facts, features, skew)
    if "“" in story:
        features.add("对话")
    words = [word for word in plot.words if word in story]
    sentences = re.findall(r"[^。！？“”]+[。！？]", story)
    sentences = [sentence for sentence in sentences if 8 <= len(sentence) <= 40]
    # What a story is about occurs often: the weight of a word is its count squared (Efraimidis and Spirakis
    # 2006).
    words.sort(key=lambda word: -(rng.random() ** (1 / story.count(word) ** 2)))
    summary = expand(rng, plot.summaries, values, facts, features, skew)
    sentence = ""
    if sentences:
        sentence = pick(rng, sentences)
    return {
        "story_zh": story,
        "summary_zh": summary,
        "instruction": {"words": words[:3], "features": [name for name in FEATURES if name in features]},
        "sentence_zh": sentence,
        "source": plot.name,
    }


def draw_hero(rng: random.Random, groups: list[str], names: dict, animals: dict, taken: set) -> dict:
    """Draw one character. Its name and kind are added to `taken`, which holds those in the story."""
    while True:
        group = pick(rng, groups)
        if group == "孩子":
            hero = draw_child(rng, names)
            own = {hero["名"]}
        else:
            hero = draw_animal(rng, pick(rng, animals[group]), names)
            own = {hero["名"], hero["种类"]}
        if own.isdisjoint(taken):
            taken.update(own)
            return hero


def draw_child(rng: random.Random, names: dict) -> dict:
    sex = pick(rng, ["男孩", "女孩"])
    name = pick(rng, names[sex])
    pronoun = "她"
    if sex == "男孩":
        pronoun = "他"
    introduction = pick(rng, [f"一个叫{name}的小{sex}", f"小{sex}{name}"])
    child = {"名": name, "种类": sex, "类别": "孩子", "介": introduction, "他": pronoun}
    return child | {"走": "走", "家": "家", "吃": "饼干", "手": "手", "妈": "妈妈", "爸": "爸爸"}


def draw_animal(rng: random.Random, animal: dict, names: dict) -> dict:
    kind = animal["种类"]
    name = kind
    introduction = f"一{animal['量']}{kind}"
    if rng.random() < 0.25:  # some animals have a personal name
        name = pick(rng, names["小名"])
        introduction = pick(rng, [f"一{animal['量']}叫{name}的{kind}", f"{kind}{name}"])
    return animal | {"名": name, "介": introduction, "他": "它"}


def expand(
    rng: random.Random, variants: list[Variant], values: dict, facts: set, features: set, skew: float
) -> str:
    """The text of a variant that fits the facts, or "". The variant's features are added to `features`."""
    fitting = [variant for variant in variants if fits(variant, facts)]
    if not fitting:
        return ""
    variant = pick(rng, fitting, skew)
    features.update(variant.features)
    text = variant.text
    choice = CHOICE.search(text)
    while choice:
        text = text[: choice.start()] + pick(rng, choice[1].split("|"), skew) + text[choice.end() :]
        choice = CHOICE.search(text)
    return SLOT.sub(lambda slot: value_of(slot, values), text)


def fits(variant: Variant, facts: set[str]) -> bool:
    """Whether every guard holds: <A孩子> asks for a fact, <!A孩子> for its absence."""
    for guard in variant.guards:
        if guard.startswith("!"):
            if guard[1:] in facts:
                return False
        elif guard not in facts:
            return False
    return True


def value_of(slot: re.Match, values: dict) -> str:
    """What {物}, {A} or {A.家} stands for."""
    value = values[slot[1]]
    if isinstance(value, dict):
        return value[slot[2] or "名"]
    return value


# ---- The hand-written material ---------------------------------------------------------------------


def read_cast(path: Path = HERE / "cast.txt") -> tuple[dict, dict]:
    """Return (names by list, animals by group); an animal is a dict of the table's columns."""
    names: dict[str, list[str]] = {}
    animals: dict[str, list[dict[str, str]]] = {}
    columns = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            kind, values = line[1:].split("]")
            names[kind] = values.split()
        elif columns is None:
            columns = line.split()
        else:
            animal = dict(zip(columns, line.split(), strict=True))
            animals.setdefault(animal["类别"], []).append(animal)
    return names, animals


def read_plots(folder: Path = HERE / "plots") -> list[Plot]:
    """Parse every plot file, in the order of the files' names."""
    plots: list[Plot] = []
    for path in sorted(folder.glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            line = line.strip()
            if not line or line.startswith("//"):
                continue
            if line.startswith("== "):
                plot = Plot(line[3:])
                plots.append(plot)
            elif line == "summary":
                block = plot.summaries
            elif line == "beat":
                block = []
                plot.beats.append(block)
            elif line.startswith("- "):
                block.append(read_variant(line))
            elif line.startswith("features:"):
                plot.features = line.removeprefix("features:").split()
            elif line.startswith("words:"):
                plot.words = line.removeprefix("words:").split()
            elif re.fullmatch(r"[A-Z] = .+", line):
                letter, groups = line.split(" = ")
                plot.cast[letter] = groups.split()
            else:
                columns, rows = line.split(" = ")
                plot.slots.append((columns.split(), [row.split() for row in rows.split("|")]))
    return plots


def read_variant(line: str) -> Variant:
    """A line such as "- <A孩子> {A}笑了。 #对话": guards, a text and its features."""
    guards = " ".join(GUARD.findall(line)).split()
    text = TAG.sub("", GUARD.sub("", line[2:]))
    return Variant(guards, text, TAG.findall(line))


def main() -> None:
    parser = Parser(description="Write the embedded corpus.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="write the corpus to this file")
    parser.add_argument("--count", type=int, default=24_000)
    args = parser.parse_args()
    write_corpus(args.out, args.count)


if __name__ == "__main__":
    report_errors(main)
