"""Graphs by their receipts: what made what, and what is stale, failed, running or gone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from serving import asked, make_run, told

from cluster.job import State
from pipeline.dag.planned import PLANNED, Planned
from pipeline.dag.stage import Receipt


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def folder_of(root: Path, kind: str, name: str) -> Path:
    return root / f"{kind}-{key(name)[:12]}"


def finish(root: Path, kind: str, name: str, *, latest: str | None = "", **changes: Any) -> Path:
    """A finished stage; `latest` is another name than its own, or None where none points to it."""
    folder = folder_of(root, kind, name)
    folder.mkdir(parents=True)
    (folder / "out.txt").write_text(name)
    values: dict[str, Any] = {
        "key": key(name),
        "stage": name.split("@", maxsplit=1)[0],
        "kind": kind,
        "version": 1,
        "recipe": {},
        "inputs": {},
        "outputs": {"out.txt": key("out")},
        "metrics": {},
        "started": 1.0,
        "seconds": 2.0,
        "gpu_hours": 0.0,
        "machine": "a machine",
    }
    (folder / "receipt.json").write_text(Receipt(**(values | changes)).model_dump_json())
    if latest is not None:
        (root / "latest").mkdir(exist_ok=True)
        (root / "latest" / (latest or name.split("@", maxsplit=1)[0])).symlink_to(Path("..") / folder.name)
    return folder


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    root = tmp_path / "runs" / "demo"
    finish(root, "shards", "data@1", latest=None, recipe={"source": "/data/old"})
    finish(root, "shards", "data@2", recipe={"source": "/data/images"})
    inputs = {"data": f"{key('data@2')}/"}
    recipe = {"data": {"root": "not/read"}}
    finish(root, "pretrain", "pretrain", recipe=recipe, inputs=inputs, metrics={"loss": 0.12345678})
    pretrain = folder_of(root, "pretrain", "pretrain")
    (pretrain / "attempts.jsonl").write_text('{"version": "0.1", "commit": "0123456789abcdef"}\n')
    finish(root, "knn", "knn", inputs={"run": f"{key('pretrain')}/", "test": f"{key('data@1')}/test.tar"})
    gone = finish(root, "linear", "linear", inputs={"run": f"{key('pretrain')}/", "b": f"{key('lost')}/"})
    (gone / "out.txt").unlink()
    folder_of(root, "export", "broken").mkdir()
    (folder_of(root, "export", "broken") / "error.txt").write_text("Traceback\nValueError: <b>why</b>\n")
    make_run(folder_of(root, "pretrain", "running"), state=State.RUNNING)
    make_run(root / "jobs" / folder_of(root, "features", "queued").name, state=State.PENDING)
    folder_of(root, "features", "queued").mkdir()
    folder_of(root, "svm", "damaged").mkdir()
    (folder_of(root, "svm", "damaged") / "receipt.json").write_text("{")
    return tmp_path / "runs"


def look(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    async def ask(client: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        (one,) = (await told(client, "/api/graphs"))["graphs"]
        return one, await told(client, "/api/graph", id=one["id"])

    found: tuple[dict[str, Any], dict[str, Any]] = asked(folder, ask)
    return found


def test_a_graph_says_what_made_what_and_how_far_each_stage_is(graph: Path) -> None:
    short, full = look(graph)
    assert short["name"] == full["name"] == "runs/demo"
    stages = {stage["folder"]: stage for stage in full["stages"]}
    now = [stage for stage in full["stages"] if stage["current"]]
    states = {f"{stage['kind']} {stage['name']}": stage["state"] for stage in now}
    root = graph / "demo"
    assert states == {
        "shards data": "finished",
        "pretrain pretrain": "finished",
        "knn knn": "stale",
        "linear linear": "missing",
        f"export {folder_of(root, 'export', 'broken').name}": "failed",
        f"pretrain {folder_of(root, 'pretrain', 'running').name}": "running",
        f"features {folder_of(root, 'features', 'queued').name}": "queued",
        f"svm {folder_of(root, 'svm', 'damaged').name}": "damaged",
    }
    old, knn = stages[folder_of(root, "shards", "data@1").name], stages[folder_of(root, "knn", "knn").name]
    assert (old["state"], old["detail"]) == ("stale", "another one has taken its place")
    assert knn["detail"] == "made from data as it was before"
    assert [(each["role"], each["name"], each["path"], each["replaced"]) for each in knn["inputs"]] == [
        ("run", "pretrain", "", False),
        ("test", "data", "test.tar", True),
    ]
    linear = stages[folder_of(root, "linear", "linear").name]
    assert linear["detail"] == "out.txt is gone: it runs again"
    assert [(each["name"], each["id"] is None) for each in linear["inputs"]] == [
        (key("lost")[:12], True),
        ("pretrain", False),
    ]
    assert stages[folder_of(root, "export", "broken").name]["detail"] == "ValueError: <b>why</b>"
    assert stages[folder_of(root, "shards", "data@2").name]["data"] == "/data/images"
    pretrain = stages[folder_of(root, "pretrain", "pretrain").name]
    assert pretrain["facts"] == {"loss": "0.123457"}
    assert (pretrain["source"], pretrain["data"]) == ("0.1 0123456789ab", "")
    order = [stage["folder"] for stage in full["stages"]]
    for stage in full["stages"]:
        for each in stage["inputs"]:
            if each["id"] is not None:
                source = next(other["folder"] for other in full["stages"] if other["id"] == each["id"])
                assert order.index(source) < order.index(stage["folder"])
    assert short["states"]["damaged"] == 1
    assert full["picture"].count("<rect") == len(now)


def test_a_long_name_is_pressed_into_its_box(tmp_path: Path) -> None:
    for name in ("short", "pretrain_hashtags_chosen_noisy_0"):
        finish(tmp_path / "runs" / "demo", "knn", name)
    texts = look(tmp_path / "runs")[1]["picture"].split("<text")
    assert ["pretrain_hashtags" in text for text in texts if "textLength" in text] == [True]


def test_stages_that_have_not_begun_are_missing_as_the_graph_has_planned_them(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "demo"
    finish(root, "shards", "data")
    finish(root, "knn", "knn@old")
    folder_of(root, "pretrain", "pretrain").mkdir()
    planned = [
        Planned(
            name=name.split("@", maxsplit=1)[0],
            key=key(name),
            folder=folder_of(root, kind, name).name,
            inputs={"from": f"{key(source)}/"} if source else {},
        )
        for kind, name, source in (
            ("shards", "data", ""),
            ("pretrain", "pretrain", "data"),
            ("knn", "knn@new", "pretrain"),
        )
    ]
    planned.append(replace(planned[1], name="also_pretrain"))
    (root / PLANNED).write_text(json.dumps([asdict(each) for each in planned]))
    _, full = look(tmp_path / "runs")
    now = [stage for stage in full["stages"] if stage["current"]]
    assert [(each["name"], each["also"], each["state"], each["detail"]) for each in now] == [
        ("data", [], "finished", ""),
        ("pretrain", ["also_pretrain"], "missing", "begun, and not finished"),
        ("knn", [], "missing", ""),
    ]
    assert [[source["name"] for source in each["inputs"]] for each in now] == [[], ["data"], ["pretrain"]]
    assert full["picture"].count("<rect") == 3
    (before,) = (stage for stage in full["stages"] if not stage["current"])
    assert (before["name"], before["state"]) == ("knn", "stale")
    (root / PLANNED).write_text("[")  # damaged, as one of another version may be: the receipts are left
    assert [stage["state"] for stage in look(tmp_path / "runs")[1]["stages"]].count("missing") == 1


def test_S1_receipts_that_were_made_up_are_shown_and_hang_nothing(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "demo"
    finish(root, "knn", "a", inputs={"x": f"{key('b')}/"}, recipe={"<b>": "</script>"})
    finish(
        root, "knn", "b", inputs={"x": f"{key('a')}/", "y": "/../../etc"}, metrics={"m": [{"deep": "<i>"}]}
    )
    (root / "latest" / "<img src=x>").symlink_to(Path("..") / folder_of(root, "knn", "a").name)
    _, full = look(tmp_path / "runs")
    assert {stage["state"] for stage in full["stages"]} == {"finished"}
    assert "<img" not in full["picture"] and "&lt;img src=x&gt;" in full["picture"]
