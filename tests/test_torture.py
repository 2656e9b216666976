"""The short version of what tests/torture.py does at length; bash runs/torture.sh is the long one."""

import pytest
from conftest import run_script
from torture import PARTS


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_lost(part):
    done = run_script("tests/torture.py", "--short", part)
    if "not run: " in done.stdout:
        pytest.skip(done.stdout.split("not run: ")[1].split(" |")[0])
    assert "| nothing |" in done.stdout
