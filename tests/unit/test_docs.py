"""The documentation says what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest

from kong_metering.reference import configuration_page

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])


def test_the_configuration_page_is_the_one_that_the_declaration_gives() -> None:
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run: python -m kong_metering.reference > docs/configuration.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [part.partition(")")[0].partition("#")[0] for part in text.split("](")[1:]]
    missing = [target for target in targets if "://" not in target and target and not (page.parent / target).exists()]
    assert missing == []
