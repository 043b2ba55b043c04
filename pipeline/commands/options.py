"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.job import DeviceName, ExecutorName

Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to change, such as optim.lr=0.3."),
]
Runs = Annotated[Path, typer.Option("--folder", help="The folder that holds the runs.")]
RunName = Annotated[str, typer.Argument(help="The run's name or folder.")]
Device = Annotated[
    DeviceName, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Number of machines.")]
Ranks = Annotated[
    int | None, typer.Option("--ranks", min=1, help="Processes per machine; by default one per GPU.")
]
NamedRun = Annotated[str | None, typer.Option("--run", help="The run's name; an existing run is continued.")]
ExecutorOption = Annotated[
    ExecutorName | None,
    typer.Option(
        "--executor",
        help="What to run it on; by default what the site file says, otherwise SLURM if available.",
    ),
]
StagesExecutor = Annotated[ExecutorName, typer.Option("--executor", help="What to run the stages on.")]
Cluster = Annotated[
    str,
    typer.Option(
        "--cluster",
        envvar="SUBMIT_CLUSTER",
        help="The site file: a .yaml file, or a name in configs/cluster.",
    ),
]
Trust = Annotated[bool, typer.Option("--trust", help="Trust files that other users could have written.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Print rank 0's log until the run ends.")]
Wait = Annotated[bool, typer.Option("--wait", help="Return only when the run has ended.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be started, and exit.")]
