"""Models that a stranger made: no pickle of theirs is opened, no code of theirs runs, nobody is called, and
what is loaded is what the fingerprint covers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from studio.edit_files import read_edit
from studio.errors import RequestError
from studio.models.catalog import ASSETS
from studio.models.foreign import read_json
from studio.models.loading import component_files, locate, weight_files
from studio.session import Session
from tests import checkpoints, language_families, layouts
from tests import vision_families as families

LLAMA = ASSETS / "atlas" / "atlas-llama"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WATCH: dict[str, Any] = {"under": None, "seen": []}


def _watch(event: str, given: tuple) -> None:
    """An audit hook of Python's: notes pickles that are opened or read, and refuses every connection."""
    if WATCH["under"] is None:
        return
    if event == "open" and str(given[0]).startswith(WATCH["under"]):
        if str(given[0]).endswith(PICKLES):
            WATCH["seen"].append(f"opened {given[0]}")
    elif event == "pickle.find_class":
        WATCH["seen"].append(f"read a pickle with {given}")
    elif event in ("socket.connect", "socket.getaddrinfo"):
        WATCH["seen"].append(f"called {given}")
        raise RuntimeError("a connection was tried")


sys.addaudithook(_watch)


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was opened or called that must not be; the hub may be asked, if a library wants to."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    WATCH.update(under=str(tmp_path), seen=[])
    yield WATCH["seen"]
    WATCH.update(under=None)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Session]:
    """A session with nothing loaded."""
    session = Session(runs=tmp_path / "runs", device="cpu", threads=1)
    yield session
    session.close()


class Bomb:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.target,)


# ---- poisoned pickles beside safetensors ------------------------------------------------------------------


def open_clip_under(name: str) -> Callable[[Path], Path]:
    """Makes atlas-clip with its weights under another name."""

    def made(to: Path) -> Path:
        shutil.copytree(families.ATLAS_CLIP, to)
        (to / "open_clip_model.safetensors").rename(to / name)
        return to

    return made


def copied(source: Callable[[], Path]) -> Callable[[Path], Path]:
    """Makes a copy of a folder."""
    return lambda to: Path(shutil.copytree(source(), to))


def checkpoint(to: Path) -> Path:
    """Makes a checkpoint in one file whose configuration names a part for which there is a pickle alone."""
    to.mkdir()
    file = checkpoints.save("sd1", to)
    (to / "tiny" / "image_encoder").mkdir()
    clip = ["transformers", "CLIPVisionModelWithProjection"]
    layouts.edit_json(to / "tiny" / "model_index.json", image_encoder=clip, safety_checker=clip)
    return file


def pipeline(to: Path) -> Path:
    """Makes a pipeline with parts that Locus does not use, which are pickles alone."""
    layouts.copy("sd1", to)
    for part in ("image_encoder", "safety_checker"):
        (to / part).mkdir()
        named = {part: ["transformers", "CLIPVisionModelWithProjection"]}
        layouts.edit_json(to / "model_index.json", **named)
    return to


def sharded(to: Path) -> Path:
    """Makes a language model in pieces."""
    language_families.build("llama").save_pretrained(to, max_shard_size="40KB")
    language_families.tokenizer(True).save_pretrained(to)
    assert (to / "model.safetensors.index.json").exists()
    return to


FOLDERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "open_clip": ("clip", open_clip_under("open_clip_model.safetensors")),
    "open_clip, second name": ("clip", open_clip_under("open_clip_pytorch_model.safetensors")),
    "open_clip, last name": ("clip", open_clip_under("model.safetensors")),
    "open_clip, name of one's own": ("clip", open_clip_under("mine.safetensors")),
    "open_clip tower": ("vision", open_clip_under("model.safetensors")),
    "open_clip with a timm tower": ("vision", copied(lambda: families.saved("openclip-trunk"))),
    "timm": ("vision", copied(lambda: families.saved("vit-class"))),
    "transformers ViT": ("vision", copied(lambda: families.saved("hf-vit"))),
    "transformers CLIP tower": ("vision", copied(lambda: families.saved("hf-clip-projection"))),
    "transformers CLIP": ("clip", layouts.save_clip),
    "language": ("language", copied(lambda: LLAMA)),
    "language in pieces": ("language", sharded),
    "diffusers 1": ("diffusion", pipeline),
    "diffusers XL": ("diffusion", lambda to: layouts.copy("sdxl", to)),
    "one file": ("diffusion", checkpoint),
}
NAMES = (
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "adapter_model.bin",
    "model.ckpt",
    "model.pth",
    "model.pt",
    "vocab.pkl",
    "tiny.ckpt",
)


