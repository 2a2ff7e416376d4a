"""Initial values from batches of data: `delta.init_from_data`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from jdelta.core import weights
from jdelta.core.attaching import place, put
from jdelta.core.data_starts import DataStart, Sums
from jdelta.core.data_sums import summed, where
from jdelta.core.edits import CallEdit, WeightEdit
from jdelta.core.host import unchanged_on_error
from jdelta.core.initial_values import init
from jdelta.core.input_sums import COUNT
from jdelta.core.method import Method
from jdelta.core.placement import edits_at
from jdelta.core.state import DeltaState, digests
from jdelta.core.weights import Kind
from jdelta.trees import surgery
from jdelta.trees.surgery import Path, Tree


def init_from_data(
    state: DeltaState,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], jax.Array] | None = None,
    params: Tree | None = None,
    progress: bool = True,
    **options: Any,
) -> Tree:
    """Initialises the delta's own leaves from batches of data, for a method that starts so.

        delta = jdelta.LoraModel(model, lora_r=8, init_lora_weights="eva")
        delta.init_from_data(batches, rho=2.0)  # before optimizers and steps are made
        delta = jdelta.LoraModel(model, lora_r=8, init_lora_weights="lora_ga")
        delta.init_from_data(batches, loss)

    Each batch is run once, by a compiled function that adds to sums in float32; activations are not kept. Batches and
    parameters may be sharded. The model runs without this delta, and with all others. Inputs at positions that the
    attention mask of the module's call, or of the nearest one around it, leaves out are not counted, where that mask is
    `(batch, seq)`; inside `nn.scan` it is known only where it is an argument there.

    Args:
      batches: each a dict of keywords, a tuple of arguments, or an array, as the model is called with.
      loss: `loss(params, batch)`, a number, in place of a call of the model; of an nnx module, `loss(model, batch)`.
        LoRA-GA needs it.
      params: the grafted parameters; `model.params` if they are left out.
      progress: whether a terminal shows a progress bar.
      **options: of the method's start. LoRA's are those of `jdelta.EvaStart`, `CordaStart` and `LoraGaStart`.

    Returns:
      The tree with the new values. Without `params`, it is also in `model.params`.

    Raises:
      RuntimeError: the delta is detached or merged.
      TypeError: a batch does not fit the model, or an option is unknown.
      ValueError: the method does not start from data, there are no batches or no values, or what goes into a module
        cannot be seen. The model is then as it was.
    """
    own = state.active("initialised")
    start = _start(state, options)
    tree = state.values(params)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"{state.label}: a start from data runs the model, which holds shapes only. Pass the values, now or when "
            "they are there: delta.init_from_data(batches, params=params)."
        )
    if start.sums == "gradients" and loss is None:
        raise ValueError(
            f"{state.label} starts from the gradients of a loss here. Pass it: "
            "delta.init_from_data(batches, loss=lambda params, batch: …)."
        )
    edits = [edit for edit in own.edits if not edit.auxiliary and not (isinstance(edit, WeightEdit) and edit.is_bias)]
    for edit in edits:
        try:
            start.check(edit)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{state.label} at {where(edit)}: {error}") from error
    begin = surgery.root(tree)
    gone = {(*begin, *path) for path in own.leaves}
    bare = surgery.unflatten({p: leaf for p, leaf in surgery.flatten(tree).items() if p not in gone}, like=tree)
    found = summed(state, start, edits, bare, batches, loss, progress)
    method = start.adapted(state.method, state.structure, found)
    before = state.method, state.shapes
    try:
        with unchanged_on_error(state.host):
            if method is not state.method:
                tree = _attached_anew(state, method, bare, params is None)
            new = _with_values(state, start, {place(edit): sums for edit, sums in found.items()}, tree)
            if params is None:
                state.host.params = new
    except Exception:
        state.method, state.shapes = before
        raise
    if state.initial is not None:
        state.initial |= digests(surgery.parameters(new), state.attachment.leaves)
    state.started = True
    return new


def _start(state: DeltaState, options: Mapping[str, Any]) -> DataStart:
    """How the method starts, with these options."""
    known = list(inspect.signature(state.method.data_start).parameters.values())
    if unknown := options.keys() - {p.name for p in known} if all(p.kind is not p.VAR_KEYWORD for p in known) else ():
        has = f"It has {', '.join(p.name for p in known)}." if known else "It has none."
        raise TypeError(f"init_from_data: {state.label} has no option {min(unknown)!r}. {has}")
    start: DataStart | None = state.method.data_start(**options)
    if start is None:
        raise ValueError(f"{state.label} does not start from data: its method has no data_start.")
    return start


def _attached_anew(state: DeltaState, method: Method, bare: Tree, in_model: bool) -> Tree:
    """The tree, after the delta was attached anew with other arguments, at the same place among the model's deltas."""
    if state.inserted:
        raise ValueError(
            f"{state.label}: its arguments follow from the data, and layers were put into it by hand. Put them into "
            "a delta of their own."
        )
    if state.host.params is not None:
        held, mine = state.host.params, {(*surgery.root(state.host.params), *p) for p in state.attachment.leaves}
        kept = {path: leaf for path, leaf in surgery.flatten(held).items() if path not in mine}
        state.host.params = surgery.unflatten(kept, like=held)
    state.method = method
    put(state, edits_at(state, method.modified_modules or ()))
    return state.host.tree() if in_model else surgery.graft(bare, init(state, state.rng, bare))


