"""Trellis coding: the path through a sliding-window random code whose draws have the largest density ratio.

The code is `miracle_ban.trellis`; this is its encoder, the Viterbi algorithm on the sum of log ratios over 2^memory states,
for many sequences side by side. The winner is no draw of the posterior but a sequence that is as good as one: with 2^12
states its mean log ratio is 0.91 bits for each bit that it takes, where one-block coders of the same work reach 0.7 to 0.8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import trellis
from ..bits import NATS_PER_BIT
from ..errors import CodingError
from ..gaussian import Blocks
from ..trellis import LARGEST_MEMORY, LARGEST_STEP_BITS, RATE_UNIT, Rate
from .base import Coder, Codewords, checked

SEGMENT = 16 * RATE_UNIT  # steps that are searched at once: a multiple of the rate's unit, so that all segments look alike
OVERLAP = 2 * RATE_UNIT  # steps after which a choice does not depend on what lies beyond
_SMALLEST_MEMORY, _LARGEST_MEMORY = 12, 16  # unless told otherwise
_LOG2_WORK = 36  # bits of the stream times states, up to which the memory is larger: minutes on two cores
_SCORES = 1 << 18  # scores in memory at once: they stay in the cache
_PATHS = 1 << 28  # backward pointers in memory at once
_ROWS_IN_CACHE = 1 << 17  # scores of one step for all sequences
# memory: bits of log ratio that a bit buys where the log ratio is that of a posterior's own draw; measured, matched Gaussians
_EFFICIENCY = {1: 0.5, 8: 0.85, 10: 0.885, 12: 0.912, 14: 0.928, 16: 0.941, 18: 0.952, 20: 0.96}


class Trellis(Coder):
    """Trellis coder: every row that it encodes is one sequence of its own.

    Args:
        memory: bits of the state, 8 to 20; work doubles with each. Default 16 up to 2^20 bits, falling to 12 from 2^24.
        bits_per_weight: rate; default what the rows' KL asks for.
    """

    name = "trellis"

    def __init__(self, *, memory: int | None = None, bits_per_weight: float | None = None):
        if memory is not None and not LARGEST_STEP_BITS <= memory <= LARGEST_MEMORY:
            raise CodingError(f"memory must be {LARGEST_STEP_BITS} to {LARGEST_MEMORY} bits, not {memory}")
        if bits_per_weight is not None and not 0 < bits_per_weight <= LARGEST_STEP_BITS:
            raise CodingError(f"bits_per_weight must be above 0 and at most {LARGEST_STEP_BITS}, not {bits_per_weight}")
        self.memory = memory
        self.bits_per_weight = bits_per_weight

    def settled(self, block_bits: float, total_bits: float) -> Trellis:
        """See `Coder.settled`: the memory."""
        fitting = _LOG2_WORK - math.ceil(math.log2(max(total_bits, 1.0)))
        memory = self.memory or min(max(fitting, _SMALLEST_MEMORY), _LARGEST_MEMORY)
        return Trellis(memory=memory, bits_per_weight=self.bits_per_weight)

    @property
    def efficiency(self) -> float:
        """KL bits that one bit of the stream carries."""
        return float(np.interp(self.memory or _SMALLEST_MEMORY, list(_EFFICIENCY), list(_EFFICIENCY.values())))

    def rate(self, count: int, kl_bits: float) -> Rate:
        """The rate of `count` weights with that KL together."""
        bits = kl_bits / self.efficiency if self.bits_per_weight is None else count * self.bits_per_weight
        return Rate.of(count, bits)

    def encode(self, mean, std, prior_std, *, seed: int, tensor: int = 0, blocks=None, codebook=None) -> Codewords:
        """See `Coder.encode`; row i is coded as tensor `tensor + blocks[i]`, its `index` is its bits: uint8 `[rows, bits]`."""
        mean, std, prior_std = checked(mean, std, prior_std)
        rows, count = mean.shape
        numbers = np.arange(rows) if blocks is None else np.asarray(blocks, np.int64)
        if not rows or not count:
            return Codewords(np.zeros((rows, 0), np.uint8), np.zeros(rows), np.zeros(rows), np.zeros(rows, bool), count)
        kl_bits = float(Blocks.of(mean, std, prior_std).kl_nats().mean()) / NATS_PER_BIT
        coder = self.settled(kl_bits, rows * kl_bits)
        rate = coder.rate(count, kl_bits)
        features = Features(seed, int(coder.memory or 0))
        prior_std = torch.broadcast_to(prior_std, mean.shape)
        bits, log_ratio = [], []
        for i, number in enumerate(numbers.tolist()):
            law = StepLaw(features, tensor + number, rate, mean[i], std[i], prior_std[i])
            states, value = best_path(law)
            bits.append(path_bits(law, states))
            log_ratio.append(value)
        length = np.full(rows, float(rate.bits))
        return Codewords(np.stack(bits), length, np.array(log_ratio), np.zeros(rows, bool), count, {"rate": rate, "memory": coder.memory})

    def decode(self, codewords: Codewords, prior_std, *, seed: int, tensor: int = 0, blocks=None) -> np.ndarray:
        """See `Coder.decode`."""
        bits = np.asarray(codewords.index, np.uint8)
        numbers = np.arange(len(bits)) if blocks is None else np.asarray(blocks, np.int64)
        if not bits.size:
            return np.zeros((len(bits), codewords.dimension), np.float32)
        rate, memory = codewords.info["rate"], codewords.info["memory"]
        rows = [
            trellis.decode_steps(seed, tensor + number, rate, memory, trellis.words(own), np.zeros(1, np.int64), 0)
            for number, own in zip(numbers.tolist(), bits, strict=True)
        ]
        return np.stack(rows) * np.asarray(prior_std, np.float32)

    def expected_bits(self, mean, std, prior_std) -> np.ndarray:
        """See `Coder.expected_bits`: the length is fixed before the search."""
        mean, std, prior_std = checked(mean, std, prior_std)
        rows, count = mean.shape
        if not rows or not count:
            return np.zeros(rows)
        kl_bits = float(Blocks.of(mean, std, prior_std).kl_nats().mean()) / NATS_PER_BIT
        return np.full(rows, float(self.settled(kl_bits, rows * kl_bits).rate(count, kl_bits).bits))

    def predict_bits(self, kl_bits: float) -> float:
        """See `Coder.predict_bits`."""
        return kl_bits / self.efficiency


class Features:
    """What scores the codebook's rows: for each width V the rows' first V values and their squares, `[2 V, 2^memory]`."""

    def __init__(self, seed: int, memory: int, device: torch.device | str = "cpu"):
        self.seed, self.memory, self.device = seed, memory, device
        self._held: dict[int, Tensor] = {}

    def __getitem__(self, width: int) -> Tensor:
        if width not in self._held:
            rows = torch.from_numpy(trellis.codebook(self.seed, np.arange(1 << self.memory), width)).to(self.device)
            self._held[width] = torch.cat([rows, rows.square()], 1).T.contiguous()
        return self._held[width]


class StepLaw:
    """Log ratios of the codebook's rows at the steps of one tensor.

    Args:
        features: of the codebook.
        tensor, rate: of the code.
        mean, std, prior_std: posterior and prior of the tensor's weights, flat, `[count]`.
    """

    def __init__(self, features: Features, tensor: int, rate: Rate, mean: Tensor, std: Tensor, prior_std: Tensor):
        self.features, self.seed, self.memory, self.tensor, self.rate = features, features.seed, features.memory, tensor, rate
        whole = Blocks.of(mean[None], std[None], prior_std[None])
        self._const, self._linear, self._quadratic = (v[0].float().to(features.device) for v in whole.coefficients_by_weight())

    def coefficients(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of steps first .. stop - 1: constant `[steps]` and the factors of the features `[steps, 2 width]`."""
        steps = np.arange(first, stop)
        place = torch.from_numpy(trellis.place(self.seed, self.tensor, self.rate, steps)).to(self.features.device)
        sign = torch.from_numpy(1.0 - 2.0 * trellis.signs(self.seed, self.tensor, first, stop)).to(self.features.device).float()
        inside, at = place >= 0, place.clamp_min(0)
        const, linear, quadratic = (torch.where(inside, v[at], 0.0) for v in (self._const, self._linear, self._quadratic))
        return const.sum(1), torch.cat([linear * sign[:, None], quadratic], 1)

    def scores(self, const: Tensor, factors: Tensor) -> Tensor:
        """Log ratios of all rows at some steps, nats: float32 `[steps, states]`."""
        with torch.autocast(factors.device.type, enabled=False):  # the caller's training may be in bfloat16, too coarse for a search
            return torch.addmm(const[:, None], factors, self.features[self.rate.width])


