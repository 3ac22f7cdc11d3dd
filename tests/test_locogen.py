"""LocoGen: its algebra, its slow reference, planted plumbing, controls, screen, growth, and its sentences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe
from studio.errors import Cancelled, RequestError
from studio.methods.direct_effect import CLEAN, Swap, windows
from studio.methods.locogen import best_layers, combine, paraphrases
from studio.models.hooks import hook_count, watch
from studio.models.sampling import Plan, Readings, denoise
from studio.models.sites import text_reads, unet_module
from studio.types import Patch
from tests import layouts
from tests.references import naive_locogen
from tests.test_causal_trace_unet import silenced

PROMPT, OTHER = "a red star on a white background", "a blue circle on a white background"
QUICK = {"steps": 2, "metric": "distance", "hint": False}


def search(session: Any, seeds: tuple[int, ...] = (0,), model: str = "atlas-sd", **params: Any) -> Any:
    """A finished run of localize."""
    inputs = {"prompt": PROMPT, "replacement": OTHER}
    inputs |= {k: params.pop(k) for k in ("prompt", "replacement", "paraphrase") if k in params}
    recipe = Recipe("localize", str(model), inputs, {**QUICK, **params}, seeds)
    return session.run(recipe, save=False, fresh=True)


def values_of(model: Any) -> list[torch.Tensor]:
    """The weights that make values, a layer each, in execution order."""
    return [model.unet.get_submodule(str(s.layer)).to_v.weight for s in model.unet_sites(["cross-attention"])]


def test_arrays_are_those_of_the_contract(session: Any) -> None:
    run = search(session, (0, 3), window=4)
    arrays, values = run.result.arrays, run.result.values
    axes = {n: [a.name for a in t.axes] for n, t in arrays.items()}
    assert axes == {
        "clean": ["seed"], "replaced": ["seed", "window"], "direct_effect": ["window"],
        "direct_effect_sem": ["window"], "all_layers": ["seed"], "placebo_all": ["seed", "paraphrase"],
        "layers": ["window", "layer"],
    }  # fmt: skip
    assert arrays["replaced"].axis("window").labels == tuple(f"{i}-{i + 3}" for i in range(7))
    effect = arrays["clean"].values[:, None] - arrays["replaced"].values
    np.testing.assert_allclose(arrays["direct_effect"].values, effect.mean(0), atol=1e-6)
    sem = effect.std(0, ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(arrays["direct_effect_sem"].values, sem, atol=1e-6)
    names = arrays["layers"].axis("layer").labels
    assert [x.split(".")[0] for x in names].index("mid_block") == 3 and len(names) == 10
    np.testing.assert_array_equal(arrays["layers"].values[2], [0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    best = int(np.argmax(arrays["direct_effect"].values))
    assert values["best_window"] == f"{best}-{best + 3}"
    assert values["best_layers"] == ",".join(names[best : best + 4])
    assert values["best_share"] == pytest.approx(
        float(effect.mean(0).max()) / values["total_effect"], abs=1e-6
    )
    wanted = {"clean", "all", "placebo1", "placebo2", *(f"{i}_{i + 3}" for i in range(7))}
    assert set(run.result.images) == {f"seed{s}-{w}" for s in (0, 3) for w in wanted}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "atlas"])
def test_equals_the_naive_reference(session: Any, family: str) -> None:
    model = layouts.model(family)
    window = 3 if family == "sdxl" else 1 if family != "atlas" else 2
    name = "atlas-sd" if family == "atlas" else layouts.saved(family)
    run = search(session, (5,), name, window=window, guidance=4.0)
    torch.set_num_threads(1)
    arrays = run.result.arrays
    names = arrays["layers"].axis("layer").labels
    count = len(names) - window + 1
    for i in range(count) if family != "atlas" else (6, 8):
        want = naive_locogen.altered_image(model.pipe, names[i : i + window], PROMPT, OTHER, 5, 2, 4.0)
        got = run.result.images[f"seed5-{i}_{i + window - 1}"]
        assert np.abs(got.astype(int) - want).max() <= 2 and (got != want).mean() < 0.02
        rms = np.sqrt(np.mean(((want - run.result.images["seed5-clean"].astype(float)) / 255) ** 2))
        assert float(arrays["direct_effect"].values[i]) == pytest.approx(rms, abs=2e-3) and rms > 1e-3


def test_without_guidance_there_is_no_unconditional_row(session: Any) -> None:
    model = layouts.model("sd1")
    run = search(session, (1,), layouts.saved("sd1"), window=1, guidance=1.0)
    names = run.result.arrays["layers"].axis("layer").labels
    want = naive_locogen.altered_image(model.pipe, names[1:2], PROMPT, OTHER, 1, 2, 1.0)
    assert np.abs(run.result.images["seed1-1_1"].astype(int) - want).max() <= 2


def test_all_layers_swapped_is_the_other_prompt(session: Any) -> None:
    """Also as the window that holds every layer; the clean row is the prompt's own image."""
    folder, model = layouts.saved("sd2"), layouts.model("sd2")
    depth = len(values_of(model))
    images = search(session, (2,), folder, window=depth).result.images
    plan = model.plan(type("P", (), {"steps": 2, "guidance": None, "scheduler": None}))
    want = model.generate(model.encode([PROMPT, OTHER])[0], [2, 2], plan)
    for name, row in (("clean", 0), ("all", 1), (f"0_{depth - 1}", 1)):
        assert np.abs(images[f"seed2-{name}"].astype(int) - want[row]).max() <= 1


