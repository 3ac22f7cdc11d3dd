"""The compiled UNet: the same numbers, hooks and edits as without, a sentence where it can't be compiled;
and the layout of weights for a GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from studio.diffusion_race import small_model
from studio.edits import overlay
from studio.errors import StudioError
from studio.models.compiled import CompiledUNet
from studio.models.device import channels_last
from studio.models.hooks import hook_count
from studio.models.sampling import denoise, raw_output
from studio.types import Edit, Patch

_PLAN = {"steps": 2, "guidance": 1.0, "scheduler": "ddim"}


def test_a_compiled_unet_gives_the_same_and_hooks_still_work(atlas: Any) -> None:
    model = small_model(atlas, "least")
    plan, (cond, _) = replace(model.plan(SimpleNamespace(**_PLAN)), height=16, width=16), model.encode(["a"])
    site = model.unet_sites(["cross-attention"])[0]

    def latents(patches: Any = ()) -> torch.Tensor:
        return denoise(model, cond, None, [0], plan, patches=patches)

    plain, patched = latents(), latents([Patch(site, do="zero")])
    model.compile("eager")  # dynamo traces, nothing is generated
    assert torch.allclose(latents(), plain, atol=1e-6) and model.compiled.used == plan.steps
    assert torch.equal(latents([Patch(site, do="zero")]), patched) and model.compiled.used == plan.steps
    assert not torch.equal(plain, patched) and hook_count(model.unet) == 0


def test_an_edit_reaches_a_compiled_unet(atlas: Any) -> None:
    model = small_model(atlas, "least")
    plan, (cond, _) = replace(model.plan(SimpleNamespace(**_PLAN)), height=16, width=16), model.encode(["a"])
    model.unet.to(torch.bfloat16)
    model.dtype = torch.bfloat16
    model.compile("eager")
    name = next(n for n, p in model.unet.named_parameters() if p.ndim == 2)
    shape = model.unet.get_parameter(name).shape
    edit = Edit({f"unet.{name}": np.full(shape, 0.5, np.float32)}, model.fingerprint)
    before = denoise(model, cond, None, [0], plan)
    with overlay(model, [edit]):
        assert not torch.equal(denoise(model, cond, None, [0], plan), before)
    assert torch.equal(denoise(model, cond, None, [0], plan), before)


def test_a_compiler_that_fails_says_so() -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no C++ compiler")

    unet = CompiledUNet(nn.Linear(2, 2), backend=broken)
    with torch.no_grad(), pytest.raises(StudioError, match="can't be compiled on this machine.*--compile"):
        unet(torch.ones(1, 2))


def test_a_gradient_goes_past_the_compiler() -> None:
    unet = CompiledUNet(nn.Linear(2, 2), backend="eager")
    assert unet(torch.ones(1, 2)).requires_grad and unet.used == 0


def test_a_layout_for_gpus_changes_no_number(atlas: Any) -> None:
    model = small_model(atlas, "least")
    x, (cond, _) = torch.ones(1, 4, 8, 8), model.encode(["a"])
    plan, t = model.plan(SimpleNamespace(**_PLAN)), torch.tensor(500)
    with torch.no_grad():
        before = raw_output(model, x, t, cond, plan)
        assert channels_last(model.unet, "cpu") is model.unet
        channels_last(model.unet, "cuda")
        assert torch.allclose(raw_output(model, x, t, cond, plan), before, atol=1e-5)
    assert model.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
