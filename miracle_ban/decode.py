"""From an `Archive` to weights: to a state dict, or into an ordinary network. Imports nothing of training.

Every weight is float32(prior std) * float32(candidate value), one rounded product of two exact numbers, so the bits are the
same on every machine. Leans on `container`, `blocks`, `tree`, `trellis` and, for the public functions, torch.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn

from .blocks import candidate_values, layout
from .container import RAW_DTYPES, TREES, Archive, Record, check_shapes, fingerprint, live_count, parse, prior_std, resolve_kept
from .errors import FileFormatError, MiracleError, MismatchError
from .files import write_whole
from .tree import node_values
from .trellis import decode_steps

Module = TypeVar("Module", bound=nn.Module)


def decode_array(archive: Archive, number: int) -> np.ndarray:
    """Decode tensor `number` of an archive whose shapes are known; numpy, coded tensors as float32.

    bfloat16 comes as uint16 bit patterns.
    """
    record = archive.records[number]
    shape = record.shape or ()
    if record.kind == "alias":
        return decode_array(archive, record.alias)
    if record.kind == "constant":
        return np.full(shape, record.constant, np.float32)
    if record.kind == "raw":
        stored = {"bfloat16": "uint16", "opaque": "uint8"}.get(record.raw_dtype, record.raw_dtype)
        return np.frombuffer(record.data, np.dtype(stored).newbyteorder("<")).astype(stored).reshape(shape)
    return _decode_coded(archive, number, record, shape)


def _decode_coded(archive: Archive, number: int, record: Record, shape: tuple[int, ...]) -> np.ndarray:
    live = resolve_kept(archive.records[: number + 1])[number]
    count = live_count(record, live)
    weights = np.zeros(live, np.float32)
    if count:
        std = prior_std(record.prior_codes)
        coded = (_trellis_values if record.rate is not None else _block_values)(archive, number, count)
        if len(std) == 1:
            weights = (coded * std[0]).reshape(live)
        else:
            used = std > 0
            weights[used] = coded.reshape(-1, *live[1:]) * std[used].reshape(-1, *[1] * (len(live) - 1))
    full = np.zeros(shape, np.float32)
    full[tuple(slice(k) for k in live)] = weights
    return full


def _block_values(archive: Archive, number: int, count: int) -> np.ndarray:
    """The coded weights of a tensor in units of the prior, float32 `[count]`."""
    record = archive.records[number]
    place = layout(archive.seed, number, count, len(record.index))
    numbers = np.arange(len(record.index))
    if archive.coder in TREES:
        drawn = node_values(archive.seed, number, numbers, record.index)
    else:
        drawn = candidate_values(archive.seed, number, numbers, record.index, place.shape[1])
    coded = np.empty(count, np.float32)
    inside = place >= 0
    coded[place[inside]] = drawn[inside]
    return coded


def _trellis_values(archive: Archive, number: int, count: int) -> np.ndarray:
    """As `_block_values`."""
    path, rate = archive.path, archive.records[number].rate
    assert path is not None
    assert rate is not None
    return decode_steps(archive.seed, number, rate, path.memory, path.words, path.starts[number], path.log2_frames)


def decode_one(archive: Archive, name: str) -> Tensor:
    """Decode one tensor by name.

    Raises:
        MismatchError: no tensor has that name, or the file carries none.
    """
    keys = archive.keys()
    if name not in keys:
        raise MismatchError(f"the file holds no tensor {name!r}; it holds {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}")
    return _tensor(archive, keys.index(name))


def _tensor(archive: Archive, number: int) -> Tensor:
    record = archive.records[number]
    array = decode_array(archive, number)
    source = archive.records[record.alias] if record.kind == "alias" else record
    tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    if source.kind == "raw" and source.raw_dtype == "bfloat16":
        tensor = tensor.view(torch.bfloat16)
    wanted = getattr(torch, str(record.dtype), None) if record.dtype in RAW_DTYPES else None
    if not isinstance(wanted, torch.dtype):
        raise FileFormatError(f"tensor {record.name} is of dtype {record.dtype!r}, which this torch does not have")
    return tensor.to(wanted)


def bind(archive: Archive, model: nn.Module) -> Archive:
    """Give the archive the names and shapes of `model`, after checking that it belongs to it.

    Raises:
        MismatchError: the file was made for another architecture.
    """
    state = model.state_dict()
    entries = [(name, tuple(t.shape)) for name, t in state.items()]
    if len(entries) != len(archive.records) or fingerprint(entries) != archive.fingerprint:
        raise MismatchError(_difference(archive, entries, type(model).__name__))
    for record, (name, t) in zip(archive.records, state.items(), strict=True):
        record.name, record.shape, record.dtype = name, tuple(t.shape), str(t.dtype).removeprefix("torch.")
    check_shapes(archive)
    return archive


def _difference(archive: Archive, entries: list[tuple[str, tuple[int, ...]]], model: str) -> str:
    text = (
        f"the file was made for another architecture than this {model}: it holds {len(archive.records)} tensors, the model {len(entries)}"
    )
    if all(r.name is not None for r in archive.records):
        ours = {r.name: r.shape for r in archive.records}
        theirs = dict(entries)
        missing = [f"{n} {s}" for n, s in theirs.items() if ours.get(n) != s]
        extra = [f"{n} {s}" for n, s in ours.items() if theirs.get(str(n)) != s]
        text += f"; only in the model: {', '.join(missing[:5]) or 'none'}; only in the file: {', '.join(extra[:5]) or 'none'}"
    return text + ". Build the model exactly as it was when the file was made"


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
    return {str(r.name): _tensor(archive, i) for i, r in enumerate(archive.records)}


def open(path: str | os.PathLike[str]) -> Archive:
    """Read a `.mban` file and check it; decodes nothing. `open(path)["layer.weight"]` decodes one tensor.

    Raises:
        FileFormatError: not a `.mban` file, a newer version, or damaged.
        MiracleError: the file cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise MiracleError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        return parse(data)
    except FileFormatError as error:
        raise type(error)(f"{path}: {error}") from None


@overload
def load(path: str | os.PathLike[str], model: None = None, *, device: torch.device | str | None = None) -> dict[str, Tensor]: ...
@overload
def load(path: str | os.PathLike[str], model: Module, *, device: torch.device | str | None = None) -> Module: ...
def load(path, model=None, *, device=None):
    """Decode a `.mban` file into `model`, in place, and return it: an ordinary network with ordinary weights.

    Args:
        path: the file.
        model: an instance of the architecture that was compressed; its weights are overwritten. None returns the state dict,
            of a file that carries names and shapes.
        device: move the model, or the tensors, there; default leaves them where they are.

    Raises:
        FileFormatError: the file is damaged.
        MismatchError: the file was made for another architecture, or carries no names and no model is given.
    """
    state = decode(open(path), model)
    if model is None:
        return {name: t if device is None else t.to(device) for name, t in state.items()}
    restore(model, state)
    return model if device is None else model.to(device)


def restore(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """`model.load_state_dict` of plain tensors: modules that ask which version of themselves wrote them are told their own."""
    versioned = OrderedDict(state)
    versioned._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(versioned, strict=strict)


def save(archive: Archive, path: str | os.PathLike[str]) -> int:
    """Write the archive to `path` and return its size in bytes.

    The old file stays whole until the new one is (`files.write_whole`).

    Raises:
        MiracleError: the folder does not exist or is not writable, or the disk is full.
    """
    return write_whole(Path(path), archive.to_bytes())
