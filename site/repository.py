"""Hook of MkDocs: the site's files are the repository's, at the places that they have there.

So a link works in the site as it does on GitHub, and MkDocs checks each. README is the front page; the pages of docs/
and what they link to follow from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

_LINK = re.compile(r"\]\(([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the theme's files and the repository's that belong to the site."""
    root = Path(config.config_file_path).parent
    docs = Path(config.docs_dir)
    begin = [root / "README.md", *docs.glob("*.md"), *(root / path for path in config.extra_css)]
    ours = [_file(path.relative_to(root), root, config) for path in sorted(_with_what_is_linked(begin, root))]
    return Files([*(file for file in files if file.src_dir != config.docs_dir), *ours])


def _with_what_is_linked(begin: list[Path], root: Path) -> set[Path]:
    found, left = set(begin), list(begin)
    while left:
        new = set(_linked(left.pop(), root)) - found
        found |= new
        left += new
    return found


def _linked(page: Path, root: Path) -> Iterator[Path]:
    if page.suffix != ".md":
        return
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        if path.is_file() and path.is_relative_to(root):
            yield path


def _file(path: Path, root: Path, config: MkDocsConfig) -> File:
    return File(path.as_posix(), str(root), config.site_dir, use_directory_urls=config.use_directory_urls)
