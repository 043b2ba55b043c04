"""A process that checks clips sent to it: `python -m ingest.video.check_worker MEMORY`.

As `ingest.image.check_worker`, which says how it is bounded and fenced in.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ingest.image.check import Checked
from ingest.image.check_worker import serve
from ingest.image.decode import ImageLimits
from ingest.image.phash import perceptual_hash
from ingest.video.check import VideoTreatment, check
from ingest.video.segments import Span


def main() -> None:
    serve(_clip_check)


def _clip_check(order: dict[str, Any]) -> Callable[[bytes, Any], Checked]:
    limits = ImageLimits(**order["treatment"]["limits"])
    treatment = VideoTreatment(**order["video"])
    # What libraries set up once is not the first clip's.
    perceptual_hash(Image.fromarray(np.zeros((64, 1024), np.uint8)))

    return lambda data, span: check(data, treatment, limits, None if span is None else Span(*span))


if __name__ == "__main__":
    main()
