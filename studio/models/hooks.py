"""watch(): records and patches outputs of named sites while a `with` block lasts. The only file that
touches a hook.

The loop that calls the model owns the step number: it writes `tape.step`, a hook never counts for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from studio.types import Patch, Site


class Tape:
    """What a `watch` recorded: tape[site] is the output at the latest call. `step` is the present denoising
    step."""

    def __init__(self) -> None:
        self.step = 0
        self.row_offset = 0
        self.touched: set[Site] = set()
        self.read: dict[Site, torch.Tensor] = {}  # what the modules of `inputs` were given
        self.rest: dict[Site, tuple[tuple, dict[str, Any]]] = {}  # their other arguments, to call them again
        self._kept: dict[Site, torch.Tensor] = {}

    def __getitem__(self, site: Site | str) -> torch.Tensor:
        return self._kept[self._named(site)]

    def __contains__(self, site: Site | str) -> bool:
        return self._named(site) in self._kept

    def _named(self, site: Site | str) -> Site | str:
        """The site itself; long names print alike, so a text finds the only site that prints so."""
        alike = [s for s in self._kept if str(s) == site]
        return alike[0] if len(alike) == 1 else site

    def keep(self, site: Site, value: torch.Tensor) -> None:
        """Stores a recorded output."""
        self._kept[site] = value


@contextmanager
def watch(
    modules: Mapping[Site, nn.Module],
    *,
    record: Iterable[Site] = (),
    patches: Iterable[Patch] = (),
    inputs: Iterable[Site] = (),
    in_place: bool = False,
) -> Iterator[Tape]:
    """Hooks the modules of `record` and of `patches` for the length of the block, whatever happens inside;
    for those of `inputs` what they read is kept in `tape.read`.

    `modules` resolves sites (see models/sites.py). Rows of patches are counted from `tape.row_offset`,
    which lets a loop leave the unconditional half of a guided batch alone. in_place: what a module gives
    belongs to nobody else, so that rows may be copied within it. KeyError when a site is not in `modules`,
    ValueError where outputs are recorded and written over.
    """
    wanted = list(record)
    if wanted and in_place:
        raise ValueError("what is recorded may be written over: record, or copy rows in place")
    by_site: dict[Site, list[Patch]] = {}
    for patch in patches:
        by_site.setdefault(patch.site, []).append(patch)
    sites = list(dict.fromkeys([*by_site, *wanted]))
    if missing := [s for s in sites if s not in modules]:
        raise KeyError(f"no module for {', '.join(map(str, missing))}")
    tape, handles = Tape(), []
    try:
        for site in sites:
            hook = _hook(tape, site, by_site.get(site, []), site in wanted, in_place)
            # first, so that the hooks of transformers that collect hidden states see what we put there
            handles.append(modules[site].register_forward_hook(hook, prepend=True, with_kwargs=True))
            if held := _held(by_site.get(site, [])):
                handles.append(modules[site].register_forward_pre_hook(_rest(held)))
        for site in inputs:
            handles.append(modules[site].register_forward_pre_hook(_reader(tape, site), with_kwargs=True))
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _hook(tape: Tape, site: Site, patches: list[Patch], keep: bool, in_place: bool) -> Callable:
    held = _held(patches)
    patches = [p for p in patches if p is not held]
    whole_rows = in_place and _whole_rows(patches)

    def hook(module: nn.Module, args: Any, options: dict[str, Any], output: Any) -> Any:
        tape.touched.add(site)
        tensor = output[0] if isinstance(output, tuple) else output
        if held is not None:
            table, index = held.value
            tensor = table.to(tensor.device, tensor.dtype)[index]
        active = [p for p in patches if p.when is None or p.when[0] <= tape.step <= p.when[1]]
        if active and whole_rows and not _shared(tensor, [*args, *options.values()]):
            changed = _copy_rows(tensor, active, tape.row_offset)
        else:
            changed = _apply(tensor, active, tape.row_offset) if active else tensor
        if keep:
            tape.keep(site, changed.detach())
        if not active and held is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _reader(tape: Tape, site: Site) -> Callable:
    """Keeps what the module reads."""

    def hook(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        tape.read[site], tape.rest[site] = args[0].detach(), (args[1:], options)

    return hook


def _held(patches: list[Patch]) -> Patch | None:
    """The patch that keeps the module from running, if there is one."""
    found = [p for p in patches if p.do == "hold"]
    if len(found) > 1 or any((p.at, p.when, p.rows) != (None, None, None) for p in found):
        raise ValueError("a site is held once, at every place, step and row")
    return found[0] if found else None


def _rest(held: Patch) -> Callable:
    """Gives the module none of its rows, so that nothing is computed; what is held stands for its output."""

    def hook(module: nn.Module, args: Any) -> Any:
        if len(args[0]) != len(held.value[1]):
            raise ValueError(f"{len(held.value[1])} rows are held at {held.site}, {len(args[0])} come")
        return (args[0][:0], *args[1:])

    return hook


def _whole_rows(patches: list[Patch]) -> bool:
    """Whether every patch copies whole rows, none of which is itself replaced."""
    copies = all(p.do == "copy" and isinstance(p.value, int) and p.at is None and p.rows for p in patches)
    return copies and not {p.value for p in patches} & {r for p in patches for r in p.rows}


def _shared(tensor: torch.Tensor, given: Iterable[Any]) -> bool:
    """Whether the module gave what it was given, or what gradients are asked of."""
    mine = tensor.untyped_storage().data_ptr()
    return tensor.requires_grad or any(t.untyped_storage().data_ptr() == mine for t in _tensors(given))


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """All tensors in a value, however deep."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, Iterable) and not isinstance(values, (str, bytes)):
        for value in values:
            yield from _tensors(value)


