"""VGG-16 on CIFAR-10: trained here, then made small under the noise that its code is going to bring.

    python recipes/vgg_cifar10.py --budget 70kB --device cuda --data ../data

Fifteen million weights (the thirteen convolutions with BatchNorm and one linear layer) in some ten thousand bytes: less than a
twentieth of a bit for each, so hardening has to find the few units that are worth any. Trains on the first 45,000 training images,
decodes the file in a fresh process, reports top-1 on the first 5,000 test images and appends one line to
`recipes/results/vgg_cifar10.jsonl`. Nothing is chosen on the test split.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import miracle_ban
import miracle_ban.coders
from miracle_ban.bits import parse_bytes

sys.path.insert(0, str(Path(__file__).parent))
from common import append_result, cifar10, data_root, weights_digest
from resnet_cifar10 import BATCH, Augmented, normalised, scores

WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
RATE, MOMENTUM, DECAY = 0.1, 0.9, 5e-4


class VGG(nn.Module):
    """Configuration D of Simonyan and Zisserman 2015 as it is used for CIFAR-10: BatchNorms, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool, self.flatten, self.linear = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `[n, 10]` of images `[n, 3, 32, 32]`."""
        return self.linear(self.flatten(self.pool(self.features(x))))


def trained(images: Tensor, labels: Tensor, epochs: float, kind: str) -> VGG:
    """A float network, from random weights."""
    net = VGG().to(images.device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
    batches = Augmented(images, labels)
    steps = max(1, round(epochs * len(batches)))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    done = 0
    while done < steps:
        for x, y in batches:
            with torch.autocast(kind, torch.bfloat16):
                loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    return net.eval()


def measured(path: Path, root: Path, part: str) -> dict[str, object]:
    """Decode a file into a fresh network: top-1 in percent, SHA-256 of all weights."""
    images, labels = cifar10(root)[part]
    net = miracle_ban.load(path, VGG())
    digest = weights_digest(net)
    top1 = 100.0 * float((scores(net, images).argmax(1) == labels).float().mean())
    return {"top1": round(top1, 2), "sha256_weights": digest}


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="70 kB", help="bytes of the whole file, or text such as '70 kB'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float-epochs", type=float, default=20, help="of training the float network")
    parser.add_argument("--epochs", type=float, default=130, help="of training under noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of training and packaging")
    parser.add_argument("--data", help="folder that holds cifar10/; default $MIRACLE_BAN_DATA, else ./data")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of the file and the checkpoints")
    parser.add_argument("--smoke", action="store_true", help="a coarse code and few images, for the tests")
    parser.add_argument("--check", type=Path, help="only decode this file and print what it gives on the test images")
    args = parser.parse_args()
    root = data_root(args.data)
    if args.check:
        print(json.dumps(measured(args.check, root, "test")))
        return
    data = {part: tuple(t.to(args.device) for t in pair) for part, pair in cifar10(root).items()}
    images, labels = (v[: 2 * BATCH] if args.smoke else v for v in data["train"])
    kind = torch.device(args.device).type
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / f"vgg16-float-s{args.seed}.pt"
    torch.manual_seed(args.seed)
    if kept.exists():
        net = VGG().to(args.device).to(memory_format=torch.channels_last).eval()
        net.load_state_dict(torch.load(kept, weights_only=True, map_location=args.device))
    else:
        net = trained(images, labels, args.float_epochs, kind)
        torch.save(net.state_dict(), kept)
    float_top1 = 100.0 * float((scores(net, data["test"][0]).argmax(1) == data["test"][1]).float().mean())
    stem = args.work / f"vgg16-{parse_bytes(args.budget)}-s{args.seed}"
    output = stem.with_suffix(".mban")
    coder = miracle_ban.coders.get("trellis", memory=8) if args.smoke else "trellis"
    inputs = normalised(images[: 64 if args.smoke else 1024])
    with torch.autocast(kind, torch.bfloat16):
        archive = miracle_ban.compress(
            net, Augmented(images, labels), F.cross_entropy, budget=args.budget, seed=args.seed, epochs=args.epochs, hardened=True,
            checkpoint=stem, inputs=inputs, coder=coder,
        )  # fmt: skip
    size = miracle_ban.save(archive, output)
    fresh = [sys.executable, __file__, "--check", str(output), *(["--data", args.data] if args.data else [])]
    checked = json.loads(subprocess.run(fresh, check=True, capture_output=True, text=True).stdout)
    validation = measured(output, root, "validation")
    if checked["sha256_weights"] != validation["sha256_weights"]:
        raise SystemExit("a fresh process decoded other weights")
    seconds = archive.info["seconds"] + archive.info["harden"]["seconds"]
    line = {
        "task": "VGG-16 on CIFAR-10", "bytes": size, **checked, "float_top1": round(float_top1, 2), "validation_top1": validation["top1"],
        "budget": parse_bytes(args.budget), "seed": args.seed, "seconds": round(seconds, 1),
        "sha256": hashlib.sha256(output.read_bytes()).hexdigest(), "file": output.name,
        "command": f"python recipes/vgg_cifar10.py --budget {args.budget} --seed {args.seed} --epochs {args.epochs:g}",
    }  # fmt: skip
    if not args.smoke:
        append_result("vgg_cifar10", line)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
