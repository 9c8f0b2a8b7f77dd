"""Frozen (format 1). Shared randomness: Philox4x32-10 and the 16-bit quantile normal.

Encoder and decoder see the same numbers because they are integers computed from a counter, on any machine and library
version. Philox4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; checked in the tests against
the Random123 known-answer vectors. A normal is one of 65,536 quantile midpoints Phi^-1((j + 1/2) / 65536), in units of
2^-20, looked up by 16 bits; the table lies beside this file and its SHA-256 is in the tests.

Counter words: (candidate, block or step, lane, stream), where stream = 16 * tensor + purpose. Key: the file's seed.
Leans on numpy only.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

NORMAL_UNIT = 2.0**-20
CODEBOOK, FLIPS, ROTATION, ORDER, ARRIVALS, TREE = range(6)  # purposes; ARRIVALS is the encoder's own and never decoded
NORMALS_PER_CALL = 8

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
_MASK = 0xFFFFFFFF


def stream(tensor: int, purpose: int) -> int:
    """Fourth counter word: `tensor` is the position of the tensor in the file, `purpose` one of this module's constants."""
    return (tensor << 4 | purpose) & _MASK


def philox(seed: int, candidate: np.ndarray, block: np.ndarray, lane: np.ndarray, stream_id: int) -> np.ndarray:
    """Philox4x32-10 of counters (candidate, block, lane, stream): uint32 words, shape `[*broadcast, 4]`.

    Args:
        seed: 64-bit key.
        candidate, block, lane: integers that broadcast together, below 2^32.
        stream_id: see `stream`.
    """
    a, b, c = np.broadcast_arrays(*(np.asarray(v, np.uint64) for v in (candidate, block, lane)))
    d = np.full(a.shape, stream_id, np.uint64)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p, q = a * _MULTIPLIER_0, c * _MULTIPLIER_1
        a, b, c, d = (q >> _WORD) ^ b ^ np.uint64(k0), q & _LOW, (p >> _WORD) ^ d ^ np.uint64(k1), p & _LOW
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return np.stack([a, b, c, d], axis=-1).astype(np.uint32)


def words(seed: int, candidate: np.ndarray | int, block: np.ndarray | int, stream_id: int, count: int) -> np.ndarray:
    """The first `count` 32-bit words for each (candidate, block): uint32 `[n, count]`, lane after lane."""
    candidate, block = np.broadcast_arrays(np.atleast_1d(candidate), np.atleast_1d(block))
    lanes = np.arange(-(-count // 4))
    drawn = philox(seed, candidate[:, None], block[:, None], lanes[None, :], stream_id)
    return drawn.reshape(len(candidate), -1)[:, :count]


def normals(seed: int, candidate: np.ndarray | int, block: np.ndarray | int, stream_id: int, count: int) -> np.ndarray:
    """`count` standard normals for each (candidate, block): int32 `[n, count]` in units of 2^-20.

    A word gives two normals, by its low 16 bits and then its high 16 bits.
    """
    drawn = words(seed, candidate, block, stream_id, -(-count // 2))
    halves = np.stack([drawn & np.uint32(0xFFFF), drawn >> np.uint32(16)], axis=-1).reshape(len(drawn), -1)
    return quantiles()[halves[:, :count]]


@functools.cache
def quantiles() -> np.ndarray:
    """The table of normals: int32 `[65536]`, units of 2^-20, ascending, antisymmetric."""
    upper = np.frombuffer((Path(__file__).parent / "quantiles.bin").read_bytes(), "<i4")
    return np.concatenate([-upper[::-1], upper]).astype(np.int32)


def flips(seed: int, block: np.ndarray, tensor: int, count: int) -> np.ndarray:
    """Signs of the shared codebook's columns for each block: int8 `[n, count]` of +1 and -1."""
    drawn = words(seed, 0, block, stream(tensor, FLIPS), -(-count // 32))
    bits = (drawn[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return (1 - 2 * bits.reshape(len(drawn), -1)[:, :count].astype(np.int8)).astype(np.int8)


def rotation(seed: int, block: np.ndarray, tensor: int, count: int) -> np.ndarray:
    """How far the shared codebook's columns are rotated for each block: int64 `[n]` in 0 .. count - 1."""
    drawn = words(seed, 0, block, stream(tensor, ROTATION), 1)[:, 0]
    return drawn.astype(np.int64) % max(count, 1)


def order(seed: int, tensor: int, count: int) -> np.ndarray:
    """A random order of `count` weights: int64 permutation, by sorting one 32-bit word each (ties by position)."""
    if count == 0:
        return np.zeros(0, np.int64)
    drawn = words(seed, 0, np.arange(-(-count // 4)), stream(tensor, ORDER), 4).ravel()[:count]
    return np.argsort(drawn, kind="stable").astype(np.int64)
