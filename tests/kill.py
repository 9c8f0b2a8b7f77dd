"""Kill work at random points, resume it, and compare what comes out byte for byte: `python tests/kill.py --kills 200 --seed 0`.

Every job is done once undisturbed and without a checkpoint. Then it is begun again and again with one, in processes that are killed
(SIGKILL) at a random time, or at a random step of writing a file, until it has been finished often enough. After each kill the
destination must hold the old file or the new one, whole, and beside it at most one part for each kill.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import miracle_ban
from miracle_ban import files
from miracle_ban.coders import Coder, Trellis

# forked processes start in milliseconds; where they are not to be had, or not safe, each one imports torch
CONTEXT: Any = multiprocessing.get_context("fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn")
TRELLIS = Trellis(memory=10)
OLD = b"what was there before" * 40
FILE = "net.mban"
TIMEOUT = 600.0
QUIET = {"progress": False}
torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # the first one imports much of torch: once, not in every process that is forked


def loader() -> DataLoader:
    """Shuffled batches of blobs, drawn from torch's own generator."""
    return DataLoader(TensorDataset(*helpers.blobs(128, seed=0)), batch_size=32, shuffle=True)


def network(hidden: int = 6) -> nn.Module:
    """A small network, the same every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def trained(coder: str | Coder, **options: Any) -> Callable[[Path, Path | None], None]:
    """Fit, refine, save."""

    def work(folder: Path, checkpoint: Path | None) -> None:
        own = {"fit_options": {"narrow_epochs": 1.4}, "encode_options": {"rounds": 4, "refine_steps": 3}, **options}
        archive = miracle_ban.compress(
            network(), loader(), F.cross_entropy, budget=130, epochs=10, coder=coder, checkpoint=checkpoint, **own, **QUIET
        )
        miracle_ban.save(archive, folder / FILE)

    return work


def untrained(folder: Path, checkpoint: Path | None) -> None:
    """From the weights and a few inputs, layer by layer."""
    images, _ = helpers.blobs(64, seed=4)
    archive = miracle_ban.compress(network(), inputs=images, budget=200, coder=TRELLIS, checkpoint=checkpoint, **QUIET)
    miracle_ban.save(archive, folder / FILE)


def hardened(folder: Path, checkpoint: Path | None) -> None:
    """Trained under noise, packaged and, with a fifth of a bit a weight, rescaled."""
    options = {"budget": 200, "epochs": 30, "hardened": True, "coder": TRELLIS, "checkpoint": checkpoint, **QUIET}
    archive = miracle_ban.compress(network(120), loader(), F.cross_entropy, **options)
    assert "rescale" in archive.info
    miracle_ban.save(archive, folder / FILE)


def specialised(folder: Path, checkpoint: Path | None) -> None:
    """With attention, for a context."""
    images, labels = helpers.blobs(128, seed=5)
    archive = miracle_ban.compress(
        network(), loader(), F.cross_entropy, budget=200, epochs=10, context=images[labels < 2], checkpoint=checkpoint, coder=TRELLIS,
        encode_options={"rounds": 4, "refine_steps": 3}, **QUIET,
    )  # fmt: skip
    miracle_ban.save(archive, folder / FILE)


def overwritten(folder: Path, _: Path | None) -> None:
    """Nothing but saving, a file of several pages, time after time."""
    net = network()
    net.register_buffer("noise", torch.randn(20_000))
    archive = miracle_ban.encode(miracle_ban.convert(net), coder=TRELLIS, **QUIET)
    for _ in range(30):
        miracle_ban.save(archive, folder / FILE)


JOBS: dict[str, Callable[[Path, Path | None], None]] = {
    "gprs": trained("gprs"), "trellis": trained(TRELLIS), "gprs, per unit": trained("gprs", per_unit=True),
    "trellis, per unit": trained(TRELLIS, per_unit=True), "untrained": untrained, "hardened": hardened,
    "attention": specialised,
    "save": overwritten,
}  # fmt: skip


def run(job: str, folder: Path, checkpoint: bool, trap: int | None) -> None:
    """Do a job in this process; `trap` is the step of writing files at which it kills itself."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if trap is not None:
        set_trap(trap)
    JOBS[job](folder, folder / "state" if checkpoint else None)


def set_trap(steps: int) -> None:
    """Let this process kill itself around the so-manieth flush or rename; before a flush half of the file is lost."""
    count = itertools.count()
    flush, rename = os.fsync, os.replace

    def reached() -> bool:
        return next(count) == steps

    def die() -> None:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    def fsync(handle: int) -> None:
        if reached():
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            die()
        flush(handle)

    def replace(source: Any, target: Any) -> None:
        if reached():
            die()
        rename(source, target)
        if reached():
            die()

    files.os.fsync, files.os.replace = fsync, replace


def finishes(job: str, folder: Path, *, checkpoint: bool, trap: int | None = None, seconds: float | None = None) -> bool:
    """Do a job in a process of its own, killed after some seconds; whether it came to its end.

    Raises:
        RuntimeError: it failed, rather than being killed.
    """
    process = CONTEXT.Process(target=run, args=(job, folder, checkpoint, trap))
    process.start()
    process.join(TIMEOUT if seconds is None else seconds)
    alive = process.is_alive()
    if alive:
        process.kill()
        process.join()
    if process.exitcode == 0:
        return True
    if process.exitcode != -getattr(signal, "SIGKILL", 9) and not (alive or trap is not None):
        raise RuntimeError(f"{job}: the process ended with status {process.exitcode}")
    return False


def torture(job: str, folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill a job so often, finish it whenever it gets that far, and say how it went."""
    reference = folder / "undisturbed"
    reference.mkdir()
    started = time.monotonic()
    if not finishes(job, reference, checkpoint=False):
        raise RuntimeError(f"{job}: killed without being asked for")
    seconds = time.monotonic() - started
    expected = (reference / FILE).read_bytes()
    done, finished, most_parts, faults = 0, 0, 0, []
    while done < kills or not finished:
        place = folder / f"run{finished}"
        place.mkdir()
        (place / FILE).write_bytes(OLD)
        here = 0
        while True:
            last = done >= kills
            timed = rng.random() < 0.5
            if finishes(job, place, checkpoint=True, trap=None if last or timed else rng.randrange(60),
                        seconds=rng.uniform(0.0, seconds) if timed and not last else None):  # fmt: skip
                break
            done, here = done + 1, here + 1
            if (place / FILE).read_bytes() not in (OLD, expected):
                faults.append(f"kill {done}: the destination is neither the old file nor the new one")
            parts = [p for p in place.iterdir() if p.name.endswith(".part")]
            most_parts = max(most_parts, len(parts))
            if len(parts) > here:
                faults.append(f"kill {done}: {len(parts)} parts after {here} kills")
        if (place / FILE).read_bytes() != expected:
            faults.append(f"after {here} kills another file came out")
        rest = [p.name for p in place.iterdir() if p.name != FILE and not p.name.endswith(".part")]
        if rest:
            faults.append(f"{rest} were left behind")
        finished += 1
        shutil.rmtree(place)
    return {"job": job, "bytes": len(expected), "kills": done, "finished": finished, "most_parts": most_parts, "faults": faults}


def main() -> int:
    """Share the kills out over the jobs; exit status 1 if anything was other than it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        for number, job in enumerate(args.jobs):
            folder = top / str(number)
            folder.mkdir()
            own = args.kills // len(args.jobs) + (number < args.kills % len(args.jobs))
            result = torture(job, folder, own, random.Random(args.seed * 1000 + number))
            faults += len(result["faults"])
            print(json.dumps(result), flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
