"""What arithmetic tells of a graph is told before its first stage begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.site import Site
from pipeline.commands.dag import run_on
from pipeline.dag.graph import build_graph
from pipeline.dag.recipe import load_dag
from pipeline.dag.stage import Stage
from pipeline.stages.fit import refuse_uneven_stages
from pipeline.stages.kinds import KINDS

WITHOUT_FILES = {name: replace(kind, outside=lambda recipe: "") for name, kind in KINDS.items()}


def graph(name: str, *overrides: str) -> list[Stage]:
    return build_graph(load_dag(name, list(overrides)), WITHOUT_FILES)


def test_ranks_that_cannot_share_a_batch_are_told_before_anything_begins(tmp_path: Path) -> None:
    words = [f"folder={tmp_path / 'graph'}", "stages.pretrain.recipe.run.ranks_per_node=7"]
    dag = load_dag("demo", words)
    with pytest.raises(UserError, match=r"^pretrain: .*\b7\b"):
        run_on("local", dag, build_graph(dag, KINDS), Site())
    assert not (tmp_path / "graph").exists()


def test_every_stage_that_could_only_fail_is_named_with_what_it_lacks() -> None:
    of = "stages.{}.recipe.run.ranks_per_node=7"
    names = ("pretrain_swav_all_0", "pretrain_swav_tagged_0", "tuned_swav_all_0")
    stages = graph("weak_supervision_cifar10", *map(of.format, names))
    with pytest.raises(
        UserError, match=r"^pretrain_swav_all_0, pretrain_swav_tagged_0: .*; tuned_swav_all_0: "
    ):
        refuse_uneven_stages(stages, gpus_per_node=0)
    refuse_uneven_stages(graph("weak_supervision_cifar10"), gpus_per_node=0)


def test_large_trunks_without_gpus_are_told_and_with_them_taken() -> None:
    with pytest.raises(
        UserError, match=r"^pretrain, pretrain_hashtags: there are no GPUs, and regnety_256gf"
    ):
        refuse_uneven_stages(graph("seer"), gpus_per_node=0)
    refuse_uneven_stages(graph("seer"), gpus_per_node=8)
