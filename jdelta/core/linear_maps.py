"""The ways in which a module is linear in one of its leaves, and that leaf as a matrix.

Rules of weights see matrices `(d_in, d_out)`. Here a leaf becomes one, and a matrix becomes what the leaf stores. Axes
that input, weights and output share, such as those of experts, come before both, `(*shared, d_in, d_out)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.core import products

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a leaf are which.

    Attributes:
      shared: those that input and output have too.
      d_in: those that meet the input.
      d_out: those that make the output.
    """

    shared: tuple[int, ...]
    d_in: tuple[int, ...]
    d_out: tuple[int, ...]

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """A leaf as `(*shared, d_in, d_out)`."""
        order = jnp.transpose(leaf, (*self.shared, *self.d_in, *self.d_out))
        n, m = len(self.shared), len(self.shared) + len(self.d_in)
        return order.reshape(*order.shape[:n], math.prod(order.shape[n:m]), math.prod(order.shape[m:]))

    def stored(self, matrix: jax.Array, shape: Shape) -> jax.Array:
        """`(*shared, d_in, d_out)` as a leaf of this shape stores it."""
        order = (*self.shared, *self.d_in, *self.d_out)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrix.reshape([shape[axis] for axis in order]).transpose(inverse)

    def sizes(self, shape: Shape, kind: str) -> Shape:
        """The sizes of the axes of a kind, `"shared"`, `"in"` or `"out"`, in a leaf of this shape."""
        return tuple(shape[axis] for axis in self.numbers(kind))

    def matrix_shape(self, shape: Shape) -> tuple[int, int]:
        """`(d_in, d_out)` of the matrices in a leaf of this shape."""
        return math.prod(self.sizes(shape, "in")), math.prod(self.sizes(shape, "out"))

    def numbers(self, kind: str) -> tuple[int, ...]:
        """The axes of a kind."""
        return {"shared": self.shared, "in": self.d_in, "out": self.d_out}[kind]


@dataclasses.dataclass(frozen=True)
class MatrixMap:
    """A product over some axes of the input, as `nn.Dense` and `nn.DenseGeneral` compute it.

    Attributes:
      weights: name of the leaf, `(*d_in, *d_out)`; or if it is transposed, `(d_out, d_in)`.
      axis: the input's axes that are contracted, in the order of the weights. The new ones come last.
      transposed: whether the output's axis comes first.
    """

    weights: str = "kernel"
    axis: tuple[int, ...] = (-1,)
    transposed: bool = False

    def layout(self, shape: Shape) -> Layout:
        """Which axes of a leaf of this shape are which."""
        first, last = range(len(self.axis)), range(len(self.axis), len(shape))
        return Layout((), tuple(last), tuple(first)) if self.transposed else Layout((), tuple(first), tuple(last))

    def product(self, x: jax.Array, change: jax.Array) -> jax.Array:
        """`x · D`, for a change of the leaf as it is stored."""
        change = change.T if self.transposed else change
        return jnp.tensordot(x, change, (self.axis, tuple(range(len(self.axis)))))

    def features(self, x: jax.Array, shape: Shape) -> jax.Array:
        """The input as `(…, d_in)`, for a leaf of this shape."""
        n = len(self.axis)
        if self.axis == (-1,):
            return x
        x = jnp.moveaxis(x, self.axis, range(-n, 0))
        return x.reshape(*x.shape[:-n], math.prod(x.shape[-n:]))

    def low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        """`x · (a b)` in two thin products, for `a`, `(d_in, r)`, and `b`, `(r, d_out)`."""
        z = products.down(self.features(x, shape), a.astype(x.dtype))
        y = products.up(z, b.astype(z.dtype))
        return y.reshape(*z.shape[:-1], *self.layout(shape).sizes(shape, "out"))

    def free(self, x: Shape) -> list[int]:
        """The axes of an input of this shape whose sizes do not depend on the weights."""
        met = {axis % len(x) for axis in self.axis}
        return [axis for axis in range(len(x)) if axis not in met]


