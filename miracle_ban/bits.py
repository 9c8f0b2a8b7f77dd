"""Frozen (format 1). Bits: writer, reader, integer codes, canonical Huffman tables, checksum, units.

Bits are written most significant first. Everything that is read is checked against what is left before it is believed.
Leans on numpy only.
"""

from __future__ import annotations

import functools
import math
import re
import zlib

import numpy as np

from .errors import BudgetError, CorruptError

NATS_PER_BIT = math.log(2.0)
MAX_CODE_LENGTH = 15  # of a Huffman codeword, bits
_WINDOWS = 1 << MAX_CODE_LENGTH
_UNITS = {"": 1, "b": 1, "kb": 1_000, "mb": 1_000_000, "gb": 1_000_000_000, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def parse_bytes(text: str | int | float) -> int:
    """Bytes meant by `text`: a number of bytes, or text such as "1.5 kB" (1,500), "2 KiB" (2,048), "20MB".

    Raises:
        BudgetError: not a positive size.

    Example:
        >>> parse_bytes("1.5 kB"), parse_bytes("2 KiB"), parse_bytes(1140)
        (1500, 2048, 1140)
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        size = float(text)
    else:
        match = re.fullmatch(r"\s*([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
        unit = match.group(2).lower().removesuffix("ytes").removesuffix("yte") if match else "?"
        if match is None or unit not in _UNITS:
            raise BudgetError(f"cannot read the size {text!r}: write bytes as a number, or text such as '1.5 kB', '20 KiB', '3 MB'")
        size = float(match.group(1)) * _UNITS[unit]
    if not math.isfinite(size) or size < 1:
        raise BudgetError(f"a size must be at least one byte, not {text!r}")
    return round(size)


def crc32(*parts: bytes) -> int:
    """CRC-32 (the one of zip and PNG) of the parts, one after the other."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


class BitWriter:
    """Collects bits; `to_bytes` pads the last byte with zeros."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self.length = 0

    def write(self, value: int, bits: int) -> None:
        """The low `bits` bits of `value`."""
        if value < 0 or value >> bits:
            raise ValueError(f"{value} does not fit in {bits} bits")
        self._append(np.array([(value >> i) & 1 for i in range(bits - 1, -1, -1)], np.uint8))

    def write_golomb(self, value: int, order: int = 0) -> None:
        """Exponential Golomb code of `value >= 0`: `order` low bits apart, the rest by its length in unary."""
        shifted = value + (1 << order)
        length = shifted.bit_length()
        self.write(0, length - 1 - order)
        self.write(shifted, length)

    def write_many(self, values: np.ndarray, bits: np.ndarray) -> None:
        """Each of `values` in as many bits as `bits` says (up to 63)."""
        values, bits = np.asarray(values, np.int64), np.asarray(bits, np.int64)
        width = int(bits.max(initial=0))
        place = bits[:, None] - 1 - np.arange(width)
        table = (values[:, None] >> np.maximum(place, 0)) & 1
        self._append(table[place >= 0].astype(np.uint8))

    def write_bits(self, bits: np.ndarray) -> None:
        """Single bits, uint8 of 0 and 1."""
        self._append(np.asarray(bits, np.uint8))

    def align(self) -> None:
        """Zeros up to the next byte."""
        self._append(np.zeros(-self.length % 8, np.uint8))

    def write_bytes(self, data: bytes) -> None:
        """Whole bytes."""
        self._append(np.unpackbits(np.frombuffer(data, np.uint8)))

    def _append(self, part: np.ndarray) -> None:
        self._parts.append(part)
        self.length += len(part)

    def to_bytes(self) -> bytes:
        """All bits so far, padded to whole bytes."""
        return np.packbits(np.concatenate(self._parts)).tobytes() if self._parts else b""


class BitReader:
    """Reads what `BitWriter` wrote.

    Raises:
        CorruptError: any read past the end.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    @functools.cached_property
    def bits(self) -> np.ndarray:
        """All bits, uint8 of 0 and 1."""
        return np.unpackbits(np.frombuffer(self._data, np.uint8))

    @property
    def left(self) -> int:
        """Bits not read yet."""
        return 8 * len(self._data) - self.position

    def _pass(self, bits: int, what: str) -> int:
        """Go over the next `bits` bits; returns where they begin."""
        if bits < 0 or bits > self.left:
            raise CorruptError(f"the file ends inside {what}: {bits} bits wanted, {self.left} left")
        self.position += bits
        return self.position - bits

    def take(self, bits: int, what: str) -> np.ndarray:
        """The next `bits` bits as an array of 0 and 1."""
        start = self._pass(bits, what)
        return self.bits[start : start + bits]

    def read(self, bits: int, what: str = "a number") -> int:
        """An integer of `bits` bits."""
        start = self._pass(bits, what)
        stop = start + bits
        return int.from_bytes(self._data[start >> 3 : (stop + 7) >> 3], "big") >> (-stop & 7) & ((1 << bits) - 1)

    def read_golomb(self, order: int = 0, what: str = "a number", limit: int = 1 << 62) -> int:
        """A value written by `write_golomb`, at most `limit`."""
        first, used = divmod(self.position, 8)
        ahead = self._data[first : first + 10]
        width = 8 * len(ahead) - used
        zeros = width - (int.from_bytes(ahead, "big") & ((1 << max(width, 0)) - 1)).bit_length()
        if zeros > 64:
            raise CorruptError(f"{what}: no integer code begins with {zeros} zeros")
        value = self.read(2 * zeros + 1 + order, what) - (1 << order)
        if value > limit:
            raise CorruptError(f"{what} is {value}, over its limit of {limit}")
        return value

    def read_many(self, bits: np.ndarray, what: str) -> np.ndarray:
        """One integer for each width in `bits` (up to 63)."""
        bits = np.asarray(bits, np.int64)
        part = self.take(int(bits.sum()), what)
        start = np.cumsum(bits) - bits
        values = np.zeros(len(bits), np.int64)
        for i in range(int(bits.max(initial=0))):
            inside = i < bits
            values[inside] = values[inside] << 1 | part[start[inside] + i]
        return values

    def align(self) -> None:
        """Skip to the next byte; the skipped bits must be zero."""
        if self.read(-self.position % 8, "padding"):
            raise CorruptError("padding bits are not zero")

    def read_bytes(self, count: int, what: str) -> bytes:
        """Whole bytes."""
        if self.position % 8:
            raise ValueError("whole bytes begin on a byte: align first")
        start = self._pass(8 * count, what) // 8
        return self._data[start : start + count]


class HuffmanTable:
    """Canonical Huffman code for the symbols `first .. first + len(lengths) - 1`; every one of them has a codeword."""

    def __init__(self, first: int, lengths: list[int]):
        if not lengths or min(lengths) < 1 or max(lengths) > MAX_CODE_LENGTH or sum(_WINDOWS >> n for n in lengths) > _WINDOWS:
            raise CorruptError(f"no prefix code has the codeword lengths {lengths}")
        self.first = first
        self.lengths = np.array(lengths, np.int64)
        self.codes = np.zeros(len(lengths), np.int64)
        code = previous = 0
        for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
            code <<= lengths[i] - previous
            self.codes[i], previous = code, lengths[i]
            code += 1

    @classmethod
    def fit(cls, symbols: np.ndarray) -> HuffmanTable:
        """The best table for `symbols` (integers >= 0, at least one), codewords of at most 15 bits."""
        first, last = int(symbols.min()), int(symbols.max())
        counts = np.maximum(np.bincount(symbols - first, minlength=last - first + 1), 1)
        while True:
            lengths = _huffman_lengths(counts.tolist())
            if max(lengths) <= MAX_CODE_LENGTH:
                return cls(first, lengths)
            counts = counts // 2 + 1

    def bits(self, symbols: np.ndarray) -> np.ndarray:
        """Codeword length of each symbol."""
        return self.lengths[np.asarray(symbols, np.int64) - self.first]

    def write(self, out: BitWriter) -> None:
        """The table itself: first symbol, number of symbols, first length, then differences of lengths."""
        out.write(self.first, 6)
        out.write(len(self.lengths) - 1, 6)
        out.write(int(self.lengths[0]), 4)
        for step in np.diff(self.lengths).tolist():
            out.write_golomb(2 * step - 1 if step > 0 else -2 * step)

    @classmethod
    def read(cls, source: BitReader) -> HuffmanTable:
        """Inverse of `write`."""
        what = "the index code table"
        first, count = source.read(6, what), source.read(6, what) + 1
        lengths = [source.read(4, what)]
        for _ in range(count - 1):
            z = source.read_golomb(0, what, limit=2 * MAX_CODE_LENGTH)
            lengths.append(lengths[-1] + ((z + 1) // 2 if z % 2 else -z // 2))
        return cls(first, lengths)

    def encode(self, out: BitWriter, symbols: np.ndarray) -> None:
        """Write the codewords of `symbols`."""
        at = np.asarray(symbols, np.int64) - self.first
        out.write_many(self.codes[at], self.lengths[at])

    def decode(self, source: BitReader, count: int) -> np.ndarray:
        """Read `count` symbols."""
        if count > source.left:  # a codeword has at least one bit
            raise CorruptError(f"the file ends inside the index stream: {count} codewords cannot fit in {source.left} bits")
        span = min(count * MAX_CODE_LENGTH, source.left)
        ahead = np.concatenate([source.bits[source.position : source.position + span], np.zeros(MAX_CODE_LENGTH, np.uint8)])
        window = np.zeros(span, np.int64)
        for i in range(MAX_CODE_LENGTH):
            window = window << 1 | ahead[i : i + span]
        symbol_at = self._lookup[window].tolist()
        lengths, symbols, position = self.lengths.tolist(), [], 0
        for _ in range(count):
            symbol = symbol_at[position] if position < span else -1
            if symbol < 0:
                raise CorruptError(f"the index stream holds no codeword at bit {source.position + position}")
            symbols.append(symbol)
            position += lengths[symbol]
        source.take(position, "the index stream")
        return np.array(symbols, np.int64) + self.first

    @functools.cached_property
    def _lookup(self) -> np.ndarray:
        """Symbol (less `first`) that each 15-bit window begins with; -1 for none."""
        table = np.full(_WINDOWS, -1, np.int8)
        for i, (code, length) in enumerate(zip(self.codes.tolist(), self.lengths.tolist(), strict=True)):
            free = MAX_CODE_LENGTH - length
            table[code << free : (code + 1) << free] = i
        return table


def _huffman_lengths(counts: list[int]) -> list[int]:
    if len(counts) == 1:
        return [1]
    groups = sorted((c, i, [i]) for i, c in enumerate(counts))
    lengths = [0] * len(counts)
    while len(groups) > 1:
        (a, _, left), (b, order, right) = groups[0], groups[1]
        for i in left + right:
            lengths[i] += 1
        groups = sorted([*groups[2:], (a + b, order, left + right)])
    return lengths
