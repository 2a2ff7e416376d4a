"""Entries of a `PartitionSpec`, and what they are of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.core import meta

from jdelta.trees.surgery import empty_node

Entry = str | tuple[str, ...] | None  # the mesh axes over which one axis of a leaf is sharded


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry."""
    return (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, tuple) else ()


def parts_of(entry: Entry, sizes: Mapping[str, int]) -> int:
    """The number of devices over which an entry shards an axis."""
    return math.prod(sizes[name] for name in names_of(entry))


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of a leaf, in a box or not; `()` of an empty node."""
    return tuple(np.shape(meta.unbox(leaf))) if leaf is not empty_node else ()


def is_box(leaf: Any) -> bool:
    """Whether it is a box such as `nn.Partitioned`."""
    return isinstance(leaf, meta.AxisMetadata)
