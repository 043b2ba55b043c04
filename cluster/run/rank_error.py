"""What a rank that fails, or the watchdog of its node, leaves in `errors/` of the run folder."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError
from cluster.run.status import Failure
from cluster.typed_json import read_record

logger = logging.getLogger(__name__)

# Of gloo, of NCCL and its watchdog, and of torch's store.
PEER_IS_GONE = re.compile(
    r"gloo/transport|connectFullMesh|recvValue failed|sendBytes failed|failed to recv"
    r"|(connection|socket) (was )?(closed|reset|refused|aborted)|broken pipe"
    r"|remote process (has )?(exited|terminated)|ncclRemoteError|nccl.*(timeout|aborted)"
    r"|DistNetworkError|DistStoreError|wait timeout after|timed out waiting \d+ ?ms",
    re.IGNORECASE,
)


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
    by_peer: bool = False

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
            by_peer=self.by_peer,
        )


def is_by_peer(error: BaseException) -> bool:
    """Whether an exception says no more than that another rank has gone.

    Told by its text: gloo's and NCCL's come as RuntimeErrors, by way of whatever was waiting for them.
    """
    return PEER_IS_GONE.search(f"{type(error).__name__}: {error}") is not None


def read_error(path: Path) -> RankError | None:
    """The error in a file; None if there is none. A damaged one counts as none: the run has ended anyway."""
    if not path.is_file():
        return None
    try:
        return read_record(RankError, path, remedy="the rank's log tells how it ended")
    except UserError as error:
        logger.warning("%s", error)
        return None
