"""What the tests share: a tiny task, plain reference code, comparisons."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miracle_ban.container import Archive, prior_std, resolve_kept
from miracle_ban.randomness import quantiles
from miracle_ban.tree import quantile

BUDGET = 200  # bytes that the fitted fixture is trained for
FALSE_ALARM = 1e-6  # probability with which a right sampler fails a statistical test, were its seed not fixed

_MASK = 0xFFFFFFFF


class TinyNet(nn.Module):
    """8x8 images, 3 classes: conv, ReLU, max-pool, two linear layers; 1,299 weights."""

    def __init__(self, units: int = 16):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.fc1 = nn.Linear(72, units)
        self.fc2 = nn.Linear(units, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x)


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of a blob at one of three places: `[count, 1, 8, 8]`, and the places."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (count,), generator=generator)
    centre = torch.tensor([[2.0, 2.0], [5.0, 2.0], [3.5, 5.5]])[label] + 0.5 * torch.randn(count, 2, generator=generator)
    axis = torch.arange(8.0)
    across, down = (torch.exp(-((axis[None, :] - centre[:, i : i + 1]) ** 2) / 2) for i in (0, 1))
    image = (down[:, :, None] * across[:, None, :])[:, None]
    return image + 0.3 * torch.randn(count, 1, 8, 8, generator=generator), label


def error_rate(net: nn.Module) -> float:
    """Share of 1,000 other blobs that the network gets wrong."""
    images, labels = blobs(1000, seed=1)
    net.eval()
    with torch.no_grad():
        return float((net(images).argmax(1) != labels).float().mean())


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of all tensors: names, dtypes, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(state):
        t = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        sha.update(tensor_bytes(t))
    return sha.hexdigest()


def same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Same names in the same order, same dtypes, shapes and bits."""
    return list(a) == list(b) and digest(a) == digest(b)


