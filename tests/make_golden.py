"""The archives behind tests/golden: made of integers alone, so that they are the same on every machine for ever.

`pytest tests/test_golden.py --update-golden` writes the files of the present format version and tests/golden/manifest.json
anew. Files of older versions are never touched: they must decode for ever.
"""

from __future__ import annotations

import hashlib
import json
import pathlib

import helpers
import numpy as np

from miracle_ban import decode
from miracle_ban.container import FORMAT_VERSION, RAW_DTYPES, Archive, Path, Record, fingerprint, live_count, parse, rates, resolve_kept
from miracle_ban.randomness import words
from miracle_ban.trellis import Rate

FOLDER = pathlib.Path(__file__).parent / "golden"
MANIFEST = FOLDER / "manifest.json"


class Builder:
    """Collects records; the indices come from the package's own random words."""

    def __init__(self, coder: str = "gprs", *, seed: int = 0, names: bool = False, index_bits: int | None = None, octaves: int = 13):
        self.archive = Archive([], coder, seed, 0, names, index_bits)
        self.octaves = index_bits or octaves

    def words(self, count: int) -> np.ndarray:
        return words(0xB0B, len(self.archive.records), 0, 0xD0, count)[0].astype(np.int64)

    def add(self, record: Record, name: str, shape: tuple[int, ...], dtype: str = "float32") -> Builder:
        record.name, record.shape, record.dtype = name, shape, dtype
        self.archive.records.append(record)
        return self

    def coded(self, name: str, shape: tuple[int, ...], blocks: int, *, codes=(190,), kept=(None, None), dtype: str = "float32") -> Builder:
        self.add(Record("coded", kept, np.array(codes, np.uint8)), name, shape, dtype)
        record = self.archive.records[-1]
        count = live_count(record, resolve_kept(self.archive.records)[-1])
        assert 1 <= blocks <= max(count, 1), (name, count)
        drawn = self.words(2 * blocks)
        width = drawn[:blocks] % self.octaves + 1  # indices of all octaves
        record.index = 1 + drawn[blocks:] % (np.int64(1) << width)
        return self

    def steps(self, name: str, shape: tuple[int, ...], rate: tuple[int, int], *, codes=(190,), kept=(None, None)) -> Builder:
        """A tensor of the trellis coder: weights in a step, 1/64 bits for a step."""
        self.add(Record("coded", kept, np.array(codes, np.uint8)), name, shape)
        record = self.archive.records[-1]
        record.rate = Rate(live_count(record, resolve_kept(self.archive.records)[-1]), *rate)
        return self

    def path(self, memory: int, log2_frames: int) -> Builder:
        """The stream through all steps, from the package's own random words."""
        needed = sum(r.bits for r in rates(self.archive).values())
        drawn = self.words(-(-needed // 32)).astype(">u4").view(np.uint8)
        self.archive.path = Path(memory, log2_frames, np.unpackbits(drawn)[:needed])
        return self

    def raw(self, name: str, array: np.ndarray, dtype: str, stored: str | None = None) -> Builder:
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        return self.add(Record("raw", raw_dtype=stored or dtype, data=data), name, array.shape, dtype)

    def done(self) -> Archive:
        self.archive.fingerprint = fingerprint([(str(r.name), r.shape or ()) for r in self.archive.records])
        return self.archive


def every_dtype(builder: Builder) -> Builder:
    """Raw tensors of all dtypes, coded ones of all that weights come in, and repetitions of both."""
    for i, (dtype, size) in enumerate(zip(RAW_DTYPES, (8, 4, 2, 2, 8, 4, 2, 1, 1, 1, 8, 16, 2, 4, 8, 1), strict=True)):
        data = bytes((37 * i + 11 * j) % (2 if dtype == "bool" else 64) for j in range(2 * size))
        builder.add(Record("raw", raw_dtype=dtype, data=data), f"raw_{dtype}", (2,), "uint8" if dtype == "opaque" else dtype)
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        builder.coded(f"coded_{dtype}", (2, 3), 1, dtype=dtype)
        builder.add(Record("constant", constant=1), f"one_{dtype}", (2,), dtype)
    builder.add(Record("alias", alias=3), "again_bfloat16", (2,), "bfloat16").add(Record("alias", alias=17), "again_one", (2,), "float64")
    return builder.raw("single_of_half", np.array([0.5, -3.0], np.float16), "bfloat16", "float16")


def archives() -> dict[str, Archive]:
    """All golden archives of the present version by the names of their files."""
    half = np.array([[1.5, -0.25, 65504.0]], np.float16)
    made = {
        "gprs": Builder(seed=1)
        .coded("conv1.weight", (6, 1, 5, 5), 9)
        .coded("conv1.bias", (6,), 1)
        .coded("fc.weight", (10, 54), 30, codes=[183]),
        "gprs_names": Builder(seed=2, names=True)
        .coded("conv1.weight", (6, 1, 5, 5), 9)
        .coded("conv1.bias", (6,), 1)
        .coded("größe", (3, 7), 4),
        "minimal_random": Builder("minimal-random", seed=3, index_bits=11)
        .coded("weight", (12, 20), 18)
        .coded("bias", (12,), 2, codes=[201]),
        "minimal_random_names": Builder("minimal-random", seed=9, index_bits=24, names=True).coded("w", (5, 40), 6),
        "small_blocks": Builder(seed=5)
        .coded("eight", (16, 4), 8)
        .coded("one", (7,), 7, codes=[210])
        .coded("three", (5, 2), 4)
        .coded("scalar", (), 1),
        "large_blocks": Builder(seed=6)
        .coded("nine", (9, 5), 5)
        .coded("4096", (64, 64), 1)
        .coded("short", (100,), 7)
        .coded("65", (65, 2), 2),
        "per_unit": Builder(seed=7)
        .coded("conv.weight", (8, 2, 3, 3), 6, codes=[0, 190, 200, 0, 1, 255, 199, 0])
        .coded("conv.bias", (8,), 1, codes=[0, 180, 181, 0, 182, 183, 184, 0])
        .coded("fc.weight", (3, 8), 2, codes=[0, 0, 205])
        .coded("fc.bias", (3,), 1, codes=[0, 0, 0]),
        "trimmed": Builder(seed=8, names=True)
        .coded("conv1.weight", (20, 1, 5, 5), 5, kept=(5, None))
        .coded("conv1.bias", (20,), 1)
        .coded("conv2.weight", (50, 20, 5, 5), 20, kept=(7, None))
        .coded("conv2.bias", (50,), 1)
        .coded("fc1.weight", (50, 800), 25, kept=(9, None), codes=[190, 0, 191, 192, 193, 194, 195, 196, 0])
        .coded("fc1.bias", (50,), 2)
        .coded("fc2.weight", (10, 50), 4)
        .coded("fc2.bias", (10,), 1)
        .coded("both.weight", (6, 9), 2, kept=(4, 3)),
        "records": Builder(seed=10, names=True)
        .raw("half", half, "float16")
        .raw("half_of_single", half, "float32", "float16")
        .raw("single", np.array([1e-30, 3.0], np.float32), "float32")
        .raw("double", np.array(np.pi), "float64")
        .raw("brain", np.array([0x3F80, 0xC040], np.uint16), "bfloat16")
        .raw("steps", np.array(-7, np.int64), "int64")
        .raw("mask", np.array([[True, False]]), "bool")
        .raw("bytes", np.arange(5, dtype=np.uint8), "uint8")
        .raw("complex", np.array([1 - 2j], np.complex64), "complex64")
        .raw("empty", np.zeros((0, 4), np.float32), "float32")
        .add(Record("constant", constant=1), "norm.weight", (4,))
        .add(Record("constant", constant=0), "norm.count", (), "int64")
        .coded("embed.weight", (7, 5), 3, dtype="bfloat16")
        .add(Record("alias", alias=12), "out.weight", (7, 5), "bfloat16")
        .coded("dropped", (11,), 1, codes=[0])
        .coded("double_weights", (5, 5), 3, dtype="float64"),
        "largest_seed_and_index": Builder(seed=(1 << 64) - 1, octaves=31).coded("w", (10, 10), 31).coded("v", (31,), 6),
        "other_coder": Builder("a-star", seed=12).coded("weight", (12, 20), 18).coded("bias", (12,), 2),
        "one_octave": Builder(seed=13, octaves=1).coded("weight", (12, 20), 18),
        "trellis": Builder("trellis", seed=15)
        .steps("conv1.weight", (6, 1, 5, 5), (1, 100))
        .steps("conv1.bias", (6,), (1, 64))
        .steps("fc.weight", (30, 100), (7, 64), codes=[183])
        .path(12, 0),
        "trellis_frames": Builder("trellis", seed=16, names=True)
        .steps("conv.weight", (8, 2, 3, 3), (2, 71), codes=[0, 190, 200, 0, 1, 255, 199, 0])
        .steps("conv.bias", (8,), (3, 512), codes=[0, 180, 181, 0, 182, 183, 184, 0])
        .raw("mask", np.array([True, False]), "bool")
        .steps("fc.weight", (20, 90), (9, 130), kept=(9, None))
        .add(Record("alias", alias=3), "again", (20, 90))
        .steps("dropped", (11,), (1, 64), codes=[0])
        .path(20, 3),
        "trellis_short": Builder("trellis", seed=17).steps("one", (1,), (1, 200)).steps("wide", (256, 12), (256, 64)).path(4, 15),
        "branch_and_bound": Builder("branch-and-bound-gprs", seed=18, octaves=31)
        .coded("weight", (9, 5), 45)
        .coded("bias", (9,), 7, codes=[0, 180, 181, 182, 182, 183, 184, 190, 0]),
        "nothing": Builder(seed=14, names=True),
        "rejection": Builder("rejection", seed=19).coded("weight", (4, 9), 3).coded("bias", (4,), 1),
        "ordered_random": Builder("ordered-random", seed=20).coded("weight", (4, 9), 3).coded("bias", (4,), 1),
        "parallel_gprs": Builder("parallel-gprs", seed=21).coded("weight", (4, 9), 3).coded("bias", (4,), 1),
        "branch_and_bound_a_star": Builder("branch-and-bound-a-star", seed=22, octaves=20).coded("weight", (3, 5), 15, kept=(3, 5)),
        "dtypes": every_dtype(Builder(seed=23, names=True)),
        "empty": Builder(seed=24)
        .coded("none", (0, 3), 1)
        .coded("none_bias", (0,), 1, codes=[0])
        .coded("kept_none", (4, 3), 1, kept=(0, None))
        .coded("follows", (4,), 1)
        .coded("some", (3, 2), 2, codes=[0, 17, 254])
        .add(Record("alias", alias=4), "again", (3, 2)),
        "empty_trellis": Builder("trellis", seed=25)
        .steps("none", (0, 3), (1, 64))
        .steps("some", (5, 2), (3, 90))
        .steps("dropped", (5,), (256, 512), codes=[0])
        .path(1, 15),
        "long": Builder(seed=26).coded("weight", (200, 200), 10).coded("bias", (33_000,), 9, codes=[201]),
        "long_trellis": Builder("trellis", seed=27).steps("weight", (300, 40), (1, 65)).steps("wide", (200, 256), (251, 66)).path(7, 5),
    }
    for memory in range(1, 21):
        steps = (
            Builder("trellis", seed=100 + memory).steps("weight", (10, 7), (1 + memory % 3, 64 + 9 * memory)).steps("bias", (10,), (1, 64))
        )
        made[f"memory_{memory:02}"] = steps.path(memory, memory % 5)
    return {f"v{FORMAT_VERSION}_{name}.mban": builder.done() for name, builder in made.items()}


def describe(data: bytes, entries: list[tuple[str, tuple[int, ...], str]]) -> dict:
    """What the manifest says of a file."""
    archive = parse(data)
    state = decode(archive) if archive.names else decode(archive, helpers.Holder(entries))
    return {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "weights_sha256": weights_digest(state),
        "entries": [[name, list(shape), dtype] for name, shape, dtype in entries],
    }


def weights_digest(state: dict) -> str:
    """SHA-256 of name, shape, dtype and little-endian bytes of every tensor, in the order of the file."""
    sha = hashlib.sha256()
    for name, t in state.items():
        sha.update(f"{name} {list(t.shape)} {t.dtype}\n".encode())
        sha.update(helpers.tensor_bytes(t))
    return sha.hexdigest()


def write() -> None:
    """Write the files of the present version and their part of the manifest."""
    FOLDER.mkdir(exist_ok=True)
    old = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}
    manifest = {name: said for name, said in old.items() if not name.startswith(f"v{FORMAT_VERSION}_")}
    for path in FOLDER.glob(f"v{FORMAT_VERSION}_*.mban"):
        path.unlink()
    for name, archive in archives().items():
        data = archive.to_bytes()
        (FOLDER / name).write_bytes(data)
        manifest[name] = describe(data, [(str(r.name), r.shape or (), str(r.dtype)) for r in archive.records])
    MANIFEST.write_text(json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=True) + "\n")
