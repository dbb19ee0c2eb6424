"""Which of several values of a vault reference rules a queue."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kong_metering.config import Queue
from kong_metering.delivery.precedence import Configuration, Precedence
from kong_metering.ingest.client import Endpoint

REFERENCE = "{vault://hcv/om-token}"


def with_token(token: str, url: str = "http://x/events") -> Configuration:
    return Configuration(Endpoint(url, token, 10, 60, verify=True), Queue())


WRITTEN = with_token(REFERENCE)
OLD, NEW, OTHER = with_token("old"), with_token("new"), with_token("other")


@pytest.fixture
def precedence() -> Precedence:
    """Give what two workers have opened with the old value, under a number each."""
    precedence = Precedence(OLD, 5, WRITTEN)
    assert not precedence.open(OLD, 6, WRITTEN)
    return precedence


def answers(precedence: Precedence, configuration: Configuration, *, is_refused: bool) -> bool:
    return precedence.note_answer(configuration.endpoint, is_refused=is_refused)


@pytest.mark.parametrize("number", [5, 6, 7])
def test_another_value_does_not_rule_while_the_endpoint_takes_the_first(precedence: Precedence, number: int) -> None:
    answers(precedence, OLD, is_refused=False)
    assert not precedence.open(NEW, number, WRITTEN)
    assert precedence.ruling == OLD


def test_it_rules_once_the_first_is_refused(precedence: Precedence) -> None:
    precedence.open(NEW, 5, WRITTEN)
    assert answers(precedence, OLD, is_refused=True)
    assert precedence.ruling == NEW
    assert not precedence.is_refused


@pytest.mark.parametrize("number", [5, 6, 7])
def test_it_rules_at_once_when_the_first_is_refused_already(precedence: Precedence, number: int) -> None:
    assert not answers(precedence, OLD, is_refused=True)
    assert precedence.is_refused
    assert precedence.open(NEW, number, WRITTEN)
    assert precedence.ruling == NEW


def test_a_worker_that_still_holds_the_old_value_does_not_bring_it_back(precedence: Precedence) -> None:
    answers(precedence, OLD, is_refused=True)
    precedence.open(NEW, 5, WRITTEN)
    assert not precedence.open(OLD, 6, WRITTEN)
    answers(precedence, NEW, is_refused=False)
    assert precedence.ruling == NEW


def test_one_that_was_refused_is_tried_again_only_when_it_is_opened_again(precedence: Precedence) -> None:
    precedence.open(NEW, 5, WRITTEN)
    answers(precedence, OLD, is_refused=True)
    assert not answers(precedence, NEW, is_refused=True)
    assert precedence.ruling == NEW
    assert precedence.open(OLD, 6, WRITTEN)
    assert precedence.ruling == OLD


def test_an_answer_to_one_that_does_not_rule_any_more_says_nothing(precedence: Precedence) -> None:
    answers(precedence, OLD, is_refused=True)
    precedence.open(NEW, 5, WRITTEN)
    assert not answers(precedence, OLD, is_refused=True)
    assert not precedence.is_refused


def test_a_changed_configuration_rules_whatever_the_endpoint_takes(precedence: Precedence) -> None:
    answers(precedence, OLD, is_refused=False)
    changed = replace(NEW, settings=Queue(max_batch_size=100))
    written = replace(WRITTEN, settings=changed.settings)
    assert precedence.open(changed, 7, written)
    # Under the configuration before, whatever its value is, it comes late.
    for late in (OLD, OTHER):
        assert not precedence.open(late, 6, WRITTEN)
    assert precedence.ruling == changed


def test_without_references_the_last_one_rules() -> None:
    precedence = Precedence(OLD, 5)
    answers(precedence, OLD, is_refused=False)
    assert precedence.open(NEW, 6)
    assert precedence.ruling == NEW
