"""What the report shows of the prototypes of a SwAV run, against everything done one by one in NumPy."""

from collections import Counter

import numpy as np
import pytest
import torch
from tiny_training import make_dataset, make_recipe

from ingest.dataset.open import open_dataset
from ingest.dataset.view import PackedKeeps, write_view
from pipeline.checkpoint.files import latest, read_tensors
from pipeline.methods.build import assemble_method
from pipeline.report.gallery import Samples, data_uri
from pipeline.report.prototypes import load_newest, prototype_gallery
from pipeline.train.loop import pretrain
from pipeline.trunks.export import export_trunk
from pipeline.trunks.files import load_trunk

CPU = torch.device("cpu")
PROTOTYPES = 48


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def recipe(data):
    return make_recipe(data, method__prototypes=PROTOTYPES, optim__lr=0.02, run__checkpoint_every_steps=None)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pretrain(recipe, folder)
    return folder


def labels_of(data):
    dataset = open_dataset(data)
    names = dataset.vocabulary.names
    return {
        int(key): names[label]
        for index in range(len(dataset.units))
        for key, label in zip(dataset.unit_keys(index), dataset.unit_labels(index).codes, strict=True)
    }  # in dataset order


def gallery_of(run, recipe, labels=None, **values):
    sizes = {"rows": 3, "images": 4, "sample": 5_000, "seed": 0}
    samples = Samples(open_dataset(recipe.data.root))
    found = prototype_gallery(run, recipe, samples, labels or {}, device=CPU, **{**sizes, **values})
    samples.close()
    return found


@pytest.fixture(scope="module")
def cosines(run, data, tmp_path_factory):
    """Sample key → cosines with the prototypes: the exported trunk, and the head by hand."""
    folder = tmp_path_factory.mktemp("trunk")
    export_trunk(run, folder)
    trunk, samples = load_trunk(folder), Samples(open_dataset(data))
    t = {name: value.double().numpy() for name, value in read_tensors(latest(run), prefix="").items()}
    found = {}
    for key in labels_of(data):
        with torch.inference_mode():
            x = trunk(trunk.preprocess(samples.image(key))[None])[0].double().numpy()
        x = t["head.layers.0.weight"] @ x + t["head.layers.0.bias"]
        x = (x - t["head.layers.1.running_mean"]) / np.sqrt(t["head.layers.1.running_var"] + 1e-5)
        x = np.maximum(x * t["head.layers.1.weight"] + t["head.layers.1.bias"], 0)
        x = t["head.layers.3.weight"] @ x + t["head.layers.3.bias"]
        found[key] = t["prototypes.weight"] @ (x / np.linalg.norm(x))
    samples.close()
    return found


@pytest.mark.slow
def test_the_rows_are_the_strongest_prototypes_and_their_nearest_images(run, recipe, data, cosines):
    labels = labels_of(data)
    gallery = gallery_of(run, recipe, labels)
    nearest = {key: int(values.argmax()) for key, values in cosines.items()}
    counts = Counter(nearest.values())
    assert (gallery.sample, gallery.images, gallery.prototypes) == (96, 96, PROTOTYPES)
    assert gallery.used == len(counts)
    assert 3 < len(counts) < PROTOTYPES  # else the test would show little
    assert [row.share for row in gallery.rows] == [count / 96 for _, count in counts.most_common(3)]
    samples = Samples(open_dataset(data))
    for row in gallery.rows:
        own = [key for key in labels if nearest[key] == row.prototype]
        assert row.share == len(own) / 96
        commonest = Counter(labels[key] for key in own).most_common(1)[0]
        assert (row.commonest.label, row.commonest.share) == (commonest[0], commonest[1] / len(own))
        best = sorted(own, key=lambda key: -cosines[key][row.prototype])[:4]
        assert [member.picture for member in row.members] == [data_uri(samples.image(key)) for key in best]
        assert [member.label for member in row.members] == [labels[key] for key in best]
        expected = [cosines[key][row.prototype] for key in best]
        assert [member.cosine for member in row.members] == pytest.approx(expected, abs=1e-5)
    samples.close()


@pytest.mark.slow
def test_rows_end_with_the_prototypes_that_have_an_image_and_with_their_images(run, recipe, cosines):
    gallery = gallery_of(run, recipe, rows=1000, images=1000)
    assert len(gallery.rows) == gallery.used
    assert sum(row.share for row in gallery.rows) == pytest.approx(1)
    assert sum(len(row.members) for row in gallery.rows) == 96
    assert gallery.commonest is None
    assert all(row.commonest is None for row in gallery.rows)


def test_the_trunk_has_the_features_of_the_exported_one(run, recipe, tmp_path):
    export_trunk(run, tmp_path)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        method = assemble_method(recipe, total_steps=1, group=None)
    load_newest(method, run)
    with torch.inference_mode():
        assert torch.equal(method.trunk(images), load_trunk(tmp_path)(images))


def test_a_sample_is_drawn_by_the_seed_and_within_the_runs_view(run, recipe, data, cosines):
    def shown(recipe=recipe, **values):
        found = gallery_of(run, recipe, labels_of(data), rows=1000, images=1000, **values)
        return found, sorted(member.picture for row in found.rows for member in row.members)

    first, pictures = shown(sample=20)
    assert (first.sample, first.images, len(pictures)) == (20, 96, 20)
    assert shown(sample=20)[1] == pictures
    assert shown(sample=20, seed=1)[1] != pictures

    dataset, keeps = open_dataset(data), PackedKeeps()
    for index, unit in enumerate(dataset.units.tolist()):
        keeps.add(unit, dataset.unit_labels(index).codes == dataset.vocabulary.names.index("class1"))
    write_view(data, "one", root=dataset.root, keeps=keeps)
    viewed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"view": "one"})})
    found, _ = shown(recipe=viewed)
    assert (found.sample, found.images, found.commonest.share) == (24, 24, 1.0)


def test_a_method_without_prototypes_has_no_gallery(data, tmp_path):
    method = {"name": "simsiam", "projector": [8], "predictor": 4}
    recipe = make_recipe(data, method=method, data__crops=[{"count": 2, "size": 16, "scale": [0.3, 1.0]}])
    assert gallery_of(tmp_path, recipe) is None  # nothing is read of the run
