"""Every class of vision transformer: its parts sum to the whole, equal the slow reference, and the two ways
agree; and what a person reads of models that can't be taken apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from studio.errors import StudioError
from studio.models.decomposition import Decomposition, Parts, TokenQuestion, head_labels
from studio.models.decomposition_adjoint import adjoint_scores, spread
from studio.models.hooks import hook_count
from studio.models.loading import locate
from studio.models.vit import OpenAttention, VisionModel
from studio.models.vit_layouts import NotDecomposable, transformers_layout
from studio.models.vit_timm import open_clip_layout, timm_layout
from tests import vision_families as families
from tests.references.naive_decomposition import Slow, key_token_scores

PATHS = {"norm.bias", "projection.bias", "pool.bias", "merge.0.bias", "merge.1.bias"}
WITHOUT_CLOSED_TOKENS = {"vit-scale-norm", "timm-siglip", "timm-siglip-class", "swin", "swin-padded"}
WITHOUT_CLOSED_TOKENS |= {"maxvit", "maxvit-tf", "openclip-siglip", "hf-siglip-vision"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Small matrices gain nothing from more."""
    torch.set_num_threads(1)


def layout_of(name: str) -> Callable[[nn.Module], Any]:
    """The layout of a copy of the net."""
    family = families.model(name).family
    if family == "timm":
        return lambda net: timm_layout(name, net)
    if family == "open_clip":
        return lambda net: open_clip_layout(name, net.visual)
    return lambda net: transformers_layout(name, net)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest relative error over images."""
    return float(((found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def directions(dim: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)


def whole(name: str) -> tuple[Decomposition, torch.Tensor]:
    model = families.model(name)
    return Decomposition(model.layout, model.device), families.noise(name)


def parts_of(name: str) -> Parts:
    made, pixels = whole(name)
    return made.run(pixels)


@pytest.mark.parametrize("name", families.MAKERS)
def test_every_component_equals_the_slow_reference(name: str) -> None:
    model, (made, pixels) = families.model(name), whole(name)
    parts = made.run(pixels)
    assert torch.equal(parts.representation, model.representation(pixels))
    total = sum(c.double() for c in parts.components.values())
    assert relative(total, parts.representation.double()) <= 2e-6
    slow = Slow(model.net, layout_of(name), pixels)
    assert relative(slow.z, slow.representation) < 1e-14  # freezing changes nothing at the point itself
    wanted = slow.components()
    assert set(wanted) <= set(parts.components) and set(parts.components) - set(wanted) <= PATHS
    for label, vector in wanted.items():
        assert relative(parts.components[label], vector) <= 1e-5, label
    rest = sum(v.double() for k, v in parts.components.items() if k not in wanted)
    torch.testing.assert_close(rest, slow.constants(), rtol=1e-6, atol=1e-6 * float(slow.z.norm()))
    assert hook_count(model.net) == 0


@pytest.mark.parametrize("name", [n for n in families.MAKERS if n != "vit-scale-norm"])
def test_the_adjoint_equals_the_closed_form(name: str) -> None:
    made, pixels = whole(name)
    asked = directions(made.maps[-1].shape[-1])
    closed = made.streams_tokens()
    assert closed == (name not in WITHOUT_CLOSED_TOKENS)
    parts = made.run(pixels, TokenQuestion(made.along(asked)) if closed else None)
    found = adjoint_scores(made.layout, pixels, asked)
    size = float(parts.representation.norm(dim=1).max())
    for label, scores in found.components.items():
        error = (parts.components[label] @ asked.T - scores).abs().max()
        assert float(error) <= 7e-7 * size, label
    heads = sum(v @ asked.T for k, v in parts.components.items() if ".head." in k)
    close = {"rtol": 0, "atol": 1e-6 * size}
    torch.testing.assert_close(found.tokens.sum(1) + found.padding, heads, **close)
    assert (float(found.padding.abs().max()) > 1e-4) == (name == "swin-padded")
    if closed:
        torch.testing.assert_close(parts.tokens, found.tokens, **close)
        torch.testing.assert_close(parts.tokens.sum(1), heads, **close)
    assert hook_count(families.model(name).net) == 0


@pytest.mark.parametrize("name", ["vit-class", "vit-mean-norm-first", "hf-dinov2", "openclip-mean"])
def test_key_tokens_equal_vectors_formed_at_every_place(name: str) -> None:
    made, pixels = whole(name)
    asked = directions(made.maps[-1].shape[-1], 1)
    kept = torch.cat(made.run(pixels, TokenQuestion(made.along(asked), keep=True)).by_head)
    slow = Slow(families.model(name).net, layout_of(name), pixels)
    number = 0
    for part in slow.layout.attentions:
        outputs = [source_output(slow, part, i) for i in range(len(part.sources))]
        q, k = part.attend(outputs)
        v = part.values(outputs[-1]).transpose(1, 2)
        size = v.shape[-1]
        for h in range(part.heads):
            written = part.out.weight[:, h * size : (h + 1) * size]
            through = slow.jacobian[part.label][:, 0].transpose(0, 1)  # (T, dim, width) of the first image
            scores = key_token_scores(
                q[0, h] * part.scale, k[0, h], v[0, h], written, through, asked[0].double()
            )
            wanted = scores.detach()
            error = (kept[number, 0, :, 0] - wanted).abs().max() / wanted.abs().max()
            assert float(error) <= 1e-5, (part.label, h)
            number += 1
    assert number == len(kept)


def source_output(slow: Slow, part: Any, i: int) -> torch.Tensor:
    """What a matrix of queries, keys or values gave, in float64."""
    seen: dict[str, torch.Tensor] = {}
    handle = part.sources[i].register_forward_hook(lambda m, a, out: seen.setdefault("out", out))
    with torch.no_grad():
        slow.layout.run(slow.pixels)
    handle.remove()
    return seen["out"]


def test_only_the_heads_asked_for_are_summed() -> None:
    made, pixels = whole("vit-class")
    asked = directions(48)
    every = made.run(pixels, TokenQuestion(made.along(asked), keep=True))
    chosen = frozenset({"block.1.head.2", "block.2.head.0"})
    some = made.run(pixels, TokenQuestion(made.along(asked), chosen))
    labels = [label for a in made.layout.attentions for label in head_labels(a)]
    by_head = torch.cat(every.by_head)
    wanted = sum(by_head[labels.index(c)] for c in chosen)
    torch.testing.assert_close(some.tokens, wanted, rtol=1e-5, atol=1e-7)
    found = adjoint_scores(made.layout, pixels, asked, chosen)
    torch.testing.assert_close(found.tokens, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vit-class", "openclip", "swin", "maxvit", "hf-siglip-vision"])
def test_an_image_alone_gives_what_it_gives_in_a_batch(name: str) -> None:
    made, pixels = whole(name)
    both, alone = made.run(pixels), made.run(pixels[1:])
    for label, vector in both.components.items():
        torch.testing.assert_close(alone.components[label][0], vector[1], rtol=1e-4, atol=1e-6)


def test_labels_are_in_forward_order() -> None:
    assert list(parts_of("deit").components)[:8] == [
        "embedding",
        *(f"block.0.head.{h}" for h in range(4)),
        "block.0.bias",
        "block.0.mlp",
        "block.1.head.0",
    ]
    assert list(parts_of("deit").components)[-2:] == ["block.2.mlp", "norm.bias"]
    names = list(parts_of("maxvit").components)
    assert names.index("conv.0") < names.index("block.0.head.0") < names.index("block.1.mlp")
    assert names.index("block.1.mlp") < names.index("conv.1")


def test_zeroing_a_last_head_takes_its_component_away() -> None:
    """The last block's heads pass no later branch but its own MLP: with that MLP silent, the frozen sum is
    what is left, up to the norm's sigma."""
    made, pixels = whole("vit-no-norm")
    block = families.model("vit-no-norm").net.blocks[-1]
    kept = block.attn.proj.weight.clone(), block.mlp.fc2.weight.clone(), block.mlp.fc2.bias.clone()
    try:
        block.mlp.fc2.weight.zero_(), block.mlp.fc2.bias.zero_()
        before = made.run(pixels)
        block.attn.proj.weight[:, 12:24] = 0
        after = made.run(pixels).representation
        left = before.representation - before.components["block.2.head.1"]
        torch.testing.assert_close(after, left, rtol=1e-5, atol=1e-6)
    finally:
        block.attn.proj.weight.copy_(kept[0])
        block.mlp.fc2.weight.copy_(kept[1]), block.mlp.fc2.bias.copy_(kept[2])


