import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_training import SHALLOW, make_dataset, make_recipe
from torch import nn
from typer.testing import CliRunner

from cluster.errors import UserError
from cluster.typed_yaml import load_recipe
from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import open_dataset
from ingest.image.decode import decode
from ingest.plan.settings import CrawlSettings
from pipeline.checkpoint.files import latest, read_tensors
from pipeline.cli import app
from pipeline.data.evaluation import (
    Preprocessing,
    evaluation_preprocessing,
    evenly_spaced,
    fit_image,
    image_batches,
    normalise,
)
from pipeline.models.trunk import build_trunk
from pipeline.parallel.initialize import initialize
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.trunk import Architecture
from pipeline.train.loop import pretrain
from pipeline.trunks.baselines import calibrate_batchnorm, pixels_trunk, random_trunk
from pipeline.trunks.export import export_trunk
from pipeline.trunks.files import TrunkSpec, load_trunk, save_trunk

CPU = torch.device("cpu")
TINY = Architecture.model_validate(SHALLOW)
VIEW = Preprocessing(image_size=16, resize=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pretrain(make_recipe(data, train={"steps": 2}), folder)
    return folder


def spec_of(network, **values):
    return TrunkSpec(architecture=TINY, preprocessing=VIEW, feature_dim=network.feature_dim, **values)


def tiny(seed=0):
    network = build_trunk(TINY)
    initialize(network, seed=seed)
    return network.eval()


def test_a_saved_trunk_comes_back_with_equal_features(tmp_path):
    network = tiny()
    save_trunk(network, spec_of(network, provenance={"data": "abc"}), tmp_path)
    trunk = load_trunk(tmp_path)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(trunk(images), network(images))
    assert not trunk.training
    assert trunk.feature_dim == network.feature_dim
    assert trunk.spec.provenance == {"data": "abc"}


def test_one_image_is_preprocessed_as_the_description_says(tmp_path):
    network = tiny()
    save_trunk(network, spec_of(network), tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    trunk = load_trunk(tmp_path)
    expected = (np.asarray(image) / 255 - VIEW.mean) / VIEW.std
    torch.testing.assert_close(
        trunk.preprocess(image).permute(1, 2, 0).double(), torch.tensor(expected), rtol=1e-5, atol=1e-5
    )
    assert trunk.preprocess(Image.new("L", (70, 40))).shape == (3, 16, 16)


def test_export_takes_the_newest_checkpoint_and_tells_where_it_comes_from(run, data, tmp_path):
    spec = export_trunk(run, tmp_path)
    saved = read_tensors(latest(run), prefix="trunk.")
    written = load_file(tmp_path / "trunk.safetensors")
    assert saved.keys() == written.keys() - {"stem.is_low_resolution"}
    assert all(torch.equal(saved[name], written[name]) for name in saved)
    assert spec.provenance["data"] == open_dataset(data).root
    assert spec.provenance["steps"] == 2
    assert spec.provenance["metrics"]["step"] == 2
    assert PretrainRecipe.model_validate(spec.provenance["recipe"]).trunk == TINY
    card = (tmp_path / "README.md").read_text()
    for phrase in (
        open_dataset(data).root,
        "swav",
        "| steps | 2 |",
        "licences of the training images",
        "```yaml",
    ):
        assert phrase in card
    assert "| network |" not in card  # there is no teacher to tell it from
    assert load_trunk(tmp_path).spec == spec
    chosen = export_trunk(run / "checkpoints" / "step-00000002", tmp_path / "chosen")
    assert chosen == spec


def test_no_checkpoint_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        export_trunk(tmp_path, tmp_path / "out")


def test_S1_nothing_but_safetensors_with_exactly_the_right_names_is_loaded(tmp_path):
    network = tiny()
    save_trunk(network, spec_of(network), tmp_path)
    tensors = load_file(tmp_path / "trunk.safetensors")
    save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / "trunk.safetensors")
    with pytest.raises(UserError, match="does not hold the tensors of regnet_y"):
        load_trunk(tmp_path)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "stem" not in name},
        tmp_path / "trunk.safetensors",
    )
    with pytest.raises(UserError, match="does not hold the tensors"):
        load_trunk(tmp_path)
    torch.save(tensors, tmp_path / "trunk.safetensors")
    with pytest.raises(UserError, match="does not hold the tensors"):
        load_trunk(tmp_path)


