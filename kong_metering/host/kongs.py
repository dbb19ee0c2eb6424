"""The Kong gateways that run on this machine, as far as their processes can be seen.

Contract: reads `/proc` and nothing else, changes nothing. In a container of its own nobody sees Kong, unless the two
share the namespace of processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kong_metering.host.admission import Party, obstacle

_PROCESSES = Path("/proc")
# As nginx writes it over its command line; Kong starts it with its prefix and this file.
_MASTER = re.compile(rb"nginx: master process .* -p (\S.*?) -c nginx\.conf\b")
_WORKER = b"nginx: worker process"
# Kong writes it into the prefix of every gateway that it starts.
_MARK = ".kong_env"
_SOCKET = re.compile(r"^pluginserver_\w+_socket\s*=\s*(.*?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Process:
    """A process, the one that started it, and whose it is."""

    pid: int
    parent: int
    party: Party


@dataclass(frozen=True)
class Kong:
    """A gateway that runs: its prefix, its master process and its workers."""

    prefix: Path
    master: Process
    workers: tuple[Process, ...]

    def sockets(self) -> list[Path] | None:
        """List the sockets of plugin servers that it is configured with; None where that may not be read."""
        text = self.configuration()
        return None if text is None else [Path(path) for path in _SOCKET.findall(text)]

    def configuration(self) -> str | None:
        """Return the lines of kong.conf that it runs with; None where they may not be read."""
        try:
            return (self.prefix / _MARK).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None


def running_kongs() -> list[Kong]:
    """Find the gateways that run, the one with the lowest process id first."""
    masters: dict[int, tuple[Path, Process]] = {}
    workers: list[Process] = []
    for pid, title in _titles():
        if (match := _MASTER.match(title)) is not None:
            prefix = Path(match[1].decode("utf-8", "surrogateescape"))
            with suppress(OSError):
                if (_PROCESSES / str(pid) / "root" / prefix.relative_to("/") / _MARK).exists() or (
                    prefix / _MARK
                ).exists():
                    masters[pid] = prefix, _process(pid)
        elif title.startswith(_WORKER):
            with suppress(OSError):
                workers.append(_process(pid))
    return [
        Kong(prefix, master, tuple(worker for worker in workers if worker.parent == pid))
        for pid, (prefix, master) in sorted(masters.items())
    ]


def master_of(worker: int) -> int | None:
    """Return the process id of the master whose gateway this process is a worker of; None if it is none's."""
    with suppress(OSError):
        master = _process(worker).parent
        if _MASTER.match(_title(master)) is not None:
            return master
    return None


def who_cannot_connect(path: Path, *, is_missed: bool = False) -> str | None:
    """Tell in words whose workers are kept from a socket that their gateway is configured to connect to.

    None when no such gateway is to be seen. `is_missed`: Kong should have come by now, so that a gateway counts of
    which this user may not read what it is configured with.
    """
    for kong in running_kongs():
        sockets = kong.sockets()
        if (sockets is None and not is_missed) or (sockets is not None and path not in sockets):
            continue
        for worker in kong.workers:
            with suppress(OSError):
                hindered = obstacle(path, worker.party)
                if hindered is not None:
                    return (
                        f"Kong's workers (prefix {kong.prefix}) run as user {worker.party.name}, and cannot connect to "
                        f"{path}: {hindered}; run the plugin server as that user, or see --socket-group"
                    )
    return None


def _titles() -> Iterator[tuple[int, bytes]]:
    for directory in _PROCESSES.iterdir():
        if directory.name.isdigit():
            with suppress(OSError):
                yield int(directory.name), _title(int(directory.name))


def _title(pid: int) -> bytes:
    return (_PROCESSES / str(pid) / "cmdline").read_bytes().rstrip(b"\0 ")


def _process(pid: int) -> Process:
    """Read whose a process is: by the ids that the system goes by when it opens a file. Raises `OSError`."""
    status = dict[str, list[str]]()
    for line in (_PROCESSES / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        status[name] = value.split()
    groups = {int(status["Gid"][3]), *map(int, status["Groups"])}
    return Process(pid, int(status["PPid"][0]), Party(int(status["Uid"][3]), frozenset(groups)))
