"""Networks as users give them: wrapped, with weights that a hook computes, with state that is no tensor; inputs and outputs of any kind.

Leans on torch only.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch import Tensor, nn

from .errors import UnsupportedModelError


def unwrapped(net: nn.Module) -> nn.Module:
    """The network inside of torch.compile and (Distributed)DataParallel."""
    while True:
        if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            net = net.module
        elif isinstance(getattr(net, "_orig_mod", None), nn.Module):  # of torch.compile
            net = net._orig_mod  # type: ignore[assignment]
        else:
            return net


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """The tensors of its state dict, which a file holds: all but extra state of another kind."""
    return {name: t for name, t in net.state_dict().items() if isinstance(t, Tensor)}


def copied(net: nn.Module) -> nn.Module:
    """A copy of a network, out of its wrapper; what a hook has computed, such as the weight of `weight_norm`, is computed again.

    Raises:
        UnsupportedModelError: a part of it cannot be copied.
    """
    net = unwrapped(net)
    held = (t for m in net.modules() for t in (*vars(m).values(), *m._buffers.values()))
    computed = [t for t in held if isinstance(t, Tensor) and not t.is_leaf]
    try:
        return copy.deepcopy(net, {id(t): t.detach().clone() for t in computed})  # torch copies only leaves of its graph
    except Exception as error:  # whatever its parts raise
        raise UnsupportedModelError(
            f"the network cannot be copied ({type(error).__name__}: {str(error)[:120]}): take out what is no part of it, such as open "
            "files and locks"
        ) from error


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Within, all of a network is in evaluation; after that each of its modules is in its own mode again."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        net.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def arguments(net: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a batch of inputs goes into a network: a mapping by keywords, if its keys are names of arguments, else as it is."""
    if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs):
        try:
            inspect.signature(unwrapped(net).forward).bind(**inputs)
        except (TypeError, ValueError):  # other names; a forward without a signature
            return (inputs,), {}
        return (), dict(inputs)
    return (inputs,), {}


def call(net: nn.Module, inputs: Any) -> Any:
    """Outputs on a batch of inputs; for what mappings do, see `arguments`."""
    args, options = arguments(net, inputs)
    return net(*args, **options)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a batch of inputs, or in what a network returns: in its lists, tuples and mappings."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [t for part in parts for t in tensors_in(part)]


def main_output(outputs: Any) -> Tensor | None:
    """The tensor that matters in what a network returns: its logits, else the first of more than one value; None if there is none."""
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        return outputs["logits"]  # type: ignore[no-any-return]
    found = [t for t in tensors_in(outputs) if t.is_floating_point()]
    return next((t for t in found if t.numel() > 1), found[0] if found else None)


def examples_in(inputs: Any) -> int:
    """Number of examples in a batch of inputs; 1 if that cannot be told."""
    first = next(iter(tensors_in(inputs)), inputs)
    return len(first) if isinstance(first, Sized) and not (isinstance(first, Tensor) and not first.dim()) else 1


def split(inputs: Any, size: int) -> list[Any]:
    """A batch in parts of `size` examples: a tensor, or a mapping of tensors with one row for each; another stays as it is."""
    if isinstance(inputs, Tensor) and inputs.dim():
        return list(inputs.split(size))
    if isinstance(inputs, Mapping):
        lengths = {len(t) if isinstance(t, Tensor) and t.dim() else None for t in inputs.values()}
        if len(lengths) == 1 and None not in lengths:
            rows = range(0, lengths.pop() or 0, size)
            return [{key: t[at : at + size] for key, t in inputs.items()} for at in rows]
    return [inputs]
