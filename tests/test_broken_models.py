"""Model folders that are broken, foreign, hostile or too large: one sentence each, and no code of theirs
runs."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.errors import RequestError, StudioError
from studio.models.base import self_check
from studio.models.loading import loaded_bytes
from studio.session import Session
from tests import layouts

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """A session with nothing loaded."""
    session = Session(runs=tmp_path / "runs", device="cpu", threads=1)
    yield session
    session.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Stable Diffusion 1 layout of one's own, to be broken."""
    return layouts.copy("sd1", tmp_path / "model")


# ---- of another kind --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline"),
        ("model_index.json", {"_class_name": ["my_code", "MyPipeline"]}, "code of its own"),
        ("model_index.json", {}, "pipeline without a class"),
        ("model_index.json", ["a list"], "pipeline without a class"),
        ("config.json", {"model_type": "bert"}, "is a bert model, and a text-to-image model is needed"),
        ("config.json", {"architecture": "vit_base_patch16_224"}, "is a vision transformer"),
        ("config.json", {}, "is a unknown model"),
        ("readme.txt", {}, "holds no model that Locus knows"),
    ],
)
def test_foreign_folders(opened: Session, tmp_path: Path, file: str, content: Any, says: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / file).write_text(json.dumps(content))
    assert says in layouts.sentence(opened, tmp_path / "other", RequestError)


def test_each_kind_is_refused_where_the_other_is_needed(opened: Session) -> None:
    says = layouts.sentence(opened, "atlas-clip", RequestError)
    assert "atlas-clip is a CLIP, and a text-to-image model is needed" in says
    says = layouts.sentence(opened, "atlas-sd", RequestError, kind="clip")
    assert "atlas-sd is a text-to-image model, and a CLIP is needed" in says


def test_an_empty_folder(opened: Session, tmp_path: Path) -> None:
    assert "model_index.json" in layouts.sentence(opened, tmp_path, RequestError)


# ---- broken files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b""])
@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_broken_json(opened: Session, folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    layouts.sentence(opened, folder)


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights(opened: Session, folder: Path, file: str, keep: int) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:keep])
    assert "broken or cut short" in layouts.sentence(opened, folder, RequestError)


def header(**tensor: Any) -> bytes:
    """A safetensors file of one tensor with 16 bytes, whose header says something odd."""
    text = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **tensor}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


GARBAGE = {
    "noise": bytes(range(256)) * 4,
    "zeros": bytes(4096),
    "zip": b"PK\x03\x04 a zip",
    "list": (10).to_bytes(8, "little") + b"[1, 2, 3] " + bytes(16),
    "dtype": header(dtype="F99"),
    "shape": header(shape=[5]),
    "word": header(shape="four"),
    "before": header(data_offsets=[-16, 16]),
    "gap": header(data_offsets=[8, 16]),
    "offsets": header(data_offsets="all"),
    "foreign": header(),
}


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_garbage_weights(opened: Session, folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    layouts.sentence(opened, folder)


@pytest.mark.parametrize(
    "gone", [UNET, VAE, TEXT, "unet", "vae", "text_encoder", "tokenizer", "scheduler", "unet/config.json"]
)
def test_missing_parts(opened: Session, folder: Path, gone: str) -> None:
    target = folder / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    layouts.sentence(opened, folder)


def test_a_missing_shard_is_named(opened: Session, tmp_path: Path) -> None:
    layouts.build("sd1").save_pretrained(tmp_path / "m", safe_serialization=True, max_shard_size="200KB")
    shard = sorted((tmp_path / "m" / "unet").glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in layouts.sentence(opened, tmp_path / "m", RequestError)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_of_shards(opened: Session, folder: Path, content: str) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    assert "is broken" in layouts.sentence(opened, folder, RequestError)


# ---- files that do not fit one another --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("unet/config.json", {"cross_attention_dim": 64}),
        ("unet/config.json", {"block_out_channels": [16, 64]}),
        ("vae/config.json", {"block_out_channels": [8, 16]}),
        ("text_encoder/config.json", {"hidden_size": 64}),
        ("text_encoder/config.json", {"vocab_size": 900}),
        ("unet/config.json", {"block_out_channels": "wide"}),
        ("unet/config.json", {"down_block_types": ["NoSuchBlock", "DownBlock2D"]}),
    ],
)
def test_a_configuration_of_other_shapes(
    opened: Session, folder: Path, file: str, change: dict[str, Any]
) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **change}))
    assert "do not fit one another" in layouts.sentence(opened, folder)


@pytest.mark.parametrize(("file", "name"), [(UNET, "conv_in.weight"), (VAE, "decoder.conv_in.weight")])
def test_a_missing_tensor_is_refused(opened: Session, folder: Path, file: str, name: str) -> None:
    layouts.edit_weights(folder / file, name, lambda _: None)
    assert "do not fit one another" in layouts.sentence(opened, folder)


