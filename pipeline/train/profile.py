"""Where the time of a few steps goes: a trace per rank, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import logging
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from cluster.rank.torch_dist import World

logger = logging.getLogger(__name__)


class Profile:
    """Records the steps asked for into the run folder.

    Args:
        folder: the run folder; traces go to `traces/`.
        steps: "10:15" records from the end of step 10 to the end of step 15; None nothing.
    """

    def __init__(self, folder: Path, *, steps: str | None, world: World) -> None:
        self._folder, self._world = folder / "traces", world
        self._name = f"steps-{(steps or '').replace(':', '-')}-rank-{world.rank}.json.gz"
        self._first, self._last = map(int, (steps or "-1:-1").split(":"))
        self._profiler: profile | None = None

    def step(self, done: int) -> None:
        """A step is done: begin, go on, or write the trace."""
        if done == self._first < self._last and self._profiler is None:
            activities = [ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities)
            self._profiler.start()
        elif done >= self._last:
            self.close()

    def close(self) -> None:
        """Write the trace, if one is being recorded: the run may end amid the steps asked for."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._folder / self._name))
        except OSError as error:  # no reason to lose a run
            logger.warning("the trace of rank %d could not be written: %s", self._world.rank, error)
            return
        if self._world.is_first:
            logger.info("trace of each rank, steps %d to %d: %s", self._first, self._last, self._folder)
