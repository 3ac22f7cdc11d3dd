"""A grid over any two of what varies among runs: what varies is found, places are filled right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from studio.errors import RequestError
from studio.figures import to_bytes
from studio.run_grid import (
    Cell,
    grid,
    image_cells,
    image_figure,
    several,
    suggested,
    value_cells,
    value_figure,
    value_names,
    varying,
)
from studio.run_index import Summary


def run(n: int, **more: object) -> Summary:
    return Summary(f"run{n}", **{"method": "generate", "model": "atlas-sd", "seeds": (0, 1), **more})


def edited(n: int, strength: str) -> Summary:
    """A run of two prompts and two seeds with an edit at a strength."""
    names = tuple(f"prompt{p}-seed{s}" for p in (0, 1) for s in (0, 1))
    return run(
        n, inputs={"prompt": ["a star", "a tree"]}, edits=(f"/store/e.safetensors{strength}",), images=names
    )


def test_seeds_by_strength() -> None:
    cells = image_cells([edited(2, "@2"), edited(1, ""), edited(3, "@-1"), edited(10, "@0.5")])
    varies = varying(cells)
    assert varies == {"prompt": ["a star", "a tree"], "strength": ["-1", "0.5", "1", "2"], "seed": ["0", "1"]}
    assert suggested(varies) == ("strength", "seed")
    made = grid(cells, "strength", "seed", {"prompt": "a tree"})
    assert made.said == "4 × 2." and list(made.rows) == ["-1", "0.5", "1", "2"]
    assert [[(c.run, c.image) for c in line] for line in made.cells] == [
        [(r, f"prompt1-seed{s}") for s in (0, 1)] for r in ("run3", "run10", "run1", "run2")
    ]


def test_layers_by_prompts_with_places_that_are_empty() -> None:
    runs = [
        run(1, method="lens", inputs={"prompt": "one"}, images=("seed0-layer2", "seed0-layer10")),
        run(2, method="lens", inputs={"prompt": "two"}, images=("seed0-layer2",)),
    ]
    cells = image_cells(runs)
    assert varying(cells) == {"prompt": ["one", "two"], "image": ["layer2", "layer10"]}
    made = grid(cells, "image", "prompt")
    assert [[c and c.run for c in line] for line in made.cells] == [["run1", "run2"], ["run1", None]]
    assert made.said == "2 × 2, 1 of them empty."


def test_of_several_in_one_place_the_newest_is_shown_and_said() -> None:
    asked = ((4, 7.5), (3, 5.0), (3, 7.5))
    runs = [run(n, params={"steps": n, "guidance": g}, images=("seed0-clean",)) for n, g in asked]
    made = grid(image_cells(runs), "steps", "")
    assert list(made.rows) == ["3", "4"] and made.cells[0][0].parts["guidance"] == "5"
    assert made.said.endswith(
        "1 places have more than one, of which the newest is shown (also varies: guidance)."
    )


def test_images_without_seeds_and_damaged_runs() -> None:
    runs = [run(1, seeds=(), images=("map",)), run(2, fault="broken", images=("map",))]
    (cell,) = image_cells(runs)
    assert cell == Cell({"method": "generate", "model": "atlas-sd", "edits": "none", "strength": "none",
                         "image": "map"}, "run1", "map")  # fmt: skip
    assert varying([cell]) == {} and suggested({}) == ("", "")
    assert grid([cell], "", "").cells == [[cell]]


def test_numbers_of_runs() -> None:
    runs = [
        run(
            n,
            params={"steps": s, "guidance": g},
            values={"total": v, "verdict": "x", "sure": True},
            seeds=(0,),
        )
        for n, (s, g, v) in enumerate([(2, 1.0, 0.5), (20, 1.0, None), (2, 7.5, 3)])
    ]
    assert value_names(runs) == ["total"]
    made = grid(value_cells(runs), "steps", "guidance")
    figure = value_figure(made, {r.id: r.values.get("total") for r in runs}, "total")
    np.testing.assert_array_equal(figure.data["values"], [[0.5, 3.0], [np.nan, np.nan]])
    assert figure.data["names"] == [["2, 1", "2, 7.5"], ["20, 1", ""]] and figure.data["unit"] == "total"
    assert to_bytes(figure, "png")[:4] == b"\x89PNG"


def test_the_figure_holds_every_image_in_its_place(tmp_path: Path) -> None:
    made = grid(image_cells([edited(1, "@1"), edited(2, "@2")]), "strength", "seed", {"prompt": "a star"})
    pixels = {
        c.run + c.image: np.full((4, 6, 3), n, np.uint8) for n, c in enumerate(sum(map(list, made.cells), []))
    }
    lost = pixels.pop("run2prompt0-seed1")
    figure = image_figure(made, lambda cell: pixels.get(cell.run + cell.image))
    assert [[int(i[0, 0, 0]) for i in line] for line in figure.data["images"]] == [[0, 1], [2, 228]]
    assert figure.data["images"][1][1].shape == lost.shape and figure.title == "strength × seed"
    assert to_bytes(figure, "png")[:4] == b"\x89PNG"
    with pytest.raises(RequestError, match="None of these images can be read"):
        image_figure(made, lambda cell: None)


def test_what_can_not_be_drawn() -> None:
    cells = [Cell({"a": str(n), "b": str(n % 30)}, f"r{n}") for n in range(60)]
    with pytest.raises(RequestError, match="There is nothing to show: choose runs that have images"):
        grid(cells, "a", "b", {"a": "none"})
    with pytest.raises(RequestError, match="Rows and columns are both a"):
        grid(cells, "a", "a")
    with pytest.raises(RequestError, match="A grid of 60 by 1 is too large; at most 40 a side and 400 cells"):
        grid(cells, "a", "")
    with pytest.raises(RequestError, match="A grid of 30 by 30 is too large"):
        grid(cells[:30], "a", "b")
    large = np.zeros((2**13, 2**13 + 1, 3), np.uint8)
    with pytest.raises(RequestError, match="too large for one grid"):
        image_figure(grid([Cell({}, "r", "i")], "", ""), lambda cell: large)


def test_what_else_varies_within_a_place_is_found() -> None:
    cells = image_cells([edited(1, "@1"), edited(2, "@2")])
    assert several(cells, ("strength", "seed"), "prompt") and several(cells, ("prompt", ""), "seed")
    assert not several(cells, ("strength", "seed"), "model")
    assert not several(cells, ("prompt", "seed", "strength"), "edits")
