"""Which network interface leads to the other nodes."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from cluster.rank.interface import GLOO, choose_interface, interface_to

HERE = [
    (name, each.address)
    for name, addresses in psutil.net_if_addrs().items()
    for each in addresses
    if each.family == socket.AF_INET and name != "lo"
]


def test_a_name_that_leads_nowhere_else_is_passed_over() -> None:
    assert interface_to([]) is None
    assert interface_to(["nowhere.invalid", "127.0.1.1"]) is None


@pytest.mark.skipif(not HERE, reason="this machine has no network")
def test_the_interface_of_the_address_by_which_a_node_is_known_unless_somebody_has_said_which(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, address = HERE[0]
    monkeypatch.setenv("SUBMIT_PEERS", f"127.0.1.1\n{address}")
    monkeypatch.delenv(GLOO, raising=False)
    assert choose_interface() == os.environ[GLOO] == name
    monkeypatch.setenv(GLOO, "ib0")
    assert choose_interface() == os.environ[GLOO] == "ib0"
