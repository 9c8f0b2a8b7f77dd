"""One training, many specialised packages: LeNet-5 with Bayesian attention.

    python recipes/ban_contexts.py --task digits --data ../data      MNIST; contexts are sets of digits
    python recipes/ban_contexts.py --task domains --data ../data     MNIST and Fashion-MNIST, 20 classes; contexts are the domains

Trains once with attention; packages the network for everything ("general") and, from unlabelled images alone, for each context
("specialised"), at smaller and smaller budgets as long as the error on the context's validation images stays within 0.1 points of
the general package's (or of a file `--plain`, packaged for everything without attention, if that errs less there). The rival is
trained on that context's labelled images alone, budgets chosen by the same rule, from 0.8 times the specialised package's on.
Errors are on the context's part of the official test split, among all classes; nothing is chosen on it. Appends one line for each
package to `recipes/results/ban_contexts.jsonl`, and draws attention, gates and bits in `recipes/results/ban_contexts_TASK.png`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import miracle_ban
from miracle_ban.ban import BayesianAttention, Subsets
from miracle_ban.bits import NATS_PER_BIT
from miracle_ban.layers import posteriors

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, Batches, append_result, command_line, data_root, error_percent, mnist, weights_digest
from lenet5_mnist import BATCH, DISTORTION, INPUT_MEAN, INPUT_STD, LeNet5, train_float

Data = dict[str, tuple[Tensor, Tensor]]
STEP = 0.8  # from one budget to the next
WITHIN = 0.1  # points of error
LEAST = 61  # bytes of the smallest budget

TASKS: dict[str, dict[str, Any]] = {
    "digits": {
        "classes": 10, "budget": 1140, "epochs": 24.0, "thrift": 0.0,
        "contexts": {"0 1": [0, 1], "3 5 8": [3, 5, 8], "4 7 9": [4, 7, 9]},
        "unseen": {"1 2 6 7": [1, 2, 6, 7], "0 2 8": [0, 2, 8]},
    },
    "domains": {
        "classes": 20, "budget": 3000, "epochs": 8.0, "thrift": 1.0,
        "contexts": {"MNIST": list(range(10)), "Fashion-MNIST": list(range(10, 20))}, "unseen": {},
    },
}  # fmt: skip


def load_data(task: str, root: Path) -> Data:
    """Images and labels of each part; Fashion-MNIST's classes are 10 to 19."""
    data = mnist(root)
    if task == "digits":
        return data
    fashion = mnist(root, name="fashion-mnist")
    return {part: (torch.cat([data[part][0], fashion[part][0]]), torch.cat([data[part][1], fashion[part][1] + 10])) for part in data}


def restricted(data: Data, classes: Sequence[int]) -> Data:
    """The images of these classes."""
    return {part: (x[torch.isin(y, torch.tensor(classes))], y[torch.isin(y, torch.tensor(classes))]) for part, (x, y) in data.items()}


def batches_of(data: Data) -> Batches:
    """Shuffled, distorted training images."""
    return Batches(*data["train"], size=min(BATCH, len(data["train"][1])), mean=INPUT_MEAN, std=INPUT_STD, distortion=DISTORTION)


