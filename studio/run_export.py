"""A run in the formats that papers and other programs take; every file carries the recipe.

Figures (SVG, PNG, PDF), the numbers as CSV, the figure's numbers as a LaTeX table, the method's papers as
BibTeX, a notebook that repeats the run, the recipe alone, and the whole run as a zip.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from studio import figures
from studio.citations import bibtex, papers_of
from studio.errors import RequestError
from studio.exports import to_zip, write_file
from studio.latex import latex
from studio.notebook import notebook
from studio.recipes import as_text, carried
from studio.registry import Method, find_method
from studio.store import read_run
from studio.types import Figure, Run
from studio.zip_import import run_files

QUICK = ("svg", "png", "pdf", "csv", "zip")
MORE = ("tex", "bib", "ipynb", "json")
KINDS = {
    "svg": "figure",
    "png": "figure",
    "pdf": "figure",
    "csv": "numbers",
    "zip": "the whole run",
    "tex": "LaTeX table",
    "bib": "BibTeX of the method's papers",
    "ipynb": "notebook that repeats the run",
    "json": "recipe",
}
MISSING = {
    **dict.fromkeys(figures.FORMATS, "its figure can't be drawn"),
    "csv": "it holds no numbers beside its images",
    "tex": "its figure is no map, bars, curves or table",
    "bib": "its method comes from no paper",
    "ipynb": "this version does not know its method",
}
LEAST_DPI, MOST_DPI = 30, 2400


def export(
    folder: Path,
    target: Path,
    kinds: Sequence[str] = QUICK,
    *,
    dpi: int = figures.DPI,
    scale: tuple[float, float] | None = None,
) -> dict[str, Path]:
    """Writes a run's files of these kinds into `target`; {kind: file}, without kinds that the run has not
    (MISSING says why). `dpi` is that of the PNG; `scale` is (low, high) of a heat map's colours.

    RequestError for a damaged run, StudioError when a file can't be written.
    """
    source = _Source(folder, read_run(folder), dpi, scale)
    files: dict[str, Path] = {}
    for kind in kinds:
        fine = f"-{dpi}dpi" if kind == "png" and dpi != figures.DPI else ""
        path = target / f"{folder.name}{fine}.{kind}"
        if kind == "zip":
            files[kind] = to_zip(folder, path, also=_edits(source.run), only=run_files(folder))
        elif content := (_figure(source, kind) if kind in figures.FORMATS else _MAKERS[kind](source)):
            write_file(path, content if isinstance(content, bytes) else content.encode())
            files[kind] = path
    return files


def read_kinds(text: str) -> tuple[str, ...]:
    """The kinds of "svg,png"; RequestError for one that is not known, or none."""
    kinds = tuple(dict.fromkeys(k.strip().lower().lstrip(".") for k in text.split(",") if k.strip()))
    if wrong := [k for k in kinds if k not in KINDS]:
        raise RequestError(f"There is no format {wrong[0][:20]!r}; formats are {', '.join(KINDS)}.")
    if not kinds:
        raise RequestError(f"No format is given; formats are {', '.join(KINDS)}.")
    return kinds


def read_dpi(value: Any) -> int:
    """Dots per inch from a text or a number; RequestError when it is out of range."""
    text = str(value).strip()
    if not text.isdecimal() or not LEAST_DPI <= int(text) <= MOST_DPI:
        raise RequestError(
            f"Dots per inch must be a whole number from {LEAST_DPI} to {MOST_DPI}, not {text[:20]!r}."
        )
    return int(text)


@dataclass(frozen=True)
class _Source:
    """A run and how it is to be drawn."""

    folder: Path
    run: Run
    dpi: int
    scale: tuple[float, float] | None

    @cached_property
    def note(self) -> Mapping[str, Any]:
        """What every file carries."""
        return carried(self.run)

    @cached_property
    def method(self) -> Method | None:
        """The run's method, if this version knows it."""
        try:
            return find_method(self.run.recipe.method)
        except RequestError:
            return None

    @cached_property
    def figure(self) -> Figure | None:
        """The run's figure in the colours asked for, if this version can draw it."""
        try:
            return figures.scaled(self.method.draw(self.run), self.scale) if self.method else None
        except Exception:  # of numbers by another version: the store has its figure
            return None


def _figure(source: _Source, kind: str) -> bytes | None:
    """The figure as it was stored, or drawn anew where the stored one is not what is asked for."""
    stored = source.folder / f"figure.{kind}"
    as_stored = source.scale is None and (kind != "png" or source.dpi == figures.DPI)
    if as_stored and stored.is_file():
        return stored.read_bytes()
    if source.figure is None:
        return None
    return figures.to_bytes(source.figure, kind, source.note, source.dpi)


def _csv(source: _Source) -> str | None:
    text = figures.to_csv(source.run.result.arrays, as_text(source.note))
    return text if text.count("\n") > 1 else None


def _tex(source: _Source) -> str | None:
    return latex(source.figure, source.run.id, as_text(source.note)) if source.figure else None


def _bib(source: _Source) -> str | None:
    papers = papers_of(source.method) if source.method else ()
    return f"% locus: {as_text(source.note)}\n{bibtex(papers)}" if papers else None


def _notebook(source: _Source) -> str | None:
    return notebook(source.run, source.method.title) if source.method else None


def _json(source: _Source) -> str:
    return json.dumps(source.note, indent=1, ensure_ascii=False) + "\n"


_MAKERS: dict[str, Callable[[_Source], str | None]] = {
    "csv": _csv,
    "tex": _tex,
    "bib": _bib,
    "ipynb": _notebook,
    "json": _json,
}


def _edits(run: Run) -> dict[str, Path]:
    """{name in the zip: file} of the edits that were laid over the model, where the files are still those."""
    found = {}
    for entry, digest in zip(run.recipe.edits, run.host.get("edits") or (), strict=False):
        file = Path(entry if os.path.isfile(entry) else entry.rpartition("@")[0])
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest:
            found[f"edits/{digest}.safetensors"] = file
    return found
