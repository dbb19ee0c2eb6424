"""The modules import each other in one direction only, for the type checker too."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import kong_metering

ROOT = Path(kong_metering.__file__).parent


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
