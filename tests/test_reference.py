"""The second decoder, written from FORMAT.md, against the first one."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import fuzz
import numpy as np
import pytest
import reference_decoder
import test_pretrained
from reference_decoder import File, RefusedError

from miracle_ban import MiracleError
from miracle_ban.bits import crc32
from miracle_ban.container import parse
from miracle_ban.decode import bind_entries, decode_array, decode_arrays, stored_arrays
from miracle_ban.decode import open as open_archive
from miracle_ban.randomness import quantiles

PRETRAINED = Path(__file__).parent.parent / "pretrained"
SAMPLED = 40  # steps or blocks of a tensor, in files too large for plain Python


def test_the_table_of_normals_is_what_its_formula_says():
    assert reference_decoder.normal_table() == quantiles().tolist()


@pytest.mark.parametrize("card", test_pretrained.MANIFEST, ids=[m["file"] for m in test_pretrained.MANIFEST])
def test_pretrained_files_agree_with_the_reference_decoder(card):
    """Small files whole; of large ones some steps of every tensor."""
    path = PRETRAINED / card["file"]
    entries = [(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in test_pretrained.network(card).state_dict().items()]
    archive = open_archive(path)
    bind_entries(archive, entries)
    file = File(path.read_bytes(), [(dtype, shape, name) for name, shape, dtype in entries])
    if sum(r.count for r in file.records) < 15_000:
        assert reference_decoder.digest(file) == card["sha256_weights"]
        return
    rng = random.Random(card["file"])
    for i, (r, array) in enumerate(zip(file.records, decode_arrays(archive).values(), strict=True)):
        if r.kind != "coded":
            assert file.tensor(i) == array.tobytes()
        elif r.count:
            drawn = dict(file.weights(i, sorted(rng.sample(range(r.steps), min(r.steps, SAMPLED)))))
            assert min(r.count, SAMPLED) <= len(drawn)
            assert array.ravel()[list(drawn)].tolist() == list(drawn.values())


def test_the_command_line_gives_the_digest(tmp_path):
    card = min(test_pretrained.MANIFEST, key=lambda m: m["bytes"])
    heads = tmp_path / "heads.txt"
    state = test_pretrained.network(card).state_dict()
    heads.write_text("".join(f"float32 {','.join(map(str, t.shape))} {name}\n" for name, t in state.items()))
    command = [sys.executable, reference_decoder.__file__, str(PRETRAINED / card["file"]), str(heads)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip() == card["sha256_weights"]


def both(data: bytes) -> tuple[str, str]:
    """What each decoder makes of a file: "refused", or a digest of the stored values."""
    results, heads = ["refused", "refused"], None
    try:
        archive = parse(data)
        if not archive.names:
            try:
                fuzz.shapes_for(archive, random.Random(data))
            except MiracleError:  # no shapes suit it
                return "refused", "refused"
            heads = [(str(r.dtype), r.shape or (), str(r.name)) for r in archive.records]
            text = "".join(f"{name} {','.join(map(str, shape))}\n" for _, shape, name in heads)
            data = fuzz.with_checksum((crc32(text.encode()) & 0xFFFF).to_bytes(2, "big") + data[10:])
            archive = parse(data)
            bind_entries(archive, [(name, shape, dtype) for dtype, shape, name in heads])
        results[0] = hashlib.sha256(b"".join(a.tobytes() for a in stored_arrays(archive))).hexdigest()
    except MiracleError:
        pass
    try:
        file = File(data, heads)
        results[1] = "accepted"
        for r in file.records:
            source = file.records[r.alias] if r.kind == "alias" else r
            r.dtype = "float32" if source.kind != "raw" else "uint8" if source.stored == "opaque" else source.stored
        if file.names or heads is not None:
            results[1] = reference_decoder.digest(file)
    except RefusedError:
        pass
    return results[0], results[1]


def test_the_two_decoders_accept_and_refuse_the_same_files():
    """The rules of section 10, on mutated files: bits of the same weights, or a refusal by both."""
    rng, mutator, bodies = random.Random(7), fuzz.Mutator(), fuzz.seeds(None)
    seen = {"refused": 0, "decoded": 0}
    for _ in range(600):
        data = fuzz.with_checksum(mutator(rng.choice(bodies), rng))
        first, second = both(data)
        assert first == second, data.hex()
        seen["refused" if first == "refused" else "decoded"] += 1
    assert min(seen.values()) > 60, seen


def test_decoding_one_array_is_decoding_all(tmp_path):
    for card in test_pretrained.MANIFEST[:2]:
        archive = open_archive(PRETRAINED / card["file"])
        arrays = decode_arrays(archive)
        for name in archive.keys()[::3]:
            assert np.array_equal(decode_array(archive, name), arrays[name])
