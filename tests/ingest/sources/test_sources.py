"""Folders and tars from strangers: every item listed once, in order, in bounds."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from ingest.problem import PROBLEMS, Problem
from ingest.sources import tar_bytes, tar_members
from ingest.sources.folder import FolderSource
from ingest.sources.opening import open_images
from ingest.sources.tar import TarSource

MAX = 1 << 20


def read(source, max_bytes=MAX):
    items = list(source.items())
    return {
        item.path: data for item, data in zip(items, source.read(items, max_bytes=max_bytes), strict=True)
    }


def archive(path, members, *, kind=tarfile.USTAR_FORMAT, opener=open):
    with opener(path, "wb") as file, tarfile.open(fileobj=file, mode="w|", format=kind) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def test_folder_is_listed_in_the_order_of_path_bytes(tmp_path):
    odd = ["é/ü.jpg".encode(), b"caf\xe9/\xff.jpg"]
    names = [b"b/z.jpg", b"b.jpg", b"b-c/1", b"a/b/c.png", b"a/b.png", b"a-1", *odd]
    for name in names:
        path = os.fsencode(tmp_path) + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(name)
    assert list(read(FolderSource(tmp_path)).items()) == [(name, name) for name in sorted(names)]


def test_D4_a_tree_deeper_than_the_stack_is_listed(tmp_path):
    folders = [f"{tmp_path}{'/d' * depth}" for depth in range(1, 1501)]
    for folder in folders:
        os.mkdir(folder)  # noqa: PTH102 -- pathlib recurses, as makedirs and rmtree do
    picture = Path(folders[-1], "last.jpg")
    picture.write_bytes(b"last")
    try:
        assert list(read(FolderSource(tmp_path)).values()) == [b"last"]
    finally:
        picture.unlink()
        for folder in reversed(folders):
            os.rmdir(folder)  # noqa: PTH106


@settings(max_examples=40, deadline=None)
@given(st.sets(st.text("ab-./ \n0é", min_size=1, max_size=8), max_size=12))
def test_folder_order_is_that_of_whole_paths(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("f")
    for name in names:
        path = root / ("x" + name.replace("/", "/x").replace("/x/", "/"))
        if not path.exists() and not any(parent.is_file() for parent in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    paths = [item.path for item in FolderSource(root).items()]
    assert paths == sorted(paths)
    visible = {
        os.fsencode(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }
    assert set(paths) == visible


def test_D4_links_pipes_and_hidden_files(tmp_path):
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (root / "real.jpg").write_bytes(b"real")
    (root / ".hidden.jpg").write_bytes(b"hidden")
    (root / ".git").mkdir()
    (root / ".git" / "x.jpg").write_bytes(b"hidden")
    (root / "deep" / "inside.jpg").symlink_to("../real.jpg")
    (root / "outside.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "loop").symlink_to(root)
    (root / "dangling").symlink_to(root / "nothing")
    os.mkfifo(root / "pipe.jpg")
    got = read(FolderSource(root))
    assert got == {
        b"dangling": PROBLEMS["io_error"],
        b"deep/inside.jpg": b"real",
        b"loop": PROBLEMS["link_outside"],
        b"outside.jpg": PROBLEMS["link_outside"],
        b"pipe.jpg": PROBLEMS["not_a_file"],
        b"real.jpg": b"real",
    }


def test_D4_a_file_that_changes_after_planning_is_judged_again(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    for name in ("gone", "linked", "piped"):
        (root / name).write_bytes(b"data")
    source = FolderSource(root)
    items = list(source.items())
    for name in ("gone", "linked", "piped"):
        (root / name).unlink()
    (root / "linked").symlink_to(tmp_path / "secret.jpg")
    os.mkfifo(root / "piped")
    reasons = [got.reason for got in source.read(items, max_bytes=MAX) if isinstance(got, Problem)]
    assert reasons == ["io_error", "link_outside", "not_a_file"]


def test_D4_huge_file_is_rejected_unread(tmp_path):
    with (tmp_path / "endless.jpg").open("wb") as file:
        file.truncate(1 << 42)
    assert read(FolderSource(tmp_path)) == {b"endless.jpg": PROBLEMS["too_many_bytes"]}


def test_unreadable_folder_has_a_row(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.jpg").write_bytes(b"a")
    scandir = os.scandir

    def forbidden(path):  # to root, too
        if path.endswith(b"/closed/"):
            raise PermissionError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    assert read(FolderSource(tmp_path)) == {b"closed": PROBLEMS["folder_unreadable"], b"open/a.jpg": b"a"}


def test_links_are_followed_out_of_a_folder_if_asked_and_never_in_circles(tmp_path):
    root = tmp_path / "subset"
    (root / "own").mkdir(parents=True)
    (tmp_path / "all" / "cat").mkdir(parents=True)
    (tmp_path / "all" / "cat" / "1.jpg").write_bytes(b"cat")
    (tmp_path / "all" / "back").symlink_to(root)
    (root / "cat").symlink_to(tmp_path / "all" / "cat")
    (root / "own" / "2.jpg").symlink_to(tmp_path / "all" / "cat" / "1.jpg")
    (root / "own" / "up").symlink_to(root)
    (root / "all").symlink_to(tmp_path / "all")
    assert set(read(FolderSource(root)).values()) == {PROBLEMS["link_outside"]}
    source = FolderSource(root, follow_links=True)
    there = {name: data for name, data in read(source).items() if isinstance(data, bytes)}
    assert there == {b"all/cat/1.jpg": b"cat", b"cat/1.jpg": b"cat", b"own/2.jpg": b"cat"}
    assert source.describe().follow_links is True
    assert "follow_links" not in FolderSource(root).describe().plain()


def test_what_a_link_leads_to_may_come_after_the_plan(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "1.jpg").symlink_to(tmp_path / "1.jpg")
    source = FolderSource(tmp_path / "set", follow_links=True)
    planned = list(source.items())
    assert list(source.read(planned, max_bytes=1000)) == [PROBLEMS["io_error"]]
    (tmp_path / "1.jpg").write_bytes(b"cat")
    assert list(source.read(planned, max_bytes=1000)) == [b"cat"]


names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=120)


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=5),
    kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_tar_members_are_those_that_tarfile_wrote(tmp_path_factory, members, kind):
    path = archive(tmp_path_factory.mktemp("t") / "x.tar", members, kind=kind)
    expected = [(tar_members._clean(name.encode()), data) for name, data in members]
    expected = [(name, data) for name, data in expected if not name.startswith(b".") and b"/." not in name]
    source = TarSource(path)
    items = list(source.items())
    got = list(source.read(items, max_bytes=MAX))
    with tarfile.open(path) as reference:
        kept = {member.offset_data for member in reference if member.isreg()}
    assert {item.offset for item in items} <= kept
    assert [(item.path, data) for item, data in zip(items, got, strict=True)] == expected


def zstd_open(path, mode):
    assert mode == "wb"
    return pa.CompressedOutputStream(str(path), "zstd")


@pytest.mark.parametrize("opener", [open, gzip.open, bz2.open, lzma.open, zstd_open])
def test_compressed_tars_are_known_by_content(tmp_path, opener):
    members = [(f"cat/{n}.jpg", bytes([n]) * 700) for n in range(5)]
    source = open_images(str(archive(tmp_path / "any.name", members, opener=opener)))
    assert list(read(source).items()) == [(name.encode(), data) for name, data in members]
    items = list(source.items())
    backwards = list(source.read(reversed(items), max_bytes=MAX))
    assert backwards == [data for _, data in reversed(members)]
    source.close()


def test_D4_names_are_labels_and_only_regular_members_count(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as out:
        for name in ("/abs/a.jpg", "../../etc/b.jpg", "./c/./d.jpg", "c/._d.jpg", ".hidden/e.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            out.addfile(info, io.BytesIO(b"x"))
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"special{number}")
            info.type, info.linkname, info.size = kind, "/etc/passwd" * 20, 0
            out.addfile(info)
        out.addfile(tarfile.TarInfo("last"), None)
    found = read(TarSource(path))
    assert [name for name, data in found.items() if isinstance(data, bytes)] == [
        b"abs/a.jpg",
        b"etc/b.jpg",
        b"c/d.jpg",
        b"last",
    ]
    # Folders are none of the files; what else there is has a row.
    assert {name: data for name, data in found.items() if isinstance(data, Problem)} == {
        b"special0": PROBLEMS["link_unresolved"],
        b"special1": PROBLEMS["link_unresolved"],
        b"special3": PROBLEMS["not_a_file"],
        b"special4": PROBLEMS["not_a_file"],
    }


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("opener", [open, gzip.open])
def test_D2_links_have_the_data_of_what_they_name_or_a_reason(tmp_path, kind, opener):
    long = "d" * 120 + "/a.jpg"
    links = [
        ("x/hard.jpg", tarfile.LNKTYPE, "./" + long),
        ("x/hard2.jpg", tarfile.LNKTYPE, "x/hard.jpg"),
        ("x/soft.jpg", tarfile.SYMTYPE, "../" + long),
        ("x/out.jpg", tarfile.SYMTYPE, "../../etc/passwd"),
        ("x/late.jpg", tarfile.SYMTYPE, "later.jpg"),
    ]
    with opener(tmp_path / "x.tar", "wb") as file, tarfile.open(fileobj=file, mode="w", format=kind) as out:
        for name in (long, "y"):
            info = tarfile.TarInfo(name)
            info.size = 5
            out.addfile(info, io.BytesIO(b"image"))
        for name, type_, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type_, target
            out.addfile(info)
    found = read(TarSource(tmp_path / "x.tar"))
    there = b"image" if opener is open else PROBLEMS["link_compressed"]
    unresolved = PROBLEMS["link_unresolved"]
    assert list(found.values()) == [b"image", b"image", there, there, there, unresolved, unresolved]


def test_D2_archives_one_behind_the_other_are_one(tmp_path):
    one = archive(tmp_path / "1.tar", [("a", b"1"), ("b", b"2")]).read_bytes()
    two = archive(tmp_path / "2.tar", [("c", b"3")]).read_bytes()
    (tmp_path / "x.tar").write_bytes(one + bytes(1 << 21) + two)
    assert read(TarSource(tmp_path / "x.tar")) == {b"a": b"1", b"b": b"2", b"c": b"3"}
    (tmp_path / "x.tar").write_bytes(one + b"no header" * 512 + two)
    assert read(TarSource(tmp_path / "x.tar")) == {
        b"a": b"1",
        b"b": b"2",
        b"": PROBLEMS["tar_damaged"],
        b"c": b"3",
    }


def test_sparse_members_have_a_row_and_the_next_is_found(tmp_path):
    with (tmp_path / "holes").open("wb") as file:
        for block in range(40):
            file.seek(block * 65_536)
            file.write(b"x" * 4096)
    (tmp_path / "next").write_bytes(b"next")
    status = subprocess.run(
        ["tar", "--sparse", "--format=gnu", "-cf", "x.tar", "holes", "next"], cwd=tmp_path, check=False
    ).returncode
    if status:
        pytest.skip("needs GNU tar")
    assert read(TarSource(tmp_path / "x.tar")) == {b"holes": PROBLEMS["sparse_member"], b"next": b"next"}


@pytest.mark.parametrize("opener", [open, gzip.open])
@pytest.mark.parametrize("cut", [1700, 2100, 2700, 3073])
def test_truncated_tar_keeps_what_could_be_read(tmp_path, opener, cut):
    whole = archive(tmp_path / "whole.tar", [(str(n), bytes([65 + n]) * 600) for n in range(3)]).read_bytes()
    path = tmp_path / "cut.tar"
    with opener(path, "wb") as file:
        file.write(whole[:cut])
    if opener is gzip.open:
        path.write_bytes(path.read_bytes()[:-9])
    got = list(read(TarSource(path)).values())
    good = [data for data in got if isinstance(data, bytes)]
    assert good == [b"A" * 600, b"B" * 600][: len(good)]
    assert len(good) >= 1 or opener is gzip.open
    assert {data.reason for data in got[len(good) :] if isinstance(data, Problem)} == {"tar_truncated"}


def test_damaged_tar_says_so_after_what_could_be_read(tmp_path):
    whole = bytearray(archive(tmp_path / "x.tar", [(str(n), b"data") for n in range(3)]).read_bytes())
    whole[1024 + 148] ^= 1
    (tmp_path / "x.tar").write_bytes(whole)
    assert list(read(TarSource(tmp_path / "x.tar")).values()) == [b"data", PROBLEMS["tar_damaged"], b"data"]


def test_D4_compressed_tar_that_unpacks_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_bytes, "_EXPANSION_FREE", 1 << 20)
    info = tarfile.TarInfo("zeros")
    info.size = 1 << 40
    with gzip.open(tmp_path / "x.tgz", "wb") as file:
        file.write(info.tobuf() + b"\0" * (4 << 20))
    assert list(read(TarSource(tmp_path / "x.tgz")).values()) == [
        PROBLEMS["too_many_bytes"],
        PROBLEMS["tar_bomb"],
    ]


@pytest.mark.parametrize(
    "header",
    [
        pytest.param({"type": tarfile.XHDTYPE, "size": 1 << 33}, id="endless extended header"),
        pytest.param({"type": tarfile.GNUTYPE_LONGNAME, "size": 1 << 33}, id="endless name"),
        pytest.param({"type": tarfile.REGTYPE, "size": -512}, id="negative size"),
        pytest.param({"type": tarfile.REGTYPE, "size": 1 << 64}, id="size beyond every file"),
        pytest.param({"name": "x" * 100_000}, id="name beyond every system"),
    ],
)
def test_D4_hostile_headers_end_the_archive(tmp_path, header):
    info = tarfile.TarInfo("x")
    for name, value in header.items():
        setattr(info, name, value)
    bad = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    good = archive(tmp_path / "good.tar", [("good", b"data")]).read_bytes()[:1024]
    (tmp_path / "x.tar").write_bytes(good + bad + b"\0" * 2048)
    assert list(read(TarSource(tmp_path / "x.tar")).values()) == [b"data", PROBLEMS["tar_damaged"]]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_D4_pax_records_of_any_bytes_end_in_bounds(body):
    try:
        tar_members._pax_records(body)
    except tar_bytes.TarError as error:
        assert error.problem == "tar_damaged"


@settings(max_examples=60, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=12))
def test_D4_any_damage_to_a_tar_ends_in_a_finite_list(tmp_path_factory, edits):
    path = tmp_path_factory.mktemp("t") / "x.tar"
    members = [("a" * 150, b"1" * 700), ("ü/b", b"2" * 300), ("c", b"3")]
    data = bytearray(archive(path, members, kind=tarfile.PAX_FORMAT).read_bytes())
    for place, value in edits:
        data[place % len(data)] = value
    path.write_bytes(data)
    source = TarSource(path)
    items = list(source.items())
    assert len(items) <= len(data) // 512
    assert len(list(source.read(items, max_bytes=MAX))) == len(items)


def test_what_is_no_source_is_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK\3\4" + b"\1" * 2000)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "1.gif").write_bytes(b"GIF89a\1\0\1\0\0\0\0;")
    for name in ("x.zip", "empty"):
        with pytest.raises(UserError, match="neither a folder, nor a readable tar"):
            open_images(str(tmp_path / name))
    for name, says in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "1.gif", "is an image: give its folder"),
        ("https://host/pictures", "is not named like a list, and nothing else is read from there"),
    ):
        with pytest.raises(UserError, match=says):
            open_images(str(name))
