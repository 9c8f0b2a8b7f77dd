"""Relative entropy coders: `get(name)` gives one; every one has `encode`, `decode` and `expected_bits`.

The numbers in `IDS` are part of the file format and never change.
"""

from __future__ import annotations

from typing import Any

from ..errors import MismatchError
from .base import Coder, Codewords
from .gprs import GreedyPoisson
from .minimal_random import MinimalRandom

__all__ = ["IDS", "Coder", "Codewords", "GreedyPoisson", "MinimalRandom", "get"]

IDS = {"gprs": 0, "minimal-random": 1}
_CLASSES: dict[str, type[Coder]] = {"gprs": GreedyPoisson, "minimal-random": MinimalRandom}


def get(name: str, **options: Any) -> Coder:
    """The coder called `name` ("gprs", "minimal-random"), with its own options.

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
