"""Lossy compression with realism: what comes out shall follow the law of what went in. There, coders that share randomness win.

    python recipes/realism.py --data ../data

Three sources; every rate is the size of a real file that the values were decoded from:
    circle    uniform on the unit circle, as in Theis and Agustsson 2021 (arXiv 2102.09270): 1 to 3 bits a point
    Gaussian  N(0, 1): relative entropy coding by `gprs` and `trellis` of N(rho x, 1 - rho^2) against N(0, 1)
    MNIST     the 16 latents of a small variational autoencoder that is trained for realism, too, 6 and 10 bits of KL an image
Codes of the value or of the posterior's mean m, whose law has the standard deviation s; steps are chosen so that the files are as long:
    rounded         k = round(m / step), the decoder takes the mean of the cell: least distortion, but what comes out varies too little
    private noise   the same file; the decoder draws from the cell instead: realistic, but this noise only adds to the distortion
    dithered        k = round(m / step + u) with a shared u (Ziv 1985; Agustsson and Theis 2020), m + noise is the decoder's (k - u) step,
                    which its own distribution function and the normal's inverse one turn into N(0, 1)
    gprs, trellis   the library's coders: a draw of the posterior (the trellis: a sequence as good as one) by its index

Why sharing helps. If the decoder shares no randomness, X - K - Y is a Markov chain; with Y distributed as X, |X| = 1 on the circle,
E|X - Y|^2 = 2 - 2 sum_k p_k <E[X|k], E[Y|k]>. Both sum_k p_k |E[X|k]|^2 and the same of Y are at most 4 / pi^2 for one bit, since
|E[X|k]| <= sin(pi p_k) / (pi p_k), which an arc has, and p = 1/2 is the best: by Cauchy and Schwarz no such code gets below
2 - 8 / pi^2 = 1.189, which the one with private noise reaches.
With a shared dither Y is X turned by less than a quarter circle: 2 - 4 / pi = 0.727. For N(0, 1) at R bits the limits are 2^(1 - 2R)
without, and 2 - 2 sqrt(1 - 2^(-2R)) with shared randomness, half of that for large R.

Trained networks are kept in WORK. Minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg
from scipy.special import ndtri
from torch import Tensor, nn
from tqdm import tqdm

from miracle_ban.bits import BitReader, BitWriter

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, append_result, data_root, mnist
from figures import realism_plot
from real_codes import CODES, files, shared_uniform

LATENTS = 16


def circle(count: int, folder: Path) -> list[dict[str, Any]]:
    """Points on the circle in exactly 1 to 3 bits each."""
    angle, lines = np.random.default_rng(1).uniform(0, 2 * np.pi, count), []
    for bits in (1, 2, 3):
        width = 2 * np.pi / 2**bits
        half = np.sin(width / 2) / (width / 2)
        for name, theorem in (("rounded", 1 - half**2), ("private noise", 2 - 2 * half**2), ("dithered", 2 - 2 * half)):
            shift = shared_uniform((count,)) if name == "dithered" else np.zeros(count)
            out = BitWriter()
            out.write_many(np.floor(angle / width + shift).astype(np.int64) % 2**bits, np.full(count, bits))
            path = folder / f"circle-{bits}-{name.replace(' ', '-')}.bin"
            path.write_bytes(out.to_bytes())
            found = (BitReader(path.read_bytes()).read_many(np.full(count, bits), "cells") + 0.5 - shift) * width
            if name == "private noise":
                found = found + np.random.default_rng(2).uniform(-0.5, 0.5, count) * width
            length = half if name == "rounded" else 1.0  # the middle of a cell's points lies inside the circle
            error = 1 + length**2 - 2 * length * np.cos(found - angle)
            even = (np.arange(count) + 0.5) / count * 2 * np.pi
            off = 1 + length**2 - 2 * length * np.cos(np.sort(found % (2 * np.pi)) - even)
            lines.append({
                "source": "circle", "code": name, "count": count, "bits": 8 * path.stat().st_size / count, "distortion": error.mean(),
                "distortion_error": error.std() / math.sqrt(count), "theorem": theorem, "realism": math.sqrt(max(off.mean(), 0.0)),
            })  # fmt: skip
    return lines


def gaussian(rates: tuple[tuple[float, int], ...], count: int, folder: Path) -> list[dict[str, Any]]:
    """N(0, 1) in blocks: for each rate (bits of KL a value, values in a block) every code at the bytes of `gprs`."""
    lines = []
    for rate, block in rates:
        x = np.random.default_rng(3).standard_normal((count // block, block))
        rho = math.sqrt(1 - 2.0 ** (-2 * rate))
        quantile = ndtri((np.arange(x.size) + 0.5) / x.size)
        for name, (size, z) in files(
            rho * x, np.full_like(x, math.sqrt(1 - rho**2)), x, np.ones(block), np.ones(block), folder, f"gaussian-{rate:g}"
        ).items():
            bits, error = 8 * size / x.size, (z - x) ** 2
            limit = {"rounded": 2.0 ** (-2 * bits), "private noise": 2.0 ** (1 - 2 * bits)}.get(
                name, 2 - 2 * math.sqrt(1 - 2.0 ** (-2 * bits))
            )
            lines.append({"source": "Gaussian", "code": name, "kl_bits": rate, "count": x.size, "bits": bits, "distortion": error.mean(),
                          "distortion_error": error.std() / math.sqrt(x.size), "theorem": limit,
                          "realism": math.sqrt(((np.sort(z.ravel()) - quantile) ** 2).mean())})  # fmt: skip
    return lines


class Autoencoder(nn.Module):
    """784 pixels to 16 latents and back, with perceptrons of one hidden layer; the prior of the latents is N(0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Linear(784, 384), nn.ReLU(), nn.Linear(384, 2 * LATENTS))
        self.up = nn.Sequential(nn.Linear(LATENTS, 384), nn.ReLU(), nn.Linear(384, 784))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations `[n, 16]` for images `[n, 784]`."""
        mean, wide = self.down(x).chunk(2, 1)
        return mean, torch.sigmoid(wide + 2.0)

    def decode(self, z: Tensor) -> Tensor:
        """Images `[n, 784]`."""
        return torch.sigmoid(self.up(z))


def classifier(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """A small network whose 32 last features judge realism."""
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 32), nn.Tanh()]
    net = nn.Sequential(nn.Unflatten(1, (1, 28, 28)), *body, nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for rows in (r for _ in range(epochs) for r in torch.randperm(len(labels)).split(250)):
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    return net[:-1].requires_grad_(False)


def sliced(a: Tensor, b: Tensor) -> Tensor:
    """Squared Wasserstein distance of two samples `[n, d]`, mean over 64 random directions."""
    w = F.normalize(torch.randn(a.shape[1], 64), dim=0)
    return ((a @ w).sort(0).values - (b @ w).sort(0).values).square().mean()


def train(images: Tensor, target_bits: float, epochs: int, realism: float, path: Path) -> Autoencoder:
    """Squared error, the KL steered to `target_bits` an image, and `realism` times how far the law of what comes out is off."""
    torch.manual_seed(0)
    net, log_beta = Autoencoder(), 0.0
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    steps = epochs * -(-len(images) // 250)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, 2.0 * (1.0 - t / steps) + 0.02))
    for rows in tqdm([r for _ in range(epochs) for r in torch.randperm(len(images)).split(250)], desc=path.stem, leave=False):
        x = images[rows]
        mean, std = net.posterior(x)
        kl_nats = (0.5 * (mean.square() + std.square() - 1.0) - std.log()).sum(1).mean()
        y = net.decode(mean + std * torch.randn_like(std))
        loss = (y - x).square().sum(1).mean() + math.exp(log_beta) * kl_nats + realism * 784.0 * sliced(y, x)
        log_beta += 0.02 * (float(kl_nats) / math.log(2.0) / target_bits - 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.save(net.state_dict(), path)
    return net


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the normal laws with the moments of two samples `[n, d]`."""
    means, spread = (a.mean(0) - b.mean(0)), (np.cov(a.T), np.cov(b.T))
    return float((means**2).sum() + np.trace(spread[0] + spread[1] - 2.0 * linalg.sqrtm(spread[0] @ spread[1]).real))


