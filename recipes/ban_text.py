"""A lossless compressor of files: the system of the paper that Bayesian attention comes from (Tetelman 2021).

    python recipes/ban_text.py train --data ../data --attention on          the model: work/ban-text-on.mban
    python recipes/ban_text.py compress FILE OUT --model work/ban-text-on.mban
    python recipes/ban_text.py decompress OUT FILE --model work/ban-text-on.mban
    python recipes/ban_text.py table --data ../data                         all files, round trips in fresh processes, result lines

A byte is predicted from those before it. The context is the preceding window; its latent z, the mean of q(z|s), opens and shuts
the units of the network and moves its last biases. In training z is drawn, and some windows are predicted in the context of another
one of the batch that they are important in (equation 12). The weights are trained with beta 1, so that the objective is the length
of the model's file plus that of the coded data. The prediction is made with integers alone, so that every machine computes the
same, and coded by a range coder (constriction). `--attention off` is the same network without z.
"""

from __future__ import annotations

import argparse
import bz2
import decimal
import hashlib
import json
import lzma
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import miracle_ban
from miracle_ban.ban import importance

sys.path.insert(0, str(Path(__file__).parent))
from common import append_result, data_root, weights_digest

NEAR = 12  # bytes that the network sees
SCALES, PAIRS = (16, 64, 256), 512  # bytes whose frequencies the encoder of z sees; of pairs in the longest, hashed to so many
PAIR = 16  # occurrences of a pair that count as one: most occur once
FAR = max(SCALES)
WIDTH, FAR_WIDTH, LATENT, HIDDEN = 16, 64, 24, (256, 128)
BATCH = 1024
FINE, COARSE = 12, 10  # binary digits after the point: of weights, and of everything else
SEGMENT = 1 << 15  # bytes; the decoder works on all segments of a file side by side
MAGIC = b"MBT1"


def counted(windows: Any) -> list[tuple[Any, int, int]]:
    """What the encoder of z counts in windows `[n, FAR]`, tensor or array: numbers `[n, m]`, how many of them weigh one, their bound."""
    pairs = (windows[:, :-1] * 197 + windows[:, 1:]) % PAIRS
    return [*((windows[:, -k:], k, 256) for k in SCALES), (pairs, PAIR, PAIRS)]


class Predictor(nn.Module):
    """Scores of the next byte `[n, 256]` from windows `[n, FAR]` of bytes, the last one last, zeros before the beginning."""

    def __init__(self, attention: bool):
        super().__init__()
        self.near = nn.Embedding(256, WIDTH)
        self.first = nn.Linear(NEAR * WIDTH, HIDDEN[0])
        self.second = nn.Linear(HIDDEN[0], HIDDEN[1])
        self.out = nn.Linear(HIDDEN[1], 256)
        self.attention = attention
        if attention:
            self.far = nn.Linear(len(SCALES) * 256 + PAIRS, FAR_WIDTH)
            self.latent = nn.Linear(FAR_WIDTH, LATENT)
            self.gate = nn.Linear(LATENT, sum(HIDDEN))
            self.tilt = nn.Linear(LATENT, 256)

    def seen(self, windows: Tensor) -> Tensor:
        """Features of the windows that z is made of, `[n, FAR_WIDTH]`: from how often bytes occur at several scales, and pairs of them."""
        often = [torch.zeros(len(w), n).scatter_add_(1, w, torch.full(w.shape, 1.0 / k)) for w, k, n in counted(windows)]
        return F.relu(self.far(torch.cat(often, 1)))

    def forward(self, windows: Tensor, z: Tensor | None = None) -> Tensor:
        """See the class; `z` default is the mean of q(z|s)."""
        h = self.near(windows[:, -NEAR:]).flatten(1)
        if not self.attention:
            return self.out(F.relu(self.second(F.relu(self.first(h)))))
        z = self.latent(self.seen(windows)) if z is None else z
        gates = (self.gate(z) / 4 + 0.75).clamp(0, 1).split(HIDDEN, 1)
        return self.out(F.relu(self.second(F.relu(self.first(h)) * gates[0])) * gates[1]) + self.tilt(z)


