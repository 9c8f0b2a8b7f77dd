"""How a converted model becomes records and blocks, and how many bytes that is going to be.

In comes a converted model, out goes the skeleton of its `Archive` (everything but the indices) and the predicted size that
training is steered by. Leans on `layers`, `convert`, `container`, `coders`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from .bits import NATS_PER_BIT
from .blocks import LARGEST_DIMENSION
from .coders import BlockCoder, Coder, Trellis
from .container import RAW_DTYPES, Archive, Path, Record, fingerprint, prior_code, prior_std
from .convert import Conversion, conversion
from .errors import CodingError, MismatchError
from .layers import Posterior, posteriors
from .priors import DROP_BELOW_BITS
from .trellis import Rate

NAMES_FROM_BYTES = 10_000  # files this large carry names and shapes unless told otherwise


@torch.no_grad()
def freeze_priors(model: nn.Module) -> dict[str, np.ndarray]:
    """Round every prior scale, learned or given, to its 8-bit code and hold it; returns the codes by tensor.

    Where each unit has a scale of its own, units that carry next to nothing get code 0: they are dropped, their weights
    fixed at zero.
    """
    codes = {}
    for name, p in posteriors(model).items():
        if p.mean.numel() == 0:
            codes[name] = np.zeros(1, np.uint8)
            continue
        moment = p.group_second_moment() if p.prior_std is None else p.prior_std.square()
        code = prior_code(moment.sqrt().flatten().cpu().numpy())
        if p.per_unit:
            bits = p.kl_per_weight().flatten(1).mean(1)
            code[(bits / NATS_PER_BIT).cpu().numpy() < DROP_BELOW_BITS] = 0
        std = torch.from_numpy(prior_std(np.maximum(code, 1))).reshape(moment.shape)
        p.freeze_prior(std)
        dropped = torch.from_numpy(code == 0).reshape(moment.shape).expand(p.mean.shape)
        if dropped.any():
            at = torch.nonzero(dropped.flatten()).squeeze(1)
            p.fix(at, p.mean.new_zeros(len(at)))
        codes[name] = code
    return codes


def check_seed(seed: object) -> None:
    """Raise unless the format can hold the key of the shared randomness."""
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise CodingError(f"seed must be an integer from 0 to 2^64 - 1, not {seed!r}")


def num_blocks(kl_bits: float, count: int, block_bits: float, largest: int = LARGEST_DIMENSION) -> int:
    """Blocks for a tensor: each about `block_bits` of KL, and no more than `largest` weights."""
    if count == 0:
        return 1
    return max(min(round(kl_bits / block_bits), count), -(-count // largest), 1)


def kl_bits_by_tensor(model: nn.Module) -> dict[str, float]:
    """KL of each tensor's posterior, bits."""
    with torch.no_grad():
        return {name: float(p.kl()) / NATS_PER_BIT for name, p in posteriors(model).items()}


def predicted_index_bits(kl_bits: dict[str, float], counts: dict[str, int], coder: Coder, block_bits: float) -> float:
    """Expected bits of all codewords, by the coder's own prediction for a block.

    Raises:
        CodingError: a KL is NaN or infinite.
    """
    lost = [name for name, bits in kl_bits.items() if not math.isfinite(bits)]
    if lost:
        raise CodingError(f"the KL of {', '.join(lost[:3])} became {kl_bits[lost[0]]}: training diverged; lower the learning rate")
    if isinstance(coder, Trellis):
        return float(sum(coder.rate(counts[name], bits).bits for name, bits in kl_bits.items()))
    assert isinstance(coder, BlockCoder)
    total = 0.0
    for name, bits in kl_bits.items():
        blocks = num_blocks(bits, counts[name], block_bits, coder.largest_dimension)
        total += blocks * coder.predict_bits(bits / blocks)
    return total


