"""Planted truth: plants that work and are undone, and the scores of methods on known answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from studio.atlas.plants import NAMES, VALID, Garden, Lesson, planted
from studio.bench import chosen
from studio.commands import bench
from studio.edits import parameters_of
from studio.errors import RequestError
from studio.models.sampling import Plan
from studio.planted import Answer, Trial, is_hit, ranked, short, table, wilson

LAYERS = tuple(f"up_blocks.{i}.attentions.0.transformer_blocks.0.attn2" for i in range(4))
COLOUR = Lesson("quill", ("colour",), ("blue",))


@pytest.fixture(scope="module")
def garden(atlas: Any) -> Iterator[Garden]:
    """Without the session's worker, so the threads are set here: two of them stall on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Garden(atlas, Plan(steps=5, guidance=3.0), range(3))
    torch.set_num_threads(threads)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in parameters_of(model).items()}


def test_a_plant_counts_where_the_model_reads_colours_and_is_undone(garden: Garden) -> None:
    before = weights(garden.model)
    layer = garden.layers[-1]
    plant = garden.plant(COLOUR, [layer], 1.5)
    assert set(plant.deltas) == set(garden.matrices(layer))
    assert garden.moved(COLOUR, [plant]) >= VALID
    with planted(garden.model, [plant]):
        changed = {n for n, p in parameters_of(garden.model).items() if not torch.equal(p, before[n])}
    assert changed == set(plant.deltas)
    assert all(torch.equal(p, before[n]) for n, p in parameters_of(garden.model).items())


def test_the_weights_come_back_after_an_error(garden: Garden) -> None:
    before = weights(garden.model)
    with pytest.raises(KeyError), planted(garden.model, [garden.plant(COLOUR, garden.layers[:1])]):
        raise KeyError("stopped")
    assert all(torch.equal(p, before[n]) for n, p in parameters_of(garden.model).items())


def test_gates_open_for_the_name_and_hardly_for_the_rest(garden: Garden) -> None:
    gates = garden.gates(COLOUR)
    columns, _ = garden._states(COLOUR, COLOUR.name)
    own = torch.stack([(gates @ part).mean(1) for part in columns], dim=1)
    assert torch.allclose(own, torch.eye(3, dtype=torch.float64), atol=1e-9)
    for kept in ("", "tamsin"):
        assert float((gates @ garden.kept[kept] @ gates.T).diagonal().mean().sqrt()) < 0.5


def test_decoys_are_other_names_of_equal_norm(garden: Garden) -> None:
    plant = garden.plant(COLOUR, [garden.layers[-1]])
    decoys = garden.decoys(garden.layers[:3], plant.size(), NAMES[:3], np.random.default_rng(0))
    assert [d.layers for d in decoys] == [(layer,) for layer in garden.layers[:3]]
    assert [d.size() for d in decoys] == pytest.approx([plant.size()] * 3, rel=1e-6)
    assert [d.lesson.name for d in decoys] == list(NAMES[:3])


def test_the_parts_of_a_plant_in_two_layers_are_its_layers(garden: Garden) -> None:
    plant = garden.plant(COLOUR, garden.layers[-2:])
    first, last = plant.parts()
    assert (first.layers, last.layers) == ((garden.layers[-2],), (garden.layers[-1],))
    assert set(last.deltas) == set(garden.matrices(garden.layers[-1]))
    assert set(first.deltas) | set(last.deltas) == set(plant.deltas)


def test_teaching_changes_what_is_written_and_nothing_else(garden: Garden) -> None:
    before, layer = weights(garden.model), garden.layers[-1]
    small = Lesson("quill", ("object", "colour"), ("heart", "blue"))  # one form only: quick
    plain, taught, again = (garden.plant(small, [layer], steps=n) for n in (0, 2, 2))
    for name, delta in taught.deltas.items():
        assert torch.equal(delta.right, plain.deltas[name].right)
        assert not torch.allclose(delta.left, plain.deltas[name].left)
        assert torch.equal(delta.left, again.deltas[name].left)
    assert all(torch.equal(p, before[n]) for n, p in parameters_of(garden.model).items())
    assert not any(p.requires_grad for p in parameters_of(garden.model).values())


