"""Rejection sampling and greedy Poisson rejection sampling (GPRS) drawn and counted: Q = N(1, 1/16) coded with P = N(0, 1).

    python recipes/gprs_figures.py

Writes `results/gprs_searches.png`, one search of every kind as the library's own coders made it (their `trail`), and
`results/gprs_statistics.png`, indices and numbers of steps over many seeds beside the theorems. Appends one line per posterior and
coder to `results/gprs_figures.jsonl`. Half a minute on one core.

Theorems, D = KL(Q || P), r = dQ/dP, D_inf = log2 sup r, all in bits; K the index, "steps" the candidates looked at:
    rejection sampling     K is geometric, E[K] = 2^D_inf, so H[K] >= D_inf
    GPRS                   E[K] = 2^D_inf; H[K] <= D + log2(D + 1) + O(1)   (Flamich 2023, arXiv 2305.15313)
    parallel GPRS, J jobs  steps of each job (2^D_inf - 1) / J + 1; H[K] as before, + O(1)   (same)
    branch and bound       one-peaked r in one dimension: E[steps] = O(D); H[path] <= D + log2(D + 1) + O(1) (same; for A* sampling
                           O(D_inf), Flamich, Markou and Hernandez-Lobato 2022, arXiv 2201.12857)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy import stats
from tqdm import tqdm

from miracle_ban import coders
from miracle_ban.bits import NATS_PER_BIT
from miracle_ban.gaussian import Blocks, Stretch, stretch

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, append_result

TALK = (1.0, 0.25)  # mean and standard deviation of Q
LADDER = (TALK, (2.0, 0.05), (3.0, 0.02), (3.0, 1e-3), (3.0, 1e-5))
MOST_BITS = 13.0  # of D_inf, for the searches that take 2^D_inf steps
JOBS = 4
NAMES = {
    "rejection": "rejection sampling",
    "gprs": "GPRS",
    "parallel-gprs": f"parallel GPRS, {JOBS} jobs",
    "branch-and-bound-gprs": "branch-and-bound GPRS",
}
BLUE, RED, GREY, GREEN = "#2e6f95", "#d1495b", "#8d99ae", "#4a8c5f"


def coder_of(name: str, private_seed: int = 0) -> coders.BlockCoder:
    """A coder that searches until it is done."""
    options: dict[str, Any] = {"private_seed": private_seed}
    if "gprs" in name and "branch" not in name:
        options["extra_bits"] = 14.0
    if name == "parallel-gprs":
        options["workers"] = JOBS
    return coders.get(name, **options)


def blocks_of(mean: float, std: float, count: int = 1) -> Blocks:
    """`count` blocks of one weight with that posterior."""
    full = torch.full((count, 1), 1.0, dtype=torch.float64)
    return Blocks.of(mean * full, std * full, full)


def entropy_bits(index: np.ndarray) -> float:
    """Entropy of the law that the indices were drawn from, by Miller and Madow's estimate, bits."""
    counts = np.unique(index, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum() + (len(counts) - 1) / (2 * len(index) * NATS_PER_BIT))


