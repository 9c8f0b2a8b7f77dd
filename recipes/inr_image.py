"""Images as variational implicit neural representations, each in a file of its own (after COMBINER and RECOMBINER).

    python recipes/inr_image.py prior --data ../data                    learn the codec: pretrained/inr-codec.npz
    python recipes/inr_image.py encode IMAGE OUT.mban --bytes 120       any size in whole tiles of 32x32 pixels
    python recipes/inr_image.py decode OUT.mban OUT.png
    python recipes/inr_image.py evaluate --data ../data                 test images, JPEG and WebP; appends result lines

RGB at a pixel is a function of its coordinates: a layer of Fourier features (the cosines of 0 to 31 half periods on each axis of a
tile) with linear outputs, and beside it a sine network whose weights differ from tile to tile, too. What is random, and coded, is v,
whose prior is N(0, 1); the weights are w = mean + std * v. For the coarsest features mean and std are one vector and one matrix
(linear reparametrisation); for finer ones both are functions of the coarser weights, worked out by small convolutions over the
places where a feature band is, so that a flat region pays nothing for its detail. All of that is the codec, shared by all images and
all rates and learned on training images; a .mban file holds v alone. Posteriors are Gaussian and fitted by the beta-ELBO; the
library codes v by its trellis, part after part, and refines what is not coded yet.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import miracle_ban
from miracle_ban.bits import NATS_PER_BIT
from miracle_ban.container import Archive, fingerprint
from miracle_ban.errors import MismatchError
from miracle_ban.layers import posteriors

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, append_result, cifar10, data_root
from inr_codec import (
    CELLS,
    GROUPS,
    PARTS,
    RATES,
    TILE,
    Codec,
    batch,
    fit_posteriors,
    kl_bits,
    kl_each,
    load_codec,
    psnr,
    rate_code,
    save_codec,
)
from inr_codec import water_level as level_for

WEIGHTS = sum(GROUPS) * CELLS**2  # coded for each tile
SHARES = (0.15, 0.35, 0.15, 0.35)  # how often each of the codec's rates is learned on
OVERHEAD_BITS = 124  # of a file, besides the stream
EFFICIENCY = 0.94  # KL bits that one bit of the stream carries
LARGEST = 16  # tiles on a side
KODAK_CROP = 96
CODEC = Path(__file__).parent.parent / "pretrained" / "inr-codec.npz"


def learn(args: argparse.Namespace) -> Codec:
    """Learn the codec on CIFAR-10's training images, going on from WORK/inr-codec.checkpoint; 500 held-out ones are looked at."""
    torch.manual_seed(args.seed)
    data = cifar10(data_root(args.data))
    images, held_out = data["train"][0], batch(data["validation"][0], torch.arange(min(500, len(data["validation"][0]))))
    codec = Codec(args.without)
    codec.start(batch(images, torch.arange(min(4000, len(images)))))
    optimizer = torch.optim.Adam(codec.parameters(), args.learning_rate, betas=(0.9, 0.98))
    rates, shares = torch.tensor(RATES), torch.tensor(SHARES)
    state = {"step": 0, "factor": torch.ones(len(RATES)), "mean_kl": torch.zeros(WEIGHTS)}
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "inr-codec.checkpoint"
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        codec.load_state_dict(state["codec"])
        optimizer.load_state_dict(state["optimizer"])
        torch.manual_seed(args.seed + state["step"])
    bar = tqdm(total=args.steps, initial=state["step"], desc="prior", unit="step", mininterval=10)
    while state["step"] < args.steps:
        step = state["step"]
        for group in optimizer.param_groups:
            warm, cosine = min(1.0, (step + 1) / 50), 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
            group["lr"] = args.learning_rate * warm * (0.01 + 0.99 * cosine)
        x = batch(images, torch.randint(len(images), (args.batch,)))
        x = x.flip(3) if step % 2 else x
        level = torch.multinomial(shares, args.batch, replacement=True)
        water = level_for(codec, x, rates[level] * state["factor"][level])
        image, v_mean, v_std = codec.infer(x, rate_code(rates[level]), water)
        bits = kl_bits(v_mean, v_std)
        loss = (bits * NATS_PER_BIT + (image - x).square().sum((1, 2, 3)) / (2 * water)).mean() / 1000
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        v_mean, v_std, bits = v_mean.detach(), v_std.detach(), bits.detach()
        codec.update_prior(v_mean, v_std, 0.01)
        for k in level.unique():  # so that each rate's images have its KL, on average
            state["factor"][k] *= (rates[k] / bits[level == k].mean()) ** 0.05
        state["mean_kl"] += 0.02 * (kl_each(v_mean, v_std).mean((0, 2, 3)) - state["mean_kl"])
        state["step"] += 1
        bar.update()
        if state["step"] % 250 == 0 or state["step"] == args.steps:
            for k in (1, 3):
                full = rates[k].expand(len(held_out))
                with torch.no_grad():
                    image, v_mean, v_std = codec.infer(held_out, rate_code(full), level_for(codec, held_out, full * state["factor"][k]))
                seen = f"{float(kl_bits(v_mean, v_std).mean()):.0f} bits {float(psnr(image, held_out).mean()):.2f} dB"
                bar.write(f"step {state['step']}: held-out images {seen}", file=sys.stderr)
            state.update(codec=codec.state_dict(), optimizer=optimizer.state_dict())
            torch.save(state, kept)
    bar.close()
    codec.order.copy_(state["mean_kl"].argsort(descending=True).to(torch.int16))
    return codec.requires_grad_(False)


