"""Merges deltas into the weights of their hosts, and takes them out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta

from jdelta.core import switching, training, weights
from jdelta.core.edits import Attachment, CallEdit, WeightEdit
from jdelta.core.generators import with_generated
from jdelta.core.linear_maps import scanned_axes
from jdelta.core.method import Method
from jdelta.core.state import DeltaState, digests, require_whole, unfrozen_backbone
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.core.warn import warn
from jdelta.trees import dtypes, fingerprint, states, surgery
from jdelta.trees.surgery import Path, Tree

NO_CHANGE = "what {} computes is no change of the module's weights."


def merged(params: Tree, name: str, attachments: Sequence[Attachment], structure: Structure) -> dict[Path, Any]:
    """The weights of the hosts after the edits of one attached delta are merged into them.

    A layer that can be merged has a method `merged(host, weights, own)`: from the host as the trace saw it, the host's
    own leaves and the layer's, it returns those of the host's leaves that change, and those that it needs besides. Such
    a layer has a method `after_merge()` too: the layer that runs these leaves, if the host has them, while the delta is
    off. Else `movement` can measure the layer, and merging refuses it.

    Args:
      params: the parameters, without other collections.
      name: that of the delta.
      attachments: all of the model, in the order of attaching.
      structure: the backbone's.

    Returns:
      Path to new value of each leaf that changes.

    Raises:
      ValueError: an edit cannot be merged; the message names the first few modules.
    """
    active = [a for a in attachments if a.active]
    before = active[: [a.name for a in active].index(name)]
    earlier = {e.host: a.name for a in before for e in a.call_edits if _wraps(e)}
    leaves = surgery.flatten(params)
    modules = {info.path: info for info in structure}
    changed: dict[Path, Any] = {}
    problems: dict[str, list[str]] = {}
    own = next(a for a in active if a.name == name)
    for edit in own.call_edits:
        if edit.where == "train":
            continue  # the value is in its place
        host = modules[edit.host]
        try:
            changed |= _merged_layer(edit, host, {**leaves, **changed}, earlier.get(edit.host), structure)
        except (TypeError, ValueError) as error:
            problems.setdefault(str(error), []).append(host.name)
    others = {e.leaf: a.name for a in active if a.name != name for e in a.weight_edits if weights.reads_weight(e)}
    for path in dict.fromkeys(edit.leaf for edit in own.weight_edits):
        edits = [edit for edit in own.weight_edits if edit.leaf == path]
        try:
            if path in others:
                raise ValueError(
                    f"the change of delta {others[path]!r} depends on this weight, and would be another one after "
                    "merging. Merge that delta first, or detach it."
                )
            changed[path] = _changed_weight(edits, leaves, changed.get(path, leaves[path]), structure)
        except (TypeError, ValueError) as error:
            problems.setdefault(str(error), []).append(surgery.name_of(path[:-1] if edits[0].in_call else path))
    if problems:
        reason, names = next(iter(problems.items()))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"delta {name!r} cannot be merged at {', '.join(names[:3])}{more}: {reason} Keep it attached, or leave "
            "these modules out with exclude_modules."
        )
    return changed


def _wraps(edit: CallEdit) -> bool:
    """Whether later edits of the same host do not see the host itself."""
    return edit.where not in ("parallel", "train")


def _merged_layer(
    edit: CallEdit, host: ModuleInfo, leaves: Mapping[Path, Any], earlier: str | None, structure: Structure
) -> dict[Path, Any]:
    if not is_mergeable(edit):
        raise ValueError(NO_CHANGE.format(type(edit.layer).__name__))
    if earlier is not None:
        raise ValueError(f"delta {earlier!r}, which was attached before, stands between it and the weights.")
    if host.name in structure.tied:
        raise ValueError("its weights are those of a tied head or another method too, which the delta does not change.")
    new = merged_by_layer(edit, host, leaves)
    require_steps(host, new, leaves)
    lacking = sorted(new.keys() - host.params.keys())
    if lacking and not hasattr(edit.layer, "after_merge"):
        raise ValueError(f"it would have to go into a {lacking[0]}, and the module has none.")
    boxes = {key: leaves[(*host.path, *(edit.leaf if key in lacking else ()), key)] for key in new}
    return {(*host.path, key): surgery.in_place_of(boxes[key], value) for key, value in new.items()}


def _changed_weight(edits: Sequence[WeightEdit], leaves: Mapping[Path, Any], held: Any, structure: Structure) -> Any:
    """A leaf with the changes of a delta's edits, which are evaluated at the leaf without the delta."""
    path = edits[0].leaf
    host = surgery.name_of(path[:-1])
    if edits[0].in_call and host in structure.tied:
        raise ValueError(
            "its weights are those of a tied head or another method too, which the delta does not change. With "
            f"modified_parameters=[{surgery.name_of(path)!r}] it changes both."
        )
    require_steps_of(path, leaves[path])
    own = [weights.own_leaves(edit, leaves) for edit in edits]
    new = weights.changed(edits, meta.unbox(held), own)
    return surgery.in_place_of(leaves[path], new)


