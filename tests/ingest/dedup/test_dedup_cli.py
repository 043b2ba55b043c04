"""`ingest dedup` and `ingest view` as a user meets them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from sealed_rows import seal_rows
from typer.testing import CliRunner

from cluster.errors import UserError
from cluster.map.processes import processes
from ingest import cli
from ingest.dataset.open import open_dataset

COMMAND = [sys.executable, "-c", "from ingest.cli import main; main()"]


def run(*arguments, status=0):
    result = CliRunner().invoke(cli.app(), [str(argument) for argument in arguments], prog_name="ingest")
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def dataset(tmp_path):
    copies = [{"data": b"a", "phash": 0x0F1E2D3C4B5A6978}, {"data": b"b", "phash": 0x0F1E2D3C4B5A6979}]
    seal_rows(tmp_path / "out", [[*copies, {"labels": ["cat"]}], [copies[0], {"phash": None, "width": 300}]])
    return tmp_path / "out"


def test_dedup_tells_what_it_dropped_and_why_it_may_have_missed_some(dataset, tmp_path):
    seal_rows(tmp_path / "eval", [[{"data": b"a", "phash": 0}]])
    arguments = ["dedup", dataset, "--name", "clean", "--against", tmp_path / "eval", "--workers", 1]
    lines = dict(line.split(maxsplit=1) for line in run(*arguments).stdout.splitlines())
    assert lines["view"] == f"clean of {dataset}, root {open_dataset(dataset).root[:12]}"
    assert lines["kept"] == "2 of 5 images"
    assert lines["dropped"] == "2 with equal bytes, 1 that look alike"
    assert lines["by"].startswith("bytes   1 without a perceptual hash and 0 too flat")
    assert lines["careful"].startswith("1 evaluation image without a useful perceptual hash")
    assert len(open_dataset(dataset, view="clean")) == 2


def test_dedup_json(dataset):
    answer = json.loads(run("dedup", dataset, "--name", "clean", "--json", "--workers", 1).stdout)
    assert answer["path"] == str(dataset)
    assert answer["root"] == open_dataset(dataset).root
    assert {name: answer[name] for name in ("view", "samples", "kept", "exact", "near", "groups")} == {
        "view": "clean",
        "samples": 5,
        "kept": 3,
        "exact": 1,
        "near": 1,
        "groups": 1,
    }
    assert answer["hot"] == {"buckets": 0, "members": 0, "not_compared": 0}


def test_dedup_exact_and_radius(dataset):
    exact = json.loads(run("dedup", dataset, "--name", "a", "--exact", "--json", "--workers", 1).stdout)
    zero = json.loads(run("dedup", dataset, "--name", "b", "--hamming", 0, "--json", "--workers", 1).stdout)
    assert (exact["kept"], zero["kept"]) == (4, 4)


def test_dedup_drops_by_default_what_differs_in_up_to_four_bits(tmp_path):
    # Hashes have 32 bits set, so that they differ in 2, 4, 6, ... bits.
    hashes = [0x0F1E2D3C4B5A6978 ^ bits for bits in (0, 0b11011, 0x3F00)]
    assert [phash.bit_count() for phash in hashes] == [32, 32, 32]
    seal_rows(tmp_path / "out", [[{"phash": phash} for phash in hashes]])
    answer = json.loads(run("dedup", tmp_path / "out", "--name", "clean", "--json", "--workers", 1).stdout)
    assert (answer["kept"], answer["near"]) == (2, 1)


def test_view_makes_and_lists(dataset, tmp_path):
    assert "has no views" in run("view", dataset).stdout
    (tmp_path / "asked.txt").write_text("0000000000000\nhttps://example.org/gone.jpg\n")
    run("dedup", dataset, "--name", "clean", "--workers", 1)
    made = run(
        *("view", dataset, "--name", "small", "--within", "clean", "--where", "width < 300"),
        *("--where", "label = cat", "--remove", tmp_path / "asked.txt", "--workers", 1),
    )
    lines = made.stdout.splitlines()
    assert lines[1:] == [
        "kept     1 of 5 images",
        "dropped  2 by within clean",
        f"dropped  1 by remove {tmp_path / 'asked.txt'}",
        "dropped  1 by where width < 300",
        "dropped  0 by where label = cat",
        f"careful  1 of 2 lines of {tmp_path / 'asked.txt'} name no sample: https://example.org/gone.jpg",
    ]
    listed = json.loads(run("view", dataset, "--json").stdout)
    assert [(view["name"], view["kept"], view["samples"], view["latest"]) for view in listed["views"]] == [
        ("clean", 3, 5, True),
        ("small", 1, 5, True),
    ]
    assert [line.split() for line in run("view", dataset).stdout.splitlines()][1:] == [
        ["clean", "3", "5", open_dataset(dataset).root[:12]],
        ["small", "1", "5", open_dataset(dataset).root[:12]],
    ]


def test_a_view_of_nothing_says_so_and_ends_with_1(dataset, tmp_path):
    words = ("view", dataset, "--name", "v", "--where", "width > 1000", "--workers", 1)
    assert run(*words, status=1).stdout.splitlines()[-1] == "Nothing is kept: no view was written."
    assert json.loads(run(*words, "--json", status=1).stdout)["kept"] == 0
    assert "has no views" in run("view", dataset).stdout
    alike = [{"data": b"a", "phash": 0}, {"data": b"b", "phash": 0}]
    seal_rows(tmp_path / "some", [alike])
    seal_rows(tmp_path / "eval", [[*alike, {}]])
    dedup = ("dedup", tmp_path / "some", "--name", "v", "--against", tmp_path / "eval", "--workers", 1)
    assert "Nothing is kept" in run(*dedup, status=1).stdout


def test_view_intersects(dataset):
    run("view", dataset, "--name", "a", "--where", "width < 300", "--workers", 1)
    run("dedup", dataset, "--name", "b", "--workers", 1)
    answer = run(
        "view", dataset, "--name", "c", "--intersect", "a", "--within", "b", "--json", "--workers", 1
    )
    assert json.loads(answer.stdout)["kept"] == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["view", "--where", "width > 3"], "a view needs a name"),
        (["view", "--name", "v", "--where", "width >> 3"], "--where 'width >> 3' is not a condition"),
        (["view", "--name", "v", "--where", "size = big"], "a number, with 'big'"),
        (["view", "--name", "../v"], "is no name for a view"),
        (["view", "--name", "v", "--remove", "none.txt"], "none.txt cannot be read: No such file"),
        (["dedup", "--name", "v", "--within", "none"], "has no view named none"),
        (["dedup", "--name", "v", "--against", "none"], "none is not a dataset"),
        (["dedup", "--name", "v", "--parts", "2"], "--parts is for ray and slurm"),
        (["dedup", "--name", "v", "--executor", "ray", "--scratch", "."], "say with --parts how many"),
        (["dedup", "--name", "v", "--executor", "slurm", "--parts", "2"], "a folder that all nodes reach"),
    ],
)
def test_mistakes_end_in_one_sentence(dataset, arguments, sentence):
    result = run(arguments[0], dataset, *arguments[1:], status=2)
    assert result.stdout == ""
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (dataset / "views").exists()


@pytest.mark.slow
def test_D1_killed_half_way_and_run_again_gives_the_same_view(tmp_path):
    units = [[{"data": b"%d" % (number % 40)} for number in range(unit, unit + 30)] for unit in range(20)]
    seal_rows(tmp_path / "one", units)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    run("dedup", tmp_path / "one", "--name", "clean", "--workers", 1)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [*COMMAND, "dedup", tmp_path / "two", "--name", "clean", "--scratch", scratch]
    for kind in ("digests-", "same-"):
        for folder in scratch.iterdir():
            shutil.rmtree(folder)
        process = subprocess.Popen(
            [*command, "--workers", "1"], stdout=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and not any(scratch.glob(f"*/{kind}*")):
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "two" / "views").exists()
    subprocess.run([*command, "--workers", "2"], check=True, timeout=60, stdout=subprocess.DEVNULL)
    for file in ("clean.parquet", "clean.duplicates.parquet"):
        views = [(tmp_path / name / "views" / file).read_bytes() for name in ("one", "two")]
        assert views[0] == views[1]


def test_a_worker_that_is_ended_from_outside_is_told():
    with pytest.raises(UserError, match="was ended from outside"), processes(2) as map_tasks:
        list(map_tasks(os._exit, [9]))
