"""User and password of a URL are taken out of it, and nothing else is."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kong_metering.urls import text_without_credentials, without_credentials


@pytest.mark.parametrize(
    "url",
    [
        "https://us.api.konghq.com/v3/openmeter/events",
        "HTTPS://US.api.konghq.com:443/v3?#",
        "http://[::1]:8888/api/v1/events?a=b#c",
        "https://h/x?y=//a@b",
        "https://h//a@b/c",
        "https://h/x#//a@b",
        "https://h?to=http://user:password@other/",
        "https://h",
    ],
)
def test_a_url_without_credentials_stays_what_it_is(url: str) -> None:
    """Its queue is found by it, in the spool of an earlier version too."""
    assert without_credentials(url) == url
    assert without_credentials(url, "***@") == url


@pytest.mark.parametrize(
    ("url", "left"),
    [
        ("https://user:pass@host/path", "https://host/path"),
        ("HTTPS://user:pass@HOST/path?#", "HTTPS://HOST/path?#"),
        ("https://user@host", "https://host"),
        ("https://@host/", "https://host/"),
        ("https://user:p@ss:w@host:8443/x?y=//a@b", "https://host:8443/x?y=//a@b"),
        ("https://user:pass@[::1]:8888/", "https://[::1]:8888/"),
        ("https://host@host/host@host", "https://host/host@host"),
        ("//user:pass@host/x", "//host/x"),
        ("https://us\ner:pass@host/x", "https://host/x"),
    ],
)
def test_credentials_are_taken_out(url: str, left: str) -> None:
    assert without_credentials(url) == left
    assert without_credentials(without_credentials(url)) == left


@pytest.mark.parametrize("url", ["https://user:pass@[::1/x", "https://user:pass@h\u2100st/x"])
def test_what_is_no_url_is_left_out_as_a_whole(url: str) -> None:
    assert without_credentials(url) == "***"


@given(
    st.from_regex(r"[a-z0-9.-]{1,10}(:[0-9]{1,5})?", fullmatch=True),
    st.from_regex(r"(/[a-z0-9@/:]{0,10})?(\?[a-z0-9@/:?]{0,10})?(#[a-z0-9@/:?]{0,10})?", fullmatch=True),
    st.from_regex(r"[a-z0-9:@]{1,10}", fullmatch=True),
)
def test_any_url_goes_to_the_same_place_with_nobodys_name(host: str, rest: str, credentials: str) -> None:
    url = f"https://{host}{rest}"
    assert without_credentials(url) == url
    assert without_credentials(f"https://{credentials}@{host}{rest}") == url


@given(st.from_regex(r"[a-z0-9.]{1,9}(:[0-9]{1,4})?(/[a-z0-9./:]{0,9})?(\?[a-z0-9=&%.]{0,9})?", fullmatch=True))
def test_ordinary_urls_have_the_key_that_the_version_before_gave_them(rest: str) -> None:
    """It took out the first thing that looked like credentials, wherever that was."""
    for url in (f"https://{rest}", f"https://user:password@{rest}"):
        assert without_credentials(url) == re.sub(r"//[^/?#\s]*@", "//", url, count=1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Invalid URL 'https://user:pass@host/x'", "Invalid URL 'https://***@host/x'"),
        ("from http://a:b@c to //d:e@f/?x=//g@h.", "from http://***@c to //***@f/?x=//***@h."),
        ("proxied https://proxy/https://user:pass@host/x", "proxied https://proxy/https://***@host/x"),
        ("https:///user:pass@host/x has too many strokes", "https:///***@host/x has too many strokes"),
        ("https://user:p@ss@host", "https://***@host"),
        ("no URL: a//b, me@example.org", "no URL: a//b, me@example.org"),
        ("https://user:pass@[::1/x is no URL", "https:*** is no URL"),
        ("https://user:p[a/ss@host is none", "https:*** is none"),
        ("https://proxy/https://user:p[a/ss@host", "https://proxy/https:***"),
        ("", ""),
    ],
)
def test_credentials_in_a_text_are_not_shown(text: str, shown: str) -> None:
    assert text_without_credentials(text) == shown


@pytest.mark.parametrize("part", ["x", "x:", "/", "@", "//x"])
def test_a_long_text_takes_no_time_squared(part: str) -> None:
    text = part * 500_000
    assert text_without_credentials(text) == text


@given(st.text(alphabet="ab:/@?#[] .", max_size=30))
@example("///@")
@example("//a//b@c")
def test_no_text_shows_what_stands_before_a_host(text: str) -> None:
    for part in re.findall(r"//[^/?#\s]+", text_without_credentials(text)):
        assert "[" in part or "]" in part or urlsplit(part).username in (None, "***")
