"""What was logged, kept for a test to look at."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field


@dataclass
class LogLines(logging.Handler):
    """What the package logged, as pairs of level and text."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(logging.DEBUG)

    __hash__ = logging.Handler.__hash__

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))

    def with_text(self, text: str) -> list[tuple[str, str]]:
        return [line for line in self.lines if text in line[1]]
