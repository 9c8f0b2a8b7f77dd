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
from .packing import Goal, Packing
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
    if saved is None:
        _check_fresh(model)
        with_names, buffers = carries_names(names, model, budget_bits), checkpoints.model_state(model)["buffers"]
        codes = freeze_priors(model)
    else:
        with_names, buffers = saved["with_names"], saved["buffers"]
        codes = {name: v.numpy() for name, v in saved["codes"].items()}
        checkpoints.restore_model(model, {**saved["model"], "buffers": buffers})  # those that went into the header
    coder = coder.settled(block_bits, budget_bits or sum(kl_bits_by_tensor(model).values()))
    archive = skeleton(model, coder=coder, seed=seed, names=with_names, codes=codes)
    if saved is not None:
        checkpoints.restore_model(model, saved["model"])
    side = side_bits(archive)
    goal = None if budget_bytes is None else index_budget_bits(budget_bytes, side)
    if goal is not None and saved is None:
        kl_bits = kl_bits_by_tensor(model) if reconstruction is None else reconstruction.kl_bits
        _check_affordable(model, kl_bits, coder, block_bits, goal, side)
    feed = None
    if batches is not None and loss is not None and refine_steps > 0 and reconstruction is None:
        with distributed.apart(not sharded), seeded(seed, device):
            feed = Feed(batches, device, num_examples, sharded=sharded, seed=seed)
    rounds = max(1, rounds) if feed is not None else 1
    packing: Packing
    kept = None if saved is None else saved["packing"]
    if isinstance(coder, coders.Trellis):
        packing = TrellisPacking(model, archive, coder, budget_bits=budget_bits, rounds=rounds, saved=kept,
                                 reconstruction=reconstruction)  # fmt: skip
        rounds = len(packing.turns)
    else:
        assert isinstance(coder, coders.BlockCoder)
        packing = BlockPacking(model, archive, coder, block_bits=block_bits, goal_bits=goal, rounds=rounds, saved=kept)
        rounds = max(1, min(rounds, packing.total))
    beta = session.beta if session else 1.0
    steering: dict[tuple[str, ...], Steering] = {}
    optimizer = make_optimizer(model, learning_rate)
    history: list[dict[str, float]] = []
    done = 0
    model.train()
    bar = tqdm(total=packing.total, disable=not progress, file=sys.stderr, desc="encode", unit=packing.unit)
    with seeded(distributed.own_seed(seed) if sharded else seed, device), bar:
        if saved is not None:
            packing.restore(saved["packing"])
            optimizer.load_state_dict(saved["optimizer"])
            checkpoints.restore_generators(saved["generators"][distributed.rank() if sharded else 0], device)
            if feed is not None and saved["feed"] is not None:
                feed.restore(saved["feed"])
            done, history, beta = saved["round"], saved["history"], saved["beta"]
            steering = {tuple(names): Steering(b, gain=_GAIN, response=_RESPONSE) for names, b in saved["betas"]}
        while packing.num_coded < packing.total:
            packing.code_round(max(rounds - done, 1))
            done += 1
            if feed is not None and loss is not None and packing.num_coded < packing.total:
                feed.restart()
                _set_rate(optimizer, learning_rate * (1.0 - (1.0 - _LAST_RATE) * packing.num_coded / packing.total))
                with distributed.apart(not sharded):
                    value, beta = _refine(model, feed, loss, optimizer, packing.goals(), steering, beta, refine_steps)
                distributed.synchronise(model.parameters())
                spent = packing.spent_bits()
                history.append({"coded": packing.num_coded, "loss": value, "beta": beta, "spent_bits": spent})
                bar.set_postfix_str(f"loss {value:.4f}, beta {beta:.3g}, {(side + spent) / 8:,.0f} bytes so far")
            if checkpoint is not None and packing.num_coded < packing.total:
                state = checkpoints.generator_state(device)
                content = {
                    "stage": "encode", "settings": settings, "with_names": with_names, "buffers": buffers,
                    "codes": {n: torch.from_numpy(c) for n, c in codes.items()}, "model": checkpoints.model_state(model),
                    "packing": packing.state(), "round": done, "history": history, "beta": beta,
                    "betas": [(list(n), s.beta) for n, s in steering.items()], "optimizer": optimizer.state_dict(),
                    "feed": None if feed is None else feed.state(), "generators": distributed.gather(state) if sharded else [state],
                }  # fmt: skip
                checkpoints.write(Path(checkpoint), content)
            bar.update(packing.num_coded - bar.n)
    size = packing.finish(archive)
    if budget_bytes is not None and size > budget_bytes and isinstance(packing, BlockPacking):
        limit = budget_bytes
        size = packing.shorten(archive, lambda size: size <= limit)
    distributed.check_same(zlib.crc32(archive.to_bytes()), "checksum of the archive")
    archive.info = _account(packing, archive, size, beta, history, time.monotonic() - started)
    if budget_bytes is not None and size > budget_bytes:
        warnings.warn(f"the file takes {size} bytes, over the budget of {budget_bytes}", MiracleWarning, stacklevel=2)
    if checkpoint is not None:
        checkpoints.remove(Path(checkpoint))
    return archive


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


def _set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group, factor in zip(optimizer.param_groups, (1.0, LOG_STD_RATE), strict=True):
        group["lr"] = factor * learning_rate


def _refine(
    model: nn.Module,
    feed: Feed,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    goals: list[Goal],
    steering: dict[tuple[str, ...], Steering],
    beta: float,
    steps: int,
) -> tuple[float, float]:
    """Train the weights not coded yet; the betas keep their KL at `goals`. Returns the mean loss and the mean beta."""
    for goal in goals:
        steering.setdefault(goal.names, Steering(beta, gain=_GAIN, response=_RESPONSE))
    total, now = 0.0, dict.fromkeys(posteriors(model), beta) | {n: steering[g.names].beta for g in goals for n in g.names}
    for _ in range(steps):
        value, kl_nats = train_step(model, feed.next(), loss, optimizer, beta=now, num_examples=feed.num_examples)
        total += value
        for goal in goals:
            bits = sum(kl_nats[n] for n in goal.names) / NATS_PER_BIT + goal.extra_bits
            now.update(dict.fromkeys(goal.names, steering[goal.names].update(bits, goal.target_bits)))
    weight = sum(g.target_bits for g in goals)
    return total / steps, sum(steering[g.names].beta * g.target_bits for g in goals) / weight if goals else beta


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
