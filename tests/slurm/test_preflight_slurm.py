"""Preflight on SLURM: a node that is not fit is named, and kept out of what is submitted later."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from lab import SlurmLab, wait_until
from training import Submitter

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(400)]

# Nodes that share two cores disturb each other: only what is plainly wrong counts here.
LOOK = """
import json, sys
from pathlib import Path
from cluster.preflight.exclusions import exclude
from cluster.preflight.verdict import to_json
from cluster.job import Resources
from cluster.preflight.preflight import preflight
from cluster.site import Thresholds, load_site
from cluster.slurm.executor import SlurmExecutor
from cluster.submit import submit
loose = Thresholds(matmul=0.05, all_reduce=0.01, link=0.01, run_gib=0.1, temporary_gib=0.1)
resources = Resources(nodes=int(sys.argv[3]), cpus_per_rank=1)
verdicts = preflight(SlurmExecutor(load_site(sys.argv[2])), resources, Path(sys.argv[1]), thresholds=loose)
exclude(Path("runs"), verdicts)
print(json.dumps(to_json(verdicts)))
"""


def test_a_node_that_hangs_is_named_and_left_out(slurm: SlurmLab, tmp_path: Path) -> None:
    submit = Submitter(slurm, tmp_path)
    (tmp_path / "runs").mkdir()
    fit = submit.python(LOOK, str(tmp_path / "runs" / "first"), str(submit.site()), "2").stdout
    assert {verdict["node"]: verdict["fit"] for verdict in json.loads(fit.splitlines()[-1])} == {
        f"node{number}": True for number in range(2)
    }

    assert [verdict["interface"] for verdict in json.loads(fit.splitlines()[-1])] == ["eth0", "eth0"]

    def stop_the_rank_of_node2() -> bool:
        for pid in slurm.node_pids(2):
            process = psutil.Process(pid)
            if "cluster.rank" in process.cmdline():
                process.suspend()
                return True
        return False

    second = submit.start_python(LOOK, str(tmp_path / "runs" / "second"), str(submit.site()), "3")
    wait_until(stop_the_rank_of_node2, "the rank of node2 starts", 60)
    output, _ = second.communicate(timeout=240)
    verdicts = {verdict["node"]: verdict for verdict in json.loads(output.splitlines()[-1])}
    assert [node for node, verdict in verdicts.items() if not verdict["fit"]] == ["node2"]
    script = submit("pretrain", "--recipe", "demo", "--nodes", "2", "--executor", "slurm", "--dry-run").stdout
    assert "#SBATCH --exclude=node2\n" in script
    submit("preflight", "--readmit", "node2")
    script = submit("pretrain", "--recipe", "demo", "--nodes", "2", "--executor", "slurm", "--dry-run").stdout
    assert "--exclude" not in script
