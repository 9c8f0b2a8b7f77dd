"""Pictures: how training went, where the bits are, what was gained. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MiracleError

if TYPE_CHECKING:
    from .train import FitReport


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MiracleError("drawing needs matplotlib: pip install 'miracle-ban[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def plot_fit(report: FitReport, path: str | Path) -> None:
    """Loss, predicted bytes and beta against the step, as a PNG."""
    pyplot = _pyplot()
    rows = report.history
    step = [r["step"] for r in rows]
    figure, axes = pyplot.subplots(3, 1, figsize=(7, 8), sharex=True)
    for axis, key, label, log in (
        (axes[0], "loss", "loss (nats per example)", True),
        (axes[1], "predicted_bytes", "predicted file (bytes)", True),
        (axes[2], "beta", "beta", True),
    ):
        axis.plot(step, [r[key] for r in rows], lw=1.2)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if log:
            axis.set_yscale("log")
    if report.budget_bytes:
        axes[1].axhline(report.budget_bytes, color="tab:red", lw=1, ls="--", label=f"budget, {report.budget_bytes:,} bytes")
        axes[1].legend()
    axes[2].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
