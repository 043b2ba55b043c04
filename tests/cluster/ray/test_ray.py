"""The Ray executor, on real clusters of several nodes on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import AlreadyRunning, UserError
from cluster.executors import Look, cancel, status_of
from cluster.host import Process
from cluster.job import PREEMPTED_EXIT_CODE, Job, Resources, State
from cluster.ray import connect, gang
from cluster.ray import status as ray_status
from cluster.ray.connect import NAMESPACE, load_ray, start_here, write_submission
from cluster.ray.executor import RayExecutor, reopen
from cluster.ray.gang import cpus_per_rank
from cluster.ray.in_allocation import cpus_of_nodes, head_options, ports_of, step
from cluster.ray.rank_worker import RankWorker
from cluster.ray.status import actor_name, current_status
from cluster.run.folder import RunFolder
from cluster.run.restarts import Cause, read_restarts
from cluster.run.status import Status, explain
from cluster.site import Site
from cluster.submit import submit

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'seer-pipeline[ray]'"
)
PATIENCE = 90.0

FUNCTIONS = """
import json, os, signal, sys, time
from pathlib import Path
from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.rank.preempt import Preempted, PreemptionFlag
from cluster.run.folder import RunFolder
from cluster.run.status import Failure

RANK, START = int(os.environ.get("RANK", "0")), int(os.environ.get("SUBMIT_START", "0"))

def say_where(folder):
    seen = {"directory": os.getcwd(), "source": sys.modules["cluster"].__file__}
    Path(folder, f"seen-{RANK}.json").write_text(json.dumps(seen | dict(os.environ)))
    print(f"hello from {RANK}")

def checkpoint_then_die_once(run):
    latest = Path(run, "checkpoints", "latest")
    if START > 0:
        print(f"resumed from {latest.read_text()}")
        return
    if RANK == 0:
        latest.parent.mkdir()
        latest.write_text("step-1")
    while not latest.exists():
        time.sleep(0.01)
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def mistake():
    raise UserError("data.root is empty: crawl something into it")

def hang_and_be_killed(run):
    hang = Failure(rank=None, type="Hang", message="no step on n0")
    RunFolder(Path(run)).write_error("hang-n0", hang)
    os.kill(os.getpid(), signal.SIGKILL)

def save_and_stop_once():
    if START == 0:
        raise Preempted("saved")

def work_until_asked_to_stop(folder):
    with PreemptionFlag(RunFolder(Path(folder))) as flag:
        # In one step: somebody waits for the file, and reads it at once.
        write_atomically(Path(folder, f"ready-{RANK}"), f"{os.getpid()}")
        while not flag.requested:
            time.sleep(0.01)
    raise Preempted("saved")

def work_until_asked_in_the_first_start(folder):
    if START == 0:
        work_until_asked_to_stop(folder)

def wait_in_the_first_start(folder, run):
    Path(folder, f"start-{START}-{RANK}").touch()
    while START == 0 and not Path(folder, "go").exists():
        time.sleep(0.05)

def square(item):
    return item * item

