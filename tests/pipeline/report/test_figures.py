"""Figures 1 and 2: ours beside published values, and only beside those that were come by alike."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny_classification import recipe_of
from tiny_training import make_recipe
from tuned import Graph

from cluster.errors import UserError
from pipeline.dag.stage import Input, Work
from pipeline.recipe.stages import FiguresRecipe
from pipeline.report.comparable import Setup, differences
from pipeline.report.page import environment
from pipeline.report.published_imagenet import CLAIMS, ERAS
from pipeline.report.scatter import Mark, Trace, log_ticks, scatter_chart, standalone
from pipeline.report.tuned_rows import Row, read_rows
from pipeline.stages.pages import figures
from pipeline.transfer.statistics import mean_of_seeds

PRETRAINING, TUNING = make_recipe(Path("data")), recipe_of(Path("data"), {}, train={"epochs": 3})
BY_STEPS = recipe_of(Path("data"), {}, train={"steps": 100})
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    return Graph(tmp_path / "stages")


def right(count: int, of: int = 100) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.arange(of) < count


def imagenet(name: str) -> Any:
    """40 epochs of a trunk with ImageNet's stem."""
    trunk = TUNING.trunk.model_copy(update={"name": name, "stem": "imagenet", "regnet": None})
    train = TUNING.train.model_copy(update={"epochs": 40})
    return TUNING.model_copy(update={"trunk": trunk, "train": train})


def rows(inputs: dict[str, Input], *curated: str) -> dict[str, Row]:
    return {row.name: row for row in read_rows(inputs, curated=curated)}


def page(inputs: dict[str, Input], folder: Path, **recipe: Any) -> tuple[str, dict[str, Any], Any]:
    """figures.html, figures.json and the metrics."""
    folder.mkdir(exist_ok=True)
    result = figures(Work(recipe=FiguresRecipe(**recipe), inputs=inputs, folder=folder))
    assert all((folder / name).exists() for name in result.outputs)
    return (
        (folder / "figures.html").read_text(),
        json.loads((folder / "figures.json").read_text()),
        result.metrics,
    )


def test_seeds_are_one_row_with_the_interval_of_their_mean_and_a_seed_alone_has_wilsons(graph: Graph) -> None:
    trunk = graph.trunk("swav", recipe=PRETRAINING, gpu_hours=1.5)
    scores = (70, 74, 75)
    inputs = {
        f"swav_seed{seed}": graph.tuned(f"s{seed}", trunk, right(score), recipe=TUNING)
        for seed, score in enumerate(scores)
    } | {"alone": graph.tuned("alone", trunk, right(60), recipe=TUNING)}
    found = rows(inputs)
    assert list(found) == ["swav", "alone"]  # the best one first
    mean, interval = mean_of_seeds([score / 100 for score in scores])
    assert (found["swav"].top1, found["swav"].interval) == (pytest.approx(mean), interval)
    assert found["swav"].scores == (0.70, 0.74, 0.75)
    metrics = inputs["alone"].receipt.metrics
    assert found["alone"].interval.low == metrics["top1_low"]
    assert found["swav"].gpu_hours == 2.0  # of the pretraining, and half an hour of each fine-tuning


def test_a_row_says_what_its_files_say_of_the_pretraining(graph: Graph) -> None:
    tags = graph.stage("hashtags", "tags", metrics={"tagged_share": 0.2})
    hashtags = graph.trunk("hashtags", recipe=PRETRAINING, tags=tags)
    features = graph.stage("features", "features", inputs={"trunk": hashtags})
    found = rows(
        {
            "hashtags": graph.tuned("h", hashtags, 100, recipe=TUNING),
            "scratch": graph.tuned("s", graph.stage("random_trunk", "r"), 90, recipe=BY_STEPS),
            "linear": graph.stage("linear", "l", inputs={"features": features}, metrics={"top1": 0.5}),
        },
        "hashtags",
    )
    row = found["hashtags"]
    assert (row.method, row.images, row.images_seen, row.tagged_share) == ("SwAV", 60, 1200, 0.2)
    assert (row.curated, row.linear, row.setup.px, row.setup.epochs) == (True, 0.5, 16, 3.0)
    assert row.setup.test_set == (100, 4)
    scratch = found["scratch"]
    assert (scratch.method, scratch.images_seen, scratch.linear) == ("nothing learned", 0, None)
    assert scratch.curated is False
    assert scratch.setup.epochs == 20  # 100 steps of 12 of 60 images


