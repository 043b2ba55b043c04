"""C2: stages side by side: each once, after its inputs, within the room that there is, whatever ends when."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from cluster.host import Process
from cluster.job import Job, Resources, State
from cluster.local import LocalExecutor
from cluster.run.folder import RunFolder
from cluster.run.status import Failure, Status
from cluster.typed_yaml import Section
from pipeline.commands.dag import _run_here
from pipeline.commands.progress_line import ProgressLine
from pipeline.dag.ensure import ensure, lock_if_free
from pipeline.dag.graph import Failed, build_graph, run_graph
from pipeline.dag.recipe import DagRecipe
from pipeline.dag.stage import Kind, Receipt, Result, StopRequested, Work, read_receipt
from pipeline.stages import jobs
from pipeline.stages.room import Machine
from pipeline.stages.side_by_side import run_side_by_side

GPUS = ("4", "7")  # as another scheduler might leave them to us


class Toy(Section):
    number: int = 0
    gpus: int = 0
    fail: bool = False


ran: Counter[int] = Counter()


def toy(work: Work) -> Result:
    ran[work.recipe.number] += 1
    if work.recipe.fail:
        raise ValueError("broken on purpose")
    before = [(source.path / "out").read_text() for source in work.inputs.values()]
    (work.folder / "out").write_text("".join(before) + str(work.recipe.number))
    return Result({"number": work.recipe.number}, ["out"])


TOYS = {
    "toy": Kind(
        recipe=Toy,
        run=toy,
        optional=frozenset(f"r{slot}" for slot in range(8)),
        resources=lambda recipe, gpus: Resources(gpus_per_rank=recipe.gpus),
    )
}


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "KINDS", TOYS)
    ran.clear()


@dataclass
class FakeHandle:
    """A job that does its work the n-th time that anybody looks, in this process."""

    job: Job
    run: RunFolder
    status: Status
    lock: IO[str]
    looks: int
    id: str = ""
    detached: bool = False

    def state(self) -> State:
        self.looks -= 1
        if self.status.state is State.RUNNING and self.looks <= 0:
            try:
                self.job.resolve()(**self.job.arguments)
                self.end(State.COMPLETED)
            except Exception as error:
                self.end(State.FAILED, Failure(rank=0, type=type(error).__name__, message=str(error)))
        return self.status.state

    def wait(self) -> State:
        raise AssertionError("nobody waits for one alone")

    def cancel(self) -> None:
        self.end(State.CANCELLED)

    def end(self, state: State, failure: Failure | None = None) -> None:
        self.status = self.status.stopped(state, failure=failure)
        self.run.write_status(self.status)
        self.lock.close()


@dataclass
class Fake:
    """An executor of such jobs, which notes what runs beside what."""

    looks: random.Random
    gpus: tuple[str, ...] | None
    running: list[tuple[FakeHandle, tuple[str, ...]]]
    most: list[int]
    name: str = "local"
    site: None = None

    def refuse_impossible(self, job: Job) -> None: ...

    def start(self, job: Job, run: RunFolder, pending: Status, lock: IO[str]) -> FakeHandle:
        status = replace(pending, state=State.RUNNING, started=time.time(), launcher=Process.current())
        run.write_status(status)
        handle = FakeHandle(job, run, status, lock, self.looks.randint(1, 4))
        self.running[:] = [each for each in self.running if each[0].status.state is State.RUNNING]
        for _, gpus in self.running:
            assert not set(gpus) & set(self.gpus or ())
        assert len(self.gpus or ()) == min(len(GPUS), job.resources.ranks * job.resources.gpus_per_rank)
        self.running.append((handle, self.gpus or ()))
        self.most.append(len(self.running))
        return handle


@dataclass(kw_only=True)
class FakeMachine(Machine):
    looks: random.Random = field(default_factory=lambda: random.Random(0))
    running: list[Any] = field(default_factory=list)
    most: list[int] = field(default_factory=list)
    threads: dict[str, int | None] = field(default_factory=dict)

    def take(self, job: Job, stage: str, beside: int) -> Any:
        taken = super().take(job, stage, beside)
        if taken is None:
            return None
        here, executor = taken
        self.threads[stage] = here.resources.cpus_per_rank
        return here, Fake(self.looks, executor.gpus, self.running, self.most)


def graph(folder: Path, edges: list[set[int]], **recipes: dict[int, Any]) -> DagRecipe:
    """Stage i reads the stages edges[i]; `gpus={2: 1}` gives stage 2 a GPU."""
    return DagRecipe.model_validate(
        {
            "folder": str(folder),
            "stages": {
                f"s{index}": {
                    "kind": "toy",
                    "recipe": {"number": index}
                    | {key: values[index] for key, values in recipes.items() if index in values},
                    "inputs": {f"r{slot}": f"s{source}" for slot, source in enumerate(sorted(sources))},
                }
                for index, sources in enumerate(edges)
            },
        }
    )


def run(dag: DagRecipe, machine: Machine) -> tuple[dict[str, Receipt | Failed], list[str]]:
    said: list[str] = []
    return run_side_by_side(dag, build_graph(dag, TOYS), machine, say=said.append), said


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stages.side_by_side.POLL_SECONDS", 0)


random_graphs = st.integers(1, 7).flatmap(
    lambda n: st.tuples(*(st.sets(st.integers(0, i - 1)) if i else st.just(set()) for i in range(n)))
)


@pytest.mark.usefixtures("no_sleep")
@settings(max_examples=25, deadline=None)
@given(edges=random_graphs, data=st.data())
def test_C2_side_by_side_leaves_what_one_after_the_other_leaves(
    edges: list[set[int]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("graph")
    gpus = {index: data.draw(st.integers(0, 3)) for index in range(len(edges))}
    fail = {data.draw(st.integers(0, len(edges) - 1)): True} if data.draw(st.booleans()) else {}
    n = data.draw(st.integers(1, 4))
    machine = FakeMachine(jobs=n, cores=8, gpus=GPUS, looks=random.Random(data.draw(st.integers(0, 99))))
    ran.clear()
    there, _ = run(graph(folder / "there", edges, gpus=gpus, fail=fail), machine)
    assert max(machine.most) <= n
    assert set(ran.values()) == {1}
    once = dict(ran)

    here = graph(folder / "here", edges, gpus=gpus, fail=fail)
    results = run_graph(build_graph(here, TOYS), LocalExecutor(), say=lambda text: None)
    assert Counter(once) + Counter(once) == ran
    for name, receipt in results.items():
        other = there[name]
        assert type(other) is type(receipt)
        if isinstance(receipt, Receipt) and isinstance(other, Receipt):
            same = {"started": 0, "seconds": 0}
            assert other.model_copy(update=same) == receipt.model_copy(update=same)
        if isinstance(receipt, Failed) and isinstance(other, Failed):
            assert other.blocked_by == receipt.blocked_by

    ran.clear()
    again, said = run(graph(folder / "there", edges, gpus=gpus, fail=fail), machine)
    assert sum(ran.values()) == len(fail)
    assert again.keys() == there.keys() == {line.split()[0] for line in said}


@pytest.mark.slow
def test_threads_follow_from_the_graph_and_not_from_what_happens_to_run(tmp_path: Path) -> None:
    chain_and_fan: list[set[int]] = [set(), {0}, {0}, {0}, {1, 2, 3}]
    machine = FakeMachine(jobs=2, cores=8)
    run(graph(tmp_path, chain_and_fan), machine)
    assert machine.threads == {"s0": 8, "s1": 4, "s2": 4, "s3": 4, "s4": 8}


@pytest.mark.slow
def test_two_stages_of_one_key_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stages.side_by_side.PATIENCE", 0.0)
    dag = graph(tmp_path, [set(), set()])
    dag.stages["s1"] = dag.stages["s0"]
    results, said = run(dag, FakeMachine(jobs=2, cores=2))
    assert ran == {0: 1}
    assert results["s0"] == results["s1"]
    assert sum("is being made elsewhere" in line for line in said) == 1


@pytest.mark.slow
def test_what_another_process_makes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stages.side_by_side.PATIENCE", 0.0)
    dag = graph(tmp_path, [set(), set()])
    stage = build_graph(dag, TOYS)[0]

    def say(line: str) -> None:
        if "made elsewhere" in line:  # and now it is done, while others go on
            held[0].close()
            ensure(stage, LocalExecutor())

    held = [lock for lock in [lock_if_free(stage)] if lock is not None]
    results = run_side_by_side(dag, build_graph(dag, TOYS), FakeMachine(jobs=1, cores=2), say=say)
    assert ran == {0: 1, 1: 1}
    assert all(isinstance(result, Receipt) for result in results.values())


def test_ctrl_c_stops_all_that_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    dag = graph(tmp_path, [set(), set(), {0}])
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("s1") and "started" in line:
            os.kill(os.getpid(), signal.SIGINT)

    machine = FakeMachine(jobs=2, cores=2, looks=random.Random())
    machine.looks.randint = lambda low, high: 10**6  # type: ignore[method-assign, assignment]
    with pytest.raises(StopRequested, match="the same command again"):
        run_side_by_side(dag, build_graph(dag, TOYS), machine, say=say)
    assert [line.split()[:2] for line in said] == [
        ["s0", "started"],
        ["s1", "started"],
        ["SIGINT:", "what"],
        ["s0", "stopped"],
        ["s1", "stopped"],
    ]
    assert not ran


def test_a_failure_says_where_its_log_is(tmp_path: Path) -> None:
    results, _ = run(graph(tmp_path, [set()], fail={0: True}), FakeMachine(jobs=2, cores=2))
    failed = results["s0"]
    assert isinstance(failed, Failed) and isinstance(failed.error, UserError)
    assert "ValueError: broken on purpose (its log is " in str(failed.error)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_damaged_receipt_is_told_and_the_other_stages_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    dag = graph(tmp_path, [set(), set()])
    run(dag, FakeMachine(jobs=2, cores=2))
    damaged, gone = (stage.folder / "receipt.json" for stage in build_graph(dag, TOYS))
    damaged.write_text("{")
    gone.unlink()
    monkeypatch.setattr("pipeline.stages.room.machine_here", lambda *_, **__: FakeMachine(jobs=2, cores=2))
    progress = ProgressLine(io.StringIO())
    results = _run_here(dag, build_graph(dag, TOYS), progress, jobs=jobs, say=lambda text: None)
    failed = results["s0"]
    assert isinstance(failed, Failed) and f"{damaged} is damaged" in str(failed.error)
    assert isinstance(results["s1"], Receipt)


@pytest.mark.usefixtures("no_sleep")
@pytest.mark.parametrize(
    "trouble", [OSError(116, "Stale file handle"), UserError("status.json cannot be read: remote i/o error")]
)
def test_a_status_that_cannot_be_read_just_now_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    seen, troubles = FakeHandle.state, repeat(trouble, 8)

    def state(handle: FakeHandle) -> State:
        if (error := next(troubles, None)) is not None:
            raise error
        return seen(handle)

    monkeypatch.setattr(FakeHandle, "state", state)
    results, _ = run(graph(tmp_path, [set(), {0}]), FakeMachine(jobs=2, cores=2))
    assert all(isinstance(result, Receipt) for result in results.values()) and ran == {0: 1, 1: 1}

    troubles = repeat(trouble)
    monkeypatch.setattr("pipeline.stages.side_by_side.UNSEEN_SECONDS", 0.1)
    told = r"how stage s0 is \(.*(Stale file|remote i/o).*the same command again"
    with pytest.raises(UserError, match=told):
        run(graph(tmp_path / "long", [set()]), FakeMachine(jobs=1, cores=2))


SLEEPERS = """
import fcntl, json, os, sys, time
from pathlib import Path
from cluster.job import Job, Resources
from cluster.local import LocalExecutor
from cluster.typed_yaml import Section
from pipeline.dag.graph import build_graph, run_graph
from pipeline.dag.recipe import DagRecipe
from pipeline.dag.stage import Kind, Result
from pipeline.stages import jobs
from pipeline.stages.room import Machine
from pipeline.stages.side_by_side import run_side_by_side

