"""A process with a queue for each of many plugin entities, at few descriptors: `many_queues.py ROOT INBOX URL EVENTS`.

Opens 2,000 queues, puts as many events (one each), says so, and delivers until its standard input ends.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import sys
from pathlib import Path

from kong_metering.clock import SystemClock
from kong_metering.config import Entity, PluginConfig
from kong_metering.delivery.couriers import Couriers
from kong_metering.delivery.registry import Delivery
from kong_metering.ingest.client import IngestClient
from kong_metering.ingest.connections import Connections
from kong_metering.log import ProcessLog, Relay, Repeats, configure
from kong_metering.spool.options import SpoolOptions
from kong_metering.stats import Stats
from kong_metering.upkeep.spooler import Spooler

QUEUES = 2000
DESCRIPTORS = 1024


def run(root: Path, inbox: Path, url: str, events: int) -> None:
    clock, stats = SystemClock(), Stats()
    configure(logging.INFO, ProcessLog(Relay(), Repeats(clock)))
    connections = Connections(clock, functools.partial(IngestClient, clock=clock))
    options = SpoolOptions(root, inbox_directory=inbox)
    spooler = Spooler(options, clock=clock, stats=stats, connections=connections, janitor_round_seconds=0.1)
    delivery = Delivery(clock=clock, stats=stats, couriers=Couriers(clock), connections=connections, spooler=spooler)
    spooler.start()
    queue = {"max_coalescing_delay": 0, "initial_retry_delay": 0.2, "max_retry_delay": 0.5}
    queues = [
        delivery.open(
            Entity(f"entity-{number}", f"entity-{number}"),
            PluginConfig.model_validate({"ingest_endpoint": url, "api_token": f"token-{number}", "queue": queue}),
        )
        for number in range(QUEUES)
    ]
    for number in range(events):
        queues[number].put(json.dumps({"id": number}).encode())
    os.write(1, b"all are put\n")
    sys.stdin.read()
    delivery.close(10)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
