"""The table beside published accuracies, and the graphs that end in it."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from in_this_process import InThisProcess
from test_report import Page
from tiny_training import make_dataset

from cluster.errors import UserError
from cluster.typed_yaml import load_recipe
from pipeline.dag.graph import build_graph, closing_lines, run_graph
from pipeline.dag.recipe import load_dag
from pipeline.dag.stage import Receipt
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.report import cifar10
from pipeline.report.cifar10 import write_table
from pipeline.report.published import METHODS, SOLO_LEARN, Evaluation
from pipeline.stages.kinds import KINDS


def receipt(metrics, recipe=None):
    return SimpleNamespace(
        receipt=SimpleNamespace(metrics=metrics, recipe=recipe, seconds=3700.0, machine="a GPU machine")
    )


def inputs(*, epochs, knn=0.863, trunk=None, **changes):
    """What the graph hands to the table after the shipped recipes at another length, or changed otherwise."""
    made = {"data": receipt({"kept": 50_000})}
    crop, counts = changes.pop("crop", {}), {"train_samples": 50_000, "test_samples": 10_000, "k": 200}
    counts |= changes
    for method in METHODS:
        recipe = load_recipe(PretrainRecipe, f"cifar10_{method}", kind="pretrain").model_dump(mode="json")
        recipe["trunk"] |= trunk or {}
        recipe["data"]["crops"] = [group | crop for group in recipe["data"]["crops"]]
        made[f"run_{method}"] = receipt({"step": epochs * (50_000 // 256)}, recipe)
        scores = {"top1": knn, "top1_low": knn - 0.007, "top1_high": knn + 0.007} | counts
        made[f"knn_{method}"] = receipt(scores, {"temperature": 0.1})
        made[f"linear_{method}"] = receipt(scores | {"top1": 0.9})
    for probe in ("knn", "linear"):
        made[f"{probe}_random"] = receipt({"top1": 0.3, "top1_low": 0.29, "top1_high": 0.31})
    return made


def table(folder):
    """The rows of results.md, by column."""
    rows = [
        [text.strip() for text in line.strip("|").split("|")]
        for line in (folder / "results.md").read_text().splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def verdicts(folder, method):
    """(where, epochs, batch) → whether a published row of a method can be compared."""
    return {
        (row["Where"], row["Epochs"], row["Batch"]): row["Comparable"]
        for row in table(folder)
        if row["Method"] == method and row["Where"] != "here"
    }


def test_runs_of_200_epochs_stand_beside_the_published_ones_of_200(tmp_path):
    """The recipes are solo-learn's. Lightly's stem pads by 1, it crops with bilinear, normalises as ImageNet
    is normalised, and publishes the best of all epochs."""
    metrics = write_table(inputs(epochs=200), tmp_path)
    assert metrics["knn_byol"] == 0.863
    assert metrics["linear_simsiam"] == 0.9
    assert metrics["comparable"] == 0
    assert verdicts(tmp_path, "BYOL") == {
        ("lightly", "200", "128"): "no: stem, interpolation, augmentation, evaluation",
        ("lightly", "200", "512"): "no: stem, interpolation, augmentation, evaluation",
        ("lightly", "800", "512"): "no: stem, epochs, interpolation, augmentation, evaluation",
        ("solo-learn", "1000", "256"): "no: epochs, evaluation",
    }
    rows = table(tmp_path)
    ours = next(row for row in rows if (row["Method"], row["Where"]) == ("BYOL", "here"))
    assert (ours["kNN, %"], ours["Linear, %"]) == ("86.3 (85.6 to 87.0)", "90.0 (85.6 to 87.0)")
    assert (ours["Epochs"], ours["Steps"], ours["Batch"]) == ("200", "39,000", "256")
    assert ours["Trunk"] == "resnet18, 3x3 stem, padded, 11.17 M"
    theirs = [row["kNN, %"] or row["Linear, %"] for row in rows if row["Where"] in ("lightly", "solo-learn")]
    assert theirs == [
        *("81.2", "84.2", "88.4", "89.2"),
        *("84.2", "81.9", "85.9", "92.1"),
        *("86.9", "86.8", "91.0", "92.6"),
        *("81.9", "76.4", "90.4", "90.5"),
    ]


def test_after_1000_epochs_only_the_evaluation_of_the_linear_rows_is_another(tmp_path):
    """Theirs learns beside the pretraining, from augmented views."""
    assert write_table(inputs(epochs=1000), tmp_path)["comparable"] == 0
    for name in METHODS.values():
        assert verdicts(tmp_path, name)["solo-learn", "1000", "256"] == "no: evaluation"


@pytest.fixture
def measured_as_ours(monkeypatch):
    """A published row of each method: 200 epochs of solo-learn's recipe, measured as accuracies here are."""
    evaluation = Evaluation(probe="knn", classifier="k = 200, T = 0.1", checkpoint="last")
    source = replace(SOLO_LEARN, evaluation=evaluation)
    rows = {
        method: (replace(rows[-1], source=source, epochs=200),) for method, rows in cifar10.PUBLISHED.items()
    }
    monkeypatch.setattr(cifar10, "PUBLISHED", rows)


