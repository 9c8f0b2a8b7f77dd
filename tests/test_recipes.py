"""Every recipe runs, on data that the test makes, and its file decodes in a fresh process to the error that it reports."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

TOP = Path(__file__).parent.parent


def imported(recipe: str) -> ModuleType:
    """A recipe as a module."""
    sys.path.insert(0, str(TOP / "recipes"))
    try:
        return importlib.import_module(recipe)
    finally:
        sys.path.pop(0)


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
        "--whole",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    line = json.loads(done.stdout.splitlines()[-1])
    file = tmp_path / line["file"]
    assert file.stat().st_size == line["bytes"] <= line["budget"]
    assert "validation_error" not in line  # those images were trained on
    checked = subprocess.run([*command[:2], "--check", str(file), "--data", str(tmp_path / "data")], capture_output=True, text=True)
    assert json.loads(checked.stdout) == {"error": line["error"], "sha256_weights": line["sha256_weights"]}
    assert (results.read_bytes() if results.exists() else None) == before  # a smoke run is no result


def run_recipe(name: str, *words: object) -> str:
    done = subprocess.run([sys.executable, str(TOP / "recipes" / name), *map(str, words)], capture_output=True, text=True)
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


@pytest.mark.parametrize("level", ["inputs", "data"])
def test_resnet_recipe_writes_a_file_that_a_fresh_process_decodes_to_the_reported_accuracy(level, tmp_path):
    make_cifar10(tmp_path / "data")
    words = ["--data", tmp_path / "data", "--work", tmp_path, *(["--whole", "--teacher", "20"] if level == "data" else [])]
    line = json.loads(
        run_recipe("resnet_cifar10.py", "--smoke", "--level", level, "--epochs", "1", "--budget", "20kB", *words).splitlines()[-1]
    )
    assert ("validation_top1" in line) == (level != "data")  # those images were trained on
    file = tmp_path / line["file"]
    assert 19_800 < file.stat().st_size == line["bytes"] <= line["budget"]
    if level == "inputs":
        assert line["agreement"] > 30  # of ten classes; trained on noise it is another network
    checked = json.loads(run_recipe("resnet_cifar10.py", "--check", file, "--data", tmp_path / "data"))
    assert checked == {k: line[k] for k in ("top1", "agreement", "float_top1", "score_error", "sha256_weights")}


def test_vgg_recipe_trains_hardens_and_packages_a_network(tmp_path):
    make_cifar10(tmp_path / "data")
    words = ("--smoke", "--data", tmp_path / "data", "--work", tmp_path)
    line = json.loads(run_recipe("vgg_cifar10.py", *words, "--epochs", "1", "--float-epochs", "1", "--budget", "9kB").splitlines()[-1])
    file = tmp_path / line["file"]
    assert 8_700 < file.stat().st_size == line["bytes"] <= line["budget"] == 9_000
    checked = json.loads(run_recipe("vgg_cifar10.py", *words, "--check", file))
    assert checked == {k: line[k] for k in ("top1", "sha256_weights")}


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


def test_gprs_recipe_counts_the_steps_that_the_theorems_say_and_draws_them(tmp_path):
    lines = [json.loads(line) for line in run_recipe("gprs_figures.py", "--smoke", "-o", tmp_path).splitlines()]
    assert len(lines) == 8
    for v in lines:
        assert v["truncated"] == 0
        assert v["p_value"] > 1e-6
        if v["steps_theorem"]:
            assert abs(v["steps"] - v["steps_theorem"]) < 5 * v["steps_error"]
        else:
            assert 1 < v["steps"] < v["kl_bits"] + 2.5
    for name in ("gprs_searches.png", "gprs_statistics.png"):
        assert Image.open(tmp_path / name).size[0] > 800


def test_realism_recipe_reads_real_files_and_shared_randomness_wins(tmp_path):
    make_mnist(tmp_path / "data")
    words = ("--smoke", "--data", tmp_path / "data", "--work", tmp_path, "-o", tmp_path)
    lines = [json.loads(line) for line in run_recipe("realism.py", *words).splitlines()]
    circle = {v["code"]: v for v in lines if v["source"] == "circle" and v["bits"] == 1}
    assert (tmp_path / "circle-1-dithered.bin").stat().st_size == circle["dithered"]["count"] / 8
    for v in circle.values():
        assert abs(v["distortion"] - v["theorem"]) < 6 * v["distortion_error"]
    for source in ("Gaussian", "MNIST"):
        codes = {v["code"]: v for v in lines if v["source"] == source}
        for name, v in codes.items():
            if name not in ("trellis", "original"):
                assert abs(v["bits"] / codes["gprs"]["bits"] - 1) < 0.1
        if source == "Gaussian":
            assert codes["rounded"]["distortion"] < codes["gprs"]["distortion"] < codes["private noise"]["distortion"]
            assert max(codes[n]["realism"] for n in ("gprs", "private noise", "dithered")) < 0.3 * codes["rounded"]["realism"]
            assert codes["gprs"]["distortion"] < 2 ** (1 - 2 * codes["gprs"]["bits"])  # no code can that shares no randomness
        else:
            assert codes["rounded"]["spread"] < 0.8 * codes["gprs"]["spread"]
            assert (tmp_path / "mnist-6-gprs.bin").stat().st_size == codes["gprs"]["bytes"]
    assert Image.open(tmp_path / "realism.png").size[0] > 800


def test_federated_recipe_learns_from_indices_of_eight_bits_and_goes_on_where_it_was(tmp_path):
    make_mnist(tmp_path / "data")
    words = ("--smoke", "--data", tmp_path / "data", "--work", tmp_path)
    lines = {v["how"]: v for v in map(json.loads, run_recipe("federated.py", *words).splitlines())}
    length = imported("federated").LENGTH
    assert [round(lines[how]["bits_per_update"]) for how in ("float32", "8 bits", "index")] == [32 * length, 8 * length + 32, 8]
    assert lines["no privacy"]["accuracy"] > 80
    assert lines["index"]["accuracy"] > 30  # by chance 10
    assert lines["index"]["epsilon_of_client"] == 8
    log = next(tmp_path.glob("federated-*.jsonl"))
    kept = log.read_text().splitlines()
    log.write_text("\n".join(kept[:-1]) + "\n")
    again = {v["how"]: v for v in map(json.loads, run_recipe("federated.py", *words).splitlines())}
    assert len(log.read_text().splitlines()) == len(kept) == 4
    assert all(again[how]["accuracies"] == lines[how]["accuracies"] for how in lines)


def test_the_index_of_a_private_update_is_private_given_the_shared_randomness():
    """Laws of the index of many updates, given the same candidates; other codes of the same mechanism keep less."""
    for epsilon, bits in ((1.0, 6), (4.0, 8), (8.0, 10)):
        found = imported("private_messages").audit(epsilon, bits)
        assert math.isclose(found["index"], epsilon, rel_tol=1e-9)
        assert epsilon < found["minimal random coding"] <= 2 * epsilon
        assert found["rejection sampling"] is None


def test_private_updates_are_unbiased_whichever_way_they_are_sent():
    recipe, rng, length = imported("private_messages"), np.random.default_rng(0), 900
    direction = rng.standard_normal(length)
    u = torch.from_numpy(np.tile(direction / np.linalg.norm(direction), (3000, 1))).float()
    for how in ("float32", "8 bits", "index"):
        channel = recipe.Channel(how, 4.0, 7, length, secret=3)
        numbers = np.arange(len(u))
        found = channel.unpack(channel.pack(u, numbers), numbers) @ u[0].numpy().astype(float)
        assert abs(found.mean() - 1) < 5 * found.std() / math.sqrt(len(found)), how


def test_composed_privacy_is_that_of_repeated_randomised_response():
    """Which is the worst of all mechanisms; its delta is a finite sum. The next smaller epsilon' of the theorem's grid is too small."""
    composed = imported("private_messages").composed

    def delta(epsilon: float, times: int, total: float) -> float:
        p = math.exp(epsilon) / (1 + math.exp(epsilon))
        laws = [(math.comb(times, j), p ** (times - j) * (1 - p) ** j, p**j * (1 - p) ** (times - j)) for j in range(times + 1)]
        return sum(n * max(a - math.exp(total) * b, 0.0) for n, a, b in laws)

    for epsilon, times, allowed in ((1.0, 10, 1e-5), (0.1, 60, 1e-5), (0.5, 30, 1e-3), (4.0, 2, 1e-5)):
        found = composed(epsilon, times, allowed)
        assert delta(epsilon, times, found) <= allowed * (1 + 1e-9)
        assert found == times * epsilon or delta(epsilon, times, found - 2 * epsilon) > allowed
    assert composed(0.1, 60, 1e-5) < 4


def make_smooth_cifar10(root: Path) -> None:
    """Mosaics of images that are slow waves of every colour."""
    rng = np.random.default_rng(0)
    (root / "cifar10").mkdir(parents=True)
    wave = np.cos(np.pi * np.arange(3)[:, None] * (np.arange(32) + 0.5) / 32)
    for stem, rows in (*((f"train_{k}", 11) for k in range(1, 6)), ("test_00000_04999", 1)):
        images = np.einsum("nabc,ay,bx->nyxc", rng.normal(0, 25, (100 * rows, 3, 3, 3)), wave, wave) + 128
        mosaic = images.clip(0, 255).astype(np.uint8).reshape(rows, 100, 32, 32, 3).swapaxes(1, 2).reshape(32 * rows, 3200, 3)
        Image.fromarray(mosaic).save(root / "cifar10" / f"{stem}.webp", lossless=True, method=0)
    np.save(root / "cifar10" / "train_labels.npy", np.zeros(5500, np.uint8))
    np.save(root / "cifar10" / "test_00000_04999_labels.npy", np.zeros(100, np.uint8))


def test_inr_recipe_codes_images_into_files_that_a_fresh_process_decodes_to_the_reported_quality(tmp_path):
    make_smooth_cifar10(tmp_path / "data")
    codec = ("--codec", tmp_path / "codec.npz")
    known = (*codec, "--smoke", "--data", tmp_path / "data", "--work", tmp_path)
    quick = (*codec, "--fit-steps", 20, "--rounds", 2, "--refine-steps", 2, "--memory", 10)
    learned = json.loads(run_recipe("inr_prior.py", *known))
    assert (tmp_path / "codec.npz").stat().st_size == learned["codec_bytes"]
    line = json.loads(run_recipe("inr_evaluate.py", *known, "--sizes", 120))
    sizes = [p.stat().st_size for p in sorted((tmp_path / "inr-cifar10-120-1").glob("*.mban"))]
    assert len(sizes) == 2
    assert line["bytes"] == sum(sizes) / 2 <= 120
    assert line["psnr"] > 30  # a grey image: about 15

    wide = np.asarray(Image.open(tmp_path / "data" / "cifar10" / "test_00000_04999.webp").convert("RGB"))[:, :64]
    Image.fromarray(wide).save(tmp_path / "wide.png")
    cost = json.loads(run_recipe("inr_image.py", "encode", tmp_path / "wide.png", tmp_path / "wide.mban", "--bytes", 200, *quick))
    assert (tmp_path / "wide.mban").stat().st_size == cost["bytes"] <= 200
    inr_image = imported("inr_image")
    back = inr_image.decode_file(inr_image.load_codec(tmp_path / "codec.npz"), tmp_path / "wide.mban")[0]
    assert back.shape == wide.shape
    error = np.square(back.astype(float) - wide).mean() / 255**2
    assert -10 * np.log10(error) == pytest.approx(cost["psnr"][0], abs=0.01)
    assert cost["psnr"][0] > 28

    upside_down = tmp_path / "upside-down.png"
    Image.fromarray(wide[::-1]).save(upside_down)
    cost = json.loads(
        run_recipe("inr_image.py", "encode", tmp_path / "wide.png", upside_down, tmp_path / "two.mban", "--bytes", 200, *quick)
    )
    assert (tmp_path / "two.mban").stat().st_size == cost["bytes"] <= 400
    run_recipe("inr_image.py", "decode", tmp_path / "two.mban", tmp_path / "two", *codec)
    for name, image, quality in zip(("0000.png", "0001.png"), (wide, wide[::-1]), cost["psnr"], strict=True):
        error = np.square(np.asarray(Image.open(tmp_path / "two" / name)).astype(float) - image).mean() / 255**2
        assert -10 * np.log10(error) == pytest.approx(quality, abs=0.01)
        assert quality > 28


def test_the_codec_in_pretrained_is_that_of_the_result_lines_and_every_size_of_image_has_its_own_mark():
    inr_image = imported("inr_image")
    sides = range(1, inr_image.LARGEST + 1)
    marks = {inr_image.fingerprint([("v", (inr_image.WEIGHTS, 1, r, c))]): (r, c) for r in sides for c in sides}
    assert len(marks) == len(sides) ** 2
    lines = [json.loads(line) for line in (TOP / "recipes" / "results" / "inr_image.jsonl").read_text().splitlines()]
    digest = hashlib.sha256(inr_image.CODEC.read_bytes()).hexdigest()
    assert {v["codec_sha256"] for v in lines if v["task"] == "cifar10"} == {digest}
    assert inr_image.CODEC.stat().st_size < 1_000_000


def test_small_networks_recipe_compresses_what_it_trained(tmp_path):
    make_mnist(tmp_path / "data")
    words = ("--smoke", "--network", "gru", "--level", "inputs", "--bits", 2, "--seed", 0, "--data", tmp_path / "data", "--work", tmp_path)
    line = json.loads(run_recipe("small_networks.py", *words).splitlines()[-1])
    assert (tmp_path / "small-gru-inputs-2-s0.mban").stat().st_size == line["bytes"] <= 2 * line["weights"] / 8
    assert 0.0 < line["score_error"] < 0.5


def test_bytes_for_an_error_lie_between_the_best_points():
    bytes_at = imported("lines").bytes_at
    curve = [(100, 0.4), (200, 0.1), (250, 0.2), (400, 0.025)]
    assert bytes_at(curve, 0.2) == pytest.approx(150)
    assert bytes_at(curve, 0.05) == pytest.approx(300)
    assert bytes_at(curve, 0.5) is None
    assert bytes_at([], 0.1) is None
