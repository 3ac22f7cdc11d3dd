"""Fast ways of vision methods beside their slow references, on a small ViT of random weights
(studio/naive_race.py)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from studio.naive_race import Row, beside, reference

Numbers = Callable[..., Any]
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}
WHAT = "random ViT, 3 blocks of 4 heads, width 48, 17 tokens"
HEADS = ("block.0.head.1", "block.1.head.2", "block.2.head.0")


def small_vit() -> tuple[Any, Any]:
    """(a timm ViT, its layout)."""
    import timm

    from studio.models.vit_timm import timm_layout

    net = timm.create_model("vit_tiny_patch16_224", **SIZE).eval().requires_grad_(False)
    return net, timm_layout("vit", net)


def decompose(numbers: Numbers, images: int = 8) -> list[Row]:
    """All components from one forward, against the Jacobian of every output number at every place."""
    from studio.models.decomposition import Decomposition
    from studio.models.vit_timm import timm_layout

    slow = reference("naive_decomposition").Slow
    net, layout = small_vit()
    whole, pixels = Decomposition(layout, layout_device(net)), numbers(images, 3, 32, 32)
    return [
        beside(
            "decompose",
            lambda: whole.run(pixels),
            lambda: slow(net, lambda n: timm_layout("vit", n), pixels).components(),
            1,
            f"the Jacobian of every number of the representation, in float64; {images} images, {WHAT}",
        )
    ]


def layout_device(net: Any) -> Any:
    """Where a network's weights are."""
    return next(net.parameters()).device


def retrieve_images(numbers: Numbers, images: int = 8) -> list[Row]:
    """Chosen components in batches, against every component of one image after the other."""
    from studio.methods.component_retrieval import text_scores
    from studio.models.decomposition import Decomposition
    from studio.models.vit_timm import timm_layout

    slow, order = reference("naive_decomposition").Slow, reference("naive_retrieval").naive_by_text
    net, layout = small_vit()
    whole, pixels = Decomposition(layout, layout_device(net)), numbers(images, 3, 32, 32)
    text = numbers(SIZE["embed_dim"]).double().numpy()

    def fast() -> Any:
        parts = whole.run(pixels)
        total = sum(parts.components[name].double() for name in HEADS).numpy()
        return text_scores(total, np.linalg.norm(parts.representation.double().numpy(), axis=1), text)

    def naive() -> Any:
        one = slow(net, lambda n: timm_layout("vit", n), pixels[:1])
        found = [{k: v[0].numpy() for k, v in one.components().items()}]
        return order(found, HEADS, one.z.numpy(), text)

    how = f"every component of one image after the other, {images} images; {WHAT}"
    return [beside("retrieve-images", fast, naive, images, how)]


def rank_components(numbers: Numbers, images: int = 2000, parts: int = 24, size: int = 16) -> list[Row]:
    """Scores from statistics, against the contributions of every image."""
    from studio.methods.component_roles import feature_basis, roles
    from studio.models.corpus import Statistics

    naive, width = reference("naive_roles").naive_roles, parts * size // 4
    draw = lambda *shape: numbers(*shape).double().numpy()  # noqa: E731
    outputs = {f"part {i}": draw(images, size) for i in range(parts)}
    matrices = {name: draw(size, width) for name in outputs}
    given = {name: x @ matrices[name] for name, x in outputs.items()}
    total = sum(given.values())
    spread = total - total.mean(0)
    known = Statistics(
        images,
        {n: x.mean(0) for n, x in outputs.items()},
        {n: np.cov(x.T, bias=True) for n, x in outputs.items()},
        {n: (x - x.mean(0)).T @ spread / images for n, x in outputs.items()},
        total.mean(0),
        spread.T @ spread / images,
    )
    basis = feature_basis(draw(4, width), draw(width))
    space = SimpleNamespace(matrix=matrices.__getitem__)
    how = f"contributions of {images} images by {parts} parts in {width} dimensions; statistics are at hand"
    return [
        beside("rank-components", lambda: roles(space, known, basis), lambda: naive(given, basis), 1, how)
    ]


def ablate_components(numbers: Numbers, images: int = 8, others: int = 16) -> list[Row]:
    """Means of branches by one pass over all images and one forward with them, against a ViT written out,
    image by image and head by head."""
    import torch

    from studio.models.ablation import OutputMeans, ablated

    naive = reference("naive_vit_ablation").naive_true_ablation
    net, layout = small_vit()
    pixels, seen = numbers(images, 3, 32, 32), numbers(others, 3, 32, 32)

    def fast() -> Any:
        means = OutputMeans(layout, HEADS)
        with torch.no_grad():
            with means.counting(others):
                layout.run(seen)
            with ablated(layout, means.means()):
                return layout.run(pixels)

    how = f"float64, image by image, head by head; {images} images, {others} of reference, {WHAT}"
    return [beside("ablate-components", fast, lambda: naive(net, pixels, seen, HEADS), 1, how)]
