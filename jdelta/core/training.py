"""What trains with a delta, and what is frozen: masks, partitions and optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.core import meta

from jdelta.core.method import Method
from jdelta.core.state import DeltaState, has_value, kept_value
from jdelta.core.warn import warn
from jdelta.trees import addressing, dtypes, fingerprint, freezing, surgery
from jdelta.trees.filters import Trained
from jdelta.trees.surgery import Path, Tree


def trainable_mask(state: DeltaState, params: Tree | None = None) -> Tree:
    """Returns a tree of bools, `True` where a leaf trains, for any optax wrapper.

        mask = delta.trainable_mask(params)
        decayed = optax.masked(optax.add_decayed_weights(1e-2), mask)

    Args:
      params: the tree to make it for; by default `model.params`, or the `nnx.state` of an nnx module.
    """
    tree = state.host.held_tree() if params is None else params
    return freezing.mask_of(tree, trained(state, surgery.parameters_of(tree)))


def partition(state: DeltaState, params: Tree | None = None) -> tuple[Tree, Tree]:
    """Splits a tree into what trains and what is frozen: two trees without empty places.

        trainable, frozen = delta.partition(model.params)
        grads = jax.grad(lambda t: loss(jdelta.combine(t, frozen)))(trainable)

    Args:
      params: the tree to split; by default `model.params`, or the `nnx.state` of an nnx module.

    Raises:
      RuntimeError: the tree was donated.
    """
    tree = state.host.held_tree() if params is None else params
    return surgery.partition(tree, trainable_mask(state, tree))


def combine(state: DeltaState, *trees: Tree) -> Tree:
    """Joins parts of a tree, and raises an error unless they make up the whole tree of this model.

        trainable, frozen = delta.partition(params)
        params = delta.combine(trainable, frozen)

    Args:
      *trees: the parts, such as those of `partition`.

    Raises:
      ValueError: the parts overlap, or leaves are missing or superfluous.
    """
    return surgery.combine(*trees, like=state.tree(None))


def trained(state: DeltaState, leaves: Mapping[Path, Any]) -> set[Path]:
    """The paths of what trains now among these leaves."""
    own, attachments = state.attachment, state.host.attachments
    frozen = {path for a in attachments for path in a.frozen}
    held = surgery.flatten(surgery.parameters(state.tree(None)))
    fixed = {path for path, leaf in held.items() if dtypes.is_fixed(leaf)}
    if state.exclude is None:
        exclude: tuple[str, ...] = (freezing.DELTAS, *(state.method.unfrozen_modules or ()))
        return freezing.trained_paths(leaves, exclude, own.trained if own.active else (), frozen, fixed)
    deltas = {path for a in attachments if a.active for path in a.trained}
    return freezing.trained_paths(leaves, state.exclude, deltas, frozen, fixed)


def trained_filter(state: DeltaState) -> Trained:
    """What trains now, as a filter of flax.nnx."""
    return Trained(frozenset(trained(state, surgery.parameters_of(state.tree(None)))))


def freeze_module(state: DeltaState, exclude: Sequence[str] = ("deltas",)) -> None:
    """Freezes the whole model except what is named. Calling it again replaces the earlier choice.

        delta.freeze_module(exclude=["deltas", "classifier"])

    Args:
      exclude: patterns of modules or leaves that train, with everything below them; `"deltas"` means the leaves
        of all attached deltas.

    Raises:
      TypeError: `exclude` is a bare string.
      ValueError: a pattern matches nothing, or only leaves that cannot be trained, such as whole numbers. The earlier
        choice then stays. A pattern that also matches such leaves is a `UserWarning`.
    """
    before, state.exclude = state.exclude, tuple(addressing.checked(exclude))
    try:
        trainable_mask(state)
    except ValueError:
        state.exclude = before
        raise
    warn_of_untrainable(state, state.exclude, "freeze_module")


def penalty(state: DeltaState, params: Tree | None = None) -> jax.Array | float:
    """What the method adds to the loss, such as AdaLoRA's orthogonality; 0 for most methods.

        loss = task_loss + 0.5 * delta.penalty(params)

    Args:
      params: the tree to compute it from; by default `model.params`. It can be traced.

    Raises:
      RuntimeError: the delta is detached, or the tree was donated.
    """
    own, leaves = state.active("penalised"), surgery.parameters_of(state.values(params))
    return state.method.penalty({path: meta.unbox(leaves[path]) for path in own.leaves})


def optimizer(
    state: DeltaState, tx: optax.GradientTransformation | optax.MultiSteps, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer for the whole tree that updates only what trains now, and has state only for that.

        tx = delta.optimizer(optax.adamw(1e-3))
        state = TrainState.create(apply_fn=model.__call__, params=model.params, tx=tx)
        tx = delta.optimizer(optax.MultiSteps(optax.adamw(1e-3), every_k_schedule=4))  # of 4 micro-batches
        tx = delta.optimizer(optax.adamw(1e-3), lora_plus_ratio=16)  # of LoRA: b at 16 times the rate

    It is bound to what trains when it is made. If that changes, by `freeze_module`, `detach` or another delta, its
    next `init` or `update` is a `RuntimeError`; a compiled step continues with what it was compiled for, until it is
    traced again. (The trees of `trainable_mask` and `partition` do not change either.)

    Args:
      tx: the optimizer of the trainable leaves. `optax.MultiSteps` belongs here: around the result it would sum the
        gradients of the whole backbone.
      **options: of the method. LoRA has `lora_plus_ratio`: the learning rate of `b`, of that of everything else (LoRA+,
        Hayou et al. 2024, arXiv 2402.12354). It multiplies the updates, weight decay among them.

    Raises:
      TypeError: `tx` is not an optimizer, or the method has no such option.
      ValueError: an option is outside its limits.
    """
    bound = _trained_in_model(state, state.tree(None))
    known = list(inspect.signature(state.method.update_factors).parameters)[1:]
    if unknown := options.keys() - {*known}:
        has = f"It has {', '.join(known)}." if known else "It has none."
        raise TypeError(f"optimizer: {state.label} has no option {min(unknown)!r}. {has}")
    factors = state.method.update_factors(state.attachment.leaves, **options)
    if state.method.starts_from_data and not state.started and state.initial is not None:
        warn(
            f"optimizer: delta {state.name!r} is to start from data, and has not: it trains from random values. Call "
            "delta.init_from_data(batches) before the optimizer is made."
        )
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(f"optimizer takes one of optax's, such as optax.adamw(1e-3), got {tx!r}.")
    if type(state.method).optimizer is not Method.optimizer:
        tx = state.method.optimizer(tx, state.attachment.leaves)

    def mask(params: Tree) -> Tree:
        now = _trained_in_model(state, params)
        if now != bound:
            raise RuntimeError(_changed(state.name, bound, now))
        return freezing.mask_of(params, bound)

    full = freezing.freeze_except(tx, mask)
    return freezing.multiplied(full, factors) if any(factor != 1 for factor in factors.values()) else full