def poison(folder: Path, target: Path) -> None:
    """Puts a poisoned pickle under every name into every folder; opening one would show."""
    content = pickle.dumps(Bomb(target))
    pickle.loads(content)
    target.rmdir()
    for place in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        for name in NAMES:
            (place / name).write_bytes(content)
        index = json.dumps({"weight_map": {"x": "pytorch_model.bin"}})
        (place / "pytorch_model.bin.index.json").write_text(index)
        (place / "a.safetensors.index.json").write_text(index)


@pytest.mark.parametrize("what", FOLDERS)
def test_a_pickle_beside_safetensors_is_never_opened(
    opened: Session, tmp_path: Path, seen: list[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    kind, make = FOLDERS[what]
    place = make(tmp_path / "model")
    poison(tmp_path / "model", tmp_path / "sprung")
    seen.clear()
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a pickle was to be read"))
    assert opened.model(str(place), kind).fingerprint == locate(str(place)).fingerprint
    assert seen == [] and not (tmp_path / "sprung").exists()


def test_a_pickle_beside_a_lora_is_never_opened(tmp_path: Path, seen: list[str]) -> None:
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    weights = {f"{stem}.lora_A.weight": torch.ones(2, 3), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    save_file(weights, tmp_path / "tiny.safetensors")
    poison(tmp_path, tmp_path / "sprung")
    seen.clear()
    assert read_edit(tmp_path / "tiny.safetensors").method == "lora"
    assert seen == [] and not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("lost", "change", "says"),
    [
        ("text_model.embeddings", {}, "the file lacks its text encoder"),
        ("nothing", {"vae": ["diffusers", "AutoencoderTiny"]}, "the file's autoencoder is no"),
    ],
)
def test_what_a_file_lacks_is_not_taken_from_a_pickle_beside_it(
    opened: Session, tmp_path: Path, seen: list[str], lost: str, change: dict[str, Any], says: str
) -> None:
    file = checkpoint(tmp_path / "model")
    save_file({n: t for n, t in load_file(file).items() if lost not in n}, file)
    layouts.edit_json(tmp_path / "model" / "tiny" / "model_index.json", **change)
    poison(tmp_path / "model", tmp_path / "sprung")
    seen.clear()
    assert says in layouts.sentence(opened, file)
    assert seen == [] and not (tmp_path / "sprung").exists()


CONFIGS = {
    "a language model": ("config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
    "a CLIP": ("config.json", {"model_type": "clip"}),
    "a vision transformer": ("config.json", {"architecture": "vit_tiny_patch16_224"}),
    "a CLIP of open_clip": ("open_clip_config.json", {"model_cfg": {}}),
}


@pytest.mark.parametrize("name", ("pytorch_model.bin", "model.ckpt", "weights.pt", "weights.pth"))
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pickle_alone_is_refused_by_name(
    opened: Session, tmp_path: Path, seen: list[str], kind: str, name: str
) -> None:
    file, content = CONFIGS[kind]
    folder, target = tmp_path / "model", tmp_path / "sprung"
    folder.mkdir()
    (folder / file).write_text(json.dumps(content))
    (folder / name).write_bytes(pickle.dumps(Bomb(target)))
    seen.clear()
    source = locate(str(folder))
    with pytest.raises(RequestError, match=f"{name} in .* is a pickle, which can run foreign code"):
        weight_files(source.path)
    with pytest.raises(RequestError, match=f"{name} in .* is a pickle, which can run foreign code"):
        opened.model(str(folder), source.kind)
    assert seen == [] and not target.exists()


# ---- the files that are loaded are those of the fingerprint -----------------------------------------------


@pytest.mark.parametrize(
    ("folder", "names", "wanted"),
    [
        ("clip", "open_clip_model model open_clip_pytorch_model", "open_clip_model"),
        ("clip", "model open_clip_pytorch_model pytorch_model", "open_clip_pytorch_model"),
        ("clip", "other model", "model"),
        ("unet", "model diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model.fp16 diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("text_encoder", "diffusion_pytorch_model model", "model"),
        ("text_encoder", "model.fp16", "model.fp16"),
    ],
)
def test_the_file_that_the_library_reads_is_the_one(
    tmp_path: Path, folder: str, names: str, wanted: str
) -> None:
    place = tmp_path / folder
    place.mkdir()
    if folder == "clip":
        (place / "open_clip_config.json").write_text("{}")
    for name in names.split():
        (place / f"{name}.safetensors").touch()
    assert component_files(place) == [place / f"{wanted}.safetensors"]


def test_both_layouts_of_one_clip(opened: Session, tmp_path: Path) -> None:
    """As on the hub: the same CLIP for open_clip and for transformers, whose tensors have other names."""
    folder = open_clip_under("open_clip_model.safetensors")(tmp_path / "clip")
    own = locate(str(folder)).fingerprint
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    model = opened.model(str(folder), "clip")
    stored = load_file(folder / "open_clip_model.safetensors")
    assert model.fingerprint == own == locate("atlas-clip").fingerprint
    assert all(torch.equal(v.float(), stored[k].float()) for k, v in model.net.state_dict().items())


@pytest.mark.parametrize("lost", ["text_projection", "visual.conv1.weight"])
def test_a_clip_of_open_clip_is_whole_or_refused(opened: Session, tmp_path: Path, lost: str) -> None:
    folder = open_clip_under("model.safetensors")(tmp_path / "clip")
    layouts.edit_weights(folder / "model.safetensors", lost, lambda _: None)
    says = layouts.sentence(opened, folder, kind="clip")
    assert "do not fit one another" in says and "Missing key" in says


def test_two_files_of_unknown_names(opened: Session, tmp_path: Path) -> None:
    folder = open_clip_under("mine.safetensors")(tmp_path / "clip")
    shutil.copy(folder / "mine.safetensors", folder / "yours.safetensors")
    says = layouts.sentence(opened, folder, kind="clip")
    assert "mine.safetensors and yours.safetensors both hold weights" in says


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model.safetensors", "/x/model.safetensors", ""])
def test_an_index_names_safetensors_of_its_folder(
    opened: Session, tmp_path: Path, seen: list[str], name: str
) -> None:
    folder = sharded(tmp_path / "model")
    layouts.edit_json(folder / "model.safetensors.index.json", weight_map={"x": name})
    says = layouts.sentence(opened, folder, RequestError, kind="language")
    assert "names files that are no safetensors of its folder" in says and seen == []


def test_warnings_of_a_network_without_weights_are_not_shown(
    opened: Session, caplog: pytest.LogCaptureFixture
) -> None:
    opened.model("atlas-clip", "clip")
    assert "No pretrained weights" not in caplog.text


# ---- folders that ask for more than they hold -------------------------------------------------------------


def changed(file: str, at: str, key: str, value: Any) -> Callable[[Path], None]:
    """Sets one entry of a JSON file; `at`: the objects on the way to it."""

    def change(folder: Path) -> None:
        content = read_json(folder / file) if (folder / file).exists() else {}
        place = content
        for step in at.split():
            place = place.setdefault(step, {})
        place[key] = value
        (folder / file).write_text(json.dumps(content))

    return change


OPEN_CLIP, CONFIG = "open_clip_config.json", "config.json"
TEXT, IMAGE = "model_cfg text_cfg", "model_cfg vision_cfg"
KERNEL = "kernels-community/flash-attn"
ASKING: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "text tower": ("open_clip", changed(OPEN_CLIP, TEXT, "hf_model_name", "x/y"), "the text tower 'x/y'"),
    "image tower": (
        "open_clip",
        changed(OPEN_CLIP, IMAGE, "timm_model_name", "hf-hub:x/y"),
        "the image tower 'hf-hub:x/y'",
    ),
    "image tower elsewhere": (
        "open_clip",
        changed(OPEN_CLIP, IMAGE, "timm_model_name", "local-dir:/x"),
        "the image tower 'local-dir:/x'",
    ),
    "image tower of no name": (
        "open_clip",
        changed(OPEN_CLIP, IMAGE, "timm_model_name", ["x"]),
        "the image tower",
    ),
    "tokenizer that may run code": (
        "open_clip",
        changed(OPEN_CLIP, TEXT, "tokenizer_kwargs", {"clean": "lower", "trust_remote_code": True}),
        "a tokenizer with the option 'trust_remote_code'",
    ),
    "tokenizer of other files": (
        "open_clip",
        changed(OPEN_CLIP, TEXT, "tokenizer_kwargs", {"bpe_path": "/etc/x.gz"}),
        "a tokenizer with the option 'bpe_path'",
    ),
    "tokenizer of odd options": (
        "open_clip",
        changed(OPEN_CLIP, TEXT, "tokenizer_kwargs", 3),
        "a tokenizer with the option",
    ),
    "weights by name": (
        "language",
        changed(CONFIG, "", "transformers_weights", "adapter_model.bin"),
        "weights of its own choice (transformers_weights: 'adapter_model.bin')",
    ),
    "weights of a tower by name": (
        "transformers CLIP",
        changed(CONFIG, "text_config", "transformers_weights", "x.safetensors"),
        "weights of its own choice",
    ),
    "weights of a text encoder by name": (
        "diffusers 1",
        changed("text_encoder/config.json", "", "transformers_weights", "adapter_model.bin"),
        "weights of its own choice",
    ),
    "kernel": (
        "language",
        changed(CONFIG, "", "_attn_implementation", KERNEL),
        "a kernel of the hub (_attn_implementation",
    ),
    "kernel of a tower": (
        "transformers CLIP",
        changed(CONFIG, "", "attn_implementation", {"vision_config": KERNEL}),
        "a kernel of the hub",
    ),
    "kernel of a ViT": (
        "transformers ViT",
        changed(CONFIG, "", "_attn_implementation_internal", KERNEL),
        "a kernel of the hub",
    ),
    "adapter": (
        "language",
        changed("adapter_config.json", "", "base_model_name_or_path", "x/y"),
        "holds an adapter beside a model",
    ),
    "adapter of a text encoder": (
        "diffusers 1",
        changed("text_encoder/adapter_config.json", "", "base_model_name_or_path", "x/y"),
        "holds an adapter beside a model",
    ),
    "processor as tokenizer": (
        "diffusers 1",
        changed("model_index.json", "", "tokenizer", ["transformers", "CLIPProcessor"]),
        "a tokenizer that is 'transformers CLIPProcessor'",
    ),
    "class of any library": (
        "diffusers 1",
        changed("model_index.json", "", "scheduler", ["antigravity", "DDIMScheduler"]),
        "a scheduler that is 'antigravity DDIMScheduler'",
    ),
    "part that is no pair": ("diffusers 1", changed("model_index.json", "", "vae", "x"), "a vae that is 'x'"),
    "class beside a checkpoint": (
        "one file",
        changed("tiny/model_index.json", "", "text_encoder", ["transformers", "BertModel"]),
        "a text_encoder that is 'transformers BertModel'",
    ),
}


@pytest.mark.parametrize("what", ASKING)
def test_a_folder_that_asks_for_more_than_it_holds(
    opened: Session, tmp_path: Path, seen: list[str], what: str
) -> None:
    model, change, says = ASKING[what]
    kind, make = FOLDERS[model]
    place = make(tmp_path / "model")
    change(tmp_path / "model")
    told = layouts.sentence(opened, place, RequestError, kind=kind)
    assert says in told and seen == []


@pytest.mark.parametrize(
    ("model", "file", "change"),
    [
        ("timm", CONFIG, {"architecture": "hf-hub:x/y"}),
        ("timm", CONFIG, {"model_args": {"pretrained": True}}),
        ("timm", CONFIG, {"model_args": {"checkpoint_path": "model.pth"}}),
        ("open_clip", OPEN_CLIP, {"model_cfg": {"text_cfg": "x", "vision_cfg": 3}}),
    ],
)
def test_what_the_library_itself_refuses(
    opened: Session, tmp_path: Path, seen: list[str], model: str, file: str, change: dict[str, Any]
) -> None:
    kind, make = FOLDERS[model]
    layouts.edit_json(make(tmp_path / "model") / file, **change)
    assert "do not fit one another" in layouts.sentence(opened, tmp_path / "model", kind=kind)
    assert seen == []


def test_a_processor_does_not_bring_an_audio_model_of_the_hub(
    opened: Session, tmp_path: Path, seen: list[str]
) -> None:
    """transformers' processors would load it by the name in their file."""
    folder = layouts.save_clip(tmp_path / "clip")
    audio = {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "x/y"}
    layouts.edit_json(folder / "processor_config.json", audio_tokenizer=audio)
    with pytest.raises(Exception, match="a connection was tried"):
        transformers.AutoProcessor.from_pretrained(folder)
    seen.clear()
    assert opened.model(str(folder), "clip").text_features(["a star"]).shape == (1, 24)
    assert seen == []


# ---- code -------------------------------------------------------------------------------------------------

AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoImageProcessor")
CODED = {
    "language": (FOLDERS["language"], "of a family that Locus has no table for"),
    "transformers CLIP": (FOLDERS["transformers CLIP"], "and a CLIP is needed here"),
    "transformers ViT": (FOLDERS["transformers ViT"], "and a vision transformer is needed here"),
    "transformers CLIP tower": (
        FOLDERS["transformers CLIP tower"],
        "and a vision transformer is needed here",
    ),
    "open_clip": (FOLDERS["open_clip"], ""),
}


def with_code(make: Callable[[Path], Path], folder: Path) -> Path:
    """A folder all of whose configurations name classes of its own; importing them makes a folder."""
    make(folder)
    for file in sorted(folder.glob("*config.json")):
        both = {name: ["evil.Evil", "evil.Evil"] if name == "AutoTokenizer" else "evil.Evil" for name in AUTO}
        layouts.edit_json(file, auto_map=both)
    (folder / "evil.py").write_text(
        f"import os\nos.mkdir({str(folder.parent / 'sprung')!r})\nclass Evil: pass\n"
    )
    return folder


@pytest.mark.parametrize("what", CODED)
def test_code_of_a_model_never_runs(opened: Session, tmp_path: Path, seen: list[str], what: str) -> None:
    """Of a class that transformers has, the model is loaded without the folder's code; else it is refused."""
    (kind, make), says = CODED[what]
    folder = with_code(make, tmp_path / "model")
    assert opened.model(str(folder), kind).source.path == folder
    assert opened.unload(str(folder))
    if says:
        layouts.edit_json(folder / CONFIG, model_type="evil")
        told = layouts.sentence(opened, folder, RequestError, kind=kind)
        assert told.startswith(f"{folder} is a evil model, {says}")
    assert seen == [] and not (tmp_path / "sprung").exists()


def test_that_code_would_run_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary of the test above is alive."""
    folder = with_code(layouts.save_clip, tmp_path / "model")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(Exception, match="Evil|model_type|from_pretrained"):
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "sprung").exists()


def test_broken_json_of_a_folder_is_a_sentence(tmp_path: Path) -> None:
    for content in (b"{", b"[" * 10**5, b"\xff"):
        (tmp_path / "open_clip_config.json").write_bytes(content)
        with pytest.raises(RequestError, match="can't be read as JSON"):
            locate(str(tmp_path))
