"""Which axis of which weights the features of an activation come from, so that a delta's leaves can be split alike."""

from __future__ import annotations

from typing import Any, NamedTuple

from jdelta.core.linear import known_map
from jdelta.core.linear_maps import ConvMap, EinsumMap, operands
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.trees.surgery import Path


class Axis(NamedTuple):
    """One axis of one of the backbone's leaves.

    Attributes:
      leaf: path of the leaf.
      number: which of its axes, as the module itself sees it: inside `nn.scan` without the layer axis.
    """

    leaf: Path
    number: int


Axes = tuple[Axis | None, ...]  # None: an axis that no weights have


def of_input(host: ModuleInfo, structure: Structure) -> Axes:
    """The axes of weights that the features of a module's input meet; of a block, those in the first module in it."""
    known = _of_weights(host)
    if known is not None:
        return known[0]
    inside = [info for info in structure.below(host.path)[1:] if _width(info, "x") == _width(host, "x")]
    return next((found[0][-1:] for info in _linear_first(inside) if (found := _of_weights(info))), (None,))


def of_output(host: ModuleInfo, structure: Structure) -> Axes:
    """The axes of weights that the features of an output come from; of a block, those in the last module in it."""
    known = _of_weights(host)
    if known is not None:
        return known[1]
    inside = [info for info in reversed(structure.below(host.path)[1:]) if _width(info, "y") == _width(host, "y")]
    return next((found[1][-1:] for info in _linear_first(inside) if (found := _of_weights(info))), (None,))


def _of_weights(host: ModuleInfo) -> tuple[Axes, Axes] | None:
    """The axes of input and output among those of the module's own weights; `None` if that is not known."""
    linear = known_map(host)
    if linear is None:
        vector = next((key for key in ("scale", "weight", "w") if key in host.params), None)
        fits = vector is not None and "kernel" not in host.params and host.params[vector].shape == (_width(host, "y"),)
        return ((Axis((*host.path, vector), 0),),) * 2 if fits and vector is not None else None
    axes = tuple(Axis((*host.path, linear.weights), i) for i in range(len(host.params[linear.weights].shape)))
    if isinstance(linear, EinsumMap):
        x_axes, w_axes, y_axes = operands(linear.equation)
        x, y = (_at_the_end(letters, w_axes) for letters in (x_axes, y_axes))
        return (tuple(axes[w_axes.index(i)] for i in x), tuple(axes[w_axes.index(i)] for i in y)) if x and y else None
    layout = linear.layout(host.params[linear.weights].shape)
    d_in = layout.d_in[-1:] if isinstance(linear, ConvMap) else layout.d_in  # the input has no axes of the window
    return tuple(axes[i] for i in d_in), tuple(axes[i] for i in layout.d_out)


def _at_the_end(letters: str, of: str) -> str:
    """The last axes of an operand of an einsum, as far as another one has them."""
    kept = len(letters)
    while kept and letters[kept - 1] in of:
        kept -= 1
    return letters[kept:]


def _linear_first(modules: list[ModuleInfo]) -> list[ModuleInfo]:
    """In the same order, but normalisations, whose scales are often whole where kernels are split, at the end."""

    def is_late(info: ModuleInfo) -> bool:
        return "embedding" in info.params or all(len(leaf.shape) < 2 for leaf in info.params.values())

    return sorted(modules, key=is_late)


def _width(info: ModuleInfo, side: str) -> Any:
    """The number of features; `None` where there is no array."""
    try:
        return getattr(info, side).shape[-1]
    except (TypeError, IndexError):
        return None
