"""Names on disk: where each part of a dataset lies, as paths relative to the dataset's folder or URL.

plan/{g}/plan.json                           names the list of frozen units of generation g
plan/{g}/units-{sha16}.parquet
plan/.listed.json                            may be there: which sources need not be listed again
shards/{unit%4096:03x}/{unit:08d}-{sha8}.tar
meta/{unit%4096:03x}/{unit:08d}-{sha8}.parquet
commits/{unit:08d}.json
counts/{unit%4096:03x}/{unit:08d}-{sha8}.counts, which may be there, by the sha256 of the metadata
sealed/{root}.json, {root}.parquet, {root}.labels.parquet
DATASET.json                                 names the latest sealed root
views/{name}.parquet, {name}.duplicates.parquet
waiting/{unit:08d}-{random16}.results        of units that are not committed yet
"""

DATASET = "DATASET.json"
COMMITS = "commits"
SHARDS = "shards"
META = "meta"
COUNTS = "counts"
SEALED = "sealed"
VIEWS = "views"
LISTED = "plan/.listed.json"
WAITING = "waiting"
EXTENSIONS = {
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "gif": "gif",
    "bmp": "bmp",
    "tiff": "tif",
    "avif": "avif",
    "mp4": "mp4",
    "matroska": "mkv",
    "avi": "avi",
    "ogg": "ogv",
    "mpegts": "ts",
}


def plan_name(generation: int) -> str:
    return f"plan/{generation}/plan.json"


def items_stem(generation: int) -> str:
    return f"plan/{generation}/units"


def items_name(generation: int, sha256: str) -> str:
    return f"{items_stem(generation)}-{sha256[:16]}.parquet"


def shard_stem(unit: int) -> str:
    return f"{SHARDS}/{unit % 4096:03x}/{unit:08d}"


def shard_name(unit: int, sha256: str) -> str:
    return f"{shard_stem(unit)}-{sha256[:8]}.tar"


def meta_stem(unit: int) -> str:
    return f"{META}/{unit % 4096:03x}/{unit:08d}"


def meta_name(unit: int, sha256: str) -> str:
    return f"{meta_stem(unit)}-{sha256[:8]}.parquet"


def counts_name(unit: int, meta_sha256: str) -> str:
    return f"{COUNTS}/{unit % 4096:03x}/{unit:08d}-{meta_sha256[:8]}.counts"


def commit_name(unit: int) -> str:
    return f"{COMMITS}/{unit:08d}.json"


def sealed_name(root: str, kind: str) -> str:
    return f"{SEALED}/{root}.{kind}"
