"""The page of the docs that shows a benchmark: what it says of rows, of failures, and of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from studio import bench_page
from studio.errors import RequestError


def record(*rows: tuple[str, Any, Any, str]) -> dict[str, Any]:
    """A benchmark's record of rows (name, bar, holds, how)."""
    results = [{"name": n, "value": 1.5, "unit": "x", "bar": b, "holds": h, "how": w} for n, b, h, w in rows]
    return {"host": {"device": "cpu", "threads": 1, "versions": {"torch": "2"}}, "results": results}


def test_the_page_says_what_is_reached_and_what_is_not() -> None:
    rows = (
        ("a", 2.0, False, "at least the bar; of 3|4"),
        ("b", 2.0, True, "at most the bar; timed"),
        ("growth: c in n", None, None, "fitted; twice"),
        ("d", None, None, "seen"),
    )
    made = bench_page.page(record(*rows), "The machine was busy.")
    assert (
        made.startswith("# What it costs") and "Machine: device cpu, threads 1. The machine was busy." in made
    )
    assert "Not reached in this run: a." in made
    assert "| a | 1.5 x | at least 2, **not reached** | of 3\\|4 |" in made
    assert "| b | 1.5 x | at most 2, reached | timed |" in made
    assert "## How costs grow" in made and "| c in n | 1.5 x | fitted; twice |" in made
    assert "## More figures" in made and "| d | 1.5 x | seen |" in made and "## Memory" not in made
    assert "All are reached." in bench_page.page(record(rows[1]))
    assert "asked for\n" not in bench_page.page(record(rows[3])) and "Failed" not in made
    broken = record(*rows) | {"failed": [{"name": "real-sd1", "error": "Memory ran out."}]}
    assert "## Failed in this run\n\n- real-sd1: Memory ran out.\n" in bench_page.page(broken)


def test_the_page_is_made_from_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    one.write_text(json.dumps(record(("a", 1.0, True, "x"))))
    two.write_text(json.dumps(record(("d", None, None, "y")) | {"failed": [{"name": "e", "error": "No."}]}))
    assert bench_page.main([str(one), str(two), "--note", "Busy."]) == 0
    made = capsys.readouterr().out
    assert "| a |" in made and "| d |" in made and "Busy." in made and "- e: No." in made
    for words, sentence in (
        ([], "Which file"),
        ([str(tmp_path / "none.json")], "none.json is not the file of a benchmark .FileNotFoundError"),
        ([str(one), "--note"], "--note needs a sentence"),
    ):
        with pytest.raises(RequestError, match=sentence):
            bench_page.main(words)
    other = tmp_path / "3.json"
    other.write_text(json.dumps(record() | {"host": {"device": "cuda"}}))
    with pytest.raises(RequestError, match="was measured on another machine"):
        bench_page.main([str(one), str(other)])


def test_the_page_of_the_docs_is_one_of_these() -> None:
    shown = (Path(bench_page.__file__).parents[1] / "assets" / "docs" / "benchmark.md").read_text("utf-8")
    assert shown.startswith(bench_page.HEAD) and "| locus --help |" in shown
    assert sum(f"## {title}\n" in shown for title, _ in bench_page.SECTIONS.values()) >= 3
