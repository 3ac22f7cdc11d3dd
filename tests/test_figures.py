"""Figures as files that other programs can open, with the recipe inside, and numbers as a table."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from PIL import Image

from studio import figures, palette
from studio.errors import RequestError
from studio.types import Axis, Figure, Trace

RECIPE = {"method": "generate", "inputs": {"prompt": 'a "red" <star> & größer'}}


def heat(**changes: Any) -> Figure:
    """Two rows by two columns, one cell missing."""
    data = {"rows": ["a", "b"], "cols": ["0", "1"], "values": np.array([[1.0, math.nan], [-2.0, 0.0]])}
    return Figure("heat", data | {"unit": "cosine"} | changes, title="a map")


def strip() -> Figure:
    """Rows of one and of two images."""
    red, blue = (np.tile(np.array(c, np.uint8), (4, 4, 1)) for c in ((255, 0, 0), (0, 0, 255)))
    data = {"images": [[red], [blue, red]], "rows": ["one", "two"], "cols": ["seed 0", "seed 1"]}
    return Figure("strip", data, title="a strip")


def bars(**changes: Any) -> Figure:
    """Three bars: up, down without a standard error, missing; lines of three names, one without a value."""
    data = {"labels": ["0-1", "1-2", "2-3"], "values": np.array([0.4, -0.2, math.nan])}
    data |= {"errors": np.array([0.1, math.nan, math.nan]), "unit": "decrease of the cosine"}
    data |= {"lines": [("all layers", 0.5), ("placebo", 0.05), ("placebo", -0.05), ("unknown", math.nan)]}
    return Figure("bars", data | changes, title="bars")


def texts(figure: Figure) -> list[str]:
    """What is written in the figure, as the comments that matplotlib leaves in an SVG."""
    return re.findall(r"<!-- (.*?) -->", figures.to_bytes(figure, "svg").decode())


def pixels(figure: Figure) -> set[tuple[int, ...]]:
    """The colours of the figure's PNG."""
    with Image.open(io.BytesIO(figures.to_bytes(figure, "png"))) as opened:
        return {c for _, c in opened.convert("RGB").getcolors(1 << 24)}


def rgb(colour: str) -> tuple[int, ...]:
    """#rrggbb as numbers."""
    return tuple(bytes.fromhex(colour[1:]))


@pytest.mark.parametrize("figure", [heat(), strip(), bars()], ids=lambda f: f.kind)
def test_formats_are_what_they_say(figure: Figure) -> None:
    svg, png, pdf = (figures.to_bytes(figure, kind, RECIPE) for kind in ("svg", "png", "pdf"))
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    with Image.open(io.BytesIO(png)) as opened:
        opened.load()
        assert opened.format == "PNG" and opened.width > 100
    assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF")


def test_png_and_svg_carry_the_recipe() -> None:
    with Image.open(io.BytesIO(figures.to_bytes(heat(), "png", RECIPE))) as opened:
        assert json.loads(opened.info["Description"]) == RECIPE
    root = ElementTree.fromstring(figures.to_bytes(heat(), "svg", RECIPE))
    notes = [e.text for e in root.iter() if e.tag.endswith("}description")]
    assert [json.loads(n) for n in notes] == [RECIPE]


@pytest.mark.parametrize("kind", figures.FORMATS)
def test_the_same_figure_has_the_same_bytes(kind: str) -> None:
    assert figures.to_bytes(heat(), kind, RECIPE) == figures.to_bytes(heat(), kind, RECIPE)


@pytest.mark.parametrize(
    "text", ["\x07 bell \x1b", "<b>&--]]>", "$x_{", "日本語 🦊", "word " * 4000, "x" * 20_000]
)
@pytest.mark.parametrize("kind", ["svg", "png"])
def test_any_text_can_be_drawn(text: str, kind: str) -> None:
    map_ = heat(rows=[text, "b"], cols=[text, "1"], unit=text[:40], row_title=text[:40])
    plot = bars(labels=[text, "b", "c"], lines=[(text, 0.1)], unit=text, label_title=text)
    for figure in (map_, plot):
        drawn = figures.to_bytes(Figure(figure.kind, figure.data, title=text), kind, {"prompt": text})
        if kind == "svg":
            ElementTree.fromstring(drawn)
        else:
            Image.open(io.BytesIO(drawn)).verify()


