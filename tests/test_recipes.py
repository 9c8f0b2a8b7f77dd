"""Every recipe runs, on data that the test makes, and its file decodes in a fresh process to the error that it reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

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
