"""Coders that are races: send the candidate with the smallest T_k / r(Z_k), T_k increasing times that the encoder draws.

A* coding (Maddison 2016, Flamich et al. 2022, arXiv 2201.12857): T_k are the arrival times of a Poisson process, and the
winner is an exact draw of the posterior once no later candidate can win. Ordered random coding (Theis and Yosri 2022,
arXiv 2109.04579): T_k are N sorted exponential variables, so that low numbers are the likely winners, and the winner is a
self-normalised importance sample.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..gaussian import Blocks, log_ratio_quantiles, stretch
from .base import Codewords, Scorer, chunks
from .octave import OctaveCoder, octave_bits

_NODES = 48  # of the quadratures in `_survival`


class _Race(OctaveCoder):
    """The common search: the best of l - ln T over all candidates."""

    def _log_times(
        self, rng: np.random.Generator, before: np.ndarray, start: int, stop: int, limits: np.ndarray
    ) -> tuple[Tensor, np.ndarray]:
        """Ln T of candidates start .. stop - 1 (from 0), `[n, rows]`, and T of the last; `before` is T of candidate start - 1."""
        raise NotImplementedError

    def _over(self, log_time: np.ndarray, best: np.ndarray, peak: np.ndarray) -> np.ndarray:
        """Whether no candidate later than exp(log_time) can win."""
        return peak - log_time <= best

    def _encode(self, scorer: Scorer) -> Codewords:
        limits = self._limits(scorer.kl_nats)
        peak = scorer.blocks.max_log_ratio().numpy()
        rng = self._generator(scorer.codebook.seed, scorer.tensor, int(scorer.numbers[0]))
        count = scorer.count
        time, best = np.zeros(count), np.full(count, -np.inf)
        index, value, over = np.zeros(count, np.int64), np.zeros(count), np.zeros(count, bool)
        for start, stop in chunks(int(limits.max())):
            for rows in scorer.tiles(np.flatnonzero(~over & (limits > start)), stop - start):
                score = scorer.score(start, stop, rows)
                log_time, time[rows] = self._log_times(rng, time[rows], start, stop, limits[rows])
                lead = score - log_time
                lead.masked_fill_(torch.arange(start, stop, device="cpu")[:, None] >= torch.from_numpy(limits[rows])[None, :], -torch.inf)
                top = lead.max(0)
                better = top.values.double().numpy() > best[rows]
                best[rows] = np.where(better, top.values.double().numpy(), best[rows])
                index[rows] = np.where(better, start + top.indices.numpy() + 1, index[rows])
                value[rows] = np.where(better, score.gather(0, top.indices[None, :])[0].double().numpy(), value[rows])
                over[rows] = self._over(np.log(np.maximum(time[rows], 1e-300)), best[rows], peak[rows])
        return Codewords(index, octave_bits(index), value, ~over, scorer.dimension)

    def _survival(self, blocks: Blocks, log_candidates: np.ndarray) -> np.ndarray:
        """P(K > n): the winner is Z ~ Q at time M r(Z), M ~ Exp(1), after Poisson(M (r - 1 + S(r))) candidates that lost."""
        level = (np.arange(_NODES) + 0.5) / _NODES
        log_m = np.log(-np.log1p(-level))
        log_r = log_ratio_quantiles(blocks, level)  # [blocks, nodes]
        law = stretch(blocks)
        survive = np.stack([np.interp(r, x, s) for r, x, s in zip(log_r, law.level, law.log_survival, strict=True)])
        lost = np.maximum(np.exp(log_r) - 1.0 + np.exp(survive), 0.0)
        mean = np.exp(log_m)[None, None, :] * lost[:, :, None]  # [blocks, nodes, nodes]
        n = np.exp(log_candidates)
        return np.stack([(mean >= k - 0.5).mean((1, 2)) for k in n], 1)


class AStar(_Race):
    """A* coding with one codebook for all blocks: exact, unless the search ends at its budget.

    Args:
        extra_bits, max_log2_candidates: see `OctaveCoder`.
        private_seed: of the arrival times.
    """

    name = "a-star"

    def _log_times(
        self, rng: np.random.Generator, before: np.ndarray, start: int, stop: int, limits: np.ndarray
    ) -> tuple[Tensor, np.ndarray]:
        gaps = rng.standard_exponential((stop - start, len(before)))
        times = before[None, :] + np.cumsum(gaps, 0)
        return torch.from_numpy(np.log(times)).float(), times[-1]


class OrderedRandom(_Race):
    """Ordered random coding among 2^(KL + extra_bits) candidates, all of which are scored.

    Args:
        extra_bits, max_log2_candidates: see `OctaveCoder`; default 2 extra bits.
        private_seed: of the sorted times.
    """

    name = "ordered-random"

    def __init__(self, *, extra_bits: float = 2.0, max_log2_candidates: int = 22, private_seed: int = 0):
        super().__init__(extra_bits=extra_bits, max_log2_candidates=max_log2_candidates, private_seed=private_seed)

    def _log_times(
        self, rng: np.random.Generator, before: np.ndarray, start: int, stop: int, limits: np.ndarray
    ) -> tuple[Tensor, np.ndarray]:
        # gaps of sorted exponentials: Exp(1) / (number not yet passed), here in units that make the first gaps Exp(1)
        left = np.maximum(limits[None, :] - np.arange(start, stop)[:, None], 1)
        gaps = rng.standard_exponential((stop - start, len(before))) * (limits[None, :] / left)
        times = before[None, :] + np.cumsum(gaps, 0)
        return torch.from_numpy(np.log(times)).float(), times[-1]

    def _over(self, log_time: np.ndarray, best: np.ndarray, peak: np.ndarray) -> np.ndarray:
        return np.isinf(log_time) & (peak < best)  # all candidates take part
