"""On a device that is not the CPU no tensor stays behind, and a step waits for the device where that is said.

The device is `stand_in`'s, with values: what is trained there is what the CPU trains, up to rounding.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gloo_ranks import apart
from safetensors.torch import load_file
from tiny_training import make_dataset, make_recipe, make_values
from torch import Tensor, nn

from cluster.rank.torch_dist import World
from cluster.typed_yaml import load_recipe
from ingest.dataset.open import Dataset, open_dataset
from pipeline.data.batch import Inputs
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.transfer import Predict
from pipeline.report.gallery import Samples
from pipeline.report.prototypes import prototype_gallery
from pipeline.train import stragglers
from pipeline.train.loop import train
from pipeline.train.setup import Training, set_up
from pipeline.transfer.cross_modal import cross_modal
from pipeline.transfer.embed import embed_videos
from pipeline.transfer.evaluations import EVALUATIONS
from pipeline.transfer.extract import extract_features, write_features
from pipeline.transfer.feature_table import write_table
from pipeline.transfer.features import Features, load_features
from pipeline.transfer.predict import predict
from pipeline.trunks.baselines import random_trunk
from pipeline.trunks.classifier import load_classifier
from pipeline.trunks.embedder import load_embedder
from pipeline.trunks.export import export_classifier, export_trunk
from pipeline.trunks.files import ExportedTrunk, load_trunk
from tests.clips import clip_bytes
from tests.pipeline.data.clip.clip_datasets import SMALL, seal_clips

STEPS = 8
CMA = {"positives": 2, "within_negatives": 4, "refresh_epochs": 1, "least_agreement": 0.0}
NUMBERS = "a copy to the host in pipeline/train/loop.py read_together"
# A step that is neither logged nor saved waits once, for its loss and the length of its gradient: the guard,
# the loss scale and the clipping share them. (The stop flag is the host's own.)
EVERY_STEP = {NUMBERS: 1}
POSITIVES = "a copy to the host in pipeline/methods/avid.py AVIDMethod._positives_of"
LOGGED = {
    "_local_scalar_dense in pipeline/train/metrics.py embedding_std": 1,
    "_local_scalar_dense in pipeline/train/metrics.py rankme": 2,
}


def views(count: int = 2) -> list[dict[str, Any]]:
    return [{"count": count, "size": 24, "scale": [0.3, 1.0]}]


CASES: dict[str, dict[str, Any]] = {
    "swav, larc": {"data__crops": [*views(), {"count": 1, "size": 8, "scale": [0.1, 0.3]}]},
    "swav, resident, accumulated": {
        "data__crops": views(),
        "run__resident": True,
        "train__accumulate": 2,
        "optim__clip_norm": 0.1,
    },
    "byol, lars, groups of batch norm": {
        "data__crops": views(),
        "train__sync_bn_samples": 6,
        "method": {"name": "byol", "projector": [16, 8], "predictor": 16},
        "optim": {"name": "lars", "lr": 0.1, "warmup_steps": 2, "weight_decay": 1e-6, "clip_trust": True},
    },
    "simsiam, sgd": {
        "data__crops": views(),
        "method": {"name": "simsiam", "projector": [16, 8], "predictor": 4},
        "optim": {"name": "sgd", "lr": 0.05},
    },
    "barlow_twins, adam": {
        "data__crops": views(),
        "method": {"name": "barlow_twins", "projector": [16, 8]},
        "optim": {"name": "adam", "lr": 1e-3},
    },
    "classification, adamw": {
        "data__crops": views(1),
        "method": {
            "name": "classification",
            "dropout": 0.1,
            "mixup": 0.2,
            "cutmix": 1.0,
            "mix_rows": 4,
            "label_smoothing": 0.1,
            "ema": 0.9,
        },
        "optim": {"name": "adamw", "lr": 1e-3},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [clip_bytes(n, seconds=0.75, size=(32, 24), rate=8000) for n in range(26)]
    return seal_clips(tmp_path_factory.mktemp("clips") / "data", [files[:13], files[13:]])


def clip_recipe(
    clips: Path, *, cma: dict[str, Any] | None, audio: dict[str, Any], loss: str, steps: int = STEPS
) -> PretrainRecipe:
    values = make_values(clips, data__batch_size=6, run__log_every=4, train__precision="fp64")
    del values["data"]["crops"]
    head = {"hidden": [8], "output": 8, "batch_norm": False}
    return PretrainRecipe.model_validate(
        values
        | {
            "data": values["data"] | SMALL | {"audio": audio},
            "trunk": {"name": "r2plus1d_10", "width": 2},
            "audio_trunk": {"name": "conv2d_10", "width": 2},
            "method": {"name": "avid", "head": head, "negatives": 8, "cma": cma, "loss": loss},
            "optim": {"name": "adam", "lr": 1e-3, "schedule": "constant"},
            "train": {"steps": steps, "precision": "fp64"},
        }
    )


def trained(
    recipe: PretrainRecipe, folder: Path, *, there: bool, broken: int | None = None
) -> tuple[Training, list[Counter[str]]]:
    """A run from its start to its end, and what each step waited for.

    Args:
        broken: the step whose embeddings are no numbers.
    """
    from stand_in import CPU, DEVICE, Clock, StandIn

    stragglers._event = Clock  # type: ignore[assignment]
    device, watch, waits = (DEVICE if there else CPU), StandIn(), []
    world = World(rank=0, size=1, local_rank=0, device=device, group=None, control=None)
    with watch if there else nullcontext():
        t = set_up(recipe, folder, world)
        watch.waits.clear()

        def beat(step: int) -> None:
            waits.append(Counter(watch.waits))
            watch.waits.clear()

        t.watchdog.beat = beat  # type: ignore[method-assign]
        t.method.register_forward_hook(partial(_break, broken))
        train(t, SimpleNamespace(requested=False))  # type: ignore[arg-type]
        held = [*t.method.parameters(), *t.method.buffers()]
        held += [each for state in t.optimizer.state.values() for each in state.values() if each.ndim]
        assert {each.device for each in held} == {device}
        t.metrics.close()  # type: ignore[union-attr]
    return t, waits


def _break(broken: int | None, _: nn.Module, arguments: tuple[Inputs, int], terms: dict[str, Tensor]) -> None:
    if arguments[1] == broken:
        terms["loss"] = terms["loss"] * torch.nan
        terms["embedding"] = terms["embedding"] * torch.nan


def _compare(recipe: PretrainRecipe, folder: Path, broken: int | None = None) -> list[Counter[str]]:
    """Train on the CPU and there; what a step there waits for."""
    ours, _ = trained(recipe, folder / "cpu", there=False, broken=broken)
    theirs, waits = trained(recipe, folder / "there", there=True, broken=broken)
    values = dict(theirs.method.state_dict())
    for name, value in ours.method.state_dict().items():
        torch.testing.assert_close(values[name].cpu(), value, rtol=1e-6, atol=1e-9)
    rows = [
        [json.loads(line) for line in (folder / where / "metrics.jsonl").read_text().splitlines()]
        for where in ("cpu", "there")
    ]
    for one, other in zip(*rows, strict=True):
        assert one.pop("skipped", None) == other.pop("skipped", None)
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7)
    return waits


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_T1_a_step_elsewhere_is_the_cpus_and_waits_for_the_device_once(
    case: str, data: Path, tmp_path: Path
) -> None:
    changes = {"train": {"steps": STEPS, "precision": "fp64"}, "run__log_every": 4}
    changes |= {"run__checkpoint_every_steps": 100} | CASES[case]
    waits = apart(_compare, make_recipe(data, **changes), tmp_path)
    # SwAV's queue is asked until it is full, in the fifth step; the fourth is logged.
    assert waits[5:7] == [EVERY_STEP] * 2
    logged = {NUMBERS: 2} if case.startswith("classification") else {NUMBERS: 2} | LOGGED
    assert dict(waits[3]) == logged


AUDIO_KINDS = {"linear": SMALL["audio"], "mel": SMALL["audio"] | {"kind": "mel", "bins": 20}}


@pytest.mark.slow
@pytest.mark.parametrize(("cma", "kind", "loss"), [(None, "linear", "softmax"), (CMA, "mel", "nce")])
def test_T1_avid_and_its_bank_elsewhere_are_the_cpus(
    cma: dict[str, Any] | None, kind: str, loss: str, clips: Path, tmp_path: Path
) -> None:
    waits = apart(_compare, clip_recipe(clips, cma=cma, audio=AUDIO_KINDS[kind], loss=loss), tmp_path)
    expected = EVERY_STEP if cma is None else EVERY_STEP | {POSITIVES: 1}
    assert waits[5:7] == [expected] * 2


@pytest.mark.slow
def test_a_step_that_is_skipped_and_a_probe_elsewhere_are_the_cpus(data: Path, tmp_path: Path) -> None:
    probe = {"train": str(data), "test": str(data), "every_steps": 4, "image_size": 24, "k": 5}
    changes = {"train": {"steps": STEPS, "precision": "fp64"}, "run__log_every": 4, "probe": probe}
    waits = apart(_compare, make_recipe(data, data__crops=views(), **changes), tmp_path, 5)
    assert waits[6] == EVERY_STEP
    assert [name for name in waits[3] if "accuracy" in name or "extract" in name]  # it was there


def _scores() -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    from stand_in import CPU, DEVICE, StandIn

    found = {}
    for name, evaluation in EVALUATIONS.items():
        recipe = load_recipe(evaluation.recipe, name, _SMALLER.get(name, []), kind="transfer")
        both = [blobs(seed, windows=1 if evaluation.windows == "never" else 2) for seed in range(2)]
        ours = evaluation.score(*both, recipe, device=CPU).metrics()
        with StandIn():
            found[name] = ours, evaluation.score(*both, recipe, device=DEVICE).metrics()
    return found


def blobs(seed: int, *, windows: int) -> Features:
    """Features of 60 samples, three classes of them, that overlap."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.arange(60).repeat_interleave(windows)
    x = 3 * torch.eye(3, 8)[keys % 3] + torch.randn(len(keys), 8, generator=generator)
    return Features(x=x, y=keys % 3, keys=keys, classes=("a", "b", "c"))


