"""Minimal random code learning (Havasi et al. 2019, arXiv 1810.00440): one of 2^bits candidates, in exactly `bits` bits.

`choice="sample"` draws the candidate with probability proportional to its density ratio, as the paper does; `"best"`
takes the largest ratio, which loses the least (the ratio is the loss in units of beta).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..bits import NATS_PER_BIT
from ..errors import CodingError
from ..gaussian import Blocks
from .base import BlockCoder, Codebook, Codewords, Scorer, as_tensor, chunks

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
        rng = self._generator(scorer)
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

    def _generator(self, scorer: Scorer) -> torch.Generator:
        """The encoder's own randomness for one call."""
        entropy = [self.choice_seed, scorer.codebook.seed, scorer.tensor, *scorer.numbers[:1].tolist()]
        return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def encode_along(
        self,
        direction,
        log_ratio: Callable[[Tensor], Tensor],
        *,
        seed: int,
        tensor: int = 0,
        blocks=None,
        codebook: Codebook | None = None,
    ) -> Codewords:
        """Code one draw of each target that differs from the prior N(0, 1) along one direction only, such as a private mechanism's.

        Candidate x_k is chosen with probability in proportion to exp(log_ratio), or for "best" the largest is. The ratio is given
        the projections of all candidates of a block at once, so that it may also go by their ranks.

        Args:
            direction: `[blocks, d]`, numpy or torch.
            log_ratio: from the projections x_k . direction, `[2^bits, some of the blocks]`, to log density ratios in nats, of the
                same shape; a constant may be left out.
            seed, tensor, blocks, codebook: see `encode`; the prior's standard deviation is 1.

        Raises:
            CodingError: `bits` was not given to the coder, or the direction is not finite or not `[blocks, d]`.
        """
        if self.fixed_length_bits is None:
            raise CodingError("encode_along knows no KL to choose the length of an index by: give the coder `bits`")
        direction = torch.as_tensor(direction).detach().cpu().double()
        if direction.dim() != 2 or not bool(torch.isfinite(direction).all()):
            raise CodingError(f"direction must be [blocks, d] and finite, not of shape {tuple(direction.shape)}")
        numbers = np.arange(len(direction)) if blocks is None else np.asarray(blocks, np.int64)
        if codebook is None or codebook.seed != seed:
            codebook = Codebook(seed)
        length = np.full(len(direction), float(self.fixed_length_bits))
        at, value = np.ones(len(direction), np.int64), np.zeros(len(direction))
        if not direction.numel():
            return Codewords(at, length, value, np.zeros(len(at), bool), direction.shape[1])
        # under equal variances l is the projection less half of |direction|^2
        scorer = Scorer(Blocks(direction, torch.ones_like(direction)), codebook, tensor, numbers)
        rng, half = self._generator(scorer), 0.5 * direction.square().sum(1)
        for some in scorer.tiles(np.arange(scorer.count), 1 << self.fixed_length_bits):
            score = torch.cat([scorer.score(start, stop, some) for start, stop in chunks(1 << self.fixed_length_bits)])
            ratio = log_ratio(score + half[torch.from_numpy(some)].float()).double()
            race = ratio - torch.empty_like(ratio).exponential_(generator=rng).log() if self.choice == "sample" else ratio
            best = race.argmax(0)
            at[some], value[some] = best.numpy() + 1, ratio.gather(0, best[None, :])[0].numpy()
        return Codewords(at, length, value, np.zeros(len(at), bool), scorer.dimension, {"bits": self.fixed_length_bits})

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
