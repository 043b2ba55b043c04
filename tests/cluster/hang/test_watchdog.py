"""The watchdog: ranks that hang, in every way, are dumped and ended; ranks that do not are left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.errors import UserError
from cluster.hang.end_hang import Stalled, blame, end_hang
from cluster.hang.heartbeat import NO_STEP, Heartbeat, HeartbeatFile, read_heartbeats
from cluster.hang.watchdog import Watchdog, Watcher
from cluster.host import Process
from cluster.job import Job, Resources, State
from cluster.local import LocalExecutor
from cluster.run.folder import RunFolder
from cluster.run.status import Failure, explain
from cluster.submit import submit

RANK_FUNCTIONS = """
import os, signal, sys, threading, time
from pathlib import Path
from cluster.run.folder import RunFolder
from cluster.hang.watchdog import Watchdog

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def watchdog(folder, seconds):
    return Watchdog(RunFolder(Path(folder)), rank=RANK, local_rank=RANK, seconds=seconds, nccl=True)

def write(path, text):
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)

def wait_for_others(folder, step):
    # As a collective does at the end of every step.
    write(Path(folder, f"at-{RANK}"), str(step))
    others = [Path(folder, f"at-{rank}") for rank in range(RANKS)]
    while not all(other.exists() and int(other.read_text()) >= step for other in others):
        time.sleep(0.001)

def stop_here():
    os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        time.sleep(0.01)

def loop_here():
    while True:
        pass

def hang(folder, seconds, how, at):
    write(Path(folder, f"pid-{RANK}"), str(os.getpid()))
    with watchdog(folder, seconds) as dog:
        for step in range(1, at + 2):
            if RANK == 1 and step == at + 1:
                globals()[how]()
            wait_for_others(folder, step)
            dog.beat(step)

def be_slow(folder, seconds):
    with watchdog(folder, seconds) as dog:
        for step in range(1, 5):
            time.sleep(0.8 * seconds)
            dog.beat(step)
        time.sleep(2.4 * seconds)
        dog.beat(5)
        dog.busy("saving a checkpoint")
        time.sleep(5 * seconds)
        dog.beat(6)

def train_for_ever(folder):
    with watchdog(folder, 60) as dog:
        write(Path(folder, f"pid-{RANK}"), str(os.getpid()))
        step = 0
        while not Path(folder, "enough").exists():
            time.sleep(0.001)
            step += 1
            dog.beat(step)

def hang_with_nccl(folder, seconds):
    with watchdog(folder, seconds) as dog:
        pipe = os.environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + f"{RANK}.pipe"
        os.mkfifo(pipe)
        asked = open(os.open(pipe, os.O_RDWR), "rb", buffering=0)
        dog.beat(1)
        assert asked.read(1)
        Path(os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] + str(RANK)).write_text(f"calls of {RANK}")
        while True:
            time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank_functions.py").write_text(RANK_FUNCTIONS)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)  # it is remembered


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def run_job(tmp_path: Path, function: str, **arguments: Any) -> tuple[State, RunFolder]:
    folder = tmp_path / "run"
    job = Job(
        name="test",
        function=f"rank_functions:{function}",
        arguments={"folder": str(folder), **arguments},
        resources=Resources(ranks_per_node=2),
        folder=folder,
    )
    return submit(job, LocalExecutor()).wait(), RunFolder(folder)


