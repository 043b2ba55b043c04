import io
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_training import make_dataset
from torch import nn
from typer.testing import CliRunner

from cluster.errors import UserError
from ingest.cli import app as ingest
from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import open_dataset
from ingest.plan.settings import CrawlSettings
from pipeline.data.evaluation import Preprocessing, evenly_spaced, fit_image, normalise
from pipeline.transfer.extract import extract_features, write_features
from pipeline.transfer.features import Features, FeatureWriter, load_features, save_features
from pipeline.transfer.scores import shared_labels

CPU = torch.device("cpu")
VIEW = Preprocessing(image_size=16, resize=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(make_dataset(tmp_path_factory.mktemp("data")))


def flat(dataset, **values):
    return extract_features(
        nn.Flatten(), dataset, preprocessing=VIEW, **{"workers": 0, "device": CPU, **values}
    )


def test_features_are_in_dataset_order_with_keys_and_labels(dataset):
    features = flat(dataset)
    units = range(len(dataset.units))
    assert features.keys.tolist() == [int(key) for unit in units for key in dataset.unit_keys(unit)]
    labels = [dataset.vocabulary.names[code] for unit in units for code in dataset.unit_labels(unit).codes]
    assert [features.classes[index] for index in features.y] == labels
    assert features.classes == ("class0", "class1", "class2", "class3")
    assert features.x.shape == (96, 3 * 16 * 16)
    assert not features.x.is_inference()


@pytest.mark.parametrize("batch_size", [7, 96])
def test_batches_and_workers_change_nothing(dataset, batch_size):
    expected = flat(dataset)
    other = flat(dataset, batch_size=batch_size, workers=2 if batch_size == 7 else 0)
    assert torch.equal(other.x, expected.x)
    assert torch.equal(other.keys, expected.keys)
    assert torch.equal(other.y, expected.y)


def test_a_damaged_sample_is_a_sentence_that_names_it(tmp_path):
    damaged = open_dataset(make_dataset(tmp_path))
    shard = Path(damaged.shard_path(0))
    data = bytearray(shard.read_bytes())
    data[int(damaged.unit_rows(0)["offset"][1]) + 5] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(UserError, match=rf"{shard.name}:0000000000001 cannot be evaluated .*ingest verify"):
        flat(damaged)


def test_a_dataset_without_images_is_a_sentence(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "text.jpg").write_text("no image")
    crawl_shards(
        [str(tmp_path / "source")], tmp_path / "out", CrawlSettings(), workers=1, progress=lambda counts: None
    )
    with pytest.raises(UserError, match="has no image to evaluate with"):
        flat(open_dataset(tmp_path / "out"))


def test_a_trunk_is_evaluated_and_given_back_in_its_mode(dataset):
    trunk = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()).train()
    first = extract_features(trunk, dataset, preprocessing=VIEW, workers=0, device=CPU)
    assert trunk.training
    assert int(trunk[0].num_batches_tracked) == 0
    torch.testing.assert_close(first.x, flat(dataset).x, rtol=1e-4, atol=1e-4)


def test_a_limit_takes_samples_evenly(dataset):
    assert len(flat(dataset, limit=10).y) == 10
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 4).tolist() == [0, 1, 2]
    assert evenly_spaced(3, None).tolist() == [0, 1, 2]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_resizes_the_short_side_and_cuts_the_centre(interpolation):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255  # the centre square is white
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": interpolation}
    view = Preprocessing(image_size=10, resize=20, **plain)
    fitted = fit_image(Image.fromarray(pixels), view)
    assert fitted.size == (10, 10)
    assert np.asarray(fitted).min() == 255
    whole = Preprocessing(image_size=20, resize=20, **plain)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (33, 47, 3), dtype=np.uint8))
    step = picture.resize((28, 20), Image.Resampling[interpolation.upper()]).crop((4, 0, 24, 20))
    # Rounding the long side first moves the centre by less than half a pixel.
    assert np.abs(np.asarray(fit_image(picture, whole)).astype(int) - np.asarray(step)).mean() < 8
    square = picture.crop((0, 0, 33, 33))  # of one resize alone nothing is lost
    expected = np.asarray(square.resize((20, 20), Image.Resampling[interpolation.upper()]))
    assert np.array_equal(np.asarray(fit_image(square, whole)), expected)


def test_normalise_is_the_textbooks():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = (images / 255 - torch.tensor(VIEW.mean).view(3, 1, 1)) / torch.tensor(VIEW.std).view(3, 1, 1)
    torch.testing.assert_close(normalise(images, VIEW, CPU), expected, rtol=1e-5, atol=1e-5)


def test_saved_features_come_back(dataset, tmp_path):
    features = flat(dataset)
    save_features(features, tmp_path / "f.safetensors")
    again = load_features(tmp_path / "f.safetensors")
    assert torch.equal(again.x, features.x)
    assert torch.equal(again.y, features.y)
    assert torch.equal(again.keys, features.keys)
    assert again.classes == features.classes


