"""Packaging: code the posteriors block by block, fix each block at its decoded value, refine what is left.

Blocks go in rounds, those of largest KL first. After each round the weights that are not coded yet are trained on, around
the ones that are, with beta steered so that the rest of the file fits the rest of the budget. State is written after every
round, so an interrupted packaging resumes. Leans on `train`, `plan`, `blocks`, `coders`.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from . import checkpoint as checkpoints
from . import coders
from .bits import NATS_PER_BIT, parse_bytes
from .blocks import layout
from .coders.base import Codebook
from .container import Archive
from .convert import convert
from .errors import BudgetError, CodingError, MiracleWarning
from .gaussian import Blocks
from .layers import Posterior, posteriors
from .objective import Steering
from .plan import carries_names, freeze_priors, kl_bits_by_tensor, num_blocks, predicted_index_bits, side_bits, skeleton
from .train import BLOCK_BITS, LOG_STD_RATE, Feed, Loss, Session, fit, index_budget_bits, make_optimizer, seeded, train_step

_OVERHEAD_SLOPE = -0.25  # bits of overhead for each bit of KL that a block has more than the others: measured with GPRS
_GAIN, _RESPONSE = 0.006, 6.0  # of steering beta (objective.Steering)
_LAST_RATE = 0.1  # learning rate of the last round over that of the first: the last weights must settle
_STEERABLE = 1.3  # refinement can bring predicted bits down by about this much


@dataclass
class TensorBlocks:
    """The blocks of one tensor while they are coded."""

    number: int
    posterior: Posterior
    place: np.ndarray  # [blocks, d] positions in the flattened live tensor, -1 where a block is short
    index: np.ndarray
    coded: np.ndarray
    kl_bits: np.ndarray  # at the time of coding
    log2_ratio: np.ndarray


@dataclass
class State:
    """Everything that a resumed packaging needs."""

    tensors: list[TensorBlocks]
    steering: Steering
    block_bits: float
    round: int = 0
    rounds: list[list[tuple[TensorBlocks, np.ndarray]]] = field(default_factory=list)  # the blocks coded in each
    history: list[dict[str, float]] = field(default_factory=list)


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
    refine_steps: int = 50,
    learning_rate: float = 1e-3,
    names: bool | None = None,
    num_examples: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Archive:
    """Code one draw of the posterior of every weight into an `Archive`.

    Args:
        model: from `convert`, trained by `fit`; afterwards its weights are fixed at the coded values.
        batches, loss: as in `fit`; with them the weights not coded yet are refined between rounds.
        coder: name of a coder, or a `coders.Coder`.
        seed: key of the shared randomness, stored in the file (small ones in fewer bits).
        budget: size of the whole file that refinement steers at; default what `fit` was given.
        block_bits: KL that one block carries, bits; default what `fit` was given.
        rounds: how often coding stops to refine.
        refine_steps: gradient steps after each round.
        learning_rate: of the means in the first round of refining; it falls to a tenth in the last.
        names: store names and shapes; default if the file is going to be larger than 10 kB.
        num_examples: N; default the length of the data set.
        checkpoint: file that keeps the state after every round; if it exists, packaging resumes from it.
        progress: show a progress bar on stderr.

    Returns:
        The archive; `archive.info` has bits, KL and log density ratio of all blocks, and the seconds taken.

    Raises:
        BudgetError: the budget cannot be met.
        CodingError: the posteriors are not finite, or the checkpoint belongs to another run.
    """
    started = time.monotonic()
    session: Session | None = getattr(model, "session", None)
    coder = coders.get(coder) if isinstance(coder, str) else coder
    block_bits = block_bits or (session.block_bits if session else BLOCK_BITS)
    budget_bytes = parse_bytes(budget) if budget is not None else session.budget_bytes if session else None
    budget_bits = None if budget_bytes is None else 8.0 * budget_bytes
    if not 0 <= seed < 1 << 64:
        raise CodingError(f"seed must be from 0 to 2^64 - 1, not {seed}")
    coder = coder.for_blocks(block_bits)
    _check_finite(model)
    with_names = carries_names(names, model, budget_bits)
    settings = {"seed": seed, "coder": coder.name, "budget_bytes": budget_bytes, "block_bits": block_bits, "names": with_names}
    saved = checkpoints.read(Path(checkpoint), stage="encode", expected=settings) if checkpoint is not None else None
    if saved is not None:
        checkpoints.restore_posteriors(model, saved["posteriors"])
    else:
        _check_fresh(model)
    codes = freeze_priors(model) if saved is None else {name: v.numpy() for name, v in saved["codes"].items()}
    archive = skeleton(model, coder=coder, seed=seed, names=with_names, codes=codes)
    side = side_bits(archive)
    goal = None if budget_bytes is None else index_budget_bits(budget_bytes, side)
    if goal is not None and saved is None:
        block_bits = _affordable_block_bits(model, coder, block_bits, goal)
    steering = Steering(session.beta if session else 1.0, gain=_GAIN, response=_RESPONSE)
    state = State(_divide(model, archive, seed, block_bits, saved), steering, block_bits)
    feed = None
    if batches is not None and loss is not None and refine_steps > 0:
        feed = Feed(batches, next(model.parameters()).device, num_examples)
    total = sum(len(t.index) for t in state.tensors)
    if goal is not None:
        # the last round cannot be corrected: keep back what its codewords may vary by
        goal -= 10.0 * math.sqrt(total / (rounds if feed is not None else 1))
        if saved is None:
            _check_affordable(model, state, coder, goal, side)
    optimizer = make_optimizer(model, learning_rate)
    rounds = max(1, min(rounds, total)) if feed is not None else 1
    device = next(model.parameters()).device
    model.train()
    with seeded(seed, device), tqdm(total=total, disable=not progress, file=sys.stderr, desc="encode", unit="block") as bar:
        if saved is not None:
            _resume(saved, optimizer, state)
        codebook = Codebook(seed)
        while _num_coded(state) < total:
            fitting = coder if goal is None else coder.shortened(_bits_over_per_block(state, coder, goal))
            _code_round(state, fitting, seed, codebook, -(-(total - _num_coded(state)) // max(rounds - state.round, 1)))
            state.round += 1
            spent = _spent_bits(state, coder)
            if feed is not None and loss is not None and _num_coded(state) < total:
                feed.restart()
                _set_rate(optimizer, learning_rate * (1.0 - (1.0 - _LAST_RATE) * _num_coded(state) / total))
                value = _refine(model, feed, loss, optimizer, state, coder, refine_steps, None if goal is None else goal - spent)
                state.history.append({"coded": _num_coded(state), "loss": value, "beta": state.steering.beta, "spent_bits": spent})
                bar.set_postfix_str(f"loss {value:.4f}, beta {state.steering.beta:.3g}, {(side + spent) / 8:,.0f} bytes so far")
            if checkpoint is not None and _num_coded(state) < total:
                content = {"stage": "encode", "settings": settings, "codes": {n: torch.from_numpy(c) for n, c in codes.items()}}
                checkpoints.write(Path(checkpoint), {**content, **_progress(model, optimizer, state)})
            bar.update(_num_coded(state) - bar.n)
    size = _assemble(archive, state)
    for depth, shortening in itertools.product((1, 4, total), np.arange(0.5, 5.1, 0.5)):
        if budget_bytes is None or size <= budget_bytes:
            break
        _code_again(state, depth, coder.shortened(float(shortening)), seed, codebook)
        size = _assemble(archive, state)
    archive.info = _account(state, archive, size, time.monotonic() - started)
    if budget_bytes is not None and size > budget_bytes:
        warnings.warn(f"the file takes {size} bytes, over the budget of {budget_bytes}", MiracleWarning, stacklevel=2)
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return archive


def compress(
    net: nn.Module,
    batches: Iterable | None = None,
    loss: Loss | None = None,
    *,
    budget: str | int,
    epochs: float = 30.0,
    coder: str | coders.Coder = "gprs",
    seed: int = 0,
    where: Callable[[str, nn.Module], bool] | None = None,
    per_unit: bool = False,
    checkpoint: str | Path | None = None,
    fit_options: dict[str, Any] | None = None,
    encode_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> Archive:
    """Convert + fit + encode: a trained network becomes an archive of at most `budget`.

    Args:
        net: a trained network; it is left alone.
        batches: iterable of (inputs, targets): the training set.
        loss: `loss(outputs, targets)` -> mean negative log-likelihood of the batch, nats.
        budget: size of the whole file, bytes or text such as "20 kB".
        epochs: passes over `batches` in `fit`.
        coder, seed: as in `encode`.
        where, per_unit: as in `convert`.
        checkpoint: where the state is kept; interrupted work resumes from "<checkpoint>.fit" and "<checkpoint>.encode".
        fit_options, encode_options: further keyword arguments of `fit` and `encode`.
        progress: show progress bars on stderr.

    Returns:
        The archive; `archive.info["fit"]` is the `FitReport` as a dictionary.

    Raises:
        MiracleError: see `convert`, `fit` and `encode`.

    Example:
        >>> archive = compress(net, loader, F.cross_entropy, budget="1.5 kB")  # doctest: +SKIP
    """
    if batches is None or loss is None:
        raise CodingError("compress() needs batches and a loss to train with: compress(net, loader, F.cross_entropy, budget=...)")
    model = convert(net, where=where, per_unit=per_unit)
    stage = {k: None if checkpoint is None else Path(f"{checkpoint}.{k}") for k in ("fit", "encode")}
    common: dict[str, Any] = {"coder": coder, "seed": seed, "progress": progress}
    report = fit(model, batches, loss, budget=budget, epochs=epochs, checkpoint=stage["fit"], **common, **(fit_options or {}))
    archive = encode(model, batches, loss, checkpoint=stage["encode"], **common, **(encode_options or {}))
    archive.info["fit"] = report.as_dict()
    if stage["fit"] is not None:
        stage["fit"].unlink(missing_ok=True)
    return archive


def _check_fresh(model: nn.Module) -> None:
    if any(bool(p.fixed.any()) for p in posteriors(model).values()):
        raise CodingError("this model is encoded already, its weights are fixed: convert and fit it again, or keep the first archive")


def _check_finite(model: nn.Module) -> None:
    for name, p in posteriors(model).items():
        if not bool(torch.isfinite(p.mean).all() & torch.isfinite(p.log_std).all()):
            raise CodingError(f"the posterior of {name} holds NaN or infinite values: training diverged; lower the learning rate")


def _affordable_block_bits(model: nn.Module, coder: coders.Coder, block_bits: float, goal: float) -> float:
    """With codewords of fixed length: the KL of a block, raised until there are no more blocks than codewords can be paid for."""
    if coder.fixed_length_bits is None:
        return block_bits
    kl_bits = kl_bits_by_tensor(model)
    counts = {name: p.mean.numel() for name, p in posteriors(model).items()}
    while block_bits < 1e6 and predicted_index_bits(kl_bits, counts, coder, block_bits) > goal:
        block_bits *= 1.01
    return block_bits


def _check_affordable(model: nn.Module, state: State, coder: coders.Coder, goal: float, side: float) -> None:
    """Refuse posteriors that are far too rich for the budget before the work is done, not after."""
    expected = predicted_index_bits(
        kl_bits_by_tensor(model), {str(t.posterior.name): t.place.size for t in state.tensors}, coder, state.block_bits
    )
    if expected > _STEERABLE * goal:
        raise BudgetError(
            f"the posteriors would take about {(expected + side) / 8:,.0f} bytes, the budget leaves {(goal + side) / 8:,.0f}: "
            "call fit(..., budget=...) with that budget and enough epochs first, or raise the budget"
        )


def _divide(model: nn.Module, archive: Archive, seed: int, block_bits: float, saved: dict[str, Any] | None) -> list[TensorBlocks]:
    """Partition every coded tensor into blocks; those of a resumed packaging as they were."""
    held = posteriors(model)
    result: list[TensorBlocks] = []
    for number, record in enumerate(archive.records):
        if record.kind != "coded":
            continue
        p = held[str(record.name)]
        units = np.repeat(record.prior_codes > 0, p.mean.numel() // len(record.prior_codes))
        free = np.flatnonzero(units)
        if saved is not None:
            blocks = len(saved["tensors"][len(result)]["index"])
        else:
            with torch.no_grad():
                blocks = num_blocks(float(p.kl()) / NATS_PER_BIT, len(free), block_bits)
        place = layout(seed, number, len(free), blocks)
        place = np.where(place >= 0, free[place] if len(free) else place, -1)
        zeros = np.zeros(blocks)
        coded = np.full(blocks, not len(free))
        result.append(TensorBlocks(number, p, place, np.ones(blocks, np.int64), coded, zeros.copy(), zeros.copy()))
    return result


def _num_coded(state: State) -> int:
    return sum(int(t.coded.sum()) for t in state.tensors)


def _gather(t: TensorBlocks, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, std and prior std of blocks `rows`, `[rows, d]`; a missing weight is its own prior and so weighs nothing."""
    place = torch.from_numpy(t.place[rows])
    inside, at = place >= 0, place.clamp_min(0)
    p = t.posterior
    prior = p.prior_std.expand_as(p.mean).flatten().cpu()[at].double()  # type: ignore[union-attr]
    mean, log_std = (v.detach().flatten().cpu()[at].double() for v in (p.mean, p.log_std))
    std = log_std.exp()
    prior = torch.where(inside, prior, 1.0)
    return torch.where(inside, mean, 0.0), torch.where(inside, std, 1.0), prior


