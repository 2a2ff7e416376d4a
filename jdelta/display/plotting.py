"""Pictures that matplotlib draws: the tree of a model, and how far its layers moved."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np

from jdelta.display.drawing import GUIDE, LIGHT, Drawing, laid_out
from jdelta.display.movement import NO_LAYER, Movement

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("pictures are drawn by matplotlib: pip install 'jdelta[plot]'.") from error

_DPI = 200
_BAR = 1.8  # inches: the length of the heat map's bar
_MOST_PIXELS = 2**16 - 1  # that matplotlib draws in one direction


class Picture(Figure):
    """A figure that notebooks show, also where nothing told them about matplotlib."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        save(self, buffer, "png")
        return buffer.getvalue()


def save(figure: Figure, target: str | os.PathLike[str] | io.BytesIO, kind: str | None = None) -> None:
    """Writes a figure in the format that the ending or `kind` says, with fewer pixels if it is very large."""
    dpi = min(_DPI, _MOST_PIXELS / (1 + figure.get_size_inches().max()))
    with rc_context({"text.hinting": "none", "svg.fonttype": "none"}):  # characters as wide as they say; text in SVG
        figure.savefig(target, format=kind, dpi=dpi, bbox_inches="tight", pad_inches=0.1)


def tree(drawing: Drawing, font_size: float = 10) -> Figure:
    """The tree as a figure on white."""
    plan = laid_out(drawing)
    across, down = 0.602 * font_size, 1.4 * font_size  # of a character of DejaVu Sans Mono, in points
    width, height = plan.width + 4, plan.height + 1
    figure = Picture(figsize=(width * across / 72, height * down / 72), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-2, plan.width + 2), ylim=(plan.height, -1))
    axes.set_axis_off()
    for x1, y1, x2, y2 in plan.strokes:
        axes.plot([x1, x2], [y1, y2], color=GUIDE, linewidth=0.8, solid_capstyle="butt")
    style: dict[str, Any] = {
        "family": "DejaVu Sans Mono",
        "fontsize": font_size,
        "verticalalignment": "center_baseline",
    }
    for x, y, parts in plan.texts:
        for kind, text in parts:
            axes.text(x, y, text, color=LIGHT[kind], parse_math=False, **style)
            x += len(text)
    return figure


def heatmap(movement: Movement) -> Figure:
    """A table as a heat map of square cells, under a bar that says what their colours mean."""
    rows, columns = movement.values.shape
    cell = 0.3 if columns <= 24 else 0.24
    wide, high, gap = cell * columns, cell * rows, 0.55  # in inches; gap: from the map's top to the bar
    width, height = max(wide, _BAR), high + gap + 0.1
    figure = Picture(figsize=(width, height), facecolor="white")  # `save` makes room for the labels
    axes = figure.add_axes((0, 0, wide / width, high / height), facecolor="0.9")  # the colour of NaN
    most = np.nanmax(movement.values, initial=0) or 1.0
    image = axes.imshow(movement.values, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    axes.set_yticks(range(rows), movement.rows, fontsize=9, parse_math=False)
    axes.set_xticks(range(columns), movement.columns, fontsize=9 if columns <= 24 else 8)
    note = f" ({NO_LAYER}: in no layer)" if NO_LAYER in movement.columns else ""
    axes.set_xlabel(f"layer{note}", fontsize=9, loc="left")
    axes.set_xticks(np.arange(0.5, columns - 1), minor=True)
    axes.set_yticks(np.arange(0.5, rows - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    beside = figure.add_axes((0, (high + gap - 0.12) / height, _BAR / width, 0.12 / height))
    bar = figure.colorbar(image, cax=beside, orientation="horizontal", ticks=MaxNLocator(4))
    bar.set_label("‖change‖ / ‖weight‖", fontsize=9, loc="left")
    bar.outline.set_visible(False)
    beside.xaxis.set_label_position("top")
    beside.tick_params(labelsize=8, length=2)
    return figure
