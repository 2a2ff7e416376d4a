"""Runs edits of calls around the calls of modules, whatever module system they are of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jdelta.core.arguments import (
    argument_names,
    input_if_any,
    main_input,
    main_output,
    with_main_input,
    with_main_output,
)
from jdelta.core.context import Context
from jdelta.core.edits import CallEdit, Edit, WeightEdit
from jdelta.core.rules import uses_context
from jdelta.trees.surgery import Path

MASKS = ("attention_mask", "padding_mask", "mask")  # arguments that `Context.mask` is taken from
POSITIONS = ("position_ids", "positions")  # and `Context.positions`


class ModuleCall(Protocol):
    """A call of a module in progress."""

    @property
    def module(self) -> Any:
        """The module."""
        ...

    @property
    def module_type(self) -> type:
        """Its class, as the user wrote it."""
        ...

    @property
    def path(self) -> Path:
        """Where it is in the model."""
        ...

    def describe(self) -> str:
        """Name and class of the module, for messages."""
        ...

    def has_cache(self) -> bool:
        """Whether the module holds a cache of earlier tokens that this call continues."""
        ...


Watcher = Callable[[ModuleCall, Callable], Callable]


class Host:
    """What an "around" layer is given: calling it runs the host.

    Attributes:
      this: the call of the host in progress.
    """

    def __init__(self, call: Callable, this: ModuleCall, watchers: list[Watcher]):
        self._call = call
        self.this = this
        self._watchers = watchers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the host."""
        return self._call(*args, **kwargs)

    @property
    def module_type(self) -> type:
        """The host's class."""
        return self.this.module_type

    @property
    def path(self) -> Path:
        """Where the host is in the model."""
        return self.this.path

    def describe(self) -> str:
        """Name and class of the host, for messages."""
        return self.this.describe()

    def has_cache(self) -> bool:
        """Whether the host holds a cache of earlier tokens that this call continues."""
        return self.this.has_cache()

    @contextlib.contextmanager
    def watched(self, watch: Watcher) -> Iterator[None]:
        """While this lasts, every `call` inside the host is replaced by `watch(its ModuleCall, call)`."""
        self._watchers.append(watch)
        try:
            yield
        finally:
            self._watchers.remove(watch)


def run(
    edit: CallEdit,
    call: Callable,
    this: ModuleCall,
    layer: Callable,
    span_input: Callable[[], Any] | None,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The call of a module with an edit that is not "around" it.

    Args:
      edit: the edit.
      call: the call, with the edits inside this one.
      this: the call that is in progress.
      layer: the edit's, with its parameters, and told what it asks for.
      span_input: gives the layer's input, if that is another module's; it is asked before the call runs.
      *args, **kwargs: of the call.
    """
    host_type = this.module_type
    if edit.where == "replace":
        return layer(*args, **kwargs)
    if edit.where == "before":
        key, x = main_input(host_type, args, kwargs)
        args, kwargs = with_main_input(args, kwargs, key, _same_dtype(layer(x), x))
        return call(*args, **kwargs)
    if edit.where == "after":
        output = call(*args, **kwargs)
        given = input_if_any(host_type, args, kwargs)
        y = main_output(output, given)
        return with_main_output(output, _same_dtype(layer(y), y), given)
    # parallel
    x = main_input(host_type, args, kwargs)[1] if span_input is None else span_input()
    output, given = call(*args, **kwargs), input_if_any(host_type, args, kwargs)
    y = main_output(output, given)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = _same_dtype(x, y)  # T5's norms give float32 to a Dense that computes in bfloat16
    change = layer(x)
    if jnp.shape(change) != y.shape:
        raise ValueError(
            f"the parallel layer {type(edit.layer).__name__} at {this.describe()} returned shape "
            f"{jnp.shape(change)}, but the module's output has shape {y.shape}."
        )
    return with_main_output(output, y + _same_dtype(change, y), given)


def told(layer: Any, is_deterministic: Callable[[], bool], context: Callable[[], Context]) -> dict[str, Any]:
    """The arguments by which a layer is told what it asks for of the call."""
    names = argument_names(type(layer).__call__)
    found: dict[str, Any] = {}
    if "context" in names:
        found["context"] = context()
    if "deterministic" in names:
        found["deterministic"] = is_deterministic()
    elif "train" in names:
        found["train"] = not is_deterministic()
    return found


def asks_for_mode(layer: Any) -> bool:
    """Whether a layer is told whether this is training."""
    return not {"deterministic", "train", "context"}.isdisjoint(argument_names(type(layer).__call__))


def asks_for_context(edit: Edit) -> bool:
    """Whether what an edit runs is told of the call, and so of the step of training."""
    if isinstance(edit, WeightEdit):
        return uses_context(edit.rule)
    return edit.layer is not None and "context" in argument_names(type(edit.layer).__call__)


def leads_out(host: str, start: str) -> str:
    """The message, where a span ends outside the transformation in which it starts."""
    return (
        f"the span from {start} to {host} leads out of a module that is transformed as a whole (by nn.jit or nnx.jit, "
        "remat, scan, …), and values cannot leave it that way. Name two modules inside it, or two outside."
    )


def not_started(host: str, start: str) -> str:
    """The message, where the module at which a span starts was not called."""
    return f"the span to {host} starts at {start}, which was not called before it in this run of the model."


def _same_dtype(new: Any, old: Any) -> Any:
    """A delta never changes the precision that the backbone computes in.

    Raises:
      TypeError: what the layer computes would be cut off: whole numbers, or real ones, are in its place.
    """
    for a in jax.tree.leaves(new):
        is_complex = jnp.issubdtype(a.dtype, jnp.complexfloating)
        if not jnp.issubdtype(old.dtype, jnp.complexfloating if is_complex else jnp.inexact):
            raise TypeError(f"a layer gives {a.dtype} where the model has {old.dtype}, which would be cut off.")
    return jax.tree.map(lambda a: a.astype(old.dtype), new)
