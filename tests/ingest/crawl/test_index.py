"""Foreign tars as datasets: trained on where they lie, and every promise of a crawl kept."""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset
from typer.testing import CliRunner

from cluster.errors import UserError
from ingest import cli
from ingest.crawl.index import index_tars
from ingest.dataset.commit import read_commit
from ingest.dataset.gc import find_garbage
from ingest.dataset.open import open_dataset, sealed_units
from ingest.dataset.verify import Level, read_seal, verify_root, verify_units
from ingest.image.decode import decode
from ingest.plan.settings import CrawlSettings
from ingest.report.stats import count
from ingest.store.open import open_store
from pipeline.data.reader import Reader

UNIT_ROWS = 4


def index(tars, output, *, workers=1, extend=False, **settings):
    settings = CrawlSettings(**{"unit_rows": UNIT_ROWS} | settings)
    given = [str(tar) for tar in tars]
    return index_tars(given, output, settings, workers=workers, progress=lambda counts: None, extend=extend)


def run(*arguments):
    return CliRunner().invoke(cli.app(), [str(argument) for argument in arguments], prog_name="ingest")


def read_all(dataset):
    """Every sample by the pipeline's reader, which checks its sha256."""
    reader = Reader(dataset)
    samples = [reader.read(unit, row) for unit, n in enumerate(dataset.counts.tolist()) for row in range(n)]
    reader.close()
    return samples


def rows_of(output):
    store = open_store(output)
    rows = []
    for name in sealed_units(output, open_dataset(output).root)["meta"].to_pylist():
        rows += pq.read_table(io.BytesIO(store.read(name))).to_pylist()
    return rows


def damages(path, level=Level.DECODE):
    seal, found = read_seal(path)
    found += verify_root(path, seal)
    found += [d for unit in verify_units(path, seal, level, workers=2) for d in unit.damages]
    return [damage.sentence for damage in found]


def published(output):
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.fixture
def tars(tmp_path, scene, encode):
    """Two tars of webdataset's writer, 7 and 3 pictures, and what they hold in order; one member is none."""
    images = []
    folder = tmp_path / "tars"
    folder.mkdir()
    for name, numbers in (("a.tar", range(7)), ("b.tar", range(10, 13))):
        with webdataset.TarWriter(str(folder / name)) as out:
            for number in numbers:
                kind = ("JPEG", "PNG", "WEBP")[number % 3]
                # Orientation 6, and a place: what a crawl would strip stays here.
                exif = scene(0).getexif()
                exif[0x0112], exif[0x010E] = 6, "secret place"
                images.append(encode(scene(number), kind, exif=exif))
                key = f"cat/{number:04}"
                out.write({"__key__": key, kind.lower(): images[-1], "txt": f"picture {number}", "cls": 3})
            out.write({"__key__": "zz", "jpg": b"no picture"})
    return [folder / "a.tar", folder / "b.tar"], images


def test_images_are_read_from_the_tars_and_nothing_is_copied(tars, tmp_path):
    paths, images = tars
    before = [path.read_bytes() for path in paths]
    report = index(paths, tmp_path / "out")
    assert (report.counts.planned, report.counts.kept) == (12, 10)
    assert report.counts.rejected == {"not_an_image": 2}
    dataset = open_dataset(tmp_path / "out")
    assert read_all(dataset) == images
    assert [path.read_bytes() for path in paths] == before
    assert not (tmp_path / "out" / "shards").exists()
    assert [dataset.shard_path(unit) for unit in range(3)] == [str(paths[0])] * 2 + [str(paths[1])]
    assert damages(tmp_path / "out") == []


