"""Codes of real vectors as real files: scalar quantisation (rounded, with private noise, dithered) and the library's coders.

All need the law of the values alone: N(0, scale^2). See `realism` for what they are compared on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import constriction
import numpy as np
from scipy.special import ndtr, ndtri
from tqdm import tqdm

from miracle_ban import coders, randomness
from miracle_ban.bits import BitReader, BitWriter, HuffmanTable
from miracle_ban.container import octaves
from miracle_ban.trellis import Rate

SHARED_SEED, FARTHEST = 7, 400
CODES = ("rounded", "private noise", "dithered", "gprs", "trellis")


def shared_uniform(shape: tuple[int, ...]) -> np.ndarray:
    """What encoder and decoder both draw from the library's counter, in [-1/2, 1/2)."""
    words = randomness.words(SHARED_SEED, 0, np.arange(math.prod(shape)), randomness.stream(0, randomness.ARRIVALS), 1)
    return words[:, 0].reshape(shape) / 2.0**32 - 0.5


def density(t: np.ndarray) -> np.ndarray:
    """Of N(0, 1)."""
    return np.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)


class Quantiser:
    """Scalar quantisation of values of law N(0, scale^2), entropy coded under that law given the dither.

    Args:
        step: width of a cell.
        scale: `[d]`, known to the decoder.
        total: standard deviation of the values that the decoder shall put out, `[d]`.
        dithered: shift each cell by a shared uniform variable.
    """

    def __init__(self, step: float, scale: np.ndarray, total: np.ndarray, dithered: bool):
        self.step, self.scale, self.total, self.dithered = step, scale, total, dithered
        self.law = constriction.stream.model.QuantizedGaussian(-FARTHEST, FARTHEST)

    def _laws(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        shift = shared_uniform(shape) if self.dithered else np.zeros(shape)
        return shift, np.broadcast_to(np.maximum(self.scale / self.step, 1e-3), shape)

    def encode(self, values: np.ndarray) -> bytes:
        """A file of values `[n, d]`."""
        shift, spread = self._laws(values.shape)
        k = np.rint(values / self.step + shift).clip(-FARTHEST, FARTHEST).astype(np.int32)
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(k.ravel(), self.law, shift.ravel(), spread.ravel())
        return coder.get_compressed().astype("<u4").tobytes()

    def decode(self, data: bytes, shape: tuple[int, int], how: str, rng: np.random.Generator) -> np.ndarray:
        """Values of variance scale^2 or less for "rounded"; else of law N(0, total^2)."""
        shift, spread = self._laws(shape)
        coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        y = (coder.decode(self.law, shift.ravel(), np.ascontiguousarray(spread).ravel()).reshape(shape) - shift) * self.step
        low, high = (y - self.step / 2) / self.scale, (y + self.step / 2) / self.scale
        if how == "dithered":
            below = [t * ndtr(t) + density(t) for t in (low, high)]  # integrals of the normal's distribution function
            return self.total * ndtri(((below[1] - below[0]) * self.scale / self.step).clip(1e-9, 1 - 1e-9))
        mass = np.maximum(ndtr(high) - ndtr(low), 1e-300)
        if how == "rounded":
            return np.where(mass > 1e-12, self.scale * (density(low) - density(high)) / mass, y)
        inside = self.scale * ndtri((ndtr(low) + rng.random(shape) * mass).clip(1e-12, 1 - 1e-12))
        return inside + np.sqrt(np.maximum(self.total**2 - self.scale**2, 0.0)) * rng.standard_normal(shape)


def step_for(size: int, values: np.ndarray, scale: np.ndarray, dithered: bool) -> float:
    """The step whose file is nearest to `size` bytes, by bisection."""
    low, high = 1e-2, 1e2
    for _ in range(14):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if len(Quantiser(middle, scale, scale, dithered).encode(values)) > size else (low, middle)
    return math.sqrt(low * high)


def write_draws(name: str, mean: np.ndarray, std: np.ndarray) -> tuple[bytes, Callable[[bytes], np.ndarray]]:
    """A file with a draw of every row's posterior by one of the library's coders, and what decodes it into `[n, d]`."""
    shape = mean.shape
    if name == "trellis":  # all rows are one sequence
        coder = coders.get("trellis", memory=12)
        words = coder.encode(mean.reshape(1, -1), std.reshape(1, -1), 1.0, seed=SHARED_SEED)
        out, rate = BitWriter(), words.info["rate"]
        out.write(rate.width, 16)
        out.write(rate.rate, 16)
        out.write_bits(words.index[0])

        def read(data: bytes) -> np.ndarray:
            source = BitReader(data)
            rate = Rate(math.prod(shape), source.read(16), source.read(16))
            own = coders.Codewords(source.take(rate.bits, "the path")[None], *[np.zeros(1)] * 3, rate.count, {"rate": rate, "memory": 12})
            return coder.decode(own, 1.0, seed=SHARED_SEED).reshape(shape)
    else:
        coder = coders.get("gprs", extra_bits=5.0, max_log2_candidates=19)
        words = coder.encode(mean, std, 1.0, seed=SHARED_SEED)
        octave, out = octaves(words.index), BitWriter()
        table = HuffmanTable.fit(octave)
        table.write(out)
        table.encode(out, octave)
        out.write_many(words.index - (np.int64(1) << octave), octave)

        def read(data: bytes) -> np.ndarray:
            source = BitReader(data)
            octave = HuffmanTable.read(source).decode(source, shape[0])
            index = source.read_many(octave, "indices") + (np.int64(1) << octave)
            return coder.decode(coders.Codewords(index, index, index, index > 0, shape[1]), 1.0, seed=SHARED_SEED)

    return out.to_bytes(), read


def files(mean, std, value: np.ndarray, scale: np.ndarray, total: np.ndarray, folder: Path, stem: str) -> dict[str, tuple[int, np.ndarray]]:
    """Every code of the posteriors (mean, std) `[n, d]`, or of `value`, as a real file: its bytes and what it decodes to."""
    found: dict[str, tuple[int, np.ndarray]] = {}
    rng = np.random.default_rng(0)
    for name in tqdm(("gprs", "trellis", "rounded", "private noise", "dithered"), desc=stem, leave=False):
        path = folder / f"{stem}-{name.replace(' ', '-')}.bin"
        if name in ("gprs", "trellis"):
            data, read = write_draws(name, mean, std)
            path.write_bytes(data)
            z = read(path.read_bytes())
        else:
            dithered = name == "dithered"
            code = Quantiser(step_for(found["gprs"][0], value, scale, dithered), scale, total, dithered)
            path.write_bytes(code.encode(value))
            z = code.decode(path.read_bytes(), value.shape, name, rng)
        found[name] = (path.stat().st_size, z)
    return found
