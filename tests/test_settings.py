"""Settings come from config files and --key=value; they are parsed and checked, never executed.

First what a user types and gets: files and the command line, the later one wins. Then what is refused, each
time in one line that names the file and line, or the key: code in a file, wrong types and ranges of every
setting of the three training scripts, paths, misspelt keys. Last our own configs.
"""

import pytest
from helpers import ROOT, assert_refused, run_here

import sft
import train
from common.checkpoint import choose_device
from common.files import UserError
from common.run import PREPARE_COMMANDS
from common.settings import load_settings
from tools import dpo
from train import LoopSettings, Settings

CONFIGS = sorted((ROOT / "config").glob("*.py"))


SETTINGS = []  # of all scripts: the class that has it, its name, its type
for kind in (LoopSettings, Settings, sft.Settings, dpo.Settings):
    for name, its_type in kind.__annotations__.items():
        SETTINGS.append((kind, name, its_type))
NUMBERS = [row for row in SETTINGS if row[-1] in (int, float)]


def load(*arguments, kind=Settings):
    return load_settings([str(a) for a in arguments], kind, "")


def refusal(*arguments, kind=Settings):
    """The one line that says why these are refused."""
    with pytest.raises(UserError) as error:
        load(*arguments, kind=kind)
    message = str(error.value)
    assert message.isprintable()
    return message


@pytest.fixture
def config(tmp_path):
    """A function that writes a config file."""

    def write(text):
        path = tmp_path / "config.py"
        path.write_text(text, encoding="utf-8", newline="")
        return path

    return write


# ---- Files and the command line --------------------------------------------------------------------


def test_a_file_of_every_allowed_kind(config):
    path = config(
        '"""Text at the top."""\n# a comment\ndata_dir = "数据/故事"  # another\nresume = True\n'
        "learning_rate = 6e-4\nmax_iters = 1_000\nmin_lr = +0.25\nbeta1 = 0\n"
    )
    given = {"data_dir": "数据/故事", "resume": True, "learning_rate": 6e-4, "max_iters": 1000}
    assert load(path) == Settings(**given, min_lr=0.25, beta1=0.0)
    assert type(load(path).beta1) is float  # a whole number serves for a float


def test_later_ones_override(config):
    path = config("max_iters = 5\nout_dir = 'a'\n")
    assert load("--max_iters=7", path, "--seed=3") == Settings(max_iters=5, out_dir="a", seed=3)
    assert load(path, "--max_iters=7").max_iters == 7
    assert load("--max_iters=7", "--max_iters=8").max_iters == 8


def test_text_needs_no_quotes():
    assert load("--out_dir=123").out_dir == "123"
    assert load("--out_dir=a=b").out_dir == "a=b"


def test_of_epochs_and_max_iters_the_later_holds(config):
    path = config("epochs = 3.0\n")
    assert load("--max_iters=7", path) == Settings(max_iters=7, epochs=3.0)
    assert load(path, "--max_iters=7") == Settings(max_iters=7)
    assert load("--epochs=2", "--max_iters=7", "--epochs=4").epochs == 4


def test_a_file_of_windows_notepad(config):
    """A byte order mark at its start, lines that end in a carriage return and a line feed."""
    path = config("\ufeffmax_iters = 5\r\nout_dir = 'a'\r\n")
    assert load(path) == Settings(max_iters=5, out_dir="a")


def test_help_lists_every_setting_with_its_default():
    lines = run_here(train, "--help").stdout.splitlines()
    for key, default in vars(Settings()).items():
        assert f"    --{key}={default}" in lines


def test_a_mistake_ends_the_program(tmp_path):
    assert_refused(train, [tmp_path / "none.py"], "none.py")
    assert_refused(train, [tmp_path], tmp_path)
    assert_refused(train, ["--n_layer=0"], "n_layer")


def test_defaults_that_the_docs_and_configs_rely_on():
    s = Settings()
    assert (s.optimizer, s.schedule, s.dtype, s.device) == ("muon", "wsd", "auto", "auto")
    assert (s.momentum, s.weight_decay, s.grad_clip) == (0.95, 0.1, 1.0)
    assert s.deterministic and s.compile and s.qk_norm
    assert not (s.resume or s.epochs or s.minutes or s.logger or s.document_mask)
    assert not (dpo.Settings.nll_weight or sft.Settings.merge)


