"""How far to trust the ranking of components: small random ViTs in which one known head writes a direction.

The planted head writes a class direction d of the representation, as far as one of its values says. All other
heads are decoys of equal size: they write d but the same for every image (constant), write d in pairs that
cancel each other, or write elsewhere (off). A model without a plant has a decoy in that place. Every head of
every family is planted in turn; shares come with Wilson's 95 % interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from studio.atlas.plants import draws
from studio.methods.component_placebo import Placebo
from studio.methods.component_roles import roles
from studio.models.corpus import Statistics
from studio.models.decomposition import Decomposition, head_labels
from studio.models.vit_layouts import Attention
from studio.models.vit_paths import AttentionPool
from studio.models.vit_timm import timm_layout
from studio.planted import Answer, Say, Trial, is_hit, ranked, row

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}
_SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (2, 2, 1), "num_heads": (2, 3, 4)}
_MAXVIT = {
    "img_size": 32,
    "embed_dim": (24, 48),
    "depths": (1, 1),
    "block_type": ("M", "M"),
    "stem_width": 16,
}
_WINDOWS = {"transformer_dim_head": 12, "transformer_window_size": (4, 4), "num_classes": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", _VIT),
    "mean pooling": ("vit_tiny_patch16_224", {**_VIT, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {**_VIT, "reg_tokens": 4}),
    "attention pool": ("vit_tiny_patch16_224", {**_VIT, "global_pool": "map"}),
    "LayerScale": ("deit3_small_patch16_224", {**_VIT, "init_values": 0.2}),
    "Swin": ("swin_tiny_patch4_window7_224", {**_SWIN, "window_size": 4, "num_classes": 0}),
    "MaxViT": ("maxvit_nano_rw_256", {**_MAXVIT, **_WINDOWS}),
}
IMAGES = 96
ROUNDS = 6  # of setting all heads to the same size
STEP = 8.0  # most that one round changes
SURE = 0.5  # a ranking stands by a first component with more than this share


@dataclass(frozen=True, eq=False)
class Role:
    """What a head is made to do: "plant", "constant", "cancel" (with the sign) or "off"."""

    kind: str
    sign: float = 1.0
    twin: int | None = None  # the head whose queries, keys and values it copies


class Grown:
    """One random model with its roles laid in; head: the planted label, or where it would be."""

    def __init__(self, family: str, head: str, planted: bool, seed: int) -> None:
        import timm

        self.draw = draws(seed)
        name, options = FAMILIES[family]
        with torch.random.fork_rng(devices=[]):
            self.net = _lively(timm.create_model(name, **options).eval(), self.draw)
        self.whole = Decomposition(timm_layout(family, self.net), torch.device("cpu"))
        coarse = self._noise(IMAGES, 3, 8, 8)
        self.pixels = nn.functional.interpolate(coarse, size=32, mode="bilinear")
        self.pools = isinstance(self.whole.layout.path, AttentionPool)
        found = self._noise(self.whole.maps[-1].shape[-1])
        if self.pools:  # what its first head can write
            first = self.whole.maps[-1][0].float()
            found = found @ first.pinverse() @ first
        self.direction = nn.functional.normalize(found, dim=0)
        self.roles: dict[str, Role] = {}
        self.size = float(self.whole.run(self.pixels).representation.var(0, unbiased=False).sum().sqrt())
        for part in self.whole.layout.attentions:
            self._cast(part, head, planted)
        self._even()

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.draw.normal(size=shape)).float()

    @torch.no_grad()
    def _cast(self, part: Attention, head: str, planted: bool) -> None:
        """Gives every head of an attention its role and lays it into the weights."""
        names = head_labels(part)
        free = [h for h in self.draw.permutation(part.heads).tolist() if names[h] != head]
        roles = {}
        if head in names:
            roles[names.index(head)] = Role("plant" if planted else "off")
        if len(free) >= 2:
            one, two = free.pop(), free.pop()
            roles |= {one: Role("cancel"), two: Role("cancel", -1.0, one)}
        for h in free:
            roles[h] = Role(("constant", "off")[int(self.draw.integers(2))])
        reads = {
            h: nn.functional.normalize(self._noise(part.out.in_features // part.heads), dim=0) for h in roles
        }
        for h, role in sorted(roles.items(), key=lambda item: item[1].twin is not None):
            self.roles[names[h]] = role
            self._lay(part, h, role, reads[h if role.twin is None else role.twin])

    def _lay(self, part: Attention, h: int, role: Role, read: torch.Tensor) -> None:
        maps = self.whole.maps[part.stage]  # (classes, width, dim)
        size = len(read)
        weight, bias = (_by_head(p, part, self._owner(part)) for p in part.sources[-1].parameters())
        if role.kind == "constant":
            weight[2, h] = 0
            bias[2, h] = read
        if role.twin is not None:
            weight[:, h], bias[:, h] = weight[:, role.twin].clone(), bias[:, role.twin].clone()
            self._copy_places(part, h, role.twin)
        written = nn.functional.normalize(self._towards(maps), dim=0)
        if role.kind == "off":
            written = self._elsewhere(maps, written)
        written = role.sign * written if part.gain is None else role.sign * written / part.gain
        part.out.weight.unflatten(1, (part.heads, size))[:, h] = torch.outer(written, read)

    def _towards(self, maps: torch.Tensor) -> torch.Tensor:
        """A vector (width,) that becomes the direction: through the sum of all classes of places, or in an
        attention pool, whose heads are the classes, through the first head and no other."""
        if not self.pools:
            return torch.linalg.pinv(maps.sum(0).double().T, rtol=1e-4).float() @ self.direction
        wanted = torch.zeros(maps.shape[0], maps.shape[2], dtype=torch.float64)
        wanted[0] = self.direction
        return (
            torch.linalg.pinv(maps.double().transpose(1, 2).flatten(0, 1), rtol=1e-4) @ wanted.flatten()
        ).float()

    def _elsewhere(self, maps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A vector as long as `like` that no class of places turns into the direction."""
        found = self._noise(len(like))
        axes = torch.linalg.qr((maps @ self.direction).T)[0]  # (width, classes)
        found = found - axes @ (axes.T @ found)
        return found * like.norm() / found.norm()

    def _owner(self, part: Attention) -> nn.Module:
        """The attention module whose last matrix is the part's."""
        return next(m for m in self.net.modules() if getattr(m, "proj", None) is part.out)

    def _copy_places(self, part: Attention, h: int, twin: int) -> None:
        for module in self._owner(part).modules():  # Swin's own table, MaxViT's in a module of it
            if (table := getattr(module, "relative_position_bias_table", None)) is not None:
                table[:, h] = table[:, twin]

    @torch.no_grad()
    def _even(self) -> None:
        """Makes all heads write as much: what varies of plants, pairs and off, the mean of constants."""
        for _ in range(ROUNDS):
            found = self.whole.run(self.pixels).components
            for part in self.whole.layout.attentions:
                blocks = part.out.weight.unflatten(1, (part.heads, -1))
                for h, name in enumerate(head_labels(part)):
                    owner = head_labels(part)[h if self.roles[name].twin is None else self.roles[name].twin]
                    x, constant = found[owner], self.roles[name].kind == "constant"
                    now = x.mean(0).norm() if constant else x.var(0, unbiased=False).sum().sqrt()
                    blocks[:, h] *= (self.size / now).clamp(1 / STEP, STEP)

    def components(self) -> dict[str, np.ndarray]:
        """All components (IMAGES, dim) in the model's own space."""
        return {k: v.double().numpy() for k, v in self.whole.run(self.pixels).components.items()}

    def statistics(self) -> Statistics:
        """Covariances of all components over the images."""
        x = self.components()
        z = sum(x.values())
        means = {k: v.mean(0) for k, v in x.items()}
        off = {k: v - means[k] for k, v in x.items()}
        whole = z - z.mean(0)
        squares = {k: v.T @ v / IMAGES for k, v in off.items()}
        crosses = {k: v.T @ whole / IMAGES for k, v in off.items()}
        return Statistics(IMAGES, means, squares, crosses, z.mean(0), whole.T @ whole / IMAGES)


