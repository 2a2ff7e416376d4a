"""Runs edits of weights: in the calls of modules that are known to be linear, or by rewriting leaves of the tree.

Here is the one place that chooses the form. All edits of one leaf are evaluated at the leaf as it is stored and summed,
and what is computed in a call is closest to the module: edits of calls go around it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.errors import ScopeParamShapeError

from jdelta.core import products, weights
from jdelta.core.arguments import input_if_any, main_input, main_output, with_main_input, with_main_output
from jdelta.core.context import Context
from jdelta.core.edits import Attachment, WeightEdit
from jdelta.core.linear_maps import BoundLinear, EinsumMap, LookupMap, MatrixMap, letters_of, operands
from jdelta.core.linear_types import is_initializer
from jdelta.core.rules import FeatureRule, HasProduct, dropout_of, uses_context
from jdelta.core.weights import Kind
from jdelta.hosts.linen.calls import Frame
from jdelta.trees import surgery

Own = Mapping[str, jax.Array]
Given = Sequence[tuple[WeightEdit, Own]]


# --- in the call of a linear module


def run(edits: Sequence[WeightEdit], call: Callable, frame: Frame, /, *args: Any, **kwargs: Any) -> Any:
    """The call of a linear module with the changes of some edits of its weights."""
    edits, module = [edit for edit in edits if not edit.is_bias], frame.module
    key, x = main_input(type(module), args, kwargs)
    output: Any = None
    if frame.scope.is_mutable_collection("params") and any(not _own_in_scope(edit, frame) for edit in edits):
        output = call(*args, **kwargs)  # it makes the module's own leaves, which come first
        for edit in edits:
            _make_own(edit, frame)
    given = [(edit, _own_in_scope(edit, frame)) for edit in edits]
    training = any(dropout_of(edit.rule) for edit in edits) and not frame.is_deterministic
    alone = output is None and len(args) + len(kwargs) == 1 and not training
    if alone and (y := _in_one_product(given, module, x)) is not None:
        return y

    if output is None and len(given) == 1 and _side(given[0][0]) == "in":
        args, kwargs = with_main_input(args, kwargs, key, _transformed(*given[0], x))
        return call(*args, **kwargs)
    output, only = call(*args, **kwargs) if output is None else output, len(given) == 1
    total = y = main_output(output, x)
    for edit, own in given:
        if _side(edit) == "out":
            total = _transformed(edit, own, y) if only else total + _transformed(edit, own, y) - y
        elif _side(edit) == "in":
            leaf = own_leaves_of(module)[edit.leaf[-1]]
            change = edit.linear.product((_transformed(edit, own, x) - x).astype(y.dtype), leaf.astype(y.dtype))
            total = total + change.astype(y.dtype)
        else:
            total = total + _product(edit, own, _dropped(edit, x, frame), y, frame).astype(y.dtype)
    return with_main_output(output, total, input_if_any(type(module), args, kwargs))


class OwnLeaves(nn.Module):
    """Makes the own leaves of an edit while the model is initialised, where flax's tables show them.

    Attributes:
      edit: the edit.
    """

    edit: WeightEdit

    @nn.compact
    def __call__(self, weight: jax.Array) -> dict[str, jax.Array]:
        """The leaves by name, at this weight as its module sees it."""
        made = weights.init(dataclasses.replace(self.edit, layers=()), self.make_rng("params"), weight)
        return {name: self.param(name, _always(value), value.shape) for name, value in made.items()}


def _always(value: jax.Array) -> Callable[..., jax.Array]:
    """An initialiser of this value, whatever it is asked for: Google's gemma asks for a shape and a dtype."""
    return lambda *args, **kwargs: value


def _make_own(edit: WeightEdit, frame: Frame) -> None:
    if not _own_in_scope(edit, frame):
        scope: Any = frame.scope_below((edit.name, *edit.own))
        OwnLeaves(edit, parent=scope, name=None)(own_leaves_of(frame.module)[edit.leaf[-1]])


