"""Result lines of all recipes, and the published figures that they are held against."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

TOP = Path(__file__).resolve().parent.parent
PUBLISHED = (  # bytes, error in percent, what
    (1_140, 0.98, "MIRACLE, independent re-implementation, a real file"),
    (1_694, 0.83, "MIRACLE, independent re-implementation, a real file"),
    (1_552, 0.96, "MIRACLE (Havasi et al. 2019), indices only"),
    (3_105, 0.69, "MIRACLE (Havasi et al. 2019), indices only"),
    (2_840, 1.00, "entropy-penalised reparameterisation (Oktay et al. 2020)"),
    (10_540, 0.83, "pruning, retraining and NNCodec 2.1.3 (the MPEG standard)"),
    (10_234, 0.89, "pruning, retraining, codebook and entropy coder"),
)
LENETS = {  # name, bytes as float32, what is published
    "lenet5": ("LeNet-5", 1_724_320, PUBLISHED),
    "lenet300": ("LeNet-300-100", 1_066_440, ((8_560, 1.90, "entropy-penalised reparameterisation (Oktay et al. 2020)"),)),
}
RESNETS = {20: 1_092_520, 56: 3_451_984}  # bytes as float32
NNCODEC = {  # bytes, top-1 and agreement with the float network on the same 5,000 images, of NNCodec 2.1.3 on the same weights
    20: ((159_933, 91.44, 98.7), (128_829, 91.06, 97.2), (123_911, 91.32, 97.3), (95_675, 90.04, 94.8), (72_845, 88.08, 91.1)),
    56: ((424_289, 93.00, 99.0), (331_265, 92.34, 97.5), (264_891, 92.72, 96.7), (243_861, 92.10, 96.4), (186_909, 89.28, 92.7)),
}
VGG_BYTES = 58_929_960  # as float32, with the statistics of BatchNorms
VGG_PUBLISHED = (  # bytes, error in percent on all test images, what
    (168_400, 10.0, "MIRACLE (Havasi et al. 2019), indices, and the BatchNorms that it does not count"),
    (101_000, 10.0, "entropy-penalised reparameterisation (Oktay et al. 2020)"),
    (76_000, 10.0, "LilNetX (Girish et al. 2023)"),
)
LEVEL_NAMES = {"weights": "the weights alone", "inputs": "1,024 images without labels", "data": "the training set"}


INR_SETS = {"cifar10": "CIFAR-10's test images", "kodak": "the first Kodak images, 96x96 in the middle"}
INR_PARTS = {
    "matrix": "the matrix", "context": "mean and std from coarser weights", "encodings": "the positional encodings",
    "sine": "the sine network",
}  # fmt: skip
RECOMBINER = ((0.297, 23.592), (0.719, 27.222), (0.938, 28.505), (1.531, 30.911), (1.922, 32.168), (3.344, 35.732))  # as published


def read_results(recipe: str) -> list[dict[str, Any]]:
    """All result lines of a recipe."""
    path = TOP / "recipes" / "results" / f"{recipe}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def lenet_groups(network: str = "LeNet-5") -> dict[tuple[int, str, float], list[dict[str, Any]]]:
    """Result lines of a network by (budget, coder, epochs); of runs repeated with these and the same seed the latest counts."""
    own = (v for v in read_results("lenet5_mnist") if v["task"] == f"{network} on MNIST")
    latest = {(v["budget"], v["coder"], v["epochs"], v["seed"]): v for v in own}
    groups: dict[tuple[int, str, float], list[dict[str, Any]]] = {}
    for line in sorted(latest.values(), key=lambda v: (v["budget"], v["coder"], v["epochs"], v["seed"])):
        groups.setdefault((line["budget"], line["coder"], line["epochs"]), []).append(line)
    return groups


def resnet_groups(depth: int) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Result lines of one ResNet by (level, budget), a line for each seed; of runs repeated with the same command the latest counts."""
    latest = {v["command"]: v for v in read_results("resnet_cifar10") if v["task"].startswith(f"ResNet-{depth} ")}
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in sorted(latest.values(), key=lambda v: (list(LEVEL_NAMES).index(v["level"]), -v["budget"], v["seed"])):
        groups.setdefault((line["level"], line["budget"]), []).append(line)
    return groups


def vgg_runs() -> list[dict[str, Any]]:
    """Result lines of VGG-16, largest first; of runs repeated with the same command the latest counts."""
    latest = {v["command"]: v for v in read_results("vgg_cifar10")}
    return sorted(latest.values(), key=lambda v: (-v["budget"], v["seed"]))


def inr_runs(task: str) -> list[dict[str, Any]]:
    """Result lines of the images of one set, by images in a file and size; of runs repeated the latest counts."""
    latest = {(v["together"], v["size"]): v for v in read_results("inr_image") if v["task"] == task}
    return [latest[key] for key in sorted(latest)]


def small_runs() -> dict[tuple[str, str, float], dict[int, dict[str, Any]]]:
    """Result lines of small networks by (network, level, bits) and seed; of runs repeated the latest counts."""
    latest: dict[tuple[str, str, float], dict[int, dict[str, Any]]] = {}
    for v in read_results("small_networks"):
        latest.setdefault((v["network"], v["level"], v["bits"]), {})[v["seed"]] = v
    return latest


def small_rival(network: str, runs: list[dict[str, Any]]) -> float | None:
    """Bytes of NNCodec for the median of the score errors of `runs`."""
    curve = [(v["bytes"], v["score_error"]) for v in read_results("small_networks_nncodec") if v["network"] == network]
    return bytes_at(curve, median(v["score_error"] for v in runs))


def bytes_at(curve: list[tuple[int, float]], error: float) -> float | None:
    """Bytes for that error, in the logarithm of which is interpolated between the best points; None outside them."""
    best: list[tuple[int, float]] = []
    for point in sorted(curve):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    for (few, worse), (many, better) in itertools.pairwise(best):
        if better <= error <= worse:
            return few + (many - few) * math.log(worse / error) / math.log(worse / better)
    return None
