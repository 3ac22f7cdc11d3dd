"""Neurons of a concept: their statistics and their edit against slow references, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe, cli
from studio.edit_files import read_edit
from studio.edits import overlay
from studio.errors import RequestError
from studio.methods.neurons import NEURON_TEMPLATES, constant_units, neuron_edit, unit_statistics, welch
from studio.models.sites import text_reads
from tests import layouts
from tests.references import naive_neurons

CONCEPT, NEUTRAL = "star", "two circles"


def layers_of(model: Any, *numbers: int) -> list[str]:
    """Names of cross-attention layers by number."""
    names = [str(s.layer) for s in model.unet_sites(["cross-attention"])]
    return [names[i] for i in numbers]


def run(session: Any, seeds: tuple[int, ...] = (0,), **asked: Any) -> Any:
    """A finished run of neurons on atlas-sd."""
    given = {
        "concept": CONCEPT,
        "neutral": NEUTRAL,
        "steps": 2,
        "metric": "distance",
        "layers": "6-7",
        **asked,
    }
    return session.run(Recipe("neurons", "atlas-sd", given, {}, seeds), save=False, fresh=True)


# ---- statistics -------------------------------------------------------------------------------------------


def test_welch_is_the_textbooks() -> None:
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, (6, 40)), rng.normal(0, 0.5, (9, 40))
    np.testing.assert_allclose(welch(a, b), ttest_ind(a, b, equal_var=False).statistic, rtol=1e-10)


def test_a_constant_unit_has_no_score() -> None:
    a = np.array([[2.0, 0.0, 1.0], [2.0, 0.0, 1.0]])
    z = welch(a, a + [0, 0, 1])
    assert z[0] == z[1] == 0 and -1e7 < z[2] < -1e3


@pytest.mark.parametrize("position", ["last", "end"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_statistics_equal_the_naive_reference(family: str, position: str) -> None:
    model = layouts.model(family)
    chosen = layers_of(model, 0, 2)
    units = unit_statistics(model, CONCEPT, NEUTRAL, chosen, NEURON_TEMPLATES, position)
    names = units.named()
    assert (
        len(names)
        == len(set(names))
        == len(units.z)
        == sum(model.unet.get_parameter(f"{n}.{m}.weight").shape[0] for n in chosen for m in ("to_k", "to_v"))
    )
    for matrix in (f"{chosen[0]}.to_k", f"{chosen[1]}.to_v"):
        groups = []
        for text in (CONCEPT, NEUTRAL):
            prompts = [t.replace("{}", text) for t in NEURON_TEMPLATES]
            at = [
                len(model.tokenizers["text"](p).input_ids) - 2 if position == "last" else -1 for p in prompts
            ]
            outputs = [
                naive_neurons.unit_outputs(model.pipe, p, matrix, t) for p, t in zip(prompts, at, strict=True)
            ]
            groups.append(np.array(outputs).T)
        for u in range(0, len(groups[0]), 5):
            i = names.index(f"{matrix}.{u}")
            assert units.neutral[i] == pytest.approx(groups[1][u].mean(), abs=1e-5)
            assert units.z[i] == pytest.approx(
                naive_neurons.z_of(groups[0][u], groups[1][u]), rel=2e-2, abs=1e-3
            )


# ---- the edit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "atlas"])
def test_the_edit_is_constants_in_keys_and_values(family: str) -> None:
    """Zero rows and a bias make the image that constants in every token's keys and values make."""
    torch.set_num_threads(1)
    model = layouts.model(family)
    chosen = layers_of(model, 1, 2) if family == "sd1" else layers_of(model, 6, 7)
    made = neuron_edit(model, CONCEPT, NEUTRAL, chosen, 24)
    units = unit_statistics(model, CONCEPT, NEUTRAL, chosen, NEURON_TEMPLATES, "last")
    top = np.argsort(-np.abs(units.z))[:24]
    constants: dict[str, dict[int, float]] = {}
    for name, mean in zip(np.array(units.named())[top], units.neutral[top], strict=True):
        matrix, unit = name.rsplit(".", 1)
        constants.setdefault(matrix, {})[int(unit)] = float(mean)
    assert {m.rsplit(".", 1)[1] for m in constants} == {"to_k", "to_v"}
    prompt = "a red star on a white background"
    want = naive_neurons.silenced_image(model.pipe, constants, prompt, 4, 3)
    plain = naive_neurons.silenced_image(model.pipe, {}, prompt, 4, 3)
    with overlay(model, [made]):
        got = naive_neurons.silenced_image(model.pipe, {}, prompt, 4, 3)
    assert np.abs(got.astype(int) - want).max() <= 1 < np.abs(plain.astype(int) - want).max()


