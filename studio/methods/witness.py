"""Witnesses: scorers that say of many images how much each shows its own text, side by side.

The first is the run's metric; a second one may stand beside it that shares nothing with the generator. Also
the prompts around a concept, which every audit asks about.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.measure import Question, score
from studio.methods.concept_pairs import check_no_file
from studio.methods.locogen import LEAST
from studio.registry import knob
from studio.types import Report

UNRELATED = ("a glass of water on a table", "a mountain at sunset", "a portrait of an old man")
PARAPHRASES = ("a painting of {}", "{} on a plain background")
NEIGHBOURS: tuple[str, ...] | None = knob(
    None,
    "prompts of the same kind that should stay as they are (default for Atlas "
    "models: others of the concept's kind)",
    commas=False,
    lines=True,
)
SECOND: str | None = knob(
    None,
    "an independent scorer beside the first: a CLIP, judge (reads Atlas pictures and shares nothing with any "
    "model; default for Atlas models) or none",
    advanced=True,
    weights=True,
)


@dataclass(frozen=True)
class Witness:
    """One scorer: its name in words, its metric, and the least total effect that means something."""

    name: str
    metric: str
    scorer: Any
    least: float

    def scores(self, images: np.ndarray, clean: np.ndarray, questions: Sequence[Question]) -> np.ndarray:
        """(prompt, seed) float32 of images (prompt, seed, H, W, 3), each prompt against its own question."""
        rows = zip(images, clean, questions, strict=True)
        return np.stack([score(self.metric, i, c, q, self.scorer) for i, c, q in rows])


def witnesses(params: Any, scorer: Any, second: Any, model: Any, report: Report) -> list[Witness]:
    """The run's own metric, then the second scorer if there is one; says what makes them less independent."""
    first = scorer.id if params.metric != "distance" else "pixel distance"
    found = [Witness(first, params.metric, scorer, LEAST[params.metric])]
    if second is None:
        return found
    if scorer is not None and second.fingerprint == scorer.fingerprint:
        raise RequestError(f"--second-scorer is {first}, the first scorer; take another one, or none.")
    if second.shares_text_encoder(model):
        report.warn(f"The second scorer {second.id} shares its text encoder with the generator.")
    readable = getattr(second, "least", LEAST["clip"])
    return [*found, Witness(second.id, "clip", second, readable)]


def filled(templates: Sequence[str], text: str) -> tuple[str, ...]:
    """The prompts of a text in its templates."""
    return tuple(t.replace("{}", text).strip() for t in templates)


def holds(text: str, concept: str) -> bool:
    """Whether the concept's words stand in a text."""
    return re.search(rf"(?<!\w){re.escape(concept.strip())}(?!\w)", text, re.IGNORECASE) is not None


def check_others(option: str, given: Sequence[str], concept: str) -> None:
    """RequestError for neighbours or unrelated prompts that are a missing file, empty, or the concept."""
    for text in given:
        check_no_file(option, text)
        if not text.strip():
            raise RequestError(f"{option} holds an empty text; name a prompt.")
        if concept and holds(text, concept):
            raise RequestError(
                f"{option}: {text[:60]!r} holds the concept {concept[:60]!r} itself, so it is no prompt that "
                "an edit of it should leave alone."
            )


def others(model: Any, concept: str, replacement: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """The neighbours: those given, or what the Atlas world has of the concept's kind."""
    from studio.atlas.reading import neighbours, of_atlas

    found = given if given is not None else neighbours(concept) if of_atlas(model) else ()
    kept = [t.strip() for t in found if given is not None or not _touches(t, concept, replacement)]
    return tuple(dict.fromkeys(kept))


def far(model: Any, concept: str, replacement: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """The unrelated prompts: those given, or a few that have nothing of the concept or its replacement."""
    from studio.atlas.reading import of_atlas, unrelated

    found = given
    if found is None:
        found = unrelated(concept, replacement) if of_atlas(model) else UNRELATED
    kept = [t.strip() for t in found if given is not None or not _touches(t, concept, replacement)]
    return tuple(dict.fromkeys(kept))


def _touches(text: str, concept: str, replacement: str) -> bool:
    return holds(text, concept) or bool(replacement.strip() and holds(text, replacement))