def _copy_rows(tensor: torch.Tensor, patches: list[Patch], offset: int) -> torch.Tensor:
    """`_apply` within the tensor itself."""
    for patch in patches:
        for row in patch.rows:
            tensor[row + offset] = tensor[patch.value + offset]
    return tensor


def _apply(tensor: torch.Tensor, patches: list[Patch], offset: int) -> torch.Tensor:
    """The patched output; values to copy are read from the output as it was before any patch."""
    out = tensor.clone()
    for patch in patches:
        rows = [r + offset for r in patch.rows] if patch.rows is not None else range(offset, len(tensor))
        rows = torch.as_tensor(list(rows), device=tensor.device)
        place: tuple = (
            (rows,)
            if patch.at is None
            else (rows[:, None], torch.as_tensor(patch.at, device=tensor.device)[None])
        )
        out[place] = _new_value(patch, tensor, out[place], offset)
    return out


def _new_value(patch: Patch, before: torch.Tensor, now: torch.Tensor, offset: int) -> torch.Tensor:
    if patch.do == "zero":
        return torch.zeros_like(now)
    if patch.do == "copy" and isinstance(patch.value, int):
        source = before[patch.value + offset]
        source = source if patch.at is None else source[torch.as_tensor(patch.at, device=before.device)]
        return source[None].expand_as(now)
    value = torch.as_tensor(patch.value, dtype=now.dtype, device=now.device)
    if patch.do == "copy":
        return value.expand_as(now)
    if patch.do == "add":
        return now + value
    if patch.do == "scale":
        return now * value
    raise ValueError(f"unknown patch {patch.do!r}: zero, add, scale or copy, or hold for a whole site")


@contextmanager
def changed(
    before: Mapping[nn.Module, Callable[[Any], Any]], after: Mapping[nn.Module, Callable[[Any, Any], Any]]
) -> Iterator[None]:
    """Calls before[module](what it reads) and after[module](what it reads, what it gives) while the block
    lasts; what a function returns, unless None, takes that place. Of several arguments or results the first.
    """
    handles = []
    try:
        for module, see in before.items():
            handles.append(module.register_forward_pre_hook(_before(see)))
        for module, see in after.items():
            handles.append(module.register_forward_hook(_after(see)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(see: Callable[[Any], Any]) -> Callable:
    def hook(module: nn.Module, args: Any) -> Any:
        new = see(args[0])
        return None if new is None else (new, *args[1:])

    return hook


def _after(see: Callable[[Any, Any], Any]) -> Callable:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        whole = isinstance(output, tuple)
        new = see(args[0] if args else None, output[0] if whole else output)
        return None if new is None else (new, *output[1:]) if whole else new

    return hook


def execution_order(modules: Mapping[str, nn.Module], call: Callable[[], Any]) -> list[str]:
    """Names of `modules` in the order in which `call()` first runs them; modules that do not run are left
    out."""
    order: list[str] = []
    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(lambda m, a, name=name: order.append(name)))
        call()
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))


def hook_count(module: nn.Module) -> int:
    """How many of our hooks are registered anywhere below `module` (for tests and checks: 0 when nothing
    runs).

    transformers leaves hooks of its own behind, which only read.
    """
    return sum(
        getattr(hook, "__module__", None) == __name__
        for m in module.modules()
        for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    )
