"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.job import DeviceName, ExecutorName

Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted changes, such as optim.lr=0.3.")
]
Runs = Annotated[Path, typer.Option("--folder", help="Where the runs are.")]
RunName = Annotated[str, typer.Argument(help="A run's name, or its folder.")]
Device = Annotated[
    DeviceName, typer.Option("--device", help="Where to compute; by default on a GPU if there is one.")
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Machines.")]
Ranks = Annotated[
    int | None, typer.Option("--ranks", min=1, help="Processes per machine; by default one per GPU.")
]
NamedRun = Annotated[
    str | None, typer.Option("--run", help="The run's name; one that is there already is continued.")
]
ExecutorOption = Annotated[
    ExecutorName | None,
    typer.Option(
        "--executor", help="What runs it; by default the site file's choice, else SLURM if it is here."
    ),
]
StagesExecutor = Annotated[ExecutorName, typer.Option("--executor", help="What runs the stages.")]
Cluster = Annotated[
    str,
    typer.Option(
        "--cluster", envvar="SUBMIT_CLUSTER", help="The site file: a .yaml file, or one of configs/cluster."
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Go on with what others could have written, as if it were your own.")
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Show rank 0's log until the run ends.")]
Wait = Annotated[bool, typer.Option("--wait", help="Return when the run has ended.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be started, and stop.")]
