"""Files made to do harm: a short run of tests/fuzz.py, what a small file may cost, and that no code runs from a file."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import fuzz
import numpy as np
import pytest

from miracle_ban import MiracleError, decode_arrays
from miracle_ban.container import Archive, Record, parse
from miracle_ban.container import Path as Stream
from miracle_ban.decode import stored_arrays
from miracle_ban.errors import CorruptError, MismatchError
from miracle_ban.trellis import Rate

GOLDEN = Path(__file__).parent / "golden"

# --- fuzzing ---


def test_a_short_run_of_the_fuzzer_finds_nothing():
    outcomes = fuzz.Outcomes(None, fuzz.decode_target)
    fuzz.own(outcomes, 4000, seed=0)
    assert outcomes.failures == 0
    assert outcomes.executions == 4000
    assert len([kind for kind in outcomes.counts if kind.startswith("decoded")]) >= 6
    assert outcomes.counts["CorruptError"] > 500


def test_a_short_run_of_the_fuzzer_into_modules_finds_nothing():
    outcomes = fuzz.Outcomes(None, fuzz.load_target())
    fuzz.own(outcomes, 500, seed=1)
    assert outcomes.failures == 0
    assert outcomes.counts["loaded"] > 20


def test_the_fuzzer_finds_what_is_planted(monkeypatch, capsys):
    right = fuzz.container.live_count

    def wrong(record, live):
        return right(record, live) + 0 // (len(record.prior_codes) - 5)  # five units with scales of their own are too many for it

    golden = fuzz.bodies(GOLDEN.glob("*.mban"))  # not what is pretrained: whether it is found would hang on that
    monkeypatch.setattr(fuzz, "seeds", lambda _: list(golden))
    monkeypatch.setattr(fuzz.container, "live_count", wrong)
    outcomes = fuzz.Outcomes(None, fuzz.decode_target)
    fuzz.own(outcomes, 1500, seed=0)
    assert outcomes.counts["FAILURE ZeroDivisionError"] == outcomes.failures > 0
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_slow_inputs_are_failures(monkeypatch):
    monkeypatch.setattr(fuzz.Outcomes, "cpu_time", lambda *_: 1.5)
    outcomes = fuzz.Outcomes(None, fuzz.decode_target)
    outcomes(next(iter(fuzz.seeds(None))))
    assert outcomes.failures == 1


def test_the_fuzzer_goes_on_where_it_stopped(tmp_path):
    for executions in (300, 500):
        command = [sys.executable, fuzz.__file__, "--executions", str(executions), "--folder", str(tmp_path), "--memory-mb", "1000"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "counts.json").read_text())["executions"] == executions
    assert list((tmp_path / "corpus").iterdir())


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.mban")), ids=lambda p: p.stem)
def test_the_fuzzer_writes_the_fields_that_it_reads(path):
    body = path.read_bytes()[8:]
    assert fuzz.body_of(fuzz.fields_of(body)) == body


def test_inputs_completed_by_the_fuzzer_are_mostly_read_to_the_end():
    rng, bodies, read = random.Random(0), fuzz.seeds(None), 0
    for _ in range(200):
        fields = fuzz.fields_of(rng.choice(bodies))
        try:
            parse(fuzz.with_checksum(fuzz.body_of(fuzz.completed(fields[: rng.randrange(len(fields)) + 1], rng))))
            read += 1
        except MiracleError:
            continue
    assert read > 60


# --- what a small file may cost ---


def coded(shape: tuple[int, ...], blocks: int, code: int = 190, **more) -> Record:
    index = np.ones(blocks, np.int64)
    return Record("coded", prior_codes=np.array([code], np.uint8), index=index, name="w", shape=shape, dtype="float32", **more)


def filler(size: int) -> Record:
    data = bytes(size)
    return Record("raw", raw_dtype="uint8", data=data, name="filler", shape=(size,), dtype="uint8")


def greedy() -> dict[str, bytes]:
    """Files of about a kilobyte that ask for as much as they may."""
    many = [coded((1,), 1, rate=Rate(1, 1, 64)) for _ in range(300)]
    for i, r in enumerate(many):
        r.name = str(i)
    stream = np.zeros(7300, np.uint8)
    return {
        "drawn": Archive([coded((1020 * 4096,), 1020), filler(800)]).to_bytes(),
        "private": Archive([coded((7000 * 8,), 7000)]).to_bytes(),
        "steps": Archive([coded((256 * 7300,), 1, rate=Rate(256 * 7300, 256, 64))], "trellis", path=Stream(20, 15, stream)).to_bytes(),
        "frames": Archive(many, "trellis", path=Stream(20, 15, np.zeros(300, np.uint8))).to_bytes(),
        "nodes": Archive([coded((7000,), 7000)], "branch-and-bound-gprs").to_bytes(),
        "zeros": Archive([coded((1 << 24,), 1, 0)]).to_bytes(),
        "wide": Archive([Record("constant", constant=1, name="w", shape=(1 << 22,), dtype="complex128")]).to_bytes(),
    }


@pytest.mark.parametrize("name", greedy())
def test_a_kilobyte_costs_a_second_and_a_multiple_of_its_result_at_most(name):
    data = greedy()[name]
    assert len(data) < 1500
    list(stored_arrays(parse(Archive([coded((9,), 1)]).to_bytes())))  # tables are loaded once
    started = time.process_time()
    result = sum(a.nbytes for a in decode_arrays(parse(data)).values())
    assert time.process_time() - started < 3.0  # a second, on a machine that does nothing else
    tracemalloc.start()
    try:
        decode_arrays(parse(data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (48 << 20) + 12 * result


def test_more_weights_than_a_file_may_draw_are_refused():
    """By the writer, and by the reader of what a hostile writer wrote."""
    large = Archive([coded((2000 * 4096,), 2000), filler(10)])
    with pytest.raises(MismatchError, match="names=False"):
        large.to_bytes()
    assert large.size_bytes < 400  # no judgement of files that are not finished
    small = Archive([coded((1000 * 4096,), 1000), filler(10)])
    size = small.size_bytes
    small.names = False
    large.names = False
    nameless = large.to_bytes()
    assert parse(nameless).records[0].index.size == 2000  # shapes are the caller's
    assert size < 300
    lines = f"float32 {2000 * 4096} w\nuint8 10 filler\n".encode()
    with pytest.raises(CorruptError, match="weights to be drawn"):
        parse(named(nameless, lines))


def named(nameless: bytes, lines: bytes) -> bytes:
    """A file of the octave table with names put in."""
    fields = fuzz.fields_of(nameless[8:])
    at = next(i for i, f in enumerate(fields) if (f[0], f[2]) == ("golomb", 3)) + 1
    fields[1] = ("bits", 1, 1)
    packed = zlib.compress(lines)
    return fuzz.with_checksum(fuzz.body_of([*fields[:at], ("golomb", len(packed), 8), ("bytes", packed, 0), *fields[at:]]))


def test_names_that_unpack_to_very_many_lines_cost_what_they_unpack_to():
    lines = b"\n" * 30_000_000
    nameless = Archive([Record("constant", shape=(1,)) for _ in range(20_000)], names=False).to_bytes()
    data = named(nameless, lines)
    assert len(data) < 40_000
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError, match="lines"):
            parse(data)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


# --- no code runs from a file ---

AUDITED = """
import json, sys
import miracle_ban
from pathlib import Path

