"""A source that has not changed is not listed again, and one that may have changed is."""

import json
import os
import tarfile
import time

import pytest

from cluster.errors import UserError
from ingest.plan import listed_before
from ingest.plan.plan import read_plans
from ingest.sources.tar import TarSource
from ingest.store.open import open_store


@pytest.fixture
def packed(folder, tmp_path):
    """A tar of the pictures."""

    def pack(count):
        path = tmp_path / "set.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for file in sorted(folder(count=count).rglob("*.*")):
                tar.add(file, file.name)
        return path

    return pack


@pytest.fixture
def quiet(monkeypatch):
    """Files count as quiet at once."""
    monkeypatch.setattr(listed_before, "_QUIET_NS", 0)


@pytest.fixture
def listings(monkeypatch):
    """How often a tar was listed."""
    seen, items = [], TarSource.items

    def counted(self):
        seen.append(self.name)
        return items(self)

    monkeypatch.setattr(TarSource, "items", counted)
    return seen


def test_unchanged_tar_is_listed_once(packed, crawl, tmp_path, quiet, listings):
    path = packed(4)
    first = crawl([path], tmp_path / "out")
    fingerprint = read_plans(open_store(tmp_path / "out"))[0].fingerprint
    assert crawl([path], tmp_path / "out").root == first.root
    assert len(listings) == 1
    assert crawl([path], tmp_path / "other").root == first.root
    assert read_plans(open_store(tmp_path / "other"))[0].fingerprint == fingerprint
    with pytest.raises(UserError, match="was planned"):
        crawl([path], tmp_path / "out", unit_rows=2)


def test_tar_that_has_changed_is_listed_even_if_size_and_time_are_as_before(packed, crawl, tmp_path, quiet):
    path = packed(4)
    crawl([path], tmp_path / "out")
    before, data = path.stat(), bytearray(path.read_bytes())
    name = data.index(b"000")
    data[name : name + 3] = b"999"
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * ord(" ") + sum(data[156:512]))
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(UserError, match="was planned"):
        crawl([path], tmp_path / "out")


def test_tar_that_was_written_just_now_is_not_trusted_to_stay(packed, crawl, tmp_path, listings):
    path = packed(4)
    crawl([path], tmp_path / "out")
    assert time.time() - path.stat().st_ctime < 2
    crawl([path], tmp_path / "out")
    assert len(listings) == 2
    assert not (tmp_path / "out" / "plan" / ".listed.json").exists()


@pytest.mark.parametrize("what", ["nothing", "no JSON", "another digest", "another shape"])
def test_record_that_is_gone_damaged_or_wrong_costs_time_and_nothing_else(
    packed, crawl, tmp_path, quiet, listings, what
):
    path = packed(4)
    first = crawl([path], tmp_path / "out")
    file = tmp_path / "out" / "plan" / ".listed.json"
    written = file.read_bytes()
    if what == "nothing":
        file.unlink()
    elif what == "no JSON":
        file.write_bytes(written[:-9])
    elif what == "another digest":
        record = json.loads(written)
        record["locations"][str(path)]["sha256"] = "0" * 64
        file.write_text(json.dumps(record))
    else:
        file.write_text('{"locations": {"x": 1}}')
    assert crawl([path], tmp_path / "out").root == first.root
    assert len(listings) == 2
    assert file.read_bytes() == written
