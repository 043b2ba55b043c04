"""Progress: a bar on a terminal, lines in a log, and rates that a resume does not flatter."""

import io
from collections import Counter

import pytest
from rich.console import Console

from ingest.crawl import Counts
from ingest.progress import CrawlProgress, Meter


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def log(clock):
    console = Console(file=io.StringIO(), width=60)
    return console, Meter(console, clock)


def test_log_has_one_line_every_ten_seconds_and_the_last_state(clock):
    console, meter = log(clock)
    with meter:
        for second in range(25):
            clock.now = float(second)
            meter.tell("crawling", done=second, total=25, figures=["1 images/s"])
    assert console.file.getvalue().splitlines() == [
        "crawling: 10/25 (40 %), 1 images/s",
        "crawling: 20/25 (80 %), 1 images/s",
        "crawling: 24/25 (96 %), 1 images/s",
    ]


def test_short_work_leaves_a_log_as_it_is(clock):
    console, meter = log(clock)
    with meter:
        meter.tell("counting", done=1, total=1)
    assert console.file.getvalue() == ""


def test_nothing_told_prints_nothing_even_after_an_error(clock):
    console, meter = log(clock)
    with pytest.raises(ZeroDivisionError), meter:
        raise ZeroDivisionError
    assert console.file.getvalue() == ""


def test_terminal_shows_bar_share_and_figures(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Meter(console, clock) as meter:
        meter.tell("planning, files found", done=12_000, total=0)
        meter.tell("crawling", done=3_000, total=12_000, figures=["250 images/s", "3 failed"])
    text = console.file.getvalue()
    assert "3,000/12,000" in text
    assert "250 images/s · 3 failed" in text
    assert "━" in text


class Told:
    """Stands in for a meter and keeps what it was told."""

    def tell(self, doing, *, done, total, figures=()):
        self.last = (doing, done, total, list(figures))


def test_crawl_shows_rates_counts_and_time_left(clock):
    meter = Told()
    progress = CrawlProgress(meter, clock)
    clock.now = 100.0
    progress(Counts(planned=1000))
    assert meter.last == ("planning, files found", 1000, 0, [])
    clock.now = 110.0
    progress(Counts(
        planned=1000, units=4, kept=180, rejected=Counter(empty=15, not_an_image=3),
        failed=Counter(truncated=2), bytes_read=50_000_000,
    ))  # fmt: skip
    assert meter.last == (
        "crawling", 200, 1000,
        ["20 images/s", "5.0 MB/s", "180 kept", "18 rejected", "2 failed", "about 40 s left"],
    )  # fmt: skip
    assert progress.seconds == 10.0


def test_rate_leaves_out_what_an_earlier_run_had_done(clock):
    meter = Told()
    progress = CrawlProgress(meter, clock)
    progress(Counts(planned=1000))
    clock.now = 10.0
    progress(Counts(planned=1000, units=4, kept=900, resumed=800))
    assert meter.last[1] == 900
    assert meter.last[3][0] == "10 images/s"
    assert meter.last[3][-1] == "about 10 s left"


def test_no_rate_before_time_has_passed(clock):
    meter = Told()
    progress = CrawlProgress(meter, clock)
    progress(Counts(planned=5, units=1, kept=5, resumed=5))
    assert meter.last[3][:2] == ["0 images/s", "0.0 MB/s"]
