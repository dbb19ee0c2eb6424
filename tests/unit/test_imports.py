"""The modules import each other in one direction only, for the type checker too; the pure ones nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kong_metering

ROOT = Path(kong_metering.__file__).parent

# No threads, no I/O and no clock in these: values in, decisions out.
PURE = (
    "trial/*.py",
    "plurals.py",
    "reasons.py",
    "outages.py",
    "delivery/precedence.py",
    "delivery/shares.py",
    "eventlog/format.py",
)
# Of `logging` they take the names of the levels.
HARMLESS = {
    "__future__", "bisect", "collections", "collections.abc", "dataclasses", "enum", "functools", "itertools",
    "logging", "math", "operator", "re", "struct", "typing", "zlib", "kong_metering.errors",
}  # fmt: skip


def name_of(path: Path) -> str:
    parts = [ROOT.name, *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(path: Path, modules: set[str]) -> set[str]:
    """List the modules of ours that one imports, wherever in it that is: in a function, or for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            assert node.level == 0, f"{path}: a relative import"
            # A name is a module of the package, or something in the module.
            found.update(
                name if (name := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names
            )
    return found - {name_of(path)}


def test_no_modules_import_each_other() -> None:
    paths = {name_of(path): path for path in ROOT.rglob("*.py")}
    graph = {name: imported_by(path, set(paths)) for name, path in paths.items()}
    assert "kong_metering.clock" in graph["kong_metering.log"], "what is imported for types counts"
    assert "kong_metering.app" in graph["kong_metering.cli"], "what is imported late counts"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def imported_at_run_time(tree: ast.Module) -> set[str]:
    """List what a module imports, but for types."""
    found: set[str] = set()
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
        nodes += ast.iter_child_nodes(node)
    return found


def test_pure_modules_import_no_threads_no_files_and_no_clocks() -> None:
    pure = [path for pattern in PURE for path in ROOT.glob(pattern)]
    allowed = HARMLESS | {name_of(path) for path in pure}
    found = {name_of(path): imported_at_run_time(ast.parse(path.read_bytes())) for path in pure}
    assert found.keys() >= {"kong_metering.trial.blame", "kong_metering.trial.trial"}
    assert {name: imported - allowed for name, imported in found.items() if imported - allowed} == {}


def test_the_trial_knows_of_no_queue_endpoint_or_spool_not_even_as_a_type() -> None:
    known = {name_of(path) for path in ROOT.rglob("*.py")}
    imported = {name for path in ROOT.glob("trial/*.py") for name in imported_by(path, known)}
    others = {name for name in imported if not name.startswith("kong_metering.trial")}
    assert others == {"kong_metering.config", "kong_metering.plurals", "kong_metering.reasons"}


def test_where_events_wait_knows_nothing_of_who_delivers_them() -> None:
    known = {name_of(path) for path in ROOT.rglob("*.py")}
    packages = ("backlog", "spool", "eventlog", "inbox")
    imported = {
        name for package in packages for path in (ROOT / package).glob("*.py") for name in imported_by(path, known)
    }
    assert "kong_metering.backlog.source" in imported
    assert {name for name in imported if name.startswith(("kong_metering.delivery", "kong_metering.ingest"))} == set()


@pytest.mark.parametrize(
    ("call", "needless"),
    [
        (
            "from kong_metering.cli import main; main(['--dump'])",
            {"kong_metering.app", "requests", "uvloop", "prometheus_client"},
        ),
        (
            "from kong_metering.commands.main import program; program(['spool', 'status'], standalone_mode=False)",
            {"kong_metering.commands.deliver", "requests", "pydantic"},
        ),
        ("import kong_metering.app", {"kong_metering.watching.watcher", "prometheus_client"}),
    ],
    ids=["the dump, which Kong waits for", "a look at the spool", "a server that nobody watches"],
)
def test_a_start_imports_what_it_needs(call: str, needless: set[str]) -> None:
    told = f"import contextlib, sys\nwith contextlib.suppress(Exception):\n    {call}\nprint('\\n', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    imported = set(done.stdout.splitlines()[-1].split())
    assert "kong_metering.errors" in imported
    assert needless & imported == set()
