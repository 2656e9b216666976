"""docs/journey.md and journey.zh.md: they say the same, what they name is there, their commands run."""

import ast
import contextlib
import importlib
import io
import re
import shlex
import shutil
import subprocess

import pytest
from helpers import ROOT, TINY, run_here

from common.checkpoint import read_checkpoint

ENGLISH = (ROOT / "docs" / "journey.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "docs" / "journey.zh.md").read_text(encoding="utf-8")
both_texts = pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])


def blocks(text, kind):
    return re.findall(rf"(?ms)^```{kind}\n(.*?)^```$", text)


def outside_blocks(text):
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def chapters(text):
    return re.split(r"^## (?=\d)", text, flags=re.MULTILINE)[1:]


def names_in(text):
    """The (file, name) pairs that a text says to open."""
    return re.findall(r"`([\w/]+\.py): ([\w.]+)`", text)


# ---- The two texts ---------------------------------------------------------------------------------


def same_in_all_languages(chapter):
    figures = re.findall(r"figures/[\w.]+", chapter)
    return blocks(chapter, "bash"), blocks(chapter, "text"), names_in(chapter), figures


def test_both_languages_have_the_same():
    english = [same_in_all_languages(chapter) for chapter in chapters(ENGLISH)]
    chinese = [same_in_all_languages(chapter) for chapter in chapters(CHINESE)]
    assert len(english) == 8
    assert english == chinese


@both_texts
def test_what_it_names_is_there(text):
    for file, dotted in names_in(text):
        node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for part in dotted.split("."):
            inside = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            assert part in inside, f"{file}: {dotted}"
            node = inside[part]
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / "docs" / link.partition("#")[0]).exists(), link


@both_texts
def test_commands_stand_in_blocks(text):
    prose = outside_blocks(text)
    assert not re.findall(r"`(?:python|torchrun) [^`]*`", prose)  # each would go without a test


# ---- The commands ----------------------------------------------------------------------------------


@pytest.fixture
def demo(tiny_data, tiny_sft, pretrained, tuned, tmp_path, monkeypatch):
    """The folder that runs/demo.sh leaves, but with a tiny model on few stories."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    settings = TINY | {"block_size": 256}
    lines = [f"{key} = {value!r}\n" for key, value in settings.items()]
    (tmp_path / "config" / "demo.py").write_text("".join(lines))
    shutil.copytree(tiny_data, tmp_path / "data" / "demo")
    shutil.copytree(tiny_sft, tmp_path / "data" / "demo_sft")
    shutil.copytree(pretrained.parent, tmp_path / "out" / "demo")
    shutil.copytree(tuned, tmp_path / "out" / "demo_sft")
    shutil.copy(tiny_data.parent / "stories.jsonl", tmp_path / "data")
    monkeypatch.chdir(tmp_path)


def output_of(command):
    """What a command prints. Python's run in this process, which spares the seconds it takes to start."""
    assert not set("$`\\!") & set(command)  # which a shell would read otherwise than shlex does
    words = shlex.split(command)
    if words[0] != "python":
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    if words[1] == "-c":
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(words[2], {})
        return out.getvalue()
    script, *args = [word for word in words[1:] if word != "-m"]
    module = importlib.import_module(script.removesuffix(".py"))
    return run_here(module, *args).stdout


def say_what_is_served(args):
    """Stands for the server, which test_serve.py tests."""
    print(read_checkpoint(args.ckpt)["step"])


def test_all_commands_run(demo, monkeypatch):
    """As one test, in the order of the text: some take up what those before have left."""
    monkeypatch.setattr("tools.serve.serve", say_what_is_served)
    for package in ("matplotlib", "safetensors", "transformers"):
        pytest.importorskip(package)
    for command in blocks(ENGLISH, "bash"):
        assert output_of(command).strip(), command