def test_cells_take_the_ends_of_the_palette_and_missing_ones_are_grey() -> None:
    found = pixels(heat(values=np.array([[2.0, math.nan], [-2.0, 1.0]])))
    assert {rgb(figures.POSITIVE), rgb(figures.NEGATIVE), rgb(figures.EMPTY)} <= found
    assert rgb(figures.EMPTY) not in pixels(heat(values=np.array([[2.0, 0.0], [-2.0, 1.0]])))


def test_a_fixed_scale_gives_a_value_the_same_colour_in_every_map() -> None:
    scale = (-0.5, 2.0)
    one = figures.scaled(heat(values=np.array([[0.4, 0.1], [-0.2, 0.3]])), scale)
    other = figures.scaled(heat(values=np.array([[0.4, 1.9], [-1.0, 5.0]])), scale)
    mine = rgb(palette.shade(0.4, scale))
    assert mine in pixels(one) and mine in pixels(other)
    own = [palette.scale_of(heat(values=np.array(v)).data) for v in ([[0.4, 0.1]], [[0.4, 1.9]])]
    assert palette.shade(0.4, own[0]) != palette.shade(0.4, own[1])
    assert rgb(palette.shade(-9, scale)) in pixels(other) and palette.shade(-9, scale) == palette.shade(
        -0.5, scale
    )
    ticks = [t for t in texts(one) if re.fullmatch(r"[−-]?[0-9.]+", t)]
    assert max(float(t.replace("−", "-")) for t in ticks) == 2.0
    assert figures.scaled(bars(), scale).data.get("scale") is None


def test_every_drawn_cell_has_the_shade_of_its_value() -> None:
    values = np.random.default_rng(0).normal(0, 1, (6, 7))
    found = pixels(heat(rows=list("abcdef"), cols=list("0123456"), values=values))
    scale = palette.scale_of({"values": values})
    assert {rgb(palette.shade(v, scale)) for v in values.ravel()} <= found


def test_shades_run_from_blue_through_white_to_red() -> None:
    assert [palette.shade(v, (-2, 2)) for v in (-2, 0, 2)] == [
        palette.NEGATIVE,
        palette.NEUTRAL,
        palette.POSITIVE,
    ]
    assert palette.shade(math.nan, (-1, 1)) == palette.EMPTY and len(set(palette.SHADES)) > 200


