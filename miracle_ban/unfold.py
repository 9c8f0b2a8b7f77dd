"""BatchNorms of a decoded network, fit for training again.

Folding (`convert`) leaves a BatchNorm with mean 0 and variance 1, which is the same in evaluation only: in training it would bring its
inputs to that variance. Leans on `inputs`, `measure` and torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .inputs import batches_of
from .measure import moments

_BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def unfold(net: nn.Module, inputs: Any) -> nn.Module:
    """Give folded BatchNorms the statistics of what goes into them, and scales that make up for it, so that `net` can be trained on.

    In evaluation the network stays the same. Norms that have statistics of their own stay as they are.

    Args:
        net: an ordinary network, such as from `load`; changed in place.
        inputs: a tensor of examples as in training, a mapping of such tensors, or an iterable of batches (labels are ignored);
            1,024 examples at most are used.

    Returns:
        The network.

    Raises:
        MiracleError: there are no inputs, or they do not go through the network.

    Example:
        >>> net = unfold(load("net.mban", MyNet()), images).train()  # doctest: +SKIP
    """
    seen, _ = moments(net, set(folded(net)), batches_of(inputs))
    for name, (mean, variance) in seen.items():
        norm: Any = net.get_submodule(name)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        mean, variance = mean.to(scale), variance.to(scale)
        norm.bias.add_((mean - norm.running_mean) * scale)
        norm.weight.copy_(scale * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    return net


def folded(net: nn.Module) -> list[str]:
    """The BatchNorms that have no statistics of their own."""
    norms: list[tuple[str, Any]] = [(name, m) for name, m in net.named_modules() if isinstance(m, _BatchNorm)]
    own = [(name, m) for name, m in norms if m.affine and m.running_mean is not None]
    return [name for name, m in own if not m.running_mean.any() and bool((m.running_var == 1.0).all())]
