"""Headers that are asked for all at once: what the answers say."""

from __future__ import annotations

import pytest

from kong_metering.capture import header_calls, headers_in
from kong_metering.request import ASKED, FinishedRequest
from tests.support.pdk import FakeKong
from tests.support.records import finished, log_record

TENANT, PLAN = "X-Tenant-Id", "x_plan"
MANY = [(f"x-other-{number}", "x") for number in range(150)]


def asked(*headers: tuple[str, str], names: tuple[str, ...] = (TENANT,)) -> dict[str, str | list[str]]:
    kong = FakeKong(headers)
    return headers_in(names, [kong.answer(*called)[0] for called in header_calls(names)])


def request(*headers: tuple[str, str], later: dict[str, object] | None = None) -> FinishedRequest:
    """Give a request as its log phase knows it; `later` are the headers that other plugins made of the client's."""
    shown: dict[str, list[str]] = {}
    for name, value in headers[:100]:
        shown.setdefault(name.lower(), []).append(value)
    record = log_record(request={"headers": shown if later is None else later})
    return finished(record, {ASKED: TENANT, **asked(*headers)})


def test_one_call_for_each_header_tells_all_its_lines() -> None:
    assert header_calls((TENANT, PLAN)) == (
        ("kong.nginx.get_var", ("http_x_tenant_id",)),
        ("kong.nginx.get_var", ("http_x_plan",)),
    )


def test_a_header_that_the_record_hides_is_looked_up() -> None:
    assert header_calls(("Authorization",)) == (("kong.request.get_header", ("Authorization",)),)
    assert headers_in(("Authorization",), ["Digest a, b"]) == {"Authorization": "Digest a, b"}


def test_several_headers_come_under_their_names() -> None:
    headers = [(TENANT, "acme"), ("X-Plan", "gold")]
    assert asked(*headers, names=(TENANT, PLAN, "x-none")) == {TENANT: "acme", PLAN: "gold"}


@pytest.mark.parametrize("blank", ["", " ", "\udca0"])
def test_a_blank_header_is_none(blank: str) -> None:
    assert asked((TENANT, blank)) == {}


@pytest.mark.parametrize("answer", [5, [], {}, True])
def test_an_answer_that_is_no_string_is_none(answer: object) -> None:
    assert headers_in((TENANT,), [answer]) == {}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([(TENANT, "acme, inc")], "acme, inc"),
        ([(TENANT, "acme, inc"), (TENANT, "globex")], "acme, inc"),
        ([(TENANT, "acme"), (TENANT, "globex, inc")], "acme"),
        ([(TENANT, ""), (TENANT, "acme")], "acme"),
        ([("x_tenant_id", "forged"), (TENANT, "acme")], "acme"),
        ([(TENANT, "acme"), ("x_tenant_id", "forged")], "acme"),
        ([(TENANT, "caf\udce9, inc")], "caf\udce9, inc"),
    ],
)
def test_the_record_tells_the_lines_apart(lines: list[tuple[str, str]], expected: str) -> None:
    finished = request(*lines)
    assert finished.header(TENANT) == expected


def test_a_header_behind_many_others_is_found() -> None:
    finished = request(*MANY, (TENANT, "acme"))
    assert finished.header(TENANT) == "acme"
    assert not finished.has_odd_headers


@pytest.mark.parametrize("lines", [["acme", "globex"], ["", "acme"], ["acme, inc"]])
def test_behind_many_others_the_first_part_counts(lines: list[str]) -> None:
    finished = request(*MANY, *((TENANT, line) for line in lines))
    assert finished.header(TENANT) == "acme"
    assert finished.has_odd_headers


@pytest.mark.parametrize("later", [{}, {"x-tenant-id": "injected"}])
def test_of_a_list_that_a_later_plugin_changed_the_first_part_counts(later: dict[str, object]) -> None:
    finished = request((TENANT, "acme, inc"), later=later)
    assert finished.header(TENANT) == "acme"
    assert finished.has_odd_headers


@pytest.mark.parametrize("later", [{}, {"x-tenant-id": "injected"}, {"x-tenant-id": ["a", "b"]}])
def test_that_a_later_plugin_changed_a_header_is_seen(later: dict[str, object]) -> None:
    finished = request((TENANT, "acme"), later=later)
    assert finished.header(TENANT) == "acme"
    assert finished.has_odd_headers
