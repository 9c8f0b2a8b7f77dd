from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_ban.bits import MAX_CODE_LENGTH, BitReader, BitWriter, HuffmanTable, crc32, parse_bytes
from miracle_ban.errors import BudgetError, CorruptError


@given(st.lists(st.integers(0, 80).flatmap(lambda n: st.tuples(st.integers(0, (1 << n) - 1), st.just(n))), max_size=20))
def test_fixed_width_numbers_come_back(pairs):
    out = BitWriter()
    for value, bits in pairs:
        out.write(value, bits)
    assert out.length == sum(bits for _, bits in pairs)
    source = BitReader(out.to_bytes())
    assert [source.read(bits) for _, bits in pairs] == [value for value, _ in pairs]
    assert source.left == -out.length % 8


@given(st.integers(0, (1 << 62) - 1), st.integers(0, 20))
def test_exponential_golomb_comes_back(value, order):
    out = BitWriter()
    out.write_golomb(value, order)
    source = BitReader(out.to_bytes())
    assert source.read_golomb(order) == value
    assert source.position == out.length


@pytest.mark.parametrize("value", [(1 << 64) - 1, (1 << 64) - 2, 1 << 63, (1 << 63) - 1])
def test_exponential_golomb_holds_every_64_bit_seed(value):
    out = BitWriter()
    out.write_golomb(value)
    assert BitReader(out.to_bytes()).read_golomb(limit=(1 << 64) - 1) == value


@pytest.mark.parametrize("order", range(6))
def test_exponential_golomb_is_prefix_free_and_monotone_in_length(order):
    words = []
    for value in range(300):
        out = BitWriter()
        out.write_golomb(value, order)
        words.append("".join(map(str, BitReader(out.to_bytes()).bits[: out.length])))
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(words))
    ordered = sorted(words)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered))


def test_golomb_over_its_limit_is_corrupt():
    out = BitWriter()
    out.write_golomb(100)
    assert BitReader(out.to_bytes()).read_golomb(limit=100) == 100
    with pytest.raises(CorruptError, match="limit"):
        BitReader(out.to_bytes()).read_golomb(limit=99)


def test_endless_zeros_are_corrupt():
    with pytest.raises(CorruptError):
        BitReader(bytes(100)).read_golomb()


@given(st.lists(st.integers(0, 63).flatmap(lambda n: st.tuples(st.integers(0, (1 << n) - 1), st.just(n))), max_size=30))
def test_many_numbers_of_own_widths_come_back(pairs):
    values, bits = np.array([p[0] for p in pairs], np.int64), np.array([p[1] for p in pairs], np.int64)
    out = BitWriter()
    out.write_many(values, bits)
    single = BitWriter()
    for value, width in pairs:
        single.write(value, width)
    assert out.to_bytes() == single.to_bytes()
    assert BitReader(out.to_bytes()).read_many(bits, "x").tolist() == values.tolist()


@given(st.integers(0, 7), st.binary(max_size=20))
def test_whole_bytes_come_back_after_alignment(ahead, data):
    out = BitWriter()
    out.write(0, ahead)
    out.align()
    out.write_bytes(data)
    source = BitReader(out.to_bytes())
    source.read(ahead)
    source.align()
    assert source.read_bytes(len(data), "x") == data
    assert source.left == 0


def test_padding_must_be_zero():
    source = BitReader(b"\x01")
    source.read(1)
    with pytest.raises(CorruptError, match="padding"):
        source.align()


@pytest.mark.parametrize(("value", "bits"), [(-1, 4), (16, 4), (1, 0)])
def test_a_number_too_large_for_its_width_is_refused(value, bits):
    with pytest.raises(ValueError, match="does not fit"):
        BitWriter().write(value, bits)


@pytest.mark.parametrize(
    "read",
    [
        lambda s: s.read(17),
        lambda s: s.take(17, "x"),
        lambda s: s.read_bytes(3, "x"),
        lambda s: s.read_many(np.array([8, 9]), "x"),
        lambda s: s.read_many(np.full(1 << 16, 63), "x"),
        lambda s: s.read_golomb(20),
        lambda s: [s.read(7) for _ in range(3)],
        lambda s: s.take(-1, "x"),
        lambda s: HuffmanTable(0, [1, 1]).decode(s, 17),
        lambda s: HuffmanTable(0, [1, 1]).decode(s, 1 << 60),
        lambda s: [HuffmanTable.read(s) for _ in range(2)],
    ],
)
@pytest.mark.parametrize("data", [b"\x00\x00", b"\xff\xff", b"\x80\x01"])
def test_every_read_past_the_end_is_corrupt(read, data):
    with pytest.raises(CorruptError):
        read(BitReader(data))


@given(st.integers(0, 24), st.data())
def test_cut_streams_are_corrupt_and_nothing_else(keep, data):
    symbols = np.array(data.draw(st.lists(st.integers(0, 31), min_size=1, max_size=60)))
    table = HuffmanTable.fit(symbols)
    out = BitWriter()
    table.write(out)
    table.encode(out, symbols)
    whole = out.to_bytes()
    source = BitReader(whole[: max(len(whole) - 1 - keep, 0)])
    with pytest.raises(CorruptError):
        HuffmanTable.read(source).decode(source, len(symbols))


