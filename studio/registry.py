"""METHODS and the @method decorator: one declaration from which panel, command, endpoint, sweep and help
are derived.

A method declares two frozen dataclasses: `inputs` (what it is asked about) and `params` (how it is done).
Each field is
made by `knob`, which carries help, unit, bounds and choices. `parse` turns what a person gave into checked
values.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from studio.errors import RequestError
from studio.types import Figure, Result, Run, Trace

METHODS: dict[str, Method] = {}
MAX_TEXT = 20_000  # characters of one text


def knob(
    default: Any,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    repeat: bool = False,
    advanced: bool = False,
    commas: bool = True,
    lines: bool = False,
    paths: bool = False,
    weights: bool = False,
) -> Any:
    """A declared option. `default` MISSING makes it required; `repeat` lets a text list be given several
    times.

    Tuples of texts with `choices` are written with commas, `commas` False takes several words instead
    (--words a b). `lines`: on the command line a file may stand for texts, one a line. `paths`: names of
    files of this machine, which the command line makes whole. `weights`: the name of a model or its folder,
    which it makes whole too.
    """
    meta = {
        "help": help,
        "unit": unit,
        "low": low,
        "high": high,
        "choices": choices,
        "repeat": repeat,
        "advanced": advanced,
        "commas": commas,
        "lines": lines,
        "paths": paths,
        "weights": weights,
    }
    return field(metadata=meta) if default is MISSING else field(default=default, metadata=meta)


REQUIRED = MISSING


@dataclass(frozen=True)
class Method:
    """A declared method: `run(model, inputs, params, seeds, scorer, report)` returns a Result."""

    name: str
    title: str
    summary: str
    paper: str
    family: str
    needs: frozenset[str]
    inputs: type
    params: type
    run: Callable[..., Result]
    draw: Callable[[Run], Figure]
    seeds: tuple[int, ...]
    check: Callable[..., None] | None
    saves: str = ""
    lays_edits: bool = False
    combine: Callable[..., dict[str, Trace]] | None = None
    complete: Callable[..., Any] | None = None
    unsaved: Callable[[Any], str] | None = None

    @property
    def endpoint(self) -> str:
        """The name with underscores, for HTTP."""
        return self.name.replace("-", "_")

    @property
    def samples(self) -> bool:
        """Whether the method takes seeds."""
        return bool(self.seeds)


def method(
    name: str,
    *,
    title: str,
    summary: str,
    paper: str,
    family: str,
    inputs: type,
    params: type,
    draw: Callable[[Run], Figure],
    needs: set[str] = frozenset(),
    seeds: tuple[int, ...] = (0,),
    check: Callable[..., None] | None = None,
    saves: str = "",
    lays_edits: bool = False,
    combine: Callable[..., dict[str, Trace]] | None = None,
    complete: Callable[..., Any] | None = None,
    unsaved: Callable[[Any], str] | None = None,
) -> Callable:
    """Registers the decorated function. `check(inputs, params, seeds)` refuses a request before it is queued;
    `saves` says what the method makes that its command's --save writes to a file. `lays_edits`: the method
    lays the request's edits over by itself, from the keyword argument `edits` (audit.Stack); it needs some.
    `combine(results)`: the method's own arrays over several prompts, which a sweep shows. `complete(inputs,
    edits)`: the inputs with what the request's edits (audit.Stack) say in place of those not given.
    `unsaved(params)`: why there would be nothing for --save, "" when there is something.
    """

    def register(run: Callable[..., Result]) -> Callable[..., Result]:
        rest = (frozenset(needs), inputs, params, run, draw, seeds, check, saves)
        hooks = (lays_edits, combine, complete, unsaved)
        METHODS[name] = Method(name, title, summary, paper, family, *rest, *hooks)
        return run

    return register


@cache
def load_methods() -> Mapping[str, Method]:
    """Imports every file of studio/methods and returns METHODS."""
    package = import_module("studio.methods")
    for module in iter_modules(package.__path__):
        import_module(f"studio.methods.{module.name}")
    return METHODS


def find_method(name: str) -> Method:
    """The method of that name, or a sentence that offers the nearest."""
    methods = load_methods()
    if name not in methods:
        near = get_close_matches(str(name), methods, 1)
        raise RequestError(
            f"There is no method {str(name)[:60]!r}; "
            + (f"did you mean {near[0]!r}?" if near else f"known methods: {', '.join(sorted(methods))}.")
        )
    return methods[name]


def parse(method: Method, given: Mapping[str, Any], seeds: Any = None) -> tuple[Any, Any, tuple[int, ...]]:
    """Checked (inputs, params, seeds) of a request; None stands for a default. RequestError says what is
    wrong."""
    known = {f.name for c in (method.inputs, method.params) for f in fields(c)}
    if unknown := set(given) - known:
        name = sorted(unknown)[0]
        near = get_close_matches(name, known, 1)
        raise RequestError(
            f"{method.name} has no option {name[:60]!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
        )
    built = [
        c(**{f.name: _coerce(method, c, f, given.get(f.name)) for f in fields(c)})
        for c in (method.inputs, method.params)
    ]
    return built[0], built[1], parse_seeds(method, seeds)


def parse_seeds(method: Method, seeds: Any) -> tuple[int, ...]:
    """Seeds from "0,1,2", one integer or a list; at least one, whole numbers from 0 to 2**32 - 1, no two
    alike."""
    if seeds is None:
        return method.seeds
    if not method.samples:
        raise RequestError(f"{method.name} does not sample, so it takes no seeds.")
    parts = (
        [p.strip() for p in seeds.split(",") if p.strip()]
        if isinstance(seeds, str)
        else list(seeds)
        if isinstance(seeds, (list, tuple))
        else [seeds]
    )
    try:
        numbers = tuple(int(p) for p in parts if not isinstance(p, bool) and int(p) == float(p))
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if not parts:
        raise RequestError("No seeds are given; give at least one, for example --seeds 0,1,2.")
    if len(numbers) != len(parts) or any(not 0 <= n < 2**32 for n in numbers):
        raise RequestError(
            f"Seeds must be whole numbers from 0 to {2**32 - 1}, separated by commas, not "
            f"{str(seeds)[:60]!r}."
        )
    if len(set(numbers)) != len(numbers):
        raise RequestError("Each seed may be given once; a seed is repeated.")
    return numbers


def hints(cls: type) -> dict[str, Any]:
    """Resolved types of a dataclass's fields."""
    return typing.get_type_hints(cls)


def base_type(hint: Any) -> tuple[Any, bool]:
    """(type without None, whether None is allowed)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        rest = [a for a in typing.get_args(hint) if a is not type(None)]
        return rest[0], True
    return hint, False


def _coerce(method: Method, cls: type, knob_: Any, value: Any) -> Any:
    option = "--" + knob_.name.replace("_", "-")
    kind, optional = base_type(hints(cls)[knob_.name])
    if value is None or (value == "" and kind is not str):
        if knob_.default is not MISSING:
            return knob_.default
        raise RequestError(f"{option} is missing: {knob_.metadata['help']}.")
    if kind is bool:
        if not isinstance(value, bool):
            raise RequestError(f"{option} must be true or false, not {str(value)[:60]!r}.")
        return value
    if kind in (int, float):
        return _number(option, knob_, kind, value)
    if kind is str:
        return _text(option, knob_, value, required=knob_.default is MISSING)
    return _texts(option, knob_, value, pairs=typing.get_args(kind)[:1] == (int,))


def _number(option: str, knob_: Any, kind: type, value: Any) -> int | float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    what = "a whole number" if kind is int else "a number"
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise RequestError(f"{option} must be {what}, not {str(value)[:60]!r}.")
    low, high = knob_.metadata["low"], knob_.metadata["high"]
    if (low is not None and number < low) or (high is not None and number > high):
        span = (
            f"from {low:g} to {high:g}"
            if None not in (low, high)
            else f"at least {low:g}"
            if high is None
            else f"at most {high:g}"
        )
        raise RequestError(f"{option} must be {span}, not {number:g}.")
    return kind(number)


def _text(option: str, knob_: Any, value: Any, *, required: bool) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{option} must be a text, not {type(value).__name__}.")
    if len(value) > MAX_TEXT:
        raise RequestError(f"{option} has {len(value):,} characters; at most {MAX_TEXT:,} are taken.")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise RequestError(f"{option} holds bytes that are no text; write it in UTF-8.")
    if required and not value.strip():
        raise RequestError(f"{option} is empty: {knob_.metadata['help']}.")
    if knob_.metadata["choices"]:
        _one_of(option, value, knob_.metadata["choices"])
    return value


def _texts(option: str, knob_: Any, value: Any, *, pairs: bool) -> tuple:
    parts = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else None
    if parts is None or not all(isinstance(p, (str, int) if pairs else str) for p in parts):
        raise RequestError(f"{option} must be a list of texts, not {type(value).__name__}.")
    if pairs:
        return tuple(
            _number(option, knob_, int, p) for part in parts for p in str(part).replace("-", ",").split(",")
        )
    choices = knob_.metadata["choices"]
    if choices and knob_.metadata["commas"]:
        parts = [p.strip() for part in parts for p in part.split(",") if p.strip()]
    out = tuple(_text(option, knob_, p, required=knob_.default is MISSING) for p in parts)
    if not out:
        raise RequestError(f"{option} is empty: {knob_.metadata['help']}.")
    return out


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = get_close_matches(value, choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RequestError(f"{option} must be one of {', '.join(choices)}, not {value[:60]!r}{hint or '.'}")


def plain(record: Any) -> dict[str, Any]:
    """A dataclass of knobs as JSON values (tuples become lists)."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(record).items()}
