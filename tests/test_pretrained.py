"""The files in pretrained/ are what the manifest says, and decode to the weights that it says."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch

import miracle_ban

TOP = Path(__file__).parent.parent
MANIFEST = json.loads((TOP / "pretrained" / "manifest.json").read_text())


def network(card: dict) -> torch.nn.Module:
    """A fresh instance of what the file holds."""
    sys.path.insert(0, str(TOP / "recipes"))
    try:
        from ban_text import Predictor
        from lenet5_mnist import NETWORKS, LeNet5
        from resnet_cifar10 import ResNet
        from vgg_cifar10 import VGG
    finally:
        sys.path.pop(0)
    task = card["task"].partition(" ")[0]
    if task == "lossless":
        return Predictor(card["task"].endswith("on"))
    if task in ("digits", "domains"):
        return LeNet5(10 if task == "digits" else 20)
    if task == "VGG-16":
        return VGG()
    lenets = dict(NETWORKS.values())
    return lenets[task]() if task in lenets else ResNet(int(task.removeprefix("ResNet-")))


def test_every_file_is_in_the_manifest_and_the_other_way_round():
    assert {m["file"] for m in MANIFEST} == {p.name for p in (TOP / "pretrained").glob("*.mban")}


@pytest.mark.parametrize("card", MANIFEST, ids=[m["file"] for m in MANIFEST])
def test_a_pretrained_file_decodes_bit_for_bit(card):
    path = TOP / "pretrained" / card["file"]
    assert (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) == (card["bytes"], card["sha256"])
    net = miracle_ban.load(path, network(card))
    weights = b"".join(t.numpy().tobytes() for t in net.state_dict().values())
    assert hashlib.sha256(weights).hexdigest() == card["sha256_weights"]


def test_loading_takes_milliseconds():
    path = TOP / "pretrained" / MANIFEST[0]["file"]
    net = network(MANIFEST[0])
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        miracle_ban.load(path, net)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