def _with_values(state: DeltaState, start: DataStart, found: Mapping[Any, Sums], tree: Tree) -> Tree:
    """The tree with the delta's initial values."""
    leaves, begin = surgery.parameters_of(tree), surgery.root(tree)
    new: dict[Path, jax.Array] = {}
    for edit in state.attachment.edits:
        if (sums := found.get(place(edit))) is None:
            continue
        if isinstance(edit, CallEdit):
            at = (*edit.host, *edit.leaf)
            own = {surgery.name_of(p[len(at) :]): p for p in state.attachment.leaves if p[: len(at)] == at}
            values = start.init(edit, state.rng, None, {k: meta.unbox(leaves[p]) for k, p in own.items()}, _seen(sums))
            new |= {own[name]: value for name, value in values.items()}
        else:
            held = {name: meta.unbox(leaf) for name, leaf in weights.own_leaves(edit, leaves).items()}
            try:
                values = _values_at(start, edit, state.rng, meta.unbox(leaves[edit.leaf]), held, sums)
            except ValueError as error:
                raise ValueError(f"{state.label} at {where(edit)}: {error}") from error
            new |= {(*edit.own_path, name): value for name, value in values.items()}
    return surgery.replaced(tree, {(*begin, *path): value for path, value in new.items()})


def _values_at(
    start: DataStart, edit: WeightEdit, key: jax.Array, leaf: jax.Array, own: Sums, sums: Sums
) -> Mapping[str, jax.Array]:
    """The initial values of an edit's own leaves, as they are stored."""
    kind = weights.kind_of(edit)
    over = _values_once if kind.is_hashable() else _values_over
    values: Mapping[str, jax.Array] = over(start, kind, edit.layers, key, leaf, dict(own), dict(sums))
    return values


def _values_over(
    start: DataStart, kind: Kind, layers: tuple[int, ...], key: jax.Array, leaf: jax.Array, own: Sums, sums: Sums
) -> dict[str, jax.Array]:
    if layers:
        *rest, axis = layers  # the outermost
        run = functools.partial(_values_over, start, kind, tuple(rest))
        mapped: dict[str, jax.Array] = jax.vmap(run, (0, axis, axis, axis), axis)(
            jax.random.split(key, leaf.shape[axis]), leaf, own, sums
        )
        return mapped
    edit, layout = kind.edit, weights.layout_of(kind.edit)

    def of_matrix(key: jax.Array, weight: jax.Array, own: Sums, sums: Sums) -> Mapping[str, jax.Array]:
        return start.init(edit, key, weight.astype(jnp.float32), own, _seen(sums))

    run_shared: Callable[..., Mapping[str, jax.Array]] = of_matrix
    for _ in layout.shared:
        run_shared = jax.vmap(run_shared)
    if start.sums == "gradients":
        sums = {name: layout.matrix(value) for name, value in sums.items()}
    size = tuple(layout.sizes(kind.shape, "shared"))
    keys = jax.random.split(key, size) if size else key
    made = run_shared(keys, layout.matrix(leaf), weights.seen_own(edit, own), sums)
    return {name: weights.stored_own(edit, name, value) for name, value in made.items()}


_values_once = jax.jit(_values_over, static_argnums=(0, 1, 2))  # traced once for all places that are alike


def _seen(sums: Sums) -> Sums:
    return {name: value[0, 0] if name == COUNT else value for name, value in sums.items()}
