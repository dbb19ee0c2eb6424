"""Prints a soak's account for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kong_metering_soak.verdict import GRACE_SECONDS, Evidence, Missing, Verdict, said

if TYPE_CHECKING:
    from kong_metering_soak.world import Happened

CONSOLE = Console(width=120, highlight=False, soft_wrap=True)

_MOST_LINES = 40
_JUST_BEFORE = 1.0


def say(text: str) -> None:
    """Print a line as it is."""
    CONSOLE.print(escape(text))


def say_fault(happened: Happened, started: float) -> None:
    """Print a fault that is over."""
    detail = f" ({happened.detail})" if happened.detail else ""
    span = f"{happened.begun - started:8.1f} to {happened.ended - started:7.1f} s"
    say(f"{span}  {happened.lane:<8}  {happened.kind.value}{detail}")


def say_account(
    evidence: Evidence, verdict: Verdict, results: Mapping[str, int], timeline: Sequence[Happened], started: float
) -> None:
    """Print what was counted, what each process said, what is missing, and whether it holds."""
    _say_counts(evidence, verdict, results)
    _say_processes(evidence)
    _say_missing(verdict, timeline, started)
    for claim, holds in _claims(evidence, verdict).items():
        CONSOLE.print(f"  {'[green]yes[/]' if holds else '[red]NO[/] '}  {escape(claim)}")
    if verdict.holds:
        CONSOLE.print("[bold green]It all adds up: nothing is lost.[/]")
    else:
        CONSOLE.print("[bold red]It does not add up.[/]")


def _say_counts(evidence: Evidence, verdict: Verdict, results: Mapping[str, int]) -> None:
    planted = sum(
        1 for event in evidence.letters if event.number is not None and evidence.asked[event.number].is_planted
    )
    rows = {
        "requests sent": len(evidence.asked),
        **{f"  answered {status}": count for status, count in results.items()},
        "log phases answered by a plugin server": len(evidence.answered),
        "  of them for a request that is billed": verdict.due,
        "unique events collected": verdict.collected,
        "  sent again with the same content": evidence.duplicates,
        "dead letters": len(evidence.letters),
        **{f"  {reason}": count for reason, count in verdict.letters.items()},
        "  of events that were planted to become some": planted,
        "events whose log phase was not answered": verdict.unanswered,
        f"answered less than {GRACE_SECONDS * 1000:.0f} ms before a SIGKILL": verdict.in_grace,
        "  of them missing, which is allowed": len(verdict.excused),
        "lost": len(verdict.lost),
        f"  of them answered less than {_JUST_BEFORE:g} s before a SIGKILL": sum(
            one.seconds_before_kill < _JUST_BEFORE for one in verdict.lost
        ),
        "  of them with an access phase that nobody answered": sum(
            one.answered.access_pid is None for one in verdict.lost
        ),
    }
    table = Table("what", show_header=False, box=None)
    table.add_column("count", justify="right")
    for name, count in rows.items():
        table.add_row(escape(name), f"{count:,}")
    CONSOLE.print(table)


def _say_processes(evidence: Evidence) -> None:
    killed = [kill.pid for kill in evidence.killed]
    say(
        f"Processes: {len(killed)} killed with SIGKILL ({', '.join(map(str, killed)) or 'none'}); what the others said:"
    )
    for account in evidence.accounts:
        say(f"  process {account.pid}, {account.source}: {said(account)}")
    spoke = {account.pid for account in evidence.accounts} | set(killed)
    silent = sorted({answered.pid for answered in evidence.answered} - spoke)
    if silent:
        say(f"  ended before they could say anything: {', '.join(map(str, silent))}")


def _say_missing(verdict: Verdict, timeline: Sequence[Happened], started: float) -> None:
    for excused in verdict.excused[:_MOST_LINES]:
        say(f"  missing, and allowed to be: {_told(excused, started)}")
    for lost in verdict.lost[:_MOST_LINES]:
        say(f"  LOST: {_told(lost, started)}; meanwhile: {_faults_at(lost.answered.at, timeline)}")
    for violation in verdict.violations[:_MOST_LINES]:
        say(f"  WRONG: {violation}")
    for name, found in (("LOST", verdict.lost), ("WRONG", verdict.violations)):
        if len(found) > _MOST_LINES:
            say(f"  {name}: and {len(found) - _MOST_LINES} more")


def _told(missing: Missing, started: float) -> str:
    answered = missing.answered
    whose = "was not answered" if answered.access_pid is None else f"was answered by process {answered.access_pid}"
    access = "" if answered.access_pid == answered.pid else f" (its access phase {whose})"
    before = missing.seconds_before_kill * 1000
    kill = f", {before:.1f} ms before its SIGKILL" if math.isfinite(before) else ""
    who = f"request {answered.number} ({answered.request_id})"
    return f"{who}, answered at {answered.at - started:.3f} s by process {answered.pid}{access}{kill}"


def _faults_at(at: float, timeline: Sequence[Happened]) -> str:
    return ", ".join(fault.kind.value for fault in timeline if fault.begun <= at <= fault.ended) or "no fault"


def _claims(evidence: Evidence, verdict: Verdict) -> dict[str, bool]:
    return {
        "every request whose log phase was answered has its event": not verdict.lost,
        "no id has two contents": evidence.conflicts == 0,
        "no good event is among the dead letters": verdict.buried_good == 0,
        "nothing waits": evidence.waiting == 0,
        "each process's account adds up": all(account.holds for account in evidence.accounts),
        "nothing else is wrong": not verdict.violations,
    }
