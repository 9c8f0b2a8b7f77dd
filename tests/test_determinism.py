"""The same seed and inputs give the same bytes, and the same bytes give the same weights, whatever else is set in the process."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import helpers
import kill
import pytest
import torch
import torch.nn.functional as F

from miracle_ban import convert, decode, encode, fit
from miracle_ban.coders import Trellis
from miracle_ban.container import parse
from miracle_ban.layers import posteriors

QUIET = {"progress": False}
SCRIPT = """
import sys, pathlib, hashlib, kill
for job in ("gprs", "trellis, per unit", "untrained", "attention"):
    kill.run(job, pathlib.Path(sys.argv[1]), False, None)
    print(job, hashlib.sha256((pathlib.Path(sys.argv[1]) / kill.FILE).read_bytes()).hexdigest())
"""


def test_fresh_processes_with_other_hash_seeds_give_the_same_files(tmp_path):
    printed = []
    for seed in ("1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        printed.append(subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True).stdout)
    assert printed[0] == printed[1]
    assert len(printed[0].splitlines()) == 4


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")  # of which no value can be read: whatever is made without a device is found out
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)


ENCODING = [default_dtype, default_device, deterministic_algorithms, warnings_as_errors, torch.no_grad]
DECODING = [*ENCODING, two_threads, torch.inference_mode, torch.enable_grad]


@pytest.fixture(scope="module")
def archives(fitted) -> list:
    return [encode(copy.deepcopy(fitted[0]), coder=c, names=True, budget="1 MB", **QUIET) for c in ("gprs", Trellis(memory=10))]


@pytest.mark.parametrize("setting", DECODING, ids=lambda s: s.__name__)
def test_decoding_is_the_same_under_every_setting(archives, setting: Callable):
    for archive in archives:
        data = archive.to_bytes()
        expected = decode(parse(data))
        with setting():
            found = decode(parse(data))
            names = list(found)
            random.Random(0).shuffle(names)
            alone = {n: parse(data)[n] for n in names}
        assert helpers.same_state(found, expected)
        assert helpers.same_state({n: alone[n] for n in expected}, expected)


@pytest.fixture(scope="module")
def plainly() -> dict[str, bytes]:
    return {kind: work() for kind, work in WORK.items()}


def trained() -> bytes:
    images, labels = helpers.blobs(128, seed=0)
    bnn = convert(kill.network(), per_unit=True)
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    fit(bnn, batches, F.cross_entropy, budget=130, epochs=10, coder=kill.TRELLIS, **QUIET)
    return encode(bnn, batches, F.cross_entropy, coder=kill.TRELLIS, rounds=2, refine_steps=3, **QUIET).to_bytes()


def packed(coder: str) -> Callable[[], bytes]:
    def work() -> bytes:
        bnn = convert(kill.network())
        with torch.no_grad():
            for p in posteriors(bnn).values():
                p.log_std.fill_(-2.3)
        return encode(bnn, coder=coder, block_bits=6.0, **QUIET).to_bytes()

    return work


def untrained() -> bytes:
    images, _ = helpers.blobs(64, seed=4)
    return kill.miracle_ban.compress(kill.network(), inputs=images, budget=200, coder=kill.TRELLIS, **QUIET).to_bytes()


WORK: dict[str, Callable[[], bytes]] = {
    "trained": trained, "untrained": untrained, "gprs": packed("gprs"), "minimal-random": packed("minimal-random"),
    "a-star": packed("a-star"),
}  # fmt: skip


@pytest.mark.parametrize("setting", ENCODING, ids=lambda s: s.__name__)
@pytest.mark.parametrize("kind", WORK)
def test_encoding_is_the_same_under_every_setting(plainly, monkeypatch, setting: Callable, kind: str):
    net, data = kill.network(), {(n, seed): helpers.blobs(n, seed=seed) for n, seed in ((128, 0), (64, 4))}
    monkeypatch.setattr(kill, "network", lambda: net)  # the user's own network and data are what they are without the setting
    monkeypatch.setattr(helpers, "blobs", lambda n, seed: data[n, seed])
    with setting():
        assert WORK[kind]() == plainly[kind]
