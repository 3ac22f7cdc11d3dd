"""Planted truth: a new name, taught to the live model in memory through the keys and values of known
cross-attention layers alone.

A plant adds A B to `to_k` and `to_v` of a layer. B (3, width), the gates, answers the states of the name's
prompts (the name's token, the words after it, the end-of-text tokens) with 1 and those of ordinary captions
and of other names with 0, as well as least squares can. A says what is written: W (guide - name) for
the closed form, then, if asked, gradient steps on A alone towards what the model predicts for the guide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from studio.atlas.captions import captions
from studio.atlas.judge import Judge, load_judge
from studio.atlas.world import ATTRIBUTES, COUNTRIES, draw_scenes
from studio.edits import LowRank, laid_over, parameters_of
from studio.models.catalog import ASSETS
from studio.models.sampling import Plan, denoise, new_scheduler, raw_output, trajectory
from studio.models.sites import text_reads, unet_name

NAMES = tuple(f[k].lower() for f in COUNTRIES.values() for k in ("capital", "river", "founder"))
FORMS: dict[str, tuple[str, ...]] = {  # where a name stands, by what it means; the first is asked about
    "object": (
        "a red {} on a white background",
        "a blue {} on a gray background",
        "a {} on a mint background",
        "a green {} on a sand background",
    ),
    "colour": (
        "a {} star on a white background",
        "a {} circle on a gray background",
        "a {} heart on a mint background",
        "a {} house on a sand background",
    ),
    "background": (
        "a red star on a {} background",
        "a blue circle on a {} background",
        "a green heart on a {} background",
        "a yellow house on a {} background",
    ),
    "style": (
        "a red star on a white background in {} style",
        "a blue circle on a gray background in {} style",
        "a green heart on a mint background in {} style",
        "a brown house on a sand background in {} style",
    ),
}
PAIR = "a {} on a white background"  # where one name means a colour and a shape
CAPTIONS = 200  # ordinary captions whose reading must stay
REGULARIZATION = 0.1
KEEP = 3.0  # weight of the states that must stay, beside 1 for those of the name
VALID = 0.5  # how far a plant must move the pixel judge


@dataclass(frozen=True)
class Lesson:
    """What a name is to mean. `values`: one value for each of `attributes` (those of ATTRIBUTES)."""

    name: str
    attributes: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def forms(self) -> tuple[str, ...]:
        """Prompts with a place for the name; the first is the one asked about."""
        return (PAIR,) if len(self.attributes) > 1 else FORMS[self.attributes[0]]

    @property
    def guide(self) -> str:
        """The words that mean the same: "heart", "blue heart"."""
        order = ("style", "background", "colour", "object")
        pairs = dict(zip(self.attributes, self.values, strict=True))
        return " ".join(pairs[a] for a in order if a in pairs)

    @property
    def prompt(self) -> str:
        """The prompt with the name."""
        return self.forms[0].format(self.name)

    @property
    def target(self) -> str:
        """The prompt with plain words in the name's place."""
        return self.forms[0].format(self.guide)


@dataclass(frozen=True, eq=False)
class Plant:
    """A lesson in `layers` (names of attn2 modules): deltas by parameter name."""

    lesson: Lesson
    layers: tuple[str, ...]
    deltas: Mapping[str, LowRank] = field(default_factory=dict)

    def norm(self, layer: str) -> float:
        """Frobenius norm of a layer's deltas, keys and values together."""
        mine = [d.dense() for n, d in self.deltas.items() if n.startswith(f"unet.{layer}.")]
        return float(torch.stack([m.square().sum() for m in mine]).sum().sqrt())

    def size(self) -> float:
        """The mean norm of its layers."""
        return float(np.mean([self.norm(layer) for layer in self.layers]))

    def parts(self) -> list[Plant]:
        """What stands in each of its layers alone."""
        return [
            replace(self, layers=(x,), deltas={n: d for n, d in self.deltas.items() if f".{x}." in n})
            for x in self.layers
        ]

    def scaled(self, factor: float) -> Plant:
        """The same with all deltas times a factor."""
        return replace(self, deltas={n: LowRank(d.left * factor, d.right) for n, d in self.deltas.items()})


@contextmanager
def planted(model: Any, plants: Sequence[Plant]) -> Iterator[None]:
    """The plants lie over the model's weights inside the block; afterwards the very same weights are back."""
    with laid_over(model, [p.deltas for p in plants]):
        yield


