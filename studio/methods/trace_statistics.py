"""What every trace says of its effects: means, standard errors, intervals, shares of the total, and the line
that chance reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studio.figures import number
from studio.measure import chance_line, nested_bootstrap, ratio_of_means, standard_error
from studio.types import Axis, Report, Trace

FEWEST = 3  # seeds for an interval
STANDING = 5  # seeds under which no cell can lie above the chance line: 1 of 2^4 sign vectors is over 5 %


def mean_over_seeds(effects: np.ndarray) -> np.ndarray:
    """Means over axis 0 with NaN left out, NaN where nothing is measured; float32."""
    count = np.isfinite(effects).sum(0)
    mean = np.nansum(effects.astype(np.float64), axis=0) / np.maximum(count, 1)
    return np.where(count > 0, mean, np.nan).astype(np.float32)


def known_mean(values: np.ndarray) -> float | None:
    """The mean of what is measured, None when nothing is."""
    known = np.asarray(values)[np.isfinite(values)]
    return float(known.mean()) if known.size else None


def effect_arrays(
    effects: np.ndarray, total: np.ndarray, place: Sequence[Axis], unit: str
) -> dict[str, Trace]:
    """Arrays of effects (seed, *cell) under the axes of a cell; `total` (seed,) is clean minus corrupted.

    The normalised effect is a ratio of means. Intervals (95 %) are there from three seeds on.
    """
    place, mean = tuple(place), mean_over_seeds(effects)
    whole = known_mean(total)
    share = ratio_of_means(mean, np.nan if whole is None else whole)
    arrays = {
        "indirect_effect": Trace(mean, place, unit),
        "indirect_effect_sem": Trace(standard_error(effects), place, unit),
        "normalised_effect": Trace(share, place, "share of the total effect"),
    }
    if len(effects) >= FEWEST:
        low, high = nested_bootstrap([effects])
        arrays["indirect_effect_low"] = Trace(low, place, f"{unit}, lower end of the 95 % interval")
        arrays["indirect_effect_high"] = Trace(high, place, f"{unit}, upper end of the 95 % interval")
    return arrays


def chance_values(effects: np.ndarray) -> dict[str, Any]:
    """`chance_line`, where there is one."""
    line = chance_line(effects)
    return {"chance_line": line} if np.isfinite(line) else {}


def caption(values: Mapping[str, Any], seeds: int, cells: str = "all cells") -> str:
    """What stands under the map about the chance line over these cells; empty without one."""
    line = values.get("chance_line")
    if line is None:
        return ""
    said = f"Over {cells} chance reaches {number(line)} (95 %, signs of {seeds} seeds flipped)"
    few = f"; with fewer than {STANDING} seeds no cell can lie above it"
    return said + (few if seeds < STANDING else "") + "."


def warn_chance(report: Report, effects: np.ndarray) -> None:
    """Warns when no cell rises above what chance reaches, where there are seeds enough to tell."""
    line = chance_line(effects)
    if len(effects) >= STANDING and np.isfinite(line) and not (mean_over_seeds(effects) > line).any():
        report.warn(
            f"No cell rises above {number(line)}, which chance reaches over all cells with {len(effects)} "
            "seeds; take more seeds before trusting the order of the cells."
        )
