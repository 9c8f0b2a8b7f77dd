"""VGG-16 on CIFAR-10: trained here, then made small under the noise that its code is going to bring.

    python recipes/vgg_cifar10.py --budget 70kB --device cuda --data ../data

Fifteen million weights (thirteen convolutions with BatchNorms and one linear layer) in some ten thousand bytes: less than a twentieth
of a bit for each, so that hardening has to find the few units that are worth any. Trains on the first 45,000 training images, decodes
the file in a fresh process, reports top-1 on the first 5,000 test images and appends one line to
`recipes/results/vgg_cifar10.jsonl`. Nothing is chosen on the test split. On a CPU training takes days.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import miracle_ban
import miracle_ban.coders
from miracle_ban.bits import parse_bytes

sys.path.insert(0, str(Path(__file__).parent))
from common import append_result, cifar10, data_root, seconds_taken, weights_digest
from resnet_cifar10 import BATCH, Augmented, normalised, scores

WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
RATE, MOMENTUM, DECAY = 0.1, 0.9, 5e-4


class VGG(nn.Module):
    """Configuration D of Simonyan and Zisserman 2015 as it is used for CIFAR-10: BatchNorms, one linear layer.

    Args:
        narrower: by what the widths are divided.
    """

    def __init__(self, narrower: int = 1):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            conv = nn.Conv2d(channels, width // narrower, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            channels = width // narrower
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.pool, self.flatten, self.linear = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `[n, 10]` of images `[n, 3, 32, 32]`."""
        return self.linear(self.flatten(self.pool(self.features(x))))


def trained(net: VGG, images: Tensor, labels: Tensor, epochs: float) -> VGG:
    """The float network, from random weights."""
    optimizer = torch.optim.SGD(net.train().parameters(), RATE, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
    batches = Augmented(images, labels)
    steps = max(2, round(epochs * len(batches)))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    for x, y in tqdm(itertools.islice(endless, steps), "train", steps, unit="step"):
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def top1(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers, percent."""
    return round(100.0 * float((scores(net, images).argmax(1) == labels).float().mean()), 2)


def measured(path: Path, net: VGG, root: Path, part: str) -> dict[str, object]:
    """Decode a file into `net`: top-1 in percent, SHA-256 of all weights."""
    miracle_ban.load(path, net)
    return {"top1": top1(net, *cifar10(root)[part]), "sha256_weights": weights_digest(net)}


def result(path: Path, args: argparse.Namespace, seconds: float) -> dict[str, object]:
    """What a file gives: the test images in a fresh process, the validation images here."""
    root = data_root(args.data)
    words = [*(["--data", args.data] if args.data else []), *(["--smoke"] if args.smoke else [])]
    fresh = [sys.executable, __file__, "--check", str(path), *words]
    checked = json.loads(subprocess.run(fresh, check=True, capture_output=True, text=True).stdout)
    validation = measured(path, network(args), root, "validation")
    if checked["sha256_weights"] != validation["sha256_weights"]:
        raise SystemExit("a fresh process decoded other weights")
    return {
        "task": "VGG-16 on CIFAR-10", "bytes": path.stat().st_size, **checked, "validation_top1": validation["top1"],
        "budget": parse_bytes(args.budget), "seed": args.seed, "seconds": round(seconds, 1),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "file": path.name,
        "command": f"python recipes/vgg_cifar10.py --budget {args.budget} --seed {args.seed} --epochs {args.epochs:g}",
    }  # fmt: skip


def network(args: argparse.Namespace) -> VGG:
    """An untrained one."""
    return VGG(8 if args.smoke else 1)


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="70 kB", help="bytes of the whole file, or text such as '70 kB'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float-epochs", type=float, default=20, help="of training the float network")
    parser.add_argument("--epochs", type=float, default=130, help="of training under noise")
    parser.add_argument("--device", default="cpu", help="of training and packaging, such as cuda")
    parser.add_argument("--data", help="folder that holds cifar10/; default $MIRACLE_BAN_DATA, else ./data")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of the file and the checkpoints")
    parser.add_argument("--smoke", action="store_true", help="a narrow network, a coarse code and few images, for the tests")
    parser.add_argument("--check", type=Path, help="only decode this file and print what it gives on the test images")
    return parser.parse_args()


def main() -> None:
    """Run the recipe."""
    args = arguments()
    root = data_root(args.data)
    if args.check:
        print(json.dumps(measured(args.check, network(args), root, "test")))
        return
    images, labels = (v[: 2 * BATCH if args.smoke else None].to(args.device) for v in cifar10(root)["train"])
    args.work.mkdir(parents=True, exist_ok=True)
    stem = args.work / f"vgg16-{parse_bytes(args.budget)}-s{args.seed}"
    kept = args.work / f"vgg16-float-s{args.seed}.pt"
    torch.manual_seed(args.seed)
    net = network(args).to(args.device, memory_format=torch.channels_last).eval()
    if kept.exists():
        net.load_state_dict(torch.load(kept, weights_only=True, map_location=args.device))
    else:
        torch.save(trained(net, images, labels, args.float_epochs).state_dict(), kept)
    options = {"coder": miracle_ban.coders.get("trellis", memory=8)} if args.smoke else {}
    inputs = normalised(images[: 64 if args.smoke else 1024])
    with torch.autocast(images.device.type, torch.bfloat16):
        archive = miracle_ban.compress(
            net, Augmented(images, labels), F.cross_entropy, budget=args.budget, seed=args.seed, epochs=args.epochs, hardened=True,
            checkpoint=stem, inputs=inputs, **options,
        )  # fmt: skip
    output = stem.with_suffix(".mban")
    miracle_ban.save(archive, output)
    line = result(output, args, seconds_taken(archive))
    if not args.smoke:
        append_result("vgg_cifar10", line)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
