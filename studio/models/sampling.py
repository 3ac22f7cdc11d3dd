"""The denoising loop, unrolled: the same arithmetic as diffusers' pipelines, with the step number in our
hands.

Rows of one batch are counterfactual worlds: each has its own text states, all of a seed share latents and
noise.
DDIM: arXiv 2010.02502; PNDM: 2202.09778; classifier-free guidance: 2207.12598.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from studio.errors import RequestError
from studio.models.catalog import SCHEDULERS
from studio.models.hooks import watch
from studio.models.precision import loop_dtype
from studio.models.sites import text_reads, unet_module
from studio.types import Patch, Site

if TYPE_CHECKING:
    from studio.models.diffusion import DiffusionModel


@dataclass(frozen=True)
class Conditioning:
    """What a UNet reads of a text: states (N, T, D), and for SDXL the pooled vector (N, P)."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None

    def rows(self, index: Sequence[int] | torch.Tensor) -> Conditioning:
        """The rows at `index`, in that order, repeats allowed."""
        index = torch.as_tensor(index, device=self.states.device)
        return Conditioning(self.states[index], None if self.pooled is None else self.pooled[index])

    def join(self, *others: Conditioning) -> Conditioning:
        """These rows, then those of `others`."""
        parts = (self, *others)
        pooled = None if self.pooled is None else torch.cat([p.pooled for p in parts])
        return Conditioning(torch.cat([p.states for p in parts]), pooled)

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True)
class Plan:
    """How to sample: steps, guidance scale (1 or less: no unconditional row), scheduler's name, size in
    pixels."""

    steps: int = 20
    guidance: float = 3.0
    scheduler: str = "ddim"
    height: int = 64
    width: int = 64

    def with_steps(self, steps: int) -> Plan:
        """The same plan at another number of steps."""
        return replace(self, steps=steps)


def new_scheduler(model: DiffusionModel, plan: Plan):
    """A fresh scheduler for the plan, its timesteps set, from the model's own configuration."""
    import diffusers

    cls = getattr(diffusers, SCHEDULERS[plan.scheduler])
    # DDIM's default of True clips latents when the configuration is silent; a key of the configuration would
    # not do, from_config drops those that were defaults
    clips = {"clip_sample": False} if plan.scheduler in ("ddim", "lcm") else {}
    scheduler = cls.from_config(model.pipe.scheduler.config, **clips)
    try:
        scheduler.set_timesteps(plan.steps, device=model.device)
    except ValueError as error:
        raise RequestError(
            f"The scheduler {plan.scheduler} can't take {plan.steps} steps; take more steps or another "
            f"scheduler."
        ) from error
    return scheduler


def predict(
    model: DiffusionModel,
    scheduler,
    t: torch.Tensor,
    latents: torch.Tensor,
    cond: Conditioning,
    uncond: Conditioning | None,
    plan: Plan,
    shadow: Conditioning | None = None,
) -> torch.Tensor:
    """The guided model output (N, 4, h, w) at one timestep; rows of the batch: unconditional, conditional,
    shadow."""
    worlds = [w for w in (uncond, cond, shadow) if w is not None]
    x = scheduler.scale_model_input(torch.cat([latents] * len(worlds)) if len(worlds) > 1 else latents, t)
    out = raw_output(model, x, t, worlds[0].join(*worlds[1:]) if len(worlds) > 1 else cond, plan).split(
        len(latents)
    )
    if uncond is None:
        return out[0]
    free, text = out[:2]
    return free + plan.guidance * (text - free)


def raw_output(
    model: DiffusionModel, x: torch.Tensor, t: torch.Tensor, cond: Conditioning, plan: Plan
) -> torch.Tensor:
    """The UNet's own output for rows of scaled latents `x` and text states `cond`, in the number type of
    `x`; the UNet itself computes in its own."""
    added, timestep_cond = None, None
    if cond.pooled is not None:
        ids = [plan.height, plan.width, 0, 0, plan.height, plan.width]
        ids = torch.tensor([ids], dtype=cond.states.dtype, device=x.device)
        added = {"text_embeds": cond.pooled, "time_ids": ids.repeat(len(x), 1)}
    if (width := model.unet.config.time_cond_proj_dim) is not None:
        w = torch.tensor(plan.guidance - 1).repeat(len(x))
        timestep_cond = model.pipe.get_guidance_scale_embedding(w, embedding_dim=width).to(
            x.device, model.dtype
        )
    return model.run_unet(
        x.to(model.dtype),
        t,
        encoder_hidden_states=cond.states.to(model.dtype),
        timestep_cond=timestep_cond,
        added_cond_kwargs=added,
        return_dict=False,
    )[0].to(x.dtype)


def guided(model: DiffusionModel, plan: Plan) -> bool:
    """Whether the plan needs unconditional rows (a distilled UNet takes the guidance scale as an input
    instead)."""
    return plan.guidance > 1 and model.unet.config.time_cond_proj_dim is None


def first_latents(model: DiffusionModel, plan: Plan, seeds: Iterable[int]) -> torch.Tensor:
    """Unscaled starting noise, one CPU generator a seed, so that every device starts from the same
    numbers."""
    shape = (model.unet.config.in_channels, plan.height // model.vae_factor, plan.width // model.vae_factor)
    kind = loop_dtype(model.dtype)
    rows = [
        torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(s), dtype=kind) for s in seeds
    ]
    return torch.cat(rows).to(model.device)


