"""What the text-to-image methods share: their options, corrupted prompts, and images that are scored as
they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.measure import METRICS, Question, score
from studio.models.catalog import SCHEDULERS
from studio.registry import REQUIRED, knob
from studio.types import Axis, Patch, Report, Result, Site, Trace


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Options of every method that makes images."""

    steps: int | None = knob(None, "denoising steps; default is the model's own", low=1, high=1000)
    guidance: float | None = knob(
        None, "guidance scale; 1 or less runs without the unconditional row", low=0, high=100
    )
    scheduler: str | None = knob(
        None,
        "sampler; default DDIM, or the one a distilled model needs",
        choices=tuple(SCHEDULERS),
        advanced=True,
    )


@dataclass(frozen=True, kw_only=True)
class ScoreParams:
    """How images are scored."""

    metric: str = knob(
        "clip",
        "what a number is: clip (cosine with the target), distance (minus the root mean square pixel "
        "difference to the clean image), probability (zero-shot, target beside against)",
        choices=tuple(METRICS),
    )
    target: str | None = knob(None, "text that images are scored against; default the prompt", advanced=True)
    against: str | None = knob(None, "a second text, whose score is subtracted", advanced=True)
    scorer: str | None = knob(
        None, "CLIP that scores; default atlas-clip for Atlas models", advanced=True, weights=True
    )


NOISE: float = knob(
    3.0,
    "noise on the subject's token embeddings",
    unit="standard deviations of the embedding matrix",
    low=0,
    high=1000,
)


@dataclass(frozen=True)
class CorruptionInputs:
    """The prompt, and what of it is corrupted."""

    prompt: str = knob(REQUIRED, "the text to draw")
    subject: str = knob("", 'part of the prompt that noise corrupts, for example "red star"')
    subject_occurrence: int | None = knob(
        None, "which occurrence of the subject, from 1", low=1, advanced=True
    )
    replacement: str | None = knob(None, "another prompt to swap in, instead of noise on the subject")


def check_corruption(inputs: CorruptionInputs) -> None:
    """Refuses a subject that is not in the prompt, or stands there more than once without saying which is
    meant."""
    from studio.models.tokens import find_span

    if inputs.replacement is None:
        if not inputs.subject.strip():
            raise RequestError(
                "--subject is missing: name the part of the prompt to corrupt, or give --replacement."
            )
    elif not inputs.replacement.strip():
        raise RequestError("--replacement is empty; give the prompt to swap in.")
    if inputs.subject.strip():
        find_span(inputs.prompt, inputs.subject, inputs.subject_occurrence, "--subject")


def corrupted_states(model: Any, inputs: CorruptionInputs, noise: float, seeds: Sequence[int]) -> Any:
    """Text states: row 0 of the prompt, row 1 + j of its corruption for seed j."""
    if inputs.replacement is not None:
        cond, _ = model.encode([inputs.prompt, inputs.replacement])
        return cond.rows([0] + [1] * len(seeds))
    patches = [
        p
        for j, s in enumerate(seeds)
        for p in corruption_patches(
            model, inputs.prompt, inputs.subject, inputs.subject_occurrence, noise, s, j + 1
        )
    ]
    cond, _ = model.encode([inputs.prompt] * (1 + len(seeds)), patches=patches)
    return cond


def warn_lost_tokens(model: Any, texts: Sequence[str], report: Report) -> None:
    """Warns of each prompt that is longer than the model reads, naming what is lost."""
    for text in texts:
        if lost := model.tokens(text).lost:
            report.warn(
                f"The prompt is longer than the {model.tokens(text).length} tokens that {model.id} reads; "
                f"lost: {lost[:200]!r}."
            )


