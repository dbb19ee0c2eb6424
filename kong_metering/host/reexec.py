"""What a supervisor leaves to itself when it starts the program anew in its own place, with new code.

The process stays the same, and with it its children; descriptors that are named here stay open.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kong_metering.host.channels import Channel
from kong_metering.host.handover import Sockets

if TYPE_CHECKING:
    from typing_extensions import Self

_VARIABLE = "KONG_METERING_RESTARTED"


@dataclass(frozen=True)
class Restart:
    """The descriptors of the socket that listens and of the servers' channels; the processes, in the same order.

    `process` is the one that is started anew. `servers` has 0 where none serves; `leaving` are those that have only to
    end yet.
    """

    process: int
    listener: int
    channels: list[int]
    servers: list[int]
    leaving: list[int]

    @classmethod
    def taken_from(cls, environment: MutableMapping[str, str]) -> Self | None:
        """Read what was left to this process, if it was started so, and take it out of the environment."""
        text = environment.pop(_VARIABLE, None)
        if text is None:
            return None
        restart = cls(**json.loads(text))
        return restart if restart.process == os.getpid() else None

    @property
    def descriptors(self) -> set[int]:
        """Those that stay open."""
        return {self.listener, *self.channels}

    def sockets(self) -> Sockets:
        """Give the sockets, which no other program gets."""
        for descriptor in self.descriptors:
            os.set_inheritable(descriptor, False)  # noqa: FBT003 - the standard library's signature
        ends = [socket.socket(fileno=descriptor) for descriptor in self.channels]
        channels = [Channel.of(inlet, outlet) for inlet, outlet in zip(ends[::2], ends[1::2], strict=True)]
        return Sockets(socket.socket(fileno=self.listener), tuple(channels), None)

    def start(self) -> None:
        """Start the program anew, in this process; raises `OSError` if that cannot be."""
        for descriptor in self.descriptors:
            os.set_inheritable(descriptor, True)  # noqa: FBT003 - the standard library's signature
        environment = {**os.environ, _VARIABLE: json.dumps(asdict(self))}
        os.execve(sys.executable, sys.orig_argv, environment)  # noqa: S606 - there is to be no shell


def rehearse() -> int:
    """Start the program to see whether it can be; gives the process, which ends with status 0 if so. Raises `OSError`.

    It prints what Kong wants to know of the plugin, which nobody reads, and has imported everything by then.
    """
    nowhere = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    return os.posix_spawn(sys.executable, [*sys.orig_argv, "--dump"], os.environ, file_actions=nowhere)
