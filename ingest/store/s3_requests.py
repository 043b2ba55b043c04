"""Requests to S3: sent again while they fail for a reason that passes, and failures as Python has them."""

import errno
import logging
import os
import random
import threading
import time
from typing import Any

import aiohttp
import s3fs
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, NoCredentialsError
from fsspec.asyn import sync
from s3fs.core import S3_RETRYABLE_ERRORS

from cluster.errors import UserError

MOST_TRIES = 8
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 20.0
CONNECT_SECONDS = 10
SILENT_SECONDS = 60  # without a byte from the store
REQUEST_SECONDS = 300  # for one request and its answer
MOST_CONNECTIONS = 64

_PASSING = (*S3_RETRYABLE_ERRORS, FlexibleChecksumError, aiohttp.ClientError, ConnectionError)
# Besides every 5xx. 409 comes while another conditional write of the same name is under way.
_PASSING_STATUS = (408, 409, 429)
_PASSING_CODES = ("RequestTimeout", "SlowDown", "Throttling", "BadDigest", "IncompleteBody")

logger = logging.getLogger(__name__)


class PastTheEndError(Exception):
    """A range that starts behind the object's last byte."""


class Requests:
    """A client of S3. May be pickled, and used by several threads and after a fork."""

    def __init__(self) -> None:
        self._connected: tuple[int, s3fs.S3FileSystem] | None = None
        self._connecting = threading.Lock()

    def __reduce__(self) -> tuple[type["Requests"], tuple[()]]:
        return (Requests, ())

    def call(self, method: str, place: str, **arguments: Any) -> dict[str, Any]:
        """One request, sent again while it fails for a reason that may pass; a body comes as bytes.

        Args:
            method: of the client, `put_object` for one.
            place: what it is about, as a URL, for people.
            arguments: of the method.

        Raises:
            FileNotFoundError: there is no such object or upload (404).
            FileExistsError: a condition does not hold (412).
            PastTheEndError: the range starts behind the object's last byte (416).
            PermissionError: it is not permitted (403).
            TimeoutError: it failed too often.
            UserError: the bucket is not there, credentials are missing, or the store refuses the request.
        """
        trouble = ""
        for tries in range(MOST_TRIES):
            if tries:
                longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**tries)
                time.sleep(random.uniform(longest / 2, longest))
                logger.debug("%s %s again: %s", method, place, trouble)
            try:
                return self._sent(method, arguments)
            except ClientError as error:
                if not _passes(error):
                    raise _refusal(error, method, place) from error
                trouble = _answer(error)
            except NoCredentialsError as error:
                raise UserError(
                    f"no credentials for {place}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                    "AWS_PROFILE"
                ) from error
            except _PASSING as error:
                trouble = f"{type(error).__name__}: {error}".rstrip(": ")
            except BotoCoreError as error:
                raise UserError(f"{place} cannot be used: {error}") from error
        raise OSError(errno.ETIMEDOUT, f"{method} failed {MOST_TRIES} times, at last with {trouble}", place)

    def _sent(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        files = self._files()

        async def send() -> dict[str, Any]:
            client = await files.set_session()
            answer: dict[str, Any] = await getattr(client, method)(**arguments)
            if "Body" in answer:
                async with answer["Body"] as body:
                    answer["Body"] = await body.read()
            return answer

        answer: dict[str, Any] = sync(files.loop, send, timeout=REQUEST_SECONDS)
        return answer

    def _files(self) -> s3fs.S3FileSystem:
        with self._connecting:
            # The connections of a parent process are not those of its forked child.
            if self._connected is None or self._connected[0] != os.getpid():
                config = {
                    "connect_timeout": CONNECT_SECONDS,
                    "read_timeout": SILENT_SECONDS,
                    "retries": {"max_attempts": 0},
                    "max_pool_connections": MOST_CONNECTIONS,
                }
                self._connected = (os.getpid(), s3fs.S3FileSystem(config_kwargs=config))
            return self._connected[1]


def _passes(error: ClientError) -> bool:
    status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
    if status == 501:  # what it does not know now, it will not know later
        return False
    return status >= 500 or status in _PASSING_STATUS or error.response["Error"].get("Code") in _PASSING_CODES


def _answer(error: ClientError) -> str:
    said = error.response["Error"]
    return f"{error.response['ResponseMetadata'].get('HTTPStatusCode')} {said.get('Code', '')}".rstrip()


def _refusal(error: ClientError, method: str, place: str) -> Exception:
    """What the store's final answer means."""
    status = error.response["ResponseMetadata"].get("HTTPStatusCode")
    said = error.response["Error"]
    code, message = said.get("Code", ""), said.get("Message", "")
    if code == "NoSuchBucket":
        return UserError(f"{place}: there is no such bucket; create it, or check its name and the endpoint")
    if status == 404:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)
    if status == 412:
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), place)
    if status == 416:
        return PastTheEndError(place)
    if status == 403:
        return PermissionError(errno.EACCES, f"{method} is not permitted ({code}: {message})", place)
    return UserError(f"{place}: the store refused {method}: {_answer(error)}: {message}")