def written(dataset, path, **values):
    return write_features(
        nn.Flatten(),
        dataset,
        path,
        dim=3 * 16 * 16,
        preprocessing=VIEW,
        **{"workers": 0, "device": CPU, "batch_size": 7, **values},
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_file_has_the_same_bytes_however_many_ranks_fill_it(dataset, tmp_path, precision):
    written(dataset, tmp_path / "one", precision=precision)
    for rank in (2, 0, 1):
        assert written(dataset, tmp_path / "three", precision=precision, rank=rank, ranks=3)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "three").read_bytes()
    here, there = flat(dataset), load_features(tmp_path / "one")
    assert torch.equal(there.x, here.x.to(there.x.dtype))
    assert there.x.element_size() == (4 if precision == "fp32" else 2)
    for name, tensor in load_file(tmp_path / "one").items():  # it is a file for others, too
        assert torch.equal(tensor, getattr(there, name))
    assert torch.equal(there.keys, here.keys) and torch.equal(there.y, here.y)
    assert there.classes == here.classes


def test_more_ranks_than_batches_and_one_that_is_to_stop(dataset, tmp_path):
    for rank in range(3):
        assert written(dataset, tmp_path / "f", batch_size=96, rank=rank, ranks=3)
    assert torch.equal(load_features(tmp_path / "f").x, flat(dataset).x)
    assert not written(dataset, tmp_path / "g", stop=lambda: True)


def test_features_too_large_for_fp16_are_a_sentence(tmp_path):
    y = torch.tensor([0])
    values = {"y": y, "keys": y, "classes": ["a"], "dim": 2, "precision": "fp16"}
    with FeatureWriter(tmp_path / "f", **values) as file:
        file.write(0, torch.tensor([[65504.0, torch.inf]]))
        with pytest.raises(UserError, match=r"features up to 6.6e\+04 do not fit into fp16.*bf16 or fp32"):
            file.write(0, torch.tensor([[1.0, -66000.0]]))


def test_a_file_cut_short_or_of_something_else_is_a_sentence(dataset, tmp_path):
    path = tmp_path / "f"
    written(dataset, path, precision="bf16")
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    foreign = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, foreign)
    wrong = [
        whole[:cut] for cut in (0, 4, 8, header // 2, header, header + 9, len(whole) // 2, len(whole) - 1)
    ]
    wrong += [whole + b"x", foreign.getvalue(), b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"]
    wrong += [
        whole.replace(*change, 1) for change in ((b"[96,", b"[95,"), (b"I64", b"F32"), (b'"3":', b'"9":'))
    ]
    wrong += [whole[:header] + (4).to_bytes(8, "little") + whole[header + 8 :]]  # there are four classes
    for data in wrong:
        assert data != whole
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"holds no features .*: remove it and submit the graph again"):
            load_features(path)
    path.unlink()
    with pytest.raises(UserError, match="holds no features"):
        load_features(path)


def test_a_dataset_without_labels_is_a_clear_error(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "in" / "a.png")
    crawl_shards(
        [str(tmp_path / "in")], tmp_path / "out", CrawlSettings(), workers=1, progress=lambda counts: None
    )
    with pytest.raises(UserError, match=r"sample 0000000000000 .* has no label, .* --labels-from"):
        flat(open_dataset(tmp_path / "out"))


def test_several_labels_of_an_image_are_refused_and_the_remedy_works(tmp_path):
    for number in range(3):
        path = tmp_path / "in" / ("cat" if number else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(path)
    (tmp_path / "l.csv").write_text('key,labels\n0,dog\n1,cat\n2,"cat,dog"\n')
    crawl_shards(
        [str(tmp_path / "in")],
        tmp_path / "out",
        CrawlSettings(),
        workers=1,
        progress=lambda counts: None,
        labels=[str(tmp_path / "l.csv")],
    )
    with pytest.raises(UserError, match=r"has 2 labels \(cat, dog\), .* knows one per image") as told:
        flat(open_dataset(tmp_path / "out"))
    words = shlex.split(str(told.value).split("`")[1])
    assert CliRunner().invoke(ingest(), words[1:]).exit_code == 0
    features = flat(open_dataset(tmp_path / "out", view=words[words.index("--name") + 1]))
    assert [features.classes[index] for index in features.y] == ["cat", "dog"]


def test_one_label_or_none_is_a_clear_error():
    def features(labels):
        names = tuple(sorted(set(labels)))
        y = torch.tensor([names.index(label) for label in labels], dtype=torch.int64)
        return Features(x=torch.zeros(len(labels), 2), y=y, keys=y, classes=names)

    with pytest.raises(UserError, match="at least two labels"):
        shared_labels(features(["a", "a"]), features(["a"]))
    with pytest.raises(UserError, match="is empty"):
        shared_labels(features(["a", "b"]), features([]))
