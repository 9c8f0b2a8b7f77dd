"""The demo: draw digits, train LeNet-5 on them, compress it, decode the file in a fresh process, compare.

Nothing is downloaded: `digits` draws its images itself. Every stage is timed, and what the fresh process reports must agree
with the encoder to the last bit. Leans on the whole package; matplotlib is used if it is there.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import plots
from .bits import parse_bytes
from .container import Archive
from .convert import convert
from .decode import save
from .encode import encode
from .errors import MiracleError
from .layers import posteriors
from .load import load
from .train import FitReport, fit

NUM_TRAIN, NUM_TEST = 12_000, 5_000
TRAIN_SEED, TEST_SEED = 1, 2  # of the images: all runs of the demo see the same ones
BUDGET = "3 kB"
CODER = "trellis"
BATCH = 100
FLOAT_EPOCHS, FLOAT_RATE = 4, 2e-3
FIT: dict[str, Any] = {"epochs": 10, "narrow_epochs": 1.0}
ENCODE: dict[str, Any] = {"rounds": 30, "refine_steps": 20}
INPUT_MEAN, INPUT_STD = 0.16, 0.27
SIDE = 28
_POINTS = 112  # drawn along the strokes of a digit

Point = tuple[float, float]
Stroke = list[Point]


class LeNet5(nn.Module):
    """LeNet-5 "Caffe": conv 20@5x5, conv 50@5x5, fc 800-500, fc 500-10; 431,080 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, 1, 28, 28]` to logits `[n, 10]`."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> Stroke:
    """Part of an ellipse, angles in degrees clockwise from the right (y points down)."""
    angles = np.radians(np.linspace(start, end, 1 + math.ceil(abs(end - start) / 15)))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def _glyphs() -> list[list[list[Stroke]]]:
    """Strokes of every style of every digit, in a box of about [-0.6, 0.6] x [-1, 1], y down."""
    return [
        [
            [_arc(0, 0, 0.58, 0.95, -90, 270)],
            [_arc(0, 0, 0.4, 0.9, -70, 290)],
            [_arc(0, 0, 0.62, 0.75, -120, 250)],
            [_arc(0.05, 0, 0.55, 0.9, -60, 285)],
        ],
        [
            [[(0, -0.95), (0, 0.95)]],
            [[(-0.3, -0.6), (0.05, -0.95), (0.05, 0.95)]],
            [[(-0.35, -0.55), (0.05, -0.95), (0.05, 0.9)], [(-0.4, 0.9), (0.45, 0.9)]],
            [[(0.2, -0.95), (-0.15, 0.95)]],
        ],
        [
            [[*_arc(0, -0.42, 0.52, 0.5, -170, 30), (-0.5, 0.9), (0.6, 0.9)]],
            [[*_arc(0, -0.42, 0.5, 0.5, -160, 50), (-0.35, 0.7), *_arc(-0.3, 0.72, 0.2, 0.17, 180, -30), (0.6, 0.85)]],
            [[(-0.5, -0.85), (0.35, -0.85), (0.45, -0.5), (-0.5, 0.9), (0.55, 0.9)]],
            [[*_arc(-0.05, -0.45, 0.55, 0.45, -150, 60), (-0.55, 0.8), (0, 0.72), (0.6, 0.9)]],
        ],
        [
            [_arc(-0.05, -0.46, 0.5, 0.46, -150, 90) + _arc(-0.05, 0.46, 0.58, 0.48, -90, 150)],
            [[(-0.5, -0.9), (0.45, -0.9), (-0.05, -0.2), *_arc(-0.05, 0.36, 0.55, 0.55, -90, 150)]],
            [[*_arc(-0.1, -0.5, 0.45, 0.4, -130, 70), (-0.2, -0.08), *_arc(-0.1, 0.4, 0.6, 0.5, -80, 130)]],
        ],
        [
            [[(-0.3, -0.9), (-0.5, 0.2), (0.55, 0.2)], [(0.3, -0.6), (0.3, 0.95)]],
            [[(0.3, 0.95), (0.3, -0.95), (-0.6, 0.3), (0.6, 0.3)]],
            [[(-0.45, -0.9), (-0.5, -0.1), *_arc(-0.05, -0.1, 0.45, 0.35, 180, 0), (0.45, -0.9), (0.4, 0.95)]],
            [[(-0.4, -0.8), (-0.5, 0.1), (0.3, 0.05)], [(0.4, -0.85), (0.2, 0.95)]],
        ],
        [
            [[(0.5, -0.9), (-0.35, -0.9), (-0.45, -0.15), *_arc(-0.05, 0.35, 0.55, 0.52, -130, 140)]],
            [[(-0.35, -0.85), (-0.4, -0.1), *_arc(-0.1, 0.38, 0.58, 0.5, -110, 130)], [(-0.35, -0.85), (0.55, -0.95)]],
            [_arc(0.05, -0.45, 0.48, 0.45, -20, -260) + _arc(-0.05, 0.45, 0.52, 0.48, -80, 150)],
        ],
        [
            [[(0.4, -0.9), *_arc(0.15, 0.25, 0.65, 1.0, -110, -180), *_arc(0, 0.42, 0.5, 0.5, 180, -180)]],
            [[(0.1, -0.95), (-0.45, 0.3), *_arc(0, 0.45, 0.46, 0.45, 190, -160)]],
            [_arc(0.2, 0, 0.68, 0.92, -60, -190) + _arc(0.02, 0.48, 0.46, 0.42, 160, -170)],
        ],
        [
            [[(-0.55, -0.9), (0.5, -0.9), (-0.15, 0.95)]],
            [[(-0.55, -0.85), (0.5, -0.9), (-0.1, 0.95)], [(-0.3, 0.05), (0.4, 0.05)]],
            [[(-0.55, -0.6), (-0.5, -0.9), (0.5, -0.85), (0.15, 0.0), (0.05, 0.95)]],
        ],
        [
            [_arc(0, -0.48, 0.42, 0.44, 90, 450), _arc(0, 0.46, 0.54, 0.5, -90, 270)],
            [
                [(0.4, -0.75), *_arc(0, -0.5, 0.42, 0.42, -30, -230), (0.3, 0.25), *_arc(0, 0.5, 0.45, 0.42, -30, 210), (0.35, -0.35)],
            ],
            [_arc(0, -0.45, 0.5, 0.42, 90, 450), _arc(0, 0.5, 0.46, 0.45, -90, 270)],
        ],
        [
            [[*_arc(0, -0.42, 0.48, 0.5, 0, -360), (0.4, 0.95)]],
            [_arc(0, -0.42, 0.5, 0.48, -20, -380) + _arc(-0.2, 0.0, 0.68, 0.92, -10, 120)],
            [[(0.4, -0.6), *_arc(-0.02, -0.45, 0.44, 0.42, -30, -340), (0.42, -0.5), (0.2, 0.95)]],
        ],
    ]


def _trail(strokes: list[Stroke]) -> np.ndarray:
    """`_POINTS` points evenly along all strokes of a glyph, `[points, 2]`."""
    starts, ends = [], []
    for stroke in strokes:
        corners = np.array(stroke)
        starts.append(corners[:-1])
        ends.append(corners[1:])
    a, b = np.concatenate(starts), np.concatenate(ends)
    length = np.concatenate([[0.0], np.linalg.norm(b - a, axis=1).cumsum()])
    at = (np.arange(_POINTS) + 0.5) / _POINTS * length[-1]
    segment = np.clip(np.searchsorted(length, at, "right") - 1, 0, len(a) - 1)
    part = (at - length[segment]) / np.maximum(length[segment + 1] - length[segment], 1e-9)
    return a[segment] + part[:, None] * (b - a)[segment]


def digits(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw handwriting-like digits.

    Each image is one of three or four styles of its digit under a random bend, rotation, scale, shear and shift, in a pen of
    random width and pressure, on a noisy ground, often with a stray stroke.

    Args:
        count: number of images; the ten digits come equally often (up to one).
        seed: of the whole draw.

    Returns:
        Images `[count, 1, 28, 28]` in [0, 1], float32, and labels `[count]`, int64.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 10)
    trails = [np.stack([_trail(g) for g in styles]) for styles in _glyphs()]
    styles = rng.random(count)
    points = np.stack([trails[k][int(u * len(trails[k]))] for k, u in zip(labels, styles, strict=True)])
    points = _place(_bend(points, rng), rng)
    images = np.concatenate([_ink(p, rng) for p in np.array_split(points, max(1, count // 1000))])
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def _bend(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A smooth random displacement of every glyph: three sine waves in each direction."""
    n = len(points)
    for _ in range(3):
        wave = rng.normal(0.0, 1.6, (n, 1, 2))
        phase = rng.uniform(0, 2 * np.pi, (n, 1))
        shift = rng.normal(0.0, 0.06, (n, 1, 2))
        points = points + shift * np.sin((points * wave).sum(2) + phase)[..., None]
    return points


def _place(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate, scale, shear and shift every glyph; returns pixel coordinates."""
    n = len(points)
    angle = rng.normal(0.0, math.radians(10), n)
    shear = rng.normal(0.0, 0.2, n)
    scale = 8.4 * np.exp(rng.normal(0.0, 0.12, (n, 2)))
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.stack([np.stack([cos, -sin - shear], 1), np.stack([sin, cos], 1)], 1)
    return np.einsum("nij,npj->npi", turn, points) * scale[:, None] + (SIDE - 1) / 2 + rng.normal(0.0, 1.3, (n, 1, 2))


def _ink(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the points with a soft pen: a sum of Gaussian dots, saturated; then noise."""
    n = len(points)
    width = rng.uniform(0.55, 1.25, (n, 1, 1))
    pressure = rng.uniform(0.6, 1.6, (n, 1, 1))
    sheet = _dots(points, width)
    gap = 2 * 9.0 * np.pi / _POINTS  # typical distance of two dots, pixels
    strays = _dots(_strays(n, rng), 0.8 * np.ones((n, 1, 1))) * (rng.random((n, 1, 1)) < 0.3)
    image = 1.0 - np.exp(-1.6 * pressure * gap * (sheet + strays) / width)
    image = image * rng.uniform(0.65, 1.0, (n, 1, 1)) + rng.normal(0.0, 1.0, image.shape) * rng.uniform(0.02, 0.14, (n, 1, 1))
    return np.clip(image, 0.0, 1.0).astype(np.float32)


def _dots(points: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Sum of Gaussian dots `[n, 28, 28]`; a dot is a product of its profiles in x and y, so this is one matrix product."""
    grid = np.arange(SIDE, dtype=np.float32)
    profile = [np.exp(-0.5 * ((points[:, :, a, None] - grid) / width).astype(np.float32) ** 2) for a in (0, 1)]
    return np.matmul(profile[1].transpose(0, 2, 1), profile[0])


def _strays(count: int, rng: np.random.Generator) -> np.ndarray:
    """One short stroke per image, somewhere."""
    start = rng.uniform(1, SIDE - 2, (count, 1, 2))
    step = rng.normal(0.0, 3.5, (count, 1, 2))
    return start + step * np.linspace(0, 1, 12)[None, :, None]


class _Batches:
    """Shuffled batches of images in memory."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels, self.num_examples = images, labels, len(labels)

    def __len__(self) -> int:
        return self.num_examples // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(self.num_examples)[: len(self) * BATCH].split(BATCH):
            yield self.images[rows], self.labels[rows]


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.stages[name] = round(time.monotonic() - started, 2)

    @property
    def total(self) -> float:
        return round(time.monotonic() - self.started, 2)


def _data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    images, labels = digits(count, seed=seed)
    return (images - INPUT_MEAN) / INPUT_STD, labels


def _train_float(batches: _Batches, seed: int, progress: bool) -> LeNet5:
    """The ordinary network that the demo begins with."""
    torch.manual_seed(seed)
    net = LeNet5()
    optimizer = torch.optim.AdamW(net.parameters(), FLOAT_RATE)
    steps = FLOAT_EPOCHS * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FLOAT_RATE, total_steps=steps + 1)
    with tqdm(total=steps, disable=not progress, file=sys.stderr, desc="train", unit="step") as bar:
        for _ in range(FLOAT_EPOCHS):
            for x, y in batches:
                optimizer.zero_grad()
                value = F.cross_entropy(net(x), y)
                value.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix_str(f"loss {float(value.detach()):.4f}")
    return net


@torch.no_grad()
def _error_percent(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    net.eval()
    wrong = sum(int((net(x).argmax(1) != y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True))
    return round(100.0 * wrong / len(labels), 3)


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 over the bytes of all weights, in the order of the state dict."""
    digest = hashlib.sha256()
    for t in weights.values():
        if t.numel():  # torch cannot see an empty tensor as bytes
            digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check(path: str | Path) -> dict[str, Any]:
    """Decode a file of the demo into a new LeNet-5.

    Args:
        path: the `.mban` file.

    Returns:
        `error` on the demo's test images, percent, and `sha256_weights`.

    Raises:
        MiracleError: the file cannot be read or is no LeNet-5.
    """
    net = load(path, LeNet5())
    return {"error": _error_percent(net, *_data(NUM_TEST, TEST_SEED)), "sha256_weights": weights_sha256(net.state_dict())}


def _check_in_fresh_process(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "miracle_ban", "demo", "--json", "--check", str(path.resolve())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise MiracleError(f"the fresh process could not decode {path}: {last[0]}")
    return json.loads(done.stdout)


def _compress(net: LeNet5, batches: _Batches, seed: int, clock: _Clock, progress: bool) -> tuple[Archive, FitReport, LeNet5]:
    """The archive, the report of its training, and the network as the encoder has it: never decoded, only coded."""
    bayesian = convert(net)
    with clock.stage("fit"):
        report = fit(bayesian, batches, F.cross_entropy, budget=BUDGET, coder=CODER, seed=seed, progress=progress, **FIT)
    with clock.stage("encode"):
        archive = encode(bayesian, batches, F.cross_entropy, coder=CODER, seed=seed, progress=progress, **ENCODE)
    coded = LeNet5()
    coded.load_state_dict({name: p.expand(p.value) for name, p in posteriors(bayesian).items()})
    return archive, report, coded


def run(folder: str | Path, *, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """The whole demo.

    Args:
        folder: takes `demo.mban` and, if matplotlib is installed, `demo.png`; made if it is not there.
        seed: of both trainings and of the file's randomness. The images are always the same.
        progress: show progress bars on stderr.

    Returns:
        Plain numbers and strings: `float_bytes`, `file_bytes`, `ratio`, `float_error` and `decoded_error` in percent,
        `seconds` in total and in `stages`, `sha256_weights`, the paths `file` and `picture` (None without matplotlib).

    Raises:
        MiracleError: a file cannot be written, or the fresh process decoded something else than was coded.
    """
    clock, folder = _Clock(), Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MiracleError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    with clock.stage("draw digits"):
        batches = _Batches(*_data(NUM_TRAIN, TRAIN_SEED))
        test = _data(NUM_TEST, TEST_SEED)
    with clock.stage("train"):
        net = _train_float(batches, seed, progress)
    float_error = _error_percent(net, *test)
    archive, report, coded = _compress(net, batches, seed, clock, progress)
    size = save(archive, folder / "demo.mban")
    expected = {"error": _error_percent(coded, *test), "sha256_weights": weights_sha256(coded.state_dict())}
    with clock.stage("decode and test in a fresh process"):
        found = _check_in_fresh_process(folder / "demo.mban")
    if found != expected:
        raise MiracleError(f"a fresh process decoded another network: {found}, the encoder has {expected}")
    float_bytes = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    result = {
        "float_bytes": float_bytes, "file_bytes": size, "ratio": round(float_bytes / size, 1), "float_error": float_error,
        "decoded_error": found["error"], "seconds": 0.0, "stages": clock.stages, "seed": seed, "budget_bytes": parse_bytes(BUDGET),
        "widths": report.widths, "sha256_weights": found["sha256_weights"], "file": str(folder / "demo.mban"), "picture": None,
    }  # fmt: skip
    if plots.available():
        with clock.stage("picture"):
            result["picture"] = _draw(folder / "demo.png", test, result, report, archive)
    result["seconds"] = clock.total
    return result


def _draw(path: Path, test: tuple[Tensor, Tensor], result: dict[str, Any], report: FitReport, archive: Archive) -> str:
    images = (test[0][:400, 0] * INPUT_STD + INPUT_MEAN).numpy()
    records = [r for r in archive.records if r.kind == "coded"]
    picture = plots.plot_demo(
        images=images,
        labels=test[1][:400].numpy(),
        result=result,
        history=report.history,
        names=[str(r.name) for r in records],
        bits=[r.bits for r in records],
    )
    path.write_bytes(picture)
    return str(path)
