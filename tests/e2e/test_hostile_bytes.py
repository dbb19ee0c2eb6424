"""Whatever bytes a client sends: the right one is billed, and nothing breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.declarative import document, metering, service
from tests.e2e.traffic import Header, get

if TYPE_CHECKING:
    from kong_metering.sandbox.collector.process import CollectorProcess
    from kong_metering.sandbox.upstream_process import UpstreamProcess
    from tests.e2e.conftest import StartGateway

pytestmark = pytest.mark.e2e

MANY: list[Header] = [(f"x-filler-{number}", "1") for number in range(150)]
TENANT = "X-Tenant-Id"

CASES: dict[str, tuple[list[Header], str | None]] = {
    "latin-1": ([(TENANT, b"caf\xe9")], "café"),
    "UTF-8": ([(TENANT, "café".encode())], "café"),
    "invalid UTF-8 in another header": ([(TENANT, "acme"), ("X-Junk", b"\xff\xfe")], "acme"),
    "invalid UTF-8 in the user agent": ([(TENANT, "acme"), ("User-Agent", b"\xff")], "acme"),
    "twice": ([(TENANT, "acme"), (TENANT, "globex")], "acme"),
    "blank, then not": ([(TENANT, ""), (TENANT, "acme")], "acme"),
    "empty": ([(TENANT, "")], None),
    "white space": ([(TENANT, " \t ")], None),
    "letter case": ([("x-TENANT-iD", "acme")], "acme"),
    "after 150 others": ([*MANY, (TENANT, "acme")], "acme"),
    "twice, after 150 others": ([*MANY, (TENANT, "acme"), (TENANT, "globex")], "acme"),
    "with a comma, after 150 others": ([*MANY, (TENANT, "acme, inc")], "acme, inc"),
    "after 1,200 others, twice": ([*[("a", "")] * 1200, (TENANT, "acme"), (TENANT, "acme")], "acme"),
    "long": ([(TENANT, "a" * 7000)], "a" * 7000),
    "control bytes": ([(TENANT, b"ac\x01\x1b[31mme")], "ac\x01\x1b[31mme"),
    "bidirectional": ([(TENANT, "ac\u202eme".encode())], "ac\u202eme"),
}


@pytest.fixture
def gateway_port(start_gateway: StartGateway, upstream: UpstreamProcess, collector: CollectorProcess) -> int:
    plugin = metering(collector.ingest_v1, queue={"max_batch_size": 1})
    return start_gateway(document(service(upstream.url), plugins=[plugin])).proxy_port


def test_every_way_to_write_the_subject_header_is_billed_to_the_right_one(
    gateway_port: int, collector: CollectorProcess
) -> None:
    wrong = {}
    for name, (headers, expected) in CASES.items():
        collector.client.reset()
        # The upstream refuses some of them, with a 400: that is its answer, and it is metered like any other.
        assert get(gateway_port, "/echo", *headers) in (200, 400)
        assert get(gateway_port, "/echo", (TENANT, "last")) == 200
        collector.client.wait_for_events(1 if expected is None else 2)
        found = [event.subject for event in collector.client.events()]
        if found != ([] if expected is None else [expected]) + ["last"]:
            wrong[name] = f"billed {found}"
    assert wrong == {}
