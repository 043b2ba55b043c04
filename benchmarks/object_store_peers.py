"""LitData's and MosaicML's loaders, for object_store_training.py, run by an interpreter that has them.

    python benchmarks/object_store_peers.py litdata|mosaicml DATASET FOLDER

writes the images of a sealed dataset, byte for byte, into FOLDER in that loader's own format, 1,000 a file
as there. Apart from this size, shuffling and what both need to know where things lie, their settings are
their own.
"""

import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FILE_ROWS = 1_000
Cut = Callable[[dict[str, Any]], np.ndarray]


def images_of(shard: str) -> Iterator[bytes]:
    """The encoded images of one tar."""
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith((".jpg", ".png")):
                file = tar.extractfile(member)
                assert file is not None
                yield file.read()


def convert(what: str, dataset: Path, folder: Path) -> None:
    """Write the dataset in the format of `what`."""
    shards = sorted(str(path) for path in (dataset / "shards").rglob("*.tar"))
    if what == "litdata":
        from litdata import optimize

        optimize(images_of, shards, str(folder), chunk_size=FILE_ROWS, num_workers=1, verbose=False)
        return
    from streaming import MDSWriter

    images = [image for shard in shards for image in images_of(shard)]
    size = sum(map(len, images)) * FILE_ROWS // len(images)
    with MDSWriter(out=str(folder), columns={"jpg": "bytes"}, size_limit=size) as writer:
        for image in images:
            writer.write({"jpg": image})


def litdata(url: str, cut: Cut, batch: int, epochs: int, workers: int) -> Iterator[int]:
    """Batches of LitData, as their sizes."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # there is no setting for it
    dataset = StreamingDataset(
        url,
        cache_dir=tempfile.mkdtemp(),
        shuffle=True,
        transform=lambda image: cut({"jpg": bytes(image)}),  # a memoryview
        storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
    )
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    return (len(images) for _ in range(epochs) for images in loader)


def mosaicml(url: str, cut: Cut, batch: int, epochs: int, workers: int) -> Iterator[int]:
    """Batches of MosaicML's streaming, as their sizes."""
    from streaming import StreamingDataLoader, StreamingDataset

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            return cut(super().__getitem__(at))

    dataset = Images(remote=url, local=tempfile.mkdtemp(), shuffle=True, batch_size=batch)
    for stream in dataset.streams:
        # The connection that fetched the index: workers that inherit it take each other's answers for theirs.
        stream._downloader.clean_up()
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    return (len(images) for _ in range(epochs) for images in loader)


PEERS = {"litdata": litdata, "mosaicml": mosaicml}

if __name__ == "__main__":
    convert(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
