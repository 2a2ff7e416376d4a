"""Rules of weights: pure functions from a leaf of the backbone and the delta's own leaves to a change of that leaf.

A rule is a frozen dataclass, so that equal layers share a trace. It sees matrices, in float32: a leaf as
`core.linear_maps` lays it out, once for each of the axes that input, weights and output share (experts, for example).

    @dataclasses.dataclass(frozen=True)
    class Shift:  # ΔW = 1 bᵀ
        def init(self, key, weight):
            return {"b": jnp.zeros(weight.shape[1])}

        def update(self, weight, own):
            return jnp.ones(weight.shape) * own["b"]

        def product(self, x, y, own, linear):  # may be left out
            return jnp.sum(x, -1, keepdims=True) * own["b"].astype(x.dtype)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax

from jdelta.core.linear_maps import BoundLinear

Leaves = Mapping[str, jax.Array]
Side = Literal["in", "out"]


@runtime_checkable
class WeightRule(Protocol):
    """What a delta does to a weight."""

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        """The initial values of the delta's own leaves at this weight, in float32; whole numbers in int32.

        Whole numbers, such as places in the weight, never train.

        Args:
          key: of the random numbers.
          weight: `(d_in, d_out)`: its shape; its value, where the rule `starts_from_weight`.

        Raises:
          ValueError: a weight of this shape cannot have the change; the leaf's name is put in front of the message.
        """
        ...

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        """The change of the weight, `(d_in, d_out)`, in float32. This is what the rule means.

        Merging adds it, `movement` measures it, and the tests compare `product` with it.

        Args:
          weight: `(d_in, d_out)`, float32.
          own: the delta's own leaves.
        """
        ...


@runtime_checkable
class FeatureRule(Protocol):
    """A linear change of the features that go into a module or come out of it, such as a scale or a rotation.

    It changes the kernel, and on the output side the bias. Write it in place of `WeightRule`'s `update`.

    Attributes:
      side: of which features: `"in"` or `"out"`.
    """

    side: Side

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        """As that of `WeightRule`."""
        ...

    def transform(self, z: jax.Array, own: Leaves) -> jax.Array:
        """The changed features.

        Args:
          z: `(…, d)`; the result is linear in it, row by row.
          own: the delta's own leaves.
        """
        ...


# --- what a rule may have besides


@runtime_checkable
class HasProduct(Protocol):
    """A rule that knows what its change adds to a linear module's output, without forming it."""

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array | None:
        """`x · ΔW`, in the shape of `y`; `None` if this module is better served by `update`.

        Args:
          x: the module's input.
          y: the module's output without its bias, `x · W`, `(…, d_out)`.
          own: the delta's own leaves.
          linear: how the module is linear, and its weight.
        """
        ...


@runtime_checkable
class ScalesOutputs(Protocol):
    """A rule that is another one with a factor for each output: `W + ΔW = f ⊙ (W + ΔW′)`.

    Attributes:
      inner: the other rule, of the same own leaves.
    """

    @property
    def inner(self) -> WeightRule:
        """The rule of `ΔW′`."""
        ...

    def factor(self, changed: jax.Array, own: Leaves) -> jax.Array:
        """The factors `f`, `(d_out,)`, in float32.

        Args:
          changed: `W + ΔW′`, `(d_in, d_out)`, float32.
          own: the delta's own leaves.
        """
        ...


@runtime_checkable
class HasAxes(Protocol):
    """A rule whose own leaves follow the axes of the weight.

    Attributes:
      axes: name of a leaf to one entry for each of its axes: `"in"`, `"out"`, or `None` for an axis of its own. A leaf
        is stored with the axes that its weight has there, `(*d_in, r)` for `("in", None)`, and sharded like them.
    """

    axes: Mapping[str, tuple[Side | None, ...]]


@runtime_checkable
class HasDropout(Protocol):
    """A rule that drops some of its input in training, which only a product can do.

    Attributes:
      dropout: the rate.
    """

    dropout: float


@runtime_checkable
class UsesContext(Protocol):
    """A rule whose `product` takes a keyword `context`, a `core.context.Context`, besides.

    Attributes:
      uses_context: whether it does.
    """

    uses_context: bool


@runtime_checkable
class StartsFromWeight(Protocol):
    """A rule whose `init` needs the weight's value.

    Attributes:
      starts_from_weight: whether it does.
    """

    starts_from_weight: bool


def name_of(rule: Any) -> str:
    """The name of a rule's class, for messages."""
    return type(rule).__name__


def axes_of(rule: Any) -> Mapping[str, tuple[Side | None, ...]]:
    """What the axes of a rule's own leaves follow; nothing, where the rule does not say."""
    return rule.axes if isinstance(rule, HasAxes) else {}


def dropout_of(rule: Any) -> float:
    """The rate of dropout of a rule."""
    return rule.dropout if isinstance(rule, HasDropout) else 0.0


def uses_context(rule: Any) -> bool:
    """Whether a rule's `product` takes a context."""
    return isinstance(rule, UsesContext) and rule.uses_context


def starts_from_weight(rule: Any) -> bool:
    """Whether a rule's `init` needs the weight's value."""
    return isinstance(rule, StartsFromWeight) and rule.starts_from_weight