def _by_head(p: torch.Tensor, part: Attention, owner: nn.Module) -> torch.Tensor:
    """A view (3, heads, size, …) of the rows of a matrix, or of a bias, of queries, keys and values."""
    size = part.out.in_features // part.heads
    if getattr(owner, "head_first", False):  # MaxViT has q, k, v of one head after the other
        return p.unflatten(0, (part.heads, 3, size)).transpose(0, 1)
    return p.unflatten(0, (3, part.heads, size))


class _Vectors:
    """A space whose components are vectors as they are."""

    def __init__(self, dim: int) -> None:
        self.eye = np.eye(dim)

    def matrix(self, label: str) -> np.ndarray:
        """The identity."""
        return self.eye


def _lively(net: nn.Module, draw: Any) -> nn.Module:
    """Every matrix and token drawn anew, matrices as large as in trained models, so that heads see images;
    biases small but not zero."""
    with torch.no_grad():
        for module in net.modules():
            matrix = isinstance(module, (nn.Linear, nn.Conv2d))
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.copy_(torch.from_numpy(draw.normal(size=len(module.bias))) * 0.02)
            for p in module.parameters(recurse=False):
                if p.ndim >= 2:
                    size = p[0].numel() ** -0.5 if matrix else 0.02
                    p.copy_(torch.from_numpy(draw.normal(size=tuple(p.shape))) * size)
    return net.requires_grad_(False)


