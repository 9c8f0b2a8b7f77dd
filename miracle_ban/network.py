"""Networks as users give them: wrapped, with weights that a hook computes, with state that is no tensor. Leans on torch only."""

from __future__ import annotations

import copy

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
