"""The model without a delta: for as long as a context lasts, or by the tree that it is called with."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import jax
from flax.core import meta

from jdelta.core import merging, switching
from jdelta.core.state import DeltaState, kept_value, unfrozen_backbone
from jdelta.trees import left_out, states, surgery
from jdelta.trees.surgery import Tree

Was = Literal["attached", "merged", "detached"]

_contexts: weakref.WeakKeyDictionary[DeltaState, tuple[int, Was]] = weakref.WeakKeyDictionary()  # how many, and before


@contextlib.contextmanager
def disabled(state: DeltaState) -> Iterator[None]:
    """While this lasts, the model computes what it computes without the delta, as a reference model does.

        with delta.disabled():
            reference = model(**batch).logits

    The delta is detached meanwhile, and what it was before, attached or merged, when the context ends, also by an
    exception: `model.params` has the same bits again. Contexts of one delta or of several end in any order. What is
    done inside with `attach`, `merge` or `remove` stays done.

    The model is changed for as long as it lasts, in all threads. A tree of your own that is passed to the model, and
    functions that are compiled, take `jdelta.without(params, delta)` in place of it.

    Raises:
      RuntimeError: the delta was removed, or `model.params` was donated.
      ValueError: `model.params` lacks leaves of this delta; or it is merged, and its weights were changed since: those
        of several merged deltas are disabled in the reverse order of merging.
    """
    number, was = _contexts.get(state, (0, _now(state)))
    if not number:
        _turn_off(state)
    _contexts[state] = number + 1, was
    try:
        yield
    finally:
        number, was = _contexts.pop(state)
        if number > 1:
            _contexts[state] = number - 1, was
        else:
            _turn_back(state, was)


def without(state: DeltaState, params: Tree | None = None) -> Tree:
    """See `jdelta.without`."""
    own, tree = state.attachment, state.values(params)
    if state.merged:
        raise RuntimeError(
            f"without: delta {state.name!r} is merged into the weights. Call unmerge() first, or use "
            "delta.disabled() for the model's own values."
        )
    leaves, start = surgery.flatten(tree), surgery.root(tree)
    gone = {(*start, *path) for path in own.leaves if not states.is_state(tree)}
    rest = {path: leaf for path, leaf in leaves.items() if path not in gone}
    earlier = state.kept if own.active else unfrozen_backbone(state, state.host.params or {})
    for path in own.unfrozen_backbone:
        value = kept_value(earlier, path)
        if value is None or isinstance(value, jax.ShapeDtypeStruct):
            raise ValueError(
                f"without: the pretrained value of {surgery.name_of(path)!r}, which trains with delta {state.name!r}, "
                "is unknown: the backbone held none when the delta was attached. Attach it to a backbone that holds "
                "its parameters."
            )
        rest[(*start, *path)] = _with_value(leaves[(*start, *path)], value)
    made = surgery.unflatten(rest, like=tree)
    return left_out.marked_state(made, own.leaves) if states.is_state(tree) else left_out.marked(made, [state.name])


def _now(state: DeltaState) -> Was:
    return "merged" if state.merged else "attached" if state.attachment.active else "detached"


def _turn_off(state: DeltaState) -> None:
    if state.merged:
        merging.unmerge(state)
    if state.attachment.active:
        switching.detach(state)


def _turn_back(state: DeltaState, was: Was) -> None:
    """Makes a delta that is still off what it was."""
    if was == "detached" or state.removed is not None or _now(state) != "detached":
        return
    switching.attach(state)
    if was == "merged":
        initial, state.initial = state.initial, None  # it was said before if nothing has moved
        try:
            merging.merge(state)
        finally:
            state.initial = initial


def _with_value(leaf: Any, value: Any) -> Any:
    """A value in the place of a leaf: in its dtype, its box and its sharding."""
    return surgery.in_place_of(leaf, value.astype(meta.unbox(leaf).dtype))
