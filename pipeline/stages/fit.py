"""What of a graph's recipes does not fit what its stages run on: told before the first of them begins."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import UserError
from pipeline.dag.ensure import is_finished
from pipeline.dag.stage import Stage


def refuse_uneven_stages(stages: Sequence[Stage], *, gpus_per_node: int | None) -> None:
    """Refuse a graph of which arithmetic alone tells that a stage to come could only fail: it may be a week
    away. How many images it will have is told when they are there.

    Args:
        gpus_per_node: of the machines they run on; None: like this one.

    Raises:
        UserError: naming every such stage, and what would fit.
    """
    wrong: dict[str, list[str]] = {}
    for stage in stages:
        if stage.kind.refuse is None or is_finished(stage):
            continue
        try:
            stage.kind.refuse(stage.recipe, stage.kind.resources(stage.recipe, gpus_per_node))
        except UserError as error:
            wrong.setdefault(str(error), []).append(stage.name)  # a recipe of many stages is wrong once
    if wrong:
        raise UserError("; ".join(f"{', '.join(names)}: {why}" for why, names in wrong.items()))
