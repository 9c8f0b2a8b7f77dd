"""Branch and bound for single weights that carry many bits: the search path is the code, and its length is about the KL.

Where the density ratio has one peak (posterior std below the prior's) a candidate that was not accepted cuts off the side
of it that the peak is not on: nothing there can be accepted later. So the search goes down one path of the tree of `tree`,
O(KL) steps instead of 2^KL. Branch-and-bound GPRS: Flamich 2023 (arXiv 2305.15313), algorithm 4. Branch-and-bound A*: Flamich
et al. 2022 (arXiv 2201.12857), AS*.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import numpy as np
import torch

from .. import tree
from ..errors import CodingError
from ..gaussian import Blocks, stretch
from .base import BlockCoder, Codebook, Codewords, Looked, checked
from .octave import octave_bits, table_bits

_TRIALS = 64  # searches with other randomness that `expected_bits` averages over
_WHOLE = 1 << 32
Lead = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class _BranchAndBound(BlockCoder):
    """One path down the tree of each weight.

    Args:
        private_seed: of the arrival times.
    """

    largest_dimension = 1

    def __init__(self, *, private_seed: int = 0):
        self.private_seed = private_seed

    @abc.abstractmethod
    def _leads(self, law: Blocks) -> Lead:
        """The rule of the race: of some rows' candidates, from log ratios and log times; the largest lead is sent."""

    @abc.abstractmethod
    def _over(self, lead: np.ndarray, best: np.ndarray, peak: np.ndarray, log_time: np.ndarray) -> np.ndarray:
        """Whether nothing further down can have a larger lead."""

    def encode(self, mean, std, prior_std, *, seed: int, tensor: int = 0, blocks=None, codebook: Codebook | None = None) -> Codewords:
        """See `Coder.encode`; blocks are single weights, `[blocks, 1]`, and a codeword is a node of the tree.

        Raises:
            CodingError: also where a block has more weights, or a posterior is not narrower than its prior.
        """
        law = self._law(*checked(mean, std, prior_std))
        count = law.delta.shape[0]
        numbers = np.arange(count) if blocks is None else np.asarray(blocks, np.int64)
        if not law.delta.numel():
            return Codewords(np.ones(count, np.int64), np.zeros(count), np.zeros(count), np.zeros(count, bool), law.delta.shape[1])
        node, ratio, ended = self._search(law, tree.turns(seed, tensor, numbers), [self.private_seed, seed, tensor, int(numbers[0])])
        return Codewords(node, octave_bits(node), ratio, ~ended, 1)

    def decode(self, codewords: Codewords, prior_std, *, seed: int, tensor: int = 0, blocks=None) -> np.ndarray:
        """See `Coder.decode`."""
        numbers = np.arange(len(codewords.index)) if blocks is None else np.asarray(blocks, np.int64)
        if codewords.dimension == 0:
            return np.zeros((len(numbers), 0), np.float32)
        return tree.node_values(seed, tensor, numbers, codewords.index) * np.asarray(prior_std, np.float32)

    def expected_bits(self, mean, std, prior_std) -> np.ndarray:
        """See `Coder.expected_bits`: the mean over searches with other randomness."""
        law = self._law(*checked(mean, std, prior_std))
        if not law.delta.numel():
            return np.zeros(law.delta.shape[0])
        nodes = [self._search(law, tree.turns(i, 0, np.arange(len(law.delta))), [i, 1])[0] for i in range(_TRIALS)]
        return np.mean(np.reshape(octave_bits(np.concatenate(nodes)), (_TRIALS, -1)), 0)

    def index_bits(self, index: np.ndarray) -> np.ndarray:
        """See `BlockCoder.index_bits`."""
        return table_bits(index)

    def predict_bits(self, kl_bits: float) -> float:
        """See `Coder.predict_bits`: measured, 2.4 to 4.3 bits over the KL."""
        return kl_bits + min(3.0, 1.0 + kl_bits)

    def _law(self, mean: torch.Tensor, std: torch.Tensor, prior_std: torch.Tensor) -> Blocks:
        law = Blocks.of(mean, std, prior_std)
        if law.delta.shape[1] > 1:
            raise CodingError(f"{self.name} codes single weights: mean and std must be [blocks, 1], not {tuple(mean.shape)}")
        wide = int((law.v >= 1.0).sum())
        if wide:
            raise CodingError(
                f"{self.name}: {wide} posterior(s) are not narrower than their prior, so the density ratio has no peak: "
                "use the coder 'gprs', or keep std below prior_std"
            )
        return law

    def _search(self, law: Blocks, words: np.ndarray, entropy: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Node and log ratio of what is sent, and whether the search ended before the deepest level."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
        delta, v = law.delta[:, 0].numpy(), law.v[:, 0].numpy()
        const, linear, quadratic = (c.numpy() for c in law.coefficients())
        top, peak, leads = delta / (1.0 - v), law.max_log_ratio().numpy(), self._leads(law)
        count = len(delta)
        low, high = np.zeros(count, np.uint64), np.full(count, _WHOLE, np.uint64)
        node, time = np.ones(count, np.int64), np.zeros(count)
        sent, value = np.ones(count, np.int64), np.full(count, -np.inf)
        best, searching = np.full(count, -np.inf), np.ones(count, bool)
        for depth in range(tree.LARGEST_DEPTH + 1):
            rows = np.flatnonzero(searching)
            if not len(rows):
                break
            time[rows] += rng.standard_exponential(len(rows)) * _WHOLE / (high[rows] - low[rows]).astype(np.float64)
            u = tree.point(words[rows, depth], low[rows], high[rows])
            x = tree.quantile(u)
            ratio, log_time = const[rows] + x * linear[rows, 0] + x * x * quadratic[rows, 0], np.log(time[rows])
            self._look(Looked(rows, node[rows], time[rows], ratio, low[rows] / _WHOLE, high[rows] / _WHOLE))
            lead = leads(rows, ratio, log_time)
            better = lead > best[rows]
            best[rows] = np.where(better, lead, best[rows])
            sent[rows] = np.where(better, node[rows], sent[rows])
            value[rows] = np.where(better, ratio, value[rows])
            over = self._over(lead, best[rows], peak[rows], log_time)
            below = x < top[rows]  # the peak is above: go on there
            low[rows] = np.where(below, u + np.uint64(1), low[rows])
            high[rows] = np.where(below, high[rows], u)
            node[rows] = 2 * node[rows] + below
            searching[rows] = ~over & (high[rows] > low[rows])
        return sent, value, ~searching


class BranchAndBoundGreedyPoisson(_BranchAndBound):
    """GPRS down one path of the tree: the first candidate with T <= sigma(r) is sent."""

    name = "branch-and-bound-gprs"

    def _leads(self, law: Blocks) -> Lead:
        table = stretch(law)
        return lambda rows, ratio, log_time: np.where(ratio >= table.thresholds(rows, log_time), np.inf, ratio)

    def _over(self, lead: np.ndarray, best: np.ndarray, peak: np.ndarray, log_time: np.ndarray) -> np.ndarray:
        return lead == np.inf


class BranchAndBoundAStar(_BranchAndBound):
    """A* coding down one path of the tree: the smallest T / r wins, once nothing further down can."""

    name = "branch-and-bound-a-star"

    def _leads(self, law: Blocks) -> Lead:
        return lambda rows, ratio, log_time: ratio - log_time

    def _over(self, lead: np.ndarray, best: np.ndarray, peak: np.ndarray, log_time: np.ndarray) -> np.ndarray:
        return peak - log_time <= best
