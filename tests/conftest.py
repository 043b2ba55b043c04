"""What every test stands on."""

import gc
import signal

import pytest
from hypothesis import settings

# A machine that is busy is no failure.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# A shell that starts the tests in the background has them ignore Ctrl-C, and all processes below inherit it:
# the tests that press Ctrl-C need it heard, as at a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first: what comes last then fills both cores to the end."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """What was imported stays: no collection looks through it any more."""
    gc.collect()
    gc.freeze()
