"""What the recipes share: reading data sets, batches with light augmentation, errors, digests, result lines."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sized
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from miracle_ban.container import Archive

RESULTS = Path(__file__).parent / "results"
NUM_VALIDATION = 5_000  # the last training images, never trained on
KODAK_TESTED, KODAK_CROP = 4, 96  # the first images of Kodak, the middles of which are tested on; pixels on a side


def command_line() -> str:
    """The command that this process runs, but for where files are."""
    words = iter(sys.argv[1:])
    kept = [w for w in words if w not in ("--work", "--codec", "--data") or not next(words)]
    return shlex.join(["python", f"recipes/{Path(sys.argv[0]).name}", *kept])


def data_root(given: str | None) -> Path:
    """Folder with the data sets: `--data`, else `MIRACLE_BAN_DATA`, else `./data` (filled by torchvision's download)."""
    return Path(given or os.environ.get("MIRACLE_BAN_DATA", "data"))


def kodak(root: Path) -> dict[str, list[np.ndarray]]:
    """The Kodak images in `root/kodak` as {"train": whole images, "test": the middles of the others}, uint8 `[h, w, 3]` each."""
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((root / "kodak").glob("kodim*.png"))]
    middles = []
    for image in images[:KODAK_TESTED]:
        top, left = (image.shape[0] - KODAK_CROP) // 2, (image.shape[1] - KODAK_CROP) // 2
        middles.append(image[top : top + KODAK_CROP, left : left + KODAK_CROP])
    return {"train": images[KODAK_TESTED:], "test": middles}


def _read_idx(path: Path) -> np.ndarray:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rb") as f:
        raw = f.read()
    ndim = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * a : 8 + 4 * a], "big") for a in range(ndim)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def mnist(root: Path, *, name: str = "mnist") -> dict[str, tuple[Tensor, Tensor]]:
    """MNIST-like data as {"train": (images, labels), "validation": ..., "test": ...}; images `[n, 1, 28, 28]` in [0, 1].

    The IDX files are looked for in `root/name`; if they are not there torchvision downloads them to `root`.
    """
    found = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        arrays = []
        for what in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            files = sorted((root / name).glob(f"{stem}-{what}*"))
            if not files:
                import torchvision

                kind = {"mnist": torchvision.datasets.MNIST, "fashion-mnist": torchvision.datasets.FashionMNIST}[name]
                files = sorted(Path(kind(str(root), train=part == "train", download=True).raw_folder).glob(f"{stem}-{what}"))
            arrays.append(torch.from_numpy(_read_idx(files[0]).copy()))
        found[part] = (arrays[0].float().div_(255).unsqueeze(1), arrays[1].long())
    images, labels = found["train"]
    return {
        "train": (images[:-NUM_VALIDATION], labels[:-NUM_VALIDATION]),
        "validation": (images[-NUM_VALIDATION:], labels[-NUM_VALIDATION:]),
        "test": found["test"],
    }


