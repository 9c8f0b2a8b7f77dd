"""A network teaches another: unlabelled inputs with the outputs of one as targets for the other.

Leans on `network` and `layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import MiracleError
from .layers import use_mode
from .network import call, examples_in, main_output

_RAREST = 1e-4  # of the frequency in training: less is never believed of a class


def class_shift(outputs: Tensor, rounds: int = 100) -> Tensor:
    """Log of how much more frequent each class is among unlabelled inputs than in training, `[C]`, from class scores `[n, C]`.

    By expectation maximisation (Saerens, Latinne and Decaestecker 2002, Neural Computation 14(1), equation 2.7), training classes
    taken as equally frequent. Added to the scores it makes them those of a network that knows what occurs here.
    """
    probability = outputs.double().softmax(1)
    weight = torch.ones(outputs.shape[1], dtype=torch.float64, device=outputs.device)
    for _ in range(rounds):
        own = weight * probability
        weight = outputs.shape[1] * (own / own.sum(1, keepdim=True)).mean(0)
    return weight.clamp_min(_RAREST).log().to(outputs.dtype)


def mean_network(model: nn.Module) -> Callable[[Any], Tensor]:
    """The function that a converted model computes with its posterior means."""

    def run(inputs: Any) -> Tensor:
        with use_mode(model, "mean"), torch.no_grad():
            return call(model, inputs)

    return run


class Taught:
    """Unlabelled inputs with a teacher's outputs as targets, batch by batch: (inputs, outputs).

    Args:
        inputs: a tensor of inputs (then shuffled batches), or batches of them that can be iterated again; labels are ignored.
        teacher: inputs -> outputs.
        batch_size: of a tensor's batches.
    """

    def __init__(self, inputs: Any, teacher: Callable[[Any], Tensor], batch_size: int = 250):
        self.inputs, self.teacher, self.batch_size = inputs, teacher, batch_size
        if isinstance(inputs, Tensor):
            self.num_examples = len(inputs)
        else:
            given = getattr(inputs, "num_examples", None) or (len(inputs.dataset) if hasattr(inputs, "dataset") else None)
            self.num_examples = given or sum(examples_in(b[0] if isinstance(b, (tuple, list)) else b) for b in inputs)

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size) if isinstance(self.inputs, Tensor) else len(self.inputs)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        if isinstance(self.inputs, Tensor):
            order = torch.randperm(len(self.inputs), device="cpu")
            batches: Iterable[Any] = (self.inputs[rows] for rows in order.split(self.batch_size))
        else:
            batches = (b[0] if isinstance(b, (tuple, list)) else b for b in self.inputs)
        for x in batches:
            with torch.no_grad():
                taught = self.teacher(x)
            yield x, taught


def imitation(outputs: Any, taught: Any) -> Tensor:
    """Loss of imitating a teacher, nats: cross-entropy between class probabilities; half the squared error of other outputs.

    Raises:
        MiracleError: what matters in the outputs cannot be told (`network.main_output`).
    """
    own, taught = main_output(outputs), main_output(taught)
    if own is None or taught is None:
        raise MiracleError(f"outputs of type {type(outputs).__name__} hold no tensor that can be imitated: give a loss(outputs, targets)")
    outputs, taught = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (own, taught))
    if are_scores(outputs):
        return F.cross_entropy(outputs, taught.softmax(1))
    return 0.5 * F.mse_loss(outputs, taught)


def are_scores(outputs: Tensor) -> bool:
    """Whether a network's outputs look like class scores, `[n, C]` with C of 2 or more."""
    return outputs.dim() == 2 and outputs.shape[1] > 1
