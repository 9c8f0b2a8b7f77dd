"""Frozen (format 1). The `.mban` file: header, tensor records, index streams, raw tensors.

    bytes 0-3   b"MBN1": magic and format version
    bytes 4-7   CRC-32 of all bytes that follow, little endian
    then bits, most significant first (Gk = exponential Golomb code of order k):
      16 fingerprint of the names and shapes; 1 names follow; 2 reserved, zero; 4 coder; G0 seed
      coder "minimal-random": 5 bits, the length of an index; "trellis": 5 bits memory, 4 bits log2 of the number of frames;
      any other: the octave table (`bits.HuffmanTable`)
      G3 number of records
      names, if they follow: G8 length, padding to a byte, zlib stream of lines "dtype d0,d1,... name"
      for each record its kind: 1 coded, 01 constant, 001 raw, 000 alias; then
        coded     1 trimmed? if so G4 units kept on axis 0, then 1 trimmed on axis 1? if so G4 units kept there
                  1 scale per unit? no: 8 bits, the prior code; yes: G4 units - 1, 8 bits middle code, 3 bits order k,
                  then Gk for each unit: 0 dropped, else 1 + zigzag(code - middle)
                  G2 number of blocks - 1; for the trellis G2 width - 1 and G4 rate - 64
        constant  1 bit: all zero, or all one
        raw       4 bits dtype of the stored values, G8 number of bytes
        alias     G3 number of the record that it repeats
      the index stream: for each coded record the octaves of all its blocks by the table, then the rest of each index raw;
      for the trellis the one stream of all steps (`trellis`), as many bits as are left before the raw bytes
      padding to a byte; the raw records' bytes, little endian; nothing after them

Axes that are not trimmed are "as predicted": axis 1 of a weight follows the units kept by the weight before it, a vector
follows the weight before it, axis 0 of a weight is whole (`resolve_kept`).

Leans on numpy, `bits`, `blocks`, `trellis` and `errors` only.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from .bits import BitReader, BitWriter, HuffmanTable, crc32
from .blocks import LARGEST_DIMENSION
from .errors import CorruptError, MismatchError, NotAnArchiveError, VersionError
from .trellis import LARGEST_MEMORY, LARGEST_STEP_BITS, LARGEST_WIDTH, RATE_UNIT, Rate, words

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"MBN"
FORMAT_VERSION = 1
CODERS = ("gprs", "minimal-random", "rejection", "ordered-random", "a-star", "trellis", "parallel-gprs", "branch-and-bound-gprs",
          "branch-and-bound-a-star")  # fmt: skip
TREES = {"branch-and-bound-gprs", "branch-and-bound-a-star"}  # each weight has an index of its own: a node of `tree`
FIXED_LENGTH = {"minimal-random"}
RAW_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128",
              "uint16", "uint32", "uint64", "opaque")  # fmt: skip
_ITEM_BYTES = (8, 4, 2, 2, 8, 4, 2, 1, 1, 1, 8, 16, 2, 4, 8, 1)
_KINDS = ("coded", "constant", "raw", "alias")
_MAX_RECORDS = 1 << 20
_MAX_DIMENSIONS = 32
_LONGEST_NAME = 2000
_VALUES_PER_BIT = 1 << 12  # a file may declare at most this many values for each of its bits ...
_FREE_VALUES = 1 << 24  # ... and this many whatever its size;
_DRAWN_PER_BIT = 1 << 9  # of a file that declares shapes itself, at most so many weights are drawn for each of its bits ...
_FREE_DRAWN = 1 << 22  # ... and so many whatever its size, which takes less than a second

Kept = tuple[int | None, int | None]


@dataclass
class Record:
    """One entry of the state dict as it stands in the file. What each kind uses is said in the module's docstring.

    Attributes:
        kept: units kept on axes 0 and 1; None where they are as predicted.
        prior_codes: uint8, one for the tensor or one per kept unit; 0 = dropped.
        index: candidate number of each block, from 1.
        rate: for the trellis instead; its `count` is -1 until shapes are known.
        name, shape, dtype: known if the file carries names, or once a model has been bound.
    """

    kind: str
    kept: Kept = (None, None)
    prior_codes: np.ndarray = field(default_factory=lambda: np.zeros(1, np.uint8))
    index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    rate: Rate | None = None
    constant: int = 0
    raw_dtype: str = "float32"
    data: bytes = b""
    alias: int = 0
    name: str | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    bits: float = 0.0


@dataclass
class Path:
    """The stream of a file of the trellis coder (`trellis`).

    Attributes:
        memory, log2_frames: see there.
        bits: uint8 of 0 and 1.
    """

    memory: int
    log2_frames: int = 0
    bits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))

    @functools.cached_property
    def words(self) -> np.ndarray:
        """What `trellis.states` reads."""
        return words(self.bits)


@dataclass
class Archive:
    """A compressed network in memory: what `encode` returns, `save` writes and `open` reads.

    `archive["layer.weight"]` decodes that tensor alone, to torch (`decode.decode_array`: to numpy).
    """

    records: list[Record]
    coder: str = "gprs"
    seed: int = 0
    fingerprint: int = 0
    names: bool = True
    index_bits: int | None = None
    path: Path | None = None
    info: dict = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The whole file.

        Raises:
            MismatchError: it would declare more than a reader believes a file that carries names.
        """
        data = _write(self)
        if self.names:
            values = sum(math.prod(r.shape or ()) for r in self.records)
            too_many = values > _most_values(len(data)) or _drawn(self) > _most_drawn(len(data))
            if too_many or any(len(str(r.name)) > _LONGEST_NAME for r in self.records):
                raise MismatchError(
                    f"{values} values in {len(data)} bytes, or a name over {_LONGEST_NAME} letters: write this file with names=False"
                )
        return data

    @property
    def size_bytes(self) -> int:
        """Size of the file, be it finished or not."""
        return len(_write(self))

    def keys(self) -> list[str]:
        """Names of the tensors.

        Raises:
            MismatchError: the file carries no names and no model has been bound.
        """
        self.require_names()
        return [str(r.name) for r in self.records]

    def require_names(self) -> None:
        """Raise `MismatchError` unless names and shapes are known."""
        if any(r.name is None or r.shape is None for r in self.records):
            raise MismatchError("this file carries no tensor names or shapes (small files leave them out): give the model it was made for")

    def __getitem__(self, name: str) -> Tensor:
        from .load import decode_one  # torch is needed here alone

        return decode_one(self, name)


