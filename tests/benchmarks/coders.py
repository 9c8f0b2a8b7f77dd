"""What the coders cost: bits, quality, work and time, on Gaussian blocks and on the posteriors of a real network.

    python tests/benchmarks/coders.py                                       tables of blocks and of speed, 10 minutes
    python tests/benchmarks/coders.py --lenet --data DATA --work WORK       LeNet-5 on MNIST by every coder, 40 minutes
    options: --quick (a minute), --json FILE (adds to it), --plot FILE, --threads N

J = bits - E[log2 r] is what a coder wastes on a block: the rate, and the loss in units of beta; 0 is ideal. Matched blocks:
one variance ratio for all weights, second moments as the prior's (research of the project; KL is then -d/2 log2 v).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import miracle_ban
from miracle_ban import coders, trellis
from miracle_ban.bits import NATS_PER_BIT
from miracle_ban.coders.base import Codebook
from miracle_ban.layers import posteriors
from miracle_ban.listing import table

Row = dict[str, Any]
TOP = Path(__file__).parents[2]
KL_BITS, DIMENSIONS = (4, 8, 12, 16), (1, 16, 64, 256)
LONG_KL_BITS = (32, 48)  # no search through candidates gets there
SINGLE = ("branch-and-bound-gprs", "branch-and-bound-a-star")
SCORES = 2.5e12  # about how many floating-point operations one cell of the table may take


def matched(count: int, d: int, kl_bits: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std `[count, d]` of matched blocks of exactly that KL, prior N(0, 1)."""
    v = 2.0 ** (-2.0 * kl_bits / d)
    direction = np.random.default_rng(seed).standard_normal((count, d))
    size = math.sqrt(d * (1.0 - v)) / np.linalg.norm(direction, axis=1, keepdims=True)
    return direction * size, np.full((count, d), math.sqrt(v))


def contestants(kl_bits: int, d: int) -> dict[str, coders.Coder]:
    """The coders of one cell, by what the table calls them."""
    if kl_bits > 16:
        return {}
    if d == 1 and kl_bits == 16:  # more than the 65,536 normals of a candidate can tell apart
        return {name: coders.get(name) for name in SINGLE}
    largest = 26
    found: dict[str, coders.Coder] = {
        "gprs, 8 extra bits": coders.get("gprs", extra_bits=8, max_log2_candidates=largest),
        "gprs": coders.get("gprs", max_log2_candidates=largest),
        "gprs, super-level": coders.get("gprs", target="super-level", max_log2_candidates=largest),
        "parallel-gprs": coders.get("parallel-gprs", max_log2_candidates=largest),
        "a-star": coders.get("a-star", max_log2_candidates=largest),
        "ordered-random": coders.get("ordered-random", max_log2_candidates=largest),
        "minimal-random": coders.get("minimal-random", bits=kl_bits),
        "minimal-random, best": coders.get("minimal-random", bits=kl_bits + 2, choice="best"),
    }
    slow = ("parallel-gprs", "a-star", "ordered-random", "minimal-random")  # they draw a number for every candidate
    found = {name: c for name, c in found.items() if kl_bits < 16 or name not in slow}
    if d == 1:
        found |= {name: coders.get(name) for name in (*SINGLE, "rejection")}
    return found


def one_cell(name: str, coder: coders.Coder, kl_bits: int, d: int, *, quick: bool) -> Row:
    """Encode as many blocks as the time allows."""
    extra = {"gprs, 8 extra bits": 6.5, "rejection": 3.0}.get(name, 3.0)
    count = int(min(2000, max(30, SCORES / (4.0 * d * 2.0 ** (kl_bits + extra)))))
    if name in ("parallel-gprs", "a-star", "ordered-random", "minimal-random"):
        count = min(count, int(max(30, 3e8 / 2.0 ** (kl_bits + 2))))
    count = min(count, 100) if quick else count
    mean, std = matched(count, d, kl_bits)
    started = time.perf_counter()
    words = coder.encode(mean, std, 1.0, seed=1)
    seconds = time.perf_counter() - started
    candidates = np.frexp(words.index.astype(float))[1].mean() if name in SINGLE else float(words.index.mean())
    return cell(name, kl_bits, d, count, words.bits, words.log_ratio_nats, candidates, seconds / count, float(words.truncated.mean()))


