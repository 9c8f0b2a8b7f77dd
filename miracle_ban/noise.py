"""Noise on the weights of a network, as large as a code is going to leave it, and how the bits behind it are shared out.

A code of R bits leaves a Gaussian weight with a noise of 2^-2R of its prior's variance (its distortion-rate function): of s^2 over
the mean square of what it says, R = log2(1 + s^-2) / 2. All weights between the same two units have the same s, one factor for where
they go times one for where they come from; what all weights together may cost is given. The expected loss is least where one bit
more does the same good everywhere: then its gradient by the log of each factor is lambda sum(1 / (1 + s^2)) over the weights that
have it, with one lambda for all. Units that a network does not need come to have next to no bits. Leans on `distributed` and torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import distributed

_LEAST_STD, _LARGEST_STD = 0.02, 40.0  # s: 5.6 and 0.0005 bits
_MEMORY = 0.01  # of the mean that lambda is
_FARTHEST = 20.0  # times lambda that the gradient of a unit counts for
_FLOOR = 0.02  # nats: units of fewer do not count as if they had none
_LARGEST_FACTOR = 2.5  # log of what the weights from a unit have more or less than others
_LEAST_SLOPE = 1e-12
_CORRECTIONS = 3  # Newton steps back to the bits that are wanted


class Noise:
    """Noise on some parameters of a network.

    Args:
        weights: the parameters, by name.
        bits: that all of them have at first, shared out evenly.
    """

    def __init__(self, weights: Mapping[str, Tensor], bits: float):
        self.weights = {name: w for name, w in weights.items() if w.numel()}
        self.shapes = [_blocks(w) for w in self.weights.values()]
        device = next(iter(self.weights.values())).device if self.weights else None
        counts = [torch.zeros(0)]
        index: tuple[list[Tensor], list[Tensor]] = ([torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)])
        sizes = [0, 0]
        for weight, shape in zip(self.weights.values(), self.shapes, strict=True):
            counts.append(torch.full((shape[0] * shape[1],), weight.numel() / (shape[0] * shape[1])))
            for axis in (0, 1):
                view = [1, 1]
                view[axis] = shape[axis]
                index[axis].append((sizes[axis] + torch.arange(shape[axis])).view(view).expand(shape).reshape(-1))
                sizes[axis] += shape[axis]
        self.sizes = torch.cat(counts).to(device)  # weights of each block, which is what lies between two units
        self.index = [torch.cat(i).to(device) for i in index]  # of each block's two factors
        into, out_of = sizes
        self.factors = [torch.full((into,), self._even(bits), device=device), torch.zeros(out_of, device=device)]  # logs
        self.counts = [torch.zeros_like(f).index_add(0, i, self.sizes) for f, i in zip(self.factors, self.index, strict=True)]
        self.slope = torch.zeros(2, device=device)  # running sum of lambda, and of the weights in that sum
        self.added: list[Tensor] = []  # of the last draw
        self.drawn: list[Tensor] = []

    def _even(self, bits: float) -> float:
        """Log of s, if it is the same everywhere."""
        rate = bits / max(float(self.sizes.sum()), 1.0)
        return min(max(-0.5 * math.log(math.expm1(min(2.0 * rate * math.log(2.0), 50.0))), math.log(_LEAST_STD)), math.log(_LARGEST_STD))

    def _log_std(self) -> Tensor:
        """Log of s, of each block."""
        into, out_of = (f[i] for f, i in zip(self.factors, self.index, strict=True))
        return (into + out_of).clamp(math.log(_LEAST_STD), math.log(_LARGEST_STD))

    def _bits(self, log_std: Tensor) -> Tensor:
        """Of all weights."""
        return (self.sizes * torch.log2(1.0 + torch.exp(-2.0 * log_std))).sum() / 2.0

    def _by_tensor(self, of_blocks: Tensor) -> list[Tensor]:
        return [v.view(shape) for v, shape in zip(of_blocks.split([a * b for a, b in self.shapes]), self.shapes, strict=True)]

    def draw(self) -> dict[str, Tensor]:
        """The parameters with noise, drawn anew."""
        drawn = {}
        self.added, self.drawn = [], []
        for (name, weight), std in zip(self.weights.items(), self._by_tensor(self._log_std().exp()), strict=True):
            with torch.no_grad():
                rms = weight.square().mean(tuple(range(1, weight.dim())) or (0,), keepdim=True).sqrt()
                size = std.view(*std.shape, *[1] * (weight.dim() - 2)) if weight.dim() > 1 else std.view(1)
                self.added.append(size * rms * _normals_like(weight))
            noisy = weight + self.added[-1]
            drawn[name] = noisy if noisy.requires_grad else noisy.requires_grad_()  # bits for what is not trained, too
            self.drawn.append(noisy)
        return drawn

    @torch.no_grad()
    def share(self, pace: Tensor | float, bits: Tensor | float) -> None:
        """After the gradients of a loss under `draw`: move bits to where they do most good; from now on there are `bits` in all."""
        if not self.weights:
            return
        by_block = [
            _gradient(w if w.requires_grad else noisy).mul(a).reshape(*shape, -1).sum(2).reshape(-1)
            for w, noisy, a, shape in zip(self.weights.values(), self.drawn, self.added, self.shapes, strict=True)
        ]
        harm = distributed.mean(torch.cat(by_block))  # gradient of the loss by log s
        worth = self._worth(self._log_std())
        self.slope += _MEMORY * (torch.stack([harm.sum() / worth.sum(), torch.ones_like(worth[0])]) - self.slope)
        slope = (self.slope[0] / self.slope[1]).clamp_min(_LEAST_SLOPE)
        for factor, index, count in zip(self.factors, self.index, self.counts, strict=True):
            harms, worths = (torch.zeros_like(factor).index_add(0, index, v) for v in (harm, worth))
            excess = harms / (slope * (worths + _FLOOR * count)) - 1.0
            factor -= pace * excess.clamp(-_FARTHEST, _FARTHEST)
        into, out_of = self.factors
        into.clamp_(2.0 * math.log(_LEAST_STD), math.log(_LARGEST_STD))
        out_of.clamp_(-_LARGEST_FACTOR, _LARGEST_FACTOR)
        for _ in range(_CORRECTIONS):
            log_std = self._log_std()
            into += (self._bits(log_std) - bits) * math.log(2.0) / self._worth(log_std).sum()

    def _worth(self, log_std: Tensor) -> Tensor:
        """Nats that each block loses by a larger log s."""
        return self.sizes / (1.0 + torch.exp(2.0 * log_std))

    def variances(self) -> dict[str, Tensor]:
        """Of the noise of each parameter over its units' mean squares, `[units, inputs]`."""
        return dict(zip(self.weights, self._by_tensor(torch.exp(2.0 * self._log_std())), strict=True))

    def state(self) -> dict[str, Any]:
        """What is to be kept."""
        return {"factors": self.factors, "slope": self.slope}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        for own, kept in zip([*self.factors, self.slope], [*state["factors"], state["slope"]], strict=True):
            own.copy_(kept)


def _blocks(weight: Tensor) -> tuple[int, int]:
    """Units, and inputs of each, that weights are told apart by."""
    return (weight.shape[0], weight.shape[1]) if weight.dim() > 1 else (1, 1)


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _normals_like(weight: Tensor) -> Tensor:
    """`randn_like`; that is six times slower where channels come last."""
    axes = sorted(range(weight.dim()), key=lambda axis: weight.stride(axis), reverse=True)
    drawn = torch.randn([weight.shape[axis] for axis in axes], dtype=weight.dtype, device=weight.device)
    return drawn.permute([axes.index(axis) for axis in range(weight.dim())])
