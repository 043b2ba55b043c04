"""Trouble with what lies elsewhere, in one sentence: fsspec's file systems raise what their libraries do."""

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import UserError


@contextmanager
def reading(place: str, *, deed: str = "read") -> Iterator[None]:
    """Trouble within the block is trouble with reading that place, or with another deed.

    Raises:
        UserError: instead of whatever says that it cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_trouble(error):
            raise
        raise UserError(f"{place} cannot be {deed}: {said(error)}") from error


def is_trouble(error: Exception) -> bool:
    """Whether this says that a place cannot be opened or read, and is no mistake of ours."""
    if isinstance(error, (OSError, ImportError, TimeoutError)):
        return True
    import aiohttp  # takes long, and most of what is read is no web server's

    return isinstance(error, aiohttp.ClientError)


def said(error: Exception) -> str:
    """What it says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):  # fsspec's, which says only what it looked for
        return "not there, or its server does not answer"
    return " ".join(f"{error}".split()) or type(error).__name__
