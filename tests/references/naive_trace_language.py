"""Causal trace of a language model the slow way: one whole forward a cell and sample (arXiv 2202.05262)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

Cell = tuple[str, int, int]  # kind, layer, token


def window(kind: str, layer: int, width: int, layers: int) -> range:
    """The layers that are restored together: one for hidden states, `width` around `layer` for the others."""
    if kind == "hidden":
        return range(layer, layer + 1)
    return range(max(0, layer - width // 2), min(layers, layer + -(-width // 2)))


def draw_noise(model: Any, count: int, samples: int, noise: float, seed: int) -> torch.Tensor:
    """noise * sigma * eps (samples, corrupted tokens, D) in float32."""
    table = model.embedding.weight.float()
    generator = torch.Generator("cpu").manual_seed(seed)
    eps = torch.randn(samples, count, table.shape[1], generator=generator)
    return noise * table.std().cpu() * eps


@torch.no_grad()
def logits(
    model: Any,
    ids: Sequence[int],
    *,
    corrupted: Sequence[int] = (),
    noise: torch.Tensor | None = None,
    held: Sequence[tuple[Any, int, torch.Tensor]] = (),
    left: int = 0,
) -> torch.Tensor:
    """Logits (vocabulary,) after the last token of one forward: noise (tokens, D) is added to the embeddings
    of the corrupted tokens, and each (module, token, value) of `held` is set. `left`: tokens of padding."""

    def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, [c + left for c in corrupted]] += noise.to(output)
        return output

    def put(token: int, value: torch.Tensor) -> Callable:
        def hook(module: Any, args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            first = first.clone()
            first[0, token + left] = value
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    with ExitStack() as stack:
        if noise is not None:
            stack.callback(model.embedding.register_forward_hook(add).remove)
        for module, token, value in held:
            stack.callback(module.register_forward_hook(put(token, value)).remove)
        rows = {"input_ids": torch.tensor([[0] * left + list(ids)], device=model.device)}
        if left:
            rows["attention_mask"] = (torch.arange(left + len(ids))[None] >= left).long()
            rows["position_ids"] = (torch.arange(left + len(ids))[None] - left).clamp(min=0)
        return model.net(**rows, use_cache=False).logits[0, -1].float()


def modules(model: Any, kind: str) -> list[Any]:
    """The module whose output is restored, of every layer."""
    count = range(len(model.blocks))
    return {
        "hidden": list(model.blocks),
        "attention": [model.attention(i) for i in count],
        "mlp": [model.mlp(i) for i in count],
    }[kind]


@torch.no_grad()
def clean_outputs(model: Any, ids: Sequence[int], kind: str) -> list[torch.Tensor]:
    """The clean outputs (tokens, D) of that kind, a layer each."""
    kept: list[torch.Tensor] = []
    with ExitStack() as stack:
        for module in modules(model, kind):
            hook = module.register_forward_hook(
                lambda m, a, out: kept.append((out[0] if isinstance(out, tuple) else out)[0].clone())
            )
            stack.callback(hook.remove)
        model.net(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    return kept


def restored(
    model: Any,
    ids: Sequence[int],
    cell: Cell,
    width: int,
    *,
    corrupted: Sequence[int] = (),
    noise: torch.Tensor | None = None,
    replaced: Sequence[int] | None = None,
    kept: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits (vocabulary,) of one cell and one sample; `replaced` are the ids of the corrupted prompt when
    tokens are exchanged instead of noise, `kept` the clean outputs where they are known."""
    kind, layer, token = cell
    clean, sites = kept or clean_outputs(model, ids, kind), modules(model, kind)
    held = [(sites[i], token, clean[i][token]) for i in window(kind, layer, width, len(sites))]
    return logits(model, replaced or ids, corrupted=corrupted, noise=noise, held=held)


def naive_trace(
    model: Any,
    ids: Sequence[int],
    answer: int,
    corrupted: Sequence[int],
    noise: torch.Tensor,
    cells: Sequence[Cell],
    width: int,
) -> tuple[float, np.ndarray, np.ndarray]:
    """(P, P* (sample,), restored P (cell, sample)) of the answer, a forward for each."""

    def p(row: torch.Tensor) -> float:
        return float(row.softmax(-1)[answer])

    one, kept = {"corrupted": corrupted}, {k: clean_outputs(model, ids, k) for k in {c[0] for c in cells}}
    base = [p(logits(model, ids, noise=eps, **one)) for eps in noise]
    found = [
        [p(restored(model, ids, cell, width, noise=eps, kept=kept[cell[0]], **one)) for eps in noise]
        for cell in cells
    ]
    return p(logits(model, ids)), np.array(base), np.array(found)
