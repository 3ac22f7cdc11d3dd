"""Causal mediation over UNet modules: corrupt the subject, restore one module's output at every step, score
the image.

Indirect effect of a module = score(restored) - score(corrupted). Diff-QuickFix, arXiv 2310.13730, section 3.
Direction `corrupt` is the counterpart: one module's corrupted output in the clean run, effect =
score(clean) - score.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.methods.noise_search import SEARCH, settle
from studio.methods.text_to_image import (
    NOISE,
    Bench,
    CorruptionInputs,
    SamplingParams,
    ScoreParams,
    check_corruption,
    warn_lost_tokens,
)
from studio.methods.trace_statistics import caption
from studio.methods.unet_modules import KINDS, layout, stacked
from studio.methods.unet_modules import row_kinds as row_kinds  # the Trace panel reads it here
from studio.methods.unet_screen import few_steps
from studio.methods.unet_trace import UNetTrace, span
from studio.registry import knob, method
from studio.types import Figure, Report, Result, Run, Trace

_FROM = (
    "from 0; steps are model calls, of which pndm makes more than --steps: in Stable Diffusion one more, its "
    "1 and 2 share a timestep"
)


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams, ScoreParams):
    """How the trace is made."""

    noise: float = NOISE
    search_noise: bool = SEARCH
    kinds: tuple[str, ...] = knob(KINDS, "kinds of modules", choices=(*KINDS, "stream"))
    window: int = knob(
        1, "neighbouring modules of one kind that are restored together", unit="modules", low=1, high=99
    )
    latents: str = knob(
        "own",
        "restore the clean run's own output, or what the clean text gives at the corrupted row's latents",
        choices=("own", "matched"),
        advanced=True,
    )
    direction: str = knob(
        "restore",
        "restore a module in the corrupted run, or corrupt it in the clean run",
        choices=("restore", "corrupt"),
        advanced=True,
    )
    first_step: int | None = knob(
        None, f"first denoising step at which outputs are replaced, {_FROM}", low=0, advanced=True
    )
    last_step: int | None = knob(
        None, f"last denoising step at which outputs are replaced, {_FROM}", low=0, advanced=True
    )
    step_ranges: int | None = knob(
        None,
        "also restore each module within each of so many equal ranges of denoising steps: a map over ranges "
        "and modules, as many times the cost",
        low=2,
        high=100,
        advanced=True,
    )
    guidance_also: float | None = knob(
        None,
        "the whole trace once more at this guidance scale, beside the first",
        low=0,
        high=100,
        advanced=True,
    )
    screen: bool = knob(False, "only the quick screen: estimates from images of six steps")
    hint: bool = knob(
        True, "show the screen before the exact cells, and report how well it ranks them", advanced=True
    )


def check(inputs: CorruptionInputs, params: Params, seeds: tuple[int, ...]) -> None:
    """What can be refused without the model."""
    check_corruption(inputs)
    first, last = params.first_step, params.last_step
    if first is not None and last is not None and first > last:
        raise RequestError("--first-step must not come after --last-step.")


def draw(run: Run) -> Figure:
    """The heat map of indirect effects (of the screen when there is nothing else). With ranges of steps or a
    second guidance scale: for every kind a row a map."""
    arrays, params, values = run.result.arrays, run.recipe.params, run.result.values
    effect = arrays["screen"] if params["screen"] else arrays["indirect_effect"]
    labels, maps = effect.axis("layer").labels, [] if params["screen"] else _maps(arrays)
    data = stacked(labels, maps, params["kinds"]) if maps else layout(labels, effect.values, params["kinds"])
    data["unit"] = effect.unit
    what, said = "screen", ""
    if not params["screen"]:
        cells = "the first row of each kind" if maps else "all cells"
        what, said = "indirect effect", caption(values, len(run.recipe.seeds), cells)
    title = f"{run.recipe.model}: {what}, “{run.recipe.inputs['prompt']}”"
    return Figure("heat", data, title=title, caption=said)


def _maps(arrays: dict[str, Trace]) -> list[tuple[str, np.ndarray]]:
    """(name, effect of each module) of every map of a run, that of `indirect_effect` first; empty where there
    is no other."""
    steps, scales, both = (
        arrays.get(f"indirect_effect_by_{n}") for n in ("steps", "guidance", "guidance_and_steps")
    )
    whole, maps = [("", arrays["indirect_effect"].values)], []
    if scales is not None:
        names = [f"guidance {g}" for g in scales.axis("guidance").labels]
        whole = list(zip(names, scales.values, strict=True))
    for g, (scale, effect) in enumerate(whole):
        parts = [("all steps", effect)] if steps is not None else [("", effect)]
        if steps is not None:
            values = steps.values if both is None else both.values[g]
            parts += [(f"steps {r}", v) for r, v in zip(steps.axis("range").labels, values, strict=True)]
        maps += [(", ".join(filter(None, (scale, name))), v) for name, v in parts]
    return maps if len(maps) > 1 else []


@method(
    "trace-unet",
    title="Causal trace of the UNet",
    paper="arXiv:2310.13730",
    family="diffusion",
    summary="Which UNet modules carry a part of the prompt into the image.",
    needs={"cross_attention", "text_encoder"},
    inputs=CorruptionInputs,
    params=Params,
    draw=draw,
    check=check,
)
def trace_unet(
    model: Any, inputs: CorruptionInputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`clean`, `corrupted` (seed), `restored` (seed, layer), `indirect_effect` with `_sem`, `_low`, `_high`
    (layer), `normalised_effect` (layer), `screen` (layer), `indirect_effect_by_steps` (range, layer),
    `indirect_effect_by_guidance` (guidance, layer), `indirect_effect_by_guidance_and_steps`."""
    bench = Bench.of(model, params, inputs.prompt, scorer, report)
    _check_plan(bench, params)
    warn_lost_tokens(model, [inputs.prompt, *([inputs.replacement] if inputs.replacement else [])], report)
    quick = replace(bench, plan=few_steps(bench.plan)) if params.screen else bench
    trace = UNetTrace(bench, inputs, params, seeds, settle(quick, inputs, params, seeds))
    if params.screen and len(seeds) > 1:
        report.warn(
            f"The screen looks at one seed, {seeds[0]}; exact cells (without --screen) take all of them."
        )
    if params.screen or params.hint:
        screen = trace.screen_of(seeds[0])
        report.plan(screen.rows(), "screening")
        trace.keep_screen(screen.take())
        report.partial(trace.result())
    if not params.screen:
        report.plan(trace.exact_rows(report.rows), "tracing")
        for g in range(len(trace.benches)):
            for j in range(len(seeds)):
                trace.take_seed(g, j, report.rows)
    trace.verdict(report)
    return trace.result()


def _check_plan(bench: Bench, params: Params) -> None:
    """Refuses steps that the plan does not have, and a second guidance scale that is the first."""
    first, last = span(bench, params)
    if first > last:
        raise RequestError(f"--first-step {first} is past the last step, {last}; nothing would be replaced.")
    if params.step_ranges and params.step_ranges > last - first + 1:
        raise RequestError(
            f"--step-ranges {params.step_ranges} are more than the {last - first + 1} steps; give fewer."
        )
    if params.guidance_also == bench.plan.guidance:
        raise RequestError(
            f"--guidance-also {params.guidance_also:g} is the scale of the trace itself; give another one."
        )
