"""Word maps: where over the image the cross-attention of a prompt's words lies.

A word's map is the mean probability with which image positions attend to its tokens, over heads, layers
(each enlarged to the size of the latents) and denoising steps, conditional rows only: DAAM, arXiv 2210.04885.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.figures import POSITIVE
from studio.measure import METRICS, Question, score
from studio.methods.text_to_image import (
    SamplingParams,
    ScoreParams,
    image_name,
    image_trace,
    warn_lost_tokens,
)
from studio.models.tokens import find_span
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace

MOST_VALUES = 2**28  # of a breakdown by layer, head or step


@dataclass(frozen=True)
class Inputs:
    """The prompt, and which of its words are looked for."""

    prompt: str = knob(REQUIRED, "the text to draw")
    words: tuple[str, ...] | None = knob(
        None, "words or phrases of the prompt; default every word of it", commas=False
    )


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams, ScoreParams):
    """How to draw, and what else to keep."""

    height: int | None = knob(None, "height; default is the model's own", unit="pixels", low=8, high=4096)
    width: int | None = knob(None, "width; default is the model's own", unit="pixels", low=8, high=4096)
    by: str | None = knob(
        None,
        "also keep the maps of each layer, head or step, at the size of the latents",
        choices=("layer", "head", "step"),
        advanced=True,
    )
    metric: str | None = knob(
        None, "also score each image: clip, distance or probability", choices=tuple(METRICS), advanced=True
    )


def occurrences(prompt: str, word: str) -> list[tuple[int, int]]:
    """Characters (start, end) of every place of `word` in the prompt; RequestError when there is none."""
    found = [find_span(prompt, word, 1, "--words")]
    while True:
        try:
            found.append(find_span(prompt, word, len(found) + 1, "--words"))
        except RequestError:
            return found


def word_spans(prompt: str, words: Sequence[str] | None) -> dict[str, tuple[int, int]]:
    """Characters of each word by its label; a word that stands there more than once is numbered."""
    asked = words or re.findall(r"\w+(?:['’-]\w+)*", prompt) or [prompt]
    spans = {}
    for word in dict.fromkeys(w.strip() for w in asked):
        places = occurrences(prompt, word)
        names = [word] if len(places) == 1 else [f"{word} ({i + 1})" for i in range(len(places))]
        spans |= dict(zip(names, places, strict=True))
    return spans


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """Refuses words that the prompt has not."""
    word_spans(inputs.prompt, inputs.words)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) uint8 in grey, coloured where the map (H, W) is high, from its least value to its
    largest."""
    grey = image.astype(float).mean(-1, keepdims=True)
    share = ((heat - heat.min()) / max(float(np.ptp(heat)), 1e-12))[..., None]
    colour = np.array([int(POSITIVE[i : i + 2], 16) for i in (1, 3, 5)], float)
    return (grey * (1 - share) * 0.8 + colour * share).round().clip(0, 255).astype(np.uint8)


def draw(run: Run) -> Figure:
    """A row a seed: the image, then each word's map over it (the first eight)."""
    maps, images = run.result.arrays["maps"], run.result.arrays["images"]
    words, seeds = maps.axis("word").labels[:8], maps.axis("seed").labels[:8]
    rows = [
        [images.values[0, j], *(overlay(images.values[0, j], maps.values[j, w]) for w in range(len(words)))]
        for j in range(len(seeds))
    ]
    data = {"images": rows, "rows": [f"seed {s}" for s in seeds], "cols": ["image", *words]}
    return Figure("strip", data, title=f"{run.recipe.model}: “{run.recipe.inputs['prompt']}”")


