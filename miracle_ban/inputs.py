"""Inputs for a network that comes without data: random ones, shaped so that its BatchNorms see what they saw in training.

Images have the spectrum of natural ones, whose power falls with the square of the frequency (Field 1987). A BatchNorm keeps the mean
and variance that its inputs had over the training set. Random inputs are changed by gradient descent until a batch of them has these
moments in every BatchNorm (Yin et al. 2020, DeepInversion, arXiv 1912.08795, equation 4; Cai et al. 2020, ZeroQ, arXiv 2001.00281).
Leans on `network` and torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from .errors import MiracleError
from .network import copied, evaluating, examples_in, split

_SIDES = (32, 28, 64, 224, 96, 128, 299, 48, 16, 8)  # of images, pixels, that are tried in turn
_CHANNELS, _SMALLEST_SIDE = (1, 3), 8  # of images whose pixels a linear layer takes
_BATCH, _MOST, _MOST_UNMATCHED = 64, 128, 1024  # examples: at once, and altogether where there are BatchNorms and where there are none
_SMALLEST_BATCH = 4
_STEPS, _RATE = 120, 0.1  # of matching, by Adam with a falling learning rate
_WORK = 1.5e13  # floating-point operations that matching may take: two minutes on two cores
_BatchNorm = nn.modules.batchnorm._BatchNorm


def batches_of(inputs: Any, examples: int = 1024) -> list[Any]:
    """The user's inputs as batches, about `examples` of them in all; of pairs (inputs, targets) the first.

    Args:
        inputs: a tensor of examples, an iterable of batches, or all of them as a mapping.
        examples: where to stop.

    Raises:
        MiracleError: there are none.
    """
    if isinstance(inputs, Tensor):
        if not inputs.dim() or not len(inputs):
            raise MiracleError(f"inputs holds no example: it is a tensor of shape {tuple(inputs.shape)}")
        return list(inputs[:examples].split(_BATCH))
    if isinstance(inputs, Mapping):
        return split(inputs, _BATCH)[: -(-examples // _BATCH)]
    if not isinstance(inputs, Iterable) or isinstance(inputs, (str, bytes)):
        raise MiracleError(f"inputs must be a tensor of examples or an iterable of batches, not {type(inputs).__name__}")
    found: list[Any] = []
    taken = 0
    for batch in inputs:
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        found.append(first)
        taken += examples_in(first)
        if taken >= examples:
            break
    if not found:
        raise MiracleError("inputs holds no batch")
    return found


def made_for(net: nn.Module, *, seed: int = 0, progress: bool = True) -> list[Any]:
    """Batches that `net` takes, matched to its BatchNorms if it has any; empty if none of the shapes tried fits.

    Args:
        net: the trained network, its BatchNorms not folded.
        seed: of the random numbers.
        progress: show a progress bar on stderr.
    """
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in net.parameters()):
        net = copied(net).float()  # 16 bits are too few to match moments in
    generator = torch.Generator().manual_seed(seed)
    make = _maker(net, generator)
    if make is None:
        return []
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    first = make()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _evaluated(net, first)
    each = counter.get_total_flops() / len(first)
    if not norms or not first.is_floating_point():
        layers = sum(p.dim() > 1 for p in net.parameters())  # through as many of which each of them is measured
        number = int(min(max(_WORK / max(each * layers, 1.0), _MOST), _MOST_UNMATCHED))
        return [first, *(make() for _ in range(number // len(first) - 1))]
    each *= 3.0 * _STEPS  # forward, and backward to the inputs
    number = int(min(max(_WORK / max(each, 1.0), _SMALLEST_BATCH), _MOST))
    x = torch.cat([first, *(make() for _ in range(math.ceil(number / len(first)) - 1))])[:number]
    return list(_matched(net, norms, x, progress).split(_BATCH))


def _matched(net: nn.Module, norms: Sequence[nn.Module], x: Tensor, progress: bool) -> Tensor:
    """Change `x`, all in one batch, until its moments at the inputs of `norms` are those of training."""
    seen: dict[nn.Module, Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0])) for m in norms]
    wanted = {p: p.requires_grad for p in net.parameters()}
    for p in wanted:
        p.requires_grad_(False)
    x = x.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], _RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    try:
        with evaluating(net):
            for _ in tqdm(range(_STEPS), disable=not progress, file=sys.stderr, desc="inputs", unit="step"):
                seen.clear()
                net(x)
                loss = torch.stack([_mismatch(m, seen[m]) for m in norms if m in seen]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    finally:
        for hook in hooks:
            hook.remove()
        for p, wants in wanted.items():
            p.requires_grad_(wants)
    return x.detach()


def _mismatch(norm: Any, x: Tensor) -> Tensor:
    """Squared distance of the moments of `x` from those that `norm` keeps, relative to its variance; mean over channels."""
    rows = x.float().transpose(0, 1).flatten(1)
    mean, var = rows.mean(1), rows.var(1, unbiased=False)
    kept = norm.running_var + norm.eps
    return ((mean - norm.running_mean).square() / kept).mean() + (0.5 * ((var + norm.eps) / kept).log()).square().mean()


def _evaluated(net: nn.Module, x: Tensor) -> None:
    with evaluating(net):
        net(x)


def _maker(net: nn.Module, generator: torch.Generator) -> Callable[[], Tensor] | None:
    """Makes random inputs of a shape that the network takes; None if none of the shapes tried fits."""
    first = next(net.parameters(), None)
    if first is None:
        return None
    device = first.device

    def normals(*shape: int) -> Callable[[], Tensor]:
        return lambda: torch.randn(shape, generator=generator, device="cpu").to(first)

    def images(n: int, channels: int, side: int) -> Callable[[], Tensor]:
        return lambda: _natural(torch.randn((n, channels, side, side), generator=generator, device="cpu")).to(first)

    for layer in net.modules():
        makers: list[Callable[[], Tensor]] = []
        if isinstance(layer, nn.Conv2d):
            makers = [images(_BATCH if side < 128 else 8, layer.in_channels, side) for side in _SIDES]
        elif isinstance(layer, nn.Conv1d):
            makers = [normals(_BATCH, layer.in_channels, length) for length in (128, 1024)]
        elif isinstance(layer, nn.Conv3d):
            makers = [normals(4, layer.in_channels, 16, side, side) for side in (32, 112)]
        elif isinstance(layer, nn.Linear):
            sides = [(n, math.isqrt(layer.in_features // n)) for n in _CHANNELS]
            flattened = [images(_BATCH, n, side) for n, side in sides if n * side**2 == layer.in_features and side >= _SMALLEST_SIDE]
            makers = [*flattened, normals(_BATCH, layer.in_features), normals(16, 16, layer.in_features)]
        elif isinstance(layer, nn.RNNBase):
            makers = [normals(16, 16, layer.input_size)]
        elif isinstance(layer, nn.Embedding):
            number = layer.num_embeddings
            makers = [lambda number=number: torch.randint(number, (16, 16), generator=generator, device="cpu").to(device)]  # type: ignore[misc]
        for make in makers:
            if _takes(net, make()):
                return make
        if makers:
            return None
    return None


def _natural(noise: Tensor) -> Tensor:
    """White noise `[n, channels, h, w]` with the amplitudes of natural images, one over the frequency; variance one."""
    h, w = noise.shape[-2:]
    frequency = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)[None])
    x = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency.clamp_min(1.0 / max(h, w)), s=(h, w))
    return x / x.square().mean().sqrt()


def _takes(net: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            _evaluated(net, x)
    except Exception:  # whatever a network raises on a shape that it does not take
        return False
    return True
