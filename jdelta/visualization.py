"""A model as a coloured tree in the terminal: modules, shapes, and what of it trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.text import Text
from rich.tree import Tree as RichTree

from jdelta import backbone, surgery
from jdelta.interception import attachments_of
from jdelta.outline import Leaf, Node, build, fold, shape
from jdelta.surgery import Path, Tree

# OpenDelta's colour scheme. The marks say the same without colour.
STYLES = {
    "name": "white",
    "type": "green",
    "shape": "cyan",
    "trainable": "bright_blue",
    "frozen": "bright_black",
    "folded": "red",
    "delta": "rgb(175,0,255)",
}
MARKS = {"trainable": "+", "frozen": "-", "delta": "Δ"}


class Visualization:
    """Shows a backbone, with or without deltas.

        jdelta.Visualization(model).structure_graph()

    Args:
      backbone_model: a Flax model of transformers, or a `jdelta.Backbone`.

    Raises:
      TypeError: it is neither.
    """

    def __init__(self, backbone_model: Any):
        self._face = backbone.face_of(backbone_model)

    def structure_graph(
        self,
        params: Tree | None = None,
        mask: Tree | Callable[[Tree], Tree] | None = None,
        console: Console | None = None,
    ) -> None:
        """Prints the tree of modules, repeated layers folded into one line, then the counts.

        Args:
          params: the parameters to show, shapes suffice; by default the model's own.
          mask: what trains: a tree of bools or a function from parameters to one; by default everything.
          console: where to print; by default the terminal.
        """
        structure = backbone.trace(self._face)
        if params is None:
            params = backbone.tree_of(self._face)
        params = surgery.shapes(params)
        flags = mask(params) if callable(mask) else mask
        carried = attachments_of(self._face.module)
        deltas = {path for a in carried for path in (*a.leaves, *(a.borrowed if a.active else ()))}
        leaves = _leaves(params, flags, deltas)
        node = fold(build(structure, leaves))
        console = console or Console()
        console.print(_render(node))
        console.print(_legend())
        console.print(_summary(list(leaves.values()), params, flags), highlight=False)


def _leaves(params: Tree, flags: Tree | None, deltas: set[Path]) -> dict[Path, Leaf]:
    start = surgery.root(params)
    trains = surgery.flatten(flags) if flags is not None else {}
    return {
        path[len(start) :]: Leaf(
            path[-1], leaf.shape, str(leaf.dtype), bool(trains.get(path, True)), path[len(start) :] in deltas
        )
        for path, leaf in surgery.flatten(params).items()
        if path[: len(start)] == start and hasattr(leaf, "shape")
    }


def _render(node: Node) -> RichTree:
    tree = RichTree(_label(node), guide_style=STYLES["frozen"])

    def grow(branch: RichTree, node: Node) -> None:
        for leaf in node.leaves:
            branch.add(_leaf_label(leaf))
        for child in node.children:
            is_delta = all(leaf.delta for leaf in child.all_leaves()) and any(True for _ in child.all_leaves())
            grow(branch.add(_label(child, delta=is_delta and not child.type)), child)

    grow(tree, node)
    return tree


def _label(node: Node, delta: bool = False) -> Text:
    return Text.assemble(
        *((text, STYLES["delta" if kind == "name" and delta else kind]) for kind, text in node.label())
    )


def _leaf_label(leaf: Leaf) -> Text:
    kind = "delta" if leaf.delta else "trainable" if leaf.trainable else "frozen"
    mark = MARKS[kind] + (MARKS["trainable"] if leaf.trainable else MARKS["frozen"]) * leaf.delta
    return Text(f"{mark} {leaf.name} {shape(leaf.shape)} {leaf.dtype}", STYLES[kind])


def _legend() -> Text:
    text = Text("\n")
    for kind, meaning in (("trainable", "trainable"), ("frozen", "frozen"), ("delta", "of a delta")):
        text.append(f"{MARKS[kind]} {meaning}   ", STYLES[kind])
    return text


def _summary(leaves: list[Leaf], params: Tree, flags: Tree | None) -> Text:
    total = sum(math.prod(leaf.shape) for leaf in leaves)
    trainable = sum(math.prod(leaf.shape) for leaf in leaves if leaf.trainable)
    delta = sum(math.prod(leaf.shape) for leaf in leaves if leaf.delta)
    held = sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
    chosen = params if flags is None else surgery.partition(params, flags)[0]
    adam = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(optax.adam(0.0).init, chosen))
    )
    return Text(
        f"parameters {total:,}\n"
        f"trainable  {trainable:,} ({trainable / max(total, 1):.4%})\n"
        f"delta      {delta:,} ({delta / max(total, 1):.4%})\n"
        f"memory     {size_of(held)} of parameters, {size_of(adam)} of optimizer state (Adam)"
    )


def size_of(count: float) -> str:
    """Bytes in words: `'85.3 MB'`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
