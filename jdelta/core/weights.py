"""What edits of weights do to leaves: initial values of their own, and changed weights.

An own leaf is stored with the axes of its weight where its rule says that it follows them; before these come the axes
that input, weights and output share. Inside `nn.scan` all leaves have the layers' axes besides.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.core import meta

from jdelta.core.edits import WeightEdit
from jdelta.core.linear_maps import BoundLinear, Layout
from jdelta.core.parameters import unread
from jdelta.core.rules import FeatureRule, HasProduct, Leaves, axes_of, name_of, starts_from_weight
from jdelta.trees import dtypes, surgery
from jdelta.trees.surgery import Path

R = TypeVar("R")


def layout_of(edit: WeightEdit) -> Layout:
    """The layout of the leaf that an edit changes, as its module sees it."""
    layout: Layout = edit.linear.layout(edit.shape)
    return layout


@dataclasses.dataclass(frozen=True)
class Kind:
    """An edit without what differs between places that are alike, so that these share a trace and what was found."""

    rule: Any
    linear: Any
    shape: tuple[int, ...]
    layers: tuple[int, ...]
    leaf: str
    is_bias: bool

    @property
    def edit(self) -> WeightEdit:
        """One of these edits, of a leaf that has no owner."""
        alike = WeightEdit((self.leaf,), self.rule, linear=self.linear, shape=self.shape)
        return dataclasses.replace(alike, layers=self.layers, is_bias=self.is_bias)

    def is_hashable(self) -> bool:
        """Whether what was found can be kept: not if a field of the rule holds an array or a list."""
        try:
            hash(self)
        except TypeError:
            return False
        return True


def kind_of(edit: WeightEdit) -> Kind:
    """What edits have in common whose places are alike, as their modules see them."""
    return Kind(edit.rule, edit.linear, edit.shape, (), edit.leaf[-1], edit.is_bias)


def _once_a_kind(function: Callable[[Kind], R]) -> Callable[[WeightEdit], R]:
    """A function of edits that computes what a function of their kind does, once where the kind is hashable."""
    kept = functools.lru_cache(maxsize=1024)(function)

    @functools.wraps(function)
    def of(edit: WeightEdit) -> R:
        kind = kind_of(edit)
        return kept(kind) if kind.is_hashable() else function(kind)

    return of


def _over_shared(run: Callable[..., R], layout: Layout) -> Callable[..., R]:
    """A function of one matrix, over all axes that input, weights and output share."""
    for _ in layout.shared:
        run = jax.vmap(run)
    return run


# --- own leaves


def init(edit: WeightEdit, key: jax.Array, leaf: Any) -> dict[str, jax.Array]:
    """The initial values of an edit's own leaves, as they are stored.

    Args:
      edit: the edit.
      key: of the delta. Each place has random numbers of its own.
      leaf: the leaf that it changes, or its shape, as it is stored.

    Raises:
      TypeError: the rule gives something else than float32 or int32.
      ValueError: the rule gives an array of other axes than it says.
    """
    stored = meta.unbox(leaf)
    key = jax.random.fold_in(key, zlib.crc32(".".join((*edit.own_path, edit.leaf[-1])).encode()) % 2**31)
    needs_value = starts_from_weight(edit.rule)
    value = stored if needs_value else jax.ShapeDtypeStruct(stored.shape, stored.dtype)
    if needs_value and isinstance(stored, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{name_of(edit.rule)} at {surgery.name_of(edit.leaf)} starts from the backbone's values, and the model "
            "holds shapes only. Pass them: delta.init(rng, params)."
        )
    kind = dataclasses.replace(kind_of(edit), layers=edit.layers)
    if not kind.is_hashable():
        return _init_over(edit, key, value, edit.layers)
    own: dict[str, jax.Array] = _init_once(kind, (stored.shape, stored.dtype), key, value if needs_value else None)
    return own


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced once for all places that are alike
def _init_once(kind: Kind, stored: tuple[Any, Any], key: jax.Array, value: jax.Array | None) -> dict[str, jax.Array]:
    return _init_over(kind.edit, key, jax.ShapeDtypeStruct(*stored) if value is None else value, kind.layers)


def _init_over(edit: WeightEdit, key: jax.Array, leaf: Any, layers: Sequence[int]) -> dict[str, jax.Array]:
    if layers:
        *rest, axis = layers  # the outermost
        size = leaf.shape[axis]
        keys, smaller = jax.random.split(key, size), leaf.shape[:axis] + leaf.shape[axis + 1 :]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            one: Any = jax.ShapeDtypeStruct(smaller, leaf.dtype)
            return jax.vmap(lambda k: _init_over(edit, k, one, rest), out_axes=axis)(keys)
        return jax.vmap(lambda k, w: _init_over(edit, k, w, rest), (0, axis), axis)(keys, leaf)
    layout = layout_of(edit)

    def one_matrix(key: jax.Array, weight: Any) -> dict[str, jax.Array]:
        try:
            own = edit.rule.init(key, weight)
        except ValueError as error:
            raise ValueError(f"{name_of(edit.rule)} at {surgery.name_of(edit.leaf)}: {error}") from error
        for name, value in own.items():
            if value.dtype not in (jnp.float32, jnp.int32):
                raise TypeError(
                    f"{name_of(edit.rule)} at {surgery.name_of(edit.leaf)}: init gives {name!r} in {value.dtype}. "
                    "A delta's own leaves are float32, or int32 if they do not train."
                )
        return dict(own)

    shared = layout.sizes(edit.shape, "shared")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        weight: Any = jax.ShapeDtypeStruct(layout.matrix_shape(edit.shape), jnp.float32)
        run: Callable[..., Any] = lambda key: one_matrix(key, weight)  # noqa: E731
        given: tuple[jax.Array, ...] = ()
    else:
        run, given = one_matrix, (layout.matrix(leaf).astype(jnp.float32),)
    keys = jax.random.split(key, shared) if shared else key
    made = _over_shared(run, layout)(keys, *given)
    return {name: stored_own(edit, name, value) for name, value in made.items()}


@_once_a_kind
def own_shapes(kind: Kind) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of an edit's own leaves as they are stored, without layers' axes."""
    leaf = jax.ShapeDtypeStruct(kind.shape, jnp.float32)
    own: dict[str, jax.ShapeDtypeStruct] = jax.eval_shape(
        lambda key, leaf: _init_over(kind.edit, key, leaf, ()), jax.random.key(0), leaf
    )
    return own