class Toy(Section):
    number: int = 0

def alone(folder, name):
    file = (Path(folder) / name).open("w")  # held until the process ends, however it ends
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file

def sleep(work):
    global held
    held = alone(work.folder, "busy")
    time.sleep(0.1)
    before = [(source.path / "out").read_text() for source in work.inputs.values()]
    (work.folder / "out").write_text("".join(before) + str(work.recipe.number))
    return Result({}, ["out"])

def rank(folder):
    global held
    held = alone(folder, "busy" + os.environ["RANK"])
    time.sleep(0.1)

def train(work, resources):
    return Job(name=work.folder.name, function="sleepers:rank", arguments={"folder": str(work.folder)},
               resources=resources, folder=work.folder)

def trained(work):
    (work.folder / "out").write_text(str(work.recipe.number))
    return Result({}, ["out"])

KINDS = {
    "toy": Kind(recipe=Toy, run=sleep, optional=frozenset({"a", "b"})),
    "job": Kind(recipe=Toy, run=trained, job=train, resources=lambda *_: Resources(ranks_per_node=2),
                optional=frozenset({"a", "b"})),
}

def run_stage(**arguments):
    jobs.KINDS = KINDS
    jobs.run_stage(**arguments)

def main():
    dag = DagRecipe.model_validate_json(sys.argv[1])
    stages, say = build_graph(dag, KINDS), lambda line: print(line, flush=True)
    if sys.argv[2] == "1":
        run_graph(stages, LocalExecutor(), say=say)
    else:
        from dataclasses import replace
        from pipeline.stages import side_by_side
        of_the_product = side_by_side.stage_job
        side_by_side.stage_job = lambda *words, **named: replace(
            of_the_product(*words, **named), function="sleepers:run_stage"
        )
        run_side_by_side(dag, stages, Machine(jobs=int(sys.argv[2]), cores=2), say=say)
