"""Bayesian learning by recursion: means and precisions updated example by example, without an objective or a rate to choose.

The update rules (26), (27) of Tetelman 2021 (`ban`), from Tetelman 2020, arXiv 2006.12714: the prior is re-parametrised to stand for
the posterior of the examples seen so far. With the gradient g of one example's loss at drawn weights, in T epochs,

    1 / std^2 += g^2 / T        mean -= std^2 g / T

so that after T epochs the precision is the prior's plus the squared gradients of all examples. A second way to train posteriors,
beside AdamW on the beta-ELBO (`train.fit`). Leans on `layers`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import MiracleError
from .layers import Posterior, example_gradients, loss_at, posteriors


class MeanPrecision(torch.optim.Optimizer):
    """Equations (26) and (27) for pairs (mean, log_std).

    The precision is updated first: the step of a mean is then at most 1 / |g|, whatever the prior.

    Args:
        pairs: (mean, log_std) tensors of equal shape.
        epochs: T; the learning rate is 1 / T.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]], epochs: float):
        if epochs < 1:
            raise MiracleError(f"epochs must be 1 or more, not {epochs}: the learning rate is its inverse")
        super().__init__([{"params": list(pair)} for pair in pairs], {"lr": 1.0 / epochs})

    @torch.no_grad()
    def step(self, squares: Sequence[Tensor] | None = None) -> None:  # type: ignore[override]
        """One update from the means' `.grad`, the sum over the examples of a batch.

        Args:
            squares: for each pair the sum of the examples' squared gradients; default the square of the sum, which is right
                for one example, and on average for more of them where their gradients have mean zero.
        """
        for number, group in enumerate(self.param_groups):
            mean, log_std = group["params"]
            if mean.grad is None:
                continue
            square = mean.grad.square() if squares is None else squares[number]
            precision = (-2 * log_std).exp() + group["lr"] * square
            mean -= group["lr"] * mean.grad / precision
            log_std.copy_(-0.5 * precision.log())


def fit_recursively(
    model: nn.Module, batches: Iterable, loss: Callable, *, epochs: int = 10, prior_std: float = 1.0, progress: bool = True
) -> list[float]:
    """Train the posteriors of a converted model by `MeanPrecision`, one draw of the weights for each batch (equations 21, 23).

    Args:
        model: from `convert`; its means, as they are, with standard deviation `prior_std` are what learning starts from.
        batches: iterable of (inputs, targets), tensors, iterated again for every epoch.
        loss: mean nats of outputs and targets.
        epochs: T.
        prior_std: in units of each tensor's root mean square.
        progress: show a progress bar on stderr.

    Returns:
        The mean loss at the drawn weights, of each epoch, nats.

    Raises:
        MiracleError: the loss diverged.
    """
    held: list[Posterior] = list(posteriors(model).values())
    with torch.no_grad():
        for p in held:
            p.log_std.fill_(float((prior_std * p.mean.square().mean().sqrt()).clamp_min(1e-3).log()))
    optimizer = MeanPrecision([(p.mean, p.log_std) for p in held], epochs)
    history = []
    for epoch in range(epochs):
        total = count = 0.0
        for x, y in tqdm(batches, disable=not progress, file=sys.stderr, desc=f"epoch {epoch + 1} of {epochs}", unit="step"):
            with torch.no_grad():
                weights = [p.mean + p.log_std.exp() * torch.randn_like(p.mean) for p in held]
                value = float(loss_at(model, weights, loss, x, y))
            gradients = example_gradients(model, weights, loss, x, y)
            for p, g in zip(held, gradients, strict=True):
                p.mean.grad = g.sum(0)
            optimizer.step([g.square().sum(0) for g in gradients])
            total, count = total + value * len(y), count + len(y)
        history.append(total / count)
        if not math.isfinite(history[-1]):
            raise MiracleError(f"the loss became {history[-1]}: lower prior_std, or check the data for NaN")
    return history
