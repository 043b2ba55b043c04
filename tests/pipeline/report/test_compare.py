"""Runs side by side: in a graph, on the command line, and on the page."""

from __future__ import annotations

import json
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from in_this_process import InThisProcess
from tiny_training import make_dataset, make_recipe, make_values
from typer.testing import CliRunner, Result

from cluster.errors import UserError
from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from pipeline.cli import app
from pipeline.dag.graph import build_graph, run_graph
from pipeline.dag.recipe import DagRecipe, load_dag
from pipeline.dag.stage import Receipt
from pipeline.recipe.stages import CompareRecipe
from pipeline.report.compare import compare_runs, comparison_page, what_differs
from pipeline.report.curve import MOST
from pipeline.report.figures import TONES
from pipeline.stages.kinds import KINDS
from pipeline.train.run_recipe import to_yaml

SIMSIAM = {"name": "simsiam", "projector": [8, 8], "predictor": 4}


def make_run(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """A run folder as a training leaves it, with these rows in metrics.jsonl."""
    RunFolder.create(folder).write_status(
        Status(
            state=State.COMPLETED,
            name=folder.name,
            executor="local",
            id="1",
            ranks=1,
            attempt=1,
            submitted=0.0,
        )
    )
    (folder / "recipe.yaml").write_text(to_yaml(make_recipe(Path("data"), **changes)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "lr": 0.1, "embedding_std": 0.9, "rankme": 6.0, **values}


def submit(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


class Lines(HTMLParser):
    """What is drawn on a page: of each SVG, class → the heights that its paths go through."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.panels: list[dict[str, list[float]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = {name: value or "" for name, value in attrs}
        if tag == "svg":
            self.panels.append({})
        if tag == "path" and "class" in values:
            heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", values["d"])]
            self.panels[-1][values["class"].removeprefix("line ")] = heights


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two tiny trainings, with the stop-gradient and without, and a stage that compares them."""
    folder = tmp_path_factory.mktemp("graph")
    data = make_dataset(folder)
    values = make_values(data, method=SIMSIAM, train__steps=3)
    values["data"]["crops"] = values["data"]["crops"][:1]
    values["probe"] = {"train": "x", "test": "x", "every_steps": 2, "image_size": 16, "k": 5}
    without = values | {"method": SIMSIAM | {"stop_gradient": False}, "run": values["run"] | {"log_every": 2}}
    inputs = {"data": "data/data", "probe_train": "data/data", "probe_test": "data/data"}
    recipe = DagRecipe.model_validate(
        {
            "folder": str(folder / "stages"),
            "stages": {
                "data": {"kind": "dataset", "recipe": {"path": str(data)}},
                "whole": {"kind": "pretrain", "recipe": values, "inputs": inputs},
                "without": {"kind": "pretrain", "recipe": without, "inputs": inputs},
                "compare": {
                    "kind": "compare",
                    "recipe": {"title": "Two <runs>"},
                    "inputs": {"whole": "whole", "no stop-gradient": "without"},
                },
            },
        }
    )
    results = run_graph(build_graph(recipe, KINDS), InThisProcess(), say=print)
    assert all(isinstance(result, Receipt) for result in results.values()), results
    return folder / "stages" / "latest", results


@pytest.mark.slow
def test_a_graph_compares_its_runs_under_the_names_that_it_gives_them(graph: Any) -> None:
    latest, results = graph
    receipt = results["compare"]
    assert list(receipt.outputs) == ["compare.html"]
    assert list(receipt.metrics) == ["whole", "no stop-gradient"]
    assert receipt.metrics["no stop-gradient"]["differs"] == {"method.stop_gradient": False}
    assert receipt.metrics["whole"]["last"]["knn"] == results["whole"].metrics["knn"]
    page = (latest / "compare" / "compare.html").read_text()
    assert "Two &lt;runs&gt;" in page
    assert "method.stop_gradient=false" in page
    lines = Lines(page)
    assert [panel.keys() - {"floor"} for panel in lines.panels] == [{"t1", "t2"}] * 5
    assert {"script", "link", "img"}.isdisjoint(lines.tags)  # it needs nothing else
    assert "default-src 'none'" in page


def test_the_command_prints_a_table_or_json_and_writes_the_page(graph: Any, tmp_path: Path) -> None:
    latest, results = graph
    words = ("compare", latest / "whole", "without", "--folder", latest, "--out", tmp_path / "new" / "x.html")
    result = submit(*words)
    assert result.exit_code == 0, result.output
    table = {line.split()[0]: line for line in result.output.splitlines()}
    assert "method.stop_gradient=true" in table["whole"]
    assert "method.stop_gradient=false" in table["without"]
    assert "log_every" not in result.output and "simsiam" not in result.output
    metrics = results["without"].metrics
    wanted = [f"{metrics[key]:.4g}" for key in ("loss", "embedding_std", "rankme", "knn")]
    assert table["without"].split()[2:7] == ["3", *wanted]
    assert Lines((tmp_path / "new" / "x.html").read_text()).panels
    told = json.loads(submit(*words, "--json").output)
    assert [run["name"] for run in told] == ["whole", "without"]
    assert told[1]["last"] == metrics | {"epoch": told[1]["last"]["epoch"]}


def test_every_run_has_one_tone_in_all_panels_and_thresholds_are_at_their_height(tmp_path: Path) -> None:
    at_threshold = [row(step, embedding_std=0.1, rankme=2.0, knn=40.0) for step in (1, 2)]
    folders = {str(n): make_run(tmp_path / str(n), [row(1), row(2)]) for n in range(len(TONES) - 1)}
    folders["last"] = make_run(tmp_path / "last", at_threshold)
    loss, lr, spread, rank, knn = Lines(comparison_page(compare_runs(folders), CompareRecipe())).panels
    assert loss.keys() == {*TONES} and lr.keys() == {*TONES}
    for panel in (spread, rank):
        assert panel.keys() == {*TONES, "floor"}
        assert panel["floor"] == panel[TONES[-1]][:1] == panel[TONES[-1]][1:]
        assert len(set(panel["t1"] + panel["floor"])) == 2
    assert knn.keys() == {TONES[-1]}  # the others were not probed, and kNN has no threshold


def test_runs_that_recorded_less_have_a_page_too(tmp_path: Path) -> None:
    folders = {name: make_run(tmp_path / name, [row(1), row(2)]) for name in ("a", "b")}
    folders["c"] = make_run(tmp_path / "c", [{"step": 1, "loss": 1.0, "embedding_std": None}])
    page = comparison_page(compare_runs(folders), CompareRecipe())
    assert "No numbers were recorded for Nearest-neighbour accuracy" in page


@pytest.mark.slow
def test_a_long_run_costs_the_memory_and_the_page_of_a_screen(tmp_path: Path) -> None:
    short = make_run(tmp_path / "short", [row(step) for step in range(1, 50)])
    long = make_run(tmp_path / "long", [])
    line = json.dumps(row(0, embedding_std=0.05))
    with (long / "metrics.jsonl").open("w") as file:
        for step in range(1, 30_001):
            values = row(step) if step != 20_001 else row(step, embedding_std=0.05, knn=40.0)
            file.write(json.dumps(values) + "\n")
    tracemalloc.start()
    runs = compare_runs({"short": short, "long": long})
    page = comparison_page(runs, CompareRecipe())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * len(line) * MOST
    assert len(page) < 200_000
    _, _, spread, rank, knn = Lines(page).panels
    assert [len(panel["t1"]) for panel in (spread, rank)] == [49, 49]
    assert MOST // 8 < len(spread["t2"]) < MOST
    assert max(spread["t2"]) > 2 * spread["t2"][0]  # the one row that has fallen
    assert knn.keys() == set()  # a single point is no line
    assert page.count("thinned to the first, lowest, highest and last value of every 32 steps") == 4
    assert [(sign.name, sign.step) for sign in runs[1].collapse] == [("embedding_std", 20_001)]


def test_a_collapse_is_told_once_the_warm_up_is_over(tmp_path: Path) -> None:
    rows = [
        row(4, embedding_std=0.01),  # make_values warms up for four steps
        row(5, rankme=None, skipped=[]),
        row(6, embedding_std=0.05),
        row(7, embedding_std=0.02, rankme=1.5),
    ]
    well, fallen = make_run(tmp_path / "well", [row(5)]), make_run(tmp_path / "fallen", rows)
    with (fallen / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the run still writes
    runs = compare_runs({"well": well, "fallen": fallen})
    assert runs[0].collapse == []
    assert [(sign.name, sign.step, sign.value) for sign in runs[1].collapse] == [
        ("embedding_std", 6, 0.05),
        ("rankme", 7, 1.5),
    ]
    assert runs[1].last["step"] == 7
    assert "embedding_std 0.05 at step 6, rankme 1.5 at step 7" in submit(
        "compare", well, fallen, "--out", tmp_path / "x.html"
    ).output.replace("\n", " ")
    assert "embedding_std was 0.05 at step 6" in (tmp_path / "x.html").read_text()


def test_runs_of_different_methods_are_told_by_their_method_not_by_its_every_key(tmp_path: Path) -> None:
    crops = [{"count": 1, "size": 16, "scale": [0.3, 1.0]}, {"count": 1, "size": 8, "scale": [0.1, 0.3]}]
    one = make_run(tmp_path / "one", [row(5)], method=SIMSIAM, data__crops=crops)
    byol = {"name": "byol", "projector": [8, 8], "predictor": None}
    two = make_run(tmp_path / "two", [row(5)], method=byol, data__crops=crops[:1], optim__lr=0.5)
    swav = make_run(tmp_path / "swav", [row(5)], data__crops=crops)
    runs = compare_runs({"one": one, "two": two, "swav": swav})
    texts = [run.differs_in() for run in runs]
    assert "method.name=simsiam" in texts[0] and "method.predictor=4" in texts[0]
    assert "method.predictor=null" in texts[1] and "optim.lr=0.5" in texts[1]
    assert [text for text in texts[2] if text.startswith("method.")] == ["method.name=swav"]
    assert not any("projector" in text or "stop_gradient" in text for text in texts[0] + texts[1])
    assert [any(text.startswith("data.crops.1={") for text in each) for each in texts] == [True, False, True]


def test_what_is_the_same_does_not_differ() -> None:
    tree = {"a": 1, "b": {"c": [1, 2], "d": None}}
    assert what_differs([tree, tree, tree]) == {}
    assert what_differs([tree, tree, {"a": 1, "b": {"c": [1, 3], "d": None}}]) == {
        "b.c": [[1, 2], [1, 2], [1, 3]]
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["good"], "there is 1 run to compare: name two at least, and 8 at most"),
        (["good", "good"], "a run is named twice"),
        (["good", "nowhere"], "there is no run nowhere: "),
        (["good", "silent"], "silent has no metrics yet"),
        (["good", "nan"], "nan has no metrics yet"),
        (["good", "other"], "other is not a run of pretraining: it has no recipe.yaml"),
        ([f"good{n}" for n in range(9)], "there are 9 runs to compare"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(tmp_path: Path, words: list[str], told: str) -> None:
    for name in {*words, "good"} - {"nowhere"}:
        rows = {"silent": [], "nan": [row(1, loss=None)]}
        make_run(tmp_path / name, rows.get(name, [row(1)]))
    if "other" in words:
        (tmp_path / "other" / "recipe.yaml").unlink()
    result = submit("compare", *words, "--folder", tmp_path, "--out", tmp_path / "x.html")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert told in result.stderr
    assert not (tmp_path / "x.html").exists()


def test_two_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / place / "run", [row(1)]) for place in ("a", "b")]
    told = json.loads(submit("compare", *paths, "--json", "--out", tmp_path / "x.html").output)
    assert [run["name"] for run in told] == [str(path) for path in paths]


def test_a_graph_that_compares_one_run_is_refused_before_anything_runs() -> None:
    recipe = load_dag("collapse", [])
    section = recipe.stages["compare"].model_copy(update={"inputs": {"alone": "simsiam"}})
    with pytest.raises(UserError, match=r"stage compare: compare needs 2 inputs at least, .* it has 1"):
        build_graph(recipe.model_copy(update={"stages": {**recipe.stages, "compare": section}}), KINDS)


def test_the_shipped_pairs_differ_in_the_safeguard_alone() -> None:
    stages = {stage.name: stage for stage in build_graph(load_dag("collapse", []), KINDS)}
    compared = [source.stage.name for source in stages["compare"].inputs.values()]
    safeguards = []
    for one, other in zip(compared[::2], compared[1::2], strict=True):
        recipes = [stages[name].recipe.model_dump(mode="json", exclude={"run"}) for name in (one, other)]
        safeguards.append(what_differs(recipes))
    assert safeguards == [
        {"method.stop_gradient": [True, False]},
        {"method.predictor": [256, None]},
        {"method.off_diagonal_weight": [0.0051, 0]},
    ]
