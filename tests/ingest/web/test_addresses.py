"""Which addresses may be asked."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from ingest.web.addresses import AddressPolicy

PUBLIC = AddressPolicy()
INSIDE = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
]
OUTSIDE = ["1.1.1.1", "93.184.216.34", "172.32.0.1", "192.0.1.1", "100.128.0.1"]


def forms(four: str) -> list[str]:
    """An IPv4 address as IPv6 carries it to where IPv4 is spoken: mapped, and NAT64."""
    return [
        f"::ffff:{four}",
        str(ipaddress.ip_address(int(ipaddress.ip_address("64:ff9b::")) + int(ipaddress.ip_address(four)))),
    ]


@pytest.mark.parametrize("four", INSIDE)
def test_D4_addresses_that_are_not_public_are_refused_in_every_form(four):
    assert not any(map(PUBLIC.permits, [four, *forms(four)]))


@pytest.mark.parametrize("four", OUTSIDE)
def test_public_addresses_are_permitted_in_every_form(four):
    assert all(map(PUBLIC.permits, [four, *forms(four)]))


@pytest.mark.parametrize(
    "six",
    [
        "::", "::1", "::7f00:1", "::10.0.0.1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254",
        "ff02::1", "2001::1", "2001:0:7f00:1::", "2002:7f00:1::", "2002:a00:1::1", "2001:db8::1", "3fff::1",
        "100::1", "64:ff9b:1::a00:1", "::ffff:0:127.0.0.1", "5f00::1", "4000::1",
    ],
)  # fmt: skip
def test_D4_ipv6_addresses_that_are_local_tunnels_or_reserved_are_refused(six):
    assert not PUBLIC.permits(six)


def test_public_ipv6_addresses_are_permitted():
    assert PUBLIC.permits("2606:4700:4700::1111") and PUBLIC.permits("2a00:1450:4001:800::200e")


def test_D4_allowed_networks_are_allowed_and_their_neighbours_are_not():
    policy = AddressPolicy(("10.1.0.0/16", "fd00:1::/32"))
    assert policy.permits("10.1.2.3") and policy.permits("::ffff:10.1.2.3") and policy.permits("fd00:1::5")
    assert (
        not policy.permits("10.2.0.1") and not policy.permits("fd00:2::5") and not policy.permits("127.0.0.1")
    )


def test_a_network_that_is_none_is_told():
    with pytest.raises(UserError, match=r"10\.0\.0\.300"):
        AddressPolicy(("10.0.0.300/8",))


@given(st.integers(0, 2**32 - 1))
def test_D4_no_ipv4_address_is_permitted_that_python_calls_private(number):
    address = ipaddress.IPv4Address(number)
    if not address.is_global or address.is_multicast:
        assert not any(map(PUBLIC.permits, [str(address), *forms(str(address))]))