def step_bits(rate: Rate, first: int, stop: int) -> list[int]:
    """New bits of each of the steps first .. stop - 1."""
    return np.diff(rate.bits_before(np.arange(first, stop + 1))).tolist()


def viterbi(
    scores: Callable[[int, int], Tensor], new_bits: list[int], sequences: int, memory: int, start: Tensor | None, end: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best path of each sequence.

    Args:
        scores: `scores(i, j)` gives the log ratios at steps i .. j - 1, `[j - i, sequences, 2^memory]`.
        new_bits: of each step.
        sequences: how many are searched side by side.
        memory: bits of a state.
        start: state before the first step, `[sequences]`; None leaves it free.
        end: state after the last step, `[sequences]`; None leaves it free.

    Returns:
        States after each step, int64 `[steps, sequences]`, and the paths' log ratios, `[sequences]`.
    """
    size = 1 << memory
    chunk = max(1, _SCORES // (sequences * size))
    first = scores(0, min(chunk, len(new_bits)))
    device = first.device
    if start is None:
        total = torch.zeros(sequences, size, dtype=first.dtype, device=device)
    else:
        total = torch.full((sequences, size), -torch.inf, dtype=first.dtype, device=device).scatter_(1, start[:, None].to(device), 0.0)
    back: list[Tensor] = []
    for i in range(0, len(new_bits), chunk):
        block = first if i == 0 else scores(i, min(i + chunk, len(new_bits)))
        for j, k in enumerate(new_bits[i : i + chunk]):
            before = total.view(sequences, 1 << k, size >> k)
            if k == 0:
                best, came = before[:, 0], torch.zeros(0, dtype=torch.uint8, device=device)
            elif k == 1:
                best, came = torch.maximum(before[:, 0], before[:, 1]), before[:, 1] > before[:, 0]
            elif k == 2 and device.type == "cpu":
                best, came = _best_of_four(before)
            else:
                best, at = before.max(1)
                came = at.to(torch.uint8)
            back.append(came)
            step = block[j].view(sequences, size >> k, 1 << k)
            total = torch.add(best[:, :, None], step, out=step).view(sequences, size)
    last = total.argmax(1) if end is None else end.to(device)
    value = total.gather(1, last[:, None])[:, 0]
    states = torch.empty(len(new_bits), sequences, dtype=torch.int64, device=device)
    for t in range(len(new_bits) - 1, -1, -1):
        states[t], k = last, new_bits[t]
        group = last >> k
        last = group if k == 0 else group | back[t].gather(1, group[:, None])[:, 0].to(torch.int64) << (memory - k)
    return states, value


def _best_of_four(values: Tensor) -> tuple[Tensor, Tensor]:
    """What `max` gives of `[sequences, 4, n]` along the middle axis, the places as uint8, in a third of its time on a CPU.

    Of eight and more it would not be faster on two cores.
    """
    later, pairs = (values[:, 1::2] > values[:, 0::2]).view(torch.uint8), torch.maximum(values[:, 0::2], values[:, 1::2])
    last = (pairs[:, 1] > pairs[:, 0]).view(torch.uint8)
    own = later[:, 0] ^ ((later[:, 0] ^ later[:, 1]) & last)  # `where`, which is slow
    return torch.maximum(pairs[:, 0], pairs[:, 1]), own | last << 1


def best_path(
    law: StepLaw, start: int = 0, first: int = 0, stop: int | None = None, spread: Callable[..., Iterable[Any]] = map
) -> tuple[np.ndarray, float]:
    """States of the steps first .. stop - 1 of one tensor, int64 `[steps]`, and the log ratio of the path, nats.

    A long sequence is cut into segments that are searched side by side. The states at the cuts are chosen beforehand, each
    by a search of its neighbourhood; so far from the ends a path no longer depends on them. `spread` maps a function over independent
    searches, perhaps by several processes.
    """
    memory, stop = law.memory, law.rate.steps if stop is None else stop
    cuts = list(range(first + SEGMENT, stop - SEGMENT // 2, SEGMENT))
    side = max(1, min(_ROWS_IN_CACHE >> memory, _PATHS // (SEGMENT << memory)))  # segments that are best searched at once

    def joints(some: list[int]) -> list[int]:
        states, _ = search(law, [c - OVERLAP for c in some], 2 * OVERLAP, None, None)
        return states[OVERLAP - 1].tolist()

    at_cuts = [state for found in spread(joints, [cuts[i : i + side] for i in range(0, len(cuts), side)]) for state in found]
    begins, before = [first, *cuts], [start, *at_cuts]

    def segments(i: int) -> tuple[np.ndarray, float]:
        if i == len(cuts):  # what is left, whose end is free
            states, ratio = search(law, begins[-1:], stop - begins[-1], torch.tensor(before[-1:], device="cpu"), None)
        else:
            given, wanted = (torch.tensor(b[:side], device="cpu") for b in (before[i:-1], before[i + 1 :]))
            states, ratio = search(law, begins[i:-1][:side], SEGMENT, given, wanted)
        return states.T.flatten().cpu().numpy(), float(ratio.double().sum())

    paths, values = zip(*spread(segments, [*range(0, len(cuts), side), len(cuts)]), strict=True)
    return np.concatenate(paths), sum(values)


def search(law: StepLaw, first: list[int], steps: int, start: Tensor | None, end: Tensor | None) -> tuple[Tensor, Tensor]:
    """`viterbi` for `steps` steps from each of the steps `first`, side by side; all have the same pattern of new bits."""
    parts = [law.coefficients(f, f + steps) for f in first]
    const = torch.stack([p[0] for p in parts], 1)
    factors = torch.stack([p[1] for p in parts], 1)

    def scores(i: int, j: int) -> Tensor:
        return law.scores(const[i:j].flatten(), factors[i:j].flatten(0, 1)).view(j - i, len(first), -1)

    return viterbi(scores, step_bits(law.rate, first[0], first[0] + steps), len(first), law.memory, start, end)


def in_turn(run: Sequence[tuple[StepLaw, int, int]]) -> Callable[[int, int], Tensor]:
    """What `viterbi` asks of one sequence through several tensors: of each the steps from the first to before the second number."""
    parts = [law.coefficients(first, stop) for law, first, stop in run]
    edges = np.cumsum([0, *(stop - first for _, first, stop in run)]).tolist()

    def scores(begin: int, end: int) -> Tensor:
        found = []
        for (law, _, _), (const, factors), at, until in zip(run, parts, edges[:-1], edges[1:], strict=True):
            a, b = max(begin, at) - at, min(end, until) - at
            if a < b:
                found.append(law.scores(const[a:b], factors[a:b]))
        return torch.cat(found)[:, None, :]

    return scores


def path_bits(law: StepLaw, states: np.ndarray, first: int = 0) -> np.ndarray:
    """The bits that lead through `states`, the states of the steps from `first` on: uint8."""
    return emitted_bits(states, np.array(step_bits(law.rate, first, first + len(states)), np.int64))


def emitted_bits(states: np.ndarray, new_bits: np.ndarray) -> np.ndarray:
    """The lowest `new_bits` bits of each state, highest first: uint8."""
    shift = new_bits[:, None] - 1 - np.arange(int(new_bits.max(initial=0)))[None, :]
    return ((states[:, None] >> np.maximum(shift, 0)) & 1)[shift >= 0].astype(np.uint8)