def _code_round(state: State, coder: coders.Coder, seed: int, codebook: Codebook, count: int) -> None:
    """Code the `count` blocks of largest KL and fix them at what the decoder will give."""
    waiting: list[tuple[float, int, int]] = []
    for t in state.tensors:
        rows = np.flatnonzero(~t.coded)
        if len(rows):
            kl_bits = Blocks.of(*_gather(t, rows)).kl_nats().numpy() / NATS_PER_BIT
            waiting.extend((-float(bits), t.number, int(row)) for bits, row in zip(kl_bits, rows, strict=True))
    chosen = sorted(waiting)[:count]
    coded = []
    for t in state.tensors:
        rows = np.array(sorted(row for _, number, row in chosen if number == t.number), np.int64)
        if not len(rows):
            continue
        mean, std, prior = _gather(t, rows)
        words = coder.encode(mean, std, prior, seed=seed, tensor=t.number, blocks=rows, codebook=codebook)
        values = coder.decode(words, prior.numpy(), seed=seed, tensor=t.number, blocks=rows)
        inside = t.place[rows] >= 0
        t.posterior.fix(torch.from_numpy(t.place[rows][inside]), torch.from_numpy(values[inside]))
        t.index[rows], t.coded[rows] = words.index, True
        coded.append((t, rows))
        t.kl_bits[rows] = Blocks.of(mean, std, prior).kl_nats().numpy() / NATS_PER_BIT
        t.log2_ratio[rows] = words.log_ratio_nats / NATS_PER_BIT
    state.rounds.append(coded)


