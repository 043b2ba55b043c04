"""Parts of one work as tasks of arrays. SLURM's commands are scripts that answer as told."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.executors import Look, cancel
from cluster.job import Job, Resources, State
from cluster.parts import Submitted, runs_of_parts, submit_parts
from cluster.run.folder import list_runs
from cluster.site import Site
from cluster.slurm.executor import SlurmExecutor, cancel_jobs
from cluster.slurm.status import settled_statuses, watcher_file
from cluster.submit import submit

# Takes as many tasks as there is room for; what it took is in the queue.
SBATCH = """#!/usr/bin/python3
import os, pathlib, re, sys
folder = pathlib.Path(os.environ["ANSWERS"])
open(folder / "asked", "a").write("sbatch\\n")
if sys.argv[1] == "--test-only":
    full = (folder / "room").read_text() == "0"
    sys.exit("allocation failure: AssocMaxSubmitJobLimit; Job violates accounting/QOS policy" if full else 0)
text = pathlib.Path(sys.argv[2]).read_text()
numbers = []
for piece in re.search("--array=(.*)", text)[1].split(","):
    first, _, last = piece.partition("-")
    numbers += range(int(first), int(last or first) + 1)
room = int((folder / "room").read_text())
if len(numbers) > room:
    sys.exit("sbatch: error: AssocMaxSubmitJobLimit")
(folder / "room").write_text(str(room - len(numbers)))
ids = len(list(folder.glob("array-*"))) + 1
(folder / f"array-{ids}").write_text(text)
with open(folder / "queue", "a") as queue:
    queue.writelines(f"{ids}_{number}|PENDING||Resources\\n" for number in numbers)
