"""What a cluster is like: one file per site in `configs/cluster/`, the only place for such facts."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from cluster.atomic_file import write_atomically
from cluster.job import ExecutorName
from cluster.typed_yaml import Section, check_recipe, load_recipe, read_yaml

logger = logging.getLogger(__name__)

# Where a line ends, to a shell or to `str.splitlines`.
LINE_BREAK = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029\0]")

VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
# A number in YAML is text to a process; true and false are not, for nobody knows what they would become.
VariableValue = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
Share = Annotated[float, Field(ge=0, le=1)]
OptionName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$")]
Options = dict[OptionName, str | int | bool]
# Options of sbatch and srun that a key of the site says, and those that are this program's own.
SAID_BY_KEYS = {
    "account": "account",
    "constraint": "constraint",
    "container-image": "container",
    "container-mounts": "container_mounts",
    "cpus-per-task": "cpus_per_rank",
    "exclude": "exclude",
    "export": "inherit and environment",
    "gpus-per-node": "gpus_per_node and gpu_type",
    "mem": "memory_gb",
    "partition": "partition",
    "qos": "qos",
    "time": "minutes",
}
OWN_OPTIONS = frozenset(
    {"array", "dependency", "error", "input", "job-name", "kill-on-bad-exit", "kill-on-invalid-dep"}
    | {
        "label",
        "no-requeue",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "open-mode",
        "output",
        "parsable",
        "requeue",
    }
    | {"signal", "test-only", "wait", "wrap"}
)
# What sbatch would take from the user's shell, and the key that it is to a site.
SHELL_DEFAULTS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
}


class Notify(Section):
    """Told when a run stops, whatever the reason: a command, that gets the message on its standard input as
    JSON and as its last argument in words, and a URL that the JSON is posted to.
    """

    command: tuple[str, ...] = ()
    webhook: Annotated[str, StringConstraints(pattern=r"^https?://")] | None = None


ContainerRuntime = Literal["pyxis", "apptainer", "podman-hpc"]


class CpuJobs(Section):
    """Where jobs go that ask for no GPU: the parts of a crawl, the tasks of a deduplication, timetables,
    stages that need none. Without such a section they go where all others go.

    What a node of GPUs is asked for is not theirs: where a key here says nothing, SLURM's own default is
    taken, and of `account` and `cpus_per_rank` the site's.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_rank: PositiveInt | None = None
    memory_gb: NonNegativeInt | None = None
    minutes: PositiveInt | None = None
    sbatch: Options = Field(default_factory=dict)


class Thresholds(Section):
    """What counts as fit in a preflight.

    `matmul` and `all_reduce` are the smallest shares of the median over ranks, over nodes; `link` that of
    what the better links reach (their upper quartile: with three nodes, one bad node makes two bad links out
    of three), and `link_gb_per_s` the smallest rate of a link at all: with two nodes there is nothing to
    compare with. `clock_seconds` is the largest difference between clocks, for the error that came first is
    told by time; `device_free` the smallest free share of a GPU's memory; the others are the smallest free
    sizes.
    """

    matmul: Share = 0.8
    all_reduce: Share = 0.7
    link: Share = 0.6
    link_gb_per_s: NonNegativeFloat = 0.0
    clock_seconds: NonNegativeFloat = 0.5
    device_free: Share = 0.9
    memory_gib: NonNegativeFloat = 2.0
    run_gib: NonNegativeFloat = 20.0
    temporary_gib: NonNegativeFloat = 2.0
    shared_memory_gib: NonNegativeFloat = 1.0


