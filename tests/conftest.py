"""What all tests share."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gateway",
        choices=["standin", "kong"],
        default="standin",
        help="what the end-to-end tests run on: the stand-in, or the real Kong on the PATH",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "e2e: goes through a whole gateway; runs on a real Kong too")
