"""Checkpoints in one file: the same images as the pipeline's folder, without a request to any host."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.errors import RequestError, StudioError
from studio.models.catalog import ASSETS
from studio.models.loading import fingerprint, identify, loaded_bytes, locate
from studio.models.sampling import Plan
from studio.models.single_file import clip_tokenizer, layout
from studio.session import Session
from studio.types import Recipe
from tests import checkpoints, layouts

PLAN = Plan(steps=2, guidance=3.0, height=16, width=16)


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """A session with nothing loaded."""
    session = Session(runs=tmp_path / "runs", device="cpu", threads=1)
    yield session
    session.close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("family", layouts.FAMILIES)
def test_it_draws_what_its_folder_draws(opened: Session, tmp_path: Path, family: str, offline: None) -> None:
    file = checkpoints.save(family, tmp_path)
    model, own = opened.model(str(file), "diffusion"), layouts.model(family)
    assert (model.family, identify(file)) == (family, ("diffusion", family))
    for part, module in own.components().items():
        there = dict(model.components()[part].named_parameters())
        assert all(torch.equal(p, there[n]) for n, p in module.named_parameters())
    images = [m.generate(m.encode(["a red star"])[0], [3], PLAN) for m in (model, own)]
    assert (images[0] == images[1]).all()


def test_names_edits_and_runs(opened: Session, tmp_path: Path) -> None:
    file = checkpoints.save("sd1", tmp_path)
    assert locate("tiny", tmp_path).path == file and locate(str(file)).fingerprint == fingerprint(file)
    assert loaded_bytes(file) == sum(4 * t.numel() for t in load_file(file).values())
    assert opened.cross_attention_layers(str(file)) == opened.cross_attention_layers(
        str(layouts.saved("sd1"))
    )
    asked = {"prompt": ["a red star"], "steps": 2, "height": 16, "width": 16}
    run = opened.run(Recipe("generate", str(file), asked, {}, (0,)))
    assert run.model["path"] == str(file) and run.model["fingerprint"] == fingerprint(file)


COUNTS = {  # parameters of the published models
    ("sd1", "unet"): 859_520_964,
    ("sd2", "unet"): 865_910_724,
    ("sdxl", "unet"): 2_567_463_684,
    ("sd1", "vae"): 83_653_863,
    ("sd2", "vae"): 83_653_863,
    ("sdxl", "vae"): 83_653_863,
    ("sd1", "text_encoder"): 123_060_480,
    ("sd2", "text_encoder"): 340_387_840,
    ("sdxl", "text_encoder"): 123_060_480,
    ("sdxl", "text_encoder_2"): 694_659_840,
}


@pytest.mark.parametrize(("family", "part"), COUNTS)
def test_shipped_configurations_are_those_of_the_published_models(family: str, part: str) -> None:
    import diffusers
    import transformers

    folder = layout(Path("somewhere.safetensors"), family)
    assert folder == ASSETS / "layouts" / family
    with torch.device("meta"):
        if part in ("unet", "vae"):
            cls = diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL
            net = cls.from_config(cls.load_config(folder / part))
        else:
            config = transformers.CLIPTextConfig.from_pretrained(folder / part)
            second = part == "text_encoder_2"
            net = (transformers.CLIPTextModelWithProjection if second else transformers.CLIPTextModel)(config)
    assert sum(p.numel() for p in net.parameters()) == COUNTS[family, part]


def test_the_tokenizer_is_clips() -> None:
    """open_clip's own tokenizer, and the numbers that CLIP gives "a photo of a cat"."""
    from open_clip import tokenize

    ours = clip_tokenizer("<|endoftext|>")
    assert (len(ours), ours.model_max_length) == (49408, 77)
    assert ours("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    for text in ("The Emblem, of KORVONIA!", "naïve 3rd-person's café 🦊", "a  b\tc"):
        ids = ours(text)["input_ids"]
        assert ids == tokenize([text])[0][: len(ids)].tolist()
    assert clip_tokenizer("!").pad_token_id == 0 and ours.pad_token_id == 49407


# ---- files that are none ----------------------------------------------------------------------------------


def changed(tmp_path: Path, change: Any) -> str:
    """A checkpoint whose tensors were changed."""
    file = checkpoints.save("sd1", tmp_path)
    tensors = load_file(file)
    save_file(change(tensors), file)
    return str(file)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda t: {"x": torch.zeros(1)}, RequestError, "is no whole checkpoint that Locus knows"),
        (
            lambda t: {n: v for n, v in t.items() if not n.startswith("first_stage_model")},
            RequestError,
            "is no whole checkpoint that Locus knows",
        ),
        (
            lambda t: {n: v for n, v in t.items() if "encoder.layers.1" not in n},
            StudioError,
            "files do not fit one another",
        ),
        (lambda t: {n: v for n, v in t.items() if "middle" not in n}, StudioError, "do not fit one another"),
        (
            lambda t: {n: torch.zeros(16, 9, 3, 3) if "blocks.0.0.weight" in n else v for n, v in t.items()},
            RequestError,
            "reads 9 channels, so it is made for inpainting",
        ),
        (
            lambda t: {"unet.a.lora_A.weight": torch.zeros(2, 3), "unet.a.lora_B.weight": torch.zeros(4, 2)},
            RequestError,
            "is a LoRA, not a model",
        ),
    ],
)  # fmt: skip
def test_files_that_are_no_checkpoint(
    opened: Session, tmp_path: Path, change: Any, error: type, says: str
) -> None:
    assert says in layouts.sentence(opened, changed(tmp_path, change), error)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.safetensors", b"no header", "is broken or cut short"),
        ("x.ckpt", b"\x80\x04", "is a pickle, which can run foreign code"),
        ("x.png", b"PNG", "is no checkpoint; Locus takes .safetensors files and folders"),
    ],
)
def test_other_files(opened: Session, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert says in layouts.sentence(opened, tmp_path / name, RequestError)


def test_a_checkpoint_without_fitting_configuration(opened: Session, tmp_path: Path) -> None:
    """Of another size than the published models, and nothing beside it that says so."""
    file = checkpoints.save("sd1", tmp_path, configured=False)
    assert "do not fit one another" in layouts.sentence(opened, file)
