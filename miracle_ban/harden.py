"""Training under the noise that coding is going to bring, before a network is packaged.

Each step draws every weight from N(w, noise * mean square of its unit's weights), a posterior as wide as a code of some bits leaves it.
Networks so trained lie where noise does less harm (Baskin et al. 2018, NICE, arXiv 1810.00162; Fan et al. 2020, arXiv 2004.07320),
and training shows where bits are worth most: the units' shares of them are learned (`noise`). BatchNorms stay what they are and see
the noise. Leans on `network`, `unfold`, `noise`, `course`, `feed`, `train`, `graphs` and torch.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable
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
from .graphs import Recorded
from .network import arguments, call, copied
from .noise import Noise
from .train import LOG_EVERY, Loss, seeded
from .unfold import folded, unfold

Optimizing = Callable[[nn.Module], torch.optim.Optimizer]
_RATE, _MOMENTUM, _DECAY = 0.1, 0.9, 5e-4  # of SGD, where there are BatchNorms
_RATE_ELSEWHERE = 3e-4  # of AdamW
_FIRST_BITS, _DESCENT = 2.5, 0.4  # a weight, at first; part of the steps after which there are no more than are wanted
_PACE, _LEAST_PACE = 0.01, 0.1  # of sharing bits out: at most in a step, and the part of it that never goes
_SETTLING = 100  # steps before bits are shared out: what one is worth must be known
_STATISTICS = 64  # batches that the statistics of norms are measured on at the end


@torch.enable_grad()
def harden(
    net: nn.Module,
    batches: Iterable,
    loss: Loss,
    *,
    bits: float,
    names: Collection[str] | None = None,
    epochs: float = 30.0,
    optimizer: Optimizing | None = None,
    seed: int = 0,
    sharded: bool | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a network under noise on its weights, so that coding does less harm to it.

    Args:
        net: a trained network; left alone. If it comes out of a file, its BatchNorms get statistics first (`unfold`).
        batches, loss: as in `fit`.
        bits: that all parameters that get noise are going to be coded with together. Noise begins as for 2.5 bits a weight, if
            that is more, and reaches what `bits` leave after two fifths of the steps.
        names: the parameters that get noise; default all of two or more dimensions.
        epochs: passes over `batches`.
        optimizer: makes the optimizer of the network that it is given; default SGD with momentum where there are BatchNorms, AdamW
            elsewhere. Its learning rates are the largest: they rise at first and fall to zero as a cosine.
        seed: of the noise and of what the loader draws.
        sharded: as in `fit`.
        checkpoint: file that keeps the state after every pass; if it exists, training resumes from it, or is over.
        progress: show a progress bar on stderr.

    Returns:
        A trained copy, in the mode of `net`, and what happened: steps, seconds, `noise`, the variances `[units, inputs]` of each
        parameter at the end, and `history`, rows of step and loss.

    Raises:
        MiracleError: `names` has what is no parameter, nothing is to be trained, or the loss is NaN or infinite.

    Example:
        >>> hardened, course = harden(net, loader, F.cross_entropy, bits=8 * 35_000, epochs=60)  # doctest: +SKIP
    """
    started = time.monotonic()
    if not (math.isfinite(epochs) and epochs > 0):
        raise MiracleError(f"epochs must be positive, not {epochs}")
    if not (math.isfinite(bits) and bits > 0):
        raise MiracleError(f"bits must be positive, not {bits}")
    model = copied(net).float().train()
    if not any(p.requires_grad for p in model.parameters()):
        raise MiracleError(f"no parameter of {type(net).__name__} wants a gradient: net.requires_grad_() before hardening")
    own = dict(model.named_parameters())
    names = [name for name, p in own.items() if p.dim() > 1] if names is None else list(names)
    unknown = [name for name in names if name not in own]
    if unknown:
        raise MiracleError(f"noise is wanted for {unknown[0]!r}, which is no parameter of {type(net).__name__}")
    weights = {name: own[name] for name in names}
    first = max(bits, _FIRST_BITS * sum(p.numel() for p in weights.values()))
    noise = Noise(weights, first)
    device = next(model.parameters()).device
    with seeded(seed, device):
        feed = Feed(batches, device, sharded=sharded, seed=seed)
    steps = max(1, round(epochs * feed.batches_per_pass))
    settings = {"steps": steps, "seed": seed, "bits": float(f"{bits:.3g}")}
    saved = checkpoints.read(Path(checkpoint), stage="harden", expected=settings) if checkpoint is not None else None
    if saved is None and folded(model):
        unfold(model, (feed.next() for _ in range(min(_STATISTICS, feed.batches_per_pass))))
        feed.restart()
    course = _Hardening(model, feed, loss, (optimizer or _descent)(model), noise, (first, bits), steps)
    distributed.synchronise([*model.parameters(), *model.buffers()])
    with seeded(distributed.own_seed(seed), device):
        history, started = run(
            course, steps, stage="harden", settings=settings, saved=saved, checkpoint=checkpoint, device=device, started=started,
            progress=progress,
        )  # fmt: skip
    distributed.synchronise(model.buffers())
    distributed.check_equal([*model.parameters(), *noise.factors], "parameters")
    info = {"steps": steps, "seconds": time.monotonic() - started, "noise": noise.variances(), "history": history}
    return model.train(net.training), info