def rankings(grown: Grown) -> dict[str, Answer]:
    """Components by share and net share (rank-components), by the published correlation and by mean score
    (decompose). Only the net share has a line that random directions reach."""
    found, d = grown.statistics(), grown.direction.double().numpy()
    got = roles(_Vectors(len(d)), found, d[None])
    names = tuple(found.covariances)
    mean = np.array([found.means[n] @ d for n in names])
    placebo = Placebo({"d": d[None]}, len(d))
    placebo.add(grown.components())
    (net,), (line,) = placebo.result()
    sure = {
        "share": bool(got["score"].max() > SURE and got["within"][got["score"].argmax()] > SURE),
        "net share": bool(net.max() > line),
        "correlation": bool(got["correlation"].max() > SURE),
        "mean score": bool(mean.max() > SURE * np.abs(mean).sum()),
    }
    values = {"share": got["score"], "net share": net, "correlation": got["correlation"], "mean score": mean}
    return {k: Answer(ranked(names, v), sure[k]) for k, v in values.items()}


def heads_of(family: str) -> tuple[str, ...]:
    """Labels of all heads of a family, in forward order."""
    import timm

    name, options = FAMILIES[family]
    layout = timm_layout(family, timm.create_model(name, **options).requires_grad_(False))
    return tuple(label for part in layout.attentions for label in head_labels(part))


def measure_vision(
    say: Say, seeds: int = 4, families: tuple[str, ...] = tuple(FAMILIES)
) -> list[dict[str, Any]]:
    """Every head of every family planted `seeds` times, and as many models without a plant: rows of the
    benchmark."""
    out: list[dict[str, Any]] = []
    for family in families:
        trials = []
        for i, head in enumerate(heads_of(family)):
            for seed in range(seeds):
                for planted in (True, False):
                    answers = rankings(Grown(family, head, planted, 1000 * i + seed))
                    trials.append(Trial((head,) if planted else (), answers, (head,)))
        say(f"planted vision, {family}: {len(trials)} models")
        out += _rows(f"planted vision, {family}", trials)
    return out


def _rows(title: str, trials: list[Trial]) -> list[dict[str, Any]]:
    found = []
    for name in trials[0].answers:
        mine, none = ([t for t in trials if bool(t.layers) == has] for has in (True, False))
        hits = [is_hit(t, name) for t in mine]
        sure = [h and t.answers[name].found for h, t in zip(hits, mine, strict=True)]
        alarms = [t.answers[name].found for t in none]
        habit = [is_hit(t, name) for t in none]
        how = "the planted head is its first component"
        found.append(row(f"{title}, {name}: hits", hits, "of plants", how))
        found.append(row(f"{title}, {name}: sure hits", sure, "of plants", f"{how}, and it stands by it"))
        how = "it stands by a component where nothing is planted"
        found.append(row(f"{title}, {name}: false alarms", alarms, "of models without a plant", how))
        how = "its first is the head that would be planted, though it is not"
        found.append(row(f"{title}, {name}: right by habit", habit, "of models without a plant", how))
    return found
