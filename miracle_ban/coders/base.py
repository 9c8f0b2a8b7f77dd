"""What all coders share: the protocol, the codewords, and scoring every block against one shared codebook.

Candidate k (from 1) of block b is row k - 1 of the codebook Z, its columns rotated and given signs by the block's own
shared randomness. Each block's candidates are thus exact independent draws from its prior, and the log density ratios of
all blocks and candidates are one product of the matrix [Z, Z^2].
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .. import randomness
from ..blocks import LARGEST_DIMENSION, LARGEST_PRIVATE_DIMENSION, candidate_values, codebook_block, codebook_stream
from ..errors import CodingError
from ..gaussian import Blocks

_CHUNK = 1 << 12  # most candidates in one matrix product
_TILE = 1 << 19  # scores in one matrix product
_CACHE_BYTES = 256 << 20
_PRIVATE_DRAWS = 1 << 19  # candidates drawn at once where each block has its own


@dataclass
class Codewords:
    """Coded blocks.

    Attributes:
        index: the candidate that each block is, from 1; int64 `[blocks]`.
        bits: bits that each takes in a file, the share of the index table included; float64 `[blocks]`.
        log_ratio_nats: log density ratio of the chosen candidates; float64 `[blocks]`.
        truncated: whether the search ended at its budget rather than by acceptance; bool `[blocks]`.
        dimension: weights of a block.
    """

    index: np.ndarray
    bits: np.ndarray
    log_ratio_nats: np.ndarray
    truncated: np.ndarray
    dimension: int
    info: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Looked:
    """Candidates that a search held against its rule, in its order; arrays `[n]`.

    Attributes:
        rows: the blocks.
        candidate: their numbers, from 1.
        time: of arrival; of rejection sampling the height u r_max that the density ratio is held against.
        log_ratio_nats: of the candidates.
        low, high: of branch and bound, the interval that each was drawn from, as quantiles of the prior.
    """

    rows: np.ndarray
    candidate: np.ndarray
    time: np.ndarray
    log_ratio_nats: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


class Coder(abc.ABC):
    """A relative entropy coder: encodes a draw of each row's posterior in a few bits, with shared randomness."""

    name: str
    fixed_length_bits: int | None = None  # of every codeword, where they are all of one length

    def settled(self, block_bits: float, total_bits: float) -> Coder:
        """This coder, with whatever it leaves open settled for blocks of that KL and a model of that KL, bits."""
        return self

    @abc.abstractmethod
    def encode(self, mean, std, prior_std, *, seed: int, tensor: int = 0, blocks=None, codebook: Codebook | None = None) -> Codewords:
        """Code one draw of every row, `[rows, d]`; see the subclasses."""

    @abc.abstractmethod
    def decode(self, codewords: Codewords, prior_std, *, seed: int, tensor: int = 0, blocks=None) -> np.ndarray:
        """The coded draws: float32 `[rows, d]`, bit for bit the same everywhere."""

    @abc.abstractmethod
    def expected_bits(self, mean, std, prior_std) -> np.ndarray:
        """Expected codeword length of each row without searching, bits, float64 `[rows]`."""

    @abc.abstractmethod
    def predict_bits(self, kl_bits: float) -> float:
        """About how long the codeword of a row with that KL is, bits: what training steers by."""


class BlockCoder(Coder):
    """A coder whose codewords are candidate numbers: one integer for each block."""

    largest_dimension = LARGEST_DIMENSION  # weights in one block
    trail: list[Looked] | None = None  # give it a list, and a rejection, GPRS or branch-and-bound search leaves there what it looks at

    def encode(self, mean, std, prior_std, *, seed: int, tensor: int = 0, blocks=None, codebook: Codebook | None = None) -> Codewords:
        """Code one draw of every block.

        Args:
            mean, std: posterior, `[blocks, d]`, numpy or torch.
            prior_std: prior standard deviation, broadcastable to `[blocks, d]`.
            seed: key of the shared randomness, 0 <= seed < 2^64.
            tensor: position of the tensor in its file.
            blocks: numbers of these blocks within the tensor; default 0, 1, 2, ...
            codebook: reuse one between calls to save generating it again.

        Raises:
            CodingError: an argument is NaN, infinite or not positive where it must be.
        """
        mean, std, prior_std = checked(mean, std, prior_std)
        count = mean.shape[0]
        numbers = np.arange(count) if blocks is None else np.asarray(blocks, np.int64)
        if codebook is None or codebook.seed != seed:
            codebook = Codebook(seed)
        if mean.shape[1] == 0 or count == 0:
            nothing = np.zeros(count)
            return Codewords(np.ones(count, np.int64), nothing, nothing, nothing.astype(bool), mean.shape[1])
        return self._encode(Scorer(Blocks.of(mean, std, prior_std), codebook, tensor, numbers))

    def decode(self, codewords: Codewords, prior_std, *, seed: int, tensor: int = 0, blocks=None) -> np.ndarray:
        """The coded draws: float32 `[blocks, d]`, bit for bit the same everywhere."""
        numbers = np.arange(len(codewords.index)) if blocks is None else np.asarray(blocks, np.int64)
        units = candidate_values(seed, tensor, numbers, codewords.index, codewords.dimension)
        return units * np.asarray(prior_std, np.float32)

    def shortened(self, bits: float) -> BlockCoder:
        """This coder, its codewords on average about `bits` shorter, for blocks that must fit what is left of a budget."""
        return self

    def _encode(self, scorer: Scorer) -> Codewords:
        raise NotImplementedError

    def _look(self, looked: Looked) -> None:
        if self.trail is not None:
            self.trail.append(looked)

    @abc.abstractmethod
    def index_bits(self, index: np.ndarray) -> np.ndarray:
        """About how long each of these indices is in a file that holds them all, bits, `[blocks]`."""