@torch.no_grad()
def compressed_images(net: Autoencoder, features: nn.Module, data: dict, kl_bits: float, count: int, folder: Path) -> tuple[list, dict]:
    """Test images through every code: result lines, and the first images that come out."""
    train_mean, train_std = (t.double().numpy() for t in net.posterior(data["train"][0].flatten(1)[:10_000]))
    scale = train_mean.std(0)
    total = np.sqrt(scale**2 + (train_std**2).mean(0))
    x, other = data["test"][0].flatten(1)[:count], data["train"][0].flatten(1)[-count:]
    mean, std = (t.double().numpy() for t in net.posterior(x))
    kl = float((0.5 * (mean**2 + std**2 - 1.0) - np.log(std)).sum(1).mean()) / math.log(2.0)
    ideal = features(other).double().numpy()
    lines, pictures = [], {"original": x[:12].numpy()}
    found = files(mean, std, mean, scale, total, folder, f"mnist-{kl_bits:g}")
    for name in CODES:
        size, z = found[name]
        y = net.decode(torch.from_numpy(z).float())
        error = (y - x).square().mean(1).double().numpy()
        lines.append({
            "source": "MNIST", "code": name, "kl_bits": kl, "count": count, "bits": 8 * size / count, "bytes": size,
            "distortion": error.mean(), "distortion_error": error.std() / math.sqrt(count),
            "realism": frechet(features(y).double().numpy(), ideal), "spread": float((z.var(0) / total**2).mean()),
        })  # fmt: skip
        pictures[name] = y[:12].numpy()
    lines.append({"source": "MNIST", "code": "original", "kl_bits": kl, "count": count, "bits": None, "distortion": 0.0,
                  "realism": frechet(features(x).double().numpy(), ideal)})  # fmt: skip
    return lines, pictures


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kl-bits", type=float, nargs="+", default=[10.0, 6.0], help="of an image's latents")
    parser.add_argument("--realism", type=float, default=4.0, help="weight of the realism term in training")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=1500, help="test images that are coded")
    parser.add_argument("--data", help="folder that holds mnist/; default $MIRACLE_BAN_DATA, else ./data by download")
    parser.add_argument("--work", type=Path, default=Path("work"), help="networks and files")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the picture")
    parser.add_argument("--smoke", action="store_true", help="little of everything, and append no results")
    args = parser.parse_args()
    values, rates = 12_000, ((0.5, 16), (1.0, 12))
    if args.smoke:
        args.kl_bits, args.epochs, args.images, values, rates = [6.0], 4, 200, 1600, ((0.5, 16),)
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    lines = circle(10 * values, args.work) + gaussian(rates, values, args.work)
    data = mnist(data_root(args.data))
    images, labels = data["train"]
    features = classifier(images.flatten(1), labels, 1)
    for kl_bits in tqdm(args.kl_bits, desc="images"):
        kept = args.work / f"realism-{kl_bits:g}-{args.epochs}-{args.realism:g}-{len(labels)}.pt"
        net = train(images.flatten(1), kl_bits, args.epochs, args.realism, kept)
        torch.manual_seed(0)
        found, pictures = compressed_images(net, features, data, kl_bits, args.images, args.work)
        lines += found
    for line in lines:
        line["seconds"] = round(time.monotonic() - started, 1)
        if not args.smoke:
            append_result("realism", line)
        print(json.dumps(line))
    realism_plot(lines, pictures, args.output / "realism.png")


if __name__ == "__main__":
    main()
