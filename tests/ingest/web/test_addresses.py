"""Which addresses may be asked."""

import ipaddress
import socket

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from ingest.web.addresses import AddressPolicy, own_networks, place_of
from ingest.web.problems import UnfetchableError
from ingest.web.url import http_url

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
    with pytest.raises(UserError, match=r"--allow-private '10\.0\.0\.300/8'"):
        AddressPolicy(("10.0.0.300/8",))
    with pytest.raises(UserError, match=r"--deny-network '10\.0\.0\.1/8'"):
        AddressPolicy(deny=("10.0.0.1/8",))


def test_D4_what_the_kernel_calls_this_machine_is_what_its_interfaces_have():
    addresses = {
        ipaddress.ip_address(each.address.partition("%")[0])
        for interface in psutil.net_if_addrs().values()
        for each in interface
        if each.family in (socket.AF_INET, socket.AF_INET6)
    }
    own = list(own_networks())
    assert all(any(each in network for network in own) for each in addresses if not each.is_loopback)
    assert not any(ipaddress.ip_address(each) in network for each in OUTSIDE for network in own)


def test_D4_this_machine_is_refused_at_its_public_addresses_unless_each_is_allowed(monkeypatch):
    own = ["1.1.1.1/32", "2606:4700:4700::1111/128", "10.1.0.7/32"]
    monkeypatch.setattr("ingest.web.addresses.own_networks", lambda: map(ipaddress.ip_network, own))
    for allowed in ((), ("1.1.1.0/24", "2606:4700::/32", "10.0.0.0/8", "::/0", "0.0.0.0/0")):
        policy = AddressPolicy(allowed)
        assert not any(map(policy.permits, ["1.1.1.1", *forms("1.1.1.1"), "2606:4700:4700::1111"]))
        assert not policy.permits("10.1.0.7")
        assert policy.permits("1.1.1.2") and policy.permits("2606:4700:4700::1112")
    policy = AddressPolicy(("1.1.1.1", "2606:4700:4700::1111", "10.1.0.7/32"))
    assert all(map(policy.permits, ["1.1.1.1", "2606:4700:4700::1111", "10.1.0.7"]))


METADATA = ["169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200", "fd00:ec2::254"]


@pytest.mark.parametrize("address", METADATA)
def test_D4_services_of_clouds_are_refused_also_within_a_network_that_is_allowed(address):
    assert not PUBLIC.permits(address)
    around = ("169.254.0.0/16", "168.63.0.0/16", "100.64.0.0/10", "fd00::/8")
    assert not AddressPolicy(around).permits(address)
    assert AddressPolicy((address,)).permits(address)


def test_D4_a_network_that_is_denied_is_denied_whatever_is_allowed():
    policy = AddressPolicy(("10.0.0.0/8", "1.1.1.7"), deny=("10.1.0.0/16", "1.1.1.0/24", "2606:4700::/32"))
    assert not any(map(policy.permits, ["10.1.2.3", "1.1.1.1", *forms("1.1.1.1"), "1.1.1.7"]))
    assert not policy.permits("2606:4700:4700::1111")
    assert policy.permits("10.2.0.1") and policy.permits("93.184.216.34")


@pytest.mark.parametrize("port", [0, 22, 25, 6000, 6667, 10080])
def test_D4_ports_that_browsers_do_not_ask_are_not_asked(port):
    for host in ("example.org", "127.0.0.1"):
        with pytest.raises(UnfetchableError, match="blocked_port"):
            AddressPolicy(("127.0.0.0/8",)).check(http_url(f"http://{host}:{port}/a.jpg"))


def test_ports_of_the_web_are_asked():
    for port in (80, 443, 8080, 8443, 3000):
        PUBLIC.check(http_url(f"http://example.org:{port}/a.jpg"))


def test_addresses_in_all_forms_and_of_one_network_of_64_bits_count_as_one():
    assert {place_of(form) for form in ["1.1.1.1", *forms("1.1.1.1")]} == {"1.1.1.1"}
    assert place_of("2001:db8:1:2::3") == place_of("2001:db8:1:2:ffff::4") != place_of("2001:db8:1:3::3")


@given(st.integers(0, 2**32 - 1))
def test_D4_no_ipv4_address_is_permitted_that_python_calls_private(number):
    address = ipaddress.IPv4Address(number)
    if not address.is_global or address.is_multicast:
        assert not any(map(PUBLIC.permits, [str(address), *forms(str(address))]))
