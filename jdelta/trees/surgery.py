"""Pure functions on parameter trees: graft, prune, partition, combine.

A tree is a nested `dict`, a `FrozenDict` or an `nnx.State`. The functions return the type that they get, with the
variables of a state, do not change their input, and run under `jax.jit`, since they only move leaves. They raise
`RuntimeError` for arrays that were donated.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax
from flax.core import meta
from flax.traverse_util import empty_node as empty_node

from jdelta.trees import states

Path = tuple[str, ...]
Tree: TypeAlias = Any  # nested dict, FrozenDict or nnx.State of leaves


class HasPaths(Protocol):
    """A delta: what knows the paths of its own leaves."""

    @property
    def paths(self) -> Sequence[Path]:
        """The paths, without the collection's name."""
        ...


# The leaves of each of jdelta's methods, below the name that the delta has by default.
_LEAVES = {
    "lora": r"(\w+\.)?(a|b)",
    "adapter": r"(down|up)\.(kernel|bias)",
    "parallel_adapter": r"(down|up)\.(kernel|bias)",
    "low_rank_adapter": r"(down|up)\.(left|right|bias)",
    "compacter": r"(down|up)\.(bias|(W|phm_rule)\w*)|phm_rule\w*|(down|up)_W\w*",
    "bitfit": r"bias",
    "prefix": r"keys|values|embed\.embedding|(down|up)\.(kernel|bias)",
    "soft_prompt": r"embedding",
}


def flatten(tree: Tree) -> dict[Path, Any]:
    """`{path: leaf}` of a tree. Empty sub-trees are kept, as `empty_node`.

    Of a tree of flax.nnx, the leaves are what is in the variables, and whole numbers in a path become strings.
    """
    found = {keys: states.value_of(leaf) for keys, leaf in states.walk(_checked_tree(tree))}
    leaves = {tuple(map(str, keys)): leaf for keys, leaf in found.items()}
    if len(leaves) < len(found):
        raise ValueError("the tree has a number and a string of the same digits for keys in one place.")
    return leaves


def _checked_tree(tree: Any) -> Tree:
    if not isinstance(tree, Mapping):
        raise TypeError(f"expected a parameter tree (dict, FrozenDict or nnx.State), got {type(tree).__name__}.")
    return tree


def unflatten(leaves: Mapping[Path, Any], like: Tree = None, variables: bool = True, deltas: bool = True) -> Tree:
    """The inverse of `flatten`, of the type of `like`.

    Keys that are whole numbers are those of `like`. If it has variables, a leaf at a path of it is in one of the same
    type and metadata, and any other leaf in a `DeltaParam`, or with `deltas=False` in none; with `variables=False`,
    none is.
    """
    return states.unflatten(leaves, [like], variables, deltas)


def root(tree: Tree) -> Path:
    """Where the parameters begin: `('params',)` in a tree of collections, else `()`.

    Models with batch statistics keep `{'params': …, 'batch_stats': …}` where others keep the parameters alone.
    """
    return ("params",) if "params" in _checked_tree(tree) and not states.is_state(tree) else ()


def parameters(tree: Tree) -> Tree:
    """The parameters of a tree of collections, or of a state with other variables; any other tree as it is."""
    if states.is_state(_checked_tree(tree)):
        return states.parameters(tree)
    return tree.get("params", tree)


def parameters_of(params: Tree) -> dict[Path, Any]:
    """Path to leaf of the parameters in a tree, without other collections and the name of theirs."""
    if states.is_state(params):
        return flatten(states.parameters(params))
    leaves, start = flatten(params), root(params)
    return {path[len(start) :]: leaf for path, leaf in leaves.items() if path[: len(start)] == start}


def select(tree: Tree, paths: Iterable[Path]) -> Tree:
    """The sub-tree of some leaves of the parameters: a `dict`, or an `nnx.State` if the tree is one."""
    flat, start = flatten(tree), root(tree)
    like = tree if states.is_state(tree) else dict(tree)
    return unflatten({(*start, *path): flat[(*start, *path)] for path in paths}, like)


def name_of(path: Sequence[str]) -> str:
    """The dot-joined name of a path."""
    return ".".join(path)


def require_alive(tree: Tree) -> None:
    """Raises `RuntimeError` if arrays of the tree were donated to a jitted function, which deletes them."""
    if is_deleted(tree):
        raise RuntimeError(
            "these parameters were donated to a jitted function (donate_argnums), and so deleted. Take the tree that "
            "it returned: pass it as params=…, or set model.params to it; an nnx module takes it by nnx.update."
        )


def is_deleted(tree: Tree) -> bool:
    """Whether an array of the tree is deleted."""
    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    return any(leaf.is_deleted() for leaf in arrays if not isinstance(leaf, jax.core.Tracer))


def graft(params: Tree, delta_params: Tree) -> Tree:
    """Adds the leaves of a delta to a backbone's tree.

        params = jdelta.graft(params, delta.init(rng))

    Args:
      params: the backbone's parameter tree.
      delta_params: the delta's leaves at their paths in that tree.

    Returns:
      A new tree with the leaves of both.

    Raises:
      ValueError: a path of the delta is already taken.
    """
    if states.is_state(delta_params) and not states.is_state(params):
        delta_params = unflatten(flatten(delta_params))
    return _merge((params, delta_params), "graft: {} is in the tree already. Prune the old delta first.", deltas=True)


