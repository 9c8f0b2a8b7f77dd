"""Greedy Poisson rejection sampling (Flamich 2023, arXiv 2305.15313): accept the first candidate with T_k <= sigma(r(Z_k)).

The arrival times T_k and sigma stay with the encoder, so neither needs to be exact for decoding to be. With a budget of
2^(KL + extra_bits) candidates the sampler is truncated: nothing accepted means that the residual weight (r - h)^+ of every
candidate is zero, and the best of them, the one of largest r, is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from ..errors import CodingError
from ..gaussian import Blocks, Stretch, stretch, super_level
from .base import Codewords, Looked, Scorer
from .octave import OctaveCoder, Part, Search

_NODES = 48  # of a quadrature
_EXTRA_BITS = {"posterior": 4.0, "super-level": 2.0}


class GreedyPoisson(OctaveCoder):
    """GPRS with one codebook for all blocks.

    Args:
        extra_bits: the search stops after 2^(KL bits of the block + extra_bits) candidates. 4 is the budgeted sampler and
            the default, 8 is near exact; 2 is the default of the super-level target, where it wastes least.
        max_log2_candidates: never search more than 2^this.
        private_seed: of the arrival times.
        target: "posterior" draws from the posterior. "super-level" draws from the prior restricted to {r >= h}, h such that
            the mean log ratio is the posterior's own: a draw as good as the posterior's, of a law without its tail, and
            a shorter index. There sigma is a step, and GPRS accepts the first candidate with r >= h.
    """

    name = "gprs"

    def __init__(self, *, extra_bits: float | None = None, max_log2_candidates: int = 22, private_seed: int = 0, target: str = "posterior"):
        if target not in _EXTRA_BITS:
            raise CodingError(f"target must be 'posterior' or 'super-level', not {target!r}")
        extra_bits = _EXTRA_BITS[target] if extra_bits is None else extra_bits
        super().__init__(extra_bits=extra_bits, max_log2_candidates=max_log2_candidates, private_seed=private_seed)
        self.target = target

    def _encode(self, scorer: Scorer) -> Codewords:
        search = Search(scorer, self._limits(scorer.kl_nats))
        if self.target == "super-level":
            level, _ = super_level(scorer.blocks)
            for part in search.parts():
                search.accept_first(part, level[part.rows])
            return search.codewords()
        law = stretch(scorer.blocks)
        rng = self._generator(scorer.codebook.seed, scorer.tensor, int(scorer.numbers[0]))
        time = np.zeros(scorer.count)  # arrival time of the last candidate looked at
        for part in search.parts():
            _first_arrivals(law, part, search, time, rng, self._look)
        return search.codewords()

    def predict_bits(self, kl_bits: float) -> float:
        """See `Coder.predict_bits`; the index of a super-level set is spread evenly over the whole search."""
        if self.target == "posterior":
            return super().predict_bits(kl_bits)
        return kl_bits + min(self.extra_bits + 0.9, 1.0 + kl_bits)

    def _survival(self, blocks: Blocks, log_candidates: np.ndarray) -> np.ndarray:
        """P(K > n) is S at sigma = n, up to a Poisson fluctuation of K; geometric for a super-level set."""
        if self.target == "posterior":
            return stretch(blocks).survival(log_candidates)
        return np.exp(-np.exp(log_candidates[None, :] + super_level(blocks)[1][:, None]))


def _first_arrivals(
    law: Stretch, part: Part, search: Search, time: np.ndarray, rng: np.random.Generator, look: Callable[[Looked], None]
) -> None:
    """Draw arrival times of the candidates that may pass, in order, and accept each block's first that does.

    Between two looked-at candidates n apart the time grows by a Gamma(n) variable, so the others need no draw. `time` is
    moved to the end of the part.
    """
    rows, reached = part.rows, np.full(len(part.rows), part.start)
    # arrivals only grow, so no candidate of this part is accepted below the threshold at its beginning
    bar = law.thresholds(rows, _log(time[rows]))
    some = np.flatnonzero(part.top >= bar)
    may_pass = part.score[:, torch.from_numpy(some)] >= torch.from_numpy(bar[some]).float()[None, :]
    column, candidate = (t.numpy() for t in torch.nonzero(may_pass.T, as_tuple=True))
    turn = np.arange(len(column)) - np.searchsorted(column, column)  # of each among its block's
    column = some[column]
    for k in range(int(turn.max(initial=-1)) + 1):
        mine = turn == k
        c, i = column[mine], candidate[mine]
        waiting = ~search.found[rows[c]]
        c, i = c[waiting], i[waiting]
        if not len(c):
            break
        time[rows[c]] += rng.standard_gamma(part.start + i + 1 - reached[c])
        reached[c] = part.start + i + 1
        value = part.score[i, c].double().numpy()
        look(Looked(rows[c], reached[c], time[rows[c]], value))
        passes = value >= law.thresholds(rows[c], _log(time[rows[c]]))
        search.accept(rows[c[passes]], reached[c[passes]], value[passes])
    left = ~search.found[rows] & (reached < part.stop)
    time[rows[left]] += rng.standard_gamma((part.stop - reached)[left])


def _log(time: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(time, 1e-300))


class ParallelGreedyPoisson(GreedyPoisson):
    """Parallel GPRS: `workers` searches side by side, each with arrivals at a `workers`-th of the rate.

    Candidate (n - 1) workers + j + 1 is the n-th of worker j. The first acceptance of all wins, once every worker's clock
    is past it (Flamich 2023, section 3.2).

    Args:
        workers: number of searches.
        extra_bits, max_log2_candidates, private_seed: as in `GreedyPoisson`.
    """

    name = "parallel-gprs"

    def __init__(self, *, workers: int = 8, extra_bits: float = 4.0, max_log2_candidates: int = 22, private_seed: int = 0):
        super().__init__(extra_bits=extra_bits, max_log2_candidates=max_log2_candidates, private_seed=private_seed)
        if not 1 <= workers <= 256:
            raise CodingError(f"workers must be 1 to 256, not {workers}")
        self.workers = workers

    def _encode(self, scorer: Scorer) -> Codewords:
        search = Search(scorer, self._limits(scorer.kl_nats))
        law = stretch(scorer.blocks)
        rng = self._generator(scorer.codebook.seed, scorer.tensor, int(scorer.numbers[0]))
        clock = np.zeros((self.workers, scorer.count))
        first = np.full(scorer.count, np.inf)  # time of the earliest acceptance so far
        for part in search.parts():
            rows, start = part.rows, part.start
            gaps = rng.standard_exponential((part.stop - start, len(rows))) * self.workers
            times = np.empty_like(gaps)
            for j in range(self.workers):
                mine = slice((j - start) % self.workers, None, self.workers)
                times[mine] = clock[j, rows] + np.cumsum(gaps[mine], 0)
                if len(times[mine]):
                    clock[j, rows] = times[mine][-1]
            values = part.score.numpy()
            if self.trail is not None:
                number, row = np.indices(times.shape).reshape(2, -1)
                self._look(Looked(rows[row], start + number + 1, times.ravel(), values.ravel()))
            i, c = np.nonzero(values >= law.thresholds(rows, _log(times.min(0)))[None, :])
            passes = values[i, c] >= law.thresholds(rows[c], _log(times[i, c]))
            i, c = i[passes], c[passes]
            order = np.argsort(-times[i, c], kind="stable")  # the earliest last, so that it is what stays
            i, c = i[order], c[order]
            earlier = times[i, c] < first[rows[c]]
            i, c = i[earlier], c[earlier]
            first[rows[c]], search.index[rows[c]], search.value[rows[c]] = times[i, c], start + i + 1, values[i, c]
            search.found[rows] = clock[:, rows].min(0) >= first[rows]
        search.found |= np.isfinite(first)
        return search.codewords()

    def _survival(self, blocks: Blocks, log_candidates: np.ndarray) -> np.ndarray:
        """P(K > n): the winner is any of the workers, after Poisson(T / workers) candidates of its own that lost."""
        law, n = stretch(blocks), np.exp(log_candidates)[None, :]
        level = (np.arange(_NODES) + 0.5) / _NODES
        second = law.survival(np.log(-self.workers * np.log1p(-level))).mean(1, keepdims=True)  # not a worker's first candidate
        early = second + (1.0 - second) * (1.0 - n / self.workers)
        return np.where(n < self.workers, early, np.minimum(law.survival(log_candidates), second))

    def predict_bits(self, kl_bits: float) -> float:
        """See `Coder.predict_bits`: at least the number of the worker."""
        return max(super().predict_bits(kl_bits), math.log2(self.workers) + 1.0)