@dataclasses.dataclass(frozen=True)
class EinsumMap:
    """`einsum(equation, x, weights)`. Axes that input, weights and output share, of experts for example, are allowed.

    Attributes:
      weights: name of the leaf.
      equation: what is computed.
    """

    weights: str = "kernel"
    equation: str = "...i,io->...o"

    def layout(self, shape: Shape) -> Layout:
        """Which axes of a leaf of this shape are which."""
        x_axes, w_axes, y_axes = operands(self.equation)
        shared = [i for i, axis in enumerate(w_axes) if axis in x_axes and axis in y_axes]
        d_in = [i for i, axis in enumerate(w_axes) if axis not in y_axes]
        d_out = [i for i, axis in enumerate(w_axes) if axis not in x_axes]
        return Layout(tuple(shared), tuple(d_in), tuple(d_out))

    def of_one(self) -> tuple[EinsumMap, int, int, int]:
        """The map without its first shared axis, and where that is in the input, the weights and the output."""
        parts = operands(self.equation)
        letter = next(axis for axis in parts[1] if axis in parts[0] and axis in parts[2])
        x_axes, w_axes, y_axes = (part.replace(letter, "") for part in parts)

        def place(axes: str) -> int:
            before, ellipsis, _ = axes.partition("...")
            return axes.index(letter) - (len(axes) if ellipsis and letter not in before else 0)

        x, w, y = map(place, parts)
        return EinsumMap(self.weights, f"{x_axes},{w_axes}->{y_axes}"), x, w, y

    def product(self, x: jax.Array, change: jax.Array) -> jax.Array:
        """`x · D`."""
        return jnp.einsum(self.equation, x, change)

    def features(self, x: jax.Array, shape: Shape) -> jax.Array | None:
        """The input as `(…, d_in)`, its other axes as the output has them; `None` with axes that all share."""
        x_axes, w_axes, y_axes = operands(self.equation)
        layout = self.layout(shape)
        if layout.shared:
            return None
        d_in = "".join(w_axes[i] for i in layout.d_in)
        rest = "".join(axis for axis in y_axes if axis not in w_axes)
        x = jnp.einsum(f"{x_axes}->{rest}{d_in}", x)
        return x.reshape(*x.shape[: x.ndim - len(d_in)], math.prod(x.shape[x.ndim - len(d_in) :]))

    def low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        """`x · (a b)`, for `a`, `(*shared, d_in, r)`, and `b`, `(*shared, r, d_out)`."""
        x_axes, w_axes, y_axes = operands(self.equation)
        layout = self.layout(shape)
        shared, d_in, d_out = ("".join(w_axes[i] for i in layout.numbers(kind)) for kind in ("shared", "in", "out"))
        a = a.reshape(*layout.sizes(shape, "shared"), *layout.sizes(shape, "in"), -1)
        b = b.reshape(*layout.sizes(shape, "shared"), -1, *layout.sizes(shape, "out"))
        middle = "".join(axis for axis in x_axes if axis not in w_axes or axis in y_axes) + _RANK
        z = jnp.einsum(f"{x_axes},{shared}{d_in}{_RANK}->{middle}", x, a.astype(x.dtype))
        return jnp.einsum(f"{middle},{shared}{_RANK}{d_out}->{y_axes}", z, b.astype(x.dtype))

    def free(self, x: Shape) -> list[int]:
        """The axes of an input of this shape whose sizes do not depend on the weights."""
        x_axes, w_axes, _ = operands(self.equation)
        return [i for i, letter in enumerate(letters_of(x_axes, len(x))) if letter not in w_axes]


