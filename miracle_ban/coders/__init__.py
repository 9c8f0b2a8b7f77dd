"""Relative entropy coders: `get(name)` gives one; every one has `encode`, `decode` and `expected_bits`.

The numbers in `IDS` are part of the file format and never change.
"""

from __future__ import annotations

from typing import Any

from ..container import CODERS
from ..errors import MismatchError
from .base import Coder, Codewords
from .gprs import GreedyPoisson
from .minimal_random import MinimalRandom
from .race import AStar, OrderedRandom
from .rejection import Rejection

__all__ = ["IDS", "AStar", "Coder", "Codewords", "GreedyPoisson", "MinimalRandom", "OrderedRandom", "Rejection", "get"]

_CLASSES: dict[str, type[Coder]] = {c.name: c for c in (GreedyPoisson, MinimalRandom, Rejection, OrderedRandom, AStar)}
IDS = {name: CODERS.index(name) for name in _CLASSES}


def get(name: str, **options: Any) -> Coder:
    """The coder called `name`: "gprs", "minimal-random", "rejection", "ordered-random" or "a-star".

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
