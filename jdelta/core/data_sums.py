"""Sums over batches, by one compiled function of a batch: of modules' inputs, or of gradients of their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from jdelta.core.arguments import is_array
from jdelta.core.data_starts import DataStart, Sums
from jdelta.core.edits import Attachment, CallEdit, Edit, WeightEdit
from jdelta.core.input_sums import COUNT, InputSums
from jdelta.core.linear_maps import EinsumMap, MatrixMap
from jdelta.core.progress import shown
from jdelta.core.state import DeltaState
from jdelta.core.weights import layout_of
from jdelta.trees import surgery
from jdelta.trees.surgery import Path, Tree

_NAME = "sums_of_inputs"  # below it, at their hosts, are the leaves whose gradients are the sums
Loss = Callable[[Any, Any], jax.Array]
Flat = dict[Path, jax.Array]


def where(edit: Edit) -> str:
    """The name of what an edit changes, for messages."""
    return surgery.name_of(edit.host if isinstance(edit, CallEdit) or edit.by_module else edit.leaf)


def summed(
    state: DeltaState,
    start: DataStart,
    edits: Sequence[Edit],
    bare: Tree,
    batches: Iterable[Any],
    loss: Loss | None,
    progress: bool,
) -> dict[Edit, Sums]:
    """What is summed for each edit.

    Args:
      state: the delta. The model is run without it.
      start: says what is summed.
      edits: of the delta.
      bare: the tree without the delta's own leaves.
      batches, loss, progress: as in `init_from_data`.

    Raises:
      TypeError, ValueError: a batch does not fit, there is none, or a module was not reached.
    """
    others = [dataclasses.replace(a, active=a.active and a.name != state.name) for a in state.host.attachments]
    if start.sums == "gradients":
        taken = {edit: {"gradient": _weight(state, edit)} for edit in edits}
        flat = surgery.parameters_of(bare)
        at = {path: flat[path] for paths in taken.values() for path in paths.values()}
        totals, n = _over_batches(state, others, at, bare, batches, loss, progress)
        totals = {path: meta.unbox(total) / n for path, total in totals.items()}
    else:
        layers = {edit: _layer(state, start, edit) for edit in edits}
        attachments = [Attachment(_NAME, tuple(layers.values())), *others]
        made = jax.eval_shape(lambda key: state.host.init(attachments, key), state.rng)
        shapes = {path: leaf for path, leaf in surgery.parameters_of(made).items() if _NAME in path}
        taken = {edit: _below(shapes, (*layer.host, *layer.leaf)) for edit, layer in layers.items()}
        totals, n = _over_batches(state, attachments, shapes, bare, batches, loss, progress)
    found: dict[Edit, Sums] = {}
    for edit, paths in taken.items():
        found[edit] = {name: meta.unbox(totals[path]) for name, path in paths.items()}
        _require_sound(state, edit, found[edit])
    return found


def _weight(state: DeltaState, edit: Edit) -> Path:
    """The path of the weight whose gradient is summed."""
    if not isinstance(edit, WeightEdit):
        raise ValueError(f"{state.label} at {where(edit)}: gradients are those of weights, and it changes none.")
    dtype = meta.unbox(state.structure.leaves[edit.leaf]).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{state.label} at {where(edit)}: the weight holds {dtype}, which has no gradient.")
    return edit.leaf


def _layer(state: DeltaState, start: DataStart, edit: Edit) -> CallEdit:
    """What is put before the module of an edit."""
    if isinstance(edit, CallEdit):
        return CallEdit(edit.host, "before", InputSums(start), leaf=(_NAME, *edit.leaf))
    if not edit.in_call or not isinstance(edit.linear, MatrixMap | EinsumMap) or layout_of(edit).shared:
        raise ValueError(
            f"{state.label} at {where(edit)}: what meets the weight there cannot be seen as vectors of inputs, as in "
            "convolutions, embeddings, experts and parameters by name. Leave it out, with exclude_modules for example."
        )
    return CallEdit(edit.host, "before", InputSums(start, edit.linear, edit.shape), leaf=(_NAME, edit.leaf[-1]))


def _below(shapes: Mapping[Path, Any], begin: Path) -> dict[str, Path]:
    return {path[-1]: path for path in shapes if path[:-1] == begin}


def _over_batches(
    state: DeltaState,
    attachments: Sequence[Attachment],
    at: Mapping[Path, Any],
    bare: Tree,
    batches: Iterable[Any],
    loss: Loss | None,
    progress: bool,
) -> tuple[Flat, int]:
    """The sums of the gradients by some leaves, zeros where the tree lacks them, and the number of batches."""
    if isinstance(batches, Mapping) or is_array(batches) or not isinstance(batches, Iterable):
        raise TypeError(f"init_from_data: batches are an iterable, as [batch], got one {type(batches).__name__}.")
    begin, n = surgery.root(bare), 0
    totals = {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in map(_unboxed, at.items())}
    with state.host.variant(attachments) as variant:

        def step(totals: Flat, bare: Tree, arrays: list[Any], rest: tuple[Any, ...]) -> Flat:
            treedef, others = rest
            batch = jax.tree.unflatten(treedef, _filled(arrays, others))
            held = surgery.flatten(bare)

            def value(leaves: Flat) -> jax.Array:
                new = {(*begin, *p): surgery.in_box_of(held.get((*begin, *p)), leaf) for p, leaf in leaves.items()}
                given, call = variant(surgery.unflatten(held | new, like=bare))
                return _called(state, call, batch, n) if loss is None else _scalar(loss(given, batch))

            now = {
                p: meta.unbox(held[(*begin, *p)]) if (*begin, *p) in held else jnp.zeros(v.shape)
                for p, v in totals.items()
            }
            found = jax.grad(value)(now)
            return {path: total + found[path].astype(jnp.float32) for path, total in totals.items()}

        compiled = jax.jit(step, static_argnums=3, donate_argnums=0)
        for batch in shown(batches, f"{state.label}: batches", progress):
            leaves, treedef = jax.tree.flatten(batch)
            arrays = [leaf for leaf in leaves if is_array(leaf)]
            others = tuple(None if is_array(leaf) else (leaf,) for leaf in leaves)
            totals = jax.block_until_ready(compiled(totals, bare, arrays, (treedef, others)))
            n += 1
    if not n:
        raise ValueError(f"init_from_data: {state.label}: there are no batches.")
    return totals, n


def _unboxed(item: tuple[Path, Any]) -> tuple[Path, Any]:
    return item[0], meta.unbox(item[1])


def _filled(arrays: Sequence[Any], others: Sequence[tuple[Any] | None]) -> list[Any]:
    """The leaves of a batch: arrays, and what is none."""
    rest = iter(arrays)
    return [next(rest) if other is None else other[0] for other in others]


def _called(state: DeltaState, call: Callable[..., Any], batch: Any, number: int) -> jax.Array:
    """A number that depends on all that a call of the model gives."""
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch if isinstance(batch, tuple) else (batch,), {})
    try:
        output = call(*args, **kwargs)
    except (TypeError, ValueError) as error:
        has = f"the keywords {', '.join(map(str, kwargs)) or 'none'}" if not args else f"{len(args)} arguments"
        raise type(error)(
            f"init_from_data: {state.label}: batch {number}, which has {has}, is not one that {state.host.class_name} "
            f"can be called with: {error}"
        ) from error
    floats = [leaf for leaf in jax.tree.leaves(output) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum((jnp.sum(leaf.astype(jnp.float32)) for leaf in floats), jnp.zeros(()))


def _scalar(value: Any) -> jax.Array:
    if jnp.shape(value) != ():
        raise TypeError(f"init_from_data: loss gives a number, and this one gives shape {jnp.shape(value)}.")
    return jnp.asarray(value)


def _require_sound(state: DeltaState, edit: Edit, sums: Sums) -> None:
    """Raises `ValueError` if a module had no inputs, or sums are no numbers, where that is known."""
    if any(isinstance(value, jax.core.Tracer) for value in sums.values()):
        return
    for name, value in sums.items():
        if not jnp.isfinite(value).all():
            raise ValueError(f"{state.label} at {where(edit)}: the sum of {name} over the batches is not finite.")
    if COUNT in sums and not sums[COUNT].all():
        raise ValueError(
            f"{state.label} at {where(edit)}: no input of it was seen. Its output does not reach the model's, or all "
            "positions are masked: leave it out, or pass other batches."
        )
