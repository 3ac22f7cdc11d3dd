"""locus decompose: arrays as promised, every kind of request, aligners, and bad input in a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import save_file
from timm.models import save_for_hf

from studio import Recipe
from studio.cli import main
from studio.errors import RequestError, StudioError
from studio.figures import to_bytes
from studio.methods import vit_decomposition
from studio.methods.vit_decomposition import draw, layer_table
from studio.models import aligner as aligners
from studio.models.aligner import read_aligner
from studio.models.decomposition import Decomposition, head_matrix
from studio.models.vision import ClipModel
from studio.models.vit_layouts import NotDecomposable
from tests import vision_families as families

TEXTS = ("a red star", "a blue circle")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Small matrices gain nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of different sizes."""
    root = tmp_path_factory.mktemp("images")
    for i, size in enumerate(((64, 64), (50, 70), (90, 40))):
        noise = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{i}.png")
    return root


def run(session: Any, folder: Path, model: str = "atlas-clip", **given: Any) -> Any:
    """A finished run, not from the store."""
    images = given.pop("images", (str(folder),))
    inputs = {"images": images, **({"texts": given.pop("texts")} if "texts" in given else {})}
    recipe = Recipe("decompose", str(model), inputs, given, ())
    return session.run(recipe, save=False, fresh=True)


def sentence(session: Any, folder: Path, error: type = RequestError, **given: Any) -> str:
    """What a person reads when this is asked for."""
    with pytest.raises(error) as caught:
        run(session, folder, **given)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


def test_arrays_labels_and_sums(session: Any, folder: Path) -> None:
    result = run(session, folder, texts=TEXTS).result
    z, parts, scores = (result.arrays[n] for n in ("representation", "contributions", "scores"))
    assert [a.name for a in parts.axes] == ["image", "component", "dim"]
    assert z.axis("image").labels == ("0.png", "1.png", "2.png")
    names = parts.axis("component").labels
    heads = tuple(f"block.0.head.{h}" for h in range(5))
    assert names[:8] == ("embedding", *heads, "block.0.bias", "block.0.mlp")
    assert len(names) == 1 + 6 * 7 + 1 and names[-1] == "norm.bias" and len(set(names)) == len(names)
    error = np.linalg.norm(parts.values.sum(1) - z.values, axis=1) / np.linalg.norm(z.values, axis=1)
    assert error.max() <= 2e-6 and result.values["sum_error"] <= 2e-6
    assert result.values["way"] == "closed form" and "token_way" not in result.values
    clip = session.model("atlas-clip", "clip")
    texts = clip.text_features(list(TEXTS))
    norm = np.linalg.norm(z.values, axis=1)
    wanted = parts.values @ texts.T / norm[:, None, None]
    np.testing.assert_allclose(scores.values, wanted, atol=1e-6)
    images = np.stack([np.asarray(Image.open(folder / f"{i}.png").resize((64, 64))) for i in range(1)])
    cosine = clip.image_features(images) @ texts.T  # the first has the model's own size
    np.testing.assert_allclose(scores.values.sum(1)[:1], cosine, atol=2e-6)
    assert all(t.values.dtype == np.float32 for t in result.arrays.values())


def test_layers_are_sums_of_heads(session: Any, folder: Path) -> None:
    fine, coarse = (run(session, folder, texts=TEXTS, granularity=g).result.arrays for g in ("head", "layer"))
    names = coarse["contributions"].axis("component").labels
    assert names[:4] == ("embedding", "block.0.attention", "block.0.bias", "block.0.mlp") and len(names) == 20
    labels = fine["contributions"].axis("component").labels
    third = [i for i, n in enumerate(labels) if n.startswith("block.3.head.")]
    found = coarse["contributions"].at("component", "block.3.attention").values
    np.testing.assert_allclose(found, fine["contributions"].values[:, third].sum(1), atol=1e-6)
    np.testing.assert_allclose(coarse["scores"].values.sum(1), fine["scores"].values.sum(1), atol=1e-6)


