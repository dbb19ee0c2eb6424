"""What the collector answers to those who read back: limits, pages and failures as measured with OpenMeter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import requests

from kong_metering_sandbox.collector.faults import FaultMatch, FaultRule
from kong_metering_sandbox.collector.process import CollectorProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

V3 = "/api/v3/openmeter/events"
CUSTOMERS = "/api/v3/openmeter/customers"


@pytest.fixture(scope="module")
def process() -> Iterator[CollectorProcess]:
    with CollectorProcess() as running:
        yield running


@pytest.fixture
def collector(process: CollectorProcess) -> CollectorProcess:
    process.client.clear_faults()
    process.client.set_tokens([])
    process.client.set_reading()
    process.client.reset()
    return process


def event(number: int, **members: Any) -> dict[str, Any]:
    made = {"specversion": "1.0", "id": f"{number:032x}:api_request", "source": "kong", "type": "kong.api_request"}
    return {**made, "subject": "acme", "data": {"request_uri": "/"}, **members}


def send(collector: CollectorProcess, *events: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/cloudevents-batch+json"}
    answer = requests.post(collector.ingest_v3, json.dumps(events), headers=headers, timeout=10)
    assert answer.status_code == 202, answer.text


def ask(collector: CollectorProcess, path: str, **query: Any) -> requests.Response:
    return requests.get(collector.url + path, params=query, timeout=10)


def ids(number: int, first: int = 0) -> list[str]:
    return [event(each)["id"] for each in range(first, first + number)]


def test_v3_finds_22_ids_of_ours_in_one_question_and_refuses_more(collector: CollectorProcess) -> None:
    send(collector, *map(event, range(30)))
    answer = ask(collector, V3, **{"filter[id][oeq]": ",".join(ids(22)), "page[size]": 100}).json()
    assert {each["event"]["id"] for each in answer["data"]} == set(ids(22))
    assert answer["meta"]["page"]["next"] is None
    refused = ask(collector, V3, **{"filter[id][oeq]": ",".join(ids(23))})
    assert (refused.status_code, "too long" in refused.text) == (400, True)
    assert ask(collector, V3, **{"filter[id][oeq]": ",".join("ab" for _ in range(51))}).status_code == 400


def test_v3_gives_pages_of_100_at_most(collector: CollectorProcess) -> None:
    send(collector, *map(event, range(130)))
    assert ask(collector, V3, **{"page[size]": 101}).status_code == 400
    first = ask(collector, V3, **{"page[size]": 100}).json()
    second = ask(collector, V3, **{"page[size]": 100, "page[after]": first["meta"]["page"]["next"]}).json()
    assert [len(page["data"]) for page in (first, second)] == [100, 30]
    assert second["meta"]["page"]["next"] is None
    assert len({each["event"]["id"] for page in (first, second) for each in page["data"]}) == 130


def test_v2_takes_a_list_of_ids_and_gives_cursors(collector: CollectorProcess) -> None:
    send(collector, *map(event, range(130)))
    wanted = json.dumps({"id": {"$in": ids(100)}})
    answer = ask(collector, "/api/v2/events", limit=60, filter=wanted).json()
    rest = ask(collector, "/api/v2/events", limit=60, filter=wanted, cursor=answer["nextCursor"]).json()
    assert {each["event"]["id"] for page in (answer, rest) for each in page["items"]} == set(ids(100))
    assert "nextCursor" not in rest


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"filter[nonsense][eq]": "x"}, "unknown filter field(s): nonsense"),
        ({"filter[id][nonsense]": "x"}, "filter[id][nonsense]: unsupported operator"),
        ({"filter[time][gte]": "yesterday"}, "filter[time][gte]: invalid datetime"),
        ({"page[before]": "x"}, "backward pagination is not supported"),
        ({"page[number]": 1}, "field [number] is not present"),
    ],
)
def test_v3_refuses_what_it_does_not_know(collector: CollectorProcess, query: dict[str, Any], said: str) -> None:
    answer = ask(collector, V3, **query)
    assert (answer.status_code, said in answer.json()["detail"]) == (400, True), answer.text


def test_v3_narrows_by_subject_type_and_time_and_an_empty_list_is_no_filter(collector: CollectorProcess) -> None:
    late = event(3, type="kong.llm_request", time="2026-11-26T10:00:00+02:00")
    send(collector, event(1, time="2026-11-26T07:59:59.9Z"), event(2, subject="a,b"), late)

    def found(**query: str) -> set[str]:
        return {each["event"]["id"] for each in ask(collector, V3, **query).json()["data"]}

    assert found(**{"filter[subject][eq]": "a,b"}) == set(ids(1, 2))
    assert found(**{"filter[type]": "kong.llm_request"}) == set(ids(1, 3))
    hour = {"filter[time][gte]": "2026-11-26T08:00:00Z", "filter[time][lt]": "2026-11-26T09:00:00Z"}
    assert found(**hour) == set(ids(1, 3))
    assert found(**{"filter[id][oeq]": " , "}) == set(ids(3, 1))
    assert ask(collector, V3, **{"filter[id][contains]": "1"}).status_code == 501


def test_an_event_is_listed_with_a_time_and_its_content_type_whichever_it_came_with(
    collector: CollectorProcess,
) -> None:
    send(collector, event(1))
    answer = ask(collector, V3).json()
    (item,) = answer["data"]
    assert item["event"]["time"] == item["ingested_at"]
    assert item["event"]["datacontenttype"] == "application/json"
    assert answer["meta"]["page"]["first"] == answer["meta"]["page"]["last"]


def test_v2_narrows_by_subject_and_passes_over_fields_that_it_does_not_know(collector: CollectorProcess) -> None:
    send(collector, event(1), event(2, subject="x"))

    def found(wanted: dict[str, Any]) -> list[str]:
        answer = ask(collector, "/api/v2/events", filter=json.dumps(wanted))
        return [each["event"]["id"] for each in answer.json()["items"]]

    assert found({"subject": {"$eq": "x"}}) == ids(1, 2)
    assert sorted(found({"nonsense": {"$eq": "x"}})) == ids(2, 1)
    assert found({"id": {"$in": []}}) == []


def test_v1_takes_a_pattern_and_lists_32_days_at_most(collector: CollectorProcess) -> None:
    send(collector, event(1), event(2, time="2020-01-01T00:00:00Z"))
    assert [each["event"]["id"] for each in ask(collector, "/api/v1/events", id="0%1:api%request").json()] == ids(1, 1)
    assert ask(collector, "/api/v1/events", id=ids(1, 2)[0]).json() == []
    refused = ask(collector, "/api/v1/events", **{"from": "2020-01-01T00:00:00Z"})
    assert (refused.status_code, "from date is too old" in refused.text) == (400, True)


def test_v1_looks_for_an_id_anywhere_in_the_stored_ones(collector: CollectorProcess) -> None:
    send(collector, *map(event, range(3)))
    (found,) = ask(collector, "/api/v1/events", id=f"{1:032x}").json()
    assert found["event"]["id"] == ids(1, 1)[0]
    assert ask(collector, "/api/v1/events", limit=101).status_code == 400


def test_what_no_meter_and_no_customer_takes_is_said_in_openmeters_words(collector: CollectorProcess) -> None:
    collector.client.set_reading(meters=["kong.llm_request"])
    collector.client.add_customer("someone", "acme")
    send(collector, event(1), event(2, type="kong.llm_request"), event(3, subject="x", type="kong.llm_request"))
    found = {each["event"]["id"]: each for each in ask(collector, V3).json()["data"]}
    first, second, third = (found[each] for each in ids(3, 1))
    assert [each["message"] for each in first["validation_errors"]] == [
        "no meter found for event type: kong.api_request"
    ]
    assert "validation_errors" not in second
    assert "customer" in second
    assert third["validation_errors"][0]["message"] == "no customer found for event subject: x"
    old = ask(collector, "/api/v2/events").json()["items"]
    assert {each.get("validationError") for each in old} == {
        "no meter found for event type: kong.api_request",
        None,
        "no customer found for event subject: x",
    }


def test_a_page_with_a_nul_in_a_subject_fails_and_all_do_while_reading_is_down(collector: CollectorProcess) -> None:
    send(collector, event(1), event(2, subject="a\0b"))
    assert ask(collector, V3, **{"filter[id][oeq]": ",".join(ids(2, 1))}).status_code == 500
    assert ask(collector, V3, **{"filter[id][oeq]": ids(1, 1)[0]}).status_code == 200
    collector.client.set_reading(is_down=True)
    assert ask(collector, V3, **{"filter[id][oeq]": ids(1, 1)[0]}).status_code == 500


def test_reading_needs_the_token_and_the_version_that_is_there(collector: CollectorProcess) -> None:
    collector.client.set_tokens(["right"])
    assert ask(collector, V3).status_code == 401
    collector.client.set_tokens([])
    collector.client.set_reading(versions=["v1"])
    assert [ask(collector, path).status_code for path in (V3, "/api/v2/events", "/api/v1/events")] == [404, 404, 200]


def test_an_event_can_be_read_only_after_the_delay(collector: CollectorProcess) -> None:
    collector.client.set_reading(delay=3600)
    send(collector, event(1))
    assert ask(collector, V3).json()["data"] == []


def test_events_are_lost_after_a_2xx_on_purpose(collector: CollectorProcess) -> None:
    collector.client.faults(FaultRule(lose=FaultMatch(subject="gone")))
    send(collector, event(1), event(2, subject="gone"), event(3))
    assert {each["event"]["id"] for each in ask(collector, V3).json()["data"]} == {ids(1, 1)[0], ids(1, 3)[0]}


def test_customers_are_made_once_and_found_by_key_and_subject(collector: CollectorProcess) -> None:
    collector.client.add_customer("acme", "acme-1", "acme-2")
    document = {"name": "Other", "key": "acme"}
    assert requests.post(collector.url + CUSTOMERS, json=document, timeout=10).status_code == 409
    taken = {"name": "Other", "key": "other", "usage_attribution": {"subject_keys": ["acme-2"]}}
    assert requests.post(collector.url + CUSTOMERS, json=taken, timeout=10).status_code == 409
    assert requests.post(collector.url + CUSTOMERS, json={"key": "nameless"}, timeout=10).status_code == 400
    odd = {"name": "Odd", "key": "odd", "subjects": ["odd"]}
    assert requests.post(collector.url + CUSTOMERS, json=odd, timeout=10).status_code == 400
    by_key = ask(collector, CUSTOMERS, **{"filter[key][oeq]": "nobody,acme"}).json()
    by_subject = ask(collector, CUSTOMERS, **{"filter[usage_attribution_subject_key][eq]": "acme-2"}).json()
    for answer in (by_key, by_subject):
        (customer,) = answer["data"]
        assert (customer["key"], customer["usage_attribution"]) == ("acme", {"subject_keys": ["acme-1", "acme-2"]})
