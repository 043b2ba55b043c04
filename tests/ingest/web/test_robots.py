"""What sites ask of robots, and whose turn it is."""

import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from ingest.web.host_limits import HostLimits
from ingest.web.host_queues import LONGEST_WAIT, STRIKES, Hosts
from ingest.web.opt_outs import image_opt_out
from ingest.web.problems import retry_after
from ingest.web.robots_txt import rules

PAGE = URL("http://example.org/pictures/a.jpg")


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("", True),
        ("User-agent: *\nDisallow: /", False),
        ("User-agent: *\nDisallow:", True),
        ("User-agent: *\nDisallow: /pictures\nAllow: /pictures/a", True),
        ("User-agent: *\nDisallow: /*.jpg$", False),
        ("user-agent: SEER-INGEST\ndisallow: /pictures", False),
        ("User-agent: seer-ingest/2.0\nDisallow: /", False),
        ("User-agent: seer\nDisallow: /", True),
        ("User-agent: other\nDisallow: /", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: seer-ingest\nAllow: /", True),
        ("User-agent: seer-ingest\nUser-agent: *\nDisallow: /", False),
        ("User-agent: *\nUser-agent: other\nDisallow: /", False),
        ("User-agent: other\nDisallow: /a\nUser-agent: *\nDisallow: /pictures # no", False),
        ("# none\n\n  User-agent : *  # all\r\nSitemap: http://x/\r\nDisallow : /pictures\r\n", False),
        ("\ufeffUser-agent: *\nDisallow: /", False),
        ("<html>Disallow: /</html>", True),
    ],
)
def test_robots_txt_is_obeyed_as_rfc_9309_says(text, allowed):
    assert rules(text).allow(PAGE) is allowed


def test_crawl_delay_is_that_of_our_group():
    assert rules("User-agent: *\nCrawl-delay: 2.5\nUser-agent: other\nCrawl-delay: 9").delay == 2.5
    assert rules("User-agent: *\nCrawl-delay: soon").delay == 0


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"User-agent: a{number}\n" for number in range(15_000)) + "Disallow: /x\n" * 20_000,
        "User-agent: *\n" * 30_000 + "Disallow: /x\n" * 8_000,
        "User-agent: *\n" + "Disallow: /*a*a*a*a*a*b$\n" * 20_000,
        "User-agent: *\n" + "".join(f"Disallow: /{number}\n" for number in range(40_000)),
    ],
)
def test_D4_a_robots_txt_made_to_be_slow_is_not(text):
    started = time.process_time()
    learnt = rules(text)
    for _ in range(100):
        learnt.allow(PAGE)
    assert time.process_time() - started < 3


@given(st.text(alphabet="UserAgnt-*:Dislow/$#\n abc", max_size=200))
def test_D4_any_robots_txt_has_rules(text):
    assert rules(text).allow(PAGE) in (True, False)
    assert rules(text).delay >= 0


@pytest.mark.parametrize(
    ("headers", "out"),
    [
        ([], False),
        (["noai"], True),
        (["nofollow, NoImageAI"], True),
        (["noindex"], True),
        (["nofollow", "noimageindex"], True),
        (["none"], True),
        (["all"], False),
        (["otherbot: noindex, noai"], False),
        (["seer-ingest: noai"], True),
        (["otherbot: noai, seer-ingest: noindex"], True),
        (["*: noindex"], True),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], True),
        (["max-snippet: 5"], False),
    ],
)
def test_x_robots_tags_are_obeyed_that_concern_us(headers, out):
    said = image_opt_out(lambda name: headers if name == "X-Robots-Tag" else [])
    assert said == ("x_robots_tag" if out else None)


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("120") == 120
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 55 < (retry_after(in_a_minute) or 0) <= 60
    assert retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0
    assert retry_after(None) is retry_after("soon") is retry_after("-5") is None
    assert retry_after("9" * 5000) == 999_999_999


def taken(hosts, now):
    turns = []
    while turn := hosts.take(now):
        turns.append((turn.job, turn.refusal and turn.refusal.reason))
        if turn.refusal is None:
            hosts.done(turn, now)
    return turns


