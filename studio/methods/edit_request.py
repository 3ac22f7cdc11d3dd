"""Requests for closed-form edits: what is refused, with which sentence, and the record it starts from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from studio.errors import RequestError
from studio.methods.concept_pairs import check_templates
from studio.types import Edit, Report

LARGE = 1.0  # size of a change by that of the weights
MISSED = 0.1  # share of the asked change that is missed
MOST_PROMPTS = 4096  # concepts, guides and preserved texts in all templates


def check_request(inputs: Any, params: Any) -> None:
    """RequestError for what can be refused without the model."""
    concepts, replacements = pair_up(inputs.concept, inputs.replacement)
    for concept, other in zip(concepts, replacements, strict=True):
        if " ".join(concept.lower().split()) == " ".join(other.lower().split()):
            raise RequestError(f"The concept {concept[:60]!r} is its own replacement; give another one.")
    both = set(concepts) & {p.strip() for p in inputs.preserve or ()}
    if both or not all(p.strip() for p in inputs.preserve or ()):
        raise RequestError(
            f"{min(both)[:60]!r} can't be edited and preserved at once."
            if both
            else "--preserve is empty; name a text that must stay as it is."
        )
    check_templates("--templates", params.templates)
    texts = len(set(concepts) | set(inputs.preserve or ())) + len(replacements)
    if (n := texts * len(params.templates)) > MOST_PROMPTS:
        raise RequestError(
            f"{n} prompts in one edit are too many; at most {MOST_PROMPTS}: take fewer concepts or templates."
        )
    if params.strength == 0:
        raise RequestError("--strength 0 would change nothing.")
    if params.method == "quickfix" and params.layers is not None:
        raise RequestError("quickfix edits one matrix of the text encoder, so it takes no --layers.")
    shares(params.ratios, concepts)


def pair_up(concepts: tuple[str, ...], replacements: tuple[str, ...] | None) -> tuple[tuple, tuple]:
    """Concepts and replacements, as many of each; one concept may have several."""
    if not replacements:
        raise RequestError("--replacement is missing: what the concept becomes; an empty one erases it.")
    if len(concepts) == 1:
        concepts = concepts * len(replacements)
    if len(concepts) != len(replacements):
        raise RequestError(
            f"--concept is given {len(concepts)} times and --replacement {len(replacements)} times; give one "
            "for each concept (an empty one erases it), or several for one concept."
        )
    pairs = [(c.strip(), r.strip()) for c, r in zip(concepts, replacements, strict=True)]
    if len(set(pairs)) < len(pairs):
        raise RequestError("A concept is given twice with the same replacement.")
    return tuple(c for c, _ in pairs), tuple(r for _, r in pairs)


def shares(given: str | None, concepts: tuple[str, ...]) -> tuple[float, ...]:
    """The share of each replacement in its concept's value, from 0 to 1 for a concept in all."""
    if given is None:
        return tuple(1 / concepts.count(c) for c in concepts)
    parts = [p.strip() for p in given.split(",") if p.strip()]
    try:
        found = tuple(map(float, parts))
    except ValueError:
        found = ()
    if len(found) != len(concepts) or not all(0 < r <= 1 for r in found):
        raise RequestError(
            f"--ratios must be {len(concepts)} numbers above 0 and at most 1, one for each replacement, with "
            f"commas, not {given[:60]!r}."
        )
    for concept in concepts:
        if (total := math.fsum(r for r, c in zip(found, concepts, strict=True) if c == concept)) > 1 + 1e-9:
            raise RequestError(f"--ratios of {concept[:60]!r} sum to {total:g}; at most 1.")
    return found


def record(model: Any, inputs: Any, params: Any, form: Any) -> Edit:
    """The edit without its deltas: everything that its keys can be built from again. `form` has the method's
    defaults."""
    concepts, replacements = pair_up(inputs.concept, inputs.replacement)
    lam = params.regularization if params.regularization is not None else form.REGULARIZATION
    kept = {
        "templates": list(params.templates),
        "positions": params.positions or form.POSITIONS,
        "ratios": list(shares(params.ratios, concepts)),
        "preserve": list(dict.fromkeys(p.strip() for p in inputs.preserve or ())),
        "regularization": float(lam),
        "strength": float(params.strength),
    }
    return Edit({}, model.fingerprint, concepts, kept, params.method, replacements)


def warn_of_size(concepts: int, values: Mapping[str, Any], report: Report) -> None:
    """Warns of a change as large as the weights, and of concepts that are too many to be met; `values` are
    those of a solved edit."""
    size, missed = values["relative_size"], values["values_missed"] or 0.0
    if size >= LARGE:
        times = f"{size:.2g} times " if size >= 1.05 else ""
        report.warn(
            f"The change is {times}as large as the weights that it changes, so images of other "
            "things may suffer too; audit it, take fewer concepts at once, or raise --regularization."
        )
    if missed >= MISSED:
        crowded = values["keys"] > values["width"]
        advice = "" if size >= LARGE else ", or lower --regularization"
        reason = f": {values['keys']} tokens are to change, and a token has {values['width']} numbers"
        report.warn(
            f"The edit of {concepts} concept{'s' if concepts > 1 else ''} misses {100 * missed:.0f} % of the "
            f"change that was asked for{reason if crowded else ''}; take fewer concepts at once{advice}."
        )


def layer_names(model: Any, asked: tuple[str, ...]) -> list[str]:
    """Names of cross-attention layers in execution order, from names, numbers, `first-last`, or `all`."""
    names = [str(s.layer) for s in model.unet_sites(["cross-attention"])]
    chosen: set[int] = set()
    for part in (p.strip() for a in asked for p in a.split(",")):
        span = re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", part)
        if part in names:
            chosen.add(names.index(part))
        elif part == "all":
            chosen.update(range(len(names)))
        elif span and int(span[1]) <= int(span[2] or span[1]) < len(names):
            chosen.update(range(int(span[1]), int(span[2] or span[1]) + 1))
        else:
            near = get_close_matches(part, names, 1, 0.3)
            raise RequestError(
                f"--layers: {part[:80]!r} is no cross-attention layer of {model.id}; they are numbered 0 to "
                f"{len(names) - 1} in execution order" + (f", or named like {near[0]}." if near else ".")
            )
    return [names[i] for i in sorted(chosen)]
