from __future__ import annotations

import math
import time
import tracemalloc

import helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_ban import decode as decode_state
from miracle_ban.bits import BitWriter, crc32
from miracle_ban.container import (
    CODERS,
    FIXED_LENGTH,
    RAW_DTYPES,
    TREES,
    Archive,
    Path,
    Record,
    check_shapes,
    fingerprint,
    live_count,
    octaves,
    parse,
    prior_code,
    prior_std,
    rates,
    resolve_kept,
)
from miracle_ban.decode import stored_array
from miracle_ban.errors import CorruptError, FileFormatError, MiracleError, MismatchError, NotAnArchiveError, VersionError
from miracle_ban.load import bind
from miracle_ban.trellis import Rate

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "complex64": 8, "complex128": 16, "uint16": 2, "uint32": 4, "uint64": 8, "opaque": 1,
}  # fmt: skip

# --- archives of every kind ---

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
texts = st.text(st.characters(exclude_characters="\n\r", exclude_categories=("Cs",)), max_size=20)


@st.composite
def coded_records(draw, before: list[Record], largest_index: int, coder: str) -> Record:
    shape = draw(shapes | st.sampled_from([(), (40,), (17, 5), (3, 4, 3, 3)]))
    if before and draw(st.booleans()):  # an axis that follows the weight before it, as the layers of a network do
        size = (before[-1].shape or (3,))[0]
        shape = draw(st.sampled_from([(size,), (4, size), (5, 2 * size)]))
    record = Record("coded", shape=shape)
    if shape and draw(st.booleans()):
        second = draw(st.none() | st.integers(0, shape[1])) if len(shape) > 1 else None
        record.kept = (draw(st.integers(0, shape[0])), second)
    live = resolve_kept([*before, record])[-1]
    units = live[0] if live else 1
    per_unit = units > 1 and draw(st.booleans())
    number = units if per_unit else 1
    codes = draw(st.lists(st.integers(0, 255) | st.sampled_from([0, 120, 121]), min_size=number, max_size=number))
    record.prior_codes = np.array(codes, np.uint8)
    count = live_count(record, live)
    if coder == "trellis":
        width = draw(st.integers(1, 256))
        record.rate = Rate(count, width, draw(st.integers(64, 512)))
        return record
    most = max(min(count, 12), 1)
    least = max(count, 1) if coder in TREES else 1  # one index for each weight
    index = draw(st.lists(st.integers(1, largest_index), min_size=least, max_size=max(least, most)))
    record.index = np.array(index, np.int64)
    return record


@st.composite
def raw_records(draw) -> Record:
    dtype, shape = draw(st.sampled_from(RAW_DTYPES)), draw(shapes)
    size = ITEM_BYTES[dtype] * math.prod(shape)
    return Record("raw", raw_dtype=dtype, data=bytes(i * 37 % 251 for i in range(size)), shape=shape)


@st.composite
def archives(draw) -> Archive:
    coder = draw(st.sampled_from(CODERS))
    index_bits = draw(st.integers(1, 24)) if coder in FIXED_LENGTH else None
    largest_index = 1 << (index_bits or draw(st.sampled_from([1, 12, 31])))
    records: list[Record] = []
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["coded", "coded", "constant", "raw", "alias"] if records else ["coded", "constant", "raw"]))
        if kind == "coded":
            records.append(draw(coded_records(records, largest_index, coder)))
        elif kind == "constant":
            records.append(Record("constant", constant=draw(st.integers(0, 1)), shape=draw(shapes)))
        elif kind == "raw":
            records.append(draw(raw_records()))
        else:
            target = draw(st.sampled_from([i for i, r in enumerate(records) if r.kind != "alias"]))
            records.append(Record("alias", alias=target, shape=records[target].shape))
    names = draw(st.booleans())
    for r in records:
        r.dtype = draw(st.sampled_from(["float32", "float16", "bfloat16", "int64"]))
    for r, name in zip(records, draw(st.lists(texts, min_size=len(records), max_size=len(records), unique=True)), strict=True):
        r.name = name
    seed = draw(st.integers(0, (1 << 64) - 1) | st.integers(0, 20))
    archive = Archive(records, coder, seed, draw(st.integers(0, 0xFFFF)), names, index_bits)
    if coder == "trellis":
        needed = sum(r.bits for r in rates(archive).values())
        bits = np.array([(i * i + seed) % 7 % 2 for i in range(needed)], np.uint8)
        archive.path = Path(draw(st.integers(1, 20)), draw(st.integers(0, 15)), bits)
    return archive


