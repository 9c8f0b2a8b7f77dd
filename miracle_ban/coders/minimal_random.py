"""Minimal random code learning (Havasi et al. 2019, arXiv 1810.00440): one of 2^bits candidates, in exactly `bits` bits.

`choice="sample"` draws the candidate with probability proportional to its density ratio, as the paper does; `"best"`
takes the largest ratio, which loses the least (the ratio is the loss in units of beta).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..bits import NATS_PER_BIT
from ..errors import CodingError
from ..gaussian import Blocks
from .base import BlockCoder, Codewords, Scorer, as_tensor, chunks

_EXTRA_BITS = {"sample": 0.0, "best": 2.0}
_LONGEST_BITS = 24


class MinimalRandom(BlockCoder):
    """MIRACLE's coder, the baseline.

    Args:
        bits: length of every index; default the mean KL of the blocks, rounded up, plus `extra_bits`.
        extra_bits: see `bits`; default 0 for "sample", as in MIRACLE, and 2 for "best", whose candidate is then about as
            good as a draw.
        choice: "sample" or "best".
        choice_seed: the encoder's own randomness.
    """

    name = "minimal-random"

    def __init__(self, *, bits: int | None = None, extra_bits: float | None = None, choice: str = "sample", choice_seed: int = 0):
        if choice not in ("sample", "best"):
            raise CodingError(f"choice must be 'sample' or 'best', not {choice!r}")
        if bits is not None and not 1 <= bits <= _LONGEST_BITS:
            raise CodingError(f"an index of {bits} bits cannot be searched: choose 1 to {_LONGEST_BITS}")
        self.fixed_length_bits = bits
        self.extra_bits = extra_bits if extra_bits is not None else _EXTRA_BITS[choice]
        self.choice = choice
        self.choice_seed = choice_seed

    def _bits(self, kl_nats: np.ndarray) -> int:
        if self.fixed_length_bits is not None:
            return self.fixed_length_bits
        return self._length(float(np.mean(kl_nats)) / NATS_PER_BIT)

    def _length(self, kl_bits: float) -> int:
        return int(np.clip(math.ceil(kl_bits + self.extra_bits), 1, _LONGEST_BITS))

    def settled(self, block_bits: float, total_bits: float) -> MinimalRandom:
        """See `Coder.settled`: the length of the index."""
        if self.fixed_length_bits is not None:
            return self
        return MinimalRandom(bits=self._length(block_bits), choice=self.choice, choice_seed=self.choice_seed)

    def _encode(self, scorer: Scorer) -> Codewords:
        bits = self._bits(scorer.kl_nats)
        entropy = [self.choice_seed, scorer.codebook.seed, scorer.tensor, *scorer.numbers[:1].tolist()]
        rng = torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        best = torch.full((scorer.count,), -torch.inf, dtype=torch.float32, device="cpu")
        at = torch.zeros(scorer.count, dtype=torch.int64, device="cpu")
        chosen = best.clone()
        for start, stop in chunks(1 << bits):
            for some in scorer.tiles(np.arange(scorer.count), stop - start):
                rows = torch.from_numpy(some)
                score = scorer.score(start, stop, some)
                # the largest of l + Gumbel noise is a draw in proportion to r (Gumbel-max)
                race = score - torch.empty_like(score).exponential_(generator=rng).log() if self.choice == "sample" else score
                top = race.amax(0)
                better = top > best[rows]
                if better.any():
                    first = race[:, better].argmax(0)
                    rows = rows[better]
                    best[rows], at[rows] = top[better], start + 1 + first
                    chosen[rows] = score[:, better].gather(0, first[None, :])[0]
        length = np.full(scorer.count, float(bits))
        return Codewords(at.numpy(), length, chosen.double().numpy(), np.zeros(scorer.count, bool), scorer.dimension, {"bits": bits})

    def expected_bits(self, mean, std, prior_std) -> np.ndarray:
        """See `Coder.expected_bits`: every index has the same length."""
        mean, std, prior_std = (as_tensor(v) for v in (mean, std, prior_std))
        kl_nats = Blocks.of(mean, std, prior_std).kl_nats().numpy()
        return np.full(len(kl_nats), float(self._bits(kl_nats)))

    def index_bits(self, index: np.ndarray) -> np.ndarray:
        """See `Coder.index_bits`."""
        return np.full(len(index), float(self.fixed_length_bits or int(index.max(initial=1)).bit_length()))

    def predict_bits(self, kl_bits: float) -> float:
        """See `Coder.predict_bits`: the length of an index, whatever the block's KL."""
        return float(self.fixed_length_bits) if self.fixed_length_bits else kl_bits + self.extra_bits
