"""Stages that make datasets."""

from pathlib import Path

import pytest

from cluster.errors import UserError
from pipeline.dag.stage import Work
from pipeline.recipe.stages import ShardsRecipe
from pipeline.stages.data import shards


def test_a_crawl_that_keeps_nothing_fails_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for number in range(2):
        (tmp_path / "source" / f"{number}.jpg").write_text("no picture")
    work = Work(recipe=ShardsRecipe(source=str(tmp_path / "source")), inputs={}, folder=tmp_path / "shards")
    with pytest.raises(
        UserError, match=r"nothing of the source was kept \(2 not_an_image\): see `ingest show"
    ):
        shards(work)