@pytest.mark.parametrize(
    ("family", "part", "name"),
    [
        ("sd1", "text_encoder", "encoder.layers.1.mlp.fc1.weight"),
        ("sdxl", "text_encoder_2", "text_model.final_layer_norm.weight"),
        ("sdxl", "text_encoder_2", "text_projection.weight"),
    ],
)
def test_transformers_does_not_make_up_a_missing_tensor(
    opened: Session, tmp_path: Path, family: str, part: str, name: str
) -> None:
    folder = layouts.copy(family, tmp_path / "model")
    layouts.edit_weights(folder / part / "model.safetensors", name, lambda _: None)
    assert f"{part} lacks {name.removeprefix('text_model.')}" in layouts.sentence(opened, folder)


def test_old_names_of_a_text_encoder_still_load(opened: Session, folder: Path) -> None:
    """Files of before transformers 5.6 say `text_model.`, as those of Stable Diffusion on the hub do."""
    old = {f"text_model.{n}": t for n, t in load_file(folder / TEXT).items()}
    save_file(old, folder / TEXT, metadata={"format": "pt"})
    got = opened.model(str(folder), "diffusion").encode(["a red star"])[0].states
    assert torch.equal(got, layouts.model("sd1").encode(["a red star"])[0].states)


@pytest.mark.parametrize(("file", "key"), [("tokenizer.json", None), ("tokenizer_config.json", 77)])
def test_a_tokenizer_that_does_not_fit(opened: Session, folder: Path, file: str, key: int | None) -> None:
    if key is None:
        (folder / "tokenizer" / file).unlink()
    else:
        layouts.edit_json(folder / "tokenizer" / file, model_max_length=key)
    assert "tokenizer" in layouts.sentence(opened, folder)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (UNET, "conv_out.weight"),
        (UNET, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
        (TEXT, "encoder.layers.0.mlp.fc1.weight"),
        (VAE, "decoder.conv_out.weight"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(
    opened: Session, folder: Path, file: str, name: str, value: float
) -> None:
    layouts.edit_weights(folder / file, name, lambda t: t.fill_(value))
    assert "NaN or infinity" in layouts.sentence(opened, folder)


def test_a_clip_of_transformers_is_whole_or_refused(opened: Session, tmp_path: Path) -> None:
    folder = layouts.save_clip(tmp_path / "clip")
    model = opened.model(str(folder), "clip")
    assert model.text_features(["a red star"]).shape == (1, 24)
    assert opened.unload(str(folder))
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    layouts.edit_weights(folder / "model.safetensors", name, lambda _: None)
    assert f"lack {name}" in layouts.sentence(opened, folder, kind="clip")


def test_a_clip_whose_weights_are_no_numbers(opened: Session, tmp_path: Path) -> None:
    shutil.copytree(layouts.ASSETS / "atlas" / "atlas-clip", tmp_path / "clip")
    file = tmp_path / "clip" / "open_clip_model.safetensors"
    layouts.edit_weights(file, "text_projection", lambda t: t.fill_(float("nan")))
    assert "text_projection holds NaN" in layouts.sentence(opened, tmp_path / "clip", kind="clip")


# ---- hostile files ----------------------------------------------------------------------------------------


class Bomb:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.target,)


def plant(bomb: Path, target: Path) -> None:
    """Writes a poisoned pickle, and proves that opening it would show."""
    bomb.write_bytes(pickle.dumps(Bomb(target)))
    pickle.loads(bomb.read_bytes())
    assert target.is_dir()
    target.rmdir()


@pytest.mark.parametrize(
    ("gone", "bomb"),
    [
        (UNET, "unet/diffusion_pytorch_model.bin"),
        (VAE, "vae/diffusion_pytorch_model.bin"),
        (TEXT, "text_encoder/pytorch_model.bin"),
        (TEXT, "text_encoder/model.ckpt"),
    ],
)
def test_a_pickle_is_never_opened(opened: Session, folder: Path, gone: str, bomb: str) -> None:
    (folder / gone).unlink()
    plant(folder / bomb, folder / "exploded")
    assert "never opens it" in layouts.sentence(opened, folder, RequestError)
    assert not (folder / "exploded").exists()


def test_a_pickle_under_the_name_of_safetensors_is_never_opened(opened: Session, folder: Path) -> None:
    plant(folder / UNET, folder / "exploded")
    assert "broken or cut short" in layouts.sentence(opened, folder, RequestError)
    assert not (folder / "exploded").exists()


def test_pickles_beside_good_files_are_left_alone(opened: Session, folder: Path) -> None:
    for bomb in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "model.ckpt"):
        plant(folder / bomb, folder / "exploded")
    assert opened.model(str(folder), "diffusion").family == "sd1"
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    ("part", "cls"),
    [("unet", "UNet2DConditionModel"), ("scheduler", "PNDMScheduler"), ("text_encoder", "CLIPTextModel")],
)
def test_code_in_a_folder_never_runs(opened: Session, folder: Path, part: str, cls: str) -> None:
    code = f"import os\nos.mkdir({str(folder / 'exploded')!r})\nclass {cls}: pass\n"
    (folder / part / "mine.py").write_text(code)
    layouts.edit_json(folder / "model_index.json", **{part: ["mine", cls]})
    layouts.sentence(opened, folder)
    assert not (folder / "exploded").exists()