print(ids)
"""
SCONTROL = """#!/bin/sh
echo "scontrol $*" >> "$ANSWERS/asked"
case "$*" in *config) echo "MaxArraySize            = $(cat "$ANSWERS/limit")";; *) echo "is UP";; esac
"""
SQUEUE = """#!/bin/sh
echo "squeue $*" >> "$ANSWERS/asked"
cat "$ANSWERS/queue"
"""
SCANCEL = '#!/bin/sh\necho "scancel $*" >> "$ANSWERS/asked"\n'


@pytest.fixture(autouse=True)
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tools = tmp_path / "bin"
    tools.mkdir()
    commands = {"sbatch": SBATCH, "scontrol": SCONTROL, "squeue": SQUEUE, "scancel": SCANCEL}
    for name, text in commands.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("ANSWERS", str(tmp_path))
    for name, text in {"limit": "1001", "room": "1000", "queue": "", "asked": ""}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def jobs(folder: Path, parts: int) -> list[Job]:
    places = runs_of_parts(folder / "runs" / "work", parts)
    return [
        Job(name=f"work-{run.name}", function="a:b", arguments={}, resources=Resources(), folder=run)
        for run in places
    ]


def queue(folder: Path, parts: int) -> Submitted:
    return submit_parts(jobs(folder, parts), SlurmExecutor(Site()))


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def option(script: str, name: str) -> str:
    found = re.search(rf"--{name}=?(.*)", script)
    assert found is not None
    return found[1]


def test_parts_are_one_array_with_one_source(slurm: Path) -> None:
    submitted = queue(slurm, 20)
    assert [part.id for part in submitted.parts] == [f"1_{number}" for number in range(1, 21)]
    assert asked(slurm) == ["sbatch", "scontrol show config", "sbatch"]
    script = (slurm / "array-1").read_text()
    assert option(script, "array") == "1-20"
    assert "--dependency" not in script  # tasks of one name would wait for each other
    sources = {(run.path / "source").resolve() for run in submitted.runs}
    assert len(sources) == 1
    assert (sources.pop() / "cluster" / "parts.py").is_file()
    assert len([*(slurm / "runs").rglob("parts.py")]) == 1


@pytest.mark.parametrize(("parts", "limit", "arrays"), [(25, 11, ["1-9", "0-9", "0-5"]), (9, 11, ["1-9"])])
def test_each_task_finds_its_own_run_whatever_size_arrays_may_have(
    slurm: Path, parts: int, limit: int, arrays: list[str]
) -> None:
    (slurm / "limit").write_text(str(limit))
    submitted = queue(slurm, parts)
    scripts = {path.name.removeprefix("array-"): path.read_text() for path in slurm.glob("array-*")}
    assert [option(scripts[known], "array") for known in sorted(scripts)] == arrays
    names = {option(script, "job-name") for script in scripts.values()}
    assert len(names) == len(arrays)
    for part in submitted.parts:
        known, number = part.id.split("_")
        run = next(line for line in scripts[known].splitlines() if line.startswith("RUN="))
        shell = f"SLURM_ARRAY_TASK_ID={number}; {run}; echo $RUN"
        said = subprocess.run(["sh", "-c", shell], check=True, capture_output=True, text=True).stdout.strip()
        assert said == str(part.run.path)
        before, width, after = re.split(r"%(\d+)a", option(scripts[known], "output"))
        assert f"{before}{number.zfill(int(width))}{after}" == str(part.run.path / "logs" / "slurm.log")
        task = part.run.read_job().task
        assert task is not None
        assert (task.array, task.number) == (option(scripts[known], "job-name"), int(number))


def test_what_slurm_takes_no_more_of_waits_and_is_said_and_goes_on_when_repeated(slurm: Path) -> None:
    (slurm / "room").write_text("12")
    submitted = queue(slurm, 20)
    assert len(submitted.parts) == 12
    with pytest.raises(UserError, match=r"SLURM has 12 parts.*AssocMaxSubmitJobLimit.* 13-of-20 to 20-of-20"):
        submitted.refuse_waiting("run it again")
    assert [run.path.name for run in list_runs(slurm / "runs")] == [run.path.name for run in submitted.runs]
    with pytest.raises(UserError, match=r"takes no more of your jobs for now: .*AssocMaxSubmitJobLimit"):
        queue(slurm, 20)
    (slurm / "room").write_text("1000")
    again = queue(slurm, 20)
    assert [part.new for part in again.parts] == [False] * 12 + [True] * 8
    again.refuse_waiting("")
    assert len((slurm / "queue").read_text().splitlines()) == 20
    assert [state.state for state in settled_statuses(again.runs)] == [State.PENDING] * 20


def test_a_part_is_looked_at_with_all_others_and_cancelled_alone(slurm: Path) -> None:
    runs = queue(slurm, 20).runs
    (slurm / "asked").write_text("")
    rows = (slurm / "queue").read_text().replace("1_3|PENDING|", "1_3|RUNNING|n0")
    (slurm / "queue").write_text(rows)
    look = Look(runs)
    assert [look.status(run).state for run in runs[:4]] == [*["pending"] * 2, "running", "pending"]
    assert [line.split()[0] for line in asked(slurm)] == ["scontrol", "squeue"]
    assert "--jobs=1\n" in (slurm / "asked").read_text()
    cancel(runs[2])
    assert asked(slurm)[-1] == "scancel --signal=TERM 1_3"
    cancel_jobs(runs[3:5])
    assert asked(slurm)[-1] == "scancel 1_4 1_5"
    assert [run.read_status().state for run in runs[3:6]] == ["cancelled", "cancelled", "pending"]
    assert runs[3].read_status().reason == ""


def test_tasks_whose_ids_nobody_wrote_down_are_found_by_the_array_s_name(slurm: Path) -> None:
    runs = queue(slurm, 3).runs
    name = option((slurm / "array-1").read_text(), "job-name")
    for run in runs:
        (run.path / "slurm-job").unlink()
    (slurm / "queue").write_text(f"9_1|{name}\n9_3|{name}\n")
    look = Look(runs)
    assert [look.status(run).id for run in runs] == ["9_1", "", "9_3"]
    assert f"--name={name} " in (slurm / "asked").read_text()


def test_a_part_that_is_resumed_is_a_job_of_its_own_with_the_source_it_began_with(slurm: Path) -> None:
    job = jobs(slurm, 3)[1]
    run = queue(slurm, 3).runs[1]
    run.write_status(run.read_status().stopped(State.FAILED))
    source = (run.path / "source").resolve()
    with pytest.raises(UserError):  # this sbatch knows arrays alone
        submit(job, SlurmExecutor(Site()), keep_source=True)
    assert run.read_job().task is None
    assert (run.path / "source").resolve() == source


def test_the_watcher_of_a_part_that_went_on_alone_is_none_of_its_next_job(slurm: Path) -> None:
    run = queue(slurm, 3).runs[1]
    watcher_file(run).write_text("8\n")
    run.write_status(run.read_status().stopped(State.FAILED))
    queue(slurm, 3)
    assert "scancel 8" in asked(slurm)
    assert not watcher_file(run).exists()
