"""Files that must decode to the same bits for ever; see make_golden.py."""

from __future__ import annotations

import hashlib
import json

import helpers
import make_golden
import pytest
from reference_decoder import File

from miracle_ban import decode
from miracle_ban import open as open_archive
from miracle_ban.container import CODERS, FORMAT_VERSION, RAW_DTYPES, TREES, live_count, parse, resolve_kept
from miracle_ban.decode import bind_entries

FILES = sorted(p.name for p in make_golden.FOLDER.glob("v*_*.mban"))


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads(make_golden.MANIFEST.read_text())


def test_the_manifest_lists_just_the_files_that_there_are(manifest):
    assert sorted(manifest) == sorted(p.name for p in make_golden.FOLDER.glob("*.mban"))
    assert len(manifest) >= 10


def entries(said: dict) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name, tuple(shape), dtype) for name, shape, dtype in said["entries"]]


@pytest.mark.parametrize("name", FILES)
def test_golden_files_decode_to_the_same_bits_for_ever(manifest, name):
    said, path = manifest[name], make_golden.FOLDER / name
    data = path.read_bytes()
    assert len(data) == said["bytes"] <= 2048
    assert hashlib.sha256(data).hexdigest() == said["sha256"]
    archive = open_archive(path)
    named = archive.names
    state = decode(archive) if named else decode(archive, helpers.Holder(entries(said)))
    assert [(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in state.items()] == entries(said)
    assert make_golden.weights_digest(state) == said["weights_sha256"]


@pytest.mark.parametrize("name", FILES)
def test_golden_files_agree_with_the_reference_decoder(manifest, name):
    """Two decoders, the other one in plain Python from FORMAT.md."""
    said, path = manifest[name], make_golden.FOLDER / name
    file = File(path.read_bytes(), [(dtype, shape, own) for own, shape, dtype in entries(said)])
    archive = open_archive(path)
    state = decode(archive) if archive.names else decode(archive, helpers.Holder(entries(said)))
    assert [(r.name, r.shape, r.dtype) for r in file.records] == entries(said)
    for i, t in enumerate(state.values()):
        assert file.tensor(i) == helpers.tensor_bytes(t), file.records[i].name


def test_the_archives_of_today_are_the_files_of_then(manifest):
    """The writer, too, is frozen; only the zlib stream of the names may differ between machines."""
    for name, archive in make_golden.archives().items():
        if not archive.names:
            assert archive.to_bytes() == (make_golden.FOLDER / name).read_bytes()
        again, then = parse(archive.to_bytes()), parse((make_golden.FOLDER / name).read_bytes())
        for r, s in zip(again.records, then.records, strict=True):
            assert (r.kind, r.kept, r.constant, r.raw_dtype, r.data, r.alias) == (s.kind, s.kept, s.constant, s.raw_dtype, s.data, s.alias)
            assert r.prior_codes.tolist() == s.prior_codes.tolist()
            assert r.index.tolist() == s.index.tolist()
            assert r.rate == s.rate
        if archive.path is not None:
            assert again.path.bits.tolist() == then.path.bits.tolist()


def test_the_golden_files_cover_the_format():
    archives = [parse((make_golden.FOLDER / n).read_bytes()) for n in FILES]
    records = [r for a in archives for r in a.records]
    assert FORMAT_VERSION == 1
    assert CODERS == ("gprs", "minimal-random", "rejection", "ordered-random", "a-star", "trellis", "parallel-gprs",
                      "branch-and-bound-gprs", "branch-and-bound-a-star")  # fmt: skip
    assert {r.kind for r in records} == {"coded", "constant", "raw", "alias"}
    assert {a.names for a in archives} == {True, False}
    assert {a.coder for a in archives} == set(CODERS)
    assert {r.raw_dtype for r in records if r.kind == "raw"} == set(RAW_DTYPES)
    assert {a.path.memory for a in archives if a.path is not None} == set(range(1, 21))
    assert {a.path.log2_frames for a in archives if a.path is not None} >= {0, 1, 2, 3, 4, 5, 15}
    assert {a.records[r.alias].kind for a in archives for r in a.records if r.kind == "alias"} == {"coded", "constant", "raw"}
    assert {r.rate.width for r in records if r.rate is not None} >= {1, 2, 3, 256}
    assert {r.rate.rate for r in records if r.rate is not None} >= {64, 65, 512}
    assert {a.path.log2_frames > 0 for a in archives if a.path is not None} == {True, False}
    assert max(a.seed for a in archives) == (1 << 64) - 1
    assert any(len(r.prior_codes) > 1 and (r.prior_codes == 0).any() and (r.prior_codes > 0).any() for r in records)
    assert any(r.kept[1] is not None for r in records)
    assert any(r.kept[0] is not None and r.kept[1] is None for r in records)
    assert max(int(r.index.max(initial=0)) for r in records) > 1 << 28


def test_the_golden_files_cover_the_shapes_of_tensors(manifest):
    """Empty and dropped ones, kept corners and their followers, blocks of all kinds, and steps that are fewer and more than the states."""
    seen = set()
    for name in FILES:
        archive = open_archive(make_golden.FOLDER / name)
        bind_entries(archive, entries(manifest[name]))
        for r, live in zip(archive.records, resolve_kept(archive.records), strict=True):
            if r.kind != "coded":
                continue
            count = live_count(r, live)
            seen |= {"no axes" if not r.shape else "empty shape" if 0 in r.shape else "nothing drawn" if not count else "drawn"}
            seen |= {"follows"} if live != r.shape and r.kept == (None, None) else set()
            if r.rate is not None and count:
                seen |= {"more steps than states" if r.rate.steps >= 1 << archive.path.memory else "fewer steps than states"}
            elif count and archive.coder not in TREES:
                seen |= {"private" if -(-count // len(r.index)) <= 8 else "shared"} | ({"uneven"} if count % len(r.index) else set())
            seen |= {"over 32,768"} if count > 32768 else set()
    assert seen == {
        "no axes", "empty shape", "nothing drawn", "drawn", "over 32,768", "follows", "private", "shared", "uneven",
        "more steps than states", "fewer steps than states",
    }  # fmt: skip