def test_D2_every_attempt_has_its_row_in_units_of_one_tar(tars, tmp_path):
    paths, images = tars
    # 8 rows and 4: units of 3 would run on from one tar into the other.
    index(paths, tmp_path / "out", unit_rows=3)
    units = sealed_units(tmp_path / "out", open_dataset(tmp_path / "out").root).to_pylist()
    assert [(unit["rows"], unit["kept"], Path(unit["shard"]).name) for unit in units] == [
        (3, 3, "a.tar"),
        (3, 3, "a.tar"),
        (2, 1, "a.tar"),
        (3, 3, "b.tar"),
        (1, 0, "b.tar"),
    ]
    for unit in units:
        data = Path(unit["shard"]).read_bytes()
        assert (unit["shard_bytes"], unit["shard_sha256"]) == (len(data), hashlib.sha256(data).digest())
    rows = rows_of(tmp_path / "out")
    assert [row["caption"] for row in rows[:7]] == [f"picture {number}" for number in range(7)]
    assert [row["labels"] for row in rows[:2]] == [["3"], ["3"]]
    assert rows[0]["url"] == f"{paths[0]}/cat/0000.jpeg"
    assert rows[7]["url"] == f"{paths[0]}/zz.jpg"
    assert (rows[7]["status"], rows[7]["slot"]) == ("rejected", None)
    kept = [row for row in rows if row["status"] == "kept"]
    assert [row["sha256"] for row in kept] == [hashlib.sha256(data).digest() for data in images]
    for row, data in zip(kept, images, strict=True):
        assert (row["width"], row["height"]) == decode(data).size
        assert row["phash"] is not None


