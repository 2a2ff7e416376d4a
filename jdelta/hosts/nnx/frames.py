"""The functions of modules that are in progress in one run of an nnx model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
from flax import errors, nnx
from flax.nnx import tracers

from jdelta.core.arguments import arguments, is_array
from jdelta.core.context import Context, current_step
from jdelta.hosts import call_edits
from jdelta.hosts.nnx import graph
from jdelta.hosts.nnx.swapping import class_of
from jdelta.trees import surgery
from jdelta.trees.surgery import Path

CALL = "__call__"


@dataclasses.dataclass(eq=False)
class Frame:
    """One function of a module in progress."""

    module: nnx.Module
    path: Path
    name: str
    args: tuple
    kwargs: Mapping[str, Any]
    outer: Frame | None
    trace: tracers.TraceState

    @property
    def module_type(self) -> type:
        """The module's class."""
        return class_of(self.module)

    def describe(self) -> str:
        """Name and class of the module, for messages."""
        return f"{surgery.name_of(self.path) or 'the root module'} ({self.module_type.__name__})"

    def has_cache(self) -> bool:
        """Whether the call reads and writes a cache of keys and values: one that it is given, or variables of modules
        that decode."""
        given = arguments(self.module_type, tuple(self.args), self.kwargs).arguments
        if any(jax.tree.leaves(given.get(name)) for name in ("cache", "kv_cache")):
            return True
        held = [vars(module) for _, module in nnx.iter_modules(self.module)]
        caching = [each for each in held if any(isinstance(value, nnx.Cache) for value in each.values())]
        return bool(caching) and any(each.get("decode") or given.get("decode") for each in caching)

    def holder(self, name: str) -> graph.Leaves | None:
        """What a delta has at the module."""
        found = vars(self.module).get(name)
        return found if isinstance(found, graph.Leaves) else None

    def is_deterministic(self, name: str) -> bool:
        """Whether the dropout of a delta is off here."""
        holder = self.holder(name)
        return holder is None or holder.is_deterministic

    def dropout_key(self, name: str) -> jax.Array:
        """A key for the dropout of a delta.

        Raises:
          RuntimeError: its stream is of another trace than the call.
          ValueError: it has no stream.
        """
        holder = self.holder(name)
        try:
            key = None if holder is None else holder.dropout_key()
        except errors.TraceContextError as error:
            raise RuntimeError(
                f"delta {name!r} at {self.describe()} draws random numbers for its dropout in another trace than that "
                "in which the model was made. To generate or judge, call model.eval() before; to train in jax.grad, "
                "merge a copy inside: nnx.merge(graphdef, own, rest, copy=True)."
            ) from error
        if key is None:
            raise ValueError(f"delta {name!r} at {self.describe()} has no random numbers for its dropout.")
        return key

    def context(self, name: str) -> Context:
        """What layers and rules of a delta are told of this call."""
        mask, positions = (self._nearest(names) for names in (call_edits.MASKS, call_edits.POSITIONS))
        return Context(self.is_deterministic(name), mask, positions, current_step())

    def _nearest(self, names: Collection[str]) -> Any:
        """The array, `(batch, seq)`, that the nearest call in the same trace was given by one of these names."""
        frame: Frame | None = self
        while frame is not None and frame.trace == self.trace:
            given = arguments(frame.module_type, frame.args, frame.kwargs).arguments if frame.name == CALL else {}
            for name in names:
                if is_array(given.get(name)) and given[name].ndim == 2:
                    return given[name]
            frame = frame.outer
        return None