def test_tokens_sum_to_the_heads(session: Any, folder: Path) -> None:
    result = run(session, folder, texts=TEXTS, granularity="token").result
    tokens, scores = result.arrays["token_scores"], result.arrays["scores"]
    names = tokens.axis("token").labels
    assert names[:3] == ("class", "patch.0.0", "patch.0.1") and names[-1] == "patch.7.7" and len(names) == 65
    heads = [i for i, n in enumerate(scores.axis("component").labels) if ".head." in n]
    np.testing.assert_allclose(tokens.values.sum(1), scores.values[:, heads].sum(1), atol=1e-6)
    assert result.values["token_way"] == "closed form"
    one = run(session, folder, texts=TEXTS, granularity="token", heads=["block.5.head.1"]).result
    wanted = scores.at("component", "block.5.head.1").values
    np.testing.assert_allclose(one.arrays["token_scores"].values.sum(1), wanted, atol=1e-6)


def test_an_image_without_texts(session: Any, folder: Path) -> None:
    done = run(session, folder, images=(str(folder / "1.png"),))
    assert set(done.result.arrays) == {"representation", "contributions"}
    figure = draw(done)
    shares = np.asarray(figure.data["values"])
    assert abs(np.nansum(shares) - 1) < 1e-5 and "without texts, 1 image" in figure.title
    assert to_bytes(figure, "svg").startswith(b"<?xml")


def test_the_figure_shows_layers_and_heads(session: Any, folder: Path) -> None:
    done = run(session, folder, texts=TEXTS)
    figure = draw(done)
    assert figure.data["rows"] == ["embedding", *(f"block.{i}" for i in range(6)), "norm.bias"]
    assert figure.data["cols"] == [*(f"head.{h}" for h in range(5)), "bias", "mlp", "all"]
    wanted = done.result.arrays["scores"].at("text", TEXTS[0]).over("image")
    assert figure.data["values"][4][2] == wanted.at("component", "block.3.head.2").values
    assert np.isnan(figure.data["values"][0][0]) and "closed form" in figure.caption
    rows, cols, values = layer_table(["conv.0", "block.10.mlp"], np.array([1.0, 2.0]))
    assert (rows, cols) == (["conv.0", "block.10"], ["mlp", "all"]) and values[1, 0] == 2


@pytest.mark.parametrize(
    ("name", "tokens", "last"),
    [("dinov2-registers", 1 + 4 + 16, "patch.3.3"), ("vit-wide", 1 + 24, "patch.3.5")],
)
def test_grids_registers_and_prefixes(
    session: Any, folder: Path, tmp_path: Path, name: str, tokens: int, last: str
) -> None:
    file = identity(tmp_path, session, name)
    given = {"texts": TEXTS, "clip": "atlas-clip", "aligner": file, "granularity": "token"}
    found = run(session, folder, families.saved(name), **given).result.arrays["token_scores"]
    labels = found.axis("token").labels
    assert len(labels) == tokens and labels[0] == "class" and labels[-1] == last
    assert ("register.0" in labels) == ("registers" in name)


# ---- aligners ---------------------------------------------------------------------------------------------


def identity(to: Path, session: Any, name: str, **changes: Any) -> str:
    """A random aligner of a model to atlas-clip, for heads from their outputs where the path allows it."""
    model, clip = session.model(str(families.saved(name)), "vision"), session.model("atlas-clip", "clip")
    whole = Decomposition(model.layout, model.device)
    draw_ = np.random.default_rng(0)
    inputs = changes.pop(
        "inputs", "outputs" if len(whole.maps[0]) == 1 and len(whole.maps) == 1 else "vectors"
    )
    tensors = {
        label: draw_.standard_normal((size, 128)).astype(np.float32)
        for label, size in aligners._inputs(whole, inputs).items()
        if label not in ("embedding", "block.0.mlp")
    }
    tensors |= {"rest": draw_.standard_normal((whole.maps[0].shape[-1], 128)).astype(np.float32)}
    tensors |= {"aligner.bias": draw_.standard_normal(128).astype(np.float32)}
    note = aligners.note(model.fingerprint, clip.fingerprint, inputs, {"lambda": 1.0})
    note |= changes.pop("note", {})
    file = to / "aligner.safetensors"
    save_file({**tensors, **changes}, file, metadata=note)
    return str(file)


