"""Pictures of the result lines."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from lines import INR_SETS, LEVEL_NAMES, NNCODEC, PUBLISHED, RECOMBINER, RESNETS, inr_runs, lenet_groups, read_results, resnet_groups


def lenet_plot(path: Path) -> None:
    """Test error of LeNet-5 against the size of its file: every seed, medians, and every published point."""
    figure, axis = plt.subplots(figsize=(10, 4), layout="constrained")
    groups = [v for (_, coder, _), v in sorted(lenet_groups().items()) if coder == "trellis"]
    every = [(v["bytes"], v["error"]) for own in groups for v in own]
    middle = [(max(v["bytes"] for v in own), median(v["error"] for v in own)) for own in groups]
    axis.plot(*zip(*every), "o", color="#d1495b", alpha=0.4, label="miracle_ban, each seed")
    axis.plot(*zip(*middle), "-s", color="#d1495b", label="miracle_ban, medians")
    for (size, error, what), marker in zip(PUBLISHED, "Dv^<>PX", strict=True):
        axis.plot(size, error, marker, color="#2e6f95", label=what)
    axis.set(xscale="log", xlabel="bytes", ylabel="test error, %", title="LeNet-5 on MNIST")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.grid(alpha=0.25, which="both")
    figure.legend(loc="outside right", frameon=False, fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def resnet_plot(path: Path) -> None:
    """Agreement with the float network against bytes, ours beside NNCodec's."""
    figure, axes = plt.subplots(1, len(RESNETS), figsize=(10, 4), sharey=True)
    for axis, depth in zip(axes, RESNETS, strict=True):
        for level, name in LEVEL_NAMES.items():
            own = [lines for (at, _), lines in resnet_groups(depth).items() if at == level]
            points = sorted((max(v["bytes"] for v in lines) / 1000, median(v["agreement"] for v in lines)) for lines in own)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=f"miracle_ban, from {name}")
        axis.plot(*zip(*sorted((b / 1000, a) for b, _, a in NNCODEC[depth]), strict=True), "s--", color="gray", label="NNCodec 2.1.3")
        axis.set(title=f"ResNet-{depth}", xlabel="file, kB", xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("agreement with the float network, %")
    axes[-1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def federated_plot(path: Path) -> None:
    """Accuracy against rounds, and against the bits that a client sends."""
    latest = {(v["epsilon"], v["how"]): v for v in read_results("federated") if v["messages"] == 1}
    levels = sorted({epsilon for epsilon, _ in latest}, reverse=True)
    colours = {"no privacy": "#8d99ae", "float32": "#2e6f95", "8 bits": "#edae49", "index": "#d1495b"}
    figure, axes = plt.subplots(1, len(levels) + 1, figsize=(4.2 * (len(levels) + 1), 3.6), layout="constrained", sharey=True)
    for (epsilon, how), v in latest.items():
        turn, _, accuracy = zip(*v["history"])
        axes[levels.index(epsilon)].plot(turn, accuracy, "--" if how == "index" else "-", color=colours[how], label=how)
        axes[-1].errorbar(v["bits_per_update"], v["accuracy"], v["accuracy_error"], fmt="o", color=colours[how])
        place = (v["bits_per_update"], v["accuracy"])
        axes[-1].annotate(f"{how}, {epsilon:g}", place, fontsize=7, xytext=(4, 5), textcoords="offset points")
    for axis, epsilon in zip(axes, levels):
        axis.set(title=f"epsilon = {epsilon:g}", xlabel="round")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("test accuracy, %")
    axes[-1].set(xscale="log", xlabel="bits of an update", title="after the last round")
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def inr_plot(path: Path) -> None:
    """PSNR against the rate, files with everything in them."""
    sets = [task for task in INR_SETS if inr_runs(task)]
    if not sets:
        return
    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets), 4), squeeze=False)
    for axis, task in zip(axes[0], sets, strict=True):
        runs = inr_runs(task)
        pixels = runs[-1]["crop"] ** 2
        for together in sorted({v["together"] for v in runs}):
            own = [(v["bpp"], v["psnr"]) for v in runs if v["together"] == together]
            label = f"inr_image.py, {f'{together} images in a file' if together > 1 else 'each image its own file'}"
            axis.plot(*zip(*own, strict=True), "o-", label=label)
        for kind, name in (("webp", "WebP"), ("jpeg", "JPEG")):
            points = [(8 * b / pixels, q) for b, q in runs[-1][f"{kind}_curve"]]
            axis.plot(*zip(*points, strict=True), "--", label=name)
        if task == "cifar10":
            axis.plot(*zip(*RECOMBINER, strict=True), "s:", color="gray", label="RECOMBINER (He et al. 2024), indices only")
        limit = 1.5 * max(v["bpp"] for v in runs)
        axis.set(title=INR_SETS[task], xlabel="bits a pixel, whole file", ylabel="PSNR, dB", xlim=(0, max(limit, 4)), ylim=(20, 37))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def realism_plot(lines: list[dict[str, Any]], pictures: dict[str, np.ndarray], path: Path) -> None:
    """Distortion of realistic codes against bits; distortion and realism of the images; the first images."""
    colours = {
        "rounded": "#8d99ae", "private noise": "#edae49", "dithered": "#4a8c5f", "gprs": "#d1495b", "trellis": "#2e6f95",
    }  # fmt: skip
    figure = plt.figure(figsize=(13, 6.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.3, 1.0))
    axes = top.subplots(1, 3)
    for axis, source in zip(axes, ("circle", "Gaussian", "MNIST")):
        for name in colours:
            own = [v for v in lines if v["source"] == source and v["code"] == name and (source == "MNIST" or name != "rounded")]
            across = "realism" if source == "MNIST" else "bits"
            if own:
                axis.plot([v[across] for v in own], [v["distortion"] for v in own], "o-", color=colours[name], label=name, lw=1)
        axis.set(title=source, xlabel="bits a value", ylabel="squared error")
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.25)
    axes[2].set(xlabel="Frechet distance to other images", title="MNIST, both rates", ylabel="squared error a pixel")
    rate = np.linspace(0.5, 2.0, 60)
    axes[1].plot(rate, 2 ** (1 - 2 * rate), ":", color=colours["private noise"])
    axes[1].plot(rate, 2 - 2 * np.sqrt(1 - 2 ** (-2 * rate)), ":", color=colours["gprs"])
    axes[1].set(title="N(0, 1); dotted: limits without and with sharing")
    grid = bottom.subplots(1, 1)
    grid.imshow(np.concatenate([np.concatenate(list(v.reshape(-1, 28, 28)), 1) for v in pictures.values()]), cmap="gray_r", aspect="equal")
    grid.set(yticks=[28 * i + 14 for i in range(len(pictures))], xticks=[])
    grid.set_yticklabels(pictures, fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(path, optimize=True)  # a third of the bytes
