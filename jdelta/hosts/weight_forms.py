"""Runs edits of weights in the calls of modules that are known to be linear, whatever module system they are of.

Here is the one place that chooses the form. All edits of one leaf are evaluated at the leaf as it is stored and summed,
and what is computed in a call is closest to the module: edits of calls go around it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jdelta.core import products, weights
from jdelta.core.arguments import input_if_any, main_input, main_output, with_main_input, with_main_output
from jdelta.core.context import Context
from jdelta.core.edits import WeightEdit
from jdelta.core.linear_maps import BoundLinear, EinsumMap, LookupMap, MatrixMap, letters_of, operands
from jdelta.core.rules import FeatureRule, HasProduct, ScalesOutputs, dropout_of, uses_context
from jdelta.core.weights import Kind
from jdelta.trees import surgery

Own = Mapping[str, jax.Array]
Given = Sequence[tuple[WeightEdit, Own]]


class LinearCall(Protocol):
    """A call of a linear module in progress."""

    @property
    def module_type(self) -> type:
        """The module's class."""
        ...

    def leaves(self) -> dict[str, jax.Array]:
        """The module's own parameters, without those of modules and deltas inside it."""
        ...

    def own(self, edit: WeightEdit) -> Own:
        """The own leaves of an edit, as they are stored."""
        ...

    def is_deterministic(self, edit: WeightEdit) -> bool:
        """Whether the dropout of an edit is off."""
        ...

    def context(self, edit: WeightEdit) -> Context:
        """What the rule of an edit is told of the call."""
        ...

    def dropped(self, edit: WeightEdit, x: jax.Array, rate: float) -> jax.Array:
        """The input after dropout at this rate, which is on."""
        ...

    @property
    def dtype(self) -> Any:
        """In which the module is told to compute; `None`: in that of its arrays."""
        ...

    def pure(self) -> Pure:
        """The module as a function of its input and its parameters."""
        ...


class Pure(Protocol):
    """A module as a function; hashable, unless a field of it is not: what was traced for one serves its equals."""

    def __call__(self, x: jax.Array, leaves: Own) -> jax.Array:
        """What the module computes."""
        ...


def run(edits: Sequence[WeightEdit], call: Callable, this: LinearCall, /, *args: Any, **kwargs: Any) -> Any:
    """The call of a linear module with the changes of some edits of its weights."""
    given = [(edit, this.own(edit)) for edit in edits if not edit.is_bias]
    training = any(dropout_of(edit.rule) and not this.is_deterministic(edit) for edit, _ in given)
    if len(args) + len(kwargs) == 1 and not training:
        _, x = main_input(this.module_type, args, kwargs)
        if (y := _in_one_product(given, this, x)) is not None:
            return y
    if len(given) == 1 and _side(given[0][0]) == "in":
        key, x = main_input(this.module_type, args, kwargs)
        args, kwargs = with_main_input(args, kwargs, key, _transformed(*given[0], x))
        return call(*args, **kwargs)
    return added(edits, call(*args, **kwargs), this, args, kwargs)


