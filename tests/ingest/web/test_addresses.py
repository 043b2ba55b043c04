"""Which URLs and addresses may be asked."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from ingest.web.addresses import AddressPolicy
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
    with pytest.raises(UserError, match=r"10\.0\.0\.300"):
        AddressPolicy(("10.0.0.300/8",))


@given(st.integers(0, 2**32 - 1))
def test_D4_no_ipv4_address_is_permitted_that_python_calls_private(number):
    address = ipaddress.IPv4Address(number)
    if not address.is_global or address.is_multicast:
        assert not any(map(PUBLIC.permits, [str(address), *forms(str(address))]))


@pytest.mark.parametrize(
    "text",
    [
        "http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://127.1/", "http://0177.0.0.1/",
        "http://127.0.0.1.5/", "http://1.2.3/", "http://%31%32%37.0.0.1/", "http://a%00b/", "http:///x", "http://",
        "http://a..b/", "http://host:99999/", "http://host:x/", "http://a b/", "http://[::1/", "http://[::1%25lo]/",
        "http://127.0.0.1\\@example.org/", "http://\udcff/", "http://a/\udcff", "http:example.org", "http://-a/",
        "http://a[::1]/", "http://%\udcff/", "http://a/" + "x" * 9000, "http://" + "a." * 200 + "b/",
    ],
)  # fmt: skip
def test_D4_odd_spellings_are_no_urls(text):
    with pytest.raises(UnfetchableError, match="bad_url"):
        http_url(text)


@pytest.mark.parametrize(
    "text", ["file:///etc/passwd", "ftp://a/", "//a/b", "a/b", "", "data:,x", "gopher://a", "javascript:1"]
)
def test_S1_only_http_and_https_are_asked(text):
    with pytest.raises(UnfetchableError, match="not_http_url"):
        http_url(text)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("HTTP://EXAMPLE.org:80/a/../b?c=d#e", "http://example.org/b?c=d"),
        ("https://example.org.", "https://example.org/"),
        ("http://user:pw@example.org:8080/x", "http://example.org:8080/x"),
        ("http://bücher.de/ü x?q=ü&r=a%2Fb", "http://xn--bcher-kva.de/%C3%BC%20x?q=%C3%BC&r=a%2Fb"),
        ("http://user%40x:p%2fw@example.org/", "http://example.org/"),
        ("http://a_b.bücher.de/", "http://a_b.xn--bcher-kva.de/"),
        ("http://☃.net/", "http://xn--n3h.net/"),
        ("http://a_b.example.org/%7Efoo%2f+", "http://a_b.example.org/%7Efoo%2f+"),
        ("http://1.2.3.4./", "http://1.2.3.4/"),
        ("http://[2606:4700::1111]:81/", "http://[2606:4700::1111]:81/"),
        ("http://１.2.3.4/", "http://1.2.3.4/"),
        ("http://a/b/%2E%2e/c/.", "http://a/c/"),
        ("http://a/x?sig=a%2Bb+c==&t={1}|2", "http://a/x?sig=a%2Bb+c==&t={1}|2"),
    ],
)
def test_a_url_is_asked_as_it_is_written(text, url):
    assert str(http_url(text)) == url


@given(st.text(max_size=60), st.sampled_from(["http://", "https://a/", "http://a:80/?", ""]))
def test_D4_any_text_is_a_url_or_a_problem_and_normalising_twice_changes_nothing(text, start):
    try:
        url = http_url(start + text)
    except UnfetchableError as error:
        assert error.problem.reason in ("bad_url", "not_http_url")
        return
    assert http_url(str(url)) == url
    assert (
        url.scheme in ("http", "https") and url.raw_host and url.user is None and url.raw_path.startswith("/")
    )