def prior_std(codes: np.ndarray) -> np.ndarray:
    """The prior standard deviation that an 8-bit code stands for: float32, exact; 0 for code 0.

    Code 8 e + m is (8 + m) * 2^(e - 28): eight steps an octave from 3e-8 to 120.
    """
    codes = np.asarray(codes, np.int64)
    return np.where(codes == 0, 0.0, np.ldexp((8 + codes % 8).astype(np.float64), codes // 8 - 28)).astype(np.float32)


def prior_code(std: np.ndarray) -> np.ndarray:
    """The nearest code (in ratio) of each standard deviation: uint8, at least 1 for any positive one."""
    table = np.log(prior_std(np.arange(1, 256)).astype(np.float64))
    wanted = np.log(np.maximum(np.asarray(std, np.float64), 1e-30))
    above = np.clip(np.searchsorted(table, wanted), 1, 254)
    nearest = np.where(wanted - table[above - 1] < table[above] - wanted, above - 1, above)
    return np.where(np.asarray(std) > 0, nearest + 1, 0).astype(np.uint8)


def fingerprint(entries: list[tuple[str, tuple[int, ...]]]) -> int:
    """16 bits of the CRC-32 of all names and shapes, in order."""
    text = "".join(f"{name} {','.join(map(str, shape))}\n" for name, shape in entries)
    return crc32(text.encode()) & 0xFFFF


def resolve_kept(records: list[Record]) -> list[tuple[int, ...]]:
    """Live shape of every record (shapes must be known).

    Raises:
        CorruptError: more units kept than there are.
    """
    live: list[tuple[int, ...]] = []
    weight_full = weight_live = 0  # axis 0 of the latest coded weight (two axes or more)
    for r in records:
        shape = r.shape or ()
        kept = list(shape)
        if r.kind == "coded" and len(shape) >= 1:
            if r.kept[0] is not None:
                kept[0] = r.kept[0]
            elif len(shape) == 1 and shape[0] == weight_full:
                kept[0] = weight_live
            if len(shape) >= 2:
                if r.kept[1] is not None:
                    kept[1] = r.kept[1]
                elif weight_full and shape[1] % weight_full == 0:
                    kept[1] = weight_live * (shape[1] // weight_full)
                weight_full, weight_live = shape[0], kept[0]
            if any(k > s for k, s in zip(kept, shape, strict=True)):
                raise CorruptError(f"{r.name} keeps {kept} of {shape} units")
        live.append(tuple(kept))
    return live


def _write(archive: Archive) -> bytes:
    out = BitWriter()
    out.write(archive.fingerprint, 16)
    out.write(int(archive.names), 1)
    out.write(0, 2)
    out.write(CODERS.index(archive.coder), 4)
    out.write_golomb(archive.seed)
    coded = [r for r in archive.records if r.kind == "coded"]
    table = None
    path = archive.path
    if path is not None:
        out.write(path.memory, 5)
        out.write(path.log2_frames, 4)
    elif archive.coder in FIXED_LENGTH:
        out.write(archive.index_bits or 1, 5)
    else:
        every = np.concatenate([r.index for r in coded]) if coded else np.ones(0, np.int64)
        table = HuffmanTable.fit(octaves(every if len(every) else np.ones(1)))
        table.write(out)
    out.write_golomb(len(archive.records), 3)
    if archive.names:
        lines = "".join(f"{r.dtype} {','.join(map(str, r.shape or ()))} {r.name}\n" for r in archive.records)
        packed = zlib.compress(lines.encode(), 9)
        out.write_golomb(len(packed), 8)
        out.align()
        out.write_bytes(packed)
    for r in archive.records:
        _write_record(out, r)
    if path is not None:
        out.write_bits(path.bits)
    for r in coded:
        before = out.length
        if r.rate is not None:
            r.bits = max(r.rate.bits, 0)  # unknown until shapes are
            continue
        if table is None:
            out.write_many(r.index - 1, np.full(len(r.index), archive.index_bits))
        else:
            octave = octaves(r.index)
            table.encode(out, octave)
            out.write_many(r.index - (np.int64(1) << octave), octave)
        r.bits = out.length - before
    out.align()
    body = out.to_bytes() + b"".join(r.data for r in archive.records if r.kind == "raw")
    return MAGIC + b"%d" % FORMAT_VERSION + crc32(body).to_bytes(4, "little") + body


def _write_record(out: BitWriter, r: Record) -> None:
    kind = _KINDS.index(r.kind)
    out.write(0 if kind == 3 else 1, min(kind + 1, 3))
    if r.kind == "coded":
        trimmed = r.kept != (None, None)
        out.write(int(trimmed), 1)
        if trimmed:
            if r.kept[0] is None:
                raise ValueError("axis 0 must be given where axis 1 is")
            out.write_golomb(r.kept[0], 4)
            out.write(int(r.kept[1] is not None), 1)
            if r.kept[1] is not None:
                out.write_golomb(r.kept[1], 4)
        out.write(int(len(r.prior_codes) > 1), 1)
        if len(r.prior_codes) > 1:
            _write_unit_codes(out, r.prior_codes)
        else:
            out.write(int(r.prior_codes[0]), 8)
        if r.rate is not None:
            out.write_golomb(r.rate.width - 1, 2)
            out.write_golomb(r.rate.rate - RATE_UNIT, 4)
        else:
            out.write_golomb(len(r.index) - 1, 2)
    elif r.kind == "constant":
        out.write(r.constant, 1)
    elif r.kind == "raw":
        out.write(RAW_DTYPES.index(r.raw_dtype), 4)
        out.write_golomb(len(r.data), 8)
    else:
        out.write_golomb(r.alias, 3)


def _write_unit_codes(out: BitWriter, codes: np.ndarray) -> None:
    codes = codes.astype(np.int64)
    middle = int(np.median(codes[codes > 0])) if (codes > 0).any() else 0
    step = codes - middle
    symbols = np.where(codes == 0, 0, 1 + np.where(step > 0, 2 * step - 1, -2 * step))
    sizes = [sum(2 * (int(s) + (1 << k)).bit_length() - 1 - k for s in symbols) for k in range(8)]
    order = int(np.argmin(sizes))
    out.write_golomb(len(codes) - 1, 4)
    out.write(middle, 8)
    out.write(order, 3)
    for s in symbols.tolist():
        out.write_golomb(s, order)


def _read_unit_codes(source: BitReader) -> np.ndarray:
    what = "the prior codes"
    units = source.read_golomb(4, what, limit=source.left) + 1
    middle, order = source.read(8, what), source.read(3, what)
    codes = np.zeros(units, np.uint8)
    for i in range(units):
        symbol = source.read_golomb(order, what, limit=512)
        if symbol:
            z = symbol - 1
            code = middle + ((z + 1) // 2 if z % 2 else -z // 2)
            if not 1 <= code <= 255:
                raise CorruptError(f"{what}: unit {i} has code {code}, outside 1 to 255")
            codes[i] = code
    return codes


def parse(data: bytes) -> Archive:
    """Read a whole file; nothing is decoded.

    Raises:
        NotAnArchiveError, VersionError, CorruptError: see `errors`.
    """
    if len(data) < 8 or data[:3] != MAGIC:
        raise NotAnArchiveError(f"not a .mban file: it begins with {data[:4]!r} and has {len(data)} bytes")
    if data[3:4] != b"%d" % FORMAT_VERSION:
        raise VersionError(f"format version {data[3:4]!r}; this release reads version {FORMAT_VERSION}: update miracle_ban")
    if int.from_bytes(data[4:8], "little") != crc32(data[8:]):
        raise CorruptError(f"checksum mismatch: the file ({len(data)} bytes) is damaged or cut; fetch it again")
    source = BitReader(data[8:])
    mark, names, reserved = source.read(16, "the header"), bool(source.read(1, "the header")), source.read(2, "the header")
    if reserved:
        raise VersionError("the file uses features newer than this release: update miracle_ban")
    coder_id = source.read(4, "the header")
    if coder_id >= len(CODERS):
        raise VersionError(f"the file uses coder number {coder_id}, unknown to this release: update miracle_ban")
    archive = Archive([], CODERS[coder_id], source.read_golomb(0, "the seed", limit=(1 << 64) - 1), mark, names)
    table = None
    if archive.coder == "trellis":
        archive.path = Path(source.read(5, "the header"), source.read(4, "the header"))
        if not 1 <= archive.path.memory <= LARGEST_MEMORY:
            raise CorruptError(f"a trellis with a memory of {archive.path.memory} bits: {LARGEST_MEMORY} is the most")
    elif archive.coder in FIXED_LENGTH:
        archive.index_bits = source.read(5, "the index length")
    else:
        table = HuffmanTable.read(source)
    count = source.read_golomb(3, "the number of tensors", limit=min(_MAX_RECORDS, source.left))
    heads = _read_names(source, count, len(data)) if names else [(None, None, None)] * count
    blocks: list[int] = []
    raw_bytes: list[int] = []
    kinds: list[str] = []
    for i in range(count):
        archive.records.append(_read_record(source, kinds, blocks, raw_bytes, archive.path is not None))
        kinds.append(archive.records[-1].kind)
        archive.records[-1].dtype, archive.records[-1].shape, archive.records[-1].name = heads[i]
    if archive.path is not None:
        archive.path.bits = source.take(source.left - 8 * sum(raw_bytes), "the index stream")
    for r, number in zip([r for r in archive.records if r.kind == "coded" and r.rate is None], blocks, strict=True):
        before = source.position
        if table is None:
            bits = archive.index_bits or 0
            if number * max(bits, 1) > source.left:
                raise CorruptError(
                    f"the file ends inside the index stream: {number} indices of {bits} bits wanted, {source.left} bits left"
                )
            r.index = source.read_many(np.full(number, bits, np.int64), "the index stream") + 1
        else:
            octave = table.decode(source, number)
            if number and int(octave.max()) > 31:
                raise CorruptError(f"an index of {int(octave.max())} bits: 31 is the most")
            r.index = (np.int64(1) << octave) + source.read_many(octave, "the index stream")
        r.bits = source.position - before
    source.align()
    for r, length in zip([r for r in archive.records if r.kind == "raw"], raw_bytes, strict=True):
        r.data = source.read_bytes(length, "a raw tensor")
    if source.left:
        raise CorruptError(f"{source.left // 8} bytes stand after the end of the last tensor")
    if names:
        check_shapes(archive)
        if (drawn := _drawn(archive)) > _most_drawn(len(data)):
            raise CorruptError(f"{drawn} weights to be drawn for a file of {len(data)} bytes: more than this format allows")
    return archive


def _read_names(source: BitReader, count: int, file_bytes: int) -> list[tuple[str, tuple[int, ...], str]]:
    length = source.read_golomb(8, "the names", limit=source.left // 8)
    source.align()
    limit = 64 + 4096 * count
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(source.read_bytes(length, "the names"), limit)
        if not unpacker.eof or text.count(b"\n") != count or not text.endswith(b"\n" if count else b""):
            raise CorruptError(f"the names are not {count} lines")
        lines = text.decode().split("\n")[:-1]
    except (zlib.error, UnicodeDecodeError) as error:
        raise CorruptError(f"the names cannot be read: {error}") from None
    heads, values = [], 0
    for line in lines:
        dtype, _, rest = line.partition(" ")
        dims, _, name = rest.partition(" ")
        parts = dims.split(",") if dims else []
        if not dtype or len(parts) > _MAX_DIMENSIONS or not all(p.isascii() and p.isdigit() and len(p) <= 15 for p in parts):
            raise CorruptError(f"not a tensor's name and shape: {line[:80]!r}")
        shape = tuple(int(p) for p in parts)
        values += math.prod(shape)
        heads.append((dtype, shape, name))
    if values > _most_values(file_bytes):
        raise CorruptError(f"{values} values declared by a file of {file_bytes} bytes: more than this format can hold in it")
    if len({h[2] for h in heads}) != count:
        raise CorruptError("two tensors have the same name")
    return heads


def _read_record(source: BitReader, kinds: list[str], blocks: list[int], raw_bytes: list[int], trellis: bool) -> Record:
    position = len(kinds)
    what = f"tensor {position}"
    kind = 0
    while kind < 3 and not source.read(1, what):
        kind += 1
    record = Record(_KINDS[kind])
    if kind == 0:
        if source.read(1, what):
            axis_0 = source.read_golomb(4, what, limit=1 << 40)
            record.kept = (axis_0, source.read_golomb(4, what, limit=1 << 40) if source.read(1, what) else None)
        record.prior_codes = _read_unit_codes(source) if source.read(1, what) else np.array([source.read(8, what)], np.uint8)
        if trellis:
            width = source.read_golomb(2, what, limit=LARGEST_WIDTH - 1) + 1
            record.rate = Rate(-1, width, source.read_golomb(4, what, limit=RATE_UNIT * (LARGEST_STEP_BITS - 1)) + RATE_UNIT)
        else:
            blocks.append(source.read_golomb(2, what, limit=source.left) + 1)
    elif kind == 1:
        record.constant = source.read(1, what)
    elif kind == 2:
        record.raw_dtype = RAW_DTYPES[source.read(4, what)]
        raw_bytes.append(source.read_golomb(8, what, limit=source.left // 8))
    else:
        record.alias = source.read_golomb(3, what, limit=max(position - 1, 0))
        if record.alias >= position or kinds[record.alias] == "alias":
            raise CorruptError(f"{what} repeats tensor {record.alias}, which is no tensor of its own before it")
    return record


def check_shapes(archive: Archive) -> None:
    """Check every record against its shape.

    Raises:
        CorruptError: blocks, prior codes or raw bytes do not fit a shape.
    """
    for i, (r, live) in enumerate(zip(archive.records, resolve_kept(archive.records), strict=True)):
        shape = r.shape or ()
        if r.kind == "coded":
            units = live[0] if live else 1
            if len(r.prior_codes) not in (1, units):
                raise CorruptError(f"tensor {i} ({r.name}) has {len(r.prior_codes)} prior scales for {units} units")
            count = live_count(r, live)
            if r.rate is not None:
                r.rate = replace(r.rate, count=count)
                r.bits = r.rate.bits
            elif archive.coder in TREES and len(r.index) != max(count, 1):
                raise CorruptError(f"tensor {i} ({r.name}) has {len(r.index)} indices for {count} weights, one for each wanted")
            elif len(r.index) > max(count, 1) or -(-count // len(r.index)) > LARGEST_DIMENSION:
                raise CorruptError(f"tensor {i} ({r.name}) has {len(r.index)} blocks for {count} weights")
        elif r.kind == "raw":
            size = _ITEM_BYTES[RAW_DTYPES.index(r.raw_dtype)] * math.prod(shape)
            if size != len(r.data):
                raise CorruptError(f"tensor {i} ({r.name}) of shape {shape} holds {len(r.data)} bytes, not {size}")
        elif r.kind == "alias" and archive.records[r.alias].shape != shape:
            raise CorruptError(f"tensor {i} ({r.name}) repeats a tensor of another shape, {archive.records[r.alias].shape}")
    if archive.path is not None:
        needed, held = sum(rate.bits for rate in rates(archive).values()), archive.path.bits
        if not 0 <= len(held) - needed < 8 or held[needed:].any():
            raise CorruptError(f"the index stream holds {len(held)} bits, the tensors need {needed} and padding of zeros to a byte")


def rates(archive: Archive) -> dict[int, Rate]:
    """The rates of all coded records of a file of the trellis coder, by number."""
    return {i: r.rate for i, r in enumerate(archive.records) if r.rate is not None}


def live_count(record: Record, live: tuple[int, ...]) -> int:
    """Weights that are coded: all live ones, less those of units with prior code 0."""
    if len(record.prior_codes) == 1:
        return math.prod(live) if record.prior_codes[0] else 0
    return int((record.prior_codes > 0).sum()) * math.prod(live[1:])


def _drawn(archive: Archive) -> int:
    """Weights that decoding draws."""
    return sum(live_count(r, live) for r, live in zip(archive.records, resolve_kept(archive.records), strict=True) if r.kind == "coded")


def _most_values(file_bytes: int) -> int:
    return max(_FREE_VALUES, _VALUES_PER_BIT * 8 * file_bytes)


def _most_drawn(file_bytes: int) -> int:
    return max(_FREE_DRAWN, _DRAWN_PER_BIT * 8 * file_bytes)


def octaves(index: np.ndarray) -> np.ndarray:
    """floor(log2 k), exactly, for k below 2^52."""
    return np.frexp(np.asarray(index, np.float64))[1].astype(np.int64) - 1
