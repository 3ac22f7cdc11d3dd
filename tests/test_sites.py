"""The address tables on the real configurations without weights, and watch() with numbers done by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from studio.models.hooks import execution_order, hook_count, watch
from studio.models.sites import (
    UNET_KINDS,
    text_layers,
    text_module,
    text_norm,
    unet_module,
    unet_site_names,
    unet_sites,
)
from studio.types import Patch, Site
from tests import layouts

_SD = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
UNETS: dict[str, dict[str, Any]] = {  # what the unet/config.json of the real models say
    "sd1": {**_SD, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        **_SD,
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TEXTS: dict[str, tuple[type, dict[str, Any]]] = {  # width, layers, heads of the real text encoders
    "sd1": (CLIPTextModel, {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}),
    "sd2": (CLIPTextModel, {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16}),
    "sdxl 1": (CLIPTextModel, {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}),
    "sdxl 2": (
        CLIPTextModelWithProjection,
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280},
    ),
}


@cache
def unet(family: str) -> UNet2DConditionModel:
    """A UNet of real size on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[family])


def blocks(sites: list[Site]) -> list[tuple[str, int]]:
    """Neighbouring sites of one block counted together, in order."""
    found: list[tuple[str, int]] = []
    for site in sites:
        block = "mid_block" if site.layer.startswith("mid") else ".".join(site.layer.split(".")[:2])
        if found and found[-1][0] == block:
            found[-1] = (block, found[-1][1] + 1)
        else:
            found.append((block, 1))
    return found


# ---- UNets of real size -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "cross", "own", "resnets", "forward"),
    [("sd1", 16, 16, 22, 16), ("sd2", 16, 16, 22, 16), ("sdxl", 70, 70, 17, 70)],
)
def test_counts_of_the_table(family: str, cross: int, own: int, resnets: int, forward: int) -> None:
    names = unet_site_names(unet(family))
    assert {kind: len(found) for kind, found in names.items()} == {
        "cross-attention": cross,
        "self-attention": own,
        "resnet": resnets,
        "feed-forward": forward,
        "stream": resnets,
    }
    assert {kind: len(unet_sites(unet(family), [kind])) for kind in UNET_KINDS} == {
        kind: len(found) for kind, found in names.items()
    }


@pytest.mark.parametrize(
    ("family", "millions", "width", "out"),
    [
        ("sd1", 859.5, 768, {320, 640, 1280}),
        ("sd2", 865.9, 1024, {320, 640, 1280}),
        ("sdxl", 2567.5, 2048, {640, 1280}),
    ],
)
def test_sizes_of_the_table(family: str, millions: float, width: int, out: set[int]) -> None:
    net = unet(family)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions
    modules = [unet_module(net, s) for s in unet_sites(net, ["cross-attention"])]
    matrices = [m for a in modules for m in (a.to_k, a.to_v)]
    assert {m.weight.shape[1] for m in matrices} == {width} and {m.weight.shape[0] for m in matrices} == out
    assert all(m.bias is None for m in matrices)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_execution_order_of_cross_attention(family: str) -> None:
    assert blocks(unet_sites(unet(family), ["cross-attention"])) == [
        ("down_blocks.0", 2),
        ("down_blocks.1", 2),
        ("down_blocks.2", 2),
        ("mid_block", 1),
        ("up_blocks.1", 3),
        ("up_blocks.2", 3),
        ("up_blocks.3", 3),
    ]


def test_execution_order_of_sdxl() -> None:
    sites = unet_sites(unet("sdxl"), ["cross-attention"])
    assert blocks(sites) == [
        ("down_blocks.1", 4),
        ("down_blocks.2", 20),
        ("mid_block", 10),
        ("up_blocks.0", 30),
        ("up_blocks.1", 6),
    ]
    assert sites[45].layer == "up_blocks.0.attentions.1.transformer_blocks.1.attn2"


def test_named_modules_would_put_the_mid_block_last() -> None:
    assert unet_site_names(unet("sd1"))["cross-attention"][-1].startswith("mid_block")
    assert unet_sites(unet("sd1"), ["cross-attention"])[-1].layer.startswith("up_blocks.3")


