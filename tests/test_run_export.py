"""A run as LaTeX, BibTeX, notebook and recipe beside its figures and numbers."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from studio import palette
from studio.citations import PAPERS, bibtex, papers_of
from studio.errors import RequestError, StudioError
from studio.latex import MOST_ROWS, escaped, latex, written
from studio.notebook import notebook
from studio.registry import load_methods
from studio.run_export import KINDS, MORE, QUICK, export, read_dpi, read_kinds
from studio.store import Store
from studio.types import Axis, Figure, Recipe, Result, Run, Trace
from tests.made_runs import figure_of, saved, traced


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    store = Store(tmp_path_factory.mktemp("runs"))
    return store.path(saved(store).id)


def test_every_format_is_written_and_named_by_the_run(folder: Path, tmp_path: Path) -> None:
    files = export(folder, tmp_path, tuple(KINDS))
    assert set(files) == set(KINDS) == {*QUICK, *MORE}
    assert {k: f.name for k, f in files.items()} == {k: f"{folder.name}.{k}" for k in KINDS}
    assert set(tmp_path.iterdir()) == set(files.values())
    assert json.loads(files["json"].read_text("utf-8"))["inputs"] == dict(traced().recipe.inputs)


def test_a_png_at_any_resolution_and_scale(folder: Path, tmp_path: Path) -> None:
    small, large = (export(folder, tmp_path, ("png",), dpi=d)["png"] for d in (150, 300))
    assert large.name == f"{folder.name}-300dpi.png"
    with Image.open(small) as a, Image.open(large) as b:
        assert b.width == pytest.approx(2 * a.width, abs=2)
    assert small.read_bytes() == (folder / "figure.png").read_bytes()
    fixed = export(folder, tmp_path / "fixed", ("png",), scale=(-1.0, 1.0))["png"]
    with Image.open(fixed) as opened:
        colours = {c for _, c in opened.convert("RGB").getcolors(1 << 24)}
    assert tuple(bytes.fromhex(palette.shade(0.2, (-1, 1))[1:])) in colours


def test_what_a_run_has_not_is_left_out(tmp_path: Path) -> None:
    images = Trace(
        np.zeros((1, 1, 4, 4, 3), np.uint8),
        tuple(Axis(n, ("0",)) for n in ("prompt", "seed"))
        + tuple(Axis(n, tuple(map(str, range(k)))) for n, k in (("height", 4), ("width", 4), ("channel", 3))),
    )
    recipe = Recipe("generate", "atlas-sd", {"prompt": ["a star"]}, {}, (0,))
    run = traced(recipe=recipe, result=Result({"images": images}))
    store = Store(tmp_path / "runs")
    kept = store.save(run, figure_of(run))
    files = export(store.path(kept.id), tmp_path / "out", tuple(KINDS))
    assert set(KINDS) - set(files) == {"csv", "tex", "bib"}


def test_a_full_disk_is_said_and_leaves_no_half_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StudioError, match=r"\.tex could not be written: the disk is full\."):
        export(folder, tmp_path, ("tex",))
    monkeypatch.setattr("zipfile.ZipFile.write", full)
    with pytest.raises(StudioError, match=r"\.zip could not be written: the disk is full\."):
        export(folder, tmp_path, ("zip",))
    assert list(tmp_path.iterdir()) == []


def test_formats_and_resolutions_are_read() -> None:
    assert read_kinds("svg, .PNG,svg") == ("svg", "png") and read_dpi("300") == read_dpi(300) == 300
    with pytest.raises(RequestError, match="There is no format 'gif'; formats are svg, png"):
        read_kinds("svg,gif")
    with pytest.raises(RequestError, match="No format is given"):
        read_kinds(" , ")
    for wrong in ("29", "2401", "many", "", "1e3", "-5"):
        with pytest.raises(RequestError, match="must be a whole number from 30 to 2400"):
            read_dpi(wrong)


# ---- LaTeX ------------------------------------------------------------------------------------------------


def bare(text: str) -> str:
    """The text without what LaTeX reads as commands: escapes, commands, braces, mathematics."""
    return re.sub(r"\\[&%$#_{}]|\\[a-zA-Z]+|\\\\|\$[^$]*\$|\{\}|\{''\}", "", text)


def test_a_heat_map_as_a_table() -> None:
    run = traced(id="r1")
    text = latex(figure_of(run), run.id, '{"a": 1}')
    lines = text.splitlines()
    assert lines[:2] == ['% locus: {"a": 1}', "% needs the packages booktabs"]
    assert "\\label{tab:r1}" in lines and lines.index("\\toprule") < lines.index("\\midrule")
    body = lines[lines.index("\\midrule") + 1 : lines.index("\\bottomrule")]
    assert body == ["cross-attention & $0.1$ & $-0.05$ & -- & $0.2$ & $0$ & $1 \\times 10^{-7}$ \\\\"]
    assert "\\begin{tabular}{lrrrrrr}" in lines
    assert not re.search(r"[&%$#_^~<>|\"]", bare("".join(t for t in lines if t.startswith("\\caption"))))


def test_a_wide_map_is_a_list_and_a_long_one_breaks_over_pages() -> None:
    values = np.arange(120, dtype=float).reshape(6, 20)
    values[0, 0] = np.nan
    data = {"rows": [f"r_{i}" for i in range(6)], "cols": [str(i) for i in range(20)], "values": values}
    text = latex(Figure("heat", data | {"unit": "cosine", "col_title": "layer"}), "x")
    assert text.count("r\\_") == 119 > MOST_ROWS
    assert "\\begin{longtable}{llr}" in text and "longtable" in text.splitlines()[0]
    assert "r\\_5 & 19 & $119$ \\\\" in text


def test_bars_curves_and_tables_as_tables() -> None:
    bars = {"labels": ["a_b", "c"], "values": [0.5, np.nan], "errors": [0.1, np.nan], "unit": "x"}
    text = latex(Figure("bars", bars | {"lines": [("all", 0.25)]}), "b")
    assert "a\\_b & $0.5$ & $0.1$ \\\\\nc & -- & -- \\\\\nall & $0.25$ & -- \\\\" in text
    series = [{"name": "s", "x": [0, 1], "y": [1.0, np.nan], "labels": ["", "one"], "line": True}]
    text = latex(Figure("curve", {"series": series, "x_title": "k", "y_title": "v", "lines": []}), "c")
    assert "s & $0$ & $1$ &  \\\\\ns & $1$ & -- & one \\\\" in text
    text = latex(Figure("table", {"columns": ["a&b"], "rows": [["50%"]]}), "t")
    assert "a\\&b \\\\" in text and "50\\% \\\\" in text
    assert latex(Figure("strip", {"images": [[]], "rows": [], "cols": []}), "s") is None


@pytest.mark.parametrize("text", [*'&%$#_{}~^\\<>|"', "\\input{/etc/passwd}", "a\nb\x07", "%comment", "$x$"])
def test_no_text_is_read_as_a_command(text: str) -> None:
    assert not set(bare(escaped(text))) & set('&%$#_{}~^\\<>|"\n\x07')


def test_numbers_are_written() -> None:
    assert [written(v) for v in (0.12345, -1.0, 1e-7, 3e9, float("nan"), None)] == [
        "$0.123$", "$-1$", "$1 \\times 10^{-7}$", "$3 \\times 10^{9}$", "--", "--",
    ]  # fmt: skip


# ---- BibTeX -----------------------------------------------------------------------------------------------


def test_every_method_with_a_paper_has_its_entries() -> None:
    for method in load_methods().values():
        papers = papers_of(method)
        assert bool(papers) == bool(method.paper), method.name
        text = bibtex(papers)
        assert text.count("@misc{") == len(papers) == len(re.findall(r"\d{4}\.\d{5}", method.paper))


def test_entries_are_whole() -> None:
    text = bibtex(tuple(PAPERS.values()))
    keys = re.findall(r"@misc\{([a-z0-9]+),", text)
    assert len(set(keys)) == len(PAPERS) and text.isascii() and "Materzy{\\'n}ska, Joanna" in text
    for entry in text.split("\n\n"):
        assert entry.count("{") == entry.count("}")
        assert all(f"  {field} = {{" in entry for field in ("author", "title", "year", "eprint", "url"))
    assert "author = {Meng, Kevin and Bau, David and Andonian, Alex and Belinkov, Yonatan}" in text
    for number, paper in PAPERS.items():  # arXiv numbers begin with year and month
        assert paper.arxiv == number and number.startswith(str(paper.year)[2:])


# ---- the notebook -----------------------------------------------------------------------------------------


def cells(text: str) -> list[str]:
    """The code of a notebook, which must be a valid one."""
    import nbformat

    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def language_run(session: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A real run of a second."""
    prompt = {"context": "The capital of Arvonia is Quill.", "prompt": "The capital of Arvonia is"}
    recipe = Recipe("contributions", "atlas-llama", prompt)
    return session.run(recipe, fresh=True, out=tmp_path_factory.mktemp("run") / "run")


