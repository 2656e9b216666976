"""The short version of what tests/torture.py does at length; bash runs/torture.sh is the long one."""

import pytest
from conftest import run_script
from torture import PARTS


@pytest.mark.parametrize("parts", [list(PARTS)[::2], list(PARTS)[1::2]], ids=", ".join)
def test_nothing_is_lost(parts):
    """All parts of a half stand on the same runs, which take longer than most parts."""
    done = run_script("tests/torture.py", "--short", *parts, timeout=600)
    assert done.stdout.count("| nothing |") >= len(parts)
    if "not run: " in done.stdout:
        pytest.skip("the others passed; " + done.stdout.split("not run: ")[1].split(" |")[0])
