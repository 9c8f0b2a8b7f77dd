"""The state of interrupted work on disk: written whole or not at all, read without running any code from it.

Of many processes the first alone reads and writes. Leans on `layers`, `files` and `distributed`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import distributed
from .errors import CodingError
from .files import write_whole
from .layers import posteriors

_VERSION = 3  # of the content
_HELD = ("mean", "log_std", "fixed", "value", "prior_std")


def write(path: Path, content: dict[str, Any]) -> None:
    """Write numbers, strings, tensors, lists and dictionaries; the old file stays whole until the new one is.

    Raises:
        MiracleError: the file cannot be written.
    """

    def whole() -> None:
        buffer = io.BytesIO()
        torch.save({"version": _VERSION, **content}, buffer)
        write_whole(path, buffer.getvalue())

    distributed.first(whole)


def read(path: Path, *, stage: str, expected: dict[str, Any]) -> dict[str, Any] | None:
    """What `write` wrote, or None if there is no such file.

    Args:
        path: the file.
        stage: "fit", "harden", "encode", "packaged" or "rescale": what the checkpoint must be of.
        expected: settings that must be the same as when it was written.

    Raises:
        CodingError: the file cannot be read, or belongs to other work.
    """
    return distributed.first(lambda: _read(path, stage, expected))


def remove(path: Path) -> None:
    """Delete a checkpoint, if there is one."""
    distributed.first(lambda: path.unlink(missing_ok=True))


def _read(path: Path, stage: str, expected: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        settings = content["settings"]
    except Exception as error:  # torch raises whatever the damage leads to
        raise CodingError(f"cannot read the checkpoint {path} ({type(error).__name__}); delete it to begin again") from None
    if content.pop("version", None) != _VERSION:
        raise CodingError(f"the checkpoint {path} was written by another release: finish with that one, or delete it to begin again")
    if content.get("stage") != stage:
        raise CodingError(f"{path} is a checkpoint of {content.get('stage')}, not of {stage}: give each its own file")
    other = [f"{k} was {settings.get(k)!r}, now {v!r}" for k, v in expected.items() if settings.get(k) != v]
    if other:
        raise CodingError(f"the checkpoint {path} belongs to other work ({'; '.join(other)}): delete it, or give the same arguments again")
    return content


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The network's own buffers, such as statistics of norms; those of posteriors are left out."""
    inner = {id(b) for p in posteriors(model).values() for b in p.buffers()}
    return {name: b for name, b in model.named_buffers() if id(b) not in inner}


def model_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Copies of everything that training and packaging change: the posteriors by tensor, and the network's own buffers."""
    held = {n: {k: None if getattr(p, k) is None else getattr(p, k).detach().clone() for k in _HELD} for n, p in posteriors(model).items()}
    return {"posteriors": held, "buffers": {name: b.detach().clone() for name, b in buffers(model).items()}}


def restore_model(model: nn.Module, state: dict[str, dict[str, Any]]) -> None:
    """Put back what `model_state` gave, live shapes included.

    Raises:
        CodingError: the model has other tensors.
    """
    held, own = posteriors(model), buffers(model)
    if list(held) != list(state["posteriors"]) or list(own) != list(state["buffers"]):
        raise CodingError("the checkpoint was made with another model: delete it to begin again")
    for name, p in held.items():
        for key, value in state["posteriors"][name].items():
            moved = value if value is None else value.to(p.mean.device)
            setattr(p, key, nn.Parameter(moved) if moved is not None and key in ("mean", "log_std") else moved)
    with torch.no_grad():
        for name, value in state["buffers"].items():
            own[name].copy_(value)


def generator_state(device: torch.device) -> list[torch.Tensor]:
    """States of torch's generators that draws on `device` come from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def restore_generators(state: list[torch.Tensor], device: torch.device) -> None:
    """Put back what `generator_state` gave."""
    torch.set_rng_state(state[0])
    if device.type == "cuda" and len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)
