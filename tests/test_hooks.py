"""What watch() records, by site, and that nothing of it stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from studio.models.hooks import hook_count, watch
from studio.types import Patch, Site

ALIKE = [Site("unet", f"mid_block.attentions.0.transformer_blocks.{i}.attn2", "attn2") for i in range(2)]
MODULES = {ALIKE[0]: nn.Identity(), ALIKE[1]: nn.Hardtanh(-1, 1)}


def test_sites_that_print_alike_are_recorded_apart() -> None:
    assert str(ALIKE[0]) == str(ALIKE[1])
    with watch(MODULES, record=ALIKE) as tape:
        for module in MODULES.values():
            module(torch.tensor([[5.0]]))
    assert [float(tape[s]) for s in ALIKE] == [5.0, 1.0]
    assert str(ALIKE[0]) not in tape and Site("unet", "x", "attn2") not in tape


def test_a_text_finds_the_only_site_that_prints_so() -> None:
    with watch(MODULES, record=ALIKE[:1]) as tape:
        MODULES[ALIKE[0]](torch.tensor([[5.0]]))
    assert str(ALIKE[0]) in tape and float(tape[str(ALIKE[0])]) == 5.0


@pytest.mark.parametrize("fault", [ZeroDivisionError, KeyboardInterrupt])
def test_no_hook_is_left_after_a_fault(fault: type[BaseException]) -> None:
    patches = [Patch(ALIKE[0], do="zero")]
    with pytest.raises(fault), watch(MODULES, record=ALIKE, patches=patches):
        assert [hook_count(m) for m in MODULES.values()] == [1, 1]
        assert float(MODULES[ALIKE[0]](torch.tensor([[5.0]]))) == 0.0
        raise fault
    assert [hook_count(m) for m in MODULES.values()] == [0, 0]


def test_a_site_without_a_module_hooks_nothing() -> None:
    with (
        pytest.raises(KeyError, match="no module for lm.3.mlp"),
        watch(MODULES, record=[Site("lm", 3, "mlp")]),
    ):
        pass
    assert [hook_count(m) for m in MODULES.values()] == [0, 0]


SITE = Site("unet", "x", "attn2")
ROWS = {  # patches of three rows
    "one": [Patch(SITE, do="copy", value=0, rows=(2,))],
    "several": [Patch(SITE, do="copy", value=0, rows=(1,)), Patch(SITE, do="copy", value=0, rows=(2,))],
    "a replaced row is read": [
        Patch(SITE, do="copy", value=0, rows=(1,)),
        Patch(SITE, do="copy", value=1, rows=(2,)),
    ],
    "a part of a row": [Patch(SITE, do="copy", value=0, rows=(2,), at=(1,))],
    "another patch": [Patch(SITE, do="scale", value=2.0, rows=(2,))],
}


@pytest.mark.parametrize("patches", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("module", [nn.Identity(), nn.Linear(3, 3)], ids=["gives its input", "gives its own"])
def test_rows_that_are_copied_in_place(module: nn.Module, patches: list[Patch]) -> None:
    """The same numbers as beside; what the module was given stays as it is."""
    given = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    before, found = given.clone(), []
    for in_place in (False, True):
        with torch.no_grad(), watch({SITE: module}, patches=patches, in_place=in_place) as tape:
            tape.row_offset = 2
            found.append(module(given))
    assert torch.equal(found[0], found[1]) and torch.equal(given, before)
    assert not torch.equal(found[0][2:], module(given)[2:])


def test_what_gradients_are_asked_of_is_not_written_over() -> None:
    module = nn.Linear(3, 3)
    with watch({SITE: module}, patches=ROWS["one"], in_place=True):
        module(torch.ones(3, 3)).sum().backward()
    assert torch.isfinite(module.weight.grad).all()
