"""Every row of the table of evaluations is all that a command, a stage and the report need."""

from __future__ import annotations

import inspect

import pytest
import torch

from cluster.job import import_function
from cluster.typed_yaml import load_recipe
from pipeline.cli import COMMANDS
from pipeline.report.scores import SCORES
from pipeline.stages.kinds import KINDS
from pipeline.transfer.evaluations import EVALUATIONS
from pipeline.transfer.features import Features


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_is_a_command_a_kind_of_stage_and_a_role_of_the_report(name: str) -> None:
    evaluation = EVALUATIONS[name]
    load_recipe(evaluation.recipe, name, kind="transfer")
    inspect.signature(import_function(evaluation.function)).bind(0, 1, 2, device=3)
    assert COMMANDS[name].__doc__ == evaluation.about
    assert KINDS[name].recipe is evaluation.recipe
    if evaluation.metric == "top1":
        assert SCORES[name] == (name, "trained")
        assert SCORES[f"{name}_random"] == (name, "random")
    else:
        assert name not in SCORES


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_finds_out_what_the_report_shows(name: str) -> None:
    features = Features(
        x=torch.eye(2).repeat(300, 1),
        y=torch.tensor([0, 1]).repeat(300),
        keys=torch.arange(600),
        classes=("a", "b"),
    )
    recipe = load_recipe(EVALUATIONS[name].recipe, name, kind="transfer")
    metrics = EVALUATIONS[name].score(features, features, recipe, device=torch.device("cpu")).metrics()
    metric = EVALUATIONS[name].metric
    assert metrics[metric] == 1
    assert 0.99 < metrics[f"{metric}_low"] <= 1 == metrics[f"{metric}_high"]
    assert "{" not in EVALUATIONS[name].explained.format(**metrics)
