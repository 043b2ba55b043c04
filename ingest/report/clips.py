"""What a dataset's clips are like, counted from their rows."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ingest.report.histogram import Histogram

COLUMNS = [
    "media",
    "video_codec",
    "audio_codec",
    "duration_ms",
    "max_keyframe_gap_ms",
    "loudness_db",
    "still",
]
# Below, nothing is heard; and from this share of pairs of frames on, nothing moves.
QUIET_DB = -60.0
STILL = 0.99


class ClipStats:
    """Counts of clips that are kept.

    Attributes:
        clips: how many there are; of images, and of clips without these columns, 0, and so is all else.
        video_codecs, audio_codecs: how many have each; those without a sound are not among the latter.
        quiet, still: those in which nothing is heard, though there is a sound, and nothing moves.
        milliseconds, gaps: lengths, and the longest times between keyframes, in ms.
    """

    def __init__(self) -> None:
        self.clips = 0
        self.video_codecs: Counter[str] = Counter()
        self.audio_codecs: Counter[str] = Counter()
        self.quiet = self.still = 0
        self.milliseconds = Histogram(cell=10)
        self.gaps = Histogram(cell=10)

    def add(self, kept: pa.Table) -> None:
        """Take account of kept rows of one unit; of one without these columns there is nothing to count."""
        if not set(COLUMNS) <= set(kept.column_names):
            return
        rows = kept.filter(pc.equal(kept["media"], "video"))
        self.clips += rows.num_rows
        for counter, name in ((self.video_codecs, "video_codec"), (self.audio_codecs, "audio_codec")):
            counts = pc.value_counts(pc.drop_null(rows[name])).to_pylist()
            counter.update({row["values"]: row["counts"] for row in counts})
        self.quiet += pc.sum(pc.less(rows["loudness_db"], QUIET_DB)).as_py() or 0
        self.still += pc.sum(pc.greater_equal(rows["still"], STILL)).as_py() or 0
        for histogram, name in ((self.milliseconds, "duration_ms"), (self.gaps, "max_keyframe_gap_ms")):
            histogram.add(pc.drop_null(rows[name]).to_numpy().astype(np.int64))

    @property
    def without_sound(self) -> int:
        return self.clips - self.audio_codecs.total()

    @property
    def hours(self) -> float:
        """Of all clips together."""
        return self.milliseconds.total / 3_600_000

    def as_json(self) -> dict[str, Any]:
        """The numbers as plain JSON values."""
        return {
            "clips": self.clips,
            "hours": round(self.hours, 3),
            "video_codecs": dict(self.video_codecs.most_common()),
            "audio_codecs": dict(self.audio_codecs.most_common()),
            "without_sound": self.without_sound,
            "quiet": self.quiet,
            "still": self.still,
            "duration_ms": self.milliseconds.summary(),
            "max_keyframe_gap_ms": self.gaps.summary(),
        }
