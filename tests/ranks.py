"""Several processes on one job, as `torchrun` would start them: `python tests/ranks.py scenario processes folder`.

A scenario is a function of (rank, folder) below. Each process prints one line of JSON; those of one rank come together at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import helpers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from kill import CONTEXT
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import miracle_ban
from miracle_ban import BayesianAttention, MiracleError, convert, distributed, encode, fit
from miracle_ban.coders import Trellis
from miracle_ban.feed import is_sharded
from miracle_ban.layers import posteriors

QUIET = {"progress": False}
TRELLIS = Trellis(memory=10)
IMAGES, LABELS = helpers.blobs(256, seed=0)


def network() -> nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3))


def plain() -> DataLoader:
    """The same shuffled batches for everyone."""
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=32, shuffle=True)


def sharded() -> DataLoader:
    """A loader of this process's share."""
    data = TensorDataset(IMAGES, LABELS)
    return DataLoader(data, batch_size=32, sampler=DistributedSampler(data, dist.get_world_size(), dist.get_rank(), seed=7))


def posterior_digest(bnn: nn.Module) -> str:
    """Of all means and standard deviations."""
    return helpers.digest({f"{n}.{k}": getattr(p, k) for n, p in posteriors(bnn).items() for k in ("mean", "log_std")})


def sha(data: bytes) -> str:
    """A short checksum."""
    return hashlib.sha256(data).hexdigest()[:16]


def trained(bnn: nn.Module, batches: Any, **options: Any) -> miracle_ban.FitReport:
    """Fit to 150 bytes."""
    return fit(bnn, batches, F.cross_entropy, **{"budget": 150, "epochs": 10, "coder": TRELLIS, **options, **QUIET})


def fitting(rank: int, folder: Path) -> dict[str, Any]:
    """`fit` with a loader for all and with shares; each process tells what it saw and what it got."""
    told: dict[str, Any] = {}
    for name, batches in (("plain", plain()), ("sharded", sharded())):
        bnn, seen, noise = convert(network()), [], []

        def watched(out: torch.Tensor, y: torch.Tensor, seen: list = seen, noise: list = noise) -> torch.Tensor:
            seen.append(len(y))
            noise.append(float(out.detach().sum()))
            return F.cross_entropy(out, y)

        report = fit(bnn, batches, watched, budget=100, epochs=8, coder=TRELLIS, weights_per_bit=0.4, **QUIET)
        told[name] = {
            "digest": posterior_digest(bnn), "history": sha(json.dumps(report.history).encode()), "steps": report.steps,
            "examples": report.num_examples, "seen": sum(seen), "noise": noise[-1], "widths": report.widths, "beta": report.beta,
            "predicted": report.predicted_bytes,
        }  # fmt: skip
    return told


def prepared(rank: int, folder: Path) -> dict[str, Any]:
    """`fit` and `encode` with loaders that Accelerate and Lightning Fabric prepared."""
    from accelerate import Accelerator, DataLoaderConfiguration
    from lightning_fabric import Fabric

    processes = dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp")
    fabric.launch()
    told: dict[str, Any] = {}
    for name in ("fabric", "accelerate", "split", "dispatch"):
        if name == "fabric":
            batches: Any = fabric.setup_dataloaders(plain())
        else:
            settings = DataLoaderConfiguration(split_batches=name == "split", dispatch_batches=name == "dispatch")
            batches = Accelerator(cpu=True, dataloader_config=settings).prepare(plain())
        bnn, seen = convert(network()), []

        def watched(out: torch.Tensor, y: torch.Tensor, seen: list = seen) -> torch.Tensor:
            seen.append(len(y))
            return F.cross_entropy(out, y)

        report = fit(bnn, batches, watched, budget=200, epochs=10, coder=TRELLIS, **QUIET)
        examples = sum(seen)
        archive = encode(bnn, batches, F.cross_entropy, coder=TRELLIS, rounds=2, refine_steps=4, **QUIET)
        told[name] = {
            "loader": type(batches).__name__, "sharded": is_sharded(batches), "examples": report.num_examples, "seen": examples,
            "file": sha(archive.to_bytes()), "bytes": archive.size_bytes,
        }  # fmt: skip
    return told


def sharing(rank: int, folder: Path) -> dict[str, Any]:
    """Which examples each process gets of a plain loader, pass by pass."""
    from miracle_ban.feed import Feed

    numbers = torch.arange(70)
    feed = Feed(DataLoader(TensorDataset(numbers, numbers), batch_size=10, shuffle=True), torch.device("cpu"), seed=3)
    torch.manual_seed(rank)  # noise of its own must not change the order
    passes = []
    for _ in range(2):
        passes.append([feed.next()[0].tolist() for _ in range(feed.batches_per_pass)])
        torch.randn(rank + 1)
    return {"passes": passes, "examples": feed.num_examples}


def searching(rank: int, folder: Path) -> dict[str, Any]:
    """`encode` without training; the files must not depend on the number of processes."""
    told: dict[str, Any] = {}
    torch.manual_seed(5)
    large = nn.Sequential(nn.Linear(150, 200), nn.ReLU(), nn.Linear(200, 10))
    for coder in ("gprs", "minimal-random", TRELLIS):
        bnn = convert(large, per_unit=True)
        with torch.no_grad():
            for p in posteriors(bnn).values():
                p.log_std.fill_(float((1.5 * p.mean.square().mean().sqrt()).log()))
        archive = encode(bnn, coder=coder, block_bits=5.0, **QUIET)
        told[archive.coder] = sha(archive.to_bytes())
    told["untrained"] = sha(miracle_ban.compress(network(), inputs=IMAGES[:64], budget=300, coder=TRELLIS, **QUIET).to_bytes())
    size = miracle_ban.save(archive, folder / "net.mban")
    return {"files": told, "saved": sha((folder / "net.mban").read_bytes()) == sha(archive.to_bytes()), "size": size == archive.size_bytes}


