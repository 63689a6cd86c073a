"""Plots for the card: acceptance by position, reliability diagrams, the training curve. PNG or SVG,
depending on the file name.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspark.cache.errors import UsageError
from dspark.tools.outputs import save

NEEDED = "pictures need matplotlib: pip install matplotlib"


def can_draw() -> bool:
    """Tell whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def refuse_undrawable(path: Path) -> None:
    """Raise UsageError unless a picture of this name can be drawn here; before the work whose
    result it shows.
    """
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"{path}: expected a name that ends with .png or .svg")
    if not can_draw():
        raise UsageError(NEEDED)


@contextmanager
def figure(path: Path, columns: int = 1, rows: int = 1) -> Iterator[Any]:
    """Yield axes (a flat array if more than one) of a figure that is saved to ``path`` at the
    end.
    """
    refuse_undrawable(path)
    from matplotlib.figure import Figure

    drawn = Figure(
        figsize=(3.2 * columns + 1.6 * (columns == 1), 3.0 * rows), layout="constrained", dpi=120
    )
    axes = drawn.subplots(rows, columns, squeeze=False).flatten()
    yield axes if len(axes) > 1 else axes[0]
    # No date and fixed ids: the same run gives the same bytes.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "dspark"}):
        drawn.savefig(data := io.BytesIO(), format=path.suffix[1:], metadata=metadata)
    save(path, data.getvalue())


def accept_rates(curves: dict[str, Sequence[float]], path: Path) -> None:
    """Plot the accept rate by position (1-based), one line per name."""
    with figure(path) as axes:
        for name, rates in curves.items():
            axes.plot(range(1, len(rates) + 1), rates, marker="o", label=name)
        axes.set(xlabel="position in the block", ylabel="accept rate", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


def reliability(report: dict[str, Any], path: Path) -> None:
    """Plot survival by position: mean confidence against mean acceptance, as stated by the head and
    calibrated. ``report``: from ``calibrate``.
    """
    before, after = report["before"]["survival"], report["after"]["survival"]
    size = len(before["ece"])
    columns = min(size, 4)
    with figure(path, columns, -(-size // columns)) as grid:
        for k, axes in enumerate(grid if size > 1 else [grid]):
            if k >= size:
                axes.set_axis_off()
                continue
            axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
            for name, by_slot in (("head", before), ("calibrated", after)):
                bins = by_slot["diagram"][k]
                axes.plot(
                    [b["confidence"] for b in bins],
                    [b["accepted"] for b in bins],
                    marker="o",
                    markersize=3,
                    label=f"{name} ECE {by_slot['ece'][k]:.3f}",
                )
            axes.set(
                title=f"position {k + 1}",
                xlim=(0, 1),
                ylim=(0, 1),
                xlabel="survival predicted",
                ylabel="accepted",
            )
            axes.legend(fontsize=6)


def training(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the mean accepted length over steps, on training rows and held-out ones, from
    metrics.jsonl.
    """
    with figure(path) as axes:
        for held_out, name in ((False, "training rows"), (True, "held out")):
            points = [
                (r["step"], r["mean_accepted_length"])
                for r in rows
                if bool(r.get("validation")) == held_out and r.get("mean_accepted_length")
            ]
            axes.plot(
                [s for s, _ in points],
                [v for _, v in points],
                marker="o" if held_out else None,
                label=name,
            )
        axes.set(xlabel="step", ylabel="mean accepted length")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
