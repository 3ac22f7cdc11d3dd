"""How much of a method's time its model's own forwards are, and the memory that it takes beyond a plain run:
what the benchmark calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from studio.diffusion_race import OTHER, PROMPT, plain_images, quickest, stated
from studio.growth_race import SAMPLES, contributed, cut_off, llama, mapped, operations, traced
from studio.method_race import ASKED, CONTEXT, REQUESTS, requested
from studio.planted import Quiet

Row = dict[str, Any]
Call = Callable[[], Any]
MEMORY = tuple(name for name in REQUESTS if name not in ("generate", "audit"))  # see studio/bench_cover.py


# ---- time -------------------------------------------------------------------------------------------------


@contextmanager
def forward_time(modules: Sequence[Any], names: Sequence[str] = ("forward",)) -> Iterator[list[float]]:
    """CPU seconds inside the methods `names` of these modules during the block, the outermost call of each
    counted once."""
    seconds, depth = [0.0], [0]

    def timed(whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            depth[0] += 1
            started = time.process_time()
            try:
                return whole(*args, **options)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    seconds[0] += time.process_time() - started

        return call

    taken = [(m, n) for m in modules for n in names if callable(getattr(m, n, None)) and n not in vars(m)]
    for module, name in taken:
        setattr(module, name, timed(getattr(module, name)))
    try:
        yield seconds
    finally:
        for module, name in taken:
            delattr(module, name)


def image_shares(model: Any, steps: int = 4, rows: int = 16, rounds: int = 2) -> list[Row]:
    """Of each text-to-image method: CPU time in the forwards of UNet, text encoders and VAE by all of its
    time; our hooks' work inside a forward counts as the forward's."""
    networks = [model.unet, *model.encoders.values(), model.pipe.vae]
    how = f"CPU time in forwards of UNet, text encoder and VAE by all; {steps} steps, best of {rounds}"
    calls = image_calls(model, steps, rows)
    return [_share(name, call, networks, how, rounds) for name, call in calls.items()]


def _share(name: str, call: Call, networks: Sequence[Any], how: str, rounds: int) -> Row:
    best = 0.0
    call()  # nobody pays for the first call
    for _ in range(rounds):
        started = time.process_time()
        with forward_time(networks, ("forward", "decode")) as inside:
            call()
        best = max(best, inside[0] / (time.process_time() - started))
    return stated(f"share of forwards: {name}", best, "of the time", how)


def vision_shares(model: Any, rounds: int = 3) -> list[Row]:
    """The same of methods that read images, over all modules of a vision transformer."""
    networks = list(model.net.modules())
    how = f"CPU time in the network's modules by all; the 10 examples, atlas-clip, best of {rounds}"
    return [
        _share(name, requested(name, model), networks, how, rounds)
        for name in ("decompose", "retrieve-images")
    ]


def image_calls(model: Any, steps: int, rows: int) -> dict[str, Call]:
    """A small request of each method, scored by pixel distance."""
    from studio.methods import causal_trace_text_encoder as text
    from studio.methods import causal_trace_unet as unet
    from studio.methods import locogen
    from studio.methods.text_to_image import CorruptionInputs

    common = {"steps": steps, "metric": "distance"}
    subject, quiet = CorruptionInputs(prompt=PROMPT, subject="red star"), Quiet(rows)
    change = locogen.Inputs(prompt=PROMPT, replacement=OTHER)
    plain = unet.Params(**common)
    return {
        "generate": lambda: plain_images(model, plain, rows, rows),
        "trace-unet": lambda: unet.trace_unet(
            model, subject, unet.Params(**common, hint=False), (0,), None, quiet
        ),
        "trace-text-encoder": lambda: text.trace_text_encoder(
            model, subject, text.Params(**common, kinds=("mlp",)), (0,), None, quiet
        ),
        "localize": lambda: locogen.localize(
            model, change, locogen.Params(**common, hint=False), (0,), None, quiet
        ),
        "word-maps": mapped(model, 8, steps, rows),
        "lens": requested("lens", model, steps=steps, rows=rows),
        "neurons": requested("neurons", model, rows=rows),
        "edit": requested("edit", model, rows=rows),
    }


def language_shares(
    numbers: Callable[..., Any], tokens: int = 40, layers: int = 8, rounds: int = 3
) -> list[Row]:
    """Of each language method: the time that a plain forward needs for as many operations, by its own. The
    plain forward has 4 prompts of the same length, the method's batches are its own."""
    import torch

    model, ids = llama(numbers, tokens, layers)
    batch = torch.tensor([ids] * SAMPLES)

    def plain() -> Any:
        with torch.no_grad():
            return model.net(input_ids=batch, use_cache=False, logits_to_keep=1)

    calls = {
        "plain": plain,
        "trace-language": traced(numbers, tokens, layers),
        "knockout": cut_off(numbers, tokens, layers),
        "contributions": contributed(numbers, tokens, layers),
    }
    return _by_operations(calls, f"random Llama, {layers} layers, {tokens} tokens", rounds)


