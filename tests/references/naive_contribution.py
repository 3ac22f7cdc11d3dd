"""Attention contributions the slow, obvious way: eager attention weights of every position, values by hooks,
and one vector of width D for every head and token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def vectors(model: Any, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(a (L, H, T, D): what each token's value adds to the last position; the attention modules' outputs
    there (L, D); the out projections' biases (L, D)).

    Values are read off the model: the output projection's input for a token whose attention is only on
    itself. A hook replaces each attention's mask with one that lets a token see nothing but itself.
    """
    net, count, former = model.net, len(ids), model.net.config._attn_implementation
    heads, groups, width = model.heads
    given = torch.tensor([list(ids)])
    values, outputs, inputs = {}, {}, {}
    handles = []
    try:
        net.set_attn_implementation("eager")
        for layer in range(len(model.blocks)):
            hook = _keep(outputs, inputs, layer)
            handles.append(model.attention(layer).register_forward_hook(hook, with_kwargs=True))
        weights = net(input_ids=given, use_cache=False, output_attentions=True).attentions
        for handle in handles:
            handle.remove()
        handles = []
        alone = torch.full((count, count), torch.finfo(torch.float32).min).fill_diagonal_(0)[None, None]
        for layer in range(len(model.blocks)):
            out = model._module(layer, "attention-out")
            handles.append(out.register_forward_pre_hook(_value(values, layer)))
            arguments, options = inputs[layer]
            model.attention(layer)(*arguments, **{**options, "attention_mask": alone})
    finally:
        for handle in handles:
            handle.remove()
        net.set_attn_implementation(former)
    found, biases = [], []
    for layer in range(len(model.blocks)):
        matrix, bias = model.attention_out(layer)
        parts = [
            weights[layer][0, h, -1][:, None]
            * (values[layer][:, h * width : (h + 1) * width] @ matrix[:, h * width : (h + 1) * width].T)
            for h in range(heads)
        ]
        found.append(torch.stack(parts))
        biases.append(torch.zeros(matrix.shape[0]) if bias is None else bias)
    return torch.stack(found), torch.stack([outputs[i] for i in range(len(found))]), torch.stack(biases)


def _keep(outputs: dict, inputs: dict, layer: int) -> Any:
    def hook(module: Any, args: tuple, options: dict, output: tuple) -> None:
        outputs[layer], inputs[layer] = output[0][0, -1].clone(), (args, options)

    return hook


def _value(values: dict, layer: int) -> Any:
    def hook(module: Any, args: tuple) -> None:
        values[layer] = args[0][0].clone()

    return hook
