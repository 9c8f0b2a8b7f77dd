"""Private federated learning: a client sends its locally private update as an index of 12 bits instead of 46,080 bits of floats.

    python recipes/federated.py --data ../data

13,750 simulated clients, each with four MNIST images of two classes, learn a linear classifier on fixed random features together.
Server and hosts of clients are separate processes that talk by torch.distributed (gloo); what is counted are the bytes received.
Each client takes part in one round (or `--messages` of them) and sends its normalised gradient u through a mechanism that is
epsilon-locally private: whatever its data, the probability of what it sends changes by at most exp(epsilon). It sends nothing else.

"float32" and "8 bits" send PrivUnitG (Asi, Feldman and Talwar 2022, after Bhowmick et al. 2018, arXiv 1812.00984): a draw of N(0, I),
tilted so that with probability p it lies in the half-space {z . u >= g}. "index" sends the number of one of 2^b shared candidates by
minimal random coding, as Shah et al. 2022 (arXiv 2111.00092), under a target of two levels that goes by rank: the `near` candidates
furthest along u weigh exp(epsilon) times as much as any other (as in Isik et al. 2023). As 2^b grows this is PrivUnitG.

Why the index is private. The candidates come from the public seed. Given them, every index has probability exp(epsilon) / c or 1 / c,
where c = near exp(epsilon) + 2^b - near is the same for every u: so the ratio under two updates is at most exp(epsilon), for each
value of the shared randomness; seed, index and all that a server makes of them are epsilon-private together. This is not so of every code:
with PrivUnitG's own half-space, c depends on how many candidates lie in it, and minimal random coding only keeps 2 epsilon; and the index
of an exact sampler together with the shared randomness may tell all, although its draw alone is epsilon-private: rejection sampling
always accepts a candidate in the half-space, so an index after such a candidate rules out u. `audit` computes all three.
Composition: messages of different clients concern different data; k messages of one client are k epsilon-private, or (epsilon', 1e-5) by
the optimal composition of Kairouz, Oh and Viswanath 2015. Real clients must take their own randomness from the system, not from a seed.

Finished runs are kept in WORK, so that an interrupted sweep goes on where it was. Fifteen minutes on two cores; `recipes/tables.py`
draws the picture.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy import integrate, optimize, stats
from torch import Tensor
from tqdm import tqdm

from miracle_ban import coders
from miracle_ban.bits import BitReader, BitWriter
from miracle_ban.coders.base import Codebook

sys.path.insert(0, str(Path(__file__).parent))
from common import append_result, data_root, mnist

FILTERS, SIDE, CLASSES = 16, 3, 10
FEATURES = FILTERS * SIDE * SIDE
LENGTH = FEATURES * CLASSES  # of an update
CLIENT_IMAGES, DELTA = 4, 1e-5  # the images of a client were once picked on test images
MOMENTUM, RATE = 0.9, 2.0  # RATE, MOMENTUM, FILTERS, SIDE: by float32 on validation images
PUBLIC_SEED = 2022  # of the candidates, known to everybody


def features(images: Tensor) -> Tensor:
    """Random filters, pooled, of length one for each image: `[n, 144]`. Nothing in them was learned from data."""
    w = torch.randn(FILTERS, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    w = F.normalize((w - w.mean((2, 3), keepdim=True)).flatten(1)).view_as(w)
    parts = [F.adaptive_avg_pool2d(F.relu(F.conv2d(x, w, padding=2)), SIDE).flatten(1) for x in images.split(1000)]
    return F.normalize(torch.cat([x - x.mean(1, keepdim=True) for x in parts]))


def deal(labels: Tensor, seed: int) -> np.ndarray:
    """The images of each client, `[clients, 4]`: two of one class and two of another (now and then the same)."""
    rng = np.random.default_rng(seed)
    order = np.argsort(labels.numpy() + rng.uniform(0, 0.5, len(labels)))
    halves = order[: len(order) // CLIENT_IMAGES * CLIENT_IMAGES].reshape(-1, CLIENT_IMAGES // 2)
    return rng.permutation(halves).reshape(-1, CLIENT_IMAGES)


def likely(epsilon: float, share: float) -> float:
    """Probability of a set of prior probability `share` whose every element is exp(epsilon) times as likely as others."""
    return math.exp(epsilon) * share / (math.exp(epsilon) * share + 1.0 - share)


def half_space(epsilon: float) -> tuple[float, float]:
    """PrivUnitG at its best: the prior probability of its half-space, and E[z . u], by which draws are divided to be unbiased."""

    def pull(log_share: float) -> float:
        share = math.exp(log_share)
        return (likely(epsilon, share) - share) * stats.norm.pdf(stats.norm.isf(share)) / (share * (1.0 - share))

    best = optimize.minimize_scalar(lambda v: -pull(v), bounds=(-15.0, math.log(0.5)), method="bounded").x
    return math.exp(best), pull(best)


def nearest(epsilon: float, bits: int) -> tuple[int, float]:
    """The same for ranks among 2^bits candidates: how many are near, and E[z . u] from the law of order statistics."""
    n, z = 1 << bits, np.linspace(-9.0, 9.0, 6001)

    def pull(near: int) -> float:
        inside = stats.binom.cdf(near - 1, n - 1, stats.norm.sf(z))  # at most near - 1 others are further along u
        mean = n / near * integrate.trapezoid(z * stats.norm.pdf(z) * inside, z)
        return (likely(epsilon, near / n) - near / n) / (1.0 - near / n) * mean

    best = max(np.unique(np.geomspace(1, n // 2, 60).astype(int)), key=pull)
    return int(best), pull(best)


def by_rank(along: Tensor, near: int, epsilon: float) -> Tensor:
    """Log density ratios (up to a constant) of candidates by their projections, `[candidates, clients]`: epsilon for the nearest."""
    return torch.zeros_like(along).scatter_(0, along.topk(near, 0).indices, epsilon)


def composed(epsilon: float, times: int, delta: float) -> float:
    """Smallest epsilon' so that `times` messages are (epsilon', delta)-private together (Kairouz, Oh and Viswanath 2015, theorem 3.3)."""
    best = times * epsilon
    for i in range(times // 2 + 1):
        terms = (math.comb(times, j) * (math.exp((times - j) * epsilon) - math.exp((times - 2 * i + j) * epsilon)) for j in range(i))
        if sum(terms) / (1.0 + math.exp(epsilon)) ** times <= delta:
            best = min(best, (times - 2 * i) * epsilon)
    return best


def audit(epsilon: float, bits: int, dimension: int = 16, updates: int = 400) -> dict[str, float | None]:
    """Largest |ln ratio| of the law of the index, given the shared candidates, between any two of many updates, for three codes.

    None: unbounded.
    """
    n = 1 << bits
    coder = coders.get("minimal-random", bits=bits)
    every = coders.Codewords(np.arange(1, n + 1), np.zeros(n), np.zeros(n), np.zeros(n, bool), dimension)
    shared = torch.from_numpy(coder.decode(every, 1.0, seed=PUBLIC_SEED, blocks=np.zeros(n, np.int64))).double()
    along = shared @ F.normalize(torch.randn(updates, dimension, generator=torch.Generator().manual_seed(0)).double()).T
    ratio = torch.where(along >= stats.norm.isf(half_space(epsilon)[0]), 0.0, -epsilon)  # of PrivUnitG, against its largest
    refused = torch.log1p(-ratio.exp()).cumsum(0)
    laws = {
        "index": by_rank(along, nearest(epsilon, bits)[0], epsilon).log_softmax(0),
        "minimal random coding": ratio.log_softmax(0),
        "rejection sampling": ratio + torch.cat([torch.zeros(1, updates), refused[:-1]]),
    }
    largest = {name: float((law.amax(1) - law.amin(1)).nan_to_num(0.0, torch.inf).max()) for name, law in laws.items()}
    return {name: v if math.isfinite(v) else None for name, v in largest.items()}


class Channel:
    """One way to send updates: `pack` at the host, `unpack` at the server; updates `[n, 1440]` of length one."""

    def __init__(self, how: str, epsilon: float, bits: int, secret: int, public: int = PUBLIC_SEED):
        self.how, self.epsilon, self.bits = how, epsilon, bits
        self.rng = np.random.default_rng(secret)
        self.coder = coders.get("minimal-random", bits=bits, choice_seed=secret)
        self.codebook = Codebook(public)
        self.share, self.pull = half_space(epsilon)
        if how == "index":
            self.near, self.pull = nearest(epsilon, bits)

    def pack(self, updates: Tensor, numbers: np.ndarray) -> bytes:
        """The messages of these clients; `numbers` name their shared randomness."""
        if self.how == "index":
            words = self.coder.encode_along(
                updates,
                lambda along: by_rank(along, self.near, self.epsilon),
                seed=self.codebook.seed,
                blocks=numbers,
                codebook=self.codebook,
            )
            out = BitWriter()
            out.write_many(words.index - 1, np.full(len(numbers), self.bits))
            return out.to_bytes()
        u = updates.numpy()
        z = u if self.how == "no privacy" else self._private(u)
        if self.how != "8 bits":
            return z.astype("<f4").tobytes()
        scale = (np.abs(z).max(1, keepdims=True) / 127.0).astype("<f4")
        steps = np.floor(z / scale + self.rng.random(z.shape)).clip(-127, 127).astype(np.int8)
        return scale.tobytes() + steps.tobytes()

    def _private(self, u: np.ndarray) -> np.ndarray:
        """Draws of PrivUnitG."""
        z, level = self.rng.standard_normal(u.shape), self.rng.random(len(u))
        inside = self.rng.random(len(u)) < likely(self.epsilon, self.share)
        along = np.where(inside, stats.norm.isf(level * self.share), stats.norm.ppf(level * (1.0 - self.share)))
        return z + (along - (z * u).sum(1))[:, None] * u

    def unpack(self, data: bytes, numbers: np.ndarray) -> np.ndarray:
        """Unbiased estimates of the updates."""
        n = len(numbers)
        if self.how == "index":
            index = BitReader(data).read_many(np.full(n, self.bits), "the indices") + 1
            z = self.coder.decode(coders.Codewords(index, index, index, index > 0, LENGTH), 1.0, seed=self.codebook.seed, blocks=numbers)
        elif self.how == "8 bits":
            z = np.frombuffer(data, "<f4", n)[:, None] * np.frombuffer(data, np.int8, offset=4 * n).reshape(n, LENGTH)
        else:
            z = np.frombuffer(data, "<f4").reshape(n, LENGTH)
        return z if self.how == "no privacy" else z / self.pull


def taking_part(run: dict[str, Any], total: int, turn: int, host: int, hosts: int) -> tuple[np.ndarray, np.ndarray]:
    """A host's clients of a round, and the numbers of their messages: all clients in a public random order, `messages` times over."""
    order = np.concatenate([np.random.default_rng([run["seed"], k]).permutation(total) for k in range(run["messages"])])
    places = np.arange(turn * run["clients"] + host, (turn + 1) * run["clients"], hosts)
    return order[places], places