@pytest.mark.parametrize("rows", [1, 5])
def test_the_batch_does_not_matter(session: Any, rows: int) -> None:
    from studio.session import Session

    folder = layouts.saved("sd1")
    whole = search(session, (0, 1), folder, window=1)
    small = Session(runs=session.store.root, device="cpu", threads=1, batch=rows)
    small._loaded = session._loaded
    parts = search(small, (0, 1), folder, window=1)
    small.queue.close()
    assert parts.host["batch"] == rows
    for name, array in whole.result.arrays.items():
        np.testing.assert_allclose(parts.result.arrays[name].values, array.values, atol=2e-4)


# ---- what is held -----------------------------------------------------------------------------------------


def test_held_layers_read_the_chosen_text_and_do_not_run() -> None:
    model, plan = layouts.model("sdxl"), Plan(steps=2, guidance=5.0, height=16, width=16)
    cond, _ = model.encode([PROMPT, OTHER, PROMPT])
    uncond, depth = model.unconditional(2, plan), len(values_of(model))
    readings, fed = Readings.of(model, cond, uncond), cond.rows([0, 0])
    plain = denoise(model, fed, uncond, [3, 3], plan)
    same = readings.patches([[0] * depth, [2] * depth])  # text 2 says what text 0 says
    with silenced(values_of(model)):  # what is held was read before
        again = denoise(model, fed, uncond, [3, 3], plan, patches=same)
    assert len(same) == 2 * depth and (again - plain).abs().max() < 1e-4
    mixed = readings.patches([[0] * depth, [1] * depth])
    other = denoise(model, fed, uncond, [3, 3], plan, patches=mixed)
    assert (other[0] - plain[0]).abs().max() < 1e-4 < (other[1] - plain[1]).abs().max()
    assert sum(hook_count(m) for m in model.components().values()) == 0


