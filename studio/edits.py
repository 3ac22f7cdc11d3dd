"""Closed-form edits: the least squares behind all of them, their joint solution, and edits as overlays that
are undone whatever happens.

min over W' of sum_i s_i |W' k_i - v_i|^2 + lambda |W' - W|^2 has the solution W' = W + A B, A = V - W K,
B = (K^T K + lambda S^-1)^-1 K^T with K (d, n), V (m, n): one Cholesky of n x n, shared by all matrices that
read the same keys, and an edit of rank n at most. Where n > d the same delta comes from d x d.
DiffQuickFix (arXiv 2310.13730), LocoEdit (2405.01008), UCE (2308.14761): they differ in K, V and lambda.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from studio.errors import RequestError, StudioError
from studio.models.lora import ANY_WEIGHTS, fitted
from studio.models.lora import METHOD as LORA
from studio.registry import load_methods
from studio.types import Edit

_KEPT = 4  # joint solutions that a composer remembers
_log = logging.getLogger("locus")


# ---- least squares ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LowRank:
    """A delta as left (m, r) times right (r, d), float64; `right` is shared where keys are equal."""

    left: Any
    right: Any

    def dense(self) -> Any:
        """The delta (m, d), float32."""
        return self.left.float() @ self.right.float()


@dataclass(frozen=True, eq=False)
class Factor:
    """What the keys alone decide: the delta of a matrix W is (V - W K) fold right.

    fold (n, r), right (r, d), float64, r = min(n, d). The rows of `right` are shorter than 1 in every
    direction (B is split as L^-T, L^-1 K^T), so that nothing cancels where keys are nearly equal.
    """

    keys: Any
    fold: Any
    right: Any

    @classmethod
    def of(cls, keys: Any, weights: Any) -> Factor:
        """keys (d, n); weights (n,) are s / lambda, all above 0."""
        import torch

        keys, weights = keys.double(), weights.double()
        few = keys.shape[1] <= keys.shape[0]
        scaled = keys if few else keys * weights.sqrt()
        gram = keys.T @ keys if few else scaled @ scaled.T
        gram.diagonal().add_(1 / weights if few else 1)
        lower, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise RequestError(
                "The keys of this edit are too much alike for so small a --regularization; raise it."
            )
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        half = torch.linalg.solve_triangular(lower, keys.T if few else eye, upper=False)
        if few:
            return cls(keys, torch.linalg.solve_triangular(lower, eye, upper=False).T, half)
        return cls(keys, (keys * weights).T @ half.T, half)

    def apply(self, miss: Any) -> LowRank:
        """The delta of a matrix whose keys miss their values by V - W K = `miss` (m, n)."""
        return LowRank(miss.double() @ self.fold, self.right)


def solve(
    matrices: Sequence[Any], keys: Any, values: Sequence[Any], weights: Any, regularization: float
) -> list[LowRank]:
    """The deltas of matrices W (m, d) that share keys (d, n): values[j] (m, n) for matrices[j], weights (n,).

    Equal keys are merged first: s = sum s_i, v = sum s_i v_i / s.
    """
    keys, values, weights = merge_equal(keys, values, weights)
    factor = Factor.of(keys, weights / regularization)
    pairs = zip(matrices, values, strict=True)
    return [factor.apply(v.double() - product(w, factor.keys)) for w, v in pairs]


def merge_equal(keys: Any, values: Sequence[Any], weights: Any) -> tuple[Any, list[Any], Any]:
    """(keys (d, u), values (m, u) each, weights (u,)) without equal columns of `keys` (d, n), in the order in
    which they first come."""
    import torch

    unique, place = torch.unique(keys, dim=1, return_inverse=True)
    count = unique.shape[1]
    if count == keys.shape[1]:
        return keys, list(values), weights
    first = torch.full((count,), len(place), device=place.device)
    first.scatter_reduce_(0, place, torch.arange(len(place), device=place.device), "amin")
    order = first.argsort()
    sums = torch.zeros(count, dtype=weights.dtype, device=weights.device).index_add_(0, place, weights)
    merged = [
        torch.zeros(len(v), count, dtype=v.dtype, device=v.device).index_add_(1, place, v * weights) / sums
        for v in values
    ]
    return keys[:, first[order]], [v[:, order] for v in merged], sums[order]


# ---- what an edit asks for --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pairs:
    """What one edit asks of matrices that read the same keys: W' keys[:, i] shall be W guides[:, i].

    names: parameters as edit files name them. keys, guides (d, n) and weights (n,) float64; a pair that is
    to stay as it is has its key for a guide.
    """

    names: tuple[str, ...]
    keys: Any
    guides: Any
    weights: Any
    regularization: float

    def merged(self) -> Pairs:
        """The same without equal keys."""
        keys, (guides,), weights = merge_equal(self.keys, [self.guides], self.weights)
        return Pairs(self.names, keys, guides, weights, self.regularization)


Build = Callable[[Any, Edit], list[Pairs]]
CLOSED_FORMS: dict[str, Build] = {}


def closed_form(name: str) -> Callable[[Build], Build]:
    """Registers how the pairs of a method's edits are built, at any time, from the edit's own record."""

    def register(build: Build) -> Build:
        CLOSED_FORMS[name] = build
        return build

    return register


@dataclass(frozen=True, eq=False)
class Active:
    """An edit that is on, at a strength (negative ones push the other way); `digest` of its file, if it has
    one."""

    edit: Edit
    strength: float = 1.0
    digest: str = ""


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A stored delta (an array, or a LoRA's factors) times a strength."""

    delta: Any
    strength: float

    def dense(self) -> Any:
        import torch

        delta = self.delta.dense() if hasattr(self.delta, "dense") else torch.tensor(self.delta)
        return delta if self.strength == 1 else delta * self.strength


