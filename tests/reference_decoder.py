"""A second decoder of `.mban` files: plain Python, no numpy, written from miracle_ban/FORMAT.md, whose sections the numbers name.

    python tests/reference_decoder.py net.mban              SHA-256 of all tensors, little endian, one after the other
    python tests/reference_decoder.py net.mban heads.txt    of a file without names: lines "dtype d0,d1,... name", as in section 4

Meant to be read, not to be fast.
"""

from __future__ import annotations

import functools
import hashlib
import math
import pathlib
import struct
import sys
import zlib
from collections.abc import Iterator
from types import SimpleNamespace

MASK = 0xFFFFFFFF
MINIMAL_RANDOM, TRELLIS, CODERS, TREES = 1, 5, 9, (7, 8)
DTYPES = {
    "float64": "d", "float32": "f", "float16": "e", "bfloat16": "H", "int64": "q", "int32": "i", "int16": "h", "int8": "b",
    "uint8": "B", "bool": "?", "complex64": "ff", "complex128": "dd", "uint16": "H", "uint32": "I", "uint64": "Q", "opaque": "B",
}  # fmt: skip
Head = tuple[str, tuple[int, ...], str]


class RefusedError(Exception):
    """A file that a reader has to refuse."""


def need(right: bool, what: str) -> None:
    if not right:
        raise RefusedError(what)


class Bits:
    """Section 2."""

    def __init__(self, data: bytes):
        self.text, self.at = "".join(f"{b:08b}" for b in data), 0

    @property
    def left(self) -> int:
        return len(self.text) - self.at

    def take(self, count: int) -> str:
        need(0 <= count <= self.left, "the file ends too early")
        self.at += count
        return self.text[self.at - count : self.at]

    def read(self, count: int) -> int:
        return int("0" + self.take(count), 2)

    def golomb(self, order: int, most: int = 1 << 62) -> int:
        zeros = 0
        while self.take(1) == "0":
            zeros += 1
            need(zeros <= 64, "no number begins with so many zeros")
        value = (1 << zeros + order | self.read(zeros + order)) - (1 << order)
        need(value <= most, "a number over its limit")
        return value

    def bytes(self, count: int) -> bytes:
        need(self.read(-self.at % 8) == 0, "padding that is not zero")
        return self.read(8 * count).to_bytes(count, "big")


