"""Graphs of stages, run in order on this machine, nothing twice."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from cluster.errors import UserError
from cluster.executors import Executor
from cluster.typed_yaml import check_recipe
from cluster.wording import duration
from pipeline.dag.ensure import ensure
from pipeline.dag.recipe import DagRecipe, Shown, StageSection, suggest
from pipeline.dag.stage import Kind, Origin, Receipt, Stage, StopRequested, read_receipt


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Why a stage has no receipt: its own error, or the stages before it that failed."""

    error: Exception | None
    blocked_by: tuple[str, ...] = ()


def conclude(
    recipe: DagRecipe,
    stages: Iterable[Stage],
    results: Mapping[str, Receipt | Failed],
    *,
    say: Callable[[str], None],
) -> None:
    """Say what a graph is asked to show at its end.

    Raises:
        UserError: if a stage failed: which, why, and what was not run because of it; or if a check did.
    """
    failures = {stage: result for stage, result in results.items() if isinstance(result, Failed)}
    if failures:
        raise UserError(_explain(failures, {stage.name: stage for stage in stages}))
    for line in closing_lines(recipe, results):
        say(line)
    if found := failed_checks(recipe, results):
        raise UserError("; ".join(found))


def build_graph(
    recipe: DagRecipe, kinds: Mapping[str, Kind], *, keys: Mapping[str, str] | None = None
) -> list[Stage]:
    """The stages, each after its inputs, otherwise in the recipe's order.

    Args:
        recipe: the graph.
        kinds: what its stages may be.
        keys: stage → key, where it is known already.

    Raises:
        UserError: if a kind, role or input does not exist, an input is missing, or the stages go in a circle.
    """
    for name, section in recipe.stages.items():
        _check_stage(name, section, recipe, kinds)
    for name, section in recipe.stages.items():
        for check in section.checks:
            if check.above is not None and check.above not in recipe.stages:
                raise UserError(
                    f"stage {name}: a check is above {check.above!r}, and there is no such "
                    f"stage{suggest(check.above, recipe.stages)}"
                )
    for shown in recipe.show:
        if shown.stage not in recipe.stages:
            raise UserError(f"show: there is no stage {shown.stage!r}{suggest(shown.stage, recipe.stages)}")
    built: dict[str, Stage] = {}
    for name in _in_order(recipe):
        section = recipe.stages[name]
        kind = kinds[section.kind]
        assert isinstance(section.recipe, dict)  # load_dag has put the recipe in its name's place
        built[name] = Stage(
            name=name,
            kind_name=section.kind,
            kind=kind,
            recipe=check_recipe(kind.recipe, section.recipe, where=f"of stage {name}"),
            inputs={
                role: Origin(stage=built[_stage_of(text)], path=text.partition("/")[2])
                for role, text in section.inputs.items()
            },
            root=Path(recipe.folder).absolute(),
            known_key=(keys or {}).get(name),
        )
    return list(built.values())


def run_graph(
    stages: Sequence[Stage], executor: Executor, *, say: Callable[[str], None]
) -> dict[str, Receipt | Failed]:
    """Ensure every stage, in the given order; one whose inputs failed is not tried."""
    results: dict[str, Receipt | Failed] = {}
    before = {stage.name: _seconds_before(stage) for stage in stages}
    for number, stage in enumerate(stages, start=1):
        blockers = tuple(name for name in stage.sources if isinstance(results[name], Failed))
        if blockers:
            results[stage.name] = Failed(error=None, blocked_by=blockers)
            say(f"{stage.name:<20} not run  ({', '.join(blockers)} failed)")
            continue
        try:
            receipt, ran = ensure(stage, executor)
        except StopRequested:
            raise
        except Exception as error:
            results[stage.name] = Failed(error=error)
            say(f"{stage.name:<20} failed")
            if not isinstance(error, UserError):
                stage.folder.mkdir(parents=True, exist_ok=True)
                (stage.folder / "error.txt").write_text(traceback.format_exc())
            continue
        results[stage.name] = receipt
        point_to(stage)
        how = "done" if ran else "reused"
        left = _what_is_left(stages[number:], before)
        say(f"{stage.name:<20} {how:<8} {receipt.seconds:7.1f} s  {stage.folder.name}{left}")
    return results


def _what_is_left(stages: Sequence[Stage], before: Mapping[str, float | None]) -> str:
    """How many stages are to come, which is next, and how long they took the last time, if all are known."""
    if not stages:
        return ""
    times = [before[stage.name] for stage in stages]
    known = [time for time in times if time is not None]
    time_left = f", about {duration(sum(known))}" if len(known) == len(times) else ""
    return f"  ({len(stages)} to go{time_left}; next: {stages[0].name})"


def _seconds_before(stage: Stage) -> float | None:
    """What a stage of this name took the last time, here, perhaps with another recipe."""
    try:
        return read_receipt(stage.root / "latest" / stage.name / "receipt.json").seconds
    except (OSError, UserError):
        return None  # it has not run, or cannot be asked: the stages are counted all the same


