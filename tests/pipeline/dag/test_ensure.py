import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from cluster.typed_yaml import Section
from pipeline.dag.digests import content_digest
from pipeline.dag.ensure import ensure, lock_if_free, receipt_file
from pipeline.dag.progress import StageState, look_at_stages
from pipeline.dag.stage import Kind, Origin, Result, Stage, Work, job_folder, read_receipt, stage_key
from pipeline.stages import jobs
from tests.without_locks import know_no_locks


class Where(Section):
    workers: int = 2


class Toy(Section):
    text: str = "a"
    number: float = 1.0
    run: Where = Where()


class NoExecutor:
    def refuse_impossible(self, job):
        raise AssertionError("no job is submitted here")


def write(work: Work) -> Result:
    """Append a line to a log beside the folder, then write the output."""
    with (work.folder.parent / "log").open("a") as log:
        log.write(f"{work.recipe.text}\n")
    before = [(source.path / "out").read_text() for source in work.inputs.values()]
    (work.folder / "out").write_text("".join(before) + work.recipe.text)
    return Result({"length": len(before)}, ["out"])


TOY = Kind(recipe=Toy, run=write, optional=frozenset({"a", "b"}))


def stage(root, name="one", text="a", inputs=None, kind=TOY, **values):
    return Stage(
        name=name,
        kind_name="toy",
        kind=kind,
        recipe=Toy(text=text, **values),
        inputs={role: Origin(stage=source) for role, source in (inputs or {}).items()},
        root=root,
    )


def log(root):
    return (root / "log").read_text().split() if (root / "log").exists() else []


def test_a_stage_runs_once_and_its_receipt_comes_back(tmp_path):
    first, again = ensure(stage(tmp_path), NoExecutor()), ensure(stage(tmp_path), NoExecutor())
    assert first.ran
    assert not again.ran
    assert again.receipt == first.receipt
    assert log(tmp_path) == ["a"]
    receipt = first.receipt
    assert receipt.key == stage(tmp_path).key
    assert receipt.outputs == {"out": content_digest(stage(tmp_path).folder / "out")}
    assert receipt.metrics == {"length": 0}
    assert read_receipt(stage(tmp_path).folder / "receipt.json") == receipt


def test_a_receipt_of_another_version_is_read_and_a_damaged_one_is_told(tmp_path):
    ensure(stage(tmp_path), NoExecutor())
    path = stage(tmp_path).folder / "receipt.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"weather": "fine"}))
    assert not ensure(stage(tmp_path), NoExecutor()).ran
    for text, why in (
        (json.dumps(written)[:90], "it is not JSON, or not all of it is there"),
        ("", "it is empty"),
        ("[1]", "input should be an object"),
        (json.dumps(written | {"outputs": None}), "outputs: input should be an object"),
        (json.dumps({key: written[key] for key in written if key != "seconds"}), "seconds: field required"),
    ):
        path.write_text(text)
        with pytest.raises(
            UserError, match=rf"receipt.json is damaged: {why}; remove it, and the stage runs again$"
        ):
            ensure(stage(tmp_path), NoExecutor())
    path.unlink()
    assert ensure(stage(tmp_path), NoExecutor()).ran


def test_inputs_are_ensured_first(tmp_path):
    upstream = stage(tmp_path, "up", "u")
    downstream = stage(tmp_path, "down", "d", {"a": upstream})
    receipt, _ = ensure(downstream, NoExecutor())
    assert log(tmp_path) == ["u", "d"]
    assert (downstream.folder / "out").read_text() == "ud"
    assert receipt.inputs == {"a": f"{upstream.key}/"}


def test_the_key_is_known_before_anything_runs_and_ignores_where_it_runs(tmp_path):
    base = stage(tmp_path)
    assert stage(tmp_path, "another name", run=Where(workers=7)).key == base.key
    assert stage(tmp_path, text="b").key != base.key
    assert stage(tmp_path, number=2.0).key != base.key
    assert stage(tmp_path, inputs={"a": base}).key != base.key
    assert stage(tmp_path, inputs={"a": base}).key != stage(tmp_path, inputs={"b": base}).key
    newer = Kind(recipe=Toy, run=write, version=2)
    assert stage(tmp_path, kind=newer).key != base.key
    elsewhere = Kind(recipe=Toy, run=write, outside=lambda recipe: "other pictures")
    assert stage(tmp_path, kind=elsewhere).key != base.key
    assert not list(tmp_path.iterdir())


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=4), st.randoms())
def test_the_key_does_not_depend_on_the_order_of_inputs(inputs, random):
    items = list(inputs.items())
    random.shuffle(items)
    keys = {
        stage_key(kind="k", version=1, recipe=Toy(), inputs=each, outside="")
        for each in (inputs, dict(items))
    }
    assert len(keys) == 1


