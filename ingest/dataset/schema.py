"""The columns of every Parquet file of a dataset."""

import pyarrow as pa

LABELS = pa.list_(pa.field("element", pa.string(), nullable=False))
VIEW_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.uint32(), nullable=False),
        pa.field("slots", pa.uint32(), nullable=False),
        pa.field("kept", pa.uint32(), nullable=False),
        pa.field("bitmap", pa.binary(), nullable=False),
    ]
)
DUPLICATES_SCHEMA = pa.schema(
    [
        pa.field("winner", pa.uint64(), nullable=False),
        pa.field("key", pa.uint64(), nullable=False),
        pa.field("distance", pa.uint8(), nullable=False),
        pa.field("exact", pa.bool_(), nullable=False),
        pa.field("evaluation", pa.uint16()),
    ]
)
ITEMS_SCHEMA = pa.schema(
    [
        pa.field("source", pa.uint32(), nullable=False),
        pa.field("path", pa.binary(), nullable=False),
        pa.field("offset", pa.uint64(), nullable=False),
        pa.field("size", pa.uint64(), nullable=False),
        pa.field("problem", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("labels", LABELS, nullable=False),
    ]
)
UNITS_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.uint32(), nullable=False),
        pa.field("generation", pa.uint32(), nullable=False),
        pa.field("rows", pa.uint32(), nullable=False),
        pa.field("kept", pa.uint32(), nullable=False),
        pa.field("rejected", pa.uint32(), nullable=False),
        pa.field("failed", pa.uint32(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("shard_bytes", pa.uint64(), nullable=False),
        pa.field("shard_sha256", pa.binary(32), nullable=False),
        pa.field("meta", pa.string(), nullable=False),
        pa.field("meta_bytes", pa.uint64(), nullable=False),
        pa.field("meta_sha256", pa.binary(32), nullable=False),
    ]
)
META_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.uint32(), nullable=False),
        pa.field("slot", pa.uint32()),
        pa.field("offset", pa.uint64()),
        pa.field("size", pa.uint64()),
        pa.field("width", pa.uint32()),
        pa.field("height", pa.uint32()),
        pa.field("original_width", pa.uint32()),
        pa.field("original_height", pa.uint32()),
        pa.field("format", pa.string()),
        pa.field("sha256", pa.binary(32)),
        pa.field("phash", pa.uint64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("retryable", pa.bool_(), nullable=False),
        pa.field("http_status", pa.uint16()),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("labels", LABELS, nullable=False),
    ]
)
# Of plans of videos: which part of one; null of a whole.
SPAN_COLUMNS = pa.schema(
    [pa.field("span_start_ms", pa.int64(), nullable=True), pa.field("span_end_ms", pa.int64(), nullable=True)]
)
# What rows of clips have besides.
VIDEO_SCHEMA = pa.schema(
    [
        pa.field("media", pa.string()),
        pa.field("video_codec", pa.string()),
        pa.field("audio_codec", pa.string()),
        pa.field("fps_num", pa.uint32()),
        pa.field("fps_den", pa.uint32()),
        pa.field("frames", pa.uint32()),
        pa.field("duration_ms", pa.uint32()),
        pa.field("video_start_ms", pa.int32()),
        pa.field("audio_start_ms", pa.int32()),
        pa.field("audio_rate", pa.uint32()),
        pa.field("audio_channels", pa.uint16()),
        pa.field("keyframes", pa.uint32()),
        pa.field("max_keyframe_gap_ms", pa.uint32()),
        pa.field("parent", pa.string()),
        pa.field("loudness_db", pa.float32()),
        pa.field("still", pa.float32()),
    ]
)
NO_COLUMNS = pa.schema([])
# Names of columns that plans and shards have of their own: no list's column is called so.
TAKEN_NAMES = frozenset({*META_SCHEMA.names, *SPAN_COLUMNS.names, "domain", "path", "problem", "source"})
