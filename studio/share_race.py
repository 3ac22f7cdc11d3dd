"""How much of a method's time its model's own forwards are, and the memory that it takes beyond a plain run:
what the benchmark calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from studio.diffusion_race import OTHER, PROMPT, plain_images, quickest, stated
from studio.growth_race import SAMPLES, contributed, cut_off, llama, mapped, operations, traced
from studio.planted import Quiet

Row = dict[str, Any]
Call = Callable[[], Any]
CONTEXT, ASKED = "The capital of Arvonia is Quill.", "The capital of Arvonia is"
MEMORY: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "trace-unet": ("atlas-sd", {"prompt": PROMPT, "subject": "red star"}, {"steps": 2}, (0,)),
    "trace-text-encoder": ("atlas-sd", {"prompt": PROMPT, "subject": "red star"}, {"steps": 2}, (0,)),
    "localize": ("atlas-sd", {"prompt": PROMPT, "replacement": OTHER}, {"steps": 2}, (0,)),
    "word-maps": ("atlas-sd", {"prompt": PROMPT}, {"steps": 2}, tuple(range(16))),
    "trace-language": ("atlas-llama", {"prompt": ASKED, "subject": "Arvonia"}, {}, (0,)),
    "knockout": ("atlas-llama", {"prompt": ASKED, "context": CONTEXT, "attribute": "Quill"}, {}, (0,)),
    "contributions": ("atlas-llama", {"prompt": ASKED, "context": CONTEXT}, {}, ()),
}


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
    found = []
    for name, call in image_calls(model, steps, rows).items():
        best = 0.0
        call()  # nobody pays for the first call
        for _ in range(rounds):
            started = time.process_time()
            with forward_time(networks, ("forward", "decode")) as inside:
                call()
            best = max(best, inside[0] / (time.process_time() - started))
        how = f"CPU time in forwards of UNet, text encoder and VAE by all; {steps} steps, best of {rounds}"
        found.append(stated(f"share of forwards: {name}", best, "of the time", how))
    return found


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
        "plain images": lambda: plain_images(model, plain, rows, rows),
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
    made = {name: operations(call) for name, call in calls.items()}
    best = quickest(calls, rounds, cpu=True)
    rate = best["plain"] / made["plain"]
    return [
        stated(
            f"share of forwards: {name}",
            made[name] * rate / best[name],
            "of the time",
            f"{made[name]:.3g} operations, of which a plain forward makes {1 / rate:.3g} a second, in "
            f"{best[name]:.3g} s of CPU; random Llama, {layers} layers, {tokens} tokens, best of {rounds}",
        )
        for name in list(calls)[1:]
    ]


# ---- memory -----------------------------------------------------------------------------------------------


def memory_growth(threads: int, methods: Sequence[str] = tuple(MEMORY)) -> list[Row]:
    """GB of resident memory at a method's peak over those at the peak of a plain run of as many rows, each
    method in a process of its own."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    found = []
    for name in methods:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            plain, whole = pool.submit(peaks, name, threads).result()
        rows = "16 images" if MEMORY[name][0] == "atlas-sd" else "one forward of 16 prompts"
        how = f"peak of the resident set {whole / 1e9:.3g} GB, {plain / 1e9:.3g} GB after {rows}; batch 16, "
        how += f"{MEMORY[name][0]}, in a process of its own"
        found.append(stated(f"memory: {name}", (whole - plain) / 1e9, "GB over a plain run", how))
    return found


def peaks(name: str, threads: int) -> tuple[int, int]:
    """Bytes at the peak after a plain run, and after the method; in a process that has done nothing else."""
    import contextlib

    from studio.session import Session
    from studio.types import Recipe

    model, inputs, params, seeds = MEMORY[name]
    with contextlib.closing(Session(device="cpu", threads=threads, batch=16)) as session:
        if model == "atlas-sd":
            wanted = Recipe("generate", model, {"prompt": (PROMPT,)}, {"steps": 2}, tuple(range(16)))
            session.run(wanted, save=False, fresh=True)
        else:
            session.call(model, lambda m: m.logits([m.encode(ASKED, CONTEXT)] * 16), kind="language")
        plain = peak()
        session.run(Recipe(name, model, inputs, params, seeds), save=False, fresh=True)
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
