"""How long a person is kept waiting."""

from __future__ import annotations

import pytest

from kong_metering.commands.endurance import ROUNDS, TRIES, Endurance
from kong_metering.trial.outcome import Delivered, Failed, Outcome, Rejected
from tests.support.clock import FakeClock

DOWN = Failed("answered 503", "503")
BLOCKED = Failed("answered 403", "403", is_misconfigured=True, may_have_arrived=False)
UNREACHABLE = Failed("refused", "ConnectionRefusedError", may_have_arrived=False)
UNTRUSTED = Failed("untrusted", "SSLCertVerificationError", is_misconfigured=True, may_have_arrived=False)
UNAUTHORIZED = Failed("answered 401", "401", is_misconfigured=True, may_have_arrived=False)
TOO_MANY = Failed("answered 429", "429", retry_after=7.0, may_have_arrived=False)
BAD = Rejected("answered 400")


@pytest.mark.parametrize("failure", [UNAUTHORIZED, UNTRUSTED])
def test_it_ends_at_once_where_trying_again_is_of_no_use(failure: Failed) -> None:
    endurance = Endurance(FakeClock())
    endurance.count(failure)
    assert endurance.has_ended


@pytest.mark.parametrize("failure", [UNREACHABLE, TOO_MANY])
def test_it_ends_after_some_tries_where_no_event_is_the_reason(failure: Failed) -> None:
    endurance = Endurance(FakeClock())
    for tries in range(1, TRIES + 1):
        endurance.count(failure)
        assert endurance.has_ended == (tries == TRIES)


@pytest.mark.parametrize("failure", [DOWN, BLOCKED, BAD])
def test_it_ends_after_more_rounds_where_an_event_may_be_the_reason(failure: Failed | Rejected) -> None:
    endurance = Endurance(FakeClock())
    for rounds in range(1, ROUNDS + 1):
        endurance.count(failure)
        endurance.count(failure)
        endurance.count_pause()
        assert endurance.has_ended == (rounds == ROUNDS)
    assert endurance.reason.startswith("nothing gets through: answered ")


def test_what_gets_through_begins_it_anew() -> None:
    endurance = Endurance(FakeClock())
    for _ in range(1000):
        for _ in range(ROUNDS):
            endurance.count(DOWN)
            endurance.count_pause()
        endurance.count(Delivered())
        assert not endurance.has_ended


def test_an_endpoint_that_fails_at_random_is_given_longer() -> None:
    endurance = Endurance(FakeClock())
    outcomes: list[Outcome] = [DOWN, DOWN, DOWN, Delivered()]
    for outcome in outcomes * 10:
        endurance.count(outcome)
    failures = 0
    while not endurance.has_ended:
        endurance.count(DOWN)
        endurance.count_pause()
        failures += 1
    assert 40 < failures < 60
    assert endurance.reason == "nothing gets through any more: answered 503"


def test_a_pause_that_the_endpoint_asks_for_is_made_up_to_a_minute() -> None:
    clock = FakeClock()
    endurance = Endurance(clock)
    now = clock.monotonic()
    endurance.count(TOO_MANY)
    assert endurance.pause_until(now + 0.5) == now + 7
    assert endurance.pause_until(now + 9) == now + 9
    endurance.count(Failed("later", "503", retry_after=3600.0))
    assert endurance.pause_until(now) == now + 60
