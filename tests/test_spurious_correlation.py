"""The experiment on spurious correlation: heads, groups, the two ablations and the rows that come of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio import bench, spurious_correlation
from studio.atlas.groups import GroupOptions, group_scenes
from studio.spurious_correlation import (
    Head,
    Pictures,
    Settings,
    Trial,
    few_labels,
    fitted_head,
    measure_correlation,
    rows_of,
)

TINY = Settings(learn=20, test=4, few=20, heads=2, sizes=(1, 3), draws=3, rows=20)


@pytest.fixture(scope="module")
def trial(session: Any) -> Trial:
    torch.set_num_threads(1)
    return Trial(session.model("atlas-clip", "vision"), None, None, TINY)


def pictures(share: float, n: int) -> Pictures:
    return Pictures.of(group_scenes(GroupOptions(Path(), share=share, n=n)))


def test_groups_are_labels_and_backgrounds() -> None:
    found = pictures(0.95, 40)
    assert found.images.shape == (80, 64, 64, 3) and np.array_equal(found.groups // 2, found.labels)
    assert sorted(np.bincount(found.groups)) == [2, 2, 38, 38]


def test_heads_of_few_labels_see_other_pictures_in_the_same_shares() -> None:
    found = pictures(0.95, 60)
    one, two = few_labels(found, 20, 2, 0.95)
    assert not set(one) & set(two) and len(set(one)) == 40
    for mine in (one, two):
        assert sorted(np.bincount(found.groups[mine])) == [1, 1, 19, 19]


def test_a_head_is_right_by_group() -> None:
    test = Pictures(np.zeros((8, 1, 1, 3), np.uint8), np.repeat([0, 1], 4), np.repeat([0, 1, 2, 3], 2))
    z = np.array([-1, -1, -1, 1, 1, 1, 1, -1.0])[:, None]  # one wrong in group 1, one in group 3
    assert Head(np.ones(1), 0.0).score(z, test) == (0.75, 0.5)
    assert Head(-np.ones(1), 0.0).score(z, test) == (0.25, 0.0)


def test_a_fitted_head_separates_and_shrinks_with_decay() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=300)
    z = rng.normal(size=(300, 5)) * 3 + 7
    z[:, 2] += 20 * labels
    head = fitted_head(z, labels)
    assert ((z @ head.weight + head.bias > 0) == labels).all()
    assert np.abs(head.weight[2]) > 5 * np.abs(np.delete(head.weight, 2)).max()
    assert np.linalg.norm(fitted_head(z, labels, 1.0).weight) < 0.2 * np.linalg.norm(head.weight)
    x = (z - z.mean(0)) / (z.std(0) + 1e-6)  # at the best weights the loss is flat
    w = np.append(head.weight * (z.std(0) + 1e-6), head.bias + z.mean(0) @ head.weight)
    wrong = 1 / (1 + np.exp(-(x @ w[:-1] + w[-1]))) - labels
    assert np.abs(x.T @ wrong / 300 + 1e-3 * w[:-1]).max() < 1e-4 and abs(wrong.mean()) < 1e-4


def test_the_two_ablations_are_those_of_the_decomposition_and_of_the_model(trial: Trial) -> None:
    model, chosen = trial.model, trial.order[:2]
    x = torch.cat(trial.pixels)
    assert np.allclose(trial.z, model.representation(x).double().numpy(), atol=1e-5)
    learn = Pictures.of(group_scenes(GroupOptions(Path(), objects=TINY.objects, n=TINY.learn, share=0.95)))
    parts = trial.own.whole.run(model.pixels(list(learn.images))).components
    for c in chosen:
        here = trial.own.whole.run(x).components[c].double().numpy()
        assert np.allclose(trial.off[c], here - parts[c].double().numpy().mean(0), atol=1e-5)
    seen: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trial, "scores", lambda self, z: seen.append(z) or {})
        trial.without(chosen)
        trial.without(trial.branches)
    assert np.allclose(seen[0], trial.z - trial.off[chosen[0]] - trial.off[chosen[1]])
    # without anything but means the model gives every picture what its embedding alone decides
    assert seen[3].std(0).max() < seen[1].std(0).max()
    assert not np.allclose(seen[0], seen[1], atol=1e-3)


def test_rows_stand_beside_random_sets(trial: Trial) -> None:
    rows = {r["name"]: r for r in rows_of("t", trial)}
    assert len(rows) == 2 * (2 + 2 * len(TINY.sizes) * 2 * 2)
    whole = rows["t, all labels, whole model: worst group"]
    assert whole["value"] == trial.scores(trial.z)["all labels"][1] and "1 heads, 2 pictures" in whole["how"]
    name = f"t, 20 labels of each, without 3 of {len(trial.branches)}, true ablation"
    mine, beside = rows[f"{name}: average"], rows[f"{name}, random sets: average"]
    assert mine["how"].startswith(", ".join(trial.order[:3])) and "of 3 random sets" in mine["how"]
    found = [s["true ablation"]["20 labels of each"][0] for s in trial.at_random(3)]
    assert beside["value"] == pytest.approx(np.mean(found))
    assert f"sd {np.std(found, ddof=1):.3f}, best {max(found):.3f}" in beside["how"]
    assert mine["value"] == pytest.approx(
        trial.without(trial.order[:3])["true ablation"]["20 labels of each"][0]
    )


def test_the_benchmark_has_it(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = bench.chosen((), ["spurious-correlation"])
    assert entry.group == "planted"
    said: list[str] = []
    tiny = replace(TINY, sizes=(1,), draws=2)
    monkeypatch.setattr(
        spurious_correlation, "measure_correlation", lambda asked, say: measure_correlation(asked, say, tiny)
    )
    rows = entry.run(session, None, said.append)
    assert said == [f"spurious correlation, {name}: done" for name in ("atlas-vit", "atlas-clip")]
    assert len(rows) == 2 * 2 * (2 + 8) and all(0 <= r["value"] <= 1 for r in rows)
    assert all(set(r) == {"name", "value", "unit", "bar", "holds", "how"} for r in rows)
