"""A small request of every method but align, which needs more images than come with Locus; for the
benchmark's shares, operations, memory and growth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio.diffusion_race import OTHER, PROMPT
from studio.models.catalog import ASSETS
from studio.planted import Quiet

Call = Callable[[], Any]
CONTEXT, ASKED = "The capital of Arvonia is Quill.", "The capital of Arvonia is"
LATE = "white background"  # few tokens come after it, so few cells of a trace differ


@dataclass(frozen=True)
class Request:
    """A method's smallest useful request: the model, its options, its seeds."""

    model: str
    given: Mapping[str, Any]
    seeds: tuple[int, ...] = (0,)


_FEW: Mapping[str, Any] = {"steps": 2, "guidance": 2.0}
_SCORED: Mapping[str, Any] = {**_FEW, "metric": "distance"}
_CROSS: Mapping[str, Any] = {**_SCORED, "kinds": ["cross-attention"], "hint": False}
_SEEN: Mapping[str, Any] = {"images": [str(ASSETS / "atlas" / "examples")]}
_READ: Mapping[str, Any] = {"prompt": ASKED, "context": CONTEXT, "subject": "Arvonia", "attribute": "Quill"}
_CHANGE: Mapping[str, Any] = {"concept": "star", "replacement": "circle"}
_FEATURE: Mapping[str, Any] = {"feature": "star", "features": ["star"], "top": 1}
REQUESTS: dict[str, Request] = {
    "generate": Request("atlas-sd", {"prompt": [PROMPT], **_SCORED}, tuple(range(8))),
    "trace-unet": Request("atlas-sd", {"prompt": PROMPT, "subject": "red star", **_CROSS}),
    "trace-text-encoder": Request(
        "atlas-sd", {"prompt": PROMPT, "subject": LATE, **_SCORED, "kinds": ["mlp"]}
    ),
    "lens": Request("atlas-sd", {"prompt": PROMPT, **_FEW}),
    "word-maps": Request("atlas-sd", {"prompt": PROMPT, **_FEW}, tuple(range(16))),
    "localize": Request("atlas-sd", {"prompt": PROMPT, "replacement": OTHER, **_SCORED, "hint": False}),
    "neurons": Request("atlas-sd", {"concept": "star", "neutral": "thing", **_SCORED, "layers": ["0", "2"]}),
    "attribute": Request("atlas-sd", {"concept": PROMPT, "steps": 2, "ratio": 0, "check": 0}),
    "edit": Request("atlas-sd", {"concept": ["star"], "replacement": ["circle"], **_FEW, "images": False}),
    "audit": Request(
        "atlas-sd", {**_CHANGE, **_SCORED, "neighbours": ["heart"], "unrelated": ["a house"]}, (0,)
    ),
    "passport": Request(
        "atlas-sd", {**_CHANGE, **_SCORED, "neighbours": ["heart"], "templates": ["{}"], "randoms": 20}
    ),
    "decompose": Request("atlas-clip", {**_SEEN, "texts": ["a star", "a circle"]}),
    "text-span": Request("atlas-clip", {**_SEEN, "length": 5}),
    "rank-components": Request("atlas-clip", {**_SEEN, "features": ["star"]}),
    "retrieve-images": Request(
        "atlas-clip", {**_SEEN, "text": "a star", "components": ["block.1.attention"]}
    ),
    "ablate-components": Request("atlas-clip", {**_SEEN, "texts": ["a star", "a circle"], **_FEATURE}),
    "trace-language": Request("atlas-llama", {"prompt": ASKED, "subject": "Arvonia"}),
    "knockout": Request("atlas-llama", {"prompt": ASKED, "context": CONTEXT, "attribute": "Quill"}),
    "contributions": Request("atlas-llama", {"prompt": ASKED, "context": CONTEXT}),
    "context-use": Request("atlas-llama", {**_READ, "controls": 1, "samples": 2}),
}


def requested(
    name: str, model: Any, *, seeds: Sequence[int] | None = None, rows: int = 16, **given: Any
) -> Call:
    """A call that runs a method's small request on a loaded model, without a scorer. given: options in place
    of the request's."""
    from studio.registry import find_method, parse

    method, asked = find_method(name), REQUESTS[name]
    wanted = list(asked.seeds if seeds is None else seeds) if method.samples else None
    parsed = parse(method, {**asked.given, **given}, wanted)
    return lambda: method.run(model, *parsed, None, Quiet(rows))