def processes_of(tmp_path: Path) -> list[list[str]]:
    """Command lines of whatever still runs for this test, watchers and ranks."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.pid != os.getpid() and any(word.startswith(str(tmp_path)) for word in words):
            found.append(words)
    return found


def nothing_is_left(tmp_path: Path) -> bool:
    return not processes_of(tmp_path) and not list((tmp_path / "tmp").iterdir())


def failure_of(run: RunFolder) -> Failure:
    failure = run.status().failure
    assert failure is not None
    return failure


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_everyone_is_dumped_and_ended(tmp_path: Path) -> None:
    state, run = run_job(tmp_path, "hang", seconds=1.0, how="stop_here", at=5)
    assert state is State.FAILED
    failure = failure_of(run)
    assert (failure.type, failure.rank, failure.node) == ("Hang", 1, socket.gethostname())
    assert "after step 5 (stopped, state T)" in failure.message
    assert "rank 0 for " in failure.message and str(run.path / "stacks") in failure.message
    assert " failed first: Hang: no step on " in explain(run.status()).splitlines()[0]
    for rank, where in enumerate(["wait_for_others", "stop_here"]):
        stacks = (run.path / "stacks" / f"rank-{rank}.txt").read_text()
        assert f"in {where}" in stacks
        assert "==== attempt 1, " in stacks
    for rank in range(2):
        assert not psutil.pid_exists(int((run.path / f"pid-{rank}").read_text()))
    wait_until(lambda: nothing_is_left(tmp_path))
    lines = [line for line in run.tail(0) if "watchdog [" in line]
    assert [line.partition("] ")[2].split(" ")[0] for line in lines] == ["no", "wrote", "killed"]
    assert len(lines) == len(run.tail(0))


@pytest.mark.slow
def test_a_rank_in_an_endless_loop_is_seen_by_its_stack(tmp_path: Path) -> None:
    state, run = run_job(tmp_path, "hang", seconds=1.0, how="loop_here", at=3)
    assert state is State.FAILED
    assert failure_of(run).type == "Hang"
    assert "rank 1 for " in failure_of(run).message
    assert "in loop_here" in (run.path / "stacks" / "rank-1.txt").read_text()
    assert "in wait_for_others" in (run.path / "stacks" / "rank-0.txt").read_text()
    wait_until(lambda: nothing_is_left(tmp_path))


@pytest.mark.slow
def test_ranks_that_never_take_a_step_are_given_six_times_as_long(tmp_path: Path) -> None:
    started = time.monotonic()
    state, run = run_job(tmp_path, "hang", seconds=0.5, how="stop_here", at=0)
    assert time.monotonic() - started > 3.0
    assert state is State.FAILED
    message = failure_of(run).message
    assert re.search(r"rank 1 starting up for \d+ s before its first step \(stopped", message)


@pytest.mark.slow
def test_a_slow_run_is_left_alone_and_leaves_nothing(tmp_path: Path) -> None:
    state, run = run_job(tmp_path, "be_slow", seconds=0.5)
    assert state is State.COMPLETED, failure_of(run)
    assert not (run.path / "stacks").exists()
    assert not list((run.path / "errors").iterdir())
    assert run.tail(0) == []
    assert nothing_is_left(tmp_path)


@pytest.mark.slow
def test_the_flight_recorder_is_asked_for_and_kept(tmp_path: Path) -> None:
    _, run = run_job(tmp_path, "hang_with_nccl", seconds=0.5)
    for rank in range(2):
        assert (run.path / "stacks" / f"nccl-rank-{rank}").read_text() == f"calls of {rank}"
    assert "wrote 2 of 2 flight recorders" in "\n".join(run.tail(0))


def start_ranks(tmp_path: Path) -> list[subprocess.Popen[bytes]]:
    """Two ranks without a launcher, once both take steps."""
    (tmp_path / "run").mkdir()
    code = "import sys, rank_functions; rank_functions.train_for_ever(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    ranks = [
        subprocess.Popen(command, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]
    wait_until(lambda: all((tmp_path / "run" / f"pid-{rank}").exists() for rank in range(2)))
    return ranks


@pytest.mark.slow
def test_the_watcher_ends_with_its_rank_however_that_ends(tmp_path: Path) -> None:
    ranks = start_ranks(tmp_path)
    (watcher,) = psutil.Process(ranks[0].pid).children()
    for number in (signal.SIGTERM, signal.SIGUSR2):  # as a scheduler sends them to every process of a job
        wait_until(lambda: psutil.Process(watcher.pid).cmdline()[1:3] == ["-m", "cluster.hang.watchdog"])
        wait_until(lambda number=number: ignores(watcher.pid, number))
        watcher.send_signal(number)
    assert watcher.is_running()
    ranks[0].kill()
    ranks[0].wait()
    wait_until(lambda: not watcher.is_running())
    assert ranks[1].poll() is None
    (tmp_path / "run" / "enough").touch()
    assert ranks[1].wait(20) == 0
    assert nothing_is_left(tmp_path)


def ignores(pid: int, number: signal.Signals) -> bool:
    """Whether a process has got as far as to ignore a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
    return bool(mask >> (number - 1) & 1)