# ---- Code in a file --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import os",
        "open('mark', 'w')",
        "data_dir = open('mark', 'w').name",
        "class A:\n    x = open('mark', 'w')",
        "max_iters = [i for i in [1]]",
        "max_iters = lambda: 3",
        "max_iters = batch_size",
        "max_iters = 2 * 500",
        "max_iters = 10 ** 10 ** 10",
        "data_dir = 'a' + 'b'",
        "data_dir = -'a'",
        "max_iters, seed = 1, 2",
        "max_iters = seed = 3",
        "max_iters += 3",
        "max_iters: int = 3",
        "pass",
    ],
)
def test_code_is_refused_and_not_run(code, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = config(f"batch_size = 2\n{code}\n")
    assert f"{path}:2: only `name = value`" in refusal(path)
    assert not (tmp_path / "mark").exists()


def test_a_name_twice_in_a_file(config):
    """The later one would win, unseen. Another file, or the command line, may say it again."""
    path = config("max_iters = 5\nseed = 2\nmax_iters = 7\n")
    assert f"{path}:3: " in refusal(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed = 3\n  max_iters = 3\n", 2),
        ("seed = 3\nmax_iters = (3\n", 2),
        ("max_iters = 3\0\n", 1),
        ("#" * 2**20 + "\n", 1),  # takes long to parse
    ],
    ids=range(4),
)
def test_what_is_not_a_config_is_refused(text, line, config):
    path = config(text)
    assert f"{path}:{line}: cannot be read" in refusal(path)


def test_a_file_that_is_not_utf_8(tmp_path):
    path = tmp_path / "latin.py"
    path.write_bytes(b"data_dir = '\xff'\n")
    assert f"{path}:1: cannot be read" in refusal(path)


# ---- Types and ranges of every setting -------------------------------------------------------------

WRONG_ON_COMMAND_LINE = {
    int: ["1.5", "'7'", "True", "abc", ""],
    float: ["'0.1'", "False", "1j"],
    bool: ["1", "true", ""],
    str: [],
}
WRONG_IN_A_FILE = {
    int: ["1.0", "True", "None"],
    float: ["True", "'1'"],
    bool: ["1"],
    str: ["1", "False"],
}


@pytest.mark.parametrize(("kind", "name", "its_type"), SETTINGS)
def test_a_value_of_another_type(kind, name, its_type, config):
    expected = f"{name} must be of type {its_type.__name__}"
    for text in WRONG_ON_COMMAND_LINE[its_type]:
        assert expected in refusal(f"--{name}={text}", kind=kind)
    for text in WRONG_IN_A_FILE[its_type]:
        path = config(f"{name} = {text}\n")
        assert f"{path}: {expected}" in refusal(path, kind=kind)


MAY_BE_0 = ("warmup_iters", "sample_interval", "seed", "lora_rank")  # of the whole numbers
STEPS = {int: 1, float: 1e-9}
LEAST = {"temperature": 1e-6, "beta": 1e-6}
ENDS = {"decay_fraction": 1.001, "momentum": 1, "beta1": 1, "beta2": 1}


@pytest.mark.parametrize(("kind", "name", "its_type"), NUMBERS)
def test_a_number_outside_its_range(kind, name, its_type):
    least = LEAST.get(name, 0)
    if its_type is int and name not in MAY_BE_0:
        least = 1
    too_small = least - STEPS[its_type]
    end = ENDS.get(name, 2**63)
    assert getattr(load(f"--{name}={least}", kind=kind), name) == least
    for value in (too_small, end):
        assert f"{name} = {its_type(value)}: must be" in refusal(f"--{name}={value}", kind=kind)


def test_the_decay_may_take_the_whole_run():
    assert load("--decay_fraction=1").decay_fraction == 1


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("optimizer", "'muon', 'adamw'"),
        ("schedule", "'wsd', 'cosine'"),
        ("dtype", "'auto', 'bfloat16', 'float16', 'float32'"),
        ("logger", "'', 'tensorboard', 'wandb'"),
    ],
)
def test_a_text_that_is_none_of_the_choices(key, choices):
    assert refusal(f"--{key}=x") == f"{key} = 'x': must be one of {choices}"