def _coded(state: State, key: str) -> np.ndarray:
    return np.concatenate([getattr(t, key)[t.coded] for t in state.tensors])


def _spent_bits(state: State, coder: coders.Coder) -> float:
    return float(coder.index_bits(_coded(state, "index")).sum())


def _expected_overhead(state: State, coder: coders.Coder, waiting_kl_bits: np.ndarray) -> float:
    """Bits over their KL that the codewords of the waiting blocks will take, together.

    A straight line in a block's KL, fitted to the blocks coded so far by ridge regression towards the coder's own
    prediction: in one index table, blocks of small KL cost more over their KL than those of large KL.
    """
    middle = state.block_bits
    prior = np.array([coder.predict_bits(middle) - middle, _OVERHEAD_SLOPE])
    kl_bits = _coded(state, "kl_bits")
    design = np.stack([np.ones_like(kl_bits), kl_bits - middle], 1)
    over = coder.index_bits(_coded(state, "index")) - kl_bits
    weight = np.diag([20.0, 20.0 * 16.0])  # as much as 20 blocks whose KL varies by 4 bits
    line = np.linalg.solve(design.T @ design + weight, design.T @ over + weight @ prior)
    return float(np.maximum(line[0] + line[1] * (waiting_kl_bits - middle), 0.0).sum())


