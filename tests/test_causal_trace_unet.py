"""The UNet trace: its algebra, its slow reference, planted plumbing, and what a run's arrays look like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe
from studio.errors import Cancelled, RequestError
from studio.methods.unet_modules import KINDS, layout, windows
from studio.models.hooks import hook_count
from studio.types import Site
from tests.references import naive_trace

PROMPT, SUBJECT = "a red star on a white background", "red star"
QUICK = {"steps": 3, "metric": "distance", "kinds": ["cross-attention"], "hint": False}


def trace(session: Any, seeds: tuple[int, ...] = (0,), **params: Any) -> Any:
    """A finished run of trace-unet on atlas-sd."""
    inputs = {"prompt": params.pop("prompt", PROMPT), "subject": params.pop("subject", SUBJECT)}
    inputs |= {k: params.pop(k) for k in ("replacement",) if k in params}
    return session.run(
        Recipe("trace-unet", "atlas-sd", inputs, {**QUICK, **params}, seeds), save=False, fresh=True
    )


@contextmanager
def silenced(weights: list[torch.Tensor]) -> Iterator[None]:
    """These weights are zero inside the block and what they were after it."""
    kept = [w.clone() for w in weights]
    with torch.no_grad():
        for w in weights:
            w.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for w, k in zip(weights, kept, strict=True):
                w.copy_(k)


def test_arrays_are_those_of_the_contract(session: Any) -> None:
    run = trace(session, (0, 1))
    arrays = run.result.arrays
    shapes = {n: [a.name for a in t.axes] for n, t in arrays.items()}
    assert shapes == {
        "clean": ["seed"], "corrupted": ["seed"], "restored": ["seed", "layer"],
        "indirect_effect": ["layer"], "indirect_effect_sem": ["layer"], "normalised_effect": ["layer"],
    }  # fmt: skip
    labels = arrays["restored"].axis("layer").labels
    assert (
        len(labels) == 10
        and labels[0].startswith("down_blocks.0")
        and all(x.endswith("attn2") for x in labels)
    )
    assert [x.split(".")[0] for x in labels].index("mid_block") == 3
    effect = arrays["restored"].values - arrays["corrupted"].values[:, None]
    np.testing.assert_allclose(arrays["indirect_effect"].values, effect.mean(0), atol=1e-6)
    np.testing.assert_allclose(
        arrays["indirect_effect_sem"].values, effect.std(0, ddof=1) / np.sqrt(2), atol=1e-6
    )
    assert len(run.result.images) == 2 * 13


def test_one_seed_has_no_standard_error(session: Any) -> None:
    assert np.isnan(trace(session).result.arrays["indirect_effect_sem"].values).all()


def test_without_noise_nothing_has_an_effect(session: Any) -> None:
    arrays = trace(session, noise=0.0, kinds=list(KINDS)).result.arrays
    assert abs(float(arrays["corrupted"].values[0])) < 1e-3
    np.testing.assert_allclose(arrays["indirect_effect"].values, 0, atol=1e-3)


def test_restoring_every_text_reader_gives_the_clean_image(session: Any) -> None:
    result = trace(session, window=99).result
    assert float(result.arrays["corrupted"].values[0]) < -0.01
    np.testing.assert_allclose(result.arrays["restored"].values, 0, atol=1e-3)


@pytest.mark.parametrize("latents", ["own", "matched"])
@pytest.mark.parametrize("direction", ["restore", "corrupt"])
def test_all_readers_swapped_is_the_other_run(session: Any, latents: str, direction: str) -> None:
    result = trace(session, window=99, latents=latents, direction=direction).result
    want = 0.0 if direction == "restore" else float(result.arrays["corrupted"].values[0])
    np.testing.assert_allclose(result.arrays["restored"].values, want, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_the_batch_does_not_matter(session: Any, atlas: Any, rows: int) -> None:
    from studio.session import Session

    whole = trace(session)
    small = Session(runs=session.store.root, device="cpu", threads=session.threads, batch=rows)
    small._loaded = session._loaded
    parts = trace(small)
    small.queue.close()
    assert parts.host["batch"] == rows
    for name, array in whole.result.arrays.items():
        np.testing.assert_allclose(parts.result.arrays[name].values, array.values, atol=2e-4)


@pytest.mark.parametrize(
    "name", ["up_blocks.1.attentions.0.transformer_blocks.0.attn2", "up_blocks.0.resnets.0"]
)
def test_equals_the_naive_reference(session: Any, atlas: Any, name: str) -> None:
    kind = "cross-attention" if name.endswith("attn2") else "resnet"
    run = trace(session, (5,), kinds=[kind], guidance=3.0)
    torch.set_num_threads(session.threads)
    places = list(atlas.subject_positions(PROMPT, SUBJECT, None))
    with torch.no_grad():
        clean, _ = atlas.encode([PROMPT])
        corrupted = naive_trace.subject_states(atlas.pipe, PROMPT, places, 3.0, 5)
        want = naive_trace.restored_image(atlas.pipe, [name], clean.states, corrupted, 5, 3, 3.0)
    got = run.result.images[f"seed5-{name}"]
    assert np.abs(got.astype(int) - want).max() <= 2 and (got != want).mean() < 0.01


def test_windows_stay_within_their_kind() -> None:
    sites = [Site("unet", n, k) for n, k in (("a", "resnet"), ("b", "x"), ("c", "resnet"), ("d", "resnet"))]
    names = [[s.layer for s in w] for w in windows(sites, 3)]
    assert names == [["a", "c"], ["b"], ["a", "c", "d"], ["c", "d"]]
    assert [[s.layer for s in w] for w in windows(sites, 2)] == [["a", "c"], ["b"], ["c", "d"], ["d"]]


def test_layout_puts_modules_of_one_place_in_one_column() -> None:
    labels = (
        "down_blocks.0.resnets.0",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "mid_block.resnets.0",
        "mid_block.attentions.0.transformer_blocks.0.attn2",
        "mid_block.resnets.1",
    )
    grid = layout(labels, np.arange(5.0))
    assert grid["rows"] == ["cross-attention", "resnet"] and grid["cols"] == [
        "down 0 · 0",
        "mid · 0",
        "mid · 1",
    ]
    np.testing.assert_array_equal(grid["values"], [[1, 3, np.nan], [0, 2, 4]])


def test_planted_cross_attention_is_found_for_each_layer(session: Any, atlas: Any) -> None:
    """Only one layer lets text in: it restores the clean image, the others do nothing (plumbing, not the
    method)."""
    sites = atlas.unet_sites(["cross-attention"])
    values = [atlas.unet.get_submodule(str(s.layer)).to_v.weight for s in sites]
    for planted in range(len(sites)):
        with silenced([w for i, w in enumerate(values) if i != planted]):
            arrays = trace(session, noise=10.0, steps=2).result.arrays
        effect = np.abs(arrays["indirect_effect"].values)
        assert effect[planted] > 1e-3, f"layer {planted} lets no text in"
        assert (np.delete(effect, planted) < 0.01 * effect[planted]).all()
        assert abs(float(arrays["restored"].values[0, planted])) < 0.01 * effect[planted] + 1e-6


def test_a_stopped_trace_keeps_what_was_measured_and_leaves_no_hook(session: Any, atlas: Any) -> None:
    def stop_after_the_first_batch(job: Any) -> None:
        if job.latest is not None:
            job.cancel()

    recipe = Recipe(
        "trace-unet", "atlas-sd", {"prompt": PROMPT, "subject": SUBJECT}, {**QUICK, "steps": 2}, (0, 1, 2)
    )
    with pytest.raises(Cancelled) as stopped:
        session.run(recipe, stop_after_the_first_batch, save=False, fresh=True)
    run = stopped.value.partial
    assert run.status == "stopped" and np.isfinite(run.result.arrays["clean"].values[0])
    assert sum(hook_count(m) for m in atlas.components().values()) == 0


def test_swapping_in_the_same_prompt_does_nothing(session: Any) -> None:
    arrays = trace(session, replacement=PROMPT).result.arrays
    np.testing.assert_allclose(arrays["indirect_effect"].values, 0, atol=1e-3)


def test_a_step_range_lies_between_nothing_and_everything(session: Any) -> None:
    arrays = trace(session, window=99, first_step=2).result.arrays
    effect, total = arrays["indirect_effect"].values, -float(arrays["corrupted"].values[0])
    assert (np.abs(effect) > 0).all() and (np.abs(effect) < 0.9 * total).all()
    with pytest.raises(RequestError, match="past the last step"):
        trace(session, first_step=3)


def test_screen_knows_the_planted_layer(session: Any, atlas: Any) -> None:
    """The planted row's latents lie on the line from corrupted to clean, where nothing is estimated."""
    sites = atlas.unet_sites(["cross-attention"])
    values = [atlas.unet.get_submodule(str(s.layer)).to_v.weight for s in sites]
    with silenced([w for i, w in enumerate(values) if i != 7]):
        result = trace(session, screen=True, noise=10.0).result
    share = result.arrays["screen"].values / result.values["screen_total_effect"]
    np.testing.assert_allclose(share, np.arange(10) == 7, atol=2e-3)
    assert np.isnan(result.arrays["indirect_effect"].values).all()
    assert {f"seed0-screen-{n}" for n in ("clean", "corrupted")} <= set(result.images)


def test_every_warning_says_what_to_do(session: Any) -> None:
    run = trace(session, noise=0.0, prompt=PROMPT + " and" * 40)
    text = " ".join(run.result.values["warnings"])
    assert "lost: 'and" in text and "hardly differ" in text
