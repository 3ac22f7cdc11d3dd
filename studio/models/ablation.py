"""Mean ablation of a vision transformer's branches: what a head or an MLP gives is replaced by its mean.

Two effects. Direct: z - sum_i (c_i - mean c_i), from the decomposition, without a forward. True: at every
place (token, or window and token) the output of head i before the output matrix, or of branch i, is the mean
over the reference images at that place, and all that comes after runs on it. arXiv 2310.05916, 2406.01583.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from studio.errors import RequestError
from studio.models.decomposition import head_labels
from studio.models.hooks import changed
from studio.models.vit_layouts import Attention, Layout, Write

Branch = tuple[Attention | Write, int | None]
_WHOLE = re.compile(r"(.+)\.attention")


def branches(layout: Layout) -> dict[str, Branch]:
    """{label: (branch, its head or None)} of all that can be ablated, in forward order."""
    found: dict[str, Branch] = {}
    for part in layout.parts:
        if isinstance(part, Attention):
            found |= {label: (part, h) for h, label in enumerate(head_labels(part))}
        else:
            found[part.label] = (part, None)
    return found


def named_branches(model: str, layout: Layout, names: Sequence[str]) -> tuple[str, ...]:
    """Labels of the branches named, each once; block.3.attention stands for all heads of it. RequestError for
    a name that is none."""
    known = branches(layout)
    found: dict[str, None] = {}
    for name in names:
        whole = _WHOLE.fullmatch(name)
        heads = [x for x in known if whole and re.fullmatch(rf"{re.escape(whole[1])}\.head\.\d+", x)]
        if name not in known and not heads:
            why = "is a constant or the input itself" if _constant(name) else "is not there"
            raise RequestError(
                f"--components: {name[:60]!r} can't be ablated in {model}: it {why}; name heads, all heads "
                f"of a block, or branches, such as {', '.join(_examples(known))}."
            )
        found |= dict.fromkeys([name] if name in known else heads)
    return tuple(found)


def _constant(name: str) -> bool:
    return name == "embedding" or name.endswith("bias")


def _examples(known: Mapping[str, Branch]) -> list[str]:
    head = next((x for x, (_, h) in known.items() if h is not None), None)
    branch = next((x for x, (_, h) in known.items() if h is None), None)
    return [x for x in (head, head and head.split(".head.")[0] + ".attention", branch) if x]


class OutputMeans:
    """Running means of what branches give, at every place."""

    def __init__(self, layout: Layout, labels: Sequence[str]) -> None:
        known = branches(layout)
        self._parts = {label: known[label] for label in labels}
        self._sums: dict[str, torch.Tensor] = {}
        self.count = 0

    @contextmanager
    def counting(self, images: int) -> Iterator[None]:
        """Adds one forward of so many images, run within the block."""
        before, after = {}, {}
        for module, heads in _by_module(self._parts).items():
            if isinstance(heads, str):
                after[module] = lambda x, out, label=heads: self._add(label, out, images)
            else:
                before[module] = lambda x, heads=heads: self._heads(x, heads, images)
        with changed(before, after):
            yield
        self.count += images

    def means(self) -> dict[str, torch.Tensor]:
        """By label, float64: of a head (rows an image, places, head size), of a branch (rows an image, …)."""
        return {label: self._sums[label] / self.count for label in self._parts}

    def _heads(self, x: torch.Tensor, heads: Mapping[str, tuple[int, int]], images: int) -> None:
        for label, (h, count) in heads.items():
            self._add(label, x.unflatten(-1, (count, -1))[..., h, :], images)

    def _add(self, label: str, x: torch.Tensor, images: int) -> None:
        added = x.detach().cpu().double().unflatten(0, (images, -1)).sum(0)
        self._sums[label] = self._sums[label] + added if label in self._sums else added


@contextmanager
def ablated(layout: Layout, means: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While the block lasts, the branches of `means` (as of OutputMeans) give their means for every image."""
    known = branches(layout)
    before, after = {}, {}
    for module, heads in _by_module({label: known[label] for label in means}).items():
        if isinstance(heads, str):
            after[module] = lambda x, out, label=heads: _repeated(means[label], out)
        else:
            before[module] = lambda x, heads=heads: _replaced(x, heads, means)
    with changed(before, after):
        yield


def _by_module(parts: Mapping[str, Branch]) -> dict:
    """{module: the label of its branch, or {label: (head, heads)} of those that it reads}."""
    found: dict = {}
    for label, (part, head) in parts.items():
        if isinstance(part, Attention):
            found.setdefault(part.out, {})[label] = (head, part.heads)
        else:
            found[part.module] = label
    return found


def _replaced(
    x: torch.Tensor, heads: Mapping[str, tuple[int, int]], means: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    y = x
    for label, (h, count) in heads.items():
        y = y.unflatten(-1, (count, -1)).clone()
        y[..., h, :] = _repeated(means[label], y[..., h, :])
        y = y.flatten(-2)
    return y


def _repeated(mean: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The mean of one image's rows for all images."""
    times = [len(like) // len(mean)] + [1] * (mean.ndim - 1)
    return mean.to(like.device, like.dtype).repeat(times)