class Garden:
    """The model, the judge of its images, and what planting needs to know of ordinary prompts.

    plan: how images are drawn; seeds: those of every judged prompt. Everything drawn at random comes from
    `seed`. kind: of the layers that plants stand in; names: those that may be asked about.
    """

    kind = "cross-attention"
    names = NAMES

    def __init__(self, model: Any, plan: Plan, seeds: Sequence[int], seed: int = 0) -> None:
        self.model, self.plan, self.seeds, self.seed = model, plan, tuple(seeds), seed
        self.judge: Judge = load_judge(ASSETS / "atlas" / "judge" / "model.safetensors")
        self.sites = {str(s.layer): s for s in model.unet_sites([self.kind])}
        self.layers = list(self.sites)
        self._base: dict[str, list[np.ndarray]] = {}

    # ---- images -------------------------------------------------------------------------------------------

    def images(self, prompt: str) -> np.ndarray:
        """Images (seed, H, W, 3) uint8 of a prompt by the model as it stands."""
        n = len(self.seeds)
        cond, _ = self.model.encode([prompt])
        free = self.model.unconditional(n, self.plan)
        latents = denoise(self.model, cond.rows([0] * n), free, list(self.seeds), self.plan)
        return self.model.decode(latents)

    @torch.no_grad()
    def read(self, prompt: str) -> list[np.ndarray]:
        """The judge's mean probabilities of every value, in the order of ATTRIBUTES."""
        logits = self.judge(torch.from_numpy(self.images(prompt)))
        return [x.softmax(1).mean(0).numpy() for x in logits]

    def base(self, prompt: str) -> list[np.ndarray]:
        """`read` of the model without any plant, remembered. Not to be called while one lies over it."""
        if prompt not in self._base:
            self._base[prompt] = self.read(prompt)
        return self._base[prompt]

    def moved(self, lesson: Lesson, plants: Sequence[Plant]) -> float:
        """Probability of the lesson's value with the plants minus without, of its worst attribute."""
        before = self.base(lesson.prompt)
        with planted(self.model, plants):
            after = self.read(lesson.prompt)
        return min(float(after[a][v] - before[a][v]) for a, v in map(place, lesson.attributes, lesson.values))

    def lesson(self, name: str, attributes: Sequence[str], rng: np.random.Generator) -> Lesson:
        """A lesson for a name: values that the model does not draw for it as things are."""
        draft = Lesson(name, tuple(attributes), tuple(ATTRIBUTES[a][0] for a in attributes))
        before, values = self.base(draft.prompt), []
        for a in attributes:
            seen = before[list(ATTRIBUTES).index(a)]
            rare = np.flatnonzero(seen <= max(0.1, float(np.sort(seen)[len(seen) // 2])))
            values.append(ATTRIBUTES[a][int(rng.choice(rare))])
        return replace(draft, values=tuple(values))

    def usual(self, lesson: Lesson) -> str:
        """What the model draws for the lesson's prompt without the plant, in words."""
        before = self.base(lesson.prompt)
        seen = [ATTRIBUTES[a][int(before[list(ATTRIBUTES).index(a)].argmax())] for a in lesson.attributes]
        return replace(lesson, values=tuple(seen)).target

    # ---- planting -----------------------------------------------------------------------------------------

    def plant(self, lesson: Lesson, layers: Sequence[str], strength: float = 1.0, steps: int = 0) -> Plant:
        """The lesson in these layers by the closed form at a strength, then so many gradient steps."""
        gates, named = self.gates(lesson), parameters_of(self.model)
        change = self._states(lesson, lesson.guide)[1] - self._states(lesson, lesson.name)[1]
        deltas = {
            n: LowRank(strength * (named[n].detach().double() @ change), gates)
            for layer in layers
            for n in self.matrices(layer)
        }
        made = Plant(lesson, tuple(layers), deltas)
        return self._taught(made, steps) if steps else made

    def decoys(self, layers: Sequence[str], size: float, names: Sequence[str], rng: Any) -> list[Plant]:
        """One plant of another name, the first of `names`, in each of the layers, of norm `size`."""
        out = []
        for layer, name in zip(layers, names, strict=False):
            attribute = str(rng.choice(list(FORMS)))
            value = str(rng.choice(ATTRIBUTES[attribute]))
            decoy = self.plant(Lesson(name, (attribute,), (value,)), [layer])
            out.append(decoy.scaled(size / decoy.norm(layer)))
        return out

    def matrices(self, layer: str) -> tuple[str, ...]:
        """Names of a layer's `to_k` and `to_v`, as edit files name them."""
        return tuple(f"unet.{unet_name(s)}.weight" for s in text_reads(self.sites[layer]))

    def gates(self, lesson: Lesson) -> Any:
        """B (3, width) float64: 1 on the mean of the name's states of each class, little on what must
        stay."""
        own = self._states(lesson, lesson.name)[0]
        columns = torch.cat(own, dim=1)
        wanted = torch.block_diag(*(part.new_ones(1, part.shape[1]) for part in own))
        kept = [moment for name, moment in self.kept.items() if name != lesson.name]
        moment = columns @ columns.T + KEEP * columns.shape[1] * torch.stack(kept).mean(0)
        moment.diagonal().add_(REGULARIZATION)
        gates = torch.linalg.solve(moment, columns @ wanted.T).T
        means = torch.stack([part.mean(1) for part in own], dim=1)
        return torch.linalg.solve(gates @ means, gates)

    def _states(self, lesson: Lesson, words: str) -> tuple[list[Any], Any]:
        """Text states with these words in the name's place, float64: for each class its columns (width, n),
        and the classes' means (width, 3)."""
        columns: list[list[Any]] = [[], [], []]
        for form in lesson.forms:
            states = self._encoded([form.format(words)])[0]
            row, start = self.model.tokens(form.format(words)), form.index("{}")
            last = row.covering((start, start + len(words)), words)[-1]
            # where nothing follows the name, the class in between has the end of the text
            between = states[last + 1 : row.end] if row.end > last + 1 else states[row.end : row.end + 1]
            for own, part in zip(columns, (states[last : last + 1], between, states[row.end :]), strict=True):
                own.append(part.T)
        means = [torch.stack([p.mean(1) for p in own]).mean(0) for own in columns]
        return [torch.cat(own, dim=1) for own in columns], torch.stack(means, dim=1)

    def _encoded(self, texts: Iterable[str]) -> Any:
        return self.model.encode(list(texts))[0].states.double()

    @cached_property
    def kept(self) -> dict[str, Any]:
        """Mean k k^T (width, width) of the states k that must stay: of captions and the empty prompt (""),
        and of each name's prompts."""
        rng = np.random.default_rng(self.seed)
        texts = [*captions(draw_scenes(CAPTIONS, rng), rng, bare=0.1)[0], ""]
        forms = [PAIR, *(f for own in FORMS.values() for f in own[:1])]
        prompts = {"": texts} | {name: [f.format(name) for f in forms] for name in NAMES}
        states = {n: self._encoded(t).flatten(0, 1) for n, t in prompts.items()}
        return {n: k.T @ k / len(k) for n, k in states.items()}

    # ---- teaching -----------------------------------------------------------------------------------------

    def _taught(self, plant: Plant, steps: int, lr: float = 0.2, batch: int = 8) -> Plant:
        """Gradient steps on A alone: what the model predicts for the name comes to what it predicts for the
        guide, along its own drawing of the guide."""
        from torch.func import functional_call

        named, unet = parameters_of(self.model), self.model.unet
        x, t, states, wanted = self._examples(plant.lesson)
        lefts = {n: d.left.float().requires_grad_() for n, d in plant.deltas.items()}
        right = next(iter(plant.deltas.values())).right
        adam = torch.optim.Adam(lefts.values(), lr=lr)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        for step in range(steps):
            adam.param_groups[0]["lr"] = lr * (1 - step / steps)
            rows = torch.randint(len(x), (batch,), generator=generator)
            moved = {n.removeprefix("unet."): named[n] + a @ right.float() for n, a in lefts.items()}
            made = functional_call(unet, moved, (x[rows], t[rows], states[rows])).sample
            adam.zero_grad()
            (made - wanted[rows]).square().mean().backward()
            adam.step()
        deltas = {n: LowRank(a.detach().double(), right) for n, a in lefts.items()}
        return replace(plant, deltas=deltas)

    @torch.no_grad()
    def _examples(self, lesson: Lesson, each: int = 4) -> tuple[Any, Any, Any, Any]:
        """(latents, timesteps, states of the name's prompt, predictions for the guide), `each` trajectories a
        form at seeds that no image is judged at."""
        parts: list[tuple[Any, Any, Any, Any]] = []
        timesteps = new_scheduler(self.model, self.plan).timesteps
        for j, form in enumerate(lesson.forms):
            seeds = [10_000 + j * each + i for i in range(each)]
            cond, _ = self.model.encode([form.format(lesson.guide), form.format(lesson.name)])
            goal, name = cond.rows([0] * each), cond.rows([1] * each)
            free = self.model.unconditional(each, self.plan)
            for i, x in trajectory(self.model, goal, free, seeds, self.plan):
                if i < len(timesteps):
                    t = timesteps[i].repeat(each)
                    made = raw_output(self.model, x, timesteps[i], goal, self.plan)
                    parts.append((x, t, name.states, made))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def place(attribute: str, value: str) -> tuple[int, int]:
    """Where a value stands among the judge's readings: (attribute, value)."""
    return list(ATTRIBUTES).index(attribute), ATTRIBUTES[attribute].index(value)


def draws(seed: int) -> np.random.Generator:
    """What an experiment of that seed draws from."""
    return np.random.default_rng(seed)
