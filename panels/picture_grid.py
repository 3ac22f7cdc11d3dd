"""A clickable grid of pictures, with labels of its rows and columns: drawn by page script from data, never
from text in a template. Keys and the event are those of the heat map (see heatmap.py)."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from panels.drawn import Drawn, grid_template
from studio.types import Figure

MOST_SIDE = 256  # pixels of a picture
MOST_PIXELS = 3_000_000  # of all together


class PictureGrid(Drawn):
    """A grid whose value is made by `as_value`; its `select` event carries row and col (see
    heatmap.chosen)."""

    def __init__(self, hint: str, **options: Any) -> None:
        super().__init__({"hint": hint}, grid_template("pictures"), "pictures", "pictures", **options)


def as_value(figure: Figure, names: Sequence[Sequence[str]], again: bool = False) -> dict[str, Any]:
    """The value of a PictureGrid for a figure of kind strip; `names` says what each place is, "" where there
    is nothing to choose. `again`: see heatmap.as_value."""
    images, rows, cols = (list(figure.data[n]) for n in ("images", "rows", "cols"))
    side = max(16, min(MOST_SIDE, int(math.sqrt(MOST_PIXELS / max(1, len(rows) * len(cols))))))
    value = {
        "title": figure.title,
        "rows": rows,
        "cols": cols,
        "names": [list(line) for line in names],
        "pictures": [
            [_address(image, side) if name else None for image, name in zip(*line, strict=True)]
            for line in zip(images, names, strict=True)
        ],
        "again": again,
    }
    return json.loads(json.dumps(value))


def _address(pixels: np.ndarray, side: int) -> str:
    """An image (H, W, 3) uint8 as a data address: as it is where no side is longer than `side`, else
    smaller."""
    picture, out = Image.fromarray(pixels), io.BytesIO()
    whole = max(picture.size) <= side
    picture.thumbnail((side, side))
    picture.save(out, "PNG" if whole else "JPEG", **({} if whole else {"quality": 90}))
    return f"data:image/{'png' if whole else 'jpeg'};base64,{base64.b64encode(out.getvalue()).decode()}"
