"""What an edit did: how much of the concept it takes away, what it takes from neighbours along with it, and
what that means in a sentence.

Scores are (prompt, seed), each image against its own text; prompts are the unit. All amounts are shares of
the same total: the mean drop of the concept's score when its replacement stands in the prompt instead.
efficacy = mean(before - after) / total over the concept's prompts, leak = the same over its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import numpy as np

from studio.edits import Active, Composer, check_fit, overlay
from studio.errors import RequestError
from studio.measure import LEVEL, nested_bootstrap, rank_agreement

WORKS, HARDLY, LEAKS = 0.5, 0.2, 0.2  # shares of the total at which the verdict changes its words
_ALL_ORDERS = 8  # up to so many places every order is tried


@dataclass(frozen=True, eq=False)
class Stack:
    """The edits of a request, for a method that lays them over by itself."""

    active: tuple[Active, ...]
    force: bool = False
    composer: Composer = field(default_factory=Composer)

    def check(self, model: Any) -> None:
        """RequestError when an edit was made for another model."""
        check_fit(model, self.active, force=self.force)

    @contextmanager
    def laid(self, model: Any, strength: float = 1.0) -> Iterator[None]:
        """All of them over the model's weights, each strength times `strength`."""
        scaled = [replace(a, strength=a.strength * strength) for a in self.active]
        with overlay(model, scaled, force=self.force, composer=self.composer):
            yield

    @property
    def concepts(self) -> dict[str, str]:
        """{concept: replacement} of the edits' own records; the first replacement where there are several."""
        found: dict[str, str] = {}
        for edit in (a.edit for a in self.active):
            others = [*edit.replacements, *[""] * len(edit.concepts)]
            for concept, other in zip(edit.concepts, others, strict=False):
                found.setdefault(concept, other)
        return found

    def about(self, concept: str | None, replacement: str | None) -> tuple[str, str | None]:
        """(concept, replacement) to look at: those given, else what the edits record. RequestError when they
        record no concept, or several."""
        recorded = self.concepts
        if concept is not None and not concept.strip():
            raise RequestError("--concept is empty; name it, or leave it out for what the edit file says.")
        if concept is None:
            if not recorded:
                raise RequestError("The edit does not say which concept it edits; name it with --concept.")
            if len(recorded) > 1:
                raise RequestError(
                    f"The edit is of {len(recorded)} concepts ({', '.join(recorded)[:200]}); say which one "
                    "to audit with --concept."
                )
            concept = next(iter(recorded))
        known = {c.strip().lower(): other for c, other in recorded.items()}
        return concept, replacement if replacement is not None else known.get(concept.strip().lower())


# ---- amounts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A mean over prompts with its 95 % interval; NaN where there is none."""

    mean: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        """Of (prompt, seed); a prompt with a NaN (which the scorer can't read) is left out."""
        whole = [row for row in np.asarray(values, np.float64) if np.isfinite(row).all()]
        if not whole:
            return cls()
        low, high = nested_bootstrap(whole)
        return cls(float(np.mean(whole)), float(low), float(high))

    def by(self, total: float) -> Spread:
        """As a share of a total, which is taken as known; none where it is not above 0."""
        if not total > 0:
            return Spread()
        return Spread(self.mean / total, self.low / total, self.high / total)

    @property
    def known(self) -> bool:
        """Whether there is a mean."""
        return bool(np.isfinite(self.mean))

    def __str__(self) -> str:
        if not self.known:
            return "an unknown share"
        span = f" ({100 * self.low:.0f} to {100 * self.high:.0f})" if np.isfinite(self.low) else ""
        return f"{100 * self.mean:.0f} %{span}".replace("-0 ", "0 ").replace("-0)", "0)")


def total_effect(before: np.ndarray, replaced: np.ndarray, least: float = 0.0) -> float:
    """Mean drop of the concept's score (prompt, seed) when its replacement is drawn instead; NaN when it is
    under `least`, since shares of it would say nothing."""
    total = Spread.of(before - replaced).mean
    return total if total > 0 and total >= least else float("nan")


def change_by_prompt(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high), each (prompt,), of after - before, the intervals over seeds."""
    change = np.asarray(after, np.float64) - before
    spans = [nested_bootstrap([row]) for row in change]
    low, high = (np.array([s[i] for s in spans], np.float32).reshape(len(change)) for i in (0, 1))
    return change.mean(1).astype(np.float32), low, high


def rms(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square pixel difference, range 0 to 1, of images (..., H, W, 3) uint8."""
    gap = (a.astype(np.float64) - b.astype(np.float64)) / 255
    return np.sqrt((gap**2).mean(axis=(-3, -2, -1))).astype(np.float32)


def smallest_strength(
    reach: Callable[[float], float], strengths: Sequence[float], wanted: float, halvings: int = 3
) -> float | None:
    """The smallest strength whose efficacy `reach(strength)` is at least `wanted`: the first of the given
    ones that reaches it, then halved towards the one before. None when none does."""
    low = 0.0
    for high in sorted(s for s in strengths if s > 0):
        if reach(high) >= wanted:
            for _ in range(halvings):
                middle = (low + high) / 2
                low, high = (low, middle) if reach(middle) >= wanted else (middle, high)
            return high
        low = high
    return None


# ---- agreement of two maps --------------------------------------------------------------------------------


