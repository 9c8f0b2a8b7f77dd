"""Every recipe runs, on data that the test makes, and its file decodes in a fresh process to the error that it reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

TOP = Path(__file__).parent.parent


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def make_mnist(root: Path) -> None:
    """Images of ten fixed patterns under noise, as IDX files."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2, (10, 7, 7)).repeat(4, 1).repeat(4, 2) * 200
    (root / "mnist").mkdir(parents=True)
    for stem, count in (("train", 6200), ("t10k", 500)):
        labels = rng.integers(0, 10, count)
        images = np.clip(patterns[labels] + rng.normal(0, 25, (count, 28, 28)), 0, 255)
        write_idx(root / "mnist" / f"{stem}-images-idx3-ubyte", images)
        write_idx(root / "mnist" / f"{stem}-labels-idx1-ubyte", labels)


def test_lenet5_recipe_writes_a_file_that_a_fresh_process_decodes_to_the_reported_error(tmp_path):
    make_mnist(tmp_path / "data")
    results = TOP / "recipes" / "results" / "lenet5_mnist.jsonl"
    before = results.read_bytes() if results.exists() else None
    command = [
        sys.executable,
        str(TOP / "recipes" / "lenet5_mnist.py"),
        "--smoke",
        "--data",
        str(tmp_path / "data"),
        "--work",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    line = json.loads(done.stdout.splitlines()[-1])
    file = tmp_path / line["file"]
    assert file.stat().st_size == line["bytes"] <= line["budget"]
    checked = subprocess.run([*command[:2], "--check", str(file), "--data", str(tmp_path / "data")], capture_output=True, text=True)
    assert json.loads(checked.stdout) == {"error": line["error"], "sha256_weights": line["sha256_weights"]}
    assert (results.read_bytes() if results.exists() else None) == before  # a smoke run is no result


def run_recipe(name: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, str(TOP / "recipes" / name), *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def make_cifar10(root: Path) -> None:
    """Noise in mosaics of 100 images a row, and a ResNet-20 of random weights with the statistics of that noise."""
    rng = np.random.default_rng(0)
    (root / "cifar10").mkdir(parents=True)
    (root / "cifar10-resnets").mkdir()
    for stem, rows in (*((f"train_{k}", 11) for k in range(1, 6)), ("test_00000_04999", 2)):
        Image.fromarray(rng.integers(0, 256, (32 * rows, 3200, 3), dtype=np.uint8)).save(
            root / "cifar10" / f"{stem}.webp", lossless=True, method=0
        )
    np.save(root / "cifar10" / "train_labels.npy", rng.integers(0, 10, 5500).astype(np.uint8))
    np.save(root / "cifar10" / "test_00000_04999_labels.npy", rng.integers(0, 10, 200).astype(np.uint8))
    sys.path.insert(0, str(TOP / "recipes"))
    try:
        from resnet_cifar10 import ResNet
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    net = ResNet(20)
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(16, 3, 32, 32))
    save_file(net.state_dict(), root / "cifar10-resnets" / "resnet20.safetensors")


def test_resnet_recipe_writes_a_file_that_a_fresh_process_decodes_to_the_reported_accuracy(tmp_path):
    make_cifar10(tmp_path / "data")
    words = ("--data", tmp_path / "data", "--work", tmp_path)
    line = json.loads(run_recipe("resnet_cifar10.py", "--smoke", "--level", "inputs", "--budget", "60kB", *words).splitlines()[-1])
    file = tmp_path / line["file"]
    assert 59_000 < file.stat().st_size == line["bytes"] <= line["budget"]
    assert line["agreement"] > 30  # of ten classes
    checked = json.loads(run_recipe("resnet_cifar10.py", "--check", file, "--data", tmp_path / "data"))
    assert checked == {k: line[k] for k in ("top1", "agreement", "float_top1", "sha256_weights")}


def test_coverage_recipe_tries_a_network():
    line = json.loads(run_recipe("coverage.py", "--smoke", "gru"))
    assert line["same_outputs"]
    assert line["finite"]
    assert not line["problems"]


def test_ban_contexts_recipe_packages_one_training_for_several_contexts(tmp_path):
    make_mnist(tmp_path / "data")
    words = ["--smoke", "--only", "3 5 8", "--no-rivals", "--data", tmp_path / "data", "--work", tmp_path]
    lines = [json.loads(line) for line in run_recipe("ban_contexts.py", *words).splitlines()]
    assert [(v["kind"], v["context"]) for v in lines] == [("general", "all"), ("specialised", "3 5 8")]
    sizes = [v["bytes"] for v in lines]
    assert 3500 < sizes[0] <= 4000
    assert sizes[1] <= 0.6 * sizes[0]
    assert all(v["error"] < 40 for v in lines)  # by chance 90
    assert len(list(tmp_path.glob("digits-*.mban"))) == 2


def test_ban_text_recipe_gives_back_every_byte_in_a_fresh_process(tmp_path):
    folder = tmp_path / "data" / "text" / "made"
    folder.mkdir(parents=True)
    words = [b"attention ", b"is ", b"all ", b"that ", b"context ", b"needs. "]
    (folder / "words.txt").write_bytes(b"".join(words[i] for i in np.random.default_rng(0).integers(0, 6, 6000)))
    (folder / "empty").write_bytes(b"")
    options = ["--epochs", 2, "--rounds", 2, "--refine-steps", 2, "--memory", 8]
    run_recipe("ban_text.py", "train", "--data", tmp_path / "data", "--work", tmp_path, *options)
    model = ("--model", tmp_path / "ban-text-on.mban")
    coded, back = tmp_path / "coded", tmp_path / "back"
    for source in folder.iterdir():
        run_recipe("ban_text.py", "compress", source, coded, *model)
        run_recipe("ban_text.py", "decompress", coded, back, *model)
        assert back.read_bytes() == source.read_bytes(), source.name
        assert coded.stat().st_size < max(0.8 * len(back.read_bytes()), 20)
    damaged = bytearray(coded.read_bytes())
    damaged[4] ^= 1
    coded.write_bytes(damaged)
    done = subprocess.run(
        [sys.executable, TOP / "recipes" / "ban_text.py", "decompress", coded, back, *model], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "checksum" in done.stderr
