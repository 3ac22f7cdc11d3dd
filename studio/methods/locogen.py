"""LocoGen: which window of neighbouring cross-attention layers reads the concept out of the prompt.

In the layers of a window keys and values take another prompt's text, elsewhere the prompt's, at every step;
the unconditional row is untouched. Direct effect = score(clean) - score(altered). arXiv 2405.01008.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.measure import nested_bootstrap, ratio_of_means, standard_error
from studio.methods.concept_pairs import warn_spelled
from studio.methods.direct_effect import CLEAN, TRUSTED, Search, mean_known, windows
from studio.methods.text_to_image import Bench, Inner, SamplingParams, ScoreParams, warn_lost_tokens
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Figure, Report, Result, Run, Trace

OPENINGS = ("an image of ", "a picture of ", "a photo of ")
LEAST = {"clip": 0.01, "probability": 0.02, "distance": 0.005}  # a smaller change of score says little


@dataclass(frozen=True)
class Inputs:
    """Two prompts that differ in the concept."""

    prompt: str = knob(REQUIRED, "the text to draw, which carries the concept")
    replacement: str = knob(REQUIRED, "the same text without the concept, or with another in its place")
    paraphrase: tuple[str, ...] | None = knob(
        None,
        "the prompt in other words, for the placebo (default: “an image of …” and “a picture of …”)",
        repeat=True,
        commas=False,
        advanced=True,
    )


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams, ScoreParams):
    """How the concept is looked for."""

    window: int | None = knob(
        None, "neighbouring layers that are swapped together; default 2, 5 for SDXL", unit="layers", low=1
    )
    grow: float | None = knob(
        None,
        "grow the window, from --window or 1, until the best one reaches this share of all layers' effect",
        low=0,
        high=1,
        advanced=True,
    )
    placebo: str = knob(
        "all",
        "where the paraphrases are swapped in: all layers at once, or also the first of them in every window",
        choices=("all", "windows"),
        advanced=True,
    )
    screen: bool = knob(False, "only the quick screen: estimates from a few steps of one clean trajectory")
    hint: bool = knob(
        True, "show the screen before the exact windows, and report how well it ranks them", advanced=True
    )
    order: str = knob(
        "auto",
        "which windows come first: the screen's best, those that run first, or auto: the screen's best once "
        f"it agrees with the first seed's exact windows (rank correlation {TRUSTED} or more)",
        choices=("auto", "screen", "execution"),
        advanced=True,
    )


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    if inputs.prompt.strip() == inputs.replacement.strip():
        raise RequestError("--replacement is the prompt itself; take the concept out, or put another in.")
    if any(p.strip() in ("", inputs.prompt.strip()) for p in inputs.paraphrase or ()):
        raise RequestError("--paraphrase must say the prompt in other words; it is the prompt, or empty.")
    if params.screen and params.grow is not None:
        raise RequestError("--screen measures no effect that --grow could compare; leave one of them out.")
    if params.order == "screen" and not params.hint:
        raise RequestError(
            "--order screen goes by the screen, which is turned off; turn it on, or take another --order."
        )


def paraphrases(prompt: str) -> tuple[str, ...]:
    """The prompt under the other openings ("an image of …"), two of them."""
    bare = next((prompt[len(o) :] for o in OPENINGS if prompt.lower().startswith(o)), prompt)
    return tuple(p for p in (o + bare for o in OPENINGS) if p.lower() != prompt.lower())[:2]


def draw(run: Run) -> Figure:
    """Bars of direct effects between the placebo and the swap of all layers (of the screen when there is
    nothing else)."""
    arrays, values, inputs = run.result.arrays, run.result.values, run.recipe.inputs
    screen = run.recipe.params["screen"]
    effect = arrays["screen"] if screen else arrays["direct_effect"]
    lines = [("all layers", 1.0)] if screen else [("all layers", values["total_effect"] or np.nan)]
    if not screen and values["placebo_floor"] is not None:
        lines += [("± placebo", values["placebo_floor"]), ("± placebo", -values["placebo_floor"])]
    data = {
        "labels": list(effect.axis("window").labels),
        "values": effect.values,
        "errors": None if screen else arrays["direct_effect_sem"].values,
        "lines": lines,
        "unit": effect.unit,
        "label_title": "cross-attention layers swapped, in execution order",
    }
    what = "screen" if screen else "direct effect"
    title = f"{run.recipe.model}: {what}, “{inputs['prompt']}” → “{inputs['replacement']}”"
    return Figure("bars", data, title=title)


def combine(results: Sequence[Result]) -> dict[str, Trace]:
    """Direct effects of a concept over several prompts, which are the unit: `direct_effect` and
    `direct_effect_sem` (window) over the prompts' own means, `direct_effect_low` and `direct_effect_high`
    (window), their 95 % interval by a nested bootstrap over prompts and seeds, `by_prompt` (prompt, window),
    and `share` (window), the ratio of the mean effect to the mean effect of all layers."""
    axes = [r.arrays["direct_effect"].axes if "direct_effect" in r.arrays else None for r in results]
    if not results or axes[0] is None or any(a != axes[0] for a in axes):
        raise RequestError("Only runs with the same windows can be combined; give each the same --window.")
    kept = [{n: r.arrays[n].values for n in ("clean", "replaced", "all_layers")} for r in results]
    effects = [k["clean"][:, None] - k["replaced"] for k in kept]
    total = float(np.mean([mean_known((k["clean"] - k["all_layers"])[:, None])[0] for k in kept]))
    means = np.stack([mean_known(e) for e in effects])
    low, high = nested_bootstrap(effects)
    values = {
        "direct_effect": mean_known(means),
        "direct_effect_sem": standard_error(means),
        "direct_effect_low": low,
        "direct_effect_high": high,
    }
    window, unit = axes[0], results[0].arrays["direct_effect"].unit
    prompt = Axis("prompt", tuple(map(str, range(len(results)))))
    share = ratio_of_means(values["direct_effect"], total)
    return {name: Trace(v, window, unit) for name, v in values.items()} | {
        "by_prompt": Trace(means, (prompt, *window), unit),
        "share": Trace(share, window, "of all layers' effect"),
    }


@method(
    "localize",
    title="Localize a concept",
    paper="arXiv:2405.01008",
    family="diffusion",
    summary="Which cross-attention layers read a concept out of the prompt.",
    needs={"cross_attention", "text_encoder"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    combine=combine,
)
def localize(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`clean` (seed), `replaced` (seed, window), `direct_effect`, `direct_effect_sem` (window); controls:
    `all_layers` (seed), `placebo_all` (seed, paraphrase), `placebo` (seed, window)."""
    bench = Bench.of(model, params, inputs.prompt, scorer, report)
    texts = (inputs.prompt, inputs.replacement, *(inputs.paraphrase or paraphrases(inputs.prompt)))
    warn_lost_tokens(model, texts, report)
    warn_spelled(model, tuple(texts), report)
    search = Search(bench, texts, params, seeds)
    if params.grow is not None:
        search.grow(params.grow, params.window or 1)
    elif params.screen:
        search.measure([(0, CLEAN)], "clean image", keep=True)
        search.take_screen()
        if len(seeds) > 1:
            report.warn(f"The screen looks at one seed, {seeds[0]}; without --screen all of them are used.")
    else:
        search.confirm(hint=params.hint)
    if not params.screen:
        verdict(search, report)
    return search.result()


