"""What a module's call takes and returns: which argument is its input, and which array its output."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_array(value: Any) -> bool:
    """Whether a value is an array, a tracer or the shape of one."""
    return isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def main_input(module_type: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | str, Any]:
    """Key and value of a call's first array: among the positional arguments, else among the keywords as the
    signature orders them.

    Raises:
      TypeError: no argument is an array.
    """
    for i, value in enumerate(args):
        if is_array(value):
            return i, value
    order = [name for name in argument_names(module_type.__call__) if name in kwargs]
    for name in [*order, *kwargs]:
        if is_array(kwargs[name]):
            return name, kwargs[name]
    raise TypeError(f"{module_type.__name__} was called without an array argument.")


def input_if_any(module_type: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The value of `main_input`; `None` if the call has none."""
    try:
        return main_input(module_type, args, kwargs)[1]
    except TypeError:
        return None


def with_main_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with another array at the place of `main_input`."""
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: value}


def shapes_of(call: Callable[..., Any], given: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `call(given, *args, **kwargs)` returns, as shapes; what is no array among the arguments is as it is."""
    leaves, treedef = jax.tree.flatten((tuple(args), dict(kwargs)))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if is_array(leaf)}

    def run(given: Any, arrays: dict[int, jax.Array]) -> Any:
        args, kwargs = jax.tree.unflatten(treedef, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return call(given, *args, **kwargs)

    return jax.eval_shape(run, given, arrays)


def main_output(output: Any, x: Any = None) -> Any:
    """The array a module returns: itself, or one of the elements of a tuple, list, dict or model output.

    That is the first one if it is an array, as in `(y, weights)`; otherwise, as in `(cache, y)`, the only array, or the
    only one that has the shape of the module's input.

    Args:
      output: what the module returned.
      x: its main input, if it has one.

    Raises:
      TypeError: there is no such array, or several.
    """
    key = _main_key(output, x)
    return output if key is None else _elements(output)[key]


def with_main_output(output: Any, value: Any, x: Any = None) -> Any:
    """The same return value with another array at the place of `main_output`."""
    key = _main_key(output, x)
    if key is None:
        return value
    if dataclasses.is_dataclass(output):
        return dataclasses.replace(output, **{key: value})  # type: ignore[type-var]
    elements = {**_elements(output), key: value}
    if isinstance(output, Mapping):
        return type(output)(elements)  # type: ignore[call-arg]
    return type(output)(*elements.values()) if hasattr(output, "_fields") else type(output)(elements.values())


def _main_key(output: Any, x: Any) -> Any:
    """Where the main output is; `None` if it is the output itself."""
    if is_array(output):
        return None
    elements = _elements(output)
    arrays = {key: value for key, value in elements.items() if is_array(value)}
    ordered = dataclasses.is_dataclass(output) or isinstance(output, (tuple, list))  # a dict's order says nothing
    if ordered and arrays and next(iter(elements)) in arrays:
        return next(iter(elements))
    shape = None if x is None else jnp.shape(x)
    fitting = [key for key, value in arrays.items() if value.shape == shape]
    if len(fitting) != 1 and len(jax.tree.leaves(output)) == len(arrays) == 1:
        fitting = list(arrays)
    if len(fitting) == 1:
        return fitting[0]
    parts = ", ".join(f"{key}: {_brief(value)}" for key, value in elements.items())
    shown = f"{type(output).__name__}({parts})" if elements else f"an object of type {type(output).__name__}"
    if not arrays:
        raise TypeError(f"expected an array, or a tuple, dict or model output that holds one, got {shown}.")
    wanted = f"the input's shape {tuple(shape)}" if shape is not None else "the shape of an input"
    raise TypeError(
        f"it returns {shown}, and which element is its output is not clear: the first one if that is an array, "
        f"otherwise the only array, or the only one of {wanted}, which {len(fitting)} have. Name a module inside it or "
        "around it that returns one array, or choose the element in a layer of your own, by a jdelta.CallEdit that "
        "goes 'around' it."
    )


def _elements(output: Any) -> dict[Any, Any]:
    """The elements of a return value by key; of anything else, none."""
    if isinstance(output, type):
        return {}
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    if isinstance(output, Mapping):
        return dict(output)
    return dict(enumerate(output)) if isinstance(output, (tuple, list)) else {}


def _brief(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if is_array(value) else type(value).__name__


def arguments(module_type: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call by name; `args` begins with `None`, for `self`."""
    return _signature(module_type.__call__).bind(None, *args, **kwargs)


@functools.cache
def _signature(call: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(call)


@functools.cache
def argument_names(call: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what a function takes."""
    return tuple(_signature(call).parameters)
