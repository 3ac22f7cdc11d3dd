"""LoRA files as overlays: the image that diffusers and peft draw with them, from every kind of file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from safetensors.torch import save_file

from studio.edit_files import Shelf, read_edit
from studio.edits import Active, compose, overlay
from studio.errors import RequestError
from studio.models.lora import LoraDelta
from studio.models.sampling import Plan, new_scheduler
from studio.session import Session
from studio.types import Recipe
from tests import layouts
from tests.test_edits import weights_hash

PROMPT, PLAN = "a red star", Plan(steps=3, guidance=3.0, height=16, width=16)
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
TEXT = (".q_proj", ".k_proj", ".v_proj", ".out_proj")


def matrices(model: Any, ends: tuple[str, ...], part: str) -> dict[str, Any]:
    """Modules of a component whose names end so, by their names in files."""
    found = {n: m for n, m in model.components()[part].named_modules() if n.endswith(ends)}
    prefix = "text_model." if part.startswith("text") else ""
    return {n if n.startswith(prefix) else prefix + n: m for n, m in found.items()}


def factors(model: Any, *, rank: int = 3, convolutions: bool = False) -> dict[str, tuple[Any, Any]]:
    """Random factors (up, down) of attention matrices, feed-forward ones and, if asked, convolutions."""
    draw, out = torch.Generator().manual_seed(4), {}
    ends = (*ATTENTION, ".proj_in", ".net.2") + (".conv1", ".conv_shortcut") * convolutions
    for part in [p for p in model.components() if p != "vae"]:
        for name, module in matrices(model, ends if part == "unet" else (*TEXT, ".fc1"), part).items():
            shape = module.weight.shape
            up = torch.randn((shape[0], rank, *[1] * (len(shape) - 2)), generator=draw)
            down = torch.randn((rank, *shape[1:]), generator=draw)
            out[f"{part}.{name}"] = (up * 0.4, down * 0.4)
    return out


def as_diffusers(made: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """The tensors as diffusers saves them."""
    ends = ("lora_B", "lora_A")
    return {f"{n}.{e}.weight": t for n, both in made.items() for e, t in zip(ends, both, strict=True)}


def as_kohya(made: dict[str, tuple[Any, Any]], alpha: float, two: bool) -> dict[str, Any]:
    """The tensors as kohya's trainers save them on diffusers' UNet."""
    prefix = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if two else "lora_te",
        "text_encoder_2": "lora_te2",
    }
    out: dict[str, Any] = {}
    for name, (up, down) in made.items():
        part, module = name.split(".", 1)
        stem = f"{prefix[part]}_{module.replace('.', '_')}"
        out |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        out[f"{stem}.alpha"] = torch.tensor(alpha)
    return out


def theirs(model: Any, family: str, file: Path, strength: float) -> np.ndarray:
    """What diffusers with peft draws."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        layouts.saved(family), dtype=torch.float32, local_files_only=True
    )
    pipe.load_lora_weights(file, adapter_name="it")
    pipe.set_adapters(["it"], [strength])
    pipe.scheduler = new_scheduler(model, PLAN)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": PLAN.steps, "guidance_scale": PLAN.guidance, "output_type": "np"}
    generator = torch.Generator("cpu").manual_seed(5)
    image = pipe(PROMPT, height=PLAN.height, width=PLAN.width, generator=generator, **options).images[0]
    return (image * 255).round().astype(int)


def ours(model: Any, entry: str) -> np.ndarray:
    """What Locus draws with the file laid over, without --force."""
    with overlay(model, [Shelf().open(entry)] if entry else []):
        return model.generate(model.encode([PROMPT])[0], [5], PLAN)[0].astype(int)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("sd1", "diffusers"), ("sdxl", "diffusers"), ("sd2", "kohya"), ("sdxl", "kohya with convolutions")],
)
def test_the_image_is_that_of_diffusers_and_peft(family: str, kind: str, tmp_path: Path) -> None:
    model, file = layouts.model(family), tmp_path / "it.safetensors"
    before, bare = weights_hash(model), ours(model, "")
    made = factors(model, convolutions="convolutions" in kind)
    tensors = as_diffusers(made) if kind == "diffusers" else as_kohya(made, 1.5, family == "sdxl")
    save_file({n: t.contiguous() for n, t in tensors.items()}, file)
    for strength in (1.0, -0.6):
        wanted, got = theirs(model, family, file, strength), ours(model, f"{file}@{strength}")
        assert np.abs(wanted - bare).max() > 8
        assert np.abs(wanted - got).max() <= 1
    assert weights_hash(model) == before and (ours(model, "") == bare).all()


def test_a_peft_adapter_saved_by_diffusers(tmp_path: Path) -> None:
    """Its alpha stands in the metadata, with patterns by module."""
    model = layouts.model("sd1")
    made = {n: f for n, f in factors(model).items() if n.startswith("unet")}
    state = {n.removeprefix("unet."): t for n, t in as_diffusers(made).items()}
    modules = sorted({n.split(".lora_")[0] for n in state})
    patterns = {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 12}
    note = {"r": 3, "lora_alpha": 6, "target_modules": modules, "alpha_pattern": patterns}
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=note, weight_name="it.safetensors"
    )
    file = tmp_path / "it.safetensors"
    wanted, got = theirs(model, "sd1", file, 1.0), ours(model, str(file))
    assert np.abs(wanted - ours(model, "")).max() > 8 and np.abs(wanted - got).max() <= 1
    deltas = read_edit(file).deltas
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    up, down = made[name]
    np.testing.assert_allclose(deltas[f"{name}.weight"].dense(), 4 * up @ down, atol=1e-5)


