"""Weights & Biases: a run as one of its runs. Offline (WANDB_MODE=offline) all stays in the folder
`wandb` until `wandb sync` sends it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from cluster.errors import UserError
from pipeline.follow.follow import Point, Remote


class Wandb:
    """Args: project, by its name."""

    def __init__(self, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"following to W&B needs wandb: pip install 'seer-pipeline[wandb]' ({error})"
            ) from None
        self._wandb, self._project = wandb, project
        self._run: Any = None
        self._exit = 0

    @property
    def place(self) -> str:
        return f"W&B, project {self._project}"

    def new_id(self, name: str) -> str:
        return secrets.token_hex(8)

    def open(self, remote: Remote) -> None:
        try:
            self._run = self._wandb.init(
                project=self._project,
                id=remote.id,
                name=remote.name,
                resume="allow",
                config=remote.facts,
                # Of the run that is told of this process knows nothing.
                settings=self._wandb.Settings(
                    console="off", disable_git=True, save_code=False, x_disable_stats=True
                ),
            )
        except (self._wandb.Error, OSError) as error:
            raise UserError(
                f"W&B does not take this: {' '.join(str(error).split())}; once that is mended, the same "
                "command goes on where it stopped; with WANDB_MODE=offline `wandb sync` sends it later"
            ) from error
        # Its own steps only rise; ours go back when a run goes on from a checkpoint.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def recipe(self, values: dict[str, Any]) -> None:
        self._run.config.update(values, allow_val_change=True)

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.values, "step": point.step, "time": point.time})

    def end(self, state: str, why: str) -> None:
        self._run.summary["state"], self._run.summary["why"] = state, why
        self._exit = 0 if state == "completed" else 1

    def close(self) -> None:
        self._run.finish(exit_code=self._exit)
