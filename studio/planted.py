"""How far to trust the maps: methods that say where a concept is, on models where that is known.

Each planted model carries one name in known layers, and in every other layer a decoy: a plant of another
name, of equal norm. A model without a plant has decoys everywhere. Shares come with Wilson's 95 % interval
(Wilson 1927).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from studio.types import Result

Z = 1.959963984540054  # of a 95 % interval
STRENGTH = 1.5  # of the closed form
ROUNDS = 6  # at most so many further plants for each place that worked
INERT = 0.25  # decoys that move the judge this far are none
FAINT = 0.05  # what moves the judge less is not made stronger
_DRAWS = 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How many models are made, and how closely they are looked at.

    plants, pairs: valid plants wanted in one and in two layers. unplanted: models with decoys alone, at
    most one for each of the plants. seeds,
    steps: of every image. teach: gradient steps where the closed form is not enough. placebos: other names
    that component attribution is set against. seed: of everything drawn at random.
    """

    plants: int = 8
    pairs: int = 3
    unplanted: int = 8
    seeds: int = 5
    steps: int = 8
    teach: int = 0
    placebos: int = 9
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What a method says of a model: layers, the likeliest first, and whether it stands by the first."""

    ranked: tuple[str, ...]
    found: bool


@dataclass(frozen=True)
class Trial:
    """One model, its truth (no layers: no plant) and every method's answer. asked: where the name that is
    asked about is planted, or would be."""

    layers: tuple[str, ...]
    answers: dict[str, Answer]
    asked: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Case:
    """A plant that counts; decoys for the other layers, and `extra` ones that stand in its place in a model
    without it; names that mean nothing in its model: one to set against the plant, and placebos."""

    plant: Any
    decoys: tuple[Any, ...]
    extra: tuple[Any, ...]
    control: str
    placebos: tuple[str, ...]


@dataclass(eq=False)
class Quiet:
    """A Report that keeps warnings and shows nothing."""

    rows: int = 16
    warnings: list[str] = field(default_factory=list)

    def plan(self, total: int, what: str = "") -> None:
        """Nothing to show."""

    def step(self, n: int = 1) -> None:
        """Nothing to show."""

    def partial(self, result: Result) -> None:
        """Nothing to show."""

    def warn(self, sentence: str) -> None:
        """Kept: a method that warns does not stand by its map."""
        self.warnings.append(sentence)


# ---- scores -----------------------------------------------------------------------------------------------


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, hits of n; everything where nothing was tried."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, Z * Z
    half = Z * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = ((p + z2 / (2 * n) + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    return max(0.0, float(low)), min(1.0, float(high))


def is_hit(trial: Trial, method: str) -> bool:
    """Whether the planted layers (those asked about, where nothing is planted) are the method's first ones,
    in any order."""
    truth = trial.layers or trial.asked
    return set(trial.answers[method].ranked[: len(truth)]) == set(truth)


def row(name: str, yes: Sequence[bool], unit: str, how: str) -> dict[str, Any]:
    """One result of the benchmark: a share of trials, with its interval in words."""
    n, hits = len(yes), sum(yes)
    low, high = wilson(hits, n)
    said = f"{hits} of {n}, Wilson 95 % {low:.2f} to {high:.2f}; {how}"
    value = hits / n if n else None
    return {"name": name, "value": value, "unit": unit, "bar": None, "holds": None, "how": said}


def table(
    trials: Sequence[Trial], excluded: Sequence[str], tried: int, title: str = "planted"
) -> list[dict[str, Any]]:
    """All shares, method beside method. excluded: what did not count, of `tried` plants."""
    out = []
    for method in trials[0].answers if trials else ():
        for count, words in ((1, "one layer"), (2, "two layers")):
            mine = [t for t in trials if len(t.layers) == count]
            how = "the planted layer is its first" if count == 1 else "the planted layers are its first two"
            hits = [is_hit(t, method) for t in mine]
            out.append(row(f"{title} {method}: hits, {words}", hits, "of valid plants", how))
            sure = [h and t.answers[method].found for h, t in zip(hits, mine, strict=True)]
            how += ", and it stands by it"
            out.append(row(f"{title} {method}: sure hits, {words}", sure, "of valid plants", how))
        none = [t for t in trials if not t.layers]
        alarms, how = [t.answers[method].found for t in none], "it stands by a layer where nothing is planted"
        out.append(row(f"{title} {method}: false alarms", alarms, "of models without a plant", how))
        anyway = [is_hit(t, method) for t in none]
        how = "its first is the layer where the name would be planted, though it is not"
        out.append(row(f"{title} {method}: right by habit", anyway, "of models without a plant", how))
    left = [True] * len(excluded) + [False] * (tried - len(excluded))
    what = "; ".join(excluded) or "none"
    return [*out, row(f"{title}: excluded", left, "of plants made", f"left out: {what}")]


# ---- the methods ------------------------------------------------------------------------------------------


class Finders:
    """The methods under test, asked the same question about the present weights. kinds, components: where the
    UNet trace and component attribution look."""

    kinds: tuple[str, ...] = ("cross-attention",)
    components: tuple[str, ...] = ("to_k", "to_v")

    def __init__(self, model: Any, scorer: Any, settings: Settings, rows: int) -> None:
        self.model, self.scorer, self.settings, self.rows = model, scorer, settings, rows
        self.seeds = tuple(range(settings.seeds))

    def ask(self, case: Case, usual: str) -> dict[str, Answer]:
        """Every method's answer. usual: the prompt in words as the model draws it without the plant."""
        return {
            "LocoGen": self.locogen(case, usual),
            "UNet trace": self.trace(case, usual),
            "CAD": self.attribution(case),
        }

    def locogen(self, case: Case, usual: str) -> Answer:
        """Windows of one layer; sure when it gives no warning (effect above the placebo's)."""
        from studio.methods.locogen import Inputs, Params, localize

        lesson, report = case.plant.lesson, Quiet(self.rows)
        inputs = Inputs(prompt=lesson.prompt, replacement=self.other(case, case.control))
        params = Params(window=1, hint=False, steps=self.settings.steps, target=lesson.target, against=usual)
        found = localize(self.model, inputs, params, self.seeds, self.scorer, report)
        effect = found.arrays["direct_effect"].values * np.sign(found.values["total_effect"] or 1)
        layers = found.arrays["layers"].axis("layer").labels
        return Answer(ranked(layers, effect), not report.warnings)

    def trace(self, case: Case, usual: str) -> Answer:
        """Modules restored one by one; sure when it gives no warning (above chance)."""
        from studio.methods.causal_trace_unet import Params, trace_unet
        from studio.methods.text_to_image import CorruptionInputs

        lesson, report = case.plant.lesson, Quiet(self.rows)
        inputs = CorruptionInputs(prompt=lesson.prompt, replacement=self.other(case, case.control))
        params = Params(
            kinds=self.kinds, hint=False, steps=self.settings.steps, target=lesson.target, against=usual
        )
        found = trace_unet(self.model, inputs, params, self.seeds, self.scorer, report)
        effect = found.arrays["indirect_effect"]
        return Answer(ranked(effect.axis("layer").labels, effect.values), not report.warnings)

    def attribution(self, case: Case) -> Answer:
        """Module by module; sure when its first has more than any has for a placebo."""
        name, values = self._attributed(case, case.plant.lesson.name)
        placebos = [float(self._attributed(case, other)[1].max()) for other in case.placebos]
        return Answer(ranked(name, values), bool(values.max() > max(placebos, default=0.0)))

    def _attributed(self, case: Case, name: str) -> tuple[tuple[str, ...], np.ndarray]:
        from studio.methods.component_attribution import Inputs, Params, attribute

        inputs = Inputs(concept=self.other(case, name), base=self.other(case, case.control))
        params = Params(
            granularity="module", components=self.components, steps=self.settings.steps, ratio=0, check=0
        )
        found = attribute(self.model, inputs, params, self.seeds[:1], None, Quiet(self.rows)).arrays[
            "attribution"
        ]
        return tuple(n.removeprefix("unet.") for n in found.axis("component").labels), found.values

    @staticmethod
    def other(case: Case, name: str) -> str:
        """The plant's prompt with another name in it."""
        return case.plant.lesson.forms[0].format(name)