class _Hardening:
    """The course of `harden`."""

    def __init__(
        self,
        model: nn.Module,
        feed: Feed,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        noise: Noise,
        bits: tuple[float, float],
        steps: int,
    ):
        self.model, self.feed, self.loss, self.optimizer, self.noise, self.steps = model, feed, loss, optimizer, noise, steps
        self.first, self.bits = bits
        self.largest = [group["lr"] for group in optimizer.param_groups]
        recordable = feed.device.type == "cuda" and distributed.world_size() == 1
        self.gradients = Recorded(self._gradients) if recordable else self._gradients
        self.step = 0
        self.losses: list[Tensor] = []  # since the last row

    def advance(self) -> Row | None:
        part = self.step / self.steps
        for group, rate in zip(self.optimizer.param_groups, self.largest, strict=True):
            group["lr"] = rate * warm_cosine(part)
        pace = _PACE * (_LEAST_PACE + (1.0 - _LEAST_PACE) * warm_cosine(part)) if self.step >= _SETTLING else 0.0
        bits = self.bits * (self.first / self.bits) ** max(0.0, 1.0 - part / _DESCENT)
        self.losses.append(self.gradients(*self.feed.next(), *torch.tensor([pace, bits], device=self.feed.device)))
        distributed.mean_gradients(self.optimizer)
        self.optimizer.step()
        torch.clear_autocast_cache()  # else a caller's autocast would go on with the weights as they were
        self.step += 1
        if self.step == self.steps:
            _measure_norms(self.model, self.feed)
        elif self.step % LOG_EVERY:
            return None
        row = {"step": self.step, "loss": self._mean_loss()}
        self.losses.clear()
        return row

    def _gradients(self, inputs: Any, targets: Any, pace: Tensor, bits: Tensor) -> Tensor:
        """Of the loss under noise, by all parameters; and bits are shared out."""
        value = self.loss(functional_call(self.model, self.noise.draw(), *arguments(self.model, inputs)), targets)
        check_loss(value)
        self.optimizer.zero_grad(set_to_none=not isinstance(self.gradients, Recorded))  # recorded work goes on with the same tensors
        value.backward()
        self.noise.share(pace, bits)
        return value.detach()

    def _mean_loss(self) -> float:
        """Since the last row, of all processes."""
        mean = float(distributed.mean(torch.stack(self.losses).mean()))
        if not math.isfinite(mean):
            raise MiracleError(f"the loss became {mean} in hardening, by step {self.step}: check the data, or lower the learning rate")
        return mean

    def words(self, row: Row) -> str:
        return f"loss {row['loss']:.4f}"

    def state(self) -> dict[str, Any]:
        if self.losses:
            self._mean_loss()  # nothing is kept that is broken
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "noise": self.noise.state()}
        return {"step": self.step, "losses": list(self.losses), **states}

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self.losses = state["step"], [v.to(self.feed.device) for v in state["losses"]]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.noise.restore(state["noise"])


def has_norms(net: nn.Module) -> bool:
    """Whether there are BatchNorms, which leave the weights before them without a scale of their own."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


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
    update_bn(itertools.islice(iter(feed.next, None), count), _Called(model))


class _Called(nn.Module):
    """A network that takes batches of any kind as its one argument."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, inputs: Any) -> Any:
        return call(self.net, inputs)
