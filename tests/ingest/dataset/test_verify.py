"""Each level of `verify` finds what it should, names it, and not before."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.dataset.commit import commit
from ingest.dataset.keys import key_name, key_of
from ingest.dataset.open import open_dataset
from ingest.dataset.records import canonical_json
from ingest.dataset.seal import seal
from ingest.dataset.shard import ShardWriter
from ingest.dataset.verify import Level, read_seal, verify_root, verify_units
from ingest.image.check import Checked
from ingest.store.posix import PosixStore

LEVELS = list(Level)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, scene, crawl):
    """Two units of four pictures whose files are all equally long, so that a swap changes no size."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(8):
        scene(number, 24, 16).save(folder / f"{number}.bmp")
    output = tmp_path_factory.mktemp("whole") / "dataset"
    crawl([folder], output, unit_rows=4)
    return output


@pytest.fixture
def dataset(whole, tmp_path):
    copy = tmp_path / "dataset"
    shutil.copytree(whole, copy)
    return copy


def shards(dataset):
    return sorted((dataset / "shards").rglob("*.tar"))


def metas(dataset):
    return sorted((dataset / "meta").rglob("*.parquet"))


def faults(dataset, level):
    """Everything found, by what it is about."""
    found, damages = read_seal(dataset)
    if found is not None:
        if level >= Level.SHA:
            damages += verify_root(dataset, found)
        for report in verify_units(dataset, found, level, workers=2):
            damages += report.damages
    for damage in damages:
        assert damage.sentence.startswith(damage.what)
        assert "\n" not in damage.sentence
    return {damage.what: damage.sentence for damage in damages}


def found_from(dataset, level):
    """Asserts that no level before this one finds anything; returns what this and each later one finds."""
    for early in LEVELS[:level]:
        assert faults(dataset, early) == {}, f"{early.name} looked further than it says"
    found = [faults(dataset, late) for late in LEVELS[level:]]
    for later in found[1:]:
        assert found[0].keys() <= later.keys()
    return found[0]


def key(unit, slot):
    return key_name(key_of(unit, slot))


@pytest.mark.parametrize("level", LEVELS)
def test_whole_dataset_is_whole_at_every_level(dataset, level):
    assert faults(dataset, level) == {}


def test_every_image_is_looked_at(dataset):
    found, _ = read_seal(dataset)
    assert [r.images for r in verify_units(dataset, found, Level.SHA, workers=1)] == [4, 4]


@pytest.mark.parametrize("kind", ["shards", "meta", "commits"])
def test_missing_file_is_found_by_name(dataset, kind):
    victim = sorted(path for path in (dataset / kind).rglob("*") if path.is_file())[1]
    victim.unlink()
    name = str(victim.relative_to(dataset))
    assert found_from(dataset, Level.NAMES) == {name: f"{name} is missing"}