def hosts_with(*, per_host, per_address=99, rate=None):
    return Hosts(HostLimits((), connections=per_host, rate=rate), per_address=per_address, idle_limit=10)


def test_hosts_take_turns():
    hosts = hosts_with(per_host=2, per_address=99, rate=None)
    for job in ("a1", "a2", "a3", "b1", "c1", "c2"):
        hosts.add(job[0], job, 0.0)
    assert [job for job, _ in taken(hosts, 0.0)] == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_a_host_is_asked_by_few_at_a_time():
    hosts = hosts_with(per_host=2, per_address=99, rate=None)
    for number in range(5):
        hosts.add("a", number, 0.0)
    first, second = hosts.take(0.0), hosts.take(0.0)
    assert [first.job, second.job] == [0, 1]
    assert hosts.take(0.0) is None
    hosts.done(first, 0.0)
    assert hosts.take(0.0).job == 2


def test_a_rate_spaces_requests_and_so_does_a_crawl_delay():
    hosts = hosts_with(per_host=9, per_address=99, rate=2.0)
    for number in range(4):
        hosts.add("a", number, 0.0)
    assert [job for job, _ in taken(hosts, 0.0)] == [0]
    assert hosts.next_time() == 0.5
    assert [job for job, _ in taken(hosts, 0.5)] == [1]
    hosts.slow_down("a", 10.0, now=0.6)
    assert not taken(hosts, 10.5)
    assert [job for job, _ in taken(hosts, 10.6)] == [2]
    hosts.slow_down("a", 10.0, now=10.7)
    assert not taken(hosts, 20.5)


def test_a_host_that_asks_for_a_pause_gets_it_or_is_left_alone():
    hosts = hosts_with(per_host=9, per_address=99, rate=None)
    hosts.wait("a", 5.0, 0.0)
    hosts.add("a", 1, 0.0)
    hosts.add("b", 2, 0.0)
    assert taken(hosts, 4.9) == [(2, None)]
    hosts.wait("a", LONGEST_WAIT + 1, 1.0)
    assert taken(hosts, 1.0) == [(1, "host_asks_to_wait")]
    hosts.add("a", 3, LONGEST_WAIT + 3)
    assert taken(hosts, LONGEST_WAIT + 3) == [(3, None)]


def test_a_host_that_keeps_failing_is_given_up_until_later():
    hosts = hosts_with(per_host=1, per_address=99, rate=None)
    for _ in range(STRIKES - 1):
        hosts.strike("a", 0.0)
    hosts.answered("a")
    for _ in range(STRIKES - 1):
        hosts.strike("a", 0.0)
    for number in range(3):
        hosts.add("a", number, 0.0)
    turn = hosts.take(0.0)
    assert turn.refusal is None
    hosts.strike("a", 0.0)
    assert taken(hosts, 0.0) == [(1, "host_unreachable"), (2, "host_unreachable")]
    hosts.done(turn, 0.0)
    hosts.add("a", 3, 1e4)
    assert taken(hosts, 1e4) == [(3, None)]


def test_of_a_host_that_was_given_up_one_try_tells_whether_it_is_back():
    hosts = hosts_with(per_host=1, per_address=99, rate=None)
    for _ in range(STRIKES + 1):
        hosts.strike("a", 0.0)
    for again in (700.0, 2000.0):
        hosts.add("a", "a try", again)
        assert taken(hosts, again) == [("a try", None)]
        hosts.strike("a", again)
        hosts.add("a", "the next", again)
        assert taken(hosts, again) == [("the next", "host_unreachable")]
    # Twice as long each time.
    hosts.add("a", "too early", 4300.0)
    assert taken(hosts, 4300.0) == [("too early", "host_unreachable")]
    hosts.answered("a")
    for _ in range(STRIKES - 1):
        hosts.strike("a", 4500.0)
    hosts.add("a", "well", 4500.0)
    assert taken(hosts, 4500.0) == [("well", None)]