def cifar10(root: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """CIFAR-10 as {"train": (images, labels), "validation": ..., "test": ...}; images uint8 `[n, 32, 32, 3]`, 5,000 of the test.

    Lossless mosaics of 100 images a row, `root/cifar10/train_1.webp` to `train_5.webp` and `test_00000_04999.webp` with labels
    in .npy files; if they are not there torchvision downloads the original to `root`.
    """
    folder = root / "cifar10"
    found = {}
    if (folder / "train_labels.npy").exists():
        for part, files in (("train", [f"train_{k}.webp" for k in range(1, 6)]), ("test", ["test_00000_04999.webp"])):
            images = np.concatenate([_unpack(folder / f) for f in files])
            labels = np.load(folder / ("train_labels.npy" if part == "train" else "test_00000_04999_labels.npy"))
            found[part] = (torch.from_numpy(images), torch.from_numpy(labels).long())
    else:
        import torchvision

        for part in ("train", "test"):
            raw = torchvision.datasets.CIFAR10(str(root), train=part == "train", download=True)
            found[part] = (torch.from_numpy(raw.data), torch.tensor(raw.targets))
    images, labels = found["train"]
    return {
        "train": (images[:-NUM_VALIDATION], labels[:-NUM_VALIDATION]),
        "validation": (images[-NUM_VALIDATION:], labels[-NUM_VALIDATION:]),
        "test": (found["test"][0][:5000], found["test"][1][:5000]),
    }


def _unpack(path: Path) -> np.ndarray:
    mosaic = np.asarray(Image.open(path).convert("RGB"))
    rows, columns = mosaic.shape[0] // 32, mosaic.shape[1] // 32
    return mosaic.reshape(rows, 32, columns, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)


class Batches:
    """Shuffled batches of images in memory, each image under a small random affine map.

    Args:
        images, labels: `[n, c, h, w]` and `[n]`.
        mean, std: normalisation.
        distortion: 0 for none; 1 is about 9 degrees, 9 % scale and shear, 1.5 pixels (one standard deviation of a uniform).
    """

    def __init__(self, images: Tensor, labels: Tensor, *, size: int, mean: float, std: float, distortion: float = 0.0):
        self.images, self.labels, self.size = (images - mean) / std, labels, size
        self.distortion = distortion
        self.blank = (0.0 - mean) / std
        self.num_examples = len(labels)

    def __len__(self) -> int:
        return self.num_examples // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.num_examples)
        for rows in order[: len(self) * self.size].split(self.size):
            x = self.images[rows]
            yield (self._distort(x) if self.distortion else x), self.labels[rows]

    def _distort(self, x: Tensor) -> Tensor:
        n = len(x)
        u = (torch.rand(n, 6) * 2 - 1) * self.distortion
        angle = u[:, 0] * math.radians(12)
        scale_x, scale_y = 1 + 0.12 * u[:, 1], 1 + 0.12 * u[:, 2]
        shear = 0.15 * u[:, 3]
        shift = u[:, 4:] * 2.0 * 2.0 / x.shape[-1]
        cos, sin = angle.cos(), angle.sin()
        row0 = torch.stack([scale_x * cos, -sin + shear, shift[:, 0]], 1)
        row1 = torch.stack([sin, scale_y * cos, shift[:, 1]], 1)
        grid = F.affine_grid(torch.stack([row0, row1], 1), list(x.shape), align_corners=False)
        return F.grid_sample(x - self.blank, grid, align_corners=False) + self.blank


class Scored:
    """Batches whose targets come with a teacher's class scores: (inputs, labels and scores `[n, 1 + classes]`).

    One tensor, so that steps of training can be recorded on a GPU.
    """

    def __init__(self, batches: Sized, teacher: nn.Module):
        self.batches, self.teacher = batches, teacher.eval()
        self.num_examples: int = batches.num_examples  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in self.batches:  # type: ignore[attr-defined]
            with torch.no_grad():
                scores = self.teacher(inputs).float()
            yield inputs, torch.cat([labels[:, None].to(scores.dtype), scores], 1)


def distilled(share: float, temperature: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss on the batches of `Scored`, nats: `share` of it for a teacher's probabilities, the rest for the labels.

    Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2: class scores over a temperature T, and T^2 times their cross-entropy.
    """

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, labels, scores = outputs.float(), targets[:, 0].long(), targets[:, 1:]
        taught = F.cross_entropy(outputs / temperature, (scores / temperature).softmax(1))
        return (1 - share) * F.cross_entropy(outputs, labels) + share * temperature**2 * taught

    return loss


@torch.no_grad()
def error_percent(model: nn.Module, images: Tensor, labels: Tensor, *, mean: float, std: float) -> float:
    """Share of wrong top-1 answers, percent."""
    model.eval()
    wrong = sum(int((model((x - mean) / std).argmax(1) != y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True))
    return 100.0 * wrong / len(labels)


def score_error(found: Tensor, wanted: Tensor) -> float:
    """Squared error of class scores `[n, classes]` over their variance: of use where few inputs change their class."""
    return round(float((found - wanted).square().mean() / wanted.var(1, correction=0).mean()), 5)


def weights_digest(net: nn.Module) -> str:
    """SHA-256 over all float32 weights, in state-dict order."""
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in net.state_dict().values())).hexdigest()


def seconds_taken(archive: Archive) -> float:
    """By packaging, and by hardening before and rescaling after it."""
    return archive.info["seconds"] + sum(archive.info.get(stage, {}).get("seconds", 0.0) for stage in ("harden", "rescale"))


def append_result(recipe: str, line: dict) -> None:
    """Add one JSON line to `recipes/results/<recipe>.jsonl`."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{recipe}.jsonl").open("a") as f:
        f.write(json.dumps(line) + "\n")
