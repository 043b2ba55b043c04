"""Views: what is written is read back, and never for another dataset."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from ingest.dataset.view import read_view, view_name, write_view

ROOT = "ab" * 32


@settings(max_examples=30, deadline=None)
@given(
    units=st.dictionaries(st.integers(0, 2**32 - 1), st.lists(st.booleans(), max_size=40), max_size=6),
)
def test_view_survives_the_round_trip(tmp_path_factory, units):
    folder = tmp_path_factory.mktemp("dataset")
    keeps = {unit: np.array(bits, bool) for unit, bits in units.items()}
    write_view(folder, "clean", root=ROOT, keeps=keeps)
    view = read_view(folder, "clean", root=ROOT)
    assert view.units.tolist() == sorted(keeps)
    assert view.kept.tolist() == [int(keeps[unit].sum()) for unit in sorted(keeps)]
    for unit, bits in keeps.items():
        assert np.array_equal(view.keeps(unit), bits)


def test_unknown_unit_is_a_key_error(tmp_path):
    write_view(tmp_path, "clean", root=ROOT, keeps={3: np.ones(5, bool)})
    view = read_view(tmp_path, "clean", root=ROOT)
    for unit in (0, 2, 4):
        with pytest.raises(KeyError):
            view.keeps(unit)


def test_view_of_another_root_is_refused(tmp_path):
    write_view(tmp_path, "clean", root=ROOT, keeps={0: np.ones(5, bool)})
    with pytest.raises(UserError, match=r"was made for root abababababab and this is root cdcdcdcdcdcd"):
        read_view(tmp_path, "clean", root="cd" * 32)


def test_absent_view_names_those_that_exist(tmp_path):
    with pytest.raises(UserError, match="it has no views"):
        read_view(tmp_path, "clean", root=ROOT)
    write_view(tmp_path, "dedup", root=ROOT, keeps={})
    with pytest.raises(UserError, match="it has dedup"):
        read_view(tmp_path, "clean", root=ROOT)


@pytest.mark.parametrize("name", ["../clean", "a/b", "", ".hidden", "x" * 101, "a\nb"])
def test_view_name_cannot_leave_its_folder(name):
    with pytest.raises(UserError, match="no name for a view"):
        view_name(name)


def test_published_view_is_never_replaced(tmp_path):
    path = write_view(tmp_path, "clean", root=ROOT, keeps={0: np.ones(5, bool)})
    before = path.read_bytes()
    assert write_view(tmp_path, "clean", root=ROOT, keeps={0: np.ones(5, bool)}) == path
    with pytest.raises(UserError, match="another name"):
        write_view(tmp_path, "clean", root=ROOT, keeps={0: np.zeros(5, bool)})
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["clean.parquet"]


def test_damaged_view_is_told(tmp_path):
    path = write_view(tmp_path, "clean", root=ROOT, keeps={0: np.ones(9, bool)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable view"):
        read_view(tmp_path, "clean", root=ROOT)


def test_view_whose_counts_and_bits_disagree_is_told(tmp_path):
    path = write_view(tmp_path, "clean", root=ROOT, keeps={0: np.ones(9, bool)})
    table = pq.read_table(path)
    index = table.schema.get_field_index("kept")
    pq.write_table(table.set_column(index, table.schema.field(index), pa.array([8], pa.uint32())), path)
    with pytest.raises(UserError, match="damaged at unit 0"):
        read_view(tmp_path, "clean", root=ROOT)