def test_slowest_hosts_are_told_by_what_holds_them_back_and_not_by_our_turn():
    hosts = hosts_with(per_host=1, per_address=99, rate=None)
    for name in ("slow", "quick"):
        for job in range(4):
            hosts.add(name, job, 0.0)
    assert hosts.slowest({}) == []
    # Both are asked; slow answers after 8 s, quick after 1 s, and then is not asked again until 20 s.
    slow, quick = hosts.take(0.0), hosts.take(0.0)
    assert [slow.name, quick.name] == ["slow", "quick"]
    hosts.done(quick, 1.0)
    hosts.done(slow, 8.0)
    turns = {turn.name: turn for turn in (hosts.take(20.0), hosts.take(20.0))}
    assert set(turns) == {"slow", "quick"}
    hosts.done(turns["quick"], 21.0)
    told = hosts.slowest({})
    assert [(host.name, host.waiting, host.seconds) for host in told] == [("slow", 2, 8.0), ("quick", 2, 1.0)]
    assert told[0].seconds_left == 16.0
    first, *_ = hosts.slowest({"quick": 30, "unknown": 99})
    assert (first.name, first.waiting, first.seconds_left) == ("quick", 32, 32.0)


def test_pauses_that_a_host_asked_for_count_as_its_time():
    hosts = hosts_with(per_host=9, per_address=99, rate=0.5)
    for job in range(5):
        hosts.add("polite", job, 0.0)
    for now in (0.0, 2.0, 4.0):
        hosts.done(hosts.take(now), now + 0.1)
    hosts.wait("polite", 30.0, 4.1)
    assert hosts.take(34.1) is not None
    (told,) = hosts.slowest({})
    assert told.seconds == pytest.approx((4.0 + 30.1) / 3)


def test_a_host_that_could_be_asked_more_is_not_slow():
    hosts = hosts_with(per_host=2, per_address=99, rate=None)
    for job in range(4):
        hosts.add("idle", job, 0.0)
    hosts.done(hosts.take(0.0), 50.0)
    assert hosts.slowest({}) == []


def test_hosts_are_forgotten_also_those_that_were_left_alone(monkeypatch):
    monkeypatch.setattr("ingest.web.host_queues._HOSTS_KNOWN", 100)
    hosts = hosts_with(per_host=1, per_address=99, rate=None)
    for now in range(2_000):
        for job in range(STRIKES + 3):
            hosts.add(f"{now}.example", job, now)
        while (turn := hosts.take(now)) is not None:
            if turn.refusal is None:
                hosts.strike(turn.name, now)
                hosts.done(turn, now)
    # Those of the last ten minutes are still left alone.
    assert len(hosts._hosts) < 600 + 2 * 100


def at_one_address(hosts, names, now=0.0, address=("1.1.1.1",)):
    """Give each its first turn, after which it is known where it is."""
    for name in names:
        hosts.add(name, "first", now)
    while (turn := hosts.take(now)) is not None:
        if hosts.settle(turn, address, now):
            hosts.done(turn, now)
        elif (now := now + 1) > 10_000:
            raise AssertionError("no turn for ever")
    return now


def test_hosts_of_one_address_are_few_at_a_time_and_all_have_their_turns():
    hosts = hosts_with(per_host=2, per_address=3, rate=None)
    names = [f"{number}.example" for number in range(10)]
    at_one_address(hosts, names)
    for job in range(4):
        for name in names:
            hosts.add(name, job, 0.0)
    under_way, served = [], Counter()
    while len(served) < 10 or min(served.values()) < 4:
        while (turn := hosts.take(0.0)) is not None:
            assert hosts.settle(turn, ("1.1.1.1",), 0.0)
            under_way.append(turn)
        assert len(under_way) == min(3, 40 - served.total())
        turn = under_way.pop(0)
        served[turn.name] += 1
        hosts.done(turn, 0.0)
        # They take turns.
        assert max(served.values()) - min(served[name] for name in names) <= 2


