"""Variational layers: a Gaussian posterior for every weight of a network.

A `Posterior` holds the mean and log standard deviation of one tensor's weights and knows their prior. Layers read their
weights through it: `Linear` and the convolutions by local reparametrisation (the noise is drawn on the layer's output,
Kingma et al. 2015, arXiv 1506.02557), everything else by a direct draw of the weights (`drawing_class`).
Leans on torch, `network` and `errors`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import MismatchError
from .network import call

_MIN_OUTPUT_VARIANCE = 1e-12  # keeps sqrt differentiable where every weight of a layer is fixed
INITIAL_RELATIVE_STD = 0.1  # of the tensor's root mean square: about 3.3 bits of KL a weight to begin with


class Law(NamedTuple):
    """Posterior of one tensor's live weights: mean and log standard deviation.

    The layer computes with `scale` times a draw, and the weights' KL counts `share` times (both broadcastable; None is 1).
    """

    mean: Tensor
    log_std: Tensor
    scale: Tensor | None = None
    share: Tensor | None = None


class Posterior(nn.Module):
    """Factorised Gaussian posterior over the weights of one tensor, with its zero-mean Gaussian prior.

    While `prior_std` is None the prior is the empirical-Bayes optimum in closed form: the variance of a group is the mean
    of `mean**2 + std**2` over it, one group per tensor, or per unit (slice of axis 0) if `per_unit`. `freeze_prior` ends
    that. Weights that are `fixed` (already coded) are constants: no noise, no KL.

    Only the first `kept` units along the first axes are held; the rest of `full_shape` has been dropped and is zero.

    Args:
        name: the tensor's name in the original model's state dict.
        value: the trained weights, any shape.
        per_unit: one prior scale per slice of axis 0 rather than one for the tensor, if it has two axes or more.
    """

    fixed: Tensor
    value: Tensor
    prior_std: Tensor | None

    def __init__(self, name: str, value: Tensor, *, per_unit: bool = False):
        super().__init__()
        self.name = name
        self.full_shape = tuple(value.shape)
        self.per_unit = per_unit and value.dim() > 1
        self.local = False  # True where the layer draws on its output instead of here
        self.mode = "draw"
        self.conditional: Law | None = None  # given a context (`ban`); None: the posterior's own mean and log_std
        self._cache: Tensor | None = None
        self._caching = False
        mean = value.detach().clone(memory_format=torch.contiguous_format)
        mean = mean if mean.dtype == torch.float64 else mean.float()
        rms = float(mean.square().mean().sqrt()) if mean.numel() else 0.0
        std = max(INITIAL_RELATIVE_STD * rms, 1e-4)
        self.mean = nn.Parameter(mean)
        self.log_std = nn.Parameter(torch.full_like(mean, math.log(std)))
        self.register_buffer("fixed", torch.zeros_like(mean, dtype=torch.bool))
        self.register_buffer("value", torch.zeros_like(mean))
        self.register_buffer("prior_std", None)

    @property
    def kept(self) -> tuple[int, ...]:
        """Shape of the live part: the first `kept[a]` slices along each axis a."""
        return tuple(self.mean.shape)

    def law(self) -> Law:
        """The posterior that holds now: the conditional one, or its own."""
        return Law(self.mean, self.log_std) if self.conditional is None else self.conditional

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every live weight to compute with; a fixed weight is its value, with variance 0."""
        mean, log_std, scale, _ = self.law()
        var = (2 * log_std).exp()
        if scale is not None:
            mean, var = mean * scale, var * scale.square()
        if self.fixed.any():
            return torch.where(self.fixed, self.value, mean), var.masked_fill(self.fixed, 0.0)
        return mean, var

    def current(self) -> Tensor:
        """The weights to compute with, full shape: a draw in mode "draw", else the mean.

        Within one forward pass of the converted model every use sees the same draw.
        """
        if self.mode == "mean":
            return self.expand(self.moments()[0])
        if self._cache is None:
            mean, var = self.moments()
            draw = self.expand(mean + var.sqrt() * torch.randn_like(mean))
            if not self._caching:
                return draw
            self._cache = draw
        return self._cache

    def cache_draws(self, on: bool) -> None:
        """Hold one draw for the whole of a forward pass (`on`), or forget it."""
        self._caching, self._cache = on, None

    def expand(self, live: Tensor) -> Tensor:
        """Put the live part into a full-shaped tensor; dropped units are zero."""
        if live.shape == self.full_shape:
            return live
        pad = [p for have, want in zip(reversed(live.shape), reversed(self.full_shape), strict=True) for p in (0, want - have)]
        return F.pad(live, pad)

    def group_second_moment(self) -> Tensor:
        """Mean of `mean**2 + std**2` per prior group, broadcastable to the live shape; never depends on context."""
        second = self.mean.square() + (2 * self.log_std).exp()
        if self.per_unit:
            return second.mean(dim=tuple(range(1, second.dim())), keepdim=True)
        return second.mean().reshape((1,) * second.dim())

    def kl_per_weight(self) -> Tensor:
        """KL to the prior of every live weight, nats, live shape; 0 where fixed."""
        mean, log_std, _, share = self.law()
        second = mean.square() + (2 * log_std).exp()
        prior_var = self.group_second_moment() if self.prior_std is None else self.prior_std.square()
        prior_var = prior_var.clamp_min(1e-30)
        kl = 0.5 * (second / prior_var - 1.0 + prior_var.log()) - log_std
        kl = kl if share is None else kl * share
        return kl.masked_fill(self.fixed, 0.0) if self.fixed.any() else kl

    def kl(self) -> Tensor:
        """KL to the prior, nats, shape (), summed over the weights that are not yet fixed."""
        if self.mean.numel() == 0:
            return self.mean.sum()
        return self.kl_per_weight().sum()

    @torch.no_grad()
    def freeze_prior(self, std: Tensor) -> None:
        """Hold the prior at `std` (broadcastable to the live shape) from now on."""
        self.prior_std = std.to(self.mean)

    @torch.no_grad()
    def fix(self, flat_positions: Tensor, values: Tensor) -> None:
        """Make the weights at `flat_positions` (of the flattened live part) constants."""
        self.value.view(-1)[flat_positions] = values.to(self.value)
        self.fixed.view(-1)[flat_positions] = True

    @torch.no_grad()
    def release(self, flat_positions: Tensor) -> None:
        """Undo `fix`: the weights at `flat_positions` are random again, as their mean and standard deviation say."""
        self.fixed.view(-1)[flat_positions] = False

    @torch.no_grad()
    def select(self, axis: int, units: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Keep only `units` (indices into the live part) along `axis`; they become the first ones, in that order.

        An `optimizer` of the parameters goes on with what is kept of them, its own averages cut alike.
        """
        units = units.to(self.mean.device)
        for own in ("mean", "log_std"):
            old = getattr(self, own)
            new = nn.Parameter(old.detach().index_select(axis, units).contiguous())
            setattr(self, own, new)
            if optimizer is not None:
                _exchange(optimizer, old, new, axis, units)
        self.fixed = self.fixed.index_select(axis, units).contiguous()
        self.value = self.value.index_select(axis, units).contiguous()

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        return f"{self.name!r}, kept={self.kept}, full_shape={self.full_shape}, fixed={int(self.fixed.sum())}"


def _exchange(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, axis: int, units: Tensor) -> None:
    """Let `new`, the slices `units` of `old`, take its place in an optimizer."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            state[key] = value.index_select(axis, units).contiguous()
    optimizer.state[new] = state


class _Local:
    """Noise on the output: mean and variance of it by two linear maps, one normal per output value."""

    posterior: nn.ModuleDict

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output: a draw of it, or in mode "mean" what the mean weights give; the argument has its name in torch."""
        weight: Posterior = self.posterior["weight"]  # type: ignore[assignment]
        bias: Posterior | None = dict(self.posterior.items()).get("bias")  # type: ignore[assignment]
        w_mean, w_var = weight.moments()
        b_mean, b_var = bias.moments() if bias is not None else (None, None)
        out = self._map(input, w_mean, b_mean)
        if weight.mode == "mean":
            return out
        var = self._map(input.square(), w_var, b_var)
        return out + var.clamp_min(_MIN_OUTPUT_VARIANCE).sqrt() * torch.randn_like(out)


class VariationalLinear(_Local, nn.Linear):
    """`nn.Linear` whose output is drawn from the law that the weights' posterior gives it."""

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class VariationalConv1d(_Local, nn.Conv1d):
    """`nn.Conv1d` with local reparametrisation."""

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class VariationalConv2d(_Local, nn.Conv2d):
    """`nn.Conv2d` with local reparametrisation."""

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class VariationalConv3d(_Local, nn.Conv3d):
    """`nn.Conv3d` with local reparametrisation."""

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


LOCAL_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: VariationalLinear,
    nn.Conv1d: VariationalConv1d,
    nn.Conv2d: VariationalConv2d,
    nn.Conv3d: VariationalConv3d,
}

