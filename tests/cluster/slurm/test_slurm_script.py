"""The batch script, and what is asked of SLURM: all that needs none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from cluster.job import Job, Resources, State
from cluster.ray.in_allocation import ports_of
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from cluster.site import CpuJobs, Notify, Site, load_site, read_site
from cluster.slurm.batch import unprepared
from cluster.slurm.command import clean_environment
from cluster.slurm.executor import SlurmExecutor
from cluster.slurm.script import exports, job_name, render, sbatch_script, site_setup
from cluster.slurm.state import seen_as
from cluster.submit import submit

JOB = Job(
    name="train",
    function="a:b",
    arguments={},
    resources=Resources(nodes=64, ranks_per_node=8, gpus_per_rank=1),
    folder=Path("/shared/runs/train"),
    directory=Path("/shared/mine"),
)


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_resources_and_site_become_options() -> None:
    site = Site(
        partition="gpu",
        account="vision",
        qos="long",
        constraint="h100",
        exclude=("bad1",),
        cpus_per_rank=12,
        memory_gb=900,
        minutes=4320,
        sbatch={"exclusive": True, "reservation": "r1"},
    )
    found = options(render(JOB, site, after=["7", "8"], exclude=["bad2"]))
    expected = {
        "nodes": "64",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "mem": "900G",
        "time": "4320",
        "partition": "gpu",
        "account": "vision",
        "qos": "long",
        "constraint": "h100",
        "exclude": "bad1,bad2",
        "exclusive": "",
        "reservation": "r1",
        "requeue": "",
        "signal": "USR2@180",
        "dependency": "afterok:7:8,singleton",
        "kill-on-invalid-dep": "yes",
        "job-name": job_name(JOB),
        "chdir": "/shared/mine",
    }
    assert expected.items() <= found.items()


def test_what_the_site_does_not_say_is_left_to_slurm() -> None:
    found = options(render(replace(JOB, resources=Resources()), Site()))
    assert (
        not {"time", "partition", "account", "gpus-per-node", "mem", "cpus-per-task", "wckey"} & found.keys()
    )


def test_ranks_of_one_machine_meet_by_a_file_and_those_of_several_by_a_port(tmp_path: Path) -> None:
    job = replace(JOB, folder=tmp_path / "a b", resources=Resources(ranks_per_node=2))
    lines = render(job, Site()).splitlines()
    run = next(line for line in lines if line.startswith("RUN="))
    store = next(line for line in lines if line.startswith("export SUBMIT_STORE="))
    shown = subprocess.run(
        ["bash", "-c", f'SUBMIT_START=3\n{run}\n{store}\necho "$SUBMIT_STORE"'],
        check=True,
        capture_output=True,
        text=True,
    )
    assert shown.stdout == f"{RunFolder(job.folder).store(3)}\n"
    assert "export GLOO_SOCKET_IFNAME=lo" in lines
    assert "SUBMIT_STORE" not in render(JOB, Site())


@pytest.mark.parametrize(
    ("answer", "met", "peers"),
    [
        ("NodeName=$4 Arch=x NodeAddr=10.0.0.${4#n} Port=1", "10.0.0.1", ["10.0.0.1", "10.0.0.2"]),
        ("error: Unable to contact slurm controller", "n1", ["n1", "n2"]),
    ],
)
def test_ranks_meet_where_slurm_knows_the_first_node(
    answer: str, met: str, peers: list[str], tmp_path: Path
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"""#!/bin/sh\n[ $2 = hostnames ] && printf 'n1\\nn2\\nn3\\n' || echo "{answer}"\n""")
    scontrol.chmod(0o755)
    lines = render(JOB, Site()).splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("export SUBMIT_PEERS"))
    end = next(number for number, line in enumerate(lines) if line.startswith("export MASTER_ADDR"))
    script = "\n".join([*lines[begin : end + 1], "echo $MASTER_ADDR $SUBMIT_PEERS"])
    path = f"{tmp_path}:{os.environ['PATH']}"
    shown = subprocess.run(
        ["bash", "-c", script], check=True, capture_output=True, text=True, env={"PATH": path}
    )
    assert shown.stdout.split() == [met, *peers]


