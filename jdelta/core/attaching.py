"""Onto the model: all that can fail comes first, then model and parameters change."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from jdelta.core import training, weights
from jdelta.core.checking import check_if_asked
from jdelta.core.edits import Attachment, Edit, WeightEdit
from jdelta.core.host import Trial, unchanged_on_error
from jdelta.core.initial_values import initial_values
from jdelta.core.method import Find
from jdelta.core.parameters import unread
from jdelta.core.placement import edits_at, warn_of_twin
from jdelta.core.rules import FeatureRule, WeightRule, dropout_of, starts_from_weight
from jdelta.core.state import DeltaState, carried, copied, digests, free_name, unfrozen_backbone
from jdelta.core.structure import require_open
from jdelta.trees import dtypes, memory, surgery
from jdelta.trees.surgery import Path, Tree


class _NamedLikeALeaf(ValueError):
    """A delta has the name of one of its own leaves."""


def attach_at(state: DeltaState, patterns: Sequence[str], find: Find | None, is_named: bool) -> None:
    """Attaches to the modules that the patterns mean.

    Args:
      state: a delta that is on no module yet.
      patterns, find: as in `placement.edits_at`.
      is_named: whether the user named the delta; else, if leaves have the name that it gave itself, it takes another.
    """
    if patterns and not type(state.method).has_edits():
        raise ValueError(
            f"{state.label} does nothing to modules of itself: its method defines neither edits nor place. Leave "
            f"modified_modules={list(patterns)} out, or define edits(self, host, structure)."
        )
    edits = edits_at(state, patterns, find)
    if not is_named:
        warn_of_twin(state, edits)
    try:
        put(state, edits)
    except _NamedLikeALeaf:
        if is_named:
            raise
        state.name = free_name(state, None, but=state.name)
        put(state, edits_at(state, patterns, find))


def put(state: DeltaState, edits: Sequence[Edit]) -> None:
    """Makes these the delta's edits. If anything is raised, the model is as it was."""
    host = state.host
    surgery.require_alive(host.params)
    draft, index, everything = tried(state, edits)
    others = carried(state)
    known = {path for path in surgery.flatten(state.structure.params)}
    known.update(path for a in others if a.name != state.name for path in a.leaves)
    shapes = {p: leaf for p, leaf in surgery.flatten(surgery.parameters(everything)).items() if p not in known}
    _check_names(state, shapes, others)
    draft[index], own = _attachment_of(state, draft[index].edits, shapes)
    _require_room(state, own)

    params = after = host.params
    fresh: list[Path] = []
    if params is not None:
        have = surgery.flatten(params)
        fresh = [p for p in draft[index].leaves if (*surgery.root(params), *p) not in have]
        after = surgery.graft(params, initial_values(state, draft, fresh, params)) if fresh else params
    start = surgery.root(everything)
    before = state.kept
    try:
        with unchanged_on_error(host):
            host.install(draft)
            if params is not None:
                host.params = after
                state.kept = {p: copied(leaf) for p, leaf in unfrozen_backbone(state, after).items()} | state.kept
            if not draft[index].generated:
                host.remember_tree(everything)
            training.trainable_mask(state)
            training.warn_of_untrainable(state, state.method.unfrozen_modules or (), "unfrozen_modules")
    except Exception:
        state.kept = before
        raise
    state.shapes = surgery.unflatten({(*start, *path): shape for path, shape in own.items()})
    if params is not None and state.initial is not None:
        state.initial |= digests(surgery.parameters(after), fresh)


# --- what can be wrong