_drawing_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _ignore(_: object, __: object) -> None:
    """Setter of a property that follows from others."""


def hold_in_eval(module: nn.Module) -> None:
    """Keep a folded BatchNorm from looking at batch statistics again, whatever `train()` is called on the network."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"training": property(lambda self: False, _ignore)})


def _weight_property(name: str) -> property:
    return property(lambda self: self.posterior[name].current())


def drawing_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `cls` whose tensors `names` are read from the module's posteriors, whatever `cls` does with them."""
    key = (cls, names)
    if key not in _drawing_classes:
        body: dict[str, Any] = {name: _weight_property(name) for name in names}
        if issubclass(cls, nn.RNNBase):  # its forward reads this list, not the attributes
            body["_flat_weights"] = property(lambda self: [getattr(self, n) for n in self._flat_weights_names], _ignore)
        if issubclass(cls, (nn.Sequential, nn.ModuleList)):  # one with tensors of its own goes on to run its layers alone
            body["__iter__"] = lambda self: (m for own, m in self._modules.items() if own != "posterior")
        _drawing_classes[key] = type(f"Variational{cls.__name__.removeprefix('Variational')}", (cls,), body)
    return _drawing_classes[key]


def posteriors(model: nn.Module) -> dict[str, Posterior]:
    """All posteriors of a converted model by their tensors' names, in the order of the model's parameters.

    Raises:
        MismatchError: it is no network at all.
    """
    if not isinstance(model, nn.Module):
        raise MismatchError(f"a converted network is wanted, not a value of type {type(model).__name__}: call miracle_ban.convert(model)")
    return {m.name: m for m in model.modules() if isinstance(m, Posterior)}


