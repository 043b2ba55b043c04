"""Support vector machines on images with several labels, and the three average precisions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from torch import nn

from cluster.errors import UserError
from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import Dataset, open_dataset
from ingest.plan.settings import CrawlSettings
from pipeline.data.evaluation import Preprocessing
from pipeline.recipe.transfer import KnnRecipe, LowShot, SvmRecipe
from pipeline.transfer.average_precision import average_precisions
from pipeline.transfer.extract import extract_features
from pipeline.transfer.features import Features, load_features, save_features
from pipeline.transfer.knn import knn
from pipeline.transfer.labels import _set_name, labels_in
from pipeline.transfer.svm import svm

QUICK = SvmRecipe(costs=(0.1, 1, 10), draws=100)


def features(rows: list[tuple[list[str], list[str]]], x: np.ndarray) -> Features:
    names = [_set_name(*row) for row in rows]
    classes = sorted(set(names))
    y = torch.tensor([classes.index(name) for name in names])
    return Features(x=torch.from_numpy(x), y=y, keys=torch.arange(len(y)), classes=tuple(classes))


def collages(rng: np.random.Generator, images: int = 120) -> Features:
    """Images of which each has some of three labels, and some a label to ignore."""
    has = rng.random((images, 3)) < [0.3, 0.5, 0.2]
    has[:, 2] |= ~has.any(1)
    ignored = (rng.random((images, 3)) < 0.3) & ~has
    x = has @ rng.normal(size=(3, 8)) + rng.normal(size=(images, 8)) * 2
    names = np.array(["bird", "cat", "dog"])
    return features([(list(names[a]), list(names[b])) for a, b in zip(has, ignored, strict=True)], x)


def voc(scores: np.ndarray, right: np.ndarray, *, eleven: bool) -> float:
    """As PASCAL's development kit and VISSL have it, image by image."""
    order = np.argsort(-scores)
    tp = np.cumsum(right[order])
    recall, precision = tp / right.sum(), tp / np.arange(1, len(tp) + 1)
    if eleven:
        best = [precision[recall >= tenths / 10 - 1e-9].max(initial=0) for tenths in range(11)]
        return float(np.mean(best))
    recall, precision = np.array([0, *recall, 1]), np.array([0, *precision, 0])
    for place in range(len(precision) - 2, -1, -1):
        precision[place] = max(precision[place], precision[place + 1])
    rises = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(sum((recall[place] - recall[place - 1]) * precision[place] for place in rises))


