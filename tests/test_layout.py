"""The shape of the tree: five scripts at the top, short chains of imports, and nothing loaded in vain."""

import functools
import re
import subprocess

import pytest
from helpers import ROOT, assert_one_line_error, run_script

SCRIPTS = ["model.py", "prepare.py", "sample.py", "sft.py", "train.py"]
IMPORT = re.compile(r"^ *(?:from|import) ([\w.]+)(?: import (\w+))?", re.MULTILINE)


def test_the_top_level_is_the_five_scripts():
    command = ["git", "ls-files", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    assert sorted(path for path in listed if "/" not in path) == SCRIPTS


@functools.cache
def imports(path):
    """The files of this project that a file imports, anywhere in it, in its order."""
    files = []
    for module, name in IMPORT.findall(path.read_text(encoding="utf-8")):
        for dotted in (module, f"{module}.{name}"):
            file = ROOT / f"{dotted.replace('.', '/')}.py"
            if file.exists():
                files.append(file)
    return files


def chain(path):
    """The longest chain of imports from a file down, the file included."""
    return [path.name, *max(map(chain, imports(path)), key=len, default=[])]


def needed(path):
    """The names of all files that a file needs, its own included."""
    return {path.name}.union(*map(needed, imports(path)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_go_six_files_deep_at_most(script):
    assert len(chain(ROOT / script)) <= 6, chain(ROOT / script)


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_pretraining_and_sampling_need_the_model_but_no_preparing_and_no_later_stage(script):
    assert needed(ROOT / script) & {"model.py", "prepare.py", "sft.py", "dpo.py"} == {"model.py"}


def test_a_tool_started_as_a_file_meets_the_hint_before_all_else():
    """In place of common/ `python tools/NAME.py` finds tools/common.py, which says how and ends."""
    for tool in (ROOT / "tools").glob("*.py"):
        if tool.stem != "common":
            assert imports(tool)[0].parent == ROOT / "common"


def test_a_tool_started_as_a_file_says_how():
    done = run_script("tools/plot.py", check=False)
    assert_one_line_error(done, "python -m tools.plot")


def test_sampling_does_not_load_the_compiler(pretrained):
    """It takes a second, which only --compile has a use for."""
    code = "import sys, sample\nsample.main()\nassert 'torch._dynamo' not in sys.modules"
    assert run_script("-c", code, "--ckpt", pretrained, "--max_new_tokens=5", "--device=cpu").stdout
