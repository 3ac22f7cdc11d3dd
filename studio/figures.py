"""Figures as data, drawn by Matplotlib to SVG, PNG and PDF, and their numbers as CSV.

Colours are those of palette.py, which the screen shows too.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.palette import EMPTY, NEGATIVE, NEUTRAL, POSITIVE, SERIES, SHADES, scale_limit, scale_of, shade
from studio.types import Figure, Trace

FORMATS = ("svg", "png", "pdf")
__all__ = ["EMPTY", "NEGATIVE", "NEUTRAL", "POSITIVE", "scale_limit"]  # also from here
_TURN = threading.Lock()  # matplotlib's settings are those of the whole process
DPI = 150
MOST_PIXELS = 89_000_000  # of a PNG; image libraries take more for an attack


def number(value: float) -> str:
    """A number with three significant digits; an en dash for NaN."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"


def scaled(figure: Figure, scale: tuple[float, float] | None) -> Figure:
    """The figure with the colours of its heat map running from low to high; other figures as they are."""
    if scale is None or figure.kind != "heat":
        return figure
    return replace(figure, data={**figure.data, "scale": tuple(scale)})


def to_bytes(figure: Figure, kind: str, recipe: Mapping[str, Any] | None = None, dpi: int = DPI) -> bytes:
    """The figure as svg, png or pdf (fonts embedded); the recipe goes into its metadata. RequestError for a
    PNG of more than MOST_PIXELS."""
    import matplotlib

    matplotlib.use("agg", force=False)
    note = json.dumps(recipe, sort_keys=True) if recipe else ""
    metadata = {
        "png": {"Description": note},
        "svg": {"Description": note, "Date": None},
        "pdf": {"Subject": note, "CreationDate": None},
    }[kind]
    style = {"pdf.fonttype": 42, "svg.hashsalt": "locus", "font.size": 9, "text.parse_math": False}
    with _TURN, warnings.catch_warnings(), matplotlib.rc_context(style):
        warnings.filterwarnings("ignore", "Glyph")  # a sign that the font lacks is drawn as a box
        drawn = _DRAWERS[figure.kind](figure)
        if kind == "png":
            _check_pixels(*drawn.get_size_inches(), dpi)
        out = io.BytesIO()
        drawn.savefig(out, format=kind, dpi=dpi, metadata=metadata)
    return out.getvalue()


def _check_pixels(width: float, height: float, dpi: int) -> None:
    most = int(math.sqrt(MOST_PIXELS / (width * height)))
    if dpi > most:
        raise RequestError(
            f"At {dpi} dots per inch this figure would have {width * height * dpi**2 / 1e6:.0f} million "
            f"pixels; take at most {most}, or SVG or PDF, which have no pixels."
        )


def image_bytes(pixels: np.ndarray, note: str = "") -> bytes:
    """An image (H, W, 3) uint8 as PNG, with a text in its metadata."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    said, out = PngInfo(), io.BytesIO()
    if note:
        said.add_text("Description", note, zip=4096 < len(note) <= 2**20)  # readers unpack no more than that
    Image.fromarray(pixels).save(out, "png", pnginfo=said)
    return out.getvalue()


def _canvas(width: float, height: float, figure: Figure) -> Any:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(min(width, 40), min(height, 60)), layout="constrained")
    if figure.title:
        # our own line breaks: matplotlib's wrap=True reads dollar signs as mathematics in spite of the style
        title = textwrap.fill(_short(figure.title, 160), max(24, int(min(width, 40) * 12)))
        canvas.suptitle(title, fontsize=10)
    if figure.caption:
        said = textwrap.fill(_short(figure.caption, 300), max(36, int(min(width, 40) * 15)))
        canvas.supxlabel(said, fontsize=7, x=0.01, ha="left")
    return canvas


def _palette() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(SHADES, "locus").with_extremes(bad=EMPTY)


def _heat(figure: Figure) -> Any:
    """data: rows, cols (labels), values (rows, cols), unit, and optionally row_title, col_title, scale ((low,
    high) of the colours)."""
    data = figure.data
    values = np.asarray(data["values"], float)
    tall, wide = values.shape
    rows, cols = [_short(r, 60) for r in data["rows"]], [_short(c, 24) for c in data["cols"]]
    canvas = _canvas(2.8 + 0.42 * wide + 0.06 * max(map(len, rows), default=0), 1.9 + 0.34 * tall, figure)
    axes = canvas.subplots()
    low, high = scale_of(data)
    limit = max(abs(low), abs(high))
    look = dict(cmap=_palette(), vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.imshow(np.ma.masked_invalid(np.clip(values, low, high)), **look)
    axes.set_xticks(range(wide), cols, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(tall), rows, fontsize=8)
    axes.set_xlabel(_short(data.get("col_title", ""), 80))
    axes.set_ylabel(_short(data.get("row_title", ""), 80))
    if wide * tall <= 400:
        for r, c in itertools.product(range(tall), range(wide)):
            if math.isfinite(values[r, c]):
                ink = "white" if abs(np.clip(values[r, c], low, high)) > 0.62 * limit else "black"
                axes.text(
                    c,
                    r,
                    f"{values[r, c]:.2f}".replace("-0.00", "0.00"),
                    ha="center",
                    va="center",
                    fontsize=5.5,
                    color=ink,
                )
    _colour_bar(canvas, axes, values, (low, high)).set_label(_short(data.get("unit", ""), 80))
    return canvas


def _colour_bar(canvas: Any, axes: Any, values: np.ndarray, scale: tuple[float, float]) -> Any:
    """The scale from low to high, with an arrow where values lie beyond an end."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    part = ListedColormap([shade(float(v), scale) for v in np.linspace(*scale, len(SHADES))])
    below, above = bool((values < scale[0]).any()), bool((values > scale[1]).any())
    ends = ("both" if above else "min") if below else "max" if above else "neither"
    shown = ScalarMappable(Normalize(*scale), part)
    return canvas.colorbar(shown, ax=axes, fraction=0.04, extend=ends)


