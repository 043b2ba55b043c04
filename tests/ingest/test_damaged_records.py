"""Whoever reads a damaged record says so in one sentence, with its path and a remedy that works."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from ingest import cli
from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import open_dataset
from ingest.plan.settings import CrawlSettings

SETTINGS = ["--unit-rows", "2", "--workers", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, scene):
    """A folder of three pictures, and the dataset of it, in two units."""
    place = tmp_path_factory.mktemp("whole")
    (place / "in").mkdir()
    for number in range(3):
        scene(number, 24, 16).save(place / "in" / f"{number}.png")
    settings = CrawlSettings(unit_rows=2)
    crawl_shards([str(place / "in")], place / "out", settings, workers=1, progress=lambda counts: None)
    return place


@pytest.fixture
def dataset(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole / "out", tmp_path / "out")
    return tmp_path / "out"


def arguments(command, whole):
    """A command about `out`, and what it needs."""
    more = {
        "crawl-shards": [str(whole / "in"), "--output", "out", *SETTINGS],
        "dedup": ["out", "--name", "v", "--workers", "1"],
        "view": ["out", "--name", "v", "--where", "width > 1", "--workers", "1"],
        "retry": ["out", "--workers", "1"],
    }
    return [command, *more.get(command, ["out"])]


# Which commands read it. The crawl writes DATASET.json and the head anew.
SEEING = ["stats", "show", "card", "view", "dedup"]
READERS = {
    "DATASET.json": SEEING,
    "sealed/*.json": SEEING,
    "commits/00000001.json": ["crawl-shards", "retry", "gc"],
    "plan/0/plan.json": ["crawl-shards", "retry", "show", "card"],
}


def without_a_key(data):
    record = json.loads(data)
    del record[sorted(record)[-1]]
    return json.dumps(record).encode()


def with_another_type(data):
    record = json.loads(data)
    key = sorted(record)[-1]
    return json.dumps(record | {key: [record[key]]}).encode()


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "no JSON": lambda data: b"\xff\x00" + data,
    "nested without end": lambda data: b"[" * 100_000,
    "no object": lambda data: b"[%s]" % data,
    "a key less": without_a_key,
    "another type": with_another_type,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("record", READERS)
def test_whoever_reads_a_damaged_record_names_it_in_one_line(whole, dataset, record, damage):
    (path,) = dataset.glob(record)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    for command in READERS[record]:
        result = CliRunner().invoke(cli.app(), arguments(command, whole))
        assert (command, result.exit_code) == (command, 2), result.output
        (line,) = result.stderr.splitlines()
        assert f"{path.relative_to(dataset.parent)} is damaged: " in line


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"[" * 100_000])
def test_verify_names_every_damaged_record_of_the_sealed_dataset(dataset, damage):
    for record in ("commits/00000001.json", "sealed/*.json", "DATASET.json"):
        (path,) = dataset.glob(record)
        path.write_bytes(damage)
        result = CliRunner().invoke(cli.app(), ["verify", "out"])
        assert result.exit_code == 1
        assert str(path.relative_to(dataset)) in result.stdout


def test_whoever_wants_a_word_of_the_plan_only_goes_on_without_it(whole, dataset):
    (dataset / "plan" / "0" / "plan.json").write_bytes(b"{")
    for command, said in (("verify", "(3 images read)"), ("view", "of 3 images"), ("dedup", "of 3 images")):
        result = CliRunner().invoke(cli.app(), arguments(command, whole))
        assert result.exit_code == 0 and said in result.stdout, result.output


@pytest.mark.parametrize("record", READERS)
def test_the_remedy_gives_the_same_dataset(whole, dataset, record):
    (path,) = dataset.glob(record)
    root = open_dataset(dataset).root
    path.write_bytes(b"{")
    told = CliRunner().invoke(cli.app(), arguments(READERS[record][0], whole)).stderr
    if "remove it" in told:
        path.unlink()
    assert CliRunner().invoke(cli.app(), arguments("crawl-shards", whole)).exit_code == 0
    assert open_dataset(dataset).root == root
    assert CliRunner().invoke(cli.app(), ["verify", "out"]).exit_code == 0


@pytest.mark.parametrize("size", [None, 0, 100])
def test_a_list_of_units_that_is_lost_or_damaged_can_be_made_again(whole, dataset, size):
    (path,) = dataset.glob("plan/0/units-*.parquet")
    data = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(data[:size])
    (dataset / "commits" / "00000001.json").unlink()
    result = CliRunner().invoke(cli.app(), arguments("crawl-shards", whole))
    assert result.exit_code == 2
    assert f"{path.relative_to(dataset.parent)} is damaged or gone" in result.stderr
    (dataset / "plan" / "0" / "plan.json").unlink()
    assert CliRunner().invoke(cli.app(), arguments("crawl-shards", whole)).exit_code == 0
    assert path.read_bytes() == data


def test_a_list_of_units_with_bytes_before_it_is_damaged(whole, dataset):
    (path,) = dataset.glob("plan/0/units-*.parquet")
    path.write_bytes(b"\xff\x00" + path.read_bytes())
    result = CliRunner().invoke(cli.app(), arguments("retry", whole))
    assert result.exit_code == 2
    assert f"{path.relative_to(dataset.parent)} is damaged or gone" in result.stderr


def test_a_head_that_is_gone_is_made_again(whole, dataset):
    (path,) = dataset.glob("sealed/*.json")
    data = path.read_bytes()
    path.unlink()
    result = CliRunner().invoke(cli.app(), ["stats", "out"])
    assert result.exit_code == 2
    assert "running the crawl again makes the newest anew" in result.stderr
    assert CliRunner().invoke(cli.app(), arguments("crawl-shards", whole)).exit_code == 0
    assert path.read_bytes() == data


def test_keys_of_later_versions_change_nothing(whole, dataset):
    before = {}
    for path in [*dataset.rglob("plan.json"), *(dataset / "sealed").glob("*.json"), dataset / "DATASET.json"]:
        before[path] = path.read_bytes()
        path.write_text(json.dumps(json.loads(before[path]) | {"later": {"x": 1}}))
    for command in ("retry", "stats", "card", "gc"):
        assert CliRunner().invoke(cli.app(), arguments(command, whole)).exit_code == 0
    assert CliRunner().invoke(cli.app(), arguments("crawl-shards", whole)).exit_code == 0
    assert (dataset / "DATASET.json").read_bytes() == before[dataset / "DATASET.json"]
