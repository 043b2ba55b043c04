"""Fine-tunings as a graph leaves them behind: receipts, descriptions and predictions, and no weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.dag.stage import Input, Receipt
from pipeline.data.evaluation import Preprocessing
from pipeline.models.trunk import build_trunk, declared
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.trunk import Architecture
from pipeline.transfer.predict import SCHEMA, summarise, write_predictions
from pipeline.trunks.classifier import ClassifierSpec
from pipeline.trunks.files import TrunkSpec

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class Graph:
    """Stages under a folder, each with its receipt."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def stage(self, kind: str, name: str, *, inputs: dict[str, Input] | None = None, **said: Any) -> Input:
        """A finished stage."""
        key = hashlib.sha256(f"{kind} {name}".encode()).hexdigest()
        receipt = Receipt(
            key=key,
            stage=name,
            kind=kind,
            version=1,
            recipe=said.get("recipe", {}),
            inputs={role: f"{source.receipt.key}/" for role, source in (inputs or {}).items()},
            outputs={},
            metrics=said.get("metrics", {}),
            started=0.0,
            seconds=1.0,
            gpu_hours=said.get("gpu_hours", 0.0),
            machine="a machine",
        )
        folder = self.root / f"{kind}-{key[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "receipt.json").write_text(receipt.model_dump_json())
        return Input(path=folder, receipt=receipt)

    def trunk(self, name: str, *, recipe: PretrainRecipe, gpu_hours: float = 0.0, **inputs: Input) -> Input:
        """An exported trunk, and the pretraining of 100 steps on 60 images before it."""
        run = self.stage("pretrain", name, inputs=inputs, gpu_hours=gpu_hours)
        made = self.stage("export", name, inputs={"run": run})
        values = recipe.model_dump(mode="json", exclude={"run"})
        spec = TrunkSpec(
            architecture=recipe.trunk,
            preprocessing=Preprocessing(image_size=16, resize=16, mean=MEAN, std=STD),
            feature_dim=8,
            provenance={"samples": 60, "steps": 100, "recipe": values, "method": recipe.method.name},
        )
        (made.path / "trunk.json").write_text(spec.model_dump_json())
        return made

    def tuned(
        self,
        name: str,
        trunk: Input,
        right: np.ndarray[Any, np.dtype[np.bool_]] | int,
        *,
        recipe: PretrainRecipe,
        px: int = 16,
        classes: int = 4,
        **metrics: Any,
    ) -> Input:
        """A fine-tuning, tested: which images it has right, or of how many it has four fifths right."""
        hits = np.arange(right) % 5 > 0 if isinstance(right, int) else right
        table = _predictions(hits)
        summary = summarise(table) | metrics
        said = recipe.model_dump(mode="json")
        made = self.stage(
            "finetune", name, inputs={"trunk": trunk}, recipe=said, metrics=summary, gpu_hours=0.5
        )
        spec = ClassifierSpec(
            architecture=Architecture.model_validate(recipe.trunk.model_dump()),
            preprocessing=Preprocessing(image_size=px, resize=px, mean=MEAN, std=STD),
            feature_dim=_features(recipe.trunk),
            classes=tuple(f"class{number}" for number in range(classes)),
            provenance={"samples": 60, "steps": 100},
        )
        (made.path / "classifier").mkdir(exist_ok=True)
        (made.path / "classifier" / "classifier.json").write_text(spec.model_dump_json())
        write_predictions(table, made.path / "predictions.parquet")
        return made


def _features(section: Architecture) -> int:

    with torch.device("meta"):
        return declared(build_trunk(section)).feature_dim


def _predictions(hits: np.ndarray[Any, np.dtype[np.bool_]]) -> pa.Table:
    count = len(hits)
    names = pa.ListArray.from_arrays(
        pa.array(np.arange(count + 1), pa.int32()),
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(count), pa.int32()), pa.array(["class0"])),
    )
    columns = [np.arange(count), names, names, np.full(count, 0.5, np.float32), np.where(hits, 0, -1)]
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, field.type)
        for column, field in zip(columns, SCHEMA, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata({"dataset": "d" * 64}))
