"""From a name to a loaded model: fingerprints recomputed slowly, and every fault as one sentence."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from studio.errors import RequestError, StudioError
from studio.models.catalog import CATALOG
from studio.models.loading import COMPONENTS, fingerprint, identify, loaded_bytes, locate
from studio.models.sampling import Plan, denoise
from studio.session import Session
from tests import layouts

http = importlib.import_module(hub.HTTPError.__module__.split(".")[0])  # the client that the hub uses
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


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


# ---- what works -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", layouts.FAMILIES)
def test_every_layout_loads_and_draws(opened: Session, family: str) -> None:
    model = opened.model(str(layouts.saved(family)), "diffusion")
    assert (model.family, identify(layouts.saved(family))) == (family, ("diffusion", family))
    assert opened.model(str(layouts.saved(family)), "diffusion") is model
    plan = Plan(steps=2, guidance=3.0, height=16, width=16)
    cond, _ = model.encode(["a star", "a cube"])
    images = model.decode(denoise(model, cond, model.unconditional(2, plan), [0, 0], plan))
    assert images.shape == (2, 16, 16, 3) and (images[0] != images[1]).any()
    assert not any(p.requires_grad for m in model.components().values() for p in m.parameters())
    assert not any(m.training for m in model.components().values())


@pytest.mark.parametrize("family", layouts.FAMILIES)
def test_parameters_are_those_of_the_files(family: str) -> None:
    model = layouts.model(family)
    assert set(model.components()) == {c for c in COMPONENTS if (layouts.saved(family) / c).is_dir()}
    for part, module in model.components().items():
        stored = load_file(next((layouts.saved(family) / part).glob("*.safetensors")))
        assert all(torch.equal(p, stored[n]) for n, p in module.named_parameters())


def test_memory_is_counted() -> None:
    model = layouts.model("sd2")
    files = [f for c in COMPONENTS for f in (layouts.saved("sd2") / c).glob("*.safetensors")]
    want = sum(t.nbytes for f in files for t in load_file(f).values())
    assert loaded_bytes(layouts.saved("sd2")) == want
    assert 0 <= model.nbytes() - want < 1e4  # position ids and the like are no weights


@pytest.mark.parametrize("name", sorted(n for n, e in CATALOG.items() if e.embedded))
def test_embedded_models_are_found_by_name(opened: Session, name: str) -> None:
    source = locate(name)
    assert (source.name, source.kind) == (name, CATALOG[name].family)
    assert opened.model(name, source.kind).id == name
    assert source.defaults == CATALOG[name].defaults


def test_models_folder(tmp_path: Path) -> None:
    layouts.copy("sd2", tmp_path / "mine")
    assert locate("mine", tmp_path).family == "sd2"
    with pytest.raises(RequestError, match="no model 'mine'"):
        locate("mine")


def test_catalogue_is_in_order() -> None:
    assert all(name == entry.name and entry.licence and entry.note for name, entry in CATALOG.items())
    assert all(entry.embedded == (entry.size == 0) for entry in CATALOG.values())


# ---- fingerprints -----------------------------------------------------------------------------------------


def slow_fingerprint(folder: Path) -> str:
    """The contract's definition through the library's own reader."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    rows = {}
    for part in COMPONENTS:
        for file in (folder / part).glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    rows[f"{part}.{key}"] = opened.get_tensor(key)
    digest = hashlib.sha256()
    for name in sorted(rows):
        tensor = rows[name].contiguous()
        digest.update(json.dumps([name, names[tensor.dtype], list(tensor.shape)]).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("family", [*layouts.FAMILIES, "atlas"])
def test_fingerprint_equals_the_definition(family: str) -> None:
    folder = layouts.ATLAS if family == "atlas" else layouts.saved(family)
    assert fingerprint(folder) == slow_fingerprint(folder)


def test_fingerprint_is_that_of_a_sharded_copy(opened: Session, tmp_path: Path) -> None:
    layouts.build("sd1").save_pretrained(tmp_path / "many", safe_serialization=True, max_shard_size="200KB")
    assert len(list((tmp_path / "many" / "unet").glob("*.safetensors"))) > 1
    model = opened.model(str(tmp_path / "many"), "diffusion")
    assert model.fingerprint == fingerprint(layouts.saved("sd1")) == slow_fingerprint(tmp_path / "many")


@pytest.mark.parametrize("part", [UNET, TEXT, "vae/diffusion_pytorch_model.safetensors"])
def test_fingerprint_changes_with_one_weight(folder: Path, part: str) -> None:
    before = fingerprint(folder)
    name = next(iter(load_file(folder / part)))

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] += 1e-3
        return tensor

    layouts.edit_weights(folder / part, name, change)
    assert fingerprint(folder) == slow_fingerprint(folder) != before


