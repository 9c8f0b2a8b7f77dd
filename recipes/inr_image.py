"""Images as variational implicit neural representations, one or many in a file (after COMBINER and RECOMBINER).

    python recipes/inr_image.py encode IMAGE OUT.mban --bytes 120       any size in whole tiles of 32x32 pixels
    python recipes/inr_image.py encode IMAGE... OUT.mban --bytes 120    all in one file, so many bytes for each
    python recipes/inr_image.py decode OUT.mban OUT.png                 or a folder, for several images
    python recipes/inr_image.py evaluate --data ../data                 test images, JPEG and WebP; appends result lines

RGB at a pixel is a function of its coordinates: a layer of Fourier features (the cosines of 0 to 31 half periods on each axis of a
tile) with linear outputs, and beside it a sine network on coordinates and positional encodings, whose weights differ from tile to tile,
too. What is random, and coded, is v, whose prior is N(0, 1); the weights are w = mean + std * v. For the coarsest features mean and std
are one vector and one matrix (linear reparametrisation); for finer ones both are functions of the coarser weights, worked out by small
convolutions over the places where a feature band is, so that a flat region pays nothing for its detail. All of that is the codec, shared
by all images and all rates and learned on training images (`inr_prior.py`); a .mban file holds v alone. Posteriors are Gaussian and
fitted by the beta-ELBO; the library codes v by its trellis, part after part, and refines what is not coded yet.
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
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import miracle_ban
from miracle_ban.container import Archive, fingerprint
from miracle_ban.errors import MismatchError
from miracle_ban.layers import posteriors

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, append_result, cifar10, command_line, data_root, kodak
from inr_codec import CODEC, RATES, TILE, WEIGHTS, Codec, load_codec
from inr_fit import batch, fit_posteriors, rate_code
from inr_prior import KODAK_TESTED, middles

OVERHEAD_BITS = (124, 300)  # of a file, besides the stream: with one image, with several
EFFICIENCY = 0.94  # KL bits that one bit of the stream carries
LARGEST = 16  # tiles on a side


class Represented(nn.Module):
    """Images of one size as the library sees them: one tensor v. A lone image is told by the file's mark, which depends on its shape."""

    def __init__(self, codec: Codec, number: int, rows: int, columns: int):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(WEIGHTS, number, rows, columns))
        self.codec = (codec,)  # in a tuple, so that it is no part of the images

    def forward(self, rate: Tensor) -> Tensor:
        """The images `[number, 3, h, w]`."""
        return self.codec[0].decode(self.v.transpose(0, 1), rate)


def carried_bits(size: float, tiles: int, number: int) -> float:
    """KL for each tile, bits, that a file with `size` bytes for each of its images carries."""
    return EFFICIENCY * max(8 * size - OVERHEAD_BITS[number > 1] / number, 8) / tiles


def nearest_rate(size: float, tiles: int, number: int) -> Tensor:
    """What the codec is told of the rate, `[number]`: the nearest of `RATES`, so that the size of the file alone says it."""
    bits = carried_bits(size, tiles, number)
    return rate_code(min(RATES, key=lambda r: abs(math.log(r / bits)))).expand(number)


def encode_images(codec: Codec, x: Tensor, size: int, posterior: tuple[Tensor, ...], args: argparse.Namespace) -> tuple[Archive, Tensor]:
    """Code images `[n, 3, h, w]` from their posteriors into a file of at most `n size` bytes; returns it and what it decodes to."""
    mean, std, water = posterior
    number, _, *tiles = mean.shape
    bnn = miracle_ban.convert(Represented(codec, number, *tiles))
    held = posteriors(bnn)["v"]
    with torch.no_grad():
        held.mean.copy_(mean.transpose(0, 1))
        held.log_std.copy_(std.transpose(0, 1).log())
    rate = nearest_rate(size, math.prod(tiles), number)
    archive = miracle_ban.encode(
        bnn, [(rate, x)], lambda image, target: ((image - target).square().sum((1, 2, 3)) / (2 * water)).sum(), num_examples=1,
        coder=miracle_ban.coders.get("trellis", memory=args.memory), budget=size * number, names=number > 1, rounds=args.rounds,
        refine_steps=args.refine_steps, learning_rate=args.refine_rate, progress=number > 1,
    )  # fmt: skip
    with torch.no_grad(), miracle_ban.layers.use_mode(bnn, "mean"):
        return archive, bnn(rate)