@pytest.mark.parametrize(
    ("name", "inputs"), [("vit-class", "outputs"), ("vit-class", "vectors"), ("swin", "vectors")]
)
def test_an_aligner_maps_every_component(
    session: Any, folder: Path, tmp_path: Path, name: str, inputs: str
) -> None:
    file = identity(tmp_path, session, name, inputs=inputs)
    given = {"clip": "atlas-clip", "aligner": file, "texts": TEXTS}
    raw = run(session, folder, families.saved(name)).result.arrays["contributions"]
    done = run(session, folder, families.saved(name), **given).result
    z, parts = done.arrays["representation"].values, done.arrays["contributions"]
    assert z.shape == (3, 128) and parts.axis("component").labels[-1] == "aligner.bias"
    np.testing.assert_allclose(parts.values.sum(1), z, rtol=1e-5, atol=1e-5 * np.abs(z).max())
    maps = read_aligner(file, torch.device("cpu"))
    for label in ("embedding", "block.1.mlp", "norm.bias"):
        matrix = maps.matrices.get(label, maps.matrices["rest"]).numpy()
        wanted = raw.at("component", label).values @ matrix
        np.testing.assert_allclose(parts.at("component", label).values, wanted, rtol=1e-4, atol=1e-4)
    if inputs == "vectors":
        wanted = raw.at("component", "block.1.head.1").values @ maps.matrices["block.1.head.1"].numpy()
        found = parts.at("component", "block.1.head.1").values
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    heads = ["block.1.head.1", "block.2.head.0"]
    tokens = run(session, folder, families.saved(name), granularity="token", heads=heads, **given).result
    total = sum(done.arrays["scores"].at("component", h).values for h in heads)
    np.testing.assert_allclose(tokens.arrays["token_scores"].values.sum(1), total, atol=2e-6)
    assert tokens.values["token_way"] == ("adjoint" if name == "swin" else "closed form")


def test_head_outputs_through_a_matrix_are_the_head(session: Any) -> None:
    """The matrix that W_O and the path make of a head's outputs gives its vector again."""
    model = families.model("hf-vit")
    whole = Decomposition(model.layout, model.device)
    parts = whole.run(families.noise("hf-vit"))
    part = model.layout.attentions[1]
    again = parts.outputs["block.1.head.3"] @ head_matrix(part)[3] @ whole.maps[0][0]
    torch.testing.assert_close(again, parts.components["block.1.head.3"], rtol=1e-5, atol=1e-6)


def test_aligners_of_other_models_are_refused(session: Any, folder: Path, tmp_path: Path) -> None:
    file = identity(tmp_path, session, "vit-class")
    ask = {"clip": "atlas-clip", "aligner": file}
    assert "made for another model" in sentence(session, folder, model=families.saved("vit-rms"), **ask)
    mine = {"model": families.saved("vit-class"), **ask}
    other = {**mine, "clip": str(families.saved("openclip"))}
    assert "made for another CLIP" in sentence(session, folder, **other)
    identity(tmp_path, session, "vit-class", **{"block.0.bias": np.zeros((47, 128), np.float32)})
    assert "no matrix that fits the component block.0.bias" in sentence(session, folder, **mine)


@pytest.mark.parametrize("wrong", ["text", "cut", "kind", "bias", "nan", "json", "shape"])
def test_files_that_are_no_aligners(tmp_path: Path, session: Any, wrong: str) -> None:
    file = Path(identity(tmp_path, session, "vit-class"))
    if wrong == "text":
        file.write_text("no tensors")
    elif wrong == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        changes: dict[str, Any] = {
            "kind": {"note": {"locus.kind": "edit"}},
            "bias": {"aligner.bias": np.zeros((2, 2), np.float32)},
            "nan": {"rest": np.full((48, 128), np.nan, np.float32)},
            "json": {"note": {"locus.params": "{"}},
            "shape": {"rest": np.zeros((48, 127), np.float32)},
        }[wrong]
        identity(tmp_path, session, "vit-class", **changes)
    with pytest.raises(RequestError, match="is no aligner of Locus"):
        read_aligner(file, torch.device("cpu"))


