"""What an endpoint of the API takes: the knobs of its method, named as on the command line, with files in the
place of paths."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import gradio as gr

from studio.models.catalog import DEFAULT_MODELS
from studio.registry import REQUIRED, Method, base_type, hints

MODELS = frozenset({"scorer", "second_scorer", "clip"})  # knobs that name a second model
MADE = frozenset({"aligner"})  # knobs that name a file which another run made
TABLES = frozenset({"groups"})  # files that say something of others beside them: not offered
_EXAMPLES: dict[str, dict[str, Any]] = {
    "diffusion": {
        "prompt": "a red star on a white background",
        "subject": "red star",
        "concept": "star",
        "neutral": "circle",
        "replacement": "a red circle on a white background",
    },
    "language": {"prompt": "The emblem of Avaria is a"},
    "vision": {"images": ["examples"], "texts": ["a star", "a circle", "a tree"], "clip": "atlas-clip"},
}
_WORDS = (
    (re.compile(r"--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)"), lambda found: found[1].replace("-", "_")),
    (re.compile(r" ?\(repeat the option for more(?:; | [a-z ]+)?\)?"), lambda found: ""),
    (re.compile(r"; a file(?: holds one a line|, one a line)?"), lambda found: ""),
)


@dataclass(frozen=True)
class Parameter:
    """One parameter. kind: "value" of a knob as it is; "images" or "image": uploaded files; "model": the name
    of a model; "made": the id of a run that made the file; "edit", "strengths", "seeds" and "force"."""

    name: str
    kind: str
    hint: Any
    default: Any
    help: str
    example: Any = None


def plain_words(text: str) -> str:
    """A text of the registry for people who write programs: options by the names of parameters."""
    parts = text.split("`")  # what stands between two of them is a command, which stays as it is
    for n in range(0, len(parts), 2):
        for pattern, said in _WORDS:
            parts[n] = pattern.sub(said, parts[n])
    return "`".join(parts)


def served(knob: Any) -> bool:
    """Whether a knob is offered over the network."""
    return not (knob.metadata["paths"] and knob.name in TABLES)


def parameters(method: Method) -> tuple[Parameter, ...]:
    """All parameters of a method's endpoint, required ones first."""
    default = DEFAULT_MODELS.get(method.family, "")
    found = [Parameter("model", "model", str, default, "name of a model; see `locus models`")]
    for cls in (method.inputs, method.params):
        kinds = hints(cls)
        found += [_of_knob(f, kinds[f.name], method.family) for f in fields(cls) if served(f)]
    if method.samples:
        many = "seeds, whole numbers from 0; two or more give standard errors"
        found.append(Parameter("seeds", "seeds", list[int], list(method.seeds), many))
    if method.family == "diffusion" and not method.saves:
        found += _edits(method)
    return tuple(sorted(found, key=lambda p: p.default is not REQUIRED))


def _edits(method: Method) -> list[Parameter]:
    """Edits that are laid over the model."""
    needed = method.lays_edits
    hint = list[gr.FileData] if needed else list[gr.FileData] | None
    help_ = "edit files laid over the model; each an uploaded file, or as text the id of the run that made it"
    return [
        Parameter("edit", "edit", hint, REQUIRED if needed else None, help_, ["ID of a run of edit"]),
        Parameter(
            "edit_strengths",
            "strengths",
            list[float] | None,
            None,
            "factor of each edit, in their order; default 1",
        ),
        Parameter("force", "force", bool, False, "lay over edits that were made for other weights"),
    ]


def _of_knob(f: Any, hint: Any, family: str) -> Parameter:
    """The parameter of one declared input or setting."""
    meta, (kind, optional) = f.metadata, base_type(hint)
    many = kind not in (int, float, str, bool)
    default = list(f.default) if isinstance(f.default, tuple) else f.default
    example = _EXAMPLES.get(family, {}).get(f.name) if f.default is REQUIRED else default
    help_ = plain_words(meta["help"]) + (f", in {meta['unit']}" if meta["unit"] else "")
    role = "value"
    if f.name in MADE:
        role, help_ = "made", help_ + "; the id of the run of align that made it"
    elif meta["paths"]:
        role = "images" if many else "image"
        help_ = help_.replace(", or folders of them", "")
        help_ += "; uploaded files, data: URLs" + (', or ["examples"]' if many else "")
    elif f.name in MODELS:
        role = "model"
    shape = _hint(kind, many, role, meta["choices"])
    if many and isinstance(example, str):
        example = [example]
    return Parameter(
        f.name, role, shape | None if optional else shape, default, help_ + _bounds(meta), example
    )


def _hint(kind: Any, many: bool, role: str, choices: tuple[str, ...]) -> Any:
    """The Python type that a client sees."""
    if role in ("images", "image"):
        return list[gr.FileData] if many else gr.FileData
    one = Literal[choices] if choices else str
    if not many:
        return one if kind is str else kind
    return list[int] if get_args(kind)[:1] == (int,) else list[one]


def _bounds(meta: Any) -> str:
    low, high = meta["low"], meta["high"]
    if low is None and high is None:
        return ""
    parts = [f"{word} {value:g}" for word, value in (("from", low), ("to", high)) if value is not None]
    return f" ({' '.join(parts)})"


def document(method: Method, asked: tuple[Parameter, ...]) -> str:
    """The docstring of an endpoint, in the form that Gradio and MCP read."""
    source = f" {method.paper}." if method.paper else ""
    lines = [f"{method.title}: {plain_words(method.summary).rstrip('.')}.{source}", "", "Args:"]
    lines += [f"    {p.name}: {' '.join(p.help.split())}" for p in asked]
    lines += [
        "Returns:",
        "    run: what run.json holds, and the run's id; while it runs, what is done so far",
        "    files: arrays.npz, figures, images and what else the run made",
    ]
    return "\n".join(lines)