class Codebook:
    """Rows of the shared codebook Z for one seed and their squares, kept in memory up to 256 MiB."""

    def __init__(self, seed: int):
        self.seed = seed
        self._rows: dict[tuple[int, int, int], Tensor] = {}
        self._held = 0

    def features(self, start: int, stop: int, dimension: int) -> Tensor:
        """Candidates start .. stop - 1 (from 0) in units of the prior, and their squares: float32 `[n, 2 dimension]`."""
        key = (start, stop, dimension)
        if key not in self._rows:
            drawn = randomness.normals(self.seed, np.arange(start, stop), 0, randomness.stream(0, randomness.CODEBOOK), dimension)
            rows = torch.from_numpy(drawn.astype(np.float32)).mul_(randomness.NORMAL_UNIT)
            rows = torch.cat([rows, rows.square()], 1)
            if self._held + rows.nbytes > _CACHE_BYTES:
                return rows
            self._held += rows.nbytes
            self._rows[key] = rows
        return self._rows[key]


class Scorer:
    """Log density ratios of candidates under the blocks of one tensor."""

    def __init__(self, blocks: Blocks, codebook: Codebook, tensor: int, numbers: np.ndarray):
        self.blocks, self.codebook, self.tensor, self.numbers = blocks, codebook, tensor, numbers
        self.count, self.dimension = blocks.delta.shape
        self.kl_nats = blocks.kl_nats().numpy()
        const, linear, quadratic = blocks.coefficients()
        signs = torch.from_numpy(randomness.flips(codebook.seed, numbers, tensor, self.dimension).astype(np.float64))
        turn = torch.from_numpy(randomness.rotation(codebook.seed, numbers, tensor, self.dimension))
        source = (torch.arange(self.dimension, device="cpu")[None, :] + turn[:, None]) % self.dimension
        self._const = const.float()
        self._factors = torch.cat([torch.gather(linear * signs, 1, source), torch.gather(quadratic, 1, source)], 1).float()

    def tiles(self, rows: np.ndarray, candidates: int) -> list[np.ndarray]:
        """`rows` in parts whose scores of so many candidates stay in the cache."""
        step = max(32, _TILE // candidates)
        return [rows[i : i + step] for i in range(0, len(rows), step)]

    def score(self, start: int, stop: int, rows: np.ndarray) -> Tensor:
        """L of candidates start .. stop - 1 (from 0) for the blocks `rows`: float32 `[n, rows]`, nats."""
        if self.dimension <= LARGEST_PRIVATE_DIMENSION:
            return self._score_private(start, stop, rows)
        at = torch.from_numpy(rows)
        return torch.addmm(self._const[at], self.codebook.features(start, stop, self.dimension), self._factors[at].T)

    def _score_private(self, start: int, stop: int, rows: np.ndarray) -> Tensor:
        """As `score`, each block against candidates of its own."""
        candidates = np.arange(start, stop)
        stream = codebook_stream(self.tensor, self.dimension)
        columns = []
        step = max(1, _PRIVATE_DRAWS // (stop - start))
        for some in (rows[i : i + step] for i in range(0, len(rows), step)):
            own = codebook_block(self.numbers[some], self.dimension)
            z = randomness.normals(
                self.codebook.seed, np.tile(candidates, len(some)), np.repeat(own, len(candidates)), stream, self.dimension
            )
            x = torch.from_numpy(z.astype(np.float32)).mul_(randomness.NORMAL_UNIT).view(len(some), len(candidates), -1)
            at = torch.from_numpy(some)
            both = torch.cat([x, x.square()], 2)
            columns.append(torch.baddbmm(self._const[at, None, None], both, self._factors[at][:, :, None])[:, :, 0])
        return torch.cat(columns).T


def chunks(limit: int, first: int = 32) -> list[tuple[int, int]]:
    """Split 0 .. limit into stretches that double in length up to the largest chunk."""
    result, start, size = [], 0, first
    while start < limit:
        result.append((start, min(start + size, limit)))
        start += size
        size = min(start, _CHUNK)
    return result


def as_tensor(value) -> Tensor:
    """A tensor, array or number as float64 on the CPU, whatever torch's default device is."""
    return (value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))).cpu().double()


def checked(mean, std, prior_std) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior and prior as float64 tensors on the CPU.

    Raises:
        CodingError: wrong shapes, or a value that is NaN, infinite or not positive where it must be.
    """
    mean, std, prior_std = (as_tensor(v) for v in (mean, std, prior_std))
    if mean.dim() != 2 or mean.shape != std.shape:
        raise CodingError(f"mean and std must both be [blocks, d], not {tuple(mean.shape)} and {tuple(std.shape)}")
    try:
        torch.broadcast_to(prior_std, mean.shape)
    except RuntimeError:
        raise CodingError(f"prior_std of shape {tuple(prior_std.shape)} does not broadcast to {tuple(mean.shape)}") from None
    for what, value, positive in (("mean", mean, False), ("std", std, True), ("prior_std", prior_std, True)):
        good = torch.isfinite(value) & (value > 0) if positive else torch.isfinite(value)
        if not bool(good.all()):
            raise CodingError(f"{what} holds {int((~good).sum())} value(s) that are not finite{' and positive' if positive else ''}")
    return mean, std, prior_std