class TextAttention(nn.Module):
    """What training adds (`fit(attention=...)`): the spread of q(z|s), the decoder rho(s|z), importance of the batch's windows.

    Args:
        weight: of the terms of z beside the prediction's loss.
        swapped: share of windows that are predicted in the context of another one that they are important in.
    """

    is_general, kl_weight = True, 1.0

    def __init__(self, weight: float = 0.02, swapped: float = 0.05):
        super().__init__()
        self.weight, self.swapped = weight, swapped
        self.log_std = nn.Linear(FAR_WIDTH, LATENT)
        self.decoder = nn.Sequential(nn.Linear(LATENT, 64), nn.ReLU(), nn.Linear(64, LATENT))
        nn.init.constant_(self.log_std.bias, -2.0)

    def attach(self, model: nn.Module, inputs: Tensor) -> None:
        """Nothing depends on the model."""

    def settle(self, model: nn.Module, batches: Any) -> None:
        """Nothing to settle: each window is its own context."""

    def kl_nats(self, model: Any) -> float:
        """The posteriors do not depend on z here."""
        return float(miracle_ban.kl(model).detach())

    def losses(self, model: Any, batch: tuple[Tensor, Tensor], loss: Any, num_examples: int) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and the bound on its windows' likelihood (equation 15)."""
        windows, targets = batch
        seen = model.seen(windows)
        mean, log_std = model.latent(seen), self.log_std(seen).clamp(-6, 1)
        z = mean + log_std.exp() * torch.randn_like(mean)
        log_density = mean[: BATCH // 4] @ (z[: BATCH // 4] + self.decoder(z[: BATCH // 4])).T  # [window i, context j]
        bound = 0.5 * (mean.square() + (2 * log_std).exp() - 1).sum(1).mean() - log_std.sum(1).mean()
        bound = bound - log_density.log_softmax(0).diagonal().mean()
        with torch.no_grad():
            swap = torch.nonzero(torch.rand(log_density.shape[1]) < self.swapped).squeeze(1)
            rho = torch.stack([importance(log_density[:, j]) for j in swap]) if len(swap) else None
        if rho is not None:
            rows = torch.arange(len(windows))
            important = torch.multinomial(rho, 1).squeeze(1)
            rows[swap] = important
            windows, targets = windows[rows], targets[rows]
        return loss(model(windows, z), targets), self.weight * bound


class Windows:
    """Batches of (windows, next bytes) at random places of all files."""

    def __init__(self, texts: list[bytes]):
        padded = b"".join(bytes(FAR) + t for t in texts)
        self.bytes = torch.frombuffer(bytearray(padded), dtype=torch.uint8)
        starts = np.cumsum([0, *(len(t) + FAR for t in texts)])[:-1]
        self.places = torch.from_numpy(np.concatenate([np.arange(len(t)) + s + FAR for t, s in zip(texts, starts, strict=True)]))
        self.num_examples = len(self.places)

    def __len__(self) -> int:
        return max(1, self.num_examples // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        before = torch.arange(-FAR, 0)
        for rows in torch.randperm(self.num_examples)[: len(self) * BATCH].split(BATCH):
            at = self.places[rows]
            yield self.bytes[at[:, None] + before].long(), self.bytes[at].long()


# --- prediction with integers ------------------------------------------------------------------------------------------


def _exponentials() -> np.ndarray:
    """round(2^20 exp(-d / 2^COARSE)) for d = 0, 1, ..., the same on every machine."""
    with decimal.localcontext(prec=40):
        ratio = (-decimal.Decimal(1) / 2**COARSE).exp()
        value, table = decimal.Decimal(2**20), []
        for _ in range(15 << COARSE):
            table.append(int(value.to_integral_value()))
            value *= ratio
    return np.array(table, np.float64)


def _halve(x: np.ndarray, digits: int) -> np.ndarray:
    """Round x / 2^digits to integers (halves up)."""
    return np.floor(x / (1 << digits) + 0.5)


class IntegerPredictor:
    """A `Predictor` with fixed-point weights. All numbers are whole float64s below 2^53, so no sum depends on its order."""

    def __init__(self, weights: dict[str, Tensor]):
        coarse = {k: k.endswith("bias") or k.startswith("near") for k in weights}
        self.w = {k: np.floor(v.double().numpy() * (1 << (COARSE if coarse[k] else FINE)) + 0.5) for k, v in weights.items()}
        self.attention = "gate.weight" in self.w
        self.table = _exponentials()

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return _halve(x @ self.w[f"{name}.weight"].T, FINE) + self.w[f"{name}.bias"]

    def counts(self, windows: np.ndarray) -> np.ndarray:
        """Whole numbers in proportion to the probabilities of the next byte, each at least 1, `[n, 256]`, of windows `[n, FAR]`."""
        h = self._linear("first", self.w["near.weight"][windows[:, -NEAR:]].reshape(len(windows), -1)).clip(0)
        if not self.attention:
            scores = self._linear("out", self._linear("second", h).clip(0))
        else:
            often = []
            for w, k, n in counted(windows):
                found = np.bincount((w + n * np.arange(len(w))[:, None]).ravel(), minlength=n * len(w))
                often.append(found.reshape(len(w), n) * float((1 << COARSE) // k))
            z = self._linear("latent", self._linear("far", np.concatenate(often, 1)).clip(0))
            gates = (_halve(self._linear("gate", z), 2) + 3 * (1 << (COARSE - 2))).clip(0, 1 << COARSE)
            h = self._linear("second", _halve(h * gates[:, : HIDDEN[0]], COARSE)).clip(0)
            scores = self._linear("out", _halve(h * gates[:, HIDDEN[0] :], COARSE)) + self._linear("tilt", z)
        fall = (scores.max(1, keepdims=True) - scores).clip(0, len(self.table) - 1).astype(np.int64)
        return self.table[fall] + 16.0


# --- the coded file ------------------------------------------------------------------------------------------------------


def _segments(length: int) -> tuple[int, int]:
    """Number of segments and their length."""
    count = max(1, -(-length // SEGMENT))
    return count, -(-length // count) if length else 0


def _model():
    import constriction

    return constriction.stream.model.Categorical(perfect=False)


def compress_bytes(text: bytes, model: IntegerPredictor) -> bytes:
    """Magic, CRC-32 and length of the text, range-coded bytes: of all segments the first, then of all the second..."""
    import constriction

    count, size = _segments(len(text))
    own = np.zeros((count, FAR + size), np.int64)
    for s in range(count):
        part = np.frombuffer(text[s * size : (s + 1) * size], np.uint8)
        own[s, FAR : FAR + len(part)] = part
    lengths = np.array([min(size, max(0, len(text) - s * size)) for s in range(count)])
    coder = constriction.stream.queue.RangeEncoder()
    at_once = max(1, 4096 // count)
    for t in range(0, size, at_once):
        steps = np.arange(t, min(size, t + at_once))
        live = steps[:, None] < lengths[None, :]  # [step, segment]: the order of coding
        step, segment = np.nonzero(live)
        places = steps[step]
        windows = own[segment[:, None], places[:, None] + np.arange(FAR)]
        counts = model.counts(windows)
        coder.encode(own[segment, places + FAR].astype(np.int32), _model(), counts / counts.sum(1, keepdims=True))
    return MAGIC + struct.pack("<II", zlib.crc32(text), len(text)) + coder.get_compressed().astype("<u4").tobytes()


def decompress_bytes(coded: bytes, model: IntegerPredictor) -> bytes:
    """What `compress_bytes` was given.

    Raises:
        ValueError: the bytes are damaged, or another model was used.
    """
    import constriction

    if coded[:4] != MAGIC or len(coded) < 12 or len(coded) % 4:
        raise ValueError("this is not a file of ban_text")
    crc, length = struct.unpack("<II", coded[4:12])
    count, size = _segments(length)
    own = np.zeros((count, FAR + size), np.int64)
    lengths = np.array([min(size, max(0, length - s * size)) for s in range(count)])
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(coded[12:], "<u4").astype(np.uint32))
    for t in range(size):
        live = int((lengths > t).sum())  # the last segment alone may be shorter
        counts = model.counts(own[:live, t : t + FAR])
        own[:live, FAR + t] = decoder.decode(_model(), counts / counts.sum(1, keepdims=True))
    text = b"".join(own[s, FAR : FAR + lengths[s]].astype(np.uint8).tobytes() for s in range(count))
    if zlib.crc32(text) != crc:
        raise ValueError("the checksum is wrong: the file is damaged, or was made with another model")
    return text


def load_model(path: Path) -> IntegerPredictor:
    """The integer predictor of a .mban file."""
    return IntegerPredictor(dict(miracle_ban.decode(miracle_ban.open(path))))


# --- commands --------------------------------------------------------------------------------------------------------------


def texts(root: Path) -> dict[str, bytes]:
    """All files of the data folder's `text`."""
    files = sorted(p for p in (root / "text").glob("*/*") if p.name not in ("README.md", "LICENSE"))
    if not files:
        raise SystemExit(f"there are no files in {root / 'text'}/*/: put the Canterbury corpus, or any files, there")
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for p in files}


def train(args: argparse.Namespace) -> None:
    """Train a predictor on all files and package it."""
    torch.manual_seed(args.seed)
    on = args.attention == "on"
    batches = Windows(list(texts(data_root(args.data)).values()))
    args.work.mkdir(parents=True, exist_ok=True)
    stem = args.work / f"ban-text-{args.attention}"
    bnn = miracle_ban.convert(Predictor(on), local=False)
    report = miracle_ban.fit(
        bnn, batches, F.cross_entropy, beta=1.0, epochs=args.epochs, learning_rate=args.learning_rate, coder="trellis",
        attention=TextAttention() if on else None, checkpoint=stem.with_suffix(".posteriors"), seed=args.seed, names=True,
    )  # fmt: skip
    archive = miracle_ban.encode(
        bnn, batches, F.cross_entropy, coder=miracle_ban.coders.get("trellis", memory=args.memory), rounds=args.rounds,
        refine_steps=args.refine_steps, learning_rate=5e-4, names=True, seed=args.seed, checkpoint=stem.with_suffix(".checkpoint"),
    )  # fmt: skip
    size = miracle_ban.save(archive, stem.with_suffix(".mban"))
    cost = {"model_bytes": size, "fit_seconds": report.seconds, "encode_seconds": archive.info["seconds"]}
    stem.with_suffix(".json").write_text(json.dumps(cost))
    print(json.dumps(cost))


def table(args: argparse.Namespace) -> None:
    """Code every file with and without attention, decode it in a fresh process, append result lines."""
    import zstandard

    for attention in ("off", "on"):
        model_path = args.work / f"ban-text-{attention}.mban"
        model = load_model(model_path)
        net = miracle_ban.load(model_path, Predictor(attention == "on"))
        digest = weights_digest(net)
        cost = json.loads(model_path.with_suffix(".json").read_text())
        card = {
            "train_seconds": round(cost["fit_seconds"] + cost["encode_seconds"], 1),
            "file": model_path.name,
            "sha256": hashlib.sha256(model_path.read_bytes()).hexdigest(),
            "sha256_weights": digest,
        }
        for name, text in texts(data_root(args.data)).items():
            started = time.monotonic()
            coded = compress_bytes(text, model)
            seconds = time.monotonic() - started
            with tempfile.TemporaryDirectory() as folder:
                packed, back = Path(folder) / "packed", Path(folder) / "back"
                packed.write_bytes(coded)
                command = [sys.executable, __file__, "decompress", str(packed), str(back), "--model", str(model_path)]
                started = time.monotonic()
                subprocess.run(command, check=True)
                exact = back.read_bytes() == text
            line = {
                "task": f"lossless compression, attention {attention}", "coded": name, "attention": attention, "bytes": len(text),
                "coded_bytes": len(coded),
                "bits_per_byte": round(8 * len(coded) / len(text), 4), "model_bytes": model_path.stat().st_size, "exact": exact,
                "xz_bytes": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
                "zstd_bytes": len(zstandard.compress(text, 19)), "bzip2_bytes": len(bz2.compress(text, 9)),
                "seconds": round(seconds, 1), "decode_seconds": round(time.monotonic() - started, 1), **card,
                "seed": 0, "command": f"python recipes/ban_text.py train --attention {attention}",
            }  # fmt: skip
            if not exact:
                raise SystemExit(f"{name} did not come back as it was")
            append_result("ban_text", line)
            print(json.dumps(line), flush=True)


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "table", "compress", "decompress"):
        command = commands.add_parser(name)
        if name in ("train", "table"):
            command.add_argument("--data", help="folder that holds text/*/*; default $MIRACLE_BAN_DATA, else ./data")
            command.add_argument("--work", type=Path, default=Path("work"))
        else:
            command.add_argument("source", type=Path)
            command.add_argument("target", type=Path)
            command.add_argument("--model", type=Path, required=True)
        if name == "train":
            command.add_argument("--attention", choices=("on", "off"), default="on")
            command.add_argument("--epochs", type=float, default=8)
            command.add_argument("--learning-rate", type=float, default=3e-3)
            command.add_argument("--rounds", type=int, default=32)
            command.add_argument("--refine-steps", type=int, default=50)
            command.add_argument("--memory", type=int, default=14, help="of the trellis")
            command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "train":
        train(args)
    elif args.command == "table":
        table(args)
    else:
        work = compress_bytes if args.command == "compress" else decompress_bytes
        try:
            result = work(args.source.read_bytes(), load_model(args.model))
        except ValueError as error:
            raise SystemExit(f"{args.source}: {error}") from None
        args.target.write_bytes(result)
        print(f"{args.source.stat().st_size:,} bytes -> {len(result):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
