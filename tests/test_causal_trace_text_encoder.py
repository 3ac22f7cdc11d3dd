"""The text-encoder trace: its arrays, its algebra, one image for each distinct embedding, planted plumbing,
the lens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe, Site
from studio.methods.text_to_image import corruption_patches
from studio.models.sites import text_layers
from studio.types import Patch
from tests.test_causal_trace_unet import silenced

PROMPT, SUBJECT = "the emblem of korvonia", "korvonia"
PLACES = (4, 5)  # start, the, emblem, of, kor, vonia, end


def trace(session: Any, seeds: tuple[int, ...] = (0,), **params: Any) -> Any:
    """A finished run of trace-text-encoder on atlas-sd."""
    inputs = {"prompt": PROMPT, "subject": SUBJECT}
    params = {"steps": 2, "metric": "distance", "kinds": ["self-attention", "hidden"], **params}
    return session.run(
        Recipe("trace-text-encoder", "atlas-sd", inputs, params, seeds), save=False, fresh=True
    )


@pytest.fixture(scope="module")
def run(session: Any) -> Any:
    """One trace over two seeds."""
    return trace(session, (0, 1))


def test_arrays_are_those_of_the_contract(run: Any) -> None:
    arrays = run.result.arrays
    assert [a.name for a in arrays["restored"].axes] == ["seed", "kind", "layer", "token"]
    for name in ("indirect_effect", "indirect_effect_sem"):
        assert [a.name for a in arrays[name].axes] == ["kind", "layer", "token"]
    tokens = arrays["restored"].axis("token").labels
    assert (
        tokens[1:6] == ("the", "emblem", "of", "kor", "vonia")
        and tokens[-1] == "padding"
        and len(tokens) == 8
    )
    assert arrays["restored"].axis("layer").labels == tuple("012345")


def test_words_before_the_subject_have_no_effect(run: Any) -> None:
    """Attention is causal: noise on the subject can't reach what stands before it."""
    np.testing.assert_array_equal(run.result.arrays["indirect_effect"].values[:, :, :4], 0)


def test_no_more_images_than_distinct_embeddings(run: Any) -> None:
    """Per seed: clean, corrupted, and 2 kinds x 6 layers x 4 reachable tokens, less the cells that coincide
    by algebra:
    after the subject, restoring attention in layer 0 is restoring the hidden state there (2 cells)."""
    assert run.result.values["distinct_embeddings"] == 2 + 2 * 6 * 4 - 2


def test_restoring_the_last_hidden_state_everywhere_is_the_clean_run(atlas: Any) -> None:
    noise = corruption_patches(atlas, PROMPT, SUBJECT, None, 3.0, 0, 1)
    everywhere = [Patch(Site("text", 5, "hidden"), do="copy", value=0, rows=(1,))]
    states, _ = atlas.encode([PROMPT] * 2, patches=noise + everywhere)
    assert torch.equal(states.states[0], states.states[1])
    corrupted, _ = atlas.encode([PROMPT] * 2, patches=noise)
    assert not torch.allclose(corrupted.states[0], corrupted.states[1], atol=1e-2)


def test_without_noise_nothing_has_an_effect(session: Any) -> None:
    run = trace(session, noise=0.0)
    assert run.result.values["distinct_embeddings"] == 1
    np.testing.assert_array_equal(run.result.arrays["indirect_effect"].values, 0)


def test_the_only_mixing_layer_is_found_for_each_layer(atlas: Any) -> None:
    """One layer mixes tokens: restoring its attention after the subject gives the clean states there; no
    other matters."""
    layers = text_layers(atlas.encoders["text"])
    weights = [layer.self_attn.out_proj.weight for layer in layers]
    after = tuple(range(6, 32))
    for planted in range(len(layers)):
        rows = 2 + len(layers)
        noise = [
            p for r in range(1, rows) for p in corruption_patches(atlas, PROMPT, SUBJECT, None, 3.0, 0, r)
        ]
        copies = [
            Patch(Site("text", i, "self-attention"), do="copy", value=0, at=after, rows=(2 + i,))
            for i in range(len(layers))
        ]
        with silenced([w for i, w in enumerate(weights) if i != planted]):
            states, _ = atlas.encode([PROMPT] * rows, patches=noise + copies)
        end = states.states[:, 6:]
        moved = (end[2:] - end[1]).abs().amax((1, 2))
        damage = (end[0] - end[1]).abs().max()
        assert damage > 1e-2
        assert (end[2 + planted] - end[0]).abs().max() < 1e-4 * damage + 1e-5
        assert all(moved[i] < 0.01 * damage for i in range(len(layers)) if i != planted)


def test_replacement_swaps_the_prompt(session: Any) -> None:
    recipe = Recipe(
        "trace-text-encoder",
        "atlas-sd",
        {"prompt": PROMPT, "replacement": "the emblem of arlund"},
        {"steps": 2, "metric": "distance", "kinds": ["hidden"]},
    )
    arrays = session.run(recipe, save=False).result.arrays
    assert float(arrays["corrupted"].values[0]) < -0.01


def test_the_lens_ends_with_the_model_itself(session: Any, atlas: Any) -> None:
    run = session.run(Recipe("lens", "atlas-sd", {"prompt": PROMPT}, {"steps": 2}), save=False)
    images = run.result.arrays["images"]
    assert images.axis("layer").labels == ("embedding", *(f"layer {i}" for i in range(1, 7)))
    states = atlas.lens(PROMPT)
    whole, _ = atlas.encode([PROMPT])
    torch.testing.assert_close(states.states[-1:], whole.states, atol=1e-5, rtol=0)
    plain = session.run(Recipe("generate", "atlas-sd", {"prompt": [PROMPT]}, {"steps": 2}), save=False)
    difference = images.values[0, -1].astype(int) - plain.result.arrays["images"].values[0, 0]
    assert np.abs(difference).max() <= 1
