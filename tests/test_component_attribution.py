"""Component attribution: its slow reference, its derivative, what an ablation takes, what is left behind."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe
from studio.edit_files import read_edit
from studio.errors import Cancelled, RequestError
from studio.methods.component_ablation import ranked_edit, zeroed
from studio.methods.component_attribution import BARS, correlation, draw, short
from studio.models import objectives
from studio.models.objectives import (
    Objective,
    component_axis,
    differentiable,
    find_weights,
    noise_terms,
    summed,
)
from studio.models.sampling import new_scheduler
from tests import layouts
from tests.references import naive_attribution as naive

CONCEPT = "a red star"
EVERY = ("feed-forward", "to_k", "to_v")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Small matrices gain nothing from more, and lose much where cores are shared."""
    torch.set_num_threads(1)


class Quiet:
    """A report that counts rows and stops when told to."""

    def __init__(self, rows: int = 3, stop_at: int = 10**9) -> None:
        self.rows, self.done, self.stop_at = rows, 0, stop_at

    def step(self, n: int = 1) -> None:
        self.done += n
        if self.done >= self.stop_at:
            raise Cancelled


@cache
def exact(family: str) -> Any:
    """The random model of one layout in float64."""
    return layouts.load_diffusion(layouts.locate(str(layouts.saved(family))), "cpu", torch.float64)


def ask(**changes: Any) -> SimpleNamespace:
    """Parameters of a quick attribution."""
    quick = {"steps": 3, "guidance": 3.0, "scheduler": None, "components": EVERY, "objective": "erase"}
    return SimpleNamespace(**(quick | {"granularity": "layer"} | changes))


def attributed(model: Any, base: str = "", seeds: tuple[int, ...] = (0,), **changes: Any) -> Objective:
    """The objective of the concept with its gradient taken."""
    report = changes.pop("report", None) or Quiet()
    found = Objective(model, SimpleNamespace(concept=CONCEPT, base=base), ask(**changes), seeds, report)
    with differentiable(found.weights):
        for j in range(len(seeds)):
            found.take_seed(j)
    return found


def rows_of(model: Any, call: Any) -> int:
    """How many UNet rows are computed while `call()` runs."""
    counted = []
    handle = model.unet.register_forward_pre_hook(lambda m, args: counted.append(len(args[0])))
    try:
        call()
    finally:
        handle.remove()
    return sum(counted)


def run(session: Any, seeds: tuple[int, ...] = (0,), model: str = "atlas-sd", **given: Any) -> Any:
    """A finished run of attribute."""
    asked = {"concept": CONCEPT, "steps": 3, "check": 0, **given}
    inputs = {k: asked.pop(k) for k in ("concept", "base") if k in asked}
    return session.run(Recipe("attribute", model, inputs, asked, seeds), save=False, fresh=True)


# ---- against the slow reference ---------------------------------------------------------------------------

CASES = {
    "noise": ("sd1", "", 3.0),
    "velocity": ("sd2", "", 3.0),
    "a base of its own": ("sd1", "a star", 3.0),
    "velocity, base, no guidance": ("sd2", "a star", 1.0),
}


@pytest.mark.parametrize(("family", "base", "guidance"), CASES.values(), ids=CASES.keys())
def test_erase_equals_the_slow_reference(family: str, base: str, guidance: float) -> None:
    model = exact(family)
    steps = 2 if family == "sd2" else 3
    fast = attributed(model, base, guidance=guidance, steps=steps)
    terms = naive.erase_terms(model.pipe, CONCEPT, base, 0, steps, guidance)
    compare(model, fast, terms)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_amplify_equals_the_slow_reference(family: str) -> None:
    model = exact(family)
    fast = attributed(model, objective="amplify", steps=2)
    compare(model, fast, naive.amplify_terms(model.pipe, CONCEPT, 0, 2, 3.0))


def compare(model: Any, fast: Objective, terms: Any) -> None:
    """J, alpha of two matrices, and the true decrease when a unit is zeroed are those of the reference."""
    assert fast.values[0] == pytest.approx(naive.objective(terms), rel=1e-9)
    assert fast.measured()[0] == pytest.approx(fast.values[0], rel=1e-9)
    alphas = fast.alphas()
    names = [list(alphas)[1], list(alphas)[-1]]
    slow = naive.attributions(model.pipe, terms, [n.removeprefix("unet.") for n in names])
    for name in names:
        want = slow[name.removeprefix("unet.")]
        scale = float(want.abs().max())
        assert scale > 0
        torch.testing.assert_close(alphas[name], want, rtol=1e-7, atol=1e-9 * scale)
        mask = torch.zeros(want.shape, dtype=torch.bool)
        mask[int(want.sum(1).abs().argmax())] = True
        with zeroed(model, {name: mask}):
            true = fast.values[0] - fast.measured()[0]
        slow_decrease = naive.decrease(model.pipe, terms, name.removeprefix("unet."), mask)
        assert true == pytest.approx(slow_decrease, rel=1e-6, abs=1e-9 * fast.values[0])
        slope = naive.decrease(model.pipe, terms, name.removeprefix("unet."), mask, 1e-6) / 1e-6
        assert slope == pytest.approx(float(want[mask].sum()), rel=1e-3)