def require_steps_of(path: Path, leaf: Any) -> None:
    """Raises `ValueError` if a leaf is of a dtype in which nothing can be added to it."""
    if dtypes.is_fixed(leaf):
        raise ValueError(
            f"its {path[-1]} holds {meta.unbox(leaf).dtype}, and an update is added only to floats of 16 bits and more."
        )


def require_steps(host: ModuleInfo, keys: Iterable[str], leaves: Mapping[Path, Any]) -> None:
    """Raises `ValueError` if one of these leaves of a module is of a dtype in which nothing can be added to it."""
    for path in ((*host.path, key) for key in keys):
        if path in leaves:
            require_steps_of(path, leaves[path])


def is_mergeable(edit: CallEdit) -> bool:
    """Whether a layer changes the weights of its host: it has a method `merged`, and takes the host's own input."""
    return hasattr(edit.layer, "merged") and edit.span_input in (None, edit.host)


def merged_by_layer(edit: CallEdit, host: ModuleInfo, leaves: Mapping[Path, Any]) -> dict[str, jax.Array]:
    """What the layer's `merged` returns for its host, also inside a scan, where leaves have more axes than a host sees.

    Args:
      edit: one that `is_mergeable`.
      host: its host, as the trace saw it.
      leaves: path to value, those of host and layer among them.
    """
    own_keys = {*host.params, "bias"}  # a bias that it did not have may have been merged into it before
    held = {key: meta.unbox(leaves[(*host.path, key)]) for key in own_keys if (*host.path, key) in leaves}
    begin = (*host.path, *edit.leaf)
    own = {path[-1]: meta.unbox(leaf) for path, leaf in leaves.items() if path[:-1] == begin}
    layer: Any = edit.layer
    run: Callable[..., dict[str, jax.Array]] = lambda weights, own: layer.merged(host, weights, own)  # noqa: E731
    keys = list(host.params)
    for axis in scanned_axes([held[key].shape for key in keys], [host.params[key].shape for key in keys]):
        run = jax.vmap(run, axis, axis)
    return run(held, own)


# --- a delta on a model


def merge(state: DeltaState, params: Tree | None = None) -> Tree:
    """Merges the delta into the weights of its hosts: the model then computes the same, at the bare backbone's cost.

        delta.merge()
        delta.unmerge()  # every bit as before
        served = delta.merge(params)  # a tree of your own: the bare backbone's

    LoRA merges into every module that it takes; trained biases of BitFit are in their place already. A bias that
    BitFit gave to a module without one becomes the module's own leaf `bias`, as a module with biases would have it,
    and still costs its addition. The weights keep their dtype; the sums are computed in float32. `unmerge` puts the
    original bits back. A delta of which nothing has moved since it was initialised is a `UserWarning`.

    Args:
      params: a tree to merge into, whose leaves are only read; by default `model.params`.

    Returns:
      The tree of the bare backbone, with the delta merged in. Without `params`, it is also put into `model.params`,
      and the delta is detached. With `params`, nothing else changes (and it can be jitted): call `detach()` for
      a model that takes the new tree.

    Raises:
      RuntimeError: the delta is detached or merged, or the tree was donated.
      ValueError: some of it cannot be merged, such as a layer with a non-linearity, an embedding that is tied to
        the head, or an update of weights that are no floats of 16 bits and more. The message names the modules.
    """
    own, tree = state.active("merged"), state.values(params)
    start, attachments = surgery.root(tree), state.host.attachments
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
        raise ValueError("merge: the model holds shapes only. Pass the tree that holds values: delta.merge(params).")
    require_whole(state, tree, "merge")
    made = with_generated({"params": surgery.parameters(tree)}, [own])["params"]
    if training.is_untrained(state, tree):
        warn(training.untrained_message(state, "merge", params))
    changed = merged(made, state.name, attachments, state.structure)
    new = {(*start, *path): value for path, value in changed.items()}
    state.was_merged = True
    if params is not None:
        leaves = surgery.flatten(tree)
        own_leaves = {(*start, *path) for path in own.leaves}
        kept = {path: leaf for path, leaf in leaves.items() if path not in own_leaves}
        return surgery.unflatten(kept | new, like=tree, deltas=False)
    new |= unfrozen_backbone(state, tree)
    switching.detach(state)
    before = surgery.flatten(state.host.params)
    state.unmerged = {path: (before.get(path), leaf) for path, leaf in new.items()}
    state.host.params = surgery.unflatten({**before, **new}, like=tree)
    return state.host.held_tree()


