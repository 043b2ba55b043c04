"""What a recipe says of videos, and what it may not say of both videos and images."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_training import make_values

from cluster.errors import UserError
from pipeline.data.evaluation import evaluation_preprocessing
from pipeline.data.modality import modality_of
from pipeline.recipe.data import Audio, Data
from pipeline.recipe.pretrain import PretrainRecipe


def data(**sections: Any) -> Data:
    return Data.model_validate({"root": "somewhere", "batch_size": 4, **sections})


def test_the_defaults_are_the_published_sizes() -> None:
    views = modality_of(data(clip={}, audio={}))
    assert dict(views.counts) == {"clip": 1, "audio": 1}
    room = {name: view.shape for name, view in views.empty(4).items()}
    assert room == {"clip": (1, 4, 8, 224, 224, 3), "audio": (1, 4, 48_000)}
    audio = Audio()
    assert (audio.frames, audio.bins) == (200, 257)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({}, "give some"),
        ({"crops": [{"count": 1, "size": 8, "scale": [0.1, 1]}], "audio": {}}, "leave one or the other out"),
        ({"audio": {"bins": 100}}, "such as 513, 257, 129"),
        ({"audio": {"kind": "mel", "bins": 600}}, "512 frequencies"),
        ({"audio": {"seconds": 0.01}}, "longer than half a window"),
        ({"audio": {"seconds": 600, "hop": 1}}, "use a longer hop"),
    ],
)
def test_what_does_not_fit_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        data(**sections)


def test_a_recipe_of_images_has_no_word_of_videos() -> None:
    written = data(crops=[{"count": 1, "size": 8, "scale": [0.1, 1]}]).model_dump(mode="json")
    assert not {"clip", "audio"} & written.keys()
    videos = data(clip={}, audio={})
    assert Data.model_validate(videos.model_dump(mode="json")) == videos


def of_clips(**changes: Any) -> dict[str, Any]:
    values = make_values(Path("somewhere"), **changes)
    del values["data"]["crops"]
    trunk = {"name": "r2plus1d_10"}
    return values | {"data": values["data"] | {"clip": {}, "audio": {}}, "trunk": trunk}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"probe": {"train": "a", "test": "b", "every_steps": 1, "image_size": 8}}, "probe is about images"),
        ({"evaluation": {"image_size": 8}}, "evaluation is about images"),
        ({"run__resident": True}, r"run\.resident keeps images"),
    ],
)
def test_what_is_for_images_is_refused_for_videos(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PretrainRecipe.model_validate(of_clips(**changes))


def test_videos_are_not_evaluated_as_images() -> None:
    recipe = PretrainRecipe.model_validate(of_clips())
    with pytest.raises(UserError, match="scored on videos"):
        evaluation_preprocessing(recipe)


AVID: dict[str, Any] = {
    "method": {"name": "avid", "head": {"hidden": [8], "output": 8}},
    "audio_trunk": {"name": "conv2d_10"},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trunk": {"name": "resnet18"}}, "resnet18 takes images, and data gives clips"),
        ({"trunk": {"name": "conv2d_10"}}, "conv2d_10 takes spectrograms, and data gives clips"),
        ({"audio_trunk": {"name": "conv2d_10"}}, r"audio_trunk goes with method\.name: avid"),
        ({"train": {"steps": 1, "init_from": "runs/other"}}, r"others have trunk\.init_from"),
        (AVID | {"audio_trunk": None}, r"one for sound, audio_trunk\.name: conv2d_10"),
        (AVID | {"trunk": {"name": "resnet18"}}, r"a trunk for clips, such as trunk\.name: r2plus1d_18"),
        (AVID | {"train": {"steps": 1, "strategy": "fairscale"}}, "a bank in pieces.*: use ddp or fsdp2"),
    ],
)
def test_trunks_fit_what_they_are_shown(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PretrainRecipe.model_validate(of_clips() | changes)


def test_a_recipe_without_sound_has_no_word_of_it() -> None:
    assert "audio_trunk" not in PretrainRecipe.model_validate(of_clips()).model_dump(mode="json")
    written = PretrainRecipe.model_validate(of_clips() | AVID).model_dump(mode="json", exclude={"run"})
    assert written["audio_trunk"]["name"] == "conv2d_10" and "run" not in written
    assert not {"width"} & written["audio_trunk"].keys() and "init_from" not in written["train"]
    assert PretrainRecipe.model_validate(written) == PretrainRecipe.model_validate(
        of_clips() | AVID
    ).model_copy(update={"run": PretrainRecipe.model_fields["run"].default})