def _strip(figure: Figure) -> Any:
    """data: images (rows of lists of (H, W, 3) uint8), rows, cols (labels)."""
    rows = figure.data["images"]
    wide = max(len(r) for r in rows)
    canvas = _canvas(0.6 + 1.5 * wide, 0.5 + 1.6 * len(rows), figure)
    grid = canvas.subplots(len(rows), wide, squeeze=False)
    for r, c in itertools.product(range(len(rows)), range(wide)):
        axes = grid[r][c]
        axes.set_xticks([])
        axes.set_yticks([])
        if c < len(rows[r]):
            axes.imshow(rows[r][c], interpolation="nearest")
        else:
            axes.axis("off")
        if r == 0:
            axes.set_title(_short(figure.data["cols"][c]), fontsize=7)
        if c == 0:
            name = textwrap.fill(_short(figure.data["rows"][r]), 20)
            axes.set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
    return canvas


def _bars(figure: Figure) -> Any:
    """data: labels, values, errors (standard errors; NaN or None: none), lines ((name, value), drawn across),
    unit, and optionally label_title. A value that is NaN leaves its place empty."""
    data = figure.data
    values = np.asarray(data["values"], float)
    errors = np.full(len(values), np.nan) if data.get("errors") is None else np.asarray(data["errors"], float)
    labels = [_short(label, 24) for label in data["labels"]]
    canvas = _canvas(2.4 + 0.24 * len(values), 3.4 + 0.05 * max(map(len, labels), default=0), figure)
    axes = canvas.subplots()
    places = np.flatnonzero(np.isfinite(values))
    colours = [POSITIVE if values[i] >= 0 else NEGATIVE for i in places]
    axes.bar(places, values[places], 0.8, color=colours)
    known = places[np.isfinite(errors[places])]
    axes.errorbar(known, values[known], errors[known], fmt="none", ecolor="black", elinewidth=0.9, capsize=2)
    axes.axhline(0, color="black", linewidth=0.8)
    names = list(dict.fromkeys(name for name, _ in data.get("lines", ())))
    for name, value in data.get("lines", ()):
        if math.isfinite(value):
            style = ("--", ":", "-.", (0, (5, 1)))[names.index(name) % 4]
            axes.axhline(value, color="#3f3f46", linestyle=style, linewidth=1.1, label=_short(name))
    every = max(1, -(-len(labels) // 80))
    axes.set_xticks(range(0, len(labels), every), labels[::every], rotation=60, ha="right", fontsize=7)
    axes.set_xlim(-0.7, max(len(labels), 1) - 0.3)
    axes.set_xlabel(_short(data.get("label_title", ""), 80))
    axes.set_ylabel(textwrap.fill(_short(data.get("unit", ""), 80), 40))
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        canvas.legend(list(handles.values()), list(handles), loc="outside lower right", fontsize=7, ncols=4)
    return canvas


def _curve(figure: Figure) -> Any:
    """data: series ({name, x, y, labels (one a point; "" for none), line (bool: points are joined),
    and optionally low, high: a band shaded behind it}), lines
    ((name, y), drawn across), x_title, y_title, and optionally whole (bool: x are whole numbers). Points with
    a NaN are left out."""
    data = figure.data
    canvas = _canvas(5.6, 4.6, figure)
    axes = canvas.subplots()
    colours = itertools.cycle(SERIES)
    for series, colour in zip(data["series"], colours, strict=False):
        x, y = np.asarray(series["x"], float), np.asarray(series["y"], float)
        known = np.isfinite(x) & np.isfinite(y)
        look = {
            "linestyle": "-" if series["line"] else "none",
            "marker": "o",
            "markersize": 4,
            "color": colour,
        }
        axes.plot(x[known], y[known], label=_short(series["name"]), **look)
        if "low" in series:
            axes.fill_between(x, series["low"], series["high"], color=colour, alpha=0.14, linewidth=0)
        for i in np.flatnonzero(known):
            if series["labels"][i]:
                at = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 7, "color": colour}
                axes.annotate(_short(series["labels"][i], 24), (x[i], y[i]), **at)
    for (name, value), style in zip(
        data.get("lines", ()), itertools.cycle(("--", ":", "-.", (0, (5, 1)))), strict=False
    ):
        if math.isfinite(value):
            axes.axhline(value, color="#3f3f46", linestyle=style, linewidth=1.1, label=_short(name))
    axes.axhline(0, color="black", linewidth=0.6)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.xaxis.get_major_locator().set_params(integer=bool(data.get("whole")))
    axes.set_xlabel(textwrap.fill(_short(data["x_title"], 120), 70))
    axes.set_ylabel(textwrap.fill(_short(data["y_title"], 80), 50))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=7)
    return canvas


