"""Tasks in processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.map.processes import AHEAD, processes


def square(number: int) -> int:
    return number * number


def refuse_1_and_sleep_on_others(number: int) -> None:
    if number == 1:
        raise UserError("one is too few")
    time.sleep(60)


def touch(path: str) -> str:
    with open(path, "x"):  # noqa: PTH123
        return path


def test_answers_come_in_the_order_of_the_tasks() -> None:
    with processes(2) as map_tasks:
        assert list(map_tasks(square, range(20))) == [number**2 for number in range(20)]


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import math\n"
        "print('begun')\n"
        "from cluster.map.processes import processes\n"
        "with processes(2) as map_tasks:\n"
        "    print(sum(map_tasks(math.sqrt, [4.0] * 20)))\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "begun\n40.0\n"


def test_no_more_is_done_than_the_answers_that_are_taken_allow(tmp_path: os.PathLike[str]) -> None:
    with processes(2) as map_tasks:
        answers = map_tasks(touch, [os.path.join(tmp_path, str(number)) for number in range(50)])  # noqa: PTH118
        next(answers)
        time.sleep(0.5)
        assert len(os.listdir(tmp_path)) <= 2 * AHEAD  # noqa: PTH208


def test_a_mistake_does_not_wait_for_what_the_others_are_at() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="one is too few"), processes(2) as map_tasks:
        list(map_tasks(refuse_1_and_sleep_on_others, [1, 2]))
    assert time.monotonic() - began < 30