_SMALLER = {
    "knn": ["k=[5]"],
    "linear": ["regularisation=[1.0, 0.01]"],
    "linear_sgd": ["epochs=2", "batch_size=16", "rates=[0.1, 1.0]"],
    "few_shot": ["shots=2", "draws=2"],
    "svm": ["costs=[1.0]", "draws=100"],
    "retrieve": ["draws=100"],
}


@pytest.mark.slow
def test_evaluations_elsewhere_are_the_cpus() -> None:
    for name, (ours, theirs) in apart(_scores).items():
        assert theirs == pytest.approx(ours, rel=1e-4), name


def _pictures(data: Path, run: Path, device: torch.device, out: Path) -> dict[str, Any]:
    """What a trunk for images is used for."""
    dataset, trunk = open_dataset(data), load_trunk(run / "trunk").to(device)
    random_trunk(trunk.spec, dataset, seed=1, out=out / "random", workers=0, device=device)
    gallery = prototype_gallery(
        run,
        load_recipe(PretrainRecipe, str(run / "recipe.yaml"), kind="pretrain"),
        Samples(dataset),
        {},
        rows=2,
        images=2,
        sample=20,
        seed=0,
        device=device,
    )
    assert gallery is not None
    return _features(dataset, trunk, device, out) | {
        "of pictures": trunk.features([np.full((40, 30, 3), 99, np.uint8)]),
        "at random": load_trunk(out / "random").network.state_dict()["stem.bn.running_var"],
        "prototypes": [member.cosine for row in gallery.rows for member in row.members],
    }