def die_once(item):
    if item["number"] == 2 and not Path(item["folder"], "died").exists():
        Path(item["folder"], "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item["number"]

def refuse_3(item):
    if item == 3:
        raise ValueError("three")
    return item
"""


@pytest.fixture(scope="module")
def cluster(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes with one core each; the rank functions are importable."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "ray_functions.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield ray_cluster


def make_job(folder: Path, name: str, /, *, nodes: int = 2, max_crashes: int = 3, **arguments: Any) -> Job:
    return Job(
        name="test",
        function=f"ray_functions:{name}",
        arguments=arguments,
        resources=Resources(nodes=nodes),
        folder=folder,
        max_crashes=max_crashes,
    )


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def both_ready(folder: Path, pattern: str) -> None:
    wait_until(lambda: all((folder / pattern.format(rank)).exists() for rank in range(2)))


def causes(run: RunFolder) -> list[Cause]:
    return [restart.cause for restart in read_restarts(run)]


@pytest.mark.ray
@needs_ray
def test_C1_ranks_on_two_nodes_know_their_places_and_rank_0_is_heard(cluster: Any, tmp_path: Path) -> None:
    class Heard(list[str]):
        def write(self, text: str) -> None:
            self.append(text)

        def flush(self) -> None: ...

    heard = Heard()
    job = make_job(tmp_path / "run", "say_where", folder=str(tmp_path))
    handle = submit(job, RayExecutor(cluster.address, stream=heard))
    assert handle.wait() is State.COMPLETED
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert [(one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"]) for one in seen] == [
        ("0", "0", "2"),
        ("1", "0", "2"),
    ]
    assert seen[0]["RAY_RAYLET_PID"] != seen[1]["RAY_RAYLET_PID"]
    assert len({(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in seen}) == 1
    assert {one["OMP_NUM_THREADS"] for one in seen} == {"1"}
    assert "MALLOC_MMAP_THRESHOLD_" in seen[0]
    assert seen[0]["source"] == str(job.folder / "source" / "cluster" / "__init__.py")
    assert seen[0]["directory"] == str(Path.cwd())
    assert "".join(heard) == "hello from 0\n"
    status = RunFolder(job.folder).read_status()
    assert (status.executor, status.id, status.attempt) == ("ray", handle.id, 1)
    assert not read_restarts(RunFolder(job.folder))


@pytest.mark.ray
@needs_ray
def test_a_killed_rank_restarts_all_from_the_last_checkpoint(cluster: Any, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "checkpoint_then_die_once", run=str(tmp_path / "run"))
    assert submit(job, RayExecutor(cluster.address)).wait() is State.COMPLETED
    run = RunFolder(job.folder)
    assert run.tail(0) == run.tail(1) == ["resumed from step-1"]
    assert run.read_status().attempt == 2
    (restart,) = read_restarts(run)
    assert (restart.cause, restart.rank, restart.checkpoint) == (Cause.CRASH, 1, "step-1")
    assert restart.message == "Killed: killed by SIGKILL (out of memory?)"
    assert restart.node is not None


@pytest.mark.ray
@needs_ray
def test_a_spent_budget_ends_the_run_with_the_reason(cluster: Any, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "die", nodes=1, max_crashes=2)
    assert submit(job, RayExecutor(cluster.address)).wait() is State.FAILED
    status = RunFolder(job.folder).read_status()
    assert status.attempt == 2
    assert "2 attempts ended by crash without any checkpoint; the last: Killed" in explain(status)
    assert status.failure is not None
    assert (status.failure.rank, status.failure.node) == (0, status.nodes)


@pytest.mark.ray
@needs_ray
def test_a_mistake_of_the_user_is_not_tried_again(cluster: Any, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "mistake", nodes=1)
    assert submit(job, RayExecutor(cluster.address)).wait() is State.FAILED
    status = RunFolder(job.folder).read_status()
    assert status.attempt == 1
    assert explain(status) == "data.root is empty: crawl something into it"


@pytest.mark.ray
@needs_ray
def test_ranks_that_saved_on_request_start_again_for_free(cluster: Any, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "save_and_stop_once", nodes=1, max_crashes=1)
    assert submit(job, RayExecutor(cluster.address)).wait() is State.COMPLETED
    assert causes(RunFolder(job.folder)) == [Cause.PREEMPTED]


@pytest.mark.ray
@needs_ray
def test_a_run_goes_on_without_its_submitter_once_and_can_be_cancelled(cluster: Any, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "work_until_asked_to_stop", nodes=1, folder=str(tmp_path))
    (tmp_path / "job.json").write_text(job.to_json())
    code = (
        "import sys; from pathlib import Path; from cluster.job import Job;"
        "from cluster.ray.executor import RayExecutor;"
        "from cluster.submit import submit; from cluster.typed_json import read_record;"
        "submit(read_record(Job, Path(sys.argv[1]), remedy=''), RayExecutor(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "job.json"), cluster.address]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": sys.path[0]})
    wait_until((tmp_path / "ready-0").exists)
    run = RunFolder.open(job.folder)
    wait_until(lambda: current_status(run).state is State.RUNNING)
    with pytest.raises(AlreadyRunning, match="going on already, as Ray actor run-"):
        submit(job, RayExecutor(cluster.address))
    pid = int((tmp_path / "ready-0").read_text())
    handle = reopen(run)
    handle.cancel()
    assert handle.wait() is State.CANCELLED
    assert not Path(f"/proc/{pid}").exists()
    assert causes(run) == [Cause.PREEMPTED]  # it had saved


@pytest.mark.ray
@needs_ray
def test_what_the_cluster_has_no_room_for_waits_and_can_be_cancelled(cluster: Any, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "die", nodes=5)
    handle = submit(job, RayExecutor(cluster.address))
    assert handle.state() is State.PENDING
    handle.cancel()
    assert handle.wait() is State.CANCELLED
    assert RunFolder(job.folder).read_status().attempt == 0


@pytest.mark.ray
@needs_ray
def test_a_lost_supervisor_is_made_anew_and_goes_on(cluster: Any, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    job = make_job(run.path, "wait_in_the_first_start", nodes=1, folder=str(tmp_path), run=str(run.path))
    handle = submit(job, RayExecutor(cluster.address))
    wait_until((tmp_path / "start-0-0").exists)
    wait_until(lambda: handle.state() is State.RUNNING)
    ray = load_ray()
    ray.kill(ray.get_actor(actor_name(run.path), namespace=NAMESPACE), no_restart=False)
    assert handle.wait() is State.COMPLETED
    assert run.read_status().attempt == 2
    assert causes(run) == [Cause.LOST]


@pytest.mark.ray
@needs_ray
def test_map_does_lost_items_again_and_reads_no_more_than_it_may(cluster: Any, tmp_path: Path) -> None:
    read = 0

    def items() -> Iterator[dict[str, Any]]:
        nonlocal read
        for number in range(8):
            read += 1
            yield {"number": number, "folder": str(tmp_path)}

    done = []
    executor = RayExecutor(cluster.address)
    for index, result in executor.map("ray_functions:die_once", items(), in_flight=2, retries=2):
        assert index == result
        done.append(index)
        assert read <= len(done) + 1  # the one that is still out
    assert sorted(done) == list(range(8))
    assert (tmp_path / "died").exists()


@pytest.mark.ray
@needs_ray
def test_map_names_the_item_that_failed(cluster: Any) -> None:
    results = RayExecutor(cluster.address).map("ray_functions:refuse_3", range(9), in_flight=1, retries=0)
    with pytest.raises(RuntimeError, match="item 3, 3: ValueError: three"):
        list(results)


@pytest.mark.ray
@needs_ray
def test_a_lost_node_restarts_all_on_what_is_there(cluster: Any, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    job = make_job(run.path, "wait_in_the_first_start", folder=str(tmp_path), run=str(run.path))
    handle = submit(job, RayExecutor(cluster.address))
    both_ready(tmp_path, "start-0-{}")
    wait_until(lambda: handle.state() is State.RUNNING)
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    cluster.add_node(num_cpus=1)
    assert handle.wait() is State.COMPLETED
    assert (tmp_path / f"start-{run.read_status().attempt - 1}-1").exists()
    assert set(causes(run)) == {Cause.LOST}


@pytest.mark.ray
@needs_ray
def test_a_node_that_is_to_go_is_left_for_free(cluster: Any, tmp_path: Path) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    def drain(node: str) -> None:
        in_an_hour = int(1000 * (time.time() + 3600))
        reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        assert GcsClient(address=cluster.address).drain_node(node, reason, "reclaimed", in_an_hour)[0]

    run = RunFolder(tmp_path / "run")
    job = make_job(run.path, "work_until_asked_in_the_first_start", nodes=1, folder=str(tmp_path))
    leaving = cluster.add_node(num_cpus=2)  # the only one with room for it
    job = replace(job, resources=Resources(cpus_per_rank=2))
    handle = submit(job, RayExecutor(cluster.address))
    wait_until((tmp_path / "ready-0").exists)
    drain(leaving.node_id)
    wait_until(lambda: causes(run) == [Cause.PREEMPTED])
    other = cluster.add_node(num_cpus=2)
    assert handle.wait() is State.COMPLETED
    assert causes(run) == [Cause.PREEMPTED]
    for node in (leaving, other):
        cluster.remove_node(node)


def test_a_ray_without_the_private_call_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang, "load_ray", SimpleNamespace)
    assert gang.draining_nodes() == set()


def test_a_ray_of_another_version_is_told_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    told = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.40.0\n    Python: 3.10.2\n"
        "This process on 10.0.0.7 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )

    def refuse(**options: Any) -> None:
        raise RuntimeError(told)

    monkeypatch.setattr(connect, "_init", refuse)
    with pytest.raises(UserError) as refused:
        connect.join("auto", NAMESPACE)
    assert str(refused.value) == (
        "the Ray at auto is 2.40.0 on Python 3.10.2, and here is 2.60.0 on Python 3.11.7: both must be the "
        "same; pip install 'ray==2.40.0'"
    )


def test_a_ray_that_came_back_elsewhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(tmp_path / "run")
    gone = {"address": "127.0.0.1:5", "cluster": "127.0.0.1:5", "own": False}
    (run.path / "ray.json").write_text(json.dumps(gone))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connect, "users_site", lambda: Site(ray_address="127.0.0.1:6"))
    monkeypatch.setattr(connect, "_address_of_this_machine", lambda: None)
    assert connect.find_again(run, None) == "127.0.0.1:5"  # which is told not to answer
    with socket.create_server(("127.0.0.1", 0)) as head:
        here = f"127.0.0.1:{head.getsockname()[1]}"
        with monkeypatch.context() as patch:
            patch.setenv("RAY_ADDRESS", here)
            assert connect.find_again(run, "127.0.0.1:5") == here
        with monkeypatch.context() as patch:
            patch.setattr(connect, "users_site", lambda: Site(ray_address=here))
            assert connect.find_again(run, "127.0.0.1:5") == here
        monkeypatch.setattr(connect, "_address_of_this_machine", lambda: here)
        assert connect.find_again(run, None) == here
        (run.path / "ray.json").write_text(json.dumps(gone | {"own": True}))
        assert connect.find_again(run, None) is None  # one is started anew


@pytest.mark.ray
@needs_ray
def test_a_hang_is_told_as_the_watchdog_wrote_it(cluster: Any, tmp_path: Path) -> None:
    """The rank was killed for it, and could not write a word."""
    job = make_job(tmp_path / "run", "hang_and_be_killed", nodes=1, max_crashes=1, run=str(tmp_path / "run"))
    assert submit(job, RayExecutor(cluster.address)).wait() is State.FAILED
    run = RunFolder(job.folder)
    assert causes(run) == [Cause.HANG]
    failure = run.read_status().failure
    assert failure is not None
    assert failure.message == "no step on n0"


@pytest.mark.ray
@needs_ray
def test_what_cannot_be_reached_is_said_at_once(tmp_path: Path) -> None:
    code = "from cluster.ray.connect import join; join('127.0.0.1:5', 'x')"
    began = time.monotonic()
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert "no Ray answers at 127.0.0.1:5" in told.stderr
    assert time.monotonic() - began < 30


@pytest.mark.ray
@needs_ray
def test_a_run_whose_ray_cannot_be_reached_is_asked_to_end_through_its_folder(
    cluster: Any, tmp_path: Path
) -> None:
    job = make_job(tmp_path / "run", "work_until_asked_to_stop", nodes=1, folder=str(tmp_path))
    handle = submit(job, RayExecutor(cluster.address))
    wait_until((tmp_path / "ready-0").exists)
    run = RunFolder(job.folder)
    record = json.loads((run.path / "ray.json").read_text())
    (run.path / "ray.json").write_text(json.dumps(record | {"address": "127.0.0.1:5"}))
    code = (
        "import sys; from pathlib import Path; from cluster.executors import cancel;"
        "from cluster.run.folder import RunFolder; cancel(RunFolder(Path(sys.argv[1])))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "asked through its folder" in told.stderr
    assert handle.wait() is State.CANCELLED


@pytest.mark.ray
@needs_ray
def test_a_run_that_waits_in_another_queue_is_not_taken(cluster: Any, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "die")
    run = RunFolder.create(job.folder)
    run.write_job(job)
    waits = Status(
        state=State.PENDING, name="t", executor="local", id="local-1", ranks=1, attempt=0, submitted=1.0
    )
    here = Process.current()
    run.write_status(replace(waits, launcher=replace(here, host="another-machine")))
    with pytest.raises(AlreadyRunning, match="on local as local-1"):
        submit(job, RayExecutor(cluster.address))


@pytest.mark.ray
@needs_ray
def test_a_signal_that_comes_before_the_process_is_not_lost(cluster: Any, tmp_path: Path) -> None:
    list(RayExecutor(cluster.address).map("ray_functions:square", [1], in_flight=1, retries=0))  # joins
    job = make_job(tmp_path / "run", "work_until_asked_to_stop", nodes=1, folder=str(tmp_path))
    run = RunFolder.create(job.folder)
    run.write_job(job)
    write_submission(run, cluster.address)
    worker = RankWorker(str(run.path), 0)
    worker.send(signal.SIGTERM)
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "SUBMIT_START": "0"}
    assert worker.run(places, 1) in (-signal.SIGTERM, PREEMPTED_EXIT_CODE)


@pytest.mark.ray
@needs_ray
def test_a_ray_of_our_own_refuses_what_cannot_fit_and_saves_on_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "ray_functions.py").write_text(FUNCTIONS)
    job = make_job(tmp_path / "run", "work_until_asked_to_stop", nodes=1, folder=str(tmp_path))
    (tmp_path / "job.json").write_text(job.to_json())
    code = """
import sys
from dataclasses import replace
from pathlib import Path
from cluster.errors import UserError
from cluster.job import Job, Resources
from cluster.ray.executor import RayExecutor
from cluster.submit import submit
from cluster.typed_json import read_record
executor, job = RayExecutor(stream=sys.stdout), read_record(Job, Path(sys.argv[1]), remedy='')
try:
    submit(replace(job, resources=Resources(nodes=2)), executor)
except UserError as error:
    print(error)
print(submit(job, executor).wait())
"""
    outside = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE", "SLURM_JOB_ID")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "job.json")],
        stdout=subprocess.PIPE,
        text=True,
        env=outside | {"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},  # Ray keeps a token at home
    )
    wait_until((tmp_path / "ready-0").exists)
    (rank,) = [int((tmp_path / "ready-0").read_text())]
    variables = Path(f"/proc/{rank}/environ").read_bytes().split(b"\0")
    assert b"RAY_AUTH_MODE=token" in variables  # its ports are open to the whole network
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    lines = output.splitlines()
    assert "wants 2 nodes with" in lines[0]
    assert lines[-1] == "preempted"
    assert RunFolder(job.folder).read_status().state is State.PREEMPTED


@pytest.mark.slow
def test_the_product_imports_without_ray() -> None:
    code = """
import importlib, pkgutil, sys
sys.modules["ray"] = None
import cluster, pipeline.cli, pipeline.stages.kinds
for module in pkgutil.walk_packages(cluster.__path__, "cluster."):
    importlib.import_module(module.name)
from cluster.errors import UserError
from cluster.submit import submit
try:
    next(cluster.ray.executor.RayExecutor().map("os:getcwd", [], in_flight=1, retries=0))
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("the Ray executor needs Ray: pip install 'seer-pipeline[ray]'")


def test_ranks_share_the_smallest_of_the_largest_nodes() -> None:
    nodes = [
        {"Alive": alive, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}
        for alive, cpus, gpus in [(True, 2, 0), (True, 64, 8), (True, 48, 8), (False, 96, 8)]
    ]
    assert cpus_per_rank(Resources(nodes=2, ranks_per_node=8, gpus_per_rank=1), nodes) == 6
    assert cpus_per_rank(Resources(nodes=3), nodes) == 2
    assert cpus_per_rank(Resources(nodes=1, ranks_per_node=3), nodes[:1]) == 0.6666
    assert cpus_per_rank(Resources(nodes=1, cpus_per_rank=5), nodes) == 5


def test_each_node_of_an_allocation_gets_the_cores_that_the_job_has_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "n[1-3]" ] && printf "n1\\nn2\\nn3\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environment = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_CPUS_PER_NODE": "16(x2),8"}
    assert cpus_of_nodes(environment) == {"n1": 16, "n2": 16, "n3": 8}
    assert "--num-cpus=8" in step("n3", 8, ["--address=n1:20000"])


