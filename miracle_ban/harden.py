"""Training under the noise that coding is going to bring, before a network is packaged.

Each step draws every weight from N(w, noise * mean square of its unit's weights): a posterior of fixed relative width, which is what
a code of R bits a weight leaves, 2^-2R of the variance (the distortion-rate function of a Gaussian). Networks so trained lie
where noise does less harm (Baskin et al. 2018, NICE, arXiv 1810.00162; Fan et al. 2020, arXiv 2004.07320). BatchNorms stay what
they are and see the noise. Leans on `feed`, `train` and torch.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from . import checkpoint as checkpoints
from . import distributed
from .errors import MiracleError
from .feed import Feed
from .train import LOG_EVERY, Loss, seeded

Optimizing = Callable[[nn.Module], torch.optim.Optimizer]
_RATE, _MOMENTUM, _DECAY = 0.1, 0.9, 5e-4  # of SGD, where there are BatchNorms
_RATE_ELSEWHERE = 3e-4  # of AdamW
_WARM_UP = 0.02  # share of the steps
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
        net: a trained network; left alone.
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
    descent = (optimizer or _descent)(model)
    largest = [group["lr"] for group in descent.param_groups]
    done, history = 0, []
    distributed.synchronise([*model.parameters(), *model.buffers()])
    with seeded(distributed.own_seed(seed), device):
        if saved is not None:
            model.load_state_dict(saved["model"])
            descent.load_state_dict(saved["optimizer"])
            feed.restore(saved["feed"])
            checkpoints.restore_generators(saved["generators"][distributed.rank()], device)
            done, history, started = saved["step"], saved["history"], started - saved["seconds"]
        total, counted = 0.0, 0
        with tqdm(
            total=steps, initial=done, disable=not progress or distributed.rank() > 0, file=sys.stderr, desc="harden", unit="step"
        ) as bar:
            while done < steps:
                for group, rate in zip(descent.param_groups, largest, strict=True):
                    group["lr"] = rate * warm_cosine(done / steps)
                inputs, targets = feed.next()
                value = loss(functional_call(model, _noisy(model, stds), (inputs,)), targets)
                descent.zero_grad(set_to_none=True)
                value.backward()
                (measured,) = distributed.mean_gradients(descent, [float(value.detach())])
                if not math.isfinite(measured):
                    raise MiracleError(f"the loss became {measured} in hardening, step {done}: check the data, or lower the learning rate")
                descent.step()
                torch.clear_autocast_cache()  # else a caller's autocast would go on with the weights as they were
                done, total, counted = done + 1, total + measured, counted + 1
                bar.update()
                if done % LOG_EVERY == 0 or done == steps:
                    history.append({"step": done, "loss": total / counted})
                    bar.set_postfix_str(f"loss {total / counted:.4f}", refresh=False)
                    total, counted = 0.0, 0
                if done == steps:
                    _measure_norms(model, feed)
                if checkpoint is not None and (feed.position == feed.batches_per_pass or done == steps):
                    feed.end_pass()
                    content = {
                        "stage": "harden", "settings": settings, "step": done, "history": history, "model": model.state_dict(),
                        "optimizer": descent.state_dict(), "feed": feed.state(), "seconds": time.monotonic() - started,
                        "generators": distributed.gather(checkpoints.generator_state(device)),
                    }  # fmt: skip
                    checkpoints.write(Path(checkpoint), content)
    distributed.synchronise(model.buffers())
    distributed.check_equal(model.parameters(), "parameters")
    return model.train(net.training), {"steps": steps, "seconds": time.monotonic() - started, "history": history}


def has_norms(net: nn.Module) -> bool:
    """Whether there are BatchNorms, which leave the weights before them without a scale of their own."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


def warm_cosine(part: float) -> float:
    """Learning rate over the largest when `part` of the steps is done."""
    return min((part + 1e-3) / _WARM_UP, 0.5 * (1.0 + math.cos(math.pi * part)))


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
        drawn[name] = weight + std * size * torch.randn_like(weight)
    return drawn


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
