"""Settings are parsed and checked, never executed; every mistake gets one line that names the key."""

import ast
import dataclasses
from types import SimpleNamespace

import pytest
from conftest import ROOT, assert_one_line_error, run_script
from hypothesis import given
from hypothesis import strategies as st

import sft
from common.checkpoint import choose_device
from common.files import UserError, report_errors
from common.run import PREPARE_COMMANDS
from common.settings import load_settings, read_config
from tools import dpo
from train import Settings

FIELDS = dataclasses.fields(Settings)
KEYS = [field.name for field in FIELDS]
CONFIGS = sorted((ROOT / "config").glob("*.py"))


@pytest.fixture
def refused(capsys):
    """Load settings as train.py does; they must be refused. Returns what the user sees."""

    def load(*arguments):
        with pytest.raises(SystemExit) as stop:
            report_errors(lambda: load_settings([str(a) for a in arguments], Settings, ""))
        return SimpleNamespace(returncode=stop.value.code, stderr=capsys.readouterr().err)

    return load


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.py"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# ---- What a file may hold --------------------------------------------------------------------------


@given(
    st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.text(max_size=20)
)
def test_values_are_read_as_python_has_them(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.py"
    path.write_text(f"x = {value!r}\n", encoding="utf-8")
    found = read_config(str(path))["x"]
    assert found == value and type(found) is type(value)


def test_a_file_of_every_allowed_kind(config):
    path = config(
        '"""Text at the top."""\n# a comment\ndata_dir = "数据/故事"  # another\nresume = True\n'
        "learning_rate = 6e-4\nmax_iters = 1_000\nmin_lr = +0.25\nbeta1 = 0\n"
    )
    s = load_settings([str(path)], Settings, "")
    assert (s.data_dir, s.resume, s.learning_rate, s.max_iters, s.min_lr) == (
        "数据/故事",
        True,
        6e-4,
        1000,
        0.25,
    )
    assert s.beta1 == 0 and type(s.beta1) is float  # a whole number serves for a float
    untouched = Settings()
    assert all(
        getattr(s, key) == getattr(untouched, key)
        for key in set(KEYS) - {"data_dir", "resume", "learning_rate", "max_iters", "min_lr", "beta1"}
    )


CODE = [
    "import os; os.mkdir({mark!r})",
    "from os import mkdir",
    "max_iters = __import__('os').mkdir({mark!r})",
    "__import__('os').mkdir({mark!r})",
    "open({mark!r}, 'w')",
    "data_dir = open({mark!r}, 'w').name",
    "data_dir = f\"{{open({mark!r}, 'w')}}\"",
    "exec(\"open({mark!r}, 'w')\")",
    "def f():\n    pass",
    "class A:\n    x = open({mark!r}, 'w')",
    "for i in range(3):\n    max_iters = i",
    "if True:\n    max_iters = 3",
    "while True:\n    pass",
    "max_iters = [i for i in range(3)]",
    "max_iters = lambda: 3",
    "max_iters = batch_size",
    "max_iters = 3 if True else 4",
    "max_iters = (batch_size := 3)",
    "max_iters = 2 * 500",
    "max_iters = 10 ** 10 ** 10",
    "max_iters = 1 << 4",
    "max_iters = 1 < 2",
    "max_iters = not 1",
    "max_iters, batch_size = 1, 2",
    "max_iters = batch_size = 3",
    "max_iters += 3",
    "max_iters: int = 3",
    "max_iters.x = 3",
    "max_iters[0] = 3",
    "max_iters = 1 // 0",
    "learning_rate = 1 / 0",
    "learning_rate = 2.0 % 1.5",
    "data_dir = 'a' * 3",
    "data_dir = 'a' + 'b'",
    "data_dir = -'a'",
    "assert False",
    "del max_iters",
    "pass",
    "raise SystemExit(0)",
    "print",
]


@pytest.mark.parametrize("code", CODE)
def test_code_is_refused_and_not_run(code, config, refused, tmp_path):
    mark = tmp_path / "mark"
    path = config("batch_size = 2\n" + code.format(mark=str(mark)) + "\n")
    assert_one_line_error(refused(path), f"{path}:2: ")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (b"max_iters = = 3\n", ":1: "),
        (b"batch_size = 3\n  max_iters = 3\n", ":2: "),
        (b"batch_size = 3\nmax_iters = (3\n", ":2: "),
        (b"data_dir = 'abc\n", ":1: "),
        (b"data_dir = '\xff\xfe'\n", ""),
        (b"max_iters = 3\0\n", ""),
        ("max_iters = ３\n".encode(), ":1: "),
        (b"max_iters = 007\n", ":1: "),
        (b"max_iters = " + b"(" * 500 + b"1" + b")" * 500, ""),
        (b"max_iters = " + b"-" * 5000 + b"1\n", ""),
        (b"max_iters = " + b"1+" * 5000 + b"1\n", ""),
        (b"max_iters = " + b"9" * 5000 + b"\n", ""),
    ],
    ids=range(12),
)
def test_what_is_not_python_is_refused(text, where, config, refused):
    path = config(text)
    assert_one_line_error(refused(path), f"{path}{where}")


