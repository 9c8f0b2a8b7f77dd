"""Passes through a network that go on from where the last one got to, as long as nothing that it went by has changed.

Packaging asks for what goes into each layer in turn. From the start each time that takes time by the square of the depth; here what the
layer before was given is kept, in the graph that `torch.fx` traces. A network that cannot be traced, or whose graph computes anything else,
is run from its start. Leans on `measure`, `structure`, `layers`, `network` and torch.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from .layers import Posterior, posteriors, use_mode
from .measure import WITH_CHANNELS, Reached, called, caught
from .network import arguments, call, evaluating, examples_in
from .structure import left_alone

_LARGEST = 1 << 27  # bytes of values that are kept
_Values = dict[fx.Node, Any]
_Versions = list[tuple[Tensor, int]]


class Passes:
    """Passes of some batches through a converted network in evaluation, with its posteriors' means.

    Args:
        net: from `convert`, or from `exposed`; its posteriors may change at any time.
        batches: inputs, each something that it takes.
    """

    def __init__(self, net: nn.Module, batches: list[Any]):
        self.net, self.batches = net, batches
        self._graph = _traced(net, batches)
        self._at = 0  # the node that values are kept for
        self._kept: list[_Values] = []  # of each batch, what that node and later ones are given
        self._versions: _Versions = []  # of the tensors that made them

    def called(self, module: str, *, output: bool) -> Iterator[Tensor]:
        """See `measure.called`."""
        target, graph = self.net.get_submodule(module), self._graph
        end = None if graph is None else graph.first_inside(target)
        if graph is None or end is None:
            yield from called(self.net, module, self.batches, output=output)
            return
        goes_on = bool(self._kept) and self._at <= end and _alike(graph.versions(self._at), self._versions)
        start, kept, size = self._at if goes_on else 0, [], 0
        with evaluating(self.net), use_mode(self.net, "mean"), caught(target, output=output) as found:
            for number, batch in enumerate(self.batches):
                values = graph.run(_cloned(self._kept[number]) if goes_on else graph.given(batch), start, end)
                size += sum(t.nbytes for t in _tensors(values))
                if end > start and size <= _LARGEST and _apart(values):
                    kept.append(_cloned(values))
                with contextlib.suppress(Reached):
                    graph.run(values, end, len(graph.nodes))
                yield found.pop()
        if len(kept) == len(self.batches):
            self._at, self._kept, self._versions = end, kept, graph.versions(end)


class _Graph:
    """The nodes of a network in the order in which they are computed."""

    def __init__(self, net: nn.Module, nodes: list[fx.Node]):
        self.net, self.nodes = net, nodes
        self._modules = dict(net.named_modules())
        self._last_use = {used: i for i, node in enumerate(nodes) for used in node.all_input_nodes}

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def first_inside(self, target: nn.Module) -> int | None:
        """The first node that calls a module, or one that this is inside of."""
        called = ((i, self._module(node)) for i, node in enumerate(self.nodes))
        return next((i for i, module in called if module is not None and any(m is target for m in module.modules())), None)

    def given(self, batch: Any) -> _Values:
        """The values that the graph begins with."""
        bound, _ = _bound(self.net, batch)
        begins = [node for node in self.nodes if node.op == "placeholder"]
        return {node: bound[str(node.target)] if str(node.target) in bound else node.args[0] for node in begins}  # else a default

    def run(self, values: _Values, start: int, stop: int) -> _Values:
        """Compute the nodes start .. stop - 1 from `values`, in place, and forget what no later one needs."""
        for number, node in enumerate(self.nodes[start:stop], start):
            args, options = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "call_module":
                values[node] = self._modules[str(node.target)](*args, **options)
            elif node.op == "call_function":
                values[node] = node.target(*args, **options)  # type: ignore[operator]
            elif node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **options)
            elif node.op == "get_attr":
                holder, _, own = str(node.target).rpartition(".")
                values[node] = getattr(self.net.get_submodule(holder), own)
            elif node.op == "output":
                values[node] = args[0]
            for used in (node, *node.all_input_nodes):
                if self._last_use.get(used, number) == number and used.op != "output":
                    del values[used]
        return values

    def versions(self, stop: int) -> _Versions:
        """The tensors that the nodes before `stop` read, and how often each was changed."""
        read: list[Tensor] = []
        for node in self.nodes[:stop]:
            holder = getattr(node.target, "__self__", None) if node.op == "call_function" else self._module(node)
            for module in holder.modules() if isinstance(holder, nn.Module) else ():
                if isinstance(module, Posterior):
                    read += [module.mean, module.value, module.fixed]
                else:
                    read += [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        return [(t, t._version) for t in read]


class _Tracer(fx.Tracer):
    """Looks into networks and their parts, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        given = next(c for c in type(m).__mro__ if not c.__module__.startswith("miracle_ban."))  # its class before conversion
        return isinstance(m, WITH_CHANNELS) or (given.__module__.startswith("torch.nn.") and not issubclass(given, nn.Sequential))


@torch.no_grad()
def _traced(net: nn.Module, batches: list[Any]) -> _Graph | None:
    """The graph of a network; None where it is not to be had, or computes anything else."""
    try:
        with evaluating(net), use_mode(net, "mean"):
            tracer = _Tracer()
            with left_alone(net):
                for p in posteriors(net).values():  # what the network's own forward reads is to be read again in each pass
                    vars(p)["current"] = _reading(tracer, p)
                _, defaults = _bound(net, batches[0])
                graph = _Graph(net, list(tracer.trace(net, defaults).nodes))
            graph.versions(len(graph.nodes))  # which tensors of inference mode do not have
            for batch in {examples_in(batch): batch for batch in batches}.values():
                values = graph.run(graph.given(batch), 0, len(graph.nodes))
                found, wanted = (tree_leaves(outputs) for outputs in (values[graph.nodes[-1]], call(net, batch)))
                if len(found) != len(wanted) or not all(map(_same, found, wanted)):
                    return None
    except Exception:  # whatever the network's own forward does with the tracer's stand-ins
        return None
    return graph


def _reading(tracer: fx.Tracer, p: Posterior) -> Any:
    return lambda: tracer.create_proxy("call_function", Posterior.current.__get__(p), (), {})


def _bound(net: nn.Module, batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `forward` on a batch, by name; and those of them that are its defaults."""
    args, options = arguments(net, batch)
    bound = inspect.signature(net.forward).bind(*args, **options)
    given = set(bound.arguments)
    bound.apply_defaults()
    return bound.arguments, {name: value for name, value in bound.arguments.items() if name not in given}


def _same(a: Any, b: Any) -> bool:
    return a.equal(b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def _alike(a: _Versions, b: _Versions) -> bool:
    return len(a) == len(b) and all(own is other and version == before for (own, version), (other, before) in zip(a, b, strict=True))


def _cloned(values: _Values) -> _Values:
    """What comes next may work in place."""
    return {node: tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value) for node, value in values.items()}


def _tensors(values: _Values) -> list[Tensor]:
    return [v for v in tree_leaves(list(values.values())) if isinstance(v, Tensor)]


def _apart(values: _Values) -> bool:
    """Whether no two of them share memory: clones would not."""
    places = [t.untyped_storage().data_ptr() for t in _tensors(values)]
    return len(set(places)) == len(places)
