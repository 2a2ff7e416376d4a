"""Repairs the one function of transformers 4.x that jax 0.10 broke.

The T5 family computes its relative positions with `jnp.clip(…, a_max=…)`, an argument that jax 0.10 removed. Where
jax lacks it, the function is replaced in those classes, when transformers' module is imported; nothing of jax is
touched, and on an older jax nothing at all.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType

import jax
import jax.numpy as jnp

_BROKEN = {
    "transformers.models.t5.modeling_flax_t5": ["FlaxT5Attention"],
    "transformers.models.longt5.modeling_flax_longt5": [
        "FlaxLongT5Attention",
        "FlaxLongT5LocalAttention",
        "FlaxLongT5TransientGlobalAttention",
    ],
}


def install() -> None:
    """Repairs what is imported already, and sees to it that later imports are repaired."""
    if "a_max" in inspect.signature(jnp.clip).parameters or any(isinstance(f, _Finder) for f in sys.meta_path):
        return
    for name in _BROKEN:
        if name in sys.modules:
            _repair(sys.modules[name])
    sys.meta_path.insert(0, _Finder())


def relative_position_bucket(
    relative_position: jax.Array, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128
) -> jax.Array:
    """The bucket of each relative position, memory minus query (T5, arXiv 1910.10683, section 2.1).

    Half of the buckets are for single distances, the other half for ranges that widen logarithmically up to
    `max_distance`, and everything beyond shares the last. With `bidirectional`, positive positions have buckets of
    their own; without, they count as 0.

    Args:
      relative_position: int array of any shape.
      bidirectional: whether positions after the query are seen.
      num_buckets: how many buckets there are.
      max_distance: the distance from which on all share one.

    Returns:
      int32 array of the same shape.
    """
    offset: jax.Array | int = 0
    if bidirectional:
        num_buckets //= 2
        offset = (relative_position > 0) * num_buckets
        distance = jnp.abs(relative_position)
    else:
        distance = jnp.maximum(-relative_position, 0)
    exact = num_buckets // 2
    ratio = jnp.log(distance / exact) / jnp.log(max_distance / exact)
    ranged = jnp.minimum(exact + ratio * (num_buckets - exact), num_buckets - 1)
    return (offset + jnp.where(distance < exact, distance, ranged)).astype("i4")


def _repair(module: ModuleType) -> None:
    for name in _BROKEN[module.__name__]:
        getattr(module, name)._relative_position_bucket = staticmethod(relative_position_bucket)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the broken modules as the other finders do, and has them repaired after they were loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _BROKEN:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _repair(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
