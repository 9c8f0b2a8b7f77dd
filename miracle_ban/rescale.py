"""Last of all: how large each unit of a packaged network is.

A weight is its prior's standard deviation times what the code gives, and those of a unit share one standard deviation; so the codes of
the priors are what is left to train when all else is coded. Loss and gradients are those at the nearest codes (the straight-through
estimator: Bengio et al. 2013, arXiv 1308.3432). Leans on `network`, `load`, `course`, `feed` and `teaching`.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import checkpoint as checkpoints
from . import distributed
from .bits import parse_bytes
from .container import Archive, prior_code, prior_std, rates
from .course import Row, check_loss, run, warm_cosine
from .errors import CodingError, MiracleError
from .feed import Feed
from .load import decode, restore
from .network import arguments, call, copied
from .teaching import imitation
from .train import LOG_EVERY, Loss, seeded

LEARNING_RATE = 1e-2  # of Adam, for the logarithms
_BETAS = (0.9, 0.99)
_FARTHEST = math.log(4.0)  # that a unit may become larger or smaller
_JUDGED = 32  # batches that the codes before and after are compared on


@torch.enable_grad()
def rescale(
    archive: Archive,
    net: nn.Module,
    batches: Iterable,
    loss: Loss | None = None,
    *,
    budget: str | int | None = None,
    epochs: float = 2.0,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    sharded: bool | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Archive:
    """Train the prior scales of a packaged network: how large each of its units is, or each of its tensors where that is one prior's.

    Args:
        archive: from `encode`, `compress` or `open`; left alone.
        net: the network that it was made from; left alone.
        batches: as in `fit`; without `loss` the targets are ignored.
        loss: as in `fit`; default to imitate the outputs of `net` (`teaching.imitation`).
        budget: size of the whole file, bytes or text such as "20 kB"; default as large as it is. Where the new codes take more, those
            that change least stay; and all of them, if on 32 batches what is left of the change does no good.
        epochs: passes over `batches`.
        learning_rate: the largest, of the natural logarithms of the sizes; it rises at first and falls to zero as a cosine.
        seed: of the random numbers that the loader draws.
        sharded: as in `fit`.
        checkpoint: file that keeps the state after every pass; if it exists, training resumes from it, to the same file.
        progress: show a progress bar on stderr.

    Returns:
        A new archive; `archive.info["rescale"]` has steps, seconds, `history`, rows of step and loss, the share of the codes that
        `changed`, and the loss `before` and with the new codes, `after`, on those batches.

    Raises:
        CodingError: nothing in the file can be rescaled, or the checkpoint belongs to another run.
        MismatchError: the archive was made for another architecture.
        MiracleError: the loss is NaN or infinite, or there is none and the outputs hold no tensor to imitate.

    Example:
        >>> save(rescale(open("net.mban"), net, loader, budget="25 kB"), "better.mban")  # doctest: +SKIP
    """
    started = time.monotonic()
    for name, value in (("learning_rate", learning_rate), ("epochs", epochs)):
        if not (math.isfinite(value) and value > 0):
            raise MiracleError(f"{name} must be positive, not {value}")
    limit = archive.size_bytes if budget is None else parse_bytes(budget)
    archive = copy.deepcopy(archive)
    weights, model = decode(archive, net), copied(net).float().eval()
    teacher = copy.deepcopy(model).requires_grad_(False) if loss is None else None
    restore(model, weights)
    device = next(model.parameters()).device
    with seeded(seed, device):
        feed = Feed(batches, device, sharded=sharded, seed=seed)
    steps = max(1, round(epochs * feed.batches_per_pass))
    settings = {"archive": zlib.crc32(archive.to_bytes()), "steps": steps, "learning_rate": learning_rate, "seed": seed}
    saved = checkpoints.read(Path(checkpoint), stage="rescale", expected=settings) if checkpoint is not None else None
    scales = _Scales(archive, model)
    if not scales.logs:
        raise CodingError(f"no unit of the file has weights that are parameters of this {type(net).__name__}: there is nothing to rescale")
    course = _Rescaling(scales, model, feed, loss, teacher, learning_rate, steps)
    with seeded(distributed.own_seed(seed), device):
        history, started = run(
            course, steps, stage="rescale", settings=settings, saved=saved, checkpoint=checkpoint, device=device, started=started,
            progress=progress,
        )  # fmt: skip
        changed = scales.settle(limit)
        before, after = course.compare(scales.codes, {name: r.prior_codes for name, r in scales.records.items()})
    if not after < before:
        scales.go_back()
        changed = 0.0
    distributed.check_same(zlib.crc32(archive.to_bytes()), "checksum of the archive")
    info = {"steps": steps, "seconds": time.monotonic() - started, "history": history}
    archive.info["rescale"] = {**info, "changed": changed, "before": before, "after": after}
    return archive


class _Scales:
    """The prior codes of an archive while they are trained.

    Args:
        archive: its codes are changed in place, by `settle`.
        model: decoded from it.
    """

    def __init__(self, archive: Archive, model: nn.Module):
        self.archive = archive
        if archive.path is not None:  # a file's bits end with a byte, but where that is depends on what is before them
            archive.path = replace(archive.path, bits=archive.path.bits[: sum(r.bits for r in rates(archive).values())])
        self.weights = dict(model.named_parameters())
        device = next(iter(self.weights.values())).device
        coded = {str(r.name): r for r in archive.records if r.kind == "coded" and r.prior_codes.any()}
        self.records = {name: r for name, r in coded.items() if name in self.weights}
        self.codes = {name: r.prior_codes for name, r in self.records.items()}  # as they were
        self.logs = {name: nn.Parameter(torch.zeros(len(codes), device=device)) for name, codes in self.codes.items()}  # new over old

    def new_codes(self, name: str) -> np.ndarray:
        """The codes nearest to what is wanted of a tensor; a dropped unit stays dropped."""
        old = self.codes[name]
        wanted = prior_std(old) * self.logs[name].detach().clamp(-_FARTHEST, _FARTHEST).exp().cpu().numpy()
        return np.where(old > 0, prior_code(wanted), 0).astype(np.uint8)

    def now(self) -> dict[str, Tensor]:
        """The weights that the nearest codes give, with the gradients of those that are wanted."""
        return self.weights_with({name: self.new_codes(name) for name in self.logs})

    def weights_with(self, codes: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """The weights that these codes give, with the gradients of those that are wanted."""
        found = {}
        for name, log in self.logs.items():
            weight, old = self.weights[name], self.codes[name]
            own = prior_std(codes[name]).astype(np.float64) / prior_std(np.maximum(old, 1))
            gain = torch.from_numpy(own).to(weight) * (log - log.detach()).exp()
            if len(gain) > 1:
                gain = torch.cat([gain, gain.new_zeros(len(weight) - len(gain))])  # of units that were dropped from the file
            found[name] = (weight.detach() * gain.view(-1, *[1] * (weight.dim() - 1))).view_as(weight)
        return found

    def settle(self, limit: int) -> float:
        """Put the new codes into the archive, at most `limit` bytes in all; returns the share of the codes that changed."""
        new = {name: self.new_codes(name) for name in self.codes}
        edges = np.cumsum([len(codes) for codes in new.values()])
        order = np.argsort(np.concatenate([log.detach().abs().cpu().numpy() for log in self.logs.values()]), kind="stable")

        def put(kept: int) -> int:
            """All new codes but those of the `kept` units that change least; returns how many changed."""
            stays = np.zeros(len(order), bool)
            stays[order[:kept]] = True
            changed = 0
            for (name, record), own in zip(self.records.items(), np.split(stays, edges[:-1]), strict=True):
                record.prior_codes = np.where(own, self.codes[name], new[name])
                changed += int((record.prior_codes != self.codes[name]).sum())
            return changed

        low, high = 0, len(order)  # with `high` it fits, or nothing is changed
        put(0)
        if self.archive.size_bytes > limit:
            while high - low > 1:
                middle = (low + high) // 2
                put(middle)
                low, high = (middle, high) if self.archive.size_bytes > limit else (low, middle)
            low = high
        return put(low) / len(order)

    def go_back(self) -> None:
        """Put the codes as they were into the archive."""
        for name, record in self.records.items():
            record.prior_codes = self.codes[name]


class _Rescaling:
    """The course of `rescale`."""

    def __init__(
        self,
        scales: _Scales,
        model: nn.Module,
        feed: Feed,
        loss: Loss | None,
        teacher: nn.Module | None,
        learning_rate: float,
        steps: int,
    ):
        self.scales, self.model, self.feed, self.loss, self.teacher = scales, model, feed, loss, teacher
        self.learning_rate, self.steps = learning_rate, steps
        self.optimizer = torch.optim.Adam(list(scales.logs.values()), learning_rate, betas=_BETAS)
        self.step = 0
        self.losses: list[float] = []  # since the last row

    def advance(self) -> Row | None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warm_cosine(self.step / self.steps)
        (value,) = self._values([self.scales.now()], *self.feed.next())
        check_loss(value)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        (measured,) = distributed.mean_gradients(self.optimizer, [float(value.detach())])
        if not math.isfinite(measured):
            raise MiracleError(f"the loss became {measured} in rescaling, step {self.step}: check the data for NaN")
        self.optimizer.step()
        torch.clear_autocast_cache()  # else a caller's autocast would go on with the weights as they were
        self.step += 1
        self.losses.append(measured)
        if self.step % LOG_EVERY and self.step < self.steps:
            return None
        row = {"step": self.step, "loss": statistics.fmean(self.losses)}
        self.losses.clear()
        return row

    @torch.no_grad()
    def compare(self, *codes: Mapping[str, np.ndarray]) -> list[float]:
        """Mean loss with each of several sets of codes, on the same batches."""
        self.feed.restart()
        weights = [self.scales.weights_with(own) for own in codes]
        count = min(_JUDGED, self.feed.batches_per_pass)
        losses = [torch.stack(self._values(weights, *self.feed.next())) for _ in range(count)]
        return distributed.mean(torch.stack(losses).mean(0)).tolist()

    def _values(self, weights: list[dict[str, Tensor]], inputs: Any, targets: Any) -> list[Tensor]:
        """The loss on a batch with each of several sets of weights."""
        outputs = [functional_call(self.model, own, *arguments(self.model, inputs)) for own in weights]
        if self.loss is not None:
            return [self.loss(own, targets) for own in outputs]
        assert self.teacher is not None
        with torch.no_grad():
            taught = call(self.teacher, inputs)
        return [imitation(own, taught) for own in outputs]

    def words(self, row: Row) -> str:
        return f"loss {row['loss']:.4f}"

    def state(self) -> dict[str, Any]:
        logs = [log.detach() for log in self.scales.logs.values()]
        return {"step": self.step, "losses": list(self.losses), "logs": logs, "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self.losses = state["step"], list(state["losses"])
        with torch.no_grad():
            for log, kept in zip(self.scales.logs.values(), state["logs"], strict=True):
                log.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
