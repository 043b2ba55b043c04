"""A process that decodes images and clips of a dataset: `python -m ingest.video.decode_worker MEMORY`.

As `ingest.image.check_worker`, which says how it is bounded and fenced in: datasets may be strangers', too.
"""

from collections.abc import Callable
from typing import Any

from cluster.errors import UserError
from ingest.image.check import Checked
from ingest.image.check_worker import serve
from ingest.image.decode import ImageLimits, as_image_error, open_image
from ingest.image.orientation import upright
from ingest.image.pixels import as_rgb
from ingest.video.container import CONTAINERS, MediaError, pyav
from ingest.video.watch import Bounds, watch

# Nothing is wrong with the clip.
NO_PYAV = "no_pyav"
_NO_CLIP = Checked(status="failed", reason=NO_PYAV)


def main() -> None:
    serve(_prepared)


def _prepared(_: dict[str, Any]) -> Callable[[bytes, Any], Checked]:
    # What a library takes is not the first clip's; and behind the fence it may fail to say what it lacks.
    try:
        pyav()
    except UserError:
        return lambda data, row: _decoded(data, row) if row[0] not in CONTAINERS else _NO_CLIP
    return _decoded


def _decoded(data: bytes, row: list[Any]) -> Checked:
    """Its size, if it decodes completely; `row` is the format and the size that its row says."""
    kind, width, height = row
    try:
        size = _watched(data) if kind in CONTAINERS else _seen(data, width * height)
    except MediaError as error:
        return Checked(status=error.status, reason=error.reason)
    except Exception as error:
        verdict = as_image_error(error)
        return Checked(status=verdict.status, reason=verdict.reason)
    return Checked(status="kept", width=size[0], height=size[1])


def _watched(data: bytes) -> tuple[int, int]:
    clip = watch(data, Bounds())
    return clip.width, clip.height


def _seen(data: bytes, pixels: int) -> tuple[int, int]:
    opened = open_image(data, ImageLimits(max_bytes=len(data), max_pixels=pixels))
    return upright(as_rgb(opened.picture()), opened.turn).size


if __name__ == "__main__":
    main()