def read(paths):
    for path in paths:
        try:
            archive = miracle_ban.open(path)
            arrays = miracle_ban.decode_arrays(archive)
            tensors = miracle_ban.load(path)
        except miracle_ban.MiracleError:
            pass

paths = sys.argv[1:]
read(paths)  # what is imported and cached once is not the file's doing
events = []
watching = False
sys.addaudithook(lambda event, arguments: events.append([event, str(arguments[:1])]) if watching else None)
watching = True
read(paths)
watching = False
print(json.dumps(events))
"""


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_no_code_runs_from_a_file(tmp_path):
    """Python's audit events of decoding: the file is opened, and nothing is compiled, imported, executed or unpickled."""
    payload = pickle.dumps(Bomb())
    text = b"__import__('os').mkdir('exploded')"
    for i, data in enumerate((payload, text)):
        records = [
            Record("raw", raw_dtype=dtype, data=data, shape=(len(data),), name=name, dtype=own)
            for dtype, own, name in (
                ("opaque", "uint8", "__reduce__"), ("uint8", "uint8", "__import__('os').mkdir('exploded')"), ("int8", "load", "../../x"),
            )
        ]  # fmt: skip
        (tmp_path / f"{i}.mban").write_bytes(Archive(records).to_bytes())
        (tmp_path / f"{i}-known.mban").write_bytes(Archive(records[:2]).to_bytes())
        (tmp_path / f"{i}-bare.mban").write_bytes(payload)
    paths = sorted(tmp_path.glob("*.mban")) + sorted(GOLDEN.glob("*names*.mban")) + [GOLDEN / "v1_dtypes.mban", GOLDEN / "v1_records.mban"]
    command = [sys.executable, "-c", AUDITED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, cwd=tmp_path)
    events = json.loads(done.stdout)
    assert {event for event, _ in events} <= {"open", "object.__getattr__", "object.__setattr__", "sys._getframe"}, events
    opened = [argument for event, argument in events if event == "open"]
    assert len(opened) >= len(paths)
    assert all(any(str(p) in argument for p in paths) for argument in opened)
    assert not (tmp_path / "exploded").exists()
