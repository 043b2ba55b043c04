"""Trouble with files in one sentence: which file it is about."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.output_trouble import trouble, writing


@pytest.mark.parametrize(
    ("number", "named", "told"),
    [
        (errno.ENOSPC, None, "cannot write out/set: no space left on device; "),
        (errno.EACCES, "out/set/shards/.x.tmp", "cannot write out/set: permission denied; "),
        (errno.EACCES, "out/.set.tmp", "cannot write out/set: permission denied; "),
        (errno.EACCES, "out", "cannot write out/set: permission denied; "),
        (errno.EISDIR, "out/set/DATASET.json", "cannot read or write out/set/DATASET.json: is a directory; "),
        (errno.EACCES, "in/a.tar", "cannot read or write in/a.tar: permission denied; "),
        (errno.EACCES, b"in/a.tar", "cannot read or write in/a.tar: permission denied; "),
        (errno.ENOSPC, "run/counts-0.json", "cannot write run/counts-0.json: no space left on device; "),
        (errno.ENOSPC, 7, "cannot write out/set: no space left on device; "),
    ],
)
def test_trouble_elsewhere_is_not_put_down_to_the_output(
    number: int, named: str | bytes | int | None, told: str
) -> None:
    with pytest.raises(UserError) as caught, writing(Path("out/set")):
        raise OSError(number, os.strerror(number), named)
    assert str(caught.value) == f"{told}mend that, then run the same command again"


def test_a_lost_connection_is_no_trouble_with_files() -> None:
    assert trouble(ConnectionResetError(errno.ECONNRESET, "reset")) is None
