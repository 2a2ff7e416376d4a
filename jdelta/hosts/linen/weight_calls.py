"""Edits of weights on linen: calls of linear modules as `weight_forms` sees them, and leaves that are rewritten in the
tree before the model runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta
from flax.errors import ScopeParamShapeError

from jdelta.core import weights
from jdelta.core.context import Context
from jdelta.core.edits import Attachment, WeightEdit
from jdelta.core.linear_types import is_initializer
from jdelta.hosts import weight_forms
from jdelta.hosts.linen.calls import Frame
from jdelta.trees import surgery

# --- in the call of a linear module


def run(edits: Sequence[WeightEdit], call: Callable, frame: Frame, /, *args: Any, **kwargs: Any) -> Any:
    """The call of a linear module with the changes of some edits of its weights; the edits' own leaves are made, if the
    model is being initialised and they are not there."""
    this = ModuleCall(frame)
    is_initializing = frame.scope.is_mutable_collection("params")
    missing = [edit for edit in edits if is_initializing and not edit.is_bias and not this.own(edit)]
    if not missing:
        return weight_forms.run(edits, call, this, *args, **kwargs)
    output = call(*args, **kwargs)  # it makes the module's own leaves, which come first
    for edit in missing:
        _make_own(edit, this)
    return weight_forms.added(edits, output, this, args, kwargs)


class ModuleCall:
    """A call of a linear linen module in progress: a `weight_forms.LinearCall`."""

    def __init__(self, frame: Frame):
        self.frame = frame
        self.module_type: type = type(frame.module)

    @property
    def dtype(self) -> Any:
        """In which the module is told to compute."""
        return getattr(self.frame.module, "dtype", None)

    def leaves(self) -> dict[str, jax.Array]:
        """The module's own parameters."""
        leaves = self.frame.module.variables.get("params", {})
        return {key: meta.unbox(leaf) for key, leaf in leaves.items() if not isinstance(leaf, Mapping)}

    def own(self, edit: WeightEdit) -> dict[str, jax.Array]:
        """The edit's own leaves, as they are in the scope of the call; nothing, if they are not there yet."""
        tree = self.frame.scope.variables().get("params", {})
        for key in (edit.name, *edit.own):
            tree = tree.get(key, {})
        own = {name: meta.unbox(leaf) for name, leaf in tree.items() if not isinstance(leaf, Mapping)}
        for name, leaf in weights.own_shapes(edit).items() if own else ():
            if name in own and own[name].shape != leaf.shape:
                where = "/" + "/".join((*edit.own_path,))
                raise ScopeParamShapeError(name, where, own[name].shape, leaf.shape)
        return own

    def is_deterministic(self, edit: WeightEdit) -> bool:
        """Whether dropout is off."""
        return self.frame.is_deterministic

    def context(self, edit: WeightEdit) -> Context:
        """What a rule is told of the call."""
        return self.frame.context()

    def dropped(self, edit: WeightEdit, x: jax.Array, rate: float) -> jax.Array:
        """The input after dropout, with a key of the edit's place."""
        key = self.frame.scope_below((edit.name, *edit.own)).make_rng("dropout")
        dropped: Any = nn.Dropout(rate).apply({}, x, deterministic=False, rngs={"dropout": key})
        return dropped

    def pure(self) -> _Unbound:
        """The module as a function."""
        module = self.frame.module
        fields = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
        plain: dict[str, Any] = {key: nn.initializers.zeros for key in fields if is_initializer(key, fields[key])}
        return _Unbound(module.clone(parent=None, name=None, **plain))


@dataclasses.dataclass(frozen=True)
class _Unbound:
    """A linear module as a function of its input and its parameters."""

    module: nn.Module

    def __call__(self, x: jax.Array, leaves: Mapping[str, jax.Array]) -> jax.Array:
        y: Any = self.module.apply({"params": leaves}, x)
        return y


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


def _make_own(edit: WeightEdit, this: ModuleCall) -> None:
    if not this.own(edit):  # or another edit has made them
        scope: Any = this.frame.scope_below((edit.name, *edit.own))
        OwnLeaves(edit, parent=scope, name=None)(this.leaves()[edit.leaf[-1]])


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
