"""A firewall in front of the endpoint that takes offence at the bytes of one event, over real HTTP, whatever its form.

The real delivery with its spool; the event is found and kept as a dead letter, and all others are delivered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kong_metering.config import parse_config, parse_entity
from kong_metering.reasons import Buried
from kong_metering.runtime import make_runtime
from kong_metering.spool.options import SpoolOptions
from tests.support.waiting import wait_until
from tests.unit.delivery.fakes import letters
from tests.unit.ingest.ingest_server import Exchange, IngestServer, Reaction, answer, broken_off

OFFENDING = "<script>alert(1)</script>"
FORMS: dict[str, Reaction] = {
    "400": answer(400, b"a script"),
    "401": answer(401, b"a script"),
    "403": answer(403, b"a script"),
    "404": answer(404, b"a script"),
    "406": answer(406, b"a script"),
    "429": answer(429, b"a script"),
    "503": answer(503, b"a script"),
    "reset": Exchange.reset,
    "nothing": broken_off(b""),
    "half an answer": broken_off(b"HTTP/1.1 403 Forb"),
    "hangs": Exchange.hang,
}


def event(number: int, user_agent: str = "curl") -> bytes:
    return json.dumps({"specversion": "1.0", "id": str(number), "data": {"user_agent": user_agent}}).encode()


def config(url: str, queue: dict[str, Any], timeout: int) -> dict[str, Any]:
    return {
        "__plugin_id": "878715eb-ff5f-4bc3-b2ce-a52b1cd3b907",
        "ingest_endpoint": url,
        "api_token": "token",
        "timeout": timeout,
        "subject": {"look_up_value_in": "header", "field": "x-tenant-id"},
        "queue": {"max_coalescing_delay": 0.1, "initial_retry_delay": 0.01, **queue},
    }


@pytest.mark.parametrize("queue", [{}, {"max_batch_size": 100}], ids=["defaults", "batches of 100"])
@pytest.mark.parametrize("form", FORMS)
def test_one_event_that_a_firewall_takes_offence_at_is_a_dead_letter_and_no_other(
    server: IngestServer, root: Path, inbox: Path, form: str, queue: dict[str, Any]
) -> None:
    def react(exchange: Exchange) -> None:
        # Before it is answered: the next request may be here at once.
        request = server.requests[-1]
        if OFFENDING.encode() in request.body:
            FORMS[form](exchange)
        else:
            taken.extend(each["id"] for each in request.events)
            answer(204)(exchange)

    taken: list[str] = []
    server.on_request = react
    runtime = make_runtime(spool=SpoolOptions(root, inbox_directory=inbox))
    kong = config(server.url, queue, timeout=300 if form == "hangs" else 10_000)
    delivery = runtime.delivery.open(parse_entity(kong), parse_config(kong))
    numbers = iter(range(1_000_000))
    for _ in range(5):
        delivery.put(event(next(numbers)))
    offending = next(numbers)
    delivery.put(event(offending, OFFENDING))
    for _ in range(100):
        delivery.put(event(next(numbers)))

    def is_found() -> bool:
        delivery.put(event(next(numbers)))  # others go on coming
        return bool(runtime.stats.snapshot().dead_letters)

    wait_until(is_found, "it is found", seconds=60, pause=0.02)
    wait_until(lambda: runtime.stats.snapshot().waiting == 0, "the others are delivered", seconds=60)
    runtime.delivery.close(20.0)
    account = runtime.stats.snapshot()
    assert account.dead_letters == {Buried.REJECTED.value: 1}
    assert account.dropped == {}
    assert [json.loads(stored.letter.event)["id"] for stored in letters(root)] == [str(offending)]
    # With a short timeout on a busy machine, a good one may go twice.
    assert set(taken) == {str(number) for number in range(next(numbers)) if number != offending}
    assert form == "hangs" or len(set(taken)) == len(taken)
