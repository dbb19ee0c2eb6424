"""One of Kong's workers as a process of its own, by which a plugin server tells it from the others.

Run as a script it reads commands, one a line: `open N` opens N more connections, `ask` asks over each of them for the
process that serves it and opens those anew that have ended, `bill {"config": ..., "answers": [...]}` runs a request for
each of the answers over them. It answers each with a line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tests.support.plugin_server import ROOT
from tests.support.rpc import Connection, KongClient, KongRequest, PhaseRun, RPCFailedError, request_frame

if TYPE_CHECKING:
    from typing_extensions import Self

_STATUS = request_frame(7, "GetStatus").data


class WorkerProcess:
    """A worker that calls the plugin server at `path`."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.worker", str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def open(self, connections: int) -> None:
        """Open more connections."""
        self._do(f"open {connections}")

    def ask(self) -> list[int]:
        """Ask for the process that serves each of its connections."""
        pids: list[int] = self._do("ask")
        return pids

    def begin(self, command: str) -> None:
        """Tell it to do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """Wait until that is done."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def _do(self, command: str) -> Any:
        self.begin(command)
        return self.result()

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Worker:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._connections: list[Connection] = []

    def do(self, command: str, argument: str) -> object:
        if command == "open":
            self._connections += [Connection(self._path) for _ in range(int(argument))]
            return None
        if command == "ask":
            return [self._asked(index) for index in range(len(self._connections))]
        return self._billed(**json.loads(argument))

    def _asked(self, index: int) -> int:
        try:
            self._connections[index].send(_STATUS)
            return int(self._connections[index].receive().result["Pid"])
        except ConnectionError:
            self._connections[index] = Connection(self._path)
            return self._asked(index)

    def _billed(self, config: dict[str, object], answers: list[dict[str, object]]) -> int:
        client = KongClient(self._path, self._connections)
        instance = client.start_instance(config)
        for answer in answers:
            request = KongRequest(answer)
            for phase in ("access", "log"):
                try:
                    client.run(PhaseRun(instance, phase, request))
                except RPCFailedError as error:
                    # As Kong does when another server serves.
                    if "no plugin instance" not in str(error):
                        raise
                    instance = client.start_instance(config)
                    client.run(PhaseRun(instance, phase, request))
        return len(answers)


def main(path: Path) -> None:
    """Do what the lines say."""
    worker = _Worker(path)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        sys.stdout.write(json.dumps(worker.do(command, argument)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