def _own_in_scope(edit: WeightEdit, frame: Frame) -> dict[str, jax.Array]:
    """The edit's own leaves, as they are in the scope of the call; nothing, if they are not there yet."""
    tree = frame.scope.variables().get("params", {})
    for key in (edit.name, *edit.own):
        tree = tree.get(key, {})
    own = {name: meta.unbox(leaf) for name, leaf in tree.items() if not isinstance(leaf, Mapping)}
    for name, shape in weights.own_shapes(edit).items() if own else ():
        if name in own and own[name].shape != shape:
            where = "/" + "/".join((*edit.own_path,))
            raise ScopeParamShapeError(name, where, own[name].shape, shape)
    return own


def _side(edit: WeightEdit) -> str | None:
    return edit.rule.side if isinstance(edit.rule, FeatureRule) else None


def _transformed(edit: WeightEdit, own: Own, z: jax.Array) -> jax.Array:
    """The features after the rule. All axes of a kind are one, `(…, d)`, for the rule."""
    n = len(weights.layout_of(edit).numbers(edit.rule.side))
    flat = z.reshape(*z.shape[: z.ndim - n], math.prod(z.shape[z.ndim - n :]))
    new = edit.rule.transform(flat, weights.seen_own(edit, own))
    return new.astype(z.dtype).reshape(z.shape)


def _product(edit: WeightEdit, own: Own, x: jax.Array, y: jax.Array, frame: Frame) -> jax.Array:
    """What the change of the weight adds to the module's output."""
    leaves = own_leaves_of(frame.module)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(y.dtype)  # T5's norms give float32 to a Dense that computes in bfloat16
    bias = leaves.get("bias")
    context = frame.context() if uses_context(edit.rule) else None
    change = _changed(edit, x, y, own, leaves[edit.leaf[-1]], bias, context)
    if change.shape != y.shape:
        raise ValueError(
            f"{type(edit.rule).__name__} at {surgery.name_of(edit.leaf)}: product gives shape {change.shape}, and the "
            f"module's output has shape {y.shape}."
        )
    return change


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


def _dropped(edit: WeightEdit, x: jax.Array, frame: Frame) -> jax.Array:
    """The input after the rule's dropout."""
    rate = dropout_of(edit.rule)
    if not rate or frame.is_deterministic or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    key = frame.scope_below((edit.name, *edit.own)).make_rng("dropout")
    dropped: Any = nn.Dropout(rate).apply({}, x, deterministic=False, rngs={"dropout": key})
    return dropped


# --- in one product, with the changed weight


def _in_one_product(given: Given, module: nn.Module, x: jax.Array) -> jax.Array | None:
    """What the module computes with the changed weight, where that is cheaper than the sum; else `None`.

    Only in float32: in less, a small update would be lost in the rounding of the weights.
    """
    first = given[0][0]
    if not all(edit.alone and _side(edit) is None and not uses_context(edit.rule) for edit, _ in given):
        return None
    by_product = all(isinstance(edit.rule, HasProduct) for edit, _ in given)
    leaves = own_leaves_of(module)
    if by_product and not (isinstance(first.linear, MatrixMap) and _is_cheaper(first, x)):
        return None
    arrays = [*leaves.values(), *(leaf for _, own in given for leaf in own.values())]
    arrays += [] if isinstance(first.linear, LookupMap) else [x]
    dtypes = [getattr(module, "dtype", None) or "float32", *(leaf.dtype for leaf in arrays)]
    if any(jnp.dtype(dtype) != jnp.float32 for dtype in dtypes):
        return None
    fields = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    plain: dict[str, Any] = {key: nn.initializers.zeros for key, value in fields.items() if is_initializer(key, value)}
    pair = _Pair(module.clone(parent=None, name=None, **plain), tuple(weights.kind_of(edit) for edit, _ in given))
    own = {str(i): leaves for i, (_, leaves) in enumerate(given)}
    try:
        hash(pair)
    except TypeError:  # a list in a field of the module
        return None if by_product else pair.run(x, pair.merged(leaves, own))
    return products.fused(pair, x, leaves, own) if by_product else _with_changed_weight(pair, x, leaves, own)


