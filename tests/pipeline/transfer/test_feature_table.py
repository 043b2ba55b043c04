"""`submit features`: a row for each sample, with what is known of it; the file is whole or not there."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from captioned import captioned
from safetensors import safe_open
from torch import Tensor, nn
from typer.testing import CliRunner

from cluster.errors import UserError
from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import Dataset, open_dataset
from ingest.dataset.view import write_view
from ingest.plan.settings import CrawlSettings
from pipeline.cli import app
from pipeline.data.evaluation import Preprocessing, evenly_spaced, image_batches, normalise
from pipeline.transfer import feature_table
from pipeline.transfer.extract import extract_features
from pipeline.transfer.feature_table import rows_beside, write_table
from pipeline.trunks.files import ExportedTrunk, Pixels, TrunkSpec, load_trunk, save_trunk

CPU = torch.device("cpu")
VIEW = Preprocessing(image_size=4, resize=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
SPEC = TrunkSpec(architecture=Pixels(name="pixels"), preprocessing=VIEW, feature_dim=48)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Sixty images in units of 17, with captions but for the last five, and labels."""
    return open_dataset(captioned(tmp_path_factory.mktemp("data"), silent=5))


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trunk")
    save_trunk(nn.Flatten(), SPEC, folder)
    return folder


def submit(*words: object) -> str:
    result = CliRunner().invoke(app, ["features", *map(str, words)], prog_name="submit")
    assert result.exit_code in (0, 2), result.output
    return result.stdout if result.exit_code == 0 else result.stderr


def read(path: Path, dtype: torch.dtype) -> tuple[Tensor, list[int], dict[str, str]]:
    with safe_open(path, "pt") as file:
        features = file.get_tensor("features")
        assert features.dtype == dtype
        return features.float(), file.get_tensor("keys").tolist(), file.metadata()


@pytest.mark.parametrize("group", [1, 3000, 32 << 20])
def test_each_row_has_its_samples_features_key_path_caption_and_labels(
    dataset: Dataset, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    monkeypatch.setattr(feature_table, "_GROUP_BYTES", group)
    monkeypatch.setattr(feature_table, "BATCH_SIZE", 7)  # no divisor of a unit's 17
    out, told = tmp_path / "new" / "f.parquet", []
    out.parent.mkdir()
    loaded = load_trunk(trunk)
    assert (
        write_table(loaded, dataset, out, workers=0, device=CPU, progress=lambda *of: told.append(of)) == 60
    )
    assert told[0] == (7, 60) and told[-1] == (60, 60)
    assert list(out.parent.iterdir()) == [out]
    table = pq.read_table(out)
    assert table.schema.names == ["key", "url", "caption", "labels", "features"]
    expected = extract_features(nn.Flatten(), dataset, preprocessing=VIEW, workers=0, device=CPU)
    found = np.array(table["features"].to_pylist(), np.float32)
    assert np.array_equal(found, expected.x.numpy())
    assert table["key"].to_pylist() == expected.keys.tolist()
    said = [row for unit in range(len(dataset.units)) for row in dataset.kept_rows(unit).to_pylist()]
    for name in ("url", "caption", "labels"):
        assert table[name].to_pylist() == [row[name] for row in said]
    assert table["caption"].null_count == 5
    assert table.schema.metadata[b"dataset"].decode() == dataset.root
    assert TrunkSpec.model_validate_json(table.schema.metadata[b"trunk"]) == SPEC


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_safetensors_file_has_its_rows_beside_it(
    dataset: Dataset, trunk: Path, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    out = tmp_path / "deep" / "f.safetensors"
    words = [trunk, "--data", dataset.path, "--output", out, "--precision", precision, "--workers", 0]
    assert submit(*words) == f"{out}: 60 rows; its rows are described in {rows_beside(out)}\n"
    features, keys, about = read(out, dtype)
    assert about["dataset"] == dataset.root
    expected = extract_features(nn.Flatten(), dataset, preprocessing=VIEW, workers=0, device=CPU)
    assert torch.equal(features, expected.x.to(dtype).float())
    assert keys == expected.keys.tolist() == pq.read_table(rows_beside(out))["key"].to_pylist()
    assert pq.read_table(rows_beside(out)).schema.names == ["key", "url", "caption", "labels"]
    assert f"{out} already exists" in submit(*words)
    assert "60 rows" in submit(*words, "--force")
    out.unlink()
    assert f"{rows_beside(out)} already exists" in submit(*words)


def test_of_a_view_and_without_labels(trunk: Path, tmp_path: Path) -> None:
    source = captioned(tmp_path, images=8).parent / "images"
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(source.rglob("*.png"))):
        path.rename(flat / f"{number}.png")
    crawl_shards([str(flat)], tmp_path / "out", CrawlSettings(), workers=1, progress=lambda counts: None)
    whole = open_dataset(tmp_path / "out")
    write_view(tmp_path / "out", "few", root=whole.root, keeps={0: np.arange(8) % 2 == 0})
    out = tmp_path / "f.parquet"
    submit(
        trunk, "--data", whole.path, "--view", "few", "--output", out, "--precision", "fp16", "--workers", 0
    )
    table = pq.read_table(out)
    assert table["key"].to_pylist() == [0, 2, 4, 6] and table["labels"].to_pylist() == [[]] * 4
    expected = pixels_of(whole)[::2]
    assert torch.equal(torch.tensor(table["features"].to_pylist()), expected.half().float())


def pixels_of(dataset: Dataset) -> Tensor:
    batches = image_batches(dataset, evenly_spaced(len(dataset), None), preprocessing=VIEW, workers=0)
    return torch.cat([normalise(batch.images, VIEW, CPU).flatten(1) for batch in batches])


def test_what_fails_on_its_way_leaves_nothing(dataset: Dataset, tmp_path: Path) -> None:
    class Large(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) * 1e5

    for name in ("f.parquet", "f.safetensors"):
        with pytest.raises(UserError, match=rf"{name}: features up to .* do not fit into fp16"):
            write_table(
                ExportedTrunk(Large(), SPEC),
                dataset,
                tmp_path / name,
                workers=0,
                device=CPU,
                precision="fp16",
            )
    assert list(tmp_path.iterdir()) == []


def test_other_kinds_of_file_are_refused(dataset: Dataset, trunk: Path, tmp_path: Path) -> None:
    words = [trunk, "--data", dataset.path, "--output"]
    assert r"of a file of features ends in .parquet or .safetensors" in submit(*words, tmp_path / "f.csv")
    assert "Parquet has no bf16" in submit(*words, tmp_path / "f.parquet", "--precision", "bf16")
