"""One sweep up the layers of a language model that restores many states at once (see language_runs.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from studio.models.language_runs import Held, Layer, PromptRuns
from studio.models.prompt_attention import attend, attend_last

Tensor = torch.Tensor
_LOGITS = 2**25  # that are held at once


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
    """All worlds of one token. `h` (worlds, samples, tokens from it on, D) goes into the next layer; `fresh`
    holds worlds that began at the layer before, with their state at the token (samples, D)."""

    token: int
    stems: list[Stem]
    worlds: list[_World] = field(default_factory=list)
    h: Tensor | None = None
    fresh: list[tuple[_World, Tensor]] = field(default_factory=list)


@dataclass
class _Part:
    """Worlds of one group at one layer: input `h` and queries of the tokens whose output is read (worlds,
    samples, queries, …), keys and values of all its tokens; on the last layer what the values are made from
    (worlds, samples, tokens, D) may stand in their place."""

    group: _Group
    worlds: list[_World]
    h: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


class Sweep:
    """Restores the states of `stems` in the runs `base` (of PromptRuns.run), in one pass up the layers."""

    def __init__(self, runs: PromptRuns, base: Sequence[Layer], stems: Sequence[Stem]) -> None:
        self.runs, self.base, self.samples = runs, base, len(base[0].h)
        tokens = dict.fromkeys(stem.token for stem in stems)
        self.groups = [_Group(t, [s for s in stems if s.token == t]) for t in tokens]

    def logits(self) -> Iterator[tuple[Stem, int, Tensor]]:
        """(stem, its end, logits (samples, vocabulary) float32) of every run."""
        begin = min(stem.first for group in self.groups for stem in group.stems)
        for layer in range(begin, self.runs.blocks.count):
            self.runs.pulse()
            self._through(layer)
        worlds = [w for g in self.groups for w in (*g.worlds, *(new for new, _ in g.fresh))]
        rows = [
            h
            for g in self.groups
            for h in ([] if g.h is None else [g.h[:, :, -1]]) + [h[None] for _, h in g.fresh]
        ]
        vocabulary = len(self.runs.logits)
        size = max(1, _LOGITS // (vocabulary * self.samples))
        for some, at in zip(torch.cat(rows).split(size), range(0, len(worlds), size), strict=True):
            found = self.runs.blocks.logits(some.flatten(0, 1)).view(-1, self.samples, vocabulary)
            for world, logits in zip(worlds[at : at + size], found, strict=True):
                yield world.stem, world.ends[0], logits

    # ---- one layer ----------------------------------------------------------------------------------------

    def _through(self, layer: int) -> None:
        """Takes every group through one layer."""
        for group in self.groups:
            _branch(group, layer)
        parts = [*self._under_way(layer), *self._beginning(layer)]
        parts.sort(key=lambda part: self.groups.index(part.group))
        starts = [(g, s) for g in self.groups for s in g.stems if s.first == layer and s.kind != "hidden"]
        if not starts and not parts:
            return
        h, added = self._attended(layer, parts, starts)
        if (held := self._held(layer, "attention", parts, [])) is not None:
            added[held[0]] = held[1]
        out = self.runs.blocks.finish(layer, h, added, self._held(layer, "mlp", parts, starts))
        at = 0
        for group in self.groups:
            mine = [part for part in parts if part.group is group]
            group.worlds, group.fresh = [world for part in mine for world in part.worlds], []
            if mine:
                shape = (len(group.worlds), *mine[0].h.shape[1:])
                rows = len(group.worlds) * mine[0].h.shape[1:3].numel()
                group.h, at = out[at : at + rows].view(shape), at + rows
        for group, stem in starts:
            group.fresh += [(world, out[at : at + self.samples]) for world in _split(stem, layer + 1)]
            at += self.samples

    def _attended(
        self, layer: int, parts: list[_Part], starts: list[tuple[_Group, Stem]]
    ) -> tuple[Tensor, Tensor]:
        """(input, what attention adds) of the rows of all parts, then of the tokens where a stem starts."""
        runs, base, heads = self.runs, self.base[layer], []
        k0, v0 = (
            torch.cat([past.expand(self.samples, -1, -1, -1), own.transpose(1, 2)], 2)
            for past, own in zip(runs.past[layer], (base.k, base.v), strict=True)
        )
        for part in parts:
            t = part.group.token
            unseen = runs.unseen(layer, runs.length - part.q.shape[2], t)
            past = k0[:, :, :t], v0[:, :, :t]
            given = part.q, (part.k, part.v), past, runs.scales[layer], unseen
            made = part.v.dim() == part.k.dim()
            heads.append(attend(*given) if made else attend_last(*given, *runs.blocks.values(layer)))
        h = [part.h.reshape(-1, part.h.shape[-1]) for part in parts]
        added = [runs.blocks.out(layer, torch.cat(heads))] if heads else []
        for group, stem in starts:
            i = group.token - runs.first
            source = runs.clean[layer] if stem.kind == "attention" else base
            h.append(base.h[:, i])
            added.append(source.attention[:, i].expand(self.samples, -1))
        return torch.cat(h), torch.cat(added) if starts else added[0]

    def _held(
        self, layer: int, kind: str, parts: list[_Part], starts: list[tuple[_Group, Stem]]
    ) -> Held | None:
        """Rows whose output of `kind` is restored at this layer, and their clean values; None for none."""
        clean, at, rows, tokens = self.runs.clean[layer], 0, [], []
        for part in parts:
            worlds, samples, queries = part.h.shape[:3]
            # of the last layer, earlier tokens are not read
            read = queries == self.runs.length - part.group.token
            for i, world in enumerate(part.worlds):
                if read and world.holds(layer, kind):
                    rows += range(at + i * samples * queries, at + (i + 1) * samples * queries, queries)
                    tokens += [part.group.token] * samples
            at += worlds * samples * queries
        for group, stem in starts:
            if stem.kind == kind:
                rows += range(at, at + self.samples)
                tokens += [group.token] * self.samples
            at += self.samples
        if not rows:
            return None
        values = clean.attention if kind == "attention" else clean.mlp
        places = torch.tensor(tokens, device=values.device) - self.runs.first
        return torch.tensor(rows, device=values.device), values[0, places]

    # ---- who is under way ---------------------------------------------------------------------------------

    def _under_way(self, layer: int) -> list[_Part]:
        """The worlds that came up from the layer before, with queries, keys and values projected."""
        groups = [group for group in self.groups if group.h is not None]
        if not groups:
            return []
        flats = [group.h.reshape(-1, group.h.shape[-1]) for group in groups]
        places = [self.runs.places(g.h.shape[:2].numel(), g.token) for g in groups]
        sizes, flat, at = list(map(len, flats)), _joined(flats), torch.cat(places)
        if layer < self.runs.blocks.count - 1 or (known := self.runs.blocks.keys(layer, flat, at)) is None:
            split = [x.split(sizes) for x in self.runs.blocks.project(layer, flat, at)]
        else:  # of the last layer only the last token's queries are read
            last = [g.h[:, :, -1].reshape(-1, flat.shape[1]) for g in groups]
            end = torch.full((sum(map(len, last)),), self.runs.length - 1, device=flat.device)
            q = self.runs.blocks.project(layer, torch.cat(last), end)[0].split(list(map(len, last)))
            split = [q, *(x.split(sizes) for x in reversed(known))]
        return [
            self._part(layer, g, g.worlds, g.h, *(x.view(*g.h.shape[:2], -1, *x.shape[1:]) for x in qkv))
            for g, qkv in zip(groups, zip(*split, strict=True), strict=True)
        ]

    def _beginning(self, layer: int) -> list[_Part]:
        """The worlds that begin with this layer: one token's state is restored or follows from what was,
        later tokens are as in `base`, whose queries, keys and values are known."""
        runs, clean, base, parts = self.runs, self.runs.clean[layer], self.base[layer], []
        fresh = [(group, world, h) for group in self.groups for world, h in group.fresh]
        begins = []
        if fresh:
            places = [torch.full((self.samples,), g.token, device=h.device) for g, _, h in fresh]
            found = runs.blocks.project(layer, torch.cat([h for *_, h in fresh]), torch.cat(places))
            split = (x.split(self.samples) for x in found)
            begins = [
                (g, w, (h, *qkv)) for (g, w, h), qkv in zip(fresh, zip(*split, strict=True), strict=True)
            ]
        for group in self.groups:
            i = group.token - runs.first
            for stem in group.stems:
                if stem.kind == "hidden" and stem.first == layer - 1:
                    states = tuple(x[:, i] for x in (clean.h, clean.q, clean.k, clean.v))
                    begins.append((group, _World(stem, stem.ends), states))
        for group, world, states in begins:
            later = (x[:, group.token - runs.first + 1 :] for x in (base.h, base.q, base.k, base.v))
            whole = (
                torch.cat([x.expand(self.samples, *x.shape[1:])[:, None], rest], 1)[None]
                for x, rest in zip(states, later, strict=True)
            )
            parts.append(self._part(layer, group, [world], *whole))
        return parts

    def _part(
        self, layer: int, group: _Group, worlds: list[_World], h: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> _Part:
        """Of the last layer only the last token is read."""
        if layer == self.runs.blocks.count - 1:
            h, q = h[:, :, -1:], q[:, :, -1:]
        return _Part(group, worlds, h, q, k, v)


def _joined(flats: list[Tensor]) -> Tensor:
    """Rows one after another; without a copy where they lie so already."""
    first, size = flats[0], sum(map(len, flats))
    at = first.data_ptr()
    for flat in flats:
        if flat.data_ptr() != at or flat.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(flats)
        at += flat.numel() * flat.element_size()
    return first.as_strided((size, first.shape[1]), first.stride())


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
            group.h = torch.cat([group.h, group.h[i : i + 1]])
