"""Ablation by attribution: which weights are zeroed, as bits, and the edit file that zeroes them.

A weight is taken when its attribution is positive and among the largest of its group: a row of its matrix
(CAD, arXiv 2412.02542), its matrix, or all matrices. The number taken of a group is rounded up: rounded down,
a row shorter than 1 / ratio could never be touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil, log10
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.types import Axis, Edit, Run, Trace

SCOPES = ("row", "matrix", "global")
RANKED_WHOLE = 4_000_000  # up to so many weights a run keeps the ranks of all of them
RANKED_SHARE = 0.2  # of more weights the ranks of this share, which leaves a file of about a byte each
MOST_RANKED = 400_000_000  # more than these are not ranked
_CODES, _PER_DECADE = 255, 50  # code c stands for the ratio 10 ** ((c - 255) / 50)


def quota(ratio: float, size: int) -> int:
    """How many of `size` weights a ratio takes, rounded up: none only for a ratio of 0."""
    return min(size, max(1, ceil(ratio * size - 1e-9))) if ratio > 0 else 0


def masks(alphas: Mapping[str, Any], ratio: float, scope: str) -> dict[str, np.ndarray]:
    """The bits (np.packbits, row by row of [out, in]) of the weights to zero, by parameter name."""
    import torch

    tensors = {name: torch.as_tensor(a) for name, a in alphas.items()}
    if scope == "global":
        sizes = [t.numel() for t in tensors.values()]
        whole = torch.cat([t.reshape(-1) for t in tensors.values()])
        parts = _taken(whole[None], ratio)[0].split(sizes)
    else:
        parts = [_taken(t if scope == "row" else t.reshape(1, -1), ratio) for t in tensors.values()]
    return {n: np.packbits(p.reshape(-1).cpu().numpy()) for n, p in zip(tensors, parts, strict=True)}


def _taken(alpha: Any, ratio: float) -> Any:
    """bool (groups, size): the positive ones among the largest of each group."""
    import torch

    taken = torch.zeros_like(alpha, dtype=torch.bool)
    if k := quota(ratio, alpha.shape[1]):
        taken.scatter_(1, alpha.topk(k, dim=1).indices, True)
    return taken & (alpha > 0)


def unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The mask (bool, `shape`) of packed bits."""
    return np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape)


def mask_edit(
    model: Any,
    alphas: Mapping[str, Any],
    ratio: float,
    scope: str,
    objective: str,
    *,
    concept: str = "",
    base: str = "",
) -> Edit:
    """The edit that zeroes `ratio` of the weights: minus the weight where its bit is set, else 0.

    alphas: attributions (out, in) by parameter name ("unet.MODULE.weight"). Matrices of which nothing is
    taken are left out. Ablating positive ones lowers the objective: erase weakens the concept, amplify
    strengthens it.
    """
    taken = {n: unpack(bits, tuple(alphas[n].shape)) for n, bits in masks(alphas, ratio, scope).items()}
    params = {"ratio": ratio, "scope": scope, "objective": objective}
    return _edit(model, taken, params, concept=concept, base=base)


def _edit(model: Any, taken: Mapping[str, np.ndarray], params: dict, *, concept: str, base: str) -> Edit:
    deltas = {}
    for name, mask in taken.items():
        if mask.any():
            weight = _parameter(model, name).detach().float().cpu().numpy()
            deltas[name] = np.where(mask, -weight, np.float32(0))
    goal = base if params["objective"] == "erase" else concept
    return Edit(deltas, model.fingerprint, (concept,), params, "cad", (goal,))


def _parameter(model: Any, name: str) -> Any:
    part, _, inner = name.partition(".")
    return model.components()[part].get_parameter(inner)


@contextmanager
def zeroed(model: Any, taken: Mapping[str, Any]) -> Iterator[None]:
    """The masked weights (bool tensors by parameter name) are 0 inside the block; afterwards all are what
    they were, bit for bit."""
    import torch

    weights = {name: _parameter(model, name) for name in taken}
    kept = {name: w.detach().clone() for name, w in weights.items()}
    try:
        with torch.no_grad():
            for name, w in weights.items():
                w[taken[name].to(w.device)] = 0
        yield
    finally:
        with torch.no_grad():
            for name, w in weights.items():
                w.copy_(kept[name])


# ---- ranks: every ratio from one array -------------------------------------------------------------------


def ranked_share(alphas: Mapping[str, Any]) -> float:
    """Up to which ratio `ranks` go for so many weights; 0 where there are too many to rank."""
    n = sum(a.numel() for a in alphas.values())
    return 1.0 if n <= RANKED_WHOLE else RANKED_SHARE if n <= MOST_RANKED else 0.0