def test_a_site_is_held_whole_and_once() -> None:
    linear, site = (
        torch.nn.Linear(3, 3),
        text_reads(layouts.model("sd1").unet_sites(["cross-attention"])[0])[0],
    )
    table = torch.arange(6.0).reshape(2, 3)
    hold = Patch(site, do="hold", value=(table, torch.tensor([1, 0, 1])))
    with watch({site: linear}, record=[site], patches=[hold, Patch(site, do="scale", value=2.0)]) as tape:
        out = linear(torch.full((3, 3), torch.nan))
        with pytest.raises(ValueError, match="3 rows are held at .*, 2 come"):
            linear(torch.zeros(2, 3))
    assert torch.equal(out, 2 * table[[1, 0, 1]]) and torch.equal(tape[site], out)
    for bad in (replace(hold, rows=(0,)), replace(hold, at=(0,)), replace(hold, when=(0, 1))):
        with pytest.raises(ValueError, match="held once"), watch({site: linear}, patches=[bad]):
            pass
    with pytest.raises(ValueError, match="held once"), watch({site: linear}, patches=[hold, hold]):
        pass
    assert hook_count(linear) == 0


def test_the_sites_of_the_text_are_those_modules() -> None:
    model = layouts.model("atlas")
    for layer in model.unet_sites(["cross-attention"]):
        attention = model.unet.get_submodule(str(layer.layer))
        key, value = (unet_module(model.unet, s) for s in text_reads(layer))
        assert key is attention.to_k and value is attention.to_v


# ---- what it finds ----------------------------------------------------------------------------------------


def test_a_planted_layer_is_in_every_window_that_has_an_effect(session: Any) -> None:
    """Only one layer lets text in: its windows do what all layers do, the others nothing."""
    model, folder = session.model(str(layouts.saved("sdxl")), "diffusion"), layouts.saved("sdxl")
    values = values_of(model)
    for planted in range(len(values)):
        with silenced([w for i, w in enumerate(values) if i != planted]):
            result = search(session, (0,), folder, window=2).result
        effect, total = result.arrays["direct_effect"].values, result.values["total_effect"]
        inside = np.array([i <= planted <= i + 1 for i in range(len(effect))])
        assert total > 1e-3, f"layer {planted} lets no text in"
        np.testing.assert_allclose(effect, np.where(inside, total, 0), atol=0.02 * total + 1e-5)


def test_screen_knows_the_planted_layer_from_few_rows(session: Any) -> None:
    model = session.model("atlas-sd", "diffusion")
    with silenced([w for i, w in enumerate(values_of(model)) if i != 6]):
        run = search(session, (0, 1), screen=True, window=3)
    arrays = run.result.arrays
    np.testing.assert_allclose(arrays["screen"].values, [i in (4, 5, 6) for i in range(8)], atol=1e-3)
    assert np.isnan(arrays["direct_effect"].values).all() and set(run.result.images) == {"seed0-clean"}
    assert (
        run.result.values["screen_rank_agreement"] is None
        and "one seed, 0" in run.result.values["warnings"][0]
    )


def test_the_screen_comes_first_and_orders_what_it_may(session: Any) -> None:
    """With `screen` the first seed's windows come best first; both orders end in the same numbers."""
    folder, seen = layouts.saved("sdxl"), []

    def note(job: Any) -> None:
        if job.latest is not None and "screen" in job.latest.arrays:
            known = np.isfinite(job.latest.arrays["replaced"].values)
            seen.append((job.latest.arrays["screen"].values, known))

    from studio.session import Session

    small = Session(runs=session.store.root, device="cpu", threads=1, batch=1)
    params = {**QUICK, "hint": True, "window": 2, "order": "screen"}
    recipe = Recipe("localize", str(folder), {"prompt": PROMPT, "replacement": OTHER}, params, (0,))
    run = small.run(recipe, note, save=False, fresh=True)
    small.queue.close()
    assert run.result.values["order"] == "screen"
    screen, known = next((s, k) for s, k in seen if k.any())
    assert not seen[0][1].any() and known[0, int(np.argmax(screen))]
    plain = search(session, (0,), folder, window=2).result.arrays
    np.testing.assert_allclose(run.result.arrays["replaced"].values, plain["replaced"].values, atol=2e-4)
    assert np.isfinite(run.result.values["screen_rank_agreement"])
    effect = plain["direct_effect"].values
    share = effect[int(np.argmax(screen))] / effect.max()
    assert run.result.values["screen_best_share"] == pytest.approx(float(share), abs=2e-3)


