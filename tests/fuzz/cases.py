"""What a fuzz target is, and the folder of saved cases.

A case is a JSON object, so that one that was found can be read, kept and changed by hand, and means the same whatever
version of hypothesis runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

CORPUS = Path(__file__).parent / "corpus"

Case = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Something to fuzz.

    `cases` makes inputs and `vary` changes one a little; `check` raises if one of them does what it must not.
    """

    name: str
    cases: SearchStrategy[Case]
    vary: Callable[[Case, Random], Case]
    check: Callable[[Case], None]


def saved(target: str) -> Iterator[Path]:
    """Give the saved cases of a target."""
    yield from sorted((CORPUS / target).glob("*.json"))


def load(path: Path) -> Case:
    case: Case = json.loads(path.read_text("ascii"))
    return case


def save(target: str, case: Case) -> Path:
    """Keep a case, under a name made of what is in it."""
    text = json.dumps(case, indent=1)
    path = CORPUS / target / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", "ascii")
    return path
