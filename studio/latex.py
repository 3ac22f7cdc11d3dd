"""A figure's numbers as a LaTeX table with the rules of the booktabs package; every text is escaped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from studio.types import Figure

MOST_COLUMNS = 8  # of a heat map as a matrix; a wider one is a list of its cells
MOST_ROWS = 45  # of one page; a longer table breaks over pages
_SIGNS = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"},
    **{"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", '"': "{''}", "–": "--", "—": "---"},
    **{"“": "``", "”": "''", "’": "'", "…": "\\ldots{}", "×": "$\\times$", "±": "$\\pm$", "−": "$-$"},
}
Table = tuple[list[str], list[list[str]]]  # titles and cells, written for LaTeX


def escaped(text: str) -> str:
    """A text that LaTeX prints as it is, on one line."""
    return "".join(_SIGNS.get(c, c if c.isprintable() else " ") for c in str(text))


def written(value: float) -> str:
    """A number with three significant digits, in mathematics; a dash for NaN."""
    if value is None or not math.isfinite(value):
        return "--"
    digits, _, power = f"{value:.3g}".partition("e")
    return f"${digits}" + (f" \\times 10^{{{int(power)}}}" if power else "") + "$"


def latex(figure: Figure, name: str, note: str = "") -> str | None:
    """The table, `name` being its label; the note stands in a comment of its first line. None for a figure of
    images."""
    if figure.kind not in _ROWS:
        return None
    titles, rows = _ROWS[figure.kind](figure.data)
    long = len(rows) > MOST_ROWS
    columns = "l" * len(titles)
    if rows and figure.kind != "table":
        columns = "".join("r" if _numeric(r[i] for r in rows) else "l" for i in range(len(titles)))
    caption = f"\\caption{{{escaped(' '.join(filter(None, (figure.title, figure.caption))))}}}"
    label = f"\\label{{tab:{name}}}"
    head = ["\\toprule", " & ".join(titles) + " \\\\", "\\midrule"]
    body = [" & ".join(row) + " \\\\" for row in rows]
    needs = "booktabs and longtable" if long else "booktabs"
    lines = [*([f"% locus: {note}"] if note else []), f"% needs the packages {needs}"]
    if long:
        lines += [f"\\begin{{longtable}}{{{columns}}}", f"{caption}{label} \\\\", *head, "\\endhead"]
        lines += [*body, "\\bottomrule", "\\end{longtable}"]
    else:
        lines += ["\\begin{table}", "\\centering", caption, label, f"\\begin{{tabular}}{{{columns}}}", *head]
        lines += [*body, "\\bottomrule", "\\end{tabular}", "\\end{table}"]
    return "\n".join(lines) + "\n"


def _numeric(cells: Iterator[str]) -> bool:
    return all(c == "--" or c.startswith("$") for c in cells)


def _heat(data: Any) -> Table:
    """A matrix, or where it is wide a list of the cells that have a value."""
    values = np.asarray(data["values"], float)
    rows, cols = ([escaped(t) for t in data[k]] for k in ("rows", "cols"))
    unit = escaped(data.get("unit") or "value")
    titles = [escaped(data.get(k) or "") for k in ("row_title", "col_title")]
    if values.shape[1] <= MOST_COLUMNS:
        cells = [[row, *map(written, line)] for row, line in zip(rows, values, strict=True)]
        return [titles[0] or unit, *cols], cells
    names = data.get("names")
    cells = [
        [rows[r], escaped(names[r][c]) if names else cols[c], written(values[r, c])]
        for r, c in itertools.product(*map(range, values.shape))
        if math.isfinite(values[r, c])
    ]
    return [titles[0], titles[1] or "place", unit], cells


def _bars(data: Any) -> Table:
    errors = data.get("errors")
    known = errors is not None and np.isfinite(np.asarray(errors, float)).any()
    titles = [escaped(data.get("label_title") or ""), escaped(data.get("unit") or "value")]
    cells = [[escaped(label), written(v)] for label, v in zip(data["labels"], data["values"], strict=True)]
    if known:
        titles.append("standard error")
        cells = [[*row, written(e)] for row, e in zip(cells, np.asarray(errors, float), strict=True)]
    cells += [
        [escaped(name), written(value), *(["--"] if known else [])] for name, value in data.get("lines", ())
    ]
    return titles, cells


def _curve(data: Any) -> Table:
    labelled = any(any(s["labels"]) for s in data["series"])
    titles = ["series", escaped(data["x_title"]), escaped(data["y_title"]), *(["label"] if labelled else [])]
    cells = [
        [escaped(s["name"]), written(float(x)), written(float(y)), *([escaped(label)] if labelled else [])]
        for s in data["series"]
        for x, y, label in zip(s["x"], s["y"], s["labels"], strict=True)
    ]
    cells += [
        [escaped(name), "--", written(float(y)), *([""] if labelled else [])]
        for name, y in data.get("lines", ())
    ]
    return titles, cells


def _table(data: Any) -> Table:
    return [escaped(c) for c in data["columns"]], [[escaped(c) for c in row] for row in data["rows"]]


_ROWS: dict[str, Callable[[Any], Table]] = {"heat": _heat, "bars": _bars, "curve": _curve, "table": _table}
