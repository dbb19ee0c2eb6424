"""The site that `make docs` builds: strictly, with what GitHub shows, and with nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from tests.support.plugin_server import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install -e '.[docs]'"
)

PAGES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md", *ROOT.glob("docs/*.md"))
)
# What a reader sees at once when it is not what GitHub makes of the same text.
_COUNTED = {"h1", "h2", "h3", "h4", "ul", "ol", "li", "table", "tr", "pre", "code", "strong"}


class Parts(HTMLParser):
    """Counts the tags of a page's text, and collects what the page loads."""

    def __init__(self, page: str, *, is_whole: bool) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.loaded: list[str] = []
        self._is_text = not is_whole
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_text |= tag == "article"
        if self._is_text and tag in _COUNTED:
            self.tags[tag] += 1
        if tag != "a":
            self.loaded += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag: str) -> None:
        self._is_text &= tag != "article"


def build(configuration: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--config-file",
        str(configuration),
        "--site-dir",
        str(directory),
    ]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=150)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", directory)
    assert done.returncode == 0, done.stderr
    return directory


def built(site: Path, page: Path) -> str:
    name = page.with_suffix(".html") if page.name != "README.md" else page.with_name("index.html")
    return (site / name).read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_has_the_parts_that_github_shows(site: Path, page: Path) -> None:
    github = MarkdownIt("commonmark").enable("table").render((ROOT / page).read_text("utf-8"))
    assert Parts(built(site, page), is_whole=True).tags == Parts(github, is_whole=False).tags


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_loads_nothing_from_elsewhere(site: Path, page: Path) -> None:
    loaded = Parts(built(site, page), is_whole=True).loaded
    assert loaded
    assert [address for address in loaded if "//" in address] == []


def test_what_pages_link_to_is_in_the_site_as_it_is_in_the_repository(site: Path) -> None:
    for path in ("LICENSE", "kong.conf.example", "examples/deck/kong.yaml", "monitoring/alerts.yaml"):
        assert (site / path).read_bytes() == (ROOT / path).read_bytes()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[good](docs/page.md#a-heading) [file](data.yaml)", ""),
        ("[no page](docs/pages.md)", "docs/pages.md"),
        ("[no anchor](docs/page.md#a-header)", "#a-header"),
        ("[no file](data.json)", "data.json"),
    ],
)
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path, text: str, complaint: str) -> None:
    """The hook and the configuration are ours, the pages are not."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# Page\n\n## A heading\n")
    (tmp_path / "data.yaml").write_text("a: 1\n")
    (tmp_path / "README.md").write_text(f"# Front\n\n{text}\n")
    own = {
        "INHERIT": str(ROOT / "mkdocs.yml"),
        "hooks": [str(ROOT / "site" / "repository.py")],
        "nav": ["README.md", "docs/page.md"],
        "extra_css": [],
    }
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(own))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert (done.returncode == 0) == (not complaint), done.stderr
    assert complaint in done.stderr
