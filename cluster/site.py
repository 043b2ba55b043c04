"""What a cluster is like: one file per site in `configs/cluster/`, the only place for such facts."""

from __future__ import annotations

import shutil
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, StringConstraints

from cluster.job import ExecutorName
from cluster.settings import Section, load_recipe

VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
OptionName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$")]


class Notify(Section):
    """Told when a run stops, whatever the reason: a command, that gets the message on its standard input as
    JSON and as its last argument in words, and a URL that the JSON is posted to.
    """

    command: tuple[str, ...] = ()
    webhook: Annotated[str, StringConstraints(pattern=r"^https?://")] | None = None


class Site(Section):
    """One cluster.

    `sbatch` holds any other option of sbatch by its long name: `{reservation: vision}`. `container` is an
    image for SLURM's pyxis plugin. `signal_seconds` before its time limit a job is asked to save.
    """

    executor: ExecutorName | None = None
    recipe: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: tuple[str, ...] = ()
    gpus_per_node: NonNegativeInt | None = None
    cpus_per_rank: PositiveInt | None = None
    memory_gb: PositiveInt | None = None
    minutes: PositiveInt | None = None
    signal_seconds: PositiveInt = 180
    modules: tuple[str, ...] = ()
    container: str | None = None
    environment: dict[VariableName, str] = Field(default_factory=dict)
    sbatch: dict[OptionName, str | int | bool] = Field(default_factory=dict)
    ray_address: str | None = None
    notify: Notify = Notify()

    def default_executor(self) -> ExecutorName:
        """The site's own, else SLURM where it is installed, else this machine."""
        return self.executor or ("slurm" if shutil.which("sbatch") else "local")


def load_site(name: str) -> Site:
    """A site by its file's path, or the name of a file in `configs/cluster/`.

    Raises:
        UserError: if there is none, or a key or value of it is wrong.
    """
    return load_recipe(Site, name, kind="cluster")
