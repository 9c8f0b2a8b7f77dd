"""A course of training that can be interrupted: steps under a progress bar, a history, a checkpoint after every pass.

`fit`, `harden` and `rescale` say what a step is; what is around the steps is here. Leans on `checkpoint`, `distributed` and `feed`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from . import checkpoint as checkpoints
from . import distributed
from .errors import MiracleError
from .feed import Feed

Row = dict[str, float]
_WARM_UP = 0.02  # share of the steps


class Course(Protocol):
    """What is trained, and how one step of it goes."""

    feed: Feed
    step: int  # steps that are done

    def advance(self) -> Row | None:
        """One step; returns a row of the history where it is time for one."""

    def words(self, row: Row) -> str:
        """A row, for the progress bar."""

    def state(self) -> dict[str, Any]:
        """All that the steps to come depend on, besides the feed and torch's generators; between two passes."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""


def run(
    course: Course,
    steps: int,
    *,
    stage: str,
    settings: dict[str, Any],
    saved: dict[str, Any] | None,
    checkpoint: str | Path | None,
    device: torch.device,
    started: float,
    progress: bool,
    callback: Callable[[Row], None] | None = None,
) -> tuple[list[Row], float]:
    """Advance until `steps` are done.

    Args:
        course: goes on from `saved`, if there is any.
        steps: in all.
        stage, settings: of the checkpoint.
        saved: what `checkpoint.read` gave.
        checkpoint: file that keeps the state after every pass and at the end.
        device: the generators of which steps draw from.
        started: when work began, as `time.monotonic` says.
        progress: show a bar on stderr; of several processes on the first.
        callback: called with each row.

    Returns:
        The history, and when work would have begun without interruption.
    """
    feed = course.feed
    history: list[Row] = []
    if saved is not None:
        course.restore(saved["course"])
        feed.restore(saved["feed"])
        checkpoints.restore_generators(saved["generators"][distributed.rank()], device)
        history, started = saved["history"], started - saved["seconds"]
    shown = progress and distributed.rank() == 0
    with tqdm(total=steps, initial=course.step, disable=not shown, file=sys.stderr, desc=stage, unit="step") as bar:
        while course.step < steps:
            row = course.advance()
            bar.update()
            if row is not None:
                history.append(row)
                bar.set_postfix_str(course.words(row), refresh=False)
                if callback is not None:
                    callback(row)
            if checkpoint is not None and (feed.position == feed.batches_per_pass or course.step == steps):
                feed.end_pass()
                content = {
                    "stage": stage, "settings": settings, "course": course.state(), "feed": feed.state(), "history": history,
                    "generators": distributed.gather(checkpoints.generator_state(device)), "seconds": time.monotonic() - started,
                }  # fmt: skip
                checkpoints.write(Path(checkpoint), content)
    return history, started


def check_loss(value: Any) -> None:
    """Raise unless a loss can be trained on."""
    if not (isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad):
        raise MiracleError("loss(outputs, targets) must return a scalar tensor that depends on the outputs: do not detach them")


def warm_cosine(part: float) -> float:
    """Learning rate over the largest when `part` of the steps is done."""
    return min((part + 1e-3) / _WARM_UP, 0.5 * (1.0 + math.cos(math.pi * part)))
