"""The Atlas image models: their layouts, what teaches them, the linear probe that measures them, the shipped
weights, and the set with a spurious correlation."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize

from studio.atlas import measure, train
from studio.atlas.groups import GroupOptions, group_scenes, main, write_groups
from studio.atlas.judge import load_judge, read_attributes
from studio.atlas.render import render
from studio.atlas.vision_models import (
    LABELS,
    RECIPES,
    WIDTHS,
    Painter,
    attribute_losses,
    cover,
    features,
    home_view,
    load_vision,
    make_net,
    pixels,
    save_vision,
    train_vision,
)
from studio.atlas.world import ATTRIBUTES, COLOURS, at_home, draw_scenes
from studio.errors import RequestError
from studio.models.catalog import ASSETS, CATALOG
from studio.models.loading import fingerprint, identify, locate, tensors_of

SHIPPED = [name for name in RECIPES if name in CATALOG]
REACHED = (
    "atlas-vit",
    "atlas-swin",
    "atlas-maxvit",
    "atlas-dino",
)  # objects and colours of 0.95 and more; the other cards tell their figures


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def judge() -> Any:
    return load_judge(ASSETS / "atlas" / "judge" / "model.safetensors")


# ---- layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_model_is_timms_local_directory(name: str, tmp_path: Path) -> None:
    import timm

    net = make_net(name).eval()
    for value in net.state_dict().values():  # what float16 holds comes back exactly
        value.copy_(value.half())
    save_vision(name, net, tmp_path)
    assert identify(tmp_path) == ("vision", "timm")
    config = json.loads((tmp_path / "config.json").read_text())
    data = config["pretrained_cfg"]
    assert data["input_size"] == [3, 64, 64] and data["mean"] == data["std"] == [0.5] * 3
    assert config["architecture"] == RECIPES[name].architecture and config["model_args"]
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    stored = {dtype for _, dtype, *_ in tensors_of(tmp_path / "model.safetensors")}
    assert "F16" in stored and stored <= {"F16", "I64"}
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), net(x)) and torch.equal(features(again, x), features(net, x))
    assert again(x).dtype == torch.float32 and next(net.parameters()).dtype == torch.float32


def test_the_four_models_are_of_four_families() -> None:
    from timm.layers import LayerScale

    nets = {name: make_net(name) for name in RECIPES}
    vit, dino = nets["atlas-vit"], nets["atlas-dino"]
    assert vit.cls_token is None and vit.global_pool == "avg" and isinstance(vit.fc_norm, torch.nn.LayerNorm)
    assert dino.cls_token is not None and dino.num_reg_tokens == 4 and dino.num_prefix_tokens == 5
    assert dino.global_pool == "token" and isinstance(dino.blocks[0].ls1, LayerScale)
    assert type(nets["atlas-swin"]).__name__ == "SwinTransformer"
    assert type(nets["atlas-maxvit"]).__name__ == "MaxxVit"
    x = torch.zeros(2, 3, 64, 64)
    for name, net in nets.items():
        assert net(x).shape == (2, len(LABELS) if RECIPES[name].supervised else net.num_features)
        assert features(net, x).shape == (2, net.num_features)
    bytes_ = sum(2 * p.numel() for net in nets.values() for p in net.parameters())
    assert bytes_ < 8 * 2**20


def test_labels_are_in_the_order_of_the_logits() -> None:
    assert sum(WIDTHS) == len(LABELS) == 30 and LABELS[0] == "object: circle" and LABELS[-1] == "count: three"
    assert LABELS[WIDTHS[0]] == "colour: red"


def test_nothing_to_load_is_none(tmp_path: Path) -> None:
    assert load_vision(tmp_path) is None


# ---- what teaches them ------------------------------------------------------------------------------------


def test_attribute_losses_are_cross_entropies_of_slices() -> None:
    logits, labels = torch.randn(7, 30), draw_scenes(7, np.random.default_rng(0)).labels()
    start = 0
    for (name, got), column, width in zip(
        attribute_losses(logits, torch.from_numpy(labels)).items(), labels.T, WIDTHS, strict=True
    ):
        want = 0.0
        for row, label in zip(logits.double().numpy()[:, start : start + width], column, strict=True):
            want += np.log(np.exp(row).sum()) - row[label]
        assert float(got) == pytest.approx(want / 7, rel=1e-5), name
        start += width


def test_home_views_show_the_same_things(judge: Any) -> None:
    scenes = draw_scenes(60, np.random.default_rng(1), emblems=0)
    home = at_home(scenes)
    np.testing.assert_array_equal(home.labels(), scenes.labels())
    assert (read_attributes(judge, render(home)) == scenes.labels()).mean() > 0.97
    twice = replace(scenes.pick(np.arange(9)), centres=scenes.centres[9:18], radius=scenes.radius[9:18])
    np.testing.assert_array_equal(render(at_home(twice)), render(home)[:9])


def test_cover_is_the_distance_from_the_corners_colour() -> None:
    x = torch.randn(2, 3, 4, 5)
    got = cover(x).numpy()
    for image, drawn in zip(x.numpy(), got, strict=True):
        far = [[np.linalg.norm(image[:, i, j] - image[:, 0, 0]) for j in range(5)] for i in range(4)]
        np.testing.assert_allclose(drawn[0], np.array(far) / np.max(far), rtol=1e-5)
    assert not cover(torch.ones(1, 3, 4, 4)).any()  # nothing is drawn


def test_a_home_view_holds_colours_and_drawing() -> None:
    scenes = draw_scenes(5, np.random.default_rng(4), emblems=0)
    whole, view = pixels(render(at_home(scenes))), home_view(scenes)
    drawn = cover(whole)
    assert view.shape == (5, 4, 32, 32)
    for n, i, j in np.ndindex(5, 32, 32):
        assert torch.equal(view[n, :3, i, j], whole[n, :, 2 * i + 1, 2 * j + 1])
        four = drawn[n, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        assert float((four.mean() - view[n, 3, i, j]).abs()) < 1e-6


def test_the_painter_paints_from_the_class_token_alone() -> None:
    painter = Painter(make_net("atlas-dino"), width=16).eval()
    scenes = draw_scenes(4, np.random.default_rng(6), emblems=0)
    x, target = pixels(render(scenes)), home_view(scenes)
    parts = painter(x, target)
    sum(parts.values()).backward()
    assert float(painter.net.cls_token.grad.abs().sum()) > 0
    with torch.no_grad():
        token = painter.net.forward_features(x)[:, 0]
        painted = painter.paint(token).view(4, 4, 32, 32)
    error = (painted - target).double().numpy() ** 2
    assert float(parts["colours"].detach()) == pytest.approx(error[:, :3].mean(), rel=1e-5)
    assert float(parts["drawing"].detach()) == pytest.approx(4 * error[:, 3].mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["atlas-swin", "atlas-dino"])
def test_a_sitting_trains_and_resumes(name: str, tmp_path: Path) -> None:
    before = make_net(name).state_dict()
    net, first = train_vision(name, 0.01, tmp_path, batch=8)
    assert not net.training and first["steps"] >= 1
    assert first["pictures"] == first["steps"] * 8
    assert all(torch.isfinite(v).all() for v in net.state_dict().values())
    assert any(not torch.equal(v, before[k]) for k, v in net.state_dict().items())
    _, second = train_vision(name, 0.01, tmp_path, batch=8)
    assert second["steps"] > first["steps"]


def test_supervision_learns(tmp_path: Path) -> None:
    """Small steps on one batch: the losses of all attributes fall."""
    scenes = draw_scenes(12, np.random.default_rng(8), emblems=0)
    x, labels = pixels(render(scenes)), torch.from_numpy(scenes.labels())
    net = make_net("atlas-swin")
    solver = torch.optim.AdamW(net.parameters(), lr=1e-3)
    start = attribute_losses(net(x), labels)
    for _ in range(30):
        solver.zero_grad()
        sum(attribute_losses(net(x), labels).values()).backward()
        solver.step()
    end = attribute_losses(net(x), labels)
    assert all(float(end[k].detach()) < 0.6 * float(start[k].detach()) for k in ATTRIBUTES)


def test_the_command_trains_measures_and_writes_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(train, "SHIPPED", tmp_path)
    monkeypatch.setattr(train, "FINGERPRINTS", tmp_path / "fingerprints.json")
    monkeypatch.setattr(measure, "SHIPPED", tmp_path)
    monkeypatch.setattr(measure, "linear_probe", lambda net, n, probe=measure.linear_probe: probe(net, 40))
    threads = torch.get_num_threads()
    options = partial(train.Options, "atlas-swin", device="cpu", threads=threads)
    train.main(options(minutes=0.01))
    card = (tmp_path / "atlas-swin" / "README.md").read_text()
    assert "python -m studio.atlas.measure atlas-swin" in card and card in capsys.readouterr().out
    assert "| linear probe: object (2,000 held-out renderings) | 0." in card and "seed: 0" in card
    known = json.loads((tmp_path / "fingerprints.json").read_text())
    assert known == {"atlas-swin": fingerprint(tmp_path / "atlas-swin")}
    (tmp_path / "home" / "training" / "atlas-swin" / "vision.safetensors").unlink()
    before = load_vision(tmp_path / "atlas-swin").state_dict()
    train.main(options(minutes=0.0))  # no time: what was shipped is shipped again
    after = load_vision(tmp_path / "atlas-swin").state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


# ---- the linear probe -------------------------------------------------------------------------------------


class Told(torch.nn.Module):
    """Features that hold what the judge reads of some attributes, turned, beside noise."""

    def __init__(self, judge: Any, kept: slice) -> None:
        super().__init__()
        self.judge, self.kept = judge, kept

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        images = ((x.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8)
        logits = self.judge(images)[self.kept]
        told = torch.cat([x.softmax(1) for x in logits] + [torch.randn(len(x), 4)], dim=1)
        turn, _ = torch.linalg.qr(torch.randn(told.shape[1], told.shape[1], generator=torch.manual_seed(3)))
        return told @ turn

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        assert pre_logits
        return x


def test_the_probe_reads_what_is_there_and_nothing_else(judge: Any) -> None:
    right = measure.linear_probe(Told(judge, slice(0, 2)), 100)
    assert list(right) == list(ATTRIBUTES)
    assert right["object"] > 0.95 and right["colour"] > 0.95
    assert right["background"] < 0.45 and right["style"] < 0.6 and right["count"] < 0.7


def test_logistic_regression_is_scipys() -> None:
    rng = np.random.default_rng(9)
    x = rng.standard_normal((60, 4))
    y = (x @ rng.standard_normal((4, 3)) + rng.standard_normal((60, 3))).argmax(1)

    def loss(flat: np.ndarray) -> float:
        w = flat.reshape(5, 3)
        logits = x @ w[:4] + w[4]
        entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(60), y]
        return entropy.mean() + 0.5e-3 * (w[:4] ** 2).sum()

    want = minimize(loss, np.zeros(15), tol=1e-12).x.reshape(5, 3)
    got = measure._logistic(torch.from_numpy(x), torch.from_numpy(y), 3).numpy()
    np.testing.assert_allclose(got[:4] - got[:4].mean(1, keepdims=True), want[:4], atol=1e-3)
    assert loss(got.ravel()) <= loss(want.ravel()) + 1e-7


@pytest.mark.parametrize(
    ("name", "says"),
    {"atlas-moon": "no Atlas model 'atlas-moon'; known: judge", "atlas-vit": "not been trained yet"}.items(),
)
def test_nothing_to_measure(name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SHIPPED", tmp_path)
    with pytest.raises(SystemExit, match=says):
        measure.measure(name)


# ---- the shipped weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_what_its_card_says(name: str) -> None:
    """A probe of 400 renderings comes near that of 4,000."""
    source = locate(name)
    assert (source.kind, source.family) == ("vision", "timm")
    known = json.loads((ASSETS / "atlas" / "fingerprints.json").read_text())
    assert known[name] == source.fingerprint
    card = (source.path / "README.md").read_text()
    for attribute, right in measure.measure(name, 20).items():
        (said,) = re.findall(rf"linear probe: {attribute} \(2,000 held-out renderings\) \| ([\d.]+) \|", card)
        assert -0.15 < right - float(said) < 0.06, attribute


@pytest.mark.parametrize("name", REACHED)
def test_objects_and_colours_reach_the_bar(name: str) -> None:
    card = (locate(name).path / "README.md").read_text()
    for attribute in ("object", "colour"):
        assert float(re.search(rf"probe: {attribute} .*? \| ([\d.]+) \|", card)[1]) >= 0.95


def test_the_shipped_models_are_small() -> None:
    sizes = [(ASSETS / "atlas" / n / "model.safetensors").stat().st_size for n in SHIPPED]
    assert len(sizes) == 4 and sum(sizes) <= 8 * 2**20


# ---- the set with a spurious correlation ------------------------------------------------------------------


def test_the_objects_go_along_with_their_backgrounds(tmp_path: Path, judge: Any) -> None:
    table = write_groups(GroupOptions(tmp_path / "set", n=60, share=0.95, seed=3))
    rows = list(csv.DictReader(table.read_text("utf-8").splitlines()))
    assert list(rows[0]) == ["file", "label", "group"] and len(rows) == 120
    counted: dict[str, int] = {}
    for row in rows:
        counted[row["group"]] = counted.get(row["group"], 0) + 1
    assert counted == {"star on mint": 57, "star on sand": 3, "heart on sand": 57, "heart on mint": 3}
    images = np.stack([np.asarray(Image.open(table.parent / row["file"])) for row in rows])
    assert images.shape == (120, 64, 64, 3)
    read = read_attributes(judge, images)
    things, papers = (
        np.array(list(ATTRIBUTES[k]))[read[:, i]] for k, i in (("object", 0), ("background", 2))
    )
    seen = [
        row["label"] == t and row["group"] == f"{t} on {p}"
        for row, t, p in zip(rows, things, papers, strict=True)
    ]
    assert np.mean(seen) > 0.97
    assert {f.name for f in (tmp_path / "set").iterdir()} == {"images", "groups.csv"}


@pytest.mark.parametrize(("share", "own"), [(0.5, 50), (0.95, 95), (0.0, 0), (1.0, 100)])
def test_the_share_is_exact_and_the_rest_varies(share: float, own: int) -> None:
    options = GroupOptions(Path("x"), ("house", "moon"), ("black", "gray"), share, 100, 5)
    scenes = group_scenes(options)
    for thing, paper in ((8, 1), (5, 2)):
        mine = scenes.background[scenes.object == thing]
        assert len(mine) == 100 and (mine == paper).sum() == own
    assert (
        len(set(scenes.colour)) == len(COLOURS)
        and len(set(scenes.style)) == 4
        and len(set(scenes.count)) == 3
    )
    np.testing.assert_array_equal(group_scenes(options).labels(), scenes.labels())
    assert (scenes.object[:100] == 8).any() and (scenes.object[:100] == 5).any()


WRONG = {
    "object": ({"objects": ("star", "sun")}, "'sun' is no object of the Atlas world; choose two of circle, "),
    "background": ({"backgrounds": ("blue", "mint")}, "'blue' is no background of the Atlas world; choose "),
    "twice": ({"objects": ("star", "star")}, "Both objects are 'star'; name two different ones."),
    "share": ({"share": 1.5}, "--share must be a number from 0 to 1, not 1.5; take 0.95."),
    "not a number": ({"share": float("nan")}, "--share must be a number from 0 to 1, not nan; take 0.95."),
    "none": ({"n": 0}, "--n must be a whole number from 1 to 100000, not 0; take 1000."),
}


@pytest.mark.parametrize(("given", "says"), WRONG.values(), ids=WRONG)
def test_a_wrong_set_is_refused(given: dict, says: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(RequestError) as error:
        write_groups(GroupOptions(tmp_path / "set", **given))
    assert says in str(error.value) and not (tmp_path / "set").exists()
    assert main(GroupOptions(tmp_path / "set", **given)) == 2 and says in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(GroupOptions(tmp_path, n=5)) == 2
    assert "exists and is not empty; name a new folder for the pictures." in capsys.readouterr().err
    assert main(GroupOptions(tmp_path / "new", n=5)) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "groups.csv")
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["mine.txt"]
