"""A run that begins where another one ended: trunks, heads and bank, but not the optimizer."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.errors import UserError
from cluster.rank.torch_dist import World
from pipeline.checkpoint.files import METHOD, broken_file, latest
from pipeline.checkpoint.metadata import TensorReader
from pipeline.data.loader import Loader
from pipeline.distributed.sharded import named_tensors, whole_shape
from pipeline.methods.method import Method


def checkpoint_to_begin_from(init_from: str) -> Path:
    """The checkpoint that `train.init_from` means: a run's newest, or that one.

    Raises:
        UserError: if there is none.
    """
    path = Path(init_from)
    checkpoint = path if (path / "manifest.json").is_file() else latest(path)
    if checkpoint is None:
        raise UserError(
            f"train.init_from: {path} holds no checkpoint; give the folder of a run that has saved one, or "
            "one of its checkpoints/step-…"
        )
    return checkpoint


def begin_from(checkpoint: Path, method: Method, loader: Loader, *, world: World) -> None:
    """Fill a method with the tensors of another run's checkpoint, in place; all ranks together.

    Raises:
        UserError: if it is broken, of another method, or of other data, whose samples have other rows.
    """
    wrong = world.gather(broken_file(checkpoint, share=(world.rank, world.size)))
    if broken := next((each for each in wrong if each is not None), None):
        raise UserError(f"train.init_from: checkpoint {checkpoint} is broken: {broken}; use an older one")
    there = json.loads((checkpoint / "state.json").read_text())["loader"]
    here = loader.state()
    for key in ("root", "view", "samples"):
        if there.get(key) != here[key]:
            raise UserError(
                f"train.init_from: the bank of {checkpoint} is of data with {key} {there.get(key)!r}, and "
                f"this run's has {here[key]!r}: rows of a bank belong to the samples of one dataset and "
                "view; train AVID on this one first"
            )
    reader = TensorReader(checkpoint)
    targets = {f"{METHOD}{name}": tensor for name, tensor in named_tensors(method)}
    for name, tensor in targets.items():
        entry = reader.tensors.get(name)
        shape = tuple(whole_shape(tensor))
        if entry is None or tuple(entry.size) != shape:
            found = "is not there" if entry is None else f"is {tuple(entry.size)} there"
            raise UserError(
                f"train.init_from: {checkpoint} was saved by another model: {name.removeprefix(METHOD)} "
                f"{found}, and {shape} here; use the trunks and the head of that run"
            )
    reader.load(targets, world.control)
