"""A log on a terminal, and not on one."""

from __future__ import annotations

import io
import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commands.progress_line import ProgressLine, StageLines

LOG = (
    "12:00 t [0] going on from step 5 of 10\n"
    "12:01 t [0] step 6/10  loss 1.5  3 images/s\n"
    "12:02 t [0] step 8/10  loss 1.25  3 images/s\n"
    "12:02 t [0] checkpoint of step 8 saved in 0.1 s\n"
    "12:03 t [0] step 10/10  loss 1.0  3 images/s\n"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What is seen in the end, line by line."""
        return [line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n")]


@given(cuts=st.lists(st.integers(0, len(LOG)), max_size=6))
def test_progress_stays_on_one_line_of_a_terminal(cuts: list[int]) -> None:
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "60")
        progress = ProgressLine(terminal)
        places = [0, *sorted(cuts), len(LOG)]
        for start, end in itertools.pairwise(places):
            progress.write(LOG[start:end])
        progress.close()
    first, second, bar, rest = terminal.screen()
    assert first == "12:00 t [0] going on from step 5 of 10"
    assert second == "12:02 t [0] checkpoint of step 8 saved in 0.1 s"
    assert bar.startswith("━" * 24 + " 10/10  loss 1.0") and len(bar) < 60
    assert rest == ""


def test_a_file_gets_the_log_as_it_is() -> None:
    file = io.StringIO()
    progress = ProgressLine(file)
    progress.write(LOG)
    progress.close()
    assert file.getvalue() == LOG


def test_a_last_line_without_its_end_is_shown() -> None:
    terminal = Terminal()
    progress = ProgressLine(terminal)
    progress.write("half a li")
    progress.close()
    assert terminal.getvalue() == "half a li\n"


def test_lines_of_stages_side_by_side_are_whole_and_named() -> None:
    file, terminal = io.StringIO(), Terminal()
    for stream in (file, terminal):
        progress = ProgressLine(stream)
        one, two = StageLines("one", progress), StageLines("two", progress)
        one.write("12:00 t [0] half a")
        two.write("12:00 u [0] step 6/10  loss 1.5\n")
        one.write(" line\n")
        progress.close()
    assert file.getvalue() == "two | 12:00 u [0] step 6/10  loss 1.5\none | 12:00 t [0] half a line\n"
    bar = "two | " + "━" * 14 + "·" * 10 + " 6/10  loss 1.5"
    assert terminal.getvalue() == f"{bar}\r\x1b[Kone | 12:00 t [0] half a line\n"


def test_a_run_goes_on_when_nobody_reads_its_log_any_more() -> None:
    """As behind `| head`."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        os.close(reading)
        line = ProgressLine(pipe)
        for _ in range(3):
            line.write(LOG * 1000)
            line.flush()
        line.close()