@dataclasses.dataclass(frozen=True)
class ConvMap:
    """A convolution.

    Attributes:
      weights: name of the leaf, `(*window, d_in / groups, d_out)`.
      conv: the fields of an `nn.Conv` that say where its windows lie.
      groups: of channels.
    """

    weights: str = "kernel"
    conv: tuple[tuple[str, Any], ...] = ()
    groups: int = 1

    def layout(self, shape: Shape) -> Layout:
        """Which axes of a leaf of this shape are which."""
        return Layout((), tuple(range(len(shape) - 1)), (len(shape) - 1,))

    def product(self, x: jax.Array, change: jax.Array) -> jax.Array:
        """`x · D`."""
        fields = {"use_bias": False, "dtype": x.dtype, "feature_group_count": self.groups, **dict(self.conv)}
        y: Any = nn.Conv(change.shape[-1], **fields, parent=None).apply({"params": {"kernel": change}}, x)
        return jnp.asarray(y)

    def features(self, x: jax.Array, shape: Shape) -> None:
        """None: the windows are not formed."""

    def low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        """`x · (a b)`: a convolution to `r` channels, then one with windows of one place.

        Of channels in groups, each group has its own columns of `b`, and `a` is the same for all.
        """
        rank, groups = a.shape[-1], self.groups
        z = self.product(x, jnp.tile(a.reshape(*shape[:-1], rank), groups).astype(x.dtype))
        b = b.astype(z.dtype)
        if groups == 1:
            return products.up(z, b)
        z, b = z.reshape(*z.shape[:-1], groups, -1), b.reshape(rank, groups, -1)
        return jnp.einsum("...gr,rgo->...go", z, b).reshape(*z.shape[:-2], shape[-1])

    def free(self, x: Shape) -> list[int]:
        """The axes of an input of this shape whose sizes do not depend on the weights."""
        return list(range(len(x) - len(dict(self.conv)["kernel_size"]) - 1))


@dataclasses.dataclass(frozen=True)
class LookupMap:
    """A choice of rows, by ids.

    Attributes:
      weights: name of the leaf, `(rows, *d_out)`.
    """

    weights: str = "embedding"

    def layout(self, shape: Shape) -> Layout:
        """Which axes of a leaf of this shape are which."""
        return Layout((), (0,), tuple(range(1, len(shape))))

    def product(self, x: jax.Array, change: jax.Array) -> jax.Array:
        """`x · D`, where `x` is the ids."""
        return jnp.take(change, x, axis=0)

    def features(self, x: jax.Array, shape: Shape) -> None:
        """None: the input is ids."""

    def low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        """`x · (a b)`: rows of `a`, times `b`."""
        z = jnp.take(a, x, axis=0).astype(dtype)
        return products.up(z, b.astype(dtype)).reshape(*x.shape, *shape[1:])

    def free(self, x: Shape) -> list[int]:
        """The axes of an input of this shape whose sizes do not depend on the weights."""
        return list(range(len(x)))


@dataclasses.dataclass(frozen=True)
class StoredMap:
    """A leaf of which nobody knows how it is used: the last two axes are the matrix, all before them are shared.

    Attributes:
      weights: name of the leaf.
    """

    weights: str

    def layout(self, shape: Shape) -> Layout:
        """Which axes of a leaf of this shape are which; of one with a single axis, that makes the output."""
        n = len(shape)
        return Layout(tuple(range(n - 2)), (n - 2,), (n - 1,)) if n > 1 else Layout((), (), tuple(range(n)))


LinearMap = MatrixMap | EinsumMap | ConvMap | LookupMap
AnyMap = LinearMap | StoredMap


