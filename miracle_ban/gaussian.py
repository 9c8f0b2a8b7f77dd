"""Factorised Gaussians: KL, log density ratio, its law, and the stretch function of greedy Poisson rejection sampling.

A block is a row: posterior Q = N(mean, std^2), prior P = N(0, prior_std^2), independent over the row's weights. In units
of the prior, x = weight / prior_std, delta = mean / prior_std, v = (std / prior_std)^2, and l = log dQ/dP in nats:

    l(x) = sum_i [ delta_i^2 / (2 v_i) ... ] = const + x . (delta / v) + x^2 . (1/2 - 1/(2 v))
    under Q:  l = sum_i [ c_i - a_i e_i^2 / 2 + b_i e_i ],  a = 1 - v, b = delta sqrt(v), c = delta^2/2 - ln(v)/2, e ~ N(0, 1)

Encoder's side only: nothing here has to be the same on two machines. Leans on torch and scipy.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

_GRID = 600  # points of log density ratio on which the stretch function is tabulated
_THETAS = 96  # saddlepoints on each side of the mean
_GROUPS = 8  # of weights with nearly the same variance ratio, in a saddlepoint approximation
_FIRST_TIME, _TIME_STEP, _TIMES = -6.0, 1.0 / 16.0, 480  # log times of a table of thresholds, nats
_ROWS = 512  # blocks that are tabulated at once: they stay in the cache
_LEAST_SURVIVAL = 1e-30  # no search lasts as long
_MAX_WORK = 1 << 18  # elements of one temporary: they stay in the cache


@dataclass(frozen=True)
class Blocks:
    """Blocks in units of their prior: `delta` and `v`, float64, each `[blocks, d]`."""

    delta: Tensor
    v: Tensor

    @classmethod
    def of(cls, mean: Tensor, std: Tensor, prior_std: Tensor) -> Blocks:
        """From means and standard deviations `[blocks, d]`; `prior_std` broadcasts."""
        prior_std = prior_std.double().expand_as(mean)
        return cls(mean.double() / prior_std, (std.double() / prior_std).square().clamp_min(1e-20))

    def __getitem__(self, rows: Tensor | slice) -> Blocks:
        return Blocks(self.delta[rows], self.v[rows])

    def kl_nats(self) -> Tensor:
        """KL(Q || P) of each block, nats, `[blocks]`."""
        return 0.5 * (self.v + self.delta.square() - 1.0 - self.v.log()).sum(1)

    def std_log_ratio(self) -> Tensor:
        """Standard deviation of l under Q, nats, `[blocks]`."""
        return (0.5 * (1.0 - self.v).square() + self.delta.square() * self.v).sum(1).sqrt()

    def max_log_ratio(self) -> Tensor:
        """Largest l, the Renyi divergence D_inf in nats, `[blocks]`; infinite where std >= prior std and mean != 0."""
        a = 1.0 - self.v
        peak = torch.where(
            a > 0, self.delta.square() / (2.0 * a.clamp_min(1e-300)), torch.where((self.delta == 0) & (a == 0), 0.0, torch.inf)
        )
        return (peak - 0.5 * self.v.log()).sum(1)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """l(x) = const + x . linear + x^2 . quadratic: const `[blocks]`, the others `[blocks, d]`."""
        const, linear, quadratic = self.coefficients_by_weight()
        return const.sum(1), linear, quadratic

    def coefficients_by_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `coefficients`, each weight with its own part of the constant: all `[blocks, d]`."""
        const = -0.5 * self.v.log() - self.delta.square() / (2.0 * self.v)
        return const, self.delta / self.v, 0.5 - 0.5 / self.v

    def log_ratio(self, x: Tensor) -> Tensor:
        """L of one point per block, x `[blocks, d]` in units of the prior; nats, `[blocks]`."""
        const, linear, quadratic = self.coefficients()
        x = x.double()
        return const + (x * linear + x.square() * quadratic).sum(1)


