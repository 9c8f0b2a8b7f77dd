"""Many processes on one network, by torch.distributed (`torchrun`). Without a process group everything here does nothing.

All ranks hold the same posteriors at every step. In `fit` each sees batches and noise of its own and the gradients are averaged, in
one flat message: what is steered and dropped follows from averaged numbers, so it is the same everywhere (DistributedDataParallel
would have to be built anew whenever units are dropped, and ties the averaging to one module's forward). In `encode` the search is
dealt out and its results are gathered. Within `apart` every rank is on its own and does all the work itself. Leans on torch only.
"""

from __future__ import annotations

import contextlib
import heapq
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import MiracleError

Item = TypeVar("Item")
Result = TypeVar("Result")

_apart: ContextVar[bool] = ContextVar("apart", default=False)


def world_size() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return dist.get_rank() if _together() else 0


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and not _apart.get()


@contextlib.contextmanager
def apart(on: bool = True) -> Iterator[None]:
    """Within, if `on`, work as if there were no other process."""
    token = _apart.set(on or _apart.get())
    try:
        yield
    finally:
        _apart.reset(token)


def own_seed(seed: int) -> int:
    """A seed for this rank's own random numbers; rank 0 has `seed` itself."""
    return (seed + 0x9E3779B97F4A7C15 * rank()) % (1 << 64)


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    """Failures of the connection, such as the death of another process, as errors that say what to do."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise MiracleError(
            f"rank {rank()} of {world_size()} lost the others ({first}): a process has died, or did not make this call too; "
            "start all of them again, with the same checkpoint if there is one"
        ) from error


def mean_gradients(optimizer: torch.optim.Optimizer, numbers: Sequence[float] = ()) -> list[float]:
    """Put the mean over the ranks in place of each gradient; returns the means of `numbers`. One message."""
    if world_size() == 1:
        return list(numbers)
    owners = [p for group in optimizer.param_groups for p in group["params"]]
    for p in owners:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    found = [p.grad for p in owners]
    device = found[0].device
    flat = torch.cat([torch.tensor(numbers, dtype=torch.float64, device=device).to(found[0].dtype), *(g.flatten() for g in found)])
    with _talking():
        dist.all_reduce(flat)
    flat /= world_size()
    means, *parts = flat.split([len(numbers), *(g.numel() for g in found)])
    for gradient, part in zip(found, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return means.tolist()


def mean(values: Tensor) -> Tensor:
    """The mean of a tensor over the ranks."""
    if world_size() == 1:
        return values
    total = values.clone()
    with _talking():
        dist.all_reduce(total)
    return total / world_size()


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in their order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _talking():
        dist.all_gather_object(values, value)
    return values


def _settled(outcomes: Iterable[tuple[Any, Exception | None]]) -> list[Any]:
    """The results; raises on every rank what was raised on one."""
    results = []
    for number, (result, error) in enumerate(outcomes):
        if error is not None:
            raise error if isinstance(error, MiracleError) else MiracleError(f"rank {number} failed: {type(error).__name__}: {error}")
        results.append(result)
    return results


def _tried(function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # it is raised on all ranks, or the others would wait for this one
        return None, error


def first(function: Callable[[], Result]) -> Result:
    """What `function` gives on rank 0, on every rank; it is called there alone."""
    if world_size() == 1:
        return function()
    outcome = [_tried(function) if rank() == 0 else None]
    with _talking():
        dist.broadcast_object_list(outcome)
    return _settled(o for o in outcome if o is not None)[0]


def spread(function: Callable[[Item], Result], items: Iterable[Item], work: Sequence[float] | None = None) -> list[Result]:
    """`[function(i) for i in items]`: each is called on one rank, and every rank gets all results.

    Args:
        function: must give the same on whichever rank.
        items: the same on every rank.
        work: about how long each takes, in any unit; default all alike.
    """
    items, world = list(items), world_size()
    if world == 1:
        return [function(item) for item in items]
    owner, busy = [0] * len(items), [(0.0, r) for r in range(world)]
    for i in sorted(range(len(items)), key=lambda i: -work[i] if work is not None else 0.0):  # the longest first, to who is free first
        until, owner[i] = heapq.heappop(busy)
        heapq.heappush(busy, (until + (work[i] if work is not None else 1.0), owner[i]))
    me = rank()
    own = _tried(lambda: {i: function(item) for i, item in enumerate(items) if owner[i] == me})
    found: dict[int, Result] = {}
    for part in _settled(gather(own)):
        found.update(part)
    return [found[i] for i in range(len(items))]


@torch.no_grad()
def synchronise(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by what rank 0 has in them.

    Raises:
        MiracleError: the ranks' tensors differ in shape or dtype.
    """
    held = list(tensors)
    if world_size() == 1 or not held:
        return
    shapes = [(tuple(t.shape), str(t.dtype)) for t in held]
    if any(other != shapes for other in gather(shapes)):
        raise MiracleError("the ranks hold different networks: build and convert the same one, with the same arguments, on each")
    with _talking():
        for t in (t for t in held if t.numel()):
            whole = t.contiguous()
            dist.broadcast(whole.view(-1).view(torch.uint8), 0)
            if whole is not t:
                t.copy_(whole)


def check_equal(tensors: Iterable[Tensor], what: str) -> None:
    """Compare a checksum of tensors over the ranks.

    Raises:
        MiracleError: they differ.
    """
    if world_size() == 1:
        return
    sums = [int(t.detach().contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64)) for t in tensors if t.numel()]
    check_same(zlib.crc32(repr(sums).encode()), what)


def check_same(value: Any, what: str) -> None:
    """Compare a small value over the ranks.

    Raises:
        MiracleError: it differs.
    """
    found = gather(value)
    if any(other != found[0] for other in found):
        text = ", ".join(f"{v}" for v in found[:8])
        raise MiracleError(f"{what}: the ranks differ ({text}); give every rank the same network and arguments, and use like machines")
