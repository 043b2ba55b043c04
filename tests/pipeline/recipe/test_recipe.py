"""Recipes: checked once, at the edge, with an error that shows the way out."""

from __future__ import annotations

import re
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_training import make_values
from torch import nn

from cluster.errors import UserError
from cluster.typed_yaml import apply_override, check_recipe, find_recipe, load_recipe, read_recipe, read_yaml
from pipeline.methods.build import assemble_method
from pipeline.models.trunk import build_trunk
from pipeline.parallel.activation_checkpointing import checkpoint_activations
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.stages import HashtagsRecipe
from pipeline.recipe.transfer import PredictRecipe
from pipeline.recipe.trunk import Architecture
from pipeline.transfer.evaluations import EVALUATIONS

SHIPPED = sorted(
    (kind, Path(str(file)).stem)
    for kind in ("pretrain", "transfer")
    for file in (resources.files("configs") / kind).iterdir()
    if str(file).endswith(".yaml")
)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(make_values(Path("somewhere"))))
    return path


def load(path: Path, *overrides: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, str(path), list(overrides), kind="pretrain")


# Trunks of the shipped recipes in millions of parameters, with no classifier: sums over the published widths
# (tests/pipeline/models/test_regnet.py). The two small ones have no published name.
MILLIONS = {
    "avid_audioset": 15.38,
    "avid_cma_audioset": 15.38,
    "avid_cma_demo": 0.445,
    "avid_cma_kinetics": 15.38,
    "avid_demo": 0.445,
    "avid_kinetics": 15.38,
    "barlow_twins_regnety_16gf": 80.57,
    "barlow_twins_resnet50": 23.51,
    "byol_regnety_16gf": 80.57,
    "byol_resnet50": 23.51,
    "cifar10": 0.66,
    "cifar10_barlow_twins": 11.17,
    "cifar10_byol": 11.17,
    "cifar10_hashtags": 0.66,
    "cifar10_simsiam": 11.17,
    "cifar10_swav": 11.17,
    "demo": 0.66,
    "hashtags_regnety_16gf": 80.57,
    "seer_regnety_8gf": 37.16,
    "seer_regnety_16gf": 80.57,
    "seer_regnety_32gf": 141.33,
    "seer_regnety_64gf": 276.46,
    "seer_regnety_128gf": 637.42,
    "seer_regnety_256gf": 1272.16,
    "seer_regnet_10b": 9323.93,
    "simsiam_regnety_16gf": 80.57,
    "simsiam_resnet50": 23.51,
    "swav_resnet50": 23.51,
}


@pytest.mark.parametrize("name", [name for kind, name in SHIPPED if kind == "pretrain"])
def test_a_pretraining_recipe_names_its_aim_and_builds_the_published_trunk(name: str) -> None:
    lines = find_recipe(name, kind="pretrain").read_text().splitlines()
    assert re.search(r"Aims at[:,] ", " ".join(takewhile(lambda line: line.startswith("# "), lines)))
    recipe = load_recipe(PretrainRecipe, name, kind="pretrain")
    with torch.device("meta"):
        trunk = build_trunk(recipe.trunk)
    millions = sum(parameter.numel() for parameter in trunk.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[name], abs=0.006)
    checkpoint_activations(
        trunk, recipe.train.activation_checkpointing, reentrant=False
    )  # its stages have these blocks


@pytest.mark.parametrize("name", [name for _, name in SHIPPED if name.startswith("seer_")])
def test_a_recipe_of_SEER_is_one_epoch_of_a_billion_images_at_its_rate(name: str) -> None:
    recipe = load_recipe(PretrainRecipe, name, kind="pretrain")
    assert recipe.train.steps is not None
    images = recipe.train.steps * recipe.data.batch_size
    assert images == pytest.approx(1e9, rel=1e-3)
    assert recipe.optim.lr == pytest.approx(0.3 * recipe.data.batch_size / 256)
    assert recipe.data.batch_size % (recipe.train.sync_bn_samples or 1) == 0


