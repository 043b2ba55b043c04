"""Batch scripts: what sbatch is given, rendered by submitit."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError
from cluster.job import Job
from cluster.rank.process import MALLOC_SETTINGS, OPENMP_SETTINGS
from cluster.site import LINE_BREAK, ContainerRuntime, Site

Options = dict[str, str | int | bool | None]
# The shell hears a signal as it waits, and has to act: a KillWait later SLURM kills it. The ranks have a
# third of that.
WAIT_FOR_RANKS = r"""
ranks=$!
while wait $ranks; status=$?; [ -z "$stopped" ] && kill -0 $ranks 2>/dev/null; do :; done
if [ -n "$stopped" ]; then
  kill_wait=$(scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
  for second in $(seq $((${kill_wait:-30} / 3))); do kill -0 $ranks 2>/dev/null && sleep 1; done
  kill -0 $ranks 2>/dev/null || { wait $ranks; status=$?; }
fi
""".strip()
# What a job has of the shell that it was submitted from, if it is there: it is not to depend on what else is.
# By these a process finds its home, SLURM's commands and the site's `module`; a run, its store and a way out.
INHERITED = re.compile(
    r"HOME|USER|LOGNAME|SHELL|PATH|LANG|LC_\w*|BASH_ENV|MODULEPATH|MODULESHOME|MODULES_CMD|LMOD_(CMD|DIR|PKG)"
    r"|AWS_\w*|AZURE_\w*|GOOGLE_APPLICATION_CREDENTIALS|SSL_CERT_(FILE|DIR)|(?i:(https?|all|no)_proxy)"
)
# The ranks meet at the address by which SLURM knows the first node, and find their own way out by that and
# the second one: what a node's name means there may be of another network, its own loopback, or nothing.
_MEETING = (
    'export SUBMIT_PEERS=$(for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 2); do',
    '    { scontrol show node --oneliner "$host" | grep -o "NodeAddr=[^ ]*" || echo "=$host"; } |',
    "        cut -d= -f2",
    "done)",
    "export MASTER_ADDR=${SUBMIT_PEERS%%[[:space:]]*}",
)
# The script runs on the node where they meet. Another job may share it, and be listening there; a Ray that it
# has started in its allocation takes ports above these.
_MEETING_PORT = (
    "export MASTER_PORT=$((12000 + (SLURM_JOB_ID * 7 + SUBMIT_START) % 8000))",
    'while grep -qs ":$(printf %04X $MASTER_PORT) 0*:0000 0A" /proc/net/tcp /proc/net/tcp6; do',
    "    MASTER_PORT=$((MASTER_PORT + 1))",
    "done",
)
NOTHING_TO_DO = 3  # exit status of `cluster.slurm.batch begin`: the run is complete already


@dataclass(frozen=True, kw_only=True)
class Array:
    """Jobs that differ in the folder of their run alone, as the tasks of one.

    Their folders lie side by side, and their names in the digits that end the number they begin with:
    "07-of-20". SLURM writes these digits into the paths of logs, so that each task has its own.

    Attributes:
        name: what SLURM calls it.
        numbers: of the tasks that are to run, as in "3,5-9".
        folder: the one that the runs lie in.
        ahead, digits, behind: what is before the digits in a run's name, how many they are, what follows.
    """

    name: str
    numbers: str
    folder: Path
    ahead: str
    digits: int
    behind: str

    @property
    def pattern(self) -> str:
        """A task's folder to sbatch and srun."""
        return f"{pattern(self.folder)}/{self.ahead}%{self.digits}a{self.behind}"

    @property
    def words(self) -> str:
        """The same to a shell."""
        number = f'$(printf "%0{self.digits}d" "$SLURM_ARRAY_TASK_ID")'
        return f"{shlex.quote(f'{self.folder}/{self.ahead}')}{number}{shlex.quote(self.behind)}"


def render(
    job: Job,
    site: Site,
    *,
    after: Sequence[str] = (),
    exclude: Sequence[str] = (),
    array: Array | None = None,
) -> str:
    """The batch script of a job. Needs no SLURM here.

    Args:
        job, site: what runs, where.
        after: ids of jobs that must complete first; if one fails, this one is cancelled.
        exclude: nodes not to use, besides the site's.
        array: the script is of all its tasks, of which this job is one.
    """
    wants, logs = job.resources, f"{pattern(job.folder) if array is None else array.pattern}/logs"
    site = _as_found_by(job, site)
    cpus = wants.cpus_per_rank or site.cpus_per_rank
    # Equal names in a row: a second submission of the same work waits, and then finds it done. Tasks of an
    # array all have its name, and are not to wait for each other: there the later start takes the run over.
    dependencies = [f"afterok:{':'.join(after)}"] if after else []
    dependencies += ["singleton"] if array is None else []
    options: Options = {
        "nodes": wants.nodes,
        "ntasks-per-node": wants.ranks_per_node,
        "cpus-per-task": cpus,
        "gpus-per-node": _gpus(wants.gpus_per_rank * wants.ranks_per_node, site.gpu_type),
        "mem": memory(site),
        "time": _minutes(job, site),
        "exclude": ",".join([*site.exclude, *exclude]) or None,
        "signal": f"USR2@{seconds_to_save(job, site)}",
        "chdir": None if job.directory is None else str(job.directory),
        "propagate": "NONE",  # limits of a login node's shell are not for its jobs
    }
    fixed: Options = {
        "array": None if array is None else array.numbers,
        "dependency": ",".join(dependencies) or None,
        "kill-on-invalid-dep": "yes",
        "output": f"{logs}/slurm.log",
    }
    # Wait for ever: rank 0 may have much to do when the others are done. Who hangs, the watchdog ends.
    srun = ["--kill-on-bad-exit=1", "--wait=0", "--export=ALL", "--open-mode=append"]
    srun += ["--output", f"{logs}/rank-%t.log"]
    srun += [f"--cpus-per-task={cpus}"] if cpus is not None else []  # srun does not take it from the job
    srun += [option for name, value in site.srun.items() for option in _words(name, value)]
    inside: list[str] = []
    if site.container is not None:
        mounts = [str(job.folder if array is None else array.folder), *site.container_mounts]
        of_srun, inside = _container(
            site.container_runtime, site.container, mounts=mounts, gpus=wants.gpus_per_rank > 0
        )
        srun += of_srun
    run = f"RUN={shlex.quote(str(job.folder)) if array is None else array.words}"
    text = sbatch_script(
        job_name(job),
        job.folder / "logs",
        options | site_options(site) | fixed,
        setup=[run, *_setup(job, site)],
        command=f'{shlex.join([*inside, sys.executable])} -m cluster.rank "$RUN/job.json"',
        teardown=[
            "trap '' TERM HUP USR2",
            f"{_batch('end')} --status $status ${{stopped:+--stopped}}",
        ],
        srun=srun,
    )
    lines = text.removesuffix("\n").split("\n")
    command = next(index for index, line in enumerate(lines) if line.startswith("srun "))
    lines[command : command + 1] = [f"{lines[command]} &", WAIT_FOR_RANKS]
    return "\n".join(lines) + "\n"


def seconds_to_save(job: Job, site: Site) -> int:
    """How long before its time is over a job is asked to save. Of a short one not more than half: else it
    would be asked to stop as it starts.
    """
    minutes = _minutes(job, _as_found_by(job, site))
    return site.signal_seconds if minutes is None else min(site.signal_seconds, 30 * minutes)


def _minutes(job: Job, site: Site) -> int | None:
    return job.resources.minutes or site.minutes


def _as_found_by(job: Job, site: Site) -> Site:
    return site if job.resources.gpus_per_rank else site.for_cpu_jobs()


def sbatch_script(
    name: str,
    folder: Path,
    options: Options,
    *,
    setup: Sequence[str],
    command: str,
    teardown: Sequence[str] = (),
    srun: Sequence[str] | None = None,
) -> str:
    """A batch script.

    Args:
        name: of the job.
        folder: of logs that `options` and `srun` do not place.
        options: of sbatch, by their long names; None and False leave one out, True has no value.
        setup, command, teardown: lines of shell.
        srun: start the command's tasks with these words of srun; None: the script itself runs it, once.

    Raises:
        UserError: if a value has a line break: an #SBATCH line is a comment to the shell, and ends there.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    for value in given.values():
        if LINE_BREAK.search(str(value)):
            raise UserError(f"{str(value)!r} has a line break in it, and cannot stand in a batch script")
    if srun is not None:
        command = f"{shlex.join(['srun', '--unbuffered', *srun])} {command}"
    # The renderer is what the public class calls, and the class cannot be had without srun on this machine.
    from submitit.slurm.slurm import _make_sbatch_string

    text: str = _make_sbatch_string(
        command=command,
        job_name=name,
        folder=folder,
        stderr_to_stdout=True,
        setup=list(setup),
        teardown=list(teardown) or None,
        use_srun=False,  # it would say --output twice
        additional_parameters=given | {"requeue": True},  # else one lost node would end a job or a timetable
    )
    # What submitit says by itself, and would be left to the site.
    extra = {"wckey", "time", "signal", "nodes"} - given.keys()
    return "\n".join(line for line in text.rstrip().split("\n") if _option(line) not in extra) + "\n"


def site_options(site: Site) -> Options:
    """Those that every job of a site has. What its `sbatch` says goes before what the other keys say."""
    named = {"partition": site.partition, "account": site.account, "qos": site.qos}
    return named | {"constraint": site.constraint, "export": _exported(site, os.environ)} | site.sbatch


def _exported(site: Site, shell: Mapping[str, str]) -> str:
    """The variables of the submitting shell that a job gets, by name."""
    if "ALL" in site.inherit:
        return "ALL"
    return (
        ",".join(sorted(name for name in shell if INHERITED.fullmatch(name) or name in site.inherit)) or "NIL"
    )


def site_setup(site: Site, *, failed: str) -> list[str]:
    """The lines of shell that every job of a site begins with.

    Args:
        failed: a command for the line, $1, that ends with another status than 0; the script ends after it.
    """
    modules = [f"module load {shlex.quote(module)}" for module in site.modules]
    # A comment at the end of a site's line would take with it what is to happen if the line fails.
    lines = [(module, module) for module in modules] + [
        (f"eval {shlex.quote(own)}", own) for own in site.setup
    ]
    # A job's shell is no login shell, which is where a site has `module` defined.
    profile = "type module > /dev/null 2>&1 || { P=$PATH; . /etc/profile; PATH=$PATH:$P; }"
    return [
        *([profile] if lines else []),
        f"setup_failed() {{ {failed}; exit 1; }}",
        *(f"{command} || setup_failed {shlex.quote(line)}" for command, line in lines),
        *exports(site.environment),
    ]


def memory(site: Site) -> str | int | None:
    """What a job asks for of each node."""
    return f"{site.memory_gb}G" if site.memory_gb else site.memory_gb


def _gpus(count: int, kind: str | None) -> str | int | None:
    return f"{kind}:{count}" if kind is not None and count else count or None


def _words(name: str, value: str | int | bool) -> list[str]:
    """An option as words of a command; False leaves it out, True has no value."""
    if isinstance(value, bool):
        return [f"--{name}"] * value
    return [f"--{name}={value}"]


def _container(
    runtime: ContainerRuntime, image: str, *, mounts: Sequence[str], gpus: bool
) -> tuple[list[str], list[str]]:
    """Options of srun, and words before the command, that put each rank into a container."""
    pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
    match runtime:
        case "pyxis":
            return [f"--container-image={image}", f"--container-mounts={','.join(pairs)}"], []
        case "apptainer":
            binds = [word for pair in pairs for word in ("--bind", pair)]
            return [], ["apptainer", "exec", *["--nv"] * gpus, *binds, image]
        case "podman-hpc":
            volumes = [word for pair in pairs for word in ("--volume", pair)]
            of_host = ["--env-host", "--net=host", "--ipc=host"]
            return [], ["podman-hpc", "run", "--rm", *of_host, *["--gpu"] * gpus, *volumes, image]


def exports(settings: Mapping[str, str]) -> list[str]:
    """Lines of shell that set variables."""
    return [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]


def asked_for(script: str) -> str:
    """The options of a script in one line."""
    return " ".join(line.removeprefix("#SBATCH ") for line in script.split("\n") if _option(line))


def _option(line: str) -> str | None:
    found = re.match(r"#SBATCH --([a-z-]+)", line)
    return None if found is None else found[1]


def job_name(job: Job) -> str:
    """What SLURM calls the job: of a task of an array, as the array."""
    return unique_name(job.name, job.folder) if job.task is None else job.task.array


def script_file(job: Job) -> Path:
    """Where the job's batch script is: one for all tasks of an array."""
    return job.folder / "job.sbatch" if job.task is None else job.folder.parent / f"{job.task.array}.sbatch"


def unique_name(name: str, folder: Path) -> str:
    """A name for SLURM: not like something of that name in another folder."""
    return f"{name}-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]}"


def _setup(job: Job, site: Site) -> list[str]:
    """What the script does before the ranks start."""
    wants = job.resources
    lines = ["trap '' TERM HUP USR2"]  # what is ignored stays ignored in the commands below
    if wants.gpus_per_rank == 0:
        lines += exports(MALLOC_SETTINGS | OPENMP_SETTINGS)
    # The run's own source, and not what happens to lie in the working directory.
    source = ['PYTHONPATH="$RUN/source"', "PYTHONSAFEPATH=1"]
    lines += site_setup(site, failed=f'{" ".join(source)} {_batch("unprepared")} --status $? --line "$1"')
    lines += [*exports({"PYTHONUNBUFFERED": "1"}), *(f"export {each}" for each in source)]
    if (cpus := wants.cpus_per_rank or site.cpus_per_rank) is not None:
        lines.append(f"export OMP_NUM_THREADS={cpus}")
    lines += ["export SUBMIT_START=${SLURM_RESTART_COUNT:-0}"]
    lines += ["ends=$(squeue --noheader --jobs=$SLURM_JOB_ID --format=%e)"]  # "N/A" without a limit
    lines += ['export SUBMIT_ENDS=$([ -n "$ends" ] && date -d "$ends" +%s 2>/dev/null)']
    if wants.nodes == 1:  # ranks on one machine need no network
        lines.append('export SUBMIT_STORE="$RUN/store.$SUBMIT_START"')
        lines.append("export GLOO_SOCKET_IFNAME=lo")
    lines += [
        *_MEETING,
        *_MEETING_PORT,
        _batch("begin"),
        f"case $? in 0) ;; {NOTHING_TO_DO}) exit 0 ;; *) exit 1 ;; esac",
        "# Only noted: this shell is to look at how the ranks end.",
        "trap 'stopped=1' TERM HUP; trap : USR2",
    ]
    return lines


def _batch(moment: str) -> str:
    return f'{shlex.quote(sys.executable)} -m cluster.slurm.batch {moment} "$RUN"'


def pattern(folder: Path) -> str:
    """A path for sbatch and srun, to which % begins a replacement."""
    return str(folder).replace("%", "%%")
