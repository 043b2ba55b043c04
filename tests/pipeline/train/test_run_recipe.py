"""What a run folder was made of."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from tiny_training import make_dataset, make_recipe

from cluster.errors import UserError
from cluster.run.source import source_version
from cluster.typed_yaml import load_recipe
from ingest.dataset.open import open_dataset
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.run_recipe import adopt, pin_dataset, record_attempt
from pipeline.train.steering import check_may_go_on


def test_a_saved_recipe_is_the_recipe(tmp_path: Path) -> None:
    recipe = make_recipe(Path("somewhere"))
    adopt(recipe, tmp_path / "run")
    assert load_recipe(PretrainRecipe, str(tmp_path / "run" / "recipe.yaml"), kind="pretrain") == recipe
    adopt(recipe, tmp_path / "run")


def test_a_run_goes_on_when_recipes_have_got_a_key_since(tmp_path: Path) -> None:
    """At the value that trains as the run was trained; another one is another training."""
    recipe = make_recipe(Path("somewhere"))
    adopt(recipe, tmp_path)
    saved = tmp_path / "recipe.yaml"
    values = yaml.safe_load(saved.read_text())
    for crop in values["data"]["crops"]:
        del crop["interpolation"]
    del values["evaluation"]
    saved.write_text(yaml.safe_dump(values))
    assert not check_may_go_on(recipe, tmp_path)
    crops = [crop.model_copy(update={"interpolation": "bicubic"}) for crop in recipe.data.crops]
    data = recipe.data.model_copy(update={"crops": tuple(crops)})
    told = r"data\.crops\.0\.interpolation is 'bilinear' there, 'bicubic' here; data\.crops\.1"
    with pytest.raises(UserError, match=told):
        adopt(recipe.model_copy(update={"data": data}), tmp_path)
    adopt(recipe, tmp_path)


def test_a_run_keeps_the_dataset_that_it_began_with(tmp_path: Path) -> None:
    data, run = make_dataset(tmp_path), tmp_path / "run"
    recipe = make_recipe(data)
    pinned = pin_dataset(recipe, run)
    root = open_dataset(data).root
    assert pinned.data.sealed == root
    adopt(pinned, run)
    # Another root is sealed later: a new run takes it, this one does not.
    other = "0" * 64
    for kind in ("json", "parquet"):
        (data / "sealed" / f"{other}.{kind}").write_bytes((data / "sealed" / f"{root}.{kind}").read_bytes())
    (data / "DATASET.json").write_text(json.dumps({"format": 1, "sealed": other}))
    assert pin_dataset(recipe, tmp_path / "new").data.sealed == other
    assert pin_dataset(recipe, run) == pinned
    adopt(pin_dataset(recipe, run), run)
    asked = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sealed": other})})
    with pytest.raises(UserError, match=r"data\.sealed is "):
        adopt(pin_dataset(asked, run), run)


def test_every_attempt_is_recorded_with_its_code(tmp_path: Path) -> None:
    for ranks in (1, 2):
        record_attempt(tmp_path, ranks=ranks, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [line["ranks"] for line in lines] == [1, 2]
    root = Path(__file__).parents[3]
    if (root / ".git").exists():
        head = subprocess.run(
            ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        assert source_version()["commit"] == head.stdout.strip()
        assert isinstance(source_version()["dirty"], bool)
