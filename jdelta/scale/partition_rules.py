"""`PartitionSpec`s by the names of leaves, and those of a training state by the names of parameters in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax.core import meta
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdelta.core.backbone_specs import parts_of
from jdelta.scale.specs import is_boxed, shape_of
from jdelta.trees import addressing, states, surgery
from jdelta.trees.surgery import Tree, empty_node

Rule = tuple[str, P]


def match_partition_rules(rules: Iterable[Rule], tree: Any, default: P | None = None) -> Any:
    """Returns the `PartitionSpec` of each leaf, by its name: the first rule that matches applies.

        rules = [("query.kernel", P(None, "model")), (r"[r]output\\.dense\\.kernel", P("model", None))]
        specs = jdelta.match_partition_rules(rules, model.params, default=P())

    Args:
      rules: pairs of a pattern, by the naming rules of `jdelta.match`, and a spec.
      tree: parameters or their shapes, or a tree with such leaves, such as a `TrainState`.
      default: the spec of leaves that no rule matches. (Scalars need no rule: theirs is always `P()`.)

    Returns:
      A tree of the same structure, with a spec for each leaf; in the variables of flax.nnx, as `nnx.get_partition_spec`
      gives them.

    Raises:
      TypeError: a rule is not a pair of a pattern and a `PartitionSpec`.
      ValueError: no rule matches a leaf, a spec has more entries than the leaf has axes, or a regex is invalid.
    """
    if isinstance(rules, str | bytes) or not isinstance(rules, Iterable):
        raise TypeError(f"match_partition_rules: expected a list of pairs (pattern, PartitionSpec), got {rules!r}.")
    if default is not None and not isinstance(default, P):
        raise TypeError(f"match_partition_rules: default is a PartitionSpec, got {default!r}.")
    rules = [_checked_rule(rule) for rule in rules]

    def spec(path: Any, leaf: Any) -> Any:
        if states.is_variable(leaf):
            return leaf.replace(spec(path, states.value_of(leaf)))
        name, ndim = jax.tree_util.keystr(path, simple=True, separator="."), np.ndim(meta.unbox(leaf))
        if not ndim:
            return P()
        pattern, found = next(((p, s) for p, s in rules if addressing.matches(name, p)), ("default", default))
        if found is None:
            raise ValueError(f"match_partition_rules: no rule matches {name!r}. Add one, or give a default=P().")
        if len(found) > ndim:
            raise ValueError(f"match_partition_rules: {pattern!r} gives {found} to {name!r}, which has {ndim} axes.")
        return found

    return jax.tree_util.tree_map_with_path(spec, tree, is_leaf=is_boxed)


def state_shardings(state: Any, shardings: Tree) -> Any:
    """Returns the sharding of each leaf of a training state, from those of the parameters.

        state = jax.eval_shape(lambda: TrainState.create(apply_fn=model.__call__, params=params, tx=tx))
        shardings = jdelta.state_shardings(state, delta.shardings(specs, mesh))

    Args:
      state: a tree with leaves under the names of parameters: a `TrainState`, an optimizer's state, or the `nnx.state`
        of an `nnx.Optimizer`; shapes suffice.
      shardings: a tree of the parameters with `NamedSharding`s or `PartitionSpec`s.

    Returns:
      A tree of the structure of `state`. A leaf whose path ends with that of a parameter, such as a moment of Adam, is
      sharded like it, if its axes allow that; all others are replicated.

    Raises:
      ValueError: `shardings` is empty.
    """
    known = {path: leaf for path, leaf in surgery.flatten(shardings).items() if leaf is not empty_node}
    if not known:
        raise ValueError("state_shardings: the tree of shardings holds nothing.")
    first = next(iter(known.values()))
    replicated = NamedSharding(first.mesh, P()) if isinstance(first, NamedSharding) else P()

    def like(keys: Any, leaf: Any) -> Any:
        if states.is_variable(leaf):
            return leaf.replace(like(keys, states.value_of(leaf)))
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        own = next((known[path[i:]] for i in range(len(path)) if path[i:] in known), replicated)
        return own if _fits(own, shape_of(leaf)) else replicated

    return jax.tree_util.tree_map_with_path(like, state, is_leaf=is_boxed)


def _fits(held: Any, shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape can be sharded so."""
    spec = held.spec if isinstance(held, NamedSharding) else held
    sizes = held.mesh.shape if isinstance(held, NamedSharding) else {}
    parts = [parts_of(entry, sizes) if sizes else 1 for entry in spec]
    return len(spec) <= len(shape) and not any(size % n for size, n in zip(shape, parts, strict=False))


def _checked_rule(rule: Any) -> Rule:
    if not (isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str) and isinstance(rule[1], P)):
        raise TypeError(f"match_partition_rules: a rule is a pair (pattern, PartitionSpec), got {rule!r}.")
    return rule[0], rule[1]
