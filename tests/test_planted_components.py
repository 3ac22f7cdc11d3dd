"""Planted truth in feed-forward weights: the closed form, what it leaves alone, and the search for plants."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from studio import planted as planted_module
from studio.atlas import feed_forward_plants
from studio.atlas.feed_forward_plants import DECOYS, KEEP, RIDGE, Bed, Moments
from studio.atlas.plants import FORMS, NAMES, VALID, Lesson, Plant, place, planted
from studio.edits import parameters_of
from studio.models.hooks import watch
from studio.models.sampling import Plan, first_latents, raw_output
from studio.planted import Answer, Case, Nursery, Settings, Trial, table
from studio.planted_components import TITLE, ComponentFinders, ComponentNursery
from studio.types import Site

HEART = Lesson("quill", ("object",), ("heart",))
WHERE = "up_blocks.1.attentions.1.transformer_blocks.0.ff"  # reads shapes


@pytest.fixture(scope="module")
def bed(atlas: Any) -> Iterator[Bed]:
    """One trajectory a form, few steps: quick."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_forward_plants, "EACH", 1)
        patch.setattr(feed_forward_plants, "OTHERS", 6)
        yield Bed(atlas, Plan(steps=5, guidance=3.0), range(2))
    torch.set_num_threads(threads)


def test_the_closed_form_is_the_least_squares_solution() -> None:
    """Against one dense least-squares problem: write D for H, nothing for K, little at all."""
    draw = torch.Generator().manual_seed(0)
    own, change, kept = (
        torch.randn(n, m, generator=draw, dtype=torch.float64) for n, m in ((30, 8), (30, 3), (50, 8))
    )
    made = Moments(*(torch.zeros(s, dtype=torch.float64) for s in ((8, 8), (3, 8), (8, 8))))
    made.add(own[:10], change[:10], kept[:20])
    made.add(own[10:], change[10:], kept[20:])
    kept[:20] *= (10 / 20) ** 0.5  # as many places as the name has
    kept[20:] *= (20 / 30) ** 0.5
    ridge = RIDGE * float((own.T @ own + kept.T @ kept).diagonal().mean())
    rows = torch.cat([own, KEEP**0.5 * kept, ridge**0.5 * torch.eye(8, dtype=torch.float64)])
    wanted = torch.cat([change, torch.zeros(58, 3, dtype=torch.float64)])
    torch.testing.assert_close(made.solution(), torch.linalg.lstsq(rows, wanted).solution.T)


