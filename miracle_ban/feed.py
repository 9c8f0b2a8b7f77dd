"""Batches from a user's loader, one after the other, the same again after an interruption, and shared out among processes.

Leans on `network` and `distributed`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .errors import MiracleError
from .network import examples_in


class Feed:
    """Endless batches from a loader that can be iterated again and again: (inputs, targets), moved to the model's device.

    Of several processes, those whose loader is the same take turns: rank r of R gets batches r, r + R, ... of each pass, whose order
    and other random numbers all of them draw alike; what is left of a pass that R does not divide is not used.

    Args:
        batches: an iterable of pairs, or of mappings that are both, with a length.
        num_examples: number of training examples; default `batches.num_examples`, `len(batches.dataset)`, or counted.
        sharded: whether each process has a loader of its own share; default if a sampler says that it is for several.
        seed: of the random numbers that processes with the same loader draw it with.
    """

    def __init__(
        self, batches: Iterable, device: torch.device, num_examples: int | None = None, *, sharded: bool | None = None, seed: int = 0
    ):
        if not isinstance(batches, Iterable):
            raise MiracleError(f"batches must be an iterable of (inputs, targets), such as a DataLoader, not {type(batches).__name__}")
        if isinstance(batches, Iterator):
            raise MiracleError("batches must be iterable more than once: pass a DataLoader or a list, not an iterator")
        self.batches, self.device = batches, device
        self.sharded = is_sharded(batches) if sharded is None else sharded
        self._turns, self._turn = (1, 0) if self.sharded else (distributed.world_size(), distributed.rank())
        self._draws = torch.Generator().manual_seed(seed).get_state() if self._turns > 1 else None
        if num_examples is not None and num_examples < 1:
            raise MiracleError(f"num_examples must be at least 1, not {num_examples}")
        self.num_examples = num_examples or self._count()
        self._source: Iterator | None = None
        self._passes = 0  # begun so far
        self.position = 0  # batches of this pass that were given

    def _count(self) -> int:
        given = getattr(self.batches, "num_examples", None)
        if given is None and hasattr(self.batches, "dataset"):
            given = len(self.batches.dataset)
        if given is None:
            given = sum(_batch_size(b) for b in self.batches)
            given = sum(distributed.gather(given)) if self.sharded else given
        if not given:
            raise MiracleError("batches holds no training examples")
        return int(given)

    @functools.cached_property
    def batches_per_pass(self) -> int:
        """Batches of one pass that this process gets: as many as every other."""
        whole = len(self.batches) if isinstance(self.batches, Sized) else sum(1 for _ in self.batches)
        if whole < self._turns:
            raise MiracleError(f"batches holds {whole} batch(es) for {self._turns} processes: make smaller batches, or use fewer processes")
        return min(distributed.gather(whole)) if self.sharded else whole // self._turns

    def restart(self) -> None:
        """Begin a new pass with the next batch."""
        self._source, self.position = None, 0

    def end_pass(self) -> None:
        """Begin a new pass with the next batch; a loader that has given all its batches sees its end, as in a loop over it."""
        if self._source is not None and self.position == self.batches_per_pass:
            with self._drawing():
                list(itertools.islice(self._source, self._turns))
        self.restart()

    def next(self) -> tuple[Any, Any]:
        """The next batch."""
        for _ in range(2):
            with self._drawing():
                if self._source is None:
                    self._begin_pass()
                found = list(itertools.islice(self._source, self._turns))  # type: ignore[arg-type]
            if len(found) == self._turns:
                inputs, targets = pair(found[self._turn])
                self.position += 1
                return _to(inputs, self.device), _to(targets, self.device)
            self.restart()
        raise MiracleError("batches is empty: it gave no batch at all")

    def _begin_pass(self) -> None:
        for own in _parts(self.batches):
            if callable(getattr(own, "set_epoch", None)):
                own.set_epoch(self._passes)
        self._source, self.position = iter(self.batches), 0
        self._passes += 1

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Processes with the same loader draw its random numbers alike, whatever noise of their own they draw in between."""
        if self._draws is None:
            yield
            return
        own = torch.get_rng_state()
        torch.set_rng_state(self._draws)
        try:
            yield
        finally:
            self._draws = torch.get_rng_state()
            torch.set_rng_state(own)

    def state(self) -> dict[str, Any]:
        """What the order of later passes depends on, besides torch's own generator."""
        return {"passes": self._passes, "draws": self._draws, "generators": [g.get_state() for g in _generators(self.batches)]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, with a new pass."""
        self.restart()
        self._passes, self._draws = state["passes"], state["draws"]
        for generator, value in zip(_generators(self.batches), state["generators"], strict=False):
            generator.set_state(value)


def pair(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch; a mapping is both.

    Raises:
        MiracleError: it is neither a pair nor a mapping.
    """
    if isinstance(batch, Mapping):
        return batch, batch
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise MiracleError("each batch must be a pair (inputs, targets), or a mapping that holds both")
    return batch[0], batch[1]


def _parts(batches: Any) -> list[Any]:
    """A loader and its samplers."""
    sampler, batch_sampler = getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
    found = [batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    return [p for i, p in enumerate(found) if p is not None and not any(p is q for q in found[:i])]


def _generators(batches: Any) -> list[torch.Generator]:
    """Generators of their own that a loader and its samplers draw from."""
    found = [getattr(p, "generator", None) for p in _parts(batches)]
    return [g for i, g in enumerate(found) if isinstance(g, torch.Generator) and not any(g is h for h in found[:i])]


def is_sharded(batches: Any) -> bool:
    """Whether a loader says that it gives one process its share: torch's DistributedSampler, or what Accelerate puts in its place."""
    owners = [*_parts(batches), getattr(batches, "dataset", None), getattr(batches, "state", None)]
    return any(_processes(own, key) > 1 for own in owners for key in ("num_replicas", "num_processes"))


def _processes(owner: Any, key: str) -> int:
    value = getattr(owner, key, 1)
    return value if isinstance(value, int) else 1


def _batch_size(batch: Any) -> int:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Sized):
        raise MiracleError(f"cannot count the examples of a batch whose inputs are {type(first).__name__}: pass num_examples")
    return examples_in(first)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to(v, device) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_to(v, device) for v in value)
    if type(value) is dict:
        return {key: _to(v, device) for key, v in value.items()}
    if isinstance(value, Mapping) and hasattr(value, "to"):  # as tokenizers give
        return value.to(device)
    return value
