"""Write the embedded corpus: expand the hand-written plots of stories/plots into micro-stories.

    python -m stories.generate --out data/stories.jsonl

stories/README.md explains the format of a plot. The same plots give the same bytes on every computer: the only source
of randomness is `random.Random.random`, whose sequence Python guarantees.
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
        for line in map(str.strip, path.read_text(encoding="utf-8").splitlines()):
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
                guards = [g for guard in GUARD.findall(line) for g in guard.split()]
                block.append(Variant(guards, TAG.sub("", GUARD.sub("", line[2:])), TAG.findall(line)))
            elif line.startswith(("features:", "words:")):
                setattr(plot, line.split(":")[0], line.split(":", 1)[1].split())
            elif re.fullmatch(r"[A-Z] = .+", line):
                plot.cast[line[0]] = line[4:].split()
            else:
                columns, rows = line.split(" = ")
                plot.slots.append((columns.split(), [row.split() for row in rows.split("|")]))
    return plots


def pick(rng: random.Random, options: list, skew: float = 1.0):
    """Draw one of the options: each as likely as the others, or with skew > 1 the first ones more likely."""
    # Not rng.choice: Python guarantees only the sequence of random().
    return options[int(rng.random() ** skew * len(options))]


def draw_hero(rng: random.Random, groups: list[str], names: dict, animals: dict, taken: set) -> dict:
    """Draw one character. `taken` holds the names and kinds already in the story."""
    while True:
        group = pick(rng, groups)
        if group == "孩子":
            sex = pick(rng, ["男孩", "女孩"])
            name = kind = pick(rng, names[sex])
            hero = {"名": name, "种类": sex, "他": "他" if sex == "男孩" else "她", "走": "走", "家": "家"}
            hero |= {"介": pick(rng, [f"一个叫{name}的小{sex}", f"小{sex}{name}"]), "吃": "饼干", "手": "手"}
            hero |= {"妈": "妈妈", "爸": "爸爸", "类别": "孩子"}
        else:
            animal = pick(rng, animals[group])
            name = kind = animal["种类"]
            intro = f"一{animal['量']}{kind}"
            if rng.random() < 0.25:  # some animals have a personal name
                name = pick(rng, names["小名"])
                intro = pick(rng, [f"一{animal['量']}叫{name}的{kind}", f"{kind}{name}"])
            hero = animal | {"名": name, "介": intro, "他": "它"}
        if not {name, kind} & taken:
            taken |= {name, kind}
            return hero


def make_story(rng: random.Random, plot: Plot, names: dict, animals: dict, skew: float = SKEW) -> dict:
    """Expand one plot into one story, a record in TinyStoriesChinese's schema."""
    taken, values, facts = set[str](), {}, set()
    for letter, groups in plot.cast.items():
        hero = values[letter] = draw_hero(rng, groups, names, animals, taken)
        facts |= {letter + hero["类别"], letter + hero["种类"]}
    for columns, rows in plot.slots:
        row = pick(rng, rows)
        values |= dict(zip(columns, row, strict=True))
        facts |= set(row)

    features = set(plot.features)

    def fill(match: re.Match) -> str:
        value = values[match[1]]
        return value[match[2] or "名"] if isinstance(value, dict) else value

    def expand(variants: list[Variant]) -> str:
        fits = [t for t in variants if all((g[0] != "!") == (g.lstrip("!") in facts) for g in t.guards)]
        if not fits:
            return ""
        variant = pick(rng, fits, skew)
        features.update(variant.features)
        text = variant.text
        while CHOICE.search(text):
            text = CHOICE.sub(lambda m: pick(rng, m[1].split("|"), skew), text, count=1)
        return SLOT.sub(fill, text)

    story = "".join(expand(beat) for beat in plot.beats)
    if "“" in story:
        features.add("对话")
    words = [w for w in plot.words if w in story]
    sentences = [s for s in re.findall(r"[^。！？“”]+[。！？]", story) if 8 <= len(s) <= 40]
    # What a story is about occurs often: the weight of a word is its count squared (Efraimidis and Spirakis 2006).
    required = sorted(words, key=lambda w: -(rng.random() ** (1 / story.count(w) ** 2)))[:3]
    return {
        "story_zh": story,
        "summary_zh": expand(plot.summaries),
        "instruction": {"words": required, "features": [f for f in FEATURES if f in features]},
        "sentence_zh": pick(rng, sentences) if sentences else "",
        "source": plot.name,
    }


def stories(count: int, seed: int = 0):
    """Yield `count` distinct stories of MIN_CHARS to MAX_CHARS characters, all plots in equal parts."""
    (names, animals), plots = read_cast(), read_plots()
    rng, seen = random.Random(seed), set[str]()
    while len(seen) < count:
        story = make_story(rng, pick(rng, plots), names, animals)
        text = story["story_zh"]
        if text not in seen and MIN_CHARS <= len(text) <= MAX_CHARS and len(story["instruction"]["words"]) == 3:
            seen.add(text)
            yield story


def write_corpus(path: Path, count: int = 24_000) -> None:
    """Write the corpus as JSON lines. The file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as f:
        for story in stories(count):
            f.write(json.dumps(story, ensure_ascii=False).encode() + b"\n")


def main() -> None:
    parser = Parser(description="Write the embedded corpus.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="write the corpus to this file")
    parser.add_argument("--count", type=int, default=24_000)
    args = parser.parse_args()
    write_corpus(args.out, args.count)


if __name__ == "__main__":
    report_errors(main)
