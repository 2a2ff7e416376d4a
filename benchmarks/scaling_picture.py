"""A picture of what `side_by_side.py` found: contenders, and how the cost grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from contenders import FUSED, HAND, JDELTA, LEAN, PEFT, QWIX
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from turns import FULL

COLOURS = {
    JDELTA: "#1f6fb4",
    FUSED: "#17a398",
    LEAN: "#7cb518",
    HAND: "#8c8c8c",
    QWIX: "#b07aa1",
    PEFT: "#ee6c4d",
    FULL: "#3d3d3d",
}
DASHED = {HAND}  # it lies under jdelta's line


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Writes a picture with a panel for each part that was measured."""
    panels: dict[str, Callable[[Axes, Any], None]] = {
        "contenders": draw_contenders,
        "deltas": draw_deltas,
        "tokens": draw_tokens,
        "depth": draw_depth,
    }
    parts = [part for part in panels if part in found]
    columns = min(len(parts), 2)
    rows = -(-len(parts) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.6 * columns, 4.6 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat[len(parts) :]:
        ax.remove()
    for part, ax in zip(parts, axes.flat, strict=False):
        panels[part](ax, found[part])
        ax.spines[["top", "right"]].set_visible(False)
    sizes = found["sizes"]
    figure.suptitle(
        f"LoRA of rank {sizes['rank']} on a BERT of {sizes['layers']} layers, width {sizes['hidden']}: "
        f"{sizes['batch']} × {sizes['length']} tokens, {found['device']}, {found['xla_threads']} threads",
        fontsize=11,
    )
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_contenders(ax: Axes, found: Mapping[str, Any]) -> None:
    """Bars of a step's time, with the middle half of the steps, against full fine-tuning."""
    rows = found["rows"]
    for i, row in enumerate(rows):
        time = row["time"][FULL]
        error = [[time["median"] - time["low"]], [time["high"] - time["median"]]]
        ax.barh(i, time["median"], xerr=error, color=COLOURS[row["contender"]], height=0.66, ecolor="#555", capsize=3)
        ax.text(
            max(time["high"], time["median"]),
            i,
            f"  {time['median']:.2f}  ({row['seconds']:.3g} s)",
            va="center",
            fontsize=9,
        )
    ax.set_yticks(range(len(rows)), [row["contender"] for row in rows])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.35 * max(row["time"][FULL]["high"] for row in rows))
    ax.set_xlabel("time of a step / full fine-tuning in JAX")
    ax.set_title("contenders, in turn in one process")


def draw_deltas(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    counts = [row["deltas"] for row in rows]
    for key, label, style in (("flops", "FLOPs", "o-"), ("memory", "temporary memory", "s--"), ("time", "time", "^-")):
        if rows[0][key] is not None:
            ax.plot(counts, [row[key] for row in rows], style, label=label)
    logarithmic(ax, counts, "different LoRAs in a batch of 64 rows")
    ax.set_ylim(0, 1.3 * max(1.0, *(row[key] for row in rows for key in ("flops", "memory", "time") if row[key])))
    ax.set_ylabel("forward pass / with one LoRA")
    ax.set_title("many deltas at once")
    ax.legend(frameon=False, loc="lower right")


def draw_tokens(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Memory, which is what ends long sequences."""
    lines(ax, rows, "tokens", lambda row: row["temporary_bytes"] / 1e6)
    logarithmic(ax, sorted({row["tokens"] for row in rows}), "tokens of one sequence")
    in_decades(ax)
    ax.set_ylabel("temporary memory of a step, MB")
    ax.set_title("tokens")
    ax.legend(frameon=False)


def draw_depth(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """FLOPs on the left axis, seconds until the first step on the right one."""
    lines(ax, rows, "layers", lambda row: row["flops"] / 1e9)
    logarithmic(ax, sorted({row["layers"] for row in rows}), "layers")
    in_decades(ax)
    ax.set_ylabel("GFLOP of a step (solid)")
    other = ax.twinx()
    lines(other, rows, "layers", lambda row: row["trace_seconds"] + row["lower_seconds"], style=":")
    in_decades(other)
    other.set_ylabel("tracing and lowering, s (dotted)")
    other.spines["top"].set_visible(False)
    ax.set_title("depth")
    ax.legend(frameon=False)


def lines(
    ax: Axes,
    rows: Sequence[Mapping[str, Any]],
    what: str,
    value: Callable[[Mapping[str, Any]], float],
    style: str = "-",
) -> None:
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == name]
        dashes = (0, (3, 3)) if name in DASHED and style == "-" else style
        ax.plot(
            [row[what] for row in own],
            [value(row) for row in own],
            color=COLOURS[name],
            linestyle=dashes,
            marker="o" if style == "-" else None,
            markersize=4,
            label=name,
            zorder=3 if name in DASHED else 2,
        )


def in_decades(ax: Axes) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def logarithmic(ax: Axes, ticks: Sequence[int], label: str) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(list(ticks)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_xlabel(label)
    ax.grid(axis="y", color="#e6e6e6")
    ax.set_axisbelow(True)