def test_a_file_of_windows_notepad(config):
    """A byte order mark at its start, lines that end in a carriage return and a line feed."""
    path = config("max_iters = 5\r\nout_dir = 'a'\r\n".encode("utf-8-sig"))
    assert load_settings([str(path)], Settings, "") == dataclasses.replace(
        Settings(), max_iters=5, out_dir="a"
    )


def test_a_name_twice_in_a_file(config, refused):
    """The later one would win, unseen. Another file, or the command line, may say it again."""
    path = config("max_iters = 5\nseed = 2\nmax_iters = 7\n")
    assert_one_line_error(refused(path), f"{path}:3: ", "each name once")


PATH_FIELDS = [
    f
    for kind in (Settings, sft.Settings, dpo.Settings)
    for f in dataclasses.fields(kind)
    if f.metadata.get("path")
]


def test_which_settings_are_paths():
    assert {field.name for field in PATH_FIELDS} == {"data_dir", "out_dir", "init_from", "pairs"}


@pytest.mark.parametrize("text", ['"C:\\new\\temp"', '"a\\x00b"', '"data\\b"', '" "', '"\\n"'])
def test_paths_that_cannot_be(text, config, refused):
    """A backslash in a settings file spells a control character: no folder with a line feed in its name is
    made.
    """
    for key in ("out_dir", "data_dir"):
        path = config(f"{key} = {text}\n")
        assert_one_line_error(refused(path), f"{key} = ", repr(ast.literal_eval(text)), "backslash")
    for argument in ("--out_dir=", "--out_dir= ", "--out_dir=a\nb", "--data_dir="):
        assert_one_line_error(refused(argument), argument.split("=")[0][2:])


def test_a_backslash_that_is_no_escape(config, refused):
    """C:\\Users: Python's error, and what to do."""
    path = config('out_dir = "C:\\Users\\me"\n')
    assert_one_line_error(refused(path), f"{path}:1: ", "write / for a backslash")