def shape_of(archive: Archive) -> tuple[int, int, int]:
    """Number of images in a file, and of rows and columns of tiles in each.

    Raises:
        MismatchError: these are no images.
    """
    known = archive.records[0].shape
    if known and len(known) == 4 and known[0] == WEIGHTS:
        return known[1], known[2], known[3]
    for rows, columns in itertools.product(range(1, LARGEST + 1), repeat=2):
        if fingerprint([("v", (WEIGHTS, 1, rows, columns))]) == archive.fingerprint:
            return 1, rows, columns
    raise MismatchError(f"the file holds no images of at most {LARGEST} tiles on a side")


def decode_file(codec: Codec, path: Path) -> np.ndarray:
    """The images of a file, uint8 `[n, h, w, 3]`."""
    archive = miracle_ban.open(path)
    number, rows, columns = shape_of(archive)
    v = miracle_ban.decode(archive, Represented(codec, number, rows, columns))["v"]
    with torch.no_grad():
        return pixels(codec.decode(v.transpose(0, 1), nearest_rate(path.stat().st_size / number, rows * columns, number)))


def pixels(images: Tensor) -> np.ndarray:
    """Images `[n, 3, h, w]` rounded to uint8 `[n, h, w, 3]`."""
    return (images.permute(0, 2, 3, 1).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def encode_all(codec: Codec, images: np.ndarray, size: int, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Code images uint8 `[n, h, w, 3]`, `args.together` a file, to `folder/FIRST.mban`; what is there stays. What each file cost."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    account = folder / "account.json"
    found: dict[str, dict[str, Any]] = json.loads(account.read_text()) if account.exists() else {}
    tiles = images.shape[1] * images.shape[2] // TILE**2
    files = [range(i, min(i + args.together, len(images))) for i in range(0, len(images), args.together)]
    missing = [file for file in files if str(file[0]) not in found]
    side_by_side = max(1, 8 // (tiles * args.together))
    with tqdm(total=len(files), initial=len(files) - len(missing), desc=f"{size} bytes an image", unit="file") as bar:
        for some in (missing[i : i + side_by_side] for i in range(0, len(missing), side_by_side)):
            rows = [i for file in some for i in file]
            x = batch(torch.from_numpy(images[rows]), torch.arange(len(rows)))
            rate = nearest_rate(size, tiles, len(some[0]))[:1].expand(len(rows))
            fitted = fit_posteriors(codec, x, rate, carried_bits(size, tiles, len(some[0])), args.fit_steps)
            for file in some:
                own = slice(rows.index(file[0]), rows.index(file[0]) + len(file))
                archive, decoded = encode_images(codec, x[own], size, tuple(t[own] for t in fitted), args)
                info = archive.info
                each = miracle_ban.save(archive, folder / f"{file[0]:04d}.mban") / len(file)
                if nearest_rate(each, tiles, len(file))[0] != rate[0]:
                    raise SystemExit(f"{each} bytes an image would be taken for another rate: choose another size")
                found[str(file[0])] = {
                    "bytes": info["file_bytes"], "side_bits": info["side_bits"], "index_bits": info["index_bits"],
                    "kl_bits": info["kl_bits_per_block"] * info["blocks"], "log2_ratio": info["log2_ratio_per_block"] * info["blocks"],
                    "psnr": [_psnr(a, b) for a, b in zip(pixels(decoded), images[list(file)], strict=True)],
                }  # fmt: skip
                account.write_text(json.dumps(found))
                bar.update()
    return [found[str(file[0])] for file in files]


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(a.astype(float) - b).mean() / 255**2))


def _sha256(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


# --- commands --------------------------------------------------------------------------------------------------------------


def encode(args: argparse.Namespace) -> None:
    """Code image files of one size into one file."""
    images = [np.asarray(Image.open(path).convert("RGB")) for path in args.image]
    for path, image in zip(args.image, images, strict=True):
        if any(s % TILE or not 0 < s <= LARGEST * TILE for s in image.shape[:2]) or image.shape != images[0].shape:
            raise SystemExit(
                f"{path} has {image.shape[1]}x{image.shape[0]} pixels: each side must be a multiple of {TILE}, at most {LARGEST * TILE}, "
                "and all images of a file must be of one size"
            )
    args.together = len(images)
    with tempfile.TemporaryDirectory() as folder:
        cost = encode_all(load_codec(args.codec), np.stack(images), args.bytes, Path(folder), args)[0]
        args.output.write_bytes((Path(folder) / "0000.mban").read_bytes())
    print(json.dumps(cost))


def decode(args: argparse.Namespace) -> None:
    """Decode a file to a PNG, or one of many images, or all files of a folder, to numbered PNGs in a folder."""
    codec = load_codec(args.codec)
    many = args.file.is_dir()
    for path in sorted(args.file.glob("*.mban")) if many else [args.file]:
        images = decode_file(codec, path)
        if not many and len(images) == 1:
            Image.fromarray(images[0]).save(args.output)
            continue
        args.output.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images, int(path.stem) if many else 0):
            Image.fromarray(image).save(args.output / f"{i:04d}.png")


def test_images(args: argparse.Namespace) -> np.ndarray:
    """The first images of CIFAR-10's test set, or the middles of the first Kodak images, which the codec has not seen."""
    if args.set == "cifar10":
        return cifar10(data_root(args.data))["test"][0][: args.images].numpy()
    return middles(kodak(data_root(args.data))[:KODAK_TESTED][: args.images])


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
    codec, images, started = load_codec(args.codec), test_images(args), time.monotonic()
    others = {kind: usual_codec(images, kind) for kind in ("webp", "jpeg")}
    shown = [images[: args.shown]]
    for size in args.sizes:
        folder = args.work / f"inr-{args.set}-{size}-{args.together}"
        costs = encode_all(codec, images, size, folder, args)
        subprocess.run([sys.executable, __file__, "decode", str(folder), str(folder), "--codec", str(args.codec)], check=True)
        decoded = [np.asarray(Image.open(folder / f"{i:04d}.png")) for i in range(len(images))]
        quality = [_psnr(a, b) for a, b in zip(decoded, images, strict=True)]
        found = [v for cost in costs for v in cost["psnr"]]
        if any(abs(q - own) > 0.01 for q, own in zip(quality, found, strict=True)):
            raise SystemExit("a fresh process decoded other pixels")
        files = sorted(folder.glob("*.mban"))
        pixel_count = images[0].shape[0] * images[0].shape[1]
        line = {
            "task": args.set, "crop": images.shape[1], "images": len(images), "together": args.together, "size": size,
            "bytes": sum(p.stat().st_size for p in files) / len(images), "psnr": float(np.mean(quality)),
            "psnr_error": float(np.std(quality) / math.sqrt(len(images))),
            **{k: sum(c[k] for c in costs) / len(images) for k in ("side_bits", "index_bits", "kl_bits", "log2_ratio")},
            "seed": args.seed, "codec_bytes": args.codec.stat().st_size, "codec_sha256": _sha256([args.codec]),
            "sha256": _sha256(files),
            "seconds": round(time.monotonic() - started, 1), "command": command_line(),
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
    commands = parser.add_subparsers(required=True, metavar="encode | decode | evaluate")
    common, coding = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    common.add_argument("--codec", type=Path, default=CODEC)
    common.add_argument("--data", help="folder that holds cifar10/ and kodak/; default $MIRACLE_BAN_DATA, else ./data")
    common.add_argument("--work", type=Path, default=Path("work"))
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--smoke", action="store_true", help="little work and no result line, for the tests")
    coding.add_argument("--fit-steps", type=int, default=150)
    coding.add_argument("--rounds", type=int, default=8)
    coding.add_argument("--refine-steps", type=int, default=20)
    coding.add_argument("--refine-rate", type=float, default=1e-2)
    coding.add_argument("--memory", type=int, default=18, help="of the trellis, bits")
    one = commands.add_parser("encode", parents=[common, coding], help="code images of one size into a file")
    one.add_argument("image", type=Path, nargs="+")
    one.add_argument("output", type=Path)
    one.add_argument("--bytes", type=int, required=True, help="of the file for each image, everything counted")
    one.set_defaults(run=encode)
    one = commands.add_parser("decode", parents=[common], help="decode a file, or all files of a folder")
    one.add_argument("file", type=Path)
    one.add_argument("output", type=Path, help="a PNG; of a file with several images, or of a folder with files, a folder")
    one.set_defaults(run=decode)
    one = commands.add_parser("evaluate", parents=[common, coding], help="code and measure test images")
    one.add_argument("--set", choices=("cifar10", "kodak"), default="cifar10")
    one.add_argument("--images", type=int, default=64)
    one.add_argument("--sizes", type=lambda text: [int(s) for s in text.split(",")], default=[120, 246], help="bytes of an image")
    one.add_argument("--together", type=int, default=1, help="images in a file")
    one.add_argument("--shown", type=int, default=12, help="images in the picture")
    one.set_defaults(run=evaluate)
    args = parser.parse_args()
    if args.smoke:
        small = {"images": 2, "fit_steps": 20, "rounds": 2, "refine_steps": 2, "memory": 10}
        vars(args).update({k: v for k, v in small.items() if hasattr(args, k)})
    args.run(args)


if __name__ == "__main__":
    main()