def seen(colour: str, weak: str) -> np.ndarray:
    """A colour in CIELAB as a person without `weak` cones sees it (the matrices of Machado and others, 2009,
    severity 1; "": with all cones)."""
    matrices = {
        "green": "0.367322 0.860646 -0.227968 0.280085 0.672501 0.047413 -0.01182 0.04294 0.968881",
        "red": "0.152286 1.052583 -0.204868 0.114503 0.786281 0.099216 -0.003882 -0.048116 1.051998",
        "blue": "1.255528 -0.076749 -0.178779 -0.078411 0.930809 0.147602 0.004733 0.691367 0.3039",
        "": "1 0 0 0 1 0 0 0 1",
    }
    matrix = np.array(matrices[weak].split(), float).reshape(3, 3)
    value = np.array(rgb(colour)) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    linear = np.clip(matrix @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ linear / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("weak", ["", "green", "red", "blue"])
def test_colour_blind_people_can_tell_the_colours_apart(weak: str) -> None:
    def apart(a: str, b: str) -> float:
        return float(np.linalg.norm(seen(a, weak) - seen(b, weak)))

    pairs = [(a, b) for i, a in enumerate(palette.SERIES) for b in palette.SERIES[:i]]
    assert min(apart(*pair) for pair in pairs) > 12
    assert apart(palette.NEGATIVE, palette.POSITIVE) > 40
    half = [palette.shade(v, (-1, 1)) for v in (-0.5, 0, 0.5)]
    assert min(apart(half[0], half[1]), apart(half[1], half[2]), apart(half[0], half[2])) > 15


@pytest.mark.parametrize(
    ("text", "scale"),
    [("", None), ("-0.1, 0.5", (-0.1, 0.5)), ("0.3", (-0.3, 0.3)), ("-2", (-2, 2)), (" 0;1e-3 ", (0, 0.001))],
)
def test_a_scale_is_read(text: str, scale: Any) -> None:
    assert palette.read_scale(text) == scale


@pytest.mark.parametrize("text", ["a", "1,2,3", "0.5,-0.1", "nan", "-inf,1", "0", "1,1", ","])
def test_a_wrong_scale_is_said(text: str) -> None:
    with pytest.raises(RequestError, match="must be two numbers, the lower first, such as -0.1, 0.5"):
        palette.read_scale(text)


def test_dots_per_inch() -> None:
    sizes = []
    for dpi in (100, 300):
        with Image.open(io.BytesIO(figures.to_bytes(heat(), "png", dpi=dpi))) as opened:
            sizes.append((opened.width, round(opened.info["dpi"][0])))
    assert sizes[1][0] == pytest.approx(3 * sizes[0][0], abs=3) and [s[1] for s in sizes] == [100, 300]
    wide = heat(rows=["a"] * 80, cols=["b"] * 80, values=np.ones((80, 80)))
    with pytest.raises(RequestError, match=r"At 2000 dots per inch .* million pixels; take at most \d+"):
        figures.to_bytes(wide, "png", dpi=2000)


def test_a_pdf_embeds_its_fonts_as_truetype_and_carries_the_recipe() -> None:
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(figures.to_bytes(heat(), "pdf", RECIPE)))
    fonts = [f.get_object() for f in reader.pages[0]["/Resources"]["/Font"].values()]
    below = [f["/DescendantFonts"][0].get_object() if "/DescendantFonts" in f else f for f in fonts]
    assert below and {str(f["/Subtype"]) for f in below} <= {"/CIDFontType2", "/TrueType"}  # Type 42
    assert all("/FontFile2" in f["/FontDescriptor"].get_object() for f in below)
    assert "a map" in reader.pages[0].extract_text()
    assert json.loads(reader.metadata.subject) == RECIPE


def test_figures_drawn_at_the_same_time_have_the_bytes_of_one_alone() -> None:
    from concurrent.futures import ThreadPoolExecutor

    alone = {kind: figures.to_bytes(heat(), kind, RECIPE) for kind in figures.FORMATS}
    with ThreadPoolExecutor(4) as pool:
        made = list(
            pool.map(lambda kind: (kind, figures.to_bytes(heat(), kind, RECIPE)), figures.FORMATS * 3)
        )
    assert all(content == alone[kind] for kind, content in made)


def test_an_image_carries_a_note() -> None:
    pixels_ = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for note in ("", "x", "y" * 100_000, "z" * 3_000_000):
        with Image.open(io.BytesIO(figures.image_bytes(pixels_, note))) as opened:
            assert opened.info.get("Description", "") == note
            np.testing.assert_array_equal(np.asarray(opened), pixels_)


def test_a_map_of_nothing_but_nan() -> None:
    assert rgb(figures.EMPTY) in pixels(heat(values=np.full((2, 2), math.nan)))


def test_bars_are_coloured_by_sign_and_name_each_line_once() -> None:
    assert {rgb(figures.POSITIVE), rgb(figures.NEGATIVE)} <= pixels(bars())
    assert rgb(figures.NEGATIVE) not in pixels(bars(values=np.array([0.4, 0.0, math.nan])))
    written = texts(bars())
    assert written.count("placebo") == 1 and written.count("all layers") == 1 and "unknown" not in written
    assert {"0-1", "1-2", "2-3", "bars", "decrease of the cosine"} <= set(written)


