"""Pure functions on parameter trees: graft, prune, partition, combine.

A tree is a nested `dict` or a `FrozenDict`; the functions return the kind they
were given, never change their input, and run under `jax.jit` (they only move
leaves).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax.core import FrozenDict, freeze, meta
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict

Path = tuple[str, ...]
Tree = Any  # nested dict or FrozenDict of leaves


def flatten(tree: Tree) -> dict[Path, Any]:
    """`{path: leaf}` of a tree. Empty sub-trees are kept, as `empty_node`."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"expected a parameter tree (dict or FrozenDict), got {type(tree).__name__}.")
    return flatten_dict(dict(tree), keep_empty_nodes=True)


def unflatten(leaves: Mapping[Path, Any], like: Tree = None) -> Tree:
    """The inverse of `flatten`; a `FrozenDict` where `like` is one."""
    tree = unflatten_dict(leaves)
    return freeze(tree) if isinstance(like, FrozenDict) else tree


def root(tree: Tree) -> Path:
    """Where the parameters begin: `('params',)` in a tree of collections, else `()`.

    Models with batch statistics keep `{'params': …, 'batch_stats': …}` where others keep the parameters alone.
    """
    return ("params",) if "params" in tree else ()


def parameters(tree: Tree) -> Tree:
    """The parameters of a tree of collections; any other tree as it is."""
    return tree.get("params", tree)


def name_of(path: Sequence[str]) -> str:
    """The dot-joined name of a path."""
    return ".".join(path)


def require_alive(tree: Tree) -> None:
    """Raises `RuntimeError` if arrays of the tree were donated to a jitted function, which deletes them."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
            raise RuntimeError(
                "these parameters were donated to a jitted function (donate_argnums), and so deleted. Take the tree "
                "that it returned: pass it as params=…, or set model.params to it."
            )


def graft(params: Tree, delta_params: Tree) -> Tree:
    """Puts the leaves of a delta into a backbone's tree.

        params = jdelta.graft(params, delta.init(rng))

    Args:
      params: the backbone's parameter tree.
      delta_params: the delta's leaves at their paths in that tree.

    Returns:
      A new tree with the leaves of both.

    Raises:
      ValueError: a path of the delta is already taken.
    """
    return _merge((params, delta_params), "graft: {} is in the tree already. Prune the old delta first.")


def prune(params: Tree, name: str) -> Tree:
    """Takes a delta's leaves out again: the inverse of `graft`, bit for bit.

    Args:
      params: a grafted tree.
      name: the delta's name, for example `"lora"`: every sub-tree of that name goes.

    Returns:
      A new tree without them.

    Raises:
      ValueError: the tree holds no delta of that name.
    """
    leaves = flatten(params)
    kept = {path: leaf for path, leaf in leaves.items() if name not in path}
    if len(kept) == len(leaves):
        raise ValueError(f"prune: the tree holds no delta named {name!r}.")
    return unflatten(kept, like=params)


def partition(params: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """Splits a tree in two by a mask; neither part has holes.

        trainable, frozen = jdelta.partition(params, mask)
        grads = jax.grad(lambda t: loss(jdelta.combine(t, frozen)))(trainable)

    Args:
      params: a parameter tree.
      mask: a tree of the same structure with a bool at each leaf.

    Returns:
      The tree of the leaves whose mask is true, and the tree of the others.

    Raises:
      ValueError: mask and tree differ in structure.
    """
    leaves, flags = flatten(params), flatten(mask)
    if leaves.keys() != flags.keys():
        odd = min(leaves.keys() ^ flags.keys())
        where = "mask" if odd in leaves else "tree"
        raise ValueError(f"partition: {name_of(odd)!r} is missing from the {where}.")
    chosen = {path for path, flag in flags.items() if flag is not empty_node and flag}
    selected = {path: leaf for path, leaf in leaves.items() if path in chosen}
    rest = {path: leaf for path, leaf in leaves.items() if path not in chosen}
    return unflatten(selected, like=params), unflatten(rest, like=params)


def combine(*trees: Tree, like: Tree = None) -> Tree:
    """Puts parts of a tree together again: the inverse of `partition`, bit for bit.

    Args:
      *trees: parts that share no leaf.
      like: optionally a tree of the wanted structure (shapes suffice), to check that nothing is missing.

    Returns:
      One tree with all leaves.

    Raises:
      ValueError: two parts hold the same path, or the result differs in structure from `like`.
    """
    merged = _merge(trees, "combine: {} is in more than one of the trees.")
    if like is not None:
        have, want = flatten(merged).keys(), flatten(like).keys()
        if missing := want - have:
            raise ValueError(
                f"combine: {len(missing)} of {len(want)} leaves are missing, first {name_of(min(missing))!r}."
            )
        if surplus := have - want:
            raise ValueError(
                f"combine: {len(surplus)} leaves do not belong to the tree, first {name_of(min(surplus))!r}."
            )
    return merged


def replaced(params: Tree, values: Mapping[Path, Any]) -> Tree:
    """The tree with other values at some paths, each in the old one's box and sharding; new paths are added."""
    leaves = dict(flatten(params))
    for path, value in values.items():
        leaves[path] = in_place_of(leaves[path], value) if path in leaves else jax.device_put(value)
    return unflatten(leaves, like=params)


def in_place_of(old: Any, new: Any) -> Any:
    """A value as a tree held the old one: in its box of metadata, and with its sharding."""
    held = meta.unbox(old)
    placed = isinstance(held, jax.Array) and not isinstance(held, jax.core.Tracer) and held.committed
    new = jax.device_put(new, held.sharding if placed else None)  # with None it is as free to move as a new array
    return old.replace_boxed(new) if isinstance(old, meta.AxisMetadata) else new


def shapes(tree: Tree) -> Tree:
    """The same tree with a `jax.ShapeDtypeStruct` in place of each leaf."""
    return jax.eval_shape(lambda t: t, tree)


def _merge(trees: Sequence[Tree], message: str) -> Tree:
    merged: dict[Path, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path == ():  # an entirely empty tree
                continue
            if path in merged and not (leaf is empty_node and merged[path] is empty_node):
                raise ValueError(message.format(repr(name_of(path))))
            merged[path] = leaf
    # A leaf where another tree has a sub-tree, and an empty node that has been filled.
    for path in list(merged):
        for above in (path[:i] for i in range(1, len(path))):
            if above in merged:
                if merged[above] is not empty_node:
                    raise ValueError(message.format(repr(name_of(above))))
                del merged[above]
    return unflatten(merged, like=trees[0] if trees else None)
