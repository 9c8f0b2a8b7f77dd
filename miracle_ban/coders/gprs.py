"""Greedy Poisson rejection sampling (Flamich 2023, arXiv 2305.15313): accept the first candidate with T_k <= sigma(r(Z_k)).

The arrival times T_k and sigma stay with the encoder, so neither needs to be exact for decoding to be. With a budget of
2^(KL + extra_bits) candidates the sampler is truncated: nothing accepted means that the residual weight (r - h)^+ of every
candidate is zero, and the best of them, the one of largest r, is sent.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..bits import NATS_PER_BIT, HuffmanTable
from ..container import octaves
from ..gaussian import Blocks, stretch
from .base import Coder, Codewords, Scorer, chunks

_LARGEST_LOG2_INDEX = 31
_TYPICAL_OCTAVE_BITS = 3.5  # codeword of an octave in a fitted table
_ENOUGH_FOR_A_TABLE = 100


class GreedyPoisson(Coder):
    """GPRS with one codebook for all blocks.

    Args:
        extra_bits: the search stops after 2^(KL bits of the block + extra_bits) candidates. 4 is the budgeted sampler;
            8 is near exact; `math.inf` never stops before 2^31.
        max_log2_candidates: never search more than 2^this.
        arrival_seed: the encoder's own randomness.
    """

    name = "gprs"

    def __init__(self, *, extra_bits: float = 4.0, max_log2_candidates: int = 22, arrival_seed: int = 0):
        self.extra_bits = extra_bits
        self.max_log2_candidates = min(max_log2_candidates, _LARGEST_LOG2_INDEX)
        self.arrival_seed = arrival_seed

    def _limits(self, kl_nats: np.ndarray) -> np.ndarray:
        log2 = np.clip(kl_nats / NATS_PER_BIT + self.extra_bits, 4.0, self.max_log2_candidates)
        return np.floor(2.0**log2).astype(np.int64)

    def _encode(self, scorer: Scorer) -> Codewords:
        law = stretch(scorer.blocks)
        limits = self._limits(scorer.kl_nats)
        entropy = [self.arrival_seed, scorer.codebook.seed, scorer.tensor, *scorer.numbers[:1].tolist()]
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
        count = scorer.count
        time = np.zeros(count)  # arrival time of the last candidate looked at
        index, found = np.zeros(count, np.int64), np.zeros(count, bool)
        best, best_at, chosen = np.full(count, -np.inf), np.zeros(count, np.int64), np.zeros(count)
        for start, stop in chunks(int(limits.max())):
            rows = np.flatnonzero(~found & (limits > start))
            if not len(rows):
                break
            score = scorer.score(start, stop, rows)
            if (limits[rows] < stop).any():
                beyond = torch.arange(start, stop)[:, None] >= torch.from_numpy(limits[rows])[None, :]
                score.masked_fill_(beyond, -torch.inf)
            top = score.max(0)
            better = top.values.double().numpy() > best[rows]
            best[rows] = np.where(better, top.values.double().numpy(), best[rows])
            best_at[rows] = np.where(better, start + top.indices.numpy() + 1, best_at[rows])
            # arrivals only grow, so no candidate of this chunk is accepted below the threshold at its beginning
            bar = [law.threshold(b, math.log(time[b])) if time[b] > 0 else -np.inf for b in rows.tolist()]
            at, column = torch.nonzero((score >= torch.tensor(bar)[None, :]).T, as_tuple=True)[::-1]
            passed = self._first_arrivals(law, score, at.numpy(), column.numpy(), rows, time, start, stop, rng)
            for b, (k, value) in passed.items():
                index[b], found[b], chosen[b] = k, True, value
        rest = ~found
        index[rest], chosen[rest] = best_at[rest], best[rest]
        return Codewords(index, octave_bits(index), chosen, rest, scorer.dimension, {"limits": limits})

    def _first_arrivals(self, law, score, at, column, rows, time, start, stop, rng) -> dict[int, tuple[int, float]]:
        """Draw the arrival times of the candidates that may pass, in order; the first accepted one of each block.

        Between two looked-at candidates n apart the time grows by a Gamma(n) variable, so the others need no draw.
        """
        accepted: dict[int, tuple[int, float]] = {}
        reached = np.full(len(rows), start)
        values = score.numpy()
        for i, c in zip(at.tolist(), column.tolist(), strict=True):
            b = int(rows[c])
            if b in accepted:
                continue
            k = start + i + 1
            time[b] += rng.standard_gamma(k - reached[c])
            reached[c] = k
            value = float(values[i, c])
            if value >= law.threshold(b, math.log(time[b])):
                accepted[b] = (k, value)
        left = np.array([int(rows[c]) not in accepted and reached[c] < stop for c in range(len(rows))])
        if left.any():
            time[rows[left]] += rng.standard_gamma((stop - reached)[left])
        return accepted

    def expected_bits(self, mean, std, prior_std) -> np.ndarray:
        """See `Coder.expected_bits`: P(K > n) is S at sigma = n, up to a Poisson fluctuation of K."""
        blocks = Blocks.of(*(torch.as_tensor(v).double() for v in (mean, std, prior_std)))
        law, limits = stretch(blocks), self._limits(blocks.kl_nats().numpy())
        edges = np.arange(_LARGEST_LOG2_INDEX + 1)
        survive = law.survival(edges * math.log(2.0))
        survive[:, 0] = 1.0
        limit = limits[:, None]
        inside = np.clip((limit - 2.0**edges) / 2.0**edges, 0.0, 1.0)  # share of octave n below the limit
        octave = survive - np.concatenate([survive[:, 1:], np.zeros((len(limits), 1))], 1)
        mass = octave * inside
        uniform = np.minimum(2.0**edges, np.maximum(limit + 1 - 2.0**edges, 0.0)) / limit
        mass += (1.0 - mass.sum(1, keepdims=True)) * uniform
        table = mass.mean(0)
        cost = edges - np.log2(np.maximum(table, 1e-12))
        return mass @ cost

    def index_bits(self, index: np.ndarray) -> np.ndarray:
        """See `Coder.index_bits`."""
        if len(index) < _ENOUGH_FOR_A_TABLE:
            return octaves(index) + _TYPICAL_OCTAVE_BITS
        return octaves(index) + HuffmanTable.fit(octaves(index)).bits(octaves(index))

    def predict_bits(self, kl_bits: float) -> float:
        """Measured for a budget of 4 extra bits: 1.9 bits over the KL at 8, 1.65 at 12, 1.4 at 16; 1 more with 8 extra bits.

        0.9 bits are added for what one octave table loses on blocks of unequal KL (standard deviation 3.6 bits).
        """
        if kl_bits <= 0:
            return 1.0
        spare = 2.0 + 6.0 / kl_bits + math.log2(min(max(self.extra_bits, 2.0), 16.0) / 4.0)
        return kl_bits + min(spare, 1.0 + kl_bits)


def octave_bits(index: np.ndarray) -> np.ndarray:
    """Bits of each index in the octave code: floor(log2 k) by a Huffman table fitted to all, then the rest of k raw.

    The table itself is shared out equally.
    """
    octave = octaves(index)
    table = HuffmanTable.fit(octave)
    table_bits = 16 + np.sum(2.0 * np.abs(np.diff(table.lengths)) + 1.0)
    return table.bits(octave) + octave + table_bits / len(index)