def test_original_names_of_sdxl_are_those_of_its_blocks(tmp_path: Path) -> None:
    """kohya trains SDXL on a UNet with other names: input_blocks.4.1 is down_blocks.1.attentions.0."""
    stem = "transformer_blocks_0_attn2_to_k"
    names = {
        f"lora_unet_input_blocks_4_1_{stem}": "down_blocks.1.attentions.0",
        f"lora_unet_input_blocks_8_1_{stem}": "down_blocks.2.attentions.1",
        f"lora_unet_middle_block_1_{stem}": "mid_block.attentions.0",
        f"lora_unet_output_blocks_5_1_{stem}": "up_blocks.1.attentions.2",
    }
    tensors: dict[str, Any] = {}
    for name in names:
        tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"] = (
            torch.ones(4, 2),
            torch.ones(2, 3),
        )
    save_file(tensors, file := tmp_path / "x.safetensors")
    want = {f"unet.{block}.transformer_blocks.0.attn2.to_k.weight" for block in names.values()}
    assert set(read_edit(file).deltas) == want


def test_alphas_of_one_file_may_differ(tmp_path: Path) -> None:
    model = layouts.model("sd1")
    made = {n: f for n, f in factors(model).items() if n.startswith("unet") and "attn2" in n}
    tensors = as_kohya(made, 3.0, False)
    for i, name in enumerate(sorted(n for n in tensors if n.endswith(".alpha"))):
        tensors[name] = torch.tensor(float(i))
    save_file(tensors, file := tmp_path / "x.safetensors")
    got = compose(model, [Shelf().open(f"{file}@0.5")])
    for i, name in enumerate(sorted(made, key=lambda n: n.replace(".", "_"))):
        up, down = made[name]
        np.testing.assert_allclose(got[f"{name}.weight"], 0.5 * i / 3 * up @ down, atol=1e-5)


def test_a_lora_is_kept_small_in_memory(tmp_path: Path) -> None:
    delta = LoraDelta(np.ones((1000, 4), np.float32), np.ones((4, 500), np.float32))
    assert delta.shape == (1000, 500) and delta.nbytes == 4 * (4000 + 2000)
    assert delta.dense().shape == (1000, 500) and float(delta.dense()[0, 0]) == 4
    conv = LoraDelta(np.ones((6, 2, 1, 1), np.float32), np.ones((2, 5, 3, 3), np.float32))
    assert conv.shape == (6, 5, 3, 3) == tuple(conv.dense().shape)


def test_a_run_with_a_lora(session: Session, atlas: Any, tmp_path: Path) -> None:
    """--edit takes it, beside other edits; the run is another one than without."""
    save_file(as_diffusers(factors(atlas)), file := tmp_path / "x.safetensors")
    asked = {"prompt": ["a red star"], "steps": 2}
    bare = session.run(Recipe("generate", "atlas-sd", asked, {}, (0,)))
    laid = session.run(Recipe("generate", "atlas-sd", asked, {}, (0,), (f"{file}@0.5",)))
    assert laid.key != bare.key and laid.host["edits"]
    assert (laid.result.arrays["images"].values != bare.result.arrays["images"].values).any()


# ---- bad files --------------------------------------------------------------------------------------------

STEM = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({A: (2, 3)}, "damaged: some factors have no partner|damaged: the two factors"),
        ({B: (4, 2)}, "some factors have no partner"),
        ({A: (2, 3), B: (4, 5)}, "the two factors of unet.mid_block"),
        ({A: (2, 3), B: (4, 2), "extra": (1,)}, "holds extra, which is no part of a LoRA"),
        ({"dit.x.lora_A.weight": (2, 3), "dit.x.lora_B.weight": (4, 2)}, "changes dit.x"),
        ({A: (2, 3), B: (4, 2), f"{STEM}.dora_scale": (4,)}, "is a DoRA adapter"),
        ({"lora_unet_x.lokr_w1": (2, 2)}, "is a LoKr adapter"),
        ({"lora_unet_x.hada_w1_a": (2, 2)}, "is a LoHa adapter"),
        ({"lora_no.lora_up.weight": (2, 2), "lora_no.lora_down.weight": (2, 2)}, "names that are no"),
        ({"unet.x.weight": (2, 2)}, "no edit file of Locus and no LoRA"),
    ],
)  # fmt: skip
def test_files_that_are_no_lora(tmp_path: Path, tensors: dict[str, tuple], says: str) -> None:
    save_file({n: torch.ones(shape) for n, shape in tensors.items()}, file := tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match=says):
        read_edit(file)


def test_damaged_numbers_and_metadata(tmp_path: Path) -> None:
    pair = {A: torch.full((2, 3), float("nan")), B: torch.ones(4, 2)}
    save_file(pair, file := tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match="holds NaN or infinity in unet.mid_block"):
        read_edit(file)
    save_file({**pair, A: torch.ones(2, 3)}, file, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(RequestError, match="metadata of .* are damaged"):
        read_edit(file)
    save_file({**pair, A: torch.ones(2, 3)}, file, metadata={"lora_adapter_metadata": json.dumps([1])})
    assert read_edit(file).params["ranks"] == [2]


def test_a_lora_of_another_family_is_refused(tmp_path: Path) -> None:
    save_file(as_diffusers(factors(layouts.model("sdxl"))), file := tmp_path / "x.safetensors")
    with (
        pytest.raises(RequestError, match="has not in that shape; it is for another model"),
        overlay(layouts.model("sd1"), [Active(read_edit(file))]),
    ):
        pass
