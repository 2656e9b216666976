"""The shape of the tree: the scripts at the top, and how deep imports go."""

import ast
import functools
import subprocess

import pytest
from conftest import ROOT, assert_one_line_error, run_script

SCRIPTS = ["model.py", "prepare.py", "sample.py", "sft.py", "train.py"]


def imports(path):
    """The files of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    return {p for p in found if p.exists()}


@functools.cache
def chain(path):
    """The longest chain of imports from a file down, the file included."""
    return [path.name, *max((chain(p) for p in sorted(imports(path))), key=len, default=[])]


def test_the_top_level_is_the_five_scripts():
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    assert sorted(p for p in listed if "/" not in p) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_go_six_files_deep_at_most(script):
    assert len(chain(ROOT / script)) <= 6, " > ".join(chain(ROOT / script))


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_pretraining_and_sampling_need_no_later_stage_and_no_preparing(script):
    reached, left = set(), [ROOT / script]
    while left:
        path = left.pop()
        left += imports(path) - reached
        reached |= imports(path)
    assert not {"prepare.py", "sft.py", "dpo.py"} & {p.name for p in reached}


@pytest.mark.parametrize("tool", sorted(p.stem for p in (ROOT / "tools").glob("*.py") if p.stem != "common"))
def test_a_tool_started_as_a_file_says_how(tool):
    """`python tools/eval.py` does not find the packages beside tools/: one line instead of a traceback."""
    done = run_script(f"tools/{tool}.py", check=False)
    assert_one_line_error(done, f"python -m tools.{tool}")


def test_sampling_does_not_load_the_compiler(pretrained):
    """It takes a second, which only --compile has a use for."""
    code = "import sys, sample\nsample.report_errors(sample.main)\nassert 'torch._dynamo' not in sys.modules"
    done = run_script("-c", code, "--ckpt", pretrained, "--num", 2, "--max_new_tokens", 5, "--device", "cpu",
                      PYTHONUTF8="1")  # a Python of its own (tests/launcher.py)  # fmt: skip
    assert done.stdout