def ranked(labels: Sequence[str], values: np.ndarray) -> tuple[str, ...]:
    """Labels by value, the largest first."""
    return tuple(labels[i] for i in np.argsort(-np.asarray(values), kind="stable"))


# ---- the models -------------------------------------------------------------------------------------------


class Nursery:
    """Makes plants until enough of them count. strengths: of the closed form, a further one where the last
    moved the judge by FAINT; unhidden: why a plant that works fails among decoys."""

    strengths: tuple[float, ...] = (STRENGTH,)
    unhidden = "its decoys stand in its way"

    def __init__(self, garden: Any, settings: Settings, say: Say) -> None:
        self.garden, self.settings, self.say = garden, settings, say
        self.excluded: list[str] = []
        self.tried = 0

    def single(self, rng: Any) -> list[Case]:
        """Cases of one layer: every attribute in every layer once, then again where that worked."""
        from studio.atlas.plants import FORMS

        places = [((a,), (layer,)) for a in FORMS for layer in self.garden.layers]
        return self._enough([places[i] for i in rng.permutation(len(places))], self.settings.plants, rng)

    def double(self, cases: Sequence[Case], rng: Any) -> list[Case]:
        """Cases of a name that means a shape through one layer and a colour through another, each of them
        known to work from the cases of one layer."""
        known = {c.plant.lesson.attributes[0]: c.plant.layers[0] for c in cases}
        both = tuple(known[a] for a in ("object", "colour") if a in known)
        if len(set(both)) < 2:
            return []
        return self._enough([(("object", "colour"), both)], self.settings.pairs, rng)

    def _enough(self, places: list[tuple], wanted: int, rng: Any) -> list[Case]:
        """Each place once; then the places that gave a case again, until there are as many as wanted."""
        if not wanted:
            return []
        found = [(p, c) for p in places if (c := self.grow(*p, rng)) is not None]
        good = [p for p, _ in found]
        cases = [c for _, c in found]
        for turn in range(ROUNDS * len(good)):
            if len(cases) >= wanted:
                break
            if (case := self.grow(*good[turn % len(good)], rng)) is not None:
                cases.append(case)
        return [cases[i] for i in rng.permutation(len(cases))[:wanted]]

    def grow(self, attributes: tuple[str, ...], layers: tuple[str, ...], rng: Any) -> Case | None:
        """One plant with its decoys, or None when it does not count."""
        names = self.names(rng)
        return self.tend(self.garden.lesson(names[0], attributes, rng), layers, names[1:], rng)

    def names(self, rng: Any) -> list[str]:
        """The names that may be asked about, in any order."""
        return [self.garden.names[i] for i in rng.permutation(len(self.garden.names))]

    def tend(self, lesson: Any, layers: tuple[str, ...], names: list[str], rng: Any) -> Case | None:
        """One plant of a lesson with its decoys; names: of which these, its control and placebos may be."""
        from studio.atlas.plants import VALID

        garden, moved = self.garden, 0.0
        self.tried += 1
        attempts = [(s, 0) for s in self.strengths] + [(1.0, self.settings.teach)] * bool(self.settings.teach)
        why = "too weak"
        for i, (strength, steps) in enumerate(attempts):
            if i and not steps and moved < FAINT:
                continue
            plant = garden.plant(lesson, layers, strength, steps)
            if (moved := garden.moved(lesson, [plant])) >= VALID:
                why = self.unhidden
                if len(layers) > 1 and any(garden.moved(lesson, [p]) >= VALID for p in plant.parts()):
                    why = "one layer is enough"
                elif (case := self.hide(plant, names, rng)) is not None:
                    return case
        what = f"{lesson.guide} in {', '.join(map(short, layers))} ({moved:.2f}, {why})"
        self.excluded.append(what)
        self.say(f"{lesson.name} = {what}: excluded")
        return None

    def hide(self, plant: Any, names: list[str], rng: Any) -> Case | None:
        """The plant among decoys that do nothing themselves and leave it valid; None when three draws of
        them fail."""
        from studio.atlas.plants import VALID

        garden, lesson, own = self.garden, plant.lesson, set(plant.layers)
        layers = sorted(garden.layers, key=lambda x: (x in own, garden.layers.index(x)))
        split, count = len(layers) - len(own), self.settings.placebos
        for _ in range(_DRAWS):
            decoys = garden.decoys(layers, plant.size(), names, rng)
            if garden.moved(lesson, decoys) >= INERT:
                continue
            if (moved := garden.moved(lesson, [plant, *decoys[:split]])) >= VALID:
                self.say(
                    f"{lesson.name} = {lesson.guide} in {', '.join(map(short, plant.layers))}: {moved:.2f}"
                )
                control, *rest = (n for n in names if n not in {d.lesson.name for d in decoys})
                return Case(plant, tuple(decoys[:split]), tuple(decoys[split:]), control, tuple(rest[:count]))
        return None