def test_a_host_that_moves_to_a_busy_address_waits_there_and_one_that_leaves_makes_room():
    hosts = hosts_with(per_host=9, per_address=1, rate=None)
    at_one_address(hosts, ["a"])
    at_one_address(hosts, ["b"], address=("2.2.2.2", "3.3.3.3"))
    for job in range(2):
        hosts.add("a", job, 0.0)
        hosts.add("b", job, 0.0)
    first, second = hosts.take(0.0), hosts.take(0.0)
    assert hosts.settle(first, ("1.1.1.1",), 0.0)
    assert not hosts.settle(second, ("1.1.1.1",), 0.0)
    hosts.done(second, 0.0)
    assert hosts.take(0.0) is None
    assert hosts.settle(first, ("4.4.4.4",), 0.0)
    third = hosts.take(0.0)
    assert (third.name, third.job) == ("b", 0)
    hosts.done(first, 0.0)
    hosts.done(third, 0.0)
    assert {hosts.take(0.0).name, hosts.take(0.0).name} == {"a", "b"}


def test_hosts_of_one_address_keep_their_crawl_delay_together_in_turn():
    hosts = hosts_with(per_host=2, per_address=9, rate=None)
    names = [f"{number}.example" for number in range(5)]
    at_one_address(hosts, [*names, "quick"])
    for name in names:
        hosts.slow_down(name, 10.0, 0.0)
        for job in range(2):
            hosts.add(name, job, 0.0)
    hosts.add("quick", 0, 0.0)
    times, now = [], 0.0
    while len(times) < 11:
        while (turn := hosts.take(now)) is not None:
            assert hosts.settle(turn, ("1.1.1.1",), now)
            times.append((now, turn.name))
            hosts.done(turn, now + 0.5)
        now = max(now + 1.0, hosts.next_time() or 0.0)
    assert times[0] == (0.0, "quick")
    slow = times[1:]
    assert [after - before for (before, _), (after, _) in pairwise(slow)] == [10.0] * 9
    assert [name for _, name in slow[:5]] == [name for _, name in slow[5:]]


def test_promised_turns_are_forgotten_with_the_jobs():
    hosts = hosts_with(per_host=1, per_address=9, rate=None)
    names = [f"{number}.example" for number in range(50)]
    at_one_address(hosts, names)
    for name in names:
        hosts.slow_down(name, 30.0, 0.0)
        hosts.add(name, "job", 0.0)
    assert len(list(hosts.clear())) == 50
    hosts.add("0.example", "job", 1.0)
    assert hosts.next_time() <= 60


def test_D4_hosts_that_ask_not_to_be_asked_for_years_are_remembered_in_bounded_memory(monkeypatch):
    monkeypatch.setattr("ingest.web.host_queues._HOSTS_KNOWN", 100)
    monkeypatch.setattr("ingest.web.host_queues._HOSTS_REMEMBERED", 1_000)
    hosts = hosts_with(per_host=1, per_address=9, rate=None)
    for number in range(5_000):
        hosts.add(f"{number}.example", "job", now=0)
        turn = hosts.take(now=0)
        hosts.settle(turn, (f"{number}",), now=0)
        hosts.wait(turn.name, seconds=1e9, now=0)
        hosts.done(turn, now=0)
    assert len(hosts._hosts) <= 1_000 and len(hosts._places) <= 1_000
    hosts.add("4999.example", "job", now=1e6)
    assert hosts.take(now=1e6).refusal.reason == "host_asks_to_wait"


def test_hosts_that_stay_left_alone_are_not_looked_at_for_every_request(monkeypatch):
    looks = 0

    def counted(idle, stop):
        nonlocal looks
        looks += 1
        return islice(idle, stop)

    monkeypatch.setattr("ingest.web.host_queues._HOSTS_KNOWN", 100)
    monkeypatch.setattr("ingest.web.host_queues.islice", counted)
    hosts = hosts_with(per_host=1, per_address=99, rate=None)
    for number in range(1_000):
        hosts.add(f"{number}.example", "job", now=0)
        turn = hosts.take(now=0)
        if number < 100:
            hosts.wait(turn.name, seconds=1e6, now=0)
        hosts.done(turn, now=0)
    # Once for every tenth of those that may be known.
    assert 0 < looks <= 1_000 // 10
