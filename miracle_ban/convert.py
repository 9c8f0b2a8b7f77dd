"""Turn a trained network into a Bayesian one: every weight gets a posterior that starts at its trained value.

In comes any `nn.Module`, out goes a copy with variational layers and a `Conversion`: the account of every entry of the
original state dict, so that nothing is silently left out of the file. Leans on `network`, `layers` and `structure`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_map_only

from .errors import MiracleWarning, MismatchError, UnsupportedModelError
from .layers import LOCAL_CLASSES, Posterior, drawing_class, hold_in_eval, posteriors
from .network import copied, tensors, unwrapped
from .structure import Link, Structure, is_frozen_norm, norm_kind, trace

_SHORT = (torch.float16, torch.bfloat16)
_CODED_DTYPES = (torch.float64, torch.float32, *_SHORT)


@dataclass(frozen=True)
class Entry:
    """One entry of the original state dict and how it will be stored.

    `kind` is "coded" (has a posterior), "constant" (all zero or all one, after folding), "raw" (stored as it is) or
    "alias" (the same tensor as entry `alias_of`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    alias_of: str | None = None
    constant: int = 0

    @property
    def size(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()

    @property
    def raw_bytes(self) -> int:
        """Bytes that the values take uncompressed."""
        return self.size * torch.empty(0, dtype=self.dtype).element_size()


@dataclass
class Conversion:
    """What `convert` did: every state-dict entry, the links between layers, how each module draws, and (layer, norm) folded."""

    entries: list[Entry]
    links: tuple[Link, ...] = ()
    modules: dict[str, str] = field(default_factory=dict)
    folded: tuple[tuple[str, str], ...] = ()

    def of_kind(self, kind: str) -> list[Entry]:
        """The entries of one kind, in state-dict order."""
        return [e for e in self.entries if e.kind == kind]

    @property
    def raw_bytes(self) -> int:
        """Bytes of all tensors that stay raw."""
        return sum(e.raw_bytes for e in self.of_kind("raw"))

    def __str__(self) -> str:
        coded, raw = self.of_kind("coded"), self.of_kind("raw")
        lines = [f"{sum(e.size for e in coded):,} weights in {len(coded)} tensors will be coded"]
        folded = [e.name for e in self.of_kind("constant")]
        if folded:
            lines.append(f"{len(folded)} tensors are constant after folding BatchNorm and cost 2 bits each")
        if raw:
            lines.append(f"{self.raw_bytes:,} bytes stay raw: " + ", ".join(e.name for e in raw))
        return "\n".join(lines)


def convert(
    model: nn.Module,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    fold: bool = True,
    per_unit: bool = False,
    local: bool = True,
) -> nn.Module:
    """Copy `model` with a Gaussian posterior for every floating-point parameter, means at the trained weights.

    Args:
        model: a trained network; it is left alone. One that is compiled (`torch.compile`) or in (Distributed)DataParallel is taken
            out of that: the copy and its file are those of the network inside.
        where: `where(module_name, module) -> bool` chooses the modules whose own parameters are coded; default all. The
            other parameters, and all buffers, are stored raw and counted.
        fold: fold each BatchNorm into the layer before it where that is exact. Names and shapes stay: the norm is left
            with weight 1, mean 0 and variance 1, and its bias carries what remains. Elsewhere its own weight and bias take up
            its statistics. Layers with forward hooks are neither folded nor narrowed: nobody knows what a hook does.
        per_unit: one prior scale per output unit instead of one per tensor, for tensors of two axes or more.
        local: linear and convolution layers draw noise on their outputs, each example its own (local reparametrisation,
            Kingma et al. 2015). False draws their weights, once for each batch: noisier gradients in half the time.

    Returns:
        The Bayesian copy. `print(copy.conversion)` says what is coded and what stays raw.

    Raises:
        UnsupportedModelError: no parameter can be coded, or weights are NaN or infinite.

    Example:
        >>> bnn = convert(nn.Linear(3, 2))
        >>> sorted(bnn.state_dict())[:2]
        ['posterior.bias.fixed', 'posterior.bias.log_std']
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"convert() takes an nn.Module, not {_said(model)}")
    if where is not None and not callable(where):
        raise UnsupportedModelError(f"where is called as where(module_name, module) and gives a bool; it cannot be {_said(where)}")
    model = unwrapped(model)
    _check_kind(model)
    if posteriors(model):
        raise UnsupportedModelError("this model is already converted; pass the original network")
    _check_finite(model)
    original = {name: (tuple(t.shape), t.dtype) for name, t in tensors(model).items()}
    structure = trace(model)
    net = copied(model)
    if any(p.dtype in _SHORT for p in net.parameters()):
        net = net.float()  # 16 bits are too few to train in; the file still says, and gives back, the original dtype
        net.register_forward_pre_hook(_lengthen, with_kwargs=True)
    if fold:
        _thaw_norms(net)
    held = [name for name, _ in _norms_with_statistics(net)] if fold else []
    constants = _fold_norms(net, structure) if fold else {}
    aliases = _aliases(net)
    chosen = _chosen_parameters(net, where, skip=set(constants))
    for name, first in aliases.items():  # a tied weight is coded if any of its uses is chosen
        if name in chosen or first in chosen:
            chosen[name] = chosen[first] = chosen[name] if name in chosen else chosen[first]
    if not chosen:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        narrow = "" if where is None else ": is `where` too narrow?"
        raise UnsupportedModelError(f"no floating-point parameter to code among the modules {', '.join(kinds)}{narrow}")
    modules = _attach_posteriors(net, chosen, per_unit, local)
    for name in held:
        norm = net.get_submodule(name)
        if f"{name}.weight" in constants:
            norm.get_parameter("weight").requires_grad_(False)
        hold_in_eval(norm)
    entries = [_entry(name, shape, dtype, chosen, constants, aliases) for name, (shape, dtype) in original.items()]
    folded = structure.norms if fold else ()
    net.conversion = Conversion(entries, _usable_links(net, structure), modules, folded)  # type: ignore[assignment]
    net.register_forward_pre_hook(_begin_forward)
    net.register_forward_hook(_end_forward, always_call=True)
    return net


def _lengthen(_: nn.Module, args: Any, kwargs: Any) -> Any:
    """The inputs of a network that was of 16 bits, in the 32 bits of its copy."""
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in _SHORT else t, (args, kwargs))


def _begin_forward(net: nn.Module, _: object) -> None:
    for p in posteriors(net).values():
        p.cache_draws(True)


def _end_forward(net: nn.Module, _: object, __: object) -> None:
    for p in posteriors(net).values():
        p.cache_draws(False)


def conversion(model: nn.Module) -> Conversion:
    """The `Conversion` of a converted model.

    Raises:
        MismatchError: the model did not come from `convert`.
    """
    found = getattr(model, "conversion", None)
    if not isinstance(found, Conversion):
        raise MismatchError(f"{type(model).__name__} is not a converted model: call miracle_ban.convert(model) first")
    return found


def drop_units(model: nn.Module, link: Link, keep: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Keep only the hidden units `keep` (indices, in their new order) of a link, in both layers that they join.

    An `optimizer` of the posteriors' parameters goes on with what is kept.
    """
    held = posteriors(model)
    for tensor in ("weight", "bias"):
        producer = held.get(f"{link.producer}.{tensor}")
        if producer is not None:
            producer.select(0, keep, optimizer)
    inputs = (keep[:, None] * link.multiplicity + torch.arange(link.multiplicity, device=keep.device)).flatten()
    held[f"{link.consumer}.weight"].select(1, inputs, optimizer)


def _said(value: object) -> str:
    """What was given instead of what is wanted."""
    return f"the class {value.__name__}: give an instance" if isinstance(value, type) else f"a value of type {type(value).__name__}"


def _check_kind(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("a scripted module cannot be converted: pass the network that it was scripted from")
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise UnsupportedModelError(f"{', '.join(lazy[:5])} has no shape yet: run one batch through the lazy modules first")
    if prune.is_pruned(model):
        raise UnsupportedModelError("the network is pruned by hooks, whose masks would be stored: make its weights final by prune.remove")
    found = tensors(model)
    extra = [name for name in model.state_dict() if name not in found]
    if extra:
        text = f"{', '.join(extra[:5])} is no tensor and is not stored: a network that the file is loaded into keeps its own"
        warnings.warn(text, MiracleWarning, stacklevel=4)
    for name, t in found.items():
        if t.is_meta:
            raise UnsupportedModelError(f"{name} is on the meta device and has no values: load the trained weights first")
        if t.layout != torch.strided or t.is_quantized:
            kind = t.dtype if t.is_quantized else t.layout
            raise UnsupportedModelError(f"{name} is a tensor of {kind}: make it dense (to_dense, dequantize) before coding")
        if t.is_floating_point() and t.dtype not in _CODED_DTYPES:
            raise UnsupportedModelError(f"{name} is of {t.dtype}, which is not stored: convert it to torch.float16 first")


def _check_finite(model: nn.Module) -> None:
    for name, t in tensors(model).items():
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            bad = int((~torch.isfinite(t)).sum())
            raise UnsupportedModelError(f"{name} holds {bad} NaN or infinite value(s) of {t.numel()}: repair the weights before coding")


def _aliases(net: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    result = {}
    for name, p in net.named_parameters(remove_duplicate=False):
        if id(p) in first:
            result[name] = first[id(p)]
        else:
            first[id(p)] = name
    return result


def _chosen_parameters(net: nn.Module, where: Callable[[str, nn.Module], bool] | None, skip: set[str]) -> dict[str, Tensor]:
    chosen = {}
    for module_name, module in net.named_modules(remove_duplicate=False):
        for own, p in module._parameters.items():
            name = f"{module_name}.{own}" if module_name else own
            if p is None or name in skip or not p.is_floating_point() or p.numel() == 0:
                continue
            if where is None or where(module_name, module):
                chosen[name] = p
    return chosen


def _attach_posteriors(net: nn.Module, chosen: dict[str, Tensor], per_unit: bool, on_outputs: bool) -> dict[str, str]:
    """Replace the chosen parameters by posteriors; returns which modules draw on their output ("local") or directly."""
    by_tensor: dict[int, Posterior] = {}
    uses: dict[int, int] = {}
    for p in chosen.values():
        uses[id(p)] = uses.get(id(p), 0) + 1
    how = {}
    for module_name, module in list(net.named_modules()):
        names = [own for own in module._parameters if _join(module_name, own) in chosen]
        if not names:
            continue
        held, tied = {}, False
        for own in names:
            p = chosen[_join(module_name, own)]
            tied |= uses[id(p)] > 1
            held[own] = by_tensor.setdefault(id(p), Posterior(_join(module_name, own), p, per_unit=per_unit))
        whole = set(names) == _own_parameters(module) and "weight" in names  # else a hook computes the weight from others
        local = LOCAL_CLASSES.get(type(module)) if on_outputs and not tied and whole else None
        for own in names:
            del module._parameters[own]
        module.posterior = nn.ModuleDict(held)
        module.__class__ = drawing_class(local or type(module), tuple(names))
        for posterior in held.values():
            posterior.local = local is not None
        how[module_name] = "local" if local else "direct"
    return how


def _join(module_name: str, own: str) -> str:
    return f"{module_name}.{own}" if module_name else own


def _own_parameters(module: nn.Module) -> set[str]:
    return {n for n, p in module._parameters.items() if p is not None}


def _entry(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, chosen: dict[str, Tensor], constants: dict[str, int], aliases: dict[str, str]
) -> Entry:
    if name in aliases:
        return Entry(name, shape, dtype, "alias", alias_of=aliases[name])
    if name in constants:
        return Entry(name, shape, dtype, "constant", constant=constants[name])
    return Entry(name, shape, dtype, "coded" if name in chosen else "raw")


def _usable_links(net: nn.Module, structure: Structure) -> tuple[Link, ...]:
    """Links of which both layers draw on their output: only these compute with the live units alone."""
    held = posteriors(net)
    names = {n for link in structure.links for n in (link.producer, link.consumer)}
    local = {n for n in names if f"{n}.weight" in held and held[f"{n}.weight"].local}
    normed = {layer for layer, _ in structure.norms}
    return tuple(k for k in structure.links if k.producer in local and k.consumer in local and k.producer not in normed)


@torch.no_grad()
def _fold_norms(net: nn.Module, structure: Structure) -> dict[str, int]:
    """Move every foldable BatchNorm into the layer before it; returns the entries that are now constant.

    The layer's weight takes the factor g = weight / sqrt(var + eps) * sqrt(1 + eps), so that the norm with variance 1 and
    weight 1 is the identity up to its bias.
    """
    constants: dict[str, int] = {}
    layers = {norm: layer for layer, norm in structure.norms}
    for norm_name, norm in _norms_with_statistics(net):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        full = scale * (1.0 + norm.eps) ** 0.5
        if norm_name in layers:
            layer: Any = net.get_submodule(layers[norm_name])
            if layer.bias is not None:
                shift = shift + layer.bias * scale
                layer.bias.zero_()
                constants[f"{layers[norm_name]}.bias"] = 0
            layer.weight.mul_(full.reshape(-1, *[1] * (layer.weight.dim() - 1)))
            norm.weight.fill_(1.0)
            constants[f"{norm_name}.weight"] = 1
        else:
            norm.weight.copy_(full)
        norm.bias.copy_(shift)
        for own, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            if own in norm._buffers:
                norm._buffers[own].fill_(value)
                constants[f"{norm_name}.{own}"] = value
    return constants


def _thaw_norms(net: nn.Module) -> None:
    """Make the weight and bias of each FrozenBatchNorm2d parameters, so that they are folded and coded like those of any norm."""
    for norm in net.modules():
        if is_frozen_norm(norm):
            for own in ("weight", "bias"):
                setattr(norm, own, nn.Parameter(norm._buffers.pop(own)))  # type: ignore[arg-type]


def _norms_with_statistics(net: nn.Module) -> list[tuple[str, Any]]:
    """BatchNorms that begin with a fixed affine map in evaluation, and whose tensors no other module has."""
    tensors: dict[int, int] = {}
    for module in net.modules():
        for t in (*module._parameters.values(), *module._buffers.values()):
            tensors[id(t)] = tensors.get(id(t), 0) + 1
    return [
        (name, m)
        for name, m in net.named_modules()
        if (is_frozen_norm(m) or (_is_norm(m) and m.track_running_stats and m.affine and m.num_batches_tracked is not None))
        and all(tensors[id(t)] == 1 for t in (m.weight, m.bias, m.running_mean, m.running_var))
    ]  # fmt: skip


def _is_norm(module: Any) -> bool:
    return norm_kind(module) is not None or type(module) is nn.SyncBatchNorm


def as_module(state: Mapping[str, Tensor]) -> nn.Module:
    """A module without a forward that holds a state dict: its floating-point tensors as parameters, statistics of norms as buffers.

    Raises:
        UnsupportedModelError: it is no state dict, is empty, or holds something else than tensors.
    """
    if not isinstance(state, Mapping):
        raise UnsupportedModelError(f"a network or its state dict is wanted, not {state!r:.80}: load it first")
    wrong = [str(name) for name, t in state.items() if not isinstance(t, Tensor)]
    if wrong or not state:
        raise UnsupportedModelError(
            f"a state dict maps names to tensors; {', '.join(wrong[:5]) + ' is none' if wrong else 'this one is empty'}"
        )
    net = nn.Module()
    first: dict[tuple[Any, ...], nn.Parameter] = {}
    for name, t in state.items():
        *path, own = str(name).split(".")
        module = net
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        if t.is_floating_point() and own not in ("running_mean", "running_var"):
            key = (t.data_ptr(), t.storage_offset(), t.shape)
            parameter = first.setdefault(key, nn.Parameter(t.detach(), requires_grad=False)) if t.numel() else nn.Parameter(t.detach())
            module.register_parameter(own, parameter)
        else:
            module.register_buffer(own, t)
    return net
