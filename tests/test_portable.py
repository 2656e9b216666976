"""What is missing on other systems: fcntl and resource (Windows), a console that is not UTF-8.

Windows itself was not tried: these runs are on the system at hand, without those modules, and start their
workers as Windows does. An open() that leaves the encoding to the system is an error in them.
"""

import json
import os

import pytest
from helpers import metrics_of, run_script, tiny

BLOCKED = """
import multiprocessing, sys
sys.modules.update(fcntl=None, resource=None)
multiprocessing.set_start_method("spawn")
"""


@pytest.fixture
def windows(tmp_path):
    """The environment of such a run."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    return {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "PYTHONIOENCODING": "gbk",
        "PYTHONWARNDEFAULTENCODING": "1",
        "PYTHONWARNINGS": "error::EncodingWarning",
    }


def test_prepare_train_and_sample_without_fcntl_and_resource(windows, tmp_path):
    def run(*args, check=True):
        done = run_script(*args, text=False, check=check, **windows)
        return (done.stdout + done.stderr).decode("gbk")

    assert "ModuleNotFoundError" in run("-c", "import fcntl", check=False)  # they are really missing
    stories = tmp_path / "猫😀.jsonl"
    data = tmp_path / "data"
    prepare = ("prepare.py", stories, f"--out_dir={data}", "--vocab_size=400", "--val_fraction=0.2")
    assert "猫\\U0001f600.jsonl: no such file" in run(*prepare, check=False)
    records = [json.dumps({"story_zh": f"第{i}天，小狗捡到了{i}个苹果😀。"}) for i in range(200)]
    stories.write_text("\n".join(records), encoding="utf-8")
    run(*prepare, "--workers=2")
    out = tmp_path / "out"
    run("train.py", *tiny(data_dir=data, out_dir=out, sample_interval=6))
    assert metrics_of(out)[-1]["step"] == 12
    assert run("sample.py", "--ckpt", out, "--prompt=第", "--num=2").count("第") >= 2
