from __future__ import annotations

import numpy as np
import reference_decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_ban import randomness
from miracle_ban.blocks import LARGEST_PRIVATE_DIMENSION, candidate_values, codebook_block, codebook_stream, layout

seeds = st.integers(0, (1 << 64) - 1)


@settings(max_examples=60)
@given(seeds, st.integers(0, 50), st.integers(0, 400), st.integers(1, 60))
def test_a_layout_covers_every_position_once_in_blocks_of_nearly_one_size(seed, tensor, count, num_blocks):
    place = layout(seed, tensor, count, num_blocks)
    assert place.shape == (num_blocks, -(-count // num_blocks))
    assert sorted(place[place >= 0].tolist()) == list(range(count))
    sizes = (place >= 0).sum(1)
    assert sizes.max(initial=0) - sizes.min(initial=count) <= 1
    for row, size in zip(place, sizes, strict=True):  # what is missing stands at the end
        assert (row[:size] >= 0).all()
        assert (row[size:] == -1).all()


@settings(max_examples=30)
@given(seeds, st.integers(0, 50), st.integers(1, 300), st.integers(1, 20))
def test_weights_are_dealt_out_in_the_order_of_the_seed(seed, tensor, count, num_blocks):
    place = layout(seed, tensor, count, num_blocks)
    order = randomness.order(seed, tensor, count)
    assert all(order[i] == place[i % num_blocks, i // num_blocks] for i in range(count))


@settings(max_examples=30)
@given(seeds, st.integers(1, 300), st.integers(1, 20))
def test_scattering_what_was_gathered_gives_it_back(seed, count, num_blocks):
    weights = np.arange(count) * 1.5
    place = layout(seed, 3, count, num_blocks)
    inside = place >= 0
    gathered = np.where(inside, weights[np.maximum(place, 0)], 0.0)
    back = np.empty(count)
    back[place[inside]] = gathered[inside]
    assert (back == weights).all()


def test_layouts_of_other_seeds_and_tensors_differ():
    base = layout(1, 1, 200, 10)
    assert not (base == layout(2, 1, 200, 10)).all()
    assert not (base == layout(1, 2, 200, 10)).all()
    assert (base == layout(1, 1, 200, 10)).all()


@settings(max_examples=40)
@given(
    seeds, st.integers(0, 9), st.integers(1, 40), st.lists(st.tuples(st.integers(0, 999), st.integers(1, 1 << 31)), min_size=1, max_size=6)
)
def test_any_candidate_of_any_block_alone_is_the_same(seed, tensor, d, wanted):
    blocks, index = np.array([w[0] for w in wanted]), np.array([w[1] for w in wanted])
    together = candidate_values(seed, tensor, blocks, index, d)
    assert together.shape == (len(wanted), d)
    for row, b, k in zip(together, blocks, index, strict=True):
        assert (candidate_values(seed, tensor, np.array([b]), np.array([k]), d)[0] == row).all()


@settings(max_examples=40)
@given(seeds, st.integers(0, 9), st.integers(0, 50), st.integers(1, 1 << 31), st.integers(1, 30))
def test_candidates_agree_with_plain_python(seed, tensor, block, index, d):
    """The definition, in integers: the block's sign, times a normal of the codebook's row, its columns rotated."""
    private = d <= LARGEST_PRIVATE_DIMENSION
    stream = 16 * tensor * private + randomness.CODEBOOK
    row = reference_decoder.normals(seed, index - 1, (block + 1) * private, stream, d)
    turn = reference_decoder.words(seed, 0, block, 16 * tensor + randomness.ROTATION, 1)[0] % d
    signs = reference_decoder.words(seed, 0, block, 16 * tensor + randomness.FLIPS, -(-d // 32))
    expected = [(1 - 2 * (signs[j // 32] >> j % 32 & 1)) * row[(j - turn) % d] for j in range(d)]
    values = candidate_values(seed, tensor, np.array([block]), np.array([index]), d)[0]
    assert values.dtype == np.float32
    assert (values.astype(np.float64) * 2**20).tolist() == expected


def test_values_are_exact_multiples_of_the_unit():
    values = candidate_values(3, 1, np.arange(200), np.arange(1, 201), 64)
    units = values.astype(np.float64) / randomness.NORMAL_UNIT
    assert (units == np.round(units)).all()
    assert np.abs(units).max() < 1 << 24  # a float32 holds them
    assert np.isin(units.astype(np.int64), randomness.quantiles()).all()


def test_large_requests_are_the_same_as_small_ones():
    blocks, index = np.arange(600), np.arange(600) * 7 + 1
    whole = candidate_values(5, 0, blocks, index, 4096)  # in several steps
    for b in (0, 255, 256, 599):
        assert (candidate_values(5, 0, blocks[b : b + 1], index[b : b + 1], 4096)[0] == whole[b]).all()


def test_small_blocks_have_codebooks_of_their_own():
    blocks = np.arange(4)
    assert codebook_block(blocks, 8).tolist() == [1, 2, 3, 4]
    assert codebook_block(blocks, 9).tolist() == [0, 0, 0, 0]
    assert codebook_stream(3, 8) != codebook_stream(4, 8)
    assert codebook_stream(3, 9) == codebook_stream(4, 9)
    shared = np.abs(candidate_values(0, 0, blocks, np.full(4, 5), 9))
    own = np.abs(candidate_values(0, 0, blocks, np.full(4, 5), 8))
    assert all(sorted(row) == sorted(shared[0]) for row in shared)
    assert len({tuple(sorted(row)) for row in own}) == 4


def test_dimension_zero_and_no_blocks():
    assert candidate_values(0, 0, np.arange(3), np.ones(3, np.int64), 0).shape == (3, 0)
    assert candidate_values(0, 0, np.arange(0), np.ones(0, np.int64), 5).shape == (0, 5)
    assert layout(0, 0, 0, 3).shape == (3, 0)