def test_paths_begin_at_home(config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/you")
    for argument in ("--out_dir=~/x", config('out_dir = "~/x"\n')):
        assert load_settings([str(argument)], Settings, "").out_dir == "/home/you/x"
    assert load_settings(["--pairs=", "--init_from=~"], dpo.Settings, "").init_from == "/home/you"
    assert load_settings(["--out_dir=a~/~"], Settings, "").out_dir == "a~/~"


def test_missing_file_and_folder(refused, tmp_path):
    assert_one_line_error(refused(tmp_path / "none.py"), "none.py")
    assert_one_line_error(refused(tmp_path), tmp_path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_our_own_configs_load(path):
    kind = {"first": sft.Settings, "sft": sft.Settings, "dpo": dpo.Settings}.get(
        path.stem.rpartition("_")[2], Settings
    )
    assert load_settings([str(path)], kind, "") != kind()


# ---- Types and ranges of every key -----------------------------------------------------------------

WRONG = {
    int: ["1.5", "'7'", "True", "1e3", "abc", "", "[1]", "None", "1+2j", "1 2", "nan"],
    float: ["'0.1'", "False", "abc", "", "(1.0,)", "1j", "0.1.2"],
    bool: ["1", "0", "'True'", "true", "yes", "", "None"],
}


@pytest.mark.parametrize("field", FIELDS, ids=KEYS)
def test_wrong_types(field, config, refused):
    """On the command line and in a file, for every key, with values that Python can and cannot read."""
    for text in WRONG.get(field.type, []):
        assert_one_line_error(refused(f"--{field.name}={text}"), field.name, field.type.__name__)
    in_file = {
        int: ("1.0", "True", "'1'"),
        float: ("True", "'1'"),
        bool: ("1", "'True'"),
        str: ("1", "1.5", "False"),
    }
    for text in (*in_file[field.type], "None", "1, 2", "[3]", "{'a': 3}", "3j", "b'a'"):
        path = config(f"{field.name} = {text}\n")
        assert_one_line_error(refused(path), path, field.name, field.type.__name__)


LEAST_0 = {"warmup_iters", "sample_interval", "seed"}  # whole numbers that may be 0


@pytest.mark.parametrize("field", [f for f in FIELDS if f.type in (int, float)], ids=lambda f: f.name)
def test_wrong_ranges(field, refused):
    if field.type is int:
        wrong = ["-1", "-1000000"] + ["0"] * (field.name not in LEAST_0)
    else:
        wrong = ["-1", "-1e-9", "1e999", "-1e999"]
    for value in wrong:
        assert_one_line_error(refused(f"--{field.name}={value}"), field.name)
    least = 0 if field.name in LEAST_0 or field.type is float else 1
    assert getattr(load_settings([f"--{field.name}={least}"], Settings, ""), field.name) == least


@pytest.mark.parametrize("key", ["max_iters", "seed", "learning_rate"])
def test_numbers_too_long_for_a_float(key, refused):
    assert_one_line_error(refused(f"--{key}={'9' * 400}"), key)


@pytest.mark.parametrize("key", ["max_iters", "resume", "learning_rate"])
@pytest.mark.parametrize("text", ["{[]: 1}", "{{}}", "1" + "+1" * 5000, "-" * 5000 + "1", "(" * 5000])
def test_literals_that_python_itself_stumbles_over(key, text, refused):
    assert_one_line_error(refused(f"--{key}={text}"), key)


@pytest.mark.parametrize(
    "argument",
    [
        "--beta1=1.0",
        "--beta2=1",
        "--beta1=7",
        "--decay_fraction=1.5",
        f"--seed={2**64}",
        f"--seed={10**30}",
    ],
)
def test_values_past_the_end_of_a_range(argument, refused):
    """What PyTorch would refuse with a traceback, or what has no meaning, is refused here by name."""
    assert_one_line_error(refused(argument), argument[2:].split("=")[0])


@pytest.mark.parametrize("key", ["optimizer", "schedule", "dtype"])
def test_unknown_choices(key, refused):
    known = {"optimizer": ["muon", "adamw"], "schedule": ["wsd", "cosine"]}
    known["dtype"] = ["auto", "bfloat16", "float16", "float32"]
    for value in known[key]:
        assert getattr(load_settings([f"--{key}={value}"], Settings, ""), key) == value
        assert_one_line_error(refused(f"--{key}={value}x"), key, *known[key])
    assert_one_line_error(refused(f"--{key}="), key)


@pytest.mark.parametrize("device", ["", "gpu", "cuda:x", "cuda:-1", "meta", "xpu", "CPU "])
def test_unknown_devices(device, capsys):
    with pytest.raises(SystemExit) as stop:
        report_errors(lambda: choose_device(device))
    assert_one_line_error(
        SimpleNamespace(returncode=stop.value.code, stderr=capsys.readouterr().err), "device"
    )


# ---- Misspelt keys ---------------------------------------------------------------------------------


def distance(a, b):
    """How many letters must be put in, left out or replaced (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@pytest.mark.parametrize("key", KEYS)
def test_misspelt_key_names_the_nearest(key, config, refused):
    """One letter dropped, doubled, swapped or in capitals; hyphens; a letter too many at the end."""
    wrong = {key[:i] + key[i + 1 :] for i in range(len(key))} | {
        key[:i] + key[i] + key[i:] for i in range(len(key))
    }
    wrong |= {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)}
    wrong |= {key.replace("_", "-"), key.replace("_", ""), key + "s", key.capitalize()}
    for name in sorted(wrong - set(KEYS)):
        done = refused(f"--{name}=1")
        assert_one_line_error(done, repr(name))
        suggested = done.stderr.split("did you mean ")[1].split("'")[1]
        nearest = min(distance(name, k) for k in KEYS)
        assert suggested == key or distance(name, suggested) == nearest, (name, suggested)
        if name.isidentifier():
            path = config(f"{name} = 1\n")
            assert_one_line_error(refused(path), path, repr(name), repr(suggested))


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=30))
def test_any_argument_is_read_or_refused(text):
    """No text at all makes anything but settings or one line."""
    for argument in (
        f"--{text}",
        f"--{text}=1",
        f"--max_iters={text}",
        f"--learning_rate={text}",
        f"--seed={text}",
    ):
        try:
            assert isinstance(load_settings([argument], Settings, ""), Settings)
        except UserError as e:
            assert len(str(e).splitlines()) == 1
        except SystemExit as e:
            assert argument == "--help" and not e.code


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("cooldown", "0.5", "decay_fraction"),
        ("eval_blocks", "64", "eval_sequences"),
        ("schedule", "linear", "wsd"),
    ],
)
def test_renamed_settings_name_the_new_one(old, value, new, config, refused):
    assert_one_line_error(refused(f"--{old}={value}"), repr(old) if old != "schedule" else old, repr(new))
    path = config(f"{old} = {value if value[0].isdigit() else repr(value)}\n")
    assert_one_line_error(refused(path), repr(new))


def test_not_a_setting(refused):
    for argument in ("--max_iters", "-max_iters=3", "-x", "--"):
        assert_one_line_error(refused(argument), argument)
    assert_one_line_error(refused("--zzzzqqqq=1"), "zzzzqqqq")


# ---- The command line ------------------------------------------------------------------------------


def test_later_ones_override(config):
    path = config("max_iters = 5\nout_dir = 'a'\n")
    load = lambda *arguments: load_settings([str(a) for a in arguments], Settings, "")  # noqa: E731
    assert load(path).max_iters == 5
    assert load(path, "--max_iters=7").max_iters == 7
    assert load("--max_iters=7", path, "--seed=3") == dataclasses.replace(
        Settings(), max_iters=5, out_dir="a", seed=3
    )
    assert load("--max_iters=7", "--max_iters=8").max_iters == 8
    assert load("--out_dir=123").out_dir == "123"  # text needs no quotes
    assert load("--out_dir=a=b").out_dir == "a=b"
    assert load("--resume=True", "--learning_rate=1").learning_rate == 1.0


def test_of_epochs_and_max_iters_the_later_holds(config):
    path = str(config("epochs = 3.0\n"))
    for arguments, epochs in (
        ([path], 3),
        ([path, "--max_iters=7"], 0),
        (["--max_iters=7", path], 3),
        (["--epochs=2", "--max_iters=7", "--epochs=4"], 4),
    ):
        s = load_settings(arguments, Settings, "")
        assert s.epochs == epochs
        assert epochs or s.max_iters == 7


def test_names_that_people_script_against():
    names = "data_dir out_dir max_iters eval_interval save_interval log_interval batch_size gradient_accumulation_steps"
    names += " block_size n_layer n_head n_kv_head head_dim n_embd learning_rate weight_decay optimizer device dtype"
    assert set(f"{names} compile seed resume".split()) <= set(KEYS)


def test_help_and_a_mistake_through_the_program(tmp_path):
    shown = run_script("train.py", "--help").stdout
    for field in FIELDS:
        line = next(x for x in shown.splitlines() if x.strip().startswith(f"--{field.name}="))
        assert line.split("=", 1)[1] == str(field.default)
    (tmp_path / "c.py").write_text("import sys\nsys.exit(0)\n")
    assert_one_line_error(run_script("train.py", tmp_path / "c.py", check=False), "c.py:1: ")


def test_the_config_of_another_script_is_named():
    for config, cls, script in (("demo_sft", Settings, "sft.py"), ("demo", sft.Settings, "train.py")):
        with pytest.raises(UserError, match=script):
            load_settings([str(ROOT / "config" / f"{config}.py")], cls, "")


def test_the_commands_that_prepare_data_stand_in_the_configs():
    texts = [path.read_text(encoding="utf-8") for path in CONFIGS]
    words = " ".join(texts).replace("\\", " ").split()
    configs = " ".join(words)
    for folder, command in PREPARE_COMMANDS.items():
        assert command in configs and f'"{folder}"' in configs, folder