@dataclass(frozen=True)
class Stretch:
    """The stretch function sigma of GPRS on a grid of log density ratios, and the survival probability S.

    S(h) = E_Q[(1 - h/r)^+] and sigma(h) = integral_0^h d eta / S(eta) (Flamich 2023, arXiv 2305.15313): accept the first
    candidate whose arrival time T satisfies T <= sigma(r). All arrays `[blocks, grid]`: `level` = ln h, ascending.
    """

    level: np.ndarray
    log_survival: np.ndarray
    log_sigma: np.ndarray

    def threshold(self, block: int, log_time: float) -> float:
        """The smallest l that is accepted at arrival time exp(log_time)."""
        sigma, level = self.log_sigma[block], self.level[block]
        if log_time <= sigma[0]:
            return float(level[0] + log_time - sigma[0])  # sigma(h) = h where S = 1
        return float(np.interp(log_time, sigma, level))

    def thresholds(self, rows: np.ndarray, log_time: np.ndarray) -> np.ndarray:
        """`threshold` of several blocks at a time of each, from a table; within 3e-3."""
        place = (log_time - _FIRST_TIME) / _TIME_STEP
        at = np.clip(place.astype(np.int64), 0, _TIMES - 2)
        low, high = self._bars[rows, at], self._bars[rows, at + 1]
        return np.where(place < 0, low + log_time - _FIRST_TIME, low + np.minimum(place - at, 1.0) * (high - low))

    @functools.cached_property
    def _bars(self) -> np.ndarray:
        """The threshold of each block at a range of log times, `[blocks, times]`."""
        time = torch.linspace(_FIRST_TIME, _FIRST_TIME + (_TIMES - 1) * _TIME_STEP, _TIMES, dtype=torch.float64, device="cpu")
        parts = []
        for i in range(0, len(self.level), _ROWS):
            sigma, level = torch.from_numpy(self.log_sigma[i : i + _ROWS]), torch.from_numpy(self.level[i : i + _ROWS])
            bars = _interpolate(time.expand(len(sigma), -1), sigma, level, left=0.0, right=0.0)
            early = time[None, :] <= sigma[:, :1]  # sigma(h) = h where S = 1
            bars = torch.where(early, level[:, :1] + time[None, :] - sigma[:, :1], bars)
            parts.append(torch.where(time[None, :] > sigma[:, -1:], level[:, -1:], bars))
        return torch.cat(parts).numpy() if parts else np.zeros((0, _TIMES))

    def survival(self, log_time: np.ndarray) -> np.ndarray:
        """P(no acceptance before time exp(log_time)) for each block: `[blocks, *log_time.shape]`."""
        rows = [np.exp(np.interp(log_time, s, q, left=0.0)) for s, q in zip(self.log_sigma, self.log_survival, strict=True)]
        return np.stack(rows)