def test_a_missing_aligner(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no file"):
        read_aligner(tmp_path / "none", torch.device("cpu"))
    with pytest.raises(ValueError, match="head_inputs"):
        aligners.note("", "", "other", {})


# ---- requests ---------------------------------------------------------------------------------------------

VIT = families.saved("vit-class")
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "texts without a space": ({"model": VIT, "texts": TEXTS}, "has no texts of its own"),
    "a CLIP without an aligner": ({"model": VIT, "clip": "atlas-clip"}, "do not share a space"),
    "an aligner without a CLIP": ({"model": VIT, "aligner": __file__}, "say which with --clip"),
    "no aligner there": ({"clip": "atlas-clip", "aligner": "/nothing"}, "there is no file '/nothing'"),
    "tokens without texts": ({"granularity": "token"}, "give --texts"),
    "heads without tokens": ({"heads": ["block.0.head.0"]}, "take --granularity token"),
    "no head": ({"heads": ["block.0"], "granularity": "token"}, "'block.0' is no head"),
    "no such head": (
        {"heads": ["block.9.head.0"], "granularity": "token", "texts": TEXTS},
        "atlas-clip has no head block.9.head.0",
    ),
    "no images": ({"images": ("/nothing.png",)}, "no file or folder '/nothing.png'"),
    "an empty text": ({"texts": [""]}, "--texts: one of the texts is empty"),
    "a blank text": ({"texts": [*TEXTS, " \t"]}, "--texts: one of the texts is empty"),
    "a granularity": ({"granularity": "neuron"}, "--granularity must be one of layer, head, token"),
    "a diffusion model": ({"model": "atlas-sd"}, "a vision transformer is needed here"),
    "a clip that is none": ({"clip": str(VIT)}, "a CLIP is needed here"),
}


@pytest.mark.parametrize(("given", "reason"), WRONG.values(), ids=WRONG.keys())
def test_wrong_requests(session: Any, folder: Path, given: dict[str, Any], reason: str) -> None:
    assert reason in sentence(session, folder, **given)


def test_heads_that_are_mixed_have_no_tokens(session: Any, folder: Path, tmp_path: Path) -> None:
    name = "vit-scale-norm"
    given = {"clip": "atlas-clip", "aligner": identity(tmp_path, session, name), "texts": TEXTS}
    said = sentence(session, folder, model=families.saved(name), granularity="token", **given)
    assert "normalises the outputs of all heads together" in said


def test_a_model_without_known_blocks(session: Any, folder: Path, tmp_path: Path) -> None:
    save_for_hf(timm.create_model("test_resnet"), tmp_path / "net", {}, safe_serialization=True)
    said = sentence(session, folder, NotDecomposable, model=tmp_path / "net")
    assert "can't be decomposed: its class ResNet is not one that Locus knows" in said
    assert NotDecomposable.code == 2


def test_too_many_backwards(session: Any, folder: Path, tmp_path: Path) -> None:
    given = {"clip": "atlas-clip", "aligner": identity(tmp_path, session, "swin"), "granularity": "token"}
    many = [f"text {i}" for i in range(90)]
    said = sentence(session, folder, model=families.saved("swin"), texts=many, **given)
    assert "need one backward a text and head" in said and "at most 256" in said