def one(scores: np.ndarray, right: np.ndarray, definition: str) -> float:
    counts = np.ones((1, len(right)), np.int64)
    return float(average_precisions(scores, right, counts, definition=definition)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_average_precisions_are_those_of_independent_references(share: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        right = rng.random(100) < share
        right[0] = True
        scores = rng.normal(size=100) + right
        assert one(scores, right, "interpolated") == pytest.approx(voc(scores, right, eleven=False))
        assert one(scores, right, "eleven_points") == pytest.approx(voc(scores, right, eleven=True))
        assert one(scores, right, "scikit_learn") == pytest.approx(average_precision_score(right, scores))


def test_equal_scores_are_taken_together() -> None:
    rng = np.random.default_rng(0)
    right, scores = rng.random(200) < 0.3, rng.integers(0, 6, 200).astype(float)
    assert one(scores, right, "scikit_learn") == pytest.approx(average_precision_score(right, scores))
    precision, recall, _ = precision_recall_curve(right, scores)
    area = -np.sum(np.diff(recall) * np.maximum.accumulate(precision[:-1]))
    assert one(scores, right, "interpolated") == pytest.approx(area)
    order = rng.permutation(200)
    for definition in ("interpolated", "eleven_points"):
        assert one(scores[order], right[order], definition) == one(scores, right, definition)


@pytest.mark.parametrize("definition", ["interpolated", "eleven_points", "scikit_learn"])
def test_an_image_that_is_drawn_twice_counts_as_two(definition: str) -> None:
    rng = np.random.default_rng(1)
    right, scores = rng.random(50) < 0.3, rng.normal(size=50)
    counts = rng.integers(0, 4, (3, 50))
    found = average_precisions(scores, right, counts, definition=definition)  # type: ignore[arg-type]
    again = [one(np.repeat(scores, each), np.repeat(right, each), definition) for each in counts]
    assert found == pytest.approx(again)
    nobody = average_precisions(scores, right, counts * ~right, definition=definition)  # type: ignore[arg-type]
    assert np.isnan(nobody).all()


def test_scores_are_those_of_a_plain_loop_over_classes() -> None:
    rng = np.random.default_rng(2)
    data = collages(rng, 240)
    halves = [
        Features(x=data.x[part], y=data.y[part], keys=data.keys[part], classes=data.classes)
        for part in (slice(0, 120), slice(120, 240))
    ]
    found = svm(*halves, QUICK).metrics()
    x, outside = (
        part.x.numpy() / (np.linalg.norm(part.x.numpy(), axis=1)[:, None] + 1e-5) for part in halves
    )
    precisions = []
    for label in ("bird", "cat", "dog"):
        of_train, of_test = ([labels_in(data.classes[y]) for y in part.y] for part in halves)
        sign = np.array([1 if label in right else -1 for right, _ in of_train])
        cv = {}
        for cost in QUICK.costs:
            folds = []
            for fitted, held_out in StratifiedKFold(3).split(x, sign):
                machine = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=20_000)
                ranks = machine.fit(x[fitted], sign[fitted]).decision_function(x[held_out])
                folds.append(average_precision_score(sign[held_out] > 0, ranks))
            cv[cost] = np.mean(folds)
        cost = max(cv, key=lambda each: cv[each])
        assert found[f"cost_{label}"] == cost
        machine = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=20_000).fit(x, sign)
        counted = np.array([label not in ignored for _, ignored in of_test])
        right = np.array([label in right for right, _ in of_test])[counted]
        precisions.append(voc(machine.decision_function(outside[counted]), right, eleven=False))
        assert found[f"ap_{label}"] == pytest.approx(precisions[-1], abs=2e-3)
    assert found["map"] == found["map_interpolated"] == pytest.approx(np.mean(precisions), abs=1e-3)
    assert found["map_low"] < found["map"] < found["map_high"]
    assert found["map_eleven_points"] != found["map_scikit_learn"]


def test_low_shot_scores_are_those_of_a_plain_loop_without_difficult_images() -> None:
    rng = np.random.default_rng(3)
    data = collages(rng, 240)
    halves = [
        Features(x=data.x[part], y=data.y[part], keys=data.keys[part], classes=data.classes)
        for part in (slice(0, 120), slice(120, 240))
    ]
    few = LowShot(shots=(1, 8), samplings=3, cost=0.5)
    found = svm(*halves, QUICK.model_copy(update={"low_shot": few})).metrics()
    x, outside = (
        part.x.numpy() / (np.linalg.norm(part.x.numpy(), axis=1)[:, None] + 1e-5) for part in halves
    )
    of_train, of_test = ([labels_in(data.classes[y]) for y in part.y] for part in halves)
    for shots in few.shots:
        maps = []
        for sampling in range(3):
            draws = np.random.default_rng([0, shots, sampling])
            precisions = []
            for label in ("bird", "cat", "dog"):
                having = [row for row, (right, _) in enumerate(of_train) if label in right]
                lacking = [row for row, each in enumerate(of_train) if label not in (*each[0], *each[1])]
                shown = [
                    *draws.choice(having, shots, replace=False),
                    *draws.choice(lacking, min(2 * shots, len(lacking)), replace=False),
                ]
                assert not any(label in of_train[row][1] for row in shown)
                sign = [1] * shots + [-1] * (len(shown) - shots)
                machine = LinearSVC(C=0.5, class_weight={1: 2, -1: 1}, max_iter=20_000).fit(x[shown], sign)
                counted = np.array([label not in ignored for _, ignored in of_test])
                right = np.array([label in right for right, _ in of_test])[counted]
                precisions.append(voc(machine.decision_function(outside[counted]), right, eleven=False))
            maps.append(np.mean(precisions))
        assert found[f"map_{shots}_shots"] == pytest.approx(np.mean(maps), abs=1e-3)
        assert found[f"spread_{shots}_shots"] == pytest.approx(np.std(maps), abs=1e-3)
    assert 0 < found["map_1_shots"] < found["map_8_shots"] < found["map"]
    assert "map_1_shots" not in svm(*halves, QUICK).metrics()


