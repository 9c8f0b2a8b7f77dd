"""ResNet-20 and ResNet-56 on CIFAR-10, trained networks of other people, made small at three levels of help.

    python recipes/resnet_cifar10.py --depth 20 --level weights --budget 50kB --data ../data
    python recipes/resnet_cifar10.py --depth 20 --level inputs --budget 40kB --data ../data
    python recipes/resnet_cifar10.py --depth 20 --level data --budget 40kB --data ../data

Level "weights" sees the weights alone; "inputs" also 1,024 training images without labels; "data" trains on the training images
(augmented) under the noise that the code is going to bring and packages what comes of it. Decodes the file in a fresh process, reports
top-1 and the agreement with the float network on the first 5,000 test images, and appends one line to
`recipes/results/resnet_cifar10.jsonl`. Nothing is chosen on the test split; the last 5,000 training images are only trained on with
`--whole`, when nothing is left to choose (but the float networks were trained on them). With `--teacher 56` the network also imitates the
float ResNet-56. The float networks are `cifar10-resnets/resnet*.safetensors` in the data folder: the
checkpoints of github.com/akamaster/pytorch_resnet_cifar10 without their prefix `module.`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import miracle_ban
import miracle_ban.coders
from miracle_ban.bits import parse_bytes

sys.path.insert(0, str(Path(__file__).parent))
from common import Scored, append_result, cifar10, data_root, distilled, score_error, seconds_taken, weights_digest

INPUT_MEAN, INPUT_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, PAD = 128, 4
LEVELS = ("weights", "inputs", "data")
SHARE, TEMPERATURE = 0.9, 4.0  # of a teacher


class Block(nn.Module):
    """Basic block with a shortcut that has no parameters (He et al. 2016, option A)."""

    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.padding = stride, (out - into) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Features `[n, out, h / stride, w / stride]`."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class ResNet(nn.Module):
    """The CIFAR form: three stages of (depth - 2) / 6 blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `[n, 10]` of images `[n, 3, 32, 32]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def resnet20() -> ResNet:
    """For `miracle-ban compress --model recipes/resnet_cifar10.py:resnet20`."""
    return ResNet(20)


def resnet56() -> ResNet:
    """For `miracle-ban compress --model recipes/resnet_cifar10.py:resnet56`."""
    return ResNet(56)


def float_network(depth: int, root: Path) -> ResNet:
    """The trained network."""
    from safetensors.torch import load_file

    path = root / "cifar10-resnets" / f"resnet{depth}.safetensors"
    if not path.exists():
        raise SystemExit(f"there is no {path}: convert the checkpoint of github.com/akamaster/pytorch_resnet_cifar10 as the help says")
    net = ResNet(depth)
    net.load_state_dict(load_file(path), strict=False)
    return net.eval().to(memory_format=torch.channels_last)


def normalised(images: Tensor) -> Tensor:
    """uint8 `[n, h, w, 3]` to what the networks take, float32 `[n, 3, h, w]` in channels-last order."""
    mean, std = (torch.tensor(v, device=images.device) for v in (INPUT_MEAN, INPUT_STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


class Augmented:
    """Shuffled batches (inputs, labels), flipped and cropped at random."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = F.pad(images, (0, 0, PAD, PAD, PAD, PAD)), labels
        self.num_examples = len(labels)

    def __len__(self) -> int:
        return self.num_examples // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.device
        side = torch.arange(32, device=device)
        for rows in torch.randperm(self.num_examples, device=device)[: len(self) * BATCH].split(BATCH):
            y, x = torch.randint(2 * PAD + 1, (2, len(rows), 1), device=device) + side
            x = torch.where(torch.rand(len(rows), 1, device=device) < 0.5, x.flip(1), x)
            yield normalised(self.images[rows[:, None, None], y[:, :, None], x[:, None, :]]), self.labels[rows]


@torch.no_grad()
def scores(net: nn.Module, images: Tensor) -> Tensor:
    """Class scores `[n, 10]`."""
    net.eval()
    return torch.cat([net(normalised(x)) for x in images.split(500)])


def measured(path: Path, depth: int, root: Path, part: str) -> dict[str, object]:
    """Decode a file into a fresh network: top-1 and agreement with the float network in percent, SHA-256 of all weights.

    And `common.score_error`.
    """
    images, labels = cifar10(root)[part]
    net = miracle_ban.load(path, ResNet(depth))
    digest = weights_digest(net)
    found, wanted = (scores(n, images) for n in (net, float_network(depth, root)))
    own, teacher = found.argmax(1), wanted.argmax(1)
    percent = {"top1": own == labels, "agreement": own == teacher, "float_top1": teacher == labels}
    figures = {k: round(100.0 * float(v.float().mean()), 2) for k, v in percent.items()}
    return {**figures, "score_error": score_error(found, wanted), "sha256_weights": digest}


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--level", default="weights", choices=LEVELS)
    parser.add_argument("--budget", default="50 kB", help="bytes of the whole file, or text such as '40 kB'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=40, help="of training, level data")
    parser.add_argument("--whole", action="store_true", help="train on the validation images, too, as the float networks were")
    parser.add_argument("--teacher", type=int, choices=(20, 56), help="depth of a float network to imitate, level data; default none")
    parser.add_argument("--float32", dest="bfloat16", action="store_false", help="not in bfloat16; faster on CPUs without AMX")
    parser.add_argument("--device", default="cpu", help="of training and packaging, such as cuda")
    parser.add_argument("--data", help="folder that holds cifar10/ and cifar10-resnets/; default $MIRACLE_BAN_DATA, else ./data")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of the file and the checkpoints")
    parser.add_argument("--smoke", action="store_true", help="a coarse code and few images, for the tests")
    parser.add_argument("--check", type=Path, help="only decode this file and print what it gives on the test images")
    args = parser.parse_args()
    root = data_root(args.data)
    if args.check:
        print(json.dumps(measured(args.check, args.depth, root, "test")))
        return
    net = float_network(args.depth, root).to(args.device)
    data = cifar10(root)
    images, labels = data["train"]
    if args.whole:
        images, labels = (torch.cat([data[part][i] for part in ("train", "validation")]) for i in (0, 1))
    images, labels = images.to(args.device), labels.to(args.device)
    args.work.mkdir(parents=True, exist_ok=True)
    run = f"{'whole-' if args.whole else ''}{f'taught-{args.teacher}-' if args.teacher else ''}s{args.seed}"
    stem = args.work / f"resnet{args.depth}-{args.level}-{parse_bytes(args.budget)}-{run}"
    output = stem.with_suffix(".mban")
    options = {"budget": args.budget, "seed": args.seed}
    if args.smoke:
        options["coder"] = miracle_ban.coders.get("trellis", memory=8)
    inputs = None if args.level == "weights" else normalised(images[: 64 if args.smoke else 1024])
    if args.level == "data":
        batches: Augmented | Scored = Augmented(*(v[: 2 * BATCH] if args.smoke else v for v in (images, labels)))
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
        if args.teacher:
            batches = Scored(batches, float_network(args.teacher, root).to(args.device))
            loss = distilled(SHARE, TEMPERATURE)
        options |= {"epochs": args.epochs, "hardened": True, "checkpoint": stem, "inputs": inputs}
        with torch.autocast(torch.device(args.device).type, torch.bfloat16) if args.bfloat16 else contextlib.nullcontext():
            archive = miracle_ban.compress(net, batches, loss, **options)
    else:
        archive = miracle_ban.compress(net, inputs=inputs, **options)
    size = miracle_ban.save(archive, output)
    fresh = [sys.executable, __file__, "--depth", str(args.depth), "--check", str(output), *(["--data", args.data] if args.data else [])]
    checked = json.loads(subprocess.run(fresh, check=True, capture_output=True, text=True).stdout)
    validation = measured(output, args.depth, root, "validation")
    if checked["sha256_weights"] != validation["sha256_weights"]:
        raise SystemExit("a fresh process decoded other weights")
    words = [f"--depth {args.depth} --level {args.level} --budget {args.budget} --seed {args.seed}"]
    if args.level == "data":
        words.append(f"--epochs {args.epochs:g}{' --whole' if args.whole else ''}")
        words += [f"--teacher {args.teacher}"] if args.teacher else []
    line = {
        "task": f"ResNet-{args.depth} on CIFAR-10", "level": args.level, "bytes": size, **checked,
        **({} if args.whole else {"validation_top1": validation["top1"], "validation_score_error": validation["score_error"]}),
        "budget": parse_bytes(args.budget), "seed": args.seed,
        "seconds": round(seconds_taken(archive), 1), "sha256": hashlib.sha256(output.read_bytes()).hexdigest(), "file": output.name,
        "command": f"python recipes/resnet_cifar10.py {' '.join(words)}",
    }  # fmt: skip
    if not args.smoke:
        append_result("resnet_cifar10", line)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
