"""What specs are of: leaves in boxes and variables."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax.core import meta
from jax.sharding import NamedSharding

from jdelta.trees import states, surgery
from jdelta.trees.surgery import Tree, empty_node


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of a leaf, in a box or not; `()` of an empty node."""
    return tuple(np.shape(meta.unbox(leaf))) if leaf is not empty_node else ()


def is_box(leaf: Any) -> bool:
    """Whether it is a box such as `nn.Partitioned`."""
    return isinstance(leaf, meta.AxisMetadata)


def is_boxed(leaf: Any) -> bool:
    """Whether it is such a box, or a variable of flax.nnx."""
    return is_box(leaf) or states.is_variable(leaf)


def in_boxes(state: Tree) -> Tree:
    """A state of flax.nnx without variables: what they say of the sharding of their arrays is said by boxes.

    Specs and arrays that are on a mesh stay as they are.
    """
    leaves = {}
    for keys, leaf in states.walk(state):
        value = states.value_of(leaf)
        placed = isinstance(getattr(value, "sharding", None), NamedSharding)
        if hasattr(value, "shape") and not placed and (spec := states.partition_spec(leaf)):
            value = meta.Partitioned(value, tuple(spec))
        leaves[tuple(map(str, keys))] = value
    return surgery.unflatten(leaves, like=state, variables=False)