class Site(Section):
    """One cluster.

    `sbatch` and `srun` hold any other option of theirs by its long name: `{reservation: vision}`,
    `{cpu-bind: cores}`. `setup` are lines of shell after the modules; one that fails ends the run.
    `inherit` names variables of the submitting shell that jobs get besides a few that every process needs;
    `[ALL]` is all of them, and then a job depends on what was loaded and set where it was submitted.
    `container` is an image for `container_runtime`; this Python, the datasets and the runs must be in it or
    in `container_mounts`. `memory_gb: 0` is all that a node has. `signal_seconds` before its time limit a job
    is asked to save.
    `trusted_groups` may write what leads to execution: job.json, the site file, the source of a run.
    `failures_per_node_day` decides how often runs save; the default is what Kokolis et al., 2024
    (https://arxiv.org/abs/2410.21680) saw on Meta's RSC-1.
    """

    executor: ExecutorName | None = None
    recipe: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: tuple[str, ...] = ()
    gpus_per_node: NonNegativeInt | None = None
    gpu_type: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    cpus_per_rank: PositiveInt | None = None
    memory_gb: NonNegativeInt | None = None
    minutes: PositiveInt | None = None
    signal_seconds: PositiveInt = 180
    failures_per_node_day: NonNegativeFloat = 0.0065
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    container: str | None = None
    container_runtime: ContainerRuntime = "pyxis"
    container_mounts: tuple[str, ...] = ()
    environment: dict[VariableName, VariableValue] = Field(default_factory=dict)
    inherit: tuple[VariableName, ...] = ()
    sbatch: Options = Field(default_factory=dict)
    srun: Options = Field(default_factory=dict)
    cpu: CpuJobs | None = None
    ray_address: str | None = None
    notify: Notify = Notify()
    preflight: Thresholds = Thresholds()
    trusted_groups: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _on_one_line(self) -> Self:
        values = self.model_dump(exclude={"notify", "preflight"})
        for key, value in values.items():
            if any(LINE_BREAK.search(text) for text in _texts(value)):
                raise ValueError(f"{key} has a line break in it, and cannot stand in a batch script")
        return self

    @model_validator(mode="after")
    def _options_are_free(self) -> Self:
        of_cpu_jobs = {} if self.cpu is None else self.cpu.sbatch
        for command, options in (("sbatch", self.sbatch), ("srun", self.srun), ("cpu.sbatch", of_cpu_jobs)):
            for name in options:
                if name in SAID_BY_KEYS:
                    raise ValueError(f"{command}.{name} has a key of its own: say {SAID_BY_KEYS[name]}")
                if name in OWN_OPTIONS:
                    raise ValueError(f"{command}.{name} is set by each job itself: leave it out")
        return self

    @model_validator(mode="after")
    def _asked_in_time(self) -> Self:
        for minutes in (self.minutes, None if self.cpu is None else self.cpu.minutes):
            if minutes is not None and self.signal_seconds + 60 >= 60 * minutes:
                raise ValueError(
                    f"signal_seconds is {self.signal_seconds}, and SLURM may signal a minute early: a job of "
                    f"{minutes} minutes would be asked to stop as soon as it starts; lower signal_seconds"
                )
        return self

    def for_cpu_jobs(self) -> Self:
        """The site as jobs find it that ask for no GPU: with what its `cpu` says, if it has that section, and
        nothing of what its nodes of GPUs are asked for.
        """
        if self.cpu is None:
            return self
        own = {name: getattr(self.cpu, name) for name in type(self.cpu).model_fields}
        own |= {name: own[name] or getattr(self, name) for name in ("account", "cpus_per_rank")}
        nothing: dict[str, Any] = {"gpus_per_node": 0, "gpu_type": None, "srun": {}, "cpu": None}
        return self.model_copy(update=own | nothing)

    def with_shell_defaults(self, environment: Mapping[str, str]) -> tuple[Self, list[str]]:
        """The site with what the user's shell says to sbatch, where the site says nothing; and the words for
        each such variable, used or not.
        """
        taken: dict[str, str] = {}
        words = []
        for name, value in sorted((name, value) for name, value in environment.items() if value):
            key = SHELL_DEFAULTS.get(name)
            if key is not None and getattr(self, key) is None:
                taken[key] = value
                words.append(f"{key} {value}, as {name} says")
            elif key is not None:
                words.append(f"{key} {getattr(self, key)}, as the site file says, and not {name}={value}")
            elif name.startswith("SBATCH_"):
                words.append(f"{name} is not used: say it in the site file")
        return check_recipe(type(self), self.model_dump() | taken, where="the environment"), words

    def default_executor(self) -> ExecutorName:
        """The site's own, else SLURM where it is installed, else this machine."""
        return self.executor or ("slurm" if shutil.which("sbatch") else "local")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def read_site(path: Path) -> Site:
    """The site that a run was submitted to, from its folder. Keys of a later version's are left out: it may
    have submitted a run whose source is kept, which reads this.

    Raises:
        UserError: if the file is damaged.
    """
    return check_recipe(Site, _known(Site, read_yaml(path)), where=str(path))


def _known(section: type[Section], values: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in values.items() if name in section.model_fields}
    for name, value in known.items():
        annotation = section.model_fields[name].annotation
        for kind in (annotation, *get_args(annotation)):  # of `CpuJobs | None`, its parts
            if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Section):
                known[name] = _known(kind, value)
    return known


def write_site(site: Site, path: Path) -> None:
    """Keep the site with a run. Its environment and its webhook may hold secrets."""
    write_atomically(path, yaml.safe_dump(site.model_dump(mode="json")), private=True)


def users_site() -> Site:
    """The site that a command is given unless told otherwise: what SUBMIT_CLUSTER names.

    Raises:
        UserError: if there is none, or a key or value of it is wrong.
    """
    return load_site(os.environ.get("SUBMIT_CLUSTER", "default"))


def site_for_jobs(name: str) -> Site:
    """The same for who submits, with what the user's shell says to sbatch where the site says nothing.

    Raises:
        UserError: as `load_site`.
    """
    site, words = load_site(name).with_shell_defaults(os.environ)
    if site.default_executor() == "slurm":
        for line in words:
            logger.info("%s", line)
    return site


def load_site(name: str) -> Site:
    """A site by its file's path, or the name of a file in `configs/cluster/`.

    Raises:
        UserError: if there is none, or a key or value of it is wrong.
    """
    return load_recipe(Site, name, kind="cluster")
