"""How linear modules describe themselves: the kinds that linen and nnx have, and any that compute an einsum."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jdelta.core.linear_maps import ConvMap, EinsumMap, LinearMap, LookupMap, MatrixMap, operands
from jdelta.core.structure import ModuleInfo

# --- the kinds of flax


def dense(host: ModuleInfo, transposed: bool = False) -> LinearMap:
    """How a `Dense` or `Linear`, or one whose kernel is `(d_out, d_in)`, is linear."""
    require(host, "kernel")
    require_floats(host)
    return MatrixMap(transposed=transposed)


def over_axes(host: ModuleInfo, axis: int | Sequence[int]) -> LinearMap:
    """How a module is linear that contracts these axes of its input."""
    require(host, "kernel")
    require_floats(host)
    # The kernel has the axes in the order of the input, however they are given.
    return MatrixMap(axis=tuple(sorted([axis] if isinstance(axis, int) else axis, key=lambda i: i % len(host.x.shape))))


def einsum(host: ModuleInfo) -> LinearMap:
    """How an `Einsum` is linear."""
    return by_equation(host, equation_of(host, "kernel"), "kernel")


def conv(host: ModuleInfo) -> LinearMap:
    """How a `Conv` is linear."""
    require(host, "kernel")
    require_floats(host)
    if host.fields.get("mask", host) is not None:  # an array is no static attribute of an nnx module
        raise TypeError("it does not take masked convolutions: an update of the weights would not be masked.")
    fields = {
        key: hashable(host.fields[key])
        for key in ("kernel_size", "strides", "padding", "input_dilation", "kernel_dilation")
    }
    window = fields["kernel_size"]
    fields["kernel_size"] = (window,) if isinstance(window, int) else window
    return ConvMap("kernel", tuple(fields.items()), host.fields["feature_group_count"])


def conv_transpose(host: ModuleInfo) -> LinearMap:
    """Raises `TypeError`: it is linear, in a way that no map has."""
    raise TypeError("this one is a transposed convolution, which is not supported. An adapter goes after any module.")


def embed(host: ModuleInfo) -> LinearMap:
    """How an `Embed` is linear."""
    require(host, "embedding")
    return LookupMap()


# --- einsums


def is_equation(text: Any) -> bool:
    """Whether this is the equation of an einsum of input and weights that is linear in both."""
    if not isinstance(text, str) or not re.fullmatch(r"[\w.\s]+,[\w\s]+->[\w.\s]+", text):
        return False
    x_axes, w_axes, y_axes = operands(text)
    return all(axis in x_axes + y_axes for axis in w_axes) and len({*w_axes}) == len(w_axes)


def equation_in(host: ModuleInfo, weights: str) -> str | None:
    """The equation that a module has in its field, or in an argument of its call, and that fits this leaf."""
    for text in (host.fields.get("einsum_str"), *host.args, *host.kwargs.values()):
        if is_equation(text) and len(operands(text)[1]) == len(host.params[weights].shape):
            return str(text)
    return None


def equation_of(host: ModuleInfo, weights: str) -> str:
    """`equation_in`. Raises `TypeError` if there is none."""
    require(host, weights)
    equation = equation_in(host, weights)
    if equation is None:
        raise TypeError(f"this one has no equation of an einsum of its input and {weights!r}.")
    return equation


def by_equation(host: ModuleInfo, equation: str, weights: str) -> LinearMap:
    """How a module that computes an einsum with a leaf is linear. Raises `TypeError` if it cannot be."""
    require(host, weights)
    require_floats(host)
    x_axes, w_axes, y_axes = operands(equation)
    if len(w_axes) != (ndim := len(host.params[weights].shape)):
        raise TypeError(f"{weights!r} has {ndim} axes here, and {len(w_axes)} in {equation!r}.")
    for i, o in ((w_axes[0], w_axes[1]), (w_axes[1], w_axes[0])) if ndim == 2 else ():
        if x_axes[-1] == i and y_axes[-1] == o and x_axes[:-1] == y_axes[:-1] and o not in x_axes:
            return MatrixMap(weights, transposed=w_axes == o + i)
    return EinsumMap(weights, equation)


# --- checks


def is_initializer(name: str, value: Any) -> bool:
    """Whether a field of a module only says how its parameters begin."""
    return name.endswith("_init") and callable(value)


def require(host: ModuleInfo, weights: str) -> None:
    """Raises `TypeError` unless the module has a leaf of this name."""
    if weights not in host.params:
        raise TypeError(f"this one has no {weights} of its own. Name a linear module inside it.")


def require_floats(host: ModuleInfo) -> None:
    """Raises `TypeError` unless the module takes floats."""
    if not jnp.issubdtype(host.x.dtype, jnp.inexact):
        raise TypeError(f"it needs floats, and this one takes an array of {host.x.dtype}.")


def hashable(value: Any) -> Any:
    """A value with tuples in place of lists."""
    return tuple(hashable(v) for v in value) if isinstance(value, (list, tuple)) else value
