"""How aligners are made: one near-isometry for each component of a ViT into a CLIP's image space.

y = sum_i x_i U_i + b, x_i the coordinates of component i in an orthonormal basis of its own row space (head
size numbers for a head), so that U_i is to be semi-orthogonal; of a head's output o_i it is o_i P_i U_i with
P_i = (M_i M_i')^1/2, whose Gram is that of the head's block of the output matrix. Start: joint ridge
regression on the CLIP's unit embeddings z in closed form, then every U_i replaced by its polar factor.
Then Adam on mean(1 - cos(y, z)) + weight * mean_i |U_i'U_i - 1|^2 / size, the norm by Hutchinson's estimate
(random signs v: E |(U'U - 1) v|^2). CompAlign, arXiv 2406.01583.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import cosine_similarity, normalize

from studio.models.aligner import BIAS, REST
from studio.models.component_space import Space
from studio.models.decomposition import Parts

HELD = 10  # every tenth image is kept from the fit


@dataclass(frozen=True)
class Settings:
    """How a fit is done. ridge: lambda as a share of the mean variance of a coordinate; weight: lambda of the
    orthogonality; rate: Adam's learning rate, falling to nothing over the steps."""

    ridge: float = 0.01
    weight: float = 1.0
    steps: int = 400
    batch: int = 128
    rate: float = 3e-3
    probes: int = 16
    seed: int = 0


class Coordinates:
    """Which components have a map of their own, and their coordinates: heads and MLPs of the last `blocks`
    blocks; all others are summed into `rest`."""

    def __init__(self, space: Space, blocks: int) -> None:
        self.space = space
        layers = sorted({p.label for p in space.whole.layout.parts}, key=_block)
        last = sorted({_block(label) for label in layers} - {-1})[-blocks:]
        bias = [x for x in space.whole.labels if x.endswith(".bias")]
        self.labels = [x for x in space.whole.labels if x not in bias and _block(x) in last]
        dim = space.width
        self.roots = {x: _root(m) for x, m in space.written.items() if x in self.labels}
        self.sizes = [len(self.roots[x]) if x in self.roots else dim for x in self.labels] + [dim]

    def of(self, parts: Parts) -> torch.Tensor:
        """(N, sum of sizes) float32 on the CPU."""
        rows = []
        rest = parts.representation.double()
        for label in self.labels:
            vector = parts.components[label]
            rest = rest - vector.double()
            root = self.roots.get(label)
            rows.append(vector if root is None else parts.outputs[label] @ root)
        return torch.cat([*rows, rest.float()], 1).cpu()

    def matrices(self, maps: Sequence[torch.Tensor], bias: torch.Tensor) -> dict[str, np.ndarray]:
        """The aligner's tensors (float32) of the maps U_i and the bias, for head outputs."""
        found = {}
        for label, u in zip([*self.labels, REST], maps, strict=True):
            root = self.roots.get(label)
            found[label] = (u if root is None else root.cpu() @ u).float().numpy()
        return found | {BIAS: bias.float().numpy()}


def _block(label: str) -> int:
    """The number of a component's block; -1 outside of blocks."""
    words = label.split(".")
    return int(words[1]) if words[0] == "block" else -1


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """(M M')^1/2 (r, r) of a head's matrix M (r, dim)."""
    left, sizes, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((left * sizes) @ left.T).float()


@dataclass(eq=False)
class State:
    """A fit under way: maps (sum of sizes, width) and bias (width,), Adam's moments of both, steps done."""

    maps: torch.Tensor
    bias: torch.Tensor
    moments: list[torch.Tensor] = field(default_factory=list)
    step: int = 0


