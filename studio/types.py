"""The central records: frozen, made of NumPy arrays and plain values, without torch and without live
objects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Site:
    """A place in a model: `part` ("unet", "text", "lm", "vision"), `layer` (a module's name or a number),
    `kind`."""

    part: str
    layer: str | int
    kind: str

    def __str__(self) -> str:
        layer = str(self.layer)
        short = layer if len(layer) < 48 else f"{layer[:28]}…{layer.rsplit('.', 1)[-1]}"
        return f"{self.part}.{short}" if layer.endswith(self.kind) else f"{self.part}.{short}.{self.kind}"


@dataclass(frozen=True)
class Patch:
    """One intervention on a site's output, as data.

    do: "zero"; "add" or "scale" by `value` (a number or an array that broadcasts); "copy" from `value`, which
    is a row of the same batch (int) or an array; "hold" with `value` = (table, index): the module does not
    run, row i of its output, unconditional rows counted, is table[index[i]]. at: token positions (None: all).
    when: (first, last) denoising steps, both included (None: all). rows: rows of the batch (None: all).
    Applied in the order in which patches are given.
    """

    site: Site
    do: str
    value: Any = None
    at: tuple[int, ...] | None = None
    when: tuple[int, int] | None = None
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on, apart from the machine: save it, send it, run it again."""

    method: str
    model: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    edits: tuple[str, ...] = ()

    def key(
        self, fingerprint: str, dtype: str, edit_hashes: tuple[str, ...] = (), scorer: str | None = None
    ) -> str:
        """SHA-256 of the canonical JSON of method, inputs, parameters, seeds, weights, number type and
        edits."""
        content = {
            "method": self.method,
            "inputs": dict(self.inputs),
            "params": dict(self.params),
            "seeds": list(self.seeds),
            "fingerprint": fingerprint,
            "dtype": dtype,
            "edits": list(edit_hashes),
            "scorer": scorer,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for run.json."""
        plain = asdict(self)
        return plain | {"seeds": list(self.seeds), "edits": list(self.edits)}


@dataclass(frozen=True)
class Axis:
    """A named axis and the label of each place on it."""

    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Trace:
    """An array whose axes have names. `unit` says what the numbers are; `baseline` is the value of no
    effect."""

    values: np.ndarray
    axes: tuple[Axis, ...] = ()
    unit: str = ""
    baseline: float = 0.0

    def __post_init__(self) -> None:
        shape = tuple(len(axis.labels) for axis in self.axes)
        if shape != self.values.shape:
            raise ValueError(
                f"axes {[a.name for a in self.axes]} have lengths {shape}, the array is {self.values.shape}"
            )

    def _axis(self, name: str) -> int:
        names = [axis.name for axis in self.axes]
        if name not in names:
            raise KeyError(f"no axis {name!r} here; axes are {', '.join(names)}")
        return names.index(name)

    def axis(self, name: str) -> Axis:
        """The axis of that name."""
        return self.axes[self._axis(name)]

    def over(self, name: str) -> Trace:
        """The mean over the axis `name`, NaN left out."""
        i = self._axis(name)
        count = (~np.isnan(self.values)).sum(i)
        mean = np.where(count > 0, np.nansum(self.values, axis=i) / np.maximum(count, 1), np.nan)
        return replace(self, values=mean.astype(self.values.dtype), axes=self.axes[:i] + self.axes[i + 1 :])

    def at(self, name: str, label: str) -> Trace:
        """The slice at `label` of the axis `name`."""
        i = self._axis(name)
        if label not in self.axes[i].labels:
            raise KeyError(f"no {name} is labelled {label!r}")
        return replace(
            self,
            values=np.take(self.values, self.axes[i].labels.index(label), axis=i),
            axes=self.axes[:i] + self.axes[i + 1 :],
        )

    def best(self, n: int) -> list[tuple[tuple[str, ...], float]]:
        """The `n` largest entries, NaN left out, as (labels, value)."""
        flat = np.where(np.isnan(self.values), -np.inf, self.values).ravel()
        found = []
        for index in np.argsort(-flat, kind="stable")[:n]:
            if flat[index] == -np.inf:
                break
            place = np.unravel_index(index, self.values.shape)
            found.append(
                (tuple(a.labels[p] for a, p in zip(self.axes, place, strict=True)), float(flat[index]))
            )
        return found


@dataclass(frozen=True, eq=False)
class Edit:
    """An overlay: float32 deltas by parameter name, never written into the base weights.

    `method`, `concepts`, `replacements` (as many) and `params` (JSON values) say how it was made, which is
    what a joint solution of several edits starts from.
    """

    deltas: Mapping[str, np.ndarray]
    base_fingerprint: str
    concepts: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    replacements: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Made:
    """A safetensors file that a method made, such as an aligner: its tensors (float) and its metadata."""

    tensors: Mapping[str, np.ndarray]
    note: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Result:
    """What a method returns: named arrays, short values, images (H, W, 3) uint8 named by what they show, and
    the edit or the other file that it made, if it makes one."""

    arrays: Mapping[str, Trace] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    edit: Edit | None = None
    made: Made | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """One finished (or stopped, or failed) run. status: "done", "stopped" or "failed"; seconds of wall
    time."""

    recipe: Recipe
    status: str
    started: str
    seconds: float
    host: Mapping[str, Any]
    result: Result
    error: str | None = None
    key: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True, eq=False)
class Figure:
    """A picture as data: kind is one of heat, bars, curve, tokens, strip, pairs, table; figures.py draws
    it."""

    kind: str
    data: Mapping[str, Any]
    title: str = ""
    caption: str = ""


class Report(Protocol):
    """How a running method speaks: progress, partial results, warnings. Every call raises Cancelled when
    told to stop."""

    def plan(self, total: int, what: str = "") -> None:
        """Announces `total` steps in all; `what` names the present phase."""

    def step(self, n: int = 1) -> None:
        """`n` more steps are done."""

    def partial(self, result: Result) -> None:
        """What is known so far, in the form of the final result."""

    def warn(self, sentence: str) -> None:
        """Something that a person should know; it is kept in the run's values."""