def test_the_two_views_of_barlow_twins_and_byol_are_coloured_differently_as_published() -> None:
    for name in ("barlow_twins_resnet50", "byol_resnet50"):
        recipe = load_recipe(PretrainRecipe, name, kind="pretrain")
        one, other = (group.photometric for group in recipe.data.crops)
        assert [group.count for group in recipe.data.crops] == [1, 1]
        assert (one.blur_probability, one.solarize_probability) == (1.0, 0.0)
        assert (other.blur_probability, other.solarize_probability) == (0.1, 0.2)


# Peak rate per 256 images, epochs, warm-up epochs, and the widths of the heads' layers, as the authors and
# solo-learn have them.
PUBLISHED: dict[str, tuple[float, int, int, tuple[int, ...]]] = {
    "barlow_twins_resnet50": (0.2, 1000, 10, (8192, 8192, 8192)),
    "byol_resnet50": (0.2, 1000, 10, (4096, 256, 4096)),
    "simsiam_resnet50": (0.05, 100, 0, (2048, 2048, 2048, 512)),
    "cifar10_barlow_twins": (0.3, 1000, 10, (2048, 2048, 2048)),
    "cifar10_byol": (1.0, 1000, 10, (4096, 256, 4096)),
    "cifar10_simsiam": (0.5, 1000, 10, (2048, 2048, 2048, 512)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_published_schedule_and_sizes(name: str) -> None:
    rate, epochs, warmup, sizes = PUBLISHED[name]
    recipe = load_recipe(PretrainRecipe, name, kind="pretrain")
    steps_per_epoch = (50_000 if name.startswith("cifar10") else 1_281_167) // recipe.data.batch_size
    assert recipe.optim.lr == pytest.approx(rate * recipe.data.batch_size / 256)
    assert (recipe.train.epochs, recipe.optim.warmup_steps) == (epochs, warmup * steps_per_epoch)
    with torch.device("meta"):
        method = assemble_method(recipe, total_steps=1, group=None)
    heads = [method.projector, getattr(method, "predictor", None)]
    linear = [layer for head in heads if head for layer in head.modules() if isinstance(layer, nn.Linear)]
    found = tuple(layer.out_features for layer in linear)
    assert found[: len(sizes)] == sizes
    assert found[len(sizes) :] in ((), (sizes[-2],))  # a predictor ends where it began


def test_a_published_recipe_starts_its_blocks_as_its_authors_do() -> None:
    for name in PUBLISHED:
        recipe = load_recipe(PretrainRecipe, name, kind="pretrain")
        published = name.endswith("_resnet50") or name == "cifar10_simsiam"
        assert recipe.trunk.zero_init_residual == published, name


def test_solo_learns_recipes_for_cifar10_do_not_blur() -> None:
    for name in ("swav", "barlow_twins", "byol", "simsiam"):
        recipe = load_recipe(PretrainRecipe, f"cifar10_{name}", kind="pretrain")
        assert not any(group.photometric.blur_probability for group in recipe.data.crops)


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_every_shipped_recipe_is_complete_and_right(kind: str, name: str) -> None:
    of_transfer = {name: each.recipe for name, each in EVALUATIONS.items()} | {
        "predict": PredictRecipe,
        "hashtags": HashtagsRecipe,
    }
    load_recipe(of_transfer.get(name, PretrainRecipe), name, kind=kind)


def test_an_unknown_key_is_told_with_file_section_spelling_and_choices(mine: Path) -> None:
    with pytest.raises(UserError) as error:
        load(mine, "optim.learning_rate=1", "optim.lr=2")
    assert str(error.value).startswith(f"recipe {mine}: 'optim.learning_rate' is not a key of optim")
    assert (
        "Allowed: betas, clip_norm, clip_trust, exclude_bias_and_norm, final_lr, gamma, head_first, lr"
        in str(error.value)
    )
    with pytest.raises(
        UserError, match=r"'optim\.warmup_step' .*; did you mean 'optim\.warmup_steps'\? Allowed"
    ):
        load(mine, "optim.warmup_step=1")
    with pytest.raises(UserError, match=r"'sead' is not a key of the recipe; did you mean 'seed'\?"):
        load(mine, "sead=1")
    with pytest.raises(
        UserError, match=r"'data\.crops\.1\.photometric\.hues' .* 'data\.crops\.1\.photometric\.hue'"
    ):
        load(mine, "data.crops.1.photometric.hues=0.1")
    with pytest.raises(
        UserError,
        match=r"'method\.prototype' is not a key of method; .*'method\.prototypes'\? Allowed: epsilon,",
    ):
        load(mine, "method.prototype=3")
    byol = "method={name: byol, projector: [8], predictor: 8, momentums: 1}"
    with pytest.raises(UserError, match=r"did you mean 'method\.momentum'\? Allowed: momentum, name"):
        load(mine, byol)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.lr=fast", r"optim\.lr: Input should be a valid number.*\(got 'fast'\)"),
        ("optim.lr=-1", r"optim\.lr: Input should be greater than 0 \(got -1\)"),
        (
            "optim.name=sgdd",
            r"optim\.name: Input should be 'sgd', 'larc', 'lars', 'adam' or 'adamw' \(got 'sgdd'\)",
        ),
        ("data.crops=[]", r"data\.crops says what becomes of an image, .* give some"),
        ("data.crops.0.scale=[0.5]", r"data\.crops\.0\.scale\.1: Field required"),
        (
            "data.crops.0.interpolation=lanczos",
            r"data\.crops\.0\.interpolation: Input should be 'bilinear' or 'bicubic' \(got 'lanczos'\)",
        ),
        ("data=null", r"data: "),
        ("method.prototypes=-1", r"method\.prototypes: Input should be greater than or equal to 2"),
        ("method.name=moco", r"method: Input tag 'moco' .* 'swav', 'barlow_twins', 'byol', 'simsiam'"),
        (
            "train.checkpointing=full",
            r"'train\.checkpointing' is now train\.activation_checkpointing$",
        ),
        (
            "optim.decay_bias_and_norm=true",
            r"'optim\.decay_bias_and_norm' is now optim\.exclude_bias_and_norm, with the opposite value$",
        ),
        (
            "optim={name: adamw, lr: 1, momentum: 0.8}",
            r"optim\.momentum goes with .*: adamw has optim\.betas",
        ),
        (
            "optim.schedule=linear",
            r"optim\.schedule: Input should be 'cosine', 'cosine_of_run', 'constant' or 'multistep' \(got",
        ),
        ("optim.betas=[0.8, 0.9]", r"optim\.betas goes with adam and adamw: larc has optim\.momentum"),
        ("optim.clip_trust=true", r"optim\.clip_trust goes with optim\.name: lars"),
        ("train.epochs=3", r"train: give exactly one of train\.steps and train\.epochs"),
        ("trunk.regnet=null", r"trunk: `regnet` parameters go with name: regnet_y"),
        (
            "trunk.zero_init_residual=true",
            r"trunk: `zero_init_residual` goes with name: resnet18 or resnet50",
        ),
        (
            "trunk.stem=low_resolution_padded",
            r"trunk: stem: low_resolution_padded goes with name: resnet18 or",
        ),
        ("seed=1.5", r"seed: Input should be a valid integer"),
        ("run.cache_gib=.inf", r"run\.cache_gib: Input should be a finite number"),
        ("data.crops.0.scale=[0.5, .nan]", r"data\.crops\.0\.scale\.1: Input should be a finite number"),
        ("run.cache=s3://bucket/cache", r"run: cache s3://bucket/cache is a URL: give a folder on .* disk"),
    ],
)
def test_a_wrong_value_is_told_with_its_key(mine: Path, override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load(mine, override)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    values = make_values(Path("somewhere"))
    del values["data"]["batch_size"]
    with pytest.raises(UserError, match=r"recipe here: data\.batch_size: Field required"):
        check_recipe(PretrainRecipe, values, where="here")


def test_overrides_reach_sections_lists_and_what_the_file_leaves_out(mine: Path) -> None:
    recipe = load(
        mine,
        "optim.lr=1e-4",
        "run.profile=10:15",
        "data.crops.0.size=20",
        "data.crops.1.photometric.blur_probability=0",
        "run.keep_last=7",
        "data.view=null",
        "trunk={name: regnet_y, regnet: {depth: 4, w_0: 16, w_a: 12, w_m: 1.75, group_width: 8}}",
    )
    assert recipe.optim.lr == 1e-4
    assert recipe.run.profile == "10:15"  # not 615, as YAML 1.1 has it
    assert recipe.data.crops[0].size == 20
    assert recipe.data.crops[1].photometric.blur_probability == 0
    assert recipe.run.keep_last == 7
    assert recipe.trunk.regnet is not None and recipe.trunk.regnet.depth == 4


def test_an_override_of_an_alias_leaves_the_anchor_alone(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("one: &one {section: {number: 1}, crops: [{size: 8}]}\ntwo: {<<: *one}\nthree: *one\n")
    values = read_yaml(path)
    apply_override(values, "two.section.number=2")
    apply_override(values, "three.section.number=3")
    apply_override(values, "three.crops.0.size=9")
    assert [values[name]["section"]["number"] for name in ("one", "two", "three")] == [1, 2, 3]
    assert [values[name]["crops"][0]["size"] for name in ("one", "two", "three")] == [8, 8, 9]
    path.write_text("one: &one {again: *one}\n")
    with pytest.raises(UserError, match="has an alias inside of what it stands for"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.lr", "is not an override; write key=value with a dotted key"),
        ("optim..lr=1", "is not an override"),
        ("=1", "is not an override"),
        ("optim.lr=[1", "is not valid YAML"),
        ("optim.lr.x=1", r"'optim\.lr' is a value, not a section"),
        ("data.crops.5.size=1", r"'data\.crops\.5': the list has 2 entries; use an index from 0 to 1"),
        ("data.crops.last=1", "the list has 2 entries"),
    ],
)
def test_a_malformed_override_is_told(mine: Path, override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load(mine, override)


@given(value=st.floats(min_value=1e-30, max_value=1e30))
def test_a_number_survives_being_written_as_an_override(value: float) -> None:
    values: dict[str, Any] = {}
    apply_override(values, f"optim.lr={value!r}")
    assert values == {"optim": {"lr": value}}


@given(
    key=st.lists(st.sampled_from(["a", "b", "c9", "d_e"]), min_size=1, max_size=4, unique=True),
    value=st.one_of(st.integers(), st.booleans(), st.none(), st.text("xyz", min_size=1)),
)
def test_an_override_sets_one_key_and_no_other(key: list[str], value: Any) -> None:
    values: dict[str, Any] = {"other": {"kept": 1}}
    text = yaml.safe_dump(value).removesuffix("...\n").strip()
    apply_override(values, f"{'.'.join(key)}={text}")
    node: Any = values
    for part in key:
        node = node[part]
    assert node == value
    assert values["other"] == {"kept": 1}
    assert values.keys() == {"other", key[0]}


def test_a_recipe_is_found_by_name_or_by_path(mine: Path, tmp_path: Path) -> None:
    assert find_recipe(str(mine), kind="pretrain") == mine
    assert find_recipe("cifar10", kind="pretrain").name == "cifar10.yaml"
    with pytest.raises(
        UserError,
        match=r"there is no recipe 'cifar'; did you mean 'cifar10'\? shipped: avid_audioset, ",
    ):
        find_recipe("cifar", kind="pretrain")
    with pytest.raises(UserError, match="there is no recipe file "):
        find_recipe(str(tmp_path / "not.yaml"), kind="pretrain")
    with pytest.raises(UserError, match="there is no recipe"):
        find_recipe("../pretrain/cifar10", kind="pretrain")


@pytest.mark.parametrize(
    ("text", "told"),
    [("a: [1", "is not valid YAML"), ("- 1", "must hold a mapping"), ("", "must hold a mapping")],
)
def test_a_file_that_is_no_recipe_is_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        load(path)


def test_S1_yaml_cannot_build_objects(tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text("seed: !!python/object/apply:os.system ['touch hacked']\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        load(path)


def test_a_recipe_cannot_be_changed_after_it_was_checked(mine: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(mine).optim.lr = 3  # type: ignore[misc]


def test_a_base_is_merged_key_by_key_and_overridden_last(mine: Path, tmp_path: Path) -> None:
    other = tmp_path / "folder" / "other.yaml"
    other.parent.mkdir()
    other.write_text(
        """
base: ../mine.yaml
optim: {lr: 0.5}
data:
  crops: [{count: 2, size: 12, scale: [0.5, 1.0], photometric: {hue: 0.1}}]
probe: {train: a, test: b, every_steps: 3, image_size: 16}
"""
    )
    below, recipe = load(mine), load(other, "optim.warmup_steps=7", "data.crops.0.size=14", "run.keep_last=5")
    assert recipe.optim == below.optim.model_copy(update={"lr": 0.5, "warmup_steps": 7})
    assert [(crops.size, crops.photometric.hue) for crops in recipe.data.crops] == [(14, 0.1)]
    assert recipe.data.model_copy(update={"crops": below.data.crops}) == below.data
    assert (recipe.trunk, recipe.method, recipe.train) == (below.trunk, below.method, below.train)
    assert recipe.probe is not None and recipe.run.keep_last == 5
    other.write_text("base: cifar10\nprobe: null\n")
    assert load(other) == load_recipe(PretrainRecipe, "cifar10", kind="pretrain")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base: mine.yaml\nbase2: 1", r"recipe .*/other.yaml \(base .*/mine.yaml\): 'base2' is not a key"),
        ("base: mine.yaml\noptim: {lrr: 1}", r"other.yaml .*: 'optim\.lrr' .* did you mean 'optim\.lr'\?"),
        ("base: cifar1", r"other.yaml: base: there is no recipe 'cifar1'; did you mean 'cifar10"),
        ("base: nowhere.yaml", r"other.yaml: base: there is no recipe file .*/nowhere.yaml"),
        ("base: [mine.yaml]", r"other.yaml: base is the name of another recipe or a .yaml file, not \['mine"),
        ("base: null", r"other.yaml: base is the name of another recipe or a .yaml file, not None"),
        (
            "base: other.yaml",
            r"other.yaml: its base .*/other.yaml has a base itself, 'other.yaml', and may not",
        ),
        (
            "base: seer_regnety_32gf",
            r"its base .*/seer_regnety_32gf.yaml has a base itself, 'seer_regnety_16gf', and may not: name",
        ),
    ],
)
def test_a_wrong_base_is_told_with_file_and_key(mine: Path, text: str, told: str) -> None:
    (mine.parent / "other.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        load(mine.parent / "other.yaml")


def test_a_name_may_have_its_folder_in_front_as_in_graphs(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: transfer/lowshot_swav_10\nseed: 3\n")
    assert read_recipe(str(mine), kind="pretrain")[0]["optim"]["gamma"] == 0.2
    # Its base is looked for beside it.
    assert read_recipe("transfer/lowshot_swav_1", kind="pretrain")[0]["optim"]["lr_head"] == 5.0
    with pytest.raises(UserError, match="did you mean 'transfer/lowshot_swav_1'"):
        read_recipe("lowshot_swav_1", kind="pretrain")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnet51", "did you mean resnet50"),
        ("timm/hf-hub:someone/model", "and timm/MODEL"),
        ("timm/../weights", "and timm/MODEL"),
        (["resnet50"], "there is no such trunk"),
    ],
)
def test_S1_a_trunk_is_one_by_name_and_no_address(name: Any, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Architecture.model_validate({"name": name})
    assert Architecture.model_validate({"name": "timm/convnext_tiny"}).takes == "images"
    with pytest.raises(ValidationError, match="has the stem that timm gives it"):
        Architecture.model_validate({"name": "timm/convnext_tiny", "stem": "low_resolution"})