def test_one_trajectory_serves_all_steps() -> None:
    model, steps = exact("sd1"), 6
    slow = rows_of(model, lambda: naive.objective(naive.erase_terms(model.pipe, CONCEPT, "", 0, steps, 3.0)))
    fast = rows_of(model, lambda: attributed(model, steps=steps))
    assert (slow, fast) == (steps * (steps - 1) + 2 * steps, 2 * steps)
    model, steps = layouts.model("sd1"), 50
    found: list[Objective] = []
    fast = rows_of(model, lambda: found.append(attributed(model, steps=steps)))
    assert fast == 100 == found[0].forwards == found[0].rows() == found[0].report.done
    assert (steps * (steps - 1) + 2 * steps) / fast >= 20


@pytest.mark.parametrize(
    ("base", "guidance", "objective", "rows"),
    [("", 3.0, "erase", 2), ("a star", 3.0, "erase", 3), ("", 1.0, "erase", 2), ("", 3.0, "amplify", 3)],
)
def test_the_progress_bar_knows_its_length(base: str, guidance: float, objective: str, rows: int) -> None:
    found: list[Objective] = []
    model = layouts.model("sd1")
    took = rows_of(
        model, lambda: found.append(attributed(model, base, guidance=guidance, objective=objective))
    )
    assert took == found[0].rows() == found[0].report.done == 3 * rows


# ---- the objective ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "dpm", "lcm"])
def test_the_share_of_signal_is_the_schedulers_own(name: str) -> None:
    model = layouts.model("sd2")
    plan = model.plan(ask(steps=4, scheduler=name))
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn((1, 4, 8, 8), generator=generator) for _ in range(2))
    for i, t in enumerate(new_scheduler(model, plan).timesteps):
        scheduler = new_scheduler(model, plan)
        if name == "euler":
            scheduler.set_begin_index(i)
        a, b, signal = noise_terms(scheduler, i, t)
        x = scheduler.scale_model_input(scheduler.add_noise(image, noise, t[None]), t)
        torch.testing.assert_close(x, signal**0.5 * image + (1 - signal) ** 0.5 * noise, rtol=1e-4, atol=1e-4)
        velocity = signal**0.5 * noise - (1 - signal) ** 0.5 * image
        torch.testing.assert_close(a * velocity + b * x, noise, rtol=1e-4, atol=1e-4)


def test_models_that_predict_the_image() -> None:
    scheduler = new_scheduler(layouts.model("sd1"), layouts.model("sd1").plan(ask()))
    scheduler.register_to_config(prediction_type="sample")
    a, b, signal = noise_terms(scheduler, 0, scheduler.timesteps[0])
    image, noise = 0.7, -1.3
    x = signal**0.5 * image + (1 - signal) ** 0.5 * noise
    assert a * image + b * x == pytest.approx(noise, rel=1e-5)


@pytest.mark.parametrize("family", ["sdxl", "atlas"])
def test_alpha_is_the_slope_of_what_is_measured(family: str) -> None:
    """Taking away a thousandth of a module's weights lowers J by a thousandth of its alpha, nearly."""
    model = layouts.model(family)
    fast = attributed(model, seeds=(0, 1), granularity="module")
    axis, _ = component_axis(fast.weights, "module")
    found = fast.attributions()
    best = axis.labels[int(np.abs(found).argmax())]
    tensors = [w.tensor for w in fast.weights if w.module == best]
    kept, before = [t.clone() for t in tensors], fast.measured()[0]
    assert before == pytest.approx(fast.values.mean(), rel=1e-4)
    try:
        for t in tensors:
            t.mul_(0.999)
        slope = (before - fast.measured()[0]) / 0.001
    finally:
        for t, k in zip(tensors, kept, strict=True):
            t.copy_(k)
    assert slope == pytest.approx(
        float(np.abs(found).max() * np.sign(found[np.abs(found).argmax()])), rel=0.1
    )


def test_half_precision_keeps_the_gradient() -> None:
    path = layouts.locate(str(layouts.saved("sd1")))
    coarse = attributed(layouts.load_diffusion(path, "cpu", torch.bfloat16))
    fine = attributed(layouts.model("sd1"))
    a, b = (torch.cat([x.flatten().double() for x in f.alphas().values()]) for f in (coarse, fine))
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.9


