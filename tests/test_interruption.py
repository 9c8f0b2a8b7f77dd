"""Work that is killed goes on to the same file; writing that fails, or that several do at once, leaves whole files."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import helpers
import kill
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from miracle_ban import MiracleError, convert, encode, fit, save
from miracle_ban import open as open_archive
from miracle_ban.block_packing import BlockPacking
from miracle_ban.errors import CodingError
from miracle_ban.files import write_whole
from miracle_ban.layers import posteriors

QUIET = {"progress": False}


def test_killed_work_goes_on_to_the_same_file_byte_for_byte():
    jobs = ["gprs", "trellis, per unit", "attention", "untrained", "hardened", "save"]
    command = [sys.executable, str(Path(kill.__file__)), "--kills", "14", "--seed", "1", "--jobs", *jobs]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["job"] for r in rows] == jobs
    assert sum(r["kills"] for r in rows) == 14
    assert all(r["finished"] and not r["faults"] for r in rows)


class StopError(Exception):
    pass


def failing_after(calls: int):
    left = iter(range(calls))

    def loss(out, y):
        if next(left, None) is None:
            raise StopError
        return F.cross_entropy(out, y)

    return loss


def test_resumed_packaging_shortens_over_the_rounds_before_the_interruption_too(bnn, batches, tmp_path, monkeypatch):
    """The last blocks are coded again where the file is too large, four rounds of them, then all."""
    monkeypatch.setattr(BlockPacking, "finish", lambda self, archive: _finish(self, archive) + 40 * (self.turn > 1))
    warnings.simplefilter("ignore")
    options = {"rounds": 6, "refine_steps": 5, **QUIET}
    whole = encode(copy.deepcopy(bnn), batches, F.cross_entropy, **options)
    with pytest.raises(StopError):
        encode(copy.deepcopy(bnn), batches, failing_after(23), checkpoint=tmp_path / "state", **options)
    resumed = encode(copy.deepcopy(bnn), batches, F.cross_entropy, checkpoint=tmp_path / "state", **options)
    assert resumed.to_bytes() == whole.to_bytes()
    monkeypatch.undo()
    assert encode(copy.deepcopy(bnn), batches, F.cross_entropy, **options).to_bytes() != whole.to_bytes()  # it did shorten


_finish = BlockPacking.finish


@pytest.mark.parametrize("own_generator", [False, True])
def test_shuffling_and_draws_go_on_where_they_were(tmp_path, own_generator):
    """Also where narrowing ends within a pass, and with statistics of a norm that training moves."""
    data = TensorDataset(*helpers.blobs(160, seed=2))
    seen: list[list[float]] = []

    def loader() -> DataLoader:
        return DataLoader(data, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(3) if own_generator else None)

    def network() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))

    def run(loss, checkpoint: Path | None) -> bytes:
        seen.append([])
        bnn = convert(network(), fold=False)
        batches = loader()
        fit(bnn, batches, loss, budget=250, epochs=6, narrow_epochs=1.4, coder=kill.TRELLIS, weights_per_bit=0.3,
            checkpoint=None if checkpoint is None else checkpoint / "fit", **QUIET)  # fmt: skip
        archive = encode(bnn, batches, loss, budget=400, coder=kill.TRELLIS, rounds=4, refine_steps=3,
                         checkpoint=None if checkpoint is None else checkpoint / "encode", **QUIET)  # fmt: skip
        return archive.to_bytes()

    expected = run(F.cross_entropy, None)
    for calls in (13, 26, 42):
        folder = tmp_path / str(calls)
        folder.mkdir()
        with pytest.raises(StopError):
            run(failing_after(calls), folder)
        assert run(F.cross_entropy, folder) == expected


def test_a_checkpoint_of_another_release_is_refused(batches, tmp_path):
    path = tmp_path / "state"
    fit(convert(kill.network()), batches[:2], F.cross_entropy, epochs=1, checkpoint=path, **QUIET)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "version": 1}, path)
    with pytest.raises(CodingError, match="another release"):
        fit(convert(kill.network()), batches[:2], F.cross_entropy, epochs=1, checkpoint=path, **QUIET)


def test_parts_of_dead_writers_are_removed_after_an_hour_and_nothing_else_is(tmp_path):
    path = tmp_path / "net[1].mban"
    names = [
        ".net[1].mban.0123abcd.part",
        ".net[1].mban.89ab4567.part",
        ".net[1].mban.backup12.part",
        ".net1.mban.0123abcd.part",
        "net[1].mban.part",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    os.utime(tmp_path / names[1])  # somebody may still be writing this one
    write_whole(path, b"whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names[1:], path.name])


def test_a_full_disk_is_an_error_that_says_what_to_do_and_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands for it: writing fails half way, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "net.mban"
    write_whole(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(MiracleError, match=r"cannot write .*net\.mban \(5,000 bytes\): .*unchanged\. Remedy: "):
            write_whole(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_in_two_processes_leave_whole_files(tmp_path):
    archives = [encode(_blurred(seed), coder=kill.TRELLIS, **QUIET) for seed in (0, 1)]
    path = tmp_path / "net.mban"
    save(archives[0], path)
    writers = [kill.CONTEXT.Process(target=_save_often, args=(archive, path)) for archive in archives]
    for w in writers:
        w.start()
    whole = {a.to_bytes() for a in archives}
    looks = 0
    while any(w.is_alive() for w in writers) or not looks:
        assert path.read_bytes() in whole
        open_archive(path)
        looks += 1
    for w in writers:
        w.join()
    assert [w.exitcode for w in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


def _save_often(archive, path: Path) -> None:
    for _ in range(100):
        save(archive, path)


def _blurred(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    bnn = convert(nn.Linear(30, 40))
    with torch.no_grad():
        for p in posteriors(bnn).values():
            p.log_std.fill_(float(np.log(0.1)))
    return bnn
