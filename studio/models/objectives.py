"""What a concept is to the UNet, as an objective, and its gradient from one trajectory for all steps.

alpha = w * dJ/dw (CAD, arXiv 2412.02542). Erase: J = sum_t |e(z_t, concept) - e(z_t, base)|^2 along the
model's own guided sampling of the concept, e(z_t, base) held fixed: the conditional pass of the sampling is
also the one that is differentiated. Amplify: J = the denoising loss on images of the concept, a person's or
those that the model makes. e is the predicted noise, whatever the model predicts. J is a mean over seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import log2
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from studio.errors import RequestError, StudioError
from studio.models.sampling import guided, new_scheduler, predict, raw_output, trajectory
from studio.models.sites import text_reads, unet_name
from studio.types import Axis, Report


@dataclass(frozen=True)
class Weight:
    """One matrix: its parameter's name, its module's name (both with "unet."), the parameter (out, in)."""

    name: str
    module: str
    tensor: Any


def find_weights(model: Any, components: Sequence[str]) -> list[Weight]:
    """The matrices of these components (feed-forward, to_k, to_v), in execution order of their modules."""
    found = []
    for site in model.unet_sites(("cross-attention", "feed-forward")):
        if site.kind == "feed-forward":
            own = model.unet.get_submodule(site.layer).named_parameters()
            inner = [f"{site.layer}.{n}" for n, p in own if p.ndim == 2 and site.kind in components]
        else:
            both = zip(("to_k", "to_v"), text_reads(site), strict=True)
            inner = [f"{unet_name(read)}.weight" for name, read in both if name in components]
        found += [Weight(f"unet.{n}", f"unet.{site.layer}", model.unet.get_parameter(n)) for n in inner]
    if not found:
        raise RequestError(f"{model.id} has no weights of the components {', '.join(components)}.")
    return found


def component_axis(weights: Sequence[Weight], granularity: str) -> tuple[Axis, np.ndarray]:
    """The axis of components (unit: a row of a matrix; layer: a matrix; module) and how many weights each
    has, float32."""
    sizes: dict[str, int] = {}
    for w in weights:
        tall, wide = w.tensor.shape
        if granularity == "unit":
            sizes |= {f"{w.name}[{i}]": wide for i in range(tall)}
        else:
            key = w.name if granularity == "layer" else w.module
            sizes[key] = sizes.get(key, 0) + tall * wide
    return Axis("component", tuple(sizes)), np.array(list(sizes.values()), np.float32)


def summed(weights: Sequence[Weight], alphas: Sequence[torch.Tensor], granularity: str) -> np.ndarray:
    """Attributions (out, in) of each matrix summed within components, float64."""
    rows = [a.sum(1).cpu().numpy().astype(np.float64) for a in alphas]
    if granularity == "unit":
        return np.concatenate(rows)
    sums: dict[str, float] = {}
    for w, row in zip(weights, rows, strict=True):
        key = w.name if granularity == "layer" else w.module
        sums[key] = sums.get(key, 0.0) + float(row.sum())
    return np.array(list(sums.values()))


@contextmanager
def differentiable(weights: Sequence[Weight]) -> Iterator[None]:
    """The weights ask for gradients inside the block; afterwards they ask for what they did before, and
    hold none."""
    before = [w.tensor.requires_grad for w in weights]
    try:
        for w in weights:
            w.tensor.requires_grad_(True)
        yield
    finally:
        for w, asked in zip(weights, before, strict=True):
            w.tensor.requires_grad_(asked)
            w.tensor.grad = None


@dataclass(frozen=True)
class Moment:
    """One term of J, |a * output + b * x - target|^2: input x (1, C, h, w), timestep, target (1, C, h, w)."""

    x: torch.Tensor
    t: torch.Tensor
    a: float
    b: float
    target: torch.Tensor


def noise_terms(scheduler: Any, i: int, t: Any) -> tuple[float, float, float]:
    """(a, b, signal) at model call i: predicted noise = a * output + b * x, and x = sqrt(signal) * image +
    sqrt(1 - signal) * noise, which is what the UNet reads under every scheduler."""
    if hasattr(scheduler, "is_scale_input_called"):  # Euler counts in noise per signal
        signal = 1 / (1 + float(scheduler.sigmas[i]) ** 2)
    else:
        signal = float(scheduler.alphas_cumprod[int(t)])
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return signal**0.5, (1 - signal) ** 0.5, signal
    if kind == "sample":
        return -((signal / (1 - signal)) ** 0.5), (1 - signal) ** -0.5, signal
    return 1.0, 0.0, signal


@torch.no_grad()
def image_latents(model: Any, pixels: np.ndarray, plan: Any) -> torch.Tensor:
    """Latents (1, C, h, w) of an image (H, W, 3) uint8, cropped around its centre and scaled to the plan's
    size: the mean of what the autoencoder makes of it."""
    fitted = ImageOps.fit(Image.fromarray(pixels), (plan.width, plan.height), Image.Resampling.BICUBIC)
    vae, config = model.vae, model.vae.config
    x = torch.from_numpy(np.asarray(fitted).copy()).to(model.device, torch.float32)
    found = vae.encode((x.permute(2, 0, 1)[None] / 127.5 - 1).to(vae.dtype)).latent_dist.mean
    mean, std = (config.get(f"latents_{n}") for n in ("mean", "std"))
    if mean is None or std is None:
        return (found * config.scaling_factor).to(model.dtype)
    mean, std = (found.new_tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    return ((found - mean) * config.scaling_factor / std).to(model.dtype)


class Objective:
    """J of one concept, its gradient so far, and the terms that were met on the way.

    `params` as in component_attribution; `own`: latents (1, C, h, w) of images of the concept, in whose place
    the model's own are taken where there are none. `forwards` counts UNet rows; `values` is J of each seed.
    """

    def __init__(
        self,
        model: Any,
        inputs: Any,
        params: Any,
        seeds: Sequence[int],
        report: Report,
        own: Sequence[torch.Tensor] = (),
    ) -> None:
        self.own = tuple(own)
        self.model, self.params, self.seeds, self.report = model, params, seeds, report
        self.plan = model.plan(params)
        self.weights = find_weights(model, params.components)
        self.erase = params.objective == "erase"
        self.cond, _ = model.encode([inputs.concept])
        self.uncond = model.unconditional(1, self.plan)
        self.base_is_uncond = self.uncond is not None and not inputs.base.strip()
        # the empty prompt is what the unconditional row would read (zeros for some SDXL)
        empty = None if inputs.base.strip() else model.unconditional(1, replace(self.plan, guidance=2.0))
        self.base = empty if empty is not None else model.encode([inputs.base])[0]
        self.calls = len(new_scheduler(model, self.plan).timesteps)
        self.scale = 1 / len(seeds)
        kind = torch.promote_types(model.dtype, torch.float32)
        self.gradients = [torch.zeros_like(w.tensor, dtype=kind) for w in self.weights]
        self.moments: list[Moment] = []
        self.values = np.full(len(seeds), np.nan)
        self.forwards = self._call = self._seed = 0

    def rows(self) -> int:
        """UNet rows of the whole attribution, for the progress bar."""
        each = 2 + (guided(self.model, self.plan) and not (self.erase and self.base_is_uncond))
        return self.calls * (each + max(0, len(self.own) - 1)) * len(self.seeds)

    def measuring_rows(self) -> int:
        """UNet rows of one call of `measured`."""
        return len(self.moments) * (1 + self.erase)

    def take_seed(self, j: int) -> torch.Tensor:
        """Adds the terms of one seed and their gradients; returns the latents of its image. To be called
        inside `differentiable`."""
        self._seed, self.values[j] = j, 0.0
        read, final = self._read_erase if self.erase else self._read_plain, None
        steps = trajectory(self.model, self.cond, self.uncond, [self.seeds[j]], self.plan, read=read)
        for call, latents in steps:
            self._call, final = call, latents
        if not self.erase:
            generator = torch.Generator("cpu").manual_seed(self.seeds[j] + 2**32)
            for image in self.own or (final,):
                self._denoising_loss(image, generator)
        return final

    def alphas(self) -> dict[str, torch.Tensor]:
        """Attributions (out, in) of single weights by parameter name, of all terms so far."""
        pairs = zip(self.weights, self.gradients, strict=True)
        return {w.name: w.tensor.detach().to(g.dtype) * g for w, g in pairs}

    def attributions(self) -> np.ndarray:
        """Attributions (component,) of all terms so far, float64; StudioError when they are no numbers."""
        found = summed(self.weights, list(self.alphas().values()), self.params.granularity)
        if not np.isfinite(found).all():
            kind = str(self.model.dtype).removeprefix("torch.")
            raise StudioError(f"The gradient is not finite in {kind}; take --dtype float32.")
        return found

    @torch.no_grad()
    def measured(self) -> np.ndarray:
        """J of the model's present weights at the latents that were met, (2,) float64: with the targets that
        were met, which is what alpha estimates the decrease of, and with the base predicted by the present
        weights too (NaN for amplify, whose targets are noise)."""
        totals, worlds = np.zeros(2), 1 + self.erase
        size = max(1, self.report.rows // worlds)
        for start in range(0, len(self.moments), size):
            part = self.moments[start : start + size]
            n = len(part)
            x = torch.cat([m.x for m in part] * worlds)
            t = torch.stack([torch.as_tensor(m.t) for m in part] * worlds).to(x.device)
            cond = self.cond.rows([0] * n)
            cond = cond.join(self.base.rows([0] * n)) if self.erase else cond
            out = raw_output(self.model, x, t, cond, self.plan)
            for k, m in enumerate(part):
                fixed = self._gap(m, out[k : k + 1])
                too = m.a * (out[k] - out[n + k]) if self.erase else torch.full((1,), torch.nan)
                totals += [float(g.cpu().double().square().sum()) for g in (fixed, too)]
            self._count(len(x))
        return totals * self.scale * self._share()

    # ---- the terms ----------------------------------------------------------------------------------------

    def _share(self) -> float:
        """The denoising loss is a mean over images, steps and latents, the distance to the base a plain
        sum."""
        if self.erase:
            return 1.0
        return 1 / (self.calls * max(1, len(self.own)) * self.moments[0].x.numel())

    def _read_plain(self, *arguments: Any) -> torch.Tensor:
        out = predict(*arguments)
        self._count(1 if self.uncond is None else 2)
        return out

    def _read_erase(
        self, model: Any, scheduler: Any, t: Any, latents: Any, cond: Any, uncond: Any, plan: Any, shadow: Any
    ) -> torch.Tensor:
        """The guided output in place of `predict`; its conditional pass is the one that is differentiated."""
        x = scheduler.scale_model_input(latents, t)
        a, b, _ = noise_terms(scheduler, self._call, t)
        rows = self.base if uncond is None or self.base_is_uncond else self.base.join(uncond)
        free = raw_output(model, x.expand(len(rows), -1, -1, -1), t, rows, plan)
        out = self._differentiate(Moment(x, t, a, b, a * free[:1] + b * x))
        self._count(len(rows) + 1)
        return out if uncond is None else free[-1:] + plan.guidance * (out - free[-1:])

    def _denoising_loss(self, image: torch.Tensor, generator: torch.Generator) -> None:
        """Terms of the denoising loss on one image's latents (1, C, h, w): fresh noise at each timestep of
        the plan."""
        scheduler = new_scheduler(self.model, self.plan)
        for i, t in enumerate(scheduler.timesteps):
            noise = torch.randn(image.shape, generator=generator, dtype=image.dtype).to(image.device)
            a, b, signal = noise_terms(scheduler, i, t)
            self._differentiate(Moment(signal**0.5 * image + (1 - signal) ** 0.5 * noise, t, a, b, noise))
            self._count(1)

    def _differentiate(self, moment: Moment) -> torch.Tensor:
        """Adds one term to J and its gradient to the sum; returns the model's output, detached.

        What enters the backward pass is scaled to about 1 by a power of two, so that half precision neither
        loses it nor overflows.
        """
        self.moments.append(moment)
        with torch.enable_grad():
            out = raw_output(self.model, moment.x, moment.t, self.cond, self.plan)
        gap = self._gap(moment, out.detach())
        weight = self.scale * self._share()
        self.values[self._seed] += float(gap.square().sum()) * self._share()
        pull = 2 * moment.a * gap
        if (top := float(pull.abs().max())) > 0:
            power = 2.0 ** -round(log2(top))
            tensors = [w.tensor for w in self.weights]
            found = torch.autograd.grad(out, tensors, (pull * power).to(out.dtype))
            for total, gradient in zip(self.gradients, found, strict=True):
                total.add_(gradient.to(total.dtype), alpha=weight / power)
        return out.detach()

    def _gap(self, moment: Moment, out: torch.Tensor) -> torch.Tensor:
        kind = self.gradients[0].dtype
        return moment.a * out.to(kind) + moment.b * moment.x.to(kind) - moment.target.to(kind)

    def _count(self, rows: int) -> None:
        self.forwards += rows
        self.report.step(rows)
