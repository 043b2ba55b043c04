"""Linear support vector machines on the sound of recordings, of each of which several windows are heard.

The protocol of AVID (https://github.com/facebookresearch/AVID-CMA) for ESC-50 and DCASE: features are centred
and divided by their deviation plus 0.01, one machine for each class has the hinge loss, and what they say of
the windows of a recording is averaged. Of several folds each has a training and a test set of its own.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from cluster.errors import UserError
from pipeline.recipe.transfer import AudioSvmRecipe
from pipeline.transfer.features import Features
from pipeline.transfer.scores import mean_of_samples, shared_labels, with_interval

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AudioSvmScores:
    """Accuracy over recordings. `converged` says that every machine's fit had ended by itself."""

    top1: float
    recordings: int
    windows: int
    classes: int
    train_samples: int
    converged: bool

    def metrics(self) -> dict[str, float]:
        """Flat numbers for receipts and `--json`; `train_samples` are windows."""
        return {
            **with_interval(self.top1, self.recordings),
            "recordings": self.recordings,
            "windows": self.windows,
            "classes": self.classes,
            "train_samples": self.train_samples,
            "converged": float(self.converged),
        }


def audio_svm(
    train: Features, test: Features, recipe: AudioSvmRecipe, *, device: torch.device | None = None
) -> AudioSvmScores:
    """Learn from all windows of training, and score the recordings of the test. It runs on the CPU, whatever
    the device.

    Args:
        train, test: a row for each window; rows of one recording have its key.

    Raises:
        UserError: if the two sets share no labels, or a feature is not finite.
    """
    names, train_y, test_y = shared_labels(train, test)
    x, outside = (part.x.double().numpy() for part in (train, test))
    if not (np.isfinite(x).all() and np.isfinite(outside).all()):
        raise UserError(
            "the features hold numbers that are not finite, which no classifier can use: the trunk has "
            "diverged; export it from an older checkpoint"
        )
    centre, scale = x.mean(0), x.std(0) + recipe.offset
    machine = LinearSVC(C=recipe.cost, loss="hinge", max_iter=recipe.max_iterations, random_state=recipe.seed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConvergenceWarning)
        machine.fit((x - centre) / scale, train_y.numpy())
    converged = not any(issubclass(each.category, ConvergenceWarning) for each in said)
    if not converged:
        logger.warning("audio_svm: some machines did not converge; raise max_iterations, or lower the cost")
    scores, first = mean_of_samples(
        torch.from_numpy(_of_each(machine, (outside - centre) / scale)), test.keys
    )
    said_class = machine.classes_[scores.argmax(1).numpy()]
    return AudioSvmScores(
        top1=float((said_class == test_y[first].numpy()).mean()),
        recordings=len(first),
        windows=len(test_y),
        classes=len(names),
        train_samples=len(train_y),
        converged=converged,
    )


def _of_each(machine: LinearSVC, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the machine of each class says, (n, classes); of two classes there is one machine."""
    said: NDArray[np.float64] = machine.decision_function(x)
    return said if said.ndim == 2 else np.stack([-said, said], axis=1)
