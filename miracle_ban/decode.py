"""Frozen (format 1). From a file to numpy arrays; needs numpy and the standard library alone.

    archive = open("net.mban")              the file, checked; nothing is decoded yet
    archive.keys()                          names, if the file carries them
    decode_array(archive, "conv1.weight")   one tensor
    decode_arrays(archive)                  all of them, by name
    decode_arrays(archive, entries)         of a file that carries no names: [("conv1.weight", (20, 1, 5, 5), "float32"), ...]

Every weight is float32(prior std) * float32(candidate value), one rounded product of two exact numbers, so the bits are the
same on every machine. Leans on `container`, `blocks`, `tree`, `trellis`, `files` and numpy; `load` makes torch tensors of it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .blocks import candidate_values, layout
from .container import RAW_DTYPES, TREES, Archive, check_shapes, fingerprint, live_count, parse, prior_std, rates, resolve_kept
from .errors import FileFormatError, MiracleError, MismatchError
from .files import write_whole
from .tree import node_values
from .trellis import decode_steps, first_bits

Entry = tuple[str, tuple[int, ...], str]  # name, shape, dtype of a tensor: the dtypes are those of `container.RAW_DTYPES`


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


def save(archive: Archive, path: str | os.PathLike[str]) -> int:
    """Write the archive to `path` and return its size in bytes.

    The old file stays whole until the new one is (`files.write_whole`).

    Raises:
        MiracleError: it is no archive, the folder does not exist or is not writable, or the disk is full.
    """
    if not isinstance(archive, Archive):
        raise MiracleError(f"an archive is wanted, from compress or encode, not a value of type {type(archive).__name__}")
    return write_whole(Path(path), archive.to_bytes())


def bind_entries(archive: Archive, entries: Iterable[Entry], *, whose: str = "architecture") -> Archive:
    """Give the archive the names, shapes and dtypes of the architecture that it was made for, and return it.

    Raises:
        MismatchError: the file was made for another architecture; `whose` is what the message calls the one given.
        CorruptError: a record does not fit its shape. The archive stays as it was either way.
    """
    entries = list(entries)
    heads = [(name, tuple(shape)) for name, shape, _ in entries]
    if len(heads) != len(archive.records) or fingerprint(heads) != archive.fingerprint:
        raise MismatchError(_difference(archive, heads, whose))
    before = [(r.name, r.shape, r.dtype) for r in archive.records]
    try:
        _name(archive, entries)
        check_shapes(archive)
    except MiracleError:
        _name(archive, before)
        raise
    return archive


def _name(archive: Archive, entries: Iterable[tuple[str | None, tuple[int, ...] | None, str | None]]) -> None:
    for record, (name, shape, dtype) in zip(archive.records, entries, strict=True):
        record.name, record.shape, record.dtype = name, None if shape is None else tuple(shape), dtype


def _difference(archive: Archive, heads: list[tuple[str, tuple[int, ...]]], whose: str) -> str:
    text = f"the file was made for another architecture than this {whose}: it holds {len(archive.records)} tensors, the model {len(heads)}"
    if all(r.name is not None for r in archive.records):
        ours = {r.name: r.shape for r in archive.records}
        theirs = dict(heads)
        missing = [f"{n} {s}" for n, s in theirs.items() if ours.get(n) != s]
        extra = [f"{n} {s}" for n, s in ours.items() if theirs.get(str(n)) != s]
        text += f"; only in the model: {', '.join(missing[:5]) or 'none'}; only in the file: {', '.join(extra[:5]) or 'none'}"
    return text + ". Build the model exactly as it was when the file was made"


def decode_arrays(archive: Archive, entries: Iterable[Entry] | None = None) -> dict[str, np.ndarray]:
    """Decode every tensor to numpy arrays, without PyTorch.

    Args:
        archive: from `open`.
        entries: name, shape and dtype of each tensor in the order of the state dict, for a file that carries none.

    Returns:
        Arrays by name, in the order of the file and the tensors' own shapes and dtypes; of bfloat16, which numpy does not
        have, the same values in float32.

    Raises:
        MismatchError: the file carries no names and no entries are given, or they are another network's.
        FileFormatError: a tensor's dtype is none that this package knows.

    Example:
        >>> arrays = decode_arrays(open("net.mban"))  # doctest: +SKIP
    """
    if entries is not None:
        bind_entries(archive, entries)
    archive.require_names()
    return {str(archive.records[i].name): _own(archive, i, array) for i, array in enumerate(stored_arrays(archive))}


def decode_array(archive: Archive, name: str) -> np.ndarray:
    """Decode one tensor by name to a numpy array, as `decode_arrays` gives it.

    Raises:
        MismatchError: no tensor has that name, or the file carries none.
        FileFormatError: the tensor's dtype is none that this package knows.
    """
    number = find(archive, name)
    return _own(archive, number, stored_array(archive, number))


def find(archive: Archive, name: str) -> int:
    """Number of the tensor called `name`.

    Raises:
        MismatchError: there is none, or the file carries no names.
    """
    keys = archive.keys()
    if name not in keys:
        raise MismatchError(f"the file holds no tensor {name!r}; it holds {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}")
    return keys.index(name)


def stored_arrays(archive: Archive) -> Iterator[np.ndarray]:
    """Each tensor as the file has it: coded and constant ones in float32, raw ones as stored, bfloat16 as its bits in uint16."""
    live, first = resolve_kept(archive.records), _first_bits(archive)
    again = {r.alias: np.zeros(0, np.float32) for r in archive.records if r.kind == "alias"}
    for i, r in enumerate(archive.records):
        array = again[r.alias].copy() if r.kind == "alias" else _stored(archive, i, live[i], next(first) if r.rate is not None else None)
        if i in again:
            again[i] = array
        yield array


def stored_array(archive: Archive, number: int) -> np.ndarray:
    """Tensor `number` alone, as `stored_arrays` gives it."""
    record = archive.records[number]
    if record.kind == "alias":
        return stored_array(archive, record.alias)
    before = sum(r.rate is not None for r in archive.records[:number])
    first = next(itertools.islice(_first_bits(archive), before, None)) if record.rate is not None else None
    return _stored(archive, number, resolve_kept(archive.records[: number + 1])[number], first)


def _first_bits(archive: Archive) -> Iterator[np.ndarray]:
    return first_bits(list(rates(archive).values()), archive.path.log2_frames if archive.path is not None else 0)


def _own(archive: Archive, number: int, stored: np.ndarray) -> np.ndarray:
    """The values of a stored array in the tensor's own dtype."""
    record = archive.records[number]
    source = archive.records[record.alias] if record.kind == "alias" else record
    if record.dtype not in RAW_DTYPES[:-1]:
        raise FileFormatError(f"tensor {record.name} is of dtype {record.dtype!r}, which is none of {', '.join(RAW_DTYPES[:-1])}")
    if source.kind == "raw" and source.raw_dtype == "bfloat16":  # the upper halves of float32
        stored = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if stored.dtype.kind == "c" and not record.dtype.startswith("complex"):
        stored = stored.real
    with np.errstate(all="ignore"):  # what does not fit becomes infinite or is cut
        return _bfloat16(stored.astype(np.float32)) if record.dtype == "bfloat16" else stored.astype(record.dtype)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 numbers rounded to the nearest of bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), bits, rounded).view(np.float32)