@dataclass(frozen=True, eq=False)
class _Group:
    """Matrices that the same edits touch: their common factor, guides minus keys, and whose each pair is."""

    names: tuple[str, ...]
    factor: Factor
    differences: Any
    owners: Any

    def deltas(self, parameters: Mapping[str, Any], strengths: Any) -> Iterator[tuple[str, LowRank]]:
        """One delta a matrix; the pairs of edit e count strengths[e] times."""
        steps = self.differences * strengths[self.owners]
        for name in self.names:
            yield name, self.factor.apply(product(parameters[name], steps))


def product(matrix: Any, columns: Any) -> Any:
    """matrix (m, d) times columns (d, n) in float64, some rows at a time: casting all at once costs most of
    the time. On the columns' device, since some have no float64."""
    import torch

    rows = matrix.detach().to(columns.device).split(64)
    return torch.cat([part.double() @ columns for part in rows])


def joined(pairs: Sequence[Sequence[Pairs]]) -> list[_Group]:
    """The joint problem of several edits, each with its pairs: one group for all matrices that the same
    pairs touch. Each edit keeps its own lambda, as weights s / lambda."""
    import torch

    touched: dict[str, list[tuple[int, Pairs]]] = {}
    for e, own in enumerate(pairs):
        for p in own:
            for name in p.names:
                touched.setdefault(name, []).append((e, p))
    groups: dict[tuple, list[str]] = {}
    for name, found in touched.items():
        groups.setdefault(tuple(id(p) for _, p in found), []).append(name)
    out = []
    for names in groups.values():
        found = touched[names[0]]
        keys = torch.cat([p.keys for _, p in found], dim=1)
        weights = torch.cat([p.weights / p.regularization for _, p in found])
        differences = torch.cat([p.guides - p.keys for _, p in found], dim=1)
        owners = torch.cat([torch.full_like(p.weights, e, dtype=torch.long) for e, p in found])
        out.append(_Group(tuple(names), Factor.of(keys, weights), differences, owners))
    return out


def solved(model: Any, pairs: Sequence[Pairs]) -> dict[str, LowRank]:
    """The deltas of one edit at strength 1."""
    import torch

    parameters = parameters_of(model)
    one = torch.ones(1, dtype=torch.float64, device=pairs[0].keys.device)
    return {n: d for g in joined([pairs]) for n, d in g.deltas(parameters, one)}


# ---- several edits at once --------------------------------------------------------------------------------


