"""Training under the noise that coding is going to bring, before a network is packaged.

Each step draws every weight from N(w, noise * mean square of its unit's weights): a posterior of fixed relative width, which is what
a code of R bits a weight leaves, 2^-2R of the variance (the distortion-rate function of a Gaussian). Networks so trained lie
where noise does less harm (Baskin et al. 2018, NICE, arXiv 1810.00162; Fan et al. 2020, arXiv 2004.07320). BatchNorms stay what
they are and see the noise. Leans on `course`, `feed`, `train` and torch.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

from . import checkpoint as checkpoints
from . import distributed
from .course import Row, check_loss, run, warm_cosine
from .errors import MiracleError
from .feed import Feed
from .train import LOG_EVERY, Loss, seeded

Optimizing = Callable[[nn.Module], torch.optim.Optimizer]
_RATE, _MOMENTUM, _DECAY = 0.1, 0.9, 5e-4  # of SGD, where there are BatchNorms
_RATE_ELSEWHERE = 3e-4  # of AdamW
_STATISTICS = 64  # batches that the statistics of norms are measured on at the end


@torch.enable_grad()
def harden(
    net: nn.Module,
    batches: Iterable,
    loss: Loss,
    *,
    noise: Mapping[str, float] | float,
    epochs: float = 30.0,
    optimizer: Optimizing | None = None,
    seed: int = 0,
    sharded: bool | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a network under noise on its weights, so that coding does less harm to it.

    Args:
        net: a trained network; left alone. Units of which all weights are zero stay so.
        batches, loss: as in `fit`.
        noise: variance of the noise over the mean square of the weights of the same unit (row of the first dimension; a vector is one),
            for each parameter that gets any; one number for all parameters of two or more dimensions.
        epochs: passes over `batches`.
        optimizer: makes the optimizer of the network that it is given; default SGD with momentum where there are BatchNorms, AdamW
            elsewhere. Its learning rates are the largest: they rise at first and fall to zero as a cosine.
        seed: of the noise and of what the loader draws.
        sharded: as in `fit`.
        checkpoint: file that keeps the state after every pass; if it exists, training resumes from it, or is over.
        progress: show a progress bar on stderr.

    Returns:
        A trained copy, in the mode of `net`, and what happened: steps, seconds and `history`, rows of step and loss.

    Raises:
        MiracleError: `noise` names what is no parameter or is negative, nothing is to be trained, or the loss is NaN or infinite.

    Example:
        >>> hardened, course = harden(net, loader, F.cross_entropy, noise=0.2, epochs=60)  # doctest: +SKIP
    """
    started = time.monotonic()
    if not (math.isfinite(epochs) and epochs > 0):
        raise MiracleError(f"epochs must be positive, not {epochs}")
    model = copy.deepcopy(net).float().train()
    stds = _stds(model, noise)
    if not any(p.requires_grad for p in model.parameters()):
        raise MiracleError(f"no parameter of {type(net).__name__} wants a gradient: net.requires_grad_() before hardening")
    device = next(model.parameters()).device
    with seeded(seed, device):
        feed = Feed(batches, device, sharded=sharded, seed=seed)
    steps = max(1, round(epochs * feed.batches_per_pass))
    settings = {"steps": steps, "seed": seed, "noise": {name: round(std, 3) for name, std in stds.items()}}
    saved = checkpoints.read(Path(checkpoint), stage="harden", expected=settings) if checkpoint is not None else None
    course = _Hardening(model, feed, loss, (optimizer or _descent)(model), stds, steps)
    distributed.synchronise([*model.parameters(), *model.buffers()])
    with seeded(distributed.own_seed(seed), device):
        history, started = run(
            course, steps, stage="harden", settings=settings, saved=saved, checkpoint=checkpoint, device=device, started=started,
            progress=progress,
        )  # fmt: skip
    distributed.synchronise(model.buffers())
    distributed.check_equal(model.parameters(), "parameters")
    return model.train(net.training), {"steps": steps, "seconds": time.monotonic() - started, "history": history}


