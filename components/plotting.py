"""Helpers of all figures: matplotlib if installed, one style, and reproducible files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.errors import extra_required


def import_pyplot() -> Any:
    """Return matplotlib.pyplot in the style of this project, with no display. Raises ValueError if not installed."""
    with extra_required("drawing", "matplotlib", "plot"):
        import matplotlib as mpl
    mpl.use("agg")
    style = {"svg.hashsalt": "powertrain", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    mpl.rcParams.update({**style, "grid.alpha": 0.3, "axes.titlesize": 10, "axes.titlelocation": "left"})
    mpl.rcParams["legend.frameon"] = False
    from matplotlib import pyplot as plt

    return plt


def label_tokens(axis: Any, label: str = "tokens") -> None:
    """Label the x axis of a panel in tokens: 20M, not 2e7."""
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel(label)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def save_figure(figure: Any, output: Path) -> None:
    """Write `figure` to `output`, whose directory is created. Raises ValueError for an unknown file type."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, metadata={"Date": None} if output.suffix == ".svg" else None)
    import_pyplot().close(figure)
