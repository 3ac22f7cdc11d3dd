"""Text-to-image models of the Stable Diffusion layouts: text to states, states to latents, latents to
images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from studio.errors import RequestError, StudioError
from studio.models.base import FromSource
from studio.models.compiled import CompiledUNet
from studio.models.device import channels_last
from studio.models.hooks import Tape, watch
from studio.models.loading import Source, parameter_bytes
from studio.models.sampling import Conditioning, Plan, denoise, first_latents, guided, raw_output
from studio.models.sites import (
    UNET_KINDS,
    text_layers,
    text_module,
    text_norm,
    text_root,
    unet_module,
    unet_site_names,
    unet_sites,
)
from studio.models.tokens import TokenRow, find_span
from studio.types import Patch, Site


class DiffusionModel(FromSource):
    """A loaded pipeline of diffusers: its parts, and the operations that methods are made of.

    Text encoders are the parts "text" and, for SDXL, "text2"; everything is in evaluation mode and needs no
    gradient. `dtype` is the UNet's number type; what else is in it models/precision.py says.
    """

    def __init__(self, pipe: Any, source: Source, device: str, dtype: torch.dtype) -> None:
        self.pipe, self.source = pipe, source
        self.device, self.dtype = torch.device(device), dtype
        self.unet, self.vae = channels_last(pipe.unet, device), channels_last(pipe.vae, device)
        self.encoders: dict[str, nn.Module] = {"text": pipe.text_encoder}
        self.tokenizers: dict[str, Any] = {"text": pipe.tokenizer}
        if getattr(pipe, "text_encoder_2", None) is not None:
            self.encoders["text2"], self.tokenizers["text2"] = pipe.text_encoder_2, pipe.tokenizer_2
        for module in self.components().values():
            module.eval().requires_grad_(False)
        self.compiled: CompiledUNet | None = None
        self.vae_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)

    def compile(self, backend: str = "inductor") -> None:
        """From now on forwards of the UNet that nothing watches are compiled."""
        self.compiled = CompiledUNet(self.unet, backend)

    def run_unet(self, *args: Any, **options: Any) -> Any:
        """The UNet's forward, compiled where that was asked for and can be."""
        return (self.compiled or self.unet)(*args, **options)

    @property
    def provides(self) -> frozenset[str]:
        """What methods may need of it."""
        return frozenset({"cross_attention", "text_encoder", "images"})

    def components(self) -> dict[str, nn.Module]:
        """The modules that hold weights, under diffusers' names."""
        names = ("unet", "vae", "text_encoder", "text_encoder_2")
        return {n: m for n in names if (m := getattr(self.pipe, n, None)) is not None}

    def nbytes(self) -> int:
        """Memory of the weights."""
        return sum(parameter_bytes(m) for m in self.components().values())

    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained for."""
        side = self.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.vae_factor, width * self.vae_factor

    def plan(self, params: Any) -> Plan:
        """The sampling plan of a method's parameters, with the model's defaults; RequestError for a size
        that can't be."""
        height, width = self.default_size()
        height, width = getattr(params, "height", None) or height, getattr(params, "width", None) or width
        if height % self.vae_factor or width % self.vae_factor:
            raise RequestError(
                f"Height and width must be divisible by {self.vae_factor}, the factor of this model's "
                f"autoencoder; {height} x {width} is not."
            )
        guidance = (
            params.guidance if params.guidance is not None else self.source.defaults.get("guidance", 7.5)
        )
        steps = params.steps if params.steps is not None else self.source.defaults.get("steps", 50)
        return Plan(
            steps=steps,
            guidance=guidance,
            scheduler=params.scheduler or self.default_scheduler(),
            height=height,
            width=width,
        )

    def default_scheduler(self) -> str:
        """DDIM, unless the model is distilled for LCM or for Euler with trailing steps (turbo)."""
        own = type(self.pipe.scheduler).__name__
        if own == "LCMScheduler":
            return "lcm"
        turbo = own.startswith("Euler") and self.pipe.scheduler.config.get("timestep_spacing") == "trailing"
        return "euler" if turbo else "ddim"

    # ---- text ---------------------------------------------------------------------------------------------

    def tokens(self, text: str, part: str = "text") -> TokenRow:
        """The prompt's tokens with their places in the text, and what the model's length cuts off."""
        return TokenRow.of(self.tokenizers[part], text)

    def subject_positions(
        self, text: str, subject: str, occurrence: int | None, part: str = "text"
    ) -> tuple[int, ...]:
        """Token positions that the substring `subject` of the prompt covers, ascending."""
        row = self.tokens(text, part)
        return row.covering(find_span(text, subject, occurrence, "--subject"), subject)

    def embedding_sd(self, part: str) -> float:
        """Standard deviation of all entries of the encoder's token-embedding matrix."""
        return float(text_root(self.encoders[part]).embeddings.token_embedding.weight.float().std())

    def embedding_width(self, part: str) -> int:
        """Width of the encoder's token embeddings."""
        return text_root(self.encoders[part]).embeddings.token_embedding.weight.shape[1]

    def text_sites(self, kind: str, part: str = "text") -> list[Site]:
        """The sites of one kind in one text encoder, first layer first."""
        return [Site(part, i, kind) for i in range(len(text_layers(self.encoders[part])))]

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], *, patches: Sequence[Patch] = (), record: Sequence[Site] = ()
    ) -> tuple[Conditioning, dict[str, Tape]]:
        """Text states of the prompts, one row each, with interventions inside the encoders; tapes by part."""
        states, pooled, tapes = [], None, {}
        for part, encoder in self.encoders.items():
            ids = self.tokenizers[part](
                list(texts),
                padding="max_length",
                truncation=True,
                return_tensors="pt",
                max_length=self.tokenizers[part].model_max_length,
            )
            mine = [p for p in patches if p.site.part == part]
            sites = [s for s in record if s.part == part]
            modules = {s: text_module(encoder, s) for s in [*sites, *(p.site for p in mine)]}
            mask = (
                ids.attention_mask.to(self.device)
                if getattr(encoder.config, "use_attention_mask", False)
                else None
            )
            with watch(modules, record=sites, patches=mine) as tapes[part]:
                if self.family == "sdxl":
                    out = encoder(ids.input_ids.to(self.device), output_hidden_states=True)
                    states.append(out.hidden_states[-2])
                    pooled = out[0] if out[0].ndim == 2 else pooled
                else:
                    states.append(encoder(ids.input_ids.to(self.device), attention_mask=mask)[0])
            if tapes[part].touched != set(modules):
                raise RuntimeError(f"sites that never ran: {set(modules) - tapes[part].touched}")
        return Conditioning(torch.cat(states, dim=-1), pooled), tapes

    def unconditional(self, rows: int, plan: Plan, negative: str | None = None) -> Conditioning | None:
        """States of the unconditional rows, or None when the plan needs none."""
        if not guided(self, plan):
            return None
        if negative is None and self.family == "sdxl" and self.pipe.config.force_zeros_for_empty_prompt:
            one, _ = self.encode([""])
            one = Conditioning(torch.zeros_like(one.states), torch.zeros_like(one.pooled))
            return one.rows([0] * rows)
        cond, _ = self.encode([negative or ""] * rows)
        return cond

    @torch.no_grad()
    def lens(self, text: str) -> Conditioning:
        """Text states as if each layer were the last: the hidden states after every layer through the final
        norm.

        Row 0 is the embedding, row i the output of layer i. Diffusion Lens, arXiv 2403.05846. SDXL (which
        reads the
        layer before the last, without a norm) is read as it stands.
        """
        states, depth, pooled = [], 0, None
        for part, encoder in self.encoders.items():
            ids = self.tokenizers[part](
                [text],
                padding="max_length",
                truncation=True,
                return_tensors="pt",
                max_length=self.tokenizers[part].model_max_length,
            )
            out = encoder(ids.input_ids.to(self.device), output_hidden_states=True)
            hidden = torch.cat(out.hidden_states)
            states.append(hidden if self.family == "sdxl" else text_norm(encoder)(hidden))
            depth = max(depth, len(hidden))
            pooled = out[0] if out[0].ndim == 2 else pooled
        states = [torch.cat([s, s[-1:].expand(depth - len(s), -1, -1)]) for s in states]
        return Conditioning(torch.cat(states, dim=-1), None if pooled is None else pooled.expand(depth, -1))

    # ---- images -------------------------------------------------------------------------------------------

    def unet_sites(self, kinds: Sequence[str]) -> list[Site]:
        """UNet sites of the kinds asked for, in execution order."""
        return unet_sites(self.unet, kinds)

    @torch.no_grad()
    def zeroing_changes(self) -> dict[str, float]:
        """For the load-time check: how much the UNet's output changes when all sites of a kind are zeroed.

        One row a kind, the smallest latents that reach the lowest level, and one token of text: the last,
        which reads all others. A row is compared with itself in a forward without patches, since rows of
        one forward differ by rounding: where nothing reacts the change is exactly 0.
        """
        names = unet_site_names(self.unet)
        kinds = [kind for kind in UNET_KINDS[:4] if names[kind]]
        sites = {Site("unet", name, kind): row for row, kind in enumerate(kinds) for name in names[kind]}
        patches = [Patch(site, do="zero", rows=(row,)) for site, row in sites.items()]
        side = 2 ** (len(self.unet.config.block_out_channels) - 1)
        plan = Plan(height=side * self.vae_factor, width=side * self.vae_factor, guidance=1.0)
        x, t = first_latents(self, plan, [0] * len(kinds)), torch.tensor(500, device=self.device)
        cond = self.encode([""])[0].rows([0] * len(kinds))
        cond = replace(cond, states=cond.states[:, -1:])
        clean = raw_output(self, x, t, cond, plan).float()
        with watch({site: unet_module(self.unet, site) for site in sites}, patches=patches) as tape:
            zeroed = raw_output(self, x, t, cond, plan).float()
        if tape.touched != set(sites):
            raise RuntimeError(f"sites that never ran: {set(sites) - tape.touched}")
        changes = (zeroed - clean).abs().amax((1, 2, 3)).tolist()
        return {f"{k} ({names[k][0]} and the like)": c for k, c in zip(kinds, changes, strict=True)}

    @torch.no_grad()
    def one_row(self, params: Any) -> None:
        """One step and the image of one row at the size that a method's parameters ask for, with the two
        other rows that may stand beside it: what a row of a batch takes."""
        plan = self.plan(params)
        x, cond = first_latents(self, plan, [0] * 3), self.encode([""])[0].rows([0] * 3)
        self.decode(raw_output(self, x, torch.tensor(500, device=self.device), cond, plan)[:1])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, chunk: int = 16) -> np.ndarray:
        """Images (N, H, W, 3) uint8 of final latents, rounded as diffusers does; StudioError when one is NaN
        or infinite."""
        config = self.vae.config
        upcast = self.vae.dtype == torch.float16 and config.get("force_upcast", False)
        if upcast:
            self.vae.to(torch.float32)
        try:
            x = latents.to(self.vae.dtype)
            mean, std = config.get("latents_mean"), config.get("latents_std")
            if mean is not None and std is not None:
                mean, std = (
                    torch.tensor(v, device=x.device, dtype=x.dtype).view(1, -1, 1, 1) for v in (mean, std)
                )
                x = x * std / config.scaling_factor + mean
            else:
                x = x / config.scaling_factor
            parts = [self.vae.decode(part, return_dict=False)[0] for part in x.split(chunk)]
        finally:
            if upcast:
                self.vae.to(torch.float16)
        drawn = torch.cat(parts)
        if not drawn.isfinite().all():
            raise StudioError(
                f"{self.id} drew NaN or infinity instead of an image; lower the strength of the edits or the "
                "guidance, or take --dtype float32."
            )
        pixels = drawn.mul(0.5).add(0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        return (pixels * 255).round().astype(np.uint8)

    def generate(
        self,
        cond: Conditioning,
        seeds: Sequence[int],
        plan: Plan,
        *,
        negative: str | None = None,
        patches: Sequence[Patch] = (),
        on_step: Any = None,
    ) -> np.ndarray:
        """Images (N, H, W, 3) uint8 of N rows of text states, one seed a row."""
        uncond = self.unconditional(len(cond), plan, negative)
        return self.decode(denoise(self, cond, uncond, seeds, plan, patches=patches, on_step=on_step))
