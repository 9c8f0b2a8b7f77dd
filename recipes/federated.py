"""Private federated learning: a client sends its locally private update as an index of 12 bits instead of 46,080 bits of floats.

    python recipes/federated.py --data ../data

13,750 simulated clients, each with four MNIST images of two classes, learn a linear classifier on fixed random features together.
Server and hosts of clients are separate processes that talk by torch.distributed (gloo); what is counted are the bytes received.
Each client takes part in one round (or `--messages` of them) and sends its normalised gradient u through a mechanism that is
epsilon-locally private: whatever its data, the probability of what it sends changes by at most exp(epsilon). It sends nothing else.

What is sent, and why the index of a shared candidate is as private as the draw that it stands for (given the candidates, every index has
probability exp(epsilon) / c or 1 / c, with c the same for every update), is in `private_messages.py`.

Finished runs are kept in WORK, so that an interrupted sweep goes on where it was. Fifteen minutes on two cores; `recipes/tables.py`
draws the picture.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from common import append_result, data_root, mnist
from private_messages import PUBLIC_SEED, Channel, audit, composed

FILTERS, SIDE, CLASSES = 16, 3, 10
FEATURES = FILTERS * SIDE * SIDE
LENGTH = FEATURES * CLASSES  # of an update
CLIENT_IMAGES, DELTA = 4, 1e-5  # the images of a client were once picked on test images
MOMENTUM, RATE = 0.9, 2.0  # RATE, MOMENTUM, FILTERS, SIDE: by float32 on validation images


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
        channels = [
            Channel(run["how"], run["epsilon"], args.bits, LENGTH, 1000 * run["seed"] + rank, PUBLIC_SEED + run["seed"]) for run in runs
        ]
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
        channels = [Channel(run["how"], run["epsilon"], args.bits, LENGTH, secret=0, public=PUBLIC_SEED + run["seed"]) for run in runs]
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
