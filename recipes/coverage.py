"""Every model of torchvision, and other kinds of network: converted, encoded, saved, loaded into a fresh instance and run.

    python recipes/coverage.py                  all, each in its own process, smallest first; hours
    python recipes/coverage.py resnet50 lstm    only these

Weights are random, at one bit each but at most 250,000 bits in all, so sizes say nothing about accuracy; what is checked is that
every tensor of the fresh instance is what the file says, that raw buffers are restored to the bit, that no class of the plug-in is
left, and that outputs are finite. Appends one line for each to `recipes/results/coverage.jsonl`, which `recipes/tables.py` turns
into the list in `recipes/README.md`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import miracle_ban
from miracle_ban import coders
from miracle_ban.layers import use_mode
from miracle_ban.reconstruct import Reconstruction

sys.path.insert(0, str(Path(__file__).parent))
from common import append_result

BITS_PER_WEIGHT, LARGEST_BITS = 1.0, 2.5e5
SIDE = {"inception_v3": 299}


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 64)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2)
        self.out = nn.Linear(64, 1000, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores `[n, length, 1000]` of tokens `[n, length]`."""
        return self.out(self.layers(self.embedding(tokens)))


def weight_normed() -> nn.Module:
    """Layers under weight normalisation."""
    norm = torch.nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Conv1d(4, 32, 5)), nn.ReLU(), norm(nn.Conv1d(32, 8, 5)))


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "transformer": (lambda: nn.Transformer(64, 4, 2, 2, 128, batch_first=True), (torch.randn(2, 9, 64), torch.randn(2, 7, 64))),
    "lstm": (lambda: nn.LSTM(32, 64, 3, bidirectional=True, batch_first=True), (torch.randn(2, 9, 32),)),
    "gru": (lambda: nn.GRU(32, 64, 2, batch_first=True), (torch.randn(2, 9, 32),)),
    "tied": (Tied, (torch.randint(1000, (2, 9)),)),
    "weight_normed": (weight_normed, (torch.randn(2, 4, 64),)),
}


def build(name: str) -> tuple[nn.Module, tuple]:
    """A model with random weights, and arguments of its forward."""
    torch.manual_seed(0)
    if name in OTHERS:
        make, arguments = OTHERS[name]
        return make().eval(), arguments
    constructor = torchvision.models.get_model_builder(name)
    kind = constructor.__module__.split(".")[2]
    options = {"weights": None}
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    net = constructor(**options).eval()
    side = SIDE.get(name, 224)
    if kind == "video":
        return net, (torch.randn(1, 3, 16, side, side),)
    if kind == "optical_flow":
        return net, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
    if kind == "detection":
        return net, ([torch.rand(3, side, side)],)
    return net, (torch.randn(1, 3, side, side),)


def tensors_of(value: object) -> list[Tensor]:
    """All tensors in a model's output."""
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


def check(name: str) -> dict[str, object]:
    """One model, in this process."""
    net, arguments = build(name)
    weights = sum(p.numel() for p in net.parameters())
    started = time.monotonic()
    bnn = miracle_ban.convert(net, per_unit=True)
    converted = time.monotonic() - started
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.monotonic()
    Reconstruction(bnn, []).allocate(min(BITS_PER_WEIGHT * weights, LARGEST_BITS))
    archive = miracle_ban.encode(bnn, coder=coders.get("trellis", memory=8), progress=False)
    encoded = time.monotonic() - started
    with use_mode(bnn, "mean"), torch.no_grad():
        torch.manual_seed(0)
        wanted = tensors_of(bnn.eval()(*arguments))
    state = {n: t for n, t in net.state_dict().items() if any(e.name == n for e in bnn.conversion.of_kind("raw"))}
    raw_bytes = bnn.conversion.raw_bytes
    del bnn, net  # two of the largest networks would not fit beside each other
    with tempfile.TemporaryDirectory() as folder:
        size = miracle_ban.save(archive, Path(folder) / "net.mban")
        fresh, _ = build(name)
        with torch.no_grad():
            for p in fresh.parameters():
                p.zero_()
        started = time.monotonic()
        miracle_ban.load(Path(folder) / "net.mban", fresh)
        loaded = time.monotonic() - started
    problems = [type(m).__module__ for m in fresh.modules() if type(m).__module__.startswith("miracle_ban")]
    own = fresh.state_dict()
    problems += [n for n, t in state.items() if not torch.equal(own[n], t) and "running_" not in n]
    with torch.no_grad():
        torch.manual_seed(0)
        found = tensors_of(fresh.eval()(*arguments))
    same = len(found) == len(wanted) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(found, wanted)
    )
    finite = all(bool(torch.isfinite(t).all()) for t in found if t.is_floating_point())
    return {
        "model": name, "weights": weights, "float_bytes": 4 * weights, "bytes": size, "raw_bytes": raw_bytes,
        "convert_s": round(converted, 2), "encode_s": round(encoded, 1), "load_s": round(loaded, 2), "convert_mib": round(megabytes),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), "same_outputs": same, "finite": finite,
        "problems": problems[:5],
    }  # fmt: skip


def names() -> list[str]:
    """All models, smallest first."""
    found = [n for n in torchvision.models.list_models() if not n.startswith("quantized_")]
    with torch.device("meta"):
        size = {n: _size(n) for n in found}
    return [*OTHERS, *sorted(found, key=lambda n: size[n])]


def _size(name: str) -> int:
    weights = torchvision.models.get_model_weights(name)
    return max((w.meta["num_params"] for w in weights), default=0)


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="default all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one model")
    parser.add_argument("--smoke", action="store_true", help="append no results")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(check(args.one)))
        return
    for name in args.models or names():
        try:
            done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, timeout=args.limit)
            failed = done.stderr.strip().splitlines()[-1:] if done.returncode else []
            line = (
                {"model": name, "failed": failed[0] if failed else f"exit {done.returncode}"}
                if done.returncode
                else json.loads(done.stdout.splitlines()[-1])
            )
        except subprocess.TimeoutExpired:
            line = {"model": name, "failed": f"not done after {args.limit:.0f} s"}
        print(json.dumps(line), flush=True)
        if not args.smoke:
            append_result("coverage", line)


if __name__ == "__main__":
    main()
