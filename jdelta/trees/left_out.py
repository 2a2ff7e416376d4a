"""Trees that say which deltas a model is to run without.

A marker in the structure of the tree says so, and no leaf: `{"without.deltas": {name: {}}}` beside the parameters. So
it passes through `jax.jit` and every other transformation, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jdelta.trees import surgery
from jdelta.trees.surgery import Tree

MARK = "without.deltas"  # no name of a delta has a dot in it


def marked(params: Tree, names: Iterable[str]) -> Tree:
    """The tree with the names of deltas that are left out; those that it names already stay."""
    start = surgery.root(params)
    marks = {(*start, MARK, name): surgery.empty_node for name in names}
    return surgery.unflatten(surgery.flatten(params) | marks, like=params)


def names_in(variables: Any) -> tuple[str, ...]:
    """The names of the deltas that are left out of a tree of collections, in alphabetical order."""
    return tuple(sorted(variables.get("params", {}).get(MARK, ())))


def unmarked(variables: Any) -> Any:
    """A tree of collections without the marker."""
    return {**variables, "params": {key: leaf for key, leaf in variables["params"].items() if key != MARK}}
