"""A classifier of a run: exported, tested on any number of ranks, compared on the same images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_classification import CROP, recipe_of, run
from tiny_training import make_dataset
from torch import Tensor

from cluster.errors import UserError
from ingest.dataset.open import open_dataset
from ingest.image.decode import decode
from pipeline.data.reader import Reader
from pipeline.models.classifier import Classifier
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.transfer import Predict, PredictRecipe
from pipeline.report.classifiers import classifiers_page
from pipeline.train.classifier import finish_classifier
from pipeline.train.loop import pretrain
from pipeline.train.run_recipe import pin_dataset
from pipeline.transfer.compare import compare_predictions
from pipeline.transfer.predict import (
    SCHEMA,
    predict,
    read_answers,
    read_predictions,
    summarise,
    write_predictions,
)
from pipeline.trunks.classifier import load_classifier
from pipeline.trunks.export import export_classifier

Ranks = Callable[..., list[Any]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_of(data, {"ema": 0.8}, train={"steps": 40}, run__checkpoint_every_steps=100)
    pretrain(with_test(recipe, data), folder)
    return folder


def with_test(recipe: PretrainRecipe, data: Path) -> PretrainRecipe:
    return PretrainRecipe.model_validate(recipe.model_dump() | {"test": {"root": str(data)}})


def said_of(predictions: pa.Table) -> list[str]:
    first: list[str] = pc.list_element(predictions["top"], 0).cast(pa.string()).to_pylist()
    return first


def test_every_image_is_shown_once_as_a_plain_loop_would(data: Path, trained: Path) -> None:
    predictions = read_predictions(trained / "predictions.parquet")
    classifier, dataset = load_classifier(trained / "classifier"), open_dataset(data)
    reader, view = Reader(dataset), classifier.spec.preprocessing
    expected, labels, keys = [], [], []
    for unit in range(len(dataset.units)):
        of_unit = dataset.unit_labels(unit)
        for row in range(len(of_unit)):
            image = decode(reader.read(unit, row)).resize((view.image_size, view.image_size), 3)
            x = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 - _of(view.mean)) / _of(
                view.std
            )
            expected.append(classifier.spec.classes[int(classifier(x).argmax())])
            labels.append([dataset.vocabulary.names[code] for code in of_unit.of(row)])
            keys.append(reader.key(unit, row))
    assert predictions["key"].to_pylist() == keys
    assert predictions["labels"].to_pylist() == labels
    assert said_of(predictions) == expected
    scores = summarise(predictions)
    right = sum(name in of_one for name, of_one in zip(expected, labels, strict=True))
    assert scores["top1"] == right / len(keys) > 0.7
    assert scores["top1_low"] < scores["top1"] <= scores["top1_high"] and scores["top5"] == 1.0
    assert json.loads((trained / "test.json").read_text()) == scores


def test_weights_that_are_broken_say_nothing(data: Path, trained: Path) -> None:
    classifier = load_classifier(trained / "classifier")
    with torch.no_grad():
        list(classifier.parameters())[-1][0] = torch.inf  # a bias of the head
    with pytest.raises(UserError, match="is not finite: its weights are broken"):
        predict(classifier, open_dataset(data), Predict(), workers=0, device=CPU)


def _of(numbers: tuple[float, float, float]) -> Tensor:
    return torch.tensor(numbers).view(1, 3, 1, 1)


def _tested(group: dist.ProcessGroup, data: Path, folder: Path) -> None:
    training = run(
        with_test(recipe_of(data, {}, train={"steps": 2}, run__checkpoint_every_steps=100), data),
        folder,
        group,
    )
    finish_classifier(training)


@pytest.mark.slow
def test_ranks_share_the_test_set_and_the_file_is_the_same(
    data: Path, tmp_path: Path, run_on_ranks: Ranks
) -> None:
    run_on_ranks(3, _tested, data, tmp_path)
    alone = predict(
        load_classifier(tmp_path / "classifier"), open_dataset(data), PredictRecipe(), workers=0, device=CPU
    )
    together = read_predictions(tmp_path / "predictions.parquet")
    assert (
        together.drop_columns("probability").equals(alone.unify_dictionaries().drop_columns("probability"))
        or together["key"].to_pylist() == alone["key"].to_pylist()
    )
    assert said_of(together) == said_of(alone)
    assert not list(tmp_path.glob(".predictions-*"))


def test_the_average_is_exported_unless_the_other_is_asked_for(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    average = export_classifier(trained, tmp_path / "average")
    learner = export_classifier(trained, tmp_path / "learner", which="student")
    assert (average.provenance["which"], learner.provenance["which"]) == ("teacher", "student")
    assert average.classes == open_dataset(data).vocabulary.names
    one, other = (load_file(tmp_path / name / "classifier.safetensors") for name in ("average", "learner"))
    assert one.keys() == other.keys() and not torch.equal(one["head.fc.weight"], other["head.fc.weight"])
    # timm's names: no prefix of ours is left.
    assert not [name for name in one if name.startswith(("trunk.", "head.weight"))]
    assert {"stem.conv.weight", "head.fc.weight", "head.fc.bias"} <= one.keys()


def test_a_classifier_that_was_cut_or_edited_is_a_sentence(trained: Path, tmp_path: Path) -> None:
    export_classifier(trained, tmp_path)
    spec = json.loads((tmp_path / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps(spec | {"classes": spec["classes"][:3]}))
    with pytest.raises(UserError, match=r"does not hold the tensors of regnet_y with 3 classes"):
        load_classifier(tmp_path)
    (tmp_path / "classifier.json").write_text(json.dumps(spec | {"classes": ["one"]}))
    with pytest.raises(UserError, match=r"classifier\.json cannot be used: classes: .*; was it edited\?"):
        load_classifier(tmp_path)
    (tmp_path / "classifier.json").write_text(json.dumps(spec | {"feature_dim": 7}))
    tensors = load_file(tmp_path / "classifier.safetensors")
    tensors["head.fc.weight"] = torch.zeros(len(spec["classes"]), 7)  # a head of another trunk
    save_file(tensors, tmp_path / "classifier.safetensors")
    with pytest.raises(UserError, match="says 7 features, and its trunk has"):
        load_classifier(tmp_path)
    with pytest.raises(UserError, match="is not an exported classifier"):
        load_classifier(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("names", [None, "[", '["one"]', '{"a": 1}'])
def test_a_run_whose_classes_names_are_gone_is_a_sentence(
    trained: Path, tmp_path: Path, names: str | None
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "attempts.jsonl").unlink()  # nothing depends on it
    export_classifier(copy, tmp_path / "out")
    (copy / "classes.json").unlink()
    if names is not None:
        (copy / "classes.json").write_text(names)
    with pytest.raises(UserError, match=r"classes\.json does not say what the classes are called \("):
        export_classifier(copy, tmp_path / "out")


def test_a_test_set_that_does_not_fit_is_refused_before_the_training(data: Path, tmp_path: Path) -> None:
    recipe = with_test(recipe_of(data, {}), data)
    pin_dataset(recipe, tmp_path)
    for changes, told in (
        ({"root": str(tmp_path / "nowhere")}, "nowhere is not a dataset"),
        ({"view": "nowhere"}, "has no view named nowhere"),
        ({"predict": {"classes": str(tmp_path / "map.csv")}}, r"map\.csv cannot be read as CSV"),
    ):
        values = recipe.model_dump() | {"test": {"root": str(data)} | changes}
        with pytest.raises(UserError, match=told):
            pin_dataset(PretrainRecipe.model_validate(values), tmp_path)


def test_labels_that_are_called_otherwise_are_mapped_and_others_cannot_be_said(
    trained: Path, tmp_path: Path
) -> None:
    classes = ("cat", "dog", "fox", "wolf")
    with pytest.raises(
        UserError, match=r"no class for 1 of the test set's 2 labels, such as 0017: give classes"
    ):
        read_answers(classes, ["0017", "cat"], PredictRecipe())
    table = tmp_path / "map.csv"
    table.write_text("label,class\n0017,dog\n0017,wolf\n0003,cat\n")
    found = read_answers(classes, ["0017", "0003"], PredictRecipe(classes=str(table), only_shared=True))
    assert found.right["0017"].tolist() == [1, 3] and found.allowed.tolist() == [True, True, False, True]
    table.write_text("label,class\n0017,bear\n")
    with pytest.raises(UserError, match="the classifier has no class bear"):
        read_answers(classes, ["0017"], PredictRecipe(classes=str(table)))
    table.write_text("label,class\n0017\n")
    with pytest.raises(UserError, match="line 2: a label or a class is missing"):
        read_answers(classes, ["0017"], PredictRecipe(classes=str(table)))
    table.write_text("\ufefflabel,class\n0017,dog\n")  # as spreadsheets save it
    assert read_answers(classes, ["0017"], PredictRecipe(classes=str(table))).right["0017"] == [1]
    table.write_text("a;b\n")
    with pytest.raises(UserError, match="needs the columns label and class in its first line"):
        read_answers(classes, ["0017"], PredictRecipe(classes=str(table)))


def predictions_of(right_at: list[int], *, dataset: str = "a", first_key: int = 0) -> pa.Table:
    count = len(right_at)
    rows = {
        "key": range(first_key, first_key + count),
        "labels": [["x"]] * count,
        "top": [["x", "y"]] * count,
        "probability": [0.5] * count,
        "right_at": right_at,
    }
    columns = [pa.array(rows[field.name], field.type) for field in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata({"dataset": dataset}))


def test_better_is_said_only_where_the_images_say_so(tmp_path: Path) -> None:
    good, bad, like_good = [0] * 90 + [1] * 10, [0] * 60 + [-1] * 40, [0] * 89 + [1] * 11
    found = compare_predictions(
        {name: predictions_of(rows) for name, rows in (("a", good), ("b", bad), ("c", like_good))}
    )
    better = {(pair.first, pair.second): pair.better for pair in found.pairs}
    assert better == {("a", "b"): "a", ("a", "c"): None, ("b", "c"): "c"}
    assert found.scores["a"]["top5"] == 1.0 and found.scores["b"]["top5"] == 0.6
    page = classifiers_page(found, "<i>x</i>")
    assert page.count("not decided") == 1 and "&lt;i&gt;x" in page
    write_predictions(predictions_of(good), tmp_path / "p.parquet")
    assert read_predictions(tmp_path / "p.parquet").equals(predictions_of(good), check_metadata=False)
    (tmp_path / "q.parquet").write_text("no")
    with pytest.raises(UserError, match=r"q\.parquet holds no predictions"):
        read_predictions(tmp_path / "q.parquet")
    with pytest.raises(UserError, match=r"there is no file .*r\.parquet"):
        read_predictions(tmp_path / "r.parquet")


def test_forged_predictions_are_a_sentence(tmp_path: Path) -> None:
    rows = predictions_of([0, 1])
    place = rows.schema.get_field_index("right_at")
    forged = {
        "nulls": rows.set_column(place, pa.field("right_at", pa.int8()), pa.array([None, 1], pa.int8())),
        "no root": rows.replace_schema_metadata(None),
        "bytes": rows.replace_schema_metadata({b"dataset": b"\xff"}),
    }
    for name, table in forged.items():
        write_predictions(table, tmp_path / name)
        with pytest.raises(UserError, match="holds no predictions"):
            read_predictions(tmp_path / name)


def test_predictions_of_other_images_are_not_compared() -> None:
    with pytest.raises(UserError, match="tested on dataset a and y on b"):
        compare_predictions({"x": predictions_of([0]), "y": predictions_of([0], dataset="b")})
    with pytest.raises(UserError, match="on 1 images and y on 2, not the same ones"):
        compare_predictions({"x": predictions_of([0]), "y": predictions_of([0, 0])})
    with pytest.raises(UserError, match="x was tested on no image"):
        compare_predictions({"x": predictions_of([]), "y": predictions_of([])})
    with pytest.raises(UserError, match="name two at least"):
        compare_predictions({"x": predictions_of([0])})


def test_a_classifier_is_its_trunk_and_its_head(trained: Path) -> None:
    network = load_classifier(trained / "classifier").network
    assert isinstance(network, Classifier) and CROP["size"] == 16
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(network(images), network.head(network.trunk(images)))
