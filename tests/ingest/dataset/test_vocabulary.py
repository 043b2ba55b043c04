"""Labels as codes of one vocabulary, which follows from the rows alone."""

import pyarrow as pa
import pytest
from sealed_rows import seal_rows

from cluster.errors import UserError
from ingest.crawl.crawl import crawl_shards
from ingest.dataset import vocabulary
from ingest.dataset.open import open_dataset
from ingest.dataset.schema import LABELS
from ingest.image.check import Treatment
from ingest.plan.settings import CrawlSettings

IGNORE = pa.schema([pa.field("ignore", LABELS)])
UNITS = [
    [{"labels": ["dog", "cat"], "ignore": ["sofa"]}, {"labels": []}],
    [{"labels": ["\u00e9t\u00e9"], "ignore": []}, {"labels": ["Zebra", "cat"], "ignore": ["dog", "bus"]}],
]
NAMES = ("Zebra", "bus", "cat", "dog", "sofa", "\u00e9t\u00e9")


def names(opened, codes):
    return [opened.vocabulary.names[code] for code in codes]


def test_all_labels_of_a_sample_come_as_codes_and_those_to_ignore_apart(tmp_path):
    seal_rows(tmp_path / "out", UNITS, extra=IGNORE)
    opened = open_dataset(tmp_path / "out")
    assert opened.vocabulary.names == NAMES
    for index, rows in enumerate(UNITS):
        labels = opened.unit_labels(index)
        assert len(labels) == 2
        for row, expected in enumerate(rows):
            assert names(opened, labels.of(row)) == expected["labels"]
            assert names(opened, labels.ignored_of(row)) == expected.get("ignore", [])


def test_an_old_generation_without_the_column_ignores_nothing(tmp_path):
    seal_rows(tmp_path / "out", UNITS, extra=IGNORE, old_units=1)
    opened = open_dataset(tmp_path / "out")
    assert names(opened, opened.unit_labels(0).codes) == ["dog", "cat"]
    assert len(opened.unit_labels(0).ignored) == 0
    assert "sofa" not in opened.vocabulary.names


def test_a_dataset_that_has_none_gets_it_once_and_keeps_it(tmp_path, monkeypatch):
    root = seal_rows(tmp_path / "out", UNITS, extra=IGNORE)
    file = tmp_path / "out" / "sealed" / f"{root}.labels.parquet"
    assert not file.exists()
    assert open_dataset(tmp_path / "out").vocabulary.names == NAMES
    assert file.exists()
    monkeypatch.setattr(vocabulary, "distinct_labels", None)
    assert open_dataset(tmp_path / "out").vocabulary.names == NAMES


def test_a_dataset_that_cannot_be_written_has_one_all_the_same(tmp_path, monkeypatch):
    seal_rows(tmp_path / "out", UNITS, extra=IGNORE)

    def refuse(store, root, labels):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(vocabulary, "publish_vocabulary", refuse)
    assert open_dataset(tmp_path / "out").vocabulary.names == NAMES


def test_what_the_seal_writes_is_what_the_rows_say(tmp_path, folder):
    source = folder(count=4)  # the text is rejected, and its label is one all the same
    (source / "bird").mkdir()
    (source / "bird" / "9.jpg").write_text("no picture")
    (tmp_path / "l.csv").write_text('key,labels,ignore\ncat/000,cat,sofa\nbird/9,bird,\ndog/001,"dog,pet",\n')
    report = crawl_shards(
        [str(source)],
        tmp_path / "out",
        CrawlSettings(unit_rows=2, treatment=Treatment(phash=False)),
        workers=1,
        progress=lambda counts: None,
        labels=[str(tmp_path / "l.csv")],
    )
    file = tmp_path / "out" / "sealed" / f"{report.root}.labels.parquet"
    sealed = file.read_bytes()
    assert open_dataset(tmp_path / "out").vocabulary.names == ("bird", "cat", "dog", "pet", "sofa")
    file.unlink()
    assert open_dataset(tmp_path / "out").vocabulary.names == ("bird", "cat", "dog", "pet", "sofa")
    assert file.read_bytes() == sealed


@pytest.mark.parametrize("damage", [b"no parquet", None])
def test_a_damaged_one_is_a_sentence_and_its_remedy_works(tmp_path, damage):
    root = seal_rows(tmp_path / "out", UNITS, extra=IGNORE)
    file = tmp_path / "out" / "sealed" / f"{root}.labels.parquet"
    if damage is None:
        opened = open_dataset(tmp_path / "out")
        vocabulary.publish_vocabulary(opened.store, root, pa.array(["another dataset's"]))
    else:
        file.write_bytes(damage)
    with pytest.raises(UserError, match=r"labels.parquet is damaged: remove it"):
        open_dataset(tmp_path / "out").unit_labels(0)
    file.unlink()
    assert len(open_dataset(tmp_path / "out").unit_labels(0).codes) == 2


def test_many_labels_need_little_memory_at_a_time(monkeypatch):
    monkeypatch.setattr(vocabulary, "_PENDING", 3)
    tables = [pa.table({"labels": pa.array([[str(n % 7), "x"]], LABELS)}) for n in range(50)]
    assert vocabulary.distinct_labels(tables).to_pylist() == [*map(str, range(7)), "x"]
    assert vocabulary.distinct_labels([]).to_pylist() == []