def _set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group, factor in zip(optimizer.param_groups, (1.0, LOG_STD_RATE), strict=True):
        group["lr"] = factor * learning_rate


def _code_again(state: State, depth: int, coder: coders.Coder, seed: int, codebook: Codebook) -> None:
    """Code the blocks of the latest `depth` rounds once more, with another coder."""
    count = 0
    for t, rows in itertools.chain.from_iterable(state.rounds[-depth:]):
        inside = t.place[rows] >= 0
        t.posterior.release(torch.from_numpy(t.place[rows][inside]))
        t.coded[rows] = False
        count += len(rows)
    del state.rounds[-depth:]
    _code_round(state, coder, seed, codebook, count)


def _assemble(archive: Archive, state: State) -> int:
    """Put the indices into the archive; returns the size of the file, bytes."""
    for t in state.tensors:
        archive.records[t.number].index = t.index
    return archive.size_bytes


def _bits_over_per_block(state: State, coder: coders.Coder, goal: float) -> float:
    """By how much the codewords of the waiting blocks must be shorter than expected, each, for the file to meet its budget."""
    kl_bits = _waiting_kl_bits(state)
    expected = kl_bits.sum() + _expected_overhead(state, coder, kl_bits)
    return (expected - (goal - _spent_bits(state, coder))) / len(kl_bits)


