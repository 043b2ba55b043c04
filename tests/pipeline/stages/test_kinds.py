"""The table of kinds, and the keys that its stages have."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from cluster.job import Resources, import_function
from cluster.typed_yaml import Section
from pipeline.dag.graph import build_graph
from pipeline.dag.recipe import load_dag
from pipeline.dag.stage import Kind, Later
from pipeline.stages.kinds import KINDS


def function_of(called: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(called, partial):
        return partial(function_of(called.func), *called.args)
    return import_function(called.name) if isinstance(called, Later) else called


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_names_functions_that_exist_and_fit(name: str) -> None:
    kind = KINDS[name]
    assert issubclass(kind.recipe, Section)
    for called, arguments in (
        (kind.run, 1),
        (kind.job, 2),
        (kind.resources, 2),
        (kind.refuse, 2),
        (kind.outside, 1),
    ):
        if called is not None:
            inspect.signature(function_of(called)).bind(*range(arguments))
    if not kind.recipe.model_json_schema().get("required"):
        whole_node = Resources(ranks_per_node=8, gpus_per_rank=1)
        expected = (whole_node,) if kind.job is not None else (Resources(), Resources(gpus_per_rank=1))
        assert kind.resources(kind.recipe(), 8) in expected


# A key that changes makes every result of a graph anew, weeks of training among them: whoever changes one on
# purpose records the new one here, and says so in the CHANGELOG.
KEYS = {
    "avid": "47d0845f7dd7877a",
    "avid_demo": "35d19096b603520a",
    "cifar10": "2781ec92e8b6ed16",
    "cifar10_cpu": "97a9ee88f8d361d1",
    "collapse": "fcca985d6d2b6818",
    "demo": "4391c556ce6361dd",
    "evals": "fefc1eca673437ec",
    "evals_finetune": "4d18fbbbb5187823",
    "seer": "e72fc3937fae946d",
    "svm_voc07": "474e5067de564806",
    "transfer": "4b365db27f664e51",
    "weak_supervision": "f6acf77fe5fa4b9e",
    "weak_supervision_cifar10": "851b07c77ea83da0",
}


def kinds_without_files() -> dict[str, Kind]:
    return {kind: replace(found, outside=lambda recipe: "") for kind, found in KINDS.items()}


def keys_of(name: str, *overrides: str) -> dict[str, str]:
    graph = build_graph(load_dag(name, list(overrides)), kinds_without_files())
    return {stage.name: stage.key for stage in graph}


def test_features_are_others_for_images_that_are_resized_otherwise() -> None:
    before, after = keys_of("demo"), keys_of("demo", "stages.trunk.recipe.interpolation=bicubic")
    other = {name for name in before if before[name] != after[name]}
    assert {"trunk", "random_trunk", "pixels", "features", "features_random", "knn", "linear"} <= other
    assert not other & {"photographs", "train", "test", "pretrain"}


@pytest.mark.parametrize("name", KEYS)
def test_the_stages_of_a_shipped_graph_keep_their_keys(name: str) -> None:
    keys = keys_of(name)
    digest = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]
    assert digest == KEYS[name], keys


@pytest.mark.parametrize("name", ["weak_supervision", "weak_supervision_cifar10"])
def test_the_arms_of_weak_supervision_differ_in_what_is_compared_alone(name: str) -> None:
    stages = {stage.name: stage for stage in build_graph(load_dag(name, []), kinds_without_files())}
    arms = [stage for stage in stages.values() if stage.kind_name == "pretrain"]
    assert len({str(arm.recipe.trunk) for arm in arms}) == 1
    assert len({arm.recipe.train.steps * arm.recipe.data.batch_size for arm in arms}) == 1
    assert {arm.inputs["data"].stage.name for arm in arms} == {"clean"}  # without the test set's images
    tuned = [stage for stage in stages.values() if stage.kind_name == "finetune"]
    assert len(tuned) == len(arms)
    assert len({stage.recipe.model_copy(update={"seed": 0}).model_dump_json() for stage in tuned}) == 1
    shown = {origin.stage.name for origin in stages["figures"].inputs.values()}
    assert shown == {stage.name for stage in stages.values() if stage.kind_name in ("finetune", "linear")}


def test_the_seer_graph_is_the_whole_path_from_images_to_pages() -> None:
    stages = {stage.name: stage for stage in build_graph(load_dag("seer", []), kinds_without_files())}

    def after(name: str) -> set[str]:
        return {
            found for each, stage in stages.items() if name in stage.sources for found in {each, *after(each)}
        }

    scored = {"knn", "linear", "linear_sgd", "lowshot_1", "lowshot_10", "tuned", "figures", "report"}
    robust = {f"robust_{name}" for name in ("v2", "sketch", "a", "r")}
    assert scored | robust <= after("pretrain")
    assert robust <= after("tuned")
    assert (
        {"linear_hashtags", "tuned_hashtags", "figures"}
        <= after("pretrain_hashtags")
        <= after("tags_hashtags")
    )
    seer, hashtags = stages["pretrain"].recipe, stages["pretrain_hashtags"].recipe
    assert (seer.trunk, seer.train) == (hashtags.trunk, hashtags.train)
    assert seer.data.batch_size == hashtags.data.batch_size
    learned = {name for name, stage in stages.items() if stage.kind_name == "finetune"}
    assert all(stages[name].inputs["test"].stage.name == "test" for name in learned)
