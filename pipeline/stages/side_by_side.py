"""A graph whose stages run as jobs side by side: each as soon as its inputs are there, and there is room."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType

from cluster.errors import AlreadyRunning, UserError
from cluster.job import Handle
from cluster.run.waiting import signals_passed_on
from cluster.submit import submit
from pipeline.dag.ensure import find_receipt, lock_if_free
from pipeline.dag.graph import Failed, point_to
from pipeline.dag.recipe import DagRecipe
from pipeline.dag.stage import Receipt, Stage, StopRequested
from pipeline.stages.jobs import outcome, stage_job
from pipeline.stages.room import Room

POLL_SECONDS = 0.2
PATIENCE = 2.0  # seconds until a stage that somebody else makes is looked at again
UNSEEN_SECONDS = 60.0  # that a file server may take to come back, before a job that nobody sees is given up


@dataclass(frozen=True, kw_only=True)
class _Running:
    handle: Handle
    held: ExitStack  # its room, and its lock


@dataclass(kw_only=True)
class _Graph:
    """A graph that is being run: every stage has a result, or runs, or waits."""

    dag: DagRecipe
    stages: Sequence[Stage]
    room: Room
    gpus_per_node: int | None
    say: Callable[[str], None]
    beside: Mapping[str, int]
    results: dict[str, Receipt | Failed] = field(default_factory=dict)
    running: dict[str, _Running] = field(default_factory=dict)
    stopping: bool = False
    again_at: dict[str, float] = field(default_factory=dict)  # of those that somebody else makes
    unseen_since: dict[str, float] = field(default_factory=dict)  # of those that cannot be looked at

    def collect(self) -> None:
        """Note what has come of the jobs that have ended."""
        for stage in self.stages:
            started = self.running.get(stage.name)
            if started is None or (result := self._result(stage, started.handle)) is None:
                continue
            del self.running[stage.name]
            started.held.close()
            if isinstance(result, Receipt):
                self.say(f"{stage.name:<20} done     {result.seconds:7.1f} s  {stage.folder.name}")
            elif self.stopping:
                self.say(f"{stage.name:<20} stopped")
                continue
            else:
                self.say(f"{stage.name:<20} failed")
            self.results[stage.name] = result

    def start(self) -> None:
        """Start what can be started now, in the graph's order."""
        for stage in self.stages:
            if stage.name in self.results or stage.name in self.running:
                continue
            if self.again_at.get(stage.name, 0.0) > time.monotonic() or not self._is_ready(stage):
                continue
            try:
                self._start(stage)
            except AlreadyRunning:
                if stage.name not in self.again_at:
                    self.say(f"{stage.name:<20} is being made elsewhere: waiting for it")
                self.again_at[stage.name] = time.monotonic() + PATIENCE
            except Exception as error:
                self.results[stage.name] = Failed(error=error)
                self.say(f"{stage.name:<20} failed")

    def stop(self) -> None:
        """Ask all that runs to save and end."""
        self.stopping = True
        for started in self.running.values():
            started.handle.cancel()

    def _result(self, stage: Stage, handle: Handle) -> Receipt | Failed | None:
        """What has come of a job; None while it goes on, and for a while if its files cannot be read.

        Raises:
            UserError: if it cannot be seen for too long whether it has ended, and gave back its GPUs.
        """
        ended = False
        try:
            ended = handle.state().ended
            result = outcome(stage) if ended else None
        except (OSError, UserError) as error:
            since = self.unseen_since.setdefault(stage.name, time.monotonic())
            if time.monotonic() - since < UNSEEN_SECONDS:
                return None
            if ended:
                return Failed(error=error)
            raise UserError(
                f"for {UNSEEN_SECONDS:.0f} s it could not be seen how stage {stage.name} is ({error}): mend "
                "that, and give the same command again; stages that have finished do not run again"
            ) from error
        self.unseen_since.pop(stage.name, None)
        return result

    def _is_ready(self, stage: Stage) -> bool:
        if not all(name in self.results for name in stage.sources):
            return False
        blockers = tuple(name for name in stage.sources if isinstance(self.results[name], Failed))
        if blockers:
            self.results[stage.name] = Failed(error=None, blocked_by=blockers)
            self.say(f"{stage.name:<20} not run  ({', '.join(blockers)} failed)")
        return not blockers

    def _start(self, stage: Stage) -> None:
        if (receipt := find_receipt(stage)) is not None:
            self.results[stage.name] = receipt
            point_to(stage)
            self.say(f"{stage.name:<20} finished           {stage.folder.name}")
            return
        job = stage_job(stage, self.dag, gpus_per_node=self.gpus_per_node)
        taken = self.room.take(job, stage.name, beside=self.beside[stage.name])
        if taken is None:
            return
        with ExitStack() as held:
            held.callback(self.room.give_back, stage.name)
            if (lock := lock_if_free(stage)) is None:
                raise AlreadyRunning(f"{stage.name} is being made by another process")
            held.enter_context(lock)
            if stage.kind.job is None:
                lock.close()  # the job's one process takes it
            self.running[stage.name] = _Running(handle=submit(*taken), held=held.pop_all())
        self.say(f"{stage.name:<20} started            {stage.folder.name}")


def run_side_by_side(
    dag: DagRecipe,
    stages: Sequence[Stage],
    room: Room,
    *,
    gpus_per_node: int | None = None,
    say: Callable[[str], None],
) -> dict[str, Receipt | Failed]:
    """Run every stage that has no receipt as a job. A failure stops only what needs the failed stage.

    Args:
        stages: each after its inputs.
        gpus_per_node: of the machines they run on; None: like this one.

    Raises:
        StopRequested: if a signal asked to stop, once all that ran has saved and ended.
        UserError: if for too long it cannot be seen how a stage is.
        KeyboardInterrupt: at the second Ctrl-C; or at the first if the jobs go on without this process.
    """
    beside = _beside(stages)
    graph = _Graph(dag=dag, stages=stages, room=room, gpus_per_node=gpus_per_node, say=say, beside=beside)
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        again = number == signal.SIGINT and len(asked) > 1
        if again or any(each.handle.detached for each in graph.running.values()):
            raise KeyboardInterrupt  # ranks of this machine die with this process

    with signals_passed_on(ask):
        while len(graph.results) < len(stages):
            graph.collect()
            if not asked:
                graph.start()
            elif not graph.stopping:
                say(
                    f"{signal.Signals(asked[0]).name}: what runs saves and ends; Ctrl-C (again) stops at once"
                )
                graph.stop()
            elif not graph.running:
                raise StopRequested("stopped; give the same command again to go on from where it last saved")
            if graph.running or graph.again_at:
                time.sleep(POLL_SECONDS)
    return graph.results


def _beside(stages: Sequence[Stage]) -> dict[str, int]:
    """Of each stage, how many others neither lead to it nor follow from it."""
    before: dict[str, set[str]] = {}
    for stage in stages:
        before[stage.name] = {stage.name}.union(*(before[name] for name in stage.sources))
    return {
        name: sum(name not in before[other] and other not in mine for other in before)
        for name, mine in before.items()
    }