def prune(params: Tree, *deltas: HasPaths | Tree | Iterable[Path | str] | str) -> Tree:
    """Removes the leaves of deltas: the inverse of `graft`, bit for bit.

        params = jdelta.prune(params, delta)
        params = jdelta.prune(params, "lora")  # the same, by name

    Args:
      params: a grafted tree.
      *deltas: each a delta, attached or not; a tree of its leaves, as `graft` takes it; paths of leaves, as
        `delta.paths` gives them, or dot-joined; or the name that a method of jdelta gives to its deltas, such as
        `"lora"` or `"lora_2"`. With any other name, only LoRA's leaves can be distinguished from a backbone's, or
        those that a state has in variables of deltas.

    Returns:
      A new tree without them.

    Raises:
      TypeError: an argument is not a delta, a tree, paths or a name.
      ValueError: the tree holds no leaf of a delta, or a name may also be that of a part of the backbone; pass the
        delta instead.
    """
    require_alive(params)
    leaves, start = flatten(params), root(params)
    kept = dict(leaves)
    for delta in deltas:
        if getattr(delta, "paths", None) == ():  # BitFit where all biases are there, LN tuning: no leaves of its own
            continue
        if isinstance(delta, str):
            paths = _paths_of(delta, leaves, states.delta_paths(params))
        else:
            paths = {(*start, *path) for path in _checked_paths(delta)} & leaves.keys()
        if not paths:
            named = f"delta named {delta!r}" if isinstance(delta, str) else "leaf of this delta"
            raise ValueError(f"prune: the tree holds no {named}.")
        kept = {path: leaf for path, leaf in kept.items() if path not in paths}
    return unflatten(kept, like=params)


def _checked_paths(delta: Any) -> list[Path]:
    found = flatten(parameters(delta)) if isinstance(delta, Mapping) else getattr(delta, "paths", delta)
    paths = (
        [path.split(".") if isinstance(path, str) else path for path in found] if isinstance(found, Iterable) else []
    )
    if not paths or not all(isinstance(p, Sequence) and all(isinstance(key, str | int) for key in p) for p in paths):
        raise TypeError(f"prune: expected a delta, its name, or the paths of its leaves, got {delta!r}.")
    return [tuple(map(str, path)) for path in paths]


def _paths_of(name: str, leaves: Mapping[Path, Any], known: Collection[Path]) -> set[Path]:
    """The leaves of the delta of this name, if each leaf below the name is known to be, or looks like, a delta's."""
    own = re.compile(_LEAVES.get(re.sub(r"_\d+$", "", name), "(?!)"))
    paths = {path for path in leaves if name in path}
    for path in paths:
        at = path.index(name)
        host, below = path[:at], name_of(path[at + 1 :])
        is_lora = below in ("a", "b") and any((*host, weight) in leaves for weight in ("kernel", "embedding"))
        if not (path in known or own.fullmatch(below) or is_lora):
            raise ValueError(
                f"prune: {name!r} may name a part of the backbone, at {name_of(path)!r}. Pass the delta itself, "
                "jdelta.prune(params, delta), or the paths of its leaves."
            )
    return paths


def partition(params: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """Splits a tree by a mask into two trees without empty places.

        trainable, frozen = jdelta.partition(params, mask)
        grads = jax.grad(lambda t: loss(jdelta.combine(t, frozen)))(trainable)

    Args:
      params: a parameter tree.
      mask: a tree of the same structure with a bool at each leaf.

    Returns:
      The tree of the leaves whose mask is true, and the tree of the others.

    Raises:
      ValueError: the mask and the tree differ in structure.
    """
    require_alive(params)
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
    """Joins parts of a tree: the inverse of `partition`, bit for bit.

        trainable, frozen = jdelta.partition(params, mask)
        params = jdelta.combine(trainable, frozen)

    Args:
      *trees: parts that share no leaf.
      like: a tree of the expected structure (shapes suffice), to check that nothing is missing.

    Returns:
      One tree with all leaves.

    Raises:
      ValueError: two parts hold the same path, or the structure of the result is not that of `like`.
    """
    merged = _merge(trees, "combine: {} is in more than one of the trees.", deltas=False)
    if like is not None:
        of_parameters = states.is_state(merged) and not states.is_state(like)  # which has no statistics and no keys
        have, want = flatten(states.parameters(merged) if of_parameters else merged).keys(), flatten(like).keys()
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
    return in_box_of(old, new)


def in_box_of(old: Any, new: Any) -> Any:
    """A value in the box of metadata that an old one had, if it had one."""
    return old.replace_boxed(new) if isinstance(old, meta.AxisMetadata) else new


def shapes(tree: Tree) -> Tree:
    """The same tree with a `jax.ShapeDtypeStruct` in place of each leaf."""
    require_arrays(_checked_tree(tree))
    return jax.eval_shape(lambda t: t, tree)


def require_arrays(tree: Tree) -> None:
    """Raises `TypeError` if a leaf of the parameters is neither an array nor a shape."""
    for name, leaf in states.named_leaves(states.parameters(tree) if states.is_state(tree) else tree).items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"the leaves of parameters are arrays or shapes; {name!r} is {type(leaf).__name__}.")


def _merge(trees: Sequence[Tree], message: str, deltas: bool) -> Tree:
    require_alive(trees)
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
    return states.unflatten(merged, trees, deltas=deltas)
