"""Images as variational implicit neural representations, one or many in a file (after COMBINER and RECOMBINER).

    python recipes/inr_image.py encode IMAGE OUT.mban --bytes 120       any size in whole tiles of 32x32 pixels
    python recipes/inr_image.py encode IMAGE... OUT.mban --bytes 120    all in one file, so many bytes for each
    python recipes/inr_image.py decode OUT.mban OUT.png                 or a folder, for several images

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
import itertools
import json
import math
import sys
import tempfile
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
from inr_codec import CODEC, RATES, TILE, WEIGHTS, Codec, load_codec
from inr_fit import batch, fit_posteriors, rate_code

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
            x = batch(torch.from_numpy(images[rows]))
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
                    "psnr": [psnr(a, b) for a, b in zip(pixels(decoded), images[list(file)], strict=True)],
                }  # fmt: skip
                account.write_text(json.dumps(found))
                bar.update()
    return [found[str(file[0])] for file in files]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images, dB."""
    return float(-10 * np.log10(np.square(a.astype(float) - b).mean() / 255**2))


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


def coding_options() -> argparse.ArgumentParser:
    """A parser for what `encode_all` asks for."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--codec", type=Path, default=CODEC)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit-steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--refine-steps", type=int, default=20)
    parser.add_argument("--refine-rate", type=float, default=1e-2)
    parser.add_argument("--memory", type=int, default=18, help="of the trellis, bits")
    return parser


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="encode | decode")
    one = commands.add_parser("encode", parents=[coding_options()], help="code images of one size into a file")
    one.add_argument("image", type=Path, nargs="+")
    one.add_argument("output", type=Path)
    one.add_argument("--bytes", type=int, required=True, help="of the file for each image, everything counted")
    one.set_defaults(run=encode)
    one = commands.add_parser("decode", help="decode a file, or all files of a folder")
    one.add_argument("file", type=Path)
    one.add_argument("output", type=Path, help="a PNG; of a file with several images, or of a folder with files, a folder")
    one.add_argument("--codec", type=Path, default=CODEC)
    one.set_defaults(run=decode)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