def test_fingerprint_is_not_touched_by_a_cast(folder: Path, tmp_path: Path) -> None:
    half = Session(runs=tmp_path / "runs", device="cpu", dtype="bfloat16", threads=1)
    model = half.model(str(folder), "diffusion")
    assert model.unet.dtype == torch.bfloat16 and model.fingerprint == fingerprint(folder)
    half.close()


def test_half_precision_files_beside_the_full_ones_are_left_alone(opened: Session, folder: Path) -> None:
    before = fingerprint(folder)
    halves = {n: t.half() for n, t in load_file(folder / UNET).items()}
    for name in ("diffusion_pytorch_model.fp16", "diffusion_pytorch_model.fp16-00001-of-00001"):
        save_file(halves, folder / "unet" / f"{name}.safetensors", metadata={"format": "pt"})
    save_file({"x": torch.zeros(1)}, folder / "unet" / "adapter.safetensors")
    assert fingerprint(folder) == before
    model = opened.model(str(folder), "diffusion")
    assert torch.equal(model.unet.conv_in.weight, load_file(folder / UNET)["conv_in.weight"])


# ---- names and the hub ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("atlas-sdd", "did you mean 'atlas-sd'"),
        ("no such thing", "no name of `locus models`"),
        ("", "--model is empty"),
        ("   ", "--model is empty"),
        ("/no/such/folder", "no folder"),
        ("a/b/c", "no hub id"),
        ("../x", "no folder"),
        ("~nobody-of-that-name/x", "no folder"),
        ("x" * 5000, "no folder"),
        ("nul\0byte", "no folder"),
        ("bad name/with spaces", "no valid hub id"),
        ("someone/not-cached-here", "the hub can't be reached"),
        ("stable-diffusion-1.5", "the hub can't be reached"),
    ],
)
def test_names_that_mean_nothing(opened: Session, name: str, says: str) -> None:
    assert says in layouts.sentence(opened, name, RequestError)


def answer(status: int) -> Any:
    """What the hub answers."""
    return http.Response(status, request=http.Request("GET", "https://hub.invalid/x/y"))


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (hub.GatedRepoError("gated", response=answer(403)), StudioError, "accept its licence"),
        (hub.RepositoryNotFoundError("gone", response=answer(404)), StudioError, "no model 'x/y'"),
        (OSError(28, "No space left on device"), StudioError, "disk is full"),
        (hub.LocalEntryNotFoundError("no"), RequestError, "can't be reached"),
        (hub.OfflineModeIsEnabled("no"), RequestError, "can't be reached"),
        (ConnectionError("reset by peer"), RequestError, "can't be reached"),
        (http.ConnectError("no route"), StudioError, "try again"),
        (hub.RevisionResolutionError("offline"), StudioError, "try again"),
        (hub.HfHubHTTPError("teapot", response=answer(500)), StudioError, "try again"),
        (OSError("Consistency check failed: 3 of 9 bytes"), StudioError, "try again"),
        (http.ReadError("broke off"), StudioError, "try again"),
        (http.RemoteProtocolError("incomplete body"), StudioError, "try again"),
        (hub.XetDownloadError("chunk lost"), StudioError, "try again"),
        (RuntimeError("Data processing error: CAS service error"), StudioError, "try again"),
    ],
)
def test_downloads_that_fail(
    opened: Session, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type, says: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert says in (text := layouts.sentence(opened, "x/y", kind)) and "x/y" in text


def test_an_interrupt_of_a_download_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stop)
    with pytest.raises(KeyboardInterrupt):
        locate("x/y")


def test_a_disk_too_small_is_said_before_the_download(
    opened: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**9})())
    assert "needs 4.3 GB on disk" in layouts.sentence(opened, "stable-diffusion-1.5")


def test_a_hub_model_keeps_its_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = layouts.copy("sd1", tmp_path / "snapshots" / "0123abc")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **o: asked.update(o) or str(snapshot)
    )
    source = locate("x/y")
    assert (source.revision, source.family) == ("0123abc", "sd1")
    assert not any(".bin" in p or p in ("*", "*.py") for p in asked["allow_patterns"])
