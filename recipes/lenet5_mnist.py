"""LeNet-5 on MNIST: a trained network of 1,724,320 bytes becomes a file of about a kilobyte. LeNet-300-100, too.

    python recipes/lenet5_mnist.py --budget 1140 --seed 0 --data ../data
    python recipes/lenet5_mnist.py --network lenet300 --budget 2500 --float-epochs 30 --epochs 100 --weights-per-bit 3 --distortion 0.7 \
        --refine-distortion 0.35

Trains the float network and the posteriors (16 minutes), both kept in --work, packages them (half an hour with other work beside it),
decodes the file in a fresh process, reports the error on the official test split and appends one line to
`recipes/results/lenet5_mnist.jsonl`. Nothing is chosen on the test split: the settings below were chosen on the last 5,000 training
images, which are only trained on with --whole, when nothing is left to choose.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import miracle_ban
import miracle_ban.coders
from miracle_ban.bits import parse_bytes
from miracle_ban.layers import use_mode

sys.path.insert(0, str(Path(__file__).parent))
from common import Batches, Scored, append_result, data_root, distilled, error_percent, mnist, weights_digest

INPUT_MEAN, INPUT_STD = 0.1307, 0.3081
DISTORTION = 0.7  # of the float network's training images
BATCH = 250


class LeNet5(nn.Module):
    """LeNet-5 "Caffe": conv 20@5x5, conv 50@5x5, fc 800-500, fc 500-10; 431,080 weights."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `[n, 10]` of images `[n, 1, 28, 28]`."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class LeNet300(nn.Module):
    """LeNet-300-100: fc 784-300, fc 300-100, fc 100-10; 266,610 weights."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores `[n, 10]` of images `[n, 1, 28, 28]`."""
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))))


NETWORKS: dict[str, tuple[str, type[nn.Module]]] = {"lenet5": ("LeNet-5", LeNet5), "lenet300": ("LeNet-300-100", LeNet300)}


def train_float(
    batches: Batches,
    *,
    epochs: int,
    seed: int,
    path: Path,
    classes: int = 10,
    make: Callable[[int], nn.Module] = LeNet5,
    rate: float = 2e-3,
) -> nn.Module:
    """The ordinary network to start from, trained once per seed and kept at `path`."""
    torch.manual_seed(seed)
    net = make(classes)
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net