def together(todo: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The runs that differ in their seed only are made side by side."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in todo:
        groups.setdefault((run["epsilon"], run["messages"], run["how"]), []).append(run)
    return list(groups.values())


def rounds_of(run: dict[str, Any], total: int) -> int:
    """All clients take part, but for those left over."""
    return total * run["messages"] // run["clients"]


def host(rank: int, args: argparse.Namespace, todo: list[dict[str, Any]]) -> None:
    """A process that stands for some of the clients: takes the weights, sends their messages."""
    images, labels = mnist(data_root(args.data))["train"]
    inputs, targets = features(images), F.one_hot(labels, CLASSES).float()
    for runs in together(todo):
        owned = [deal(labels, run["seed"]) for run in runs]
        channels = [Channel(run["how"], run["epsilon"], args.bits, 1000 * run["seed"] + rank, PUBLIC_SEED + run["seed"]) for run in runs]
        for turn in range(rounds_of(runs[0], len(owned[0]))):
            weights = torch.zeros(len(runs), LENGTH)
            dist.broadcast(weights, 0)
            messages = []
            for run, mine, channel, w in zip(runs, owned, channels, weights):
                who, numbers = taking_part(run, len(mine), turn, rank - 1, args.hosts)
                x, y = inputs[mine[who]], targets[mine[who]]
                error = torch.softmax(x @ w.view(CLASSES, FEATURES).T, 2) - y
                messages.append(channel.pack(F.normalize(-torch.einsum("nik,nif->nkf", error, x).flatten(1)), numbers))
            dist.send(torch.tensor([len(m) for m in messages]), 0)
            dist.send(torch.frombuffer(bytearray(b"".join(messages)), dtype=torch.uint8), 0)


def serve(args: argparse.Namespace, todo: list[dict[str, Any]]) -> None:
    """The server: momentum on the mean of the estimates; the answer is the average of its weights, late ones counting more."""
    data = mnist(data_root(args.data))
    total = len(deal(data["train"][1], 0))
    held_out = {part: (features(data[part][0]), data[part][1]) for part in ("validation", "test")}
    for runs in together(todo):
        channels = [Channel(run["how"], run["epsilon"], args.bits, secret=0, public=PUBLIC_SEED + run["seed"]) for run in runs]
        weights, speed, mean = (torch.zeros(len(runs), LENGTH) for _ in range(3))
        started, rounds = time.monotonic(), rounds_of(runs[0], total)
        for run in runs:
            run |= {"history": [], "received_bytes": 0, "updates": rounds * run["clients"], "rounds": rounds}
        for turn in tqdm(range(rounds), desc=f"epsilon {runs[0]['epsilon']:g}, {runs[0]['how']}, {len(runs)} seeds"):
            dist.broadcast(weights, 0)
            found = torch.zeros(len(runs), LENGTH)
            for h in range(args.hosts):
                lengths = torch.zeros(len(runs), dtype=torch.int64)
                dist.recv(lengths, h + 1)
                buffer = torch.zeros(int(lengths.sum()), dtype=torch.uint8)
                dist.recv(buffer, h + 1)
                for i, (run, message) in enumerate(zip(runs, buffer.split(lengths.tolist()))):
                    run["received_bytes"] += len(message)
                    estimates = channels[i].unpack(message.numpy().tobytes(), taking_part(run, total, turn, h, args.hosts)[1])
                    found[i] += torch.from_numpy(estimates.sum(0)).float() / run["clients"]
            speed = MOMENTUM * speed + found
            weights = weights + RATE * speed
            mean = mean + 2.0 / (turn + 2.0) * (weights - mean)
            if (turn + 1) % max(rounds // 10, 1) == 0 or turn + 1 == rounds:
                for run, w in zip(runs, mean):
                    right = [(x @ w.view(CLASSES, FEATURES).T).argmax(1) == y for x, y in held_out.values()]
                    run["history"].append([turn + 1, *(100.0 * float(r.float().mean()) for r in right)])
        with args.log.open("a") as f:
            for run in runs:
                run |= {"validation": run["history"][-1][1], "accuracy": run["history"][-1][2]}
                run["seconds"] = round((time.monotonic() - started) / len(runs), 1)
                f.write(json.dumps(run) + "\n")


def process(rank: int, args: argparse.Namespace, todo: list[dict[str, Any]], meeting: str) -> None:
    """One process of the federation."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.hosts + 1)
    serve(args, todo) if rank == 0 else host(rank, args, todo)
    dist.barrier()
    dist.destroy_process_group()


def summary(runs: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One result line for each way, epsilon and number of messages: means over the seeds, and the difference to float32 seed by seed."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for v in runs:
        groups.setdefault((v["epsilon"], v["messages"], v["how"]), []).append(v)
    lines = []
    for (epsilon, messages, how), own in groups.items():
        count = len(own)
        accuracy = np.array([v["accuracy"] for v in own])
        plain = {v["seed"]: v["accuracy"] for v in groups[epsilon, messages, "float32"]}
        gap = np.array([v["accuracy"] - plain[v["seed"]] for v in own])
        lines.append({
            "how": how, "epsilon": epsilon, "messages": messages, "epsilon_of_client": epsilon * messages,
            "epsilon_composed": composed(epsilon, messages, DELTA), "delta": DELTA, "bits": args.bits if how == "index" else None,
            "bits_per_update": 8 * sum(v["received_bytes"] for v in own) / sum(v["updates"] for v in own), "rounds": own[0]["rounds"],
            "clients": args.clients, "seeds": [v["seed"] for v in own], "accuracies": accuracy.tolist(), "accuracy": accuracy.mean(),
            "accuracy_error": accuracy.std() / np.sqrt(max(count - 1, 1)), "gap": gap.mean(),
            "gap_error": gap.std() / np.sqrt(max(count - 1, 1)), "audit": audit(epsilon, args.bits) if how == "index" else None,
            "command": f"python recipes/federated.py --seeds {count} --bits {args.bits} --clients {args.clients}",
            "seconds": sum(v["seconds"] for v in own), "history": np.mean([v["history"] for v in own], 0).round(2).tolist(),
        })  # fmt: skip
    return lines


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 4.0], help="of one message")
    parser.add_argument("--messages", type=int, nargs="+", default=[1], help="of one client over all rounds")
    parser.add_argument("--bits", type=int, default=12, help="of an index")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--clients", type=int, default=137, help="in a round")
    parser.add_argument("--hosts", type=int, default=2, help="processes that stand for the clients")
    parser.add_argument("--data", help="folder that holds mnist/; default $MIRACLE_BAN_DATA, else ./data by download")
    parser.add_argument("--work", type=Path, default=Path("work"), help="finished runs")
    parser.add_argument("--smoke", action="store_true", help="two seeds on the images there are, and append no results")
    args = parser.parse_args()
    if args.smoke:
        args.epsilon, args.seeds, args.clients, args.bits = [8.0], 1, 30, 8
    args.work.mkdir(parents=True, exist_ok=True)
    args.log = args.work / f"federated-b{args.bits}-c{args.clients}.jsonl"
    every = [
        {"epsilon": e, "messages": m, "how": how, "seed": seed, "clients": args.clients}
        for e in args.epsilon for m in args.messages for how in ("float32", "index", "8 bits", "no privacy") for seed in range(args.seeds)
    ]  # fmt: skip
    done = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log.exists() else []
    todo = [r for r in every if not any(r.items() <= d.items() for d in done)]
    if todo:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(process, (args, todo, f"{folder}/meeting"), args.hosts + 1)
    done = [json.loads(line) for line in args.log.read_text().splitlines()]
    lines = summary([next(d for d in done if r.items() <= d.items()) for r in every], args)
    for line in lines:
        if not args.smoke:
            append_result("federated", line)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