def content(archive: Archive, *, heads: bool) -> list:
    """Everything that a file carries."""
    rows: list = [archive.coder, archive.seed, archive.fingerprint, archive.names, archive.index_bits]
    if archive.path is not None:  # up to seven zeros follow the stream
        rows += [archive.path.memory, archive.path.log2_frames, "".join(map(str, archive.path.bits.tolist())).rstrip("0")]
    for r in archive.records:
        row: list = [r.kind]
        if r.kind == "coded":
            row += [r.kept, r.prior_codes.tolist(), r.index.tolist()] + ([] if r.rate is None else [r.rate.width, r.rate.rate])
        elif r.kind == "constant":
            row += [r.constant]
        elif r.kind == "raw":
            row += [r.raw_dtype, r.data]
        else:
            row += [r.alias]
        rows.append(row + ([r.name, r.shape, r.dtype] if heads else []))
    return rows


def entries(archive: Archive) -> list[tuple[str, tuple[int, ...], str]]:
    return [(str(r.name), r.shape or (), str(r.dtype)) for r in archive.records]


@settings(max_examples=150)
@given(archives())
def test_what_is_written_is_read(archive):
    data = archive.to_bytes()
    again = parse(data)
    assert content(again, heads=archive.names) == content(archive, heads=archive.names)
    assert again.to_bytes() == data
    assert archive.size_bytes == len(data)
    if archive.path is None or archive.names:  # else known once shapes are
        assert [r.bits for r in again.records] == [r.bits for r in archive.records]