@pytest.mark.usefixtures("measured_as_ours")
def test_what_agrees_in_all_is_compared(tmp_path):
    assert write_table(inputs(epochs=200), tmp_path)["comparable"] == 4
    assert verdicts(tmp_path, "SwAV")["solo-learn", "200", "256"] == "yes, ours -2.9"


@pytest.mark.usefixtures("measured_as_ours")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train_samples": 49_999}, "no: images"),
        ({"test_samples": 100}, "no: images"),
        ({"k": 20}, "no: evaluation"),
        ({"trunk": {"name": "resnet50"}}, "no: trunk"),
        ({"trunk": {"stem": "imagenet"}}, "no: stem"),
        ({"trunk": {"stem": "low_resolution"}}, "no: stem"),
        ({"crop": {"interpolation": "bilinear"}}, "no: interpolation"),
        ({"crop": {"scale": [0.2, 1.0]}}, "no: augmentation"),
        ({"crop": {"photometric": {}}}, "no: augmentation"),
        ({"epochs": 199}, "no: epochs"),
    ],
)
def test_what_differs_from_a_published_row_is_named(tmp_path, changes, reason):
    write_table(inputs(**{"epochs": 200} | changes), tmp_path)
    assert verdicts(tmp_path, "SimSiam")["solo-learn", "200", "256"] == reason


def test_a_run_in_another_methods_place_is_refused(tmp_path):
    made = inputs(epochs=200)
    made["run_byol"] = made["run_swav"]
    with pytest.raises(UserError, match="run_byol is a run of swav: name a stage of byol"):
        write_table(made, tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar10_cpu"])
def test_one_override_sets_the_length_of_all_four(name, tmp_path):
    make_dataset(tmp_path)
    sources = [f"stages.{part}.recipe.source={tmp_path / 'images'}" for part in ("train", "test")]
    recipe = load_dag(name, [*sources, "stages.pretrain_*.recipe.train.epochs=7"])
    stages = {stage.name: stage for stage in build_graph(recipe, KINDS)}
    assert {f"pretrain_{method}": 7 for method in METHODS} == {
        name: stage.recipe.train.epochs for name, stage in stages.items() if stage.kind_name == "pretrain"
    }
    assert [stages[f"pretrain_{method}"].recipe.method.name for method in METHODS] == list(METHODS)
    one = load_dag(name, ["stages.pretrain_byol.recipe.train.epochs=7"]).stages
    assert one["pretrain_swav"].recipe["train"]["epochs"] != 7


@pytest.mark.slow
def test_the_graph_runs_to_its_table(tmp_path):
    make_dataset(tmp_path)
    tiny = [
        f"folder={tmp_path / 'out'}",
        f"stages.train.recipe.source={tmp_path / 'images'}",
        f"stages.test.recipe.source={tmp_path / 'images'}",
        "stages.pretrain_*.recipe.train={steps: 2}",
        "stages.pretrain_*.recipe.trunk={name: regnety_tiny, stem: low_resolution}",
        "stages.pretrain_*.recipe.data.batch_size=12",
        "stages.pretrain_*.recipe.run={device: cpu, workers: 0, log_every: 1, resident: true}",
        "stages.trunk_random.recipe={run: {workers: 0, device: cpu}}",
        "stages.features_*.recipe={run: {workers: 0, device: cpu}}",
        "stages.knn_*.recipe.k=[5]",
        "stages.linear_*.recipe={regularisation: [0.01]}",
    ]
    recipe = load_dag("cifar10_cpu", tiny)
    lines = []
    results = run_graph(build_graph(recipe, KINDS), InThisProcess(), say=lines.append)
    assert all(isinstance(result, Receipt) for result in results.values()), lines
    assert results["table"].metrics["knn_swav"] == results["knn_swav"].metrics["top1"]
    assert results["table"].metrics["comparable"] == 0
    folder = tmp_path / "out" / "latest" / "table"
    assert verdicts(folder, "Barlow Twins")["solo-learn", "1000", "256"] == (
        "no: trunk, stem, epochs, images, interpolation, augmentation, evaluation"
    )
    page = Page((folder / "results.html").read_text())
    text = " ".join(" ".join(page.text).split())
    assert page.tags.count("tr") == 1 + 4 * 5 + 1
    assert "0 of the 16 published accuracies can be compared with ours" in text
    assert "https://github.com/vturrisi/solo-learn" in text
    shown = closing_lines(recipe, results)
    assert [re.split(r"\s{2,}", line)[0] for line in shown][::2][:4] == [
        f"{name}, kNN" for name in METHODS.values()
    ]
    assert shown[-1].endswith("out/latest/table/results.html")
