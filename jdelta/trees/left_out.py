"""Trees that say which deltas a model is to run without.

A marker in the structure of the tree says so, and no leaf: `{"without.deltas": {name: {}}}` beside the parameters. An
`nnx.State` keeps the leaves, as the graph's definition counts them; the metadata of their variables say so. So it
passes through `jax.jit` and every other transformation, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flax import nnx
from flax.traverse_util import unflatten_dict

from jdelta.trees import states, surgery
from jdelta.trees.surgery import Path, Tree

MARK = "without.deltas"  # no name of a delta has a dot in it


def marked(params: Tree, names: Iterable[str]) -> Tree:
    """The tree with the names of deltas that are left out; those that it names already stay."""
    start = surgery.root(params)
    marks = {(*start, MARK, name): surgery.empty_node for name in names}
    return surgery.unflatten(surgery.flatten(params) | marks, like=params)


def marked_state(state: Tree, paths: Iterable[Path]) -> Tree:
    """The state with these leaves of deltas marked.

    Raises:
      ValueError: they are in no variables.
    """
    gone, leaves = set(paths), dict(states.walk(state))
    for keys, leaf in leaves.items():
        path = tuple(map(str, keys))
        if path not in gone:
            continue
        if not states.is_variable(leaf):
            raise ValueError(
                f"without: {surgery.name_of(path)!r} is in no variable, which could say that it is left out. Pass the "
                "state as nnx.state and nnx.split give it."
            )
        leaves[keys] = leaf.replace(leaf.get_raw_value(), **{MARK: True})
    return type(state)(unflatten_dict(leaves))


def is_marked(variable: nnx.Variable[Any]) -> bool:
    """Whether it holds a leaf of a delta that is left out."""
    return bool(variable.get_metadata().get(MARK))


def names_in(variables: Any) -> tuple[str, ...]:
    """The names of the deltas that are left out of a tree of collections, in alphabetical order."""
    return tuple(sorted(variables.get("params", {}).get(MARK, ())))


def unmarked(variables: Any) -> Any:
    """A tree of collections without the marker."""
    return {**variables, "params": {key: leaf for key, leaf in variables["params"].items() if key != MARK}}
