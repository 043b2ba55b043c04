"""A process that checks images sent through its standard input: `python -m ingest.image.check_worker`.

The parent (`ingest.image.check_pool`) sends the treatment once, then batches; for each batch one answer comes
back. Before each image its number is written where the parent can read it after this process has died. The
kernel ends the process when an image takes more CPU time than the limit, and refuses it memory beyond the
limit: both hold while a decoder written in C runs, and when the parent is gone. Only numbers and bytes cross,
no pickles: hostile bytes are parsed here, so what comes out is not trusted to be code. An intruder finds a
fence (`ingest.fence`).
"""

import json
import mmap
import signal
import struct
import sys
from typing import Any, BinaryIO

from ingest.fence.fence import fence
from ingest.image.check import Checked, Treatment, check
from ingest.image.decode import ImageLimits

NO_IMAGE = 0xFFFFFFFF
# Wall time that an image may take, in multiples of its CPU time.
_PATIENCE = 30


def write_frame(file: BinaryIO, head: Any, parts: list[bytes]) -> None:
    """A JSON head, which must tell the reader the sizes of the parts, and then the parts."""
    text = json.dumps(head, separators=(",", ":")).encode()
    file.write(b"".join([struct.pack("<I", len(text)), text, *parts]))
    file.flush()


def read_exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


def read_head(file: BinaryIO) -> Any:
    (size,) = struct.unpack("<I", read_exactly(file, 4))
    return json.loads(read_exactly(file, size))


def to_row(checked: Checked) -> list[Any]:
    """A verdict as JSON values, the stored bytes replaced by their number; -1 for the original ones."""
    *fields, data = vars(checked).values()
    return [*fields, -1 if data is None else len(data)]


def from_row(row: list[Any], file: BinaryIO) -> Checked:
    *fields, size = row
    data = None if size < 0 else read_exactly(file, size)
    return Checked(**dict(zip(Checked.__dataclass_fields__, [*fields, data], strict=True)))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    order = read_head(source)
    treatment = Treatment(**order["treatment"] | {"limits": ImageLimits(**order["treatment"]["limits"])})
    current = mmap.mmap(order["current"], 4)
    fence(order["memory_mb"] << 20)
    while True:
        try:
            sizes = read_head(source)
            images = [read_exactly(source, size) for size in sizes]
        except EOFError:
            return
        verdicts = []
        for number, image in enumerate(images):
            # CPU time: a machine that is busy, or stopped for a while, must not fail a good image (D1).
            signal.setitimer(signal.ITIMER_PROF, order["seconds"])
            # And an end to waiting that takes none; the parent tries such an image once more.
            signal.setitimer(signal.ITIMER_REAL, _PATIENCE * order["seconds"])
            # Only now: what is left of the last image's time must not run out in this one's name.
            current[:] = struct.pack("<I", number)
            verdicts.append(check(image, treatment))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        current[:] = struct.pack("<I", NO_IMAGE)
        write_frame(
            answers,
            [to_row(verdict) for verdict in verdicts],
            [verdict.data for verdict in verdicts if verdict.data is not None],
        )


if __name__ == "__main__":
    main()
