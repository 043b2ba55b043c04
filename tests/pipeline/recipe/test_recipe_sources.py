"""A recipe that names a source equals it, key by key, or its header lists the difference."""

from __future__ import annotations

import sys
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import recipe_sources

SHIPPED = sorted(
    str(file.name).removesuffix(".yaml") for file in (resources.files("configs") / "pretrain").iterdir()
)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_equals_its_source_or_says_where_it_does_not(name: str) -> None:
    assert recipe_sources.problems(name) == []


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = deepcopy(recipe_sources.SOURCES)
    monkeypatch.setattr(recipe_sources, "SOURCES", found)
    return found


def test_a_key_of_which_the_header_is_silent_is_found(sources: dict[str, Any]) -> None:
    sources["blocks"]["swav"]["keys"]["method.temperature"][0] = 0.2
    assert recipe_sources.problems("swav_resnet50") == [
        "swav_resnet50: method.temperature is another in the source, and not listed"
    ]
    sources["recipes"]["swav_resnet50"]["differs"]["method.temperature"] = "a temperature of 0.1"
    assert recipe_sources.problems("swav_resnet50") == [
        "swav_resnet50: its header does not say 'a temperature of 0.1'"
    ]


def test_what_is_listed_and_differs_no_longer_is_found(sources: dict[str, Any]) -> None:
    sources["blocks"]["swav"]["keys"]["train.precision"][0] = "bf16"
    assert recipe_sources.problems("swav_resnet50") == [
        "swav_resnet50: train.precision is the source's, and listed as another"
    ]


def test_a_key_that_nobody_has_looked_up_is_found(sources: dict[str, Any]) -> None:
    del sources["blocks"]["solo_learn_swav"]["keys"]["method.temperature"]
    with pytest.raises(KeyError, match=r"method\.temperature"):
        recipe_sources.problems("cifar10_swav")
