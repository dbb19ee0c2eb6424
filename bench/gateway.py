"""What metering costs on a real Kong, next to other plugins, and to a floor: `make bench GATEWAY=kong`.

    python bench/gateway.py                    the comparison
    python bench/gateway.py --interpreters     our plugin server on each Python that is here (or: those given)
    python bench/gateway.py --kill SECONDS     the process that serves is killed each second
    python bench/gateway.py --flood            flat out at many connections, floods of 404
    python bench/gateway.py --all              all of it

Needs a real Kong and wrk on the PATH, and go for two of the candidates: the Go plugin, and the floor, which asks Kong
what ours asks and does nothing with the answers, so that one sees what of our figures is ours. `--markdown FILE` writes
what was found as Markdown: the machine and the first table are for docs/benchmarks.md, the rest for
docs/benchmarks-history.md. The exit status is 1 if an event is missing where none may be, or a request is not answered
200 in the comparison, and 2 if it cannot run. A target is said to be met or missed; that does not change the status.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import gateway_flood
import gateway_interpreters
import gateway_kills
from gateway_candidates import (
    FLOOR,
    PROTOCOLS,
    Candidate,
    floor,
    go_plugin,
    http_log,
    judged,
    key_auth,
    nothing,
    ours,
    pdk_gevent,
)
from gateway_comparison import CONNECTIONS, EventsMissingError, compare, figures, verdicts
from gateway_machine import describe_machine
from gateway_paper import Paper
from gateway_wrk import find_wrk
from rich.markup import escape
from terminal import CONSOLE, argument_parser

from kong_metering_sandbox.gateways import GatewayError

_GET_KONG = (
    "there is no `kong` on the PATH, and only a real Kong can be measured. Its packages put it there "
    "(https://developer.konghq.com/gateway/install/); for one elsewhere: PATH=/where/it/is/bin:$PATH"
)
_STAND_IN = (
    "The stand-in plays Kong's part in tests; what it costs says nothing of Kong. Only a real one is measured: get "
    "Kong Gateway (https://developer.konghq.com/gateway/install/), see that `kong version` runs, and\n"
    "    make bench GATEWAY=kong"
)
_WHAT_THEY_DO = (
    "Kongs with one nginx worker each run side by side and take turns in rounds, another one first in each round. The "
    "Go plugin and the one on kong-pdk's own server read a header in access, keep it in ctx.shared, serialize in log, "
    "build a small event and throw it away. http-log delivers its records. kong-metering does everything: subject, all "
    "event fields, spool on disk, delivery. The floor asks Kong over ProtoBuf, in the same writes, what kong-metering "
    "asks for a subject by header, and throws the answers away: what it costs is Kong's and the protocol's, and what "
    "kong-metering costs beyond that is its own. Each route answers by itself (`request-termination`), the cheapest "
    "service there is. Requests differ in path, arguments and user agent: a LuaJIT that draws an unlucky seed puts "
    "most log records that are all alike into one bucket, and such a Kong takes several times the CPU."
)
_CANNOT_RUN = 2


def main() -> int:
    """Run what the arguments ask for; returns the exit status."""
    options = _options()
    if options.gateway != "kong":
        CONSOLE.print(escape(_STAND_IN))
        return _CANNOT_RUN
    signal.signal(signal.SIGTERM, _end)  # no Kong is to outlive this program
    paper = Paper()
    try:
        _check_programs()
        paper.title("On a real Kong")
        paper.items(describe_machine())
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            holds = _run(options, Path(directory), paper)
    except (GatewayError, EventsMissingError) as error:
        CONSOLE.print(f"[red]It failed:[/] {escape(str(error))}")
        return 1 if isinstance(error, EventsMissingError) else _CANNOT_RUN
    if options.markdown:
        paper.write(options.markdown)
    return 0 if holds else 1


def _options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--gateway", choices=("kong", "standin"), default="kong")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=int, default=4, help="of load in each round; half as many over one connection"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="leave the other candidates out")
    parser.add_argument(
        "--interpreters", nargs="*", type=Path, metavar="PYTHON", help="compare these, or all that are here"
    )
    parser.add_argument("--kill", type=int, metavar="SECONDS", help="kill our server each second for so long")
    parser.add_argument("--flood", action="store_true", help="flat out, and floods of 404")
    parser.add_argument("--all", action="store_true", help="everything, one after the other")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write what was found")
    options = parser.parse_args()
    if options.all:
        options.interpreters = options.interpreters or []
        options.kill = options.kill or 30
        options.flood = True
    return options


def _end(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _check_programs() -> None:
    if shutil.which("kong") is None:
        raise GatewayError(_GET_KONG)
    find_wrk()


def _run(options: argparse.Namespace, directory: Path, paper: Paper) -> bool:
    """Run what was asked for; whether all holds that must."""
    others = options.interpreters is not None or options.kill or options.flood
    holds = True
    if options.all or not others:
        _compare(options, directory, paper)
    if options.interpreters is not None:
        _compare_interpreters(options, directory, paper)
    if options.kill:
        found = gateway_kills.kill_each_second(directory, options.kill)
        paper.heading(f"Killed each second, for {options.kill} s")
        paper.grid(gateway_kills.tolls(found))
        paper.items(gateway_kills.remarks(found))
    if options.flood:
        washed = gateway_flood.flood(directory, options.seconds)
        paper.heading(f"Flat out, {options.seconds} s each")
        paper.grid(gateway_flood.table(washed))
        paper.items(gateway_flood.remarks(washed))
        holds = gateway_flood.holds(washed)
    return holds


def _compare(options: argparse.Namespace, directory: Path, paper: Paper) -> None:
    candidates = _chosen(options.only, directory, paper)
    samples, events = compare(candidates, directory, options.rounds, options.seconds)
    paper.heading("Side by side")
    paper.text(_WHAT_THEY_DO)
    paper.text(_how(options.rounds, options.seconds, events))
    paper.grid(figures(candidates, samples))
    wanted = judged(candidates)
    if wanted:
        paper.grid(verdicts(wanted, samples))


def _compare_interpreters(options: argparse.Namespace, directory: Path, paper: Paper) -> None:
    interpreters = options.interpreters or gateway_interpreters.find_interpreters()
    candidates = gateway_interpreters.candidates(interpreters, directory)
    samples, events = compare(candidates, directory, options.rounds, options.seconds)
    paper.heading("Interpreters")
    paper.text(f"kong-metering, ProtoBuf, batches of 100. {_how(options.rounds, options.seconds, events)}")
    paper.grid(figures(candidates, samples))
    missing = gateway_interpreters.missing_versions(interpreters)
    if missing:
        paper.text(f"Not measured, for it is not on this machine: {', '.join(f'Python {one}' for one in missing)}.")


def _chosen(only: Sequence[str] | None, directory: Path, paper: Paper) -> list[Candidate]:
    before = [nothing(), key_auth(), http_log(), pdk_gevent()]
    after = [ours(protocol, batch) for protocol in PROTOCOLS for batch in (100, 1)]
    after += [ours(protocol, by_consumer=True) for protocol in PROTOCOLS]
    built = {"go": go_plugin, FLOOR: floor}
    names = [*(candidate.name for candidate in before), *built, *(candidate.name for candidate in after)]
    for name in only or ():
        if name not in names:
            raise GatewayError(f"there is no candidate {name}; there are {', '.join(names)}")
    if not only and shutil.which("go") is None:
        paper.text("The Go plugin and the floor are left out: there is no `go` on the PATH.")
        built = {}
    made = [make(directory) for name, make in built.items() if not only or name in only]
    candidates = [*before, *made, *after]
    return [candidate for candidate in candidates if not only or candidate.name in only]


def _how(rounds: int, seconds: int, events: int) -> str:
    alone = max(1, seconds // 2)
    return (
        f"Medians of {rounds} rounds of {seconds} s over {CONNECTIONS} connections and {alone} s over one, client and "
        "endpoint on the same cores; a ratio is the median of the ratios within each round. CPU for each request, of "
        "all processes, until all its events were delivered. After each load as many events had arrived as requests "
        f"were sent: {events:,} in all."
    )


if __name__ == "__main__":
    sys.exit(main())
