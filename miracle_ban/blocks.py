"""Frozen (format 1). Blocks: which weights of a tensor share an index, and which values a candidate number stands for.

Leans on numpy, `randomness` and `errors` only; this is all that decoding a block takes.
"""

from __future__ import annotations

import numpy as np

from . import randomness

LARGEST_DIMENSION = 4096  # weights in one block
LARGEST_PRIVATE_DIMENSION = randomness.NORMALS_PER_CALL  # blocks this small do not share a codebook
_CHUNK_VALUES = 1 << 18


def layout(seed: int, tensor: int, count: int, num_blocks: int) -> np.ndarray:
    """Positions of the weights of each block: int64 `[num_blocks, ceil(count / num_blocks)]`, -1 where a block is short.

    The weights are put in an order drawn from the seed and dealt out like cards, so sizes differ by at most one.
    """
    dimension = -(-count // max(num_blocks, 1))
    dealt = np.full(dimension * num_blocks, -1, np.int64)
    dealt[:count] = randomness.order(seed, tensor, count)
    return dealt.reshape(dimension, num_blocks).T


def codebook_block(blocks: np.ndarray, dimension: int) -> np.ndarray:
    """Second counter word of the codebook: 0 where all blocks share it, the block's number (from 1) where each has its own.

    A block of at most 8 weights has its own: signs and rotation would not make its draws differ enough from the others',
    and one Philox call makes a whole candidate of it anyway.
    """
    return blocks + 1 if dimension <= LARGEST_PRIVATE_DIMENSION else np.zeros_like(blocks)


def codebook_stream(tensor: int, dimension: int) -> int:
    """Fourth counter word of the codebook: every tensor with blocks of its own has its own."""
    return randomness.stream(tensor if dimension <= LARGEST_PRIVATE_DIMENSION else 0, randomness.CODEBOOK)


def candidate_values(seed: int, tensor: int, blocks: np.ndarray, index: np.ndarray, dimension: int) -> np.ndarray:
    """Candidate `index` (from 1) of each block, in units of the prior: float32 `[blocks, dimension]`, each value exact.

    Value j of block b is sign(b, j) * Z[index - 1, (j - rotation(b)) mod dimension]; the block's number is `blocks[b]`.
    """
    out = np.empty((len(index), dimension), np.float32)
    step = max(1, _CHUNK_VALUES // max(dimension, 1))
    for start in range(0, len(index), step):
        rows = slice(start, start + step)
        own = codebook_block(blocks[rows], dimension)
        z = randomness.normals(seed, index[rows] - 1, own, codebook_stream(tensor, dimension), dimension)
        turn = randomness.rotation(seed, blocks[rows], tensor, dimension)
        source = (np.arange(dimension, dtype=np.int64)[None, :] - turn[:, None]) % max(dimension, 1)
        signed = np.take_along_axis(z, source, 1) * randomness.flips(seed, blocks[rows], tensor, dimension)
        out[rows] = signed.astype(np.float32) * np.float32(randomness.NORMAL_UNIT)
    return out
