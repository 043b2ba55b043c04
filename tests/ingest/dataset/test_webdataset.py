"""A sealed dataset as a pipeline of the webdataset library, in the hands of code that knows nothing of it."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ingest.dataset
from cluster.errors import UserError
from ingest.crawl.index import index_tars
from ingest.dataset import webdataset_pipeline
from ingest.dataset.open import open_dataset
from ingest.dataset.view import write_view
from ingest.image.check import Treatment
from ingest.plan.settings import CrawlSettings

QUIET = {"workers": 1, "progress": lambda counts: None}


@pytest.fixture(scope="module")
def data(tmp_path_factory, crawl):
    """24 pictures in 6 units: dark ones of `night` and bright ones of `day`, each with a caption."""
    folder = tmp_path_factory.mktemp("wds")
    random = np.random.default_rng(0)
    for number in range(24):
        name, low = ("night", 0) if number % 2 else ("day", 128)
        path = folder / "source" / name / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(low, low + 128, (16, 16, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"picture {number}")
    crawl([folder / "source"], folder / "out", unit_rows=4, treatment=Treatment(phash=False))
    return folder / "out"


def test_an_unrelated_loop_of_pytorch_trains_on_it(data):
    samples = (
        ingest.dataset.webdataset(data, shardshuffle=6, seed=0)
        .shuffle(100)
        .decode("torchrgb")
        .to_tuple("png", "cls")
        .batched(8)
    )
    loader = torch.utils.data.DataLoader(samples, batch_size=None, num_workers=2, persistent_workers=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(8):
        for images, classes in loader:
            loss = nn.functional.cross_entropy(model(images), torch.as_tensor(classes))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    correct = [int(model(images).argmax(1).eq(torch.as_tensor(classes)).sum()) for images, classes in loader]
    assert sum(correct) == 24


def test_samples_are_those_of_the_dataset_with_their_columns(data):
    opened = open_dataset(data)
    samples = list(ingest.dataset.webdataset(data, columns=("caption", "labels", "url", "width", "sha256")))
    keys = [key for unit in range(len(opened.units)) for key in opened.unit_keys(unit).tolist()]
    assert [int(sample["__key__"]) for sample in samples] == keys
    for sample in samples:
        said = json.loads(sample["json"])
        assert opened.vocabulary.names[int(sample["cls"])] == said["labels"][0] == said["url"].split("/")[1]
        assert sample["txt"].decode() == said["caption"] == f"picture {int(said['url'][-6:-4])}"
        assert (said["width"], len(said["sha256"])) == (16, 64)
        assert Image.open(io.BytesIO(sample["png"])).size == (16, 16)
        assert sample["__url__"].endswith(".tar")
    assert set(next(iter(ingest.dataset.webdataset(data, columns=())))) == {
        "__key__",
        "__url__",
        "json",
        "png",
    }


def test_a_view_has_its_samples_only(data):
    root = open_dataset(data).root
    keeps = {unit: np.array([False, True, False, unit == 3]) for unit in range(5)}
    write_view(data, "some", root=root, keeps=keeps)
    keys = [sample["__key__"] for sample in ingest.dataset.webdataset(data, view="some")]
    assert [int(key) for key in keys] == [1, 100_001, 200_001, 300_001, 300_003, 400_001]


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 1), (2, 2)])
def test_nodes_and_workers_share_the_shards(data, monkeypatch, world, workers):
    seen = []
    for rank in range(world):
        for worker in range(workers):
            for name, value in (
                ("RANK", rank),
                ("WORLD_SIZE", world),
                ("WORKER", worker),
                ("NUM_WORKERS", workers),
            ):
                monkeypatch.setenv(name, str(value))
            pipeline = pickle.loads(pickle.dumps(ingest.dataset.webdataset(data)))  # noqa: S301 -- as spawn does
            seen += [sample["__key__"] for sample in pipeline]
    assert len(seen) == len(set(seen)) == 24


def test_shards_are_shuffled_anew_in_each_epoch_and_by_a_seed_alike(data):
    def epochs(seed):
        pipeline = ingest.dataset.webdataset(data, shardshuffle=6, seed=seed)
        return [[sample["__key__"] for sample in pipeline] for _ in range(2)]

    first, second = epochs(7)
    assert first != second
    assert sorted(first) == sorted(second)
    assert [first, second] == epochs(7)
    assert epochs(None)[0] != sorted(first) or epochs(None)[0] != sorted(first)


def test_tars_of_others_give_the_images_that_were_kept(data, tmp_path):
    tars = sorted(map(str, data.glob("shards/*/*.tar")))
    index_tars(tars, tmp_path / "out", CrawlSettings(unit_rows=3), **QUIET)
    images = [sample["png"] for sample in ingest.dataset.webdataset(tmp_path / "out")]
    assert sorted(images) == sorted(sample["png"] for sample in ingest.dataset.webdataset(data))


@pytest.mark.parametrize(("gap", "largest"), [(0, 1 << 20), (1 << 20, 3_000), (1 << 20, 1 << 20)])
def test_however_many_neighbours_are_read_at_once(data, monkeypatch, gap, largest):
    expected = [sample["png"] for sample in ingest.dataset.webdataset(data)]
    monkeypatch.setattr(webdataset_pipeline, "_LARGEST_GAP", gap)
    monkeypatch.setattr(webdataset_pipeline, "_LARGEST_READ", largest)
    assert [sample["png"] for sample in ingest.dataset.webdataset(data)] == expected


def test_on_s3_it_is_the_same(data, bucket, crawl):
    crawl([data.parent / "source"], f"{bucket}/set", unit_rows=4, treatment=Treatment(phash=False))
    here, there = (
        [{**sample, "__url__": ""} for sample in ingest.dataset.webdataset(path)]
        for path in (data, f"{bucket}/set")
    )
    assert here == there


def test_mistakes_and_damage_are_sentences(data, tmp_path, crawl):
    with pytest.raises(UserError, match=r"has no column colour: it has .*caption"):
        ingest.dataset.webdataset(data, columns=("colour",))
    with pytest.raises(UserError, match=r"a list of names: give \['caption'\]"):
        ingest.dataset.webdataset(data, columns="caption")
    with pytest.raises(UserError, match="has no view named other"):
        ingest.dataset.webdataset(data, view="other")
    crawl([data.parent / "source" / "day"], tmp_path / "out", treatment=Treatment(phash=False))
    shard = next((tmp_path / "out").glob("shards/*/*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged at byte 512: restore it"):
        list(ingest.dataset.webdataset(tmp_path / "out"))
    shard.unlink()
    with pytest.raises(UserError, match="is missing: restore it"):
        list(ingest.dataset.webdataset(tmp_path / "out"))
