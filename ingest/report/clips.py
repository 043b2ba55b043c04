"""What a dataset's clips are like."""

from dataclasses import dataclass
from typing import Any

from ingest.report.histogram import Histogram


@dataclass(frozen=True, kw_only=True)
class ClipStats:
    """Counts of clips that are kept.

    Attributes:
        clips: how many there are; of images, and of clips without columns for it, 0, and so is all else.
        video_codecs, audio_codecs: how many have each, the most frequent first; those without a sound are not
            among the latter.
        quiet, still: those in which nothing is heard, though there is a sound, and nothing moves.
        milliseconds, gaps: lengths, and the longest times between keyframes, in ms.
    """

    clips: int
    video_codecs: dict[str, int]
    audio_codecs: dict[str, int]
    quiet: int
    still: int
    milliseconds: Histogram
    gaps: Histogram

    @property
    def without_sound(self) -> int:
        return self.clips - sum(self.audio_codecs.values())

    @property
    def hours(self) -> float:
        """Of all clips together."""
        return self.milliseconds.total / 3_600_000

    def as_json(self) -> dict[str, Any]:
        """The numbers as plain JSON values."""
        return {
            "clips": self.clips,
            "hours": round(self.hours, 3),
            "video_codecs": self.video_codecs,
            "audio_codecs": self.audio_codecs,
            "without_sound": self.without_sound,
            "quiet": self.quiet,
            "still": self.still,
            "duration_ms": self.milliseconds.summary(),
            "max_keyframe_gap_ms": self.gaps.summary(),
        }
