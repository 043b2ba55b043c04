"""What a run tells about itself while it trains.

`metrics.jsonl` holds deterministic values only: an interrupted run's file equals an uninterrupted one's.
Times and memory go to `timing.jsonl`; TensorBoard shows both.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.atomic_file import write_atomically
from pipeline.train.collapse import COLLAPSED_BELOW, signs_of_collapse
from pipeline.train.row_file import RowFile
from pipeline.train.tensorboard import TensorBoard

logger = logging.getLogger(__name__)

_RANKME_EPSILON = 1e-7


def embedding_std(embeddings: Tensor) -> float:
    """Spread of the directions of embeddings, (n, d): 1 when they fill the sphere, 0 when all are one.

    The standard deviation over the rows of each dimension of the L2-normalised embeddings, averaged over the
    dimensions, times sqrt(d): section 4.1 of Chen & He, 2021 (https://arxiv.org/abs/2011.10566).
    """
    directions = F.normalize(embeddings.double(), dim=1)
    return float(directions.std(dim=0, correction=0).mean() * math.sqrt(embeddings.shape[1]))


def rankme(embeddings: Tensor) -> float:
    """Effective rank of embeddings, (n, d): between 1 and min(n, d); low means dimensional collapse.

    RankMe of Garrido et al., 2023 (https://arxiv.org/abs/2210.02885), equation 1: exp(-sum_k p_k log p_k)
    with p_k = sigma_k / sum_j sigma_j + 1e-7, where sigma are the singular values.
    """
    wide = embeddings.double()
    if len(wide) < wide.shape[1]:
        wide = wide.mT
    # Five times as fast as singular values, where rows are wide. What is lost, 1e-8 of the largest, is less
    # than the formula adds.
    singular = torch.linalg.eigvalsh(wide.mT @ wide).clamp(min=0).sqrt()
    total = singular.sum()
    if total == 0:
        return 1.0
    shares = singular / total + _RANKME_EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))


class Metrics:
    """The files of one run; only one rank has them.

    Args:
        folder: the run folder.
        step: the step of the checkpoint that the run goes on from: what was logged after it never happened.
        total_steps: for the progress line.
        log_every: steps between two rows of metrics.jsonl.
    """

    def __init__(self, folder: Path, *, step: int, total_steps: int, log_every: int) -> None:
        self._folder, self._total_steps, self._log_every = folder, total_steps, log_every
        self._in_trouble = False
        self._warnings: dict[str, str] = {}
        self._open(step)

    def _open(self, step: int) -> None:
        self._metrics = RowFile(self._folder / "metrics.jsonl", step=step, every=self._log_every)
        self._timing = RowFile(self._folder / "timing.jsonl", step=step)
        self._tensorboard = TensorBoard(self._folder / "tensorboard", step=step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl. Values that are not finite become null: JSON has no name for them."""
        self._write(self._metrics, step, values)

    def time(self, step: int, values: Mapping[str, Any]) -> None:
        """One row of timing.jsonl."""
        self._write(self._timing, step, values)

    def warn_of_collapse(self, step: int, values: Mapping[str, Any]) -> None:
        """Say once of each indicator that it has fallen below its threshold; `progress` keeps saying it."""
        for name in signs_of_collapse(values):
            if name not in self._warnings:
                self._warnings[name] = (
                    f"collapse: {name} was {values[name]:.4g} at step {step}, "
                    f"below {COLLAPSED_BELOW[name]:.4g}"
                )
                logger.warning("%s", self._warnings[name])

    def progress(
        self, step: int, *, loss: float, lr: float, images_per_second: float, seconds: float
    ) -> None:
        """One line for people, and progress.json for `submit status`.

        Args:
            seconds: per step, lately.
        """
        left = timedelta(seconds=round((self._total_steps - step) * seconds))
        logger.info(
            "step %d/%d  loss %.4f  lr %.4g  %.0f images/s  %s left",
            step,
            self._total_steps,
            loss,
            lr,
            images_per_second,
            left,
        )
        values = {
            "step": step,
            "total_steps": self._total_steps,
            "loss": loss if math.isfinite(loss) else None,
            "images_per_second": images_per_second,
            "seconds_left": left.total_seconds(),
            "warnings": list(self._warnings.values()),
        }
        try:
            write_atomically(self._folder / "progress.json", json.dumps(values) + "\n")
            self._in_trouble = False
        except OSError as error:  # the next line will be another
            if not self._in_trouble:
                logger.warning("progress.json cannot be written, until it can: %s", error)
            self._in_trouble = True

    def go_back(self, step: int) -> None:
        """Forget the rows of later steps: the training has gone back."""
        self.close()
        self._open(step)

    def sync(self) -> None:
        """Bring everything to the disk: a checkpoint must not know of steps that the metrics do not.

        Raises:
            OSError: if a row cannot be written now.
        """
        self._metrics.sync()
        self._timing.sync()
        self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close."""
        self._metrics.close()
        self._timing.close()
        self._tensorboard.close()

    def _write(self, file: RowFile, step: int, values: Mapping[str, Any]) -> None:
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        file.write({"step": step, **row})
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        self._tensorboard.add(numbers, step)


class Stopwatch:
    """Where the time between two log lines went; and how long the longest step took."""

    def __init__(self) -> None:
        self._since = self._begun = time.perf_counter()
        self._stepped: float | None = None
        self._steps, self._waited = 0, 0.0
        self.longest = 0.0

    def waited(self, seconds: float) -> None:
        """Count time in which the loop had no data."""
        self._waited += seconds

    def step(self) -> None:
        """Count one optimizer step, with what came between it and the one before."""
        self._steps += 1
        now = time.perf_counter()
        if self._stepped is not None:  # the first may compile
            self.longest = max(self.longest, now - self._stepped)
        self._stepped = now

    @property
    def total(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self._begun

    def lap(self, *, images_per_step: int, device: torch.device) -> dict[str, float]:
        """Seconds per step, images per second, share of time without data, memory in MB; starts anew."""
        elapsed = time.perf_counter() - self._since
        values = {
            "seconds": elapsed / self._steps,
            "images_per_second": images_per_step * self._steps / elapsed,
            "data_wait_share": self._waited / elapsed,
            "memory_mb": _memory_mb(device),
            "time": time.time(),
        }
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0
        return values


def _memory_mb(device: torch.device) -> float:
    """The most that this rank has used: of the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
