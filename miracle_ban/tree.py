"""Frozen (format 1). The search tree of one weight: which value a node stands for.

The line is cut at random again and again. A node is an interval of the prior's quantiles, in units of 2^-32; its value is
a random quantile in it, and its children are what lies below and above that. Node 1 is the root, node k has the children
2 k (below) and 2 k + 1 (above), so the octave of a node's number is its depth and the other bits are the turns to it.

    point     u = low + floor(word * (high - low) / 2^32) of the interval [low, high), word `depth` of the weight's own
    children  [low, u) and [u + 1, high)
    value     Phi^-1((u + 1/2) / 2^32) in float64 by Wichura 1988 (algorithm AS 241), as float32

Additions, multiplications, divisions and square roots in float64 only, each rounded on its own, so that every machine gives
the same bits. Leans on numpy and `randomness` only.
"""

from __future__ import annotations

import numpy as np

from . import randomness

LARGEST_DEPTH = 31
_ONE = np.uint64(1)
_WORD = np.uint64(32)
_LN2 = 0.6931471805599453

_MIDDLE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip


def _ratio(x: np.ndarray, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> np.ndarray:
    values = []
    for row in coefficients:
        value = np.full_like(x, row[0])
        for c in row[1:]:
            value = value * x + c
        values.append(value)
    return values[0] / values[1]


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive numbers by its series in (m - 1) / (m + 1), m the mantissa."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa, exponent = np.where(low, mantissa * 2.0, mantissa), exponent - low.astype(np.int32)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square, total = s * s, np.zeros_like(s)
    for k in range(21, 0, -2):
        total = total * square + 1.0 / k
    return exponent.astype(np.float64) * _LN2 + 2.0 * s * total


def quantile(point: np.ndarray) -> np.ndarray:
    """Phi^-1((point + 1/2) / 2^32) of integers below 2^32: float64."""
    p = (np.asarray(point, np.float64) + 0.5) * 2.0**-32
    q = p - 0.5
    middle = q * _ratio(0.180625 - q * q, _MIDDLE)
    r = np.sqrt(-_log(np.minimum(p, 1.0 - p)))
    tail = _ratio(r - 1.6, _TAIL)
    return np.where(np.abs(q) <= 0.425, middle, np.where(q < 0.0, -tail, tail))


def turns(seed: int, tensor: int, blocks: np.ndarray) -> np.ndarray:
    """The random words of some weights, one for each depth: uint64 `[blocks, 32]`."""
    return randomness.words(seed, 0, blocks, randomness.stream(tensor, randomness.TREE), LARGEST_DEPTH + 1).astype(np.uint64)


def point(word: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The random quantile of an interval, all uint64."""
    return low + (word * (high - low) >> _WORD)


def node_values(seed: int, tensor: int, blocks: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """What the nodes of some weights stand for, in units of the prior: float32 `[blocks, 1]`."""
    words = turns(seed, tensor, blocks)
    nodes = np.asarray(nodes, np.int64)
    depth = np.frexp(nodes.astype(np.float64))[1].astype(np.int64) - 1
    low, high = np.zeros(len(nodes), np.uint64), np.full(len(nodes), 1 << 32, np.uint64)
    for d in range(int(depth.max(initial=0))):
        u = point(words[:, d], low, high)
        above = nodes >> np.maximum(depth - d - 1, 0) & 1 == 1
        on = depth > d
        low = np.where(on & above, np.minimum(u + _ONE, high), low)
        high = np.where(on & ~above, u, high)
    at = np.minimum(point(words[np.arange(len(nodes), dtype=np.int64), depth], low, high), np.uint64(0xFFFFFFFF))
    return quantile(at).astype(np.float32)[:, None]
