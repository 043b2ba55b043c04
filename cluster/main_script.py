"""Processes that do not begin with the script that has started them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Processes that multiprocessing starts meanwhile do not run this program's script again.

    It would have each of them do so, to find what is defined there; a script without
    `if __name__ == "__main__"` would begin anew in every worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