def test_the_watchable_attention_equals_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).eval().requires_grad_(False)
    x, probe = (torch.randn(2, n, 24, generator=generator) for n in (5, 1))
    ours = OpenAttention(theirs, pool=False)
    torch.testing.assert_close(ours(x, x, x)[0], theirs(x, x, x, need_weights=False)[0])
    pooled = OpenAttention(theirs, pool=True)
    torch.testing.assert_close(pooled(probe, x, x)[0], theirs(probe, x, x)[0])
    with pytest.raises(ValueError, match="no mask"):
        ours(x, x, x, attn_mask=torch.zeros(5, 5))


def test_shares_of_a_coarse_grid_keep_the_sum() -> None:
    scores = torch.arange(12.0).reshape(1, 2, 3, 2)
    fine = spread(scores, (4, 5))
    assert fine.shape == (1, 4, 5, 2)
    torch.testing.assert_close(fine.sum((1, 2)), scores.sum((1, 2)))
    assert fine[0, 0, 0].tolist() == [0, 0.25] and fine[0, 0, 4].tolist() == [2, 2.5]


# ---- what can't be taken apart ----------------------------------------------------------------------------

_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "post-norm": (lambda: vit(block_fn="ResPostBlock"), "post-norm"),
    "parallel": (lambda: vit(block_fn="ParallelScalingBlock"), "attention and MLP in one"),
    "several": (lambda: vit(block_fn="ParallelThingsBlock"), "several attentions"),
    "swin v2": (
        lambda: timm.create_model("swinv2_cr_tiny_224", img_size=64, embed_dim=24, depths=(1, 1, 1, 1)),
        "SwinTransformerV2Cr",
    ),
    "swin v2, post-norm": (
        lambda: timm.create_model("swinv2_tiny_window8_256", img_size=64, embed_dim=12, window_size=2),
        "post-norm",
    ),
    "convolutions": (lambda: timm.create_model("test_resnet"), "class ResNet"),
    "max pooling": (lambda: vit(global_pool="max"), "'max' is not linear"),
    "no pooling": (lambda: vit(global_pool=""), "'' is not linear"),
    "batch norm": (lambda: timm.create_model("test_coatnet"), "not MaxViT's"),
}


