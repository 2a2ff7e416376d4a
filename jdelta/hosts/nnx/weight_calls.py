"""Calls of linear nnx modules, as `weight_forms` sees them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from jdelta.core.context import Context
from jdelta.core.edits import WeightEdit
from jdelta.hosts.nnx import graph
from jdelta.hosts.nnx.frames import Frame
from jdelta.hosts.nnx.swapping import ROLE, class_of
from jdelta.hosts.weight_forms import Own, Pure


def own_of(edit: WeightEdit, module: nnx.Module) -> dict[str, jax.Array]:
    """The own leaves of an edit, at the module that owns the weight."""
    n = len(edit.own)
    leaves = graph.leaves_of(module, edit.name)
    return {path[-1]: leaf.get_value() for path, leaf in leaves.items() if path[:n] == edit.own and len(path) == n + 1}


def bare_copy(module: nnx.Module) -> nnx.Module:
    """A copy of one module without its role and its deltas; what is in it is shared."""
    copy: nnx.Module = object.__new__(class_of(module))
    vars(copy).update(vars(module))
    vars(copy).pop(ROLE, None)
    for name in [name for name, value in vars(copy).items() if isinstance(value, graph.Leaves)]:
        graph.delete(copy, name)
    return copy


@dataclasses.dataclass(frozen=True)
class ModuleCall:
    """A `weight_forms.LinearCall` of an nnx module.

    Attributes:
      frame: the call.
    """

    frame: Frame

    @property
    def module_type(self) -> type:
        """See `LinearCall`."""
        return self.frame.module_type

    @property
    def dtype(self) -> Any:
        """See `LinearCall`."""
        return getattr(self.frame.module, "dtype", None)

    def leaves(self) -> dict[str, jax.Array]:
        """See `LinearCall`."""
        return graph.own_leaves(self.frame.module)

    def own(self, edit: WeightEdit) -> Own:
        """See `LinearCall`."""
        return own_of(edit, self.frame.module)

    def is_deterministic(self, edit: WeightEdit) -> bool:
        """See `LinearCall`."""
        return self.frame.is_deterministic(edit.name)

    def context(self, edit: WeightEdit) -> Context:
        """See `LinearCall`."""
        return self.frame.context(edit.name)

    def dropped(self, edit: WeightEdit, x: jax.Array, rate: float) -> jax.Array:
        """See `LinearCall`."""
        key = self.frame.dropout_key(edit.name)
        dropped: Any = nn.Dropout(rate).apply({}, x, deterministic=False, rngs={"dropout": key})
        return dropped

    def pure(self) -> Pure:
        """See `LinearCall`."""
        bare = bare_copy(self.frame.module)
        return _Pure(nnx.graphdef(bare))


@dataclasses.dataclass(frozen=True)
class _Pure:
    """A module as a function.

    Attributes:
      graphdef: of the module without deltas, whose parameters are all its state.
    """

    graphdef: Any

    def __call__(self, x: jax.Array, leaves: Own) -> jax.Array:
        call: Any = nnx.merge(self.graphdef, nnx.State({name: nnx.Param(leaf) for name, leaf in leaves.items()}))
        y: jax.Array = call(x)
        return y