class Composer:
    """Turns active edits into deltas: closed forms are solved jointly, everything else is added.

    It remembers the last joint problems, so that other strengths of the same edits cost no text pass and no
    factorization.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, tuple[Any, list[_Group]]] = OrderedDict()

    def layers(self, model: Any, active: Sequence[Active]) -> list[dict[str, Any]]:
        """Deltas by parameter name, to be added one dictionary after the other.

        One closed form alone is its file's own delta; an edit at strength 0 is off. Edits of the text encoder
        come first, because the keys of edits of the UNet are then built from what the edited encoder gives.
        """
        added, text, unet = [], [], []
        for a in (a for a in active if a.strength != 0):
            (added if not _solvable(model, a.edit) else text if _reads_text(a.edit) else unet).append(a)
        out = self._solve(model, text) + [_scaled(a) for a in added]
        moved = [{n: d for n, d in layer.items() if n.startswith("text_encoder")} for layer in out]
        if not unet or not any(moved):
            return out + self._solve(model, unet)
        mark = tuple((id(a.edit), a.strength) for a in [*text, *added] if _reads_text(a.edit))
        with laid_over(model, moved):
            return out + self._solve(model, unet, moved=(mark, [a.edit for a in [*text, *added]]))

    def _solve(self, model: Any, active: list[Active], moved: tuple | None = None) -> list[dict[str, Any]]:
        if not active or (len(active) == 1 and moved is None):
            return [_scaled(a) for a in active]
        key = (model.fingerprint, str(model.dtype), moved and moved[0], *(id(a.edit) for a in active))
        if key not in self._kept:
            built = [_pairs(model, a.edit) for a in active]
            # the edits are kept too, so that their ids stay theirs
            held = ([a.edit for a in active], moved, [p is not None for p in built])
            self._kept[key] = (held, joined([p for p in built if p is not None]))
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        (*_, can), groups = self._kept[key]
        strengths = [
            a.strength * a.edit.params.get("strength", 1.0) for a, c in zip(active, can, strict=True) if c
        ]
        parameters, out = parameters_of(model), {}
        for group in groups:
            out |= group.deltas(parameters, group.factor.keys.new_tensor(strengths))
        return [out, *(_scaled(a) for a, c in zip(active, can, strict=True) if not c)]


def compose(model: Any, active: Iterable[Active], *, force: bool = False) -> dict[str, Any]:
    """The whole delta (float32, on the CPU) of active edits by parameter name, as `overlay` would add it."""
    active = _named(model, active)
    check_fit(model, active, force=force)
    out: dict[str, Any] = {}
    for layer in Composer().layers(model, active):
        for name, delta in layer.items():
            dense = delta.dense().cpu()
            out[name] = out[name] + dense if name in out else dense
    return out


def _scaled(active: Active) -> dict[str, _Scaled]:
    return {n: _Scaled(d, active.strength) for n, d in active.edit.deltas.items()}


def _solvable(model: Any, edit: Edit) -> bool:
    """Whether the edit is a closed form that was made on these weights."""
    load_methods()  # it is their files that register closed forms
    return edit.base_fingerprint == model.fingerprint and edit.method in CLOSED_FORMS


def _reads_text(edit: Edit) -> bool:
    return any(name.startswith("text_encoder") for name in edit.deltas)


def _pairs(model: Any, edit: Edit) -> list[Pairs] | None:
    """The edit's pairs, built from its record; None when the record does not give its own matrices."""
    try:
        found = CLOSED_FORMS[edit.method](model, edit)
    except (StudioError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        _log.warning("an edit by %s is added as it stands, its keys can't be built: %s", edit.method, error)
        return None
    return found if {n for p in found for n in p.names} == set(edit.deltas) else None


# ---- overlays ---------------------------------------------------------------------------------------------


def parameters_of(model: Any) -> dict[str, Any]:
    """The model's parameters by the names that edit files use."""
    return {
        f"{part}.{name}": p
        for part, module in model.components().items()
        for name, p in module.named_parameters()
    }


def _named(model: Any, active: Iterable[Active]) -> list[Active]:
    """The same, a LoRA under the model's own parameter names."""
    active = list(active)
    if not any(a.edit.method == LORA for a in active):
        return active
    names = parameters_of(model)
    return [replace(a, edit=fitted(a.edit, names)) for a in active]


def check_fit(model: Any, active: Sequence[Active], *, force: bool = False) -> None:
    """RequestError when an edit was made for other weights (unless `force`) or has another shape."""
    parameters = parameters_of(model)
    for edit in (a.edit for a in active):
        if edit.base_fingerprint not in (model.fingerprint, ANY_WEIGHTS) and not force:
            raise RequestError(
                f"This edit was made for weights {edit.base_fingerprint[:12]}…, and {model.id} has "
                f"{model.fingerprint[:12]}…; use it with its own model, or insist with --force."
            )
        for name, delta in edit.deltas.items():
            if name not in parameters or parameters[name].shape != delta.shape:
                raise RequestError(
                    f"The edit changes {name}, which {model.id} has not in that shape; it is for another "
                    f"model."
                )


@contextmanager
def overlay(
    model: Any, edits: Iterable[Edit | Active], *, force: bool = False, composer: Composer | None = None
) -> Iterator[None]:
    """Lays the edits over the model's weights and puts the very same weights back at the end, also after an
    error.

    RequestError, before anything is touched, when an edit does not fit (see `check_fit`).
    """
    active = _named(model, (e if isinstance(e, Active) else Active(e) for e in edits))
    check_fit(model, active, force=force)
    with laid_over(model, (composer or Composer()).layers(model, active)):
        yield


@contextmanager
def laid_over(model: Any, layers: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Adds deltas (anything with `dense()`) by parameter name, in that order; the saved bits come back."""
    import torch

    parameters = parameters_of(model)
    saved = {name: parameters[name].detach().clone() for layer in layers for name in layer}
    try:
        with torch.no_grad():
            for name, value in saved.items():
                value = value.float()
                for layer in layers:
                    if name in layer:
                        value = value + layer[name].dense().to(value.device)
                parameters[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                parameters[name].copy_(value)
