"""What the coders with an open-ended index share: a search budget, and the octave code of the index.

Index k is written as its octave floor(log2 k), by a Huffman table fitted to the whole file, and the rest of k raw. That is
within 0.05 bit of the entropy of k, whatever its law.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..bits import NATS_PER_BIT, HuffmanTable
from ..container import octaves
from ..gaussian import Blocks
from .base import BlockCoder, Codewords, Scorer, as_tensor, chunks

LARGEST_LOG2_INDEX = 31
_TYPICAL_OCTAVE_BITS = 3.5  # codeword of an octave in a fitted table
_ENOUGH_FOR_A_TABLE = 100
_FEWEST_EXTRA_BITS = -6.0


class OctaveCoder(BlockCoder):
    """A coder whose index is an octave and raw bits.

    Args:
        extra_bits: the search stops after 2^(KL bits of the block + extra_bits) candidates.
        max_log2_candidates: never search more than 2^this.
        private_seed: the encoder's own randomness, which the decoder does not need.
    """

    def __init__(self, *, extra_bits: float = 4.0, max_log2_candidates: int = 22, private_seed: int = 0):
        self.extra_bits = extra_bits
        self.max_log2_candidates = min(max_log2_candidates, LARGEST_LOG2_INDEX)
        self.private_seed = private_seed

    def shortened(self, bits: float) -> OctaveCoder:
        """See `Coder.shortened`: half a bit shorter for each halving of the search, down to 2^(KL - 6) candidates."""
        if bits <= 0:
            return self
        shorter = copy.copy(self)
        shorter.extra_bits = max(self.extra_bits - 2.0 * bits, min(self.extra_bits, _FEWEST_EXTRA_BITS))
        return shorter

    def _limits(self, kl_nats: np.ndarray) -> np.ndarray:
        """Candidates that are searched for each block."""
        log2 = np.clip(kl_nats / NATS_PER_BIT + self.extra_bits, 4.0, self.max_log2_candidates)
        return np.floor(2.0**log2).astype(np.int64)

    def _limits_for_prediction(self, blocks: Blocks) -> np.ndarray:
        return self._limits(blocks.kl_nats().numpy())

    def _generator(self, seed: int, tensor: int, first_block: int) -> np.random.Generator:
        """The encoder's own randomness for one call."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.private_seed, seed, tensor, first_block])))

    def index_bits(self, index: np.ndarray) -> np.ndarray:
        """See `BlockCoder.index_bits`."""
        return table_bits(index)

    def expected_bits(self, mean, std, prior_std) -> np.ndarray:
        """See `Coder.expected_bits`: from the law of the index's octave, with one table for all these blocks."""
        blocks = Blocks.of(*(as_tensor(v) for v in (mean, std, prior_std)))
        limits = self._limits_for_prediction(blocks)[:, None]
        edges = 2.0 ** np.arange(LARGEST_LOG2_INDEX + 1)
        survive = self._survival(blocks, np.log(edges))
        survive[:, 0] = 1.0
        octave = survive - np.concatenate([survive[:, 1:], np.zeros((len(limits), 1))], 1)
        mass = octave * np.clip((limits - edges) / edges, 0.0, 1.0)  # the part of an octave below the limit
        # nothing accepted: the best candidate is sent, which may be any of them
        uniform = np.minimum(edges, np.maximum(limits + 1 - edges, 0.0)) / limits
        mass += (1.0 - mass.sum(1, keepdims=True)) * uniform
        cost = np.arange(len(edges)) - np.log2(np.maximum(mass.mean(0), 1e-12))
        return mass @ cost

    def _survival(self, blocks: Blocks, log_candidates: np.ndarray) -> np.ndarray:
        """P(index > n) of the search without a budget, `[blocks, len(log_candidates)]`, n = exp(log_candidates)."""
        raise NotImplementedError

    def predict_bits(self, kl_bits: float) -> float:
        """Measured with GPRS: 1.9 bits over the KL at 8, 1.65 at 12, 1.4 at 16 for 4 extra bits; 1 more with 8.

        0.9 bits are added for what one octave table loses on blocks of unequal KL (standard deviation 3.6 bits).
        """
        if kl_bits <= 0:
            return 1.0
        spare = 2.0 + 6.0 / kl_bits + math.log2(min(max(self.extra_bits, 2.0), 16.0) / 4.0)
        return kl_bits + min(spare, 1.0 + kl_bits)