def warn_of_untrainable(state: DeltaState, patterns: Sequence[str], verb: str) -> None:
    """Warns if patterns of what trains mean leaves too that cannot be trained."""
    if passed := freezing.passed_over(state.tree(None), patterns):
        more = f" and {len(passed) - 3} more" if len(passed) > 3 else ""
        warn(
            f"{verb}: {', '.join(passed[:3])}{more} stay frozen: only floats of 16 bits and more train. Name the "
            "other leaves alone."
        )


def is_untrained(state: DeltaState, params: Tree) -> bool:
    """Whether all of the delta that trains has the bits that it was initialised with.

    Not while a function is traced, of shapes, of values that were loaded, or where nothing of the delta trains. In
    a program of several processes all have to call this, and find the same.
    """
    if state.initial is None:
        return False
    leaves = surgery.parameters_of(params)
    trains = trained(state, leaves)
    own = [path for path in state.attachment.leaves if path in trains]
    unfrozen = [path for path in state.attachment.unfrozen_backbone if path in trains]
    before = {path: kept_value(state.kept, path) for path in unfrozen}
    values = [meta.unbox(leaves[path]) for path in (*own, *unfrozen)]
    if not values or not all(map(has_value, [*values, *before.values()])):
        return False
    return all(fingerprint.digest(meta.unbox(leaves[path])) == state.initial.get(path) for path in own) and all(
        fingerprint.digest(meta.unbox(leaves[path])) == fingerprint.digest(before[path]) for path in unfrozen
    )


def untrained_message(state: DeltaState, verb: str, params: Tree | None) -> str:
    """The message for a delta that has not moved."""
    holder = "the model itself" if params is None else "the tree that was passed"
    return (
        f"{verb}: nothing of delta {state.name!r} has moved since it was initialised: {holder} holds the values "
        "from before training. Pass the tree that training returned: pass params=…."
    )


def _trained_in_model(state: DeltaState, params: Tree) -> set[Path]:
    """The paths of what trains now in the model, and in a tree that may hold more, such as merged biases."""
    active = [path for a in state.host.attachments if a.active for path in a.leaves]
    float_leaf = jax.ShapeDtypeStruct((), jnp.float32)
    leaves = surgery.parameters_of(params) | surgery.flatten(state.structure.params)
    return trained(state, leaves | dict.fromkeys(active, float_leaf))


def _changed(name: str, before: set[Path], now: set[Path]) -> str:
    """The message for an optimizer that was made when other leaves trained."""
    parts = []
    for what, odd in (("trains now", now - before), ("trains no more", before - now)):
        if odd:
            names = sorted(map(surgery.name_of, odd))
            parts.append(f"{names[0]!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {what}")
    return (
        f"what trains with delta {name!r} changed after this optimizer was made: {'; '.join(parts)}. Make it and its "
        "state anew: tx = delta.optimizer(…); state = tx.init(params)."
    )
