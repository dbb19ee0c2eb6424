"""What the benchmark was run on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from kong_metering import __version__
from kong_metering_sandbox.gateways import run_kong

_PACKAGES = ("kong-pdk", "gevent", "uvloop", "greenlet")


def describe_machine() -> list[str]:
    """Tell the machine's size, and the versions of what runs on it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    programs = [f"Kong {run_kong('version', directory=Path.cwd()).strip()}", f"kong-metering {__version__}{_commit()}"]
    programs += [f"Python {platform.python_version()}", packages, _go_version(), _first_line("wrk", "-v")]
    cores = len(os.sched_getaffinity(0))
    return [
        f"{cores} cores of {_cpu_model()}, {memory:.0f} GiB of memory, Linux {platform.release()}",
        "; ".join(program for program in programs if program),
        f"load average before it began: {os.getloadavg()[0]:.2f}",
    ]


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _go_version() -> str:
    said = _first_line("go", "version").split()
    return f"Go {said[2].removeprefix('go')}, go-pdk {_go_pdk_version()}" if len(said) > 2 else ""


def _go_pdk_version() -> str:
    lines = Path(__file__).with_name("goplugin").joinpath("go.mod").read_text().splitlines()
    return next(line.split()[-1] for line in lines if "github.com/Kong/go-pdk" in line)


def _commit() -> str:
    said = _first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    return f" ({said})" if said else ""


def _first_line(*command: str) -> str:
    """Give the first line that a program prints; nothing if it is not there."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    # wrk -v ends with an error.
    return (done.stdout.splitlines() or [""])[0].partition(" [")[0]
