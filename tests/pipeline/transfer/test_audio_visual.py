"""Evaluations of what learnt from sound and picture, against references that share no code with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import nn

from cluster.errors import UserError
from pipeline.dag.stage import Input, Work
from pipeline.models.audio_convnet import AudioConvNet
from pipeline.models.r2plus1d import R2Plus1D
from pipeline.recipe.stages import Layer, MeanRecipe
from pipeline.recipe.transfer import AudioSvmRecipe, FewShotRecipe, KnnRecipe, LinearRecipe
from pipeline.stages.transfer import mean
from pipeline.transfer.audio_svm import audio_svm
from pipeline.transfer.cross_modal import cross_modal, partner_ranks
from pipeline.transfer.evaluations import EVALUATIONS
from pipeline.transfer.features import Features
from pipeline.transfer.few_shot import few_shot
from pipeline.transfer.linear import linear_probe
from pipeline.transfer.maps import SIDES, MapTrunk, pooled_map
from pipeline.transfer.scores import mean_of_samples


def features(x: np.ndarray, y: np.ndarray, keys: np.ndarray | None = None) -> Features:
    keys = np.arange(len(x)) if keys is None else keys
    names = tuple("abcdefgh"[: int(y.max()) + 1])
    return Features(
        x=torch.from_numpy(x).float(), y=torch.from_numpy(y), keys=torch.from_numpy(keys), classes=names
    )


def test_partners_are_ranked_as_by_sorting_and_equals_count_against_them() -> None:
    rng = np.random.default_rng(0)
    video = rng.normal(size=(40, 8))
    audio = video + rng.normal(size=(40, 8)) * 1.5
    audio[7] = audio[3]  # the same sound twice
    similarity = (video @ audio.T) / np.linalg.norm(video, axis=1)[:, None] / np.linalg.norm(audio, axis=1)
    better = [sum(s >= row[place] for s in np.delete(row, place)) for place, row in enumerate(similarity)]
    ranks = partner_ranks(torch.from_numpy(video), torch.from_numpy(audio))
    assert ranks.tolist() == better
    assert ranks[3] >= 1 <= ranks[7]
    metrics = cross_modal(torch.from_numpy(video), torch.from_numpy(audio)).metrics()
    assert metrics["video_to_audio_recall_5"] == np.mean(np.array(better) < 5)
    assert metrics["video_to_audio_median"] == np.median(better) + 1
    assert metrics["audio_to_video_recall_1_low"] < metrics["audio_to_video_recall_1"] < 1
    assert partner_ranks(torch.full((2, 8), torch.nan), torch.ones(2, 8)).tolist() == [
        1,
        1,
    ]  # found by nobody


def hinge_machine(x: np.ndarray, sign: np.ndarray, cost: float) -> np.ndarray:
    """(d + 1,) w, the bias in it and last: min |w|^2 / 2 + cost * sum of slacks, as a quadratic program."""
    n, d = x.shape
    rows = np.concatenate([x, np.ones((n, 1))], axis=1) * sign[:, None]
    start = np.concatenate([np.zeros(d + 1), np.ones(n)])
    found = minimize(
        lambda v: v[: d + 1] @ v[: d + 1] / 2 + cost * v[d + 1 :].sum(),
        start,
        jac=lambda v: np.concatenate([v[: d + 1], np.full(n, cost)]),
        bounds=[(None, None)] * (d + 1) + [(0, None)] * n,
        constraints={
            "type": "ineq",
            "fun": lambda v: rows @ v[: d + 1] + v[d + 1 :] - 1,
            "jac": lambda v: np.concatenate([rows, np.eye(n)], axis=1),
        },
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert found.success
    weights: np.ndarray = found.x[: d + 1]
    return weights


def test_recordings_are_told_apart_by_the_machines_of_a_quadratic_program() -> None:
    rng = np.random.default_rng(1)
    y, outside_y = np.repeat([0, 1, 2], 8), np.repeat([0, 1, 2, 0, 1, 2], 5)
    centres = rng.normal(size=(3, 4))
    x = (centres[y] + rng.normal(size=(24, 4))) * [1, 30, 0.001, 1]
    outside = (centres[outside_y] + 1.5 * rng.normal(size=(30, 4))) * [1, 30, 0.001, 1]
    recordings = np.repeat([5, 3, 9, 1, 2, 4], 5)
    shuffled = rng.permutation(30)
    found = audio_svm(
        features(x, y),
        features(outside[shuffled], outside_y[shuffled], recordings[shuffled]),
        AudioSvmRecipe(cost=0.5, max_iterations=100_000),
    )
    scaled, far = ((each - x.mean(0)) / (x.std(0) + 0.01) for each in (x, outside))
    machines = np.stack([hinge_machine(scaled, np.where(y == label, 1, -1), 0.5) for label in range(3)])
    said = far @ machines[:, :-1].T + machines[:, -1]
    of_recordings = said.reshape(6, 5, 3).mean(1).argmax(1)
    assert found.recordings == 6
    assert found.top1 == np.mean(of_recordings == [0, 1, 2, 0, 1, 2])
    assert np.mean(said.argmax(1) == outside_y) != found.top1  # windows alone would say something else


def test_windows_are_refused_where_nobody_averages_them() -> None:
    y, keys = np.tile([0, 1], 20), np.arange(40)
    train = features(np.eye(2)[y], y, keys // 4)
    with pytest.raises(UserError, match=r"a row for each window .* without --each"):
        EVALUATIONS["knn"].score(train, train, KnnRecipe(k=(1,)), device=torch.device("cpu"))


def test_the_mean_of_splits_has_student_s_interval(tmp_path: Path) -> None:
    def found(top1: float) -> Input:
        return Input(path=tmp_path, receipt=SimpleNamespace(metrics={"top1": top1}))  # type: ignore[arg-type]

    inputs = {f"split_{number}": found(value) for number, value in enumerate((0.5, 0.6, 0.7))}
    metrics = mean(Work(recipe=MeanRecipe(), inputs=inputs, folder=tmp_path)).metrics
    assert metrics["top1"] == pytest.approx(0.6)
    # 4.303 is Student's quantile for three values; their standard error is 0.1 / sqrt(3).
    assert metrics["top1_high"] == pytest.approx(0.6 + 4.303 * 0.1 / 3**0.5, abs=1e-4)
    with pytest.raises(UserError, match="split_0, split_1, split_2 found out no map"):
        mean(Work(recipe=MeanRecipe(metric="map"), inputs=inputs, folder=tmp_path))


def test_two_classes_have_one_machine_and_are_scored_alike() -> None:
    y = np.tile([0, 1], 20)
    x = np.stack([y * 2.0, np.zeros(40)], axis=1) + np.random.default_rng(0).normal(size=(40, 2)) * 0.1
    metrics = audio_svm(features(x, y), features(x, y), AudioSvmRecipe()).metrics()
    assert (metrics["top1"], metrics["recordings"]) == (1.0, 40)


def test_windows_are_averaged_by_sample_in_any_order() -> None:
    keys = torch.tensor([7, 3, 7, 3, 3, 8])
    rows = torch.arange(12.0).reshape(6, 2)
    mean, first = mean_of_samples(rows, keys)
    np.testing.assert_allclose(mean, [[2, 3], [16 / 3, 19 / 3], [10, 11]], rtol=1e-6)
    assert first.tolist() == [0, 1, 5]


def test_a_linear_probe_averages_the_windows_of_a_video_and_holds_whole_videos_out() -> None:
    rng = np.random.default_rng(2)
    videos, y = np.repeat(np.arange(24), 5), np.repeat(np.arange(24) % 2, 5)
    x = np.where(y, 1.0, -1.0)[:, None] + rng.normal(size=(120, 3)) * 3
    outside = np.where(y, 1.0, -1.0)[:, None] + rng.normal(size=(120, 3)) * 3
    shuffled = rng.permutation(120)
    recipe = LinearRecipe(regularisation=(0.1,), max_iterations=100)
    test = features(outside[shuffled], y[shuffled], videos[shuffled])
    found = linear_probe(features(x, y, videos), test, recipe).metrics()
    scaled, far = ((each - x.mean(0)) / x.std(0) for each in (x, outside))
    # scikit-learn's C counts the sum of losses, ours the mean.
    reference = LogisticRegression(C=1 / (0.1 * 120), tol=1e-8).fit(scaled, y)
    of_videos = reference.predict_proba(far).reshape(24, 5, 2).mean(1).argmax(1)
    assert (found["test_samples"], found["train_samples"]) == (24, 24)
    assert found["top1"] == np.mean(of_videos == np.arange(24) % 2)
    assert found["top1"] != np.mean(reference.predict(far) == y)
    assert found["validation_0.1"] in {0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1}


def test_few_shots_use_so_many_of_each_class_and_no_more() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 30)
    x = np.eye(3)[y] * 4 + rng.normal(size=(90, 3))
    test = np.eye(3)[y] * 4 + rng.normal(size=(90, 3))
    good = few_shot(features(x, y), features(test, y), FewShotRecipe(draws=5)).metrics()
    one = few_shot(features(x, y), features(test, y), FewShotRecipe(shots=1, draws=5)).metrics()
    wrong = few_shot(features(x, rng.permutation(y)), features(test, y), FewShotRecipe(draws=5)).metrics()
    assert good["top1_low"] <= good["top1"] <= good["top1_high"]
    assert wrong["top1"] < 0.6 < one["top1"] < good["top1"]
    with pytest.raises(UserError, match="30 samples of a, and shots is 31: lower it"):
        few_shot(features(x, y), features(x, y), FewShotRecipe(shots=31))


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_maps_are_pooled_over_all_of_time_and_in_even_parts_of_the_picture(pooling: str) -> None:
    maps = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 4, 12, 8)))
    reduce = np.max if pooling == "max" else np.mean
    expected = [
        [reduce(reduce(channel[:, 3 * row : 3 * row + 3, 2 * column : 2 * column + 2], axis=0))
         for channel in sample for row in range(4) for column in range(4)]
        for sample in maps.numpy()
    ]  # fmt: skip
    np.testing.assert_allclose(pooled_map(maps, 4, pooling), expected, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", SIDES)
def test_a_trunk_s_map_is_a_trunk_of_as_many_features_as_it_says(layer: Layer) -> None:
    shown = {
        R2Plus1D(10, width=2): torch.rand(2, 3, 4, 32, 24),
        AudioConvNet(width=2): torch.rand(2, 1, 50, 40),
    }
    for trunk, inputs in shown.items():
        made = MapTrunk(trunk.eval(), layer, "average")
        assert made(inputs).shape == (2, made.feature_dim)
    with pytest.raises(UserError, match="Linear tells nothing of its stages"):
        MapTrunk(nn.Linear(1, 1), layer, "max")