def _sound(clips: Path, run: Path, device: torch.device, out: Path) -> dict[str, Any]:
    """What a trunk for sound, and two trunks with their heads, are used for."""
    dataset, trunk = open_dataset(clips), load_trunk(run / "trunk").to(device)
    video, audio = embed_videos(load_embedder(run), dataset, windows=2, workers=0, device=device)
    partners = cross_modal(video.x, audio.x, device=device).metrics()
    return _features(dataset, trunk, device, out) | {
        "video": video.x,
        "audio": audio.x,
        "partners": list(partners.values()),
    }


def _labels(data: Path, run: Path, device: torch.device, out: Path) -> dict[str, Any]:
    """What a classifier is used for."""
    classifier = load_classifier(run / "trunk").to(device)
    table = predict(classifier, open_dataset(data), Predict(), workers=0, device=device)
    return {"said": table.column("probability").to_numpy()}


def _features(dataset: Dataset, trunk: ExportedTrunk, device: torch.device, out: Path) -> dict[str, Any]:
    shown: dict[str, Any] = {"workers": 0, "device": device}
    write_features(
        trunk, dataset, out / "file", dim=trunk.feature_dim, preprocessing=trunk.preprocessing, **shown
    )
    write_table(trunk, dataset, out / "table.safetensors", **shown)
    return {
        "in memory": extract_features(trunk, dataset, preprocessing=trunk.preprocessing, **shown).x,
        "in a file": load_features(out / "file").x,
        "in a table": load_file(out / "table.safetensors")["features"],
    }


def _uses(use: Callable[..., dict[str, Any]], data: Path, recipe: PretrainRecipe, folder: Path) -> None:
    """Train and export there; then use it on the CPU, and there."""
    from stand_in import CPU, DEVICE, StandIn

    run = folder / "run"
    trained(recipe, run, there=True)
    if recipe.method.supervised:
        export_classifier(run, run / "trunk")
    else:
        export_trunk(run, run / "trunk", which="audio" if use is _sound else "student")
    (folder / "here").mkdir()
    (folder / "there").mkdir()
    ours = use(data, run, CPU, folder / "here")
    with StandIn():
        theirs = use(data, run, DEVICE, folder / "there")
    for name, value in ours.items():
        np.testing.assert_allclose(np.asarray(theirs[name]), np.asarray(value), 1e-4, 1e-5, err_msg=name)


@pytest.mark.slow
def test_trunks_elsewhere_see_pictures_as_on_the_cpu(data: Path, tmp_path: Path) -> None:
    recipe = make_recipe(data, data__crops=views(), train={"steps": 2})
    apart(_uses, _pictures, data, recipe, tmp_path)


@pytest.mark.slow
def test_trunks_elsewhere_hear_as_on_the_cpu(clips: Path, tmp_path: Path) -> None:
    recipe = clip_recipe(clips, cma=None, audio=SMALL["audio"], loss="nce", steps=2)
    apart(_uses, _sound, clips, recipe, tmp_path)


def test_classifiers_elsewhere_say_what_they_say_on_the_cpu(data: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        data, data__crops=views(1), method={"name": "classification", "ema": 0.9}, train={"steps": 2}
    )
    apart(_uses, _labels, data, recipe, tmp_path)