@method(
    "word-maps",
    title="Word maps",
    paper="arXiv:2210.04885",
    family="diffusion",
    summary="Where over the image the cross-attention of a prompt's words lies.",
    needs={"cross_attention"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
)
def word_maps(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`maps` (seed, word, height, width) at the image's size, `images` (prompt, seed, height, width, channel)
    uint8, `maps_by` (seed, word, part, height, width) when asked for."""
    warn_lost_tokens(model, [inputs.prompt], report)
    work = _WordMaps(model, inputs, params, seeds, report)
    for start in range(0, len(seeds), report.rows):
        work.take_seeds(seeds[start : start + report.rows])
        report.partial(work.result(scorer))
    return work.result(scorer)


class _WordMaps:
    """Maps and images of the seeds that are done."""

    def __init__(
        self, model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], report: Report
    ) -> None:
        import torch

        from studio.models.sampling import new_scheduler

        self.model, self.inputs, self.params, self.seeds, self.report = model, inputs, params, seeds, report
        self.plan = model.plan(params)
        self.size = self.plan.height // model.vae_factor, self.plan.width // model.vae_factor
        row, spans = model.tokens(inputs.prompt), word_spans(inputs.prompt, inputs.words)
        self.words = tuple(spans)
        self.weights = torch.zeros(len(spans), row.length, device=model.device)
        for w, (name, span) in enumerate(spans.items()):
            places = list(row.covering(span, name))
            self.weights[w, places] = 1 / len(places)
        self.cond, _ = model.encode([inputs.prompt])
        self.calls = len(new_scheduler(model, self.plan).timesteps)
        self.parts: tuple[str, ...] = ()
        self.done: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        report.plan(len(seeds) * self.calls, "denoising")

    def take_seeds(self, seeds: Sequence[int]) -> None:
        """Maps and images of some seeds in one batch."""
        from studio.models.attention_maps import attention_of
        from studio.models.sampling import trajectory

        n, final = len(seeds), None
        uncond, cond = self.model.unconditional(n, self.plan), self.cond.rows([0] * n)
        skip = n if uncond is not None else 0
        with attention_of(self.model) as tape:
            self._begin(tape, n)
            for i, latents in trajectory(self.model, cond, uncond, seeds, self.plan):
                if i:
                    self._add(tape, i - 1, skip)
                self.report.step(n if i else 0)
                final = latents
        self.done.append(self._finish(self.model.decode(final)))

    def _begin(self, tape: Any, n: int) -> None:
        """Empty sums for n rows, and what the parts of a breakdown are called."""
        names = {
            "layer": list(tape.layers),
            "head": [f"{name} head {h}" for i, name in enumerate(tape.layers) for h in range(tape.heads(i))],
            "step": [str(i) for i in range(self.calls)],
        }
        self.parts = tuple(names.get(self.params.by, ()))
        shape = (n, len(self.words), *self.size)
        if (total := len(self.seeds) * int(np.prod(shape[1:])) * len(self.parts)) > MOST_VALUES:
            raise RequestError(
                f"Maps by {self.params.by} would be {total:,} numbers; take fewer seeds or words, or leave "
                "out --by."
            )
        self._sum = self.weights.new_zeros(shape)
        self._by = self.weights.new_zeros(n, len(self.words), len(self.parts), *self.size)

    def _add(self, tape: Any, call: int, skip: int) -> None:
        """The maps of one step."""
        from studio.models.attention_maps import enlarge

        head = 0
        for i in range(len(tape.layers)):
            found = tape.onto(i, self.weights, skip).permute(0, 3, 1, 2)  # rows, words, heads, positions
            mean = enlarge(found.mean(2), *self.size)
            self._sum += mean / (self.calls * len(tape.layers))
            if self.params.by == "layer":
                self._by[:, :, i] += mean / self.calls
            elif self.params.by == "step":
                self._by[:, :, call] += mean / len(tape.layers)
            elif self.params.by == "head":
                count = found.shape[2]
                single = enlarge(found.flatten(0, 1), *self.size).unflatten(0, found.shape[:2])
                self._by[:, :, head : head + count] += single / self.calls
                head += count

    def _finish(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(images, maps at their size, breakdown) of a batch."""
        from studio.models.attention_maps import resized

        maps = resized(self._sum, *images.shape[1:3])
        return images, maps.cpu().numpy(), self._by.cpu().numpy() if self.parts else None

    def result(self, scorer: Any) -> Result:
        """Everything that is done."""
        images, maps = (np.concatenate([d[i] for d in self.done]) for i in (0, 1))
        seed = Axis("seed", tuple(map(str, self.seeds[: len(images)])))
        word = Axis("word", self.words)

        def plane(height: int, width: int) -> tuple[Axis, Axis]:
            return Axis("height", tuple(map(str, range(height)))), Axis(
                "width", tuple(map(str, range(width)))
            )

        unit = "mean attention probability"
        arrays = {
            "maps": Trace(maps, (seed, word, *plane(*maps.shape[2:])), unit),
            "images": image_trace(images[None], Axis("prompt", (self.inputs.prompt,)), seed),
        }
        if self.parts:
            part = Axis(self.params.by, self.parts)
            by = np.concatenate([d[2] for d in self.done])
            arrays["maps_by"] = Trace(by, (seed, word, part, *plane(*self.size)), unit)
        if self.params.metric:
            clean = np.broadcast_to(images[:1], images.shape)
            question = Question(self.params.target or self.inputs.prompt, self.params.against)
            found = score(self.params.metric, images, clean, question, scorer)
            arrays["scores"] = Trace(found, (seed,), self.params.metric)
        named = {}
        for j, s in enumerate(seed.labels):
            named[image_name(f"seed{s}")] = images[j]
            for w, name in enumerate(self.words):
                named[image_name(f"seed{s}", f"{w}", name)] = overlay(images[j], maps[j, w])
        values = {n: getattr(self.plan, n) for n in ("steps", "guidance", "scheduler", "height", "width")}
        return Result(arrays, values, named)
