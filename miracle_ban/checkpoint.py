"""The state of interrupted work on disk: written whole or not at all, read without running any code from it.

Leans on `layers` and `files`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CodingError
from .files import write_whole
from .layers import posteriors

_HELD = ("mean", "log_std", "fixed", "value", "prior_std")


def write(path: Path, content: dict[str, Any]) -> None:
    """Write numbers, strings, tensors, lists and dictionaries; the old file stays whole until the new one is.

    Raises:
        MiracleError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def read(path: Path, *, stage: str, expected: dict[str, Any]) -> dict[str, Any] | None:
    """What `write` wrote, or None if there is no such file.

    Args:
        path: the file.
        stage: "fit" or "encode": what the checkpoint must be of.
        expected: settings that must be the same as when it was written.

    Raises:
        CodingError: the file cannot be read, or belongs to other work.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, weights_only=True)
        settings = content["settings"]
    except Exception as error:  # torch raises whatever the damage leads to
        raise CodingError(f"cannot read the checkpoint {path} ({type(error).__name__}); delete it to begin again") from None
    if content.get("stage") != stage:
        raise CodingError(f"{path} is a checkpoint of {content.get('stage')}, not of {stage}: give each its own file")
    other = [f"{k} was {settings.get(k)!r}, now {v!r}" for k, v in expected.items() if settings.get(k) != v]
    if other:
        raise CodingError(f"the checkpoint {path} belongs to other work ({'; '.join(other)}): delete it, or give the same arguments again")
    return content


def posterior_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Copies of everything that the posteriors hold, by tensor."""
    return {n: {k: None if getattr(p, k) is None else getattr(p, k).detach().clone() for k in _HELD} for n, p in posteriors(model).items()}


def restore_posteriors(model: nn.Module, state: dict[str, dict[str, Any]]) -> None:
    """Put back what `posterior_state` gave, live shapes included.

    Raises:
        CodingError: the model has other tensors.
    """
    held = posteriors(model)
    if list(held) != list(state):
        raise CodingError("the checkpoint was made with another model: delete it to begin again")
    for name, p in held.items():
        for key, value in state[name].items():
            moved = value if value is None else value.to(p.mean.device)
            setattr(p, key, nn.Parameter(moved) if moved is not None and key in ("mean", "log_std") else moved)