def stored_own(edit: WeightEdit, name: str, value: jax.Array) -> jax.Array:
    """An own leaf `(*shared, …)` with the axes that the weight has where it follows them."""
    layout, n = layout_of(edit), len(layout_of(edit).shared)
    follows = axes_of(edit.rule).get(name)
    if follows is None:
        return value
    if len(follows) != value.ndim - n:
        raise ValueError(
            f"{name_of(edit.rule)} at {surgery.name_of(edit.leaf)}: axes says that {name!r} has {len(follows)} axes, "
            f"and init gives it shape {value.shape[n:]}."
        )
    sizes = [
        (size,) if kind is None else layout.sizes(edit.shape, kind)
        for kind, size in zip(follows, value.shape[n:], strict=True)
    ]
    return value.reshape(*value.shape[:n], *(size for part in sizes for size in part))


def seen_own(edit: WeightEdit, own: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The own leaves as the rule sees them, `(*shared, …)`, from those that are stored, without layers' axes."""
    layout = layout_of(edit)
    n, found = len(layout.shared), {}
    for name, leaf in own.items():
        value = meta.unbox(leaf)
        shape: list[int] = list(value.shape[:n])
        rest = list(value.shape[n:])
        for kind in axes_of(edit.rule).get(name, (None,) * len(rest)):
            count = 1 if kind is None else len(layout.numbers(kind))
            shape.append(math.prod(rest[:count]))
            rest = rest[count:]
        found[name] = value.reshape(shape)
    return found


# --- changes


def changed(edits: Sequence[WeightEdit], leaf: jax.Array, own: Sequence[Mapping[str, Any]]) -> jax.Array:
    """A leaf with the changes of some edits, each of them at the stored leaf. The sum is computed in float32.

    Args:
      edits: of this leaf.
      leaf: as it is stored, with layers' axes if it has some.
      own: the stored own leaves of each edit.
    """
    wide = wide_dtype(leaf.dtype)
    updates = [update(edit, leaf, leaves) for edit, leaves in zip(edits, own, strict=True)]
    total = leaf.astype(wide)
    for one in updates:
        total = total + one
    return total.astype(leaf.dtype)


def update(edit: WeightEdit, leaf: jax.Array, own: Mapping[str, Any]) -> jax.Array:
    """The change of a leaf, in float32, in the shape of the leaf as it is stored."""
    run: Callable[..., jax.Array] = lambda leaf, own: _update(edit, leaf, own)  # noqa: E731
    for axis in edit.layers:
        run = jax.vmap(run, axis, axis)
    return run(leaf, {name: meta.unbox(value) for name, value in own.items()})


def _update(edit: WeightEdit, leaf: jax.Array, own: Mapping[str, Any]) -> jax.Array:
    layout = layout_of(edit)
    run = _over_shared(functools.partial(matrix_update, edit), layout)
    return layout.stored(run(layout.matrix(leaf).astype(wide_dtype(leaf.dtype)), seen_own(edit, own)), leaf.shape)


def matrix_update(edit: WeightEdit, weight: jax.Array, own: Leaves) -> jax.Array:
    """The change of one matrix. Raises `ValueError` or `TypeError` if the rule gives another shape or dtype."""
    rule = edit.rule
    if isinstance(rule, FeatureRule):
        return _of_features(rule, weight, own, edit.is_bias)
    new: jax.Array = rule.update(weight, {name: _wide(value) for name, value in own.items()})
    where = f"{name_of(rule)} at {surgery.name_of(edit.leaf)}"
    if jnp.shape(new) != weight.shape:
        raise ValueError(f"{where}: update gives shape {jnp.shape(new)}, and the weight is {weight.shape}.")
    if new.dtype not in (weight.dtype, jnp.float32):
        raise TypeError(f"{where}: update gives {new.dtype}, and changes of weights are float32.")
    return new


def _wide(value: jax.Array) -> jax.Array:
    return value.astype(jnp.float32) if jnp.issubdtype(value.dtype, jnp.inexact) else value


def _of_features(rule: FeatureRule, weight: jax.Array, own: Leaves, is_bias: bool) -> jax.Array:
    if rule.side == "out":
        return rule.transform(weight, own) - weight
    if is_bias:
        return jnp.zeros_like(weight)
    transposed = jax.vjp(lambda z: rule.transform(z, own), jnp.zeros_like(weight.T))[1]  # of z M: c Mᵀ
    new: jax.Array = transposed(weight.T)[0].T
    return new - weight


def require_sound(edit: WeightEdit) -> None:
    """Raises `TypeError` or `ValueError` if a rule gives arrays of wrong shapes or dtypes. Nothing is computed."""
    try:
        _tried(edit)
    except (TypeError, ValueError):
        _try(edit)  # it names this leaf


@_once_a_kind
def _tried(kind: Kind) -> None:
    _try(kind.edit)


def _try(edit: WeightEdit) -> None:
    def run(key: jax.Array, leaf: jax.Array) -> jax.Array:
        return _update(edit, leaf, _init_over(edit, key, leaf, ()))

    jax.eval_shape(run, jax.random.key(0), jax.ShapeDtypeStruct(edit.shape, jnp.float32))


def needs_weight(edit: WeightEdit) -> bool:
    """Whether a call of a linear module with the change takes the leaf's value, besides the module itself."""
    if isinstance(edit.rule, FeatureRule):
        return edit.rule.side == "in"
    return not isinstance(edit.rule, HasProduct) or reads_weight(edit)


@_once_a_kind
def reads_weight(kind: Kind) -> bool:
    """Whether the change of a leaf depends on the leaf's value."""
    if isinstance(kind.rule, FeatureRule):
        return True
    edit, weight = kind.edit, jax.ShapeDtypeStruct(kind.shape, jnp.float32)
    own = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in own_shapes(edit).items()}
    return not unread(lambda tree: _update(edit, tree["weight"], own), {"weight": weight})