def refining(rank: int, folder: Path) -> dict[str, Any]:
    """`encode` with refinement: by everyone alike on plain batches, together on shares."""
    told: dict[str, Any] = {}
    for coder in ("gprs", TRELLIS):
        bnn = convert(network())
        with distributed.apart():
            trained(bnn, plain(), coder=coder)
        archive = encode(bnn, plain(), F.cross_entropy, coder=coder, rounds=3, refine_steps=4, **QUIET)
        told[archive.coder] = sha(archive.to_bytes())
    bnn = convert(network())
    trained(bnn, sharded() if dist.is_initialized() else plain())
    both = sharded() if dist.is_initialized() else plain()
    archive = encode(bnn, both, F.cross_entropy, budget=400, coder=TRELLIS, rounds=3, refine_steps=4, **QUIET)
    return {"files": told, "sharded": sha(archive.to_bytes()), "posteriors": posterior_digest(bnn)}


def attending(rank: int, folder: Path) -> dict[str, Any]:
    """With attention, each process on contexts of its own; then a package for a context."""
    net = network()
    bnn, ban = convert(net), BayesianAttention(net)
    fit(bnn, plain(), F.cross_entropy, budget=200, epochs=10, coder=TRELLIS, attention=ban, **QUIET)
    general = ban.general.tolist()
    archive = encode(bnn, context=IMAGES[LABELS < 2], budget=200, coder=TRELLIS, rounds=2, refine_steps=5, **QUIET)
    return {"posteriors": posterior_digest(bnn), "general": general, "file": sha(archive.to_bytes())}


def hardening(rank: int, folder: Path) -> dict[str, Any]:
    """`harden`, with statistics of norms; then `rescale` of what was packaged alike."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    told: dict[str, Any] = {}
    for name, batches in (("plain", plain()), ("sharded", sharded())):
        hardened, course = miracle_ban.harden(net, batches, F.cross_entropy, bits=300, epochs=6, **QUIET)
        with distributed.apart():
            archive = miracle_ban.compress(hardened.eval(), inputs=IMAGES, budget=200, coder=TRELLIS, **QUIET)
        rescaled = miracle_ban.rescale(archive, hardened.eval(), batches, budget=200, epochs=20, **QUIET)
        told[name] = {
            "weights": helpers.digest(hardened.state_dict()), "history": course["history"], "steps": course["steps"],
            "rescaled": [sha(rescaled.to_bytes()), rescaled.info["rescale"]["history"], rescaled.info["rescale"]["changed"]],
        }  # fmt: skip
    return told


def faulty(rank: int, folder: Path) -> dict[str, Any]:
    """Faults of one process are told to all: another network, a loss that fails, too few batches, a folder that is not there."""
    told = {}
    torch.manual_seed(rank)

    def poisoned(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out, y) * (float("nan") if rank else 1.0)

    cases: dict[str, Any] = {
        "network": lambda: trained(convert(nn.Sequential(nn.Flatten(), nn.Linear(64, 3 + rank))), plain()),
        "nan": lambda: fit(convert(network()), plain(), poisoned, epochs=1, **QUIET),
        "few": lambda: trained(convert(network()), [(IMAGES, LABELS)]),
        "folder": lambda: trained(convert(network()), plain(), checkpoint=folder / "missing" / "state", epochs=1),
    }
    for name, call in cases.items():
        try:
            call()
            told[name] = "nothing was raised"
        except MiracleError as error:
            told[name] = str(error)
    return told


def dying(rank: int, folder: Path) -> dict[str, Any]:
    """The last process is killed in its second pass; the others must learn of it."""
    bnn, calls = convert(network()), []

    def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(time.monotonic())
        if rank == dist.get_world_size() - 1 and len(calls) == 18:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        return F.cross_entropy(out, y)

    try:
        fit(bnn, plain(), loss, budget=150, epochs=10, coder=TRELLIS, checkpoint=folder / "state.fit", **QUIET)
    except MiracleError as error:
        return {"error": str(error), "seconds": time.monotonic() - calls[-1], "resumable": (folder / "state.fit").exists()}
    return {"error": None}


def resuming(rank: int, folder: Path) -> dict[str, Any]:
    """What `dying` left is finished, with a checkpoint and without one."""
    told = {}
    for name, state in (("resumed", folder / "state.fit"), ("undisturbed", None)):
        bnn = convert(network())
        trained(bnn, plain(), checkpoint=state)
        told[name] = posterior_digest(bnn)
    return told


def work(scenario: str, rank: int, processes: int, folder: Path) -> None:
    """One process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if processes > 1 or scenario == "alone":
        meeting = (folder / f"meeting-{scenario}-{processes}").as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes, timeout=timedelta(seconds=60))
    told = globals()[scenario](rank, folder)
    (folder / f"{scenario}-{processes}-{rank}.json").write_text(json.dumps(told))
    if dist.is_initialized() and scenario != "dying":
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Start the processes of all scenarios that are asked for: `name:processes`."""
    folder = Path(sys.argv[1])
    for asked in sys.argv[2:]:
        scenario, _, number = asked.partition(":")
        processes = int(number)
        started = [CONTEXT.Process(target=work, args=(scenario, r, processes, folder)) for r in range(processes)]
        for p in started:
            p.start()
        for p in started:
            p.join()
        files = [folder / f"{scenario}-{processes}-{r}.json" for r in range(processes)]
        told = [json.loads(file.read_text()) if file.exists() else None for file in files]
        print(json.dumps({"asked": asked, "status": [p.exitcode for p in started], "told": told}), flush=True)


if __name__ == "__main__":
    main()
