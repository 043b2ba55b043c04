"""Progress: a bar on a terminal, lines in a log, and rates that a resume does not flatter."""

import io
from collections import Counter

import pytest
from rich.console import Console

from cluster.wording import duration
from ingest.progress.counts import Counts
from ingest.progress.crawl_progress import CrawlProgress
from ingest.progress.meter import Meter
from ingest.web.host_queues import SlowHost


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
            details = {"not kept": "3 http_404"} if second > 10 else {}
            meter.tell("crawling", done=second, total=25, figures=["1 images/s"], details=details)
    assert console.file.getvalue().splitlines() == [
        "crawling: 10/25 (40 %), 1 images/s",
        "crawling: 20/25 (80 %), 1 images/s; not kept: 3 http_404",
        "crawling: 24/25 (96 %), 1 images/s; not kept: 3 http_404",
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
        meter.tell("crawling", done=3_000, total=12_000, figures=["250 images/s", "3 failed"],
                   details={"not kept": "3 http_404", "slowest": "[red]host.example"})  # fmt: skip
    text = console.file.getvalue()
    assert "3,000/12,000" in text
    assert "250 images/s · 3 failed" in text
    assert "not kept: 3 http_404" in text
    assert "[red]" in text, "hosts' names are no markup"
    assert "━" in text


class Told:
    """Stands in for a meter and keeps what it was told."""

    def tell(self, doing, *, done, total, figures=(), details=()):
        self.last = (doing, done, total, list(figures))
        self.details = dict(details)


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
        ["20 images/s", "5.0 MB/s", "180 kept (90.0 %)", "18 rejected", "2 failed", "about 40 s left"],
    )  # fmt: skip
    assert meter.details == {"not kept": "15 empty, 3 not_an_image, 2 truncated"}
    assert progress.seconds == 10.0


def test_rates_are_those_of_the_last_minute(clock):
    meter = Told()
    progress = CrawlProgress(meter, clock)
    progress(Counts(planned=10_000))
    counts = Counts(planned=10_000, units=4)
    for second in range(1, 301):
        clock.now = float(second)
        counts.kept += 100 if second <= 60 else 2
        progress(counts)
    assert meter.last[3][0] == "2 images/s"
    assert meter.last[3][-1] == f"about {duration((10_000 - counts.kept) / 2)} left"


def test_a_crawl_is_not_said_to_end_before_its_slowest_host(clock):
    meter = Told()
    progress = CrawlProgress(meter, clock)
    progress(Counts(planned=1000))
    clock.now = 10.0
    hosts = [SlowHost("slow.example\u202e", 400, 9.0), SlowHost("quick.example", 500, 0.01)]
    progress(Counts(planned=1000, units=1, kept=100, slowest_hosts=hosts))
    assert meter.last[3][0] == "10 images/s"
    assert meter.last[3][-1] == "at least 1 h 0 min left, for 400 URLs of slow.example\\u202e, 9.0 s each"
    assert meter.details["slowest"] == (
        "slow.example\\u202e (400 waiting, 9.0 s each), quick.example (500 waiting, 0.0 s each)"
    )


def test_most_calls_cost_no_more_than_a_look_at_the_clock(clock):
    meter = Told()
    progress = CrawlProgress(meter, clock)
    progress(Counts(planned=1000))
    for now, kept in ((1.0, 100), (1.1, 200), (1.2, 999)):
        clock.now = now
        progress(Counts(planned=1000, units=1, kept=kept))
    assert meter.last[1] == 100
    progress(Counts(planned=1000, units=1, kept=1000))
    assert meter.last[1] == 1000, "the end is always told"


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