def test_bars_stand_where_their_values_are() -> None:
    drawn = figures._bars(bars(lines=[("all layers", 0.5)])).axes[0]
    assert [round(b.get_height(), 6) for b in drawn.patches] == [0.4, -0.2]
    assert [round(b.get_x() + b.get_width() / 2, 6) for b in drawn.patches] == [0, 1]
    (whisker,) = [c for c in drawn.containers if hasattr(c, "has_yerr")]
    np.testing.assert_allclose(whisker[2][0].get_segments(), [[[0, 0.3], [0, 0.5]]])
    assert [line.get_ydata()[0] for line in drawn.lines if line.get_label() == "all layers"] == [0.5]


@pytest.mark.parametrize("count", [0, 1, 700])
def test_any_number_of_bars(count: int) -> None:
    figure = bars(labels=["x" * 90] * count, values=np.ones(count), errors=None, lines=[])
    assert figures.to_bytes(figure, "png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("values", "limit"),
    [([1.0, -3.0, math.nan], 3.0), ([math.inf, 0.5], 0.5), ([math.nan], 1.0), ([0.0, 0.0], 1.0), ([], 1.0)],
)
def test_scale_limit(values: list[float], limit: float) -> None:
    assert figures.scale_limit(np.array(values)) == limit


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.123"), (-1234.0, "-1.23e+03"), (math.nan, "–"), (0.0, "0")]
)
def test_number(value: float, text: str) -> None:
    assert figures.number(value) == text


def table(arrays: dict[str, Trace]) -> list[list[str]]:
    """The CSV's rows below its head."""
    head, *rows = csv.reader(io.StringIO(figures.to_csv(arrays)))
    assert head == ["array", "place", "value", "unit"]
    return rows


def test_csv_names_every_number() -> None:
    axes = (Axis("seed", ("0", "7")), Axis("layer", ("a,b", 'c"d')))
    values = np.array([[0.1, math.nan], [-2.0, 1e-9]], np.float32)
    arrays = {
        "effect": Trace(values, axes, "cosine"),
        "clean": Trace(np.array(0.5, np.float32), (), "cosine"),
        "images": Trace(np.zeros(2, np.uint8), (Axis("pixel", ("0", "1")),), "RGB"),
    }
    assert table(arrays) == [
        ["effect", "seed=0; layer=a,b", "0.100000001", "cosine"],
        ["effect", 'seed=0; layer=c"d', "nan", "cosine"],
        ["effect", "seed=7; layer=a,b", "-2", "cosine"],
        ["effect", 'seed=7; layer=c"d', "9.99999972e-10", "cosine"],
        ["clean", "", "0.5", "cosine"],
    ]


def test_a_csv_with_a_note_is_read_by_pandas_as_it_is() -> None:
    import pandas

    arrays = {"effect": Trace(np.array([0.5, -1.0, 2.0]), (Axis("layer", ("a", "b", "c")),), "cosine")}
    note = json.dumps(RECIPE)
    read = pandas.read_csv(io.StringIO(figures.to_csv(arrays, note)))
    assert list(read.columns) == ["array", "place", "value", "unit", "recipe"]
    assert read["value"].tolist() == [0.5, -1.0, 2.0] and read["value"].dtype == float
    assert json.loads(read["recipe"][0]) == RECIPE and read["recipe"][1:].isna().all()


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_a_spreadsheet_takes_no_text_for_a_formula(start: str) -> None:
    bad = start + "HYPERLINK(1)"
    row = table({bad: Trace(np.array([1.0]), (Axis(bad, ("x",)),), bad)})[0]
    assert row == ["'" + bad, f"'{bad}=x", "1", "'" + bad]
    harmless = table({"a": Trace(np.array([1.0]), (Axis("word", (bad,)),))})[0]
    assert harmless[1] == f"word={bad}"
