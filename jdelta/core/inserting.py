"""Layers of the user's own, put in at modules by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from flax import linen as nn

from jdelta.core.attaching import put
from jdelta.core.edits import CallEdit
from jdelta.core.state import DeltaState
from jdelta.trees import surgery


def insert_sequential_module(
    state: DeltaState,
    name: str | Sequence[str],
    layer: nn.Module,
    where: Literal["after", "before"] = "after",
    method: str = "__call__",
) -> None:
    """Inserts a layer after a module, `y -> layer(y)`, or before it, `x -> layer(x)`.

        delta = jdelta.DeltaModel(model)
        delta.insert_sequential_module("pooler", nn.LayerNorm())

    `x` is the module's first array argument; `y` the array it returns, alone or as an element: the first, if that
    is an array, otherwise the only array, or the only one of the shape of `x`, as in `(cache, y)`.

    Args:
      name: the name of the module, or patterns that match one or several.
      layer: any unbound linen module that maps an array to an array.
      where: the side of the module.
      method: the module's method that it goes around, where the model runs the module by another one than `__call__`.

    Raises:
      TypeError: the layer is not a linen module, or the module has no floating array at that place.
      ValueError: there is no such module.
    """
    if not isinstance(where, str) or where not in ("after", "before"):
        raise ValueError(f"where is 'after' or 'before', got {where!r}.")
    _insert(state, name, where, layer, method=method)


def insert_parallel_module(
    state: DeltaState, name: str | Sequence[str], layer: nn.Module, start: str | None = None
) -> None:
    """Inserts a layer beside a module: `y + layer(x)`.

        delta = jdelta.DeltaModel(model)
        delta.insert_parallel_module("0.output.dense", nn.Dense(768), start="0.intermediate")

    Args:
      name: the name of the module, or patterns.
      layer: any unbound linen module; its output has the shape of `y`.
      start: a pattern of one module that runs earlier, whose input is then the input of `layer`, so that the layer
        spans everything from there to the output of `name`.

    Raises:
      TypeError, ValueError: as `insert_sequential_module`; also if `start` does not come first.
    """
    _insert(state, name, "parallel", layer, start)


def replace_module(state: DeltaState, name: str | Sequence[str], layer: nn.Module) -> None:
    """Runs a layer in place of a module, with the module's arguments. The module's parameters stay in the tree.

        delta = jdelta.DeltaModel(model)
        delta.replace_module("pooler", nn.Dense(768))

    Args:
      name: the name of the module, or patterns.
      layer: any unbound linen module that takes what the module takes and returns what it returns.

    Raises:
      TypeError, ValueError: as `insert_sequential_module`.
    """
    _insert(state, name, "replace", layer)


def _insert(
    state: DeltaState,
    name: str | Sequence[str],
    where: Literal["after", "before", "parallel", "replace"],
    layer: nn.Module,
    start: str | None = None,
    method: str = "__call__",
) -> None:
    """Puts a layer at the modules that a name or patterns mean."""
    if not isinstance(layer, nn.Module):
        raise TypeError(f"the layer is a flax.linen module, got {layer!r}.")
    begin = None
    if start is not None:
        begin, *more = state.structure.find([start])
        if more:
            raise ValueError(f"start={start!r} means {1 + len(more)} modules; name one.")
    own = state.attachment
    edits = []
    for host in state.structure.find_run_by([name] if isinstance(name, str) else name, method):
        number = sum(edit.host == host.path and edit.layer is not None for edit in own.edits)
        leaf = (state.name, str(number)) if number else (state.name,)
        edits.append(
            CallEdit(host.path, where, layer, span_input=begin.path if begin else None, leaf=leaf, method=method)
        )
    put(state, [*own.edits, *edits])
    state.inserted += [surgery.name_of(edit.host) for edit in edits]
