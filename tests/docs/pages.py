"""The pages of the documentation, and their blocks of commands."""

from __future__ import annotations

from tests.docs.shell import blocks
from tests.support.plugin_server import ROOT

PAGES = [
    *sorted([ROOT / "README.md", ROOT / "sandbox" / "README.md", *ROOT.glob("examples/**/README.md")]),
    *sorted(ROOT.glob("docs/*.md")),
]
BLOCKS = [block for page in PAGES for block in blocks(page, ROOT)]