def test_any_tar_will_do(tmp_path, scene, encode):
    images = [encode(scene(number), "JPEG") for number in range(6)]
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    for number, kind in enumerate(formats):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=kind) as out:
            for data in images[2 * number : 2 * number + 2]:
                # Long names and names that are no ASCII take members of their own.
                info = tarfile.TarInfo(("ü" if kind != tarfile.USTAR_FORMAT else "u") * 60 + f"/{len(data)}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    index([tmp_path / "*.tar"], tmp_path / "out")
    assert read_all(open_dataset(tmp_path / "out")) == images
    assert damages(tmp_path / "out") == []


def test_D1_same_bytes_for_any_number_of_workers_and_again(tars, tmp_path):
    paths, _ = tars
    outputs = [tmp_path / str(workers) for workers in (1, 3)]
    reports = [index(paths, output, workers=n) for output, n in zip(outputs, (1, 3), strict=True)]
    assert reports[0].root == reports[1].root
    assert published(outputs[0]) == published(outputs[1])
    again = index(paths, outputs[0])
    assert (again.root, again.counts.resumed, again.counts.bytes_read) == (reports[0].root, 12, 0)
    with pytest.raises(UserError, match="was planned with --unit-rows 4, not 5"):
        index(paths, outputs[0], unit_rows=5)


@pytest.mark.slow
def test_D1_killed_at_any_time_it_goes_on(tars, tmp_path):
    paths, images = tars
    clean = index(paths, tmp_path / "clean", unit_rows=1).root
    script = (
        "import sys\nfrom ingest.crawl.index import index_tars\n"
        "from ingest.plan.settings import CrawlSettings\n"
        "index_tars(sys.argv[2:], sys.argv[1], CrawlSettings(unit_rows=1), workers=1,"
        " progress=lambda counts: None)"
    )
    output = tmp_path / "out"
    for more in (1, 4):
        process = subprocess.Popen([sys.executable, "-c", script, output, *paths])
        want = len(list(output.glob("commits/*.json"))) + more
        while process.poll() is None and len(list(output.glob("commits/*.json"))) < want:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < len(list(output.glob("commits/*.json"))) < 12
    report = index(paths, output, unit_rows=1)
    assert (report.root, read_all(open_dataset(output))) == (clean, images)
    assert report.counts.resumed > 0
    assert damages(output) == []


def test_a_tar_that_changed_is_noticed_at_every_level(tars, tmp_path):
    paths, _ = tars
    index(paths, tmp_path / "out")
    names = [str(path) for path in paths]
    assert [damages(tmp_path / "out", level) for level in Level] == [[]] * 4
    data = bytearray(paths[0].read_bytes())
    place = rows_of(tmp_path / "out")[5]["offset"]
    data[place + 30] ^= 1
    paths[0].write_bytes(data)
    assert damages(tmp_path / "out", Level.SIZES) == []
    assert damages(tmp_path / "out", Level.SHA) == [
        f"{names[0]} does not have the sha256 that was sealed",
        f"0000000100001 (slot 1 of {names[0]}) does not have the sha256 of its row",
    ]
    with paths[1].open("ab") as file:
        file.write(b"\0" * 512)
    assert len(damages(tmp_path / "out", Level.SIZES)) == 1
    paths[1].unlink()
    assert damages(tmp_path / "out", Level.NAMES) == [f"{names[1]} is missing"]


def test_a_tar_that_changed_while_it_was_half_indexed_is_refused(tars, tmp_path):
    paths, _ = tars
    index(paths, tmp_path / "out")
    commits = sorted((tmp_path / "out" / "commits").iterdir())
    commits[1].unlink()
    data = bytearray(paths[0].read_bytes())
    data[rows_of(tmp_path / "out")[5]["offset"] + 30] ^= 1
    paths[0].write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar has changed since a part of it was indexed: restore it"):
        index(paths, tmp_path / "out")
    with tarfile.open(paths[0], "a") as out:
        out.addfile(tarfile.TarInfo("one-more.jpg"))
    with pytest.raises(UserError, match=r"a\.tar \(8 files\).*, not from .*a\.tar \(9 files\)"):
        index(paths, tmp_path / "out")


def test_a_dataset_beside_its_tars_moves_with_them(tars, tmp_path):
    paths, images = tars
    home = paths[0].parent
    root = index(["a.tar", home / "b.tar"][1:], home).root
    assert {unit["shard"] for unit in sealed_units(home, root).to_pylist()} == {"b.tar"}
    assert index([f"file://{paths[0]}"], home, extend=True).counts.planned == 8
    shutil.move(home, tmp_path / "moved")
    dataset = open_dataset(tmp_path / "moved")
    assert dataset.shard_path(0) == f"{tmp_path}/moved/b.tar"
    assert read_all(dataset) == images[7:] + images[:7]
    assert damages(tmp_path / "moved") == []
    assert list(find_garbage(tmp_path / "moved")[1]) == []
    made = open_store(tmp_path / "moved")
    assert read_commit(made, 0).shard.name == "b.tar"


def test_a_crawl_and_an_index_of_the_same_tar_are_different_work(tars, tmp_path, crawl):
    paths, images = tars
    index(paths[:1], tmp_path / "out")
    with pytest.raises(
        UserError, match=r"was planned from .*a\.tar \(8 files\), not from a\.tar \(8 files\)"
    ):
        crawl([paths[0]], tmp_path / "out", unit_rows=UNIT_ROWS)
    shutil.copy(paths[1], tmp_path / "c.tar")
    crawl([paths[1]], tmp_path / "web", unit_rows=UNIT_ROWS)
    index(paths[:1], tmp_path / "web", extend=True)
    dataset = open_dataset(tmp_path / "web")
    assert len(read_all(dataset)) == 10
    assert read_all(dataset)[3:] == images[:7]
    assert damages(tmp_path / "web") == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        pytest.param(
            "x.tar.gz",
            "x.tar.gz is compressed, and its images cannot be read where they lie: unpack",
            id="gzip",
        ),
        pytest.param("text.txt", "text.txt is not a readable tar", id="no tar"),
        pytest.param("nothing.tar", r"nothing.tar cannot be read: No such file", id="absent"),
        pytest.param(
            "http://a.example/x.tar", "http://a.example/x.tar cannot be used in place: copy it", id="http"
        ),
        pytest.param("out/shards/x.tar", "x.tar lies among the dataset's own files", id="among shards"),
        pytest.param("out/waiting/x.tar", "x.tar lies among the dataset's own files", id="among what waits"),
        pytest.param("empty.tar", "there is nothing to ingest", id="empty"),
    ],
)
def test_what_cannot_be_used_in_place_is_refused(given, sentence, tmp_path, tars):
    paths, _ = tars
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as out:
        out.add(paths[0], "x")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    (tmp_path / "text.txt").write_text("x" * 1000)
    for folder in ("shards", "waiting"):
        (tmp_path / "out" / folder).mkdir(parents=True)
        shutil.copy(paths[0], tmp_path / "out" / folder / "x.tar")
    with pytest.raises(UserError, match=sentence):
        index([given if "://" in given else tmp_path / given], tmp_path / "out")
    assert not (tmp_path / "out" / "plan").exists()


