"""Headers that are asked for all at once: what the answers say."""

from __future__ import annotations

import pytest

from kong_metering.capture import header_calls, headers_in
from tests.support.pdk import FakeKong

TENANT, PLAN = "X-Tenant-Id", "x_plan"
MANY = [(f"x-other-{number}", "x") for number in range(150)]


def asked(*headers: tuple[str, str], names: tuple[str, ...] = (TENANT,)) -> tuple[dict[str, str], bool]:
    kong = FakeKong(headers)
    results = [kong.answer(*called)[0] for called in header_calls(names)]
    return headers_in(names, results)


def test_each_header_is_looked_up_and_its_variable_asked_for() -> None:
    assert header_calls((TENANT, PLAN)) == (
        ("kong.request.get_header", (TENANT,)),
        ("kong.request.get_header", (PLAN,)),
        ("kong.nginx.get_var", ("http_x_tenant_id",)),
        ("kong.nginx.get_var", ("http_x_plan",)),
    )


def test_several_headers_come_under_their_names() -> None:
    headers = [(TENANT, "acme"), ("X-Plan", "gold")]
    assert asked(*headers, names=(TENANT, PLAN, "x-none")) == ({TENANT: "acme", PLAN: "gold"}, True)


@pytest.mark.parametrize("blank", ["", " ", "\udca0"])
def test_a_blank_header_is_none(blank: str) -> None:
    assert asked((TENANT, blank)) == ({}, True)


def test_a_list_is_one_value_and_the_first_of_two_counts() -> None:
    assert asked((TENANT, "acme, inc")) == ({TENANT: "acme, inc"}, True)
    assert asked((TENANT, "acme, inc"), (TENANT, "globex")) == ({TENANT: "acme, inc"}, True)


def test_a_header_behind_many_others_is_found() -> None:
    assert asked(*MANY, (TENANT, "acme")) == ({TENANT: "acme"}, True)


def test_behind_many_others_the_first_of_several_counts_and_is_not_certain() -> None:
    assert asked(*MANY, (TENANT, "acme"), (TENANT, "globex")) == ({TENANT: "acme"}, False)
    assert asked(*MANY, (TENANT, "acme, inc")) == ({TENANT: "acme"}, False)


@pytest.mark.parametrize("others", [[], MANY])
def test_a_blank_first_value_does_not_hide_a_second_one(others: list[tuple[str, str]]) -> None:
    values, _ = asked(*others, (TENANT, ""), (TENANT, "acme"))
    assert values == {TENANT: "acme"}


@pytest.mark.parametrize("answer", [5, [], {}, True])
def test_an_answer_that_is_no_string_is_none(answer: object) -> None:
    assert headers_in((TENANT,), [answer, answer]) == ({}, True)
