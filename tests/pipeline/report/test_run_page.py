"""The page of one run: that has ended, that has just begun, and whose images are gone."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import make_dataset, make_recipe
from typer.testing import CliRunner, Result

from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.restarts import Cause, Restart, add_restart
from cluster.run.status import Status
from ingest.dataset.open import open_dataset
from pipeline.checkpoint.files import latest
from pipeline.cli import app
from pipeline.report import prototypes
from pipeline.report.feature_map import feature_map
from pipeline.report.gallery import Samples, data_uri, near_each_other
from pipeline.train.loop import pretrain

HOSTILE = "<script>x</script>"


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of SwAV, without a label in sight, restarted once."""
    folder = tmp_path_factory.mktemp("runs") / "runs" / "first"
    data = make_dataset(tmp_path_factory.mktemp("data"))
    pretrain(make_recipe(data, train__steps=4, run__checkpoint_every_steps=None), folder)
    found = RunFolder.create(folder)
    found.write_status(
        Status(
            state=State.COMPLETED,
            name="first",
            executor="local",
            id="1",
            ranks=1,
            attempt=2,
            submitted=0.0,
        )
    )
    add_restart(found, Restart(attempt=1, cause=Cause.CRASH, message=f"OSError: {HOSTILE}", time=1.0))
    return folder


def report(run: Path, output: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["report", str(run), "--output", str(output), *words])


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "first"))


def test_the_page_shows_what_a_run_has_learned_without_labels(run: Path, tmp_path: Path) -> None:
    result = report(run, tmp_path / "new" / "x.html")
    assert result.exit_code == 0, result.output
    page = Page(tmp_path / "new" / "x.html")
    for said in (
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Assignment entropy",
        "RankMe",
        "Samples per second",
        "first is completed",
        "on 96 images",
        "its 3 crops",
        "Each of the 96 images of the pretraining was given to the prototype",
        "Nearest neighbours Of 96 images drawn at random, as the trunk saw them at step 4",
        "A map of the features",
        f"crash OSError: {HOSTILE}",
        open_dataset(json_recipe(run)).root,
    ):
        assert said in page.text, said
    assert page.count("image") > 12  # of the map
    assert page.count("script") == page.count("link") == 0
    for tag, values in page.tags:
        assert all((values.get(key) or "data:").startswith("data:") for key in ("src", "href")), tag
    assert "class0" not in page.text  # a label
    report(run, tmp_path / "y.html")
    first, second = ((tmp_path / name).read_text() for name in ("new/x.html", "y.html"))
    made = r"<td>made [^<]*</td>"
    assert re.sub(made, "", first) == re.sub(made, "", second)


def json_recipe(run: Path) -> str:
    """Where the images are."""
    return next(line.split()[1] for line in (run / "recipe.yaml").read_text().splitlines() if "root:" in line)


def test_a_run_that_has_just_begun_has_a_page_too(run: Path, tmp_path: Path) -> None:
    begun = copied(run, tmp_path)
    shutil.rmtree(begun / "checkpoints")
    for name in ("metrics.jsonl", "timing.jsonl", "attempts.jsonl"):
        (begun / name).unlink()
    assert report(begun, tmp_path / "x.html").exit_code == 0
    text = Page(tmp_path / "x.html").text
    assert "Nothing is saved yet" in text and "No numbers are recorded yet" in text
    assert "its 3 crops" in text and "Nearest neighbours" not in text


def test_a_run_whose_images_are_gone_has_its_curves(run: Path, tmp_path: Path) -> None:
    moved = copied(run, tmp_path)
    recipe = (moved / "recipe.yaml").read_text().replace(json_recipe(run), str(tmp_path / "gone"))
    (moved / "recipe.yaml").write_text(recipe)
    with (moved / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 1.0, "novel_term": 0.5}) + "\n")
    assert report(moved, tmp_path / "x.html").exit_code == 0
    text = Page(tmp_path / "x.html").text
    assert f"Not all can be shown: {tmp_path / 'gone'}" in text
    assert "Gradient norm" in text and "Novel term" in text
    assert "What the model sees" not in text


def test_S1_a_checkpoint_that_others_could_have_written_is_not_read(run: Path, tmp_path: Path) -> None:
    shared = copied(run, tmp_path)
    (shared / "checkpoints").chmod(0o777)
    refused = report(shared, tmp_path / "x.html")
    assert refused.exit_code == 2
    assert "--images 0 leaves the checkpoint alone" in refused.stderr
    assert not (tmp_path / "x.html").exists()
    assert report(shared, tmp_path / "x.html", "--images", "0").exit_code == 0
    text = Page(tmp_path / "x.html").text
    assert "its 3 crops" in text and "Nearest neighbours" not in text
    assert report(shared, tmp_path / "x.html", "--trust").exit_code == 0


def test_a_checkpoint_that_the_run_removes_meanwhile_is_left_for_the_newer_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = latest(run)
    assert newest is not None
    answers = iter([newest.with_name("step-00000002"), newest, newest])
    monkeypatch.setattr(prototypes, "latest", lambda run: next(answers))
    with torch.device("meta"):
        method = prototypes.assemble_method(make_recipe(Path("x")), total_steps=1, group=None)
    assert prototypes.load_newest(method, run) == 4


def test_neighbours_are_the_nearest_others(run: Path) -> None:
    dataset = open_dataset(json_recipe(run))
    samples = Samples(dataset)
    keys = torch.from_numpy(dataset.unit_keys(0).astype(np.int64))
    x = np.random.default_rng(0).normal(size=(len(keys), 5))
    x[7] = x[0]  # a copy is a neighbour, and the query itself is none
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    found = near_each_other(keys, torch.from_numpy(x).float(), samples, queries=3, neighbours=3)
    assert len(found) == 3
    for row, query in enumerate(found):
        cosines = unit @ unit[row]
        order = [other for other in np.argsort(-cosines, kind="stable") if other != row][:3]
        answers = query.answers["trained"]
        pictures = [data_uri(samples.image(int(keys[other]))) for other in order]
        assert [answer.picture for answer in answers] == pictures
        assert [answer.similarity for answer in answers] == pytest.approx(cosines[order], abs=1e-6)
    assert found[0].answers["trained"][0].picture == data_uri(samples.image(int(keys[7])))
    samples.close()


def test_on_the_map_alike_lies_with_alike() -> None:
    rng = np.random.default_rng(0)
    group = np.arange(60) % 3
    x = torch.from_numpy(np.eye(8)[group] + rng.normal(scale=0.05, size=(60, 8)))
    names = [f"group {number}" for number in group]
    drawn = feature_map(x, ["data:,"] * 60, names, seed=0)
    assert drawn == feature_map(x, ["data:,"] * 60, names, seed=0)
    assert drawn is not None
    centres = {
        name: np.mean([[float(x), float(y)] for x, y, found in _marks(drawn) if found == name], axis=0)
        for name in sorted(set(names))
    }
    for x_, y_, name in _marks(drawn):
        away = {other: np.hypot(*(centre - [x_, y_])) for other, centre in centres.items()}
        assert min(away, key=lambda other: away[other]) == name
    assert feature_map(torch.ones(60, 8), ["data:,"] * 60, names, seed=0) is None  # a collapse
    assert feature_map(x[:5], ["data:,"] * 5, names[:5], seed=0) is None


def _marks(drawn: str) -> list[tuple[float, float, str]]:
    found = re.findall(r'<(?:circle|image)[^>]* c?x="([\d.]+)" c?y="([\d.]+)"[^>]*><title>([^<]*)', drawn)
    return [(float(x), float(y), name) for x, y, name in found]
