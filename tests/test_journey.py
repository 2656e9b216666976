"""docs/journey.md and journey.zh.md: their commands run, in order, and the functions and files they name are
there.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest
from conftest import ROOT, TINY, script_here

TEXTS = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("journey.md", "journey.zh.md")}
NEEDS = {
    "tools.plot": ["matplotlib"],
    "tools.export": ["safetensors"],
    "transformers": ["transformers", "safetensors"],
}


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text):
    """What stands outside the blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def chapters(text):
    return re.split(r"^## (?=\d)", text, flags=re.MULTILINE)[1:]


def names_in(text):
    """The (file, name) pairs that a text says to open."""
    return re.findall(r"`([\w/]+\.py): ([\w.]+)`", text)


COMMANDS = blocks(TEXTS["journey.md"], "bash")


# ---- The two texts ---------------------------------------------------------------------------------


def test_both_languages_have_the_same():
    english, chinese = map(chapters, TEXTS.values())
    assert len(english) == len(chinese) == 8
    for ours, theirs in zip(english, chinese, strict=True):
        for kind in ("bash", "text"):
            assert blocks(ours, kind) == blocks(theirs, kind)
        assert names_in(ours) == names_in(theirs)
        assert re.findall(r"figures/[\w.]+", ours) == re.findall(r"figures/[\w.]+", theirs)


@pytest.mark.parametrize("name", TEXTS)
def test_every_chapter_has_its_parts(name):
    for number, text in enumerate(chapters(TEXTS[name]), 1):
        title = text.split("\n", 1)[0]
        assert title.startswith(f"{number}. ") and title[-1] in "?？"
        first = prose(text).split("\n\n")[1]
        assert first.startswith(("**Open** `", "**打开** `")) and names_in(first)
        assert blocks(text, "bash")
        assert len(
            re.findall(r"^```bash\n[^`]*^```\n\n```text\n[^`]+^```$", text, re.MULTILINE)
        ) == text.count("```bash")
        tasks = re.split(r"^\*\*(?:Exercises|练习)\*\*$", text, flags=re.MULTILINE)[1]
        items = re.split(r"^\d\. ", tasks, flags=re.MULTILINE)[1:]
        assert len(items) == 2
        assert all(len(re.findall(r"\*(?:Hint|提示)\*[:：]", item)) == 1 for item in items)


@pytest.mark.parametrize("name", TEXTS)
def test_what_it_names_is_there(name):
    found = names_in(TEXTS[name])
    assert len(found) > 20
    for file, dotted in found:
        node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for part in dotted.split("."):
            inside = {n.name: n for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
            assert part in inside, f"{file}: {dotted}"
            node = inside[part]
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[name]):
        assert (ROOT / "docs" / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_all_commands_stand_in_blocks_and_all_code_in_the_scripts(text):
    assert not re.findall(r"`(?:python|torchrun) [^`]*`", prose(text))  # each would go without a test
    assert not re.findall(r"^(?:    |\t)\S", prose(text), re.MULTILINE)  # another kind of block
    assert not re.findall(r"^```(?!bash$|text$|$)", text, re.MULTILINE)
    assert not re.findall(r"^\s*(?:def|class) ", text, re.MULTILINE)


# ---- The commands ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tiny_data, tiny_sft, pretrained, tuned, tmp_path_factory):
    """The project after runs/demo.sh, but with a tiny model on few stories."""
    folder = tmp_path_factory.mktemp("journey") / "project"
    for part in ("common", "config", "stories", "tools"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    made = {
        "data/demo": tiny_data,
        "data/demo_sft": tiny_sft,
        "out/demo": pretrained.parent,
        "out/demo_sft": tuned,
    }
    for name, there in made.items():
        shutil.copytree(there, folder / name)
    shutil.copy(tiny_data.parent / "stories.jsonl", folder / "data")
    config, tiny = folder / "config" / "demo.py", TINY | {"block_size": 256}
    others = [x for x in config.read_text(encoding="utf-8").splitlines() if x.split(" = ")[0] not in tiny]
    config.write_text(
        "\n".join([*others, *(f"{key} = {value!r}" for key, value in tiny.items())]), encoding="utf-8"
    )
    return folder


def run_here(command, folder):
    """What the command printed. Python's commands run in this process, which spares the seconds it takes to
    start.
    """
    assert not set("$`\\!") & set(command)  # which a shell would read otherwise than shlex does
    words = shlex.split(command)
    if words[:2] == ["python", "-c"] and len(words) == 3:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(words[2], command, "exec"), {"__name__": "__main__"})
        return out.getvalue()
    if words[0] == "python":
        script, *args = words[2:] if words[1] == "-m" else words[1:]
        done = script_here(importlib.import_module(script.removesuffix(".py")).main, script, *args)
    else:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def serve(command, folder):
    """What it says as it starts, once it has given a visitor its page and ended by Ctrl-C."""
    words = [*shlex.split(command)[1:], "--port", "0"]  # 8000 may be taken here
    with subprocess.Popen([sys.executable, *words], cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        late = threading.Timer(60, server.kill)
        late.start()
        said = server.stdout.readline()
        with urllib.request.urlopen(re.search(r"http://\S+", said)[0], timeout=20) as page:
            assert page.status == 200
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
        late.cancel()
    return said


def test_commands(demo, monkeypatch):
    """In the order of the text, as one test: some take up what those before have left."""
    monkeypatch.chdir(demo)
    for command in COMMANDS:
        needed = [package for part, packages in NEEDS.items() if part in command for package in packages]
        if all(map(importlib.util.find_spec, needed)):
            assert (serve if "tools.serve" in command else run_here)(command, demo).strip(), command
