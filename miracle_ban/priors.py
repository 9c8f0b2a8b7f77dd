"""What prior and posterior a tensor has, from the noise that its weights may carry.

A weight w that may carry noise of variance 1 / precision beside a prior N(0, s^2) has the posterior of ridge regression, of variance
1 / (precision + 1 / s^2) and of mean w less the share of its variance that is noise: a code at the rate-distortion bound leaves a
Gaussian so. Leans on `layers` and torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .bits import NATS_PER_BIT
from .layers import Posterior

DROP_BELOW_BITS = 0.02  # KL per weight under which a unit with a prior scale of its own is dropped
WIDER = 1.5  # variance of the prior over that of the weights: the corrections make them larger
_FARTHEST, _FARTHEST_ELSEWHERE = 5.0, 3.3  # prior stds that a weight may be away from zero, in corrected layers and in other tensors
_LARGEST_RATIO = 0.999  # noise over variance
LEAST = 1e-12
_FIXED_POINT_STEPS = 30
_OWN_STEPS, _OVERSHOOT, _SOME_INPUTS = 12, 1.5, 64
_LEAST_WIDENING, _LARGEST_WIDENING, _WIDENINGS = 0.75, 64.0, 65  # of a prior's variance
SAMPLE = 1 << 16  # weights that the KL of a tensor is estimated on


def _largest_variance(p: Posterior, weights: Tensor, *, corrected: bool) -> Tensor:
    """Of the prior of each group of weights, if they carried no noise."""
    rows = weights.flatten(1) if p.per_unit else weights.reshape(1, -1)
    shape = _group_shape(p, weights)
    square, largest = rows.square().mean(1).reshape(shape), rows.abs().amax(1).reshape(shape)
    factor, farthest = (WIDER, _FARTHEST) if corrected else (1.0, _FARTHEST_ELSEWHERE)
    return torch.maximum(factor * square, (largest / farthest).square()).clamp_min(LEAST)


def widening(size: Tensor, worth: Tensor, together: float) -> Tensor:
    """What the candidates' variance should be, for each row of weights, over that of the weights.

    Where n weights are chosen together among candidates from N(0, a p), their density near the weights z falls as
    a^(-n/2) exp(-sum z^2 / 2 a p), and the squared distance of the nearest one grows as the density's power -2/n: for a weight as
    a exp(z^2 / n a p), times exp(1 / n a) for each other of usual size. For one Gaussian weight alone a = 3 is best (Panter and Dite
    1951), for many 1; weights far out ask for more. A code serves those whose errors count, so n is the effective number of these.

    Args:
        size: z^2 / p, `[rows, weights]`.
        worth: of an error of sqrt(p), likewise.
        together: weights that are chosen together.
    """
    shares = worth / (worth.sum() + LEAST)
    n = max(together * math.exp(float(torch.special.entr(shares).sum())) / worth.numel(), 1.0)
    worth = worth / (worth.sum(1, keepdim=True) + LEAST)
    least, largest = math.log2(_LEAST_WIDENING), math.log2(_LARGEST_WIDENING)
    factors = torch.logspace(least, largest, _WIDENINGS, base=2.0, dtype=size.dtype, device=size.device)
    errors = [math.log(a) + (n - 1.0) / (n * a) + torch.logsumexp(size / (n * a) + (worth + LEAST).log(), 1) for a in factors.tolist()]
    return factors[torch.stack(errors).argmin(0)]


def share_of_means(p: Posterior) -> Tensor:
    """Mean square of the means over the prior's variance, `[units]`."""
    assert p.prior_std is not None
    return (p.mean / p.prior_std).square().flatten(1).mean(1)


def _group_shape(p: Posterior, weights: Tensor) -> list[int]:
    return [-1 if p.per_unit else 1, *[1] * weights.dim()][: weights.dim()]


class _OwnPrior:
    """The prior's variance for each group of weights, `[groups, 1]`, under noise of variance 1 / (`lam` * `precision`).

    Draws have the variance of the prior, p, if p = sum(a^2 w^2) / sum(a) over the group, a = p / (p + noise): where all weights carry the
    same noise, what is left of their mean square without it; where some carry more than they are large, what fits the others.

    Args:
        most: of a unit's inputs that are looked at.
    """

    def __init__(self, p: Posterior, weights: Tensor, precision: Tensor, *, corrected: bool, most: int = 1024):
        self.largest = _largest_variance(p, weights, corrected=corrected).reshape(-1, 1)
        if p.per_unit:
            units, inputs = weights.shape[:2]
            some = torch.randperm(inputs, generator=torch.Generator().manual_seed(0), device="cpu")[:most].sort().values.to(weights.device)
            precision = precision.expand(units, inputs, *[1] * (weights.dim() - 2)).reshape(units, inputs)[:, some]
            square = weights.reshape(units, inputs, -1)[:, some].square().mean(2)
        else:
            precision, square = precision.expand_as(weights).reshape(1, -1), weights.square().reshape(1, -1)
        self.square = square * (self.largest / (square.mean(1, keepdim=True) + LEAST))  # as if all were as large as that
        self.noise = precision.reciprocal()

    def __call__(self, lam: float) -> Tensor:
        noise = self.noise / lam
        least = (1.0 - _LARGEST_RATIO) * self.largest
        prior = torch.maximum(self.largest - torch.minimum(noise, self.largest).mean(1, keepdim=True), least)
        for _ in range(_OWN_STEPS):
            gain = prior / (prior + noise)
            better = (gain.square() * self.square).sum(1, keepdim=True) / (gain.sum(1, keepdim=True) + LEAST)
            prior = torch.maximum(prior * (better / prior) ** _OVERSHOOT, least)
        return prior


