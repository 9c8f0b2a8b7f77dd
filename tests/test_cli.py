"""The command line as a user meets it: in a folder of its own, in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))

def batches():
    torch.manual_seed(0)
    x = torch.randn(600, 1, 4, 4)
    y = (x.flatten(1) @ torch.randn(16, 3)).argmax(1)
    return list(zip(x.split(50), y.split(50)))
"""


def run(folder, *words, status=0):
    done = subprocess.run([sys.executable, "-m", "miracle_ban", *map(str, words)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, (words, done.stdout, done.stderr)
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained network, its checkpoint, and the file that `compress` makes of it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "mine.py").write_text(MODULE)
    scope: dict = {}
    exec(MODULE, scope)
    net, batches = scope["net"](), scope["batches"]()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(10):
        for x, y in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    save_file(net.state_dict(), folder / "net.safetensors")
    run(
        folder, "compress", "net.safetensors", "--model", "mine:net", "--data", "mine:batches", "--budget", "200", "--epochs", "20",
        "-o", "net.mban", "--report", "report.json", "--names",
    )  # fmt: skip
    return folder


def test_compress_meets_the_budget_and_reports_it(folder):
    report = json.loads((folder / "report.json").read_text())
    assert (folder / "net.mban").stat().st_size == report["file_bytes"] <= 200


def test_inspect_lists_every_tensor(folder):
    text = run(folder, "inspect", "net.mban").stdout
    assert all(name in text for name in ("1.weight", "1.bias", "3.weight", "3.bias"))
    result = json.loads(run(folder, "inspect", "net.mban", "--json").stdout)
    assert len(result["tensors"]) == 4


def test_decode_gives_weights_that_load_into_the_network(folder):
    run(folder, "decode", "net.mban", "-o", "out.safetensors")
    scope: dict = {}
    exec(MODULE, scope)
    scope["net"]().load_state_dict(load_file(folder / "out.safetensors"))


def test_verify_says_yes_to_a_whole_file_and_no_to_a_damaged_one(folder):
    run(folder, "verify", "net.mban")
    data = bytearray((folder / "net.mban").read_bytes())
    data[40] ^= 1
    (folder / "bad.mban").write_bytes(data)
    done = run(folder, "verify", "bad.mban", status=1)
    assert len(done.stderr.strip().splitlines()) == 1
    assert "checksum" in done.stderr


def test_compare_prints_the_ratio(folder):
    result = json.loads(run(folder, "compare", "net.mban", "net.safetensors", "--json").stdout)
    assert result["file_bytes"] == (folder / "net.mban").stat().st_size


def test_plot_draws_a_file_and_a_report(folder):
    run(folder, "plot", "net.mban", "report.json", "-o", "bits.png")
    assert (folder / "bits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("inspect", "nothing.mban"), "nothing.mban"),
        (("inspect", "mine.py"), "not a .mban file"),
        (("decode", "net.mban", "--model", "mine:absent", "-o", "x.safetensors"), "absent"),
        (("decode", "net.mban", "--model", "nowhere:net", "-o", "x.safetensors"), "nowhere"),
        (("compress", "net.safetensors", "--model", "mine:net", "--data", "mine:batches", "--budget", "lots", "-o", "x.mban"), "lots"),
        (("compress", "net.safetensors", "--model", "mine:net", "--data", "mine:batches", "--budget", "20", "-o", "x.mban"), "budget"),
    ],
)
def test_a_fault_is_one_line_and_status_1(folder, words, says):
    done = run(folder, *words, status=1)
    lines = [line for line in done.stderr.splitlines() if line.startswith("miracle-ban: error:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in done.stderr


def test_wrong_usage_is_status_2(folder):
    run(folder, "compress", status=2)


def test_compress_without_data_trains_nothing(folder):
    result = json.loads(
        run(folder, "compress", "net.safetensors", "--model", "mine:net", "--budget", "400", "-o", "raw.mban", "--json").stdout
    )
    assert (folder / "raw.mban").stat().st_size == result["file_bytes"] <= 400
    assert set(result["stages"]) == {"encode"}


def test_compress_from_inputs_and_from_the_state_dict_alone(folder):
    with (folder / "mine.py").open("a") as f:
        f.write("\n\ndef images():\n    return torch.cat([x for x, _ in batches()])\n\n\ndef nothing():\n    return 3\n")
    common = ["net.safetensors", "--budget", "400", "--json", "-o"]
    found = json.loads(run(folder, "compress", *common, "inputs.mban", "--model", "mine:net", "--inputs", "mine:images").stdout)
    assert (folder / "inputs.mban").stat().st_size == found["file_bytes"] <= 400
    assert found["quality"]["agreement"] > 80
    assert found["quality"]["relative_error"] < 0.5
    text = run(
        folder, "compress", *[c for c in common if c != "--json"], "again.mban", "--model", "mine:net", "--inputs", "mine:images"
    ).stdout
    assert "same answer as before, %" in text
    alone = json.loads(run(folder, "compress", *common, "alone.mban").stdout)
    assert alone["file_bytes"] <= 400
    run(folder, "decode", "alone.mban", "-o", "alone.safetensors")
    assert load_file(folder / "alone.safetensors").keys() == load_file(folder / "net.safetensors").keys()
    error = run(folder, "compress", *common, "no.mban", "--inputs", "mine:images", status=1).stderr
    assert "--model" in error
    error = run(folder, "compress", *common, "no.mban", "--model", "mine:net", "--inputs", "mine:nothing", status=1).stderr
    assert "mine:nothing" in error
    assert not (folder / "no.mban").exists()


def test_compress_for_a_context(folder):
    with (folder / "mine.py").open("a") as f:
        f.write("\n\ndef here():\n    return torch.cat([x[y < 2] for x, y in batches()])\n")
    common = ["net.safetensors", "--model", "mine:net", "--budget", "150", "--json", "-o"]
    data = ["--data", "mine:batches", "--epochs", "15"]
    found = json.loads(run(folder, "compress", *common, "here.mban", *data, "--context", "mine:here").stdout)
    assert (folder / "here.mban").stat().st_size == found["file_bytes"] <= 150
    assert found["quality"]["agreement"] > 70  # on the context's inputs
    error = run(folder, "compress", *common, "no.mban", "--context", "mine:here", status=1).stderr
    assert "--data" in error
