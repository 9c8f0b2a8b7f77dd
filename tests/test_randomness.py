from __future__ import annotations

import hashlib

import helpers
import numpy as np
import pytest
import reference_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from miracle_ban import randomness

seeds = st.integers(0, (1 << 64) - 1)
numbers = st.integers(0, (1 << 32) - 1)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known-answer vectors of Random123 1.14 for philox4x32, 10 rounds
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (1 << 64) - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    drawn = randomness.philox(key, *(np.array(c) for c in counter[:3]), counter[3])
    assert drawn.dtype == np.uint32
    assert " ".join(f"{w:08x}" for w in drawn) == expected


@given(seeds, numbers, numbers, numbers, numbers)
def test_philox_agrees_with_plain_python(seed, a, b, c, d):
    drawn = randomness.philox(seed, np.array(a), np.array(b), np.array(c), d)
    assert tuple(drawn.tolist()) == reference_decoder.philox((a, b, c, d), (seed & 0xFFFFFFFF, seed >> 32))


def test_the_table_of_normals_never_changes():
    table = randomness.quantiles()
    digest = hashlib.sha256(table.astype("<i4").tobytes()).hexdigest()
    assert digest == "7030c40868edff0a36b70d4a06ceacbf25ac02eb87069f34786f8258a1e9a44d"


def test_the_table_holds_the_quantile_midpoints_of_the_normal():
    table = randomness.quantiles()
    exact = special.ndtri((np.arange(65536) + 0.5) / 65536)
    assert table.shape == (65536,)
    assert table.dtype == np.int32
    assert np.abs(table * randomness.NORMAL_UNIT - exact).max() <= 0.51 * randomness.NORMAL_UNIT


def test_the_table_is_antisymmetric_and_ascending():
    table = randomness.quantiles().astype(np.int64)
    assert (table == -table[::-1]).all()
    assert (np.diff(table) > 0).all()


@settings(max_examples=50)
@given(seeds, st.integers(0, 1 << 31), st.integers(0, 1 << 31), st.integers(0, 1 << 20), st.integers(1, 40))
def test_one_candidate_alone_is_its_row_of_a_batch(seed, first, block, stream, count):
    rows = np.array([first, first + 1, first + 7])
    together = randomness.normals(seed, rows, block, stream, count)
    alone = [randomness.normals(seed, int(k), block, stream, count)[0] for k in rows]
    assert (together == np.stack(alone)).all()


@given(seeds, st.integers(1, 60), st.integers(1, 60))
def test_more_dimensions_extend_fewer(seed, few, more):
    few, more = sorted((few, more))
    a = randomness.normals(seed, np.arange(3), 5, 9, few)
    b = randomness.normals(seed, np.arange(3), 5, 9, more)
    assert (a == b[:, :few]).all()
    assert (randomness.words(seed, 0, 0, 9, few) == randomness.words(seed, 0, 0, 9, more)[:, :few]).all()


@settings(max_examples=30)
@given(seeds, st.integers(0, 1 << 31), st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 20))
def test_normals_agree_with_plain_python(seed, candidate, block, stream, count):
    drawn = randomness.normals(seed, candidate, block, stream, count)[0]
    assert drawn.tolist() == reference_decoder.normals(seed, candidate, block, stream, count)


@given(seeds, st.integers(0, 1 << 27), st.integers(0, 3000))
@settings(max_examples=30)
def test_an_order_is_a_permutation_and_follows_the_words(seed, tensor, count):
    order = randomness.order(seed, tensor, count)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))
    some = min(count, 9)
    drawn = []
    for block in range(-(-some // 4)):
        drawn += reference_decoder.words(seed, 0, block, randomness.stream(tensor, randomness.ORDER), 4)
    rank = {int(position): i for i, position in enumerate(order)}
    assert sorted(range(some), key=lambda i: rank[i]) == sorted(range(some), key=lambda i: (drawn[i], i))


@given(seeds, st.integers(0, 1 << 27), st.integers(1, 200))
@settings(max_examples=30)
def test_flips_are_signs_and_follow_the_words(seed, tensor, count):
    signs = randomness.flips(seed, np.arange(3), tensor, count)
    assert signs.shape == (3, count)
    assert set(np.unique(signs)) <= {-1, 1}
    word = reference_decoder.words(seed, 0, 2, randomness.stream(tensor, randomness.FLIPS), 1)[0]
    assert signs[2, : min(count, 32)].tolist() == [1 - 2 * ((word >> i) & 1) for i in range(min(count, 32))]


@given(seeds, st.integers(0, 1 << 27), st.integers(1, 5000))
@settings(max_examples=30)
def test_rotations_are_within_the_block_and_follow_the_words(seed, tensor, count):
    turn = randomness.rotation(seed, np.arange(4), tensor, count)
    word = reference_decoder.words(seed, 0, 3, randomness.stream(tensor, randomness.ROTATION), 1)[0]
    assert turn[3] == word % count
    assert ((turn >= 0) & (turn < count)).all()


def test_streams_of_all_tensors_and_purposes_differ():
    ids = {randomness.stream(t, p) for t in range(100) for p in range(5)}
    assert len(ids) == 500
    assert all(0 <= i < 1 << 32 for i in ids)
    assert 0 <= randomness.stream((1 << 40) + 3, 4) < 1 << 32


def test_normals_have_the_moments_of_a_normal():
    n = 1 << 20
    x = randomness.normals(1, np.arange(n // 16), 0, 0, 16).ravel() * randomness.NORMAL_UNIT
    z = stats.norm.isf(helpers.FALSE_ALARM / 2)  # each moment misses its own bound with probability 1e-6
    assert abs(x.mean()) < z * np.sqrt(1 / n)
    assert abs((x**2).mean() - 1) < z * np.sqrt(2 / n)
    assert abs((x**3).mean()) < z * np.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < z * np.sqrt(96 / n)


def test_bits_of_words_are_fair_and_neighbours_uncorrelated():
    words = randomness.words(2, np.arange(1 << 15), 3, 4, 4)
    bits = np.unpackbits(words.view(np.uint8)).astype(np.int64)
    z = stats.norm.isf(helpers.FALSE_ALARM / 2)  # false alarm 1e-6 for each of the three
    assert abs(bits.mean() - 0.5) < z * 0.5 / np.sqrt(len(bits))
    for shift in (1, 128):
        agree = (bits[shift:] == bits[:-shift]).mean()
        assert abs(agree - 0.5) < z * 0.5 / np.sqrt(len(bits) - shift)


def test_seeds_blocks_and_streams_give_unrelated_normals():
    n = 1 << 16
    base = randomness.normals(0, np.arange(n), 0, 0, 1).ravel().astype(float)
    others = [
        randomness.normals(1, np.arange(n), 0, 0, 1),
        randomness.normals(1 << 32, np.arange(n), 0, 0, 1),
        randomness.normals(0, np.arange(n), 1, 0, 1),
        randomness.normals(0, np.arange(n), 0, 1, 1),
        randomness.normals(0, np.arange(n), 0, 0, 3)[:, 2:],
    ]
    bound = stats.norm.isf(helpers.FALSE_ALARM / 2) / np.sqrt(n)  # false alarm 1e-6 for each pair
    for other in others:
        assert abs(np.corrcoef(base, other.ravel().astype(float))[0, 1]) < bound