def test_the_same_tar_twice_and_names_that_are_no_text_are_refused(tars, tmp_path):
    paths, _ = tars
    with pytest.raises(UserError, match=r"a\.tar is given twice"):
        index([paths[0], paths[0]], tmp_path / "out")
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tar")
    shutil.copy(paths[0], odd)
    with pytest.raises(UserError, match=r"caf\\xe9\.tar has a name that is no UTF-8: rename it"):
        index([odd], tmp_path / "out")


def test_D4_a_truncated_tar_ends_in_a_row_that_says_so(tars, tmp_path):
    paths, images = tars
    index(paths[:1], tmp_path / "whole")
    ends = [
        row["offset"] + (row["size"] or 0) for row in rows_of(tmp_path / "whole") if row["slot"] is not None
    ]
    os.truncate(paths[0], ends[2] - 10)
    index(paths[:1], tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["reason"] for row in rows] == [None, None, "tar_truncated", "tar_truncated"]
    assert read_all(open_dataset(tmp_path / "out")) == images[:2]


def test_more_tars_than_files_may_be_open(tmp_path, scene, encode):
    data = encode(scene(), "JPEG")
    for number in range(60):
        with webdataset.TarWriter(str(tmp_path / f"{number:02}.tar")) as out:
            out.write({"__key__": "x", "jpg": data})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))  # noqa: PTH208
    try:
        assert index([tmp_path / "*.tar"], tmp_path / "out").counts.kept == 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_tars_on_s3_are_indexed_there_and_from_here(tars, tmp_path, bucket):
    paths, images = tars
    store = open_store(f"{bucket}/tars")
    for path in paths:
        store.replace(path.name, path.read_bytes())
    for output, name in (
        (f"{bucket}/tars", "a.tar"),
        (tmp_path / "here", f"{bucket}/tars/a.tar"),
    ):
        root = index([f"{bucket}/tars/*.tar"], output).root
        dataset = open_dataset(output)
        assert read_all(dataset) == images
        assert sealed_units(output, root)["shard"][0].as_py() == name
        assert dataset.shard_path(0) == f"{bucket}/tars/a.tar"
        assert damages(output) == []
    (entry,) = [entry for entry in store.list("") if entry.name == "b.tar"]
    store.delete(entry)
    assert damages(tmp_path / "here", Level.NAMES) == [f"{bucket}/tars/b.tar is missing"]
    with pytest.raises(UserError, match=r"b\.tar cannot be read: No such file"):
        index([f"{bucket}/tars/b.tar"], tmp_path / "other")


def test_the_commands_know_datasets_in_place(tars, tmp_path):
    paths, _ = tars
    done = run("index", *paths, "--output", tmp_path / "out", "--unit-rows", 4, "--workers", 1, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kept"] == 10
    assert run("verify", tmp_path / "out", "--level", "decode").exit_code == 0
    counted = count(tmp_path / "out", progress=lambda done, total: None)
    assert counted.shard_bytes == sum(path.stat().st_size for path in paths)
    assert run("show", tmp_path / "out", "--output", tmp_path / "page.html").exit_code == 0
    assert "damaged: " not in (tmp_path / "page.html").read_text()
    assert run("gc", tmp_path / "out").exit_code == 0
    retried = run("retry", tmp_path / "out")
    assert "nothing to retry" in retried.stdout
    assert all(path.exists() for path in paths)
    paths[0].write_bytes(b"")
    assert run("verify", tmp_path / "out", "--level", "sizes").exit_code == 1


def test_a_retry_leaves_images_in_their_tars(tars, tmp_path, monkeypatch):
    from ingest.problem import PROBLEMS
    from ingest.sources.tar import TarSource

    paths, images = tars
    read = TarSource._bytes

    def fails(source, item):
        return PROBLEMS["io_error"] if item.path.endswith(b".png") else read(source, item)

    with monkeypatch.context() as patch:
        patch.setattr(TarSource, "_bytes", fails)
        assert index(paths, tmp_path / "out").counts.failed == {"io_error": 3}
    assert run("retry", tmp_path / "out", "--workers", 1).exit_code == 0
    dataset = open_dataset(tmp_path / "out")
    assert sorted(read_all(dataset)) == sorted(images)
    assert damages(tmp_path / "out") == []