class Fit:
    """One fit of coordinates x (N, F) to unit embeddings z (N, width); sizes: how F is split."""

    def __init__(
        self, x: torch.Tensor, z: torch.Tensor, sizes: Sequence[int], settings: Settings = Settings()
    ) -> None:
        self.x, self.z, self.sizes, self.settings = x, z, list(sizes), settings

    def ridge(self) -> State:
        """The joint ridge regression with intercept, in closed form (float64 normal equations)."""
        x, z = self.x.double(), self.z.double()
        mean, middle = x.mean(0), z.mean(0)
        x = x - mean
        gram = x.T @ x
        gram.diagonal().add_(self.settings.ridge * gram.trace() / len(gram) + 1e-12)
        maps = torch.linalg.solve(gram, x.T @ (z - middle))
        return State(maps.float(), (middle - mean @ maps).float())

    def polar(self, state: State) -> State:
        """Every map replaced by its polar factor; the bias such that the means of both sides agree."""
        maps = torch.cat([polar_factor(u) for u in state.maps.split(self.sizes)])
        x, z = self.x - self.x.mean(0), self.z - self.z.mean(0)
        y = x @ maps
        scale = (y * z).sum() / z.square().sum().clamp(min=1e-12)
        return State(maps, scale * self.z.mean(0) - self.x.mean(0) @ maps)

    def random(self) -> State:
        """Random semi-orthogonal maps, for comparison."""
        return self.polar(State(random_maps(self.sizes, self.z.shape[1], self.settings.seed + 1), self.z[0]))

    def descend(self, state: State, after: Callable[[State, float], None] = lambda s, loss: None) -> State:
        """Adam from the state to the last step; `after(state, loss)` is called every 20 steps."""
        how = self.settings
        maps, bias = (t.clone().requires_grad_() for t in (state.maps, state.bias))
        adam = torch.optim.Adam([maps, bias], lr=how.rate)
        if state.moments:
            first, second = ([m.clone() for m in part] for part in (state.moments[:2], state.moments[2:]))
            for p, m, v in zip((maps, bias), first, second, strict=True):
                adam.state[p] = {"step": torch.tensor(float(state.step)), "exp_avg": m, "exp_avg_sq": v}
        for step in range(state.step, how.steps):
            generator = torch.Generator().manual_seed(how.seed * 1_000_003 + step)
            adam.param_groups[0]["lr"] = how.rate * (1 - step / how.steps)
            rows = torch.randint(len(self.x), (min(how.batch, len(self.x)),), generator=generator)
            loss = 1 - cosine_similarity(self.x[rows] @ maps + bias, self.z[rows]).mean()
            if how.weight:
                loss = loss + how.weight * self.penalty(maps, generator)
            adam.zero_grad()
            loss.backward()
            adam.step()
            if (step + 1) % 20 == 0 or step + 1 == how.steps:
                moments = [adam.state[p][k].clone() for k in ("exp_avg", "exp_avg_sq") for p in (maps, bias)]
                state = State(maps.detach().clone(), bias.detach().clone(), moments, step + 1)
                after(state, float(loss.detach()))
        return state

    def penalty(self, maps: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Hutchinson's estimate of mean_i |G_i - 1|^2 / size_i, G_i the Gram of the smaller side."""
        groups: dict[int, list[torch.Tensor]] = {}
        for u in maps.split(self.sizes):
            groups.setdefault(len(u), []).append(u)
        total = maps.new_zeros(())
        for size, members in groups.items():
            u = torch.stack(members)
            u = u if size >= maps.shape[1] else u.transpose(1, 2)  # (n, longer, shorter)
            signs = torch.randint(0, 2, (len(u), u.shape[2], self.settings.probes), generator=generator)
            v = signs.to(maps.dtype) * 2 - 1
            left = u.transpose(1, 2) @ (u @ v) - v
            total = total + left.square().sum((1, 2)).sum() / self.settings.probes / u.shape[2]
        return total / len(self.sizes)

    def isometry(self, maps: torch.Tensor) -> float:
        """The exact value that `penalty` estimates."""
        found = []
        for u in maps.split(self.sizes):
            gram = u.T @ u if len(u) >= u.shape[1] else u @ u.T
            found.append(float((gram - torch.eye(len(gram))).square().sum() / len(gram)))
        return float(np.mean(found))


def polar_factor(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix."""
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left @ right).to(matrix.dtype)


def random_maps(sizes: Sequence[int], width: int, seed: int) -> torch.Tensor:
    """(sum of sizes, width): a random semi-orthogonal map for every part."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([polar_factor(torch.randn(size, width, generator=generator)) for size in sizes])


def total_cosines(state: State, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """(N,) cosines of y with z."""
    return cosine_similarity(x @ state.maps + state.bias, z)


def part_cosines(
    maps: torch.Tensor, truth: torch.Tensor, x: torch.Tensor, sizes: Sequence[int]
) -> np.ndarray:
    """(parts,) mean over images of the cosine of a part's contribution under two sets of maps; x (N, F) is
    centred first, so that what is constant does not count."""
    found = []
    x = x - x.mean(0)
    for part, u, a in zip(
        x.split(list(sizes), 1), maps.split(list(sizes)), truth.split(list(sizes)), strict=True
    ):
        found.append(float(cosine_similarity(part @ u, part @ a).mean()))
    return np.array(found)


def planted_truth(x: torch.Tensor, z: torch.Tensor, seed: int, sizes: Sequence[int]) -> State:
    """Random isometries, and a bias that gives what they make of x a mean of the same weight and direction
    as that of z."""
    maps = random_maps(sizes, z.shape[1], seed)
    y = (x - x.mean(0)) @ maps
    middle = z.mean(0)
    share = middle.norm() / (z - middle).square().sum(1).mean().sqrt().clamp(min=1e-6)
    offset = normalize(middle, dim=0) * share * y.square().sum(1).mean().sqrt()
    return State(maps, offset - x.mean(0) @ maps)


def embeddings(state: State, x: torch.Tensor) -> torch.Tensor:
    """(N, width) unit vectors that the maps make of coordinates x."""
    return normalize(x @ state.maps + state.bias, dim=1)