def closing_lines(recipe: DagRecipe, results: Mapping[str, Receipt | Failed]) -> list[str]:
    """What the graph is asked to `show` at its end."""
    width = max((len(shown.text) for shown in recipe.show), default=0)
    return [
        f"{shown.text:<{width}}  {_shown_value(shown, recipe, results[shown.stage])}" for shown in recipe.show
    ]


def _shown_value(shown: Shown, recipe: DagRecipe, result: Receipt | Failed) -> str:
    assert isinstance(result, Receipt)  # a graph with a failure has no closing lines
    if shown.metric is None:
        return str(Path(recipe.folder) / "latest" / shown.stage / (shown.file or ""))
    low, value, high = _metric(result, shown.metric, stage=shown.stage)
    if not isinstance(value, float):
        return str(value)
    interval = f" ({100 * low:.1f} to {100 * high:.1f})" if low < high else ""
    return f"{100 * value:.1f} %{interval}"


def failed_checks(recipe: DagRecipe, results: Mapping[str, Receipt | Failed]) -> list[str]:
    """The checks that do not hold, a sentence each."""
    found = []
    for name, section in recipe.stages.items():
        for check in section.checks:
            low, value, _ = _metric(results[name], check.metric, stage=name)
            if check.at_least is not None:
                if value < check.at_least:
                    found.append(f"check of {name}: {check.metric} is {value:.4g}, below {check.at_least:g}")
                continue
            assert check.above is not None  # one of the two is given
            _, other, high = _metric(results[check.above], check.metric, stage=check.above)
            if low <= high:
                found.append(
                    f"check of {name}: {check.metric} {value:.4g} (from {low:.4g}) is not above that of "
                    f"{check.above}, {other:.4g} (up to {high:.4g}), beyond their intervals"
                )
    return found


def _metric(result: Receipt | Failed, metric: str, *, stage: str) -> tuple[float, float, float]:
    """A metric's lower end, value and higher end: all the same if it has no interval."""
    assert isinstance(result, Receipt)  # nothing is checked where a stage has failed
    if not isinstance(result.metrics.get(metric), int | float):
        raise UserError(f"stage {stage} has no metric {metric!r}{suggest(metric, result.metrics)}")
    value = result.metrics[metric]
    low, high = (result.metrics.get(f"{metric}_{end}", value) for end in ("low", "high"))
    return low, value, high


def _check_stage(name: str, section: StageSection, recipe: DagRecipe, kinds: Mapping[str, Kind]) -> None:
    if section.kind not in kinds:
        raise UserError(f"stage {name}: there is no kind {section.kind!r}{suggest(section.kind, kinds)}")
    kind = kinds[section.kind]
    roles = kind.inputs | kind.optional
    for role, text in section.inputs.items():
        if role not in roles and not kind.alike:
            raise UserError(f"stage {name}: {section.kind} has no input {role!r}{suggest(role, roles)}")
        if _stage_of(text) not in recipe.stages:
            raise UserError(
                f"stage {name}: input {role} is {text!r}, and there is no stage "
                f"{_stage_of(text)!r}{suggest(_stage_of(text), recipe.stages)}"
            )
    missing = sorted(kind.inputs - section.inputs.keys())
    if missing:
        raise UserError(f"stage {name}: {section.kind} needs the input {missing[0]!r}; add it under inputs")
    if len(section.inputs) < kind.alike:
        raise UserError(
            f"stage {name}: {section.kind} needs {kind.alike} inputs at least, under names of your choice; "
            f"it has {len(section.inputs)}"
        )


def _in_order(recipe: DagRecipe) -> list[str]:
    sorter = TopologicalSorter(
        {
            name: {_stage_of(text) for text in section.inputs.values()}
            for name, section in recipe.stages.items()
        }
    )
    try:
        sorter.prepare()
    except CycleError as error:
        raise UserError(f"the stages go in a circle: {' -> '.join(reversed(error.args[1]))}") from error
    place = {name: index for index, name in enumerate(recipe.stages)}
    order: list[str] = []
    waiting: list[str] = []
    while sorter.is_active():
        waiting = sorted([*waiting, *sorter.get_ready()], key=place.__getitem__)
        order.append(waiting.pop(0))
        sorter.done(order[-1])
    return order


def _stage_of(text: str) -> str:
    return text.partition("/")[0]


def point_to(stage: Stage) -> None:
    """Make `latest/{name}` a link to the stage's folder, in one step."""
    link = stage.root / "latest" / stage.name
    link.parent.mkdir(exist_ok=True)
    temporary = link.with_name(f".{stage.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path("..") / stage.folder.name)
    temporary.replace(link)


def _explain(failures: Mapping[str, Failed], stages: Mapping[str, Stage]) -> str:
    broken = [
        f"stage {name} failed: {_reason(failed.error, stages[name])}"
        for name, failed in failures.items()
        if failed.error is not None
    ]
    blocked = [name for name, failed in failures.items() if failed.error is None]
    return "; ".join(broken) + (f"; not run because of that: {', '.join(blocked)}" if blocked else "")


def _reason(error: Exception, stage: Stage) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error} (traceback in {stage.folder / 'error.txt'})"