@dataclasses.dataclass(frozen=True)
class BoundLinear:
    """How a host is linear, with the leaf that it has now; what the `product` of a rule gets.

    Attributes:
      linear: how it is linear.
      leaf: the leaf, as it is stored.
      dtype: in which the host computes.
    """

    linear: LinearMap
    leaf: jax.Array
    dtype: Any = None

    @property
    def weight(self) -> jax.Array:
        """The leaf as a matrix, `(d_in, d_out)`, or `(*shared, d_in, d_out)`, in float32."""
        return self.linear.layout(self.leaf.shape).matrix(self.leaf).astype(jnp.float32)

    def features(self, x: jax.Array) -> jax.Array | None:
        """The host's input as `(…, d_in)`, so that its product with a matrix is `product`'s; `None` where it is not.

        That is in convolutions, which see windows, and in embeddings, which see ids.

        Args:
          x: the host's input.
        """
        return self.linear.features(x, self.leaf.shape)

    def low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """`x · (a b)`, `(…, d_out)`, without forming `a b`.

        Args:
          x: the host's input.
          a: `(d_in, r)`.
          b: `(r, d_out)`.
        """
        return self.flat(self.linear.low_rank(x, a, b, self.leaf.shape, self.dtype))

    def product(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        """`x · D`, `(…, d_out)`, for a matrix `D`, `(d_in, d_out)`."""
        shape = self.leaf.shape
        return self.flat(self.of_leaf(x, self.linear.layout(shape).stored(matrix, shape)))

    def flat(self, y: jax.Array) -> jax.Array:
        """The host's output as `(…, d_out)`, whose features may have several axes, anywhere."""
        places = self._places(y.ndim)
        y = jnp.moveaxis(y, places, range(-len(places), 0))
        n = y.ndim - len(places)
        return y.reshape(*y.shape[:n], math.prod(y.shape[n:]))  # not -1: there may be no rows

    def as_output(self, flat: jax.Array, like: Shape) -> jax.Array:
        """The inverse of `flat`, for an output of the shape `like`."""
        places = self._places(len(like))
        moved = [size for i, size in enumerate(like) if i not in places] + [like[i] for i in places]
        return jnp.moveaxis(flat.reshape(moved), range(-len(places), 0), places)

    def _places(self, ndim: int) -> tuple[int, ...]:
        """Where the features are among the axes of an output."""
        layout = self.linear.layout(self.leaf.shape)
        if not isinstance(self.linear, EinsumMap):
            return tuple(range(ndim - len(layout.d_out), ndim))
        _, w_axes, y_axes = operands(self.linear.equation)
        letters = letters_of(y_axes, ndim)
        return tuple(letters.index(w_axes[i]) for i in layout.d_out)

    def of_leaf(self, x: jax.Array, change: jax.Array) -> jax.Array:
        """`x · D` in the shape of the host's output, for a change `D` of the leaf as it is stored."""
        is_lookup = isinstance(self.linear, LookupMap)
        return self.linear.product(x, change.astype(self.dtype if is_lookup else x.dtype))


def operands(equation: str) -> tuple[str, str, str]:
    """The axes of input, weights and output in the equation of an einsum."""
    inputs, y_axes = equation.replace(" ", "").split("->")
    x_axes, w_axes = inputs.split(",")
    return x_axes, w_axes, y_axes


def letters_of(axes: str, ndim: int) -> str:
    """The axes of one operand of an einsum, a letter for each of `ndim`; blanks are those of an ellipsis."""
    before, ellipsis, after = axes.partition("...")
    return before + " " * (ndim - len(before) - len(after)) * bool(ellipsis) + after


def scanned_axes(stored: Sequence[Shape], seen: Sequence[Shape]) -> list[int]:
    """The axes, outermost last, that a module's leaves have inside `nn.scan` besides those that it sees itself."""
    have = [(list(a), list(b)) for a, b in zip(stored, seen, strict=True)]
    axes: list[int] = []
    while any(len(whole) > len(own) for whole, own in have):
        fitting = [
            axis
            for axis in range(min(len(whole) for whole, _ in have))
            if all(len(whole) - len(own) > 1 or whole[:axis] + whole[axis + 1 :] == own for whole, own in have)
        ]
        axes.insert(0, fitting[0])
        have = [(whole[: fitting[0]] + whole[fitting[0] + 1 :], own) for whole, own in have]
    return axes


_RANK = "ρ"  # einsum takes any letter, and nobody uses this one
