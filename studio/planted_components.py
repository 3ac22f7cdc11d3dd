"""How far to trust the maps of feed-forward weights: component attribution and the UNet trace on models where
a name stands in known feed-forward modules (studio/atlas/feed_forward_plants.py).

The same experiment as in studio/planted.py, but for the place of plants and decoys, and for lessons: one is
tried in every module before the next, since what its closed forms need is measured for all of them at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from studio.planted import (
    INERT,
    ROUNDS,
    Answer,
    Case,
    Finders,
    Nursery,
    Say,
    Settings,
    drawing,
    experiment,
    table,
)

TITLE = "planted feed-forward"


class ComponentFinders(Finders):
    """The methods that look at feed-forward modules."""

    kinds = ("feed-forward",)
    components = ("feed-forward",)

    def ask(self, case: Case, usual: str) -> dict[str, Answer]:
        """Every method's answer; LocoGen looks at cross-attention alone and is not asked."""
        return {"UNet trace": self.trace(case, usual), "CAD": self.attribution(case)}


class ComponentNursery(Nursery):
    """Tries one lesson of each attribute in every module, then new ones in those that took it."""

    strengths = (3.0, 8.0)
    unhidden = "its decoys stand in its way, or all names mean the same"

    def single(self, rng: Any) -> list[Case]:
        """Cases of one module, as many as wanted where there are so many."""
        from studio.atlas.plants import FORMS

        wanted, cases = self.settings.plants, []
        places = {(a,): list(self.garden.layers) for a in FORMS}
        for _ in range(1 + ROUNDS if wanted else 0):
            for attributes, layers in places.items():
                names = self.names(rng)
                lesson = self.garden.lesson(names[0], attributes, rng) if layers else None
                grown = {x: self.tend(lesson, (x,), names[1:], rng) for x in layers}
                places[attributes] = [x for x, case in grown.items() if case is not None]
                cases += [case for case in grown.values() if case is not None]
            if len(cases) >= wanted:
                break
        return [cases[i] for i in rng.permutation(len(cases))[:wanted]]

    def hide(self, plant: Any, names: list[str], rng: Any) -> Case | None:
        """The plant among decoys, set against names that do not mean the same: features of names are much
        alike by the time they reach a feed-forward module. None when decoys stand in its way, or no such
        name is left."""
        if (case := super().hide(plant, names, rng)) is None:
            return None
        stack = [plant, *case.decoys]
        lessons = (replace(plant.lesson, name=name) for name in (case.control, *case.placebos))
        other = [x.name for x in lessons if self.garden.moved(x, stack) < INERT]
        return replace(case, control=other[0], placebos=tuple(other[1:])) if other else None


def measure_components(
    model: Any, scorer: Any, settings: Settings, say: Say, rows: int = 16
) -> list[dict[str, Any]]:
    """The whole experiment: rows of the benchmark. The model's weights are afterwards what they were."""
    from studio.atlas.feed_forward_plants import Bed

    settings = replace(settings, teach=0)  # the closed form alone
    bed = Bed(model, drawing(model, settings), range(settings.seeds), settings.seed)
    nursery = ComponentNursery(bed, settings, say)
    finders = ComponentFinders(model, scorer, settings, rows)
    return table(*experiment(bed, nursery, finders, settings, say), title=TITLE)