def counted_shares(image: Any, language: Any, steps: int = 4, rounds: int = 2) -> list[Row]:
    """The same of attribute, whose backward passes no forward holds, beside plain images; of context-use
    beside plain prompts."""
    from studio.methods.causal_trace_unet import Params

    plain = Params(steps=steps, metric="distance")
    drawing = {
        "plain": lambda: plain_images(image, plain, 4, 4),
        "attribute": requested("attribute", image, steps=steps),
    }
    reading = {
        "plain": lambda: language.logits([language.encode(ASKED, CONTEXT)] * SAMPLES),
        "context-use": requested("context-use", language),
    }
    found = _by_operations(drawing, f"atlas-sd, {steps} steps", rounds)
    return found + _by_operations(reading, "atlas-llama", rounds)


def _by_operations(calls: dict[str, Call], what: str, rounds: int) -> list[Row]:
    """Of each call but `plain`: the CPU time that `plain` needs for as many operations, by its own."""
    made = {name: operations(call) for name, call in calls.items()}
    best = quickest(calls, rounds, cpu=True)
    rate = best["plain"] / made["plain"]
    return [
        stated(
            f"share of forwards: {name}",
            made[name] * rate / best[name],
            "of the time",
            f"{made[name]:.3g} operations, of which a plain forward makes {1 / rate:.3g} a second, in "
            f"{best[name]:.3g} s of CPU; {what}, best of {rounds}",
        )
        for name in calls
        if name != "plain"
    ]


# ---- memory -----------------------------------------------------------------------------------------------


def memory_growth(threads: int, methods: Sequence[str] = MEMORY) -> list[Row]:
    """GB of resident memory at a method's peak over those at the peak of a plain run of as many rows, each
    method in a process of its own, two at a time."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(partial(_memory, threads), methods))


def _memory(threads: int, name: str) -> Row:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        plain, whole = pool.submit(peaks, name, threads).result()
    model = REQUESTS[name].model
    rows = {"atlas-sd": "16 images", "atlas-llama": "one forward of 16 prompts"}.get(model, "16 images read")
    how = f"peak of the resident set {whole / 1e9:.3g} GB, {plain / 1e9:.3g} GB after {rows}; batch 16, "
    how += f"{model}, in a process of its own"
    return stated(f"memory: {name}", (whole - plain) / 1e9, "GB over a plain run", how)


def peaks(name: str, threads: int) -> tuple[int, int]:
    """Bytes at the peak after a plain run, and after the method; in a process that has done nothing else."""
    import contextlib

    import numpy as np

    from studio.registry import find_method
    from studio.session import Session
    from studio.types import Recipe

    asked, method = REQUESTS[name], find_method(name)
    with contextlib.closing(Session(device="cpu", threads=threads, batch=16)) as session:
        if method.family == "diffusion":
            wanted = Recipe("generate", asked.model, {"prompt": (PROMPT,)}, {"steps": 2}, tuple(range(16)))
            session.run(wanted, save=False, fresh=True)
        elif method.family == "language":
            session.call(asked.model, lambda m: m.logits([m.encode(ASKED, CONTEXT)] * 16), kind="language")
        else:
            images = [np.zeros((64, 64, 3), np.uint8)] * 16
            session.call(asked.model, lambda m: m.representation(m.pixels(images)), kind="vision")
        plain = peak()
        seeds = asked.seeds if method.samples else None
        session.run(Recipe(name, asked.model, asked.given, {}, seeds), save=False, fresh=True)
        return plain, peak()


def peak() -> int:
    """The most bytes of memory that this process ever held. Linux says it of the program alone; getrusage
    may speak of what started it, too."""
    import resource
    import sys
    from pathlib import Path

    status = Path("/proc/self/status")
    lines = status.read_text("ascii", "replace").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
