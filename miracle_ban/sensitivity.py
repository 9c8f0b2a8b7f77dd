"""What noise in the weights of a trained network costs, measured on a few unlabelled inputs.

How much a layer's outputs may err is what they vary, changed most of the way to what noise in them does to the network's outputs
(`measure.worth`); where no gradients are to be had it is what they vary, and for weights of no layer, as of an embedding, what noise in
them does. Networks that were trained under noise (`harden`) bring theirs along.
Leans on `measure`, `priors`, `layers`, `convert` and torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import measure
from .convert import conversion
from .layers import posteriors
from .priors import LEAST, prior_under

DAMPING = 0.05  # of variances of inputs, relative to themselves or the mean of their layer's
_ROUNDING = 1e-6  # variance over mean square
_LEAST_NOISE = 1e-4  # of a unit, relative to the mean of its layer's
_LEAST_CHANNEL = 0.01  # variance that an output channel is taken to have, relative to the mean of its layer's
_LEAST_CURVATURE = 0.1  # of a layer's outputs, relative to the mean of its units; of hardened networks to each
_SILENT = 1e-3  # of what noise in the units of a layer does on average: a unit of so little correlates with none
# how far noise follows what it does to the network's outputs from layer to layer, as a power; by hand: at 0.5 and 0.9 a ResNet-20's
# score error in 37,500 bytes rose by 3 and 4 percent
_WEIGHED_LAYERS = 0.75
_LEAST_WORTH = 0.05  # of a vector, of what is typical: gains before a norm seem to be worth nothing, until noise is as large as they are
_TYPICAL_INPUTS = 256.0  # of a layer, where no layer was seen


class Sensitivity:
    """What noise in each weight of a network costs, and in the outputs of its modules.

    Args:
        net: from `convert`, its means the trained weights, which must stay if there are `batches`.
        batches: inputs, each something that `net` takes; may be empty, then nothing is measured.
        noise: see `reconstruct.Reconstruction`.

    Attributes:
        trained: the weights of each posterior.
        owner: of a posterior, the module whose outputs it shapes, if that is called.
        moments: mean and variance of a module's outputs, by channel.
        curvature: what noise e in the outputs of a module costs, e^T G e: `[groups, units, units]`, or its diagonal `[groups, units, 1]`.
        precision: what noise in a weight costs, as of a Gaussian likelihood whose scale is open; broadcasts over the weights.
        prior: its variance, by unit, where the noise was known before.
    """

    @torch.no_grad()
    def __init__(self, net: nn.Module, batches: list[Any], noise: Mapping[str, Tensor]):
        self.net, self.noise = net, noise
        self.trained = {name: p.mean.detach() if batches else p.mean.detach().clone() for name, p in posteriors(net).items()}
        self.owner = _owners(net)
        self.moments: measure.Moments = {}
        self.curvature: dict[str, Tensor] = {}
        self.prior: dict[str, Tensor] = {}
        self.precision = self._measure(batches)

    def _measure(self, batches: list[Any]) -> dict[str, Tensor]:
        """The precision: the variance of a weight's input times the curvature of its unit."""
        inputs, self.moments = measure.moments(self.net, set(self.owner.values()), batches)
        self.owner = {name: module for name, module in self.owner.items() if module in inputs and self._is_of(name, module, inputs)}
        self.moments = {module: self.moments[module] for module in self.owner.values()}
        output = {module: _typical_variance(*moments) for module, moments in self.moments.items()}
        held = {name: weights for name, weights in self.trained.items() if weights.numel()}
        matrices = [name for name, weights in held.items() if name in self.owner and weights.dim() > 1]
        wanted: dict[str, Tensor] = {name: p.mean for name, p in posteriors(self.net).items() if name in held}
        worth = measure.worth(self.net, batches, wanted, output)
        output = self._output_from_noise(output, inputs)
        for name in matrices:  # a map that is only shown what it multiplies (`exposed`)
            module = self.owner[name]
            if name in worth.weights and module not in worth.outputs:
                rows = worth.weights[name][0] / self._input_variance(name, inputs[module][1]).mean(1)
                units = (rows / output[module] + LEAST).sqrt()
                units = units * (rows.mean() / units.mean())
                worth.outputs[module] = units.reshape(measure.groups(self.net.get_submodule(module)), -1, 1)
        self._set_curvature(output, worth.outputs)
        found = {name: self._own_precision(name, inputs[self.owner[name]][1]) for name in matrices}
        level = self._level({name: (found[name], worth.weights[name][0]) for name in matrices if name in worth.weights})
        for name, weights in held.items():
            if name in self.owner and weights.dim() == 1:
                found[name] = self.by_channel(self.owner[name]).to(weights)
        others = {name: weights for name, weights in held.items() if name not in self.owner}
        found |= _of_no_layer(others, worth.weights, level, _typical_inputs([held[name] for name in matrices]))
        for name, weights in held.items():
            if weights.dim() > 1:
                found[name] = found[name] * weights.flatten(1).any(1).reshape(-1, *[1] * (weights.dim() - 1))  # none to zeros
        return found

    def _is_of(self, name: str, module: str, inputs: measure.Moments) -> bool:
        """Whether weights go with what their module was seen to take and give; in a class of the user's own they may not."""
        weights, number = self.trained[name], measure.groups(self.net.get_submodule(module))
        seen = (len(self.moments[module][0]), len(inputs[module][0]))
        return seen == (len(weights), weights.shape[1] * number) if weights.dim() > 1 else seen[0] == len(weights)

    def _set_curvature(self, output: dict[str, Tensor], worth: dict[str, Tensor]) -> None:
        """Of each module's outputs one over what noise is held against, changed most of the way to what it does to the network's.

        What noise in many layers does together is not the sum of what it does in each. Units of one layer count, alone and together, in
        proportion to what noise in them does. Where training had its own noise, each unit counts as that says, and only what units do
        together is measured.
        """
        noisy = {self.owner[name] for name in self.noise if name in self.owner}
        norm = dict(conversion(self.net).folded)
        noisy |= {norm[module] for module in noisy if module in norm}
        known = {module: g for module, g in worth.items() if module not in noisy}
        level = self._level({name: (output[m].reciprocal(), diagonals(known[m])) for name, m in self.owner.items() if m in known})
        for module, variance in output.items():
            if module in known:
                own = float((variance.reciprocal().mean() / diagonals(known[module]).mean()).log())
                g = known[module] * math.exp((1.0 - _WEIGHED_LAYERS) * own + _WEIGHED_LAYERS * (level or 0.0))
                least = _LEAST_CURVATURE * float(diagonals(g).mean())
                self.curvature[module] = g + least * torch.eye(g.shape[1], dtype=g.dtype, device=g.device) if is_full(g) else g + least
            else:
                alone = variance.reciprocal().reshape(measure.groups(self.net.get_submodule(module)), -1)
                full = module in worth and is_full(worth[module])
                self.curvature[module] = _correlated(alone, worth[module]) if full else alone[:, :, None]

    def _level(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> float | None:
        """Logarithm of the ratio of two tensors' means, on average over the weights; None of no weights."""
        logs = [(self.trained[name].numel(), float((a.mean() / b.mean()).log())) for name, (a, b) in pairs.items()]
        return _weighted_mean(logs) if logs else None

    def by_channel(self, module: str) -> Tensor:
        """Curvature of a module's outputs one by one, `[channels]`."""
        return diagonals(self.curvature[module]).flatten()

    def _own_precision(self, name: str, by_channel: Tensor) -> Tensor:
        """Of the weights of a layer, by what they are multiplied with, `[rows, channels, 1, ...]`; or as it was trained with."""
        precision = self._input_variance(name, by_channel) * self.by_channel(self.owner[name])[:, None]
        if name in self.noise:
            self.prior[name], precision = prior_under(self._own_noise(name), self.trained[name])
        return precision.reshape(*precision.shape, *[1] * (self.trained[name].dim() - 2))

    def _input_variance(self, name: str, by_channel: Tensor) -> Tensor:
        """Damped variance of what each weight of a layer is multiplied with, the same for all places of a kernel: `[rows, channels]`."""
        variance = by_channel.reshape(measure.groups(self.net.get_submodule(self.owner[name])), -1)
        variance = variance + DAMPING * variance.mean(1, keepdim=True) + LEAST
        return variance.repeat_interleave(len(self.trained[name]) // len(variance), 0)

    def _own_noise(self, name: str) -> Tensor:
        """Variance of the noise that weights were trained with: `[rows, channels]`."""
        weights = self.trained[name]
        return self.noise[name].to(weights) * weights.flatten(1).square().mean(1, keepdim=True)

    def _output_from_noise(self, output: dict[str, Tensor], inputs: measure.Moments) -> dict[str, Tensor]:
        """Put what noise in one weight, as large as training had it, does to the outputs in place of what they vary.

        Where training had none, as much less than the variance as on average elsewhere.
        """
        norm = dict(conversion(self.net).folded)
        output, less = dict(output), {}
        for name in self.noise:
            module, weights = self.owner.get(name), self.trained.get(name)
            if module is not None and weights is not None and weights.dim() > 1 and weights.any():
                noise = (self._own_noise(name) * self._input_variance(name, inputs[module][1]) + LEAST).log().mean(1).exp()
                less[module] = float((noise.sum() / output[module].sum()).log())
                silent = ~weights.flatten(1).any(1)
                noise = torch.where(silent, noise[~silent].mean(), noise)
                output[module] = noise.clamp_min(float(noise.mean()) * _LEAST_NOISE)
                if module in norm:
                    less[norm[module]], output[norm[module]] = less[module], output[module]
        if less:
            typical = math.exp(statistics.fmean(less.values()))
            output = {module: v if module in less else typical * v for module, v in output.items()}
        return output


def _owners(model: nn.Module) -> dict[str, str]:
    """The module whose outputs each posterior's weights shape: weights of layers, biases of layers and norms, none of them tied."""
    found: dict[str, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        held = module._modules.get("posterior")
        doubled = getattr(module, "doubled", ())
        for own, p in dict(held.named_children()).items() if held is not None else ():
            if own in doubled:
                continue
            channels = p.mean.dim() == 1 and isinstance(module, measure.WITH_CHANNELS)
            fits = {"weight": isinstance(module, measure.SOLVED), "bias": channels}.get(own, False)
            found.setdefault(str(p.name), []).append(module_name if fits else "")
    return {name: modules[0] for name, modules in found.items() if len(modules) == 1 and modules[0]}


def _typical_variance(mean: Tensor, variance: Tensor) -> Tensor:
    """Of each output channel and its layer, the geometric mean, `[channels]`: on ResNet-20 better than either."""
    layer = variance.mean()
    if layer < _ROUNDING * mean.square().mean():  # always the same outputs
        variance = mean.square()
        layer = variance.mean()
    layer = layer.clamp_min(LEAST)
    return layer * (variance / layer).clamp_min(_LEAST_CHANNEL).sqrt()


def _correlated(alone: Tensor, g: Tensor) -> Tensor:
    """Curvatures `[parts, rows, rows]` with the diagonals `alone`, `[parts, rows]`, and nine tenths of the correlations of `g`."""
    diagonal = diagonals(g)
    size = (alone / (diagonal + LEAST + _SILENT * diagonal.mean(1, keepdim=True))).sqrt()
    joint = (1.0 - _LEAST_CURVATURE) * size[:, :, None] * g * size[:, None, :]
    return joint + torch.diag_embed(alone - diagonals(joint))


def _typical_inputs(matrices: list[Tensor]) -> float:
    """Of a unit, the geometric mean over the weights of all layers."""
    logs = [(weights.numel(), math.log(weights[0].numel())) for weights in matrices]
    return math.exp(_weighted_mean(logs)) if logs else _TYPICAL_INPUTS


def _of_no_layer(
    held: Mapping[str, Tensor], worth: Mapping[str, tuple[Tensor, Tensor]], level: float | None, inputs: float
) -> dict[str, Tensor]:
    """The precision of weights of which no module's outputs are known: by what they do to the network's, else by their size.

    Args:
        held: the weights.
        worth: from `measure.worth`.
        level: logarithm of precision over worth; default as if these were worth on average what their size says.
        inputs: of a unit of a typical layer.
    """
    shares = {name: inputs if weights.dim() > 1 else 1.0 for name, weights in held.items()}  # of noise; a bias has all of it
    found = {name: 1.0 / (shares[name] * weights.square().mean() + LEAST) for name, weights in held.items()}
    if level is None:
        known = {name: weights.numel() for name, weights in held.items() if name in worth and weights.dim() > 1}
        logs = [(count, float((found[name].mean() / worth[name][0].mean()).log())) for name, count in known.items()]
        level = _weighted_mean(logs) if logs else None
    if level is None:
        return found
    for name in held.keys() & worth.keys():
        least = 0.0 if held[name].dim() > 1 else _LEAST_WORTH * float(found[name])
        found[name] = (math.exp(level) * _separable(*worth[name], held[name].dim())).clamp_min(least)
    return found


def _weighted_mean(values: list[tuple[int, float]]) -> float:
    """Mean of (weight, value) pairs."""
    return sum(n * v for n, v in values) / sum(n for n, _ in values)


def _separable(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Of single weights, `[rows, columns, 1, ...]` of `dim` axes, from means over rows and over columns; of a vector one for all."""
    mean = rows.mean()
    if dim < 2:
        return mean
    product = (rows + DAMPING * mean)[:, None] * (columns + DAMPING * mean) / ((1.0 + DAMPING) ** 2 * mean)
    return product.reshape(*product.shape, *[1] * (dim - 2))


def is_full(g: Tensor) -> bool:
    """Whether curvatures are `[parts, rows, rows]`, not `[parts, rows, 1]`, the diagonals."""
    return g.shape[2] == g.shape[1]


def diagonals(g: Tensor) -> Tensor:
    """Of curvatures, `[parts, rows]`."""
    return g.diagonal(dim1=1, dim2=2) if is_full(g) else g[:, :, 0]
