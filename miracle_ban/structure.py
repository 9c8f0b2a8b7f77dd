"""What feeds what in a network: which hidden units can be dropped and reordered, which BatchNorms can be folded.

Read from the graph that `torch.fx` traces. A network that cannot be traced simply yields nothing here: it is then coded
without narrowing and folding. Leans on torch only.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

_PER_UNIT_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_PER_UNIT_FUNCTIONS = {
    torch.relu, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, torch.sigmoid, torch.tanh, F.softplus,
    F.hardswish, F.dropout, F.dropout2d, F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool2d, F.avg_pool1d,
    F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
}  # fmt: skip
_PER_UNIT_METHODS = {"relu", "sigmoid", "tanh", "contiguous"}
_WEIGHT_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FOLDABLE: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.BatchNorm1d: (nn.Linear, nn.Conv1d),
    nn.BatchNorm2d: (nn.Conv2d,),
    nn.BatchNorm3d: (nn.Conv3d,),
}


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
    """Find the links and foldable norms of `model`; nothing where the model cannot be traced."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # the tracer runs the user's forward and may fail in any way at all
        return Structure()
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    shared = _names_of_shared_tensors(model)
    links, norms = [], []
    for node in graph.nodes:
        if node.op != "call_module" or calls[str(node.target)] > 1 or str(node.target) in shared:
            continue
        layer = modules[str(node.target)]
        if isinstance(layer, _WEIGHT_MODULES):
            norm = _only_user(node)
            single = norm is not None and norm.op == "call_module" and calls[str(norm.target)] == 1
            if norm is not None and single and _folds(layer, modules[str(norm.target)]):
                norms.append((str(node.target), str(norm.target)))
            found = _follow(node, modules)
            if found is not None and calls[found[0]] == 1 and found[0] not in shared:
                consumer = modules[found[0]]
                multiplicity = _multiplicity(layer, consumer, flattened=found[1])
                if multiplicity:
                    links.append(Link(str(node.target), found[0], multiplicity))
    return Structure(tuple(links), tuple(norms))


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _folds(layer: nn.Module, norm: nn.Module) -> bool:
    if not isinstance(layer, _FOLDABLE.get(type(norm), ())) or type(layer) not in _WEIGHT_MODULES:
        return False
    return bool(norm.track_running_stats and norm.affine)


def _names_of_shared_tensors(model: nn.Module) -> set[str]:
    """Modules that share a parameter with another module (tied weights): their units are not theirs alone."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _follow(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, bool] | None:
    """Walk from a layer through per-unit operations to the one layer that reads its units: (name, was flattened)."""
    flattened = False
    while True:
        user = _only_user(node)
        if user is None:
            return None
        if user.op == "call_module":
            module = modules[str(user.target)]
            if type(module) in _WEIGHT_MODULES:
                return str(user.target), flattened
            if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
                flattened = True
            elif type(module) not in _PER_UNIT_MODULES:
                return None
        elif user.args and user.args[0] is not node:
            return None
        elif _flattens(user):
            flattened = True
        elif not _per_unit_call(user):
            return None
        node = user


def _per_unit_call(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target) in _PER_UNIT_METHODS
    return node.op == "call_function" and node.target in _PER_UNIT_FUNCTIONS


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
    if getattr(producer, "groups", 1) != 1 or getattr(consumer, "groups", 1) != 1:
        return 0
    out_units, in_units = int(_shape(producer)[0]), int(_shape(consumer)[1])
    if in_units == out_units and not (isinstance(consumer, nn.Linear) and not isinstance(producer, nn.Linear) and not flattened):
        return 1
    if flattened and isinstance(consumer, nn.Linear) and in_units % out_units == 0:
        return in_units // out_units
    return 0


def _shape(layer: nn.Module) -> torch.Size:
    return layer.get_parameter("weight").shape
