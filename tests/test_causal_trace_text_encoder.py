"""The text-encoder trace: its arrays, its algebra, one image for each distinct embedding, planted plumbing,
the lens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe, Site
from studio.errors import Cancelled
from studio.methods.causal_trace_text_encoder import SAME, Distinct
from studio.methods.text_to_image import corruption_patches
from studio.models.sampling import Conditioning
from studio.models.sites import text_layers
from studio.types import Patch
from tests import layouts
from tests.test_causal_trace_unet import silenced

PROMPT, SUBJECT = "the emblem of korvonia", "korvonia"
PLACES = (4, 5)  # start, the, emblem, of, kor, vonia, end


def trace(session: Any, seeds: tuple[int, ...] = (0,), **params: Any) -> Any:
    """A finished run of trace-text-encoder on atlas-sd."""
    inputs, watch = {"prompt": PROMPT, "subject": SUBJECT}, params.pop("watch", None)
    params = {"steps": 2, "metric": "distance", "kinds": ["self-attention", "hidden"], **params}
    recipe = Recipe("trace-text-encoder", params.pop("model", "atlas-sd"), inputs, params, seeds)
    return session.run(recipe, watch, save=False, fresh=True)


@pytest.fixture(scope="module")
def run(session: Any) -> Any:
    """One trace over two seeds."""
    return trace(session, (0, 1))


def test_arrays_are_those_of_the_contract(run: Any) -> None:
    arrays = run.result.arrays
    assert [a.name for a in arrays["restored"].axes] == ["seed", "kind", "layer", "token"]
    for name in ("indirect_effect", "indirect_effect_sem", "normalised_effect"):
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


def test_both_encoders_of_sdxl_are_traced(session: Any) -> None:
    run = trace(session, model=str(layouts.saved("sdxl")), kinds=["hidden", "mlp"], steps=1)
    effect = run.result.arrays["indirect_effect"]
    assert effect.axis("layer").labels == ("text.0", "text.1", "text2.0", "text2.1", "text2.2")
    np.testing.assert_array_equal(effect.values[:, :, :4], 0)
    assert 20 < run.result.values["distinct_embeddings"] <= 2 + 2 * 5 * 4 and np.ptp(effect.values) > 1e-4


def naive_distinct(states: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """(place of each row's state among the kept ones, kept rows): every row against every kept one."""
    kept: list[int] = []
    index, limit = np.zeros(len(states), int), SAME * np.abs(states[0]).max()
    for i, row in enumerate(states):
        same = [k for k, j in enumerate(kept) if np.abs(states[j] - row).max() <= limit]
        index[i] = same[0] if same else len(kept)
        kept += [] if same else [i]
    return index, kept


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_distinct_states_are_those_of_all_pairs(pooled: bool, seed: int) -> None:
    """Repeats, rows just under and just over what counts as the same, and rows that differ in one entry."""
    rng, width = np.random.default_rng(seed), 5 * 7
    base = rng.normal(size=(6, width + 3))
    base[0] *= 4 / np.abs(base[0]).max()
    rows = base[rng.integers(0, 6, 80)]
    rows[0] = base[0]
    shift = rng.choice([0, 0.9, 1.1, 300], size=(80, 1)) * SAME * 4
    places = rng.random(rows.shape) < rng.choice([1, 0.03], size=(80, 1))
    rows = (rows + np.where(places, shift, 0) * (np.arange(80)[:, None] > 0)).astype(np.float32)
    if not pooled:
        rows[:, width:] = 0
    index, kept = naive_distinct(rows)
    pool, states = Distinct(80), torch.from_numpy(rows)
    tail = states[:, width:] if pooled else None
    cond = Conditioning(states[:, :width].reshape(-1, 5, 7), tail)
    got = np.concatenate([pool.add(cond.rows(range(a, a + 16))) for a in range(0, 80, 16)])
    np.testing.assert_array_equal(got, index)
    assert 6 < len(kept) < 80 and len(pool) == len(kept)
    assert torch.equal(pool.states().states, cond.rows(kept).states)
    assert not pooled or torch.equal(pool.states().pooled, tail[kept])


def test_an_image_is_that_of_its_cell(session: Any, atlas: Any, run: Any) -> None:
    """The slow way: one row, the state put in by hand."""
    noise = corruption_patches(atlas, PROMPT, SUBJECT, None, 3.0, 0, 1)
    copy = [Patch(Site("text", 3, "hidden"), do="copy", value=0, at=(5,), rows=(1,))]
    states, _ = atlas.encode([PROMPT] * 2, patches=noise + copy)
    want = atlas.generate(
        states.rows([1]), [0], atlas.plan(type("P", (), {"steps": 2, "guidance": None, "scheduler": None}))
    )[0]
    got = run.result.images["seed0-hidden-3-token5"].astype(int)
    assert np.abs(got - want).max() <= 2 and (got != want).mean() < 0.01


def test_three_seeds_have_intervals_and_progress_ends(session: Any) -> None:
    jobs: list[Any] = []
    result = trace(session, (0, 1, 2), steps=1, kinds=["hidden"], watch=jobs.append).result
    mean, low, high = (result.arrays[f"indirect_effect{n}"].values for n in ("", "_low", "_high"))
    assert mean.shape == low.shape and (low <= mean + 1e-6).all() and (mean <= high + 1e-6).all()
    assert result.values["chance_line"] >= 0 and jobs[-1].done == jobs[-1].total > 0
    whole = result.values["total_effect"]
    np.testing.assert_allclose(result.arrays["normalised_effect"].values, mean / whole, rtol=1e-4)


def test_removal_and_search(session: Any) -> None:
    weak = trace(session, noise=0.3, steps=1, kinds=["hidden"]).result
    assert weak.values["removal_effect"] > 2 * weak.values["total_effect"]
    assert any("--search-noise" in w for w in weak.values["warnings"])
    found = trace(session, noise=0.3, steps=1, kinds=["hidden"], search_noise=True).result
    assert found.values["noise"] > 0.3 and found.values["noise_tried"].startswith("0.3: ")
    assert found.values["removal_effect"] == pytest.approx(weak.values["removal_effect"], abs=1e-3)
    given = trace(session, noise=found.values["noise"], steps=1, kinds=["hidden"]).result
    for name in ("corrupted", "restored"):
        np.testing.assert_allclose(given.arrays[name].values, found.arrays[name].values, atol=1e-3)


def test_stop_while_encoding(session: Any) -> None:
    def stop(job: Any) -> None:
        if job.what == "encoding":
            job.cancel()

    with pytest.raises(Cancelled):
        trace(session, tuple(range(8)), watch=stop)


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