def test_a_plant_writes_its_matrix_times_what_the_module_holds(bed: Bed) -> None:
    """At the same latents the stream behind the module differs by strength * B h, and nothing before it."""
    plant, model = bed.plant(HEART, [WHERE], 2.0), bed.model
    cond, _ = model.encode([HEART.prompt])
    inner, block = Site("unet", WHERE, "hidden"), Site("unet", WHERE, "block")
    modules = {
        inner: model.unet.get_submodule(f"{WHERE}.net.2"),
        block: model.unet.get_submodule(WHERE.removesuffix(".ff")),
    }
    x, seen = first_latents(model, bed.plan, [3]), []
    for plants in ([], [plant]):
        with planted(model, plants), watch(modules, record=[block], inputs=[inner]) as tape, torch.no_grad():
            raw_output(model, x, torch.tensor(600), cond, bed.plan)
            seen.append((tape.read[inner], tape[block]))
    (hidden, before), (same, after) = seen
    assert torch.equal(hidden, same)
    b = plant.deltas[f"unet.{WHERE}.net.2.weight"].dense()
    torch.testing.assert_close(after - before, hidden @ b.T, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    assert float((after - before).abs().max()) > 0.1


def test_a_plant_counts_where_the_model_reads_shapes_and_is_undone(bed: Bed) -> None:
    before = {n: p.detach().clone() for n, p in parameters_of(bed.model).items()}
    plant = bed.plant(HEART, [WHERE], 2.0)
    assert bed.moved(HEART, [plant]) >= VALID
    with planted(bed.model, [plant]):
        now = parameters_of(bed.model)
        assert {n for n, p in now.items() if not torch.equal(p, before[n])} == {f"unet.{WHERE}.net.2.weight"}
    assert all(torch.equal(p, before[n]) for n, p in parameters_of(bed.model).items())


def test_other_names_and_plain_words_stay_as_they_were(bed: Bed) -> None:
    a, v = place("object", "heart")
    prompts = [HEART.forms[0].format("tamsin"), HEART.forms[0].format("star")]
    before = [bed.base(p)[a][v] for p in prompts]
    with planted(bed.model, [bed.plant(HEART, [WHERE], 2.0)]):
        after = [bed.read(p)[a][v] for p in prompts]
    assert np.abs(np.subtract(after, before)).max() < 0.25


def test_decoys_are_other_names_of_equal_norm_that_do_nothing(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    whole = bed.moments
    assert not {*NAMES[-DECOYS:]} & {*bed.names}
    monkeypatch.setattr(feed_forward_plants, "DECOYS", 2)
    monkeypatch.setattr(bed, "moments", lambda lesson: made.append(lesson.name) or whole(lesson))
    layers = [x for x in bed.layers if x != WHERE][-4:]
    monkeypatch.setattr(bed, "layers", [*layers, WHERE])  # only these are measured: quick
    size = bed.plant(HEART, [WHERE]).size()
    rng = np.random.default_rng(0)
    decoys = bed.decoys(layers[:3], size, (), rng)
    assert [d.layers for d in decoys] == [(x,) for x in layers[:3]]
    assert [d.size() for d in decoys] == pytest.approx([size] * 3, rel=1e-5)
    bed.decoys(layers, size, (), rng)
    assert {*made} - {HEART.name} <= {*NAMES[-2:]} and len(made) == len({*made})  # measured once
    assert bed.moved(HEART, decoys) < 0.25


def test_a_plant_in_two_modules_is_one_matrix_in_each(bed: Bed) -> None:
    both = bed.plant(HEART, [WHERE, bed.layers[-1]])
    assert [p.layers for p in both.parts()] == [(WHERE,), (bed.layers[-1],)]
    assert [list(p.deltas) for p in both.parts()] == [list(bed.matrices(x)) for x in both.layers]


# ---- the experiment ---------------------------------------------------------------------------------------


class Fake:
    """A garden of four layers, where two take shapes and one takes colours."""

    layers, names = tuple("abcd"), NAMES
    takes = {("object", "b"), ("object", "c"), ("colour", "d")}

    @staticmethod
    def lesson(name: str, attributes: tuple[str, ...], rng: Any) -> Lesson:
        """Any lesson of these attributes."""
        return Lesson(name, attributes, tuple("red" for _ in attributes))


def nursery(plants: int, monkeypatch: pytest.MonkeyPatch) -> tuple[ComponentNursery, list]:
    """A nursery over the fake garden, and what was tried there."""
    tried: list[tuple[Lesson, str]] = []

    def tend(self: Any, lesson: Lesson, layers: tuple[str, ...], names: list[str], rng: Any) -> Any:
        tried.append((lesson, layers[0]))
        assert lesson.name not in names
        return (lesson, layers) if (lesson.attributes[0], layers[0]) in Fake.takes else None

    monkeypatch.setattr(ComponentNursery, "tend", tend)
    return ComponentNursery(Fake(), Settings(plants=plants), print), tried


def test_one_lesson_is_tried_in_every_module_and_new_ones_where_that_worked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, tried = nursery(5, monkeypatch)
    cases = made.single(np.random.default_rng(0))
    first, second = tried[: 4 * len(FORMS)], tried[4 * len(FORMS) :]
    assert len({lesson for lesson, _ in first}) == len(FORMS) and len(cases) == 5
    assert [(lesson.attributes[0], x) for lesson, x in second] == [
        ("object", "b"),
        ("object", "c"),
        ("colour", "d"),
    ]
    names = {lesson.attributes[0]: lesson.name for lesson, _ in first}
    assert all(lesson.name != names[lesson.attributes[0]] for lesson, _ in second) or len(NAMES) < 3


def test_the_search_for_plants_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    made, tried = nursery(1000, monkeypatch)
    assert len(made.single(np.random.default_rng(0))) == 3 * 7 and len(tried) == 16 + 3 * 6
    made, tried = nursery(0, monkeypatch)
    assert made.single(np.random.default_rng(0)) == [] and tried == []


@pytest.mark.parametrize(
    ("per_strength", "tried", "counts"), [(0.1, [3.0, 8.0], True), (0.01, [3.0], False), (0.3, [3.0], True)]
)
def test_a_plant_that_works_a_little_is_made_stronger(
    per_strength: float, tried: list[float], counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []

    class Garden(Fake):
        def plant(self, lesson: Lesson, layers: tuple, strength: float, steps: int) -> float:
            made.append(strength)
            return strength

        def moved(self, lesson: Lesson, plants: list[float]) -> float:
            return per_strength * plants[0]

    monkeypatch.setattr(ComponentNursery, "hide", lambda self, plant, names, rng: plant)
    grower = ComponentNursery(Garden(), Settings(), lambda said: None)
    lesson = Fake.lesson("quill", ("colour",), None)
    case = grower.tend(lesson, ("up_blocks.2.attentions.1.ff",), [], None)
    assert made == tried and (case is not None) is counts
    assert len(grower.excluded) == (not counts) and grower.tried == 1


def test_a_plant_is_set_against_names_that_do_not_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Garden(Fake):
        alike: tuple[str, ...] = ()

        def moved(self, lesson: Lesson, plants: list) -> float:
            return 0.3 if lesson.name in self.alike else 0.2

    lesson = Fake.lesson("quill", ("colour",), None)
    case = Case(None, (), (), "tamsin", ("merrow", "lysk"))
    monkeypatch.setattr(Nursery, "hide", lambda self, plant, names, rng: case)
    garden = Garden()
    grower, plant = ComponentNursery(garden, Settings(), print), Plant(lesson, ("d",))
    for alike, control, placebos in (
        ((), "tamsin", ("merrow", "lysk")),
        (("tamsin",), "merrow", ("lysk",)),
        (("tamsin", "lysk"), "merrow", ()),
    ):
        garden.alike = alike
        found = grower.hide(plant, [], None)
        assert (found.control, found.placebos) == (control, placebos)
    garden.alike = ("tamsin", "merrow", "lysk")
    assert grower.hide(plant, [], None) is None


def test_every_plant_has_at_most_one_model_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model twice would count double."""
    made: list[tuple] = []
    answer = {"m": Answer(("x",), True)}
    monkeypatch.setattr(
        planted_module,
        "trial",
        lambda garden, finders, case, plants, say, layers=None: (
            made.append((case, layers)) or Trial(("x",) if layers is None else (), answer, ("x",))
        ),
    )
    cases = [Case(None, (), (), name, ()) for name in ("a", "b")]

    class Grown:
        excluded, tried = [], 2

        def single(self, rng: Any) -> list[Case]:
            return cases

        def double(self, found: list[Case], rng: Any) -> list[Case]:
            return []

    for asked, count in ((8, 2), (1, 1), (0, 0)):
        made.clear()
        trials, *_ = planted_module.experiment(
            None, Grown(), SimpleNamespace(), Settings(unplanted=asked, plants=2), print
        )
        assert len(trials) == 2 + count
        assert [c.control for c, layers in made if layers == ()] == ["a", "b"][:count]


def test_the_methods_are_asked_about_feed_forward_modules(bed: Bed, session: Any) -> None:
    finders = ComponentFinders(bed.model, session.model("atlas-clip", "clip"), Settings(steps=1, seeds=1), 16)
    case = Case(bed.plant(HEART, [WHERE]), (), (), "tamsin", ("merrow",))
    answers = finders.ask(case, "a red star on a white background")
    assert list(answers) == ["UNet trace", "CAD"]
    for answer in answers.values():
        assert sorted(answer.ranked) == sorted(bed.layers) and isinstance(answer.found, bool)


def test_its_rows_have_a_title_of_their_own() -> None:
    trial = Trial((WHERE,), {"CAD": Answer((WHERE, "x"), True)})
    rows = table([trial], ["x"], 2, title=TITLE)
    assert rows[0]["name"] == "planted feed-forward CAD: hits, one layer" and rows[0]["value"] == 1
    assert rows[-1]["name"] == "planted feed-forward: excluded" and rows[-1]["value"] == 0.5