class _Hardening:
    """The course of `harden`."""

    def __init__(self, model: nn.Module, feed: Feed, loss: Loss, optimizer: torch.optim.Optimizer, stds: Mapping[str, float], steps: int):
        self.model, self.feed, self.loss, self.optimizer, self.stds, self.steps = model, feed, loss, optimizer, stds, steps
        self.largest = [group["lr"] for group in optimizer.param_groups]
        self.alive = {p: alive for p in model.parameters() if p.dim() > 1 and not (alive := p.detach().flatten(1).any(1)).all()}
        self.step = 0
        self.losses: list[float] = []  # since the last row

    def advance(self) -> Row | None:
        for group, rate in zip(self.optimizer.param_groups, self.largest, strict=True):
            group["lr"] = rate * warm_cosine(self.step / self.steps)
        inputs, targets = self.feed.next()
        value = self.loss(functional_call(self.model, _noisy(self.model, self.stds), (inputs,)), targets)
        check_loss(value)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        for p, alive in self.alive.items():
            if p.grad is not None:
                p.grad[~alive] = 0.0
        (measured,) = distributed.mean_gradients(self.optimizer, [float(value.detach())])
        if not math.isfinite(measured):
            raise MiracleError(f"the loss became {measured} in hardening, step {self.step}: check the data, or lower the learning rate")
        self.optimizer.step()
        torch.clear_autocast_cache()  # else a caller's autocast would go on with the weights as they were
        self.step += 1
        self.losses.append(measured)
        if self.step == self.steps:
            _measure_norms(self.model, self.feed)
        elif self.step % LOG_EVERY:
            return None
        row = {"step": self.step, "loss": statistics.fmean(self.losses)}
        self.losses.clear()
        return row

    def words(self, row: Row) -> str:
        return f"loss {row['loss']:.4f}"

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def has_norms(net: nn.Module) -> bool:
    """Whether there are BatchNorms, which leave the weights before them without a scale of their own."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


def _stds(model: nn.Module, noise: Mapping[str, float] | float) -> dict[str, float]:
    """Std of the noise of each parameter, relative to its units' root mean square."""
    own = dict(model.named_parameters())
    if not isinstance(noise, Mapping):
        noise = {name: noise for name, p in own.items() if p.dim() > 1}
    unknown = [name for name in noise if name not in own]
    if unknown:
        raise MiracleError(f"noise is given for {unknown[0]!r}, which is no parameter of {type(model).__name__}")
    for name, variance in noise.items():
        if not (math.isfinite(variance) and variance >= 0):
            raise MiracleError(f"noise of {name} must be zero or positive, not {variance}")
    return {name: math.sqrt(variance) for name, variance in noise.items() if variance > 0}


def _noisy(model: nn.Module, stds: Mapping[str, float]) -> dict[str, Tensor]:
    drawn = {}
    for name, std in stds.items():
        weight = model.get_parameter(name)
        size = weight.detach().square().mean(tuple(range(1, weight.dim())) or (0,), keepdim=True).sqrt()
        drawn[name] = weight + std * size * _normals_like(weight)
    return drawn


def _normals_like(weight: Tensor) -> Tensor:
    """`randn_like`; that is six times slower where channels come last."""
    axes = sorted(range(weight.dim()), key=lambda axis: weight.stride(axis), reverse=True)
    drawn = torch.randn([weight.shape[axis] for axis in axes], dtype=weight.dtype, device=weight.device)
    return drawn.permute([axes.index(axis) for axis in range(weight.dim())])


def _descent(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if has_norms(model):
        return torch.optim.SGD(groups, _RATE, momentum=_MOMENTUM, nesterov=True, weight_decay=_DECAY)
    return torch.optim.AdamW(groups, _RATE_ELSEWHERE)


def _measure_norms(model: nn.Module, feed: Feed) -> None:
    """Statistics of norms without the noise."""
    feed.restart()
    count = min(_STATISTICS, feed.batches_per_pass)
    update_bn(itertools.islice(iter(feed.next, None), count), model)
