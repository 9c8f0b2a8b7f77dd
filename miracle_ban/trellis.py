"""Frozen (format 1). The trellis code: which weights a step holds, where its bits lie, which values its state stands for.

The weights of a tensor are dealt into steps of `width` weights each. All tensors' steps share one stream of bits; a step
takes a few new bits, and its state is the last `memory` bits of the stream up to there. The state is the number of a row
of the shared codebook (`randomness.CODEBOOK` of stream 0): a sliding window over random numbers, as in trellis-coded
quantisation (Tseng et al. 2024, arXiv 2406.11235). So any step is decoded alone, from its window.

    columns   step u of T holds, for every j < width, weight j * T + (a u + b_j) mod T of the tensor, if there is one
    sign      one bit for each step; it turns all of the step's values
    bits      t steps of one tensor take floor(t * rate / 64) bits
    frames    the stream is 2^log2_frames frames; frame f holds the steps ceil(f T / F) .. ceil((f + 1) T / F) - 1 of
              each tensor in turn, so that all tensors can be coded side by side

Leans on numpy and `randomness` only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from . import randomness

RATE_UNIT = 64  # rates are in 1/64 bit
LARGEST_WIDTH = 256  # weights in a step
LARGEST_MEMORY = 20
LARGEST_STEP_BITS = 8
_GOLDEN = 2654435769  # 2^32 over the golden ratio
_PART = 1 << 14  # steps at once: they stay in the cache


@dataclass(frozen=True)
class Rate:
    """How one tensor of `count` weights is cut into steps: `width` weights and `rate` / 64 bits in each."""

    count: int
    width: int
    rate: int

    @classmethod
    def of(cls, count: int, bits: float) -> Rate:
        """The rate for about `bits` bits in all, at least one bit and at most eight in a step."""
        if not count:
            return cls(0, 1, RATE_UNIT)
        whole = min(max(round(bits), 1), LARGEST_STEP_BITS * count)
        width = min(-(-count // whole), LARGEST_WIDTH)
        steps = -(-count // width)
        rate = -(-RATE_UNIT * whole // steps)
        return cls(count, width, min(max(rate, RATE_UNIT), RATE_UNIT * LARGEST_STEP_BITS))

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return -(-self.count // self.width)

    @property
    def bits(self) -> int:
        """Bits that all steps take."""
        return self.bits_before(self.steps)

    def bits_before(self, step):
        """Bits that the first `step` steps take; integer or integer array."""
        return step * self.rate // RATE_UNIT

    def first_step(self, frame, log2_frames: int):
        """First step of a frame; integer or integer array."""
        return -((-frame * self.steps) >> log2_frames)


def multiplier(steps: int) -> int:
    """The `a` of the columns: the first number from T over the golden ratio on that has no factor in common with T."""
    a = max((steps * _GOLDEN) >> 32, 1)
    while math.gcd(a, steps) != 1:
        a += 1
    return a


def shifts(seed: int, tensor: int, rate: Rate) -> np.ndarray:
    """The `b_j` of the columns: int64 `[width]`, each below T."""
    drawn = randomness.words(seed, 0, np.arange(rate.width, dtype=np.int64), randomness.stream(tensor, randomness.ORDER), 1)[:, 0]
    return drawn.astype(np.int64) % rate.steps


def place(seed: int, tensor: int, rate: Rate, steps: np.ndarray) -> np.ndarray:
    """Positions of the weights of some steps in the tensor: int64 `[steps, width]`, -1 where there is none."""
    column = (multiplier(rate.steps) * np.asarray(steps, np.int64) % rate.steps)[:, None] + shifts(seed, tensor, rate)[None, :]
    column -= np.where(column >= rate.steps, rate.steps, 0)
    at = column + rate.steps * np.arange(rate.width, dtype=np.int64)[None, :]
    return np.where(at < rate.count, at, -1)


def signs(seed: int, tensor: int, first: int, stop: int) -> np.ndarray:
    """Sign bits of steps first .. stop - 1: uint8, 1 for minus. Step t has bit t mod 32 of word t / 32, four words a call."""
    calls = np.arange(first // 128, -(-stop // 128), dtype=np.int64)
    drawn = randomness.words(seed, 0, calls, randomness.stream(tensor, randomness.FLIPS), 4).astype("<u4")
    bits = np.unpackbits(drawn.view(np.uint8).ravel(), bitorder="little")
    skipped = first // 128 * 128
    return bits[first - skipped : stop - skipped]


def codebook(seed: int, states: np.ndarray, width: int) -> np.ndarray:
    """Rows of the codebook in units of the prior: float32 `[states, width]`, each value exact."""
    rows = randomness.normals(seed, states, 0, randomness.stream(0, randomness.CODEBOOK), width)
    return rows.astype(np.float32) * np.float32(randomness.NORMAL_UNIT)


def step_values(seed: int, tensor: int, rate: Rate, steps: np.ndarray, states: np.ndarray) -> np.ndarray:
    """What some steps stand for, in units of the prior: float32 `[steps, width]`."""
    if not len(steps):
        return np.zeros((0, rate.width), np.float32)
    first = int(steps.min())
    sign = signs(seed, tensor, first, int(steps.max()) + 1)[steps - first]
    values = codebook(seed, states, rate.width)
    return np.where(sign[:, None] == 1, -values, values)


def decode_steps(seed: int, tensor: int, rate: Rate, memory: int, words: np.ndarray, starts: np.ndarray, log2_frames: int) -> np.ndarray:
    """All weights of a tensor, in units of the prior: float32 `[count]`.

    Args:
        seed, tensor, rate, memory, log2_frames: of the code.
        words: the stream, from `words`.
        starts: the tensor's part of `first_bits`.
    """
    total = rate.steps
    offset = starts - rate.bits_before(rate.first_step(np.arange(1 << log2_frames, dtype=np.int64), log2_frames))
    few = total < 1 << memory
    every = np.arange(total if few else 1 << memory, dtype=np.int64)
    needed = states(words, rate, offset, log2_frames, memory, every) if few else every
    rows = codebook(seed, needed, rate.width)
    tables = [np.concatenate([rows[:, j], -rows[:, j]]) for j in range(rate.width)]
    sign, moved = signs(seed, tensor, 0, total), shifts(seed, tensor, rate).tolist()
    out = np.empty(rate.width * total, np.float32)
    for first, steps in _columns_to_steps(total):
        row = steps if few else states(words, rate, offset, log2_frames, memory, steps)
        at = row + len(rows) * sign[steps].astype(np.int64)
        for j, (table, shift) in enumerate(zip(tables, moved, strict=True)):
            column = first + shift - (total if first + shift >= total else 0)
            before_end = min(len(at), total - column)
            start = j * total + column
            np.take(table, at[:before_end], out=out[start : start + before_end], mode="clip")
            np.take(table, at[before_end:], out=out[j * total : j * total + len(at) - before_end], mode="clip")
    return out[: rate.count]


def _columns_to_steps(steps: int) -> Iterator[tuple[int, np.ndarray]]:
    """The step that holds column c where the shift is 0, c / a mod T: (first column, steps), part by part."""
    inverse = pow(multiplier(steps), -1, steps) if steps > 1 else 0
    row = inverse * np.arange(min(_PART, steps), dtype=np.int64) % steps
    for first in range(0, steps, _PART):
        part = row[: steps - first] + inverse * first % steps
        part -= steps * (part >= steps)
        yield first, part


def first_bits(rates: Sequence[Rate], log2_frames: int) -> Iterator[np.ndarray]:
    """Where in the stream each frame of a tensor begins, tensor after tensor: int64 `[frames]` each."""
    frames = np.arange((1 << log2_frames) + 1, dtype=np.int64)
    first = np.zeros(1 << log2_frames, np.int64)
    for r in rates:
        first += r.bits_before(r.first_step(frames[:-1], log2_frames))
    for r in rates:
        yield first
        first = first + np.diff(r.bits_before(r.first_step(frames, log2_frames)))


def words(bits: np.ndarray) -> np.ndarray:
    """32 bits of the stream from each byte on, four zero bytes put before it: uint32; `bits` is uint8 of 0 and 1."""
    padded = np.concatenate([np.zeros(4, np.uint8), np.packbits(bits), np.zeros(4, np.uint8)]).astype(np.uint32)
    return padded[:-3] << 24 | padded[1:-2] << 16 | padded[2:-1] << 8 | padded[3:]


def states(words: np.ndarray, rate: Rate, offset: np.ndarray, log2_frames: int, memory: int, steps: np.ndarray) -> np.ndarray:
    """The states after some steps of a tensor, the `memory` bits of the stream before there: uint32 `[steps]`.

    `offset` is, for each frame, where in the stream the tensor's bits would begin if the frame were all of it.
    """
    largest = max(rate.steps * rate.rate, rate.bits + int(np.abs(offset).max(initial=0)))
    width = np.int32 if largest < 1 << 30 else np.int64  # half the width is half the time
    end = rate.bits_before((steps + 1).astype(width))
    end = end + offset.astype(width)[(steps << log2_frames) // rate.steps if log2_frames else 0]
    start = end + (32 - memory)
    shift = (32 - memory - (start & 7)).astype(np.uint32)
    return (words[start >> 3] >> shift) & np.uint32((1 << memory) - 1)
