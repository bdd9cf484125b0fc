"""Figures that everybody can read: colour-blind-safe, with markers and patterns, and with alt text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's palette (2008), black first; each series has a marker and a dash pattern of its own as
# well, so that no figure depends on colour.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


def png(figure: Figure) -> bytes:
    """The figure as PNG, without the timestamp and version that would change its bytes at every run."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook with its alternative text, and close it."""
    import matplotlib.pyplot as plt
    from IPython.display import Image, display

    display(Image(data=png(figure), format="png", alt=alt))  # type: ignore[no-untyped-call]
    plt.close(figure)