@dataclass
class Part:
    """Scores of some candidates for some blocks that are still searching.

    Attributes:
        start: number of the first candidate, from 0.
        rows: the blocks.
        score: l, nats, `[n, rows]`.
        top: the largest l of each block, `[rows]`.
    """

    start: int
    rows: np.ndarray
    score: Tensor
    top: np.ndarray

    @property
    def stop(self) -> int:
        """One past the last candidate."""
        return self.start + self.score.shape[0]


class Search:
    """The candidates of all blocks, part by part: what was accepted, and the best so far where nothing was."""

    def __init__(self, scorer: Scorer, limits: np.ndarray):
        self.scorer, self.limits = scorer, limits
        count = scorer.count
        self.index, self.found = np.zeros(count, np.int64), np.zeros(count, bool)
        self.value, self.best, self.best_at = np.zeros(count), np.full(count, -np.inf), np.zeros(count, np.int64)

    def parts(self) -> Iterator[Part]:
        """All candidates within the limits, in order, of the blocks that have not accepted one yet."""
        for start, stop in chunks(int(self.limits.max())):
            searching = np.flatnonzero(~self.found & (self.limits > start))
            if not len(searching):
                return
            for rows in self.scorer.tiles(searching, stop - start):
                score = self.scorer.score(start, stop, rows)
                if (self.limits[rows] < stop).any():
                    beyond = torch.arange(start, stop, device="cpu")[:, None] >= torch.from_numpy(self.limits[rows])[None, :]
                    score.masked_fill_(beyond, -torch.inf)
                part = Part(start, rows, score, score.amax(0).double().numpy())
                better = part.top > self.best[rows]
                if better.any():
                    self.best[rows[better]] = part.top[better]
                    self.best_at[rows[better]] = start + 1 + score[:, torch.from_numpy(better)].argmax(0).numpy()
                yield part

    def accept(self, blocks: np.ndarray, index: np.ndarray, value: np.ndarray) -> None:
        """The search of these blocks is over."""
        self.index[blocks], self.found[blocks], self.value[blocks] = index, True, value

    def accept_first(self, part: Part, bar: np.ndarray) -> None:
        """Accept the first candidate of each block whose l is at least `bar`, `[rows]`."""
        some = np.flatnonzero(part.top >= bar)
        if len(some):
            score = part.score[:, torch.from_numpy(some)]
            first = (score >= torch.from_numpy(bar[some]).float()[None, :]).to(torch.uint8).argmax(0)
            self.accept(part.rows[some], part.start + 1 + first.numpy(), score.gather(0, first[None, :])[0].double().numpy())

    def codewords(self) -> Codewords:
        """The accepted candidates, and the best one of each block that accepted none."""
        rest = ~self.found
        self.index[rest], self.value[rest] = self.best_at[rest], self.best[rest]
        return Codewords(self.index, octave_bits(self.index), self.value, rest, self.scorer.dimension)


def table_bits(index: np.ndarray) -> np.ndarray:
    """About how long each of these indices is in a file that holds them all, the table itself left out."""
    if len(index) < _ENOUGH_FOR_A_TABLE:
        return octaves(index) + _TYPICAL_OCTAVE_BITS
    return octaves(index) + HuffmanTable.fit(octaves(index)).bits(octaves(index))


def octave_bits(index: np.ndarray) -> np.ndarray:
    """Bits of each index in a file that holds just these; the table is shared out equally."""
    octave = octaves(index)
    table = HuffmanTable.fit(octave)
    table_bits = 16 + np.sum(2.0 * np.abs(np.diff(table.lengths)) + 1.0)
    return table.bits(octave) + octave + table_bits / len(index)
