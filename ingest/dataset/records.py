"""What a dataset's JSON files say, typed, and the one place where their bytes become values.

A record is written in one spelling (`canonical_json`), read back with the keys that later versions added, and
written again with the same bytes.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, StringConstraints

from cluster.typed_json import parse_record

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def canonical_json(value: Any) -> bytes:
    """JSON with one spelling, for hashing and for publishing."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


class Record(BaseModel):
    """A JSON object on disk. Keys that it does not know are kept; a value of another type is damage."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    @classmethod
    def read(cls, data: bytes, *, where: Path | str, remedy: str) -> Self:
        """The record in these bytes.

        Args:
            data: all of the file.
            where: its path or URL, for the error.
            remedy: what to do about a damaged one, for the error.

        Raises:
            UserError: it is damaged.
        """
        return parse_record(cls, data, where=str(where), remedy=remedy)

    def plain(self) -> dict[str, Any]:
        """The keys that it was read or made with, as plain JSON values."""
        return self.model_dump(exclude_unset=True, by_alias=True)

    def to_bytes(self) -> bytes:
        """The whole file."""
        return canonical_json(self.plain())


class FileRecord(Record):
    """A published file: its name in the dataset, size in bytes, and sha256 (hex)."""

    name: str
    bytes: int
    sha256: Sha256


class CommitRecord(Record):
    """What became of a unit.

    Attributes:
        unit, generation: its number, and that of the plan.
        fingerprint: of the plan.
        rows: its attempts, those of `kept`, `rejected` and `failed` together.
        bytes: of the images that are kept.
        rejected, failed: how many, by reason.
        shard, meta: its tar and its Parquet.
    """

    unit: int
    generation: int
    fingerprint: str
    rows: int
    bytes: int
    kept: int
    rejected: dict[str, int]
    failed: dict[str, int]
    shard: FileRecord
    meta: FileRecord


class SealedHead(Record):
    """What was sealed as a root: the sums of its units' commits, and the sha256 of the list of them."""

    format: int
    root: str
    generations: tuple[int, ...]
    fingerprints: tuple[str, ...]
    units: int
    planned: int
    kept: int
    rejected: dict[str, int]
    failed: dict[str, int]
    bytes: int
    units_sha256: str


class Pointer(Record):
    """DATASET.json: the latest sealed root, hex."""

    format: int
    sealed: Sha256
