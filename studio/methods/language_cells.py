"""Cells of a language model's causal trace: which of them need a run, in which order, and what that costs.

A cell is a kind of state ("hidden", "attention", "mlp"), a layer and a token. Hidden states are restored in
one layer, outputs of attention and MLP in a window of layers [max(0, l - w // 2), min(L, l + ceil(w / 2))).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studio.models.language_sweep import Stem

KINDS = ("hidden", "attention", "mlp")
FIRST_SAMPLES = 3  # samples of the first look
_TOKENS_PER_ROW = 128  # of a batch: what is asked for in rows is meant for whole prompts
_ATTENTION = 2**26  # attention weights that are held at once

Cell = tuple[str, int, int]
Run = tuple[str, int, int, int]  # kind, token, first layer that is restored, layer after the last


def window(kind: str, layer: int, width: int, layers: int) -> tuple[int, int]:
    """(first layer, layer after the last) whose outputs are restored together."""
    if kind == "hidden":
        return layer, layer + 1
    return max(0, layer - width // 2), min(layers, layer + -(-width // 2))


@dataclass(frozen=True)
class Grid:
    """The cells of one trace. `first` is the first corrupted token; what lies before it has no effect."""

    kinds: tuple[str, ...]
    layers: int
    length: int
    first: int
    width: int

    def run_of(self, cell: Cell) -> Run | None:
        """The run that measures a cell; None for cells whose value is known without one."""
        kind, layer, token = cell
        start, end = window(kind, layer, self.width, self.layers)
        last = self.layers - 1
        if token < self.first or (start == last and (kind == "hidden" or token < self.length - 1)):
            return None  # of the last layer only the last token is read
        return kind, token, start, end

    def is_clean(self, cell: Cell) -> bool:
        """Whether restoring the cell gives the clean output: the last token after the last layer."""
        return cell == ("hidden", self.layers - 1, self.length - 1)

    def cells(self) -> list[Cell]:
        """Every cell."""
        return [(k, m, t) for k in self.kinds for m in range(self.layers) for t in range(self.length)]

    def stems(self, cells: Sequence[Cell]) -> list[Stem]:
        """The runs of cells, those that begin alike as one, tokens in the order in which they come."""
        from studio.models.language_sweep import Stem

        ends: dict[tuple[int, str, int], set[int]] = {}
        for cell in cells:
            if (run := self.run_of(cell)) is not None:
                ends.setdefault((run[1], run[0], run[2]), set()).add(run[3])
        place = {token: i for i, token in enumerate(dict.fromkeys(t for _, _, t in cells))}
        order = sorted(ends, key=lambda s: (place[s[0]], KINDS.index(s[1]), s[2]))
        return [Stem(k, t, start, tuple(sorted(ends[t, k, start]))) for t, k, start in order]


def stages(grid: Grid, samples: int, shown: Sequence[int]) -> Iterator[tuple[range, list[Cell]]]:
    """(samples, cells) in the order of measuring: a few samples of every second layer at the tokens `shown`,
    then their other cells, then the other samples of all."""
    few, every = range(min(FIRST_SAMPLES, samples)), grid.cells()
    every.sort(key=lambda cell: cell[2] not in shown)
    coarse = [c for c in every if c[2] in shown and (grid.layers - 1 - c[1]) % 2 == 0]
    done = set(coarse)
    yield few, coarse
    yield few, [c for c in every if c not in done]
    if samples > len(few):
        yield range(len(few), samples), every


def batches(grid: Grid, stems: Sequence[Stem], samples: int, rows: int) -> Iterator[list[Stem]]:
    """Stems in groups whose runs together have at most `rows` tokens, or one stem alone."""
    batch: list[Stem] = []
    size = 0
    for stem in stems:
        more = samples * len(stem.ends) * (grid.length - stem.token)
        if batch and size + more > rows:
            yield batch
            batch, size = [], 0
        batch.append(stem)
        size += more
    if batch:
        yield batch


def batch_rows(rows: int, heads: int, length: int) -> int:
    """Tokens of one batch, over all its runs, for so many rows of a forward."""
    return min(rows * _TOKENS_PER_ROW, max(1, _ATTENTION // (heads * length)))


def restored(
    runs: Any, base: Sequence[Any], grid: Grid, cells: Sequence[Cell], rows: int
) -> Iterator[list[tuple[list[Cell], Any]]]:
    """The cells that need a run, with the states restored in the runs `base`, a batch of at most `rows`
    tokens at a time: (cells that are one run, its logits (samples, vocabulary))."""
    from studio.models.language_sweep import Sweep

    places: dict[Run, list[Cell]] = {}
    for cell in cells:
        if (run := grid.run_of(cell)) is not None:
            places.setdefault(run, []).append(cell)
    for batch in batches(grid, grid.stems(cells), len(base[0].h), rows):
        found = Sweep(runs, base, batch).logits()
        yield [(places[stem.kind, stem.token, stem.first, end], logits) for stem, end, logits in found]


@dataclass(frozen=True)
class Costs:
    """Multiplications and additions a token: of the projections to queries, keys and values, of what follows
    them in a block, and of the head."""

    projections: int
    rest: int
    head: int

    @classmethod
    def of(cls, model: Any, length: int) -> Costs:
        """From the sizes of a model's matrices, at a prompt's length."""
        block = sum(_weights(m) for m in (model.attention(0), model.mlp(0)))
        out = model.attention_out(0)[0].numel()
        heads, _, size = model.heads
        projections = _weights(model.attention(0)) - out
        rest = block - projections + 2 * heads * size * length
        return cls(2 * projections, 2 * rest, 2 * _weights(model.head))

    def whole(self, grid: Grid) -> int:
        """One whole forward that reads the last token."""
        return grid.length * grid.layers * (self.projections + self.rest) + self.head

    def stem(self, grid: Grid, stem: Stem) -> int:
        """All runs of a stem, for one sample."""
        n, held = grid.length - stem.token, stem.kind != "hidden"
        total = self.rest if held else 0  # where it starts, one token's MLP
        for end in stem.ends:
            trunk = end == stem.ends[-1]
            joins = stem.first + 1 if trunk else end
            layers = grid.layers - joins
            if layers > 0:
                known = n - held if trunk else 0  # tokens whose projections are known where it joins
                total += (layers * n - known) * self.projections + ((layers - 1) * n + 1) * self.rest
            total += self.head
        return total


def estimate(grid: Grid, costs: Costs, samples: int) -> tuple[int, int]:
    """(floating-point operations of the trace, those of one whole forward a cell and sample)."""
    cells = grid.cells()
    stems = sum(costs.stem(grid, stem) for stem in grid.stems(cells))
    base = (grid.length - grid.first) * grid.layers * (costs.projections + costs.rest) + costs.head
    return costs.whole(grid) + samples * (base + stems), (len(cells) + 1) * samples * costs.whole(grid)


def _weights(module: Any) -> int:
    """Entries of a module's matrices."""
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)
