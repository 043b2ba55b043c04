"""`submit pretrain|resume`: start a training on one machine or many, or go on with it."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import UserError
from cluster.executors import make_executor, status_of
from cluster.job import PREEMPTED_EXIT_CODE, ExecutorName, Job, Resources, State
from cluster.preflight.exclusions import excluded_nodes
from cluster.run.folder import RunFolder
from cluster.run.status import explain
from cluster.run.trust import CHECKPOINTS, LEADS_TO_EXECUTION, refuse_untrusted
from cluster.site import Site, load_site, read_site, site_for_jobs, users_site
from cluster.submit import submit
from cluster.typed_yaml import load_recipe
from cluster.wording import several
from pipeline.commands.options import (
    Cluster,
    DryRun,
    ExecutorOption,
    Follow,
    NamedRun,
    Nodes,
    Overrides,
    Ranks,
    RunName,
    Runs,
    Trust,
    Wait,
)
from pipeline.commands.place import site_on
from pipeline.commands.progress_line import ProgressLine
from pipeline.commands.runs import find_run
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.branch import Parent, branch, branch_recipe, find_checkpoint, parent_of, read_parent

DEFAULT_RECIPE = "seer_regnety_256gf"
# Jobs that go on where they were stopped. What else job.json may name, such as `os:system`, nobody submitted.
RESUMABLE = (
    "pipeline.train.loop:run_pretrain",
    "pipeline.stages.jobs:run_stage",
    "ingest.crawl.part:crawl_rank",
)


def pretrain(  # noqa: PLR0917 -- typer passes by name
    overrides: Overrides = None,
    recipe_name: Annotated[
        str | None, typer.Option("--recipe", help="A .yaml file, or the name of a shipped recipe.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN/checkpoints/step-N",
            help="Start a new run from this checkpoint, with its run's recipe and your changes.",
        ),
    ] = None,
    nodes: Nodes = None,
    ranks: Ranks = None,
    run_name: NamedRun = None,
    executor: ExecutorOption = None,
    cluster: Cluster = "default",
    dry_run: DryRun = False,
    wait: Wait = False,
    follow: Follow = False,
    trust: Trust = False,
) -> None:
    """Pretrain a trunk. Repeat the command with the same --run to continue a run that was stopped."""
    site = site_for_jobs(cluster)
    words = [*(overrides or []), *place_words(nodes=nodes, ranks=ranks, run_name=run_name)]
    checkpoint = None if start is None else find_checkpoint(start)
    if checkpoint is not None:
        if recipe_name is not None:
            raise UserError(
                "--from continues with its run's recipe: leave out --recipe, and change keys by KEY=VALUE"
            )
        if not trust:
            refuse_untrusted(checkpoint.parent.parent, CHECKPOINTS, groups=site.trusted_groups)
        recipe = branch_recipe(checkpoint, words)
        stem = f"{checkpoint.absolute().parent.parent.name}-{checkpoint.name}"
    else:
        if recipe_name is None:
            recipe_name = site.recipe or DEFAULT_RECIPE
            typer.echo(f"recipe: {recipe_name}, the default; --recipe chooses another", err=True)
        stem = Path(recipe_name).stem
        recipe = load_recipe(PretrainRecipe, recipe_name, words, kind="pretrain")
    start_training(
        recipe,
        stem,
        site,
        executor,
        checkpoint=checkpoint,
        dry_run=dry_run,
        wait=wait,
        follow=follow,
        trust=trust,
    )


def place_words(*, nodes: int | None, ranks: int | None, run_name: str | None) -> list[str]:
    """What the options say of where a training runs, as changes of its recipe."""
    words = [f"run.nodes={nodes}"] if nodes is not None else []
    words += [f"run.ranks_per_node={ranks}"] if ranks is not None else []
    words += [f"run.name={json.dumps(run_name)}"] if run_name is not None else []
    return words


def start_training(
    recipe: PretrainRecipe,
    stem: str,
    site: Site,
    executor: ExecutorName | None,
    *,
    checkpoint: Path | None = None,
    dry_run: bool,
    wait: bool,
    follow: bool,
    trust: bool,
) -> None:
    """Start or go on with a training, or say what would be done.

    Args:
        stem: what a run without a name is called after.
        executor: None: as the site says.
        checkpoint: of another run, which the training branches off from.
        trust: go on in a folder that others could have written to.
    """
    from pipeline.train.fit import refuse_misfit
    from pipeline.train.job import pretrain_job
    from pipeline.train.run_recipe import pin_dataset, to_yaml
    from pipeline.train.steering import check_may_go_on
    from pipeline.train.warm_start import checkpoint_to_begin_from
    from pipeline.trunks.interop import read_weights

    chosen = executor or site.default_executor()
    if recipe.run.device != "cpu":
        site = site_on(chosen, site, ranks=recipe.run.ranks_per_node)
    name = recipe.run.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": name})})
    folder = Path(recipe.run.folder) / name
    if folder.is_dir() and not trust:
        refuse_untrusted(folder, CHECKPOINTS, groups=site.trusted_groups)
    resources = _resources(recipe, None if chosen == "local" else site.gpus_per_node)
    if not dry_run or (folder / "recipe.yaml").is_file():  # a dry run needs no data
        recipe = pin_dataset(recipe, folder)
    parent = None if checkpoint is None else parent_of(checkpoint, recipe)
    if not dry_run or (folder / "recipe.yaml").is_file():
        refuse_misfit(recipe, ranks=resources.ranks)
    if checkpoint is not None and parent is not None:
        begin_branch(recipe, folder, checkpoint, parent, dry_run=dry_run)
    if recipe.trunk.init_from is not None and not dry_run and not (folder / "recipe.yaml").is_file():
        read_weights(recipe.trunk)  # only to say now, not when the job starts, that they do not fit
    if recipe.train.init_from is not None and not dry_run and not (folder / "recipe.yaml").is_file():
        begun_from = checkpoint_to_begin_from(recipe.train.init_from)
        if not trust:
            refuse_untrusted(begun_from, (".",), groups=site.trusted_groups)
    changes = check_may_go_on(recipe, folder)
    job = pretrain_job(recipe, folder.absolute() if chosen != "local" else folder, resources)
    if dry_run and chosen == "slurm":
        typer.echo(_script(job, site), nl=False)
        return
    typer.echo(to_yaml(recipe))
    # A login node is told from a machine to train on by whether SLURM is there.
    why = " (there is no SLURM here)" if chosen == "local" and not (executor or site.executor) else ""
    per_rank = "1 GPU" if resources.gpus_per_rank else "the CPU"
    typer.echo(
        f"{'would run' if dry_run else 'run'} {folder} {_start(folder)}, on {_where(chosen)}{why}: "
        f"{_ranks(resources)}, each on {per_rank}"
    )
    for key, (before, now) in changes.items():
        typer.echo(f"changed: {key} is {now!r}, and was {before!r}")
    if not dry_run:
        if not (folder / "recipe.yaml").is_file():  # of one that has begun it is known
            warn_of_memory(recipe, site, resources)
        launch(job, chosen, site, wait=wait, follow=follow, trust=trust)


def _resources(recipe: PretrainRecipe, gpus_per_node: int | None) -> Resources:
    """What a recipe runs on; refused is what arithmetic alone can tell."""
    from pipeline.train.fit import refuse_unfit_ranks
    from pipeline.train.job import resources_for

    resources = resources_for(recipe.run, gpus_per_node=gpus_per_node)
    refuse_unfit_ranks(recipe, resources)
    return resources


def begin_branch(
    recipe: PretrainRecipe, folder: Path, checkpoint: Path, parent: Parent, *, dry_run: bool
) -> None:
    """Make the run folder of a branch, unless it is there already; say what is other than in its parent."""
    from pipeline.train.run_recipe import to_yaml

    if (folder / "recipe.yaml").is_file():
        found = read_parent(folder)
        if found is None or (found.run, found.step) != (parent.run, parent.step):
            raise UserError(f"{folder} holds a run that is no branch of {checkpoint}: give another --run")
        return
    # Not amid a batch script that is only shown.
    typer.echo(f"branch of {parent.run} at step {parent.step}; {parent.changed()}", err=True)
    if parent.new_order:
        typer.echo(
            f"a new order of batches begins with it, because of {', '.join(parent.new_order)}", err=True
        )
    if not dry_run:
        branch(folder, checkpoint, parent, recipe, to_yaml(recipe.placed()))


def resume(  # noqa: PLR0917 -- typer passes by name
    run: RunName,
    folder: Runs = Path("runs"),
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="A site file to use in place of the one it was submitted with."),
    ] = None,
    wait: Wait = False,
    follow: Follow = False,
    trust: Trust = False,
) -> None:
    """Continue a run that was stopped or has failed, as it was submitted (on a cluster: same source)."""
    found = find_run(run, folder)
    if not trust:
        ours = users_site() if cluster is None else load_site(cluster)
        refuse_untrusted(found.path, LEADS_TO_EXECUTION, groups=ours.trusted_groups)
    status = status_of(found)
    if status.state is State.COMPLETED:
        raise UserError(f"the run in {found.path} is complete: there is nothing left to do")
    kept = found.path / "site.yaml"
    site = read_site(kept) if cluster is None and kept.is_file() else site_for_jobs(cluster or "default")
    job = found.read_job()
    if job.function not in RESUMABLE:
        raise UserError(
            f"{found.path / 'job.json'} names {job.function}, which is no job that goes on where it was "
            "stopped: give the command that started it again"
        )
    if "folder" in job.arguments:  # the run is the folder that is named, wherever it was begun
        here = found.path.resolve()  # not a link, which may soon lead to another
        job = replace(job, folder=here, arguments={**job.arguments, "folder": str(here)})
    elif job.folder.resolve() != found.path.resolve():
        raise UserError(
            f"{found.path / 'job.json'} is of the run in {job.folder}: where a run was moved, give the "
            "command that started it again"
        )
    if status.executor == "ray":
        from cluster.ray.connect import find_again

        address = find_again(found, site.ray_address)
        if address is not None and address != site.ray_address:
            typer.echo(f"looking for its Ray at {address}", err=True)
        site = site.model_copy(update={"ray_address": address})
    launch(job, status.executor, site, wait=wait, follow=follow, trust=trust, resume=True)


def launch(
    job: Job,
    executor: ExecutorName,
    site: Site,
    *,
    wait: bool,
    follow: bool,
    trust: bool,
    resume: bool = False,
) -> None:
    """Submit a job, and stay with it if it runs here or somebody wants to see it."""
    run = RunFolder(job.folder)
    if executor == "local":
        typer.echo(f"to stop: Ctrl-C; to go on: `submit resume {job.folder}`")
    with contextlib.closing(ProgressLine(sys.stdout)) as progress:
        excluded = excluded_nodes(job.folder.parent)
        chosen = make_executor(executor, site, stream=progress, exclude=excluded)
        handle = submit(job, chosen, keep_source=resume, trust=trust)
        if executor != "local":
            progress.write(f"{executor} job {handle.id}: `submit status {job.folder}` tells how it goes\n")
            progress.flush()
        if handle.detached and not (wait or follow):
            return
        if follow and executor == "slurm":  # the others repeat it by themselves
            for text in run.follow(0, status=status_of):
                progress.write(text)
                progress.flush()
        state = handle.wait()
    close(run, state)


def close(run: RunFolder, state: State) -> None:
    """Tell how a run ended, and end the command alike."""
    status = status_of(run)
    if status.failure is not None and status.failure.user_error:
        raise UserError(status.failure.message)
    if state is State.COMPLETED:
        typer.echo(f"completed: {run.path}")
        return
    typer.echo(f"submit: {explain(status)}", err=True)
    raise typer.Exit(PREEMPTED_EXIT_CODE if state is State.PREEMPTED else 1)


def warn_of_memory(recipe: PretrainRecipe, site: Site, resources: Resources) -> None:
    """Say if the plan does not fit the GPUs' memory, where the site tells what they are. It may be wrong."""
    from pipeline.plan.cost import GPUS, estimate
    from pipeline.plan.step_count import count_step

    named = {site.gpu_type, site.constraint} & GPUS.keys()
    if len(named) != 1 or recipe.method.remembers or resources.gpus_per_rank == 0:
        return
    gpu = GPUS[str(named.pop())]
    plan = estimate(
        recipe,
        gpus=resources.ranks,
        gpus_per_node=resources.ranks_per_node,
        gpu=gpu,
        mfu=1.0,
        steps=1,
        failures_per_node_day=site.failures_per_node_day,
        count=lambda rows: count_step(recipe, rank_rows=rows),
    )
    if not plan.fits:
        typer.echo(
            f"`submit plan` estimates that this needs {sum(plan.memory.values()) / 1e9:,.0f} GB of each "
            f"{gpu.name}, which has {gpu.memory / 1e9:,.0f}: use more --nodes, or save memory in `train`",
            err=True,
        )


def _script(job: Job, site: Site) -> str:
    from cluster.slurm.script import render

    return render(replace(job, directory=Path.cwd()), site, exclude=excluded_nodes(job.folder.parent))


def _start(folder: Path) -> str:
    from pipeline.checkpoint.files import latest, step_of

    checkpoint = latest(folder)
    return "from the start" if checkpoint is None else f"from step {step_of(checkpoint)}"


def _ranks(resources: Resources) -> str:
    nodes = f"{resources.nodes} nodes × " if resources.nodes > 1 else ""
    return f"{nodes}{several(resources.ranks_per_node, 'rank')}"


def _where(executor: ExecutorName) -> str:
    return {"local": "this machine", "slurm": "SLURM", "ray": "Ray"}[executor]
