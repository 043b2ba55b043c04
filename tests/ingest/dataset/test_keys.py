"""The numbers of samples."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ingest.dataset.keys import KEY_SLOTS, key_name, key_of, keys_of, slots_of, unit_and_slot


@given(unit=st.integers(0, 2**32 - 1), slot=st.integers(0, KEY_SLOTS - 1))
def test_a_key_is_unit_and_slot(unit, slot):
    key = key_of(unit, slot)
    assert unit_and_slot(key) == (unit, slot)
    assert key_name(key) == f"{unit:08d}{slot:05d}"
    keys = keys_of(unit, np.array([slot], np.uint32))
    assert (keys.dtype, keys.tolist()) == (np.uint64, [key])
    assert slots_of(keys).tolist() == [slot]
