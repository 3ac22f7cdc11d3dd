"""What the text-to-image methods cost, against plain images and against the obvious way: what the benchmark
calls.

Times are the best of some rounds in which everything is timed once, one after the other, since other programs
disturb; counts are rows that really went through the UNet.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from studio import solver_race
from studio.planted import Quiet

PROMPT, OTHER = "a red star on a white background", "a blue star on a white background"
BARS = {"sd1": 10.0, "sdxl": 30.0}  # times the textbook form
LAYOUTS: dict[str, dict[str, Any]] = {  # the blocks of UNets; their widths are small
    "sd1": {
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "least": {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}
Row = dict[str, Any]


def row(name: str, value: float, unit: str, bar: float, how: str, *, least: bool = True) -> Row:
    """One result. bar: what `value` must reach (`least`) or must not pass."""
    holds = bool(value >= bar if least else value <= bar)
    said = f"{'at least' if least else 'at most'} the bar; {how}"
    return {"name": name, "value": value, "unit": unit, "bar": bar, "holds": holds, "how": said}


def stated(name: str, value: float, unit: str, how: str) -> Row:
    """One result for which no figure is asked."""
    return {"name": name, "value": value, "unit": unit, "bar": None, "holds": None, "how": how}


def quickest(calls: Mapping[str, Callable[[], Any]], rounds: int, *, cpu: bool = False) -> dict[str, float]:
    """Seconds of each call, the best of so many rounds through all of them; of CPU or by the clock."""
    clock = time.process_time if cpu else time.perf_counter
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            started = clock()
            call()
            best[name] = min(best[name], clock() - started)
    return best


@contextmanager
def counted(owner: Any, name: str = "forward") -> Iterator[list[int]]:
    """The rows of every call of a method inside the block: of a UNet's forward, or a model's decode."""
    rows, whole, own = [], getattr(owner, name), vars(owner).get(name)

    def count(x: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(x))
        return whole(x, *args, **kwargs)

    setattr(owner, name, count)
    try:
        yield rows
    finally:
        delattr(owner, name)
        if own is not None:  # somebody counts already
            setattr(owner, name, own)


def small_model(model: Any, layout: str) -> Any:
    """The model with a UNet of another layout, small and of the random weights that torch's generator gives
    just now."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from studio.models.diffusion import DiffusionModel

    old = model.pipe
    unet = UNet2DConditionModel(
        **LAYOUTS[layout],
        sample_size=16,
        cross_attention_dim=model.unet.config.cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=4,
    ).to(model.device, model.dtype)
    pipe = StableDiffusionPipeline(
        vae=old.vae,
        text_encoder=old.text_encoder,
        tokenizer=old.tokenizer,
        unet=unet,
        scheduler=old.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return DiffusionModel(pipe, model.source, str(model.device), model.dtype)


# ---- closed forms -----------------------------------------------------------------------------------------


def solver(layout: str, draw: Callable[[int, int], Any], rounds: int = 3) -> list[Row]:
    """The one solver against a d x d inverse for every matrix (studio/solver_race.py)."""
    found = solver_race.race(layout, draw, repeats=rounds)
    how = (
        f"{found['matrices']} matrices in {found['seconds']:.3g} s, textbook {found['textbook_seconds']:.3g} "
        f"s; largest error against float64 {found['error']:.1e}, textbook {found['textbook_error']:.1e}; "
        f"{found['how']}"
    )
    return [row(f"solver, {layout} layout", found["ratio"], "times as fast", BARS[layout], how)]


# ---- traces -----------------------------------------------------------------------------------------------


def plain_images(model: Any, params: Any, count: int, rows: int) -> None:
    """So many images of the prompt, `rows` at a time, scored like those of a method."""
    from studio.methods.text_to_image import Bench

    bench = Bench.of(model, params, PROMPT, None, Quiet(rows))
    cond, _ = model.encode([PROMPT])
    for start in range(0, count, rows):
        n = min(rows, count - start)
        images = bench.images(cond.rows([0] * n), list(range(n)))
        bench.score(images, images[0])


def drawn(model: Any, call: Callable[[], Any]) -> int:
    """How many images a call draws."""
    with counted(model, "decode") as images:
        call()
    return sum(images)


def locogen(model: Any, rows: int = 16, steps: int = 8, rounds: int = 3) -> list[Row]:
    """LocoGen without its screen, against as many plain images in batches of the same size."""
    from studio.methods.locogen import Inputs, Params, localize

    params = Params(steps=steps, metric="distance", hint=False)

    def exact() -> None:
        localize(model, Inputs(prompt=PROMPT, replacement=OTHER), params, (0, 1), None, Quiet(rows))

    count = drawn(model, exact)
    best = quickest({"plain": lambda: plain_images(model, params, count, rows), "exact": exact}, rounds)
    how = f"{count} images of {steps} steps, {best['exact']:.3g} s to {best['plain']:.3g} s; best of {rounds}"
    ratio = best["exact"] / best["plain"]
    return [row("LocoGen, exact", ratio, "of as many plain images", 1.05, how, least=False)]


def unet_trace(model: Any, rows: int = 16, steps: int = 20, rounds: int = 4, **more: Any) -> list[Row]:
    """The exact UNet trace against modules + 2 plain images, and its screen against it. more: of the
    trace."""
    from studio.methods.causal_trace_unet import Params

    params = Params(steps=steps, metric="distance", hint=False, **more)
    quick = replace(params, screen=True)
    count = len(model.unet_sites(params.kinds)) + 2
    best = quickest(
        {
            "plain": lambda: plain_images(model, params, count, rows),
            "exact": lambda: traced(model, params, rows),
            "screen": lambda: traced(model, quick, rows),
        },
        rounds,
    )
    ratio, speed = best["exact"] / best["plain"], best["exact"] / best["screen"]
    how = f"{count - 2} modules, {steps} steps, batches of {rows}, exact {best['exact']:.3g} s, "
    plain, screen = (f"{how}{n} {best[n]:.3g} s; best of {rounds}" for n in ("plain", "screen"))
    return [
        row("UNet trace, exact", ratio, "of modules + 2 plain images", 1.10, plain, least=False),
        row("UNet trace, screen", speed, "times as fast as the exact trace", 5.0, screen),
    ]


def traced(model: Any, params: Any, rows: int) -> Any:
    """The UNet trace of one seed, another prompt swapped in."""
    from studio.methods.causal_trace_unet import trace_unet
    from studio.methods.text_to_image import CorruptionInputs

    inputs = CorruptionInputs(prompt=PROMPT, replacement=OTHER)
    return trace_unet(model, inputs, params, (0,), None, Quiet(rows))


def screen_rows(model: Any, rows: int = 16, steps: int = 50) -> list[Row]:
    """UNet rows of the screen and of the exact trace, counted. Every step of the exact trace has the same
    rows: two of them are run."""
    from studio.methods.causal_trace_unet import Params

    params = Params(steps=2, metric="distance", hint=False)
    with counted(model.unet) as exact:
        traced(model, params, rows)
    with counted(model.unet) as screen:
        traced(model, replace(params, steps=steps, screen=True), rows)
    slow, fast = sum(exact) * steps // 2, sum(screen)
    modules = len(model.unet_sites(params.kinds))
    how = f"{modules} modules, {steps} steps, batches of {rows}: {slow} rows to {fast}; the exact ones "
    how += f"counted at 2 steps, times {steps / 2:g}; small random UNet of that layout"
    return [row("UNet trace, screen's rows", slow / fast, "times fewer UNet rows", 15.0, how)]


def text_trace(model: Any, rows: int = 16) -> list[Row]:
    """Images of the text-encoder trace for each distinct embedding, which are found one by one."""
    from studio.methods.causal_trace_text_encoder import Params, trace_text_encoder
    from studio.methods.text_to_image import CorruptionInputs

    inputs, params = CorruptionInputs(prompt=PROMPT, replacement=OTHER), Params(steps=1, metric="distance")
    found: list[Any] = []
    images = drawn(
        model, lambda: found.append(trace_text_encoder(model, inputs, params, (0,), None, Quiet(rows)))
    )
    cells = found[0].arrays["restored"].values.size + 2
    distinct = distinct_embeddings(model, params.kinds)
    how = f"{images} images for {distinct} distinct embeddings of {cells} runs, compared one by one"
    value = images / distinct
    found_row = row("text-encoder trace, images", value, "a distinct embedding", 1.0, how, least=False)
    return [found_row | {"holds": images == distinct}]


def distinct_embeddings(model: Any, kinds: tuple[str, ...]) -> int:
    """How many different text states there are among clean, corrupted, and one state restored, each encoded
    by itself: the clean prompt's state at one layer and token, put into the other prompt's run."""
    from studio.methods.causal_trace_text_encoder import SAME
    from studio.types import Patch, Site

    encode, places = model.encode, model.tokens(PROMPT).trace_positions()
    kept = [encode([text])[0].states.flatten() for text in (PROMPT, OTHER)]
    limit = SAME * float(kept[0].abs().max())
    for part in model.encoders:
        for layer in (s.layer for s in model.text_sites("hidden", part)):
            for site in (Site(part, layer, kind) for kind in kinds):
                for at in places:
                    patch = Patch(site, do="copy", value=0, at=at, rows=(1,))
                    state = encode([PROMPT, OTHER], patches=[patch])[0].states[1].flatten()
                    if all(float((state - other).abs().max()) > limit for other in kept):
                        kept.append(state)
    return len(kept)


# ---- attribution ------------------------------------------------------------------------------------------


def attribution(model: Any, steps: int = 50) -> list[Row]:
    """Forwards of component attribution, against starting each step's trajectory from noise anew."""
    from studio.methods.component_attribution import Inputs, Params, attribute

    params = Params(steps=steps, guidance=3.0, ratio=0, check=0)
    with counted(model.unet) as once:
        attribute(model, Inputs(concept=PROMPT), params, (0,), None, Quiet())
    with counted(model.unet) as anew:
        restarted(model, model.plan(params))
    slow, fast = sum(anew), sum(once)
    how = f"{steps} steps, one seed: {slow} UNet rows to {fast}, counted"
    return [row("CAD, one trajectory", slow / fast, "times fewer UNet rows", 20.0, how)]


def restarted(model: Any, plan: Any) -> None:
    """For every step: draws from noise up to it, then reads the concept and the empty prompt there."""
    import torch

    from studio.models.sampling import new_scheduler, raw_output, trajectory

    cond, free = model.encode([PROMPT])[0], model.unconditional(1, plan)
    for stop, t in enumerate(new_scheduler(model, plan).timesteps):
        for i, x in trajectory(model, cond, free, [0], plan):
            if i == stop:
                with torch.no_grad():
                    raw_output(model, torch.cat([x, x]), t, free.join(cond), plan)
                break


# ---- the command line -------------------------------------------------------------------------------------


def help_time(rounds: int = 5) -> list[Row]:
    """Seconds of `locus --help` in a process of its own, beside what it computes of them: on a busy machine
    the rest is waiting."""
    command = [sys.executable, "-m", "studio.cli", "--help"]
    before = _children()
    best = quickest({"help": lambda: subprocess.run(command, check=True, capture_output=True)}, rounds)
    busy = (_children() - before) / rounds
    how = f"best of {rounds}, the interpreter's start with it; {busy:.2g} s of CPU on average"
    return [row("locus --help", best["help"], "seconds", 0.5, how, least=False)]


def _children() -> float:
    """Seconds of CPU that processes started from here have used and ended."""
    spent = os.times()
    return spent.children_user + spent.children_system