# ---- memory -----------------------------------------------------------------------------------------------


def test_not_enough_memory(tmp_path: Path) -> None:
    session = Session(runs=tmp_path, device="cpu", threads=1, memory=1000)
    says = layouts.sentence(session, "atlas-sd")
    assert "needs about 0.0 GB" in says or "GB may be used" in says
    session.close()


@pytest.fixture
def narrow(tmp_path: Path) -> Any:
    """A session with room for either of two small models, not for both."""
    room = max(loaded_bytes(layouts.saved(f)) for f in ("sd1", "sdxl")) + 100_000
    session = Session(runs=tmp_path, device="cpu", threads=1, memory=room)
    yield session
    session.close()


def test_the_least_recently_used_model_makes_room(narrow: Session) -> None:
    first = narrow.model(str(layouts.saved("sd1")), "diffusion")
    narrow.model(str(layouts.saved("sdxl")), "diffusion")
    assert [name for name, _ in narrow.loaded()] == [str(layouts.saved("sdxl"))]
    assert narrow.model(str(layouts.saved("sd1")), "diffusion") is not first
    assert [name for name, _ in narrow.loaded()] == [str(layouts.saved("sd1"))]


def test_a_model_that_cannot_fit_drives_nobody_out(narrow: Session) -> None:
    kept = narrow.model(str(layouts.saved("sd1")), "diffusion")
    with pytest.raises(StudioError, match="GB may be used on cpu"):
        narrow.model(str(layouts.saved("sd2")), "diffusion")
    assert narrow.model(str(layouts.saved("sd1")), "diffusion") is kept


def test_use_decides_who_goes_first(opened: Session) -> None:
    names = [str(layouts.saved(f)) for f in ("sd1", "sdxl")]
    for name in [*names, names[0]]:
        opened.model(name, "diffusion")
    assert [name for name, _ in opened.loaded()] == [names[1], names[0]]
    assert opened.unload(names[1]) and not opened.unload(names[1])
    assert [name for name, _ in opened.loaded()] == [names[0]]


# ---- the check at load ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("cross-attention", "attn2.to_out.0"),
        ("self-attention", "attn1.to_out.0"),
        ("feed-forward", "ff.net.2"),
        ("resnet", "conv2"),
    ],
)
def test_a_unet_that_does_not_react_is_refused(opened: Session, folder: Path, kind: str, part: str) -> None:
    tensors = load_file(folder / UNET)
    dead = {n: torch.zeros_like(t) if n.rsplit(".", 1)[0].endswith(part) else t for n, t in tensors.items()}
    assert sum(not t.any() for t in dead.values()) > sum(not t.any() for t in tensors.values())
    save_file(dead, folder / UNET, metadata={"format": "pt"})
    says = layouts.sentence(opened, folder)
    assert f"does not react when {kind}" in says and "not supported" in says


@pytest.mark.parametrize("family", layouts.FAMILIES)
def test_what_does_not_react_changes_exactly_nothing(family: str) -> None:
    model = layouts.load(layouts.saved(family))
    for name, parameter in model.unet.named_parameters():
        if "ff.net.2" in name:
            parameter.zero_()
    changes = {kind.split(" ")[0]: change for kind, change in model.zeroing_changes().items()}
    assert changes.pop("feed-forward") == 0 and min(changes.values()) > 1e-3


def halves(last: float) -> Any:
    """A model of four float16 numbers whose sum overflows."""
    net = torch.nn.Linear(4, 1, bias=False, dtype=torch.float16)
    net.weight.data[:] = torch.tensor([40_000.0, 40_000.0, 1.0, last])
    return SimpleNamespace(id="halves", components=lambda: {"net": net})


def test_weights_are_judged_one_by_one_where_their_sum_overflows() -> None:
    self_check(halves(1.0))
    for last in (math.inf, -math.inf, math.nan):
        with pytest.raises(StudioError, match="net's weight holds NaN or infinity"):
            self_check(halves(last))


@pytest.mark.parametrize("family", [*layouts.FAMILIES, "atlas"])
def test_every_layout_passes_the_check(family: str) -> None:
    model = layouts.model(family)
    self_check(model)
    assert len(model.zeroing_changes()) == 4 and all(v > 0 for v in model.zeroing_changes().values())