@pytest.mark.parametrize("family", UNETS)
def test_several_kinds_share_one_axis(family: str) -> None:
    sites = unet_sites(unet(family), ["feed-forward", "resnet", "cross-attention", "self-attention"])
    first = next(i for i, s in enumerate(sites) if s.kind == "self-attention")
    assert [s.kind for s in sites[first : first + 3]] == ["self-attention", "cross-attention", "feed-forward"]
    assert sites[0].kind == sites[-1].kind == "resnet" or sites[-1].kind == "feed-forward"
    kinds = [[s for s in sites if s.kind == k] for k in ("resnet", "cross-attention")]
    assert kinds == [unet_sites(unet(family), [k]) for k in ("resnet", "cross-attention")]


def test_a_resnet_is_its_branch_and_a_stream_its_whole_output() -> None:
    net = unet("sd1")
    branch, stream = unet_sites(net, ["resnet"])[0], unet_sites(net, ["stream"])[0]
    assert branch.layer == stream.layer == "down_blocks.0.resnets.0"
    assert unet_module(net, branch) is net.down_blocks[0].resnets[0].conv2
    assert unet_module(net, stream) is net.down_blocks[0].resnets[0]


def test_stream_is_branch_plus_shortcut() -> None:
    model = layouts.model("sd1")
    branch, stream = (Site("unet", "down_blocks.0.resnets.0", k) for k in ("resnet", "stream"))
    modules = {s: unet_module(model.unet, s) for s in (branch, stream)}
    x, time = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 64)
    with torch.no_grad(), watch(modules, record=modules) as tape:
        model.unet.down_blocks[0].resnets[0](x, time)
    assert torch.equal(tape[stream], x + tape[branch])


# ---- text encoders of real size ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layers"), [("sd1", 12), ("sd2", 23), ("sdxl 1", 12), ("sdxl 2", 32)])
def test_text_encoders(name: str, layers: int) -> None:
    cls, shape = TEXTS[name]
    with torch.device("meta"):
        encoder = cls(CLIPTextConfig(intermediate_size=4 * shape["hidden_size"], **shape))
    assert len(text_layers(encoder)) == layers
    for kind in ("hidden", "self-attention", "mlp"):
        found = [text_module(encoder, Site("text", i, kind)) for i in range(layers)]
        assert len({id(m) for m in found}) == layers
    last = text_layers(encoder)[-1]
    assert text_module(encoder, Site("text", layers - 1, "self-attention")) is last.self_attn
    assert text_module(encoder, Site("text", str(layers - 1), "mlp")) is last.mlp
    assert text_norm(encoder).weight.shape == (shape["hidden_size"],)
    embedding = text_module(encoder, Site("text", 0, "embedding"))
    assert embedding.weight.shape == (49408, shape["hidden_size"])


def read_layers(model: Any, part: str) -> int:
    """How many layers the text states hang on: SDXL reads the output of the layer before the last."""
    return len(text_layers(model.encoders[part])) - (model.family == "sdxl")


