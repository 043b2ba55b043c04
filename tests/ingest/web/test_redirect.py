"""Where redirects lead, as browsers read them."""

import pytest
from yarl import URL

from ingest.web.problems import UnfetchableError
from ingest.web.redirect import target

HERE = URL("http://host.example/dir/page?q", encoded=True)


@pytest.mark.parametrize(
    ("location", "there"),
    [
        ("/a.jpg", "http://host.example/a.jpg"),
        ("a.jpg#b", "http://host.example/dir/a.jpg"),
        ("?b", "http://host.example/dir/page?b"),
        ("//other.example/a", "http://other.example/a"),
        ("\\a.jpg", "http://host.example/a.jpg"),
        ("\\\\other.example\\a", "http://other.example/a"),
        ("///other.example/a", "http://other.example/a"),
        ("http:a.jpg", "http://host.example/dir/a.jpg"),
        ("https://other.example", "https://other.example/"),
        ("/synspr\udcf8ve.jpg", "http://host.example/synspr%F8ve.jpg"),
        ("/bl\udce5b\udce6r?\udcf8", "http://host.example/bl%E5b%E6r?%F8"),
        ("/b\u00e6r", "http://host.example/b%C3%A6r"),
        ("http://b\u00fccher.example/", "http://xn--bcher-kva.example/"),
        ("http://me:secret@other.example/a", "http://other.example/a"),
        ("//me@other.example/a", "http://other.example/a"),
        ("http://-love-.example/a", "http://-love-.example/a"),
    ],
)
def test_a_redirect_leads_where_it_leads_in_browsers(location, there):
    # aiohttp gives bytes that are no UTF-8 as surrogates.
    assert str(target(HERE, location)) == there


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("file:///etc/passwd", "not_http_url"),
        ("data:,x", "not_http_url"),
        ("http://[::1", "bad_url"),
        ("http://2130706433/", "bad_url"),
        ("http://\udcf8.example/", "bad_url"),
        ("http://", "bad_url"),
    ],
)
def test_D4_what_leads_nowhere_is_a_problem(location, reason):
    with pytest.raises(UnfetchableError, match=reason):
        target(HERE, location)
