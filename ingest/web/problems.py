"""What may become of a URL that gives no usable bytes, and whether a later attempt may fare better."""

import time
from datetime import UTC
from email.utils import parsedate_to_datetime

from ingest.problem import Problem

NOT_HTTP_URL = Problem("rejected", "not_http_url")
BAD_URL = Problem("rejected", "bad_url")
PRIVATE_ADDRESS = Problem("rejected", "private_address")
# Without a dot: what it is called depends on who asks.
PRIVATE_NAME = Problem("rejected", "private_name")
BLOCKED_PORT = Problem("rejected", "blocked_port")
ROBOTS_DISALLOWED = Problem("rejected", "robots_disallowed")
ROBOTS_UNREACHABLE = Problem("failed", "robots_unreachable", retryable=True)
DNS_NOT_FOUND = Problem("failed", "dns_not_found")
DNS_FAILED = Problem("failed", "dns_failed", retryable=True)
CONNECT_FAILED = Problem("failed", "connect_failed", retryable=True)
TLS_INVALID = Problem("failed", "tls_invalid")
BAD_HTTP = Problem("failed", "bad_http")
DEADLINE = Problem("failed", "deadline", retryable=True)
RESET = Problem("failed", "reset", retryable=True)
FETCHER_ERROR = Problem("failed", "fetcher_error")
# Said of all URLs of a host that is left alone for a while.
HOST_UNREACHABLE = Problem("failed", "host_unreachable", retryable=True)
HOST_ASKS_TO_WAIT = Problem("failed", "host_asks_to_wait", retryable=True)
# Said of all URLs that were not asked for when the crawl's time was over.
GIVEN_UP = Problem("failed", "given_up", retryable=True)

# Other 5xx may pass; these say that the server will never do it.
_LASTING = (501, 505, 506, 510)
_PASSING = (408, 425, 429)


class UnfetchableError(Exception):
    """A URL gives no usable bytes.

    Attributes:
        problem: what its row will say.
        retry_after: seconds that the server asked to wait; None if it did not.
    """

    def __init__(self, problem: Problem, *, retry_after: float | None = None) -> None:
        super().__init__(problem.reason)
        self.problem = problem
        self.retry_after = retry_after


def answered(status: int) -> Problem:
    """The problem of an answer that is no success: `http_404` and so on."""
    passing = status in _PASSING or (status >= 500 and status not in _LASTING)
    return Problem("failed", f"http_{status}", retryable=passing, http_status=status)


def after_answer(
    reason: str, status: int, *, rejected: bool = False, retryable: bool = False
) -> UnfetchableError:
    """Something wrong with what follows a good status line."""
    kind = Problem("rejected" if rejected else "failed", reason, retryable, http_status=status)
    return UnfetchableError(kind)


def retry_after(text: str | None) -> float | None:
    """Seconds from now, of a Retry-After header (RFC 9110 §10.2.3); None if absent or unreadable."""
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
        stamp = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(0.0, stamp - time.time())
