import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from pipeline.recipe.transfer import KnnRecipe
from pipeline.transfer import knn as module
from pipeline.transfer.features import Features, FeatureWriter, load_features
from pipeline.transfer.knn import knn, knn_votes, nearest


def reference_votes(train_x, train_y, test_x, classes, k, temperature):
    """Wu et al., 2018, section 3.4, one query at a time in NumPy float64; the nearest one votes with 1."""

    def unit(a):
        return a / np.linalg.norm(a, axis=1, keepdims=True)

    train_x, test_x = unit(train_x.astype(np.float64)), unit(test_x.astype(np.float64))
    votes = np.zeros((len(test_x), classes))
    for row, query in enumerate(test_x):
        similarity = train_x @ query
        for neighbour in np.argsort(-similarity)[:k]:
            with np.errstate(over="ignore"):
                power = (similarity[neighbour] - similarity.max()) / temperature
            votes[row, train_y[neighbour]] += math.exp(power)
    return votes


def features(x, y, names):
    return Features(
        x=torch.as_tensor(x), y=torch.as_tensor(y), keys=torch.arange(len(y)), classes=tuple(names)
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    train=st.integers(3, 60),
    test=st.integers(1, 20),
    dim=st.integers(1, 9),
    rows=st.integers(1, 17),
)
def test_votes_equal_the_papers_in_numpy_for_any_chunking(seed, train, test, dim, rows):
    rng = np.random.default_rng(seed)
    train_x, test_x = rng.normal(size=(train, dim)), rng.normal(size=(test, dim))
    if dim == 1:
        train_x, test_x = np.abs(train_x) + 0.1, np.abs(test_x) + 0.1
    classes, temperature, k = 4, 0.2, min(train, 5) if dim > 1 else train
    train_y = rng.integers(0, classes, train)
    saved = module._QUERY_ROWS, module._BANK_ROWS
    module._QUERY_ROWS, module._BANK_ROWS = 3, rows
    try:
        votes = knn_votes(
            torch.tensor(train_x, dtype=torch.float32),
            torch.tensor(train_y),
            torch.tensor(test_x, dtype=torch.float32),
            classes=classes,
            k=(k,),
            temperature=temperature,
        )[k].double()
    finally:
        module._QUERY_ROWS, module._BANK_ROWS = saved
    expected = reference_votes(train_x, train_y, test_x, classes, k, temperature)
    # fp32 similarities (1e-7) divided by the temperature, inside an exponential.
    torch.testing.assert_close(votes, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_nearest_is_exact_and_sorted_over_many_chunks(monkeypatch):
    monkeypatch.setattr(module, "_BANK_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(100, 8, generator=generator), torch.randn(13, 8, generator=generator)
    value, index = nearest(bank, queries, k=20)
    expected = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(20, dim=1)
    torch.testing.assert_close(value, expected.values)
    assert torch.equal(index, expected.indices)


def test_a_mapped_file_votes_as_memory_does(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    here = features(torch.randn(60, 5, generator=generator).bfloat16(), torch.arange(60) % 3, "abc")
    with FeatureWriter(
        tmp_path / "f", y=here.y, keys=here.keys, classes=here.classes, dim=5, precision="bf16"
    ) as file:
        file.write(0, here.x)
    expected = knn(here, here, KnnRecipe(k=(5, 20)))
    monkeypatch.setattr(module, "_BANK_BYTES", 7 * 4 * 5)
    mapped = load_features(tmp_path / "f")
    assert knn(mapped, mapped, KnnRecipe(k=(5, 20))) == expected


def test_accuracies_and_labels_matched_by_name():
    # The test set lacks class "a", so its numbering differs from the training set's.
    train = features([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]], [0, 0, 1, 1], ["a", "b"])
    test = features([[0.0, 2.0], [3.0, 0.1]], [0, 0], ["b"])
    scores = knn(train, test, KnnRecipe(k=(2, 4)))
    assert scores.top1[2] == 0.5
    assert scores.top5[4] == 1.0
    assert scores.metrics()["top1"] == scores.top1[2]
    assert scores.metrics()["top1_low"] == pytest.approx(0.0945, abs=1e-4)  # Wilson's, of one in two


def test_close_neighbours_outweigh_many_far_ones():
    train = features([[1.0, 0.0]] + [[0.0, 1.0]] * 5, [0] + [1] * 5, ["near", "far"])
    test = features([[1.0, 0.01]], [0], ["near"])
    assert knn(train, test, KnnRecipe(k=(6,), temperature=0.1)).top1[6] == 1.0


@pytest.mark.parametrize("temperature", [1e-1, 1e-3, 1e-5, 1e-12, 1e-40, 1e-46, 5e-324, 1e3, 1e300])
def test_any_temperature_gives_the_class_of_the_reference(temperature):
    rng = np.random.default_rng(0)
    # Nobody is near: the similarities of five dimensions are far below 1, and those of neighbours far apart.
    train_x, test_x = rng.normal(size=(40, 5)), rng.normal(size=(200, 5))
    train_y = 1 + rng.integers(0, 3, 40)  # nobody is of class 0, which is what votes of nought come to
    votes = knn_votes(
        torch.tensor(train_x, dtype=torch.float32),
        torch.tensor(train_y),
        torch.tensor(test_x, dtype=torch.float32),
        classes=4,
        k=(7,),
        temperature=temperature,
    )[7]
    expected = reference_votes(train_x, train_y, test_x, 4, 7, temperature)
    assert votes.isfinite().all()
    assert votes.amax(1).ge(1).all()
    best, second = np.sort(expected, axis=1)[:, [-1, -2]].T
    clear = best - second > 1e-3 * best  # fp32 decides the others
    assert clear.mean() > (0.9 if temperature < 1 else 0.5)
    assert np.array_equal(votes.argmax(1).numpy()[clear], expected.argmax(1)[clear])


def test_k_above_the_training_set_is_a_clear_error():
    train = features([[1.0, 0.0], [0.0, 1.0]], [0, 1], ["a", "b"])
    with pytest.raises(UserError, match=r"k=20 .* there are 2"):
        knn(train, train, KnnRecipe(k=(20,)))


def test_no_shared_labels_is_a_clear_error():
    train = features([[1.0, 0.0], [0.0, 1.0]], [0, 1], ["a", "b"])
    with pytest.raises(UserError, match="share no label"):
        knn(train, features([[1.0, 0.0]], [0], ["c"]), KnnRecipe(k=(1,)))