@pytest.mark.parametrize("kind", ["hidden", "self-attention", "mlp"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_sites_act_on_every_layer_that_is_read(family: str, kind: str) -> None:
    model = layouts.model(family)
    model.lens("x")  # transformers installs hooks of its own at the first call that asks for hidden states
    for part in model.encoders:
        for i, site in enumerate(model.text_sites(kind, part)):
            patch = Patch(site, do="add", value=np.arange(-1.0, 1.0, 2 / width_of(model, part)), rows=(1,))
            cond, _ = model.encode(["a red star"] * 2, patches=[patch])
            change = float((cond.states[0] - cond.states[1]).abs().max())
            assert (change > 0.1) == (i < read_layers(model, part)), site
        assert hook_count(model.encoders[part]) == 0


def width_of(model: Any, part: str) -> int:
    """Width of a text encoder."""
    return model.embedding_width(part)


def test_hidden_states_of_transformers_see_our_patches() -> None:
    """Its own hooks run after ours, whichever was there first."""
    encoder = layouts.build("sd1").text_encoder
    ids, site = torch.tensor([[813, 5, 814]]), Site("text", 0, "hidden")
    for _ in range(2):
        with torch.no_grad(), watch({site: text_layers(encoder)[0]}, patches=[Patch(site, "zero")]):
            assert not encoder(ids, output_hidden_states=True).hidden_states[1].any()
    assert hook_count(encoder) == 0


@pytest.mark.parametrize("family", ["sd1", "sd2", "atlas"])
def test_the_last_row_of_the_lens_is_what_the_model_reads(family: str) -> None:
    model = layouts.model(family)
    lens, states = model.lens("a red star").states, model.encode(["a red star"])[0].states
    assert len(lens) == 1 + len(text_layers(model.encoders["text"]))
    assert (lens[-1] - states[0]).abs().max() <= 1e-5 < (lens[0] - states[0]).abs().max()


# ---- watch, by hand ---------------------------------------------------------------------------------------

A, B = Site("toy", "a", "block"), Site("toy", "b", "block")


class Same(nn.Module):
    """Gives back what it gets, in a tuple or not."""

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x: torch.Tensor) -> Any:
        return (x, "rest") if self.pair else x


def rows() -> torch.Tensor:
    """Three rows of two positions and two numbers: 0 … 11."""
    return torch.arange(12.0).reshape(3, 2, 2)


def through(*patches: dict[str, Any], step: int = 0, offset: int = 0, pair: bool = False) -> Any:
    """`rows()` through a patched module that otherwise changes nothing."""
    module = Same(pair)
    with watch({A: module}, patches=[Patch(A, **p) for p in patches]) as tape:
        tape.step, tape.row_offset = step, offset
        out = module(rows())
    assert hook_count(module) == 0
    return out


def changed(**places: Any) -> torch.Tensor:
    """`rows()` with some rows written anew: r1=[[…], […]]."""
    want = rows()
    for name, value in places.items():
        want[int(name[1:])] = torch.tensor(value)
    return want


@pytest.mark.parametrize(
    ("patch", "want"),
    [
        ({"do": "zero"}, torch.zeros(3, 2, 2)),
        ({"do": "zero", "rows": (1,)}, changed(r1=[[0.0, 0], [0, 0]])),
        ({"do": "zero", "rows": (0, 2), "at": (1,)}, changed(r0=[[0.0, 1], [0, 0]], r2=[[8.0, 9], [0, 0]])),
        ({"do": "zero", "rows": (1,), "at": (-1,)}, changed(r1=[[4.0, 5], [0, 0]])),
        ({"do": "add", "value": 1.5}, rows() + 1.5),
        ({"do": "add", "value": np.array([10.0, 20.0]), "rows": (2,)}, changed(r2=[[18.0, 29], [20, 31]])),
        (
            {"do": "add", "value": np.array([[1.0, 2], [3, 4]]), "rows": (0,), "at": (1, 0)},
            changed(r0=[[3.0, 5], [3, 5]]),
        ),
        ({"do": "scale", "value": 0.5, "rows": (1,)}, changed(r1=[[2.0, 2.5], [3, 3.5]])),
        ({"do": "scale", "value": -1, "rows": (1,), "at": (0,)}, changed(r1=[[-4.0, -5], [6, 7]])),
        ({"do": "copy", "value": 2, "rows": (0,)}, changed(r0=[[8.0, 9], [10, 11]])),
        (
            {"do": "copy", "value": 0, "rows": (1, 2), "at": (1,)},
            changed(r1=[[4.0, 5], [2, 3]], r2=[[8.0, 9], [2, 3]]),
        ),
        ({"do": "copy", "value": np.array([7.0, 8.0]), "rows": (0,)}, changed(r0=[[7.0, 8], [7, 8]])),
        (
            {"do": "copy", "value": np.array([[1.0, 2]]), "rows": (0,), "at": (1,)},
            changed(r0=[[0.0, 1], [1, 2]]),
        ),
    ],
)
def test_each_verb(patch: dict[str, Any], want: torch.Tensor) -> None:
    assert torch.equal(through(patch), want)
    out = through(patch, pair=True)
    assert out[1] == "rest" and torch.equal(out[0], want)


@pytest.mark.parametrize(("step", "active"), [(0, False), (1, True), (3, True), (4, False)])
def test_a_range_of_steps_includes_both_ends(step: int, active: bool) -> None:
    out = through({"do": "zero", "when": (1, 3)}, step=step)
    assert torch.equal(out, torch.zeros(3, 2, 2) if active else rows())


def test_rows_are_counted_behind_the_unconditional_ones() -> None:
    assert torch.equal(through({"do": "zero"}, offset=2), changed(r2=[[0.0, 0], [0, 0]]))
    assert torch.equal(through({"do": "zero", "rows": (0,)}, offset=1), changed(r1=[[0.0, 0], [0, 0]]))
    moved = through({"do": "copy", "value": 0, "rows": (1,)}, offset=1)
    assert torch.equal(moved, changed(r2=[[4.0, 5], [6, 7]]))


def test_patches_apply_in_order() -> None:
    add, double = {"do": "add", "value": 1.0, "rows": (0,)}, {"do": "scale", "value": 2.0, "rows": (0,)}
    assert torch.equal(through(add, double), changed(r0=[[2.0, 4], [6, 8]]))
    assert torch.equal(through(double, add), changed(r0=[[1.0, 3], [5, 7]]))


def test_copies_are_read_before_any_patch() -> None:
    swap = ({"do": "copy", "value": 1, "rows": (0,)}, {"do": "copy", "value": 0, "rows": (1,)})
    assert torch.equal(through(*swap), changed(r0=[[4.0, 5], [6, 7]], r1=[[0.0, 1], [2, 3]]))


def test_the_module_itself_is_not_written_to() -> None:
    module, x = Same(), rows()
    with watch({A: module}, patches=[Patch(A, do="zero")]):
        module(x)
    assert torch.equal(x, rows()) and torch.equal(module(x), rows())


def test_tape_keeps_the_latest_and_patched_output() -> None:
    first, second = Same(), Same(pair=True)
    patches = [Patch(A, do="scale", value=3.0)]
    with watch({A: first, B: second}, record=[A, B], patches=patches) as tape:
        assert A not in tape and not tape.touched
        first(rows())
        second(first(rows() + 1))
    assert torch.equal(tape[A], 3 * (rows() + 1)) and torch.equal(tape[str(B)], 3 * (rows() + 1))
    assert tape.touched == {A, B}


@pytest.mark.parametrize("options", [{"record": [A, B]}, {"patches": [Patch(A, "zero"), Patch(B, "zero")]}])
def test_an_unknown_site_is_a_key_error_that_names_it(options: dict[str, Any]) -> None:
    module = Same()
    with pytest.raises(KeyError, match=r"toy\.b\.block"), watch({A: module}, **options):
        raise AssertionError("the block must not run")
    assert hook_count(module) == 0


@pytest.mark.parametrize("error", [ValueError("inside"), KeyboardInterrupt("inside")])
def test_no_hook_is_left_after_an_exception(error: BaseException) -> None:
    module = Same()
    with pytest.raises(type(error), match="inside"), watch({A: module}, record=[A]):
        assert hook_count(module) == 1
        raise error
    assert hook_count(module) == 0


def test_an_unknown_verb_is_refused_and_leaves_no_hook() -> None:
    module = Same()
    with pytest.raises(ValueError, match="zero, add, scale or copy"):
        with watch({A: module}, patches=[Patch(A, do="invert", value=1.0)]):
            module(rows())
    assert hook_count(module) == 0


def test_execution_order_is_that_of_the_call() -> None:
    first, second, idle = Same(), Same(), Same()
    order = execution_order({"x": first, "y": second, "z": idle}, lambda: (second(1), first(2), second(3)))
    assert order == ["y", "x"] and hook_count(first) == hook_count(second) == 0
