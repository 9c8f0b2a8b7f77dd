"""Test images through `inr_image`, decoded in a fresh process, beside JPEG and WebP on the same images; appends result lines.

    python recipes/inr_evaluate.py --data ../data
    python recipes/inr_evaluate.py --sizes 120 --together 128            all in one file, so many bytes for each
    python recipes/inr_evaluate.py --set kodak --images 4 --shown 4 --sizes 576,1150

All bytes of the files are counted; the codec, which they share, is not, its size is in the lines. Files are kept in WORK, so that an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, append_result, cifar10, command_line, data_root, kodak
from inr_codec import load_codec
from inr_image import coding_options, encode_all, psnr


def _sha256(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


def test_images(args: argparse.Namespace) -> np.ndarray:
    """The first images of CIFAR-10's test set, or the middles of the first Kodak images, which the codec has not seen."""
    if args.set == "cifar10":
        return cifar10(data_root(args.data))["test"][0][: args.images].numpy()
    return np.stack(kodak(data_root(args.data))["test"][: args.images])


def usual_codec(images: np.ndarray, kind: str) -> list[list[tuple[int, float]]]:
    """(bytes, PSNR) of JPEG or WebP files of each image at every fourth quality."""
    curves = []
    for image in images:
        curve = []
        for quality in range(0, 101, 4):
            file = io.BytesIO()
            Image.fromarray(image).save(file, kind, quality=quality, **({"method": 6} if kind == "webp" else {"optimize": True}))
            curve.append((file.tell(), psnr(np.asarray(Image.open(file).convert("RGB")), image)))
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
        command = [sys.executable, str(Path(__file__).with_name("inr_image.py")), "decode", str(folder), str(folder)]
        subprocess.run([*command, "--codec", str(args.codec)], check=True)
        decoded = [np.asarray(Image.open(folder / f"{i:04d}.png")) for i in range(len(images))]
        quality = [psnr(a, b) for a, b in zip(decoded, images, strict=True)]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[coding_options()])
    parser.add_argument("--set", choices=("cifar10", "kodak"), default="cifar10")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--sizes", type=lambda text: [int(s) for s in text.split(",")], default=[120, 246], help="bytes of an image")
    parser.add_argument("--together", type=int, default=1, help="images in a file")
    parser.add_argument("--shown", type=int, default=12, help="images in the picture")
    parser.add_argument("--data", help="folder that holds cifar10/ and kodak/; default $MIRACLE_BAN_DATA, else ./data")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--smoke", action="store_true", help="little work and no result line, for the tests")
    args = parser.parse_args()
    if args.smoke:
        args.images, args.fit_steps, args.rounds, args.refine_steps, args.memory = 2, 20, 2, 2, 10
    evaluate(args)


if __name__ == "__main__":
    main()
