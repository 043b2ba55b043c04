"""What a rank that fails, or the watchdog of its node, leaves in `errors/` of the run folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError
from cluster.run.status import Failure
from cluster.typed_json import read_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RankError:
    """One of these files.

    Attributes:
        start: which start of the run it belongs to; see `start_token`.
        time: seconds since the epoch.
        others: as in `Failure`.
    """

    rank: int | None
    type: str
    message: str
    node: str | None
    start: str
    time: float
    user_error: bool = False
    traceback: str = ""

    def failure(self, *, log_tail: tuple[str, ...]) -> Failure:
        """The same as a reason why the run failed, with the end of the rank's log."""
        return Failure(
            rank=self.rank,
            type=self.type,
            message=self.message,
            user_error=self.user_error,
            traceback=self.traceback,
            log_tail=log_tail,
            node=self.node,
        )


def read_error(path: Path) -> RankError | None:
    """The error in a file; None if there is none. A damaged one counts as none: the run has ended anyway."""
    if not path.is_file():
        return None
    try:
        return read_record(RankError, path, remedy="the rank's log tells how it ended")
    except UserError as error:
        logger.warning("%s", error)
        return None
