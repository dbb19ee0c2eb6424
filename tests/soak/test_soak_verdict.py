"""The soak's verdict on made-up records: it must be able to say no."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kong_metering_soak.traffic import Asked, asked, number_of, target_of
from kong_metering_soak.verdict import Answered, Event, Evidence, Killed, ProcessAccount, Verdict, judge

ASKED = {
    0: Asked("orders", "acme"),
    1: Asked("orders", "globex"),
    2: Asked("invoices", "acme"),
    3: Asked("orders", None),
    4: Asked("orders", "refused"),
}
PID = 100
KILLED_AT = 50.0


def answered(number: int, at: float = 10.0, pid: int = PID) -> Answered:
    return Answered(number, f"request-{number}", at, pid)


def event(of: int, **changes: object) -> Event:
    found = Event(of, f"request-{of}:api", ASKED[of].subject or "", ASKED[of].route)
    return replace(found, **changes)  # type: ignore[arg-type]


COMPLETE = Evidence(
    asked=ASKED,
    answered=[answered(number) for number in ASKED],
    collected=[event(0), event(1), event(2)],
    letters=[event(4, reason="rejected")],
)


def judged(**changes: object) -> Verdict:
    return judge(replace(COMPLETE, **changes))  # type: ignore[arg-type]


def test_holds_when_each_answered_request_is_collected_or_a_dead_letter() -> None:
    verdict = judge(COMPLETE)
    assert verdict.holds
    assert (verdict.due, verdict.collected, verdict.letters) == (4, 3, {"rejected": 1})


def test_a_missing_event_is_lost() -> None:
    verdict = judged(collected=[event(0), event(2)])
    assert not verdict.holds
    assert [one.answered for one in verdict.lost] == [answered(1)]


def test_a_missing_dead_letter_is_lost() -> None:
    assert [one.answered for one in judged(letters=[]).lost] == [answered(4)]


def test_a_request_whose_log_phase_was_not_answered_may_have_an_event_or_none() -> None:
    not_answered = [found for found in COMPLETE.answered if found.number != 1]
    assert judged(answered=not_answered).unanswered == 1
    assert judged(answered=not_answered, collected=[event(0), event(2)]).holds


@pytest.mark.parametrize(("before", "holds"), [(0.009, True), (0.011, False), (-0.002, True)])
def test_an_event_may_be_missing_if_it_was_answered_just_before_a_kill(before: float, holds: bool) -> None:  # noqa: FBT001
    late = [answered(0), answered(1, KILLED_AT - before), answered(2)]
    verdict = judged(answered=late, collected=[event(0), event(2)], letters=[], killed=[Killed(PID, KILLED_AT)])
    assert verdict.holds is holds
    assert (len(verdict.excused), len(verdict.lost)) == ((1, 0) if holds else (0, 1))


def test_the_kill_of_another_process_excuses_nothing() -> None:
    late = [answered(0), answered(1, KILLED_AT - 0.005), answered(2)]
    verdict = judged(answered=late, collected=[event(0), event(2)], letters=[], killed=[Killed(PID + 1, KILLED_AT)])
    assert [one.answered for one in verdict.lost] == [late[1]]


def test_the_kill_of_an_earlier_process_with_the_same_id_excuses_nothing() -> None:
    late = [answered(0), answered(1, KILLED_AT + 60), answered(2)]
    again = [Killed(PID, KILLED_AT), Killed(PID, KILLED_AT + 90)]
    verdict = judged(answered=late, collected=[event(0), event(2)], letters=[], killed=again)
    assert [(one.answered, one.seconds_before_kill) for one in verdict.lost] == [(late[1], 30.0)]


def test_an_event_that_arrived_although_it_might_have_been_lost_is_counted() -> None:
    verdict = judged(killed=[Killed(PID, 10.001)])
    assert (verdict.holds, verdict.in_grace, verdict.excused) == (True, 4, ())


@pytest.mark.parametrize(
    "wrong",
    [
        event(0, number=99, id="other"),
        event(0, number=None, id="other"),
        event(3),
        event(1, subject="acme"),
        event(2, route="orders"),
        event(2, route=None),
    ],
    ids=["a number never sent", "no number", "no subject asked", "another's subject", "another's endpoint", "nobody's"],
)
def test_an_event_that_nobody_asked_for_so_is_wrong(wrong: Event) -> None:
    good = [found for found in COMPLETE.collected if found.number != wrong.number]
    verdict = judged(collected=[*good, wrong])
    assert not verdict.holds
    assert len(verdict.violations) == 1


def test_a_request_with_two_ids_is_wrong() -> None:
    verdict = judged(collected=[*COMPLETE.collected, event(0, id="another")])
    assert verdict.violations == ("request 0 has the ids ['another', 'request-0:api']",)


def test_an_id_with_two_contents_is_wrong() -> None:
    assert not judged(conflicts=1).holds
    one_id = [event(0, id="same"), event(1, id="same"), event(2)]
    assert judged(collected=one_id).violations == ("id same has two contents",)


def test_the_same_event_twice_is_allowed() -> None:
    assert judged(duplicates=7).holds
    assert judged(collected=[*COMPLETE.collected, event(4)]).holds


@pytest.mark.parametrize("reason", ["rejected", "ambiguous"])
def test_a_good_event_among_the_dead_letters_is_wrong(reason: str) -> None:
    verdict = judged(letters=[event(4, reason="rejected"), event(0, reason=reason)])
    assert not verdict.holds
    assert verdict.buried_good == 1


def test_an_event_that_a_firewall_takes_offence_at_may_be_a_dead_letter() -> None:
    suspicious = {**ASKED, 0: Asked("orders", "acme", is_suspicious=True)}
    letters = [event(4, reason="rejected"), event(0, reason="rejected")]
    verdict = judged(asked=suspicious, collected=[event(1), event(2)], letters=letters)
    assert verdict.holds
    assert verdict.buried_good == 0


def test_what_waits_in_the_end_is_wrong() -> None:
    assert not judged(waiting=1).holds


@pytest.mark.parametrize(
    ("came", "went"), [({"accepted": 3}, {"delivered": 2}), ({"accepted": 3}, {"delivered": 4, "waiting": -1})]
)
def test_a_process_whose_account_does_not_add_up_is_wrong(came: dict[str, int], went: dict[str, int]) -> None:
    assert not judged(accounts=[ProcessAccount(PID, "its status", came, went)]).holds
    assert judged(accounts=[ProcessAccount(PID, "its status", {"accepted": 2}, {"delivered": 2})]).holds


def test_the_number_of_a_request_is_read_back_from_its_target() -> None:
    assert [number_of(target_of(number)) for number in range(10)] == list(range(10))
    assert {asked(number).route for number in range(10)} == {"orders", "invoices"}
    assert number_of("/orders/7/more") is number_of(None) is None