def unmerge(state: DeltaState) -> None:
    """Restores the weights from before merging, bit for bit, and attaches the delta again.

        delta.merge()
        delta.unmerge()

    Raises:
      RuntimeError: the delta is not merged, or the weights from before or after merging were donated.
      ValueError: weights have changed since, by training or by a delta that was merged later.
    """
    host = state.host
    if not state.merged:
        raise RuntimeError(f"delta {state.name!r} is not merged.")
    surgery.require_alive(host.params)
    if any(surgery.is_deleted(original) for original, _ in state.unmerged.values()):
        raise RuntimeError(
            "unmerge: the weights from before merging were donated to a jitted function, and so deleted. Load the "
            "backbone afresh."
        )
    leaves = surgery.flatten(host.params)
    for path, (_, now) in state.unmerged.items():
        if leaves.get(path) is not now and not _same_bits(leaves.get(path), now):
            raise ValueError(
                f"unmerge: {surgery.name_of(path)!r} was changed after delta {state.name!r} was merged. If another "
                "delta was merged since, unmerge that one first."
            )
    back = leaves | {path: original for path, (original, _) in state.unmerged.items()}
    back = {path: leaf for path, leaf in back.items() if leaf is not None}
    host.params = surgery.unflatten(back, like=host.params)
    state.unmerged = {}
    switching.attach(state)


def materialise(state: DeltaState, params: Tree | None = None) -> Tree:
    """Writes what a generator makes, such as a prefix's keys and values, in place of its parameters.

    The model computes the same; the leaves are then those of `reparameterize=False`, the configuration says so,
    and training goes on with them.

        delta = jdelta.PrefixModel(model)
        delta.materialise()

    Args:
      params: the tree to take the values from; by default `model.params`.

    Returns:
      The new tree. Without `params`, it is also put into `model.params`. An nnx module whose state is given has its own
      leaves replaced too, so that the new state fits it.

    Raises:
      RuntimeError: the tree was donated.
      ValueError: there is no generator, or the delta is detached.
    """
    own, method = state.attachment, state.method.materialised()
    if own.generator is None or method is None or not own.active:
        raise ValueError(f"delta {state.name!r} {'is detached' if own.generator else 'has nothing to materialise'}.")
    tree = state.values(params)
    untrained = training.is_untrained(state, tree)
    written, attachment = materialised(state, tree, method)
    in_model = materialised(state, state.host.tree(), method)[0] if states.is_state(params) else written
    state.initial = digests(surgery.parameters(written), attachment.leaves) if untrained else None
    state.host.install([attachment if a.name == own.name else a for a in state.host.attachments])
    state.method = method
    state.shapes = surgery.shapes(surgery.select(written, attachment.leaves))
    if (params is None or states.is_state(params)) and state.host.params is not None:
        state.host.params = in_model
    return written if params is not None or state.host.params is None else state.host.held_tree()


def materialised(state: DeltaState, tree: Tree, method: Method) -> tuple[Tree, Attachment]:
    """The tree with what the generator makes in place of its parameters, and the attachment that goes with it."""
    own, start = state.attachment, surgery.root(tree)
    parameters = surgery.parameters(tree)
    leaves = surgery.flatten(with_generated({"params": parameters}, [own])["params"])
    leaves = {path: leaf for path, leaf in leaves.items() if path[0] != state.name}
    held = {(*start, *path) for path in surgery.flatten(parameters)}
    rest = {path: leaf for path, leaf in surgery.flatten(tree).items() if path not in held}
    written = surgery.unflatten(rest | {(*start, *path): leaf for path, leaf in leaves.items()}, like=tree)
    kept = tuple(path for path in own.leaves if path[0] != state.name)
    return written, dataclasses.replace(
        own, leaves=(*kept, *own.generated), generator=None, generated=(), config=method
    )


def _same_bits(one: Any, other: Any) -> bool:
    if one is None or one.dtype != other.dtype or surgery.is_deleted(other):
        return False
    return fingerprint.digest(one) == fingerprint.digest(other)