@pytest.mark.parametrize("agrees", [0.79, 0.8])
def test_auto_orders_by_the_screen_only_where_it_agrees(
    session: Any, monkeypatch: pytest.MonkeyPatch, agrees: float
) -> None:
    monkeypatch.setattr("studio.methods.direct_effect.Search.agreement", lambda self: agrees)
    run = search(session, (0, 1), layouts.saved("sd1"), window=1, hint=True)
    assert run.result.values["order"] == ("screen" if agrees == 0.8 else "execution")
    assert np.isfinite(run.result.arrays["replaced"].values).all()


def test_placebos_are_a_floor_that_can_be_drawn_for_every_window(session: Any) -> None:
    """A paraphrase that is the replacement has the replacement's effects."""
    run = search(session, (0, 1), layouts.saved("sd1"), window=1, placebo="windows", paraphrase=[OTHER])
    arrays, values = run.result.arrays, run.result.values
    np.testing.assert_allclose(arrays["placebo"].values, arrays["replaced"].values, atol=1e-4)
    np.testing.assert_allclose(arrays["placebo_all"].values[:, 0], arrays["all_layers"].values, atol=1e-4)
    most = max(values["total_effect"], arrays["direct_effect"].values.max())
    assert values["placebo_floor"] == pytest.approx(float(most), abs=1e-4)
    assert {"seed0-placebo_0_0", "seed1-placebo1"} <= set(run.result.images)
    assert "No window has a larger effect" in values["warnings"][0]


def test_paraphrases_change_the_opening() -> None:
    assert paraphrases("a star") == ("an image of a star", "a picture of a star")
    assert paraphrases("A photo of a star") == ("an image of a star", "a picture of a star")
    assert paraphrases("an image of a star") == ("a picture of a star", "a photo of a star")


@pytest.mark.parametrize("threshold", [0.0, 0.55, 1.0])
def test_the_window_grows_until_it_does_enough(session: Any, threshold: float) -> None:
    folder = layouts.saved("sdxl")
    sizes = [search(session, (0,), folder, window=w).result.values["best_share"] for w in range(1, 9)]
    enough = next((i + 1 for i, share in enumerate(sizes) if share >= threshold), 8)
    result = search(session, (0,), folder, grow=threshold).result
    assert result.values["window"] == enough
    growth = result.arrays["growth"]
    assert growth.axis("size").labels == tuple(str(i + 1) for i in range(enough))
    np.testing.assert_allclose(growth.values, sizes[:enough], atol=1e-3)
    assert len(result.arrays["direct_effect"].values) == 8 - enough + 1


# ---- several prompts, other callers -----------------------------------------------------------------------


def test_prompts_are_the_unit_when_runs_are_combined(session: Any) -> None:
    folder = layouts.saved("sd1")
    runs = [search(session, (0, 1), folder, window=1, prompt=p).result for p in (PROMPT, "two green rings")]
    both, effects = combine(runs), np.stack([r.arrays["direct_effect"].values for r in runs])
    np.testing.assert_allclose(both["direct_effect"].values, effects.mean(0), atol=1e-6)
    np.testing.assert_allclose(
        both["direct_effect_sem"].values, effects.std(0, ddof=1) / np.sqrt(2), atol=1e-6
    )
    low, high = both["direct_effect_low"].values, both["direct_effect_high"].values
    assert (low <= effects.mean(0)).all() and (high >= effects.mean(0)).all() and (low < high).all()
    assert both["by_prompt"].at("prompt", "1").values.tolist() == effects[1].tolist()
    total = np.mean([r.values["total_effect"] for r in runs])
    np.testing.assert_allclose(both["share"].values, effects.mean(0) / total, rtol=1e-4)
    with pytest.raises(RequestError, match="same windows"):
        combine([runs[0], search(session, (0,), folder, window=2).result])
    with pytest.raises(RequestError):
        combine([])


