"""Who may have one more courier: by numbers and moments alone."""

from __future__ import annotations

import pytest

from kong_metering.delivery.requestfigures import LastRequest
from kong_metering.delivery.shares import HANGING_SECONDS, Shares, Work

DELIVERED = LastRequest(1, "", 0.1)
DELIVERED_LATE = LastRequest(1, "", 9.0)
REFUSED = LastRequest(1, "500", 0.1)
TIMED_OUT = LastRequest(1, "timed out", 10.0)
LATER = 2 * HANGING_SECONDS


@pytest.fixture
def shares() -> Shares:
    """Share out eight, and four more."""
    return Shares(8)


def begin(shares: Shares, *names: str, at: float = 0.0) -> list[Work]:
    """Begin work for all of these, which may."""
    begun = []
    for name in names:
        assert full_until(shares) is None
        assert shares.awaited(name) is None, name
        begun.append(shares.begin(name, at))
    return begun


def full_until(shares: Shares) -> float | None:
    return shares.full_until


def hung(shares: Shares, count: int) -> list[Work]:
    """Have so many endpoints that are known to hang, with no work for them under way, and then begin some of it."""
    names = [f"hanging-{number}" for number in range(count)]
    for name in names:
        (work,) = begin(shares, name)
        shares.look(LATER)
        shares.end(work, TIMED_OUT)
    return begin(shares, *names[:6], at=LATER)


def test_an_endpoint_may_have_half_of_what_others_leave(shares: Shares) -> None:
    begin(shares, "one", "one", "one", "one")
    assert shares.awaited("one") == "one"
    begin(shares, "two", "two")
    assert shares.awaited("two") == "two"


def test_each_endpoint_may_have_one(shares: Shares) -> None:
    begin(shares, *map(str, range(8)))
    assert shares.awaited("another") is None


def test_who_ends_makes_room_for_its_endpoint(shares: Shares) -> None:
    work, *_ = begin(shares, "one", "one", "one", "one")
    assert shares.end(work, DELIVERED) == ("one",)
    assert shares.awaited("one") is None


def test_all_are_busy_until_the_first_one_takes_too_long(shares: Shares) -> None:
    begin(shares, "first")
    begin(shares, *map(str, range(7)), at=0.5)
    assert full_until(shares) == HANGING_SECONDS
    shares.look(HANGING_SECONDS)
    assert full_until(shares) is None
    begin(shares, "another", at=HANGING_SECONDS)
    assert full_until(shares) == 0.5 + HANGING_SECONDS
    assert shares.at_work == 9


def test_who_ends_early_is_not_waited_for(shares: Shares) -> None:
    first, *_ = begin(shares, "first", "second")
    begin(shares, *map(str, range(6)), at=0.5)
    shares.end(first, DELIVERED)
    begin(shares, "another", at=0.7)
    assert full_until(shares) == HANGING_SECONDS
    shares.look(HANGING_SECONDS)
    assert full_until(shares) is None


def test_those_that_hang_have_half_of_all_and_others_the_rest(shares: Shares) -> None:
    works = hung(shares, 8)
    awaited = shares.awaited("hanging-6")
    assert awaited is not None
    assert shares.awaited("hanging-7") == awaited
    begin(shares, *map(str, range(6)), at=LATER)
    assert shares.at_work == shares.most
    assert awaited in shares.end(works[0], TIMED_OUT)
    assert shares.awaited("hanging-7") is None


@pytest.mark.parametrize("answered", [DELIVERED, DELIVERED_LATE, REFUSED])
def test_who_answers_hangs_no_more(shares: Shares, answered: LastRequest) -> None:
    works = hung(shares, 7)
    awaited = shares.awaited("hanging-6")
    assert awaited in shares.end(works[0], answered)
    (again,) = begin(shares, "hanging-0", at=LATER)
    assert shares.awaited("hanging-6") is None
    assert not again.hangs


@pytest.mark.parametrize("answered", [None, TIMED_OUT])
def test_who_asks_for_nothing_or_in_vain_hangs_as_before(shares: Shares, answered: LastRequest | None) -> None:
    works = hung(shares, 7)
    shares.end(works[0], answered)
    begin(shares, "hanging-6", at=LATER)
    assert shares.awaited("hanging-0") is not None


def test_who_answers_while_it_hangs_elsewhere_lets_go_what_waits_with_it(shares: Shares) -> None:
    (old,) = begin(shares, "one")
    (young,) = begin(shares, "one", at=0.5)
    shares.look(HANGING_SECONDS)
    assert old.hangs
    assert not young.hangs
    assert len(shares.end(young, DELIVERED)) == 2


def test_an_endpoint_that_takes_its_time_and_delivers_does_not_stand_in_line(shares: Shares) -> None:
    (slow,) = begin(shares, "slow")
    shares.look(LATER)
    shares.end(slow, DELIVERED_LATE)
    hung(shares, 7)
    assert shares.awaited("hanging-6") is not None
    assert shares.awaited("slow") is None


def test_an_endpoint_that_is_forgotten_is_a_new_one(shares: Shares) -> None:
    hung(shares, 7)
    shares.forget("hanging-6")
    assert shares.awaited("hanging-6") is None


def test_one_courier_alone_may_hang() -> None:
    shares = Shares(1)
    (work,) = begin(shares, "one")
    shares.look(LATER)
    shares.end(work, TIMED_OUT)
    begin(shares, "one", at=LATER)
    assert shares.most == 1
