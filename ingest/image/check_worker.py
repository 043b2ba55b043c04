"""A process that checks images sent to it: `python -m ingest.image.check_worker MEMORY`.

The parent (`ingest.image.check_pool`) sends the treatment once, then batches; for each batch one answer comes
back. Words go through standard input and output, bytes through MEMORY, a file descriptor
(`ingest.image.channel`). Before each image its number is written where the parent can read it after this
process has died. The kernel ends the process when an image takes more CPU time than the limit, and refuses
it memory beyond the limit: both hold while a decoder written in C runs, and when the parent is gone. Only
numbers and bytes cross, no pickles: hostile bytes are parsed here, so what comes out is not trusted to be
code. An intruder finds a fence (`ingest.fence`).
`ingest.video.check_worker` is the same for clips.
"""

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from ingest.fence.fence import fence
from ingest.image.channel import NO_IMAGE, Channel
from ingest.image.check import Checked, Treatment, check
from ingest.image.decode import ImageLimits
from ingest.image.phash import perceptual_hash

# Wall time that an image may take, in multiples of its CPU time.
_PATIENCE = 30
_FIELDS = tuple(Checked.__dataclass_fields__)


def to_row(checked: Checked) -> list[Any]:
    """A verdict as JSON values; of the bytes to store, whether there are any."""
    *fields, data = vars(checked).values()
    return [*fields, data is not None]


def from_row(row: list[Any], parts: Iterator[bytes]) -> Checked:
    """The verdict of a row; its bytes are the next of the parts."""
    *fields, has_data = row
    return Checked(**dict(zip(_FIELDS, [*fields, next(parts) if has_data else None], strict=True)))


def main() -> None:
    serve(_image_check)


def _image_check(order: dict[str, Any]) -> Callable[[bytes, Any], Checked]:
    treatment = Treatment(**order["treatment"] | {"limits": ImageLimits(**order["treatment"]["limits"])})
    # What its libraries set up once, 32 MiB of addresses for products of matrices, is not the first image's.
    perceptual_hash(Image.new("RGB", (1024, 64)))
    return lambda data, _: check(data, treatment)


def serve(prepare: Callable[[dict[str, Any]], Callable[[bytes, Any], Checked]]) -> None:
    """Answer batches until the parent is gone.

    Args:
        prepare: makes the check of the first order; the fence is put up behind it. The check is called with a
            file's bytes, and with what the parent says of them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    channel = Channel(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]))
    order, _ = channel.receive()
    judge = prepare(order)
    # What was imported is not looked through for cycles again and again.
    gc.freeze()
    fence(order["memory_mb"] << 20)
    while True:
        try:
            asked, files = channel.receive()
        except EOFError:
            return
        verdicts = []
        for number, (file, detail) in enumerate(asked):
            # CPU time: a machine that is busy, or stopped for a while, must not fail a good image (D1).
            signal.setitimer(signal.ITIMER_PROF, order["seconds"])
            # And an end to waiting that takes none; the parent tries such an image once more.
            signal.setitimer(signal.ITIMER_REAL, _PATIENCE * order["seconds"])
            # Only now: what is left of the last image's time must not run out in this one's name.
            channel.mark = number
            verdicts.append(judge(files[file], detail))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        channel.mark = NO_IMAGE
        channel.send(
            [to_row(verdict) for verdict in verdicts],
            [verdict.data for verdict in verdicts if verdict.data is not None],
        )


if __name__ == "__main__":
    main()
