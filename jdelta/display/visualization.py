"""A model as a coloured tree: modules, shapes, and what of it trains."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from rich.console import Console
from rich.text import Text
from rich.tree import Tree as RichTree

from jdelta.core.config import as_path, shown
from jdelta.core.edits import Attachment
from jdelta.core.module_tree import Leaf, Node, build, collapse, shape
from jdelta.core.structure import Structure
from jdelta.display.drawing import Drawing, Line, Part, plain, to_html, to_page, to_svg
from jdelta.hosts.adapting import adapt
from jdelta.hosts.nnx.adapter import DummyInputs
from jdelta.trees import surgery
from jdelta.trees.surgery import Path, Tree

# OpenDelta's colour scheme. The marks say the same without colour.
STYLES = {
    "name": "white",
    "type": "green",
    "shape": "cyan",
    "trainable": "bright_blue",
    "frozen": "bright_black",
    "collapsed": "red",
    "delta": "rgb(175,0,255)",
}
MARKS = {"trainable": "+", "frozen": "-", "delta": "Δ"}
LEGEND = tuple(
    (kind, f"{MARKS[kind]} {meaning}   ")
    for kind, meaning in (("trainable", "trainable"), ("frozen", "frozen"), ("delta", "of a delta"))
)
Mask: TypeAlias = Tree | Callable[[Tree], Tree]


class Visualization:
    """Shows a backbone, with or without deltas, as a tree: in the terminal, in notebooks, as a page or a picture.

        jdelta.Visualization(model).structure_graph()
        delta.visualization().to_svg("bert_with_lora.svg")

    A notebook displays the object itself. Modules are in the order of execution; equal layers are collapsed into one
    line.

    Args:
      backbone_model: a Flax model of transformers, a `jdelta.Backbone`, or an nnx module.
      mask: what trains: a tree of bools, or a function from parameters to one; by default everything.
      dummy_inputs: of an nnx module, as in the constructor of `DeltaModel`.

    Raises:
      TypeError: the backbone is not a supported model, or the mask is neither.
    """

    def __init__(self, backbone_model: Any, mask: Mask | None = None, dummy_inputs: DummyInputs | None = None):
        self._adapter = adapt(backbone_model, dummy_inputs)
        self._mask = _checked_mask(mask)

    def structure_graph(
        self, params: Tree | None = None, mask: Mask | None = None, console: Console | None = None
    ) -> None:
        """Prints the tree of modules, then the counts.

            jdelta.Visualization(model).structure_graph()

        Args:
          params: the parameters to show, shapes suffice; by default the model's own.
          mask: what trains, in place of the mask given before.
          console: where to print; by default the terminal.
        """
        drawing = self._drawing(params, mask)
        console = console or Console()
        console.print(_branch(drawing.tree, None))
        console.print(Text("\n") + _text(drawing.legend))
        console.print("\n".join(drawing.counts), highlight=False, markup=False)

    def to_html(
        self, path: str | os.PathLike[str] | None = None, params: Tree | None = None, mask: Mask | None = None
    ) -> str:
        """Returns the tree as a page whose branches collapse, light or dark like the reader's system. It loads nothing.

            jdelta.Visualization(model).to_html("tree.html")

        Args:
          path: the file to write, if any.
          params, mask: as in `structure_graph`.

        Returns:
          The page.
        """
        return _written(to_page(self._drawing(params, mask), plain(self._adapter.class_name)), path)

    def to_svg(
        self, path: str | os.PathLike[str] | None = None, params: Tree | None = None, mask: Mask | None = None
    ) -> str:
        """Returns the tree as an SVG of text and lines, on white.

            jdelta.Visualization(model).to_svg("tree.svg")

        Args:
          path: the file to write, if any.
          params, mask: as in `structure_graph`.

        Returns:
          The SVG.
        """
        return _written(to_svg(self._drawing(params, mask)), path)

    def to_png(self, path: str | os.PathLike[str], params: Tree | None = None, mask: Mask | None = None) -> None:
        """Writes the tree as a PNG on white, with 200 pixels per inch.

            jdelta.Visualization(model).to_png("tree.png")

        Args:
          path: the file to write.
          params, mask: as in `structure_graph`.

        Raises:
          ModuleNotFoundError: matplotlib is not installed; `pip install 'jdelta[plot]'`.
        """
        from jdelta.display import plotting  # here, since matplotlib is optional

        plotting.save(plotting.tree(self._drawing(params, mask)), as_path("to_png", path), "png")

    def _repr_html_(self) -> str:
        return to_html(self._drawing(None, None))

    def _drawing(self, params: Tree | None, mask: Mask | None) -> Drawing:
        structure = self._adapter.structure()
        params = surgery.shapes(self._adapter.tree() if params is None else params)
        mask = self._mask if mask is None else _checked_mask(mask)
        flags = mask(params) if callable(mask) else mask
        carried = self._adapter.attachments
        deltas = {path for a in carried for path in (*a.leaves, *(a.unfrozen_backbone if a.active else ()))}
        leaves = _leaves(params, flags, deltas)
        counts = (*_counts(list(leaves.values()), params, flags), *_rewritten(carried, structure))
        return Drawing(_line(collapse(build(structure, leaves))), LEGEND, counts)


def _checked_mask(mask: Any) -> Mask | None:
    if mask is not None and not isinstance(mask, Mapping) and not callable(mask):
        raise TypeError(f"a mask is a tree of bools, or a function from parameters to one, got {shown(mask)}.")
    return mask


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        as_path("to a file", path).write_text(text, encoding="utf-8")
    return text


def _leaves(params: Tree, flags: Tree | None, deltas: set[Path]) -> dict[Path, Leaf]:
    start = surgery.root(params)
    trains = surgery.flatten(flags) if flags is not None else {}
    return {
        path: Leaf(path[-1], leaf.shape, str(leaf.dtype), bool(trains.get((*start, *path), True)), path in deltas)
        for path, leaf in surgery.parameters_of(params).items()
        if hasattr(leaf, "shape")
    }


def _line(node: Node, delta: bool = False) -> Line:
    """A module's line, in a delta's colour if it is none of the backbone's; below it its parameters and modules."""
    parts = tuple(("delta" if kind == "name" and delta else kind, plain(text)) for kind, text in node.label())
    return Line(parts, (*map(_leaf_line, node.leaves), *(_line(child, _is_delta(child)) for child in node.children)))