def test_the_edit_touches_those_rows_only() -> None:
    model = layouts.model("sd2")
    chosen = layers_of(model, 0)
    made = neuron_edit(model, CONCEPT, NEUTRAL, chosen, 5)
    rows = {n: np.flatnonzero(np.any(d != 0, axis=1)) for n, d in made.deltas.items() if n.endswith("weight")}
    assert sum(map(len, rows.values())) == 5 == len(made.params["units"])
    named = {f"{n.removeprefix('unet.').removesuffix('.weight')}.{u}" for n, us in rows.items() for u in us}
    assert named == set(made.params["units"])
    assert {n.rsplit(".attn2.", 1)[1] for n in made.deltas} <= {"to_k.weight", "to_v.weight", "to_out.0.bias"}
    assert (made.method, made.concepts, made.replacements) == ("neurons", (CONCEPT,), (NEUTRAL,))
    assert made.base_fingerprint == model.fingerprint and made.params["layers"] == chosen


@pytest.mark.parametrize("which", [0, 1])
def test_a_matrix_with_a_bias_keeps_its_constant_there(which: int) -> None:
    model = layouts.model("sd1")
    layer = model.unet_sites(["cross-attention"])[0]
    site = text_reads(layer)[which]
    attention = model.unet.get_submodule(str(layer.layer))
    name = ("to_k", "to_v")[which]
    plain = getattr(attention, name)
    linear = torch.nn.Linear(plain.in_features, plain.out_features)
    setattr(attention, name, linear)
    try:
        deltas = constant_units(model, site, {3: 0.25, 7: -1.5})
    finally:
        setattr(attention, name, plain)
    prefix = f"unet.{layer.layer}.{name}"
    assert set(deltas) == {f"{prefix}.weight", f"{prefix}.bias"}
    with torch.no_grad():
        weight = linear.weight + torch.from_numpy(deltas[f"{prefix}.weight"])
        bias = linear.bias + torch.from_numpy(deltas[f"{prefix}.bias"])
        x = torch.arange(2.0 * plain.in_features).reshape(2, -1)
        got, before = torch.nn.functional.linear(x, weight, bias), linear(x)
    assert torch.allclose(got[:, [3, 7]], torch.tensor([0.25, -1.5]).expand(2, 2), atol=1e-6)
    others = [i for i in range(plain.out_features) if i not in (3, 7)]
    assert torch.equal(got[:, others], before[:, others])


# ---- the command ------------------------------------------------------------------------------------------


def test_a_run_shows_the_neurons(session: Any) -> None:
    result = run(session).result
    z = result.arrays["z_score"]
    assert set(result.arrays) == {"z_score", "concept_mean", "neutral_mean"} and not result.images
    assert result.edit is None and result.values["layer_numbers"] == "6,7"
    assert result.values["units"] == len(z.values)
    largest = z.axis("unit").labels[int(np.argmax(np.abs(z.values)))]
    assert result.values["largest"].startswith(f"{largest} (")


def test_a_run_makes_an_edit_that_generate_takes(session: Any, tmp_path: Path) -> None:
    params = {"steps": 2, "metric": "distance", "layers": "6-7", "top": 60}
    params["templates"] = ["{}", "a photo of {}"]
    recipe = Recipe("neurons", "atlas-sd", {"concept": CONCEPT, "neutral": NEUTRAL}, params, (0, 3))
    made = session.run(recipe, out=tmp_path / "run", fresh=True)
    result = made.result
    assert set(result.images) == {f"seed{s}-{w}" for s in (0, 3) for w in ("before", "after")}
    assert (result.arrays["before"].values == 0).all() and (result.arrays["after"].values < 0).all()
    assert result.values["output_change"] > 0
    file = tmp_path / "run" / "edit.safetensors"
    assert set(read_edit(file).deltas) == set(result.edit.deltas) and read_edit(file).params["top"] == 60
    again = session.run(
        Recipe("generate", "atlas-sd", {"prompt": [CONCEPT]}, {"steps": 2}, (0, 3), (str(file),)), save=False
    )
    for j, seed in enumerate((0, 3)):
        after = result.images[f"seed{seed}-after"].astype(int)
        assert np.abs(again.result.arrays["images"].values[0, j] - after).max() <= 1


def test_layers_may_be_localized(session: Any) -> None:
    values = run(session, layers=None).result.values
    first, last = map(int, values["layer_numbers"].split(","))
    assert last == first + 1


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["neurons", "--concept", "star", "--neutral", "circle"], "--top is missing: how many units"),
        (["attribute", "--concept", "star", "--ratio", "0"], "--ratio 0 makes none; give a larger one"),
    ],
)
def test_nothing_to_save_is_said_before_the_run(
    command: list, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "e.safetensors", tmp_path / "run"
    assert cli.main([*command, "--save", str(file), "--out", str(out), "--model", "no such model"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("locus: --save needs an edit, and ") and says in said and said.count("\n") == 1
    assert not file.exists() and not out.exists()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"neutral": " STAR "}, "is the concept itself"),
        ({"neutral": ""}, "--neutral is empty"),
        ({"templates": ["{}"]}, "at least two"),
        ({"templates": ["{}", "no place"]}, "needs {} once"),
        ({"layers": "12"}, "no cross-attention layer"),
        ({"layers": ["auto", "6"]}, "leave the other layers out"),
        ({"top": 10_000}, "--top 10000 is more than the 384 units"),
        ({"top": 0}, "at least 1"),
    ],
)
def test_wrong_requests(session: Any, asked: dict, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        run(session, **asked)
