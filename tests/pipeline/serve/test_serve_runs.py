"""The list of runs, and what there is to see of one: live, bounded in its work, and without a trace."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from serving import add_rows, asked, ids, make_run, told

from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.status import Failure, Status
from pipeline.serve import live_curves, run_list
from pipeline.serve.asked import ask
from pipeline.serve.live_curves import LiveCurves
from pipeline.serve.run_list import RunList

HOSTILE = "<img src=x onerror=alert(1)> \u202e\n\x1b[2J"


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    paths = [folder, *sorted(folder.rglob("*"))]
    return {
        str(path): (
            path.lstat().st_mtime_ns,
            path.lstat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in paths
    }


def test_the_list_tells_what_has_changed_and_what_is_gone(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b", "graph/c")]
    found = RunList(tmp_path)
    first = found.look().since(0)
    assert [run["name"] for run in first["runs"]] == ["a", "b", "graph/c"]
    assert found.look().since(first["version"]) == {"version": first["version"], "runs": [], "order": None}
    failure = Failure(rank=None, type="Killed", message=HOSTILE)
    make_run(runs[1].path, state=State.FAILED, failure=failure)
    (runs[0].path / "status.json").unlink()
    then = found.look().since(first["version"])
    assert [(run["name"], run["state"]) for run in then["runs"]] == [("b", "failed")]
    assert then["order"] == [run["id"] for run in first["runs"][1:]]
    # A server that was started again knows of no version, and none of its own is the same.
    assert len(RunList(tmp_path).look().since(first["version"] - 10_000)["runs"]) == 2


def test_a_running_one_is_read_again_and_its_end_is_seen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", state=State.RUNNING, executor="local")
    progress = {"step": 5, "total_steps": 10, "loss": 0.5, "images_per_second": 7.0, "seconds_left": 60.0}
    (run.path / "progress.json").write_text(json.dumps(progress))
    restart = {"attempt": 1, "cause": "crash", "message": "it broke", "time": 1.0}
    (run.path / "restarts.jsonl").write_text(json.dumps(restart) + "\n")
    found = RunList(tmp_path)
    (told,) = found.look().since(0)["runs"]
    assert (told["step"], told["steps"], told["rate"], told["left"]) == (5, 10, 7.0, 60.0)
    assert (told["restarts"], told["restarted"]) == ("1 crash", "crash: it broke")
    (run.path / "progress.json").write_text(json.dumps(progress | {"step": 6}))
    assert found.look().since(0)["runs"][0]["step"] == 6
    make_run(run.path)
    (told,) = found.look().since(0)["runs"]
    assert (told["state"], told["rate"], told["left"]) == ("completed", None, None)


@pytest.mark.slow
def test_2000_runs_are_read_once_and_those_that_go_on_again(tmp_path: Path) -> None:
    text = (make_run(tmp_path / "one").path / "status.json").read_text()
    for number in range(1999):
        (tmp_path / f"run-{number}").mkdir()
        (tmp_path / f"run-{number}" / "status.json").write_text(text)
    make_run(tmp_path / "going-on", state=State.RUNNING)
    found = RunList(tmp_path, ask=mock.Mock(return_value={}))
    with mock.patch.object(run_list, "look_at", wraps=run_list.look_at) as read:
        assert len(found.look().since(0)["runs"]) == 2001
        assert read.call_count == 2001
        for _ in range(3):
            found.look()
        assert read.call_count == 2001 + 3
    assert found.since(found.version)["runs"] == []
    found.ask.assert_not_called()  # nobody else knows of any


def test_slurm_and_ray_are_asked_once_about_all_and_not_at_every_look(tmp_path: Path) -> None:
    for number in range(5):
        make_run(tmp_path / f"s{number}", state=State.RUNNING, executor="slurm", id=str(number + 1))
        make_run(tmp_path / f"ended{number}", executor="slurm", id=str(number + 100))
    make_run(tmp_path / "r", state=State.RUNNING, executor="ray", id="r")
    questions: list[list[str]] = []

    def answer(runs: Sequence[RunFolder]) -> dict[Path, Status]:
        questions.append([run.path.name for run in runs])
        return {run.path: run.unheard("nobody answers") for run in runs}

    found = RunList(tmp_path, ask=answer)
    for _ in range(4):
        found.look()
    assert questions == [["r", "s0", "s1", "s2", "s3", "s4"]]
    states = {run["name"]: run["state"] for run in found.since(0)["runs"]}
    assert states["s0"] == states["r"] == "unknown" and states["ended0"] == "completed"
    make_run(tmp_path / "s0", executor="slurm", id="1")  # its own word is newer
    assert {run["name"]: run["state"] for run in found.look().since(0)["runs"]}["s0"] == "completed"
    with mock.patch.object(run_list.time, "monotonic", return_value=found._ask_at + 1):
        found.look()
    assert questions[1:] == [["r", "s1", "s2", "s3", "s4"]]


def test_S1_slurm_is_asked_by_a_process_of_its_own_that_acts_on_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("squeue", ""), ("sacct", ""), ("scontrol", "echo UP"), ("scancel", "")):
        (tools / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.delenv("SUBMIT_CLUSTER", raising=False)
    runs = [
        make_run(tmp_path / "runs" / f"s{number}", state=State.RUNNING, executor="slurm", id=f"{number + 1}")
        for number in range(40)
    ]
    (tmp_path / "runs" / "s7" / "slurm-job").write_text("--all\n")
    (tmp_path / "runs" / "s7" / "status.json").write_text("{")
    before = everything(tmp_path / "runs")
    found = ask(runs)
    assert len(found) == 39 and {status.state for status in found.values()} == {State.FAILED}
    called = (tmp_path / "called").read_text().split()
    assert "scancel" not in called and len(called) < 10
    assert everything(tmp_path / "runs") == before


def test_S1_to_look_at_everything_leaves_no_trace_and_shows_what_is_hostile_as_text(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    failure = Failure(rank=0, type="RuntimeError", message=HOSTILE, log_tail=(HOSTILE,))
    run = make_run(folder / HOSTILE, state=State.FAILED, failure=failure)
    add_rows(run, range(1, 9), **{HOSTILE: 1.0, "rankme": 3.0})
    run.log(0).write_text(f"{HOSTILE}\n")
    (run.path / "recipe.yaml").write_text(f"!!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    (run.path / "source" / "pipeline").mkdir(parents=True)
    (run.path / "source" / "pipeline" / "__init__.py").write_text(f"open('{tmp_path}/ran', 'w')\n")
    (run.path / "progress.json").write_text('{"step": 1, "total_steps": 2, "seconds_left": Infinity}')
    (run.path / "attempts.jsonl").write_text(json.dumps({"time": 1e99, "host": HOSTILE}) + "\n[1]\n")
    nothing = Failure(rank=None, type="", message="")
    make_run(folder / os.fsdecode(b"caf\xe9"), state=State.FAILED, failure=nothing)
    os.mkfifo(folder / "pipe")
    os.mkfifo(run.path / "timing.jsonl")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "status.json").write_text("{")
    before = everything(folder)

    async def ask(client: Any) -> tuple[dict[str, str], Any, Any, Any]:
        known = await ids(client)
        hostile = next(value for name, value in known.items() if name.startswith("<img"))
        for path in ("/api/graphs", "/api/pages", "/api/datasets"):
            await told(client, path)
        for known_as in known.values():
            await told(client, "/api/run", id=known_as)
        log = await told(client, "/api/text", id=hostile, name="logs/rank-0.log")
        return known, await told(client, "/api/run", id=hostile), log, hostile

    known, about, log, _ = asked(folder, ask)
    assert everything(folder) == before
    assert not (tmp_path / "ran").exists()
    shown = "<img src=x onerror=alert(1)> \\u202e\n\\x1b[2J"
    assert set(known) == {shown, "caf\\udce9", "damaged"}
    assert about["run"] == shown and "\\u202e" in about["why"]
    assert "\u202e" not in json.dumps(about, ensure_ascii=False)
    assert log["text"] == f"{shown}\n"


def test_curves_are_read_on_from_where_they_were(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", state=State.RUNNING)
    curves = LiveCurves(tmp_path)
    wanted = [("a", run.path)]
    empty = curves.panels(wanted, have="")
    assert empty is not None and empty["panels"] == []
    add_rows(run, range(10, 30), lr=0.1, rankme=4.0)
    add_rows(run, range(10, 30), "timing.jsonl", images_per_second=100.0)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": 99')  # being written
    found = curves.panels(wanted, have=empty["version"])
    assert found is not None
    assert [panel["key"] for panel in found["panels"]] == ["loss", "lr", "rankme", "images_per_second"]
    assert "from 0.1 to" in found["panels"][0]["chart"]
    assert curves.panels(wanted, have=found["version"]) is None
    with (run.path / "metrics.jsonl").open("r+b") as file:
        file.write(b"X" * 500)  # what was read is not read again
        file.seek(0, os.SEEK_END)
        file.write(b".5}\nnot a row\n")
    add_rows(run, range(31, 40))
    then = curves.panels(wanted, have=found["version"])
    assert then is not None
    assert "a: from 0.1 to 0.025641" in then["panels"][0]["chart"]
    assert 'aria-label="step 30: 99.5"' in then["panels"][0]["chart"]
    assert then["runs"][0]["last"]["loss"] == "0.025641"
    curve = curves._runs[run.path].curve("loss")
    assert curve is not None and curve.drawn[0] == [*range(10, 40)] and curve.drawn[1][20] == 99.5


def test_a_run_that_went_back_to_a_checkpoint_is_drawn_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", state=State.RUNNING)
    curves = LiveCurves(tmp_path)
    add_rows(run, range(1, 50))
    curves.panels([("a", run.path)], have="")
    kept = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)[:20]
    (run.path / "fresh").write_text("".join(kept))
    (run.path / "fresh").replace(run.path / "metrics.jsonl")
    add_rows(run, range(21, 90), loss=5.0)  # longer than before
    curves.panels([("a", run.path)], have="")
    curve = curves._runs[run.path].curve("loss")
    assert curve is not None and curve.drawn[0] == [*range(1, 90)]
    assert curve.drawn[1] == [*(1 / step for step in range(1, 21)), *[5.0] * 69]


def test_runs_are_overlaid_each_with_its_tone(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        add_rows(make_run(tmp_path / name), range(1, 9))

    async def ask(client: Any) -> Any:
        known = await ids(client)
        async with client.get("/api/curves", params=[("id", known["c"]), ("id", known["a"])]) as answer:
            found = await answer.json()
        query = [("id", known["c"]), ("id", known["a"]), ("have", found["version"])]
        async with client.get("/api/curves", params=query) as answer:
            return found, answer.status

    found, again = asked(tmp_path, ask)
    assert [(run["name"], run["tone"]) for run in found["runs"]] == [("c", "t1"), ("a", "t2")]
    chart = found["panels"][0]["chart"]
    assert 'class="line t1"' in chart and 'class="line t2"' in chart and "t3" not in chart
    assert again == 204


def test_a_log_is_told_from_its_end_and_then_from_where_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    run.log(3).write_text("".join(f"line {number}\n" for number in range(20_000)))

    async def ask(client: Any) -> list[dict[str, Any]]:
        known = (await ids(client))["a"]
        first = await told(client, "/api/text", id=known, name="logs/rank-3.log")
        with run.log(3).open("ab") as file:
            file.write("a café\nhalf of é".encode()[:-1])
        then = await told(client, "/api/text", id=known, name="logs/rank-3.log", at=first["at"])
        nothing = await told(client, "/api/text", id=known, name="logs/rank-3.log", at=then["at"])
        run.log(3).write_text("anew\n")
        anew = await told(client, "/api/text", id=known, name="logs/rank-3.log", at=then["at"])
        return [first, then, nothing, anew]

    first, then, nothing, anew = asked(tmp_path, ask)
    assert first["anew"] and first["text"].endswith("line 19999\n") and len(first["text"]) <= 1 << 16
    assert first["text"].startswith("line ")
    assert (then["anew"], then["text"]) == (False, "a café\nhalf of ")
    assert (anew["anew"], anew["text"]) == (True, "anew\n")
    assert (nothing["text"], nothing["at"]) == ("", then["at"])


@pytest.mark.parametrize("name", ["recipe.yaml", "attempts.jsonl", "unwatched"])
def test_S1_what_is_told_of_a_run_lies_in_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").write_text('{"version": "a secret"}\n')
    run = make_run(tmp_path / "runs" / "a", state=State.RUNNING, executor="slurm")
    (run.path / name).symlink_to(tmp_path / "elsewhere")

    async def ask(client: Any) -> str:
        return json.dumps(await told(client, "/api/run", id=(await ids(client))["a"]))

    with mock.patch.object(run_list.RunList, "_ask_elsewhere"):
        assert "a secret" not in asked(tmp_path / "runs", ask)


def test_S1_a_line_without_an_end_hides_no_row_behind_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run.path / "metrics.jsonl").write_text("1" * 300 + "\n")
    add_rows(run, range(1, 3))
    curves = LiveCurves(tmp_path)
    with mock.patch.object(live_curves, "_AT_ONCE", 100):
        for _ in range(5):
            found = curves.panels([("a", run.path)], have="")
    assert found is not None and found["runs"][0]["last"] == {"loss": "0.5"}


@pytest.mark.parametrize(
    "name",
    [
        "status.json",
        "../b/logs/rank-0.log",
        "logs/../../secret",
        "logs/rank-0.log/../../status.json",
        "/etc/passwd",
        "logs/rank-0.log\0",
        "",
        "logs/rank-9.log",
        "logs/rank-1.log",  # a link to a file elsewhere
        "stacks/rank-0.txt",  # behind a link to a folder elsewhere
        "errors/rank-0.json",  # a pipe
    ],
)
def test_S1_nothing_is_read_but_logs_that_lie_in_the_run(tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in ("secret", "rank-0.txt"):
        (elsewhere / file).write_text("a secret\n")
    run = make_run(tmp_path / "runs" / "a")
    run.log(0).write_text("a log\n")
    run.log(1).symlink_to(elsewhere / "secret")
    (run.path / "stacks").symlink_to(elsewhere)
    (run.path / "metrics.jsonl").symlink_to(elsewhere / "secret")
    os.mkfifo(run.path / "errors" / "rank-0.json")

    async def ask(client: Any) -> tuple[int, str, int]:
        known = (await ids(client))["a"]
        async with client.get("/api/text", params={"id": known, "name": name}) as answer:
            status, text = answer.status, await answer.text()
        async with client.get("/api/curves", params={"id": known}) as answer:
            return status, text, answer.status

    status, text, curves = asked(tmp_path / "runs", ask)
    assert (status, curves) == (404, 404)
    assert "secret\n" not in text