def ranks(alphas: Mapping[str, Any], scope: str, share: float = 1.0) -> Trace:
    """From which ratio on, up to `share`, each weight is zeroed, `weight_rank` (row, column) uint8.

    0: never (its attribution is not positive, its ratio is past the share, or the place is padding); code c:
    from 10 ** ((c - 255) / 50) on. Rows of all matrices one below the other in the order of `alphas`,
    labelled MATRIX.ROW by number; narrow matrices are padded on the right.
    """
    import torch

    tensors = [torch.as_tensor(a) for a in alphas.values()]
    if scope == "global":
        whole = _codes(torch.cat([t.reshape(-1) for t in tensors])[None], share)[0]
        parts = whole.split([t.numel() for t in tensors])
    else:
        parts = [_codes(t if scope == "row" else t.reshape(1, -1), share) for t in tensors]
    wide = max(t.shape[1] for t in tensors)
    rows = [
        np.pad(p.reshape(t.shape).cpu().numpy(), ((0, 0), (0, wide - t.shape[1])))
        for t, p in zip(tensors, parts, strict=True)
    ]
    labels = tuple(f"{m}.{r}" for m, t in enumerate(tensors) for r in range(len(t)))
    axes = (Axis("row", labels), Axis("column", tuple(map(str, range(wide)))))
    return Trace(np.concatenate(rows), axes, "0: never zeroed; c: zeroed from ratio 10^((c-255)/50) on")


def _codes(alpha: Any, share: float) -> Any:
    """uint8 codes (groups, size) of attributions; 0 past the largest `share` of each group."""
    import torch

    size = alpha.shape[1]
    order = alpha.topk(quota(share, size), dim=1).indices
    quotas = [quota(10 ** ((c - _CODES) / _PER_DECADE), size) for c in range(1, _CODES + 1)]
    place = torch.arange(1, order.shape[1] + 1)
    codes = (torch.searchsorted(torch.tensor(quotas), place) + 1).to(alpha.device, torch.uint8)
    ranked = torch.zeros(alpha.shape, dtype=torch.uint8, device=alpha.device)
    ranked.scatter_(1, order, codes.expand_as(order))
    return torch.where(alpha > 0, ranked, 0)


def nearest_ratio(ratio: float) -> float:
    """The largest ratio with a code of its own that is not above this one (the smallest for less)."""
    return 10 ** ((_code(ratio) - _CODES) / _PER_DECADE)


def _code(ratio: float) -> int:
    return min(_CODES, max(1, int(_CODES + _PER_DECADE * log10(ratio) + 1e-6)))


def _inside(name: str, rows: int, component: str | None) -> np.ndarray:
    """bool (rows, 1): which rows of a matrix belong to a component, MODULE, MATRIX or MATRIX[ROW]."""
    whole, _, row = (component or name).rstrip("]").partition("[")
    mine = name == whole or name.startswith(f"{whole}.")
    return (np.arange(rows) == int(row) if row else np.ones(rows, bool))[:, None] & mine


def ranked_edit(model: Any, run: Run, ratio: float, component: str | None = None) -> Edit:
    """The edit of another ratio from a run of `attribute` that kept its ranks: nothing is computed again.

    Equal to a run's own edit at `nearest_ratio(ratio)`, to which the ratio is rounded; with `component` (a
    label of its axis) only that part of it. RequestError when nothing is left to zero.
    """
    if "weight_rank" not in run.result.arrays:
        raise RequestError(
            f"This run kept no ranks (they are kept up to {MOST_RANKED:,} weights); run it again with the "
            "ratio that you want."
        )
    most = run.result.values.get("ranked_to", 1.0)
    if not 0 < ratio <= most:
        raise RequestError(f"The ratio must be above 0 and at most {most:g}, not {ratio:g}.")
    codes, row, taken = run.result.arrays["weight_rank"].values, 0, {}
    for name in run.result.values["matrices"]:
        tall, wide = _parameter(model, name).shape
        part = codes[row : row + tall, :wide]
        taken[name], row = (part > 0) & (part <= _code(ratio)) & _inside(name, tall, component), row + tall
    if not any(mask.any() for mask in taken.values()):
        raise RequestError(
            f"No weight of {component or 'the model'} is among those; take a larger ratio, or a component "
            "with a positive bar."
        )
    params = {k: run.recipe.params[k] for k in ("scope", "objective")} | {"ratio": nearest_ratio(ratio)}
    inputs = run.recipe.inputs
    return _edit(model, taken, params, concept=inputs["concept"], base=inputs["base"])
