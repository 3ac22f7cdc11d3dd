"""Edits for other programs: what is exported loads in a plain diffusers pipeline and draws the same image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from studio import cli
from studio.edit_export import export_edits, lora_tensors, low_rank
from studio.edit_files import read_edit
from studio.edits import Active, compose, overlay
from studio.errors import RequestError
from studio.methods.component_ablation import mask_edit
from studio.methods.neurons import neuron_edit
from studio.models.sampling import Plan, new_scheduler
from studio.store import write_edit
from studio.types import Edit
from tests import layouts
from tests.test_component_attribution import attributed
from tests.test_edit_stack import made
from tests.test_edits import BIAS, KEY, delta, weights_hash

PROMPT, PLAN = "a red star", Plan(steps=3, guidance=3.0, height=16, width=16)


def plain_image(model: Any, folder: Path, lora: Path | None = None) -> np.ndarray:
    """What diffusers itself draws from a folder, with a LoRA or without, by the scheduler of Locus."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    pipe.scheduler = new_scheduler(model, PLAN)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(5)
    options = {"num_inference_steps": PLAN.steps, "guidance_scale": PLAN.guidance, "generator": generator}
    image = pipe(PROMPT, height=PLAN.height, width=PLAN.width, output_type="np", **options).images[0]
    return (image * 255).round().astype(int)


def own_image(model: Any, active: list[Active]) -> np.ndarray:
    """What Locus draws with the edits laid over."""
    with overlay(model, active):
        return model.generate(model.encode([PROMPT])[0], [5], PLAN)[0].astype(int)


def stack(model: Any) -> list[Active]:
    """An edit of some layers of the UNet, one of others, and one of the text encoder."""
    return [
        Active(made(model, "star", "circle", regularization=0.02)),
        Active(made(model, "red", "", layers=["0", "1"]), 0.7),
        Active(made(model, "star", "moon", method="quickfix", positions="last"), 0.9),
    ]


@pytest.mark.parametrize("family", layouts.FAMILIES)
def test_exports_draw_the_same_image(family: str, tmp_path: Path) -> None:
    model = layouts.model(family)
    before, active = weights_hash(model), stack(model)
    lora, full = tmp_path / "edit.safetensors", tmp_path / "full"
    export_edits(model, active, lora=lora, full=full)
    assert weights_hash(model) == before
    wanted, bare = own_image(model, active), own_image(model, [])
    assert np.abs(wanted - bare).max() > 8
    assert np.abs(plain_image(model, layouts.saved(family), lora) - wanted).max() <= 1
    assert np.abs(plain_image(model, full) - wanted).max() <= 1
    names = set(load_file(lora))
    encoders = {"text_encoder", "text_encoder_2"} & set(model.components())
    assert {n.split(".")[0] for n in names} == {"unet", *encoders}
    assert all(n.split(".")[1] == "text_model" for n in names if n.startswith("text"))
    assert not list(tmp_path.glob(".partial*")) and not list(full.rglob("*.bin"))


def test_an_edit_with_biases_leaves_whole(tmp_path: Path) -> None:
    """Neuron and CAD edits: of high rank, or with biases."""
    model = layouts.model("sd1")
    active = [
        Active(Edit({BIAS: delta(model, BIAS, scale=300.0), KEY: delta(model, KEY)}, model.fingerprint))
    ]
    for name in (BIAS, KEY):
        with pytest.raises(RequestError, match=r"take the whole model \(--full\)"):
            lora_tensors({name: compose(model, active)[name]})
    export_edits(model, active, lora=None, full=tmp_path / "full")
    wanted = own_image(model, active)
    assert np.abs(wanted - own_image(model, [])).max() > 8
    assert np.abs(plain_image(model, tmp_path / "full") - wanted).max() <= 1


def neurons(model: Any) -> Edit:
    """Units of keys and values that tell a star from a circle, silenced."""
    layers = [str(s.layer) for s in model.unet_sites(["cross-attention"])]
    return neuron_edit(model, "star", "circle", layers, 80)