def corruption_patches(
    model: Any, prompt: str, subject: str, occurrence: int | None, noise: float, seed: int, row: int
) -> list[Patch]:
    """Patches that add noise to the subject's token embeddings in one row, as the contract draws it.

    noise * sd * N(0, 1) with sd the standard deviation of all entries of the encoder's token-embedding
    matrix; one draw
    of shape (subject tokens, width) a seed; SDXL's second encoder continues the same generator.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(seed + 2**32)
    patches = []
    for part in model.encoders:
        places = model.subject_positions(prompt, subject, occurrence, part)
        drawn = torch.randn(len(places), model.embedding_width(part), generator=generator)
        patches.append(
            Patch(
                Site(part, 0, "embedding"),
                do="add",
                value=drawn * (noise * model.embedding_sd(part)),
                at=places,
                rows=(row,),
            )
        )
    return patches


@dataclass(frozen=True)
class Bench:
    """A model, a sampling plan and a question, ready to turn rows of text states into scored images."""

    model: Any
    plan: Any
    params: Any
    question: Question
    scorer: Any
    report: Report

    @classmethod
    def of(cls, model: Any, params: Any, prompt: str, scorer: Any, report: Report) -> Bench:
        """The bench of a method's parameters; the question is about `target`, by default the prompt."""
        question = Question(params.target or prompt, params.against)
        return cls(model, model.plan(params), params, question, scorer, report)

    def images(
        self, cond: Any, seeds: Sequence[int], patches: Sequence[Patch] = (), shadow: Any = None
    ) -> np.ndarray:
        """Images (N, H, W, 3) uint8 of N rows; each denoising step is reported as N steps and checks for
        Stop."""
        from studio.models.sampling import denoise

        uncond = self.model.unconditional(1, self.plan)
        uncond = uncond.rows([0] * len(cond)) if uncond is not None else None
        latents = denoise(
            self.model,
            cond,
            uncond,
            seeds,
            self.plan,
            patches=patches,
            shadow=shadow,
            on_step=stepper(self.report, len(cond)),
        )
        return self.model.decode(latents)

    def grid(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """Images (prompt, seed, H, W, 3) uint8, in batches."""
        cond, _ = self.model.encode(prompts)
        pairs = [(p, s) for p in range(len(prompts)) for s in seeds]
        made = []
        for start in range(0, len(pairs), self.report.rows):
            part = pairs[start : start + self.report.rows]
            made.append(self.images(cond.rows([p for p, _ in part]), [s for _, s in part]))
        images = np.concatenate(made)
        return images.reshape(len(prompts), len(seeds), *images.shape[1:])

    def score(self, images: np.ndarray, clean: np.ndarray) -> np.ndarray:
        """Scores (N,) float32 of images; `clean` is the clean image (H, W, 3) of their seed."""
        return score(
            self.params.metric, images, np.broadcast_to(clean, images.shape), self.question, self.scorer
        )

    @property
    def calls(self) -> int:
        """Model calls of one image."""
        return calls_of(self.model, self.plan)

    @property
    def unit(self) -> str:
        """What the scores are, in words."""
        names = {
            "clip": "cosine with the target",
            "distance": "minus RMS pixel distance to the clean image",
            "probability": "zero-shot probability of the target",
        }
        return names[self.params.metric] + (
            " minus that with the other text" if self.params.against and self.params.metric == "clip" else ""
        )


def calls_of(model: Any, plan: Any) -> int:
    """Model calls of one image: the plan's steps, and one more with pndm."""
    from studio.models.sampling import new_scheduler

    return len(new_scheduler(model, plan).timesteps)


def stepper(report: Report, rows: int) -> Callable[[int, Any], None]:
    """An `on_step` that reports every denoising step of so many rows, and so checks for Stop."""

    def on_step(i: int, latents: Any) -> None:
        report.step(rows if i else 0)

    return on_step


def image_trace(images: np.ndarray, *axes: Axis) -> Trace:
    """Images (…, H, W, 3) uint8 under these axes and those of their pixels."""
    sizes = zip(("height", "width", "channel"), images.shape[-3:], strict=True)
    pixels = (Axis(name, tuple(map(str, range(size)))) for name, size in sizes)
    return Trace(images, (*axes, *pixels), "RGB, 0 to 255")


def image_name(*parts: object) -> str:
    """A file name without surprises from labels."""
    return "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in str(p))[:120] for p in parts)


@dataclass(frozen=True)
class Inner:
    """A report without partial results: those of a part are not those of the whole."""

    report: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.report, name)

    def partial(self, result: Result) -> None:
        """Kept back."""
