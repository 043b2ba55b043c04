"""Why a row has no image: the words that every room of ingest uses."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Problem:
    """What is said of an item that has no bytes to check.

    Attributes:
        status: rejected by a rule of ours or of its owner; or failed.
        reason: one word, in snake case.
        retryable: whether a later attempt may fare better.
        http_status: what the server answered, if one did.
    """

    status: Literal["rejected", "failed"]
    reason: str
    retryable: bool = False
    http_status: int | None = None


PROBLEMS = {
    problem.reason: problem
    for problem in (
        Problem("rejected", "link_outside"),
        Problem("rejected", "link_unresolved"),
        Problem("rejected", "link_compressed"),
        Problem("rejected", "not_a_file"),
        Problem("rejected", "sparse_member"),
        Problem("rejected", "too_many_bytes"),
        Problem("rejected", "no_url"),
        Problem("rejected", "x_robots_tag"),
        Problem("rejected", "tdm_reservation"),
        Problem("rejected", "content_signal"),
        Problem("rejected", "content_usage"),
        Problem("failed", "malformed_row"),
        Problem("failed", "misread_value"),
        Problem("rejected", "no_image_bytes"),
        Problem("rejected", "too_long"),
        Problem("failed", "io_error", retryable=True),
        # A retry tries what is planned, and of its files nothing is.
        Problem("failed", "folder_unreadable"),
        Problem("failed", "archive_unreadable"),
        Problem("failed", "file_missing"),
        Problem("failed", "table_damaged"),
        Problem("failed", "tar_damaged"),
        Problem("failed", "tar_truncated"),
        Problem("failed", "tar_bomb"),
        Problem("failed", "warc_damaged"),
        Problem("failed", "warc_truncated"),
        Problem("failed", "warc_not_by_record"),
        Problem("failed", "response_truncated"),
    )
}