def added(edits: Sequence[WeightEdit], output: Any, this: LinearCall, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What a linear module returned, with the changes of some edits of its weights."""
    given = [(edit, this.own(edit)) for edit in edits if not edit.is_bias]
    _, x = main_input(this.module_type, args, kwargs)
    leaves, only = this.leaves(), len(given) == 1
    total = y = main_output(output, x)
    for edit, own in given:
        if _side(edit) == "out":
            total = _transformed(edit, own, y) if only else total + _transformed(edit, own, y) - y
        elif _side(edit) == "in":
            leaf = leaves[edit.leaf[-1]]
            change = edit.linear.product((_transformed(edit, own, x) - x).astype(y.dtype), leaf.astype(y.dtype))
            total = total + change.astype(y.dtype)
        else:
            total = total + _product(edit, own, _dropped(edit, x, this), y, leaves, this).astype(y.dtype)
    return with_main_output(output, total, input_if_any(this.module_type, args, kwargs))


def _side(edit: WeightEdit) -> str | None:
    return edit.rule.side if isinstance(edit.rule, FeatureRule) else None


def _transformed(edit: WeightEdit, own: Own, z: jax.Array) -> jax.Array:
    """The features after the rule. All axes of a kind are one, `(…, d)`, for the rule."""
    n = len(weights.layout_of(edit).numbers(edit.rule.side))
    flat = z.reshape(*z.shape[: z.ndim - n], math.prod(z.shape[z.ndim - n :]))
    new = edit.rule.transform(flat, weights.seen_own(edit, own))
    return new.astype(z.dtype).reshape(z.shape)


def _product(edit: WeightEdit, own: Own, x: jax.Array, y: jax.Array, leaves: Own, this: LinearCall) -> jax.Array:
    """What the change of the weight adds to the module's output."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(y.dtype)  # T5's norms give float32 to a Dense that computes in bfloat16
    context = this.context(edit) if uses_context(edit.rule) else None
    weight, bias = leaves[edit.leaf[-1]], leaves.get("bias")
    if not _has_known_bias(edit, leaves):
        y, bias = BoundLinear(edit.linear, weight, y.dtype).of_leaf(x, weight), None  # nobody reads it, in most rules
    change = _changed(edit, x, y, own, weight, bias, context)
    if change.shape != y.shape:
        raise ValueError(
            f"{type(edit.rule).__name__} at {surgery.name_of(edit.leaf)}: product gives shape {change.shape}, and the "
            f"module's output has shape {y.shape}."
        )
    return change


def _has_known_bias(edit: WeightEdit, leaves: Own) -> bool:
    """Whether what a module adds to its product is its leaf `bias`, or nothing."""
    return not leaves.keys() - {edit.leaf[-1], "bias"}


def _changed(
    edit: WeightEdit, x: Any, y: Any, own: Own, leaf: jax.Array, bias: jax.Array | None, context: Context | None
) -> jax.Array:
    kind = weights.kind_of(edit)
    run = _change_once if kind.is_hashable() else change_of
    return run(kind, x, y, own, leaf, bias, context)


def change_of(
    kind: Kind,
    x: Any,
    y: Any,
    own: Own,
    leaf: jax.Array,
    bias: jax.Array | None,
    context: Context | None = None,
) -> jax.Array:
    """`x · ΔW`, by the rule's product or from its update."""
    edit = kind.edit
    without = y if bias is None else y - _as_output(bias, edit, y).astype(y.dtype)
    told: dict[str, Any] = {} if context is None else {"context": context}
    if (found := weights.product(edit, x, without, weights.seen_own(edit, own), leaf, told)) is not None:
        return found
    return BoundLinear(edit.linear, leaf, y.dtype).of_leaf(x, weights.update(edit, leaf, own))


_change_once = jax.jit(change_of, static_argnums=0)  # traced once for all layers that are alike


def _as_output(bias: jax.Array, edit: WeightEdit, y: jax.Array) -> jax.Array:
    """A module's bias in a shape that broadcasts to its output."""
    if not isinstance(edit.linear, EinsumMap):
        return bias
    _, w_axes, y_axes = operands(edit.linear.equation)
    letters = zip(letters_of(y_axes, y.ndim), y.shape, strict=True)
    return bias.reshape([size if axis in w_axes else 1 for axis, size in letters])


def _dropped(edit: WeightEdit, x: jax.Array, this: LinearCall) -> jax.Array:
    """The input after the rule's dropout."""
    rate = dropout_of(edit.rule)
    if not rate or this.is_deterministic(edit) or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return this.dropped(edit, x, rate)


# --- in one product, with the changed weight


def _in_one_product(given: Given, this: LinearCall, x: jax.Array) -> jax.Array | None:
    """What the module computes with the changed weight, where that is cheaper than the sum; else `None`.

    Only in float32: in less, a small update would be lost in the rounding of the weights.
    """
    first = given[0][0]
    if not all(edit.alone and _side(edit) is None and not uses_context(edit.rule) for edit, _ in given):
        return None
    by_product = all(isinstance(edit.rule, HasProduct) for edit, _ in given)
    if by_product and not (isinstance(first.linear, MatrixMap) and _is_cheaper(first, x)):
        return None
    scales = len(given) == 1 and isinstance(first.rule, ScalesOutputs)
    if by_product and not scales and any(weights.reads_output(edit) for edit, _ in given):
        return None  # the output is computed anyway
    leaves = this.leaves()
    if scales and not _has_known_bias(first, leaves):
        return None
    arrays = [*leaves.values(), *(leaf for _, own in given for leaf in own.values() if leaf.dtype != jnp.int32)]
    arrays += [] if isinstance(first.linear, LookupMap) else [x]
    dtypes = [this.dtype or "float32", *(leaf.dtype for leaf in arrays)]
    if any(jnp.dtype(dtype) != jnp.float32 for dtype in dtypes):
        return None
    edits = [dataclasses.replace(first, rule=first.rule.inner)] if scales else [edit for edit, _ in given]
    pair = _Pair(this.pure(), tuple(weights.kind_of(edit) for edit in edits))
    own = {str(i): leaves for i, (_, leaves) in enumerate(given)}
    try:
        hash(pair)
    except TypeError:  # a list in a field of the module
        return None if by_product else pair.run(x, pair.merged(leaves, own))
    if scales:
        return _scaled(first, pair, x, leaves, given[0][1])
    return products.fused(pair, x, leaves, own) if by_product else _with_changed_weight(pair, x, leaves, own)


def _scaled(edit: WeightEdit, pair: _Pair, x: jax.Array, leaves: Own, own: Own) -> jax.Array:
    """What the module computes with the weight that the inner rule changes, times the factors; then its bias."""
    bias = leaves.get("bias")
    without = leaves if bias is None else {**leaves, "bias": jnp.zeros_like(bias)}
    layout = weights.layout_of(edit)
    changed = layout.matrix(pair.merged(without, {"0": own})[edit.leaf[-1]])
    factor = edit.rule.factor(changed, weights.seen_own(edit, own)).reshape(layout.sizes(edit.shape, "out"))
    y = products.fused(pair, x, without, {"0": own}) * factor
    return y if bias is None else y + bias


def _is_cheaper(edit: WeightEdit, x: jax.Array) -> bool:
    d_in, d_out = weights.layout_of(edit).matrix_shape(edit.shape)
    return products.fusing_is_cheaper(x.size // d_in, d_in, d_out)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A module and edits of its weight: a `products.Pair`."""

    module: Pure
    kinds: tuple[Kind, ...]

    def run(self, x: jax.Array, leaves: Own) -> jax.Array:
        return self.module(x, leaves)

    def merged(self, leaves: Own, own: Mapping[str, Own]) -> dict[str, jax.Array]:
        key, edits = self.kinds[0].leaf, [kind.edit for kind in self.kinds]
        return {**leaves, key: weights.changed(edits, leaves[key], [own[str(i)] for i in range(len(edits))])}

    def change(self, x: jax.Array, leaves: Own, own: Mapping[str, Own]) -> jax.Array:
        leaf, y, bias = leaves[self.kinds[0].leaf], self.run(x, leaves), leaves.get("bias")
        parts = [change_of(kind, x, y, own[str(i)], leaf, bias) for i, kind in enumerate(self.kinds)]
        return functools.reduce(operator.add, parts)


@functools.partial(jax.jit, static_argnums=0)
def _with_changed_weight(pair: _Pair, x: jax.Array, leaves: Own, own: Mapping[str, Own]) -> jax.Array:
    return pair.run(x, pair.merged(leaves, own))
