"""The demo: its digits, and the whole of it as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from miracle_ban.demo import digits


def test_the_digits_are_the_same_for_the_same_seed_and_others_for_another():
    images, labels = digits(40, seed=3)
    again, _ = digits(40, seed=3)
    other, _ = digits(40, seed=4)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert set(labels.tolist()) <= set(range(10))


def test_the_demo_keeps_its_promise(tmp_path):
    command = [sys.executable, "-m", "miracle_ban", "demo", "--json", "--quiet", "-o", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["float_bytes"] == 1_724_320
    assert result["ratio"] >= 200
    assert result["decoded_error"] <= result["float_error"] + 0.5
    assert {"float_bytes", "file_bytes", "ratio", "float_error", "decoded_error", "seconds"} <= set(result)
    assert list((tmp_path / "demo").glob("*.mban"))
