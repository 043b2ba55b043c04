"""Sealed datasets of small clips, made without a crawl."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ingest.dataset.commit import commit
from ingest.dataset.seal import seal
from ingest.dataset.shard import ShardWriter
from ingest.image.check import Checked
from ingest.store.open import open_store
from tests.clips import clip_bytes

# Small sizes: a clip takes 5 ms.
SMALL: dict[str, Any] = {
    "clip": {"frames": 4, "fps": 8, "size": 16},
    "audio": {"rate": 8000, "seconds": 0.5, "window": 128, "hop": 80, "bins": 33},
}


def seal_clips(folder: Path, units: Sequence[Sequence[bytes]], *, labels: Sequence[str] = ("a", "b")) -> Path:
    """A dataset of some files, mp4 if nothing else is known of them; labels in turn."""
    store = open_store(folder)
    store.prepare()
    for unit, files in enumerate(units):
        with ShardWriter(store, unit) as writer:
            for number, data in enumerate(files):
                digest = hashlib.sha256(data).hexdigest()
                verdict = Checked(
                    status="kept", format="mp4", width=64, height=48, sha256=digest, phash=number
                )
                url = f"https://example.org/{unit}/{number}.mp4"
                writer.add(verdict, data, url=url, labels=[labels[number % len(labels)]])
            commit(store, writer.publish(generation=0, fingerprint="f" * 64))
    seal(store, dict.fromkeys(range(len(units)), "f" * 64))
    return folder


def small_units(counts: Sequence[int]) -> list[list[bytes]]:
    """So many clips in each unit, all of them different."""
    starts = [sum(counts[:unit]) for unit in range(len(counts))]
    return [
        [clip_bytes(start + number, seconds=1.0, size=(32, 24), rate=8000) for number in range(count)]
        for start, count in zip(starts, counts, strict=True)
    ]