def test_a_class_with_fewer_images_than_shots_is_named() -> None:
    part = features([(["a"], [])] * 10 + [(["b"], [])] * 5 + [([], ["b"])], np.eye(16))
    recipe = QUICK.model_copy(update={"low_shot": LowShot(shots=(4, 6))})
    with pytest.raises(UserError, match=r"has 5 images of b, and low_shot.shots asks for 6: leave out"):
        svm(part, part, recipe)


def test_labels_that_one_of_the_sets_lacks_are_counted_and_not_scored() -> None:
    x = np.eye(2).repeat(6, 0)
    train = features([(["a"], [])] * 6 + [(["b"], []), (["b", "only"], [])] * 3, x)
    test = features([(["a"], [])] * 6 + [(["b", "new"], [])] * 6, x)
    found = svm(train, test, QUICK).metrics()
    assert (found["classes"], found["labels_left_out"]) == (2, 2)
    with pytest.raises(UserError, match="share no label"):
        svm(train, features([(["c"], [])] * 12, x), QUICK)


def test_too_few_to_choose_a_cost_is_told_and_the_remedies_work() -> None:
    x = np.eye(2).repeat(6, 0)
    part = features([(["a"], [])] * 10 + [(["b"], [])] * 2, x)
    with pytest.raises(UserError, match=r"2 training images decide about .*, too few .* costs=\[1\]"):
        svm(part, part, QUICK)
    assert svm(part, part, SvmRecipe(costs=(1,), draws=100)).costs == (1, 1)
    assert svm(part, part, QUICK.model_copy(update={"folds": 2})).at_edge >= 0


def labelled(folder: Path, lines: str) -> Dataset:
    for number in range(4):
        (folder / "in").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * number, 0, 0)).save(folder / "in" / f"{number}.png")
    (folder / "l.csv").write_text(lines)
    crawl_shards(
        [str(folder / "in")],
        folder / "out",
        CrawlSettings(),
        workers=1,
        progress=lambda counts: None,
        labels=[str(folder / "l.csv")],
    )
    return open_dataset(folder / "out")


def extracted(dataset: Dataset, *, several: bool) -> Features:
    return extract_features(
        nn.Flatten(),
        dataset,
        preprocessing=Preprocessing(image_size=8, resize=8, mean=(0.5,) * 3, std=(0.2,) * 3),
        workers=0,
        device=torch.device("cpu"),
        several_labels=several,
    )


def test_features_hold_all_labels_and_those_to_ignore(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, 'key,labels,ignore\n0,dog,\n1,"cat,dog",\n2,cat,dog\n3,,cat\n')
    save_features(extracted(dataset, several=True), tmp_path / "f.safetensors")
    again = load_features(tmp_path / "f.safetensors")
    assert [labels_in(again.classes[y]) for y in again.y] == [
        (["dog"], []),
        (["cat", "dog"], []),
        (["cat"], ["dog"]),
        ([], ["cat"]),
    ]
    with pytest.raises(UserError, match=r"score these features by svm, or extract others of a view"):
        knn(again, again, KnnRecipe(k=(1,)))


def test_an_image_without_a_label_is_refused_where_every_other_has_one(tmp_path: Path) -> None:
    dataset = labelled(tmp_path, "key,labels\n0,dog\n1,cat\n2,cat\n3,\n")
    with pytest.raises(UserError, match="has no label, and this evaluation needs one of each"):
        extracted(dataset, several=True)