def test_best_layers_are_those_of_the_best_window(session: Any) -> None:
    model, folder = session.model(str(layouts.saved("sdxl")), "diffusion"), layouts.saved("sdxl")
    prompts, others = (PROMPT, "two green rings"), (OTHER, "a house")
    runs = [
        search(session, (0, 1), folder, window=3, prompt=p, replacement=o).result
        for p, o in zip(prompts, others, strict=True)
    ]
    best = combine(runs)["direct_effect"].best(1)[0][0][0]
    names = runs[0].arrays["layers"]
    want = [
        n
        for n, inside in zip(names.axis("layer").labels, names.at("window", best).values, strict=True)
        if inside
    ]
    sampling = type("Sampling", (), {"steps": 2, "guidance": None, "scheduler": None})
    got = best_layers(model, prompts, others, sampling, None, Silent(), window=3)
    assert got == tuple(want) and len(got) == 3


class Silent:
    """A report that nobody reads."""

    rows = 16

    def plan(self, total: int, what: str = "") -> None:
        """Nothing."""

    step = partial = warn = lambda self, *a: None


# ---- sentences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"replacement": f" {PROMPT} "}, "is the prompt itself"),
        ({"replacement": ""}, "--replacement is empty"),
        ({"paraphrase": [PROMPT]}, "--paraphrase must say"),
        ({"screen": True, "grow": 0.5}, "leave one of them out"),
        ({"order": "screen", "hint": False}, "turned off; turn it on, or take another --order"),
        ({"window": 11}, "--window 11 is more than the 10 cross-attention layers of atlas-sd"),
        ({"window": 0}, "at least 1"),
        ({"grow": 1.5}, "from 0 to 1"),
    ],
)
def test_wrong_requests(session: Any, params: dict, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        search(session, **params)


def test_default_windows_are_the_papers(session: Any) -> None:
    for family, width in (("sd1", 2), ("sdxl", 5)):
        result = search(session, (0,), layouts.saved(family)).result
        assert result.values["window"] == width


def test_a_swap_that_changes_nothing_is_said(session: Any) -> None:
    long = PROMPT + " and" * 40
    run = search(session, prompt=long + " star", replacement=long + " ring", paraphrase=["two houses"])
    text = " ".join(run.result.values["warnings"])
    assert "hardly changes the score" in text and "lost: 'and" in text


def test_a_stopped_search_keeps_what_was_measured(session: Any, atlas: Any) -> None:
    def stop_after_the_first_batch(job: Any) -> None:
        if job.latest is not None:
            job.cancel()

    recipe = Recipe("localize", "atlas-sd", {"prompt": PROMPT, "replacement": OTHER}, QUICK, (0, 1, 2))
    with pytest.raises(Cancelled) as stopped:
        session.run(recipe, stop_after_the_first_batch, save=False, fresh=True)
    run = stopped.value.partial
    assert run.status == "stopped" and np.isfinite(run.result.arrays["clean"].values).all()
    assert sum(hook_count(m) for m in atlas.components().values()) == 0


def test_swaps_choose_a_text_for_every_layer() -> None:
    assert [s.label for s in windows(4, 3)] == ["0-2", "1-3"]
    assert Swap(2, 1, 2).choice(4) == [0, 2, 2, 0] and CLEAN.choice(3) == [0, 0, 0]


def test_words_that_the_model_may_not_know_are_said(session: Any) -> None:
    asked = {"prompt": "a zzqqxw star", "replacement": "a circle"}
    run = session.run(Recipe("localize", "atlas-sd", asked, {"steps": 1, "screen": True}), save=False)
    assert any("zzqqxw" in w for w in run.result.values["warnings"])
