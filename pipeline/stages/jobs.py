"""Stages as jobs of their own; and a whole graph of them, handed to SLURM at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.errors import AlreadyRunning, UserError
from cluster.executors import status_of
from cluster.job import Handle, Job, State
from cluster.local import LocalExecutor
from cluster.run.folder import RunFolder
from cluster.run.status import why
from cluster.shared_folder import appears
from cluster.slurm.executor import SlurmExecutor, SlurmHandle
from cluster.submit import submit
from cluster.typed_yaml import check_recipe
from pipeline.dag.ensure import ensure, find_receipt, finish, prepare, receipt_file
from pipeline.dag.graph import Failed, build_graph, point_to
from pipeline.dag.recipe import DagRecipe
from pipeline.dag.stage import Receipt, Stage, job_folder
from pipeline.stages.kinds import KINDS


def stage_job(stage: Stage, dag: DagRecipe, *, gpus_per_node: int | None) -> Job:
    """The job that runs one stage of a graph, and leaves its receipt.

    A stage that saves nothing on its way would fail at the same place again: it has one try.
    """
    return Job(
        name=stage.folder.name,
        function="pipeline.stages.jobs:run_stage",
        arguments={
            "dag": dag.model_dump(mode="json") | {"folder": str(stage.root)},
            "stage": stage.name,
            "keys": _keys(stage),
        },
        resources=stage.kind.resources(stage.recipe, gpus_per_node),
        folder=job_folder(stage).path,
        max_crashes=1 if stage.kind.job is None else 3,
    )


def _keys(stage: Stage) -> dict[str, str]:
    """Keys of a stage and of all that it stands on."""
    keys = {stage.name: stage.key}
    for source in stage.inputs.values():
        keys |= _keys(source.stage)
    return keys


def run_stage(dag: dict[str, Any], stage: str, keys: dict[str, str]) -> None:
    """The function of a stage's job, on every rank of it.

    Args:
        dag: the graph's recipe.
        stage: its name.
        keys: stage → key as it was submitted. What stages read outside of the graph is not looked at again:
            it may be a billion files.

    Raises:
        UserError: if an input is missing.
    """
    recipe = check_recipe(DagRecipe, dag, where=f"of the graph of {stage}")
    built = {each.name: each for each in build_graph(recipe, KINDS, keys=keys)}[stage]
    if find_receipt(built) is None:
        receipts = {role: _receipt(source.stage) for role, source in built.inputs.items()}
        if built.kind.job is None:
            ensure(built, LocalExecutor())
        else:
            _run_rank(built, receipts)
    if _is_first():
        point_to(built)


def _run_rank(stage: Stage, receipts: Mapping[str, Receipt]) -> None:
    """This rank's part of a stage that is a job; SLURM runs one job of a name at a time."""
    started, work = time.time(), prepare(stage, receipts)
    assert stage.kind.job is not None
    job = stage.kind.job(work, job_folder(stage).read_job().resources)
    job.resolve()(**job.arguments)
    if _is_first():
        finish(stage, work, started=started)


def _receipt(stage: Stage) -> Receipt:
    appears(receipt_file(stage))  # its job has ended, perhaps on another node
    receipt = find_receipt(stage)
    if receipt is None:
        raise UserError(f"stage {stage.name} has no receipt, and this one needs it: submit the graph again")
    return receipt


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def submit_graph(
    dag: DagRecipe,
    stages: Sequence[Stage],
    executor: SlurmExecutor,
    *,
    gpus_per_node: int | None,
    say: Callable[[str], None],
) -> dict[str, Handle]:
    """Queue every stage that has no receipt, each after its inputs, and return.

    A stage that somebody else has queued already is waited for, not queued again.

    Returns:
        Stage → its job, for those that are not finished.
    """
    handles: dict[str, Handle] = {}
    for stage in stages:
        if find_receipt(stage) is not None:
            point_to(stage)
            say(f"{stage.name:<20} finished           {stage.folder.name}")
            continue
        sources = [name for name in stage.sources if name in handles]
        job = stage_job(stage, dag, gpus_per_node=gpus_per_node)
        try:
            after = tuple(handles[name].id for name in sources)
            watched = stage.kind.job is not None  # what else a stage is, is short
            handle, how = submit(job, replace(executor, after=after, watched=watched)), "queued"
        except AlreadyRunning:
            run = RunFolder(job.folder)
            handle, how = SlurmHandle(run), "queued before"
            if run.read_status().executor != "slurm" or not handle.id:
                raise  # it runs elsewhere, and no job of SLURM can wait for it
        handles[stage.name] = handle
        waits = f"  after {', '.join(sources)}" if sources else ""
        say(f"{stage.name:<20} {how:<13} {handle.id:>4}  {stage.folder.name}{waits}")
    return handles


def wait_for_graph(stages: Sequence[Stage], handles: Mapping[str, Handle]) -> dict[str, Receipt | Failed]:
    """Block until every queued stage has ended, one way or another."""
    results: dict[str, Receipt | Failed] = {}
    for stage in stages:
        if stage.name in handles:
            handles[stage.name].wait()
        blockers = tuple(name for name in stage.sources if isinstance(results[name], Failed))
        results[stage.name] = Failed(error=None, blocked_by=blockers) if blockers else outcome(stage)
    return results


def outcome(stage: Stage) -> Receipt | Failed:
    """What has come of a stage whose job has ended: its receipt, or why there is none."""
    if (receipt := find_receipt(stage)) is not None:
        return receipt
    run = job_folder(stage)
    status = status_of(run)
    completed = status.state is State.COMPLETED and appears(receipt_file(stage))
    if completed and (receipt := find_receipt(stage)) is not None:
        return receipt
    failure = status.failure
    crashed = failure is not None and failure.rank is not None and not failure.user_error
    log = f" (its log is {run.log(failure.rank or 0)})" if failure is not None and crashed else ""
    return Failed(error=UserError(f"{why(status)}{log}"))