def test_flipped_byte_in_an_image_is_found_by_sha(dataset):
    shard = shards(dataset)[1]
    data = bytearray(shard.read_bytes())
    size = len(data) - 1024
    data[size // 4 * 2 + 512 + 100] ^= 1  # in the third of four equally long members, behind its header
    shard.write_bytes(data)
    found = found_from(dataset, Level.SHA)
    name = str(shard.relative_to(dataset))
    assert found.keys() == {name, key(1, 2)}
    assert found[key(1, 2)] == f"{key(1, 2)} (slot 2 of {name}) does not have the sha256 of its row"


def test_flipped_byte_in_a_tar_header_is_found_by_sha(dataset):
    shard = shards(dataset)[0]
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    assert found_from(dataset, Level.SHA).keys() == {str(shard.relative_to(dataset))}


def test_truncated_shard_is_found_by_size_and_its_images_by_sha(dataset):
    shard = shards(dataset)[0]
    data = shard.read_bytes()
    shard.write_bytes(data[: (len(data) - 1024) // 2])
    name = str(shard.relative_to(dataset))
    found = found_from(dataset, Level.SIZES)
    assert found == {name: f"{name} has {(len(data) - 1024) // 2:,} bytes, and {len(data):,} were sealed"}
    deeper = faults(dataset, Level.SHA)
    assert deeper.keys() == {name, key(0, 2), key(0, 3)}
    assert "is cut off" in deeper[key(0, 3)]


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="util-linux is not installed")
def test_a_shard_that_may_not_be_opened_does_not_stop_the_rest(dataset):
    closed, other = shards(dataset)
    closed.chmod(0)
    other.unlink()
    command = [sys.executable, "-c", "from ingest.cli import main; main()", "verify", dataset, "--json"]
    if os.geteuid() == 0:  # who may open everything, unless told not to
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    told = {damage["what"]: damage["sentence"] for damage in json.loads(done.stdout)["damages"]}
    assert "cannot be read: Permission denied" in told[str(closed.relative_to(dataset))]
    assert "is missing" in told[str(other.relative_to(dataset))]


def test_swapped_shards_are_found_by_sha(dataset):
    first, second = shards(dataset)
    assert first.stat().st_size == second.stat().st_size
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    found = found_from(dataset, Level.SHA)
    assert found.keys() == {str(first.relative_to(dataset)), str(second.relative_to(dataset))} | {
        key(unit, slot) for unit in (0, 1) for slot in range(4)
    }


def test_a_missing_commit_does_not_hide_the_rest(dataset):
    gone, other = sorted(dataset.glob("commits/*.json"))[:2]
    gone.unlink()
    other.write_bytes(b"{}")
    found = faults(dataset, Level.SHA)
    assert found[str(gone.relative_to(dataset))].endswith("is missing")
    assert found[str(other.relative_to(dataset))].endswith("is not the commit that was sealed")


def test_swapped_commits_are_found_by_sha(dataset):
    first, second = (dataset / layout.commit_name(unit) for unit in (0, 1))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    assert found_from(dataset, Level.SHA).keys() == {layout.commit_name(0), layout.commit_name(1)}


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"unit": 0, "shard": 3}', b"\xff"])
def test_garbage_in_a_commit_is_found_by_sha(dataset, data):
    (dataset / layout.commit_name(0)).write_bytes(data)
    assert found_from(dataset, Level.SHA).keys() == {layout.commit_name(0)}


def test_commit_with_the_same_content_in_other_bytes_gives_another_root(dataset):
    path = dataset / layout.commit_name(1)
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=1))
    found = found_from(dataset, Level.SHA)
    assert found.keys() == {"commits"}
    assert "give root" in found["commits"]


