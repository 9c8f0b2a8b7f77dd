"""What feeds what in a network: which hidden units can be dropped and reordered, which BatchNorms can be folded.

Read from the graph that `torch.fx` traces; of a network that cannot be traced, from those of its parts that can. The rest is coded
without narrowing and folding. Leans on torch only.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Identity, nn.Dropout,
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS = {
    torch.relu, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, torch.sigmoid, torch.tanh, F.softplus, F.hardswish, F.dropout,
}  # fmt: skip
_ELEMENTWISE_METHODS = {"relu", "sigmoid", "tanh", "contiguous"}
# these treat each channel of a convolution alone, but would mix the units of a linear layer
_PER_CHANNEL_MODULES = (
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_PER_CHANNEL_FUNCTIONS = {
    F.dropout2d, F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
}  # fmt: skip
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WEIGHT_MODULES = (nn.Linear, *_CONVOLUTIONS)
_FOLDABLE: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.BatchNorm1d: (nn.Linear, nn.Conv1d),
    nn.BatchNorm2d: (nn.Conv2d,),
    nn.BatchNorm3d: (nn.Conv3d,),
}
_PLACES = {nn.BatchNorm1d: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}  # axes after that of the channels
_SAME = 1e-8  # squared difference over square


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether this is the FrozenBatchNorm2d of torchvision, or one of the copies of it that detection libraries carry.

    All its tensors are buffers, and it is no class of torch's own.
    """
    return type(module).__name__ == "FrozenBatchNorm2d" and {"running_mean", "running_var"} <= module._buffers.keys()


def norm_kind(module: nn.Module) -> type[nn.Module] | None:
    """Which BatchNorm of torch a module is, but for what it goes on to do with the normalised values, as timm's with activations do."""
    kind = next((k for k in _FOLDABLE if isinstance(module, k)), None)
    own_forward = kind is not None and type(module).forward is not kind.forward
    return None if own_forward and not _begins_as_norm(module, kind) else kind


@torch.no_grad()
def _begins_as_norm(module: Any, kind: Any) -> bool:
    """Whether other statistics and inputs do nothing in evaluation where (x - mean) / sqrt(var + eps) * weight + bias stays the same."""
    generator = torch.Generator().manual_seed(0)
    try:
        first, second = (copy.deepcopy(module).float().cpu().eval() for _ in range(2))
        x = torch.randn(4, module.num_features, *[5] * _PLACES[kind], generator=generator)
        for t in (first.weight, first.bias, first.running_mean, first.running_var):
            t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
        full = first.weight * ((1.0 + first.eps) / (first.running_var + first.eps)).sqrt()
        mean, scale = (t.reshape(-1, *[1] * _PLACES[kind]) for t in (first.running_mean, full))
        second.weight.fill_(1.0)
        second.bias.copy_(first.bias)
        second.running_mean.fill_(0.0)
        second.running_var.fill_(1.0)
        y, z = first(x), second((x - mean) * scale)
        return bool((y - z).square().sum() <= _SAME * y.square().sum())
    except Exception:  # whatever its own forward raises
        return False


class _Tracer(fx.Tracer):
    """Does not look into norms, whatever class they are of."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_frozen_norm(m) or isinstance(m, tuple(_FOLDABLE)) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class Link:
    """The output units of module `producer` are read by module `consumer` alone, `multiplicity` inputs for each."""

    producer: str
    consumer: str
    multiplicity: int


@dataclass(frozen=True)
class Structure:
    """Links between layers, and pairs (layer, BatchNorm) of which the layer's output feeds the BatchNorm alone."""

    links: tuple[Link, ...] = ()
    norms: tuple[tuple[str, str], ...] = ()


def trace(model: nn.Module) -> Structure:
    """Find the links and foldable norms of `model`; of a model that cannot be traced, those of its parts that can."""
    with left_alone(model):
        return _trace(model, modules_that_share(model))


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Undo what the model's own code stores while it is traced: some keep what they saw, here a proxy, for their next call."""
    before = [
        (vars(m), {k: (v, v.copy() if isinstance(v, list | dict | set) else None) for k, v in vars(m).items()}) for m in model.modules()
    ]
    try:
        yield
    finally:
        for held, attributes in before:
            held.clear()
            for key, (value, items) in attributes.items():
                if items is not None:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(items)
                held[key] = value


def _trace(model: nn.Module, shared: set[str]) -> Structure:
    try:
        graph = _Tracer().trace(model)
    except Exception:  # the tracer runs the user's forward and may fail in any way at all
        return _trace_children(model, shared)
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    used_elsewhere = shared | {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}

    def alone(name: str) -> bool:
        hooked = modules[name]._forward_hooks or modules[name]._forward_pre_hooks  # the graph does not show what these do
        return calls.get(name) == 1 and name not in used_elsewhere and not hooked

    links, norms = [], []
    for node in graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if layer is None or not alone(str(node.target)) or type(layer) not in _WEIGHT_MODULES or not _holds_weight(layer):
            continue
        norm = _only_reader(node)
        if norm is not None and norm.op == "call_module" and alone(str(norm.target)) and _folds(node, layer, modules, str(norm.target)):
            norms.append((str(node.target), str(norm.target)))
        found = _follow(node, modules)
        if found is not None and alone(found[0]):
            multiplicity = _multiplicity(layer, modules[found[0]], flattened=found[1])
            if multiplicity:
                links.append(Link(str(node.target), found[0], multiplicity))
    return Structure(tuple(links), tuple(norms))


