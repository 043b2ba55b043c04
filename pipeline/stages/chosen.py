"""Which checkpoints of a run are evaluated, and what that has taken so far."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import UserError
from cluster.executors import status_of
from pipeline.dag.ensure import find_receipt
from pipeline.dag.progress import StageState, look_at_stages
from pipeline.dag.recipe import DagRecipe
from pipeline.dag.stage import Receipt, Stage, job_folder, read_receipt


def choose(there: Collection[int], chosen: Collection[int], *, apart: int | None) -> list[int]:
    """Steps to evaluate: those that were chosen before, and of the others those that lie far enough behind.

    Args:
        there: steps of the checkpoints that the run has kept.
        chosen: those whose evaluation has begun at some time; some may have been removed since.
        apart: steps between two that are chosen; None takes all.
    """
    found = set(chosen)
    for step in sorted(there):
        if apart is None or all(abs(step - other) >= apart for other in found):
            found.add(step)
    return sorted(found & set(there))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How far the evaluation of one checkpoint is, and the GPU-hours that it has taken so far."""

    begun: bool
    going_on: bool
    done: bool
    gpu_hours: float


def look_at_evaluation(stages: Sequence[Stage]) -> Evaluation:
    """Of a graph's stages, those are looked at that stand on the stage `checkpoint`."""
    names = {"checkpoint"}
    for stage in stages:  # each after its inputs
        if names & set(stage.sources):
            names.add(stage.name)
    own = [stage for stage in stages if stage.name in names]
    states = [row.state for row in look_at_stages(own)]
    return Evaluation(
        begun=any(state not in (StageState.MISSING, StageState.STALE) for state in states),
        going_on=any(state in (StageState.RUNNING, StageState.QUEUED) for state in states),
        done=all(state is StageState.FINISHED for state in states),
        gpu_hours=sum(map(_taken, own)),
    )


def _taken(stage: Stage) -> float:
    """GPU-hours of a stage up to now, those of failed attempts included."""
    run = job_folder(stage)
    if (run.path / "status.json").is_file():
        return status_of(run).until_now().gpu_hours
    receipt = find_receipt(stage)
    return 0.0 if receipt is None else receipt.gpu_hours


def evaluated(root: Path, run: Path, *, left_out: Callable[[str], None]) -> dict[int, float]:
    """Step → GPU-hours of what was made of each checkpoint of a run, removed ones too.

    Args:
        root: the folder of the graph that evaluates.
        run: the run's folder, resolved.
        left_out: is told of each receipt that cannot be counted.
    """
    receipts = []
    for path in sorted(root.glob("*/receipt.json")):
        try:  # one that is damaged must not stand in the way of all others
            receipts.append(read_receipt(path))
        except UserError as error:
            left_out(str(error))
    made = {receipt.key: receipt for receipt in receipts}
    hours: dict[int, float] = {}
    for receipt in receipts:
        for step in _steps(receipt, made, run / "checkpoints"):
            hours[step] = hours.get(step, 0.0) + receipt.gpu_hours
    return hours


def _steps(receipt: Receipt, made: Mapping[str, Receipt], checkpoints: Path) -> set[int]:
    """Of the run's checkpoints that a stage stands on."""
    if receipt.kind == "checkpoint":
        return {int(receipt.metrics["step"])} if Path(receipt.recipe["path"]).parent == checkpoints else set()
    sources = [made.get(value.partition("/")[0]) for value in receipt.inputs.values()]
    return set().union(*(_steps(each, made, checkpoints) for each in sources if each is not None))


@dataclass(kw_only=True)
class Choice:
    """What is asked of the checkpoints of a run.

    Attributes:
        run: its folder, resolved.
        newest: only that one is evaluated.
        steps_apart: steps between two checkpoints that are evaluated; None: all are.
        gpu_hours: the most that the evaluations may take in all; None: as much as they take.
        graphs: step → the graph that evaluates the checkpoint, and its stages.
        left_out: what is wrong with receipts whose GPU-hours could not be counted.
    """

    run: Path
    newest: bool
    steps_apart: int | None
    gpu_hours: float | None
    graphs: dict[int, tuple[DagRecipe, Sequence[Stage]]] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    def steps(self) -> list[int]:
        """The steps to evaluate, in their order."""
        if self.newest or self.steps_apart is None:
            return sorted(self.graphs)[-1 if self.newest else 0 :]
        chosen = {step for step, each in self._look().items() if each.begun} | self._before().keys()
        return choose(self.graphs, chosen, apart=self.steps_apart)

    def refusal(self, step: int) -> str | None:
        """Why the evaluation of a checkpoint is not to be started now; None: there is enough left.

        What one takes is known when one has ended: the dearest so far is what is reckoned with, and the first
        has to end before a second may start.
        """
        if self.gpu_hours is None:
            return None
        seen = self._look()
        own = seen.pop(step, None)
        if own is None or own.going_on or own.done:  # it is not to be started
            return None
        gone = [hours for other, hours in self._before().items() if other not in self.graphs]
        dearest = max([*gone, *(each.gpu_hours for each in seen.values() if each.done)], default=None)
        if dearest is None and any(each.going_on for each in seen.values()):
            return "the first evaluation has not ended yet, and it says what one takes"
        likely = dearest or 0.0
        spent = sum(gone) + own.gpu_hours
        spent += sum(max(each.gpu_hours, likely if each.going_on else 0.0) for each in seen.values())
        if spent < self.gpu_hours and spent + max(0.0, likely - own.gpu_hours) <= self.gpu_hours:
            return None
        return f"{spent:.3g} of {self.gpu_hours:g} GPU-hours are taken, and one takes about {likely:.3g}"

    def _look(self) -> dict[int, Evaluation]:
        found = {}
        for step, (_, stages) in self.graphs.items():
            with suppress(UserError):  # it was removed just now
                found[step] = look_at_evaluation(stages)
        return found

    def _before(self) -> dict[int, float]:
        roots = {stages[0].root for _, stages in self.graphs.values()}
        found: dict[int, float] = {}
        for root in roots:
            found |= evaluated(root, self.run, left_out=self.left_out.add)
        return found