def test_flipped_byte_in_the_metadata_is_found_by_sha(dataset):
    meta = metas(dataset)[0]
    data = bytearray(meta.read_bytes())
    data[len(data) // 2] ^= 0xFF
    meta.write_bytes(data)
    assert str(meta.relative_to(dataset)) in found_from(dataset, Level.SHA)


def test_unreadable_metadata_does_not_stop_the_rest(dataset):
    meta = metas(dataset)[0]
    meta.write_bytes(b"\0" * meta.stat().st_size)
    shard = shards(dataset)[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    found = faults(dataset, Level.DECODE)
    assert found.keys() == {str(meta.relative_to(dataset)), str(shard.relative_to(dataset))}


def test_damaged_list_of_units_is_found_by_name(dataset):
    listing = dataset / layout.sealed_name(open_dataset(dataset).root, "parquet")
    data = bytearray(listing.read_bytes())
    data[-20] ^= 1
    listing.write_bytes(data)
    found = found_from(dataset, Level.NAMES)
    assert found.keys() == {str(listing.relative_to(dataset))}
    assert "run the crawl again" in found[str(listing.relative_to(dataset))]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_missing_half_of_the_seal_is_found_by_name(dataset, kind):
    path = dataset / layout.sealed_name(open_dataset(dataset).root, kind)
    path.unlink()
    name = str(path.relative_to(dataset))
    assert found_from(dataset, Level.NAMES) == {name: f"{name} is missing"}


@pytest.mark.parametrize("name", ["units", "planned", "kept"])
def test_head_that_miscounts_is_found_by_name(dataset, name):
    path = next((dataset / "sealed").glob("*.json"))
    head = json.loads(path.read_bytes())
    path.write_bytes(canonical_json(head | {name: head[name] + 1}))
    sentence = found_from(dataset, Level.NAMES)[str(path.relative_to(dataset))]
    assert f"says {name} = {head[name] + 1}" in sentence


@pytest.mark.parametrize("status", ["rejected", "failed"])
def test_head_that_miscounts_by_reason_is_found_by_name(dataset, status):
    path = next((dataset / "sealed").glob("*.json"))
    head = json.loads(path.read_bytes())
    said = sum(head[status].values()) + 2
    path.write_bytes(canonical_json(head | {status: head[status] | {"another": 2}}))
    assert f"says {status} = {said}" in found_from(dataset, Level.NAMES)[str(path.relative_to(dataset))]
    path.write_bytes(canonical_json(head | {status: {"another": "x"}}))
    assert f"says {status} = {{" in found_from(dataset, Level.NAMES)[str(path.relative_to(dataset))]


@pytest.mark.parametrize(
    "data", [b"", b"null", b'{"sealed": 3}', b'{"sealed": "../../etc/passwd"}', b"\xff\xfe"]
)
def test_garbage_in_the_pointer_is_damage_not_a_crash(dataset, data):
    (dataset / layout.DATASET).write_bytes(data)
    assert found_from(dataset, Level.NAMES).keys() == {layout.DATASET}


def test_pointer_to_a_root_that_is_not_there(dataset):
    (dataset / layout.DATASET).write_bytes(canonical_json({"format": 1, "sealed": "0" * 64}))
    assert all("is missing" in sentence for sentence in found_from(dataset, Level.NAMES).values())


def test_what_was_never_sealed_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"is not a sealed dataset: it has no DATASET\.json"):
        read_seal(tmp_path)
    with pytest.raises(UserError, match="is not a sealed dataset"):
        read_seal(tmp_path / "nowhere")


def sealed_with(output, data, **claims):
    """A dataset with one image that is consistent by every hash, and what a careless writer claimed of it."""
    verdict = Checked(
        status="kept",
        sha256=hashlib.sha256(data).hexdigest(),
        phash=0,
        **{"format": "png", "width": 24, "height": 16, "original_width": 24, "original_height": 16} | claims,
    )
    store = PosixStore(output)
    with ShardWriter(store, 0) as writer:
        writer.add(verdict, data, url="x", labels=[])
        commit(store, writer.publish(generation=0, fingerprint="f"))
    seal(store, {0: "f"})
    return output


def test_image_that_does_not_decode_is_found_by_decode(tmp_path, scene, encode):
    png = encode(scene(0, 24, 16), "PNG")
    dataset = sealed_with(tmp_path / "dataset", png[: len(png) // 2])
    found = found_from(dataset, Level.DECODE)
    assert found.keys() == {key(0, 0)}
    assert "does not decode: truncated" in found[key(0, 0)]


def test_image_of_another_size_than_its_row_is_found_by_decode(tmp_path, scene, encode):
    dataset = sealed_with(tmp_path / "dataset", encode(scene(0, 24, 16), "PNG"), width=16, height=24)
    sentence = found_from(dataset, Level.DECODE)[key(0, 0)]
    assert sentence.endswith("decodes to 24 x 16, and its row says 16 x 24")


def test_picture_larger_than_its_row_is_not_decoded(tmp_path, encode):
    bomb = encode(Image.new("1", (4000, 4000)), "PNG")
    dataset = sealed_with(tmp_path / "dataset", bomb)
    assert "too_many_pixels" in found_from(dataset, Level.DECODE)[key(0, 0)]


def test_pictures_are_decoded_in_a_process_that_is_bounded(tmp_path, encode):
    large = encode(Image.new("RGB", (4000, 4000)), "PNG")
    dataset = sealed_with(tmp_path / "dataset", large, width=4000, height=4000)
    assert not found_from(dataset, Level.DECODE)
    found, _ = read_seal(dataset)
    (unit,) = verify_units(dataset, found, Level.DECODE, workers=1, memory_mb=16)
    assert unit.damages[0].sentence.endswith("does not decode: memory_limit")


def test_rows_that_disagree_with_the_commit_are_found_by_sha(dataset):
    """A commit and list that count one image more than the metadata has, all hashes right."""
    record = json.loads((dataset / layout.commit_name(1)).read_bytes())
    (dataset / layout.commit_name(1)).write_bytes(canonical_json(record | {"rows": 5, "kept": 5}))
    seal(PosixStore(dataset), {0: record["fingerprint"], 1: record["fingerprint"]})
    found = found_from(dataset, Level.SHA)
    assert found.keys() == {record["meta"]["name"]}
    assert "has 4 rows and 4 kept, and 5 and 5 were sealed" in found[record["meta"]["name"]]
