"""Requests to object stores: sent again while trouble may pass, and failures as Python has them.

Sync callers wait for the answer in Python, where a signal reaches them; a thread with an event loop asks.
"""

import asyncio
import errno
import functools
import logging
import os
import random
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.errors import UserError
from ingest.store.clients import aws_session, connect, missing_credentials

if TYPE_CHECKING:
    from obstore.store import ObjectStore

MOST_TRIES = 8
TRIES_FOR_CREDENTIALS = 3
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 20.0
CONNECT_SECONDS = 10
SILENT_SECONDS = 60  # without a byte from the store
REQUEST_SECONDS = 300  # for one request and its answer

# Besides every 5xx. 409 comes while another conditional write of the same name is under way.
_PASSING_STATUS = (408, 409, 429)
_PASSING_CODES = ("RequestTimeout", "SlowDown", "Throttling", "BadDigest", "IncompleteBody")
# Without a status: a web server that ignores ranges, and a bucket in another region.
_LASTING = ("not supported", "redirect without LOCATION")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")

T = TypeVar("T")
logger = logging.getLogger(__name__)


class PastTheEndError(Exception):
    """A range that starts behind the object's last byte."""


class _Failure:
    """What obstore says of a request that failed: it tells the kinds apart by their text."""

    def __init__(self, error: Exception) -> None:
        text = str(error)
        status, code = re.search(r"(?:status |\()code: (\d{3})", text), re.search(r"<Code>(\w+)</Code>", text)
        message = re.search(r"<Message>([^<\n]*)", text)
        kind = re.search(r"kind: (Timeout|Connect)\b", text)
        self.status = int(status[1]) if status else 0
        if "Wanted range starting at" in text:  # told by obstore, of an answer that it did not expect
            self.status = 416
        self.code = code[1] if code else ""
        self.message = message[1] if message else ""
        self.of_credentials = "token request" in text or "credential provider" in text
        first = text.partition("\n")[0].rpartition(" - ")[2]
        self.said = (
            f"{self.status} {self.code}".rstrip() if status else first + (f" ({kind[1]})" if kind else "")
        )

    def passes(self) -> bool:
        if not self.status:
            return not any(told in self.said for told in _LASTING)
        if self.status == 501 or self.code.endswith("AlreadyExists"):
            return False
        return self.status >= 500 or self.status in _PASSING_STATUS or self.code in _PASSING_CODES

    def meaning(self, action: str, place: str) -> Exception:
        """The store's final answer as an exception."""
        if self.code in _NO_BUCKET:
            return UserError(
                f"{place}: there is no such bucket; create it, or check its name and the endpoint"
            )
        if self.status == 404:
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)
        if self.status in (409, 412):
            return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), place)
        if self.status == 416:
            return PastTheEndError(place)
        if self.status in (401, 403):
            return PermissionError(
                errno.EACCES, f"{action} is not permitted ({self.code}: {self.message})", place
            )
        return UserError(f"{place}: the store refused {action}: {self.said}: {self.message}".rstrip(": "))


async def call(
    action: str, place: str, send: Callable[[], Awaitable[T]], *, most_tries: int | None = None
) -> T:
    """One request, sent again while it fails for a reason that may pass.

    Args:
        action: what it does, `get` for one.
        place: what it is about, as a URL; both for people.
        send: sends it, with obstore.
        most_tries: MOST_TRIES if it is None.

    Raises:
        FileNotFoundError: there is no such object (404).
        FileExistsError: a condition does not hold (412).
        PastTheEndError: the range starts behind the object's last byte (416).
        PermissionError: it is not permitted (403).
        OSError: it failed too often.
        UserError: the bucket is not there, credentials are missing, or the store refuses the request.
    """
    most = most_tries or MOST_TRIES
    tries, said = 0, ""
    while tries < most:
        if tries:
            longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**tries)
            await asyncio.sleep(random.uniform(longest / 2, longest))
            logger.debug("%s %s again: %s", action, place, said)
        tries += 1
        try:
            return await send()
        except ValueError as error:  # what obstore says of a name with empty parts, or with dots for parts
            raise UserError(f"{place} cannot be used: {error}") from error
        except Exception as error:
            if not _is_of_obstore(error):
                raise
            failure = _Failure(error)
            said = failure.said
            if failure.of_credentials and (tries == TRIES_FOR_CREDENTIALS or 400 <= failure.status < 500):
                raise UserError(f"{missing_credentials(place)} ({said})") from error
            if not failure.of_credentials and not failure.passes():
                raise failure.meaning(action, place) from error
    # Not ETIMEDOUT: on its way out of a future, a TimeoutError loses the place.
    raise OSError(errno.EIO, f"{action} failed {most} times, at last with {said}", place)


def _is_of_obstore(error: Exception) -> bool:
    # By name: after a fork there are two copies of its classes. What is not found it tells by Python's own.
    return type(error).__module__ == "obstore.exceptions" or isinstance(error, FileNotFoundError)


def run(request: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, from a thread without an event loop. A signal ends the waiting."""
    future = start(request)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def start(request: Coroutine[Any, Any, T]) -> Future[T]:
    """Begin with a coroutine, in the thread that waits for answers."""
    return asyncio.run_coroutine_threadsafe(request, _loop(os.getpid()))


@functools.lru_cache(maxsize=1)
def _loop(_process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="object-stores", daemon=True).start()
    return loop


_connecting = threading.Lock()


def client(root: str, *, patient: bool = False) -> "ObjectStore":
    """obstore's client of a bucket or web server, one for all of this process.

    Args:
        patient: it sends failed requests again by itself, as `call` would, for what is many requests.
    """
    with _connecting:
        return _client(os.getpid(), root, patient)


@functools.cache
def _client(_process: int, root: str, patient: bool) -> "ObjectStore":
    return connect(
        root,
        client={
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "read_timeout": timedelta(seconds=SILENT_SECONDS),
            "timeout": timedelta(seconds=REQUEST_SECONDS),
        },
        retry={
            "max_retries": MOST_TRIES - 1 if patient else 0,
            "retry_timeout": timedelta(seconds=REQUEST_SECONDS),
            "backoff": {
                "init_backoff": timedelta(seconds=FIRST_PAUSE_SECONDS),
                "max_backoff": timedelta(seconds=LONGEST_PAUSE_SECONDS),
            },
        },
    )


def aws_client(root: str) -> Any:
    """botocore's client of a bucket, one for all of this process: to make one takes longer than to ask it.

    Raises:
        OSError: it cannot be made.
        UserError: credentials are missing, or botocore is not installed.
    """
    with _connecting:
        return _aws_client(os.getpid(), root)


@functools.cache
def _aws_client(_process: int, root: str) -> Any:
    session = aws_session(root)
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=SILENT_SECONDS,
        retries={"mode": "standard", "total_max_attempts": MOST_TRIES},
    )
    try:
        return session.create_client("s3", config=config)
    except BotoCoreError as error:
        raise OSError(errno.EIO, str(error), root) from error


def forget_clients() -> None:
    """Connect anew: endpoints or credentials in the environment have changed."""
    _client.cache_clear()
    _aws_client.cache_clear()
