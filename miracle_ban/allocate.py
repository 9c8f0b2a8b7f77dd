"""Posteriors from the trained weights alone, for a network without training data: noise by reverse water-filling.

Every output unit of a tensor is taken for a Gaussian source of variance s^2. Noise of variance D costs 1/2 log2(s^2 / D) bits a
weight, and the posterior that attains it is N((1 - D / s^2) w, D (1 - D / s^2)) under the prior N(0, s^2 - D) (Cover and
Thomas, section 10.3). D is one number for each tensor, inversely proportional to how much the network's outputs mind noise
there: the diagonal of the Fisher information, measured on random inputs. Leans on `layers` and torch.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .bits import NATS_PER_BIT
from .errors import MiracleWarning
from .layers import Posterior, posteriors, use_mode

_BATCHES, _BATCH = 16, 64  # of random inputs
_SIDES = (32, 28, 64, 224, 96, 128, 299, 48, 16, 8)  # of images, pixels, that are tried in turn
_LARGEST_NORMAL = 3.3  # prior stds that the largest weight of a unit may be away: more are rare among the codebook's numbers
_LARGEST_RATIO = 0.999  # noise over variance; a unit that gets so much is dropped
_LEAST_SCALE = 1e-12


def allocate(model: nn.Module, kl_bits: float, *, inputs: Any = None, seed: int = 0) -> None:
    """Set every posterior and its prior so that the KL of all together is `kl_bits`.

    Args:
        model: from `convert`; not trained.
        kl_bits: KL to spend, bits; less is spent where it would take noise under 1e-9 of the weights' variance.
        inputs: a batch for the network to measure sensitivity on; default random numbers of a shape that it takes.
        seed: of the random numbers.
    """
    held = {name: p for name, p in posteriors(model).items() if p.mean.numel()}
    trained = {name: p.mean.detach().clone() for name, p in held.items()}
    for p in held.values():
        p.per_unit = p.mean.dim() > 1
    noise = {name: 1.0 / f for name, f in sensitivity(model, inputs=inputs, seed=seed).items()}

    def spent(factor: float) -> float:
        for name, p in held.items():
            _set(p, trained[name], factor * noise[name])
        return sum(float(p.kl().detach()) for p in held.values()) / NATS_PER_BIT

    scale = math.exp(sum(math.log(max(_mean_square(trained[n]) / noise[n], 1e-300)) for n in held) / max(len(held), 1))
    low, high = 1e-9 * scale, 1e3 * scale
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > kl_bits else (low, middle)
    spent(high)


def _mean_square(weights: Tensor) -> float:
    return max(float(weights.double().square().mean()), _LEAST_SCALE)


@torch.no_grad()
def _set(p: Posterior, weights: Tensor, noise: float) -> None:
    """Posterior and prior of one tensor at noise variance `noise`."""
    if p.per_unit:
        rows, shape = weights.flatten(1), (-1,) + (1,) * (weights.dim() - 1)
        variance, largest = rows.square().mean(1).reshape(shape), rows.abs().amax(1).reshape(shape)
    else:
        shape = (1,) * weights.dim()
        variance, largest = weights.square().mean().reshape(shape), weights.abs().max().reshape(shape)
    variance = torch.maximum(variance, (largest / _LARGEST_NORMAL).square()).clamp_min(_LEAST_SCALE)
    ratio = (noise / variance).clamp(1e-12, _LARGEST_RATIO)
    p.mean.copy_(weights * (1.0 - ratio))
    p.log_std.copy_((0.5 * (ratio * variance * (1.0 - ratio)).log()).expand_as(weights))
    p.freeze_prior((variance * (1.0 - ratio)).sqrt())


def sensitivity(model: nn.Module, *, inputs: Any = None, seed: int = 0) -> dict[str, float]:
    """Mean over each tensor of the diagonal of the Fisher information, by tensor.

    Class scores `[n, classes]` are taken for logits, with labels drawn from the network's own predictions; any other outputs
    for means of unit Gaussians. A network that takes none of the inputs tried gets one relative noise everywhere.
    """
    held = {name: p for name, p in posteriors(model).items() if p.mean.numel()}
    uniform = {name: 1.0 / _mean_square(p.mean.detach()) for name, p in held.items()}
    generator = torch.Generator().manual_seed(seed)
    make = _maker(model, generator) if inputs is None else lambda: inputs
    if make is None:
        text = "no random input fits this network: give `inputs`, a batch, so that it can be measured which tensors mind noise"
        warnings.warn(text, MiracleWarning, stacklevel=3)
        return uniform
    training, total = model.training, dict.fromkeys(held, 0.0)
    model.eval()
    try:
        with use_mode(model, "mean"):
            for _ in range(_BATCHES):
                value = _log_likelihood(model(make()), generator)
                means = [p.mean for p in held.values()]
                for name, g in zip(held, torch.autograd.grad(value, means, allow_unused=True), strict=True):
                    total[name] += 0.0 if g is None else float(g.double().square().mean()) / _BATCHES
    finally:
        model.train(training)
    least = 1e-6 * max(total.values(), default=1.0) + 1e-30
    return {name: max(v, least) for name, v in total.items()}


def _log_likelihood(outputs: Any, generator: torch.Generator) -> Tensor:
    """Log-likelihood of outputs drawn from the network's own prediction, summed: its gradient squared is the Fisher diagonal."""
    leaves = [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    if len(leaves) == 1 and leaves[0].dim() == 2 and leaves[0].shape[1] > 1:
        logs = leaves[0].float().log_softmax(1)
        labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
        return logs.gather(1, labels).sum()
    return torch.stack([(t.float() * torch.randn(t.shape, generator=generator).to(t.device)).sum() for t in leaves]).sum()


def _maker(model: nn.Module, generator: torch.Generator) -> Callable[[], Tensor] | None:
    """Random inputs of a shape that the network takes, or None."""
    device = next(model.parameters()).device
    for layer in model.modules():
        shapes: list[tuple[int, ...]] = []
        if isinstance(layer, nn.Conv2d):
            shapes = [(_BATCH if side < 128 else 8, layer.in_channels, side, side) for side in _SIDES]
        elif isinstance(layer, nn.Conv1d):
            shapes = [(_BATCH, layer.in_channels, length) for length in (128, 1024)]
        elif isinstance(layer, nn.Conv3d):
            shapes = [(4, layer.in_channels, 16, side, side) for side in (32, 112)]
        elif isinstance(layer, nn.Linear):
            shapes = [(_BATCH, layer.in_features)]
        elif isinstance(layer, nn.RNNBase):
            shapes = [(16, 16, layer.input_size)]
        elif isinstance(layer, nn.Embedding):
            return _accepted(model, functools.partial(_tokens, layer.num_embeddings, generator, device))
        for shape in shapes:
            found = _accepted(model, functools.partial(_normals, shape, generator, device))
            if found is not None:
                return found
        if shapes:
            return None
    return None


def _normals(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator).to(device)


def _tokens(number: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(number, (16, 16), generator=generator).to(device)


def _accepted(model: nn.Module, make: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), use_mode(model, "mean"):
            model(make())
    except Exception:  # whatever a network raises on a shape that it does not take
        return None
    finally:
        model.train(training)
    return make
