"""Pictures: how training went, where the bits are, what was gained. Needs matplotlib (extra `plot`).

`draw_*` draw into a figure or subfigure of matplotlib, `plot_*` write a whole picture. Leans on nothing of training.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import MiracleError

if TYPE_CHECKING:
    from .train import FitReport

_BLUE, _RED, _GREY = "#2e6f95", "#d1495b", "#8d99ae"
_COLOURS = (_BLUE, _RED, "#edae49", "#4a8c5f", "#7d5ba6", "#5b5f66")
_MOST_BARS = 24
_DPI = 130
_LOG_STEPS = (  # labels within a decade, for an axis of at most that many decades
    (0.2, tuple(n / 20 for n in range(20, 200))),
    (1.2, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)),
    (3.0, (1, 2, 5)),
    (math.inf, (1,)),
)

Drawing = Callable[[Any], None]


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MiracleError("drawing needs matplotlib: pip install 'miracle-ban[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def _picture(figure: Any, suffix: str) -> bytes:
    """The finished figure as a file's bytes; closes it."""
    pyplot, buffer = _pyplot(), io.BytesIO()
    kind = suffix.removeprefix(".").lower() or "png"
    try:
        if kind not in figure.canvas.get_supported_filetypes():
            raise MiracleError(f"cannot draw a {suffix} file: name the picture .png, .svg or .pdf")
        figure.savefig(buffer, dpi=_DPI, format=kind)
    finally:
        pyplot.close(figure)
    return buffer.getvalue()


def _plain(axis: Any, *, grid: str = "y") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, alpha=0.25, lw=0.6)
    axis.set_axisbelow(True)


def _plain_log(axis: Any, values: Sequence[float]) -> None:
    """A log axis around `values` with few labels, in plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    positive = [v for v in values if v > 0] or [1.0]
    low, high = min(positive) / 1.1, max(positive) * 1.1
    decades = math.log10(high / low)
    steps = next(steps for most, steps in _LOG_STEPS if decades <= most)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**e for e in exponents for step in steps if low <= step * 10.0**e <= high]
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 10)] if ticks else positive[:1]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 10 else f"{v:g}"))


def plot_fit(report: FitReport, path: str | Path) -> None:
    """Loss, predicted bytes and beta against the step, as a picture.

    Args:
        report: what `fit` returned.
        path: of the picture; its suffix says the format.

    Raises:
        MiracleError: matplotlib is missing, or does not know the format.
    """
    figure = _pyplot().figure(figsize=(7, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    draw_curves(axes, report.history, report.budget_bytes)
    Path(path).write_bytes(_picture(figure, Path(path).suffix))


def draw_curves(axes: Sequence[Any], history: Sequence[dict[str, float]], budget_bytes: float | None) -> None:
    """Training curves from `FitReport.history`: loss, predicted file and beta, as many of them as there are axes."""
    step = [row["step"] for row in history]
    columns = (("loss", "loss, nats per example"), ("predicted_bytes", "predicted file, bytes"), ("beta", "beta"))
    for axis, (key, label) in zip(axes, columns):
        axis.plot(step, [row[key] for row in history], lw=1.4, color=_BLUE)
        _plain_log(axis.yaxis, [row[key] for row in history] + [budget_bytes or 0.0] * (key == "predicted_bytes"))
        axis.set_ylabel(label)
        _plain(axis)
        if key == "predicted_bytes" and budget_bytes:
            axis.axhline(budget_bytes, color=_RED, lw=1.0, ls="--", label=f"budget, {budget_bytes:,.0f} bytes")
            axis.legend(frameon=False)
    axes[-1].set_xlabel("step")


def draw_tensor_bits(axis: Any, names: Sequence[str], bits: Sequence[float], *, label: str = "bits in the file") -> None:
    """One horizontal bar per tensor; of very many tensors the largest, and the others together."""
    order = sorted(range(len(bits)), key=lambda i: -bits[i])
    shown = sorted(order[:_MOST_BARS])
    rows = [(names[i], bits[i]) for i in shown]
    if len(order) > _MOST_BARS:
        rest = order[_MOST_BARS:]
        rows.append((f"{len(rest)} others", sum(bits[i] for i in rest)))
    places, lengths = range(len(rows)), [length for _, length in rows]
    axis.barh(places, lengths, color=_BLUE, height=0.7)
    longest = max([*lengths, 1.0])
    for place, length in zip(places, lengths):
        axis.text(length + 0.01 * longest, place, f"{length:,.0f}", va="center", fontsize=8, color="#333333")
    axis.set_yticks(places, [_short(name) for name, _ in rows], fontsize=8)
    axis.set_xlim(0, 1.15 * longest)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel(label)
    _plain(axis, grid="x")


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else "..." + name[3 - most :]


def draw_histogram(axis: Any, values: np.ndarray, label: str) -> None:
    """Histogram of bits per block, one bin a bit, with the mean."""
    values = np.asarray(values, np.float64)
    if not len(values):
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no coded blocks", ha="center", va="center", transform=axis.transAxes)
        return
    low, high = math.floor(values.min()), math.ceil(values.max() + 1e-9)
    step = max(1, (high - low) // 60)
    axis.hist(values, bins=np.arange(low - 0.5, high + step + 0.5, step), color=_GREY)
    axis.axvline(values.mean(), color=_RED, lw=1.2, ls="--", label=f"mean {values.mean():.1f}")
    axis.legend(frameon=False)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel(label)
    axis.set_ylabel("blocks")
    _plain(axis)


def draw_archive(figure: Any, *, title: str, names: Sequence[str], bits: Sequence[float], codeword_bits: np.ndarray) -> None:
    """A file: bits of each tensor, and how long the codewords of its blocks are."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title)
    draw_tensor_bits(left, names, bits)
    draw_histogram(right, codeword_bits, "codeword of a block, bits")