# ---- components -------------------------------------------------------------------------------------------


def test_components_sum_to_each_other() -> None:
    weights = find_weights(layouts.model("sdxl"), EVERY)
    generator = torch.Generator().manual_seed(0)
    alphas = [torch.randn(w.tensor.shape, generator=generator, dtype=torch.float64) for w in weights]
    sums, sizes = {}, {}
    for granularity in ("unit", "layer", "module"):
        axis, sizes[granularity] = component_axis(weights, granularity)
        sums[granularity] = dict(zip(axis.labels, summed(weights, alphas, granularity), strict=True))
        assert len(sizes[granularity]) == len(sums[granularity])
    assert len({s.sum() for s in sizes.values()}) == 1
    for label, total in sums["layer"].items():
        assert label.startswith("unet.") and label.endswith(".weight")
        assert total == pytest.approx(sum(v for n, v in sums["unit"].items() if n.startswith(label + "[")))
    for label, total in sums["module"].items():
        assert label.endswith((".ff", ".attn2"))
        assert total == pytest.approx(sum(v for n, v in sums["layer"].items() if n.startswith(label + ".")))


def test_components_come_in_execution_order_and_as_asked() -> None:
    model = layouts.model("sd1")
    names = [w.name for w in find_weights(model, EVERY)]
    blocks = list(dict.fromkeys(n.split(".")[1] for n in names))
    assert blocks == ["down_blocks", "mid_block", "up_blocks"]
    assert [w.name for w in find_weights(model, ("to_v",))] == [n for n in names if n.endswith("to_v.weight")]
    kept = {n for n in names if ".ff." in n}
    assert {w.name for w in find_weights(model, ("feed-forward",))} == kept and len(kept) == 2 * 4


def test_weights_are_left_as_they_were() -> None:
    model = layouts.model("sd1")
    before = {n: p.detach().clone() for n, p in model.unet.named_parameters()}

    def untouched() -> bool:
        return all(
            torch.equal(p, before[n]) and not p.requires_grad and p.grad is None
            for n, p in model.unet.named_parameters()
        )

    attributed(model)
    assert untouched()
    for stop_at in (1, 3, 6):
        with pytest.raises(Cancelled):
            attributed(model, report=Quiet(stop_at=stop_at))
        assert untouched()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives.torch.autograd, "grad", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attributed(model)
    assert untouched()


# ---- whole runs -------------------------------------------------------------------------------------------


def test_arrays_are_those_of_the_contract(session: Any, atlas: Any) -> None:
    found = run(session, (0, 1), granularity="module", check=3, metric="clip")
    arrays, values = found.result.arrays, found.result.values
    assert {n: [a.name for a in t.axes] for n, t in arrays.items()} == {
        "attribution": ["component"], "attribution_sem": ["component"], "parameters": ["component"],
        "objective": ["seed"], "weight_rank": ["row", "column"], "predicted": ["ablation"],
        "actual": ["ablation"], "actual_base_too": ["ablation"], "clean": ["seed"], "ablated": ["seed"],
    }  # fmt: skip
    labels = arrays["attribution"].axis("component").labels
    assert len(labels) == 10 and all(n.startswith("unet.") and n.endswith(".ff") for n in labels)
    assert arrays["parameters"].values.sum() == sum(w.tensor.numel() for w in find_weights(atlas, EVERY[:1]))
    assert values["forwards"] == 2 * 2 * 3 and values["guidance"] == 3.0
    assert values["correlation"] == pytest.approx(
        correlation(arrays["predicted"].values, arrays["actual"].values), abs=1e-4
    )
    assert set(found.result.images) == {f"seed{s}-{n}" for s in (0, 1) for n in ("concept", "ablated")}
    assert found.result.edit.base_fingerprint == atlas.fingerprint
    taken = sum(int((d != 0).sum()) for d in found.result.edit.deltas.values())
    assert taken == values["ablated_weights"] >= 0.001 * arrays["parameters"].values.sum()


def test_the_trajectory_is_the_models_own(session: Any) -> None:
    image = run(session, concept="a blue house", check=0).result.images["seed0-concept"]
    recipe = Recipe("generate", "atlas-sd", {"prompt": ["a blue house"]}, {"steps": 3, "guidance": 3.0}, (0,))
    made = session.run(recipe, save=False, fresh=True).result.arrays["images"].values[0, 0]
    assert np.abs(image.astype(int) - made).max() <= 1