def test_size_is_counted_as_timm_counts_it(graph: Graph) -> None:
    """timm: 83.6 M parameters with 1,000 classes, 46.9 GMAC at 384 px."""
    trunk = graph.trunk("large", recipe=PRETRAINING)
    tuned = graph.tuned("l", trunk, 50, recipe=imagenet("regnety_16gf"), px=384, classes=1000)
    row = rows({"large": tuned})["large"]
    assert row.parameters == pytest.approx(83.6e6, rel=1e-3)
    assert row.gmac == pytest.approx(46.9, rel=5e-3)


SETUP = Setup(trunk="regnety_32gf", px=384, epochs=40, test_set=(50_000, 1_000))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, []),
        ({"epochs": 40.4}, []),
        ({"trunk": "resnet50"}, ["trunk"]),
        ({"px": 224}, ["px"]),
        ({"epochs": 20}, ["epochs"]),
        ({"epochs": None}, ["epochs not known"]),
        ({"test_set": (10_000, 1_000)}, ["test set"]),
        ({"test_set": (50_000, 10)}, ["test set"]),
        ({"metric": "top-5"}, ["metric"]),
        ({"px": None, "trunk": "resnet50"}, ["trunk", "px not known"]),
    ],
)
def test_only_what_agrees_in_all_is_comparable(change: dict[str, Any], reason: list[str]) -> None:
    assert differences(SETUP, replace(SETUP, **change)) == reason
    assert differences(replace(SETUP, **change), SETUP) == reason


def test_the_page_holds_ours_against_the_published_row_that_was_come_by_alike(
    graph: Graph, tmp_path: Path
) -> None:
    trunk = graph.trunk("large", recipe=PRETRAINING)
    tested = {"px": 384, "classes": 1000, "samples": 50_000, "top1": 0.8432}
    large = graph.tuned("l", trunk, 50, recipe=imagenet("regnety_32gf"), **tested)
    small = graph.tuned("s", trunk, 50, recipe=TUNING, px=32)
    html, plain, metrics = page({"<large>": large, "small": small}, tmp_path / "page")
    assert metrics == {"top1_<large>": 0.8432, "top1_small": 0.8, "comparable": 1}
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", "", html))
    assert text.count("comparable with &lt;large&gt;, which is at +1.0 points") == 1
    assert "not comparable with small: trunk, px, epochs, test set" in text
    assert "<large>" not in html
    alike = [each for row in plain["figure_2"] for each in row["comparable"] if not each["differs"]]
    assert [each["names"] for each in alike] == [["<large>"]]
    # Ours stand in the chart of 384 px, and beside no published value where they were tested otherwise.
    charts = sorted(path.name for path in (tmp_path / "page" / "charts").iterdir())
    assert charts == [
        *("2021-gpu_hours.svg", "2021-parameters.svg", "2022-gmac.svg", "2022-gpu_hours.svg"),
        *("2022-parameters.svg", "here-1-gmac.svg", "here-1-gpu_hours.svg", "here-1-parameters.svg"),
    ]
    titles = {
        name: [
            each.text or ""
            for each in ElementTree.parse(tmp_path / "page" / "charts" / name).iter(f"{SVG}title")
        ]
        for name in charts
    }
    assert len(titles["2021-parameters.svg"]) == 17
    assert len(titles["2022-parameters.svg"]) == 12 + 1
    assert [title.partition(":")[0] for title in titles["here-1-parameters.svg"]] == ["small"]
    assert sum(title.startswith("<large>: 84.3 %") for title in titles["2022-gmac.svg"]) == 1


def test_the_years_share_no_chart_and_every_value_names_its_source(graph: Graph, tmp_path: Path) -> None:
    trunk = graph.trunk("swav", recipe=PRETRAINING)
    html, _, _ = page({"swav": graph.tuned("s", trunk, 50, recipe=TUNING)}, tmp_path / "page")
    svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    tooltips = [" ".join(title.text or "" for title in svg.iter("title")) for svg in svgs]
    assert not any("224 px" in text and "384 px" in text for text in tooltips)
    for era in ERAS:
        for family in era.families:
            for point in family.points:
                shown = [t for t in tooltips if f"{family.name} {point.model}".strip() in t]
                assert any(family.source.name in text for text in shown)
    sources = {claim.source for claims in CLAIMS.values() for claim in claims}
    assert all(source.url in html and source.measured[:40] in html for source in sources)


