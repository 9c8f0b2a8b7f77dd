"""What goes into the layers of a network and what comes out, measured on a few inputs.

A layer's weights and inputs as the matrices of a regression, moments by channel. Leans on `network`, `layers` and torch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import MiracleError
from .layers import use_mode
from .network import arguments, call, evaluating, main_output, split, tensors_in

_LARGEST_PART = 4096  # inputs of a layer that are solved for together
_ROWS, _ROWS_PER_INPUT = 1 << 14, 8  # examples times positions that H is measured on: at least, and for each input;
_MORE_ROWS, _PRODUCTS = 1 << 16, 1 << 34  # more where these, and their products of two inputs, are not too many
_LEAST = 1e-12
_CHUNK, _CHUNKS = 8, 32  # examples that gradients are taken of together, and how often
_MOST_UNITS = 1024  # of a module, of which it is known what noise in two of them does together
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
_BatchNorm = nn.modules.batchnorm._BatchNorm
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, _BatchNorm, nn.GroupNorm)
WITH_CHANNELS = (*_CHANNELS_LAST, *_CHANNELS_FIRST)
SOLVED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # whose weights are those of a regression


class Reached(Exception):  # noqa: N818, no error
    """The module that was waited for has been called."""


def groups(layer: nn.Module) -> int:
    """Of a convolution; 1 of any other layer."""
    return int(getattr(layer, "groups", 1))


def _number_of_parts(layer: nn.Module) -> int:
    """Groups, or as many parts as a very wide linear layer is solved for in."""
    if not isinstance(layer, nn.Linear):
        return groups(layer)
    least = -(-layer.in_features // _LARGEST_PART)
    return next(n for n in range(least, layer.in_features + 1) if layer.in_features % n == 0)


def parts(layer: nn.Module, weights: Tensor) -> Tensor:
    """A layer's weights as `[parts, rows, inputs]`, float32 as the inputs are."""
    number, weights = _number_of_parts(layer), weights.float()
    if isinstance(layer, nn.Linear):
        return weights.reshape(len(weights), number, -1).transpose(0, 1)
    return weights.reshape(number, len(weights) // number, -1)


def joined(layer: nn.Module, parts: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `parts`."""
    return (parts.transpose(0, 1) if isinstance(layer, nn.Linear) else parts).reshape(shape)


def rows(layer: nn.Module, inputs: list[Tensor], batches: int, generator: torch.Generator) -> list[Tensor]:
    """What a layer multiplies its weights with, at the same random places of each of `inputs`: `[parts, rows, inputs]`."""
    views = [_patches(layer, x) for x in inputs]
    size = views[0].shape[: views[0].dim() - _inner(layer)]
    wide = views[0][(0,) * len(size)].numel()
    number = math.prod(size)
    most = -(-max(_ROWS, _ROWS_PER_INPUT * wide, min(_MORE_ROWS, _PRODUCTS // wide**2)) // batches)
    at = torch.randperm(number, generator=generator, device="cpu")[:most] if number > most else torch.arange(number, device="cpu")
    places = tuple(i.to(inputs[0].device) for i in torch.unravel_index(at, size))
    return [v[places].reshape(len(at), _number_of_parts(layer), -1).transpose(0, 1).float() for v in views]


def _inner(layer: nn.Module) -> int:
    """Axes of one patch."""
    return 1 if isinstance(layer, nn.Linear) else 1 + len(layer.kernel_size)  # type: ignore[arg-type]


def _patches(layer: Any, x: Tensor) -> Tensor:
    """A view of `x` as `[..., inputs]` of a linear layer, `[n, *places, channels, *kernel]` of a convolution."""
    if isinstance(layer, nn.Linear):
        return x
    nd = len(layer.kernel_size)
    x = x[None] if x.dim() == nd + 1 else x
    x = F.pad(x, layer._reversed_padding_repeated_twice, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    for axis, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return x.movedim(1, 1 + nd)


def channels(module: nn.Module, x: Tensor) -> Tensor:
    """Values of a module's inputs or outputs as `[channels, places]`."""
    if isinstance(module, _CHANNELS_LAST) and not _normalises_images(module, x):
        return torch.atleast_2d(x).flatten(0, -2).T.float()
    single = isinstance(module, nn.modules.conv._ConvNd) and x.dim() == 1 + len(module.kernel_size)
    return (x[None] if single else x).transpose(0, 1).flatten(1).float()


def _normalises_images(module: nn.Module, x: Tensor) -> bool:
    """Whether a LayerNorm has a forward of its own, which takes the channels to the last axis and back again."""
    if not isinstance(module, nn.LayerNorm) or type(module).forward is nn.LayerNorm.forward:
        return False
    number = module.normalized_shape[-1]
    return x.dim() > 2 and x.shape[1] == number and (x.dim() > 3 or x.shape[-1] != number)


class Sums:
    """Sums over places that moments by channel come from."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0.0
        self.square: Any = 0.0

    def add(self, values: Tensor) -> None:
        """`[channels, places]`."""
        self.count += values.shape[1]
        self.total, self.square = self.total + values.sum(1), self.square + values.square().sum(1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance."""
        mean = self.total / self.count
        return mean, (self.square / self.count - mean.square()).clamp_min(0.0)


Moments = dict[str, tuple[Tensor, Tensor]]


def moments(net: nn.Module, modules: set[str], batches: list[Any]) -> tuple[Moments, Moments]:
    """Moments by channel of the inputs and outputs of those of the modules that are called, when they first are."""
    sums: dict[str, tuple[Sums, Sums]] = {}
    seen: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def keep(module: nn.Module, args: Any, options: Any, output: Any) -> None:
            if name in seen:
                return
            seen.add(name)
            x = _first_input(args, options)
            for own, values in zip(sums.setdefault(name, (Sums(), Sums())), (x, _given(module, x, output)), strict=True):
                own.add(channels(module, values))

        return keep

    hooks = [net.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in modules]
    try:
        with evaluating(net), use_mode(net, "mean"):
            for batch in batches:
                seen.clear()
                _check_finite(through(net, batch))
    finally:
        for h in hooks:
            h.remove()
    return {n: v[0].moments() for n, v in sums.items()}, {n: v[1].moments() for n, v in sums.items()}


class Worth(NamedTuple):
    """How much of their own variance noise adds to a network's outputs: noise of variance one in one of its weights, or in one place
    of a module's outputs.

    Attributes:
        weights: of each tensor the means over rows `[n]` and over columns `[k]`, of vectors the values and their mean.
        outputs: of each module, summed over the places of one example, `[groups, units, units]`: noise e adds e^T G e; of very wide
            ones, and of norms, the diagonal `[groups, units, 1]`.
    """

    weights: dict[str, tuple[Tensor, Tensor]]
    outputs: dict[str, Tensor]


@torch.enable_grad()
def worth(net: nn.Module, batches: list[Any], wanted: dict[str, Tensor], modules: Iterable[str] = ()) -> Worth:
    """What noise does, to first order; empty where there are no gradients to be had.

    The diagonal of the Gauss-Newton matrix and, of layers, the factor on the side of the outputs of its Kronecker approximation (Martens
    and Grosse 2015, arXiv 1503.05671), by gradients of the outputs with random signs (Hutchinson's estimate; Martens et al. 2012, arXiv
    1206.6464).
    """
    chunks = [part for batch in batches for part in split(batch, _CHUNK)]
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    outputs: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    values = 0
    calls: list[tuple[str, nn.Module, Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
        def hook(module: nn.Module, _: Any, output: Any) -> Tensor | None:
            if not (isinstance(output, Tensor) and output.requires_grad):
                return None
            calls.append((name, module, output))
            return output.clone()  # what comes next may work in place

        return hook

    hooks = [net.get_submodule(name).register_forward_hook(keep(name)) for name in modules] if chunks and wanted else []
    try:
        with evaluating(net), use_mode(net, "mean"):
            for chunk in chunks[:: max(len(chunks) // _CHUNKS, 1)]:
                total: Any = 0.0
                calls.clear()
                for y in _with_gradients(through(net, chunk)):
                    signs = torch.randint(2, y.shape, generator=generator, device="cpu").to(y) * 2.0 - 1.0
                    total = total + (signs * y).sum() / (y.detach().std(correction=0) + _LEAST)
                    values += y.numel()
                if not values:
                    return Worth({}, {})
                gradients = torch.autograd.grad(total, [*wanted.values(), *(y for _, _, y in calls)], allow_unused=True)
                for name, g in zip(wanted, gradients, strict=False):
                    if g is not None:
                        square = g.float().square()
                        rows = square if g.dim() < 2 else square.flatten(1).mean(1)
                        columns = square.mean() if g.dim() < 2 else square.transpose(0, 1).flatten(1).mean(1)
                        before = weights.get(name, (0.0, 0.0))
                        weights[name] = before[0] + rows, before[1] + columns
                for (name, module, _), g in zip(calls, gradients[len(wanted) :], strict=True):
                    if g is not None:
                        products, places = _products(module, g)
                        outputs[name] = outputs.get(name, 0.0) + products
                        counts[name] = counts.get(name, 0) + places
    except (MiracleError, RuntimeError):  # a batch that can't be divided, an operation without gradients, too little memory
        return Worth({}, {})
    finally:
        for h in hooks:
            h.remove()
    weights = {name: v for name, v in weights.items() if v[0].any() and torch.isfinite(v[0]).all()}
    outputs = {name: v for name, v in outputs.items() if v.any() and torch.isfinite(v).all()}
    return Worth({name: (rows / values, columns / values) for name, (rows, columns) in weights.items()},
                 {name: _shrunk(v / values, counts[name]) for name, v in outputs.items()})  # fmt: skip


def _products(module: nn.Module, gradients: Tensor) -> tuple[Tensor, int]:
    """Sums over places of the products of a module's output gradients, see `Worth.outputs`, and how many places."""
    g = channels(module, gradients)
    g = g.reshape(groups(module), -1, g.shape[1])
    full = isinstance(module, SOLVED) and g.shape[1] <= _MOST_UNITS
    return (g @ g.mT if full else g.square().sum(2, keepdim=True)), g.shape[2]


def _shrunk(products: Tensor, places: int) -> Tensor:
    """Nearer to a diagonal matrix, the fewer places it comes from."""
    units = products.shape[1]
    if products.shape[2] < units:
        return products
    diagonal = products.diagonal(dim1=1, dim2=2)
    share = places / (places + units)
    return share * products + torch.diag_embed((1.0 - share) * diagonal)


def _with_gradients(outputs: Any) -> list[Tensor]:
    """The tensors in what a network returns that gradients can be taken of; no single value, such as a loss, beside others."""
    found = [t for t in tensors_in(outputs) if t.requires_grad and t.numel()]
    return [t for t in found if t.numel() > 1] or found


def through(net: nn.Module, batch: Any) -> Any:
    """Outputs on one batch.

    Raises:
        MiracleError: the network does not take it.
    """
    try:
        return call(net, batch)
    except Exception as error:  # the user's own forward
        shape = f" of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else ""
        shape = f", {', '.join(map(str, batch))}," if isinstance(batch, Mapping) else shape
        told = f"{type(error).__name__}: {str(error)[:200]}"
        if isinstance(batch, Mapping) and arguments(net, batch)[0]:
            told += " (they went in as one mapping: by keywords only what is named as the arguments of `forward` goes in)"
        raise MiracleError(f"the inputs{shape} do not go through {type(net).__name__}, called on each batch alone: {told}") from error


def _check_finite(outputs: Any) -> None:
    output = main_output(outputs)
    if output is not None and not bool(torch.isfinite(output).all()):
        raise MiracleError("the network's outputs on the inputs are NaN or infinite: check the inputs and their normalisation")


def called(net: nn.Module, module: str, batches: Iterable[Any], *, output: bool) -> Iterator[Tensor]:
    """Of each batch the first input, or the output, of a module when it is first called; the network is in eval until the last."""
    with evaluating(net), use_mode(net, "mean"), caught(net.get_submodule(module), output=output) as found:
        for batch in batches:
            with contextlib.suppress(Reached):
                call(net, batch)
            yield found.pop()


@contextlib.contextmanager
def caught(module: nn.Module, *, output: bool) -> Iterator[list[Tensor]]:
    """Within, a module that is called puts its first input, or its output, on the list and raises `Reached`."""
    found: list[Tensor] = []

    def keep(own: nn.Module, args: Any, options: Any, *result: Any) -> None:
        x = _first_input(args, options)
        found.append(_given(own, x, result[0]) if output else x)
        raise Reached

    hook = (module.register_forward_hook if output else module.register_forward_pre_hook)(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def _given(module: Any, x: Tensor, output: Tensor) -> Tensor:
    """The outputs of a module; of a BatchNorm with a forward of its own, which may go on with an activation, what it normalised."""
    plain = not isinstance(module, _BatchNorm) or type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if plain or module.running_mean is None:
        return output
    return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps)


def _first_input(args: Any, options: Any) -> Tensor:
    """What a module was called with, by place or by keyword."""
    return next(iter((*args, *options.values())))