def test_predictions_agree_with_interventions(session: Any) -> None:
    """Random ablations of a trained model do what alpha says, as far as a first order goes."""
    found = run(session, steps=5, check=12, check_ratio=0.0005)
    assert found.result.values["correlation"] > 0.4


def test_an_edit_that_overshoots_is_told(session: Any) -> None:
    found = run(session, ratio=0.5, scope="global")
    assert any("smaller --ratio" in w for w in found.result.values["warnings"])
    assert found.result.values["decrease"]["predicted"] > 0 > found.result.values["decrease"]["base_fixed"]


def test_a_run_leaves_an_edit_file_that_works(session: Any, atlas: Any, tmp_path: Any) -> None:
    recipe = Recipe("attribute", "atlas-sd", {"concept": CONCEPT}, {"steps": 3, "check": 0, "preview": True})
    made = session.run(recipe, out=tmp_path / "r", fresh=True)
    edit = read_edit(tmp_path / "r" / "edit.safetensors")
    assert edit.method == "cad" and edit.concepts == (CONCEPT,) and edit.params["ratio"] == 0.001
    assert np.array_equal(
        ranked_edit(atlas, made, 0.001).deltas[min(edit.deltas)], edit.deltas[min(edit.deltas)]
    )
    drawn = Recipe(
        "generate",
        "atlas-sd",
        {"prompt": [CONCEPT]},
        {"steps": 3},
        (0,),
        (str(tmp_path / "r/edit.safetensors"),),
    )
    image = session.run(drawn, save=False, fresh=True).result.arrays["images"].values[0, 0]
    assert np.abs(image.astype(int) - made.result.images["seed0-ablated"]).max() <= 1
    assert np.abs(image.astype(int) - made.result.images["seed0-concept"]).max() > 20


def test_what_was_found_before_a_stop_is_kept(session: Any, atlas: Any) -> None:
    job = session.submit(
        Recipe("attribute", "atlas-sd", {"concept": CONCEPT}, {"steps": 3, "check": 1000}),
        save=False,
        fresh=True,
    )
    version = -1
    while not (job.latest and "predicted" in job.latest.arrays):
        version = job.wait(version, 5)
    job.cancel()
    while not job.over:
        version = job.wait(version, 5)
    assert job.state == "stopped" and job.run.result.edit is not None
    assert np.isfinite(job.run.result.arrays["attribution"].values).all()
    assert not any(p.requires_grad for p in atlas.unet.parameters())


@pytest.mark.parametrize("given", [{"objective": "amplify"}, {"components": ["to_k", "to_v"]}])
def test_other_objectives_and_components_run(session: Any, given: dict[str, Any]) -> None:
    found = run(session, (0,), str(layouts.saved("sdxl")), check=2, **given)
    assert np.isfinite(found.result.arrays["attribution"].values).all()
    assert ("actual_base_too" in found.result.arrays) == (given.get("objective") != "amplify")
    assert found.result.values["decrease"]["predicted"] > 0


def test_bars_are_few_and_short(session: Any) -> None:
    found = run(session, granularity="unit")
    data = draw(found).data
    assert len(data["labels"]) == len(data["values"]) == BARS and all(len(x) <= 24 for x in data["labels"])
    values = found.result.arrays["attribution"].values
    assert data["values"][0] == values.max() and data["values"][-1] == values.min()
    label = "unet.up_blocks.1.attentions.2.transformer_blocks.{}.ff.net.0.proj.weight[12]"
    assert short(label.format(0)) == "up 1.2 ff.0[12]" and short(label.format(3)) == "up 1.2.3 ff.0[12]"
    assert short("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight") == "mid 0 attn2.to_k"
    assert short("unet.conv_in.weight") == "unet.conv_in.weight"


REFUSED = {
    "no concept": ({"concept": " "}, "--concept is empty"),
    "its own base": ({"base": CONCEPT}, "are the same text"),
    "nothing to preview": ({"ratio": 0, "preview": True}, "nothing to preview"),
    "ratio past all": ({"ratio": 1.5}, "--ratio must be from 0 to 1"),
    "no such component": ({"components": ["to_q"]}, "--components must be one of"),
    "no such scope": ({"scope": "rows"}, "did you mean 'row'"),
}


@pytest.mark.parametrize(("given", "part"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_requests_get_a_sentence(session: Any, given: dict[str, Any], part: str) -> None:
    with pytest.raises(RequestError, match=part):
        run(session, **given)


def test_correlations() -> None:
    x = np.arange(5.0)
    assert correlation(x, 3 * x + 1) == pytest.approx(1) and correlation(x, -x) == pytest.approx(-1)
    assert all(np.isnan(correlation(a, b)) for a, b in ((x[:2], x[:2]), (x, x * 0), (x, x * np.nan)))