class Experiment:
    """One task with one seed; everything slow is kept in the work folder."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.task = args, TASKS[args.task]
        self.data = load_data(args.task, data_root(args.data))
        if args.smoke:
            self.data = {part: (x[:1200], y[:1200]) for part, (x, y) in self.data.items()}
        self.contexts = {**self.task["contexts"], **self.task["unseen"]}
        args.work.mkdir(parents=True, exist_ok=True)

    def float_network(self, name: str, data: Data) -> nn.Module:
        """The ordinary network to start from."""
        path = self.args.work / f"{self.args.task}-{name.replace(' ', '')}-s{self.args.seed}.pt"
        return train_float(batches_of(data), epochs=self.args.float_epochs, seed=self.args.seed, path=path, classes=self.task["classes"])

    def train(self) -> nn.Module:
        """The one training, with attention."""
        net = self.float_network("all", self.data)
        subsets = Subsets(excluded=self.task["unseen"].values()) if self.args.task == "digits" else Subsets(lambda y: y // 10)
        bnn = miracle_ban.convert(net)
        checkpoint = self.args.work / f"ban-{self.args.task}-s{self.args.seed}.posteriors"
        torch.manual_seed(self.args.seed)
        attention = BayesianAttention(net, contexts=subsets, prototypes=self.args.prototypes, thrift=self.task["thrift"])
        report = miracle_ban.fit(
            bnn, batches_of(self.data), F.cross_entropy, budget=self.budget, epochs=self.epochs, coder="trellis",
            attention=attention, seed=self.args.seed, checkpoint=checkpoint,
        )  # fmt: skip
        self.fit_seconds = report.seconds
        return bnn

    @property
    def budget(self) -> int:
        """Bytes of the general package."""
        return self.args.budget or self.task["budget"]

    @property
    def epochs(self) -> float:
        """Of the one training."""
        return self.args.epochs or self.task["epochs"]

    def measured(self, path: Path, data: Data) -> dict[str, float]:
        """Errors of a file on a context, percent."""
        net = miracle_ban.load(path, LeNet5(self.task["classes"]))
        return {part: error_percent(net, *data[part], mean=INPUT_MEAN, std=INPUT_STD) for part in ("validation", "test")}

    def package(self, kind: str, context: str, budget: int, bnn: nn.Module | None) -> Path:
        """Code one package, unless it is there already."""
        path = self.args.work / f"{self.args.task}-{kind.replace(', ', '-')}-{context.replace(' ', '')}-{budget}-s{self.args.seed}.mban"
        if path.exists():
            return path
        options: dict[str, Any] = {"coder": "trellis", "seed": self.args.seed, "rounds": self.args.rounds}
        options |= {"refine_steps": self.args.refine_steps, "checkpoint": path.with_suffix(".checkpoint")}
        own = self.data if context == "all" else restricted(self.data, self.contexts[context])
        started = time.monotonic()
        if kind == "rival":
            bnn = miracle_ban.convert(self.float_network(context, own))
            epochs = self.epochs * len(batches_of(self.data)) / len(batches_of(own)) * self.args.rival_share
            miracle_ban.fit(
                bnn, batches_of(own), F.cross_entropy, budget=budget, epochs=epochs, coder="trellis", seed=self.args.seed,
                checkpoint=path.with_suffix(".posteriors"),
            )  # fmt: skip
        if kind.startswith("specialised"):
            labelled = (batches_of(own), F.cross_entropy) if kind == "specialised, labels" else (None, None)
            archive = miracle_ban.encode(bnn, *labelled, context=batches_of(own), budget=budget, **options)
        else:
            archive = miracle_ban.encode(bnn, batches_of(own), F.cross_entropy, **options)
        miracle_ban.save(archive, path)
        path.with_suffix(".json").write_text(json.dumps({"seconds": time.monotonic() - started}))
        return path

    def report(
        self, kind: str, context: str, path: Path, errors: dict[str, float], general: dict[str, float], bits: float | None,
        *, reached: bool = True,
    ) -> None:  # fmt: skip
        """Append a result line."""
        size = path.stat().st_size
        net = miracle_ban.load(path, LeNet5(self.task["classes"]))
        digest = weights_digest(net)
        packages = self.args.work.glob(f"{self.args.task}-*-s{self.args.seed}.json")
        spent = {p.name: json.loads(p.read_text())["seconds"] for p in packages}  # on those that were not taken, too
        line = {
            "task": self.args.task, "context": context, "kind": kind, "bytes": size, "error": round(errors["test"], 3),
            "validation_error": round(errors["validation"], 3), "general_error": round(general["test"], 3),
            "general_bytes": self.general_bytes, "share": round(size / self.general_bytes, 3), "unseen": context in self.task["unseen"],
            "kl_bits_at_z": bits, "seed": self.args.seed, "seconds": round(spent[path.with_suffix(".json").name], 1),
            "seconds_so_far": round(self.fit_seconds + sum(spent.values()), 1),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "sha256_weights": digest, "file": path.name, "reached": reached,
            "command": command_line(),
        }  # fmt: skip
        if not self.args.smoke:
            append_result("ban_contexts", line)
        print(json.dumps(line), flush=True)

    def smallest(self, kind: str, context: str, bnn: nn.Module | None, target: float, first: float) -> Path | None:
        """The smallest package on a ladder of budgets from `first` on, down or up, whose validation error is at most `target`."""
        own, best, budget = restricted(self.data, self.contexts[context]), None, first
        while LEAST <= budget <= 1.01 * self.general_bytes:
            path = self.package(kind, context, round(budget), bnn)
            if self.args.smoke:
                return path
            errors = self.measured(path, own)
            print(f"{kind} {context}: {path.stat().st_size} bytes, validation {errors['validation']:.2f} %", file=sys.stderr, flush=True)
            if errors["validation"] <= target:
                best = path
                if budget > first:  # on the way up
                    break
                budget *= STEP
            elif best is not None:
                break
            else:
                budget /= STEP
        return best

    def run(self) -> None:
        """Everything, and the picture."""
        bnn = self.train()
        ban: BayesianAttention = bnn.bayesian_attention  # type: ignore[assignment]
        general_path = self.package("general", "all", self.budget, bnn)
        self.general_bytes = general_path.stat().st_size
        self.report("general", "all", general_path, (e := self.measured(general_path, self.data)), e, kl_bits(ban, bnn, None))
        names = self.args.only or list(self.contexts)
        for context in names:
            own = restricted(self.data, self.contexts[context])
            references = [self.measured(p, own) for p in (general_path, self.args.plain) if p is not None]
            general = min(references, key=lambda e: e["validation"])
            target = general["validation"] + WITHIN
            first = self.general_bytes * self.args.first_share
            kinds = ["specialised, labels" if self.args.labels else "specialised", *([] if self.args.no_rivals else ["rival"])]
            for kind in kinds:
                bits = kl_bits(ban, bnn, batches_of(own)) if kind != "rival" else None
                path = self.smallest(kind, context, bnn, target, first)
                if path is None:
                    print(f"{kind} {context}: no budget reaches a validation error of {target:.2f} %", file=sys.stderr)
                    if kind != "rival":  # the general package is what one would ship
                        self.report(kind, context, general_path, self.measured(general_path, own), general, bits, reached=False)
                else:
                    self.report(kind, context, path, self.measured(path, own), general, bits)
                    first = max(LEAST, path.stat().st_size / 1.25)
        if not self.args.smoke:
            contexts = {name: batches_of(restricted(self.data, self.contexts[name])) for name in self.contexts}
            contexts = {"all": batches_of(self.data), **contexts}
            plot(ban, bnn, contexts, self.task["classes"], self.data, RESULTS / f"ban_contexts_{self.args.task}.png")


def kl_bits(ban: BayesianAttention, bnn: nn.Module, context: Any) -> float:
    """KL of the posteriors in a context, bits, before anything is refined."""
    with torch.no_grad():
        return round(float(miracle_ban.kl(ban.specialise(bnn, context))) / NATS_PER_BIT, 1)


@torch.no_grad()
def plot(ban: BayesianAttention, bnn: nn.Module, contexts: dict[str, Any], classes: int, data: Data, path: Path) -> None:
    """Importance of each class, gates of the hidden units, attention over prototypes, and KL of each layer, for each context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    images, labels = data["validation"]
    rho, gates, alpha, bits = [], [], [], []
    for context in contexts.values():
        z = ban.latent_of(context)
        own = ban.importance((images - INPUT_MEAN) / INPUT_STD, z)
        rho.append([float(own[labels == c].mean()) for c in range(classes)])
        found = ban.gates(z)
        gates.append(torch.cat([found[k] for k in found]).tolist())
        alpha.append(ban.attention(z).tolist())
        special = ban.specialise(bnn, context)
        bits.append({n: float(p.kl()) / NATS_PER_BIT for n, p in posteriors(special).items() if p.mean.dim() > 1})
    figure, axes = plt.subplots(2, 2, figsize=(12, 7))
    for axis, values, title in (
        (axes[0, 0], rho, "importance rho(z), mean of each class"), (axes[0, 1], gates, "gates of all units"),
        (axes[1, 0], alpha, "attention alpha(z) over prototypes"),
    ):  # fmt: skip
        picture = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0)
        axis.set(title=title, yticks=range(len(contexts)), yticklabels=list(contexts))
        figure.colorbar(picture, ax=axis)
    bottom = [0.0] * len(contexts)
    for layer in bits[0]:
        heights = [b[layer] for b in bits]
        axes[1, 1].bar(list(contexts), heights, bottom=bottom, label=layer)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes[1, 1].set(title="KL of each layer given z, before refinement", ylabel="bits")
    axes[1, 1].tick_params(axis="x", rotation=30)
    axes[1, 1].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, help="bytes of the general package; default 1,140 and 3,000")
    parser.add_argument("--epochs", type=float, help="of the one training; default 24 and 8")
    parser.add_argument("--float-epochs", type=int, default=4)
    parser.add_argument("--prototypes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--refine-steps", type=int, default=120)
    parser.add_argument("--first-share", type=float, default=0.6, help="of the general package's bytes: the first budget that is tried")
    parser.add_argument("--rival-share", type=float, default=0.5, help="training steps of a rival over those of the one training")
    parser.add_argument("--plain", type=Path, help="a file packaged for everything without attention, to compare with, too")
    parser.add_argument("--only", nargs="+", help="contexts, default all")
    parser.add_argument("--labels", action="store_true", help="package for contexts with the labels of their images, too")
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--data", help="folder that holds mnist/ and fashion-mnist/; default $MIRACLE_BAN_DATA, else ./data by download")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--smoke", action="store_true", help="a few steps, for the tests")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.float_epochs, args.rounds, args.refine_steps, args.budget = 25, 1, 2, 30, 4000
    Experiment(args).run()


if __name__ == "__main__":
    main()