def test_a_broken_image_is_named(session: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes((folder / "0.png").read_bytes()[:500])
    said = sentence(session, folder, images=(str(folder), str(tmp_path / "cut.png")))
    assert "cut.png is broken or cut short" in said


def test_folders_with_other_files_and_animations_are_said(session: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    said = run(session, tmp_path).result.values["warnings"]
    assert said == [
        "1 file in the folders is no image; left out.",
        "a.gif is animated (2 frames); the first was taken.",
    ]


def test_several_files_that_are_no_images_are_counted(session: Any, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    warned = run(session, tmp_path).result.values["warnings"]
    assert warned == ["2 files in the folders are no images; left out."]


@pytest.mark.parametrize("size", [(1, 1), (3, 200)])
def test_odd_sizes(session: Any, tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    assert np.isfinite(run(session, tmp_path).result.arrays["contributions"].values).all()


def test_many_texts_are_encoded_as_one_is(session: Any) -> None:
    clip = session.model("atlas-clip", "clip")
    many = [f"a {c} {o}" for c in ("red", "blue", "green") for o in ("star", "house")] * 12
    np.testing.assert_allclose(clip.text_features(many)[:6], clip.text_features(many[:6]), atol=1e-6)
    assert len(clip.text_features(many)) == 72


def test_ten_thousand_texts(session: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [f"text {i}" for i in range(9_998)] + [*TEXTS, TEXTS[0]]
    real = session.model("atlas-clip", "vision").clip.text_features(list(TEXTS))
    rest = np.full((9_998, 128), 128**-0.5, np.float32)  # encoding them all takes half a minute
    features = {2: real, 10_000: np.concatenate([rest, real])}
    monkeypatch.setattr(ClipModel, "text_features", lambda self, texts: features[len(texts)])
    given = {"texts": many, "granularity": "token", "images": (str(folder / "0.png"),)}
    found = run(session, folder, **given).result.arrays
    assert found["scores"].values.shape == (1, 44, 10_000)  # the last is a text given twice
    few = run(session, folder, **{**given, "texts": TEXTS}).result.arrays
    for name in ("scores", "token_scores"):
        np.testing.assert_allclose(found[name].values[..., -2:], few[name].values, atol=2e-6)


def test_what_does_not_fit_is_refused(session: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vit_decomposition, "MOST_VALUES", 3 * 44 * 128 - 1)
    assert "numbers; take fewer images, or --granularity layer" in sentence(session, folder)
    assert run(session, folder, granularity="layer").result.arrays["contributions"].values.shape[1] == 20


def test_parts_that_do_not_sum_are_not_reported(
    session: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = type(session.model("atlas-clip", "vision").layout.path)
    monkeypatch.setattr(path, "constants", lambda self, seen, weights: {})
    assert "do not sum to its representation" in sentence(session, folder, StudioError)


def test_batches_do_not_matter(session: Any, folder: Path) -> None:
    before = session.batch
    try:
        session.batch = 2
        small = run(session, folder, texts=TEXTS, granularity="token").result
    finally:
        session.batch = before
    large = run(session, folder, texts=TEXTS, granularity="token").result
    for name, trace in large.arrays.items():
        np.testing.assert_allclose(small.arrays[name].values, trace.values, atol=1e-5)


def test_a_changed_image_is_a_new_run(session: Any, tmp_path: Path) -> None:
    def asked() -> Any:
        return session.run(Recipe("decompose", "atlas-clip", {"images": [str(tmp_path)]}, {}, ()))

    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    first = asked()
    assert asked().id == first.id
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    assert asked().id != first.id


# ---- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """Relative paths start at the images."""
    monkeypatch.chdir(folder)
    yield


def test_the_command(quiet: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "texts.txt").write_text("a red star\n\na blue circle\n")
    out = tmp_path / "run"
    words = ["--images", "0.png", "2.png", "--texts", str(tmp_path / "texts.txt"), "a house"]
    assert main(["decompose", *words, "--threads", "1", "--out", str(out)]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["recipe"]["inputs"]["texts"] == [*TEXTS, "a house"]
    assert all(Path(p).is_absolute() for p in record["recipe"]["inputs"]["images"])
    assert record["model"]["id"] == "atlas-clip" and record["result"]["values"]["sum_error"] <= 2e-6
    with np.load(out / "arrays.npz") as stored:
        assert stored["scores"].shape == (2, 44, 3)
    assert {"figure.svg", "figure.png", "figure.pdf"} <= {f.name for f in out.iterdir()}


def test_the_command_refuses(quiet: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    assert main(["decompose", "--images", "9.png", "--out", str(out)]) == 2
    assert main(["decompose", "--images", "0.png", "--granularity", "token", "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and all(s.startswith("locus: ") for s in said) and not out.exists()
