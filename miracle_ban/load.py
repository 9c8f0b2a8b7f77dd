"""From an `Archive` to torch: to a state dict, or into an ordinary network. Imports nothing of training.

Leans on `decode`, which does the decoding, `network` and torch.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn

from .container import RAW_DTYPES, Archive
from .decode import bind_entries, find, open, stored_array, stored_arrays
from .errors import FileFormatError, MismatchError
from .network import tensors, unwrapped

Module = TypeVar("Module", bound=nn.Module)


def decode_one(archive: Archive, name: str) -> Tensor:
    """Decode one tensor by name.

    Raises:
        MismatchError: no tensor has that name, or the file carries none.
    """
    number = find(archive, name)
    return _tensor(archive, number, stored_array(archive, number))


def _tensor(archive: Archive, number: int, array: np.ndarray) -> Tensor:
    record = archive.records[number]
    source = archive.records[record.alias] if record.kind == "alias" else record
    tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    if source.kind == "raw" and source.raw_dtype == "bfloat16":
        tensor = tensor.view(torch.bfloat16)
    wanted = getattr(torch, str(record.dtype), None) if record.dtype in RAW_DTYPES else None
    if not isinstance(wanted, torch.dtype):
        raise FileFormatError(f"tensor {record.name} is of dtype {record.dtype!r}, which this torch does not have")
    return tensor.to(wanted)


def bind(archive: Archive, model: nn.Module) -> Archive:
    """Give the archive the names, shapes and dtypes of `model`, after checking that it belongs to it.

    Raises:
        MismatchError: the file was made for another architecture.
    """
    model = unwrapped(model)
    entries = [(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors(model).items()]
    return bind_entries(archive, entries, whose=type(model).__name__)


def decode(archive: Archive, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Decode every tensor.

    Args:
        archive: from `encode` or `open`.
        model: the architecture, for a file that carries no names; its weights are not touched.

    Returns:
        The state dict of the ordinary network: names, shapes and dtypes as in the original.

    Raises:
        MismatchError: the file carries no names and no model is given, or the model is another one.

    Example:
        >>> weights = decode(open("net.mban"))  # doctest: +SKIP
    """
    if model is not None:
        bind(archive, model)
    archive.require_names()
    return {str(archive.records[i].name): _tensor(archive, i, array) for i, array in enumerate(stored_arrays(archive))}


@overload
def load(path: str | os.PathLike[str], model: None = None, *, device: torch.device | str | None = None) -> dict[str, Tensor]: ...
@overload
def load(path: str | os.PathLike[str], model: Module, *, device: torch.device | str | None = None) -> Module: ...
def load(path, model=None, *, device=None):
    """Decode a `.mban` file into `model`, in place, and return it: an ordinary network with ordinary weights.

    Args:
        path: the file.
        model: an instance of the architecture that was compressed, compiled or in (Distributed)DataParallel if you like; its
            weights are overwritten. None returns the state dict, of a file that carries names and shapes.
        device: move the model, or the tensors, there; default leaves them where they are.

    Raises:
        FileFormatError: the file is damaged.
        MismatchError: the file was made for another architecture, or carries no names and no model is given, or the model is
            on the meta device.
    """
    state = decode(open(path), model)
    if model is None:
        return {name: t if device is None else t.to(device) for name, t in state.items()}
    restore(model, state)
    return model if device is None else model.to(device)


def restore(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """`model.load_state_dict` of plain tensors; what `model` keeps of another kind, and which version of itself wrote that, is its own.

    Raises:
        MismatchError: the model is on the meta device, where there are no weights to overwrite.
    """
    model = unwrapped(model)
    own = model.state_dict()
    others = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
    if any(t.is_meta for name, t in own.items() if name not in others):
        raise MismatchError(f"this {type(model).__name__} is on the meta device and has no weights to overwrite: build it on the cpu")
    versioned = OrderedDict(others | dict(state))
    versioned._metadata = getattr(own, "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(versioned, strict=strict)