def tried(state: DeltaState, edits: Sequence[Edit]) -> tuple[list[Attachment], int, Tree]:
    """What the model would carry with these edits, which of it they are, and its leaves' shapes.

    Nothing changes; raises what can be wrong with the edits.
    """
    edits = list({place(edit): edit for edit in edits}.values())  # a module meant twice is edited once
    others = carried(state)
    index = next((i for i, a in enumerate(others) if a.name == state.name), len(others))
    if index < len(others) and not others[index].active:
        raise RuntimeError(f"delta {state.name!r} is detached; call attach() before changing it.")
    check(state, edits, others)
    draft = [*others[:index], Attachment(state.name, tuple(edits)), *others[index + 1 :]]
    trial = Trial()
    try:
        everything = jax.eval_shape(lambda key: state.host.init(draft, key, trial), state.rng)
    except Exception as error:  # flax has kinds of its own, and a layer may raise anything
        kind = next((k for k in (TypeError, ValueError, RuntimeError) if isinstance(error, k)), None)
        if kind is not None and _is_from_here(error):
            raise
        names = list(dict.fromkeys(surgery.name_of(edit.host) for edit in edits))
        at = ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
        raise (kind or ValueError)(
            f"{state.label}: the model does not run with these layers, at {at}: {error}"
        ) from error
    require_same_backbone(state, everything)
    for edit in edits:
        runs = edit.in_call if isinstance(edit, WeightEdit) else edit.layer is not None
        if runs and edit not in trial.ran:
            raise ValueError(f"{surgery.name_of(edit.host)} was not called in the model's run on its pseudo input.")
    _require_read(state, draft, edits)
    check_if_asked(edits, state.structure)
    return draft, index, everything


def check(state: DeltaState, edits: Sequence[Edit], others: Sequence[Attachment]) -> None:
    """Raises `TypeError` or `ValueError` if a module cannot have an edit."""
    spans = any(edit.span_input is not None for edit in edits)
    order = {info.path: i for i, info in enumerate(state.structure)} if spans else {}
    by_leaf = any(edit.where in ("train", "weight") for edit in edits)
    held = surgery.flatten(surgery.parameters(_held(state))) if by_leaf else {}
    owners = {path: a.name for a in others if a.name != state.name for path in a.unfrozen_backbone}
    for edit in edits:
        if isinstance(edit, WeightEdit):
            _check_weight(state, edit, held)
            continue
        host = state.structure.run_by(surgery.name_of(edit.host), edit.method)
        require_open(host)
        if edit.where == "train":
            if (*edit.host, *edit.leaf) in owners:
                owner = owners[(*edit.host, *edit.leaf)]
                raise ValueError(f"{host.name}.{surgery.name_of(edit.leaf)} is trained by delta {owner!r} already.")
            leaf = held.get((*edit.host, *edit.leaf))
            if dtypes.is_fixed(leaf):
                raise TypeError(
                    f"{host.name}.{surgery.name_of(edit.leaf)} holds {meta.unbox(leaf).dtype}, and only floats of "
                    "16 bits and more train. Leave the module out with exclude_modules."
                )
            continue
        if edit.where == "around" and not getattr(type(edit.layer).__call__, "nowrap", False):
            raise TypeError(f"{type(edit.layer).__name__} goes around modules: mark its __call__ with nn.nowrap.")
        if edit.span_input is not None and order[edit.span_input] > order[edit.host]:
            raise ValueError(f"the span starts at {surgery.name_of(edit.span_input)}, which runs after {host.name}.")
        for side in {"before": "x", "after": "y", "parallel": "y"}.get(edit.where, ""):
            what = "takes" if side == "x" else "returns"
            try:
                dtype = getattr(host, side).dtype
            except TypeError as error:
                raise TypeError(f"{host.name} ({host.type.__name__}) cannot be a target: {error}") from error
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(f"{host.name} ({host.type.__name__}) {what} an array of {dtype}; a layer needs floats.")


def _held(state: DeltaState) -> Tree:
    """The backbone's parameters, at least as shapes, without a run of the model with its deltas."""
    return state.structure.params if state.host.params is None else state.host.params


def place(edit: Edit) -> Any:
    """Where an edit is: two of one delta at the same place are the same."""
    return (edit.leaf, edit.own) if isinstance(edit, WeightEdit) else (edit.host, edit.method, edit.where, edit.leaf)


def _check_weight(state: DeltaState, edit: WeightEdit, held: Mapping[Path, Any]) -> None:
    """Raises `TypeError` or `ValueError` if a leaf cannot have an edit."""
    name, rule = surgery.name_of(edit.leaf), type(edit.rule).__name__
    if edit.by_module:
        require_open(state.structure[surgery.name_of(edit.host)])
    leaf = held.get(edit.leaf)
    if not edit.in_call and dtypes.is_fixed(leaf):
        raise TypeError(
            f"{state.label}: {name} holds {meta.unbox(leaf).dtype}, and an update is added only to floats of 16 bits "
            "and more. Leave it out."
        )
    if not isinstance(edit.rule, WeightRule | FeatureRule):
        raise TypeError(f"{state.label}: the rule {rule} at {name} has no init and update, or init and transform.")
    weights.require_sound(edit)
    if edit.in_call and dtypes.is_fixed(leaf) and (weights.needs_weight(edit) or starts_from_weight(edit.rule)):
        raise TypeError(
            f"{state.label}: {rule} computes with the values of {name}, which holds {meta.unbox(leaf).dtype}: codes, "
            "and not the weight that they stand for. LoRA adds to the output alone."
        )
    if dropout_of(edit.rule) and not edit.in_call:
        raise ValueError(
            f"{state.label}: dropout of the input, such as lora_dropout, needs the input that meets the weight, and of "
            f"{name!r} nobody knows it. Take a dropout of 0, or name a linear module."
        )


