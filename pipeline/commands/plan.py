"""`submit plan`: what a recipe takes, before it is started."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.site import load_site
from cluster.typed_yaml import load_recipe
from cluster.wording import in_bytes
from pipeline.commands.options import Cluster, Json, Overrides
from pipeline.commands.pretrain import DEFAULT_RECIPE
from pipeline.recipe.pretrain import PretrainRecipe

if TYPE_CHECKING:
    from pipeline.plan.cost import Estimate
    from pipeline.plan.reading import Reading
    from pipeline.plan.step_count import StepCount

GpuName = Literal["v100-32", "a100-40", "a100-80", "h100", "h200"]
_GPUS_PER_NODE = 8


def plan(  # noqa: PLR0917 -- typer passes by name
    overrides: Overrides = None,
    recipe_name: Annotated[
        str | None, typer.Option("--recipe", help="A .yaml file, or the name of a shipped recipe.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Number of machines.")] = 1,
    gpu: Annotated[GpuName, typer.Option("--gpu", help="The GPUs in them.")] = "h100",
    mfu: Annotated[
        float, typer.Option("--mfu", min=0.01, max=1, help="The share of its peak that a GPU achieves.")
    ] = 0.4,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=1,
            help="Size of the dataset; needed if train.epochs is set, or the method has a memory bank.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw time and memory from 1 to 512 GPUs as this SVG file.")
    ] = None,
    cluster: Cluster = "default",
    as_json: Json = False,
) -> None:
    """Estimate the memory, traffic and time that a recipe needs, on these nodes and from 1 to 512 GPUs."""
    from pipeline.plan.cost import GPUS, estimate
    from pipeline.plan.step_count import step_counter

    site = load_site(cluster)
    recipe = load_recipe(
        PretrainRecipe, recipe_name or site.recipe or DEFAULT_RECIPE, overrides, kind="pretrain"
    )
    per_node = site.gpus_per_node or _GPUS_PER_NODE
    samples = _samples(recipe, samples)
    steps = _steps(recipe, samples)
    wanted = nodes * per_node
    if recipe.data.batch_size % wanted:
        raise UserError(
            f"data.batch_size {recipe.data.batch_size} does not divide over {wanted} GPUs: use a multiple of "
            "them, or another --nodes"
        )
    others = [gpus for gpus in (2**power for power in range(10)) if gpus != wanted]
    count = step_counter(recipe, near=recipe.data.batch_size // wanted)
    plans = {}
    for gpus in [wanted, *others]:  # what cannot be is refused before anything is counted
        if recipe.data.batch_size % gpus:
            continue
        try:
            plans[gpus] = estimate(
                recipe,
                gpus=gpus,
                gpus_per_node=per_node,
                gpu=GPUS[gpu],
                mfu=mfu,
                steps=steps,
                failures_per_node_day=site.failures_per_node_day,
                count=count,
                samples=samples,
            )
        except UserError:
            if gpus == wanted:
                raise
    plans = dict(sorted(plans.items()))
    if plot is not None:
        from pipeline.plan.figure import plan_figure

        write_atomically(plot, plan_figure(list(plans.values()), memory=GPUS[gpu].memory))
    asked = _reading(recipe, nodes, images_per_second=plans[wanted].images_per_second)
    if as_json:
        values = [each.to_json() for each in plans.values()]
        if not isinstance(asked, str):
            values[list(plans).index(wanted)]["reading"] = asdict(asked)
        typer.echo(json.dumps(values, indent=2))
        return
    assumed = f"{gpu}, {mfu:.0%} of its peak; rings over all links; BatchNorm's sums 30 us each"
    _tell(plans, wanted, recipe, count(plans[wanted].rank_rows), assumed=assumed, memory=GPUS[gpu].memory)
    if recipe.method.remembers and samples is not None:
        typer.echo(_of_bank(recipe, samples, plans[wanted]))
    typer.echo(asked if isinstance(asked, str) else _of_reading(asked, nodes))
    if plot is not None:
        typer.echo(f"plot       {plot}")


def _reading(recipe: PretrainRecipe, nodes: int, *, images_per_second: float) -> Reading | str:
    """What the run asks of an object store, or why that is not known."""
    root = recipe.data.root
    if "://" not in root:
        return f"The images are read from {root}, as they are needed."
    if recipe.run.resident:
        return f"The images are read from {root} once, at the start (run.resident)."
    from pipeline.data.training_set import open_training_set
    from pipeline.plan.reading import reading

    try:
        dataset = open_training_set(recipe.data).dataset
        return reading(recipe, dataset, nodes=nodes, images_per_second=images_per_second)
    except (UserError, OSError) as error:
        return f"What the store of the images must give is not known: {error}"


def _of_reading(asked: Reading, nodes: int) -> str:
    how = "Windows are read whole, in ranges of some MB" if asked.coalesced else "Images are read one by one"
    why = f"; {asked.reason}" if asked.reason else ""
    together = f" to {nodes} nodes together" if nodes > 1 else ""
    return (
        f"{how} ({in_bytes(asked.window_bytes)} are open on a node{why}): {asked.requests:,.0f} requests "
        f"and {in_bytes(asked.bytes)} per epoch and node. At this speed the store must give{together} "
        f"{asked.requests_per_second:,.1f} requests/s and {in_bytes(asked.bytes_per_second)}/s."
    )


def _of_bank(recipe: PretrainRecipe, samples: int, here: Estimate) -> str:
    from pipeline.plan.bank_cost import bank_cost

    bank = bank_cost(recipe, samples=samples, rank_rows=here.rank_rows)
    positives = f" and {in_bytes(bank.positives / here.gpus)} of positives" if bank.positives else ""
    whole, each = in_bytes(bank.whole), in_bytes(bank.whole / here.gpus)
    return (
        f"The bank has {samples:,} rows of {in_bytes(bank.whole / samples)}: {whole}, of which a GPU holds "
        f"{each}{positives}. In a step it fetches {in_bytes(bank.fetched)} of rows, and is told "
        f"{in_bytes(bank.gathered)} of what was seen. While a checkpoint is written, a node keeps "
        f"{in_bytes(bank.whole / here.nodes)} more in host memory."
    )


def _samples(recipe: PretrainRecipe, said: int | None) -> int | None:
    """Of the dataset; None where nothing depends on them."""
    if said is not None or not (recipe.train.epochs or recipe.method.remembers):
        return said
    from pipeline.data.training_set import open_training_set

    try:
        return open_training_set(recipe.data).samples
    except UserError as error:
        raise UserError(f"{error}; or give the number of its samples with --samples") from None


def _steps(recipe: PretrainRecipe, samples: int | None) -> int:
    if recipe.train.steps is not None:
        return recipe.train.steps
    from pipeline.train.length import optimizer_steps

    assert samples is not None
    return optimizer_steps(recipe, samples=samples)


def _tell(
    plans: dict[int, Estimate],
    wanted: int,
    recipe: PretrainRecipe,
    counted: StepCount,
    *,
    assumed: str,
    memory: float,
) -> None:
    here = plans[wanted]
    total = counted.matrices + counted.vectors
    console = Console(width=110, highlight=False)
    lines = {
        "recipe": f"{recipe.trunk.name}, {recipe.method.name}, batch of {recipe.data.batch_size}",
        "parameters": f"{total / 1e6:,.1f} million, {counted.trunk / 1e6:,.1f} of them in the trunk",
        "FLOPs": f"{counted.forward_flops / 1e9:,.1f} billion per image forward, "
        f"{counted.flops / 1e9:,.1f} with the backward pass",
        "assumed": assumed,
    }
    for name, value in lines.items():
        console.print(f"{name:<10} {value}")
    console.print()
    console.print(_detail(here, memory))
    console.print(_overview(plans, wanted))
    need = here.images_per_second / here.gpus
    console.print(
        f"The loader must deliver {need:,.1f} images/s per GPU. A checkpoint of "
        f"{here.checkpoint_bytes / 1e9:,.1f} GB takes {here.checkpoint_seconds:,.0f} s to write in the "
        f"background; one every {here.checkpoint_period / 60:,.0f} min. "
        f"Failures to expect: {here.failures:,.1f}."
    )


def _detail(here: Estimate, memory: float) -> Table:
    title = f"{here.gpus} GPUs, {here.rank_rows} images each"
    table = Table(title=title, title_justify="left")
    for name, justify in (("memory", "left"), ("GB", "right"), ("moved per step", "left"), ("GB", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    kinds = [(kind, size) for kind, size in here.memory.items() if size]
    kinds.append(("together" if here.fits else f"together, of {memory / 1e9:.0f}", sum(here.memory.values())))
    moved = list(here.moved.items()) or [("nothing", 0.0)]
    for number in range(max(len(kinds), len(moved))):
        row = []
        for entries in (kinds, moved):
            entry = entries[number] if number < len(entries) else None
            row += ["", ""] if entry is None else [entry[0], f"{entry[1] / 1e9:,.2f}"]
        table.add_row(*row)
    return table


def _overview(plans: dict[int, Estimate], wanted: int) -> Table:
    table = Table(title="From 1 to 512 GPUs", title_justify="left")
    for name in ("GPUs", "images each", "memory", "step", "images/s", "days", "GPU-hours", "bound by"):
        table.add_column(name, justify="left" if name == "bound by" else "right")
    for each in plans.values():
        table.add_row(
            f"{'→ ' if each.gpus == wanted else ''}{each.gpus}",
            str(each.rank_rows),
            f"{sum(each.memory.values()) / 1e9:,.1f} GB{'' if each.fits else ' too much'}",
            f"{each.step_seconds:,.3f} s",
            f"{each.images_per_second:,.0f}",
            f"{each.days:,.1f}",
            f"{each.gpu_hours:,.0f}",
            each.bottleneck,
        )
    return table
