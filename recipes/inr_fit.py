"""Posteriors of images' weights under a codec of `inr_codec`, by the beta-ELBO."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from miracle_ban.bits import NATS_PER_BIT

sys.path.insert(0, str(Path(__file__).parent))
from inr_codec import TILE, Codec

FIT_RATE = 0.02  # learning rate


def rate_code(bits: Tensor | float) -> Tensor:
    """What the codec is told of the rate: from KL of a tile, bits."""
    return torch.as_tensor(bits, dtype=torch.float32).div(800.0).log()


def kl_each(v_mean: Tensor, v_std: Tensor) -> Tensor:
    """KL of each posterior of v to N(0, 1), nats."""
    return 0.5 * (v_mean.square() + v_std.square() - 1) - v_std.log()


def kl_bits(v_mean: Tensor, v_std: Tensor) -> Tensor:
    """KL of whole images, bits, `[n]`."""
    return kl_each(v_mean, v_std).flatten(1).sum(1) / NATS_PER_BIT


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, dB."""
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def water_level(codec: Codec, x: Tensor, bits: Tensor) -> Tensor:
    """About the noise variance at which images take `bits` of each tile: that of an adaptive code of independent weights."""
    power = (codec.analyse(x) * codec.std[:, None, None]).square().flatten(1)
    low, high = torch.full_like(bits, -16.0), torch.zeros_like(bits)
    for _ in range(10):
        middle = (low + high) / 2
        more = 0.5 * torch.log2(1 + power / middle.exp()[:, None]).sum(1) > bits * x[0, 0].numel() / TILE**2
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return middle.exp()


def batch(images: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
    """All or some of uint8 images `[n, h, w, 3]` as `[k, 3, h, w]` in [0, 1]."""
    return images[rows].permute(0, 3, 1, 2).float() / 255


def fit_posteriors(codec: Codec, x: Tensor, rate: Tensor, bits: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Posteriors of v of several images side by side by the beta-ELBO, each with `bits` of KL a tile.

    Returns:
        Mean and standard deviation, `[n, weights of a tile, rows, columns]`, and the noise variance (of a pixel) that costs those bits.
    """
    wanted = torch.full((len(x),), bits)
    water = water_level(codec, x, wanted)
    for _ in range(6):  # until the linear parts alone ask for as many bits
        _, v_mean, v_std = codec.infer(x, rate, water)
        tiles = v_mean[0, 0].numel()
        water = water * (kl_bits(v_mean, v_std) / tiles / wanted)
    mean, log_std = v_mean.detach().clone().requires_grad_(), v_std.detach().log().requires_grad_()
    optimizer = torch.optim.Adam([{"params": [mean], "lr": FIT_RATE}, {"params": [log_std], "lr": 2 * FIT_RATE}], betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [FIT_RATE, 2 * FIT_RATE], total_steps=steps + 1, pct_start=0.1)
    for _ in range(steps):
        image = codec.decode(mean + log_std.exp() * torch.randn_like(mean), rate)
        found = kl_bits(mean, log_std.exp())
        loss = found * NATS_PER_BIT + (image - x).square().sum((1, 2, 3)) / (2 * water)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
        water = water * (found.detach() / tiles / wanted) ** 0.05
    return mean.detach(), log_std.detach().exp(), water