def draw_losses(axis: Any, history: Sequence[dict[str, float]]) -> None:
    """How `harden` went."""
    axis.plot([row["step"] for row in history], [row["loss"] for row in history], lw=1.4, color=_BLUE)
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats per example")
    _plain(axis)


def draw_report(figure: Any, *, title: str, info: dict[str, Any]) -> None:
    """A report of `compress`: training curves, bits of each tensor, and KL of each block where the report has it."""
    figure.suptitle(title)
    upper, lower = figure.subfigures(2, 1, height_ratios=(2, 3))
    fit, hardened = info.get("fit") or {}, info.get("harden") or {}
    if fit.get("history"):
        draw_curves(upper.subplots(1, 3), fit["history"], fit.get("budget_bytes"))
    elif hardened.get("history"):
        draw_losses(upper.subplots(), hardened["history"])
    histograms = [(info[key], label) for key, label in _BLOCK_COLUMNS if info.get(key)]
    axes = np.atleast_1d(lower.subplots(1, 1 + len(histograms[:2])))
    if info.get("tensors"):
        draw_tensor_bits(axes[0], [t["name"] for t in info["tensors"]], [t["bits"] for t in info["tensors"]])
    else:
        kl_bits = fit.get("kl_bits_by_tensor") or {}
        draw_tensor_bits(axes[0], list(kl_bits), list(kl_bits.values()), label="KL after fit, bits")
    for axis, (values, label) in zip(axes[1:], histograms):
        draw_histogram(axis, np.array(values), label)


_BLOCK_COLUMNS = (("kl_bits", "KL of a block, bits"), ("codeword_bits", "codeword of a block, bits"))


def draw_results(figure: Any, *, title: str, lines: Sequence[dict[str, Any]]) -> None:
    """Rate against error: one point per result line, a colour per coder."""
    axis = figure.subplots()
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(str(line.get("coder") or "unnamed"), []).append(line)
    for number, (coder, rows) in enumerate(sorted(groups.items())):
        colour = _COLOURS[number % len(_COLOURS)]
        axis.scatter([r["bytes"] for r in rows], [r["error"] for r in rows], s=36, alpha=0.8, color=colour, label=coder, lw=0)
    _plain_log(axis.xaxis, [line["bytes"] for line in lines])
    axis.set_xlabel("file, bytes")
    axis.set_ylabel("error, %")
    axis.legend(frameon=False, title="coder")
    axis.set_title(title)
    _plain(axis, grid="both")


