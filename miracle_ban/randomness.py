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

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
_MASK = 0xFFFFFFFF
_COUNTERS_AT_ONCE = 1 << 13  # they stay in the cache


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
    shape = np.broadcast(candidate, block, lane).shape
    even, odd = np.empty((2, *shape), np.uint64), np.empty((2, *shape), np.uint64)
    even[0], even[1], odd[0], odd[1] = candidate, lane, block, stream_id
    even, odd = even.reshape(2, -1), odd.reshape(2, -1)
    out = np.empty((even.shape[1], 4), np.uint32)
    for first in range(0, len(out), _COUNTERS_AT_ONCE):
        part = slice(first, first + _COUNTERS_AT_ONCE)
        p, q = even[:, part], odd[:, part]
        for key in _keys(seed):
            product = (p * _MULTIPLIERS)[::-1]
            p, q = (product >> _WORD) ^ q ^ key, product & _LOW
        out[part, 0::2], out[part, 1::2] = p.T, q.T
    return out.reshape(*shape, 4)


@functools.lru_cache(16)
def _keys(seed: int) -> np.ndarray:
    """The keys of the ten rounds: uint64 `[10, 2, 1]`."""
    low, high = seed & _MASK, seed >> 32 & _MASK
    return np.array([[[low + i * _WEYL_0 & _MASK], [high + i * _WEYL_1 & _MASK]] for i in range(10)], np.uint64)


def words(seed: int, candidate: np.ndarray | int, block: np.ndarray | int, stream_id: int, count: int) -> np.ndarray:
    """The first `count` 32-bit words for each (candidate, block): uint32 `[n, count]`, lane after lane."""
    candidate, block = np.broadcast_arrays(np.atleast_1d(candidate), np.atleast_1d(block))
    lanes = np.arange(-(-count // 4), dtype=np.int64)
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
    drawn = words(seed, 0, np.arange(-(-count // 4), dtype=np.int64), stream(tensor, ORDER), 4).ravel()[:count]
    low, high = ((drawn >> shift).astype(np.uint16) for shift in (np.uint32(0), np.uint32(16)))
    first = np.argsort(low, kind="stable")  # by halves, as numpy sorts 16 bits by counting them
    return first[np.argsort(high[first], kind="stable")].astype(np.int64, copy=False)
