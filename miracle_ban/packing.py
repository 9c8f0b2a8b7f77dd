"""What packaging by blocks and packaging by trellis have in common: the interface that `encode` works through.

Leans on `layers`, `container` and torch.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .container import Archive
from .layers import Posterior


@dataclass(frozen=True)
class Goal:
    """The KL of the tensors `names` that are not coded yet, plus `extra_bits`, is to be `target_bits`."""

    names: tuple[str, ...]
    extra_bits: float
    target_bits: float


class Packing(abc.ABC):
    """The coded tensors of one model while they are packaged, round by round."""

    unit: str  # what is counted, for the progress bar
    total: int

    @property
    @abc.abstractmethod
    def num_coded(self) -> int:
        """Units coded so far."""

    @abc.abstractmethod
    def code_round(self, rounds_left: int) -> None:
        """Code the next part and fix its weights at what the decoder will give."""

    @abc.abstractmethod
    def spent_bits(self) -> float:
        """Bits of all codewords so far."""

    @abc.abstractmethod
    def goals(self) -> list[Goal]:
        """What refinement steers the rest by; empty if there is no budget."""

    @abc.abstractmethod
    def finish(self, archive: Archive) -> int:
        """Put the codewords into the archive; returns the size of the file, bytes."""

    @abc.abstractmethod
    def account(self) -> tuple[np.ndarray, np.ndarray]:
        """KL when coded and log density ratio of what was coded, of each unit, bits."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """What a resumed packaging needs, besides the posteriors: tensors and plain values."""

    @abc.abstractmethod
    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `state`."""


def live_positions(archive: Archive, number: int, posterior: Posterior) -> np.ndarray:
    """Positions, in the flattened live tensor, of the weights of units that are not dropped."""
    codes = archive.records[number].prior_codes
    return np.flatnonzero(np.repeat(codes > 0, posterior.mean.numel() // len(codes)))


def gather(posterior: Posterior, place: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, std and prior std at `place`, same shape, float64; a missing weight (-1) is its own prior and so weighs nothing."""
    at = torch.from_numpy(place)
    inside, at = at >= 0, at.clamp_min(0)
    std = posterior.prior_std
    assert std is not None
    prior = std.flatten().cpu()[at // max(posterior.mean.numel() // std.numel(), 1)].double()  # one for each slice of axis 0
    mean, log_std = (v.detach().flatten().cpu()[at].double() for v in (posterior.mean, posterior.log_std))
    std = log_std.exp()
    prior = torch.where(inside, prior, 1.0)
    return torch.where(inside, mean, 0.0), torch.where(inside, std, 1.0), prior