def plot_page(drawings: Sequence[Drawing], heights: Sequence[float], *, suffix: str = ".png", width: float = 11.0) -> bytes:
    """Several drawings, one below the other, as the bytes of one picture.

    Args:
        drawings: each takes a subfigure and draws into it.
        heights: of each, inches.
        suffix: format of the picture.
        width: of the picture, inches.

    Raises:
        MiracleError: matplotlib is missing, or does not know the format.
    """
    figure = _pyplot().figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(drawings), 1, height_ratios=heights, hspace=0.04)
    for drawing, part in zip(drawings, np.atleast_1d(parts)):
        drawing(part)
    return _picture(figure, suffix)


def archive_height(num_tensors: int) -> float:
    """Inches that `draw_archive` wants for that many tensors."""
    return max(3.4, 1.2 + 0.22 * min(num_tensors, _MOST_BARS + 1))


def plot_demo(
    *,
    images: np.ndarray,
    labels: np.ndarray,
    result: dict[str, Any],
    history: Sequence[dict[str, float]],
    names: Sequence[str],
    bits: Sequence[float],
) -> bytes:
    """The demo's picture: digits, both sizes to scale, bits per tensor and the training curves; a PNG's bytes.

    Args:
        images, labels: test images `[n, 28, 28]` in [0, 1] and their digits.
        result: what `demo.run` returns.
        history: of the `FitReport`.
        names, bits: of the file's tensors.
    """
    figure = _pyplot().figure(figsize=(11, 7.2), layout="constrained")
    figure.suptitle(
        f"{result['float_bytes']:,} bytes of float32 weights in a file of {result['file_bytes']:,}: {result['ratio']:,.0f} times smaller, "
        f"error {result['float_error']:.2f} % before, {result['decoded_error']:.2f} % after"
    )
    upper, lower = figure.subfigures(2, 1, height_ratios=(5, 8), hspace=0.05)
    left, right = upper.subplots(1, 2, width_ratios=(5, 3))
    _digit_sheet(left, images, labels)
    _sizes_to_scale(right, result["float_bytes"], result["file_bytes"])
    axes = lower.subplots(1, 3, width_ratios=(3, 2, 2))
    draw_tensor_bits(axes[0], names, bits)
    draw_curves(axes[1:], history, result["budget_bytes"])
    axes[1].set_xlabel("step")
    return _picture(figure, ".png")


def _digit_sheet(axis: Any, images: np.ndarray, labels: np.ndarray, columns: int = 15) -> None:
    """Ten rows, one for each digit, would be tall: five rows of pairs, the even digits left."""
    rows = [np.concatenate(images[labels == digit][: columns // 2 + 1], 1) for digit in range(10)]
    gap = np.zeros((rows[0].shape[0], 14), rows[0].dtype)
    sheet = np.concatenate([np.concatenate([rows[k], gap, rows[k + 1]], 1) for k in range(0, 10, 2)])
    axis.imshow(sheet, cmap="gray_r", vmin=0, vmax=1)
    axis.set_anchor("N")
    axis.set_axis_off()
    axis.set_title("test images, drawn by the demo", fontsize=10)


def _sizes_to_scale(axis: Any, float_bytes: int, file_bytes: int) -> None:
    """Two squares whose areas are the two sizes."""
    pyplot = _pyplot()
    side, small = 1.0, math.sqrt(file_bytes / float_bytes)
    axis.add_patch(pyplot.Rectangle((0, 0), side, side, color=_GREY, lw=0))
    axis.add_patch(pyplot.Rectangle((1.35, 0), small, small, color=_RED, lw=0))
    axis.text(0.5, 0.5, f"float32\n{float_bytes:,} bytes", ha="center", va="center", color="white", fontsize=11)
    axis.text(1.35, small + 0.03, f".mban\n{file_bytes:,} bytes", ha="left", va="bottom", color=_RED, fontsize=11)
    axis.set_xlim(-0.02, 2.0)
    axis.set_ylim(-0.02, 1.02)
    axis.set_aspect("equal")
    axis.set_anchor("N")
    axis.set_axis_off()
    axis.set_title("sizes, areas to scale", fontsize=10)
