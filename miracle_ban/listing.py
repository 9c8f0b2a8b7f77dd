"""What a file holds, as plain rows and as text. Leans on `container`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .bits import HuffmanTable
from .container import FIXED_LENGTH, Archive, Record, live_count, octaves, prior_std, rates, resolve_kept


def tensor_rows(archive: Archive) -> list[dict[str, Any]]:
    """One row per tensor; what only the shapes would tell is None where the file carries none."""
    known = all(r.shape is not None for r in archive.records)
    live = resolve_kept(archive.records) if known else [None] * len(archive.records)
    return [_tensor_row(archive, number, r, kept) for number, (r, kept) in enumerate(zip(archive.records, live, strict=True))]


def _tensor_row(archive: Archive, number: int, r: Record, live: tuple[int, ...] | None) -> dict[str, Any]:
    std = [float(s) for s in prior_std(r.prior_codes) if s > 0] if r.kind == "coded" else []
    bits = int(r.bits) if r.kind == "coded" else 8 * len(r.data)
    weights = math.prod(r.shape) if r.shape is not None else None
    row: dict[str, Any] = {
        "number": number,
        "name": r.name,
        "shape": None if r.shape is None else list(r.shape),
        "kept": list(live) if live is not None and r.kind == "coded" else None,
        "kind": r.kind,
        "prior_std": std,
        "weights": weights,
        "coded_weights": None if live is None else live_count(r, live) if r.kind == "coded" else 0,
        "blocks": 0 if r.kind != "coded" else len(r.index) if r.rate is None else max(r.rate.steps, 0),
        "bits": bits,
        "bits_per_weight": bits / weights if weights else None,
    }
    if r.kind == "alias":
        row["alias_of"] = archive.records[r.alias].name or f"#{r.alias}"
    return row


def codeword_bits(archive: Archive) -> np.ndarray:
    """Bits of every block's codeword; of every step's, for the trellis."""
    if archive.path is not None:
        known = [r for r in rates(archive).values() if r.count > 0]
        return np.concatenate([np.zeros(0), *(np.diff(r.bits_before(np.arange(r.steps + 1))) for r in known)]).astype(np.float64)
    index = np.concatenate([r.index for r in archive.records if r.kind == "coded"] or [np.zeros(0, np.int64)])
    if not len(index):
        return np.zeros(0)
    if archive.coder in FIXED_LENGTH:
        return np.full(len(index), float(archive.index_bits or 0))
    octave = octaves(index)
    return (HuffmanTable.fit(octave).bits(octave) + octave).astype(np.float64)


def _float_bytes(rows: list[dict[str, Any]]) -> int | None:
    """What the network takes as 32-bit numbers, each tied weight once."""
    weights = [row["weights"] for row in rows if row["kind"] != "alias"]
    return None if None in weights else 4 * sum(weights)


def totals(rows: list[dict[str, Any]], file_bytes: int) -> dict[str, Any]:
    """Sizes of the whole; None where only the shapes would tell."""
    float_bytes = _float_bytes(rows)
    weights = None if float_bytes is None else float_bytes // 4
    return {
        "weights": weights,
        "float_bytes": float_bytes,
        "file_bytes": file_bytes,
        "ratio": float_bytes / file_bytes if float_bytes else None,
        "bits_per_weight": 8 * file_bytes / weights if weights else None,
    }


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns under their heads, the first `left` flush left and the others flush right; the last row after a rule
    if its first cell is "total".
    """
    widths = [max(len(str(cell)) for cell in column) for column in zip(heads, *rows, strict=True)]
    rule = "  ".join("-" * w for w in widths)

    def line(cells: Sequence[str]) -> str:
        aligned = [str(c).ljust(w) if i < left else str(c).rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(aligned).rstrip()

    lines = [line(heads), rule, *map(line, rows)]
    if rows and rows[-1][0] == "total":
        lines.insert(-1, rule)
    return "\n".join(lines)


def label(row: dict[str, Any]) -> str:
    """Name of a row's tensor, or its number."""
    return row["name"] if row["name"] is not None else f"#{row['number']}"


def shape_text(shape: Sequence[int] | None) -> str:
    """Such as "16x3x3x3"."""
    return "?" if shape is None else "x".join(map(str, shape)) or "scalar"


def number_text(value: float | None, form: str = ",.0f") -> str:
    """A number, or "?" where it is not known."""
    return "?" if value is None else format(value, form)


def std_text(std: Sequence[float]) -> str:
    """The one prior std of a tensor, or the least and the largest."""
    if not std:
        return "-"
    return f"{std[0]:.4g}" if min(std) == max(std) else f"{min(std):.3g} to {max(std):.3g}"


def sizes_text(result: dict[str, Any]) -> str:
    """One line on the size of the whole, from `totals`."""
    if result["float_bytes"] is None:
        return f"file {result['file_bytes']:,} bytes"
    per_weight = number_text(result["bits_per_weight"], ".4f")
    size = f"float32 {result['float_bytes']:,} bytes, file {result['file_bytes']:,} bytes"
    return f"{size}: {number_text(result['ratio'], ',.1f')} times smaller, {per_weight} bits per weight"


def bits_table(tensors: list[dict[str, Any]], totals: dict[str, Any]) -> str:
    """Where the bits of a file are, tensor by tensor."""
    rows = [(label(t), number_text(t["weights"]), f"{t['bits']:,}", number_text(t["bits_per_weight"], ".4f")) for t in tensors]
    other = 8 * totals["file_bytes"] - sum(t["bits"] for t in tensors)
    rows.append(("header, prior scales, names", "", f"{other:,}", ""))
    rows.append(("total", number_text(totals["weights"]), f"{8 * totals['file_bytes']:,}", number_text(totals["bits_per_weight"], ".4f")))
    return table(("tensor", "weights", "bits", "bits/weight"), rows)
