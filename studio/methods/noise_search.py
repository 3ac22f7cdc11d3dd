"""How much removing the subject from the prompt does, and the noise scale whose corruption does half as much.

Noise on token embeddings has no natural scale: at three standard deviations one model forgets the subject and
another draws it as before. Removing the subject's words is the yardstick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.methods.text_to_image import Bench, CorruptionInputs, corrupted_states
from studio.registry import knob
from studio.types import Report

SCALES = (5.0, 8.0, 12.0, 20.0)
ENOUGH = 0.5  # of what removing the subject does
LEAST = {"clip": 0.01, "probability": 0.02, "distance": 0.005}  # differences of scores that say little

SEARCH: bool = knob(
    False,
    "when noise does less than half of what removing the subject does, take the first larger scale of "
    f"{', '.join(f'{s:g}' for s in SCALES)} that does more; the scale used is among the run's values",
)


@dataclass(frozen=True)
class Noise:
    """The scale in use. After a search: what removing the subject took from the score of each seed (seed,),
    and each scale that was tried with its mean total effect."""

    scale: float
    removal: np.ndarray | None = None
    tried: tuple[tuple[float, float], ...] = ()

    def values(self) -> dict[str, Any]:
        """For the run's values."""
        said = "; ".join(f"{scale:g}: {effect:.4g}" for scale, effect in self.tried)
        return {"noise": self.scale} | ({"noise_tried": said} if said else {})


def without_subject(inputs: CorruptionInputs) -> str:
    """The prompt with the subject's words taken out."""
    from studio.models.tokens import find_span

    start, end = find_span(inputs.prompt, inputs.subject, inputs.subject_occurrence, "--subject")
    return " ".join((inputs.prompt[:start] + inputs.prompt[end:]).split())


def settle(bench: Bench, inputs: CorruptionInputs, params: Any, seeds: Sequence[int]) -> Noise:
    """The noise of a trace: `params.noise`, or what the search finds when it is asked for."""
    if not params.search_noise or inputs.replacement is not None:
        return Noise(params.noise)
    return _search(bench, inputs, params.noise, seeds)


def _search(bench: Bench, inputs: CorruptionInputs, start: float, seeds: Sequence[int]) -> Noise:
    """Scales from `start` upward until the mean total effect is half of the mean removal effect; the best one
    when none gets there. Nothing is tried when removing the subject changes nothing to speak of."""
    texts, _ = bench.model.encode([inputs.prompt, without_subject(inputs)])
    n, tried = len(seeds), []
    clean = removed = np.empty(0)
    for scale in [start] + [s for s in SCALES if s > start]:
        noisy = corrupted_states(bench.model, inputs, scale, seeds).rows(range(1, n + 1))
        if not tried:
            images = _images(bench, texts.rows([0] * n + [1] * n).join(noisy), [*seeds] * 3)
            first = images[:n]
            clean, removed, scores = (bench.score(i, first) for i in np.split(images, 3))
        else:
            scores = bench.score(_images(bench, noisy, list(seeds)), first)
        tried.append((scale, float((clean - scores).mean())))
        wanted = ENOUGH * float((clean - removed).mean())
        if tried[-1][1] >= wanted or 2 * wanted < LEAST[bench.params.metric]:
            return Noise(scale, clean - removed, tuple(tried))
    return Noise(max(tried, key=lambda pair: pair[1])[0], clean - removed, tuple(tried))


def _images(bench: Bench, cond: Any, seeds: Sequence[int]) -> np.ndarray:
    """Images of rows of text states, in batches, as a phase of its own for the progress bar."""
    bench.report.plan(len(cond) * bench.calls, "comparing with the subject removed")
    rows = range(0, len(cond), bench.report.rows)
    chunks = [list(range(s, min(len(cond), s + bench.report.rows))) for s in rows]
    return np.concatenate([bench.images(cond.rows(c), [seeds[i] for i in c]) for c in chunks])


def warn_weak(report: Report, noise: Noise, metric: str, total: float, removal: float) -> None:
    """Warns of a corruption that hardly changes the image, and of one that does less than half of what
    removing the subject does. `total`, `removal`: mean differences of scores, NaN where not measured."""
    if abs(total) < LEAST[metric]:
        report.warn(
            f"Clean and corrupted images hardly differ in score ({total:.3g}), so the effects say little; "
            "raise --noise, take another subject, or compare with --against."
        )
    if removal >= LEAST[metric] and total < ENOUGH * removal:
        advice = "raise --noise, or let --search-noise find a scale that does"
        report.warn(
            f"Noise of {noise.scale:g} takes {total:.3g} from the score, less than half of the {removal:.3g} "
            f"that removing the subject takes; {'no larger scale did more' if noise.tried else advice}."
        )
