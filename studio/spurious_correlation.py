"""What ablating the components that carry the background does to heads that learned to look at it.

Linear heads learn two things of the Atlas world from pictures in which 95 % of each stand on a background of
their own, and answer pictures in which the background says nothing. One head learns from all labels, others
from a few, of which one in twenty is on the other background. The first components for the background, in
the order of `rank-components` on the biased pictures, give their means over those pictures: the direct effect
z - sum (c_i - mean c_i), and the true ablation, in which all later layers run on the means. Beside them
random sets of as many components. After the experiments on Waterbirds of arXiv 2406.01583.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studio.atlas.groups import GroupOptions, group_scenes
from studio.atlas.render import render
from studio.atlas.world import Scenes
from studio.methods.component_choice import Choice, first_components
from studio.models.ablation import OutputMeans, ablated, branches
from studio.models.component_space import Space, open_space
from studio.models.corpus import Sums
from studio.planted import Say

STATES = ("direct effect", "true ablation")
MEASURES = ("average", "worst group")
Scores = dict[str, tuple[float, float]]  # by kind of head its average over images and its worst group


@dataclass(frozen=True)
class Settings:
    """objects: the two labels; learn, test: pictures of each; few, heads: labelled pictures of each that a
    head of few labels sees, and how many such heads; share: of a label's pictures on its own background while
    learning; sizes: how many components are ablated; draws: random sets of each size; rows: of a forward."""

    objects: tuple[str, str] = ("circle", "ring")  # the pair that both models confuse most
    learn: int = 500
    test: int = 200
    few: int = 20
    heads: int = 10
    share: float = 0.95
    sizes: tuple[int, ...] = (2, 5, 10)
    draws: int = 20
    rows: int = 50
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images (N, 64, 64, 3) uint8, labels (N,) 0 or 1, groups (N,) 0 to 3: label and background."""

    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(cls, scenes: Scenes) -> Pictures:
        """The renderings of `group_scenes`; labels by the order of their numbers in the world."""
        labels = (scenes.object == scenes.object.max()).astype(int)
        papers = (scenes.background == scenes.background.max()).astype(int)
        images = [render(scenes.pick(part)) for part in np.array_split(np.arange(len(scenes)), 10)]
        return cls(np.concatenate(images), labels, 2 * labels + papers)


@dataclass(frozen=True, eq=False)
class Head:
    """A linear head: label 1 where z w + b > 0."""

    weight: np.ndarray
    bias: float

    def score(self, z: np.ndarray, pictures: Pictures) -> tuple[float, float]:
        """Average and worst-group accuracy of representations (N, dim)."""
        right = (z @ self.weight + self.bias > 0) == (pictures.labels == 1)
        return float(right.mean()), min(float(right[pictures.groups == g].mean()) for g in range(4))


def few_labels(pictures: Pictures, count: int, heads: int, share: float) -> list[np.ndarray]:
    """For so many heads the places of `count` pictures of each label, of which round(share * count) are of
    the label's larger group. No picture is given to two heads while there are enough."""
    sizes = [round(share * count), count - round(share * count)]
    found: list[list[np.ndarray]] = [[] for _ in range(heads)]
    for label in (0, 1):
        groups = [np.flatnonzero(pictures.groups == 2 * label + k) for k in (0, 1)]
        for size, places in zip(sizes, sorted(groups, key=len, reverse=True), strict=True):
            for n, mine in enumerate(found):
                mine.append(np.resize(np.roll(places, -n * size), size))
    return [np.concatenate(mine) for mine in found]


def fitted_head(z: np.ndarray, labels: np.ndarray, decay: float = 1e-3) -> Head:
    """Logistic regression on standardised z (N, dim), with `decay` / 2 times the squared norm of its
    weights."""
    from scipy.optimize import minimize

    mean, deviation = z.mean(0), z.std(0) + 1e-6
    x, sign = (z - mean) / deviation, 2.0 * labels - 1

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ w[:-1] + w[-1])
        pull = -sign / (1 + np.exp(np.clip(margin, -50, 50))) / len(x)
        gradient = np.append(x.T @ pull + decay * w[:-1], pull.sum())
        return float(np.logaddexp(0, -margin).mean() + decay / 2 * w[:-1] @ w[:-1]), gradient

    w = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    weight = w[:-1] / deviation
    return Head(weight, float(w[-1] - mean @ weight))


