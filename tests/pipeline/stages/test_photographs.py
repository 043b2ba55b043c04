import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import UserError
from cluster.typed_yaml import check_recipe
from pipeline.dag.digests import folder_identity
from pipeline.recipe.stages import PhotographsRecipe
from pipeline.stages import photographs as module
from pipeline.stages.photographs import SHIPPED, cut_tiles, identity, read_folder


def members(path):
    with tarfile.open(path) as tar:
        return [
            (member.name, Image.open(io.BytesIO(tar.extractfile(member).read())))
            for member in tar.getmembers()
        ]


def stripes(path, *, width=120, height=90, first=(200, 30, 30), second=(30, 30, 200), seed=0):
    """Noisy: one colour in the left 72 %, another in the right 27 %, green in the gap."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : int(0.71 * width)] = first
    pixels[:, int(0.71 * width) : int(0.74 * width)] = (0, 255, 0)
    pixels[:, int(0.74 * width) :] = second
    pixels = np.clip(pixels + rng.integers(-30, 30, pixels.shape[:2])[..., None], 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def small(**values):
    return PhotographsRecipe(**{"tile_size": 16, "train_tiles": 40, "test_tiles": 20, **values})


def test_the_shipped_photographs_make_tiles_of_every_label(tmp_path):
    metrics = cut_tiles(small(train_tiles=140, test_tiles=56), tmp_path)
    assert metrics == {
        "labels": len(SHIPPED),
        "pictures": len(SHIPPED),
        "skipped_files": 0,
        "train_tiles": 140,
        "test_tiles": 56,
    }
    for split, each in (("train", 10), ("test", 4)):
        labels = [name.split("/")[0] for name, _ in members(tmp_path / f"{split}.tar")]
        assert sorted(labels) == sorted(name.split(".")[0] for name in SHIPPED for _ in range(each))
        assert labels != sorted(labels)  # shuffled before anybody plans


def test_train_and_test_tiles_come_from_separate_regions_and_test_is_grey(tmp_path):
    for name in ("a", "b"):
        stripes(tmp_path / "in" / f"{name}.png")
    cut_tiles(small(images=str(tmp_path / "in")), tmp_path / "out")
    train, test = members(tmp_path / "out" / "train.tar"), members(tmp_path / "out" / "test.tar")
    assert {image.size for _, image in train + test} == {(16, 16)}
    for _, image in train:
        red, green, blue = np.asarray(image).reshape(-1, 3).astype(int).mean(0)
        assert red > 150
        assert green < 80
        assert blue < 80
    grey = (30 * 299 + 30 * 587 + 200 * 114) / 1000
    for _, image in test:
        assert image.mode == "L"
        assert abs(np.asarray(image).mean() - grey) < 25


def test_tall_photographs_are_split_along_their_height(tmp_path):
    stripes(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        for name in ("c", "d"):
            image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / f"{name}.png")
    (tmp_path / "a.png").unlink()
    cut_tiles(small(images=str(tmp_path)), tmp_path.parent / "tall")
    for _, image in members(tmp_path.parent / "tall" / "train.tar"):
        assert np.asarray(image)[..., 0].mean() > 150


def test_tiles_depend_on_the_seed_and_on_nothing_else(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        cut_tiles(small(seed=seed), tmp_path / folder)
    read = [(tmp_path / folder / "train.tar").read_bytes() for folder in "abc"]
    assert read[0] == read[1] != read[2]


def test_sub_folders_are_labels_and_whole_pictures_are_set_aside(tmp_path):
    for label, count in (("cat", 5), ("dog", 2)):
        for number in range(count):
            stripes(tmp_path / "in" / label / "deep" / f"{number}.png", seed=number)
    stripes(tmp_path / "in" / "loose.png")
    album = read_folder(tmp_path / "in", small())
    assert album.labels_are == "folder"
    assert album.skipped == {"not in a sub-folder": 1}
    splits = sorted((picture.label, picture.split) for picture in album.pictures if picture.label == "cat")
    assert splits == [("cat", "test")] + [("cat", "train")] * 4
    assert [picture.split for picture in album.pictures if picture.label == "dog"] == [None, None]
    cut_tiles(small(images=str(tmp_path / "in")), tmp_path / "out")
    description = json.loads((tmp_path / "out" / "photographs.json").read_text())
    assert description["labels"] == ["cat", "dog"]
    assert description["split_whole"] == 5


def test_one_sub_folder_is_no_label(tmp_path):
    for number in range(3):
        stripes(tmp_path / "only" / f"{number}.png")
    album = read_folder(tmp_path, small())
    assert album.labels_are == "photograph"
    assert sorted(picture.label for picture in album.pictures) == ["only_0.png", "only_1.png", "only_2.png"]


def scans():
    """A JPEG of a megapixel whose last scan comes 3,000 times."""
    file = io.BytesIO()
    Image.new("L", (1000, 1000)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[data.rindex(b"\xff\xc4", 0, last) : -2] * 3_000 + data[-2:]


def test_hostile_files_are_skipped_and_counted(tmp_path):
    for name in ("a", "b"):
        stripes(tmp_path / f"{name}.png")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    Image.new("RGB", (5, 400)).save(tmp_path / "thin.png")
    (tmp_path / "slow.jpg").write_bytes(scans())
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / ".hidden.png").write_bytes((tmp_path / "a.png").read_bytes())
    album = read_folder(tmp_path, small())
    assert sorted(picture.name for picture in album.pictures) == ["a.png", "b.png"]
    assert sum(album.skipped.values()) == 4
    assert album.skipped["too small"] == album.skipped["too_many_scans"] == 1


def test_of_many_pictures_an_even_share_of_the_labels_is_used(tmp_path):
    for label in ("a", "b", "c"):
        for number in range(20 if label == "a" else 4):
            stripes(tmp_path / label / f"{number}.png", width=60, height=50)
    album = read_folder(tmp_path, small(max_pictures=9))
    labels = [picture.label for picture in album.pictures]
    assert {label: labels.count(label) for label in "abc"} == {"a": 3, "b": 3, "c": 3}
    assert album.skipped == {"not needed: enough pictures": 19}


def test_too_little_to_tell_apart_is_a_clear_error(tmp_path):
    stripes(tmp_path / "a.png")
    with pytest.raises(UserError, match="at least two pictures"):
        cut_tiles(small(images=str(tmp_path)), tmp_path.parent / "out")
    with pytest.raises(UserError, match="is not a folder"):
        cut_tiles(small(images=str(tmp_path / "nowhere")), tmp_path.parent / "out")


def test_changed_pictures_change_the_identity(tmp_path):
    stripes(tmp_path / "a.png")
    recipe = small(images=str(tmp_path))
    before = identity(recipe)
    assert identity(recipe) == before
    stripes(tmp_path / "b.png")
    added = identity(recipe)
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    renamed = identity(recipe)
    Image.new("RGB", (30, 30)).save(tmp_path / "c.png")
    assert len({before, added, renamed, identity(recipe)}) == 4
    assert identity(small()) == identity(small(tile_size=20))


def test_flat_tiles_are_drawn_again(tmp_path, monkeypatch):
    pixels = np.full((100, 200, 3), 90, np.uint8)
    pixels[:30, ::2] = 160
    for name in ("a", "b"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    recipe = small(images=str(tmp_path), cover=(0.2, 0.2))
    cut_tiles(recipe, tmp_path.parent / "out")
    deviations = [
        np.asarray(image.convert("L")).std() for _, image in members(tmp_path.parent / "out/train.tar")
    ]
    assert np.mean([deviation > 255 * 0.03 for deviation in deviations]) > 0.95
    monkeypatch.setattr(module, "_DRAWS_FOR_CONTRAST", 1)
    cut_tiles(recipe, tmp_path.parent / "once")
    deviations = [
        np.asarray(image.convert("L")).std() for _, image in members(tmp_path.parent / "once/train.tar")
    ]
    assert np.mean([deviation > 255 * 0.03 for deviation in deviations]) < 0.8


def test_odd_folder_names_become_plain_labels(tmp_path):
    for label in ("a\\b", "ü\n2", "plain"):
        stripes(tmp_path / label / "a.png")
    cut_tiles(small(images=str(tmp_path)), tmp_path.parent / "odd")
    names = {name.split("/")[0] for name, _ in members(tmp_path.parent / "odd" / "train.tar")}
    assert names == {"a_b", "ü_2", "plain"}


def test_a_folder_that_is_not_there_has_no_identity():
    with pytest.raises(UserError, match="nowhere does not exist"):
        folder_identity(Path("nowhere"))


def test_regions_that_leave_nothing_for_testing_are_refused():
    with pytest.raises(UserError, match=r"train_share \+ gap must leave something"):
        check_recipe(PhotographsRecipe, {"train_share": 0.9, "gap": 0.2}, where="x.yaml")
