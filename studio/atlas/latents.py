"""Training of atlas-sd's autoencoder: crops first, whole images after, then the decoder alone over whitened
latents.

Whitening is folded into quant_conv and post_quant_conv, so latents have mean 0 and covariance 1 and
scaling_factor is 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from studio.atlas.fit import fit
from studio.atlas.render import render
from studio.atlas.world import draw_scenes

VAE_CONFIG = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(16, 32, 32),
    layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=1,
    mid_block_add_attention=False,
    sample_size=64,
    scaling_factor=1.0,
)


def images_for(n: int, rng: np.random.Generator) -> torch.Tensor:
    """(n, 3, 64, 64) float32 renderings in -1..1."""
    return torch.from_numpy(render(draw_scenes(n, rng))).permute(0, 3, 1, 2).float() / 127.5 - 1


def _error(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    return (made - true).abs().mean() + 2 * (made - true).square().mean()


def train_vae(minutes: float, work: Path, seed: int = 0) -> tuple[AutoencoderKL, dict[str, float]]:
    """Trains the autoencoder and returns it with its PSNR in dB on fresh renderings."""
    torch.manual_seed(seed)
    rng, vae = np.random.default_rng(seed + 10), AutoencoderKL(**VAE_CONFIG)
    for name, pictures, share, lr in (("crops", _crops, 0.3, 2e-3), ("whole", _whole, 0.35, 1.5e-3)):
        fit(
            vae,
            lambda step, pictures=pictures: _reconstruction(vae, pictures(rng)),
            minutes=minutes * share,
            lr=lr,
            checkpoint=work / f"vae-{name}.safetensors",
            decay=0.99,
        )
    whiten(vae, images_for(1024, rng))
    fit(
        nn.ModuleList([vae.post_quant_conv, vae.decoder]),
        lambda step: _decoding(vae, _whole(rng)),
        minutes=minutes * 0.35,
        lr=2e-3,
        checkpoint=work / "vae-decoder.safetensors",
        decay=0.995,
    )
    vae.eval()
    return vae, {"psnr": psnr(vae, images_for(512, np.random.default_rng(seed + 11)))}


def _crops(rng: np.random.Generator) -> torch.Tensor:
    images = images_for(32, rng)
    y, x = 4 * rng.integers(0, 9, size=2)
    return images[:, :, y : y + 32, x : x + 32]


def _whole(rng: np.random.Generator) -> torch.Tensor:
    return images_for(16, rng)


def _reconstruction(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """The error of encoding and decoding, and a little of the posterior's distance from the normal."""
    posterior = vae.encode(images).latent_dist
    made = vae.decode(posterior.sample()).sample
    return _error(made, images) + 1e-4 * posterior.kl().mean() / images[0].numel() * 3


def _decoding(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """The decoder's error at latents with a little noise on them."""
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
    noisy = latents + 0.06 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(latents)
    return _error(vae.decode(noisy).sample, images)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit reconstructions of `images` (N, 3, H, W) in -1..1."""
    made = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return float(-10 * torch.log10(((made - images) / 2).square().mean()))


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Rotates and scales the latent space, in place, so that latents of `images` have mean 0 and covariance
    1.

    The posterior's variance becomes one constant, since a rotation can't be applied to its logarithm.
    """
    posterior = vae.encode(images).latent_dist
    flat = posterior.mean.permute(1, 0, 2, 3).flatten(1).double()
    mean, values_vectors = flat.mean(1), torch.linalg.eigh(torch.cov(flat))
    forward = torch.diag(values_vectors.eigenvalues.rsqrt()) @ values_vectors.eigenvectors.T
    backward = torch.linalg.inv(forward)
    spread = (posterior.var.mean((0, 2, 3)).double()[None] * forward.square()).sum(1)
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight.double().squeeze((2, 3)), quant.bias.double()
    new = torch.cat([forward @ weight[:4], torch.zeros_like(weight[4:])])
    shift = torch.cat([forward @ (bias[:4] - mean), spread.log()])
    quant.weight.copy_(new[:, :, None, None].float())
    quant.bias.copy_(shift.float())
    out = post.weight.double().squeeze((2, 3))
    post.bias.copy_((post.bias.double() + out @ mean).float())
    post.weight.copy_((out @ backward)[:, :, None, None].float())
