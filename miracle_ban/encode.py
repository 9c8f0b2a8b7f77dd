"""Packaging: code the posteriors part by part, fix each part at its decoded value, refine what is left.

After each round the weights that are not coded yet are trained on, around the ones that are, with beta steered so that the
rest of the file fits the rest of the budget. State is written after every round, so an interrupted packaging resumes. Of several
processes (`torchrun`) each searches a part, and all of them get the archive.
Leans on `train`, `plan` and the two kinds of `packing`.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from . import checkpoint as checkpoints
from . import coders, distributed
from .ban import BayesianAttention
from .bits import NATS_PER_BIT, parse_bytes
from .block_packing import BlockPacking
from .container import Archive
from .errors import BudgetError, CodingError, MiracleWarning
from .feed import Feed, is_sharded
from .layers import posteriors
from .objective import Steering
from .packing import Packing
from .plan import carries_names, check_seed, freeze_priors, kl_bits_by_tensor, predicted_index_bits, side_bits, skeleton
from .reconstruct import Reconstruction
from .teaching import Taught, imitation
from .train import (
    BLOCK_BITS,
    LOG_STD_RATE,
    Loss,
    Session,
    fit,
    index_budget_bits,
    make_optimizer,
    seeded,
    train_step,
)  # fmt: skip
from .trellis_packing import TrellisPacking

_GAIN, _RESPONSE = 0.006, 6.0  # of steering beta (objective.Steering)
_LAST_RATE = 0.1  # learning rate of the last round over that of the first: the last weights must settle
_STEERABLE = 1.3  # refinement can bring predicted bits down by about this much


@torch.enable_grad()
def encode(
    model: nn.Module,
    batches: Iterable | None = None,
    loss: Loss | None = None,
    *,
    coder: str | coders.Coder = "gprs",
    seed: int = 0,
    budget: str | int | None = None,
    block_bits: float | None = None,
    rounds: int = 50,
    refine_steps: int = 100,
    learning_rate: float = 3e-3,
    names: bool | None = None,
    num_examples: int | None = None,
    sharded: bool | None = None,
    context: Any = None,
    reconstruction: Reconstruction | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Archive:
    """Code one draw of the posterior of every weight into an `Archive`.

    In a torch.distributed process group every process makes this call, with the same network and arguments, and gets the archive. The
    search is dealt out to them; refinement is done by each alike, so that the file does not depend on how many there are, unless
    the batches are sharded: then a step is on a batch of every process.

    Args:
        model: from `convert`, trained by `fit`; afterwards its weights are fixed at the coded values. One that was trained with
            attention is left alone: it can be packaged again for other contexts.
        batches, loss: as in `fit`; with them the weights not coded yet are refined between rounds.
        coder: name of a coder, or a `coders.Coder`.
        seed: key of the shared randomness, stored in the file (small ones in fewer bits).
        budget: size of the whole file that refinement steers at; default what `fit` was given.
        block_bits: KL that one block carries, bits; default what `fit` was given.
        rounds: how often coding stops to refine; the trellis takes the nearest power of two.
        refine_steps: gradient steps after each round; more take longer and err less, on LeNet-5 in 750 bytes 240 less than 90.
        learning_rate: of the means in the first round of refining; it falls to a tenth in the last. The default was found on
            LeNets; on a ResNet-20 1e-3 already did harm, 3e-4 did not.
        names: store names and shapes; default if the file is going to be larger than 10 kB.
        num_examples: N; default the length of the data set.
        sharded: as in `fit`.
        context: for a model that was trained with attention: inputs of the context to package it for, a tensor or batches (labels
            are ignored); without `batches` the weights are refined on them, the posterior mean in that context being the teacher
            (`loss` of its outputs, default `teaching.imitation`). The default budget is then what the KL in that context asks for.
        reconstruction: for the trellis: sets each layer's posterior when its turn comes, instead of refinement; rounds are layers then.
        checkpoint: file that keeps the state after every round; if it exists, packaging resumes from it, to the same file.
        progress: show a progress bar on stderr; of several processes on the first.

    Returns:
        The archive; `archive.info` has bits, KL and log density ratio of all blocks, and the seconds taken.

    Raises:
        BudgetError: the budget cannot be met.
        CodingError: the posteriors are not finite, or the checkpoint belongs to another run.
        MiracleError: another process has died.
    """
    started = time.monotonic()
    progress = progress and distributed.rank() == 0
    check_seed(seed)
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise CodingError(f"learning_rate must be positive, not {learning_rate}")
    if block_bits is not None and not block_bits > 0:
        raise CodingError(f"block_bits must be positive, not {block_bits}")
    device = next(model.parameters()).device
    attention: BayesianAttention | None = getattr(model, "bayesian_attention", None)
    if context is not None and attention is None:
        raise CodingError("context needs a model that was trained with fit(..., attention=BayesianAttention(...))")
    session: Session | None = getattr(model, "session", None)
    block_bits = block_bits or (session.block_bits if session else BLOCK_BITS)
    if attention is not None:
        with seeded(seed, device):  # a loader of the context may shuffle
            model, batches, loss = _in_context(model, attention, context, batches, loss)
    sharded = batches is not None and (is_sharded(batches) if sharded is None else sharded)
    if attention is not None and batches is not None and loss is not None:
        resumes = checkpoint is not None and distributed.first(Path(checkpoint).exists)
        if not resumes:
            with distributed.apart(not sharded):
                _come_down(model, batches, loss, budget, rounds * refine_steps // 2, coder=coder, block_bits=block_bits, seed=seed,
                           sharded=sharded, progress=progress)  # fmt: skip
    session = getattr(model, "session", None)
    coder = coders.get(coder) if isinstance(coder, str) else coder
    budget_bytes = parse_bytes(budget) if budget is not None else session.budget_bytes if session else None
    budget_bits = None if budget_bytes is None else 8.0 * budget_bytes
    distributed.synchronise([*model.parameters(), *model.buffers()])
    _check_finite(model)
    settings = {"seed": seed, "coder": coder.name, "budget_bytes": budget_bytes, "block_bits": block_bits, "names": names}
    if sharded:
        settings["processes"] = distributed.world_size()
    saved = checkpoints.read(Path(checkpoint), stage="encode", expected=settings) if checkpoint is not None else None
    archive, coder, head = _head(model, coder, seed, names, block_bits, budget_bits, saved)
    side = side_bits(archive)
    goal = None if budget_bytes is None else index_budget_bits(budget_bytes, side)
    if goal is not None and saved is None:
        kl_bits = kl_bits_by_tensor(model) if reconstruction is None else reconstruction.kl_bits
        _check_affordable(model, kl_bits, coder, block_bits, goal, side)
    beta = session.beta if session else 1.0
    refining = None
    if batches is not None and loss is not None and refine_steps > 0 and reconstruction is None:
        with distributed.apart(not sharded), seeded(seed, device):
            feed = Feed(batches, device, num_examples, sharded=sharded, seed=seed)
        refining = _Refining(model, feed, loss, refine_steps, learning_rate, beta)
    rounds = max(1, rounds) if refining else 1
    kept = None if saved is None else saved["packing"]
    packing: Packing
    if isinstance(coder, coders.Trellis):
        packing = TrellisPacking(model, archive, coder, budget_bits=budget_bits, rounds=rounds, saved=kept,
                                 reconstruction=reconstruction)  # fmt: skip
    else:
        assert isinstance(coder, coders.BlockCoder)
        packing = BlockPacking(model, archive, coder, block_bits=block_bits, goal_bits=goal, rounds=rounds, saved=kept)
    history: list[dict[str, float]] = []
    done = 0
    model.train()
    bar = tqdm(total=packing.total, disable=not progress, file=sys.stderr, desc="encode", unit=packing.unit)
    with seeded(distributed.own_seed(seed) if sharded else seed, device), bar:
        if saved is not None:
            packing.restore(saved["packing"])
            checkpoints.restore_generators(saved["generators"][distributed.rank() if sharded else 0], device)
            if refining and saved["refining"] is not None:
                refining.restore(saved["refining"])
            done, history = saved["round"], saved["history"]
        while packing.num_coded < packing.total:
            packing.code_round(max(min(rounds, packing.total) - done, 1))
            done += 1
            if refining and packing.num_coded < packing.total:
                with distributed.apart(not sharded):
                    value = refining.refine(packing)
                distributed.synchronise(model.parameters())
                spent = packing.spent_bits()
                history.append({"coded": packing.num_coded, "loss": value, "beta": refining.beta, "spent_bits": spent})
                bar.set_postfix_str(f"loss {value:.4f}, beta {refining.beta:.3g}, {(side + spent) / 8:,.0f} bytes so far")
            if checkpoint is not None and packing.num_coded < packing.total:
                state = checkpoints.generator_state(device)
                content = {
                    "stage": "encode", "settings": settings, "head": head, "model": checkpoints.model_state(model),
                    "packing": packing.state(), "round": done, "history": history, "refining": refining.state() if refining else None,
                    "generators": distributed.gather(state) if sharded else [state],
                }  # fmt: skip
                checkpoints.write(Path(checkpoint), content)
            bar.update(packing.num_coded - bar.n)
    size = packing.finish(archive)
    if budget_bytes is not None and size > budget_bytes and isinstance(packing, BlockPacking):
        limit = budget_bytes
        size = packing.shorten(archive, lambda size: size <= limit)
    distributed.check_same(zlib.crc32(archive.to_bytes()), "checksum of the archive")
    archive.info = _account(packing, archive, size, refining.beta if refining else beta, history, time.monotonic() - started)
    if budget_bytes is not None and size > budget_bytes:
        warnings.warn(f"the file takes {size} bytes, over the budget of {budget_bytes}", MiracleWarning, stacklevel=2)
    if checkpoint is not None:
        checkpoints.remove(Path(checkpoint))
    return archive


def _head(
    model: nn.Module,
    coder: coders.Coder,
    seed: int,
    names: bool | None,
    block_bits: float,
    budget_bits: float | None,
    saved: dict[str, Any] | None,
) -> tuple[Archive, coders.Coder, dict[str, Any]]:
    """The archive without its codewords, the coder settled, and what a resumed packaging makes them from; brings back a saved model."""
    if saved is None:
        _check_fresh(model)
        with_names, buffers = carries_names(names, model, budget_bits), checkpoints.model_state(model)["buffers"]
        codes = {name: torch.from_numpy(c) for name, c in freeze_priors(model).items()}
        head: dict[str, Any] = {"with_names": with_names, "buffers": buffers, "codes": codes}
    else:
        head = saved["head"]
        checkpoints.restore_model(model, {**saved["model"], "buffers": head["buffers"]})  # those that went into the header
    coder = coder.settled(block_bits, budget_bits or sum(kl_bits_by_tensor(model).values()))
    own = {name: c.numpy() for name, c in head["codes"].items()}
    archive = skeleton(model, coder=coder, seed=seed, names=head["with_names"], codes=own)
    if saved is not None:
        checkpoints.restore_model(model, saved["model"])
    return archive, coder, head


def _in_context(
    model: nn.Module, attention: BayesianAttention, context: Any, batches: Iterable | None, loss: Loss | None
) -> tuple[nn.Module, Iterable | None, Loss | None]:
    """The model to package for a context, and what to refine it on."""
    net = attention.specialise(model, context)
    if context is not None:
        session: Session | None = getattr(model, "session", None)
        if session is not None:
            net.session = replace(session, budget_bytes=None)  # type: ignore[assignment]
        if batches is None:
            batches, loss = Taught(context, attention.teacher(model, context)), loss or imitation
    return net, batches, loss


def _come_down(
    model: nn.Module,
    batches: Iterable,
    loss: Loss,
    budget: str | int | None,
    steps: int,
    *,
    coder: str | coders.Coder,
    block_bits: float,
    **options: Any,
) -> None:
    """Train posteriors that ask for more than the budget (default the session's) down to it, before coding starts."""
    session: Session | None = getattr(model, "session", None)
    if budget is None and session is not None:
        budget = session.budget_bytes
    if budget is None:
        return
    settled = (coders.get(coder) if isinstance(coder, str) else coder).settled(block_bits, 8.0 * parse_bytes(budget))
    counts = {name: p.mean.numel() for name, p in posteriors(model).items()}
    if predicted_index_bits(kl_bits_by_tensor(model), counts, settled, block_bits) > 8.0 * parse_bytes(budget):
        with seeded(0, next(model.parameters()).device):
            epochs = steps / Feed(batches, next(model.parameters()).device, sharded=options["sharded"]).batches_per_pass
        fit(model, batches, loss, budget=budget, epochs=epochs, narrow_epochs=0.2 * epochs, coder=coder, block_bits=block_bits, **options)


def _check_fresh(model: nn.Module) -> None:
    if any(bool(p.fixed.any()) for p in posteriors(model).values()):
        raise CodingError("this model is encoded already, its weights are fixed: convert and fit it again, or keep the first archive")


def _check_finite(model: nn.Module) -> None:
    for name, p in posteriors(model).items():
        if not bool(torch.isfinite(p.mean).all() & torch.isfinite(p.log_std).all()):
            raise CodingError(f"the posterior of {name} holds NaN or infinite values: training diverged; lower the learning rate")


def _check_affordable(
    model: nn.Module, kl_bits: dict[str, float], coder: coders.Coder, block_bits: float, goal: float, side: float
) -> None:
    """Refuse posteriors that are far too rich for the budget before the work is done, not after."""
    counts = {name: p.mean.numel() for name, p in posteriors(model).items()}
    expected = predicted_index_bits(kl_bits, counts, coder, block_bits)
    if coder.fixed_length_bits is None and expected > _STEERABLE * goal:
        raise BudgetError(
            f"the posteriors would take about {(expected + side) / 8:,.0f} bytes, the budget leaves {(goal + side) / 8:,.0f}: "
            "call fit(..., budget=...) with that budget and enough epochs first, or raise the budget"
        )


class _Refining:
    """Training of the weights that are not coded yet, between rounds; betas are steered to what is left of the budget."""

    def __init__(self, model: nn.Module, feed: Feed, loss: Loss, steps: int, learning_rate: float, beta: float):
        self.model, self.feed, self.loss, self.steps, self.learning_rate = model, feed, loss, steps, learning_rate
        self.beta = beta  # the mean of them
        self.steering: dict[tuple[str, ...], Steering] = {}  # by the tensors that have it in common
        self.optimizer = make_optimizer(model, learning_rate)

    def refine(self, packing: Packing) -> float:
        """Train after a round; returns the mean loss."""
        self.feed.restart()
        rate = self.learning_rate * (1.0 - (1.0 - _LAST_RATE) * packing.num_coded / packing.total)
        for group, factor in zip(self.optimizer.param_groups, (1.0, LOG_STD_RATE), strict=True):
            group["lr"] = factor * rate
        goals, own = packing.goals(), self.steering
        for goal in goals:
            own.setdefault(goal.names, Steering(self.beta, gain=_GAIN, response=_RESPONSE))
        betas = dict.fromkeys(posteriors(self.model), self.beta) | {n: own[g.names].beta for g in goals for n in g.names}
        total = 0.0
        for _ in range(self.steps):
            value, kl_nats = train_step(
                self.model, self.feed.next(), self.loss, self.optimizer, beta=betas, num_examples=self.feed.num_examples
            )
            total += value
            for goal in goals:
                bits = sum(kl_nats[n] for n in goal.names) / NATS_PER_BIT + goal.extra_bits
                betas.update(dict.fromkeys(goal.names, own[goal.names].update(bits, goal.target_bits)))
        if goals:
            self.beta = sum(own[g.names].beta * g.target_bits for g in goals) / sum(g.target_bits for g in goals)
        return total / self.steps

    def state(self) -> dict[str, Any]:
        """What a resumed packaging goes on from."""
        betas = [(list(names), s.beta) for names, s in self.steering.items()]
        return {"beta": self.beta, "betas": betas, "optimizer": self.optimizer.state_dict(), "feed": self.feed.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.beta = state["beta"]
        self.steering = {tuple(names): Steering(b, gain=_GAIN, response=_RESPONSE) for names, b in state["betas"]}
        self.optimizer.load_state_dict(state["optimizer"])
        self.feed.restore(state["feed"])


def _account(packing: Packing, archive: Archive, size: int, beta: float, history: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    kl, ratio = packing.account()
    blocks = max(len(kl), 1)
    index_bits = sum(r.bits for r in archive.records)
    return {
        "file_bytes": size,
        "blocks": len(kl),
        "index_bits": index_bits,
        "side_bits": 8 * size - index_bits,
        "kl_bits_per_block": float(kl.sum()) / blocks,
        "codeword_bits_per_block": index_bits / blocks,
        "log2_ratio_per_block": float(ratio.sum()) / blocks,
        "j_bits_per_block": (index_bits - float(ratio.sum())) / blocks,
        "beta": beta,
        "seconds": seconds,
        "rounds": history,
    }
