"""The decomposition beside a plain forward of the same model and batch: what the benchmark calls.

Weights are random, sizes are real. Every contender runs in turn, several rounds; the least CPU time of each
counts, since other programs disturb. Threads are the caller's (the stated figures are for one).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

MODELS: Mapping[str, dict[str, Any]] = {
    "vit-b16": {"model_name": "vit_base_patch16_224", "num_classes": 0},
    "vit-b16-mean": {
        "model_name": "vit_base_patch16_224",
        "num_classes": 0,
        "global_pool": "avg",
        "fc_norm": False,
    },
    "swin-b": {"model_name": "swin_base_patch4_window7_224", "num_classes": 0},
}
BARS = {"heads": 1.06, "tokens": 1.08, "adjoint": 1.4}  # times a plain forward
MEMORY_BAR = 0.3  # GB over a plain forward, for tokens


def race(
    name: str, draw: Callable[..., Any], *, batch: int = 8, texts: int = 100, rounds: int = 3
) -> dict[str, Any]:
    """CPU seconds of a plain forward, ratios of `heads` (all component vectors), `tokens` (scores of every
    head's key tokens for all texts; None where they have no closed form) and `adjoint` (one direction), the
    memory in GB that `tokens` takes over a plain forward, and the error of the sum.

    draw(*shape): a random float32 tensor.
    """
    import timm
    import torch

    from studio.models.vit_timm import timm_layout

    arguments = dict(MODELS[name])
    net = timm.create_model(arguments.pop("model_name"), **arguments).eval().requires_grad_(False)
    layout = timm_layout(name, net)
    pixels = draw(batch, 3, *net.pretrained_cfg["input_size"][1:])
    runs = contenders(layout, pixels, draw, texts)
    memory, error = {}, 0.0
    for what in ("plain", "tokens", "heads", "adjoint"):  # in an order in which peaks can be told apart
        if what in runs:
            runs[what]()
            memory[what] = _peak()
    seconds = {what: float("inf") for what in runs}
    for _ in range(rounds):
        for what, run in runs.items():
            started = time.process_time()
            found = run()
            seconds[what] = min(seconds[what], time.process_time() - started)
            if what == "heads":
                total = sum(c.double() for c in found.components.values())
                error = float((total - found.representation).norm() / found.representation.norm())
            del found
    ratios = {what: s / seconds["plain"] for what, s in seconds.items() if what != "plain"}
    extra = memory["tokens"] - memory["plain"] if "tokens" in memory else None
    how = f"{name}, batch {batch}, {texts} texts, {torch.get_num_threads()} thread, least of {rounds} rounds"
    return {"seconds": seconds["plain"], "ratios": ratios, "memory": extra, "error": error, "how": how}


def contenders(
    layout: Any, pixels: Any, draw: Callable[..., Any], texts: int
) -> dict[str, Callable[[], Any]]:
    """What runs against a plain forward."""
    import torch

    from studio.models.decomposition import Decomposition, TokenQuestion
    from studio.models.decomposition_adjoint import adjoint_scores

    whole = Decomposition(layout, pixels.device)
    directions = draw(texts, whole.maps[-1].shape[-1])

    def plain() -> Any:
        with torch.no_grad():
            return layout.run(pixels)

    runs = {"plain": plain, "heads": lambda: whole.run(pixels)}
    if whole.streams_tokens():
        question = TokenQuestion(whole.along(directions), keep=True)
        runs["tokens"] = lambda: whole.run(pixels, question)
    runs["adjoint"] = lambda: adjoint_scores(layout, pixels, directions[:1])
    return runs


def _peak() -> float:
    """The most memory that this process ever held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