@pytest.mark.parametrize(
    "text",
    ["9" * 400, "-" + "9" * 400, "9" * 5000, "1e999", "{[]: 1}", "1" + "+1" * 5000, "(" * 5000],
    ids=range(7),
)
def test_numbers_that_python_itself_stumbles_over(text, config):
    """Too long for a float or an int, infinite, unhashable, too deep."""
    assert "max_iters" in refusal(f"--max_iters={text}")
    assert "learning_rate" in refusal(f"--learning_rate={text}")
    refusal(config(f"learning_rate = {text}\n"))


@pytest.mark.parametrize("device", ["", "gpu", "cuda:-1", "meta"])
def test_a_device_that_is_not_here(device):
    with pytest.raises(UserError, match="device = "):
        choose_device(device)


# ---- Paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (Settings, "data_dir"),
        (Settings, "out_dir"),
        (sft.Settings, "init_from"),
        (dpo.Settings, "init_from"),
        (dpo.Settings, "pairs"),
    ],
)
def test_a_path(kind, key, config, monkeypatch):
    """It may begin at home. A backslash in a file spells a control character: no folder with a line feed in
    its name is made.
    """
    monkeypatch.setenv("HOME", "/home/you")
    assert getattr(load(f"--{key}=~/x", kind=kind), key) == "/home/you/x"
    path = config(f"{key} = 'C:\\new'\n")
    message = refusal(path, kind=kind)
    assert message.startswith(f"{key} = 'C:\\new': ") and "write / or" in message


def test_a_path_of_nothing():
    assert load("--pairs=", kind=dpo.Settings).pairs == ""  # as its default is
    for text in ("", " "):
        assert f"out_dir = {text!r}: empty" in refusal(f"--out_dir={text}")


def test_a_backslash_that_is_no_escape(config):
    """C:\\Users: Python's error, and what to do."""
    path = config("out_dir = 'C:\\Users\\me'\n")
    message = refusal(path)
    assert message.startswith(f"{path}:1: ") and "write / for a backslash" in message


# ---- Keys that are none ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("learning_rte", "learning_rate"),
        ("batch-size", "batch_size"),
        ("maxiters", "max_iters"),
        ("Seed", "seed"),
        ("wieght_dacay", "weight_decay"),
        ("cooldown", "decay_fraction"),  # its name until it was renamed
        ("eval_blocks", "eval_sequences"),
    ],
)
def test_a_misspelt_key_names_the_nearest(wrong, meant):
    assert f"unknown key {wrong!r}; did you mean {meant!r}?" in refusal(f"--{wrong}=1")


def test_a_key_like_no_other(config):
    assert refusal("--zzzzqqqq=1") == "--zzzzqqqq=1: unknown key 'zzzzqqqq'"


@pytest.mark.parametrize("argument", ["--max_iters", "-max_iters=3", "-x", "--"])
def test_an_argument_that_is_no_setting(argument):
    assert refusal(argument) == f"{argument}: settings are given as --key=value"


def test_a_config_of_another_script():
    folder = ROOT / "config"
    assert "it is a setting of train.py" in refusal(folder / "demo.py", kind=sft.Settings)
    assert "it is a setting of sft.py or tools.dpo" in refusal(folder / "demo_sft.py")
    assert "it is a setting of tools.dpo" in refusal(folder / "demo_dpo.py", kind=sft.Settings)


# ---- Our own configs -------------------------------------------------------------------------------

SCRIPTS = {"sft": sft.Settings, "dpo": dpo.Settings}  # by the end of a config's name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_our_own_configs_load(path):
    _, _, end = path.stem.rpartition("_")
    kind = SCRIPTS.get(end, Settings)
    assert load(path, kind=kind) != kind()


def test_the_commands_that_prepare_data_stand_in_the_configs():
    texts = [path.read_text(encoding="utf-8") for path in CONFIGS]
    words = " ".join(texts).replace("\\", " ").split()
    configs = " ".join(words)
    for folder, command in PREPARE_COMMANDS.items():
        assert command in configs and f'"{folder}"' in configs, folder
