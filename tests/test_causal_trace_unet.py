"""The UNet trace: its algebra, its slow reference, planted plumbing, and what a run's arrays look like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe
from studio.errors import Cancelled, RequestError
from studio.figures import to_bytes
from studio.methods import noise_search
from studio.methods.noise_search import without_subject
from studio.methods.text_to_image import Bench, CorruptionInputs
from studio.methods.unet_modules import KINDS, layout, stacked, step_ranges, windows
from studio.methods.unet_screen import Screen, continued
from studio.models.hooks import hook_count
from studio.models.sampling import Plan
from studio.registry import find_method
from studio.types import Site
from tests import layouts
from tests.references import naive_trace

PROMPT, SUBJECT = "a red star on a white background", "red star"
QUICK = {"steps": 3, "metric": "distance", "kinds": ["cross-attention"], "hint": False}


def trace(session: Any, seeds: tuple[int, ...] = (0,), **params: Any) -> Any:
    """A finished run of trace-unet, on atlas-sd unless `model` is another."""
    model = params.pop("model", "atlas-sd")
    inputs = {"prompt": params.pop("prompt", PROMPT), "subject": params.pop("subject", SUBJECT)}
    inputs |= {k: params.pop(k) for k in ("replacement",) if k in params}
    watch = params.pop("watch", None)
    recipe = Recipe("trace-unet", model, inputs, {**QUICK, **params}, seeds)
    return session.run(recipe, watch, save=False, fresh=True)


@pytest.fixture(scope="module")
def tiny() -> str:
    """The folder of a small random model of the SD 1 layout."""
    return str(layouts.saved("sd1"))


@pytest.fixture(scope="module")
def plain(session: Any) -> Any:
    """One trace of the cross-attention modules, which several tests look at."""
    return trace(session)


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


def test_one_seed_has_no_standard_error_and_no_line_of_chance(plain: Any) -> None:
    assert np.isnan(plain.result.arrays["indirect_effect_sem"].values).all()
    assert "chance_line" not in plain.result.values and "indirect_effect_low" not in plain.result.arrays
    assert find_method("trace-unet").draw(plain).caption == ""


def test_without_noise_nothing_has_an_effect(session: Any, tiny: str) -> None:
    arrays = trace(session, model=tiny, noise=0.0, kinds=list(KINDS)).result.arrays
    assert abs(float(arrays["corrupted"].values[0])) < 1e-3
    np.testing.assert_allclose(arrays["indirect_effect"].values, 0, atol=1e-3)


def test_restoring_every_text_reader_gives_the_clean_image(session: Any) -> None:
    result = trace(session, window=99).result
    assert float(result.arrays["corrupted"].values[0]) < -0.01
    np.testing.assert_allclose(result.arrays["restored"].values, 0, atol=1e-3)


@pytest.mark.parametrize("latents", ["own", "matched"])
@pytest.mark.parametrize("direction", ["restore", "corrupt"])
def test_all_readers_swapped_is_the_other_run(session: Any, tiny: str, latents: str, direction: str) -> None:
    result = trace(session, model=tiny, window=99, latents=latents, direction=direction).result
    assert float(result.arrays["corrupted"].values[0]) < -0.01
    want = 0.0 if direction == "restore" else float(result.arrays["corrupted"].values[0])
    np.testing.assert_allclose(result.arrays["restored"].values, want, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_batch_does_not_matter(session: Any, atlas: Any, plain: Any, rows: int) -> None:
    from studio.session import Session

    small = Session(runs=session.store.root, device="cpu", threads=session.threads, batch=rows)
    small._loaded = session._loaded
    parts = trace(small)
    small.queue.close()
    assert parts.host["batch"] == rows
    for name, array in plain.result.arrays.items():
        np.testing.assert_allclose(parts.result.arrays[name].values, array.values, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "when"),
    [("up_blocks.1.attentions.0.transformer_blocks.0.attn2", None), ("up_blocks.0.resnets.0", (0, 1))],
)
def test_equals_the_naive_reference(session: Any, atlas: Any, name: str, when: Any) -> None:
    kind = "cross-attention" if name.endswith("attn2") else "resnet"
    run = trace(session, (5,), kinds=[kind], guidance=3.0, last_step=when and when[1])
    torch.set_num_threads(session.threads)
    places = list(atlas.subject_positions(PROMPT, SUBJECT, None))
    with torch.no_grad():
        clean, _ = atlas.encode([PROMPT])
        corrupted = naive_trace.subject_states(atlas.pipe, PROMPT, places, 3.0, 5)
        want = naive_trace.restored_image(atlas.pipe, [name], clean.states, corrupted, 5, 3, 3.0, when)
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
            arrays = trace(session, replacement="a blue heart on a sand background", steps=1).result.arrays
        effect = np.abs(arrays["indirect_effect"].values)
        assert effect[planted] > 1e-3, f"layer {planted} lets no text in"
        assert (np.delete(effect, planted) < 0.01 * effect[planted]).all()
        assert abs(float(arrays["restored"].values[0, planted])) < 0.01 * effect[planted] + 1e-6


def test_a_stopped_trace_keeps_what_was_measured_and_leaves_no_hook(session: Any, atlas: Any) -> None:
    def stop_after_the_first_batch(job: Any) -> None:
        if job.latest is not None:
            job.cancel()

    recipe = Recipe(
        "trace-unet", "atlas-sd", {"prompt": PROMPT, "subject": SUBJECT},
        {**QUICK, "steps": 2, "step_ranges": 2, "guidance_also": 1.0}, (0, 1, 2),
    )  # fmt: skip
    with pytest.raises(Cancelled) as stopped:
        session.run(recipe, stop_after_the_first_batch, save=False, fresh=True)
    run = stopped.value.partial
    assert run.status == "stopped" and np.isfinite(run.result.arrays["clean"].values[0])
    assert np.isnan(run.result.arrays["indirect_effect_by_guidance"].values[1]).all()
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


# ---- statistics ------------------------------------------------------------------------------------------


def test_three_seeds_have_intervals_and_a_line_of_chance(session: Any) -> None:
    run = trace(session, (0, 1, 2), steps=1)
    arrays, values = run.result.arrays, run.result.values
    mean, low, high = (arrays[f"indirect_effect{n}"].values for n in ("", "_low", "_high"))
    assert (low <= mean + 1e-6).all() and (mean <= high + 1e-6).all() and (low < high).any()
    each = arrays["restored"].values - arrays["corrupted"].values[:, None]
    assert (low >= each.min(0) - 1e-6).all() and (high <= each.max(0) + 1e-6).all()
    np.testing.assert_allclose(arrays["normalised_effect"].values, mean / values["total_effect"], rtol=1e-4)
    signs = np.array(np.meshgrid(*[[1, -1]] * 3)).reshape(3, -1).T
    assert values["chance_line"] == pytest.approx(
        (signs @ each / 3).max(), rel=1e-4
    )  # 95 % of 8: the largest
    figure = find_method("trace-unet").draw(run)
    caption = figure.caption
    assert caption.startswith("Over all cells chance reaches") and "fewer than 5 seeds" in caption
    drawn = [len(to_bytes(replace(figure, caption=c), "png")) for c in ("", caption)]
    assert drawn[1] > drawn[0] + 1000


# ---- the noise and the subject removed -------------------------------------------------------------------


def test_the_subject_is_taken_out_of_the_prompt() -> None:
    assert without_subject(CorruptionInputs(PROMPT, SUBJECT)) == "a on a white background"
    twice = CorruptionInputs("a star and a star", "star", 2)
    assert without_subject(twice) == "a star and a"


def test_removal_is_the_prompt_without_the_subject(session: Any, plain: Any) -> None:
    result, recipe = (
        plain.result,
        Recipe("generate", "atlas-sd", {"prompt": ["a on a white background"]}, {"steps": 3}),
    )
    want = session.run(recipe, save=False).result.arrays["images"].values[0, 0]
    difference = result.images["seed0-removed"].astype(int) - want
    assert np.abs(difference).max() <= 2 and (difference != 0).mean() < 0.01
    distance = np.sqrt((((result.images["seed0-clean"].astype(float) - want) / 255) ** 2).mean())
    assert result.values["removal_effect"] == pytest.approx(distance, rel=1e-2)


def test_weak_noise_is_told_and_kept(session: Any) -> None:
    result = trace(session, noise=0.3, steps=2).result
    assert result.values["noise"] == 0.3 and "noise_tried" not in result.values
    assert result.values["total_effect"] < result.values["removal_effect"] / 2
    assert any("less than half" in w and "--search-noise" in w for w in result.values["warnings"])


def test_a_search_takes_the_first_scale_that_does_half_of_removal(session: Any, tiny: str) -> None:
    same = {"model": tiny, "prompt": "a star", "subject": "star"}
    run = trace(session, (0, 1), noise=0.1, search_noise=True, **same)
    values = run.result.values
    tried = dict(tuple(map(float, pair.split(":"))) for pair in values["noise_tried"].split(";"))
    half = values["removal_effect"] / 2
    *before, last = tried.values()
    assert list(tried) == [0.1, 5.0, 8.0, 12.0, 20.0][: len(tried)] and values["noise"] == list(tried)[-1]
    assert all(t < half for t in before) and last >= half and len(tried) > 1
    assert values["total_effect"] == pytest.approx(last, abs=1e-3)
    given = trace(session, (0, 1), noise=values["noise"], **same).result
    assert given.values["removal_effect"] == pytest.approx(values["removal_effect"], abs=1e-3)
    for name in ("corrupted", "restored"):
        np.testing.assert_allclose(given.arrays[name].values, run.result.arrays[name].values, atol=1e-3)
    again = session.run(run.recipe, save=False, fresh=True).result
    assert all(np.array_equal(t.values, again.arrays[n].values, True) for n, t in run.result.arrays.items())


def test_a_search_without_end_takes_the_best_and_says_so(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise_search, "SCALES", (0.2, 0.1))
    values = trace(session, noise=0.05, search_noise=True, steps=1).result.values
    assert values["noise"] == 0.2 and any("no larger scale did more" in w for w in values["warnings"])


def test_strong_noise_is_not_searched_further(session: Any) -> None:
    values = trace(session, noise=20.0, search_noise=True, steps=1).result.values
    assert values["noise"] == 20.0 and values["noise_tried"].startswith("20:")
    swapped = trace(session, replacement="a blue heart", search_noise=True, steps=1).result.values
    assert "noise_tried" not in swapped and swapped["removal_effect"] is None


# ---- ranges of steps, a second guidance scale ------------------------------------------------------------


@pytest.mark.parametrize(("first", "last", "parts"), [(0, 49, 5), (0, 6, 3), (2, 4, 3), (3, 9, 2)])
def test_ranges_partition_the_steps(first: int, last: int, parts: int) -> None:
    ranges = step_ranges(first, last, parts)
    assert [s for a, b in ranges for s in range(a, b + 1)] == list(range(first, last + 1))
    lengths = [b - a for a, b in ranges]
    assert len(ranges) == parts and max(lengths) - min(lengths) <= 1


def test_each_range_is_the_trace_of_its_steps(session: Any, tiny: str) -> None:
    same = {"model": tiny, "kinds": ["cross-attention", "resnet"], "window": 99}
    whole = trace(session, step_ranges=2, **same).result
    steps = whole.arrays["indirect_effect_by_steps"]
    assert steps.axis("range").labels == ("0-1", "2-2")
    readers = [x.endswith("attn2") for x in whole.arrays["restored"].axis("layer").labels]
    restored = whole.arrays["restored"].values[:, readers]  # every reader of the text at all steps: clean
    np.testing.assert_allclose(restored, 0, atol=1e-3)
    for row, (first, last) in zip(steps.values, ((0, 1), (2, 2)), strict=True):
        part = trace(session, first_step=first, last_step=last, **same).result
        np.testing.assert_allclose(row, part.arrays["indirect_effect"].values, atol=1e-3)
    with pytest.raises(RequestError, match="more than the 3 steps"):
        trace(session, model=tiny, step_ranges=4)


def test_the_second_guidance_scale_is_a_trace_of_its_own(session: Any, tiny: str) -> None:
    jobs: list[Any] = []
    same = {"model": tiny, "step_ranges": 2}
    run = trace(session, guidance=4.0, guidance_also=1.0, hint=True, watch=jobs.append, **same)
    assert jobs[-1].done == jobs[-1].total > 0
    both = run.result.arrays["indirect_effect_by_guidance"]
    assert both.axis("guidance").labels == ("4", "1")
    single = trace(session, guidance=1.0, **same).result.arrays
    np.testing.assert_array_equal(both.values[0], run.result.arrays["indirect_effect"].values)
    np.testing.assert_allclose(both.values[1], single["indirect_effect"].values, atol=1e-3)
    ranges = run.result.arrays["indirect_effect_by_guidance_and_steps"]
    assert [a.name for a in ranges.axes] == ["guidance", "range", "layer"]
    np.testing.assert_allclose(ranges.values[1], single["indirect_effect_by_steps"].values, atol=1e-3)
    total = run.result.arrays["total_effect_by_guidance"].values
    assert total[0] == pytest.approx(run.result.values["total_effect"], abs=1e-6) and total[1] != total[0]
    assert {f"seed0-{g}clean" for g in ("", "guidance1-")} <= set(run.result.images)
    figure = find_method("trace-unet").draw(run)
    assert figure.data["rows"] == [
        f"cross-attention, guidance {g}, {r}" for g in (4, 1) for r in ("all steps", "steps 0-1", "steps 2-2")
    ]
    grid = [layout(both.axis("layer").labels, v)["values"][0] for v in (*both.values, *ranges.values[1])]
    np.testing.assert_array_equal(figure.data["values"][[0, 3, 4, 5]], grid)
    assert to_bytes(figure, "png")[:4] == b"\x89PNG"
    with pytest.raises(RequestError, match="scale of the trace itself"):
        trace(session, model=tiny, guidance=2.0, guidance_also=2.0)


def test_pndm_counts_every_model_call(session: Any, tiny: str) -> None:
    jobs: list[Any] = []
    run = trace(session, model=tiny, steps=4, scheduler="pndm", step_ranges=2, watch=jobs.append)
    assert jobs[-1].done == jobs[-1].total > 0
    assert run.result.arrays["indirect_effect_by_steps"].axis("range").labels == ("0-2", "3-4")


def test_maps_are_stacked_by_kind() -> None:
    labels = ("down_blocks.0.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    data = stacked(labels, [("all steps", np.array([1.0, 2.0])), ("steps 0-4", np.array([3.0, 4.0]))])
    assert data["rows"] == [
        f"{k}, {m}" for k in ("cross-attention", "resnet") for m in ("all steps", "steps 0-4")
    ]
    np.testing.assert_array_equal(data["values"], [[2], [4], [1], [3]])
    assert data["names"] == [[labels[1]], [labels[1]], [labels[0]], [labels[0]]]


# ---- the screen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "latents", "direction"),
    [
        ("sd1", "own", "restore"),
        ("sd1", "own", "corrupt"),
        ("sd1", "matched", "corrupt"),
        ("sd2", "own", "restore"),
        ("sdxl", "matched", "restore"),
    ],
)
def test_an_unguided_screen_is_the_exact_trace_of_few_steps(
    session: Any, family: str, latents: str, direction: str
) -> None:
    """Without guidance nothing is estimated: the same images, which --screen makes and the trace makes."""
    same = {"guidance": 1.0, "latents": latents, "direction": direction, "first_step": 1}
    same["model"] = str(layouts.saved(family))
    screen, exact = trace(session, screen=True, **same).result, trace(session, **same).result
    for name in ("clean", "corrupted", *exact.arrays["restored"].axis("layer").labels):
        quick, slow = (r.images[f"seed0-{p}{name}"] for r, p in ((screen, "screen-"), (exact, "")))
        assert np.abs(quick.astype(int) - slow).max() <= 2
    assert screen.values["screen_total_effect"] == pytest.approx(exact.values["total_effect"], abs=1e-4)


def test_the_screen_equals_the_naive_reference(session: Any, atlas: Any) -> None:
    run = trace(session, (5,), screen=True, guidance=3.0)
    torch.set_num_threads(session.threads)
    with torch.no_grad():
        clean, _ = atlas.encode([PROMPT])
        places = list(atlas.subject_positions(PROMPT, SUBJECT, None))
        corrupted = naive_trace.subject_states(atlas.pipe, PROMPT, places, 3.0, 5)
    for name in run.result.arrays["screen"].axis("layer").labels[::4]:
        want = naive_trace.screened_image(atlas.pipe, name, clean.states, corrupted, 5, 3, 3.0)
        got = run.result.images[f"seed5-screen-{name}"]
        assert np.abs(got.astype(int) - want).max() <= 2 and (got != want).mean() < 0.01
    shown = run.result.images["seed5-screen-clean"].astype(int) - run.result.images["seed5-screen-corrupted"]
    assert np.abs(shown).max() > 20


def test_the_screen_is_the_mean_of_two_estimates(session: Any, tiny: str) -> None:
    """Of the score and of the share of the way in latents; here images stand for latents, nearly."""
    run = trace(session, model=tiny, screen=True).result
    clean, corrupted, *cells = (im.astype(float) / 255 for n, im in run.images.items() if "-screen-" in n)
    way = clean - corrupted
    share = np.array([((c - corrupted) * way).sum() / (way**2).sum() for c in cells])
    score = -np.array([np.sqrt(((c - clean) ** 2).mean()) for c in (corrupted, *cells)])
    want = ((score[1:] - score[0]) - share * score[0]) / 2
    got = run.arrays["screen"].values
    assert np.corrcoef(got, want)[0, 1] > 0.9 and np.abs(got - want).max() < 0.3 * np.abs(want).max()


def test_unconditional_predictions_are_continued_where_they_are_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    pair, others = (torch.randn(n, 4, 3, 3, generator=generator) for n in (2, 5))
    shift = torch.randn(4, 3, 3, generator=generator)
    torch.testing.assert_close(continued(others, pair, -0.7 * pair + shift), -0.7 * others + shift)
    ends = torch.randn(2, 4, 3, 3, generator=generator)
    between = torch.stack([0.3 * pair[0] + 0.7 * pair[1], pair[0], pair[1]])
    want = torch.stack([0.3 * ends[0] + 0.7 * ends[1], ends[0], ends[1]])
    torch.testing.assert_close(continued(between, pair, ends), want)
    torch.testing.assert_close(
        continued(others, pair[:1].repeat(2, 1, 1, 1), ends), ends[1].expand(5, 4, 3, 3)
    )
    assert continued(others, pair, None) is None


class Rows:
    """A Report that only knows how many rows a forward may have."""

    def __init__(self, rows: int) -> None:
        self.rows = rows


@pytest.mark.parametrize("rows", [16, 64])
def test_the_screen_costs_a_fifteenth_at_the_size_of_sd1(rows: int) -> None:
    """70 modules, 50 steps: 72 guided images are 7,200 rows."""
    plan = Plan(steps=50, guidance=7.5, height=16, width=16)
    bench = Bench(layouts.model("sd1"), plan, None, None, None, Rows(rows))
    assert 15 * Screen(bench, None, [[]] * 70, 0).rows() <= 2 * 50 * 72


def test_progress_of_the_screen_ends_at_its_end(session: Any, tiny: str) -> None:
    jobs: list[Any] = []
    trace(session, model=tiny, screen=True, latents="matched", watch=jobs.append)
    assert jobs[-1].what == "screening" and jobs[-1].done == jobs[-1].total > 0