@dataclass(frozen=True)
class Readings:
    """What every cross-attention layer makes of a few texts, computed once: keys and values depend on nothing
    else.

    `tables`: (K, T, D) of K texts by site, keys and values of each layer in execution order. `free` is the
    place of the unconditional text among them, None when the plan needs none.
    """

    tables: Mapping[Site, torch.Tensor]
    free: int | None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: DiffusionModel,
        texts: Conditioning,
        uncond: Conditioning | None = None,
        layers: Sequence[str] | None = None,
    ) -> Readings:
        """Readings of the texts and, after them, of the unconditional text: one forward of the least size.
        `layers`: only these."""
        whole = texts if uncond is None else texts.join(uncond.rows([0]))
        found = model.unet_sites(["cross-attention"])
        found = [s for s in found if layers is None or s.layer in layers]
        sites = [s for layer in found for s in text_reads(layer)]
        modules = {s: unet_module(model.unet, s) for s in sites}
        side = 2 ** (len(model.unet.config.block_out_channels) - 1) * model.vae_factor
        plan = Plan(height=side, width=side)
        x = first_latents(model, plan, [0] * len(whole))
        with watch(modules, record=sites) as tape:
            raw_output(model, x, torch.tensor(500, device=model.device), whole, plan)
        if tape.touched != set(sites):
            raise RuntimeError(f"keys and values that were never read: {set(sites) - tape.touched}")
        return cls({s: tape[s] for s in sites}, None if uncond is None else len(texts))

    def patches(self, choice: Sequence[Sequence[int]], free: bool = True) -> list[Patch]:
        """Patches under which layer l of row r reads text choice[r][l]; with `free`, unconditional rows come
        before them, one a row, and read the unconditional text."""
        device = next(iter(self.tables.values())).device
        index = torch.as_tensor(choice, device=device).T
        if free and self.free is not None:
            index = torch.cat([torch.full_like(index, self.free), index], dim=1)
        return [
            Patch(site, do="hold", value=(table, index[i // 2]))
            for i, (site, table) in enumerate(self.tables.items())
        ]


@torch.no_grad()
def denoise(
    model: DiffusionModel,
    cond: Conditioning,
    uncond: Conditioning | None,
    seeds: Sequence[int],
    plan: Plan,
    *,
    patches: Sequence[Patch] = (),
    shadow: Conditioning | None = None,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Final latents (N, 4, h, w) of N rows: text states `cond`, unconditional states `uncond` (or None),
    one seed a row.

    `patches` address UNet sites by rows of `cond`; the unconditional rows are never touched. `shadow` (N
    rows) is text
    that is read at the same latents, its output thrown away: row N + i, for patches to copy from.
    `on_step(i, latents)`
    is called before each model call with the latents that it reads; raising there ends the loop and removes
    every hook.
    """
    latents = None
    for i, latents in trajectory(model, cond, uncond, seeds, plan, patches=patches, shadow=shadow):
        if on_step is not None:
            on_step(i, latents)
    return latents


@torch.no_grad()
def trajectory(
    model: DiffusionModel,
    cond: Conditioning,
    uncond: Conditioning | None,
    seeds: Sequence[int],
    plan: Plan,
    *,
    patches: Sequence[Patch] = (),
    shadow: Conditioning | None = None,
    read: Callable[..., torch.Tensor] | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (i, latents read at step i) for every model call, then (number of calls, final latents). `read`
    computes the guided output in place of `predict`, for whoever needs more of the same pass."""
    scheduler = new_scheduler(model, plan)
    uncond = uncond if guided(model, plan) else None
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    shape = (
        1,
        model.unet.config.in_channels,
        plan.height // model.vae_factor,
        plan.width // model.vae_factor,
    )
    kind = loop_dtype(model.dtype)
    latents = torch.cat([torch.randn(shape, generator=g, dtype=kind) for g in generators]).to(model.device)
    latents = latents * scheduler.init_noise_sigma
    step_options = _step_options(scheduler, generators)
    modules = {p.site: unet_module(model.unet, p.site) for p in patches}
    context = watch(modules, patches=patches, in_place=True) if patches else nullcontext()
    with context as tape:
        for i, t in enumerate(scheduler.timesteps):
            yield i, latents
            if tape is not None:
                tape.step, tape.row_offset = i, (len(latents) if uncond is not None else 0)
            out = (read or predict)(model, scheduler, t, latents, cond, uncond, plan, shadow)
            latents = scheduler.step(out, t, latents, **step_options, return_dict=False)[0]
        if tape is not None and tape.touched != set(modules):
            raise RuntimeError(f"patched sites that never ran: {set(modules) - tape.touched}")
    yield len(scheduler.timesteps), latents


def _step_options(scheduler, generators: list[torch.Generator]) -> dict:
    from inspect import signature

    taken = signature(scheduler.step).parameters
    options = {"eta": 0.0} if "eta" in taken else {}
    return options | ({"generator": generators} if "generator" in taken else {})