@_once_a_kind
def reads_output(kind: Kind) -> bool:
    """Whether the product of a rule, at a `MatrixMap`, takes the module's own output: then that has to be computed."""
    edit, linear = kind.edit, kind.linear
    sizes = [1] * (1 + max(axis + 1 if axis >= 0 else -axis for axis in linear.axis))
    for axis, size in zip(linear.axis, layout_of(edit).sizes(kind.shape, "in"), strict=True):
        sizes[axis] = size
    outside = [sizes[axis] for axis in linear.free(tuple(sizes))]
    y = jax.ShapeDtypeStruct((*outside, *layout_of(edit).sizes(kind.shape, "out")), jnp.float32)
    x, leaf = jnp.zeros(sizes), jnp.zeros(kind.shape)
    own = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in own_shapes(edit).items()}
    return not unread(lambda tree: product(edit, x, tree["y"], seen_own(edit, own), leaf, {}), {"y": y})


def product(
    edit: WeightEdit, x: jax.Array, y: jax.Array, own: Leaves, leaf: jax.Array, told: Mapping[str, Any]
) -> jax.Array | None:
    """What a rule says that its change adds to a module's output, matrix by matrix; `None` if it says nothing.

    Args:
      edit: of the weight in which the module is linear.
      x: the module's input.
      y: its output without bias.
      own: the own leaves, as the rule sees them.
      leaf: the weight, as the module sees it.
      told: keywords for the rule.
    """
    if not isinstance(edit.rule, HasProduct):
        return None
    if not layout_of(edit).shared:
        bound = BoundLinear(edit.linear, leaf, y.dtype)
        flat = edit.rule.product(x, bound.flat(y), own, bound, **told)
        if flat is None:
            return None
        if flat.size != y.size:
            raise ValueError(
                f"{name_of(edit.rule)} at {surgery.name_of(edit.leaf)}: product gives shape {flat.shape}, and y has "
                f"{bound.flat(y).shape}."
            )
        return bound.as_output(flat, y.shape)
    linear, of_x, of_w, of_y = edit.linear.of_one()
    one = dataclasses.replace(edit, linear=linear, shape=(*edit.shape[:of_w], *edit.shape[of_w + 1 :]))
    run: Callable[..., jax.Array | None] = functools.partial(product, one, told=told)
    return jax.vmap(run, (of_x, of_y, 0, of_w), of_y)(x, y, dict(own), leaf)


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which a leaf of this dtype is added to."""
    return jnp.promote_types(dtype, jnp.float32) if dtypes.takes_steps(dtype) else jnp.float32


def own_leaves(edit: WeightEdit, leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The stored own leaves of an edit, by name."""
    begin = edit.own_path
    return {path[-1]: leaf for path, leaf in leaves.items() if path[:-1] == begin}