@settings(max_examples=60)
@given(archives())
def test_every_archive_decodes_to_its_shapes_and_dtypes(archive):
    archive.names = True
    state = decode_state(parse(archive.to_bytes()))
    assert [(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in state.items()] == entries(archive)


def small_archive(*, names: bool, coder: str = "gprs") -> Archive:
    """A file of every kind of record, about a hundred bytes."""
    index_bits = 5 if coder in FIXED_LENGTH else None
    records = [
        Record(
            "coded", prior_codes=np.array([0, 200, 203, 0, 198], np.uint8), index=np.array([1, 30, 7]), name="a.weight", shape=(5, 2, 3)
        ),
        Record("coded", kept=(4, None), prior_codes=np.array([190], np.uint8), index=np.array([12]), name="a.bias", shape=(5,)),
        Record("coded", kept=(3, 4), prior_codes=np.array([195], np.uint8), index=np.array([3, 32, 9, 1]), name="b.weight", shape=(7, 10)),
        Record("constant", constant=1, name="b.norm", shape=(7,)),
        Record("raw", raw_dtype="float16", data=np.arange(3, dtype="<f2").tobytes(), name="b.mean", shape=(3,)),
        Record("alias", alias=2, name="c.weight", shape=(7, 10)),
        Record("raw", raw_dtype="int64", data=np.array([-5], "<i8").tobytes(), name="steps", shape=()),
    ]
    for r in records:
        r.dtype = "int64" if r.name == "steps" else "float32"
    mark = fingerprint([(str(r.name), r.shape or ()) for r in records])
    archive = Archive(records, coder, 77, mark, names, index_bits)
    if coder == "trellis":
        for r, live, width in zip(records, resolve_kept(records), (2, 1, 3, 0, 0, 0, 0), strict=True):
            if r.kind == "coded":
                r.rate = Rate(live_count(r, live), width, 77)
        archive.path = Path(9, 1, np.array([i % 3 == 0 for i in range(sum(r.bits for r in rates(archive).values()))], np.uint8))
    elif coder in TREES:
        for r, live in zip(records, resolve_kept(records), strict=True):
            if r.kind == "coded":
                r.index = 1 + np.arange(live_count(r, live)) % 30
    return archive


def test_a_small_file_is_small():
    archive = small_archive(names=False)
    index_bits = sum(r.bits for r in parse(archive.to_bytes()).records)
    raw_bytes = 14
    assert archive.size_bytes - raw_bytes - index_bits / 8 < 50


def test_an_empty_archive_comes_back():
    for names in (True, False):
        archive = Archive([], names=names)
        assert parse(archive.to_bytes()).records == []


def test_a_tensor_larger_than_its_file_comes_back():
    """A network of which next to all is dropped: what can be written can be read."""
    dropped = Record("coded", prior_codes=np.zeros(1, np.uint8), index=np.ones(1, np.int64), name="w", shape=(3000, 3000), dtype="float32")
    archive = Archive([dropped])
    try:
        data = archive.to_bytes()
    except MiracleError:
        return  # refusing at once is right too
    assert parse(data).records[0].shape == (3000, 3000)


def test_a_file_without_names_says_so():
    archive = parse(small_archive(names=False).to_bytes())
    for ask in (archive.keys, archive.require_names, lambda: archive["a.weight"], lambda: decode_state(archive)):
        with pytest.raises(MismatchError, match="names"):
            ask()


def test_one_tensor_by_name():
    archive = parse(small_archive(names=True).to_bytes())
    assert archive.keys() == ["a.weight", "a.bias", "b.weight", "b.norm", "b.mean", "c.weight", "steps"]
    assert int(archive["steps"]) == -5
    assert torch.equal(archive["c.weight"], archive["b.weight"])
    with pytest.raises(MismatchError, match="no tensor 'd'"):
        archive["d"]


def test_a_fingerprint_changes_with_every_name_and_shape():
    base = [("a", (2, 3)), ("b", ())]
    others = [base[::-1], base[:1], [("a", (3, 2)), ("b", ())], [("a", (2, 3)), ("c", ())], [("a", (2, 3)), ("b", (1,))]]
    marks = [fingerprint(e) for e in (base, *others)]
    assert len(set(marks)) == len(marks)
    assert all(0 <= m < 1 << 16 for m in marks)


# --- prior codes ---


def test_prior_codes_are_eight_steps_an_octave():
    std = prior_std(np.arange(256))
    assert std.dtype == np.float32
    assert std[0] == 0
    assert all(float(std[c]) == (8 + c % 8) * 2.0 ** (c // 8 - 28) for c in range(1, 256))
    assert (np.diff(std) > 0).all()
    assert std[8 * 25] == 1.0
    assert std[1] < 4e-8
    assert std[255] > 119


def test_every_prior_code_is_nearest_to_itself():
    codes = np.arange(1, 256)
    assert (prior_code(prior_std(codes)) == codes).all()
    assert prior_code(np.zeros(3)).tolist() == [0, 0, 0]


@given(st.floats(1e-8, 100, allow_nan=False))
def test_prior_codes_are_nearest_in_ratio(std):
    code = int(prior_code(np.array([std]))[0])
    ratios = np.abs(np.log(prior_std(np.arange(1, 256)).astype(float)) - math.log(std))
    assert code >= 1
    assert ratios[code - 1] <= ratios.min() + 1e-12


def test_prior_codes_are_monotone_and_saturate():
    std = np.geomspace(1e-12, 1e6, 3000)
    codes = prior_code(std)
    assert (np.diff(codes.astype(int)) >= 0).all()
    assert codes[0] == 1
    assert codes[-1] == 255
    assert prior_code(np.array([np.float32(1e-45)])).tolist() == [1]


def test_octaves_are_exact():
    k = np.array([1, 2, 3, 4, 7, 8, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
    assert octaves(k).tolist() == [int(x).bit_length() - 1 for x in k]


# --- kept units ---


def test_kept_units_follow_the_layer_before():
    def record(shape, kept=(None, None)):
        return Record("coded", kept=kept, shape=shape)

    records = [
        record((8, 1, 3, 3), (5, None)),  # a convolution that keeps 5 of 8
        record((8,)),  # its bias
        record((10, 72), (6, None)),  # a linear layer on its flattened output: 9 inputs a unit
        record((10,)),
        Record("raw", shape=(10,)),
        record((3, 10)),
        record((3,)),
        record((4, 7), (2, 5)),
        record((9,)),
        record(()),
    ]
    expected = [(5, 1, 3, 3), (5,), (6, 45), (6,), (10,), (3, 6), (3,), (2, 5), (9,), ()]
    assert resolve_kept(records) == expected


def test_more_units_kept_than_there_are_is_corrupt():
    with pytest.raises(CorruptError, match="keeps"):
        resolve_kept([Record("coded", kept=(6, None), shape=(5,))])


@pytest.mark.parametrize(
    "record",
    [
        Record("coded", prior_codes=np.ones(3, np.uint8), index=np.ones(1, np.int64), shape=(4, 2)),
        Record("coded", prior_codes=np.ones(1, np.uint8), index=np.ones(9, np.int64), shape=(4, 2)),
        Record("coded", prior_codes=np.ones(1, np.uint8), index=np.ones(2, np.int64), shape=(100, 100)),
        Record("coded", prior_codes=np.zeros(1, np.uint8), index=np.ones(2, np.int64), shape=(4, 2)),
        Record("raw", raw_dtype="float32", data=bytes(5), shape=(1,)),
        Record("raw", raw_dtype="int8", data=bytes(5), shape=(2, 2)),
    ],
)
def test_records_that_do_not_fit_their_shape_are_corrupt(record):
    record.name, record.dtype = "t", "float32"
    with pytest.raises(CorruptError):
        check_shapes(Archive([record]))
    with pytest.raises(CorruptError):
        parse(Archive([record], names=True).to_bytes())
    bare = Archive([record], names=False, fingerprint=fingerprint([("t", record.shape)]))
    model = helpers.Holder(entries(bare))
    with pytest.raises(CorruptError):
        bind(parse(bare.to_bytes()), model)


# --- damage ---

FILES = [(True, "gprs"), (False, "gprs"), (False, "minimal-random"), (True, "trellis"), (False, "trellis"), (True, "branch-and-bound-gprs")]


@pytest.fixture(scope="module", params=FILES, ids=[f"{c}{'-names' * n}" for n, c in FILES])
def real_file(request) -> bytes:
    names, coder = request.param
    return small_archive(names=names, coder=coder).to_bytes()


def test_every_flipped_byte_is_an_error(real_file):
    for at in range(len(real_file)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(real_file)
            damaged[at] ^= mask
            with pytest.raises(FileFormatError):
                parse(bytes(damaged))


def test_every_value_of_every_byte_but_the_right_one_is_an_error(real_file):
    for at in range(min(len(real_file), 24)):
        for value in set(range(256)) - {real_file[at]}:
            with pytest.raises(FileFormatError):
                parse(real_file[:at] + bytes([value]) + real_file[at + 1 :])


def test_every_cut_is_an_error(real_file):
    for length in range(len(real_file)):
        with pytest.raises(FileFormatError):
            parse(real_file[:length])
        with pytest.raises(FileFormatError):
            parse(real_file[len(real_file) - length :])


def test_every_inserted_and_every_removed_byte_is_an_error(real_file):
    for at in range(len(real_file) + 1):
        for value in (0, 1, 0xFF, real_file[at - 1]):
            with pytest.raises(FileFormatError):
                parse(real_file[:at] + bytes([value]) + real_file[at:])
    for at in range(len(real_file)):
        with pytest.raises(FileFormatError):
            parse(real_file[:at] + real_file[at + 1 :])


def repaired(body: bytes) -> bytes:
    """A file whose checksum is right, whatever its body says."""
    return b"MBN1" + crc32(body).to_bytes(4, "little") + body


def survive(data: bytes, shapes_of: Archive) -> str:
    """Parse and decode: a result, or a MiracleError; anything else fails the test that calls this."""
    try:
        archive = parse(data)
        if not archive.names:
            bind_shapes(archive, shapes_of)
        for i in range(len(archive.records)):
            stored_array(archive, i)
        if archive.names:
            decode_state(archive)
    except MiracleError:
        return "refused"
    return "decoded"


def bind_shapes(archive: Archive, other: Archive) -> None:
    """What `bind` does once the fingerprint agrees."""
    if len(archive.records) != len(other.records):
        raise MismatchError("another number of records")
    for r, s in zip(archive.records, other.records, strict=True):
        r.name, r.shape, r.dtype = s.name, s.shape, s.dtype
    check_shapes(archive)


@pytest.mark.parametrize(("names", "coder"), FILES)
def test_hostile_bodies_with_a_right_checksum_give_a_result_or_a_miracle_error(names, coder):
    archive = small_archive(names=names, coder=coder)
    body = archive.to_bytes()[8:]
    rng = np.random.default_rng(0)
    seen = {"refused": 0, "decoded": 0}
    slowest = 0.0
    tracemalloc.start()
    for i in range(1200):
        damaged = bytearray(body)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(damaged))) if rng.random() < 0.7 else int(rng.integers(min(12, len(damaged))))
            kind = rng.integers(5)
            if kind < 2:
                damaged[at] ^= 1 << int(rng.integers(8))
            elif kind == 2:
                damaged[at] = int(rng.integers(256))
            elif kind == 3:
                damaged.insert(at, int(rng.integers(256)))
            elif len(damaged) > 1:
                del damaged[at : at + int(rng.integers(1, 4))]
            if not damaged:
                damaged = bytearray(b"\0")
        started = time.process_time()
        seen[survive(repaired(bytes(damaged)), archive)] += 1
        slowest = max(slowest, time.process_time() - started)
        if i % 100 == 0 and i:
            assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()
    assert slowest < 1.0
    assert seen["refused"] > 100
    assert seen["decoded"] > 20


def test_random_bodies_with_a_right_checksum_give_a_result_or_a_miracle_error():
    archive = small_archive(names=False)
    rng = np.random.default_rng(1)
    for _ in range(1500):
        body = rng.integers(0, 256, int(rng.integers(0, 60)), np.uint8).tobytes()
        survive(repaired(b"\0\0" + bytes([rng.integers(2) << 7]) + body), archive)
        survive(repaired(body), archive)


def bits_file(*fields: tuple[str, int, int], tail: bytes = b"") -> bytes:
    """A file of the given fields: ("bits", value, width) or ("golomb", value, order)."""
    out = BitWriter()
    for kind, value, size in fields:
        (out.write if kind == "bits" else out.write_golomb)(value, size)
    return repaired(out.to_bytes() + tail)


HEADER = (("bits", 0, 16), ("bits", 0, 1), ("bits", 0, 2), ("bits", 0, 4), ("golomb", 0, 0))  # no names, gprs, seed 0
TABLE = (("bits", 3, 6), ("bits", 0, 6), ("bits", 1, 4))  # every index has 3 bits


@pytest.mark.parametrize(
    "fields",
    [
        [*HEADER, *TABLE, ("golomb", (1 << 40), 3)],  # records
        [*HEADER, *TABLE, ("golomb", 1, 3), ("bits", 0b1_0_0, 3), ("bits", 200, 8), ("golomb", 1 << 50, 2)],  # blocks
        [*HEADER, *TABLE, ("golomb", 1, 3), ("bits", 0b001, 3), ("bits", 1, 4), ("golomb", 1 << 50, 8)],  # raw bytes
        [*HEADER, *TABLE, ("golomb", 1, 3), ("bits", 0b1_0_1, 3), ("golomb", 1 << 50, 4), ("bits", 9, 8), ("bits", 0, 3)],  # prior scales
        [*HEADER, *TABLE, ("golomb", 1, 3), ("bits", 0b1_1, 2), ("golomb", 1 << 50, 4)],  # kept units
        [*HEADER, *TABLE, ("golomb", 1, 3), ("bits", 0b000, 3), ("golomb", 0, 3)],  # an alias of itself
        [*HEADER, *TABLE, ("golomb", 1, 3), ("bits", 0b000, 3), ("golomb", 5, 3)],  # an alias of what is not there
        [*HEADER, ("bits", 40, 6), *TABLE[1:], ("golomb", 1, 3), ("bits", 0b1_0_0, 3), ("bits", 9, 8), ("golomb", 0, 2), ("bits", 0, 60)],
        [*HEADER, ("bits", 0, 6), ("bits", 63, 6), ("bits", 0, 4), *[("golomb", 0, 0)] * 63],  # lengths of 0
        [*HEADER[:4], ("golomb", 1 << 63, 0), ("bits", 0, 40)],
        [("bits", 0, 16), ("bits", 1, 1), *HEADER[2:], *TABLE, ("golomb", 1, 3), ("golomb", 1 << 50, 8)],  # names
    ],
)
def test_hostile_lengths_are_refused_before_they_take_memory(fields):
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(FileFormatError):
        parse(bits_file(*fields, tail=bytes(40)))
    assert time.process_time() - started < 1.0
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def with_names(lines: bytes, count: int, *fields: tuple[str, int, int]) -> bytes:
    """A file with the given lines of names (already packed)."""
    out = BitWriter()
    for kind, value, size in (("bits", 0, 16), ("bits", 1, 1), *HEADER[2:], *TABLE, ("golomb", count, 3), ("golomb", len(lines), 8)):
        (out.write if kind == "bits" else out.write_golomb)(value, size)
    out.align()
    out.write_bytes(lines)
    for kind, value, size in fields:
        (out.write if kind == "bits" else out.write_golomb)(value, size)
    return repaired(out.to_bytes())


ONE_CONSTANT = (("bits", 0b01_0, 3),)


@pytest.mark.parametrize(
    "lines",
    [
        b"float32 3 a",  # no end of line
        b"float32 3 a\nfloat32 3 b\n",
        b"\n",
        b" 3 a\n",
        b"float32 -3 a\n",
        b"float32 3,,4 a\n",
        b"float32 999999999999999,999999999999999 a\n",
        b"float32 1000000,1000000 a\n",
        b"float32 1" + b",1" * 40 + b" a\n",
        b"float32 9999999999999999999 a\n",
        b"float32 \xff a\n",
        "float32 ٣ a\n".encode(),
        b"float32 0x3 a\n",
        b"x" * 100_000,
        b"float32 3 a\n" + b"\0" * 10_000_000,  # a zip bomb
    ],
)
def test_hostile_names_are_refused(lines):
    import zlib

    tracemalloc.start()
    packed = zlib.compress(lines, 9)
    before = tracemalloc.get_traced_memory()[1]
    with pytest.raises(FileFormatError):
        parse(with_names(packed, 1, *ONE_CONSTANT))
    assert tracemalloc.get_traced_memory()[1] - before < 20 << 20
    tracemalloc.stop()


DTYPES = ["qint8", "nonsense", "nn", "float", "Tensor", "load", "bits8", "float8_e4m3fn", "complex64", "bool", "../x", "uint1"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_from_a_file_give_a_tensor_or_a_miracle_error(dtype):
    archive = Archive([Record("coded", prior_codes=np.array([200], np.uint8), index=np.array([3]), name="w", shape=(2,), dtype=dtype)])
    archive = parse(archive.to_bytes())
    try:
        tensor = archive["w"]
    except MiracleError:
        return
    assert str(tensor.dtype).removeprefix("torch.") in {dtype, "float32"}


@pytest.mark.parametrize("length", [2, 500, 3000])
def test_a_chain_of_aliases_gives_a_result_or_a_miracle_error(length):
    source = Record("raw", raw_dtype="bfloat16", data=np.array([0x3F80], "<u2").tobytes(), name="t0", shape=(1,), dtype="bfloat16")
    chain = [Record("alias", alias=i - 1, name=f"t{i}", shape=(1,), dtype="bfloat16") for i in range(1, length)]
    try:
        archive = parse(Archive([source, *chain]).to_bytes())
        last = archive[f"t{length - 1}"]
    except MiracleError:
        return
    assert last.tolist() == [1.0]


def test_what_is_no_archive_or_of_another_version_is_told_apart(real_file):
    for data in (b"", b"MBN1", b"PK\3\4" + real_file[4:], b"\x89PNG\r\n\x1a\n" + bytes(100), b"mbn1" + real_file[4:]):
        with pytest.raises(NotAnArchiveError):
            parse(data)
    with pytest.raises(VersionError, match="update"):
        parse(b"MBN2" + real_file[4:])
    with pytest.raises(CorruptError, match="checksum"):
        parse(real_file[:-1])


def test_reserved_bits_and_coders_of_the_future_are_version_errors(real_file):
    body = bytearray(real_file[8:])
    body[2] |= 0x20
    with pytest.raises(VersionError):
        parse(repaired(bytes(body)))
    body = bytearray(real_file[8:])
    body[2] |= 0x1E
    with pytest.raises(VersionError, match="coder"):
        parse(repaired(bytes(body)))


def test_bytes_after_the_end_are_corrupt(real_file):
    archive = parse(real_file)
    if archive.path is not None and not archive.names:
        return  # seen once the shapes are known: see the next test
    with pytest.raises(CorruptError, match=r"after the end|index stream holds"):
        parse(repaired(real_file[8:] + b"\0"))


def test_a_stream_of_another_length_is_corrupt():
    archive = small_archive(names=False, coder="trellis")
    for longer in (b"\0", b"\0\0"):
        again = parse(repaired(archive.to_bytes()[8:-14] + longer + archive.to_bytes()[-14:]))
        with pytest.raises(CorruptError, match="index stream holds"):
            bind_shapes(again, archive)
    again = parse(repaired(archive.to_bytes()[8:-15] + archive.to_bytes()[-14:]))
    with pytest.raises(CorruptError, match="index stream holds"):
        bind_shapes(again, archive)