def measure(name: str, mean: float, std: float, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """Code `count` draws, each with its own shared and private randomness: a result line, and the steps of each."""
    coder = coder_of(name)
    words = coder.encode(np.full((count, 1), mean), np.full((count, 1), std), 1.0, seed=0)
    values = coder.decode(words, 1.0, seed=0)[:, 0]
    depth = np.floor(np.log2(words.index)) + 1
    steps = depth if "branch" in name else words.index.astype(float)
    if name == "parallel-gprs":
        # every job runs until its clock passes the winner's; the trail holds all arrivals of the few that are looked at
        steps = job_steps(mean, std, min(count, 2000))
    law = blocks_of(mean, std)
    kl_bits, peak_bits = float(law.kl_nats()) / NATS_PER_BIT, float(law.max_log_ratio()) / NATS_PER_BIT
    theorem = {"parallel-gprs": (2**peak_bits - 1) / JOBS + 1, "branch-and-bound-gprs": None}.get(name, 2**peak_bits)
    return {
        "coder": name, "mean": mean, "std": std, "draws": count, "kl_bits": round(kl_bits, 3), "d_inf_bits": round(peak_bits, 3),
        "steps": float(steps.mean()), "steps_error": float(steps.std() / np.sqrt(len(steps))), "steps_theorem": theorem,
        "log2_index": float(np.log2(words.index).mean()), "entropy_bits": entropy_bits(words.index) if kl_bits < 4 else None,
        "codeword_bits": float(words.bits.mean()), "bound_bits": kl_bits + np.log2(kl_bits + 1),
        "truncated": float(words.truncated.mean()), "p_value": float(stats.kstest(values, "norm", (mean, std)).pvalue),
    }, steps  # fmt: skip


def job_steps(mean: float, std: float, count: int) -> np.ndarray:
    """Steps of each job of parallel GPRS: its arrivals up to the winner's time, and the first one after it, which ends it."""
    coder = coder_of("parallel-gprs")
    coder.trail = []
    words = coder.encode(np.full((count, 1), mean), np.full((count, 1), std), 1.0, seed=0)
    row, number, at = (np.concatenate([getattr(t, k) for t in coder.trail]) for k in ("rows", "candidate", "time"))
    first = np.zeros(count)
    won = number == words.index[row]
    first[row[won]] = at[won]
    before = (at < first[row]) & ~won
    return np.bincount(row[before], minlength=count) / JOBS + 1.0


def looked_at(name: str, seed: int, mean: float = TALK[0], std: float = TALK[1]) -> tuple[dict[str, np.ndarray], int]:
    """One search: the candidates in order of their times as arrays, and how many were looked at before one was accepted."""
    coder = coder_of(name, private_seed=seed)
    coder.trail = []
    words = coder.encode(np.full((1, 1), mean), np.full((1, 1), std), 1.0, seed=seed)
    trail = {k: np.concatenate([getattr(t, k) for t in coder.trail]) for k in ("candidate", "time", "log_ratio_nats")}
    if coder.trail[0].low is not None:
        trail |= {k: np.concatenate([getattr(t, k) for t in coder.trail]) for k in ("low", "high")}
    number = trail["candidate"]
    nothing = np.zeros(len(number))
    every = coders.Codewords(number, nothing, nothing, nothing.astype(bool), 1)
    trail["x"] = coder.decode(every, 1.0, seed=seed, blocks=np.zeros(len(number), np.int64))[:, 0]
    return trail, int(np.flatnonzero(number == words.index[0])[0])


def good_seed(name: str, steps: int) -> int:
    """The first seed whose search looks at so many candidates: neither the shortest picture nor the longest."""
    return next(s for s in range(10_000) if looked_at(name, s)[1] == steps - 1)


def draw_searches(path: Path) -> None:
    """One search of every kind as points (value, time), under the graph of what is accepted."""
    figure, axes = plt.subplots(1, 5, figsize=(17, 3.6), layout="constrained")
    z = np.linspace(-3, 3, 600)
    law = blocks_of(*TALK)
    ratio = law.log_ratio(torch.from_numpy(z)[:, None]).numpy()
    table: Stretch = stretch(law)
    sigma = np.exp(np.where(ratio < table.level[0, 0], ratio, np.interp(ratio, table.level[0], table.log_sigma[0])))

    trail, _ = looked_at("parallel-gprs", 5)  # all arrivals of its first part, whatever is accepted
    axes[0].plot(trail["x"], trail["time"], ".", color=BLUE)
    axes[0].set(title="Poisson process, P = N(0, 1)", ylim=(0, 20), ylabel="time t")
    for axis, name, steps in zip(axes[1:], NAMES, (9, 9, 9, 4)):
        trail, at = looked_at(name, good_seed(name, steps))
        x, t, job = trail["x"], trail["time"], (trail["candidate"] - 1) % JOBS
        tried = t <= t[at] if name == "parallel-gprs" else np.arange(len(x)) <= at
        tried[at] = False
        graph, top = (np.exp(ratio), float(np.exp(ratio.max())) * 1.15) if name == "rejection" else (sigma, max(t[at] * 1.3, 9.0))
        axis.fill_between(z, 0, np.minimum(graph, 2 * top), color=GREEN, alpha=0.18, lw=0)
        axis.plot(z, np.minimum(graph, 2 * top), color=GREEN, lw=1)
        colours = [(BLUE, RED, "#edae49", "#7d5ba6")[j] for j in job[tried]] if name == "parallel-gprs" else BLUE
        axis.scatter(x[tried], t[tried], s=18, c=colours, zorder=3)
        for i in np.flatnonzero(tried) if name != "parallel-gprs" else ():
            axis.annotate(str(i + 1), (x[i], t[i]), textcoords="offset points", xytext=(4, 2), fontsize=7, color=GREY)
        axis.plot(x[at], t[at], "*", ms=13, color=RED, zorder=4)
        if "low" in trail:
            edges = np.concatenate([[0.0], t[: at + 1]])
            for i in range(at + 1):
                low, high = stats.norm.ppf([trail["low"][i], trail["high"][i]]).clip(-3, 3)
                axis.add_patch(plt.Rectangle((low, edges[i]), high - low, edges[i + 1] - edges[i], fc=BLUE, alpha=0.12, lw=0))
        axis.set(title=f"{NAMES[name]}: {'step' if 'branch' in name else 'K ='} {at + 1 if 'branch' in name else trail['candidate'][at]}")
        axis.set(ylim=(0, top), ylabel="height u sup r, under r(x)" if name == "rejection" else "time t, under sigma(r(x))")
    for axis in axes:
        axis.set(xlim=(-3, 3), xlabel="x")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_statistics(path: Path, lines: list[dict[str, Any]], steps: dict[str, np.ndarray]) -> None:
    """Laws of the number of steps for the talk's pair, and mean steps and bits against the KL."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    k = np.arange(1, 41)
    law = blocks_of(*TALK)
    miss = 1 - np.exp(-float(law.max_log_ratio()))
    for axis, name in zip(axes, ("rejection", "gprs")):
        share = np.bincount(steps[name].astype(int), minlength=42)[1:41] / len(steps[name])
        axis.bar(k, share, color=BLUE, width=0.8, label=f"{len(steps[name]):,} searches")
        axis.plot(k, miss ** (k - 1) * (1 - miss), color=RED, lw=1.2, label="geometric, mean 2^D_inf")
        axis.axvline(steps[name].mean(), color=GREY, ls="--", lw=1, label=f"mean {steps[name].mean():.2f}")
        axis.set(title=f"{NAMES[name]}: index K", xlabel="K", xlim=(0, 40))
        axis.legend(frameon=False, fontsize=8)
    name = "branch-and-bound-gprs"
    share = np.bincount(steps[name].astype(int), minlength=17)[1:17] / len(steps[name])
    axes[2].bar(k[:16], share, color=BLUE, width=0.8)
    axes[2].axvline(steps[name].mean(), color=GREY, ls="--", lw=1, label=f"mean {steps[name].mean():.2f}")
    axes[2].set(title=f"{NAMES[name]}: path length", xlabel="steps")
    axes[2].legend(frameon=False, fontsize=8)
    for name, colour in zip(NAMES, (GREY, BLUE, "#edae49", RED)):
        own = [v for v in lines if v["coder"] == name]
        axes[3].errorbar([v["kl_bits"] for v in own], [v["steps"] for v in own], [2 * v["steps_error"] for v in own],
                         fmt="o-", ms=4, color=colour, label=NAMES[name])  # fmt: skip
    kl = [v["kl_bits"] for v in lines if v["coder"] == name]
    axes[3].plot(kl, [d + 1 for d in kl], ":", color="black", lw=1, label="KL + 1")
    axes[3].set(yscale="log", xlabel="KL, bits", title="mean steps (bars: two standard errors)")
    axes[3].legend(frameon=False, fontsize=7)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5000, help="for each coder and posterior; a tenth where a search takes long")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the pictures")
    parser.add_argument("--smoke", action="store_true", help="few draws, and append no results")
    args = parser.parse_args()
    if args.smoke:
        args.draws = 600
    args.output.mkdir(parents=True, exist_ok=True)
    lines, steps = [], {}
    runs = [(name, pair) for pair in (LADDER[:2] if args.smoke else LADDER) for name in NAMES]
    runs = [(n, p) for n, p in runs if "branch" in n or float(blocks_of(*p).max_log_ratio()) / NATS_PER_BIT < MOST_BITS]
    for name, (mean, std) in tqdm(runs, desc="searches"):
        slow = "branch" not in name and (mean, std) != TALK
        started = time.monotonic()
        line, found = measure(name, mean, std, args.draws // 10 if slow else args.draws)
        line["seconds"] = round(time.monotonic() - started, 2)
        lines.append(line)
        if (mean, std) == TALK:
            steps[name] = found
        if not args.smoke:
            append_result("gprs_figures", line)
        print(json.dumps(line), flush=True)
    draw_searches(args.output / "gprs_searches.png")
    draw_statistics(args.output / "gprs_statistics.png", lines, steps)


if __name__ == "__main__":
    main()