def decoded_error(path: Path, network: str, data: dict[str, tuple[Tensor, Tensor]], part: str) -> tuple[float, str]:
    """Decode a file into a fresh network: error in percent, and the SHA-256 over all weights."""
    net = miracle_ban.load(path, NETWORKS[network][1]())
    digest = weights_digest(net)
    return error_percent(net, *data[part], mean=INPUT_MEAN, std=INPUT_STD), digest


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(NETWORKS), default="lenet5")
    parser.add_argument("--distortion", type=float, default=0.35, help="of the images that posteriors are trained on")
    parser.add_argument("--budget", default="1140", help="bytes of the whole file, or text such as '1.5 kB'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coder", default="trellis")
    parser.add_argument("--memory", type=int, help="bits of the trellis's state; default what suits the budget, 16 at most")
    parser.add_argument("--epochs", type=float, default=40, help="of training the posteriors")
    parser.add_argument("--weights-per-bit", type=float, default=1.5, help="live weights for each bit of the budget")
    parser.add_argument("--float-epochs", type=int, default=12)
    parser.add_argument("--distil", type=float, default=0.0, help="share of the loss that is distillation from the float network")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--refine-steps", type=int, default=240)
    parser.add_argument("--refine-rate", type=float, default=3e-3, help="learning rate of refining")
    parser.add_argument("--refine-distortion", type=float, help="of the images in refining; default that of --distortion")
    parser.add_argument("--data", help="folder that holds mnist/; default $MIRACLE_BAN_DATA, else ./data by download")
    parser.add_argument("--work", type=Path, default=Path("work"), help="float network and checkpoint")
    parser.add_argument("-o", "--output", type=Path, help="default WORK/NETWORK-mnist-BUDGET-sSEED.mban")
    parser.add_argument("--fit-only", action="store_true", help="stop after training the posteriors; run again to package them")
    parser.add_argument("--whole", action="store_true", help="train on the validation images, too")
    parser.add_argument("--check", type=Path, help="only decode this file and print its test error and weights' SHA-256")
    parser.add_argument("--without", help="names what is set otherwise: the line goes to `lenet5_ablation.jsonl`")
    parser.add_argument("--smoke", action="store_true", help="a few steps on 2,000 images, for the tests")
    args = parser.parse_args()
    data = mnist(data_root(args.data))
    if args.check:
        error, digest = decoded_error(args.check, args.network, data, "test")
        print(json.dumps({"error": error, "sha256_weights": digest}))
        return
    if args.whole:
        data["train"] = tuple(torch.cat(v) for v in zip(data["train"], data["validation"], strict=True))
    if args.smoke:
        data = {part: (x[:1000], y[:1000]) for part, (x, y) in data.items()}
        args.epochs, args.float_epochs, args.rounds, args.refine_steps, args.budget = 20, 1, 3, 2, "4 kB"

    def batches(distortion: float) -> Batches:
        return Batches(*data["train"], size=BATCH, mean=INPUT_MEAN, std=INPUT_STD, distortion=distortion)

    args.work.mkdir(parents=True, exist_ok=True)
    run = f"{'whole-' if args.whole else ''}s{args.seed}"
    stem = f"{args.network}-mnist-{parse_bytes(args.budget)}-{run}"
    coded = f"{args.coder}{args.memory or ''}"
    posteriors = args.work / f"{stem}-{args.epochs:g}-{args.weights_per_bit:g}-{args.distil:g}-{args.distortion:g}-{coded}.posteriors"
    output = args.output or args.work / f"{stem}.mban"

    started = time.monotonic()
    title, make = NETWORKS[args.network]
    kept = args.work / f"float-{'' if make is LeNet5 else args.network + '-'}{run}.pt"
    net = train_float(batches(DISTORTION), epochs=args.float_epochs, seed=args.seed, path=kept, make=make)
    seconds = {"float": time.monotonic() - started}
    float_error = error_percent(net, *data["test"], mean=INPUT_MEAN, std=INPUT_STD)

    coder = args.coder if args.memory is None else miracle_ban.coders.get(args.coder, memory=args.memory)
    bnn = miracle_ban.convert(net)
    refine_distortion = args.distortion if args.refine_distortion is None else args.refine_distortion
    fitting, refining = (Scored(own, net) if args.distil else own for own in map(batches, (args.distortion, refine_distortion)))
    loss = distilled(args.distil) if args.distil else F.cross_entropy
    started = time.monotonic()
    report = miracle_ban.fit(
        bnn,
        fitting,
        loss,
        budget=args.budget,
        epochs=args.epochs,
        coder=coder,
        weights_per_bit=args.weights_per_bit,
        seed=args.seed,
        checkpoint=posteriors,
    )
    seconds["fit"] = report.seconds
    report.plot(output.with_suffix(".fit.png"))
    if args.fit_only:
        return
    archive = miracle_ban.encode(
        bnn,
        refining,
        loss,
        coder=coder,
        seed=args.seed,
        rounds=args.rounds,
        refine_steps=args.refine_steps,
        learning_rate=args.refine_rate,
        checkpoint=output.with_suffix(".checkpoint"),
    )
    seconds["encode"] = archive.info["seconds"]
    size = miracle_ban.save(archive, output)

    with use_mode(bnn, "mean"):
        encoder_error = error_percent(bnn, *data["test"], mean=INPUT_MEAN, std=INPUT_STD)
    fresh = [sys.executable, __file__, "--network", args.network, "--check", str(output), *(["--data", args.data] if args.data else [])]
    checked = json.loads(subprocess.run(fresh, check=True, capture_output=True, text=True).stdout)
    validation_error, digest = decoded_error(output, args.network, data, "validation")
    if checked["sha256_weights"] != digest:
        raise SystemExit("a fresh process decoded other weights")
    if not args.smoke and checked["error"] != encoder_error:
        raise SystemExit(f"the decoded network errs {checked['error']} %, the encoder's {encoder_error} %")
    info, other = archive.info, "" if make is LeNet5 else f" --network {args.network}"
    line = {
        "task": f"{title} on MNIST", "bytes": size, "error": checked["error"],
        **({} if args.whole else {"validation_error": round(validation_error, 3)}),
        "float_error": float_error, "budget": report.budget_bytes, "seed": args.seed, "coder": args.coder, "epochs": args.epochs,
        "distil": args.distil, "distortion": args.distortion, "refine_rate": args.refine_rate, "refine_distortion": refine_distortion,
        "seconds": {k: round(v, 1) for k, v in seconds.items()}, "widths": report.widths, "live_weights": report.live_weights,
        "fit_beta": report.beta, "fit_kl_bits": report.kl_bits_by_tensor, "blocks": info["blocks"], "side_bits": info["side_bits"],
        "kl_bits_per_block": info["kl_bits_per_block"], "codeword_bits_per_block": info["codeword_bits_per_block"],
        "log2_ratio_per_block": info["log2_ratio_per_block"], "j_bits_per_block": info["j_bits_per_block"], "encode_beta": info["beta"],
        "sha256": hashlib.sha256(output.read_bytes()).hexdigest(), "sha256_weights": digest, "file": output.name,
        "input_mean": INPUT_MEAN, "input_std": INPUT_STD,
        "command": f"python recipes/lenet5_mnist.py{other} --budget {args.budget} --seed {args.seed} --epochs {args.epochs:g} "
        f"--weights-per-bit {args.weights_per_bit:g} --rounds {args.rounds} --refine-steps {args.refine_steps} "
        f"--refine-rate {args.refine_rate:g} --coder {args.coder} {'' if args.memory is None else f'--memory {args.memory} '}"
        f"--float-epochs {args.float_epochs} --distil {args.distil:g} --distortion {args.distortion:g} "
        f"--refine-distortion {refine_distortion:g}{' --whole' if args.whole else ''}",
    }  # fmt: skip
    if not args.smoke:
        append_result("lenet5_ablation" if args.without else "lenet5_mnist", line | {"without": args.without})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
