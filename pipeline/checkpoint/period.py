"""How often to save: often enough that a failure costs little, rarely enough that saving does."""

from __future__ import annotations

import math

_SHORTEST, _LONGEST = 600.0, 3600.0


def young_daly(*, save_seconds: float, failures_per_node_day: float, nodes: int) -> float:
    """Seconds between checkpoints that lose the least time to saving and to work done again.

    sqrt(2 C M), with C the cost of a save and M the mean time between failures of all nodes together: Young,
    1974 (https://doi.org/10.1145/361147.361115), the first order of Daly, 2006
    (https://doi.org/10.1016/j.future.2004.11.016). Kept within 10 minutes and an hour: costs and rates are
    estimates, and a site may be worse than it says.

    Args:
        save_seconds: for which a save holds the training up.
        failures_per_node_day: that end a run, of one node.
    """
    failures_per_second = failures_per_node_day * nodes / 86_400
    if failures_per_second == 0:
        return _LONGEST
    return min(_LONGEST, max(_SHORTEST, math.sqrt(2 * save_seconds / failures_per_second)))