def _law(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Grid of log density ratios `[blocks, grid]`, ascending, finer towards the top, and ln Q[l >= level] on it.

    Towards the largest ratio there is, the stretch function grows without bound, hence the finer grid there.
    """
    kl, sd = blocks.kl_nats(), blocks.std_log_ratio().clamp_min(1e-6)
    low = torch.minimum(kl - 14.0 * sd, torch.full_like(kl, -8.0))
    high = torch.minimum(blocks.max_log_ratio(), kl + 11.0 * sd)
    level = high[:, None] - (high - low)[:, None] * torch.linspace(1, 0, _GRID, dtype=torch.float64, device=kl.device).square()
    return level, _log_tail(blocks, level)


def log_ratio_quantiles(blocks: Blocks, probability: np.ndarray) -> np.ndarray:
    """Quantiles of the log density ratio under Q, nats, `[blocks, len(probability)]`."""
    level, log_tail = _law(blocks)
    below = 1.0 - log_tail.exp().numpy()
    return np.stack([np.interp(probability, b, v) for b, v in zip(below, level.numpy(), strict=True)])


def super_level(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """The level h of which the prior's mean log ratio above it is the posterior's own, E_P[l | l >= h] = KL.

    Returns:
        h in nats and ln P[l >= h], both `[blocks]`.
    """
    level, log_tail = _law(blocks)
    tail = log_tail.exp()
    middle = 0.5 * (level[:, 1:] + level[:, :-1])
    cell = (tail[:, :-1] - tail[:, 1:]).clamp_min(0.0) * (-middle).exp()  # prior mass of a cell: dP = exp(-l) dQ
    cell[:, -1] += tail[:, -1] * (-level[:, -1]).exp()
    mass = cell.flip(1).cumsum(1).flip(1)
    mean = (cell * middle).flip(1).cumsum(1).flip(1) / mass.clamp_min(1e-300)
    # the first level that is high enough; above the last that has any mass there is none
    reached = (mean >= blocks.kl_nats()[:, None]) & (mass > 0.0)
    at = torch.where(reached.any(1), reached.to(torch.uint8).argmax(1), (mass > 0.0).sum(1) - 1).clamp_min(0)[:, None]
    return level.gather(1, at)[:, 0].numpy(), mass.gather(1, at)[:, 0].clamp(1e-300, 1.0).log().numpy()


def stretch(blocks: Blocks) -> Stretch:
    """Tabulate the stretch function of each block from the law of its log density ratio under Q."""
    parts = [_stretch(blocks[i : i + _ROWS]) for i in range(0, max(len(blocks.delta), 1), _ROWS)]
    level, log_survival, log_sigma = (torch.cat(p).numpy() for p in zip(*parts, strict=True))
    return Stretch(level, log_survival, log_sigma)


def _stretch(blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    level, log_tail = _law(blocks)
    step = level.diff(dim=1)
    tail = log_tail.exp()
    decay = (-step).exp()
    whole = -torch.expm1(-step)  # integral over a cell of exp(-x) times W, which is linear within the cell
    slope = (whole - step * decay) / step.clamp_min(1e-300)
    survival = torch.zeros_like(level)
    after = torch.zeros_like(level[:, 0])
    for j in range(_GRID - 2, -1, -1):
        after = tail[:, j] * whole[:, j] + (tail[:, j + 1] - tail[:, j]) * slope[:, j] + decay[:, j] * after
        survival[:, j] = after
    log_survival = survival.clamp(_LEAST_SURVIVAL, 1.0).log()
    log_survival[:, -1] = log_survival[:, -2] - math.log(2.0)
    growth = level - log_survival  # ln of d sigma / d level
    cells = torch.logaddexp(growth[:, 1:], growth[:, :-1]) + (0.5 * step).log()
    terms = torch.cat([level[:, :1], cells], 1)
    most = terms.amax(1, keepdim=True)
    log_sigma = (terms - most).exp_().cumsum_(1).clamp_min_(1e-300).log_().add_(most)
    return level, log_survival, log_sigma


def _log_tail(blocks: Blocks, level: Tensor) -> Tensor:
    """Ln Q[l >= level], `[blocks, grid]`: noncentral chi-square where the v of a small block agree, else Lugannani-Rice."""
    v = blocks.v
    shared = (v.shape[1] <= _GROUPS) & ((v.max(1).values - v.min(1).values) <= 1e-9 * v.max(1).values) & (v[:, 0] < 1.0)
    result = torch.empty_like(level)
    if shared.any():
        result[shared] = _log_tail_shared(blocks[shared], level[shared])
    if not shared.all():
        rest = torch.nonzero(~shared).squeeze(1)
        for rows in rest.split(max(1, _MAX_WORK // (2 * _THETAS * min(v.shape[1], _GROUPS)))):
            result[rows] = _log_tail_lugannani_rice(blocks[rows], level[rows])
    return torch.cummin(result.clamp(max=0.0), 1).values


def _log_tail_shared(blocks: Blocks, level: Tensor) -> Tensor:
    """Max l - l is a/2 times a noncentral chi-square with d degrees of freedom and noncentrality v |delta|^2 / a^2."""
    v, d = blocks.v[:, :1].numpy(), blocks.v.shape[1]
    a = 1.0 - v
    shift = v * blocks.delta.square().sum(1, keepdim=True).numpy() / a**2
    gap = 2.0 / a * np.maximum(blocks.max_log_ratio()[:, None].numpy() - level.numpy(), 0.0)
    with np.errstate(divide="ignore"):
        cdf = np.where(shift > 1e-9, stats.ncx2.cdf(gap, d, np.maximum(shift, 1e-9)), special.chdtr(d, gap))
    return torch.from_numpy(np.log(np.clip(cdf, 1e-300, 1.0)))


def _log_tail_lugannani_rice(blocks: Blocks, level: Tensor) -> Tensor:
    """Saddlepoint approximation (Lugannani and Rice 1980) on a grid of saddlepoints, interpolated to `level`."""
    number, a, b2 = (t[:, None, :] for t in _merged(1.0 - blocks.v, blocks.delta.square() * blocks.v))
    sd = blocks.std_log_ratio().clamp_min(1e-6)
    size = torch.logspace(math.log10(0.05), 4.5, _THETAS, dtype=torch.float64, device=sd.device)[None, :] / sd[:, None]
    largest, smallest = a.amax(2), a.amin(2)
    left = -_saturate(size, largest)  # 1 + theta a > 0 for every weight
    right = _saturate(size, -smallest)
    theta = torch.cat([left.flip(1), right], 1)
    t = theta[:, :, None]
    u = 1.0 + t * a
    c = blocks.kl_nats() + 0.5 * (number * a).sum((1, 2))
    k0 = theta * c[:, None] + (-0.5 * number * u.log() + t.square() * b2 / (2.0 * u)).sum(2)
    k1 = c[:, None] + (-0.5 * number * a / u + t * b2 * (2.0 + t * a) / (2.0 * u.square())).sum(2)
    k2 = (number * (a / u).square() / 2.0 + b2 / u**3).sum(2)
    w = theta.sign() * (2.0 * (theta * k1 - k0)).clamp_min(1e-12).sqrt()
    s = theta * k2.sqrt()
    log_sf = torch.special.log_ndtr(-w)
    mills = (-0.5 * w.square() - 0.5 * math.log(2.0 * math.pi) - log_sf).exp()
    log_tail = log_sf + torch.log1p((mills * (1.0 / s - 1.0 / w)).clamp_min(-1.0 + 1e-12))
    return _interpolate(level, k1.cummax(1).values, log_tail.cummin(1).values, left=0.0, right=-690.0)


def _merged(a: Tensor, b2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of nearly the same `a` as one: their number and common a and b^2, each `[blocks, at most 8]`.

    Mean and variance of l stay exactly as they are; the third cumulant to second order in the spread of `a` within a group.
    """
    d = a.shape[1]
    if d <= _GROUPS:
        return torch.ones_like(a), a, b2
    order = a.argsort(1)
    group = torch.arange(d, device=a.device) * _GROUPS // d
    sums = torch.zeros(3, len(a), _GROUPS, dtype=a.dtype, device=a.device)
    a, b2 = a.gather(1, order), b2.gather(1, order)
    weight = 0.5 * a.square() + b2
    for total, part in zip(sums, (a.square(), b2, weight * a), strict=True):
        total.index_add_(1, group, part)
    square, b2, first = sums
    common = first / (0.5 * square + b2).clamp_min(1e-300)
    least = 1e-3 * (square * (_GROUPS / d)).sqrt() + 1e-12
    common = torch.where(common.abs() < least, torch.where(common < 0, -least, least), common)
    return square / common.square(), common, b2


def _interpolate(x: Tensor, points: Tensor, values: Tensor, *, left: float, right: float) -> Tensor:
    """Piecewise linear interpolation row by row: `x` `[rows, n]`, `points` (ascending) and `values` `[rows, m]`."""
    at = torch.searchsorted(points.contiguous(), x.contiguous()).clamp(1, points.shape[1] - 1)
    x0, x1, y0, y1 = (t.gather(1, i) for t in (points, values) for i in (at - 1, at))
    result = y0 + (y1 - y0) * ((x - x0) / (x1 - x0).clamp_min(1e-300)).clamp(0.0, 1.0)
    result = result.masked_fill_(x < points[:, :1], left)
    return result.masked_fill_(x > points[:, -1:], right)


def _saturate(size: Tensor, slope: Tensor) -> Tensor:
    """`size`, bent so that it stays below 1 / slope where slope > 0."""
    return torch.where(slope > 1e-12, size / (1.0 + size * slope.clamp_min(1e-12)), size)