def test_p_is_of_the_images_for_single_trainings_and_of_the_seeds_for_several(graph: Graph) -> None:
    trunk = graph.trunk("swav", recipe=PRETRAINING)

    def tuned(name: str, count: int) -> Input:
        return graph.tuned(name, trunk, right(count), recipe=TUNING)

    single = rows({"best": tuned("b", 90), "worse": tuned("w", 80), "elsewhere": tuned("b2", 90)})
    assert (single["best"].p, single["worse"].against) == (None, "best")
    assert single["worse"].p == pytest.approx(2 * 2 * 0.5**10)  # 10 images, one side, corrected for two
    assert single["elsewhere"].p == 1
    seeds = {f"a_seed{n}": tuned(f"a{n}", 80 + n) for n in range(3)} | {
        f"b_seed{n}": tuned(f"b{n}", 70 + n) for n in range(3)
    }
    found = rows(seeds | {"alone": tuned("alone", 60)})
    assert found["b"].p == pytest.approx(0.000257, rel=0.01)  # t = 12.247 of 4 degrees
    assert found["alone"].p is None  # one training says nothing of others


def test_what_makes_no_row_is_refused_with_the_way_out(graph: Graph) -> None:
    trunk = graph.trunk("swav", recipe=PRETRAINING)
    tuned = graph.tuned("t", trunk, 50, recipe=TUNING)
    other = graph.tuned("o", trunk, 50, recipe=TUNING, px=32)
    untested = replace(tuned, receipt=tuned.receipt.model_copy(update={"metrics": {"loss": 1.0}}))
    strange = graph.stage("features", "f", inputs={"trunk": graph.trunk("barlow", recipe=PRETRAINING)})
    linear = graph.stage("linear", "l", inputs={"features": strange}, metrics={"top1": 0.5})
    for inputs, message in (
        ({"a": trunk}, "input a is a stage of kind export: figures are made from stages of kind finetune"),
        ({"a": linear}, "there is no classifier to show: give figures a stage of kind finetune"),
        ({"a": tuned, "l": linear}, "no fine-tuning there starts from it: leave it out"),
        ({"a": untested}, "input a was not tested: give that stage of kind finetune the input test"),
        ({"a_seed0": tuned, "a_seed1": other}, "a_seed0 and a_seed1 differ in px: they are no seeds"),
        ({"a_seed0": tuned, "a_seed1": tuned}, "the seeds of a are the same training more than once"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            read_rows(inputs, curated=())
    with pytest.raises(UserError, match="curated names b, and there is no such row: there are a"):
        read_rows({"a": tuned}, curated=["b"])


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (35, 1297, [20, 50, 100, 200, 500, 1000, 2000]),
        (0.0255, 0.0255, [0.01, 0.02, 0.05, 0.1]),
        (1, 1, [0.5, 1, 2]),
        (3, 4, [1, 2, 5, 10]),
        (0.002, 98_304, [0.002, 0.01, 0.1, 1, 10, 100, 1000, 10_000, 100_000]),
    ],
)
def test_ticks_of_a_logarithmic_axis_include_its_values(low: float, high: float, wanted: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(wanted)


def test_marks_of_one_size_stand_side_by_side_with_names_apart_and_inside() -> None:
    marks = [
        (f"a name that is long {n}", Mark(x=5.0, y=0.9 + n / 1e4, text="", interval=(0.8, 1.2)))
        for n in range(6)
    ]
    chart = scatter_chart(
        [Trace(name="SEER", tone="t1", marks=[Mark(x=1, y=0.5, text="")])], marks, title="", x_label=""
    )
    circles = re.findall(r'class="solid" cx="([\d.]+)" cy="([\d.]+)" r="4"/></g>', chart)
    assert len({x for x, _ in circles}) == 6
    names = re.findall(r'class="value name" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)"', chart)
    assert np.diff(sorted(float(y) for _, y, _ in names)).min() > 11
    assert {side for _, _, side in names} == {"end"}
    assert "100 %" in chart and "120 %" not in chart
    ElementTree.fromstring(standalone(chart, environment().get_template("page.css").render()))
