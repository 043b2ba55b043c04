"""A trunk is given pictures of any kind and size, many at once, and shown what evaluations show it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cluster.errors import UserError
from pipeline.data.evaluation import Preprocessing
from pipeline.models.classifier import Classifier, LinearHead
from pipeline.models.trunk import build_trunk
from pipeline.recipe.trunk import Architecture
from pipeline.trunks.classifier import ClassifierSpec, ExportedClassifier
from pipeline.trunks.files import ExportedTrunk, Pixels, TrunkSpec
from pipeline.trunks.inputs import Source

VIEW = Preprocessing(image_size=4, resize=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
SPEC = TrunkSpec(architecture=Pixels(name="pixels"), preprocessing=VIEW, feature_dim=48)
PIXELS = np.random.default_rng(0).integers(0, 255, (9, 13, 3), np.uint8)


@pytest.fixture
def trunk() -> ExportedTrunk:
    return ExportedTrunk(nn.Flatten(), SPEC).eval()


def kinds(folder: Path) -> dict[str, Source]:
    """One picture in every shape that it may have."""
    file = folder / "picture.png"
    Image.fromarray(PIXELS).save(file)
    opaque = np.dstack([PIXELS, np.full((9, 13), 255, np.uint8)])
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    return {
        "image": Image.fromarray(PIXELS),
        "opened": Image.open(file),
        "array": PIXELS,
        "array with alpha": opaque,
        "floats": PIXELS / 255,
        "tensor": tensor,
        "float tensor": tensor / 255,
        "bytes": file.read_bytes(),
        "path": file,
        "name": str(file),
    }


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_one_picture_has_the_same_features_however_it_comes(
    trunk: ExportedTrunk, tmp_path: Path, batch_size: int
) -> None:
    expected = trunk(trunk.preprocess(Image.fromarray(PIXELS))[None])
    features = trunk.features(kinds(tmp_path).values(), batch_size=batch_size)
    assert features.shape == (10, 48) and features.dtype == torch.float32
    assert all(torch.equal(each, expected[0]) for each in features)


def test_pictures_of_any_size_come_from_a_generator_in_their_order(trunk: ExportedTrunk) -> None:
    def pictures() -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
        for size in range(4, 40):
            yield np.full((size, 2 * size), 5 * size, np.uint8)  # grey

    features = trunk.features(pictures(), batch_size=7)
    assert features.shape == (36, 48)
    expected = (torch.arange(4, 40) * 5 / 255 - 0.5) / 0.2
    torch.testing.assert_close(features[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert trunk.features([]).shape == (0, 48)
    batch = torch.from_numpy(np.stack([PIXELS] * 2)).permute(0, 3, 1, 2)
    assert trunk.features(batch).shape == (2, 48)


def test_no_gradient_is_kept_and_the_mode_comes_back() -> None:
    norm = nn.BatchNorm2d(3)
    trunk = ExportedTrunk(nn.Sequential(norm, nn.Flatten()), SPEC).train()
    features = trunk.features([PIXELS])
    assert not features.requires_grad and not features.is_inference()
    assert trunk.training and int(norm.num_batches_tracked or 0) == 0


@pytest.mark.parametrize(
    ("source", "error", "told"),
    [
        ("nowhere.jpg", UserError, "nowhere.jpg cannot be read: No such file"),
        (b"no picture", UserError, "the bytes given holds no picture that can be shown"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, r"of shape \(2, 4, 4, 3\) are no picture"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"of shape \(3, 8, 8\) are no picture"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, r"of shape \(0, 8, 3\) are no picture"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError, r"of shape \(8, 8, 3\) are no picture"),
        (torch.randn(3, 8, 8), ValueError, "and these are torch.float32: what is normalised already"),
        (np.zeros((8, 8), np.uint16), ValueError, "and these are torch.uint16"),
        (7, TypeError, "the int given is no picture"),
    ],
)
def test_what_is_no_picture_is_said(
    trunk: ExportedTrunk, source: Source, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        trunk.features([source])


@pytest.mark.parametrize("kind", ["image", "array", "tensor", "bytes", "path", "name"])
def test_one_picture_is_not_taken_for_many(trunk: ExportedTrunk, tmp_path: Path, kind: str) -> None:
    with pytest.raises(TypeError, match="give a list"):
        trunk.features(kinds(tmp_path)[kind])  # type: ignore[arg-type]


def test_a_classifier_takes_the_same(tmp_path: Path) -> None:
    section = Architecture.model_validate({"name": "resnet18", "stem": "low_resolution"})
    network = build_trunk(section)
    spec = ClassifierSpec(architecture=section, preprocessing=VIEW, feature_dim=512, classes=("a", "b", "c"))
    classifier = ExportedClassifier(Classifier(network, LinearHead(512, 3)), spec).eval()
    logits = classifier.logits(kinds(tmp_path).values(), batch_size=4)
    assert logits.shape == (10, 3)
    expected = classifier(classifier.preprocess(PIXELS)[None])[0]
    torch.testing.assert_close(logits, expected.expand(10, 3), rtol=1e-4, atol=1e-5)
