"""A sample's key: its unit and its slot in one number, and that number in 13 digits, its name for life."""

import numpy as np
from numpy.typing import NDArray

KEY_SLOTS = 100_000


def key_of(unit: int, slot: int) -> int:
    """The key of a sample."""
    return unit * KEY_SLOTS + slot


def keys_of(unit: int, slots: NDArray[np.integer]) -> NDArray[np.uint64]:
    """The keys of a unit's samples, (n,)."""
    return slots.astype(np.uint64) + np.uint64(key_of(unit, 0))


def unit_and_slot(key: int) -> tuple[int, int]:
    """What the key was made of."""
    return divmod(key, KEY_SLOTS)


def slots_of(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The slots of keys, (n,)."""
    return keys % np.uint64(KEY_SLOTS)


def key_name(key: int) -> str:
    """The key as people see it, and as the stem of its tar member: 8 digits of the unit, 5 of the slot."""
    return f"{key:013d}"