def test_sigusr1_shows_what_a_running_rank_does(tmp_path: Path) -> None:
    ranks = start_ranks(tmp_path)
    ranks[1].send_signal(signal.SIGUSR1)
    stacks = tmp_path / "run" / "stacks" / "rank-1.txt"
    wait_until(lambda: "in train_for_ever" in stacks.read_text())
    (tmp_path / "run" / "enough").touch()
    assert [rank.wait(20) for rank in ranks] == [0, 0]
    assert [path.name for path in stacks.parent.iterdir()] == ["rank-1.txt"]


def make_beat(rank: int = 0, **values: Any) -> Heartbeat:
    numbers = {"step": 5, "stepped_at": 10.0, "sign_at": 10.0, "busy_seconds": 0.0, "busy_with": ""}
    return Heartbeat(rank=rank, process=Process.current(), **(numbers | values))


def make_watcher(tmp_path: Path, seconds: float = 10.0) -> Watcher:
    return Watcher(RunFolder(tmp_path), tmp_path, seconds=seconds, ranks=1)


def silence_until_overdue(watcher: Watcher, beat: Heartbeat) -> int:
    """Seconds after which a rank that says nothing more is overdue."""
    return next(second for second in range(1, 10_000) if watcher.overdue([beat], elapsed=1.0))


def after_steps(tmp_path: Path, durations: list[float]) -> tuple[Watcher, Heartbeat]:
    watcher, now = make_watcher(tmp_path), 10.0
    beat = make_beat(step=0)
    for step, seconds in enumerate([*durations, 0.0]):
        beat = make_beat(step=step, stepped_at=now, sign_at=now)
        assert not watcher.overdue([beat], elapsed=0.0)
        now += seconds
    return watcher, beat


@pytest.mark.parametrize(
    ("durations", "patience"),
    [
        ([1.0] * 50, 10),  # never less than was asked for
        ([4.0] * 50, 20),
        ([4.0] * 99 + [100.0], 20),  # one step in a hundred may have been long
        ([4.0] * 50 + [8.0], 40),
    ],
)
def test_patience_is_five_long_steps(tmp_path: Path, durations: list[float], patience: int) -> None:
    watcher, beat = after_steps(tmp_path, durations)
    assert silence_until_overdue(watcher, beat) == patience + 1


def test_patience_is_six_times_as_long_while_busy_and_busy_time_is_no_step(tmp_path: Path) -> None:
    watcher, beat = after_steps(tmp_path, [1.0] * 10)
    now = beat.stepped_at
    busy = replace(beat, sign_at=now + 1, busy_with="saving a checkpoint")
    assert not watcher.overdue([busy], elapsed=1000.0)  # to be busy is a sign of life
    assert silence_until_overdue(watcher, busy) == 61
    saved = replace(beat, step=beat.step + 1, stepped_at=now + 601, sign_at=now + 601, busy_seconds=600.0)
    assert not watcher.overdue([saved], elapsed=1.0)
    assert silence_until_overdue(watcher, saved) == 11


def test_one_silent_rank_is_enough(tmp_path: Path) -> None:
    watcher = make_watcher(tmp_path)
    beats = [make_beat(0), make_beat(1)]
    for second in range(11):
        beats[0] = replace(beats[0], step=second, sign_at=float(second))
        assert not watcher.overdue(beats, elapsed=1.0)
    assert watcher.overdue(beats, elapsed=1.0)


