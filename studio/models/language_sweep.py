"""One sweep up the layers of a language model that restores many states at once (see language_runs.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from studio.models.language_runs import Layer, SuffixRuns, attend

Tensor = torch.Tensor


@dataclass(frozen=True)
class Stem:
    """States restored together: the output of `kind` ("hidden", "attention", "mlp") at token `token` of the
    layers from `first` on, once up to each of the layers `ends` (not included, ascending). Runs that begin
    alike are one until the first of them ends."""

    kind: str
    token: int
    first: int
    ends: tuple[int, ...]


@dataclass
class _World:
    """One row of a sweep: a stem under way, which of its ends is next, and the layer it holds until."""

    stem: Stem
    ends: tuple[int, ...]

    def holds(self, layer: int, kind: str) -> bool:
        """Whether the output of `kind` at this layer is set to its clean value."""
        return self.stem.kind == kind != "hidden" and self.stem.first <= layer < self.ends[-1]


@dataclass
class _Group:
    """All worlds of one token. `h` (samples, worlds, tokens from it on, D) goes into the next layer; `fresh`
    holds worlds that began at the layer before, with their state at the token (samples, D)."""

    token: int
    stems: list[Stem]
    worlds: list[_World] = field(default_factory=list)
    h: Tensor | None = None
    fresh: list[tuple[_World, Tensor]] = field(default_factory=list)


@dataclass
class _Joined:
    """Worlds of one group at one layer: input `h` and queries of the tokens whose output is read (samples,
    worlds, queries, …), keys and values of all its tokens."""

    worlds: list[_World]
    h: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


class Sweep:
    """Restores the states of `stems` in the runs `base` (of SuffixRuns.run), in one pass up the layers."""

    def __init__(self, runs: SuffixRuns, base: Sequence[Layer], stems: Sequence[Stem]) -> None:
        self.runs, self.base, self.samples = runs, base, len(base[0].h)
        tokens = sorted({stem.token for stem in stems})
        self.groups = [_Group(t, [s for s in stems if s.token == t]) for t in tokens]

    def logits(self) -> Iterator[tuple[Stem, int, Tensor]]:
        """(stem, its end, logits (samples, vocabulary) float32) of every run."""
        begin = min(stem.first for group in self.groups for stem in group.stems)
        for layer in range(begin, self.runs.blocks.count):
            self.runs.pulse()
            self._through(layer)
        worlds, rows = [], []
        for group in self.groups:
            if group.h is not None:
                worlds += group.worlds
                rows.append(group.h[:, :, -1].transpose(0, 1))
            worlds += [world for world, _ in group.fresh]
            rows += [h[None] for _, h in group.fresh]
        states = torch.cat(rows)  # worlds, samples, D
        for world, row in zip(worlds, states, strict=True):
            yield world.stem, world.ends[0], self.runs.blocks.logits(row)

    # ---- one layer --------------------------------------------------------------------------------------

    def _through(self, layer: int) -> None:
        """Takes every group through one layer."""
        joined = self._join(layer)
        starts = [(g, s) for g in self.groups for s in g.stems if s.first == layer and s.kind != "hidden"]
        if not starts and not any(joined):
            return
        blocks, width = self.runs.blocks, self.base[layer].h.shape[-1]
        h, added = self._attended(layer, joined, starts)
        self._hold(layer, "attention", added, joined, [])
        out = blocks.finish(layer, h, added, lambda found: self._hold(layer, "mlp", found, joined, starts))
        at = 0
        for group, found in zip(self.groups, joined, strict=True):
            group.fresh = []
            if found is not None:
                rows = found.h.shape[:3].numel()
                group.h, group.worlds = out[at : at + rows].view(*found.h.shape[:3], width), found.worlds
                at += rows
        for group, stem in starts:
            group.fresh += [(world, out[at : at + self.samples]) for world in _split(stem, layer + 1)]
            at += self.samples

    def _attended(
        self, layer: int, joined: list[_Joined | None], starts: list[tuple[_Group, Stem]]
    ) -> tuple[Tensor, Tensor]:
        """(input, what attention adds) of the rows of all groups, then of the tokens where a stem starts."""
        runs, base, heads = self.runs, self.base[layer], []
        k0, v0 = (
            torch.cat([past.expand(self.samples, -1, -1, -1), own.transpose(1, 2)], 2)
            for past, own in zip(runs.past[layer], (base.k, base.v), strict=True)
        )
        for group, found in zip(self.groups, joined, strict=True):
            if found is not None:
                t, queries = group.token, found.q.shape[2]
                seen = runs.seen(layer, runs.length - queries, runs.length)
                past = k0[:, :, :t], v0[:, :, :t]
                z = attend(found.q, (found.k, found.v), past, runs.scales[layer], seen)
                heads.append(z.view(-1, z.shape[-1]))
        h = [found.h.reshape(-1, found.h.shape[-1]) for found in joined if found is not None]
        added = [runs.blocks.out(layer, torch.cat(heads))] if heads else []
        for group, stem in starts:
            i = group.token - runs.first
            source = runs.clean[layer] if stem.kind == "attention" else base
            h.append(base.h[:, i])
            added.append(source.attention[:, i].expand(self.samples, -1))
        return torch.cat(h), torch.cat(added) if len(added) > 1 or not heads else added[0]

    def _hold(
        self,
        layer: int,
        kind: str,
        rows: Tensor,
        joined: list[_Joined | None],
        starts: list[tuple[_Group, Stem]],
    ) -> None:
        """Sets the outputs of `kind` that are restored at this layer to their clean values, in place."""
        clean, at = self.runs.clean[layer], 0
        values = clean.attention if kind == "attention" else clean.mlp
        for group, found in zip(self.groups, joined, strict=True):
            if found is not None:
                shape, n = found.h.shape[:3], self.runs.length - group.token
                view = rows[at : at + shape.numel()].view(*shape, -1)
                held = [i for i, world in enumerate(found.worlds) if world.holds(layer, kind)]
                if held and shape[2] == n:  # of the last layer, earlier tokens are not read
                    view[:, held, 0] = values[0, group.token - self.runs.first]
                at += shape.numel()
        for group, stem in starts:
            if stem.kind == kind:
                rows[at : at + self.samples] = values[0, group.token - self.runs.first]
            at += self.samples

    # ---- who is under way -------------------------------------------------------------------------------

    def _join(self, layer: int) -> list[_Joined | None]:
        """For each group the worlds of this layer: those under way, and those that begin with it."""
        for group in self.groups:
            _branch(group, layer)
        projected = self._project(layer)
        return [self._joined(layer, group, projected) for group in self.groups]

    def _project(self, layer: int) -> Iterator[tuple[Tensor, ...]]:
        """Queries, keys and values (rows, heads, d) of every group's rows under way, then of each of its
        fresh tokens, group by group; other rows have theirs from the clean run and from `base`."""
        pieces, places = [], []
        for group in self.groups:
            n = self.runs.length - group.token
            if group.h is not None:
                flat = group.h.reshape(-1, group.h.shape[-1])
                pieces.append(flat)
                places.append(self.runs.places(len(flat) // n, group.token))
            for _, h in group.fresh:
                pieces.append(h)
                places.append(torch.full((self.samples,), group.token, device=h.device))
        if not pieces:
            return iter(())
        found = self.runs.blocks.project(layer, torch.cat(pieces), torch.cat(places))
        return zip(*(x.split([len(p) for p in pieces]) for x in found), strict=True)

    def _joined(self, layer: int, group: _Group, projected: Iterator[tuple[Tensor, ...]]) -> _Joined | None:
        """The worlds of a group at this layer, with what they give to attention."""
        runs, base, s, i = self.runs, self.base[layer], self.samples, group.token - self.runs.first
        worlds, parts = list(group.worlds), []  # (h, q, k, v) each (samples, worlds, tokens, …)
        if group.h is not None:
            shape = group.h.shape[:3]
            parts.append((group.h, *(x.view(*shape, *x.shape[1:]) for x in next(projected))))
        begins = [(w, (h, *next(projected))) for w, h in group.fresh]
        clean = runs.clean[layer]
        begins += [
            (_World(stem, stem.ends), tuple(x[:, i] for x in (clean.h, clean.q, clean.k, clean.v)))
            for stem in group.stems
            if stem.kind == "hidden" and stem.first == layer - 1
        ]
        for world, states in begins:
            worlds.append(world)
            later = (x[:, i + 1 :] for x in (base.h, base.q, base.k, base.v))
            parts.append(
                tuple(
                    torch.cat([x.expand(s, *x.shape[1:])[:, None], rest], 1)[:, None]
                    for x, rest in zip(states, later, strict=True)
                )
            )
        if not parts:
            return None
        if layer == runs.blocks.count - 1:
            parts = [(h[:, :, -1:], q[:, :, -1:], k, v) for h, q, k, v in parts]
        h, q, k, v = (torch.cat(x, 1) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
        return _Joined(worlds, h, q, k, v)


def _split(stem: Stem, layer: int) -> list[_World]:
    """The worlds of a stem that goes into `layer`: those that hold on, and the one that ends there."""
    if stem.ends[0] == layer and len(stem.ends) > 1:
        return [_World(stem, stem.ends[:1]), _World(stem, stem.ends[1:])]
    return [_World(stem, stem.ends)]


def _branch(group: _Group, layer: int) -> None:
    """Where one end of a world has come and others haven't, the run goes on twice."""
    for i, world in enumerate(list(group.worlds)):
        if world.ends[0] == layer and len(world.ends) > 1:
            group.worlds[i] = _World(world.stem, world.ends[1:])
            group.worlds.append(_World(world.stem, world.ends[:1]))
            group.h = torch.cat([group.h, group.h[:, i : i + 1]], 1)
