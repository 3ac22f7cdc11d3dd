"""The text encoder as one would look into it first: a whole pass for every state that is put back, and for
every layer that is read; transformers' own module with hooks, without anything of studio's encoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def ids_of(pipe: Any, prompt: str) -> torch.Tensor:
    """(1, T) token numbers, padded."""
    return pipe.tokenizer(prompt, padding="max_length", return_tensors="pt", truncation=True).input_ids


def root(pipe: Any) -> Any:
    """The module that holds the layers, in every version of transformers."""
    return getattr(pipe.text_encoder, "text_model", pipe.text_encoder)


@torch.no_grad()
def restored_states(
    pipe: Any, prompt: str, places: Sequence[int], noise: torch.Tensor, layer: int, token: int
) -> torch.Tensor:
    """Text states (1, T, D) of the prompt with `noise` (places, D) on its token embeddings, the output of one
    layer's MLP at one token taken from the clean pass."""
    mlp, table, kept = root(pipe).encoder.layers[layer].mlp, pipe.text_encoder.get_input_embeddings(), []

    def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, list(places)] += noise
        return output

    def put(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, token] = kept[0][0, token]
        return output

    handle = mlp.register_forward_hook(lambda m, a, out: kept.append(out.clone()))
    pipe.text_encoder(ids_of(pipe, prompt))
    handle.remove()
    handles = [table.register_forward_hook(add), mlp.register_forward_hook(put)]
    try:
        return pipe.text_encoder(ids_of(pipe, prompt))[0]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_states(pipe: Any, prompt: str, layer: int) -> torch.Tensor:
    """Text states (1, T, D) as if `layer` were the last (0: the embedding), through the final norm."""
    hidden = pipe.text_encoder(ids_of(pipe, prompt), output_hidden_states=True).hidden_states
    return root(pipe).final_layer_norm(hidden[layer])