def test_a_notebook_repeats_the_run_and_compares(language_run: Run, capsys: Any) -> None:
    text = notebook(language_run, "Contributions")
    start, numbers, draw = cells(text)
    room: dict[str, Any] = {}
    exec(compile(start, "start", "exec"), room)
    exec(compile(numbers, "numbers", "exec"), room)
    assert set(room["differences"]) == set(language_run.result.arrays)
    assert set(room["differences"].values()) == {0.0} and "bit for bit" in capsys.readouterr().out
    *first, last = draw.splitlines()
    exec("\n".join(first), room)
    assert eval(last, room).format == "PNG"
    changed = room["run"].result.arrays["contribution"].values
    changed += 0.25
    exec(numbers, room)
    assert room["differences"]["contribution"] == pytest.approx(0.25, abs=1e-5)
    assert "contribution" in capsys.readouterr().out


def test_what_a_person_wrote_stands_in_code_alone() -> None:
    evil = '![x](http://example.com/a.png) """ \\ {prompt} \'); import os'
    run = traced(id="r](x)", host={"device": "<img>"})
    run = replace(run, recipe=replace(run.recipe, inputs={"prompt": evil, "subject": "x"}))
    text = notebook(run, "A title")
    code = cells(text)
    said = json.loads(text)["cells"][0]["source"]
    assert "example.com" not in said and "](" not in said and "<img" not in said
    room: dict[str, Any] = {}
    exec(code[0].split("session =")[0], room)
    assert room["recipe"] == run.recipe


def test_large_arrays_are_compared_by_their_sha256(monkeypatch: pytest.MonkeyPatch) -> None:
    run = traced(id="r")
    monkeypatch.setattr("studio.notebook.MOST_BYTES", 30)
    numbers = cells(notebook(run, "t"))[1]
    room: dict[str, Any] = {"run": run}
    exec(numbers, room)
    assert set(room["differences"].values()) == {0.0} and list(room["numbers"]) == ["clean"]
    arrays = dict(run.result.arrays)
    effect = arrays["indirect_effect"]
    arrays["indirect_effect"] = replace(effect, values=effect.values + 1)
    room["run"] = replace(run, result=replace(run.result, arrays=arrays))
    exec(numbers, room)
    assert room["differences"] == {"indirect_effect": None, "indirect_effect_sem": 0.0, "clean": 0.0}
