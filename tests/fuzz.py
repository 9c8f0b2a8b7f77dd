"""Hostile input: mutated files through parse, decode and load. Everything must end in a result or in a `MiracleError`.

    python tests/fuzz.py --executions 10_000_000 --seed 0 --memory-mb 2000 --folder fuzz            numpy alone: parse and decode
    python tests/fuzz.py --executions 100_000 --target load                                          into a module, through a file

Mutations know the format: a file is read into its fields (numbers with their widths, varints, byte strings), some of which are
changed, repeated, dropped or taken from another file, and written again with a right checksum. Where atheris (libFuzzer for
Python) can be imported, it chooses what to mutate by coverage of the package's code; elsewhere an input is kept if its outcome is
new. The folder keeps the corpus, the failing inputs and the counts; a later run goes on from there. Exit status 1 if anything
failed: another exception, more than a second of CPU time for each kilobyte, or memory over the limit.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable

import numpy as np

with contextlib.suppress(ImportError):  # Windows has none
    import resource

try:
    import atheris
except ImportError:
    atheris = None

FOLDER = pathlib.Path(__file__).parent
LARGEST = 1000  # bytes of an input
FAILURES_KEPT = 20
Field = tuple[str, int | bytes, int]  # ("bits", value, width), ("golomb", value, order) or ("bytes", value, 0)


def modules() -> list:
    """The modules under test; those with decisions to take are instrumented if atheris is there, so they are imported here."""
    told = [f"miracle_ban.{m}" for m in ("container", "decode", "trellis", "tree", "blocks")]
    with atheris.instrument_imports(include=told) if atheris is not None else contextlib.nullcontext():
        return [importlib.import_module(f"miracle_ban.{m}") for m in ("bits", "container", "decode", "errors")]


bits, container, decode, errors = modules()


# --- a file as a list of fields ---


class Recorder(bits.BitReader):
    """A reader that remembers what it was asked for."""

    fields: list[Field] = []  # those of the latest reader  # noqa: RUF012

    def __init__(self, data: bytes):
        super().__init__(data)
        Recorder.fields = self.fields = []
        self._inside = False

    def _note(self, read: Callable, kind: str, size: int, *rest):
        outer, self._inside = self._inside, True
        try:
            value = read(*rest)
        finally:
            self._inside = outer
        if not outer and (size or kind == "golomb"):
            self.fields.append((kind, value, size))
        return value

    def read(self, bits: int, what: str = "a number") -> int:
        return self._note(super().read, "bits", bits, bits, what)

    def read_golomb(self, order: int = 0, what: str = "a number", limit: int = 1 << 62) -> int:
        return self._note(super().read_golomb, "golomb", order, order, what, limit)

    def read_bytes(self, count: int, what: str) -> bytes:
        return self._note(super().read_bytes, "bytes", count, count, what)

    def align(self) -> None:
        """Padding is written by itself."""
        self._inside = True
        super().align()
        self._inside = False

    def take(self, bits: int, what: str):
        part = super().take(bits, what)
        value = int("0" + "".join(map(str, part.tolist())), 2)
        if bits:
            self.fields.append(("bits", value, bits))
        return part


def fields_of(body: bytes) -> list[Field]:
    """The fields of a body, as far as it can be read, and the rest as bytes."""
    reader, container.BitReader = container.BitReader, Recorder
    try:
        container.parse(with_checksum(body))
    except errors.MiracleError:
        pass
    finally:
        container.BitReader = reader
    return Recorder.fields


class Inventor(Recorder):
    """A reader that always has an answer: the next of some fields if it is of the kind asked for, else something at random."""

    def __init__(self, fields: list[Field], rng: random.Random):
        super().__init__(rng.randbytes(LARGEST))
        self._given, self._at, self._rng = fields, 0, rng

    def _next(self, kind: str, size: int) -> int | bytes | None:
        for at in range(self._at, min(self._at + 3, len(self._given))):
            own, value, width = self._given[at]
            if own == kind and (width == size or kind == "bytes"):
                self._at = at + 1
                return value
        return None

    def read(self, bits: int, what: str = "a number") -> int:
        value = self._next("bits", bits) if bits else 0
        value = self._rng.getrandbits(bits) if value is None else value & ((1 << bits) - 1)
        if what == "the header" and bits in (2, 4):
            value = 0 if bits == 2 else value % 9  # no feature or coder of the future
        if bits:
            self.fields.append(("bits", value, bits))
        return value

    def read_golomb(self, order: int = 0, what: str = "a number", limit: int = 1 << 62) -> int:
        value = self._next("golomb", order)
        value = self._rng.getrandbits(self._rng.randrange(1 + order)) if value is None else value
        value = value if value <= limit else self._rng.randrange(min(limit, 8) + 1)
        self.fields.append(("golomb", value, order))
        return value

    def read_bytes(self, count: int, what: str) -> bytes:
        value = self._next("bytes", 0)
        value = value if value is not None and len(value) == count else self._rng.randbytes(count)
        self.fields.append(("bytes", value, 0))
        return value

    def take(self, bits: int, what: str):
        if bits > 4 * LARGEST and self._at < len(self._given):  # the stream of the trellis, all that is left: as long as it was
            bits = min(bits, self._given[self._at][2])
            self._at += 1
        return super().take(bits, what)

    def align(self) -> None:
        """Padding is written by itself."""


def completed(fields: list[Field], rng: random.Random) -> list[Field]:
    """Fields that a reader follows to the end, as near to these as it can be."""
    reader, container.BitReader = container.BitReader, lambda _: Inventor(fields, rng)
    try:
        container.parse(with_checksum(b""))
    except Exception:  # an answer that no file could give
        pass
    finally:
        container.BitReader = reader
    return Recorder.fields


def body_of(fields: list[Field]) -> bytes:
    """The fields written one after the other; bytes begin on a byte."""
    text: list[str] = []
    length = 0
    for kind, value, size in fields:
        if kind == "bytes":
            part = "0" * (-length % 8) + "".join(f"{b:08b}" for b in value)
        elif kind == "bits":
            part = f"{value & ((1 << size) - 1):0{size}b}"
        else:
            shifted = value + (1 << size)
            part = "0" * (shifted.bit_length() - 1 - size) + f"{shifted:b}"
        text.append(part)
        length += len(part)
    joined = "".join(text) + "0" * (-length % 8)
    return int("1" + joined, 2).to_bytes(len(joined) // 8 + 1, "big")[1:]


def with_checksum(body: bytes) -> bytes:
    """A file whose checksum is right, whatever its body says."""
    return b"MBN1" + bits.crc32(body).to_bytes(4, "little") + body


# --- mutations ---


def mutated_number(rng: random.Random, value: int, size: int) -> int:
    """Another number: near, extreme, or any."""
    way = rng.randrange(6)
    if way < 2:
        return max(value + rng.choice((-2, -1, 1, 2)), 0)
    if way == 2:
        return rng.choice((0, 1, (1 << size) - 1 if size else 0, 1 << rng.randrange(64), (1 << rng.randrange(64)) - 1))
    if way == 3:
        return value ^ 1 << rng.randrange(max(size, value.bit_length(), 1))
    if way == 4:
        return value * 2 + rng.randrange(2)
    return rng.getrandbits(rng.randrange(1, 17))


def mutated_names(rng: random.Random, packed: bytes) -> bytes:
    """The lines of names with one of their words changed."""
    try:
        words = re.split(rb"([ ,\n])", zlib.decompress(packed))
    except zlib.error:
        return packed
    at = rng.randrange(len(words))
    way = rng.randrange(5)
    if way == 0:
        words[at] = str(rng.choice((0, 1, 2, 3, 5, 8, 40, 1 << rng.randrange(24)))).encode()
    elif way == 1:
        words[at] = rng.choice(
            (b"float32", b"bfloat16", b"float16", b"int64", b"bool", b"complex64", b"opaque", b"uint8", b"-1", b"\xff", b"")
        )
    elif way == 2:
        del words[at : at + rng.randrange(1, 4)]
    else:
        words[at:at] = words[rng.randrange(len(words)) :][: rng.randrange(1, 8)]
    return zlib.compress(b"".join(words), 1)


def mutated(rng: random.Random, fields: list[Field], other: list[Field]) -> list[Field]:
    """A copy with one to four changes."""
    fields = list(fields)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if not fields:
            return list(other)
        at = rng.randrange(len(fields))
        kind, value, size = fields[at]
        way = rng.randrange(12)
        if way < 7:
            if isinstance(value, int):
                fields[at] = (kind, mutated_number(rng, value, size), size)
            elif value[:1] == b"x":
                fields[at] = (kind, new := mutated_names(rng, value), 0)
                if at and fields[at - 1][0] == "golomb":  # the length goes with it
                    fields[at - 1] = ("golomb", len(new), fields[at - 1][2])
            else:
                data = bytearray(value)
                data[rng.randrange(len(data))] = rng.randrange(256)
                fields[at] = (kind, bytes(data), 0)
        elif way == 7:
            del fields[at : at + rng.randrange(1, 4)]
        elif way == 8:
            fields[at:at] = fields[at : at + rng.randrange(1, 6)]
        elif way == 9 and other:
            fields[at:] = other[min(at, len(other) - 1) :] if rng.randrange(2) else other[rng.randrange(len(other)) :]
        elif way == 10:
            there = rng.randrange(len(fields))
            fields[at], fields[there] = fields[there], fields[at]
        else:
            fields.insert(at, ("bits", rng.getrandbits(16), rng.randrange(1, 17)))
    return fields


class Mutator:
    """Gives mutations of bodies; remembers the fields of those that it saw."""

    def __init__(self):
        self.seen: collections.OrderedDict[bytes, list[Field]] = collections.OrderedDict()
        self.keys: list[bytes] = []

    def fields(self, body: bytes) -> list[Field]:
        if body not in self.seen:
            self.seen[body] = fields_of(body)
            self.keys.append(body)
            if len(self.keys) > 3000:
                self.seen.pop(self.keys.pop(0))
        return self.seen[body]

    def __call__(self, body: bytes, rng: random.Random) -> bytes:
        fields = self.fields(body)
        fields = mutated(rng, fields, self.seen[self.keys[rng.randrange(len(self.keys))]])
        new = body_of(fields if rng.randrange(3) else completed(fields, rng))
        if not rng.randrange(8) and new:  # a fault that no field explains
            at = rng.randrange(len(new))
            new = new[:at] + bytes([rng.randrange(256)]) + new[at + rng.randrange(2) :]
        return new[:LARGEST]


# --- the targets ---


def shapes_for(archive, rng: random.Random) -> None:
    """Give a file without names shapes that suit it, or nearly."""
    for i, r in enumerate(archive.records):
        r.name, r.dtype = f"t{i}", rng.choice(("float32", "float32", "float16", "bfloat16"))
        if r.kind == "alias":
            r.shape = archive.records[r.alias].shape
        elif r.kind == "raw":
            size = container._ITEM_BYTES[container.RAW_DTYPES.index(r.raw_dtype)]
            r.shape = (len(r.data) // size,)
        elif r.kind == "coded":
            kept = [min(k, 60) if k is not None else 1 for k in r.kept]
            units = max(len(r.prior_codes) if len(r.prior_codes) > 1 else 1, kept[0])
            row = max(kept[1], -(-max(len(r.index), 1) // units))
            r.shape = rng.choice(((units + rng.randrange(2), row), (units, row, 1 + rng.randrange(9)), (units * row,)))
        else:
            r.shape = (rng.randrange(5), 3)[: rng.randrange(3)]
    if archive.path is not None and rng.randrange(8):  # a stream of the length that these shapes take
        lives = zip(archive.records, container.resolve_kept(archive.records), strict=True)
        needed = sum(dataclasses.replace(r.rate, count=container.live_count(r, live)).bits for r, live in lives if r.rate is not None)
        archive.path.bits = np.resize(archive.path.bits, needed)


def decode_target(data: bytes) -> str:
    """Parse, and decode: one tensor of each file that is accepted, all of one in eight."""
    archive = container.parse(data)
    rng = random.Random(data)
    if not archive.names:
        shapes_for(archive, rng)
        container.check_shapes(archive)
    if rng.randrange(8) == 0:
        Outcomes.declared = sum(a.nbytes for a in decode.decode_arrays(archive).values())
    elif archive.records:
        Outcomes.declared = decode.decode_array(archive, str(rng.choice(archive.records).name)).nbytes
    return f"decoded {archive.coder}"


def load_target() -> Callable[[bytes], str]:
    """`load` of a file into modules that some of the inputs were made for."""
    load = importlib.import_module("miracle_ban.load")
    sys.path.insert(0, str(FOLDER))
    import helpers

    said = json.loads((FOLDER / "golden" / "manifest.json").read_text())
    known = [[(n, tuple(s), d) for n, s, d in card["entries"]] for card in said.values()]
    by_count: dict[int, list] = collections.defaultdict(list)
    for entries in known:
        with contextlib.suppress(KeyError):  # names that a module cannot give its tensors
            by_count[len(entries)].append((container.fingerprint([(n, s) for n, s, _ in entries]), helpers.Holder(entries)))
    path = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)) / "net.mban"

    def target(data: bytes) -> str:
        try:
            models = by_count[len(container.parse(data).records)] or by_count[3]
        except errors.MiracleError:
            models = by_count[3]
        mark, model = models[len(data) % len(models)]
        if len(data) > 10 and len(data) % 16:  # the fingerprint is right, so that it is not all that is tested
            data = with_checksum(mark.to_bytes(2, "big") + data[10:])
        path.write_bytes(data)
        if len(data) % 5 == 0:
            Outcomes.declared = sum(t.nbytes for t in load.load(path).values())
        else:
            load.load(path, model)
        return "loaded"

    return target


def where(error: Exception) -> str:
    """Kind of an error and the line that raised it."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return f"{type(error).__name__} {last.tb_frame.f_code.co_name} {last.tb_lineno}" if last is not None else type(error).__name__


