"""Trees of flax.nnx: states, whose leaves are in variables, and trees with whole numbers among their keys.

A path of jdelta's is of strings, and a leaf is a plain value; what a tree had in their place is put back from a tree
that has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core import FrozenDict, freeze
from flax.traverse_util import empty_node, unflatten_dict

from jdelta.trees.variables import DeltaParam


def is_state(tree: Any) -> bool:
    """Whether it is an `nnx.State`."""
    return isinstance(tree, nnx.State)


def is_variable(leaf: Any) -> bool:
    """Whether it is an `nnx.Variable`."""
    return isinstance(leaf, nnx.Variable)


def is_parameter(leaf: Any) -> bool:
    """Whether it is an `nnx.Param`, or in no variable at all: then nothing says that it is something else."""
    return isinstance(leaf, nnx.Param) or not is_variable(leaf)


def value_of(leaf: Any) -> Any:
    """What is in a variable, as it is stored; anything else as it is."""
    if not is_variable(leaf):
        return leaf
    value = leaf.get_raw_value()
    return value[...] if isinstance(value, jax.Ref) else value


def partition_spec(leaf: Any) -> Any:
    """The `PartitionSpec` that the metadata of a variable mean; `None` if there are none."""
    if not (is_variable(leaf) and leaf.get_metadata().get("out_sharding")):
        return None
    return nnx.get_partition_spec(leaf).get_raw_value()


def walk(tree: Mapping[Any, Any], keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The keys and the leaf at each end of a tree, both as they are in it. Empty sub-trees are `empty_node`s."""
    for key, value in tree.items():
        if not (isinstance(value, dict | FrozenDict) or is_state(value)):
            yield (*keys, key), value
        elif value:
            yield from walk(value, (*keys, key))
        else:
            yield (*keys, key), empty_node


def named_leaves(tree: Any) -> dict[str, Any]:
    """Dot-joined name to array of each leaf of any pytree; a variable adds nothing to a name."""
    found = {}
    for above, held in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable):
        for below, leaf in jax.tree_util.tree_leaves_with_path(value_of(held)):
            found[jax.tree_util.keystr((*above, *below), simple=True, separator=".")] = leaf
    return found


def delta_paths(tree: Mapping[Any, Any]) -> set[tuple[str, ...]]:
    """The paths of leaves whose variables say that they are deltas'."""
    return {tuple(map(str, keys)) for keys, leaf in walk(tree) if isinstance(leaf, DeltaParam)}


def parameters(state: Any) -> Any:
    """The state without what is in variables other than `nnx.Param`: statistics, caches, random keys."""
    leaves = dict(walk(state))
    kept = {keys: leaf for keys, leaf in leaves.items() if is_parameter(leaf)}
    return state if len(kept) == len(leaves) else type(state)(unflatten_dict(kept))


def unflatten(
    leaves: Mapping[tuple[str, ...], Any], like: Sequence[Any], variables: bool = True, deltas: bool = True
) -> Any:
    """A tree of the leaves, in the form of others.

    It is an `nnx.State` if one of the others is, otherwise of the type of the first. A leaf that one of them has in a
    variable is in one of its type, with all its metadata. Keys are numbers where one of the others has numbers.

    Args:
      leaves: path to value.
      like: the others.
      variables: whether what was in variables is to be in variables again.
      deltas: whether a leaf that none of the others has, or a plain tree alone, is one of a delta, to be in
        a `DeltaParam` if others have variables. Else it stays bare: flax knows its type from the module.
    """
    form = _form_of(like)
    made = {form.keys_of(path): form.leaf(path, leaf, deltas) if variables else leaf for path, leaf in leaves.items()}
    tree = unflatten_dict(made)
    state = next((type(other) for other in like if is_state(other)), None)
    if state is not None:
        return state(tree)
    return freeze(tree) if like and isinstance(like[0], FrozenDict) else tree


@dataclasses.dataclass
class _Form:
    """How trees hold their leaves.

    Attributes:
      numbered: paths of what is around leaves whose keys in one of the trees are whole numbers.
      variables: path to variable.
      bare: paths of leaves without one in a tree that could have it there.
    """

    numbered: set[tuple[str, ...]] = dataclasses.field(default_factory=set)
    variables: dict[tuple[str, ...], Any] = dataclasses.field(default_factory=dict)
    bare: set[tuple[str, ...]] = dataclasses.field(default_factory=set)

    def keys_of(self, path: tuple[str, ...]) -> tuple[Any, ...]:
        if not self.numbered:
            return path
        return tuple(int(k) if path[:i] in self.numbered and k.isdecimal() else k for i, k in enumerate(path))

    def leaf(self, path: tuple[str, ...], value: Any, delta: bool) -> Any:
        if path in self.variables and value is not empty_node:
            return self.variables[path].replace(value)
        if not (self.variables and delta) or path in self.bare or value is empty_node:
            return value
        return DeltaParam(value)


def _form_of(trees: Sequence[Any]) -> _Form:
    form = _Form()
    for tree in trees:
        leaves = dict(walk(tree)) if tree is not None else {}
        variables = is_state(tree) or any(map(is_variable, leaves.values()))
        for keys, leaf in leaves.items():
            path = tuple(map(str, keys))
            form.numbered.update(path[:i] for i, key in enumerate(keys) if isinstance(key, int))
            if is_variable(leaf):
                form.variables[path] = leaf
            elif variables:
                form.bare.add(path)
    return form