def _require_read(state: DeltaState, draft: Sequence[Attachment], edits: Sequence[Edit]) -> None:
    """Raises `ValueError` if nothing in the model's run depends on a leaf that an edit would change."""
    paths = [edit.leaf for edit in edits if isinstance(edit, WeightEdit) and not edit.in_call]
    if not paths:
        return

    def run(probes: dict[str, jax.Array]) -> Any:
        trial = Trial(probes)
        state.host.init(draft, state.rng, trial)
        return trial.outputs

    probes = {surgery.name_of(path): jnp.zeros((), jnp.float32) for path in paths}
    if names := [surgery.name_of(path) for path in unread(run, probes)]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"{state.label}: nothing in the model's run on its pseudo input reads {names[0]!r}{more}: a delta there "
            "would train nothing. Leave it out."
        )


def require_same_backbone(state: DeltaState, everything: Tree) -> None:
    """Raises `ValueError` if the backbone's own leaves would have other shapes with the edits."""
    now, before = (surgery.parameters_of(tree) for tree in (everything, state.structure.params))
    for path in now.keys() & before.keys():
        new, old = meta.unbox(now[path]), meta.unbox(before[path])
        if surgery.empty_node not in (new, old) and new.shape != old.shape:
            raise ValueError(
                f"{state.label}: with these layers {surgery.name_of(path)} would have shape {new.shape}, "
                f"and it has {old.shape}. A layer has to return the shape that the next module takes."
            )


def _require_room(state: DeltaState, own: Mapping[Path, Any]) -> None:
    """Raises `ValueError` if the delta's leaves do not fit into memory, or are not those that are expected."""
    if state.check is not None:
        state.check(state, own)
    held = jax.tree.leaves(state.host.params)
    values = bool(held) and not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in held)
    memory.require_room(f"{state.label}: the leaves of delta {state.name!r}", own.values(), values)


def _check_names(state: DeltaState, leaves: Iterable[Path], others: Sequence[Attachment]) -> None:
    """Raises `ValueError` if parts of the delta's leaves are called like a delta."""
    named = {a.name for a in others if a.name != state.name}
    for path in leaves:
        if path.count(state.name) > 1:
            raise _NamedLikeALeaf(
                f"a delta cannot be named {state.name!r}: it has the leaf {surgery.name_of(path)!r}. Choose another "
                "name."
            )
        if taken := named.intersection(path):
            raise ValueError(
                f"{state.label} has the leaf {surgery.name_of(path)!r}, and a delta of this model is named "
                f"{min(taken)!r}. Take that one off, and give it another name."
            )


def _attachment_of(
    state: DeltaState, edits: Sequence[Edit], shapes: Mapping[Path, Any]
) -> tuple[Attachment, dict[Path, Any]]:
    """The attachment of these edits, whose layers have leaves of these shapes; and the shapes of its own leaves."""
    generator, own = state.method.generator(shapes), dict(shapes)
    generated: tuple[Path, ...] = ()
    if generator is not None:
        output, variables = jax.eval_shape(generator.init_with_output, state.rng)
        generated = tuple(path for path in shapes if path in output)
        own = {path: shape for path, shape in shapes.items() if path not in generated}
        own |= {(state.name, *path): shape for path, shape in surgery.flatten(variables["params"]).items()}
    frozen = frozenset(path for path in own if state.method.frozen(path) or state.method.regenerated(path))
    return Attachment(state.name, tuple(edits), tuple(own), True, frozen, generator, generated, state.method), own


def _is_from_here(error: Exception) -> bool:
    """Whether code of jdelta raised it, whose messages name modules, and not the model's, a layer's or jax's."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module: str = frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == __name__.partition(".")[0]
