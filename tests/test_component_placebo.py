"""Net shares and their placebo: equal to the slow form, blind to constants and to pairs that cancel, and
quiet where no component writes the feature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from studio.errors import RequestError
from studio.methods import component_placebo
from studio.methods.component_placebo import Contributions, Placebo, net, random_axes
from studio.methods.component_roles import draw
from studio.types import Recipe
from tests.vision_corpora import picture_folder

DIM, N = 24, 200
Components = dict[str, np.ndarray]


def made(seed: int, writer: bool = True) -> tuple[Components, np.ndarray]:
    """Components (N, DIM) under a norm whose scale differs by image, and the feature's axis (1, DIM): one may
    write it, two cancel each other along it, one is a constant along it, one writes elsewhere, one
    everywhere."""
    rng = np.random.default_rng(seed)
    axis = np.linalg.qr(rng.normal(size=(DIM, 2)))[0].T
    scale = np.exp(rng.normal(size=(N, 1)) / 3)
    seen, pair = rng.normal(size=(2, N, 1))
    parts = {
        "embedding": rng.normal(size=(N, DIM)) / 3,
        "block.0.head.0": seen * axis[0 if writer else 1],
        "block.0.head.1": pair * axis[0],
        "block.0.head.2": -pair * axis[0],
        "block.0.head.3": np.ones((N, 1)) * 3 * axis[0],
        "block.0.bias": np.ones((N, 1)) * rng.normal(size=DIM),
    }
    return {k: v * scale for k, v in parts.items()}, axis[:1]


def slow(parts: Components, axes: np.ndarray) -> np.ndarray:
    """Net shares, every number formed: residuals on the scale first, then pairs, then sums."""
    scale = np.linalg.norm(parts["block.0.bias"], axis=1)
    scale = (scale - scale.mean())[:, None]
    along = {k: (v - v.mean(0)) @ axes.T for k, v in parts.items()}
    left = {k: v - scale * (scale.T @ v) / (scale**2).sum() for k, v in along.items()}
    z = sum(left.values())
    variance = np.square(sum(parts.values()) - sum(parts.values()).mean(0)).sum() / N
    found = []
    for one in left.values():
        rest = {k: ((one + v) ** 2).sum() / max((one**2).sum(), (v**2).sum()) for k, v in left.items()}
        other = left[min(rest, key=rest.get)]
        undone = min(rest.values()) < 0.1
        found.append(((one + other if undone else one) * z).sum() / N / variance)
    return np.array(found)


def test_net_shares_are_those_of_the_slow_form_in_batches_and_at_once() -> None:
    parts, axis = made(0)
    axes = np.concatenate([axis, random_axes([1], DIM, 1)[0]])
    once, batches = Contributions([axis, axes]), Contributions([axis, axes])
    once.add(parts)
    for rows in np.array_split(np.arange(N), 7):
        batches.add({k: v[rows] for k, v in parts.items()})
    assert np.allclose(once.net_shares(), batches.net_shares(), atol=1e-10)
    assert np.allclose(once.net_shares()[0], slow(parts, axis), atol=1e-9)
    assert np.allclose(once.net_shares()[1], slow(parts, axes), atol=1e-9)


def test_a_small_bias_tells_the_scale_as_well_as_a_large_one() -> None:
    parts, axis = made(3)
    found = []
    for size in (1.0, 1e-6):
        moments = Contributions([axis])
        moments.add(parts | {"block.0.bias": parts["block.0.bias"] * size})
        moments.add(
            {k: v * 1.1 for k, v in parts.items()} | {"block.0.bias": parts["block.0.bias"] * 1.1 * size}
        )
        found.append(moments.net_shares()[0])
    constant = list(parts).index("block.0.head.3")
    assert np.abs(np.array(found)[:, constant]).max() < 1e-9


def test_the_writer_is_above_the_line_and_decoys_are_not() -> None:
    for seed in range(5):
        parts, axis = made(seed)
        placebo = Placebo({"feature": axis}, DIM)
        placebo.add(parts)
        (found,), (line,) = placebo.result()
        names = list(parts)
        assert names[int(found.argmax())] == "block.0.head.0" and found.max() > 2 * line
        assert all(found[names.index(f"block.0.head.{h}")] < line for h in (1, 2, 3))


def test_where_nothing_writes_the_feature_nothing_is_found_more_often_than_promised() -> None:
    alarms = 0
    for seed in range(40):
        parts, axis = made(seed, writer=False)
        placebo = Placebo({"feature": axis}, DIM)
        placebo.add(parts)
        (found,), (line,) = placebo.result()
        alarms += bool(found.max() > line)
    assert alarms <= 6  # 5 % of 40 are 2; 7 or more have a chance of 0.3 %


def test_a_component_and_the_one_that_undoes_it_count_together() -> None:
    both = np.array([[4.0, -4.0, 0.5], [-4.0, 4.0, 0.0], [0.5, 0.0, 1.0]])
    assert np.allclose(net(both), [0.5, 0.5, 1.5])
    half = np.array([[4.0, -2.0], [-2.0, 1.0]])  # half of the first is left: it counts alone
    assert np.allclose(net(half), [2.0, -1.0])
    assert np.allclose(net(np.zeros((2, 2))), 0)


def test_random_axes_are_orthonormal_and_the_same_every_time() -> None:
    one, two = random_axes([1, 3], 8, 5), random_axes([1, 3], 8, 5)
    assert [a.shape for a in one] == [(1, 8)] * 5 + [(3, 8)] * 5
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(np.allclose(a @ a.T, np.eye(len(a))) for a in one)
    assert not np.allclose(one[0], one[1])


def test_features_of_other_sizes_have_lines_of_their_own() -> None:
    parts, axis = made(1)
    more = np.linalg.qr(np.concatenate([axis, random_axes([2], DIM, 1)[0]]).T)[0].T
    placebo = Placebo({"one": axis, "three": more, "again": axis}, DIM, 50)
    placebo.add(parts)
    found, lines = placebo.result()
    assert lines[0] == lines[2] < lines[1] and np.array_equal(found[0], found[2])
    assert np.allclose(found[1], slow(parts, more), atol=1e-9)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, axis = made(0)
    still = Contributions([axis])
    still.add({k: np.ones_like(v) for k, v in parts.items()})
    with pytest.raises(RequestError, match="does not vary over these images"):
        still.net_shares()
    monkeypatch.setattr(component_placebo, "MOST_NUMBERS", 100)
    with pytest.raises(
        RequestError, match="would hold 3,636 numbers for these 6 components, and at most 100"
    ):
        Placebo({"feature": axis}, DIM).add(parts)


def test_rank_components_says_what_is_above_chance(
    session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)
    picture_folder(tmp_path / "pictures", 12)
    (tmp_path / "pictures" / "cut.png").write_bytes(b"no image")
    asked = {"images": (str(tmp_path / "pictures"),), "features": ("colour: red | green | blue", "a star")}
    asked["bank"] = ("a circle", "a gray background", "a house in sketch style", "a red moon")
    run = session.run(Recipe("rank-components", "atlas-clip", asked, {"placebo": True}))
    arrays, above = run.result.arrays, run.result.values["above"]
    assert list(above) == ["colour", "a star"] and arrays["line"].values.shape == (2,)
    for f, name in enumerate(above):
        higher = arrays["net"].values[f] > arrays["line"].values[f]
        assert set(above[name]) == {c for c, h in zip(arrays["net"].axes[1].labels, higher, strict=True) if h}
    assert "; above what random directions reach: colour " in draw(run).caption
    plain = session.run(Recipe("rank-components", "atlas-clip", asked))
    assert "net" not in plain.result.arrays and "random directions" not in draw(plain).caption
    assert np.array_equal(plain.result.arrays["score"].values, arrays["score"].values)
