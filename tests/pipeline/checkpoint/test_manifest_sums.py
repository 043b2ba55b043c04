"""The sums of a checkpoint are taken once, when it is written, and repeated wherever they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import UserError
from pipeline.checkpoint.files import manifest_sums
from pipeline.checkpoint.writer import digest
from pipeline.dag.digests import content_digest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints, of three files and a manifest each."""
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for name in (".metadata", "state.json", "__0_0.distcp"):
            (folder / name).write_text(f"{name} of {step}")
        files = {path.name: digest(path) for path in folder.iterdir()}
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
    (tmp_path / "checkpoints" / "latest").write_text("step-00000002\n")
    return tmp_path


def test_the_digest_by_the_manifests_is_that_of_all_bytes_and_reads_none_of_them(run: Path) -> None:
    checkpoints = run / "checkpoints"
    of_all_bytes = content_digest(checkpoints)
    assert content_digest(checkpoints, manifest_sums(run)) == of_all_bytes
    tensors = checkpoints / "step-00000001" / "__0_0.distcp"
    tensors.write_text(tensors.read_text().swapcase())  # as long as before
    assert content_digest(checkpoints, manifest_sums(run)) == of_all_bytes
    assert content_digest(checkpoints) != of_all_bytes


def truncate(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").write_text("__0_0")


def replace(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("of quite another run")


def remove(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


def cut_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"files": {".meta')


def scramble_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"files": ["state.json", ".metadata"]}')


def forget_a_size(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["state.json"]["bytes"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    "damage", [truncate, replace, remove, cut_manifest, scramble_manifest, forget_a_size]
)
def test_a_file_that_is_missing_or_of_another_size_is_a_sentence_and_the_remedy_works(
    run: Path, damage: Callable[[Path], None], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.checkpoint.files.WAITS", (0.0, 0.0))
    broken = run / "checkpoints" / f"step-{step:08d}"
    damage(broken)
    with pytest.raises(UserError, match=rf"checkpoint {broken} is broken \(.+\): remove it and give"):
        manifest_sums(run)
    for file in broken.iterdir():
        file.unlink()
    broken.rmdir()
    assert len(manifest_sums(run)) == 3


def test_a_run_without_checkpoints_has_no_sums(tmp_path: Path) -> None:
    assert manifest_sums(tmp_path) == {}
