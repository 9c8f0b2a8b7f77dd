"""Layers that a network can do without: set to zero before it is hardened, they leave more bits to each weight of the others.

Single layers of a residual network hardly matter to its outputs (Veit et al. 2016, arXiv 1605.06431), and what harm is done
training makes good. Leans on `inputs`, `structure`, `measure` and torch.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import measure
from .inputs import batches_of
from .structure import modules_that_share

_MOST_HARM = 0.5  # squared error of the outputs over their variance; a layer that all others lean on does more than 1
_EXAMPLES = 256  # that outputs are compared on


def drop_layers(
    net: nn.Module,
    batches: list[Any],
    *,
    most: float,
    where: Callable[[str, nn.Module], bool] | None = None,
    progress: bool = True,
) -> tuple[nn.Module, list[str]]:
    """Set the weights of whole layers to zero, one by one those that do the least harm for their size.

    Args:
        net: a trained network; left alone.
        batches: inputs, each something that the network takes; the first 256 examples are used.
        most: weights of two or more dimensions that may be left; more are left if without any further layer the outputs would be off
            by more than half their variance.
        where: of which modules weights may be dropped, as in `convert`.
        progress: show a progress bar on stderr.

    Returns:
        A copy, and the names of the modules whose weights are zero now: dropped ones, and those that only they listened to.

    Raises:
        MiracleError: the network does not take the inputs.
    """
    model = copy.deepcopy(net)
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    inputs = batches_of(batches, _EXAMPLES) if batches else []
    wanted = _outputs(model, inputs)
    left = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    shared = modules_that_share(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, measure.SOLVED) and n not in shared and m.weight.any()}
    layers = {n: m for n, m in layers.items() if where is None or where(n, m)}
    dropped: list[str] = []
    if wanted is not None:
        variance = float((wanted - wanted.mean(0)).square().mean())
        harm = 0.0
        with tqdm(total=max(0, round(left - most)), disable=not progress, file=sys.stderr, desc="spare", unit="weight") as bar:
            while left > most and variance > 0:
                harms = {n: _without(model, layer, inputs, wanted) / variance for n, layer in layers.items()}
                fit = [n for n in harms if harms[n] <= _MOST_HARM]
                if not fit:
                    break
                first = min(fit, key=lambda n: (harms[n] - harm) / layers[n].weight.numel())
                harm = harms[first]
                layers[first].weight.data.zero_()
                for name in [first, *(n for n in _unheard(model, inputs, layers) if n != first)]:
                    layer = layers.pop(name)
                    layer.weight.data.zero_()
                    dropped.append(name)
                    left -= layer.weight.numel()
                    bar.update(layer.weight.numel())
    for module, training in modes:
        module.training = training
    return model, dropped


@torch.no_grad()
def _outputs(model: nn.Module, inputs: list[Any]) -> Tensor | None:
    """Of all examples; None if they cannot be compared."""
    found = [measure.through(model, x) for x in inputs]
    if not found or not all(isinstance(y, Tensor) and y.is_floating_point() and y.shape[1:] == found[0].shape[1:] for y in found):
        return None
    return torch.cat(found).float()


@torch.no_grad()
def _without(model: nn.Module, layer: Any, inputs: list[Any], wanted: Tensor) -> float:
    """Mean squared error of the outputs if a layer's weights were zero."""
    kept = layer.weight.data
    layer.weight.data = torch.zeros_like(kept)
    try:
        found = _outputs(model, inputs)
    finally:
        layer.weight.data = kept
    assert found is not None
    return float((found - wanted).square().mean().nan_to_num(torch.inf))


@torch.enable_grad()
def _unheard(model: nn.Module, inputs: list[Any], layers: dict[str, Any]) -> list[str]:
    """Layers whose weights no output depends on any more."""
    weights = [layer.weight for layer in layers.values()]
    wanting = [w.requires_grad for w in weights]
    try:
        for w in weights:
            w.requires_grad_()
        gradients = torch.autograd.grad(model(inputs[0]).float().square().sum(), weights, allow_unused=True)
    finally:
        for w, wants in zip(weights, wanting, strict=True):
            w.requires_grad_(wants)
    return [name for name, g in zip(layers, gradients, strict=True) if g is None or not g.any()]
