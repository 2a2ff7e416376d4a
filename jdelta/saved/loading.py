"""Loading saved values into a delta that is attached."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax.core import meta

from jdelta.core.method import Method
from jdelta.core.state import DeltaState, targets
from jdelta.core.warn import warn
from jdelta.saved import hub
from jdelta.saved.finetuned import Finetuned, listing, require_check_hash, require_same
from jdelta.trees import dtypes, fingerprint, processes, surgery
from jdelta.trees.surgery import Path, Tree


def load_finetuned(
    state: DeltaState,
    source: str | os.PathLike[str] | Finetuned,
    params: Tree | None = None,
    check_hash: bool | Literal["warn"] = "warn",
    revision: str | None = None,
) -> Tree:
    """Replaces the values of this delta by saved ones. Compiled functions of the model stay valid.

        delta.load_finetuned("movies/")
        delta.load_finetuned("tweets/")  # another delta of the same method, arguments and modules

    Args:
      source: a folder, a repository of the Hub, or a `Finetuned`.
      params: the tree to put them into, with or without leaves of this delta; by default `model.params`.
      check_hash: what happens if the saved delta was trained on another backbone, or on one whose head was randomly
        initialised: a warning with `"warn"`, an error with `True`, nothing with `False`. Where the backbone is given as
        shapes, only these are compared.
      revision: branch, tag or commit of the repository.

    Returns:
      The tree with the saved values, in the dtype that was saved and with the sharding of the values that they
      replace. A narrower dtype than that of the replaced values is a warning; if the dtype differs, functions are
      compiled again. Without `params`, the tree is also put into `model.params`.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: the folder or repository does not exist or cannot be read.
      RuntimeError: the delta is detached, or the tree was donated.
      TypeError: `source` is not one of the above.
      ValueError: the saved delta is damaged or was changed; its method, arguments or modules differ; or leaves are
        missing, superfluous, of another shape, or floats instead of whole numbers or the reverse. Nothing has changed
        then. (In folders of jdelta's format 1 the checksum covers the tensors only: there a changed description is an
        error where it is invalid or does not fit the tensors.)
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
    if odd := _misfits(found, _to_be_loaded(state, shapes, own.leaves), leaves):
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
        return state.host.held_tree()
    return loaded


def read_delta(source: str | os.PathLike[str], revision: str | None, params: Tree | None) -> Finetuned:
    """Reads a folder or a repository of the Hub. Where other processes hold some of `params`, all must find the same.

    Raises:
      FileNotFoundError, PermissionError, ConnectionError: the folder or repository does not exist or cannot be read.
      ValueError: a file is damaged, or the processes find different deltas.
    """

    def read() -> Finetuned:
        return Finetuned.read(hub.fetch(source, revision))

    return processes.together(read, Finetuned.checksum) if processes.spread(params) else read()


def require_leaves(found: Finetuned, state: DeltaState, own: Any) -> None:
    """Raises `ValueError` unless a delta that is being attached will have the leaves of a saved one."""
    named = found.renamed(state.name)
    mine = _to_be_loaded(state, own, own)
    if odd := _misfits(named, mine, surgery.flatten(surgery.parameters(state.tree(None)))):
        raise ValueError(f"delta {named.name!r} cannot be loaded: {listing(odd)}.")


def _misfits(found: Finetuned, own: Mapping[Path, Any], others: Mapping[Path, Any]) -> list[str]:
    """Why saved values cannot take the place of leaves; a line for each leaf, none if they can.

    Args:
      found: what was saved, under the name that the delta has.
      own: path to shape of the leaves that the delta has, all of which have to be there.
      others: path to the other leaves of the model, any of which may be there.
    """
    held = {path: leaf for path, leaf in {**others, **own}.items() if leaf is not surgery.empty_node}
    leaves = {surgery.name_of(path): meta.unbox(leaf) for path, leaf in held.items()}
    odd = [f"{surgery.name_of(path)} is missing" for path in own if surgery.name_of(path) not in found.values]
    for name, value in found.values.items():
        if name not in leaves:
            odd.append(f"{name} belongs to no part of this model")
        elif value.shape != leaves[name].shape:
            odd.append(f"{name} has shape {value.shape}, here {leaves[name].shape}")
        elif dtypes.takes_steps(value.dtype) == dtypes.is_fixed(leaves[name]):
            odd.append(f"{name} holds {value.dtype}, here {leaves[name].dtype}")
    return odd


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
        ("is attached at", targets(state), found.targets),
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