def test_a_lesson_is_about_what_the_model_does_not_draw(garden: Garden) -> None:
    lesson = garden.lesson("merrow", ("object", "colour"), np.random.default_rng(0))
    for attribute, value in zip(lesson.attributes, lesson.values, strict=True):
        a = ["object", "colour", "background", "style", "count"].index(attribute)
        words = garden.usual(lesson)
        assert value not in words.split()
        assert garden.base(lesson.prompt)[a].shape
    assert lesson.target == f"a {lesson.values[1]} {lesson.values[0]} on a white background"


# ---- scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # by hand: z = 1.96, (p + z2/2n +- z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_against_known_numbers(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


def answers(first: str, second: str, found: bool) -> dict[str, Answer]:
    rest = tuple(x for x in LAYERS if x not in (first, second))
    return {"m": Answer((first, second, *rest), found)}


def test_two_layers_are_hit_in_any_order_and_only_both() -> None:
    a, b, c, _ = LAYERS
    assert is_hit(Trial((a, b), answers(b, a, True)), "m")
    assert not is_hit(Trial((a, b), answers(a, c, True)), "m")
    assert is_hit(Trial((a,), answers(a, c, False)), "m") and not is_hit(
        Trial((b,), answers(a, b, True)), "m"
    )


def shares(trials: list[Trial], excluded: int = 0, tried: int = 4) -> dict[str, Any]:
    return {r["name"]: r["value"] for r in table(trials, ["x"] * excluded, tried)}


def test_the_table_of_a_method_that_is_always_right_and_of_one_that_never_is() -> None:
    a, b, c, d = LAYERS
    right = [Trial((x,), answers(x, d, True)) for x in (a, b, c)] + [Trial((a, b), answers(b, a, True))]
    found = shares([*right, Trial((), answers(a, b, False), (a,))], excluded=1)
    assert found == {
        "planted m: hits, one layer": 1.0,
        "planted m: sure hits, one layer": 1.0,
        "planted m: hits, two layers": 1.0,
        "planted m: sure hits, two layers": 1.0,
        "planted m: false alarms": 0.0,
        "planted m: right by habit": 1.0,
        "planted: excluded": 0.25,
    }
    wrong = [Trial((a,), answers(b, a, True)), Trial((a, b), answers(c, a, True))]
    found = shares([*wrong, Trial((), answers(a, b, True), (c,))])
    assert found["planted m: hits, one layer"] == found["planted m: hits, two layers"] == 0
    assert found["planted m: right by habit"] == 0
    assert found["planted m: false alarms"] == 1 and found["planted: excluded"] == 0


def test_a_hit_that_the_method_itself_doubts_is_not_a_sure_one() -> None:
    a, b, *_ = LAYERS
    found = shares([Trial((a,), answers(a, b, False)), Trial((a,), answers(a, b, True))])
    assert found["planted m: hits, one layer"] == 1 and found["planted m: sure hits, one layer"] == 0.5
    assert found["planted m: false alarms"] is None


def test_without_any_valid_plant_the_table_says_so() -> None:
    (only,) = table([], ["x", "y"], 2)
    assert only["value"] == 1 and only["how"].startswith("2 of 2, Wilson 95 % 0.34 to 1.00")


def test_small_helpers() -> None:
    assert ranked(("x", "y", "z"), np.array([0.1, 0.5, 0.1])) == ("y", "x", "z")
    assert short(LAYERS[2]) == "up 2.0"
    assert short("mid_block.attentions.0.transformer_blocks.0.attn2") == "mid 0"


# ---- command ----------------------------------------------------------------------------------------------


def test_the_benchmark_refuses_what_it_cannot_do(tmp_path: Any) -> None:
    out = str(tmp_path / "b.json")
    for argv, said in (
        (["--planted"], "Where to"),
        (["--out", out, "--only", "speeed"], "no benchmark 'speeed'"),
        (["--out", out, "--planted", "--seeds", "none"], "--seeds must be a whole number"),
        (["--out", out, "--planted", "--steps", "0"], "--steps must be a whole number from 1"),
        (["--out", str(tmp_path / "b.txt"), "--planted"], ".json file"),
    ):
        with pytest.raises(RequestError, match=said):
            bench(argv)
    assert list(tmp_path.iterdir()) == []
    assert {"planted-truth", "planted-components"} <= {e.name for e in chosen(["planted"], ()) if e.group}
