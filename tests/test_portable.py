"""What is missing on other systems: fcntl and resource (Windows), a console that is not UTF-8. Windows itself
was not tried: these runs are on the system at hand, without those modules, and start their workers as Windows
does."""

import json
import os

import pytest
from conftest import TINY, metrics_of, run_script

BLOCKED = """
import multiprocessing, sys
sys.modules.update(fcntl=None, resource=None)
multiprocessing.set_start_method("spawn")
"""


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """The environment of a run without fcntl and resource, on a console in GBK."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "sitecustomize.py").write_text(BLOCKED)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "PYTHONIOENCODING": "gbk"}


def test_prepare_train_and_sample_without_fcntl_and_resource(windows, tmp_path):
    stories = [f"第{i}天，小狗捡到了{i}个苹果😀。" for i in range(200)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"story_zh": s}) + "\n" for s in stories), encoding="utf-8")
    done = run_script("-c", "import fcntl", check=False, **windows)
    assert done.returncode and "ModuleNotFoundError" in done.stderr  # they are really missing
    data, out = tmp_path / "data", tmp_path / "out"
    run_script("prepare.py", file, "--out_dir", data, "--vocab_size", 400, "--val_fraction", 0.2, "--workers", 2,
               text=False, **windows)  # fmt: skip
    settings = TINY | {"data_dir": data, "out_dir": out, "sample_interval": 6}
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    run_script("train.py", *arguments, text=False, **windows)
    assert metrics_of(out)[-1]["step"] == 12
    done = run_script("train.py", *arguments, "--resume=True", "--max_iters=16", text=False, **windows)
    assert "resuming at step 12" in done.stdout.decode("gbk")
    done = run_script("sample.py", "--ckpt", out, "--prompt", "第", "--num", 2, text=False, **windows)
    assert done.stdout.decode("gbk").count("第") >= 2


def test_characters_that_the_console_does_not_have(windows, tmp_path):
    """An emoji is printed as its code, in output and in an error, instead of a traceback."""
    code = "import prepare; prepare.report_errors(lambda: print('猫😀'))"
    assert run_script("-c", code, text=False, **windows).stdout.decode("gbk").strip() == "猫\\U0001f600"
    done = run_script(
        "prepare.py", tmp_path / "猫😀.jsonl", "--out_dir", tmp_path / "x", text=False, check=False, **windows
    )
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and b"Traceback" not in done.stderr


def test_text_files_are_opened_as_utf8(tmp_path):
    """No open() of the program leaves the encoding to the system: Python can make each such call an error."""
    stories = "".join(json.dumps({"story_zh": f"第{i}天，小狗走了。"}) + "\n" for i in range(50))
    (tmp_path / "a.jsonl").write_text(stories, encoding="utf-8")
    strict = ("-X", "warn_default_encoding", "-W", "error::EncodingWarning")
    code = "import sys, sentencepiece, prepare; prepare.report_errors(prepare.main)"
    run_script(*strict, "-c", code, tmp_path / "a.jsonl", "--out_dir", tmp_path / "x", "--vocab_size", 300,
               "--val_fraction", 0.2)  # fmt: skip
    run_script(*strict, "-m", "stories.generate", "--out", tmp_path / "b.jsonl", "--count", 50)