def short(layer: str) -> str:
    """up 1.0 of up_blocks.1.attentions.0…attn2."""
    block, *rest = layer.split(".")
    numbers = [w for w in rest if w.isdigit()][: 1 if block == "mid_block" else 2]
    return f"{block.split('_')[0]} {'.'.join(numbers)}"


def measure(model: Any, scorer: Any, settings: Settings, say: Say, rows: int = 16) -> list[dict[str, Any]]:
    """The whole experiment, `rows` images at a time: rows of the benchmark. The model's weights are
    afterwards what they were."""
    from studio.atlas.plants import Garden

    garden = Garden(model, drawing(model, settings), range(settings.seeds), settings.seed)
    finders = Finders(model, scorer, settings, rows)
    return table(*experiment(garden, Nursery(garden, settings, say), finders, settings, say))


def drawing(model: Any, settings: Settings) -> Any:
    """How images are drawn."""
    from studio.models.sampling import Plan

    return Plan(steps=settings.steps, guidance=float(model.source.defaults.get("guidance", 3.0)))


def experiment(
    garden: Any, nursery: Nursery, finders: Finders, settings: Settings, say: Say
) -> tuple[list[Trial], list[str], int]:
    """(trials, plants that did not count, how many were tried): planted models, then those without."""
    from studio.atlas.plants import draws

    rng = draws(settings.seed)
    cases = nursery.single(rng)
    cases += nursery.double(cases, rng)
    trials = [trial(garden, finders, case, [case.plant, *case.decoys], say) for case in cases]
    for case in cases[: settings.unplanted]:  # once each: the same model again would count double
        trials.append(trial(garden, finders, case, [*case.decoys, *case.extra], say, layers=()))
    return trials, nursery.excluded, nursery.tried


def trial(
    garden: Any,
    finders: Finders,
    case: Case,
    plants: Sequence[Any],
    say: Say,
    layers: tuple[str, ...] | None = None,
) -> Trial:
    """All methods on one model."""
    from studio.atlas.plants import planted

    truth = case.plant.layers if layers is None else layers
    with planted(finders.model, plants):
        answers = finders.ask(case, garden.usual(case.plant.lesson))
        found = Trial(truth, answers, case.plant.layers)
    first = {m: f"{short(a.ranked[0])}{'' if a.found else ' (unsure)'}" for m, a in found.answers.items()}
    say(f"truth {', '.join(map(short, truth)) or 'none'}: {first}")
    return found
