"""Closed-form edits as one would write them first: one prompt at a time through the encoders themselves,
every pair a column, and for every matrix the normal equations with an inverse of d x d, in float64.

Written without anything of studio's solver, hooks, tokens or encoding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Change = tuple[
    str, list[tuple[str, float]]
]  # a concept, and its guides with their shares; none to preserve it


def textbook(
    weight: np.ndarray, keys: np.ndarray, values: np.ndarray, weights: np.ndarray, lam: float
) -> np.ndarray:
    """W' (m, d) = (lam W + sum s v k^T) (lam I + sum s k k^T)^-1."""
    left = lam * weight + values @ np.diag(weights) @ keys.T
    right = lam * np.eye(weight.shape[1]) + keys @ np.diag(weights) @ keys.T
    return left @ np.linalg.inv(right)


def together(weight: np.ndarray, parts: list[tuple], strengths: list[float]) -> np.ndarray:
    """W' of several edits (keys, values, weights, lam): each asks for its strength's share of the way to its
    values, and its pairs weigh s / lam."""
    wishes = [
        (k, weight @ k + g * (v - weight @ k), s / lam)
        for (k, v, s, lam), g in zip(parts, strengths, strict=True)
    ]
    keys, values, weights = (np.concatenate([w[i] for w in wishes], axis=-1) for i in range(3))
    return textbook(weight, keys, values, weights, 1.0)


def positions(tokenizer: Any, template: str, text: str, ends: bool) -> tuple[str, list[int]]:
    """(prompt, positions of the text's last token and of the end-of-text tokens): the last token is that of
    the prompt cut off behind the text."""
    before = template.split("{}")[0]
    prompt = template.replace("{}", text).strip()
    last = len(tokenizer((before + text).strip())["input_ids"]) - 2
    first_end = len(tokenizer(prompt)["input_ids"]) - 1
    return prompt, [last, *(range(first_end, tokenizer.model_max_length) if ends else [])]


def ids_of(tokenizer: Any, prompt: str) -> torch.Tensor:
    """(1, T) token numbers, padded."""
    return tokenizer(
        prompt, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def embedding(pipe: Any, prompt: str) -> np.ndarray:
    """(T, D) float64: what the UNet's cross-attention reads."""
    if getattr(pipe, "text_encoder_2", None) is None:
        return pipe.text_encoder(ids_of(pipe.tokenizer, prompt))[0][0].double().numpy()
    both = [
        encoder(ids_of(tokenizer, prompt), output_hidden_states=True).hidden_states[-2][0]
        for encoder, tokenizer in (
            (pipe.text_encoder, pipe.tokenizer),
            (pipe.text_encoder_2, pipe.tokenizer_2),
        )
    ]
    return torch.cat(both, dim=-1).double().numpy()


@torch.no_grad()
def projection(encoder: Any, tokenizer: Any, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """(T, D) input, and (T, D) output without its bias, of the first layer's out_proj."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    out_proj = getattr(encoder, "text_model", encoder).encoder.layers[0].self_attn.out_proj
    handle = out_proj.register_forward_hook(lambda m, args, out: seen.append((args[0][0], out[0] - m.bias)))
    encoder(ids_of(tokenizer, prompt))
    handle.remove()
    return seen[0][0].double().numpy(), seen[0][1].double().numpy()


def columns(tokenizer: Any, changes: list[Change], templates: list[str], ends: bool) -> list[tuple]:
    """(prompt, position, [(guide's prompt, its position, share)]) of every key."""
    found = []
    for concept, guides in changes:
        for template in templates:
            prompt, places = positions(tokenizer, template, concept, ends)
            others = [(*positions(tokenizer, template, g, ends), share) for g, share in guides]
            for i, place in enumerate(places):
                found.append((prompt, place, [(p, at[min(i, len(at) - 1)], s) for p, at, s in others]))
    return found


def unet_edit(
    pipe: Any, changes: list[Change], templates: list[str], layers: list[str], ends: bool, lam: float
) -> dict[str, np.ndarray]:
    """Deltas of to_k and to_v of the layers, by parameter name."""
    keys, deltas = columns(pipe.tokenizer, changes, templates, ends), {}
    prompts = {p for own, _, guides in keys for p in (own, *(g[0] for g in guides))}
    states = {p: embedding(pipe, p) for p in prompts}
    for name in [f"{layer}.{leaf}" for layer in layers for leaf in ("to_k", "to_v")]:
        weight = pipe.unet.get_submodule(name).weight.detach().double().numpy()
        k, v = [], []
        for prompt, place, guides in keys:
            own = states[prompt][place]
            k.append(own)
            kept = (1 - sum(s for *_, s in guides)) * (weight @ own)
            v.append(kept + sum(s * (weight @ states[p][at]) for p, at, s in guides))
        k, v = np.stack(k, 1), np.stack(v, 1)
        deltas[f"unet.{name}.weight"] = textbook(weight, k, v, np.ones(k.shape[1]), lam) - weight
    return deltas


def text_edit(
    encoder: Any, tokenizer: Any, changes: list[Change], templates: list[str], ends: bool, lam: float
) -> np.ndarray:
    """Delta of the first layer's out_proj."""
    out_proj = getattr(encoder, "text_model", encoder).encoder.layers[0].self_attn.out_proj
    weight = out_proj.weight.detach().double().numpy()
    keys, k, v = columns(tokenizer, changes, templates, ends), [], []
    prompts = {p for own, _, guides in keys for p in (own, *(g[0] for g in guides))}
    states = {p: projection(encoder, tokenizer, p) for p in prompts}
    for prompt, place, guides in keys:
        read, wrote = (a[place] for a in states[prompt])
        k.append(read)
        kept = (1 - sum(s for *_, s in guides)) * wrote
        v.append(kept + sum(s * states[p][1][at] for p, at, s in guides))
    k, v = np.stack(k, 1), np.stack(v, 1)
    return textbook(weight, k, v, np.ones(k.shape[1]), lam) - weight
