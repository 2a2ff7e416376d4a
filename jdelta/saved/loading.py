"""A saved delta back onto a model that carries one like it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

import jax.numpy as jnp
from flax.core import meta

from jdelta.core.method import Method
from jdelta.core.state import DeltaState, targets
from jdelta.core.warn import warn
from jdelta.saved import hub
from jdelta.saved.finetuned import Finetuned, listing, misfits, require_check_hash, require_same
from jdelta.trees import fingerprint, processes, surgery
from jdelta.trees.surgery import Tree


def load_finetuned(
    state: DeltaState,
    source: str | os.PathLike[str] | Finetuned,
    params: Tree | None = None,
    check_hash: bool | Literal["warn"] = "warn",
    revision: str | None = None,
) -> Tree:
    """Puts saved values in the place of this delta's own. Compiled functions of the model stay valid.

        delta.load_finetuned("movies/")
        delta.load_finetuned("tweets/")  # another delta of the same method, arguments and modules

    Args:
      source: a folder, a repository of the Hub, or what `finetuned` gave.
      params: the tree to put them into, with or without leaves of this delta; by default `model.params`.
      check_hash: what to do if it was trained on another backbone, or on one whose head was left random: `"warn"`,
        `True` to refuse, `False` for nothing. Where the backbone is given as shapes, these alone are compared.
      revision: of the repository.

    Returns:
      The tree with the saved values, in the dtype that was saved, and in the sharding of those they replace. A
      dtype that is narrower than the one it replaces is a warning, and with any other one compiled functions are
      compiled again. Without `params`, the tree is also put into `model.params`.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: no such folder or repository, or none that opens.
      RuntimeError: the delta is detached, or the tree was donated.
      TypeError: `source` is none of these.
      ValueError: what is saved is damaged or was changed, is of another method or has other arguments or modules,
        or leaves are missing, surplus or of another shape, or floats stand where there are whole numbers, or the
        other way. Nothing has changed then. (Folders by jdelta before format 2 have a checksum of the tensors
        alone: there a changed description is noticed where it makes no sense or does not fit them.)
    """
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
        warn(
            f"delta {state.name!r} was saved in a narrower dtype, and its leaves have that now: "
            f"{listing(narrower)}. In less than float32 training rounds small steps away, or overflows: before "
            "training on, cast what trains (trainable_mask says what) to float32."
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
