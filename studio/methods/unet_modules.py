"""The UNet's modules as rows of a trace and as cells of a map: labels, kinds, windows of neighbours, the grid
of the heat map, ranges of denoising steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from studio.types import Site

KINDS = ("cross-attention", "self-attention", "resnet", "feed-forward")


def site_labels(sites: list[Site]) -> tuple[str, ...]:
    """Full module names; `stream` is told from `resnet` where both are there."""
    both = {"stream", "resnet"} <= {s.kind for s in sites}
    return tuple(f"{s.layer} (stream)" if both and s.kind == "stream" else str(s.layer) for s in sites)


def kind_of(label: str) -> str:
    """The kind of a module by its label."""
    ends = {"attn2": "cross-attention", "attn1": "self-attention", "ff": "feed-forward", "(stream)": "stream"}
    return next((kind for end, kind in ends.items() if label.endswith(end)), "resnet")


def row_kinds(labels: tuple[str, ...], kinds: Sequence[str]) -> list[str]:
    """The kind of each label in a trace of these kinds: without `resnet` among them a block is its stream."""
    found = [kind_of(label) for label in labels]
    return ["stream" if k == "resnet" and "resnet" not in kinds else k for k in found]


def windows(sites: list[Site], width: int) -> list[list[Site]]:
    """For each site the neighbours of its own kind that are treated with it, itself in the centre."""
    by_kind: dict[str, list[Site]] = {}
    for site in sites:
        by_kind.setdefault(site.kind, []).append(site)
    out = []
    for site in sites:
        row = by_kind[site.kind]
        i = row.index(site)
        out.append(row[max(0, i - (width - 1) // 2) : i + width // 2 + 1])
    return out


def step_ranges(first: int, last: int, parts: int) -> list[tuple[int, int]]:
    """The steps first..last (both included) cut into `parts` ranges (first, last) of equal length, the longer
    ones first where they can't be equal."""
    pieces = np.array_split(np.arange(first, last + 1), parts)
    return [(int(p[0]), int(p[-1])) for p in pieces]


def layout(labels: tuple[str, ...], values: np.ndarray, asked: Sequence[str] = KINDS) -> dict[str, Any]:
    """Modules on a grid for the heat map: a row a kind, a column a place in the UNet. Cells without a
    module are NaN."""
    places, kinds = [], row_kinds(labels, asked)
    for label in labels:
        parts = label.replace(" (stream)", "").split(".")
        block = parts[0].removesuffix("_blocks").removesuffix("_block") + (
            f" {parts[1]}" if parts[0] != "mid_block" else ""
        )
        numbers = [int(p) for p in parts if p.isdigit()][0 if parts[0] == "mid_block" else 1 :]
        places.append((block, numbers[0] if numbers else 0, numbers[1] if len(numbers) > 1 else 0))
    columns, rows = list(dict.fromkeys(places)), [k for k in (*KINDS, "stream") if k in kinds]
    blocks = list(dict.fromkeys(b for b, _, _ in columns))
    columns.sort(key=lambda p: (blocks.index(p[0]), p[1], p[2]))
    grid, names = np.full((len(rows), len(columns)), np.nan), [[""] * len(columns) for _ in rows]
    for label, place, kind, value in zip(labels, places, kinds, values, strict=True):
        r, c = rows.index(kind), columns.index(place)
        grid[r, c], names[r][c] = value, label
    deep = any(p[2] for p in columns)
    return {
        "rows": rows,
        "cols": [f"{b} · {i}.{j}" if deep else f"{b} · {i}" for b, i, j in columns],
        "values": grid,
        "names": names,
        "col_title": "place in the UNet, in execution order",
        "row_title": "",
    }


def stacked(
    labels: tuple[str, ...], maps: Sequence[tuple[str, np.ndarray]], asked: Sequence[str] = KINDS
) -> dict[str, Any]:
    """Several maps (name, value of each module) on one grid: for every kind a row a map.

    `row_of` holds (kind, name of the map) of each row.
    """
    grids = [layout(labels, values, asked) for _, values in maps]
    order = [(k, m) for k in range(len(grids[0]["rows"])) for m in range(len(maps))]
    row_of = [(grids[0]["rows"][k], maps[m][0]) for k, m in order]
    return {
        **grids[0],
        "rows": [f"{kind}, {name}" for kind, name in row_of],
        "values": np.stack([grids[m]["values"][k] for k, m in order]),
        "names": [grids[m]["names"][k] for k, m in order],
        "row_of": row_of,
    }