def _trace_children(model: nn.Module, shared: set[str]) -> Structure:
    """The structure of each child by itself: what it does inside does not depend on who calls it. Of plain containers that of
    their children, for others may call these one by one.
    """
    links: list[Link] = []
    norms: list[tuple[str, str]] = []
    for name, child in model.named_children():
        inside = f"{name}."
        within = _trace_children if type(child) in (nn.Sequential, nn.ModuleList, nn.ModuleDict) else _trace
        found = within(child, {n.removeprefix(inside) for n in shared if n.startswith(inside)})
        links += [Link(inside + k.producer, inside + k.consumer, k.multiplicity) for k in found.links]
        norms += [(inside + layer, inside + norm) for layer, norm in found.norms]
    return Structure(tuple(links), tuple(norms))


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads this node's values; nodes that only ask for the batch size do not count."""
    readers = [user for user in node.users if not _asks_batch_size(user)]
    return readers[0] if len(readers) == 1 else None


def _asks_batch_size(node: fx.Node) -> bool:
    if _is_batch_size(node):
        return True
    asks_shape = (node.op == "call_function" and node.target is getattr and node.args[1:] == ("shape",)) or (
        node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs
    )
    return asks_shape and bool(node.users) and all(_is_batch_size(user) for user in node.users)


def _folds(node: fx.Node, layer: nn.Module, modules: dict[str, nn.Module], norm_name: str) -> bool:
    """Whether the norm acts on the layer's output units, each alone, with fixed statistics."""
    norm = modules[norm_name]
    if is_frozen_norm(norm):
        return isinstance(layer, nn.Conv2d) and len(norm.get_buffer("running_var")) == len(_weight(layer))
    kind = norm_kind(norm)
    if kind is None or not isinstance(layer, _FOLDABLE[kind]):
        return False
    if isinstance(layer, nn.Linear) and not _is_matrix(node.args[0], modules):
        return False  # BatchNorm1d looks at axis 1, which is the layer's units only if there are two axes
    return bool(norm.track_running_stats and norm.affine and norm.num_features == _weight(layer).shape[0])


def _is_matrix(node: object, modules: dict[str, nn.Module]) -> bool:
    """Whether the graph shows that a value has just two axes: it was flattened, and nothing since could add one."""
    if not isinstance(node, fx.Node):
        return False
    if _flattens(node):
        return True
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.Flatten):
            return (module.start_dim, module.end_dim) == (1, -1)
        if type(module) not in (*_ELEMENTWISE_MODULES, nn.Linear, nn.BatchNorm1d):
            return False
    elif not _elementwise_call(node):
        return False
    return _is_matrix(node.args[0], modules)


def modules_that_share(model: nn.Module) -> set[str]:
    """Modules that share a parameter with another module (tied weights): their units are not theirs alone."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _follow(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, bool] | None:
    """Walk from a layer through per-unit operations to the one layer that reads its units: (name, was flattened)."""
    channels = isinstance(modules[str(node.target)], _CONVOLUTIONS)  # units are on axis 1, not on the last
    flattened = False
    while True:
        user = _only_reader(node)
        if user is None:
            return None
        per_channel = channels and not flattened
        if user.op == "call_module":
            module = modules[str(user.target)]
            if type(module) in _WEIGHT_MODULES:
                return str(user.target), flattened
            if per_channel and isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
                flattened = True
            elif type(module) not in _ELEMENTWISE_MODULES and not (per_channel and type(module) in _PER_CHANNEL_MODULES):
                return None
        elif not user.args or user.args[0] is not node:
            return None
        elif per_channel and _flattens(user):
            flattened = True
        elif not _elementwise_call(user) and not (per_channel and user.op == "call_function" and user.target in _PER_CHANNEL_FUNCTIONS):
            return None
        node = user


def _elementwise_call(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target) in _ELEMENTWISE_METHODS
    return node.op == "call_function" and node.target in _ELEMENTWISE_FUNCTIONS


def _flattens(node: fx.Node) -> bool:
    """flatten(x, 1), x.flatten(1), x.view(x.size(0), -1), x.reshape(len, -1): everything but the batch into one axis."""
    args = node.args[1:]
    if node.target in (torch.flatten, "flatten"):
        start = node.kwargs.get("start_dim", args[0] if args else 0)
        end = node.kwargs.get("end_dim", args[1] if len(args) > 1 else -1)
        return (start, end) == (1, -1)
    if node.target in ("view", "reshape", torch.reshape):
        shape = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        return len(shape) == 2 and isinstance(shape[0], fx.Node) and _is_batch_size(shape[0]) and bool(shape[1] == -1)
    return False


def _is_batch_size(node: fx.Node) -> bool:
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,)
    if node.op == "call_function" and node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and source.target in (getattr, "size") and bool(node.args[1] == 0)
    return False


def _multiplicity(producer: nn.Module, consumer: nn.Module, *, flattened: bool) -> int:
    """Inputs of the consumer for each unit of the producer; 0 where units are not separate inputs."""
    if getattr(producer, "groups", 1) != 1 or getattr(consumer, "groups", 1) != 1 or not _holds_weight(consumer):
        return 0
    out_units, in_units = int(_weight(producer).shape[0]), int(_weight(consumer).shape[1])
    if flattened:
        return in_units // out_units if isinstance(consumer, nn.Linear) and in_units % out_units == 0 else 0
    return int(type(producer) is type(consumer) and in_units == out_units)


def _holds_weight(layer: nn.Module) -> bool:
    """Not so where a hook computes the weight, as torch's older weight norm and pruning do."""
    return layer._parameters.get("weight") is not None


def _weight(layer: nn.Module) -> torch.Tensor:
    return layer.get_parameter("weight")
