"""Packaging by blocks: every tensor is dealt into blocks, each block gets an index; those of largest KL go first.

What the codewords of the waiting blocks will take is only expected, not known; the last blocks are coded again, with a
shorter search, where the file would not fit its budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from . import distributed
from .bits import NATS_PER_BIT
from .blocks import layout
from .coders.base import BlockCoder, Codebook
from .container import Archive
from .gaussian import Blocks
from .layers import Posterior, posteriors
from .packing import Goal, Packing, gather, live_positions
from .plan import kl_bits_by_tensor, num_blocks, predicted_index_bits

_WAITING, _NOTHING = 0, -1  # in place of the number of a round: not coded yet, and no weight to code
_SEARCHED_AT_ONCE = 4096  # blocks of one tensor, by one process
_LONGEST_SEARCH = 64.0  # bits of KL, where its work is estimated
_OVERHEAD_SLOPE = -0.25  # bits of overhead for each bit of KL that a block has more than the others: measured with GPRS


@dataclass
class TensorBlocks:
    """The blocks of one tensor while they are coded."""

    number: int
    posterior: Posterior
    place: np.ndarray  # [blocks, d] positions in the flattened live tensor, -1 where a block is short
    index: np.ndarray
    turn: np.ndarray  # the round in which each was coded, from 1
    kl_bits: np.ndarray  # at the time of coding
    log2_ratio: np.ndarray

    @property
    def coded(self) -> np.ndarray:
        """Which blocks are coded."""
        return self.turn != _WAITING


class BlockPacking(Packing):
    """See the module.

    Args:
        model: with its priors frozen.
        archive: its skeleton.
        coder: settled.
        block_bits: KL of one block.
        goal_bits: for all codewords; None if there is no budget.
        rounds: how many times `code_round` is going to be called.
        saved: `state()` of an interrupted packaging.
    """

    unit = "block"

    def __init__(
        self,
        model: nn.Module,
        archive: Archive,
        coder: BlockCoder,
        *,
        block_bits: float,
        goal_bits: float | None,
        rounds: int,
        saved: dict[str, Any] | None,
    ):
        self.coder, self.seed, self.codebook = coder, archive.seed, Codebook(archive.seed)
        if goal_bits is not None and coder.fixed_length_bits is not None and saved is None:
            block_bits = _affordable_block_bits(model, coder, block_bits, goal_bits)
        self.block_bits = block_bits if saved is None else saved["block_bits"]
        self.turn = 0  # rounds so far
        self.tensors = [self._divide(model, archive, i, saved) for i, r in enumerate(archive.records) if r.kind == "coded"]
        self._by_number = {t.number: t for t in self.tensors}
        self.total = sum(len(t.index) for t in self.tensors)
        if goal_bits is not None:
            # the last round cannot be corrected: keep back what its codewords may vary by
            goal_bits -= 10.0 * math.sqrt(self.total / rounds)
        self.goal_bits = goal_bits

    def _divide(self, model: nn.Module, archive: Archive, number: int, saved: dict[str, Any] | None) -> TensorBlocks:
        """Partition one tensor; where packaging resumes, as it was."""
        p = posteriors(model)[str(archive.records[number].name)]
        free = live_positions(archive, number, p)
        if saved is not None:
            blocks = len(saved["tensors"][number]["index"])
        else:
            with torch.no_grad():
                blocks = num_blocks(float(p.kl()) / NATS_PER_BIT, len(free), self.block_bits, self.coder.largest_dimension)
        place = layout(self.seed, number, len(free), blocks)
        place = np.where(place >= 0, free[place] if len(free) else place, -1)
        zeros = np.zeros(blocks)
        turn = np.full(blocks, _WAITING if len(free) else _NOTHING)
        return TensorBlocks(number, p, place, np.ones(blocks, np.int64), turn, zeros.copy(), zeros.copy())

    @property
    def num_coded(self) -> int:
        """Blocks coded so far."""
        return sum(int(t.coded.sum()) for t in self.tensors)

    def code_round(self, rounds_left: int) -> None:
        """See `Packing.code_round`: the blocks of largest KL."""
        coder = self.coder if self.goal_bits is None else self.coder.shortened(self._bits_over_per_block(self.goal_bits))
        self._code(coder, -(-(self.total - self.num_coded) // rounds_left))

    def _code(self, coder: BlockCoder, count: int) -> None:
        waiting: list[tuple[float, int, int]] = []
        for t in self.tensors:
            rows = np.flatnonzero(~t.coded)
            if len(rows):
                kl_bits = Blocks.of(*gather(t.posterior, t.place[rows])).kl_nats().numpy() / NATS_PER_BIT
                waiting.extend((-float(bits), t.number, int(row)) for bits, row in zip(kl_bits, rows, strict=True))
        self.turn += 1
        parts: list[tuple[TensorBlocks, np.ndarray]] = []
        work: list[float] = []
        for number, own in itertools.groupby(sorted(sorted(waiting)[:count], key=lambda w: w[1:]), key=lambda w: w[1]):
            t, blocks = self._by_number[number], list(own)
            for i in range(0, len(blocks), _SEARCHED_AT_ONCE):
                some = blocks[i : i + _SEARCHED_AT_ONCE]
                parts.append((t, np.array([row for _, _, row in some], np.int64)))
                work.append(sum(2.0 ** min(-negative, _LONGEST_SEARCH) for negative, _, _ in some) * t.place.shape[1])

        def search(part: tuple[TensorBlocks, np.ndarray]) -> tuple[np.ndarray, ...]:
            t, rows = part
            mean, std, prior = gather(t.posterior, t.place[rows])
            words = coder.encode(mean, std, prior, seed=self.seed, tensor=t.number, blocks=rows, codebook=self.codebook)
            values = coder.decode(words, prior.numpy(), seed=self.seed, tensor=t.number, blocks=rows)
            return words.index, values, Blocks.of(mean, std, prior).kl_nats().numpy(), words.log_ratio_nats

        for (t, rows), (index, values, kl_nats, log_ratio_nats) in zip(parts, distributed.spread(search, parts, work), strict=True):
            inside = t.place[rows] >= 0
            t.posterior.fix(torch.from_numpy(t.place[rows][inside]), torch.from_numpy(values[inside]))
            t.index[rows], t.turn[rows] = index, self.turn
            t.kl_bits[rows], t.log2_ratio[rows] = kl_nats / NATS_PER_BIT, log_ratio_nats / NATS_PER_BIT

    def _code_again(self, depth: int, coder: BlockCoder) -> None:
        """Code the blocks of the latest `depth` rounds once more, with another coder, in one round."""
        self.turn = max(self.turn - depth, 0)
        count = 0
        for t in self.tensors:
            rows = np.flatnonzero(t.turn > self.turn)
            places = t.place[rows]
            t.posterior.release(torch.from_numpy(places[places >= 0]))
            t.turn[rows] = _WAITING
            count += len(rows)
        self._code(coder, count)

    def _coded(self, key: str) -> np.ndarray:
        return np.concatenate([getattr(t, key)[t.coded] for t in self.tensors])

    def spent_bits(self) -> float:
        """See `Packing.spent_bits`."""
        return float(self.coder.index_bits(self._coded("index")).sum())

    def goals(self) -> list[Goal]:
        """See `Packing.goals`: one for all tensors together.

        With codewords of fixed length there is nothing to save: each block is to have the KL that its codeword can carry.
        """
        kl_bits = self._waiting_kl_bits()
        names = tuple(t.posterior.name for t in self.tensors)
        if self.coder.fixed_length_bits is not None:
            return [Goal(names, 0.0, len(kl_bits) * self.block_bits)]
        if self.goal_bits is None:
            return []
        left = max(self.goal_bits - self.spent_bits(), float(len(kl_bits)))
        return [Goal(names, self._expected_overhead(kl_bits), left)]

    def _waiting_kl_bits(self) -> np.ndarray:
        """KL of every block not coded yet, bits."""
        rows = [(t, np.flatnonzero(~t.coded)) for t in self.tensors]
        return np.concatenate([Blocks.of(*gather(t.posterior, t.place[r])).kl_nats().numpy() / NATS_PER_BIT for t, r in rows if len(r)])

    def _expected_overhead(self, waiting_kl_bits: np.ndarray) -> float:
        """Bits over their KL that the codewords of the waiting blocks will take, together.

        A straight line in a block's KL, fitted to the blocks coded so far by ridge regression towards the coder's own
        prediction: in one index table, blocks of small KL cost more over their KL than those of large KL.
        """
        middle = self.block_bits
        prior = np.array([self.coder.predict_bits(middle) - middle, _OVERHEAD_SLOPE])
        kl_bits = self._coded("kl_bits")
        design = np.stack([np.ones_like(kl_bits), kl_bits - middle], 1)
        over = self.coder.index_bits(self._coded("index")) - kl_bits
        weight = np.diag([20.0, 20.0 * 16.0])  # as much as 20 blocks whose KL varies by 4 bits
        line = np.linalg.solve(design.T @ design + weight, design.T @ over + weight @ prior)
        return float(np.maximum(line[0] + line[1] * (waiting_kl_bits - middle), 0.0).sum())

    def _bits_over_per_block(self, goal_bits: float) -> float:
        """By how much the codewords of the waiting blocks must be shorter than expected, each, for the budget to be met."""
        kl_bits = self._waiting_kl_bits()
        expected = kl_bits.sum() + self._expected_overhead(kl_bits)
        return (expected - (goal_bits - self.spent_bits())) / len(kl_bits)

    def finish(self, archive: Archive) -> int:
        """See `Packing.finish`."""
        for t in self.tensors:
            archive.records[t.number].index = t.index
        return archive.size_bytes

    def shorten(self, archive: Archive, fits: Callable[[int], bool]) -> int:
        """Code the latest blocks again, shorter and shorter, until the file fits; returns its size, bytes."""
        size = self.finish(archive)
        for depth, shortening in itertools.product((1, 4, self.total), np.arange(0.5, 5.1, 0.5)):
            if fits(size):
                break
            self._code_again(depth, self.coder.shortened(float(shortening)))
            size = self.finish(archive)
        return size

    def account(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Packing.account`."""
        return self._coded("kl_bits"), self._coded("log2_ratio")

    def state(self) -> dict[str, Any]:
        """See `Packing.state`."""
        kept = {t.number: {k: torch.from_numpy(getattr(t, k).copy()) for k in _KEPT} for t in self.tensors}
        return {"block_bits": self.block_bits, "tensors": kept}

    def restore(self, saved: dict[str, Any]) -> None:
        """See `Packing.restore`."""
        for t in self.tensors:
            for key in _KEPT:
                setattr(t, key, saved["tensors"][t.number][key].numpy())
        self.turn = max((int(t.turn.max()) for t in self.tensors), default=0)


_KEPT = ("index", "turn", "kl_bits", "log2_ratio")


def _affordable_block_bits(model: nn.Module, coder: BlockCoder, block_bits: float, goal_bits: float) -> float:
    """With codewords of fixed length: the KL of a block, raised until there are no more blocks than codewords can be paid for."""
    kl_bits = kl_bits_by_tensor(model)
    counts = {name: p.mean.numel() for name, p in posteriors(model).items()}
    while block_bits < 1e6 and predicted_index_bits(kl_bits, counts, coder, block_bits) > goal_bits:
        block_bits *= 1.01
    return block_bits
