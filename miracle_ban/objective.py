"""The beta-ELBO, and the steering of beta on the predicted coded size.

    objective = loss(batch) + beta * KL_nats / num_examples          (nats per example)

One beta for the whole model: equal beta, not equal KL, in every block is the optimum of the Lagrangian.
"""

from __future__ import annotations

import math

from torch import Tensor


def beta_elbo(loss: Tensor, kl_nats: Tensor, *, beta: float, num_examples: int) -> Tensor:
    """Negative beta-ELBO per example, nats, shape ().

    Args:
        loss: mean negative log-likelihood of the batch, nats per example.
        kl_nats: KL summed over all weights, nats.
        beta: weight of the KL; 1 is Bayes.
        num_examples: number of training examples.
    """
    return loss + beta * kl_nats / num_examples


def descent(part: float, first: float, goal: float) -> float:
    """Predicted index bits to aim at after `part` (0 to 1) of a run: down geometrically to `goal` over 60 % of it, then level."""
    way = min(1.0, part / 0.6)
    return max(first, goal) ** (1 - way) * goal**way


_LEAD = math.log(8.0)


class Steering:
    """Moves log beta so that a quantity (bits, or KL) follows its target: up when above, down when below.

    Slow and bounded: weights that a spike of beta has collapsed onto the prior do not come back.

    Args:
        beta: where to start.
        gain: largest relative change of beta a step.
        response: power of value / target by which the beta that `update` returns leads the slowly moving one (bounded by
            a factor of 8); it damps the swings that a slow integral makes around its target.
        dead_band: relative error that is left alone.
        bounds: smallest and largest beta.
    """

    def __init__(
        self, beta: float, *, gain: float = 0.02, response: float = 0.0, dead_band: float = 0.005, bounds: tuple[float, float] = (1e-6, 1e4)
    ):
        self.beta = beta
        self.gain = gain
        self.response = response
        self.dead_band = dead_band
        self.bounds = bounds

    def update(self, value: float, target: float) -> float:
        """One step towards `value == target`; returns the beta to use."""
        error = math.log(max(value, 1e-9) / max(target, 1e-9))
        if abs(error) > self.dead_band:
            change = self.gain * max(-1.0, min(1.0, 2.0 * error))
            self.beta = min(max(self.beta * math.exp(change), self.bounds[0]), self.bounds[1])
        return self.beta * math.exp(max(-_LEAD, min(_LEAD, self.response * error)))