@pytest.mark.ray
@needs_ray
def test_an_allocation_gets_a_ray_on_all_its_nodes_that_ends_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "ray_functions.py").write_text(FUNCTIONS)
    commands = {
        "scontrol": '[ "$2" = node ] && echo "NodeAddr=127.0.0.1" || printf "n1\\nn2\\n"',
        # What follows srun's own options, on this machine.
        "srun": 'echo $RAY_AUTH_MODE $RAY_AUTH_TOKEN >> "$STEPS.tokens";'
        ' while [ "${1#--}" != "$1" ]; do shift; done; echo $$ >> "$STEPS"; exec "$@"',
    }
    for name, script in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = make_job(tmp_path / "run", "say_where", folder=str(tmp_path))
    (tmp_path / "job.json").write_text(job.to_json())
    code = (
        "import sys; from pathlib import Path; from cluster.job import Job;"
        "from cluster.ray.executor import RayExecutor;"
        "from cluster.submit import submit; from cluster.typed_json import read_record;"
        "print(submit(read_record(Job, Path(sys.argv[1]), remedy=''), RayExecutor()).wait())"
    )
    allocation = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "HOME": str(tmp_path),
        "STEPS": str(tmp_path / "steps"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_CPUS_PER_NODE": "1(x2)",
        "SLURMD_NODENAME": "n1",
    }
    command = [sys.executable, "-c", code, str(tmp_path / "job.json")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | allocation
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines()[-1:] == ["completed"], done.stderr
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert len({one["RAY_RAYLET_PID"] for one in seen}) == 2
    pids = [int(pid) for pid in (tmp_path / "steps").read_text().split()]
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    modes, tokens = zip(*map(str.split, (tmp_path / "steps.tokens").read_text().splitlines()), strict=True)
    assert set(modes) == {"token"}  # nobody else on the network may run code here
    assert len(set(tokens)) == 1
    assert len(tokens[0]) == 64
    folder = Path(tempfile.gettempdir()) / f"submit-ray-{os.geteuid()}"
    assert (folder / str(os.getpid())).is_dir()
    assert folder.stat().st_mode & 0o777 == 0o700  # Ray itself lets everybody write below it


def test_two_jobs_on_one_node_have_ports_of_their_own() -> None:
    taken = [port for job in range(1_000, 2_000) for port in ports_of(job).values()]
    assert len(set(taken)) == len(taken)
    assert min(taken) >= 20_000
    assert max(taken) < 32_768
    assert set(head_options(7, ports_of(7))) & set(head_options(8, ports_of(8))) == {"--head"}


def test_an_end_that_no_supervisor_could_write_is_shown_by_a_look_and_written_by_a_cancellation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(tmp_path / "run")
    going = Status(state=State.RUNNING, name="t", executor="ray", id="x", ranks=1, attempt=1, submitted=1.0)
    run.write_status(going)
    record = {"address": "127.0.0.1:5", "cluster": "127.0.0.1:5", "own": True, "directory": "/"}
    (run.path / "ray.json").write_text(json.dumps(record))

    def no_answer(run: RunFolder) -> None:
        raise UserError("no Ray answers")

    monkeypatch.setattr(ray_status, "rejoin", no_answer)
    with contextlib.closing(run.lock()):  # its supervisor and its ranks share it
        assert status_of(run).state is State.RUNNING
    assert status_of(run).state is State.FAILED
    assert run.read_status() == going
    with pytest.raises(UserError, match="is not running: it is cancelled"):
        cancel(run)
    assert run.read_status().state is State.CANCELLED


def test_a_run_whose_ray_is_dead_or_not_asked_is_unknown_and_its_ray_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going = Status(state=State.RUNNING, name="t", executor="ray", id="x", ranks=1, attempt=1, submitted=1.0)
    runs = [RunFolder.create(tmp_path / name) for name in "abc"]
    for run in runs:
        run.write_status(going)
        record = {"address": "127.0.0.1:5", "cluster": "127.0.0.1:5", "own": False, "directory": "/"}
        (run.path / "ray.json").write_text(json.dumps(record))
    joined = []

    def join(address: str, namespace: str) -> None:
        joined.append(address)
        raise UserError(f"no Ray answers at {address}")

    monkeypatch.setattr(connect, "is_joined", lambda: False)
    monkeypatch.setattr(ray_status, "is_joined", lambda: False)
    monkeypatch.setattr(connect, "join", join)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:5")
    look = Look(runs)
    found = [look.status(run) for run in runs]
    unknown = (State.UNKNOWN, "no Ray answers at 127.0.0.1:5")
    assert [(status.state, status.reason) for status in found] == [unknown] * 3
    assert found[0].since == runs[0].last_sign()
    assert joined == ["127.0.0.1:5"]
    with contextlib.closing(runs[0].lock()):  # its supervisor lives
        assert status_of(runs[0]).state is State.RUNNING
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(connect, "users_site", Site)
    status = status_of(runs[0])
    assert status.state is State.UNKNOWN
    assert "its Ray was not asked" in status.reason


def test_S1_ray_starts_in_no_folder_that_somebody_else_may_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (temporary,) = (word for word in head_options(7, ports_of(7)) if word.startswith("--temp-dir="))
    folder = Path(temporary.removeprefix("--temp-dir=")).parent
    assert str(folder) in step("n1", 1, [])
    start = [sys.executable, "-m", "cluster.ray.start_node", str(folder), sys.executable, "-c", "print(1)"]
    assert subprocess.run(start, check=True, capture_output=True, text=True).stdout == "1\n"
    folder.chmod(0o777)
    refused = subprocess.run(start, check=False, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"{folder} is to be a folder that only you can enter" in refused.stderr
    with pytest.raises(UserError, match="that only you can enter"):
        start_here()