def test_ranks_meet_at_a_port_that_no_other_job_of_the_node_listens_on() -> None:
    lines = render(JOB, Site()).splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("export MASTER_PORT"))
    end = lines.index("done", begin)
    script = "\n".join([*lines[begin : end + 1], "echo $MASTER_PORT"])

    def port(job: int, start: int = 0) -> int:
        own = {"SLURM_JOB_ID": str(job), "SUBMIT_START": str(start)}
        shown = subprocess.run(
            ["bash", "-c", script], check=True, capture_output=True, text=True, env=os.environ | own
        )
        return int(shown.stdout)

    numbers = range(4_000, 4_020)
    found = [port(job, start) for job in numbers for start in range(2)]
    assert len(set(found)) == len(found)
    of_ray = {each for job in range(2_000) for each in ports_of(job).values()}
    assert of_ray.isdisjoint(range(12_000, 20_000))
    assert set(found) <= set(range(12_000, 20_000))
    addresses = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::")]
    for family, address in addresses[: 1 + Path("/proc/net/tcp6").exists()]:
        with socket.create_server((address, port(numbers[0])), family=family) as other:
            assert port(numbers[0]) == other.getsockname()[1] + 1


def test_runs_of_one_name_in_two_folders_do_not_wait_for_each_other(tmp_path: Path) -> None:
    names = {job_name(replace(JOB, folder=tmp_path / place / "baseline")) for place in ("one", "two")}
    assert len(names) == 2
    assert all(name.startswith("train-") for name in names)


def test_a_short_job_is_not_asked_to_stop_as_it_starts() -> None:
    job = replace(JOB, resources=Resources(minutes=10))
    assert options(render(job, Site(signal_seconds=600)))["signal"] == "USR2@300"


def test_options_that_are_off_are_left_out_and_those_that_are_on_have_no_value() -> None:
    found = options(render(JOB, Site(sbatch={"exclusive": True, "contiguous": False, "nice": 1})))
    assert (found["exclusive"], found["nice"]) == ("", "1")
    assert "contiguous" not in found