class File:
    """A file read and checked, sections 3 to 6; `tensor(i)` decodes. `heads` are those of section 4, for a file that has none."""

    def __init__(self, data: bytes, heads: list[Head] | None = None):
        need(len(data) >= 8 and data[:4] == b"MBN1", "not a file of this format")
        need(int.from_bytes(data[4:8], "little") == zlib.crc32(data[8:]), "checksum")
        bits = Bits(data[8:])
        self.fingerprint, self.names = bits.read(16), bits.read(1)
        need(bits.read(2) == 0, "reserved bits")
        self.coder = bits.read(4)
        need(self.coder < CODERS, "an unknown coder")
        self.seed = bits.golomb(0, (1 << 64) - 1)
        if self.coder == TRELLIS:
            self.memory, self.frames = bits.read(5), 1 << bits.read(4)
            need(1 <= self.memory <= 20, "memory")
        else:
            self.table = bits.read(5) if self.coder == MINIMAL_RANDOM else read_table(bits)
        count = bits.golomb(3, min(1 << 20, bits.left))
        heads = read_heads(bits, count, len(data)) if self.names else heads
        self.records: list[SimpleNamespace] = []
        for _ in range(count):
            self.records.append(self.read_record(bits))
        raw = [r for r in self.records if r.kind == "raw"]
        if self.coder == TRELLIS:
            self.path = bits.take(bits.left - 8 * sum(r.size for r in raw))
        for r in self.records:
            if r.kind == "coded" and self.coder != TRELLIS:
                r.index = self.read_indices(bits, r.blocks)
        bits.bytes(0)
        for r in raw:
            r.data = bits.bytes(r.size)
        need(bits.left == 0, "bytes after the end")
        if heads is not None:
            text = "".join(f"{name} {','.join(map(str, shape))}\n" for _, shape, name in heads)
            need(self.names or (len(heads), zlib.crc32(text.encode()) & 0xFFFF) == (count, self.fingerprint), "another architecture")
            for r, own in zip(self.records, heads):
                r.dtype, r.shape, r.name = own
            self.check(len(data))

    def read_record(self, bits: Bits) -> SimpleNamespace:
        kind = "coded" if bits.read(1) else "constant" if bits.read(1) else "raw" if bits.read(1) else "alias"
        r = SimpleNamespace(kind=kind, kept=(None, None), count=0)
        if kind == "coded":
            if bits.read(1):
                r.kept = (bits.golomb(4, 1 << 40), bits.golomb(4, 1 << 40) if bits.read(1) else None)
            r.codes = read_codes(bits) if bits.read(1) else [bits.read(8)]
            if self.coder == TRELLIS:
                r.width, r.rate = bits.golomb(2, 255) + 1, bits.golomb(4, 448) + 64
            else:
                r.blocks = bits.golomb(2, bits.left) + 1
        elif kind == "constant":
            r.constant = bits.read(1)
        elif kind == "raw":
            r.stored, r.size = list(DTYPES)[bits.read(4)], bits.golomb(8, bits.left // 8)
        else:
            r.alias = bits.golomb(3)
            need(r.alias < len(self.records) and self.records[r.alias].kind != "alias", "an alias of no tensor before it")
        return r

    def read_indices(self, bits: Bits, count: int) -> list[int]:
        need(count <= bits.left, "more indices than bits")
        if self.coder == MINIMAL_RANDOM:
            return [bits.read(self.table) + 1 for _ in range(count)]
        octaves = [read_symbol(bits, self.table) for _ in range(count)]
        need(max(octaves) <= 31, "an index of more than 31 bits")
        return [1 << octave | bits.read(octave) for octave in octaves]

    def check(self, size: int) -> None:
        """Sections 5.2 and 10: live shapes, and whether the records fit them."""
        full = live = 0
        for r in self.records:
            r.live = kept = list(r.shape)
            if r.kind == "coded":
                if kept:
                    kept[0] = r.kept[0] if r.kept[0] is not None else live if len(kept) == 1 and kept[0] == full else kept[0]
                if len(kept) > 1:
                    follows = full and kept[1] % full == 0
                    kept[1] = r.kept[1] if r.kept[1] is not None else live * (kept[1] // full) if follows else kept[1]
                    full, live = r.shape[0], kept[0]
                need(all(k <= s for k, s in zip(kept, r.shape)), "more kept than there is")
                need(len(r.codes) in (1, kept[0] if kept else 1), "prior codes")
                r.row = math.prod(kept if len(r.codes) == 1 else kept[1:])  # weights for each prior code
                r.used = [u for u, code in enumerate(r.codes) if code]
                r.count = len(r.used) * r.row
                if self.coder == TRELLIS:
                    r.steps = -(-r.count // r.width)
                elif self.coder in TREES:
                    need(r.blocks == max(r.count, 1), "one index for each weight")
                else:
                    need(r.blocks <= max(r.count, 1) and -(-r.count // r.blocks) <= 4096, "blocks")
            elif r.kind == "raw":
                need(struct.calcsize("<" + DTYPES[r.stored]) * math.prod(r.shape) == r.size, "raw bytes")
            elif r.kind == "alias":
                need(self.records[r.alias].shape == r.shape, "an alias of another shape")
        if self.coder == TRELLIS:
            needed = sum(r.steps * r.rate // 64 for r in self.records if r.kind == "coded")
            need(0 <= len(self.path) - needed < 8 and "1" not in self.path[needed:], "length of the stream")
        need(not self.names or sum(r.count for r in self.records) <= max(1 << 22, 4096 * size), "too many weights to draw")

    def tensor(self, number: int) -> bytes:
        """All of a tensor, little endian (section 9)."""
        r = self.records[number]
        source = self.records[r.alias] if r.kind == "alias" else r
        if source.kind == "raw":
            return recast(source.data, source.stored, r.dtype)
        values = [float(source.constant) if source.kind == "constant" else 0.0] * math.prod(r.shape)
        for place, value in self.weights(r.alias if r.kind == "alias" else number) if source.kind == "coded" else ():
            values[place] = value
        return b"".join(pack(v, r.dtype) for v in values)

    def weights(self, number: int, some: list[int] | None = None) -> Iterator[tuple[int, float]]:
        """(place in the flat tensor, float32 value) of all drawn weights, or of those of some blocks or steps."""
        r = self.records[number]
        drawn = self.steps(number, some) if self.coder == TRELLIS else self.blocks(number, some)
        for position, value in drawn if r.count else ():
            unit, at = r.used[position // r.row], position % r.row
            at, place, stride = unit * r.row + at, 0, 1  # from the live tensor to the whole one
            for kept, size in zip(reversed(r.live), reversed(r.shape)):
                place, at, stride = place + at % kept * stride, at // kept, stride * size
            yield place, single((8 + r.codes[unit] % 8) * 2.0 ** (r.codes[unit] // 8 - 28) * value)

    def blocks(self, t: int, some: list[int] | None) -> Iterator[tuple[int, float]]:
        """Sections 8.1 and 8.2: (position among the drawn weights, value in units of the prior)."""
        r = self.records[t]
        d, place = -(-r.count // r.blocks), order(self.seed, t, r.count)
        for b in range(r.blocks) if some is None else some:
            if self.coder in TREES:
                yield place[b], node(self.seed, t, b, r.index[b])
                continue
            z = normals(self.seed, r.index[b] - 1, b + 1 if d <= 8 else 0, 16 * t if d <= 8 else 0, d)
            turn, signs = words(self.seed, 0, b, 16 * t + 2, 1)[0] % d, words(self.seed, 0, b, 16 * t + 1, -(-d // 32))
            for j in range(d):
                if j * r.blocks + b < r.count:
                    yield place[j * r.blocks + b], (-1) ** (signs[j // 32] >> j % 32 & 1) * z[(j - turn) % d] * 2.0**-20

    def steps(self, t: int, some: list[int] | None) -> Iterator[tuple[int, float]]:
        """Section 8.3, likewise."""
        r = self.records[t]
        total, starts = r.steps, self.starts[t]
        a = max(total * 2654435769 >> 32, 1)
        while math.gcd(a, total) > 1:
            a += 1
        shifts = [words(self.seed, 0, j, 16 * t + 3, 1)[0] % total for j in range(r.width)]
        for u in range(total) if some is None else some:
            frame = u * self.frames // total
            end = starts[frame] + (u + 1) * r.rate // 64 - self.first_step(total, frame) * r.rate // 64
            state = int("0" + self.path[max(end - self.memory, 0) : end], 2)
            minus = words(self.seed, 0, u // 128, 16 * t + 1, 4)[u // 32 % 4] >> u % 32 & 1
            for j, z in enumerate(normals(self.seed, state, 0, 0, r.width)):
                position = j * total + (a * u + shifts[j]) % total
                if position < r.count:
                    yield position, (-1) ** minus * z * 2.0**-20

    def first_step(self, steps: int, frame: int) -> int:
        return -(-frame * steps // self.frames)

    @functools.cached_property
    def starts(self) -> dict[int, list[int]]:
        """Bit of the stream at which each tensor's part of each frame begins."""
        coded = {i: r for i, r in enumerate(self.records) if r.kind == "coded"}
        found: dict[int, list[int]] = {i: [] for i in coded}
        at = 0
        for f in range(self.frames):
            for i, r in coded.items():
                found[i].append(at)
                at += self.first_step(r.steps, f + 1) * r.rate // 64 - self.first_step(r.steps, f) * r.rate // 64
        return found


def signed(z: int) -> int:
    return (z + 1) // 2 if z % 2 else -(z // 2)


def read_table(bits: Bits) -> dict[str, int]:
    """Section 3.1: codeword -> octave."""
    first, count, lengths = bits.read(6), bits.read(6) + 1, [bits.read(4)]
    while len(lengths) < count:
        lengths.append(lengths[-1] + signed(bits.golomb(0, 30)))
    need(all(1 <= n <= 15 for n in lengths) and sum(1 << 15 - n for n in lengths) <= 1 << 15, "no prefix code")
    table, code = {}, 0
    for i in sorted(range(count), key=lambda i: (lengths[i], i)):
        table[f"{code >> 15 - lengths[i]:0{lengths[i]}b}"] = first + i
        code += 1 << 15 - lengths[i]
    return table


def read_symbol(bits: Bits, table: dict[str, int]) -> int:
    word = ""
    while word not in table:
        need(len(word) < 15, "no codeword")
        word += bits.take(1)
    return table[word]


def read_codes(bits: Bits) -> list[int]:
    """Section 5.1: one prior code for each unit."""
    units, middle, order = bits.golomb(4, bits.left) + 1, bits.read(8), bits.read(3)
    symbols = [bits.golomb(order, 512) for _ in range(units)]
    codes = [middle + signed(s - 1) if s else 0 for s in symbols]
    need(all(1 <= c <= 255 for c, s in zip(codes, symbols) if s), "a prior code outside 1 to 255")
    return codes


def read_heads(bits: Bits, count: int, size: int) -> list[Head]:
    """Section 4."""
    length, stream = bits.golomb(8, bits.left // 8), zlib.decompressobj()
    try:
        lines = stream.decompress(bits.bytes(length), 64 + 4096 * count).decode().split("\n")
    except (zlib.error, UnicodeDecodeError) as error:
        raise RefusedError("names") from error
    need(stream.eof and len(lines) == count + 1 and lines[-1] == "", "names")
    heads = [head(line) for line in lines[:-1]]
    need(len({name for _, _, name in heads}) == count, "two tensors of one name")
    need(sum(math.prod(shape) for _, shape, _ in heads) <= max(1 << 24, 32768 * size), "more values than a file may declare")
    return heads


def head(line: str) -> Head:
    dtype, _, rest = line.partition(" ")
    dims, _, name = rest.partition(" ")
    parts = dims.split(",") if dims else []
    need(bool(dtype) and len(parts) <= 32 and all(p.isascii() and p.isdigit() and len(p) <= 15 for p in parts), "a line of names")
    return dtype, tuple(map(int, parts)), name


@functools.lru_cache(1 << 16)
def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Section 7.1."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = q >> 32 ^ b ^ k, q & MASK, p >> 32 ^ d ^ m, p & MASK
        k, m = k + 0x9E3779B9 & MASK, m + 0xBB67AE85 & MASK
    return a, b, c, d


def words(seed: int, candidate: int, block: int, stream: int, count: int) -> list[int]:
    key = (seed & MASK, seed >> 32)
    return [w for lane in range(-(-count // 4)) for w in philox((candidate, block, lane, stream & MASK), key)][:count]


def normals(seed: int, candidate: int, block: int, stream: int, count: int) -> list[int]:
    """Section 7.2, in units of 2^-20."""
    drawn = words(seed, candidate, block, stream, -(-count // 2))
    return [normal_table()[half] for w in drawn for half in (w & 0xFFFF, w >> 16)][:count]


@functools.cache
def normal_table() -> list[int]:
    return [round(quantile((j + 0.5) / 65536) * 2**20) for j in range(65536)]


def order(seed: int, tensor: int, count: int) -> list[int]:
    drawn = [w for b in range(-(-count // 4)) for w in words(seed, 0, b, 16 * tensor + 3, 4)]
    return sorted(range(count), key=lambda i: (drawn[i], i))


MIDDLE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip


def quantile(p: float) -> float:
    """Section 7.3: every operation is one of IEEE double precision, in just this order."""
    q = p - 0.5
    if abs(q) <= 0.425:
        return q * ratio(0.180625 - q * q, MIDDLE)
    tail = ratio(math.sqrt(-log(min(p, 1.0 - p))) - 1.6, TAIL)
    return -tail if q < 0.0 else tail


def ratio(x: float, coefficients: tuple) -> float:
    above, below = (functools.reduce(lambda value, c: value * x + c, row) for row in coefficients)
    return above / below


def log(x: float) -> float:
    mantissa, exponent = math.frexp(x)
    if mantissa < 0.7071067811865476:
        mantissa, exponent = mantissa * 2.0, exponent - 1
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square, total = s * s, 0.0
    for k in range(21, 0, -2):
        total = total * square + 1.0 / k
    return exponent * 0.6931471805599453 + 2.0 * s * total


def node(seed: int, tensor: int, block: int, number: int) -> float:
    """Section 8.2."""
    drawn, low, high = words(seed, 0, block, 16 * tensor + 5, 32), 0, 1 << 32
    for word, turn in zip(drawn, f"{number:b}"[1:]):
        u = low + (word * (high - low) >> 32)
        low, high = (min(u + 1, high), high) if turn == "1" else (low, u)
    u = low + (drawn[number.bit_length() - 1] * (high - low) >> 32)
    return single(quantile((min(u, MASK) + 0.5) * 2.0**-32))


def single(x: float) -> float:
    """To float32: the nearest, ties to even."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def recast(data: bytes, stored: str, dtype: str) -> bytes:
    """Section 9.2: raw bytes of one dtype as those of another."""
    if stored == dtype:
        return data
    values = (part if len(part) > 1 else part[0] for part in struct.iter_unpack("<" + DTYPES[stored], data))
    return b"".join(pack(struct.unpack("<f", struct.pack("<I", v << 16))[0] if stored == "bfloat16" else v, dtype) for v in values)


def pack(value: float | tuple[float, float], dtype: str) -> bytes:
    """Section 9.2: a value in the tensor's own dtype."""
    need(dtype in DTYPES and dtype != "opaque", "an unknown dtype")
    if dtype.startswith("complex"):
        return struct.pack("<" + DTYPES[dtype], *(value if isinstance(value, tuple) else (value, 0.0)))
    real = value[0] if isinstance(value, tuple) else value
    if dtype == "bfloat16":
        bits = struct.unpack("<I", struct.pack("<f", real))[0]
        return struct.pack("<H", bits + 0x7FFF + (bits >> 16 & 1) >> 16)
    if "int" in dtype:
        size = struct.calcsize(DTYPES[dtype])
        return (int(real) % (1 << 8 * size)).to_bytes(size, "little")
    try:
        return struct.pack("<" + DTYPES[dtype], real)
    except OverflowError:
        return struct.pack("<" + DTYPES[dtype], math.copysign(math.inf, real))


def digest(file: File) -> str:
    """SHA-256 of all tensors."""
    return hashlib.sha256(b"".join(map(file.tensor, range(len(file.records))))).hexdigest()


if __name__ == "__main__":
    given = [head(line) for line in pathlib.Path(sys.argv[2]).read_text().splitlines()] if len(sys.argv) > 2 else None
    print(digest(File(pathlib.Path(sys.argv[1]).read_bytes(), given)))