def _stored(archive: Archive, number: int, live: tuple[int, ...], first: np.ndarray | None) -> np.ndarray:
    """As `stored_array`, of a tensor of live shape `live` whose frames begin at the bits `first` of the trellis' stream."""
    record = archive.records[number]
    shape = record.shape or ()
    if record.kind == "constant":
        return np.full(shape, record.constant, np.float32)
    if record.kind == "raw":
        stored = {"bfloat16": "uint16", "opaque": "uint8"}.get(record.raw_dtype, record.raw_dtype)
        return np.frombuffer(record.data, np.dtype(stored).newbyteorder("<")).astype(stored).reshape(shape)
    full = np.zeros(shape, np.float32)
    count = live_count(record, live)
    if not count:
        return full
    std = prior_std(record.prior_codes)
    coded = _block_values(archive, number, count) if first is None else _trellis_values(archive, number, first)
    kept: tuple[Any, ...] = (*(slice(k) for k in live), ...)
    part = full[kept]
    if len(std) == 1:
        part[...] = (coded * std[0]).reshape(live)
    else:
        used = std > 0
        part[used] = coded.reshape(-1, *live[1:]) * std[used].reshape(-1, *[1] * (len(live) - 1))
    return full


def _block_values(archive: Archive, number: int, count: int) -> np.ndarray:
    """The coded weights of a tensor in units of the prior, float32 `[count]`."""
    record = archive.records[number]
    place = layout(archive.seed, number, count, len(record.index))
    numbers = np.arange(len(record.index), dtype=np.int64)
    if archive.coder in TREES:
        drawn = node_values(archive.seed, number, numbers, record.index)
    else:
        drawn = candidate_values(archive.seed, number, numbers, record.index, place.shape[1])
    coded = np.empty(count, np.float32)
    inside = place >= 0
    coded[place[inside]] = drawn[inside]
    return coded


def _trellis_values(archive: Archive, number: int, first: np.ndarray) -> np.ndarray:
    """As `_block_values`."""
    path, rate = archive.path, archive.records[number].rate
    assert path is not None
    assert rate is not None
    return decode_steps(archive.seed, number, rate, path.memory, path.words, first, path.log2_frames)