"""


@pytest.mark.slow
def test_C2_killed_at_any_time_and_gone_on_with_every_stage_has_the_receipt_of_a_quiet_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    stages = {
        "first": {"kind": "toy", "recipe": {"number": 1}},
        "train": {"kind": "job", "recipe": {"number": 2}, "inputs": {"a": "first"}},
        "beside": {"kind": "toy", "recipe": {"number": 3}, "inputs": {"a": "first"}},
        "last": {"kind": "toy", "recipe": {"number": 4}, "inputs": {"a": "train", "b": "beside"}},
    }

    def start(name: str, at_a_time: int) -> subprocess.Popen[bytes]:
        dag = DagRecipe.model_validate({"folder": str(tmp_path / name), "stages": stages})
        code = "import sleepers; sleepers.main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, dag.model_dump_json(), str(at_a_time)], stdout=subprocess.PIPE
        )

    def receipts(name: str) -> dict[Path, Receipt]:
        found = (tmp_path / name).glob("*/receipt.json")
        return {path.relative_to(tmp_path / name): read_receipt(path) for path in found}

    quiet = start("quiet", 1)
    random.seed(seed := int(os.environ.get("C2_SEED", time.time_ns() % 10_000)))
    print(f"C2_SEED={seed}")
    kept: dict[Path, Receipt] = {}
    for line in (b"first", b"train"):
        driver = start("killed", 2)
        assert driver.stdout is not None
        while not driver.stdout.readline().startswith(line):
            pass
        time.sleep(random.uniform(0, 0.6))
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.communicate()
        assert psutil.wait_procs(family, timeout=20)[1] == []  # nobody goes on without it
        now = receipts("killed")
        assert kept.items() <= now.items()
        kept = now
    said = start("killed", 2).communicate()[0].decode()
    assert "failed" not in said, said
    assert kept.items() <= receipts("killed").items()
    assert quiet.communicate()[0].decode().count("done") == 4
    varies = {"started": 0, "seconds": 0}
    assert {path: each.model_copy(update=varies) for path, each in receipts("killed").items()} == {
        path: each.model_copy(update=varies) for path, each in receipts("quiet").items()
    }
