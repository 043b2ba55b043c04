"""What is taken from SLURM where a site file says nothing. `sinfo` is a script that answers as told."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.site import Site
from cluster.slurm.nodes import Nodes, all_nodes, with_nodes_of_slurm

SINFO = """#!/bin/sh
if [ -f "$ANSWERS/down" ]; then echo "Unable to contact slurm controller" >&2; exit 1; fi
cat <<END
debug|2|32|128000|(null)|30:00|NO|OFF|(null)
gpu*|60|96|1031000|gpu:h100:8(S:0-1),nvme:1|2-00:00:00|EXCLUSIVE|REQUEUE|h100,ib
gpu*|4|64|515000|gpu:4|2-00:00:00|EXCLUSIVE|REQUEUE|old
mixed|8|48|256000|gpu:a:2,gpu:b:2|infinite|NO|CANCEL|(null)
END
"""


@pytest.fixture(autouse=True)
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sinfo").write_text(SINFO)
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("ANSWERS", str(tmp_path))
    return tmp_path


def test_nodes_are_read_as_sinfo_tells_them() -> None:
    debug, large, small, mixed = all_nodes()
    assert large == Nodes(
        partition="gpu",
        default=True,
        count=60,
        cores=96,
        memory_mb=1031000,
        gpus=8,
        gpu_type="h100",
        limit="2-00:00:00",
        shared=False,
        preempt="REQUEUE",
        features=("h100", "ib"),
    )
    assert (debug.gpus, debug.shared, debug.features) == (0, True, ())
    assert (small.gpus, small.gpu_type) == (4, "")
    assert (mixed.gpus, mixed.gpu_type, mixed.limit) == (4, "", "")


@pytest.mark.parametrize(
    ("site", "ranks", "expected"),
    [
        (Site(), None, (8, 12, 0)),  # the default partition, and most of its nodes; whole nodes
        (Site(), 4, (8, 12, 503)),  # half of one
        (Site(constraint="old"), None, (4, 16, 0)),
        (Site(partition="debug"), None, (0, None, None)),
        (Site(gpus_per_node=8, cpus_per_rank=3, memory_gb=100), None, (8, 3, 100)),  # the site goes first
        (Site(gpus_per_node=2), None, (2, 12, 251)),
    ],
)
def test_what_the_site_does_not_say_slurm_does(
    site: Site, ranks: int | None, expected: tuple[int | None, ...]
) -> None:
    found, _ = with_nodes_of_slurm(site, ranks=ranks)
    assert (found.gpus_per_node, found.cpus_per_rank, found.memory_gb) == expected


def test_what_was_chosen_is_said_and_why() -> None:
    _, words = with_nodes_of_slurm(Site(cpus_per_rank=6))
    assert words == (
        "gpus_per_node 8, memory_gb 0: the site file does not say, and of partition gpu SLURM says "
        "60 nodes of 8 GPUs h100, 96 cores and 1006 GB"
    )


def test_a_silent_controller_and_a_partition_that_is_not_there_are_errors(slurm: Path) -> None:
    with pytest.raises(
        UserError, match=r"no nodes of the partition gpus .* its partitions: debug, gpu, mixed"
    ):
        with_nodes_of_slurm(Site(partition="gpus"))
    (slurm / "down").touch()
    with pytest.raises(UserError, match=r"SLURM is installed here, .* controller; .* --executor local"):
        with_nodes_of_slurm(Site())