def skeleton(model: nn.Module, *, coder: Coder, seed: int, names: bool, codes: dict[str, np.ndarray] | None = None) -> Archive:
    """The archive of a converted model with one empty block a tensor: header, records and raw tensors are final."""
    account = conversion(model)
    held = posteriors(model)
    state = model.state_dict()
    order = [e.name for e in account.entries]
    records = []
    for entry in account.entries:
        record = Record(entry.kind, name=entry.name, shape=entry.shape, dtype=str(entry.dtype).removeprefix("torch."))
        if entry.kind == "coded":
            p = held[entry.name]
            record.prior_codes = codes[entry.name] if codes is not None else np.ones(p.mean.shape[0] if p.per_unit else 1, np.uint8)
            record.index = np.ones(1, np.int64)
            if isinstance(coder, Trellis):
                record.rate = Rate(0, 4, 96)  # a typical one
        elif entry.kind == "constant":
            record.constant = entry.constant
        elif entry.kind == "raw":
            record.raw_dtype, record.data = _raw(entry.name, state[entry.name])
        else:
            record.alias = order.index(str(entry.alias_of))
        if any(c in "\n\r" or 0xD800 <= ord(c) < 0xE000 for c in entry.name):
            raise MismatchError(f"a tensor's name holds a line break, or half a character: {entry.name!r}; rename it")
        records.append(record)
    for record, kept in zip(records, _kept(account, held), strict=True):
        record.kept = kept
    mark = fingerprint([(e.name, e.shape) for e in account.entries])
    path = Path(coder.memory or 1) if isinstance(coder, Trellis) else None
    return Archive(records, coder.name, seed, mark, names, coder.fixed_length_bits, path)


def side_bits(archive: Archive, table_bits: int = 45) -> int:
    """Bits of a skeleton that are not indices: header, records, raw tensors, and about `table_bits` for the octave table."""
    return 8 * archive.size_bytes + (table_bits if archive.path is None else 0)


def carries_names(names: bool | None, model: nn.Module, budget_bits: float | None) -> bool:
    """Whether the file is to carry names and shapes: as told, else if it is going to be larger than 10 kB."""
    if names is not None:
        return names
    expected = budget_bits if budget_bits is not None else sum(kl_bits_by_tensor(model).values())
    return expected / 8 + conversion(model).raw_bytes > NAMES_FROM_BYTES


def _kept(account: Conversion, held: dict[str, Posterior]) -> list[tuple[int | None, int | None]]:
    """Units kept on each axis, None wherever the reader's own prediction is right (`container.resolve_kept`)."""
    result: list[tuple[int | None, int | None]] = []
    weight_full = weight_live = 0
    for entry in account.entries:
        kept: list[int | None] = [None, None]
        if entry.kind == "coded" and len(entry.shape) >= 1:
            live = held[entry.name].kept
            predicted = weight_live if len(entry.shape) == 1 and entry.shape[0] == weight_full else entry.shape[0]
            if live[0] != predicted:
                kept[0] = live[0]
            if len(entry.shape) >= 2:
                follows = weight_full and entry.shape[1] % weight_full == 0
                predicted = weight_live * (entry.shape[1] // weight_full) if follows else entry.shape[1]
                if live[1] != predicted:
                    kept = [live[0], live[1]]
                weight_full, weight_live = entry.shape[0], live[0]
        result.append((kept[0], kept[1]))
    return result


def _raw(name: str, tensor: torch.Tensor) -> tuple[str, bytes]:
    """Storage dtype and little-endian bytes of a tensor that stays raw; running statistics of norms in 16 bits."""
    tensor = tensor.detach().cpu().contiguous()
    statistics = name.rpartition(".")[2] in ("running_mean", "running_var")
    if statistics and tensor.dtype in (torch.float32, torch.float64) and _survives_half(tensor):
        tensor = tensor.half()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype == torch.bfloat16:
        return dtype, tensor.view(torch.uint16).numpy().astype("<u2").tobytes()
    if dtype not in RAW_DTYPES:
        raise MismatchError(f"a raw tensor of dtype {dtype} cannot be stored; there are {', '.join(RAW_DTYPES)}")
    array = tensor.numpy()
    return dtype, array.astype(array.dtype.newbyteorder("<")).tobytes()


def _survives_half(tensor: torch.Tensor) -> bool:
    size = tensor.abs()
    return bool((size.max() < 6e4) & ((size == 0) | (size > 1e-4)).all())