def _table(figure: Figure) -> Any:
    """data: columns (titles), rows (lists of short texts). At most 60 rows are drawn; arrays hold all."""
    columns, rows = figure.data["columns"], [list(row) for row in figure.data["rows"]]
    drawn = rows[:60] + [["…"] * len(columns)] * (len(rows) > 60)
    cells = [[_short(str(cell), 48) for cell in row] for row in drawn]
    titles = [_short(str(c), 48) for c in columns]
    widths = [max(map(len, column)) + 2 for column in zip(titles, *cells, strict=True)]
    canvas = _canvas(0.8 + 0.075 * sum(widths), 1.1 + 0.2 * (1 + len(cells)), figure)
    axes = canvas.subplots()
    axes.axis("off")
    if not cells:
        return canvas
    shares = [w / sum(widths) for w in widths]
    table = axes.table(
        cellText=cells, colLabels=titles, colWidths=shares, cellLoc="left", bbox=(0.0, 0.0, 1.0, 1.0)
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor(EMPTY)
        cell.set_facecolor(EMPTY if row == 0 else "white")
    return canvas


def _short(text: str, most: int = 38) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)  # control signs would break an SVG
    return text if len(text) <= most else text[: most - 1] + "…"


_DRAWERS: dict[str, Callable[[Figure], Any]] = {
    "heat": _heat,
    "strip": _strip,
    "bars": _bars,
    "curve": _curve,
    "table": _table,
}


def to_csv(arrays: Mapping[str, Trace], note: str = "") -> str:
    """All arrays as one table: array, the labels of its axes as name=label, value, unit. Image arrays are
    left out. A note stands in a last column, `recipe`, of the first row alone."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["array", "place", "value", "unit", *(["recipe"] if note else [])])
    for i, row in enumerate(_numbers(arrays)):
        writer.writerow([*row, *(["" if i else note] if note else [])])
    return out.getvalue()


def _numbers(arrays: Mapping[str, Trace]) -> Iterator[list[str]]:
    """[array, place, value, unit] of every number."""
    for name, trace in arrays.items():
        if trace.values.dtype == np.uint8:
            continue
        for index in np.ndindex(trace.values.shape):
            place = "; ".join(f"{a.name}={a.labels[i]}" for a, i in zip(trace.axes, index, strict=True))
            yield [harmless(name), harmless(place), f"{float(trace.values[index]):.9g}", harmless(trace.unit)]


def harmless(text: str) -> str:
    """A text that a spreadsheet won't take for a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text
