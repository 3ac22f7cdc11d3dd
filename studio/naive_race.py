"""Fast ways beside the slow references of the tests, which are written as one would write them first: what
the benchmark calls.

The references stand in tests/references, which only the repository has. The tests hold both ways equal; here
they are timed in turn, in CPU seconds, the best of some rounds. Where the slow way does the same thing many
times over, some of it is timed, times their number.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np

from studio.diffusion_race import OTHER, PROMPT, drawn, quickest, stated
from studio.errors import RequestError
from studio.growth_race import llama, mapped, unet_traced
from studio.method_race import ASKED, CONTEXT
from studio.planted import Quiet

Row = dict[str, Any]
Call = Callable[[], Any]


def reference(name: str) -> Any:
    """A module of tests/references; RequestError where there is none."""
    try:
        return import_module(f"tests.references.{name}")
    except ModuleNotFoundError as missing:
        raise RequestError(
            f"The slow way of this benchmark (tests/references/{name}.py) is not installed; run it in a "
            "clone of the repository, from its top folder: python -m studio.cli bench."
        ) from missing


def beside(name: str, fast: Call, slow: Call, times: float, how: str, rounds: int = 3) -> Row:
    """How many times faster `fast` is than `times` times `slow`."""
    fast(), slow()  # nobody pays for the first call
    best = quickest({"fast": fast, "slow": slow}, rounds, cpu=True)
    naive = best["slow"] * times
    said = f"CPU {best['fast']:.3g} s to {naive:.3g} s, best of {rounds}; slow: {how}"
    return stated(f"beside the slow way: {name}", naive / best["fast"], "times faster", said)


# ---- vision -----------------------------------------------------------------------------------------------


def text_span(
    numbers: Callable[..., Any], images: int = 2000, texts: int = 1000, width: int = 512, size: int = 64
) -> list[Row]:
    """The basis of one head from its covariance, against the contributions of every image."""
    from studio.methods.text_span import greedy_span

    naive = reference("naive_text_span").naive_text_span
    shapes = ((images, size), (size, width), (texts, width))
    outputs, matrix, given = (numbers(*shape).double().numpy() for shape in shapes)
    given = given + 0.5
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    known = (np.cov(outputs.T, bias=True), outputs.mean(0), matrix)
    how = f"all contributions of {images} images in {width} dimensions; head of size {size}, {texts} texts, "
    how += "20 picks; the covariance is at hand"
    return [
        beside(
            "text-span",
            lambda: greedy_span(*known, given, 20),
            lambda: naive(outputs @ matrix, given, 20, size),
            1,
            how,
        )
    ]


def align(numbers: Callable[..., Any], images: int = 2000, size: int = 384, width: int = 256) -> list[Row]:
    """The closed form that an aligner's fit starts from, by normal equations, against least squares of all
    images."""
    from studio.models.alignment import Fit

    naive = reference("naive_alignment").naive_ridge
    x, z = numbers(images, size), numbers(images, width)
    fit, rows = Fit(x, z, [size // 2, size // 2]), (x.double().numpy(), z.double().numpy())
    how = f"least squares with {size} more rows; {images} images, {size} coordinates, {width} dimensions"
    weight = fit.settings.ridge
    return [beside("align, closed form", fit.ridge, lambda: naive(*rows, weight), 1, how)]


# ---- language ---------------------------------------------------------------------------------------------


def contributions(numbers: Callable[..., Any], tokens: int = 128, layers: int = 8) -> list[Row]:
    """One row of attention a layer, against attention of every position and a vector of every head and
    token."""
    from studio.models.attention_row import attention_rows

    naive = reference("naive_contribution").vectors
    model, ids = llama(numbers, tokens, layers)
    how = f"a vector of every head and token; random Llama, {layers} layers, {tokens} tokens"
    return [beside("contributions", lambda: attention_rows(model, ids, 5), lambda: naive(model, ids), 1, how)]


def context_use(model: Any) -> list[Row]:
    """The cuts of the verdict, against a whole forward with unfused attention for every one."""
    from studio.methods.context_use import Inputs, Params
    from studio.methods.context_use import context_use as run

    naive = reference("naive_knockout").logits_cut
    inputs = Inputs(prompt=ASKED, context=CONTEXT, subject="Arvonia", attribute="Quill")
    params = Params(trace=False, controls=2)
    found = run(model, inputs, params, (0,), None, Quiet()).arrays
    cells = sum(int(np.isfinite(found[n].values).sum()) for n in ("knocked_out", "control"))
    ids = model.encode(ASKED, CONTEXT).ids
    how = f"{cells} cuts, a whole forward each; {len(ids)} tokens, {len(model.blocks)} layers, no traces"
    fast = lambda: run(model, inputs, params, (0,), None, Quiet())  # noqa: E731
    return [beside("context-use", fast, lambda: naive(model, ids, [(len(ids) - 1, 2)], range(3)), cells, how)]


# ---- images -----------------------------------------------------------------------------------------------


def trace_unet(model: Any, steps: int = 4) -> list[Row]:
    """The exact trace of the cross-attention layers in batches, against one image at a time: for every layer
    a pass that keeps its outputs and one that puts them back."""
    naive = reference("naive_trace")
    sites = model.unet_sites(("cross-attention",))
    clean = model.encode([PROMPT])[0].states
    places = list(model.subject_positions(PROMPT, "red star", None))
    low = naive.subject_states(model.pipe, PROMPT, places, 3.0, 0)
    names, guidance = [str(sites[-1].layer)], model.plan(SimpleNamespace(**_plain(steps))).guidance
    model.pipe.set_progress_bar_config(disable=True)
    how = f"diffusers' pipeline, one image at a time, two for each of {len(sites)} layers; {steps} steps"
    return [
        beside(
            "trace-unet",
            unet_traced(model, 1, steps),
            lambda: naive.restored_image(model.pipe, names, clean, low, 0, steps, guidance),
            len(sites),
            how,
        )
    ]


def _plain(steps: int) -> dict[str, Any]:
    return {"steps": steps, "guidance": None, "scheduler": None}


def localize(model: Any, steps: int = 4) -> list[Row]:
    """LocoGen in batches, against one altered image at a time."""
    from studio.methods.locogen import Inputs, Params
    from studio.methods.locogen import localize as run

    naive = reference("naive_locogen").altered_image
    params, inputs = Params(steps=steps, metric="distance", hint=False), Inputs(PROMPT, replacement=OTHER)
    fast = lambda: run(model, inputs, params, (0,), None, Quiet())  # noqa: E731
    images = drawn(model, fast)
    names = [str(s.layer) for s in model.unet_sites(("cross-attention",))[:2]]
    guidance = model.plan(params).guidance
    slow = lambda: naive(model.pipe, names, PROMPT, OTHER, 0, steps, guidance)  # noqa: E731
    how = f"diffusers' pipeline, one image at a time, {images} images; {steps} steps"
    return [beside("localize", fast, slow, images, how)]


def word_maps(model: Any, seeds: int = 4, steps: int = 4) -> list[Row]:
    """Word maps of several seeds summed as they come, against every probability kept, one seed and word after
    the other."""
    naive = reference("naive_word_maps")
    guidance, side = model.plan(SimpleNamespace(**_plain(steps), height=None, width=None)).guidance, 16
    model.pipe.set_progress_bar_config(disable=True)

    def slow() -> None:
        kept = naive.kept_probabilities(model.pipe, PROMPT, 0, steps, guidance)
        for place in range(1, 8):
            naive.word_map(kept, [place], side, side)

    how = f"every probability kept, one of {seeds} seeds and one of 7 words at a time; {steps} steps"
    return [beside("word-maps", mapped(model, seeds, steps), slow, seeds, how)]


def fisher(model: Any, steps: int = 4) -> list[Row]:
    """The passport's Fisher scores from gradients of chosen weights, against gradients of a whole copy."""
    from studio.methods.layer_map import layer_scores
    from studio.methods.text_to_image import Bench

    naive = reference("naive_audit").fisher
    layers = [str(s.layer) for s in model.unet_sites(("cross-attention",))]
    params = SimpleNamespace(**_plain(steps) | {"guidance": 3.0}, target=None, against=None)
    bench = Bench.of(model, params, PROMPT, None, Quiet())
    how = f"gradients of all weights of a copy, one term at a time; {len(layers)} layers, {steps} steps"
    return [
        beside(
            "passport, Fisher scores",
            lambda: layer_scores(bench, [PROMPT], layers, (0,)),
            lambda: naive(model.pipe, layers, [PROMPT], [0], steps, 3.0),
            1,
            how,
        )
    ]