class Trial:
    """One model: its heads, the order of its components for the background, and what ablations cost."""

    def __init__(self, model: Any, clip: Any, aligner: str | None, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.space, texts = open_space(model, clip, aligner)
        self.own = Space(model)
        learn = self._pictures(settings.share, settings.learn, settings.seed)
        self.test = self._pictures(0.5, settings.test, settings.seed + 1)
        self.branches = tuple(branches(model.layout))
        z, statistics = self._learned(learn)
        few = few_labels(learn, settings.few, settings.heads, settings.share)
        self.heads = {
            "all labels": [fitted_head(z, learn.labels)],
            f"{settings.few} labels of each": [fitted_head(z[i], learn.labels[i]) for i in few],
        }
        every = Choice(None, len(self.branches), "background", None, None)
        self.order, self.ranks = first_components(self.space, texts, statistics, every, self.branches)
        self.pixels = [model.pixels(list(part)) for part in self._batches(self.test.images)]
        parts = [self.own.whole.run(x) for x in self.pixels]
        self.z = np.concatenate([p.representation.double().numpy() for p in parts])
        self.off = {
            c: np.concatenate([p.components[c].double().numpy() for p in parts]) - self.means[c]
            for c in self.branches
        }

    def _pictures(self, share: float, n: int, seed: int) -> Pictures:
        asked = GroupOptions(Path(), objects=self.settings.objects, share=share, n=n, seed=seed)
        return Pictures.of(group_scenes(asked))

    def _batches(self, images: np.ndarray) -> list[np.ndarray]:
        return np.array_split(images, max(1, len(images) // self.settings.rows))

    def _learned(self, learn: Pictures) -> tuple[np.ndarray, Any]:
        """(representations (N, dim), statistics in the texts' space) of the biased pictures; their means."""
        outputs, sums, z = OutputMeans(self.model.layout, self.branches), Sums(), []
        totals: dict[str, np.ndarray] = {}
        for part in self._batches(learn.images):
            with outputs.counting(len(part)):
                parts = self.space.whole.run(self.model.pixels(list(part)))
            sums.add(self.space, parts)
            z.append(parts.representation.double().numpy())
            for c in self.branches:
                totals[c] = totals.get(c, 0) + parts.components[c].double().numpy().sum(0)
        self.outputs = outputs.means()
        self.means = {c: total / len(learn.images) for c, total in totals.items()}
        return np.concatenate(z), sums.statistics()

    def scores(self, z: np.ndarray) -> Scores:
        """Of representations (N, dim) of the test pictures; the mean over the heads of a kind."""
        found = {kind: [head.score(z, self.test) for head in heads] for kind, heads in self.heads.items()}
        return {kind: tuple(np.mean(scores, axis=0).tolist()) for kind, scores in found.items()}

    def without(self, chosen: Sequence[str]) -> dict[str, Scores]:
        """By state of STATES, without these components."""
        direct = self.z - sum(self.off[c] for c in chosen)
        with ablated(self.model.layout, {c: self.outputs[c] for c in chosen}):
            true = [self.model.representation(x).double().numpy() for x in self.pixels]
        return {"direct effect": self.scores(direct), "true ablation": self.scores(np.concatenate(true))}

    def at_random(self, size: int) -> list[dict[str, Scores]]:
        """The same for random sets of so many components."""
        from studio.atlas.plants import draws

        draw = draws(self.settings.seed + size)
        sets = [draw.choice(self.branches, size, replace=False) for _ in range(self.settings.draws)]
        return [self.without(tuple(map(str, chosen))) for chosen in sets]


def rows_of(title: str, trial: Trial) -> list[dict[str, Any]]:
    """Rows of the benchmark: before, and for each size and state the background's components beside random
    ones."""
    settings, found = trial.settings, []
    taken = {n: (trial.without(trial.order[:n]), trial.at_random(n)) for n in settings.sizes}
    how = f"mean of {{}} heads, {len(trial.test.labels) // 4} pictures a group"
    for kind, before in trial.scores(trial.z).items():
        said = how.format(len(trial.heads[kind]))
        found += _both(f"{title}, {kind}, whole model", before, said)
        for n, (mine, others) in taken.items():
            for state in STATES:
                name = f"{title}, {kind}, without {n} of {len(trial.branches)}, {state}"
                beside = np.array([o[state][kind] for o in others])
                found += _beside(name, mine[state][kind], beside, ", ".join(trial.order[:n]))
    return found


def _both(name: str, score: tuple[float, float], how: str) -> list[dict[str, Any]]:
    return [_row(f"{name}: {what}", v, how) for what, v in zip(MEASURES, score, strict=True)]


def _beside(name: str, mine: tuple[float, float], random: np.ndarray, chosen: str) -> list[dict[str, Any]]:
    """Rows of one ablation and of random sets (sets, 2) of as many components."""
    found = []
    for what, value, others in zip(MEASURES, mine, random.T, strict=True):
        said = f"{chosen}; {int((others >= value).sum())} of {len(others)} random sets reach as much"
        found.append(_row(f"{name}: {what}", value, said))
        spread = f"mean of {len(others)} sets; sd {others.std(ddof=1):.3f}, best {others.max():.3f}"
        found.append(_row(f"{name}, random sets: {what}", float(others.mean()), spread))
    return found


def _row(name: str, value: float, how: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": "share right", "bar": None, "holds": None, "how": how}


def measure_correlation(
    models: Mapping[str, tuple[Any, Any, str | None]], say: Say, settings: Settings | None = None
) -> list[dict[str, Any]]:
    """Rows of the benchmark for {name: (model, the CLIP whose texts are used or None, aligner or None)}."""
    found: list[dict[str, Any]] = []
    for name, (model, clip, aligner) in models.items():
        found += rows_of(f"spurious correlation, {name}", Trial(model, clip, aligner, settings or Settings()))
        say(f"spurious correlation, {name}: done")
    return found