class Represented(nn.Module):
    """An image as the library sees it: one tensor v. Its shape says how many tiles there are, and its mark in the file does."""

    def __init__(self, codec: Codec, rows: int, columns: int):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(WEIGHTS, rows, columns))
        self.codec = (codec,)  # in a tuple, so that it is no part of the image

    def forward(self, rate: Tensor) -> Tensor:
        """The image `[1, 3, h, w]`."""
        return self.codec[0].decode(self.v[None], rate)


def carried_bits(size: int, tiles: int) -> float:
    """KL that a file of `size` bytes carries for each tile, bits."""
    return EFFICIENCY * max(8 * size - OVERHEAD_BITS, 8) / tiles


def nearest_rate(size: int, tiles: int) -> Tensor:
    """What the codec is told of the rate, for one image: the nearest of `RATES`, so that the size of the file alone says it."""
    bits = carried_bits(size, tiles)
    return rate_code(min(RATES, key=lambda r: abs(math.log(r / bits))))[None]


def encode_image(codec: Codec, x: Tensor, size: int, posterior: tuple[Tensor, ...], args: argparse.Namespace) -> tuple[Archive, Tensor]:
    """Code one image `[1, 3, h, w]` from its posterior into a file of at most `size` bytes; returns it and what it decodes to."""
    mean, std, water = posterior
    net = Represented(codec, *mean.shape[2:])
    bnn = miracle_ban.convert(net)
    held = posteriors(bnn)["v"]
    with torch.no_grad():
        held.mean.copy_(mean[0])
        held.log_std.copy_(std[0].log())
    rate = nearest_rate(size, mean[0, 0].numel())
    archive = miracle_ban.encode(
        bnn, [(rate, x)], lambda image, target: (image - target).square().sum() / (2 * float(water)), num_examples=1, budget=size,
        coder=miracle_ban.coders.get("trellis", memory=args.memory), names=False, rounds=args.rounds, refine_steps=args.refine_steps,
        learning_rate=args.refine_rate, progress=False,
    )  # fmt: skip
    with torch.no_grad(), miracle_ban.layers.use_mode(bnn, "mean"):
        return archive, bnn(rate)


