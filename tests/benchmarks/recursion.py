"""Two ways to train the same posteriors: AdamW on the beta-ELBO against the recursion over means and precisions.

    python tests/benchmarks/recursion.py --data ../data [--json recursion.json]

A dense network 784-100-10 on 20,000 images of MNIST, beta 1, equal numbers of epochs, three seeds. The recursion has no rate and no
beta; its posteriors are measured against their own empirical-Bayes prior, as those of the beta-ELBO are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import miracle_ban
from miracle_ban.bits import NATS_PER_BIT
from miracle_ban.layers import use_mode
from miracle_ban.recursion import fit_recursively

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from common import Batches, data_root, error_percent, mnist

MEAN, STD, IMAGES, EPOCHS = 0.1307, 0.3081, 20_000, 5


def run(method: str, seed: int, data: dict) -> dict[str, float | str]:
    """Train and measure one network."""
    torch.manual_seed(seed)
    batches = Batches(data["train"][0][:IMAGES], data["train"][1][:IMAGES], size=100, mean=MEAN, std=STD)
    model = miracle_ban.convert(nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10)), local=False)
    started = time.monotonic()
    if method == "recursion":
        fit_recursively(model, batches, F.cross_entropy, epochs=EPOCHS, prior_std=1.0, progress=False)
    else:
        miracle_ban.fit(model, batches, F.cross_entropy, beta=1.0, epochs=EPOCHS, learning_rate=2e-3, seed=seed, progress=False)
    seconds = time.monotonic() - started
    x, y = data["test"]
    with torch.no_grad():
        draws = torch.stack([F.cross_entropy(model((x - MEAN) / STD), y) for _ in range(5)])
        kl = float(miracle_ban.kl(model))
    with use_mode(model, "mean"):
        error = error_percent(model, x, y, mean=MEAN, std=STD)
    return {
        "method": method, "seed": seed, "test_error": round(error, 3), "test_loss_of_draws": round(float(draws.mean()), 4),
        "kl_bits": round(kl / NATS_PER_BIT), "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = mnist(data_root(args.data))
    found = [run(method, seed, data) for seed in range(3) for method in ("beta-ELBO", "recursion")]
    for line in found:
        print("  ".join(f"{k} {v}" for k, v in line.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