def test_lost_outputs_are_made_again(tmp_path, caplog):
    ensure(stage(tmp_path), NoExecutor())
    (stage(tmp_path).folder / "out").unlink()
    assert ensure(stage(tmp_path), NoExecutor()).ran
    assert "runs again" in caplog.text
    assert log(tmp_path) == ["a", "a"]


def test_a_failing_stage_leaves_no_receipt(tmp_path):
    def fail(work):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        ensure(stage(tmp_path, kind=Kind(recipe=Toy, run=fail)), NoExecutor())
    assert not (stage(tmp_path).folder / "receipt.json").exists()
    assert ensure(stage(tmp_path), NoExecutor()).ran


def test_a_promised_output_that_is_not_there_is_an_error(tmp_path):
    lazy = Kind(recipe=Toy, run=lambda work: Result({}, ["nothing"]))
    with pytest.raises(FileNotFoundError, match="nothing"):
        ensure(stage(tmp_path, kind=lazy), NoExecutor())
    assert not (stage(tmp_path).folder / "receipt.json").exists()


def test_the_digest_of_a_folder_sees_names_and_contents(tmp_path):
    (tmp_path / "x" / "sub").mkdir(parents=True)
    (tmp_path / "x" / "sub" / "f").write_text("1")
    first = content_digest(tmp_path / "x")
    (tmp_path / "x" / "sub" / "f").write_text("2")
    second = content_digest(tmp_path / "x")
    (tmp_path / "x" / "sub" / "f").rename(tmp_path / "x" / "sub" / "g")
    assert len({first, second, content_digest(tmp_path / "x")}) == 3


def slow(work):
    write(work)
    time.sleep(0.3)
    return Result({}, ["out"])


def ensure_slowly(root, barrier, results):
    barrier.wait()
    results.put(ensure(stage(root, kind=Kind(recipe=Toy, run=slow)), NoExecutor()).ran)


def test_four_processes_at_once_do_the_work_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=ensure_slowly, args=(tmp_path, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    ran = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert ran == [False, False, False, True]
    assert log(tmp_path) == ["a"]


KILLED = """
    import sys, time
    from pathlib import Path
    from tests.pipeline.dag.test_ensure import NoExecutor, Toy, stage
    from pipeline.dag.ensure import ensure
    from pipeline.dag.stage import Kind, Result

    def hang(work):
        (work.folder / "half").write_text("half")
        print("started", flush=True)
        time.sleep(600)

    ensure(stage(Path(sys.argv[1]), kind=Kind(recipe=Toy, run=hang)), NoExecutor())
"""


def test_a_sigkill_leaves_no_receipt_and_frees_the_lock(tmp_path):
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        text=True,
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = stage(tmp_path).folder
    assert (folder / "half").exists()
    assert not (folder / "receipt.json").exists()
    assert ensure(stage(tmp_path), NoExecutor()).ran
    assert (folder / "out").read_text() == "a"


def test_the_receipt_of_a_job_on_another_node_is_waited_for(tmp_path, monkeypatch):
    made, unseen = receipt_file(stage(tmp_path)), tmp_path / "unseen"
    ensure(stage(tmp_path), NoExecutor())
    made.rename(unseen)
    monkeypatch.setattr("cluster.shared_folder.PATIENCE", 60.0)
    monkeypatch.setattr("time.sleep", lambda seconds: unseen.exists() and unseen.rename(made))
    assert jobs._receipt(stage(tmp_path)).key == stage(tmp_path).key
    made.unlink()
    monkeypatch.setattr("cluster.shared_folder.PATIENCE", 0.0)
    with pytest.raises(UserError, match="has no receipt, and this one needs it"):
        jobs._receipt(stage(tmp_path))


def test_C2_a_stage_is_made_once_at_a_time_also_where_the_file_system_knows_no_locks(tmp_path, monkeypatch):
    know_no_locks(monkeypatch, tmp_path)
    held = lock_if_free(stage(tmp_path))
    assert held is not None and lock_if_free(stage(tmp_path)) is None
    held.close()
    assert ensure(stage(tmp_path), NoExecutor()).ran
    assert len(log(tmp_path)) == 1


def test_a_stage_whose_job_nobody_tells_of_is_shown_as_going_on_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # without SLURM
    one = stage(tmp_path)
    run = RunFolder.create(job_folder(one).path)
    going = Status(state="running", name="one", executor="slurm", id="7", ranks=1, attempt=1, submitted=1.0)
    run.write_status(going)
    (row,) = look_at_stages([one])
    assert row.state is StageState.RUNNING
    assert row.detail.startswith("slurm 7, unknown since ")
    assert row.detail.endswith(": there is no SLURM on this machine")