def vit(block_fn: str = "Block", **args: Any) -> nn.Module:
    module = timm.models.vision_transformer
    return module.VisionTransformer(**_ARGS, **args, block_fn=getattr(module, block_fn))


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_other_models_are_refused_with_the_reason(make: Callable, reason: str) -> None:
    with pytest.raises(NotDecomposable) as caught:
        timm_layout("that model", make().eval())
    said = str(caught.value)
    assert said.startswith("that model can't be decomposed: ") and reason in said and said.endswith(".")


def copy_of(name: str, to: Path) -> Path:
    shutil.copytree(families.saved(name), to / "copy")
    return to / "copy"


def loading(folder: Path) -> str:
    """What a person reads when this folder is loaded."""
    with pytest.raises(StudioError) as caught:
        VisionModel(locate(str(folder)), "cpu")
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", ")."))
    return str(caught.value)


@pytest.mark.parametrize("name", ["vit-class", "hf-vit", "openclip"])
def test_broken_folders(tmp_path: Path, name: str) -> None:
    folder = copy_of(name, tmp_path)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    whole_file = file.read_bytes()
    file.write_bytes(whole_file[:-100])
    assert "broken or cut short" in loading(folder)
    inner = ("mlp.fc1.weight", "intermediate.dense.weight", "c_fc.weight")  # as files spell it
    lost = next(n for n in tensors if n.endswith(inner))
    save_file({k: v for k, v in tensors.items() if k != lost}, file, metadata={"format": "pt"})
    assert "can't be loaded" in loading(folder) and "fit one another" in loading(folder)
    file.rename(folder / "weights.bin")
    assert "is a pickle" in loading(folder)


def test_unknown_architectures_are_said(tmp_path: Path) -> None:
    folder = copy_of("vit-class", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architecture": "vit_of_tomorrow"}))
    assert "vit_of_tomorrow" in loading(folder)


def test_a_half_precision_model_sums_to_its_precision() -> None:
    model = VisionModel(locate(str(families.saved("vit-class"))), "cpu", torch.bfloat16)
    pixels = families.noise("vit-class").bfloat16()
    parts = Decomposition(model.layout, model.device).run(pixels)
    total = sum(c.double() for c in parts.components.values())
    assert 1e-4 < relative(total, parts.representation.double()) < 0.05