def prior_under(noise: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Prior variance by unit, `[units, 1, ...]`, and precision of the likelihood, `[units, inputs]`, if weights get this noise each.

    Draws w + e have the variance p = mean(w^2 + v), v = min(noise, p), which is that of the prior; 1 / v = precision + 1 / p.
    """
    square = weights.square().reshape(*noise.shape, -1).mean(2)
    prior = square.mean(1, keepdim=True) + LEAST
    for _ in range(_FIXED_POINT_STEPS):
        prior = (square + torch.minimum(noise, prior)).mean(1, keepdim=True) + LEAST
    precision = 1.0 / torch.minimum(noise + LEAST, _LARGEST_RATIO * prior) - 1.0 / prior
    return prior.reshape(-1, *[1] * (weights.dim() - 1)), precision


def _kl_nats(square: Tensor, var: Tensor, prior: Tensor) -> Tensor:
    """KL of each weight, from the square of its mean."""
    return 0.5 * ((var + square) / prior - 1.0 + (prior / var).log())


@torch.no_grad()
def set_posterior(p: Posterior, weights: Tensor, precision: Tensor, prior: Tensor | None, *, corrected: bool) -> None:
    """Posterior of one tensor, where noise of variance 1 / `precision` may be added to each weight, and its prior unless that is given."""
    if prior is None:
        prior = _OwnPrior(p, weights, precision, corrected=corrected)(1.0).reshape(_group_shape(p, weights))
    var = 1.0 / (precision + 1.0 / prior)
    p.mean.copy_(weights * (1.0 - var / prior))
    p.log_std.copy_((0.5 * var.log()).expand_as(weights))
    p.freeze_prior(prior.sqrt())


class Sampled:
    """The KL that `set_posterior` would give a large tensor, estimated from some of its weights."""

    def __init__(self, p: Posterior, weights: Tensor, precision: Tensor, prior: Tensor | None, *, corrected: bool):
        generator = torch.Generator().manual_seed(0)
        some = torch.randint(weights.numel(), (SAMPLE,), generator=generator, device="cpu").to(weights.device)
        at = torch.unravel_index(some, weights.shape)
        self.weights, self.precision = (v.expand_as(weights)[at].double() for v in (weights, precision))
        self.prior: Callable[[float], Tensor]  # variance, at `lam` times the precision
        if prior is None:
            own = _OwnPrior(p, weights, precision, corrected=corrected, most=_SOME_INPUTS)
            group = at[0] if p.per_unit else torch.zeros_like(at[0])
            self.prior = lambda lam: own(lam)[group, 0].double()
        else:
            given = prior.expand_as(weights)[at].double()
            self.prior = lambda _: given
        self.share = SAMPLE / weights.numel()

    def kl(self, lam: float) -> float:
        """Nats, at `lam` times the precision."""
        prior = self.prior(lam)
        var = 1.0 / (lam * self.precision + 1.0 / prior)
        return float(_kl_nats((self.weights * (1.0 - var / prior)).square(), var, prior).sum()) / self.share


def match_kl(p: Posterior, precision: Tensor, kl_bits: float | None) -> None:
    """Set the standard deviations by `precision`, times a common factor that makes the KL of the free weights `kl_bits`."""
    assert p.prior_std is not None
    prior = p.prior_std.square().expand_as(p.mean)
    precision = precision.expand_as(p.mean)
    free = torch.nonzero(~p.fixed.flatten()).squeeze(1)
    if not len(free) or kl_bits is None:
        p.log_std.copy_(-0.5 * (precision + 1.0 / prior).log())
        return
    some = free[:: -(-len(free) // SAMPLE)]
    square, own_prior, own = (v.flatten()[some].double() for v in (p.mean.square(), prior, precision))
    wanted = kl_bits * NATS_PER_BIT * len(some) / len(free)

    def kl(factor: float) -> float:
        var = 1.0 / (factor * own + 1.0 / own_prior)
        return float(_kl_nats(square, var, own_prior).sum())

    low, high = 1e-6, 1e6
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if kl(middle) > wanted else (middle, high)
    p.log_std.copy_(-0.5 * (low * precision + 1.0 / prior).log())