def cell(name: str, kl_bits: float, d: int, count: int, bits, log_ratio_nats, candidates: float, seconds: float, truncated: float) -> Row:
    """A row of the table; J has its standard error."""
    gap = bits - log_ratio_nats / NATS_PER_BIT
    return {
        "coder": name, "kl_bits": kl_bits, "d": d, "blocks": count, "bits": float(bits.mean()),
        "log2_ratio": float(log_ratio_nats.mean() / NATS_PER_BIT), "j": float(gap.mean()),
        "j_error": float(gap.std() / math.sqrt(count)), "candidates": candidates, "truncated": truncated, "seconds_per_block": seconds,
    }  # fmt: skip


def one_trellis(memory: int, kl_bits: int, d: int, *, quick: bool) -> Row:
    """One long sequence; its figures are given for every `kl_bits` of KL, as if it were blocks of d weights."""
    total = (2_000 if quick else 12_000) if memory > 12 else (8_000 if quick else 60_000)
    blocks = max(1, total // kl_bits)
    mean, std = matched(1, blocks * d, kl_bits * blocks)
    started = time.perf_counter()
    words = coders.get("trellis", memory=memory).encode(mean, std, 1.0, seed=1)
    seconds = time.perf_counter() - started
    row = cell(
        f"trellis, memory {memory}", kl_bits, d, 1, words.bits / blocks, words.log_ratio_nats / blocks, 2.0**memory, seconds / blocks, 0
    )
    return {**row, "j_per_16_bits": 16.0 * row["j"] / row["bits"], "blocks": blocks}


def blocks_table(*, quick: bool) -> list[Row]:
    """Every coder on matched blocks."""
    rows = []
    for kl_bits in KL_BITS[:2] if quick else (*KL_BITS, *LONG_KL_BITS):
        for d in DIMENSIONS[:3] if quick else DIMENSIONS:
            for name, coder in contestants(kl_bits, d).items():
                rows.append(one_cell(name, coder, kl_bits, d, quick=quick))
                report(rows[-1])
            if d == 1 and kl_bits > 6:
                continue  # more than the eight bits that a step may have
            for memory in (12, 16):
                rows.append(one_trellis(memory, kl_bits, d, quick=quick))
                report(rows[-1])
    return rows


def report(row: Row) -> None:
    print(f"  {row['coder']}, KL {row['kl_bits']}, d {row['d']}: J {row['j']:.2f}", file=sys.stderr)


def gemm_rate() -> float:
    """Best float32 rate of this machine, floating-point operations a second."""
    a = torch.randn(2048, 2048)
    times = []
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    return 2.0 * 2048**3 / min(times)


def speed_table(*, quick: bool) -> list[Row]:
    """10,000 blocks of 64 weights: rate of the scores that were needed against the machine's own matrix product."""
    count, d, rows = 1000 if quick else 10_000, 64, []
    rate = gemm_rate()
    plans = [
        ("minimal-random, best of 2^16", coders.get("minimal-random", bits=16, choice="best"), 14.0),
        ("gprs, KL 16, up to 2^16", coders.get("gprs", max_log2_candidates=16), 16.0),
        ("gprs, KL 12, up to 2^16", coders.get("gprs"), 12.0),
        ("gprs, super-level, KL 12", coders.get("gprs", target="super-level"), 12.0),
    ]
    for name, coder, kl_bits in plans:
        mean, std = matched(count, d, kl_bits)
        codebook = Codebook(1)
        coder.encode(mean[:64], std[:64], 1.0, seed=1, codebook=codebook)
        started = time.perf_counter()
        words = coder.encode(mean, std, 1.0, seed=1, codebook=codebook)
        seconds = time.perf_counter() - started
        scores = float(count << 16) if name.startswith("minimal") else float(np.where(words.truncated, 1 << 16, words.index).sum())
        work = 4.0 * d * scores  # l is one product with [Z, Z^2]
        rows.append({"what": f"encode {count} blocks: {name}", "seconds": seconds, "rate": work / seconds / 1e9, "unit": "GFLOP/s",
                     "of_gemm": work / seconds / rate})  # fmt: skip
    count = 100_000 if quick else 1_000_000
    mean, std = matched(1, count, 0.23 * count)
    started = time.perf_counter()
    words = coders.get("trellis", memory=12).encode(mean, std, 1.0, seed=1)
    seconds = time.perf_counter() - started
    rows.append({"what": "encode by trellis, memory 12, 0.25 bit a weight", "seconds": seconds, "rate": count / seconds / 1e6,
                 "unit": "M weights/s", "of_gemm": None})  # fmt: skip
    rows.extend(decode_rates(quick=quick))
    rows.append({"what": "matrix product", "seconds": None, "rate": rate / 1e9, "unit": "GFLOP/s", "of_gemm": 1.0})
    return rows


def decode_rates(*, quick: bool) -> list[Row]:
    """Weights a second, one thread (numpy), of a tensor of 2.4 million weights."""
    count, rows = 240_000 if quick else 2_400_000, []
    for name, bits_per_weight, memory in (("0.25", 0.25, 12), ("0.25", 0.25, 16), ("1", 1.0, 12), ("2.5", 2.5, 16)):
        rate = trellis.Rate.of(count, bits_per_weight * count)
        bits = np.random.default_rng(0).integers(0, 2, rate.bits).astype(np.uint8)

        def run(rate=rate, bits=bits, memory=memory) -> None:
            trellis.decode_steps(1, 0, rate, memory, trellis.words(bits), np.zeros(1, np.int64), 0)

        rows.append(fastest(f"decode trellis, memory {memory}, {name} bit a weight", count, run))
    mean, std = matched(2000, 64, 12.0)
    words = coders.get("minimal-random", bits=12, choice="best").encode(mean, std, 1.0, seed=1)
    wide = coders.Codewords(np.tile(words.index, 10), words.bits, words.log_ratio_nats, words.truncated, 64)
    coder = coders.get("gprs")
    rows.append(fastest("decode blocks of 64 weights", 64 * 20_000, lambda: coder.decode(wide, 1.0, seed=1)))
    return rows


def fastest(what: str, count: int, run) -> Row:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return {"what": what, "seconds": min(times), "rate": count / min(times) / 1e6, "unit": "M weights/s", "of_gemm": None}


def model_table(*, quick: bool) -> list[Row]:
    """A ResNet-50 (25.5 million weights, as initialised) at 0.25 bit a weight by the trellis, from posteriors to loaded network."""
    import resource
    import tempfile

    from torchvision import models

    net = (models.resnet18 if quick else models.resnet50)(weights=None)
    bnn = miracle_ban.convert(net)
    with torch.no_grad():
        for p in posteriors(bnn).values():
            v = 2.0 ** (-2.0 * 0.23)
            p.log_std.fill_(math.log(math.sqrt(v) * float(p.mean.square().mean().sqrt()) + 1e-8))
            p.mean.mul_(math.sqrt(1.0 - v))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    archive = miracle_ban.encode(bnn, coder="trellis")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    weights = sum(p.numel() for p in net.parameters())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.mban"
        size = miracle_ban.save(archive, path)
        started = time.perf_counter()
        miracle_ban.load(path, net)
        loading = time.perf_counter() - started
    return [{"what": "ResNet-18" if quick else "ResNet-50", "weights": weights, "bytes": size, "encode_seconds": archive.info["seconds"],
             "load_seconds": loading, "peak_mib_before": before, "peak_mib": after}]  # fmt: skip


def lenet_table(data: str | None, work: Path, *, quick: bool) -> list[Row]:
    """LeNet-5's posteriors, fitted once for 1,140 bytes, packaged by every coder at that budget; test error of the file."""
    sys.path.insert(0, str(TOP / "recipes"))
    import torch.nn.functional as F
    from common import Batches, data_root, error_percent, mnist
    from lenet5_mnist import BATCH, DISTORTION, INPUT_MEAN, INPUT_STD, LeNet5, train_float

    sets = mnist(data_root(data))
    batches = Batches(*sets["train"], size=BATCH, mean=INPUT_MEAN, std=INPUT_STD, distortion=DISTORTION)
    work.mkdir(parents=True, exist_ok=True)
    net = train_float(batches, epochs=6, seed=0, path=work / "float-s0.pt")
    bnn = miracle_ban.convert(net)
    epochs = 2 if quick else 40
    miracle_ban.fit(bnn, batches, F.cross_entropy, budget=1140, epochs=epochs, seed=0, checkpoint=work / f"coders-{epochs}.posteriors")
    plans: dict[str, tuple[str, dict[str, Any]]] = {
        "gprs": ("gprs", {}),
        "gprs, super-level": ("gprs", {"target": "super-level"}),
        "parallel-gprs": ("parallel-gprs", {"workers": 4}),
        "a-star": ("a-star", {}),
        "ordered-random": ("ordered-random", {}),
        "minimal-random": ("minimal-random", {}),
        "minimal-random, best": ("minimal-random", {"choice": "best"}),
        "trellis, memory 12": ("trellis", {"memory": 12}),
        "trellis, memory 16": ("trellis", {"memory": 16}),
    }
    rows = []
    for name, (coder, options) in plans.items():
        model = copy.deepcopy(bnn)
        rounds = 4 if quick else 40
        archive = miracle_ban.encode(
            model, batches, F.cross_entropy, coder=coders.get(coder, **options), seed=0, rounds=rounds, refine_steps=40, learning_rate=1e-3
        )
        path = work / f"coders-{name.replace(', ', '-').replace(' ', '')}.mban"
        size = miracle_ban.save(archive, path)
        decoded = miracle_ban.load(path, LeNet5())
        errors = {part: error_percent(decoded, *sets[part], mean=INPUT_MEAN, std=INPUT_STD) for part in ("validation", "test")}
        info = archive.info
        waste = 16.0 * (info["index_bits"] - info["log2_ratio_per_block"] * info["blocks"]) / info["index_bits"]
        rows.append({"coder": name, "bytes": size, "validation_error": errors["validation"], "test_error": errors["test"],
                     "j_per_16_bits": waste, "seconds": info["seconds"]})  # fmt: skip
        print(f"  {rows[-1]}", file=sys.stderr)
    return rows


def show(results: dict[str, list[Row]]) -> None:
    """The tables as text."""
    for name, rows in results.items():
        heads = list(dict.fromkeys(k for row in rows for k in row))
        print(f"\n{name}\n")
        print(table(heads, [[text(row.get(h)) for h in heads] for row in rows]))


def text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(rows: list[Row], path: Path) -> None:
    """J against KL, one line a coder, one panel a block size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["coder"] for row in rows))
    colours = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))
    figure, axes = plt.subplots(1, len(DIMENSIONS), figsize=(4 * len(DIMENSIONS), 4), sharey=True, layout="constrained")
    for axis, d in zip(axes, DIMENSIONS, strict=True):
        for name in names:
            own = [row for row in rows if row["coder"] == name and row["d"] == d]
            if own:
                x, y, error = ([r[k] for r in own] for k in ("kl_bits", "j", "j_error"))
                axis.errorbar(x, y, error, marker=".", color=colours[name], label=name, lw=1)
        axis.set(title=f"{d} weight{'s' * (d > 1)} a block", xlabel="KL, bits", xscale="log", ylim=(0, 7))
        axis.set_xticks([*KL_BITS, *LONG_KL_BITS], [str(k) for k in (*KL_BITS, *LONG_KL_BITS)])
        axis.minorticks_off()
    axes[0].set_ylabel("J = bits - E[log2 r], for a block")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--lenet", action="store_true", help="package LeNet-5 by every coder instead")
    parser.add_argument("--data", help="folder that holds mnist/")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.lenet:
        results = {"lenet5": lenet_table(args.data, args.work, quick=args.quick)}
    else:
        results = {
            "model": model_table(quick=args.quick), "speed": speed_table(quick=args.quick), "blocks": blocks_table(quick=args.quick),
        }  # fmt: skip
    show(results)
    if args.json:
        old = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps({**old, **results}, indent=1) + "\n")
    if args.plot and "blocks" in results:
        draw(results["blocks"], args.plot)


if __name__ == "__main__":
    main()
