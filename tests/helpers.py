"""What the tests share: a tiny task, comparisons."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUDGET = 200  # bytes that the fitted fixture is trained for
PACKAGED = 90  # bytes of the packaged fixture
FALSE_ALARM = 1e-6  # probability with which a right sampler fails a statistical test, were its seed not fixed


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


class NormedAndActive(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own, which goes on with an activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return F.relu(x)


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