def test_a_folder_that_is_no_trunk_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"no trunk\.json"):
        load_trunk(tmp_path)
    network = tiny()
    save_trunk(network, spec_of(network), tmp_path)
    values = json.loads((tmp_path / "trunk.json").read_text())
    (tmp_path / "trunk.json").write_text(json.dumps({**values, "format": 2}))
    with pytest.raises(UserError, match=r"trunk\.json cannot be used: format"):
        load_trunk(tmp_path)


TWO_GIGABYTES = 2 << 30
REGNET = {"depth": 4, "w_0": 16, "w_a": 12.0, "w_m": 1.5, "group_width": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": {"name": "regnety_10b"}}, "does not hold the tensors of regnety_10b"),
        ({"architecture": {"name": "regnet_y", "regnet": REGNET | {"depth": 10**9}}}, "depth"),
        ({"architecture": {"name": "regnet_y", "regnet": REGNET | {"w_0": 10**12}}}, "w_0"),
        ({"architecture": {"name": "regnet_y", "regnet": REGNET | {"w_a": 1e300}}}, "w_a"),
        ({"architecture": {"name": "regnet_y", "regnet": REGNET | {"w_m": 1 + 1e-15}}}, "w_m"),
        ({"architecture": {"name": "regnet_y", "regnet": REGNET | {"group_width": 10**12}}}, "group_width"),
        (
            {
                "architecture": {
                    "name": "regnet_y",
                    "regnet": {"depth": 256, "w_0": 16_384, "w_a": 16_384, "w_m": 2, "group_width": 8},
                }
            },
            "does not hold the tensors",
        ),
        ({"preprocessing": {**VIEW.model_dump(), "image_size": 10**6}}, "image_size"),
        ({"preprocessing": {**VIEW.model_dump(), "resize": 10**6}}, "resize"),
        ({"preprocessing": {**VIEW.model_dump(), "std": [0, 1, 1]}}, "std"),
        ({"feature_dim": 10**12}, "features, and its trunk has"),
        ({"architecture": {"name": "pixels"}, "feature_dim": 10**12}, "does not hold the tensors"),
        ({"provenance": {"what": "x" * (1 << 20)}}, "has more than"),
    ],
)
def test_S1_a_description_from_anybody_takes_no_memory(tmp_path, changes, told):
    network = tiny()
    save_trunk(network, spec_of(network), tmp_path)
    values = json.loads((tmp_path / "trunk.json").read_text())
    (tmp_path / "trunk.json").write_text(json.dumps(values | changes))
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + TWO_GIGABYTES, before[1]))
    try:
        with pytest.raises(UserError, match=told):
            load_trunk(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_saving_other_tensors_than_the_architectures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not the tensors of regnet_y"):
        save_trunk(nn.Linear(2, 2), spec_of(tiny()), tmp_path)


def test_a_random_trunk_has_the_weights_that_pretraining_starts_from(data, tmp_path):
    recipe = make_recipe(
        data, train={"steps": 1}, optim__lr=1e-30, optim__warmup_steps=0, optim__weight_decay=0.0
    )
    pretrain(recipe, tmp_path / "run")
    spec = export_trunk(tmp_path / "run", tmp_path / "trained")
    random_trunk(spec, open_dataset(data), seed=recipe.seed, out=tmp_path / "random", workers=0, device=CPU)
    trained, random = (load_trunk(tmp_path / name).network for name in ("trained", "random"))
    for (name, one), other in zip(trained.named_parameters(), random.parameters(), strict=True):
        # One step at a learning rate of 1e-30 leaves zeros a little off zero.
        assert torch.allclose(one, other, rtol=0, atol=1e-25), name
    random_trunk(spec, open_dataset(data), seed=99, out=tmp_path / "other", workers=0, device=CPU)
    other = load_trunk(tmp_path / "other").network
    assert not torch.equal(next(other.parameters()), next(random.parameters()))


def test_batchnorm_is_calibrated_by_a_cumulative_average(data):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    dataset = open_dataset(data)
    calibrate_batchnorm(network, dataset, preprocessing=VIEW, workers=0, device=CPU)
    batches = image_batches(dataset, evenly_spaced(len(dataset), None), preprocessing=VIEW, workers=0)
    images = torch.cat([normalise(batch.images, VIEW, CPU) for batch in batches])
    torch.testing.assert_close(network[0].running_mean, images.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network[0].running_var, images.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert network[0].momentum == 0.1
    assert not network.training


def test_batchnorm_is_calibrated_on_images_without_labels(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "in" / "a.png")
    crawl_shards(
        [str(tmp_path / "in")], tmp_path / "out", CrawlSettings(), workers=1, progress=lambda counts: None
    )
    norm = nn.BatchNorm2d(3)
    calibrate_batchnorm(norm, open_dataset(tmp_path / "out"), preprocessing=VIEW, workers=0, device=CPU)
    torch.testing.assert_close(norm.running_mean[0], torch.tensor((1 - 0.5) / 0.2))


def test_pixels_are_a_trunk_too(tmp_path):
    network = tiny()
    pixels_trunk(spec_of(network), size=4, out=tmp_path)
    trunk = load_trunk(tmp_path)
    image = Image.new("RGB", (40, 30), (255, 0, 0))
    features = trunk(trunk.preprocess(image)[None])
    assert features.shape == (1, trunk.feature_dim) == (1, 48)
    torch.testing.assert_close(features[0, :16], torch.full((16,), (1 - 0.5) / 0.2))
    with pytest.raises(UserError, match="no weights to draw"):
        random_trunk(trunk.spec, None, seed=0, out=tmp_path, workers=0, device=CPU)


def test_small_images_are_shown_whole_and_large_ones_as_imagenets(data):
    recipe = make_recipe(data)
    assert evaluation_preprocessing(recipe).image_size == 16
    assert evaluation_preprocessing(recipe).resize == 16
    probe = {"train": "x", "test": "y", "every_steps": 1, "image_size": 224}
    large = evaluation_preprocessing(make_recipe(data, probe=probe))
    assert (large.image_size, large.resize) == (224, 256)


BICUBIC = ("data.crops.0.interpolation=bicubic", "data.crops.1.interpolation=bicubic")


@pytest.mark.parametrize(
    ("name", "overrides", "shown"),
    [
        ("swav_resnet50", (), "bilinear"),
        ("swav_resnet50", BICUBIC[1:], "bilinear"),  # the small crops do not count
        ("swav_resnet50", BICUBIC[:1], "bicubic"),
        ("byol_resnet50", BICUBIC, "bicubic"),
        ("barlow_twins_resnet50", BICUBIC, "bilinear"),  # as its authors evaluate
        ("barlow_twins_regnety_16gf", BICUBIC, "bilinear"),
        ("barlow_twins_resnet50", ("evaluation.interpolation=bicubic",), "bicubic"),
    ],
)
def test_images_are_resized_as_the_recipe_says_or_as_its_largest_crops(name, overrides, shown):
    recipe = load_recipe(PretrainRecipe, name, list(overrides), kind="pretrain")
    assert evaluation_preprocessing(recipe).interpolation == shown


def test_an_exported_trunk_records_the_filter_and_whoever_loads_it_uses_it(run, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for chosen, filter_ in ((None, Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        words = ["export", str(run), str(tmp_path / "out"), *(["--interpolation", chosen] if chosen else [])]
        assert CliRunner().invoke(app, words).exit_code == 0
        trunk = load_trunk(tmp_path / "out")
        assert trunk.preprocessing.interpolation == (chosen or "bilinear")
        view = trunk.preprocessing
        pixels = np.asarray(image.resize((view.resize, view.resize), filter_)) / 255
        torch.testing.assert_close(
            trunk.preprocess(image).permute(1, 2, 0).double(),
            torch.tensor((pixels - view.mean) / view.std),
            rtol=1e-5,
            atol=1e-5,
        )
        assert f", {chosen or 'bilinear'}, centre crop" in (tmp_path / "out" / "README.md").read_text()
        pixels_trunk(trunk.spec, size=8, out=tmp_path / "pixels")
        assert load_trunk(tmp_path / "pixels").preprocessing.interpolation == view.interpolation
    refused = CliRunner().invoke(
        app, ["export", str(run), str(tmp_path / "out"), "--interpolation", "nearest"]
    )
    assert refused.exit_code == 2 and "'bilinear', 'bicubic'" in refused.stderr


def test_a_trunk_from_before_the_filter_was_recorded_was_shown_bicubic_images(tmp_path):
    network = tiny()
    save_trunk(network, spec_of(network), tmp_path)
    written = json.loads((tmp_path / "trunk.json").read_text())
    del written["preprocessing"]["interpolation"]
    (tmp_path / "trunk.json").write_text(json.dumps(written))
    assert load_trunk(tmp_path).preprocessing.interpolation == "bicubic"


def saved_as(pixels, path, **values):
    Image.fromarray(pixels).save(path, **values)
    return path


def turned_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("shape", [(4, 3, 10, 10), (1, 3, 1, 1), (2, 3, 5, 7), (0, 3, 8, 8)])
def test_images_are_normalised_channel_by_channel_to_the_bit_however_they_lie(shape):
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) * 255 for each in (VIEW.mean, VIEW.std))
    for images in (pixels, pixels.to(memory_format=torch.channels_last)):
        found = normalise(images, VIEW, CPU)
        assert torch.equal(found, (pixels.float() - mean) / std)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_one_image_is_shown_as_evaluations_show_it_whatever_file_it_is_from(tmp_path):
    """Transparent, turned, deep and grey pictures: what `submit knn` sees is what `preprocess` gives."""
    network = tiny()
    save_trunk(network, spec_of(network), tmp_path)
    trunk = load_trunk(tmp_path)
    rng = np.random.default_rng(3)
    colours = rng.integers(0, 255, (24, 32, 4), dtype=np.uint8)
    files = [
        saved_as(colours, tmp_path / "transparent.png"),
        saved_as(colours[..., :3], tmp_path / "turned.jpg", exif=turned_by_exif()),
        saved_as(colours[..., :3], tmp_path / "plain.webp", lossless=True),
        saved_as(rng.integers(0, 65535, (24, 32), dtype=np.uint16), tmp_path / "deep.png"),
    ]
    for file in files:
        seen = fit_image(decode(file.read_bytes()), VIEW)
        pixels = torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None]
        expected = normalise(pixels, VIEW, CPU)[0]
        image = Image.open(file)
        assert torch.equal(trunk.preprocess(image), expected), file.name
        image.load()
        assert torch.equal(trunk.preprocess(image), expected), f"{file.name}, loaded"
    in_memory = Image.fromarray(colours)
    assert torch.equal(trunk.preprocess(in_memory), trunk.preprocess(Image.open(files[0])))


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    network = tiny()
    with torch.no_grad():
        network.s1.b1.conv1.conv.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"s1\.b1\.conv1\.conv\.weight holds numbers that are not finite"):
        save_trunk(network, spec_of(network), tmp_path)


def test_a_file_has_the_mode_that_the_umask_says_and_says_which_stem_it_has(tmp_path):
    network = tiny()
    save_trunk(network, spec_of(network), tmp_path / "t")
    (tmp_path / "any").touch()
    weights = tmp_path / "t" / "trunk.safetensors"
    assert weights.stat().st_mode == (tmp_path / "any").stat().st_mode
    # timm's model has no such tensor, and refuses the file.
    assert load_file(weights).keys() - network.state_dict().keys() == {"stem.is_low_resolution"}
    assert "in place of timm's" in (tmp_path / "t" / "README.md").read_text()
    old = load_file(weights)
    del old["stem.is_low_resolution"]
    save_file(old, weights)
    load_trunk(tmp_path / "t")


def test_an_export_overwrites_no_other_files_unless_told_to(run, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "README.md").write_text("# my notes")
    words = ["export", run, notes]
    told = CliRunner().invoke(app, [str(word) for word in words], prog_name="submit")
    assert told.exit_code == 2 and "already holds README.md" in told.output
    assert (notes / "README.md").read_text() == "# my notes"
    assert CliRunner().invoke(app, [*map(str, words), "--force"], prog_name="submit").exit_code == 0
    assert CliRunner().invoke(app, [str(word) for word in words], prog_name="submit").exit_code == 0
    trunk = json.loads((notes / "trunk.json").read_text())
    trunk["provenance"]["recipe"]["seed"] = 99
    (notes / "trunk.json").write_text(json.dumps(trunk))
    told = CliRunner().invoke(app, [str(word) for word in words], prog_name="submit")
    assert told.exit_code == 2 and "holds what another run became" in told.output
    told = CliRunner().invoke(
        app, ["export", str(run), str(tmp_path / "notes" / "README.md")], prog_name="submit"
    )
    assert told.exit_code == 2 and "is a file: give a folder" in told.output
    named = ["export", run.name, tmp_path / "by-name", "--folder", run.parent]
    assert CliRunner().invoke(app, [str(word) for word in named], prog_name="submit").exit_code == 0
