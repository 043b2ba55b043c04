"""The shipped demo graph at its smallest, on a user's pictures, and the page it ends in."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from in_this_process import InThisProcess
from PIL import Image
from tiny_training import make_recipe

from cluster.errors import UserError
from cluster.typed_yaml import read_yaml
from pipeline.dag.digests import content_digest
from pipeline.dag.graph import build_graph, closing_lines, run_graph
from pipeline.dag.recipe import load_dag
from pipeline.dag.stage import Input, Receipt
from pipeline.recipe.stages import ReportRecipe
from pipeline.report.figures import Bar, Series, bar_chart, doubling_ticks, line_chart, ticks
from pipeline.report.page import duration, environment
from pipeline.report.per_class import per_class
from pipeline.report.run_report import build_report
from pipeline.report.scores import SCORED_TRUNKS, scores_given, several_labels, shots_in
from pipeline.report.training_curves import training_curves
from pipeline.stages.kinds import KINDS
from pipeline.train.loop import pretrain
from pipeline.transfer.features import Features, load_features

HOSTILE = "<script>alert('x')</script>"
SMALL = [
    "stages.photographs.recipe.tile_size=16",
    "stages.photographs.recipe.train_tiles=240",
    "stages.photographs.recipe.test_tiles=40",
    "stages.pretrain.recipe.data.batch_size=16",
    "stages.pretrain.recipe.data.crops="
    "[{count: 2, size: 16, scale: [0.3, 1.0]}, {count: 1, size: 8, scale: [0.1, 0.3]}]",
    "stages.pretrain.recipe.trunk={name: regnety_tiny, stem: low_resolution}",
    "stages.pretrain.recipe.method={name: swav, head: {hidden: [8], output: 8}, prototypes: 8}",
    "stages.pretrain.recipe.train={steps: 4}",
    "stages.pretrain.recipe.probe={train: x, test: x, every_steps: 2, image_size: 16, k: 5}",
    "stages.pretrain.recipe.run={log_every: 1, workers: 0, device: cpu}",
    "stages.pixels.recipe.size=4",
    "stages.linear*.recipe.regularisation=[0.1, 1]",
    "stages.report.recipe.crop_rows=2",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number, label in enumerate((HOSTILE.replace("/", "\\"), "waves", "grain")):
        for index in range(5 if label == "waves" else 1):
            pixels = rng.integers(0, 255, (60, 8 + 8 * number, 3), dtype=np.uint8)
            path = folder / label / f"{index}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).resize((90, 60)).save(path)
    (folder / "waves" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    return folder


@pytest.fixture(scope="module")
def demo(pictures, tmp_path_factory):
    """run(*overrides) → results, lines, and the folder; the first call has run everything."""
    folder = tmp_path_factory.mktemp("demo")

    def run(*overrides):
        words = [f"folder={folder}", f"stages.photographs.recipe.images={pictures}", *SMALL, *overrides]
        recipe = load_dag("demo", words)
        lines = []
        results = run_graph(build_graph(recipe, KINDS), InThisProcess(), say=lines.append)
        assert all(isinstance(result, Receipt) for result in results.values()), lines
        return results, lines, closing_lines(recipe, results)

    run()
    return run, folder


def names(lines, how):
    return {line.split()[0] for line in lines if line.split()[1] == how}


@pytest.mark.slow
def test_C2_the_demo_reruns_nothing_and_a_change_reruns_exactly_its_descendants(demo):
    run, _ = demo
    results, lines, closing = run()
    assert names(lines, "reused") == set(results)
    assert [line.split("  ")[0] for line in closing] == [
        "kNN accuracy, trained trunk",
        "kNN accuracy, random trunk",
        "kNN accuracy, raw pixels",
        "report",
    ]
    assert all(re.search(r"\d+\.\d % \(\d+\.\d to \d+\.\d\)$", line) for line in closing[:3])
    _, lines, _ = run("stages.knn_pixels.recipe.temperature=0.2")
    assert names(lines, "done") == {"knn_pixels", "report"}
    _, lines, _ = run("stages.test.recipe.unit_rows=7")
    unchanged = {"photographs", "train", "pretrain", "trunk", "random_trunk", "pixels"}
    assert names(lines, "reused") == unchanged  # test images only watch a pretraining


@pytest.mark.slow
def test_receipts_hold_what_happened(demo):
    results, _, _ = demo[0]()
    assert results["train"].metrics["kept"] == 240
    assert results["pretrain"].metrics["step"] == 4
    assert set(results["pretrain"].outputs) == {"checkpoints", "recipe.yaml", "metrics.jsonl", "timing.jsonl"}
    digest = content_digest(demo[1] / "latest" / "pretrain" / "checkpoints")
    assert results["pretrain"].outputs["checkpoints"] == digest  # as the manifests know it, too
    assert results["pretrain"].recipe["data"]["sealed"] is None
    resolved = read_yaml(demo[1] / "latest" / "pretrain" / "recipe.yaml")
    assert resolved["data"]["sealed"] == results["train"].metrics["root"]  # pinned for life
    assert results["random_trunk"].metrics["feature_dim"] == results["trunk"].metrics["feature_dim"]
    assert results["pixels"].metrics["feature_dim"] == 3 * 4 * 4
    assert results["knn"].metrics["test_samples"] == 40
    assert results["knn"].gpu_hours == 0
    assert results["photographs"].metrics["skipped_files"] == 1


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing_else_and_escapes_labels(demo):
    _, folder = demo
    source = (folder / "latest" / "report" / "report.html").read_text()
    page = Page(source)
    assert "script" not in page.tags
    assert {"link", "iframe", "object"}.isdisjoint(page.tags)
    for tag, attributes in page.attributes:
        assert all(attributes.get(key, "data:").startswith("data:") for key in ("src", "href")), tag
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["role"] in ("img", "group")  # charts whose values are read are groups
            assert len(attributes["aria-label"]) > 10
    assert "url(" not in source
    assert "@import" not in source
    assert len(source) < 3_000_000
    assert any(HOSTILE.replace("/", "_") in text for text in page.text)


def test_the_page_says_what_was_done(demo):
    run, folder = demo
    results, _, _ = run()
    text = " ".join(" ".join(Page((folder / "latest" / "report" / "report.html").read_text()).text).split())
    for phrase in (
        "name of a sub-folder",
        "whole pictures were set aside for testing (5 of 7 pictures",
        "Test tiles are grey",
        "BatchNorm statistics calibrated on images of the pretraining",
        "Guessing gives 33.3 %",
        results["train"].metrics["root"],
        "1 rank on",
        "Nearest-neighbour accuracy",
        "regnety_tiny",
    ):
        assert phrase in text, phrase
    for name in ("knn", "knn_random", "knn_pixels", "linear"):
        assert f"{100 * results[name].metrics['top1']:.1f}" in text


def test_a_swav_report_shows_prototypes_and_one_of_another_method_does_not(demo, tmp_path):
    run, folder = demo
    results, _, _ = run()
    text = " ".join(" ".join(Page((folder / "latest" / "report" / "report.html").read_text()).text).split())
    assert "Each of the 240 images of the pretraining was given to the prototype" in text
    assert "of the 8 prototypes were given any image" in text
    roles = load_dag("demo", []).stages["report"].inputs
    inputs = {
        role: Input(path=folder / "latest" / stage, receipt=results[stage]) for role, stage in roles.items()
    }
    method = {"name": "barlow_twins", "projector": [8]}
    crops = [{"count": 2, "size": 16, "scale": [0.3, 1.0]}]
    pretrain(
        make_recipe(inputs["data"].path, method=method, data__crops=crops, train={"steps": 1}),
        tmp_path / "run",
    )
    inputs["run"] = Input(path=tmp_path / "run", receipt=results["pretrain"])
    for role in ("linear", "linear_random", "linear_pixels", "knn_pixels"):
        del inputs[role]
    page = tmp_path / "report.html"
    build_report(inputs, ReportRecipe(crop_rows=1), page, device=torch.device("cpu"))
    text = " ".join(" ".join(Page(page.read_text()).text).split())
    assert "pretrained with Barlow Twins" in text
    assert "sees as one thing" not in text
    assert "Two kinds of features go through the same test:" in text  # the scores that were given, no others
    assert "kNN top-1 top-5 trained trunk" in text
    assert "linear top-1" not in text and "Linear probe" not in text and "Regularisation" not in text
    del inputs["knn_random"]
    build_report(inputs, ReportRecipe(crop_rows=1), page, device=torch.device("cpu"))
    text = " ".join(" ".join(Page(page.read_text()).text).split())
    assert "go through the same test" not in text and "BatchNorm statistics" not in text


def test_labels_are_scored_one_by_one_by_the_knn_of_the_page(demo):
    run, folder = demo
    results, _, _ = run()
    features = [load_features(folder / "latest" / "features" / f"{p}.safetensors") for p in ("train", "test")]
    knn = results["knn"].recipe
    given = {"k": knn["k"][0], "temperature": knn["temperature"], "seed": 0, "device": torch.device("cpu")}
    found = per_class(*features, **given)
    right = round(40 * results["knn"].metrics["top1"])
    assert f"{right} of 40 images were given their label" in found.confusion
    counts = re.findall(r"<title>([^<]*) taken for ([^<]*): (\d+) of (\d+)</title>", found.confusion)
    assert sum(int(count) for _, _, count, _ in counts) == 40
    assert sum(int(count) for true, said, count, _ in counts if true == said) == right
    for true, said, count, total in counts:
        if true == said:
            assert f"{100 * int(count) / int(total):.1f} %" in found.accuracies
    page = (folder / "latest" / "report" / "report.html").read_text()
    assert found.confusion in page and found.accuracies in page
    assert "A map of the features" in page
    many = Features(
        x=torch.rand(41, 3), y=torch.arange(41), keys=torch.arange(41), classes=tuple(map(str, range(41)))
    )
    assert per_class(many, many, **given) is None  # no screen has room for them


def test_a_report_without_a_score_of_the_trained_trunk_is_refused():
    scored = Input(path=None, receipt=SimpleNamespace(metrics={"top1": 0.5}))
    assert scores_given({"knn": scored, "data": scored}) == {"knn": {"trained": {"top1": 0.5}}}
    with pytest.raises(UserError, match="give it one input at least of knn, knn_random, knn_pixels, linear"):
        scores_given({"data": scored})
    with pytest.raises(
        UserError, match=r"a score linear of the raw pixels, .*: give it the input linear, too"
    ):
        scores_given({"knn": scored, "linear_pixels": scored})


def test_scores_of_images_with_several_labels_have_a_table():
    def scored(**few):
        metrics = {"map": 0.5, "map_low": 0.45, "map_high": 0.55, "map_interpolated": 0.5}
        return Input(
            path=None,
            receipt=SimpleNamespace(
                metrics={**metrics, "map_eleven_points": 0.49, "map_scikit_learn": 0.48, **few}
            ),
        )

    of_trunks = several_labels(
        {
            "svm": scored(map_1_shots=0.2, spread_1_shots=0.034, map_16_shots=0.4, spread_16_shots=0.01),
            "svm_random": scored(),
            "knn": scored(),
        }
    )
    page = environment().get_template("several_labels.html")
    text = page.render(several_labels=of_trunks, shots=shots_in(of_trunks), trunk_names=SCORED_TRUNKS)
    assert re.findall(r"<th[^>]*>([^<]+)</th>", text) == [
        "all images",
        "11 points",
        "scikit-learn",
        "1 with it",
        "16 with it",
        "trained trunk",
        "random trunk",
    ]
    assert "20.0 <small>± 3.4</small>" in text and "45.0 to 55.0" in text
    assert not page.render(several_labels={}).strip()


@pytest.mark.slow
def test_pretraining_goes_on_after_a_kill_between_checkpoint_and_receipt(demo):
    run, folder = demo
    results, _, _ = run()
    stage = folder / f"pretrain-{results['pretrain'].key[:12]}"
    before = (stage / "metrics.jsonl").read_text()
    (stage / "receipt.json").unlink()
    _, lines, _ = run()
    assert names(lines, "done") == {"pretrain"}
    assert (stage / "metrics.jsonl").read_text() == before


def before(graph, name):
    """A stage and all that it comes after."""
    (stage,) = (stage for stage in graph if stage.name == name)
    return {name}.union(*(before(graph, source) for source in stage.sources))


@pytest.mark.slow
def test_the_seer_graph_ends_in_a_report_on_datasets_of_its_own(demo, pictures, tmp_path):
    _, folder = demo
    words = [
        f"folder={tmp_path}",
        f"stages.shards.recipe.source={pictures}",
        "stages.shards.recipe.unit_rows=3",
        f"stages.train.recipe.path={(folder / 'latest' / 'train').resolve()}",
        f"stages.test.recipe.path={(folder / 'latest' / 'test').resolve()}",
        "repeat.elsewhere=[]",
        "repeat.weak=[]",
        "stages.pretrain.recipe=pretrain/demo",
        *(word for word in SMALL if word.startswith("stages.pretrain.") and "probe" not in word),
        "stages.pretrain.recipe.data.batch_size=4",
        "stages.pretrain.recipe.probe=null",
        "stages.linear.recipe.regularisation=[0.1]",
        "stages.linear_random.recipe.regularisation=[0.1]",
        "stages.linear_sgd.recipe={rates: [0.1], batch_norm: [true], epochs: 4}",
    ]
    recipe = load_dag("seer", words)
    graph = build_graph(recipe, KINDS)
    wanted = before(graph, "report")  # fine-tunings are beside it
    results = run_graph([stage for stage in graph if stage.name in wanted], InThisProcess(), say=print)
    assert all(isinstance(result, Receipt) for result in results.values()), results
    shown = recipe.model_copy(update={"show": recipe.show[-1:]})
    assert closing_lines(shown, results)[-1].endswith("report.html")
    page = Page((tmp_path / "latest" / "report" / "report.html").read_text())
    text = " ".join(" ".join(page.text).split())
    assert "on 7 images, without their labels" in text
    assert "Two kinds of features" in text
    assert "a training and a test set of its own" in text
    assert "What the model sees as one thing" in text
    assert "commonest label" not in text
    assert "photograph" not in text.replace(str(pictures), "")
    for name in ("knn", "knn_random", "linear", "linear_random", "linear_sgd"):
        assert f"{100 * results[name].metrics['top1']:.1f}" in text


def test_ticks_are_round_and_cover_the_range():
    assert ticks(0, 100, 4) == [0, 25, 50, 75, 100]
    assert ticks(0.13, 0.29, 4) == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3])
    assert ticks(5, 5, 4)[0] < 5 < ticks(5, 5, 4)[-1]
    assert doubling_ticks([1.3, 9.0]) == [1, 2, 4, 8, 16]
    assert doubling_ticks([2.0]) == [2, 4]


def test_equal_ratios_are_equal_heights_where_ticks_double():
    line = Series(name="a", x=[0, 1, 2], y=[1.5, 3.0, 6.0])
    chart = line_chart([line], title="RankMe", x_label="step", doubling=True)
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", chart)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)  # drawn to 0.1
    assert heights[0] - heights[1] > 10


def test_charts_escape_and_survive_odd_numbers():
    chart = line_chart([Series(name="<b>", x=[0, 1], y=[1.0, float("nan")])], title="<i>", x_label="step")
    assert "<i>" not in chart
    assert "nan" not in chart
    assert "No numbers" in line_chart([], title="loss", x_label="step")
    bars = bar_chart([("kNN", [Bar(name="a", value=1.0, low=0.9, high=1.0, tone="t1")])], title="accuracy")
    assert "100.0 %" in bars


def test_curves_leave_out_what_was_skipped(tmp_path):
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 3, "skipped": []},
        {"step": 4, "loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "timing.jsonl").write_text("")
    found = training_curves({"": tmp_path})
    assert [curve.title for curve in found] == ["Loss"]
    assert "from 2 to 1" in found[0].chart


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (7, "7 s"), (245, "4 min 5 s"), (7800, "2 h 10 min"), (90_000, "1 d 1 h")],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