def test_a_job_has_what_the_site_says_and_not_what_the_login_shell_happens_to_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (
        "HOME",
        "PATH",
        "AWS_PROFILE",
        "LD_LIBRARY_PATH",
        "OMP_NUM_THREADS",
        "WANDB_API_KEY",
        "OTHER",
    ):
        monkeypatch.setenv(name, "x")
    exported = options(render(JOB, Site(inherit=("WANDB_API_KEY",))))["export"].split(",")
    assert {"HOME", "PATH", "AWS_PROFILE", "WANDB_API_KEY"} <= {*exported}
    assert not {"ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "OTHER"} & {*exported}
    assert options(render(JOB, Site(inherit=("ALL",))))["export"] == "ALL"


def test_modules_are_there_as_in_a_login_shell(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text('PATH=/reset\nmodule() { echo "loaded $2"; }\n')
    lines = site_setup(Site(modules=("cuda",)), failed="true")
    script = "\n".join([*lines, "echo $PATH"]).replace("/etc/profile", str(tmp_path / "profile"))
    done = subprocess.run(["bash", "-c", f"PATH=/own\n{script}"], check=False, capture_output=True, text=True)
    assert done.stdout == "loaded cuda\n/reset:/own\n"
    assert "profile" not in render(JOB, Site())


def test_numbers_are_text_to_a_process_and_no_memory_is_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("memory_gb: 0\ngpu_type: h100\nenvironment: {NCCL_IB_TIMEOUT: 22}\n")
    script = render(JOB, load_site(str(tmp_path / "site.yaml")))
    assert {"mem": "0", "gpus-per-node": "h100:8", "propagate": "NONE"}.items() <= options(script).items()
    assert "export NCCL_IB_TIMEOUT=22" in script.splitlines()


GPU_NODES = Site(
    partition="gpu",
    account="vision",
    qos="large",
    gpus_per_node=8,
    gpu_type="h100",
    cpus_per_rank=12,
    memory_gb=900,
    minutes=4320,
    sbatch={"exclusive": True},
    srun={"gpu-bind": "closest"},
)


def test_jobs_without_gpus_go_where_the_site_has_them_and_ask_for_nothing_of_its_gpu_nodes() -> None:
    site = GPU_NODES.model_copy(
        update={"cpu": CpuJobs(partition="cpu", memory_gb=16, minutes=60, sbatch={"nice": 9})}
    )
    job = replace(JOB, resources=Resources())
    script = render(job, site)
    found = options(script)
    expected = {
        "partition": "cpu",
        "account": "vision",
        "cpus-per-task": "12",
        "mem": "16G",
        "time": "60",
        "nice": "9",
    }
    assert expected.items() <= found.items()
    assert not {"qos", "exclusive", "gpus-per-node"} & found.keys()
    assert "gpu-bind" not in script
    assert render(JOB, site) == render(JOB, GPU_NODES)  # GPUs are asked for as ever
    assert "exclusive" in options(render(job, GPU_NODES))  # and so is all where there is no such section


@pytest.mark.parametrize(
    ("runtime", "command"),
    [
        (
            "pyxis",
            "--container-image=/i.sif --container-mounts=/shared/runs/train:/shared/runs/train,/data:/in ",
        ),
        (
            "apptainer",
            " apptainer exec --nv --bind /shared/runs/train:/shared/runs/train --bind /data:/in /i.sif ",
        ),
        ("podman-hpc", " --gpu --volume /shared/runs/train:/shared/runs/train --volume /data:/in /i.sif "),
    ],
)
def test_ranks_start_in_the_site_s_container(runtime: Any, command: str) -> None:
    site = Site(
        container="/i.sif",
        container_runtime=runtime,
        container_mounts=("/data:/in",),
        srun={"cpu-bind": "cores"},
    )
    line = next(line for line in render(JOB, site).splitlines() if line.startswith("srun "))
    assert command in line and " --cpu-bind=cores " in line
    assert line.index("/i.sif") < line.index(" -m cluster.rank")


def test_a_line_of_setup_that_fails_ends_the_run_and_is_told(tmp_path: Path) -> None:
    job = replace(JOB, folder=tmp_path / "run", resources=Resources(ranks_per_node=2))
    run = RunFolder.create(job.folder)
    run.write_status(
        Status(state=State.PENDING, name="train", executor="slurm", id="1", ranks=2, attempt=0, submitted=1.0)
    )
    site = Site(modules=("nothing of the name",), setup=("echo never > reached",))
    (tmp_path / "script").write_text(
        "module() { return 7; }\n" + render(job, site).replace("$RUN/source", str(Path.cwd()))
    )
    ended = subprocess.run(["bash", "script"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    status = run.read_status()
    assert status.state is State.FAILED and status.failure is not None
    assert "\"module load 'nothing of the name'\" ended with status 7" in status.failure.message
    assert not (tmp_path / "reached").exists()


def test_a_run_that_is_complete_does_not_fail_of_a_second_job_s_setup(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path)
    done = Status(
        state=State.COMPLETED, name="x", executor="slurm", id="1", ranks=2, attempt=1, submitted=1.0
    )
    run.write_status(done)
    unprepared(run, line="module load cuda", status=1)
    assert run.read_status() == done


def test_no_comment_hides_that_a_line_of_setup_fails() -> None:
    lines = site_setup(Site(setup=("X=1", "(exit 4)  # as ours says")), failed='echo "$? $1 $X"')
    script = "\n".join([*lines, "echo on"])
    ended = subprocess.run(["bash", "-c", script], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "4 (exit 4)  # as ours says 1\n")


def test_a_line_of_setup_is_not_taken_for_the_ranks() -> None:
    lines = render(JOB, Site(setup=("srun hostname",))).splitlines()
    assert "cluster.rank" in lines[lines.index("ranks=$!") - 1]


def test_what_the_shell_says_to_sbatch_is_a_default_and_is_said() -> None:
    shell = {
        "SBATCH_ACCOUNT": "vision",
        "SBATCH_PARTITION": "high",
        "SBATCH_EXCLUSIVE": "1",
        "SBATCH_QOS": "",
    }
    site, words = Site(partition="gpu").with_shell_defaults(shell)
    assert (site.account, site.partition) == ("vision", "gpu")
    assert words == [
        "account vision, as SBATCH_ACCOUNT says",
        "SBATCH_EXCLUSIVE is not used: say it in the site file",
        "partition gpu, as the site file says, and not SBATCH_PARTITION=high",
    ]
    with pytest.raises(UserError, match="line break"):
        Site().with_shell_defaults({"SBATCH_ACCOUNT": "a\n#SBATCH --nodes=9"})


def test_a_job_s_own_time_limit_goes_before_the_site_s() -> None:
    job = replace(JOB, resources=Resources(minutes=5))
    assert options(render(job, Site(minutes=100)))["time"] == "5"


@pytest.mark.parametrize(
    "hostile", ["$(touch pwned)", "`touch pwned`", "'; touch pwned; '", '"\ntouch pwned\n"']
)
def test_S1_nothing_of_the_input_is_run_by_the_shell(tmp_path: Path, hostile: str) -> None:
    # Not checked: a site file refuses line breaks, and the script does not count on it.
    site = Site.model_construct(environment={"X": hostile}, modules=(hostile,), container=hostile)
    script = render(replace(JOB, folder=tmp_path / hostile.replace("/", "_").replace("\n", " ")), site)
    tools = tmp_path / "bin"
    tools.mkdir()
    # Python too: what begins and ends the attempt does not come to an end here.
    for name in ("srun", "scontrol", "python"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$4" >> called\n')
        (tools / name).chmod(0o755)
    script = script.replace(sys.executable, str(tools / "python"))
    (tmp_path / "script").write_text("module() { :; }\n" + script)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n"}
    subprocess.run(["bash", "script"], cwd=tmp_path, env=environment, check=False, capture_output=True)
    assert not (tmp_path / "pwned").exists()
    called = (tmp_path / "called").read_text().splitlines()
    assert [line.split()[0] for line in called] == ["scontrol", "python", "srun", "python"]


LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.mark.parametrize("end", LINE_BREAKS)
def test_S1_a_line_break_never_gets_into_an_option(tmp_path: Path, end: str) -> None:
    hostile = f"a{end}touch pwned"
    for job, site in [
        (replace(JOB, folder=tmp_path / hostile), Site()),
        (JOB, Site.model_construct(partition=hostile)),
        (JOB, Site.model_construct(sbatch={"comment": hostile})),
    ]:
        with pytest.raises(UserError, match="line break"):
            render(job, site)


@pytest.mark.parametrize("end", LINE_BREAKS)
@pytest.mark.parametrize(
    "values",
    [
        {"partition": "{}"},
        {"modules": ["cuda", "{}"]},
        {"environment": {"X": "{}"}},
        {"sbatch": {"comment": "{}"}},
        {"container_mounts": ["{}"]},
        {"exclude": ["{}"]},
        {"ray_address": "{}"},
    ],
)
def test_S1_a_site_file_has_no_value_of_two_lines(tmp_path: Path, values: dict[str, Any], end: str) -> None:
    text = json.dumps(values).replace("{}", json.dumps(f"a{end}#SBATCH --nodes=9")[1:-1])
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(UserError, match=f"{next(iter(values))} has a line break in it"):
        load_site(str(tmp_path / "site.yaml"))


@pytest.mark.parametrize("end", LINE_BREAKS[1:])
def test_S1_the_lines_of_a_script_are_the_shell_s(end: str) -> None:
    """What Python takes for the end of a line may stand in a path, within quotes."""
    script = sbatch_script("x", Path("/logs"), {}, setup=exports({"X": f"a{end}b"}), command="true")
    assert f"export X='a{end}b'" in script


def test_a_dry_run_needs_no_slurm_and_a_submission_says_that_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "srun" in render(JOB, Site())
    with pytest.raises(UserError, match="there is no sbatch here"):
        submit(replace(JOB, folder=tmp_path / "run"), SlurmExecutor(Site()))
    assert not (tmp_path / "run").exists()


def test_nothing_of_an_enclosing_job_is_handed_on() -> None:
    inside = {
        "SLURM_JOB_ID": "1",
        "SLURM_CPU_BIND": "x",
        "SLURM_CONF": "/etc/slurm.conf",
        "SRUN_DEBUG": "3",
        "RANK": "1",
        "MASTER_ADDR": "node0",
        "SUBMIT_PEERS": "10.0.0.1 10.0.0.2",
        "CUDA_VISIBLE_DEVICES": "0",
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMIT_START": "2",
        "SUBMIT_CLUSTER": "site.yaml",
        "SBATCH_ACCOUNT": "vision",
        "SQUEUE_PARTITION": "other",
        "HOME": "/root",
    }
    kept = {"SLURM_CONF", "SUBMIT_CLUSTER", "HOME"}
    assert clean_environment(inside) == {name: inside[name] for name in kept}


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("PREEMPTED", State.PREEMPTED),
        ("TIMEOUT", State.TIMEOUT),
        ("NODE_FAIL", State.NODE_FAIL),
        ("OUT_OF_MEMORY", State.OUT_OF_MEMORY),
        ("CANCELLED+", State.CANCELLED),
        ("COMPLETING", State.RUNNING),
        ("SUSPENDED", State.SUSPENDED),
        ("REQUEUED", State.PENDING),
        ("INVENTED_LATER", State.RUNNING),
    ],
)
def test_ends_stay_distinct(word: str, state: State) -> None:
    assert seen_as(word).state is state


def test_the_default_site_says_nothing() -> None:
    assert load_site("default") == Site()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"partitoin": "gpu"}, "did you mean 'partition'"),
        ({"environment": {"A B": "1"}}, "environment"),
        ({"sbatch": {"output=x\n": "1"}}, "sbatch"),
        ({"sbatch": {"array": "1-2"}}, r"sbatch\.array is set by each job itself: leave it out"),
        ({"sbatch": {"export": "ALL"}}, r"sbatch\.export has a key of its own: say inherit"),
        ({"sbatch": {"time": 60}}, r"sbatch\.time has a key of its own: say minutes"),
        ({"cpu": {"sbatch": {"mem": 1}}}, r"cpu\.sbatch\.mem has a key of its own: say memory_gb"),
        ({"cpu": {"minutes": 3}}, "a job of 3 minutes would be asked to stop as soon as it starts"),
        ({"cpu": {"gpus_per_node": 8}}, "gpus_per_node"),
        ({"srun": {"output": "x"}}, r"srun\.output is set by each job itself"),
        ({"environment": {"A": True}}, r"environment\.A"),
        ({"setup": ["true\nfalse"]}, "setup has a line break in it"),
        ({"notify": {"webhook": "file:///etc/passwd"}}, "webhook"),
    ],
)
def test_a_wrong_site_file_is_told_in_a_sentence(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    import yaml

    (tmp_path / "site.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=message):
        load_site(str(tmp_path / "site.yaml"))


def test_a_site_of_a_later_version_is_read_without_what_is_not_known_here(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("{later: 1, cpu: {partition: c, later: 2}, preflight: {later: 3}}")
    assert read_site(tmp_path / "site.yaml") == Site(cpu=CpuJobs(partition="c"))


def test_a_webhook_is_http() -> None:
    assert Notify(webhook="https://example.org/hook").webhook == "https://example.org/hook"


@pytest.mark.parametrize(
    ("answer", "seconds"), [("2026-11-30T19:40:00", "1796067600"), ("N/A", ""), ("NONE", ""), ("", "")]
)
def test_ranks_know_when_their_time_is_over(answer: str, seconds: str) -> None:
    lines = [line for line in render(JOB, Site()).splitlines() if "ends=" in line or "SUBMIT_ENDS" in line]
    script = "\n".join([f"squeue() {{ echo {answer}; }}", *lines, 'echo "$SUBMIT_ENDS"'])
    shown = subprocess.run(
        ["bash", "-c", script], check=True, capture_output=True, text=True, env=os.environ | {"TZ": "UTC"}
    )
    assert shown.stdout.strip() == seconds
