"""Messages that are epsilon-locally private: an update of length one as floats, as bytes, or as the index of a shared candidate.

"float32" and "8 bits" send PrivUnitG (Asi, Feldman and Talwar 2022, after Bhowmick et al. 2018, arXiv 1812.00984): a draw of N(0, I),
tilted so that with probability p it lies in the half-space {z . u >= g}. "index" sends the number of one of 2^b shared candidates by
minimal random coding, as Shah et al. 2022 (arXiv 2111.00092), under a target of two levels that goes by rank: the `near` candidates
furthest along u weigh exp(epsilon) times as much as any other (as in Isik et al. 2023). As 2^b grows this is PrivUnitG.

Why the index is private. The candidates come from the public seed. Given them, every index has probability exp(epsilon) / c or 1 / c,
where c = near exp(epsilon) + 2^b - near is the same for every u: so the ratio under two updates is at most exp(epsilon), for each
value of the shared randomness; seed, index and all that a server makes of them are epsilon-private together. This is not so of every code:
with PrivUnitG's own half-space, c depends on how many candidates lie in it, and minimal random coding only keeps 2 epsilon; and the index
of an exact sampler together with the shared randomness may tell all, although its draw alone is epsilon-private: rejection sampling
always accepts a candidate in the half-space, so an index after such a candidate rules out u. `audit` computes all three.
Composition: messages of different clients concern different data; k messages of one client are k epsilon-private, or (epsilon', 1e-5) by
the optimal composition of Kairouz, Oh and Viswanath 2015. Real clients must take their own randomness from the system, not from a seed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import integrate, optimize, stats
from torch import Tensor

from miracle_ban import coders
from miracle_ban.bits import BitReader, BitWriter
from miracle_ban.coders.base import Codebook

PUBLIC_SEED = 2022  # of the candidates, known to everybody


def likely(epsilon: float, share: float) -> float:
    """Probability of a set of prior probability `share` whose every element is exp(epsilon) times as likely as others."""
    return math.exp(epsilon) * share / (math.exp(epsilon) * share + 1.0 - share)


def half_space(epsilon: float) -> tuple[float, float]:
    """PrivUnitG at its best: the prior probability of its half-space, and E[z . u], by which draws are divided to be unbiased."""

    def pull(log_share: float) -> float:
        share = math.exp(log_share)
        return (likely(epsilon, share) - share) * stats.norm.pdf(stats.norm.isf(share)) / (share * (1.0 - share))

    best = optimize.minimize_scalar(lambda v: -pull(v), bounds=(-15.0, math.log(0.5)), method="bounded").x
    return math.exp(best), pull(best)


def nearest(epsilon: float, bits: int) -> tuple[int, float]:
    """The same for ranks among 2^bits candidates: how many are near, and E[z . u] from the law of order statistics."""
    n, z = 1 << bits, np.linspace(-9.0, 9.0, 6001)

    def pull(near: int) -> float:
        inside = stats.binom.cdf(near - 1, n - 1, stats.norm.sf(z))  # at most near - 1 others are further along u
        mean = n / near * integrate.trapezoid(z * stats.norm.pdf(z) * inside, z)
        return (likely(epsilon, near / n) - near / n) / (1.0 - near / n) * mean

    best = max(np.unique(np.geomspace(1, n // 2, 60).astype(int)), key=pull)
    return int(best), pull(best)


def by_rank(along: Tensor, near: int, epsilon: float) -> Tensor:
    """Log density ratios (up to a constant) of candidates by their projections, `[candidates, clients]`: epsilon for the nearest."""
    return torch.zeros_like(along).scatter_(0, along.topk(near, 0).indices, epsilon)


def composed(epsilon: float, times: int, delta: float) -> float:
    """Smallest epsilon' so that `times` messages are (epsilon', delta)-private together (Kairouz, Oh and Viswanath 2015, theorem 3.3)."""
    best = times * epsilon
    for i in range(times // 2 + 1):
        terms = (math.comb(times, j) * (math.exp((times - j) * epsilon) - math.exp((times - 2 * i + j) * epsilon)) for j in range(i))
        if sum(terms) / (1.0 + math.exp(epsilon)) ** times <= delta:
            best = min(best, (times - 2 * i) * epsilon)
    return best


def audit(epsilon: float, bits: int, dimension: int = 16, updates: int = 400) -> dict[str, float | None]:
    """Largest |ln ratio| of the law of the index, given the shared candidates, between any two of many updates, for three codes.

    None: unbounded.
    """
    n = 1 << bits
    coder = coders.get("minimal-random", bits=bits)
    every = coders.Codewords(np.arange(1, n + 1), np.zeros(n), np.zeros(n), np.zeros(n, bool), dimension)
    shared = torch.from_numpy(coder.decode(every, 1.0, seed=PUBLIC_SEED, blocks=np.zeros(n, np.int64))).double()
    along = shared @ F.normalize(torch.randn(updates, dimension, generator=torch.Generator().manual_seed(0)).double()).T
    ratio = torch.where(along >= stats.norm.isf(half_space(epsilon)[0]), 0.0, -epsilon)  # of PrivUnitG, against its largest
    refused = torch.log1p(-ratio.exp()).cumsum(0)
    laws = {
        "index": by_rank(along, nearest(epsilon, bits)[0], epsilon).log_softmax(0),
        "minimal random coding": ratio.log_softmax(0),
        "rejection sampling": ratio + torch.cat([torch.zeros(1, updates), refused[:-1]]),
    }
    largest = {name: float((law.amax(1) - law.amin(1)).nan_to_num(0.0, torch.inf).max()) for name, law in laws.items()}
    return {name: v if math.isfinite(v) else None for name, v in largest.items()}


class Channel:
    """One way to send updates: `pack` at the host, `unpack` at the server; updates `[n, d]` of length one."""

    def __init__(self, how: str, epsilon: float, bits: int, length: int, secret: int, public: int = PUBLIC_SEED):
        self.how, self.epsilon, self.bits, self.length = how, epsilon, bits, length
        self.rng = np.random.default_rng(secret)
        self.coder = coders.get("minimal-random", bits=bits, choice_seed=secret)
        self.codebook = Codebook(public)
        self.share, self.pull = half_space(epsilon)
        if how == "index":
            self.near, self.pull = nearest(epsilon, bits)

    def pack(self, updates: Tensor, numbers: np.ndarray) -> bytes:
        """The messages of these clients; `numbers` name their shared randomness."""
        if self.how == "index":
            words = self.coder.encode_along(
                updates,
                lambda along: by_rank(along, self.near, self.epsilon),
                seed=self.codebook.seed,
                blocks=numbers,
                codebook=self.codebook,
            )
            out = BitWriter()
            out.write_many(words.index - 1, np.full(len(numbers), self.bits))
            return out.to_bytes()
        u = updates.numpy()
        z = u if self.how == "no privacy" else self._private(u)
        if self.how != "8 bits":
            return z.astype("<f4").tobytes()
        scale = (np.abs(z).max(1, keepdims=True) / 127.0).astype("<f4")
        steps = np.floor(z / scale + self.rng.random(z.shape)).clip(-127, 127).astype(np.int8)
        return scale.tobytes() + steps.tobytes()

    def _private(self, u: np.ndarray) -> np.ndarray:
        """Draws of PrivUnitG."""
        z, level = self.rng.standard_normal(u.shape), self.rng.random(len(u))
        inside = self.rng.random(len(u)) < likely(self.epsilon, self.share)
        along = np.where(inside, stats.norm.isf(level * self.share), stats.norm.ppf(level * (1.0 - self.share)))
        return z + (along - (z * u).sum(1))[:, None] * u

    def unpack(self, data: bytes, numbers: np.ndarray) -> np.ndarray:
        """Unbiased estimates of the updates."""
        n = len(numbers)
        if self.how == "index":
            index = BitReader(data).read_many(np.full(n, self.bits), "the indices") + 1
            z = self.coder.decode(
                coders.Codewords(index, index, index, index > 0, self.length), 1.0, seed=self.codebook.seed, blocks=numbers
            )
        elif self.how == "8 bits":
            z = np.frombuffer(data, "<f4", n)[:, None] * np.frombuffer(data, np.int8, offset=4 * n).reshape(n, self.length)
        else:
            z = np.frombuffer(data, "<f4").reshape(n, self.length)
        return z if self.how == "no privacy" else z / self.pull