class Outcomes:
    """Counts, failures and extremes of the executions so far."""

    declared = 0  # bytes of the latest result

    def __init__(self, folder: pathlib.Path | None, target: Callable[[bytes], str]):
        self.folder, self.target = folder, target
        self.counts: collections.Counter[str] = collections.Counter()
        self.executions, self.failures = 0, 0
        self.slowest, self.slowest_input = 0.0, b""
        self.start, self.said = time.time(), time.time()
        self.base_mb = self.peak_mb = self.memory()
        self.peaks: list[tuple[float, int, int]] = []
        self.seconds_before = 0.0
        if folder is not None and (folder / "counts.json").exists():
            before = json.loads((folder / "counts.json").read_text())
            self.counts.update(before["outcomes"])
            self.executions, self.failures, self.seconds_before = before["executions"], before["failures"], before["seconds"]
            self.slowest, self.peaks = before["slowest_s"], [tuple(p) for p in before["peaks"]]

    @staticmethod
    def memory() -> float:
        """Largest resident memory so far, MB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if "resource" in globals() else 0.0

    def __call__(self, body: bytes) -> str:
        """Run one input; returns what came of it."""
        data = with_checksum(body)
        self.executions += 1
        Outcomes.declared = 0
        started = time.perf_counter()
        try:
            outcome = kind = self.target(data)
        except errors.MiracleError as error:
            kind, outcome = type(error).__name__, where(error)
        except Exception as error:
            kind = f"FAILURE {type(error).__name__}"
            outcome = where(error)
            self.fail(kind, body, traceback.format_exc())
        self.counts[kind] += 1
        if time.perf_counter() - started > self.slowest:  # other processes count, too: once more, by the CPU's clock
            took = self.cpu_time(data)
            if took > self.slowest:
                self.slowest, self.slowest_input = took, body
            if took > max(len(data) / 1000, 1.0):
                self.fail("time", body, f"{took:.2f} s of CPU time for {len(data)} bytes")
        if not self.executions & 15 and (memory := self.memory()) > self.peak_mb + 1:
            self.peaks.append((round(memory - self.base_mb, 1), Outcomes.declared, len(data)))
            self.peak_mb = memory
        if not self.executions & 255 and time.time() > self.said + 20:
            self.said = time.time()
            self.report()
        return outcome

    def cpu_time(self, data: bytes) -> float:
        """Seconds that the target takes."""
        started = time.process_time()
        with contextlib.suppress(Exception):
            self.target(data)
        return time.process_time() - started

    def fail(self, kind: str, body: bytes, text: str) -> None:
        self.failures += 1
        if self.failures <= FAILURES_KEPT:
            print(f"{kind}: {with_checksum(body).hex()}\n{text}", file=sys.stderr, flush=True)
            if self.folder is not None:
                name = self.folder / f"failure-{zlib.crc32(body):08x}"
                name.with_suffix(".mban").write_bytes(with_checksum(body))
                name.with_suffix(".txt").write_text(text)

    def summary(self) -> dict:
        seconds = self.seconds_before + time.time() - self.start
        return {
            "executions": self.executions, "failures": self.failures, "seconds": round(seconds, 1), "cpu_s": round(time.process_time(), 1),
            "slowest_s": round(self.slowest, 4), "base_mb": round(self.base_mb), "peak_mb": round(self.peak_mb),
            "outcomes": dict(self.counts.most_common()), "peaks": self.peaks[-20:],
        }  # fmt: skip

    def report(self) -> None:
        """One line on stderr, and the counts to the folder."""
        said = self.summary()
        kinds = ", ".join(f"{k} {v}" for k, v in self.counts.most_common(7))
        extremes = f"slowest {self.slowest * 1e3:.0f} ms, peak {self.peak_mb:.0f} MB"
        print(f"{self.executions} executions, {said['seconds']:.0f} s, {extremes}; {kinds}", file=sys.stderr, flush=True)
        if self.folder is not None:
            (self.folder / "counts.json").write_text(json.dumps(said, indent=1) + "\n")
            (self.folder / "slowest.mban").write_bytes(with_checksum(self.slowest_input))


# --- the two engines ---


def bodies(files: Iterable[pathlib.Path]) -> list[bytes]:
    """What is in files that are not too large, without magic and checksum."""
    return [p.read_bytes()[8:] for p in sorted(files) if p.stat().st_size <= LARGEST]


def seeds(folder: pathlib.Path | None) -> list[bytes]:
    """Bodies to begin with: the golden files, whatever small ones are pretrained, and the corpus of earlier runs."""
    files = [*(FOLDER / "golden").glob("*.mban"), *(FOLDER.parent / "pretrained").glob("*.mban")]
    return bodies(files) + ([p.read_bytes() for p in sorted((folder / "corpus").glob("*"))] if folder is not None else [])


def own(outcomes: Outcomes, executions: int, seed: int) -> None:
    """Without coverage: an input is kept if its outcome is new."""
    rng, mutator, corpus, seen = random.Random(seed), Mutator(), seeds(outcomes.folder), set()
    for body in corpus:
        seen.add(outcomes(body))
        mutator.fields(body)
    while outcomes.executions < executions:
        body = mutator(corpus[rng.randrange(len(corpus))], rng)
        outcome = outcomes(body)
        if outcome not in seen:
            seen.add(outcome)
            corpus.append(body)
            if outcomes.folder is not None:
                (outcomes.folder / "corpus" / f"{zlib.crc32(body):08x}").write_bytes(body)


def guided(outcomes: Outcomes, executions: int, seed: int) -> None:
    """By coverage, with atheris; does not return."""
    mutator, corpus = Mutator(), outcomes.folder / "corpus"
    for body in seeds(outcomes.folder):
        (corpus / f"{zlib.crc32(body):08x}").write_bytes(body)
        mutator.fields(body)

    def target(body: bytes) -> None:
        outcomes(body)
        if outcomes.executions >= executions:
            outcomes.report()
            os._exit(outcomes.failures > 0)

    def mutate(body: bytes, most: int, number: int) -> bytes:
        return mutator(body, random.Random(number))[:most] if number % 8 else atheris.Mutate(body, most)

    options = [f"-seed={seed + 1}", f"-max_len={LARGEST}", "-timeout=60", "-rss_limit_mb=0", "-verbosity=0", "-len_control=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=1_000_000, help="in all, counting those of earlier runs in this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-mb", type=int, default=2000, help="limit of the address space beyond what the libraries take")
    parser.add_argument("--target", choices=("decode", "load"), default="decode")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("fuzz"))
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a folder of its own")
    args = parser.parse_args()
    (args.folder / "corpus").mkdir(parents=True, exist_ok=True)
    if args.workers > 1:
        rest = ["--memory-mb", str(args.memory_mb), "--target", args.target, "--executions", str(-(-args.executions // args.workers))]
        running = [
            subprocess.Popen([sys.executable, __file__, *rest, "--seed", str(args.seed + i), "--folder", str(args.folder / str(i))])
            for i in range(args.workers)
        ]
        return max(process.wait() for process in running)
    outcomes = Outcomes(args.folder, load_target() if args.target == "load" else decode_target)
    if "resource" in globals():
        used = int(re.findall(r"VmSize:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[0]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (used + (args.memory_mb << 20), resource.RLIM_INFINITY))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if atheris is not None:
        guided(outcomes, args.executions, args.seed + outcomes.executions)
    own(outcomes, args.executions, args.seed + outcomes.executions)
    outcomes.report()
    return int(outcomes.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
