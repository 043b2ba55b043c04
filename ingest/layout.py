"""Names on disk: where each part of a dataset lies, as paths relative to the dataset's folder.

plan/{g}/plan.json, units.parquet            the frozen units of generation g
shards/{unit%4096:03x}/{unit:08d}-{sha8}.tar
meta/{unit%4096:03x}/{unit:08d}-{sha8}.parquet
commits/{unit:08d}.json
sealed/{root}.json, {root}.parquet
DATASET.json                                 names the latest sealed root
views/{name}.parquet
"""

DATASET = "DATASET.json"
KEY_SLOTS = 100_000
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif", "bmp": "bmp", "tiff": "tif"}


def plan_folder(generation: int) -> str:
    return f"plan/{generation}"


def shard_name(unit: int, sha256: str) -> str:
    return f"shards/{unit % 4096:03x}/{unit:08d}-{sha256[:8]}.tar"


def meta_name(unit: int, sha256: str) -> str:
    return f"meta/{unit % 4096:03x}/{unit:08d}-{sha256[:8]}.parquet"


def commit_name(unit: int) -> str:
    return f"commits/{unit:08d}.json"


def sealed_name(root: str, kind: str) -> str:
    return f"sealed/{root}.{kind}"


def sample_key(unit: int, slot: int) -> str:
    """The sample's name for life: the stem of its tar member. As a number, unit * 100,000 + slot."""
    return f"{unit:08d}{slot:05d}"