def _is_cheaper(edit: WeightEdit, x: jax.Array) -> bool:
    d_in, d_out = weights.layout_of(edit).matrix_shape(edit.shape)
    return products.fusing_is_cheaper(x.size // d_in, d_in, d_out)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """An unbound module and edits of its weight: a `products.Pair`."""

    module: nn.Module
    kinds: tuple[Kind, ...]

    def run(self, x: jax.Array, leaves: Own) -> jax.Array:
        y: Any = self.module.apply({"params": leaves}, x)
        return y

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


def own_leaves_of(module: nn.Module) -> dict[str, jax.Array]:
    """The parameters of a bound module, without those of modules and deltas inside it."""
    leaves = module.variables.get("params", {})
    return {key: meta.unbox(leaf) for key, leaf in leaves.items() if not isinstance(leaf, Mapping)}


# --- by rewriting the tree


def rewritten(variables: Any, attachments: Sequence[Attachment], probes: Mapping[str, jax.Array]) -> Any:
    """The variables with the leaves that edits change before the model runs, and to which probes are added."""
    edits = [edit for a in attachments if a.active for edit in a.weight_edits if not edit.in_call]
    if not edits or "params" not in variables:
        return variables
    leaves = surgery.flatten(variables["params"])
    changed = dict(leaves)
    for path in dict.fromkeys(edit.leaf for edit in edits):
        of_leaf = [(edit, own) for edit in edits if edit.leaf == path and (own := weights.own_leaves(edit, leaves))]
        if of_leaf and path in leaves:
            value = weights.changed([e for e, _ in of_leaf], meta.unbox(leaves[path]), [own for _, own in of_leaf])
            if (probe := probes.get(surgery.name_of(path))) is not None:
                value = value + probe.astype(value.dtype)
            changed[path] = surgery.in_box_of(leaves[path], value)
    return {**variables, "params": surgery.unflatten(changed, like=variables["params"])}


def restored(variables: Any, attachments: Sequence[Attachment], stored: Any) -> Any:
    """The variables that a run returned, with the leaves as they were stored where a delta had rewritten them."""
    paths = {edit.leaf for a in attachments if a.active for edit in a.weight_edits if not edit.in_call}
    before = surgery.flatten(stored.get("params", {}))
    if "params" not in variables or not paths & before.keys():
        return variables
    leaves = surgery.flatten(variables["params"])
    back = {path: before[path] for path in paths if path in leaves and path in before}
    return {**variables, "params": surgery.unflatten(leaves | back, like=variables["params"])}


def with_own_leaves(variables: Any, attachments: Sequence[Attachment], rngs: Any) -> Any:
    """Fresh variables with initial values of the leaves that edits of weights have."""
    if "params" not in variables:
        return variables
    leaves = surgery.flatten(variables["params"])
    new: dict[surgery.Path, jax.Array] = {}
    for attachment in attachments:
        for edit in attachment.weight_edits if attachment.active else ():
            if not edit.is_bias and edit.leaf in leaves and not weights.own_leaves(edit, leaves):
                own = weights.init(edit, _params_key(rngs), leaves[edit.leaf])
                new |= {(*edit.own_path, name): value for name, value in own.items()}
    return {**variables, "params": surgery.unflatten(leaves | new, like=variables["params"])} if new else variables


def _params_key(rngs: Any) -> jax.Array:
    """The key of parameters among those of a run."""
    key = rngs.get("params") if isinstance(rngs, Mapping) else rngs
    if key is None:
        raise ValueError("the leaves of a delta are to be made, and there is no key for them: rngs={'params': key}.")
    return key