def rank_chance(a: np.ndarray, b: np.ndarray) -> float:
    """How often chance gives a rank correlation as large or larger in absolute value: over all orders of `b`
    for up to 8 places, else by Student's t. NaN where there is no correlation."""
    both = np.isfinite(a) & np.isfinite(b)
    a, b = np.asarray(a, np.float64)[both], np.asarray(b, np.float64)[both]
    found = rank_agreement(a, b)
    if not np.isfinite(found):
        return float("nan")
    from scipy.stats import rankdata, spearmanr

    if len(a) > _ALL_ORDERS:
        return float(spearmanr(a, b).pvalue)
    x, y = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    orders = np.array(list(permutations(y)))
    products = np.abs(orders @ x)
    return float((products >= abs(x @ y) - 1e-9).mean())


# ---- the verdict ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What one scorer says: shares of its own total."""

    scorer: str
    efficacy: Spread
    leak: Spread
    unrelated: Spread


def verdict(concept: str, findings: Sequence[Finding]) -> str:
    """One sentence; its first words go by the least efficacy and the largest leak that any scorer finds."""
    known = [f for f in findings if f.efficacy.known]
    if not known:
        return (
            f"It can't be told whether the edit works: “{concept}” and its replacement score alike before "
            "it; take another replacement, another scorer or more seeds."
        )
    least = min((f.efficacy for f in known), key=lambda s: s.mean)
    most = max((f.leak for f in known if f.leak.known), key=lambda s: abs(s.mean), default=Spread())
    said = f"{_lead(least, most)}: of what its replacement would take from its score, “{concept}” loses "
    said += "; ".join(_shares(f) for f in known)
    return said + "."


def _shares(finding: Finding) -> str:
    said = f"{finding.efficacy} by {finding.scorer}"
    said += f", its neighbours {finding.leak}" if finding.leak.known else ""
    return said + (f", unrelated prompts {finding.unrelated}" if finding.unrelated.known else "")


def _lead(efficacy: Spread, leak: Spread) -> str:
    """Works and stays local, fails, …; "on this little evidence" when the interval reaches past the bound."""
    reach = efficacy.mean
    words = "Works" if reach >= WORKS else "Works in part" if reach >= HARDLY else "Fails"
    if leak.known:
        leaks, kept = abs(leak.mean) > LEAKS, "stays local" if reach >= HARDLY else "leaves neighbours alone"
        words += f" {'and' if leaks == (reach < HARDLY) else 'but'} {'leaks' if leaks else kept}"
    bound = WORKS if reach >= WORKS else HARDLY
    sure = efficacy.low >= bound if reach >= bound else efficacy.high < bound
    inside = -LEAKS <= leak.low and leak.high <= LEAKS
    if not sure or (leak.known and not (inside or leak.low > LEAKS or leak.high < -LEAKS)):
        words += f" (not certain at {100 * LEVEL:.0f} %)"
    return words


# ---- the passport -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """How a map stands to what edits did: Spearman's correlation over the windows, how often chance gives as
    much, success at the window that the map points at and at the best one, the median of random sets, and the
    share of them that do at least as well as the map's window."""

    rank_correlation: float
    rank_chance: float
    success_localized: float
    success_best: float
    success_random: float
    randoms_as_good: float


def standing(effect: np.ndarray, success: np.ndarray, randoms: np.ndarray) -> Standing:
    """Of direct effects and success (window,), and success of random sets; NaN where not measured."""
    here, known = float(success[int(np.argmax(effect))]), randoms[np.isfinite(randoms)]
    best = float(np.nanmax(success)) if np.isfinite(success).any() else float("nan")
    middle, share = (
        (float(np.median(known)), float((known >= here).mean())) if len(known) else (np.nan, np.nan)
    )
    return Standing(rank_agreement(effect, success), rank_chance(effect, success), here, best, middle, share)


def passport_verdict(
    concept: str, pointed: str, best: str | None, said: Sequence[tuple[str, Standing, dict[str, float]]]
) -> str:
    """One sentence of each scorer's (name, standing, success by set); its first words go by the first's."""
    name, first, success = said[0]
    if best is None or not np.isfinite(first.success_localized):
        return (
            f"It can't be told whether the map of “{concept}” says where an edit works: the concept and its "
            "replacement score alike, or too little is measured yet."
        )
    if first.rank_correlation >= WORKS and first.rank_chance <= 1 - LEVEL:
        lead = "The map says where this edit works"
    elif first.success_localized >= 0.9 * first.success_best > 0 and first.randoms_as_good <= 0.1:
        lead = "The map finds a good place and does not rank the others"
    else:
        lead = "The map does not say where this edit works"
    text = f"{lead}: it points at {pointed}, where efficacy minus leak is {first.success_localized:.2f}; the "
    text += f"best window is {best} with {first.success_best:.2f}"
    if np.isfinite(first.success_random):
        text += (
            f", random sets reach {first.success_random:.2f} (median), and {100 * first.randoms_as_good:.0f}"
        )
        text += " % of them do as well as the map's window"
    others = [f"{label.split(':')[0]} {v:.2f}" for label, v in success.items() if ":" in label]
    others = [o for o in others if not o.startswith("random") and "nan" not in o]
    text += f"; {', '.join(others)}" if others else ""
    for scorer, s, _ in said:
        if np.isfinite(s.rank_correlation):
            text += f"; rank correlation over the windows {s.rank_correlation:.2f} by {scorer}"
            text += f" (chance gives as much in {100 * s.rank_chance:.0f} %)"
    return text + "."