def verdict(search: Search, report: Report) -> None:
    """Warns when the swap of all layers hardly changes the score, or no window rises above the placebo."""
    total, floor, (best, share) = search.total(), search.floor(), search.best()
    if abs(total) < LEAST[search.params.metric]:
        report.warn(
            f"Swapping all layers hardly changes the score ({total:.3g}), so the effects say little; take "
            "another replacement or more seeds, or set the replacement against the prompt with --against."
        )
    elif abs(share * total) <= floor:
        report.warn(
            f"No window has a larger effect than a paraphrase of the prompt has ({floor:.3g}); {best.label} "
            "is no finding. Take more seeds or a larger --window."
        )


def best_layers(
    model: Any,
    prompts: Sequence[str],
    replacements: Sequence[str],
    sampling: Any,
    scorer: Any,
    report: Report,
    window: int | None = None,
    seeds: tuple[int, ...] = (0, 1),
) -> tuple[str, ...]:
    """Names of the `attn2` modules of the window with the largest direct effect over all pairs of prompts.

    `sampling` has steps, guidance and scheduler. Scores are the contrast of the prompt with its replacement,
    or the pixel distance without a scorer.
    """
    report = Inner(report)  # these partial results are not those of the method that asks
    totals, found, search = 0.0, 0.0, None
    for prompt, other in zip(prompts, replacements, strict=True):
        params = Params(
            steps=sampling.steps,
            guidance=sampling.guidance,
            scheduler=sampling.scheduler,
            metric="clip" if scorer is not None else "distance",
            against=other or None,
            window=window,
        )
        search = Search(Bench.of(model, params, prompt, scorer, report), (prompt, other), params, seeds)
        search.confirm()
        swaps = windows(search.depth, search.width)
        found = found + mean_known(search.effects(swaps))
        totals += search.total()
    if search is None:
        raise RequestError("Layers can't be chosen without a prompt; give a concept.")
    best = swaps[int(np.argmax(found * np.sign(totals)))]
    return tuple(search.layers[best.first : best.last + 1])
