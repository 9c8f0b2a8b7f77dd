"""The KL term for a training loop of one's own: what `fit` adds to the loss, beta being steered on the size of the file.

In comes a converted model, out comes a scalar for each step of a loop that somebody else runs. Leans on `plan`, `objective`, `train`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import coders
from .bits import parse_bytes
from .errors import MiracleError
from .layers import kl, posteriors
from .objective import descent
from .plan import carries_names, kl_bits_by_tensor, predicted_index_bits, side_bits, skeleton
from .train import BLOCK_BITS, FIRST_BETA, LARGEST_START, Session, index_budget_bits, start_steering

_EVERY = 20  # steps after which bits are predicted anew; in between they follow the KL


class Penalty:
    """`beta * KL / N`, nats per example, once for each step: `loss(model(x), y) + penalty()` is what `fit` descends.

    With a budget, beta is steered so that the predicted size of the file comes down to it over the first 60 % of the steps, and
    stays. Afterwards `encode(model, coder=...)` keeps to the same budget. Nothing is narrowed: hidden units that the budget
    cannot pay for fall back to their prior, but stay.

    Args:
        model: from `convert`; its parameters are those that the optimizer is to have. `log_std` learns best at five times
            the learning rate of the means, as in `train.make_optimizer`.
        num_examples: N, number of training examples.
        budget: size of the whole file, bytes or text such as "1.5 kB"; None keeps `beta` as it is.
        steps: number of optimizer steps that the loop is going to take; needed with a budget.
        beta: weight of the KL if there is no budget.
        coder: the coder that `encode` will be called with.

    Raises:
        BudgetError: the budget is smaller than what is stored besides the indices.
        MismatchError: the model is not converted.
        MiracleError: num_examples or steps is not positive.

    Example:
        >>> from miracle_ban import convert
        >>> penalty = Penalty(convert(nn.Linear(30, 20)), num_examples=1000, budget=120, steps=500)
        >>> bool(penalty() > 0), penalty.budget_bytes
        (True, 120)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_examples: int,
        budget: str | int | None = None,
        steps: int | None = None,
        beta: float = 1.0,
        coder: str | coders.Coder = "trellis",
    ):
        if not num_examples > 0 or (budget is not None and not (steps or 0) > 0):
            raise MiracleError(f"num_examples, and steps with a budget, must be positive, not {num_examples} and {steps}")
        self.model, self.num_examples, self.steps, self.step = model, num_examples, steps or 0, 0
        self.budget_bytes = None if budget is None else parse_bytes(budget)
        coder = coders.get(coder) if isinstance(coder, str) else coder
        kl_bits = sum(kl_bits_by_tensor(model).values())
        self._coder = coder.settled(BLOCK_BITS, 8.0 * self.budget_bytes if self.budget_bytes else kl_bits)
        names = carries_names(None, model, None if self.budget_bytes is None else 8.0 * self.budget_bytes)
        self._side = side_bits(skeleton(model, coder=self._coder, seed=0, names=names))
        self._goal = None if self.budget_bytes is None else index_budget_bits(self.budget_bytes, self._side)
        self._steering = start_steering(beta if self._goal is None else FIRST_BETA, self.steps)
        self._first, self._bits_per_nat, self._next = self._predict(), 0.0, self._steering.beta

    @property
    def beta(self) -> float:
        """Weight of the KL, as steered so far."""
        return self._steering.beta

    @property
    def predicted_bytes(self) -> float:
        """Size of the file that the posteriors would make now."""
        return (self._side + self._predict()) / 8

    def __call__(self) -> Tensor:
        """The penalty of this step, nats per example, shape (), with gradients; call it once for each optimizer step."""
        kl_nats = kl(self.model)
        value = float(kl_nats.detach())
        if self.step % _EVERY == 0:
            self._bits_per_nat = self._predict() / max(value, 1e-9)
        if self._goal is not None:
            target = descent(self.step / self.steps, min(self._first, LARGEST_START * self._goal), self._goal)
            self._next = self._steering.update(self._bits_per_nat * value, target)
        self.step += 1
        self.model.session = Session(self.beta, self.num_examples, self.budget_bytes, BLOCK_BITS)  # type: ignore[assignment]
        return self._next * kl_nats / self.num_examples

    def _predict(self) -> float:
        counts = {name: p.mean.numel() for name, p in posteriors(self.model).items()}
        return predicted_index_bits(kl_bits_by_tensor(self.model), counts, self._coder, BLOCK_BITS)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the loop must keep: plain numbers."""
        return {"step": self.step, "beta": self._steering.beta, "first": self._first, "bits_per_nat": self._bits_per_nat}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.step, self._steering.beta = state["step"], state["beta"]
        self._first, self._bits_per_nat = state["first"], state["bits_per_nat"]
