"""Two processes over one spool, each killed again and again, and an account that must add up.

    python -m kong_metering_torture [--kills N] [--rate N] [--seed N] [--inbox WHERE]

Both put events into three queues each; one HTTP endpoint fails at times and refuses some of the events, which become
dead letters. Each process gets SIGKILL at a random moment, and another one takes its place at once. In the end a last
one delivers what there is. `verdict.py` says what must hold; the exit status is 0 when it holds, 1 when it does not.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kong_metering.eventlog.log import EventLog
from kong_metering.inbox.place import Place
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.directory import survey
from kong_metering.spool.options import INBOX_DIRECTORY
from kong_metering_sandbox.contained import contained
from kong_metering_torture.endpoint import TortureEndpoint
from kong_metering_torture.events import QUEUES, Name, digest, event_of, read_told
from kong_metering_torture.killing import Lane, Nursery, Setting, killed_by
from kong_metering_torture.verdict import Evidence, Verdict, judge

_LANES = "ab"
_LAST = "last"
_KEPT, _ALONE = "none", "alone"
# How far back what a process leaves in memory goes, where many share few cores.
_UNSEEN_SECONDS = 0.1
_LARGEST_SEED = 10**6
# How old an event is on disk at the latest, where it waits in the process's own memory until then.
_GATHERING_MS = 10.0
_ENDING_SECONDS = 15.0
_LOOK_SECONDS = 0.2
_QUIET_LOOKS = 15
_MOST_EXAMPLES = 10

CONSOLE = Console(width=120, highlight=False, soft_wrap=True)


def main() -> int:
    """Run it; returns the exit status."""
    options = _options()
    papers = Path(tempfile.gettempdir())
    return contained(lambda: _run(options, papers))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many processes are killed, at least (default: 200)")
    parser.add_argument("--rate", type=float, default=1500, help="events/s of each process (default: 1500)")
    parser.add_argument("--seed", type=int, default=random.randrange(_LARGEST_SEED), help="repeats the chances")  # noqa: S311
    parser.add_argument(
        "--inbox",
        default=str(INBOX_DIRECTORY),
        help="where shared memory is to be had; none: in the memory of the program that starts the processes, as "
        "plugin servers without shared memory have it; alone: as if that program were killed with each of them",
    )
    parser.add_argument(
        "--allowance",
        type=float,
        default=_GATHERING_MS,
        help="with --inbox alone: how many ms before its SIGKILL what a process put may be lost (default: 10)",
    )
    parser.add_argument("--drain", type=float, default=120, help="seconds that all may take to arrive in the end")
    return parser.parse_args()


def _run(options: argparse.Namespace, papers: Path) -> int:
    CONSOLE.print(
        f"{options.kills} SIGKILLs, {options.rate:g} events/s each, inbox {options.inbox}, seed {options.seed}"
    )
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        directory = Path(name)
        (directory / "told").mkdir()
        with TortureEndpoint(options.seed) as endpoint:
            setting = Setting(directory, options.inbox, endpoint.url, options.rate)
            started = time.monotonic()
            kills = _tortured(setting, options.kills, options.seed)
            CONSOLE.print(f"{time.monotonic() - started:8.1f} s  all are killed")
            endpoint.clear_up()
            _deliver_the_rest(setting, options.drain)
            CONSOLE.print(f"{time.monotonic() - started:8.1f} s  nothing waits any more, or the time for it is over")
        evidence = _gathered(setting, kills, endpoint, options.allowance / 1000)
        verdict = judge(evidence)
        _say(verdict, endpoint)
        if not verdict.holds:
            kept = Path(tempfile.mkdtemp(prefix="torture-failed-", dir=papers))
            shutil.copytree(directory, kept, dirs_exist_ok=True)
            CONSOLE.print(f"The spool and what the processes said are kept in {kept}.")
    return 0 if verdict.holds else 1


def _tortured(setting: Setting, kills: int, seed: int) -> dict[str, float]:
    """Kill processes in all lanes, side by side; tell who was killed when. What goes wrong in a lane is raised."""
    lanes = [Lane(name, setting, seed + number) for number, name in enumerate(_LANES)]
    errors: list[Exception] = []

    def run(lane: Lane) -> None:
        try:
            lane.run(lambda: not errors and len(killed_by(lanes)) < kills)
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(lane,)) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return killed_by(lanes)


# -- the end ----------------------------------------------------------------------------------------------------------


def _deliver_the_rest(setting: Setting, seconds: float) -> None:
    """Let a last process deliver what there is."""
    deadline = time.monotonic() + seconds
    last = Nursery(setting)
    try:
        last.order(f"deliver {_LAST}")
        quiet = 0
        # What changes hands meanwhile is seen by neither look, so one time is not enough.
        while quiet < _QUIET_LOOKS and time.monotonic() < deadline:
            is_quiet = _left_behind(setting) == 0 and int(last.order("waiting")) == 0
            quiet = quiet + 1 if is_quiet else 0
            time.sleep(_LOOK_SECONDS)
    finally:
        last.end(_ENDING_SECONDS)


def _left_behind(setting: Setting) -> int:
    """Count the events on disk that no living process holds, and the rings of dead processes."""
    spool = setting.directory / "spool"
    place = Place(Path(setting.inbox), spool)
    rings = 0 if setting.inbox in {_KEPT, _ALONE} else sum(1 for _ in place.look())
    return rings + sum(_waiting_in(found.directory) for found in survey(spool) if found.holder is None)


def _waiting_in(directory: Path) -> int:
    try:
        with closing(EventLog.view(directory)) as log:
            return log.waiting
    except FileNotFoundError:
        return 0  # it has just been taken over


def _gathered(setting: Setting, kills: dict[str, float], endpoint: TortureEndpoint, allowance: float) -> Evidence:
    puts = [put for name in (*kills, _LAST) for put in read_told(setting.directory / "told" / name)]
    letters = DeadLetters(setting.directory / "spool" / DEAD_LETTERS)
    events = [stored.letter.event for stored in letters.letters()]
    return Evidence(
        puts=puts,
        contents={put.name: digest(event_of(put.name)) for put in puts},
        arrivals=endpoint.arrivals,
        letters=[(Name.of(orjson.loads(event)["id"]), digest(event)) for event in events],
        kills=kills,
        allowance=allowance if setting.inbox == _ALONE else 0.0,
        overtaking=_UNSEEN_SECONDS if setting.inbox == _KEPT else 0.0,
        unordered=frozenset(number for number, queue in enumerate(QUEUES) if not queue.has_order),
        waiting=_left_behind(setting),
        unreadable=endpoint.unreadable,
    )


def _say(verdict: Verdict, endpoint: TortureEndpoint) -> None:
    table = Table("what", show_header=False, box=None)
    table.add_column("count", justify="right")
    for name, count in verdict.counts.items():
        table.add_row(escape(name), f"{count:,}")
    for fault, count in endpoint.faults.items():
        table.add_row(f"requests that met: {fault.value}", f"{count:,}")
    for name, found in verdict.wrong.items():
        table.add_row(f"[{'red' if found else 'green'}]{escape(name)}[/]", f"{len(found):,}")
    CONSOLE.print(table)
    for name, found in verdict.wrong.items():
        for words in found[:_MOST_EXAMPLES]:
            CONSOLE.print(f"  [red]{escape(name)}[/]: {escape(words)}")
    CONSOLE.print("[bold green]It all adds up.[/]" if verdict.holds else "[bold red]It does not add up.[/]")


if __name__ == "__main__":
    sys.exit(main())
