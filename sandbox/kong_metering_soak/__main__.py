"""Whether anything billable is lost, whatever happens: traffic, faults of every kind, and an account that must add up.

    python -m kong_metering_soak [--seconds N] [--rate N] [--seed N]
    python -m kong_metering_soak --no-spool        shows that the check can fail

A stand-in gateway with two workers runs the real plugin server; a collector misbehaves, and meanwhile the plugin server
is killed, the gateway stopped, started and reloaded, the disk full, read-only or broken, the clock wrong. `verdict.py`
says what must hold in the end. The exit status is 0 when it holds, 1 when it does not.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from kong_metering_sandbox.contained import contained
from kong_metering_soak.disk import enter_namespace
from kong_metering_soak.evidence import gather, living_account, waiting
from kong_metering_soak.report import say, say_account, say_fault
from kong_metering_soak.schedule import SHORTEST_SECONDS, Plan, Planned, make_plan
from kong_metering_soak.traffic import Traffic
from kong_metering_soak.verdict import Verdict, judge
from kong_metering_soak.world import Settings, World

_SETTLING_SECONDS = 1.0
_RECOVERY_SECONDS = 1.0
_LARGEST_SEED = 10**6


def main() -> int:
    """Run a soak; returns the exit status."""
    options = _options()
    if not options.injected_disk:
        enter_namespace(__package__, sys.argv[1:])
    papers = Path(tempfile.gettempdir())
    return contained(lambda: _run(options, papers))


def _run(options: argparse.Namespace, papers: Path) -> int:
    settings = Settings(options.seconds, options.rate, has_spool=not options.no_spool, flags=options.flags)
    say(f"A soak of {options.seconds:g} s, {options.rate:g} requests/s, seed {options.seed}.")
    with tempfile.TemporaryDirectory(prefix="soak-") as directory, World(Path(directory), settings) as world:
        holds = False
        try:
            holds = _soak(world, make_plan(options.seconds, options.seed), options.drain).holds
        finally:
            if not holds:
                _keep_papers(world, papers)
    return 0 if holds else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help=f"at least {SHORTEST_SECONDS:g} (default: 60)")
    parser.add_argument("--rate", type=float, default=200, help="requests per second (default: 200)")
    parser.add_argument("--seed", type=int, default=random.randrange(_LARGEST_SEED), help="repeats a plan")  # noqa: S311
    parser.add_argument("--no-spool", action="store_true", help="without the spool: events are lost then")
    parser.add_argument("--drain", type=float, default=60, help="seconds that all may take to arrive in the end")
    parser.add_argument("--injected-disk", action="store_true", help="no tmpfs, even where one can be mounted")
    parser.add_argument("--flags", default="", help="further flags for the plugin server")
    options = parser.parse_args()
    if options.seconds < SHORTEST_SECONDS:
        parser.error(f"every kind of fault has room in {SHORTEST_SECONDS:g} s or more")
    return options


def _soak(world: World, plan: Plan, drain_seconds: float) -> Verdict:
    say(f"The spool's disk: {world.disk.kind if world.settings.has_spool else 'none'}.")
    started = time.monotonic()
    with Traffic(world.gateway.proxy_port, world.settings.rate) as traffic:
        _befall_all(world, plan, started)
        # In a process that has just started, a queue sends nothing before it has seen a request: it needs the token.
        time.sleep(max(_SETTLING_SECONDS, started + world.settings.seconds - time.monotonic()))
        world.wait_for_secret()
    say(f"{time.monotonic() - started:8.1f} s  all faults are over, no more requests")
    _drain(world, drain_seconds)
    say(f"{time.monotonic() - started:8.1f} s  nothing waits any more, or the time for it is over")
    accounts = [living_account(world)]
    world.gateway.stop()
    evidence = gather(world, traffic.issued, accounts)
    verdict = judge(evidence)
    say_account(evidence, verdict, traffic.results, world.timeline, started)
    return verdict


def _befall_all(world: World, plan: Plan, started: float) -> None:
    """Let both lanes happen at the same time; what goes wrong in one ends both, and is raised."""
    errors: list[Exception] = []
    stopping = threading.Event()

    def befall(lane: Sequence[Planned]) -> None:
        calm_until = started
        try:
            for fault in lane:
                # A busy machine may be late: what was in trouble has time to get well all the same.
                if stopping.wait(max(started + fault.start, calm_until) - time.monotonic()):
                    return
                say_fault(world.befall(fault), started)
                calm_until = time.monotonic() + _RECOVERY_SECONDS
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)
            stopping.set()

    threads = [threading.Thread(target=befall, args=(lane,), daemon=True) for lane in (plan.endpoint, plan.gateway)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stopping.set()
    if errors:
        raise errors[0]


def _drain(world: World, seconds: float) -> None:
    """Wait until nothing waits, neither in a process nor on disk."""
    time.sleep(_SETTLING_SECONDS)
    deadline = time.monotonic() + seconds
    while waiting(world) and time.monotonic() < deadline:
        time.sleep(0.2)


def _keep_papers(world: World, papers: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="soak-failed-", dir=papers))
    (directory / "error.log").write_text(world.gateway.error_log, encoding="utf-8")
    shutil.copy(world.log_phases, directory)
    say(f"The gateway's error log and its log phases are kept in {directory}.")


if __name__ == "__main__":
    sys.exit(main())
