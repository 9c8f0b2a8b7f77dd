"""Relative entropy coders: `get(name)` gives one; every one has `encode`, `decode` and `expected_bits`.

The numbers in `IDS` are part of the file format and never change.
"""

from __future__ import annotations

from typing import Any

from ..container import CODERS
from ..errors import MismatchError
from .base import BlockCoder, Coder, Codewords, Looked
from .branch_and_bound import BranchAndBoundAStar, BranchAndBoundGreedyPoisson
from .gprs import GreedyPoisson, ParallelGreedyPoisson
from .minimal_random import MinimalRandom
from .race import AStar, OrderedRandom
from .rejection import Rejection
from .trellis import Trellis

__all__ = [
    "IDS", "AStar", "BlockCoder", "BranchAndBoundAStar", "BranchAndBoundGreedyPoisson", "Coder", "Codewords", "GreedyPoisson",
    "Looked", "MinimalRandom", "OrderedRandom", "ParallelGreedyPoisson", "Rejection", "Trellis", "get",
]  # fmt: skip

_CLASSES: dict[str, type[Coder]] = {
    c.name: c
    for c in (
        GreedyPoisson, MinimalRandom, Rejection, OrderedRandom, AStar, Trellis, ParallelGreedyPoisson, BranchAndBoundGreedyPoisson,
        BranchAndBoundAStar,
    )
}  # fmt: skip
IDS = {name: CODERS.index(name) for name in _CLASSES}


def get(name: str, **options: Any) -> Coder:
    """The coder called `name`.

    "gprs", "rejection", "minimal-random", "ordered-random", "a-star" and "trellis" code blocks of any size; "parallel-gprs"
    is GPRS by several searches side by side; "branch-and-bound-gprs" and "branch-and-bound-a-star" code single weights.

    Args:
        name: see above.
        options: the coder's own, such as `extra_bits`; see its class.

    Raises:
        MismatchError: no coder has that name, or it has no such option.

    Example:
        >>> get("gprs", extra_bits=8).name
        'gprs'
    """
    if name not in _CLASSES:
        raise MismatchError(f"no coder is called {name!r}; there are {', '.join(_CLASSES)}")
    try:
        return _CLASSES[name](**options)
    except TypeError as error:
        raise MismatchError(f"coder {name!r}: {error}") from None
