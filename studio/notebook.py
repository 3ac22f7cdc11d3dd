"""A run as a notebook that repeats it through the Python façade and compares it with the stored numbers."""

from __future__ import annotations

import base64
import io
import json
import pprint
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from studio.recipes import carried, digest
from studio.types import Run

MOST_BYTES = 4 * 2**20  # of numbers that a notebook holds; of larger arrays it holds the SHA-256
_START = """\
from studio import Recipe, Session

recipe = Recipe(
    {method!r},
    {model!r},
    inputs={inputs},
    params={params},
    seeds={seeds!r},
    edits={edits!r},
)
session = Session(device={device!r}, dtype={dtype!r}, threads={threads!r}, batch={batch!r})
run = session.run(recipe, fresh=True, save=False, force={force!r})
session.close()
print(f"{{run.status}} in {{run.seconds:.1f}} s")"""
_NUMBERS = """\
import base64
import io

import numpy as np

from studio.recipes import difference, digest

digests = {digests}
numbers = np.load(io.BytesIO(base64.b64decode({numbers!r})), allow_pickle=False)
differences = {{}}
for name, then in digests.items():
    now = run.result.arrays[name].values
    if digest(now) == then:
        differences[name], said = 0.0, "the same, bit for bit"
    elif name in numbers:
        differences[name] = difference(now, numbers[name])
        said = f"largest difference {{differences[name]:.3g}}"
    else:
        differences[name], said = None, "not the same; it is too large for this notebook to say by how much"
    print(f"{{name:<28}} {{said}}")"""
_DRAW = """\
from PIL import Image

from studio.figures import to_bytes
from studio.registry import find_method

figure = find_method(recipe.method).draw(run)
Image.open(io.BytesIO(to_bytes(figure, "png")))"""


def notebook(run: Run, title: str) -> str:
    """The notebook (nbformat 4.5) as JSON, under a title; its metadata carry the recipe. What a person wrote
    stands in code alone, since Markdown can call out."""
    recipe, host = run.recipe, run.host
    start = _START.format(
        method=recipe.method,
        model=recipe.model,
        inputs=_plain(recipe.inputs),
        params=_plain(recipe.params),
        seeds=tuple(recipe.seeds),
        edits=tuple(recipe.edits),
        device=host.get("device", "auto"),
        dtype=host.get("dtype", "auto"),
        threads=host.get("threads"),
        batch=host.get("batch"),
        force=bool(host.get("force")),
    )
    arrays = {name: trace.values for name, trace in run.result.arrays.items()}
    numbers = _NUMBERS.format(
        digests=_plain({n: digest(v) for n, v in arrays.items()}), numbers=_packed(arrays)
    )
    said = (
        f"# {title}\n\nRun `{_bare(run.id)}` of Locus, started {_bare(run.started)}, device "
        f"{_bare(host.get('device', 'unknown'))}. The cells run its recipe again and compare the arrays with "
        "those of then: on the CPU, with the same threads, batch and versions, they are the same bit for bit."
    )
    cells = [("markdown", said), ("code", start), ("code", numbers), ("code", _DRAW)]
    return json.dumps(_document(cells, carried(run)), indent=1) + "\n"


def _document(cells: list[tuple[str, str]], note: Mapping[str, Any]) -> dict[str, Any]:
    made = []
    for number, (kind, source) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}, "locus": note}
    return {"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def _bare(value: Any) -> str:
    return re.sub(r"[^\w:+.-]", "", str(value))[:80]


def _plain(values: Mapping[str, Any]) -> str:
    """Python code of plain values."""
    return pprint.pformat(dict(values), width=100, sort_dicts=False)


def _packed(arrays: Mapping[str, np.ndarray]) -> str:
    """Arrays of numbers as a packed npz in base64, the small ones first, as many as fit."""
    kept: dict[str, np.ndarray] = {}
    for name, values in sorted(arrays.items(), key=lambda item: item[1].nbytes):
        if values.dtype != np.uint8 and sum(v.nbytes for v in kept.values()) + values.nbytes <= MOST_BYTES:
            kept[name] = values
    out = io.BytesIO()
    np.savez_compressed(out, **kept)
    return base64.b64encode(out.getvalue()).decode()
