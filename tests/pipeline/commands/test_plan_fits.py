"""A plan that does not fit the GPUs of a site is told when a run is submitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_training import make_recipe

from cluster.job import Resources
from cluster.site import Site
from pipeline.commands.pretrain import warn_of_memory
from pipeline.plan.cost import GPUS


@pytest.mark.slow
def test_what_does_not_fit_the_memory_of_the_site_s_gpus_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, gpus = make_recipe(Path("nowhere")), Resources(ranks_per_node=2, gpus_per_rank=1)
    monkeypatch.setitem(GPUS, "h100", replace(GPUS["h100"], memory=1e5))
    warn_of_memory(recipe, Site(constraint="h100"), gpus)
    assert "GB of each h100, which has 0: use more --nodes" in capsys.readouterr().err
    warn_of_memory(recipe, Site(gpu_type="unheard-of"), gpus)
    warn_of_memory(recipe, Site(gpu_type="h100"), Resources())
    assert capsys.readouterr().err == ""
