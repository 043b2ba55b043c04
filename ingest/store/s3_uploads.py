"""Unfinished uploads to S3: Amazon's own client lists and ends them, obstore does not."""

import contextlib
import errno
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from ingest.store.object_requests import aws_client
from ingest.store.store import Entry


def unfinished(root: str, prefix: str) -> Iterator[Entry]:
    """Those below a prefix of the bucket `s3://…`, by their keys.

    Raises:
        OSError: they cannot be listed.
        UserError: credentials are missing.
    """
    with _client(root) as s3:
        bucket = root.removeprefix("s3://")
        for page in s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for found in page.get("Uploads", ()):
                one = {"Bucket": bucket, "Key": found["Key"], "UploadId": found["UploadId"]}
                yield Entry(
                    name=found["Key"],
                    bytes=_uploaded(s3, one),
                    modified=found["Initiated"].timestamp(),
                    upload=found["UploadId"],
                )


def abort(root: str, key: str, upload: str) -> None:
    """End an upload and remove its parts; no error if it is gone.

    Raises:
        OSError, UserError: as `unfinished`.
    """
    with _client(root) as s3, contextlib.suppress(s3.exceptions.NoSuchUpload):
        s3.abort_multipart_upload(Bucket=root.removeprefix("s3://"), Key=key, UploadId=upload)


def _uploaded(s3: Any, one: dict[str, str]) -> int:
    """Bytes of an upload's parts, the first thousand of them."""
    try:
        parts = s3.list_parts(**one).get("Parts", ())
    except s3.exceptions.NoSuchUpload:
        return 0
    return sum(part["Size"] for part in parts)


@contextmanager
def _client(root: str) -> Generator[Any]:
    s3 = aws_client(root)
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield s3
    except (ClientError, BotoCoreError) as error:
        raise OSError(errno.EIO, str(error), root) from error