@contextlib.contextmanager
def use_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Compute with `mode` ("draw" or "mean") within the block."""
    before = {p: p.mode for p in posteriors(model).values()}
    for p in before:
        p.mode = mode
    try:
        yield
    finally:
        for p, old in before.items():
            p.mode = old


def loss_at(model: nn.Module, weights: Sequence[Tensor], loss: Callable, inputs: Any, targets: Any) -> Tensor:
    """`loss(model(inputs), targets)` at given live weights, one tensor for each of `posteriors(model)`; for `torch.func`."""
    held = list(posteriors(model).values())
    before = [p.conditional for p in held]
    try:
        for p, weight, law in zip(held, weights, before, strict=True):
            p.conditional = Law(weight, p.log_std.detach(), None if law is None or law.scale is None else law.scale.detach())
        with use_mode(model, "mean"):
            return loss(call(model, inputs), targets)
    finally:
        for p, law in zip(held, before, strict=True):
            p.conditional = law


def example_gradients(model: nn.Module, weights: Sequence[Tensor], loss: Callable, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Gradients of each example's loss with respect to the live weights, each `[n, *weight.shape]`."""

    def of_one(own: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_at(model, own, loss, x[None], y[None])

    return list(torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0), randomness="different")(list(weights), inputs, targets))


def kl(model: nn.Module) -> Tensor:
    """KL of the posteriors to their priors, nats, shape (), summed over all weights not yet fixed.

    Args:
        model: a converted model.

    Returns:
        A scalar tensor that carries gradients.

    Raises:
        MismatchError: the model has no posteriors.

    Example:
        >>> from miracle_ban import convert
        >>> kl(convert(nn.Linear(3, 2))).shape
        torch.Size([])
    """
    held = posteriors(model)
    if not held:
        raise MismatchError("kl() needs a converted model: call miracle_ban.convert(model) first")
    return torch.stack([p.kl() for p in held.values()]).sum()