def ablation(model: Any) -> Edit:
    """The weights that component attribution finds to carry the prompt, zeroed."""
    return mask_edit(model, attributed(model).alphas(), 0.1, "matrix", "erase", concept=PROMPT)


@pytest.mark.parametrize("edit_of", [neurons, ablation])
def test_edits_of_neurons_and_weights_draw_the_same_image_elsewhere(edit_of: Any, tmp_path: Path) -> None:
    model = layouts.model("sd1")
    write_edit(edit_of(model), tmp_path / "e.safetensors")
    active = [Active(read_edit(tmp_path / "e.safetensors"))]
    assert active[0].edit.method == {neurons: "neurons", ablation: "cad"}[edit_of]
    before = weights_hash(model)
    with pytest.raises(RequestError, match=r"take the whole model \(--full\)"):
        export_edits(model, active, lora=tmp_path / "l.safetensors", full=None)
    export_edits(model, active, lora=None, full=tmp_path / "full")
    assert weights_hash(model) == before and not (tmp_path / "l.safetensors").exists()
    wanted = own_image(model, active)
    assert np.abs(wanted - own_image(model, [])).max() > 8
    assert np.abs(plain_image(model, tmp_path / "full") - wanted).max() <= 1


def test_low_rank() -> None:
    draw = torch.Generator().manual_seed(0)
    for rank in (1, 3, 9):
        whole = torch.randn(30, rank, generator=draw) @ torch.randn(rank, 20, generator=draw)
        up, down = low_rank("x", whole)
        assert up.shape == (30, rank) and down.shape == (rank, 20)
        assert (up @ down - whole).norm() < 1e-5 * whole.norm()
    assert (low_rank("x", torch.zeros(4, 3))[0] == 0).all()
    with pytest.raises(RequestError, match="The change of x has no low rank"):
        low_rank("x", torch.randn(30, 20, generator=draw))


def test_all_matrices_of_a_component_have_one_rank() -> None:
    """Older loaders scale by the first matrix' rank."""
    model = layouts.model("sd1")
    tensors = lora_tensors(compose(model, stack(model)[:2]))
    ranks = {t.shape[0] for n, t in tensors.items() if n.endswith("lora_A.weight")}
    assert len(ranks) == 1 and {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}


# ---- the command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edit file of the SD 1 layout."""
    path = tmp_path_factory.mktemp("edit") / "e.safetensors"
    write_edit(made(layouts.model("sd1"), "star", "circle"), path)
    return path


def test_the_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, full, model = tmp_path / "l.safetensors", tmp_path / "full", str(layouts.saved("sd1"))
    words = ["export-edit", f"{file}@0.5", "--model", model, "--device", "cpu"]
    assert cli.main([*words, "--lora", str(lora), "--full", str(full)]) == 0
    assert capsys.readouterr().out.split() == [str(lora), str(full)]
    assert (full / "model_index.json").is_file() and len(load_file(lora)) == 2 * 8


WRONG = {
    "nothing": ([], "Which edit, and as what?"),
    "no target": (["FILE"], "Which edit, and as what?"),
    "no edit": (["--lora", "OUT/x.safetensors"], "Which edit"),
    "absent": (["none.safetensors", "--full", "OUT/x"], "There is no edit file"),
    "strength": (["FILE@nan", "--full", "OUT/x"], "strength of an edit must be a number"),
    "other model": (["FILE", "--full", "OUT/x"], "This edit was made for weights"),
    "no LoRA file": (["FILE", "--lora", "OUT/x.pt"], "--lora must name a .safetensors file"),
    "taken": (["FILE", "--full", "OUT"], "exists already"),
    "taken LoRA": (["FILE", "--lora", "FILE"], "exists already"),
    "option": (["FILE", "--lore", "x"], "--lore"),
}


@pytest.mark.parametrize(("words", "part"), WRONG.values(), ids=WRONG.keys())
def test_wrong_requests(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    argv = [w.replace("FILE", str(file)).replace("OUT", str(tmp_path)) for w in words]
    assert cli.main(["export-edit", *argv]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and part in said.err
    assert list(tmp_path.iterdir()) == []