def weight_state(net: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict that later training cannot change."""
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def outputs_of(result: object) -> Tensor:
    """All floating-point tensors of a module's result as one flat float64 vector."""
    leaves = torch.utils._pytree.tree_leaves(result)
    return torch.cat([t.detach().double().flatten() for t in leaves if isinstance(t, Tensor)])


def philox_by_hand(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python's own integers, straight from the paper's definition."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k0, q & _MASK, (p >> 32) ^ d ^ k1, p & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return a, b, c, d


def words_by_hand(seed: int, candidate: int, block: int, stream: int, count: int) -> list[int]:
    """The first `count` words of one (candidate, block, stream)."""
    key = (seed & _MASK, seed >> 32)
    drawn: list[int] = []
    for lane in range(-(-count // 4)):
        drawn.extend(philox_by_hand((candidate, block, lane, stream), key))
    return drawn[:count]


def normals_by_hand(table: np.ndarray, seed: int, candidate: int, block: int, stream: int, count: int) -> list[int]:
    """Normals in units of 2^-20: each word's low half, then its high half, looked up in `table`."""
    halves = [h for w in words_by_hand(seed, candidate, block, stream, -(-count // 2)) for h in (w & 0xFFFF, w >> 16)]
    return [int(table[h]) for h in halves[:count]]


def order_by_hand(seed: int, number: int, count: int) -> list[int]:
    """The weights of a tensor in their random order."""
    drawn = list(itertools.chain.from_iterable(words_by_hand(seed, 0, b, 16 * number + 3, 4) for b in range(-(-count // 4))))
    return sorted(range(count), key=lambda i: (drawn[i], i))


def blocks_by_hand(archive: Archive, number: int, count: int) -> list[np.float32]:
    """The weights of a tensor that was coded by blocks, in units of the prior."""
    record = archive.records[number]
    blocks = len(record.index)
    d = -(-count // blocks)
    order = order_by_hand(archive.seed, number, count)
    coded = [np.float32(0)] * count
    for b, k in enumerate(record.index.tolist()):
        own = d <= 8
        z = normals_by_hand(quantiles(), archive.seed, k - 1, (b + 1) * own, 16 * number * own, d)
        turn = words_by_hand(archive.seed, 0, b, 16 * number + 2, 1)[0] % d
        signs = words_by_hand(archive.seed, 0, b, 16 * number + 1, -(-d // 32))
        for j in range(d):
            if j * blocks + b < count:
                sign = -1 if signs[j // 32] >> j % 32 & 1 else 1
                coded[order[j * blocks + b]] = np.float32(sign * z[(j - turn) % d] / 2**20)
    return coded


def node_by_hand(seed: int, number: int, block: int, node: int) -> np.float32:
    """The value of a node of the search tree: a walk down by the bits of its number."""
    words = words_by_hand(seed, 0, block, 16 * number + 5, 32)
    low, high = 0, 1 << 32
    for depth, turn in enumerate(bin(node)[3:]):
        u = low + (words[depth] * (high - low) >> 32)
        low, high = (min(u + 1, high), high) if turn == "1" else (low, u)
    u = min(low + (words[node.bit_length() - 1] * (high - low) >> 32), (1 << 32) - 1)
    return np.float32(quantile(np.array([u]))[0])


def steps_by_hand(archive: Archive, number: int, count: int) -> list[np.float32]:
    """The weights of a tensor that was coded by the trellis, in units of the prior, from the whole stream step by step."""
    frames = 1 << archive.path.log2_frames
    rates = {i: r.rate for i, r in enumerate(archive.records) if r.rate is not None}
    coded = [np.float32(0)] * count
    state = at = 0
    for frame in range(frames):
        for i, rate in rates.items():
            total = -(-rate.count // rate.width)
            for t in range(-(-frame * total // frames), -(-(frame + 1) * total // frames)):
                new = (t + 1) * rate.rate // 64 - t * rate.rate // 64
                for bit in archive.path.bits[at : at + new].tolist():
                    state = (state << 1 | bit) % (1 << archive.path.memory)
                at += new
                if i != number:
                    continue
                sign = words_by_hand(archive.seed, 0, t // 128, 16 * i + 1, 4)[t // 32 % 4] >> t % 32 & 1
                z = normals_by_hand(quantiles(), archive.seed, state, 0, 0, rate.width)
                a = max(total * 2654435769 >> 32, 1)
                while math.gcd(a, total) > 1:
                    a += 1
                for j in range(rate.width):
                    shift = words_by_hand(archive.seed, 0, j, 16 * i + 3, 1)[0] % total
                    place = j * total + (a * t + shift) % total
                    if place < count:
                        coded[place] = np.float32((-z[j] if sign else z[j]) / 2**20)
    return coded


def decode_by_hand(archive: Archive, number: int) -> np.ndarray:
    """One coded tensor in Python's integers and one rounded product a weight, from the description of the format."""
    record = archive.records[number]
    live = resolve_kept(archive.records)[number]
    std = [np.float32(s) for s in prior_std(record.prior_codes)]
    row = int(np.prod(live[1:])) if len(live) > 1 else 1
    units = (live[0] if live else 1) if len(std) > 1 else 1
    row = row if len(std) > 1 else int(np.prod(live))
    alive = [u for u in range(units) if std[u] > 0]
    count = len(alive) * row
    if not count:
        return np.zeros(record.shape or (), np.float32)
    if archive.path is not None:
        coded = steps_by_hand(archive, number, count)
    elif archive.coder.startswith("branch-and-bound"):
        coded = [node_by_hand(archive.seed, number, b, k) for b, k in enumerate(record.index.tolist())]
        coded = [c for _, c in sorted(zip(order_by_hand(archive.seed, number, count), coded, strict=True))]
    else:
        coded = blocks_by_hand(archive, number, count)
    full = np.zeros(record.shape or (), np.float32)
    flat = np.zeros((units, row), np.float32)
    for i, u in enumerate(alive):
        for j in range(row):
            flat[u, j] = coded[i * row + j] * std[u]
    full[tuple(slice(k) for k in live)] = flat.reshape(live)
    return full


def tensor_bytes(t: Tensor) -> bytes:
    """The tensor's values as little-endian bytes."""
    flat = t.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if t.numel() else b""


class Holder(nn.Module):
    """A network with the given state-dict entries (name, shape, dtype) as buffers and nothing else."""

    def __init__(self, entries: list[tuple[str, tuple[int, ...], str]]):
        super().__init__()
        for name, shape, dtype in entries:
            *path, own = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.register_buffer(own, torch.zeros(shape, dtype=getattr(torch, dtype)))
