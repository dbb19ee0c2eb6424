"""Plays one nginx worker of Kong, in a process of its own: `servers.py` starts it.

    python bench/worker.py SOCKET ENDPOINT

Reads a number of requests from each line of standard input, sends as many to the plugin server, and answers with a line
when they are done.
"""

from __future__ import annotations

import sys
from pathlib import Path

from client import Client, plugin_config

from kong_metering import PLUGIN_NAME

_IN_FLIGHT = 16
_QUEUE = {"max_batch_size": 500, "max_entries": 1_000_000}


def main() -> None:
    """Do what standard input says until it ends."""
    path, endpoint = sys.argv[1:]
    client = Client(Path(path))
    instance = client.start_instance(PLUGIN_NAME, plugin_config(endpoint, _QUEUE))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        client.run([instance], int(line), _IN_FLIGHT)
        sys.stdout.write("done\n")
        sys.stdout.flush()
    client.close()


if __name__ == "__main__":
    main()
