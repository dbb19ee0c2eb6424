"""The page that the benchmark writes."""

from __future__ import annotations

from pathlib import Path

from gateway_paper import Grid, Paper, markdown_table

GRID = Grid(["server", "µs"], [["ours | theirs", "1,000"]])


def test_a_table_has_its_figures_on_the_right() -> None:
    assert markdown_table(GRID) == "| server | µs |\n| --- | ---: |\n| ours \\| theirs | 1,000 |"


def test_a_page_holds_what_was_added_in_order(tmp_path: Path) -> None:
    paper = Paper()
    paper.heading("Side by side")
    paper.text("Medians [of] rounds.")
    paper.items(["one", "two"])
    paper.grid(GRID)
    paper.write(tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page == f"### Side by side\n\nMedians [of] rounds.\n\n- one\n- two\n\n{markdown_table(GRID)}\n"
