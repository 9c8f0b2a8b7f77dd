"""Small networks of every kind on MNIST, compressed without training: from the weights alone and from 1,024 images without labels.

    python recipes/small_networks.py --network lstm --level inputs --bits 1

Trains the float network for six epochs of 20,000 images (a minute or two, kept in --work), compresses it to so many bits a weight,
decodes the file and measures it on the 5,000 validation images: errors, and the squared error of the class scores over their variance.
Appends a line for each file to `recipes/results/small_networks.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import miracle_ban
import miracle_ban.coders

sys.path.insert(0, str(Path(__file__).parent))
from common import Batches, append_result, data_root, mnist, score_error
from lenet5_mnist import INPUT_MEAN, INPUT_STD, train_float

EXAMPLES, EPOCHS, BATCH, RATE = 20_000, 6, 100, 3e-3
INPUTS = 1024
SMOKE = 256


class Recurrent(nn.Module):
    """A recurrent network over the rows of an image, its states' mean over time, a layer."""

    def __init__(self, states: nn.RNNBase):
        super().__init__()
        self.states = states
        self.out = nn.Linear(states.hidden_size * (1 + states.bidirectional), 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `[n, 10]` of images `[n, 1, 28, 28]`."""
        return self.out(self.states(x[:, 0])[0].mean(1))


class Transformer(nn.Module):
    """An encoder over the rows of an image, its outputs' mean, a layer."""

    def __init__(self, size: int = 32):
        super().__init__()
        self.into = nn.Linear(28, size)
        self.place = nn.Parameter(0.1 * torch.randn(28, size))
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(size, 4, 2 * size, dropout=0.0, batch_first=True), 2)
        self.out = nn.Linear(size, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `[n, 10]` of images `[n, 1, 28, 28]`."""
        return self.out(self.layers(self.into(x[:, 0]) + self.place).mean(1))


def _convolutions(*, norms: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in ((1, 8), (8, 16), (16, 32)) if norms else ((1, 8), (8, 16)):
        layers += [nn.Conv2d(into, out, 3, padding=1)]
        layers += [nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)] if norms else [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 9 if norms else 16 * 49, 10))


NETWORKS = {
    "layers": ("two layers, 784-32-10", lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))),
    "convolutions": ("two convolutions and a layer", lambda: _convolutions(norms=False)),
    "norms": ("three convolutions with BatchNorms and a layer", lambda: _convolutions(norms=True)),
    "gru": ("GRU of 32 units over the rows", lambda: Recurrent(nn.GRU(28, 32, batch_first=True))),
    "lstm": ("LSTM, two layers of 32 units both ways", lambda: Recurrent(nn.LSTM(28, 32, 2, batch_first=True, bidirectional=True))),
    "transformer": ("Transformer encoder, two layers of 32", Transformer),
}


@torch.no_grad()
def scores(net: nn.Module, images: Tensor) -> Tensor:
    """Class scores `[n, 10]`."""
    return torch.cat([net.eval()(x) for x in images.split(500)])


def percent(found: Tensor, wanted: Tensor) -> float:
    """Share of what is not as wanted, percent."""
    return round(100.0 * float((found != wanted).float().mean()), 2)


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="*", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--level", nargs="*", choices=("weights", "inputs"), default=["weights", "inputs"])
    parser.add_argument("--bits", nargs="*", type=float, default=[1.0, 2.0, 3.0], help="a weight")
    parser.add_argument("--seed", nargs="*", type=int, default=[0, 1, 2], help="of the code")
    parser.add_argument("--data", help="folder that holds mnist/; default $MIRACLE_BAN_DATA, else ./data by download")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of the float networks and the files")
    parser.add_argument("--smoke", action="store_true", help="few images, for the tests; appends no results")
    args = parser.parse_args()
    data = mnist(data_root(args.data))
    count = SMOKE if args.smoke else EXAMPLES
    batches = Batches(*(v[:count] for v in data["train"]), size=BATCH, mean=INPUT_MEAN, std=INPUT_STD)
    held_out, classes = (data["validation"][0] - INPUT_MEAN) / INPUT_STD, data["validation"][1]
    for name in args.network:
        path = args.work / f"small-{name}.pt"
        net = train_float(batches, epochs=EPOCHS, seed=0, path=path, make=lambda _, name=name: NETWORKS[name][1](), rate=RATE).eval()
        weights = sum(p.numel() for p in net.parameters())
        wanted = scores(net, held_out)
        for level, bits, seed in ((level, bits, seed) for level in args.level for bits in args.bits for seed in args.seed):
            started = time.monotonic()
            inputs = batches.images[:INPUTS] if level == "inputs" else None
            options = {"coder": miracle_ban.coders.get("trellis", memory=8)} if args.smoke else {}
            archive = miracle_ban.compress(net, inputs=inputs, budget=round(bits * weights / 8), seed=seed, **options)
            seconds = time.monotonic() - started
            path = args.work / f"small-{name}-{level}-{bits:g}-s{seed}.mban"
            size = miracle_ban.save(archive, path)
            found = scores(miracle_ban.load(path, NETWORKS[name][1]()), held_out)
            line = {
                "network": name, "weights": weights, "level": level, "bits": bits, "seed": seed, "bytes": size,
                "error": percent(found.argmax(1), classes), "float_error": percent(wanted.argmax(1), classes),
                "score_error": score_error(found, wanted), "seconds": round(seconds, 1),
                "command": f"python recipes/small_networks.py --network {name} --level {level} --bits {bits:g} --seed {seed}",
            }  # fmt: skip
            if not args.smoke:
                append_result("small_networks", line)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
