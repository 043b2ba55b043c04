"""AVID's demo from end to end, tiny: clips, shards, two trainings, transfer, and a page that plays."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from in_this_process import InThisProcess

from cluster.errors import UserError
from ingest.dataset.open import open_dataset
from pipeline.dag.graph import build_graph, run_graph
from pipeline.dag.recipe import load_dag
from pipeline.dag.stage import Receipt
from pipeline.models.classifier import Classifier, LinearHead
from pipeline.recipe.stages import Windows
from pipeline.recipe.transfer import PredictRecipe
from pipeline.report.clip_scores import score_rows
from pipeline.report.run_page import run_page
from pipeline.stages.kinds import KINDS
from pipeline.transfer.extract import at_layer, extract_features
from pipeline.transfer.features import load_features
from pipeline.transfer.predict import predict
from pipeline.trunks.classifier import ClassifierSpec, ExportedClassifier
from pipeline.trunks.files import load_trunk, read_spec

TINY = [
    "stages.clips.recipe.train_clips=48",
    "stages.clips.recipe.test_clips=24",
    "stages.clips.recipe.side=24",
    "stages.clips.recipe.seconds=1.5",
    "stages.clips.recipe.run.workers=1",
    "stages.train.recipe.run.workers=1",
    "stages.test.recipe.run.workers=1",
    *(
        f"stages.{name}.recipe.{word}"
        for name in ("avid", "cma")
        for word in (
            "train.steps=2",
            "run.workers=0",
            "data.batch_size=16",
            "data.clip.size=16",
            "data.clip.frames=4",
            "data.audio.seconds=1",
            "trunk.width=4",
            "audio_trunk.width=4",
            "method.negatives=8",
        )
    ),
    "stages.cma.recipe.method.cma.positives=3",
    "stages.cma.recipe.method.cma.within_negatives=4",
    "stages.cma.recipe.method.cma.least_agreement=0",
    *(f"stages.features_{name}.recipe.videos.windows=2" for name in ("video", "audio")),
    *(
        f"stages.{scored}_{name}{trunk}.recipe.{word}"
        for scored, word in (("few_shot", "draws=2"), ("knn", "k=[5]"))
        for name in ("video", "audio")
        for trunk in ("", "_cma", "_random")
    ),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Receipt]]:
    folder = tmp_path_factory.mktemp("avid_demo")
    recipe = load_dag("avid_demo", [f"folder={folder}", *TINY])
    results = run_graph(build_graph(recipe, KINDS), InThisProcess(), say=lambda line: None)
    failed = {name: result for name, result in results.items() if not isinstance(result, Receipt)}
    assert not failed, failed
    return folder / "latest", results  # type: ignore[return-value]


@pytest.mark.slow
def test_the_graph_ends_in_a_page_with_scores_clips_and_positives(
    ended: tuple[Path, dict[str, Receipt]],
) -> None:
    latest, results = ended
    page = (latest / "report" / "report.html").read_text()
    for name in ("knn_video", "knn_audio_cma", "few_shot_video_random"):
        assert f"{100 * results[name].metrics['top1']:.1f}" in page
    assert "media-src data:" in page
    assert "What CMA takes for the same" in page
    assert len(re.findall(r'<div class="row">', page)) == 3 + 3 + 4
    videos = re.findall(r'src="data:video/mp4;base64,([^"]*)"', page)
    with av.open(io.BytesIO(base64.b64decode(videos[0]))) as file:
        assert [stream.codec_context.name for stream in file.streams] == ["h264", "flac"]
    assert len(videos) == 8 + 3 * 6 + 3 * 6 + 4 * (1 + 3)


@pytest.mark.slow
def test_both_trunks_are_exported_and_take_the_bytes_of_a_video(
    ended: tuple[Path, dict[str, Receipt]],
) -> None:
    latest, _ = ended
    data = next((latest / "clips" / "test").rglob("*.mp4")).read_bytes()
    for name, shape in (("video", (3, 4, 16, 16)), ("audio", (1, 50, 40))):
        trunk = load_trunk(latest / f"trunk_{name}")
        inputs = trunk.preprocess(data)
        assert inputs.shape == shape
        assert trunk(inputs[None]).shape == (1, read_spec(latest / f"trunk_{name}").feature_dim)
        with pytest.raises(TypeError, match="is no video"):
            trunk.preprocess(None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_features_are_means_over_windows_whatever_is_asked_of_a_trunk_at_once(
    ended: tuple[Path, dict[str, Receipt]],
) -> None:
    latest, _ = ended
    trunk = load_trunk(latest / "trunk_audio")
    dataset = open_dataset(latest / "test")
    each, layer = (
        extract_features(
            at_layer(trunk, trunk.network, videos),
            dataset,
            preprocessing=trunk.preprocessing,
            workers=0,
            device=torch.device("cpu"),
            videos=videos,
        )
        for videos in (
            Windows(windows=2, each=True),
            Windows(windows=2, each=True, layer="conv5x", pooling="average"),
        )
    )
    mean = load_features(latest / "features_audio" / "test.safetensors")
    torch.testing.assert_close(each.x.unflatten(0, (-1, 2)).mean(1), mean.x)
    assert torch.equal(each.keys, mean.keys.repeat_interleave(2))
    assert layer.x.shape == (48, trunk.feature_dim * 16)


@pytest.mark.slow
def test_what_a_classifier_says_of_a_video_is_the_mean_over_its_windows(
    ended: tuple[Path, dict[str, Receipt]],
) -> None:
    latest, _ = ended
    trunk, dataset = load_trunk(latest / "trunk_video"), open_dataset(latest / "test")
    each = extract_features(
        trunk,
        dataset,
        preprocessing=trunk.preprocessing,
        workers=0,
        device=torch.device("cpu"),
        videos=Windows(windows=3, each=True),
    )
    head = LinearHead(trunk.feature_dim, len(each.classes), deviation=1.0)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    spec = ClassifierSpec(
        architecture=trunk.spec.architecture,  # type: ignore[arg-type]
        preprocessing=trunk.preprocessing,
        feature_dim=trunk.feature_dim,
        classes=each.classes,
    )
    classifier = ExportedClassifier(Classifier(trunk.network, head), spec).eval()
    rows = predict(
        classifier, dataset, PredictRecipe(windows=3), workers=0, device=torch.device("cpu")
    ).to_pydict()
    with torch.no_grad():
        expected = head(each.x).softmax(1).unflatten(0, (-1, 3)).mean(1)
    np.testing.assert_allclose(rows["probability"], expected.amax(1), rtol=1e-5)
    assert [top[0] for top in rows["top"]] == [each.classes[index] for index in expected.argmax(1)]


def test_a_report_without_scores_is_refused() -> None:
    with pytest.raises(UserError, match="give it one input at least, such as knn_video"):
        score_rows({})


@pytest.mark.slow
def test_a_run_of_clips_has_a_page_of_its_own_without_labels(
    ended: tuple[Path, dict[str, Receipt]],
) -> None:
    latest, _ = ended
    known = {"run": "cma", "folder": "x", "state": "completed", "why": "cma is completed", "attempt": 1}
    known |= {"ranks": 1, "checkpoint": None, "progress": {}, "restarts": []}
    source = run_page(latest / "cma", known, images=10, seed=0, device=torch.device("cpu"))
    page = re.sub(r'"data:[^"]*"', '""', source)
    assert "Cosine of a picture and its sound" in page
    assert "What CMA takes for the same" in page
    assert page.count("<video") >= 8
    assert "Not all can be shown" not in page
    assert "media-src data:" in page