def _waiting_kl_bits(state: State) -> np.ndarray:
    """KL of every block not coded yet, bits."""
    rows = [(t, np.flatnonzero(~t.coded)) for t in state.tensors]
    return np.concatenate([Blocks.of(*_gather(t, r)).kl_nats().numpy() / NATS_PER_BIT for t, r in rows if len(r)])


def _refine(
    model: nn.Module,
    feed: Feed,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    state: State,
    coder: coders.Coder,
    steps: int,
    left_bits: float | None,
) -> float:
    """Train the weights not coded yet; beta keeps their expected codewords at `left_bits`. Returns the mean loss.

    With codewords of fixed length there is nothing to save: beta keeps each block at the KL that its codeword can carry.
    """
    kl_bits = _waiting_kl_bits(state)
    if coder.fixed_length_bits is not None:
        overhead = 0.0
        left_bits = len(kl_bits) * state.block_bits
    else:
        overhead = _expected_overhead(state, coder, kl_bits)
    total, beta = 0.0, state.steering.beta
    for _ in range(steps):
        value, kl_nats = train_step(model, feed.next(), loss, optimizer, beta=beta, num_examples=feed.num_examples)
        total += value
        if left_bits is not None:
            beta = state.steering.update(kl_nats / NATS_PER_BIT + overhead, max(left_bits, len(kl_bits)))
    return total / steps


def _account(state: State, archive: Archive, size: int, seconds: float) -> dict[str, Any]:
    kl, ratio = _coded(state, "kl_bits"), _coded(state, "log2_ratio")
    blocks = max(len(kl), 1)
    index_bits = sum(r.bits for r in archive.records)
    return {
        "file_bytes": size,
        "blocks": len(kl),
        "index_bits": index_bits,
        "side_bits": 8 * size - index_bits,
        "kl_bits_per_block": float(kl.mean()) if len(kl) else 0.0,
        "codeword_bits_per_block": index_bits / blocks,
        "log2_ratio_per_block": float(ratio.mean()) if len(kl) else 0.0,
        "j_bits_per_block": index_bits / blocks - float(ratio.mean()) if len(kl) else 0.0,
        "beta": state.steering.beta,
        "seconds": seconds,
        "rounds": state.history,
    }


_KEPT = ("index", "coded", "kl_bits", "log2_ratio")


def _progress(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> dict[str, Any]:
    """What a resumed packaging needs, besides its settings."""
    return {
        "round": state.round, "beta": state.steering.beta, "history": state.history, "posteriors": checkpoints.posterior_state(model),
        "tensors": [{k: torch.from_numpy(getattr(t, k).copy()) for k in _KEPT} for t in state.tensors],
        "optimizer": optimizer.state_dict(), "generator": torch.get_rng_state(),
    }  # fmt: skip


def _resume(saved: dict[str, Any], optimizer: torch.optim.Optimizer, state: State) -> None:
    """Go on from what `_progress` gave; the posteriors are in place already."""
    for arrays, t in zip(saved["tensors"], state.tensors, strict=True):
        for key in _KEPT:
            setattr(t, key, arrays[key].numpy())
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["generator"])
    state.round, state.steering.beta, state.history = saved["round"], saved["beta"], saved["history"]