symbol_lists = st.lists(st.integers(0, 40), min_size=1, max_size=300).map(np.array)


@given(symbol_lists, st.integers(0, 7))
def test_huffman_table_and_symbols_come_back(symbols, ahead):
    out = BitWriter()
    out.write(0, ahead)
    table = HuffmanTable.fit(symbols)
    table.write(out)
    before = out.length
    table.encode(out, symbols)
    assert out.length - before == table.bits(symbols).sum()
    source = BitReader(out.to_bytes())
    source.read(ahead)
    again = HuffmanTable.read(source)
    assert (again.first, again.lengths.tolist(), again.codes.tolist()) == (table.first, table.lengths.tolist(), table.codes.tolist())
    assert again.decode(source, len(symbols)).tolist() == symbols.tolist()
    assert source.position == out.length


@pytest.mark.parametrize("symbol", [0, 1, 17, 63])
def test_a_table_of_a_single_symbol_works(symbol):
    symbols = np.full(25, symbol)
    table = HuffmanTable.fit(symbols)
    assert table.lengths.tolist() == [1]
    out = BitWriter()
    table.write(out)
    table.encode(out, symbols)
    source = BitReader(out.to_bytes())
    assert HuffmanTable.read(source).decode(source, 25).tolist() == symbols.tolist()


def test_a_codeword_that_no_symbol_has_is_corrupt():
    with pytest.raises(CorruptError, match="no codeword"):
        HuffmanTable(3, [1]).decode(BitReader(b"\x80"), 1)


@given(st.lists(st.integers(0, 2000), min_size=2, max_size=40))
def test_huffman_is_within_one_bit_of_the_entropy(counts):
    counts = np.array(counts) + 1  # every symbol of the range occurs: none is in the table for nothing
    symbols = np.repeat(np.arange(len(counts)), counts)
    table = HuffmanTable.fit(symbols)
    p = counts / counts.sum()
    entropy = -(p * np.log2(p)).sum()
    mean = table.bits(symbols).mean()
    assert entropy - 1e-9 <= mean <= entropy + 1.0
    assert (2.0 ** -table.lengths.astype(float)).sum() <= 1.0
    assert table.lengths.max() <= MAX_CODE_LENGTH


@settings(max_examples=20)
@given(st.integers(16, 40))
def test_very_uneven_counts_stay_within_the_longest_codeword(symbols_count):
    counts = [min(2**i, 40_000) for i in range(symbols_count)]
    symbols = np.repeat(np.arange(symbols_count), np.maximum(np.array(counts) // 40, 1))
    table = HuffmanTable.fit(symbols)
    assert table.lengths.max() <= MAX_CODE_LENGTH
    out = BitWriter()
    table.encode(out, symbols[:2000])
    assert table.decode(BitReader(out.to_bytes()), min(len(symbols), 2000)).tolist() == symbols[:2000].tolist()


def test_codewords_are_prefix_free_and_sorted_by_length():
    table = HuffmanTable.fit(np.repeat(np.arange(8), [1, 2, 4, 8, 16, 32, 64, 128]))
    words = sorted(f"{c:0{n}b}" for c, n in zip(table.codes.tolist(), table.lengths.tolist(), strict=True))
    assert not any(b.startswith(a) for a, b in itertools.pairwise(words))


@pytest.mark.parametrize("lengths", [[], [0], [1, 1, 1], [16], [1, 2, 2, 2], [-1, 3]])
def test_lengths_of_no_prefix_code_are_corrupt(lengths):
    with pytest.raises(CorruptError):
        HuffmanTable(0, lengths)


def test_crc_is_the_one_of_zip():
    assert crc32(b"123456789") == 0xCBF43926
    assert crc32(b"1234", b"", b"56789") == 0xCBF43926


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.5 kB", 1500), ("2 KiB", 2048), (1140, 1140), ("20MB", 20_000_000), ("1140", 1140), ("1140 bytes", 1140), ("1 byte", 1),
        ("7 b", 7), (" 3 GiB ", 3 << 30), ("1_000", 1000), (".5 kB", 500), ("2. kB", 2000), (1500.4, 1500), ("0.0015 MB", 1500),
        ("1 MiB", 1 << 20),
    ],
)  # fmt: skip
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc",
        "-3",
        0,
        -3,
        math.nan,
        math.inf,
        "nan",
        "inf",
        "1e3",
        "1.5.2 kB",
        "kB",
        "0",
        "0.2",
        "3 kilo",
        "1 kB extra",
        "１２ kB",
        True,
        None,
        [20],
    ],
)
def test_what_is_no_size_is_refused_with_a_remedy(text):
    with pytest.raises(BudgetError) as error:
        parse_bytes(text)
    assert repr(text) in str(error.value)
