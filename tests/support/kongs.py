"""Processes that look like those of a Kong gateway, whose workers may be somebody else's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import wait_until

_MASTER = """
import subprocess, sys
other = dict(user=int(sys.argv[1]), group=int(sys.argv[1]), extra_groups=[]) if sys.argv[1:] else {}
worker = subprocess.Popen(["nginx: worker process", "600"], executable="/bin/sleep", **other)
print("ready", flush=True)
sys.stdin.read()
worker.kill()
worker.wait()
"""


@contextmanager
def kong_in(prefix: Path, *sockets: Path, user: int | None = None) -> Iterator[None]:
    """Have a gateway with this prefix, which is configured with these sockets, and a worker of a user (the own one)."""
    lines = [f"pluginserver_one{number}_socket = {path}" for number, path in enumerate(sockets)]
    (prefix / ".kong_env").write_text("\n".join(["# *************************", *lines]), encoding="utf-8")
    title = f"nginx: master process /usr/local/openresty/nginx/sbin/nginx -p {prefix} -c nginx.conf"
    with subprocess.Popen(
        [title, "-c", _MASTER, *([] if user is None else [str(user)])],
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as master:
        assert master.stdin is not None
        assert master.stdout is not None
        try:
            assert master.stdout.readline() == b"ready\n"
            wait_until(lambda: _has_title(master.pid), "the worker has its name")
            yield
        finally:
            master.stdin.close()


def _has_title(master: int) -> bool:
    """Tell whether its child has begun to run: until then it has the parent's name."""
    children = Path(f"/proc/{master}/task/{master}/children").read_text(encoding="ascii").split()
    return bool(children) and Path(f"/proc/{children[0]}/cmdline").read_bytes().startswith(b"nginx: worker")