def stalled(rank: int, state: str = "S", **values: Any) -> Stalled:
    return Stalled(heartbeat=make_beat(rank, **values), seconds=1.0, state=state)


@pytest.mark.parametrize(
    ("ranks", "culprit", "evident"),
    [
        ([stalled(0), stalled(1, "T"), stalled(2, step=4)], 1, True),
        ([stalled(0), stalled(1, "D")], 1, True),
        ([stalled(0), stalled(1, "X")], 1, True),
        ([stalled(0), stalled(1, step=4), stalled(2)], 1, True),
        ([stalled(0), stalled(1, sign_at=9.9)], 1, False),
        ([stalled(0, "T"), stalled(1, "T", step=3)], 1, True),
        ([stalled(0)], 0, False),
    ],
)
def test_who_cannot_run_or_is_behind_is_blamed(ranks: list[Stalled], culprit: int, evident: bool) -> None:
    found, clear = blame(ranks)
    assert (found.heartbeat.rank, clear) == (culprit, evident)


def test_a_process_that_has_got_a_dead_rank_s_number_is_not_touched(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        reused = Process(host=socket.gethostname(), pid=stranger.pid, started="an hour ago")
        end_hang(RunFolder.create(tmp_path), [replace(make_beat(), process=reused)], ranks=1)
        assert stranger.poll() is None
        stranger.communicate(b"\n")
    assert stranger.returncode == 0
    (error,) = (tmp_path / "errors").iterdir()
    assert "(dead, state X)" in json.loads(error.read_text())["message"]


def test_a_heartbeat_is_cheap_and_says_what_it_was_told(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    file = HeartbeatFile(folder, rank=11)
    (first,) = read_heartbeats(folder)
    assert (first.rank, first.process, first.step) == (11, Process.current(), NO_STEP)
    assert first.busy_with == "starting up"
    before = time.perf_counter()
    for step in range(10_000):
        file.beat(step)
    assert (time.perf_counter() - before) / 10_000 < 50e-6
    (beat,) = read_heartbeats(folder)
    assert (beat.step, beat.busy_with) == (9_999, "")
    assert 0 < beat.busy_seconds < beat.stepped_at == beat.sign_at
    file.busy("ä" * 100)  # cut within a character
    assert next(read_heartbeats(folder)).busy_with.startswith("ä" * 31)
    file.close()
    assert not list(folder.iterdir())


def test_outside_its_block_a_watchdog_does_nothing(tmp_path: Path) -> None:
    watchdog = Watchdog(RunFolder(tmp_path / "run"), rank=0, local_rank=0, seconds=1.0, nccl=True)
    watchdog.beat(1)
    watchdog.busy("saving a checkpoint")
    assert not (tmp_path / "run").exists()
    before = dict(os.environ)
    with watchdog:
        assert int(os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"]) > 0
        with (
            pytest.raises(KeyError),
            Watchdog(RunFolder(tmp_path / "b"), rank=0, local_rank=1, seconds=1.0, nccl=True),
        ):
            raise KeyError
    watchdog.beat(2)
    assert dict(os.environ) == before
    assert nothing_is_left(tmp_path)


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    watchdog = Watchdog(RunFolder(tmp_path / "run"), rank=0, local_rank=1, seconds=1.0)
    with watchdog:
        (folder,) = (tmp_path / "tmp").iterdir()
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(UserError, match="belongs to another user: remove it, or set TMPDIR"), watchdog:
        pass


def test_a_rank_whose_stacks_have_no_place_works_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder.create(tmp_path / "run")
    (run.path / "stacks").touch()  # as on a full disk, no folder can be made there
    with Watchdog(run, rank=0, local_rank=1, seconds=5.0):
        pass
    assert "stacks of this rank will be in its log" in caplog.text
