"""What all pictures have in common: matplotlib if it is there, one look, files that are the same again."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot in our look, for files and never a window. Raises ValueError without matplotlib."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        raise ValueError("drawing needs matplotlib: pip install -e '.[plot]'") from None
    mpl.use("agg")
    mpl.rcParams.update({"svg.hashsalt": "powertrain", "axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot as plt

    return plt


def count_tokens_on(axis: Any) -> None:
    """The x axis of a panel is in tokens: 20M, not 2e7."""
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel("tokens")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def write(figure: Any, output: Path) -> None:
    """To `output`, whose folder is made. Raises ValueError for an unknown kind of file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, metadata={"Date": None} if output.suffix == ".svg" else None)
    pyplot().close(figure)