def _is_delta(node: Node) -> bool:
    leaves = list(node.all_leaves())
    return not node.type and bool(leaves) and all(leaf.delta for leaf in leaves)


def _leaf_line(leaf: Leaf) -> Line:
    kind = "delta" if leaf.delta else "trainable" if leaf.trainable else "frozen"
    mark = MARKS[kind] + (MARKS["trainable"] if leaf.trainable else MARKS["frozen"]) * leaf.delta
    return Line(((kind, f"{mark} {plain(leaf.name)} {shape(leaf.shape)} {leaf.dtype}"),))


def _branch(line: Line, above: RichTree | None) -> RichTree:
    """The line in rich's tree, and everything below it."""
    text = _text(line.parts)
    branch = RichTree(text, guide_style=STYLES["frozen"]) if above is None else above.add(text)
    for child in line.below:
        _branch(child, branch)
    return branch


def _text(parts: Iterable[Part]) -> Text:
    return Text.assemble(*((text, STYLES[kind]) for kind, text in parts))


def _rewritten(attachments: Iterable[Attachment], structure: Structure) -> Iterator[str]:
    """What is to be known of leaves that are rewritten before each run: they cost a full weight gradient."""
    edits = {e.leaf: e for a in attachments if a.active for e in a.weight_edits if not e.in_call}
    if edits:
        names = [surgery.name_of(path) for path in edits]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        size = sum(math.prod(meta.unbox(structure.leaves[path]).shape) for path in edits)
        yield (
            f"rewritten before each run: {', '.join(names[:2])}{more}. A training step computes the full gradient of "
            f"these weights: 2 FLOPs for each of their {size:,} numbers and each row that meets it, which a delta of a "
            "linear module does not take."
        )


def _counts(leaves: list[Leaf], params: Tree, flags: Tree | None) -> tuple[str, ...]:
    total = sum(math.prod(leaf.shape) for leaf in leaves)
    trainable = sum(math.prod(leaf.shape) for leaf in leaves if leaf.trainable)
    delta = sum(math.prod(leaf.shape) for leaf in leaves if leaf.delta)
    held = sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
    chosen = surgery.parameters(params) if flags is None else surgery.partition(params, flags)[0]
    adam = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(optax.adam(0.0).init, chosen))
    )
    return (
        f"parameters {total:,}",
        f"trainable  {trainable:,} ({trainable / max(total, 1):.4%})",
        f"delta      {delta:,} ({delta / max(total, 1):.4%})",
        f"memory     {size_of(held)} of parameters, {size_of(adam)} of optimizer state (Adam)",
    )


def size_of(count: float) -> str:
    """Bytes in words: `'85.3 MB'`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
