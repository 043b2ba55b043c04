"""What a graph is to become: its stages, written down where they go before the first one runs.

For whoever looks at the folder and has neither the graph's file nor what its stages run with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cluster.atomic_file import write_atomically
from cluster.typed_json import parse_record
from pipeline.dag.stage import Stage

PLANNED = "graph.json"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A stage that there is, or is to be.

    Attributes:
        folder: its name below the graph's.
        inputs: as its receipt is going to name them.
    """

    name: str
    key: str
    folder: str
    inputs: dict[str, str]


def write_planned(stages: Sequence[Stage]) -> None:
    """Write down the graph that is about to run, in place of the one that ran before it in this folder."""
    planned = [
        Planned(name=stage.name, key=stage.key, folder=stage.folder.name, inputs=stage.input_keys)
        for stage in stages
    ]
    root = stages[0].root
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(root / PLANNED, json.dumps([asdict(each) for each in planned], indent=2) + "\n")


def parse_planned(data: bytes, *, where: str) -> list[Planned]:
    """The stages of such a file.

    Raises:
        UserError: if it is damaged.
    """
    return parse_record(list[Planned], data, where=where, remedy="`submit dag` writes it anew")
