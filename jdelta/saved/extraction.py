"""A trained delta apart from its model, and back onto one."""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.core import meta

from jdelta.core import training
from jdelta.core.config import as_type
from jdelta.core.merging import materialised
from jdelta.core.method import Method
from jdelta.core.state import DeltaState, targets
from jdelta.saved import hub
from jdelta.saved.finetuned import BackboneInfo, Finetuned, listing, misfits, require_check_hash, require_same
from jdelta.trees import fingerprint, processes, surgery
from jdelta.trees.surgery import Tree


def finetuned(state: DeltaState, params: Tree | None) -> Finetuned:
    """See `DeltaModel.finetuned`."""
    state.active("saved")
    if training.is_untrained(state, state.values(params)):
        warnings.warn(training.untrained_message(state, "finetuned", params), stacklevel=3)
    return extracted(state, params)


def trained_or_allowed(state: DeltaState, verb: str, params: Tree | None, allow_untrained: bool) -> Finetuned:
    """What is written. Raises `ValueError` if nothing has moved, unless that is allowed."""
    state.active("saved")
    allowed = as_type("allow_untrained", allow_untrained, bool)
    if not allowed and training.is_untrained(state, state.values(params)):
        message = training.untrained_message(state, verb, params)
        raise ValueError(f"{message} To write it as it is: allow_untrained=True.")
    return extracted(state, params)


def extracted(state: DeltaState, params: Tree | None) -> Finetuned:
    """The delta apart from the model, whether it has moved or not."""
    own, tree, method = state.active("saved"), state.values(params), state.method
    trains = surgery.flatten(surgery.parameters(training.mask_of(state, tree)))
    deltas = {path for a in state.host.attachments for path in a.leaves}
    backbone = [path for path, flag in trains.items() if path not in deltas and flag is not surgery.empty_node]
    if own.generator is not None and (simple := method.materialised()) is not None:
        tree, own = materialised(state, tree, simple)
        method = simple
    leaves = surgery.flatten(surgery.parameters(tree))
    mine = [path for path in own.leaves if not method.regenerated(path)]
    wanted = [*mine, *(path for path in backbone if trains[path])]
    for path in wanted:
        if path not in leaves or isinstance(meta.unbox(leaves[path]), jax.ShapeDtypeStruct):
            raise ValueError(f"the tree holds no value of {surgery.name_of(path)!r}. Pass one that does: params=….")
    frozen = {surgery.name_of(path): leaves[path] for path in backbone if not trains[path]}
    host = state.host
    return Finetuned(
        name=state.name,
        config=method,
        values={surgery.name_of(path): processes.to_host(leaves[path]) for path in wanted},
        targets=tuple(targets(state)),
        exclude=state.exclude,
        inserted=tuple(state.inserted),
        backbone=BackboneInfo(host.class_name, host.source_repo, fingerprint.fingerprint(frozen)),
        own=frozenset(map(surgery.name_of, mine)),
    )


def load(
    state: DeltaState,
    source: str | os.PathLike[str] | Finetuned,
    params: Tree | None,
    check_hash: bool | Literal["warn"],
    revision: str | None,
) -> Tree:
    """See `DeltaModel.load_finetuned`."""
    own = state.active("loaded")
    require_check_hash(check_hash)
    if not isinstance(source, Finetuned):
        source = read_delta(source, revision, state.values(params))
    found = source.renamed(state.name)
    _require_fit(state, found)
    tree = state.values(params)
    leaves = surgery.flatten(surgery.parameters(tree))
    shapes = leaves | surgery.flatten(surgery.parameters(state.shapes))
    paths = {surgery.name_of(path): path for path in shapes}
    if odd := misfits(found, _to_be_loaded(state, shapes, own.leaves), leaves):
        raise ValueError(f"delta {state.name!r} cannot be loaded: {listing(odd)}.")
    if check_hash:
        deltas = {path for a in state.host.attachments for path in a.leaves}
        rest = {
            name: leaves[path]
            for name, path in paths.items()
            if path in leaves and path not in deltas and name not in found.values
        }
        require_same({} if not rest else fingerprint.fingerprint(rest), found, check_hash)
    narrower = [
        f"{name} ({value.dtype} in place of {here})"
        for name, value in found.values.items()
        if jnp.promote_types(value.dtype, here := meta.unbox(shapes[paths[name]]).dtype) != value.dtype
    ]
    if narrower:
        warnings.warn(
            f"delta {state.name!r} was saved in a narrower dtype, and its leaves have that now: "
            f"{listing(narrower)}. In less than float32 training rounds small steps away, or overflows: before "
            "training on, cast what trains (trainable_mask says what) to float32.",
            stacklevel=3,
        )
    state.initial = None
    start = surgery.root(tree)
    loaded = surgery.replaced(tree, {(*start, *paths[name]): value for name, value in found.values.items()})
    if params is None and state.host.params is not None:
        state.host.params = loaded
    return loaded


def read_delta(source: str | os.PathLike[str], revision: str | None, params: Tree | None) -> Finetuned:
    """What is saved in a folder or on the Hub. Where other processes hold some of `params`, all have to find the same.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: no such folder or repository, or none that opens.
      ValueError: a file is damaged, or the processes find different deltas.
    """

    def read() -> Finetuned:
        return Finetuned.read(hub.fetch(source, revision))

    return processes.together(read, Finetuned.checksum) if processes.spread(params) else read()


def require_leaves(found: Finetuned, state: DeltaState, own: Any) -> None:
    """Raises `ValueError` unless a delta that is being attached will have the leaves of a saved one."""
    named = found.renamed(state.name)
    mine = _to_be_loaded(state, own, own)
    if odd := misfits(named, mine, surgery.flatten(surgery.parameters(state.tree(None)))):
        raise ValueError(f"delta {named.name!r} cannot be loaded: {listing(odd)}.")


def _to_be_loaded(state: DeltaState, shapes: Any, paths: Any) -> dict[Any, Any]:
    """Path to shape of the delta's own leaves that a file holds."""
    return {path: shapes[path] for path in paths if not state.method.regenerated(path)}


def _require_fit(state: DeltaState, found: Finetuned) -> None:
    """Raises `ValueError` unless the saved delta is what this one is, up to its values."""
    mine, its, name = state.method.to_dict(), found.config.to_dict(), state.name
    if mine["delta_type"] != its["delta_type"]:
        raise ValueError(f"delta {name!r} is of method {mine['delta_type']!r}; saved is {its['delta_type']!r}.")
    common = {field.name for field in dataclasses.fields(Method)}
    for key in its.keys() - common:
        if mine[key] != its[key]:
            raise ValueError(f"delta {name!r} has {key}={mine[key]!r}; saved is {key}={its[key]!r}.")
    for what, here, there in (
        ("sits on", targets(state), found.targets),
        ("has layers inserted at", state.inserted, found.inserted),
    ):
        if odd := sorted({*here} ^ {*there}):
            side = "the saved one does not" if odd[0] in here else "the saved one does"
            kind, own = found.backbone.kind if found.backbone is not None else "", state.host.class_name
            on = f" (on {kind}; this is {own})" if kind not in ("", own) else ""
            raise ValueError(
                f"delta {name!r} {what} {len(here)} modules, the saved one{on} {what} {len(there)}; at "
                f"{odd[0]}, {side}. Attach with the saved delta's modified_modules, or with "
                "AutoDeltaModel.from_finetuned."
            )
