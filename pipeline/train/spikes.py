"""Loss spikes: a loss far above those of the steps before it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WINDOW = 128
# The standard deviation of a normal distribution in median absolute deviations.
_NORMAL = 1.4826
# Losses on a plateau lie so close together that any change would be many of their deviations.
_LEAST_DEVIATION = 0.01


def spike_threshold(losses: Sequence[float], *, deviations: float) -> float | None:
    """The loss from which on a step is a spike: the median plus so many robust standard deviations.

    Median and median absolute deviation do not follow the outliers that they are to find (Leys et al., 2013,
    https://doi.org/10.1016/j.jesp.2013.03.013). A deviation counts as 1 % of the median at least.

    Args:
        losses: of the last steps that were taken, up to `WINDOW`.

    Returns:
        None while the window is not full.
    """
    if len(losses) < WINDOW:
        return None
    median = statistics.median(losses)
    deviation = _NORMAL * statistics.median(abs(loss - median) for loss in losses)
    return median + deviations * max(deviation, _LEAST_DEVIATION * abs(median))
