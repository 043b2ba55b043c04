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
    for called, arguments in ((kind.run, 1), (kind.job, 2), (kind.resources, 2), (kind.outside, 1)):
        if called is not None:
            inspect.signature(function_of(called)).bind(*range(arguments))
    if not kind.recipe.model_json_schema().get("required"):
        whole_node = Resources(ranks_per_node=8, gpus_per_rank=1)
        expected = (whole_node,) if kind.job is not None else (Resources(), Resources(gpus_per_rank=1))
        assert kind.resources(kind.recipe(), 8) in expected


# A key that changes makes every result of a graph anew, weeks of training among them: whoever changes one on
# purpose records the new one here, and says so in the CHANGELOG.
KEYS = {
    "avid": "f9f251081a965498",
    "avid_demo": "4270444dd63a029e",
    "cifar10": "78a459bf6a506f00",
    "cifar10_cpu": "d0a4101f8d3b153d",
    "collapse": "96b70fa621845474",
    "demo": "2481dc5f3165b715",
    "evals": "fefc1eca673437ec",
    "seer": "4cc6bdbdd57353ae",
    "transfer": "1daf49aacd30b299",
}


def keys_of(name: str, *overrides: str) -> dict[str, str]:
    kinds: dict[str, Kind] = {
        kind: replace(found, outside=lambda recipe: "") for kind, found in KINDS.items()
    }
    return {stage.name: stage.key for stage in build_graph(load_dag(name, list(overrides)), kinds)}


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