def tiles_of(mark: int) -> tuple[int, int]:
    """Rows and columns of tiles of the image whose file has the fingerprint `mark`.

    Raises:
        MismatchError: there is no such image.
    """
    for rows, columns in itertools.product(range(1, LARGEST + 1), repeat=2):
        if fingerprint([("v", (WEIGHTS, rows, columns))]) == mark:
            return rows, columns
    raise MismatchError(f"the file holds no image of at most {LARGEST} tiles on a side")


def decode_file(codec: Codec, path: Path) -> np.ndarray:
    """The image of a file, uint8 `[h, w, 3]`."""
    archive = miracle_ban.open(path)
    rows, columns = tiles_of(archive.fingerprint)
    v = miracle_ban.decode(archive, Represented(codec, rows, columns))["v"]
    with torch.no_grad():
        return pixels(codec.decode(v[None], nearest_rate(path.stat().st_size, rows * columns)))


def pixels(image: Tensor) -> np.ndarray:
    """One image `[1, 3, h, w]` rounded to uint8 `[h, w, 3]`."""
    return (image[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def encode_all(codec: Codec, images: np.ndarray, size: int, folder: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Code images uint8 `[n, h, w, 3]`, each to `folder/NNNN.mban`; what is there already stays. What each one cost."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    account = folder / "account.json"
    found: dict[str, dict[str, float]] = json.loads(account.read_text()) if account.exists() else {}
    missing = [i for i in range(len(images)) if str(i) not in found]
    tiles = images.shape[1] * images.shape[2] // TILE**2
    side_by_side = max(1, 8 // tiles)
    with tqdm(total=len(images), initial=len(images) - len(missing), desc=f"{size} bytes", unit="image") as bar:
        for some in (missing[i : i + side_by_side] for i in range(0, len(missing), side_by_side)):
            x = batch(torch.from_numpy(images[some]), torch.arange(len(some)))
            rate = nearest_rate(size, tiles).expand(len(some))
            mean, std, water = fit_posteriors(codec, x, rate, carried_bits(size, tiles), args.fit_steps)
            for j, i in enumerate(some):
                own = slice(j, j + 1)
                archive, image = encode_image(codec, x[own], size, (mean[own], std[own], water[own]), args)
                info = archive.info
                if nearest_rate(miracle_ban.save(archive, folder / f"{i:04d}.mban"), tiles) != rate[0]:
                    raise SystemExit(f"a file of {info['file_bytes']} bytes would be taken for one of another rate: choose another size")
                found[str(i)] = {
                    "bytes": info["file_bytes"], "side_bits": info["side_bits"], "index_bits": info["index_bits"],
                    "kl_bits": info["kl_bits_per_block"] * info["blocks"], "log2_ratio": info["log2_ratio_per_block"] * info["blocks"],
                    "psnr": _psnr(pixels(image), images[i]),
                }  # fmt: skip
                account.write_text(json.dumps(found))
                bar.update()
    return [found[str(i)] for i in range(len(images))]


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(a.astype(float) - b).mean() / 255**2))


def _command() -> str:
    """The command, but for where files are."""
    words = iter(sys.argv[1:])
    kept = [w for w in words if w not in ("--work", "--codec", "--data") or not next(words)]
    return " ".join(["python recipes/inr_image.py", *kept])


def _sha256(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


# --- commands --------------------------------------------------------------------------------------------------------------


def prior(args: argparse.Namespace) -> None:
    """Learn the codec, write its file, and see what the posteriors of held-out images reach, without coding them."""
    codec = learn(args)
    line = {"task": "prior", "without": sorted(args.without), "steps": args.steps, "batch": args.batch, "seed": args.seed}
    line["weights"] = sum(p.numel() for p in codec.state_dict().values())
    if not args.without:
        line["codec_bytes"] = save_codec(codec, args.codec)
    x = batch(cifar10(data_root(args.data))["validation"][0], torch.arange(args.images))
    for bits in (RATES[1], RATES[3]):
        rate = rate_code(bits).expand(len(x))
        mean, std, _ = fit_posteriors(codec, x, rate, bits, args.fit_steps)
        draw = codec.decode(mean + std * torch.randn_like(mean), rate).clamp(0, 1)
        line[f"psnr_{bits:.0f}"], line[f"kl_{bits:.0f}"] = float(psnr(draw, x).mean()), float(kl_bits(mean, std).mean())
    line["command"] = _command()
    if not args.smoke:
        append_result("inr_image", line)
    print(json.dumps(line))


def encode(args: argparse.Namespace) -> None:
    """Code one image file."""
    image = np.asarray(Image.open(args.image).convert("RGB"))
    if any(s % TILE or not 0 < s <= LARGEST * TILE for s in image.shape[:2]):
        raise SystemExit(
            f"{args.image} has {image.shape[1]}x{image.shape[0]} pixels: each side must be a multiple of {TILE}, at most {LARGEST * TILE}"
        )
    with tempfile.TemporaryDirectory() as folder:
        cost = encode_all(load_codec(args.codec), image[None], args.bytes, Path(folder), args)[0]
        args.output.write_bytes((Path(folder) / "0000.mban").read_bytes())
    print(json.dumps(cost))


def decode(args: argparse.Namespace) -> None:
    """Decode a file to a PNG, or all files of a folder to PNGs beside them."""
    codec = load_codec(args.codec)
    files = sorted(args.file.glob("*.mban")) if args.file.is_dir() else [args.file]
    for path in files:
        Image.fromarray(decode_file(codec, path)).save(path.with_suffix(".png") if args.file.is_dir() else args.output)


def test_images(args: argparse.Namespace) -> np.ndarray:
    """The first images of CIFAR-10's test set, or the middles of the Kodak images."""
    if args.set == "cifar10":
        return cifar10(data_root(args.data))["test"][0][: args.images].numpy()
    found = []
    for path in sorted((data_root(args.data) / "kodak").glob("kodim*.png"))[: args.images]:
        image = np.asarray(Image.open(path).convert("RGB"))
        top, left = (image.shape[0] - KODAK_CROP) // 2, (image.shape[1] - KODAK_CROP) // 2
        found.append(image[top : top + KODAK_CROP, left : left + KODAK_CROP])
    return np.stack(found)


def usual_codec(images: np.ndarray, kind: str) -> list[list[tuple[int, float]]]:
    """(bytes, PSNR) of JPEG or WebP files of each image at every fourth quality."""
    curves = []
    for image in images:
        curve = []
        for quality in range(0, 101, 4):
            file = io.BytesIO()
            Image.fromarray(image).save(file, kind, quality=quality, **({"method": 6} if kind == "webp" else {"optimize": True}))
            curve.append((file.tell(), _psnr(np.asarray(Image.open(file).convert("RGB")), image)))
        curves.append(curve)
    return curves


def evaluate(args: argparse.Namespace) -> None:
    """Code test images at every size, decode them in a fresh process, append result lines and draw some of them."""
    codec, images = load_codec(args.codec), test_images(args)
    others = {kind: usual_codec(images, kind) for kind in ("webp", "jpeg")}
    shown = [images[: args.shown]]
    for size in args.sizes:
        folder = args.work / f"inr-{args.set}-{size}"
        costs = encode_all(codec, images, size, folder, args)
        subprocess.run([sys.executable, __file__, "decode", str(folder), "--codec", str(args.codec)], check=True)
        decoded = [np.asarray(Image.open(folder / f"{i:04d}.png")) for i in range(len(images))]
        quality = [_psnr(a, b) for a, b in zip(decoded, images, strict=True)]
        if any(abs(q - c["psnr"]) > 0.01 for q, c in zip(quality, costs, strict=True)):
            raise SystemExit("a fresh process decoded other pixels")
        files = [folder / f"{i:04d}.mban" for i in range(len(images))]
        pixel_count = images[0].shape[0] * images[0].shape[1]
        line = {
            "task": args.set, "crop": images.shape[1], "images": len(images), "size": size,
            "bytes": float(np.mean([p.stat().st_size for p in files])), "psnr": float(np.mean(quality)),
            "psnr_error": float(np.std(quality) / math.sqrt(len(images))),
            **{k: float(np.mean([c[k] for c in costs])) for k in ("side_bits", "index_bits", "kl_bits", "log2_ratio")},
            "seed": args.seed, "codec_bytes": args.codec.stat().st_size, "codec_sha256": _sha256([args.codec]),
            "sha256": _sha256(files),
            "command": _command(),
        }  # fmt: skip
        line["bpp"] = 8 * line["bytes"] / pixel_count
        for kind, curves in others.items():
            enough = [min((b for b, q in curve if q >= own), default=max(curve)[0]) for curve, own in zip(curves, quality, strict=True)]
            line[f"{kind}_bytes"] = float(np.mean(enough))  # at the same PSNR, image by image
            line[f"{kind}_curve"] = [[round(float(v), 3) for v in np.mean(points, 0)] for points in zip(*curves, strict=True)]
        if not args.smoke:
            append_result("inr_image", line)
        print(json.dumps(line), flush=True)
        shown.append(np.stack(decoded[: args.shown]))
    rows = [np.concatenate(list(row), 1) for row in shown]
    sheet = Image.fromarray(np.concatenate(rows))
    scale = max(1, 900 // sheet.width)
    picture = (args.work if args.smoke else RESULTS) / f"inr_image_{args.set}.png"
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(picture)


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="prior | encode | decode | evaluate")
    common, coding = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    common.add_argument("--codec", type=Path, default=CODEC)
    common.add_argument("--data", help="folder that holds cifar10/ and kodak/; default $MIRACLE_BAN_DATA, else ./data")
    common.add_argument("--work", type=Path, default=Path("work"))
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--smoke", action="store_true", help="little work and no result line, for the tests")
    coding.add_argument("--fit-steps", type=int, default=150)
    coding.add_argument("--rounds", type=int, default=16)
    coding.add_argument("--refine-steps", type=int, default=10)
    coding.add_argument("--refine-rate", type=float, default=1e-2)
    coding.add_argument("--memory", type=int, default=16, help="of the trellis, bits")
    one = commands.add_parser("prior", parents=[common], help="learn the codec")
    one.add_argument("--steps", type=int, default=5000)
    one.add_argument("--batch", type=int, default=64)
    one.add_argument("--learning-rate", type=float, default=3e-3)
    one.add_argument("--without", nargs="*", default=(), choices=PARTS, help="leave parts of the codec out, to see what they are worth")
    one.add_argument("--images", type=int, default=32, help="held-out images that are looked at in the end")
    one.add_argument("--fit-steps", type=int, default=150)
    one.set_defaults(run=prior)
    one = commands.add_parser("encode", parents=[common, coding], help="code an image")
    one.add_argument("image", type=Path)
    one.add_argument("output", type=Path)
    one.add_argument("--bytes", type=int, required=True, help="of the whole file")
    one.set_defaults(run=encode)
    one = commands.add_parser("decode", parents=[common], help="decode a file, or all files of a folder")
    one.add_argument("file", type=Path)
    one.add_argument("output", type=Path, nargs="?")
    one.set_defaults(run=decode)
    one = commands.add_parser("evaluate", parents=[common, coding], help="code and measure test images")
    one.add_argument("--set", choices=("cifar10", "kodak"), default="cifar10")
    one.add_argument("--images", type=int, default=64)
    one.add_argument("--sizes", type=lambda text: [int(s) for s in text.split(",")], default=[120, 246], help="bytes of a file")
    one.add_argument("--shown", type=int, default=12, help="images in the picture")
    one.set_defaults(run=evaluate)
    args = parser.parse_args()
    if args.smoke:
        small = {"steps": 40, "batch": 16, "images": 2, "fit_steps": 20, "rounds": 2, "refine_steps": 2, "memory": 10}
        vars(args).update({k: v for k, v in small.items() if hasattr(args, k)})
    args.run(args)


if __name__ == "__main__":
    main()
