"""`logger`: TensorBoard and wandb show what metrics.jsonl holds.

The promises: every figure of every line, at its step, and once, though a run ended half way and was resumed;
only the first process logs; and one line says so where the package is missing.
"""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import assert_refused, run_here, run_script, tiny

import train
from common import run


def lines_in(folder):
    """The lines of metrics.jsonl, with that of the evaluation before the first step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- TensorBoard -----------------------------------------------------------------------------------


def shown(folder):
    """What TensorBoard shows of a run: [(name, step, value)], sorted."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    found = []
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.append((name, event.step, event.value))
    return sorted(found)


def logged(folder):
    """The same of metrics.jsonl, in the float32 that TensorBoard keeps."""
    found = []
    for line in lines_in(folder):
        for name, value in line.items():
            if name != "step":
                found.append((name, line["step"], np.float32(value)))
    return sorted(found)


def interrupt(*args):
    raise KeyboardInterrupt


def test_tensorboard_shows_every_figure_once_though_the_run_was_interrupted(tiny_data, tmp_path, monkeypatch):
    """What was shown after the last checkpoint, from which the run goes on, is hidden."""
    intervals = {"log_interval": 1, "save_interval": 8, "sample_interval": 11}
    arguments = tiny(data_dir=tiny_data, out_dir=tmp_path, logger="tensorboard", **intervals)
    with monkeypatch.context() as patch:
        patch.setattr(train, "print_sample", interrupt)  # at step 11
        assert_refused(train, arguments, "interrupted")
    assert shown(tmp_path) == logged(tmp_path)
    run_here(train, *arguments, "--resume=True")
    assert shown(tmp_path) == logged(tmp_path)


def test_a_figure_that_is_none_is_not_shown(tmp_path):
    log = run.start_log(train.Settings(out_dir=str(tmp_path), logger="tensorboard"), 0)
    log({"step": 1, "loss": 2.0, "grad_norm": None})
    assert shown(tmp_path) == [("loss", 1, 2.0)]


def test_only_the_first_process_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "rank", lambda: 1)
    log = run.start_log(train.Settings(out_dir=str(tmp_path), logger="tensorboard"), 0)
    log({"step": 1, "loss": 2.0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("logger", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_logger_that_is_not_installed(logger, module, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert_refused(train, tiny(data_dir=tiny_data, out_dir=tmp_path, logger=logger), f"logger = {logger!r}")
    assert not lines_in(tmp_path)


# ---- wandb -----------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """A module in place of wandb that keeps what it is given."""
    module = SimpleNamespace(runs=[])

    def init(id, resume, **options):
        assert resume == "allow"
        new = SimpleNamespace(id=id or f"id {len(module.runs)}", lines=[])
        new.log = lambda line, step: new.lines.append((step, line))
        module.runs.append(new)
        return new

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_every_line_under_one_id(wandb, tiny_data, tmp_path):
    """Two runs, the second of which resumes the first; of one before them a file with its id is left."""
    (tmp_path / "wandb_id").write_text("old id")
    for last in (8, 12):
        arguments = tiny(data_dir=tiny_data, out_dir=tmp_path, logger="wandb", max_iters=last)
        run_here(train, *arguments, "--resume=True")
    first, second = wandb.runs
    assert first.id == second.id == "id 0"
    assert first.lines + second.lines == [(line["step"], line) for line in lines_in(tmp_path)]


@pytest.mark.long
def test_the_real_wandb(tiny_data, tmp_path):
    """Offline: the resumed run has the id of the first."""
    pytest.importorskip("wandb")
    for last in (8, 12):
        arguments = tiny(data_dir=tiny_data, out_dir=tmp_path, logger="wandb", max_iters=last)
        run_script("train.py", *arguments, "--resume=True", WANDB_MODE="offline")
    first, second = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert first.name == second.name
